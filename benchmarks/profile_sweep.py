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

"""Does the host wait inside a sweep? What torch's profiler sees of one update of the embedded model, phase by phase.

    python benchmarks/profile_sweep.py                        # dense-grpo, a minute; writes profile_sweep.json and .md
    python benchmarks/profile_sweep.py --method g2rpo --trace trace.json

What waits for a GPU: a number that is read (aten::_local_scalar_dense: `.item()`, `bool()`), operations whose result has as
many elements as the values say (aten::nonzero, which masks as indices call, too), and the runtime's own calls: copies by
cudaMemcpyAsync wait where memory is not pinned. On a CPU there are no runtime's calls to count; numbers that are read count
also where they would be on the CPU of a machine with a GPU, and a table that is made of Python's numbers does not count.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import measuring
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trl_flow.rollout import execute


NAMES = {
    "numbers read": ("aten::_local_scalar_dense",),
    "sizes read": ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive"),
    "cudaMemcpyAsync": ("cudaMemcpyAsync",),
    "waits for CUDA": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}
PHASES = ("sweep", "decoding", "training")


def within(phase: str, function):
    """`function`, marked in the profile."""

    def call(*args, **kwargs):
        with record_function(f"phase {phase}"):
            return function(*args, **kwargs)

    return call


def counts(events: list) -> dict[str, dict[str, int]]:
    """What is in the phases of a profile: phase -> name -> number."""
    spans = [
        (event.name.removeprefix("phase "), event.time_range)
        for event in events
        if event.name.startswith("phase ") and event.device_type.name == "CPU"
    ]
    found = {phase: Counter(times=sum(name == phase for name, _ in spans)) for phase in PHASES}
    for event in events:
        if event.device_type.name != "CPU":
            continue
        for phase, span in spans:
            if span.start <= event.time_range.start < span.end:
                # Of operators that call others, the outermost.
                is_inner = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
                found[phase]["operators"] += event.name.startswith("aten::") and not is_inner
                for name, members in NAMES.items():
                    found[phase][name] += event.name in members
    return {phase: dict(numbers) for phase, numbers in found.items()}


def profiled(method: str, trace: Path | None) -> dict:
    """The counts of the second of two updates: the first calls of a kernel may wait."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = measuring.example_trainer(
            method, folder, max_steps=1, save_strategy="no", per_device_train_batch_size=2, num_generations=4
        )
        policy = trainer.policy
        policy.start_decoding = within("decoding", policy.start_decoding)
        trainer._forward_backward = within("training", trainer._forward_backward)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        rows = [trainer.train_dataset[number] for number in range(2)]

        def update():
            with torch.no_grad():
                micro_batches = trainer._generate_and_score(rows)
            for micro_batch in micro_batches:
                trainer._forward_backward(trainer.model, micro_batch)

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with mock.patch("trl_flow.trainer.rollouts.execute", within("sweep", execute)):
            update()
            with profile(activities=activities) as profiler:
                update()
        if trace is not None:
            profiler.export_chrome_trace(str(trace))
        return counts(profiler.events())


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dense-grpo", help="whose shapes example is run, on two prompts")
    parser.add_argument("--trace", type=Path, help="also write the profile here, for chrome://tracing")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of profile_sweep.json and .md")
    args = parser.parse_args(argv)
    measuring.quieten()
    torch.set_num_threads(1)
    found = profiled(args.method, args.trace)
    names = ["times", "operators", *NAMES]
    if not torch.cuda.is_available():
        names = [name for name in names if "cuda" not in name.lower()]
    lines = [["phase", *names], ["---"] + ["---:"] * len(names)]
    lines += [[phase, *(found[phase].get(name, 0) for name in names)] for phase in PHASES]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    text = (
        f"One update of {args.method} on two prompts with the embedded model on {where}, by torch's profiler: "
        "[profile_sweep.py](../profile_sweep.py) says what is counted.\n\n"
        + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        + "\n"
    )
    print(text)
    args.results.mkdir(parents=True, exist_ok=True)
    found = {phase: {name: numbers.get(name, 0) for name in names} for phase, numbers in found.items()}
    result = {"method": args.method, "torch": torch.__version__.split("+")[0], "device": where, "phases": found}
    (args.results / "profile_sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.results / "profile_sweep.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
