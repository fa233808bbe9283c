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

"""`trl-flow env`: versions and hardware, to be pasted into a bug report."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from ..environment import check_torchvision
from .parser import FlowParser


PACKAGES = (
    "torch",
    "torchvision",
    "trl",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "evaluate",
    "deepspeed",
    "bitsandbytes",
)


def environment() -> dict[str, str]:
    """Versions of the packages that matter here and the hardware that torch sees."""
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file
    from trl.scripts.utils import get_git_commit_hash

    from .. import __version__

    commit = get_git_commit_hash("trl_flow")
    entries = {
        "Platform": platform.platform(),
        "Python": platform.python_version(),
        "trl-flow": f"{__version__}+{commit[:7]}" if commit and not commit.startswith("Error") else __version__,
    }
    for package in PACKAGES:
        try:
            entries[package] = version(package)
        except PackageNotFoundError:
            entries[package] = "not installed"
    try:
        check_torchvision()
    except ImportError as error:
        entries["torchvision"] += f" (broken: {error})"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        devices = ["MPS"]
    elif torch.xpu.is_available():
        devices = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    else:
        devices = ["none"]
    entries["Accelerators"] = ", ".join(devices)
    entries["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    config = "not found"
    if os.path.isfile(default_config_file):
        settings = load_config_from_file(default_config_file).to_dict()
        config = "".join(f"\n  - {name}: {value}" for name, value in settings.items())
    entries["Accelerate config"] = config
    return entries


def main():
    print("\nCopy and paste this into your report:\n")
    for name, value in environment().items():
        print(f"- {name}: {value}")
    print()


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = "Print the versions of trl-flow and of what it stands on, and the hardware."
    if subparsers is not None:
        return subparsers.add_parser("env", help=description, dataclass_types=(), description=description)
    return FlowParser((), prog=prog, description=description)
