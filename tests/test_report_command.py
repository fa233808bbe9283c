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

"""`trl-flow report`: one run's own page again, or several runs on one."""

import json

import pytest
import yaml
from PIL import Image

from trl_flow.scripts import report


def write_run(folder, last):
    samples = folder / "samples"
    log = []
    for step, scores in ((0, [0.0, 0.5, 1.0]), (2, last)):
        pictures = samples / f"step_{step:06d}"
        pictures.mkdir(parents=True)
        for number in range(len(scores)):
            Image.new("RGB", (16, 16), (40 * step, 60 * number, 90)).save(pictures / f"{number:03d}.png")
        prompts = ["a red circle", "a blue circle", "a star"]
        pictures.with_suffix(".json").write_text(json.dumps({"prompts": prompts, "scores": {"strict": scores}}))
        log.append({"step": step, "eval_rewards/strict/mean": sum(scores) / 3, "eval_num_samples": 3})
    log.insert(1, {"step": 1, "reward": 0.5, "nfe": 100, "time/elapsed": 3.0})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "max_steps": 2, "log_history": log}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": "shapes", "seed": 1}))
    return folder


def run_report(*args):
    """As `trl-flow report` does it."""
    return report.main(*report.make_parser(prog="trl-flow report").parse_args_and_config([str(arg) for arg in args]))


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "first", [0.25, 0.5, 1.0]), write_run(tmp_path / "second", [0.5, 1.0, 1.0])]


class TestReport:
    def test_one_run_gets_its_own_page_again(self, runs, capsys):
        (runs[0] / "report.html").write_text("an old one")
        assert not run_report(runs[0])
        assert capsys.readouterr().out.split() == ["Report:", str(runs[0] / "report.html")]
        assert "<h1>first</h1>" in (runs[0] / "report.html").read_text()
        assert (runs[0] / "before_after.png").is_file()

    def test_several_are_compared(self, runs, tmp_path, capsys):
        before = [(path, path.stat().st_mtime_ns) for run in runs for path in sorted(run.rglob("*"))]
        assert not run_report(*runs, "--output_dir", tmp_path / "out")
        printed = capsys.readouterr().out
        assert "minus first" in printed and "+0.250" in printed
        assert str(tmp_path / "out" / "comparison.html") in printed.replace("\n", "")
        assert "<h1>first and second</h1>" in (tmp_path / "out" / "comparison.html").read_text()
        # The runs themselves are left as they were.
        assert [(path, path.stat().st_mtime_ns) for run in runs for path in sorted(run.rglob("*"))] == before

    def test_comparison_goes_to_a_folder_of_its_own(self, runs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run_report("first", "second", "--title", "two of them")
        assert "<h1>two of them</h1>" in (tmp_path / "comparison" / "comparison.html").read_text()

    def test_from_a_file(self, runs, tmp_path):
        config = tmp_path / "report.yaml"
        config.write_text(yaml.safe_dump({"run": [str(run) for run in runs], "output_dir": str(tmp_path / "out")}))
        run_report("--config", config)
        assert (tmp_path / "out" / "comparison.png").is_file()

    def test_what_cannot_be(self, runs, tmp_path):
        with pytest.raises(ValueError, match="name a run"):
            run_report()
        with pytest.raises(ValueError, match=r"written into .*first\. Name a second run"):
            run_report(runs[0], "--output_dir", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="nowhere is not a directory: expected the --output_dir"):
            run_report(runs[0], tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty holds no training log"):
            run_report(runs[0], tmp_path / "empty")
        with pytest.raises(ValueError, match="named twice"):
            run_report(runs[0], runs[0])

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            run_report("--help")
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith("usage: trl-flow report RUN [RUN ...]")
