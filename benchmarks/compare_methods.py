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


"""Which method learns most from the same cost? All of them on the shapes world, at equal budgets and on several seeds.

    python benchmarks/compare_methods.py                       # everything: an hour and a half on two cores
    python benchmarks/compare_methods.py --only dense-grpo g2rpo --seeds 1
    python benchmarks/compare_methods.py --draw                # the tables and pictures again, from the JSON

Every run has the settings of `examples/shapes/flow-grpo.yaml` with a constant learning rate, and those that `RUNS` names.
It goes on until two budgets are used up: one of evaluations, in which a training row counts as three (a forward and a
backward pass of twice its cost), and one of time on one thread, evaluation excluded. The seconds of an evaluation are measured
for all runs in turn before the first begins (`timing.json`), so that what else the machine does later favours no method. The scores at each budget
are those of the evaluation that follows the update that used it up: 1,024 held-out prompts, the same prompts and noise in
every evaluation of a run, so that rises are paired. At the end come the distance from the base model (mean squared
difference of the velocities along the sampler's own trajectories) and the diversity of pictures (mean standard deviation
of a pixel over four noises of one prompt); some runs are sampled with more steps, too.

Writes `compare_methods.json`, `.md`, `_methods.png`, `_curves.png` and `_ablations.png`.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback

from trl_flow.report.history import paired_difference


COMMON = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 100_000,
    "eval_strategy": "steps",
    "eval_steps": 100_000,
    "num_logged_images": 0,
    "logging_steps": 100_000,
    "disable_tqdm": True,
}
TWO_UPDATES = {"per_device_train_batch_size": 12, "steps_per_generation": 2}
WINDOW = {"sde_steps": None, "sde_window_size": 1, "sde_window_range": [0, 2]}
FORWARD = {
    "sde_steps": [0, 1, 2],
    "timestep_fraction": 0.67,
    "sde_type": None,
    "noise_level": None,
    "same_initial_noise": None,
}

# Name -> command, its settings, and in which comparison it stands. Settings that are not named are everyone's.
METHODS = {
    "Flow-GRPO": ("flow-grpo", {}),
    "Flow-GRPO, 2 updates per rollout": ("flow-grpo", TWO_UPDATES),
    "GRPO-Guard, 2 updates": ("flow-grpo", {**TWO_UPDATES, "objective": "guard", "step_weighting": "guard"}),
    "Flow-DPPO, 2 updates": (
        "flow-grpo",
        {**TWO_UPDATES, "objective": "dppo", "kl_mask_threshold": 1e-3, "epsilon": None},
    ),
    "Flow-GRPO-Fast": ("flow-grpo-fast", {**WINDOW, "same_initial_noise": False}),
    "Flow-GRPO-Fast, shared trunk": ("flow-grpo-fast", WINDOW),
    "DanceGRPO": ("dance-grpo", {"sde_type": "dance", "noise_level": 1.0, "timestep_fraction": 0.5}),
    "MixGRPO": ("mix-grpo", {**WINDOW, "sde_window_interval": 10}),
    "MixGRPO-Flash": ("mix-grpo", {**WINDOW, "sde_window_interval": 10, "flash_ratio": 0.4}),
    "CoCA": ("coca", {"similarity_window": 2}),
    "TempFlow-GRPO": (
        "temp-flow-grpo",
        {"num_seeds": 2, "num_generations": 6, "per_device_train_batch_size": 48, "step_weighting": "noise"},
    ),
    "TP-GRPO": ("turning-point-grpo", {}),
    "DenseGRPO": ("dense-grpo", {}),
    "G2RPO {1}": ("g2rpo", {"granularities": [1]}),
    "DiffusionNFT": ("diffusion-nft", {**FORWARD, "epsilon": None}),
    "AWM": ("awm", {**FORWARD, "epsilon": 1.0}),
    "B2-DiffuRL": (
        "b2-diffu-rl",
        {"sde_steps": None, "sde_window_size": 1, "sde_window_range": [0, 2], "sde_window_interval": 20},
    ),
}
PSI = "benchmarks/results/noise_levels_shapes_4_steps.json"
ABLATIONS = {
    "DenseGRPO, value after the step": ("dense-grpo", {"dense_reward": "value"}),
    "DenseGRPO, n = 1": ("dense-grpo", {"tail_steps": 1}),
    "DenseGRPO, n = 2": ("dense-grpo", {"tail_steps": 2}),
    "DenseGRPO, uniform noise a = 0.7": ("dense-grpo", {"sde_type": "flow", "noise_level": 0.7}),
    "DenseGRPO, calibrated noise": ("dense-grpo", {"sde_type": "dance", "noise_level": PSI}),
    "G2RPO {1, 2}": ("g2rpo", {"granularities": [1, 2]}),
    "G2RPO {1, 3}": ("g2rpo", {"granularities": [1, 3]}),
    "G2RPO {1, 2, 3}": ("g2rpo", {"granularities": [1, 2, 3]}),
}
GROUPS = {
    "What a step is credited with": [
        "Flow-GRPO",
        "CoCA",
        "TP-GRPO",
        "DenseGRPO, value after the step",
        "DenseGRPO",
    ],
    "Steps of a tail": [
        "Flow-GRPO",
        "DenseGRPO, n = 1",
        "DenseGRPO, n = 2",
        "DenseGRPO",
    ],
    "Noise of DenseGRPO": ["DenseGRPO, uniform noise a = 0.7", "DenseGRPO, calibrated noise", "DenseGRPO"],
    "Strides of G2RPO": ["G2RPO {1}", "G2RPO {1, 2}", "G2RPO {1, 3}", "G2RPO {1, 2, 3}"],
}
MORE_STEPS = ("Flow-GRPO", "G2RPO {1}", "G2RPO {1, 2}", "G2RPO {1, 3}", "G2RPO {1, 2, 3}")
RUNS = METHODS | ABLATIONS
SCORES = ("shapes", "shapes_strict", "shapes_partial")
BUDGETS = {"evaluations": "equal evaluations", "seconds": "equal time"}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


class Budget(TrainerCallback):
    """Counts what a run costs, evaluates at the marks of its budgets, and ends it when both are used up."""

    def __init__(self, trainer, evaluations: float, seconds: float, seconds_per_evaluation: float, marks: int = 4):
        self.trainer, self.limits = trainer, {"evaluations": evaluations, "seconds": seconds}
        self.seconds_per_evaluation = seconds_per_evaluation
        self.due = {
            "evaluations": [evaluations * (k + 1) / marks for k in range(marks)],
            "seconds": [seconds],
        }
        self.reached, self.points = {}, []

    def cost(self) -> dict:
        evaluations = evaluations_of(self.trainer)
        return {"evaluations": evaluations, "seconds": evaluations * self.seconds_per_evaluation}

    def on_step_end(self, args, state, control, **kwargs):
        for name, value in self.cost().items():
            if self.due[name] and value >= self.due[name][0]:
                control.should_evaluate = True
                while self.due[name] and value >= self.due[name][0]:
                    self.due[name].pop(0)
                if not self.due[name]:
                    self.reached[name] = state.global_step
        control.should_training_stop = all(self.cost()[name] >= limit for name, limit in self.limits.items())

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        scores = {name: metrics[f"eval_rewards/{name}/mean"] for name in SCORES}
        self.points.append({"update": state.global_step, **self.cost(), **scores})


def evaluations_of(trainer) -> int:
    """Rows of velocity evaluated so far; a trained one counts as three."""
    return trainer._nfe + 2 * trainer._rows_trained


class Stopwatch(TrainerCallback):
    """Processor seconds and evaluations of each update, of which there are `updates`."""

    def __init__(self, trainer, updates: int):
        self.trainer, self.updates, self.seconds, self.evaluations = trainer, updates, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()
        self.before = evaluations_of(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.began)
        self.evaluations.append(evaluations_of(self.trainer) - self.before)
        control.should_training_stop = len(self.seconds) == self.updates


def trainer_of(name: str, seed: int, directory: Path, **changes):
    import trl_flow
    from trl_flow.scripts.arguments import FlowScriptArguments
    from trl_flow.scripts.methods import METHODS as COMMANDS
    from trl_flow.scripts.quiet import quieten
    from trl_flow.scripts.training import make_trainer

    quieten(progress_bars=False)
    command, settings = RUNS[name]
    settings = yaml.safe_load(Path("examples/shapes/flow-grpo.yaml").read_text()) | COMMON | settings | changes
    settings = {key: value for key, value in settings.items() if value is not None} | {"seed": seed}
    ours = {field.name for field in dataclasses.fields(FlowScriptArguments)}
    script_args = FlowScriptArguments(**{key: value for key, value in settings.items() if key in ours})
    config = getattr(trl_flow, COMMANDS[command].config)(
        output_dir=str(directory), **{key: value for key, value in settings.items() if key not in ours}
    )
    return make_trainer(getattr(trl_flow, COMMANDS[command].trainer), script_args, config)


def measure_seconds(names: list[str], path: Path, known: dict[str, float], rounds: int = 2, updates: int = 6):
    """Seconds per evaluation of every run, in turn, `rounds` times; the least counts, without the first two updates."""
    measured = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as directory:
                trainer = trainer_of(name, 0, Path(directory) / "run", eval_strategy="no", logging_steps=1)
                stopwatch = Stopwatch(trainer, updates)
                trainer.add_callback(stopwatch)
                trainer.train()
            measured[name].append(sum(stopwatch.seconds[2:]) / sum(stopwatch.evaluations[2:]))
            print(f"round {number + 1}, {name}: {1000 * measured[name][-1]:.3f} ms per evaluation", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    known |= {name: min(values) for name, values in measured.items()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def run(name: str, seed: int, directory: Path, evaluations: float, seconds: float):
    """One run, in this process. Leaves `bench.json` in its directory."""
    seconds_per_evaluation = json.loads((directory.parent / "timing.json").read_text())[name]
    trainer = trainer_of(name, seed, directory)
    budget = Budget(trainer, evaluations, seconds, seconds_per_evaluation)
    trainer.add_callback(budget)
    trainer.train()
    command, changes = RUNS[name]
    record = {
        "name": name,
        "seed": seed,
        "command": command,
        "settings": changes,
        "seconds_per_evaluation": seconds_per_evaluation,
        "reached": budget.reached,
        "points": list(budget.points),
        "held_out": {key: paired(directory, step, SCORES) for key, step in budget.reached.items()},
        **at_the_end(trainer),
    }
    if name in MORE_STEPS:
        record["more_steps"] = more_steps(trainer, directory.parent / f"base-{seed}.json")
    (directory / "bench.json").write_text(json.dumps(record) + "\n")


def paired(directory: Path, step: int, names) -> dict:
    """Rise of each score since the beginning, with half its 95 % interval over the held-out prompts."""
    before, after = (
        json.loads((directory / "samples" / f"step_{number:06d}.json").read_text())["scores"] for number in (0, step)
    )
    result = {}
    for name in names:
        rise, half_interval, _ = paired_difference(before[name], after[name])
        result[name] = {"before": statistics.mean(before[name]), "rise": rise, "half_interval": half_interval}
    return result


@torch.no_grad()
def at_the_end(trainer, num_prompts: int = 64, num_noises: int = 4) -> dict:
    """Distance from the base model, and diversity."""
    from trl_flow.rollout import execute, seeded_noise
    from trl_flow.trainer.evaluation import deterministic_plan

    distances, spreads = [], []
    plan = deterministic_plan(trainer.args.num_inference_steps)
    prompts = trainer.eval_dataset["prompt"][:num_prompts]
    with trainer.averaged_weights():
        conditioning = trainer.conditioning([prompt for prompt in prompts for _ in range(num_noises)], None)
        policy = trainer.velocity(conditioning)

        def velocity(latents, sigma, prompt):
            value = policy(latents, sigma, prompt)
            with trainer.policy.reference():
                distances.append((value - policy(latents, sigma, prompt)).square().mean().item())
            return value

        noise = [
            seeded_noise("diversity", prompt, number, num_draws=1, latent_shape=trainer.policy.latent_shape)
            for prompt in prompts
            for number in range(num_noises)
        ]
        rollout = execute(plan, velocity, trainer.sigmas, torch.stack(noise), [0.0] * plan.num_steps)
        pictures = trainer.policy.decode(rollout.leaves[:, 0]).unflatten(0, (num_prompts, num_noises))
        spreads = pictures.std(1).mean().item()
    return {"distance": statistics.mean(distances), "diversity": spreads}


def more_steps(trainer, of_base: Path, num_prompts: int = 512) -> dict:
    """Held-out scores with other numbers of sampling steps, of the base (once for each seed) and of the adapter."""
    dataset = trainer.eval_dataset.select(range(num_prompts))

    def scores() -> dict:
        found = {}
        for steps in ("10", "20", "40"):
            trainer.args.num_eval_inference_steps = int(steps)
            found[steps] = trainer.evaluate(dataset)["eval_reward"]
        return found

    if not of_base.is_file():
        with trainer.policy.reference():
            of_base.write_text(json.dumps(scores()))
    before, after = json.loads(of_base.read_text()), scores()
    return {steps: {"before": before[steps], "after": after[steps]} for steps in after}


# ---- Tables and pictures ----


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def rises(records: list[dict], name: str, budget: str, score: str = "shapes") -> list[float]:
    return [r["held_out"][budget][score]["rise"] for r in records if r["name"] == name]


def cell(values: list[float], sign: str = "+") -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.3f} ± {spread:.3f}"


def table(records: list[dict], names) -> str:
    """One row per run and budget: what it cost, and the rise of each score, mean ± standard deviation over the seeds."""
    lines = []
    for budget, label in BUDGETS.items():
        lines += [
            f"At {label}:",
            "",
            "| method | updates | evaluations | seconds | `shapes` | `shapes_strict` | `shapes_partial` |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in names:
            runs = [r for r in records if r["name"] == name]
            if not runs:
                continue
            reached = [next(p for p in r["points"] if p["update"] == r["reached"][budget]) for r in runs]
            cost = [statistics.mean(p[key] for p in reached) for key in ("update", "evaluations", "seconds")]
            cells = [name, f"{cost[0]:.0f}", f"{cost[1]:,.0f}", f"{cost[2]:.0f}"]
            cells += [cell(rises(records, name, budget, score)) for score in SCORES]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def table_of_ends(records: list[dict], names) -> str:
    lines = ["| method | distance from the base model | diversity |", "|---|---|---|"]
    for name in names:
        if runs := [r for r in records if r["name"] == name]:
            lines.append(
                f"| {name} | {cell([r['distance'] for r in runs], '')} | {cell([r['diversity'] for r in runs], '')} |"
            )
    return "\n".join(lines)


def forest(figure: Figure, records: list[dict], groups: dict[str, list[str]]):
    """Rises as dots, one per seed, with their mean as a bar; a row of panels per group, a column per budget."""
    sizes = [len(names) for names in groups.values()]
    grid = figure.subplots(len(groups), 2, squeeze=False, sharex=True, gridspec_kw={"height_ratios": sizes})
    for row, (title, names) in zip(grid, groups.items(), strict=True):
        for axes, (budget, label) in zip(row, BUDGETS.items(), strict=True):
            for y, name in enumerate(names):
                values = rises(records, name, budget)
                if values:
                    axes.plot(values, [y] * len(values), "o", color="#2166ac", alpha=0.6, markersize=5)
                    axes.plot(statistics.mean(values), y, "|", color="black", markersize=14, markeredgewidth=2)
            axes.set_yticks(range(len(names)), names if axes is row[0] else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.grid(axis="x", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{title}, {label}" if title else f"At {label}", fontsize=10, loc="left")
    figure.supxlabel("rise of the held-out score: a dot per seed, a bar for their mean", fontsize=10)


def curves(figure: Figure, records: list[dict]):
    names = list(METHODS)
    columns = 4
    rows = -(-len(names) // columns)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True).flatten()
    for axes, name in zip(grid, names, strict=False):
        for record in records:
            if record["name"] in ("Flow-GRPO", name):
                start = record["points"][0]["shapes"]
                axes.plot(
                    [point["evaluations"] / 1000 for point in record["points"]],
                    [point["shapes"] - start for point in record["points"]],
                    color="#2166ac" if record["name"] == name else "0.75",
                    zorder=2 if record["name"] == name else 1,
                )
        axes.set_title(name, fontsize=9)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes in grid[len(names) - columns : len(names)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("thousand evaluations (a training row counts as three); Flow-GRPO in grey", fontsize=10)
    figure.supylabel("rise of the held-out score", fontsize=10)


def save(figure: Figure, path: Path):
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def draw(document: dict, output: Path):
    records = document["runs"]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    forest(figure, records, {"": list(METHODS)})
    save(figure, output / "compare_methods_methods.png")
    figure = Figure(figsize=(11, 10), layout="constrained")
    curves(figure, records)
    save(figure, output / "compare_methods_curves.png")
    figure = Figure(figsize=(11, 8), layout="constrained")
    forest(figure, records, GROUPS)
    save(figure, output / "compare_methods_ablations.png")

    base = statistics.mean(r["held_out"]["seconds"]["shapes"]["before"] for r in records)
    text = [
        "# Methods at equal budgets on the shapes world",
        "",
        f"Held-out score `shapes` (base {base:.3f}) after {document['budgets']['evaluations']:,.0f} evaluations and after "
        f"{document['budgets']['seconds']:.0f} seconds of one thread; mean ± standard deviation over the seeds "
        f"{', '.join(map(str, sorted({r['seed'] for r in records})))}. The 95 % interval of one run's rise is about "
        f"± {statistics.mean(r['held_out']['seconds']['shapes']['half_interval'] for r in records):.3f}. "
        f"Hardware: {document['hardware']}. `python benchmarks/compare_methods.py` makes this page.",
        "",
        "Every run has the learning rate of the Flow-GRPO example, constant, and nothing was tuned for any other method. Steps",
        "are few (4), so that windows are one step wide, and the tail of MixGRPO-Flash is a single step. Scores are those of the",
        "first evaluation at or beyond the budget.",
        "",
        "## Methods",
        "",
        table(records, METHODS),
        "At the end of each run, beyond both budgets:",
        "",
        table_of_ends(records, METHODS),
    ]
    for title, names in GROUPS.items():
        text += ["", f"## {title}", "", table(records, names).rstrip()]
    text += ["", "## Sampled with more steps", "", "Trained with 4 steps; mean rise over the seeds, 512 prompts.", ""]
    text += ["| run | 10 steps | 20 steps | 40 steps |", "|---|---|---|---|"]
    for name in MORE_STEPS:
        runs = [r["more_steps"] for r in records if r["name"] == name]
        cells = [
            f"{statistics.mean([r[steps]['after'] - r[steps]['before'] for r in runs]):+.3f}"
            for steps in ("10", "20", "40")
            if runs
        ]
        text.append(f"| {name} | {' | '.join(cells)} |")
    (output / "compare_methods.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="runs, by their names above or slugs of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--evaluations", type=float, default=80_000, help="budget of evaluations")
    parser.add_argument("--seconds", type=float, default=50, help="budget of processor time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", default="runs/compare_methods", help="where the runs are, and go")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--hardware", default=f"{platform.machine()}, CPU, one thread per run")
    parser.add_argument("--draw", action="store_true", help="make the tables and pictures from the JSON")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "SEED", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    output = Path(args.output)
    if args.run:
        torch.set_num_threads(1)
        return run(args.run[0], int(args.run[1]), Path(args.run[2]), args.evaluations, args.seconds)
    if args.draw:
        return draw(json.loads((output / "compare_methods.json").read_text()), output)

    names = [name for name in RUNS if name in args.only or slug(name) in args.only]
    queue = [(name, seed, Path(args.runs) / f"{slug(name)}-{seed}") for seed in args.seeds for name in names]
    timing = Path(args.runs) / "timing.json"
    known = json.loads(timing.read_text()) if timing.is_file() else {}
    if unknown := [name for name in names if name not in known]:
        torch.set_num_threads(1)
        measure_seconds(unknown, timing, known)
    waiting = [job for job in queue if not (job[2] / "bench.json").is_file()]
    active = []
    while waiting or active:
        while waiting and len(active) < args.jobs:
            name, seed, directory = waiting.pop(0)
            command = [sys.executable, __file__, "--run", name, str(seed), str(directory)]
            command += ["--evaluations", str(args.evaluations), "--seconds", str(args.seconds)]
            active.append((name, seed, subprocess.Popen(command)))
        time.sleep(0.5)
        for job in [job for job in active if job[2].poll() is not None]:
            active.remove(job)
            print(f"{job[0]}, seed {job[1]}: {'done' if job[2].returncode == 0 else 'FAILED'}", flush=True)
    records = [json.loads((job[2] / "bench.json").read_text()) for job in queue if (job[2] / "bench.json").is_file()]
    document = {
        "hardware": args.hardware,
        "budgets": {"evaluations": args.evaluations, "seconds": args.seconds},
        "runs": records,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare_methods.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(document, output)


if __name__ == "__main__":
    main()
