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

"""`trl-flow evaluate`: the stock pipeline's pictures, their scores, and a restart that makes nothing twice."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, Features, Value
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from PIL import Image
from tiny import call_arguments, tiny_pipeline

import trl_flow.evaluation
from trl_flow import FlowPolicy, cli
from trl_flow.evaluation import check_settings, load_picture, save_picture, takes_batches
from trl_flow.hub import save_policy
from trl_flow.hub.weights import load_trained
from trl_flow.rewards import load_reward
from trl_flow.rewards.server import RewardServer
from trl_flow.scripts.evaluate import EvaluateArguments, model_version, name_adapters, reward_version, split_list


PROMPTS = ["a red circle", "two blue square", "three green circle", "a blue circle", "two red square"]
TAGS = ["one", "more", "more", "one", "more"]
SAMPLING = {"guidance_scale": 2.0, "height": 16, "width": 16, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    return folder


def save_adapter(model, folder, seed=0):
    torch.manual_seed(seed)  # of what the adapter begins with
    policy = FlowPolicy(AuraFlowPipeline.from_pretrained(model), **SAMPLING)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    save_policy(policy, folder, str(model))
    settings = {"model_name_or_path": str(model), "num_eval_inference_steps": 2, **SAMPLING}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return save_adapter(model, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "tag": tag} for prompt, tag in zip(PROMPTS, TAGS, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def evaluate(adapter, prompts, capfd):
    """Runs the command; gives its exit code, its results if it has some, and what it printed."""

    def run(folder, **settings):
        settings = {
            "adapter": adapter,
            "prompts": prompts,
            "rewards": "pipelines.brightness,pipelines.redness",
            "batch_size": 2,
            "reward_batch_size": 2,
            "output_dir": folder,
            "device": "cpu",
            **settings,
        }
        pairs = [(f"--{name}", str(value)) for name, value in settings.items() if value is not None]
        capfd.readouterr()
        code = cli.main(["evaluate", *(part for pair in pairs for part in pair)])
        results = folder / "results.json"
        return code, json.loads(results.read_text()) if results.is_file() else None, "".join(capfd.readouterr())

    return run


def find(results, **wanted):
    return next(cell for cell in results["results"] if all(cell[name] == value for name, value in wanted.items()))


def stamps(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


class TestArguments:
    @pytest.mark.parametrize(
        "given, expected",
        [
            (["clip,pickscore", "hpsv2"], ["clip", "pickscore", "hpsv2"]),
            (["clip, pickscore,"], ["clip", "pickscore"]),
            (['clip,{"ocr": {"match": "exact", "case": false}},http://h:1/a'], None),
            (['{"a": {"b": [1, 2]}}', "clip"], ['{"a": {"b": [1, 2]}}', "clip"]),
            (None, []),
        ],
    )
    def test_lists_with_commas_and_json(self, given, expected):
        if expected is None:
            expected = ["clip", '{"ocr": {"match": "exact", "case": false}}', "http://h:1/a"]
        assert split_list(given) == expected

    @pytest.mark.parametrize("text, problem", [("{'ocr': {}}", "double quotes"), ('{"a": {}} clip', "a comma")])
    def test_text_that_is_no_list(self, text, problem):
        with pytest.raises(ValueError, match=problem):
            split_list([text])

    @pytest.mark.parametrize(
        "settings, problem",
        [
            ({"model": None}, "--model, an --adapter"),
            ({"prompts": None}, "--prompts"),
            ({"rewards": []}, "--rewards"),
            ({"steps": ["4,many"]}, "whole numbers"),
            ({"steps": ["0"]}, "at least 1"),
            ({"steps": ["4", "4"]}, "twice"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"batch_size": "many"}, "batch_size='many': expected a number of rows, at least 1, or 'auto'"),
            ({"no_base": True}, "nothing to evaluate"),
        ],
    )
    def test_mistakes(self, settings, problem):
        with pytest.raises(ValueError, match=problem):
            EvaluateArguments(**{"model": "shapes", "prompts": "shapes", "rewards": ["shapes"], **settings})

    def test_names_of_adapters(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for folder in ("a/run", "b/run", "b/checkpoint-10", "base"):
            (tmp_path / folder).mkdir(parents=True)
        named = name_adapters(["a/run", "b/run", "b/checkpoint-10", "base", "user/repo@v1"])
        assert list(named) == ["run", "run_2", "b-checkpoint-10", "base_2", "repo"]
        assert named["run_2"] == ("b/run", None) and named["repo"] == ("user/repo", "v1")


class LittleMemory:
    """Transformers that are loaded from here on have room for so many rows, two for each picture with guidance."""

    def __init__(self, monkeypatch, limit):
        self.rows, evaluated = [], AuraFlowTransformer2DModel.forward

        def forward(module, hidden_states, *args, **kwargs):
            if len(hidden_states) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            self.rows.append(len(hidden_states))
            return evaluated(module, hidden_states, *args, **kwargs)

        monkeypatch.setattr(AuraFlowTransformer2DModel, "forward", forward)


def assert_same_pictures(folder, expected):
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.png"))
    assert files and files == sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    for file in files:
        pictures = [np.asarray(Image.open(place / file)).astype(int) for place in (folder, expected)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


class TestMemory:
    def test_a_batch_that_does_not_fit_is_halved(self, evaluate, tmp_path, monkeypatch, caplog):
        """The last batch of five pictures has one, and is left as it is."""
        assert evaluate(tmp_path / "enough", batch_size=4)[0] == 0
        memory = LittleMemory(monkeypatch, limit=4)
        assert evaluate(tmp_path / "little", batch_size=4)[0] == 0
        assert_same_pictures(tmp_path / "little" / "pictures", tmp_path / "enough" / "pictures")
        (warning,) = [record.message for record in caplog.records if "ran out of memory" in record.message]
        assert "Sampling ran out of memory with 4 rows at a time, and goes on with 2" in warning
        assert "batch_size=2 begins with as many" in warning
        # Two steps of two, two and one picture, after a look at whether rows are mixed up.
        made = memory.rows[4:10]
        assert made == [4, 4, 4, 4, 2, 2]

    def test_what_fits_is_found(self, evaluate, tmp_path, monkeypatch):
        assert evaluate(tmp_path / "enough", batch_size=5)[0] == 0
        memory = LittleMemory(monkeypatch, limit=10)
        assert evaluate(tmp_path / "auto", batch_size="auto")[0] == 0
        assert_same_pictures(tmp_path / "auto" / "pictures", tmp_path / "enough" / "pictures")
        assert memory.rows.count(10) == 4  # all five pictures at once, by two models in two steps

    def test_a_single_picture_that_does_not_fit(self, evaluate, tmp_path, monkeypatch):
        LittleMemory(monkeypatch, limit=1)
        with pytest.raises(
            torch.OutOfMemoryError, match="single row. What helps: dtype=bfloat16, or a smaller height"
        ):
            evaluate(tmp_path / "out")


class TestPictures:
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_are_the_stock_pipeline_s_with_noise_of_prompt_and_number_alone(
        self, evaluate, model, adapter, tmp_path, batch_size
    ):
        code, _, _ = evaluate(tmp_path / "out", steps="2,3", images_per_prompt=2, seed=7, batch_size=batch_size)
        assert code == 0
        for name in ("base", "first"):
            pipeline = AuraFlowPipeline.from_pretrained(model)
            pipeline.set_progress_bar_config(disable=True)
            if name == "first":
                load_trained(pipeline, adapter)
            for steps in (2, 3):
                for prompt, number in ((0, 1), (4, 0)):
                    seed = int(np.random.SeedSequence([7, prompt, number]).generate_state(1, np.uint64)[0]) >> 1
                    expected = pipeline(
                        PROMPTS[prompt],
                        num_inference_steps=steps,
                        **SAMPLING,
                        generator=torch.Generator().manual_seed(seed),
                    ).images[0]
                    path = tmp_path / "out" / "pictures" / name / f"{steps}_steps" / f"{prompt:05d}-{number}.png"
                    difference = np.asarray(expected).astype(int) - np.asarray(Image.open(path))
                    assert np.abs(difference).max() <= 1  # a batch rounds differently

    def test_several_prompts_at_once_where_the_pipeline_takes_them(self):
        PartialState(cpu=True)
        assert takes_batches(tiny_pipeline("AuraFlowPipeline"), PROMPTS, SAMPLING)
        assert not takes_batches(tiny_pipeline("AuraFlowPipeline"), ["a red circle"] * 2, SAMPLING)
        name = "Kandinsky5T2IPipeline"  # of two prompts, it guides one by the other
        assert not takes_batches(tiny_pipeline(name), PROMPTS, call_arguments(name))

    def test_videos_are_kept_frame_by_frame(self, tmp_path):
        colors = [(255, 0, 0), (255, 0, 0), (0, 9, 200), (0, 9, 201), (0, 9, 201)]
        save_picture([Image.new("RGB", (8, 6), color) for color in colors], tmp_path / "a.png")
        frames = load_picture(tmp_path / "a.png")
        assert [frame.getpixel((3, 3)) for frame in frames] == colors
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    def test_of_a_video_pipeline(self, evaluate, tmp_path):
        tiny_pipeline("WanPipeline").save_pretrained(tmp_path / "wan")
        code, results, _ = evaluate(
            tmp_path / "out",
            adapter=None,
            model=tmp_path / "wan",
            steps=1,
            num_prompts=2,
            **{name: call_arguments("WanPipeline")[name] for name in ("height", "width", "num_frames")},
        )
        frames = load_picture(tmp_path / "out" / "pictures" / "base" / "1_steps" / "00001-0.png")
        assert code == 0 and len(frames) == call_arguments("WanPipeline")["num_frames"]
        assert find(results, reward="brightness", tag=None)["scored"] == 2


class TestResults:
    def test_means_of_what_lies_on_the_disk(self, evaluate, tmp_path):
        code, results, printed = evaluate(tmp_path / "out", steps="2,3", images_per_prompt=2)
        assert code == 0

        def brightness(model, steps, prompt):
            folder = tmp_path / "out" / "pictures" / model / f"{steps}_steps"
            pictures = [Image.open(folder / f"{prompt:05d}-{i}.png") for i in range(2)]
            return np.mean([np.asarray(picture).mean() / 255 for picture in pictures])

        for steps in (2, 3):
            for tag, chosen in ((None, range(5)), ("one", (0, 3)), ("more", (1, 2, 4))):
                base, trained = (np.array([brightness(name, steps, i) for i in chosen]) for name in ("base", "first"))
                for name, values in (("base", base), ("first", trained)):
                    cell = find(results, model=name, steps=steps, reward="brightness", tag=tag)
                    assert cell["mean"] == pytest.approx(values.mean())
                    assert (cell["pictures"], cell["scored"], cell["failed"]) == (2 * len(chosen), 2 * len(chosen), 0)
                    assert cell["interval"][0] <= cell["mean"] <= cell["interval"][1]
                difference = find(results, model="first", steps=steps, reward="brightness", tag=tag)["difference"]
                assert difference["mean"] == pytest.approx((trained - base).mean())
                assert difference["prompts"] == len(chosen)
                assert difference["mean"] != 0
        assert "first - base" in printed and "brightness" in printed
        markdown = (tmp_path / "out" / "results.md").read_text()
        assert "| steps | model | brightness | redness |" in markdown and "By tag, 3 steps" in markdown
        assert (tmp_path / "out" / "report.html").is_file()

    def test_settings_of_the_run_unless_others_are_given(self, evaluate, tmp_path, model):
        settings = evaluate(tmp_path / "a", num_prompts=2)[1]["settings"]
        assert settings["model"] == str(model) and settings["sampling"] == SAMPLING
        results = evaluate(tmp_path / "b", num_prompts=2, guidance_scale=1.0, steps=1)[1]
        assert results["settings"]["sampling"] == {**SAMPLING, "guidance_scale": 1.0}
        assert {cell["steps"] for cell in results["results"]} == {1}

    def test_missing_scores_are_counted_and_asked_for_again(self, evaluate, tmp_path, monkeypatch):
        (tmp_path / "my_rewards.py").write_text(
            "from pathlib import Path\n"
            "def moody(prompts, **kwargs):\n"
            "    broken = not Path('repaired').exists()\n"
            "    if broken and prompts == ['two blue square']: raise TimeoutError('no answer')\n"
            "    return [None if 'green' in p else float('nan') if broken and 'blue' in p else 1.0 for p in prompts]\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        settings = {"rewards": "my_rewards.moody", "reward_batch_size": 1}
        _, results, printed = evaluate(tmp_path / "out", **settings)
        cell = find(results, model="first", tag=None)
        assert (cell["mean"], cell["scored"], cell["failed"], cell["pictures"]) == (1.0, 2, 2, 5)
        assert cell["difference"] == {"mean": 0.0, "interval": [0.0, 0.0], "prompts": 2}
        assert "2 of 5 pictures scored (2 failed, 1 to which it does not apply)" in printed
        (path,) = (tmp_path / "out" / "scores" / "base" / "2_steps").iterdir()
        assert json.loads(path.read_text())["errors"]["00001-0.png"] == "TimeoutError: no answer"

        (tmp_path / "repaired").touch()
        _, results, _ = evaluate(tmp_path / "out", **settings)
        cell = find(results, model="first", tag=None)
        assert (cell["scored"], cell["failed"], cell["interval"]) == (4, 0, [1.0, 1.0])
        del sys.modules["my_rewards"]

    def test_reward_that_says_nothing(self, evaluate, tmp_path, monkeypatch):
        (tmp_path / "silent_rewards.py").write_text(
            "from trl_flow.rewards import RewardUnavailableError\n"
            "def gone(prompts, **kwargs): raise RewardUnavailableError('refused')\n"
            "def broken(prompts, **kwargs): raise TypeError('a bug')\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        code, results, printed = evaluate(tmp_path / "out", rewards="silent_rewards.gone")
        assert code == 1 and results is None and "reward gone is not available: refused" in printed
        code, results, printed = evaluate(tmp_path / "out", rewards="silent_rewards.broken,pipelines.redness")
        assert code == 0 and "0 of 5 pictures scored (5 failed)" in printed and "says why scores failed" in printed
        assert find(results, reward="broken", tag=None)["mean"] is None
        assert find(results, reward="redness", tag=None)["scored"] == 5

    def test_rewards_that_cannot_be_scored_here(self, evaluate, tmp_path, monkeypatch):
        (tmp_path / "odd_rewards.py").write_text(
            "def wins(prompts, **kwargs): return [0.5] * len(prompts)\n"
            "wins.scope = 'group'\n"
            "def reader(prompts, text, **kwargs): return [0.5] * len(prompts)\n"
            "reader.requires = ('text',)\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        for name, cause in (("wins", "compares the pictures"), ("reader", "needs the column text")):
            code, _, printed = evaluate(tmp_path / "out", rewards=f"odd_rewards.{name}")
            assert code == 1 and cause in printed and not (tmp_path / "out").exists()


@pytest.mark.slow
class TestRestart:
    def test_after_an_error_at_any_picture_or_score(self, evaluate, tmp_path, monkeypatch):
        _, _, _ = evaluate(tmp_path / "whole")
        expected = (tmp_path / "whole" / "results.json").read_bytes()
        for kind, count in (("save_picture", 4), ("score", 3)):
            folder = tmp_path / kind
            real, calls = getattr(trl_flow.evaluation, kind), []

            def stop(*args, real=real, calls=calls, count=count):
                calls.append(args)
                if len(calls) > count:
                    raise KeyboardInterrupt
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(trl_flow.evaluation, kind, stop)
                code, results, printed = evaluate(folder)
            assert code == 130 and results is None and "the same command goes on" in printed
            before = stamps(folder)
            assert len(before) == (4 if kind == "save_picture" else 10)
            assert evaluate(folder)[0] == 0
            assert (folder / "results.json").read_bytes() == expected
            after = stamps(folder)
            assert len(after) == 10 and all(after[path] == stamp for path, stamp in before.items())

    def test_after_a_kill(self, evaluate, tmp_path, adapter, prompts):
        """Steps enough that the process is killed at work."""
        settings = {"rewards": "pipelines.brightness", "steps": 8}
        folder = tmp_path / "killed"
        line = {"adapter": adapter, "prompts": prompts, "batch_size": 2, "reward_batch_size": 2, "device": "cpu"}
        line |= {"output_dir": folder, **settings}
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_flow.cli", "evaluate"]
            + [part for name, value in line.items() for part in (f"--{name}", str(value))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(folder.glob("pictures/*/*/*.png"))) < 3 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "results.json").exists()
        made = len(stamps(folder))
        assert 3 <= made < 10
        assert evaluate(folder, **settings)[0] == evaluate(tmp_path / "whole", **settings)[0] == 0
        assert (folder / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()

    def test_more_of_everything_makes_what_is_missing(self, evaluate, tmp_path, model):
        folder = tmp_path / "out"
        evaluate(folder, num_prompts=2, rewards="pipelines.brightness")
        before = stamps(folder)
        second = save_adapter(model, tmp_path / "second", seed=1)
        code, results, _ = evaluate(folder, adapter=second, steps="2,3", num_prompts=4)
        assert code == 0 and find(results, model="second", steps=3, reward="redness", tag=None)["scored"] == 4
        after = stamps(folder)
        assert all(after[path] == stamp for path, stamp in before.items())
        # A smaller one again finds everything there.
        assert evaluate(folder, num_prompts=2)[0] == 0 and stamps(folder) == after

    def test_other_settings_are_refused_by_name(self, evaluate, tmp_path, model, adapter, prompts):
        folder, run = tmp_path / "out", shutil.copytree(adapter, tmp_path / "run")
        assert evaluate(folder, adapter=run, num_prompts=2)[0] == 0
        for settings, problem in (
            ({"seed": 1}, "seed: 0 there, 1 now"),
            ({"guidance_scale": 5.0}, "sampling: {'guidance_scale': 2.0, "),
        ):
            code, _, printed = evaluate(folder, adapter=run, num_prompts=2, **settings)
            assert code == 1 and problem in printed
        save_adapter(model, run, seed=5)
        assert "adapter run:" in evaluate(folder, adapter=run, num_prompts=2)[2]
        shutil.copytree(adapter, run, dirs_exist_ok=True)
        code, _, printed = evaluate(folder, adapter=run, num_prompts=2)
        assert code == 0, printed
        prompts.write_text(prompts.read_text().replace("two blue", "two green"))
        assert "prompt number 1" in evaluate(folder, adapter=run, num_prompts=2)[2]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").touch()
        assert "something else than an evaluation" in evaluate(tmp_path / "mine")[2]

    def test_after_a_kill_before_anything_was_whole(self, evaluate, tmp_path):
        folder = tmp_path / "out"
        (folder / "pictures").mkdir(parents=True)
        mine, young = folder / ".evaluation.json.123.partial", folder / ".evaluation.json.124.partial"
        for path in (mine, young):
            path.write_text("{")
        os.utime(mine, (time.time() - 3600,) * 2)
        assert "something else than an evaluation" in evaluate(folder, num_prompts=1)[2]
        (folder / "pictures").rmdir()
        foreign = tmp_path / "foreign" / ".letter.partial"
        foreign.parent.mkdir()
        foreign.touch()
        assert "something else than an evaluation" in evaluate(foreign.parent, num_prompts=1)[2] and foreign.exists()
        code, _, printed = evaluate(folder, num_prompts=1)
        assert code == 0, printed
        assert not mine.exists() and young.exists()

    def test_another_base_model_of_the_same_name(self, evaluate, tmp_path, model):
        base, folder = shutil.copytree(model, tmp_path / "base"), tmp_path / "out"
        settings = {"model": base, "adapter": None, "steps": 1, "num_prompts": 2, **SAMPLING}
        assert evaluate(folder, **settings)[0] == 0
        pipeline = AuraFlowPipeline.from_pretrained(base)
        next(pipeline.transformer.parameters()).data[0] += 1e-3
        pipeline.save_pretrained(base)
        code, _, printed = evaluate(folder, **settings)
        assert code == 1 and "model_version: " in printed
        shutil.copytree(model, base, dirs_exist_ok=True)
        (base / ".cache" / "huggingface").mkdir(parents=True)
        (base / ".cache" / "download.lock").touch()
        code, _, printed = evaluate(folder, **settings)
        assert code == 0, printed
        # It may be gone once its pictures are made.
        shutil.rmtree(base)
        assert evaluate(folder, **settings)[0] == 0

    def test_commit_of_a_base_model_on_the_hub(self, tmp_path, monkeypatch):
        """As huggingface_hub keeps what it downloaded: found without a network."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        repository = tmp_path / "models--someone--base"
        (repository / "refs").mkdir(parents=True)
        for commit in ("0123456789" * 4, "abcdef0123" * 4):
            (repository / "snapshots" / commit).mkdir(parents=True)
            (repository / "snapshots" / commit / "model_index.json").write_text("{}")
            (repository / "refs" / "main").write_text(commit)
            assert model_version("someone/base", None) == commit
        assert model_version("someone/base", "0123456789" * 4) == "0123456789" * 4
        assert model_version("someone/other", None) is None

    @pytest.mark.parametrize("in_files", [True, False])
    def test_other_pictures_to_start_from(self, tmp_path, in_files):
        def dataset(color):
            picture = Image.new("RGB", (8, 8), color)
            if in_files:
                picture.save(tmp_path / "picture.png")
                picture = str(tmp_path / "picture.png")
            features = Features({"prompt": Value("string"), "image": datasets.Image()})
            return Dataset.from_dict({"prompt": ["edit it"] * 2, "image": [picture, None]}, features=features)

        folder = tmp_path / "out"
        check_settings(folder, {}, {}, dataset("red"))
        check_settings(folder, {}, {}, dataset("red"))
        with pytest.raises(ValueError, match="prompt number 0"):
            check_settings(folder, {}, {}, dataset("blue"))

    def test_adapters_whose_runs_were_sampled_differently(self, evaluate, tmp_path, model, adapter):
        other = save_adapter(model, tmp_path / "other")
        config = yaml.safe_load((other / "config.yaml").read_text())
        (other / "config.yaml").write_text(yaml.safe_dump({**config, "guidance_scale": 4.5}))
        code, _, printed = evaluate(tmp_path / "out", adapter=f"{adapter},{other}", num_prompts=2)
        assert code == 1 and "guidance_scale=4.5 in the run of other, 2.0" in printed
        code, results, _ = evaluate(tmp_path / "out", adapter=f"{adapter},{other}", num_prompts=2, guidance_scale=1.0)
        assert code == 0 and {cell["model"] for cell in results["results"]} == {"base", "first", "other"}


class TestVersionsOfRewards:
    """Scores of a reward that has changed are not mixed with those that it gave before."""

    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)

        def write(text):
            sys.modules.pop("changing_rewards", None)
            (tmp_path / "changing_rewards.py").write_text(text)
            importlib.invalidate_caches()

        yield write
        sys.modules.pop("changing_rewards", None)

    def test_code(self, evaluate, tmp_path, write):
        settings = {"rewards": "changing_rewards.level", "num_prompts": 3, "steps": 1}
        source = "def level(prompts, **kwargs): return [{}] * len(prompts)\n"
        for value, again in ((0.5, False), (0.125, True), (0.125, False), (0.5, False)):
            write(source.format(value))
            code, results, printed = evaluate(tmp_path / "out", **settings)
            assert code == 0 and ("reward level has other settings, code or weights" in printed) == again
            assert find(results, model="first", tag=None)["mean"] == value
        # More pictures, of the first version and no other.
        _, results, _ = evaluate(tmp_path / "out", **settings | {"num_prompts": 5})
        cell = find(results, model="first", tag=None)
        assert (cell["mean"], cell["interval"], cell["scored"]) == (0.5, [0.5, 0.5], 5)

    @pytest.mark.parametrize("in_folder", [True, False])
    def test_weights(self, evaluate, tmp_path, write, in_folder):
        write(
            "from pathlib import Path\n"
            "class Level:\n"
            "    def __init__(self, weights):\n"
            "        path = Path(weights)\n"
            "        self.value = float((path / 'value.txt' if path.is_dir() else path).read_text())\n"
            "    def __call__(self, prompts, **kwargs): return [self.value] * len(prompts)\n"
        )
        weights = tmp_path / "weights" / "value.txt"
        weights.parent.mkdir()
        spec = json.dumps({"changing_rewards.Level": {"weights": str(weights.parent if in_folder else weights)}})
        for value, again in ((0.5, False), (0.2, True), (0.2, False)):
            weights.write_text(str(value))
            os.utime(weights, (0, 0))  # of the same size and age
            _, results, printed = evaluate(tmp_path / "out", rewards=spec, num_prompts=2, steps=1)
            assert find(results, model="first", tag=None)["mean"] == value
            assert ("its scores are made again" in printed) == again

    def test_texts_that_are_no_paths(self):
        version = reward_version(print, json.dumps({"ocr": {"template": "x" * 5000, "other": "", "third": "a\0b"}}))
        assert len(version) == 12

    def test_tokens_are_written_nowhere_and_may_change(self, evaluate, tmp_path):
        folder, port, files = tmp_path / "out", 0, []
        for token in ("secret-of-today", "secret-of-tomorrow"):
            server = RewardServer(load_reward("pipelines.brightness"), port=port, token=token)
            server.start()
            server.wait_until_ready()
            port = server.server_address[1]
            try:
                spec = json.dumps({"remote": {"url": server.url, "token": token}})
                code, results, printed = evaluate(folder, rewards=spec, num_prompts=2, steps=1)
            finally:
                server.stop()
            assert code == 0 and "made again" not in printed and "secret" not in printed
            # By the name of the reward behind the address.
            assert find(results, model="first", tag=None)["reward"] == "brightness"
            assert results["settings"]["rewards"] == {"brightness": json.dumps({"remote": {"url": server.url}})}
            contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert len(contents) > 8 and not any(b"secret" in content for content in contents.values())
            files.append({path: content for path, content in contents.items() if "scores" in path.parts})
        assert files[0] == files[1] and len(files[0]) == 2
