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

from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """
    TRL's `RepeatSampler` with an order that is a function of seed and epoch.

    `RepeatSampler` draws each epoch's permutation from one running generator, which a resumed process starts afresh:
    it would see the first epoch's order again. Accelerate's data loader calls `set_epoch` at the start of each epoch.
    """

    def set_epoch(self, epoch: int):
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)
