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


"""MixGRPO: a sliding window of stochastic steps, and a short tail after it."""

import textwrap

import numpy as np
import torch

from ..rollout import chain_plan
from .flow_grpo_fast_trainer import FlowGRPOFastTrainer
from .mix_grpo_config import MixGRPOConfig


class MixGRPOTrainer(FlowGRPOFastTrainer):
    """
    Trainer for MixGRPO, of the paper [MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed
    ODE-SDE](https://huggingface.co/papers/2507.21802).

    It differs from [`FlowGRPOFastTrainer`] in how the window moves, by default from the noise towards the picture. With a
    `flash_ratio` (MixGRPO-Flash) the steps after the window are fewer: the rest of the grid is compressed, by linear
    interpolation in the index, and taken by a second-order multistep solver.
    """

    _tag_names = ["trl", "trl-flow", "mix-grpo"]
    _name = "MixGRPO"
    _config_class = MixGRPOConfig
    _paper = {
        "title": "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
        "id": "2507.21802",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025mixgrpo,
                title        = {{MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE}},
                author       = {Junzhe Li and Yutao Cui and Tao Huang and Yinping Ma and Chun Fan and Yiming Cheng and Miles Yang and Zhao Zhong and Liefeng Bo},
                year         = 2025,
                eprint       = {arXiv:2507.21802},
            }"""),
    }
    # The published code: the sample's standard deviation, and nothing added to it but this.
    _normalization = {"ddof": 1, "eps": 1e-8}

    def rollout_sigmas(self, sde_steps):
        if self.args.flash_ratio is None:
            return self.sigmas
        after = sde_steps[-1] + 1
        index = np.linspace(after, self.args.num_inference_steps, self.args.flash_steps(sde_steps[-1]) + 1)
        tail = np.interp(index, np.arange(len(self.sigmas)), self.sigmas.double().numpy())
        return torch.cat([self.sigmas[: after + 1], torch.tensor(tail[1:], dtype=self.sigmas.dtype)])

    def rollout_plan(self, sde_steps):
        return chain_plan(
            len(self.rollout_sigmas(sde_steps)) - 1,
            self.num_generations,
            sde_steps,
            self.args.same_initial_noise,
            solver="euler" if self.args.flash_ratio is None else "dpm",
        )
