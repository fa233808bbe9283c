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

"""The report of a run that is still going."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from .page import write_report


logger = logging.get_logger(__name__)

# A report may take this share of the run's time.
LARGEST_SHARE = 0.02


class LiveReport(TrainerCallback):
    """
    Writes the report after evaluations and saves, so that `report.html` in `output_dir` tells how a run is going.

    The first one is written at once. Later ones wait until they take no more than 2 % of the run's time. A report that
    cannot be written costs a warning, and not the run.
    """

    def __init__(self):
        self._due_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._due_at = 0.0

    def on_evaluate(self, args, state, control, **kwargs):
        self._write(args, state)

    def on_save(self, args, state, control, **kwargs):
        self._write(args, state)

    def _write(self, args, state):
        began = time.monotonic()
        if not state.is_world_process_zero or not state.log_history or began < self._due_at:
            return
        try_report(args, state, is_running=True)
        now = time.monotonic()
        self._due_at = now + (now - began) / LARGEST_SHARE


def report_stop(args, state):
    """Writes the report of a run that has stopped before its end, so that its page doesn't say that it goes on."""
    if state.is_world_process_zero and state.log_history and Path(args.output_dir, "report.html").is_file():
        try_report(args, state, is_running=False)


def try_report(args, state, is_running: bool):
    """Writes the report of the log so far. One that cannot be written costs a warning, and not the run or its weights."""
    try:
        write_report(args.output_dir, state.log_history, max_steps=state.max_steps, is_running=is_running)
    except Exception as error:
        logger.warning_once(
            f"The report could not be written ({type(error).__name__}: {error}). That costs the report alone."
        )
