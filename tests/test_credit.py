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

from trl_flow.credit import (
    assign_credit,
    combine_rewards,
    compared_leaves,
    gain,
    normalize,
    outcome,
    reward_to_go,
    turning_points,
    value_after,
)
from trl_flow.rollout import chain_plan, dense_plan


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


def test_gdpo_normalises_the_sum_over_the_batch():
    """Each reward in its group, their weighted sum over the batch, step by step (arXiv:2601.05242), in numpy."""
    rewards = random_values(4, 6, 3)
    rewards[1, :, 2] = 0.5  # says nothing about this prompt
    rewards[2, 4, 0] = NAN
    weights = (1.0, 0.5, 2.0)
    leaves = torch.arange(6).reshape(2, 3, 1)
    gathered = []
    elsewhere = np.zeros((2, 2, 3))
    for b, s, r in np.ndindex(2, 2, 3):
        values = rewards[2 + b, leaves[s, :, 0].numpy(), r]
        elsewhere[b, s] += weights[r] * (values - np.nanmean(values)) / np.nanstd(values)
    elsewhere = torch.from_numpy(elsewhere)
    advantages, mask = assign_credit(
        torch.from_numpy(rewards[:2]),
        torch.tensor(weights),
        leaves,
        outcome,
        "gdpo",
        # The other process holds the other two prompts.
        gather=lambda values: gathered.append(values) or torch.cat([values, elsewhere]),
        eps=0.0,
    )
    expected = np.zeros((4, 2, 3))
    for b, s in np.ndindex(4, 2):
        for r, weight in enumerate(weights):
            values = rewards[b, leaves[s, :, 0].numpy(), r]
            if np.nanstd(values):
                expected[b, s] += weight * (values - np.nanmean(values)) / np.nanstd(values)
    expected = (expected - np.nanmean(expected, (0, 2), keepdims=True)) / np.nanstd(expected, (0, 2), keepdims=True)
    np.testing.assert_allclose(advantages.numpy(), expected[:2], rtol=1e-10)
    assert mask.all() and len(gathered) == 1


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_prompts_without_any_score_change_nothing_for_the_others(aggregation, scale):
    rewards = random_values(6, 4, 2)
    leaves = torch.arange(4).reshape(1, 4, 1)
    alone, _ = assign_credit(torch.from_numpy(rewards[:2]), torch.ones(2), leaves, outcome, aggregation, scale=scale)
    rewards[2:] = NAN
    beside, mask = assign_credit(torch.from_numpy(rewards), torch.ones(2), leaves, outcome, aggregation, scale=scale)
    torch.testing.assert_close(beside[:2], alone)
    assert not mask[2:].any() and not beside[2:].any()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
def test_a_group_without_a_difference_has_no_advantage(aggregation):
    rewards = random_values(2, 3, 2)
    rewards[1] = 0.25
    leaves = torch.arange(3).reshape(1, 3, 1)
    advantages, mask = assign_credit(torch.from_numpy(rewards), torch.ones(2), leaves, outcome, aggregation)
    assert mask[0].all() and not mask[1].any()
    assert (advantages[1] == 0).all()


# ---- Who is compared with whom ----


def leaves_of(plan):
    position = {leaf: i for i, leaf in enumerate(plan.leaves)}
    return torch.tensor([[[position[n] for n in edge.leaves] for edge in plan.transitions[s]] for s in plan.steps])


def test_leaves_are_compared_with_those_that_they_are_normalised_with():
    plan = chain_plan(4, 3, [0, 1, 2], False)
    assert len(set(compared_leaves(leaves_of(plan), 3))) == 1  # every step is credited with the same three pictures
    # DenseGRPO: the tails from before the first step, those from after it (and before the second one), and so on.
    plan = dense_plan(4, 3, [0, 1, 2])
    found = compared_leaves(leaves_of(plan), len(plan.leaves))
    sets = [{found[leaf] for leaf in leaves_of(plan)[s, :, k].tolist()} for s in range(3) for k in range(2)]
    assert all(len(numbers) == 1 for numbers in sets)
    assert len(set(found)) == 4 and sets[1] == sets[2] and sets[3] == sets[4]
    # Sets that share a leaf are one; a leaf that credits nothing is alone.
    assert compared_leaves(torch.tensor([[[0], [1]], [[1], [3]]]), 5) == [0, 0, 2, 0, 4]


# ---- Gains along a plan ----


def test_gains_of_a_plan_add_up_to_the_whole_change():
    """sum_t (R_{t-1} - R_t) = R_0 - R_T, with the leaves that a plan of DenseGRPO credits."""
    num_steps, generations = 5, 3
    plan = dense_plan(num_steps, generations, range(num_steps))
    position = {leaf: i for i, leaf in enumerate(plan.leaves)}
    leaves = torch.tensor([[[position[n] for n in edge.leaves] for edge in plan.transitions[s]] for s in plan.steps])
    rewards = random_values(2, len(plan.leaves))
    total = gain(torch.from_numpy(rewards)[:, leaves]).sum(1).squeeze(-1)
    for g in range(generations):
        noiseless, sampled = plan.transitions[0][g].leaves[0], plan.transitions[num_steps - 1][g].child
        # The first tail has no noise but the initial one, the last leaf has that of every step.
        assert sum(plan.nodes[n].draw is not None for n in plan.path(noiseless)) == 1
        assert sum(plan.nodes[n].draw is not None for n in plan.path(sampled)) == num_steps + 1
        expected = rewards[:, position[sampled]] - rewards[:, position[noiseless]]
        np.testing.assert_allclose(total[:, g].numpy(), expected, rtol=1e-12)


# ---- Turning points ----


def chains(*rewards):
    """R_0 to R_W of members, as the values (B = 1, S = W, G, 2) of the tails before and after each step."""
    along = torch.tensor(rewards, dtype=torch.float64)
    return torch.stack([along[:, :-1], along[:, 1:]], dim=-1).transpose(0, 1)[None]


def credited(*rewards, balance=False):
    return turning_points(chains(*rewards), balance)[0, ..., 0].T.tolist()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        # Down, then up: the second step turns the trend, and gets all that follows, R_3 - R_1.
        ([1.0, 0.0, 2.0, 3.0], [-1.0, 3.0, 1.0]),
        # The mirror image.
        ([3.0, 4.0, 2.0, 1.0], [1.0, -3.0, -1.0]),
        # It goes with the trend from the beginning: the first step needs no step before it, only that it goes on.
        ([0.0, 1.0, 2.0, 4.0], [4.0, 1.0, 2.0]),
        # The first step moves on in its direction against none: it counts though what follows is in part against it.
        ([0.0, 1.0, 0.5, 2.0], [2.0, -0.5, 1.5]),
        # Up and then past the end: R_2 > R_3, the rest does not go on in the direction of step 2.
        ([1.0, 0.0, 3.0, 2.0], [-1.0, 3.0, -1.0]),
        # The last step has nothing after it, so that it is none.
        ([0.0, -1.0, -2.0, 1.0], [-1.0, -1.0, 3.0]),
        # Two turning points of one chain, the second within the first.
        ([1.0, 0.0, 2.0, 1.5, 3.0, 4.0], [-1.0, 4.0, -0.5, 2.5, 1.0]),
        # The first step is against the rest: R_1 - R_0 < 0 < R_3 - R_1; then the turning point.
        ([0.0, -1.0, 1.0, 2.0], [-1.0, 3.0, 1.0]),
        # No change at all: no trend, and nothing to follow.
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
        # A change that comes to nothing (R_W = R_0) has no trend to turn.
        ([1.0, 0.0, 0.5, 1.0], [-1.0, 0.5, 0.5]),
        # A step that stands still is not against the trend: the step after it does not turn.
        ([0.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0]),
        # One step.
        ([1.0, 3.0], [2.0]),
    ],
)
def test_turning_points_by_hand(rewards, expected):
    assert credited(rewards) == [expected]


def test_turning_points_are_balanced_by_the_size_of_the_change():
    up_by_1, up_by_2, up_by_5 = [1.0, 0.0, 1.5, 2.0], [1.0, 0.0, 2.5, 3.0], [1.0, 0.0, 4.0, 6.0]
    down_by_3 = [4.0, 5.0, 2.0, 1.0]
    assert credited(up_by_1, down_by_3, up_by_5, up_by_2, balance=True) == [
        [-1.0, 1.5, 0.5],  # left out: its own gain
        [1.0, -4.0, -1.0],
        [-1.0, 6.0, 2.0],  # the largest that leads up, for the one that leads down
        [-1.0, 2.5, 0.5],
    ]
    assert credited(up_by_1, down_by_3, up_by_5, up_by_2) == [
        [-1.0, 2.0, 0.5],
        [1.0, -4.0, -1.0],
        [-1.0, 6.0, 2.0],
        [-1.0, 3.0, 0.5],
    ]
    # Without any that leads down, none that leads up counts.
    assert credited(up_by_5, up_by_2, balance=True) == [[-1.0, 4.0, 2.0], [-1.0, 2.5, 0.5]]
    # The other way about: one that leads up, of two that lead down the larger fall.
    down_by_1 = [4.0, 5.0, 3.5, 3.0]
    assert credited(down_by_1, up_by_1, down_by_3, balance=True) == [
        [1.0, -1.5, -0.5],
        [-1.0, 2.0, 0.5],
        [1.0, -4.0, -1.0],
    ]


def test_turning_points_are_balanced_across_prompts():
    up, down = chains([1.0, 0.0, 1.5, 2.0]), chains([4.0, 5.0, 2.0, 1.0])
    both = turning_points(torch.cat([up, down]))[..., 0]
    assert both[:, :, 0].tolist() == [[-1.0, 2.0, 0.5], [1.0, -4.0, -1.0]]
    assert turning_points(up)[0, :, 0, 0].tolist() == [-1.0, 1.5, 0.5]


def test_among_equal_changes_the_first_counts():
    up, down = [1.0, 0.0, 1.5, 2.0], [4.0, 5.0, 2.0, 1.0]
    assert credited(up, up, down, balance=True) == [[-1.0, 2.0, 0.5], [-1.0, 1.5, 0.5], [1.0, -4.0, -1.0]]


def reference_turning_points(rewards, balance):
    """TP-GRPO in loops. `rewards`: R_0 to R_W of (B, G, W + 1)."""
    num_prompts, generations, ends = rewards.shape
    values = np.diff(rewards, axis=-1)
    points = []
    for b in range(num_prompts):
        for i in range(1, ends):
            for g in range(generations):
                r, d = rewards[b, g], values[b, g]
                change = r[-1] - r[0]
                signs = np.sign(d) * np.sign(change)
                onward = np.sign(d[i - 1]) == np.sign(r[-1] - r[i])
                if onward and (i == 1 or (signs[i - 2] < 0 and signs[i - 1] > 0)):
                    points.append((abs(change), np.sign(change), b, g, i))
    if balance:
        up, down = ([point for point in points if point[1] == sign] for sign in (1, -1))
        size = min(len(up), len(down))
        points = [point for side in (up, down) for point in sorted(side, key=lambda point: -point[0])[:size]]
    for _, _, b, g, i in points:
        values[b, g, i - 1] = rewards[b, g, -1] - rewards[b, g, i - 1]
    return values.transpose(0, 2, 1)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete", "missing", "one step"])
def test_turning_points_are_those_of_a_loop(kind, balance):
    random = np.random.default_rng(5)
    different = 0
    for _ in range(30):
        rewards = random.normal(size=(3, 4, 2 if kind == "one step" else 7))
        if kind == "discrete":  # many ties, between steps and between chains
            rewards = np.round(rewards)
        if kind == "missing":
            rewards[random.uniform(size=rewards.shape) < 0.1] = NAN
        values = np.stack([rewards[..., :-1], rewards[..., 1:]], axis=-1).transpose(0, 2, 1, 3)
        credit = turning_points(torch.from_numpy(values), balance)
        assert credit.shape == (*values.shape[:3], 1)
        expected = reference_turning_points(rewards, balance)
        np.testing.assert_allclose(credit[..., 0].numpy(), expected, rtol=1e-12, atol=1e-12)
        different += (np.nan_to_num(expected) != np.nan_to_num(values[..., 1] - values[..., 0])).sum()
    assert (different == 0) == (kind == "one step")


def test_a_chain_without_a_score_turns_nothing():
    # Without R_0 or R_W there is no trend; without one between, the steps at it have no reward.
    complete = [1.0, 0.0, 2.0, 3.0]
    for missing, expected in [
        (0, [NAN, 2.0, 1.0]),
        (3, [-1.0, 2.0, NAN]),
        (1, [NAN, NAN, 1.0]),
        (2, [-1.0, NAN, NAN]),
    ]:
        rewards = list(complete)
        rewards[missing] = NAN
        np.testing.assert_array_equal(credited(rewards, complete), [expected, [-1.0, 3.0, 1.0]])


def test_turning_points_are_normalised_in_their_group():
    # Two members of one prompt; step 2 of the first turns: its 3 against the other's -1.
    rewards = torch.tensor([[[1.0], [0.0], [2.0], [3.0], [1.0], [2.0], [1.0], [1.0]]], dtype=torch.float64)
    leaves = torch.tensor([[[4 * g + s, 4 * g + s + 1] for g in range(2)] for s in range(3)])
    advantages, mask = assign_credit(
        rewards, torch.ones(1), leaves, lambda values: turning_points(values, balance=False), scale="none"
    )
    np.testing.assert_allclose(advantages[0].numpy(), [[-1.0, 1.0], [2.0, -2.0], [0.5, -0.5]], rtol=1e-12)
    assert mask.all()


# ---- Latent similarity ----


def reference_reward_to_go(similarity, window):
    """CoCA in loops over steps, for one chain."""
    num_steps = len(similarity) - 1
    blocks = [list(range(start, min(start + window, num_steps))) for start in range(0, num_steps, window)]
    means = [np.mean([similarity[i + 1] for i in block]) for block in blocks]
    gains = [mean - before for before, mean in zip([similarity[0], *means], means, strict=False)]
    omega = np.zeros(num_steps)
    for block, rise in zip(blocks, gains, strict=True):
        for i in block:
            omega[i] = rise / (len(block) * sum(gains))
    return np.array([omega[i:].sum() for i in range(num_steps)])


@pytest.mark.parametrize("num_steps, window", [(10, 5), (10, 1), (10, 3), (7, 5), (4, 5), (5, 5), (1, 5), (9, 4)])
def test_reward_to_go(num_steps, window):
    random = np.random.default_rng(6)
    similarity = np.sort(random.uniform(-0.2, 1, size=(2, 3, num_steps + 1)), axis=-1)
    similarity[..., -1] = 1
    similarity[..., 1:-1] += 0.05 * random.normal(size=(2, 3, num_steps - 1))  # it may fall on the way
    shares = reward_to_go(torch.from_numpy(similarity).float(), window)
    assert shares.shape == (2, 3, num_steps) and shares.dtype == torch.float64
    for b, g in np.ndindex(2, 3):
        np.testing.assert_allclose(shares[b, g].numpy(), reference_reward_to_go(similarity[b, g], window), atol=1e-5)
    np.testing.assert_allclose(shares[..., 0].numpy(), 1.0, rtol=1e-12)


def test_reward_to_go_by_hand():
    # Blocks of two of five steps: means 0.3, 0.7, 1; rises 0.3, 0.4, 0.3 from 0, halved but for the last.
    shares = reward_to_go(torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64), 2)
    np.testing.assert_allclose(shares.numpy(), [1.0, 0.85, 0.7, 0.5, 0.3], rtol=1e-12)


@pytest.mark.parametrize(
    "similarity", [[1.0, 1.0, 1.0, 1.0, 1.0], [0.9, 0.7, 0.8, 0.6, 0.9], [0.5, 0.2, 0.3, 0.1, 0.4]]
)
def test_a_chain_that_comes_no_nearer_shares_alike(similarity):
    shares = reward_to_go(torch.tensor(similarity), 4)
    np.testing.assert_allclose(shares.numpy(), [1.0, 0.75, 0.5, 0.25], rtol=1e-12)


def test_a_degenerate_chain_does_not_touch_its_neighbours():
    random = np.random.default_rng(7)
    other = np.sort(random.uniform(size=5))
    shares = reward_to_go(torch.from_numpy(np.stack([np.ones(5), other])), 2)
    np.testing.assert_allclose(shares[0].numpy(), [1.0, 0.75, 0.5, 0.25], rtol=1e-12)
    np.testing.assert_allclose(shares[1].numpy(), reference_reward_to_go(other, 2), rtol=1e-12)
