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

"""Time, disk and memory that it takes to keep the embeddings of prompts, for more and more prompts.

    python benchmarks/prompt_embeddings.py --num_prompts 1000 10000 100000 --kib_per_prompt 16

Random embeddings of the given size take the place of a text encoder's, whose own time is not what is measured. Memory is
what the process has gained of its own, at most while it writes, and when all have been read again, beside the pages of the file
that the system has mapped and may take back (Linux alone tells).
"""

import argparse
import tempfile
import time
from pathlib import Path

import datasets
import measuring
import torch
from datasets import Dataset

from trl_flow.policy import Condition, FlowPolicy, encode_prompts, load_pipeline
from trl_flow.policy.conditioning import make_condition


class RandomEmbeddings(FlowPolicy):
    """A policy that makes `kib` KiB of random bfloat16 numbers of a prompt, and looks at the memory as it does."""

    kib = 16
    peak = 0.0

    def encode_anew(self, prompt: str, image=None) -> Condition:
        self.peak = max(self.peak, own_memory())
        embeddings = torch.randn(1, self.kib * 2**9).bfloat16()
        answers, layout = {("encode_prompt", 0): embeddings}, {("encode_prompt", 0): 0}
        return make_condition(prompt, image, answers, (1,), torch.bfloat16, layout, True, self.guidance_scale)


def own_memory() -> float:
    """Of this process, in MiB, without mapped files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 2**10


def measure(policy: FlowPolicy, num_prompts: int, folder: Path) -> dict:
    """Figures of encoding numbered prompts into `folder`, and of reading each of them."""
    prompts = Dataset.from_dict({"prompt": [f"a red circle, number {number}" for number in range(num_prompts)]})
    before = policy.peak = own_memory()
    began = time.perf_counter()
    stored = encode_prompts(policy, prompts)
    encoded = time.perf_counter()
    stored = encode_prompts(policy, prompts)
    found = time.perf_counter()
    policy.attach(stored)
    attached = time.perf_counter()
    for row in prompts:
        policy.encode(row["prompt"])
    read = time.perf_counter()
    return {
        "prompts": num_prompts,
        "encode_seconds": encoded - began,
        "find_again_seconds": found - encoded,
        "attach_seconds": attached - found,
        "read_milliseconds_per_prompt": 1000 * (read - attached) / num_prompts,
        "disk_mib": sum(path.stat().st_size for path in folder.rglob("*.arrow")) / 2**20,
        "memory_while_encoding_mib": policy.peak - before,
        "memory_afterwards_mib": own_memory() - before,
    }


def table(figures: list[dict], facts: dict) -> str:
    text = f"Embeddings of {facts['kib_per_prompt']} KiB a prompt, on disk. [prompt_embeddings.py](../prompt_embeddings.py) says of what.\n\n"
    header = [
        "prompts",
        "seconds to write",
        "to find again",
        "ms to read one",
        "MiB on disk",
        "MiB of memory, writing",
        "afterwards",
    ]
    rows = [
        [
            f"{one['prompts']:,}",
            f"{one['encode_seconds']:.1f}",
            f"{one['find_again_seconds']:.2f}",
            f"{one['read_milliseconds_per_prompt']:.2f}",
            f"{one['disk_mib']:,.0f}",
            f"{one['memory_while_encoding_mib']:.0f}",
            f"{one['memory_afterwards_mib']:.0f}",
        ]
        for one in figures
    ]
    return f"{text}{measuring.markdown(header, rows)}\n{measuring.origin(facts)}\n"


def draw(figures: list[dict]):
    figure = measuring.new_figure(8, 3)
    numbers = [one["prompts"] for one in figures]
    panels = {
        "seconds": {"write": "encode_seconds", "find again": "find_again_seconds"},
        "MiB": {
            "disk": "disk_mib",
            "memory, writing": "memory_while_encoding_mib",
            "memory, afterwards": "memory_afterwards_mib",
        },
    }
    for plot, (unit, lines) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (label, name), color in zip(lines.items(), measuring.COLORS, strict=False):
            plot.plot(numbers, [one[name] for one in figures], "o-", color=color, label=label)
        plot.set(xscale="log", yscale="log", xlabel="prompts", ylabel=unit)
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(frameon=False)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--kib_per_prompt", type=int, default=16)
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "prompt_embeddings")
    args = parser.parse_args(argv)

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    policy = RandomEmbeddings(load_pipeline("shapes"), max_sequence_length=1, cache_size=16)
    policy.kib = args.kib_per_prompt
    figures = []
    for num_prompts in sorted(args.num_prompts):
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)
            figures.append(measure(policy, num_prompts, Path(folder)))
    facts = {**measuring.machine(), "clock": "wall time", "kib_per_prompt": args.kib_per_prompt}
    measuring.write(args.output, {**facts, "figures": figures}, table(figures, facts), draw(figures))


if __name__ == "__main__":
    main()
