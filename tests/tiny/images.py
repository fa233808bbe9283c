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

"""Tiny pipelines of the image families: FLUX, FLUX.2, SD3, Qwen-Image, Chroma, Z-Image, Sana, Lumina, HiDream."""

from collections.abc import Callable

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from . import autoencoders, text
from .waking import wake


# A tiny prompt has few tokens: no need to pad to hundreds.
SIZE = {"height": 8, "width": 8}


def flow_scheduler(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    """Euler's, with the shift that depends on the picture's size, of FLUX.1-dev."""
    config = {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    return FlowMatchEulerDiscreteScheduler(**(config | kwargs))


def flux_transformer(in_channels: int = 16, out_channels: int = 16, guidance_embeds: bool = True):
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return wake(transformer)


def flux_components(**transformer) -> dict:
    tokenizer, text_encoder = text.clip()
    tokenizer_2, text_encoder_2 = text.t5()
    return {
        "scheduler": flow_scheduler(),
        "vae": autoencoders.kl(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        "transformer": flux_transformer(**transformer),
    }


def flux() -> FluxPipeline:
    return FluxPipeline(**flux_components())


def flux_schnell() -> FluxPipeline:
    """Distilled to few steps: no guidance, and a schedule without shift."""
    scheduler = flow_scheduler(shift=1.0, use_dynamic_shifting=False)
    return FluxPipeline(**(flux_components(guidance_embeds=False) | {"scheduler": scheduler}))


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "FluxPipeline": flux,
    "FluxPipeline/schnell": flux_schnell,
}

ARGUMENTS: dict[str, dict] = {
    "FluxPipeline": SIZE | {"guidance_scale": 3.5, "max_sequence_length": 16},
    "FluxPipeline/schnell": SIZE | {"guidance_scale": 0.0, "max_sequence_length": 16},
}

NOT_BUILT: dict[str, str] = {}
