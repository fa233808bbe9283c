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
"""
How much of a reward's time is hidden behind sampling: rollouts of the embedded pipeline with a reward that waits, as one
behind a server does, in the thread that samples and in one of its own.

    python benchmarks/reward_overlap.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, load_reward
from trl_flow.rewards import Reward


class Waiting(Reward):
    """`shapes`, after a wait for each picture."""

    def __init__(self, seconds: float, concurrent: bool):
        self.seconds, self.concurrent, self.reward = seconds, concurrent, load_reward("shapes")

    def __call__(self, prompts, images, **kwargs):
        time.sleep(self.seconds * len(images))
        return self.reward(prompts=prompts, images=images)


def seconds_per_rollout(trainer: FlowGRPOTrainer, repeats: int) -> float:
    rows = [trainer.train_dataset[number] for number in range(trainer.args.per_device_train_batch_size)]
    trainer.model.train()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        with torch.no_grad():
            trainer._generate_and_score(rows)
        times.append(time.perf_counter() - began)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a rollout, sampled one after the other")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def trainer(folder: str, seconds: float, concurrent: bool) -> FlowGRPOTrainer:
        config = FlowGRPOConfig(
            output_dir=folder,
            use_cpu=True,
            report_to="none",
            num_inference_steps=10,
            num_generations=24,
            guidance_scale=1.0,
            rollout_batch_size=24,
            per_device_train_batch_size=args.prompts,
        )
        return FlowGRPOTrainer("shapes", Waiting(seconds, concurrent), config, "shapes")

    with tempfile.TemporaryDirectory() as folder:
        sampling = seconds_per_rollout(trainer(folder, 0.0, False), args.repeats)
        per_picture = sampling / (24 * args.prompts)
        print(f"sampling alone: {sampling:.2f} s for {24 * args.prompts} pictures")
        figures = {"prompts": args.prompts, "sampling": sampling, "with_a_reward": {}}
        for share in (0.25, 0.5, 1.0, 2.0):
            inline, beside = (
                seconds_per_rollout(trainer(folder, share * per_picture, concurrent), args.repeats)
                for concurrent in (False, True)
            )
            hidden = (inline - beside) / (inline - sampling)
            print(
                f"a reward that takes {share:4.2f} times as long: {inline:.2f} s in turn, {beside:.2f} s beside sampling "
                f"({hidden:.0%} of it hidden)"
            )
            figures["with_a_reward"][share] = {"in_turn": inline, "beside": beside, "hidden": hidden}
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
