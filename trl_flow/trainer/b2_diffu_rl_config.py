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


"""Configuration of B2-DiffuRL."""

from dataclasses import dataclass

from .flow_grpo_config import with_default
from .flow_grpo_fast_config import FlowGRPOFastConfig


@dataclass
class B2DiffuRLConfig(FlowGRPOFastConfig):
    r"""
    Configuration class for the [`B2DiffuRLTrainer`]. Defaults are the published ones for Stable Diffusion 1.4: 20 steps, of
    which the last 14 are trained at first and one more after every 14 rollouts. The last step of all stays deterministic:
    its density is degenerate.
    """

    num_inference_steps: int = with_default(FlowGRPOFastConfig, "num_inference_steps", 20)
    # Of the model, as in all methods but Flow-GRPO-Fast.
    guidance_scale: float | None = with_default(FlowGRPOFastConfig, "guidance_scale", None)
    sde_type: str = with_default(FlowGRPOFastConfig, "sde_type", "flow")
    noise_level: list[str] = with_default(FlowGRPOFastConfig, "noise_level", 0.7)
    num_generations: int = with_default(FlowGRPOFastConfig, "num_generations", 5)
    same_initial_noise: bool = with_default(FlowGRPOFastConfig, "same_initial_noise", True)
    epsilon: float = with_default(FlowGRPOFastConfig, "epsilon", 1e-4)
    sde_window_schedule: str = with_default(FlowGRPOFastConfig, "sde_window_schedule", "backward")
    sde_window_interval: int = with_default(FlowGRPOFastConfig, "sde_window_interval", 14)

    _default_window_size = 13

    def default_window_range(self) -> list[int]:
        return [0, max(1, self.num_inference_steps - 1)]
