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
"""Finds what the surroundings of a run have wrong and nobody says: a torchvision for another torch, a process too few or gone."""

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path


# Set for the processes that a command launches: how many were asked for, or nothing if that was left to accelerate.
LAUNCHED = "TRL_FLOW_LAUNCHED"
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # those that accelerate reads


class ProcessLostError(ConnectionError):
    """Another process of the run has ended, and this one cannot go on without it."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is what torch.distributed raises when another process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def check_torchvision():
    """
    Imports torchvision if it is installed. trl-flow never needs it; transformers imports it wherever it finds it, and with
    one that was built for another torch, its classes cannot be imported, with errors that do not say why.

    Raises:
        ImportError: If torchvision is installed and broken, with what to do.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError (an operator that does not exist), OSError (a library), ImportError
        versions = []
        for name in ("torch", "torchvision"):
            try:
                versions.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                versions.append(f"a {name} of unknown version")
        raise ImportError(
            f"{versions[1]} is broken beside {versions[0]}: {type(error).__name__}: {error}. It was built for another torch, "
            "and transformers and diffusers cannot be imported while it is there. trl-flow does not need it: `pip uninstall "
            "torchvision`. If something else does, install the torchvision of the same release and build as torch, from the "
            "same package index."
        ) from error


def processes_asked_for(launch_args) -> int | None:
    """
    How many processes `accelerate launch` was asked for, on all machines; `None` if that was left to it.

    Args:
        launch_args (`argparse.Namespace`): What accelerate's own parser made of the arguments.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if launch_args.num_processes is not None:
        return launch_args.num_processes
    # As in accelerate: with --cpu, the user's default file is not read.
    if launch_args.config_file is None and (launch_args.cpu or not os.path.isfile(default_config_file)):
        return None
    return getattr(load_config_from_file(launch_args.config_file), "num_processes", None)


def check_processes():
    """
    Compares the number of processes with the number that was asked for. Where `accelerate launch` sees no reason to start
    several (`--cpu`, or no `--multi_gpu` on a machine with fewer than two GPUs), it starts one and says nothing, and the
    run has fewer prompts in each update than its settings were made for.

    Raises:
        ValueError: If the numbers differ, with what to do.
    """
    if LAUNCHED in os.environ:
        asked = int(os.environ[LAUNCHED] or 0)
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by each of accelerate's launchers
        asked = _asked_of_parent()
    else:
        return
    running = int(next((os.environ[name] for name in WORLD_SIZES if os.environ.get(name)), 1))
    if asked and asked != running:
        raise ValueError(
            f"num_processes={asked}: expected as many processes, and accelerate started {running}. It starts several only "
            "with --multi_gpu, FSDP or DeepSpeed, or on a machine with several GPUs, as many on each machine, and never "
            f"with --cpu. For {asked} processes: `--multi_gpu --num_processes {asked}` without --cpu, on CPUs beside the "
            f"setting `use_cpu: true`. For {running}: `--num_processes {running}`."
        )


def _asked_of_parent() -> int | None:
    """The number in the command line of the process that started this one, if that is `accelerate launch`."""
    import psutil

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it is another user's, or gone
        return None
    names = [Path(word).name.removesuffix(".exe").removesuffix(".py") for word in words]
    for position, name in enumerate(names[:4]):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            words = words[position + 1 :]
            break
        if name in ("accelerate", "accelerate_cli", "accelerate.commands.accelerate_cli"):
            if names[position + 1 : position + 2] == ["launch"]:
                words = words[position + 2 :]
                break
    else:
        return None
    from accelerate.commands.launch import launch_command_parser

    return processes_asked_for(launch_command_parser().parse_args(words))
