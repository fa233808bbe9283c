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

"""The training commands: a table of methods, read without importing any of them."""

from typing import NamedTuple


class Method(NamedTuple):
    """
    A training command.

    Args:
        trainer (`str`):
            Name of the trainer in `trl_flow`.
        config (`str`):
            Name of its config in `trl_flow`.
        summary (`str`):
            Its line in `trl-flow --help`.
        description (`str`):
            First lines of `trl-flow COMMAND --help`: what the method does.
    """

    trainer: str
    config: str
    summary: str
    description: str


# Chains first, then windows, then credit for single steps, then the forward process.
METHODS = {
    "flow-grpo": Method(
        "FlowGRPOTrainer",
        "FlowGRPOConfig",
        "Flow-GRPO: one reward for a whole trajectory",
        "Train a pipeline with Flow-GRPO: each prompt gets a group of stochastic trajectories, and the reward of the "
        "final picture, compared within the group, is the advantage of every step.",
    ),
    "dance-grpo": Method(
        "DanceGRPOTrainer",
        "DanceGRPOConfig",
        "DanceGRPO: constant noise, shared initial noise, a random part of the steps",
        "Train a pipeline with DanceGRPO: trajectories start from one noise per group and are disturbed by a constant "
        "amount. Each is trained on a random part of its steps, and each reward is normalised on its own.",
    ),
    "coca": Method(
        "CoCATrainer",
        "CoCAConfig",
        "CoCA: the reward divided by how much each step shaped the picture",
        "Train a pipeline with CoCA: Flow-GRPO's trajectories, but the reward of a picture is divided among the steps "
        "by how much nearer each of them brought the predicted picture to the final one. It needs no evaluations beside "
        "those of the rollout.",
    ),
    "flow-grpo-fast": Method(
        "FlowGRPOFastTrainer",
        "FlowGRPOFastConfig",
        "Flow-GRPO-Fast: a window of few stochastic steps, deterministic elsewhere",
        "Train a pipeline with Flow-GRPO-Fast: only a window of steps is stochastic and trained, at a place that "
        "changes from rollout to rollout; the steps around it are deterministic. Where a group shares its initial "
        "noise, it shares the way to the window too.",
    ),
    "mix-grpo": Method(
        "MixGRPOTrainer",
        "MixGRPOConfig",
        "MixGRPO: a stochastic window that slides from the first step to the last",
        "Train a pipeline with MixGRPO: a window of stochastic, trained steps slides along the trajectory in the course "
        "of training; the steps around it are deterministic. MixGRPO-Flash (--flash_ratio) finishes pictures with "
        "fewer, higher-order steps.",
    ),
    "b2-diffu-rl": Method(
        "B2DiffuRLTrainer",
        "B2DiffuRLConfig",
        "B2-DiffuRL: branches trained from the last steps backwards",
        "Train a pipeline with B2-DiffuRL: training begins with the last steps and reaches back to earlier ones as it "
        "goes on. The samples of a group share the way to the trained interval and branch there; the best and the worst "
        "of them are trained on.",
    ),
    "dense-grpo": Method(
        "DenseGRPOTrainer",
        "DenseGRPOConfig",
        "DenseGRPO: a reward for each denoising step, from its deterministic continuation",
        "Train a pipeline with DenseGRPO: each denoising step is rewarded with what it adds to the score of the picture "
        "to which the trajectory would lead without further noise.",
    ),
    "turning-point-grpo": Method(
        "TurningPointGRPOTrainer",
        "TurningPointGRPOConfig",
        "TP-GRPO: step rewards, and at turning points all that follows",
        "Train a pipeline with TP-GRPO: each step is rewarded with what it adds, as in DenseGRPO. A turning point, a step "
        "that turns the trajectory towards where it ends, gets the whole change from there to the end instead.",
    ),
    "g2rpo": Method(
        "G2RPOTrainer",
        "G2RPOConfig",
        "G2RPO: one stochastic step at a time, judged at several granularities",
        "Train a pipeline with G2RPO: noise enters one step at a time, and each branch is judged by pictures made from "
        "it with several step sizes.",
    ),
    "temp-flow-grpo": Method(
        "TempFlowGRPOTrainer",
        "TempFlowGRPOConfig",
        "TempFlow-GRPO: branches at every step, weighted by their noise",
        "Train a pipeline with TempFlow-GRPO: from several seeds per prompt, branches leave a deterministic trajectory "
        "at each step and end without further noise, so that their rewards belong to that step. Steps are weighted by "
        "their noise.",
    ),
    "diffusion-nft": Method(
        "DiffusionNFTTrainer",
        "DiffusionNFTConfig",
        "DiffusionNFT: contrasts good and bad pictures in the forward process",
        "Train a pipeline with DiffusionNFT: pictures are sampled without noise, noised again, and the velocity is "
        "drawn towards those of good pictures and away from those of bad ones. No likelihood of a trajectory is needed.",
    ),
    "awm": Method(
        "AWMTrainer",
        "AWMConfig",
        "AWM: the flow-matching loss of sampled pictures, weighted by advantages",
        "Train a pipeline with AWM (advantage weighted matching): pictures are sampled without noise, noised again, and "
        "fitted with the loss of pretraining, each weighted with its advantage in the group.",
    ),
}
