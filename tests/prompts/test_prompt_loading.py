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

import json

import pytest
from PIL import Image

from trl_flow.prompts import PROMPT_SETS, load_prompts


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  \ntwo blue squares, side by side\n")
    dataset = load_prompts(str(path))
    assert dataset.column_names == ["prompt"]
    assert dataset["prompt"][:] == ["a red circle", "two blue squares, side by side"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_tables_keep_their_columns(tmp_path, suffix):
    rows = [{"prompt": "a red circle", "label": 1}, {"prompt": "a blue square", "label": 2}]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".csv":
        path.write_text("prompt,label\n" + "".join(f"{row['prompt']},{row['label']}\n" for row in rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    assert load_prompts(str(path)).to_list() == rows


def test_parts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(10)))
    assert load_prompts(str(path), num_prompts=3)["prompt"][:] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len(load_prompts(str(path), num_prompts=99)) == 10
    assert load_prompts(str(path), split="train[8:]")["prompt"][:] == ["prompt 8", "prompt 9"]


def test_pictures_to_start_from(tmp_path):
    """In a file, by their names, from wherever the program runs; and as a folder, in the layout of `datasets`."""
    folder = tmp_path / "edits" / "train"
    folder.mkdir(parents=True)
    rows = [("0.png", "make it red", (255, 0, 0)), ("1.png", "make it blue", (0, 0, 255))]
    for name, _, color in rows:
        Image.new("RGB", (8, 6), color).save(folder / name)
    (folder / "edits.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "image": name}) for name, text, _ in rows)
    )
    of_file = load_prompts(str(folder / "edits.jsonl"))
    lines = [json.dumps({"prompt": text, "file_name": name}) for name, text, _ in rows]
    (folder / "edits.jsonl").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    of_folder = load_prompts(str(tmp_path / "edits"))
    for dataset in (of_file, of_folder):
        assert dataset["prompt"][:] == [text for _, text, _ in rows]
        assert [picture.getpixel((0, 0)) for picture in dataset["image"]] == [color for *_, color in rows]


def test_the_embedded_prompts():
    assert "shapes" in PROMPT_SETS
    dataset = load_prompts("shapes", num_prompts=5)
    assert len(dataset) == 5 and all(isinstance(prompt, str) for prompt in dataset["prompt"])
    train, test = load_prompts("shapes")["prompt"][:], load_prompts("shapes", split="test")["prompt"][:]
    assert not set(train) & set(test)


def test_unknown_kinds_of_files(tmp_path):
    path = tmp_path / "prompts.xlsx"
    path.write_text("a red circle")
    with pytest.raises(ValueError, match=r"prompts.xlsx: expected a file that ends in .txt, .json"):
        load_prompts(str(path))


def test_names_that_nothing_answers_to():
    with pytest.raises(ValueError, match=r"dataset='geneval3' could not be loaded: expected a prompt set \(shapes"):
        load_prompts("geneval3")
