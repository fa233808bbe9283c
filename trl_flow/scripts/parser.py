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

"""TRL's command-line parser, with settings from the environment, errors that name the offender, and help in groups."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from trl import TrlParser
from trl.scripts.utils import DataClass


MOST_CHOICES = 8  # more than these would push the help text off the screen
PREFIX = "TRL_FLOW_"
# What these say is not about the settings of a command.
OTHER_VARIABLES = {"TRL_FLOW_DEBUG", "TRL_FLOW_LAUNCHED", "TRL_FLOW_REWARD_TOKEN"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line per setting name: `--max_steps INT`, without the spelling with hyphens and the `--no_` twin."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=30, **kwargs)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if name.startswith("-") and not _is_hyphenated(name)]
        if action.nargs == 0 or action.nargs == "?":
            return f"{names[0]}, --no_{action.dest}" if action.default is True else ", ".join(names)
        value = _type_name(action).upper()
        if action.choices and len(action.choices) <= MOST_CHOICES:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{', '.join(names)} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action):
        # An empty default tells the reader nothing.
        if action.default is None or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "str")
    # Parsers of booleans and of choices are functions, whose names say nothing.
    return {"string_to_bool": "bool", "<lambda>": "name"}.get(name, name)


def _is_hyphenated(name: str) -> bool:
    return name.startswith("--") and "-" in name[2:]


class _HelpAllAction(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest=dest, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def file(name: str) -> str:
    return name


# Read before argparse begins, and known to it by this for help alone.
_CONFIG = argparse.Action(["--config"], "config", type=file, help="YAML file with settings by their names.")


class FlowParser(TrlParser):
    """
    A [`~trl.TrlParser`] for one `trl-flow` command.

    It differs from its parent in five ways: an abbreviated or unknown name is an error, with the nearest name as a
    hint; values in the YAML file are converted and checked exactly as on the command line; variables of the environment,
    `TRL_FLOW_LEARNING_RATE=1e-4`, are settings too, which come before the file's and after the command line's;
    `--config=FILE` works; and `--help` shows the settings in groups, those in no group only by name (`--help_all` explains
    them too).

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses whose fields are the settings.
        help_groups (`Mapping[str, list[str]]`):
            Group title to names of settings, in the order in which help shows them.
        launches (`bool`, *optional*, defaults to `False`):
            Whether arguments of `accelerate launch` are accepted beside the settings.
        help_texts (`Mapping[str, str]`, *optional*):
            Help of settings whose own does not say what the command makes of them.
        examples (`Iterable[str]`, *optional*):
            Command lines, with which help ends.
        **kwargs:
            Keyword arguments of [`~trl.TrlParser`].
    """

    def __init__(
        self,
        dataclass_types: Iterable[type],
        help_groups: Mapping[str, list[str]] | None = None,
        launches: bool = False,
        help_texts: Mapping[str, str] | None = None,
        examples: Iterable[str] = (),
        **kwargs,
    ):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.help_groups = dict(help_groups or {})
        self.launches = launches
        self.examples = list(examples)
        for name, text in {"help": "Explain the settings and exit.", **(help_texts or {})}.items():
            self._first_actions()[name].help = text
        self.usage = f"{self.prog} [--config FILE.yaml] [--NAME VALUE ...]" if self.settings else self.prog
        self.add_argument("--help_all", action=_HelpAllAction, help="Explain every setting and exit.")

    @property
    def settings(self) -> dict[str, dataclasses.Field]:
        """Field of each setting by name."""
        return {field.name: field for kind in self.dataclass_types for field in dataclasses.fields(kind) if field.init}

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[DataClass, ...]:
        """
        Parse the command line, the environment and the YAML file named by `--config`; the first of them wins.

        Keyword arguments and the result are those of [`~trl.TrlParser.parse_args_and_config`]. What remains, if it is
        asked for, are arguments that `accelerate launch` knows.
        """
        args = [part for arg in (sys.argv[1:] if args is None else args) for part in _split_config(arg)]
        if "--config" in args:
            position = args.index("--config") + 1
            if position == len(args) or args[position].startswith("--"):
                self.error("--config needs the path of a YAML file")
            if not os.path.isfile(args[position]):
                self.error(f"--config {args[position]}: no such file")
            if "--config" in args[position:]:
                self.error("--config is given twice")
            self._check_file(args[position])
        if not {"-h", "--help", "--help_all"} & set(args):
            self._check_variables()
        self._variables = self._find_variables()
        return super().parse_args_and_config(args, **kwargs)

    def _check_file(self, path: str) -> None:
        """Refuse what is no YAML file of settings by their names."""
        try:
            with open(path, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"--config {path}: not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
            self.error(f"--config {path}: expected settings by their names, such as `seed: 1`")
        if not isinstance(config.get("env", {}), dict):
            self.error(f"--config {path}: env: expected variables by their names, such as `HF_HOME: /data`")

    def parse_args_into_dataclasses(self, *args, **kwargs) -> tuple[DataClass, ...]:
        # What the file said has become the defaults. Its `env:` is for other variables than ours, which would come before
        # the file here, and after the environment.
        for variable, _ in sorted(self._find_variables().items() - self._variables.items()):
            self.error(f"configuration file: env: {variable}: write `{_setting(variable)}: ...`, outside of env")
        actions = self._first_actions()
        for variable, text in self._variables.items():
            action = actions[_setting(variable)]
            action.default = self._checked(action, self._value(action, text, variable), variable)
            action.required = False
        return super().parse_args_into_dataclasses(*args, **kwargs)

    def _find_variables(self) -> dict[str, str]:
        """The environment's settings. An empty variable is as good as none."""
        names = {_variable(name) for name in self.settings} - OTHER_VARIABLES
        return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}

    def _check_variables(self) -> None:
        """Refuse a misspelt variable; one that no command knows, and that looks like none, may be somebody else's."""
        from .launcher import LAUNCHED, launch_options

        known = {_variable(name) for name in self.settings} | OTHER_VARIABLES
        unknown = sorted(name for name in os.environ.keys() - known if name.startswith(PREFIX))
        # The process that launched this one has told already.
        if not unknown or not self.settings or LAUNCHED in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        from .completion import collect
        from .methods import METHODS
        from .training import make_training_parser

        launching = {option[2:] for option in launch_options()} | {"config"}
        settings = {name[2:] for context in collect().values() for name in context.settings} - launching
        settings |= make_training_parser(next(iter(METHODS))).settings.keys() | self.settings.keys()
        for variable in unknown:
            name = _setting(variable)
            if name in settings:
                continue  # of another command
            if name in launching:
                self.error(f"{variable}: give --{name} on the command line, variables stand for settings alone")
            if close := difflib.get_close_matches(name, settings, n=1, cutoff=0.8):
                self.error(f"unknown setting {variable} in the environment. Did you mean {_variable(close[0])}?")
            print(
                f"{self.prog}: warning: {variable} in the environment is no setting, and is ignored", file=sys.stderr
            )

    def _value(self, action: argparse.Action, text: str, variable: str) -> Any:
        """What would stand in a YAML file for the text of a variable."""
        if text in ("null", "~", "None"):
            return None
        kinds = self._kinds(action.dest)
        if text[0] in "[{" and (list in kinds or dict in kinds):
            try:
                return yaml.safe_load(text)
            except yaml.YAMLError:
                self.error(f"{variable}: {text!r} is not valid YAML")
        if action.nargs == "+" or (list in kinds and "," in text):
            return [item.strip() for item in text.split(",") if item.strip()]
        return text

    def _kinds(self, name: str) -> set[type]:
        """The types that a setting may have."""
        (hint,) = [hints[name] for kind in self.dataclass_types if name in (hints := typing.get_type_hints(kind))]
        union = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        return {typing.get_origin(kind) or kind for kind in union}

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        # argparse converts a default only if it is a string and never checks it against the choices, so that a file
        # could smuggle in `num_generations: 2.5` or make a list of letters from `reward_funcs: shapes`.
        actions = self._first_actions()
        known = {
            name: self._checked(actions[name], value, f"configuration file: {name}")
            for name, value in kwargs.items()
            if name in self.settings
        }
        others = {name: value for name, value in kwargs.items() if name not in self.settings}
        super().set_defaults_with_config(**known)
        if not self.launches or not others:
            self._refuse([f"--{name}" for name in others], "in the configuration file")
            return []
        from .launcher import flags_from_config, launch_options

        options = launch_options()
        self._refuse([f"--{name}" for name in others if f"--{name}" not in options], "in the configuration file")
        return flags_from_config(others)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        # Here, because after this the dataclasses are made, whose complaints would hide a misspelt name.
        if self.launches and unknown:
            from .launcher import unknown_to_accelerate

            self._refuse(unknown_to_accelerate(unknown), "on the command line")
        else:
            self._refuse(unknown, "on the command line")
        return namespace, unknown

    def _checked(self, action: argparse.Action, value: Any, where: str) -> Any:
        if value is None:
            if self.settings[action.dest].default is not None and type(None) not in self._kinds(action.dest):
                self.error(f"{where}: nothing is given, expected a value; leave it out for the default")
            return value
        if action.nargs == "+":
            values = value if isinstance(value, list) else [value]
            # As on the command line, settings of a reward are JSON.
            values = [json.dumps(item) if isinstance(item, dict) else item for item in values]
            return [self._converted(action, item, where) for item in values]
        if isinstance(value, (dict, list)):
            if type(value) not in self._kinds(action.dest):
                self.error(f"{where}: {value!r} is not a valid {_type_name(action)}")
            return value
        return self._converted(action, value, where)

    def _converted(self, action: argparse.Action, value: Any, where: str) -> Any:
        try:
            converted = action.type(str(value)) if action.type is not None else value
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            self.error(f"{where}: {value!r} is not a valid {_type_name(action)}")
        if action.choices is not None and converted not in action.choices:
            self.error(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}")
        return converted

    def _first_actions(self) -> dict[str, argparse.Action]:
        # Of `--name` and `--no_name` the first.
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)
        return actions

    def _refuse(self, unknown: list[str], where: str) -> None:
        if not unknown:
            return
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected value {name!r} {where}")
        known = [f"--{setting}" for setting in self.settings] + ["--config", "--help", "--help_all"]
        if self.launches:
            from .launcher import launch_options

            known += launch_options()
        close = difflib.get_close_matches(f"--{name.strip('-').replace('-', '_')}", known, n=1)
        self.error(f"unknown argument {name} {where}." + (f" Did you mean {close[0]}?" if close else ""))

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        actions = self._first_actions()
        groups = {title: [name for name in names if name in actions] for title, names in self.help_groups.items()}
        grouped = {name for names in groups.values() for name in names}
        others = [name for name in self.settings if name not in grouped]
        if everything or not groups:
            groups["Other settings" if groups else "Settings"], others = others, []
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions[name] for name in names)
            formatter.end_section()
        if others:
            formatter.start_section("Other settings, explained by --help_all")
            formatter.add_text(", ".join(others))
            formatter.end_section()
        formatter.start_section("General")
        if self.settings:
            formatter.add_argument(_CONFIG)
        formatter.add_arguments(actions[name] for name in ("help", "help_all") if name in actions)
        formatter.end_section()
        if self.settings:
            formatter.add_text(
                f"Every setting can also stand in a YAML file (--config) or in the environment, as {PREFIX}<NAME> (lists "
                "as a,b or [a, b]; null for none). The command line wins over the environment, the environment over the "
                "file."
            )
        formatter.add_text(self.epilog)
        examples = "".join(f"  {example}\n" for example in self.examples)
        return formatter.format_help() + (f"\nExamples:\n{examples}" if examples else "")


def _variable(setting: str) -> str:
    return f"{PREFIX}{setting.upper()}"


def _setting(variable: str) -> str:
    return variable.removeprefix(PREFIX).lower()


def _split_config(arg: str) -> list[str]:
    return ["--config", arg.removeprefix("--config=")] if arg.startswith("--config=") else [arg]
