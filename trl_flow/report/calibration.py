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

"""The picture of an exploration calibration (DenseGRPO, Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .panels import COLORS, INK, LINE, save_figure


def plot_calibration(before: Mapping, after: Mapping | None, path: str | Path) -> Path:
    """
    Draw the dense reward of every trajectory at every step, before and after calibration, with the noise level beneath.

    Above each step stands the share of its dense rewards that are positive: the calibration brings it towards one half.

    Args:
        before, after (`Mapping`):
            One side each. `gains` (`list[list[float]]`): dense rewards, for each of the T steps in order (0 = most
            noise) those of all trajectories; `noise_level` (`float` or `list[float]`): the table psi, one per step.
            Steps that were not sampled have an empty list. `after=None` draws `before` alone.
        path (`str` or `Path`):
            PNG file to write.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: no dense rewards, or a noise table of another length than the steps.
    """
    sides = [("before calibration", before)] + ([("after calibration", after)] if after is not None else [])
    tables = []
    for title, side in sides:
        gains = [np.asarray([g for g in step if g is not None], dtype=float) for step in side["gains"]]
        gains = [step[np.isfinite(step)] for step in gains]
        if not any(len(step) for step in gains):
            raise ValueError(f"{title}: `gains` holds no finite dense reward.")
        levels = side["noise_level"]
        levels = (
            [float(levels)] * len(gains) if isinstance(levels, (int, float)) else [float(level) for level in levels]
        )
        if len(levels) != len(gains):
            raise ValueError(f"{title}: {len(levels)} noise levels for {len(gains)} steps.")
        tables.append((title, gains, levels))

    figure = Figure(figsize=(6.0 * len(tables), 5.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(tables), sharey="row", sharex="col", height_ratios=(3, 1), squeeze=False)
    highest = max(max(levels) for _, _, levels in tables)
    # One far outlier must not flatten everything else: the axis holds all but the last thousandth of either side.
    values = np.concatenate([step for _, gains, _ in tables for step in gains])
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.06 * max(high - low, 1e-12)
    for column, (title, gains, levels) in enumerate(tables):
        top, bottom = grid[0, column], grid[1, column]
        for axes in (top, bottom):
            _style(axes)
        _draw_gains(top, gains)
        top.set_ylim(low - margin, high + 3 * margin)
        top.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=10)
        steps = range(len(gains))
        bottom.bar(steps, levels, color=COLORS[4], width=0.62)
        bottom.set_ylim(0, highest * 1.3 if highest > 0 else 1)
        if len(gains) <= 16:
            for step, level in zip(steps, levels, strict=True):
                bottom.annotate(
                    f"{level:.2g}",
                    (step, level),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=INK,
                )
        bottom.set_xlabel("denoising step (0 = most noise)", color=INK, fontsize=9)
        bottom.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    grid[0, 0].set_ylabel("dense reward", color=INK, fontsize=9)
    grid[1, 0].set_ylabel("noise level ψ", color=INK, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return path


def _draw_gains(axes: Axes, gains: list[np.ndarray]) -> None:
    axes.axhline(0, color=INK, linewidth=0.9)
    generator = np.random.default_rng(0)
    jitter = generator.uniform(-0.16, 0.16, max(len(step) for step in gains))
    if len({len(step) for step in gains}) == 1:
        # The same trajectories at every step: one polyline each, as in the paper. Beyond a few dozen they are a blur.
        for trajectory, shift in list(zip(np.stack(gains).T, jitter, strict=True))[:24]:
            axes.plot(np.arange(len(gains)) + shift, trajectory, color="#8c95a1", linewidth=0.6, alpha=0.35)
    for step, values in enumerate(gains):
        if not len(values):
            continue
        x = step + jitter[: len(values)]
        for sign, color in ((values > 0, COLORS[0]), (values < 0, COLORS[1]), (values == 0, "#8c95a1")):
            axes.scatter(x[sign], values[sign], s=7, color=color, alpha=0.6, linewidths=0, zorder=3)
        axes.annotate(
            f"{np.mean(values > 0):.0%}",
            (step, 0.985),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=7.5 if len(gains) <= 12 else 6,
            color=INK,
            zorder=4,
        )
    axes.annotate(
        "share above zero",
        (1, 1.015),
        xycoords="axes fraction",
        ha="right",
        va="bottom",
        fontsize=7.5,
        color="#6b7280",
    )


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
