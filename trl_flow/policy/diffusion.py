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

"""
Diffusion models as flow models in other coordinates.

A diffusion model's latent is x = alpha * x0 + s * eps with alpha^2 + s^2 = 1. Divided by alpha + s it is a flow
model's:

    x' = x / (alpha + s) = (1 - sigma') * x0 + sigma' * eps        with        sigma' = s / (alpha + s),

and a DDIM step (eq. 12 of https://huggingface.co/papers/2010.02502 with eta = 0), which keeps x0 and eps and changes
alpha and s, is the Euler step along v' = eps - x0. So whatever is written for flow models holds for diffusion models,
once the latents and the model output are converted. Elsewhere in the package "sigma" and "latents" are sigma' and x'.
"""

import functools
import math

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from .schedulers import stepped


PREDICTION_TYPES = ("epsilon", "v_prediction")


def flow_sigmas(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """
    Flow times sigma' = s / (alpha + s) of a diffusion model's noise levels.

    Args:
        alphas_cumprod (`torch.Tensor`): alpha^2 (DDPM's alpha bar), between 0 and 1.

    Returns:
        `torch.Tensor` of the same shape, float64: 0 where alpha is 1, 1 where alpha is 0.
    """
    squared = alphas_cumprod.double()
    alpha, s = squared.sqrt(), (1 - squared).sqrt()
    return s / (alpha + s)


def latent_scale(sigma: float) -> float:
    """alpha + s at the flow time sigma', by which x' is multiplied to give x; between 1 and sqrt(2)."""
    # alpha = (1 - sigma') (alpha + s), s = sigma' (alpha + s), and the squares add up to 1.
    return 1 / math.hypot(1 - sigma, sigma)


def flow_velocity(
    model_output: torch.Tensor, latents: torch.Tensor, sigma: float, prediction_type: str
) -> torch.Tensor:
    """
    The velocity v' = eps - x0 that a diffusion model's output implies.

    - `"epsilon"`: the output is eps, and x0 = (x' - sigma' eps) / (1 - sigma'), so v' = (eps - x') / (1 - sigma').
    - `"v_prediction"` (Progressive Distillation, appendix D, https://huggingface.co/papers/2202.00512): the output is
      alpha * eps - s * x0; with x, which is (alpha + s) x', it gives both x0 and eps.

    Args:
        model_output (`torch.Tensor` of shape `(n, *latent)`): After guidance.
        latents (`torch.Tensor` of shape `(n, *latent)`): x'.
        sigma (`float`): Flow time in (0, 1]; below 1 for `"epsilon"`.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor` of shape `(n, *latent)`.
    """
    if prediction_type == "epsilon":
        return (model_output - latents) / (1 - sigma)
    # eps = alpha v + s x and x0 = alpha x - s v.
    scale = latent_scale(sigma)
    return scale * model_output + (2 * sigma - 1) * scale**2 * latents


def check_scheduler(scheduler: SchedulerMixin):
    """
    Whether DDIM can take the place of a checkpoint's scheduler, with its noise schedule, prediction type and timesteps.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): DDIM, PNDM, Euler, DPM-Solver ...

    Raises:
        ValueError: If it is no diffusion scheduler, or asks for something under which a DDIM step is no Euler step.
    """
    name, config = type(scheduler).__name__, scheduler.config
    # A scheduler without a beta schedule (EDM) has another noise schedule than DDIM would take by default.
    if name not in [known.name for known in KarrasDiffusionSchedulers] or "beta_schedule" not in config:
        raise ValueError(
            f"scheduler={name}: its noise schedule cannot be read as DDIM's. A model that was made for few steps of this "
            "scheduler (consistency, flow maps) cannot be trained here; for another, give the pipeline a diffusion scheduler "
            "such as DDIMScheduler, PNDMScheduler or DPMSolverMultistepScheduler."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type={prediction_type!r} of {name} is not supported: expected {' or '.join(PREDICTION_TYPES)}."
        )
    # Of a scheduler's own settings only: DDIM's default is to clip, but one that has no such setting doesn't.
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting):
            raise ValueError(
                f"{setting}=True of {name}: a step that clips its clean estimate is no Euler step, and clean latents "
                "are not bounded by 1. Set it to False, for instance with pipeline.scheduler = "
                f"DDIMScheduler.from_config(pipeline.scheduler.config, {setting}=False)."
            )
    if config.get("rescale_betas_zero_snr") and prediction_type == "epsilon":
        raise ValueError(
            f"rescale_betas_zero_snr=True of {name} with prediction_type='epsilon': the first latents are pure noise, "
            "and the noise in them says nothing of the clean picture (x0 is divided by alpha = 0). Set "
            "rescale_betas_zero_snr to False, or use a checkpoint that predicts v."
        )


class DDIMQueryScheduler(DDIMScheduler):
    """
    One denoising step that does not step: `velocity` is that of the pipeline's model output, after guidance, in flow
    coordinates. The latents that go in are in flow coordinates too.

    Set `sigma` and `dtype` before each call. The timestep is the one that the model was trained with at `sigma`.
    """

    sigma: float = 1.0
    # Of the denoiser's input: diffusion pipelines, unlike flow pipelines, do not cast the latents they are given.
    dtype: torch.dtype = torch.float32
    velocity: torch.Tensor | None = None

    @functools.cached_property
    def training_sigmas(self) -> torch.Tensor:
        return flow_sigmas(self.alphas_cumprod)

    def set_timesteps(self, num_inference_steps=None, device=None):
        distance = (self.training_sigmas - self.sigma).abs()
        timestep = distance.argmin()
        # Neighbours are 1e-4 and more apart, float32 rounds by less than 1e-7.
        if not distance[timestep] < 1e-6:
            raise ValueError(
                f"sigma={self.sigma} is not the flow time of one of the {len(distance)} training timesteps: the "
                f"nearest is {self.training_sigmas[timestep].item()} of timestep {timestep.item()}. Take sigmas from "
                "FlowPolicy.sigmas()."
            )
        # Written by a kernel: a copy to the device would make the host wait for it.
        self.timesteps = torch.full((1,), timestep.item(), dtype=torch.int64, device=device)
        self.num_inference_steps = 1
        self.velocity = None

    def scale_model_input(self, sample, timestep=None):
        return (latent_scale(self.sigma) * sample).to(self.dtype)

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        if self.velocity is not None:
            raise ValueError("The pipeline takes more than one scheduler step per timestep.")
        self.velocity = flow_velocity(model_output.to(sample.dtype), sample, self.sigma, self.config.prediction_type)
        return stepped(sample, return_dict)


class DDIMIdleScheduler(DDIMScheduler):
    """
    No denoising step at all: the pipeline prepares its latents, sets its timesteps and decodes what it was given.

    `grid` keeps the flow times of the last timesteps that the pipeline set and of the end, T + 1 values. The end is 0
    with `set_alpha_to_one=True` and the flow time of timestep 0 otherwise; it does not depend on T.

    A step of ours leads to the next timestep of the grid. `DDIMScheduler.step` computes that timestep as
    `t - 1000 // T`, which is the same for `timestep_spacing="leading"`, and for `"trailing"` where T divides 1000;
    elsewhere it lands beside the grid that it set itself (https://github.com/huggingface/diffusers/issues/12633).
    """

    grid: torch.Tensor | None = None
    grid_arguments: tuple | None = None

    def set_timesteps(self, num_inference_steps=None, device=None):
        # Each batch that is decoded asks for the same grid again.
        if (num_inference_steps, device) == self.grid_arguments:
            return
        super().set_timesteps(num_inference_steps, device=device)
        timesteps = self.timesteps.cpu()
        if timesteps[0] >= len(self.alphas_cumprod):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} starts at timestep {timesteps[0]}, but the model knows "
                f"{len(self.alphas_cumprod)} from 0 (timestep_spacing={self.config.timestep_spacing!r}, steps_offset="
                f"{self.config.steps_offset}). Take fewer steps."
            )
        squared = torch.cat([self.alphas_cumprod.cpu()[timesteps], self.final_alpha_cumprod.cpu()[None]])
        if squared[-1] == squared[-2]:
            raise ValueError(
                f"The last of num_inference_steps={num_inference_steps} steps leads from timestep 0 to itself, "
                "because the scheduler has set_alpha_to_one=False (which ends there) and timestep_spacing="
                f"{self.config.timestep_spacing!r} with steps_offset={self.config.steps_offset}. Give the pipeline a "
                "scheduler with set_alpha_to_one=True, or with timestep_spacing='leading' and steps_offset=1."
            )
        self.grid = flow_sigmas(squared).float()
        self.timesteps = self.timesteps[:0]
        self.grid_arguments = num_inference_steps, device

    @property
    def final_sigma(self) -> float:
        return flow_sigmas(self.final_alpha_cumprod).float().item()

    @property
    def final_scale(self) -> float:
        return latent_scale(self.final_sigma)

    def initial_scale(self, sigma: float) -> float:
        # The stock pipeline starts from x = noise, also where the noise level of its first timestep is below 1.
        return 1 / latent_scale(sigma)
