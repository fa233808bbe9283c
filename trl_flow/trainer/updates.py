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


"""Updates: the gradient of one micro-batch of transitions, in chunks that memory has room for."""

import dataclasses
import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from ..objective import kl_divergence
from ..rollout import to_device
from .rollouts import Stopwatch
from .sharding import shard_of
from .transitions import TrainedStep, TransitionChunk, trained_steps, transition_chunk


# Of gradients that are averaged in one exchange between processes.
BUCKET_BYTES = 256 * 2**20


class UpdateMixin:
    """The part of the trainer that trains."""

    _seconds_training = 0.0

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        began = time.perf_counter()
        model.train()
        inputs = self._prepare_inputs(inputs)
        watch = Stopwatch(self.accelerator.device)
        with watch.phase("train"):
            loss = self._forward_backward(model, inputs)
            if self._averages_gradients and self.accelerator.sync_gradients:
                average_gradients(self._trainable)
        self._step += 1
        # Like the other phases, in seconds of a whole update.
        self._seconds_training += watch.seconds()["train"]
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._metrics["train"]["time/train"].append(self._seconds_training)
            self._seconds_training = 0.0
        self._elapsed += time.perf_counter() - began
        return loss / self.current_gradient_accumulation_steps

    def _forward_backward(self, model, inputs: dict) -> torch.Tensor:
        """
        Adds the gradient of one micro-batch, step by step. Returns its loss, a mean over its transitions.

        A step whose forward or backward pass runs out of memory begins again, in smaller chunks, from the gradient that it
        began with.
        """
        size = self.batch_sizes["training"]
        loss_sum = torch.zeros((), device=inputs["advantages"].device)
        logged, norms, seen = defaultdict(list), {}, None
        if self._averages_gradients:
            model = self.model  # DDP around it would average in each backward pass
        steps = self._trained_steps(inputs)
        size.find(lambda n: self._try_rows(inputs, steps[0], n), loss_sum.device, self._reserved_memory())
        gradient = self._gradient()
        for number, at in enumerate(steps):
            previous, last = gradient, number == len(steps) - 1
            done = size.retried(
                functools.partial(self._train_step, model, inputs, at, last),
                max(1, len(at.rows)),
                functools.partial(self._set_gradient, previous),
            )
            for members, statistics, loss, logs in done:
                loss_sum += loss
                for name, value in logs.items():
                    logged[name].append(value)
                if statistics is not None:
                    seen = _note(seen, inputs["advantages"].shape, members, statistics)
            self._nfe += len(at.rows) * (2 if self.args.beta > 0 else 1)
            self._rows_trained += len(at.rows)
            gradient = self._gradient()
            if not self.is_deepspeed_enabled:  # which keeps gradients to itself
                norms[at.step] = self._whole_norm(_distance(gradient, previous))
        if seen is not None:
            inputs["old"] = seen
        self._log_update(logged, norms, inputs["steps"].tolist())
        return loss_sum

    def _train_step(self, model, inputs: dict, at: TrainedStep, last: bool, batch_size: int) -> list[tuple]:
        """
        Adds the gradient of one step of a micro-batch, chunk by chunk; `last` if no other step follows.

        Returns:
            `list[tuple]`: Of each chunk its members and their statistics, if later passes will compare with them, its loss
            and its logs.
        """
        args, old = self.args, inputs["old"]
        done = []
        parts = at.parts(batch_size)
        for number, part in enumerate(parts):
            chunk = self._chunk(inputs, at, part)
            final = last and number == len(parts) - 1
            with self._synchronised(model, final), self.compute_loss_context_manager():
                velocity = model(chunk.latents, chunk.sigma, chunk.conditioning)
                new = self.statistics(chunk, velocity)
                now = {name: value.detach() for name, value in new.items()}
                losses, logs = self.policy_loss(
                    chunk,
                    inputs["advantages"][chunk.members],
                    new,
                    now if old is None or chunk.is_repeated else self._recalled(chunk, old),
                )
                loss = at.weight * self._step_weights[chunk.step] * losses.sum()
                if args.beta > 0:
                    with torch.no_grad(), self.policy.reference():
                        reference = self.model(chunk.latents, chunk.sigma, chunk.conditioning)
                    kl = kl_divergence(
                        args.kl_type,
                        velocity,
                        reference,
                        chunk.sigma,
                        chunk.sigma_next,
                        self.noise_levels[chunk.step],
                        args.sde_type,
                    )[chunk.row]
                    loss = loss + args.beta * at.weight * kl.sum()
                    logs["kl"] = kl
                if chunk.is_repeated:
                    loss = 0 * loss
                # Of two denoisers, the one that this step belongs to may have no adapter.
                if loss.requires_grad:
                    self._backward(loss / self.current_gradient_accumulation_steps)
            if chunk.is_repeated:
                continue
            members, kept = self._kept(chunk, now) if old is None and args.num_iterations > 1 else (None, None)
            done.append((members, kept, loss.detach(), {name: value.detach() for name, value in logs.items()}))
        return done

    def _trained_steps(self, inputs: dict) -> list[TrainedStep]:
        skip_uninformative = self.args.beta == 0 and not self._trains_without_advantage
        steps = trained_steps(inputs, self.sigmas, self.conditioning, skip_uninformative, self.is_sharded)
        return self._with_repeats(steps) if self.is_sharded else steps

    def _chunk(self, inputs: dict, at: TrainedStep, part: slice | torch.Tensor | None) -> TransitionChunk:
        return transition_chunk(inputs, at, part)

    @torch.no_grad()
    def old_statistics(self, inputs: dict) -> dict[str, torch.Tensor]:
        """
        The [`statistics`] `(B, S, G, ...)` under the present policy, in the very batches that training will use, unless memory
        makes these smaller: then the two differ by rounding.
        """
        size, old = self.batch_sizes["training"], None
        steps = self._trained_steps(inputs)
        size.find(lambda n: self._try_rows(inputs, steps[0], n), inputs["advantages"].device, self._reserved_memory())

        def evaluate(at: TrainedStep, part: slice | None) -> tuple:
            chunk = self._chunk(inputs, at, part)
            with self.compute_loss_context_manager():
                velocity = self.model(chunk.latents, chunk.sigma, chunk.conditioning)
            return self._kept(chunk, self.statistics(chunk, velocity))

        for at in steps:
            for members, statistics in size.in_parts(functools.partial(evaluate, at), len(at.rows)):
                old = _note(old, inputs["advantages"].shape, members, statistics)
            for _ in range(at.repeats):
                evaluate(at, None)
            self._nfe += len(at.rows)
        return old

    def _kept(self, chunk: TransitionChunk, statistics: dict) -> tuple[tuple, dict[str, torch.Tensor]]:
        """A chunk's members, and the statistics of its transitions, where they wait to be compared with."""
        if not self.args.offload_trajectories:
            return chunk.members, statistics
        return chunk.members_on_cpu, {name: value.cpu() for name, value in statistics.items()}

    def _recalled(self, chunk: TransitionChunk, old: dict) -> dict[str, torch.Tensor]:
        """Of kept statistics those of a chunk's transitions, on the device."""
        members = chunk.members_on_cpu if self.args.offload_trajectories else chunk.members
        return {name: to_device(value[members], chunk.latents.device) for name, value in old.items()}

    # ---- Memory and gradients ----

    @property
    def _averages_gradients(self) -> bool:
        """
        Whether gradients are averaged here, once per update (DDP), and not by what the model is wrapped in (FSDP, DeepSpeed).
        So it does not matter to the others how often a process begins a step again.
        """
        return self.accelerator.distributed_type.value.startswith("MULTI_")

    @torch.enable_grad()
    def _try_rows(self, inputs: dict, at: TrainedStep, n: int):
        """Trains n rows, the same ones again if there are fewer, and forgets their gradient."""
        before = self._gradient()
        tried = dataclasses.replace(at, rows=at.rows[torch.arange(n) % len(at.rows)])
        try:
            self._train_step(self.model, {**inputs, "old": None}, tried, False, n)
        finally:  # a backward pass that runs out of memory has added part of its gradient
            self._set_gradient(before)

    def _reserved_memory(self) -> int:
        """Bytes of the optimizer's two moments and of one more copy while it steps, if it has not made them yet."""
        if self.optimizer is not None and self.optimizer.state:
            return 0
        return 3 * sum(parameter.numel() * parameter.element_size() for parameter in self._trainable)

    def _gradient(self) -> list[torch.Tensor | None]:
        return [None if parameter.grad is None else parameter.grad.clone() for parameter in self._trainable]

    def _set_gradient(self, gradient: list[torch.Tensor | None]):
        for parameter, value in zip(self._trainable, gradient, strict=True):
            if value is None or parameter.grad is None:
                parameter.grad = None if value is None else value.clone()
            else:
                parameter.grad.copy_(value)

    @property
    def _norms_later(self) -> bool:
        """Whether the gradient has the same norm in all processes in `_get_grad_norm` alone, and not in a micro-step."""
        return self._averages_gradients or self.is_deepspeed_enabled

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self._norms_later:
            # Here all processes stop together: one that stops before the average leaves the others waiting for it.
            self._check_gradient(float(norm))
        return norm

    def _check_gradient(self, norm: float):
        # A scaler of mixed precision provokes infinity, and leaves out the update.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise ValueError(
                f"The gradient holds NaN or infinity at step {self.state.global_step}: an update would spoil all of the "
                f"weights. float16 (dtype, fp16) overflows where bfloat16 does not; else lower learning_rate="
                f"{self.args.learning_rate}, and go on from the last checkpoint (resume_from_checkpoint=True)."
            )

    def _log_update(self, logged: dict, norms: dict, steps: list[int]):
        metrics = self._metrics["train"]
        for name, values in logged.items():
            values = torch.cat(values)
            if name == "ratio":
                for of in ("mean", "min", "max"):
                    metrics[f"ratio/{of}"].append(getattr(values, of)().item())
            else:
                metrics[name].append(values.mean().item())
        total = sum(norm.item() for norm in norms.values())
        if not self._norms_later:
            self._check_gradient(total)
        for step in steps if norms else ():
            share = norms[step].item() / total if step in norms and total > 0 else 0.0
            metrics[f"grad_share/step_{step}"].append(share)


def average_gradients(parameters: list[nn.Parameter]):
    """
    Averages gradients over all processes. Where some of them have none for a parameter, theirs is 0; where all have none,
    there is none, so that the optimizer leaves the parameter alone as it does on one process.
    """
    buckets = defaultdict(list)
    for parameter in parameters:
        buckets[parameter.dtype].append(parameter)
    for bucket in buckets.values():
        for part in _parts(bucket):
            _average(part)


def _parts(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in runs of about `BUCKET_BYTES`: copies of all gradients at once would take too much memory."""
    part, size = [], 0
    for parameter in parameters:
        part.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= BUCKET_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _average(parameters: list[nn.Parameter]):
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has_one = [p.grad is not None for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [gradients[0].new_tensor(has_one)])
    torch.distributed.all_reduce(flat)
    counts = flat[-len(parameters) :]
    # Read where it matters alone: the host waits for it.
    counts = [1] * len(parameters) if all(has_one) else counts.tolist()
    flat /= torch.distributed.get_world_size()
    averages = flat[: -len(parameters)].split([p.numel() for p in parameters])
    for parameter, gradient, average, count in zip(parameters, gradients, averages, counts, strict=True):
        if count:
            parameter.grad = gradient.copy_(average.view_as(gradient))


def _distance(now: list[torch.Tensor | None], then: list[torch.Tensor | None]) -> torch.Tensor:
    """Norm of the difference of two gradients; none at all is 0."""
    pairs = [(shard_of(a), b) for a, b in zip(now, then, strict=True) if a is not None]
    return (
        torch.stack([(a if b is None else a - shard_of(b)).norm() for a, b in pairs]).norm()
        if pairs
        else torch.zeros(())
    )


def _note(noted: dict | None, shape: torch.Size, members: tuple, statistics: dict) -> dict[str, torch.Tensor]:
    """Statistics of transitions `(m, ...)`, put in their members' places among those of all `(B, S, G, ...)`."""
    if noted is None:
        noted = {name: value.new_zeros(*shape, *value.shape[1:]) for name, value in statistics.items()}
    for name, value in statistics.items():
        noted[name][members] = value
    return noted
