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

"""What a training command would do, without doing it."""

import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.plan import ASCII, PlanPicture, count_text, plan_text
from ..report.text import format_duration
from ..rewards import parse_reward
from .arguments import TrainingScriptArguments
from .estimate import estimate, memory_settings, rows_per_step


def dry_run(trainer_class: type, script_args: TrainingScriptArguments, training_args: Any) -> None:
    """
    Loads what a run needs but the rewards' models, and prints what it would do. Trains nothing and leaves no files.

    Where the model, the prompts or a reward cannot be loaded, the plan is printed all the same, which needs the settings
    alone, before the error is raised.

    Args:
        trainer_class (`type`):
            Trainer of the method.
        script_args ([`TrainingScriptArguments`]):
            Model, adapter, rewards and prompts.
        training_args ([`FlowGRPOConfig`]):
            Config of the method.
    """
    from .training import make_trainer

    console = Console(soft_wrap=True, highlight=False)
    leader = training_args.process_index == 0
    output_dir, training_args.output_dir = training_args.output_dir, ""
    # A trainer makes its directory, and asks the Hub for its repository, as soon as it is there.
    training_args.push_to_hub = False
    with tempfile.TemporaryDirectory() as directory:
        training_args.output_dir = directory
        try:
            script_args.reward_funcs = list(map(impatient, script_args.reward_funcs))
            script_args.eval_reward_funcs = list(map(impatient, script_args.eval_reward_funcs or [])) or None
            trainer = make_trainer(trainer_class, script_args, training_args)
        except (OSError, ValueError, ImportError):
            # Of settings that make no plan, the error says enough.
            with suppress(ValueError):
                picture = plan_of_settings(trainer_class, training_args)
                if leader:
                    console.print(f"{trainer_class._name}: the plan, which is all that can be told.\n")
                    print_plan(picture, console)
                    console.print()
            raise
        if leader:
            print_run(trainer, script_args, output_dir, console)
        trainer.end()


def impatient(reward: str | dict) -> str | dict:
    """A reward whose server is not waited for: where a run is planned, it may be out of reach."""
    name, settings = parse_reward(reward)
    if isinstance(name, str) and (name == "remote" or name.startswith(("http://", "https://"))):
        return {name: {**settings, "max_wait": 1.0}}
    return reward


def trainer_of_settings(trainer_class: type, training_args: Any):
    """A trainer without a model, for its trees: the grid is the pipeline's, of which only the number of steps is known."""
    trainer = object.__new__(trainer_class)
    trainer._given_args = trainer.args = training_args
    given = training_args.sde_steps
    trainer.sde_steps = trainer.default_sde_steps() if given is None else sorted(given)
    trainer.check_args()
    trainer.sigmas = torch.linspace(1, 0, training_args.num_inference_steps + 1)
    trainer._step = 0
    return trainer


def plan_of_settings(trainer_class: type, training_args: Any) -> PlanPicture:
    """The tree that the settings alone make."""
    trainer = trainer_of_settings(trainer_class, training_args)
    return PlanPicture(trainer.rollout_plan(trainer.rollout_steps()))


@dataclass
class Work:
    """
    What sampling and training take.

    Attributes:
        evaluations (`int`): Velocities of the rollout, after guidance.
        pictures (`int`): Pictures (or videos) that are decoded.
        scores (`int`): Scores of them, of all rewards that are trained on.
        rows (`int`): Velocities that are trained, in all passes: at most, as groups without a difference are left out.
        references (`int`): Velocities of the reference model, for the divergence.
        replays (`int`): Velocities of the sampling policy, for the ratios of updates that are not the first of a rollout.
    """

    evaluations: int = 0
    pictures: int = 0
    scores: int = 0
    rows: int = 0
    references: int = 0
    replays: int = 0

    def times(self, factor: int) -> "Work":
        return Work(*(factor * value for value in vars(self).values()))

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def group_work(trainer, sde_steps: list[int]) -> Work:
    """What one prompt group takes, with these steps stochastic."""
    args, plan = trainer.args, trainer.rollout_plan(sde_steps)
    rows = sum(rows_per_step(trainer, plan))
    return Work(
        evaluations=plan.num_evaluations,
        pictures=len(plan.leaves),
        scores=len(plan.leaves) * len(trainer.reward_funcs),
        rows=rows * args.num_iterations,
        references=rows * args.num_iterations if args.beta > 0 else 0,
    )


def rollout_work(trainer, alike: "Rollouts") -> Work:
    """What one of these rollouts takes, and the updates that it feeds."""
    args = trainer.args
    work = group_work(trainer, alike.steps).times(groups_per_rollout(trainer))
    return replace(work, replays=work.rows // args.num_iterations * alike.replayed // trainer._micro_steps)


def groups_per_rollout(trainer) -> int:
    """Prompt groups of a rollout, on all processes."""
    args = trainer.args
    return args.per_device_train_batch_size * args.steps_per_generation * args.world_size


def updates_per_rollout(trainer) -> int:
    args = trainer.args
    return args.num_iterations * trainer._micro_steps // args.gradient_accumulation_steps


def num_updates(trainer) -> int:
    """Updates of the whole run."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


class Rollouts(NamedTuple):
    """
    Rollouts of a run that are alike.

    Args:
        steps (`list[int]`): Their stochastic steps.
        replayed (`int`): Micro-batches of one that the sampling policy sees again, as they are trained by another.
        count (`int`): How many there are.
    """

    steps: list[int]
    replayed: int
    count: int


def rollouts(trainer) -> list[Rollouts]:
    """The rollouts of a run, in the order in which they are first met; a last, partial one counts as a whole one."""
    updates = updates_per_rollout(trainer)
    begun, found = (trainer._step, trainer.state.global_step), Counter()
    for number in range(-(-num_updates(trainer) // updates)):
        trainer.state.global_step = number * updates
        trainer._step = number * updates * trainer.args.gradient_accumulation_steps
        replayed = sum(not trainer.on_policy(micro_batch) for micro_batch in range(trainer._micro_steps))
        found[tuple(trainer.rollout_steps()), replayed] += 1
    trainer._step, trainer.state.global_step = begun
    return [Rollouts(list(steps), replayed, count) for (steps, replayed), count in found.items()]


def run_work(trainer) -> Work:
    """What all rollouts of a run take, as their stochastic steps move."""
    total = Work()
    for alike in rollouts(trainer):
        total = total.plus(rollout_work(trainer, alike).times(alike.count))
    return total


def print_plan(picture: PlanPicture, console: Console) -> None:
    """The tree, in the terminal's width, with what is trained in a colour of its own."""
    drawing = plan_text(picture.plan, picture.sigmas, min(console.width, 120))
    if console.options.ascii_only:
        drawing = drawing.translate(ASCII)
    text = Text(drawing)
    text.highlight_regex(r"≈+", "bold yellow")
    text.highlight_regex(r"[─═│├└]+", "blue")
    console.print(text)


def print_run(trainer, script_args: TrainingScriptArguments, output_dir: str, console: Console) -> None:
    """What a run is made of, the tree of its first rollout, and what it takes."""
    updates, alike = num_updates(trainer), rollouts(trainer)
    group, rollout = group_work(trainer, alike[0].steps), rollout_work(trainer, alike[0])
    run = run_work(trainer)
    moves = any(other.steps != alike[0].steps for other in alike)

    console.print(f"{trainer._name}, a dry run: nothing is trained, and no file is left.\n")
    print_table(run_facts(trainer, script_args, output_dir), console)
    console.print(f"\nRollout of one prompt group{' (the first; the window moves)' if moves else ''}:\n")
    print_plan(trainer.plan(), console)
    console.print()

    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("")
    for title in ("per prompt", "per rollout", "in the whole run"):
        table.add_column(title, justify="right")
    labels = {
        "evaluations": "Velocity evaluations (NFE)",
        "pictures": "Videos decoded" if trainer.policy.num_frames else "Pictures decoded",
        "scores": "Scores of rewards",
        "rows": "Training rows, at most",
        "references": "and of the reference",
        "replays": "and of the sampling policy",
    }
    columns = [group.times(trainer.groups_per_prompt), rollout, run]
    for name, label in labels.items():
        if getattr(run, name):
            table.add_row(label, *(f"{getattr(work, name):,}" if getattr(work, name) else "" for work in columns))
    console.print(table)
    console.print()
    facts = update_facts(trainer, updates)
    print_table([*facts, ("Time", time_text(trainer, updates))], console)


def print_table(facts: list[tuple[str, str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, text in facts:
        table.add_row(name, Text(text))
    console.print(table, soft_wrap=False)


def run_facts(trainer, script_args: TrainingScriptArguments, output_dir: str) -> list[tuple[str, str]]:
    """Model, adapter, prompts, rewards and directory."""
    args, policy = trainer.args, trainer.policy
    record = "no record, found by inspection" if policy.family.inferred else f"record {policy.family.name!r}"
    height, width = policy.image_size
    size = f"{width} x {height}" + (f", {policy.num_frames} frames" if policy.num_frames else "")
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.parameters())
    test = "no held-out prompts" if trainer.eval_dataset is None else f"{len(trainer.eval_dataset):,} held out"
    facts = [
        ("Model", f"{script_args.model_name_or_path}: {type(policy.pipeline).__name__}, {record}"),
        (
            "Pictures",
            f"{size}, guidance_scale {policy.guidance_scale:g}, latents {' x '.join(map(str, policy.latent_shape))}",
        ),
        ("Trained", f"{trained:,} of {total:,} weights of {', '.join(policy.components)}"),
        (
            "Prompts",
            f"{len(trainer.train_dataset):,} to train on, {test}; such as {trainer.train_dataset[0]['prompt']!r}",
        ),
        ("Rewards", ", ".join(_weighted(trainer))),
    ]
    if trainer.eval_reward_names:
        facts.append(("Watched", ", ".join(trainer.eval_reward_names)))
    levels = [trainer.noise_levels[step] for step in trainer.sde_steps]
    if any(levels):
        noise = f"{levels[0]:g}" if len(set(levels)) == 1 else ", ".join(f"{level:.3g}" for level in levels)
        facts.append(("Noise", f"{args.sde_type}, level {noise}"))
    return [*facts, ("Goes to", output_dir), *missing_devices(trainer)]


def missing_devices(trainer) -> list[tuple[str, str]]:
    """Devices of rewards that are not here: the run may be for another machine."""
    from ..rewards.models import ModelReward, check_device

    found = []
    names, rewards = trainer.reward_names + trainer.eval_reward_names, trainer.reward_funcs + trainer.eval_reward_funcs
    for name, reward in zip(names, rewards, strict=True):
        if isinstance(reward, ModelReward) and reward.device is not None:
            try:
                check_device(reward.device)
            except ValueError as error:
                found.append(("Warning", f"here the run would end with: Reward {name!r}: {error}"))
    return found


def _weighted(trainer) -> list[str]:
    weights = trainer.reward_weights.tolist()
    if set(weights) == {1.0}:
        return trainer.reward_names
    return [f"{weight:g} x {name}" for weight, name in zip(weights, trainer.reward_names, strict=True)]


def update_facts(trainer, updates: int) -> list[tuple[str, str]]:
    """Updates, evaluations, and memory as the doctor estimates it."""
    from ..policy.allocations import device_memory
    from ..policy.doctor import Diagnosis, Untrainable, examine_policy, note_memory
    from .doctor import PHASES

    args = trainer.args
    groups, each = groups_per_rollout(trainer), updates_per_rollout(trainer)
    prompts = groups // trainer.groups_per_prompt
    seeds = f", {trainer.groups_per_prompt} groups each" if trainer.groups_per_prompt > 1 else ""
    processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
    facts = [
        (
            "Rollout",
            f"{count_text(prompts, 'prompt')}{seeds}{processes}; {count_text(each, 'update')}",
        ),
        ("Run", f"{count_text(updates, 'update')} from {count_text(-(-updates // each), 'rollout')}"),
    ]
    if trainer.eval_dataset is not None:
        steps = args.num_eval_inference_steps
        facts.append(
            (
                "Evaluation",
                f"{len(trainer.eval_dataset):,} pictures of {steps} steps: {len(trainer.eval_dataset) * steps:,} evaluations more each time",
            )
        )
    trainer.policy.pipeline.set_progress_bar_config(disable=True)
    diagnosis = Diagnosis(type(trainer.policy.pipeline).__name__)
    try:
        examine_policy(trainer.policy, diagnosis, image=trainer.train_dataset[0].get("image"))
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            note_memory(diagnosis, *memory_settings(trainer, updates), device_memory(trainer.accelerator.device))
    except Untrainable as problem:
        facts.append(("Warning", f"trl-flow doctor says that it does not train: {problem}"))
    if diagnosis.memory:
        sums = {phase: sum(parts.values()) for phase, parts in diagnosis.memory.items()}
        largest = max(sums, key=sums.get)
        parts = ", ".join(f"{part} {size:.2g}" for part, size in diagnosis.memory[largest].items() if size >= 5e-3)
        others = ", ".join(f"{phase} {size:.2g}" for phase, size in sums.items() if phase != largest)
        auto = (
            "; auto counts as a single row" if "auto" in (args.rollout_batch_size, args.transition_batch_size) else ""
        )
        facts.append(
            (
                "Memory",
                f"about {sums[largest]:.2g} GiB a process {PHASES[largest]}{f' ({parts})' if parts else ''}; in other phases "
                f"{others}{auto}; and what the rewards' models take",
            )
        )
    return facts + [("Warning", warning) for warning in diagnosis.warnings]


def time_text(trainer, updates: int) -> str:
    """How long the run will take on this device, and what is not counted."""
    args = trainer.args
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "not measured, as weights are spread over processes"
    try:
        found = estimate(trainer, rollouts(trainer), updates)
    except torch.OutOfMemoryError:
        return (
            f"not measured: the device has too little memory for rollout_batch_size={args.rollout_batch_size} or "
            f"transition_batch_size={args.transition_batch_size}"
        )
    parts = dict(found.seconds)
    if found.evaluations:
        parts[count_text(found.evaluations, "evaluation")] = parts.pop("evaluations")
    total = sum(parts.values())
    text = f"about {format_duration(total)} on {trainer.accelerator.device.type}"
    text += f", {args.world_size} processes at a time" if args.world_size > 1 else ""
    text += (
        f" ({', '.join(f'{part} {format_duration(seconds)}' for part, seconds in parts.items() if seconds >= 0.5)})"
    )
    if found.untimed:
        text += f", and what these rewards take, which were not timed: {', '.join(found.untimed)}"
    return f"{text}; not counted: loading, saving, the report"
