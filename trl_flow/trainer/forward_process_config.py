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


"""Configuration shared by the methods that train on freshly noised samples."""

import copy
import dataclasses
from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig, _check_fraction, with_default


@dataclass
class ForwardProcessConfig(FlowGRPOConfig):
    r"""
    Configuration shared by [`DiffusionNFTConfig`] and [`AWMConfig`]: rollouts are deterministic, and the clean samples are
    noised afresh for training. What belongs to stochastic steps (`sde_type`, `noise_level`, `objective`, ...) is refused.

    Parameters:
        sde_steps (`list[int]`, *optional*):
            Grid indices to whose sigma samples are noised. Defaults to the method's.
        timestep_fraction (`float`, *optional*, defaults to `0.99`):
            Share of these that each sample is trained on, chosen at random for it.
    """

    guidance_scale: float = with_default(FlowGRPOConfig, "guidance_scale", 1.0)
    scale_rewards: str = with_default(FlowGRPOConfig, "scale_rewards", "batch")
    kl_type: str = with_default(FlowGRPOConfig, "kl_type", "velocity")
    sde_steps: list[int] | None = field(
        default=None,
        metadata={"help": "Grid indices to whose sigma samples are noised. Defaults to the method's."},
    )
    timestep_fraction: float = field(
        default=0.99,
        metadata={"help": "Share of the grid indices that each sample is trained on, chosen at random for it."},
    )

    @classmethod
    def from_config(cls, config):
        if type(config) is FlowGRPOConfig:
            config = copy.copy(config)
            if config.kl_type == FlowGRPOConfig.__dataclass_fields__["kl_type"].default:
                config.kl_type = "velocity"  # the only one that there is here
        return super().from_config(config)

    @classmethod
    def _only(cls) -> dict:
        """The one value of each setting that has no part in these methods."""
        only = {"kl_type": "velocity", "same_initial_noise": False}
        names = ("sde_type", "noise_level", "objective", "step_weighting")
        fields = {f.name: f for f in dataclasses.fields(FlowGRPOConfig) if f.name in names}
        return only | {
            name: f.default_factory() if f.default is dataclasses.MISSING else f.default for name, f in fields.items()
        }

    def validate(self):
        super().validate()
        _check_fraction("timestep_fraction", self.timestep_fraction)
        for name, only in self._only().items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no part in this method: its rollouts are deterministic, and it trains "
                    f"on their samples, noised afresh. Leave it at {only!r}."
                )
