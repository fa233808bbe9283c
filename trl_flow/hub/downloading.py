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

"""A run's directory from its Hub repository, with the checkpoint that it goes on from."""

import glob
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .uploading import explain, retried


LAST_CHECKPOINT = "last-checkpoint"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(
    rf"(?P<repo_id>[\w.-]+/[\w.-]+?)(/(?P<checkpoint>{LAST_CHECKPOINT}|checkpoint-\d+))?(@(?P<revision>[^@]+))?"
)
_CHECKPOINT = re.compile(rf"({LAST_CHECKPOINT}|checkpoint-\d+)/.+")


class HubCheckpoint(NamedTuple):
    """Where a checkpoint is on the Hub: `checkpoint` is its folder, `None` for the newest."""

    repo_id: str
    checkpoint: str | None
    revision: str | None


def parse_checkpoint(name: str) -> HubCheckpoint | None:
    """`"user/repo"`, `"user/repo@revision"`, `"user/repo/checkpoint-40"` or `"user/repo/checkpoint-40@revision"`, else `None`."""
    match = _NAME.fullmatch(name)
    return None if match is None or name.startswith((".", "/")) else HubCheckpoint(**match.groupdict())


def download_run(name: str, folder: str | Path, output_dir: str | Path, token: str | None = None) -> Path:
    """
    Puts what a repository holds of a run where the run has it: its files and pictures, and one checkpoint (with the best
    one so far, where that is there) as `checkpoint-<step>`.

    Everything is downloaded into the cache first, where an interrupted download is taken up again.

    Args:
        name (`str`):
            As [`parse_checkpoint`] takes it.
        folder (`str` or `Path`):
            Where the files go.
        output_dir (`str` or `Path`):
            Where they go in the end: a checkpoint names the best one by its path.
        token (`str`, *optional*):
            Token with read permission. Defaults to the one that is logged in.

    Returns:
        `Path`: the checkpoint in `folder`.

    Raises:
        ValueError: There is no such repository, revision or checkpoint, or the Hub cannot be reached.
    """
    asked = parse_checkpoint(name)
    if asked is None:
        raise ValueError(
            f"resume_from_checkpoint={name!r} is no directory here. Expected one, True (the last checkpoint of output_dir), or "
            "a repository on the Hub: 'user/repo', 'user/repo@revision', 'user/repo/checkpoint-40'."
        )
    try:
        # One commit, whatever is pushed meanwhile.
        repository = retried(
            lambda: HfApi(token=token).model_info(asked.repo_id, revision=asked.revision), f"looking for {name}"
        )
        there = [file.rfilename for file in repository.siblings]
        fetch = _Fetch(asked.repo_id, repository.sha, token)
        chosen = _choose(asked, name, there, fetch)
        step = chosen.removeprefix("checkpoint-")
        if chosen == LAST_CHECKPOINT:
            step = json.loads((fetch([f"{chosen}/{TRAINER_STATE}"]) / chosen / TRAINER_STATE).read_text())[
                "global_step"
            ]
        wanted = {path: path for path in there if not _CHECKPOINT.fullmatch(path) and not path.startswith(".")}
        wanted |= {path: f"checkpoint-{step}/{path.partition('/')[2]}" for path in _below(there, chosen)}
        snapshot = fetch(list(wanted))
        state = json.loads((snapshot / chosen / TRAINER_STATE).read_text())
        if state.get("best_model_checkpoint"):
            best = Path(state["best_model_checkpoint"]).name
            wanted |= {path: path for path in _below(there, best) if best != chosen}
            snapshot = fetch(list(wanted))
            state["best_model_checkpoint"] = str(Path(output_dir) / best)
    except (httpx2.HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = explain(error)
        if status in (401, 403, 404):
            reason = f"The Hub has no such repository or revision, or the token may not read it ({status})."
        raise ValueError(
            f"resume_from_checkpoint={name!r} is no directory here, and could not be downloaded. {reason} What has arrived is "
            "kept in the cache of the Hub's client."
        ) from error

    checkpoint = Path(folder) / f"checkpoint-{step}"
    for path, local in wanted.items():
        target = Path(folder) / local
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / path, target)  # what a link in the cache points to
    (checkpoint / TRAINER_STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    return checkpoint


class _Fetch(NamedTuple):
    """Call with paths of one commit: the folder in the cache that holds them."""

    repo_id: str
    commit: str
    token: str | None

    def __call__(self, paths: list[str]) -> Path:
        def fetch():
            try:
                return snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    token=self.token,
                    allow_patterns=[glob.escape(path) for path in paths],
                )
            except LocalEntryNotFoundError as error:
                # It has lost the answer of the Hub, which says whether to try again.
                raise error.__cause__ or OSError(str(error)) from None

        return Path(retried(fetch, f"downloading from {self.repo_id}"))


def _below(paths: list[str], folder: str) -> list[str]:
    return [path for path in paths if path.startswith(f"{folder}/")]


def _choose(asked: HubCheckpoint, name: str, there: list[str], fetch: _Fetch) -> str:
    """The folder of the checkpoint that is asked for."""
    folders = {
        path.partition("/")[0] for path in there if _CHECKPOINT.fullmatch(path) and path.endswith(f"/{TRAINER_STATE}")
    }
    numbered = sorted(folders - {LAST_CHECKPOINT}, key=lambda folder: int(folder.removeprefix("checkpoint-")))
    in_order = [*numbered, *(folders & {LAST_CHECKPOINT})]
    if asked.checkpoint in folders:
        return asked.checkpoint
    where = f"{asked.repo_id} (revision {asked.revision or 'main'}, commit {fetch.commit[:8]})"
    if asked.checkpoint is not None and folders:
        raise ValueError(
            f"resume_from_checkpoint={name!r}: {where} holds no {asked.checkpoint}, but {', '.join(in_order)}."
        )
    if not folders:
        files = sorted({path.partition("/")[0] for path in there if not path.startswith(".")})
        listed = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        raise ValueError(
            f"resume_from_checkpoint={name!r}: {where} holds no checkpoint, but {listed or 'nothing'}. Runs push checkpoints "
            "with hub_strategy='checkpoint' (the last one) or 'all_checkpoints'. To begin a new run with the adapter: "
            f"adapter_name_or_path={asked.repo_id!r}."
        )
    if LAST_CHECKPOINT in folders and numbered:
        # A run whose strategy was changed: either may be the newer one.
        path = f"{LAST_CHECKPOINT}/{TRAINER_STATE}"
        last = json.loads((fetch([path]) / path).read_text())["global_step"]
        return LAST_CHECKPOINT if last >= int(numbered[-1].removeprefix("checkpoint-")) else numbered[-1]
    return in_order[-1]
