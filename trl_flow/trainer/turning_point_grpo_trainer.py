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


"""TP-GRPO: step-wise rewards, and all that follows for the steps that turn the trend."""

import textwrap

from ..credit import gain, turning_points
from ..rollout import dense_plan
from .flow_grpo_trainer import FlowGRPOTrainer
from .turning_point_grpo_config import TurningPointGRPOConfig


class TurningPointGRPOTrainer(FlowGRPOTrainer):
    """
    Trainer for TP-GRPO, of the paper [Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in
    Flow-Based GRPO](https://huggingface.co/papers/2602.06422).

    Its rollout is DenseGRPO's: a deterministic tail from before and after every stochastic step. A step is credited with
    the gain of its tails, but one that turns the trend of the reward with the whole gain from it to the end. The tail from
    the initial noise, with which all is compared, starts from the trajectory's own noise (the published code draws
    another), and costs no evaluation of its own.
    """

    _tag_names = ["trl", "trl-flow", "turning-point-grpo"]
    _name = "TP-GRPO"
    _config_class = TurningPointGRPOConfig
    _paper = {
        "title": "Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO",
        "id": "2602.06422",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tong2026turningpoint,
                title        = {{Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO}},
                author       = {Yunze Tong and Mushui Liu and Canyu Zhao and Wanggui He and Shiyi Zhang and Hongwei Zhang and Peng Zhang and Jinlong Liu and Ju Huang and Jiamang Wang and Hao Jiang and Pipei Huang},
                year         = 2026,
                eprint       = {arXiv:2602.06422},
            }"""),
    }

    def rollout_plan(self, sde_steps):
        args = self.args
        return dense_plan(
            args.num_inference_steps, self.num_generations, sde_steps, same_initial_noise=args.same_initial_noise
        )

    def credit(self, rewards):
        if not self.args.turning_points:
            return gain(rewards)
        if not self.args.balance_turning_points:
            return turning_points(rewards, balance=False)
        # As many up as down in the whole rollout, whatever part of it is this process's.
        own = self.layout.dealt()[self.args.process_index]
        return turning_points(self._gather_groups(rewards))[own]

    def log_credit(self, rewards, plan):
        if not self.args.turning_points:
            return
        gains = gain(rewards)
        turning = self.credit(rewards) != gains
        # A gain without a score is no turning point, although NaN differs from itself.
        self._metrics["train"]["turning_points"].append((turning & ~gains.isnan()).double().mean().item())
