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

"""A table of a rollout's samples in the terminal: prompts, scores, advantages."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .history import finite
from .text import format_number


MISSING = "–"
LEAST_PROMPT = 24
PROMPT_LINES = 3


def print_samples(
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float | None],
    step: int,
    stream: TextIO | None = None,
    width: int | None = None,
):
    """
    Print a table of samples, as TRL's trainers do with completions.

    Each reward has a column, where the terminal is wide enough; else a line in one column. Long prompts are cut, and
    their square brackets mean nothing.

    Args:
        prompts (`Sequence[str]`):
            One per sample.
        scores (`Mapping[str, Sequence[float | None]]`):
            Scores per reward name, one per sample; `None` and NaN are shown as missing.
        advantages (`Sequence[float | None]`):
            One per sample.
        step (`int`):
            Update that the samples were made for.
        stream (`TextIO`, *optional*):
            Where to print. Defaults to `sys.stdout`.
        width (`int`, *optional*):
            Characters of a line. Defaults to those of the terminal, or 80.

    Example:

    ```python
    >>> print_samples(["a [red] cup", "a blue cup"], {"ocr": [0.5, None]}, [0.7, None], step=3, width=56)
    Update 3
    ╭──────────────────────────────────┬───────┬───────────╮
    │ prompt                           │   ocr │ advantage │
    ├──────────────────────────────────┼───────┼───────────┤
    │ a [red] cup                      │ 0.500 │     0.700 │
    │ a blue cup                       │     – │         – │
    ╰──────────────────────────────────┴───────┴───────────╯
    ```
    """
    console = Console(file=stream or sys.stdout, width=width, highlight=False)
    columns = {name: [_number(value) for value in scores[name]] for name in scores}
    advantage = {"advantage": [_number(value) for value in advantages]}
    left = _space_left(console, columns | advantage)
    side_by_side = left >= LEAST_PROMPT
    if not side_by_side:
        lines = [[f"{name} {values[number]}" for name, values in columns.items()] for number in range(len(prompts))]
        columns = {"scores": ["\n".join(sample) for sample in lines]}
        left = max(LEAST_PROMPT // 2, _space_left(console, columns | advantage))
    table = Table(box=ROUNDED, expand=True, show_lines=not side_by_side, title=f"Update {step}", title_justify="left")
    table.add_column("prompt", ratio=1, overflow="fold")
    for name in columns | advantage:
        table.add_column(name, justify="right", no_wrap=True)
    for number, prompt in enumerate(prompts):
        values = [values[number] for values in (columns | advantage).values()]
        table.add_row(_shortened(console, prompt, left), *map(Text, values))
    with console.capture() as captured:
        console.print(table)
    # A stream of another encoding than UTF-8 must not end the run.
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    with tqdm.external_write_mode(file=console.file):
        console.file.write(captured.get().encode(encoding, "replace").decode(encoding))


def contrasting(totals: Sequence[Sequence[float]], count: int) -> list[tuple[int, int]]:
    """
    Samples that show a rollout in few lines: the best and the worst of each group, then the next best and worst ...

    Args:
        totals (`Sequence[Sequence[float]]`):
            Reward of each sample of each group; one that has none (NaN) ranks last.
        count (`int`):
            How many to choose.

    Returns:
        `list[tuple[int, int]]`: group and sample, by group from best to worst.
    """
    rankings = [
        sorted(range(len(group)), key=lambda i, group=group: math.inf if math.isnan(group[i]) else -group[i])
        for group in totals
    ]
    places = [
        (pair, group, place)
        for group, ranking in enumerate(rankings)
        for pair in range((len(ranking) + 1) // 2)
        for place in sorted({pair, len(ranking) - 1 - pair})
    ]
    chosen = sorted((group, place) for _, group, place in sorted(places)[:count])
    return [(group, rankings[group][place]) for group, place in chosen]


def _space_left(console: Console, columns: Mapping[str, Sequence[str]]) -> int:
    """Characters of a line that columns leave to the prompts, with the borders and spaces between all of them."""
    widths = [
        max(len(line) for text in [name, *texts] for line in text.split("\n")) for name, texts in columns.items()
    ]
    return console.width - sum(width + 3 for width in widths) - 4


def _shortened(console: Console, prompt: str, width: int) -> Text:
    """A prompt in a few lines."""
    lines = Text(" ".join(prompt.split())).wrap(console, width, overflow="fold")
    if len(lines) > PROMPT_LINES:
        lines[PROMPT_LINES - 1].truncate(width - 1)
        lines[PROMPT_LINES - 1].append("…")
    return Text("\n").join(lines[:PROMPT_LINES])


def _number(value: float | None) -> str:
    return format_number(value) if finite(value) else MISSING
