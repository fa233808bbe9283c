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

"""Pipelines of the checkpoints' sizes, whatever their weights are: nothing is downloaded."""

import sys
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


# The tokenizers, with a vocabulary of a few words, are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipelines import tiny_tokenizer  # noqa: E402
from tiny.text import qwen_tokenizer, t5_tokenizer  # noqa: E402


CONFIGS = {
    CLIPTextModel: CLIPTextConfig,
    CLIPTextModelWithProjection: CLIPTextConfig,
    Qwen3ForCausalLM: Qwen3Config,
    T5EncoderModel: T5Config,
    UMT5EncoderModel: UMT5Config,
}
# Sizes as in the `config.json` of the checkpoints.
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX_TRANSFORMER = {"guidance_embeds": True}
WAN_TRANSFORMER = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
KL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def text_parts(kind: type) -> tuple:
    """Of a text encoder: a small tokenizer, padded to as many tokens as the checkpoint's, its config's class, and ids."""
    config = CONFIGS[kind]
    if config is Qwen3Config:
        return qwen_tokenizer(), config, {"pad_token_id": 0}
    is_clip = config is CLIPTextConfig
    tokenizer = tiny_tokenizer() if is_clip else t5_tokenizer()
    tokenizer.model_max_length = 77 if is_clip else 512
    return tokenizer, config, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} if is_clip else {}


# Each is given what makes its parts: `make.model(kind, sizes)`, and a tokenizer and its encoder, `make.text_encoder(kind, sizes)`.


def sd3(make, sizes: dict = SD3_TRANSFORMER) -> StableDiffusion3Pipeline:
    tokenizer, clip_l = make.text_encoder(CLIPTextModelWithProjection, CLIP_L)
    tokenizer_2, clip_g = make.text_encoder(CLIPTextModelWithProjection, CLIP_G)
    tokenizer_3, t5 = make.text_encoder(T5EncoderModel, T5_XXL)
    return StableDiffusion3Pipeline(
        transformer=make.model(SD3Transformer2DModel, sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make.model(AutoencoderKL, KL_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=clip_g,
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )


def flux(make) -> FluxPipeline:
    tokenizer, clip_l = make.text_encoder(CLIPTextModel, CLIP_L)
    tokenizer_2, t5 = make.text_encoder(T5EncoderModel, T5_XXL)
    return FluxPipeline(
        transformer=make.model(FluxTransformer2DModel, FLUX_TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make.model(AutoencoderKL, KL_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
    )


def wan(make) -> WanPipeline:
    tokenizer, umt5 = make.text_encoder(UMT5EncoderModel, T5_XXL | {"vocab_size": 256384})
    return WanPipeline(
        transformer=make.model(WanTransformer3DModel, WAN_TRANSFORMER),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=make.model(AutoencoderKLWan, {}),
        text_encoder=umt5,
        tokenizer=tokenizer,
    )
