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

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class QueryScheduler(FlowMatchEulerDiscreteScheduler):
    """
    One denoising step that does not step: the pipeline's model output, after guidance, is what comes out as "latents".

    Set `sigma` before each call. The timestep is computed as the stock scheduler computes it, in float32.
    """

    sigma: float = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.sigmas = torch.tensor([self.sigma, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:1] * self.config.num_train_timesteps
        self.num_inference_steps = 1

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        return (model_output,)


class IdleScheduler(FlowMatchEulerDiscreteScheduler):
    """
    No denoising step at all: the pipeline prepares its latents, sets its sigma grid and decodes what it was given.

    `grid` keeps the last sigma grid that the pipeline set, T + 1 values with the final 0. `final_scale` turns the
    latents at its end into those that the pipeline decodes, and `initial_scale(sigma)` turns unit normal noise into
    the latents at its start: for flow models they are the same.
    """

    grid: torch.Tensor | None = None
    final_sigma = 0.0
    final_scale = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self.grid = self.sigmas.cpu()
        self.timesteps = self.timesteps[:0]

    def initial_scale(self, sigma: float) -> float:
        return 1.0
