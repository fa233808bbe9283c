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

"""Memory of a run: what it will take, found without weights and without doing the work."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..rollout import Plan, chain_plan, execute, log_prob, transition
from .allocations import PLAIN, ledger, module_bytes, num_bytes, without_weights
from .conditioning import Condition
from .embeddings import HASHED_WORDS
from .encoders import can_move
from .flow_policy import FlowPolicy


# What a CUDA context and the gaps between allocations take beside what is counted here, in bytes.
ALLOWANCE = 2**30
# Bytes that an optimizer keeps of each trained weight, by what its name holds; the first that fits.
OPTIMIZER_BYTES = (
    ("adafactor", 0),
    ("sgd", 0),
    ("lion_8bit", 1),
    ("lion", 4),
    ("rmsprop", 4),
    ("adagrad", 4),
    ("8bit", 2),
    ("4bit", 1),
    ("", 8),
)
# Part of what is missing: less is not worth a setting.
LEAST_GAIN = 0.01
# Of the random numbers that weights are hashed with, where prompts are precomputed: they stay.
HASH_BYTES = 8 * HASHED_WORDS
# Bytes of a weight and of what belongs to it: a scale for each row of int8, and for each 64 weights of nf4.
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class MemorySettings:
    """
    What a run's memory depends on beside its pipeline: a trainer's settings, by their names.

    Attributes:
        plan ([`Plan`]): The tree of one group. Default: 24 chains of 10 steps.
        prompts (`int`): Groups of a rollout, on one process.
        known_prompts (`int`): Prompts whose conditioning is kept at a time.
        rollout_batch_size, transition_batch_size (`int`): Rows of a forward in rollouts, and in training.
        activation_checkpointing (`bool`): Whether activations are computed again in the backward pass.
        precompute_prompts, offload_encoders (`bool`): Whether the encoders leave the device: before training, in which
            case they have it without the denoisers, or when they have encoded the prompts of a rollout.
        offload_vae (`bool`): Whether the VAE is there to decode alone.
        vae_slicing, vae_tiling (`bool`): Whether it decodes picture by picture, and each in tiles.
        offload_trajectories (`bool`): Whether the latents of a rollout wait on the CPU, and what is kept to compare with.
        compared_bytes (`int`): What is kept of the sampling policy, of all transitions of a rollout, to compare with.
        reference (`bool`): Whether the base model is evaluated beside what is trained (`beta` above 0).
        autocast (`torch.dtype` or `None`): Precision of mixed-precision training.
        optim (`str`): Name of the optimizer.
        ema (`bool`): Whether there is a moving average.
        sampling_policy (`bool`): Whether the policy that samples is another one than the trained one.
        several_processes (`bool`): Whether gradients are exchanged, of which there is a copy then.
        dtype (`torch.dtype` or `None`): Precision of the frozen weights, where it is not the one that they are in.
        quantization (`str` or `None`): `"int8"` or `"nf4"`, of a denoiser that is not quantised yet.
        host (`bool`): Whether what waits on the CPU takes nothing of this memory.
    """

    plan: Plan = chain_plan(10, 24, list(range(9)))
    prompts: int = 1
    known_prompts: int = 1
    rollout_batch_size: int = 32
    transition_batch_size: int = 8
    activation_checkpointing: bool = True
    precompute_prompts: bool = False
    offload_encoders: bool = False
    offload_vae: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload_trajectories: bool = False
    compared_bytes: int = 0
    reference: bool = False
    autocast: torch.dtype | None = None
    optim: str = "adamw_torch_fused"
    ema: bool = True
    sampling_policy: bool = False
    several_processes: bool = False
    dtype: torch.dtype | None = None
    quantization: str | None = None
    host: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that a process holds, by phase and by what takes them.

    Attributes:
        phases (`dict[str, dict[str, int]]`): Of each phase, at its largest, its parts.
    """

    phases: dict[str, dict[str, int]]

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes of that phase: phases follow each other."""
        return sum(self.phases[self.largest].values())

    def beyond(self, limit: int) -> int:
        """Bytes by which phases exceed a limit, all together: what helps one of two that are as large helps."""
        return sum(max(0, sum(parts.values()) - limit) for parts in self.phases.values())


class MemoryEstimator:
    """
    Estimates the memory of runs with one pipeline.

    The policy's own forward and backward pass, the executor and the decoder run with tensors that have shapes and no
    content, while what would be allocated is noted. What is the same for several settings is found once.

    Args:
        policy ([`FlowPolicy`]): The policy. Its weights may be on any device, or fake.
        conditions (`list[Condition]`): Of prompts of a rollout, which its rows belong to in turn.
        sigmas (`torch.Tensor` of shape `(T + 1,)`): The grid.
    """

    def __init__(self, policy: FlowPolicy, conditions: list[Condition], sigmas: torch.Tensor):
        self.policy, self.conditions, self.sigmas = policy, conditions, sigmas.tolist()
        components = {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}
        self.denoisers = policy.denoisers
        self.encoders = {name: part for name, part in components.items() if name in policy.encoders.models}
        self.others = {
            name: part
            for name, part in components.items()
            if name not in policy.components and name not in self.encoders
        }
        self._found: dict[tuple, int] = {}
        self._largest: dict[str, int] = {}
        self._sweeps: dict[tuple, tuple[dict[int, int], dict[str, int]]] = {}
        self._cast: dict[torch.dtype, list[Condition]] = {}

    # ---- What is there all the time ----

    @property
    def trained_bytes(self) -> int:
        """Of the trained weights, and so of their gradient."""
        return sum(num_bytes(parameter) for parameter in self.policy.parameters() if parameter.requires_grad)

    def weights(self, settings: MemorySettings) -> dict[str, int]:
        """Of what is frozen, where all of it is on the device, and of what is trained with all that belongs to it."""
        trained = self.trained_bytes
        if settings.dtype is None:
            denoiser = module_bytes(self.denoisers) - trained
        else:
            frozen = [p for p in self.denoisers.parameters() if not p.requires_grad]
            denoiser = self._in(settings.dtype, *frozen, *self.denoisers.buffers())
        if settings.quantization is not None:
            for layer in linear_layers(self.denoisers):
                size = self._in(settings.dtype, layer.weight)
                denoiser += int(layer.weight.numel() * QUANTIZED_BYTES[settings.quantization]) - size
        copies = 1 + settings.ema + settings.sampling_policy + (settings.reference and self.policy.full_finetuning)
        states = next(size for part, size in OPTIMIZER_BYTES if part in settings.optim)
        return {
            "denoiser": denoiser,
            "encoders": self._frozen_bytes(self.encoders, settings),
            "VAE": self._frozen_bytes(self.others, settings),
            "trained weights": copies * trained,
            "optimizer": states * trained // 4,
            "prompts": self._conditioning(settings) + settings.precompute_prompts * HASH_BYTES,
        }

    @staticmethod
    def _in(dtype: torch.dtype | None, *tensors: torch.Tensor) -> int:
        """Bytes of tensors, float32 ones in another precision."""
        return sum(
            t.numel() * dtype.itemsize if dtype is not None and t.dtype == torch.float32 else num_bytes(t)
            for t in tensors
        )

    def _frozen_bytes(self, models: dict[str, nn.Module], settings: MemorySettings) -> int:
        key = tuple(models), settings.dtype
        if key not in self._found:
            self._found[key] = sum(
                module_bytes(model)
                if settings.dtype is None
                else self._in(settings.dtype, *model.parameters(), *model.buffers())
                for model in models.values()
            )
        return self._found[key]

    def _conditioning(self, settings: MemorySettings) -> int:
        largest = max(condition.num_bytes for condition in self._conditions(settings))
        known = min(settings.known_prompts, self.policy.cache_size)
        return int(min(known * largest, max(largest, self.policy.cache_bytes)))

    def _conditions(self, settings: MemorySettings) -> list[Condition]:
        """Of the rows, in the precision of the weights."""
        if settings.dtype is None:
            return self.conditions
        if settings.dtype not in self._cast:

            def cast(value):
                is_full = isinstance(value, torch.Tensor) and value.dtype == torch.float32
                return value.to(settings.dtype) if is_full else value

            self._cast[settings.dtype] = [
                replace(condition, answers=tree_map(cast, condition.answers), latent_dtype=settings.dtype)
                for condition in self.conditions
            ]
        return self._cast[settings.dtype]

    # ---- What a phase adds ----

    def encoding(self, settings: MemorySettings) -> int:
        """Of one prompt's way through the encoders, which is gone."""
        if ("encoding",) not in self._found:
            policy, condition = self.policy, self.conditions[0]
            with policy.encoders.visit(), policy.autoencoder.visit():
                policy.encoders.come(policy.device)  # their weights are counted elsewhere
                with ledger(policy.device) as book:
                    policy.encode_anew(condition.prompt, condition.image)
            self._found["encoding",] = book.peak
        size = self._found["encoding",]
        return size if settings.dtype is None else size * settings.dtype.itemsize // 4

    def sampling(self, rows: int, settings: MemorySettings) -> int:
        """Of one velocity in a rollout."""

        def velocity(latents, sigma, conditions):
            with torch.no_grad(), self._autocast(settings):
                self.policy(latents, sigma, conditions)

        return self._transient("sampling", velocity, rows, settings, settings.autocast)

    def training(self, rows: int, settings: MemorySettings) -> int:
        """Of one forward and backward pass, beside the gradient."""

        def train(latents, sigma, conditions):
            sigma_next = self.sigmas[self.sigmas.index(sigma) + 1]
            latents, following = latents.clone(), torch.empty_like(latents)  # taken from those of the rollout
            with self._autocast(settings):
                velocity = self.policy(latents, sigma, conditions)
                mean, std = transition(latents, velocity, sigma, sigma_next, 0.7, "flow")
                loss = torch.exp(log_prob(following, mean, std)).sum()
                if settings.reference:
                    # Full copies are as large as what they are copies of.
                    base = nullcontext() if self.policy.full_finetuning else self.policy.reference()
                    with torch.no_grad(), base:
                        reference = self.policy(latents, sigma, conditions)
                    loss = loss + (velocity - reference).square().mean()
            loss.backward()

        return self._transient(
            "training",
            train,
            rows,
            settings,
            (settings.activation_checkpointing, settings.reference, settings.autocast),
        )

    def decoding(self, rows: int, settings: MemorySettings) -> int:
        """Of decoding rows at once."""

        def decode(latents, sigma, conditions):
            pictures = self.policy.decode(latents, rows, conditions)
            self._found["picture",] = num_bytes(pictures) // rows

        return self._transient("decoding", decode, rows, settings, (settings.vae_slicing, settings.vae_tiling))

    def _autocast(self, settings: MemorySettings):
        return torch.autocast(self.policy.device.type, settings.autocast, enabled=settings.autocast is not None)

    def _transient(self, name: str, call: Callable, rows: int, settings: MemorySettings, mattering) -> int:
        """The most that `call(latents, sigma, conditions)` holds at a time."""
        key = name, rows, mattering, settings.dtype
        if key in self._found:
            return self._found[key]
        policy = self.policy
        own = self._conditions(settings)
        conditions = [own[row * len(own) // rows] for row in range(rows)]
        # Of two denoisers, one is for the beginning and the other for the end.
        steps = [0, len(self.sigmas) - 3] if len(policy.components) > 1 else [(len(self.sigmas) - 2) // 2]
        peak = 0
        with (
            self._checkpointing(settings.activation_checkpointing),
            self._divided(settings),
            without_weights(
                list(self.others.values()) if name == "decoding" else [policy.denoisers], settings.dtype
            ) as mode,
        ):
            parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            for step in steps if name != "decoding" else steps[:1]:
                with mode:
                    latents = torch.empty(rows, *policy.latent_shape, device=policy.device)
                    for parameter in parameters:
                        parameter.grad = torch.empty_like(parameter) if name == "training" else None
                with ledger(policy.device) as book:
                    call(latents, self.sigmas[max(0, step)], conditions)
                peak = max(peak, book.peak)
        self._found[key] = peak
        return peak

    @contextmanager
    def _checkpointing(self, wanted: bool) -> Iterator[None]:
        """Context in which activations are checkpointed, or not."""
        denoisers = [getattr(self.policy.pipeline, name) for name in self.policy.components]
        before = [
            (m, m.gradient_checkpointing)
            for d in denoisers
            for m in d.modules()
            if hasattr(m, "gradient_checkpointing")
        ]
        for denoiser in denoisers:
            if wanted != denoiser.is_gradient_checkpointing:
                (denoiser.enable_gradient_checkpointing if wanted else denoiser.disable_gradient_checkpointing)()
        try:
            yield
        finally:
            for module, was in before:
                module.gradient_checkpointing = was

    @contextmanager
    def _divided(self, settings: MemorySettings) -> Iterator[None]:
        """Context in which the VAE decodes in slices and tiles, or not."""
        vae = getattr(self.policy.pipeline, "vae", None)
        wanted = {"use_slicing": settings.vae_slicing, "use_tiling": settings.vae_tiling}
        before = {name: getattr(vae, name) for name in wanted if hasattr(vae, name)}
        try:
            for name in before:
                setattr(vae, name, wanted[name])
            yield
        finally:
            for name, was in before.items():
                setattr(vae, name, was)

    def between(self, name: str, rows: int, settings: MemorySettings) -> int:
        """Of a number of rows: what was found for the most that were asked for, or less, on a straight line to a single one."""
        find = getattr(self, name)
        largest = self._largest[name] = max(rows, self._largest.get(name, 0))
        high = find(largest, settings)
        if settings.quantization is not None and name != "decoding":
            # A layer's weight is there in full while it is used.
            size = (settings.autocast or self._conditions(settings)[0].latent_dtype).itemsize
            full = size * max(layer.weight.numel() for layer in linear_layers(self.denoisers))
        else:
            full = 0
        if rows >= largest:
            return high + full
        low = find(1, settings)
        return low + (high - low) * (rows - 1) // (largest - 1) + full

    def sweep(self, prompts: int, settings: MemorySettings) -> dict[str, int]:
        """Of the executor's way down the grid for some prompts: the most, the latents that it keeps, and the leaves."""
        plan, batch_size = settings.plan, settings.rollout_batch_size
        key = plan, prompts, batch_size, settings.host
        if key not in self._sweeps:
            calls: dict[int, int] = {}  # most that is held when a number of rows is evaluated
            # Latents of this length in place of the real ones, which are so much larger.
            length = 256
            scale = math.prod(self.policy.latent_shape) / length
            with ledger(torch.device("cpu")) as book:

                def velocity(latents, sigma, prompt):
                    calls[len(latents)] = max(calls.get(len(latents), 0), book.held)
                    return torch.empty_like(latents)

                drawn = [] if settings.host else [torch.empty(plan.num_draws, length) for _ in range(prompts)]
                noise = torch.empty(prompts, plan.num_draws, length)
                grid, noise_levels = torch.linspace(1, 0, plan.num_steps + 1), [0.7] * plan.num_steps
                rollout = execute(plan, velocity, grid, noise, noise_levels, "flow", batch_size)
                del noise
                sizes = {
                    "most": book.peak,
                    "kept": sum(map(num_bytes, rollout.nodes.values())),
                    "leaves": num_bytes(rollout.leaves),
                    "drawn": sum(map(num_bytes, drawn)),
                }
            calls = {rows: int(scale * held) for rows, held in calls.items()}
            self._sweeps[key] = calls, {name: int(scale * size) for name, size in sizes.items()}
        calls, sizes = self._sweeps[key]
        # The largest batch is one end of the line to the others.
        reached = [
            held + self.between("sampling", rows, settings) for rows, held in sorted(calls.items(), reverse=True)
        ]
        return sizes | {"most": max(sizes["most"], *reached)}

    # ---- All of it ----

    def estimate(self, settings: MemorySettings) -> MemoryEstimate:
        """
        What a run will hold.

        Args:
            settings ([`MemorySettings`]): Its settings.

        Returns:
            [`MemoryEstimate`]
        """
        plan, on_gpu = settings.plan, settings.host
        weights, trained = self.weights(settings), self.trained_bytes
        at_once = min(settings.prompts, max(1, settings.rollout_batch_size // plan.width))
        sweep = self.sweep(at_once, settings)
        most, kept, leaves, drawn = (sweep[name] for name in ("most", "kept", "leaves", "drawn"))
        if settings.offload_trajectories and on_gpu:
            kept = compared = 0
        else:
            compared = settings.compared_bytes
            # Put together when all are there, beside the noise and the leaves.
            most = max(most, 2 * kept + leaves + drawn)
        sweeps = -(-settings.prompts // at_once)
        all_kept = kept * settings.prompts // at_once
        count = at_once * len(plan.leaves)
        rows = min(settings.rollout_batch_size, count)
        decoding = self.between("decoding", rows, settings) + leaves * (count - rows) // count
        if not on_gpu:
            picture = self._found["picture",]
            decoding = max(decoding + picture * (count - rows), 2 * picture * count)
        # Of sweeps before this one.
        earlier, noise = all_kept - kept, drawn if sweeps > 1 else 0
        usual = dict(weights)
        if on_gpu and (settings.precompute_prompts or settings.offload_encoders):
            usual["encoders"] = 0
        if on_gpu and settings.offload_vae:
            usual["VAE"] = 0
        # While another policy samples in their place, the trained weights are kept.
        sampling = usual | {"trained weights": weights["trained weights"] + settings.sampling_policy * trained}
        encode = sampling | {"encoders": weights["encoders"]}
        if self.policy.family.image or settings.precompute_prompts:
            encode["VAE"] = weights["VAE"]
        if settings.precompute_prompts:  # before training
            hashed = [num_bytes(p) for m in (*self.encoders.values(), *self.others.values()) for p in m.parameters()]
            products = min(HASH_BYTES, 2 * max(hashed, default=0))  # 8 bytes for each 4
            encode |= {
                "optimizer": 0,
                "prompts": HASH_BYTES,
                "activations": max(self.encoding(settings), products),
            }
            if on_gpu and all(map(can_move, self.policy.hosts.models)):
                # They wait for the encoders to leave. Their moving average does not.
                encode |= {"denoiser": 0, "trained weights": settings.ema * trained}
        else:
            encode |= {"latents": earlier, "activations": self.encoding(settings)}
        trajectories = all_kept + compared
        gradients = trained * (1 + settings.several_processes)
        temporary = 0 if "fused" in settings.optim or "8bit" in settings.optim else trained
        return MemoryEstimate(
            {
                "encode": encode,
                "rollout": sampling | {"latents": earlier + noise, "activations": most},
                "decode": sampling
                | {"VAE": weights["VAE"], "latents": all_kept + leaves + drawn, "activations": decoding},
                "collect": sampling | {"latents": all_kept * (1 + (sweeps > 1)) + drawn},
                "train": usual
                | {
                    "latents": trajectories,
                    "gradients": gradients + trained,
                    "activations": self.between("training", settings.transition_batch_size, settings),
                },
                "measure": usual | {"latents": trajectories, "gradients": gradients + 2 * trained},
                "update": usual | {"latents": trajectories, "gradients": gradients + temporary},
            }
        )


def rows_at_once(plan: Plan, prompts: int) -> list[int]:
    """Rows of each index of the grid at which a tree is evaluated."""
    indices = [plan.nodes[number].index for number in plan.evaluated]
    return [prompts * indices.count(index) for index in sorted(set(indices))]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Those that quantisation would take: frozen, and not quantised yet."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and type(module.weight) in PLAIN and not module.weight.requires_grad
    ]


def make_fit(
    estimator: MemoryEstimator, settings: MemorySettings, limit: int
) -> tuple[dict[str, int | bool | str | torch.dtype], MemoryEstimate]:
    """
    Settings that bring a run below a limit, as few as do, those that cost least first.

    Args:
        estimator ([`MemoryEstimator`]): Of the pipeline.
        settings ([`MemorySettings`]): Those that are wished for.
        limit (`int`): Bytes that there are.

    Returns:
        `tuple[dict, MemoryEstimate]`: The changes by their names, and what is needed with them, which is still too much
        where nothing helps.
    """
    changes = {}
    found = estimator.estimate(settings)
    while found.peak > limit:
        for change in _possible_changes(estimator, replace(settings, **changes)):
            smaller = estimator.estimate(replace(settings, **changes | change))
            if smaller.beyond(limit) < (1 - LEAST_GAIN) * found.beyond(limit):
                changes, found = changes | change, smaller
                break
        else:
            return changes, found
    # Of what has been changed before something else made it needless, the costliest is taken back first.
    for name in reversed(list(changes)):
        for others in _milder(changes, name, getattr(settings, name)):
            if (less := estimator.estimate(replace(settings, **others))).peak <= limit:
                changes, found = others, less
                break
    return changes, found


def _milder(changes: dict, name: str, wished: int | bool | str | torch.dtype | None) -> Iterator[dict]:
    """The changes with less of one of them, least first."""
    others = {other: value for other, value in changes.items() if other != name}
    yield others
    if name.endswith("batch_size"):
        rows = wished // 2
        while rows > changes[name]:
            yield others | {name: rows}
            rows //= 2
    elif changes[name] == "nf4":
        yield others | {name: "int8"}


def _possible_changes(estimator: MemoryEstimator, settings: MemorySettings) -> Iterator[dict]:
    """Changes of one setting, those that cost least first."""
    policy = estimator.policy
    denoisers = [getattr(policy.pipeline, name) for name in policy.components]
    vae = getattr(policy.pipeline, "vae", None)
    layers = linear_layers(estimator.denoisers)
    if not policy.full_finetuning and settings.dtype is None and layers and layers[0].weight.dtype == torch.float32:
        yield {"dtype": torch.bfloat16}
    if settings.host and estimator.encoders and not settings.precompute_prompts and not settings.offload_encoders:
        yield {"precompute_prompts": True}
    if not settings.activation_checkpointing and all(d._supports_gradient_checkpointing for d in denoisers):
        yield {"activation_checkpointing": True}
    if not settings.vae_slicing and hasattr(vae, "use_slicing") and policy.num_frames is None:
        yield {"vae_slicing": True}
    for name in ("transition_batch_size", "rollout_batch_size"):
        if getattr(settings, name) > 1:
            yield {name: getattr(settings, name) // 2}
    for name in ("offload_vae", "offload_trajectories"):
        if settings.host and not getattr(settings, name):
            yield {name: True}
    if not settings.vae_tiling and hasattr(vae, "use_tiling"):
        yield {"vae_tiling": True}
    if policy.full_finetuning and settings.optim.startswith("adamw") and "bit" not in settings.optim:
        yield {"optim": "adamw_bnb_8bit"}
    if settings.quantization != "nf4" and not policy.full_finetuning and layers:
        yield {"quantization": "int8" if settings.quantization is None else "nf4"}


def setting_text(value: int | bool | str | torch.dtype) -> str:
    """A setting as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value).removeprefix("torch.")
