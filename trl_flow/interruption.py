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

"""Ctrl-C and SIGTERM while training: a checkpoint at the end of the update, and how to go on."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback

from .notebook import in_notebook


SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on a signal that its processes have already had from the terminal: within this many seconds it is one.
ONE_SIGNAL = 1.0


class Interrupted(KeyboardInterrupt):
    """
    Training was interrupted, and a checkpoint saved.

    Args:
        signal_number (`int`):
            The signal.
        checkpoint (`str`):
            Where training goes on.
    """

    def __init__(self, signal_number: int, checkpoint: str):
        super().__init__(f"{signal.Signals(signal_number).name}, saved in {checkpoint}")
        self.signal_number, self.checkpoint = signal_number, checkpoint

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C (SIGINT), 143 after SIGTERM: what shells say of a process that a signal has ended."""
        return 128 + self.signal_number


class InterruptionCallback(TrainerCallback):
    """
    Lets a run end well when Ctrl-C is pressed or a batch system sends SIGTERM.

    The update under way is finished and saved, whatever `save_strategy` says, and complete even with `save_only_model`.
    Nothing more is evaluated; an evaluation under way is finished. Then [`~trl_flow.interruption.Interrupted`], a
    `KeyboardInterrupt`, leaves `train()`. A run that is resumed from this checkpoint ends as one that was never stopped.
    With several processes one that gets the signal is enough: all stop after the same update. A second signal stops at
    once, and saves nothing.

    In the last update there is nothing to go on with: it is saved, and the run ends as it would have.

    Python has signals in its main thread only: in any other the callback does nothing. Give it last, so that nothing
    after it asks for an evaluation.

    Args:
        resume_command (`str`, *optional*):
            What to type to go on, for the message. By default it is a line of Python.

    Example:

    ```python
    trainer = FlowGRPOTrainer("shapes", reward_funcs=["shapes"], callbacks=[InterruptionCallback()])
    trainer.train()
    ```
    """

    def __init__(self, resume_command: str = "trainer.train(resume_from_checkpoint=True)"):
        self.resume_command = resume_command
        self._previous = {}
        self._reset()

    def _reset(self):
        self._received: int | None = None
        self._received_at = 0.0
        self._agreed = 0  # the signal that all processes know of

    # ---- Signals ----

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()
        self._speaks, self._save_only_model = state.is_world_process_zero, args.save_only_model
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.getsignal(number)
            # `nohup` and shells that run a command in the background ask for a signal to be ignored. And after a run that
            # failed the handler is still ours.
            if previous not in (signal.SIG_IGN, self._handle):
                self._previous[number] = signal.SIG_DFL if previous is None else previous
                signal.signal(number, self._handle)

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _handle(self, number, frame):
        if self._received is not None and time.monotonic() - self._received_at < ONE_SIGNAL:
            return
        if self._received is not None or not _is_training(frame):
            self._restore()
            signal.raise_signal(number)
            return
        self._received, self._received_at = number, time.monotonic()
        if self._speaks:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            _say(f"\n{name}: training stops after this update, and saves it. A second one stops at once.\n")

    def _agree(self, args) -> bool:
        """Whether a process has had a signal. All of them have to ask."""
        if args.world_size == 1:
            self._agreed = self._received or 0
        elif not self._agreed:
            own = torch.tensor([self._received or 0], device=args.device)
            self._agreed = int(gather(own).max())
        return self._agreed != 0

    # ---- Stop ----

    def on_step_end(self, args, state, control, **kwargs):
        if not self._agree(args):
            return
        control.should_save, control.should_evaluate, args.save_only_model = True, False, False
        if args.logging_strategy != "no":
            control.should_log = True  # what was measured since the last log is in no checkpoint

    def on_evaluate(self, args, state, control, **kwargs):
        # The checkpoint of this update comes after its evaluation. That of the base model has none.
        if 0 < state.global_step < state.max_steps and self._agree(args):
            control.should_save, args.save_only_model = True, False

    def on_save(self, args, state, control, **kwargs):
        if not self._agreed:
            return
        args.save_only_model = self._save_only_model
        if state.global_step < state.max_steps:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # The loop has been left. Other callbacks have seen the save, and nothing has been done that ends a run, such as
        # going back to the best checkpoint and removing others.
        if not self._agreed or state.global_step >= state.max_steps or not control.should_training_stop:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            text = (
                f"Stopped after update {state.global_step} of {state.max_steps}, saved in {checkpoint}. Go on with: "
            )
            _say(f"{text}{self.resume_command}\n")
        # A launcher ends the others when one process ends.
        PartialState().wait_for_everyone()
        self._restore()
        raise Interrupted(self._agreed, str(checkpoint))


def _say(text: str):
    if in_notebook():
        # Beneath the cell: what a kernel writes to its own error output, the notebook does not show.
        sys.stderr.write(text)
    else:
        os.write(2, text.encode())  # not `print`: the signal may have come in the middle of one


def _is_training(frame) -> bool:
    while frame is not None:
        if frame.f_code is Trainer.train.__code__:
            return True
        frame = frame.f_back
    return False
