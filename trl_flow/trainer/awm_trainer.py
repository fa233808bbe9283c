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


"""AWM: the pretraining loss, weighted by advantages."""

import textwrap

from ..objective import matching_log_prob
from .awm_config import AWMConfig
from .forward_process_trainer import ForwardProcessTrainer


class AWMTrainer(ForwardProcessTrainer):
    """
    Trainer for AWM, of the paper [Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion
    Models](https://huggingface.co/papers/2509.25050).

    It differs from [`FlowGRPOTrainer`] in what stands for the log-probability of a sample: minus its weighted flow-matching
    loss at a fresh noising. The ratio of two of these is clipped as ever.
    """

    _tag_names = ["trl", "trl-flow", "awm"]
    _name = "AWM"
    _config_class = AWMConfig
    _paper = {
        "title": "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        "id": "2509.25050",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{xue2025awm,
                title        = {{Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models}},
                author       = {Shuchen Xue and Chongjian Ge and Shilong Zhang and Yichen Li and Zhi-Ming Ma},
                year         = 2025,
                eprint       = {arXiv:2509.25050},
            }"""),
    }

    def default_sde_steps(self):
        # Neither pure noise nor the nearly clean end.
        num_steps = self.args.num_inference_steps
        return list(range(1, min(num_steps, max(2, int(0.9 * num_steps)))))

    def statistics(self, chunk, velocity):
        return {
            "log_probs": matching_log_prob(velocity[chunk.row], chunk.next_latents, chunk.sigma, self.args.matching)
        }
