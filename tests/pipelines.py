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

import itertools

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


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


def tiny_sd3(seed: int = 0, sample_size: int = 4) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` with random weights: latents 4 x 4 x 4, pictures 8 x 8, two text encoders, no T5."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_config = CLIPTextConfig(
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
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
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


def brightness(images, **kwargs):
    return [float(np.asarray(image, dtype=np.float64).mean()) / 255 for image in images]


def redness(images, **kwargs):
    return [float(np.asarray(image, dtype=np.float64)[..., 0].mean()) / 255 for image in images]


def prompts(number: int) -> Dataset:
    """Up to 18 prompts of the tiny tokenizer's words."""
    words = itertools.product(("a", "two", "three"), ("red", "green", "blue"), ("circle", "square"))
    return Dataset.from_dict({"prompt": [" ".join(three) for three in itertools.islice(words, number)]})
