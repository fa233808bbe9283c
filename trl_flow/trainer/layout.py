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

"""Which groups of a rollout belong to which process, update and micro-step."""

from typing import NamedTuple

import torch

from .transitions import join_transitions, select_transitions


class Layout(NamedTuple):
    """
    How the groups of a rollout are dealt. Two layouts of as many groups per update and per rollout have the same groups in
    each update, whatever the number of processes.

    Attributes:
        processes (`int`): Number of processes.
        batch_size (`int`): Groups of a process in one micro-step.
        accumulation (`int`): Micro-steps of an update.
        micro_steps (`int`): Micro-steps in which all groups are trained once.
        parts (`int`): Parts of the transitions, which are trained one after the other.
        iterations (`int`): How often a rollout is trained.
    """

    processes: int
    batch_size: int
    accumulation: int
    micro_steps: int
    parts: int = 1
    iterations: int = 1

    @property
    def groups_per_update(self) -> int:
        return self.processes * self.batch_size * self.accumulation

    @property
    def groups_per_rollout(self) -> int:
        return self.processes * self.batch_size * self.micro_steps

    def __str__(self) -> str:
        times = f"{self.parts * self.iterations} times" if self.parts * self.iterations > 1 else "once"
        return f"{self.groups_per_update} groups per update and {self.groups_per_rollout} per rollout, trained {times}"

    def has_updates_of(self, other: "Layout") -> bool:
        """Whether updates and rollouts have the same groups as those of another layout."""

        def updates(layout):
            return layout.groups_per_update, layout.groups_per_rollout, layout.parts, layout.iterations

        return updates(self) == updates(other)

    def dealt(self) -> torch.Tensor:
        """
        The numbers of each process's groups `(processes, groups)`, in the order of the rollout. The groups of an update are
        consecutive, and a process has a consecutive part of them.
        """
        numbers = torch.arange(self.groups_per_rollout)
        return numbers.view(self.micro_steps // self.accumulation, self.processes, -1).transpose(0, 1).flatten(1)

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(groups, ...)` of all processes' groups, process by process -> in the order of the rollout."""
        return values[self.dealt().flatten().argsort().to(values.device)]


def deal_anew(micro_batches: list[list[dict]], before: Layout, after: Layout, process: int) -> list[dict]:
    """
    The micro-batches of a process in another layout, with the same groups in each update.

    Args:
        micro_batches (`list[list[dict]]`): Those of each process before, in training order.
        before, after (`Layout`): The layouts.
        process (`int`): The process, after.
    """
    dealt = []
    for first in range(0, before.parts * before.micro_steps, before.accumulation):
        update = [
            micro_batch for batches in micro_batches for micro_batch in batches[first : first + before.accumulation]
        ]
        groups = join_transitions(update)
        start = process * after.accumulation * after.batch_size
        for step in range(after.accumulation):
            own = range(start + step * after.batch_size, start + (step + 1) * after.batch_size)
            dealt.append(select_transitions(groups, own, torch.arange(len(groups["steps"]))))
    return dealt
