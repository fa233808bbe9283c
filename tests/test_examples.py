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

"""The example configurations, on tiny pipelines of the classes and with the schedulers of their checkpoints."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from PIL import Image
from pipelines import brightness
from tiny import call_arguments, tiny_pipeline

import trl_flow
from trl_flow.policy.families import FAMILIES
from trl_flow.prompts import PROMPT_SETS, load_prompts
from trl_flow.rewards import REWARDS, parse_reward
from trl_flow.rollout import coefficients
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.training import make_training_parser
from trl_flow.trainer.arguments import check_dataset, check_images


EXAMPLES = Path(__file__).parents[1] / "examples"
# Folder of the examples -> tiny pipeline.
PIPELINES = {
    "chroma": "ChromaPipeline",
    "flux.1-dev": "FluxPipeline",
    "flux.1-kontext-dev": "FluxKontextPipeline",
    "flux.1-schnell": "FluxPipeline/schnell",
    "flux.2-dev": "Flux2Pipeline",
    "flux.2-klein": "Flux2KleinPipeline",
    "hidream-i1": "HiDreamImagePipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "hunyuan-video-1.5": "HunyuanVideo15Pipeline",
    "ltx-video": "LTXPipeline",
    "lumina-image-2.0": "Lumina2Pipeline",
    "cogview4-6b": "CogView4Pipeline",
    "qwen-image": "QwenImagePipeline",
    "qwen-image-edit": "QwenImageEditPipeline",
    "sana": "SanaPipeline",
    "sd1.5": "StableDiffusionPipeline",
    "sd3.5-medium": "StableDiffusion3Pipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "wan2.1-1.3b": "WanPipeline",
    "wan2.1-i2v-14b": "WanImageToVideoPipeline",
    "wan2.2-a14b": "WanPipeline/2.2",
    "z-image": "ZImagePipeline",
}
PATHS = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "shapes")


def command_of(path: Path) -> str:
    """The method of an example: a file is named after it, and after what sets it apart from others of the method."""
    return max((method for method in METHODS if f"{path.stem}-".startswith(f"{method}-")), key=len)


@pytest.fixture
def make_trainer(tmp_path):
    """The trainer of an example, with all its settings but the size, on a tiny pipeline."""

    def make(path):
        tiny = call_arguments(PIPELINES[path.parent.name])
        overrides = {"output_dir": tmp_path / "run", "use_cpu": True, "bf16": False}
        overrides |= {name: tiny[name] for name in ("height", "width", "num_frames") if name in tiny}
        words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
        parser = make_training_parser(command_of(path))
        script_args, args = parser.parse_args_and_config(["--config", str(path), *words])
        # No table of aspect ratios has pictures as small as these.
        if "use_resolution_binning" in tiny:
            args.generation_kwargs = {"use_resolution_binning": False} | (args.generation_kwargs or {})
        rows = {"prompt": [f"picture {number}" for number in range(64)]}
        if "image" in tiny:
            rows["image"] = [tiny["image"]] * 64
        dataset = Dataset.from_dict(rows)
        peft_config = None
        if not args.full_finetuning:
            peft_config = LoraConfig(r=script_args.lora_r, lora_alpha=script_args.lora_alpha)
        return getattr(trl_flow, METHODS[command_of(path)].trainer)(
            tiny_pipeline(PIPELINES[path.parent.name]),
            reward_funcs=brightness,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
            peft_config=peft_config,
        )

    return make


def test_every_family_has_an_example():
    assert {path.parent.name for path in PATHS} == set(PIPELINES)
    classes = {name.partition("/")[0] for name in PIPELINES.values()}
    assert not [family.name for family in FAMILIES if not classes & set(family.pipelines)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_pipeline_takes_what_the_example_says(path, make_trainer):
    """What the trainer and the pipeline's own call refuse is refused here: arguments, steps, noise, sizes of a batch."""
    trainer = make_trainer(path)
    assert trainer.policy.family.pipelines and not trainer.policy.family.inferred
    grid, dynamics = trainer.sigmas.tolist(), trainer.args.sde_type
    assert len(grid) == trainer.args.num_inference_steps + 1
    for step in trainer.sde_steps:
        c, tau = coefficients(*grid[step : step + 2], trainer.noise_levels[step], dynamics)
        # Noise before the step has a standard deviation of at most 1, and more than about that is nowhere on the path.
        assert math.hypot(c, tau) < 1.25, step


@pytest.mark.parametrize("folder", ["wan2.1-1.3b", "wan2.1-i2v-14b", "wan2.2-a14b"])
def test_noise_of_wan_is_the_published_one(folder, make_trainer):
    trainer = make_trainer(EXAMPLES / folder / "dense-grpo.yaml")
    expected = [trainer.sigmas[1].item() * sigma for sigma in trainer.sigmas[:-1].tolist()]
    assert trainer.noise_levels == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", ["g2rpo", "g2rpo-lora", "mix-grpo"])
def test_grid_of_flux_is_the_published_one(name):
    """A constant shift of 3, from FLUX.1-dev's scheduler, whose shift depends on the size of the picture."""
    example = yaml.safe_load((EXAMPLES / "flux.1-dev" / f"{name}.yaml").read_text())
    # A token stands for 16 x 16 pixels. The settings are those of the checkpoint's scheduler.
    mu = calculate_shift(example["height"] // 16 * (example["width"] // 16), 256, 4096, 0.5, 1.15)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=example["sigmas"], mu=mu)
    steps = example["num_inference_steps"]
    times = [1 - step / steps for step in range(steps + 1)]
    assert scheduler.sigmas.tolist() == pytest.approx([3 * time / (1 + 2 * time) for time in times], abs=2e-6)


# Section 5.1 and appendix A of DenseGRPO's paper; what its tasks have in common, and what not.
DENSE_GRPO = {
    "model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
    **{"num_inference_steps": 10, "num_eval_inference_steps": 40, "num_generations": 24, "height": 512, "width": 512},
    **{"dense_reward": "gain", "tail_steps": "full", "lora_r": 32, "lora_alpha": 64},
    **{"learning_rate": 3e-4, "weight_decay": 1e-4},
}
# Sections 3.1 to 4.1 and table 4 of G2RPO's.
G2RPO = {
    "model_name_or_path": "black-forest-labs/FLUX.1-dev",
    **{"dataset_name": "hpdv2", "reward_funcs": ["hpsv2", "clip"], "full_finetuning": True, "bf16": True},
    **{"num_inference_steps": 16, "num_generations": 12, "noise_level": 0.7, "same_initial_noise": True},
    **{"granularities": [1, 2, 3], "advantage_clip": 5.0, "epsilon": 1e-4, "beta": 0.0},
    **{"multi_objective_aggregation": "normalize_then_sum", "per_device_train_batch_size": 1},
    **{"learning_rate": 2e-6, "weight_decay": 1e-4, "max_grad_norm": 1.0, "seed": 42},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3.5-medium/dense-grpo", DENSE_GRPO | {"reward_funcs": ["pickscore"], "beta": 0.01, "max_steps": 4500}),
        (
            "sd3.5-medium/dense-grpo-geneval",
            DENSE_GRPO | {"reward_funcs": [{"geneval": {"score": "flow_grpo"}}], "beta": 0.04, "max_steps": 4500},
        ),
        (
            "sd3.5-medium/dense-grpo-ocr",
            DENSE_GRPO | {"reward_funcs": [{"ocr": {"match": "paper"}}], "beta": 0.04, "max_steps": 1500},
        ),
        ("flux.1-dev/g2rpo", G2RPO),
    ],
)
def test_settings_are_the_papers(name, settings):
    example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert {setting: example.get(setting) for setting in settings} == settings
    if "dense_reward" in settings:
        # 8 times 144 pictures in an update, and one update per rollout; on the 8 GPUs that the example is written for.
        pictures = 8 * example["per_device_train_batch_size"] * example["num_generations"]
        assert pictures * example["gradient_accumulation_steps"] == 8 * 144
        assert example["steps_per_generation"] == example["gradient_accumulation_steps"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_command_line_in_its_comment_is_its_own(path):
    text = path.read_text()
    name = f"{path.parent.name}/{path.stem}.yaml"
    (command,) = re.findall(r"#     trl-flow ((?!calibrate)\S+) --config examples/(\S+)", text)
    assert command == (command_of(path), name)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_rewards_and_prompts_exist(path):
    """By name, with held-out rewards that are not trained on; where there is no name, the comment says what to give."""
    example = yaml.safe_load(path.read_text())
    if "reward_funcs" not in example:
        assert "--reward_funcs my_rewards.score" in path.read_text()
        return
    trained, watched = (
        [parse_reward(reward)[0] for reward in example[name]] for name in ("reward_funcs", "eval_reward_funcs")
    )
    assert {*trained, *watched} <= REWARDS.keys() and not {*trained} & {*watched}
    assert example["dataset_name"] in PROMPT_SETS


def test_folder_of_pictures_and_prompts(tmp_path):
    """As the comments of the examples that start from pictures describe it."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / split / "0001.png")
        row = {"file_name": "0001.png", "prompt": f"make it blue ({split})", "object": "square"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    for split in ("train", "test"):
        dataset = load_prompts(str(tmp_path), split=split)
        check_dataset(dataset, "train_dataset")
        check_images(dataset, "train_dataset")
        assert dataset[0]["prompt"] == f"make it blue ({split})" and dataset[0]["object"] == "square"
        assert dataset[0]["image"].getpixel((0, 0)) == (255, 0, 0)
