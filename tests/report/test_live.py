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

import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_flow.report.live import LiveReport, report_stop


LOG = [
    {"step": 0, "eval_reward": 0.25},
    {"step": 1, "reward": 0.5, "time/train": 1.0},
]


@pytest.fixture
def evaluate(tmp_path):
    """Tells a callback of an evaluation, and returns the report."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")

    def evaluate(callback, log_history, event="on_evaluate", **state) -> str:
        state = TrainerState(log_history=log_history, max_steps=9, **{"is_world_process_zero": True, **state})
        getattr(callback, event)(args, state, TrainerControl())
        page = tmp_path / "report.html"
        return page.read_text() if page.is_file() else ""

    return evaluate


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which stand still unless a test moves them; a report takes one of them."""
    from trl_flow.report.live import write_report

    now = [1000.0]
    monkeypatch.setattr("trl_flow.report.live.time.monotonic", lambda: now[0])

    def slowly(*args, **kwargs):
        now[0] += 1
        return write_report(*args, **kwargs)

    monkeypatch.setattr("trl_flow.report.live.write_report", slowly)
    return now


def test_report_of_a_run_that_goes_on(evaluate, clock):
    callback = LiveReport()
    first = evaluate(callback, LOG[:1])
    assert "0.250" in first and "0 of 9 updates" in first
    clock[0] += 10
    assert evaluate(callback, LOG) == first, "so soon it would take much of the run's time"
    clock[0] += 40
    second = evaluate(callback, LOG, event="on_save")
    assert second != first and "0.500" in second


def test_each_training_begins_with_a_report(evaluate, clock, tmp_path):
    callback = LiveReport()
    evaluate(callback, LOG[:1])
    callback.on_train_begin(None, None, None)
    assert "0.500" in evaluate(callback, LOG)


def test_one_process_writes_and_only_what_there_is(evaluate, clock):
    assert evaluate(LiveReport(), LOG, is_world_process_zero=False) == ""
    assert evaluate(LiveReport(), []) == ""


def test_an_error_costs_the_report_and_not_the_run(evaluate, clock, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    (tmp_path / "report.html").mkdir()  # nothing can be written there
    with caplog.at_level("WARNING"):
        assert evaluate(LiveReport(), LOG) == ""
    assert "The report could not be written (" in caplog.text


def test_a_run_that_stopped_does_not_say_that_it_goes_on(evaluate, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(log_history=LOG, max_steps=9, is_world_process_zero=True)
    report_stop(args, state)
    assert not (tmp_path / "report.html").exists(), "it had no report, and needs none"
    assert "http-equiv" in evaluate(LiveReport(), LOG)
    report_stop(args, state)
    page = (tmp_path / "report.html").read_text()
    assert "http-equiv" not in page and "Not finished" in page
