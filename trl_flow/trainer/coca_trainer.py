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


"""CoCA: the outcome shared out over the steps by latent similarity."""

import textwrap

import torch

from ..credit import normalize, reward_to_go
from .coca_config import CoCAConfig
from .flow_grpo_trainer import FlowGRPOTrainer


class CoCATrainer(FlowGRPOTrainer):
    """
    Trainer for CoCA, of the paper [Step-level Reward for Free in RL-based T2I Diffusion Model
    Fine-tuning](https://huggingface.co/papers/2505.19196), on flow-matching models: the baseline of DenseGRPO's paper.

    It differs from [`FlowGRPOTrainer`] in the credit of a step: the advantage of the picture times the share of it that
    lies in the step and those after it, by how the estimates of the clean latent come nearer to the final one; normalised
    once more within the group, step by step, whatever `scale_rewards` says of the first time. The estimates are by-products of sampling: it costs no evaluation.
    """

    _tag_names = ["trl", "trl-flow", "coca"]
    _name = "CoCA"
    _config_class = CoCAConfig
    _paper = {
        "title": "Step-level Reward for Free in RL-based T2I Diffusion Model Fine-tuning",
        "id": "2505.19196",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{liao2025steplevel,
                title        = {{Step-level Reward for Free in RL-based T2I Diffusion Model Fine-tuning}},
                author       = {Xinyao Liao and Wei Wei and Xiaoye Qu and Yu Cheng},
                year         = 2025,
                eprint       = {arXiv:2505.19196},
            }"""),
    }

    def rollout_plan(self, sde_steps):
        plan = super().rollout_plan(sde_steps)
        plan.observed = [plan.path(leaf) for leaf in plan.leaves]
        return plan

    def observe(self, rollout):
        estimates = rollout.estimates.flatten(3).double()  # (b, G, T + 1, D)
        return torch.cosine_similarity(estimates, estimates[:, :, -1:], dim=-1)

    def redistribute(self, advantages, mask, observed):
        share = reward_to_go(observed, self.args.similarity_window)[..., self.sde_steps].transpose(1, 2)  # (B, S, G)
        kept = self.args.outcome_share
        shaped = torch.where(mask, advantages * (kept + (1 - kept) * share), torch.nan)
        clip = self.args.advantage_clip
        return normalize(shaped, **self._normalization)[0].clamp(-clip, clip)
