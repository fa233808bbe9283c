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

"""The pipeline is the policy: the velocity that is trained is the one that the user's own pipeline computes."""

import copy
import functools
import inspect
from collections import OrderedDict
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from .diffusion import DDIMIdleScheduler, DDIMQueryScheduler, check_scheduler
from .families import PipelineFamily, find_family
from .schedulers import IdleScheduler, QueryScheduler


class PolicyConfig(dict):
    """What `transformers.Trainer`, its loggers and its callbacks expect of `model.config`."""

    model_type = "flow-policy"
    _name_or_path = ""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return str(dict(self))


class FlowPolicy(nn.Module):
    """
    A diffusers pipeline as a policy over latents.

    `forward` makes one single-step call of the pipeline's own `__call__`, with a scheduler that hands back the model
    output after guidance. Nothing of a model family (guidance, packing, position ids, signs, timesteps) is written
    again here, so what is trained equals what the pipeline computes at inference.

    Diffusion pipelines (Stable Diffusion 1, 2 and XL) are flow models in other coordinates, sampled by DDIM: see
    [`trl_flow.policy.diffusion`]. Latents, sigmas and velocities are in flow coordinates here and for every caller.

    The denoiser is the only registered child module: DDP and FSDP wrap the policy. The text encoders and the VAE are
    frozen and stay in the pipeline. The pipeline that is passed in keeps its own scheduler; LoRA layers are injected
    into its denoiser in place.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The generator to align.
        peft_config ([`~peft.PeftConfig`], *optional*): The adapter. Default: LoRA of rank 32 and alpha 64 on the
            family's attention projections, as in Flow-GRPO and DenseGRPO.
        height, width (`int`, *optional*): In pixels. Default: the pipeline's.
        guidance_scale (`float`, *optional*, defaults to `1.0`): As the pipeline means it.
        negative_prompt (`str`, *optional*, defaults to `""`): Used when guidance is on.
        max_sequence_length (`int`, *optional*): Text tokens. Default: the pipeline's. Not for pipelines that have no
            such argument.
        cache_size (`int`, *optional*, defaults to `1024`): Prompts whose conditioning is kept.

    Raises:
        ValueError: If the pipeline class is unknown, refuses the resolution, takes no `max_sequence_length`, or has a
            scheduler that DDIM cannot stand in for.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        peft_config: PeftConfig | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        max_sequence_length: int | None = None,
        cache_size: int = 1024,
    ):
        super().__init__()
        self.family: PipelineFamily = find_family(type(pipeline).__name__)
        self.pipeline = pipeline
        self.negative_prompt = negative_prompt
        self.guidance_scale = guidance_scale
        self.cache_size = cache_size
        self._cache: OrderedDict[tuple[str, bool], dict[str, torch.Tensor]] = OrderedDict()
        # `__call__` without `torch.no_grad`, so that gradients reach the denoiser.
        self._call = inspect.unwrap(type(pipeline).__call__)
        call_parameters = inspect.signature(self._call).parameters
        if max_sequence_length is not None and "max_sequence_length" not in call_parameters:
            raise ValueError(
                f"max_sequence_length={max_sequence_length}: {type(pipeline).__name__} always takes as many text "
                "tokens as its text encoder does. Leave it unset."
            )
        self.call_arguments = {
            name: value
            for name, value in {
                "height": height,
                "width": width,
                "guidance_scale": guidance_scale,
                "max_sequence_length": max_sequence_length,
            }.items()
            if value is not None and name in call_parameters
        }

        query, idle = QueryScheduler, IdleScheduler
        if self.family.scheduler == "ddim":
            check_scheduler(pipeline.scheduler)
            query, idle = DDIMQueryScheduler, DDIMIdleScheduler

        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        if peft_config is None:
            peft_config = LoraConfig(
                r=32,
                lora_alpha=64,
                init_lora_weights="gaussian",
                target_modules=list(self.family.lora_target_modules),
            )
        elif peft_config.target_modules is None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = set(self.family.lora_target_modules)
        self.denoiser = get_peft_model(getattr(pipeline, self.family.component), peft_config).eval()

        # Shallow copies: the same components and settings, each with a scheduler of its own.
        self._query = copy.copy(pipeline)
        self._query.scheduler = query.from_config(pipeline.scheduler.config)
        self._idle = copy.copy(pipeline)
        self._idle.scheduler = idle.from_config(pipeline.scheduler.config)
        for copied in (self._query, self._idle):
            copied.set_progress_bar_config(disable=True)
            # A picture that a safety checker has blanked would be scored as what the denoiser drew. It is off in
            # training only: the pipeline that was passed in, and whatever loads the adapter, keeps its own.
            if getattr(copied, "safety_checker", None) is not None:
                copied.safety_checker = None
        self.config = PolicyConfig(pipeline=type(pipeline).__name__, **self.call_arguments)
        self.config._name_or_path = pipeline.config.get("_name_or_path") or ""
        self.latent_shape = tuple(self._idle_call(num_inference_steps=1, output_type="latent").shape[1:])

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def train(self, mode: bool = True):
        # The denoiser stays in eval mode: the ratio of two policies with different dropout masks is no ratio.
        self.training = mode
        return self

    def forward(self, latents: torch.Tensor, sigma: float, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Velocity eps - x0, after guidance.

        Args:
            latents (`torch.Tensor` of shape `(n, *latent)`): x at `sigma`.
            sigma (`float`): Flow time in (0, 1], one for all rows. For diffusion pipelines that of a training
                timestep, as all of [`FlowPolicy.sigmas`] but the end are.
            conditioning (`dict[str, torch.Tensor]`): As [`FlowPolicy.conditioning`] returns it, n rows.

        Returns:
            `torch.Tensor` of shape `(n, *latent)`, float32.

        Raises:
            ValueError: If `sigma` is not the flow time of a training timestep (diffusion pipelines).
        """
        self._query.scheduler.sigma = sigma
        if self.family.scheduler == "ddim":
            self._query.scheduler.dtype = conditioning["prompt_embeds"].dtype
        velocity = self._call(
            self._query,
            latents=latents,
            num_inference_steps=1,
            output_type="latent",
            return_dict=False,
            **conditioning,
            **self.call_arguments,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Conditioning of one prompt, as arguments of the pipeline's call with one row each. Kept for the next time."""
        guided = self.guidance_scale > self.family.no_guidance
        if (prompt, guided) in self._cache:
            self._cache.move_to_end((prompt, guided))
            return self._cache[prompt, guided]
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        arguments = {
            "prompt": prompt,
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": guided,
            # None is what a pipeline takes by default; to SDXL it means zeros, and "" the embedding of the empty text.
            "negative_prompt": self.negative_prompt or None,
            "max_sequence_length": self.call_arguments.get("max_sequence_length"),
        }
        arguments = {name: value for name, value in arguments.items() if name in parameters and value is not None}
        # prompt_2 and prompt_3 are required by name and default to the prompt.
        arguments |= {
            name: None
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty and name not in arguments and name != "self"
        }
        encoded = self.pipeline.encode_prompt(**arguments)
        conditioning = {
            name: value for name, value in zip(self.family.encoded, encoded, strict=True) if value is not None
        }
        self._cache[prompt, guided] = conditioning
        if len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return conditioning

    def conditioning(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Conditioning of n prompts, one row each, on the policy's device. Repeated prompts are encoded once."""
        rows = [self.encode(prompt) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def clean(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Clean latents, of any shape, from those at the end of the grid: the same for flow pipelines. The grid of a
        diffusion pipeline may end above 0, where it takes its latents for clean, in its own coordinates.
        """
        return latents * self._idle.scheduler.final_scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """
        Pictures of clean latents, by the pipeline's own decoding.

        Args:
            latents (`torch.Tensor` of shape `(n, *latent)`): At the end of the grid that [`FlowPolicy.sigmas`] gives.
            batch_size (`int`, *optional*): Largest number of latents decoded at once.

        Returns:
            `torch.Tensor` of shape `(n, 3, height, width)` in [0, 1], float32, on the CPU.
        """
        latents = self.clean(latents)
        if self.family.scheduler == "ddim":
            latents = latents.to(self.pipeline.vae.dtype)  # flow pipelines cast what they are given, these do not
        return torch.cat(
            [
                self._idle_call(latents=rows, num_inference_steps=1, output_type="pt").float().cpu()
                for rows in latents.split(batch_size or len(latents))
            ]
        )

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return tuple(self.decode(torch.zeros(1, *self.latent_shape, device=self.device)).shape[-2:])

    def sigmas(self, num_inference_steps: int) -> torch.Tensor:
        """
        The descending grid of T + 1 flow times that the pipeline itself uses for T steps, float32, on the CPU.

        It ends at 0; for diffusion pipelines, it is that of DDIM's timesteps and ends where DDIM does, which is above
        0 when the scheduler has `set_alpha_to_one=False`.
        """
        self._idle_call(num_inference_steps=num_inference_steps, output_type="latent")
        grid, end = self._idle.scheduler.grid, self._idle.scheduler.final_sigma
        if not (grid.diff() < 0).all() or grid[0] > 1 or grid[-1] != end:
            raise ValueError(
                f"The pipeline's sigma grid for {num_inference_steps} steps is {grid.tolist()}: expected it to descend "
                f"from at most 1 to {end}."
            )
        return grid

    def initial_scale(self, sigmas: torch.Tensor) -> float:
        """
        Factor that makes unit normal noise the latents at the start of a grid, as the stock pipeline starts from them.

        Args:
            sigmas (`torch.Tensor` of shape `(T + 1,)`): As [`FlowPolicy.sigmas`] returns them.

        Returns:
            `float`: 1 for flow pipelines; 1 / (alpha + s) at the first timestep for diffusion pipelines.
        """
        return self._idle.scheduler.initial_scale(sigmas[0].item())

    @contextmanager
    def guided(self, guidance_scale: float | None):
        """Context with another guidance scale; `None` changes nothing."""
        if guidance_scale is None:
            yield
            return
        usual, usual_arguments = self.guidance_scale, self.call_arguments
        self.guidance_scale = guidance_scale
        if "guidance_scale" in usual_arguments:
            self.call_arguments = {**usual_arguments, "guidance_scale": guidance_scale}
        try:
            yield
        finally:
            self.guidance_scale, self.call_arguments = usual, usual_arguments

    def reference(self):
        """Context in which the policy is the frozen base model (the adapter is off)."""
        return self.denoiser.disable_adapter()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recomputes the denoiser's activations in the backward pass. diffusers' checkpointing takes no options."""
        if gradient_checkpointing_kwargs:
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs}: diffusers models take no options for "
                "activation checkpointing. Leave it unset."
            )
        self._base_denoiser.enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable

    @property
    def _base_denoiser(self):
        return getattr(self.pipeline, self.family.component)

    @torch.no_grad()
    def _idle_call(self, latents: torch.Tensor | None = None, **arguments) -> torch.Tensor:
        conditioning = self.encode("")
        if latents is not None:
            conditioning = {name: value.expand(len(latents), *value.shape[1:]) for name, value in conditioning.items()}
        result = self._call(
            self._idle,
            latents=latents,
            # A generator of its own: asking for a shape must not move the global random state.
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
            **conditioning,
            **arguments,
            **self.call_arguments,
        )[0]
        return result
