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

"""Configuration of G2RPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, with_default


@dataclass
class G2RPOConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`G2RPOTrainer`]. Defaults are the paper's for FLUX.1-dev, except the learning rate:
    the paper's 2e-6 is for full fine-tuning, and this library trains LoRA adapters.

    Parameters:
        granularities (`list[int]`, *optional*, defaults to `[1, 2, 3]`):
            Strides of the ODE tails that score a branch; the advantages of all of them are summed.
        update_per_step (`bool`, *optional*, defaults to `False`):
            Whether to update after each trained step, as the first published code does, instead of once with their
            mean (the paper's equation 12). Later steps are then off-policy.
    """

    num_inference_steps: int = with_default(FlowGRPOConfig, "num_inference_steps", 16)
    num_generations: int = with_default(FlowGRPOConfig, "num_generations", 12)
    same_initial_noise: bool = with_default(FlowGRPOConfig, "same_initial_noise", True)
    beta: float = with_default(FlowGRPOConfig, "beta", 0.0)
    multi_objective_aggregation: str = with_default(
        FlowGRPOConfig, "multi_objective_aggregation", "normalize_then_sum"
    )
    ema_decay: float | None = with_default(FlowGRPOConfig, "ema_decay", None)
    granularities: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "Strides of the ODE tails that score a branch; the advantages of all of them are summed."},
    )
    update_per_step: bool = field(
        default=False,
        metadata={"help": "Whether to update after each trained step instead of once with their mean."},
    )

    def validate(self):
        super().validate()
        if not self.granularities or len(set(self.granularities)) < len(self.granularities):
            raise ValueError(f"granularities={self.granularities}: expected at least one stride, each once.")
        if min(self.granularities) < 1:
            raise ValueError(f"granularities={self.granularities}: a stride is at least 1.")
