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

"""Tries a reward function on drawn pictures: does it keep to the protocol, and does it score each picture alone?"""

import asyncio
import inspect
import math
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerState

from .scoring import takes_videos


# Differences below this share of the range of scores don't change who wins: batched matrix products round differently.
TOLERANCE = 0.01

# With quoted text for rewards that read, and things to count and to place for those that look.
PROMPTS = (
    'a shop sign that says "OPEN"',
    "a photo of a red circle on a blue background",
    'a poster with the words "GOOD MORNING"',
    "three yellow lemons in a bowl",
    'a road sign that reads "SLOW"',
    "a cat to the left of a dog",
    'a birthday cake with "HAPPY 30" on it',
    "an oil painting of a stormy sea",
)


class Finding(NamedTuple):
    """
    What came out of one check.

    Attributes:
        check (`str`): What was looked at.
        passed (`bool`, *optional*): `None` for what is told and not judged.
        text (`str`): What was found.
    """

    check: str
    passed: bool | None
    text: str


def check_reward(
    reward: Callable,
    rows: list[dict] | None = None,
    image_size: tuple[int, int] = (256, 256),
    device: torch.device | str = "cpu",
    images: list[Image.Image] | None = None,
) -> list[Finding]:
    """
    Call a reward function as a trainer would, on pictures drawn for the prompts, and see whether it can be trained on.

    Its scores must be numbers, one per picture, and not all alike; the same when it is called again, in another order,
    and, unless it compares the pictures of a group, for one picture at a time.

    Args:
        reward (`Callable`): A reward function.
        rows (`list[dict]`, *optional*): Rows of a dataset, with `prompt` and the columns that the reward requires. A
            reward with group scope gets pictures of the first one only. By default eight prompts without columns.
        image_size (`tuple[int, int]`, *optional*, defaults to `(256, 256)`): Width and height in pixels.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where it may compute.
        images (`list[PIL.Image.Image]`, *optional*): A picture for each row. By default they are drawn.

    Returns:
        `list[Finding]`: Without one whose `passed` is `False`, the reward is fine.
    """
    rows = rows or [{"prompt": prompt} for prompt in PROMPTS]
    if missing := [column for column in getattr(reward, "requires", ()) if column not in rows[0]]:
        return [
            Finding(
                "columns", False, f"it needs {', '.join(missing)}, which the prompts have not (--prompts names others)"
            )
        ]
    in_groups = getattr(reward, "scope", "sample") == "group"
    if in_groups:
        rows = [rows[0]] * len(rows)
    images = images or [draw(row["prompt"], image_size, seed) for seed, row in enumerate(rows)]
    everything = range(len(rows))

    def scores(chosen: Iterable[int]) -> list[float]:
        chosen = list(chosen)
        return _call(reward, [rows[i] for i in chosen], [images[i].copy() for i in chosen])

    try:
        if hasattr(reward, "prepare"):
            reward.prepare(torch.device(device))
        given = [image.copy() for image in images]
        first = _call(reward, rows, given)
    except Exception as error:  # a reward is the user's code: anything may come out of it
        return [Finding("scores", False, _told(error))]
    scored = [value for value in first if not math.isnan(value)]
    if not scored:
        return [Finding("scores", False, f"none for any of {len(first)} pictures (None or NaN)")]
    count = f"{len(scored)} of {len(first)} pictures" if len(scored) < len(first) else f"{len(first)} pictures"
    kind = "compares the pictures of a prompt" if in_groups else "scores each picture"
    findings = [Finding("scores", True, f"numbers for {count}; {kind}")]
    kept = all(a.tobytes() == b.tobytes() for a, b in zip(images, given, strict=True))
    findings.append(Finding("pictures", kept, "left as they were" if kept else "changed: other rewards get them, too"))

    checks = {
        "determinism": lambda: scores(everything),
        "order": lambda: scores(reversed(everything))[::-1],
    }
    if not in_groups:
        checks["batching"] = lambda: [scores([i])[0] for i in everything]
    seconds = {}
    for check, again in checks.items():
        started = time.perf_counter()
        try:
            findings.append(_compare(check, first, again()))
        except Exception as error:
            findings.append(Finding(check, False, _told(error)))
        seconds[check] = time.perf_counter() - started
    low, high = min(scored), max(scored)
    if low < high:
        findings.append(Finding("range", True, f"{low:.4g} to {high:.4g} on drawn pictures"))
    elif len(scored) == 1:
        findings.append(Finding("range", None, f"{low:.4g} for the only picture with a score"))
    else:
        text = f"{low:.4g} for all drawn pictures: nothing can be learned from it. Hidden errors look so, too"
        findings.append(Finding("range", False, text))
    speed = f"{len(rows) / seconds['determinism']:.3g} pictures per second, {len(rows)} at once"
    if "batching" in seconds:
        speed += f"; {len(rows) / seconds['batching']:.3g} one at a time"
    return [*findings, Finding("speed", None, speed)]


def draw(prompt: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Shapes that depend on the seed, and, but for every fourth seed, what is quoted in the prompt (or all of it)."""
    width, height = size
    choose = random.Random(seed)

    def color() -> tuple[int, ...]:
        return tuple(choose.randrange(256) for _ in range(3))

    image = Image.linear_gradient("L").resize(size)
    image = Image.merge("RGB", [image.point(lambda value, top=top: value * top // 255) for top in color()])
    canvas = ImageDraw.Draw(image)
    for _ in range(1 + seed % 4):
        x, y = choose.randrange(width), choose.randrange(height)
        shape = choose.choice((canvas.ellipse, canvas.rectangle))
        shape((x - width // 6, y - height // 6, x + width // 6, y + height // 6), fill=color())
    if seed % 4 == 3:
        return image
    text = prompt.split('"')[1] if prompt.count('"') >= 2 else prompt
    font = ImageFont.load_default(max(8, min(height // 6, int(1.8 * width / max(1, len(text))))))
    place = {"anchor": "mm", "fill": "white", "stroke_width": max(1, height // 100), "stroke_fill": "black"}
    canvas.text((width // 2, height // 2), text, font=font, **place)
    return image


def _call(reward: Callable, rows: list[dict], images: list[Image.Image]) -> list[float]:
    """Scores, NaN where there is none. What breaks the protocol is a ValueError."""
    if takes_videos(reward):
        images = [[image] * 4 for image in images]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    named = {"images": images, "completions": images, **({"videos": images} if takes_videos(reward) else {})}
    extras = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    result = reward(prompts=[row["prompt"] for row in rows], **named, **columns, **extras)
    if inspect.isawaitable(result):
        # In a thread: a notebook has an event loop of its own running, beside which there can be no other.
        with ThreadPoolExecutor(max_workers=1) as thread:
            result = thread.submit(asyncio.run, _wait(result)).result()
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__"):
        raise ValueError(f"returned a {type(result).__name__}: expected a list of {len(rows)} numbers or None")
    if len(result) != len(rows):
        raise ValueError(f"returned {len(result)} scores for {len(rows)} pictures: expected one for each")
    scores = []
    for value in result:
        try:
            # float("0.5") works, but a reward that returns text is a mistake.
            scores.append(math.nan if value is None else float(None if isinstance(value, (str, bytes)) else value))
        except (TypeError, ValueError):
            raise ValueError(f"returned {value!r} ({type(value).__name__}): expected numbers or None") from None
        if math.isinf(scores[-1]):
            raise ValueError("returned an infinite score: expected a number, or NaN if there is no score")
    return scores


async def _wait(awaitable):
    return await awaitable


def _compare(check: str, first: list[float], again: list[float]) -> Finding:
    if [math.isnan(value) for value in first] != [math.isnan(value) for value in again]:
        return Finding(check, False, "there are scores where there were none, or the other way round")
    pairs = [pair for pair in zip(first, again, strict=True) if not math.isnan(pair[0])]
    difference = max(abs(a - b) for a, b in pairs)
    spread = max(a for a, _ in pairs) - min(a for a, _ in pairs)
    allowed = max(TOLERANCE * spread, 1e-6 * max(abs(a) for a, _ in pairs))
    same = {
        "determinism": ("the same when called again", "called again, scores differ"),
        "order": ("the same in another order", "in another order, scores differ"),
        "batching": ("the same one at a time", "one picture at a time, scores differ"),
    }[check]
    if difference <= allowed:
        return Finding(check, True, same[0] + (f" (within {difference:.1g})" if difference else ""))
    return Finding(check, False, f"{same[1]} by up to {difference:.3g}; the range is {spread:.3g}")


def _told(error: Exception) -> str:
    if isinstance(error, ValueError) and str(error).startswith("returned "):
        return str(error)
    hint = ": a reward takes **kwargs" if "unexpected keyword argument" in str(error) else ""
    return f"raised {type(error).__name__}: {error}{hint}"
