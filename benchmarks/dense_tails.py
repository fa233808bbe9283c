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


"""How many evaluations does a dense reward need? Tails of fewer steps, first and second order, against full ones.

    python benchmarks/dense_tails.py

DenseGRPO scores each latent of a trajectory by the picture that an ODE tail from it leads to. Here every latent of the same
trajectories (10 steps, 24 samples per prompt, noise from step 0 to 8) gets tails of n = 1 to 4 steps, by Euler's method and
by the second-order multistep solver, beside the full one. For each: the evaluations of a rollout, the distance of its
pictures, and how it ranks a group (Spearman's correlation, mean over prompts and steps): the latent rewards R_t, and the
gains R_{t-1} - R_t, whose order is that of the advantages. All this against two references: the full Euler tail, which
DenseGRPO uses, and the exact solution (Euler with 8 steps for each of the grid). Two rewards: `shapes`, which is mostly 0 or
1, and a smooth one, the mean saturation of the picture.

Prints a table and writes `dense_tails.json` and `dense_tails.png`.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from trl_flow import FlowPolicy, load_reward
from trl_flow.policy import load_pipeline
from trl_flow.prompts import load_prompts
from trl_flow.rollout import Plan, dense_plan, execute, seeded_noise, tail_waypoints


VARIANTS = [(n, solver) for n in (1, 2, 3, 4) for solver in ("euler", "dpm") if n > 2 or solver == "euler"]
VARIANTS += [("full", "dpm"), ("full", "euler")]
FULL, EXACT = ("full", "euler"), "exact"


def saturation(images, **kwargs):
    """Mean difference of the largest and the smallest channel of a pixel."""
    pixels = np.stack([np.asarray(image, dtype=np.float64) / 255 for image in images])
    return (pixels.max(-1) - pixels.min(-1)).mean((1, 2)).tolist()


def plan_of_all_tails(num_steps: int, group: int) -> tuple[Plan, dict]:
    """Chains of one group, with every variant's tail from each of their latents; its leaves `(G, T)` by variant."""
    plan = Plan(num_steps)
    leaves = {variant: [] for variant in VARIANTS}
    for _ in range(group):
        node = plan.start()
        rows = {variant: [] for variant in VARIANTS}
        for step in range(num_steps):
            for n, solver in VARIANTS:
                rows[n, solver].append(plan.tail(node, tail_waypoints(step, num_steps, n), solver))
            if step < num_steps - 1:
                child = plan.stochastic(node)
                plan.add_transition(node, child, leaves=())  # so that the executor hands back the chains
                node = child
        for variant in VARIANTS:
            leaves[variant].append(rows[variant])
    return plan, leaves


def rank_agreement(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean Spearman correlation of `(prompts, G, steps)` along G; groups without any difference say nothing."""
    found = [
        spearmanr(values[p, :, s], reference[p, :, s]).statistic
        for p in range(values.shape[0])
        for s in range(values.shape[2])
        if np.ptp(values[p, :, s]) > 0 and np.ptp(reference[p, :, s]) > 0
    ]
    return float(np.mean(found))


def exact_tails(chains: torch.Tensor, velocity, sigmas: torch.Tensor, parts: int) -> torch.Tensor:
    """Ends of the ODE from chains `(G, T, *latent)`, by `parts` Euler steps for each of the grid."""
    group, num_steps = chains.shape[:2]
    grid = sigmas.double()
    ends = chains.clone()
    for step in range(num_steps):
        fine = torch.linspace(0, 1, parts + 1, dtype=torch.float64) * (grid[step + 1] - grid[step]) + grid[step]
        rows = ends[:, : step + 1].flatten(0, 1)  # all that begin here or before
        for sigma, following in zip(fine[:-1].tolist(), fine[1:].tolist(), strict=True):
            rows = rows + (following - sigma) * velocity(rows, sigma, torch.zeros(len(rows), dtype=torch.long))
        ends[:, : step + 1] = rows.unflatten(0, (group, step + 1))
    return ends


def measure(args) -> list[dict]:
    policy = FlowPolicy(load_pipeline("shapes"), guidance_scale=1.0, max_sequence_length=1)
    sigmas = policy.sigmas(args.steps)
    plan, leaves = plan_of_all_tails(args.steps, args.group)
    position = {leaf: number for number, leaf in enumerate(plan.leaves)}
    places = {
        variant: torch.tensor([[position[leaf] for leaf in row] for row in leaves[variant]]) for variant in VARIANTS
    }
    paths = [
        [*(plan.transitions[step][g].parent for step in plan.steps), plan.transitions[plan.steps[-1]][g].child]
        for g in range(args.group)
    ]
    dataset = load_prompts("shapes", split="test").select(range(args.prompts))
    functions = {"shapes": load_reward("shapes"), "saturation": saturation}
    tails = [*VARIANTS, EXACT]
    rewards = {name: {tail: [] for tail in tails} for name in functions}
    distances = {reference: {tail: [] for tail in tails} for reference in (FULL, EXACT)}
    for row in dataset:
        table = policy.conditioning([row["prompt"]])

        def velocity(latents, sigma, prompt, table=table):
            return policy(latents, sigma, [table[number] for number in prompt.tolist()])

        noise = seeded_noise(args.seed, row["prompt"], num_draws=plan.num_draws, latent_shape=policy.latent_shape)
        rollout = execute(plan, velocity, sigmas, noise[None], [args.noise_level] * args.steps, "cps", 512)
        chains = torch.stack([torch.stack([rollout.nodes[node][0] for node in path]) for path in paths])
        latents = {variant: rollout.leaves[0, places[variant].flatten()] for variant in VARIANTS}
        latents[EXACT] = exact_tails(chains, velocity, sigmas, args.parts).flatten(0, 1)
        pictures = {tail: policy.decode(latents[tail], 512) for tail in tails}
        for tail in tails:
            for reference, found in distances.items():
                found[tail].append((pictures[tail] - pictures[reference]).square().mean().sqrt().item())
            images = policy.pipeline.numpy_to_pil(pictures[tail].permute(0, 2, 3, 1).numpy())
            columns = {name: [value] * len(images) for name, value in row.items() if name != "prompt"}
            for name, function in functions.items():
                scores = function(prompts=[row["prompt"]] * len(images), images=images, **columns)
                rewards[name][tail].append(np.array(scores, dtype=np.float64).reshape(args.group, args.steps))
    values = {name: {tail: np.stack(rewards[name][tail]) for tail in tails} for name in functions}

    def agreement(tail, reference) -> dict:
        return {
            "picture_distance": float(np.mean(distances[reference][tail])),
            "latent_reward": {name: rank_agreement(v[tail], v[reference]) for name, v in values.items()},
            "gain": {
                name: rank_agreement(np.diff(v[tail], axis=2), np.diff(v[reference], axis=2))
                for name, v in values.items()
            },
        }

    return [
        {
            "tail_steps": n,
            "tail_solver": solver,
            "evaluations": dense_plan(args.steps, args.group, range(args.steps - 1), n, solver=solver).num_evaluations,
            "against_full": agreement((n, solver), FULL),
            "against_exact": agreement((n, solver), EXACT),
        }
        for n, solver in VARIANTS
    ]


def draw(results: list[dict], path: Path):
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    colors = {"euler": "#2166ac", "dpm": "#d6604d"}
    labels = {"euler": "Euler", "dpm": "second order"}
    panels = (
        ("distance of the pictures", lambda r: r["picture_distance"]),
        ("rank correlation of R_t (saturation)", lambda r: r["latent_reward"]["saturation"]),
        ("rank correlation of the gains (shapes)", lambda r: r["gain"]["shapes"]),
    )
    grid = figure.subplots(2, 3, sharex=True, sharey="col")
    references = (("against_full", "full Euler tails"), ("against_exact", "exact tails"))
    for row, (reference, against) in zip(grid, references, strict=True):
        for axes, (title, value) in zip(row, panels, strict=True):
            for solver, color in colors.items():
                points = [r for r in results if r["tail_solver"] == solver]
                axes.plot(
                    [r["evaluations"] for r in points],
                    [value(r[reference]) for r in points],
                    "o-",
                    color=color,
                    label=labels[solver],
                )
            axes.set_title(f"{title}\nagainst {against}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92")
    euler = [r for r in results if r["tail_solver"] == "euler"]
    for axes in grid[1]:
        ticks = [f"n = {r['tail_steps']}\n{r['evaluations']}" for r in euler]
        axes.set_xticks([r["evaluations"] for r in euler], ticks, fontsize=8)
        axes.set_xlabel("steps of a tail, evaluations per prompt")
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--group", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--parts", type=int, default=8, help="Euler steps of the exact tail for each of the grid")
    parser.add_argument("--noise_level", type=float, default=0.8, help="of CPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--hardware", default=f"{platform.machine()}, CPU")
    args = parser.parse_args()
    with torch.no_grad():
        results = measure(args)
    full = results[-1]["evaluations"]
    for reference in ("against_full", "against_exact"):
        print(f"{reference.replace('_', ' ')} tails: rank correlations for shapes, saturation")
        print(f"{'tail':>14} {'evaluations':>12} {'saved':>6} {'distance':>9} {'R_t':>15} {'gains':>15}")
        for r in results:
            found = r[reference]
            ranks = [f"{found[k]['shapes']:7.3f} {found[k]['saturation']:7.3f}" for k in ("latent_reward", "gain")]
            print(
                f"{r['tail_steps']!s:>5} {r['tail_solver']:>8} {r['evaluations']:12} {1 - r['evaluations'] / full:6.0%} "
                f"{found['picture_distance']:9.4f} {ranks[0]} {ranks[1]}"
            )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("steps", "group", "prompts", "parts", "noise_level", "seed")}
    (output / "dense_tails.json").write_text(
        json.dumps({"hardware": args.hardware, "settings": settings, "tails": results}, indent=1) + "\n"
    )
    draw(results, output / "dense_tails.png")


if __name__ == "__main__":
    main()
