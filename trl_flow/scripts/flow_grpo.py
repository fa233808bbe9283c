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

"""`trl-flow flow-grpo`: train with [`FlowGRPOTrainer`]."""

import argparse

from .training import make_training_parser, run_training


def main(script_args, training_args):
    from trl_flow import FlowGRPOTrainer

    run_training(FlowGRPOTrainer, "flow-grpo", script_args, training_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl_flow import FlowGRPOConfig

    description = "Train a pipeline with Flow-GRPO: each prompt gets a group of stochastic trajectories, and the reward of the final picture, compared within the group, is the advantage of every step."
    return make_training_parser(FlowGRPOConfig, "flow-grpo", description, subparsers, prog)
