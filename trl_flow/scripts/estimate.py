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

"""How long a run will take: its parts, timed on this device, times how often it does them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..policy.allocations import num_bytes
from ..policy.memory import MemoryEstimator, MemorySettings
from ..rewards.reward import Reward
from ..rewards.scoring import is_async
from ..rollout import Plan
from ..trainer.transitions import TransitionChunk


# A part is timed again while this many seconds have not gone by, and not in a full batch if that seems to take longer
# than the second number.
SECONDS_OF_A_PART = 0.2
MOST_SECONDS_OF_A_BATCH = 30.0


@dataclass(frozen=True)
class Cost:
    """
    Seconds of a call, as a straight line.

    Attributes:
        per_call (`float`): What each call takes, however small.
        per_row (`float`): What each row in it takes.
    """

    per_call: float
    per_row: float

    def of(self, rows: int, batch_size: int, times: int = 1) -> float:
        """Seconds for `times` times so many rows, in batches."""
        return times * (self.per_call * math.ceil(rows / batch_size) + self.per_row * rows)


@dataclass
class Estimate:
    """
    Seconds of a run on one process.

    Attributes:
        seconds (`dict[str, float]`): Of rollouts, their rewards, training, and evaluations.
        evaluations (`int`): How many evaluations there are.
        untimed (`list[str]`): Rewards that were not timed.
    """

    seconds: dict[str, float]
    evaluations: int = 0
    untimed: list[str] = field(default_factory=list)


def measure(call: Callable[[int], object], rows: int, device: torch.device) -> Cost:
    """
    What `call(n)` takes, from calls with 1 and with `rows` rows.

    Args:
        call (`Callable`): Does the work for n rows.
        rows (`int`): Rows of a full batch.
        device (`torch.device`): Where the work is done.
    """

    def seconds(n: int) -> float:
        taken = []
        while not taken or (sum(taken) < SECONDS_OF_A_PART and len(taken) < 5) or (len(taken) == 1 and taken[0] < 2):
            began = time.perf_counter()
            call(n)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken.append(time.perf_counter() - began)
        return min(taken)

    call(1)  # what is done once only: kernels are chosen, memory is fetched
    one = seconds(1)
    if rows == 1 or one * rows > MOST_SECONDS_OF_A_BATCH:
        return Cost(0.0, one)
    call(rows)
    many = max(seconds(rows), one)
    per_row = (many - one) / (rows - 1)
    return Cost(max(0.0, one - per_row), per_row) if per_row < one else Cost(0.0, many / rows)


def estimate(trainer, rollouts: list, updates: int) -> Estimate:
    """
    Times the parts of a run and adds them up. Nothing is trained, and the trainer is not fit for training afterwards.

    Args:
        trainer ([`FlowGRPOTrainer`]): The trainer.
        rollouts (`list[Rollouts]`): Its rollouts.
        updates (`int`): Updates of the run.
    """
    args, policy, device = trainer.args, trainer.policy, trainer.accelerator.device
    prompts = args.per_device_train_batch_size * args.steps_per_generation  # groups, on this process
    plans = [(trainer.rollout_plan(steps), replayed, count) for steps, replayed, count in rollouts]
    tests = 0 if trainer.eval_dataset is None else math.ceil(len(trainer.eval_dataset) / args.world_size)
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.model.train()
    if args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    rollout_rows, decoded_rows, training_rows = batch_sizes(trainer, plans[0][0])
    # As in a rollout, the rows of a batch belong to few prompts.
    size = trainer.num_generations
    rows = [trainer.train_dataset[number // size % len(trainer.train_dataset)] for number in range(rollout_rows)]

    def make_conditions() -> list:
        return trainer.conditioning([row["prompt"] for row in rows], trainer.images(rows))

    conditions = make_conditions()

    def latents(n: int) -> torch.Tensor:
        return torch.randn(n, *policy.latent_shape, device=device)

    @torch.no_grad()
    def velocity(n: int):
        with trainer.accelerator.autocast():
            trainer.model(latents(n), sigma, conditions[:n])

    sigma = trainer.sigmas[len(trainer.sigmas) // 2].item()
    largest = max(min(rollout_rows, prompts * plan.width) for plan, *_ in plans)
    with torch.random.fork_rng():
        with policy.encoders.visit(), policy.autoencoder.visit():
            encode = measure(lambda n: policy.encode_anew(rows[0]["prompt"], _picture(trainer, rows[0])), 1, device)
        forward = measure(velocity, largest, device)
        decode = measure(lambda n: trainer.decode(latents(n), conditions[:n]), largest, device)
        train = measure(lambda n: _train(trainer, plans[0][0], n), training_rows, device)
        update = _measure_update(trainer, device)
        scores, untimed = _measure_rewards(trainer, rows, latents(largest), conditions[:largest], device)
        forward_evaluation = forward
        if trainer.eval_dataset is not None and args.eval_guidance_scale not in (None, policy.guidance_scale):
            with policy.guided(args.eval_guidance_scale):
                conditions = make_conditions()
                forward_evaluation = measure(velocity, min(rollout_rows, tests), device)

    seconds = dict.fromkeys(("rollouts", "rewards", "training", "evaluations"), 0.0)
    for plan, replayed, count in plans:
        size = max(1, rollout_rows // plan.width)
        sweeps = [min(size, prompts - start) for start in range(0, prompts, size)]
        indices = [plan.nodes[number].index for number in plan.evaluated]
        live = [indices.count(index) for index in set(indices)]
        leaves = len(plan.leaves)
        for sweep in sweeps:
            seconds["rollouts"] += sum(forward.of(sweep * n, rollout_rows, count) for n in live)
            seconds["rollouts"] += decode.of(sweep * leaves, decoded_rows, count)
            seconds["rewards"] += sum(
                scores[name].of(sweep * leaves, sweep * leaves, count)
                for name in trainer.reward_names
                if name in scores
            )
        micro_batches = args.steps_per_generation
        trained = rows_per_step(trainer, plan)
        batches = [(args.per_device_train_batch_size * n, count * micro_batches) for n in trained]
        seconds["training"] += args.num_iterations * sum(train.of(n, training_rows, times) for n, times in batches)
        share = replayed / trainer._micro_steps
        seconds["training"] += share * sum(forward.of(n, training_rows, times) for n, times in batches)
    seconds["training"] += updates * update
    count = sum(alike.count for alike in rollouts) * (prompts // trainer.groups_per_prompt)
    evaluations = num_evaluations(trainer, updates)
    # What is encoded is kept until there are too many other prompts.
    known = len(trainer.train_dataset)
    encoded = min(count, known) if known + tests <= policy.cache_size else count
    seconds["rollouts"] += encode.per_row * encoded
    if evaluations:
        steps = args.num_eval_inference_steps
        seconds["evaluations"] = (
            forward_evaluation.of(tests, rollout_rows, evaluations * steps)
            + decode.of(tests, decoded_rows, evaluations)
            + sum(cost.of(tests, rollout_rows, evaluations) for cost in scores.values())
            + encode.per_row
            * tests
            * (1 if tests + min(count / evaluations, known) <= policy.cache_size else evaluations)
        )
    return Estimate(seconds, evaluations, untimed)


def batch_sizes(trainer, plan) -> tuple[int, int, int]:
    """Rows that sampling, decoding and training take at a time; what is `"auto"` is found as in a run."""
    trainer.find_batch_sizes(trainer.train_dataset[0])
    if trainer.batch_sizes["training"].rows is None:
        _train(trainer, plan, 1)
    return tuple(trainer.batch_sizes[name].rows for name in ("sampling", "decoding", "training"))


def rows_per_step(trainer, plan) -> list[int]:
    """Velocities that are trained of one prompt group at each of its stochastic steps: siblings share their parent's."""
    edges = [plan.transitions[step] for step in plan.steps]
    shape = (1, len(edges), len(edges[0]))
    # Which transitions are trained may depend on their advantages, but how many does not, if no two are equal.
    advantages = torch.linspace(-1, 1, shape[1] * shape[2]).reshape(shape)
    trained = trainer.trained(advantages, torch.ones(shape, dtype=torch.bool), ["dry run"])[0]
    parents = torch.tensor([[edge.parent for edge in group] for group in edges])
    return [len(parents[s][trained[s]].unique()) for s in range(len(edges))]


def memory_settings(trainer, updates: int) -> tuple[MemoryEstimator, MemorySettings]:
    """
    What the memory of a run is estimated with.

    Args:
        trainer ([`FlowGRPOTrainer`]): The trainer.
        updates (`int`): Updates of the run.
    """
    args, policy, dataset = trainer.args, trainer.policy, trainer.train_dataset
    groups = args.per_device_train_batch_size * args.steps_per_generation  # on this process
    prompts = groups // trainer.groups_per_prompt
    # Prompts of a rollout; the longest come first, as padding and text take memory too.
    first = sorted(range(min(len(dataset), 100 * prompts)), key=lambda n: -len(dataset[n]["prompt"]))[:prompts]
    rows = [dataset[number] for number in first for _ in range(trainer.groups_per_prompt)]
    conditions = trainer.conditioning([row["prompt"] for row in rows], trainer.images(rows))
    plan = trainer.rollout_plan(trainer.rollout_steps())
    rollouts = math.ceil(updates * args.gradient_accumulation_steps / (args.num_iterations * trainer._micro_steps))
    tests = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
    largest = args.per_device_train_batch_size * max(rows_per_step(trainer, plan))
    return MemoryEstimator(policy, conditions, trainer.sigmas), MemorySettings(
        plan=plan,
        prompts=groups,
        known_prompts=min(len(dataset), prompts * rollouts) + math.ceil(tests / args.world_size),
        # Where they are to be found, the least that there can be.
        rollout_batch_size=1 if args.rollout_batch_size == "auto" else args.rollout_batch_size,
        transition_batch_size=1 if args.transition_batch_size == "auto" else min(args.transition_batch_size, largest),
        activation_checkpointing=bool(args.activation_checkpointing),
        precompute_prompts=args.precompute_prompts,
        offload_encoders=args.offload_encoders,
        offload_vae=args.offload_vae,
        vae_slicing=args.vae_slicing,
        vae_tiling=args.vae_tiling,
        offload_trajectories=args.offload_trajectories,
        compared_bytes=compared_bytes(trainer, plan, updates) * groups,
        reference=args.beta > 0,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        optim=str(getattr(args.optim, "value", args.optim)),
        ema=trainer._ema is not None,
        sampling_policy=trainer._has_sampling_policy,
        several_processes=args.world_size > 1,
        host=trainer.accelerator.device.type != "cpu",
    )


def compared_bytes(trainer, plan: Plan, updates: int) -> int:
    """Bytes that are kept of the sampling policy, of each group's transitions, if there will be another to compare with."""
    step, begun = plan.steps[0], trainer.state.global_step
    trainer.state.global_step = updates - 1
    on_policy = trainer.args.num_iterations == 1 and all(map(trainer.on_policy, range(trainer._micro_steps)))
    trainer.state.global_step = begun
    if on_policy:
        return 0
    latents, first = torch.zeros(1, *trainer.policy.latent_shape), torch.zeros(1, dtype=torch.int64)
    sigma, sigma_next = trainer.sigmas[step : step + 2].tolist()
    chunk = TransitionChunk(step, sigma, sigma_next, latents, latents, [], first, (first,) * 3, (first,) * 3)
    transitions = sum(len(edges) for edges in plan.transitions.values())
    return transitions * sum(map(num_bytes, trainer.statistics(chunk, latents).values()))


def num_evaluations(trainer, updates: int) -> int:
    """Evaluations of a run, with the one before it and the one at its end."""
    args = trainer.args
    if trainer.eval_dataset is None:
        return 0
    count = int(args.eval_on_start)
    if args.eval_strategy == "no":
        return count + 1
    each = args.eval_steps or args.logging_steps
    if args.eval_strategy == "epoch":
        each = max(1, trainer.set_initial_training_values(args, trainer.get_train_dataloader())[1])
    elif each < 1:
        each = math.ceil(updates * each)
    return count + math.ceil(updates / each)


def _picture(trainer, row: dict):
    return row["image"].convert("RGB") if trainer.policy.family.image and "image" in row else None


def _train(trainer, plan, n: int):
    """Forward and backward pass of n rows at a stochastic step, each of which has one child."""
    members = min(n, trainer.num_generations)
    prompts = n // members
    device = trainer.accelerator.device
    home = "cpu" if trainer.args.offload_trajectories else device
    rows = [trainer.train_dataset[number % len(trainer.train_dataset)] for number in range(prompts)]
    numbers = torch.arange(members)
    trainer._forward_backward(
        trainer.model,
        {
            "nodes": torch.randn(prompts, 2 * members, *trainer.policy.latent_shape, device=home),
            "advantages": torch.ones(prompts, 1, members, device=device),
            "trained": torch.ones(prompts, 1, members, dtype=torch.bool, device=device),
            "steps": torch.tensor([plan.steps[len(plan.steps) // 2]]),
            "parents": numbers[None],
            "children": numbers[None] + members,
            "prompts": [row["prompt"] for row in rows],
            "images": trainer.images(rows),
            "keys": [f"dry run {number}" for number in range(prompts)],
            "old": None,
        },
    )


def _measure_update(trainer, device: torch.device) -> float:
    """Seconds of what follows the last backward pass of an update: clipping, optimizer, average. Weights stay as they are."""
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def update(n: int):
        torch.nn.utils.clip_grad_norm_(trainer._trainable, trainer.args.max_grad_norm)
        optimizer.step()
        if trainer._ema is not None:
            trainer._ema.step(trainer._trainable)

    seconds = measure(update, 1, device).per_row
    optimizer.zero_grad()
    return seconds


def _measure_rewards(trainer, rows: list[dict], latents, conditioning, device) -> tuple[dict[str, Cost], list[str]]:
    """What scores of each reward take that needs no model and nobody else's machine, and the names of the others."""
    pictures = trainer.decode(latents, conditioning)
    costs, untimed = {}, []
    functions = zip(
        trainer.reward_funcs + trainer.eval_reward_funcs, trainer.reward_names + trainer.eval_reward_names, strict=True
    )
    for function, name in functions:
        loads = getattr(type(function), "prepare", Reward.prepare) is not Reward.prepare
        if loads or is_async(function) or getattr(function, "concurrent", False):
            untimed.append(name)
            continue

        def score(n: int, function=function, name=name):
            trainer.calculate_rewards([function], [name], rows[:n], pictures[:n])

        costs[name] = measure(score, len(pictures), device)
    return costs, untimed
