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

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..rollout import to_device


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
    members_on_cpu: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the same
    is_repeated: bool = False  # evaluated because other processes have more, and not trained on


@dataclass
class TrainedStep:
    """What is trained at one step of a micro-batch."""

    step: int
    position: int  # among the micro-batch's steps
    sigma: float
    sigma_next: float
    rows: torch.Tensor  # (n, 2) prompt, and number of the parent among the distinct ones
    parents: torch.Tensor  # positions of the distinct parents among the nodes
    of_member: torch.Tensor  # (G,) number of each member's parent
    trained: torch.Tensor  # (B, G)
    weight: float  # of each transition in the micro-batch's mean
    conditioning: list  # of the B prompts
    repeats: int = 0  # chunks that other processes have more: a transition of this one is evaluated again in each

    def parts(self, batch_size: int) -> list[slice | None]:
        """The rows in parts, `None` for each of the repeats."""
        starts = range(0, len(self.rows), batch_size)
        return [slice(start, start + batch_size) for start in starts] + [None] * self.repeats


def trained_steps(
    inputs: dict,
    sigmas: torch.Tensor,
    conditioning: Callable[[list[str], list | None], list],
    skip_uninformative: bool,
    all_steps: bool = False,
) -> list[TrainedStep]:
    """
    What is trained of a micro-batch, step by step.

    Siblings share their parent's row: its velocity is evaluated once for all of them, and the gradient is that of
    each sibling by itself, because the mean of a step depends on the policy through the velocity alone.

    Args:
        inputs (`dict`): `nodes (B, K, *latent)`, which may be on another device, `advantages (B, S, G)`, which of these are
            `trained (B, S, G)`, `steps (S,)`, the positions of `parents` and `children (S, G)` among the nodes, the B `prompts`, and the
            `images` that they start from or `None`.
        sigmas (`torch.Tensor` of shape `(T + 1,)`): The grid.
        conditioning (`Callable`): Prompts and images -> their conditioning, one row each.
        skip_uninformative (`bool`): Leave out parents whose children all have advantage 0: without a KL term they have
            no gradient. At least one row remains, because every process takes part in an update.
        all_steps (`bool`, *optional*, defaults to `False`): Not only the steps that have rows.
    """
    table, sigmas = conditioning(inputs["prompts"], inputs["images"]), sigmas.tolist()
    trained = inputs["trained"].cpu()
    weight = 1.0 / max(1, int(trained.numpy().sum()))
    informative = trained & (inputs["advantages"] != 0).cpu() if skip_uninformative else trained
    if not informative.any():
        informative = torch.zeros_like(trained)
        informative.view(-1)[trained.int().argmax()] = True
    found = []
    for position, step in enumerate(inputs["steps"].tolist()):
        parents, of_member = inputs["parents"][position].unique(return_inverse=True)
        rows = [
            (b, u)
            for b in range(len(trained))
            for u in range(len(parents))
            if informative[b, position, of_member == u].any()
        ]
        if rows or all_steps:
            found.append(
                TrainedStep(
                    step=step,
                    position=position,
                    sigma=sigmas[step],
                    sigma_next=sigmas[step + 1],
                    rows=torch.tensor(rows, dtype=torch.int64).view(-1, 2),
                    parents=parents,
                    of_member=of_member,
                    trained=trained[:, position],
                    weight=weight,
                    conditioning=table,
                )
            )
    return found


def transition_chunk(inputs: dict, at: TrainedStep, part: slice | torch.Tensor | None) -> TransitionChunk:
    """Some of the rows that a micro-batch trains at a step, as one forward; for `None` a transition that is only repeated."""
    device, home = inputs["advantages"].device, inputs["nodes"].device
    if part is None:
        b, u, row = torch.zeros(3, 1, dtype=torch.int64)
        member = (at.of_member == 0).nonzero()[0]
    else:
        b, u = at.rows[part].unbind(1)
        row, member = ((at.of_member[None] == u[:, None]) & at.trained[b]).nonzero(as_tuple=True)
    prompts = b.tolist()
    step, children = torch.full_like(row, at.position), inputs["children"][at.position][member]
    indices = [b, at.parents[u], b[row], children, row, step, member]
    # All in one copy, which a GPU does when it comes to it.
    moved = to_device(torch.cat(indices), device).split([len(index) for index in indices])
    b, parents, of_child, children = (moved if home == device else indices)[:4]
    return TransitionChunk(
        step=at.step,
        sigma=at.sigma,
        sigma_next=at.sigma_next,
        latents=to_device(inputs["nodes"][b, parents], device),
        next_latents=to_device(inputs["nodes"][of_child, children], device),
        conditioning=[at.conditioning[prompt] for prompt in prompts],
        row=moved[4],
        members=(moved[2], moved[5], moved[6]),
        members_on_cpu=(indices[2], indices[5], indices[6]),
        is_repeated=part is None,
    )


def select_transitions(inputs: dict, prompts: range, steps: torch.Tensor) -> dict:
    """The micro-batch of some prompts and steps. Its latents are not copied."""
    consecutive, prompts = slice(prompts.start, prompts.stop), list(prompts)
    return {
        "nodes": inputs["nodes"][consecutive],
        "advantages": inputs["advantages"][prompts][:, steps],
        "trained": inputs["trained"][prompts][:, steps],
        "steps": inputs["steps"][steps],
        "parents": inputs["parents"][steps],
        "children": inputs["children"][steps],
        "prompts": [inputs["prompts"][b] for b in prompts],
        "images": inputs["images"] and [inputs["images"][b] for b in prompts],
        "keys": [inputs["keys"][b] for b in prompts],
        "old": inputs["old"] and {name: values[prompts][:, steps] for name, values in inputs["old"].items()},
    }


def place_transitions(inputs: dict, device: torch.device, offload: bool) -> dict:
    """A micro-batch from a file, where it was before: values on the device, what they are found by on the CPU."""
    home = torch.device("cpu") if offload else device
    return inputs | {
        "nodes": inputs["nodes"].to(home),
        "advantages": inputs["advantages"].to(device),
        "trained": inputs["trained"].to(device),
        "old": inputs["old"] and {name: values.to(home) for name, values in inputs["old"].items()},
    }


def join_transitions(parts: list[dict]) -> dict:
    """The micro-batch of the prompts of several, which have the same steps."""
    first = parts[0]

    return first | {
        **{name: torch.cat([part[name] for part in parts]) for name in ("nodes", "advantages", "trained")},
        **{name: [value for part in parts for value in part[name]] for name in ("prompts", "keys")},
        "images": first["images"] and [image for part in parts for image in part["images"]],
        "old": first["old"] and {name: torch.cat([part["old"][name] for part in parts]) for name in first["old"]},
    }
