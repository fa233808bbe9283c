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

"""
What a pipeline makes of a prompt and a picture before it denoises: computed once, handed back in every later call.

A pipeline's `__call__` turns its prompt into embeddings (`encode_prompt`), its pictures into embeddings and latents
(`encode_image`, `prepare_latents`), and then denoises. Here one call that does not denoise is recorded per prompt, and
later calls get the recorded outputs instead of running the encoders again: the pipeline itself decides what goes
where, so nothing needs to be known of a model family. How rows are put together for a batch is observed, not declared:
an output that doubles along one dimension when the prompts are doubled has its rows there.
"""

import functools
import hashlib
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image


# By diffusers' names for what runs frozen encoders, draws noise or rewrites prompts.
ENCODING_METHOD = re.compile(
    r"_?encode_\w+|prepare_(\w+_)?(latents|embeds)(_\w+)?|prepare_(control_)?image"
    r"|(enhance|upsample|rewire|expand)_prompts?|get_image_caption|generate_prior_tokens"
)
LATENTS = ("prepare_latents", 0)


@dataclass(frozen=True, eq=False)
class Condition:
    """
    A prompt, and what its pipeline made of it.

    Attributes:
        prompt (`str`): The prompt.
        image (`PIL.Image.Image` or `None`): The picture that the pipeline starts from.
        answers (`dict[tuple[str, int], Any]`): Output of each encoding method, by its name and the number of its call,
            for one row; of `prepare_latents`, what comes beside the latents.
        latent_shape (`tuple[int, ...]`): Of the latents that the pipeline prepared, one row.
        latent_dtype (`torch.dtype`): Of the same.
        layout (`dict[tuple[str, int], Any]`): Where the rows of each output are: see [`find_layout`].
        signature (`tuple`): Conditions with equal signatures can be rows of one batch.
        batched (`bool`): Whether the pipeline takes several prompts at once; if not, a batch is one row.
        guidance_scale (`float`): At which it was made: without guidance, there is nothing to be led away from.
    """

    prompt: str
    image: Image.Image | None
    answers: dict[tuple[str, int], Any]
    latent_shape: tuple[int, ...]
    latent_dtype: torch.dtype
    layout: dict[tuple[str, int], Any] = field(repr=False)
    signature: tuple = field(repr=False)
    batched: bool
    guidance_scale: float

    @functools.cached_property
    def num_bytes(self) -> int:
        """Memory that the outputs take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(list(self.answers.values())))


def make_condition(
    prompt: str,
    image: Image.Image | None,
    answers: dict[tuple[str, int], Any],
    latent_shape: tuple[int, ...],
    latent_dtype: torch.dtype,
    layout: dict[tuple[str, int], Any],
    batched: bool,
    guidance_scale: float,
) -> Condition:
    """A [`Condition`], with the signature that follows from its outputs."""
    signature = (latent_shape, *((name, find_signature(answer, layout[name])) for name, answer in answers.items()))
    return Condition(prompt, image, answers, latent_shape, latent_dtype, layout, signature, batched, guidance_scale)


@functools.cache
def encoding_methods(pipeline_class: type[DiffusionPipeline]) -> list[str]:
    """Names of a pipeline's methods whose outputs depend on its inputs and frozen weights, not on the denoiser's."""
    return [
        name
        for name in dir(pipeline_class)
        if ENCODING_METHOD.fullmatch(name) and callable(inspect.getattr_static(pipeline_class, name, None))
    ]


@contextmanager
def recording(pipeline: DiffusionPipeline) -> Iterator[dict[tuple[str, int], Any]]:
    """Context in which the outputs of the encoding methods that `pipeline`'s call uses are noted, in a dictionary."""
    answers, counts = {}, Counter()
    inside = False

    def recorded(name: str, method: Callable):
        def record(*args, **kwargs):
            nonlocal inside
            if inside:  # called by another encoding method, whose output includes this one's
                return method(*args, **kwargs)
            inside = True
            try:
                output = method(*args, **kwargs)
            finally:
                inside = False
            answers[name, counts[name]] = output
            counts[name] += 1
            return output

        return record

    methods = {name: getattr(pipeline, name) for name in encoding_methods(type(pipeline))}
    for name, method in methods.items():
        setattr(pipeline, name, recorded(name, method))
    try:
        yield answers
    finally:
        for name in methods:
            delattr(pipeline, name)


class Answers:
    """
    Takes the place of a pipeline's encoding methods: hands back what was recorded, for the rows of a batch.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline whose methods are replaced, on this object alone.
        cast_latents (`bool`): Whether latents get the dtype in which the pipeline prepares its own.
    """

    def __init__(self, pipeline: DiffusionPipeline, cast_latents: bool):
        self.cast_latents = cast_latents
        self._conditions: list[Condition] = []
        self._latents: torch.Tensor | None = None
        self._counts = Counter()
        for name in encoding_methods(type(pipeline)):
            setattr(pipeline, name, functools.partial(self._answer, name))

    @contextmanager
    def about(self, conditions: list[Condition], latents: torch.Tensor):
        """Context of one call of the pipeline: n conditions, and the latents of n rows that it is to take for its own."""
        self._conditions, self._latents = conditions, latents
        self._counts.clear()
        try:
            yield
        finally:
            self._conditions, self._latents = [], None

    def _answer(self, name: str, *args, **kwargs):
        key = name, self._counts[name]
        self._counts[name] += 1
        layout = self._conditions[0].layout
        if key not in layout:
            raise RuntimeError(
                f"The pipeline calls {name} where it did not when its prompt was encoded: what it returned then cannot "
                "stand for what it would return now."
            )
        answer = merge([condition.answers[key] for condition in self._conditions], layout[key])
        if key != LATENTS:
            return answer
        latents = self._latents.to(self._conditions[0].latent_dtype) if self.cast_latents else self._latents
        return latents if answer is None else (latents, *answer)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _tensors(element)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def find_layout(one: Any, two: Any) -> Any:
    """
    Where the rows of an output are, from the outputs for one prompt and for the same prompt twice.

    Returns:
        For a tensor, the dimension that doubles, or `None` when nothing does (all rows share it). For a list that
        doubles, `"rows"`. For other lists, tuples and dictionaries, the same with the layouts of their elements. `None`
        for everything else.

    Raises:
        ValueError: If the outputs differ in any other way.
    """
    if isinstance(one, torch.Tensor):
        grown = [dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
        if not grown:
            return None
        if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
            raise ValueError(f"an output of shape {tuple(one.shape)} becomes {tuple(two.shape)} for two prompts")
        in_turn, side_by_side = torch.cat([one, one], grown[0]), one.repeat_interleave(2, grown[0])
        if (two.float() - side_by_side.float()).abs().sum() < (two.float() - in_turn.float()).abs().sum():
            # Without guidance and with it, of all prompts: put together one by one, they would trade places.
            raise ValueError("the rows of an output for two prompts are not those of each prompt one after the other")
        return grown[0]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            if len(two) != 2 * len(one):
                raise ValueError(f"a list of {len(one)} becomes one of {len(two)} for two prompts")
            return "rows"
        return [find_layout(*pair) for pair in zip(one, two, strict=True)]
    if isinstance(one, dict):
        return {name: find_layout(one[name], two[name]) for name in one}
    return None


def merge(values: list, layout: Any) -> Any:
    """The output for n rows from those for one row each."""
    first = values[0]
    if len(values) == 1 or layout is None:
        return first
    if layout == "rows":
        return [row for value in values for row in value]
    if isinstance(layout, list):
        return type(first)(merge([value[i] for value in values], part) for i, part in enumerate(layout))
    if isinstance(layout, dict):
        return {name: merge([value[name] for value in values], part) for name, part in layout.items()}
    if first.shape[layout] != 1:
        return torch.cat(values, dim=layout)
    # Samples of one prompt stand side by side: one view for all of them.
    runs = []
    for _, same in itertools.groupby(values, key=id):
        same = list(same)
        shape = list(same[0].shape)
        shape[layout] = len(same)
        runs.append(same[0].expand(shape))
    return torch.cat(runs, dim=layout) if len(runs) > 1 else runs[0]


def find_signature(value: Any, layout: Any) -> Any:
    """What must be equal for rows to share a batch: the shapes of what has rows, the content of what is shared."""
    if isinstance(value, torch.Tensor):
        if layout is None:
            content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            return tuple(value.shape), hashlib.sha1(content).hexdigest()
        return tuple(value.shape), value.dtype
    if layout == "rows":
        return "rows"
    if isinstance(value, (list, tuple)):
        return tuple(find_signature(*pair) for pair in zip(value, layout or [None] * len(value), strict=True))
    if isinstance(value, dict):
        return tuple((name, find_signature(value[name], layout and layout[name])) for name in value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else id(value)


def image_key(image: Image.Image | None) -> str | None:
    """The content of a picture as a short string."""
    if image is None:
        return None
    return hashlib.sha1(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
