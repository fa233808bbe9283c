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


"""Configuration of DanceGRPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, _check_fraction, with_default


@dataclass
class DanceGRPOConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`DanceGRPOTrainer`]. Defaults are the published ones for FLUX.1-dev with LoRA.

    Parameters:
        timestep_fraction (`float`, *optional*, defaults to `0.6`):
            Share of the stochastic steps that each sample is trained on, chosen at random for it.
    """

    num_inference_steps: int = with_default(FlowGRPOConfig, "num_inference_steps", 16)
    sde_type: str = with_default(FlowGRPOConfig, "sde_type", "dance")
    noise_level: list[str] = with_default(FlowGRPOConfig, "noise_level", 0.3)
    same_initial_noise: bool = with_default(FlowGRPOConfig, "same_initial_noise", True)
    num_generations: int = with_default(FlowGRPOConfig, "num_generations", 12)
    beta: float = with_default(FlowGRPOConfig, "beta", 0.0)
    multi_objective_aggregation: str = with_default(
        FlowGRPOConfig, "multi_objective_aggregation", "normalize_then_sum"
    )
    ema_decay: float | None = with_default(FlowGRPOConfig, "ema_decay", None)
    timestep_fraction: float = field(
        default=0.6,
        metadata={"help": "Share of the stochastic steps that each sample is trained on, chosen at random for it."},
    )

    def validate(self):
        super().validate()
        _check_fraction("timestep_fraction", self.timestep_fraction)
