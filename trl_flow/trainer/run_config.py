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

"""`config.yaml`, with which a run is repeated, of runs from the command line and from Python."""

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from peft import LoraConfig

from .. import __version__
from ..prompts import PROMPT_SETS, prompts_name
from ..rewards import reward_name
from ..rewards.loading import is_directory, parse_reward, public_reward


CONFIG_FILE = "config.yaml"
# Settings that say how a run was started, not what it is, and deprecated twins of others.
NOT_PART_OF_A_RUN = {
    "dry_run",
    "print_config",
    "resume_from_checkpoint",
    "local_rank",
    "ddp_backend",
    "disable_tqdm",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
}
# Settings that may name a file or a directory.
_MAYBE_PATHS = ("model_name_or_path", "adapter_name_or_path", "dataset_name", "eval_dataset_name", "noise_level")
# Names of settings whose values are nobody's business.
_SECRET = re.compile(r"--\w*(token|key|password)(=.*)?", re.DOTALL)


def own_fields(config_class: type) -> list[str]:
    """Names of the settings that trl-flow's config classes introduce, those of the method first."""
    owners = {}
    for kind in reversed(config_class.__mro__):
        for name in kind.__dict__.get("__annotations__", {}):
            owners.setdefault(name, kind)
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    ours = [kind for kind in config_class.__mro__ if kind.__module__.partition(".")[0] == "trl_flow"]
    return [name for kind in ours for name in names if owners[name] is kind]


def resolved_config(script_args: Any, training_args: Any) -> dict[str, Any]:
    """
    The settings of a run, complete enough to repeat it from any directory: all of ours, and those of the base class that
    differ from their defaults. Paths are absolute; tokens are left out.

    Args:
        script_args (dataclass, *optional*):
            What a command takes beside the trainer's settings.
        training_args ([`FlowGRPOConfig`]):
            The trainer's settings.
    """
    ours = set(own_fields(type(training_args)))
    fields = {field.name: field for field in dataclasses.fields(training_args)}
    values = {
        name: value
        for name, value in training_args.to_dict().items()
        if name in ours or name == "output_dir" or not _is_default(fields[name], value)
    }
    if script_args is not None:
        values = {**dataclasses.asdict(script_args), **values}
        fields |= {field.name: field for field in dataclasses.fields(script_args)}
    for name in ("reward_funcs", "eval_reward_funcs"):
        if values.get(name):
            values[name] = [_absolute_reward(public_reward(reward)) for reward in values[name]]
    values |= {name: _absolute(values[name]) for name in _MAYBE_PATHS if name in values}
    # None is left out where it is what an absent setting becomes, and kept where it stands for something else.
    kept = {
        name: value
        for name, value in values.items()
        if not (value is None and _default(fields[name]) is None)
        and not name.endswith("_token")
        and name not in NOT_PART_OF_A_RUN
    }
    # Through JSON: enums, tuples and paths become what YAML writes without Python tags.
    return json.loads(json.dumps(kept, default=str))


def _absolute(name: Any) -> Any:
    """The absolute path of a file or directory; what has a name of its own, or is nowhere here, as it is."""
    named = not isinstance(name, str) or name == "shapes" or name in PROMPT_SETS
    return name if named or not os.path.exists(name) else os.path.abspath(name)


def _absolute_reward(reward: str) -> str:
    name, settings = parse_reward(reward)
    if not is_directory(name):
        return reward
    return json.dumps({os.path.abspath(name): settings}) if settings else os.path.abspath(name)


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    from transformers.trainer_pt_utils import AcceleratorConfig

    # Not by comparison with a second, default config: making one would reset the state of the process group.
    default = _default(field)
    if field.name == "accelerator_config":
        return value.items() <= AcceleratorConfig().to_dict().items()
    if value == []:
        return default in ("", "none", [])  # what `debug` and `report_to` become
    return value == getattr(default, "value", default)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def family_settings(policy) -> dict[str, Any]:
    """What the pipeline's family gave where nothing was said: it is written down, as records may change."""
    sizes = ("height", "width", "num_frames")
    settings = {name: policy.call_arguments[name] for name in sizes if name in policy.call_arguments}
    if policy.family.guidance is not None:
        settings["guidance_scale"] = policy.guidance_scale
    if policy.negative_prompt is not None:
        settings["negative_prompt"] = policy.negative_prompt
    return settings


def write_config(config: dict[str, Any], command: str, missing: Sequence[str] = ()) -> Path:
    """
    Write `config.yaml` into the run's directory.

    Args:
        config (`dict`):
            The settings.
        command (`str`):
            The method's command.
        missing (`Sequence[str]`, *optional*):
            What a file cannot hold of this run, one line each.
    """
    path = Path(config["output_dir"]) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    repeats = (
        "repeats this run"
        if not missing
        else "is as much of this run, which was started from Python, as a file can hold"
    )
    head = f"# trl-flow {__version__}: `trl-flow {command} --config {path} --output_dir ELSEWHERE` {repeats}.\n"
    head += "".join(f"# Not here: {' '.join(line.split())}\n" for line in missing)
    path.write_text(head + as_yaml(config))
    return path


def as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)


def public_command_line(words: Sequence[str]) -> str:
    """A command line for others to read: without tokens, and of absolute paths the name alone."""
    public, skip = ["trl-flow"], False
    for word in words:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = False
        if secret := _SECRET.fullmatch(word):
            skip = secret[2] is None
            continue
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value.lstrip().startswith("{"):
            value = public_reward(value)
        value = re.sub(r"(?<=://)[^/@\s]+@", "", value)
        public.append(name + equals + (Path(value).name if os.path.isabs(value) else value))
    return shlex.join(public)


def python_config(trainer, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    Settings of a run that was started from Python, in the words of the commands.

    Args:
        trainer ([`FlowGRPOTrainer`]):
            The trainer.
        given (`dict`):
            Arguments of the trainer by their names.

    Returns:
        `tuple[dict, list[str]]`: the settings, and what they cannot say.
    """
    config, missing = {"model_name_or_path": given["model"]}, []
    if not isinstance(given["model"], str):
        # Without a name a command would train another model; with this one it says what is missing.
        name = f"{type(given['model']).__name__} in memory"
        config["model_name_or_path"] = trainer.base_model or name
        missing.append(f"model, a {name}")
    for argument in ("reward_funcs", "eval_reward_funcs"):
        rewards = given[argument]
        rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [] if rewards is None else [rewards]
        named = [_reward_spec(reward) for reward in rewards]
        missing += [f"{argument}, {_described(r)}" for r, spec in zip(rewards, named, strict=True) if spec is None]
        if named := [spec for spec in named if spec is not None]:
            config[argument] = named
    evaluates = given["eval_dataset"] is not None and trainer.args.eval_strategy != "no"
    for argument, setting in (("train_dataset", "dataset_name"), ("eval_dataset", "eval_dataset_name")):
        dataset = given[argument]
        if dataset is None or (argument == "eval_dataset" and not evaluates):
            continue
        name = prompts_name(dataset)
        if name is not None:
            config[setting] = name
        if not isinstance(dataset, (str, os.PathLike)):
            missing.append(f"{argument}, {_described(dataset)}")
    adapter, missed = _adapter_settings(given["peft_config"])
    config |= adapter | resolved_config(None, trainer.args) | family_settings(trainer.policy)
    missing += missed
    missing += [f"callbacks, {type(callback).__name__}" for callback in given["callbacks"] or []]
    missing += ["optimizers"] * any(part is not None for part in given["optimizers"])
    return config, missing


def python_call(trainer, given: dict[str, Any]) -> str:
    """The call of the trainer with the settings of `config.yaml`, as Python."""
    name, command = type(trainer).__name__, trainer._tag_names[-1]
    arguments = []
    for argument, value in given.items():
        if value is None or value == (None, None):
            continue
        several = isinstance(value, (list, tuple))
        written = [_written(argument, entry) for entry in (value if several else [value])]
        text = ", ".join(code for code, _ in written)
        comments = ", ".join(comment for _, comment in written if comment)
        arguments.append(
            f"    {argument}={f'[{text}]' if several else text}," + (f"  # {comments}" if comments else "")
        )
    arguments.insert(min(2, len(arguments)), "    args=args,")
    return "\n".join(
        [
            "import trl_flow",
            "from trl_flow.scripts.training import make_training_parser",
            "",
            f'_, args = make_training_parser("{command}").parse_args_and_config(["--config", "{CONFIG_FILE}"])',
            f"trainer = trl_flow.{name}(",
            *arguments,
            ")",
            "trainer.train()",
        ]
    )


def _written(argument: str, value: Any) -> tuple[str, str]:
    """A trainer's argument as code, and a comment on what the code's names stand for."""
    if argument.endswith("reward_funcs") and (spec := _reward_spec(value)) is not None:
        return json.dumps(spec, ensure_ascii=False), ""
    if isinstance(value, str):
        return json.dumps(Path(value).name if os.path.isabs(value) else value, ensure_ascii=False), ""
    if argument.endswith("reward_funcs"):
        return re.sub(r"\W", "_", reward_name(value)).strip("_"), ""
    return argument, _described(value)


def _reward_spec(reward: Any) -> str | dict | None:
    """A reward as a file can hold it; `None` where it is a function that nothing can import."""
    if isinstance(reward, (str, dict)):
        name, _ = parse_reward(reward)
        return public_reward(reward) if isinstance(name, str) else None
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", None)
    if (
        not isinstance(module, str)
        or module == "__main__"
        or getattr(sys.modules.get(module), str(name), None) is not reward
    ):
        return None
    return f"{module}.{name}"


def _described(value: Any) -> str:
    if isinstance(value, Dataset):
        name = prompts_name(value)
        return f"{len(value)} rows" + (f" of {Path(name).name if os.path.isabs(name) else name}" if name else "")
    if isinstance(value, LoraConfig):
        settings = _differences(LoraConfig(), value)
        settings = {key: sorted(entry) if isinstance(entry, set) else entry for key, entry in settings.items()}
        return f"LoraConfig({', '.join(f'{key}={entry!r}' for key, entry in settings.items())})"
    return getattr(value, "__qualname__", type(value).__name__)


def _adapter_settings(peft_config: Any) -> tuple[dict[str, Any], list[str]]:
    """The adapter in the words of the commands, and what they cannot say of it."""
    if peft_config is None:
        return {}, []
    if not isinstance(peft_config, LoraConfig):
        return {}, [f"peft_config, {_described(peft_config)}"]
    settings = {"lora_r": peft_config.r, "lora_alpha": peft_config.lora_alpha, "use_dora": peft_config.use_dora}
    if isinstance(peft_config.target_modules, (list, set, tuple)):
        settings["lora_target_modules"] = sorted(peft_config.target_modules)
    # A command initialises as the papers do.
    said = LoraConfig(
        r=peft_config.r,
        lora_alpha=peft_config.lora_alpha,
        use_dora=peft_config.use_dora,
        target_modules=settings.get("lora_target_modules"),
        init_lora_weights="gaussian",
    )
    values, others = _differences(said, peft_config), []
    if values:
        others = [f"peft_config, {', '.join(f'{name}={value!r}' for name, value in values.items())}"]
    return settings, others


def _differences(config: Any, other: Any) -> dict[str, Any]:
    """Values of the fields of `other` that differ from those of `config`."""
    names = [field.name for field in dataclasses.fields(other) if field.init]
    return {name: getattr(other, name) for name in names if getattr(other, name) != getattr(config, name)}
