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
import functools
import inspect
import math
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Executor, Future
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from PIL import Image

from .reward import RewardUnavailableError
from .threads import DaemonExecutor


logger = get_logger(__name__)

FRAMES_PER_VIDEO = 8
# Samples that are scored alone, before a function that has raised for all is taken to raise for every one.
ALONE = 8


class NothingToLearnError(ValueError):
    """No sample of a batch has a score."""


class Scores(NamedTuple):
    """
    Scores of n pictures by R reward functions.

    Attributes:
        values (`torch.Tensor` of shape `(n, R)`): float64, NaN where there is none.
        failed (`torch.Tensor` of shape `(n, R)`): Where there is none because the function raised or returned NaN: it
            applies to the picture, and what it would have said is not known. Elsewhere it returned `None`.
        errors (`dict[str, list[Exception]]`): What each function raised, one exception per sample that it cost.
    """

    values: torch.Tensor
    failed: torch.Tensor
    errors: dict[str, list[Exception]]


class RewardThreads:
    """
    A thread for each reward function that is `concurrent` or asynchronous: scores are made while sampling goes on, and no
    function is called twice at a time.

    Attributes:
        unavailable (`dict[int, RewardUnavailableError]`): What functions, by their `id`, have raised. They are not called
            again until it is cleared: each call might wait for minutes.
    """

    def __init__(self):
        self._threads: dict[int | None, DaemonExecutor] = {}
        self._local = threading.local()
        self.unavailable: dict[int, RewardUnavailableError] = {}

    def of(self, function: Callable) -> Executor | None:
        """The thread of a function; `None` for one that is called in the caller's."""
        if not is_async(function) and not getattr(function, "concurrent", False):
            return None
        return self._thread(id(function))

    def _thread(self, key: int | None) -> Executor:
        if key not in self._threads:
            self._threads[key] = DaemonExecutor(1)
        return self._threads[key]

    def run(self, awaitable: Awaitable):
        """The result of an awaitable, by the one event loop of this thread: what a function keeps may belong to it."""
        if _loop_is_running():
            # A notebook's cell or a coroutine calls the trainer: while their loop runs, this thread can run no other.
            return self._thread(None).submit(self.run, awaitable).result()
        if not hasattr(self._local, "runner"):
            self._local.runner = asyncio.Runner()
        return self._local.runner.run(_wait_for(awaitable))

    def close(self):
        """Drops what has not begun."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def score(*args, **kwargs) -> Scores:
    """The result of [`start_scoring`]. Functions that have a thread run together, beside the others."""
    threads = RewardThreads()
    try:
        return start_scoring(threads, *args, **kwargs)()
    finally:
        threads.close()


def start_scoring(
    threads: RewardThreads,
    reward_funcs: list[Callable],
    reward_names: list[str],
    prompts: list[str],
    images: list[Image.Image] | list[list[Image.Image]],
    columns: dict[str, list] | None = None,
    groups: list[Hashable] | None = None,
    **extras,
) -> Callable[[], Scores]:
    """
    Scores of every picture by every reward function.

    Functions that have a thread are started in it; the others have run when this returns. A function that raises is
    called again on halves of the batch until the samples that make it raise are alone; those have no score. One that
    raises the same kind of error for the batch, for both halves and for 8 samples alone, or
    [`RewardUnavailableError`], is not called again. A function of scope `"group"` is called once for each group.

    Videos are lists of frames. A function with an argument `videos` gets them whole; any other one scores pictures, and
    gets up to 8 frames of each video, evenly spaced: their mean is the video's score.

    Args:
        threads ([`RewardThreads`]): Where `concurrent` and asynchronous functions run.
        reward_funcs (`list[Callable]`), reward_names (`list[str]`): R functions and their names.
        prompts (`list[str]`), images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`): One prompt for each of n
            pictures or videos.
        columns (`dict[str, list]`, *optional*): Other columns of the dataset, n values each.
        groups (`list`, *optional*): What tells apart the groups in which samples are compared. Default: their prompts.
        extras: Further keyword arguments, passed on as they are (`trainer_state`, `log_metric`); but `log_extra`, which is
            called when the scores are waited for, with n values in the samples' order.

    Returns:
        `Callable[[], Scores]`: Waits for the scores.

    Raises:
        ValueError: Here or when waited for, if a function returns another number of scores, or something that is not a
            number.
    """
    columns = {**(columns or {}), "prompts": prompts, "images": images, "completions": images}
    are_videos = bool(images) and isinstance(images[0], (list, tuple))
    count = min(FRAMES_PER_VIDEO, len(images[0])) if are_videos else 1
    frames = _spread_frames(columns, images, count) if are_videos else columns
    if are_videos:
        columns["videos"] = images
    members = defaultdict(list)
    for sample, group in enumerate(prompts if groups is None else groups):
        members[group].append(sample)

    n = len(images)
    begun = []
    for function, name in zip(reward_funcs, reward_names, strict=True):
        table, repeats = (columns, 1) if takes_videos(function) else (frames, count)
        by_group = getattr(function, "scope", "sample") == "group"
        if by_group:  # frame by frame: those of one moment are compared
            rows = [[sample * repeats + i for sample in group] for group in members.values() for i in range(repeats)]
        else:
            rows = [list(range(n * repeats))]
        work = functools.partial(_score_parts, threads, function, name, table, rows, repeats, by_group, extras)
        thread = threads.of(function)
        begun.append(work() if thread is None else thread.submit(work))

    def wait() -> Scores:
        results = [part.result() if isinstance(part, Future) else part for part in begun]
        errors = {name: list(result.errors.values()) for name, result in zip(reward_names, results, strict=True)}
        for name, raised in errors.items():
            if raised:
                logger.warning(
                    f"Reward {name!r} raised for {len(raised)} of {n} samples, which are left out. The first "
                    f"error was {type(raised[0]).__name__}: {raised[0]}"
                )
        for result in results:
            for column, values in result.extra.items():
                extras["log_extra"](column, values)
        values, failed = (torch.stack([result[i] for result in results], dim=1) for i in (0, 1))
        return Scores(values, failed, errors)

    return wait


class _Column(NamedTuple):
    """What one function gave: scores `(n,)`, where it failed `(n,)`, and by sample what it raised and what it noted."""

    values: torch.Tensor
    failed: torch.Tensor
    errors: dict[int, Exception]
    extra: dict[str, list]


@torch.no_grad()  # which holds for a thread alone
def _score_parts(
    threads: RewardThreads,
    function: Callable,
    name: str,
    table: dict[str, list],
    parts: list[list[int]],
    repeats: int,
    whole: bool,
    extras: dict,
) -> _Column:
    """
    The scores of one function.

    Args:
        parts (`list[list[int]]`): Rows of the table that are scored in one call each.
        repeats (`int`): Rows of each sample.
        whole (`bool`): Whether a part means nothing in halves.
    """
    n = len(table["prompts"]) // repeats
    scores = torch.full((n * repeats,), math.nan, dtype=torch.float64)
    failed = torch.zeros(n * repeats, dtype=torch.bool)
    raised, left, extra = {}, set(range(n * repeats)), {}

    def fail(rows: list[int], error: Exception):
        raised.update(dict.fromkeys((row // repeats for row in rows), error))
        failed[rows] = True
        left.difference_update(rows)

    # No recursion: a function that refers to itself would keep the pictures until the next garbage collection.
    parts, calls, kinds = deque(parts), 0, set()
    while parts:
        rows = parts.popleft()
        calls += 1
        noted = {}
        arguments = {column: [values[row] for row in rows] for column, values in table.items()} | extras
        if "log_extra" in extras:
            arguments["log_extra"] = noted.__setitem__
        try:
            if id(function) in threads.unavailable:
                raise threads.unavailable[id(function)]
            result = function(**arguments)
            if inspect.isawaitable(result):
                result = threads.run(result)
        except RewardUnavailableError as error:
            threads.unavailable[id(function)] = error
            fail(sorted(left), error)
            break
        except Exception as error:  # a reward is the user's code: anything may come out of it
            if len(rows) == 1 or whole:
                fail(rows, error)
            else:
                middle = len(rows) // 2
                parts += [rows[:middle], rows[middle:]]
            kinds.add(type(error))
            # Nothing but this error so far, for the whole, for its halves, and then for a few samples alone: it is no
            # sample's fault, and as many calls as there are samples would not find one that has a score.
            if whole or len(kinds) > 1 or n * repeats <= 2 * ALONE:
                pass
            elif calls == 3:
                alone = sorted(left)[:: len(left) // ALONE][:ALONE]
                parts = deque([[row] for row in alone] + [[row for row in part if row not in alone] for part in parts])
            elif calls == 3 + ALONE:
                fail(sorted(left), error)
                break
            continue
        kinds.add(None)  # it can work
        scores[rows], failed[rows] = _as_scores(result, name, len(rows))
        left.difference_update(rows)
        for column, values in noted.items():
            values = list(values)
            if len(values) != len(rows):
                raise ValueError(
                    f"Reward {name!r} gave log_extra({column!r}, ...) {len(values)} values for {len(rows)} pictures: "
                    "expected one for each."
                )
            for row, value in zip(rows, values, strict=True):
                extra.setdefault(column, [None] * (n * repeats))[row] = value
    if repeats > 1:  # of a video, what was noted of each of its frames
        extra = {c: [values[i : i + repeats] for i in range(0, n * repeats, repeats)] for c, values in extra.items()}
    # A video of which one frame could not be scored has no score.
    values, failed = scores.unflatten(0, (n, repeats)).mean(1), failed.unflatten(0, (n, repeats)).any(1)
    return _Column(values, failed, raised, extra)


async def _wait_for(awaitable):
    return await awaitable


def check_rewards(
    reward_funcs: list[Callable],
    reward_names: list[str],
    rows: list[dict],
    image_size: tuple[int, int],
    num_frames: int | None = None,
    trained: bool = True,
    threads: RewardThreads | None = None,
    **extras,
):
    """
    Calls every reward function on grey pictures, so that one that cannot work stops the run before any work is spent.

    Args:
        reward_funcs (`list[Callable]`), reward_names (`list[str]`): The functions, and what they are called in errors.
        rows (`list[dict]`): A few rows of the dataset.
        image_size (`tuple[int, int]`): Width and height in pixels.
        num_frames (`int`, *optional*): For videos.
        trained (`bool`, *optional*, defaults to `True`): Whether there must be a score of one of them.
        threads ([`RewardThreads`], *optional*): Those that the functions will be called in later.

    Raises:
        ValueError: If a function raises for every sample, or returns the wrong number of scores, or no numbers; if none
            of them has a score.
    """
    if not reward_funcs:
        return
    if any(getattr(function, "scope", "sample") == "group" for function in reward_funcs):
        rows = [row for row in rows for _ in range(2)]  # one picture alone cannot be compared
    images = [Image.new("RGB", image_size, (128, 128, 128)) for _ in rows]
    if num_frames is not None:
        images = [[image] * num_frames for image in images]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    begin = score if threads is None else functools.partial(start_scoring, threads)
    scores = begin(reward_funcs, reward_names, prompts, images, columns, **extras)
    values, _, errors = scores if threads is None else scores()
    for name, column in zip(reward_names, values.unbind(1), strict=True):
        if len(errors[name]) == len(images):
            error = errors[name][0]
            raise ValueError(
                f"Reward {name!r} raised for each of {len(images)} grey test pictures. {type(error).__name__}: {error}"
            ) from error
        if column.isnan().all():
            logger.warning(f"Reward {name!r} has no score for any of {len(images)} grey test pictures.")
    if trained and values.isnan().all():
        raise ValueError(
            f"On {len(images)} grey test pictures no reward function ({', '.join(reward_names)}) returned a score."
        )


def takes_videos(function: Callable) -> bool:
    """Whether a reward function wants videos as a whole."""
    return "videos" in inspect.signature(function).parameters


def _spread_frames(columns: dict[str, list], videos: list[list], count: int) -> dict[str, list]:
    """Columns with a row per chosen frame, `count` of each video."""
    spread = {name: [value for value in values for _ in range(count)] for name, values in columns.items()}
    chosen = [round(i * (len(videos[0]) - 1) / max(1, count - 1)) for i in range(count)]
    spread["images"] = spread["completions"] = [video[i] for video in videos for i in chosen]
    return spread


def is_async(function: Callable) -> bool:
    """
    Whether a reward function is `async`, itself or its `__call__`.

    Args:
        function (`Callable`): The function.
    """
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _as_scores(result, name: str, expected: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `(expected,)`, float64, and where there should be one that is none."""
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
            scores.append(math.nan if value is None else float(None if isinstance(value, (str, bytes)) else value))
        except (TypeError, ValueError):
            raise ValueError(
                f"Reward {name!r} returned {value!r} ({type(value).__name__}): expected numbers or None."
            ) from None
    # An infinite reward would make the whole group's advantages NaN.
    scores = [score if math.isfinite(score) else math.nan for score in scores]
    failed = [math.isnan(score) and value is not None for score, value in zip(scores, result, strict=True)]
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(failed, dtype=torch.bool)
