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


"""A run as a notebook shows it: one live line, a table, pictures before and now, curves at the end."""

import html
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from .report.grid import image_grid
from .report.history import finite, load_history
from .report.panels import collect_panels, save_png
from .report.progress import ProgressLine


logger = logging.get_logger(__name__)


# Columns of the table besides the held-out scores, where they were logged.
COLUMNS = {"reward": "reward", "reward_std": "its std in a group", "clip_ratio": "clipped", "grad_norm": "gradient"}
MOST_ROWS = 12
MOST_CURVES = 4
SECONDS_BETWEEN_UPDATES = 0.2  # a browser draws each of them


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code (`tqdm.autonotebook`'s test, without importing IPython)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class NotebookProgress(ProgressLine):
    """
    Shows a run in the output of a notebook's cell, and keeps it up to date: step, scores, speed and remaining time on
    one line, a table of what was logged, the first held-out prompts before training and now (from the same noise), and
    when training has ended its curves. Trainers take it by themselves in a notebook, unless `disable_tqdm` is set.

    Needs IPython, which is there wherever a notebook is.

    Args:
        num_pictures (`int`, *optional*, defaults to `6`):
            Number of held-out prompts whose pictures are shown; 0 for none.

    Example:

    ```python
    from trl_flow.report import ProgressLine

    trainer.remove_callback(ProgressLine)
    trainer.add_callback(NotebookProgress(num_pictures=4))
    ```
    """

    def __init__(self, num_pictures: int = 6):
        # Where there is no bar, as in an evaluation before training, the line's text goes nowhere.
        super().__init__(io.StringIO())
        self.num_pictures = num_pictures
        self._ended = False
        self._page = self._pictures = self._curves = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._ended = False
        if state.is_world_process_zero:
            self._page, self._pictures, self._curves = _Page(state), _Output(), _Output()
            self.bar = self._page

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self._page is not None:
            self._page.show_table(state.log_history)

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if not state.is_world_process_zero:
            return
        if self._page is None:
            self._page, self._pictures, self._curves = _Page(state), _Output(), _Output()
        self._page.show_table(state.log_history)
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self._ended = True
        if state.is_world_process_zero:
            self._draw(args, state)

    def _draw(self, args, state):
        try:
            history = load_history(args.output_dir, state.log_history)
            if self.num_pictures and (picture := before_and_now(history.samples, self.num_pictures)) is not None:
                content = io.BytesIO()
                picture.save(content, "png")
                self._pictures.show_png(content.getvalue())
            panels = [panel for panel in collect_panels(history) if panel.section == "learning"]
            if self._ended and panels:
                with tempfile.TemporaryDirectory() as folder:
                    save_png(panels[:MOST_CURVES], path := Path(folder, "curves.png"))
                    self._curves.show_png(path.read_bytes(), sharp=True)
        except Exception as error:  # pictures for a person: what is wrong with them must not cost the run
            logger.warning_once(f"The notebook shows no pictures ({type(error).__name__}: {error}).")


def before_and_now(samples, count: int) -> Image.Image | None:
    """The first pictures of the first and of the newest evaluation, one above the other."""
    if not samples:
        return None
    shown = [samples[0], samples[-1]] if len(samples) > 1 else [samples[0]]
    pictures, captions, labels = [], [], []
    for row in shown:
        columns = min(count, len(row.paths))
        name = next(iter(row.scores), None)
        for index in range(columns):
            with Image.open(row.paths[index]) as picture:
                pictures.append(picture.convert("RGB"))
            score = row.scores[name][index] if name is not None else None
            said = [f"{name} {score:.3g}"] if finite(score) else []
            captions.append("\n".join(said + ([" ".join(row.prompts[index].split())] if row is shown[-1] else [])))
        labels.append("before training" if row.step == 0 else f"after update {row.step}")
    return image_grid(pictures, captions, columns=columns, row_labels=labels)


class _Output:
    """A place in a cell's output whose content can be replaced."""

    def __init__(self):
        self._handle = None

    def show(self, content):
        from IPython.display import DisplayHandle

        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(content)
        else:
            self._handle.update(content)

    def show_png(self, content: bytes, sharp: bool = False):
        from IPython.display import Image

        self.show(Image(data=content, format="png", retina=sharp))


class _Page:
    """Bar, line and table. To [`ProgressLine`] it is its bar."""

    def __init__(self, state):
        self.n, self.total = state.global_step, state.max_steps
        self._output, self._shown_at, self._text = _Output(), 0.0, ""
        self.show_table(state.log_history)

    def update(self, steps: int):
        self.n += steps
        self._refresh()

    def set_postfix_str(self, text: str):
        self._text = text
        self._refresh()

    def close(self):
        self._refresh(now=True)

    def show_table(self, log_history: list[dict]):
        self._table = log_table(log_history)
        self._refresh(now=True)

    def _refresh(self, now: bool = False):
        if not now and time.monotonic() - self._shown_at < SECONDS_BETWEEN_UPDATES:
            return
        self._shown_at = time.monotonic()
        line = f"{self.n}/{self.total} updates" + (f" | {html.escape(self._text)}" if self._text else "")
        bar = f'<progress value="{self.n}" max="{max(1, self.total)}" style="width: 12em"></progress>'
        self._output.show(_Html(f"<div>{bar} {line}</div>{self._table}"))


class _Html:
    """IPython's `HTML`, with a text for where a notebook is printed."""

    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return html.unescape(self.text.partition("</progress> ")[2].partition("</div>")[0])


def log_table(log_history: list[dict]) -> str:
    """The newest log entries as an HTML table, one row for each step: rewards and held-out means."""
    rows: dict[int, dict] = {}
    for entry in log_history:
        if "train_runtime" not in entry:
            rows.setdefault(entry["step"], {}).update(entry)
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    held_out = [key for key in keys if key.startswith("eval_rewards/") and key.endswith("/mean")]
    columns = {key: f"held-out {key.removeprefix('eval_rewards/').removesuffix('/mean')}" for key in held_out}
    columns |= {key: title for key, title in COLUMNS.items() if key in keys}
    if not columns:
        return ""
    steps = sorted(rows)
    # The first one is what the others are compared with, and evaluations may lie many updates apart.
    evaluated = [step for step in steps if any(finite(rows[step].get(key)) for key in held_out)]
    half = MOST_ROWS // 2
    kept = {steps[0], *evaluated[-half:], *steps[-half:]} if len(steps) > MOST_ROWS else set(steps)
    shown = []
    for before, step in zip([None, *steps], steps, strict=False):
        if step in kept:
            shown += [step] if before is None or before in kept else [None, step]
    texts = ["".join(f"<th>{html.escape(title)}</th>" for title in ["update", *columns.values()])]
    for step in shown:
        if step is None:
            texts.append("<td>⋮</td>" * (len(columns) + 1))
            continue
        values = [rows[step].get(key) for key in columns]
        texts.append("".join(f"<td>{text}</td>" for text in [step, *(_number(value) for value in values)]))
    return f"<table>{''.join(f'<tr>{text}</tr>' for text in texts)}</table>"


def _number(value) -> str:
    return f"{value:.4g}" if finite(value) else ""
