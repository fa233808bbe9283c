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

"""The language of the shapes world: six hundred short prompts, each with its meaning in GenEval's metadata schema.

The grammar is small enough to write out, so a prompt is understood by looking it up: nothing is ever half understood.
"""

import random
from functools import lru_cache
from itertools import permutations, product
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


SHAPES = ("circle", "square", "triangle")

# Far apart from each other and from the grey background, also when a pixel is half covered.
BACKGROUND = (140, 140, 140)
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 40),
    "purple": (200, 50, 210),
    "cyan": (40, 210, 220),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

GRAMMAR = f"""\
  single_object  (a | one | a single | just a | just one | only a | only one | exactly one) SHAPE
  two_object     (a | one) SHAPE (and | with | beside | next to) (a | one) OTHER SHAPE
  counting       (two | three | four) [COLOR] SHAPEs
  colors         (a | one) COLOR SHAPE
  position       (a | one) SHAPE ({" | ".join(RELATIONS)}) (a | one) OTHER SHAPE
  color_attr     a COLOR SHAPE and a OTHER COLOR OTHER SHAPE
where SHAPE is {", ".join(SHAPES)} and COLOR is {", ".join(COLORS)}; the article of a prompt's two objects is the same"""

_HELD_OUT_SHARE = 4  # one meaning in four is for testing


def _sentences():
    """Every prompt with its metadata and the key that decides on which side of the split it falls.

    The key is the prompt's meaning, so that no rewording of a held-out prompt is trained on. `single_object` and
    `two_object` have only 3 and 6 meanings, which training must see: there the wording itself is held out.
    """

    def row(tag, prompt, include, key, **extra):
        return {"tag": tag, "include": include, **extra, "prompt": prompt}, key

    for shape in SHAPES:
        one = [{"class": shape, "count": 1}]
        for article in ("a", "one", "a single", "just a", "just one", "only a", "only one", "exactly one"):
            prompt = f"{article} {shape}"
            yield row("single_object", prompt, one, prompt)

    for (first, second), article, link in product(
        permutations(SHAPES, 2), ("a", "one"), ("and", "with", "beside", "next to")
    ):
        prompt = f"{article} {first} {link} {article} {second}"
        yield row("two_object", prompt, [{"class": first, "count": 1}, {"class": second, "count": 1}], prompt)

    for (word, count), shape, color in product(COUNTS.items(), SHAPES, (None, *COLORS)):
        wanted = {"class": shape, "count": count} | ({"color": color} if color else {})
        prompt = " ".join(filter(None, (word, color, shape + "s")))
        yield row("counting", prompt, [wanted], prompt, exclude=[{"class": shape, "count": count + 1}])

    for color, shape, article in product(COLORS, SHAPES, ("a", "one")):
        wanted = [{"class": shape, "count": 1, "color": color}]
        yield row("colors", f"{article} {color} {shape}", wanted, f"{color} {shape}")

    for (first, second), relation, article in product(permutations(SHAPES, 2), RELATIONS, ("a", "one")):
        # As in GenEval, the second object is listed first and the first one says where it is, seen from entry 0.
        include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
        prompt = f"{article} {first} {relation} {article} {second}"
        yield row("position", prompt, include, f"{first} {relation} {second}")

    for (first, second), (color, other) in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
        include = [{"class": first, "count": 1, "color": color}, {"class": second, "count": 1, "color": other}]
        prompt = f"a {color} {first} and a {other} {second}"
        yield row("color_attr", prompt, include, prompt)


@lru_cache(maxsize=1)
def _meanings() -> dict[str, dict]:
    return {metadata["prompt"]: metadata for metadata, _ in _sentences()}


@lru_cache(maxsize=1)
def _split_prompts() -> dict[str, dict[str, list[str]]]:
    """Prompts of each split and tag: `{"train": {tag: [prompt, ...]}, "test": {...}}`."""
    keys = {tag: {} for tag in TAGS}
    for metadata, key in _sentences():
        keys[metadata["tag"]].setdefault(key, []).append(metadata["prompt"])
    splits = {"train": {}, "test": {}}
    for tag, prompts_of in keys.items():
        order = sorted(prompts_of)
        random.Random(f"held out: {tag}").shuffle(order)
        held_out = len(order) // _HELD_OUT_SHARE
        splits["test"][tag] = [prompt for key in order[:held_out] for prompt in prompts_of[key]]
        splits["train"][tag] = [prompt for key in order[held_out:] for prompt in prompts_of[key]]
    return splits


def all_prompts() -> list[str]:
    """Every prompt of the grammar, both splits."""
    return list(_meanings())


def parse_prompt(prompt: str) -> dict:
    """What a prompt of the shapes world asks for, in GenEval's metadata schema.

    Args:
        prompt (`str`):
            A sentence of the grammar. Case, surrounding space and a final full stop don't matter.

    Returns:
        `dict`: `{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "prompt"}`, and
        `"exclude"` for counting. It is shared between calls: copy it before you change it.

    Raises:
        ValueError: if the prompt isn't in the grammar; the message shows the grammar.

    Example:

    ```python
    >>> from trl_flow.shapes import parse_prompt

    >>> parse_prompt("a red circle")["include"]
    [{'class': 'circle', 'count': 1, 'color': 'red'}]
    ```
    """
    meaning = _meanings().get(" ".join(prompt.lower().rstrip(" .").split()))
    if meaning is None:
        raise ValueError(f"{prompt!r} is not a prompt of the shapes world. Its prompts are:\n{GRAMMAR}")
    return meaning


def shapes_dataset(split: str = "train", num_prompts: int | None = None, seed: int = 0) -> "Dataset":
    """Prompts of the shapes world, as many of each of the six tags.

    A fixed quarter of the distinct prompts of each tag is held out for `"test"` and never occurs in `"train"`: a quarter
    of the meanings ("red circle", "square above triangle", "three blue squares"), or of the wordings for single_object
    and two_object, whose few meanings are in both. The tags take turns, so every stretch of six rows is balanced; a tag
    with fewer distinct prompts than asked for starts over.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`.
        num_prompts (`int`, *optional*):
            Number of rows; 1,536 for `"train"` and 120 for `"test"` if not given.
        seed (`int`, *optional*, defaults to `0`):
            Order of the training prompts. The test split is always the same.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt` and `tag`.
    """
    from datasets import Dataset

    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: the shapes world has the splits 'train' and 'test'")
    if num_prompts is None:
        num_prompts = 1536 if split == "train" else 120
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1")
    rows = {"prompt": [], "tag": []}
    streams = {
        tag: _endless(prompts, random.Random(f"{seed} {tag}") if split == "train" else None)
        for tag, prompts in _split_prompts()[split].items()
    }
    for index in range(num_prompts):
        tag = TAGS[index % len(TAGS)]
        rows["prompt"].append(next(streams[tag]))
        rows["tag"].append(tag)
    return Dataset.from_dict(rows)


def _endless(prompts, generator):
    """All prompts again and again, reshuffled each time round if there is a generator."""
    prompts = list(prompts)
    while True:
        if generator is not None:
            generator.shuffle(prompts)
        yield from prompts
