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


"""What it saves to keep prompts, to score beside sampling, to compile, and to checkpoint activations: time and memory of each, off and on.

    OMP_NUM_THREADS=1 python benchmarks/switches.py                     # minutes; writes switches.json, .md and .png
    OMP_NUM_THREADS=1 python benchmarks/switches.py --switches checkpointing --prompts 24

The embedded model, as DenseGRPO's example trains it. Off and on take turns:

- prompts: rollouts whose prompts are encoded each time, and those whose prompts are known;
- overlap: rollouts with a reward that waits as long as sampling takes, as one behind a server does: in the thread that samples,
  and in one of its own. In wall time, of which waiting is;
- compile: a rollout and its training, with the denoiser's blocks as they are and compiled. Making the graphs is told apart;
- checkpointing: training, with all activations kept and with those of the blocks computed again.

Memory is the most that torch's allocator holds at a time above what was there before, of one more call each. What the prompts'
embeddings keep for good (benchmarks/prompt_embeddings.py) and what compilation takes is not in it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measuring
import torch

from trl_flow import load_reward
from trl_flow.policy.allocations import measured_peak
from trl_flow.rewards import Reward
from trl_flow.trainer.flow_grpo_trainer import FlowGRPOTrainer


def make_trainer(folder: str, prompts: int, **settings) -> FlowGRPOTrainer:
    trainer = measuring.example_trainer(
        "dense-grpo", folder, max_steps=1, per_device_train_batch_size=prompts, **settings
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@torch.no_grad()
def sample(trainer: FlowGRPOTrainer) -> list[dict]:
    """Micro-batches of one rollout, of the same prompts each time."""
    rows = range(trainer.args.per_device_train_batch_size)
    return trainer._generate_and_score([trainer.train_dataset[row] for row in rows])


def train(trainer: FlowGRPOTrainer, micro_batches: list[dict]):
    for micro_batch in micro_batches:
        trainer._forward_backward(trainer.model, micro_batch)
    trainer.policy.zero_grad()


def compare(
    off: Callable[[], object], on: Callable[[], object], device: torch.device, repeats: int, now=measuring.clock
) -> dict:
    """Seconds and peaks of both."""
    calls = {"off": off, "on": on}
    seconds = measuring.take_turns(calls, repeats, now)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": measuring.ratio(seconds["on"], seconds["off"]),
        "peak_mib": {name: measured_peak(call, device) / 2**20 for name, call in calls.items()},
    }


def prompts(folder: str, args: argparse.Namespace) -> dict:
    trainer = make_trainer(folder, args.prompts)

    def anew():
        trainer.policy._cache.clear()
        sample(trainer)

    return compare(anew, lambda: sample(trainer), trainer.policy.device, args.repeats)


def wall() -> float:
    measuring.clock()  # on a GPU, what was asked for is done
    return time.perf_counter()


class Waiting(Reward):
    """`shapes`, after a wait for each picture."""

    def __init__(self, seconds: float, concurrent: bool):
        self.seconds, self.concurrent, self.reward = seconds, concurrent, load_reward("shapes")

    def __call__(self, prompts, images, **kwargs):
        time.sleep(self.seconds * len(images))
        return self.reward(prompts=prompts, images=images)


def overlap(folder: str, args: argparse.Namespace) -> dict:
    # One prompt at once, so that there is something left to sample while the first is scored.
    trainer = make_trainer(folder, args.prompts, rollout_batch_size=1)
    plan = trainer.rollout_plan(trainer.rollout_steps())
    trainer = make_trainer(folder, args.prompts, rollout_batch_size=plan.width)
    pictures = len(plan.leaves) * args.prompts
    times = measuring.take_turns({"sampling": lambda: sample(trainer)}, args.repeats, wall)
    seconds = statistics.median(times["sampling"])

    def with_reward(concurrent: bool):
        trainer.reward_funcs = [Waiting(seconds / pictures, concurrent)]
        sample(trainer)

    return compare(lambda: with_reward(False), lambda: with_reward(True), trainer.policy.device, args.repeats, wall)


def compiled(folder: str, args: argparse.Namespace) -> dict:
    # Blocks that are compiled stay so: each has a trainer of its own.
    off, on = make_trainer(f"{folder}/off", args.prompts), make_trainer(f"{folder}/on", args.prompts)
    began = wall()
    on.policy.compile()
    calls = [lambda trainer=trainer: train(trainer, sample(trainer)) for trainer in (off, on)]
    for _ in range(2):  # the second number of rows makes a graph for any number
        calls[1]()
    graphs = wall() - began
    return {**compare(*calls, on.policy.device, args.repeats), "seconds_of_compilation": graphs}


def checkpointing(folder: str, args: argparse.Namespace) -> dict:
    trainer = make_trainer(folder, args.prompts)
    (denoiser,) = (getattr(trainer.policy.pipeline, name) for name in trainer.policy.components)
    micro_batches = sample(trainer)

    def on():
        denoiser.enable_gradient_checkpointing()
        train(trainer, micro_batches)
        denoiser.disable_gradient_checkpointing()

    return compare(lambda: train(trainer, micro_batches), on, trainer.policy.device, args.repeats)


# Name -> what is done once for the time, and the function that compares.
SWITCHES = {
    "prompts": ("rollouts, prompts known", prompts),
    "overlap": ("rollouts, scored beside sampling", overlap),
    "compile": ("rollout and training, compiled", compiled),
    "checkpointing": ("training, activations checkpointed", checkpointing),
}


def table(results: dict[str, dict], facts: dict, number: int) -> str:
    text = f"{number} prompts of DenseGRPO's example. [switches.py](../switches.py) says what is switched.\n\n"
    rows = [
        [
            SWITCHES[name][0],
            *(f"{result['seconds'][way]:.2f}" for way in ("off", "on")),
            f"{result['time_ratio']:.2f}",
            *(f"{result['peak_mib'][way]:.0f}" for way in ("off", "on")),
            f"{result['peak_mib']['on'] / result['peak_mib']['off']:.2f}",
        ]
        for name, result in results.items()
    ]
    header = ["switch", "seconds, off", "on", "ratio", "peak MiB, off", "on", "ratio"]
    text += measuring.markdown(header, rows) + "\n"
    if "compile" in results:
        text += f"Compilation and two first updates took {results['compile']['seconds_of_compilation']:.0f} s of wall time. "
    return f"{text}{measuring.origin(facts)}\n"


def draw(results: dict[str, dict]):
    figure = measuring.new_figure(9, 1.4 + 0.55 * len(results))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [SWITCHES[name][0] for name in results]
    for plot, title, values in (
        (left, "time", [result["time_ratio"] for result in results.values()]),
        (right, "peak memory", [result["peak_mib"]["on"] / result["peak_mib"]["off"] for result in results.values()]),
    ):
        bars = plot.barh(names, values, color=measuring.COLORS[0], height=0.55)
        plot.axvline(1.0, color="black", linewidth=1)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        plot.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, bbox=box, zorder=3)
        plot.set(title=f"{title}, on / off", xlim=(0, 1.15 * max(1.0, *values)))
        plot.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in SWITCHES if torch.cuda.is_available() or name != "compile"]
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "switches")
    args = parser.parse_args(argv)
    measuring.quieten()
    results = {}
    for name in args.switches:
        print(f"{name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = SWITCHES[name][1](folder, args)
    facts = measuring.machine()
    record = {**facts, "prompts": args.prompts, "switches": results}
    measuring.write(args.output, record, table(results, facts, args.prompts), draw(results))


if __name__ == "__main__":
    main()
