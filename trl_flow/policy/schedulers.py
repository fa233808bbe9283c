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

"""Schedulers that make a pipeline's own `__call__` answer a question instead of sampling."""

import copy
import functools
import pickle

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput


def is_flow(scheduler: SchedulerMixin) -> bool:
    """
    Whether a scheduler's latents are (1 - sigma) x0 + sigma eps, and its model predicts eps - x0.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The pipeline's own.
    """
    return type(scheduler).__name__.startswith("FlowMatch") or (
        bool(scheduler.config.get("use_flow_sigmas")) and scheduler.config.get("prediction_type") == "flow_prediction"
    )


def check_flow_scheduler(scheduler: SchedulerMixin):
    """Raises `ValueError` for a flow scheduler whose grid does not lead from noise to a clean picture."""
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"invert_sigmas=True of {type(scheduler).__name__}: its sigma is 0 for noise and 1 for a clean picture, the "
            "reverse of what a flow time is here."
        )


def become(scheduler: SchedulerMixin, mixin: type) -> SchedulerMixin:
    """A copy of a scheduler, of its own class and settings, with the methods of `mixin` before its own."""
    scheduler = copy.deepcopy(scheduler)
    bases = (mixin, type(scheduler))
    if not hasattr(scheduler, "scale_model_input"):
        bases = (*bases, _Unscaled)
    scheduler.__class__ = type(mixin.__name__ + type(scheduler).__name__, bases, {})
    return scheduler


class Uncopied:
    """A scheduler that answers for one pipeline, and cannot for a copy that the pipeline makes to denoise more with."""

    def __deepcopy__(self, memo):
        raise ValueError(
            "The pipeline copies its scheduler, to denoise something else along (sound, frames by themselves)."
        )


class _Unscaled:
    """What some pipelines ask of every scheduler whose class is not exactly the one they know."""

    def scale_model_input(self, sample, timestep=None):
        return sample


def stepped(sample: torch.Tensor, return_dict: bool):
    """What a scheduler's `step` returns."""
    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class Query(Uncopied):
    """
    One denoising step that does not step: `velocity` is the pipeline's model output, after guidance, and the latents
    stay what they were. Set `sigma` before each call.

    `known_timesteps` holds the timesteps with which the stock scheduler accompanies the sigmas of its grids, because
    not all are `1000 sigma`: UniPC rounds them, CogView4 does not shift them. Elsewhere they are `1000 sigma` if those
    are up to rounding, and interpolated if not.

    A number is written to the device by a kernel, and not copied there: a copy would make the host wait for all that the
    device has yet to compute.
    """

    sigma: float = 1.0
    velocity: torch.Tensor | None = None
    known_timesteps: dict[float, int | float] = {}

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        known = self.known_timesteps
        timestep = known.get(self.sigma)
        if timestep is None:
            total = self.config.num_train_timesteps
            timestep = total * self.sigma
            if any(abs(value - total * sigma) > 1 for sigma, value in known.items()):
                table = sorted(({0.0: 0.0, 1.0: total} | known).items())
                timestep = float(np.interp(self.sigma, *zip(*table, strict=True)))
        dtype = torch.int64 if isinstance(timestep, int) else torch.float32
        self.timesteps = torch.full((1,), timestep, dtype=dtype, device=device)
        # UniPC and its like keep sigmas on the CPU, and a pipeline that reads them there (Wan) does not wait.
        if self.config.get("use_flow_sigmas"):
            device = "cpu"
        sigma = torch.full((1,), self.sigma, dtype=torch.float32, device=device)
        self.sigmas = torch.cat([sigma, torch.zeros_like(sigma)])
        self.num_inference_steps = 1
        self.velocity = None

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        if self.velocity is not None:
            raise ValueError("The pipeline takes more than one scheduler step per timestep.")
        self.velocity = model_output
        return stepped(sample, return_dict)


class Idle(Uncopied):
    """
    No denoising step at all: the pipeline encodes its prompt, sets its sigma grid and decodes the latents it is given.

    `grid` keeps the last sigma grid that the pipeline set, T + 1 values with the final 0, and `grid_timesteps` its
    timesteps: the stock scheduler's own, with the points that a second-order one (Heun) visits twice once.
    `final_scale` turns the latents at its end into those that the pipeline decodes, and `initial_scale(sigma)` turns
    unit normal noise into the latents at its start: for flow models they are the same.
    """

    grid: torch.Tensor | None = None
    grid_timesteps: torch.Tensor | None = None
    grid_arguments: bytes | None = None
    final_sigma = 0.0
    final_scale = 1.0

    def initial_scale(self, sigma: float) -> float:
        return 1.0


def query_scheduler(scheduler: SchedulerMixin) -> Query:
    """A copy of a flow pipeline's scheduler that asks for one velocity; see [`Query`]."""
    return become(scheduler, Query)


def idle_scheduler(scheduler: SchedulerMixin) -> Idle:
    """A copy of a flow pipeline's scheduler that leaves nothing to denoise; see [`Idle`]."""
    stock = type(scheduler).set_timesteps

    @functools.wraps(stock)  # pipelines look at which arguments it takes
    def set_timesteps(self, *args, **kwargs):
        # Each batch that is decoded asks for the same grid again.
        arguments = pickle.dumps((args, kwargs))
        if arguments == self.grid_arguments:
            return
        stock(self, *args, **kwargs)
        sigmas = self.sigmas.float().cpu()
        distinct = [i for i in range(len(self.timesteps)) if sigmas[i] != sigmas[i + 1]]
        self.grid = torch.cat([sigmas[distinct], sigmas[-1:]])
        self.grid_timesteps = self.timesteps.cpu()[distinct]
        self.timesteps = self.timesteps[:0]
        self.grid_arguments = arguments

    return become(scheduler, type("Idle", (Idle,), {"set_timesteps": set_timesteps}))
