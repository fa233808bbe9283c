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

"""What a trainer writes for people while it runs: the report, and the pictures of evaluations."""

import json
from pathlib import Path

from pipelines import prompts


def test_the_report_is_there_after_the_first_evaluation_and_renewed(make_trainer, monkeypatch):
    written = []

    def write_report(run_dir, log_history, max_steps, is_running):
        assert max_steps == 3
        written.append((run_dir, log_history[-1]["step"], "eval_reward" in log_history[-1], is_running))

    monkeypatch.setattr("trl_flow.report.live.write_report", write_report)
    trainer = make_trainer(
        eval_dataset=prompts(2), max_steps=3, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3
    )
    trainer.train()
    run = trainer.args.output_dir
    # Before training, at both evaluations, at the save that follows the second, and at the end.
    assert written[:-1] == [(run, 0, True, True), (run, 2, True, True), (run, 3, True, True), (run, 3, True, True)]
    assert written[-1] == (run, 3, False, False)


def test_a_last_report_that_cannot_be_written_does_not_cost_the_weights(make_trainer, monkeypatch):
    def write_report(*args, **kwargs):
        raise OSError("no font")

    monkeypatch.setattr("trl_flow.report.live.write_report", write_report)
    trainer = make_trainer(max_steps=1, save_strategy="no")
    trainer.train()
    assert Path(trainer.args.output_dir, "adapter_model.safetensors").is_file()


def test_a_grid_that_cannot_be_drawn_does_not_cost_the_run(make_trainer, monkeypatch):
    def samples_grid(samples):
        raise OSError("no font")

    monkeypatch.setattr("trl_flow.report.tracking.samples_grid", samples_grid)
    trainer = make_trainer(eval_dataset=prompts(2))
    trainer.evaluate()
    folder = Path(trainer.args.output_dir, "samples")
    assert sorted(path.name for path in folder.rglob("*.*")) == ["000.png", "001.png", "step_000000.json"]


def test_pictures_keep_their_prompts_and_scores_where_some_are_on_another_machine(make_trainer, monkeypatch):
    trainer = make_trainer(eval_dataset=prompts(3))
    trainer.accelerator.wait_for_everyone = lambda: Path(
        trainer.args.output_dir, "samples", "step_000000", "001.png"
    ).unlink(missing_ok=True)
    trainer.evaluate()
    record = json.loads(Path(trainer.args.output_dir, "samples", "step_000000.json").read_text())
    assert [path.name for path in trainer.evaluated_samples.paths] == ["000.png", "002.png"]
    assert trainer.evaluated_samples.prompts == record["prompts"][::2]
    assert trainer.evaluated_samples.scores == {name: scores[::2] for name, scores in record["scores"].items()}
