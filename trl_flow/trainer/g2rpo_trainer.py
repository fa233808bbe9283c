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

"""G2RPO: singular stochastic sampling and multi-granularity advantages."""

import textwrap

from ..rollout import Plan, branch_plan
from .flow_grpo_trainer import FlowGRPOTrainer
from .g2rpo_config import G2RPOConfig


class G2RPOTrainer(FlowGRPOTrainer):
    """
    Trainer for G2RPO, of the paper [Fine-Grained GRPO for Precise Preference Alignment in Flow
    Models](https://huggingface.co/papers/2510.01982).

    It differs from [`FlowGRPOTrainer`] in the rollout and the credit. One deterministic trunk per prompt is left at
    each step of a set M by `num_generations` stochastic children ("singular stochastic sampling": one step's noise at
    a time); ODE tails of several strides complete each child, and its advantage is the sum of those that it has within
    its siblings at each stride and for each reward (eq. 11).

    Siblings share their parent, so its velocity is evaluated once in the rollout and once in training: |M| training
    rows per prompt instead of |M| * G, with exactly the same gradient.
    """

    _tag_names = ["trl", "trl-flow", "g2rpo"]
    _name = "G2RPO"
    _config_class = G2RPOConfig
    _paper = {
        "title": "Fine-Grained GRPO for Precise Preference Alignment in Flow Models",
        "id": "2510.01982",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhou2025finegrained,
                title        = {{Fine-Grained GRPO for Precise Preference Alignment in Flow Models}},
                author       = {Yujie Zhou and Pengyang Ling and Jiazi Bu and Yibin Wang and Yuhang Zang and Jiaqi Wang and Li Niu and Guangtao Zhai},
                year         = 2025,
                eprint       = {arXiv:2510.01982},
            }"""),
    }
    # The published code: the sample's standard deviation, and nothing added to it but this.
    _normalization = {"ddof": 1, "eps": 1e-8}

    def default_sde_steps(self) -> list[int]:
        return list(range(max(1, self.args.num_inference_steps // 2)))

    def check_args(self):
        super().check_args()
        self.check_shared_noise(G2RPOConfig)

    def rollout_plan(self, sde_steps) -> Plan:
        return branch_plan(self.args.num_inference_steps, self.num_generations, sde_steps, self.args.granularities)

    @property
    def updates_per_pass(self) -> int:
        return len(self.sde_steps) if self.args.update_per_step else 1
