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
"""A run from the command line whose reward and prompts come from the Hub: consent, commits, columns, resuming."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub


REWARD = """
from .levels import scale

def reward(prompts, images, style, **kwargs):
    assert all(value in ("plain", "bold") for value in style)
    return [scale(image) for image in images]
"""
LEVELS = """
def scale(image):
    pixels = list(image.convert("L").getdata())
    return {factor} * sum(pixels) / len(pixels) / 255
"""
COMMAND = """
import sys
from trl_flow.cli import main
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = {
    "reward_funcs": ["user/brightness"],
    "eval_reward_funcs": ["shapes_strict"],
    "dataset_name": "user/prompts",
    "dataset_columns": ["caption=prompt", "style", "kind=tag"],
    "num_eval_prompts": 4,
    "num_inference_steps": 3,
    "num_eval_inference_steps": 3,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "sde_steps": [0],
    "guidance_scale": 1.0,
    "max_steps": 1,
    "beta": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

pytestmark = pytest.mark.slow  # four processes in turn


def rows(number: int) -> str:
    prompts = ["a red circle", "a blue square", "two green triangles", "a circle", "a square", "a white triangle"]
    return "\n".join(
        json.dumps(
            {"caption": prompts[k], "kind": ["one", "two"][k % 2], "style": ["plain", "bold"][k % 2], "votes": k}
        )
        for k in range(number)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What several calls of the command gave: exit code and output by name."""
    folder = tmp_path_factory.mktemp("from-hub")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    with LoopbackHub() as hub:
        first = hub.add("model", "user/brightness", {"reward.py": REWARD, "levels.py": LEVELS.format(factor=1)})
        hub.add("dataset", "user/prompts", {"train.jsonl": rows(6), "test.jsonl": rows(4)})

        def call(*words):
            arguments = ["flow-grpo", "--config", str(config), "--output_dir", str(folder / "run"), *words]
            return hub.run(COMMAND, *arguments, cwd=folder, check=False)

        refused = call()
        trained = call("--trust_remote_code")
        second = hub.add("model", "user/brightness", {"reward.py": REWARD, "levels.py": LEVELS.format(factor=2)})
        resume = ["--trust_remote_code", "--max_steps", "2", "--resume_from_checkpoint", "true"]
        other = call(*resume)
        resumed = call(*resume, "--reward_funcs", f"user/brightness@{first}")
    return {
        "folder": folder / "run",
        "commits": (first, second),
        "calls": {"refused": refused, "trained": trained, "other": other, "resumed": resumed},
    }


def test_nothing_runs_without_consent(run):
    refused = run["calls"]["refused"]
    assert refused.returncode == 1
    assert "reward='user/brightness' is code, and there is no consent to run it" in refused.stderr
    assert "--trust_remote_code" in refused.stderr


def test_it_trains_and_writes_down_the_commit(run):
    trained, folder = run["calls"]["trained"], run["folder"]
    assert trained.returncode == 0, trained.stderr
    first, _ = run["commits"]
    assert json.loads((folder / "run.json").read_text())["reward_sources"] == {
        "brightness": {"repository": "user/brightness", "revision": first}
    }
    assert (
        f"[user/brightness](https://huggingface.co/user/brightness/tree/{first})"
        in ModelCard.load(folder / "README.md").text
    )
    assert f"user/brightness@{first}" in trained.stdout + trained.stderr  # how to pin it
    log = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any("rewards/brightness/mean" in entry for entry in log)
    assert any("eval_tags/one/brightness" in entry and "eval_tags/two/shapes_strict" in entry for entry in log)


def test_a_run_goes_on_with_the_reward_that_it_began_with(run):
    first, second = run["commits"]
    other, resumed = run["calls"]["other"], run["calls"]["resumed"]
    assert other.returncode == 1
    assert f"revision {first}" in other.stderr and f"revision {second}" in other.stderr
    assert "user/repo@commit" in other.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run["folder"] / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
