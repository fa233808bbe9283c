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

"""From what a user writes to the reward function that it names."""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .reward import reward_settings


# Name -> "module:attribute", relative to this package; imported on first use.
REWARDS = {
    "aesthetic": ".aesthetic:AestheticReward",
    "clip": ".clip:CLIPReward",
    "geneval": ".geneval:GenEvalReward",
    "hpsv2": ".clip:HPSv2Reward",
    "image_reward": ".image_reward:ImageRewardReward",
    "jpeg_size": ".jpeg_size:JPEGSizeReward",
    "ocr": ".ocr:OCRReward",
    "pickscore": ".clip:PickScoreReward",
    "remote": ".remote:RemoteReward",
    "shapes": "..shapes:shapes_reward",
    "shapes_partial": "..shapes:shapes_partial",
    "shapes_strict": "..shapes:shapes_strict",
    "unified_reward": ".judges:UnifiedReward",
    "unigenbench": ".judges:UniGenBenchReward",
    "win_rate": ".judges:WinRateReward",
    "yes_no": ".judges:YesNoReward",
}

RewardSpec = str | dict | Callable

SECRETS = ("api_key", "token")

_FORMS = (
    f"Expected a function, the name of a built-in reward ({', '.join(REWARDS)}), one with settings "
    "({'ocr': {'match': 'exact'}}), a Hub repository with a reward.py ('user/repo', 'user/repo@revision'), a directory "
    "with one ('./my_reward'), an evaluate module ('evaluate:user/space'), a server ('http://host:port', "
    "'openai:MODEL@http://host/v1'), or a dotted path ('my_rewards.brightness')."
)
# A repository, and a branch, tag or commit of it.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def parse_reward(reward: RewardSpec) -> tuple[str | Callable, dict]:
    """
    What is named, and its settings.

    Args:
        reward (`str`, `dict` or `Callable`): As for [`load_reward`].

    Raises:
        ValueError: If `reward` has none of the forms that [`load_reward`] takes.
    """
    if isinstance(reward, str) and reward.lstrip().startswith("{"):
        try:
            reward = json.loads(reward)
        except json.JSONDecodeError as error:
            raise ValueError(f"reward={reward!r} is no JSON ({error}). {_FORMS}") from error
    if isinstance(reward, dict):
        if len(reward) != 1:
            raise ValueError(
                f"reward={reward!r} has {len(reward)} names: expected one, with its settings: {{'ocr': {{'match': "
                "'exact'}}. Several rewards are a list."
            )
        (name, settings), *_ = reward.items()
        if not isinstance(name, str) or not isinstance(settings, (dict, type(None))):
            raise ValueError(f"reward={reward!r}: expected a name and its settings: {{'ocr': {{'match': 'exact'}}}}.")
        return name, settings or {}
    if isinstance(reward, str) or callable(reward):
        return reward, {}
    raise ValueError(f"reward={reward!r} is a {type(reward).__name__}. {_FORMS}")


def load_reward(
    reward: RewardSpec, revision: str | None = None, trust_remote_code: bool | None = None, **settings
) -> Callable:
    """
    The reward function that `reward` names.

    A reward function is called as `reward(prompts=list[str], images=list[PIL.Image], completions=images, **columns,
    trainer_state=, log_extra=, log_metric=)`, where `columns` are the other columns of the dataset, and returns one
    number per picture: `None` where it does not apply, NaN where no score could be had. It may be `async`. [`Reward`]
    says what else it may have.

    Args:
        reward (`str`, `dict` or `Callable`): One of

            - a function;
            - the name of a built-in reward (`"pickscore"`), alone or with settings (`{"ocr": {"match": "exact"}}`, also
              as JSON text);
            - a model repository on the Hub with a `reward.py` (`"user/repo"`, `"user/repo@revision"`), or a directory
              with one (`"./my_reward"`);
            - a module of the evaluate library (`"evaluate:user/space"`);
            - a reward server (`"http://host:port"`, see `trl-flow rewards serve`), or a judge behind an endpoint that
              speaks OpenAI's protocol (`"openai:MODEL@http://host/v1"`);
            - the dotted path of a function that can be imported from the working directory (`"my_rewards.brightness"`).
        revision (`str`, *optional*): Branch, tag or commit of a repository on the Hub.
        trust_remote_code (`bool`, *optional*): Consent to run the code of a repository or directory. `None` asks, if
            there is a terminal to ask on; without consent, nothing of it runs.
        settings: Settings of a built-in reward, as with a `dict`.

    Raises:
        ValueError: If nothing answers to that name, it has no such setting, or its code is not to be trusted.
        ImportError: If it needs a package that is not installed.
    """
    name, given = parse_reward(reward)
    settings = {**given, **settings}
    if isinstance(name, str) and revision is None and "@" in name and _is_repository(name.partition("@")[0]):
        name, _, revision = name.partition("@")
    from_hub = isinstance(name, str) and (_is_repository(name) or is_directory(name) or name.startswith("evaluate:"))
    if revision is not None and not from_hub:
        raise ValueError(f"revision={revision!r}: reward={name!r} comes from no repository. Leave it out.")
    if callable(name):
        return _with_settings(name, settings, repr(name))
    if name in REWARDS:
        module_name, attribute = REWARDS[name].split(":")
        return _with_settings(
            getattr(importlib.import_module(module_name, __package__), attribute), settings, f"reward={name!r}"
        )
    if name.startswith("evaluate:"):
        from .evaluate_module import load_evaluate_module

        return load_evaluate_module(
            name.removeprefix("evaluate:"), revision=revision, trust_remote_code=trust_remote_code, **settings
        )
    if name.startswith("openai:"):
        from .judges import load_judge

        return load_judge(name.removeprefix("openai:"), **settings)
    if name.startswith(("http://", "https://")):
        from .remote import RemoteReward

        return _with_settings(RemoteReward, {"url": name, **settings}, f"reward={name!r}")
    if from_hub:
        from .hub import load_hub_reward

        found = load_hub_reward(name, revision=revision, trust_remote_code=trust_remote_code)
        return _with_settings(found, settings, f"reward={name!r}")
    return _with_settings(_import(name), settings, f"reward={name!r}")


def is_directory(name: str) -> bool:
    """Whether a reward is named by its directory."""
    return os.path.isdir(name) and (os.sep in name or name.startswith(".") or (Path(name) / "reward.py").is_file())


def _is_repository(name: str) -> bool:
    return not is_directory(name) and bool(_REPOSITORY.fullmatch(name)) and not name.startswith((".", "/"))


def _import(name: str):
    module_name, _, attribute = name.rpartition(".")
    if not re.fullmatch(r"\w+(\.\w+)+", name):
        raise ValueError(f"reward={name!r} is unknown. {_FORMS}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"reward={name!r} could not be imported ({error}). {_FORMS}") from error
    if not callable(found):
        raise ValueError(f"reward={name!r} is a {type(found).__name__}, not a function. {_FORMS}")
    return found


def _with_settings(reward: Callable, settings: dict, shown: str) -> Callable:
    """An instance of a reward class; a function as it is."""
    if not inspect.isclass(reward):
        if settings:
            raise ValueError(f"{shown} takes no settings: got {settings}.")
        return reward
    known = reward_settings(reward)
    if unknown := sorted(settings.keys() - known.keys()):
        raise ValueError(f"{shown} has no setting {', '.join(unknown)}: expected {', '.join(known) or 'none'}.")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in settings]
    if missing:
        example = json.dumps({shown.removeprefix("reward=").strip("'"): dict.fromkeys(missing, "...")})
        raise ValueError(f"{shown} needs the setting {', '.join(missing)}: {example}.")
    return reward(**settings)


def public_reward(reward: RewardSpec) -> RewardSpec:
    """
    A reward as it may be written into files: without keys and tokens.

    Args:
        reward (`str`, `dict` or `Callable`): As for [`load_reward`].
    """
    name, settings = parse_reward(reward)
    public = {key: value for key, value in settings.items() if key not in SECRETS}
    if public == settings:
        return reward
    public = {name: public}
    return json.dumps(public) if isinstance(reward, str) else public


def reward_name(reward: RewardSpec) -> str:
    """
    Name under which a reward is logged: the last part of what it was asked for by, or the function's own.

    Args:
        reward (`str`, `dict` or `Callable`): As for [`load_reward`].
    """
    name, _ = parse_reward(reward)
    if not isinstance(name, str):
        return getattr(name, "__name__", type(name).__name__)
    if name in REWARDS:
        return name
    if name.startswith("openai:"):
        name = name.removeprefix("openai:").partition("@")[0]
        return name.rpartition("/")[2]
    if name.startswith(("http://", "https://")):
        return name.partition("://")[2].rpartition("@")[2].strip("/").replace("/", "_")
    if name.startswith("evaluate:") or is_directory(name) or _is_repository(name.partition("@")[0]):
        return Path(name.removeprefix("evaluate:").partition("@")[0]).resolve().name
    return name.rpartition(".")[2]
