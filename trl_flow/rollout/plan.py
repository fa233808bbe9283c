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
    """A latent on the grid: its `index`, its `parent` (None: pure noise) and its noise `draw` (None: an ODE step)."""

    index: int
    parent: int | None
    draw: int | None


@dataclass(frozen=True)
class Transition:
    """A stochastic edge that is trained, and the leaves whose rewards its credit is computed from."""

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
        self._deterministic: dict[tuple[int, int], int] = {}

    def start(self) -> int:
        """A new node of pure noise at index 0."""
        return self._add(0, parent=None, stochastic=True)

    def stochastic(self, parent: int) -> int:
        """A new child of `parent` at the next index, with a noise draw of its own."""
        return self._add(self._after(parent), parent, stochastic=True)

    def deterministic(self, parent: int, index: int | None = None) -> int:
        """The child of `parent` by one Euler step to `index` (default: the next); the same node each time."""
        index = self._after(parent) if index is None else index
        if not self.nodes[parent].index < index <= self.num_steps:
            raise ValueError(
                f"A step from index {self.nodes[parent].index} to {index}: expected a later index, at most "
                f"{self.num_steps}."
            )
        key = (parent, index)
        if key not in self._deterministic:
            self._deterministic[key] = self._add(index, parent, stochastic=False)
        return self._deterministic[key]

    def tail(self, node: int, waypoints) -> int:
        """The leaf that Euler steps through `waypoints` (ascending indices, the last one T) lead to from `node`."""
        for index in waypoints:
            node = self.deterministic(node, index)
        return node

    def add_transition(self, parent: int, child: int, leaves: tuple[int, ...]):
        """Marks the stochastic edge `parent` -> `child` as trained, credited from the rewards of `leaves`."""
        if self.nodes[child].parent != parent or self.nodes[child].draw is None:
            raise ValueError(f"Nodes {parent} and {child} are not joined by a stochastic step.")
        self.transitions.setdefault(self.nodes[parent].index, []).append(Transition(parent, child, leaves))

    def _after(self, parent: int) -> int:
        if self.nodes[parent].index >= self.num_steps:
            raise ValueError(f"Node {parent} is a leaf (index {self.num_steps}): it has no next step.")
        return self.nodes[parent].index + 1

    def _add(self, index: int, parent: int | None, stochastic: bool) -> int:
        draw = self.num_draws if stochastic else None
        self.num_draws += stochastic
        self.nodes.append(Node(index, parent, draw))
        return len(self.nodes) - 1

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
    """
    waypoints = list(range(index + 1, num_steps + 1, stride))
    return [*waypoints[:-1], num_steps]


def chain_plan(num_steps: int, num_generations: int, sde_steps, same_initial_noise: bool = False) -> Plan:
    """
    Flow-GRPO and DanceGRPO: one chain per group member, stochastic at `sde_steps`, each credited with its outcome.

    Members that start from one noise share every step before the first stochastic one.
    """
    plan = Plan(num_steps)
    for nodes in _chains(plan, num_generations, sde_steps, same_initial_noise):
        for step in sorted(sde_steps):
            plan.add_transition(nodes[step], nodes[step + 1], leaves=(nodes[-1],))
    return plan


def dense_plan(
    num_steps: int, num_generations: int, sde_steps, tail_steps: int | str = "full", same_initial_noise: bool = False
) -> Plan:
    """
    DenseGRPO: chains as in [`chain_plan`], with an ODE tail from both ends of every trained step.

    Each transition's leaves are (tail of x_t, tail of x_{t-1}): the rewards R_t and R_{t-1} of eq. 9. After the last
    stochastic step the chain is its own full tail, so those leaves are one node.
    """
    plan = Plan(num_steps)
    for nodes in _chains(plan, num_generations, sde_steps, same_initial_noise):
        tails = {
            index: plan.tail(nodes[index], tail_waypoints(index, num_steps, tail_steps))
            if index < num_steps
            else nodes[-1]
            for index in sorted({index for step in sde_steps for index in (step, step + 1)})
        }
        for step in sorted(sde_steps):
            plan.add_transition(nodes[step], nodes[step + 1], leaves=(tails[step], tails[step + 1]))
    return plan


def branch_plan(num_steps: int, num_generations: int, sde_steps, strides=(1,)) -> Plan:
    """
    G2RPO (and TempFlow-GRPO with one stride and every step): one deterministic trunk, and at each index in `sde_steps`
    `num_generations` stochastic children, each followed by one tail per stride. The trunk ends at the last branch.

    Each transition's leaves are its tails, in the order of `strides`.
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


def _chains(plan: Plan, num_generations: int, sde_steps, same_initial_noise: bool) -> list[list[int]]:
    """Nodes 0..T of one chain per group member."""
    shared = plan.start() if same_initial_noise else None
    chains = []
    for _ in range(num_generations):
        nodes = [plan.start() if shared is None else shared]
        for step in range(plan.num_steps):
            nodes.append(plan.stochastic(nodes[-1]) if step in sde_steps else plan.deterministic(nodes[-1]))
        chains.append(nodes)
    return chains
