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

"""Configuration of DenseGRPO."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, _check_choice


@dataclass
class DenseGRPOConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`DenseGRPOTrainer`]. Shared fields are [`FlowGRPOConfig`]'s, as in the paper.

    The paper's calibrated exploration is `sde_type="dance"` with `noise_level` the path of a file written by
    `trl-flow calibrate`; without one, the noise is Flow-GRPO's uniform 0.7, which the paper compares with.

    Parameters:
        dense_reward (`str`, *optional*, defaults to `"gain"`):
            Reward of a step: `"gain"`, the rise of the latent reward that the step causes, or `"value"`, the latent
            reward after the step (the paper's "Dense Reward (Baseline)").
        tail_steps (`str`, *optional*, defaults to `"full"`):
            Number n of ODE steps that estimate the reward of a latent, or `"full"` for all the remaining ones.
        tail_solver (`str`, *optional*, defaults to `"euler"`):
            Solver of these steps: `"euler"`, or `"dpm"`, second-order multistep, whose pictures are nearer to the exact
            solution's for as many evaluations.
    """

    dense_reward: str = field(
        default="gain",
        metadata={
            "help": "Reward of a step: `gain`, the rise of the latent reward that the step causes, or `value`, the "
            "latent reward after the step.",
            "choices": ["gain", "value"],
        },
    )
    tail_steps: str = field(
        default="full",
        metadata={
            "help": "Number n of ODE steps that estimate the reward of a latent, or `full` for all the remaining ones."
        },
    )

    tail_solver: str = field(
        default="euler",
        metadata={
            "help": "Solver of these steps: `euler`, or `dpm`, second-order multistep, whose pictures are nearer to the "
            "exact solution's for as many evaluations.",
            "choices": ["euler", "dpm"],
        },
    )

    def validate(self):
        super().validate()
        _check_choice("dense_reward", self.dense_reward, ("gain", "value"))
        _check_choice("tail_solver", self.tail_solver, ("euler", "dpm"))
        if self.tail_steps != "full":
            if not str(self.tail_steps).isdigit() or int(self.tail_steps) < 1:
                raise ValueError(f"tail_steps={self.tail_steps!r}: expected 'full' or a number of at least 1.")
            self.tail_steps = int(self.tail_steps)
            if self.tail_steps <= 2 and self.tail_solver == "dpm":
                raise ValueError(
                    f"tail_solver='dpm' has no effect with tail_steps={self.tail_steps}: the first step and the one to sigma 0 "
                    "are Euler's. Leave it at 'euler', or take at least 3 steps."
                )
