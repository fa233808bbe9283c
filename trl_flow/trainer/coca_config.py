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


"""Configuration of CoCA."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, _check_fraction


@dataclass
class CoCAConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`CoCATrainer`]. Shared fields are [`FlowGRPOConfig`]'s, as in DenseGRPO's comparison; the
    others are the published code's.

    Parameters:
        similarity_window (`int`, *optional*):
            Number of steps over which the similarity to the clean latent is averaged, w. Defaults to 5, or to all steps
            where there are fewer.
        outcome_share (`float`, *optional*, defaults to `0.0`):
            Share of the advantage that every step gets alike, alpha. With 1, this is Flow-GRPO normalised twice.
    """

    similarity_window: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps over which the similarity to the clean latent is averaged, w. Defaults to 5, or to "
            "all steps where there are fewer."
        },
    )
    outcome_share: float = field(
        default=0.0, metadata={"help": "Share of the advantage that every step gets alike, alpha."}
    )

    def validate(self):
        super().validate()
        if self.similarity_window is None:
            self.similarity_window = min(5, self.num_inference_steps)
        if not 1 <= self.similarity_window <= self.num_inference_steps:
            raise ValueError(
                f"similarity_window={self.similarity_window}: expected 1 to num_inference_steps="
                f"{self.num_inference_steps}."
            )
        if self.outcome_share:
            _check_fraction("outcome_share", self.outcome_share)
