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


"""Updates: the gradient of one micro-batch of transitions, chunk by chunk."""

import itertools
import math
import time
from collections import defaultdict
from contextlib import nullcontext

import torch

from ..objective import kl_divergence
from .rollouts import timed
from .transitions import TransitionChunk, transition_chunks


class UpdateMixin:
    """The part of the trainer that trains."""

    _seconds_training = 0.0

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        began = time.perf_counter()
        model.train()
        inputs = self._prepare_inputs(inputs)
        with timed(times := {}, "train"):
            loss = self._forward_backward(model, inputs)
        self._step += 1
        # Like the other phases, in seconds of a whole update.
        self._seconds_training += times["train"]
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._metrics["train"]["time/train"].append(self._seconds_training)
            self._seconds_training = 0.0
        self._elapsed += time.perf_counter() - began
        return loss / self.current_gradient_accumulation_steps

    def _forward_backward(self, model, inputs: dict) -> torch.Tensor:
        """Adds the gradient of one micro-batch, chunk by chunk. Returns its loss, a mean over its transitions."""
        args = self.args
        advantages, old = inputs["advantages"], inputs["old"]
        seen = None
        weight = 1.0 / max(1, inputs["trained"].sum().item())
        loss_sum = torch.zeros((), device=advantages.device)
        logged = defaultdict(list)
        previous = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._trainable]
        norms = {}
        # With the next chunk in sight, and no more of them in memory: conditioning is large.
        for chunk, following in itertools.pairwise(itertools.chain(self._chunks(inputs), [None])):
            last = following is None
            with nullcontext() if last else self.accelerator.no_sync(model), self.compute_loss_context_manager():
                velocity = model(chunk.latents, chunk.sigma, chunk.conditioning)
                new = self.statistics(chunk, velocity)
                now = {name: value.detach() for name, value in new.items()}
                losses, logs = self.policy_loss(
                    chunk,
                    advantages[chunk.members],
                    new,
                    now if old is None else {name: value[chunk.members] for name, value in old.items()},
                )
                loss = weight * self._step_weights[chunk.step] * losses.sum()
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
                    loss = loss + args.beta * weight * kl.sum()
                    logs["kl"] = kl
                # Of two denoisers, the one that this step belongs to may have no adapter.
                if loss.requires_grad:
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            if old is None and args.num_iterations > 1:
                seen = _note(seen, advantages.shape, chunk, now)
            self._nfe += len(chunk.latents) * (2 if args.beta > 0 else 1)
            self._rows_trained += len(chunk.latents)
            loss_sum += loss.detach()
            for name, value in logs.items():
                logged[name].append(value.detach())
            if last or following.step != chunk.step:
                gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._trainable]
                norms[chunk.step] = torch.stack(
                    [(now - then).norm() for now, then in zip(gradient, previous, strict=True)]
                ).norm()
                previous = gradient
        if seen is not None:
            inputs["old"] = seen
        self._log_update(logged, norms, inputs["steps"].tolist())
        return loss_sum

    def _chunks(self, inputs: dict):
        return transition_chunks(
            inputs,
            self.sigmas,
            self.conditioning,
            self.args.transition_batch_size,
            self.args.beta == 0 and not self._trains_without_advantage,
        )

    @torch.no_grad()
    def old_statistics(self, inputs: dict) -> dict[str, torch.Tensor]:
        """The [`statistics`] `(B, S, G, ...)` under the present policy, in the very batches that training will use."""
        old = None
        for chunk in self._chunks(inputs):
            with self.compute_loss_context_manager():
                velocity = self.model(chunk.latents, chunk.sigma, chunk.conditioning)
            old = _note(old, inputs["advantages"].shape, chunk, self.statistics(chunk, velocity))
            self._nfe += len(chunk.latents)
        return old

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
        # A scaler of mixed precision provokes infinity, and leaves out the update.
        if not math.isfinite(total) and self.accelerator.scaler is None:
            raise ValueError(
                f"The gradient holds NaN or infinity at step {self.state.global_step}: an update would spoil all of the "
                f"weights. float16 (dtype, fp16) overflows where bfloat16 does not; else lower learning_rate="
                f"{self.args.learning_rate}, and go on from the last checkpoint (resume_from_checkpoint=True)."
            )
        for step in steps:
            share = norms[step].item() / total if step in norms and total > 0 else 0.0
            metrics[f"grad_share/step_{step}"].append(share)


def _note(noted: dict | None, shape: torch.Size, chunk: TransitionChunk, statistics: dict) -> dict[str, torch.Tensor]:
    """Statistics of a chunk's transitions `(m, ...)`, put in their places among those of all `(B, S, G, ...)`."""
    if noted is None:
        noted = {name: value.new_zeros(*shape, *value.shape[1:]) for name, value in statistics.items()}
    for name, value in statistics.items():
        noted[name][chunk.members] = value
    return noted
