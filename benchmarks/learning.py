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

"""Does it learn? Each method of the shapes world on several seeds, scored on held-out prompts, base and adapter paired.

    python benchmarks/learning.py --methods dense-grpo g2rpo flow-grpo --seeds 1 2 3

Runs `trl-flow METHOD --config examples/shapes/METHOD.yaml` for each seed (those whose run directory exists are read
instead), prints a table and writes `learning.json` and `learning.png`. The rise of a score is given with the 95 % interval
of the paired differences over the held-out pictures: the same prompts and the same noise before and after.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trl_flow.report.history import paired_difference


SCORES = ("shapes", "shapes_strict", "shapes_partial")


def paired(run: Path) -> dict:
    """Scores of the first and last evaluation of a run, and their paired differences."""
    records = [json.loads(path.read_text())["scores"] for path in sorted((run / "samples").glob("step_*.json"))]
    result = {}
    for name in SCORES:
        before, after = records[0][name], records[-1][name]
        rise, half_interval, _ = paired_difference(before, after)
        result[name] = {
            "before": statistics.mean(before),
            "after": statistics.mean(after),
            "rise": rise,
            "half_interval": half_interval,
        }
    return result


def curve(run: Path) -> dict:
    """Held-out scores over the seconds of training, and what the run cost."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    seconds, evaluations, points = 0.0, 0, []
    for entry in history:
        if "time/elapsed" in entry:
            seconds, evaluations = entry["time/elapsed"], entry["nfe"]
        if "eval_reward" in entry:
            points.append({"seconds": seconds, **{name: entry[f"eval_rewards/{name}/mean"] for name in SCORES}})
    return {"curve": points, "seconds": seconds, "velocity_rows": evaluations, "updates": history[-1]["step"]}


def draw(results: list[dict], path: Path):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    colors = dict(zip(dict.fromkeys(r["method"] for r in results), ("#2166ac", "#d6604d", "#4d9221"), strict=False))
    for axes, name in zip(figure.subplots(1, 3), SCORES, strict=True):
        for result in results:
            axes.plot(
                [point["seconds"] for point in result["curve"]],
                [point[name] for point in result["curve"]],
                color=colors[result["method"]],
                label=result["method"],
                alpha=0.8,
            )
        axes.set(xlabel="seconds of training", title=f"held-out {name}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dense-grpo", "g2rpo", "flow-grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--runs", default="runs/learning", help="where the runs are, and go")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="further arguments of every run, after --")
    args = parser.parse_args()
    results = []
    for method in args.methods:
        for seed in args.seeds:
            run = Path(args.runs) / f"{method}-seed{seed}"
            if not (run / "report.html").is_file():
                command = [sys.executable, "-m", "trl_flow.cli", method, "--config", f"examples/shapes/{method}.yaml"]
                command += ["--output_dir", str(run), "--seed", str(seed), *args.overrides]
                subprocess.run(command, check=True)
            results.append({"method": method, "seed": seed, **curve(run), "held_out": paired(run)})

    print(f"{'method':12} {'seed':>4} {'seconds':>8} {'updates':>8}", *(f"{name:>24}" for name in SCORES))
    for result in results:
        cells = [
            f"{result['held_out'][name]['before']:.3f} {result['held_out'][name]['rise']:+.3f} "
            f"± {result['held_out'][name]['half_interval']:.3f}"
            for name in SCORES
        ]
        print(
            f"{result['method']:12} {result['seed']:4} {result['seconds']:8.0f} {result['updates']:8}",
            *(f"{cell:>24}" for cell in cells),
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "runs": results,
    }
    (output / "learning.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, output / "learning.png")


if __name__ == "__main__":
    main()
