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

"""Modules of the `evaluate` library (metrics, measurements) as reward functions."""

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from datasets import Value
from evaluate import EvaluationModule
from PIL import Image

from .hub import fetch, import_file
from .reward import About, Reward


# What is usually meant by the names that modules give their inputs.
_COLUMNS = {"predictions": "images", "data": "images", "references": "prompts"}


def load_evaluate_module(
    name: str, revision: str | None = None, trust_remote_code: bool | None = None, **settings
) -> "EvaluateReward":
    """
    An `evaluate` module from a Space or a directory, as a reward function.

    The library itself would run the code of any Space without asking. Here it passes the same gate as a reward from
    the Hub, and the Space's revision is a commit.

    Args:
        name (`str`): Id of a Space (`"user/space"`, `"user/space@revision"`), a directory that holds a file of its own
            name (`"./brightness"` with `brightness.py`), or such a file: then its revision is a hash of the file and
            of what it imports relatively, not of all that lies beside it.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*): See
            [`~trl_flow.rewards.hub.load_hub_reward`].
        settings: Of [`EvaluateReward`].

    Raises:
        ValueError: If there is no such module, its code is not to be trusted, or a setting doesn't fit.
    """
    if revision is None and "@" in name and not os.path.exists(name):
        name, _, revision = name.partition("@")
    shown = f"reward='evaluate:{name}'"
    if "/" not in name and not os.path.exists(name):
        raise ValueError(
            f"{shown}: expected a Space with its owner, such as 'evaluate:evaluate-metric/{name}', or a directory."
        )
    place, is_file = name, os.path.isfile(name)
    if is_file:
        place, filename = os.path.dirname(name) or ".", os.path.basename(name)
    else:
        filename = f"{Path(name).resolve().name}.py"
    directory, source = fetch(
        place, filename, revision, trust_remote_code, repo_type="space", prefix="evaluate:", only_file=is_file
    )
    if unknown := sorted(settings.keys() - {"score", "inputs", "config_name", "arguments"}):
        raise ValueError(
            f"{shown} has no setting {', '.join(unknown)}: expected score, inputs, config_name, arguments (what the "
            "module's own `compute` takes)."
        )
    return EvaluateReward(_module_class(directory / filename, source, shown), source, shown, **settings)


def _module_class(path: Path, source: dict[str, str], shown: str) -> type:
    # As `evaluate.load` does, but with our importer: that of the library follows URLs in comments.
    module = import_file(path, source, shown)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, EvaluationModule) and value.__module__ == module.__name__
    ]
    if not classes:
        raise ValueError(f"{shown}: {path.name} defines no evaluate.Metric, Comparison or Measurement.")
    return classes[0]


class EvaluateReward(Reward):
    """
    Scores pictures with an `evaluate` module.

    Where the module returns a list with one number per sample, it is called on the batch; where it returns one number,
    for each sample on its own.

    Args:
        module_class (`type`): Class of the module.
        source (`dict[str, str]`), shown (`str`): Where it came from, and its name for messages.
        score (`str`, *optional*): Key of the score in what the module returns. By default its only key.
        inputs (`dict[str, str]`, *optional*): Which column each input of the module gets: `"images"`, `"prompts"`, or
            another one of the dataset. By default `predictions` and `data` get the images, `references` the prompts,
            and any other input the column of its own name.
        config_name (`str`, *optional*): Configuration of the module.
        arguments (`dict`, *optional*): More arguments of the module's `compute`.
    """

    def __init__(
        self,
        module_class: type,
        source: dict[str, str],
        shown: str = "evaluate module",
        score: str | None = None,
        inputs: Mapping[str, str] | None = None,
        config_name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        # In memory, because processes would share a file; with a seed, because the library draws one.
        self._module = module_class(config_name=config_name, keep_in_memory=True, seed=0)
        self._module.download_and_prepare()
        self._source, self._shown, self._score, self._arguments = source, shown, score, dict(arguments or {})
        alternatives = self._module.features
        alternatives = alternatives if isinstance(alternatives, list) else [alternatives]
        names = list(alternatives[0])
        if unknown := sorted(set(inputs or {}) - set(names)):
            raise ValueError(f"{shown} has no input {', '.join(unknown)}: expected {', '.join(names)}.")
        self._columns = {name: (inputs or {}).get(name, _COLUMNS.get(name, name)) for name in names}
        of_images = [name for name, column in self._columns.items() if column == "images"]
        fitting = [features for features in alternatives if all(_takes_images(features[name]) for name in of_images)]
        if not of_images or not fitting:
            wanted = "; ".join(str(dict(features)) for features in alternatives)
            raise ValueError(
                f"{shown} can't be given images as {', '.join(of_images) or 'any input'}: it takes {wanted}. Say with "
                "`inputs` which column each input gets, one of them 'images'."
            )
        self._features = fitting[0]
        self._one_by_one = False
        self.requires = tuple(dict.fromkeys(c for c in self._columns.values() if c not in ("images", "prompts")))

    @property
    def source(self) -> dict[str, str]:
        return self._source

    @property
    def about(self) -> About:
        info = self._module.info
        return About(
            definition=info.description.strip() or "The module does not say.",
            scale="As the module returns it.",
            source=info.homepage or " ".join(info.codebase_urls) or "The module does not say.",
            license=info.license or "not stated by the module",
            hacked_by="Not known.",
        )

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float]:
        columns = {**kwargs, "prompts": prompts, "images": images}
        if missing := [column for column in self._columns.values() if column not in columns]:
            raise ValueError(f"{self._shown} needs the column {', '.join(missing)}, which the dataset has not.")
        batch = {}
        for name, column in self._columns.items():
            values = columns[column]
            batch[name] = [_as_input(v, self._features[name]) for v in values] if column == "images" else values
        if not self._one_by_one:
            value = self._compute(batch)
            if isinstance(value, (list, tuple, np.ndarray)):
                if len(value) != len(images):
                    raise ValueError(f"{self._shown} returned {len(value)} scores for {len(images)} pictures.")
                return [_number(v) for v in value]
            self._one_by_one = len(images) > 1
            if len(images) == 1:
                return [_number(value)]
        rows = ({name: [values[i]] for name, values in batch.items()} for i in range(len(images)))
        # One number, or a list with one.
        return [_number(np.asarray(self._compute(row)).item()) for row in rows]

    def _compute(self, batch: dict[str, list]):
        try:
            result = self._module.compute(**batch, **self._arguments)
        finally:
            # After an exception the library would keep these samples for the next call.
            self._module.writer = None
        if self._score is None and len(result) != 1:
            raise ValueError(f"{self._shown} returns {', '.join(result)}: say which with `score`.")
        key = self._score if self._score is not None else next(iter(result))
        if key not in result:
            raise ValueError(f"{self._shown} returns no {key!r}, but {', '.join(result)}: say which with `score`.")
        return result[key]


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _takes_images(feature) -> bool:
    return isinstance(feature, ImageFeature) or not isinstance(feature, Value)


def _as_input(image: Image.Image, feature) -> Image.Image | np.ndarray:
    # A picture that came from a JPEG file would be compressed once more: `convert` makes it forget.
    image = image.convert("RGB")
    return image if isinstance(feature, ImageFeature) else np.asarray(image)
