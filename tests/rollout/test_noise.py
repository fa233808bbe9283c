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

import pytest
import torch

from trl_flow.rollout import seeded_subsets


def test_subsets_have_their_size():
    for size in (0, 1, 3, 7):
        subsets = seeded_subsets("key", num_subsets=20, num_items=7, size=size)
        assert subsets.shape == (20, 7) and subsets.dtype == torch.bool
        assert (subsets.sum(1) == size).all()


def test_subsets_are_a_function_of_their_key():
    def make(*key):
        return seeded_subsets(*key, num_subsets=30, num_items=9, size=4)

    before = torch.get_rng_state()
    first = make(42, "steps", "a red circle")
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    assert torch.equal(first, make(42, "steps", "a red circle"))
    for other in (
        make(43, "steps", "a red circle"),
        make(42, "steps", "a red square"),
        make(42, "other", "a red circle"),
    ):
        assert (first != other).any(1).sum() > 20  # of 126 subsets
    assert len({tuple(row) for row in first.tolist()}) > 15  # rows are drawn by themselves


@pytest.mark.parametrize("num_items, size", [(5, 1), (5, 2), (8, 5)])
def test_each_item_has_the_same_chance(num_items, size):
    rows = 5000
    subsets = seeded_subsets("chance", num_subsets=rows, num_items=num_items, size=size).double()
    chance = size / num_items
    assert (subsets.mean(0) - chance).abs().max() < 5 * math.sqrt(chance * (1 - chance) / rows)
    # And each pair of items, which a rotation or a block would not give.
    pairs = (subsets.T @ subsets / rows)[~torch.eye(num_items, dtype=torch.bool)]
    chance = size * (size - 1) / (num_items * (num_items - 1))
    assert (pairs - chance).abs().max() <= 5 * math.sqrt(chance * (1 - chance) / rows)
