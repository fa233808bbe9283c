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

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_time, self._start_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        stream = self.stream or sys.stderr
        if stream.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar:10} {elapsed}<{remaining}{postfix}",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated_batches += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"evaluating, batch {self.evaluated_batches} | {self._text()}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated_batches = 0
        if self.bar is not None:
            self.bar.set_postfix_str(self._text())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        is_evaluation = any(key.startswith("eval_") for key in logs)
        if not is_evaluation and "reward" not in logs:
            return  # the end-of-training summary
        self._read(logs)
        if self.bar is not None:
            self.bar.set_postfix_str(self._text())
            return
        line = f"step {state.global_step}/{state.max_steps} | " if state.max_steps else ""
        line += f"held-out {self._score_text()}" if is_evaluation else self._text()
        line += self._remaining(state) if not is_evaluation else ""
        stream = self.stream or sys.stderr
        stream.write(line + "\n")
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
        elapsed = logs.get("time/elapsed")
        if finite(logs.get("images_per_second")):
            self.speed = f"{logs['images_per_second']:.3g} images/s"
        elif finite(logs.get("nfe")) and finite(elapsed) and elapsed > 0:
            self.speed = f"{logs['nfe'] / elapsed:,.0f} NFE/s"

    def _text(self) -> str:
        parts = []
        if self.reward is not None:
            parts.append(f"reward {self.reward:.3f}")
        if self.scores:
            parts.append(self._score_text())
        if self.speed:
            parts.append(self.speed)
        return " | ".join(parts)

    def _score_text(self) -> str:
        texts = []
        for name, score in self.scores.items():
            first = self.first_scores[name]
            texts.append(f"{name} {first:.3f}→{score:.3f}" if score != first else f"{name} {score:.3f}")
        return ", ".join(texts)

    def _remaining(self, state) -> str:
        done = state.global_step - self._start_step
        if self._start_time is None or done <= 0 or not state.max_steps:
            return ""
        seconds = (time.monotonic() - self._start_time) / done * (state.max_steps - state.global_step)
        return f" | {tqdm.format_interval(seconds)} left"
