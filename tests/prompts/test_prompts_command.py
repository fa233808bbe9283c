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

"""`trl-flow prompts`: the list, and a look into a set, a file and a dataset with pictures."""

import json

import pytest
from PIL import Image
from rich.console import Console

from trl_flow import cli
from trl_flow.prompts import PROMPT_SETS
from trl_flow.scripts import prompts


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def output(capsys, *args) -> str:
    assert cli.main(["prompts", *args]) == 0
    return capsys.readouterr().out


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {"caption": f"prompt {number % 20} " + "word " * (number % 3), "style": "ink" if number < 5 else "oil"}
        for number in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)  # fmt: skip


@pytest.mark.parametrize("args", [(), ("list",)])
def test_list(capsys, args):
    text = output(capsys, *args)
    for name, record in PROMPT_SETS.items():
        assert f"│ {name} " in text
        assert record.license in text
        for part in record.parts.values():
            assert part.prompts is None or f"{part.prompts:,}" in text
    assert "Made for the rewards: geneval." in text


def test_show_a_set(capsys):
    text = output(capsys, "show", "shapes", "--split", "test", "--num_prompts", "3")
    assert "Licence: Apache-2.0." in text
    assert "120 prompts, " in text and "Columns beside the prompt: tag." in text
    assert "shapes, test" in text
    counts = [line for line in text.splitlines() if "single_object" in line]
    assert counts[0].split("│")[2].strip() == "20"


def test_show_a_file(capsys, table):
    text = output(capsys, "show", table, "--columns", "caption=prompt", "style=tag", "--num_prompts", "4")
    # Repetitions count once the text is the same: numbers 20 to 29 repeat 0 to 9 where their lengths agree.
    lengths = [(number % 20, number % 3) for number in range(30)]
    assert f"30 prompts, {len(lengths) - len(set(lengths))} of them repetitions of another." in text
    assert "Words: 2 to 4, median 3." in text
    tags = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert (tags["ink"], tags["oil"]) == ("5", "25")
    assert sum("prompt " in line and "│" in line for line in text.splitlines()) == 4


def test_the_seed_decides_on_the_prompts(capsys, table):
    shown = [output(capsys, "show", table, "--columns", "caption=prompt", "--seed", seed) for seed in "001"]
    assert shown[0] == shown[1] != shown[2]


def test_the_first_prompts_of_many(capsys, table):
    text = output(capsys, "show", table, "--columns", "caption=prompt", "--num_rows", "12")
    assert "12 prompts, 0 of them" in text and "These are the first 12; --num_rows reads more." in text


def test_markup_in_prompts_is_text(capsys, tmp_path):
    (tmp_path / "own.txt").write_text("a [bold]red[/bold] circle\n")
    assert "a [bold]red[/bold] circle" in output(capsys, "show", str(tmp_path / "own.txt"))


def test_pictures_and_long_cells(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    row = {"prompt": "edit " * 100, "image": "0.png", "boxes": [1, 2]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    args = prompts.PromptsArguments(action="show", name=str(tmp_path / "own.jsonl"))
    console = Console(width=300, record=True, file=open("/dev/null", "w"))
    prompts.show(args, console)
    text = console.export_text()
    assert "picture" in text and "[1, 2]" in text
    assert text.count("edit ") <= 41 and " ..." in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["show"], "name a prompt set: trl-flow prompts show drawbench"),
        (["list", "drawbench"], "list takes no name; to look into drawbench: trl-flow prompts show drawbench"),
        (["show", "shapes", "--num_prompts", "0"], "num_prompts=0: expected at least 1"),
        (["show", "drawbnch"], "Did you mean drawbench?"),
        (["show", "nowhere.txt"], "dataset='nowhere.txt': there is no such file."),
        (["show", "user/dataset"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_errors_are_one_line(capsys, args, message):
    assert cli.main(["prompts", *args]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_unknown_action(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prompts", "drawbench"])
    assert "invalid choice: 'drawbench'" in capsys.readouterr().err
