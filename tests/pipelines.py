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

"""Tiny pipelines with random weights, of the real architectures, and prompts and rewards for them."""

import inspect
import itertools

import numpy as np
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def tiny_tokenizer() -> CLIPTokenizer:
    words = "a red green blue circle square two three".split()
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for character in sorted({letter for word in words for letter in word}):
        vocab.setdefault(character, len(vocab))
        vocab.setdefault(character + "</w>", len(vocab))
    for word in words:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if position == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            vocab.setdefault(left, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=12)


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_vae(latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        **kwargs,
    )


def tiny_unet(cross_attention_dim: int, **kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=4,
        attention_head_dim=2,
        **kwargs,
    )


def sd_scheduler(**kwargs) -> DDIMScheduler:
    """The schedule of Stable Diffusion 1, 2 and XL, sampled by DDIM."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(config | kwargs))


def tiny_sd3(seed: int = 0, sample_size: int = 4) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` with random weights: latents 4 x 4 x 4, pictures 8 x 8, two text encoders, no T5."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    vae = tiny_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return sd3_pipeline(transformer, vae)


def sd3_pipeline(transformer: SD3Transformer2DModel, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` with two tiny text encoders of random weights, and no T5."""
    tokenizer = tiny_tokenizer()
    text_config = tiny_text_config(tokenizer)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd(seed: int = 0, scheduler: SchedulerMixin | None = None, **kwargs) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` (1.5) with random weights: latents 4 x 4 x 4, pictures 8 x 8, no safety checker."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    components = {
        "vae": tiny_vae(),
        "text_encoder": CLIPTextModel(tiny_text_config(tokenizer)),
        "tokenizer": tokenizer,
        "unet": tiny_unet(cross_attention_dim=16),
        "scheduler": scheduler or sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipeline = StableDiffusionPipeline(**(components | kwargs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl(seed: int = 0, scheduler: SchedulerMixin | None = None) -> StableDiffusionXLPipeline:
    """A `StableDiffusionXLPipeline` with random weights: latents 4 x 4 x 4, pictures 8 x 8, two text encoders."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_config = tiny_text_config(tokenizer)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer,
        # 8 numbers for each of the six sizes and positions of a picture, and 16 for its text.
        unet=tiny_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=scheduler or sd_scheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded_prompts(policy, prompts: list[str]) -> dict[str, torch.Tensor]:
    """
    Prompts as arguments of a stock pipeline's call, encoded one by one, as the policy does it: a text encoder rounds
    differently in a batch. For Stable Diffusion of all generations.
    """
    pipeline = policy.pipeline
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    parameters = inspect.signature(pipeline.encode_prompt).parameters
    arguments = {
        "prompt_2": None,
        "prompt_3": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": policy.guidance_scale > 1,
        "negative_prompt": policy.negative_prompt,
        **policy.call_arguments,
    }
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    with torch.no_grad():
        rows = [pipeline.encode_prompt(prompt, **arguments) for prompt in prompts]
    return {
        name: torch.cat(values)
        for name, values in zip(names, zip(*rows, strict=True), strict=False)
        if values[0] is not None
    }


def brightness(images, **kwargs):
    return [float(np.asarray(image, dtype=np.float64).mean()) / 255 for image in images]


def redness(images, **kwargs):
    return [float(np.asarray(image, dtype=np.float64)[..., 0].mean()) / 255 for image in images]


def prompts(number: int) -> Dataset:
    """Up to 18 prompts of the tiny tokenizer's words."""
    words = itertools.product(("a", "two", "three"), ("red", "green", "blue"), ("circle", "square"))
    return Dataset.from_dict({"prompt": [" ".join(three) for three in itertools.islice(words, number)]})
