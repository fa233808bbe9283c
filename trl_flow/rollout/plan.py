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

"""The tree of latents that one prompt group samples, as symbols: no tensor, no model.

Nodes sit on the indices 0..T of a descending sigma grid. A node is reached from its parent by a deterministic (ODE)
step, which may skip indices, or by a stochastic (SDE) step to the next index with a noise draw of its own. Leaves sit at
index T: clean latents, decoded and scored. The executor evaluates the velocity of each node that has children once,
so what two paths share is shared here, by construction: asking twice for the same deterministic step gives the same node.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """
    A latent on the grid.

    Attributes:
        index (`int`): Where it sits.
        parent (`int`, *optional*): The node that it is reached from; None for pure noise.
        draw (`int`, *optional*): Its noise; None for an ODE step.
        before (`int`, *optional*): The node before its parent whose velocity a second-order ODE step uses too; None for
            an Euler step.
    """

    index: int
    parent: int | None
    draw: int | None
    before: int | None = None


@dataclass(frozen=True)
class Transition:
    """
    What is trained at one step, and the leaves whose rewards its credit is computed from: a stochastic edge, or (parent
    and child the same) a clean latent that training noises afresh.
    """

    parent: int
    child: int
    leaves: tuple[int, ...]


class Plan:
    """
    A rollout tree for one prompt group.

    Args:
        num_steps (`int`): T, the number of steps of the sigma grid.

    Attributes:
        nodes (`list[Node]`): In order of creation: parents come before children.
        leaves (`list[int]`): Nodes at index T.
        transitions (`dict[int, list[Transition]]`): Trained edges by step index, one per group member, in member order.
        observed (`list[list[int]]`): Nodes whose clean estimates credit looks at, one list of equal length per group
            member; empty for most methods. Leaves are their own estimates.

    Example:

    ```python
    >>> plan = Plan(num_steps=2)
    >>> start = plan.start()
    >>> child = plan.stochastic(start)
    >>> leaf = plan.deterministic(child)
    >>> plan.add_transition(start, child, leaves=(leaf,))
    >>> plan.num_evaluations
    2
    ```
    """

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a rollout needs at least one step.")
        self.num_steps = num_steps
        self.nodes: list[Node] = []
        self.num_draws = 0
        self.transitions: dict[int, list[Transition]] = {}
        self.observed: list[list[int]] = []
        self._deterministic: dict[tuple[int, int, int | None], int] = {}

    def start(self) -> int:
        """A new node of pure noise at index 0."""
        return self._add(0, parent=None, stochastic=True)

    def stochastic(self, parent: int) -> int:
        """A new child of `parent` at the next index, with a noise draw of its own."""
        return self._add(self._after(parent), parent, stochastic=True)

    def deterministic(self, parent: int, index: int | None = None, before: int | None = None) -> int:
        """
        The child of `parent` by one ODE step to `index` (default: the next); the same node each time.

        The step is Euler's, or with a node `before` the parent, one of second order that uses its velocity too.
        """
        index = self._after(parent) if index is None else index
        if not self.nodes[parent].index < index <= self.num_steps:
            raise ValueError(
                f"A step from index {self.nodes[parent].index} to {index}: expected a later index, at most "
                f"{self.num_steps}."
            )
        if before is not None and not self.nodes[before].index < self.nodes[parent].index:
            raise ValueError(
                f"Node {before} does not come before node {parent}: a second-order step needs one that does."
            )
        key = (parent, index, before)
        if key not in self._deterministic:
            self._deterministic[key] = self._add(index, parent, stochastic=False, before=before)
        return self._deterministic[key]

    def tail(self, node: int, waypoints, solver: str = "euler") -> int:
        """
        The leaf that ODE steps through `waypoints` (ascending indices, the last one T) lead to from `node`.

        `solver` is `"euler"` or `"dpm"`: second-order steps after a first Euler step, for as many evaluations. The
        history begins at `node`: what came before it was on another path where `node` was reached by a stochastic step.
        """
        before = None
        for index in waypoints:
            child = self.deterministic(node, index, before if solver == "dpm" else None)
            node, before = child, node
        return node

    def add_transition(self, parent: int, child: int, leaves: tuple[int, ...]):
        """Marks the stochastic edge `parent` -> `child` as trained, credited from the rewards of `leaves`."""
        if self.nodes[child].parent != parent or self.nodes[child].draw is None:
            raise ValueError(f"Nodes {parent} and {child} are not joined by a stochastic step.")
        self.transitions.setdefault(self.nodes[parent].index, []).append(Transition(parent, child, leaves))

    def add_sample(self, step: int, leaf: int):
        """Marks the clean latent `leaf` as trained by the forward process: noised afresh to the sigma of `step`."""
        if self.nodes[leaf].index != self.num_steps or not 0 <= step < self.num_steps:
            raise ValueError(
                f"Node {leaf} at index {self.nodes[leaf].index} and step {step}: expected a leaf (index "
                f"{self.num_steps}) and a step from 0 to {self.num_steps - 1}."
            )
        self.transitions.setdefault(step, []).append(Transition(leaf, leaf, (leaf,)))

    def _after(self, parent: int) -> int:
        if self.nodes[parent].index >= self.num_steps:
            raise ValueError(f"Node {parent} is a leaf (index {self.num_steps}): it has no next step.")
        return self.nodes[parent].index + 1

    def _add(self, index: int, parent: int | None, stochastic: bool, before: int | None = None) -> int:
        draw = self.num_draws if stochastic else None
        self.num_draws += stochastic
        self.nodes.append(Node(index, parent, draw, before))
        return len(self.nodes) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from pure noise to `node`."""
        path = [node]
        while (parent := self.nodes[path[-1]].parent) is not None:
            path.append(parent)
        return path[::-1]

    @property
    def leaves(self) -> list[int]:
        return [number for number, node in enumerate(self.nodes) if node.index == self.num_steps]

    @property
    def steps(self) -> list[int]:
        """Trained step indices, ascending."""
        return sorted(self.transitions)

    @property
    def evaluated(self) -> list[int]:
        """Nodes whose velocity is needed: those with children."""
        return sorted({node.parent for node in self.nodes if node.parent is not None})

    @property
    def num_evaluations(self) -> int:
        """Velocity evaluations of one prompt group, in rows."""
        return len(self.evaluated)

    @property
    def width(self) -> int:
        """The largest number of rows that one grid index needs."""
        indices = [self.nodes[number].index for number in self.evaluated]
        return max(indices.count(index) for index in range(self.num_steps))


def tail_waypoints(index: int, num_steps: int, tail_steps: int | str) -> list[int]:
    """
    Grid indices that an n-step ODE tail visits after `index` (DenseGRPO eq. 8).

    The paper's tail from timestep t passes the timesteps ..., floor(2t/n), floor(t/n), 0. With n >= t, or `"full"`,
    these are all the remaining steps of the grid.

    Args:
        index (`int`): Where the tail begins.
        num_steps (`int`): T, the number of steps of the grid.
        tail_steps (`int` or `"full"`): n.
    """
    remaining = num_steps - index
    n = remaining if tail_steps == "full" else min(tail_steps, remaining)
    return [num_steps - (j * remaining) // n for j in range(n - 1, -1, -1)]


def stride_waypoints(index: int, num_steps: int, stride: int) -> list[int]:
    """
    Grid indices that a tail of one granularity visits after a branch at `index` (G2RPO section 3.3).

    One fine step, then every `stride`-th index, the last of them moved to T: ceil((T - index) / stride) evaluations.
    This is the published code's grid, whose last step always lands on sigma 0 even where the stride misses T. The
    paper's eq. 10 anchors the progression at the clean end instead (timesteps 1, 1 + l, ..., with a last element that
    is generally not in the progression); it needs as many evaluations, but here all granularities of a branch share
    the first two, because the fine step is common to them.

    Args:
        index (`int`): Where the branch is.
        num_steps (`int`): T, the number of steps of the grid.
        stride (`int`): Indices between two points of the tail, of which the first is one index after the branch.
    """
    waypoints = list(range(index + 1, num_steps + 1, stride))
    return [*waypoints[:-1], num_steps]


def chain_plan(
    num_steps: int, num_generations: int, sde_steps, same_initial_noise: bool = False, solver: str = "euler"
) -> Plan:
    """
    Flow-GRPO, DanceGRPO and MixGRPO: one chain per group member, stochastic at `sde_steps`, each credited with its
    outcome.

    Members that start from one noise share every step before the first stochastic one.

    Args:
        num_steps (`int`): T, the number of steps of the grid.
        num_generations (`int`): G, the number of members of the group.
        sde_steps (`Collection[int]`): Indices of the stochastic steps, all of which are trained.
        same_initial_noise (`bool`, *optional*, defaults to `False`): Whether they start from one noise.
        solver (`str`, *optional*, defaults to `"euler"`): Of the steps after the last stochastic one, see [`Plan.tail`].
    """
    plan = Plan(num_steps)
    for nodes in _chains(plan, num_generations, sde_steps, same_initial_noise, solver):
        for step in sorted(sde_steps):
            plan.add_transition(nodes[step], nodes[step + 1], leaves=(nodes[-1],))
    return plan


def dense_plan(
    num_steps: int,
    num_generations: int,
    sde_steps,
    tail_steps: int | str = "full",
    same_initial_noise: bool = False,
    solver: str = "euler",
) -> Plan:
    """
    DenseGRPO and TP-GRPO: chains as in [`chain_plan`], with an ODE tail from both ends of every trained step.

    Each transition's leaves are (tail of x_t, tail of x_{t-1}): the rewards R_t and R_{t-1} of eq. 9. After the last
    stochastic step a chain goes on without noise, so with Euler's full tails it is its own tail. Where no tail uses it
    (cheaper tails after that step), the rest of the chain is not sampled.

    Args:
        num_steps, num_generations, sde_steps, same_initial_noise (as for [`chain_plan`]): The chains.
        tail_steps (`int` or `"full"`, *optional*, defaults to `"full"`): Steps of a tail, see [`tail_waypoints`].
        solver (`str`, *optional*, defaults to `"euler"`): Of the tails, see [`Plan.tail`].
    """
    plan = Plan(num_steps)
    ends = sorted({index for step in sde_steps for index in (step, step + 1)})
    for nodes in _chains(plan, num_generations, sde_steps, same_initial_noise, until=ends[-1]):
        tails = {
            index: plan.tail(nodes[index], tail_waypoints(index, num_steps, tail_steps), solver)
            if index < num_steps
            else nodes[index]
            for index in ends
        }
        for step in sorted(sde_steps):
            plan.add_transition(nodes[step], nodes[step + 1], leaves=(tails[step], tails[step + 1]))
    return plan


def branch_plan(num_steps: int, num_generations: int, sde_steps, strides=(1,)) -> Plan:
    """
    G2RPO (and TempFlow-GRPO with one stride and every step): one deterministic trunk, and at each index in `sde_steps`
    `num_generations` stochastic children, each followed by one tail per stride. The trunk ends at the last branch.

    Each transition's leaves are its tails, in the order of `strides`.

    Args:
        num_steps (`int`): T, the number of steps of the grid.
        num_generations (`int`): G, the number of members of the group.
        sde_steps (`Collection[int]`): Indices where the trunk branches.
        strides (`Sequence[int]`, *optional*, defaults to `(1,)`): Of the tails of a branch, see [`stride_waypoints`].
    """
    plan = Plan(num_steps)
    trunk = plan.start()
    for step in range(max(sde_steps) + 1):
        if step in sde_steps:
            for _ in range(num_generations):
                child = plan.stochastic(trunk)
                leaves = tuple(
                    plan.tail(child, stride_waypoints(step + 1, num_steps, stride)) if step + 1 < num_steps else child
                    for stride in strides
                )
                plan.add_transition(trunk, child, leaves)
        if step < max(sde_steps):
            trunk = plan.deterministic(trunk)
    return plan


def forward_plan(num_steps: int, num_generations: int, steps) -> Plan:
    """
    DiffusionNFT and AWM: deterministic chains whose clean latents are trained by the forward process.

    Args:
        num_steps (`int`): T, the number of steps of the grid.
        num_generations (`int`): G, the number of members of the group.
        steps (`Collection[int]`): Indices to whose sigma the clean latents are noised.
    """
    plan = Plan(num_steps)
    leaves = [plan.tail(plan.start(), range(1, num_steps + 1)) for _ in range(num_generations)]
    for step in sorted(steps):
        for leaf in leaves:
            plan.add_sample(step, leaf)
    return plan


def _chains(
    plan: Plan,
    num_generations: int,
    sde_steps,
    same_initial_noise: bool,
    solver: str = "euler",
    until: int | None = None,
) -> list[list[int]]:
    """Nodes 0..`until` (default: T) of one chain per group member."""
    shared = plan.start() if same_initial_noise else None
    last = max(sde_steps)
    chains = []
    for _ in range(num_generations):
        nodes = [plan.start() if shared is None else shared]
        for step in range(plan.num_steps if until is None else until):
            if step in sde_steps:
                nodes.append(plan.stochastic(nodes[-1]))
            else:
                before = nodes[-2] if solver == "dpm" and step > last + 1 else None
                nodes.append(plan.deterministic(nodes[-1], before=before))
        chains.append(nodes)
    return chains
