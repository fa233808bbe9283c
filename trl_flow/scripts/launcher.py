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

"""Decide whether a training command needs `accelerate launch`, and start it that way."""

import os
import signal
import sys
from contextlib import contextmanager
from typing import Any

from ..environment import LAUNCHED, check_processes, processes_asked_for


# Interrupted processes finish their update and save it. torch's launcher kills them after half a minute, which is short.
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SECONDS_TO_SAVE = 3600


def launch_options() -> list[str]:
    """The option names that `accelerate launch` knows, and `--accelerate_config`."""
    actions = [action for action in _launch_parser()._actions if action.dest != "help"]
    options = [name for action in actions for name in action.option_strings]
    return ["--accelerate_config", *(name for name in options if name.startswith("--") and "-" not in name[2:])]


def unknown_to_accelerate(args: list[str]) -> list[str]:
    """The arguments that `accelerate launch` does not know; options first, then values that belong to nothing."""
    args = _without_accelerate_config(args)
    script = "training-script"
    namespace, unknown = _launch_parser().parse_known_args([*args, script])
    if unknown:
        return unknown
    # A value that belongs to no option is taken for the script, and pushes ours behind it.
    return [] if namespace.training_script == script else [namespace.training_script]


def flags_from_config(values: dict[str, Any]) -> list[str]:
    """Arguments for `accelerate launch` from a YAML file: `multi_gpu: true` becomes `--multi_gpu`, with no value."""
    if not values:
        return []
    flags = {action.dest for action in _launch_parser()._actions if action.nargs == 0}
    args = []
    for name, value in values.items():
        if name not in flags:
            args += [f"--{name}", str(value)]
        elif value:
            args.append(f"--{name}")
    return args


def needs_launch(launch_args: list[str]) -> bool:
    """
    Whether training must go through `accelerate launch`.

    It must if arguments or the user's default configuration file ask for it, or if this machine has several GPUs; a
    single process starts faster in place. A process that a launcher has started never launches again, whatever the YAML
    file says, and must be one of as many as were asked for.
    """
    check_processes()
    if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    if launch_args:
        return True
    import torch
    from accelerate.commands.config import default_config_file

    return os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def launch(command: str, args: list[str], launch_args: list[str]) -> int:
    """
    Run `trl-flow COMMAND ARGS` under `accelerate launch LAUNCH_ARGS`.

    Returns:
        `int`: exit code: 0 if every process succeeded, 130 or 143 if they were interrupted, 1 if one failed.
    """
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    launch_args = resolve_accelerate_config_argument(_split_accelerate_config(launch_args))
    namespace = _launch_parser().parse_args([*launch_args, "--module", "trl_flow.cli", command, *args])
    os.environ[LAUNCHED] = str(processes_asked_for(namespace) or "")
    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SECONDS_TO_SAVE))
    try:
        with _signals_passed_on():
            launch_command(namespace)
    # The processes have said why on their own.
    except CalledProcessError as failure:
        return _exit_code(failure.returncode)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if -first.exitcode in (signal.SIGKILL, signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV):
            # All but this one: it had no time to.
            print(
                f"trl-flow {command}: error: process {rank} was ended by {signal.Signals(-first.exitcode).name}, and the others "
                "with it. Systems kill processes so when memory runs out. Go on from the last checkpoint with "
                "--resume_from_checkpoint true, on any number of processes.",
                file=sys.stderr,
            )
        return _exit_code(first.exitcode)
    except SignalException as failure:
        return 128 + failure.sigval
    finally:
        del os.environ[LAUNCHED]
    return 0


def _exit_code(code: int) -> int:
    """That of this command, from that of a process: negative where a signal ended it."""
    code = 128 - code if code < 0 else code
    return code if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else 1


@contextmanager
def _signals_passed_on():
    """
    Ctrl-C and SIGTERM go to the processes, whose end is awaited.

    torch's launcher does the same with handlers of its own. Where accelerate starts one process without it, SIGTERM would
    end the launcher and leave the process behind.
    """
    import psutil

    def pass_on(number, frame):
        for process in psutil.Process().children():
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launch_parser():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def _split_accelerate_config(args: list[str]) -> list[str]:
    name = "--accelerate_config"
    return [part for arg in args for part in ([name, arg[len(name) + 1 :]] if arg.startswith(f"{name}=") else [arg])]


def _without_accelerate_config(args: list[str]) -> list[str]:
    args = _split_accelerate_config(args)
    if "--accelerate_config" not in args:
        return args
    position = args.index("--accelerate_config")
    return args[:position] + args[position + 2 :]
