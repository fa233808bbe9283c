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


"""DiffusionNFT: the forward process, towards what is better and away from what is worse."""

import textwrap
from contextlib import contextmanager

import torch

from ..objective import contrastive_loss
from .diffusion_nft_config import DiffusionNFTConfig
from .forward_process_trainer import ForwardProcessTrainer


class DiffusionNFTTrainer(ForwardProcessTrainer):
    """
    Trainer for DiffusionNFT, of the paper [DiffusionNFT: Online Diffusion Reinforcement with Forward
    Process](https://huggingface.co/papers/2509.16117).

    There is no log-probability and no ratio. The policy that samples is an average of the trained ones; around its velocity
    an implicit positive and a negative policy are fitted to the noised samples, weighted by how good these are.
    """

    _tag_names = ["trl", "trl-flow", "diffusion-nft"]
    _name = "DiffusionNFT"
    _config_class = DiffusionNFTConfig
    _trains_without_advantage = True
    _has_sampling_policy = True
    _old: list[torch.Tensor] | None = None  # the policy that samples
    _paper = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zheng2025diffusionnft,
                title        = {{DiffusionNFT: Online Diffusion Reinforcement with Forward Process}},
                author       = {Kaiwen Zheng and Huayu Chen and Haotian Ye and Haoxiang Wang and Qinsheng Zhang and Kai Jiang and Hang Su and Stefano Ermon and Jun Zhu and Ming-Yu Liu},
                year         = 2025,
                eprint       = {arXiv:2509.16117},
            }"""),
    }

    def statistics(self, chunk, velocity):
        return {"velocity": velocity[chunk.row]}

    def policy_loss(self, chunk, advantages, new, old):
        losses = contrastive_loss(
            advantages,
            new["velocity"],
            old["velocity"],
            chunk.next_latents,
            chunk.sigma,
            self.args.nft_beta,
            self.args.advantage_clip,
        )
        return losses, {"velocity_change": (new["velocity"] - old["velocity"]).square().flatten(1).mean(1)}

    @property
    def _decay(self) -> float:
        """Of the policy that samples in the present rollout: above 0 it lags behind the trained one."""
        return min(self.args.old_policy_decay_rate * self.state.global_step, self.args.old_policy_decay)

    def on_policy(self, micro_batch):
        return self._decay == 0 and super().on_policy(micro_batch)

    def _generate_and_score(self, rows):
        self._update_old_policy()
        with self._sampling_policy():
            return super()._generate_and_score(rows)

    def _update_old_policy(self):
        new = [shard.detach().clone() for shard in self._shards]
        if self._decay > 0 and self._old is not None:
            new = [n.lerp(o, self._decay) for n, o in zip(new, self._old, strict=True)]
        self._old = new

    @contextmanager
    def _sampling_policy(self):
        """The policy that samples. Its velocities in the training batches are noted under it, too."""
        if self._decay == 0:
            yield
            return
        trained = [shard.detach().clone() for shard in self._shards]
        self._set_weights(self._old)
        try:
            yield
        finally:
            self._set_weights(trained)

    @torch.no_grad()
    def _set_weights(self, weights):
        for shard, weight in zip(self._shards, weights, strict=True):
            shard.copy_(weight)

    def method_state(self):
        return {"old_policy": self._old and self._whole(self._old)}

    def load_method_state(self, state):
        self._old = state["old_policy"] and self._to_shards(state["old_policy"])
