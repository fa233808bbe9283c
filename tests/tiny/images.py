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

import inspect
from collections.abc import Callable

from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    UniPCMultistepScheduler,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from pipelines import tiny_sd, tiny_sd3, tiny_sdxl
from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

from . import autoencoders, text
from .waking import wake


SIZE = {"height": 8, "width": 8}


def picture(height: int = 8, width: int = 8) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    return Image.merge("RGB", (red, green, Image.new("L", red.size, 64))).resize((width, height))


def mask(height: int = 8, width: int = 8) -> Image.Image:
    """White, which is to be painted, in the right half."""
    picture = Image.new("L", (width, height), 0)
    picture.paste(255, (width // 2, 0, width, height))
    return picture


def without(components: dict, *names: str) -> dict:
    return {name: component for name, component in components.items() if name not in names}


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


FLUX_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}


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
        "transformer": wake(FluxTransformer2DModel(**(FLUX_TRANSFORMER | {"out_channels": 16} | transformer))),
    }


def flux_like(cls: type[DiffusionPipeline], **transformer) -> Callable[[], DiffusionPipeline]:
    """FLUX.1-dev's components, but for arguments of the `transformer`."""
    return lambda: cls(**flux_components(**transformer))


def flux_controlnet_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**flux_components(), controlnet=wake(FluxControlNetModel(**FLUX_TRANSFORMER)))


def flux_schnell() -> FluxPipeline:
    """Distilled to few steps: no guidance, and a schedule without shift."""
    scheduler = flow_scheduler(shift=1.0, use_dynamic_shifting=False)
    return FluxPipeline(**(flux_components(guidance_embeds=False) | {"scheduler": scheduler}))


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


def chroma_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**chroma_components())


def chroma_inpaint() -> ChromaInpaintPipeline:
    """It asks for a setting of the transformer that only a checkpoint's file may have."""
    components = chroma_components()
    components["transformer"].register_to_config(guidance_embeds=False)
    return ChromaInpaintPipeline(**components)


def sd3_inpaint() -> StableDiffusion3InpaintPipeline:
    """It takes latents of 16 channels only."""
    components = tiny_sd3().components
    config = dict(components["transformer"].config) | {"in_channels": 16, "out_channels": 16}
    transformer = SD3Transformer2DModel.from_config(config)
    return StableDiffusion3InpaintPipeline(
        **(components | {"transformer": transformer, "vae": autoencoders.kl(latent_channels=16)})
    )


def sd3_controlnet_like(
    cls: type[DiffusionPipeline], extra_conditioning_channels: int = 0
) -> Callable[[], DiffusionPipeline]:
    def build():
        pipeline = tiny_sd3()
        names = set(inspect.signature(SD3ControlNetModel).parameters)
        config = {name: value for name, value in pipeline.transformer.config.items() if name in names}
        config |= {"num_layers": 1, "extra_conditioning_channels": extra_conditioning_channels}
        return cls(**pipeline.components, controlnet=wake(SD3ControlNetModel(**config)))

    return build


def sd3_like(cls: type[DiffusionPipeline], **kwargs) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**without(tiny_sd3().components, "image_encoder", "feature_extractor"), **kwargs)


QWEN_TRANSFORMER = {
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
# The pipelines that edit scale every picture to a million pixels: 32 of them a latent number keep it small.
MEGAPIXEL = {"levels": 5, "num_res_blocks": 0}


def qwen_image_components(vae: dict | None = None, **kwargs) -> dict:
    """`vae` has arguments of the autoencoder, the others are of the transformer."""
    vae = autoencoders.kl_qwen_image(**(vae or {}))
    tokenizer, processor, text_encoder = text.qwen2_5_vl()
    transformer = QwenImageTransformer2DModel(
        **QWEN_TRANSFORMER, in_channels=4 * vae.config.z_dim, out_channels=vae.config.z_dim, **kwargs
    )
    return {
        "scheduler": flow_scheduler(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "processor": processor,
        "transformer": wake(transformer, gain=1.7),
    }


def qwen_image_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**without(qwen_image_components(), "processor"))


def qwen_image_edit_like(
    cls: type[DiffusionPipeline], vae: dict = MEGAPIXEL, **transformer
) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**qwen_image_components(vae, **transformer))


def qwen_image_controlnet_like(
    cls: type[DiffusionPipeline], extra_condition_channels: int = 0
) -> Callable[[], DiffusionPipeline]:
    def build():
        controlnet = QwenImageControlNetModel(
            **QWEN_TRANSFORMER, in_channels=16, out_channels=4, extra_condition_channels=extra_condition_channels
        )
        return cls(**without(qwen_image_components(), "processor"), controlnet=wake(controlnet, gain=1.7))

    return build


def qwen_image_layered() -> QwenImageLayeredPipeline:
    """Pictures have a fourth channel, opacity. (It takes what has as many channels as latents for latents.)"""
    vae = MEGAPIXEL | {"base_dim": 4, "input_channels": 4, "z_dim": 8}
    return QwenImageLayeredPipeline(**qwen_image_components(vae, use_additional_t_cond=True, use_layer3d_rope=True))


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
    return wake(transformer, gain=1.7)


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


def flux2_klein_like(cls: type[DiffusionPipeline], is_distilled: bool = False) -> Callable[[], DiffusionPipeline]:
    """The base model, which takes guidance, if it is not `is_distilled`."""
    return lambda: cls(**flux2_klein_components(), is_distilled=is_distilled)


Z_IMAGE_TRANSFORMER = {"dim": 16, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def z_image_components(**kwargs) -> dict:
    tokenizer, text_encoder = text.qwen3()
    transformer = ZImageTransformer2DModel(
        **Z_IMAGE_TRANSFORMER,
        in_channels=4,
        n_layers=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
        **kwargs,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": autoencoders.kl(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": wake(transformer),
    }


def z_image_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Z-Image, which takes guidance, and not Z-Image-Turbo (shift 3, no guidance)."""
    return lambda: cls(**z_image_components())


def z_image_turbo() -> ZImagePipeline:
    """Distilled to few steps: no guidance."""
    return ZImagePipeline(**(z_image_components() | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}))


def z_image_omni() -> ZImageOmniPipeline:
    """The pipeline gives the autoencoder pictures in bfloat16, whatever the autoencoder's precision is."""
    components = z_image_components(siglip_feat_dim=16)
    components["vae"].bfloat16()
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=16
    )
    return ZImageOmniPipeline(
        **components,
        siglip=Siglip2VisionModel(config).eval(),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16),
    )


def z_image_controlnet_like(cls: type[DiffusionPipeline], control_in_dim: int) -> Callable[[], DiffusionPipeline]:
    """The pipeline has the controlnet share the embedders and refiners of the transformer."""

    def build():
        controlnet = ZImageControlNetModel(
            **Z_IMAGE_TRANSFORMER,
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=control_in_dim,
            add_control_noise_refiner="control_noise_refiner",
        )
        return cls(**z_image_components(), controlnet=wake(controlnet))

    return build


SANA_TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 4,
}


def sana_components(**kwargs) -> dict:
    tokenizer, text_encoder = text.gemma2()
    transformer = SanaTransformer2DModel(**SANA_TRANSFORMER, num_layers=2, **kwargs)
    return {
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": autoencoders.dc(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": wake(transformer),
    }


def sana_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**sana_components())


def sana_controlnet() -> SanaControlNetPipeline:
    controlnet = wake(SanaControlNetModel(**SANA_TRANSFORMER, num_layers=1))
    return SanaControlNetPipeline(**sana_components(), controlnet=controlnet)


def sana_sprint_components() -> dict:
    components = sana_components(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    return components | {"scheduler": SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}


def sana_sprint_like(cls: type[DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """A consistency model on the arc from noise to data (TrigFlow)."""
    return lambda: cls(**sana_sprint_components())


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


def hidream_dev() -> HiDreamImagePipeline:
    """Distilled to 28 steps, each of which noises its prediction of the picture anew: no guidance."""
    pipeline = hidream()
    pipeline.register_modules(scheduler=FlowMatchLCMScheduler(shift=6.0))
    return pipeline


def hidream() -> HiDreamImagePipeline:
    """HiDream-I1-Full. The pipeline scales every size to the area of its default one.

    Its transformer gives other outputs in training mode (no picture's shape, no routing as in inference) unless
    `force_inference_output` is set.
    """
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


# FLUX's control pipelines join the control picture's latents to the noisy ones, and the filling one a masked
# picture's and the mask (2 x 2 latents of 2 x 2 pixels each).
CONTROL = {"in_channels": 32}
FILL = {"in_channels": 16 + 16 + 16}

BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "FluxPipeline": flux_like(FluxPipeline),
    "FluxPipeline/schnell": flux_schnell,
    "FluxKontextPipeline": flux_like(FluxKontextPipeline),
    "FluxKontextInpaintPipeline": flux_like(FluxKontextInpaintPipeline),
    "FluxImg2ImgPipeline": flux_like(FluxImg2ImgPipeline),
    "FluxInpaintPipeline": flux_like(FluxInpaintPipeline),
    "FluxFillPipeline": flux_like(FluxFillPipeline, **FILL),
    "FluxControlPipeline": flux_like(FluxControlPipeline, **CONTROL),
    "FluxControlImg2ImgPipeline": flux_like(FluxControlImg2ImgPipeline, **CONTROL),
    "FluxControlInpaintPipeline": flux_like(FluxControlInpaintPipeline, **CONTROL),
    "FluxControlNetPipeline": flux_controlnet_like(FluxControlNetPipeline),
    "FluxControlNetImg2ImgPipeline": flux_controlnet_like(FluxControlNetImg2ImgPipeline),
    "FluxControlNetInpaintPipeline": flux_controlnet_like(FluxControlNetInpaintPipeline),
    # These three, and what is made of them, seed the generator themselves, with 0.
    "StableDiffusion3Pipeline": tiny_sd3,
    "StableDiffusionPipeline": tiny_sd,
    "StableDiffusionXLPipeline": tiny_sdxl,
    "StableDiffusion3Img2ImgPipeline": sd3_like(StableDiffusion3Img2ImgPipeline),
    "StableDiffusion3InpaintPipeline": sd3_inpaint,
    "StableDiffusion3PAGPipeline": sd3_like(StableDiffusion3PAGPipeline),
    "StableDiffusion3PAGImg2ImgPipeline": sd3_like(StableDiffusion3PAGImg2ImgPipeline),
    "StableDiffusion3ControlNetPipeline": sd3_controlnet_like(StableDiffusion3ControlNetPipeline),
    "StableDiffusion3ControlNetInpaintingPipeline": sd3_controlnet_like(
        StableDiffusion3ControlNetInpaintingPipeline, extra_conditioning_channels=1
    ),
    "ChromaPipeline": chroma_like(ChromaPipeline),
    "ChromaImg2ImgPipeline": chroma_like(ChromaImg2ImgPipeline),
    "ChromaInpaintPipeline": chroma_inpaint,
    "QwenImagePipeline": qwen_image_like(QwenImagePipeline),
    "QwenImageImg2ImgPipeline": qwen_image_like(QwenImageImg2ImgPipeline),
    "QwenImageInpaintPipeline": qwen_image_like(QwenImageInpaintPipeline),
    "QwenImageControlNetPipeline": qwen_image_controlnet_like(QwenImageControlNetPipeline),
    "QwenImageControlNetInpaintPipeline": qwen_image_controlnet_like(QwenImageControlNetInpaintPipeline, 4),
    "QwenImageEditPipeline": qwen_image_edit_like(QwenImageEditPipeline),
    "QwenImageEditInpaintPipeline": qwen_image_edit_like(QwenImageEditInpaintPipeline, MEGAPIXEL | {"base_dim": 4}),
    "QwenImageEditPlusPipeline": qwen_image_edit_like(QwenImageEditPlusPipeline),
    # Qwen-Image-Edit-2511 gives the pictures that it edits the time of clean ones.
    "QwenImageEditPlusPipeline/2511": qwen_image_edit_like(QwenImageEditPlusPipeline, zero_cond_t=True),
    "QwenImageLayeredPipeline": qwen_image_layered,
    "Flux2Pipeline": flux2,
    "Flux2Pipeline/edit": flux2,
    "Flux2KleinPipeline": flux2_klein_like(Flux2KleinPipeline),
    "Flux2KleinPipeline/edit": flux2_klein_like(Flux2KleinPipeline),
    "Flux2KleinPipeline/distilled": flux2_klein_like(Flux2KleinPipeline, is_distilled=True),
    "Flux2KleinInpaintPipeline": flux2_klein_like(Flux2KleinInpaintPipeline),
    "Flux2KleinKVPipeline": flux2_klein_like(Flux2KleinKVPipeline, is_distilled=True),
    "ZImagePipeline": z_image_like(ZImagePipeline),
    "ZImagePipeline/turbo": z_image_turbo,
    "ZImageOmniPipeline": z_image_omni,
    "ZImageImg2ImgPipeline": z_image_like(ZImageImg2ImgPipeline),
    "ZImageInpaintPipeline": z_image_like(ZImageInpaintPipeline),
    "ZImageControlNetPipeline": z_image_controlnet_like(ZImageControlNetPipeline, 4),
    # Latents of the control picture, the mask, latents of the masked picture.
    "ZImageControlNetInpaintPipeline": z_image_controlnet_like(ZImageControlNetInpaintPipeline, 4 + 1 + 4),
    "SanaPipeline": sana_like(SanaPipeline),
    "SanaPAGPipeline": sana_like(SanaPAGPipeline),
    "SanaControlNetPipeline": sana_controlnet,
    "SanaSprintPipeline": sana_sprint_like(SanaSprintPipeline),
    "SanaSprintImg2ImgPipeline": sana_sprint_like(SanaSprintImg2ImgPipeline),
    "Lumina2Pipeline": lumina2,
    "HiDreamImagePipeline": hidream,
    "HiDreamImagePipeline/dev": hidream_dev,
}

PICTURE = {"image": picture()}
# Of two steps, 0.75 keeps both, of four three.
FROM_PICTURE = PICTURE | {"strength": 0.75}
INPAINT = FROM_PICTURE | {"mask_image": mask()}
CONTROL_PICTURE = {"control_image": picture().rotate(90)}
FLUX = SIZE | {"guidance_scale": 3.5}
# Otherwise Kontext takes a size of a million pixels, and a picture of one of a list of such sizes.
KONTEXT = SIZE | PICTURE | {"guidance_scale": 2.5, "max_area": 64, "_auto_resize": False}
SD3 = SIZE | {"guidance_scale": 7.0}
CHROMA = SIZE | {"negative_prompt": "low quality", "guidance_scale": 3.0}
QWEN = SIZE | {"negative_prompt": " ", "true_cfg_scale": 4.0}
QWEN_EDIT = QWEN | PICTURE | {"height": 128, "width": 128}
FLUX2 = SIZE | {"guidance_scale": 4.0, "max_sequence_length": 48}
# The smallest that FLUX.2 takes.
FLUX2_PICTURE = {"image": picture(64, 64)}
Z_IMAGE = SIZE | {"guidance_scale": 4.0}
SANA = {"height": 32, "width": 32, "guidance_scale": 4.5, "use_resolution_binning": False}

ARGUMENTS: dict[str, dict] = {
    "FluxPipeline": FLUX,
    "FluxPipeline/schnell": SIZE | {"guidance_scale": 0.0, "max_sequence_length": 256},
    "FluxKontextPipeline": KONTEXT,
    "FluxKontextInpaintPipeline": KONTEXT | INPAINT,
    "FluxImg2ImgPipeline": FLUX | FROM_PICTURE,
    "FluxInpaintPipeline": FLUX | INPAINT,
    "FluxFillPipeline": SIZE | PICTURE | {"mask_image": mask(), "guidance_scale": 30.0},
    "FluxControlPipeline": FLUX | CONTROL_PICTURE,
    "FluxControlImg2ImgPipeline": FLUX | CONTROL_PICTURE | FROM_PICTURE,
    "FluxControlInpaintPipeline": FLUX | CONTROL_PICTURE | INPAINT,
    "FluxControlNetPipeline": FLUX | CONTROL_PICTURE,
    "FluxControlNetImg2ImgPipeline": FLUX | CONTROL_PICTURE | FROM_PICTURE,
    "FluxControlNetInpaintPipeline": FLUX | CONTROL_PICTURE | INPAINT,
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionPipeline": SIZE | {"guidance_scale": 7.5},
    "StableDiffusionXLPipeline": SIZE | {"guidance_scale": 5.0},
    "StableDiffusion3Img2ImgPipeline": SD3 | FROM_PICTURE,
    "StableDiffusion3InpaintPipeline": SD3 | INPAINT,
    "StableDiffusion3PAGPipeline": SD3,
    "StableDiffusion3PAGImg2ImgPipeline": SD3 | FROM_PICTURE,
    # The pipelines that say `control_mask`, and SD3's other one, draw the control picture's latents from torch's own
    # generator: a result is the same only after the same `torch.manual_seed`.
    "StableDiffusion3ControlNetPipeline": SD3 | CONTROL_PICTURE,
    "StableDiffusion3ControlNetInpaintingPipeline": SD3 | CONTROL_PICTURE | {"control_mask": mask()},
    "ChromaPipeline": CHROMA,
    "ChromaImg2ImgPipeline": CHROMA | FROM_PICTURE,
    "ChromaInpaintPipeline": CHROMA | INPAINT,
    "QwenImagePipeline": QWEN,
    "QwenImageImg2ImgPipeline": QWEN | FROM_PICTURE,
    "QwenImageInpaintPipeline": QWEN | INPAINT,
    "QwenImageControlNetPipeline": QWEN | CONTROL_PICTURE,
    "QwenImageControlNetInpaintPipeline": QWEN | CONTROL_PICTURE | {"control_mask": mask()},
    # For a list of prompts, the first two take a picture and a negative prompt for each; the others take no such list.
    "QwenImageEditPipeline": QWEN_EDIT,
    # It paints a million pixels whatever it is told: a second for latents' decoding.
    "QwenImageEditInpaintPipeline": QWEN_EDIT | INPAINT,
    "QwenImageEditPlusPipeline": QWEN_EDIT,
    "QwenImageEditPlusPipeline/2511": QWEN_EDIT,
    "QwenImageLayeredPipeline": {
        "image": picture().convert("RGBA"),
        "layers": 1,
        "negative_prompt": " ",
        "true_cfg_scale": 4.0,
    },
    "Flux2Pipeline": FLUX2,
    "Flux2Pipeline/edit": FLUX2 | FLUX2_PICTURE,
    "Flux2KleinPipeline": FLUX2,
    "Flux2KleinPipeline/edit": FLUX2 | FLUX2_PICTURE,
    "Flux2KleinPipeline/distilled": FLUX2 | {"guidance_scale": 1.0},
    "Flux2KleinInpaintPipeline": FLUX2 | INPAINT,
    "Flux2KleinKVPipeline": SIZE | FLUX2_PICTURE | {"max_sequence_length": 48},
    "ZImagePipeline": Z_IMAGE,
    "ZImagePipeline/turbo": SIZE | {"guidance_scale": 0.0},
    "ZImageOmniPipeline": Z_IMAGE | {"image": [picture(64, 64)]},
    "ZImageImg2ImgPipeline": Z_IMAGE | FROM_PICTURE,
    "ZImageInpaintPipeline": Z_IMAGE | INPAINT,
    "ZImageControlNetPipeline": Z_IMAGE | CONTROL_PICTURE,
    "ZImageControlNetInpaintPipeline": Z_IMAGE | CONTROL_PICTURE | PICTURE | {"mask_image": mask()},
    "SanaPipeline": SANA,
    "SanaPAGPipeline": SANA,
    "SanaControlNetPipeline": SANA | CONTROL_PICTURE,
    # Any number of steps, and not only two.
    "SanaSprintPipeline": SANA | {"intermediate_timesteps": None},
    "SanaSprintImg2ImgPipeline": SANA | FROM_PICTURE | {"intermediate_timesteps": None},
    "Lumina2Pipeline": {"height": 32, "width": 32, "guidance_scale": 4.0},
    "HiDreamImagePipeline": SIZE | {"guidance_scale": 5.0},
    # Its steps draw their noise from torch's own generator, too.
    "HiDreamImagePipeline/dev": SIZE | {"guidance_scale": 0.0},
}

NOT_BUILT: dict[str, str] = {
    "FluxPriorReduxPipeline": "it makes embeddings of a picture, and no picture",
}
