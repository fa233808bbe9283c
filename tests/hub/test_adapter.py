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

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from trl_flow.hub import load_adapter, save_adapter, supports_diffusers_format


R, ALPHA = 4, 12


def sd3_pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)


def latents_of(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    """Clean latents of two stock denoising steps from fixed noise and conditioning."""
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=torch.randn(2, 5, 32, generator=generator),
        pooled_prompt_embeds=torch.randn(2, 24, generator=generator),
        latents=torch.randn(2, 4, 8, 8, generator=generator),
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        output_type="latent",
    ).images


def train(denoiser: torch.nn.Module, **config) -> PeftModel:
    """Stands in for training: an adapter whose every matrix is random."""
    model = get_peft_model(denoiser, LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["to_q"]} | config))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class TestSaveAdapter:
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
            {"target_modules": r".*attn\.to_[qkv]$"},
            {"target_modules": ["to_q", "to_k"], "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7}},
            {"use_rslora": True},
        ],
        ids=["names", "regex", "patterns", "rslora"],
    )
    def test_both_loaders_give_the_trained_pictures(self, tmp_path, config):
        base = latents_of(sd3_pipeline())
        trained = sd3_pipeline()
        save_adapter(
            train(trained.transformer, **config), StableDiffusion3Pipeline, "transformer", tmp_path, "user/base"
        )
        expected = latents_of(trained)
        assert (expected - base).abs().max() > 1e-2

        by_diffusers = sd3_pipeline()
        by_diffusers.load_lora_weights(str(tmp_path))
        assert (latents_of(by_diffusers) - expected).abs().max() == 0

        by_peft = sd3_pipeline()
        PeftModel.from_pretrained(by_peft.transformer, str(tmp_path))
        assert (latents_of(by_peft) - expected).abs().max() == 0

        assert (latents_of(load_adapter(sd3_pipeline(), tmp_path)) - expected).abs().max() == 0

    def test_unet(self, tmp_path):
        pipe, loaded = unet_pipeline(), unet_pipeline()
        save_adapter(train(pipe.unet, target_modules=["to_q", "conv1"]), type(pipe), "unet", tmp_path, None)
        loaded.load_lora_weights(str(tmp_path))
        inputs = (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 3, 16))
        with torch.no_grad():
            assert (pipe.unet(*inputs).sample - loaded.unet(*inputs).sample).abs().max() == 0

    def test_files(self, tmp_path):
        (tmp_path / "README.md").write_text("our card")
        model = train(sd3_pipeline().transformer)
        written = save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path, "user/base")
        assert [path.name for path in written] == [
            "adapter_model.safetensors",
            "adapter_config.json",
            "pytorch_lora_weights.safetensors",
        ]
        assert (tmp_path / "README.md").read_text() == "our card"

        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "user/base"
        assert config["auto_mapping"]["base_model_class"] == "SD3Transformer2DModel"
        assert config["inference_mode"] is True
        assert model.peft_config["default"].inference_mode is False, "saving must not freeze the model's own config"

        with safe_open(written[2], "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
        assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (R, ALPHA)

    def test_the_file_that_is_passed_on_holds_no_path(self, tmp_path):
        model = train(sd3_pipeline().transformer)
        _, _, file = save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path, str(tmp_path / "base"))
        assert str(tmp_path).encode() not in file.read_bytes()

    def test_same_bytes_every_time(self, tmp_path):
        contents = []
        for name in ("a", "b"):
            model = train(sd3_pipeline().transformer, target_modules=["to_q", "to_k", "to_v"])
            paths = save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path / name, "user/base")
            contents.append(paths[0].read_bytes())
        assert contents[0] == contents[1]

    @pytest.mark.parametrize("prefix", ["", "transformer.", "module.transformer."])
    def test_state_dict_replaces_the_weights(self, tmp_path, prefix):
        model = train(sd3_pipeline().transformer)
        average = {f"{prefix}{key}": value * 0.5 for key, value in model.state_dict().items() if "lora_" in key}
        average[f"{prefix}unrelated"] = torch.zeros(1)
        save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path, None, state_dict=average)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        current = get_peft_model_state_dict(model)
        assert saved.keys() == current.keys()
        assert all(torch.equal(saved[key], 0.5 * current[key]) for key in saved)

    def test_views_into_one_buffer_can_be_saved(self, tmp_path):
        model = train(sd3_pipeline().transformer)
        names = [key for key in model.state_dict() if "lora_" in key]
        shapes = [model.state_dict()[key].shape for key in names]
        flat = torch.randn(sum(shape.numel() for shape in shapes))
        parts = flat.split([shape.numel() for shape in shapes])
        average = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path, None, state_dict=average)
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(names)

    @pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["proj_out"]}, {"bias": "lora_only"}])
    def test_what_diffusers_cannot_load_is_saved_for_peft_alone(self, tmp_path, config):
        trained = sd3_pipeline()
        model = train(trained.transformer, **config)
        assert not supports_diffusers_format(StableDiffusion3Pipeline, "transformer", model.peft_config["default"])
        save_adapter(model, StableDiffusion3Pipeline, "transformer", tmp_path, None)
        assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
        loaded = load_adapter(sd3_pipeline(), tmp_path)
        assert (latents_of(loaded) - latents_of(trained)).abs().max() == 0

    def test_bare_model_is_refused(self, tmp_path):
        with pytest.raises(TypeError, match="get_peft_model"):
            save_adapter(sd3_pipeline().transformer, StableDiffusion3Pipeline, "transformer", tmp_path, None)

    def test_unknown_adapter_and_foreign_state_dict_are_refused(self, tmp_path):
        model = train(sd3_pipeline().transformer)
        arguments = (model, StableDiffusion3Pipeline, "transformer", tmp_path, None)
        with pytest.raises(ValueError, match="'other'.*default"):
            save_adapter(*arguments, adapter_name="other")
        with pytest.raises(ValueError, match="no tensor of the adapter"):
            save_adapter(*arguments, state_dict={"a": torch.zeros(1)})


class TestLoadAdapter:
    def test_adapter_of_peft_alone(self, tmp_path):
        trained = sd3_pipeline()
        train(trained.transformer).save_pretrained(tmp_path)
        loaded = load_adapter(sd3_pipeline(), tmp_path)
        assert (latents_of(loaded) - latents_of(trained)).abs().max() == 0

    def test_adapter_of_diffusers_alone(self, tmp_path):
        trained = sd3_pipeline()
        save_adapter(train(trained.transformer), StableDiffusion3Pipeline, "transformer", tmp_path, None)
        (tmp_path / "adapter_config.json").unlink()
        (tmp_path / "adapter_model.safetensors").unlink()
        loaded = load_adapter(sd3_pipeline(), tmp_path)
        assert (latents_of(loaded) - latents_of(trained)).abs().max() == 0

    def test_quiet(self, tmp_path, caplog):
        save_adapter(train(sd3_pipeline().transformer), StableDiffusion3Pipeline, "transformer", tmp_path, None)
        load_adapter(sd3_pipeline(), tmp_path)
        assert not caplog.records, "diffusers warns about text encoders that no adapter of ours touches"

    def test_adapter_of_another_model_is_refused(self, tmp_path):
        pipe = unet_pipeline()
        save_adapter(train(pipe.unet), type(pipe), "unet", tmp_path, None)
        with pytest.raises(ValueError, match="no layer of the adapter fits the transformer"):
            load_adapter(sd3_pipeline(), tmp_path)

    def test_missing_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_adapter(sd3_pipeline(), tmp_path / "nowhere")
