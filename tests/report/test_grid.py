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

from trl_flow.report import image_grid
from trl_flow.report.grid import _font, _wrap


def picture(color, size=(32, 32)):
    return Image.new("RGB", size, color)


class TestImageGrid:
    def test_small_pictures_are_enlarged_without_smoothing(self):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        grid = np.array(image_grid([Image.fromarray(pixels)]))
        enlarged = pixels.repeat(20, axis=0).repeat(20, axis=1)
        assert (grid[10:170, 10:170] == enlarged).all()

    def test_large_pictures_are_reduced(self):
        assert image_grid([picture("red", (2048, 1024))]).width == 512 + 20

    def test_reading_order_and_empty_cells(self):
        grid = image_grid([picture("red"), None, picture("blue")], columns=2, scale=1)
        assert grid.size == (10 + 2 * 42, 10 + 2 * 42)
        assert grid.getpixel((20, 20)) == (255, 0, 0)
        assert grid.getpixel((62, 20)) == (255, 255, 255)
        assert grid.getpixel((20, 62)) == (0, 0, 255)

    def test_captions_stay_in_their_column(self):
        long_word = "incomprehensibilities" * 4
        grid = np.array(image_grid([picture("red"), picture("red")], ["x", f"a {long_word} b"], columns=2))
        captions = grid[10 + 160 :, :]
        ink = np.flatnonzero((captions < 128).all(axis=2).any(axis=0))
        first, second = ink[ink < 175], ink[ink >= 175]
        assert first.max() < 30, "one letter"
        assert second.min() >= 10 + 160 + 10
        assert second.max() <= 10 + 160 + 10 + 160

    def test_row_labels_wrap_and_take_their_own_space(self):
        plain = image_grid([picture("red")] * 2, columns=1)
        labelled = image_grid([picture("red")] * 2, columns=1, row_labels=["a", "many words " * 10])
        assert labelled.width == plain.width
        assert labelled.height > plain.height + 3 * 17

    def test_long_paragraphs_are_cut(self):
        font = _font(13)
        for text in ("猫" * 20_000, "a cat " * 4000, "x" * 20_000, "cats " + "x" * 500):
            lines = _wrap(f"{text}\nocr 0.5", font, 160)
            assert len(lines) == 9 and lines[7].endswith("…") and lines[8] == "ocr 0.5"
            assert all(font.getlength(line) <= 160 for line in lines)
            assert text.startswith(lines[0])
        whole = "a red cat on a mat, " * 5
        assert " ".join(_wrap(whole, font, 160)) == whole.strip()

    def test_other_modes(self):
        grid = image_grid([Image.new("L", (200, 200), 255), Image.new("RGBA", (200, 200))], ["日本語 →", ""])
        assert grid.mode == "RGB"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"images": []}, "no picture"),
            ({"images": [None]}, "no picture"),
            ({"images": [picture("red")], "captions": ["a", "b"]}, "2 captions for 1 images"),
            ({"images": [picture("red")], "columns": 0}, "columns=0"),
            ({"images": [picture("red")], "row_labels": ["a", "b"]}, "2 row labels for 1 rows"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            image_grid(**arguments)
