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

"""Order of the prompts in training."""

import itertools
from collections.abc import Iterator, Sized

from trl.trainer.utils import RepeatSampler

from .layout import Layout


class EpochRepeatSampler(RepeatSampler):
    """
    TRL's `RepeatSampler` with an order that is a function of seed and epoch, dealt to the processes update by update.

    `RepeatSampler` draws each epoch's permutation from one running generator, which a resumed process starts afresh:
    it would see the first epoch's order again. Accelerate's data loader calls `set_epoch` at the start of each epoch.

    Args:
        data_source (`Sized`): The prompts.
        layout ([`Layout`]): How the groups of a rollout are dealt: a rollout is given as those of the first process, then
            those of the second, and so on.
        groups_per_prompt (`int`): How many groups a rollout has of each of its prompts.
        seed (`int`): Of the order.
    """

    def __init__(self, data_source: Sized, layout: Layout, groups_per_prompt: int, seed: int):
        self.layout = layout
        super().__init__(
            data_source,
            mini_repeat_count=groups_per_prompt,
            batch_size=layout.groups_per_rollout // groups_per_prompt,
            repeat_count=layout.iterations * layout.parts * layout.micro_steps,
            shuffle=True,
            seed=seed,
        )

    def __iter__(self) -> Iterator[int]:
        order, indices = self.layout.dealt().flatten().tolist(), super().__iter__()
        while rollout := list(itertools.islice(indices, self.layout.groups_per_rollout)):
            yield from (rollout[number] for number in order)

    def set_epoch(self, epoch: int):
        self.generator.manual_seed(self.seed + epoch)
