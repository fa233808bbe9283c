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

from trl_flow.credit import assign_credit, combine_rewards, gain, normalize, outcome, value_after


NAN = math.nan


def reference_normalize(values, scale="group", ddof=0, eps=1e-4):
    """The same in numpy, group by group, in loops."""
    values = np.asarray(values, dtype=np.float64)
    advantages, mask = np.zeros_like(values), np.zeros(values.shape, dtype=bool)
    for b, s in np.ndindex(*values.shape[:2]):
        group = values[b, s]
        known = group[~np.isnan(group)]
        if len(known) < 2 or np.ptp(known) < 1e-9:
            continue
        if scale == "batch":
            everything = values[:, s][~np.isnan(values[:, s])]
            divisor = everything.std(ddof=ddof) + eps
        else:
            divisor = known.std(ddof=ddof) + eps if scale == "group" else 1.0
        mask[b, s] = ~np.isnan(group)
        advantages[b, s] = np.where(mask[b, s], (group - known.mean()) / divisor, 0.0)
    return advantages, mask


def random_values(*shape, missing=0.0):
    random = np.random.default_rng(0)
    values = random.normal(size=shape)
    values[random.uniform(size=shape) < missing] = NAN
    return values


# ---- Normalisation ----


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ddof, eps", [(0, 1e-4), (1, 1e-8), (0, 0.5)])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_normalize(scale, ddof, eps, missing):
    values = random_values(4, 3, 6, missing=missing)
    values[1, 2] = 0.7  # a group with nothing to compare
    advantages, mask = normalize(torch.from_numpy(values), scale, ddof, eps)
    expected, expected_mask = reference_normalize(values, scale, ddof, eps)
    assert advantages.dtype == torch.float64
    np.testing.assert_array_equal(mask.numpy(), expected_mask)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_normalize_by_hand():
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    advantages, _ = normalize(values, eps=0.0)
    torch.testing.assert_close(advantages, (values - 2.5).double() / math.sqrt(1.25))
    advantages, _ = normalize(values, ddof=1, eps=0.0)
    torch.testing.assert_close(advantages, (values - 2.5).double() / math.sqrt(5 / 3))
    advantages, _ = normalize(values, scale="none", eps=0.25)
    torch.testing.assert_close(advantages, (values - 2.5).double())


def test_batch_scale_uses_the_whole_batch_where_one_process_has_a_part():
    values = random_values(4, 2, 5)
    whole, _ = normalize(torch.from_numpy(values), "batch")
    part, _ = normalize(torch.from_numpy(values[:1]), "batch", batch=torch.from_numpy(values))
    torch.testing.assert_close(part, whole[:1])


@pytest.mark.parametrize(
    "group",
    [
        [0.3] * 24,
        [0.1 + 0.2, 0.3, 0.3],  # equal but for the rounding of a sum
        [0.75 - 0.5, 0.5 - 0.25, 1.0 - 0.75],
        [0.9 - 0.6, 0.5 - 0.2, 0.7 - 0.4],  # equal gains, different rounding
        [1e6, 1e6],
        [0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_equal_values_have_no_advantage_at_all(group, dtype, scale, eps):
    # In float32 the mean of [0.3] * 24 is not 0.3, and 1e-8 is below its rounding: the classical way to a false signal.
    rewards = torch.tensor([[group]], dtype=dtype)
    if dtype == torch.float32:
        rewards = rewards.mean(-1, keepdim=True).expand(1, 1, len(group))
    advantages, mask = normalize(rewards, scale, ddof=1, eps=eps)
    assert torch.equal(advantages, torch.zeros_like(advantages))
    assert not mask.any()


def test_float32_gains_that_are_equal_have_no_advantage():
    before = torch.tensor([0.1, 0.3, 0.55, 0.62], dtype=torch.float64)
    rewards = torch.stack([before, before + 0.1], dim=-1)[None, None]
    advantages, mask = normalize(gain(rewards).squeeze(-1), ddof=1, eps=1e-8)
    assert not mask.any() and not advantages.any()


def test_missing_members_are_not_counted():
    advantages, mask = normalize(torch.tensor([[[1.0, NAN, 3.0, NAN, 5.0]]]), eps=0.0)
    np.testing.assert_allclose(advantages[0, 0].numpy(), np.array([-2, 0, 0, 0, 2]) / math.sqrt(8 / 3), rtol=1e-12)
    assert mask[0, 0].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [NAN, 2.0, NAN]])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_fewer_than_two_values_has_nothing_to_compare(group, ddof, scale):
    other = [[1.0, 2.0, 3.0]]
    advantages, mask = normalize(torch.tensor([[group], other]), scale, ddof)
    assert not mask[0].any() and torch.equal(advantages[0], torch.zeros(1, 3, dtype=torch.float64))
    assert mask[1].all() and advantages.isfinite().all()


def test_steps_and_prompts_do_not_mix():
    values = torch.from_numpy(random_values(3, 2, 4))
    together, _ = normalize(values)
    for b in range(3):
        for s in range(2):
            alone, _ = normalize(values[b : b + 1, s : s + 1])
            torch.testing.assert_close(together[b : b + 1, s : s + 1], alone)


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale='std' is unknown: expected 'group', 'batch' or 'none'"):
        normalize(torch.zeros(1, 1, 2), "std")


# ---- Several rewards ----


def test_combine_rewards():
    rewards = torch.tensor([[[1.0, 10.0], [2.0, NAN], [NAN, NAN]], [[1.0, NAN], [2.0, NAN], [3.0, NAN]]])
    total = combine_rewards(rewards, torch.tensor([1.0, 0.5]))
    # The second function does not apply to the second prompt; within the first it lacks a score for a picture.
    np.testing.assert_allclose(total.numpy(), [[6.0, NAN, NAN], [1.0, 2.0, 3.0]])
    assert total.dtype == torch.float64


def test_a_weight_of_zero_takes_a_function_out():
    rewards = torch.tensor([[[1.0, NAN], [2.0, 5.0], [NAN, 7.0]]])
    total = combine_rewards(rewards, torch.tensor([2.0, 0.0]))
    np.testing.assert_allclose(total.numpy(), [[2.0, 4.0, NAN]])
    assert combine_rewards(rewards, torch.tensor([0.0, 0.0])).isnan().all()


def test_a_prompt_without_any_score():
    assert combine_rewards(torch.full((1, 3, 2), NAN), torch.ones(2)).isnan().all()


# ---- Credit ----


def test_gains_telescope():
    # A chain of four steps: R_4, R_3, ..., R_0 of three members.
    along = torch.from_numpy(random_values(2, 3, 5))  # (B, G, T + 1)
    leaves = torch.stack([along[..., :-1], along[..., 1:]], dim=-1).transpose(1, 2)  # (B, S, G, 2)
    gains = gain(leaves)
    assert gains.shape == (2, 4, 3, 1)
    torch.testing.assert_close(gains.sum(1).squeeze(-1), along[..., -1] - along[..., 0])
    torch.testing.assert_close(value_after(leaves).squeeze(-1), along[..., 1:].transpose(1, 2))
    torch.testing.assert_close(outcome(leaves), leaves)


def dense_case():
    """Rewards of 2 prompts, and the leaves (before, after) of 2 steps and 3 members: chains of 3 leaves each."""
    rewards = random_values(2, 9, 2)
    leaves = torch.tensor([[[3 * g + s, 3 * g + s + 1] for g in range(3)] for s in range(2)])
    return rewards, leaves


@pytest.mark.parametrize("credit, column", [(gain, None), (value_after, 1)])
def test_dense_credit_normalises_each_step_by_itself(credit, column):
    rewards, leaves = dense_case()
    advantages, mask = assign_credit(torch.from_numpy(rewards), torch.tensor([1.0, 0.5]), leaves, credit)
    total = rewards[..., 0] + 0.5 * rewards[..., 1]
    for b in range(2):
        for s in range(2):
            before, after = total[b, leaves[s, :, 0]], total[b, leaves[s, :, 1]]
            values = after if column else after - before
            expected = (values - values.mean()) / (values.std() + 1e-4)
            np.testing.assert_allclose(advantages[b, s].numpy(), expected, rtol=1e-12)
    assert mask.all()


def test_normalize_then_sum_weighs_the_advantages_of_each_reward():
    rewards, leaves = dense_case()
    advantages, _ = assign_credit(
        torch.from_numpy(rewards), torch.tensor([1.0, 0.5]), leaves, gain, "normalize_then_sum", ddof=1, eps=1e-8
    )
    for b in range(2):
        for s in range(2):
            expected = 0.0
            for r, weight in enumerate((1.0, 0.5)):
                values = rewards[b, leaves[s, :, 1], r] - rewards[b, leaves[s, :, 0], r]
                expected = expected + weight * (values - values.mean()) / (values.std(ddof=1) + 1e-8)
            np.testing.assert_allclose(advantages[b, s].numpy(), expected, rtol=1e-10)


def test_g2rpo_sums_over_granularities_and_rewards():
    # 2 prompts, 2 branch points, 4 siblings, 3 strides; 24 leaves, 2 rewards.
    rewards = random_values(2, 24, 2)
    leaves = torch.arange(24).reshape(2, 4, 3)
    advantages, mask = assign_credit(
        torch.from_numpy(rewards), torch.ones(2), leaves, outcome, "normalize_then_sum", ddof=1, eps=1e-8
    )
    expected = np.zeros((2, 2, 4))
    for b, s, j, r in np.ndindex(2, 2, 3, 2):
        values = rewards[b, leaves[s, :, j], r]
        expected[b, s] += (values - values.mean()) / (values.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-10)
    assert mask.all()


def test_one_constant_granularity_does_not_silence_the_others():
    leaves = torch.arange(6).reshape(1, 3, 2)
    rewards = torch.tensor([[[0.5], [1.0], [0.5], [2.0], [0.5], [3.0]]])
    advantages, mask = assign_credit(rewards, torch.ones(1), leaves, outcome, eps=0.0)
    np.testing.assert_allclose(advantages[0, 0].numpy(), np.array([-1, 0, 1]) / math.sqrt(2 / 3), rtol=1e-12)
    assert mask.all()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_transition_that_lacks_a_score_is_masked_and_not_counted(aggregation):
    rewards = torch.tensor([[[1.0], [NAN], [3.0], [5.0]]])
    leaves = torch.arange(4).reshape(1, 4, 1)
    advantages, mask = assign_credit(rewards, torch.ones(1), leaves, outcome, aggregation, eps=0.0)
    assert mask[0, 0].tolist() == [True, False, True, True]
    np.testing.assert_allclose(advantages[0, 0].numpy(), np.array([-2, 0, 0, 2]) / math.sqrt(8 / 3), rtol=1e-12)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_function_that_scores_nothing_in_a_group_does_not_apply_to_it(aggregation):
    rewards = random_values(2, 4, 2)
    rewards[1, :, 1] = NAN
    leaves = torch.arange(4).reshape(1, 4, 1)
    advantages, mask = assign_credit(torch.from_numpy(rewards), torch.ones(2), leaves, outcome, aggregation)
    assert mask.all()
    values = rewards[1, :, 0]
    np.testing.assert_allclose(advantages[1, 0].numpy(), (values - values.mean()) / (values.std() + 1e-4), rtol=1e-12)


def test_a_missing_value_masks_the_steps_that_need_it_alone():
    # Chain of three leaves per member; the middle one of member 1 is missing: both its gains are unknown.
    rewards, leaves = dense_case()
    rewards = rewards[:1, :, :1].copy()
    rewards[0, 0] = NAN  # before the first step of member 0
    advantages, mask = assign_credit(torch.from_numpy(rewards), torch.ones(1), leaves, gain)
    assert mask[0].tolist() == [[False, True, True], [True, True, True]]
    assert advantages[0, 0, 0] == 0
    # The value after a step does not need the one before.
    _, mask = assign_credit(torch.from_numpy(rewards), torch.ones(1), leaves, value_after)
    assert mask.all()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_functions_of_weight_zero_change_nothing(aggregation):
    rewards = random_values(2, 4, 2)
    leaves = torch.arange(4).reshape(1, 4, 1)
    alone, _ = assign_credit(torch.from_numpy(rewards[..., :1]), torch.ones(1), leaves, outcome, aggregation)
    rewards[0, 1, 1] = NAN
    both, mask = assign_credit(torch.from_numpy(rewards), torch.tensor([1.0, 0.0]), leaves, outcome, aggregation)
    torch.testing.assert_close(both, alone)
    assert mask.all()


def test_batch_scale_asks_for_the_values_of_all_processes():
    rewards = random_values(4, 6, 1)
    leaves = torch.arange(6).reshape(2, 3, 1)
    whole, _ = assign_credit(torch.from_numpy(rewards), torch.ones(1), leaves, outcome, scale="batch")
    elsewhere = torch.from_numpy(rewards[2:, :, 0])[:, leaves[..., 0]]
    part, _ = assign_credit(
        torch.from_numpy(rewards[:2]),
        torch.ones(1),
        leaves,
        outcome,
        gather=lambda values: torch.cat([values, elsewhere]),
        scale="batch",
    )
    torch.testing.assert_close(part, whole[:2])
