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


"""Configuration of TP-GRPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, with_default


@dataclass
class TurningPointGRPOConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`TurningPointGRPOTrainer`]. Defaults are the published script's for SD3.5-M, except the
    divergence: that of the means is divided by the noise of a step, which is next to nothing in CPS's last one.

    Parameters:
        turning_points (`bool`, *optional*, defaults to `True`):
            Whether steps that turn the trend of the reward are credited with all that follows from them.
        balance_turning_points (`bool`, *optional*, defaults to `True`):
            Whether to keep as many turning points that lead up as lead down.
    """

    sde_type: str = with_default(FlowGRPOConfig, "sde_type", "cps")
    epsilon: float = with_default(FlowGRPOConfig, "epsilon", 1e-5)
    beta: float = with_default(FlowGRPOConfig, "beta", 1e-4)
    kl_type: str = with_default(FlowGRPOConfig, "kl_type", "velocity")
    turning_points: bool = field(
        default=True,
        metadata={
            "help": "Whether steps that turn the trend of the reward are credited with all that follows from them."
        },
    )
    balance_turning_points: bool = field(
        default=True, metadata={"help": "Whether to keep as many turning points that lead up as lead down."}
    )

    def validate(self):
        super().validate()
        if self.balance_turning_points and not self.turning_points:
            raise ValueError(
                "balance_turning_points=True has nothing to balance with turning_points=False. Set it to False too."
            )
        if self.sde_steps is not None and max(self.sde_steps) - min(self.sde_steps) >= len(self.sde_steps):
            raise ValueError(
                f"sde_steps={self.sde_steps}: a turning point is told by its neighbours. Expected consecutive steps."
            )
