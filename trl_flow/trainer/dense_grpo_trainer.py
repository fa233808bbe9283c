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

"""DenseGRPO: step-wise dense rewards from ODE tails."""

import textwrap

from ..credit import gain, value_after
from ..rollout import Plan, dense_plan
from .dense_grpo_config import DenseGRPOConfig
from .flow_grpo_trainer import FlowGRPOTrainer


class DenseGRPOTrainer(FlowGRPOTrainer):
    """
    Trainer for DenseGRPO, of the paper [DenseGRPO: From Sparse to Dense Reward for Flow Matching Model
    Alignment](https://huggingface.co/papers/2601.20218).

    It differs from [`FlowGRPOTrainer`] in the credit of a step. A deterministic ODE tail from the latent before and
    after each stochastic step gives the latent rewards R_t and R_{t-1} (eq. 8 and 9); the step is credited with their
    difference, normalised within the group step by step (eq. 10). The paper's calibrated noise (eq. 11, Algorithm 1)
    is a table that [`calibrate_noise`] writes.

    The step's own velocity is the tail's first, so tails from T latents of a chain cost T (T - 1) / 2 evaluations
    beside the chain's T: 55 per sample at T = 10, where a separate tail from each of them would make it 65.

    Example:

    ```python
    from trl_flow import DenseGRPOTrainer

    trainer = DenseGRPOTrainer("shapes", reward_funcs=["shapes"])
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-flow", "dense-grpo"]
    _name = "DenseGRPO"
    _config_class = DenseGRPOConfig
    _paper = {
        "title": "DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment",
        "id": "2601.20218",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{deng2026densegrpo,
                title        = {{DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment}},
                author       = {Haoyou Deng and Keyu Yan and Chaojie Mao and Xiang Wang and Yu Liu and Changxin Gao and Nong Sang},
                year         = 2026,
                eprint       = {arXiv:2601.20218},
            }"""),
    }

    def rollout_plan(self, sde_steps) -> Plan:
        return dense_plan(
            self.args.num_inference_steps,
            self.num_generations,
            sde_steps,
            self.args.tail_steps,
            self.args.same_initial_noise,
            self.args.tail_solver,
        )

    def credit(self, rewards):
        return gain(rewards) if self.args.dense_reward == "gain" else value_after(rewards)

    def log_credit(self, rewards, plan):
        gains = gain(rewards).squeeze(-1)  # (B, S, G)
        for s, step in enumerate(plan.steps):
            known = gains[:, s][~gains[:, s].isnan()]
            if len(known):
                self._metrics["train"][f"dense_reward/step_{step}"].append(known.mean().item())
                positive = (known > 0).double().mean().item()
                self._metrics["train"][f"dense_reward/positive/step_{step}"].append(positive)
