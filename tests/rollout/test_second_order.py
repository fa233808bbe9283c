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

"""The second-order multistep step, against its paper, diffusers' solver and an ODE whose solution is known."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from trl_flow.rollout import Plan, euler_step, execute, second_order_step


def paper_step(x, clean, clean_before, s_before, s, s_next):
    """DPM-Solver++(2M) as its algorithm 2 prints it: alpha = 1 - sigma, r = h0 / h, x' by the exponential of -h."""

    def log_snr(sigma):
        return np.log(1 - sigma) - np.log(sigma)

    h = log_snr(s_next) - log_snr(s)
    r = (log_snr(s) - log_snr(s_before)) / h
    extrapolated = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * clean_before
    return s_next / s * x - (1 - s_next) * (np.exp(-h) - 1) * extrapolated


def test_is_the_papers_formula():
    random = np.random.default_rng(0)
    for _ in range(100):
        s_next, s, s_before = np.sort(random.uniform(0.01, 0.99, 3))
        x, clean, clean_before = random.normal(size=(3, 2, 4))
        step = second_order_step(*map(torch.from_numpy, (x, clean, clean_before)), s_before, s, s_next)
        assert step.dtype == torch.float64
        expected = paper_step(x, clean, clean_before, s_before, s, s_next)
        np.testing.assert_allclose(step.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("s_before, s, s_next", [(1.0, 0.9, 0.7), (0.9, 0.5, 0.0), (1.0, 0.5, 0.0)])
def test_is_eulers_where_the_log_snr_is_infinite(s_before, s, s_next):
    x, v, clean_before = torch.randn(3, 2, 5, dtype=torch.float64)
    step = second_order_step(x, x - s * v, clean_before, s_before, s, s_next)
    np.testing.assert_allclose(step.numpy(), (x + (s_next - s) * v).numpy(), rtol=1e-13, atol=1e-13)


def test_is_eulers_where_the_clean_estimate_stands_still():
    x, v = torch.randn(2, 2, 5, dtype=torch.float64)
    step = second_order_step(x, x - 0.5 * v, x - 0.5 * v, 0.8, 0.5, 0.1)
    np.testing.assert_allclose(step.numpy(), (x - 0.4 * v).numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "times", [(0.5, 0.5, 0.1), (0.4, 0.5, 0.1), (0.8, 0.5, 0.5), (1.1, 0.5, 0.1), (0.8, 0.5, -0.1)]
)
def test_flow_times_must_descend(times):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="expected 1 >= sigma_before > sigma > sigma_next >= 0"):
        second_order_step(x, x, x, *times)


# ---- Against diffusers' solver ----


def flow_match_grid(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


GRIDS = {
    "SD3.5, 10 steps": flow_match_grid(10, 3.0),
    "unshifted, 7 steps": flow_match_grid(7, 1.0),
    "SD3.5, 20 steps": flow_match_grid(20, 3.0),
    "uneven": torch.tensor([1.0, 0.93, 0.92, 0.6, 0.55, 0.2, 0.05, 0.0]),
    "from below 1": torch.tensor([0.95, 0.8, 0.5, 0.35, 0.1, 0.0]),
    "two steps": torch.tensor([1.0, 0.4, 0.0]),
    "the solver's own": None,
}


def reference_solver(grid):
    solver = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=2.0,
        final_sigmas_type="zero",
    )
    solver.set_timesteps(9 if grid is None else len(grid) - 1)
    if grid is not None:
        solver.sigmas, solver.timesteps = grid, 1000 * grid[:-1]
    solver.set_begin_index(0)
    return solver


@pytest.mark.parametrize("name", GRIDS)
def test_tail_takes_the_steps_of_diffusers_solver(name):
    """The first step is Euler's, the last one to 0 of first order, all others of second order."""
    solver = reference_solver(GRIDS[name])
    sigmas = solver.sigmas.tolist()
    theirs = ours = torch.randn(2, 3, 4, dtype=torch.float64)
    before = None
    seconds = 0
    for i, timestep in enumerate(solver.timesteps):
        v = torch.tanh(1.5 * ours) + 0.4 * ours - sigmas[i]
        theirs_v = torch.tanh(1.5 * theirs) + 0.4 * theirs - sigmas[i]
        theirs = solver.step(theirs_v, timestep, theirs, return_dict=False)[0]
        clean = ours - sigmas[i] * v
        if before is None:
            ours = euler_step(ours, v, sigmas[i], sigmas[i + 1])
        else:
            euler = euler_step(ours, v, sigmas[i], sigmas[i + 1])
            ours = second_order_step(ours, clean, before, sigmas[i - 1], sigmas[i], sigmas[i + 1])
            seconds += not torch.allclose(euler, ours, rtol=1e-5, atol=1e-5)
        before = clean
        # diffusers computes the log signal-to-noise ratios in float32.
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-5, atol=2e-5, err_msg=f"step {i}")
    assert seconds == max(0, len(sigmas) - 1 - (3 if sigmas[0] == 1 else 2))


@pytest.mark.parametrize("name", ["SD3.5, 10 steps", "uneven", "from below 1"])
def test_a_rollouts_tail_is_diffusers_solver(name):
    grid = GRIDS[name]
    solver, num_steps = reference_solver(grid), len(grid) - 1

    def field(x, sigma):
        return torch.tanh(1.5 * x) + 0.4 * x - sigma

    plan = Plan(num_steps)
    plan.tail(plan.start(), range(1, num_steps + 1), "dpm")
    noise = torch.randn(2, 1, 6, dtype=torch.float64)
    rollout = execute(plan, lambda x, sigma, prompt: field(x, sigma), grid, noise, [0.0] * num_steps)
    x = noise[:, 0]
    for i, timestep in enumerate(solver.timesteps):
        x = solver.step(field(x, grid[i].item()), timestep, x, return_dict=False)[0]
    np.testing.assert_allclose(rollout.leaves[:, 0].numpy(), x.numpy(), rtol=2e-5, atol=2e-5)
    assert rollout.num_evaluations == 2 * num_steps


# ---- Order of convergence ----

CENTRE, SPREAD = 1.3, 0.6


def gaussian_field(x, sigma):
    """The exact velocity E[eps - x0 | x] where the data are N(CENTRE, SPREAD^2)."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    away = (x - (1 - sigma) * CENTRE) / variance
    return sigma * away - CENTRE - (1 - sigma) * SPREAD**2 * away


def gaussian_path(z, sigma):
    """Its solution: the quantiles of the marginals N((1 - s) CENTRE, (1 - s)^2 SPREAD^2 + s^2)."""
    return (1 - sigma) * CENTRE + np.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * z


def error_of(solver, num_steps, first=0.9, last=0.1, z=0.8):
    """Error after a uniform grid from `first` to `last`."""
    grid = np.linspace(first, last, num_steps + 1)
    x, before = torch.full((1, 1), gaussian_path(z, first), dtype=torch.float64), None
    for i in range(num_steps):
        clean = x - grid[i] * gaussian_field(x, grid[i])
        if solver == "euler" or before is None:
            x = x + (grid[i + 1] - grid[i]) * gaussian_field(x, grid[i])
        else:
            x = second_order_step(x, clean, before, *grid[i - 1 : i + 2].tolist())
        before = clean
    return abs(x.item() - gaussian_path(z, last))


def test_the_field_and_its_solution_belong_together():
    for sigma in (0.99, 0.7, 0.3, 0.01):
        slope = (gaussian_path(0.8, sigma + 1e-6) - gaussian_path(0.8, sigma - 1e-6)) / 2e-6
        assert slope == pytest.approx(gaussian_field(gaussian_path(0.8, sigma), sigma), rel=1e-6)


@pytest.mark.parametrize("num_steps", [40, 80])
def test_order_of_convergence(num_steps):
    """Twice the steps: half Euler's error, a quarter of the second-order solver's."""
    assert error_of("euler", num_steps) / error_of("euler", 2 * num_steps) == pytest.approx(2, abs=0.15)
    assert error_of("dpm", num_steps) / error_of("dpm", 2 * num_steps) == pytest.approx(4, abs=0.3)
    assert error_of("dpm", num_steps) < error_of("euler", num_steps) / 10


def test_convergence_from_noise_to_data():
    """With the steps of first order at both ends, where the log signal-to-noise ratio is infinite."""
    euler, second = ([error_of(solver, n, 1.0, 0.0) for n in (40, 80)] for solver in ("euler", "dpm"))
    assert euler[0] / euler[1] < 2.2 and second[0] / second[1] > 3
    assert second[0] < euler[0] / 5 and second[1] < euler[1] / 10
