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


"""What the benchmarks share: a trainer of an example, what the machine is, times of things that take turns, and results as files."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import accelerate
import diffusers
import peft
import torch
import transformers
import trl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import trl_flow
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.training import make_trainer, make_training_parser


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLORS = ("#2166ac", "#d6604d", "#4d9221", "#b2813f", "#762a83")


def example_trainer(method: str, folder: str | Path, **settings):
    """The trainer of a method's example in the shapes world, with other settings; no evaluation, nothing saved on the way."""
    settings = {
        "output_dir": folder,
        "eval_strategy": "no",
        "eval_on_start": False,
        "disable_tqdm": True,
        "num_printed_samples": 0,
        **settings,
    }
    words = ["--config", str(ROOT / "examples" / "shapes" / f"{method}.yaml")]
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    script_args, training_args = make_training_parser(method).parse_args_and_config(words)
    script_args.eval_reward_funcs = None
    return make_trainer(getattr(trl_flow, METHODS[method].trainer), script_args, training_args)


def quieten():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()


def clock() -> float:
    """
    Seconds, of which differences count: of this process's work on the CPU, which other processes on the machine take nothing of,
    or of the wall where a GPU works.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def take_turns(
    calls: dict[str, Callable[[], object]], repeats: int, now: Callable[[], float] = clock
) -> dict[str, list[float]]:
    """
    Seconds of each of several calls, `repeats` times after a first one: in turn, so that what disturbs one disturbs all.
    """
    seconds = {name: [] for name in calls}
    for repeat in range(1 + repeats):
        for name, call in calls.items():
            began = now()
            call()
            if repeat:
                seconds[name].append(now() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of times that were taken in turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of a call's products and convolutions, backward passes included."""
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            # What attention is on a CPU, of which torch does not know it.
            aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **kwargs: sdpa_flop_count(*shapes[:3]),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **kwargs: (
                sdpa_backward_flop_count(*shapes[:4])
            ),
        },
    )
    with counter:
        call()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of products of large matrices: the most of the best of several runs."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = take_turns({"matmul": lambda: [a @ b for _ in range(10)]}, repeats=5)["matmul"]
    return 10 * 2 * size**3 / min(times)


def machine() -> dict:
    """What ran this, and where."""
    cpu = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    libraries = (torch, diffusers, transformers, peft, accelerate, trl, trl_flow)
    on_gpu = torch.cuda.is_available()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Running processes in the last minute, this one among them: more than the cores have disturbed each other.
        "load": load,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "clock": "wall time" if on_gpu else "CPU time of the process",
        "python": platform.python_version(),
        "versions": {library.__name__: library.__version__ for library in libraries},
    }


def origin(facts: dict) -> str:
    """Where figures are from, as a sentence under a table."""
    device = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} torch threads"
    load = "" if facts["load"] is None else f", load {facts['load']:.1f}"
    return f"`{facts['command']}` on {facts['date']}: {device}{load}; {facts['clock']}."


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(output: Path, record: dict, text: str, figure: Figure):
    """`NAME.json`, `NAME.md` and `NAME.png`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
    figure.savefig(output.with_suffix(".png"), dpi=130)
    print(text)
