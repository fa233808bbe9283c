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

"""Dry runs: what they say is what a run does, and they leave nothing behind."""

import gc
import io
import math
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from rich.console import Console
from transformers import TrainerCallback

import trl_flow
from trl_flow import cli
from trl_flow.report.plan import PlanPicture
from trl_flow.rewards import Reward
from trl_flow.rollout import dense_plan
from trl_flow.scripts import estimate as estimating
from trl_flow.scripts.arguments import TrainingScriptArguments
from trl_flow.scripts.dry_run import (
    Work,
    group_work,
    num_updates,
    print_plan,
    print_run,
    rollout_work,
    rollouts,
    run_work,
    time_text,
)
from trl_flow.scripts.estimate import Cost, estimate, measure, num_evaluations
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.training import make_training_parser, resolved_config
from trl_flow.trainer.saving import RUN_FILE


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Each run collects garbage at its end: what the imports left behind is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The report has tests of its own, and how exactly a part is timed is of no interest here."""
    monkeypatch.setattr(estimating, "SECONDS_OF_A_PART", 0.0)
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)


class FromTheFirstStep(TrainerCallback):
    """Forgets the test pictures that rewards are checked with before a run."""

    def __init__(self, counted: list):
        self.counted = counted

    def on_train_begin(self, args, state, control, **kwargs):
        self.counted.clear()


def make_trainer(command, directory, scored=None, num_eval_prompts=0, **settings):
    """A trainer of a tiny pipeline; the numbers of pictures that its reward is called with are added to `scored`."""
    scored = [] if scored is None else scored

    def counted_brightness(images, **kwargs):
        scored.append(len(images))
        return brightness(images=images, **kwargs)

    settings = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "num_inference_steps": 4,
        "num_eval_inference_steps": 3,
        "num_generations": 3,
        "guidance_scale": 1.0,
        "max_sequence_length": 2,
        "beta": 0.0,
        "ema_decay": 0,
        **settings,
    }
    method = METHODS[command]
    return getattr(trl_flow, method.trainer)(
        model=tiny_sd3(),
        reward_funcs=counted_brightness,
        args=getattr(trl_flow, method.config)(output_dir=str(directory), **settings),
        train_dataset=prompts(6),
        eval_dataset=prompts(num_eval_prompts) if num_eval_prompts else None,
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
        callbacks=[FromTheFirstStep(scored)],
    )


@pytest.mark.parametrize(
    "command, settings",
    [
        ("flow-grpo", {"beta": 0.04}),
        ("flow-grpo", {"steps_per_generation": 4, "max_steps": 2}),
        ("dense-grpo", {"tail_steps": 1, "num_iterations": 2, "max_steps": 2}),
        ("g2rpo", {"granularities": [1, 2], "update_per_step": True, "max_steps": 2}),
        ("mix-grpo", {"sde_window_size": 1, "sde_window_range": [0, 3], "max_steps": 2, "sde_window_interval": 1}),
        ("temp-flow-grpo", {"num_seeds": 2}),
        # The policy that samples lags behind from the second rollout on.
        ("diffusion-nft", {"timestep_fraction": 0.5, "steps_per_generation": 4, "max_steps": 4}),
        ("b2-diffu-rl", {"num_generations": 4, "sde_window_interval": 2, "max_steps": 4}),
        ("mix-grpo", {"flash_ratio": 0.4, "num_inference_steps": 8, "sde_window_size": 2, "sde_window_interval": 1}),
        ("turning-point-grpo", {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4, "beta": 0.04}),
    ],
)
def test_counts_are_those_of_a_run(command, settings, tmp_path):
    scored = []
    trainer = make_trainer(command, tmp_path, scored, **settings)
    told = run_work(trainer)
    assert trainer._step == 0
    decoded = []
    decode = trainer.start_decoding
    trainer.start_decoding = lambda latents, *args: decoded.append(len(latents)) or decode(latents, *args)
    trainer.train()
    assert trainer.state.global_step == num_updates(trainer) == settings.get("max_steps", 1)
    assert (told.scores, told.pictures) == (sum(scored), sum(decoded))
    assert told.rows == trainer._rows_trained
    assert told.evaluations + told.rows + told.references + told.replays == trainer._nfe


def test_counts_by_hand(tmp_path):
    """With T = 4, G = 3, and two groups in a rollout."""
    flow = group_work(trainer := make_trainer("flow-grpo", tmp_path, beta=0.04), trainer.rollout_steps())
    assert flow == Work(evaluations=12, pictures=3, scores=3, rows=9, references=9)
    (alike,) = rollouts(trainer)
    assert rollout_work(trainer, alike) == run_work(trainer) == flow.times(2)
    # Tails from all latents but the last two, which are those of the chain: T (T + 1) / 2 evaluations for each member.
    dense = group_work(trainer := make_trainer("dense-grpo", tmp_path), trainer.rollout_steps())
    assert (dense.evaluations, dense.pictures, dense.rows) == (3 * 10, 3 * 4, 9)
    # One row for all siblings.
    temp = group_work(trainer := make_trainer("temp-flow-grpo", tmp_path, num_seeds=2), trainer.rollout_steps())
    assert (temp.evaluations, temp.pictures, temp.rows) == (3 + 3 * (3 + 2 + 1), 9, 3)
    # A window at step 0, 1 and 2: what comes before it is shared.
    settings = {"sde_window_size": 1, "sde_window_range": [0, 3], "sde_window_interval": 1, "max_steps": 3}
    mix = run_work(make_trainer("mix-grpo", tmp_path, same_initial_noise=True, **settings))
    assert mix.evaluations == 2 * ((1 + 9) + (2 + 6) + (3 + 3))


@pytest.mark.parametrize(
    "command, settings",
    [
        ("flow-grpo", {"steps_per_generation": 4, "rollout_batch_size": 4, "transition_batch_size": 2}),
        ("dense-grpo", {"tail_steps": 1, "rollout_batch_size": 5, "num_iterations": 2}),
        ("g2rpo", {"granularities": [1, 2], "update_per_step": True, "transition_batch_size": 1}),
        ("mix-grpo", {"sde_window_size": 1, "sde_window_range": [0, 3], "sde_window_interval": 1}),
    ],
)
def test_estimate_counts_what_a_run_does(command, settings, tmp_path, monkeypatch):
    """Where each row of each call takes a second, and where each call does."""
    costs = {Cost(0.0, 1.0): None, Cost(1.0, 0.0): None}
    settings = {"max_steps": 2, "num_eval_prompts": 3, "eval_strategy": "steps", "eval_steps": 1, **settings}
    for cost in costs:
        trainer = make_trainer(command, tmp_path / "told", **settings)
        with monkeypatch.context() as patched:
            patched.setattr(estimating, "measure", lambda call, rows, device, cost=cost: cost)
            costs[cost] = estimate(trainer, rollouts(trainer), num_updates(trainer))
        work, updates = run_work(trainer), num_updates(trainer)
    by_row, by_call = costs.values()
    rollout_count, prompts_each = sum(alike.count for alike in rollouts(trainer)), trainer.args.steps_per_generation
    assert by_row.untimed == []
    # Six prompts to train on are all met; an evaluation has 3 steps, a decoder and a reward, and 3 prompts of its own.
    assert by_row.seconds["rollouts"] == work.evaluations + work.pictures + min(6, rollout_count * prompts_each)
    assert by_row.seconds["rewards"] == work.scores
    assert by_row.seconds["training"] == work.rows + work.replays + updates
    assert by_row.seconds["evaluations"] == by_row.evaluations * 3 * (3 + 1 + 1) + 3

    trainer = make_trainer(command, tmp_path / "run", **settings)
    calls, evaluations, _ = [], [], trainer.policy.image_size  # which decodes a picture, once
    forward, decode, evaluate = trainer.policy.forward, trainer.policy.start_decoding, trainer.evaluate
    monkeypatch.setattr(trainer.policy, "forward", lambda *args: calls.append(1) or forward(*args))

    def decoding(latents, batch_size=None, *args):
        calls.extend([1] * math.ceil(len(latents) / (batch_size or len(latents))))
        return decode(latents, batch_size, *args)

    def evaluating(*args, **kwargs):
        before = len(calls)
        metrics = evaluate(*args, **kwargs)
        evaluations.append(len(calls) - before)
        del calls[before:]
        return metrics

    monkeypatch.setattr(trainer.policy, "start_decoding", decoding)
    trainer.evaluate = evaluating
    trainer.train()
    assert by_call.seconds["rollouts"] + by_call.seconds["training"] == len(calls)
    # Its reward is called, too.
    assert by_call.seconds["evaluations"] == sum(evaluations) + len(evaluations)
    assert by_call.evaluations == len(evaluations)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"eval_strategy": "no"}, 2),
        ({"eval_strategy": "steps", "eval_steps": 3}, 4),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, 3),
        ({"eval_strategy": "steps", "eval_steps": 7, "eval_on_start": False}, 1),
        ({"eval_strategy": "epoch"}, 4),
    ],
)
def test_number_of_evaluations(settings, expected, tmp_path):
    """Of seven updates, of which three make an epoch; the last one is followed by an evaluation."""
    trainer = make_trainer("flow-grpo", tmp_path, num_eval_prompts=1, max_steps=7, **settings)
    assert num_evaluations(trainer, 7) == expected
    evaluations, evaluate = [], trainer.evaluate

    def noted(*args, **kwargs):
        evaluations.append(trainer.state.global_step)
        return evaluate(*args, **kwargs)

    trainer.evaluate = noted
    trainer.train()
    assert len(evaluations) == expected, evaluations


def test_evaluations_with_a_guidance_of_their_own_are_timed(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "guidance_scale": 1.0, "eval_guidance_scale": 3.0}
    trainer = make_trainer("flow-grpo", tmp_path, num_eval_prompts=2, max_steps=1, **settings)
    guidance, forward = [], trainer.policy.forward
    trainer.policy.forward = lambda *args: (guidance.append(trainer.policy.guidance_scale), forward(*args))[1]
    assert estimate(trainer, rollouts(trainer), 1).seconds["evaluations"] > 0
    assert {*guidance} == {1.0, 3.0}


def test_line_through_two_measurements(monkeypatch):
    clock, sizes = [0.0], []
    monkeypatch.setattr(estimating, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(n):
        sizes.append(n)
        clock[0] += 2.0 + 3.0 * n

    assert measure(call, 4, torch.device("cpu")) == Cost(2.0, 3.0)
    assert Cost(2.0, 3.0).of(5, batch_size=2, times=10) == 10 * (3 * 2.0 + 5 * 3.0)
    # A full batch is not waited for if it would take long.
    sizes.clear()
    assert measure(call, 400, torch.device("cpu")) == Cost(0.0, 5.0)
    assert set(sizes) == {1}


def test_rewards_that_load_or_wait_are_not_timed(tmp_path, monkeypatch):
    class Loads(Reward):
        def prepare(self, device):
            raise AssertionError

    async def waits(images, **kwargs):
        raise AssertionError

    trainer = make_trainer("flow-grpo", tmp_path)
    trainer.reward_funcs += [Loads(), waits]
    trainer.reward_names += ["loads", "waits"]
    weights = [parameter.clone() for parameter in trainer._trainable]
    text = time_text(trainer, 1)
    assert text.startswith("about ") and "which were not timed: loads, waits; not counted: loading" in text
    assert all(torch.equal(now, then) for now, then in zip(trainer._trainable, weights, strict=True))

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer.policy, "forward", out_of_memory)
    assert "too little memory for rollout_batch_size=32" in time_text(trainer, 1)


def test_what_is_printed_is_what_is_counted(tmp_path, capsys):
    trainer = make_trainer("dense-grpo", tmp_path / "run", max_steps=5)
    print_run(trainer, TrainingScriptArguments(), "there", Console(width=100))
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Velocity evaluations (NFE) 30 60 300" in rows
    assert "Pictures decoded 12 24 120" in rows
    assert "Training rows, at most 9 18 90" in rows
    assert "Rollout 2 prompts; 1 update" in rows and "Run 5 updates from 5 rollouts" in rows
    assert any(row.endswith("×3: 3 pictures") for row in rows) and sum("└" in row for row in rows) == 3
    assert any(row.startswith("Memory about") for row in rows)
    assert any(row.startswith("Time about") for row in rows)
    # A notebook shows the same tree.
    drawing = str(trainer.plan()).splitlines()
    assert [row for row in drawing if "□  " in row][0].split("  ")[-1] == "×3: 3 pictures"
    assert trainer.plan()._repr_svg_().startswith("<svg")


def dry_run(command, directory, *args):
    config = str(EXAMPLES / "shapes" / f"{command}.yaml")
    return cli.main([command, "--config", config, "--output_dir", str(directory / "run"), "--dry_run", *args])


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The weights of this reward are not here, and it needs none for being named.
    args = ("--eval_reward_funcs", "pickscore", "--push_to_hub", "--num_eval_prompts", "8", "--use_cpu")
    assert dry_run("g2rpo", tmp_path, *args) == 0
    out = capsys.readouterr().out
    assert (
        "Velocity evaluations (NFE)" in out and "pickscore" in out and str(tmp_path / "run") in out.replace("\n", "")
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_model_the_plan_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("--model_name_or_path", str(tmp_path / "nowhere"), "--dataset_name", "shapes", "--use_cpu")
    assert dry_run("mix-grpo", tmp_path, *args) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "pictures" in captured.out and "≈" in captured.out and "sigma" not in captured.out
    assert "nowhere" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_for_another_machine(tmp_path, capsys, monkeypatch):
    """A reward's GPU and its server need not be here."""
    monkeypatch.chdir(tmp_path)
    args = ("--num_eval_prompts", "8", "--use_cpu", "--reward_funcs", "shapes")
    assert dry_run("g2rpo", tmp_path, *args, '{"pickscore": {"device": "cuda:99"}}') == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Velocity evaluations (NFE)" in out
    assert (
        "Warning here the run would end with: Reward 'pickscore': device='cuda:99': this process sees no such" in out
    )

    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert dry_run("g2rpo", tmp_path, *args, url) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and f"error: Reward server {url} has not answered for 1 s" in captured.err
    assert "pictures" in captured.out and "≈" in captured.out
    assert list(tmp_path.iterdir()) == []


def test_settings_that_make_no_plan(tmp_path, capsys):
    args = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--num_inference_steps", "1"]
    assert cli.main(["flow-grpo", "--dry_run", *args]) == 1
    captured = capsys.readouterr()
    assert "pictures" not in captured.out and "num_inference_steps=1" in captured.err


def test_terminal_that_knows_only_ascii():
    console = Console(width=60, file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print_plan(PlanPicture(dense_plan(3, 2, [0])), console)
    console.file.seek(0)
    assert console.file.read().splitlines()[1:3] == [
        "         o~~~~~~~o-------o-------x  x2: 2 pictures",
        "         +-------o-------o-------x  2 pictures",
    ]


def test_used_directory_is_refused_as_by_a_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_FILE).write_text('{"method": "flow-grpo"}')
    assert dry_run("flow-grpo", tmp_path, "--use_cpu") == 1
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_is_no_part_of_a_run(tmp_path):
    parsed = make_training_parser("flow-grpo").parse_args_and_config(
        ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--dry_run"]
    )
    assert parsed[0].dry_run
    assert "dry_run" not in resolved_config(*parsed)
