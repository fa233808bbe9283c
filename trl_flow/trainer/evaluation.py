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

"""Held-out evaluation: deterministic sampling with fixed noise, scores, and the pictures that a person looks at."""

import json
import math
import shutil
import time
from collections import deque
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image

from ..credit import combine_rewards
from ..report.history import Samples
from ..report.tracking import save_grid
from ..rollout import Plan, execute, seeded_noise, to_device
from .rollouts import MOST_WAITING, means_by_tag


SAMPLES_FOLDER = "samples"


def deterministic_plan(num_steps: int) -> Plan:
    """One chain of Euler steps: the stock pipeline's sampler."""
    plan = Plan(num_steps)
    plan.tail(plan.start(), range(1, num_steps + 1))
    return plan


class EvaluationMixin:
    """The part of the trainer that evaluates."""

    # Pictures, prompts and scores of the newest evaluation, in the first process; `None` if it was of another dataset.
    evaluated_samples: Samples | None = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Samples one picture per held-out prompt with the ODE sampler and scores it.

        Each prompt keeps its noise from one evaluation to the next, so that scores are paired. The pictures of the
        first `num_logged_images` prompts, one by one and as a grid, and all the scores go to `output_dir/samples`.

        Args:
            eval_dataset ([`~datasets.Dataset`], *optional*): Defaults to the trainer's.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metrics.

        Returns:
            `dict[str, float]`: `eval_reward` (the weighted sum that is trained), mean and standard deviation of each
            reward as `eval_rewards/<name>/mean` and `/std`, its mean over the prompts of each tag as
            `eval_tags/<tag>/<name>` where the dataset has a column `tag`, `eval_num_samples`, and the seconds that it took
            as `eval_runtime`.
        """
        began, args = time.perf_counter(), self.args
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs an eval_dataset: give one to it or to the trainer.")
        plan, sigmas = (
            deterministic_plan(args.num_eval_inference_steps),
            self.policy.sigmas(args.num_eval_inference_steps),
        )
        funcs, names = self.reward_funcs + self.eval_reward_funcs, self.reward_names + self.eval_reward_names
        mine = range(args.process_index, len(dataset), args.world_size)
        scoring, results, images = deque(), [], {}
        self.model.eval()
        self._metrics["eval"].clear()
        self.evaluated_samples = None
        with self.averaged_weights(), self.policy.guided(args.eval_guidance_scale):
            self.find_batch_sizes(dataset[0])
            batch_size = self.batch_sizes["sampling"].rows
            # Sharded weights need all processes each time: one that has no prompts left evaluates one again.
            most = math.ceil(len(dataset) / args.world_size) if self.is_sharded else len(mine)
            for start in range(0, most, batch_size):
                numbers = mine[start : start + batch_size] or range(1)
                rows = [dataset[number] for number in numbers]
                noise = [
                    seeded_noise(args.seed, "eval", number, num_draws=1, latent_shape=self.policy.latent_shape)
                    for number in numbers
                ]
                conditioning = self.conditioning([row["prompt"] for row in rows], self.images(rows))
                rollout = execute(
                    plan,
                    self.velocity(conditioning),
                    sigmas,
                    to_device(torch.stack(noise), self.accelerator.device),
                    [0.0] * plan.num_steps,
                    initial_scale=self.policy.initial_scale(sigmas),
                )
                if start >= len(mine):
                    break
                pictures = self.decode(rollout.leaves[:, 0], conditioning)
                scoring.append(self.start_rewards(funcs, names, rows, pictures))
                if len(scoring) > MOST_WAITING:
                    results.append(scoring.popleft()())
                images |= {n: p for n, p in zip(numbers, pictures, strict=True) if n < args.num_logged_images}
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)

        results += [wait() for wait in scoring]
        self.release_rewards(funcs)
        # Scores, and in further columns 1 where one is missing because its function failed.
        local = torch.full((math.ceil(len(dataset) / args.world_size), 2 * len(names)), math.nan, dtype=torch.float64)
        if results:
            local[: len(mine)] = torch.cat([torch.cat(result, dim=1) for result in results])
        # Ranks took the rows in turn: interleave them again.
        ranks = self._gather(local).unflatten(0, (args.world_size, -1))
        scores, failed = ranks.transpose(0, 1).flatten(0, 1)[: len(dataset)].chunk(2, dim=1)
        if dataset is self.eval_dataset:
            self._save_samples(dataset, names, scores, images, self._gather_extra_columns(len(dataset)))
        self._extra_columns.clear()

        # A picture that a trained reward failed to score has no sum; one that it does not apply to has that of the others.
        judged = scores[:, : len(self.reward_funcs)]
        spoiled = failed[:, : len(self.reward_funcs)][:, self.reward_weights != 0].any(1)
        trained = combine_rewards(judged.masked_fill(spoiled[:, None], math.nan)[:, None], self.reward_weights)[:, 0]
        metrics = {
            f"{metric_key_prefix}_reward": None if trained.isnan().all() else trained.nanmean().item(),
            f"{metric_key_prefix}_num_samples": len(dataset),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        for name, column, lost in zip(names, scores.unbind(1), failed.unbind(1), strict=True):
            known = column[~column.isnan()]
            metrics[f"{metric_key_prefix}_rewards/{name}/failed"] = lost.mean().item()
            metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = known.mean().item() if len(known) else None
            metrics[f"{metric_key_prefix}_rewards/{name}/std"] = known.std().item() if len(known) > 1 else None
            if len(known) < len(column):
                metrics[f"{metric_key_prefix}_rewards/{name}/missing"] = len(column) - len(known)
            if "tag" in dataset.column_names:
                means = means_by_tag(dataset["tag"][:], column)
                metrics |= {f"{metric_key_prefix}_tags/{tag}/{name}": mean for tag, mean in means.items()}
        metrics |= self.averaged_metrics("eval", f"{metric_key_prefix}_")
        self.log(metrics)
        known = set(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        if added := {name: value for name, value in metrics.items() if name not in known}:
            self.log(added)  # what callbacks found out reaches the loggers, too
        self.model.train()
        return metrics

    def _determine_best_metric(self, metrics, trial):
        name = self.args.metric_for_best_model
        if name is not None and metrics.get(name, metrics.get(f"eval_{name}", 0.0)) is None:
            return False  # no picture had a score: this evaluation says nothing about the model
        return super()._determine_best_metric(metrics, trial)

    def _gather_extra_columns(self, n: int) -> dict[str, list]:
        """What the rewards have noted of each of n samples, by column, from all processes."""
        columns = {}
        for rank, part in enumerate(gather_object([dict(self._extra_columns)])):
            for name, values in part.items():
                columns.setdefault(name, [None] * n)[rank :: self.args.world_size] = values
        return columns

    def _save_samples(self, dataset, names: list[str], scores: torch.Tensor, images: dict, extra: dict[str, list]):
        folder = Path(self.args.output_dir) / SAMPLES_FOLDER / f"step_{self.state.global_step:06d}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        for number, image in images.items():
            if isinstance(image, list):
                # A video, to be looked at as it moves and, where only pictures are shown, side by side.
                image[0].save(
                    folder / f"{number:03d}.gif", save_all=True, append_images=image[1:], duration=125, loop=0
                )
                image = strip(image)
            image.save(folder / f"{number:03d}.png")
        if self.is_world_process_zero():
            record = {
                "prompts": dataset["prompt"][:],
                "scores": {
                    name: [None if math.isnan(value) else value for value in column.tolist()]
                    for name, column in zip(names, scores.unbind(1), strict=True)
                },
                **({"extra": extra} if extra else {}),
            }
            folder.with_suffix(".json").write_text(json.dumps(record, default=str))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and (paths := sorted(folder.glob("*.png"), key=lambda path: int(path.stem))):
            # On several machines this one may hold the files of some processes alone.
            numbers = [int(path.stem) for path in paths]
            self.evaluated_samples = Samples(
                self.state.global_step,
                [record["prompts"][number] for number in numbers],
                {name: [scores[number] for number in numbers] for name, scores in record["scores"].items()},
                paths,
                record["scores"],
            )
            save_grid(self.evaluated_samples)


def strip(frames: list[Image.Image], count: int = 4) -> Image.Image:
    """A few frames of a video side by side, from its first to its last."""
    count = min(count, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    width, height = frames[0].size
    picture = Image.new("RGB", (count * width, height))
    for i, frame in enumerate(chosen):
        picture.paste(frame, (i * width, 0))
    return picture
