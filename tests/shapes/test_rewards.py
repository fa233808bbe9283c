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

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from trl_flow.shapes import parse_prompt, render, shapes_dataset, shapes_partial, shapes_reward, shapes_strict
from trl_flow.shapes.pictures import Shape, bounds, draw, layout, relations
from trl_flow.shapes.rewards import detect, score


def picture(*shapes):
    return Image.fromarray(draw([[Shape(*shape) for shape in shapes]])[0])


def strict_accuracy(count, damage=lambda pixels, generator: pixels):
    """Share of renders that score 1."""
    generator = np.random.default_rng(5)
    prompts = [*shapes_dataset("train", count // 2)["prompt"], *shapes_dataset("test", count - count // 2)["prompt"]]
    meanings = [parse_prompt(prompt) for prompt in prompts]
    pixels = draw([layout(metadata, generator) for metadata in meanings]).astype(np.float32)
    pixels = np.clip(np.rint(damage(pixels, generator)), 0, 255).astype(np.uint8)
    findings = [found for first in range(0, count, 64) for found in detect(pixels[first : first + 64])]
    scores = [score(metadata, found) for metadata, found in zip(meanings, findings, strict=True)]
    return float(np.mean(np.array(scores) == 1))


def blur_and_noise(pixels, generator):
    pixels = ndimage.gaussian_filter(pixels, (0, 0.5, 0.5, 0))
    return pixels + generator.normal(scale=12, size=pixels.shape)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_renders_are_recognised(count):
    accuracy = strict_accuracy(count)
    print(f"clean: strict {accuracy:.4f} of {count}")  # noqa: T201
    assert accuracy >= 0.99


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_noisy_and_blurred_renders_are_recognised(count):
    accuracy = strict_accuracy(count, blur_and_noise)
    print(f"blur 0.5 px and noise 12: strict {accuracy:.4f} of {count}")  # noqa: T201
    assert accuracy >= 0.97


RED_CIRCLE = ("circle", "red", 8, 8, 5)
BLUE_SQUARE = ("square", "blue", 24, 24, 5)
GREEN_TRIANGLE = ("triangle", "green", 8, 24, 5)
CIRCLES = [("circle", "white", x, y, 4.5) for x, y in ((7, 7), (24, 7), (7, 24), (24, 24))]


@pytest.mark.parametrize(
    ("prompt", "shapes", "partial"),
    [
        ("a circle", [], 0),
        ("a circle", [RED_CIRCLE], 1),
        ("a circle", [GREEN_TRIANGLE], 0),
        ("a circle", [RED_CIRCLE, GREEN_TRIANGLE], 1 / 2),  # right, but one thing too many
        ("a circle", CIRCLES[:2], 0),  # |1 - 2| / 1
        ("three circles", CIRCLES[:1], 1 / 3),
        ("three circles", CIRCLES[:2], 2 / 3),
        ("three circles", CIRCLES[:3], 1),
        ("three circles", CIRCLES[:4], 2 / 3),
        ("three circles", [*CIRCLES[:3], BLUE_SQUARE], 1 / 2),
        ("two red circles", [RED_CIRCLE, CIRCLES[1]], 3 / 4),  # count 1, colour 1/2
        ("a red circle", [RED_CIRCLE], 1),
        ("a blue circle", [RED_CIRCLE], 1 / 2),
        ("a circle and a square", [RED_CIRCLE, BLUE_SQUARE], 1),
        ("a circle and a square", [RED_CIRCLE], 1 / 2),
        ("a circle and a square", [RED_CIRCLE, GREEN_TRIANGLE], 1 / 4),
        ("a red circle and a blue square", [RED_CIRCLE, BLUE_SQUARE], 1),
        ("a blue circle and a red square", [RED_CIRCLE, BLUE_SQUARE], 1 / 2),
        ("a circle above a triangle", [RED_CIRCLE, GREEN_TRIANGLE], 1),
        ("a circle below a triangle", [RED_CIRCLE, GREEN_TRIANGLE], 2 / 3),
        ("a triangle below a circle", [RED_CIRCLE, GREEN_TRIANGLE], 1),
        ("a triangle left of a square", [GREEN_TRIANGLE, BLUE_SQUARE], 1),
        ("a circle above a triangle", [RED_CIRCLE], 1 / 3),
    ],
)
def test_scores(prompt, shapes, partial):
    image = picture(*shapes)
    assert shapes_partial([prompt], [image]) == pytest.approx([partial])
    assert shapes_strict([prompt], [image]) == [float(partial == 1)]
    assert shapes_reward([prompt], [image]) == pytest.approx([(partial + (partial == 1)) / 2])


def test_a_shapeless_blob_is_an_extra():
    pixels = np.array(picture(RED_CIRCLE))
    pixels[20:22, 2:30] = (40, 60, 230)
    assert detect(pixels[None])[0][1].shape is None
    assert shapes_partial(["a red circle"], [Image.fromarray(pixels)]) == [0.5]


def test_noise_earns_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    prompts = shapes_dataset("test", 60)["prompt"]
    assert np.mean(shapes_partial(prompts, [Image.fromarray(pixels) for pixels in noise])) < 0.02


def test_scores_do_not_depend_on_the_batch():
    prompts = list(shapes_dataset("train", 24)["prompt"])
    images = [render(prompt, seed=index) for index, prompt in enumerate(reversed(prompts))]
    alone = [shapes_partial([prompt], [image])[0] for prompt, image in zip(prompts, images, strict=True)]
    assert shapes_partial(prompts, images) == alone
    assert len(set(alone)) > 3


def test_colour_and_place_of_what_is_found():
    (findings,) = detect(draw([[Shape(*BLUE_SQUARE)]]))
    assert [(finding.shape, finding.color) for finding in findings] == [("square", "blue")]
    assert np.abs(np.subtract(findings[0].box, (19.5, 19.5, 28.5, 28.5))).max() <= 1


def test_relations_follow_geneval():
    middle = (10, 10, 20, 20)
    assert relations((0, 10, 8, 20), middle) == {"left of"}
    assert relations((25, 9, 30, 19), middle) == {"right of"}
    assert relations((10, 0, 20, 8), middle) == {"above"}
    assert relations((0, 22, 8, 30), middle) == {"left of", "below"}
    # Centres 2 apart, a tenth of the summed widths is 2: nowhere.
    assert relations((8, 10, 18, 20), middle) == set()


def test_layouts_fit_and_satisfy_their_prompt():
    generator = np.random.default_rng(0)
    for prompt in shapes_dataset("train", 120)["prompt"]:
        metadata = parse_prompt(prompt)
        shapes = layout(metadata, generator)
        assert len(shapes) == sum(entry["count"] for entry in metadata["include"])
        boxes = np.array([bounds(shape) for shape in shapes])
        assert boxes.min() >= 0 and boxes.max() <= 32


def test_render_is_repeatable():
    first, again, other = (np.array(render("a red circle", seed=seed)) for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_rewards_name_their_prompts_and_refuse_what_they_cannot_score():
    assert {reward.prompt_set for reward in (shapes_partial, shapes_strict, shapes_reward)} == {"shapes"}
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        shapes_reward(["a circle", "a square"], [picture(RED_CIRCLE)])
    with pytest.raises(ValueError, match=r"size \(64, 64\)"):
        shapes_reward(["a circle"], [picture(RED_CIRCLE).resize((64, 64))])
    assert shapes_reward([], []) == []
