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


"""A run that goes on from its Hub repository."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..hub.downloading import download_run
from ..hub.uploading import files_below
from .saving import RUN_FILE


@contextmanager
def run_from_hub(trainer, name: str) -> Iterator[Path]:
    """
    Downloads a run beside the files of `output_dir`; when the `with` block has ended, and not after an error in it, it is in
    `output_dir`, as if the run had been made there.

    Args:
        trainer ([`FlowGRPOTrainer`]): The trainer that is to go on with it.
        name (`str`): `"user/repo"`, with `/checkpoint-<step>` and `@revision` if need be.

    Returns:
        `Path`: The checkpoint, until the block ends.

    Raises:
        ValueError: In all processes, if there is no such run, or `output_dir` holds one already.
    """
    output_dir = Path(trainer.args.output_dir)
    folder = output_dir / "_resuming"
    found = [None, None]
    if trainer.is_world_process_zero():
        try:
            _check_free(output_dir, name)
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            found[0] = download_run(name, folder, output_dir, trainer.args.hub_token)
        except (ValueError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            found[1] = error
    checkpoint, error = broadcast_object_list(found)
    if error is not None:
        raise error
    try:
        yield checkpoint
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError):  # a checkpoint that is refused: by the name that was given
            raise ValueError(f"{error}".replace(f"{checkpoint}", name)) from error
        raise
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        # What says that a checkpoint and a run are whole comes last.
        def whole(item):
            return item[0] == RUN_FILE, item[1].name.startswith("rollout_state_"), item[0]

        for file, path in sorted(files_below(folder).items(), key=whole):
            (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
            path.replace(output_dir / file)
        shutil.rmtree(folder)
    trainer.accelerator.wait_for_everyone()


def _check_free(output_dir: Path, name: str):
    if (output_dir / RUN_FILE).is_file():
        raise ValueError(
            f"resume_from_checkpoint={name!r} is on the Hub, but output_dir={output_dir} holds a run already. Go on with that one "
            "(resume_from_checkpoint=True), or choose another directory."
        )
