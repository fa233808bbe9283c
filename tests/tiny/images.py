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
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from pipelines import tiny_sd, tiny_sd3, tiny_sdxl

from . import autoencoders, text
from .waking import wake


SIZE = {"height": 8, "width": 8}


def picture(height: int = 16, width: int = 16) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    return Image.merge("RGB", (red, green, Image.new("L", red.size, 64))).resize((width, height))


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


def flux_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**flux_components())


def chroma_components() -> dict:
    tokenizer, text_encoder = text.t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        "vae": autoencoders.kl(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": wake(transformer),
    }


def chroma() -> ChromaPipeline:
    return ChromaPipeline(**chroma_components())


# The pipelines that edit scale every picture to a million pixels: 32 of them a latent number keep it small.
MEGAPIXEL = {"levels": 5, "num_res_blocks": 0}


def qwen_image_components(vae: dict | None = None, **kwargs) -> dict:
    """`vae` has arguments of the autoencoder, the others are of the transformer."""
    tokenizer, processor, text_encoder = text.qwen2_5_vl()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        **kwargs,
    )
    return {
        "scheduler": flow_scheduler(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        "vae": autoencoders.kl_qwen_image(**(vae or {})),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "processor": processor,
        "transformer": wake(transformer),
    }


def without(components: dict, *names: str) -> dict:
    return {name: component for name, component in components.items() if name not in names}


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(**without(qwen_image_components(), "processor"))


def qwen_image_edit() -> QwenImageEditPipeline:
    return QwenImageEditPipeline(**qwen_image_components(MEGAPIXEL))


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    return wake(transformer)


def flux2() -> Flux2Pipeline:
    """As many layers of text encoder as the three it reads ask for: 10, 20 and 30."""
    tokenizer, text_encoder = text.mistral3(num_hidden_layers=30)
    return Flux2Pipeline(
        scheduler=flow_scheduler(),
        vae=autoencoders.kl_flux2(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
    )


def flux2_klein_components() -> dict:
    """As many layers of text encoder as the three it reads ask for: 9, 18 and 27."""
    tokenizer, text_encoder = text.qwen3(num_hidden_layers=27)
    return {
        "scheduler": flow_scheduler(),
        "vae": autoencoders.kl_flux2(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": flux2_transformer(guidance_embeds=False),
    }


def flux2_klein() -> Flux2KleinPipeline:
    """The base model, which takes guidance, and not the one distilled to few steps."""
    return Flux2KleinPipeline(**flux2_klein_components(), is_distilled=False)


def z_image_components() -> dict:
    tokenizer, text_encoder = text.qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": autoencoders.kl(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": wake(transformer),
    }


def z_image() -> ZImagePipeline:
    """Z-Image, which takes guidance, and not Z-Image-Turbo (shift 3, no guidance)."""
    return ZImagePipeline(**z_image_components())


def sana_components(**kwargs) -> dict:
    tokenizer, text_encoder = text.gemma2()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
        **kwargs,
    )
    return {
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": autoencoders.dc(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": wake(transformer),
    }


def sana() -> SanaPipeline:
    return SanaPipeline(**sana_components())


def sana_sprint_components() -> dict:
    components = sana_components(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    return components | {"scheduler": SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}


def sana_sprint() -> SanaSprintPipeline:
    """A consistency model on the arc from noise to data (TrigFlow)."""
    return SanaSprintPipeline(**sana_sprint_components())


def lumina2() -> Lumina2Pipeline:
    """The pipeline takes it for granted that a latent number is 8 pixels wide and high."""
    tokenizer, text_encoder = text.gemma2()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(320, 32, 32),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoders.kl(block_out_channels=(8, 8, 8, 8)),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=wake(transformer),
    )


def hidream() -> HiDreamImagePipeline:
    """HiDream-I1-Full. The pipeline scales every size to the area of its default one."""
    tokenizer, text_encoder = text.clip(projection=True, max_length=128)
    tokenizer_2, text_encoder_2 = text.clip(projection=True, max_length=128)
    tokenizer_3, text_encoder_3 = text.t5()
    tokenizer_4, text_encoder_4 = text.llama()
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipeline = HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=autoencoders.kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=text_encoder_4,
        tokenizer_4=tokenizer_4,
        transformer=wake(transformer),
    )
    pipeline.default_sample_size = 4
    return pipeline


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "FluxPipeline": flux,
    "FluxPipeline/schnell": flux_schnell,
    "FluxKontextPipeline": flux_kontext,
    # The caller seeds the generator just before; these three seed it again, with the same number by default.
    "StableDiffusion3Pipeline": tiny_sd3,
    "StableDiffusionPipeline": tiny_sd,
    "StableDiffusionXLPipeline": tiny_sdxl,
    "ChromaPipeline": chroma,
    "QwenImagePipeline": qwen_image,
    "QwenImageEditPipeline": qwen_image_edit,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2_klein,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
    "SanaSprintPipeline": sana_sprint,
    "Lumina2Pipeline": lumina2,
    "HiDreamImagePipeline": hidream,
}

SANA = {"height": 32, "width": 32, "guidance_scale": 4.5, "use_resolution_binning": False}
QWEN = SIZE | {"negative_prompt": " ", "true_cfg_scale": 4.0}

ARGUMENTS: dict[str, dict] = {
    "FluxPipeline": SIZE | {"guidance_scale": 3.5},
    "FluxPipeline/schnell": SIZE | {"guidance_scale": 0.0, "max_sequence_length": 256},
    # Otherwise it takes a size of a million pixels and a picture of one of a list of such sizes.
    "FluxKontextPipeline": SIZE | {"image": picture(), "guidance_scale": 2.5, "max_area": 64, "_auto_resize": False},
    "StableDiffusion3Pipeline": SIZE | {"guidance_scale": 7.0},
    "StableDiffusionPipeline": SIZE | {"guidance_scale": 7.5},
    "StableDiffusionXLPipeline": SIZE | {"guidance_scale": 5.0},
    "ChromaPipeline": SIZE | {"negative_prompt": "low quality", "guidance_scale": 3.0},
    "QwenImagePipeline": QWEN,
    "QwenImageEditPipeline": QWEN | {"height": 128, "width": 128, "image": picture()},
    "Flux2Pipeline": SIZE | {"guidance_scale": 4.0, "max_sequence_length": 48},
    "Flux2KleinPipeline": SIZE | {"guidance_scale": 4.0, "max_sequence_length": 48},
    "ZImagePipeline": SIZE | {"guidance_scale": 4.0},
    "SanaPipeline": SANA,
    # Any number of steps, and not only two.
    "SanaSprintPipeline": SANA | {"intermediate_timesteps": None},
    "Lumina2Pipeline": {"height": 32, "width": 32} | {"guidance_scale": 4.0},
    "HiDreamImagePipeline": SIZE | {"guidance_scale": 5.0},
}

NOT_BUILT: dict[str, str] = {}
