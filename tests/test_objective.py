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
from trl_flow.objective import clipped_loss, kl_divergence, mean_slope, step_weights
from trl_flow.rollout import log_prob, transition


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
    assert step_weights("none", [0.7, 0.3]) == [1.0, 1.0]
    assert step_weights("noise", [0.3, 0.1, 0.2]) == pytest.approx([1.5, 0.5, 1.0], rel=1e-12)
    with pytest.raises(ValueError, match="step_weighting='guard' is unknown: expected 'none' or 'noise'"):
        step_weights("guard", [0.7])


def test_temporal_weighting_of_the_sd35_grid():
    # TempFlow-GRPO's 2.25 * tau, with tau at a = 0.7.
    stds = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    assert step_weights("noise", stds) == pytest.approx([2.25 * std for std in stds], rel=1e-2)


# ---- Siblings that share a parent ----


def test_gradient_through_a_shared_parent_is_that_of_each_sibling():
    """G siblings from one forward, against G forwards of one sample each."""
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["attn.to_v", "attn.to_out.0"])
    policy = FlowPolicy(tiny_sd3(), adapter, max_sequence_length=2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    parent = torch.randn(1, *policy.latent_shape)
    siblings = parent + 0.3 * torch.randn(5, *policy.latent_shape)
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0, 1.25])
    conditioning = policy.conditioning(["a red circle"])
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def loss_of(children, rows, weights):
        velocity = policy(rows, 0.75, {k: v.expand(len(rows), *v.shape[1:]) for k, v in conditioning.items()})
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
