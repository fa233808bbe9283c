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

"""`trl-flow rewards`: list, show, write, check, publish and serve reward functions."""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.table import Table

from .parser import FlowParser
from .quiet import quieten


if TYPE_CHECKING:
    from ..rewards.check import Finding


# What `pip install trl-flow[...]` has to be called with.
EXTRAS = {"ocr": "ocr"}
# These run code when they are loaded, whatever they are named to hold.
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".bin")
NOT_PUBLISHED = ["*__pycache__/*", "*.pyc", ".*", "*/.*"]
TAG = "trl-flow-reward"


def _load_settings(settings: dict | str | None) -> dict:
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except json.JSONDecodeError as error:
            raise ValueError(f"settings={settings!r} is no JSON: {error}") from error
    if not isinstance(settings, dict | None):
        raise ValueError(
            f'settings={settings!r}: expected names and values in braces, such as \'{{"match": "exact"}}\''
        )
    return settings or {}


@dataclass
class NamedReward:
    """A reward function, by what `load_reward` takes."""

    name: str = field(
        metadata={
            "help": "The reward: a built-in name, a repository on the Hub (user/repo or user/repo@revision), a "
            "directory with a reward.py, evaluate:user/space, a server's URL, or a dotted path."
        }
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repository on the Hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to run the code of a repository or directory without asking. Read it first."},
    )
    settings: dict | str | None = field(
        default=None, metadata={"help": 'Settings of the reward, as JSON, such as \'{"match": "exact"}\'.'}
    )

    def __post_init__(self):
        self.settings = _load_settings(self.settings)

    def load(self) -> Callable:
        from ..rewards import load_reward

        # Not to consent on the command line is not to refuse: then there may be someone to ask.
        trust = self.trust_remote_code or None
        return load_reward(self.name, revision=self.revision, trust_remote_code=trust, **self.settings)


@dataclass
class ShowArguments(NamedReward):
    POSITIONALS: ClassVar = ("name",)


@dataclass
class NewArguments:
    POSITIONALS: ClassVar = ("directory",)

    directory: str = field(metadata={"help": "Directory to write: reward.py, README.md and requirements.txt."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the code, by the Hub's name for it."})


@dataclass
class CheckArguments(NamedReward):
    POSITIONALS: ClassVar = ("name",)

    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompt set, file or dataset to take rows from, if the reward needs columns. By default its own "
            "prompt set, or a few built-in prompts."
        },
    )
    num_prompts: int = field(default=8, metadata={"help": "Pictures to draw; at least 2."})
    image_size: int | None = field(
        default=None, metadata={"help": "Width and height in pixels. By default 256, and 32 for shapes."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Device of the reward's model. By default an accelerator if there is one."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_prompts < 2:
            raise ValueError(f"num_prompts={self.num_prompts}: scores can be compared from 2 pictures on")


@dataclass
class PushArguments:
    POSITIONALS: ClassVar = ("directory", "repository")

    directory: str = field(metadata={"help": "Directory with reward.py and README.md."})
    repository: str = field(metadata={"help": "Model repository on the Hub, user/repo. It is made if need be."})
    private: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to. It is made if need be."})
    message: str = field(default="Upload reward function", metadata={"help": "Message of the commit."})
    check: bool = field(
        default=True, metadata={"help": "Whether to check the reward first, and not to push if it fails."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the check may run the directory's code without asking."}
    )
    settings: dict | str | None = field(
        default=None, metadata={"help": "Settings of the reward in the check, as JSON, if it needs some."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompt set, file or dataset to take rows from in the check, if the reward needs columns."},
    )

    def __post_init__(self):
        self.settings = _load_settings(self.settings)
        if not self.check and (self.settings or self.prompts is not None):
            raise ValueError("check=False: settings and prompts are for the check alone. Leave them out.")


@dataclass
class ServeArguments(NamedReward):
    POSITIONALS: ClassVar = ("name",)

    name: list[str] = field(
        metadata={
            "help": "Rewards to serve, each at a port of its own: names as above, or with settings as JSON "
            '(\'{"ocr": {"match": "exact"}}\').'
        }
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on. Any but this machine's own needs a token."}
    )
    port: int = field(
        default=8000, metadata={"help": "Port to listen on; 0 takes a free one. Of several rewards, the first one's."}
    )
    batch_size: int = field(default=16, metadata={"help": "Most pictures per call of the reward."})
    max_queue: int = field(default=256, metadata={"help": "Most requests at a time; more wait."})
    max_body_mib: float = field(default=64, metadata={"help": "Largest request, in MiB."})
    max_images: int = field(default=256, metadata={"help": "Most pictures in a request."})
    max_megapixels: float = field(default=64, metadata={"help": "Most pixels in all pictures of a request together."})
    request_timeout: float = field(
        default=30.0, metadata={"help": "Seconds that a client may take to send a request."}
    )
    token: str | None = field(
        default=None,
        metadata={"help": "What clients must know. The environment variable TRL_FLOW_REWARD_TOKEN is safer."},
    )
    device: list[str] | None = field(
        default=None,
        metadata={
            "help": "Device of the reward's model, such as cuda:7; by default an accelerator if there is one. Of several, "
            "a reward has a copy on each; several rewards have one each."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.name) > 1 and (self.settings or self.revision):
            given = "settings" if self.settings else "revision"
            raise ValueError(
                f"{given}: of which of {len(self.name)} rewards? Give each its own: "
                '\'{"ocr": {"match": "exact"}}\', user/repo@revision.'
            )
        if self.device and len(self.name) > 1 and len(self.device) not in (1, len(self.name)):
            raise ValueError(
                f"{len(self.device)} devices for {len(self.name)} rewards: expected one for all, or one for each. Copies of "
                "one reward on several devices are a command of their own."
            )

    def load_all(self) -> list[dict]:
        """Of each reward, `reward`, `spec` and `device` of a [`~rewards.server.RewardServer`]."""
        from ..rewards import load_reward, parse_reward

        loaded = []
        for number, reward in enumerate(self.name):
            name, given = parse_reward(reward)
            spec = {name: {**given, **self.settings}}
            devices = self.device or [None]
            if len(self.name) > 1:
                devices = [devices[number % len(devices)]]
            if self.device and "device" in spec[name]:
                raise ValueError(
                    f"reward={name!r} has a device in its settings, and device={self.device}: give one of them."
                )
            trust = self.trust_remote_code or None
            copies = [load_reward(spec, revision=self.revision, trust_remote_code=trust) for _ in devices]
            alone = len(copies) == 1
            loaded.append(
                {"reward": copies[0] if alone else copies, "spec": spec, "device": devices[0] if alone else devices}
            )
        return loaded


def list_rewards() -> int:
    """Built-in rewards, one per line: what they compute, and what they need."""
    from ..rewards import REWARDS

    width = max(map(len, REWARDS))
    for name in REWARDS:
        found = _built_in(name)
        needs = _needs(name, found)
        print(f"{name:<{width}}  {_first_sentence(_definition(found))}" + (f" Needs {needs}." if needs else ""))
    print("\n`trl-flow rewards show NAME` says more: scale, source, licence, what hacks it, settings.")
    return 0


def _built_in(name: str) -> Callable | type:
    from ..rewards import REWARDS

    module_name, attribute = REWARDS[name].split(":")
    return getattr(importlib.import_module(module_name, "trl_flow.rewards"), attribute)


def _definition(reward: Callable | type) -> str:
    about = getattr(reward, "about", None)
    if isinstance(about, tuple):
        return about.definition
    return (inspect.getdoc(reward) or "It does not say.").partition("\n\n")[0].replace("\n", " ")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _needs(name: str, reward: Callable | type) -> str:
    from ..rewards import reward_settings

    needs = [f"pip install 'trl-flow[{EXTRAS[name]}]'"] if name in EXTRAS else []
    requires = getattr(reward, "requires", ())
    # Of a class it may be a property: which columns then depends on the settings.
    if requires and isinstance(requires, tuple):
        needs.append(f"column {', '.join(requires)}")
    settings = reward_settings(reward) if isinstance(reward, type) else {}
    if required := [name for name, parameter in settings.items() if parameter.default is parameter.empty]:
        needs.append(f"setting {', '.join(required)}")
    return "; ".join(needs)


def show_reward(args: ShowArguments) -> int:
    """What a reward says about itself, and its settings."""
    from ..rewards import REWARDS, reward_settings

    # A built-in one is shown without being made: it may need a setting that is yet to be read about.
    reward = _built_in(args.name) if args.name in REWARDS else args.load()
    table = Table(show_header=False, title=args.name, title_justify="left", box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    about = getattr(reward, "about", None)
    if isinstance(about, tuple):
        for name, value in zip(("definition", "scale", "source", "license", "hacked by"), about, strict=True):
            table.add_row(name, value)
    else:
        table.add_row("definition", _definition(reward))
    if args.name in REWARDS:
        table.add_row("needs", _needs(args.name, reward) or "nothing more")
    elif requires := getattr(reward, "requires", ()):
        table.add_row("needs", f"column {', '.join(requires)}")
    in_groups = getattr(reward, "scope", "sample") == "group"
    table.add_row("scores", "the pictures of a prompt against each other" if in_groups else "each picture alone")
    if isinstance(getattr(reward, "prompt_set", None), str):
        table.add_row("prompt set", reward.prompt_set)
    if not isinstance(reward, type) and getattr(reward, "source", None):
        table.add_row("from", ", ".join(f"{name} {value}" for name, value in reward.source.items()))
    settings = reward_settings(reward) if isinstance(reward, type) else {}
    for number, (name, parameter) in enumerate(settings.items()):
        default = (
            "must be given" if parameter.default is parameter.empty else json.dumps(parameter.default, default=str)
        )
        table.add_row("settings" if number == 0 else "", f"{name}: {default}")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table, soft_wrap=False)
    documented = inspect.getdoc(reward) or ""
    if settings and "Args:" in documented:
        arguments = re.split(r"\n(?=\w+:\n)", documented.partition("Args:\n")[2])[0].rstrip()
        console.print("\nSettings:\n" + arguments)
    return 0


def new_reward(args: NewArguments) -> int:
    """Write a template."""
    from ..rewards.template import write_template

    written = write_template(Path(args.directory), args.license)
    print(f"Wrote {', '.join(map(str, written))}. Next:")
    print(f"  trl-flow rewards check {args.directory} --trust_remote_code")
    print(f"  trl-flow rewards push {args.directory} USER/{Path(args.directory).resolve().name}")
    return 0


def check(args: CheckArguments) -> int:
    """Check a reward. The exit code is 1 if it fails."""
    return 0 if _check(args.load(), args) else 1


def _check(reward: Callable, args: CheckArguments) -> bool:
    import torch

    from ..prompts import load_prompts
    from ..rewards.check import PROMPTS, check_reward
    from ..shapes.pictures import render

    prompts = args.prompts or getattr(reward, "prompt_set", None)
    rows = [{"prompt": PROMPTS[i % len(PROMPTS)]} for i in range(args.num_prompts)]
    if prompts is not None:
        rows = [dict(row) for row in load_prompts(prompts, num_prompts=args.num_prompts)]
    size, images = args.image_size or (32 if prompts == "shapes" else 256), None
    if prompts == "shapes":
        # Anything else is worth 0 to a reward that looks for its shapes. Every second picture is that of another prompt.
        images = [render(rows[i // 2 * 2]["prompt"], seed=i).resize((size, size)) for i in range(len(rows))]
    device = args.device
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    findings = check_reward(reward, rows, (size, size), device, images)
    return _print_findings(args.name, getattr(reward, "source", None), findings)


def _print_findings(name: str, source: dict | None, findings: "list[Finding]") -> bool:
    table = Table(title=f"{name} on drawn pictures", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column)
    for finding in findings:
        verdict = {True: "ok", False: "FAILED", None: ""}[finding.passed]
        table.add_row(finding.check, verdict, finding.text, style="red" if finding.passed is False else None)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table, soft_wrap=False)
    failed = [finding for finding in findings if finding.passed is False]
    if source:
        where = ", ".join(f"{key} {value}" for key, value in source.items())
        console.print(f"From {where}.")
    if failed:
        line = f"Fails: {'; '.join(f'{finding.check}: {finding.text}' for finding in failed)}."
    else:
        passed = {finding.check for finding in findings if finding.passed}
        alike = "not all alike" if "range" in passed else "too few to differ"
        # Whether a score depends on more than the prompt is not looked at.
        alone = "none depends on the other pictures" if "batching" in passed else "none depends on the pictures' order"
        line = f"Passes: its scores are numbers, {alike}, and {alone}."
    console.print(line)
    return not failed


def push(args: PushArguments) -> int:
    """Publish a directory as a model repository. The exit code is 1 if its reward fails the check."""
    from huggingface_hub import HfApi, ModelCard

    directory = Path(args.directory)
    for name in ("reward.py", "README.md"):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory} holds no {name}. `trl-flow rewards new` writes a directory with all it needs."
            )
    if TAG not in (ModelCard.load(directory / "README.md").data.tags or []):
        raise ValueError(
            f"{directory / 'README.md'} lacks the tag {TAG}, by which others find rewards: put it under `tags:` between "
            "two lines `---` at the top, as `trl-flow rewards new` does."
        )
    pickles = sorted(path for path in directory.rglob("*") if path.suffix.lower() in PICKLES)
    if pickles:
        raise ValueError(
            f"{', '.join(map(str, pickles))}: files of this kind can run code when they are loaded, past those who read "
            "reward.py. Save weights as safetensors."
        )
    if args.check:
        checked = CheckArguments(
            name=str(directory.resolve()),
            trust_remote_code=args.trust_remote_code,
            settings=args.settings,
            prompts=args.prompts,
        )
        if not _check(checked.load(), checked):
            print("Not pushed. --no_check pushes all the same.", file=sys.stderr)
            return 1
    api = HfApi()
    api.create_repo(args.repository, private=args.private, exist_ok=True)
    if args.revision is not None:
        api.create_branch(args.repository, branch=args.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=args.repository,
        folder_path=directory,
        revision=args.revision,
        commit_message=args.message,
        ignore_patterns=NOT_PUBLISHED,
    )
    print(f"Pushed to {api.endpoint}/{args.repository}. To use exactly this code:\n{args.repository}@{commit.oid}")
    return 0


def serve(args: ServeArguments) -> int:
    """Serve rewards until they are interrupted."""
    from ..rewards.server import RewardServer, serve_all

    own = {field.name for field in dataclasses.fields(NamedReward)} | {"device", "port"}
    settings = {key: value for key, value in vars(args).items() if key not in own}
    servers = []
    for number, loaded in enumerate(args.load_all()):
        servers.append(RewardServer(**loaded, port=args.port + number if args.port else 0, **settings))
    serve_all(servers)
    return 0


# Name: (what runs, its arguments, what it does).
ACTIONS = {
    "list": (list_rewards, None, "the built-in rewards, and what they need"),
    "show": (show_reward, ShowArguments, "definition, scale, source, licence, what hacks it, settings"),
    "new": (new_reward, NewArguments, "write a reward to start from, with its card"),
    "check": (check, CheckArguments, "call a reward on drawn pictures: protocol, determinism, batching, speed"),
    "push": (push, PushArguments, "check a directory, and publish it on the Hub"),
    "serve": (serve, ServeArguments, "score pictures for other processes and machines, over HTTP"),
}

EXAMPLES = """Examples:
  trl-flow rewards list
  trl-flow rewards show ocr
  trl-flow rewards check ocr --settings '{"match": "exact"}'
  trl-flow rewards new my_reward
  trl-flow rewards check ./my_reward --trust_remote_code
  trl-flow rewards push my_reward user/my-reward --trust_remote_code
  trl-flow rewards check user/my-reward@COMMIT --trust_remote_code
  trl-flow rewards serve pickscore --port 8000 --device cuda:6 cuda:7"""


class ActionParser(FlowParser):
    """Takes what an action is about without its name, too, if it comes first."""

    def __init__(self, arguments: type | None, **kwargs):
        super().__init__((arguments,) if arguments else (), **kwargs)
        self.positionals = arguments.POSITIONALS if arguments else ()
        self.many = (
            {field.name for field in dataclasses.fields(arguments) if field.type == list[str]} if arguments else ()
        )
        shown = [name.upper() + (" ..." if name in self.many else "") for name in self.positionals]
        self.usage = " ".join([self.prog, *shown, "[--NAME VALUE ...]"])

    def parse_args_and_config(self, args=None, **kwargs):
        args, first = list(args), []
        for name in self.positionals:
            if not args or args[0].startswith("-"):
                break
            first += [f"--{name}", args.pop(0)]
            while name in self.many and args and not args[0].startswith("-"):
                first.append(args.pop(0))
        return super().parse_args_and_config([*first, *args], **kwargs)


class RewardsParser:
    """Reads the name of the action, and leaves the rest to the action's own parser."""

    def __init__(self, prog: str | None = None):
        self.prog = prog or "trl-flow rewards"

    def format_help(self) -> str:
        width = max(map(len, ACTIONS))
        return "\n".join(
            [
                f"usage: {self.prog} ACTION [NAME] [--NAME VALUE ...]",
                "",
                "List, show, write, check, publish and serve reward functions.",
                "",
                "Actions (`ACTION --help` lists the settings of one):",
                *(f"  {name:<{width}}  {text}" for name, (_, _, text) in ACTIONS.items()),
                "",
                EXAMPLES,
            ]
        )

    def error(self, message: str):
        print(f"usage: {self.prog} ACTION [NAME] [--NAME VALUE ...]\n{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_args_and_config(self, args: list[str]) -> tuple:
        if args and args[0] in ("-h", "--help", "--help_all"):
            print(self.format_help())
            sys.exit(0)
        known = ", ".join(ACTIONS)
        if not args:
            self.error(f"name an action: {known}")
        action, *rest = args
        if action.startswith("-"):
            self.error(f"unknown argument {action}: an action comes first ({known})")
        if action not in ACTIONS:
            close = difflib.get_close_matches(action, ACTIONS, n=1)
            self.error(f"unknown action {action!r}. " + (f"Did you mean {close[0]}?" if close else f"Known: {known}."))
        function, arguments, text = ACTIONS[action]
        parser = ActionParser(arguments, prog=f"{self.prog} {action}", description=f"{text[0].upper()}{text[1:]}.")
        return (function, *parser.parse_args_and_config(rest))


def main(action: Callable[..., int], *args) -> int:
    quieten(progress_bars=True)
    return action(*args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> RewardsParser:
    return RewardsParser(prog=prog)
