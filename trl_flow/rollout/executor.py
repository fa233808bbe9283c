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

"""Runs a plan for a batch of prompts, in one sweep down the sigma grid."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .dynamics import euler_step, second_order_step, transition
from .plan import Plan


@dataclass
class Rollout:
    """
    What a sweep leaves behind.

    Attributes:
        leaves (`torch.Tensor` of shape `(num_prompts, num_leaves, *latent)`): Clean latents, in the order of `plan.leaves`.
        nodes (`dict[int, torch.Tensor]`): Latents of shape `(num_prompts, *latent)` of the nodes that a transition joins.
        num_evaluations (`int`): Rows of velocity evaluated.
        estimates (`torch.Tensor` of shape `(num_prompts, G, k, *latent)`, *optional*): Clean estimates x - sigma v of the
            nodes that the plan observes; of a leaf, the leaf itself.
    """

    leaves: torch.Tensor
    nodes: dict[int, torch.Tensor]
    num_evaluations: int
    estimates: torch.Tensor | None = None


@torch.no_grad()
def execute(
    plan: Plan,
    velocity: Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor],
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    noise_levels: list[float],
    dynamics: str = "flow",
    batch_size: int | None = None,
    initial_scale: float = 1.0,
) -> Rollout:
    """
    Samples the tree of `plan` for every prompt at once.

    At each grid index the velocity of every live node is evaluated once, in batches that share one sigma, and feeds
    all the edges that leave the node. Latents are released as soon as nothing needs them.

    Args:
        plan (`Plan`): The tree of one prompt group, the same for each prompt.
        velocity (`Callable`): `(latents (n, *latent), sigma, prompt (n,) index of each row) -> (n, *latent)`.
        sigmas (`torch.Tensor` of shape `(T + 1,)`): Descending float32 flow times, the last one 0.
        noise (`torch.Tensor` of shape `(num_prompts, plan.num_draws, *latent)`): Standard normal, float32.
        noise_levels (`list[float]` of length T): Noise level of a stochastic step at each index.
        dynamics (`str`): `"flow"`, `"dance"` or `"cps"`.
        batch_size (`int`, *optional*): Largest number of rows in one call of `velocity`. It bounds memory only.
        initial_scale (`float`, *optional*, defaults to `1.0`): Standard deviation of the latents at index 0.

    Returns:
        `Rollout`.

    Raises:
        ValueError: If the grid, the noise levels or the noise do not fit the plan.
    """
    if len(sigmas) != plan.num_steps + 1 or len(noise_levels) != plan.num_steps:
        raise ValueError(
            f"The plan has {plan.num_steps} steps, but there are {len(sigmas)} sigmas (expected one more than steps) "
            f"and {len(noise_levels)} noise levels (expected one per step)."
        )
    if noise.shape[1] != plan.num_draws:
        raise ValueError(f"The plan draws {plan.num_draws} noises per prompt, but `noise` holds {noise.shape[1]}.")
    sigmas = sigmas.tolist()
    num_prompts, latent_shape = noise.shape[0], noise.shape[2:]
    kept = {end for edges in plan.transitions.values() for edge in edges for end in (edge.parent, edge.child)}
    by_index = [[] for _ in range(plan.num_steps + 1)]
    for number, node in enumerate(plan.nodes):
        by_index[node.index].append(number)
    children = [[] for _ in plan.nodes]
    for number, node in enumerate(plan.nodes):
        if node.parent is not None:
            children[node.parent].append(number)

    # Clean estimates are kept for those who look at them, and until the last second-order step that extrapolates from
    # them has been taken.
    observed = {number for path in plan.observed for number in path}
    last_use = dict.fromkeys(observed, plan.num_steps)
    for node in plan.nodes:
        if node.before is not None:
            for source in (node.before, node.parent):
                last_use[source] = max(last_use.get(source, 0), plan.nodes[node.parent].index)

    latents = {
        number: initial_scale * noise[:, node.draw] for number, node in enumerate(plan.nodes) if node.parent is None
    }
    estimates = {}
    num_evaluations = 0
    for index in range(plan.num_steps):
        live = [number for number in by_index[index] if children[number]]
        if not live:
            continue
        # Rows are ordered prompt by prompt, so that a batch touches few prompts' conditioning.
        states = torch.stack([latents[number] for number in live], dim=1).reshape(-1, *latent_shape)
        prompts = torch.arange(num_prompts).repeat_interleave(len(live))
        velocities = torch.cat(
            [
                velocity(rows, sigmas[index], prompt)
                for rows, prompt in zip(
                    states.split(batch_size or len(states)), prompts.split(batch_size or len(states)), strict=True
                )
            ]
        ).reshape(num_prompts, len(live), *latent_shape)
        num_evaluations += len(states)

        for position, number in enumerate(live):
            v = velocities[:, position]
            if number in last_use:
                estimates[number] = latents[number] - sigmas[index] * v
            for child in children[number]:
                node = plan.nodes[child]
                if node.before is not None:
                    latents[child] = second_order_step(
                        latents[number],
                        estimates[number],
                        estimates[node.before],
                        sigmas[plan.nodes[node.before].index],
                        sigmas[index],
                        sigmas[node.index],
                    )
                elif node.draw is None:
                    latents[child] = euler_step(latents[number], v, sigmas[index], sigmas[node.index])
                else:
                    mean, std = transition(
                        latents[number], v, sigmas[index], sigmas[node.index], noise_levels[index], dynamics
                    )
                    latents[child] = mean + std * noise[:, node.draw]
        for number in by_index[index]:
            if number not in kept:
                del latents[number]
        for number in [number for number in estimates if last_use[number] <= index]:
            del estimates[number]

    leaves = plan.leaves
    estimates |= {number: latents[number] for number in leaves if number in observed}
    return Rollout(
        leaves=torch.stack([latents[number] for number in leaves], dim=1),
        nodes={number: latents[number] for number in sorted(kept)},
        num_evaluations=num_evaluations,
        estimates=torch.stack(
            [torch.stack([estimates[number] for number in path], dim=1) for path in plan.observed], dim=1
        )
        if plan.observed
        else None,
    )
