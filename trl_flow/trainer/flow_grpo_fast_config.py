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


"""Configuration of Flow-GRPO-Fast."""

from dataclasses import dataclass, field

from ..rollout import SCHEDULES, window
from .flow_grpo_config import FlowGRPOConfig, _check_choice, with_default


@dataclass
class FlowGRPOFastConfig(FlowGRPOConfig):
    r"""
    Configuration class for the [`FlowGRPOFastTrainer`]. Defaults are the published ones for SD3.5-M without guidance.

    `same_initial_noise=False` samples G trajectories of their own, as the present published code does; `True` samples one
    trunk per group that branches at the window, as its first version did, for fewer evaluations.

    Parameters:
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained. Defaults to the method's (Flow-GRPO-Fast: 3,
            MixGRPO: 4, B2-DiffuRL: 13), or to the whole range where that is shorter.
        sde_window_range (`list[int]`, *optional*):
            First step of the windows' range and the first step after it. Defaults to the method's: Flow-GRPO-Fast the
            first half of the steps, MixGRPO all but the last two, B2-DiffuRL all but the last.
        sde_window_schedule (`str`, *optional*, defaults to `"random"`):
            How the window moves from rollout to rollout: `"random"`, `"progressive"`, `"decay"`, `"frozen"` or
            `"backward"`; see [`~trl_flow.rollout.window`].
        sde_window_interval (`int`, *optional*, defaults to `25`):
            Rollouts per position of a window that moves on.
        sde_window_stride (`int`, *optional*, defaults to `1`):
            Steps by which it moves.
    """

    guidance_scale: float = with_default(FlowGRPOConfig, "guidance_scale", 1.0)
    sde_type: str = with_default(FlowGRPOConfig, "sde_type", "cps")
    noise_level: list[str] = with_default(FlowGRPOConfig, "noise_level", 0.8)
    epsilon: float = with_default(FlowGRPOConfig, "epsilon", 1e-5)
    beta: float = with_default(FlowGRPOConfig, "beta", 0.0)
    sde_window_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of consecutive steps that are stochastic and trained. Defaults to the method's "
            "(Flow-GRPO-Fast: 3, MixGRPO: 4, B2-DiffuRL: 13), or to the whole range where that is shorter."
        },
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "First step of the windows' range and the first step after it. Defaults to the method's: "
            "Flow-GRPO-Fast the first half of the steps, MixGRPO all but the last two, B2-DiffuRL all but the last."
        },
    )
    sde_window_schedule: str = field(
        default="random",
        metadata={"help": "How the window moves from rollout to rollout.", "choices": list(SCHEDULES)},
    )
    sde_window_interval: int = field(default=25, metadata={"help": "Rollouts per position of a window that moves on."})
    sde_window_stride: int = field(default=1, metadata={"help": "Steps by which it moves."})

    _default_window_size = 3

    @classmethod
    def from_config(cls, config):
        if cls is FlowGRPOFastConfig and type(config) is not cls and isinstance(config, cls):
            # Those of MixGRPO and B2-DiffuRL are made from this one; their own fields would be ignored here.
            raise ValueError(f"args is a {type(config).__name__}: expected a {cls.__name__} or a FlowGRPOConfig.")
        return super().from_config(config)

    def default_window_range(self) -> list[int]:
        return [0, max(1, self.num_inference_steps // 2)]

    def window(self, rollout: int) -> list[int]:
        """Grid indices of the window of one rollout."""
        first, end = self.sde_window_range
        return window(
            self.sde_window_schedule,
            rollout,
            self.sde_window_size,
            first,
            end,
            self.sde_window_interval,
            self.sde_window_stride,
            self.num_inference_steps,
            self.seed,
        )

    def validate(self):
        super().validate()
        if self.sde_steps is not None:
            raise ValueError(
                f"sde_steps={self.sde_steps}: here a window chooses the steps. Set sde_window_range and sde_window_size."
            )
        _check_choice("sde_window_schedule", self.sde_window_schedule, SCHEDULES)
        for name in ("sde_window_size", "sde_window_interval", "sde_window_stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.sde_window_schedule in ("random", "frozen"):
            for name in ("sde_window_interval", "sde_window_stride"):
                if not self._is_default(name):
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with sde_window_schedule={self.sde_window_schedule!r}: it "
                        "is about windows that move on. Leave it unset."
                    )
        if self.sde_window_range is None:
            self.sde_window_range = self.default_window_range()
        limits = self.sde_window_range
        if len(limits) != 2 or not 0 <= limits[0] < limits[1] <= self.num_inference_steps:
            raise ValueError(
                f"sde_window_range={limits}: expected a first step and the first step after the range, within the steps 0 to "
                f"{self.num_inference_steps} of num_inference_steps={self.num_inference_steps}."
            )
        if self.sde_window_size is None:
            self.sde_window_size = min(self._default_window_size, limits[1] - limits[0])
        if self.sde_window_size > limits[1] - limits[0]:
            raise ValueError(
                f"sde_window_size={self.sde_window_size} does not fit into sde_window_range={limits}: expected at most "
                f"{limits[1] - limits[0]}."
            )
