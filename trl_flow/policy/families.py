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

"""What differs between pipeline families, as data: one record each."""

import inspect
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import nn


@dataclass(frozen=True)
class PipelineFamily:
    """
    How to train a family of diffusers pipelines: what is not found out by calling them.

    Attributes:
        name (`str`): Name of the family.
        pipelines (`tuple[str, ...]`): Class names of its pipelines.
        lora_target_modules (`tuple[str, ...]`): Modules that LoRA adapts unless the user says otherwise.
        lora_r, lora_alpha (`int`): Rank and scale of that adapter.
        components (`tuple[str, ...]`): Attributes of the pipeline that hold a denoiser, trained where present.
        guidance (`str` or `None`): Call argument that `guidance_scale` sets; `"guider"` for the pipeline's guider.
        guidance_scale (`float`): Its default.
        num_eval_inference_steps (`int`): Default number of steps at evaluation. That of a rollout is the method's.
        negative_prompt (`str` or `None`): Default of `negative_prompt`. Some pipelines are guided only if there is one.
        height, width (`int` or `None`): Default size in pixels, if not above the pipeline's own; `None` for that.
        num_frames (`int` or `None`): Default number of frames; `None` for the pipeline's own.
        diffusion (`bool`): Whether the models predict noise or v, whatever their scheduler is.
        image (`str` or `None`): Whether a picture beside the prompt is `"required"` or `"optional"`; `None` where the
            pipeline takes none.
        inferred (`bool`): Whether this is no record but what inspection of an unknown pipeline found.
    """

    name: str
    pipelines: tuple[str, ...]
    lora_target_modules: tuple[str, ...]
    lora_r: int = 32
    lora_alpha: int = 64
    components: tuple[str, ...] = ("transformer",)
    guidance: str | None = "guidance_scale"
    guidance_scale: float = 4.5
    num_eval_inference_steps: int = 50
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    diffusion: bool = False
    image: str | None = None
    inferred: bool = False


# Projections of self- and cross-attention under their usual names, and those of a second, joint stream.
ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")
JOINT_ATTENTION = (*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
# The published Flow-GRPO configuration for FLUX.1-dev.
FLUX_LAYERS = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

STABLE_DIFFUSION_3 = PipelineFamily(
    name="Stable Diffusion 3",
    pipelines=("StableDiffusion3Pipeline",),
    # The published Flow-GRPO configuration for SD3.5-M, which leaves out its second attention (attn2).
    lora_target_modules=tuple(f"attn.{name}" for name in JOINT_ATTENTION),
    num_eval_inference_steps=40,
    height=512,
    width=512,
)

FLUX_1 = PipelineFamily(
    name="FLUX.1",
    pipelines=("FluxPipeline",),
    lora_target_modules=FLUX_LAYERS,
    lora_r=64,
    lora_alpha=128,
    guidance_scale=3.5,
    num_eval_inference_steps=28,
    height=512,
    width=512,
)

FLUX_1_KONTEXT = PipelineFamily(
    name="FLUX.1 Kontext",
    pipelines=("FluxKontextPipeline",),
    lora_target_modules=FLUX_LAYERS,
    lora_r=64,
    lora_alpha=128,
    guidance_scale=2.5,
    num_eval_inference_steps=28,
    height=512,
    width=512,
    image="required",
)

FLUX_2 = PipelineFamily(
    name="FLUX.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    lora_target_modules=(*JOINT_ATTENTION, "to_qkv_mlp_proj"),
    guidance_scale=4.0,
    height=512,
    width=512,
    image="optional",
)

QWEN_IMAGE = PipelineFamily(
    name="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    lora_target_modules=JOINT_ATTENTION,
    lora_r=64,
    lora_alpha=128,
    guidance="true_cfg_scale",
    guidance_scale=4.0,
    negative_prompt=" ",
    height=512,
    width=512,
)

QWEN_IMAGE_EDIT = PipelineFamily(
    name="Qwen-Image-Edit",
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    lora_target_modules=JOINT_ATTENTION,
    lora_r=64,
    lora_alpha=128,
    guidance="true_cfg_scale",
    guidance_scale=4.0,
    negative_prompt=" ",
    height=512,
    width=512,
    image="required",
)

Z_IMAGE = PipelineFamily(
    name="Z-Image",
    pipelines=("ZImagePipeline",),
    lora_target_modules=ATTENTION,
    guidance_scale=5.0,
)

CHROMA = PipelineFamily(
    name="Chroma",
    pipelines=("ChromaPipeline",),
    lora_target_modules=FLUX_LAYERS,
    guidance_scale=5.0,
    num_eval_inference_steps=35,
    negative_prompt="",
)

SANA = PipelineFamily(
    name="Sana",
    pipelines=("SanaPipeline",),
    lora_target_modules=ATTENTION,
    guidance_scale=4.5,
    num_eval_inference_steps=20,
    negative_prompt="",
)

LUMINA_2 = PipelineFamily(
    name="Lumina-Image 2",
    pipelines=("Lumina2Pipeline",),
    lora_target_modules=ATTENTION,
    guidance_scale=4.0,
    num_eval_inference_steps=30,
)

COGVIEW_4 = PipelineFamily(
    name="CogView4",
    pipelines=("CogView4Pipeline",),
    lora_target_modules=ATTENTION,
    guidance_scale=3.5,
)

HIDREAM = PipelineFamily(
    name="HiDream-I1",
    pipelines=("HiDreamImagePipeline",),
    lora_target_modules=("to_k", "to_k_t", "to_out", "to_out_t", "to_q", "to_q_t", "to_v", "to_v_t"),
    guidance_scale=5.0,
)

WAN = PipelineFamily(
    name="Wan",
    pipelines=("WanPipeline",),
    lora_target_modules=ATTENTION,
    # Wan 2.2 has one denoiser above and one below a noise level.
    components=("transformer", "transformer_2"),
    guidance_scale=4.5,
    height=240,
    width=416,
    num_frames=33,
)

WAN_IMAGE_TO_VIDEO = PipelineFamily(
    name="Wan image-to-video",
    pipelines=("WanImageToVideoPipeline",),
    lora_target_modules=(*ATTENTION, "add_k_proj", "add_v_proj"),
    components=("transformer", "transformer_2"),
    guidance_scale=4.5,
    height=240,
    width=416,
    num_frames=33,
    image="required",
)

LTX_VIDEO = PipelineFamily(
    name="LTX-Video",
    pipelines=("LTXPipeline",),
    lora_target_modules=ATTENTION,
    guidance_scale=3.0,
    height=256,
    width=384,
    num_frames=33,
)

HUNYUAN_VIDEO = PipelineFamily(
    name="HunyuanVideo",
    pipelines=("HunyuanVideoPipeline",),
    lora_target_modules=JOINT_ATTENTION,
    guidance_scale=6.0,
    height=240,
    width=416,
    num_frames=33,
)

HUNYUAN_VIDEO_1_5 = PipelineFamily(
    name="HunyuanVideo 1.5",
    pipelines=("HunyuanVideo15Pipeline",),
    lora_target_modules=JOINT_ATTENTION,
    guidance="guider",
    guidance_scale=6.0,
    height=240,
    width=416,
    num_frames=33,
)

# Stable Diffusion 1 and 2, which share a pipeline. Attention is what DDPO and diffusers' text-to-image scripts adapt.
STABLE_DIFFUSION = PipelineFamily(
    name="Stable Diffusion",
    pipelines=("StableDiffusionPipeline",),
    lora_target_modules=ATTENTION,
    components=("unet",),
    guidance_scale=5.0,
    diffusion=True,
)

STABLE_DIFFUSION_XL = PipelineFamily(
    name="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    lora_target_modules=ATTENTION,
    components=("unet",),
    guidance_scale=5.0,
    diffusion=True,
)

FAMILIES = (
    STABLE_DIFFUSION_3,
    FLUX_1,
    FLUX_1_KONTEXT,
    FLUX_2,
    QWEN_IMAGE,
    QWEN_IMAGE_EDIT,
    Z_IMAGE,
    CHROMA,
    SANA,
    LUMINA_2,
    COGVIEW_4,
    HIDREAM,
    WAN,
    WAN_IMAGE_TO_VIDEO,
    LTX_VIDEO,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_1_5,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
)


def find_family(pipeline: DiffusionPipeline) -> PipelineFamily:
    """
    The record of a pipeline's family, or what inspection finds where there is none.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline.

    Raises:
        ValueError: If the pipeline has no denoiser that could be trained, or no `__call__` that could be asked.
    """
    name = type(pipeline).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    components = tuple(
        component
        for component in ("transformer", "transformer_2", "unet")
        if isinstance(pipeline.components.get(component), nn.Module)
    )
    if not components:
        raise ValueError(
            f"{name} holds no denoiser under a name that diffusers uses (transformer, unet): it holds "
            f"{', '.join(sorted(pipeline.components))}."
        )
    parameters = inspect.signature(type(pipeline).__call__).parameters
    missing = [argument for argument in ("prompt", "num_inference_steps", "output_type") if argument not in parameters]
    if missing:
        raise ValueError(f"The call of {name} takes no {', '.join(missing)}: it cannot be asked for one velocity.")
    if "strength" in parameters:
        raise ValueError(
            f"{name} begins with a picture to which noise is added (its argument `strength`), not with noise: its first "
            "steps are not there to be trained."
        )
    # A pipeline that has both arguments takes the distilled guidance of its model by the first.
    known = ("guidance_scale", "true_cfg_scale")
    guidance = next((argument for argument in known if argument in parameters), None)
    default = parameters[guidance].default if guidance else None
    steps = parameters["num_inference_steps"].default
    if guidance is None and pipeline.components.get("guider") is not None:
        guidance, default = "guider", getattr(pipeline.guider, "guidance_scale", None)
    image = None
    if "image" in parameters:
        image = "required" if parameters["image"].default is inspect.Parameter.empty else "optional"
    return PipelineFamily(
        name=name,
        pipelines=(name,),
        lora_target_modules=attention_layers(*(getattr(pipeline, component) for component in components)),
        components=components,
        guidance=guidance,
        guidance_scale=float(default) if isinstance(default, (int, float)) else 1.0,
        num_eval_inference_steps=steps if isinstance(steps, int) else 50,
        image=image,
        inferred=True,
    )


def attention_layers(*denoisers: nn.Module) -> tuple[str, ...]:
    """Names of attention's linear layers under their usual names, else of all linear layers inside a list of blocks."""
    linear = {
        name for denoiser in denoisers for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)
    }
    usual = tuple(
        layer for layer in JOINT_ATTENTION if any(name == layer or name.endswith("." + layer) for name in linear)
    )
    return usual or tuple(sorted(name for name in linear if any(part.isdigit() for part in name.split("."))))
