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

"""Every family trains: pictures, videos and edits, by the same loop and with nothing written for any of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image as PILImage
from tiny import call_arguments, tiny_pipeline
from trainer.observing import logged, randomize

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, FlowGRPOTrainer, G2RPOConfig, G2RPOTrainer
from trl_flow.hub import load_trained
from trl_flow.policy import FAMILIES


PROMPTS = ["a red circle", "two blue square", "a green circle", "red"]
# Variants of a class that its tiny pipelines come in, beside the class itself.
VARIANTS = (
    "FluxPipeline/schnell",
    "WanPipeline/2.2",
    "WanPipeline/5b",
    "Flux2Pipeline/edit",
    "WanImageToVideoPipeline/2.2",
)
NAMES = [*(name for family in FAMILIES for name in family.pipelines), *VARIANTS]


def settings_of(name: str) -> dict:
    """Arguments of a tiny pipeline's call as settings of a trainer."""
    arguments = call_arguments(name)
    own = ("height", "width", "num_frames", "guidance_scale", "negative_prompt", "max_sequence_length")
    settings = {"max_sequence_length": None, **{key: arguments.pop(key) for key in own if key in arguments}}
    if "true_cfg_scale" in arguments and name.startswith("Qwen"):
        settings["guidance_scale"] = arguments.pop("true_cfg_scale")
    image = arguments.pop("image", None)
    return settings | {"generation_kwargs": arguments, "image": image[0] if isinstance(image, list) else image}


def dataset(image: PILImage.Image | None) -> Dataset:
    if image is None:
        return Dataset.from_dict({"prompt": PROMPTS})
    # A picture of its own for each prompt.
    pictures = [PILImage.fromarray(np.roll(np.array(image), 3 * row)) for row in range(len(PROMPTS))]
    return Dataset.from_dict({"prompt": PROMPTS, "image": pictures}).cast_column("image", Image())


@pytest.fixture
def make_family_trainer(make_trainer):
    def make(name, *classes, **kwargs):
        settings = settings_of(name)
        image = settings.pop("image")
        kwargs = {"num_inference_steps": 3, "num_eval_inference_steps": 2, "num_generations": 2} | settings | kwargs
        return make_trainer(*classes, model=tiny_pipeline(name), train_dataset=dataset(image), **kwargs)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_every_family_trains(make_family_trainer, name):
    """One update of DenseGRPO: rewards differ within a group, the ratio is exactly 1, all adapters move."""
    trainer = make_family_trainer(name, DenseGRPOTrainer, DenseGRPOConfig)
    randomize(trainer)
    before = {key: p.detach().clone() for key, p in trainer.policy.named_parameters() if p.requires_grad}
    trainer.train()
    assert logged(trainer, "reward_std")[0] > 0
    for of in ("min", "max"):
        assert logged(trainer, f"ratio/{of}") == [1.0]
    moved = {key for key, p in trainer.policy.named_parameters() if key in before and not torch.equal(before[key], p)}
    for component in trainer.policy.components:
        assert any(f".{component}." in key for key in moved)


# ---- Two denoisers, one adapter each ----


def test_g2rpo_trains_both_denoisers_of_wan_2_2(make_family_trainer):
    """A trunk that crosses the boundary between them, with branches on either side."""
    trainer = make_family_trainer(
        "WanPipeline/2.2", G2RPOTrainer, G2RPOConfig, num_inference_steps=4, sde_steps=[0, 1, 2]
    )
    boundary = trainer.policy.pipeline.config.boundary_ratio
    above = [step for step in trainer.sde_steps if trainer.sigmas[step] >= boundary]
    assert 0 < len(above) < len(trainer.sde_steps)
    calls = {name: [] for name in trainer.policy.components}
    for name, noted in calls.items():
        getattr(trainer.policy.pipeline, name).register_forward_pre_hook(
            lambda module, args, kwargs, noted=noted: noted.append(kwargs["timestep"].flatten()[0].item()),
            with_kwargs=True,
        )
    trainer.train()
    assert min(calls["transformer"]) >= 1000 * boundary > max(calls["transformer_2"])


# ---- Pictures to start from ----


def test_a_picture_is_encoded_once(make_family_trainer):
    trainer = make_family_trainer("FluxKontextPipeline", max_steps=2, gradient_accumulation_steps=2)
    runs = {"vae": 0, "text": 0}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    pipeline = trainer.policy.pipeline
    trainer.policy._cache.clear()  # of what was encoded when the pipeline was examined
    trainer.policy.blank()
    pipeline.vae.encoder.register_forward_pre_hook(count("vae"))
    pipeline.text_encoder_2.register_forward_pre_hook(count("text"))
    trainer.train()
    # Two updates of two prompts each: four prompts, four pictures.
    assert trainer._nfe > 20 and runs == {"vae": 4, "text": 4}


def test_the_picture_matters_and_reaches_the_reward(make_family_trainer):
    seen = []

    def reward(images, image, **kwargs):
        seen.extend(image)
        return [float(np.asarray(picture).mean()) for picture in images]

    trainer = make_family_trainer("FluxKontextPipeline", reward_funcs=reward)
    trainer.train()
    assert all(isinstance(picture, PILImage.Image) for picture in seen) and len(seen) >= 2
    rows = [{"prompt": "red", "image": picture} for picture in trainer.train_dataset["image"][:2]]
    first, second = trainer.conditioning(["red", "red"], trainer.images(rows))
    latents = torch.randn(1, *trainer.policy.latent_shape)
    with torch.no_grad():
        assert not torch.equal(trainer.policy(latents, 0.5, [first]), trainer.policy(latents, 0.5, [second]))


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_resuming_with_pictures_is_bit_exact(make_family_trainer, tmp_path, killed_after):
    """Also in the middle of a rollout, whose prompts and pictures come from the checkpoint."""
    settings = {"max_steps": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_family_trainer("FluxKontextPipeline", output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_family_trainer("FluxKontextPipeline", output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{killed_after}"))
    for (name, one), two in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_dataset_without_pictures_is_refused(make_trainer):
    settings = settings_of("FluxKontextPipeline")
    settings.pop("image")
    with pytest.raises(ValueError, match="starts from a picture, expected one named 'image'"):
        make_trainer(model=tiny_pipeline("FluxKontextPipeline"), **settings)


# ---- Videos ----


def test_videos_reach_the_rewards_and_the_disk(make_family_trainer, tmp_path):
    whole, single = [], []

    def of_videos(videos, **kwargs):
        whole.extend(videos)
        return [float(np.asarray(video[-1]).mean()) for video in videos]

    def of_pictures(images, prompts, **kwargs):
        single.append((len(images), len(prompts)))
        return [float(np.asarray(image).mean()) for image in images]

    trainer = make_family_trainer(
        "WanPipeline",
        FlowGRPOTrainer,
        reward_funcs=[of_videos, of_pictures],
        eval_dataset=dataset(None).select([0]),
        eval_strategy="steps",
        num_frames=9,
    )
    trainer.train()
    assert trainer.policy.num_frames == 9
    assert all(len(video) == 9 for video in whole)
    # Of nine frames eight are scored, each with its prompt.
    assert all(pictures == texts and pictures % 8 == 0 for pictures, texts in single)
    height, width = trainer.policy.image_size
    folder = tmp_path / "run" / "samples" / "step_000001"
    with PILImage.open(folder / "000.gif") as moving, PILImage.open(folder / "000.png") as still:
        assert moving.n_frames == 9 and moving.size == (width, height)
        assert still.size == (4 * width, height)
    scores = json.loads(folder.with_suffix(".json").read_text())["scores"]
    assert all(np.isfinite(column).all() for column in scores.values()) and len(scores) == 2


# ---- Pipelines without a record ----


def test_an_unknown_pipeline_is_examined_and_trained(make_family_trainer):
    trainer = make_family_trainer("AuraFlowPipeline", DenseGRPOTrainer, DenseGRPOConfig)
    assert trainer.policy.family.inferred
    trainer.train()
    assert logged(trainer, "ratio/max") == [1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusion3Img2ImgPipeline", "begins with a picture to which noise is added"),
        ("LTX2Pipeline", "copies its scheduler"),
        ("MochiPipeline", "invert_sigmas=True"),
        ("CogView4ControlPipeline", "cannot be trained with generation_kwargs=.*random"),
        ("SanaSprintPipeline", "SCMScheduler"),
    ],
)
def test_pipelines_that_cannot_be_trained_say_why(make_family_trainer, name, reason):
    with pytest.raises(ValueError, match=reason):
        make_family_trainer(name)


# ---- All weights ----


def test_full_finetuning(make_trainer, tmp_path):
    """With a divergence from a base that no adapter can be switched off to find; saved as the stock pipeline loads it."""
    settings = {"full_finetuning": True, "peft_config": None, "beta": 0.04, "learning_rate": 1e-3}
    trainer = make_trainer(DenseGRPOTrainer, DenseGRPOConfig, max_steps=2, **settings)
    base = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == 0 and second > 0
    moved = sum(not torch.equal(base[name], p) for name, p in trainer.policy.named_parameters())
    assert moved > 0.8 * len(base)
    folder = tmp_path / "run"
    assert (folder / "transformer" / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    stock: DiffusionPipeline = tiny_pipeline("StableDiffusion3Pipeline")
    stock.transformer = type(stock.transformer).from_pretrained(folder / "transformer")
    noise = torch.randn(1, *trainer.policy.latent_shape)
    arguments = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 2, "output_type": "pt"}
    picture = stock("a red circle", latents=noise, **arguments).images
    trained = trainer.policy.pipeline("a red circle", latents=noise, **arguments).images
    assert torch.equal(picture, trained)
    assert not torch.equal(
        picture, tiny_pipeline("StableDiffusion3Pipeline")("a red circle", latents=noise, **arguments).images
    )


def test_full_finetuning_of_a_pipeline_in_half_precision(make_trainer):
    """Trains float32 weights under autocast; without, text and denoiser would not fit together."""
    settings = {"full_finetuning": True, "peft_config": None, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="full_finetuning=True keeps the denoiser in float32.*Set bf16=True"):
        make_trainer(model=tiny_pipeline("StableDiffusion3Pipeline").to(torch.bfloat16), **settings)
    trainer = make_trainer(model=tiny_pipeline("StableDiffusion3Pipeline").to(torch.bfloat16), bf16=True, **settings)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.policy.parameters()} == {torch.float32}
    assert logged(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("killed_after", [1, 2])
def test_full_finetuning_resumes_bit_exactly(make_trainer, tmp_path, killed_after):
    settings = {
        **{"full_finetuning": True, "peft_config": None, "beta": 0.04, "learning_rate": 1e-3, "ema_decay": 0.9},
        **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1},
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{killed_after}"))
    for (name, one), two in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    "settings", [{"peft_config": "given"}, {"peft_config": None, "adapter_name_or_path": "somewhere"}]
)
def test_an_adapter_beside_full_finetuning_is_refused(make_trainer, settings):
    if settings["peft_config"] == "given":
        settings = {}  # the fixture gives one
    with pytest.raises(ValueError, match="full_finetuning=True"):
        make_trainer(full_finetuning=True, **settings)


# ---- Settings that would change nothing, or something else than they say ----


def test_arguments_that_mean_something_else_in_one_step_are_refused(make_family_trainer):
    """Lumina drops its guidance after a share of the steps; of one step, it is always past that share."""
    with pytest.raises(
        ValueError, match=r"cannot be trained with generation_kwargs=.*cfg_trunc_ratio.*velocity differs"
    ):
        make_family_trainer("Lumina2Pipeline", generation_kwargs={"cfg_trunc_ratio": 0.25})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("FluxPipeline", {"negative_prompt": "ugly"}, "negative_prompt='ugly' has no effect.*true_cfg_scale"),
        ("FluxPipeline", {"generation_kwargs": "{bad"}, "generation_kwargs='{bad' is no JSON"),
        ("FluxPipeline", {"generation_kwargs": "[1]"}, r"generation_kwargs=\[1\]: expected names and values"),
        ("FluxPipeline", {"num_frames": 5}, "num_frames=5: the call of FluxPipeline has no such argument"),
        ("WanImageToVideoPipeline", {"max_sequence_length": 64}, "max_sequence_length=64: .*512 text tokens"),
    ],
)
def test_settings_without_effect_are_refused(make_family_trainer, name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_family_trainer(name, **settings)


def test_true_guidance_beside_a_distilled_one(make_family_trainer):
    settings = {"negative_prompt": "blue", "generation_kwargs": {"true_cfg_scale": 3.0}}
    trainer = make_family_trainer("FluxPipeline", **settings)
    calls = []
    trainer.policy.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        trainer.policy(torch.zeros(1, *trainer.policy.latent_shape), 0.5, trainer.policy.conditioning(["red"]))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "Flux2Pipeline/edit"])
def test_pictures_that_are_none(make_trainer, name):
    settings = settings_of(name)
    image = settings.pop("image")
    holes = Dataset.from_dict({"prompt": PROMPTS, "image": [image, None, image, None]}).cast_column("image", Image())
    names = Dataset.from_dict({"prompt": PROMPTS, "image": ["a.png"] * len(PROMPTS)})
    for rows, message in ((holes, "row 1 and 1 others have no image"), (names, "expected pictures. Cast it with")):
        with pytest.raises(ValueError, match=message):
            make_trainer(model=tiny_pipeline(name), train_dataset=rows, **settings)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_one_of_two_denoisers(make_family_trainer, tmp_path, component):
    """The steps of the other one have no gradient, and what is saved is found again."""
    config = {component: LoraConfig(r=2, target_modules=None)}
    trainer = make_family_trainer("WanPipeline/2.2", peft_config=config, num_inference_steps=4, sde_steps=[0, 1, 2])
    trainer.train()
    assert trainer.policy.components == [component] and logged(trainer, "grad_norm")[0] > 0
    fresh = load_trained(tiny_pipeline("WanPipeline/2.2"), tmp_path / "run")
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[component]
    assert any("lora" in key for key in getattr(fresh, component).state_dict())
    assert not any("lora" in key for key in getattr(fresh, other).state_dict())


def test_the_card_of_an_adapter_that_diffusers_cannot_load(make_trainer, tmp_path):
    make_trainer(peft_config=LoraConfig(r=2, target_modules=None, use_dora=True)).train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "load_trained(pipe," in card and "pipe.load_lora_weights" not in card


def test_card_loads_the_model_in_the_precision_of_the_run(make_trainer):
    model = tiny_pipeline("StableDiffusion3Pipeline").to(torch.bfloat16)
    model.register_to_config(_name_or_path="user/base")
    trainer = make_trainer(model=model)
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("user/base", torch_dtype=torch.bfloat16)' in card
