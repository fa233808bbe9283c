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


"""The same global batch on one process, two and four: the same rollouts, and the same updates to rounding."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines import prompts
from safetensors.torch import load_file

from trl_flow.trainer.layout import Layout, deal_anew


METHODS = {
    "FlowGRPO": {"scale_rewards": "batch", "eval_strategy": "steps", "eval_steps": 2},
    "FlowGRPOFast": {"sde_window_size": 2},
    "DanceGRPO": {},
    "MixGRPO": {"sde_window_size": 2},
    "CoCA": {},
    "TempFlowGRPO": {"num_seeds": 2},
    "TurningPointGRPO": {},
    "DenseGRPO": {"beta": 0.04, "num_iterations": 2},
    "G2RPO": {"update_per_step": True, "sde_steps": [0, 1], "granularities": [1, 2]},
    "DiffusionNFT": {"old_policy_decay_rate": 0.5},
    "AWM": {},
    "B2DiffuRL": {},
}  # fmt: skip
# Eight groups in a rollout and four in an update, always: processes, groups of a micro-step, micro-steps of an update.
LAYOUTS = {"one": (1, 4, 1), "two": (2, 1, 2), "four": (4, 1, 1), "accumulated": (1, 1, 4)}
# All methods on one and two processes; in the other layouts those that differ most in what processes tell each other.
SOME = ("FlowGRPO", "TempFlowGRPO", "TurningPointGRPO", "DiffusionNFT")
COMPARED = [(method, name) for name in LAYOUTS if name != "one" for method in (METHODS if name == "two" else SOME)]
# Two prompts stand in the data twice, in places that other processes have; and one rollout is all that an epoch has.
PROMPTS = prompts(9)["prompt"][:] + prompts(2)["prompt"][:]
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "ema_decay": 0.9}
# Whose checkpoints others go on with: after the first update of a rollout's two (Dense-GRPO's and G2RPO's four), or all.
RESUMED = [
    ("two", "one", "FlowGRPO", 1),
    ("two", "one", "DenseGRPO", 3),
    ("two", "one", "G2RPO", 1),
    ("two", "one", "DiffusionNFT", 2),
    ("one", "two", "DenseGRPO", 1),
    ("one", "two", "FlowGRPO", 2),
    ("two", "four", "G2RPO", 3),
    ("two", "four", "FlowGRPO", 1),
    ("four", "accumulated", "DiffusionNFT", 1),
]


def layout(name: str) -> dict:
    _, batch_size, accumulation = LAYOUTS[name]
    return {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": 2 * accumulation,
    }


def launch(folder: Path, jobs: list[dict], processes: int):
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        4: [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "4", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    }[processes]  # fmt: skip
    command += [str(Path(__file__).with_name("training_jobs.py")), str(folder / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory with a run of each method in the layouts that it is compared in."""
    folder = tmp_path_factory.mktemp("runs")
    saved = {method for _, _, method, _ in RESUMED}
    for name, (processes, *_) in LAYOUTS.items():
        jobs = [
            {
                "name": f"{name}-{method}",
                "method": method,
                "data": PROMPTS,
                "settings": layout(name) | (SAVED if method in saved else {}) | settings,
                "resume": None,
            }
            for method, settings in METHODS.items()
            if name == "one" or (method, name) in COMPARED
        ]
        launch(folder, jobs, processes)
    return folder


def in_order(run: Path) -> list[dict]:
    """The rollouts of a run, and in each what all processes have made, in the order of the updates."""
    parts = [torch.load(path, weights_only=True) for path in sorted(run.glob("rollouts-*.pt"))]
    rollouts = []
    for rollout in zip(*parts, strict=True):
        batches = [part["micro_batches"] for part in rollout]
        updates = len(batches[0]) // (4 // (len(parts) * len(batches[0][0]["keys"])))
        per_update = len(batches[0]) // updates
        ordered = [
            batch
            for update in range(updates)
            for own in batches
            for batch in own[update * per_update : (update + 1) * per_update]
        ]
        rollouts.append(
            {
                "keys": [key for batch in ordered for key in batch["keys"]],
                **{name: torch.cat([batch[name] for batch in ordered]) for name in ("nodes", "advantages", "trained")},
                "numbers": [part["numbers"] for part in rollout],
                "scored": [part["scored"] for part in rollout],
            }
        )
    return rollouts


def logged(run: Path, name: str) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def assert_adapters_close(run: Path, expected: Path, atol: float):
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (run, expected))
    for key, value in others.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method, other", COMPARED)
def test_rollouts_and_updates_are_those_of_one_process(runs, method, other):
    expected, found = (in_order(runs / f"{name}-{method}") for name in ("one", other))
    for number, (rollout, same) in enumerate(zip(found, expected, strict=True)):
        assert rollout["keys"] == same["keys"]
        assert torch.equal(rollout["trained"], same["trained"])
        assert torch.equal(rollout["advantages"], same["advantages"])
        # Forwards have as many rows everywhere: what is sampled with the same weights is the same, bit by bit.
        torch.testing.assert_close(rollout["nodes"], same["nodes"], rtol=0, atol=0 if number == 0 else 1e-5)
    # Gradients are sums in another order.
    assert_adapters_close(runs / f"{other}-{method}", runs / f"one-{method}", atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_group_is_on_one_process_and_both_of_one_prompt_have_noise_of_their_own(runs, name):
    first = in_order(runs / f"{name}-FlowGRPO")[0]
    assert len({number for own in first["numbers"] for number in own}) == 8, "no prompt on two processes"
    assert first["scored"] == [sorted(own) for own in first["numbers"]], "scored where it was sampled"
    prompts_twice = [key.split("|")[1] for key in first["keys"] if key.endswith("|1")]
    assert prompts_twice, "the rollout has a prompt twice"
    noise = {key: node[0, 0] for key, node in zip(first["keys"], first["nodes"], strict=True)}
    for prompt in prompts_twice:
        assert not torch.equal(noise[f"0|{prompt}|0"], noise[f"0|{prompt}|1"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("other", [name for name in LAYOUTS if name != "one"])
def test_logs_and_evaluations_are_those_of_one_process(runs, other):
    """Five held-out prompts divide by neither two nor four."""
    one, found = runs / "one-FlowGRPO", runs / f"{other}-FlowGRPO"
    for name in ("reward", "reward_std", "rewards/chance/mean", "grad_norm", "ratio/mean"):
        assert logged(found, name) == pytest.approx(logged(one, name), rel=1e-5), name
        assert len(logged(one, name)) >= 2
    scores = [json.loads((run / "samples" / "step_000002.json").read_text()) for run in (found, one)]
    assert scores[0]["prompts"] == scores[1]["prompts"] and len(scores[0]["prompts"]) == 5
    assert scores[0]["scores"]["redness"] == pytest.approx(scores[1]["scores"]["redness"], abs=1e-4)


@pytest.fixture(scope="module")
def resumed(runs) -> Path:
    """A directory with the runs of other layouts that were gone on with, after the first half of a rollout or all of it."""
    folder = runs / "resumed"
    for processes in (1, 2, 4):
        jobs = [
            {
                "name": f"{before}-{after}-{method}-{stop}",
                "method": method,
                "data": PROMPTS,
                "settings": layout(after) | SAVED | {"save_steps": 100} | METHODS[method],
                "resume": str(runs / f"{before}-{method}" / f"checkpoint-{stop}"),
            }
            for before, after, method, stop in RESUMED
            if LAYOUTS[after][0] == processes
        ]
        launch(folder, jobs, processes)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("before, after, method, stop", RESUMED)
def test_other_processes_go_on_with_a_run(runs, resumed, before, after, method, stop):
    run, straight = resumed / f"{before}-{after}-{method}-{stop}", runs / f"{before}-{method}"
    assert_adapters_close(run, straight, atol=1e-6)  # the average
    assert_adapters_close(run / "checkpoint-4", straight / "checkpoint-4", atol=1e-6)
    for name in ("reward", "grad_norm", "epoch", "step"):
        assert logged(run, name) == pytest.approx(logged(straight, name), rel=1e-5), name


# ---- Layouts ----


def test_the_groups_of_an_update_are_the_same_in_every_layout():
    layouts = [Layout(1, 12, 1, 3), Layout(1, 2, 6, 18), Layout(2, 3, 2, 6), Layout(3, 4, 1, 3), Layout(4, 1, 3, 9)]
    for layout in layouts:
        assert layout.has_updates_of(layouts[0])
        dealt = layout.dealt()
        updates = dealt.view(layout.processes, 3, -1).transpose(0, 1).flatten(1)
        assert updates.tolist() == torch.arange(36).view(3, 12).tolist()
        assert layout.in_order(dealt.flatten()).tolist() == list(range(36))
    for other in (Layout(1, 6, 1, 3), Layout(1, 12, 1, 6), Layout(1, 12, 1, 3, parts=2), Layout(1, 12, 1, 3, 1, 2)):
        assert not other.has_updates_of(layouts[0])


def test_a_rollout_under_way_is_dealt_anew():
    """Two processes to four, with two updates of two parts: each update keeps its groups, in their order."""

    def micro_batch(groups, part):
        numbers = torch.tensor(groups)
        return {
            "nodes": numbers[:, None].float(),
            "advantages": (100 * part + numbers)[:, None, None],
            "trained": numbers[:, None, None] % 3 > 0,
            "steps": torch.tensor([part]),
            "parents": torch.tensor([[0]]),
            "children": torch.tensor([[1]]),
            "prompts": [f"prompt {n}" for n in groups],
            "images": [torch.tensor(n) for n in groups],
            "keys": [f"key {n}" for n in groups],
            "old": None if (part, groups[0] < 8) == (0, True) else {"log_probs": -numbers[:, None, None]},
        }

    before, after = Layout(2, 2, 2, 4, parts=2), Layout(4, 1, 2, 4, parts=2)
    own = [[[0, 1], [2, 3], [8, 9], [10, 11]], [[4, 5], [6, 7], [12, 13], [14, 15]]]
    made = [[micro_batch(groups, part) for part in range(2) for groups in process] for process in own]
    for process in range(4):
        expected = [2 * process, 2 * process + 1, 8 + 2 * process, 9 + 2 * process]
        dealt = deal_anew(made, before, after, process)
        for batch, (part, number) in zip(dealt, itertools.product(range(2), expected), strict=True):
            wanted = micro_batch([number], part)
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, wanted[name]), name
                elif name == "old" and value is not None:
                    assert torch.equal(value["log_probs"], wanted["old"]["log_probs"])
                else:
                    assert value == wanted[name], name
