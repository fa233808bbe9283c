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

"""Exploration calibration (DenseGRPO section 4.2 and Algorithm 1): a noise level psi for each step."""

import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from . import __version__
from .credit import combine_rewards, gain
from .report import plot_calibration
from .rollout import dense_plan, diffusion_coefficient, execute, seeded_noise, to_device
from .trainer.dense_grpo_config import DenseGRPOConfig
from .trainer.dense_grpo_trainer import DenseGRPOTrainer


RULES = ("significance", "paper")
MIN_INFORMATIVE = 8  # gains that are not ties; fewer say nothing about balance


def calibrate_noise(
    model,
    reward_funcs,
    args: DenseGRPOConfig,
    train_dataset=None,
    output_file: str | Path | None = None,
    num_samples: int = 64,
    num_iterations: int = 30,
    rule: str = "significance",
    threshold: float | None = None,
    step_size: float | None = None,
    min_noise_level: float = 1e-3,
    max_noise_level: float | None = None,
) -> dict:
    """
    Finds the highest noise level psi of each step at which falls of the latent reward do not outweigh the rises
    (Algorithm 1).

    Each iteration samples trajectories with the present table, takes the dense reward of every step, and raises the
    noise of the steps whose dense rewards are balanced and lowers that of the others: exploration is to be as wide as
    it can be without mostly doing harm. Steps of `args.sde_steps` are calibrated (all but the last by default, which
    is deterministic; the paper's loops run to t = 0, whose dense reward would need a reward beyond the picture).

    What Algorithm 1 leaves open, and what `rule="significance"` makes of it:

    - *When is a step balanced?* The paper compares the count difference with a constant (2). For a fair coin that
      becomes ever rarer with more samples, so that even balanced steps drift down. Here n informative gains are in
      balance when losses and gains differ by at most `threshold` * sqrt(n), by default 1.96: 95 % of fair coins.
    - *Which imbalance lowers the noise?* The paper's rule lowers it also when most gains are positive. Here only an
      excess of losses does, and an excess of gains raises it: noise that mostly helps is no reason for less of it.
    - *What happens in balance?* The paper raises the noise whenever it sees no imbalance; with a test in place of the
      constant that settles where the test fails half of the time, at 38 % gains with 64 samples. Here a balanced step
      goes up if it has at least as many gains as losses and stays as it is otherwise. It settles where losses exceed
      gains by about `threshold` / 2 * sqrt(n): 44 % gains with 64 samples, nearer to one half with more.
    - *Ties.* Discrete rewards give many gains of exactly 0, which the paper counts as balanced, so that the noise
      grows without bound. Here ties are not counted, and a step with fewer than 8 others stays as it is.
    - *Steps of psi.* A constant 0.01 takes 130 iterations where psi is 4 and overshoots where it is 0.02. Here psi is
      multiplied or divided by 1 + `step_size`, by default 0.1.
    - *Bounds.* Between `min_noise_level` and, by default, the level whose step puts in as much noise as the next sigma
      holds (tau = sigma_next): the steps that remain cannot remove more.

    `rule="paper"` is the literal algorithm: balanced if |#positive - #negative| < `threshold` (2), else not; plus or
    minus `step_size` (0.01); ties in neither count; not below 0. Only `max_noise_level`, when given, bounds it.

    Args:
        model, reward_funcs, train_dataset (as for [`DenseGRPOTrainer`]): What is to be trained, on what.
        args ([`DenseGRPOConfig`]): Settings of the rollouts. `sde_type` chooses the dynamics that the table is for:
            `"dance"` for the paper's eq. 11. The table starts from `noise_level`, which for `"dance"` is read as
            Flow-GRPO's a: psi(t) = a sqrt(t / (1 - t)), where uniform exploration stands.
        output_file (`str`, *optional*): Where to write the table, as JSON, and its picture beside it, as PNG.
        num_samples (`int`, *optional*, defaults to `64`): Trajectories per iteration, each of a prompt and noise of its own.
        num_iterations (`int`, *optional*, defaults to `30`): Number of updates of the table.
        rule (`str`, *optional*, defaults to `"significance"`): `"significance"` or `"paper"`.
        threshold, step_size (`float`, *optional*): See above.
        min_noise_level, max_noise_level (`float`, *optional*): Bounds of the table.

    Returns:
        `dict`: The table (`noise_level`, one number per step), with what it was made for and from.

    Raises:
        ValueError: If a setting cannot work.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown: expected one of {', '.join(map(repr, RULES))}.")
    if num_samples < 1 or num_iterations < 1:
        raise ValueError(f"num_samples={num_samples}, num_iterations={num_iterations}: expected at least 1 of each.")
    if rule == "significance" and num_samples < MIN_INFORMATIVE:
        raise ValueError(
            f"num_samples={num_samples}: with fewer than {MIN_INFORMATIVE} samples no step would ever be judged."
        )
    if max_noise_level is not None and max_noise_level <= (min_noise_level if rule == "significance" else 0):
        raise ValueError(f"max_noise_level={max_noise_level}: expected more than min_noise_level={min_noise_level}.")
    if min_noise_level < 0:
        raise ValueError(f"min_noise_level={min_noise_level}: expected 0 or more.")
    if args.sde_type == "cps" and max_noise_level is not None and max_noise_level > 1:
        raise ValueError(f"max_noise_level={max_noise_level}: CPS takes noise levels between 0 and 1.")
    threshold = {"significance": 1.96, "paper": 2.0}[rule] if threshold is None else threshold
    step_size = {"significance": 0.1, "paper": 0.01}[rule] if step_size is None else step_size
    if threshold <= 0 or step_size <= 0:
        raise ValueError(f"threshold={threshold}, step_size={step_size}: expected positive numbers.")
    # The trainer checks the settings, loads model, rewards and prompts, and knows how to sample and score.
    trainer = DenseGRPOTrainer(model, reward_funcs, args, train_dataset)
    trainer.check_reward_functions()
    args, sigmas, steps = trainer.args, trainer.sigmas.tolist(), trainer.sde_steps
    plan = dense_plan(args.num_inference_steps, 1, steps, args.tail_steps, solver=args.tail_solver)
    leaf = {node: position for position, node in enumerate(plan.leaves)}
    leaves = torch.tensor([[[leaf[node] for node in edge.leaves] for edge in plan.transitions[s]] for s in plan.steps])

    levels = list(trainer.noise_levels)
    if args.sde_type == "dance" and not isinstance(args.noise_level, (list, str)):
        for step in steps:
            levels[step] = diffusion_coefficient(sigmas[step], sigmas[step + 1], args.noise_level, "flow")
    bounds = {step: _bounds(sigmas, step, args.sde_type, rule, min_noise_level, max_noise_level) for step in steps}
    # Steps that are not calibrated have no noise: training one of them with this table is an error.
    levels = [min(max(level, bounds[s][0]), bounds[s][1]) if s in bounds else 0.0 for s, level in enumerate(levels)]

    def sample(iteration: int) -> torch.Tensor:
        """Dense rewards of shape `(num_samples, S)`; NaN where there is none."""
        chosen = torch.randint(
            len(trainer.train_dataset), (num_samples,), generator=torch.Generator().manual_seed(args.seed + iteration)
        ).tolist()
        gains = []
        trainer.find_batch_sizes(trainer.train_dataset[0])
        size = max(1, trainer.batch_sizes["sampling"].rows // plan.width)
        for start in range(0, num_samples, size):
            rows = [trainer.train_dataset[number] for number in chosen[start : start + size]]
            noise = [
                seeded_noise(
                    args.seed,
                    "calibrate",
                    iteration,
                    start + number,
                    num_draws=plan.num_draws,
                    latent_shape=trainer.policy.latent_shape,
                )
                for number in range(len(rows))
            ]
            conditioning = trainer.conditioning([row["prompt"] for row in rows], trainer.images(rows))
            rollout = execute(
                plan,
                trainer.velocity(conditioning),
                trainer.sigmas,
                to_device(torch.stack(noise), trainer.accelerator.device),
                levels,
                args.sde_type,
                initial_scale=trainer.policy.initial_scale(trainer.sigmas),
            )
            images = trainer.decode(
                rollout.leaves.flatten(0, 1), [condition for condition in conditioning for _ in plan.leaves]
            )
            scores = trainer.calculate_rewards(
                trainer.reward_funcs, trainer.reward_names, [row for row in rows for _ in plan.leaves], images
            )
            total = combine_rewards(scores.unflatten(0, (len(rows), -1)), trainer.reward_weights)
            gains.append(gain(total[:, leaves])[:, :, 0, 0])
        return torch.cat(gains)

    trainer.model.eval()
    initial, history, before = list(levels), [], None
    progress = tqdm(range(num_iterations), desc="Calibrating", disable=args.disable_tqdm)
    for iteration in progress:
        gains = sample(iteration)
        before = gains if before is None else before
        positive, negative = (gains > 0).sum(0).tolist(), (gains < 0).sum(0).tolist()
        history.append({"positive": positive, "negative": negative, "noise_level": [levels[s] for s in steps]})
        for s, step in enumerate(steps):
            levels[step] = update_noise_level(
                levels[step], positive[s], negative[s], rule, threshold, step_size, *bounds[step]
            )
        progress.set_postfix_str(f"positive {sum(positive)}, negative {sum(negative)}")
    after = sample(num_iterations)

    def summary(gains: torch.Tensor, levels: list[float]) -> dict:
        columns = [gains[:, steps.index(s)] if s in steps else gains[:0, 0] for s in range(args.num_inference_steps)]
        return {"noise_level": levels, "gains": [column[~column.isnan()].tolist() for column in columns]}

    table = {
        "noise_level": levels,
        "sde_type": args.sde_type,
        "sigmas": sigmas,
        "sde_steps": steps,
        "made_from": {
            "model": trainer.base_model,
            "rewards": trainer.reward_names,
            "guidance_scale": args.guidance_scale,
            "image_size": list(trainer.policy.image_size),
            "tail_steps": args.tail_steps,
            "tail_solver": args.tail_solver,
            "rule": rule,
            "threshold": threshold,
            "step_size": step_size,
            "bounds": [[low, high if math.isfinite(high) else None] for low, high in (bounds[step] for step in steps)],
            "num_samples": num_samples,
            "num_iterations": num_iterations,
            "seed": args.seed,
            "trl_flow": __version__,
        },
        "before": summary(before, initial),
        "after": summary(after, list(levels)),
        "history": history,
    }
    if output_file is not None:
        output_file = Path(output_file)
        output_file.parent.mkdir(parents=True, exist_ok=True)
        output_file.write_text(json.dumps(table, indent=1) + "\n")
        plot_calibration(table["before"], table["after"], output_file.with_suffix(".png"))
    return table


def update_noise_level(
    level: float,
    positive: int,
    negative: int,
    rule: str,
    threshold: float,
    step_size: float,
    lowest: float,
    highest: float,
) -> float:
    """
    One update of one step's noise level, from the number of its positive and negative dense rewards.

    Args:
        level (`float`): Its noise level.
        positive, negative (`int`): Number of trajectories that gained by the step, and that lost.
        rule (`str`): `"significance"` or `"paper"`, see [`calibrate_noise`].
        threshold, step_size (`float`): Of the rule.
        lowest, highest (`float`): Bounds of the result.
    """
    if rule == "paper":
        level += step_size if abs(positive - negative) < threshold else -step_size
    elif positive + negative >= MIN_INFORMATIVE:
        if negative - positive > threshold * math.sqrt(positive + negative):
            level /= 1 + step_size
        elif positive >= negative:
            level *= 1 + step_size
    return min(max(level, lowest), highest)


def _bounds(sigmas, step, sde_type, rule, lowest, highest) -> tuple[float, float]:
    """Lowest and highest noise level of a step."""
    sigma, sigma_next = sigmas[step], sigmas[step + 1]
    if sde_type == "cps":
        natural = 1.0  # tau = sigma_next
    else:
        natural = sigma_next / math.sqrt(sigma - sigma_next)
        if sde_type == "flow":
            natural /= diffusion_coefficient(sigma, sigma_next, 1.0, "flow")
    if rule == "paper":
        # The published rule has no bounds; a noise level has: it is not negative, and CPS ends at a quarter turn.
        return 0.0, highest if highest is not None else (1.0 if sde_type == "cps" else math.inf)
    highest = natural if highest is None else highest
    if lowest > highest:
        lowest = highest
    return lowest, highest
