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

"""What is known of each named prompt set, and where its prompts are."""

import json
from collections.abc import Callable
from typing import NamedTuple


class Part(NamedTuple):
    """
    One split of a prompt set.

    Attributes:
        prompts (`int`, *optional*): How many it has, filters applied, where a paper or the file's readers say so.
        file (`str`, *optional*): File of the set's repository, with `*` where a name has a hash.
        columns (`dict[str, str]`): Columns of the file that are read, and what they are called here.
    """

    prompts: int | None = None
    file: str | None = None
    columns: dict[str, str] = {}


class PromptSet(NamedTuple):
    """
    A prompt set that has a name here. None of them is part of this library: they are generated, or loaded from the Hub.

    Attributes:
        description (`str`): What is asked for in its prompts.
        parts (`dict[str, Part]`): Its splits.
        license (`str`): Of the prompts.
        source (`str`): Paper or code that it comes from.
        checked (`str`): What of this record was checked and what was not.
        columns (`tuple[str, ...]`): Columns beside `prompt`.
        rewards (`tuple[str, ...]`): Built-in rewards that are made for it.
        generator (`str`, *optional*): `"module:function"`, relative to this package, of a set that is generated.
        repository (`str`, *optional*): Dataset repository on the Hub.
        revision (`str`, *optional*): Its commit. `None`: the newest.
        read (`Callable`, *optional*): From a row of the file, its columns renamed, to the row here.
        min_words (`int`): Shorter prompts are left out.
        distinct (`bool`): Whether a prompt that occurred before is left out. Not in benchmarks: what papers average over
            is their rows.
    """

    description: str
    parts: dict[str, Part]
    license: str
    source: str
    checked: str
    columns: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    generator: str | None = None
    repository: str | None = None
    revision: str | None = None
    read: Callable[[dict], dict] | None = None
    min_words: int = 1
    distinct: bool = False


def read_testpoints(row: dict) -> dict:
    """UniGenBench keeps what a prompt tests, and the prompt's theme, as JSON in one column."""
    if "dimensions" not in row:
        return row
    dimensions = json.loads(row["dimensions"])
    return {
        "prompt": row["prompt"],
        "tag": dimensions["Primary Categories"],
        "testpoints": dimensions["Testpoints"],
        "testpoint_descriptions": dimensions["Testpoint Description"],
    }


PROMPT_SETS = {
    "shapes": PromptSet(
        description="Circles, squares and triangles in eight colours, for the embedded pipeline.",
        parts={"train": Part(1_536), "test": Part(120)},
        license="Apache-2.0",
        source="this library; tags and schema of GenEval",
        checked="generated here, tested here",
        columns=("tag",),
        rewards=("shapes", "shapes_partial", "shapes_strict"),
        generator="..shapes:shapes_dataset",
    ),
    "geneval": PromptSet(
        description="Objects, counts, colours and positions, from GenEval's grammar and COCO's 80 classes.",
        parts={"train": Part(5_100), "test": Part(553)},
        license="Apache-2.0",
        source="GenEval, arXiv:2310.11513; generated here from its grammar",
        checked="generated here, tested here; not the 553 prompts of the paper",
        columns=("tag", "include", "exclude"),
        rewards=("geneval",),
        generator=".geneval:geneval_dataset",
    ),
    "ocr": PromptSet(
        description="Signs, labels and posters with a text in double quotes that the picture must show.",
        parts={"train": Part(6_000), "test": Part(1_000)},
        license="Apache-2.0",
        source="the OCR task of Flow-GRPO, arXiv:2505.05470, after which they are generated here",
        checked="generated here, tested here; not the prompts of the paper's files",
        columns=("target",),
        rewards=("ocr",),
        generator=".ocr:ocr_dataset",
    ),
    "pick-a-pic": PromptSet(
        description="What people typed into a web demo. Some of it is not safe for work.",
        parts={
            "train": Part(None, "data/train-*.parquet", {"caption": "prompt"}),
            "test": Part(None, "data/test_unique-*.parquet", {"caption": "prompt"}),
        },
        license="not stated on the card (MIT on that of CarperAI's subset)",
        source="Pick-a-Pic, arXiv:2305.01569; at least 6 words and no repetitions, as in Flow-GRPO",
        checked="repository, files and the 583,747 and 500 rows before filters: from the Hub's pages; `caption`: from "
        "the card of its version 2. The paper holds the test prompts out. Not downloaded",
        rewards=("pickscore",),
        repository="yuvalkirstain/pickapic_v1_no_images",
        revision="a3592a4f2e6adb7646ef56f3bb18e2968348a163",
        min_words=6,
        distinct=True,
    ),
    "hpdv2": PromptSet(
        description="Captions of COCO and prompts of DiffusionDB, cleaned of what is not safe for work.",
        parts={
            "train": Part(103_700, "train.json", {"prompt": "prompt"}),
            "test": Part(400, "test.json", {"prompt": "prompt"}),
        },
        license="Apache-2.0",
        source="Human Preference Dataset v2, arXiv:2306.09341",
        checked="repository, commit, files, columns and licence: from its card; counts: from G2RPO, "
        "arXiv:2510.01982. Not downloaded",
        rewards=("hpsv2",),
        repository="ymhao/HPDv2",
        revision="bb0f2563e451e11c3f376b2ba93615db00e042e1",
        distinct=True,
    ),
    "drawbench": PromptSet(
        description="A benchmark of eleven difficulties: colours, counting, positions, rare words, text, ...",
        parts={
            "test": Part(200, "DrawBench Prompts - Sheet1.csv", {"Prompts": "prompt", "Category": "tag"}),
        },
        license="not stated",
        source="Imagen, arXiv:2205.11487",
        checked="repository, commit, file, columns and the 200 rows: from code that uses them. Not downloaded",
        columns=("tag",),
        repository="sayakpaul/drawbench",
        revision="ad794cba698c253ffdb6d18eff3fc87b004c1135",
    ),
    "parti": PromptSet(
        description="A benchmark of twelve categories (the tag) and eleven challenges, from a word to a paragraph.",
        parts={
            "test": Part(
                1_632,
                "PartiPrompts.tsv",
                {"Prompt": "prompt", "Category": "tag", "Challenge": "challenge"},
            ),
        },
        license="Apache-2.0",
        source="PartiPrompts (P2) of Parti, arXiv:2206.10789",
        checked="repository, commit, file and licence: from the Hub's pages; columns and the 1,632 rows: from code "
        "that uses them. Not downloaded",
        columns=("tag", "challenge"),
        repository="nateraw/parti-prompts",
        revision="944b156abfdad7627c3221b5ec4f6a6fb060a197",
    ),
    "unigenbench": PromptSet(
        description="A benchmark with the points that each prompt tests, and prompts to train on.",
        parts={
            "train": Part(9_999, "train/train_prompt.txt", {"text": "prompt"}),
            "test": Part(600, "eval/test_en.csv", {"prompt_en": "prompt", "sub_dims_en": "dimensions"}),
        },
        license="MIT on the Hub, CC BY 4.0 on GitHub",
        source="UniGenBench of Pref-GRPO, arXiv:2508.20751",
        checked="repository, files and licences: from the Hub's pages; columns: from the benchmark's code and its "
        "other files on GitHub; counts: from GitHub. Not downloaded",
        columns=("tag", "testpoints", "testpoint_descriptions"),
        rewards=("unigenbench",),
        repository="CodeGoat24/UniGenBench",
        read=read_testpoints,
    ),
}
