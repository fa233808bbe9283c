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


"""Configuration of AWM."""

from dataclasses import dataclass, field

from ..objective import MATCHINGS
from .flow_grpo_config import _check_choice, with_default
from .forward_process_config import ForwardProcessConfig


@dataclass
class AWMConfig(ForwardProcessConfig):
    r"""
    Configuration class for the [`AWMTrainer`]. Defaults are the published ones for SD3.5-M; there advantages are divided by
    5, here `beta` is multiplied by it.

    Parameters:
        matching (`str`, *optional*, defaults to `"ghuber"`):
            Weighting of the flow-matching loss: `"uniform"`, `"sigma"` or `"ghuber"`.
    """

    num_inference_steps: int = with_default(ForwardProcessConfig, "num_inference_steps", 14)
    epsilon: float = with_default(ForwardProcessConfig, "epsilon", 1.0)
    beta: float = with_default(ForwardProcessConfig, "beta", 0.015)
    timestep_fraction: float = with_default(ForwardProcessConfig, "timestep_fraction", 0.55)
    matching: str = field(
        default="ghuber",
        metadata={"help": "Weighting of the flow-matching loss.", "choices": list(MATCHINGS)},
    )

    def validate(self):
        super().validate()
        _check_choice("matching", self.matching, MATCHINGS)
