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


"""Configuration of TempFlow-GRPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, with_default


@dataclass
class TempFlowGRPOConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`TempFlowGRPOTrainer`]. Defaults are the published ones for SD3.5-M.

    Each of a prompt's seeds is a group of its own: `per_device_train_batch_size` counts seeds.

    Parameters:
        num_seeds (`int`, *optional*, defaults to `4`):
            Number of trunks per prompt, each from its own initial noise.
    """

    num_generations: int = with_default(FlowGRPOConfig, "num_generations", 6)
    same_initial_noise: bool = with_default(FlowGRPOConfig, "same_initial_noise", True)
    beta: float = with_default(FlowGRPOConfig, "beta", 0.004)
    kl_type: str = with_default(FlowGRPOConfig, "kl_type", "gaussian")
    step_weighting: str = with_default(FlowGRPOConfig, "step_weighting", "noise")
    num_seeds: int = field(
        default=4, metadata={"help": "Number of trunks per prompt, each from its own initial noise."}
    )

    def validate(self):
        super().validate()
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds={self.num_seeds}: expected at least 1.")
