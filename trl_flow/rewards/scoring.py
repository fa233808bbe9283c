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

"""Calls reward functions on a batch of pictures. A failure is a missing score (NaN), never a made-up number."""

import asyncio
import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate.logging import get_logger
from PIL import Image


logger = get_logger(__name__)

FRAMES_PER_VIDEO = 8


class NothingToLearnError(ValueError):
    """No sample of a batch has a score."""


def score(
    reward_funcs: list[Callable],
    reward_names: list[str],
    prompts: list[str],
    images: list[Image.Image] | list[list[Image.Image]],
    columns: dict[str, list] | None = None,
    **extras,
) -> tuple[torch.Tensor, dict[str, list[Exception]]]:
    """
    Scores of every picture by every reward function.

    A function that raises is called again on halves of the batch until the samples that make it raise are alone; those
    have no score. Asynchronous functions run together.

    Videos are lists of frames. A function with an argument `videos` gets them whole; any other one scores pictures, and
    gets up to 8 frames of each video, evenly spaced: their mean is the video's score.

    Args:
        reward_funcs (`list[Callable]`), reward_names (`list[str]`): R functions and their names.
        prompts (`list[str]`), images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`): One prompt for each of n
            pictures or videos.
        columns (`dict[str, list]`, *optional*): Other columns of the dataset, n values each.
        extras: Further keyword arguments, passed on as they are (`trainer_state`, `log_extra`, `log_metric`).

    Returns:
        `tuple[torch.Tensor, dict[str, list[Exception]]]`: Scores of shape `(n, R)`, float64 with NaN where there is
        none, and what each function raised, one exception per sample that it cost.

    Raises:
        ValueError: If a function returns another number of scores, or something that is not a number.
    """
    columns = {**(columns or {}), "prompts": prompts, "images": images, "completions": images}
    n = len(images)
    are_videos = bool(images) and isinstance(images[0], (list, tuple))
    frames = _spread_frames(columns, images) if are_videos else columns
    if are_videos:
        columns["videos"] = images
    # Of each function, by sample: a video of which one frame could not be scored has no score.
    raised_for = {name: {} for name in reward_names}

    def arguments(function: Callable, start: int, stop: int) -> dict:
        table = columns if takes_videos(function) else frames
        return {**{name: values[start:stop] for name, values in table.items()}, **extras}

    def length(function: Callable) -> int:
        return n if takes_videos(function) else len(frames["prompts"])

    def note(function: Callable, name: str, start: int, error: Exception) -> list[float]:
        raised_for[name][start * n // length(function)] = error
        return [math.nan]

    def call(function: Callable, name: str, start: int, stop: int) -> list[float]:
        try:
            result = function(**arguments(function, start, stop))
        except Exception as error:  # a reward is the user's code: anything may come out of it
            if stop - start == 1:
                return note(function, name, start, error)
            middle = (start + stop) // 2
            return call(function, name, start, middle) + call(function, name, middle, stop)
        return _as_scores(result, name, stop - start)

    async def call_async(function: Callable, name: str, start: int, stop: int) -> list[float]:
        try:
            result = await function(**arguments(function, start, stop))
        except Exception as error:
            if stop - start == 1:
                return note(function, name, start, error)
            middle = (start + stop) // 2
            halves = (call_async(function, name, start, middle), call_async(function, name, middle, stop))
            return sum(await asyncio.gather(*halves), [])
        return _as_scores(result, name, stop - start)

    scores = torch.full((n, len(reward_funcs)), math.nan, dtype=torch.float64)
    asynchronous = [i for i, function in enumerate(reward_funcs) if is_async(function)]
    for i, (function, name) in enumerate(zip(reward_funcs, reward_names, strict=True)):
        if i not in asynchronous:
            scores[:, i] = _by_sample(call(function, name, 0, length(function)), n)
    if asynchronous:

        async def call_all():
            return await asyncio.gather(
                *(call_async(reward_funcs[i], reward_names[i], 0, length(reward_funcs[i])) for i in asynchronous)
            )

        # A thread of its own: `asyncio.run` refuses to run inside a running loop, as in a notebook.
        with ThreadPoolExecutor(1) as executor:
            for i, result in zip(asynchronous, executor.submit(asyncio.run, call_all()).result(), strict=True):
                scores[:, i] = _by_sample(result, n)

    errors = {name: list(raised.values()) for name, raised in raised_for.items()}
    for name, raised in errors.items():
        if raised:
            logger.warning(
                f"Reward {name!r} raised for {len(raised)} of {n} samples, which are left out. The first error was "
                f"{type(raised[0]).__name__}: {raised[0]}"
            )
    return scores, errors


def check_rewards(
    reward_funcs: list[Callable],
    reward_names: list[str],
    rows: list[dict],
    image_size: tuple[int, int],
    num_frames: int | None = None,
    **extras,
):
    """
    Calls every reward function on grey pictures, so that one that cannot work stops the run before any work is spent.

    Args:
        rows (`list[dict]`): A few rows of the dataset.
        image_size (`tuple[int, int]`): Width and height in pixels.
        num_frames (`int`, *optional*): For videos.

    Raises:
        ValueError: If a function raises for every sample, or returns the wrong number of scores, no numbers, or no
            score at all.
    """
    images = [Image.new("RGB", image_size, (128, 128, 128)) for _ in rows]
    if num_frames is not None:
        images = [[image] * num_frames for image in images]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores, errors = score(reward_funcs, reward_names, [row["prompt"] for row in rows], images, columns, **extras)
    if scores.isnan().all():
        raised = next((raised[0] for raised in errors.values() if raised), None)
        cause = f" {type(raised).__name__}: {raised}" if raised else ""
        raise ValueError(
            f"On {len(rows)} grey test pictures no reward function ({', '.join(reward_names)}) returned a score.{cause}"
        ) from raised
    for name, column in zip(reward_names, scores.unbind(1), strict=True):
        if column.isnan().all():
            logger.warning(f"Reward {name!r} has no score for any of {len(rows)} grey test pictures.")


def takes_videos(function: Callable) -> bool:
    """Whether a reward function wants videos as a whole."""
    return "videos" in inspect.signature(function).parameters


def _spread_frames(columns: dict[str, list], videos: list[list]) -> dict[str, list]:
    """Columns with a row per chosen frame, the same number of each video."""
    count = min(FRAMES_PER_VIDEO, len(videos[0]))
    spread = {name: [value for value in values for _ in range(count)] for name, values in columns.items()}
    chosen = [round(i * (len(videos[0]) - 1) / max(1, count - 1)) for i in range(count)]
    spread["images"] = spread["completions"] = [video[i] for video in videos for i in chosen]
    return spread


def _by_sample(scores: list[float], n: int) -> torch.Tensor:
    """Means `(n,)` over the frames of each sample; NaN where there is none for one of them."""
    return torch.tensor(scores, dtype=torch.float64).unflatten(0, (n, -1)).mean(1)


def is_async(function: Callable) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _as_scores(result, name: str, expected: int) -> list[float]:
    if isinstance(result, torch.Tensor):
        result = result.detach().flatten().tolist()
    try:
        result = list(result)
    except TypeError:
        raise ValueError(
            f"Reward {name!r} returned a {type(result).__name__}: expected a list of {expected} numbers or None."
        ) from None
    if len(result) != expected:
        raise ValueError(
            f"Reward {name!r} returned {len(result)} scores for {expected} pictures: expected one for each."
        )
    scores = []
    for value in result:
        try:
            # float("0.5") works, but a reward that returns text is a mistake.
            value = math.nan if value is None else float(None if isinstance(value, (str, bytes)) else value)
        except (TypeError, ValueError):
            raise ValueError(
                f"Reward {name!r} returned {value!r} ({type(value).__name__}): expected numbers or None."
            ) from None
        # An infinite reward would make the whole group's advantages NaN.
        scores.append(value if math.isfinite(value) else math.nan)
    return scores
