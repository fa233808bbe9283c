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

"""Means and intervals of an evaluation, against independent computations; its tables and its page."""

import io
import itertools
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from trl_flow.report.comparison import (
    Comparison,
    bootstrap_interval,
    comparison_tables,
    prompt_means,
    to_markdown,
    write_comparison,
)


NAN = float("nan")


def compare(base, trained, steps=(4,), tags=None, name="run"):
    """A comparison of one reward; scores of shape (prompts, images_per_prompt)."""
    scores = {}
    for count in steps:
        for model, values in (("base", base), (name, trained)):
            values = np.asarray(values, dtype=float)
            scores[model, count, "clip"] = values, np.isnan(values)
    return Comparison(scores, ["base", name], list(steps), ["clip"], tags, "base")


class TestInterval:
    def test_of_all_samples_that_can_be_drawn(self):
        """Of five values there are 5^5 samples with replacement: their quantiles are what the draws approach."""
        values = np.array([0.1, 0.4, 0.35, 0.8, 2.0])
        means = [np.mean(sample) for sample in itertools.product(values, repeat=5)]
        low, high = np.quantile(means, [0.025, 0.975])
        found = bootstrap_interval(values)
        assert found == pytest.approx((low, high), abs=0.03)
        assert found == bootstrap_interval(values)

    def test_covers_the_true_mean_as_often_as_it_says(self):
        generator = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            low, high = bootstrap_interval(generator.exponential(size=60))
            hits += low <= 1.0 <= high
        # 95 %, less what a skewed distribution costs; the standard error of 200 trials is 1.5 %.
        assert 0.88 <= hits / 200 <= 0.99

    def test_of_one_prompt_there_is_none(self):
        assert bootstrap_interval(np.array([1.0])) is None and bootstrap_interval(np.array([])) is None

    def test_of_thousands_of_prompts(self):
        values = np.random.default_rng(0).normal(size=3000)
        low, high = bootstrap_interval(values)
        half = 1.96 * values.std() / np.sqrt(3000)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


class TestComparison:
    def test_more_pictures_of_the_same_are_no_more_evidence(self):
        scores = np.random.default_rng(0).normal(size=(20, 1))
        one, four = compare(scores, scores + 1), compare(scores.repeat(4, 1), scores.repeat(4, 1) + 1)
        for model in ("base", "run"):
            assert one.cell(4, model, "clip")["interval"] == pytest.approx(four.cell(4, model, "clip")["interval"])
        assert four.cell(4, "run", "clip")["pictures"] == 80

    def test_differences_are_paired(self):
        generator = np.random.default_rng(0)
        base = generator.normal(size=(50, 1))
        trained = base + generator.normal(0.1, 0.1, size=(50, 1))
        cell = compare(base, trained).cell(4, "run", "clip")
        low, high = cell["difference"]["interval"]
        assert low > 0 and high - low < 0.2 * (cell["interval"][1] - cell["interval"][0])
        assert cell["difference"]["mean"] == pytest.approx((trained - base).mean())

    def test_what_has_no_score_is_left_out_and_counted(self):
        base = [[1.0, 3.0], [NAN, 5.0], [NAN, NAN], [4.0, 4.0]]
        trained = [[2.0, NAN], [7.0, NAN], [1.0, 1.0], [4.0, 6.0]]
        comparison = compare(base, trained)
        cells = {cell["model"]: cell for cell in comparison.cells()}
        assert cells["base"]["mean"] == pytest.approx((2 + 5 + 4) / 3)
        assert cells["run"]["mean"] == pytest.approx((2 + 7 + 1 + 5) / 4)
        assert (cells["base"]["pictures"], cells["base"]["scored"], cells["base"]["failed"]) == (8, 5, 3)
        # Pairs of pictures: the first of the first prompt, and both of the last.
        assert cells["run"]["difference"]["mean"] == pytest.approx((1 + 1) / 2)
        assert cells["run"]["difference"]["prompts"] == 2
        assert "clip, base, 4 steps: 5 of 8 pictures scored (3 failed)." in comparison.notes()
        json.dumps(comparison.cells(), allow_nan=False)

    def test_no_score_at_all(self):
        comparison = compare([[NAN], [NAN]], [[1.0], [2.0]])
        assert comparison.cell(4, "base", "clip")["mean"] is None
        assert comparison.cell(4, "run", "clip")["difference"] == {"mean": None, "interval": None, "prompts": 0}
        assert "| 4 | base | - |" in to_markdown(comparison)

    def test_tags(self):
        comparison = compare([[1.0], [2.0], [3.0]], [[1.0], [4.0], [5.0]], tags=["a", "b", "b"])
        assert comparison.cell(4, "base", "clip", "b")["mean"] == 2.5
        assert comparison.cell(4, "run", "clip", "b")["difference"]["mean"] == 2
        assert comparison.cell(4, "run", "clip", "a")["interval"] is None
        assert compare([[1.0]], [[1.0]], tags=["a"]).tag_names == []

    def test_intervals_of_few_prompts_are_told_of(self):
        def notes(number, tags=None):
            return " ".join(compare(np.ones((number, 1)), np.ones((number, 1)), tags=tags).notes())

        assert "such as these" in notes(19) and "fewer than" not in notes(20)
        assert "such as small tags" in notes(30, ["a"] * 15 + ["b"] * 15)
        assert "fewer than" not in notes(40, ["a"] * 20 + ["b"] * 20)

    def test_mean_of_each_prompt(self):
        assert prompt_means(np.array([[1.0, 2.0], [NAN, 4.0], [NAN, NAN]])) == pytest.approx(
            [1.5, 4, NAN], nan_ok=True
        )


class TestTables:
    def test_markdown(self):
        comparison = compare([[1.0]] * 4, [[1.5]] * 4, steps=(4, 10), tags=["x|y", "x|y", "z", "z"])
        lines = to_markdown(comparison).splitlines()
        assert lines[:5] == [
            "| steps | model | clip |",
            "|:--|:--|--:|",
            "| 4 | base | 1.000 [1.000, 1.000] |",
            "|  | run | 1.500 [1.500, 1.500] |",
            "|  | run - base | **+0.500** [+0.500, +0.500] |",
        ]
        assert "| 10 | base | 1.000 [1.000, 1.000] |" in lines
        assert "| x\\|y | base | 1.000 [1.000, 1.000] |" in lines
        assert any("same prompts, same noise" in line for line in lines)

    def test_terminal(self):
        console = Console(width=100, file=io.StringIO())
        for table in comparison_tables(compare([[1.0], [2.0]], [[1.0], [2.0]], tags=["a", "[b]"])):
            console.print(table)
        text = console.file.getvalue()
        assert "run - base" in text and "[1.000, 2.000]" in text and "[b]" in text

    def test_without_a_base_there_are_no_differences(self):
        scores = {(name, 4, "clip"): (np.ones((3, 1)), np.zeros((3, 1), bool)) for name in ("a", "b")}
        comparison = Comparison(scores, ["a", "b"], [4], ["clip"])
        assert all("difference" not in cell for cell in comparison.cells())
        assert "Differences" not in to_markdown(comparison)


class Page(HTMLParser):
    """What the page holds: tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


class TestPage:
    PROMPTS = ['a <script>alert(1)</script> & "cat"', "a dog", "a bird"]

    def write(self, folder, images_per_prompt=1, size=32):
        base = np.array([[0.1], [0.5], [NAN]]).repeat(images_per_prompt, 1)
        trained = np.array([[0.4], [0.3], [0.2]]).repeat(images_per_prompt, 1)
        comparison = compare(base, trained, steps=(4, 10), tags=["a", "b c", "b c"], name="my run")
        folder = folder / "an evaluation"

        def picture(model, steps, row):
            return (
                folder
                / "pictures"
                / model
                / f"{steps}_steps"
                / f"{row // images_per_prompt}-{row % images_per_prompt}.png"
            )

        for model, steps, row in itertools.product(("base", "my run"), (4, 10), range(3 * images_per_prompt)):
            picture(model, steps, row).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (row * 40, steps, 0)).save(picture(model, steps, row))
        path = write_comparison(comparison, folder, self.PROMPTS, picture, settings={"seed": 0, "nothing": None})
        return path, path.read_text()

    def test_shows_every_picture_beside_the_base_s(self, tmp_path):
        path, text = self.write(tmp_path, images_per_prompt=2)
        page = Page(text)
        sources = [image["src"] for image in page.all("img")]
        assert len(sources) == len(set(sources)) == 2 * 2 * 3 * 2
        assert all((path.parent / unquote(source)).is_file() for source in sources)
        pairs = [tuple(unquote(source).split("/")[1:]) for source in sources]
        for first, second in zip(pairs[::2], pairs[1::2], strict=True):
            assert (first[0], second[0]) == ("base", "my run") and first[1:] == second[1:]

    def test_needs_nothing_from_elsewhere(self, tmp_path):
        _, text = self.write(tmp_path)
        page = Page(text)
        assert not re.search(r"https?://|@import|url\(", text)
        assert not page.all("link") and all("src" not in script for script in page.all("script"))
        assert len(page.all("script")) == 1 and "<script>alert" not in text

    def test_says_what_the_choices_need(self, tmp_path):
        _, text = self.write(tmp_path)
        figures = Page(text).all("figure")
        assert [(figure["data-steps"], figure["data-tag"]) for figure in figures] == [
            (steps, tag) for steps in ("4", "10") for tag in ("a", "b c", "b c")
        ]
        # What is not known counts as no change.
        assert [float(figure["data-changes"]) for figure in figures[:3]] == pytest.approx([0.3, -0.2, 0.0])
        assert {select["id"] for select in Page(text).all("select")} == {"steps", "tag", "order"}
        assert "seed" in text and "nothing" not in text

    @pytest.mark.parametrize("size, enlarged", [(32, True), (512, False)])
    def test_small_pictures_are_enlarged_without_smoothing(self, tmp_path, size, enlarged):
        _, text = self.write(tmp_path, size=size)
        assert all((image.get("class") == "small") == enlarged for image in Page(text).all("img"))
