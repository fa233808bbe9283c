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


"""What the methods that train on freshly noised samples share."""

import dataclasses

import torch

from ..rollout import forward_plan, seeded_noise, to_device
from .dance_grpo_trainer import random_steps
from .flow_grpo_trainer import FlowGRPOTrainer
from .forward_process_config import ForwardProcessConfig


class ForwardProcessTrainer(FlowGRPOTrainer):
    """
    Base of [`DiffusionNFTTrainer`] and [`AWMTrainer`]: samples are made without noise, by any number of steps, and trained
    on where the forward process takes them: x = (1 - s) x0 + s eps with fresh noise, at random sigmas of the grid.

    A chunk's `latents` are these x, and its `next_latents` the velocity eps - x0 that leads to them. The noise is a
    function of the seed, the sample and the step, so that two policies are compared on the same one.
    """

    _config_class = ForwardProcessConfig

    def default_sde_steps(self):
        return list(range(self.args.num_inference_steps))

    def rollout_plan(self, sde_steps):
        return forward_plan(self.args.num_inference_steps, self.num_generations, sde_steps)

    def trained(self, advantages, mask, keys):
        return random_steps(mask, self.args.timestep_fraction, self.args.seed, keys)

    def _resolve_noise_levels(self):
        return [0.0] * self.args.num_inference_steps

    def _chunk(self, inputs, at, part):
        chunk, shape = super()._chunk(inputs, at, part), inputs["nodes"].shape[2:]
        groups, _, members = (index.tolist() for index in chunk.members_on_cpu)
        noise = {
            group: seeded_noise(
                self.args.seed,
                "forward",
                inputs["keys"][group],
                chunk.step,
                num_draws=self.num_generations,
                latent_shape=shape,
            )
            for group in set(groups)
        }
        noise = torch.stack([noise[group][member] for group, member in zip(groups, members, strict=True)])
        noise = to_device(noise, chunk.latents.device)
        clean = self.policy.clean(chunk.next_latents)
        return dataclasses.replace(
            chunk, latents=(1 - chunk.sigma) * clean + chunk.sigma * noise, next_latents=noise - clean
        )
