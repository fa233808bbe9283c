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

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from datasets import load_dataset

from trl_flow.prompts.geneval import CLASSES, COLORS, POSITIONS, TAGS, geneval_dataset
from trl_flow.prompts.ocr import ocr_dataset
from trl_flow.rewards.ocr import quoted_texts


DATASETS = {"geneval": geneval_dataset, "ocr": ocr_dataset}
# GenEval's published test set, tag by tag
GENEVAL_SIZES = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
PAIRS = {"scissors": "pair of", "skis": "pair of", "broccoli": "head of"}
COUNTS = {2: "two", 3: "three", 4: "four"}


def digest(dataset) -> str:
    return hashlib.sha256(json.dumps(list(dataset)).encode()).hexdigest()[:16]


def meaning(row):
    """What a row asks for, whatever is named first: every object with its count and colour, and who is where."""
    objects = sorted((e["class"], e["count"], e.get("color", "")) for e in row["include"])
    places = []
    for entry in row["include"]:
        if "position" in entry:
            relation, index = entry["position"]
            pair = (entry["class"], row["include"][index]["class"])
            if relation in ("right of", "below"):
                relation, pair = {"right of": "left of", "below": "above"}[relation], pair[::-1]
            places.append((relation, *pair))
    return str((objects, places))


def test_the_same_in_every_process():
    code = (
        "import hashlib, json\n"
        "from trl_flow.prompts.geneval import geneval_dataset\n"
        "from trl_flow.prompts.ocr import ocr_dataset\n"
        "for make in (geneval_dataset, ocr_dataset):\n"
        "    for split in ('train', 'test'):\n"
        "        print(hashlib.sha256(json.dumps(list(make(split, 300, 5))).encode()).hexdigest()[:16])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [digest(make(split, 300, 5)) for make in (geneval_dataset, ocr_dataset) for split in ("train", "test")]
    assert printed.stdout.split() == here


def test_the_test_splits_never_change():
    # Scores of different releases are compared on them.
    assert digest(geneval_dataset("test")) == "78119714be6d7db1"
    assert digest(ocr_dataset("test")) == "c9bc65feebfd0727"


@pytest.mark.parametrize("name", DATASETS)
def test_seed_and_length(name):
    make = DATASETS[name]
    train = make("train", 60)["prompt"][:]
    assert len(train) == 60
    assert make("train", 60, seed=1)["prompt"][:] != train
    assert make("train", 30)["prompt"][:] == train[:30]
    assert make("test", 20)["prompt"][:] == make("test", seed=1)["prompt"][:20]


@pytest.mark.parametrize("name", DATASETS)
def test_wrong_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"split='validation': the prompt set '{name}' has the splits"):
        DATASETS[name]("validation")
    with pytest.raises(ValueError, match="num_prompts=0: expected at least 1"):
        DATASETS[name]("train", 0)


def test_geneval_has_coco_and_genevals_sizes():
    assert len(CLASSES) == len(set(CLASSES)) == 80 and len(COLORS) == 10
    # Where COCO's 80 things stand in its order: a detector gives their numbers.
    assert {
        name: CLASSES.index(name) for name in ("person", "bench", "backpack", "bottle", "chair", "tv", "book")
    } == {
        "person": 0,
        "bench": 13,
        "backpack": 24,
        "bottle": 39,
        "chair": 56,
        "tv": 62,
        "book": 73,
    }
    test = geneval_dataset("test")
    assert Counter(test["tag"]) == GENEVAL_SIZES and len(test) == 553
    assert len({meaning(row) for row in test}) == 553
    # Any beginning of it has all tags.
    assert Counter(geneval_dataset("test", 12)["tag"]) == dict.fromkeys(TAGS, 2)


def test_geneval_trains_on_what_it_does_not_test():
    train, test = geneval_dataset("train"), geneval_dataset("test")
    assert len(train) == 5100
    assert not {meaning(row) for row in train} & {meaning(row) for row in test}
    shares = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    for start in (0, 17, 5083):
        assert Counter(train["tag"][start : start + 17]) == shares
    # All that can be counted is, but for what is held out.
    assert len({meaning(row) for row in train if row["tag"] == "counting"}) == 160


def one(name, color=""):
    words = f"{color} {PAIRS.get(name, '')} {name}".split()
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def many(name):
    if name in PAIRS:
        return PAIRS[name].replace(" of", "s of ") + name
    irregular = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
    return irregular.get(name) or name + ("es" if re.search("(s|ch|sh)$", name) else "s")


@pytest.mark.parametrize("split", ["train", "test"])
def test_geneval_prompts_say_what_the_metadata_ask_for(split):
    for row in geneval_dataset(split):
        include, exclude = row["include"], row["exclude"]
        text = row["prompt"].removeprefix("a photo of ")
        entries = [(e["class"], e.get("color", "")) for e in include]
        assert len({name for name, _ in entries}) == len(entries)
        assert {name for name, _ in entries} <= set(CLASSES) and {color for _, color in entries} <= {*COLORS, ""}
        assert not any(name == "person" and color for name, color in entries)
        if row["tag"] == "counting":
            ((name, count),) = [(e["class"], e["count"]) for e in include]
            assert exclude == [{"class": name, "count": count + 1}]
            assert text == f"{COUNTS[count]} {many(name)}"
            continue
        assert exclude == [] and all(e["count"] == 1 for e in include)
        if row["tag"] == "position":
            (other, _), (name, _) = entries
            (relation, index) = include[1]["position"]
            assert index == 0 and relation in POSITIONS
            assert text == f"{one(name)} {relation} {one(other)}"
        else:
            assert text == " and ".join(one(*entry) for entry in entries)
            colored = row["tag"] in ("colors", "color_attr")
            assert all(bool(color) == colored for _, color in entries)
            assert len(entries) == (2 if row["tag"] in ("two_object", "color_attr") else 1)
    if split == "test":
        assert {row["include"][0]["class"] for row in geneval_dataset(split) if row["tag"] == "single_object"} == set(
            CLASSES
        )


def test_geneval_rows_are_as_genevals_own_files_are_read(tmp_path):
    """`load_dataset` of a file in GenEval's format gives the same columns, with keys only where they belong."""
    rows = list(geneval_dataset("test", 60))
    with open(tmp_path / "metadata.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    loaded = load_dataset("json", data_files=str(tmp_path / "metadata.jsonl"), split="train", cache_dir=str(tmp_path))
    assert list(loaded) == rows
    made = geneval_dataset("test", 60)
    assert made.features == loaded.features
    # and they survive what a trainer does with them
    mapped = made.map(lambda row: {"first": row["include"][0]["class"]}).select([5, 3])
    assert mapped[0]["include"] == rows[5]["include"]
    mapped.save_to_disk(tmp_path / "saved")
    assert list(made.to_iterable_dataset().take(2)) == rows[:2]


def test_ocr_targets_are_what_the_prompt_quotes():
    for split, size in (("train", 6000), ("test", 1000)):
        dataset = ocr_dataset(split)
        assert len(dataset) == len(set(dataset["prompt"])) == size
        assert all(quoted_texts(row["prompt"]) == [row["target"]] for row in dataset)
        lengths = [len(target) for target in dataset["target"]]
        assert 4 <= min(lengths) and max(lengths) <= 45
        assert all(text.isascii() for text in dataset["prompt"])
        assert len(set(dataset["target"])) > 0.85 * size


def test_ocr_texts_of_the_test_split_are_never_trained_on():
    def letters(text):
        return re.sub(r"[\W_]", "", text).lower()

    train = {letters(text) for text in ocr_dataset("train", 20_000)["target"]}
    test = {letters(text) for text in ocr_dataset("test")["target"]}
    assert not train & test
    # The words themselves are in both.
    words = [
        {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
        for texts in (ocr_dataset()["target"], ocr_dataset("test")["target"])
    ]
    assert len(words[1] - words[0]) < 5
