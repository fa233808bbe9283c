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

"""One line that tells how a run is going."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

from tqdm import tqdm
from transformers import TrainerCallback

from .history import finite


class ProgressLine(TrainerCallback):
    """
    Shows step, reward, held-out scores (first and newest), speed and remaining time on one live line.

    Where there is no terminal (a log file, a notebook, a CI job) it writes one plain line per log instead. Takes the
    place of transformers' `ProgressCallback` and `PrinterCallback`.

    Args:
        stream (`TextIO`, *optional*):
            Where to write. Defaults to `sys.stderr`.

    Example:

    ```python
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine())
    ```
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream
        self.bar = None
        self.reward = None
        self.first_scores: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.speed = ""
        self.evaluated_batches = 0
        self._start_time = None
        self._start_step = 0
        self._last_evaluation: tuple[int, float] | None = None
        self._seconds_evaluating = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_time, self._start_step = time.monotonic(), state.global_step
        self._seconds_evaluating = 0.0
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        stream = self.stream or sys.stderr
        if stream.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar:10} {elapsed}{postfix}",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated_batches += 1
        if self.bar is not None:
            self.bar.set_postfix_str(_joined(f"evaluating, batch {self.evaluated_batches}", self._text()))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated_batches = 0
        if self.bar is not None:
            self.bar.set_postfix_str(self._text(self._remaining(args, state)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        is_evaluation = any(key.startswith("eval_") for key in logs)
        if not is_evaluation and "reward" not in logs:
            return  # the end-of-training summary
        self._read(logs)
        if finite(logs.get("eval_runtime")):
            self._last_evaluation = (state.global_step, logs["eval_runtime"])
            self._seconds_evaluating += logs["eval_runtime"]
        text = self._text(self._remaining(args, state))
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        step = f"step {state.global_step}/{state.max_steps}" if state.max_steps else ""
        stream = self.stream or sys.stderr
        stream.write(_joined(step, f"held-out {self._score_text()}" if is_evaluation else text) + "\n")
        stream.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _read(self, logs: dict) -> None:
        if finite(logs.get("reward")):
            self.reward = logs["reward"]
        names = [key for key in logs if key.startswith("eval_rewards/") and key.endswith("/mean")]
        scores = {key.removeprefix("eval_rewards/").removesuffix("/mean"): logs[key] for key in names}
        if not scores and "eval_reward" in logs:
            scores = {"held-out": logs["eval_reward"]}
        for name, score in scores.items():
            if finite(score):
                self.scores[name] = score
                self.first_scores.setdefault(name, score)
        # An update that trains on the pictures of an earlier one has made none.
        if finite(logs.get("images_per_second")):
            self.speed = f"{logs['images_per_second']:.3g} images/s"

    def _text(self, remaining: str = "") -> str:
        reward = f"reward {self.reward:.3f}" if self.reward is not None else ""
        # A narrow terminal cuts the end off: the scores, of which there may be many.
        return _joined(reward, self.speed, remaining, self._score_text())

    def _score_text(self) -> str:
        texts = []
        for name, score in self.scores.items():
            first = self.first_scores[name]
            texts.append(f"{name} {first:.3f}→{score:.3f}" if score != first else f"{name} {score:.3f}")
        return ", ".join(texts)

    def _remaining(self, args, state) -> str:
        done = state.global_step - self._start_step
        if self._start_time is None or done <= 0 or not state.max_steps:
            return ""
        # Apart: an evaluation is no part of an update, and may take as long as many.
        training = time.monotonic() - self._start_time - self._seconds_evaluating
        seconds = max(0.0, training) / done * (state.max_steps - state.global_step)
        if self._last_evaluation is not None:
            seconds += self._last_evaluation[1] * self._evaluations_left(args, state)
        return f"{tqdm.format_interval(seconds)} left"

    def _evaluations_left(self, args, state) -> int:
        """Evaluations until the end, with the one after the last update."""
        pending = self._last_evaluation[0] < state.global_step
        if args.eval_strategy == "epoch":
            return state.num_train_epochs - int(state.epoch) + int(pending and state.epoch % 1 == 0)
        every = state.eval_steps if args.eval_strategy == "steps" else state.max_steps
        left = math.ceil(state.max_steps / every) - state.global_step // every
        return left + int(pending and state.global_step % every == 0)


def _joined(*parts: str) -> str:
    return " | ".join(part for part in parts if part)
