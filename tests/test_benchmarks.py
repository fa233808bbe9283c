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


"""The benchmarks run, in small, write what they promise, and what they compare with is what they say."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from trl_flow.rollout import branch_plan, chain_plan, dense_plan


def load(name: str, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module(name)


def results(output: Path) -> dict:
    """What a benchmark wrote, after a look at the table and the picture."""
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["versions"]["torch"] == torch.__version__ and record["cores"] and record["clock"]
    assert "| --- |" in output.with_suffix(".md").read_text()
    with Image.open(output.with_suffix(".png")) as picture:
        assert min(picture.size) > 100
    return record


@pytest.mark.parametrize("steps, trained, group", [(4, 3, 3), (10, 2, 6), (2, 1, 5)])
def test_closed_form_of_chains(steps, trained, group, monkeypatch):
    plan = chain_plan(steps, group, range(trained), same_initial_noise=True)
    rows = sum(len({edge.parent for edge in edges}) for edges in plan.transitions.values())
    expected = plan.num_evaluations, rows, len(plan.leaves)
    assert load("growth", monkeypatch).chains(steps, group, trained) == expected


@pytest.mark.parametrize("steps, group", [(2, 3), (4, 6), (10, 2)])
def test_closed_form_of_full_tails(steps, group, monkeypatch):
    plan = dense_plan(steps, group, range(steps - 1))
    rows = sum(len({edge.parent for edge in edges}) for edges in plan.transitions.values())
    assert load("growth", monkeypatch).dense(steps, group) == (plan.num_evaluations, rows, len(plan.leaves))


# From the seventh step of ten on, strides 2 and 3 make one tail of two: fewer pictures than the formula says.
@pytest.mark.parametrize("trained, strides", [(1, [1]), (6, [1]), (4, [1, 2]), (1, [1, 2, 3]), (5, [1, 2, 3])])
def test_closed_form_of_branches(trained, strides, monkeypatch):
    plan = branch_plan(10, 3, range(trained), strides)
    rows = sum(len({edge.parent for edge in edges}) for edges in plan.transitions.values())
    expected = plan.num_evaluations, rows, len(plan.leaves)
    assert load("growth", monkeypatch).branches(10, 3, trained, strides) == expected


def test_phases_are_exclusive(monkeypatch):
    overhead = load("overhead", monkeypatch)
    now = [0.0]
    monkeypatch.setattr(overhead, "clock", lambda: now[0])
    phases = overhead.Phases()

    def wait(seconds, then=lambda: None):
        now[0] += seconds
        then()
        now[0] += seconds

    decode = phases.within("decode", wait)
    credit = phases.within("credit", wait)
    credit(100.0)  # not while it is off
    phases.is_on = True
    phases.start()
    now[0] += 1.0
    credit(2.0, lambda: decode(4.0))
    phases.become("optimizer")
    now[0] += 16.0
    assert phases.stop() == {"logging": 1.0, "credit": 4.0, "decode": 8.0, "optimizer": 16.0}


def test_the_ideal_has_the_same_rows(monkeypatch, tmp_path):
    """As many rows as were counted, in batches of the sizes of the settings; and no gradient is left."""
    overhead, measuring = load("overhead", monkeypatch), load("measuring", monkeypatch)
    sizes = {"rollout_batch_size": 5, "transition_batch_size": 3, "per_device_train_batch_size": 1}
    trainer = measuring.example_trainer("flow-grpo", tmp_path, max_steps=1, use_cpu=True, **sizes)
    denoiser = overhead.Denoiser(trainer)
    conditioning = trainer.policy.conditioning(["a red circle"])
    latents = torch.randn(2, *trainer.policy.latent_shape)
    with torch.no_grad():
        trainer.policy(latents, 0.5, conditioning * 2)
    trainer.policy(latents[:1], 0.5, conditioning)
    assert denoiser.rows == {False: 2, True: 1}
    batches = denoiser.prepare(Counter({False: 12, True: 4}))
    assert [(trained, len(inputs["hidden_states"])) for trained, inputs in batches] == [
        (False, 5),
        (False, 5),
        (False, 2),
        (True, 3),
        (True, 1),
    ]
    seen, backward = [], []

    def see(module, args, output):
        seen.append(output[0].requires_grad)
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: backward.append(len(gradient)))

    denoiser.module.register_forward_hook(see)
    denoiser.run(batches)
    assert seen == [False, False, False, True, True] and backward == [3, 1]
    assert denoiser.rows == {False: 2, True: 1} and all(p.grad is None for p in trainer.policy.parameters())


@pytest.mark.slow
def test_overhead(monkeypatch, tmp_path):
    overhead = load("overhead", monkeypatch)
    overhead.main(["--methods", "g2rpo", "--cycles", "2", "--prompts", "2", "--output", str(tmp_path / "overhead")])
    (run,) = results(tmp_path / "overhead")["runs"]
    # Two prompts of 12 samples on 4 steps, of which the first two branch; two updates of a rollout train these rows.
    assert run["rows"] == 2 * (2 + 12 * (3 + 2)) and 2 * 2 <= run["rows_trained"] <= 2 * 2 * 2
    assert run["updates_per_rollout"] == 2 and run["pairs"] == 1 and run["ratio"] > 1
    parts = run["phases"]
    assert all(parts[phase] > 0 for phase in overhead.PHASES)
    assert 0.5 < parts["denoiser"] + parts["backward"] < 2 and sum(parts.values()) == pytest.approx(
        run["ratio"], rel=0.5
    )


@pytest.mark.slow
def test_growth(monkeypatch, tmp_path, capsys):
    growth = load("growth", monkeypatch)
    words = ["--axes", "strides", "resolution", "processes", "--points", "2", "--repeats", "1"]
    assert growth.main([*words, "--output", str(tmp_path / "growth")]) == 0
    axes = results(tmp_path / "growth")["axes"]
    assert set(axes) == {"strides", "resolution", "processes"}
    for points in axes.values():
        assert len(points) == 2 and points[0]["total"] == pytest.approx(points[0]["predicted"])
        assert all(point["measured"] == point["closed_form"] for point in points)
    # Four times the patches, and the same text beside them.
    first, second = (point["operations"]["evaluations"] for point in axes["resolution"])
    assert 2 < second / first < 5
    axes["strides"][0]["measured"]["rows"] += 1
    assert len(growth.differing(axes)) == 1


@pytest.mark.slow
def test_rollout(monkeypatch, tmp_path):
    rollout = load("rollout", monkeypatch)
    words = ["--num_generations", "3", "--num_inference_steps", "4", "--prompts", "2", "--repeats", "1"]
    rollout.main([*words, "--output", str(tmp_path / "rollout")])
    record = results(tmp_path / "rollout")
    # Tails of 4, 3, 2 and 1 steps from the latents of a chain, whose own three stochastic steps begin with the same velocities.
    assert record["rollout"]["rows"] == {"shared": 3 * (4 + 3 + 2 + 1), "apart": 3 * (3 + 4 + 3 + 2 + 1)}
    assert record["training"]["rows"] == {"shared": 2, "apart": 6}
    assert record["rollout"]["largest_difference_of_leaves"] < 1e-3
    assert record["training"]["largest_relative_difference_of_gradients"] < 1e-12


@pytest.mark.slow
def test_switches(monkeypatch, tmp_path):
    switches = load("switches", monkeypatch)
    words = ["--switches", "prompts", "overlap", "checkpointing", "--prompts", "2", "--repeats", "1"]
    switches.main([*words, "--output", str(tmp_path / "switches")])
    record = results(tmp_path / "switches")["switches"]
    assert set(record) == {"prompts", "overlap", "checkpointing"}
    assert record["checkpointing"]["peak_mib"]["on"] < 0.7 * record["checkpointing"]["peak_mib"]["off"]
    assert all(min(result["seconds"].values()) > 0 for result in record.values())


def test_operations(monkeypatch):
    """Of attention, too, which torch does not count on a CPU: two products of 8 x 8 with 16 numbers in each of 3 heads."""
    measuring = load("measuring", monkeypatch)
    query, key, value = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        forward = measuring.operations(lambda: attend(query, key, value))
    assert forward == 2 * 3 * 2 * (2 * 8 * 8 * 16)
    both = measuring.operations(lambda: attend(query, key, value).sum().backward())
    assert both == forward + 2 * 3 * 5 * (
        2 * 8 * 8 * 16
    )  # flash attention's backward pass computes the first product again
    weight = torch.randn(4, 5)
    assert measuring.operations(lambda: torch.randn(3, 4) @ weight) == 2 * 3 * 4 * 5


@pytest.mark.slow
def test_prompt_embeddings(monkeypatch, tmp_path):
    benchmark = load("prompt_embeddings", monkeypatch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    benchmark.main(["--num_prompts", "20", "10", "--output", str(tmp_path / "prompt_embeddings")])
    ten, twenty = results(tmp_path / "prompt_embeddings")["figures"]
    assert (ten["prompts"], twenty["prompts"]) == (10, 20)
    # 16 KiB each, and what says what they are.
    assert 16 * 20 / 2**10 < twenty["disk_mib"] < 2 * 16 * 20 / 2**10
