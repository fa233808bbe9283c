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

import numpy as np
import pytest
import torch
from peft import LoraConfig
from pipelines import tiny_sd3

from trl_flow import FlowPolicy
from trl_flow.objective import (
    MATCHINGS,
    clipped_loss,
    contrastive_loss,
    guarded_ratio,
    kl_divergence,
    masked_loss,
    matching_log_prob,
    mean_slope,
    step_divergence,
    step_weights,
)
from trl_flow.rollout import DYNAMICS, log_prob, transition


# ---- Clipped loss ----


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.0, -2.0, -2.0),  # on-policy: the plain policy gradient
        (2.0, 1.05, -2.1, -2.0),
        (2.0, 1.3, -2.4, 0.0),  # good and already likelier by more than 0.2: no further push
        (2.0, 0.5, -1.0, -2.0),  # good and less likely: pushed, unclipped
        (-2.0, 0.5, 1.8, 0.0),  # bad and already less likely by more than 0.1
        (-2.0, 1.3, 2.6, 2.0),  # bad and likelier: pushed, unclipped
        (-2.0, 0.95, 1.9, 2.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_loss(advantage, ratio, loss, slope):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    losses, clipped = clipped_loss(torch.tensor([advantage], dtype=torch.float64), ratio, 0.1, 0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-12)
    assert ratio.grad.item() == pytest.approx(slope, abs=1e-12)
    assert clipped.item() == (advantage != 0 and slope == 0)


def test_clipped_loss_is_ppos():
    random = np.random.default_rng(0)
    advantages, ratios = random.normal(size=200), np.exp(0.2 * random.normal(size=200))
    expected = np.maximum(-advantages * ratios, -advantages * np.clip(ratios, 0.9, 1.2))
    losses, _ = clipped_loss(torch.from_numpy(advantages), torch.from_numpy(ratios), 0.1, 0.2)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)


# ---- Distance from the reference ----


def mean_and_std(dynamics, x, v, s, s_next, level):
    """The step's Gaussian as the papers print it."""
    dt = s_next - s
    if dynamics == "cps":
        std = s_next * np.sin(level * np.pi / 2)
        return (1 - s_next) * (x - s * v) + np.sqrt(s_next**2 - std**2) * (x + (1 - s) * v), std, std
    q = level if dynamics == "dance" else level * np.sqrt(s / (1 - (s_next if s == 1 else s)))
    mean = x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt
    return mean, q * np.sqrt(-dt), q


STEPS = [(1.0, 0.9375), (0.75, 0.625), (0.25, 0.0625)]


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
@pytest.mark.parametrize("s, s_next", STEPS)
def test_kl_divergence(dynamics, s, s_next):
    x, v, v_ref = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    mean, std, q = mean_and_std(dynamics, x, v, s, s_next, 0.7)
    mean_ref, _, _ = mean_and_std(dynamics, x, v_ref, s, s_next, 0.7)
    normal = torch.distributions.Normal
    true = torch.distributions.kl_divergence(normal(mean, std), normal(mean_ref, std)).mean(dim=(1, 2, 3))
    step = (s, s_next, 0.7, dynamics)
    torch.testing.assert_close(kl_divergence("gaussian", v, v_ref, *step), true, rtol=1e-9, atol=0)
    # Flow-GRPO's convention leaves the step size out: q in place of the standard deviation.
    torch.testing.assert_close(
        kl_divergence("mean", v, v_ref, *step),
        ((mean - mean_ref) ** 2).mean(dim=(1, 2, 3)) / (2 * q**2),
        rtol=1e-9,
        atol=0,
    )
    torch.testing.assert_close(kl_divergence("velocity", v, v_ref, *step), ((v - v_ref) ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kl_type", ["mean", "gaussian", "velocity"])
def test_kl_is_zero_for_equal_velocities_and_pulls_towards_the_reference(kl_type):
    v_ref = torch.randn(2, 8, dtype=torch.float64)
    v = v_ref.clone().requires_grad_()
    value = kl_divergence(kl_type, v, v_ref, 0.75, 0.625, 0.7, "flow")
    assert torch.equal(value.detach(), torch.zeros(2, dtype=torch.float64))
    v = (v_ref + 0.1).requires_grad_()
    kl_divergence(kl_type, v, v_ref, 0.75, 0.625, 0.7, "flow").sum().backward()
    assert (v.grad > 0).all()


def test_unknown_kl_type():
    with pytest.raises(ValueError, match="kl_type='js' is unknown: expected one of mean, gaussian, velocity"):
        kl_divergence("js", torch.zeros(1, 2), torch.zeros(1, 2), 0.5, 0.25, 0.7, "flow")


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
@pytest.mark.parametrize("s, s_next", STEPS)
def test_mean_slope_is_the_derivative_of_the_mean(dynamics, s, s_next):
    mean_1, std, _ = mean_and_std(dynamics, 0.3, 1.0, s, s_next, 0.7)
    mean_0, _, _ = mean_and_std(dynamics, 0.3, 0.0, s, s_next, 0.7)
    assert mean_slope(s, s_next, 0.7, dynamics) == pytest.approx((mean_1 - mean_0, std), rel=1e-12)


def test_flows_slope_is_one_constant_times_the_step():
    # C h with C = 1 + a^2 / 2 at every step but the first, where sigma 1 leaves C = 1.
    for s, s_next in [(0.9601, 0.9133), (0.6022, 0.4649), (0.278, 0.0089)]:
        assert mean_slope(s, s_next, 0.7, "flow")[0] == pytest.approx(-1.245 * (s - s_next), rel=1e-12)
    assert mean_slope(1.0, 0.9601, 0.7, "flow")[0] == pytest.approx(-0.0399, rel=1e-12)


# ---- Weights of the steps ----


def test_step_weights():
    assert step_weights("none", [0.7, 0.3], [0.1, 0.2]) == [1.0, 1.0]
    assert step_weights("noise", [0.3, 0.1, 0.2], [0.1, 0.2, 0.3]) == pytest.approx([1.5, 0.5, 1.0], rel=1e-12)
    # 1 / h = 10, 5 and 2.5, of mean 35 / 6.
    expected = [12 / 7, 6 / 7, 3 / 7]
    assert step_weights("guard", [0.3, 0.1, 0.2], [0.1, 0.2, 0.4]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="step_weighting='late' is unknown: expected one of none, noise, guard"):
        step_weights("late", [0.7], [0.1])


@pytest.mark.parametrize("weighting", ["none", "noise", "guard"])
def test_step_weights_have_mean_one(weighting):
    stds, sizes = np.random.default_rng(0).uniform(0.01, 0.9, (2, 9))
    weights = np.array(step_weights(weighting, stds.tolist(), sizes.tolist()))
    assert weights.mean() == pytest.approx(1, rel=1e-12)
    proportional_to = {"none": np.ones(9), "noise": stds, "guard": 1 / sizes}[weighting]
    np.testing.assert_allclose(weights / weights[0], proportional_to / proportional_to[0], rtol=1e-12)


def test_temporal_weighting_of_the_sd35_grid():
    # TempFlow-GRPO's 2.25 * tau, with tau at a = 0.7.
    stds = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    assert step_weights("noise", stds, [1.0] * 9) == pytest.approx([2.25 * std for std in stds], rel=1e-2)


def test_guards_ratio_and_weights_flatten_the_steps():
    # The gradient of <z d> is the slope C h, the same times 1 / h is C: 1.245 for Flow at every step but the first.
    grid = [0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    steps = list(zip(grid, grid[1:], strict=False))
    slopes = [-mean_slope(*step, 0.7, "flow")[0] for step in steps]
    weights = step_weights("guard", [1.0] * len(steps), [s - s_next for s, s_next in steps])
    products = [slope * weight for slope, weight in zip(slopes, weights, strict=True)]
    assert products == pytest.approx([products[0]] * len(steps), rel=1e-9)


# ---- Normalised ratio ----


def gaussian_case(std, size=3):
    """Rollout noise z, x' = mean_old + std z, and the change of the mean."""
    random = np.random.default_rng(1)
    z, old_mean = random.normal(size=(2, size, 4, 3, 3))
    change = 0.3 * random.normal(size=(size, 4, 3, 3))
    return z, change, old_mean, old_mean + change, old_mean + std * z


@pytest.mark.parametrize("std", [0.006, 0.3, 2.4])
def test_guarded_ratio_is_the_noise_times_the_change(std):
    """METHODS' algebra: log r = <z d> / tau - <d^2> / (2 tau^2), of which exp <z d> is left."""
    z, change, old_mean, mean, sample = gaussian_case(std)
    axes = (1, 2, 3)
    expected = (z * change).mean(axes)
    log_ratio = ((old_mean - sample) ** 2 - (mean - sample) ** 2).mean(axes) / (2 * std**2)
    np.testing.assert_allclose(log_ratio, expected / std - (change**2).mean(axes) / (2 * std**2), rtol=1e-9)
    divergence = (change**2).mean(axes) / (2 * std**2)
    ratio = guarded_ratio(torch.from_numpy(log_ratio), torch.from_numpy(divergence), std)
    np.testing.assert_allclose(np.log(ratio.numpy()), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("std", [0.006, 0.3, 2.4])
def test_guarded_ratio_of_this_librarys_log_probabilities(std):
    z, change, old_mean, mean, sample = map(torch.from_numpy, gaussian_case(std))
    log_ratio = log_prob(sample, mean, std) - log_prob(sample, old_mean, std)
    ratio = guarded_ratio(log_ratio, step_divergence(mean, old_mean, std), std)
    np.testing.assert_allclose(np.log(ratio.numpy()), (z * change).mean(dim=(1, 2, 3)).numpy(), rtol=1e-7, atol=1e-11)


def test_guarded_ratio_of_the_published_terms():
    # exp((log r + b) sqrt(h) q) with b = <d^2> / (2 h q^2).
    q, h = 0.8, 0.07
    std = q * np.sqrt(h)
    log_ratio, squared = np.random.default_rng(2).normal(size=(2, 5))
    squared = squared**2
    expected = np.exp((log_ratio + squared / (2 * h * q**2)) * np.sqrt(h) * q)
    ratio = guarded_ratio(torch.from_numpy(log_ratio), torch.from_numpy(squared / (2 * std**2)), std)
    np.testing.assert_allclose(ratio.numpy(), expected, rtol=1e-12)


def test_step_divergence_is_that_of_two_gaussians():
    mean, old_mean = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    for std in (0.006, 0.3, 2.0):
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, std), normal(old_mean, std)).mean(dim=(1, 2, 3))
        torch.testing.assert_close(step_divergence(mean, old_mean, std), expected, rtol=1e-12, atol=0)
    assert torch.equal(step_divergence(mean, mean, 0.006), torch.zeros(3, dtype=torch.float64))


# ---- Masked loss ----


@pytest.mark.parametrize(
    "advantage, ratio, divergence, loss, slope",
    [
        (2.0, 1.5, 0.1, -3.0, -2.0),  # near: whatever the ratio, it counts
        (2.0, 1.5, 0.2, 0.0, 0.0),  # far, good and likelier: away
        (2.0, 1.5, 0.9, 0.0, 0.0),
        (2.0, 0.5, 0.9, -1.0, -2.0),  # far, good and less likely: back
        (-2.0, 0.5, 0.9, 0.0, 0.0),  # far, bad and less likely: away
        (-2.0, 1.5, 0.9, 3.0, 2.0),
        (2.0, 1.0, 0.9, -2.0, -2.0),  # neither up nor down
        (0.0, 1.5, 0.9, 0.0, 0.0),
    ],
)
def test_masked_loss(advantage, ratio, divergence, loss, slope):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    losses, left_out = masked_loss(advantages, ratio, torch.tensor([divergence]), 0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-12)
    assert ratio.grad.item() == pytest.approx(slope, abs=1e-12)
    assert left_out.item() == (advantage != 0 and slope == 0)


def test_masked_loss_is_that_of_a_loop():
    random = np.random.default_rng(3)
    advantages, ratios = random.normal(size=300), np.exp(0.2 * random.normal(size=300))
    divergences = random.uniform(0, 2e-6, 300)
    expected = [
        0.0 if d >= 1e-6 and ((a > 0 and r > 1) or (a < 0 and r < 1)) else -a * r
        for a, r, d in zip(advantages, ratios, divergences, strict=True)
    ]
    losses, left_out = masked_loss(*map(torch.from_numpy, (advantages, ratios, divergences)), 1e-6)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
    assert 50 < left_out.sum() < 250


# ---- The forward process ----


def noised(size=6):
    """Clean samples and noise, x at sigma, and two policies' velocities, not far from eps - x0."""
    random = np.random.default_rng(4)
    clean, noise = random.normal(size=(2, size, 4, 3, 3))
    velocity, old = noise - clean + 0.4 * random.normal(size=(2, size, 4, 3, 3))
    return clean, noise, velocity, old


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_contrastive_loss_is_the_published_one(sigma, strength):
    """DiffusionNFT's code, in the space of clean estimates: 5 (r L+ / b + (1 - r) L- / b), r = A / 10 + 1/2."""
    clean, noise, v, v_old = noised()
    x = (1 - sigma) * clean + sigma * noise
    advantages = np.array([-5.0, -1.3, 0.0, 0.2, 2.5, 5.0])
    r = np.clip(advantages, -5, 5) / 10 + 0.5
    fits = []
    for velocity in (strength * v + (1 - strength) * v_old, (1 + strength) * v_old - strength * v):
        estimate = x - sigma * velocity
        fits.append(((estimate - clean) ** 2).mean((1, 2, 3)) / np.abs(estimate - clean).mean((1, 2, 3)))
    expected = 5 * (r * fits[0] / strength + (1 - r) * fits[1] / strength)
    losses = contrastive_loss(*map(torch.from_numpy, (advantages, v, v_old, noise - clean)), sigma, strength, 5.0)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-10)


def test_contrastive_gradient_follows_the_advantage():
    """From v = v_old: towards the sample where A > 0, away where A < 0, nowhere where A = 0, and linear in A."""
    clean, noise, _, v_old = (torch.from_numpy(value) for value in noised())
    target = noise - clean
    gradients = {}
    for advantage in (-2.0, -1.0, 0.0, 1.0):
        v = v_old.clone().requires_grad_()
        advantages = torch.full((6,), advantage, dtype=torch.float64)
        contrastive_loss(advantages, v, v_old, target, 0.6, 0.5, 5.0).sum().backward()
        gradients[advantage] = v.grad
    assert ((gradients[1.0] * (v_old - target)).flatten(1).sum(1) > 0).all()
    assert gradients[0.0].abs().max() < 1e-12
    torch.testing.assert_close(gradients[-1.0], -gradients[1.0])
    torch.testing.assert_close(gradients[-2.0], -2 * gradients[1.0])


def test_contrastive_loss_of_a_perfect_fit():
    # Its mean absolute error divides: nothing by nothing.
    target = torch.randn(2, 5)
    v = target.clone().requires_grad_()
    losses = contrastive_loss(torch.tensor([1.0, -1.0]), v, target, target, 0.5, 1.0, 5.0)
    losses.sum().backward()
    assert torch.equal(losses.detach(), torch.zeros(2)) and torch.equal(v.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("sigma", [0.95, 0.4])
def test_matching_log_prob(sigma):
    clean, noise, v, _ = noised()
    error = ((v - (noise - clean)) ** 2).mean((1, 2, 3))
    expected = {
        "uniform": -error,
        "sigma": -sigma * error,
        "ghuber": -sigma * 4 * ((error + 1e-10) ** (1 / 4) - 1e-10 ** (1 / 4)),
    }
    assert set(expected) == set(MATCHINGS)
    for matching in MATCHINGS:
        value = matching_log_prob(torch.from_numpy(v), torch.from_numpy(noise - clean), sigma, matching)
        np.testing.assert_allclose(value.numpy(), expected[matching], rtol=1e-10)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_matching_log_prob_is_float64_and_finite_at_a_perfect_fit(matching):
    target = torch.randn(2, 5)
    v = target.clone().requires_grad_()
    value = matching_log_prob(v, target, 0.5, matching)
    assert value.dtype == torch.float64
    assert torch.equal(value.detach(), torch.zeros(2, dtype=torch.float64))
    value.sum().backward()
    assert torch.equal(v.grad, torch.zeros(2, 5))


def test_unknown_matching():
    with pytest.raises(ValueError, match="matching='huber' is unknown: expected one of uniform, sigma, ghuber"):
        matching_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, "huber")


# ---- Steps without noise ----


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("kl_type", ["mean", "gaussian"])
@pytest.mark.parametrize("changed", [0.0, 0.1])
def test_a_step_without_noise_has_no_gaussian_divergence(dynamics, kl_type, changed):
    # Neither 0 / 0 for equal velocities nor infinity for others.
    v = torch.ones(1, 3)
    with pytest.raises(
        ValueError, match="kl_type='.*' divides by the noise of a step, but that from 0.5 to 0.25 has none"
    ):
        kl_divergence(kl_type, v + changed, v, 0.5, 0.25, 0.0, dynamics)
    assert kl_divergence("velocity", v + changed, v, 0.5, 0.25, 0.0, dynamics).item() == pytest.approx(changed**2)


def test_cps_ends_without_noise():
    # tau = 0 at sigma 0, at any noise level: the last step is Euler's, and has neither density nor divergence.
    x, v = torch.randn(2, 2, 5, dtype=torch.float64)
    mean, std = transition(x, v, 0.3, 0.0, 0.8, "cps")
    assert std == 0.0
    torch.testing.assert_close(mean, x - 0.3 * v, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="a deterministic step has no density"):
        log_prob(mean, mean, std)
    with pytest.raises(ValueError, match="that from 0.3 to 0.0 has none"):
        kl_divergence("mean", v, v, 0.3, 0.0, 0.8, "cps")
    assert mean_slope(0.3, 0.0, 0.8, "cps") == pytest.approx((-0.3, 0.0), rel=1e-12)


# ---- Siblings that share a parent ----


def test_gradient_through_a_shared_parent_is_that_of_each_sibling():
    """G siblings from one forward, against G forwards of one sample each."""
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["attn.to_v", "attn.to_out.0"])
    policy = FlowPolicy(tiny_sd3(), adapter, guidance_scale=1.0, max_sequence_length=2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    parent = torch.randn(1, *policy.latent_shape)
    siblings = parent + 0.3 * torch.randn(5, *policy.latent_shape)
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0, 1.25])
    conditioning = policy.conditioning(["a red circle"])
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def loss_of(children, rows, weights):
        velocity = policy(rows, 0.75, conditioning * len(rows))
        mean, std = transition(rows, velocity, 0.75, 0.625, 0.7)
        log_probs = log_prob(children, mean.expand_as(children), std)
        ratio = torch.exp(log_probs - log_probs.detach())
        return clipped_loss(weights, ratio, 1e-4, 1e-4)[0].sum()

    shared = torch.autograd.grad(loss_of(siblings, parent, advantages), trainable)
    alone = [
        torch.autograd.grad(loss_of(siblings[g : g + 1], parent, advantages[g : g + 1]), trainable) for g in range(5)
    ]
    assert max(gradient.abs().max() for gradient in shared) > 1e-3
    for together, parts in zip(shared, zip(*alone, strict=True), strict=True):
        expected = sum(part.double() for part in parts)
        assert (together - expected).norm() <= 1e-5 * expected.norm() + 1e-9
