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


"""The methods: trainer and config of each."""

from trl_flow import (
    AWMConfig,
    AWMTrainer,
    B2DiffuRLConfig,
    B2DiffuRLTrainer,
    CoCAConfig,
    CoCATrainer,
    DanceGRPOConfig,
    DanceGRPOTrainer,
    DenseGRPOConfig,
    DenseGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOFastConfig,
    FlowGRPOFastTrainer,
    FlowGRPOTrainer,
    G2RPOConfig,
    G2RPOTrainer,
    MixGRPOConfig,
    MixGRPOTrainer,
    TempFlowGRPOConfig,
    TempFlowGRPOTrainer,
    TurningPointGRPOConfig,
    TurningPointGRPOTrainer,
)


FLOW = (FlowGRPOTrainer, FlowGRPOConfig)
FAST = (FlowGRPOFastTrainer, FlowGRPOFastConfig)
DANCE = (DanceGRPOTrainer, DanceGRPOConfig)
MIX = (MixGRPOTrainer, MixGRPOConfig)
COCA = (CoCATrainer, CoCAConfig)
TEMP = (TempFlowGRPOTrainer, TempFlowGRPOConfig)
TURNING = (TurningPointGRPOTrainer, TurningPointGRPOConfig)
DENSE = (DenseGRPOTrainer, DenseGRPOConfig)
G2 = (G2RPOTrainer, G2RPOConfig)
NFT = (DiffusionNFTTrainer, DiffusionNFTConfig)
AWM = (AWMTrainer, AWMConfig)
B2 = (B2DiffuRLTrainer, B2DiffuRLConfig)
ALL = (FLOW, FAST, DANCE, MIX, COCA, TEMP, TURNING, DENSE, G2, NFT, AWM, B2)
