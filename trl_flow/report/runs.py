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

"""The comparison of several runs: one self-contained page, and its two pictures as files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.markup import escape
from rich.table import Table

from .comparison import FEW_PROMPTS
from .grid import image_grid
from .history import RunHistory, Samples, finite, load_history, paired_difference
from .page import PICTURES_IN_FILE, PICTURES_IN_PAGE, _inline, _open, _settings
from .panels import COLORS, INK, LINE, PANEL_SIZE, Panel, _marker, _style, plain, render_svg, save_figure, short_ticks
from .template import write_page
from .text import format_change, format_count, format_duration, format_number


SCORES_IN_FILE = 4
# Beyond as many runs as there are colours, the line's dashes tell them apart: lengths of line and gap.
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
AXES = {"step": "by update", "elapsed": "by training time", "nfe": "by function evaluations"}
# Where these differ, so does the noise that held-out pictures start from.
NOISE_SETTINGS = ("seed", "model_name_or_path", "height", "width", "num_frames")


@dataclass
class Run:
    """
    One of the runs that are compared.

    Args:
        name (`str`): Short name, which no other of them has.
        path (`Path`): Its directory.
        history (`RunHistory`): All that it logged.
    """

    name: str
    path: Path
    history: RunHistory
    prompts: dict[int, list[str]] = field(init=False)
    scores: dict[int, dict[str, list[float | None]]] = field(init=False)

    def __post_init__(self):
        self.prompts, self.scores = {}, {}
        for path in sorted((self.path / "samples").glob("step_[0-9]*.json")):
            try:
                record = json.loads(path.read_text())
            except json.JSONDecodeError:
                continue  # being written at this moment
            step = int(path.stem.removeprefix("step_"))
            self.prompts[step], self.scores[step] = record.get("prompts") or [], record.get("scores") or {}

    @cached_property
    def result(self) -> RunHistory:
        """What the run left behind, where that isn't its last update."""
        return self.history.until(self.history.rolled_back_to)

    @cached_property
    def method(self) -> str:
        """The method's name; empty where the run did not write it."""
        try:
            return json.loads((self.path / "run.json").read_text()).get("method") or ""
        except (OSError, json.JSONDecodeError):
            return ""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Updates and means of a held-out score, or of the reward that is trained on for the name `"reward"`."""
        return _curve(self.history, name)

    def spent(self, steps: Sequence[float], axis: str) -> list[float] | None:
        """Training time in seconds or function evaluations after each of `steps`; `None` where none were logged."""
        if axis == "step":
            return list(steps)
        key = {"elapsed": "time/elapsed", "nfe": "nfe"}[axis]
        logged = dict(zip(*self.history.series(key), strict=True))
        if finite(self.history.summary.get(key)):
            logged[float(self.history.summary["step"])] = float(self.history.summary[key])
        if not logged:
            return None
        # Nothing is spent before the first update; between two entries of a sparse log, it grows evenly.
        logged.setdefault(0.0, 0.0)
        known = sorted(logged)
        return np.interp(steps, known, [logged[step] for step in known]).tolist()

    def held_out(self, name: str, step: float) -> tuple[list[str], list[float | None]] | None:
        """Prompts and their scores at an evaluation; `None` where the files are not of what was logged."""
        scores = self.scores.get(int(step), {}).get(name, [])
        prompts = self.prompts.get(int(step), [])
        known = [score for score in scores if finite(score)]
        logged = dict(zip(*self.curve(name), strict=True)).get(step)
        if not known or logged is None or len(prompts) != len(scores):
            return None
        # Another run may have written into the same directory before.
        return (prompts, scores) if math.isclose(statistics.fmean(known), logged, rel_tol=1e-5, abs_tol=1e-6) else None


def load_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """
    Read run directories.

    Args:
        run_dirs (`Sequence[str | Path]`): Output directories of trainers, or checkpoints.

    Returns:
        `list[Run]`: in the same order, each named by as much of the end of its path as tells it from the others.

    Raises:
        FileNotFoundError: one is not a directory.
        ValueError: one is named twice, or has no log.
    """
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    for position, path in enumerate(paths):
        if path in paths[:position]:
            raise ValueError(f"{run_dirs[position]} is named twice: each run is compared with the others once.")
    # A checkpoint's number says little without its run.
    depth = 2 if any(path.name.startswith("checkpoint-") for path in paths) else 1
    names = ["/".join(path.parts[-depth:]) for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return [Run(name, path, load_history(run_dir)) for name, path, run_dir in zip(names, paths, run_dirs, strict=True)]


def compare_runs(runs: Sequence[Run], folder: str | Path, title: str | None = None) -> Path:
    """
    Write `comparison.html`, `comparison.png` (curves) and `comparison_pictures.png` into a folder.

    The page is one file without external resources.

    Args:
        runs (`Sequence[Run]`): At least two; differences are from the first.
        folder (`str` or `Path`): Where to; made if it isn't there.
        title (`str`, *optional*): Heading. Defaults to the names of two runs, or the number of more.

    Returns:
        `Path`: the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = score_names(runs)
    panels = {axis: [panel for name in names if (panel := _panel(runs, name, axis))] for axis in AXES}
    panels = {axis: shown for axis, shown in panels.items() if shown}
    if panels:
        _save_curves(runs, panels, folder / "comparison.png")
    figures = _figures(runs)
    _save_pictures(runs, folder / "comparison_pictures.png")
    return write_page(
        folder / "comparison.html",
        "runs.html",
        title=title or (" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"),
        runs=[_row(run) for run in runs],
        keys=_keys(runs),
        charts=[
            # The title names the elements of a drawing, too, which must not be the same for two of them.
            (
                axis,
                AXES[axis],
                [(panel, render_svg(replace(panel, title=f"{panel.title} {axis}"))) for panel in shown],
            )
            for axis, shown in panels.items()
        ],
        tables=final_scores(runs),
        base=runs[0].name,
        notes=_notes(runs),
        figures=figures,
        picture_note=_picture_note(runs, figures),
        settings=different_settings(runs),
    )


def score_names(runs: Sequence[Run]) -> list[str]:
    """Held-out scores in order of first appearance, those that a run trains on first; else the reward itself."""
    names = list(dict.fromkeys(name for run in runs for name in run.history.eval_names()))
    trained = {name for run in runs for name in set(run.history.eval_names()) - set(run.history.watched_names())}
    return sorted(names, key=lambda name: name not in trained) or ["reward"]


def final_scores(runs: Sequence[Run]) -> list[dict]:
    """
    For each score, the first and last value of each run, the change between them, and the last value's difference from
    that of the first run.

    Returns:
        `list[dict]`: `name`, and `rows` with the values as text; `change` and `difference` are of text, half of the
        paired 95 % interval as text, and a direction where that interval does not contain 0.
    """
    tables = []
    for name in score_names(runs):
        rows = []
        base = _last(runs[0], name)
        for run in runs:
            steps, values = _curve(run.result, name)
            row = {"name": run.name, "first": "", "last": "", "step": "", "change": None, "difference": None}
            if steps:
                row |= {"last": format_number(values[-1]), "step": f"{steps[-1]:,.0f}"}
                paired = _paired(run.held_out(name, steps[0]), run.held_out(name, steps[-1]))
            if len(steps) > 1:
                row["first"] = format_number(values[0])
                row["change"] = _estimate(values[-1] - values[0], paired)
            last = _last(run, name)
            if run is not runs[0] and base and last and noise_differs(runs[0], run) is None:
                paired = _paired(base, last)
                if paired is not None:
                    row["difference"] = _estimate(paired[0], paired)
            rows.append(row)
        tables.append({"name": name if name != "reward" else "training reward", "rows": rows})
    return tables


def noise_differs(first: Run, second: Run) -> str | None:
    """Why the held-out pictures of two runs did not start from the same noise; `None` if they did."""
    if not first.history.config or not second.history.config:
        return "settings unknown"
    values = [[run.history.config.get(name) for name in NOISE_SETTINGS] for run in (first, second)]
    names = [name for name, a, b in zip(NOISE_SETTINGS, *values, strict=True) if a != b]
    return f"other {', '.join(names)}" if names else None


def different_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Name and values of each setting that is not the same in all runs; empty where a run doesn't have it."""
    settings = [{"method": run.method} if run.method else {} for run in runs]
    for values, run in zip(settings, runs, strict=True):
        values |= dict(_settings(run.history.config))
    names = sorted({name for values in settings for name in values}, key=lambda name: (name != "method", name))
    rows = [(name, [values.get(name, "") for values in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _curve(history: RunHistory, name: str) -> tuple[list[float], list[float]]:
    return history.series("reward") if name == "reward" else history.series(f"eval_rewards/{name}/mean", "eval")


def _last(run: Run, name: str) -> tuple[list[str], list[float | None]] | None:
    steps, _ = _curve(run.result, name)
    return run.held_out(name, steps[-1]) if steps else None


def _paired(first: tuple | None, second: tuple | None) -> tuple[float, float, int] | None:
    """Mean difference over the prompts that have the same number in both, half of its interval, number of pairs."""
    if first is None or second is None:
        return None
    # With fewer prompts of the same set, a run has the first of them.
    same = [
        (a, b)
        for prompt_a, a, prompt_b, b in zip(*first, *second, strict=False)
        if prompt_a == prompt_b and finite(a) and finite(b)
    ]
    return paired_difference([a for a, _ in same], [b for _, b in same])


def _estimate(mean: float, paired: tuple[float, float, int] | None) -> dict[str, str]:
    half = paired[1] if paired is not None else math.inf
    return {
        "text": format_change(mean),
        "half": f"± {format_number(half)}" if paired is not None else "",
        "direction": ("up" if mean > 0 else "down") if abs(mean) > half else "",
    }


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [
        "± is half of the paired 95 % interval: over the same prompts and noise at a run's first and last evaluation, "
        f"and in both runs for the difference from {runs[0].name}. An arrow marks a change or difference whose "
        "interval does not contain 0."
    ]
    names = score_names(runs)
    without = {}
    for run in runs[1:]:
        reason = noise_differs(runs[0], run)
        if reason is not None:
            without.setdefault(reason, []).append(run.name)
            continue
        places = [(_last(runs[0], name), _last(run, name)) for name in names]
        pairs = [pair[2] for pair in (_paired(*place) for place in places) if pair is not None]
        most = max((len(scores) for place in places for _, scores in filter(None, place)), default=0)
        if not pairs:
            notes.append(f"{run.name} has no difference: no two scores of prompts that both runs have.")
        elif min(pairs) < most:
            notes.append(f"Differences of {run.name} are over {min(pairs)} prompts that have a score in both runs.")
    for reason, others in without.items():
        notes.append(f"No difference where pictures start from other noise ({reason}): {', '.join(others)}.")
    if len({steps[-1] for run in runs for name in names if (steps := _curve(run.result, name)[0])}) > 1:
        notes.append("The runs' last values are not of the same number of updates.")
    counts = [len(prompts) for run in runs for prompts in run.prompts.values()]
    if counts and min(counts) < FEW_PROMPTS:
        notes.append(f"Intervals of fewer than {FEW_PROMPTS} prompts are narrower than they should be.")
    return notes


def _row(run: Run) -> dict[str, str]:
    entries = run.history.train + run.history.eval
    elapsed, nfe = (run.spent([max(entry["step"] for entry in entries)], axis) for axis in ("elapsed", "nfe"))
    back = run.history.rolled_back_to
    runtime = run.history.summary.get("train_runtime")
    return {
        "name": run.name,
        "method": run.method,
        "updates": f"{max(entry['step'] for entry in entries):,}"
        + (f", rolled back to {back:,}" if back is not None else ""),
        "elapsed": format_duration(elapsed[0]) if elapsed else "",
        "nfe": format_count(nfe[0]) if nfe else "",
        "runtime": format_duration(runtime) if finite(runtime) else "",
    }


def _keys(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What tells each run's line from the others."""
    keys = []
    for number, run in enumerate(runs):
        color, dashes = _line(number)
        keys.append({"name": run.name, "color": color, "dashes": " ".join(f"{2 * length:g}" for length in dashes)})
    return keys


def _line(number: int) -> tuple[str, tuple[float, ...]]:
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def _panel(runs: Sequence[Run], name: str, axis: str) -> Panel | None:
    curves = []
    for number, run in enumerate(runs):
        steps, values = run.curve(name)
        positions = run.spent(steps, axis) if steps else None
        if positions is not None:
            curves.append((number, run, steps, positions, values))
    if not curves:
        return None
    trained = [run.name for _, run, *_ in curves if name not in run.history.watched_names()]
    note = "Mean over held-out prompts, always from the same noise."
    if name == "reward":
        note = "Mean reward of the pictures sampled for each update."
    elif not trained:
        note += " Watched, not trained on."
    elif len(trained) < len(curves):
        note += f" Trained on by {', '.join(trained)} only."
    if any(run.history.rolled_back_to is not None for _, run, *_ in curves):
        note += " A circle is the update that a run was rolled back to."
    longest = max(max(positions) for *_, positions, _ in curves)
    unit, size = next(
        (unit, size)
        for unit, size, limit in (("s", 1, 600), ("min", 60, 36_000), ("h", 3600, math.inf))
        if longest < limit
    )

    def draw(axes: Axes) -> None:
        for number, run, steps, positions, values in curves:
            color, dashes = _line(number)
            if axis == "elapsed":
                positions = [position / size for position in positions]
            axes.plot(
                positions,
                values,
                color=color,
                linewidth=1.8,
                linestyle=(0, dashes) if dashes else "solid",
                marker=_marker(steps),
                markersize=4,
            )
            if run.history.rolled_back_to in steps:
                place = steps.index(run.history.rolled_back_to)
                axes.plot(positions[place], values[place], "o", color=color, markersize=10, fillstyle="none")
        labels = {"step": "update", "elapsed": f"training time ({unit})", "nfe": "function evaluations"}
        axes.set_xlabel(labels[axis])

    return Panel("Training reward" if name == "reward" else f"Held-out score: {name}", note, draw, axis)


def _save_curves(runs: Sequence[Run], panels: dict[str, list[Panel]], path: Path) -> None:
    """A row for each score, a column for what it is plotted against, one legend above all."""
    rows = min(SCORES_IN_FILE, max(map(len, panels.values())))
    # The end of a path tells runs apart.
    labels = [plain(run.name if len(run.name) <= 60 else f"…{run.name[-59:]}", 60) for run in runs]
    columns = max(1, min(len(runs), int(46 * len(panels) // (max(map(len, labels)) + 6))))
    legend_rows = math.ceil(len(runs) / columns)
    figure = Figure(
        figsize=(1.15 * PANEL_SIZE[0] * len(panels), (1.15 * PANEL_SIZE[1] + 0.4) * rows + 0.25 * legend_rows + 0.1),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    for column, shown in enumerate(panels.values()):
        for row, panel in enumerate(shown[:rows]):
            axes = figure.add_subplot(rows, len(panels), row * len(panels) + column + 1)
            _style(axes, INK, LINE)
            panel.draw(axes)
            short_ticks(axes)
            axes.set_title(plain(panel.title, 48), loc="left", color=INK, fontsize=11, fontweight="bold", pad=9)
    handles = []
    for number in range(len(runs)):
        color, dashes = _line(number)
        handles.append(Line2D([], [], color=color, linewidth=2, linestyle=(0, dashes) if dashes else "solid"))
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
    )
    save_figure(figure, path)


def _shown(runs: Sequence[Run]) -> tuple[list[tuple[str, Run, Samples]], list[list[int]]]:
    """
    The sets of pictures to be shown side by side, and the prompts that all of them have.

    Returns:
        `tuple[list, list]`: label, run and samples of each set, in order; and for each prompt its number within each.
    """
    sets = []
    for run in runs:
        samples = run.result.samples
        if not samples:
            continue
        if not sets and len(samples) > 1:
            sets.append((f"{run.name}, before", run, samples[0]))
        sets.append((run.name, run, samples[-1]))
    if not sets:
        return [], []
    # A prompt may stand in a set twice; its pictures then belong together in order.
    places = [_places(samples.prompts) for _, _, samples in sets]
    common = [key for key in places[0] if all(key in place for place in places)]
    return sets, [[place[key] for place in places] for key in common]


def _places(prompts: Sequence[str]) -> dict[tuple[str, int], int]:
    places, counts = {}, {}
    for number, prompt in enumerate(prompts):
        counts[prompt] = counts.get(prompt, 0) + 1
        places[prompt, counts[prompt]] = number
    return places


def _figures(runs: Sequence[Run]) -> list[dict]:
    sets, rows = _shown(runs)
    figures = []
    for numbers in rows[:PICTURES_IN_PAGE]:
        pictures = []
        for (label, run, samples), number in zip(sets, numbers, strict=True):
            uri, is_small = _inline(samples.paths[number])
            pictures.append(
                {
                    "label": label,
                    "color": _line(runs.index(run))[0] if label == run.name else "",
                    "uri": uri,
                    "is_small": is_small,
                    "scores": _picture_scores(samples, number),
                }
            )
        figures.append({"prompt": sets[0][2].prompts[numbers[0]], "pictures": pictures})
    return figures


def _picture_scores(samples: Samples, number: int) -> list[tuple[str, str]]:
    return [(name, format_number(values[number])) for name, values in samples.scores.items() if finite(values[number])]


def _picture_note(runs: Sequence[Run], figures: Sequence[dict]) -> str:
    shown = [run for run in runs if run.result.samples]
    if not shown:
        return ""
    without = [run.name for run in runs if not run.result.samples]
    if not figures:
        return "The runs kept no pictures of the same prompts."
    note = f"The first {len(figures)} held-out prompts, after each run's last evaluation."
    other = [run.name for run in shown[1:] if noise_differs(shown[0], run) is not None]
    if other:
        note += f" From the same noise, but for {', '.join(other)}."
    else:
        note += " From the same noise."
    return note + (f" No pictures of {', '.join(without)}." if without else "")


def _save_pictures(runs: Sequence[Run], path: Path) -> None:
    sets, rows = _shown(runs)
    rows = rows[:PICTURES_IN_FILE]
    if not rows:
        return
    images, captions = [], []
    for position, (_, _, samples) in enumerate(sets):
        for numbers in rows:
            number = numbers[position]
            images.append(_open(samples.paths[number]))
            lines = [f"{name} {score}" for name, score in _picture_scores(samples, number)]
            captions.append("\n".join([samples.prompts[number]] * (position == len(sets) - 1) + lines))
    grid = image_grid(images, captions, columns=len(rows), row_labels=[label for label, _, _ in sets])
    partial = path.with_name(f".{path.stem}.partial.png")
    grid.save(partial)
    partial.replace(path)


def score_table(runs: Sequence[Run]) -> Table:
    """Last scores, changes and differences for a terminal."""
    table = Table(title="Held-out scores, with paired 95 % intervals", title_justify="left")
    for column in ("score", "run"):
        table.add_column(column, overflow="fold")
    for column in ("last", "change", f"minus {escape(runs[0].name)}"):
        table.add_column(column, justify="right")
    for scores in final_scores(runs):
        table.add_section()
        for position, row in enumerate(scores["rows"]):
            estimates = [
                f"{e['text']} {e['half']}".strip() if (e := row[key]) else "" for key in ("change", "difference")
            ]
            table.add_row(
                escape(scores["name"]) if position == 0 else "", escape(row["name"]), row["last"], *estimates
            )
    return table
