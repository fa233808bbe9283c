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

"""Pictures side by side, with captions that can be read whatever the pictures' size."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


MIN_PIXELS = 160
MAX_PIXELS = 512
FONT_SIZE = 13
GAP = 10
PARAGRAPH_LINES = 8  # of a caption; what a prompt has more is cut
INK, PAPER, FADED = (28, 30, 33), (255, 255, 255), (105, 110, 118)


def image_grid(
    images: Sequence[Image.Image | None],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    scale: float | None = None,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """
    Lay pictures out in rows, each with its caption beneath.

    Small pictures are enlarged by a whole factor without smoothing, so that one sees the pixels that were generated;
    large ones are reduced.

    Args:
        images (`Sequence[PIL.Image.Image | None]`):
            Pictures in reading order; `None` leaves a cell empty. They may differ in size.
        captions (`Sequence[str]`, *optional*):
            One text per picture, wrapped to the picture's width; a newline starts a new paragraph. Paragraphs are cut after
            8 lines.
        columns (`int`, *optional*):
            Pictures per row. Defaults to a grid a little wider than tall.
        scale (`float`, *optional*):
            Factor of enlargement. Defaults to one that brings the widest picture to between 160 and 512 pixels.
        row_labels (`Sequence[str]`, *optional*):
            One text per row, above its pictures, wrapped to the grid's width.

    Returns:
        `PIL.Image.Image`: the grid, in RGB.

    Raises:
        ValueError: no picture, or a number of captions or row labels that does not fit.
    """
    images = list(images)
    if not any(image is not None for image in images):
        raise ValueError("image_grid got no picture.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"image_grid got {len(captions)} captions for {len(images)} images.")
    if columns is None:
        columns = min(len(images), math.ceil(math.sqrt(1.5 * len(images))))
    if columns < 1:
        raise ValueError(f"columns={columns}: a row needs at least 1 picture.")
    rows = math.ceil(len(images) / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"image_grid got {len(row_labels)} row labels for {rows} rows.")

    if scale is None:
        scale = fitting_scale(max(max(image.size) for image in images if image is not None))
    resized = [None if image is None else enlarge(image, scale) for image in images]
    cell_width = max(image.width for image in resized if image is not None)

    font = _font(FONT_SIZE)
    line_height = FONT_SIZE + 4
    wrapped = (
        [_wrap(caption, font, cell_width) for caption in captions] if captions is not None else [[]] * len(images)
    )
    width = GAP + columns * (cell_width + GAP)
    labels = [_wrap(label, font, width - 2 * GAP) for label in row_labels] if row_labels is not None else [[]] * rows

    tops, heights, label_heights, y = [], [], [], GAP
    for row in range(rows):
        cells = range(row * columns, min((row + 1) * columns, len(images)))
        picture_height = max((resized[i].height for i in cells if resized[i] is not None), default=0)
        lines = max(len(wrapped[i]) for i in cells)
        tops.append(y)
        heights.append(picture_height)
        label_heights.append(len(labels[row]) * line_height + GAP // 2 if labels[row] else 0)
        y += label_heights[row] + picture_height + (4 + lines * line_height if lines else 0) + GAP

    grid = Image.new("RGB", (width, y), PAPER)
    draw = ImageDraw.Draw(grid)
    for row in range(rows):
        for line, text in enumerate(labels[row]):
            draw.text((GAP, tops[row] + line * line_height), text, fill=FADED, font=font)
        for column, i in enumerate(range(row * columns, min((row + 1) * columns, len(images)))):
            x, top = GAP + column * (cell_width + GAP), tops[row] + label_heights[row]
            if resized[i] is not None:
                grid.paste(resized[i], (x + (cell_width - resized[i].width) // 2, top))
            for line, text in enumerate(wrapped[i]):
                draw.text((x, top + heights[row] + 4 + line * line_height), text, fill=INK, font=font)
    return grid


def fitting_scale(pixels: int) -> float:
    """Factor that brings a picture's longer side to between 160 and 512 pixels; whole when it enlarges."""
    if pixels < MIN_PIXELS:
        return float(math.ceil(MIN_PIXELS / pixels))
    return min(1.0, MAX_PIXELS / pixels)


def enlarge(image: Image.Image, scale: float) -> Image.Image:
    """Picture in RGB at `scale` times its size: hard pixels when it grows, smooth when it shrinks."""
    image = image.convert("RGB")
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu Sans, which knows far more scripts than Pillow's built-in font.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    return [line for paragraph in text.split("\n") for line in _wrap_paragraph(paragraph, font, width)] if text else []


def _wrap_paragraph(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    words = text.split()[::-1]
    while words:
        if len(lines) > PARAGRAPH_LINES:
            while len(lines[-2]) > 1 and font.getlength(f"{lines[-2]} …") > width:
                lines[-2] = lines[-2][:-1]
            return [*lines[:-2], f"{lines[-2].rstrip()} …"]
        word = words.pop()
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
        elif lines[-1]:
            words.append(word)
            lines.append("")
        else:
            # A word that is wider than the picture (a URL, a script without spaces) is cut.
            head = max(1, bisect_right(range(1, len(word) + 1), width, key=lambda n: font.getlength(word[:n])))
            lines[-1] = word[:head]
            if head < len(word):
                words.append(word[head:])
                lines.append("")
    return lines
