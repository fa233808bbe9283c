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

import ast
import json
import re

import pytest
import yaml
from hub_metadata import metadata_problems
from huggingface_hub import ModelCard
from PIL import Image

from trl_flow.hub import create_model_card, write_model_card


PAPER = {
    "title": "DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment",
    "id": "2601.20218",
    "citation": """
        @article{deng2026densegrpo,
            title = {{DenseGRPO}},
        }""",
}
METRICS = {
    "before": {"strict": {"mean": 0.479, "std": 0.5, "n": 512}, "partial": 0.744, "lost": {"mean": None}},
    "after": {"strict": {"mean": 0.52, "std": 0.5, "n": 512}, "partial": 0.798, "broken": float("nan")},
}


def write_samples(run_dir):
    folder = run_dir / "samples" / "step_000020"
    folder.mkdir(parents=True)
    prompts = ["a red circle", 'a sign that says "yes: no"', "三角形"]
    for index in range(len(prompts)):
        Image.new("RGB", (32, 32), (60 * index, 80, 90)).save(folder / f"{index:03d}.png")
    folder.with_suffix(".json").write_text(json.dumps({"prompts": prompts, "scores": {}}))
    return prompts


def make_card(run_dir, **changes):
    arguments = {
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "license": "other",
        "pipeline_class_name": "StableDiffusion3Pipeline",
        "method_name": "DenseGRPO",
        "paper": PAPER,
        "datasets": ["user/prompts", "shapes"],
        "reward_names": ["shapes"],
        "metrics": METRICS,
        "config": {
            "learning_rate": 1e-3,
            "hub_token": "secret",
            "output_dir": "/home/me/run",
            "sde_steps": (0, 1),
            "adam_beta1": 0.9,
        },
        "call_arguments": {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 77},
        "tags": ["dense-grpo"],
        "hub_model_id": "user/adapter",
        "steps": 20,
        "seconds": 301.4,
        "nfe": 433_000,
    }
    path = create_model_card(run_dir, **(arguments | changes))
    assert path == run_dir / "README.md"
    return ModelCard.load(path)


class TestCreateModelCard:
    def test_metadata(self, tmp_path):
        prompts = write_samples(tmp_path)
        data = make_card(tmp_path).data
        assert data.library_name == "diffusers"
        assert data.base_model == "stabilityai/stable-diffusion-3.5-medium"
        assert data.base_model_relation == "adapter"
        assert data.pipeline_tag == "text-to-image"
        assert data.license == "other"
        assert {"trl-flow", "lora", "dense-grpo"} <= set(data.tags)
        assert data.datasets == ["user/prompts"], "only Hub ids are valid there"
        assert [entry["text"] for entry in data.widget] == prompts
        for entry in data.widget:
            with Image.open(tmp_path / entry["output"]["url"]) as image:
                assert image.size == (256, 256)

    def test_scores(self, tmp_path):
        card = make_card(tmp_path, reward_names=["strict"], eval_reward_names=["partial"])
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {"strict": 0.52, "partial": 0.798}, "NaN is no valid metadata"
        # 1.96 * 0.5 / sqrt(512) = 0.0433
        assert "| `strict` | trained on | 0.479 ± 0.043 | 0.520 ± 0.043 | +0.041 |" in card.text
        assert "| `partial` | only watched | 0.744 | 0.798 | +0.054 |" in card.text
        assert "512 pictures" in card.text
        assert "nan" not in card.text.lower().split()

    def test_change_is_paired_where_both_evaluations_are_on_disk(self, tmp_path):
        write_samples(tmp_path)
        first = tmp_path / "samples" / "step_000000"
        first.mkdir()
        Image.new("RGB", (8, 8)).save(first / "000.png")
        for step, scores in (("step_000000", [0.1, 0.5, 0.2]), ("step_000020", [0.3, 0.5, 0.6])):
            description = {"prompts": ["a", "b", "c"], "scores": {"strict": scores, "partial": scores}}
            (tmp_path / "samples" / f"{step}.json").write_text(json.dumps(description))
        metrics = {"before": {"strict": 0.8 / 3, "partial": 0.1}, "after": {"strict": 1.4 / 3, "partial": 0.2}}
        text = make_card(tmp_path, metrics=metrics).text
        # Differences 0.2, 0, 0.4: mean 0.2, 1.96 * 0.2 / sqrt(3) = 0.226.
        assert "| `strict` | only watched | 0.267 | 0.467 | +0.200 ± 0.23 |" in text
        assert "| `partial` | only watched | 0.100 | 0.200 | +0.100 |" in text, (
            "of other evaluations than those on disk"
        )

    def test_usage_example_is_python_with_the_call_arguments(self, tmp_path):
        code = re.search(r"```python\n(.*?)```", make_card(tmp_path).text, re.DOTALL)[1]
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        by_name = {ast.unparse(call.func): call for call in calls}
        assert by_name["DiffusionPipeline.from_pretrained"].args[0].value == "stabilityai/stable-diffusion-3.5-medium"
        assert by_name["pipe.load_lora_weights"].args[0].value == "user/adapter"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in by_name["pipe"].keywords}
        assert keywords.pop("generator") and keywords.pop("prompt")
        assert keywords == {"num_inference_steps": "10", "guidance_scale": "1.0", "max_sequence_length": "77"}

    def test_usage_example_for_what_diffusers_cannot_load(self, tmp_path):
        text = make_card(tmp_path, diffusers_format=False).text
        ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
        assert 'load_trained(pipe, "user/adapter")' in text
        assert "pipe.load_lora_weights" not in text

    def test_usage_example_of_two_denoisers_that_animate_a_picture(self, tmp_path):
        settings = {"second_component": "transformer_2", "pipeline_tag": "image-to-video", "guider_scale": 6.0}
        code = re.search(r"```python\n(.*?)```", make_card(tmp_path, **settings).text, re.DOTALL)[1]
        ast.parse(code)
        second = 'pipe.load_lora_weights("user/adapter", subfolder="transformer_2", load_into_transformer_2=True)'
        for line in (
            second,
            "from diffusers.utils import export_to_video, load_image",
            "pipe.guider = pipe.guider.new(guidance_scale=6.0)",
            'export_to_video(video, "video.mp4")',
        ):
            assert line in code.splitlines()
        assert "video = pipe(" in code and 'image=load_image("picture.png")' in code and "image.save" not in code

    def test_usage_example_in_the_precision_of_the_run(self, tmp_path):
        assert '3.5-medium", torch_dtype=torch.bfloat16)' in make_card(tmp_path, dtype="bfloat16").text
        text = make_card(tmp_path, complete_class="SD3Transformer2DModel", dtype="float16").text
        assert text.count("torch_dtype=torch.float16)") == 2
        assert "torch_dtype" not in make_card(tmp_path).text

    def test_usage_example_of_a_complete_denoiser(self, tmp_path):
        text = make_card(tmp_path, complete_class="SD3Transformer2DModel", diffusers_format=False).text
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        ast.parse(code)
        loaded = 'pipe.transformer = SD3Transformer2DModel.from_pretrained("user/adapter", subfolder="transformer")'
        assert loaded in code.splitlines() and "import DiffusionPipeline, SD3Transformer2DModel" in code
        assert "load_adapter" not in code and "load_lora_weights" not in code
        data = ModelCard.load(tmp_path / "README.md").data
        assert data.base_model_relation == "finetune" and "lora" not in data.tags
        assert "holds the trained transformer, all of its weights" in text and "stored" not in text

    def test_the_formats_that_were_saved_decide(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").touch()
        assert "pipe.load_lora_weights" not in make_card(tmp_path).text
        (tmp_path / "pytorch_lora_weights.safetensors").touch()
        assert "pipe.load_lora_weights" in make_card(tmp_path).text

    def test_settings_without_secrets_and_paths(self, tmp_path):
        text = make_card(tmp_path).text
        settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        assert settings == {"learning_rate": 1e-3, "sde_steps": [0, 1]}
        assert "secret" not in text
        assert "/home/me" not in text

    def test_local_base_model_stays_out_of_the_metadata(self, tmp_path):
        base = tmp_path / "somewhere" / "base"
        base.mkdir(parents=True)
        (base / "README.md").write_text("---\nlicense: other\nlicense_name: shape-licence\n---\n")
        card = make_card(
            tmp_path / "run",
            base_model=str(base),
            license=None,
            load_expression="trl_flow.policy.load_pipeline('shapes')",
        )
        assert card.data.base_model is None
        assert card.data.get("base_model_relation") is None
        assert (card.data.license, card.data.license_name) == ("other", "shape-licence")
        assert "somewhere" not in card.content
        assert "import trl_flow.policy\n\npipe = trl_flow.policy.load_pipeline('shapes')\npipe.load" in card.text

    def test_pictures_of_the_report(self, tmp_path):
        assert ".png)" not in make_card(tmp_path).text
        for name in ("curves", "before_after"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        text = make_card(tmp_path).text
        assert "](curves.png)" in text
        assert "](before_after.png)" in text

    def test_training_facts_and_citation(self, tmp_path):
        text = make_card(tmp_path).text
        for fact in ("Updates: 20", "433,000", "5 min 01 s", "Hardware: ", "diffusers 0.", "[user/prompts]("):
            assert fact in text
        assert "```bibtex\n@article{deng2026densegrpo,\n    title = {{DenseGRPO}},\n}\n```" in text

    @pytest.mark.parametrize("base_model", ["user/base", "no-such-directory", "/nowhere/at/all", ""])
    def test_the_least_that_one_can_know(self, tmp_path, base_model):
        path = create_model_card(
            tmp_path, base_model=base_model, pipeline_class_name="FluxPipeline", method_name="Flow-GRPO"
        )
        card = ModelCard.load(path)
        assert card.data.library_name == "diffusers"
        assert card.data.license is None
        assert "``," not in card.text
        ast.parse(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1])


def scores(**means):
    """Of 100 pictures each, of standard deviation 0.5: half an interval is 0.098, that of a change 0.139."""
    return {name: {"mean": mean, "std": 0.5, "n": 100} for name, mean in means.items()}


class TestRewardHacking:
    @pytest.mark.parametrize(
        "before, after, texts",
        [
            (
                scores(trained=0.2, beauty=0.9, text=0.9),
                scores(trained=0.6, beauty=0.6, text=0.85),
                [
                    "**A sign of reward hacking:** `beauty` (-0.300 ± 0.14), which was only watched, fell beyond the 95 % "
                    "interval while `trained` (+0.400 ± 0.14), trained on, rose.",
                    "`text` (-0.050 ± 0.14), only watched, did not fall beyond the 95 % interval.",
                ],
            ),
            (
                scores(trained=0.2, beauty=0.9),
                scores(trained=0.1, beauty=0.6),
                [
                    "`beauty` (-0.300 ± 0.14), only watched, fell beyond the 95 % interval, and what was trained on did not"
                ],
            ),
            (
                scores(trained=0.2, beauty=0.5),
                scores(trained=0.6, beauty=0.45),
                [
                    "`beauty` (-0.050 ± 0.14), only watched, did not fall beyond the 95 % interval: no sign of reward hacking."
                ],
            ),
            (
                {"trained": 0.2, "beauty": 0.9},
                {"trained": 0.6, "beauty": 0.1},
                ["How much of the change of `beauty` (-0.800), only watched, is chance is not known."],
            ),
            (
                {},
                scores(trained=0.6, beauty=0.6),
                ["There are no scores of `beauty` and `text`, only watched, before"],
            ),
            (
                scores(trained=0.2, beauty=0.5),
                scores(trained=0.6, beauty=0.5),
                ["no sign of reward hacking.", "There are no scores of `text`, only watched, before and after."],
            ),
            (
                scores(trained=0.2, beauty=0.9),
                scores(trained=0.25, beauty=0.6),  # a rise within its noise
                ["only watched, fell beyond the 95 % interval, and what was trained on did not rise beyond it."],
            ),
            (
                {name: {"mean": 0.9, "std": 0.0, "n": 1} for name in ("trained", "beauty")},
                {name: {"mean": 0.1, "std": 0.0, "n": 1} for name in ("trained", "beauty")},
                [
                    "How much of the change of `beauty` (-0.800), only watched, is chance is not known."
                ],  # of one picture
            ),
        ],
    )
    def test_what_the_scores_say(self, tmp_path, before, after, texts):
        names = {"reward_names": ["trained"], "eval_reward_names": ["beauty", "text"]}
        card = make_card(tmp_path, metrics={"before": before, "after": after}, **names).text
        note = card.partition("## Reward hacking\n\n")[2].partition("\n\n## Limits")[0]
        assert all(text in note for text in texts)
        assert ("sign of reward hacking:**" in note) == (texts[0].startswith("**"))

    def test_nothing_was_watched(self, tmp_path):
        assert "## Reward hacking\n\nNo reward was watched that was not trained on" in make_card(tmp_path).text


class TestCommand:
    def test_line_and_config(self, tmp_path):
        text = make_card(tmp_path, command="trl-flow dense-grpo --config config.yaml", command_line="trl-flow x").text
        assert "```bash\ntrl-flow dense-grpo --config config.yaml\n```" in text and "```bash\ntrl-flow x\n```" in text

    def test_python(self, tmp_path):
        text = make_card(tmp_path, command="trainer.train()").text
        assert "started from Python" in text and "```python\ntrainer.train()\n```" in text and "```bash" not in text


class TestWriteModelCard:
    def test_the_same_from_what_is_on_disk(self, tmp_path):
        write_samples(tmp_path)
        Image.new("RGB", (8, 8)).save(tmp_path / "curves.png")
        make_card(tmp_path, reward_sources={"shapes": {"directory": "/home/me/shapes", "revision": "abc"}})
        card, facts = (tmp_path / "README.md").read_bytes(), (tmp_path / "card.json").read_bytes()
        for file in (tmp_path / "README.md", *tmp_path.glob("images/*")):
            file.unlink()
        assert write_model_card(tmp_path) == tmp_path / "README.md"
        assert (tmp_path / "README.md").read_bytes() == card and (tmp_path / "card.json").read_bytes() == facts
        assert len(list(tmp_path.glob("images/*.png"))) == 3
        assert b"secret" not in facts and b"/home" not in facts and b"directory" in facts

    def test_changes_are_kept(self, tmp_path):
        make_card(tmp_path)
        write_model_card(tmp_path, hub_model_id="other/place", license="mit")
        data = ModelCard.load(write_model_card(tmp_path)).data
        text = (tmp_path / "README.md").read_text()
        assert 'load_lora_weights("other/place")' in text and "\n# place\n" in text and "user/adapter" not in text
        assert data.license == "mit"
        write_model_card(tmp_path, model_name="Title")
        assert "\n# Title\n" in (tmp_path / "README.md").read_text()

    def test_pictures_of_updates_that_a_run_went_back_from(self, tmp_path):
        write_samples(tmp_path)
        folder = tmp_path / "samples" / "step_000030"
        folder.mkdir()
        Image.new("RGB", (32, 32)).save(folder / "000.png")
        folder.with_suffix(".json").write_text(json.dumps({"prompts": ["later"], "scores": {}}))
        assert [entry["text"] for entry in make_card(tmp_path, steps=30).data.widget] == ["later"]
        assert "later" not in make_card(tmp_path, steps=20).content

    def test_where_there_is_nothing_to_make_it_of(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no card.json.*expected the output directory of a run"):
            write_model_card(tmp_path)
        (tmp_path / "card.json").write_text("{")
        with pytest.raises(ValueError, match="is no JSON"):
            write_model_card(tmp_path)
        (tmp_path / "card.json").write_text("[]")
        with pytest.raises(ValueError, match="is not what training writes"):
            write_model_card(tmp_path)
        make_card(tmp_path)
        with pytest.raises(ValueError, match="steps: expected hub_model_id, hub_revision, model_name or license"):
            write_model_card(tmp_path, steps=3)

    def test_arguments_that_python_cannot_write(self, tmp_path):
        given = {"num_inference_steps": 4, "size": (8, 8), "text": 'a "b"', "hook": print, "none": None}
        code = re.search(r"```python\n(.*?)```", make_card(tmp_path, call_arguments=given).text, re.DOTALL)[1]
        call = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pipe")
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg not in ("prompt", "generator")}
        assert values == {"num_inference_steps": 4, "size": (8, 8), "text": 'a "b"'}


class TestMetadata:
    def test_the_hub_accepts_it(self, tmp_path):
        write_samples(tmp_path)
        assert metadata_problems(make_card(tmp_path).content) == ([], [])

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ("license: Apache 2.0", '"license" must be one of [apache-2.0, mit,'),
            ("pipeline_tag: text-to-picture", '"pipeline_tag" must be one of'),
            ("base_model: /home/me/base", '"base_model" with value "/home/me/base" is not valid'),
            ("base_model_relation: child", '"base_model_relation" must be one of'),
            ("tags: lora", '"tags" must be an array'),
            ("tags: [1]", '"tags[0]" must be a string'),
            ("datasets: [./prompts.txt]", '"datasets[0]" with value "./prompts.txt" is not valid'),
            ("library_name: [diffusers]", '"library_name" must be a string'),
            ("widget: {text: a}", '"widget" must be an array'),
            ("widget: [{text: a, output: {}}]", '"widget[0].output.url" is required'),
            ("widget: [{output: {url: a.png}}]", '"widget[0].text" must be a string'),
            ("model-index: [{results: []}]", '"model-index[0].name" is required'),
            (
                "model-index: [{name: a, results: [{task: {type: t}, dataset: {name: d}, metrics: [{type: m, value: 1}]}]}]",
                '"model-index[0].results[0].dataset.type" is required',
            ),
            (
                "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: "
                "[{type: m, value: .nan}]}]}]",
                '"model-index[0].results[0].metrics[0].value" is required',
            ),
            ("tags: [", "Invalid YAML"),
        ],
    )
    def test_what_the_hub_refuses(self, wrong, message):
        errors, _ = metadata_problems(f"---\n{wrong}\n---\n# Card\n")
        assert len(errors) == 1 and errors[0].startswith(message)

    @pytest.mark.parametrize("license", ["license: mit", "license: [mit, apache-2.0]"])
    def test_licences_of_base_models(self, tmp_path, license):
        base = tmp_path / "base"
        base.mkdir()
        (base / "README.md").write_text(f"---\n{license}\nlicense_name: 3\n---\n")
        card = make_card(tmp_path / "run", base_model=str(base), license=None)
        assert metadata_problems(card.content) == ([], [])
        assert card.data.license == yaml.safe_load(license)["license"]

    def test_the_licence_of_shapes(self, tmp_path):
        assert make_card(tmp_path, base_model="shapes", license=None).data.license == "apache-2.0"


def test_where_the_rewards_came_from(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    make_card(
        tmp_path,
        reward_names=["sharp", "bright", "mine"],
        eval_reward_names=["clip", "judge", "tidy"],
        reward_sources={
            "sharp": {"repository": "user/sharp", "revision": commit},
            "mine": {"directory": "/home/somebody/rewards/mine", "revision": "abc"},
            "clip": {"weights": "openai/clip-vit-large-patch14"},
            "judge": {"model": "Judge-7b", "endpoint": "http://localhost:8000"},
            "tidy": {"space": "user/tidy", "revision": commit},
        },
    )
    text = (tmp_path / "README.md").read_text()
    assert (
        f"Rewards: `sharp` (repository [user/sharp](https://huggingface.co/user/sharp/tree/{commit}), at `{commit}`), "
        "`bright`, `mine` (directory mine, at `abc`)\n"
    ) in text
    assert (
        "Watched, never trained on: `clip` (weights [openai/clip-vit-large-patch14]"
        "(https://huggingface.co/openai/clip-vit-large-patch14)), `judge` (model Judge-7b, endpoint "
        f"http://localhost:8000), `tidy` (space [user/tidy](https://huggingface.co/spaces/user/tidy/tree/{commit}), at "
        f"`{commit}`)\n"
    ) in text
    assert "somebody" not in text
