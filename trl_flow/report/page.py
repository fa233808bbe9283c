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
from datetime import UTC, datetime
from pathlib import Path

import yaml
from markupsafe import Markup
from PIL import Image

from .grid import image_grid
from .history import RunHistory, Samples, finite, load_history, paired_change, public_settings
from .panels import collect_panels, render_svg, save_png
from .template import write_page
from .text import format_change, format_count, format_duration, format_number


PICTURES_IN_PAGE = 12
PICTURES_IN_FILE = 8
INLINE_PIXELS = 384
MOVING_FRAMES = 16
MOVING_PIXELS = 160
MOVING_BYTES = 300_000
CURVES_IN_FILE = 6
RELOAD_SECONDS = 60  # of a page that is written again while training goes on
SECTIONS = (
    ("learning", "Learning"),
    ("tags", "Held-out scores by tag"),
    ("credit", "Credit along the trajectory"),
    ("health", "Health of the optimization"),
    ("others", "Also logged"),
)


def write_report(
    run_dir: str | Path,
    log_history: Sequence[Mapping] | None = None,
    title: str | None = None,
    max_steps: int | None = None,
    is_running: bool | None = None,
) -> Path:
    """
    Write `report.html`, `curves.png` and `before_after.png` into a run directory.

    The page is one file without external resources. It can be written at any time during a run; quantities that were
    not logged are left out. While the run goes on, the page says so and reloads itself.

    Args:
        run_dir (`str` or `Path`):
            Output directory of a trainer: `trainer_state.json` (also in checkpoints), and, where they exist,
            `config.yaml` and `samples/step_<step>/<index>.png` with `samples/step_<step>.json`.
        log_history (`Sequence[Mapping]`, *optional*):
            Log of a run that is still going (`trainer.state.log_history`).
        title (`str`, *optional*):
            Heading. Defaults to the directory's name.
        max_steps (`int`, *optional*):
            Updates that a run that is still going will make (`trainer.state.max_steps`).
        is_running (`bool`, *optional*):
            Whether training goes on after this. Defaults to whether a `log_history` is given.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
        ValueError: there is no log yet.
    """
    run_dir = Path(run_dir)
    history = load_history(run_dir, log_history)
    history.max_steps = max_steps or history.max_steps
    is_running = (log_history is not None if is_running is None else is_running) and not history.ended
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
    scores = _score_table(result)
    return write_page(
        run_dir / "report.html",
        "report.html",
        title=title or run_dir.resolve().name,
        what=_what(history),
        findings=_findings(history, scores),
        progress=_progress(history, is_running),
        reload_seconds=RELOAD_SECONDS if is_running else None,
        written=None if history.ended else datetime.now(UTC),
        tiles=_tiles(history, scores),
        pairs=_pairs(result.samples),
        picture_note=_picture_note(result.samples),
        sections=[
            (heading, [(panel, svg) for panel, svg in drawn if panel.section == name])
            for name, heading in SECTIONS
            if any(panel.section == name for panel in panels)
        ],
        scores=scores,
        tags=_tag_table(result),
        numbers=_numbers(history),
        settings=_settings(history.config),
    )


def _what(history: RunHistory) -> Markup:
    """What was trained on what, by which method."""
    config, run = history.config, history.run

    # Of a directory, the name says what it is; the rest is the machine's.
    base, dataset = (
        Path(name).name if Path(name).is_absolute() else name
        for name in (
            str(run.get("base_model") or config.get("model_name_or_path") or ""),
            str(config.get("dataset_name") or ""),
        )
    )
    rewards = history.trained_names
    trained = f"an adapter of rank {config['lora_r']}" if finite(config.get("lora_r")) else "an adapter"
    trained = "all weights" if config.get("full_finetuning") else trained
    bold = Markup("<b>{}</b>").format
    text = bold(run.get("method") or "This run") + f" trained {trained} of " + (bold(base) if base else "a pipeline")
    text += " on the prompts of " + bold(dataset) if dataset else ""
    text += f" for the reward{'s' * (len(rewards) > 1)} " + bold(_listed(rewards)) if rewards else ""
    return text + "."


def _listed(names: Sequence[str], most: int = 4) -> str:
    """`"a, b and c"`; of many names the first."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _progress(history: RunHistory, is_running: bool) -> str:
    step = history.step
    total = history.max_steps or history.config.get("max_steps") or 0
    known = isinstance(total, int) and total > step
    text = f"{step:,} of {total:,} updates" if known else f"{step:,} updates"
    elapsed = history.last("time/elapsed")
    text = f"{text} in {format_duration(elapsed)}" if elapsed is not None else text
    if is_running and known and elapsed and step:
        text += f", about {format_duration(elapsed / step * (total - step))} of training left"
    if history.rolled_back_to is not None:
        text += f", rolled back to update {history.rolled_back_to:,} for reward hacking"
    return text


def _score_table(history: RunHistory) -> list[dict]:
    """First and last value of each held-out score, those that are trained on first, with intervals where known."""
    rows = []
    keys = [f"eval_rewards/{name}" for name in history.eval_names()]
    watched = history.watched_names()
    for key in keys or ["eval_reward"]:
        values = history.series(f"{key}/mean" if keys else key, "eval")
        row = {"name": key.removeprefix("eval_rewards/") if keys else "held-out reward", "moved": len(values[0]) > 1}
        row["watched"] = row["name"] in watched
        if not values[0]:
            if keys:
                rows.append(row | {"before": "no score", "after": "", "direction": ""})
            continue
        halves = []
        for label, position in (("before", 0), ("after", -1)):
            step, mean = values[0][position], values[1][position]
            entry = next(entry for entry in history.eval if entry["step"] == step)
            std, count = entry.get(f"{key}/std"), entry.get("eval_num_samples")
            count = count - (entry.get(f"{key}/missing") or 0) if finite(count) else 0
            halves.append(1.96 * std / math.sqrt(count) if finite(std) and count > 0 else None)
            interval = f" ± {format_number(halves[-1])}" if halves[-1] is not None else ""
            row[label], row[f"{label}_interval"], row[f"{label}_step"] = format_number(mean), interval, f"{step:,.0f}"
        change = values[1][-1] - values[1][0]
        # Two independent means, unless both evaluations' scores are on disk: the same prompts' can be paired.
        half = math.hypot(*halves) if None not in halves else None
        paired = paired_change(history.samples, row["name"])
        if paired is not None and [values[0][0], values[0][-1]] == [history.samples[0].step, history.samples[-1].step]:
            half = paired[1]
            row["pairs"] = paired[2]
        row["change"] = format_change(change)
        row["change_interval"] = f" ± {format_number(half)}" if half is not None and row["moved"] else ""
        row["direction"] = _direction(change, half) if row["moved"] else ""
        rows.append(row)
    return rows


def _direction(change: float, half: float | None) -> str:
    """`"up"` or `"down"` for a change whose interval does not contain 0."""
    return "" if half is None or abs(change) <= half else "up" if change > 0 else "down"


def _findings(history: RunHistory, scores: Sequence[Mapping]) -> list[dict[str, str]]:
    """What rose, by how much, and whether a reward that is only watched has fallen: a sentence each."""
    moved = [row for row in scores if row["moved"]]
    findings = []
    if silent := [row["name"] for row in scores if row["before"] == "no score"]:
        findings.append({"text": f"No held-out picture has a score of {_listed(silent)}.", "direction": ""})
    if not moved:
        if not history.eval:
            return [{"text": "Nothing was evaluated on held-out prompts.", "direction": ""}]
        text = "There is one evaluation so far: nothing to compare it with yet."
        return [*findings, {"text": text, "direction": ""}]
    verbs = {"up": "rose", "down": "fell", "": "did not change beyond its noise"}
    watched = [row for row in moved if row["watched"]]
    # Of those that are only watched, the ones that fell.
    for row in [row for row in moved if not row["watched"]][:3] + [
        row for row in watched if row["direction"] == "down"
    ]:
        change = f" ({row['change']}{row['change_interval']})"
        text = f"Held-out {row['name']} {verbs[row['direction']]}: {row['before']} → {row['after']}{change}"
        if not row["change_interval"]:
            text = f"Held-out {row['name']} went from {row['before']} to {row['after']}{change}, of unknown interval"
        text += ", although it is only watched: look for reward hacking" if row["watched"] else ""
        findings.append({"text": f"{text}.", "direction": row["direction"]})
    if watched and not any(row["direction"] == "down" for row in watched):
        names = _listed([row["name"] for row in watched])
        judged = all(row["change_interval"] for row in watched)
        said = "did not fall beyond its noise" if len(watched) == 1 else "none fell beyond its noise"
        said = said if judged else "of unknown interval"
        findings.append({"text": f"Watched, not trained on: {names}; {said}.", "direction": ""})
    if history.trained_names and not any(row["watched"] for row in scores):
        text = "No reward was only watched, so that reward hacking would go unseen (eval_reward_funcs)."
        findings.append({"text": text, "direction": ""})
    return findings


def _tiles(history: RunHistory, scores: Sequence[Mapping]) -> list[dict[str, str]]:
    tiles = []
    for row in scores[:4]:
        label = row["name"] if row["name"] == "held-out reward" else f"held-out {row['name']}"
        tile = {"label": label + (", watched" if row["watched"] else "")}
        tile["value"] = f"{row['before']} → {row['after']}" if row["moved"] else row["after"] or row["before"]
        if row["moved"]:
            tile["change"] = row["change"] + row["change_interval"]
            tile["direction"] = row["direction"]
        tiles.append(tile)
    rewards = history.series("reward")[1]
    if rewards:
        # A single update's reward is mostly the luck of its prompts; a tenth of the run at either end is not.
        window = max(1, len(rewards) // 10)
        first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
        tile = {"label": "training reward", "value": format_number(first)}
        if len(rewards) > 1:
            tile |= {"value": f"{format_number(first)} → {format_number(last)}", "change": format_change(last - first)}
        tiles.append(tile)
    nfe = history.last("nfe")
    if nfe is not None:
        tiles.append({"label": "function evaluations", "value": format_count(nfe)})
    return tiles


def _tag_table(history: RunHistory) -> dict:
    """First and last mean of each held-out score over the prompts of each tag."""
    names = [name for name in history.eval_names() if len(history.tags(name)) > 1]
    rows = []
    for tag in dict.fromkeys(tag for name in names for tag in history.tags(name)):
        cells = []
        for name in names:
            values = history.series(f"eval_tags/{tag}/{name}", "eval")[1]
            shown = [format_number(value) for value in ([values[0], values[-1]] if len(values) > 1 else values)]
            cells.append(" → ".join(shown))
        if any(cells):
            rows.append({"tag": tag, "cells": cells})
    return {"names": names, "rows": rows}


def _numbers(history: RunHistory) -> list[tuple[str, str]]:
    rows = [("updates", f"{history.step:,}")]
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
        ("pictures per second, last update", "images_per_second", format_number),
        ("training rows", "rows_trained", lambda value: f"{value:,.0f}"),
    ):
        value = history.last(key)
        if value is not None:
            rows.append((label, form(value)))
    for name in history.names(r"rewards/(.+)/failed"):
        failed = history.series(f"rewards/{name}/failed")[1]
        if any(failed):
            rows.append((f"pictures that {name} failed to score", f"{sum(failed) / len(failed):.2%}"))
    samples = history.last("eval_num_samples", "eval")
    if samples is not None:
        rows.append(("pictures per evaluation", f"{samples:,.0f}"))
    evaluating = history.series("eval_runtime", "eval")[1]
    if evaluating:
        rows.append(("time in evaluations", format_duration(sum(evaluating))))
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
            video = entry.paths[index].with_suffix(".gif")
            pictures.append(
                {
                    "label": label,
                    "uri": uri,
                    "is_small": is_small,
                    "is_video": video.is_file(),
                    "moving": _moving(video) if video.is_file() else "",
                }
            )
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
    # The frames of a video stand side by side.
    is_wide = any(path.with_suffix(".gif").is_file() for path in before.paths)
    columns = min(2 if is_wide else 4, len(matches))
    images, captions, labels = [], [], []
    for start in range(0, len(matches), columns):
        block = matches[start : start + columns]
        padding = [None] * (columns - len(block))
        texts = [" ".join(before.prompts[i].split()) for i, _ in block]
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
    width = INLINE_PIXELS if image.width < 2 * image.height else 2 * INLINE_PIXELS
    image.thumbnail((width, INLINE_PIXELS), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), False


def _moving(path: Path) -> str:
    """Video as the data URI of a small GIF; empty if it doesn't get small enough, or is being written."""
    if path.stat().st_size <= MOVING_BYTES // 4:
        return "data:image/gif;base64," + base64.b64encode(path.read_bytes()).decode()
    frames = []
    try:
        with Image.open(path) as video:
            step = math.ceil(video.n_frames / MOVING_FRAMES)
            duration = step * video.info.get("duration", 125)
            for number in range(0, video.n_frames, step):
                video.seek(number)
                frames.append(video.convert("RGB"))
    except (OSError, EOFError):
        return ""
    for frame in frames:
        frame.thumbnail((MOVING_PIXELS, MOVING_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    if buffer.tell() > MOVING_BYTES:
        return ""
    return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()
