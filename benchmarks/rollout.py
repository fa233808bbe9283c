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

"""What sharing saves: a DenseGRPO rollout in one sweep down the grid against one path at a time, and siblings that are trained
by one evaluation of their parent against each sample by itself.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py     # half a minute; writes rollout.json, .md and .png

Both rollouts sample the same tree from the same noise. The naive one is the published way: each chain by itself, and from each
of its latents a separate ODE tail. Both trainings take the gradient of the same G2RPO transitions; its difference is taken in
float64, of the bare denoiser with the inputs that the pipeline gives it, and their times in the model's own precision.
"""

import argparse
import functools
import statistics
from pathlib import Path

import measuring
import torch
from diffusers.models.normalization import RMSNorm

from trl_flow.policy import FlowPolicy, load_pipeline
from trl_flow.rollout import dense_plan, euler_step, execute, log_prob, seeded_noise, transition


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


def compare_rollouts(policy: FlowPolicy, args: argparse.Namespace) -> dict:
    """Seconds and rows of both ways to sample the tree, and the largest difference of their leaves."""
    table = policy.conditioning([args.prompt])

    @torch.no_grad()
    def velocity(latents, sigma, prompt):
        return policy(latents, sigma, [table[number] for number in prompt.tolist()])

    num_steps = args.num_inference_steps
    plan = dense_plan(num_steps, args.num_generations, range(num_steps - 1))
    noise = seeded_noise(0, num_draws=plan.num_draws, latent_shape=policy.latent_shape)[None].to(policy.device)
    settings = (plan, velocity, policy.sigmas(num_steps), noise, [0.7] * num_steps, "flow")
    results = {}

    def sweep():
        results["sweep"] = execute(*settings, batch_size=args.batch_size)

    def naive():
        results["naive"] = naive_rollout(*settings)

    seconds = measuring.take_turns({"shared": sweep, "apart": naive}, args.repeats)
    leaves, rows = results["naive"]
    return {
        "rows": {"shared": results["sweep"].num_evaluations, "apart": rows},
        "largest_difference_of_leaves": (leaves - results["sweep"].leaves).abs().max().item(),
        **summary(seconds),
    }


def gradients(velocity, trainable, parents, children, advantages, sigmas, shared: bool) -> tuple[torch.Tensor, ...]:
    """
    Gradient of the advantages' log-probabilities `(P, G)`, for P parents `(P, *latent)` and their children `(P, G, *latent)`.
    """
    group = children.shape[1]
    rows = parents if shared else parents.repeat_interleave(group, 0)
    mean, std = transition(rows, velocity(rows), *sigmas, 0.7)
    mean = mean.repeat_interleave(group, 0) if shared else mean
    loss = -(advantages.flatten() * log_prob(children.flatten(0, 1), mean, std)).mean()
    return torch.autograd.grad(loss, trainable)


def bare_denoiser(policy: FlowPolicy, sigma: float, conditioning: list):
    """The denoiser in float64, with the inputs that the pipeline gives it for one prompt."""
    (component,) = policy.components
    module = getattr(policy.pipeline, component)
    seen = {}
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        policy(torch.zeros(1, *policy.latent_shape, device=policy.device), sigma, conditioning)
    hook.remove()
    module.double()
    for part in module.modules():
        if isinstance(part, RMSNorm):  # diffusers' own computes in float32
            part.forward = functools.partial(
                torch.nn.functional.rms_norm, normalized_shape=part.weight.shape, weight=part.weight, eps=part.eps
            )
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in seen.items()}

    def velocity(latents):
        rows = {
            k: v.expand(len(latents), *v.shape[1:]) if torch.is_tensor(v) and v.ndim else v for k, v in inputs.items()
        }
        return module(**rows | {"hidden_states": latents})[0]

    return velocity


def compare_training(policy: FlowPolicy, args: argparse.Namespace) -> dict:
    """Seconds and rows of both ways to train the children of one parent per prompt, and how far their gradients are apart."""
    generator = torch.Generator().manual_seed(0)
    sigmas = tuple(policy.sigmas(args.num_inference_steps)[1:3].tolist())
    parents = torch.randn(args.prompts, *policy.latent_shape, generator=generator, dtype=torch.float64)
    shape = (args.prompts, args.num_generations)
    advantages = torch.randn(*shape, generator=generator, dtype=torch.float64)
    children = parents[:, None] + 0.3 * torch.randn(
        *shape, *policy.latent_shape, generator=generator, dtype=torch.float64
    )
    batch = [tensor.to(policy.device) for tensor in (parents, children, advantages)]
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # A new adapter changes nothing, and half of it has no gradient.
    for parameter in trainable:
        parameter.data.normal_(0.0, 0.05, generator=torch.Generator(parameter.device).manual_seed(parameter.numel()))
    conditioning = policy.conditioning([args.prompt])
    single = [tensor.float() for tensor in batch]

    def train(shared: bool):
        def velocity(latents):
            return policy(latents, sigmas[0], conditioning * len(latents))

        gradients(velocity, trainable, *single, sigmas, shared)

    seconds = measuring.take_turns({"shared": lambda: train(True), "apart": lambda: train(False)}, args.repeats)
    velocity = bare_denoiser(policy, sigmas[0], conditioning)
    shared, apart = (gradients(velocity, trainable, *batch, sigmas, way) for way in (True, False))
    largest = max(gradient.abs().max() for gradient in apart)
    return {
        "rows": {"shared": args.prompts, "apart": args.prompts * args.num_generations},
        "largest_relative_difference_of_gradients": (
            max((a - b).abs().max() for a, b in zip(shared, apart, strict=True)) / largest
        ).item(),
        **summary(seconds),
    }


def summary(seconds: dict[str, list[float]]) -> dict:
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": measuring.ratio(seconds["apart"], seconds["shared"]),
    }


def table(record: dict, facts: dict) -> str:
    rollout, training = record["rollout"], record["training"]
    text = (
        f"{record['num_generations']} samples a prompt on {record['num_inference_steps']} steps, sampled for one prompt and trained for "
        f"{record['prompts']}. [rollout.py](../rollout.py) says what is compared.\n\n"
    )
    rows = [
        [
            name,
            part["rows"]["shared"],
            part["rows"]["apart"],
            f"{part['seconds']['shared']:.3f}",
            f"{part['seconds']['apart']:.3f}",
            f"{part['speedup']:.1f}",
            difference,
        ]
        for name, part, difference in (
            (
                "DenseGRPO's rollout: one sweep, and path by path",
                rollout,
                f"of latents: {rollout['largest_difference_of_leaves']:.1e}",
            ),
            (
                "G2RPO's training: one row per parent, and per sample",
                training,
                f"of gradients in float64, relative: {training['largest_relative_difference_of_gradients']:.1e}",
            ),
        )
    ]
    header = [
        "",
        "rows, shared",
        "rows, apart",
        "seconds, shared",
        "seconds, apart",
        "times faster",
        "largest difference",
    ]
    return f"{text}{measuring.markdown(header, rows)}\n{measuring.origin(facts)}\n"


def draw(record: dict):
    figure = measuring.new_figure(8, 3.2)
    titles = {"rollout": "sampling a prompt (DenseGRPO)", "training": "training siblings (G2RPO)"}
    for plot, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        part = record[name]
        names = ("apart", "shared")
        bars = plot.bar(
            [f"{way}\n{part['rows'][way]:,} rows" for way in names],
            [part["seconds"][way] for way in names],
            color=(measuring.COLORS[1], measuring.COLORS[0]),
        )
        plot.bar_label(bars, [f"{part['seconds'][way]:.2f} s" for way in names])
        plot.set(title=f"{title}: {part['speedup']:.1f} times faster", ylabel="seconds")
        plot.margins(y=0.1)
        plot.title.set_fontsize(10)
        plot.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--prompts", type=int, default=8, help="parents that are trained at once")
    parser.add_argument("--num_generations", type=int, default=24)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "rollout")
    args = parser.parse_args(argv)
    measuring.quieten()
    policy = FlowPolicy(
        load_pipeline(args.model).to("cuda" if torch.cuda.is_available() else "cpu"),
        guidance_scale=1.0,
        max_sequence_length=1 if args.model == "shapes" else None,
    )
    facts = measuring.machine()
    record = {
        **facts,
        **{name: getattr(args, name) for name in ("model", "num_generations", "num_inference_steps", "prompts")},
        "rollout": compare_rollouts(policy, args),
        "training": compare_training(policy, args),
    }
    measuring.write(args.output, record, table(record, facts), draw(record))


if __name__ == "__main__":
    main()
