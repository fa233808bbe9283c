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

"""When reward hacking is signalled, with scores that are written down here."""

import json
import logging
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from trl_flow import RewardHackingCallback


class Run:
    """A run of which there is nothing but its evaluations."""

    def __init__(self, directory, held_out=("clean",), **settings):
        self.directory = directory
        self.args = SimpleNamespace(output_dir=str(directory), eval_strategy="steps")
        self.state = TrainerState(is_world_process_zero=True)
        self.control = TrainerControl()
        self.callback = RewardHackingCallback(**settings)
        (directory / "samples").mkdir(parents=True, exist_ok=True)
        run = {"rewards": ["trained"], "eval_rewards": list(held_out), "base_model": ""}
        (directory / "run.json").write_text(json.dumps(run))

    def begin(self):
        self.callback.on_train_begin(self.args, self.state, self.control)
        return self

    def evaluate(self, step, reward, with_file=True, **scores) -> dict:
        """Scores by prompt of each held-out reward. Returns what the callback logs."""
        self.state.global_step = step
        metrics = {"eval_reward": reward, "eval_num_samples": 4}
        for name, values in scores.items():
            known = [value for value in values if value is not None]
            mean = sum(known) / len(known)
            metrics[f"eval_rewards/{name}/mean"] = mean
            metrics[f"eval_rewards/{name}/std"] = (sum((v - mean) ** 2 for v in known) / (len(known) - 1)) ** 0.5
            if len(known) < len(values):
                metrics[f"eval_rewards/{name}/missing"] = len(values) - len(known)
        if with_file:
            (self.directory / "samples" / f"step_{step:06d}.json").write_text(json.dumps({"scores": scores}))
        self.state.log_history.append({**metrics, "step": step})
        self.callback.on_evaluate(self.args, self.state, self.control, metrics=metrics)
        logged = {
            key.removeprefix("eval_hacking/"): v for key, v in metrics.items() if key.startswith("eval_hacking/")
        }
        entry = self.state.log_history[-1]
        assert logged == {name: entry[f"eval_hacking/{name}"] for name in logged}
        return logged


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "Reward hacking" in record.getMessage()]


# Prompts differ by far more than an update changes them: only pairs tell.
PROMPTS = [0.0, 10.0, 20.0, 30.0]


def moved(*changes):
    return [score + change for score, change in zip(PROMPTS, changes, strict=True)]


# Differences -0.2, -0.4, -0.2, -0.4: mean -0.3, standard deviation 0.1155, half interval 1.96 * 0.1155 / 2 = 0.1132.
FALLEN = moved(-0.2, -0.4, -0.2, -0.4)
# Mean -0.05, standard deviation 0.3416, half interval 0.335.
NOISY = moved(-0.4, 0.4, -0.2, 0.0)


def test_a_paired_fall_is_signalled_once(tmp_path, warnings):
    run = Run(tmp_path).begin()
    assert run.evaluate(0, 1.0, clean=PROMPTS) == {}
    assert run.evaluate(1, 1.2, clean=FALLEN) == {"clean": 1.0}
    assert warnings() == [
        "Reward hacking at update 1: the trained reward is 0.2 higher than at update 0, the held-out reward 'clean' 0.3 "
        "± 0.1132 lower (± 1.96 standard errors). Training goes on (action='warn')."
    ]
    assert run.evaluate(2, 1.3, clean=FALLEN) == {"clean": 1.0}
    assert len(warnings()) == 1, "the same occurrence"
    assert run.evaluate(3, 1.3, clean=PROMPTS) == {"clean": 0.0}
    assert run.evaluate(4, 1.4, clean=FALLEN) == {"clean": 1.0}
    assert len(warnings()) == 2, "another one"
    assert not run.control.should_training_stop


def test_noise_is_not_signalled(tmp_path, warnings):
    run = Run(tmp_path, action="stop").begin()
    run.evaluate(0, 1.0, clean=PROMPTS)
    assert run.evaluate(1, 1.2, clean=NOISY) == {"clean": 0.0}
    assert not warnings() and not run.control.should_training_stop


def test_the_interval_is_what_confidence_says(tmp_path):
    """A fall of 0.3 with a standard error of 0.0577 is one of 5.196 standard errors."""
    for confidence, expected in ((5.1, 1.0), (5.3, 0.0)):
        run = Run(tmp_path / str(confidence), confidence=confidence).begin()
        run.evaluate(0, 1.0, clean=PROMPTS)
        assert run.evaluate(1, 1.2, clean=FALLEN) == {"clean": expected}


def test_a_fall_without_a_rise_is_no_hacking(tmp_path):
    run = Run(tmp_path, action="stop").begin()
    run.evaluate(0, 1.0, clean=PROMPTS)
    assert run.evaluate(1, 0.9, clean=FALLEN) == {"clean": 0.0}
    assert run.callback.best["step"] == 0


def test_without_the_files_scores_are_not_paired(tmp_path):
    run = Run(tmp_path).begin()
    run.evaluate(0, 1.0, with_file=False, clean=PROMPTS)
    assert run.evaluate(1, 1.2, with_file=False, clean=FALLEN) == {"clean": 0.0}, "the prompts differ by more"
    # Two means with standard error 12.91 / 2: their difference has one of 9.129, and 1.96 of these are 17.89.
    assert run.evaluate(2, 1.2, with_file=False, clean=moved(-17.8, -17.8, -17.8, -17.8)) == {"clean": 0.0}
    assert run.evaluate(3, 1.2, with_file=False, clean=moved(-18, -18, -18, -18)) == {"clean": 1.0}


def test_missing_scores_count_for_nothing(tmp_path):
    run = Run(tmp_path).begin()
    run.evaluate(0, 1.0, clean=PROMPTS)
    assert run.evaluate(1, 1.2, clean=[None, *FALLEN[1:]]) == {"clean": 1.0}
    # Standard deviations 12.91 of 4 and 10 of 3: standard error 8.660, and 1.96 of these are 16.97.
    for mean, expected in ((-1.9, 0.0), (-2.1, 1.0)):
        run = Run(tmp_path / str(mean)).begin()
        run.evaluate(0, 1.0, with_file=False, clean=PROMPTS)
        scores = [None, mean - 10, mean, mean + 10]
        assert run.evaluate(1, 1.2, with_file=False, clean=scores) == {"clean": expected}


def test_a_fall_since_the_best_evaluation(tmp_path, warnings):
    """Still better than the base model."""
    run = Run(tmp_path).begin()
    run.evaluate(0, 1.0, clean=PROMPTS)
    assert run.evaluate(1, 1.2, clean=moved(1.1, 0.9, 1.0, 1.0)) == {"clean": 0.0}
    assert run.evaluate(2, 1.3, clean=moved(0.6, 0.4, 0.5, 0.5)) == {"clean": 1.0}
    assert "higher than at update 1" in warnings()[0]
    assert run.callback.best["step"] == 1


def test_the_best_evaluation(tmp_path):
    """The highest trained reward where nothing had fallen; rewards may be 0 and below."""
    run = Run(tmp_path, held_out=("clean", "other")).begin()
    steps = []
    for step, (reward, clean, other) in enumerate(
        [
            (-1.0, PROMPTS, PROMPTS),
            (0.0, NOISY, PROMPTS),
            (-0.5, PROMPTS, PROMPTS),
            (0.2, PROMPTS, FALLEN),
            (float("nan"), PROMPTS, PROMPTS),
            (0.1, PROMPTS, PROMPTS),
        ]
    ):
        logged = run.evaluate(step, reward, clean=clean, other=other)
        steps.append(run.callback.best["step"])
        if step == 3:
            assert logged == {"clean": 0.0, "other": 1.0}
    assert steps == [0, 1, 1, 1, 1, 5]


def test_patience_counts_evaluations_in_a_row(tmp_path, warnings):
    run = Run(tmp_path, action="stop", patience=2).begin()
    run.evaluate(0, 1.0, clean=PROMPTS)
    assert run.evaluate(1, 1.2, clean=FALLEN) == {"clean": 0.0}
    assert run.evaluate(2, 1.2, clean=PROMPTS) == {"clean": 0.0}
    assert run.evaluate(3, 1.3, clean=FALLEN) == {"clean": 0.0}
    assert not run.control.should_training_stop and not warnings()
    assert run.evaluate(4, 1.3, clean=FALLEN) == {"clean": 1.0}
    assert run.control.should_training_stop and len(warnings()) == 1


def test_a_resumed_run_goes_on_with_what_it_knew(tmp_path, warnings):
    first = Run(tmp_path / "first", patience=2).begin()
    first.evaluate(0, 1.0, clean=PROMPTS)
    first.evaluate(1, 1.2, clean=FALLEN)
    state = json.loads(json.dumps(first.callback.state()))

    # In another directory, as after `train(resume_from_checkpoint="first/checkpoint-1")`.
    resumed = Run(tmp_path / "second", patience=2)
    resumed.state = TrainerState(
        is_world_process_zero=True, global_step=1, stateful_callbacks={"RewardHackingCallback": state}
    )
    resumed.begin()
    assert resumed.callback.state() == state
    assert resumed.evaluate(2, 1.2, clean=FALLEN) == {"clean": 1.0}, "the second in a row, paired with the first run's"
    assert len(warnings()) == 1

    # As transformers does it with restore_callback_states_from_checkpoint.
    assert RewardHackingCallback.from_state(state).state() == state


def test_evaluations_of_others_are_left_alone(tmp_path):
    run = Run(tmp_path)
    assert run.evaluate(0, 9.0, clean=moved(9, 9, 9, 9)) == {}
    run.begin()
    assert run.callback.base is None, "before training"
    run.evaluate(0, 1.0, clean=PROMPTS)
    run.callback.on_evaluate(run.args, run.state, run.control, metrics={"test_reward": 3.0})
    assert run.evaluate(0, 5.0, clean=FALLEN) == {}, "the same update again"
    assert run.callback.best["reward"] == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"action": "panic"}, "action='panic': expected one of 'warn', 'stop', 'rollback'"),
        ({"confidence": 0.0}, "confidence=0.0: expected a positive number"),
        ({"confidence": float("nan")}, "confidence=nan: expected a positive number"),
        ({"patience": 0}, "patience=0: expected a number of evaluations, 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardHackingCallback(**settings)


def test_other_trainers_are_refused(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="needs a trainer of trl_flow"):
        run.begin()
