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

"""The transitions of a rollout as training batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass
class TransitionChunk:
    """One training forward: n parents at one step, and their m children."""

    step: int
    sigma: float
    sigma_next: float
    latents: torch.Tensor  # (n, *latent)
    next_latents: torch.Tensor  # (m, *latent)
    conditioning: list  # of the n rows, as the policy takes it
    row: torch.Tensor  # (m,) parent of each child
    members: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (m,) prompt, step and group member of each child


def transition_chunks(
    inputs: dict,
    sigmas: torch.Tensor,
    conditioning: Callable[[list[str], list | None], list],
    batch_size: int,
    skip_uninformative: bool,
) -> Iterator[TransitionChunk]:
    """
    Transitions of a micro-batch, step by step, in chunks of at most `batch_size` distinct parents.

    Siblings share their parent's row: its velocity is evaluated once for all of them, and the gradient is that of
    each sibling by itself, because the mean of a step depends on the policy through the velocity alone.

    Args:
        inputs (`dict`): `nodes (B, K, *latent)`, `advantages (B, S, G)`, which of these are `trained (B, S, G)`,
            `steps (S,)`, the positions of `parents` and `children (S, G)` among the nodes, the B `prompts`, and the
            `images` that they start from or `None`.
        sigmas (`torch.Tensor` of shape `(T + 1,)`): The grid.
        conditioning (`Callable`): Prompts and images -> their conditioning, one row each.
        batch_size (`int`): Largest number of rows of one chunk.
        skip_uninformative (`bool`): Leave out parents whose children all have advantage 0: without a KL term they have
            no gradient. At least one chunk remains, because every process takes part in an update.
    """
    num_prompts, device = len(inputs["prompts"]), inputs["nodes"].device
    table, sigmas = conditioning(inputs["prompts"], inputs["images"]), sigmas.tolist()
    trained = inputs["trained"].cpu()
    informative = trained & (inputs["advantages"] != 0).cpu() if skip_uninformative else trained
    if not informative.any():
        informative = torch.zeros_like(trained)
        informative.view(-1)[trained.int().argmax()] = True
    for s, step in enumerate(inputs["steps"].tolist()):
        parents, of_member = inputs["parents"][s].unique(return_inverse=True)
        rows = [
            (b, u) for b in range(num_prompts) for u in range(len(parents)) if informative[b, s, of_member == u].any()
        ]
        for start in range(0, len(rows), batch_size):
            b, u = torch.tensor(rows[start : start + batch_size]).unbind(1)
            row, member = ((of_member[None] == u[:, None]) & trained[b, s]).nonzero(as_tuple=True)
            b_device = b.to(device)
            yield TransitionChunk(
                step=step,
                sigma=sigmas[step],
                sigma_next=sigmas[step + 1],
                latents=inputs["nodes"][b_device, parents[u].to(device)],
                next_latents=inputs["nodes"][b[row].to(device), inputs["children"][s][member].to(device)],
                conditioning=[table[prompt] for prompt in b.tolist()],
                row=row.to(device),
                members=(b[row].to(device), torch.full_like(row, s).to(device), member.to(device)),
            )


def select_transitions(inputs: dict, prompts: range, steps: torch.Tensor) -> dict:
    """The micro-batch of some prompts and steps."""
    prompts = list(prompts)
    return {
        "nodes": inputs["nodes"][prompts],
        "advantages": inputs["advantages"][prompts][:, steps],
        "trained": inputs["trained"][prompts][:, steps],
        "steps": inputs["steps"][steps],
        "parents": inputs["parents"][steps],
        "children": inputs["children"][steps],
        "prompts": [inputs["prompts"][b] for b in prompts],
        "images": inputs["images"] and [inputs["images"][b] for b in prompts],
        "keys": [inputs["keys"][b] for b in prompts],
        "old": None,
    }
