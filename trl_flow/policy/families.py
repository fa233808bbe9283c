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

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineFamily:
    """
    How to drive a family of diffusers pipelines.

    Attributes:
        name (`str`): Name of the family.
        pipelines (`tuple[str, ...]`): Class names of its pipelines.
        encoded (`tuple[str, ...]`): Call arguments that the outputs of `encode_prompt` feed, in order.
        lora_target_modules (`tuple[str, ...]`): Modules that LoRA adapts unless the user says otherwise.
        component (`str`): Attribute of the pipeline that holds the denoiser.
        no_guidance (`float`): The `guidance_scale` at which the pipeline evaluates no unconditional branch.
        scheduler (`str`): `"flow"` where the denoiser predicts a velocity, `"ddim"` where it predicts noise or v and
            is sampled as a flow model in other coordinates (see [`trl_flow.policy.diffusion`]).
    """

    name: str
    pipelines: tuple[str, ...]
    encoded: tuple[str, ...]
    lora_target_modules: tuple[str, ...]
    component: str = "transformer"
    no_guidance: float = 1.0
    scheduler: str = "flow"

    @property
    def sampler(self) -> str | None:
        """Class of the scheduler that samples as in training, where it may not be the checkpoint's own."""
        return "DDIMScheduler" if self.scheduler == "ddim" else None


STABLE_DIFFUSION_3 = PipelineFamily(
    name="Stable Diffusion 3",
    pipelines=("StableDiffusion3Pipeline",),
    encoded=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    # The published Flow-GRPO configuration for SD3.5-M.
    lora_target_modules=(
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ),
)

# What DDPO and diffusers' text-to-image LoRA scripts adapt: the projections of self- and cross-attention.
UNET_ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")

# Stable Diffusion 1 and 2, which share a pipeline.
STABLE_DIFFUSION = PipelineFamily(
    name="Stable Diffusion",
    pipelines=("StableDiffusionPipeline",),
    encoded=("prompt_embeds", "negative_prompt_embeds"),
    lora_target_modules=UNET_ATTENTION,
    component="unet",
    scheduler="ddim",
)

STABLE_DIFFUSION_XL = PipelineFamily(
    name="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    encoded=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    lora_target_modules=UNET_ATTENTION,
    component="unet",
    scheduler="ddim",
)

FAMILIES = (STABLE_DIFFUSION_3, STABLE_DIFFUSION, STABLE_DIFFUSION_XL)


def find_family(pipeline_class_name: str) -> PipelineFamily:
    """The record of a pipeline class; `ValueError` with the known classes when there is none."""
    for family in FAMILIES:
        if pipeline_class_name in family.pipelines:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
    raise ValueError(f"{pipeline_class_name} is not supported. Supported pipelines: {known}.")
