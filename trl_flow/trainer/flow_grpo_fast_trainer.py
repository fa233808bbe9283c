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


"""Flow-GRPO-Fast: a window of stochastic steps that moves from rollout to rollout."""

from .flow_grpo_fast_config import FlowGRPOFastConfig
from .flow_grpo_trainer import FlowGRPOTrainer


class FlowGRPOFastTrainer(FlowGRPOTrainer):
    """
    Trainer for Flow-GRPO-Fast, of the code of [Flow-GRPO](https://huggingface.co/papers/2505.05470).

    It differs from [`FlowGRPOTrainer`] in the steps: those of a window are stochastic and trained, all others
    deterministic. The window is a function of the seed and the number of the rollout, the same on every process.
    """

    _tag_names = ["trl", "trl-flow", "flow-grpo-fast"]
    _name = "Flow-GRPO-Fast"
    _config_class = FlowGRPOFastConfig

    def default_sde_steps(self) -> list[int]:
        return list(range(*self.args.sde_window_range))

    def rollout_steps(self) -> list[int]:
        return self.args.window(self.rollout_number)
