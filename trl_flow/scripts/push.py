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

"""`trl-flow push`: a finished run to a repository on the Hub."""

import argparse
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .parser import FlowParser
from .quiet import quieten


@dataclass
class PushArguments:
    r"""
    Arguments of `trl-flow push`.

    Args:
        run (`str`, *optional*):
            Directory of the run. May stand first on the command line without its name.
        repo_id (`str`, *optional*):
            Repository on the Hub, `user/repo`, made where it does not exist. May stand second, likewise.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to push to, made where it does not exist. By default `main`.
        message (`str`, *optional*):
            First line of the commit.
    """

    run: str | None = field(default=None, metadata={"help": "Directory of the run."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, `user/repo`, made where it does not exist."}
    )
    private: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, made where it does not exist. By default `main`."}
    )
    message: str | None = field(default=None, metadata={"help": "First line of the commit."})

    def __post_init__(self):
        if self.run is None:
            raise ValueError("name the directory of a run")
        if self.repo_id is None:
            raise ValueError("name the repository to push to: user/repo")


class PushParser(FlowParser):
    """Takes the run and the repository without their names, too, if they come first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} RUN USER/REPO [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        args = list(args or [])
        named = []
        for name in ("--run", "--repo_id"):
            if args and not args[0].startswith("-"):
                named += [name, args.pop(0)]
        return super().parse_args_and_config([*named, *args], **kwargs)


def check_run(run: str) -> Path:
    """The directory, if it holds a run that trained something."""
    from ..hub import holds_policy

    folder = Path(run)
    if not (folder / "run.json").is_file():
        raise ValueError(f"run={run} is not the output directory of a run: it holds no run.json.")
    if not holds_policy(folder):
        raise ValueError(
            f"run={run} holds nothing that was trained yet. A run saves when it ends; go on with it: "
            "--resume_from_checkpoint true."
        )
    return folder


def push(args: PushArguments) -> str:
    """
    Push everything in one commit, so that a repository is never half of one run and half of another.

    Returns:
        `str`: Address of the commit.
    """
    import httpx2
    from huggingface_hub import create_repo

    from ..hub.model_card import CARD_FILE, card_json, load_card_facts, render_model_card
    from ..hub.uploading import TRAINING_ARGUMENTS, PushError, explain, push_files, retried, run_files

    folder = check_run(args.run)
    # The card names the repository that it goes to, whatever it named before.
    facts = load_card_facts(folder, hub_model_id=args.repo_id, hub_revision=args.revision)
    # The settings are in config.yaml, and a pickle is nothing to load from a stranger.
    files = {name: path for name, path in run_files(folder).items() if Path(name).name != TRAINING_ARGUMENTS}
    staging = Path(tempfile.mkdtemp())
    try:
        for name, text in (("README.md", render_model_card(folder, facts)), (CARD_FILE, card_json(facts))):
            files[name] = staging / name
            files[name].write_text(text, "utf-8")
        repository = retried(
            lambda: create_repo(args.repo_id, private=args.private or None, exist_ok=True),
            f"making the repository {args.repo_id}",
        )
        message = args.message or f"Push {folder.resolve().name}"
        return push_files(files, repository.repo_id, message, revision=args.revision).commit_url
    except (httpx2.HTTPError, ValueError) as error:  # ValueError: the Hub does not accept the card
        raise PushError(
            f"{args.run} could not be pushed to {args.repo_id}: {explain(error)} Nothing was committed."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(args: PushArguments):
    quieten(progress_bars=True)
    print(f"Pushed: {push(args)}")


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = (
        "Push a finished run to the Hub in one commit: what was trained, in both formats, the model card, pictures, "
        "curves and settings. Checkpoints and pickles stay where they are."
    )
    if subparsers is not None:
        return subparsers.add_parser("push", help=description, dataclass_types=(PushArguments,))
    return PushParser(prog=prog, dataclass_types=(PushArguments,), description=description)
