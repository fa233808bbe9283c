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

"""Reproducible noise that depends on what is sampled, not on where."""

import hashlib

import torch


def seeded_noise(*key, num_draws: int, latent_shape: tuple[int, ...]) -> torch.Tensor:
    """
    Standard normal noise of shape `(num_draws, *latent_shape)`, float32 on the CPU.

    It is a function of `key` alone: the same whatever the batch, the device or the process.

    Args:
        key: Of anything with a text: seed, rollout, prompt ...
        num_draws (`int`): Number of latents.
        latent_shape (`tuple[int, ...]`): Of one of them.
    """
    return torch.randn(num_draws, *latent_shape, generator=_generator(key))


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    What was drawn on the CPU, or has waited there, on the device that computes. On its way to a GPU it passes through pinned
    memory: the host does not wait until the GPU is ready to take it.

    Args:
        values (`torch.Tensor`): On the CPU, or on the device already.
        device (`torch.device`): Where they are to be.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def seeded_subsets(*key, num_subsets: int, num_items: int, size: int) -> torch.Tensor:
    """
    Random subsets as a mask of shape `(num_subsets, num_items)`, each row with `size` of its items, as a function of
    `key` alone.

    Args:
        key: As for [`seeded_noise`].
        num_subsets, num_items, size (`int`): How many subsets, of how many items, with how many of them.
    """
    order = torch.rand(num_subsets, num_items, generator=_generator(key)).argsort(1)
    return torch.zeros(num_subsets, num_items, dtype=torch.bool).scatter(1, order[:, :size], True)


def _generator(key: tuple) -> torch.Generator:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
