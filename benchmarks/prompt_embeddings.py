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
what the process has of its own, at most, beside the pages of the file that the system has mapped and may take back
(Linux alone tells).
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import datasets
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--kib_per_prompt", type=int, default=16)
    parser.add_argument("--output", default="benchmarks/results/prompt_embeddings.json")
    args = parser.parse_args()

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    policy = RandomEmbeddings(load_pipeline("shapes"), max_sequence_length=1, cache_size=16)
    policy.kib = args.kib_per_prompt
    figures = []
    for num_prompts in sorted(args.num_prompts):
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)
            figures.append(measure(policy, num_prompts, Path(folder)))
        print(json.dumps(figures[-1]))
    record = {
        "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kib_per_prompt": args.kib_per_prompt,
        "figures": figures,
    }
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
