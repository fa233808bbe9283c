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
"""Files like those of the repositories that the named prompt sets come from, with a few rows."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq


def parquet(rows: dict, **settings) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer, **settings)
    return buffer.getvalue()


def pick_a_pic(captions: list[str]) -> bytes:
    """Some of the columns that the card lists."""
    n = len(captions)
    return parquet(
        {
            "are_different": [True] * n,
            "best_image_uid": [f"{i:08x}" for i in range(n)],
            "caption": captions,
            "image_0_url": [f"https://example.org/{i}.png" for i in range(n)],
            "label_0": [0.5] * n,
            "num_example_per_prompt": list(range(n)),
        }
    )


LONG = ["a red fox in the deep snow", "two astronauts riding one horse on mars", "an old map of a city in ink"]
TESTPOINTS = {
    "Primary Categories": "Art",
    "Secondary Categories": "Graphic Art",
    "Testpoints": ["Style", "Attribute - Color"],
    "Testpoint Description": ["ink", "a red seal"],
}
FILES = {
    "pick-a-pic": {
        "data/train-00000-of-00002-b1.parquet": pick_a_pic(["too short", LONG[0], LONG[0] + " ", LONG[1]]),
        "data/train-00001-of-00002-b1.parquet": pick_a_pic([LONG[1], "five words are too few", LONG[2]]),
        "data/test-00000-of-00001-c1.parquet": pick_a_pic(["the larger test split, with repeated prompts"]),
        "data/test_unique-00000-of-00001-d1.parquet": pick_a_pic(["a held out prompt of seven words"]),
    },
    "hpdv2": {
        "train.json": json.dumps(
            [{"human_preference": [1, 0], "prompt": p, "file_path": ["1.jpg"]} for p in ("a cat", "a cat", "a “dog” [{")],
            ensure_ascii=False,
        ),
        "test.json": json.dumps(
            [{"prompt": "a bird", "image_path": ["1.jpg"], "rank": [1], "raw_annotations": [{"rank": [1]}]}], indent=1
        ),
    },
    "drawbench": {
        "DrawBench Prompts - Sheet1.csv": 'Prompts,Category\nA red car.,Colors\n"A sign, that says ""hi"".",Text\nA red car.,Colors\n'
    },
    "parti": {
        "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology-inspired concepts\n"
        "a man, a plan\tPeople\tSimple Detail\t\n"
    },
    "unigenbench": {
        "train/train_prompt.txt": "a first line to train on\n\na second one, with a comma\n",
        "eval/test_en.csv": "index,prompt_en,sub_dims_en\n0,An ink painting,"
        + '"' + json.dumps(TESTPOINTS).replace('"', '""') + '"\n',
    },
}  # fmt: skip
