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

import pytest

from trl_flow.rollout import Plan, branch_plan, chain_plan, dense_plan, stride_waypoints, tail_waypoints


def path(plan: Plan, node: int) -> list[tuple[int, bool]]:
    """Index and stochasticity of every node from the start to `node`."""
    steps = []
    while node is not None:
        steps.append((plan.nodes[node].index, plan.nodes[node].draw is not None))
        node = plan.nodes[node].parent
    return steps[::-1]


def noisy(plan: Plan, node: int) -> list[int]:
    """Indices that a stochastic step leads to on the way to `node`."""
    return [index for index, stochastic in path(plan, node)[1:] if stochastic]


# ---- Waypoints ----


@pytest.mark.parametrize(
    "index, tail_steps, expected",
    [
        (0, "full", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (7, "full", [8, 9, 10]),
        (9, "full", [10]),
        (0, 1, [10]),
        (6, 1, [10]),
        (0, 2, [5, 10]),  # timesteps 10 -> 5 -> 0
        (3, 2, [7, 10]),  # 7 -> floor(7/2) = 3 -> 0
        (3, 3, [6, 8, 10]),  # 7 -> floor(14/3) = 4 -> floor(7/3) = 2 -> 0
        (1, 4, [4, 6, 8, 10]),  # 9 -> floor(27/4) = 6 -> floor(18/4) = 4 -> floor(9/4) = 2 -> 0
        (7, 5, [8, 9, 10]),  # more steps than remain
        (9, 2, [10]),
    ],
)
def test_tail_waypoints(index, tail_steps, expected):
    assert tail_waypoints(index, 10, tail_steps) == expected


@pytest.mark.parametrize(
    "index, stride, expected",
    [
        (1, 1, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (1, 2, [2, 4, 6, 8, 10, 12, 14, 16]),
        (1, 3, [2, 5, 8, 11, 16]),  # the stride would pass 14 and miss 16
        (2, 2, [3, 5, 7, 9, 11, 13, 16]),
        (2, 3, [3, 6, 9, 12, 16]),
        (3, 3, [4, 7, 10, 13, 16]),
        (8, 3, [9, 12, 16]),
        (13, 3, [16]),
        (14, 3, [16]),
        (15, 1, [16]),
        (15, 2, [16]),
        (1, 40, [16]),
    ],
)
def test_stride_waypoints(index, stride, expected):
    assert stride_waypoints(index, 16, stride) == expected


# ---- The plan ----


def test_the_same_deterministic_step_is_one_node():
    plan = Plan(num_steps=4)
    start = plan.start()
    assert plan.deterministic(start) == plan.deterministic(start, 1)
    assert plan.deterministic(start, 2) != plan.deterministic(start, 1)
    assert plan.stochastic(start) != plan.stochastic(start)
    assert plan.tail(start, [1, 2, 3, 4]) == plan.tail(start, [1, 2, 3, 4])
    assert plan.tail(start, [1, 2, 3, 4]) != plan.tail(start, [1, 2, 4])
    assert plan.num_draws == 3  # the start and two children
    # Evaluated: the start and the nodes at 1, 2 and 3 of the fine tail, each once.
    assert plan.num_evaluations == 4
    assert plan.width == 1


def test_a_plan_refuses_what_is_no_step():
    with pytest.raises(ValueError, match="num_steps=0: a rollout needs at least one step"):
        Plan(0)
    plan = Plan(num_steps=2)
    start = plan.start()
    child = plan.stochastic(start)
    leaf = plan.deterministic(child)
    with pytest.raises(ValueError, match="has no next step"):
        plan.stochastic(leaf)
    with pytest.raises(ValueError, match="expected a later index, at most 2"):
        plan.deterministic(child, 1)
    with pytest.raises(ValueError, match="expected a later index, at most 2"):
        plan.deterministic(child, 3)
    with pytest.raises(ValueError, match="not joined by a stochastic step"):
        plan.add_transition(child, leaf, (leaf,))
    with pytest.raises(ValueError, match="not joined by a stochastic step"):
        plan.add_transition(leaf, child, (leaf,))


def test_chain_plan():
    plan = chain_plan(num_steps=5, num_generations=3, sde_steps=[0, 2])
    assert plan.steps == [0, 2]
    assert len(plan.leaves) == 3
    assert sum(node.parent is None for node in plan.nodes) == 3
    for step in plan.steps:
        edges = plan.transitions[step]
        assert [edge.leaves for edge in edges] == [(leaf,) for leaf in plan.leaves]
        for edge in edges:
            assert plan.nodes[edge.parent].index == step and plan.nodes[edge.child].index == step + 1
            assert noisy(plan, edge.leaves[0]) == [1, 3]
            assert [index for index, _ in path(plan, edge.leaves[0])] == [0, 1, 2, 3, 4, 5]


def test_chains_from_one_noise_share_what_comes_before_the_first_stochastic_step():
    plan = chain_plan(num_steps=5, num_generations=3, sde_steps=[2, 3], same_initial_noise=True)
    assert sum(node.parent is None for node in plan.nodes) == 1
    assert len({edge.parent for edge in plan.transitions[2]}) == 1
    assert len({edge.parent for edge in plan.transitions[3]}) == 3
    assert plan.num_evaluations == 3 + 3 * 2


@pytest.mark.parametrize("tail_steps", ["full", 1, 2])
def test_dense_plan_credits_the_tails_of_both_ends(tail_steps):
    num_steps, generations, trained = 5, 2, [0, 1, 3]
    plan = dense_plan(num_steps, generations, trained, tail_steps)
    assert plan.steps == trained
    for step in trained:
        assert len(plan.transitions[step]) == generations
        for edge in plan.transitions[step]:
            before, after = edge.leaves
            noise_before = [index + 1 for index in trained if index < step]
            assert noisy(plan, before) == noise_before
            assert noisy(plan, after) == [*noise_before, step + 1]
            # The tail of x_t leaves the chain at t, in so many Euler steps.
            for leaf, index in ((before, step), (after, step + 1)):
                remaining = num_steps - index
                wanted = remaining if tail_steps == "full" else min(tail_steps, remaining)
                assert len(path(plan, leaf)) == 1 + index + wanted
    # The tail after a step is, where the next step is trained, the tail before that.
    for before, after in zip(plan.transitions[0], plan.transitions[1], strict=True):
        assert before.child == after.parent and before.leaves[1] == after.leaves[0]


def test_dense_plan_ends_in_the_chains_own_end_after_the_last_stochastic_step():
    with_ode_end = dense_plan(10, 24, range(9))
    without = dense_plan(10, 24, range(10))
    assert len(with_ode_end.leaves) == 24 * 10
    assert len(without.leaves) == 24 * 11
    assert with_ode_end.num_evaluations == without.num_evaluations == 24 * 55


def test_branch_plan():
    num_steps, generations, trained, strides = 8, 3, [0, 2, 3], (1, 2, 3)
    plan = branch_plan(num_steps, generations, trained, strides)
    assert plan.steps == trained
    assert sum(node.parent is None for node in plan.nodes) == 1
    for step in trained:
        edges = plan.transitions[step]
        assert len(edges) == generations
        assert len({edge.parent for edge in edges}) == 1  # the trunk
        assert noisy(plan, edges[0].parent) == []
        assert [index for index, _ in path(plan, edges[0].parent)] == list(range(step + 1))
        assert len({edge.child for edge in edges}) == generations
        for edge in edges:
            for leaf, stride in zip(edge.leaves, strides, strict=True):
                assert noisy(plan, leaf) == [step + 1]
                tail = [index for index, _ in path(plan, leaf)][step + 2 :]
                assert tail == stride_waypoints(step + 1, num_steps, stride)
    assert max(plan.nodes[edge.parent].index for edge in plan.transitions[3]) == 3  # the trunk ends at the last branch


@pytest.mark.parametrize(
    "plan, evaluations",
    [
        (chain_plan(10, 24, range(9)), 240),
        (dense_plan(10, 24, range(9)), 1320),
        (dense_plan(10, 24, range(9), 1), 240),
        (dense_plan(10, 24, range(9), 2), 456),
        (branch_plan(16, 12, range(8), (1,)), 1112),
        (branch_plan(16, 12, range(8), (1, 2)), 1496),
        (branch_plan(16, 12, range(8), (1, 2, 3)), 1700),
    ],
)
def test_a_plan_knows_its_cost(plan, evaluations):
    assert plan.num_evaluations == evaluations
