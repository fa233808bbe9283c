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

"""The report of a run that is still going, as a trainer has it written."""

from pipelines import prompts


def test_the_report_is_there_after_the_first_evaluation_and_renewed(make_trainer, monkeypatch):
    written = []

    def write_report(run_dir, log_history, max_steps, is_running):
        assert is_running and max_steps == 3
        written.append((run_dir, log_history[-1]["step"], "eval_reward" in log_history[-1]))

    monkeypatch.setattr("trl_flow.report.live.write_report", write_report)
    trainer = make_trainer(
        eval_dataset=prompts(2), max_steps=3, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3
    )
    trainer.train()
    run = trainer.args.output_dir
    # Before training, at both evaluations, and at the save that follows the second.
    assert written == [(run, 0, True), (run, 2, True), (run, 3, True), (run, 3, True)]
