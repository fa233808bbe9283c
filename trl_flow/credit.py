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

"""Rewards of leaves -> one advantage per trained transition. Pure, in float64.

Shapes: B prompts, L leaves of a plan, R reward functions, S trained steps, G group members, K leaves that credit one
transition. A reward of NaN means "no score": it is masked out, never replaced by a number.
"""

from collections.abc import Callable

import torch


# A group whose standard deviation is below this share of its largest reward is taken for equal. Rewards are often float32
# numbers, and gains are differences of rewards: the standard deviation of their rounding must not become an advantage of
# order one.
ZERO_STD = 1e-6

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum", "gdpo")


def combine_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weighted sum over the reward functions.

    A function that scores nothing in a prompt's whole group does not apply to that prompt and adds nothing. Within a
    group that it does score, a leaf without a score has no sum (NaN). A weight of 0 takes the function out.

    Args:
        rewards (`torch.Tensor` of shape `(B, L, R)`): NaN where there is no score.
        weights (`torch.Tensor` of shape `(R,)`).

    Returns:
        `torch.Tensor` of shape `(B, L)`, float64; NaN where there is no score.
    """
    rewards = rewards.double()
    applies = ~rewards.isnan().all(dim=1, keepdim=True) & (weights != 0)
    total = torch.where(applies, rewards * weights.double(), 0.0).sum(-1)
    return torch.where(applies.any(-1), total, torch.nan)


def outcome(values: torch.Tensor) -> torch.Tensor:
    """
    The reward of the one leaf that credits a transition (Flow-GRPO), or of each granularity's (G2RPO eq. 11).

    Args:
        values (`torch.Tensor` of shape `(B, S, G, K)`): Rewards of the leaves.
    """
    return values


def gain(values: torch.Tensor) -> torch.Tensor:
    """
    Dense reward of a step, R_{t-1} - R_t (DenseGRPO eq. 9 and 10).

    Args:
        values (`torch.Tensor` of shape `(B, S, G, 2)`): Rewards of the tails from before and after the step.
    """
    return values[..., 1:] - values[..., :1]


def value_after(values: torch.Tensor) -> torch.Tensor:
    """
    Latent reward after a step, R_{t-1}: "Dense Reward (Baseline)" of DenseGRPO section 5.3.

    Args:
        values (`torch.Tensor` of shape `(B, S, G, 2)`): Rewards of the tails from before and after the step.
    """
    return values[..., 1:]


def turning_points(values: torch.Tensor, balance: bool = True) -> torch.Tensor:
    """
    Rewards of the steps of a window with turning points (TP-GRPO, after its published code).

    With R_i the reward of the tail after i stochastic steps (R_0: none), d_i = R_i - R_{i-1} and the window's whole
    change D = R_W - R_0, a step goes with the trend where d_i D > 0. It is a turning point if it does, the step before
    it did not, and the rest of the window moves on in its direction: d_i (R_W - R_i) > 0; the first step has no step
    before it, and only the last of these conditions. A turning point is rewarded with all that follows from it,
    R_W - R_{i-1}, any other step with d_i.

    Args:
        values (`torch.Tensor` of shape `(B, S, G, 2)`): Rewards of the tails from before and after each of S consecutive
            steps.
        balance (`bool`, *optional*, defaults to `True`): Keeps as many turning points that lead up (D > 0) as lead down
            among all those given, those of the largest |D| first; the others are rewarded with their own d_i.

    Returns:
        `torch.Tensor` of shape `(B, S, G, 1)`.
    """
    before, after = values.unbind(-1)
    final = after[:, -1:]
    gains, change = after - before, final - before[:, :1]
    onward = gains.sign() * (final - after).sign() > 0
    trend = gains.sign() * change.sign()
    turning = onward & (trend > 0)
    turning[:, 1:] &= trend[:, :-1] < 0
    turning[:, 0] = onward[:, 0]
    if balance:
        change = change.expand_as(gains)
        up, down = turning & (change > 0), turning & (change < 0)
        size = min(up.sum().item(), down.sum().item())
        turning = _largest(change, up, size) | _largest(-change, down, size)
    return torch.where(turning, final - before, gains)[..., None]


def _largest(values: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` largest of the masked values, as a mask. Among equals the first."""
    order = torch.where(mask, values, -torch.inf).flatten().argsort(descending=True, stable=True)[:size]
    return torch.zeros_like(mask).flatten().index_fill(0, order, True).view_as(mask)


def reward_to_go(similarity: torch.Tensor, window: int) -> torch.Tensor:
    """
    Share of the outcome that lies in a step and those after it, by latent similarity (CoCA, after its published code).

    With y_i the clean estimate at index i and y_T the clean latent, c_i = cos(y_i, y_T). Step i takes the estimate from
    y_i to y_{i+1}. Over blocks of `window` steps the mean of c_{i+1} rises by some amount from the block before (from
    c_0 for the first); each step of the block gets an equal part of that rise, as a share of the whole rise. The sum of
    the shares from step i on is its reward-to-go: 1 at step 0.

    A chain whose estimates do not come nearer to its end has no shares: every step counts alike.

    Args:
        similarity (`torch.Tensor` of shape `(..., T + 1)`): c_0 to c_T.
        window (`int`): Steps of a block, w. The last block holds what is left.

    Returns:
        `torch.Tensor` of shape `(..., T)`, float64.
    """
    similarity = similarity.double()
    blocks = similarity[..., 1:].split(window, dim=-1)
    means = torch.stack([similarity[..., 0], *(block.mean(-1) for block in blocks)], dim=-1)
    total = means[..., -1:] - means[..., :1]
    shares = torch.cat(
        [
            (rise[..., None] / block.shape[-1]).expand_as(block)
            for rise, block in zip(means.diff(dim=-1).unbind(-1), blocks, strict=True)
        ],
        dim=-1,
    )
    alike = torch.full_like(shares, 1 / shares.shape[-1])
    shares = torch.where(total > ZERO_STD, shares / total.clamp(min=ZERO_STD), alike)
    return shares.flip(-1).cumsum(-1).flip(-1)


def assign_credit(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    leaves: torch.Tensor,
    credit: Callable[[torch.Tensor], torch.Tensor],
    aggregation: str = "sum_then_normalize",
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **normalization,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of the transitions of a batch of prompt groups.

    Each column that `credit` returns is normalised by itself and the advantages are summed: one column for an outcome
    or a gain, one per granularity for G2RPO (eq. 11). With `"normalize_then_sum"` the same holds for each reward
    function, times its weight (DanceGRPO; G2RPO section 3.3). `"gdpo"` (GDPO, arXiv:2601.05242) then brings the sum to
    mean 0 and standard deviation 1 over the batch, step by step, so that its size does not grow with the number of
    reward functions.

    Args:
        rewards (`torch.Tensor` of shape `(B, L, R)`): NaN where there is no score.
        weights (`torch.Tensor` of shape `(R,)`).
        leaves (`torch.Tensor` of shape `(S, G, K)`): Positions of the leaves that credit each transition.
        credit (`Callable`): Rewards of the leaves `(B, S, G, K)` -> values `(B, S, G, C)`.
        aggregation (`str`): One of `AGGREGATIONS`.
        gather (`Callable`, *optional*): Joins the values `(B, S, G)` of all processes, for what is taken over the batch.
        normalization: Passed to [`normalize`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages `(B, S, G)`, float64, and the mask of the transitions that
        have one. A transition that lacks one of its values is masked; so is one whose groups are all equal.
    """
    if aggregation == "sum_then_normalize":
        scores, factors = [combine_rewards(rewards, weights)], [1.0]
    else:
        alone = torch.eye(len(weights), dtype=weights.dtype)
        used = [r for r, weight in enumerate(weights.tolist()) if weight != 0]
        scores, factors = [combine_rewards(rewards, alone[r]) for r in used], [weights[r].item() for r in used]
    advantages, known, informative, applies = 0.0, True, False, False
    by_batch = gather is not None and normalization.get("scale") == "batch"
    for score, factor in zip(scores, factors, strict=True):
        magnitude = score.nan_to_num().abs().amax(1)
        for value in credit(score[:, leaves]).unbind(-1):
            batch = gather(value) if by_batch else None
            advantage, mask = normalize(value, batch=batch, magnitude=magnitude, **normalization)
            # A function that does not apply to a prompt takes nothing away from it.
            silent = score.isnan().all(1)[:, None, None]
            known, applies = known & (~value.isnan() | silent), applies | ~silent
            informative = informative | mask
            advantages = advantages + factor * advantage
    mask = known & informative
    if aggregation == "gdpo":
        # A prompt without any score says nothing about the batch.
        batch = torch.where(known & applies, advantages, torch.nan)
        batch = gather(batch) if gather is not None else batch
        columns = batch.transpose(0, 1).flatten(1)  # (S, B' * G)
        mean, std = _moments(columns, normalization.get("ddof", 0))
        advantages = (advantages - mean) / (std + normalization.get("eps", 1e-4))  # (S, 1): for each step
    return torch.where(mask, advantages, 0.0), mask


def compared_leaves(leaves: torch.Tensor, num_leaves: int) -> list[int]:
    """
    The number of the set in which each leaf of a plan is compared: the G members of a group that are normalised
    together, joined where they share a leaf.

    Args:
        leaves (`torch.Tensor` of shape `(S, G, K)`): Positions of the leaves that credit each transition.
        num_leaves (`int`): How many there are, L.

    Returns:
        `list[int]`: One for each of L leaves.
    """
    number = list(range(num_leaves))
    for members in leaves.transpose(1, 2).flatten(0, 1).tolist():
        joined = {number[leaf] for leaf in members}
        number = [min(joined) if n in joined else n for n in number]
    return number


def _moments(values: torch.Tensor, ddof: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over the last dimension, which is kept, of what is not NaN."""
    valid = ~values.isnan()
    mean = _mean(values, valid)
    squares = torch.where(valid, values - mean, 0.0).square().sum(-1, keepdim=True)
    return mean, (squares / (valid.sum(-1, keepdim=True) - ddof).clamp(min=1)).sqrt()


def normalize(
    values: torch.Tensor,
    scale: str = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    batch: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Group-relative advantages: (value - group mean) / (std + eps), step by step (Flow-GRPO eq. 4; DenseGRPO eq. 10).

    Args:
        values (`torch.Tensor` of shape `(B, S, G)`): NaN where a member has no value.
        scale (`str`): Whose standard deviation divides: `"group"`, `"batch"` (that of all values of the step; the
            published Flow-GRPO configurations for SD3.5-M) or `"none"`.
        ddof (`int`): 0 for the population standard deviation (Flow-GRPO), 1 for the sample's (DanceGRPO, G2RPO).
        eps (`float`): Added to the standard deviation.
        batch (`torch.Tensor` of shape `(B', S, G)`, *optional*): Values of the whole batch when `values` is a part.
        magnitude (`torch.Tensor` of shape `(B,)`, *optional*): Size of the rewards that the values come from, whose
            rounding is not to be taken for a difference. Defaults to that of the values.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages `(B, S, G)` in float64, and a boolean mask of the same shape:
        False for members without a value and for groups that have nothing to compare (fewer than two values, or all
        equal); their advantage is exactly 0.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r} is unknown: expected 'group', 'batch' or 'none'.")
    values = values.double()
    valid = ~values.isnan()
    count = valid.sum(-1, keepdim=True)
    centred = torch.where(valid, values - _mean(values, valid), 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    if magnitude is None:
        magnitude = values.nan_to_num().abs().amax((1, 2))
    mask = valid & (count >= 2) & (std > ZERO_STD * magnitude[:, None, None])
    if scale == "batch":
        batch = values if batch is None else batch.double()
        std = _moments(batch.transpose(0, 1).flatten(1), ddof)[1]  # over B' * G; (S, 1)
    elif scale == "none":
        std = torch.ones_like(std) - eps
    return torch.where(mask, centred / (std + eps), 0.0), mask


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
