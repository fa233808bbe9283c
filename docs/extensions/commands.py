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
"""Commands and their settings, read from the parsers: a line `<!-- commands: TITLE -->` in a page becomes their tables."""

import importlib
import re

import trl_flow
from trl_flow.cli import COMMANDS
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.parser import _type_name
from trl_flow.scripts.rewards import ACTIONS, ActionParser
from trl_flow.scripts.training import TRAINING_SETTINGS, make_training_parser, own_fields


MOST_CHOICES = 12


def cell(text: object) -> str:
    """Text in a table's cell: on one line, and without what ends it."""
    return " ".join(str(text).split()).replace("|", r"\|")


def table(parser, names) -> list[str]:
    """Settings of a parser: name, values and default, what it is."""
    actions = parser._first_actions()
    lines = ["| setting | value | |", "|---|---|---|"]
    for name in names:
        action = actions[name]
        choices = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
        value = ", ".join(f"`{choice}`" for choice in choices) if len(choices) <= MOST_CHOICES else ""
        value = (value or _type_name(action)) + (" ..." if action.nargs == "+" else "")
        default = action.default if action.default not in ("", []) else None
        if default is not None:
            value += f"<br>default: `{cell(getattr(default, 'value', default))}`"
        what = cell((action.help or "").replace("%%", "%"))
        # Addresses in help texts are forms of an address, and lead nowhere.
        what = re.sub(r"(?<![`\w:@])[\w:@]*https?://[\w:/.]+", r"`\g<0>`", what)
        lines.append(f"| `{name}` | {value} | {what} |")
    return [*lines, ""]


def tables(parser) -> list[str]:
    """All settings of a parser, in its groups."""
    groups = {title: names for title, names in parser.help_groups.items() if names}
    grouped = {name for names in groups.values() for name in names}
    others = [name for name in parser.settings if name not in grouped]
    if others:
        groups["Other settings" if groups else ""] = others
    return [
        line
        for title, names in groups.items()
        for line in [f"**{title}**" if title else "", "", *table(parser, names)]
    ]


def section(name: str, parser) -> list[str]:
    usage = parser.usage or f"trl-flow {name}"
    return [f"### {name}", "", parser.description, "", "```text", usage, "```", "", *tables(parser)]


def training() -> list[str]:
    """The settings that all methods share once, then what each adds and changes."""
    base = trl_flow.FlowGRPOConfig
    parser = make_training_parser("flow-grpo")
    shared = {"Method": "Sampling, advantages and loss"}
    lines = ["### Settings of every method", "", "With the defaults of `flow-grpo`.", ""]
    for title, names in parser.help_groups.items():
        lines += [f"**{shared.get(title, title)}**", "", *table(parser, names)]
    general = {name for names in TRAINING_SETTINGS.values() for name in names} | set(own_fields(base))
    default = {name: action.default for name, action in parser._first_actions().items()}
    for command, method in METHODS.items():
        parser = make_training_parser(command)
        own = [name for name in own_fields(getattr(trl_flow, method.config)) if name not in general]
        changed = [
            f"`{name}: {action.default}`"
            for name, action in parser._first_actions().items()
            if name in default and name not in own and action.default != default[name]
        ]
        lines += [f"### {command}", "", method.description, ""]
        lines += ["Its own defaults: " + ", ".join(changed) + ".", ""] if changed else []
        lines += table(parser, own) if own else []
    return lines


def commands(title: str) -> list[str]:
    """A table of the commands of one group of `trl-flow --help`, and their settings."""
    lines = ["| command | |", "|---|---|"]
    lines += [f"| [`trl-flow {name}`](#{name}) | {cell(text)} |" for name, text in COMMANDS[title].items()] + [""]
    if title == "Train":
        return lines + training()
    for name in COMMANDS[title]:
        parser = importlib.import_module(f"trl_flow.scripts.{name.replace('-', '_')}").make_parser(
            prog=f"trl-flow {name}"
        )
        if name == "rewards":
            lines += ["### rewards", ""]
            for action, (_, arguments, text) in ACTIONS.items():
                parser = ActionParser(arguments, prog=f"trl-flow rewards {action}")
                lines += [f"`{parser.usage}`: {text}.", "", *(table(parser, parser.settings) if arguments else [])]
        elif hasattr(parser, "settings"):
            lines += section(name, parser)
        else:
            lines += [f"### {name}", "", "```text", *parser.format_help().splitlines(), "```", ""]
    return lines


def fill(app, docname, source):
    source[0] = re.sub(
        r"^<!-- commands: (.+) -->$", lambda match: "\n".join(commands(match[1])), source[0], flags=re.MULTILINE
    )


def setup(app):
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
