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

"""Modules of the evaluate library as rewards: the same gate, and scores that are the module's own."""

import json

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

from trl_flow.rewards import load_reward
from trl_flow.rewards.check import check_reward


MODULE = """
import os

import datasets
import evaluate
import numpy as np

from .helping import SCALE

open(os.environ["WITNESS"], "a").write("ran")


class {name}(evaluate.{kind}):
    def _info(self):
        return evaluate.MetricInfo(
            description="Looks.", citation="", inputs_description="", features=datasets.Features({features})
        )

    def _compute(self, {arguments}):
        {body}
"""
PER_SAMPLE = {
    "name": "Brightness",
    "kind": "Measurement",
    "features": '{"data": datasets.Image()}',
    "arguments": "data, plus=0.0",
    "body": 'return {"brightness": [float(np.asarray(image).mean()) * SCALE + plus for image in data]}',
}
# One number for all samples, from images and text, as arrays.
FOR_ALL = {
    "name": "Words",
    "kind": "Metric",
    "features": '{"predictions": datasets.Array3D((None, 4, 3), "uint8"), "references": datasets.Value("string")}',
    "arguments": "predictions, references",
    "body": "if 'fail' in references:\n            raise RuntimeError('failed')\n        "
    "return {'words': float(np.mean([len(text.split()) for text in references])), "
    "'red': float(np.mean([np.asarray(p)[..., 0].mean() for p in predictions])), 'n': len(predictions)}",
}
# Compares with a column of the dataset.
WITH_COLUMN = {
    "name": "Distance",
    "kind": "Metric",
    "features": '{"predictions": datasets.Image(), "target": datasets.Value("float32")}',
    "arguments": "predictions, target",
    "body": 'return {"distance": np.array([abs(np.asarray(p).mean() - t) for p, t in zip(predictions, target)])}',
}
PICTURES = [Image.new("RGB", (4, 4), (10 * number, 0, 250)) for number in range(3)]


def code(module: dict) -> str:
    text = MODULE
    for name, value in module.items():
        text = text.replace("{" + name + "}", value)
    return text


@pytest.fixture(autouse=True)
def witness(tmp_path, monkeypatch):
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    return tmp_path / "witness"


def write(tmp_path, module: dict, scale: float = 1.0) -> str:
    directory = tmp_path / module["name"].lower()
    directory.mkdir(exist_ok=True)
    (directory / f"{directory.name}.py").write_text(code(module))
    (directory / "helping.py").write_text(f"SCALE = {scale}\n")
    return f"evaluate:{directory}"


class TestDirectory:
    def test_one_score_per_picture(self, tmp_path):
        reward = load_reward(write(tmp_path, PER_SAMPLE, scale=2.0), trust_remote_code=True)
        noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        # Lossless, even for a picture that came out of a JPEG file.
        Image.fromarray(noise).save(tmp_path / "noise.jpg")
        compressed = Image.open(tmp_path / "noise.jpg")
        images = [*PICTURES, compressed]
        expected = [2 * np.asarray(image).mean() for image in images]
        assert reward(prompts=["a"] * 4, images=images) == pytest.approx(expected, rel=1e-12)
        assert reward.about.definition == "Looks." and reward.requires == ()
        assert all(finding.passed in (True, None) for finding in check_reward(reward))

    def test_arguments_of_the_module(self, tmp_path):
        reward = load_reward({write(tmp_path, PER_SAMPLE): {"arguments": {"plus": 5}}}, trust_remote_code=True)
        assert reward(["a"], PICTURES[:1]) == [pytest.approx(np.asarray(PICTURES[0]).mean() + 5)]

    def test_one_number_for_all_means_one_call_for_each(self, tmp_path):
        spec = write(tmp_path, FOR_ALL)
        prompts = ["one", "two words", "now three words"]
        reward = load_reward({spec: {"score": "words"}}, trust_remote_code=True)
        assert reward(prompts, PICTURES) == [1, 2, 3]
        assert reward(prompts[:1], PICTURES[:1]) == [1]
        reward = load_reward({spec: {"score": "red"}}, trust_remote_code=True)
        assert reward(prompts[:1], PICTURES[1:2]) == [10]
        assert reward(prompts, PICTURES) == [0, 10, 20]

    def test_a_failed_call_leaves_nothing_behind(self, tmp_path):
        reward = load_reward({write(tmp_path, FOR_ALL): {"score": "n"}}, trust_remote_code=True)
        with pytest.raises(RuntimeError, match="failed"):
            reward(["fail"], PICTURES[:1])
        with pytest.raises(ValueError):
            reward(["text"], [Image.new("RGB", (9, 9))])
        assert reward(["fine"], PICTURES[:1]) == [1]

    def test_a_column_of_the_dataset(self, tmp_path):
        spec = write(tmp_path, WITH_COLUMN)
        reward = load_reward(spec, trust_remote_code=True)
        means = [np.asarray(image).mean() for image in PICTURES]
        assert reward.requires == ("target",)
        scores = reward(["a"] * 3, PICTURES, target=[mean - 1 for mean in means], unused=[1, 2, 3])
        assert scores == pytest.approx([1, 1, 1], abs=1e-4)
        renamed = load_reward({spec: {"inputs": {"target": "wanted"}}}, trust_remote_code=True)
        assert renamed.requires == ("wanted",)
        assert renamed(["a"], PICTURES[:1], wanted=[0.0]) == pytest.approx(means[:1])
        with pytest.raises(ValueError, match="needs the column wanted"):
            renamed(["a"], PICTURES[:1])

    @pytest.mark.parametrize("trust", [False, None])
    def test_nothing_runs_without_consent(self, tmp_path, witness, trust):
        spec = write(tmp_path, PER_SAMPLE)
        with pytest.raises(ValueError, match="no consent to run it"):
            load_reward(spec, trust_remote_code=trust)
        assert not witness.exists()
        file = f"{spec}/{PER_SAMPLE['name'].lower()}.py"
        with pytest.raises(ValueError, match="no consent to run it"):
            load_reward(file, trust_remote_code=trust)
        assert not witness.exists()
        assert load_reward(file, trust_remote_code=True)(["a"], PICTURES[:1]) == [pytest.approx(250 / 3)]
        assert witness.exists()

    def test_the_revision_of_a_file_is_that_of_what_it_imports(self, tmp_path):
        directory = tmp_path / "brightness"
        write(tmp_path, PER_SAMPLE)
        (directory / "parts" / "deep").mkdir(parents=True)
        (directory / "helping.py").write_text("from .parts.deep import number\nSCALE = number.ONE\n")
        (directory / "parts" / "__init__.py").write_text("")
        (directory / "parts" / "deep" / "number.py").write_text("from ...one import ONE\n")
        (directory / "one.py").write_text("ONE = 1\n")
        (directory / "train.py").write_text("import helping\n")

        def load():
            return load_reward(f"evaluate:{directory / 'brightness.py'}", trust_remote_code=True)

        first = load()
        for unrelated in ("train.py", "parts/other.py", "words.txt", "__init__.py"):
            (directory / unrelated).write_text("ONE = 2\n")
            assert load().source == first.source, unrelated
        revisions = {first.source["revision"]}
        for own in ("brightness.py", "helping.py", "parts/__init__.py", "parts/deep/number.py", "one.py"):
            text = (directory / own).read_text()
            (directory / own).write_text(text.replace("ONE = 1", "ONE = 2") + "\n")
            revisions.add(load().source["revision"])
        assert len(revisions) == 6
        assert [reward(["a"], PICTURES[:1])[0] for reward in (first, load())] == pytest.approx([250 / 3, 500 / 3])
        # Of a directory everything counts.
        whole = load_reward(f"evaluate:{directory}", trust_remote_code=True).source
        (directory / "train.py").write_text("ONE = 3\n")
        assert load_reward(f"evaluate:{directory}", trust_remote_code=True).source != whole

    def test_a_file_without_python_in_it(self, tmp_path):
        (tmp_path / "broken.py").write_text("from . import (\n")
        with pytest.raises(ValueError, match="broken.py could not be imported .SyntaxError"):
            load_reward(f"evaluate:{tmp_path / 'broken.py'}", trust_remote_code=True)

    @pytest.mark.parametrize(
        "module, settings, message",
        [
            (PER_SAMPLE, {"scroe": "x"}, "has no setting scroe: expected score, inputs"),
            (PER_SAMPLE, {"inputs": {"pictures": "images"}}, "has no input pictures: expected data"),
            (PER_SAMPLE, {"inputs": {"data": "prompts"}}, "can't be given images as any input"),
            (FOR_ALL, {"inputs": {"references": "images"}}, "can't be given images as predictions, references"),
        ],
    )
    def test_settings_that_do_not_fit(self, tmp_path, module, settings, message):
        with pytest.raises(ValueError, match=message):
            load_reward({write(tmp_path, module): settings}, trust_remote_code=True)

    def test_which_score(self, tmp_path):
        spec = write(tmp_path, FOR_ALL)
        with pytest.raises(ValueError, match="returns words, red, n: say which with `score`"):
            load_reward(spec, trust_remote_code=True)(["a"], PICTURES[:1])
        with pytest.raises(ValueError, match="returns no 'green', but words, red, n"):
            load_reward({spec: {"score": "green"}}, trust_remote_code=True)(["a"], PICTURES[:1])

    def test_no_module(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no empty.py, only nothing"):
            load_reward(f"evaluate:{tmp_path / 'empty'}", trust_remote_code=True)
        (tmp_path / "empty" / "empty.py").write_text("from evaluate import Metric\n")
        with pytest.raises(ValueError, match="empty.py defines no evaluate.Metric"):
            load_reward(f"evaluate:{tmp_path / 'empty'}", trust_remote_code=True)
        with pytest.raises(ValueError, match="'evaluate:evaluate-metric/accuracy'"):
            load_reward("evaluate:accuracy", trust_remote_code=True)
        with pytest.raises(ValueError, match="neither a directory nor the id"):
            load_reward("evaluate:../accuracy", trust_remote_code=True)


SCRIPT = """
import json, os, sys
from PIL import Image
from trl_flow.rewards import load_reward

results, loaded = {}, {}
for name, (spec, kwargs) in json.loads(sys.argv[1]).items():
    try:
        loaded[name] = load_reward(spec, **kwargs)
        results[name] = {"source": loaded[name].source}
    except ValueError as error:
        results[name] = {"error": str(error)}
    results[name]["ran"] = os.path.exists(os.environ["WITNESS"])
for name, reward in loaded.items():
    results[name]["scores"] = reward(["a"], [Image.new("RGB", (2, 2), (30, 30, 30))])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_from_a_space(tmp_path, witness):
    with LoopbackHub() as hub:
        files = {"brightness.py": code(PER_SAMPLE), "app.py": "1 / 0\n", "requirements.txt": "gradio\ngit+https://x\n"}
        first = hub.add("space", "user/brightness", {**files, "helping.py": "SCALE = 1\n"})
        second = hub.add("space", "user/brightness", {"helping.py": "SCALE = 2\n"})
        spec, trust = "evaluate:user/brightness", {"trust_remote_code": True}
        cases = {
            "refused": (spec, {"trust_remote_code": False}),
            "not asked": (spec, {}),
            "first": (f"{spec}@{first}", trust),
            "second": (spec, trust),
            "as argument": (spec, {"revision": first[:8], **trust}),
            "unknown": ("evaluate:user/nothing", trust),
        }
        result = hub.run(SCRIPT, json.dumps(cases), env={"WITNESS": str(witness)}, cwd=tmp_path)
    found = json.loads(result.stdout.splitlines()[-1])
    for name in ("refused", "not asked"):
        assert "no consent" in found[name]["error"] and not found[name]["ran"]
        assert f"/spaces/user/brightness/tree/{second}" in found[name]["error"]
    for name, sha, scale in (("first", first, 1), ("second", second, 2), ("as argument", first, 1)):
        assert found[name]["source"] == {"space": "user/brightness", "revision": sha}
        assert found[name]["scores"] == [30 * scale] and found[name]["ran"]
    assert "the Hub has no Space of that name" in found["unknown"]["error"]
    assert f"evaluate:user/brightness@{second}" in result.stderr  # how to pin what was loaded by its name
