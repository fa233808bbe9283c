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

"""Which kernel computes attention: one of diffusers' attention backends, if it can be trained through."""

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn


if TYPE_CHECKING:
    from .flow_policy import FlowPolicy


def check_attention_backend(name: str):
    """
    Raises `ValueError` for an attention backend that diffusers does not know, whose package is not installed, or that has
    no backward pass. The kernel of one from the Hub is downloaded.

    Args:
        name (`str`): As `set_attention_backend` of diffusers' models takes it.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"attention_backend={name!r} is unknown: expected one of {', '.join(map(repr, known))}.")
    if "sage" in name:
        # Its outputs carry no gradient: what is before the attention would not be trained, and nothing would say so.
        raise ValueError(
            f"attention_backend={name!r}: SageAttention has no backward pass, and what has sampled must be what is trained. "
            "Take another one, or leave it unset."
        )
    try:
        with attention_backend(name):
            pass
    except Exception as error:  # a package that is missing or too old, a kernel that cannot be downloaded
        raise ValueError(f"attention_backend={name!r} cannot be used here: {error}") from error


def set_attention_backend(policy: "FlowPolicy", name: str):
    """
    Has the denoisers compute attention by a backend of diffusers.

    Args:
        policy ([`FlowPolicy`]): Its pipeline's denoisers are changed.
        name (`str`): Of the backend.

    Raises:
        ValueError: If a denoiser's attention is not diffusers' to choose, or the backend fails on the policy's device and in
            its dtype, forward or backward.
    """
    check_attention_backend(name)
    for component in policy.components:
        denoiser = getattr(policy.pipeline, component)
        if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in denoiser.modules()):
            raise ValueError(
                f"attention_backend={name!r} has no effect: the attention of {type(denoiser).__name__} is torch's "
                "scaled_dot_product_attention in diffusers, which chooses a kernel itself. Leave it unset."
            )
        # The shape of one small head, as all kernels take it: (rows, tokens, heads, channels).
        query, key, value = (
            torch.ones(1, 16, 1, 64, device=policy.device, dtype=denoiser.dtype, requires_grad=True) for _ in range(3)
        )
        try:
            with torch.enable_grad():
                dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name)).sum().backward()
        except Exception as error:  # each kernel has words of its own for a device or a dtype that it was not made for
            raise ValueError(
                f"attention_backend={name!r} fails on {policy.device} in {denoiser.dtype}: {type(error).__name__}: {error}"
            ) from error
        denoiser.set_attention_backend(name)
