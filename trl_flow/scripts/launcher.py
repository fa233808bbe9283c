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
from typing import Any


# Set for the processes that we start: they must train, not launch again because of what the YAML file says.
LAUNCHED = "TRL_FLOW_LAUNCHED"


def launch_options() -> list[str]:
    """The option names that `accelerate launch` knows, and `--accelerate_config`."""
    options = [name for action in _launch_parser()._actions for name in action.option_strings]
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
    single process starts faster in place. A process that a launcher has started never launches again.
    """
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
        `int`: exit code, 0 if every process succeeded.
    """
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    launch_args = resolve_accelerate_config_argument(_split_accelerate_config(launch_args))
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(_launch_parser().parse_args([*launch_args, "--module", "trl_flow.cli", command, *args]))
    except (CalledProcessError, ChildFailedError):
        # The processes have said why on their own.
        return 1
    finally:
        del os.environ[LAUNCHED]
    return 0


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
