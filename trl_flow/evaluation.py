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

"""Pictures of several models from the same noise, and their scores, kept on disk so that nothing is made twice."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageSequence

from .rewards import RewardUnavailableError, score
from .trainer.batch_size import AUTO, BatchSize


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = get_logger(__name__)

SETTINGS_FILE = "evaluation.json"
FRAME_DURATION = 125  # milliseconds
_PARTIAL = re.compile(r"\..+\.\d+\.partial")


@dataclass
class Evaluation:
    """
    A directory of pictures and scores.

    Pictures are rows: the first picture of the first prompt, its second one, ..., the first of the second prompt. Rows are
    taken in batches that are always cut at the same places, so that a picture is the same after a restart, to the last bit.
    Where memory does not suffice for a batch, it is made in parts; then, and with `batch_size="auto"`, to rounding.

    Args:
        folder (`Path`): The directory.
        dataset ([`~datasets.Dataset`]): Prompts in a column `prompt`; other columns reach the rewards. Pictures that the
            pipeline is to start from are in a column `image`.
        images_per_prompt (`int`, *optional*, defaults to 1): Pictures of each prompt.
        seed (`int`, *optional*, defaults to 0): Of the noise.
        batch_size (`int` or `"auto"`, *optional*, defaults to 4): Pictures that are made at once; `"auto"` finds what fits.
        reward_batch_size (`int`, *optional*, defaults to 32): Pictures that are scored at once.
        versions (`dict[str, str]`, *optional*): Of the rewards, as [`digest`] makes them: the same name may stand for other
            settings, code or weights in the next evaluation, whose scores are others.
    """

    folder: Path
    dataset: Dataset
    images_per_prompt: int = 1
    seed: int = 0
    batch_size: int | str = 4
    reward_batch_size: int = 32
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._at_once = BatchSize(
            "Sampling", "batch_size", self.batch_size, "dtype=bfloat16, or a smaller height and width"
        )

    def make_one_by_one(self):
        """For pipelines that do not take several prompts at once."""
        self.batch_size = self._at_once.rows = 1

    @property
    def num_pictures(self) -> int:
        return len(self.dataset) * self.images_per_prompt

    def place(self, row: int) -> tuple[int, int]:
        """Number of the prompt, and which of its pictures."""
        return divmod(row, self.images_per_prompt)

    def picture(self, model: str, steps: int, row: int) -> Path:
        """File of a picture."""
        prompt, number = self.place(row)
        return self.folder / "pictures" / model / f"{steps}_steps" / f"{prompt:05d}-{number}.png"

    def missing(self, model: str, steps: int) -> list[range]:
        """Batches of rows of which a picture is missing."""
        return [
            batch
            for batch in _batches(self.num_pictures, 1 if self.batch_size == AUTO else self.batch_size)
            if not all(self.picture(model, steps, row).is_file() for row in batch)
        ]

    def generator(self, row: int) -> torch.Generator:
        """The source of a picture's noise: a function of seed, prompt's number and picture's number alone."""
        state = np.random.SeedSequence([self.seed, *self.place(row)]).generate_state(1, np.uint64)
        # On the CPU, so that the noise is the same whatever a picture is made on.
        return torch.Generator("cpu").manual_seed(int(state[0]) >> 1)

    def make_pictures(self, pipeline: "DiffusionPipeline", model: str, steps: int, sampling: dict) -> Iterator[int]:
        """
        Makes the pictures that are missing, with the stock pipeline, and saves each.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]): The model.
            model (`str`): Its name in the directory.
            steps (`int`): Denoising steps.
            sampling (`dict`): Other arguments of the pipeline's call.

        Yields:
            `int`: How many pictures a batch had.
        """
        sampling = {**sampling, "num_inference_steps": steps, "output_type": "pil"}
        if self.batch_size == AUTO:
            trial = {**sampling, "num_inference_steps": min(steps, 2)}
            self._at_once.find(
                lambda n: self._sample(pipeline, [row % self.num_pictures for row in range(n)], trial), pipeline.device
            )
            self.batch_size = self._at_once.rows
        for batch in self.missing(model, steps):
            parts = self._at_once.in_parts(
                lambda part, batch=batch: self._sample(pipeline, batch[part], sampling), len(batch)
            )
            for row, picture in zip(batch, itertools.chain(*parts), strict=True):
                path = self.picture(model, steps, row)
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_picture(picture, path)
            yield len(batch)

    def _sample(self, pipeline: "DiffusionPipeline", rows: Sequence[int], sampling: dict) -> list:
        samples = [self.dataset[self.place(row)[0]] for row in rows]
        if len(rows) > 1:
            prompts = [sample["prompt"] for sample in samples]
            output = pipeline(prompt=prompts, generator=[self.generator(row) for row in rows], **sampling)
            return list(pictures_of(output, pipeline))
        image = {"image": samples[0]["image"]} if samples[0].get("image") is not None else {}
        output = pipeline(prompt=samples[0]["prompt"], generator=self.generator(rows[0]), **image, **sampling)
        return [pictures_of(output, pipeline)[0]]

    def score_file(self, model: str, steps: int, reward: str) -> Path:
        """File of a reward's scores."""
        name = ".".join([reward, self.versions[reward]] if reward in self.versions else [reward])
        return self.folder / "scores" / model / f"{steps}_steps" / f"{name}.json"

    def is_outdated(self, model: str, steps: int, reward: str) -> bool:
        """Whether there are scores of a reward in other versions alone."""
        path, other = self.score_file(model, steps, reward), re.compile(re.escape(reward) + r"\.[0-9a-f]{12}\.json")
        return not path.is_file() and any(other.fullmatch(found.name) for found in path.parent.glob("*.json"))

    def read_scores(self, model: str, steps: int, reward: str) -> dict:
        """
        What is known so far.

        Returns:
            `dict`: `scores`: number, or `None` where the reward does not apply, by the picture's name; `errors`: why a
            picture has no score.
        """
        path = self.score_file(model, steps, reward)
        return json.loads(path.read_text()) if path.is_file() else {"scores": {}, "errors": {}}

    def unscored(self, model: str, steps: int, reward: str) -> list[range]:
        """Batches of rows of which a score is missing, because it was never asked for or could not be had."""
        known = self.read_scores(model, steps, reward)["scores"]
        return [
            batch
            for batch in _batches(self.num_pictures, self.reward_batch_size)
            if not all(self.picture(model, steps, row).name in known for row in batch)
        ]

    def make_scores(self, reward: Callable, name: str, model: str, steps: int) -> Iterator[int]:
        """
        Scores the saved pictures that have no score yet, and saves the scores after each batch.

        Args:
            reward (`Callable`): The reward function.
            name (`str`): Its name in the directory.
            model (`str`), steps (`int`): Whose pictures.

        Yields:
            `int`: How many pictures a batch had.

        Raises:
            ValueError: If the reward is not available, for whatever pictures.
        """
        known = self.read_scores(model, steps, name)
        columns = [column for column in self.dataset.column_names if column != "prompt"]
        for batch in self.unscored(model, steps, name):
            samples = [self.dataset[self.place(row)[0]] for row in batch]
            paths = [self.picture(model, steps, row) for row in batch]
            scores = score(
                [reward],
                [name],
                [sample["prompt"] for sample in samples],
                [load_picture(path) for path in paths],
                {column: [sample[column] for sample in samples] for column in columns},
            )
            errors = scores.errors[name]
            gone = next((error for error in errors if isinstance(error, RewardUnavailableError)), None)
            if gone is not None:
                raise ValueError(
                    f"reward {name} is not available: {gone}. What was made is in {self.folder}; the same command goes on "
                    "from there."
                ) from gone
            # Exceptions come in the order of their pictures; which ones returned NaN instead is not told.
            messages = iter([f"{type(error).__name__}: {error}" for error in errors])
            exact = len(errors) == int(scores.failed.sum())
            for path, value, failed in zip(
                paths, scores.values[:, 0].tolist(), scores.failed[:, 0].tolist(), strict=True
            ):
                if failed:
                    known["errors"][path.name] = next(messages) if exact else "the reward raised or returned NaN"
                else:
                    known["scores"][path.name] = None if math.isnan(value) else value
                    known["errors"].pop(path.name, None)
            write_json(self.score_file(model, steps, name), known)
            yield len(batch)

    def scores(self, model: str, steps: int, reward: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of shape `(prompts, images_per_prompt)`, NaN where there is none, and where they could not be had."""
        known = self.read_scores(model, steps, reward)["scores"]
        names = [self.picture(model, steps, row).name for row in range(self.num_pictures)]
        values = [known.get(name) for name in names]
        shape = len(self.dataset), self.images_per_prompt
        return (
            np.array([math.nan if value is None else value for value in values]).reshape(shape),
            np.array([name not in known for name in names]).reshape(shape),
        )


def check_settings(folder: Path, settings: dict, adapters: dict[str, str], dataset: Dataset) -> None:
    """
    Writes what defines the pictures of an evaluation, or compares it with what is written there.

    Args:
        folder (`Path`): Directory of the evaluation.
        settings (`dict`): By name; they must be the same where both have them.
        adapters (`dict[str, str]`): Version of each by its name in the directory. There may be others than before.
        dataset ([`~datasets.Dataset`]): Prompts. There may be more or fewer than before.

    Raises:
        ValueError: If the directory holds pictures that were made with other settings.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings, default=str))
    prompts = list(_digests(dataset))
    if path.is_file():
        known = json.loads(path.read_text())
        old = {**known["settings"], **{f"adapter {name}": version for name, version in known["adapters"].items()}}
        new = {**old, **settings, **{f"adapter {name}": version for name, version in adapters.items()}}
        changed = [
            f"{name}: {old[name]} there, {new[name]} now" for name in new if name in old and old[name] != new[name]
        ]
        both = zip(known["prompts"], prompts, strict=False)
        other = next((number for number, (first, second) in enumerate(both) if first != second), None)
        if other is not None:
            changed.append(f"prompt number {other}: another one, or with another value in another column")
        if changed:
            raise ValueError(
                f"output_dir={folder} holds an evaluation with other settings ({'; '.join(changed)}). Its pictures cannot "
                "be compared with new ones: choose another directory, or delete this one."
            )
        settings = {**known["settings"], **settings}
        adapters = {**known["adapters"], **adapters}
        prompts = max(known["prompts"], prompts, key=len)
    elif folder.is_dir() and not all(_PARTIAL.fullmatch(found.name) for found in folder.iterdir()):
        raise ValueError(f"output_dir={folder} holds something else than an evaluation. Choose another directory.")
    write_json(path, {"settings": settings, "adapters": adapters, "prompts": prompts})
    for partial in folder.rglob(".*.partial"):
        # What a killed process left; a young one may be another process's, at work in the same directory.
        with contextlib.suppress(FileNotFoundError):
            if _PARTIAL.fullmatch(partial.name) and time.time() - partial.stat().st_mtime > 60:
                partial.unlink()


def _digests(dataset: Dataset) -> Iterator[str]:
    """What is in each row, its pictures as their files are."""
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    for name in pictures:
        dataset = dataset.cast_column(name, ImageFeature(decode=False))
    for row in dataset:
        files = [row.pop(name) for name in pictures]
        contents = [
            file and (Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]) for file in files
        ]
        hashes = [content and hashlib.sha256(content).hexdigest() for content in contents]
        yield digest([row, hashes] if pictures else row)


def takes_batches(pipeline: "DiffusionPipeline", prompts: list[str], sampling: dict) -> bool:
    """
    Whether a pipeline makes of several prompts what it makes of each.

    Some refuse a list, and some mix up the rows under guidance, which nothing but a look at the result shows: the second
    of two prompts, from the same noise, has to come out nearer to itself than to the first.
    """
    first, second = prompts[0], next((prompt for prompt in prompts if prompt != prompts[0]), None)
    if second is None:
        return False
    sampling = {**sampling, "num_inference_steps": 2, "output_type": "np"}

    def pictures(prompt: str | list[str], count: int) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(0) for _ in range(count)]
        output = pipeline(prompt=prompt, generator=generators if count > 1 else generators[0], **sampling)
        return np.asarray(pictures_of(output, pipeline), dtype=np.float32)

    try:
        together, alone = pictures([first, second], 2), pictures(second, 1)[0]
        batched = float(np.abs(together[1] - alone).max()) <= 0.25 * float(np.abs(together[0] - alone).max())
        reason = "it mixes up their rows"
    except Exception as error:  # whatever a pipeline raises that is not made for several prompts
        batched, reason = False, f"{type(error).__name__}: {error}"
    if not batched:
        logger.warning(
            f"{type(pipeline).__name__} does not take several prompts at once ({reason}): pictures are made one by one."
        )
    return batched


def pictures_of(output, pipeline: "DiffusionPipeline"):
    """Pictures, or videos, in what a pipeline returned."""
    for name in ("images", "frames"):
        if hasattr(output, name):
            return getattr(output, name)
    raise ValueError(f"{type(pipeline).__name__} makes neither pictures nor videos.")


def save_picture(picture: Image.Image | list[Image.Image], path: Path) -> None:
    """Save a picture, or a video as an animated PNG, without loss. A file of that name is always whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if isinstance(picture, Image.Image):
        picture.save(partial, "PNG")
    else:
        first, *others = picture
        # Frames that differ in how they are blended are kept, also where they are the same.
        blend = [i % 2 for i in range(len(picture))]
        first.save(partial, "PNG", save_all=True, append_images=others, duration=FRAME_DURATION, blend=blend)
    os.replace(partial, path)


def load_picture(path: Path) -> Image.Image | list[Image.Image]:
    """What [`save_picture`] has saved."""
    with Image.open(path) as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    return frames if len(frames) > 1 else frames[0]


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def digest(content) -> str:
    """A few letters that stand for settings or rows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def digest_of_files(paths: list[Path]) -> str:
    """
    A few letters that stand for what is in some files.

    All of it is read, a GiB or more in a second: times and sizes would call a copy another model, or a model that was
    trained further the same.
    """

    def content(path: Path) -> list[str]:
        with path.open("rb") as file:
            return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor(4) as executor:
        return digest(list(executor.map(content, sorted(paths))))


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
