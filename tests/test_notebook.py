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


"""Training where an event loop runs already, as in a notebook, and what a notebook shows of it."""

import asyncio
import base64
import io
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image
from pipelines import brightness, prompts, tiny_sd3
from transformers import TrainerCallback

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, NotebookProgress
from trl_flow.notebook import MOST_ROWS, in_notebook, log_table
from trl_flow.report import ProgressLine
from trl_flow.rewards.check import check_reward


NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "shapes.ipynb"
SETTINGS = {
    "use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "max_steps": 2, "save_strategy": "no",
    "per_device_train_batch_size": 1, "learning_rate": 1e-2, "num_inference_steps": 3, "num_generations": 2,
    "num_eval_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 2, "ema_decay": 0, "beta": 0.0,
    "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report has tests of its own."""
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)


def make_trainer(folder, reward=brightness, **settings):
    return FlowGRPOTrainer(
        tiny_sd3(),
        reward,
        FlowGRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        prompts(6),
        prompts(3),
        peft_config=LoraConfig(r=2, target_modules=["attn.to_q"]),
    )


# ---- A running event loop ----


async def asynchronous(images, **kwargs):
    await asyncio.sleep(0)
    return brightness(images)


def awaitable(images, **kwargs):
    """An asynchronous function that nobody can tell from a plain one."""
    return asynchronous(images)


@pytest.mark.parametrize(
    "reward",
    [*(pytest.param(reward, marks=pytest.mark.slow) for reward in (brightness, awaitable)), asynchronous],
    ids=lambda reward: reward.__name__,
)
def test_training_within_a_running_event_loop(tmp_path, reward):
    async def main():
        trainer = make_trainer(tmp_path / "inside", reward, disable_tqdm=True)
        trainer.train()
        await asyncio.sleep(0)  # the loop goes on
        return trainer.evaluate()

    inside = asyncio.run(main())
    trainer = make_trainer(tmp_path / "outside", brightness, disable_tqdm=True)
    trainer.train()
    outside = trainer.evaluate()
    assert inside["eval_reward"] == outside["eval_reward"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("inside", "outside")]
    assert weights[0] == weights[1]


def test_a_reward_is_checked_within_a_running_event_loop():
    async def main():
        return check_reward(asynchronous)

    assert [finding for finding in asyncio.run(main()) if finding.passed is False] == []


# ---- What is shown ----


@pytest.fixture
def shell(monkeypatch):
    """A shell of IPython that keeps what is displayed, and takes itself for a notebook's."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance()
    monkeypatch.setattr(shell, "display_pub", CapturingDisplayPublisher())
    monkeypatch.setitem(shell.config, "IPKernelApp", Config())
    yield shell
    InteractiveShell.clear_instance()


def shown(shell) -> dict[str, list[dict]]:
    """What stood in each place of the output, one after the other."""
    places = {}
    for message in shell.display_pub.outputs:
        place = message["transient"]["display_id"]
        assert message["update"] == (place in places)
        places.setdefault(place, []).append(message["data"])
    return places


def picture(data) -> Image.Image:
    content = data["image/png"]
    return Image.open(io.BytesIO(base64.b64decode(content) if isinstance(content, str) else content))


class Watching(TrainerCallback):
    """Notes how many places the output has after each update."""

    def __init__(self, shell):
        self.shell, self.places = shell, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.places[state.global_step] = len(shown(self.shell))


def test_a_run_is_one_output_that_is_kept_up_to_date(tmp_path, shell):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(watching := Watching(shell))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(NotebookProgress) == 1 and ProgressLine not in kinds
    trainer.train()
    page, pictures, curves = shown(shell).values()
    assert watching.places == {1: 2, 2: 2}  # no curves before the end

    assert 'value="0" max="2"' in page[0]["text/html"]
    last = page[-1]["text/html"]
    assert 'value="2" max="2"' in last and "2/2 updates | reward" in last and "brightness" in last
    assert "2/2 updates" in page[-1]["text/plain"]
    rows = [re.findall(r"<t[dh]>(.*?)</t", row) for row in re.findall("<tr>(.*?)</tr>", last)]
    assert rows[0][:3] == ["update", "held-out brightness", "reward"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2"]
    held_out = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [row[1] for row in rows[1:]] == [f"{held_out[0]:.4g}", "", f"{held_out[1]:.4g}"]

    before, after = picture(pictures[0]), picture(pictures[-1])
    assert after.width == before.width and after.height > 1.5 * before.height  # one row, then two
    # The first row stays what it was: the same prompts, the same noise.
    assert after.crop((10, 40, 170, 190)).tobytes() == before.crop((10, 40, 170, 190)).tobytes()
    assert picture(curves[-1]).width > 500
    assert picture(curves[-1]).convert("RGBA").getpixel((2, 2)) == (255, 255, 255, 255)  # also on a dark page


def test_an_evaluation_before_training_is_shown(tmp_path, shell):
    make_trainer(tmp_path).evaluate()
    page, pictures = shown(shell).values()
    assert "held-out brightness" in page[-1]["text/html"]
    assert picture(pictures[-1]).width > 400


def test_by_hand_and_switched_off(tmp_path, shell):
    trainer = make_trainer(tmp_path, disable_tqdm=True)
    trainer.add_callback(NotebookProgress(num_pictures=0))
    trainer.train()
    assert len(shown(shell)) == 2  # the page and the curves
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(NotebookProgress) == 1 and ProgressLine not in kinds


def test_pictures_that_cannot_be_shown_do_not_cost_the_run(tmp_path, shell):
    broken = tmp_path / "samples" / "step_000099"
    broken.mkdir(parents=True)
    (broken / "000.png").write_bytes(b"no picture")
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 2 and len(shown(shell)) == 1


def test_elsewhere_there_is_a_line(tmp_path):
    assert not in_notebook()
    kinds = [type(callback) for callback in make_trainer(tmp_path).callback_handler.callbacks]
    assert ProgressLine in kinds and NotebookProgress not in kinds


def test_a_long_table_keeps_its_first_row_the_newest_and_evaluations():
    log = [{"step": step, "reward": step / 8, "eval_rewards/<b>/mean": None} for step in range(40)]
    log += [{"step": step, "eval_rewards/<b>/mean": 0.5} for step in (0, 15, 16, 30)]
    log.append({"step": 39, "train_runtime": 5.0, "reward": 77.0})
    table = log_table(log)
    assert "held-out &lt;b&gt;" in table
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)[1:]]
    assert [row[0] for row in rows] == ["0", "⋮", "15", "16", "⋮", "30", "⋮", *map(str, range(34, 40))]
    assert rows[0] == ["0", "0.5", "0"] and rows[1] == ["⋮"] * 3 and rows[-1] == ["39", "", "4.875"]
    everywhere = log_table([{"step": step, "eval_rewards/b/mean": 0.5} for step in range(100)])
    assert everywhere.count("<tr>") == 1 + 1 + 1 + MOST_ROWS // 2
    assert log_table([]) == ""


# ---- The notebook among the examples ----


def test_the_notebook_is_stored_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    smaller = {
        "max_steps=60": "max_steps=2",
        "eval_steps=20": "eval_steps=1",
        "logging_steps=5": "logging_steps=1",
        "num_generations=12": "num_generations=3",
        "per_device_train_batch_size=12": "per_device_train_batch_size=2",
        "num_prompts=256": "num_prompts=4",
    }
    for setting, value in smaller.items():
        assert sum(setting in cell.source for cell in notebook.cells) == 1, setting
        for cell in notebook.cells:
            cell.source = cell.source.replace(setting, value)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    outputs = {
        cell.source.partition("\n")[0]: [output for output in cell.outputs if output.output_type != "stream"]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    plan = outputs["trainer.plan()"][0].data
    assert plan["image/svg+xml"].startswith("<svg") and "sigma" in plan["text/plain"]
    page, pictures, curves = [output.data for output in outputs["trainer.train();"]]
    assert "2/2 updates" in page["text/html"] and "held-out shapes" in page["text/html"]
    assert picture(pictures).height > 400 and picture(curves).width > 500
    compared = next(
        cell for cell in notebook.cells if "load_lora_weights(" in cell.source and cell.cell_type == "code"
    )
    grid = picture(compared.outputs[-1].data)
    assert len(grid.getcolors(grid.width * grid.height)) > 100
    assert "with the adapter" in notebook.cells[-1].outputs[-1].data["text/plain"]
    assert (tmp_path / "shapes-flow-grpo" / "pytorch_lora_weights.safetensors").is_file()
    errors = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert errors == []


CELLS = [
    """
import asyncio, os, signal, sys, time
sys.path.insert(0, {tests!r})

from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, InterruptionCallback
from trl_flow.interruption import Interrupted

calls = []

async def reward(images, **kwargs):
    calls.append(1)
    if len(calls) == 4:  # a check, an evaluation and two rollouts
        os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(0.1)
    return brightness(images)

trainer = FlowGRPOTrainer(
    tiny_sd3(), reward, FlowGRPOConfig(output_dir="run", **{settings!r}), prompts(6), prompts(3),
    callbacks=[InterruptionCallback()], peft_config=LoraConfig(r=2, target_modules=["attn.to_q"]),
)
""",
    """
try:
    trainer.train()
except Interrupted as stopped:
    print(stopped)
""",
    "(await asyncio.sleep(0, trainer)).train(resume_from_checkpoint=True).global_step",
]


@pytest.mark.slow
def test_the_button_that_stops_a_cell_saves_and_the_next_cell_goes_on(tmp_path, monkeypatch):
    """The button sends SIGINT."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = {"tests": str(Path(__file__).parent), "settings": {**SETTINGS, "max_steps": 4}}
    sources = [CELLS[0].format(**values), *CELLS[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    _, stopped, resumed = [cell.outputs for cell in notebook.cells]
    said = "".join(output.text for output in stopped if output.output_type == "stream")
    assert "SIGINT, saved in run/checkpoint-2" in said
    assert "Go on with: trainer.train(resume_from_checkpoint=True)" in said
    pages = [
        next(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
        for outputs in (stopped, resumed)
    ]
    assert "2/4 updates" in pages[0] and "4/4 updates" in pages[1]
    assert resumed[-1].data["text/plain"] == "4"
