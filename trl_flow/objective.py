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

"""Advantages and log-probabilities -> the loss of one batch of transitions. Pure."""

import torch

from .rollout.dynamics import coefficients, diffusion_coefficient


KL_TYPES = ("mean", "gaussian", "velocity")


def clipped_loss(
    advantages: torch.Tensor, ratio: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    PPO's clipped objective, negated (Flow-GRPO eq. 5; DenseGRPO eq. 4; G2RPO eq. 12).

    Args:
        advantages, ratio (`torch.Tensor` of shape `(n,)`): ratio = p_new(x') / p_old(x').
        epsilon_low, epsilon_high (`float`): The ratio counts within [1 - epsilon_low, 1 + epsilon_high].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss per transition, and whether the clip is active (its gradient is 0).
    """
    plain = advantages * ratio
    clipped = advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(plain, clipped), clipped < plain


def kl_divergence(
    kl_type: str,
    velocity: torch.Tensor,
    reference_velocity: torch.Tensor,
    sigma: float,
    sigma_next: float,
    noise_level: float,
    dynamics: str,
) -> torch.Tensor:
    """
    Distance between the policy's step and the reference's, from the same latent, averaged over its elements.

    Both means depend on their velocity linearly with one slope m = d mean / d v, so mean - mean_ref = m (v - v_ref).

    - `"mean"`: (mean - mean_ref)^2 / (2 q^2), Flow-GRPO's code. Its author leaves the step size h out on purpose, so
      that late steps count more; it is *not* the divergence of the two Gaussians unless h = 1.
    - `"gaussian"`: (mean - mean_ref)^2 / (2 tau^2), the true KL divergence of the two Gaussians (Flow-GRPO eq. 13).
    - `"velocity"`: (v - v_ref)^2, independent of the sampler.

    Args:
        velocity, reference_velocity (`torch.Tensor` of shape `(n, *latent)`).
        sigma, sigma_next, noise_level (`float`), dynamics (`str`): The stochastic step, see
            [`~trl_flow.rollout.coefficients`].

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    squared = (velocity - reference_velocity).square().flatten(1).mean(1)
    if kl_type == "velocity":
        return squared
    if kl_type not in KL_TYPES:
        raise ValueError(f"kl_type={kl_type!r} is unknown: expected one of {', '.join(KL_TYPES)}.")
    slope, std = mean_slope(sigma, sigma_next, noise_level, dynamics)
    q = diffusion_coefficient(sigma, sigma_next, noise_level, dynamics)
    return slope**2 * squared / (2 * (q if kl_type == "mean" else std) ** 2)


def mean_slope(sigma: float, sigma_next: float, noise_level: float, dynamics: str) -> tuple[float, float]:
    """d mean / d velocity of a stochastic step, and its standard deviation (float64)."""
    c, std = coefficients(sigma, sigma_next, noise_level, dynamics)
    return c * (1 - sigma) - (1 - sigma_next) * sigma, std


def step_weights(weighting: str, stds: list[float]) -> list[float]:
    """
    Weight of each trained step in the loss, with mean 1.

    The gradient of a step's log-probability grows like 1 / tau, so that late steps, with little noise, drown the early
    ones. `"noise"` weights each step in proportion to tau (TempFlow-GRPO's noise-aware weighting; its constant 2.25 is
    1 / mean(tau) for SD3's nine steps), `"none"` leaves the steps as they are.
    """
    if weighting == "none":
        return [1.0] * len(stds)
    if weighting == "noise":
        return [std * len(stds) / sum(stds) for std in stds]
    raise ValueError(f"step_weighting={weighting!r} is unknown: expected 'none' or 'noise'.")
