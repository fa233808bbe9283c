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


"""How the cost of a rollout and its training grows, measured against the closed forms of docs/scaling.md.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                     # minutes; writes growth.json, .md and .png
    OMP_NUM_THREADS=1 python benchmarks/growth.py --axes G strides --repeats 5

Along each axis one number changes: steps T, group size G, trained steps (|M| of G2RPO), strides of the tails, resolution, depth and width
of the denoiser, processes. Of each point two things are compared:

- counts: velocity rows that were evaluated and trained, and pictures that were decoded, with the formulas. They must be equal,
  or the benchmark fails;
- time: with what the first point of the axis predicts. Its seconds of an evaluation, of a trained row and of a picture, times
  the counts; where the model or the resolution changes, also times the floating-point operations of one row, which torch counts.

Resolutions and sizes are those of tiny SD3 pipelines with random weights, everything else is the embedded model. Scores are
a fixed sequence. On a CPU times are each process's own CPU seconds; with several processes, those of the first one.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import measuring
import torch
from counts import Counts, count_pipeline, make_reward
from datasets import Dataset
from overhead import Phases
from peft import LoraConfig
from transformers import TrainerCallback

import trl_flow
from trl_flow.policy import load_pipeline
from trl_flow.rollout import execute
from trl_flow.scripts.methods import METHODS


PROMPTS = [f"a {color} {shape}" for color in ("red", "green") for shape in ("circle", "square")]
SETTINGS = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "num_printed_samples": 0,
    "per_device_train_batch_size": len(PROMPTS),
    "num_inference_steps": 10,
    "num_generations": 6,
    "guidance_scale": 1.0,
    "max_sequence_length": 1,
    "sde_type": "cps",
    "noise_level": 0.8,
    "beta": 0.0,
    "activation_checkpointing": False,
    "rollout_batch_size": 64,
    "transition_batch_size": 64,
}
KINDS = ("evaluations", "rows", "pictures")


# ---- Closed forms, of one prompt group: evaluations, trained rows and pictures ----


def chains(steps: int, group: int, trained: int) -> tuple[int, int, int]:
    """Chains that share their initial noise."""
    return 1 + group * (steps - 1), 1 + group * (trained - 1), group


def dense(steps: int, group: int) -> tuple[int, int, int]:
    """Chains with full tails, the last step deterministic."""
    return group * steps * (steps + 1) // 2, group * (steps - 1), group * steps


def branches(steps: int, group: int, trained: int, strides: list[int]) -> tuple[int, int, int]:
    """A trunk with branches at the first steps, and tails of several strides."""
    tails = sum(
        sum(math.ceil((k - 1) / stride) for stride in strides) - 2 * (len(strides) - 1)
        for k in range(steps - trained + 1, steps + 1)
    )
    return trained + group * tails, trained, group * trained * len(strides)


# ---- Axes: points of (label, number, method, settings, closed form, what makes the pipeline) ----


def embedded():
    return load_pipeline("shapes")


def tiny(**changes):
    """The embedded pipeline with a denoiser of other sizes, and random weights."""

    def make():
        pipeline = load_pipeline("shapes")
        torch.manual_seed(0)
        kind = type(pipeline.transformer)
        config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
        pipeline.transformer = kind(**config | changes).eval()
        return pipeline

    return make


def flow(number, label, steps=10, group=6, make=embedded, **settings):
    trained = list(range(steps - 1))
    settings |= {"num_inference_steps": steps, "num_generations": group, "same_initial_noise": True}
    return number, label, "flow-grpo", settings | {"sde_steps": trained}, chains(steps, group, len(trained)), make


def g2rpo(number, label, trained, strides, steps=10, group=6):
    settings = {"num_inference_steps": steps, "num_generations": group, "granularities": strides}
    closed = branches(steps, group, trained, strides)
    return number, label, "g2rpo", settings | {"sde_steps": list(range(trained))}, closed, embedded


def dense_grpo(number, label, steps):
    settings = {"num_inference_steps": steps, "num_generations": 6}
    return number, label, "dense-grpo", settings, dense(steps, 6), embedded


def axes() -> dict[str, list]:
    large = tiny(pos_embed_max_size=32)
    return {
        "T, chains": [flow(t, f"T = {t}", steps=t) for t in (4, 6, 10, 14)],
        "T, full tails": [dense_grpo(t, f"T = {t}", t) for t in (3, 5, 7, 10)],
        "G": [flow(g, f"G = {g}", group=g) for g in (3, 6, 12, 24)],
        "trained steps": [g2rpo(m, f"{m} trained", m, [1]) for m in (1, 2, 4, 6)],
        "strides": [
            g2rpo(n, f"strides {', '.join(map(str, s))}", 4, s) for n, s in enumerate(([1], [1, 2], [1, 2, 3]), 1)
        ],
        "resolution": [
            flow(size, f"{size} pixels", steps=4, make=large, height=size, width=size) for size in (32, 64, 96, 128)
        ],
        "depth": [flow(n, f"{n} blocks", steps=4, make=tiny(num_layers=n)) for n in (2, 4, 8, 16)],
        "width": [
            flow(
                48 * n,
                f"width {48 * n}",
                steps=4,
                make=tiny(num_attention_heads=n, caption_projection_dim=48 * n),
            )
            for n in (2, 4, 8)
        ],
    }


# ---- Measuring ----


def make_trainer(folder: str, method: str, settings: dict, make, counts: Counts):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    count_pipeline(pipeline, counts)
    return getattr(trl_flow, METHODS[method].trainer)(
        pipeline,
        make_reward("score", counts),
        args=getattr(trl_flow, METHODS[method].config)(output_dir=folder, **SETTINGS | settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )


def operations_of_rows(trainer) -> dict[str, int]:
    """Floating-point operations of one row: of an evaluation, of a trained row (twice as many backward), of decoding a picture."""
    policy = trainer.policy
    latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
    conditioning = policy.conditioning([PROMPTS[0]])
    with torch.no_grad():
        evaluation = measuring.operations(lambda: policy(latents, 0.5, conditioning))
    trained = measuring.operations(lambda: policy(latents, 0.5, conditioning).mean().backward())
    policy.zero_grad()
    return {
        "evaluations": evaluation,
        "rows": trained,
        "pictures": measuring.operations(lambda: policy.decode(latents)),
    }


class Point:
    """A setting that is measured again and again."""

    def __init__(self, number, label, method, settings, closed_form, make):
        self.number, self.label, self.method, self.closed_form = number, label, method, closed_form
        self.counts, self.phases = Counts(), Phases()
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = make_trainer(self._folder.name, method, settings, make, self.counts)
        self.operations = operations_of_rows(self.trainer)
        self.seconds = []
        for name, phase in (
            ("start_decoding", "pictures"),
            ("start_rewards", "pictures"),
            ("_forward_backward", "rows"),
        ):
            setattr(self.trainer, name, self.phases.within(phase, getattr(self.trainer, name)))
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()

    def measure(self):
        """Samples and trains one rollout."""
        trainer = self.trainer
        self.counts.numbers["setup"].clear()
        rows = [trainer.train_dataset[number] for number in range(len(PROMPTS))]
        before = trainer._nfe, trainer._rows_trained
        self.phases.is_on = True
        self.phases.start()
        with (
            mock.patch("trl_flow.trainer.rollouts.execute", self.phases.within("evaluations", execute)),
            torch.no_grad(),
        ):
            micro_batches = trainer._generate_and_score(rows)
        for micro_batch in micro_batches:
            trainer._forward_backward(trainer.model, micro_batch)
        seconds = self.phases.stop()
        self.phases.is_on = False
        trainer.policy.zero_grad()
        trained = trainer._rows_trained - before[1]
        self.measured = {
            "evaluations": trainer._nfe - before[0] - trained,
            "rows": trained,
            "pictures": self.counts.numbers["setup"]["pictures decoded"],
        }
        self.seconds.append({kind: seconds[kind] for kind in KINDS})

    def median(self) -> dict[str, float]:
        return {kind: statistics.median(seconds[kind] for seconds in self.seconds) for kind in KINDS}


def measure_axis(points: list[tuple], repeats: int) -> list[dict]:
    """Counts and seconds of the points of one axis, and what the first of them predicts for the others."""
    points = [Point(*point) for point in points]
    for repeat, point in itertools.product(range(repeats + 1), points):
        point.measure()
        if repeat == 0:
            point.seconds.clear()  # prompts are encoded, memory is fetched
    first = points[0]
    unit = {kind: first.median()[kind] / first.measured[kind] / first.operations[kind] for kind in KINDS}
    records = []
    for point in points:
        closed_form = {kind: len(PROMPTS) * count for kind, count in zip(KINDS, point.closed_form, strict=True)}
        predicted = sum(unit[kind] * closed_form[kind] * point.operations[kind] for kind in KINDS)
        seconds = point.median()
        records.append(
            {
                "label": point.label,
                "number": point.number,
                "method": point.method,
                "measured": point.measured,
                "closed_form": closed_form,
                "operations": point.operations,
                "seconds": seconds,
                "total": sum(seconds.values()),
                "predicted": predicted,
            }
        )
    return records


class Processes(TrainerCallback):
    """Seconds of each update of one process."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(measuring.clock())

    def on_train_end(self, args, state, control, **kwargs):
        self.times.append(measuring.clock())


def work(folder: Path, repeats: int):
    """One process of several: writes its counts and seconds of an update."""
    counts, watch = Counts(), Processes()
    _, _, method, settings, _, make = flow(0, "")
    size = int(os.environ["WORLD_SIZE"])
    settings |= {"per_device_train_batch_size": len(PROMPTS) // size, "max_steps": repeats + 1}
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(output, method, settings, make, counts)
        trainer.add_callback(watch)
        with mock.patch("trl_flow.report.live.write_report"):
            # Test pictures, and the one that tells their size, are none of an update's.
            trainer.check_reward_functions()
            counts.numbers["setup"].clear()
            with mock.patch.object(trainer, "check_reward_functions"):
                trainer.train()
    updates = repeats + 1
    seconds = sorted(b - a for a, b in itertools.pairwise(watch.times[1:]))
    record = {
        "evaluations": (trainer._nfe - trainer._rows_trained) / updates,
        "rows": trainer._rows_trained / updates,
        "pictures": counts.numbers["setup"]["pictures decoded"] / updates,
        "seconds": statistics.median(seconds),
    }
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(record))


def measure_processes(numbers: list[int], repeats: int) -> list[dict]:
    """The same prompts on several processes: each has its share of all counts."""
    records = []
    closed_form = flow(0, "")[4]
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            command += [__file__, "--worker", folder, "--repeats", str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        share = {kind: len(PROMPTS) // number * count for kind, count in zip(KINDS, closed_form, strict=True)}
        for rank in ranks[1:]:
            if any(rank[kind] != ranks[0][kind] for kind in KINDS):
                raise RuntimeError(f"Processes have different shares: {ranks}")
        first = records[0] if records else {"number": number, "total": ranks[0]["seconds"]}
        records.append(
            {
                "label": f"{number} process{'es' if number > 1 else ''}",
                "number": number,
                "method": "flow-grpo",
                "measured": {kind: round(ranks[0][kind]) for kind in KINDS},
                "closed_form": share,
                "total": statistics.mean(rank["seconds"] for rank in ranks),
                "predicted": first["total"] * first["number"] / number,
            }
        )
    return records


# ---- Table and picture ----


def differing(results: dict[str, list[dict]]) -> list[str]:
    return [
        f"{axis}, {point['label']}: {point['measured']}, not {point['closed_form']}"
        for axis, points in results.items()
        for point in points
        if point["measured"] != point["closed_form"]
    ]


def table(results: dict[str, list[dict]], facts: dict) -> str:
    text = (
        f"Sampling and training {len(PROMPTS)} prompts: counts, all of which equal the closed forms of docs/scaling.md, and seconds "
        "beside what the first point of each axis predicts. [growth.py](../growth.py) says how.\n\n"
    )
    rows = [
        [
            point["label"],
            axis,
            point["method"],
            *(point["measured"][kind] for kind in KINDS),
            f"{point['total']:.3f}",
            f"{point['predicted']:.3f}",
            f"{point['total'] / point['predicted']:.2f}",
        ]
        for axis, points in results.items()
        for point in points
    ]
    header = ["point", "axis", "method", "evaluations", "trained rows", "pictures", "seconds", "predicted", "ratio"]
    return f"{text}{measuring.markdown(header, rows)}\n{measuring.origin(facts)}\n"


def draw(results: dict[str, list[dict]]):
    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    figure = measuring.new_figure(3.6 * columns, 2.7 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for plot, (axis, points) in zip(grid, results.items(), strict=False):
        numbers = [point["number"] for point in points]
        plot.plot(
            numbers,
            [point["predicted"] for point in points],
            color="#999999",
            linestyle="--",
            label="predicted from the first point",
        )
        plot.plot(numbers, [point["total"] for point in points], "o-", color=measuring.COLORS[0], label="measured")
        plot.set(title=axis, ylabel="seconds", ylim=(0, None), xticks=numbers)
        plot.spines[["top", "right"]].set_visible(False)
        if axis == "strides":
            plot.set_xticklabels([point["label"].removeprefix("strides ") for point in points])
    for plot in grid[len(results) :]:
        plot.axis("off")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    names = [*axes(), "processes"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--points", type=int, help="measure only so many points of each axis")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "growth")
    args = parser.parse_args(argv)
    measuring.quieten()
    if args.worker is not None:
        work(args.worker, args.repeats)
        return 0
    results = {}
    for axis in args.axes:
        print(f"{axis} ...", file=sys.stderr)
        if axis == "processes":
            results[axis] = measure_processes(args.processes, args.repeats)
        else:
            results[axis] = measure_axis(axes()[axis][: args.points], args.repeats)
    facts = measuring.machine()
    measuring.write(
        args.output, {**facts, "prompts": len(PROMPTS), "axes": results}, table(results, facts), draw(results)
    )
    if wrong := differing(results):
        print("Counts that are not those of the closed forms:", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
