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

"""Ctrl-C and SIGTERM while training: what is saved, said and returned, and that a resumed run is the same run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from transformers import TrainerCallback

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, cli
from trl_flow.interruption import Interrupted, InterruptionCallback


SETTINGS = {
    "dataset_name": "shapes", "num_eval_prompts": 3, "reward_funcs": "scores.redness", "lora_r": 2,
    "num_inference_steps": 2, "num_eval_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1,
    "num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 2, "max_steps": 6,
    "learning_rate": 0.01, "ema_decay": 0.9, "activation_checkpointing": "false", "bf16": "false", "use_cpu": "true",
    "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no", "report_to": "none",
}  # fmt: skip

# In one of its calls this reward waits until it is told to go on.
SCORES = """
import os, pathlib, time

calls = 0

def redness(images, **kwargs):
    global calls
    calls += 1
    if str(calls) == os.environ.get("WAIT_IN_CALL"):
        pathlib.Path("waiting").touch()
        while not pathlib.Path("go_on").exists():
            time.sleep(0.01)
    return [sum(image.convert("RGB").resize((1, 1)).getpixel((0, 0))[:1]) / 255 for image in images]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a reward, in which commands run."""
    (tmp_path / "scores.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report has tests of its own, and takes longer than these runs."""
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)


@pytest.fixture(autouse=True)
def handlers():
    """As in a terminal, wherever the tests run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(output_dir, **settings):
    values = {**SETTINGS, "output_dir": output_dir, **settings}
    return ["flow-grpo", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_sigterm_saves_and_the_command_that_it_names_ends_as_a_run_that_was_never_stopped(place, monkeypatch, capfd):
    """In the middle of the third of six updates, which is the first of its rollout's two, and would be evaluated."""

    def stop():
        while not (place / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        (place / "go_on").touch()

    with monkeypatch.context() as patched:
        patched.setenv("WAIT_IN_CALL", "4")  # a check, an evaluation and two rollouts
        threading.Thread(target=stop, daemon=True).start()
        assert cli.main(command("stopped")) == 143
    stdout, stderr = capfd.readouterr()
    assert "SIGTERM: training stops after this update" in stderr
    said = re.search(
        r"^Stopped after update 3 of 6, saved in stopped/checkpoint-3. Go on with: trl-flow (.+)$", stderr, re.M
    )
    assert said, stderr
    assert [path.name for path in place.glob("stopped/checkpoint-*")] == ["checkpoint-3"]
    evaluations = [path.name for path in place.glob("stopped/samples/*.json")]
    assert evaluations == ["step_000000.json"], "evaluated after the signal"
    assert "Held-out" not in stdout

    assert cli.main(shlex.split(said[1])) == 0
    assert cli.main(command("straight")) == 0
    assert adapter(place / "stopped") == adapter(place / "straight")
    logs = [
        json.loads((place / name / "trainer_state.json").read_text())["log_history"]
        for name in ("stopped", "straight")
    ]
    rewards = [[(entry["step"], entry["reward"]) for entry in log if "reward" in entry] for log in logs]
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_under_a_launcher_all_processes_stop_after_the_same_update(place, processes, number):
    """The signal goes to the launcher alone, as from a batch system."""
    launch = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    line = command("stopped", per_device_train_batch_size=2 // processes)
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_flow.cli", *line, *launch],
        env={**os.environ, "WAIT_IN_CALL": "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(place / "waiting", process)
    process.send_signal(number)
    (place / "go_on").touch()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number, stderr
    assert stderr.count("Stopped after update 3 of 6") == 1, stderr
    checkpoints = sorted(path.name for path in place.glob("stopped/checkpoint-*/rollout_state_*.pt"))
    assert checkpoints == [f"rollout_state_{rank}.pt" for rank in range(processes)]


def make_trainer(folder, reward=brightness, **settings):
    settings = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "max_steps": 4,
        "per_device_train_batch_size": 1, "learning_rate": 1e-2, "num_inference_steps": 3, "num_generations": 2,
        "num_eval_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 2, "ema_decay": 0,
        "save_strategy": "no", "beta": 0.0, **settings,
    }  # fmt: skip
    return FlowGRPOTrainer(
        tiny_sd3(),
        reward,
        FlowGRPOConfig(output_dir=str(folder), **settings),
        prompts(6),
        prompts(2),
        callbacks=[InterruptionCallback()],
        peft_config=LoraConfig(r=2, target_modules=["attn.to_q"]),
    )


def signalling(*numbers, call):
    """A reward in whose nth call the process gets signals. The first is a check, then comes the base model's evaluation."""
    calls = []

    def reward(images, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.001)  # where Python looks for signals
        return brightness(images)

    reward.__name__ = "brightness"  # a run is resumed with its own rewards
    return reward


def test_ctrl_c_in_python(tmp_path, capfd):
    trainer = make_trainer(tmp_path, signalling(signal.SIGINT, call=3), save_only_model=True, eval_on_start=False)
    with pytest.raises(Interrupted, match="SIGINT, saved in .*checkpoint-2") as caught:
        trainer.train()
    assert caught.value.exit_code == 130
    assert trainer.args.save_only_model, "only this checkpoint is complete"
    assert "Go on with: trainer.train(resume_from_checkpoint=True)" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    straight = make_trainer(tmp_path / "straight")
    straight.train()
    assert adapter(tmp_path) == adapter(tmp_path / "straight")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("strategy, step", [("steps", 2), ("best", 3)])
def test_an_evaluation_under_way_is_finished_and_its_update_saved(tmp_path, strategy, step):
    """With `save_strategy="best"` an evaluation that is no better saves nothing: the next update is saved instead."""
    trainer = make_trainer(
        tmp_path, lambda images, **kwargs: [0.5] * len(images), eval_strategy="steps", eval_steps=1,
        save_strategy=strategy, save_steps=99, metric_for_best_model="eval_reward",
    )  # fmt: skip
    evaluate = trainer.evaluate

    def interrupted(*args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    trainer.evaluate = interrupted
    with pytest.raises(Interrupted, match=f"checkpoint-{step}$"):
        trainer.train()
    assert (tmp_path / f"checkpoint-{step}" / "rollout_state_0.pt").is_file()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [0, 1, 2]


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_flow.interruption.ONE_SIGNAL", 0.0)
    trainer = make_trainer(tmp_path, signalling(signal.SIGINT, signal.SIGINT, call=4))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert type(caught.value) is KeyboardInterrupt
    assert trainer.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_a_launcher_repeats_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_flow.interruption.ONE_SIGNAL", 600.0)
    trainer = make_trainer(tmp_path, signalling(signal.SIGINT, signal.SIGINT, signal.SIGTERM, call=4))
    with pytest.raises(Interrupted, match="SIGINT, saved in .*checkpoint-2"):
        trainer.train()


def test_in_the_last_update_the_run_ends_as_it_would_have(tmp_path):
    trainer = make_trainer(tmp_path, signalling(signal.SIGINT, call=4), max_steps=2)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "rollout_state_0.pt").is_file()
    assert trainer.last_evaluation() == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("eval_strategy", ["steps", "no"])
def test_the_last_evaluation_does_not_cost_the_weights(tmp_path, monkeypatch, eval_strategy):
    """That of the loop, and that which follows it: with `save_strategy="no"` nothing else has been saved yet."""
    monkeypatch.setattr("trl_flow.interruption.ONE_SIGNAL", 0.0)
    settings = {
        "max_steps": 2,
        "eval_strategy": eval_strategy,
        "eval_steps": 2,
        "ema_decay": 0.5,
        "eval_on_start": False,
    }
    trainer = make_trainer(tmp_path / "stopped", signalling(signal.SIGINT, signal.SIGINT, call=4), **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    assert trainer.last_evaluation() is None and straight.last_evaluation() == 2
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "straight")


def test_after_a_run_that_failed_ctrl_c_is_what_it_was(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise MemoryError

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Failing())
    with pytest.raises(MemoryError):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored(tmp_path):
    """As under `nohup`, and for commands that a script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(tmp_path, signalling(signal.SIGINT, call=2), max_steps=1)
    trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_a_run_trains_as_without(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dry_run_that_is_stopped_leaves_nothing(place, monkeypatch, capfd, number):
    """While it loads, a command has handlers of its own; they are gone afterwards."""
    (place / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place / "temporary"))
    made = []

    def make_trainer(trainer_class, script_args, training_args):
        made.extend((place / "temporary").iterdir())
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr("trl_flow.scripts.training.make_trainer", make_trainer)
    assert cli.main([*command("nowhere"), "--dry_run"]) == 128 + number
    assert "trl-flow flow-grpo: interrupted" in capfd.readouterr().err
    assert len(made) == 1 and not list((place / "temporary").iterdir()) and not (place / "nowhere").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "error, code",
    [
        (None, 0),
        (ValueError("a setting"), 1),
        (Interrupted(signal.SIGINT, "checkpoint-1"), 130),
        (KeyboardInterrupt(), 130),
        (Interrupted(signal.SIGTERM, "checkpoint-1"), 143),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_exit_codes_are_those_that_help_names(monkeypatch, capsys, error, code):
    def run_training(command, *parsed, **kwargs):
        if error is not None:
            raise error

    monkeypatch.setattr("trl_flow.scripts.training.run_training", run_training)
    monkeypatch.setattr("trl_flow.scripts.launcher.needs_launch", lambda args: False)
    assert cli.main(["flow-grpo"]) == code
    assert cli.main(["--help"]) == 0
    documented = capsys.readouterr().out.partition("Exit codes:")[2]
    assert re.search(rf"\b{code}\b", documented)
