# Copyright 2026 The trl-flow authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import pytest
from PIL import Image

from trl_flow.report import plot_calibration


GAINS = [[0.1, -0.1, 0.02], [0.3, -0.2, 0.0], [0.0, -0.05, 0.01]]


class TestPlotCalibration:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({"gains": GAINS, "noise_level": 0.7}, {"gains": GAINS, "noise_level": [0.7, 0.5, 0.2]}),
            ({"gains": GAINS, "noise_level": [0.7] * 3}, None),
            ({"gains": [[0.1], [], [0.2, None, float("nan")]], "noise_level": [0.0, 0.0, 0.0]}, None),
            ({"gains": [[0.0] * 4] * 40, "noise_level": 0.1}, {"gains": [[1.0]] * 40, "noise_level": 0.1}),
        ],
        ids=["both", "one side", "holes", "many steps"],
    )
    def test_draws(self, tmp_path, before, after):
        path = plot_calibration(before, after, tmp_path / "new" / "calibration.png")
        with Image.open(path) as image:
            assert image.width == (2 if after else 1) * 780

    def test_bad_input(self, tmp_path):
        with pytest.raises(ValueError, match="before calibration: 2 noise levels for 3 steps"):
            plot_calibration({"gains": GAINS, "noise_level": [0.7, 0.7]}, None, tmp_path / "a.png")
        with pytest.raises(ValueError, match="no finite dense reward"):
            plot_calibration({"gains": [[], [None]], "noise_level": 0.7}, None, tmp_path / "a.png")
