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
OBJECTIVES = ("clip", "guard", "dppo")
STEP_WEIGHTINGS = ("none", "noise", "guard")


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


def guarded_ratio(log_ratio: torch.Tensor, divergence: torch.Tensor, std: float) -> torch.Tensor:
    """
    GRPO-Guard's normalised ratio: exp(tau (log r + divergence)).

    For a step x' = mean_old + tau z and d = mean_new - mean_old, log r = <z d> / tau - <d^2> / (2 tau^2), where <.> is the
    mean over the latent's elements. Its second term pulls all ratios below 1 and its first has a size that depends on the
    step's noise; what is left here is exp(<z d>): centred at 1, of one size at every step, so that one clip range fits.

    Args:
        log_ratio (`torch.Tensor` of shape `(n,)`): log p_new(x') - log p_old(x').
        divergence (`torch.Tensor` of shape `(n,)`): <d^2> / (2 tau^2), see [`step_divergence`].
        std (`float`): tau.
    """
    return torch.exp(std * (log_ratio + divergence))


def step_divergence(mean: torch.Tensor, old_mean: torch.Tensor, std: float) -> torch.Tensor:
    """
    KL divergence of two Gaussian steps of one standard deviation, averaged over the latent's elements (Flow-DPPO
    eq. 14 has their sum, its code the mean).

    Args:
        mean, old_mean (`torch.Tensor` of shape `(n, *latent)`).
        std (`float`): tau > 0.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    return (mean - old_mean).square().flatten(1).mean(1) / (2 * std**2)


def masked_loss(
    advantages: torch.Tensor, ratio: torch.Tensor, divergence: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Flow-DPPO's objective (eq. 18), negated: the ratio is not clipped; a transition is left out where the new policy is further
    than `threshold` from the old one and still moves away from it, up with a positive advantage or down with a negative.

    Args:
        advantages, ratio (`torch.Tensor` of shape `(n,)`).
        divergence (`torch.Tensor` of shape `(n,)`): KL divergence of the step, see [`step_divergence`].
        threshold (`float`): Largest divergence at which moving away counts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss per transition, and whether it is left out.
    """
    left_out = (divergence >= threshold) & (advantages * (ratio - 1) > 0)
    return torch.where(left_out, 0.0, -advantages * ratio), left_out


def contrastive_loss(
    advantages: torch.Tensor,
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    target: torch.Tensor,
    sigma: float,
    strength: float,
    advantage_clip: float,
) -> torch.Tensor:
    """
    DiffusionNFT's objective (eq. 5, as its code quotes it): pull the policy towards what is better than the group, push it from what is worse.

    With r = 1/2 + A / (2 c) in [0, 1], the implicit positive and negative policies v+ = b v + (1 - b) v_old and
    v- = (1 + b) v_old - b v are fitted to the same noised sample, with weights r and 1 - r. Each fit is the squared error
    of the clean estimate over its detached mean absolute error, in the published code as here.

    Args:
        advantages (`torch.Tensor` of shape `(n,)`): A, within the clip.
        velocity, old_velocity, target (`torch.Tensor` of shape `(n, *latent)`): v, v_old, and eps - x0 of the sample.
        sigma (`float`): Flow time of the sample; the clean estimate's error is sigma times the velocity's.
        strength (`float`): b > 0.
        advantage_clip (`float`): c.

    Returns:
        `torch.Tensor` of shape `(n,)`: c (r L+ + (1 - r) L-) / b.
    """

    def fit(estimate):
        error = sigma * (estimate - target).flatten(1)
        return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)

    r = 0.5 + advantages / (2 * advantage_clip)
    positive = fit(strength * velocity + (1 - strength) * old_velocity)
    negative = fit((1 + strength) * old_velocity - strength * velocity)
    return advantage_clip * (r * positive + (1 - r) * negative) / strength


MATCHINGS = ("uniform", "sigma", "ghuber")


def matching_log_prob(velocity: torch.Tensor, target: torch.Tensor, sigma: float, matching: str) -> torch.Tensor:
    """
    What stands for the log-likelihood of a clean sample in AWM: minus its weighted flow-matching loss at one noising.

    With e = mean (v - (eps - x0))^2: `"uniform"` is -e, `"sigma"` -s e, and `"ghuber"`, of the published configurations
    for SD3.5-M, -s ((e + d)^p - d^p) / p with p = 1/4 and d = 1e-10.

    Args:
        velocity, target (`torch.Tensor` of shape `(n, *latent)`): v, and eps - x0 of the noised sample.
        sigma (`float`): Flow time of the sample, s.
        matching (`str`): One of these.

    Returns:
        `torch.Tensor` of shape `(n,)`, float64: ratios of two of these differ from 1 by little.
    """
    error = (velocity.double() - target.double()).square().flatten(1).mean(1)
    if matching == "uniform":
        return -error
    if matching == "sigma":
        return -sigma * error
    if matching == "ghuber":
        return -sigma * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
    raise ValueError(f"matching={matching!r} is unknown: expected one of {', '.join(MATCHINGS)}.")


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
        kl_type (`str`): One of these.
        velocity, reference_velocity (`torch.Tensor` of shape `(n, *latent)`).
        sigma, sigma_next, noise_level (`float`), dynamics (`str`): The stochastic step, see
            [`~trl_flow.rollout.coefficients`].

    Returns:
        `torch.Tensor` of shape `(n,)`.

    Raises:
        ValueError: If the type is unknown, or the step has no noise and the type divides by it.
    """
    squared = (velocity - reference_velocity).square().flatten(1).mean(1)
    if kl_type == "velocity":
        return squared
    if kl_type not in KL_TYPES:
        raise ValueError(f"kl_type={kl_type!r} is unknown: expected one of {', '.join(KL_TYPES)}.")
    slope, std = mean_slope(sigma, sigma_next, noise_level, dynamics)
    if std == 0:
        raise ValueError(
            f"kl_type={kl_type!r} divides by the noise of a step, but that from {sigma} to {sigma_next} has none: expected "
            "a stochastic step, or kl_type='velocity'."
        )
    q = diffusion_coefficient(sigma, sigma_next, noise_level, dynamics)
    return slope**2 * squared / (2 * (q if kl_type == "mean" else std) ** 2)


def mean_slope(sigma: float, sigma_next: float, noise_level: float, dynamics: str) -> tuple[float, float]:
    """
    d mean / d velocity of a stochastic step, and its standard deviation (float64).

    Args:
        sigma, sigma_next, noise_level (`float`), dynamics (`str`): The step, see [`~trl_flow.rollout.coefficients`].
    """
    c, std = coefficients(sigma, sigma_next, noise_level, dynamics)
    return c * (1 - sigma) - (1 - sigma_next) * sigma, std


def step_weights(weighting: str, stds: list[float], step_sizes: list[float]) -> list[float]:
    """
    Weight of each trained step in the loss, with mean 1.

    The gradient of a step's log-probability grows like C h / tau, where C h is the slope of its mean: late steps, with
    little noise, drown the early ones.

    - `"none"` leaves the steps as they are.
    - `"noise"` weights each in proportion to tau (TempFlow-GRPO's noise-aware weighting; its constant 2.25 is
      1 / mean(tau) for SD3's nine steps).
    - `"guard"` weights each in proportion to 1 / h: with GRPO-Guard's ratio, whose gradient goes like C h, every step
      then counts nearly alike.

    Args:
        weighting (`str`): One of these.
        stds (`list[float]`): tau of each step.
        step_sizes (`list[float]`): h = sigma - sigma_next of each step.
    """
    if weighting == "none":
        weights = [1.0] * len(stds)
    elif weighting == "noise":
        weights = stds
    elif weighting == "guard":
        weights = [1 / size for size in step_sizes]
    else:
        raise ValueError(f"step_weighting={weighting!r} is unknown: expected one of {', '.join(STEP_WEIGHTINGS)}.")
    return [weight * len(weights) / sum(weights) for weight in weights]
