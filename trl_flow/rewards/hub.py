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

"""Reward functions from the Hub or a directory: nothing of them runs without consent, and what ran has a name."""

import ast
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, ModuleType

import httpx2
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import InvalidRequirement, Requirement
from transformers.dynamic_module_utils import resolve_trust_remote_code
from transformers.utils import logging


logger = logging.get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = (httpx2.HTTPError, OfflineModeIsEnabled)


def load_hub_reward(name: str, revision: str | None = None, trust_remote_code: bool | None = None) -> Callable:
    """
    The reward function of a model repository on the Hub, or of a directory.

    It is what `reward.py` calls `reward`: a function `reward(prompts, images, **kwargs)`, or, if it has settings, a
    subclass of [`Reward`]. `reward.py` may import the files beside it (`from .words import WORDS`) and read them
    (`Path(__file__).parent / "words.txt"`). If there is a `requirements.txt`, the packages in it must be installed.

    Args:
        name (`str`): Id of a model repository, or path of a directory.
        revision (`str`, *optional*): Branch, tag or commit. Without a commit, the code may be another one next time:
            which one it is now is logged.
        trust_remote_code (`bool`, *optional*): Consent to run the code, needed for directories, too. `None` asks, if
            there is a terminal to ask on.

    Returns:
        `Callable`: The function, or the class. Its attribute `source` says where it came from: `repository` and
        `revision` (a commit), or `directory` and `revision` (a hash of the Python files).

    Raises:
        ValueError: If there is no such repository, revision, file or function, or its code is not to be trusted.
        ImportError: If a package that it needs is not installed.
    """
    shown = f"reward={name!r}"
    directory, source = fetch(name, "reward.py", revision, trust_remote_code)
    check_requirements(directory / "requirements.txt", shown)
    found = getattr(import_file(directory / "reward.py", source, shown), "reward", None)
    if inspect.isclass(found):
        # The same class may be imported by another repository, too, so it isn't marked itself.
        members = {"source": source, "__module__": found.__module__, "__doc__": found.__doc__}
        return type(found.__name__, (found,), members)
    if not isinstance(found, FunctionType):
        what = "defines none" if found is None else f"calls a {type(found).__name__} so"
        raise ValueError(
            f"{shown}: expected its reward.py to define a function `reward(prompts, images, **kwargs)`, or a subclass of "
            f"trl_flow.rewards.Reward under that name, but it {what}."
        )
    marked = FunctionType(found.__code__, found.__globals__, found.__name__, found.__defaults__, found.__closure__)
    marked.__kwdefaults__, marked.__doc__, marked.__module__ = found.__kwdefaults__, found.__doc__, found.__module__
    marked.__dict__.update(found.__dict__, source=source)
    return marked


def fetch(
    name: str,
    filename: str,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    repo_type: str = "model",
    prefix: str = "",
    only_file: bool = False,
) -> tuple[Path, dict[str, str]]:
    """
    The files of a repository or directory whose code is about to run, after consent to that.

    Args:
        name (`str`): Id of a repository, or path of a directory.
        filename (`str`): File that must be there.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*): See [`load_hub_reward`].
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"space"`.
        prefix (`str`, *optional*): What stood before the name, for messages.
        only_file (`bool`, *optional*, defaults to `False`): Of a directory, whether the revision is a hash of that file
            and of what it imports relatively (`from .words import WORDS`), instead of all Python files in it.

    Returns:
        `tuple[Path, dict[str, str]]`: The directory that holds them, and where they came from.
    """
    shown = f"reward={prefix + name!r}"
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"{shown} is a directory, which has no revision={revision!r}. Leave it out.")
        directory = Path(name).resolve()
        source = {"directory": str(directory), "revision": _hash(directory, filename if only_file else None)}
        files = [path.name for path in directory.iterdir()]
        place = str(directory)
    else:
        _check_id(name, shown)
        directory = _cached(name, revision, repo_type)
        if directory is None or not _is_listed(name, revision, repo_type):
            try:
                commit, files = _ask_hub(name, revision, repo_type, shown)
                directory = None  # whatever is missing there is yet to be downloaded
            except _UNREACHABLE as error:
                if directory is None:
                    raise ValueError(
                        f"{shown}: the Hub could not be asked for it ({type(error).__name__}: {error}). Without the Hub, "
                        "only a full commit of a repository that is completely in the cache can be loaded: "
                        "user/repo@COMMIT."
                    ) from error
                logger.warning(
                    f"{shown}: the Hub could not be asked for it ({type(error).__name__}: {error}). It is loaded from "
                    f"the cache, where it may be incomplete: {directory}"
                )
        if directory is not None:
            commit, files = revision, [path.name for path in directory.iterdir()]
        source = {"space" if repo_type == "space" else "repository": name, "revision": commit}
        place = f"{HfApi().endpoint}/{'spaces/' if repo_type == 'space' else ''}{name}/tree/{commit}"
    if filename not in files:
        raise ValueError(
            f"{shown} holds no {filename}, only {', '.join(sorted(files)) or 'nothing'}. It is expected there: {place}"
            + (_doubt(source) if directory is not None else "")
        )
    # In a log file nobody answers, and the question would only be in the way.
    someone_is_there = hasattr(sys, "ps1") or (sys.stdin is not None and sys.stdin.isatty())
    try:
        resolve_trust_remote_code(
            trust_remote_code if someone_is_there else bool(trust_remote_code),
            name,
            has_local_code=False,
            has_remote_code=True,
            error_message=f"{shown} is code that has not been reviewed by anyone but its author: {place}\n",
        )
    except ValueError as error:
        raise ValueError(
            f"{shown} is code, and there is no consent to run it. Read it ({place}); then pass trust_remote_code=True "
            "(--trust_remote_code)."
        ) from error
    if directory is None:
        directory = Path(snapshot_download(name, revision=commit, repo_type=repo_type))
        if revision is None or len(revision) < 7 or not commit.startswith(revision):
            logger.warning(
                f"{shown}: {revision or 'main'} is commit {commit} now, and may be other code next time. To pin it: "
                f"{prefix}{name}@{commit}"
            )
    return directory, source


def check_requirements(path: Path, shown: str) -> None:
    """
    Check that the packages in a `requirements.txt` are installed; no such file is fine.

    Raises:
        ImportError: If one is not, or in another version. The message holds the command that installs them.
        ValueError: If a line is no requirement.
    """
    missing = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ValueError(
                f"{shown}: {line!r} in its requirements.txt is no requirement: expected packages, such as 'numpy>=2'."
            ) from error
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append((line, "is not installed"))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            missing.append((line, f"is needed, and {installed} is installed"))
    if missing:
        needs = ", ".join(f"{line} {state}" for line, state in missing)
        command = " ".join(f'"{line}"' for line, _ in missing)
        raise ImportError(f"{shown}: {needs}. Install with: pip install {command}")


def import_file(path: Path, source: dict[str, str], shown: str) -> ModuleType:
    """
    Import a Python file so that it may import those beside it (`from .words import WORDS`).

    It belongs to a package whose name holds place and revision: several revisions live side by side, and one is
    imported once.
    """
    key = hashlib.sha256(f"{path.parent}@{source['revision']}".encode()).hexdigest()[:16]
    package = f"trl_flow_reward_{key}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(f"{package}.{path.stem}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith(f"{package}."):
            raise ValueError(
                f"{shown}: {path.name} imports {error.name[len(package) :]}, which is not there.{_doubt(source)}"
            ) from error
        raise ImportError(
            f"{shown}: {path.name} imports {error.name}, which is not installed, and no requirements.txt names it."
        ) from error
    except Exception as error:  # a stranger's code: anything may come out of it
        raise ValueError(
            f"{shown}: {path.name} could not be imported ({type(error).__name__}: {error}).{_doubt(source)}"
        ) from error


def _check_id(name: str, shown: str) -> None:
    try:
        # The Hub's own check lets `user/..` pass.
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            raise HFValidationError("not of the form user/repo")
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{shown} is neither a directory nor the id of a repository on the Hub: expected 'user/repo' ({error})."
        ) from error


def _cached(name: str, revision: str | None, repo_type: str) -> Path | None:
    """The snapshot of a commit in the cache, unless files of it are known to be missing."""
    if revision is None or not _COMMIT.fullmatch(revision):
        return None
    try:
        return Path(snapshot_download(name, revision=revision, repo_type=repo_type, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_listed(name: str, commit: str, repo_type: str) -> bool:
    """
    Whether the cache knows which files a commit has. Then the snapshot that [`_cached`] finds is complete, and because
    commits don't change, nobody has to be asked. A download of single files leaves a snapshot without such a list.
    """
    try:
        get_cached_repo_tree(name, repo_type=repo_type, revision=commit)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _doubt(source: dict[str, str]) -> str:
    """What to add where something is missing: it may only be missing in the cache."""
    repo_type, key = ("space", "space") if "space" in source else ("model", "repository")
    if key not in source or _is_listed(source[key], source["revision"], repo_type):
        return ""
    return " Its copy in the cache may be incomplete: load it once while the Hub can be reached."


def _ask_hub(name: str, revision: str | None, repo_type: str, shown: str) -> tuple[str, list[str]]:
    """Commit of a revision, and the files in it."""
    kind = "Space" if repo_type == "space" else "model repository"
    try:
        repository = HfApi().repo_info(name, revision=revision, repo_type=repo_type)
    except GatedRepoError as error:
        raise ValueError(f"{shown}: its owner has to let you in first: {HfApi().endpoint}/{name}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{shown}: the Hub has no {kind} of that name, or it is private and you are not logged in (`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{shown} has no revision {revision!r}: expected a branch, a tag or a commit.") from error
    return repository.sha, [sibling.rfilename for sibling in repository.siblings]


def _hash(directory: Path, filename: str | None = None) -> str:
    """A name for the Python code in a directory (hidden folders don't count), or for that of one of its files."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py") if filename is None else _with_imports(directory / filename)):
        relative = path.relative_to(directory)
        if not any(part.startswith(".") for part in relative.parts):
            content = path.read_bytes()
            digest.update(f"{relative.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _with_imports(file: Path) -> set[Path]:
    """A Python file, and those below its folder that it imports relatively, and they in turn."""
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):  # importing it will say so
            continue
        for node in nodes:
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            for base in path.parents[node.level - 1 : node.level]:
                parts = node.module.split(".") if node.module else []
                # `from .a.b import c` runs the packages a and a.b, and c may be a module, too.
                places = [base.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
                places += [base.joinpath(*parts, alias.name) for alias in node.names]
                modules = [module for place in places for module in (Path(f"{place}.py"), place / "__init__.py")]
                waiting += [module for module in modules if module.is_relative_to(file.parent)]
    return found
