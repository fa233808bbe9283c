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

import io
import math
import re

import pytest
import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from trl_flow.report import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=False)


def play(line: ProgressLine, args: TrainingArguments, is_main: bool = True) -> str:
    """A run of two updates with an evaluation before and after."""
    state, control = TrainerState(max_steps=2, is_world_process_zero=is_main), TrainerControl()
    line.on_train_begin(args, state, control)
    for step in (0, 1, 2):
        state.global_step = step
        if step:
            line.on_step_end(args, state, control)
            # The second update trains on the pictures of the first.
            speed = {"images_per_second": 12.34} if step == 1 else {}
            line.on_log(args, state, control, logs={"loss": 0.1, "reward": 0.25 * step, "nfe": 700 * step, **speed})
        if step != 1:
            line.on_prediction_step(args, state, control)
            line.on_log(args, state, control, logs={"eval_rewards/strict/mean": 0.5 + 0.1 * step, "eval_reward": 1.0})
            line.on_evaluate(args, state, control)
    line.on_log(args, state, control, logs={"train_runtime": 3.0, "train_loss": 0.0})
    line.on_train_end(args, state, control)
    return line.stream.getvalue()


class TestProgressLine:
    def test_plain_lines_without_a_terminal(self, args):
        lines = play(ProgressLine(io.StringIO()), args).splitlines()
        assert len(lines) == 4
        assert lines[0] == "step 0/2 | held-out strict 0.500"
        assert re.fullmatch(r"step 1/2 \| reward 0.250 \| 12.3 images/s \| \d+:\d+ left \| strict 0.500", lines[1])
        assert lines[2].startswith("step 2/2 | reward 0.500 | ")
        assert lines[3] == "step 2/2 | held-out strict 0.500→0.700"

    def test_one_live_line_on_a_terminal(self, args):
        text = play(ProgressLine(Terminal()), args)
        assert text.count("\n") == 1, "one line, ended once"
        last = text.rstrip("\n").split("\r")[-1]
        assert "2/2" in last
        assert "reward 0.500 | 12.3 images/s | " in last and last.endswith(" left | strict 0.500→0.700")
        assert "evaluating, batch 1" in text
        assert "evaluating" not in last

    def test_a_narrow_terminal_cuts_scores_off_before_speed_and_time(self, args):
        line, state = ProgressLine(Terminal()), TrainerState(max_steps=1000, global_step=1)
        logs = {f"eval_rewards/a_reward_with_a_long_name_{number}/mean": 0.5 for number in range(4)}
        line.on_train_begin(args, TrainerState(max_steps=1000), None)
        line.bar.dynamic_ncols, line.bar.ncols = None, 80
        line.on_log(args, state, None, logs=logs)
        line.on_log(args, state, None, logs={"reward": 0.5, "images_per_second": 12.0})
        shown = line.stream.getvalue().split("\r")[-1]
        assert len(shown) <= 80 and re.search(r"reward 0.500 \| 12 images/s \| [\d:]+ left \| a_re", shown)

    def test_other_processes_say_nothing(self, args):
        assert play(ProgressLine(io.StringIO()), args, is_main=False) == ""

    def test_values_that_are_not_numbers(self, args):
        line = ProgressLine(io.StringIO())
        line.on_log(args, TrainerState(), None, logs={"reward": float("nan"), "eval_rewards/a/mean": None})
        line.on_log(args, TrainerState(), None, logs={"reward": 0.5, "images_per_second": math.nan})
        assert line.stream.getvalue().splitlines()[-1] == "reward 0.500"

    @pytest.mark.parametrize(
        "strategy, seconds",
        [
            # 20 updates are left, of 2 seconds each, and evaluations of 100 seconds.
            ("steps", [40, 340, 240]),
            ("no", [40, 140, 140]),
            ("epoch", [40, 340, 240]),
        ],
    )
    def test_remaining_time_counts_evaluations_apart(self, tmp_path, monkeypatch, strategy, seconds):
        """After 10 of 30 updates: without evaluations, before that of this update, and after it."""
        clock = [1000.0]
        monkeypatch.setattr("trl_flow.report.progress.time.monotonic", lambda: clock[0])
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", eval_strategy=strategy, eval_steps=10)
        state, logs = TrainerState(max_steps=30, eval_steps=10, num_train_epochs=3), {"reward": 0.5}

        def left(line: ProgressLine) -> str:
            line.on_log(args, state, None, logs=logs)
            return next(
                text for text in line.stream.getvalue().splitlines()[-1].split(" | ") if text.endswith(" left")
            )

        texts = []
        for evaluates in (False, True):
            line = ProgressLine(io.StringIO())
            state.global_step, state.epoch, clock[0] = 0, 0.0, 1000.0
            line.on_train_begin(args, state, None)
            if evaluates:
                clock[0] += 100
                line.on_log(args, state, None, logs={"eval_reward": 0.1, "eval_runtime": 100.0})
            clock[0] += 20
            state.global_step, state.epoch = 10, 1.0
            texts.append(left(line))
        if strategy != "no":
            clock[0] += 100
            line.on_log(args, state, None, logs={"eval_reward": 0.1, "eval_runtime": 100.0})
        texts.append(left(line))
        assert texts == [f"{tqdm.format_interval(second)} left" for second in seconds]

    def test_remaining_evaluations_when_the_last_update_is_no_multiple(self, args):
        args.eval_strategy = "steps"
        line = ProgressLine(io.StringIO())
        line._last_evaluation = (20, 1.0)
        state = TrainerState(global_step=25, max_steps=31, eval_steps=10)
        assert line._evaluations_left(args, state) == 2

    def test_in_a_trainer(self, tmp_path):
        """In place of transformers' own callbacks, with the order of events that a real trainer has."""
        line = ProgressLine(io.StringIO())

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, x):
                return {"loss": (self.weight - x).square().mean()}

        class RewardTrainer(Trainer):
            def log(self, logs, start_time=None):
                if "loss" in logs:
                    logs["reward"] = 0.5
                super().log(logs, start_time)

        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no"
        )
        trainer = RewardTrainer(Model(), args, train_dataset=[{"x": torch.ones(1)}] * 4, callbacks=[line])
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        steps = [text.split(" | ")[:2] for text in line.stream.getvalue().splitlines()]
        assert steps == [["step 1/2", "reward 0.500"], ["step 2/2", "reward 0.500"]]
