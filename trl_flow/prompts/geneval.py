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

"""GenEval's prompts, made from its grammar: what is in the picture, how often, in which colour, and where."""

import random
from functools import lru_cache

from datasets import Dataset, Features, Json, List, Value


# COCO's classes in COCO's order, by the names that GenEval gives them.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Prompts of each tag in GenEval: its test set has 553.
TEST_SIZES = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
# Flow-GRPO's shares of the tags in training: more of what models find hard. All single objects are in the test set.
TRAIN_SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}

_COUNTS = {"two": 2, "three": 3, "four": 4}
_SINGULARS = {"scissors": "pair of scissors", "skis": "pair of skis", "broccoli": "head of broccoli"}
_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
    "scissors": "pairs of scissors",
    "skis": "pairs of skis",
    "broccoli": "heads of broccoli",
}
_OPPOSITE = {"right of": "left of", "below": "above"}
_FEATURES = Features(
    {
        "prompt": Value("string"),
        "tag": Value("string"),
        # As `load_dataset` reads GenEval's own files: entries differ in their keys, and a position is [relation, index].
        "include": List(Json()),
        "exclude": List({"class": Value("string"), "count": Value("int64")}),
    }
)


def _one(name: str, color: str = "") -> str:
    noun = f"{color} {_SINGULARS.get(name, name)}".strip()
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _many(name: str) -> str:
    return _PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def _draw(tag: str, random_: random.Random) -> tuple[tuple, dict]:
    """
    One prompt of a tag, with its meaning, which is the same for `"a dog left of a cat"` and `"a cat right of a dog"`.
    """
    # Nobody is asked for a green person.
    classes = CLASSES[1:] if tag in ("colors", "color_attr") else CLASSES
    first, second = random_.sample(classes, 2)
    color, other = random_.sample(COLORS, 2)
    include, exclude = [{"class": first, "count": 1}], []
    meaning, text = (first,), _one(first)
    if tag == "two_object":
        include.append({"class": second, "count": 1})
        meaning, text = tuple(sorted((first, second))), f"{_one(first)} and {_one(second)}"
    elif tag == "counting":
        word = random_.choice(tuple(_COUNTS))
        include = [{"class": first, "count": _COUNTS[word]}]
        exclude = [{"class": first, "count": _COUNTS[word] + 1}]
        meaning, text = (first, word), f"{word} {_many(first)}"
    elif tag == "colors":
        include[0]["color"] = color
        meaning, text = (first, color), _one(first, color)
    elif tag == "position":
        position = random_.choice(POSITIONS)
        # The second object is listed first, and the first one says where it is, seen from entry 0.
        include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [position, 0]}]
        text = f"{_one(first)} {position} {_one(second)}"
        meaning = (first, position, second)
        if position in _OPPOSITE:
            meaning = (second, _OPPOSITE[position], first)
    elif tag == "color_attr":
        include = [{"class": first, "count": 1, "color": color}, {"class": second, "count": 1, "color": other}]
        meaning = tuple(sorted(((first, color), (second, other))))
        text = f"{_one(first, color)} and {_one(second, other)}"
    return meaning, {"prompt": f"a photo of {text}", "tag": tag, "include": include, "exclude": exclude}


@lru_cache(maxsize=1)
def _test_rows() -> dict[str, dict[tuple, dict]]:
    """Rows of the test set by tag and meaning."""
    rows = {tag: {} for tag in TAGS}
    for tag, size in TEST_SIZES.items():
        random_ = random.Random(f"GenEval {tag}")
        while len(rows[tag]) < size:
            meaning, row = _draw(tag, random_)
            rows[tag].setdefault(meaning, row)
    return rows


def geneval_dataset(split: str = "train", num_prompts: int | None = None, seed: int = 0) -> Dataset:
    """
    Prompts of GenEval's grammar ([Ghosh et al., 2023](https://huggingface.co/papers/2310.11513)) with what they ask for,
    for the reward `geneval`. They are made here, and are not the very prompts that GenEval published.

    `"test"` has as many prompts of each of the six tags as GenEval, 553 together, always the same, the tags taking turns.
    `"train"` is drawn at random with Flow-GRPO's shares of the tags, position : counting : color_attr : colors :
    two_object = 7 : 5 : 3 : 1 : 1 in each stretch of 17 rows. No prompt in it means the same as one of the test set: "a dog
    left of a cat" and "a cat right of a dog" are not on different sides. Prompts may repeat, as there are only 160 of
    counting.

    Args:
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`.
        num_prompts (`int`, *optional*): Number of rows: 5,100 of `"train"` if not given, and at most 553 of `"test"`.
        seed (`int`, *optional*, defaults to `0`): Chooses the training prompts.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt`, `tag`, `include` and `exclude`, in GenEval's schema: `include` is a
        list of `{"class", "count", "color"?, "position"?: [relation, index in include]}`, `exclude` a list of `{"class",
        "count"}`: as many would be too many.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: the prompt set 'geneval' has the splits 'train' and 'test'.")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1.")
    test = _test_rows()
    if split == "test":
        turns = [(turn, row) for rows in test.values() for turn, row in enumerate(rows.values())]
        rows = [row for _, row in sorted(turns, key=lambda pair: pair[0])][:num_prompts]
        return Dataset.from_list(rows, features=_FEATURES)
    rows, random_ = [], random.Random(f"GenEval train {seed}")
    stretch = [tag for tag, share in TRAIN_SHARES.items() for _ in range(share)]
    while len(rows) < (num_prompts or 5100):
        for tag in random_.sample(stretch, len(stretch)):
            meaning, row = _draw(tag, random_)
            while meaning in test[tag]:
                meaning, row = _draw(tag, random_)
            rows.append(row)
    return Dataset.from_list(rows[: num_prompts or 5100], features=_FEATURES)
