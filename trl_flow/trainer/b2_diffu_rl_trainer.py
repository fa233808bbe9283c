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


"""B2-DiffuRL: training that grows from the end of the trajectory backwards, on branches."""

import textwrap

import torch

from .b2_diffu_rl_config import B2DiffuRLConfig
from .flow_grpo_fast_trainer import FlowGRPOFastTrainer


class B2DiffuRLTrainer(FlowGRPOFastTrainer):
    """
    Trainer for B2-DiffuRL, of the paper [Towards Better Alignment: Training Diffusion Models with Reinforcement Learning
    Against Sparse Rewards](https://huggingface.co/papers/2503.11240).

    It differs from [`FlowGRPOTrainer`] in the steps, at first the last ones and then ever more of those before them; in the
    rollout, one trunk per group that branches where training begins; and in the samples, of which the best and the worst of
    each group are trained on.
    """

    _tag_names = ["trl", "trl-flow", "b2-diffu-rl"]
    _name = "B2-DiffuRL"
    _config_class = B2DiffuRLConfig
    _paper = {
        "title": "Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards",
        "id": "2503.11240",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hu2025b2diffurl,
                title        = {{Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards}},
                author       = {Zijing Hu and Fengda Zhang and Long Chen and Kun Kuang and Jiahui Li and Kaifeng Gao and Jun Xiao and Xin Wang and Wenwu Zhu},
                year         = 2025,
                eprint       = {arXiv:2503.11240},
            }"""),
    }

    def trained(self, advantages, mask, keys):
        best, worst = advantages.argmax(-1, keepdim=True), advantages.argmin(-1, keepdim=True)
        return torch.zeros_like(mask).scatter(-1, best, True).scatter(-1, worst, True)
