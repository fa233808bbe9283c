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

"""The plots of a run: each panel shows one question's answer on one pair of axes."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from .history import RunHistory, finite
from .text import format_count


# Mid-tones that keep a contrast of 3:1 on white and on near-black, in an order that colour-blind readers can tell apart.
COLORS = ("#2b7fd4", "#d9730d", "#178f6f", "#b8568f", "#7f6bd1", "#8a7420")
SHARES = ("clip_ratio", "frac_reward_zero_std")
PHASES = {
    "rollout": "sampling",
    "decode": "decoding",
    "reward": "rewards",
    "old_policy": "old policy",
    "train": "training",
}
# Quantities that are shown elsewhere, or that tell a reader nothing.
FAMILIAR = re.compile(
    r"(rewards|tags|dense_reward|noise_level|grad_share|advantages|ratio|time)/.*|reward|reward_std|loss|clip_ratio|kl"
    r"|frac_reward_.*|grad_norm|learning_rate|nfe|images_per_second|rows_trained|epoch|step|total_flos"
    r"|num_input_tokens_seen|turning_points|velocity_change"
)
MOST_OTHERS = 12
SCORES_BY_TAG = 3
MOST_TAGS = 24
EARLY, LATE = "#8c95a1", "#2b7fd4"
ALARM = "#c8382e"
INK, LINE = "#1c1e21", "#d5d8dc"
# In SVG these two stand for "the page's text colour" and "the page's line colour".
SVG_INK, SVG_LINE = "#0a0b0c", "#0a0b0d"
PANEL_SIZE = (4.3, 2.7)


@dataclass
class Panel:
    """
    One plot.

    Args:
        title (`str`):
            Heading.
        note (`str`):
            What one sees, in a sentence for readers who meet the quantity for the first time.
        draw (`Callable[[Axes], None]`):
            Draws it.
        section (`str`):
            Part of the report that it belongs to: `"learning"`, `"tags"`, `"credit"`, `"health"` or `"others"`.
        height (`float`, *optional*):
            In inches, for a width of 4.3.
    """

    title: str
    note: str
    draw: Callable[[Axes], None]
    section: str
    height: float = PANEL_SIZE[1]


def collect_panels(history: RunHistory) -> list[Panel]:
    """Panels for what the run has logged, in reading order; quantities that are absent have no panel."""
    panels = []

    if history.series("reward")[0]:
        panels.append(
            Panel(
                "Training reward",
                "Mean reward of the pictures sampled for each update; the thick line is a running mean.",
                lambda axes: _draw_reward(axes, history),
                "learning",
            )
        )
    names = history.eval_names()
    panels += _score_panels(history, names or ["eval_reward"], "eval")
    names = history.names(r"rewards/(.+)/mean")
    if len(names) > 1:
        panels += _score_panels(history, names, "train")
    panels += _tag_panels(history)

    for prefix, title, note, reference, as_bars in (
        (
            "dense_reward",
            "Dense reward per denoising step",
            "How much one step changes the reward of the picture that it leads to, on average.",
            0.0,
            False,
        ),
        (
            "dense_reward/positive",
            "Share of steps that improve the picture",
            "Fraction of dense rewards above zero; near 0.5 the step's noise explores in both directions.",
            0.5,
            False,
        ),
        (
            "noise_level",
            "Noise level per denoising step (ψ)",
            "How much noise each step adds in training, in units of the sampler's formula.",
            None,
            True,
        ),
        (
            "grad_share",
            "Gradient share per denoising step",
            "Which steps the update comes from. Steps with little noise tend to drown the others.",
            None,
            True,
        ),
        (
            "advantages/std",
            "Spread of advantages per step",
            "Standard deviation of the advantages; a step at 0 teaches nothing.",
            None,
            False,
        ),
    ):
        indices, rows = history.steps_table(prefix)
        if prefix == "noise_level" and rows:
            panels.append(_noise_panel(history, title, note, indices, rows))
        elif rows:
            panels.append(
                Panel(
                    title,
                    note,
                    lambda axes, i=indices, r=rows, ref=reference, bars=as_bars, p=prefix: _draw_per_step(
                        axes, i, r, ref, bars, from_zero=p != "dense_reward"
                    ),
                    "credit",
                )
            )

    if any(history.series(f"ratio/{name}")[0] for name in ("mean", "min", "max")):
        panels.append(
            Panel(
                "Importance ratio",
                "New over old probability of the sampled steps: mean, and the range from smallest to largest.",
                lambda axes: _draw_ratio(axes, history),
                "health",
            )
        )
    for key, title, note in (
        (
            "clip_ratio",
            "Clipped share",
            "Fraction of steps whose ratio left the clip range, so that they no longer pull.",
        ),
        (
            "kl",
            "Distance from the base model (KL)",
            "How far the policy has moved away from the model it started from.",
        ),
        (
            "frac_reward_zero_std",
            "Groups without signal",
            "Fraction of prompt groups whose pictures all got the same reward; they are left out of the update.",
        ),
        ("turning_points", "Turning points", "Fraction of steps that are credited with all that follows them."),
        (
            "velocity_change",
            "Change of the velocity",
            "Mean square of the difference between the policy that is trained and the one that samples.",
        ),
        ("loss", "Loss", "Mean over each update."),
        ("grad_norm", "Gradient norm", "Before clipping."),
        ("learning_rate", "Learning rate", "As scheduled."),
        ("nfe", "Function evaluations", "Latents through the denoiser since the beginning, sampling and training."),
        ("images_per_second", "Pictures per second", "Sampled, decoded and scored; without the update."),
    ):
        steps, values = history.series(key)
        # The policy gradient's value is zero but for rounding: only other losses can be read.
        is_said = key != "loss" or not history.names("(ratio/mean)")
        if steps and is_said and (key != "learning_rate" or len(set(values)) > 1):
            panels.append(
                Panel(
                    title,
                    note,
                    lambda axes, s=steps, v=values, k=key: _draw_line(axes, s, v, is_share=k in SHARES),
                    "health",
                )
            )
    panels += _failure_panel(history)
    phases = [name for name in history.names(r"time/(.+)") if name != "elapsed"]
    phases.sort(key=lambda name: list(PHASES).index(name) if name in PHASES else len(PHASES))
    if any(history.series(f"time/{name}")[0] for name in phases):
        panels.append(
            Panel(
                "Where the time goes",
                "Seconds of each update, by phase.",
                lambda axes: _draw_phases(axes, history, phases),
                "health",
            )
        )
    others = [name for name in history.names(r"(.+)") if not FAMILIAR.fullmatch(name)]
    curves = [(name, *history.series(name)) for name in others]
    for name, steps, values in [curve for curve in curves if curve[1]][:MOST_OTHERS]:
        panels.append(
            Panel(
                name,
                "As logged.",
                lambda axes, s=steps, v=values: _draw_line(axes, s, v, is_share=False),
                "others",
            )
        )
    return panels


def render_svg(panel: Panel) -> str:
    """
    Panel as an `<svg>` element to be put into a page.

    Its text and lines take the page's colours (`currentColor` and `var(--line)`), so that it follows a dark theme.
    """
    figure = Figure(figsize=(PANEL_SIZE[0], panel.height), layout="constrained")
    # A fixed salt makes the ids, and so the page, the same from one run to the next; the title keeps them apart
    # between the panels of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        axes = figure.add_subplot()
        _style(axes, SVG_INK, SVG_LINE)
        panel.draw(axes)
        short_ticks(axes)
        # A long legend gets room of its own.
        figure.set_figheight(panel.height + 0.22 * max(0, _legend(axes, SVG_INK) - 2))
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(SVG_INK, "currentColor").replace(SVG_LINE, "var(--line)")
    # Without a fixed size the drawing takes its column's width.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    slug = re.sub(r"\W+", "-", panel.title.lower()).strip("-")
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{slug}-", svg)
    title = f'<title id="{slug}-title">{html.escape(panel.title)}</title>'
    head, body = svg.split(">", 1)
    return f'{head} role="img" aria-labelledby="{slug}-title">{title}{body}'.strip()


def save_png(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Several panels in one picture on white, for the model card and the README."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(
        figsize=(1.15 * PANEL_SIZE[0] * columns, (1.15 * PANEL_SIZE[1] + 0.4) * rows), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _style(axes, INK, LINE)
        panel.draw(axes)
        short_ticks(axes)
        legend_rows = _legend(axes, INK)
        axes.set_title(
            plain(panel.title, 48), loc="left", color=INK, fontsize=11, fontweight="bold", pad=9 + 16 * legend_rows
        )
    figure.patch.set_alpha(1)  # the page's panels are clear, as it may be dark
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all, so that nobody sees half of one during a run."""
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=130, facecolor="white")
    partial.replace(path)


def _style(axes: Axes, ink: str, line: str) -> None:
    axes.set_facecolor("none")
    axes.figure.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(line)
    axes.grid(axis="y", color=line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=10, length=0, pad=5)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    axes.xaxis.label.set_size(10)
    axes.yaxis.label.set_size(10)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def short_ticks(axes: Axes) -> None:
    """Numbers beside the axes that fit, without an offset or a power of ten that stands apart from them."""
    for axis in (axes.xaxis, axes.yaxis):
        formatter = axis.get_major_formatter()
        if not isinstance(formatter, ScalarFormatter):
            continue
        formatter.set_useOffset(False)
        formatter.set_scientific(False)
        low, high = axis.get_view_interval()
        largest = max(abs(low), abs(high))
        # Three digits have to tell one tick from the next.
        if largest >= 10_000 and abs(high - low) > 0.05 * largest:
            axis.set_major_formatter(lambda value, _: ("-" if value < 0 else "") + format_count(abs(value)))
        elif largest < 1e-3:
            axis.set_major_formatter(lambda value, _: re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}") if value else "0")


def plain(text: str, length: int = 40) -> str:
    """Text that matplotlib does not take for a formula, and that fits."""
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")


def _legend(axes: Axes, ink: str) -> int:
    """Legend above the axes, where it hides no data; returns its number of rows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    labels = [plain(label) for label in labels]
    # A panel is as wide as some 46 letters, of which a line's sample and the gap after its name take six.
    columns = max(1, min(4, 46 // (max(map(len, labels)) + 6)))
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=min(columns, len(labels)),
        frameon=False,
        labelcolor=ink,
        fontsize=10,
        handlelength=1.4,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    return math.ceil(len(labels) / columns)


def _reference_line(axes: Axes, value: float) -> None:
    axes.axhline(value, color=axes.xaxis.label.get_color(), linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7, zorder=1)


def _marker(steps: Sequence) -> str | None:
    return "o" if len(steps) <= 30 else None


def _draw_line(axes: Axes, steps: list[float], values: list[float], is_share: bool) -> None:
    axes.plot(steps, values, color=COLORS[0], linewidth=1.6, marker=_marker(steps), markersize=3.5)
    if is_share:
        axes.set_ylim(0, max(0.1, 1.1 * max(values)))
    axes.set_xlabel("update")


def _draw_reward(axes: Axes, history: RunHistory) -> None:
    steps, values = history.series("reward")
    window = max(1, len(values) // 10)
    if window > 1:
        axes.plot(steps, values, color=COLORS[0], linewidth=1, alpha=0.4)
        means = [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]
        axes.plot(steps, means, color=COLORS[0], linewidth=2.2)
    else:
        axes.plot(steps, values, color=COLORS[0], linewidth=2, marker="o", markersize=3.5)
    axes.set_xlabel("update")


def _score_panels(history: RunHistory, names: list[str], kind: str) -> list[Panel]:
    """One panel for scores that share a scale; else one per score, since an aesthetic score of 5.6 flattens all below 1."""
    prefix, title = (
        ("eval_rewards", "Held-out score") if kind == "eval" else ("rewards", "Training reward by function")
    )
    note = (
        "Pictures of prompts that training never sees, always from the same noise"
        if kind == "eval"
        else "Mean of each reward function over the pictures sampled for an update"
    )
    curves = {}
    for name in names:
        key = name if name == "eval_reward" else f"{prefix}/{name}/mean"
        steps, means = history.series(key, kind)
        if not steps:
            continue
        half_intervals = None
        if kind == "eval":
            spread = dict(zip(*history.series(f"{prefix}/{name}/std", kind), strict=True))
            counts = dict(zip(*history.series("eval_num_samples", kind), strict=True))
            if all(spread.get(step) is not None and counts.get(step) for step in steps):
                half_intervals = [1.96 * spread[step] / math.sqrt(counts[step]) for step in steps]
        curves["held-out reward" if name == "eval_reward" else name] = (steps, means, half_intervals)
    if not curves:
        return []
    with_band = any(half_intervals for _, _, half_intervals in curves.values())
    note += "; the band is the 95\u00a0% interval of the mean." if with_band else "."
    # Scores share axes only while each one's course can still be seen on them.
    extents = [
        (min(np.subtract(means, half or 0)), max(np.add(means, half or 0))) for _, means, half in curves.values()
    ]
    overall = max(high for _, high in extents) - min(low for low, _ in extents)
    shared = overall <= 6 * max(high - low for low, high in extents) and max(abs(x) for e in extents for x in e) <= 1.2
    groups = [list(curves)] if shared and len(curves) <= len(COLORS) else [[name] for name in curves]
    watched = [name for name in history.watched_names() if name in curves] if kind == "eval" else []

    def draw(axes: Axes, group: list[str]) -> None:
        for index, name in enumerate(group):
            steps, means, half_intervals = curves[name]
            color = COLORS[index % len(COLORS)]
            label = name if len(group) > 1 or len(groups) == 1 else None
            axes.plot(
                steps,
                means,
                color=color,
                linewidth=2,
                linestyle=_score_line(name, watched),
                marker=_marker(steps),
                markersize=4,
                label=label,
            )
            if half_intervals:
                means, half = np.array(means), np.array(half_intervals)
                axes.fill_between(steps, means - half, means + half, color=color, alpha=0.16, linewidth=0)
        if kind == "eval":
            _explain_lines(axes, group, watched)
            _draw_alarms(axes, history)
        axes.set_xlabel("update")

    together = []
    if len(groups) > 1 and 0 < len(watched) < len(curves):
        moved = _standardised(history, curves)
        if len(moved) <= len(COLORS) and any(name in moved for name in watched) and not moved.keys() <= set(watched):
            together = [
                Panel(
                    "Trained and watched rewards",
                    "Change since the first evaluation, in standard deviations of the score over the held-out prompts. A "
                    "solid line that rises over dashed ones that fall is reward hacking.",
                    lambda axes: _draw_together(axes, history, moved, watched),
                    "learning",
                )
            ]
    return together + [
        Panel(
            (f"{title}s" if kind == "eval" and len(group) > 1 else title)
            + (f": {group[0]}" if len(groups) > 1 else ""),
            note + (" Dashed: watched, not trained on." if set(watched) & set(group) else ""),
            lambda axes, g=group: draw(axes, g),
            "learning",
        )
        for group in groups
    ]


def _score_line(name: str, watched: list[str]) -> str | tuple:
    return (0, (4, 2)) if name in watched else "solid"


def _explain_lines(axes: Axes, names: Collection[str], watched: list[str]) -> None:
    """Legend entry that tells what dashes mean, where some of the lines have them."""
    if 0 < len(set(names) & set(watched)) < len(names):
        axes.plot(
            [], [], color=EARLY, linewidth=2, linestyle=_score_line(watched[0], watched), label="dashed: watched"
        )


def _standardised(history: RunHistory, curves: dict) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and changes since the first evaluation of each score, in standard deviations, where these are known."""
    moved = {}
    for name, (steps, means, _) in curves.items():
        spread = dict(zip(*history.series(f"eval_rewards/{name}/std", "eval"), strict=True)).get(steps[0])
        if spread and len(steps) > 1:
            moved[name] = (steps, [(mean - means[0]) / spread for mean in means])
    return moved


def _draw_together(axes: Axes, history: RunHistory, moved: dict, watched: list[str]) -> None:
    _reference_line(axes, 0.0)
    for (name, (steps, changes)), color in zip(moved.items(), COLORS, strict=False):
        axes.plot(
            steps,
            changes,
            color=color,
            linewidth=2,
            linestyle=_score_line(name, watched),
            marker=_marker(steps),
            markersize=4,
            label=name,
        )
    _explain_lines(axes, moved, watched)
    _draw_alarms(axes, history)
    axes.set_xlabel("update")


def _draw_alarms(axes: Axes, history: RunHistory) -> None:
    """Where reward hacking was signalled, and the update that the run was rolled back to."""
    for number, step in enumerate(history.alarms()):
        label = "hacking signalled" if number == 0 else None
        axes.axvline(step, color=ALARM, linewidth=1.4, linestyle=(0, (1, 1.5)), zorder=1.5, label=label)
    if history.rolled_back_to is not None:
        axes.axvline(history.rolled_back_to, color=EARLY, linewidth=1.4, zorder=1.5, label="rolled back to")


def _draw_per_step(
    axes: Axes,
    indices: list[int],
    rows: list[list[float]],
    reference: float | None,
    as_bars: bool,
    from_zero: bool,
) -> None:
    table = np.array(rows)
    if len(table) >= 8:
        quarter = len(table) // 4
        periods = [("first quarter", table[:quarter], EARLY), ("last quarter", table[-quarter:], LATE)]
    elif len(table) >= 2:
        periods = [("first update", table[:1], EARLY), ("last update", table[-1:], LATE)]
    else:
        periods = [("", table, LATE)]
    positions = np.array(indices, dtype=float)
    if reference is not None:
        _reference_line(axes, reference)
    for number, (label, period, color) in enumerate(periods):
        counts = np.isfinite(period).sum(axis=0)
        means = np.divide(np.nansum(period, axis=0), counts, out=np.full(len(indices), np.nan), where=counts > 0)
        if as_bars:
            width = 0.8 / len(periods)
            offset = (number - (len(periods) - 1) / 2) * width
            axes.bar(positions + offset, means, width * 0.92, color=color, label=label or None)
        else:
            axes.plot(positions, means, color=color, linewidth=2, marker="o", markersize=4.5, label=label or None)
    if len(indices) <= 12:
        axes.set_xticks(indices)
    if from_zero:
        axes.set_ylim(0, 1 if reference is not None else 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("denoising step (0 = most noise)")


def _noise_panel(history: RunHistory, title: str, note: str, indices: list[int], rows: list[list[float]]) -> Panel:
    """Noise levels of the newest update, beside those that the calibration of the table began with."""
    newest = rows[-1]
    first = history.calibration.get("before", {}).get("noise_level")
    sides = [(newest, LATE, None)]
    if isinstance(first, list) and len(first) > max(indices) and all(map(finite, first)):
        before = [first[index] for index in indices]
        sides = [(before, EARLY, "before calibration"), (newest, LATE, "in training")]

    def draw(axes: Axes) -> None:
        width = 0.8 / len(sides)
        for number, (levels, color, label) in enumerate(sides):
            offset = (number - (len(sides) - 1) / 2) * width
            axes.bar(np.array(indices) + offset, levels, width * 0.92, color=color, label=label)
        axes.set_xlim(min(indices) - 0.7, max(indices) + 0.7)
        if len(indices) <= 12:
            axes.set_xticks(indices)
        axes.set_xlabel("denoising step (0 = most noise)")

    return Panel(title, note, draw, "credit")


def _tag_panels(history: RunHistory) -> list[Panel]:
    """What each kind of held-out prompt had gained: one panel for each of the first scores."""
    panels = []
    for name in history.eval_names()[:SCORES_BY_TAG]:
        tags = [(tag, history.series(f"eval_tags/{tag}/{name}", "eval")[1]) for tag in history.tags(name)]
        tags = [(tag, values[0], values[-1]) for tag, values in tags if values]
        if len(tags) < 2:
            continue
        shown = tags[:MOST_TAGS]
        note = "Mean over the held-out prompts of each tag: a circle at the first evaluation, a dot at the last."
        note += f" The first {MOST_TAGS} of {len(tags)} tags." if len(tags) > MOST_TAGS else ""
        height = max(PANEL_SIZE[1], 0.7 + 0.24 * len(shown))
        panels.append(Panel(f"By tag: {name}", note, lambda axes, t=shown: _draw_tags(axes, t), "tags", height))
    return panels


def _draw_tags(axes: Axes, tags: list[tuple[str, float, float]]) -> None:
    for place, (_, first, last) in enumerate(tags):
        color = LATE if last >= first else COLORS[1]
        axes.plot([first, last], [place, place], color=color, linewidth=1.6)
        axes.plot(first, place, "o", color=color, markersize=6, fillstyle="none")
        axes.plot(last, place, "o", color=color, markersize=6)
    axes.set_ylim(len(tags) - 0.5, -0.5)
    axes.set_yticks(range(len(tags)), [plain(tag, 20) for tag, _, _ in tags])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=axes.spines["left"].get_edgecolor(), linewidth=0.7)


def _failure_panel(history: RunHistory) -> list[Panel]:
    """Share of pictures without a score because a reward function failed, where one ever did."""
    curves = []
    for prefix, kind, where in (("", "train", ""), ("eval_", "eval", ", held-out")):
        for name in history.names(rf"{prefix}rewards/(.+)/failed", kind):
            steps, values = history.series(f"{prefix}rewards/{name}/failed", kind)
            if any(values):
                curves.append((name + where, steps, values))
    if not curves:
        return []
    shown = sorted(curves, key=lambda curve: -max(curve[2]))[: len(COLORS)]

    def draw(axes: Axes) -> None:
        for (name, steps, values), color in zip(shown, COLORS, strict=False):
            axes.plot(steps, values, color=color, linewidth=1.6, marker=_marker(steps), markersize=3.5, label=name)
        axes.set_ylim(0, max(0.1, 1.1 * max(max(values) for _, _, values in shown)))
        axes.set_xlabel("update")

    note = "Fraction of pictures that a reward function could not score; they are left out of the update."
    return [Panel("Failed rewards", note, draw, "health")]


def _draw_ratio(axes: Axes, history: RunHistory) -> None:
    low = dict(zip(*history.series("ratio/min"), strict=True))
    high = dict(zip(*history.series("ratio/max"), strict=True))
    both = sorted(low.keys() & high.keys())
    axes.fill_between(
        both,
        [low[s] for s in both],
        [high[s] for s in both],
        color=COLORS[0],
        alpha=0.18,
        linewidth=0,
        label="min to max",
    )
    steps, means = history.series("ratio/mean")
    if steps:
        axes.plot(steps, means, color=COLORS[0], linewidth=1.8, marker=_marker(steps), markersize=3.5, label="mean")
    _reference_line(axes, 1)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("update")


def _draw_phases(axes: Axes, history: RunHistory, phases: list[str]) -> None:
    columns = {phase: dict(zip(*history.series(f"time/{phase}"), strict=True)) for phase in phases}
    steps = sorted({step for column in columns.values() for step in column})
    heights = [[column.get(step, 0.0) for step in steps] for column in columns.values()]
    if len(steps) <= 24:
        width = 0.8 * min((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1.0)
        base = np.zeros(len(steps))
        for index, (phase, height) in enumerate(zip(columns, heights, strict=True)):
            label = PHASES.get(phase, phase)
            axes.bar(steps, height, width, bottom=base, color=COLORS[index % len(COLORS)], label=label)
            base += np.array(height)
    else:
        colors = [COLORS[index % len(COLORS)] for index in range(len(phases))]
        axes.stackplot(
            steps, heights, labels=[PHASES.get(phase, phase) for phase in columns], colors=colors, linewidth=0
        )
    axes.set_xlabel("update")
    axes.set_ylabel("seconds")
