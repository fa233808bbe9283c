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

"""Wall time of a DenseGRPO rollout: one sweep down the grid against one path at a time.

    python benchmarks/rollout.py --num_generations 24

Both sample the same tree from the same noise. The naive rollout is the published way: each chain by itself, and from
each of its latents a separate ODE tail. The ratio is taken in one run, alternating the two.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from trl_flow.policy import FlowPolicy, load_pipeline
from trl_flow.rollout import dense_plan, euler_step, execute, seeded_noise, transition


def naive_rollout(plan, velocity, sigmas, noise, noise_levels, dynamics):
    """Leaves of `plan` for one prompt, evaluating every path by itself. Returns them and the rows evaluated."""
    sigmas = sigmas.tolist()
    prompt = torch.zeros(1, dtype=torch.long)
    rows = 0

    def step(latents, parent, child):
        nonlocal rows
        rows += 1
        sigma, sigma_next = sigmas[plan.nodes[parent].index], sigmas[plan.nodes[child].index]
        v = velocity(latents, sigma, prompt)
        if plan.nodes[child].draw is None:
            return euler_step(latents, v, sigma, sigma_next)
        mean, std = transition(latents, v, sigma, sigma_next, noise_levels[plan.nodes[parent].index], dynamics)
        return mean + std * noise[:, plan.nodes[child].draw]

    def path_to(node):
        path = [node]
        while plan.nodes[path[-1]].parent is not None:
            path.append(plan.nodes[path[-1]].parent)
        return path[::-1]

    chain = {}  # latents of the chains, kept as the published code keeps them
    leaves = []
    for leaf in plan.leaves:
        path = path_to(leaf)
        # The stochastic part of the path is the chain; what follows is the tail from its last latent.
        last = max(i for i, node in enumerate(path) if plan.nodes[node].draw is not None)
        latents = noise[:, plan.nodes[path[0]].draw]
        for parent, child in zip(path[:last], path[1 : last + 1], strict=True):
            if child not in chain:
                chain[child] = step(latents, parent, child)
            latents = chain[child]
        for parent, child in zip(path[last:], path[last + 1 :], strict=False):
            latents = step(latents, parent, child)
        leaves.append(latents)
    return torch.stack(leaves, dim=1), rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--num_generations", type=int, default=24)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/rollout.json")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = FlowPolicy(
        load_pipeline(args.model).to(device),
        guidance_scale=1.0,
        max_sequence_length=1 if args.model == "shapes" else None,
    )
    table = policy.conditioning([args.prompt])

    @torch.no_grad()
    def velocity(latents, sigma, prompt):
        return policy(latents, sigma, [table[number] for number in prompt.tolist()])

    num_steps = args.num_inference_steps
    plan = dense_plan(num_steps, args.num_generations, range(num_steps - 1))
    sigmas = policy.sigmas(num_steps)
    noise = seeded_noise(0, num_draws=plan.num_draws, latent_shape=policy.latent_shape)[None].to(device)
    settings = (plan, velocity, sigmas, noise, [0.7] * num_steps, "flow")
    seconds = {"sweep": [], "naive": []}
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, run in (
            ("sweep", lambda: execute(*settings, batch_size=args.batch_size)),
            ("naive", lambda: naive_rollout(*settings)),
        ):
            began = time.perf_counter()
            result = run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
            if name == "sweep":
                sweep = result
    leaves, naive_rows = result
    record = {
        "model": args.model,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "num_generations": args.num_generations,
        "num_inference_steps": num_steps,
        "rows": {"sweep": sweep.num_evaluations, "naive": naive_rows},
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "largest_difference_of_leaves": (leaves - sweep.leaves).abs().max().item(),
    }
    record["speedup"] = record["seconds"]["naive"] / record["seconds"]["sweep"]
    print(json.dumps(record, indent=2))
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
