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

"""The pictures of each evaluation, with prompts and scores, to the trackers of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from .grid import image_grid
from .history import Samples, finite
from .sample_table import MISSING
from .text import format_number


logger = logging.get_logger(__name__)

# Of a picture in the grid, whose own file is beside it.
CELL_PIXELS = 256


class TrackerPictures(TrainerCallback):
    """
    Shows the pictures of each evaluation, always of the same prompts and noise, in trackio, Weights & Biases and TensorBoard.

    Which of them is decided by their callbacks, as `report_to` adds them. All get the grid `eval/pictures`; trackio and
    Weights & Biases also the table `eval/scores` of pictures, prompts and scores, and videos as such. A tracker that fails
    costs its pictures, with one warning, and not the run.

    Args:
        trainer ([`FlowGRPOTrainer`]):
            Whose `evaluated_samples` are shown, and whose callbacks are looked through for trackers.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._failed = set()

    def on_train_begin(self, args, state, control, **kwargs):
        if self._tracker(TrackioCallback) and state.is_world_process_zero and args.run_name is None:
            # Its run is finished when training ends. What is logged later goes on with the same one, found by name.
            import trackio

            if (run := trackio.context_vars.current_run.get()) is not None:
                args.run_name = run.name

    def on_evaluate(self, args, state, control, **kwargs):
        samples = self.trainer.evaluated_samples
        if samples is None or not state.is_world_process_zero:
            return
        if tensorboard := self._tracker(TensorBoardCallback):
            self._attempt("TensorBoard", lambda: self._show_in_tensorboard(tensorboard, samples, state.global_step))
        if self._tracker(WandbCallback):
            import wandb

            self._attempt("Weights & Biases", lambda: wandb.log(_entries(wandb, samples)))
        if self._tracker(TrackioCallback):
            import trackio

            self._attempt("trackio", lambda: trackio.log(_entries(trackio, samples)))

    def _tracker(self, kind: type[TrainerCallback]) -> TrainerCallback | None:
        return next(
            (callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, kind)), None
        )

    def _attempt(self, name: str, show: Callable[[], None]):
        try:
            show()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning(
                    f"{name} did not take the pictures of an evaluation ({type(error).__name__}: {error}). Training goes on; "
                    "they are in output_dir/samples."
                )

    @staticmethod
    def _show_in_tensorboard(callback: TensorBoardCallback, samples: Samples, step: int):
        callback.tb_writer.add_image("eval/pictures", np.asarray(_grid(samples)), step, dataformats="HWC")
        callback.tb_writer.flush()


def samples_grid(samples: Samples) -> Image.Image:
    """The pictures of an evaluation in rows, each with its prompt and scores."""
    pictures, captions = [], []
    for number, path in enumerate(samples.paths):
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
        caption = [" ".join(samples.prompts[number].split())]
        for name, scores in samples.scores.items():
            caption.append(f"{name} {format_number(scores[number]) if finite(scores[number]) else MISSING}")
        captions.append("\n".join(caption))
    width, height = pictures[0].size
    # By the shorter side: the frames of a video stand side by side.
    scale = CELL_PIXELS / min(width, height)
    return image_grid(
        pictures,
        captions,
        columns=max(1, round(math.sqrt(1.5 * len(pictures) * height / width))),
        scale=math.floor(scale) if scale > 1 else scale,
    )


def save_grid(samples: Samples):
    """Writes the grid of an evaluation's pictures beside their folder. One that cannot be drawn costs a warning, and not the run."""
    try:
        samples_grid(samples).save(_grid_file(samples))
    except Exception as error:
        logger.warning_once(
            f"The pictures of an evaluation could not be drawn as a grid ({type(error).__name__}: {error})."
        )


def _grid_file(samples: Samples) -> Path:
    return samples.paths[0].parent.with_suffix(".png")


def _grid(samples: Samples) -> Image.Image:
    with Image.open(_grid_file(samples)) as picture:
        return picture.convert("RGB")


def _entries(tracker, samples: Samples) -> dict:
    """What trackio and Weights & Biases, which share these names, are to log."""
    columns = ["step", "prompt", "picture", *samples.scores]
    rows = [
        [samples.step, prompt, tracker.Image(str(path)), *(score if finite(score) else None for score in scores)]
        for prompt, path, *scores in zip(samples.prompts, samples.paths, *samples.scores.values(), strict=True)
    ]
    entries = {
        "eval/pictures": tracker.Image(_grid(samples), caption=f"update {samples.step}"),
        "eval/scores": tracker.Table(columns=columns, data=rows),
        "train/global_step": samples.step,
    }
    for prompt, path in zip(samples.prompts, samples.paths, strict=True):
        if (video := path.with_suffix(".gif")).is_file():
            entries[f"eval/video_{path.stem}"] = tracker.Video(str(video), caption=prompt)
    return entries
