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

"""What trackers have stored of a run, read back with their own readers or from their files."""

import json
import logging
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from trl_flow.report.history import Samples
from trl_flow.report.tracking import TrackerPictures, samples_grid


RUN = """
import json
from pathlib import Path

import trackio
import trackio.sqlite_storage
import wandb
from PIL import Image
from pipelines import brightness, prompts, redness, tiny_sd3
from transformers import TrainerCallback
from types import SimpleNamespace

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.report.history import Samples


class ReportThere(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        assert "0 of 1 updates" in Path("run/report.html").read_text()


def never(images, **kwargs):
    return [None] * len(images)


trainer = FlowGRPOTrainer(
    tiny_sd3(),
    reward_funcs=brightness,
    args=FlowGRPOConfig(
        "run", report_to=["tensorboard", "wandb", "trackio"], use_cpu=True, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, max_steps=1, per_device_train_batch_size=1, num_inference_steps=3,
        num_eval_inference_steps=2, num_generations=2, guidance_scale=1.0, max_sequence_length=2, beta=0.0, ema_decay=0,
        num_logged_images=2, eval_strategy="no",
    ),
    train_dataset=prompts(4),
    eval_dataset=prompts(3),
    eval_reward_funcs=[redness, never],
    callbacks=[ReportThere()],
)
trainer.train()  # evaluates before, and after, when trackio's run has been finished
trainer.evaluate(prompts(1))  # no pictures of another dataset

# A video, as an evaluation leaves it.
folder = Path("samples/step_000009")
folder.mkdir(parents=True)
frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
frames[0].save(folder / "000.gif", save_all=True, append_images=frames[1:])
frames[0].save(folder / "000.png")
frames[0].save(folder.with_suffix(".png"))
trainer.evaluated_samples = Samples(9, ["a film"], {"brightness": [None]}, [folder / "000.png"])
trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})

trackio.finish()
storage = trackio.sqlite_storage.SQLiteStorage
runs = storage.get_runs("huggingface")
Path("trackio.json").write_text(json.dumps({run: storage.get_logs("huggingface", run) for run in runs}, default=str))
wandb.finish()
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The directory of a run that all three trackers have followed."""
    directory = tmp_path_factory.mktemp("tracked")
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "HOME": str(directory),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(directory),
        "TRACKIO_DIR": str(directory / "trackio"),
        "PYTHONPATH": f"{tests.parent}:{tests}",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN)], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "did not take" not in done.stderr
    return directory


def wandb_history(directory: Path) -> list[dict]:
    """Rows of an offline run. W&B has no reader in Python; its file is a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    content, position, parts, rows = file.read_bytes(), 7, [], []
    assert content.startswith(b":W&B")
    while position < len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return rows


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


@pytest.mark.slow
class TestRealTrackers:
    def test_files(self, stored):
        samples = stored / "run" / "samples"
        for step in (0, 1):
            assert sorted(path.name for path in (samples / f"step_{step:06d}").iterdir()) == ["000.png", "001.png"]
            with Image.open(samples / f"step_{step:06d}.png") as grid:
                assert grid.width > 2 * 200, "two pictures side by side, enlarged"

    def test_tensorboard(self, stored):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # The events after training are in a file of their own.
        (folder,) = (stored / "run" / "runs").iterdir()
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        pictures = events.Images("eval/pictures")
        assert [picture.step for picture in pictures] == [0, 1, 1]
        (stored / "decoded.png").write_bytes(pictures[0].encoded_image_string)
        assert pixels(stored / "decoded.png") == pixels(stored / "run" / "samples" / "step_000000.png")
        scalars = set(events.Tags()["scalars"])
        assert {"train/reward", "train/time/rollout", "train/images_per_second", "eval/runtime"} <= scalars
        assert {"train/noise_level/step_0", "train/ratio/max", "train/frac_reward_zero_std"} <= scalars

    def test_wandb(self, stored):
        rows = wandb_history(stored)
        shown = [row for row in rows if "eval/pictures/path" in row]
        assert [row["train/global_step"] for row in shown] == [0, 1, 9]
        (files,) = stored.glob("wandb/offline-run-*/files")
        for row, step in zip(shown[:2], ("step_000000", "step_000001"), strict=True):
            assert pixels(files / row["eval/pictures/path"]) == pixels(stored / "run" / "samples" / f"{step}.png")
            table = json.loads((files / row["eval/scores/path"]).read_text())
            record = json.loads((stored / "run" / "samples" / f"{step}.json").read_text())
            assert table["columns"] == ["step", "prompt", "picture", "brightness", "redness", "never"]
            assert [line[1] for line in table["data"]] == record["prompts"][:2]
            assert [line[4] for line in table["data"]] == pytest.approx(record["scores"]["redness"][:2])
            assert [line[5] for line in table["data"]] == [None, None]
        video = files / shown[2]["eval/video_000/path"]
        assert video.read_bytes() == (stored / "samples" / "step_000009" / "000.gif").read_bytes()
        assert any("train/reward" in row and "train/time/reward" in row for row in rows)

    def test_trackio(self, stored):
        runs = json.loads((stored / "trackio.json").read_text())
        (rows,) = runs.values()  # and no second run for what is logged after training
        shown = [row for row in rows if "eval/pictures" in row]
        assert [row["train/global_step"] for row in shown] == [0, 1, 9]
        media = stored / "trackio" / "media"
        for row, step in zip(shown[:2], ("step_000000", "step_000001"), strict=True):
            folder = stored / "run" / "samples" / step
            assert pixels(media / row["eval/pictures"]["file_path"]) == pixels(folder.with_suffix(".png"))
            record = json.loads(folder.with_suffix(".json").read_text())
            table = row["eval/scores"]["_value"]
            assert [line["prompt"] for line in table] == record["prompts"][:2]
            assert [line["brightness"] for line in table] == pytest.approx(record["scores"]["brightness"][:2])
            assert pixels(media / table[1]["picture"]["file_path"]) == pixels(folder / "001.png")
        assert shown[2]["eval/scores"]["_value"][0]["brightness"] is None
        video = media / shown[2]["eval/video_000"]["file_path"]
        assert video.read_bytes() == (stored / "samples" / "step_000009" / "000.gif").read_bytes()


@pytest.fixture
def samples(tmp_path):
    folder = tmp_path / "samples" / "step_000003"
    folder.mkdir(parents=True)
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{number:03d}.png")
    paths = sorted(folder.glob("*.png"))
    found = Samples(3, ["a red square", "a blue one " * 100], {"strict": [0.5, None]}, paths)
    samples_grid(found).save(folder.with_suffix(".png"))
    return found


class TestTrackerPictures:
    def evaluated(self, samples, tensorboard, is_main=True):
        """Two evaluations."""
        callbacks = SimpleNamespace(callbacks=[tensorboard])
        callback = TrackerPictures(SimpleNamespace(callback_handler=callbacks, evaluated_samples=samples))
        args = TrainingArguments(output_dir="unused", report_to="none")
        state = TrainerState(global_step=3, is_world_process_zero=is_main)
        for _ in range(2):
            callback.on_evaluate(args, state, TrainerControl())

    def test_a_tracker_that_fails_costs_one_warning(self, samples, caplog):
        logging.getLogger("transformers").propagate = True
        with caplog.at_level("WARNING"):
            self.evaluated(samples, TensorBoardCallback())  # its writer has not been made
        (record,) = [record for record in caplog.records if "did not take" in record.message]
        assert record.message.startswith("TensorBoard did not take the pictures of an evaluation (AttributeError")

    def test_tensorboard_has_the_grid(self, samples, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        self.evaluated(samples, TensorBoardCallback(SummaryWriter(str(tmp_path / "events"))))
        picture, _ = EventAccumulator(str(tmp_path / "events")).Reload().Images("eval/pictures")
        assert picture.step == 3
        (tmp_path / "decoded.png").write_bytes(picture.encoded_image_string)
        assert pixels(tmp_path / "decoded.png") == pixels(samples.paths[0].parent.with_suffix(".png"))

    def test_nothing_without_pictures_and_in_other_processes(self, samples):
        # Each would fail, and say so, if it were asked for more.
        self.evaluated(None, None)
        samples.paths[0].parent.with_suffix(".png").unlink()
        self.evaluated(samples, None, is_main=False)


class TestSamplesGrid:
    def test_long_prompts_and_missing_scores(self, samples):
        grid = samples_grid(samples)
        assert grid.width < 2 * 300 and grid.height < 256 + 300
        assert grid.getpixel((20, 20)) == (255, 0, 0) and grid.getpixel((grid.width - 20, 20)) == (0, 0, 255)

    def test_strips_of_videos_have_rows_of_their_own(self, tmp_path):
        paths = []
        for number in range(3):
            paths.append(tmp_path / f"{number:03d}.png")
            Image.new("RGB", (1280, 320), "green").save(paths[-1])
        grid = samples_grid(Samples(0, ["a", "b", "c"], {}, paths))
        assert grid.width < 1100 and grid.height > 3 * 256
