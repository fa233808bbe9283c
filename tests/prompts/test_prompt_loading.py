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
import re

import pytest
from datasets import Dataset
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


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_columns_of_a_file(tmp_path, suffix):
    path = str(tmp_path / f"own{suffix}")
    rows = Dataset.from_dict({"caption": ["a, b", "c"], "style": ["x", "y"], "size": [1, 2]})
    if suffix == ".parquet":
        rows.to_parquet(path)
    elif suffix == ".jsonl":
        rows.to_json(path)
    else:
        rows.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
    with pytest.raises(ValueError, match=r"own\.\w+ has no column 'prompt'; its text is in caption, style. Say which"):
        load_prompts(path)
    with pytest.raises(ValueError, match=r"own\.\w+ has no column text; it has caption, style, size"):
        load_prompts(path, columns={"text": "prompt"})
    expected = [{"prompt": "a, b", "size": 1}, {"prompt": "c", "size": 2}]
    assert load_prompts(path, columns={"caption": "prompt", "size": "size"}).to_list() == expected
    assert load_prompts(path, columns={"caption": "prompt", "size": "size"}, num_prompts=1).to_list() == expected[:1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"columns": {"caption": "text"}}, "columns={'caption': 'text'} has no prompt: expected one like"),
        ({"columns": {"a": "prompt", "b": "prompt"}}, "gives two columns one name"),
        ({"num_prompts": 0}, "num_prompts=0: expected at least 1, or None for all"),
        ({"revision": "main"}, "revision='main': {path} is a local path and takes none"),
        ({"split": "test"}, "split='test' of {path}: a file has the split 'train' alone"),
    ],
)
def test_settings_that_do_not_fit_a_file(tmp_path, settings, message):
    path = tmp_path / "own.txt"
    path.write_text("a red circle\n")
    with pytest.raises(ValueError, match=re.escape(message.replace("{path}", str(path)))):
        load_prompts(str(path), **settings)


def test_broken_files(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"own.jsonl could not be read. \w+: .*JSON"):
        load_prompts(str(path))


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
    (folder / "edits.csv").write_text("prompt,image\n" + "".join(f"{text},{name}\n" for name, text, _ in rows))
    of_table = load_prompts(str(folder / "edits.csv"))
    (folder / "edits.csv").unlink()
    lines = [json.dumps({"prompt": text, "file_name": name}) for name, text, _ in rows]
    (folder / "edits.jsonl").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    of_folder = load_prompts(str(tmp_path / "edits"))
    for dataset in (of_file, of_folder, of_table):
        assert dataset["prompt"][:] == [text for _, text, _ in rows]
        assert [picture.getpixel((0, 0)) for picture in dataset["image"]] == [color for *_, color in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_some_rows_without_a_picture(tmp_path, suffix):
    """More of them than are written at a time, so that nothing can be guessed from the first."""
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "0.png")
    path = tmp_path / f"edits{suffix}"
    names = [None] * 1100 + ["0.png"]
    if suffix == ".csv":
        path.write_text("prompt,image\n" + "".join(f"{number},{name or ''}\n" for number, name in enumerate(names)))
    else:
        lines = [json.dumps({"prompt": str(number), "image": name}) for number, name in enumerate(names)]
        path.write_text("\n".join(lines))
    dataset = load_prompts(str(path))
    assert dataset[0]["image"] is None and dataset[1099]["image"] is None
    assert dataset[1100]["image"].getpixel((0, 0)) == (255, 0, 0)


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
