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

"""Scores of several models on the same prompts: means, intervals, tables, and a page with the pictures side by side."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table
from scipy import stats

from .template import write_page
from .text import format_change, format_number


RESAMPLES = 5000
FEW_PROMPTS = 20  # with fewer, the percentile bootstrap is known to be too sure of itself
PROMPTS_IN_PAGE = 500
SMALL = 128  # pixels; smaller pictures are enlarged without smoothing


def prompt_means(scores: np.ndarray) -> np.ndarray:
    """Mean score `(prompts,)` of each prompt's pictures `(prompts, images_per_prompt)`; NaN where none has a score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an empty slice
        return np.nanmean(scores, axis=1)


def bootstrap_interval(values: np.ndarray, seed: int = 0, confidence: float = 0.95) -> tuple[float, float] | None:
    """
    Percentile bootstrap interval of a mean (Efron 1979): the mean of as many prompts, drawn with replacement, again and
    again.

    Args:
        values (`np.ndarray` of shape `(prompts,)`): One value for each prompt. Prompts are drawn, not pictures: several
            pictures of one prompt are no independent evidence.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        confidence (`float`, *optional*, defaults to 0.95): Share of the draws within the interval.

    Returns:
        `tuple[float, float]` or `None`: Its ends; `None` with fewer than two prompts.
    """
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass
class Comparison:
    """
    Scores of models on the same prompts.

    Args:
        scores (`dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]]`): By model, number of steps and reward: scores
            of shape `(prompts, images_per_prompt)`, NaN where there is none, and where they could not be had.
        models (`list[str]`), steps (`list[int]`), rewards (`list[str]`): In the order in which they are shown.
        tags (`list[str]`, *optional*): Tag of each prompt.
        base (`str`, *optional*): The model that the others are compared with.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """

    scores: Mapping[tuple[str, int, str], tuple[np.ndarray, np.ndarray]]
    models: Sequence[str]
    steps: Sequence[int]
    rewards: Sequence[str]
    tags: Sequence[str] | None = None
    base: str | None = None
    seed: int = 0

    @cached_property
    def tag_names(self) -> list[str]:
        """Tags in order of first appearance; none where all prompts have the same."""
        names = list(dict.fromkeys(map(str, self.tags or [])))
        return names if len(names) > 1 else []

    @cached_property
    def _cells(self) -> dict[tuple[int, str, str, str | None], dict]:
        return {
            (steps, model, reward, tag): self._cell(steps, model, reward, tag)
            for steps in self.steps
            for model in self.models
            for reward in self.rewards
            for tag in (None, *self.tag_names)
        }

    def cell(self, steps: int, model: str, reward: str, tag: str | None = None) -> dict:
        """One entry of [`Comparison.cells`]."""
        return self._cells[steps, model, reward, tag]

    def cells(self) -> list[dict]:
        """
        Everything that was found, as plain values.

        Returns:
            `list[dict]`: for each number of steps, model, reward and tag (`None` for all prompts): `mean` over prompts,
            its `interval`, `pictures`, how many of them were `scored`, how many scores `failed` (to the rest, the reward
            does not apply); and, beside a base, the paired `difference` from it: `mean`, `interval` and `prompts` that
            both have a score for.
        """
        return list(self._cells.values())

    def _cell(self, steps: int, model: str, reward: str, tag: str | None) -> dict:
        chosen = np.array([tag is None or str(own) == tag for own in self.tags or [None] * self._num_prompts])
        scores, failed = (part[chosen] for part in self.scores[model, steps, reward])
        cell = {
            "steps": steps,
            "model": model,
            "reward": reward,
            "tag": tag,
            **self._estimate(prompt_means(scores)),
            "pictures": int(scores.size),
            "scored": int((~np.isnan(scores)).sum()),
            "failed": int(failed.sum()),
        }
        if self.base is not None and model != self.base:
            # Pictures of the same number, which started from the same noise.
            change = prompt_means(scores - self.scores[self.base, steps, reward][0][chosen])
            cell["difference"] = {**self._estimate(change), "prompts": int((~np.isnan(change)).sum())}
        return cell

    def _estimate(self, values: np.ndarray) -> dict:
        values = values[~np.isnan(values)]
        return {
            "mean": float(values.mean()) if len(values) else None,
            "interval": bootstrap_interval(values, self.seed),
        }

    @property
    def _num_prompts(self) -> int:
        return len(next(iter(self.scores.values()))[0])

    def rows(self, steps: int, tag: str | None = None) -> Iterator[tuple[str, list[dict], bool]]:
        """Rows of a table: label, an estimate for each reward, and whether they are differences."""
        for model in self.models:
            cells = [self.cell(steps, model, reward, tag) for reward in self.rewards]
            yield model, cells, False
            if "difference" in cells[0]:
                yield f"{model} - {self.base}", [cell["difference"] for cell in cells], True

    def notes(self) -> list[str]:
        """What a reader of the table has to know."""
        scores = next(iter(self.scores.values()))[0]
        each = "" if scores.shape[1] == 1 else f", {scores.shape[1]} pictures of each"
        notes = [
            f"Means over {len(scores)} prompts{each}; in brackets, 95 % intervals (percentile bootstrap over prompts, "
            f"{RESAMPLES:,} draws)."
        ]
        if self.base is not None and len(self.models) > 1:
            notes[0] += (
                " Differences are paired (same prompts, same noise); bold where the interval does not contain 0."
            )
        smallest = min([len(scores), *(sum(str(own) == tag for own in self.tags) for tag in self.tag_names)])
        if smallest < FEW_PROMPTS:
            where = "these" if len(scores) < FEW_PROMPTS else "small tags"
            notes.append(
                f"Intervals of fewer than {FEW_PROMPTS} prompts, such as {where}, are narrower than they should be."
            )
        for cell in self.cells():
            if cell["tag"] is None and cell["scored"] < cell["pictures"]:
                inapplicable = cell["pictures"] - cell["scored"] - cell["failed"]
                reasons = [
                    f"{count} {reason}"
                    for count, reason in ((cell["failed"], "failed"), (inapplicable, "to which it does not apply"))
                    if count
                ]
                notes.append(
                    f"{cell['reward']}, {cell['model']}, {cell['steps']} steps: {cell['scored']} of {cell['pictures']} "
                    f"pictures scored ({', '.join(reasons)})."
                )
        return notes


def is_clear(estimate: Mapping) -> bool:
    """Whether an interval does not contain 0."""
    interval = estimate["interval"]
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def format_estimate(estimate: Mapping, is_change: bool) -> tuple[str, str]:
    """Mean and interval as text; empty where there is none."""
    if estimate["mean"] is None:
        return "-", ""
    form = format_change if is_change else format_number
    interval = estimate["interval"]
    return form(estimate["mean"]), "" if interval is None else f"[{', '.join(map(form, interval))}]"


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tables for a terminal: all prompts, then the tags at the largest number of steps."""
    tables = [Table(title="Scores", title_justify="left")]
    columns = ("steps", "model")
    tags = [(max(comparison.steps), tag) for tag in comparison.tag_names]
    if tags:
        tables.append(Table(title=f"Scores by tag, {tags[0][0]} steps", title_justify="left"))
    for table, first in zip(tables, ("steps", "tag"), strict=False):
        for name in (first, columns[1]):
            table.add_column(name, overflow="fold")
        for reward in comparison.rewards:
            table.add_column(escape(reward), justify="right", overflow="fold")
    for table, places in zip(tables, ([(steps, None) for steps in comparison.steps], tags), strict=False):
        for steps, tag in places:
            table.add_section()
            for i, (label, estimates, is_change) in enumerate(comparison.rows(steps, tag)):
                texts = []
                for estimate in estimates:
                    mean, interval = format_estimate(estimate, is_change)
                    mean = f"[bold]{mean}[/bold]" if is_change and is_clear(estimate) else mean
                    # A backslash keeps rich from taking the bracket for markup; `escape` sees no harm in numbers.
                    texts.append(f"{mean}\n[dim]\\{interval}[/dim]" if interval and tag is None else mean)
                place = (str(steps) if tag is None else tag) if i == 0 else ""
                table.add_row(escape(place), escape(label), *texts)
    return tables


def to_markdown(comparison: Comparison) -> str:
    """The same tables for a paper or a README, with the tags at every number of steps."""

    def table(first: str, places: list[tuple[int, str | None]]) -> list[str]:
        lines = [
            f"| {first} | model | {' | '.join(comparison.rewards)} |",
            f"|:--|:--|{'--:|' * len(comparison.rewards)}",
        ]
        for steps, tag in places:
            for i, (label, estimates, is_change) in enumerate(comparison.rows(steps, tag)):
                texts = []
                for estimate in estimates:
                    mean, interval = format_estimate(estimate, is_change)
                    mean = f"**{mean}**" if is_change and is_clear(estimate) else mean
                    texts.append(f"{mean} {interval}".strip())
                place = (str(steps) if tag is None else tag.replace("|", "\\|")) if i == 0 else ""
                lines.append(f"| {place} | {label} | {' | '.join(texts)} |")
        return lines

    lines = table("steps", [(steps, None) for steps in comparison.steps])
    for steps in comparison.steps if comparison.tag_names else []:
        lines += ["", f"By tag, {steps} steps:", ""]
        lines += table("tag", [(steps, tag) for tag in comparison.tag_names])
    return "\n".join([*lines, "", "\n\n".join(comparison.notes()), ""])


def write_comparison(
    comparison: Comparison,
    folder: Path,
    prompts: Sequence[str],
    picture: Callable[[str, int, int], Path],
    settings: Mapping | None = None,
    title: str | None = None,
) -> Path:
    """
    Write `report.html`: the tables, and the pictures of each prompt side by side with their scores.

    The page needs nothing from elsewhere but the pictures, which it links to where they lie in the folder.

    Args:
        comparison ([`Comparison`]): What was found.
        folder (`Path`): Where to write.
        prompts (`Sequence[str]`): All prompts.
        picture (`Callable[[str, int, int], Path]`): File of a model's picture, by number of steps and row; the pictures of
            one prompt are neighbours.
        settings (`Mapping`, *optional*): Shown at the end.
        title (`str`, *optional*): Heading. Defaults to the directory's name.

    Returns:
        `Path`: the page.
    """
    with Image.open(picture(comparison.models[0], comparison.steps[0], 0)) as first:
        is_small = max(first.size) <= SMALL
    sections = [(f"{steps} steps", [(steps, None)]) for steps in comparison.steps]
    by_tag = [(f"{steps} steps", [(steps, tag) for tag in comparison.tag_names]) for steps in comparison.steps]
    return write_page(
        folder / "report.html",
        "comparison.html",
        title=title or folder.resolve().name,
        notes=comparison.notes(),
        rewards=comparison.rewards,
        steps=comparison.steps,
        tags=comparison.tag_names,
        compared=comparison.models[1] if comparison.base is not None and len(comparison.models) > 1 else None,
        tables=[_table(comparison, places) for places in sections],
        tag_tables=[_table(comparison, places) for places in by_tag] if comparison.tag_names else [],
        figures=list(_figures(comparison, folder, prompts, picture)),
        num_prompts=len(prompts),
        num_shown=min(len(prompts), PROMPTS_IN_PAGE),
        is_small=is_small,
        settings=[(name, str(value)) for name, value in (settings or {}).items() if value not in (None, {}, "")],
    )


def _table(comparison: Comparison, section: tuple[str, list[tuple[int, str | None]]]) -> dict:
    heading, places = section
    rows = []
    for steps, tag in places:
        for i, (label, estimates, is_change) in enumerate(comparison.rows(steps, tag)):
            texts = [format_estimate(estimate, is_change) for estimate in estimates]
            signs = [_direction(e["mean"]) if is_change and is_clear(e) else "" for e in estimates]
            rows.append(
                {
                    "tag": (tag or "") if i == 0 else "",
                    "label": label,
                    "is_change": is_change,
                    "cells": [(*text, sign) for text, sign in zip(texts, signs, strict=True)],
                }
            )
    return {"heading": heading, "rows": rows, "has_tags": places[0][1] is not None}


def _figures(
    comparison: Comparison, folder: Path, prompts: Sequence[str], picture: Callable[[str, int, int], Path]
) -> Iterator[dict]:
    """For each number of steps and prompt, its pictures: a row for each, a column for each model."""
    each = next(iter(comparison.scores.values()))[0].shape[1]
    means = {place: prompt_means(scores) for place, (scores, _) in comparison.scores.items()}
    compared = comparison.models[1] if comparison.base is not None and len(comparison.models) > 1 else None
    for steps in comparison.steps:
        for number in range(min(len(prompts), PROMPTS_IN_PAGE)):
            pictures = [
                [
                    quote(os.path.relpath(picture(model, steps, number * each + i), folder).replace(os.sep, "/"))
                    for model in comparison.models
                ]
                for i in range(each)
            ]
            scores, changes = [], []
            for reward in comparison.rewards:
                values = [means[model, steps, reward][number] for model in comparison.models]
                first = values[0] if comparison.base is not None else math.nan
                signs = ["", *(_direction(value - first) for value in values[1:])]
                texts = ["-" if math.isnan(value) else format_number(value) for value in values]
                scores.append((reward, list(zip(texts, signs, strict=True))))
                change = 0.0 if compared is None else values[1] - values[0]
                changes.append(0.0 if math.isnan(change) else round(float(change), 6))
            yield {
                "number": number,
                "steps": steps,
                "tag": str(comparison.tags[number]) if comparison.tag_names else "",
                "prompt": prompts[number],
                "pictures": pictures,
                "models": comparison.models,
                "scores": scores,
                "changes": changes,
            }


def _direction(change: float | None) -> str:
    if change is None or math.isnan(change) or change == 0:
        return ""
    return "up" if change > 0 else "down"
