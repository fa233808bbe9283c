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
What an update and a run cost on 1 to 1,024 GPUs, on paper: the counts of a configuration times seconds that you measured.

    python benchmarks/cost.py dense-grpo --config examples/sd3.5-medium/dense-grpo.yaml --prompts 48 \
        --forward 0.02 --train 0.06 --decode 0.05 --score 0.03

The seconds above are an example, and measurements of nothing. A first update's logs have the sums (`time/rollout`, `time/train` ...), with
`nfe` and `rows_trained` what to divide them by. No model is loaded. Left out: averaging the gradients, evaluations, checkpoints, waiting for the
slowest process, and steps that move in the course of a run.
"""

import argparse

import trl_flow
from trl_flow.scripts.dry_run import trainer_of_settings
from trl_flow.scripts.estimate import rows_per_step
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.training import make_training_parser


def counts(method: str, config: str) -> dict[str, float]:
    """Of one prompt group: evaluations, pictures, trained rows, and updates that its rollout feeds."""
    words = ["--config", config, "--output_dir", "unused", "--use_cpu", "true", "--bf16", "false"]
    args = make_training_parser(method).parse_args_and_config(words)[1]
    trainer = trainer_of_settings(getattr(trl_flow, METHODS[method].trainer), args)
    plan = trainer.rollout_plan(trainer.rollout_steps())
    rows, updates = sum(rows_per_step(trainer, plan)), trainer._micro_steps / args.gradient_accumulation_steps
    passes = args.num_iterations
    # The reference model for beta; the sampling policy for updates that are not the first of a rollout.
    forwards = plan.num_evaluations + rows * passes * (args.beta > 0) + rows * (1 - 1 / updates)
    facts = {"forwards": forwards, "pictures": len(plan.leaves), "rows": rows * passes, "updates": updates * passes}
    return facts | {"max_steps": args.max_steps}


def table(facts: dict[str, float], prompts: int, seconds: argparse.Namespace) -> list[tuple[int, int, float, float]]:
    """
    GPUs, groups of a rollout on the fullest of them, seconds of an update, GPU-hours of an update. A group is not divided: with more GPUs
    than `prompts`, a rollout has one for each.
    """
    group = facts["forwards"] * seconds.forward + facts["rows"] * seconds.train
    group += facts["pictures"] * (seconds.decode + seconds.score)
    lines = []
    for gpus in (2**power for power in range(11)):
        groups = -(-max(prompts, gpus) // gpus)
        update = groups * group / facts["updates"]
        lines.append((gpus, groups, update, gpus * update / 3600))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompts", type=int, required=True, help="prompt groups of a rollout, on all GPUs together")
    parser.add_argument(
        "--forward", type=float, required=True, help="seconds of an evaluation of one row, with guidance"
    )
    parser.add_argument("--train", type=float, required=True, help="seconds of a forward and backward pass of one row")
    parser.add_argument("--decode", type=float, default=0.0, help="seconds of decoding one picture")
    parser.add_argument("--score", type=float, default=0.0, help="seconds of scoring one picture, by all rewards")
    seconds = parser.parse_args()
    facts = counts(seconds.method, seconds.config)
    if facts["max_steps"] < 1:
        parser.error(f"{seconds.config} has max_steps={facts['max_steps']}: expected a number of updates")
    print(
        f"A group: {facts['forwards']:,.0f} evaluations, {facts['rows']:,.0f} trained rows, {facts['pictures']:,.0f} pictures. "
        f"On paper, from the seconds given, for {facts['max_steps']:,} updates:\n"
    )
    print(
        "| GPUs | prompts | prompts on each | seconds an update | GPU-hours an update | hours of the run | GPU-hours of the run |"
    )
    print("|---|---|---|---|---|---|---|")
    for gpus, groups, update, hours in table(facts, seconds.prompts, seconds):
        cells = [f"{gpus:,}", f"{max(seconds.prompts, gpus):,}", str(groups), f"{update:,.1f}", f"{hours:,.2f}"]
        cells += [f"{facts['max_steps'] * of_update:,.1f}" for of_update in (update / 3600, hours)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
