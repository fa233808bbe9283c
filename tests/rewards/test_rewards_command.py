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

"""`trl-flow rewards`: what the check finds, and a reward from its template to the Hub and back."""

import dataclasses
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

from trl_flow import cli
from trl_flow.rewards import REWARDS, Reward, load_reward
from trl_flow.rewards.check import PROMPTS, check_reward, draw
from trl_flow.rewards.server import RewardServer
from trl_flow.scripts.rewards import NamedReward, RewardsParser, ServeArguments


def brightness(image) -> float:
    return float(np.asarray(image).mean())


def verdicts(reward, **kwargs) -> dict[str, str]:
    """What failed, and what was said about it."""
    return {finding.check: finding.text for finding in check_reward(reward, **kwargs) if finding.passed is False}


class TestCheck:
    def test_a_fine_reward(self):
        def reward(prompts, images, completions, trainer_state, log_extra, log_metric):
            log_extra("column", prompts)
            log_metric("name", trainer_state.global_step)
            return [
                np.float32(brightness(image)) if '"' in prompt else None
                for prompt, image in zip(prompts, images, strict=True)
            ]

        findings = {finding.check: finding for finding in check_reward(reward)}
        assert [finding.check for finding in findings.values() if finding.passed] == [
            "scores",
            "pictures",
            "determinism",
            "order",
            "batching",
            "range",
        ]
        assert findings["scores"].text.startswith("numbers for 4 of 8 pictures")
        drawn = [brightness(draw(prompt, (256, 256), seed)) for seed, prompt in enumerate(PROMPTS) if '"' in prompt]
        assert findings["range"].text.startswith(f"{min(drawn):.4g} to {max(drawn):.4g}")
        assert findings["speed"].passed is None

    def test_an_asynchronous_one(self):
        async def reward(prompts, images, **kwargs):
            return [brightness(image) for image in images]

        assert verdicts(reward) == {}

    def test_one_for_videos(self):
        def reward(prompts, images, videos, **kwargs):
            return [brightness(video[0]) * len(video) for video in videos]

        assert verdicts(reward) == {}

    def test_one_that_differs_each_time(self):
        calls = []

        def reward(prompts, images, **kwargs):
            calls.append(1)
            return [brightness(image) + 10 * len(calls) for image in images]

        found = verdicts(reward)
        assert found["determinism"].startswith("called again, scores differ by up to 10;")

    def test_noise_far_below_the_range_is_rounding(self):
        noise = np.random.default_rng(0)

        def reward(prompts, images, size=1e-4, **kwargs):
            return [brightness(image) + size * noise.standard_normal() for image in images]

        assert verdicts(reward) == {}
        assert set(verdicts(lambda prompts, images, **kwargs: reward(prompts, images, size=10))) >= {"determinism"}

    def test_one_that_depends_on_the_batch(self):
        def reward(prompts, images, **kwargs):
            values = [brightness(image) for image in images]
            return [value / max(values) for value in values]

        assert list(verdicts(reward)) == ["batching"]
        assert "one picture at a time" in verdicts(reward)["batching"]

    def test_one_that_depends_on_the_order(self):
        def reward(prompts, images, **kwargs):
            return [brightness(image) * (i + 1) for i, image in enumerate(images)]

        assert set(verdicts(reward)) == {"order", "batching"}

    def test_one_that_sometimes_has_no_score(self):
        def reward(prompts, images, **kwargs):
            return [brightness(image) if len(images) > 1 else math.nan for image in images]

        assert verdicts(reward) == {"batching": "there are scores where there were none, or the other way round"}

    @pytest.mark.parametrize(
        "reward, message",
        [
            (lambda prompts, images, **kwargs: [1.0] * (len(images) + 1), "returned 9 scores for 8 pictures"),
            (lambda prompts, images, **kwargs: 1.0, "returned a float: expected a list of 8 numbers"),
            (lambda prompts, images, **kwargs: "12345678", "returned a str"),
            (lambda prompts, images, **kwargs: ["1.0"] * len(images), "returned '1.0' (str): expected numbers"),
            (lambda prompts, images, **kwargs: [[1.0, 2.0]] * len(images), "returned [1.0, 2.0] (list)"),
            (lambda prompts, images, **kwargs: [math.inf] * len(images), "infinite"),
            (lambda prompts, images, **kwargs: [None] * len(images), "none for any of 8 pictures"),
            (lambda prompts, images, **kwargs: [1 / 0], "raised ZeroDivisionError: division by zero"),
            (lambda prompts, images: [1.0], "a reward takes **kwargs"),
        ],
    )
    def test_one_that_breaks_the_protocol(self, reward, message):
        (finding,) = check_reward(reward)
        assert finding.check == "scores" and finding.passed is False and message in finding.text

    def test_one_that_hides_its_errors(self):
        def reward(prompts, images, **kwargs):
            try:
                return [image.no_such_attribute for image in images]
            except AttributeError:
                return [0.0] * len(images)

        found = verdicts(reward)
        assert list(found) == ["range"] and found["range"].startswith(
            "0 for all drawn pictures: nothing can be learned"
        )

    def test_one_that_scores_a_single_picture_is_not_called_constant(self):
        def reward(prompts, images, **kwargs):
            return [1.0 if "lemons" in prompt else None for prompt in prompts]

        assert verdicts(reward) == {}
        found = {finding.check: finding for finding in check_reward(reward)}["range"]
        assert found.passed is None and found.text == "1 for the only picture with a score"

    def test_one_that_only_fails_for_one_picture(self):
        def reward(prompts, images, **kwargs):
            return [brightness(image) for image in images] if len(images) > 1 else brightness(images[0])

        assert verdicts(reward) == {"batching": "returned a float: expected a list of 1 numbers or None"}

    def test_one_that_paints(self):
        def reward(prompts, images, **kwargs):
            scores = [brightness(image) for image in images]
            for image in images:
                image.paste((0, 0, 0), (0, 0, 9, 9))
            return scores

        assert verdicts(reward) == {"pictures": "changed: other rewards get them, too"}

    def test_one_that_needs_columns(self):
        class Target(Reward):
            requires = ("target",)

            def __call__(self, prompts, images, target, **kwargs):
                return [brightness(image) - wanted for image, wanted in zip(images, target, strict=True)]

        assert verdicts(Target()) == {
            "columns": "it needs target, which the prompts have not (--prompts names others)"
        }
        rows = [{"prompt": "a", "target": 10 * number} for number in range(4)]
        assert verdicts(Target(), rows=rows) == {}

    def test_one_that_compares_groups(self):
        class Rank(Reward):
            scope = "group"

            def __call__(self, prompts, images, **kwargs):
                assert len(images) == 8 and len(set(prompts)) == 1
                values = [brightness(image) for image in images]
                return [sum(value > other for other in values) for value in values]

        findings = check_reward(Rank())
        assert all(finding.passed is not False for finding in findings)
        assert "batching" not in [finding.check for finding in findings]

    def test_is_prepared_first(self):
        class Prepared(Reward):
            device = None

            def prepare(self, device):
                self.device = device

            def __call__(self, prompts, images, **kwargs):
                return [brightness(image) if self.device.type == "cpu" else None for image in images]

        assert verdicts(Prepared()) == {}

    @pytest.mark.parametrize("size", [(32, 32), (256, 128)])
    def test_drawn_pictures_differ(self, size):
        pictures = [draw(prompt, size, seed) for seed, prompt in enumerate(PROMPTS)]
        assert all(picture.size == size and picture.mode == "RGB" for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == len(PROMPTS)
        assert draw(PROMPTS[0], size, 0).tobytes() == pictures[0].tobytes()


class TestCommand:
    def test_list_has_every_reward_on_a_line(self, capsys):
        assert cli.main(["rewards", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[: len(REWARDS)]] == list(REWARDS)
        needs = {line.split()[0]: line.partition(" Needs ")[2] for line in lines[: len(REWARDS)]}
        assert needs["ocr"] == "pip install 'trl-flow[ocr]'." and needs["remote"] == "setting url."
        assert needs["jpeg_size"] == ""

    @pytest.mark.parametrize("name", REWARDS)
    def test_show_a_built_in_reward(self, name, capsys):
        assert cli.main(["rewards", "show", name]) == 0
        output = capsys.readouterr().out
        assert output.startswith(name) and "definition  " in output and "It does not say" not in output

    def test_show_settings(self, capsys):
        cli.main(["rewards", "show", "ocr"])
        output = capsys.readouterr().out
        assert all(f"\n{name} " in output for name in ("scale", "source", "license", "hacked by", "prompt set"))
        assert 'match: "exact"' in output and "match (`str`" in output

    def test_template_passes_the_check(self, tmp_path, capsys):
        directory = tmp_path / "mine"
        assert cli.main(["rewards", "new", str(directory), "--license", "mit"]) == 0
        assert "license: mit" in (directory / "README.md").read_text()
        assert cli.main(["rewards", "check", str(directory), "--trust_remote_code"]) == 0
        output = capsys.readouterr().out
        assert "FAILED" not in output and "Passes: " in output and str(directory) in output
        assert cli.main(["rewards", "new", str(directory)]) == 1
        assert "there already, and not empty" in capsys.readouterr().err
        # The paper's definition, computed apart: M = sigma + 0.3 mu of rg = R - G and yb = (R + G) / 2 - B.
        noise = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
        r, g, b = (noise[..., i].astype(float) for i in range(3))
        rg, yb = r - g, 0.5 * (r + g) - b
        expected = math.sqrt(rg.var() + yb.var()) + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
        reward = load_reward(str(directory), trust_remote_code=True)
        assert reward(["a"], [Image.fromarray(noise)]) == [pytest.approx(expected)]

    def test_check_without_consent(self, tmp_path, capsys):
        cli.main(["rewards", "new", str(tmp_path / "mine")])
        assert cli.main(["rewards", "check", str(tmp_path / "mine")]) == 1
        assert "no consent to run it" in capsys.readouterr().err

    def test_check_that_fails(self, tmp_path, capsys):
        (tmp_path / "reward.py").write_text("def reward(prompts, images, **kwargs):\n    return [1.0]\n")
        assert cli.main(["rewards", "check", str(tmp_path), "--trust_remote_code"]) == 1
        output = capsys.readouterr().out
        assert "FAILED" in output and "Fails: scores: returned 1 scores for 8 pictures" in output

    @pytest.mark.parametrize(
        "score, verdict",
        [
            ("1.0", "Fails: range: 1 for all drawn pictures"),
            ("i.getpixel((9, 9))[0]", "Passes: its scores are numbers, not all alike, and none depends on the other"),
            (
                "1.0 if 'lemons' in p else None",
                "Passes: its scores are numbers, too few to differ, and none depends on",
            ),
        ],
    )
    def test_what_the_last_line_claims(self, tmp_path, capsys, score, verdict):
        code = f"def reward(prompts, images, **kwargs):\n    return [{score} for p, i in zip(prompts, images)]\n"
        (tmp_path / "reward.py").write_text(code)
        code = cli.main(["rewards", "check", str(tmp_path), "--trust_remote_code"])
        assert code == (1 if verdict.startswith("Fails") else 0)
        assert verdict in capsys.readouterr().out.splitlines()[-1]

    def test_check_with_settings_rows_and_size(self, tmp_path, capsys):
        (tmp_path / "reward.py").write_text(
            "from trl_flow.rewards import Reward\n\n\nclass Size(Reward):\n    requires = ('target',)\n\n"
            "    def __init__(self, factor=1.0):\n        self.factor = factor\n\n"
            "    def __call__(self, prompts, images, target, **kwargs):\n"
            "        return [self.factor * image.width + t for image, t in zip(images, target)]\n\n\nreward = Size\n"
        )
        rows = [{"prompt": f"prompt {number}", "target": number} for number in range(5)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["rewards", "check", str(tmp_path), "--trust_remote_code", "--settings", '{"factor": 100}']
        assert cli.main(arguments) == 1
        assert "needs target" in capsys.readouterr().out
        arguments += ["--prompts", str(tmp_path / "rows.jsonl"), "--num_prompts", "3", "--image_size", "16"]
        assert cli.main(arguments) == 0
        output = capsys.readouterr().out
        assert "1600 to 1602" in output and "3 at once" in output

    def test_check_a_built_in_reward_on_its_own_prompts(self, capsys):
        # Pictures of the shapes world have a size of their own, and prompts that it understands.
        assert cli.main(["rewards", "check", "shapes"]) == 0
        assert cli.main(["rewards", "check", "jpeg_size", "--settings", '{"goal": "incompressible"}']) == 0

    @pytest.mark.parametrize(
        "args, message",
        [
            ([], "name an action: list, show, new, check, push, serve"),
            (["chekc"], "unknown action 'chekc'. Did you mean check?"),
            (["check", "shapes", "--setings", "{}"], "unknown argument --setings on the command line. Did you mean"),
            (["check", "shapes", "surplus"], "unexpected value 'surplus'"),
            (["new"], "--directory"),
        ],
    )
    def test_wrong_command_line(self, args, message, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["rewards", *args])
        assert caught.value.code == 2 and message in capsys.readouterr().err

    @pytest.mark.parametrize(
        "args, message",
        [
            (["check", "shapes", "--settings", "{"], "settings='{' is no JSON"),
            (["check", "shapes", "--settings", "[1]"], "expected names and values in braces"),
            (["check", "shapes", "--num_prompts", "1"], "num_prompts=1"),
            (["check", "no_such_reward"], "'no_such_reward' is unknown"),
            (["show", "no_such_reward"], "'no_such_reward' is unknown"),
            (["push", "mine", "user/mine", "--settings", "{"], "settings='{' is no JSON"),
            (["push", "mine", "user/mine", "--no_check", "--prompts", "ocr"], "are for the check alone"),
        ],
    )
    def test_wrong_values(self, args, message, capsys):
        assert cli.main(["rewards", *args]) == 1
        assert message in capsys.readouterr().err


class TestPush:
    @pytest.fixture
    def directory(self, tmp_path):
        cli.main(["rewards", "new", str(tmp_path / "mine")])
        return tmp_path / "mine"

    # Nothing of this reaches a Hub.
    def test_refuses_what_others_should_not_get(self, directory, capsys):
        command = ["rewards", "push", str(directory), "user/mine", "--trust_remote_code"]
        (directory / "weights.pt").touch()
        assert cli.main(command) == 1
        assert "weights.pt: files of this kind can run code" in capsys.readouterr().err
        (directory / "weights.pt").unlink()
        (directory / "README.md").write_text("# Mine\n")
        assert cli.main(command) == 1
        assert "lacks the tag trl-flow-reward" in capsys.readouterr().err
        (directory / "README.md").unlink()
        assert cli.main(command) == 1
        assert "holds no README.md" in capsys.readouterr().err

    def test_refuses_what_fails_the_check(self, directory, capsys):
        (directory / "reward.py").write_text("def reward(prompts, images, **kwargs):\n    return [None]\n")
        assert cli.main(["rewards", "push", str(directory), "user/mine", "--trust_remote_code"]) == 1
        assert "Not pushed" in capsys.readouterr().err
        (directory / "reward.py").write_text(
            "def reward(prompts, images, **kwargs):\n    return [0.0] * len(images)\n"
        )
        assert cli.main(["rewards", "push", str(directory), "user/mine", "--trust_remote_code"]) == 1
        assert "Not pushed" in capsys.readouterr().err
        assert cli.main(["rewards", "push", str(directory), "user/mine"]) == 1
        assert "no consent" in capsys.readouterr().err

    def test_from_the_template_to_the_hub_and_back(self, tmp_path):
        script = """
            import pathlib, sys
            from trl_flow.cli import main

            mine = pathlib.Path("mine")
            assert main(["rewards", "new", "mine"]) == 0
            assert main(["rewards", "push", "mine", "user/mine", "--trust_remote_code", "--private"]) == 0
            for name in (".git/config", "sub/.hidden", "sub/__pycache__/x.cpython-311.pyc", "words.txt"):
                (mine / name).parent.mkdir(parents=True, exist_ok=True)
                (mine / name).write_text("x")
            (mine / "reward.py").write_text(pathlib.Path("red.py").read_text())
            pathlib.Path("rows.jsonl").write_text('{"prompt": "a", "target": 1}\\n{"prompt": "b", "target": 2}\\n')
            options = ["--trust_remote_code", "--revision", "next", "--message", "With a column and a setting"]
            needed = ["--settings", '{"scale": 2}', "--prompts", "rows.jsonl"]
            assert main(["rewards", "push", "mine", "user/mine", *options]) == 1
            assert main(["rewards", "push", "mine", "user/mine", *options, *needed[:2]]) == 1
            assert main(["rewards", "push", "mine", "user/mine", *options, *needed]) == 0
            (mine / "reward.py").write_text("def reward(prompts, images, **kwargs):\\n    return []\\n")
            assert main(["rewards", "push", "mine", "user/mine", "--trust_remote_code"]) == 1
            assert main(["rewards", "push", "mine", "user/unchecked", "--no_check"]) == 0
            assert main(["rewards", "check", "user/mine", "--trust_remote_code"]) == 0
            assert main(["rewards", "check", "user/mine", "--revision", "next", "--trust_remote_code", *needed]) == 0
            assert main(["rewards", "check", "user/unchecked", "--trust_remote_code"]) == 1
        """
        (tmp_path / "red.py").write_text(
            "from trl_flow.rewards import Reward\n\n\nclass Red(Reward):\n    requires = ('target',)\n\n"
            "    def __init__(self, scale):\n        self.scale = scale\n\n"
            "    def __call__(self, prompts, images, target, **kwargs):\n"
            "        return [self.scale * image.getpixel((9, 9))[0] + t for image, t in zip(images, target)]\n\n\n"
            "reward = Red\n"
        )
        with LoopbackHub() as hub:
            result = hub.run(script, cwd=tmp_path)
            repository = hub.repositories["model", "user/mine"]
        assert repository.private and not hub.repositories["model", "user/unchecked"].private
        main, later = repository.find("main"), repository.find("next")
        assert set(main.files) == {".gitattributes", "README.md", "requirements.txt", "reward.py"}
        assert set(later.files) == {*main.files, "words.txt"} and later.message == "With a column and a setting"
        assert b"- trl-flow-reward\n" in main.files["README.md"]
        assert b"library_name: trl-flow\n" in main.files["README.md"]
        pinned = re.findall(r"^user/mine@\w+$", result.stdout, re.MULTILINE)
        assert pinned == [f"user/mine@{main.sha}", f"user/mine@{later.sha}"]
        assert f"{hub.url}/user/mine" in result.stdout
        assert f"repository user/mine, revision {main.sha}" in result.stdout


def test_serve_has_all_settings_of_the_server():
    wanted = inspect.signature(RewardServer).parameters
    fields = {field.name: field.default for field in dataclasses.fields(ServeArguments)}
    shared = {field.name for field in dataclasses.fields(NamedReward)}
    assert fields.keys() - shared == wanted.keys() - {"reward", "spec"}
    assert all(fields[name] == wanted[name].default for name in fields.keys() - shared)


def test_serve():
    """Settings reach the servers, which run until they are told to stop."""
    command = [sys.executable, "-m", "trl_flow.cli", "rewards", "serve", '{"jpeg_size": {"quality": 30}}', "shapes"]
    command += ["--port", "0", "--max_images", "2", "--token", "secret", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        url, second = (re.search(r"http://\S+", process.stdout.readline())[0] for _ in range(2))
        pictures = [draw(prompt, (64, 64), seed) for seed, prompt in enumerate(PROMPTS[:2])]
        served = load_reward(url, token="secret")(prompts=PROMPTS[:2], images=pictures)
        assert served == pytest.approx(load_reward("jpeg_size", quality=30)(prompts=PROMPTS[:2], images=pictures))
        assert load_reward(second, token="secret").name == "shapes"
        request = urllib.request.Request(url, headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["batch_size"] == 2  # no more than --max_images
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_what_is_served_where():
    def served(*args):
        function, arguments = RewardsParser().parse_args_and_config(["serve", *args])
        return [
            (each["spec"], each["device"], len(each["reward"]) if isinstance(each["reward"], list) else 1)
            for each in arguments.load_all()
        ]

    small = {"jpeg_size": {"quality": 30}}
    assert served("jpeg_size", "--settings", '{"quality": 30}') == [(small, None, 1)]
    assert served("jpeg_size", "--device", "cpu", "cpu:0") == [({"jpeg_size": {}}, ["cpu", "cpu:0"], 2)]
    two = ["jpeg_size", json.dumps(small), "--device"]
    assert served(*two, "cpu") == [({"jpeg_size": {}}, "cpu", 1), (small, "cpu", 1)]
    assert served(*two, "cpu", "cpu:0") == [({"jpeg_size": {}}, "cpu", 1), (small, "cpu:0", 1)]
    for wrong, message in (
        (["ocr", "clip", "--settings", '{"match": "exact"}'], "settings: of which of 2 rewards"),
        (["a/b", "a/c", "--revision", "main"], "revision: of which of 2 rewards"),
        (
            ["a/b", "a/c", "a/d", "--device", "cpu", "cpu"],
            "2 devices for 3 rewards: expected one for all, or one for each",
        ),
        (
            ['{"clip": {"device": "cpu"}}', "--device", "cpu"],
            "reward='clip' has a device in its settings, and device=",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            served(*wrong)
