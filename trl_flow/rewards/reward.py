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

"""What a reward function may say about itself, and the base class of those that have settings."""

import inspect
from typing import ClassVar, NamedTuple

import torch
from PIL import Image


class About(NamedTuple):
    """
    What a user should know of a reward before training on it.

    Attributes:
        definition (`str`): What it computes.
        scale (`str`): Range and typical values, and how others scale it.
        source (`str`): Paper or code that defines it.
        license (`str`): Of the weights that it loads.
        hacked_by (`str`): What is known to raise it without better pictures.
    """

    definition: str
    scale: str
    source: str
    license: str
    hacked_by: str


class RewardUnavailableError(OSError):
    """No sample can be scored now, and asking for fewer at once would not help: the server is gone, say."""


class Reward:
    """
    A reward function with settings. Any callable with the same arguments will do; attributes of the same names are read
    from it where it has them.

    A subclass takes its settings as keyword arguments, and loads nothing before [`Reward.prepare`] or its first call.

    Attributes:
        about ([`About`]): Shown by `trl-flow rewards show`.
        scope (`str`): `"sample"`: one score for each picture, whatever the others are. `"group"`: called with all
            pictures that are compared with each other, of one prompt; its scores mean nothing between groups.
        concurrent (`bool`): Whether it waits or computes outside of Python, so that it may run in a thread of its own
            while the next prompts are sampled. It is never called twice at a time.
        prompt_set (`str`, *optional*): Prompt set that a trainer takes when it is given no other.
        requires (`tuple[str, ...]`): Columns that the dataset must have.
        source (`dict[str, str]`): Where it came from, to be written into cards and checkpoints: a repository and its
            commit, a model.
    """

    about: ClassVar[About]
    scope: str = "sample"
    concurrent: bool = False
    prompt_set: str | None = None
    requires: tuple[str, ...] = ()

    @property
    def source(self) -> dict[str, str]:
        return {}

    def prepare(self, device: torch.device):
        """Loads what it needs, onto `device` unless a setting names another one. Called once, before training."""

    def release(self):
        """Frees what it can until the next call. Called when the pictures of a rollout have been scored."""

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float | None]:
        """
        One score for each of n pictures.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): n of each.
            kwargs: `completions` (the images), other columns of the dataset with n values each, `trainer_state`,
                `log_extra(column, values)` and `log_metric(name, value)`, as TRL's reward functions get them.

        Returns:
            `list[float | None]`: `None` where the reward does not apply, NaN where no score could be had.
        """
        raise NotImplementedError


def reward_settings(reward: type | object) -> dict[str, inspect.Parameter]:
    """
    Settings of a reward class by name.

    Args:
        reward (`type` or an object of it): The class.
    """
    parameters = inspect.signature(reward if isinstance(reward, type) else type(reward)).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
