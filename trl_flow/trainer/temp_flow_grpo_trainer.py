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


"""TempFlow-GRPO: branches at every step of a deterministic trunk, weighted by their noise."""

import textwrap

from ..rollout import branch_plan
from .flow_grpo_trainer import FlowGRPOTrainer
from .temp_flow_grpo_config import TempFlowGRPOConfig


class TempFlowGRPOTrainer(FlowGRPOTrainer):
    """
    Trainer for TempFlow-GRPO, of the paper [TempFlow-GRPO: When Timing Matters for GRPO in Flow
    Models](https://huggingface.co/papers/2508.04324).

    It differs from [`FlowGRPOTrainer`] in the rollout, one deterministic trunk per seed that `num_generations` stochastic
    branches leave at every step, each completed without further noise and compared with its siblings; and in the weight of
    a step, proportional to its noise with mean 1. Siblings share their parent's velocity, in rollout and training.
    """

    _tag_names = ["trl", "trl-flow", "temp-flow-grpo"]
    _name = "TempFlow-GRPO"
    _config_class = TempFlowGRPOConfig
    _paper = {
        "title": "TempFlow-GRPO: When Timing Matters for GRPO in Flow Models",
        "id": "2508.04324",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{he2025tempflowgrpo,
                title        = {{TempFlow-GRPO: When Timing Matters for GRPO in Flow Models}},
                author       = {Xiaoxuan He and Siming Fu and Yuke Zhao and Wanli Li and Jian Yang and Dacheng Yin and Fengyun Rao and Bo Zhang},
                year         = 2025,
                eprint       = {arXiv:2508.04324},
            }"""),
    }

    def check_args(self):
        super().check_args()
        self.check_shared_noise(TempFlowGRPOConfig)

    def rollout_plan(self, sde_steps):
        return branch_plan(self.args.num_inference_steps, self.num_generations, sde_steps)

    @property
    def groups_per_prompt(self):
        return self.args.num_seeds
