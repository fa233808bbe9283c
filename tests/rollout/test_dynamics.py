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

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_flow.rollout import DYNAMICS, coefficients, diffusion_coefficient, euler_step, log_prob, transition


def published_step(dynamics, x, v, s, s_next, level, after_first=None):
    """Mean and standard deviation as the papers print them, each in its own form. `after_first`: the grid's second sigma."""
    dt = s_next - s
    if dynamics == "flow":  # Flow-GRPO eq. 9
        q = level * np.sqrt(s / (1 - (after_first if s == 1 else s)))
        mean = x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt
        return mean, q * np.sqrt(-dt)
    if dynamics == "dance":  # DanceGRPO, with the score of the Gaussian around the clean estimate
        clean = x - s * v
        score = -(x - (1 - s) * clean) / s**2
        return x + dt * v - 0.5 * level**2 * score * dt, level * np.sqrt(-dt)
    clean, noise = x - s * v, x + (1 - s) * v  # Coefficients-Preserving Sampling
    std = s_next * np.sin(level * np.pi / 2)
    return (1 - s_next) * clean + np.sqrt(s_next**2 - std**2) * noise, std


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_transition_is_the_published_formula(dynamics):
    random = np.random.default_rng(0)
    for _ in range(50):
        s_next, s = np.sort(random.uniform(0.02, 0.9, 2))
        level = random.uniform(0.1, 0.99)
        x, v = random.normal(size=(2, 3, 4, 2, 2))
        mean, std = transition(torch.from_numpy(x), torch.from_numpy(v), s, s_next, level, dynamics)
        expected_mean, expected_std = published_step(dynamics, x, v, s, s_next, level)
        np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-9, atol=1e-11)
        assert std == pytest.approx(expected_std, rel=1e-12)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_first_step_from_pure_noise(dynamics):
    # Flow's coefficient is infinite at sigma 1: the next sigma stands in the denominator, and nowhere else.
    x, v = np.random.default_rng(1).normal(size=(2, 2, 8))
    mean, std = transition(torch.from_numpy(x), torch.from_numpy(v), 1.0, 0.9375, 0.7, dynamics)
    expected_mean, expected_std = published_step(dynamics, x, v, 1.0, 0.9375, 0.7, after_first=0.9375)
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-12, atol=1e-12)
    assert std == pytest.approx(expected_std, rel=1e-12)
    if dynamics == "flow":
        assert diffusion_coefficient(1.0, 0.9375, 0.7, "flow") == pytest.approx(0.7 / math.sqrt(0.0625), rel=1e-12)
        # Where UniPC's and DPM-Solver's grids begin, as at 1: q would be 70.
        expected = 0.7 * math.sqrt(0.9999 / 0.0625)
        assert diffusion_coefficient(0.9999, 0.9375, 0.7, "flow") == pytest.approx(expected, rel=1e-12)
        # Below that the plain formula holds.
        assert diffusion_coefficient(0.99, 0.9375, 0.7, "flow") == pytest.approx(0.7 * math.sqrt(99), rel=1e-9)
        # Also near 1, where the steps are small: the second of a hundred with shift 12.
        expected = 0.7 * math.sqrt(0.99916 / 0.00084)
        assert diffusion_coefficient(0.99916, 0.9983, 0.7, "flow") == pytest.approx(expected, rel=1e-9)


def test_float32_transition_stays_close_to_float64():
    random = np.random.default_rng(2)
    x, v = random.normal(size=(2, 4, 16)).astype(np.float32)
    for s, s_next in [(1.0, 0.96), (0.79, 0.71), (0.28, 0.0089)]:
        for dynamics in DYNAMICS:
            mean, std = transition(torch.from_numpy(x), torch.from_numpy(v), s, s_next, 0.7, dynamics)
            expected, _ = published_step(dynamics, x.astype(float), v.astype(float), s, s_next, 0.7, after_first=0.96)
            assert mean.dtype == torch.float32
            np.testing.assert_allclose(mean.numpy(), expected, atol=1e-5)


def test_cps_keeps_the_noise_of_the_next_sigma():
    for s_next in (0.0089, 0.278, 0.7, 0.96):
        for level in (0.1, 0.5, 0.8, 1.0):
            c, tau = coefficients(0.99, s_next, level, "cps")
            assert c**2 + tau**2 == pytest.approx(s_next**2, rel=1e-12)
            assert tau == pytest.approx(s_next * math.sin(level * math.pi / 2), rel=1e-12)
            assert c >= 0


def test_flow_and_dance_differ_in_q_alone():
    for s, s_next in [(0.9, 0.8), (0.5, 0.3), (0.278, 0.0089)]:
        q = 0.7 * math.sqrt(s / (1 - s))
        assert coefficients(s, s_next, 0.7, "flow") == pytest.approx(coefficients(s, s_next, q, "dance"), rel=1e-12)


def test_numbers_of_the_sd35_grid():
    """Ten steps of Stable Diffusion 3.5 Medium at a = 0.7, to the digits of a table that was computed by hand."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid = scheduler.sigmas.tolist()
    printed = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert grid == pytest.approx(printed, abs=5.1e-5)
    q = [3.51, 3.43, 2.27, 1.72, 1.36, 1.09, 0.861, 0.652, 0.434, 0.066]
    tau = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    c = [0.715, 0.626, 0.700, 0.675, 0.610, 0.514, 0.380, 0.192, -0.082, -0.002]
    steps = list(zip(grid[:-1], grid[1:], strict=True))
    assert [diffusion_coefficient(*step, 0.7, "flow") for step in steps] == pytest.approx(q, abs=5.1e-3)
    assert [coefficients(*step, 0.7, "flow")[1] for step in steps] == pytest.approx(tau, abs=6e-4)
    assert [coefficients(*step, 0.7, "flow")[0] for step in steps] == pytest.approx(c, abs=6e-4)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_without_noise_a_step_is_eulers(dynamics):
    x, v = torch.randn(2, 3, 5, dtype=torch.float64)
    for s, s_next in [(1.0, 0.75), (0.5, 0.25), (0.125, 0.0)]:
        mean, std = transition(x, v, s, s_next, 0.0, dynamics)
        assert std == 0.0
        torch.testing.assert_close(mean, x + (s_next - s) * v, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("num_steps", [4, 10, 28])
def test_euler_step_is_bit_equal_to_diffusers(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    ours = theirs = torch.randn(2, 4, 4, 4)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 4, 4, 4)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = euler_step(ours, velocity, *scheduler.sigmas[i : i + 2].tolist())
        assert torch.equal(ours, theirs), f"step {i}"


def test_log_prob_is_the_mean_of_the_normal_density():
    sample, mean = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    for std in (0.0063, 0.3, 0.743):
        expected = torch.distributions.Normal(mean, std).log_prob(sample).mean(dim=(1, 2, 3))
        torch.testing.assert_close(log_prob(sample, mean, std), expected, rtol=1e-12, atol=1e-12)


def test_log_prob_gradient_reaches_the_mean_only():
    sample = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    log_prob(sample, mean, 0.5).sum().backward()
    assert sample.grad is None
    torch.testing.assert_close(mean.grad, (sample - mean).detach() / 0.25 / 6)


def test_log_prob_of_a_deterministic_step_is_refused():
    with pytest.raises(ValueError, match="std=0.0: a deterministic step has no density"):
        log_prob(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)


@pytest.mark.parametrize("s, s_next", [(0.5, 0.5), (0.5, 0.6), (1.2, 0.5), (0.5, -0.1), (0.0, 0.0)])
def test_flow_times_must_descend(s, s_next):
    with pytest.raises(ValueError, match="expected 1 >= sigma > sigma_next >= 0"):
        coefficients(s, s_next, 0.7)


@pytest.mark.parametrize("dynamics, level", [("flow", -0.1), ("dance", -1.0), ("cps", -0.1), ("cps", 1.01)])
def test_noise_level_out_of_range(dynamics, level):
    with pytest.raises(ValueError, match=f"noise_level={level}: expected"):
        coefficients(0.5, 0.25, level, dynamics)


def test_unknown_dynamics_lists_the_known_ones():
    with pytest.raises(ValueError, match="dynamics='heun' is unknown: expected one of flow, dance, cps"):
        coefficients(0.5, 0.25, 0.7, "heun")
