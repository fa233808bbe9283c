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

"""Runs whose trained reward rises while a held-out one falls: warned of, stopped, rolled back, resumed."""

import json
from pathlib import Path

import pytest
import torch
from pipelines import brightness, prompts
from tiny import tiny_pipeline
from transformers import TrainerCallback

from trl_flow import RewardHackingCallback
from trl_flow.hub import load_policy


# The held-out reward of each update: it falls at the third, and not beyond its noise at the second.
COURSE = (0.0, 1.0, 0.95, -3.0, -4.0, -5.0)


def rising(images, trainer_state, **kwargs):
    """Within a group what is trained is the brightness."""
    return [value + 10.0 * trainer_state.global_step for value in brightness(images)]


def rising_videos(videos, trainer_state, **kwargs):
    return rising([video[-1] for video in videos], trainer_state)


def watched(prompts, trainer_state, **kwargs):
    """Prompts differ by far more than updates; an update's change differs by 0.1 between prompts."""
    step = trainer_state.global_step
    return [COURSE[step] + 50.0 * len(prompt) + 0.1 * ((number + step) % 2) for number, prompt in enumerate(prompts)]


def watched_videos(videos, prompts, trainer_state, **kwargs):
    return watched(prompts, trainer_state)


@pytest.fixture
def make_run(make_trainer):
    """`make_run(callback, ...)`: an evaluation after each of up to five updates."""

    def make(callback, folder="run", **settings):
        return make_trainer(
            **{
                "output_dir": str(make_trainer.directory / folder),
                "callbacks": [callback],
                "reward_funcs": rising,
                "eval_reward_funcs": [watched],
                "eval_dataset": prompts(6),
                "eval_strategy": "steps",
                "eval_steps": 1,
                "eval_on_start": True,
                "max_steps": 5,
                **settings,
            }
        )

    make.directory = make_trainer.directory
    return make


class Recorder(TrainerCallback):
    """The weights that each evaluation has seen, saved by the trainer."""

    def __init__(self, directory):
        self.directory, self.trainer = directory, None

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step not in self.saved():
            with self.trainer.averaged_weights():
                self.trainer._save(str(self.directory / str(state.global_step)))

    def saved(self) -> dict[int, bytes]:
        return {int(path.name): adapter(path) for path in self.directory.glob("*")}


def adapter(folder) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def kept(run) -> list[str]:
    return sorted(path.name for path in (run / "rollback").iterdir())


def signals(trainer) -> dict[int, float]:
    return {e["step"]: e["eval_hacking/watched"] for e in trainer.state.log_history if "eval_hacking/watched" in e}


def test_a_warning_changes_nothing(make_run):
    plain = make_run(TrainerCallback(), "plain", max_steps=4)
    plain.train()
    trainer = make_run(RewardHackingCallback(), max_steps=4)
    trainer.train()
    assert signals(trainer) == {1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0}
    assert adapter(make_run.directory / "run") == adapter(make_run.directory / "plain")
    assert not (make_run.directory / "run" / "rollback").exists()


def test_stop(make_run):
    trainer = make_run(RewardHackingCallback(action="stop"))
    trainer.train()
    assert trainer.state.global_step == 3
    assert signals(trainer) == {1: 0.0, 2: 0.0, 3: 1.0}


@pytest.mark.parametrize("ema_decay", [0, 0.5])
def test_rollback_leaves_the_best_evaluation_bit_by_bit(make_run, ema_decay):
    recorder = Recorder(make_run.directory / "seen")
    trainer = make_run(RewardHackingCallback(action="rollback"), ema_decay=ema_decay)
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.train()
    run = make_run.directory / "run"
    seen = recorder.saved()
    assert sorted(seen) == [0, 1, 2, 3] and len(set(seen.values())) == 4
    assert adapter(run) == adapter(run / "rollback" / "step_000002") == seen[2]
    assert kept(run) == ["step_000002"]

    # The policy in memory, its average, and what is said of them.
    with trainer.averaged_weights():
        average = [parameter.detach().clone() for parameter in trainer._trainable]
    assert all(torch.equal(p.detach(), a) for p, a in zip(trainer._trainable, average, strict=True))
    assert trainer.state.global_step == 2
    last = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in last] == [0, 1, 2, 3, 2]
    for key in ("eval_reward", "eval_rewards/watched/mean"):
        assert last[-1][key] == last[2][key], "the evaluation of the restored weights is that of the best"
    assert {"step": 3, "eval_rolled_back_to": 2} in trainer.state.log_history
    assert "Updates: 2" in (run / "README.md").read_text()
    assert not trainer.args.load_best_model_at_end
    # One alarm, which the evaluation after it doesn't repeat.
    assert signals(trainer) == {1: 0.0, 2: 0.0, 3: 1.0}


@pytest.mark.parametrize("ema_decay", [0, 0.5])
@pytest.mark.parametrize("kind", ["two denoisers", "all weights"])
def test_rollback_of_whatever_is_trained(make_run, kind, ema_decay):
    """All files of the best evaluation: of both adapters, or of a complete denoiser."""
    video = {"height": 16, "width": 16, "num_frames": 5, "sde_steps": [0, 1, 2]}
    settings, files = {
        "two denoisers": (
            {
                "model": tiny_pipeline("WanPipeline/2.2"),
                "reward_funcs": rising_videos,
                "eval_reward_funcs": [watched_videos],
                "max_sequence_length": 16,
                **video,
            },
            ["adapter_model.safetensors", "transformer_2/adapter_model.safetensors"],
        ),
        "all weights": (
            {"full_finetuning": True, "peft_config": None, "learning_rate": 1e-3},
            ["transformer/diffusion_pytorch_model.safetensors"],
        ),
    }[kind]
    trainer = make_run(RewardHackingCallback(action="rollback"), ema_decay=ema_decay, **settings)
    trainer.train()
    run = make_run.directory / "run"
    assert trainer.state.global_step == 2
    best = run / "rollback" / "step_000002"
    for file in files:
        assert (run / file).read_bytes() == (best / file).read_bytes()
    # What is in memory is that, too.
    policy = {name: p.detach().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if name in policy:
                parameter.zero_()
    load_policy(trainer.policy, run)
    for name, parameter in trainer.policy.named_parameters():
        if name in policy:
            torch.testing.assert_close(parameter, policy[name], rtol=0, atol=1e-7)


def test_rollback_to_the_base_model(make_run):
    def falling(trainer_state, images, **kwargs):
        return [-float(trainer_state.global_step)] * len(images)

    trainer = make_run(RewardHackingCallback(action="rollback"), eval_reward_funcs=[falling], ema_decay=0.5)
    initial = [parameter.detach().clone() for parameter in trainer._trainable]
    trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p.detach(), q) for p, q in zip(trainer._trainable, initial, strict=True))
    assert adapter(make_run.directory / "run") == adapter(make_run.directory / "run" / "rollback" / "step_000000")


def test_without_an_alarm_the_last_weights_stay(make_run):
    trainer = make_run(RewardHackingCallback(action="rollback"), max_steps=2)
    recorder = Recorder(make_run.directory / "seen")
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.global_step == 2
    assert adapter(make_run.directory / "run") == recorder.saved()[2]


def test_the_last_update_is_judged_before_training_ends(make_run):
    """Evaluated after 0, 2 and, because another callback makes it the last, 3."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callbacks = [Stop(), RewardHackingCallback(action="rollback")]
    trainer = make_run(None, callbacks=callbacks, eval_steps=2)
    trainer.train()
    assert signals(trainer) == {2: 0.0, 3: 1.0}
    assert trainer.state.global_step == 2
    assert adapter(make_run.directory / "run") == adapter(make_run.directory / "run" / "rollback" / "step_000002")


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_run_is_rolled_back_all_the_same(make_run, restore, elsewhere):
    """Killed before the third update, at which it would have been rolled back; resumed from an earlier checkpoint."""
    settings = {
        "ema_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": restore,
    }
    make_run(RewardHackingCallback(action="rollback"), "straight", **settings).train()

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    killed = make_run(RewardHackingCallback(action="rollback"), **settings)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    run = make_run.directory / "run"
    # Two is the best; checkpoint 1 goes on with 1.
    assert kept(run) == ["step_000001", "step_000002"]

    result = make_run.directory / "elsewhere" if elsewhere else run
    resumed = make_run(RewardHackingCallback(action="rollback"), result.name, **settings)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert signals(resumed) == {1: 0.0, 2: 0.0, 3: 1.0}
    assert adapter(result) == adapter(make_run.directory / "straight")


def test_a_resumed_run_that_was_stopped_is_still_rolled_back(make_run):
    """From the checkpoint that was made at the alarm: only the checkpoint and what it needs is left."""
    settings = {"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 1}
    make_run(RewardHackingCallback(action="rollback"), **settings).train()
    run = make_run.directory / "run"
    expected = adapter(run)
    (run / "adapter_model.safetensors").unlink()
    resumed = make_run(RewardHackingCallback(action="rollback"), **settings)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert resumed.state.global_step == 2
    assert signals(resumed) == {1: 0.0, 2: 0.0, 3: 1.0}, "nothing is judged again"
    assert adapter(run) == expected


# ---- Refusals ----


def test_runs_without_held_out_rewards_are_refused(make_run):
    with pytest.raises(ValueError, match="needs eval_reward_funcs.*none beside rising"):
        make_run(RewardHackingCallback(), eval_reward_funcs=None).train()
    make_run(RewardHackingCallback(), max_steps=1).train()  # in the same directory


def test_runs_without_evaluations_are_refused(make_run):
    with pytest.raises(ValueError, match="needs evaluations, but eval_strategy='no'"):
        make_run(RewardHackingCallback(), eval_strategy="no")


def test_a_rollback_without_weights_is_refused(make_run):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_run(RewardHackingCallback(action="warn"), **settings).train()
    resumed = make_run(RewardHackingCallback(action="rollback"), **settings)
    with pytest.raises(ValueError, match="weights of the best evaluation, of update 1, are not in"):
        resumed.train(resume_from_checkpoint=str(make_run.directory / "run" / "checkpoint-1"))


def test_state_is_in_the_checkpoint(make_run):
    make_run(RewardHackingCallback(patience=2), max_steps=1, save_strategy="steps", save_steps=1).train()
    state = json.loads((make_run.directory / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["RewardHackingCallback"]
    assert saved["args"] == {"action": "warn", "confidence": 1.96, "patience": 2}
    assert saved["attributes"]["best"]["step"] == 1
