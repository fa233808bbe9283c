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

import torch


# Values of one group that differ by less than this are taken for equal. Gains are differences of rewards: equal gains
# can differ by rounding, and the standard deviation of that rounding must not become an advantage of order one.
ZERO_STD = 1e-9


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


def transition_values(rewards: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """
    Rewards of the leaves that credit each transition.

    Args:
        rewards (`torch.Tensor` of shape `(B, L)`).
        leaves (`torch.Tensor` of shape `(S, G, K)`): Positions of the leaves.

    Returns:
        `torch.Tensor` of shape `(B, S, G, K)`.
    """
    return rewards[:, leaves]


def gain(values: torch.Tensor) -> torch.Tensor:
    """
    Dense reward of a step, R_{t-1} - R_t (DenseGRPO eq. 9 and 10).

    Args:
        values (`torch.Tensor` of shape `(..., 2)`): Rewards of the tails from before and after the step.
    """
    return values[..., 1] - values[..., 0]


def normalize(
    values: torch.Tensor, scale: str = "group", ddof: int = 0, eps: float = 1e-4, batch: torch.Tensor | None = None
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
    mask = valid & (count >= 2) & (std > ZERO_STD)
    if scale == "batch":
        batch = values if batch is None else batch.double()
        columns = batch.transpose(0, 1).flatten(1)  # (S, B' * G)
        known = ~columns.isnan()
        deviation = torch.where(known, columns - _mean(columns, known), 0.0)
        std = (deviation.square().sum(-1) / (known.sum(-1) - ddof).clamp(min=1)).sqrt()[None, :, None]
    elif scale == "none":
        std = torch.ones_like(std) - eps
    return torch.where(mask, centred / (std + eps), 0.0), mask


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
