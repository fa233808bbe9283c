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

from collections import Counter

import pytest

from trl_flow.shapes import parse_prompt, shapes_dataset
from trl_flow.shapes.prompts import TAGS, all_prompts


def test_every_prompt_is_short_and_means_itself():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == 24 + 48 + 81 + 48 + 48 + 336
    for prompt in prompts:
        assert len(prompt.split()) <= 8
        assert parse_prompt(prompt)["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompt", "tag", "include"),
    [
        ("just a circle", "single_object", [{"class": "circle", "count": 1}]),
        (
            "one square next to one triangle",
            "two_object",
            [{"class": "square", "count": 1}, {"class": "triangle", "count": 1}],
        ),
        ("three circles", "counting", [{"class": "circle", "count": 3}]),
        ("four blue triangles", "counting", [{"class": "triangle", "count": 4, "color": "blue"}]),
        ("a red circle", "colors", [{"class": "circle", "count": 1, "color": "red"}]),
        (
            "a circle left of a square",
            "position",
            [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        ),
        (
            "a black circle and a white square",
            "color_attr",
            [{"class": "circle", "count": 1, "color": "black"}, {"class": "square", "count": 1, "color": "white"}],
        ),
    ],
)
def test_meaning(prompt, tag, include):
    metadata = parse_prompt(prompt)
    assert metadata["tag"] == tag
    assert metadata["include"] == include


def test_counting_excludes_one_more_as_geneval_does():
    assert parse_prompt("two squares")["exclude"] == [{"class": "square", "count": 3}]


def test_case_space_and_full_stop_do_not_matter():
    assert parse_prompt("  A red   Circle. ") is parse_prompt("a red circle")


@pytest.mark.parametrize("prompt", ["", "a cat", "a red circle and a red square", "a circle above a circle"])
def test_unknown_prompt_shows_the_grammar(prompt):
    with pytest.raises(ValueError, match=r"is not a prompt of the shapes world(.|\n)*color_attr"):
        parse_prompt(prompt)


def test_splits_are_disjoint_and_together_everything():
    train = set(shapes_dataset("train", 6 * 2000)["prompt"])
    test = set(shapes_dataset("test", 6 * 200)["prompt"])
    assert not train & test
    assert train | test == set(all_prompts())


@pytest.mark.parametrize("tag", ["counting", "colors", "position", "color_attr"])
def test_no_rewording_of_a_test_prompt_is_trained_on(tag):
    def meanings(split):
        return {
            str(parse_prompt(row["prompt"])["include"]) for row in shapes_dataset(split, 6 * 500) if row["tag"] == tag
        }

    assert not meanings("train") & meanings("test")


def test_every_word_is_trained_on():
    def words(prompts):
        return {word for prompt in prompts for word in prompt.split()}

    assert words(shapes_dataset("train")["prompt"]) == words(all_prompts())


def test_rows_are_balanced_and_repeatable():
    for split in ("train", "test"):
        dataset = shapes_dataset(split, 60)
        assert Counter(dataset["tag"]) == dict.fromkeys(TAGS, 10)
        assert [parse_prompt(prompt)["tag"] for prompt in dataset["prompt"]] == list(dataset["tag"])
        assert list(dataset["prompt"]) == list(shapes_dataset(split, 60)["prompt"])
    assert list(shapes_dataset("train", 60)["prompt"]) != list(shapes_dataset("train", 60, seed=1)["prompt"])
    assert list(shapes_dataset("test", 60)["prompt"]) == list(shapes_dataset("test", 60, seed=1)["prompt"])


@pytest.mark.parametrize(("arguments", "message"), [(("eval",), "split='eval'"), (("test", 0), "num_prompts=0")])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        shapes_dataset(*arguments)
