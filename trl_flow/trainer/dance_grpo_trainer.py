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


"""DanceGRPO: constant noise, shared initial noise, a random part of the steps."""

import textwrap

import torch

from ..rollout import seeded_subsets
from .dance_grpo_config import DanceGRPOConfig
from .flow_grpo_trainer import FlowGRPOTrainer


class DanceGRPOTrainer(FlowGRPOTrainer):
    """
    Trainer for DanceGRPO, of the paper [DanceGRPO: Unleashing GRPO on Visual
    Generation](https://huggingface.co/papers/2505.07818).

    It differs from [`FlowGRPOTrainer`] in its dynamics, a constant diffusion coefficient; in the initial noise, which a
    group shares; in the steps, of which each sample is trained on a random part; and in several rewards, whose advantages
    are summed.
    """

    _tag_names = ["trl", "trl-flow", "dance-grpo"]
    _name = "DanceGRPO"
    _config_class = DanceGRPOConfig
    _paper = {
        "title": "DanceGRPO: Unleashing GRPO on Visual Generation",
        "id": "2505.07818",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{xue2025dancegrpo,
                title        = {{DanceGRPO: Unleashing GRPO on Visual Generation}},
                author       = {Zeyue Xue and Jie Wu and Yu Gao and Fangyuan Kong and Lingting Zhu and Mengzhao Chen and Zhiheng Liu and Wei Liu and Qiushan Guo and Weilin Huang and Ping Luo},
                year         = 2025,
                eprint       = {arXiv:2505.07818},
            }"""),
    }
    # The published code: the sample's standard deviation, and nothing added to it but this.
    _normalization = {"ddof": 1, "eps": 1e-8}

    def trained(self, advantages, mask, keys):
        return random_steps(mask, self.args.timestep_fraction, self.args.seed, keys)


def random_steps(mask: torch.Tensor, fraction: float, seed: int, keys: list[str]) -> torch.Tensor:
    """
    A random part of the steps for each sample: of S steps int(S * fraction), at least one.

    Args:
        mask (`torch.Tensor` of shape `(B, S, G)`): Whose shape it is for.
        fraction (`float`): Share of the steps.
        seed (`int`), keys (`list[str]` of length B): What it is a function of.

    Returns:
        `torch.Tensor` of shape `(B, S, G)`, boolean.
    """
    _, num_steps, num_members = mask.shape
    size = max(1, int(num_steps * fraction))
    return torch.stack(
        [seeded_subsets(seed, "steps", key, num_subsets=num_members, num_items=num_steps, size=size).T for key in keys]
    )
