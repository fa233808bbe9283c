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

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from trl_flow.report import load_history, write_report
from trl_flow.report.history import paired_change
from trl_flow.report.page import _moving
from trl_flow.report.panels import collect_panels, render_svg


STEPS = 9  # denoising steps that are trained
PROMPTS = ["a red circle", "two <b>green</b> squares & a star", "a blue triangle"]


def train_entry(step: int) -> dict:
    entry = {
        "step": step,
        "epoch": step / 10,
        "loss": 0.0,
        "grad_norm": 0.3,
        "learning_rate": 1e-3,
        "reward": 0.5 + 0.01 * step,
        "reward_std": 0.2,
        "rewards/strict/mean": 0.4,
        "rewards/strict/std": 0.5,
        "rewards/partial/mean": 0.6,
        "rewards/partial/std": 0.3,
        "frac_reward_zero_std": 0.1,
        "ratio/mean": 1.0,
        "ratio/min": 0.97,
        "ratio/max": 1.03,
        "clip_ratio": 0.05,
        "kl": 1e-4 * step,
        "nfe": 7200 * step,
        "time/rollout": 3.0,
        "time/decode": 0.3,
        "time/reward": 0.2,
        "time/train": 1.5,
        "time/elapsed": 5.0 * step,
    }
    for i in range(STEPS):
        entry[f"dense_reward/step_{i}"] = 0.01 * i
        entry[f"dense_reward/positive/step_{i}"] = 0.5
        entry[f"advantages/std/step_{i}"] = 0.9
        entry[f"grad_share/step_{i}"] = 1 / STEPS
    return entry


def eval_entry(step: int) -> dict:
    return {
        "step": step,
        "eval_reward": 0.6,
        "eval_rewards/strict/mean": 0.48 + 0.01 * step,
        "eval_rewards/strict/std": 0.5,
        "eval_rewards/partial/mean": 0.74,
        "eval_rewards/partial/std": 0.25,
        "eval_num_samples": 512,
    }


def write_run(run_dir: Path, steps: int = 12, size: int = 16) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    log = [eval_entry(0)]
    for step in range(1, steps + 1):
        log.append(train_entry(step))
        if step % 4 == 0:
            log.append(eval_entry(step))
    log.append({"step": steps, "train_runtime": 70.0, "total_flos": 0})
    state = {"global_step": steps, "max_steps": steps, "log_history": log}
    (run_dir / "trainer_state.json").write_text(json.dumps(state))
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump({"learning_rate": 1e-3, "hub_token": "secret", "noise_level": [0.7, 0.5], "model": "shapes"})
    )
    for step, score in ((0, 0.25), (steps, 0.75)):
        folder = run_dir / "samples" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        for index in range(len(PROMPTS)):
            Image.new("RGB", (size, size), (step * 10, 60 * index, 90)).save(folder / f"{index:03d}.png")
        scores = {"strict": [score, None, float("nan")], "partial": [0.5] * len(PROMPTS)}
        folder.with_suffix(".json").write_text(json.dumps({"prompts": PROMPTS, "scores": scores}))
    return run_dir


class Page(HTMLParser):
    """Collects what a page loads, its texts and its headings."""

    def __init__(self, path: Path):
        super().__init__()
        self.resources, self.ids, self.texts, self.tags = [], [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "poster"):
                self.resources.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The page of a finished run."""
    return write_report(write_run(tmp_path_factory.mktemp("finished")))


@pytest.fixture
def no_drawings(monkeypatch):
    """For what else is on a page: its drawings take most of the time."""
    monkeypatch.setattr("trl_flow.report.page.render_svg", lambda panel: "")
    monkeypatch.setattr("trl_flow.report.page.save_png", lambda panels, path: None)


class TestWriteReport:
    def test_page_needs_nothing_else(self, finished):
        path = finished
        assert path.name == "report.html"
        page = Page(path)
        assert all(resource.startswith(("data:", "#")) for resource in page.resources)
        assert "link" not in page.tags
        assert "script" not in page.tags
        assert not re.search(r"url\((?!['\"]?#)", path.read_text())
        assert "@import" not in path.read_text()
        assert "Settings" in page.text
        assert not list(path.parent.glob(".*partial*"))

    def test_references_inside_the_drawings_resolve(self, finished):
        page = Page(finished)
        used = {resource[1:] for resource in page.resources if resource.startswith("#")}
        used |= set(re.findall(r"url\(#([^)]*)\)", finished.read_text()))
        assert used
        assert used <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))

    def test_shows_what_was_logged(self, finished):
        page = Page(finished)
        for text in (
            "12 updates in 1 min 00 s",
            "0.480 → 0.600",  # strict: 0.48 + 0.01 * 12
            "± 0.043",  # 1.96 * 0.5 / sqrt(512)
            "86.4 k",  # 12 * 7200 evaluations
            "Training reward",
            "Held-out scores",
            "Dense reward per denoising step",
            "Share of steps that improve the picture",
            "Gradient share per denoising step",
            "Importance ratio",
            "Clipped share",
            "Distance from the base model (KL)",
            "Groups without signal",
            "Where the time goes",
            "noise_level",
            "[0.7, 0.5]",
        ):
            assert text in page.text, text

    def test_texts_are_escaped_and_secrets_left_out(self, finished):
        assert "<b>green</b>" not in finished.read_text()
        assert "two <b>green</b> squares & a star" in Page(finished).text
        assert "secret" not in finished.read_text()

    @pytest.mark.usefixtures("no_drawings")
    def test_pictures_are_pairs_by_index(self, tmp_path):
        run_dir = write_run(tmp_path)
        (run_dir / "samples" / "step_000000" / "001.png").unlink()
        path = write_report(run_dir)
        page = Page(path)
        assert path.read_text().count("data:image/png") == 4, "two pairs are complete"
        assert PROMPTS[0] in page.text
        assert PROMPTS[1] not in page.text
        assert PROMPTS[2] in page.text
        with Image.open(run_dir / "before_after.png") as image:
            assert image.width == 10 + 2 * (160 + 10)

    @pytest.mark.usefixtures("no_drawings")
    def test_large_pictures_are_reduced(self, tmp_path):
        path = write_report(write_run(tmp_path, size=1024))
        assert "data:image/jpeg" in path.read_text()
        assert path.stat().st_size < 1_000_000

    def test_during_a_run(self, tmp_path):
        """Before anything is on disk, after the first evaluation, after the first update."""
        for log in ([eval_entry(0)], [eval_entry(0), train_entry(1)], [train_entry(1)]):
            page = Page(write_report(tmp_path, log_history=log))
            assert "Numbers" in page.text
        assert (tmp_path / "curves.png").is_file()
        assert not (tmp_path / "before_after.png").exists()

    @pytest.mark.usefixtures("no_drawings")
    def test_progress_of_an_unfinished_run(self, tmp_path):
        (tmp_path / "config.yaml").write_text("max_steps: 50\n")
        assert "3 of 50 updates" in Page(write_report(tmp_path, log_history=[train_entry(3)])).text

    @pytest.mark.parametrize(
        "missing",
        [
            r"reward|eval_reward",
            r"eval_num_samples|reward_std",
            r"eval_rewards/.*/std|ratio/min|time/elapsed",
            r"eval_rewards/.*/mean|ratio/mean|time/decode",
            r"eval_.*|ratio/max|nfe",
            r".*step_3|rewards/.*/mean|time/.*",
            r"(?!eval_).*",
        ],
    )
    def test_any_key_may_be_missing(self, tmp_path, missing):
        log = [eval_entry(0), train_entry(1), train_entry(2), eval_entry(2)]
        kept = [{k: v for k, v in entry.items() if k == "step" or not re.fullmatch(missing, k)} for entry in log]
        assert kept != log
        write_report(tmp_path, log_history=kept)

    def test_any_key_may_be_the_only_one(self, tmp_path):
        for key in train_entry(1).keys() - {"step"}:
            for value in (0.5, float("nan"), None, "text"):
                panels = collect_panels(load_history(tmp_path, [{"step": 1, key: value}]))
                assert value == 0.5 or not panels, key

    def test_values_that_are_not_numbers(self, tmp_path):
        log = [train_entry(1), {key: float("nan") if key != "step" else 2 for key in train_entry(2)}]
        log += [{"step": 3, "reward": None, "eval_reward": "x"}, train_entry(4)]
        write_report(tmp_path, log_history=log)

    @pytest.mark.usefixtures("no_drawings")
    def test_damaged_side_files(self, tmp_path):
        run_dir = write_run(tmp_path)
        (run_dir / "config.yaml").write_text("a: [1\n")
        (run_dir / "samples" / "step_000012.json").write_text("{")
        (run_dir / "samples" / "step_000099").mkdir()
        write_report(run_dir)

    def test_no_log(self, tmp_path):
        with pytest.raises(ValueError, match="holds no training log"):
            write_report(tmp_path)
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
        with pytest.raises(ValueError, match="holds no training log"):
            write_report(tmp_path)
        with pytest.raises(FileNotFoundError, match="not a directory"):
            write_report(tmp_path / "nowhere")


def small_entry(step: int) -> dict:
    return {"step": step, "reward": 0.5, "time/elapsed": 5.0 * step}


@pytest.mark.usefixtures("no_drawings")
class TestFirstScreen:
    """What a stranger reads first: what was trained, what rose, and whether a watched reward fell."""

    def test_what_was_trained(self, tmp_path):
        log = [{"step": 1, "rewards/strict/mean": 0.5, "rewards/partial/mean": 0.5}]
        text = Page(write_report(tmp_path, log)).text
        assert "This run trained an adapter of a pipeline for the rewards strict and partial ." in text
        run = {"method": "DenseGRPO", "base_model": "/home/somebody/models/mine", "rewards": ["strict"]}
        (tmp_path / "run.json").write_text(json.dumps(run))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lora_r": 16, "dataset_name": "org/<prompts>"}))
        path = write_report(tmp_path, log)
        assert re.sub(r"</?b>", "", re.search('<p class="what">(.*?)</p>', path.read_text())[1]) == (
            "DenseGRPO trained an adapter of rank 16 of mine on the prompts of org/&lt;prompts&gt; for the reward strict."
        )
        assert "somebody" not in path.read_text()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lora_r": 16, "full_finetuning": True}))
        assert "trained all weights of" in Page(write_report(tmp_path, log)).text

    @staticmethod
    def findings(run_dir, scores, trained=("good",)):
        """The findings of a run with these (first, last) scores, each of 100 prompts with a deviation of 0.5."""
        log = [{"step": 1} | {f"rewards/{name}/mean": 0.5 for name in trained}]
        for step, position in ((0, 0), (4, 1)):
            entry = {"step": step, "eval_num_samples": 100}
            for name, values in scores.items():
                entry |= {f"eval_rewards/{name}/mean": values[position], f"eval_rewards/{name}/std": 0.5}
            log.append(entry)
        text = write_report(run_dir, log, is_running=False).read_text()
        items = re.findall('<li class="(.*?)">(.*?)</li>', text)
        return [(direction, html.unescape(finding)) for direction, finding in items]

    def test_rise_and_fall(self, tmp_path):
        # Half of the interval of a difference of independent means: 1.96 * sqrt(2) * 0.5 / 10 = 0.139.
        assert self.findings(tmp_path, {"good": (0.25, 0.5), "other": (0.5, 0.25), "same": (0.5, 0.4)}) == [
            ("up", "Held-out good rose: 0.250 → 0.500 (+0.250 ± 0.139)."),
            (
                "down",
                "Held-out other fell: 0.500 → 0.250 (-0.250 ± 0.139), although it is only watched: look for reward "
                "hacking.",
            ),
        ]

    def test_within_the_interval(self, tmp_path):
        assert self.findings(tmp_path, {"good": (0.25, 0.35), "other": (0.5, 0.4), "same": (0.5, 0.4)}) == [
            ("", "Held-out good did not change beyond its noise: 0.250 → 0.350 (+0.100 ± 0.139)."),
            ("", "Watched, not trained on: other and same; none fell beyond its noise."),
        ]

    def test_nothing_watched_and_no_score(self, tmp_path):
        assert self.findings(tmp_path, {"good": (0.25, 0.5), "bad": (None, None)}, trained=("good", "bad")) == [
            ("", "No held-out picture has a score of bad."),
            ("up", "Held-out good rose: 0.250 → 0.500 (+0.250 ± 0.139)."),
            ("", "No reward was only watched, so that reward hacking would go unseen (eval_reward_funcs)."),
        ]

    def test_a_watched_reward_without_a_score_is_watched(self, tmp_path):
        assert self.findings(tmp_path, {"good": (0.25, 0.5), "bad": (None, None)}) == [
            ("", "No held-out picture has a score of bad."),
            ("up", "Held-out good rose: 0.250 → 0.500 (+0.250 ± 0.139)."),
        ]

    def test_without_two_evaluations(self, tmp_path):
        assert "Nothing was evaluated on held-out prompts." in Page(write_report(tmp_path, [small_entry(1)])).text
        assert "There is one evaluation so far" in Page(write_report(tmp_path, [eval_entry(0)])).text

    def test_arrows_mark_what_is_beyond_the_interval(self, finished):
        # strict: +0.12, +- 1.96 * 0.5 * sqrt(2 / 512) = 0.061; partial: paired, all differences are 0.
        text = finished.read_text()
        assert '<small class="up">+0.120 ± 0.061</small>' in text
        assert '<small class="">+0.000 ± 0.000</small>' in text

    def test_missing_scores_widen_the_interval(self, tmp_path):
        log = [eval_entry(0) | {"eval_rewards/strict/missing": 512 - 128}]
        assert "± 0.087" in Page(write_report(tmp_path, log)).text  # 1.96 * 0.5 / sqrt(128)


@pytest.mark.usefixtures("no_drawings")
class TestGoingOn:
    def test_a_run_that_goes_on_reloads_its_page(self, tmp_path):
        log = [eval_entry(0), small_entry(1), small_entry(2)]
        path = write_report(tmp_path, log, max_steps=10)
        page = Page(path)
        # 5 s for an update, 8 of them to come.
        assert "Training 2 of 10 updates in 10 s, about 40 s of training left. Written 20" in page.text
        assert re.search('<meta http-equiv="refresh" content="[0-9]+">', path.read_text())
        assert "reloads itself" in page.text

    def test_one_that_has_ended_does_not(self, tmp_path, finished):
        log = [small_entry(1), small_entry(2), {"step": 2, "train_runtime": 11.0}, eval_entry(2)]
        for page in (write_report(tmp_path, log), finished):
            assert "http-equiv" not in page.read_text()
            assert "Written" not in Page(page).text

    def test_one_that_was_stopped_does_not_either(self, tmp_path):
        (tmp_path / "checkpoint-2").mkdir()
        log = [small_entry(1), small_entry(2)]
        state = {"global_step": 2, "max_steps": 10, "log_history": log}
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
        for path in (write_report(tmp_path), write_report(tmp_path, log, max_steps=10, is_running=False)):
            assert "http-equiv" not in path.read_text()
            assert "Not finished 2 of 10 updates in 10 s. Written 20" in Page(path).text

    def test_a_run_that_had_ended_may_go_on(self, tmp_path):
        log = [small_entry(1), {"step": 1, "train_runtime": 11.0}, small_entry(2)]
        assert "http-equiv" in write_report(tmp_path, log).read_text()

    def test_a_page_is_whole_or_the_one_before(self, tmp_path, monkeypatch):
        path = write_report(tmp_path, [small_entry(1)])
        before = path.read_text()

        def cut_short(self, text, **kwargs):
            with self.open("w") as file:
                file.write(text[:100])
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", cut_short)
            with pytest.raises(OSError, match="No space"):
                write_report(tmp_path, [small_entry(1), small_entry(2)])
        assert path.read_text() == before


class TestPanels:
    @staticmethod
    def panel(run_dir, log, title):
        panel = {panel.title: panel for panel in collect_panels(load_history(run_dir, log))}[title]
        axes = Figure().add_subplot()
        panel.draw(axes)
        return panel, axes

    def test_noise_levels_with_those_before_calibration(self, tmp_path):
        log = [{"step": step, "noise_level/step_1": 0.5 + step, "noise_level/step_3": 0.25} for step in (1, 2)]
        title = "Noise level per denoising step (ψ)"
        _, axes = self.panel(tmp_path, log, title)
        assert [bar.get_height() for bar in axes.patches] == [2.5, 0.25]
        (tmp_path / "calibration.json").write_text(json.dumps({"before": {"noise_level": [0.0, 0.9, 0.0, 0.8]}}))
        _, axes = self.panel(tmp_path, log, title)
        assert [bar.get_height() for bar in axes.patches] == [0.9, 0.8, 2.5, 0.25]
        assert axes.get_legend_handles_labels()[1] == ["before calibration", "in training"]

    @pytest.mark.usefixtures("no_drawings")
    def test_tags(self, tmp_path):
        log = [
            {"step": step, "eval_rewards/org/reward/mean": 0.5}
            | {f"eval_tags/{tag}/org/reward": 0.1 * number + 0.01 * step for number, tag in enumerate(("a/b", "c$d$"))}
            for step in (0, 5)
        ]
        _, axes = self.panel(tmp_path, log, "By tag: org/reward")
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a/b", r"c\$d\$"]
        assert [list(line.get_xdata()) for line in axes.get_lines()][::3] == [
            pytest.approx([0, 0.05]),
            pytest.approx([0.1, 0.15]),
        ]
        assert "a/b 0.000 → 0.050 c$d$ 0.100 → 0.150" in Page(write_report(tmp_path, log)).text

    @pytest.mark.usefixtures("no_drawings")
    def test_failures_only_where_there_were_some(self, tmp_path):
        log = [small_entry(step) | {"rewards/strict/failed": 0.0, "rewards/partial/failed": 0.0} for step in (1, 2)]
        assert "Failed rewards" not in Page(write_report(tmp_path, log)).text
        log[1]["rewards/partial/failed"] = 0.5
        _, axes = self.panel(tmp_path, log, "Failed rewards")
        assert [(line.get_label(), list(line.get_ydata())) for line in axes.get_lines()] == [("partial", [0, 0.5])]
        assert "pictures that partial failed to score 25.00%" in Page(write_report(tmp_path, log)).text

    def test_what_rewards_log_is_shown(self, tmp_path):
        log = [train_entry(1) | {"objects_found": 3.0, "rows_trained": 7}]
        others = [panel.title for panel in collect_panels(load_history(tmp_path, log)) if panel.section == "others"]
        assert others == ["objects_found"]

    @pytest.mark.parametrize(
        ("values", "labels"),
        [
            ([0, 40_000], {"0", "20 k", "40 k"}),
            ([0, 4e-5], {"0", "2e-5", "4e-5"}),
            ([-4e9, 0], {"-4 G", "0"}),
            ([1e9, 1e9 + 40], {"1000000040"}),
        ],
    )
    def test_ticks(self, tmp_path, values, labels):
        log = [{"step": step, "grad_norm": value} for step, value in enumerate(values)]
        svg = render_svg(
            next(panel for panel in collect_panels(load_history(tmp_path, log)) if panel.title == "Gradient norm")
        )
        assert labels <= set(re.findall(r"<text.*?>(.*?)</text>", svg))

    def test_drawings_have_titles(self, tmp_path):
        svg = render_svg(collect_panels(load_history(tmp_path, [{"step": 1, "a <b>": 1.0}]))[0])
        assert re.match('<svg[^>]* role="img" aria-labelledby="(.*?)"><title id="\\1">a &lt;b&gt;</title>', svg)


class TestVideos:
    @pytest.mark.usefixtures("no_drawings")
    def test_move_and_lie_still(self, tmp_path):
        folder = tmp_path / "samples" / "step_000000"
        folder.mkdir(parents=True)
        frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in range(0, 200, 20)]
        frames[0].save(folder / "000.gif", save_all=True, append_images=frames[1:], duration=125)
        Image.new("RGB", (64, 16)).save(folder / "000.png")
        text = write_report(tmp_path, [small_entry(1)]).read_text()
        assert text.count("data:image/gif") == text.count("(prefers-reduced-motion: reduce)") == 1
        assert "update 0, from the first to the last frame" in text

    def test_large_ones_get_small(self, tmp_path):
        generator = np.random.default_rng(0)
        noise = [Image.fromarray(generator.integers(0, 256, (12, 12), np.uint8)) for _ in range(40)]
        frames = [frame.resize((240, 240), Image.Resampling.NEAREST) for frame in noise]
        path = tmp_path / "000.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=125)
        gif = base64.b64decode(_moving(path).removeprefix("data:image/gif;base64,"))
        assert 0 < len(gif) < 300_000 and path.stat().st_size > 75_000
        with Image.open(io.BytesIO(gif)) as image:
            assert max(image.size) <= 160
            # The same time: every third frame of 40, each three times as long.
            assert (image.n_frames, image.info["duration"]) == (14, 360)
        path.write_bytes(path.read_bytes()[:76_000])
        _moving(path)  # one that is being written


class TestLoadHistory:
    def test_newest_state_wins(self, tmp_path):
        for folder, step in (("checkpoint-9", 9), ("checkpoint-10", 10), (".", 4)):
            (tmp_path / folder).mkdir(exist_ok=True)
            state = {"global_step": step, "log_history": [train_entry(i) for i in range(1, step + 1)]}
            (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
        assert len(load_history(tmp_path).train) == 10

    def test_steps_logged_twice_count_once(self, tmp_path):
        log = [train_entry(1), train_entry(2), {"step": 2, "reward": 7.0}, {"step": 2, "eval_reward": 1.0}]
        history = load_history(tmp_path, log)
        assert history.series("reward") == ([1.0, 2.0], [0.51, 7.0])
        assert history.series("eval_reward", "eval") == ([2.0], [1.0])

    def test_steps_table(self, tmp_path):
        log = [{"step": 1, "a/step_10": 3.0, "a/step_2": 1.0}, {"step": 2, "reward": 1}, {"step": 3, "a/step_2": 2.0}]
        indices, rows = load_history(tmp_path, log).steps_table("a")
        assert indices == [2, 10]
        assert rows[0] == [1.0, 3.0]
        assert rows[1][0] == 2.0
        assert rows[1][1] != rows[1][1]

    @pytest.mark.parametrize(
        ("others", "titles"),
        [
            ([0.5, 0.5], ["Held-out scores"]),
            ([5.6, 5.9], ["Held-out score: clip", "Held-out score: other"]),
            # 0.1 of rise would be a tenth of the axis.
            ([-0.7, -0.7], ["Held-out score: clip", "Held-out score: other"]),
        ],
    )
    def test_scores_of_different_size_get_panels_of_their_own(self, tmp_path, others, titles):
        log = [
            {"step": step, "eval_rewards/clip/mean": 0.3 + 0.1 * step, "eval_rewards/other/mean": other}
            for step, other in enumerate(others)
        ]
        assert [panel.title for panel in collect_panels(load_history(tmp_path, log))] == titles

    def test_paired_change(self, tmp_path):
        samples = load_history(write_run(tmp_path)).samples
        assert paired_change(samples, "strict") is None, "one pair"
        assert paired_change(samples, "partial") == (0.0, 0.0, 3)
        samples[0].all_scores["partial"] = [0.1, 0.5, None, 0.2]
        samples[-1].all_scores["partial"] = [0.3, 0.5, 0.9, 0.6]
        # Differences 0.2, 0, 0.4: mean 0.2, standard deviation 0.2.
        mean, half, count = paired_change(samples, "partial")
        assert (mean, half, count) == (pytest.approx(0.2), pytest.approx(1.96 * 0.2 / 3**0.5), 3)
        assert paired_change(samples[:1], "partial") is None
        assert paired_change(samples, "unknown") is None

    def test_trained_scores_come_first(self, tmp_path):
        log = [{"step": 0, "eval_rewards/a/mean": 0.1, "eval_rewards/b/mean": 0.1}, {"step": 1, "rewards/b/mean": 0.1}]
        assert load_history(tmp_path, log).eval_names() == ["b", "a"]
        # Before the first update, and in files with sorted keys, the run says what is trained, and in which order.
        log = [{"step": 0} | {f"eval_rewards/{name}/mean": 0.1 for name in "abc"}]
        (tmp_path / "run.json").write_text(json.dumps({"rewards": ["c", "b"]}))
        history = load_history(tmp_path, log)
        assert history.eval_names() == ["c", "b", "a"] and history.watched_names() == ["a"]


def hacked_run(run_dir: Path, scale: float = 1.0) -> Path:
    """Trained on `partial`, `strict` only watched; signalled at 8 and 12, and rolled back to 4."""
    write_run(run_dir)
    state = json.loads((run_dir / "trainer_state.json").read_text())
    log = [{k: v for k, v in entry.items() if not k.startswith("rewards/strict")} for entry in state["log_history"]]
    for entry in log:
        if "eval_reward" in entry:
            entry["eval_rewards/strict/mean"] = scale * (0.48 - 0.01 * entry["step"])
            entry["eval_rewards/strict/std"] = scale * 0.5
            entry["eval_rewards/partial/mean"] = 0.5 + 0.02 * entry["step"]
            if entry["step"]:
                entry["eval_hacking/strict"] = float(entry["step"] >= 8)
    log += [{"step": 12, "eval_rolled_back_to": 4}, {**log[0], "step": 4, "eval_rewards/strict/mean": scale * 0.44}]
    state = {"global_step": 4, "max_steps": 12, "log_history": log}
    (run_dir / "trainer_state.json").write_text(json.dumps(state))
    folder = run_dir / "samples" / "step_000004"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "000.png")
    folder.with_suffix(".json").write_text(json.dumps({"prompts": PROMPTS, "scores": {"strict": [0.125] * 3}}))
    return run_dir


class TestRewardHacking:
    def test_history(self, tmp_path):
        history = load_history(hacked_run(tmp_path))
        assert history.watched_names() == ["strict"]
        assert history.alarms() == {8.0: ["strict"], 12.0: ["strict"]}
        assert history.rolled_back_to == 4
        assert [entry["step"] for entry in history.until(4).eval] == [0, 4]
        assert [entry.step for entry in history.until(4).samples] == [0, 4]

    def test_a_rolled_back_run_has_the_newest_state(self, tmp_path):
        """Beside a checkpoint that was made at the alarm, whose update is a later one."""
        log = json.loads((hacked_run(tmp_path) / "trainer_state.json").read_text())["log_history"][:-3]
        (tmp_path / "checkpoint-12").mkdir()
        state = {"global_step": 12, "log_history": log}
        (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(json.dumps(state))
        assert load_history(tmp_path).rolled_back_to == 4

    @pytest.mark.usefixtures("no_drawings")
    def test_the_page_shows_what_was_left(self, tmp_path):
        page = Page(write_report(hacked_run(tmp_path)))
        assert "12 updates in 1 min 00 s, rolled back to update 4 for reward hacking" in page.text
        assert "0.480 → 0.440" in page.text, "strict at update 4"
        assert "right after 4 updates" in page.text
        assert "0.125" in page.text, "of the pictures of update 4"

    def test_marks(self, tmp_path):
        panels = {panel.title: panel for panel in collect_panels(load_history(hacked_run(tmp_path)))}
        axes = Figure().add_subplot()
        panels["Held-out scores"].draw(axes)
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert set(lines) >= {"partial", "strict", "dashed: watched", "hacking signalled", "rolled back to"}
        assert lines["partial"].get_linestyle() == "-" and lines["strict"].get_linestyle() == "--"
        # Two alarms, of which the legend has one, and the update that the run went back to.
        assert sorted(line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 2) == [4, 8, 12]
        assert "Trained and watched rewards" not in panels

    def test_scores_of_different_size_share_a_panel_in_standard_deviations(self, tmp_path):
        panels = {panel.title: panel for panel in collect_panels(load_history(hacked_run(tmp_path, scale=20.0)))}
        assert {"Held-out score: partial", "Held-out score: strict"} < set(panels)
        axes = Figure().add_subplot()
        panels["Trained and watched rewards"].draw(axes)
        lines = {line.get_label(): line for line in axes.get_lines()}
        # (0.50 + 0.02 * 12 - 0.50) / 0.25, and -20 * 0.01 * 12 / (20 * 0.5).
        assert lines["partial"].get_ydata()[-1] == pytest.approx(0.96)
        assert lines["strict"].get_ydata()[-1] == pytest.approx(-0.24)
        assert {"dashed: watched", "hacking signalled"} < set(lines)

    def test_runs_that_watch_nothing_look_as_before(self, tmp_path):
        history = load_history(write_run(tmp_path))
        assert history.watched_names() == [] and history.alarms() == {} and history.rolled_back_to is None
        assert history.until(None) is history
