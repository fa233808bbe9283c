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

"""Rollouts: sampling, decoding, scoring and crediting one batch of prompts."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image

from ..credit import assign_credit, combine_rewards, compared_leaves
from ..report.sample_table import contrasting, print_samples
from ..rewards import NothingToLearnError, check_rewards, start_scoring
from ..rollout import execute, seeded_noise, to_device
from .transitions import select_transitions


# Batches of pictures whose rewards are waited for, before the next prompts are sampled: the fifth waits for the first.
MOST_WAITING = 4


class RolloutMixin:
    """The part of the trainer that samples and scores."""

    _printed_samples: dict | None = None

    def conditioning(self, prompts: list[str], images: list[torch.Tensor] | None) -> list:
        """The policy's conditioning on prompts, and on the pictures `(height, width, 3)`, uint8, that they start from."""
        return self.policy.conditioning(prompts, images and [Image.fromarray(image.cpu().numpy()) for image in images])

    def images(self, rows: list[dict]) -> list[torch.Tensor] | None:
        """The pictures that rows of a dataset start from, where the pipeline starts from any."""
        if not self.policy.family.image or "image" not in rows[0]:
            return None
        return [torch.from_numpy(np.array(row["image"].convert("RGB"))) for row in rows]

    def velocity(self, conditioning: list) -> Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]:
        """The executor's view of the policy, for a batch of prompts."""

        def velocity(latents, sigma, prompt):
            numbers = prompt.tolist()

            def part_of(part: slice):
                return self.model(latents[part], sigma, [conditioning[number] for number in numbers[part]])

            parts = self.batch_sizes["sampling"].in_parts(part_of, len(latents))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return velocity

    def find_batch_sizes(self, row: dict):
        """Finds how many rows sampling and decoding can take at once, where that is not known, with any row of a dataset."""
        sampling, decoding = self.batch_sizes["sampling"], self.batch_sizes["decoding"]
        if sampling.rows is not None and decoding.rows is not None:
            return
        device, sigma = self.accelerator.device, self.sigmas[0].item()
        (condition,) = self.conditioning([row["prompt"]], self.images([row]))

        def latents(n: int) -> torch.Tensor:
            return torch.zeros(n, *self.policy.latent_shape, device=device)

        @torch.no_grad()
        def sample(n: int):
            self.model(latents(n), sigma, [condition] * n)

        def decode(n: int):
            self.policy.decode(latents(n), n, [condition] * n)

        sampling.find(sample, device, self._reserved_memory())
        decoding.find(decode, device, self._reserved_memory())

    def _generate_and_score(self, rows: list[dict]) -> list[dict]:
        """Samples, scores and credits one rollout batch. Returns the micro-batches that it feeds, in training order."""
        args, sde_steps = self.args, self.rollout_steps()
        plan, sigmas = self.rollout_plan(sde_steps), self.rollout_sigmas(sde_steps)
        # Steps beyond the trainer's own grid are not stochastic.
        noise_levels = (self.noise_levels + [0.0] * plan.num_steps)[: plan.num_steps]
        prompts, images = [row["prompt"] for row in rows], self.images(rows)
        device = self.accelerator.device
        watch = Stopwatch(device)
        with watch.phase("rollout"):
            self.find_batch_sizes(rows[0])
        # As many prompts at once as fill a forward: few large batches instead of many small ones.
        prompts_per_sweep = max(1, self.batch_sizes["sampling"].rows // plan.width)
        nodes, decoding, scoring, scored, observed = [], deque(), deque(), [], []
        leaf_position = {node: position for position, node in enumerate(plan.leaves)}
        edges = [plan.transitions[step] for step in plan.steps]
        leaves = torch.tensor([[[leaf_position[leaf] for leaf in e.leaves] for e in group] for group in edges])
        compared = compared_leaves(leaves, len(plan.leaves))
        keys = self._group_keys(prompts)

        def score():
            part, pictures = decoding.popleft()
            with watch.phase("decode"):
                pictures = pictures()
            with watch.phase("reward"):
                # Rewards with a thread of their own go on while the next prompts are sampled, but not far behind: pictures
                # wait in memory.
                scoring.append(
                    self.start_rewards(
                        self.reward_funcs,
                        self.reward_names,
                        [row for row in rows[part] for _ in plan.leaves],
                        pictures,
                        [(prompt, number) for prompt in range(len(rows[part])) for number in compared],
                    )
                )
                if len(scoring) > MOST_WAITING:
                    scored.append(scoring.popleft()())

        for start in range(0, len(rows), prompts_per_sweep):
            part = slice(start, start + prompts_per_sweep)
            with watch.phase("rollout"):
                conditioning = self.conditioning(prompts[part], images and images[part])
                noise = [
                    seeded_noise(
                        args.seed, "train", key, num_draws=plan.num_draws, latent_shape=self.policy.latent_shape
                    )
                    for key in keys[part]
                ]
                rollout = execute(
                    plan,
                    self.velocity(conditioning),
                    sigmas,
                    to_device(torch.stack(noise), device),
                    noise_levels,
                    args.sde_type,
                    initial_scale=self.policy.initial_scale(sigmas),
                )
            self._nfe += rollout.num_evaluations
            observed.append(self.observe(rollout))
            position = {node: number for number, node in enumerate(rollout.nodes)}
            # One by one: a second copy of them all would take as much again of the memory that they are to leave.
            kept = [node.cpu() if args.offload_trajectories else node for node in rollout.nodes.values()]
            rollout.nodes.clear()
            nodes.append(torch.stack(kept, dim=1))
            del kept
            with watch.phase("decode"):
                conditioning = [condition for condition in conditioning for _ in plan.leaves]
                decoding.append((part, self.start_decoding(rollout.leaves.flatten(0, 1), conditioning)))
            del rollout
            if len(decoding) > self._sweeps_ahead:
                score()
        while decoding:
            score()
        with watch.phase("reward"):
            parts = scored + [wait() for wait in scoring]
            self.release_rewards(self.reward_funcs)
        rewards, failed = (
            torch.cat([part[i] for part in parts]).unflatten(0, (len(rows), len(plan.leaves))) for i in (0, 1)
        )  # (B, L, R)
        # What a function that failed would have said is not known: the sample is out, whatever the others say.
        judged = rewards.masked_fill(self._check_failures(rewards, failed)[..., None], math.nan)
        advantages, mask = assign_credit(
            judged,
            self.reward_weights,
            leaves,
            self.credit,
            args.multi_objective_aggregation,
            self._gather_groups,
            scale=args.scale_rewards,
            **self._normalization,
        )
        advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        advantages = self.redistribute(advantages, mask, None if observed[0] is None else torch.cat(observed).cpu())
        total = combine_rewards(judged, self.reward_weights)
        self._log_rollout(rewards, total, advantages, mask, plan, [row.get("tag") for row in rows])
        num_images = rewards.shape[0] * rewards.shape[1] * args.world_size
        self._metrics["train"]["images_per_second"].append(num_images / max(sum(watch.seconds().values()), 1e-9))
        self.log_credit(total[:, leaves], plan)
        self._note_samples(prompts, rewards, total, advantages, leaves)

        nodes = nodes[0] if len(nodes) == 1 else torch.cat(nodes)
        everything = {
            "nodes": nodes,
            "advantages": advantages.float().to(device),
            "trained": self.trained(advantages, mask, keys).to(device),
            "steps": torch.tensor(plan.steps),
            "parents": torch.tensor([[position[e.parent] for e in group] for group in edges]),
            "children": torch.tensor([[position[e.child] for e in group] for group in edges]),
            "prompts": prompts,
            "images": images,
            "keys": keys,
            "old": None,
        }
        # The part of the steps changes slowest: all prompts are trained at one part before the next.
        parts = torch.arange(len(plan.steps)).chunk(self.updates_per_pass)
        size = args.per_device_train_batch_size
        micro_batches = [
            select_transitions(everything, range(start, start + size), part)
            for part in parts
            for start in range(0, len(prompts), size)
        ]
        for number, micro_batch in enumerate(micro_batches):
            # On-policy, exp(logp - logp.detach()) is exactly 1 and needs no second evaluation.
            if not self.on_policy(number):
                with watch.phase("old_policy"):
                    micro_batch["old"] = self.old_statistics(micro_batch)
        for name, seconds in watch.seconds().items():
            self._metrics["train"][f"time/{name}"].append(seconds)
        return micro_batches

    @cached_property
    def _sweeps_ahead(self) -> int:
        """
        How many sweeps a GPU is told to do before the host waits for the pictures of the one before, which it converts and
        scores meanwhile.
        """
        return int(self.accelerator.device.type == "cuda")

    def _group_keys(self, prompts: list[str]) -> list[str]:
        """
        What the noise of each group is a function of, and any other randomness of its own: the update that it is for, the
        prompt and, where the rollout has a prompt several times, its turn.
        """
        everyone, own = prompts, range(len(prompts))
        if self._prompts_recur:
            # Of the rollout, not of the process: the turn of a group must not depend on how they are dealt.
            dealt = self.layout.dealt()
            gathered = gather_object(prompts)
            everyone = [gathered[position] for position in dealt.flatten().argsort().tolist()]
            own = dealt[self.args.process_index].tolist()
        # Updates, unlike micro-steps, are as many on any number of processes.
        update = self._step // self.args.gradient_accumulation_steps
        seen, keys = Counter(), []
        for prompt in everyone:
            keys.append(f"{update}|{prompt}|{seen[prompt]}")
            seen[prompt] += 1
        return [keys[number] for number in own]

    @cached_property
    def _prompts_recur(self) -> bool:
        """Whether groups of one prompt may be on several processes. All of them give the same answer."""
        if self.args.world_size == 1:
            return False
        own = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return own % self.groups_per_prompt > 0 or len(set(self.train_dataset["prompt"][:])) < len(self.train_dataset)

    def _gather_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(B, ...)` of this process's groups -> those of all groups of the rollout, in its order."""
        return self.layout.in_order(self._gather(values))

    def _check_failures(self, rewards: torch.Tensor, failed: torch.Tensor) -> torch.Tensor:
        """
        The samples `(B, L)` that a reward function failed to score, from scores and failures `(B, L, R)`.

        Raises:
            NothingToLearnError: If no sample has a score.
            ValueError: If more than `max_nan_fraction` of them have been failed.
        """
        used = self.reward_weights != 0
        spoiled = failed[..., used].any(-1)
        # Counted over all processes: one of them alone must not leave the others waiting.
        counts = [(~rewards[..., used].isnan()).sum(), spoiled.sum(), *failed.sum((0, 1))]
        counts = self._gather(torch.stack(counts)).view(self.args.world_size, -1).sum(0)
        num_known, num_spoiled, *num_failed = counts.tolist()
        count = spoiled.numel() * self.args.world_size
        names = ", ".join(self.reward_names)
        for name, number in zip(self.reward_names, num_failed, strict=True):
            self._metrics["train"][f"rewards/{name}/failed"].append(number / count)
        if num_known == 0:
            raise NothingToLearnError(
                f"None of the reward functions ({names}) has a score for any of the {count} pictures of step "
                f"{self.state.global_step}: there is nothing to learn from."
            ) from self._last_reward_error
        if num_spoiled > self.args.max_nan_fraction * count:
            shares = ", ".join(
                f"{name} {number / count:.0%}" for name, number in zip(self.reward_names, num_failed, strict=True)
            )
            # All processes are here: what one of them was told, the others can tell.
            first = next((text for text in gather_object([_describe(self._last_reward_error)]) if text), "")
            raise ValueError(
                f"Reward functions failed for {num_spoiled} of the {count} pictures of step {self.state.global_step} "
                f"({shares}), more than max_nan_fraction={self.args.max_nan_fraction}.{first} Mend them and go on from the "
                "last checkpoint (resume_from_checkpoint=True), or allow more."
            ) from self._last_reward_error
        return spoiled

    def decode(self, latents: torch.Tensor, conditioning: list) -> list:
        """
        PIL pictures of clean latents `(n, *latent)`; of videos, lists of their frames.

        Raises:
            ValueError: If there are values that are no numbers: a reward would score them as it pleases.
        """
        return self.start_decoding(latents, conditioning)()

    def start_decoding(self, latents: torch.Tensor, conditioning: list) -> Callable[[], list]:
        """[`decode`] in two parts: what is returned waits for a GPU, and converts."""
        decoded = self.batch_sizes["decoding"].retried(
            lambda batch_size: self.policy.start_decoding(latents, batch_size, conditioning), len(latents)
        )
        return lambda: self._pictures(decoded(), latents, conditioning)

    def _pictures(self, decoded: torch.Tensor, latents: torch.Tensor, conditioning: list) -> list:
        if not decoded.isfinite().all():
            dtype = conditioning[0].latent_dtype
            what = (
                "The VAE decodes finite latents to pictures" if latents.isfinite().all() else "The denoiser's latents"
            )
            raise ValueError(
                f"{what} that hold NaN or infinity, at step {self.state.global_step}, with the pipeline in {dtype}. "
                + (
                    "float16 ends at 65504: load it with dtype bfloat16 or float32."
                    if dtype == torch.float16
                    else f"Weights that have grown too large do that: go on from an earlier checkpoint with a learning_rate "
                    f"below {self.args.learning_rate}."
                )
            )
        return [_to_pil(video) for video in decoded] if decoded.ndim == 5 else _to_pil(decoded)

    def check_reward_functions(self):
        """Calls the reward functions on test pictures, so that one that cannot work is found before any work is spent."""
        self.prepare_rewards(self.reward_funcs + self.eval_reward_funcs)
        height, width = self.policy.image_size
        watched_on = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        for functions, names, dataset, trained in (
            (self.reward_funcs, self.reward_names, self.train_dataset, True),
            (self.eval_reward_funcs, self.eval_reward_names, watched_on, False),
        ):
            check_rewards(
                functions,
                names,
                [dataset[number] for number in range(min(2, len(dataset)))],
                (width, height),
                self.policy.num_frames,
                trained,
                self._reward_threads,
                trainer_state=self.state,
                log_extra=lambda column, values: None,
                log_metric=lambda name, value: None,
            )
        self.release_rewards(self.reward_funcs + self.eval_reward_funcs)

    def start_rewards(
        self, reward_funcs, reward_names, rows: list[dict], images: list, groups: list | None = None
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """
        Begins to score pictures, one for each row; `groups` says which are compared with each other.

        Returns:
            `Callable`: Waits for the scores `(n, R)`, float64 on the CPU, NaN where there is none, and for where they are
            missing because a function failed.
        """
        self.prepare_rewards(reward_funcs)
        collect = start_scoring(
            self._reward_threads,
            reward_funcs,
            reward_names,
            [row["prompt"] for row in rows],
            images,
            {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
            range(len(rows)) if groups is None else groups,
            trainer_state=self.state,
            log_extra=self._log_extra,
            log_metric=self._log_metric,
        )

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            values, failed, errors = collect()
            for raised in errors.values():
                if raised:
                    self._last_reward_error = raised[0]
            return values, failed

        return wait

    def calculate_rewards(self, reward_funcs, reward_names, rows: list[dict], images: list) -> torch.Tensor:
        """Scores of shape `(n, R)`, float64 on the CPU; NaN where there is none."""
        return self.start_rewards(reward_funcs, reward_names, rows, images)()[0]

    def prepare_rewards(self, reward_funcs):
        """Lets the reward functions load what they need, once."""
        for function in reward_funcs:
            if hasattr(function, "prepare") and not any(function is known for known in self._prepared_rewards):
                function.prepare(self.accelerator.device)
                self._prepared_rewards.append(function)

    def release_rewards(self, reward_funcs):
        """Lets the reward functions free what they need only while they score; those that were unavailable may be back."""
        self._reward_threads.unavailable.clear()
        for function in reward_funcs:
            if hasattr(function, "release"):
                function.release()

    def _log_extra(self, column: str, values: list):
        """`log_extra` of TRL's reward functions: a column that is written beside the held-out scores."""
        if not self.model.training:
            self._extra_columns[column].extend(values)

    def _log_metric(self, name: str, value: float):
        """`log_metric` of TRL's reward functions: a number that is averaged over a logging step."""
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _log_rollout(self, rewards, total, advantages, mask, plan, tags):
        metrics = self._metrics["train"]
        metrics["reward"].append(_nanmean(total))
        metrics["reward_std"].append(_nanstd(total, dim=1))
        for r, name in enumerate(self.reward_names):
            metrics[f"rewards/{name}/mean"].append(_nanmean(rewards[..., r]))
            metrics[f"rewards/{name}/std"].append(_nanstd(rewards[..., r], dim=1))
            for tag, mean in means_by_tag(tags, rewards[..., r]).items():
                metrics[f"tags/{tag}/{name}"].append(mean)
        metrics["frac_reward_nan"].append(rewards.isnan().double().mean().item())
        metrics["frac_reward_zero_std"].append((~mask.any(-1)).double().mean().item())
        metrics["advantages/mean"].append(advantages.mean().item())
        for s, step in enumerate(plan.steps):
            metrics[f"advantages/std/step_{step}"].append(advantages[:, s].std().item())
            if any(edge.parent != edge.child for edge in plan.transitions[step]):
                metrics[f"noise_level/step_{step}"].append(self.noise_levels[step])

    def _note_samples(self, prompts, rewards, total, advantages, leaves):
        """Keeps what the next log prints of this rollout."""
        chosen = contrasting(total.tolist(), self.args.num_printed_samples)
        names = self.reward_names if rewards.shape[-1] == 1 else [*self.reward_names, "sum"]
        columns = rewards if rewards.shape[-1] == 1 else torch.cat([rewards, total[..., None]], dim=-1)
        self._printed_samples = {
            "prompts": [prompts[group] for group, _ in chosen],
            "scores": {name: [columns[g, leaf, r].item() for g, leaf in chosen] for r, name in enumerate(names)},
            # Of all transitions that have led to a sample. One without a reward has none.
            "advantages": [
                math.nan if total[g, leaf].isnan() else _nanmean(advantages[g][(leaves == leaf).any(-1)])
                for g, leaf in chosen
            ],
        }

    def print_samples(self):
        """Prints samples of a rollout that has not been shown, in the first process."""
        if not self.model.training:
            return
        if self.is_world_process_zero() and self._printed_samples is not None and self._printed_samples["prompts"]:
            print_samples(**self._printed_samples, step=self.state.global_step)
        self._printed_samples = None


def _describe(error: Exception | None) -> str:
    return "" if error is None else f" The last error was {type(error).__name__}: {error}."


def _to_pil(images: torch.Tensor) -> list:
    return DiffusionPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).contiguous().numpy())


def means_by_tag(tags: list[str | None], scores: torch.Tensor) -> dict[str, float]:
    """Mean score of the prompts of each tag, from the scores `(B, ...)` of B prompts; a tag without a score is left out."""
    means = {}
    for tag in dict.fromkeys(tag for tag in tags if isinstance(tag, str)):
        mean = _nanmean(scores[[number for number, own in enumerate(tags) if own == tag]])
        if not math.isnan(mean):
            means[tag] = mean
    return means


def _nanmean(values: torch.Tensor) -> float:
    return values.double().nanmean().item()


def _nanstd(values: torch.Tensor, dim: int) -> float:
    """Mean over the rest of the standard deviation along `dim`."""
    mean = values.nanmean(dim, keepdim=True)
    return (values - mean).square().nanmean(dim).sqrt().nanmean().item()


class Stopwatch:
    """
    Seconds that phases take. On a GPU the host does not wait between them: what is measured is the time between events in
    the GPU's queue, and what the host does while the GPU computes takes none.

    Args:
        device (`torch.device`): Where phases compute.
    """

    def __init__(self, device: torch.device):
        self.device, self._marks = device, {}

    @contextmanager
    def phase(self, name: str):
        """Adds what passes within to the phase's time."""
        began = self._mark()
        yield
        self._marks.setdefault(name, []).append((began, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Of each phase, in the order in which they first ended; waits until all of them have."""
        if self.device.type != "cuda":
            return {name: sum(ended - began for began, ended in marks) for name, marks in self._marks.items()}
        torch.cuda.synchronize(self.device)
        return {
            name: sum(began.elapsed_time(ended) for began, ended in marks) / 1000
            for name, marks in self._marks.items()
        }

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
