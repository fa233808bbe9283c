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

"""How much work does an update make? Counts, which are the same on every machine, of each method in a tiny fixed setting.

    python benchmarks/counts.py            # half a minute; writes counts.json and counts.md
    python benchmarks/counts.py --check    # compares with counts.json, and fails where a count has grown

Each method trains the embedded model for two updates on two prompts each, and evaluates once, on the CPU, in a process group
of one process: what several processes would exchange is exchanged with nobody, through the same calls. The reward's scores
are a fixed sequence, whatever the pictures are, so that rounding decides about no count. What is counted:

- velocity rows: rows that the policy is asked for the velocity of;
- denoiser calls, denoiser rows: forward passes of the transformer, and the rows in them (twice as many with guidance);
- decoder calls, pictures decoded: of the VAE;
- reward calls, pictures scored: of a trained reward function, and in evaluations also of a watched one;
- encoder calls: forward passes of the three text encoders, for each prompt that the run has not had before;
- collectives: calls of torch.distributed's operations, of which DDP makes some as it is set up;
- host syncs: operations that would make the host wait if the tensor were on a GPU: aten's _local_scalar_dense (`.item()`,
  `bool()`, `float()`, `int()`), nonzero, masked_select, unique, repeat_interleave with counts as a tensor, indices that are
  masks, and `.tolist()`, `.cpu()` and `.to("cpu")`. On a CPU nobody can tell which tensors are on the CPU also when there is a
  GPU (the sigma grid, scores): it is an upper bound. What else waits (copies to the GPU, a library's kernels) is not seen.
  Counted in the four phases of an update and in evaluations, not while a run begins or the optimizer steps.

Phases: `setup` (making the trainer, test calls of the rewards), `sweep` (sampling the tree), `rollout` (what is left of it:
prompts, decoding, rewards, credit, the old policy), `training` (gradients), `evaluation`, and `rest` (optimizer, logs, files).
"""

import argparse
import functools
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import accelerate
import diffusers
import peft
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import trl_flow
from trl_flow.policy import load_pipeline
from trl_flow.report.live import LiveReport
from trl_flow.rollout import execute
from trl_flow.scripts.methods import METHODS


RESULTS = Path(__file__).parent / "results"
PHASES = ("setup", "sweep", "rollout", "training", "evaluation", "rest")
COUNTS = (
    "velocity rows",
    "denoiser calls",
    "denoiser rows",
    "decoder calls",
    "pictures decoded",
    "reward calls",
    "pictures scored",
    "encoder calls",
    "collectives",
    "host syncs",
)
# Methods of the trainer in which a phase passes.
PHASE_METHODS = {
    "setup": "check_reward_functions",
    "rollout": "_generate_and_score",
    "training": "training_step",  # less the rollout that the first one of a few begins with
    "evaluation": "evaluate",
}
# Elsewhere torch's optimizers, checkpoints and loggers wait, as their versions please.
SYNC_PHASES = ("sweep", "rollout", "training", "evaluation")

# What a launcher tells a process that is the only one; the port is any that is free.
WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
PROMPTS = ["a red circle", "a green square", "a blue circle", "a red square"]
HELD_OUT = ["a green circle", "a blue square", "a red cross"]
SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "num_logged_images": 0,
    "eval_strategy": "no",  # train() ends with one
    "eval_on_start": False,
    "seed": 42,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": False,
    "num_inference_steps": 4,
    "num_eval_inference_steps": 4,
    "num_generations": 4,
    "guidance_scale": 1.0,
    "max_sequence_length": 1,
    "beta": 0.0,
    "ema_decay": 0.9,
    "rollout_batch_size": 16,
    "transition_batch_size": 16,
}
CHAIN = {"sde_type": "cps", "noise_level": 0.8, "sde_steps": [0, 1], "same_initial_noise": True}
WINDOW = {k: v for k, v in CHAIN.items() if k != "sde_steps"} | {"sde_window_size": 1, "sde_window_range": [0, 2]}
# Row of the table -> command, and its settings beside everyone's.
RUNS = {
    "flow-grpo": ("flow-grpo", CHAIN),
    # Most of what costs more: two forward passes for guidance, one for the divergence, and one for the old policy.
    "flow-grpo, guidance, KL": (
        "flow-grpo",
        CHAIN | {"guidance_scale": 3.0, "beta": 0.04, "per_device_train_batch_size": 1, "steps_per_generation": 2},
    ),
    "flow-grpo-fast": ("flow-grpo-fast", WINDOW),
    "dance-grpo": ("dance-grpo", CHAIN | {"timestep_fraction": 0.5}),
    "coca": ("coca", CHAIN | {"similarity_window": 2}),
    "mix-grpo": ("mix-grpo", WINDOW),
    "b2-diffu-rl": ("b2-diffu-rl", WINDOW),
    "dense-grpo": ("dense-grpo", CHAIN),
    "turning-point-grpo": ("turning-point-grpo", CHAIN),
    "g2rpo": ("g2rpo", CHAIN),
    "temp-flow-grpo": ("temp-flow-grpo", CHAIN | {"num_seeds": 2}),
    "diffusion-nft": ("diffusion-nft", {"timestep_fraction": 0.99}),
    "awm": ("awm", {"timestep_fraction": 0.5}),
}


# ---- Counting ----


class Counts:
    """Numbers by phase and name, of the phase that the run is in."""

    def __init__(self):
        self.numbers = {phase: Counter() for phase in PHASES}
        self.phase = "setup"

    def add(self, name: str, number: int = 1):
        if name != "host syncs" or self.phase in SYNC_PHASES:
            self.numbers[self.phase][name] += number

    @contextmanager
    def during(self, phase: str):
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def counting(self, name: str, function: Callable) -> Callable:
        """`function`, whose calls are counted."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.add(name)
            return function(*args, **kwargs)

        return call

    def within(self, phase: str, function: Callable) -> Callable:
        """`function`, in a phase of its own."""

        def call(*args, **kwargs):
            with self.during(phase):
                return function(*args, **kwargs)

        return call

    def table(self) -> dict[str, dict[str, int]]:
        """Name -> phase -> number, without zeros."""
        return {
            name: {phase: self.numbers[phase][name] for phase in PHASES if self.numbers[phase][name]}
            for name in COUNTS
        }


class CountOperations(TorchDispatchMode):
    """Counts collectives, and the operations whose result the host has to see."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive"}

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts.add("collectives")
        elif function.namespace == "aten" and self._waits(function, args):
            self.counts.add("host syncs")
        return function(*args, **(kwargs or {}))

    def _waits(self, function, args) -> bool:
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return name in self.WAITING or function is torch.ops.aten.repeat_interleave.Tensor


class CountCopies(TorchFunctionMode):
    """Counts copies to the host, which on a CPU are no operations."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.Tensor.tolist, torch.Tensor.cpu) or (
            function is torch.Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))
        ):
            self.counts.add("host syncs")
        return function(*args, **kwargs)


def count_pipeline(pipeline, counts: Counts):
    """Counts the forward passes of a pipeline's models."""

    def denoised(module, args, kwargs):
        counts.add("denoiser calls")
        counts.add("denoiser rows", len(kwargs["hidden_states"]))

    pipeline.transformer.register_forward_pre_hook(denoised, with_kwargs=True)
    for component in pipeline.components.values():
        if isinstance(component, PreTrainedModel):
            # Not a hook, which also sees calls that are answered from memory.
            component.forward = counts.counting("encoder calls", component.forward)
    decode = pipeline.vae.decode

    def counted(latents, *args, **kwargs):
        counts.add("decoder calls")
        counts.add("pictures decoded", len(latents))
        return decode(latents, *args, **kwargs)

    pipeline.vae.decode = counted


def make_reward(name: str, counts: Counts) -> Callable:
    """A reward function with scores of which no two are alike, and none is a group's mean."""
    numbers = itertools.count()

    def reward(images, **kwargs):
        counts.add("reward calls")
        counts.add("pictures scored", len(images))
        return [random.Random(f"{name} {next(numbers)}").random() for _ in images]

    reward.__name__ = name
    return reward


@contextmanager
def world_of_one():
    """A process group of this process alone, for accelerate to find; what it had found before is there again afterwards."""
    with (
        mock.patch.dict(os.environ, WORLD),
        mock.patch.dict(PartialState._shared_state, clear=True),
        mock.patch.dict(AcceleratorState._shared_state, clear=True),
    ):
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def count(name: str) -> tuple[dict[str, dict[str, int]], float]:
    """Counts of one run, and the seconds that it took, with the counting."""
    command, settings = RUNS[name]
    counts = Counts()
    sweep = counts.within("sweep", execute)
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as directory,
        CountOperations(counts),
        CountCopies(counts),
        mock.patch("trl_flow.trainer.rollouts.execute", sweep),
        # The report takes longer than the run, and counts nothing.
        mock.patch("trl_flow.report.live.write_report"),
    ):
        pipeline = load_pipeline("shapes")
        count_pipeline(pipeline, counts)
        trainer = getattr(trl_flow, METHODS[command].trainer)(
            pipeline,
            make_reward("trained", counts),
            args=getattr(trl_flow, METHODS[command].config)(output_dir=directory, **SETTINGS | settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            eval_dataset=Dataset.from_dict({"prompt": HELD_OUT}),
            eval_reward_funcs=make_reward("watched", counts),
            peft_config=LoraConfig(r=2, lora_alpha=4),
        )
        trainer.remove_callback(LiveReport)
        trainer.policy.register_forward_pre_hook(lambda module, args: counts.add("velocity rows", len(args[0])))
        for phase, name in PHASE_METHODS.items():
            setattr(trainer, name, counts.within(phase, getattr(trainer, name)))
        counts.phase = "rest"
        trainer.train()
    if not counts.numbers["training"]["collectives"]:
        raise RuntimeError("Gradients were averaged by no collective: accelerate has not found the process group.")
    return counts.table(), time.perf_counter() - began


# ---- Comparing ----


def changes(before: dict, after: dict) -> list[tuple[str, str, str, int, int]]:
    """Run, name, phase, count before and count after, of those counts that differ; of the runs of `after`."""
    return [
        (run, name, phase, old, new)
        for run, names in after.items()
        for name in COUNTS
        for phase in PHASES
        if (old := before[run].get(name, {}).get(phase, 0)) != (new := names.get(name, {}).get(phase, 0))
    ]


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def summary(runs: dict, seconds: dict, usual: dict) -> str:
    """The table of all counts but those of the phase `setup`."""
    text = (
        "Two updates and one evaluation of the embedded model: [counts.py](../counts.py) says what is counted, and counts.json has "
        "it by phase. Seconds depend on the machine, and nothing depends on them.\n\n"
    )
    rows = []
    for run, names in runs.items():
        totals = [sum(number for phase, number in names[name].items() if phase != "setup") for name in COUNTS]
        took = f"{seconds[run]:.1f}" + (f" (committed: {usual[run]:.1f})" if run in usual else "")
        rows.append([run, *totals, took])
    return text + markdown(["run", *COUNTS, "seconds"], rows)


def versions() -> dict[str, str]:
    # Some counts are theirs: which calls DDP, diffusers' pipelines and accelerate make.
    modules = (torch, diffusers, transformers, accelerate, peft, trl)
    return {module.__name__: module.__version__.split("+")[0] for module in modules}


def check(committed: dict, runs: dict) -> bool:
    """Prints what has changed. Returns whether nothing has grown."""
    unknown = [run for run in runs if run not in committed["runs"]]
    if unknown:
        print(f"No counts of {', '.join(unknown)} are committed: run benchmarks/counts.py and commit what it writes.")
        return False
    changed = changes(committed["runs"], runs)
    header = ["run", "count", "phase", "committed", "now"]
    if shrunk := [change for change in changed if change[4] < change[3]]:
        print("These counts have shrunk: run benchmarks/counts.py, and commit what it writes.\n")
        print(markdown(header, shrunk))
    if grown := [change for change in changed if change[4] > change[3]]:
        print(
            "These counts have GROWN. If it must be, run benchmarks/counts.py, and commit what it writes with the reason.\n"
        )
        print(markdown(header, grown))
    if not changed:
        print(f"The counts of {len(runs)} runs are those that are committed.")
    now = versions()
    if changed and (other := {k: (v, now[k]) for k, v in committed["versions"].items() if now[k] != v}):
        print("Other versions than those that were counted with (constraints.txt has these):", end=" ")
        print(", ".join(f"{name} {new}, not {old}" for name, (old, new) in other.items()))
    return not grown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a count has grown")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of counts.json and counts.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()

    path = args.results / "counts.json"
    committed = json.loads(path.read_text()) if path.is_file() else {"runs": {}, "seconds": {}, "versions": {}}
    runs, seconds = {}, {}
    with world_of_one():
        for run in args.runs:
            print(f"{run} ...", file=sys.stderr)
            runs[run], seconds[run] = count(run)
    print(summary(runs, seconds, committed["seconds"] if args.check else {}))
    if args.check:
        return 0 if check(committed, runs) else 1
    # Runs that were not asked for keep their counts.
    known = {
        key: {
            run: now[run] if run in now else committed[key][run] for run in RUNS if run in now or run in committed[key]
        }
        for key, now in (("runs", runs), ("seconds", {run: round(value, 1) for run, value in seconds.items()}))
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions(), **known}, indent=1) + "\n")
    path.with_suffix(".md").write_text(summary(known["runs"], known["seconds"], {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
