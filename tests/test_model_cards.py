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

"""The cards in `model_cards/`, and the script that makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_metadata import metadata_problems
from PIL import Image


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from model_cards import keep, problems  # noqa: E402

from trl_flow.hub import create_model_card  # noqa: E402


CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


def check(folder: Path):
    text = (folder / "README.md").read_text()
    assert metadata_problems(text) == ([], [])
    assert problems(folder) == []
    config = (folder / "config.yaml").read_text()
    assert yaml.safe_load(config)["output_dir"] == folder.name
    for private in (str(Path.home()), str(ROOT), "/tmp/"):
        assert private not in text + config


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_of_examples(folder):
    check(folder)


@pytest.fixture
def run(tmp_path):
    """What a run leaves, in small."""
    folder = tmp_path / "run" / "shapes-method"
    (folder / "samples" / "step_000001").mkdir(parents=True)
    for name in ("curves.png", "before_after.png", "samples/step_000001/000.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "samples" / "step_000001.json").write_text(json.dumps({"prompts": ["a square"], "scores": {}}))
    (folder / "config.yaml").write_text("output_dir: shapes-method\n")
    (folder / "adapter_model.safetensors").touch()
    create_model_card(
        folder,
        base_model="shapes",
        pipeline_class_name="StableDiffusion3Pipeline",
        method_name="Method",
        metrics={"before": {"shapes": 0.1}, "after": {"shapes": 0.2}},
        command="trl-flow flow-grpo --config config.yaml",
    )
    return folder


def test_what_is_kept_is_whole(run, tmp_path):
    target = tmp_path / "cards" / "shapes-method"
    (target / "images").mkdir(parents=True)
    (target / "images" / "old.png").touch()
    keep(run, target)
    check(target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == {
        "README.md",
        "config.yaml",
        "curves.png",
        "before_after.png",
        "images/sample_0.png",
    }
    (target / "images" / "sample_0.png").unlink()
    (target / "curves.png").unlink()
    text = (target / "README.md").read_text()
    (target / "README.md").write_text(text.replace("## Limits", "Limits").replace("![Learning curves]", ""))
    (target / "weights.safetensors").touch()
    assert problems(target) == [
        "images/sample_0.png is not there",
        "there is no section 'Limits'",
        "curves.png is not shown",
        "weights.safetensors is no part of a card",
    ]


@pytest.mark.slow
def test_an_example_leaves_a_card(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "model_cards.py"), "--output", str(tmp_path)]
    command += ["--methods", "dense-grpo", "--max_steps", "1", "--num_eval_prompts", "2", "--rollout_batch_size", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    check(tmp_path / "shapes-dense-grpo")
