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

"""From a reward's name to its function."""

import importlib
import os
import sys
from collections.abc import Callable


# Name -> "module:function"; imported on first use.
REWARDS = {
    "shapes": "trl_flow.shapes:shapes_reward",
    "shapes_partial": "trl_flow.shapes:shapes_partial",
    "shapes_strict": "trl_flow.shapes:shapes_strict",
}


def load_reward(reward: str | Callable) -> Callable:
    """
    The reward function that `reward` names.

    A reward function is called as `reward(prompts=list[str], images=list[PIL.Image], completions=images, **columns,
    trainer_state=, log_extra=, log_metric=)`, where `columns` are the other columns of the dataset, and returns one
    number per picture, or `None` (or NaN) where it has no score. It may be `async`.

    Args:
        reward (`str` or `Callable`): A function, the name of a built-in one, or the dotted path of one that can be
            imported from the working directory (`"my_rewards.brightness"`).

    Raises:
        ValueError: If nothing answers to that name.
    """
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise ValueError(f"reward={reward!r} is a {type(reward).__name__}: expected a function or a name.")
    known = f"Built-in rewards: {', '.join(REWARDS)}. Otherwise give a dotted path such as 'my_rewards.brightness'."
    if reward in REWARDS:
        module_name, function_name = REWARDS[reward].split(":")
    elif "." in reward:
        module_name, _, function_name = reward.rpartition(".")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
    else:
        raise ValueError(f"reward={reward!r} is unknown. {known}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"reward={reward!r} could not be imported ({error}). {known}") from error
    if not callable(function):
        raise ValueError(f"reward={reward!r} is a {type(function).__name__}, not a function. {known}")
    return function


def reward_name(reward: str | Callable) -> str:
    """Name under which a reward is logged: the name it was asked for by, or the function's own."""
    if isinstance(reward, str):
        return reward.rpartition(".")[2]
    return getattr(reward, "__name__", type(reward).__name__)
