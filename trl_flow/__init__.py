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

"""Align flow-matching pipelines with reward functions by online reinforcement learning, as an extension of TRL."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Public name -> module. Importing trl_flow costs nothing; a name brings torch, TRL and diffusers with it on first use.
_MODULES = {
    "DenseGRPOConfig": "trainer.dense_grpo_config",
    "DenseGRPOTrainer": "trainer.dense_grpo_trainer",
    "FlowGRPOConfig": "trainer.flow_grpo_config",
    "FlowGRPOTrainer": "trainer.flow_grpo_trainer",
    "FlowPolicy": "policy",
    "G2RPOConfig": "trainer.g2rpo_config",
    "G2RPOTrainer": "trainer.g2rpo_trainer",
    "calibrate_noise": "calibration",
    "load_reward": "rewards",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))


if TYPE_CHECKING:
    from .calibration import calibrate_noise
    from .policy import FlowPolicy
    from .rewards import load_reward
    from .trainer.dense_grpo_config import DenseGRPOConfig
    from .trainer.dense_grpo_trainer import DenseGRPOTrainer
    from .trainer.flow_grpo_config import FlowGRPOConfig
    from .trainer.flow_grpo_trainer import FlowGRPOTrainer
    from .trainer.g2rpo_config import G2RPOConfig
    from .trainer.g2rpo_trainer import G2RPOTrainer
