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
"""Finds a torchvision that does not fit the installed torch, which makes transformers and diffusers fail in misleading ways."""

import importlib
import importlib.metadata
import importlib.util


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
