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

"""Files of a run in a Hub repository, in one commit: after an error it holds all of them, or what it held before."""

import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..report.history import without_paths


logger = logging.getLogger(__name__)

# Another commit at the same moment (409, 412), too many requests, and what passes by itself.
RETRIED = (408, 409, 412, 425, 429, 500, 502, 503, 504)
WAITS = (1.0, 4.0, 15.0)  # seconds before each further attempt
LONGEST_WAIT = 300.0  # where the Hub says how long to wait
# `training_args.bin` is what Trainer and the Hub's own pages know a run by.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
TRAINING_ARGUMENTS = "training_args.bin"


class PushError(OSError):
    """Nothing was committed to a repository; the message says why, where the files are, and how to push them later."""


def run_files(output_dir: str | Path) -> dict[str, Path]:
    """
    What a run's repository holds of its directory: all but checkpoints, pickles, TensorBoard's logs, in which are this
    machine's name and paths, and hidden and unfinished files.

    Args:
        output_dir (`str` or `Path`):
            Directory of the run.

    Returns:
        `dict[str, Path]`: files by their path in the repository.
    """
    return {
        name: path
        for name, path in files_below(output_dir).items()
        if not name.startswith("checkpoint-")
        and (path.suffix not in PICKLES or path.name == TRAINING_ARGUMENTS)
        and not path.name.startswith("events.out.tfevents")
        and not any(part.startswith((".", "_")) for part in Path(name).parts)
    }


def files_below(folder: str | Path, name: str = "") -> dict[str, Path]:
    """All files of a folder by their path in the repository, in which the folder is called `name`."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {(Path(name) / path.relative_to(folder)).as_posix(): path for path in paths}


def stage(files: Mapping[str, Path], folder: str | Path, lasting: Callable[[str], bool]) -> dict[str, Path]:
    """
    Keeps files as they are now, for an upload during which training goes on.

    Args:
        files (`Mapping[str, Path]`):
            Files by their path in the repository.
        folder (`str` or `Path`):
            Where the copies go: on the same disk, as links cost nothing.
        lasting (`Callable[[str], bool]`):
            Whether a file of this name is only ever deleted or replaced, never written to. It is linked.

    Returns:
        `dict[str, Path]`: the copies.
    """
    staged = {name: Path(folder) / name for name in files}
    for name, path in files.items():
        staged[name].parent.mkdir(parents=True, exist_ok=True)
        try:
            if not lasting(name):
                raise OSError
            os.link(path, staged[name])
        except OSError:  # or a file system without links
            shutil.copy2(path, staged[name])
    return staged


def public_files(files: Mapping[str, Path], folder: str | Path) -> dict[str, Path]:
    """
    Files for everybody to read: of settings and states in which absolute paths are, copies with the names alone.

    Args:
        files (`Mapping[str, Path]`):
            Files by their path in the repository.
        folder (`str` or `Path`):
            Where the copies go.

    Returns:
        `dict[str, Path]`: the files, with the copies in place of what they were made of.
    """
    public = dict(files)
    for number, (name, path) in enumerate(files.items()):
        # What is below `samples/` are prompts, which may well begin with a slash.
        if path.suffix not in (".json", ".yaml") or name.startswith("samples/"):
            continue
        try:
            text = path.read_text("utf-8")
            value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):  # a file that is not of the run
            continue
        shown = without_paths(value)
        if shown == value:
            continue
        public[name] = Path(folder) / str(number)
        if path.suffix == ".json":
            text = json.dumps(shown, indent=2) + "\n"
        else:
            comments = re.sub(r"(?<!\S)/\S*/", "", re.match(r"(#.*\n)*", text)[0])
            text = comments + yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110)
        public[name].write_text(text, "utf-8")
    return public


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
    replaced: str | None = None,
) -> CommitInfo:
    """
    Commit files to a model repository, in one commit, without the paths of this machine ([`public_files`]).

    Not `HfApi.upload_folder`, which splits a large folder into several commits: whoever loads the repository between
    two of them finds new weights beside an old configuration.

    Args:
        files (`Mapping[str, Path]`):
            Files by their path in the repository.
        repo_id (`str`):
            The repository, which exists.
        commit_message (`str`):
            First line of the commit.
        token (`str`, *optional*):
            Token with write permission. Defaults to the one that is logged in.
        revision (`str`, *optional*):
            Branch, made from `main` where it does not exist. Defaults to `main`.
        replaced (`str`, *optional*):
            Folder of the repository of which nothing stays that is not among `files`.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        `httpx2.HTTPError`: the Hub refused, or could not be reached in several attempts.
    """
    api = HfApi()

    def commit() -> CommitInfo:
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        if replaced is not None:
            there = api.list_repo_files(repo_id, revision=revision, token=token)
            old = [name for name in there if name.startswith(f"{replaced}/") and name not in files]
            operations += [CommitOperationDelete(path_in_repo=name) for name in old]
        return api.create_commit(repo_id, operations, commit_message=commit_message, token=token, revision=revision)

    with tempfile.TemporaryDirectory() as folder:
        files = public_files(files, folder)
        # Repeating a commit is safe: files that have arrived are no change, and without a change there is no commit.
        return retried(commit, f"pushing to {repo_id}")


def retried(call: Callable, purpose: str):
    """The result of `call`, which asks the Hub, repeated where an error may pass."""
    for wait in (*WAITS, None):
        try:
            return call()
        except httpx2.HTTPError as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            passing = isinstance(error, httpx2.TransportError) or (
                response is not None and response.status_code in RETRIED
            )
            if wait is None or not passing:
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
            wait = min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
            logger.warning(f"{purpose}: {explain(error)} Trying again in {wait:g} s.")
            time.sleep(wait)


def explain(error: Exception) -> str:
    """One sentence on what a request to the Hub ended with."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return (
            f"The Hub refuses the token ({status}): it needs write permission there. `hf auth login` stores another, "
            "as do HF_TOKEN and hub_token."
        )
    if status == 404:
        return "The Hub knows no such repository or revision (404), or the token may not see it."
    if status in (409, 412):
        return f"The repository was being changed by someone else ({status})."
    if status == 429:
        return "The Hub takes no more requests for now (429)."
    if status is not None and status >= 500:
        return f"The Hub has an error of its own ({status})."
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."


def push_command(folder: str | Path, repo_id: str, revision: str | None = None, private: bool | None = None) -> str:
    """The command line that pushes a run's directory."""
    words = ["trl-flow", "push", str(folder), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision is not None else []
    return shlex.join(words)
