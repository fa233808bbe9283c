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

"""One step down the sigma grid: the deterministic Euler step and the stochastic steps that are trained.

Every sampler here writes the next latent in one form. With the clean estimate x0 = x - s*v and the noise estimate
x1 = x + (1 - s)*v at flow time s, a step to s' < s is

    mean = (1 - s') * x0 + c * x1,        x' = mean + tau * z,        z ~ N(0, I)

and the samplers differ in `c` and `tau` alone (see [`coefficients`]).
"""

import math

import torch


DYNAMICS = ("flow", "dance", "cps")


def diffusion_coefficient(sigma: float, sigma_next: float, noise_level: float, dynamics: str) -> float:
    """
    Diffusion coefficient q of the stochastic differential equation, such that the standard deviation of a step is
    q * sqrt(sigma - sigma_next).

    - `"flow"` (Flow-GRPO eq. 9; DenseGRPO eq. 6; G2RPO eq. 3): q = a * sqrt(s / (1 - s)). It is infinite at s = 1. The
      papers are silent; Flow-GRPO's code replaces an s of exactly 1 *in this denominator only* by the next sigma. So
      do we, for an s whose distance from 1 is below a tenth of the step, as where the grids of UniPC and DPM-Solver
      begin.
    - `"dance"` (DanceGRPO): q = eta, a constant. With a table of noise levels this is DenseGRPO eq. 11, q = psi(t).
    - `"cps"` (Coefficients-Preserving Sampling) prescribes tau itself; the published code divides by tau where it
      divides by q for the others, and so does this function.

    Args:
        sigma, sigma_next (`float`): Flow times, 1 >= sigma > sigma_next >= 0.
        noise_level (`float`): a of Flow-GRPO, eta of DanceGRPO and CPS, psi of DenseGRPO (dimensionless, >= 0).
        dynamics (`str`): One of `"flow"`, `"dance"`, `"cps"`.
    """
    if dynamics == "flow":
        denominator = 1.0 - (sigma_next if 1.0 - sigma < 0.1 * (sigma - sigma_next) else sigma)
        return noise_level * math.sqrt(sigma / denominator)
    if dynamics == "dance":
        return noise_level
    if dynamics == "cps":
        return sigma_next * math.sin(noise_level * math.pi / 2)
    raise ValueError(f"dynamics={dynamics!r} is unknown: expected one of {', '.join(DYNAMICS)}.")


def coefficients(sigma: float, sigma_next: float, noise_level: float, dynamics: str = "flow") -> tuple[float, float]:
    """
    Coefficient c of the noise estimate and standard deviation tau of one stochastic step, in float64.

    - `"flow"` and `"dance"`: c = s' - q^2 h / (2 s), tau = q sqrt(h), with h = s - s' and q from
      [`diffusion_coefficient`]. They preserve the marginals to first order in h only.
    - `"cps"`: tau = s' sin(eta pi / 2), c = sqrt(s'^2 - tau^2). The total noise is exactly that of sigma_next.

    Args:
        sigma, sigma_next (`float`): Flow times, 1 >= sigma > sigma_next >= 0.
        noise_level (`float`): Dimensionless, >= 0; 0 gives the Euler step (c = sigma_next, tau = 0).
        dynamics (`str`): One of `"flow"`, `"dance"`, `"cps"`.

    Returns:
        `tuple[float, float]`: c and tau.

    Raises:
        ValueError: If the flow times do not descend within [0, 1], the noise level is negative (or above 1 for CPS,
            where it is a fraction of a quarter turn), or the dynamics is unknown.
    """
    if not 1.0 >= sigma > sigma_next >= 0.0:
        raise ValueError(f"sigma={sigma} and sigma_next={sigma_next}: expected 1 >= sigma > sigma_next >= 0.")
    if noise_level < 0 or (dynamics == "cps" and noise_level > 1):
        limit = "between 0 and 1" if dynamics == "cps" else "0 or more"
        raise ValueError(f"noise_level={noise_level}: expected {limit} for {dynamics!r} dynamics.")
    q = diffusion_coefficient(sigma, sigma_next, noise_level, dynamics)
    if dynamics == "cps":
        return math.sqrt(sigma_next**2 - q**2), q
    h = sigma - sigma_next
    return sigma_next - q**2 * h / (2 * sigma), q * math.sqrt(h)


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """
    Deterministic step x' = x + (s' - s) v, in the order of operations of diffusers' `FlowMatchEulerDiscreteScheduler`,
    so that a chain of these equals the stock pipeline bit for bit in float32.

    Args:
        latents, velocity (`torch.Tensor` of shape `(n, *latent)`): x at `sigma`, and v = eps - x0.
        sigma, sigma_next (`float`): Flow times that float32 represents exactly, as a grid of float32 sigmas does.
    """
    # The scheduler subtracts float32 tensors. The difference of these numbers in float64, rounded to the dtype of what it
    # multiplies, is the same number: float64 has more than twice the digits.
    return latents + (sigma_next - sigma) * velocity


def second_order_step(
    latents: torch.Tensor,
    clean: torch.Tensor,
    clean_before: torch.Tensor,
    sigma_before: float,
    sigma: float,
    sigma_next: float,
) -> torch.Tensor:
    """
    Deterministic step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) on the flow path, where alpha = 1 - s.

    With lambda = log((1 - s) / s), h = lambda' - lambda and h0 = lambda - lambda_before, the clean estimate is
    extrapolated to D = x0 + h / (2 h0) (x0 - x0_before), and x' = (s' / s) x + ((1 - s') - (1 - s) s' / s) D. With D = x0
    this is the Euler step, which it becomes where lambda is infinite: for a step to 0, and after a step from 1.

    Args:
        latents (`torch.Tensor` of shape `(n, *latent)`): x at `sigma`.
        clean, clean_before (`torch.Tensor` of shape `(n, *latent)`): Clean estimates x - s v at `sigma` and at
            `sigma_before`.
        sigma_before, sigma, sigma_next (`float`): Flow times, 1 >= sigma_before > sigma > sigma_next >= 0.
    """
    if not 1.0 >= sigma_before > sigma > sigma_next >= 0.0:
        raise ValueError(
            f"sigma_before={sigma_before}, sigma={sigma} and sigma_next={sigma_next}: expected 1 >= sigma_before > "
            "sigma > sigma_next >= 0."
        )
    extrapolation = 0.0
    if sigma_before < 1.0 and sigma_next > 0.0:
        before, now, after = (math.log((1 - s) / s) for s in (sigma_before, sigma, sigma_next))
        extrapolation = (after - now) / (2 * (now - before))
    shrink = sigma_next / sigma
    of_clean = (1 - sigma_next) - (1 - sigma) * shrink
    return shrink * latents + of_clean * ((1 + extrapolation) * clean - extrapolation * clean_before)


def transition(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    sigma_next: float,
    noise_level: float,
    dynamics: str = "flow",
) -> tuple[torch.Tensor, float]:
    """
    Mean and standard deviation of one stochastic step (Flow-GRPO eq. 9; DenseGRPO eq. 6 and 11; G2RPO eq. 2-3).

    Args:
        latents (`torch.Tensor` of shape `(n, *latent)`): x at `sigma`, float32.
        velocity (`torch.Tensor` of shape `(n, *latent)`): eps - x0, as the policy predicts it.
        sigma, sigma_next (`float`): Flow times, 1 >= sigma > sigma_next >= 0.
        noise_level (`float`): a of Flow-GRPO, eta of DanceGRPO and CPS, psi of DenseGRPO (dimensionless).
        dynamics (`str`): One of `"flow"`, `"dance"`, `"cps"`.

    Returns:
        `tuple[torch.Tensor, float]`: Mean of shape `(n, *latent)` and the standard deviation of every element.

    Raises:
        ValueError: See [`coefficients`].
    """
    c, std = coefficients(sigma, sigma_next, noise_level, dynamics)
    if std == 0.0:
        return euler_step(latents, velocity, sigma, sigma_next), 0.0
    # (1 - s') (x - s v) + c (x + (1 - s) v), with the factors of x and v collected in float64.
    of_latents = (1 - sigma_next) + c
    of_velocity = c * (1 - sigma) - (1 - sigma_next) * sigma
    return of_latents * latents + of_velocity * velocity, std


def log_prob(sample: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """
    Gaussian log-density of a stochastic step, averaged (not summed) over the latent's elements as in Flow-GRPO, so
    that the published clip ranges carry over.

    It is the same Gaussian for every dynamics. Flow-GRPO's code drops the constants *and* 1 / (2 tau^2) for CPS: its
    log-ratio is 2 tau^2 times this one, so its CPS clip ranges are not comparable with ours.

    Args:
        sample, mean (`torch.Tensor` of shape `(n, *latent)`): The next latent, and the mean that it was drawn around.
        std (`float`): tau > 0.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    if std <= 0:
        raise ValueError(f"std={std}: a deterministic step has no density; expected std > 0.")
    squared = (sample.detach() - mean) ** 2
    return -squared.flatten(1).mean(1) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
