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

"""`trl-flow completion`: a script that completes commands, settings and choices without starting Python."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from .methods import METHODS


SHELLS = {
    "bash": "trl-flow completion bash > ~/.local/share/bash-completion/completions/trl-flow",
    "zsh": "trl-flow completion zsh > DIRECTORY_OF_FPATH/_trl-flow",
    "fish": "trl-flow completion fish > ~/.config/fish/completions/trl-flow.fish",
}
GENERAL = ["--help", "--version", "--debug"]
LONGEST_DESCRIPTION = 80


class Setting(NamedTuple):
    """One setting: its choices, of which there may be none to name, whether it takes a value, and what it is."""

    choices: tuple[str, ...] = ()
    takes_value: bool = True
    description: str = ""


class Context(NamedTuple):
    """A command, or one of its actions: what can follow it at once, and its settings by their names, such as `--seed`."""

    words: tuple[str, ...]
    settings: dict[str, Setting]


class CompletionParser(argparse.ArgumentParser):
    """Takes the name of a shell."""

    def __init__(self, prog: str | None = None):
        lines = "\n".join(f"  {line}" for line in SHELLS.values())
        super().__init__(
            prog=prog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            description="Print a script that completes commands, settings and choices in a shell.",
            epilog=f"Write it where your shell looks for such scripts:\n{lines}\n\nThe script knows the settings of this "
            f"version, {__version__}:\nwrite it again after an update.",
        )
        self.add_argument("shell", choices=list(SHELLS), help="bash, zsh or fish")

    def parse_args_and_config(self, args: list[str]) -> tuple[str]:
        unknown = [arg for arg in args if arg.startswith("-") and arg not in ("-h", "--help")]
        if unknown:
            self.error(f"unknown argument {unknown[0]}: only the name of a shell is expected ({', '.join(SHELLS)})")
        return (self.parse_args(args).shell,)


def collect() -> dict[str, Context]:
    """What can be typed, by command, and by command and action where actions have settings of their own."""
    import trl
    from accelerate.commands.launch import launch_command_parser

    from ..cli import COMMANDS
    from .rewards import ACTIONS, ActionParser
    from .training import make_training_parser

    bundled = sorted(path.stem for path in Path(trl.__file__).parent.glob("accelerate_configs/*.yaml"))
    launching = {"--accelerate_config": Setting(tuple(bundled)), **settings_of(launch_command_parser())}
    contexts = {}
    for command in (name for commands in COMMANDS.values() for name in commands):
        if command in METHODS:
            contexts[command] = Context((), {**launching, **settings_of(make_training_parser(command))})
        elif command == "rewards":
            contexts[command] = Context(tuple(ACTIONS), {"--help": Setting((), False)})
            for action, (_, arguments, _) in ACTIONS.items():
                contexts[f"{command} {action}"] = Context((), settings_of(ActionParser(arguments)))
        else:
            module = importlib.import_module(f"trl_flow.scripts.{command.replace('-', '_')}")
            parser = module.make_parser(prog=f"trl-flow {command}")
            positional = [action.choices for action in parser._actions if not action.option_strings and action.choices]
            settings = settings_of(parser)
            # The action of `prompts` is a setting whose name can be left out.
            first = positional[0] if positional else settings.get("--action", Setting()).choices
            contexts[command] = Context(tuple(first), settings)
    return contexts


def settings_of(parser: argparse.ArgumentParser) -> dict[str, Setting]:
    """The settings of a command by name, as `--help_all` shows them."""
    from .parser import FlowParser

    # TrlParser reads --config before argparse does.
    takes_config = isinstance(parser, FlowParser) and parser.settings
    settings = {"--config": Setting(description="YAML file of settings")} if takes_config else {}
    for action in parser._actions:
        # Of the two spellings of a long name the one that is documented.
        for name in (name for name in action.option_strings if name.startswith("--") and "-" not in name[2:]):
            choices = tuple(str(getattr(choice, "value", choice)) for choice in action.choices or ())
            if action.nargs == "?" and not choices and not name.startswith("--no_") and _is_switch(action):
                choices = ("true", "false")
            takes_value = action.nargs != 0 and not (name.startswith("--no_") and _is_switch(action))
            settings[name] = Setting(choices, takes_value, _describe(action.help))
    return settings


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0 or isinstance(action.const, bool)


def _describe(text: str | None) -> str:
    """The first sentence of a help text, on one line."""
    text = " ".join((text or "").replace("%%", "%").split())
    sentence = re.split(r"(?<=[^.]\.)\s", text, maxsplit=1)[0].rstrip(".")
    return sentence if len(sentence) <= LONGEST_DESCRIPTION else f"{sentence[: LONGEST_DESCRIPTION - 4].rstrip()} ..."


def tables(contexts: dict[str, Context]) -> str:
    """Shell functions, for bash and zsh, that print the words which can follow."""
    training = [contexts[command].settings for command in METHODS if command in contexts]
    shared = [name for name in training[0] if all(name in settings for settings in training)] if training else []
    lines = [f"_trl_flow_shared={shlex.quote(' '.join(shared))}", "", "_trl_flow_words() {", '  case "$1" in']
    lines += [
        f"    {shlex.quote(name)}) echo {' '.join(context.words)} ;;"
        for name, context in contexts.items()
        if context.words
    ]
    lines += ["  esac", "}", "", "_trl_flow_settings() {", '  case "$1" in']
    for name, context in contexts.items():
        own = [setting for setting in context.settings if name not in METHODS or setting not in shared]
        common = ' "$_trl_flow_shared"' if name in METHODS else ""
        lines.append(f"    {shlex.quote(name)}) echo {shlex.quote(' '.join(own))}{common} ;;")
    lines += ["  esac", "}", "", "_trl_flow_choices() {", '  case "$1" in']
    for setting in dict.fromkeys(setting for context in contexts.values() for setting in context.settings):
        having = {name: context.settings[setting] for name, context in contexts.items() if setting in context.settings}
        by_choices = {}
        for name, found in having.items():
            by_choices.setdefault(found.choices, []).append(name)
        for choices, names in by_choices.items():
            if choices:
                pattern = (
                    f'*" {setting}"'
                    if len(by_choices) == 1
                    else "|".join(shlex.quote(f"{name} {setting}") for name in names)
                )
                lines.append(f"    {pattern}) echo {' '.join(map(shlex.quote, choices))} ;;")
    lines += ["  esac", "}"]
    return "\n".join(lines)


# Words before the one under the cursor say which command and action it belongs to.
BASH = """\
_trl_flow() {
  local word command="" action="" previous="" current="${COMP_WORDS[COMP_CWORD]}" words position
  for ((position = 1; position < COMP_CWORD; position++)); do
    word="${COMP_WORDS[position]}"
    [[ $word == "=" ]] && continue
    if [[ -z $command && $word != -* ]]; then
      command="$word"
    elif [[ $previous == "$command" && $word != -* && " $(_trl_flow_words "$command") " == *" $word "* ]]; then
      action="$word"
    fi
    previous="$word"
  done
  [[ $current == "=" ]] && current=""
  local context="$command"
  [[ -n $action && -n $(_trl_flow_settings "$command $action") ]] && context="$command $action"
  if [[ -z $command ]]; then
    words="$_trl_flow_commands $_trl_flow_general"
  elif [[ $current == -* ]]; then
    words="$(_trl_flow_settings "$context")"
  elif [[ $previous == "$command" ]]; then
    words="$(_trl_flow_words "$command")"
  elif [[ $previous == --* ]]; then
    words="$(_trl_flow_choices "$context $previous")"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
# Where there is nothing to say, a file is completed.
complete -o bashdefault -o default -F _trl_flow trl-flow
"""

ZSH = """\
_trl_flow() {
  local word command="" action="" previous="" current="${words[CURRENT]}" found="" position
  for ((position = 2; position < CURRENT; position++)); do
    word="${words[position]}"
    if [[ -z $command && $word != -* ]]; then
      command="$word"
    elif [[ $previous == "$command" && $word != -* && " $(_trl_flow_words "$command") " == *" $word "* ]]; then
      action="$word"
    fi
    previous="$word"
  done
  local context="$command"
  [[ -n $action && -n $(_trl_flow_settings "$command $action") ]] && context="$command $action"
  if [[ -z $command ]]; then
    found="$_trl_flow_commands $_trl_flow_general"
  elif [[ $current == -* ]]; then
    found="$(_trl_flow_settings "$context")"
  elif [[ $previous == "$command" ]]; then
    found="$(_trl_flow_words "$command")"
  elif [[ $previous == --* ]]; then
    found="$(_trl_flow_choices "$context $previous")"
  fi
  if [[ -n $found ]]; then
    compadd -- ${=found}
  else
    _files
  fi
}
# Found in fpath this file is the function's body; sourced, it makes itself known.
if [[ ${funcstack[1]} == _trl-flow ]]; then
  _trl_flow "$@"
else
  compdef _trl_flow trl-flow
fi
"""


def posix_script(shell: str, contexts: dict[str, Context]) -> str:
    commands = [name for name in contexts if " " not in name]
    head = [
        f"#compdef trl-flow\n# zsh completion of trl-flow {__version__}"
        if shell == "zsh"
        else f"# bash completion of trl-flow {__version__}"
    ]
    head += [
        f"_trl_flow_commands={shlex.quote(' '.join(commands))}",
        f"_trl_flow_general={shlex.quote(' '.join(GENERAL))}",
    ]
    return "\n".join([*head, tables(contexts), "", BASH if shell == "bash" else ZSH])


def fish_script(contexts: dict[str, Context], summaries: dict[str, str]) -> str:
    commands = [name for name in contexts if " " not in name]
    training = [name for name in commands if name in METHODS]
    lines = [
        f"# fish completion of trl-flow {__version__}",
        f"function __trl_flow_begins; not __fish_seen_subcommand_from {' '.join(commands)}; end",
        f"function __trl_flow_trains; __fish_seen_subcommand_from {' '.join(training)}; end",
    ]
    start = "__trl_flow_begins"
    for command in commands:
        lines.append(_fish(start, f"-f -a {command}", summaries.get(command, "")))
    lines += [_fish(start, f"-f -l {name.removeprefix('--')}", "") for name in GENERAL]
    alike = {}
    for name, context in contexts.items():
        command, _, action = name.partition(" ")
        if context.words:
            inside = (
                f"__fish_seen_subcommand_from {command}; and not __fish_seen_subcommand_from {' '.join(context.words)}"
            )
            lines.append(_fish(inside, f"-f -a {_fish_quote(' '.join(context.words))}", ""))
        for setting, found in context.settings.items():
            alike.setdefault((setting, found, action), []).append(command)
    for (setting, found, action), names in alike.items():
        inside = "__trl_flow_trains" if names == training else f"__fish_seen_subcommand_from {' '.join(names)}"
        inside += f"; and __fish_seen_subcommand_from {action}" if action else ""
        value = (
            f" -x -a {_fish_quote(' '.join(found.choices))}"
            if found.choices
            else " -r -F"
            if found.takes_value
            else ""
        )
        lines.append(_fish(inside, f"-l {setting.removeprefix('--')}{value}", found.description))
    return "\n".join(lines) + "\n"


def _fish(condition: str, what: str, description: str) -> str:
    return f"complete -c trl-flow -n {_fish_quote(condition)} {what}" + (
        f" -d {_fish_quote(description)}" if description else ""
    )


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def completion_script(shell: str) -> str:
    """
    The script that completes `trl-flow` in a shell.

    Args:
        shell (`str`):
            `"bash"`, `"zsh"` or `"fish"`.
    """
    from ..cli import COMMANDS

    contexts = collect()
    if shell == "fish":
        return fish_script(contexts, {name: text for commands in COMMANDS.values() for name, text in commands.items()})
    return posix_script(shell, contexts)


def make_parser(prog: str | None = None) -> CompletionParser:
    return CompletionParser(prog=prog)


def main(shell: str) -> int:
    print(completion_script(shell), end="")
    return 0
