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


"""What a step costs beyond the denoiser: its time over that of the same denoiser rows alone, in ideal batches.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py                     # the shapes examples; writes overhead.json, .md and .png
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --methods dense-grpo --cycles 20

Each method trains as its example in examples/shapes says. After each rollout and the updates that it feeds, as many rows are sent
through the bare denoiser: forward passes for those that were sampled, forward and backward passes for those that were trained, in
batches of `rollout_batch_size` and `transition_batch_size`, with the inputs that the pipeline gave it. No pipeline, sampler,
decoder, reward, loss or optimizer has a part in that. The ratio of the two is taken of each such pair, and its median reported.
On a CPU times are the process's own CPU seconds.

Every second rollout is taken apart into phases (on a GPU each border of a phase waits for it, so these are not the ones that
are compared):

- denoiser, backward: forward passes of the denoiser, and all backward passes;
- pipeline: the rest of the pipeline's call around the denoiser, batching and unpacking;
- executor: steps of the tree; noise: drawing it from seeds;
- encode: prompts that are new; decode: latents to pictures; reward: scoring them;
- credit: advantages, metrics, micro-batches; loss: chunks, losses, norms of gradients;
- optimizer: clipping, step, moving average; logging: logs and the loader.
"""

import argparse
import functools
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import measuring
import torch
from measuring import clock
from transformers import TrainerCallback

from trl_flow.rollout import execute, seeded_noise


# With their colours.
PHASES = {
    "denoiser": "#2166ac",
    "backward": "#92c5de",
    "pipeline": "#d6604d",
    "executor": "#4d9221",
    "noise": "#e9c46a",
    "encode": "#762a83",
    "decode": "#b2813f",
    "reward": "#f4a582",
    "credit": "#a6d96a",
    "loss": "#1b7837",
    "optimizer": "#222222",
    "logging": "#bbbbbb",
}
GOALS = {"cpu": 1.25, "cuda": 1.10}


class Phases:
    """Seconds by phase; those of a phase within another count for the inner one alone."""

    def __init__(self):
        self.seconds = Counter()
        self.is_on = False
        self._stack = ["logging"]
        self._since = 0.0

    def start(self):
        self.seconds.clear()
        self._since = clock()

    def become(self, phase: str):
        """Another phase, where none is left."""
        self._note()
        self._stack[-1] = phase

    def stop(self) -> Counter:
        self._note()
        return self.seconds.copy()

    def within(self, phase: str, function: Callable) -> Callable:
        """`function`, in a phase of its own."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            if not self.is_on:
                return function(*args, **kwargs)
            self._note()
            self._stack.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._note()
                self._stack.pop()

        return call

    def _note(self):
        if self.is_on:
            now = clock()
            self.seconds[self._stack[-1]] += now - self._since
            self._since = now


class Denoiser:
    """
    The bare denoiser: counts the rows of its passes, and repeats as many of them with the inputs of the largest one.

    Args:
        trainer ([`FlowGRPOTrainer`]): Whose denoiser it is.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        (component,) = trainer.policy.components
        self.module = getattr(trainer.policy.pipeline, component)
        self.rows = Counter()
        self.inputs: dict[bool, tuple[int, dict]] = {}
        self._counts = True
        self.module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        if args:
            raise RuntimeError(f"{type(module).__name__} is called with positional arguments: expected names alone.")
        if self._counts:
            trained, rows = torch.is_grad_enabled(), len(kwargs["hidden_states"])
            self.rows[trained] += rows
            if rows > self.inputs.get(trained, (0, None))[0]:
                self.inputs[trained] = rows, kwargs

    def _inputs(self, trained: bool, rows: int) -> dict:
        """Inputs of so many rows: those that were seen, and again from the first where there are not enough."""
        seen, inputs = self.inputs[trained]
        chosen = torch.arange(rows) % seen
        return {
            name: value[chosen.to(value.device)].detach()
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == seen
            else value
            for name, value in inputs.items()
        }

    def prepare(self, rows: Counter) -> list[tuple[bool, dict]]:
        """Batches of so many rows, sampled and trained, with their inputs."""
        args = self.trainer.args
        batches = []
        for trained, size in ((False, args.rollout_batch_size), (True, args.transition_batch_size)):
            # With guidance, a row of the batch is two of the denoiser's.
            largest = max(size, self.inputs[trained][0]) if trained in self.inputs else size
            full, rest = divmod(rows[trained], largest)
            inputs = {count: self._inputs(trained, count) for count in {largest * (full > 0), rest} - {0}}
            batches += [(trained, inputs[count]) for count in [largest] * full + [rest] * (rest > 0)]
        return batches

    def run(self, batches: list[tuple[bool, dict]]):
        """The ideal: nothing but these passes. No gradient is left behind."""
        self._counts = False
        for trained, inputs in batches:
            with torch.set_grad_enabled(trained), self.trainer.accelerator.autocast():
                output = self.module(**inputs)[0]
                if trained:
                    torch.autograd.grad(output.float().mean(), self.trainer._trainable)
        self._counts = True


class Watch(TrainerCallback):
    """Compares each rollout and its updates with the ideal, which it runs when they are over."""

    def __init__(self, trainer, phases: Phases, warm_up: int):
        self.trainer, self.phases, self.warm_up = trainer, phases, warm_up
        self.denoiser = Denoiser(trainer)
        args = trainer.args
        self.updates = args.num_iterations * trainer._micro_steps // args.gradient_accumulation_steps
        self.cycles: list[dict] = []
        self._cycle, self._began = -1, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.updates == 0:
            self._finish()
            self._cycle += 1
            self.denoiser.rows.clear()
            self.phases.is_on = self._cycle % 2 == 1
            self.phases.start()
            self._began = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.phases.become("logging")

    def on_train_end(self, args, state, control, **kwargs):
        self._finish()
        self.phases.is_on = False

    def _finish(self):
        if self._began is None:
            return
        step = clock() - self._began
        phases = self.phases.stop() if self.phases.is_on else None
        self.phases.is_on = False
        rows = self.denoiser.rows.copy()
        batches = self.denoiser.prepare(rows)
        began = clock()
        self.denoiser.run(batches)
        ideal = clock() - began
        if self._cycle >= self.warm_up:
            counts = {"rows": rows[False], "rows_trained": rows[True]}
            self.cycles.append({"step": step, "ideal": ideal, "phases": phases, **counts})


@contextmanager
def watched(trainer, phases: Phases):
    """Context in which the trainer's parts note their time."""
    policy, within = trainer.policy, phases.within
    denoiser = getattr(policy.pipeline, policy.components[0])
    training_step = within("loss", trainer.training_step)

    def step(*args, **kwargs):
        phases.become("loss")
        loss = training_step(*args, **kwargs)
        phases.become("optimizer")
        return loss

    start_decoding = within("decode", trainer.start_decoding)
    start_rewards = within("reward", trainer.start_rewards)
    with (
        mock.patch("trl_flow.trainer.rollouts.execute", within("executor", execute)),
        mock.patch("trl_flow.trainer.rollouts.seeded_noise", within("noise", seeded_noise)),
        mock.patch.object(denoiser, "forward", within("denoiser", denoiser.forward)),
        mock.patch.object(policy, "forward", within("pipeline", policy.forward)),
        mock.patch.object(trainer.accelerator, "backward", within("backward", trainer.accelerator.backward)),
        mock.patch.object(trainer, "conditioning", within("encode", trainer.conditioning)),
        mock.patch.object(trainer, "start_decoding", lambda *args: within("decode", start_decoding(*args))),
        mock.patch.object(trainer, "_generate_and_score", within("credit", trainer._generate_and_score)),
        mock.patch.object(trainer, "training_step", step),
        # Rewards, and on a GPU pictures, are waited for later than they are started.
        mock.patch.object(trainer, "start_rewards", lambda *args: within("reward", start_rewards(*args))),
    ):
        yield


def measure(method: str, cycles: int, **settings) -> dict:
    """One run: the ratio, what it is of, and the phases."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = measuring.example_trainer(method, folder, max_steps=1, **settings)
        phases = Phases()
        watch = Watch(trainer, phases, warm_up=2)
        trainer.args.max_steps = (cycles + watch.warm_up) * watch.updates
        trainer.add_callback(watch)
        with watched(trainer, phases):
            trainer.train()
    whole = [cycle for cycle in watch.cycles if cycle["phases"] is None]
    apart = [cycle for cycle in watch.cycles if cycle["phases"] is not None]
    ratios = sorted(cycle["step"] / cycle["ideal"] for cycle in whole)
    shares = {phase: statistics.median(cycle["phases"][phase] / cycle["ideal"] for cycle in apart) for phase in PHASES}
    return {
        "method": method,
        "updates_per_rollout": watch.updates,
        "pairs": len(whole),
        **{
            name: statistics.median(cycle[name] for cycle in whole)
            for name in ("rows", "rows_trained", "step", "ideal")
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "phases": shares,
        # Of a model so small, decoding and scoring are no small part, and nothing that a loop could save.
        "ratio_without_pictures": statistics.median(ratios) - shares["decode"] - shares["reward"],
    }


def table(runs: list[dict], facts: dict) -> str:
    goal = GOALS["cuda" if facts["gpu"] else "cpu"]
    text = (
        "Time of a rollout and its updates over that of the same denoiser rows in ideal batches, and what it is made of, in "
        f"parts of the ideal time. [overhead.py](../overhead.py) says what is compared. Goal: at most {goal:.2f}.\n\n"
    )
    header = [
        "method",
        "rows sampled",
        "rows trained",
        "ideal, s",
        "step, s",
        "ratio",
        "without decode and reward",
        "pairs",
    ]
    rows = [
        [
            run["method"],
            f"{run['rows']:.0f}",
            f"{run['rows_trained']:.0f}",
            f"{run['ideal']:.2f}",
            f"{run['step']:.2f}",
            f"{run['ratio']:.2f} ({run['ratios'][0]:.2f} to {run['ratios'][-1]:.2f})",
            f"{run['ratio_without_pictures']:.2f}",
            run["pairs"],
        ]
        for run in runs
    ]
    text += measuring.markdown(header, rows) + "\n"
    text += measuring.markdown(
        ["method", *PHASES], [[run["method"], *(f"{run['phases'][phase]:.3f}" for phase in PHASES)] for run in runs]
    )
    return f"{text}\n{measuring.origin(facts)}\n"


def draw(runs: list[dict], facts: dict):
    figure = measuring.new_figure(10, 1.6 + 0.6 * len(runs))
    axes = figure.subplots()
    names = [run["method"] for run in runs]
    left = [0.0] * len(runs)
    for phase, color in PHASES.items():
        widths = [run["phases"][phase] for run in runs]
        axes.barh(names, widths, left=left, color=color, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for height, (end, run) in enumerate(zip(left, runs, strict=True)):
        axes.annotate(
            f"{run['ratio']:.2f}", (max(end, run["ratio"]), height), (6, 0), textcoords="offset points", va="center"
        )
    goal = GOALS["cuda" if facts["gpu"] else "cpu"]
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(goal, color="black", linewidth=1, linestyle="--")
    axes.annotate(f"goal {goal}", (goal, 1.0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.invert_yaxis()
    axes.set(
        xlabel="time, in parts of that of the same denoiser rows in ideal batches",
        xlim=(0, 1.1 * max(*left, *(run["ratio"] for run in runs))),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["flow-grpo", "dense-grpo", "g2rpo"])
    parser.add_argument("--cycles", type=int, default=8, help="rollouts that are measured; every second by phases")
    parser.add_argument("--prompts", type=int, help="prompts of a rollout; default: the example's")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "overhead")
    args = parser.parse_args(argv)
    if args.cycles < 2:
        parser.error(f"--cycles {args.cycles}: expected at least 2, one of which is taken apart")
    measuring.quieten()
    settings = {} if args.prompts is None else {"per_device_train_batch_size": args.prompts}
    runs = [measure(method, args.cycles, **settings) for method in args.methods]
    facts = measuring.machine()
    measuring.write(args.output, {**facts, "runs": runs}, table(runs, facts), draw(runs, facts))


if __name__ == "__main__":
    main()
