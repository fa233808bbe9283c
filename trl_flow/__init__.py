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
    "AWMConfig": "trainer.awm_config",
    "AWMTrainer": "trainer.awm_trainer",
    "B2DiffuRLConfig": "trainer.b2_diffu_rl_config",
    "B2DiffuRLTrainer": "trainer.b2_diffu_rl_trainer",
    "calibrate_noise": "calibration",
    "CoCAConfig": "trainer.coca_config",
    "CoCATrainer": "trainer.coca_trainer",
    "DanceGRPOConfig": "trainer.dance_grpo_config",
    "DanceGRPOTrainer": "trainer.dance_grpo_trainer",
    "DenseGRPOConfig": "trainer.dense_grpo_config",
    "DenseGRPOTrainer": "trainer.dense_grpo_trainer",
    "DiffusionNFTConfig": "trainer.diffusion_nft_config",
    "DiffusionNFTTrainer": "trainer.diffusion_nft_trainer",
    "FlowGRPOConfig": "trainer.flow_grpo_config",
    "FlowGRPOFastConfig": "trainer.flow_grpo_fast_config",
    "FlowGRPOFastTrainer": "trainer.flow_grpo_fast_trainer",
    "FlowGRPOTrainer": "trainer.flow_grpo_trainer",
    "FlowPolicy": "policy",
    "G2RPOConfig": "trainer.g2rpo_config",
    "G2RPOTrainer": "trainer.g2rpo_trainer",
    "InterruptionCallback": "interruption",
    "load_reward": "rewards",
    "MixGRPOConfig": "trainer.mix_grpo_config",
    "MixGRPOTrainer": "trainer.mix_grpo_trainer",
    "NotebookProgress": "notebook",
    "RewardHackingCallback": "callbacks",
    "TempFlowGRPOConfig": "trainer.temp_flow_grpo_config",
    "TempFlowGRPOTrainer": "trainer.temp_flow_grpo_trainer",
    "TurningPointGRPOConfig": "trainer.turning_point_grpo_config",
    "TurningPointGRPOTrainer": "trainer.turning_point_grpo_trainer",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except Exception:
        from .environment import check_torchvision

        check_torchvision()  # a likely cause that the error does not name
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))


if TYPE_CHECKING:
    from .calibration import calibrate_noise
    from .callbacks import RewardHackingCallback
    from .interruption import InterruptionCallback
    from .notebook import NotebookProgress
    from .policy import FlowPolicy
    from .rewards import load_reward
    from .trainer.awm_config import AWMConfig
    from .trainer.awm_trainer import AWMTrainer
    from .trainer.b2_diffu_rl_config import B2DiffuRLConfig
    from .trainer.b2_diffu_rl_trainer import B2DiffuRLTrainer
    from .trainer.coca_config import CoCAConfig
    from .trainer.coca_trainer import CoCATrainer
    from .trainer.dance_grpo_config import DanceGRPOConfig
    from .trainer.dance_grpo_trainer import DanceGRPOTrainer
    from .trainer.dense_grpo_config import DenseGRPOConfig
    from .trainer.dense_grpo_trainer import DenseGRPOTrainer
    from .trainer.diffusion_nft_config import DiffusionNFTConfig
    from .trainer.diffusion_nft_trainer import DiffusionNFTTrainer
    from .trainer.flow_grpo_config import FlowGRPOConfig
    from .trainer.flow_grpo_fast_config import FlowGRPOFastConfig
    from .trainer.flow_grpo_fast_trainer import FlowGRPOFastTrainer
    from .trainer.flow_grpo_trainer import FlowGRPOTrainer
    from .trainer.g2rpo_config import G2RPOConfig
    from .trainer.g2rpo_trainer import G2RPOTrainer
    from .trainer.mix_grpo_config import MixGRPOConfig
    from .trainer.mix_grpo_trainer import MixGRPOTrainer
    from .trainer.temp_flow_grpo_config import TempFlowGRPOConfig
    from .trainer.temp_flow_grpo_trainer import TempFlowGRPOTrainer
    from .trainer.turning_point_grpo_config import TurningPointGRPOConfig
    from .trainer.turning_point_grpo_trainer import TurningPointGRPOTrainer
