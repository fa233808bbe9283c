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

"""The page that compares runs: values that can be computed by hand, and what may not be compared."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from trl_flow.report.runs import (
    compare_runs,
    different_settings,
    final_scores,
    load_runs,
    noise_differs,
    score_names,
    score_table,
)


PROMPTS = ["a red circle", "two <b>green</b> squares & a star", "a blue triangle", "a red circle"]
BEFORE = [0.0, 0.25, 0.5, 0.25]


def write_run(
    folder, gains, steps=(0, 2, 4), log_every=1, prompts=PROMPTS, before=BEFORE, method="MixGRPO", **settings
):
    """A run whose last held-out scores are `before` plus `gains`, and the ones between them half of that."""
    folder.mkdir(parents=True)
    log = []
    for step in range(steps[-1] + 1):
        if step in steps:
            share = steps.index(step) / (len(steps) - 1)
            scores = [score + share * gain for score, gain in zip(before, gains, strict=True)]
            samples = folder / "samples" / f"step_{step:06d}"
            samples.mkdir(parents=True)
            for number in range(len(prompts)):
                Image.new("RGB", (16, 16), (40 * step, 60 * number, 90)).save(samples / f"{number:03d}.png")
            samples.with_suffix(".json").write_text(json.dumps({"prompts": prompts, "scores": {"strict": scores}}))
            mean = float(np.mean(scores))
            log.append({"step": step, "eval_rewards/strict/mean": mean, "eval_num_samples": len(prompts)})
        if step and step % log_every == 0:
            log.append({"step": step, "reward": 0.5, "nfe": 1000 * step, "time/elapsed": 30.0 * step})
    log.append({"step": steps[-1], "train_runtime": 200.0, "nfe": 1000 * steps[-1], "time/elapsed": 30.0 * steps[-1]})
    state = {"global_step": steps[-1], "max_steps": steps[-1], "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    config = {"model_name_or_path": "shapes", "seed": 1, "hub_token": "secret", "output_dir": str(folder)} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"method": method}))
    return folder


class Page(HTMLParser):
    """Collects what a page loads, its ids and its texts."""

    def __init__(self, path):
        super().__init__()
        self.resources, self.ids, self.texts, self.tags = [], [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.resources += [value for name, value in attrs if name in ("src", "srcset", "href", "xlink:href", "data")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", [0.5, 0.25, 0.5, 0.25], noise_level=0.7)
    second = write_run(folder / "second", [0.5, 0.75, 0.5, 0.75], method="Flow-GRPO", noise_level=[0.5, 0.4])
    return load_runs([first, second])


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The page of these runs."""
    return compare_runs(runs, tmp_path_factory.mktemp("compared") / "new" / "out")


@pytest.fixture
def no_drawings(monkeypatch):
    """For what else is on a page: its drawings take most of the time."""
    monkeypatch.setattr("trl_flow.report.runs.render_svg", lambda panel: "")
    monkeypatch.setattr("trl_flow.report.runs._save_curves", lambda runs, panels, path: None)


def half_interval(values):
    return 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))


@pytest.mark.usefixtures("no_drawings")
class TestScores:
    def test_changes_and_differences_are_paired(self, runs):
        (table,) = final_scores(runs)
        first, second = table["rows"]
        assert (table["name"], first["first"], first["last"], first["step"]) == ("strict", "0.250", "0.625", "4")
        assert first["change"]["text"] == "+0.375"
        assert first["change"]["half"] == f"± {half_interval([0.5, 0.25, 0.5, 0.25]):.3f}"
        assert first["change"]["direction"] == "up"
        assert first["difference"] is None
        assert second["change"]["half"] == f"± {half_interval([0.5, 0.75, 0.5, 0.75]):.3f}"
        assert second["difference"]["text"] == "+0.250"
        # Half of 0.283 of the paired differences 0, 0.5, 0, 0.5; that of two independent means would be another.
        assert second["difference"]["half"] == f"± {half_interval([0, 0.5, 0, 0.5]):.3f}"
        # 0.250 is less than half of the interval.
        assert second["difference"]["direction"] == ""

    def test_a_clear_loss_points_down(self, tmp_path):
        runs = load_runs(
            [write_run(tmp_path / name, gains) for name, gains in (("a", [0.5] * 4), ("b", [-0.1, 0.0, 0.0, -0.1]))]
        )
        row = final_scores(runs)[0]["rows"][1]
        assert (row["difference"]["text"], row["difference"]["direction"]) == ("-0.550", "down")
        assert row["change"]["direction"] == ""  # -0.05 +- 0.057

    @pytest.mark.parametrize("other", [{"seed": 2}, {"model_name_or_path": "user/model"}, {"height": 64}])
    def test_other_noise_has_no_difference(self, tmp_path, other):
        runs = load_runs([write_run(tmp_path / "a", [0.5] * 4), write_run(tmp_path / "b", [0.0] * 4, **other)])
        assert noise_differs(*runs) == f"other {next(iter(other))}"
        assert final_scores(runs)[0]["rows"][1]["difference"] is None
        assert f"other noise (other {next(iter(other))}): b." in Page(compare_runs(runs, tmp_path / "out")).text

    def test_unknown_settings_are_not_taken_for_the_same(self, tmp_path):
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in "ab"]
        (folders[1] / "config.yaml").unlink()
        runs = load_runs(folders)
        assert noise_differs(*runs) == "settings unknown"
        assert final_scores(runs)[0]["rows"][1]["difference"] is None

    def test_over_the_prompts_that_both_have(self, tmp_path):
        more = write_run(
            tmp_path / "a", [0.5, 0.25, 0.5, 0.25, 1.0], prompts=[*PROMPTS, "a star"], before=[*BEFORE, 0]
        )
        runs = load_runs([more, write_run(tmp_path / "b", [0.5, 0.75, 0.5, 0.75])])
        difference = final_scores(runs)[0]["rows"][1]["difference"]
        assert difference["text"] == "+0.250"  # of four prompts; the means of all are 0.700 and 0.875
        assert "Differences of b are over 4 prompts" in Page(compare_runs(runs, tmp_path / "out")).text

    def test_other_prompts_have_no_difference(self, tmp_path):
        folders = [
            write_run(tmp_path / "a", [0.5] * 4),
            write_run(tmp_path / "b", [0.5] * 4, prompts=["one", "two", "three", "four"]),
        ]
        runs = load_runs(folders)
        assert final_scores(runs)[0]["rows"][1]["difference"] is None
        assert "b has no difference" in Page(compare_runs(runs, tmp_path / "out")).text
        assert not (tmp_path / "out" / "comparison_pictures.png").exists()

    def test_files_of_an_earlier_run_give_no_interval(self, tmp_path):
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in "ab"]
        stale = folders[1] / "samples" / "step_000004.json"
        stale.write_text(json.dumps({"prompts": PROMPTS, "scores": {"strict": [0.1, 0.2, 0.3, 0.4]}}))
        row = final_scores(load_runs(folders))[0]["rows"][1]
        assert (row["change"]["text"], row["change"]["half"]) == ("+0.500", "")
        assert row["difference"] is None

    def test_of_a_run_that_was_rolled_back(self, tmp_path):
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in "ab"]
        path = folders[1] / "trainer_state.json"
        state = json.loads(path.read_text())
        state["log_history"].append({"step": 4, "eval_rolled_back_to": 2})
        path.write_text(json.dumps(state))
        runs = load_runs(folders)
        row = final_scores(runs)[0]["rows"][1]
        assert (row["last"], row["step"], row["change"]["text"]) == ("0.500", "2", "+0.250")
        assert row["difference"]["text"] == "-0.250"
        text = Page(compare_runs(runs, tmp_path / "out")).text
        assert "4, rolled back to 2" in text
        assert "not of the same number of updates" in text

    def test_table_for_a_terminal(self, runs):
        table = score_table(runs)
        assert [column.header for column in table.columns][2:] == ["last", "change", "minus first"]
        assert list(table.columns[3].cells)[0].startswith("+0.375 ± 0.1")


class TestRuns:
    def test_names_are_short_and_distinct(self, tmp_path):
        folders = [write_run(tmp_path / place, [0.5] * 4) for place in ("x/run", "y/run", "y/other")]
        assert [run.name for run in load_runs(folders)] == ["x/run", "y/run", "y/other"]
        assert [run.name for run in load_runs(folders[1:])] == ["run", "other"]

    def test_one_named_twice(self, tmp_path):
        folder = write_run(tmp_path / "a", [0.5] * 4)
        with pytest.raises(ValueError, match="named twice"):
            load_runs([folder, folder / ".." / "a"])

    def test_time_and_evaluations_at_an_evaluation(self, tmp_path):
        (run,) = load_runs([write_run(tmp_path / "a", [0.5] * 4, log_every=3)])
        # Logged at updates 3 and (by the summary) 4; 0 at the start.
        assert run.spent([0, 2, 4], "nfe") == [0, 2000, 4000]
        assert run.spent([0, 2, 4], "elapsed") == [0, 60, 120]
        assert run.spent([0, 2, 4], "step") == [0, 2, 4]

    def test_settings_that_differ(self, runs):
        assert different_settings(runs) == [
            ("method", ["MixGRPO", "Flow-GRPO"]),
            ("noise_level", ["0.7", "[0.5, 0.4]"]),
        ]

    @pytest.mark.usefixtures("no_drawings")
    def test_without_evaluations_the_training_reward_stands_in(self, tmp_path):
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in "ab"]
        for folder in folders:
            path = folder / "trainer_state.json"
            state = json.loads(path.read_text())
            state["log_history"] = [entry for entry in state["log_history"] if "eval_num_samples" not in entry]
            path.write_text(json.dumps(state))
        runs = load_runs(folders)
        assert score_names(runs) == ["reward"]
        assert "Training reward" in Page(compare_runs(runs, tmp_path / "out")).text


class TestPage:
    def test_needs_nothing_else(self, compared):
        path, page = compared, Page(compared)
        assert path.parts[-3:] == ("new", "out", "comparison.html")
        assert all(resource.startswith(("data:", "#")) for resource in page.resources)
        assert "link" not in page.tags and "script" not in page.tags
        assert not re.search(r"url\((?!['\"]?#)", path.read_text())
        assert "secret" not in path.read_text()
        assert sorted(entry.name for entry in path.parent.iterdir()) == [
            "comparison.html",
            "comparison.png",
            "comparison_pictures.png",
        ]

    def test_each_element_of_a_drawing_is_its_own(self, compared):
        page = Page(compared)
        assert len(page.ids) == len(set(page.ids))
        assert {resource[1:] for resource in page.resources if resource.startswith("#")} <= set(page.ids)

    def test_a_drawing_for_each_axis(self, compared):
        text = compared.read_text()
        assert re.findall(r'<input class="choice" type="radio" name="axis" id="by-(\w+)"', text) == [
            "step",
            "elapsed",
            "nfe",
        ]
        assert text.count('role="img"') == 3
        for label in ("update", "training time (s)", "function evaluations"):
            assert f">{label}</text>" in text

    def test_an_axis_that_no_run_logged_is_left_out(self, tmp_path):
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in "ab"]
        for folder in folders:
            path = folder / "trainer_state.json"
            path.write_text(path.read_text().replace('"time/elapsed"', '"time/other"'))
        assert 'id="by-elapsed"' not in compare_runs(load_runs(folders), tmp_path / "out").read_text()

    def test_pictures_of_the_same_prompt_side_by_side(self, compared):
        text = compared.read_text()
        figures = re.findall(r'<figure class="figure">.*?</figure>', text, flags=re.DOTALL)
        assert [html.unescape(re.search("<figcaption>(.*?)</figcaption>", figure)[1]) for figure in figures] == PROMPTS
        for figure in figures:
            labels = re.findall(r'<div class="label".*?>(.*?)</div>', figure)
            assert labels == ["first, before", "first", "second"]
        assert "<b>green" not in text

    def test_names_that_look_like_markup(self, tmp_path):
        # matplotlib takes $...$ for a formula and drops legend entries that begin with an underscore.
        folders = [write_run(tmp_path / name, [0.5] * 4) for name in ("_a $x_$", 'b <i> "&')]
        path = compare_runs(load_runs(folders), tmp_path / "out")
        page = Page(path)
        assert "_a $x_$" in page.text
        assert "i" not in page.tags

    def test_many_runs_have_lines_of_their_own(self, tmp_path):
        runs = load_runs([write_run(tmp_path / f"run-{number}", [0.5] * 4) for number in range(8)])
        text = compare_runs(runs, tmp_path / "out").read_text()
        keys = re.findall(r'<li><svg class="swatch".*?stroke="(.*?)".*?stroke-dasharray="(.*?)"', text)
        assert len(set(keys)) == 8
        assert "<h1>8 runs</h1>" in text
