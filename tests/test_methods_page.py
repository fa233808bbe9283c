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

"""docs/methods.md says of every method what it costs, and shows its tree: both as the library has them."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image
from pipelines import brightness, prompts, tiny_sd3

import trl_flow
from trl_flow.scripts.dry_run import group_work
from trl_flow.scripts.methods import METHODS


PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def table(title: str) -> dict[str, list[str]]:
    """Rows of the table in a section, by the command in their first cell."""
    section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in rows if row[0].startswith("`")}


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("command", METHODS)
def test_costs(command, tmp_path):
    """With the defaults of the method's configuration."""
    method = METHODS[command]
    args = getattr(trl_flow, method.config)(output_dir=tmp_path, use_cpu=True, report_to="none")
    trainer = getattr(trl_flow, method.trainer)(
        tiny_sd3(),
        reward_funcs=brightness,
        args=args,
        train_dataset=prompts(8),
        peft_config=LoraConfig(r=2, target_modules=None),
    )
    work = group_work(trainer, trainer.rollout_steps()).times(trainer.groups_per_prompt)
    trainer.end()

    steps, samples, *costs = table("What they cost")[command]
    assert int(steps) == args.num_inference_steps
    groups, _, samples = samples.rpartition(" × ")
    assert (int(groups or 1), int(samples)) == (trainer.groups_per_prompt, args.num_generations)
    assert [number(cost) for cost in costs] == [work.evaluations, work.pictures, work.rows, work.references]


def test_every_method_is_described():
    rows = table("All methods")
    assert {command: row[0].strip("`") for command, row in rows.items()} == {
        command: method.trainer for command, method in METHODS.items()
    }
    assert table("What they cost").keys() == METHODS.keys()


def test_settings_exist():
    """Those that take a method apart, and those of the advice."""
    fields = {name for method in METHODS.values() for name in getattr(trl_flow, method.config).__dataclass_fields__}
    section = PAGE.read_text().partition("## Settings that take a method apart\n")[2]
    named = {name for line in section.splitlines() if line[:1] == "|" for name in re.findall(r"`([a-z_]+)[:`]", line)}
    values = {
        "value",
        "full",
        "dpm",
        "dance",
        "cps",
        "noise",
        "guard",
        "gaussian",
        "velocity",
        "batch",
        "none",
        "euler",
    }
    assert named - values - {"lora_r"} <= fields and len(named) > 40


def test_pictures_are_there():
    for name in re.findall(r"\]\((images/\S+\.png)\)", PAGE.read_text()):
        with Image.open(PAGE.parent / name) as image:
            assert image.width > 500
