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

"""The report of a run: one self-contained page, and its two pictures as files."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

from .grid import image_grid
from .history import RunHistory, Samples, finite, load_history, paired_change, public_settings
from .panels import collect_panels, render_svg, save_png
from .template import write_page
from .text import format_change, format_count, format_duration, format_number


PICTURES_IN_PAGE = 12
PICTURES_IN_FILE = 8
INLINE_PIXELS = 384
CURVES_IN_FILE = 6
SECTIONS = (
    ("learning", "Learning"),
    ("credit", "Credit along the trajectory"),
    ("health", "Health of the optimization"),
)


def write_report(run_dir: str | Path, log_history: Sequence[Mapping] | None = None, title: str | None = None) -> Path:
    """
    Write `report.html`, `curves.png` and `before_after.png` into a run directory.

    The page is one file without external resources. It can be written at any time during a run; quantities that were
    not logged are left out.

    Args:
        run_dir (`str` or `Path`):
            Output directory of a trainer: `trainer_state.json` (also in checkpoints), and, where they exist,
            `config.yaml` and `samples/step_<step>/<index>.png` with `samples/step_<step>.json`.
        log_history (`Sequence[Mapping]`, *optional*):
            Log of a run that is still going (`trainer.state.log_history`).
        title (`str`, *optional*):
            Heading. Defaults to the directory's name.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
        ValueError: there is no log yet.
    """
    run_dir = Path(run_dir)
    history = load_history(run_dir, log_history)
    # What the run left behind, where that isn't its last update.
    result = history.until(history.rolled_back_to)
    panels = collect_panels(history)
    shown = [panel for panel in panels if panel.section in ("learning", "credit")]
    shown.sort(key=lambda panel: panel.title.startswith("Training reward by function"))
    shown += [panel for panel in panels if panel.title == "Distance from the base model (KL)"]
    if shown or panels:
        save_png((shown or panels)[:CURVES_IN_FILE], run_dir / "curves.png")
    _save_before_after(result.samples, run_dir / "before_after.png")

    drawn = [(panel, render_svg(panel)) for panel in panels]
    return write_page(
        run_dir / "report.html",
        "report.html",
        title=title or run_dir.resolve().name,
        progress=_progress(history),
        tiles=_tiles(history, result),
        pairs=_pairs(result.samples),
        picture_note=_picture_note(result.samples),
        sections=[
            (heading, [(panel, svg) for panel, svg in drawn if panel.section == name])
            for name, heading in SECTIONS
            if any(panel.section == name for panel in panels)
        ],
        scores=_score_table(result),
        numbers=_numbers(history),
        settings=_settings(history.config),
    )


def _progress(history: RunHistory) -> str:
    step = max([entry["step"] for entry in history.train + history.eval])
    total = history.max_steps or history.config.get("max_steps") or 0
    text = f"{step:,} of {total:,} updates" if isinstance(total, int) and total > step else f"{step:,} updates"
    elapsed = history.last("time/elapsed")
    text = f"{text} in {format_duration(elapsed)}" if elapsed is not None else text
    if history.rolled_back_to is not None:
        text += f", rolled back to update {history.rolled_back_to:,} for reward hacking"
    return text


def _score_table(history: RunHistory) -> list[dict[str, str]]:
    rows = []
    keys = [f"eval_rewards/{name}" for name in history.eval_names()]
    for key in keys or ["eval_reward"]:
        values = history.series(f"{key}/mean" if keys else key, "eval")
        if not values[0]:
            continue
        row = {"name": key.removeprefix("eval_rewards/") if keys else "held-out reward"}
        for label, position in (("before", 0), ("after", -1)):
            step, mean = values[0][position], values[1][position]
            entry = next(entry for entry in history.eval if entry["step"] == step)
            std, count = entry.get(f"{key}/std"), entry.get("eval_num_samples")
            half = (
                f" ± {format_number(1.96 * std / math.sqrt(count))}" if finite(std) and finite(count) and count else ""
            )
            row[label], row[f"{label}_interval"], row[f"{label}_step"] = format_number(mean), half, f"{step:,.0f}"
        change = values[1][-1] - values[1][0]
        row["change"] = format_change(change)
        # Only where the scores on disk are those of the two evaluations that the row compares.
        paired = paired_change(history.samples, row["name"])
        if paired is not None and [values[0][0], values[0][-1]] == [history.samples[0].step, history.samples[-1].step]:
            row["change_interval"] = f" ± {format_number(paired[1])}"
        row["direction"] = "up" if change > 0 else "down" if change < 0 else "same"
        row["moved"] = len(values[0]) > 1
        rows.append(row)
    return rows


def _tiles(history: RunHistory, result: RunHistory) -> list[dict[str, str]]:
    tiles = []
    for row in _score_table(result)[:4]:
        tile = {"label": f"held-out {row['name']}" if row["name"] != "held-out reward" else row["name"]}
        tile["value"] = f"{row['before']} → {row['after']}" if row["moved"] else row["after"]
        if row["moved"]:
            tile["change"] = row["change"] + row.get("change_interval", "")
            tile["direction"] = row["direction"]
        tiles.append(tile)
    rewards = history.series("reward")[1]
    if rewards:
        # A single update's reward is mostly the luck of its prompts; a tenth of the run at either end is not.
        window = max(1, len(rewards) // 10)
        first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
        tile = {"label": "training reward", "value": format_number(first)}
        if len(rewards) > 1:
            tile |= {
                "value": f"{format_number(first)} → {format_number(last)}",
                "change": format_change(last - first),
                "direction": "up" if last > first else "down" if last < first else "same",
            }
        tiles.append(tile)
    nfe = history.last("nfe")
    if nfe is not None:
        tiles.append({"label": "function evaluations", "value": format_count(nfe)})
    return tiles


def _numbers(history: RunHistory) -> list[tuple[str, str]]:
    rows = [("updates", f"{max(entry['step'] for entry in history.train + history.eval):,}")]
    for label, key, form in (
        ("training time", "time/elapsed", format_duration),
        ("function evaluations", "nfe", lambda value: f"{value:,.0f}"),
        ("training reward, last update", "reward", format_number),
        ("reward spread, last update", "reward_std", format_number),
        ("groups without signal, last update", "frac_reward_zero_std", format_number),
        ("KL, last update", "kl", format_number),
        ("clipped share, last update", "clip_ratio", format_number),
        ("gradient norm, last update", "grad_norm", format_number),
        ("loss, last update", "loss", format_number),
    ):
        value = history.last(key)
        if value is not None:
            rows.append((label, form(value)))
    samples = history.last("eval_num_samples", "eval")
    if samples is not None:
        rows.append(("pictures per evaluation", f"{samples:,.0f}"))
    runtime = history.summary.get("train_runtime")
    if finite(runtime):
        rows.append(("whole run with evaluations", format_duration(runtime)))
    return rows


def _settings(config: Mapping) -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(public_settings(config).items()):
        text = (
            value
            if isinstance(value, str)
            else yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        )
        rows.append((name, text.removesuffix("\n").removesuffix("\n...")))
    return rows


def _matched(samples: list[Samples]) -> tuple[Samples, Samples | None, list[tuple[int, int | None]]]:
    """First and last set of pictures, and which picture of one belongs to which of the other."""
    before, after = samples[0], samples[-1] if len(samples) > 1 else None
    if after is None:
        return before, None, [(index, None) for index in range(len(before.paths))]
    names = {path.name: index for index, path in enumerate(after.paths)}
    return before, after, [(i, names[path.name]) for i, path in enumerate(before.paths) if path.name in names]


def _pairs(samples: list[Samples]) -> list[dict]:
    if not samples:
        return []
    before, after, matches = _matched(samples)
    pairs = []
    for i, j in matches[:PICTURES_IN_PAGE]:
        shown = (
            [("before", before, i), ("after", after, j)]
            if after is not None
            else [(f"update {before.step:,}", before, i)]
        )
        pictures = []
        for label, entry, index in shown:
            uri, is_small = _inline(entry.paths[index])
            pictures.append({"label": label, "uri": uri, "is_small": is_small})
        pairs.append({"prompt": before.prompts[i], "pictures": pictures, "scores": _pair_scores(before, after, i, j)})
    return pairs


def _pair_scores(before: Samples, after: Samples | None, i: int, j: int | None) -> list[dict[str, str]]:
    rows = []
    for name in dict.fromkeys([*before.scores, *(after.scores if after is not None else [])]):
        first = before.scores[name][i] if name in before.scores else None
        last = after.scores[name][j] if after is not None and name in after.scores else None
        if not finite(first) and not finite(last):
            continue
        direction = ""
        if finite(first) and finite(last) and first != last:
            direction = "up" if last > first else "down"
        rows.append(
            {
                "name": name,
                "before": format_number(first) if finite(first) else "",
                "after": format_number(last) if finite(last) else "",
                "direction": direction,
            }
        )
    return rows


def _picture_note(samples: list[Samples]) -> str:
    if not samples:
        return ""
    before, after, matches = _matched(samples)
    shown = min(len(matches), PICTURES_IN_PAGE)
    total = max([len(matches), *(len(scores) for scores in before.all_scores.values())])
    which = f"The first {shown} of {total} held-out prompts" if shown < total else "Held-out prompts"
    if after is None:
        return f"{which}, after {before.step:,} updates."
    start = "before training" if before.step == 0 else f"after {before.step:,} updates"
    return f"{which}; left {start}, right after {after.step:,} updates, from the same noise."


def _save_before_after(samples: list[Samples], path: Path) -> None:
    if not samples:
        return
    before, after, matches = _matched(samples)
    matches = matches[:PICTURES_IN_FILE]
    if not matches:
        return
    columns = min(4, len(matches))
    images, captions, labels = [], [], []
    for start in range(0, len(matches), columns):
        block = matches[start : start + columns]
        padding = [None] * (columns - len(block))
        texts = [before.prompts[i] for i, _ in block]
        for position, (i, j) in enumerate(block):
            for row in _pair_scores(before, after, i, j):
                values = [value for value in (row["before"], row["after"]) if value]
                texts[position] += f"\n{row['name']} {' → '.join(values)}"
        texts = [text.strip("\n") for text in texts] + [""] * len(padding)
        images += [_open(before.paths[i]) for i, _ in block] + padding
        if after is None:
            captions += texts
            labels.append(f"update {before.step:,}")
        else:
            images += [_open(after.paths[j]) for _, j in block] + padding
            captions += [""] * columns + texts
            labels += ["before", "after"]
    grid = image_grid(images, captions, columns=columns, row_labels=labels)
    partial = path.with_name(f".{path.stem}.partial.png")
    grid.save(partial)
    partial.replace(path)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _inline(path: Path) -> tuple[str, bool]:
    """Picture as a data URI, and whether it is so small that the page should enlarge it without smoothing."""
    image = _open(path)
    buffer = io.BytesIO()
    if max(image.size) <= 128:
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), True
    image.thumbnail((INLINE_PIXELS, INLINE_PIXELS), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), False
