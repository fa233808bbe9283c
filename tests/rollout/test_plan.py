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

from trl_flow.rollout import (
    Plan,
    branch_plan,
    chain_plan,
    dense_plan,
    forward_plan,
    stride_waypoints,
    tail_waypoints,
)


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


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_dense_plan_does_not_sample_what_nothing_credits(solver):
    # Tails of one step leave at 0, 1, 2 and 3; what a chain would go on to from 3 has no reward to give.
    plan = dense_plan(8, 2, [0, 2], 1, solver=solver)
    assert plan.num_evaluations == 2 * 4
    credited = {leaf for edges in plan.transitions.values() for edge in edges for leaf in edge.leaves}
    assert set(plan.leaves) == credited and len(credited) == 2 * 4
    # Of two steps: at 4, 4, 5 and 5 on the way from 0, 1, 2 and 3.
    assert dense_plan(8, 2, [0, 2], 2, solver=solver).num_evaluations == 2 * (4 + 4)
    # Euler's full tails: eight steps from 0, seven from 1 (through 2, the chain's own step there), five from 3.
    assert dense_plan(8, 2, [0, 2]).num_evaluations == 2 * (8 + 7 + 5)


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


def test_path():
    plan = Plan(num_steps=4)
    start = plan.start()
    child = plan.stochastic(start)
    leaf = plan.tail(child, [3, 4])
    middle = plan.nodes[leaf].parent
    assert plan.path(leaf) == [start, child, middle, leaf]
    assert plan.path(start) == [start]
    for plan in (chain_plan(5, 2, [1, 2], True), branch_plan(5, 2, [0, 3], (1, 2)), dense_plan(5, 2, [0, 2], 2)):
        for leaf in plan.leaves:
            nodes = plan.path(leaf)
            assert plan.nodes[nodes[0]].parent is None and nodes[-1] == leaf
            assert [plan.nodes[node].parent for node in nodes[1:]] == nodes[:-1]


def test_width_is_the_rows_of_the_widest_index():
    # At index 3 of 5: one chain and the tails that left it at 0, 1 and 2, of two members.
    assert dense_plan(5, 2, range(5)).width == 2 * 5
    assert chain_plan(5, 3, [2], same_initial_noise=True).width == 3
    assert branch_plan(6, 4, [0], (1,)).width == 4


# ---- Second-order tails ----


def befores(plan: Plan, node: int) -> list[int | None]:
    """For every step on the way to `node`, how many steps before its parent the velocity that it uses too sits."""
    nodes = plan.path(node)
    return [
        None if plan.nodes[child].before is None else nodes.index(parent) - nodes.index(plan.nodes[child].before)
        for parent, child in zip(nodes, nodes[1:], strict=False)
    ]


def test_second_order_tail_begins_with_an_euler_step():
    plan = Plan(num_steps=8)
    child = plan.stochastic(plan.start())
    leaf = plan.tail(child, [2, 3, 5, 8], "dpm")
    assert [index for index, _ in path(plan, leaf)] == [0, 1, 2, 3, 5, 8]
    # The history begins at the child: nothing reaches back over the stochastic step.
    assert befores(plan, leaf) == [None, None, 1, 1, 1]
    assert plan.tail(child, [2, 3, 5, 8], "dpm") == leaf
    euler = plan.tail(child, [2, 3, 5, 8])
    assert befores(plan, euler) == [None] * 5
    # The two part after the Euler step that they have in common.
    shared = set(plan.path(leaf)) & set(plan.path(euler))
    assert sorted(plan.nodes[node].index for node in shared) == [0, 1, 2]
    assert plan.tail(child, [8], "dpm") == plan.tail(child, [8])


def test_a_second_order_step_needs_a_node_before():
    plan = Plan(num_steps=4)
    start = plan.start()
    child = plan.stochastic(start)
    for before in (child, plan.deterministic(child)):
        with pytest.raises(ValueError, match=f"Node {before} does not come before node {child}"):
            plan.deterministic(child, 3, before)
    step = plan.deterministic(child, 3, start)
    assert plan.deterministic(child, 3, start) == step != plan.deterministic(child, 3)


@pytest.mark.parametrize(
    "num_steps, sde_steps, expected",
    [
        (7, [0, 1], [None, None, None, 1, 1, 1, 1]),
        (7, [2], [None, None, None, None, 1, 1, 1]),
        (7, [0, 3], [None, None, None, None, None, 1, 1]),  # between stochastic steps Euler's
        (7, [4, 5], [None] * 7),
        (7, [6], [None] * 7),
    ],
)
def test_chains_end_in_second_order_steps(num_steps, sde_steps, expected):
    plan = chain_plan(num_steps, 3, sde_steps, solver="dpm")
    assert plan.steps == sde_steps
    for leaf in plan.leaves:
        assert befores(plan, leaf) == expected
        assert noisy(plan, leaf) == [step + 1 for step in sde_steps]
    assert plan.num_evaluations == 3 * num_steps
    assert all(node.before is None for node in chain_plan(num_steps, 3, sde_steps).nodes)


@pytest.mark.parametrize("tail_steps", ["full", 1, 2, 3])
def test_dense_plan_with_second_order_tails(tail_steps):
    num_steps, trained = 6, [0, 1, 3]
    plan = dense_plan(num_steps, 2, trained, tail_steps, solver="dpm")
    euler = dense_plan(num_steps, 2, trained, tail_steps)
    for step in trained:
        for edge, of_euler in zip(plan.transitions[step], euler.transitions[step], strict=True):
            for leaf, index in zip(edge.leaves, (step, step + 1), strict=True):
                waypoints = tail_waypoints(index, num_steps, tail_steps)
                assert [i for i, _ in path(plan, leaf)] == [*range(index + 1), *waypoints]
                # The chain and the first step of the tail are Euler's or stochastic.
                assert befores(plan, leaf) == [None] * (index + 1) + [1] * (len(waypoints) - 1)
            for leaf, other in zip(edge.leaves, of_euler.leaves, strict=True):
                assert noisy(plan, leaf) == noisy(euler, other)


# ---- The forward process ----


def test_forward_plan():
    plan = forward_plan(num_steps=5, num_generations=3, steps=[3, 1])
    assert plan.steps == [1, 3]
    assert len(plan.leaves) == 3 and plan.num_draws == 3
    assert len({plan.path(leaf)[0] for leaf in plan.leaves}) == 3
    for leaf in plan.leaves:
        assert path(plan, leaf) == [(0, True), *((index, False) for index in range(1, 6))]
    for step in plan.steps:
        edges = plan.transitions[step]
        assert [(edge.parent, edge.child, edge.leaves) for edge in edges] == [(n, n, (n,)) for n in plan.leaves]


def test_only_a_clean_latent_is_a_sample():
    plan = Plan(num_steps=3)
    start = plan.start()
    leaf = plan.tail(start, [1, 2, 3])
    with pytest.raises(ValueError, match=f"Node {start} at index 0 and step 1: expected a leaf"):
        plan.add_sample(1, start)
    for step in (-1, 3):
        with pytest.raises(ValueError, match=f"and step {step}: expected a leaf .index 3. and a step from 0 to 2"):
            plan.add_sample(step, leaf)
    assert plan.transitions == {}
    plan.add_sample(0, leaf)
    plan.add_sample(2, leaf)
    assert plan.steps == [0, 2]


# ---- The cost, in closed form ----


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


@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("num_steps, size", [(10, 3), (25, 4), (6, 1)])
def test_cost_of_a_window(solver, num_steps, size):
    """Flow-GRPO-Fast and MixGRPO: up to the first stochastic step, its velocity included, once where noise is shared."""
    generations = 12
    for first in range(num_steps - size + 1):
        steps = range(first, first + size)
        own = chain_plan(num_steps, generations, steps, solver=solver)
        shared = chain_plan(num_steps, generations, steps, same_initial_noise=True, solver=solver)
        assert own.num_evaluations == generations * num_steps
        assert shared.num_evaluations == first + 1 + generations * (num_steps - first - 1)
        assert len(own.leaves) == len(shared.leaves) == generations


@pytest.mark.parametrize("first, points, published", [(0, 8, 11), (4, 7, 14), (11, 4, 18)])
def test_cost_of_mix_grpo_flash(first, points, published):
    """T = 25 and a window of 4: int((25 - last) * 0.4) points after it are one step less."""
    last, generations = first + 3, 12
    assert points == int((25 - last) * 0.4)
    num_steps = last + points  # last + 1 up to the end of the window, and points - 1
    assert num_steps == published
    plan = chain_plan(num_steps, generations, range(first, last + 1), solver="dpm")
    assert plan.num_evaluations == generations * published
    plan = chain_plan(num_steps, generations, range(first, last + 1), same_initial_noise=True, solver="dpm")
    assert plan.num_evaluations == first + 1 + generations * (published - first - 1)


@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("num_steps", [4, 7, 10])
def test_cost_of_dense_credit(solver, num_steps):
    """DenseGRPO: G times the sum of min(n, t). TP-GRPO: its full tails, G T (T + 1) / 2."""
    generations = 3
    for n in [*range(1, num_steps + 2), "full"]:
        expected = sum(min(num_steps if n == "full" else n, t) for t in range(1, num_steps + 1))
        for trained in (range(num_steps - 1), range(num_steps)):
            plan = dense_plan(num_steps, generations, trained, n, solver=solver)
            assert plan.num_evaluations == generations * expected, (n, trained)
    assert expected == num_steps * (num_steps + 1) // 2


@pytest.mark.parametrize("num_steps, branches", [(10, 6), (6, 4), (3, 2)])
def test_cost_of_temp_flow(num_steps, branches):
    """Per seed (T - 1) + K T (T - 1) / 2: a trunk, and the tails from every step but the last."""
    plan = branch_plan(num_steps, branches, range(num_steps - 1))
    assert plan.num_evaluations == num_steps - 1 + branches * num_steps * (num_steps - 1) // 2
    assert len(plan.leaves) == branches * (num_steps - 1)
    if num_steps == 10:
        assert 4 * plan.num_evaluations == 1116


@pytest.mark.parametrize("strides", [(1,), (1, 2), (1, 2, 3), (2, 3)])
@pytest.mark.parametrize("num_steps, branched", [(16, range(8)), (12, [0, 2, 3]), (20, [5, 11])])
def test_cost_of_g2rpo(strides, num_steps, branched):
    """(T - min(M) + 1) + G sum_k [sum_j ceil((k - 1) / l_j) - 2 (J - 1)], with the paper's timesteps k = T - step."""
    generations = 5
    timesteps = [num_steps - step for step in branched]
    tails = sum(sum(-(-(k - 1) // stride) for stride in strides) - 2 * (len(strides) - 1) for k in timesteps)
    plan = branch_plan(num_steps, generations, branched, strides)
    assert plan.num_evaluations == num_steps - min(timesteps) + 1 + generations * tails
    assert len(plan.leaves) == generations * len(branched) * len(strides)


def test_cost_of_the_forward_process():
    assert forward_plan(10, 24, range(10)).num_evaluations == 240
    assert forward_plan(10, 24, [3]).num_evaluations == 240
