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

"""Looks at pictures of the shapes world and scores them: classical vision, then GenEval's rules on what was found.

No network is involved: the same picture always gets the same score, in well under a millisecond.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..rewards.reward import About
from .pictures import SIZE, area, distance, relations
from .prompts import BACKGROUND, COLORS, SHAPES, parse_prompt


if TYPE_CHECKING:
    from PIL import Image


_PALETTE = np.array([BACKGROUND, *COLORS.values()], dtype=np.float32)
_NAMES = ("background", *COLORS)

_MIN_AREA = 9  # pixels; a smaller blob is noise
_MIN_LIKENESS = 0.75  # intersection over union with the best shape; below, a blob is nothing that has a name


class Finding(NamedTuple):
    """One object that was seen: `shape` is None for a blob that resembles no shape; `box` is left, top, right, bottom."""

    shape: str | None
    color: str
    box: tuple[float, float, float, float]


def detect(pixels: np.ndarray) -> list[list[Finding]]:
    """Finds the objects of some pictures.

    Each pixel takes the nearest of the nine colours; connected pixels of one colour are a blob; a blob is the shape that
    covers it best, drawn over its centre of gravity with its area.

    Args:
        pixels (`np.ndarray` of shape `(n, 32, 32, 3)`):
            Pictures, 0 to 255.

    Returns:
        `list` of `list` of `Finding`: the objects of each picture.
    """
    from scipy import ndimage

    pixels = np.asarray(pixels, dtype=np.float32)
    # Squared distance to each colour, less |pixel|^2, which doesn't change the nearest.
    label = np.argmin((_PALETTE**2).sum(1) - 2 * pixels @ _PALETTE.T, axis=-1)
    # One plane per picture and colour that occurs in it, so that a single call labels them all.
    planes = np.argwhere(np.stack([(label == k).sum((1, 2)) >= _MIN_AREA for k in range(1, len(_NAMES))], axis=1))
    masks = label[planes[:, 0]] == planes[:, 1, None, None] + 1
    findings = [[] for _ in pixels]
    if len(planes) == 0:
        return findings
    within_plane = np.zeros((3, 3, 3), dtype=bool)
    within_plane[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    blobs, count = ndimage.label(masks, structure=within_plane)
    sizes = np.bincount(blobs.ravel(), minlength=count + 1)
    kept = [
        (index + 1, where[0].start)
        for index, where in enumerate(ndimage.find_objects(blobs))
        if sizes[index + 1] >= _MIN_AREA
    ]
    if not kept:
        return findings

    plane = np.array([plane for _, plane in kept])
    core = blobs[plane] == np.array([index for index, _ in kept])[:, None, None]
    picture, color = planes[plane, 0], planes[plane, 1] + 1
    # How much of each pixel the blob covers: where the pixel lies on the way from background to colour.
    way = _PALETTE[color] - _PALETTE[0]
    cover = np.einsum("nijc,nc->nij", pixels[picture] - _PALETTE[0], way / (way**2).sum(1, keepdims=True))
    reach = ndimage.binary_dilation(core, structure=np.ones((1, 3, 3), dtype=bool))
    # A pixel just outside counts as long as it isn't another object's.
    others = (label[picture] != 0) & ~core
    cover = np.clip(cover, 0, 1) * (reach & ~others)

    grid = np.arange(SIZE) + 0.5
    weight = cover.sum((1, 2))
    x = (cover.sum(1) @ grid) / weight
    y = (cover.sum(2) @ grid) / weight
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    likeness = []
    for shape in SHAPES:
        radius = np.sqrt(weight / area(shape, 1.0))[:, None, None]
        template = np.clip(0.5 - distance(shape, dx, dy, radius), 0, 1)
        common = np.minimum(template, cover).sum((1, 2))
        likeness.append(common / (template.sum((1, 2)) + weight - common))
    best = np.argmax(likeness, axis=0)
    named = np.max(likeness, axis=0) >= _MIN_LIKENESS

    where = ndimage.find_objects(core * np.arange(1, len(core) + 1)[:, None, None])
    for index, (_, rows, columns) in enumerate(where):
        findings[picture[index]].append(
            Finding(
                shape=SHAPES[best[index]] if named[index] else None,
                color=_NAMES[color[index]],
                box=(columns.start, rows.start, columns.stop, rows.stop),
            )
        )
    return findings


def score(metadata: dict, findings: list[Finding]) -> float:
    """How much of a prompt a picture satisfies: 0 nothing, 1 all of it and nothing else.

    The mean of GenEval's terms, over the entries of `include`: the count and, if asked for, the count in the right colour
    (each `1 - |wanted - found| / wanted`, at least 0), and the position (0 or 1). The mean is divided by one plus the number of
    things that nobody asked for: objects of another class, and blobs without a name. A blank picture scores 0.

    Args:
        metadata (`dict`):
            What [`parse_prompt`] returns.
        findings (`list` of `Finding`):
            What [`detect`] found in the picture.
    """
    terms = []
    found = [[finding for finding in findings if finding.shape == entry["class"]] for entry in metadata["include"]]
    for entry, objects in zip(metadata["include"], found, strict=True):
        wanted = entry["count"]
        terms.append(max(0.0, 1 - abs(wanted - len(objects)) / wanted))
        if "color" in entry:
            colored = sum(finding.color == entry["color"] for finding in objects)
            terms.append(max(0.0, 1 - abs(wanted - colored) / wanted))
        if "position" in entry:
            relation, reference = entry["position"]
            pairs = [(a, b) for a in objects for b in found[reference]]
            terms.append(float(bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)))
    asked_for = {entry["class"] for entry in metadata["include"]}
    extra = sum(finding.shape not in asked_for for finding in findings)
    return sum(terms) / len(terms) / (1 + extra)


def _scores(prompts, images):
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts and {len(images)} images: a score needs one prompt for each image")
    pixels = np.empty((len(images), SIZE, SIZE, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        if image.size != (SIZE, SIZE):
            raise ValueError(f"image {index} has size {image.size}: pictures of the shapes world are {SIZE}x{SIZE}")
        pixels[index] = image.convert("RGB")
    return [score(parse_prompt(prompt), seen) for prompt, seen in zip(prompts, detect(pixels), strict=True)]


def shapes_partial(prompts: "list[str]", images: "list[Image.Image]", **kwargs) -> list[float]:
    """Reward: how much of its prompt each picture satisfies, with partial credit.

    Alone it can be gamed: a policy may raise it by being half right everywhere. [`shapes_reward`] can't be, as easily.

    Args:
        prompts (`list[str]`):
            Prompts of the shapes world.
        images (`list[PIL.Image.Image]`):
            A 32x32 picture for each prompt.

    Returns:
        `list[float]`: 0 to 1, see [`score`].
    """
    return _scores(prompts, images)


def shapes_strict(prompts: "list[str]", images: "list[Image.Image]", **kwargs) -> list[float]:
    """Reward: 1 if the picture shows exactly what its prompt asks for and nothing else, else 0 (GenEval's exact rule).

    Args:
        prompts (`list[str]`):
            Prompts of the shapes world.
        images (`list[PIL.Image.Image]`):
            A 32x32 picture for each prompt.

    Returns:
        `list[float]`: 0 or 1.
    """
    return [float(value == 1) for value in _scores(prompts, images)]


def shapes_reward(prompts: "list[str]", images: "list[Image.Image]", **kwargs) -> list[float]:
    """Reward: the mean of [`shapes_partial`], which guides, and [`shapes_strict`], which is what we want.

    Args:
        prompts (`list[str]`):
            Prompts of the shapes world.
        images (`list[PIL.Image.Image]`):
            A 32x32 picture for each prompt.

    Returns:
        `list[float]`: 0 to 1.
    """
    return [(value + float(value == 1)) / 2 for value in _scores(prompts, images)]


# The prompts that a trainer takes when it is given one of these rewards and no data set.
shapes_partial.prompt_set = shapes_strict.prompt_set = shapes_reward.prompt_set = "shapes"

_SEEN = "as segmentation by colour, connected components and the best fitting shape see them"
_HACKED = (
    "Black shapes where the prompt names no colour: black is easiest to draw crisply. Nothing else counts than the objects: a "
    "pipeline that draws other things as well is not what this world is for."
)
_SOURCE = "This library; the terms and tags are GenEval's, arXiv:2310.11513."
shapes_partial.about = About(
    definition="Mean over what the prompt asks for of exact count, colour and position, over one plus the number of other "
    f"objects, {_SEEN}.",
    scale="0 to 1.",
    source=_SOURCE,
    license="No weights.",
    hacked_by="Being half right everywhere, since half is worth a half. " + _HACKED,
)
shapes_strict.about = About(
    definition=f"1 where the picture shows what the prompt asks for and nothing else, else 0, {_SEEN}.",
    scale="0 or 1.",
    source=_SOURCE,
    license="No weights.",
    hacked_by=_HACKED,
)
shapes_reward.about = About(
    definition="Mean of shapes_partial and shapes_strict.",
    scale="0 to 1.",
    source=_SOURCE,
    license="No weights.",
    hacked_by=_HACKED,
)
