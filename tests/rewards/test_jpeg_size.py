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

import numpy as np
import pytest
from PIL import Image

from trl_flow import load_reward


@pytest.fixture
def images():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    gradient = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    return [Image.new("RGB", (64, 64), "red"), Image.fromarray(gradient), Image.fromarray(noise)]


@pytest.mark.parametrize("quality", [95, 50])
def test_size_of_the_file(images, tmp_path, quality):
    sizes = []
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.jpg", quality=quality)
        sizes.append((tmp_path / f"{number}.jpg").stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]
    prompts = ["a"] * 3
    small = load_reward({"jpeg_size": {"quality": quality}})
    large = load_reward({"jpeg_size": {"goal": "incompressible", "quality": quality}})
    assert small(prompts, images, trainer_state=None) == [-size / 1000 for size in sizes]
    assert large(prompts, images) == [size / 1000 for size in sizes]
    assert small.concurrent


def test_other_modes_than_rgb(images):
    reward = load_reward("jpeg_size")
    assert reward(["a"] * 2, [images[2].convert("RGBA"), images[2].convert("P")])[0] == reward(["a"], images[2:])[0]


@pytest.mark.parametrize(
    "settings, message",
    [({"goal": "small"}, "'incompressible'"), ({"quality": 100}, "1 to 95"), ({"quality": 0}, "1 to")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_reward({"jpeg_size": settings})
