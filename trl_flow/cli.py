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

"""The `trl-flow` command. Reads the command's name and nothing else, so that it starts before torch is imported."""

import difflib
import importlib
import os
import signal
import sys
import textwrap
import threading
from contextlib import contextmanager

from . import __version__
from .environment import check_torchvision
from .scripts.methods import METHODS


COMMANDS = {
    "Train": {name: method.summary for name, method in METHODS.items()},
    "Prepare": {
        "doctor": "find out whether a pipeline can be trained, and why not",
        "calibrate": "find a noise level for each step (DenseGRPO, Algorithm 1)",
        "make-shapes": "make the embedded shapes pipeline again, from a seed",
    },
    "Rewards and prompts": {
        "rewards": "list, show, check, write, publish and serve reward functions",
        "prompts": "list and show prompt sets",
    },
    "Look": {
        "generate": "make a picture grid with a model, with or without an adapter",
        "evaluate": "score a model with and without an adapter: table, pictures, intervals",
        "report": "write a run's report again, or compare several runs on one page",
        "completion": "print a script that completes commands and settings in bash, zsh or fish",
        "env": "print versions and hardware, for bug reports",
    },
    "Publish": {
        "card": "write a run's model card again, for another repository, name or licence",
        "push": "push a finished run to the Hub: adapter, card, pictures, curves, settings",
        "convert": "write an adapter in the layout of PEFT, diffusers or ComfyUI, or merge it",
    },
}

USAGE = "usage: trl-flow [--help] [--version] [--debug] COMMAND [--NAME VALUE ...]"


def format_help() -> str:
    lines = [USAGE, "", "Align flow-matching pipelines with rewards by online reinforcement learning."]
    width = max(len(name) for commands in COMMANDS.values() for name in commands)
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:"]
        for name, text in commands.items():
            lines += textwrap.wrap(
                text, 80, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)
            )
    lines += [
        "",
        "`trl-flow COMMAND --help` lists the settings of a command. Each can stand on the",
        "command line, in the environment (TRL_FLOW_LEARNING_RATE=1e-4) and in a YAML",
        "file (--config): the first of these wins. Training commands also take the",
        "arguments of `accelerate launch`, and `--accelerate_config NAME|FILE` with TRL's",
        "names: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2.",
        "",
        "Examples:",
        "  trl-flow doctor shapes",
        "  trl-flow dense-grpo --config examples/shapes/dense-grpo.yaml \\",
        "      --output_dir runs/first",
        '  trl-flow generate --adapter runs/first --prompt "a red circle" --compare',
        "",
        "Errors are one line; `trl-flow --debug COMMAND ...` or TRL_FLOW_DEBUG=1 shows",
        "where they come from.",
        "",
        "Exit codes:",
        "  0    done",
        "  1    failed, or `doctor` found that a pipeline does not train",
        "  2    a setting on the command line, in the environment or in the YAML file is",
        "       unknown, or not of its kind; those that don't go together give 1",
        "  130  stopped by Ctrl-C, 143 by SIGTERM: a run that trains has saved a",
        "       checkpoint then and said how to go on",
    ]
    return "\n".join(lines)


def run(command: str, args: list[str]) -> int:
    """Run one command in this process, or a training command under `accelerate launch` where that is asked for."""
    if command != "env" and not {"-h", "--help", "--help_all"} & set(args):
        check_torchvision()
    if command not in METHODS:
        module = importlib.import_module(f"trl_flow.scripts.{command.replace('-', '_')}")
        return module.main(*module.make_parser(prog=f"trl-flow {command}").parse_args_and_config(args)) or 0

    from .scripts.launcher import launch, needs_launch
    from .scripts.training import make_training_parser, run_training

    *parsed, from_file, from_line = make_training_parser(command).parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    if not parsed[0].print_config and needs_launch(from_file + from_line):
        return launch(command, without(args, from_line), from_file + from_line)
    from .interruption import Interrupted

    try:
        run_training(command, *parsed, words=args)
    except Interrupted as interruption:
        return interruption.exit_code  # it has said itself how to go on
    return 0


def without(args: list[str], removed: list[str]) -> list[str]:
    """`args` less `removed`, an ordered subsequence of them."""
    removed, kept = list(removed), []
    for arg in args:
        if removed and arg == removed[0]:
            removed.pop(0)
        else:
            kept.append(arg)
    return kept


@contextmanager
def terminable():
    """SIGTERM ends a command as Ctrl-C does, so that it tidies up; of itself it would leave temporary files behind."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    """
    Entry point of `trl-flow`.

    Returns:
        `int`: 0 if all went well, 1 if the command failed (or `doctor` found that a pipeline does not train), 2 if the
            command line is wrong, 130 if Ctrl-C interrupted it, 143 if SIGTERM did.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("TRL_FLOW_DEBUG", "0").lower() not in ("", "0", "false", "no")
    while argv and argv[0] == "--debug":
        debug = True
        argv.pop(0)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_help())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, *args = argv
    names = [name for commands in COMMANDS.values() for name in commands]
    if command not in names:
        close = difflib.get_close_matches(command.replace("_", "-"), names, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(names)}."
        kind = "option" if command.startswith("-") else "command"
        print(f"{USAGE}\ntrl-flow: error: unknown {kind} {command}. {hint}", file=sys.stderr)
        return 2
    try:
        with terminable():
            return run(command, args)
    except KeyboardInterrupt as interruption:
        if debug:
            raise
        print(f"trl-flow {command}: interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if interruption.args == (signal.SIGTERM,) else signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        # What a user can put right: our checks raise ValueError, files and the Hub OSError, optional packages
        # ImportError. Anything else is a bug and keeps its traceback.
        if debug:
            raise
        print(f"trl-flow {command}: error: {error} (TRL_FLOW_DEBUG=1 shows the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
