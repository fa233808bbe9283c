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
The gradient of every objective, against central differences of the same loss written anew in numpy.

The policy is a velocity field of two parameters, v = a x + b sin(x), in float64.
"""

import numpy as np
import pytest
import torch

from trl_flow.objective import (
    KL_TYPES,
    MATCHINGS,
    clipped_loss,
    contrastive_loss,
    guarded_ratio,
    kl_divergence,
    masked_loss,
    matching_log_prob,
    step_divergence,
)
from trl_flow.rollout import DYNAMICS, log_prob, transition


NEW, OLD, REFERENCE = np.array([0.6, -0.3]), np.array([0.45, -0.1]), np.array([0.1, 0.2])
LEVEL = 0.7
STEPS = [(1.0, 0.8), (0.7, 0.5), (0.3, 0.1)]
ADVANTAGES = np.array([1.5, -0.7, 0.3, -2.0, 0.0, 0.9, -1.1, 2.2])


def field(theta, x):
    return theta[0] * x + theta[1] * np.sin(x)


def torch_field(theta, x):
    return theta[0] * x + theta[1] * torch.sin(x)


def step_of(dynamics, x, v, s, s_next):
    """Mean, standard deviation and diffusion coefficient as the papers print them."""
    if dynamics == "cps":
        std = s_next * np.sin(LEVEL * np.pi / 2)
        return (1 - s_next) * (x - s * v) + np.sqrt(s_next**2 - std**2) * (x + (1 - s) * v), std, std
    q = LEVEL if dynamics == "dance" else LEVEL * np.sqrt(s / (1 - (s_next if s == 1 else s)))
    dt = s_next - s
    return x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt, q * np.sqrt(-dt), q


class Case:
    """Transitions of the old policy: parents x, rollout noise z and children x'."""

    def __init__(self, dynamics, s, s_next):
        self.step = s, s_next
        self.dynamics = dynamics
        self.x, self.z = np.random.default_rng(0).normal(size=(2, len(ADVANTAGES), 5))
        self.old_mean, self.std, self.q = step_of(dynamics, self.x, field(OLD, self.x), s, s_next)
        self.child = self.old_mean + self.std * self.z

    def mean(self, theta):
        return step_of(self.dynamics, self.x, field(theta, self.x), *self.step)[0]

    def log_ratio(self, theta):
        """log N(x'; mean, std) - log N(x'; old mean, std), averaged over the elements."""
        squares = (self.child - self.old_mean) ** 2 - (self.child - self.mean(theta)) ** 2
        return squares.mean(1) / (2 * self.std**2)

    def divergence(self, theta):
        return ((self.mean(theta) - self.old_mean) ** 2).mean(1) / (2 * self.std**2)

    def of_policy(self, theta):
        """Log-ratio and divergence by the code under test, and the step's standard deviation."""
        x, child = torch.from_numpy(self.x), torch.from_numpy(self.child)
        mean, std = transition(x, torch_field(theta, x), *self.step, LEVEL, self.dynamics)
        old_mean, _ = transition(x, torch_field(torch.from_numpy(OLD), x), *self.step, LEVEL, self.dynamics)
        log_ratio = log_prob(child, mean, std) - log_prob(child, old_mean, std)
        return log_ratio, step_divergence(mean, old_mean, std), std


def ppo(advantages, ratio, epsilon):
    return np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - epsilon, 1 + epsilon))


def check(loss_of, expected_loss_of, theta=NEW):
    """Values and gradients: `loss_of` a torch tensor of parameters, `expected_loss_of` an array."""
    parameters = torch.from_numpy(theta).clone().requires_grad_()
    loss = loss_of(parameters)
    assert loss.dtype == torch.float64
    loss.backward()
    width = 1e-5
    expected = [
        (expected_loss_of(theta + width * axis) - expected_loss_of(theta - width * axis)) / (2 * width)
        for axis in np.eye(2)
    ]
    np.testing.assert_allclose(loss.item(), expected_loss_of(theta), rtol=1e-8, atol=1e-12)
    scale = np.abs(expected).max()
    assert scale > 1e-6
    np.testing.assert_allclose(parameters.grad.numpy(), expected, rtol=1e-6, atol=1e-7 * scale)


advantages = torch.from_numpy(ADVANTAGES)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("quantile", [0.3, 0.7, 1.01])
def test_clip(dynamics, step, quantile):
    case = Case(dynamics, *step)
    distance = np.sort(np.abs(np.exp(case.log_ratio(NEW)) - 1))
    # Between two of the ratios: some are clipped, and none sits on the edge.
    i = int(quantile * len(distance))
    epsilon = (distance[i - 1] + distance[i]) / 2 if i < len(distance) else 2 * distance[-1]

    def loss_of(theta):
        losses, clipped = clipped_loss(advantages, case.of_policy(theta)[0].exp(), epsilon, epsilon)
        assert clipped.any() == (quantile < 1)
        return losses.sum()

    check(loss_of, lambda theta: ppo(ADVANTAGES, np.exp(case.log_ratio(theta)), epsilon).sum())


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("clipped", [False, True])
def test_guard(dynamics, step, clipped):
    case = Case(dynamics, *step)

    def ratio(theta):
        return np.exp((case.z * (case.mean(theta) - case.old_mean)).mean(1))

    distance = np.sort(np.abs(ratio(NEW) - 1))
    epsilon = (distance[3] + distance[4]) / 2 if clipped else 2 * distance[-1]
    check(
        lambda theta: clipped_loss(advantages, guarded_ratio(*case.of_policy(theta)), epsilon, epsilon)[0].sum(),
        lambda theta: ppo(ADVANTAGES, ratio(theta), epsilon).sum(),
    )


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", STEPS)
def test_dppo(dynamics, step):
    case = Case(dynamics, *step)
    ordered = np.sort(case.divergence(NEW))
    threshold = (ordered[2] + ordered[3]) / 2

    def expected(theta):
        ratio = np.exp(case.log_ratio(theta))
        outward = ((ADVANTAGES > 0) & (ratio > 1)) | ((ADVANTAGES < 0) & (ratio < 1))
        return np.where((case.divergence(theta) >= threshold) & outward, 0.0, -ADVANTAGES * ratio).sum()

    def loss_of(theta):
        log_ratio, divergence, _ = case.of_policy(theta)
        losses, left_out = masked_loss(advantages, log_ratio.exp(), divergence.detach(), threshold)
        assert 0 < left_out.sum() < len(losses)
        return losses.sum()

    check(loss_of, expected)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", STEPS)
def test_first_update_is_the_policy_gradient(dynamics, step):
    """With the policy that sampled, without noted log-probabilities: - sum A <z d mean / d theta> / tau."""
    case = Case(dynamics, *step)
    theta = torch.from_numpy(OLD).clone().requires_grad_()
    x, child = torch.from_numpy(case.x), torch.from_numpy(case.child)
    mean, std = transition(x, torch_field(theta, x), *step, LEVEL, dynamics)
    log_probs = log_prob(child, mean, std)
    ratio = torch.exp(log_probs - log_probs.detach())
    assert torch.equal(ratio, torch.ones_like(ratio))
    clipped_loss(advantages, ratio, 1e-4, 1e-4)[0].sum().backward()
    slope = step_of(dynamics, 0.0, 1.0, *step)[0]
    expected = [-(ADVANTAGES * (case.z * slope * by).mean(1)).sum() / case.std for by in (case.x, np.sin(case.x))]
    np.testing.assert_allclose(theta.grad.numpy(), expected, rtol=1e-9)


# ---- Distance from the reference ----


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_kl(dynamics, step, kl_type):
    case = Case(dynamics, *step)
    x = torch.from_numpy(case.x)
    reference = torch_field(torch.from_numpy(REFERENCE), x)

    def expected(theta):
        if kl_type == "velocity":
            return ((field(theta, case.x) - field(REFERENCE, case.x)) ** 2).mean(1).sum()
        squared = ((case.mean(theta) - case.mean(REFERENCE)) ** 2).mean(1).sum()
        return squared / (2 * (case.q if kl_type == "mean" else case.std) ** 2)

    check(
        lambda theta: kl_divergence(kl_type, torch_field(theta, x), reference, *step, LEVEL, dynamics).sum(), expected
    )


# ---- The forward process ----


def forward_case(sigma):
    clean, noise = np.random.default_rng(1).normal(size=(2, len(ADVANTAGES), 5))
    return (1 - sigma) * clean + sigma * noise, noise - clean


@pytest.mark.parametrize("sigma", [0.9, 0.3])
@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_nft(sigma, strength):
    x, target = forward_case(sigma)

    def estimates(theta):
        v, v_old = field(theta, x), field(OLD, x)
        return strength * v + (1 - strength) * v_old, (1 + strength) * v_old - strength * v

    # The divisors are constants of the gradient.
    divisors = [np.abs(sigma * (estimate - target)).mean(1) for estimate in estimates(NEW)]

    def expected(theta):
        r = ADVANTAGES / 10 + 0.5
        positive, negative = (
            ((sigma * (estimate - target)) ** 2).mean(1) / divisor
            for estimate, divisor in zip(estimates(theta), divisors, strict=True)
        )
        return (5 * (r * positive + (1 - r) * negative) / strength).sum()

    rows, old = torch.from_numpy(x), torch_field(torch.from_numpy(OLD), torch.from_numpy(x))
    check(
        lambda theta: contrastive_loss(
            advantages, torch_field(theta, rows), old, torch.from_numpy(target), sigma, strength, 5.0
        ).sum(),
        expected,
    )


@pytest.mark.parametrize("sigma", [0.9, 0.3])
@pytest.mark.parametrize("matching", MATCHINGS)
def test_awm(sigma, matching):
    x, target = forward_case(sigma)
    rows, goal = torch.from_numpy(x), torch.from_numpy(target)

    def log_probs(theta):
        error = ((field(theta, x) - target) ** 2).mean(1)
        return {
            "uniform": -error,
            "sigma": -sigma * error,
            "ghuber": -sigma * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
        }[matching]

    distance = np.sort(np.abs(np.exp(log_probs(NEW) - log_probs(OLD)) - 1))
    epsilon = (distance[1] + distance[2]) / 2
    old = matching_log_prob(torch_field(torch.from_numpy(OLD), rows), goal, sigma, matching)

    def loss_of(theta):
        ratio = torch.exp(matching_log_prob(torch_field(theta, rows), goal, sigma, matching) - old)
        losses, clipped = clipped_loss(advantages, ratio, epsilon, epsilon)
        assert clipped.any()
        return losses.sum()

    check(loss_of, lambda theta: ppo(ADVANTAGES, np.exp(log_probs(theta) - log_probs(OLD)), epsilon).sum())


# ---- Siblings that share a parent ----


@pytest.mark.parametrize("objective", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_siblings_that_share_a_velocity(objective, dynamics):
    """One row of velocity for all children of a parent, against one of its own for each, and central differences."""
    step = 0.7, 0.5
    case = Case(dynamics, *step)
    row = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    parents = case.x[:2]
    case.x = parents[row]
    case.old_mean = case.mean(OLD)
    case.child = case.old_mean + case.std * case.z
    child = torch.from_numpy(case.child)
    # Siblings move alike: the threshold lies between the two parents' divergences.
    epsilon, threshold = 0.02, (case.divergence(NEW)[0] + case.divergence(NEW)[-1]) / 2

    def loss_of(theta, x, row, members=slice(None)):
        def mean(theta):
            return transition(x, torch_field(theta, x), *step, LEVEL, dynamics)[0][row]

        new, old = mean(theta), mean(torch.from_numpy(OLD))
        log_ratio = log_prob(child[members], new, case.std) - log_prob(child[members], old, case.std)
        divergence = step_divergence(new, old, case.std)
        if objective == "dppo":
            return masked_loss(advantages[members], log_ratio.exp(), divergence.detach(), threshold)[0].sum()
        ratio = guarded_ratio(log_ratio, divergence, case.std) if objective == "guard" else log_ratio.exp()
        return clipped_loss(advantages[members], ratio, epsilon, epsilon)[0].sum()

    theta = torch.from_numpy(NEW).clone().requires_grad_()
    (shared,) = torch.autograd.grad(loss_of(theta, torch.from_numpy(parents), torch.from_numpy(row)), theta)
    alone = sum(
        torch.autograd.grad(
            loss_of(theta, torch.from_numpy(parents[row[m]][None]), torch.tensor([0]), slice(m, m + 1)), theta
        )[0]
        for m in range(len(row))
    )
    assert shared.abs().min() > 1e-4
    torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-13)

    def expected(theta):
        if objective == "guard":
            return ppo(ADVANTAGES, np.exp((case.z * (case.mean(theta) - case.old_mean)).mean(1)), epsilon).sum()
        ratio = np.exp(case.log_ratio(theta))
        if objective == "clip":
            return ppo(ADVANTAGES, ratio, epsilon).sum()
        outward = ADVANTAGES * (ratio - 1) > 0
        return np.where((case.divergence(theta) >= threshold) & outward, 0.0, -ADVANTAGES * ratio).sum()

    check(lambda theta: loss_of(theta, torch.from_numpy(parents), torch.from_numpy(row)), expected)
