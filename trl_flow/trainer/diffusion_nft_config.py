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


"""Configuration of DiffusionNFT."""

from dataclasses import dataclass, field

from .flow_grpo_config import with_default
from .forward_process_config import ForwardProcessConfig


@dataclass
class DiffusionNFTConfig(ForwardProcessConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`]. Defaults are the published ones for SD3.5-M.

    Parameters:
        nft_beta (`float`, *optional*, defaults to `1.0`):
            Strength b of the implicit positive and negative policies.
        old_policy_decay (`float`, *optional*, defaults to `0.5`):
            Largest decay of the policy that samples, an average of the trained ones. 0 samples with the trained policy.
        old_policy_decay_rate (`float`, *optional*, defaults to `0.001`):
            Growth of that decay per update, from 0.
    """

    beta: float = with_default(ForwardProcessConfig, "beta", 1e-4)
    nft_beta: float = field(
        default=1.0, metadata={"help": "Strength b of the implicit positive and negative policies."}
    )
    old_policy_decay: float = field(
        default=0.5,
        metadata={
            "help": "Largest decay of the policy that samples, an average of the trained ones. 0 samples with the trained "
            "policy."
        },
    )
    old_policy_decay_rate: float = field(default=0.001, metadata={"help": "Growth of that decay per update, from 0."})

    @classmethod
    def _only(cls):
        # There is no ratio to clip.
        return {**super()._only(), "epsilon": cls.__dataclass_fields__["epsilon"].default, "epsilon_high": None}

    def validate(self):
        super().validate()
        if self.nft_beta <= 0:
            raise ValueError(f"nft_beta={self.nft_beta}: expected a positive number.")
        if self.old_policy_decay == 0 and not self._is_default("old_policy_decay_rate"):
            raise ValueError(
                f"old_policy_decay_rate={self.old_policy_decay_rate} has no effect with old_policy_decay=0. Leave it unset."
            )
        if not 0 <= self.old_policy_decay < 1 or self.old_policy_decay_rate < 0:
            raise ValueError(
                f"old_policy_decay={self.old_policy_decay} and old_policy_decay_rate={self.old_policy_decay_rate}: expected "
                "a decay from 0 to 1 and a rate of 0 or more."
            )
