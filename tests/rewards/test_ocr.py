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

import random
import string
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from trl_flow import load_reward
from trl_flow.rewards.ocr import OCRReward, exact_score, in_reading_order, levenshtein, paper_score, quoted_texts


@pytest.fixture(scope="module")
def reward():
    reward = load_reward("ocr")
    reward.prepare(torch.device("cpu"))
    return reward


def picture(*texts, size=256, font_size=32, noise=0.0):
    """Each text is (x, y, text), x and y in shares of the size; a text alone stands in the middle of the left edge."""
    image = Image.new("RGB", (size, size), (235, 230, 215))
    for x, y, text in [(0.05, 0.4, texts[0])] if isinstance(texts[0], str) else texts:
        ImageDraw.Draw(image).text(
            (x * size, y * size), text, font=ImageFont.load_default(font_size), fill=(30, 20, 60)
        )
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, noise, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def edits(a, b):
    """Levenshtein distance by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_levenshtein_is_the_least_number_of_edits():
    letters = random.Random(0)
    for _ in range(60):
        a, b = ("".join(letters.choices("ab c", k=letters.randint(0, 5))) for _ in range(2))
        assert levenshtein(a, b) == edits(a, b)
    assert levenshtein("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "target, text, exact, paper",
    [
        ("OPEN", "open", 1, 1),
        ("Hello World", "HELLO\nWORLD", 1, 1),
        ("Hello World", "HELLOWORLD", 1, 1),
        ("OPEN", "", 0, 0),
        ("OPEN", "OPE", 0.75, 0.75),
        ("OPEN", "OBEN", 0.75, 0.75),
        ("OPEN", "OPEN!", 0.75, 1),
        ("OPEN", "OPENOPEN", 0, 1),
        ("OPEN", "we are open on sundays", 0, 1),
        ("OPEN", "SALE TODAY", 0, 0),
        ("it’s", "it's", 1, 0.75),
        ("WOW!", "WOW！", 1, 0.75),  # the engine also knows Chinese, and writes full-width marks at times
    ],
)
def test_both_definitions(target, text, exact, paper):
    assert exact_score(target, text) == pytest.approx(exact)
    assert paper_score(target, text.replace("\n", "")) == pytest.approx(paper)


def test_the_definitions_agree_with_their_formulas():
    letters = random.Random(1)
    for _ in range(200):
        target = "".join(letters.choices("abC d", k=letters.randint(1, 5))).strip() or "a"
        text = "".join(letters.choices("abC d", k=letters.randint(0, 6)))
        a, b = target.replace(" ", "").lower(), text.replace(" ", "").lower()
        distance = edits(a, b)
        assert exact_score(target, text) == pytest.approx(max(0, 1 - distance / len(a)))
        contained = any(b[first : first + len(a)] == a for first in range(len(b)))
        assert paper_score(target, text) == pytest.approx(1 if contained else 1 - min(distance, len(a)) / len(a))


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ('a sign that says "Open Late"', ["Open Late"]),
        ("a sign that says “Open Late”", ["Open Late"]),
        ('a sign "A" above a sign "B C"', ["A", "B C"]),
        ("a sign without text", []),
        ('an empty "" sign', []),
        ('a 12" pipe', []),
        ("a dog's 'collar'", []),
    ],
)
def test_targets_in_prompts(prompt, texts):
    assert quoted_texts(prompt) == texts


def test_lines_are_read_from_the_top_and_from_the_left():
    def box(left, top, width, height):
        return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]

    boxes = {
        "one": box(5, 10, 20, 8),
        "two": box(30, 7, 20, 12),  # higher up, but on the same line
        "three": box(5, 18, 20, 8),
        "four": box(30, 19, 20, 8),
        "five": box(0, 40, 60, 30),
    }
    for seed in range(10):
        names = random.Random(seed).sample(list(boxes), k=5)
        assert in_reading_order(np.array([boxes[name] for name in names]), names) == list(boxes)


@pytest.mark.parametrize(
    "size, font_size, noise",
    [(512, 56, 0), (512, 40, 30), (256, 32, 15), (128, 18, 0), (128, 18, 15), (64, 13, 0), (64, 12, 8)],
)
def test_rendered_text_is_read(reward, size, font_size, noise):
    texts = ["HELLO", "Bakery", "coffee", "north"]
    images = [picture(text, size=size, font_size=font_size, noise=noise) for text in texts]
    # The right text, and another picture's
    assert reward([f'a sign "{text}"' for text in texts], images) == [1, 1, 1, 1]
    assert max(reward([f'a sign "{text}"' for text in texts[1:] + texts[:1]], images)) < 0.5


def test_very_small_pictures_are_read(reward):
    images = [picture((0.05, 0.3, text), size=32, font_size=10) for text in ("OPEN", "SALE")]
    assert reward(["", ""], images, target=["OPEN", "SALE"]) == [1, 1]


def test_the_order_on_the_picture_counts(reward):
    signs = [(0.1, 0.2, "FRESH"), (0.55, 0.2, "BREAD"), (0.1, 0.6, "EVERY"), (0.55, 0.6, "DAY")]
    image = picture(*signs)
    assert reward(["", ""], [image] * 2, target=["fresh bread every day", "fresh every bread day"])[0] == 1
    assert reward([""], [image], target=["fresh every bread day"])[0] < 0.8
    # Rows closer than the ten pixels at which rapidocr itself tells lines apart
    small = picture((0.45, 0.05, "AB"), (0.02, 0.2, "CD"), size=48, font_size=9)
    assert reward([""], [small], target=["ABCD"]) == [1]


def test_no_text_scores_zero(reward):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    images = [Image.new("RGB", (64, 64), "white"), noise, Image.new("RGB", (1, 1)), Image.new("RGB", (300, 20), "red")]
    assert reward(['"open"'] * 4, images) == [0, 0, 0, 0]


def test_a_page_full_of_words_wins_by_the_papers_definition_alone(reward):
    words = ["OPEN", "SALE", "BREAD", "COFFEE", "BOOKS", "MUSIC"]
    page = picture(*[(0.04 + 0.5 * (n % 2), 0.03 + 0.32 * (n // 2), word) for n, word in enumerate(words)])
    targets, metrics = [words[0], words[3], words[5]], {}
    exact = reward([""] * 3, [page] * 3, target=targets, log_metric=metrics.__setitem__)
    assert exact == [0, 0, 0] and metrics == {"ocr/paper": 1.0}
    paper = load_reward({"ocr": {"match": "paper"}})
    assert paper([""] * 3, [page] * 3, target=targets, log_metric=metrics.__setitem__) == [1, 1, 1]
    assert metrics == {"ocr/paper": 1.0, "ocr/exact": 0.0}


def scribbled(image: Image.Image, seed: int) -> Image.Image:
    """The picture with seven shapes in a row that look like letters and are none."""
    strokes = random.Random(seed)
    canvas = ImageDraw.Draw(image)
    for letter in range(7):
        for _ in range(3):
            points = [(40 + 27 * letter + strokes.uniform(0, 20), 200 + strokes.uniform(0, 34)) for _ in range(3)]
            canvas.line(points, fill=(30, 20, 60), width=4)
    return image


def test_lettering_that_nobody_can_read_is_free_by_the_papers_definition_alone(reward):
    images = [scribbled(picture((0.1, 0.1, "OPEN LATE"), size=300, font_size=40), seed) for seed in range(8)]
    logged = {}
    exact = reward([""] * 8, images, target=["OPEN LATE"] * 8, log_metric=logged.__setitem__)
    paper = load_reward({"ocr": {"match": "paper"}})
    assert paper([""] * 8, images, target=["OPEN LATE"] * 8, log_extra=logged.__setitem__) == [1] * 8
    # The engine was not sure of the rest.
    assert logged["ocr/paper"] == 1 and logged["ocr_text"].count("OPEN LATE") > 3
    assert exact.count(1) <= 1 and np.mean(exact) < 0.5


def test_where_the_target_comes_from(reward):
    image = picture("OPEN")
    prompts = ['a sign "OPEN"', 'a sign "OPEN"', 'a sign "OPEN"', "a sign", "a sign", "a sign"]
    target = [None, "SALE", " ", "open", None, ""]
    logged = {}
    scores = reward(
        prompts, [image] * 6, target=target, log_extra=logged.__setitem__, trainer_state=None, tag=["x"] * 6
    )
    assert scores == [1, pytest.approx(exact_score("SALE", "OPEN")), 1, 1, None, None]
    assert logged == {"ocr_text": ["OPEN"] * 4 + [None] * 2}
    # Two texts: both, in the prompt's order; the papers' definition asks for the first alone
    two = picture((0.1, 0.2, "OPEN"), (0.1, 0.6, "DAILY"))
    assert reward(['"open" over "daily"', '"open"'], [two] * 2) == [1, 0]
    assert load_reward({"ocr": {"match": "paper"}})(['"open" over "daily"'], [picture("OPEN")]) == [1]


def test_threads_read_the_same_as_one():
    letters = random.Random(3)
    texts = ["".join(letters.choices(string.ascii_uppercase, k=6)) for _ in range(24)]
    images = [picture(text, size=160, noise=10) for text in texts]
    serial, parallel = OCRReward(num_threads=1), OCRReward(num_threads=4)
    read = [serial.read(image)["exact"] for image in images]
    logged = {}
    # More threads than this machine may have, too
    parallel([""] * 24, images, target=texts, log_extra=logged.__setitem__)
    assert logged["ocr_text"] == read and sum(map(bool, read)) == 24


def test_a_picture_that_cannot_be_read_raises(reward):
    with pytest.raises(AttributeError):
        reward(['"open"'] * 2, [picture("OPEN"), None])
    # and is only looked at where the reward applies
    assert reward(['"open"', "a dog"], [picture("OPEN"), None]) == [1, None]


def test_rapidocr_is_quiet(reward, capfd):
    reward(['"open"'], [Image.new("RGB", (64, 64))])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "trl-flow\[ocr\]"'):
        load_reward("ocr")


@pytest.mark.parametrize(
    "settings, message",
    [({"match": "fuzzy"}, "'exact' or 'paper'"), ({"num_threads": 0}, "at least 1"), ({"limit_side_len": 8}, "32")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_reward({"ocr": settings})


def test_what_it_says_about_itself(reward):
    assert reward.concurrent and reward.prompt_set == "ocr"
    assert reward.source["rapidocr"].startswith("3.")
