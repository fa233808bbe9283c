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
from huggingface_hub import ModelCard
from PIL import Image

from trl_flow.hub import create_model_card


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
        card = make_card(tmp_path)
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {"strict": 0.52, "partial": 0.798}, "NaN is no valid metadata"
        # 1.96 * 0.5 / sqrt(512) = 0.0433
        assert "| `strict` | 0.479 ± 0.043 | 0.520 ± 0.043 | +0.041 |" in card.text
        assert "| `partial` | 0.744 | 0.798 | +0.054 |" in card.text
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
        assert "| `strict` | 0.267 | 0.467 | +0.200 ± 0.23 |" in text
        assert "| `partial` | 0.100 | 0.200 | +0.100 |" in text, "of other evaluations than those on disk"

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

    def test_usage_example_of_a_complete_denoiser(self, tmp_path):
        text = make_card(tmp_path, complete_class="SD3Transformer2DModel", diffusers_format=False).text
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        ast.parse(code)
        loaded = 'pipe.transformer = SD3Transformer2DModel.from_pretrained("user/adapter", subfolder="transformer")'
        assert loaded in code.splitlines() and "import DiffusionPipeline, SD3Transformer2DModel" in code
        assert "load_adapter" not in code and "load_lora_weights" not in code

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
