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

"""`trl-flow g2rpo`: train with [`G2RPOTrainer`]."""

import argparse

from .training import make_training_parser, run_training


def main(script_args, training_args):
    from trl_flow import G2RPOTrainer

    run_training(G2RPOTrainer, "g2rpo", script_args, training_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl_flow import G2RPOConfig

    description = "Train a pipeline with G2RPO: noise enters one step at a time, and each branch is judged by pictures made from it with several step sizes."
    return make_training_parser(G2RPOConfig, "g2rpo", description, subparsers, prog)
