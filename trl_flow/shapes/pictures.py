# Copyright 2026 The trl-flow authors
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

"""Draws prompts of the shapes world: a layout that satisfies the prompt, then anti-aliased shapes on grey."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .prompts import BACKGROUND, COLORS, parse_prompt


if TYPE_CHECKING:
    from PIL import Image


SIZE = 32  # pixels, width and height

# Radii in pixels: big enough to tell a circle from a square at this resolution, small enough for the count to fit.
_MIN_RADIUS = 4.3
_MAX_RADIUS = {1: 6.5, 2: 6.0, 3: 5.5, 4: 5.0}
_GAP = 2.0  # pixels between the boxes of two objects


class Shape(NamedTuple):
    """One object: `x`, `y` (the centre of gravity) and `radius` in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape, negative inside.

    Args:
        shape (`str`):
            `"circle"`, `"square"` or `"triangle"`.
        x, y (`np.ndarray`):
            Offset from the shape's centre of gravity, in pixels.
        radius (`np.ndarray`):
            Size, broadcast against x and y. Outside its corners a polygon's distance is that of the nearest edge's line.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    # Isosceles triangle, base 2.2 radius and height 1.9 radius; its centre of gravity is at a third of the height.
    base, height = 1.1 * radius, 1.9 * radius
    side = (np.abs(x) * height - (y + height * 2 / 3) * base) / np.hypot(base, height)
    return np.maximum(side, y - height / 3)


def area(shape: str, radius: float) -> float:
    """Area of a shape in square pixels."""
    return {"circle": np.pi, "square": 1.8**2, "triangle": 1.1 * 1.9}[shape] * radius**2


def bounds(shape: Shape) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape in pixels."""
    radius = shape.radius
    left, up, down = {
        "circle": (radius, radius, radius),
        "square": (0.9 * radius,) * 3,
        "triangle": (1.1 * radius, 1.9 * radius * 2 / 3, 1.9 * radius / 3),
    }[shape.shape]
    return shape.x - left, shape.y - up, shape.x + left, shape.y + down


def relations(subject, reference, min_cosine: float = 0.5) -> set[str]:
    """Where one box is, seen from another: GenEval's rule.

    The offset of the centres, less a tenth of the summed sizes, must point within 60 degrees of a direction
    (cosine 0.5), so that a diagonal neighbour may be both "above" and "left of".

    Args:
        subject, reference (`tuple` of `float`):
            Boxes (left, top, right, bottom).
        min_cosine (`float`, *optional*, defaults to `0.5`):
            Smallest cosine between the offset and a direction.
    """
    offset = []
    for low, high in ((0, 2), (1, 3)):
        difference = (subject[low] + subject[high] - reference[low] - reference[high]) / 2
        slack = 0.1 * (subject[high] - subject[low] + reference[high] - reference[low])
        offset.append(np.sign(difference) * max(abs(difference) - slack, 0.0))
    length = np.hypot(*offset)
    if length == 0:
        return set()
    x, y = offset[0] / length, offset[1] / length
    cosines = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, cosine in cosines.items() if cosine > min_cosine}


def layout(metadata: dict, generator: np.random.Generator) -> list[Shape]:
    """Random objects that satisfy a prompt: anywhere in the picture, apart from each other, in any colour not asked for.

    Args:
        metadata (`dict`):
            What [`parse_prompt`] returns.
        generator (`np.random.Generator`):
            Source of randomness.
    """
    wanted = [entry for entry in metadata["include"] for _ in range(entry["count"])]
    while True:
        shapes = []
        for entry in wanted:
            color = entry.get("color") or generator.choice(list(COLORS))
            radius = generator.uniform(_MIN_RADIUS, _MAX_RADIUS[len(wanted)])
            left, top, right, bottom = bounds(Shape(entry["class"], color, 0.0, 0.0, radius))
            x, y = generator.uniform((1 - left, 1 - top), (SIZE - 1 - right, SIZE - 1 - bottom))
            shapes.append(Shape(entry["class"], str(color), float(x), float(y), float(radius)))
        boxes = [bounds(shape) for shape in shapes]
        apart = all(_gap(a, b) >= _GAP for i, a in enumerate(boxes) for b in boxes[:i])
        # A cosine above the detector's 0.5 leaves room for its error.
        if apart and all(
            entry["position"][0] in relations(box, boxes[entry["position"][1]], min_cosine=0.65)
            for entry, box in zip(wanted, boxes, strict=True)
            if "position" in entry
        ):
            return shapes


def _gap(a, b):
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def draw(layouts: list[list[Shape]]) -> np.ndarray:
    """Anti-aliased pictures of some layouts.

    Args:
        layouts (`list` of `list` of `Shape`):
            The objects of each picture; later ones cover earlier ones.

    Returns:
        `np.ndarray` of shape `(n, 32, 32, 3)`, uint8.
    """
    pixels = np.empty((len(layouts), SIZE, SIZE, 3), dtype=np.float32)
    pixels[:] = BACKGROUND
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for picture, shapes in zip(pixels, layouts, strict=True):
        for shape in shapes:
            # Coverage of a pixel that an edge crosses: linear in the distance of its centre to the edge.
            cover = np.clip(0.5 - distance(shape.shape, x - shape.x, y - shape.y, shape.radius), 0, 1)[..., None]
            picture += cover * (np.array(COLORS[shape.color]) - picture)
    return np.rint(pixels).astype(np.uint8)


def render(prompt: str, seed: int | None = None) -> "Image.Image":
    """A picture that shows what a prompt of the shapes world asks for.

    Args:
        prompt (`str`):
            A sentence of the grammar, see [`parse_prompt`].
        seed (`int`, *optional*):
            Seed of the layout; another one each time if not given.

    Returns:
        `PIL.Image.Image` of 32x32 pixels.
    """
    from PIL import Image

    return Image.fromarray(draw([layout(parse_prompt(prompt), np.random.default_rng(seed))])[0])
