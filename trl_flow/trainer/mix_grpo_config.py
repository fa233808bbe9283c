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


"""Configuration of MixGRPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import with_default
from .flow_grpo_fast_config import FlowGRPOFastConfig


@dataclass
class MixGRPOConfig(FlowGRPOFastConfig):
    r"""
    Configuration class for the [`MixGRPOTrainer`]. Defaults are the paper's for FLUX.1-dev, except the learning rate: the
    paper's 1e-5 is for full fine-tuning, and this library trains LoRA adapters.

    Parameters:
        flash_ratio (`float`, *optional*):
            MixGRPO-Flash: the share of the steps after the window that is kept, taken by a second-order solver. The paper
            has 0.4. By default none is left out.
    """

    num_inference_steps: int = with_default(FlowGRPOFastConfig, "num_inference_steps", 25)
    num_eval_inference_steps: int = with_default(FlowGRPOFastConfig, "num_eval_inference_steps", 50)
    # Of the model, as in all methods but Flow-GRPO-Fast.
    guidance_scale: float | None = with_default(FlowGRPOFastConfig, "guidance_scale", None)
    sde_type: str = with_default(FlowGRPOFastConfig, "sde_type", "flow")
    noise_level: list[str] = with_default(FlowGRPOFastConfig, "noise_level", 0.7)
    num_generations: int = with_default(FlowGRPOFastConfig, "num_generations", 12)
    same_initial_noise: bool = with_default(FlowGRPOFastConfig, "same_initial_noise", True)
    epsilon: float = with_default(FlowGRPOFastConfig, "epsilon", 1e-4)
    multi_objective_aggregation: str = with_default(
        FlowGRPOFastConfig, "multi_objective_aggregation", "normalize_then_sum"
    )
    ema_decay: float | None = with_default(FlowGRPOFastConfig, "ema_decay", None)
    sde_window_schedule: str = with_default(FlowGRPOFastConfig, "sde_window_schedule", "progressive")
    flash_ratio: float | None = field(
        default=None,
        metadata={
            "help": "MixGRPO-Flash: the share of the steps after the window that is kept, taken by a second-order solver. "
            "The paper has 0.4."
        },
    )

    _default_window_size = 4

    def default_window_range(self) -> list[int]:
        return [0, max(1, self.num_inference_steps - 2)]

    def flash_steps(self, last: int) -> int:
        """
        Number of ODE steps after a window that ends with the step `last`: one less than the published code's points,
        int((T - last) * ratio), and at least the one that leads to a clean latent.
        """
        return max(1, int((self.num_inference_steps - last) * self.flash_ratio) - 1)

    def validate(self):
        super().validate()
        if self.flash_ratio is None:
            return
        if not 0 < self.flash_ratio < 1:
            raise ValueError(f"flash_ratio={self.flash_ratio}: expected a number between 0 and 1.")
        last = self.sde_window_range[1] - 1
        after = self.num_inference_steps - 1 - last
        if self.flash_steps(last) >= after:
            raise ValueError(
                f"flash_ratio={self.flash_ratio} with sde_window_range={self.sde_window_range}: after a window at the end of "
                f"the range there are {after} of {self.num_inference_steps} steps, which leaves nothing to compress. End the "
                "range earlier."
            )
