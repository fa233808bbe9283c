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


"""Runs that go on from their Hub repository, on a machine that has nothing of them."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from loopback_hub import HALF, LoopbackHub

from trl_flow.hub.downloading import parse_checkpoint


PRELUDE = """
import json, shutil, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})

from huggingface_hub import HfApi
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from transformers import TrainerCallback
from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.cli import main

waits, sleep = [], time.sleep
time.sleep = lambda seconds: waits.append(seconds) if seconds >= 1 else sleep(seconds)

SETTINGS = dict(
    use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=False, save_strategy="steps",
    save_steps=1, max_steps=4, per_device_train_batch_size=1, steps_per_generation=2, learning_rate=1e-2,
    num_inference_steps=4, num_eval_inference_steps=3, num_generations=3, guidance_scale=1.0, max_sequence_length=2,
    beta=0.0, ema_decay=0.5, eval_strategy="steps", eval_steps=2, eval_on_start=True, logging_steps=1,
)

def run(name, callbacks=None, kind=(FlowGRPOTrainer, FlowGRPOConfig), **settings):
    return kind[0](
        model=tiny_sd3(), reward_funcs=brightness, train_dataset=prompts(6), eval_dataset=prompts(2), callbacks=callbacks,
        args=kind[1](**{{**SETTINGS, "output_dir": name, **settings}}),
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3

def files(name):
    return sorted(path.relative_to(name).as_posix() for path in Path(name).rglob("*") if path.is_file())

def resumed(name, source):
    trainer = run(name)
    trainer.train(resume_from_checkpoint=source)
    log = [{{key: value for key, value in entry.items() if "time" not in key and not key.endswith("second")}}
           for entry in trainer.state.log_history if "train_runtime" not in entry]
    return {{"weights": Path(name, "adapter_model.safetensors").read_bytes().hex(), "log": log, "files": files(name)}}

def refused(name, source, **settings):
    try:
        run(name, **settings).train(resume_from_checkpoint=source)
    except ValueError as error:
        return {{"error": str(error), "files": files(name)}}

found = {{}}
"""
QUICK = """
found["straight"] = resumed("straight", None)
run("work", [Stop()], push_to_hub=True, hub_model_id="user/last", hub_strategy="checkpoint").train()
shutil.copytree("work/checkpoint-3", "user/here")
shutil.rmtree("work")

found["last"] = resumed("last", "user/last")
found["here"] = resumed("here", "user/here")
HfApi().create_repo("user/alone")
HfApi().upload_file(repo_id="user/alone", path_or_fileobj=b"A card.", path_in_repo="README.md")
found["refused"] = {
    "alone": refused("alone", "user/alone"),
    "missing": refused("missing", "user/last/checkpoint-40"),
    "nowhere": refused("nowhere", "user/nowhere"),
    "no revision": refused("no-revision", "user/last@trial"),
    "path": refused("path", "./checkpoint-3"),
    "other method": refused("other", "user/last", kind=(DenseGRPOTrainer, DenseGRPOConfig)),
}
before = files("straight")
found["occupied"] = refused("straight", "user/last")["error"]
found["untouched"] = files("straight") == before
print(json.dumps(found))
"""
SLOW = """
found["straight"] = resumed("straight", None)
settings = dict(load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=False, eval_steps=1)
best = run("best straight", **settings)
best.train()
found["best"] = [best.state.best_model_checkpoint]
run("work", [Stop()], push_to_hub=True, hub_model_id="user/all", hub_strategy="all_checkpoints").train()
run("best", [Stop()], push_to_hub=True, hub_model_id="user/best", hub_strategy="all_checkpoints", **settings).train()
shutil.rmtree("best")
for name in ("half", "broken"):
    HfApi().create_repo("user/" + name)
    HfApi().upload_folder(repo_id="user/" + name, folder_path="work", ignore_patterns=["checkpoint-2/*", "samples/step_000003*"])
shutil.rmtree("work")

found["all"] = resumed("all", "user/all@main")
found["named"] = resumed("named", "user/all/checkpoint-1")
found["half"] = resumed("half", "user/half")
found["broken"] = refused("broken", "user/broken")
resumed_best = run("best resumed", **settings)
resumed_best.train(resume_from_checkpoint="user/best")
found["best"] += [resumed_best.state.best_model_checkpoint]
found["best"] += [Path(name, "adapter_model.safetensors").read_bytes().hex() for name in ("best straight", "best resumed")]

line = "flow-grpo --config config.yaml --output_dir shapes --push_to_hub --hub_model_id user/shapes".split()
codes = [main([*line, "--hub_strategy", "all_checkpoints"])]
codes += [main("flow-grpo --config config.yaml --output_dir again --resume_from_checkpoint user/shapes/checkpoint-1".split())]
found["command"] = [codes, [Path(name, "adapter_model.safetensors").read_bytes().hex() for name in ("shapes", "again")]]
found["config"] = Path("again/config.yaml").read_text()
print(json.dumps(found))
"""
TRAIN_ON_TWO = """
name = sys.argv[1]
pushes = dict(push_to_hub=True, hub_model_id="user/two", hub_strategy="checkpoint") if name == "stopped" else {}
trainer = run(name, [Stop()] if name == "stopped" else None, **pushes)
trainer.train(resume_from_checkpoint={"resumed": "user/two", "refused": "user/nothing"}.get(name))
trainer.accelerator.wait_for_everyone()
"""
LAUNCH = """
import subprocess, sys
launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *sys.argv[1:]]
sys.exit(subprocess.run(launch).returncode)
"""
SHAPES = """
model_name_or_path: shapes
max_steps: 2
num_inference_steps: 3
num_generations: 2
per_device_train_batch_size: 2
sde_steps: [0]
beta: 0.0
learning_rate: 0.01
eval_strategy: "no"
save_strategy: steps
save_steps: 1
report_to: none
use_cpu: true
disable_tqdm: true
"""


@contextmanager
def played(script, folder):
    """What a process found, the Hub, and the paths whose downloads failed."""
    failed = []
    with LoopbackHub() as hub:

        def fault(method, path):
            if method == "GET" and path.endswith("checkpoint-3/optimizer.pt"):
                if path.startswith("/user/broken/"):
                    failed.append(path)
                    return 503
                if path.startswith("/user/half/") and not any("half" in name for name in failed):
                    failed.append(path)
                    return HALF
            return None

        hub.fault = fault
        result = hub.run(PRELUDE.format(tests=str(Path(__file__).parents[1])) + script, cwd=folder)
        yield json.loads(result.stdout.splitlines()[-1]), hub, failed


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with played(QUICK, tmp_path_factory.mktemp("quick")) as results:
        yield results


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    (folder / "config.yaml").write_text(SHAPES)
    with played(SLOW, folder) as results:
        yield results


def check_resumed(found, name, begun):
    """Weights, log and files, but for the checkpoints before the one that it went on from."""
    straight, resumed = found["straight"], found[name]
    assert resumed["weights"] == straight["weights"]
    assert resumed["log"] == straight["log"]
    left_out = tuple(f"checkpoint-{step}/" for step in range(1, begun))
    expected = [path for path in straight["files"] if not path.startswith(left_out)]
    assert resumed["files"] == expected
    assert "samples/step_000000/000.png" in expected and f"checkpoint-{begun}/optimizer.pt" in expected


def test_a_run_ends_as_one_that_was_never_stopped(quick):
    found, hub, _ = quick
    assert "last-checkpoint/optimizer.pt" in hub.files("model", "user/last")
    assert json.loads(hub.files("model", "user/last")["trainer_state.json"])["global_step"] == 3
    check_resumed(found, "last", begun=3)


def test_a_directory_comes_before_a_repository(quick):
    found, hub, _ = quick
    assert found["here"]["weights"] == found["straight"]["weights"]
    assert not [path for _, path in hub.requests if "user/here" in path]


@pytest.mark.parametrize(
    "name, said",
    [
        ("alone", "holds no checkpoint, but README.md. Runs push checkpoints with hub_strategy='checkpoint'"),
        ("missing", "holds no checkpoint-40, but last-checkpoint."),
        ("nowhere", "The Hub has no such repository or revision, or the token may not read it (404)."),
        ("no revision", "The Hub has no such repository or revision, or the token may not read it (404)."),
        ("path", "is no directory here. Expected one, True (the last checkpoint of output_dir), or a repository"),
        (
            "other method",
            "resume_from_checkpoint=user/last is a checkpoint of Flow-GRPO, but this trainer is DenseGRPO",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_leaves_nothing(quick, name, said):
    refused = quick[0]["refused"][name]
    assert said in refused["error"]
    assert refused["files"] == []


def test_a_directory_that_holds_a_run_stays_as_it_is(quick):
    found, *_ = quick
    assert "output_dir=straight holds a run already" in found["occupied"]
    assert found["untouched"]


@pytest.mark.slow
@pytest.mark.parametrize("name, begun", [("all", 3), ("named", 1), ("half", 3)])
def test_any_checkpoint_of_all(slow, name, begun):
    found, hub, _ = slow
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= set(hub.files("model", "user/all"))
    check_resumed(found, name, begun)


@pytest.mark.slow
def test_the_best_checkpoint_comes_with_the_last(slow):
    straight, resumed, expected, weights = slow[0]["best"]
    assert Path(straight).name == Path(resumed).name in ("checkpoint-1", "checkpoint-2")  # before the last one
    assert resumed.startswith("best resumed")
    assert weights == expected


@pytest.mark.slow
def test_a_download_that_breaks_is_taken_up_again(slow):
    _, _, failed = slow
    assert len([path for path in failed if path.startswith("/user/half/")]) == 1


@pytest.mark.slow
def test_a_download_that_keeps_failing_leaves_nothing(slow):
    found, _, failed = slow
    assert len([path for path in failed if path.startswith("/user/broken/")]) == 4
    assert "could not be downloaded. The Hub has an error of its own (503)" in found["broken"]["error"]
    assert found["broken"]["files"] == []


@pytest.mark.slow
def test_the_command_line(slow):
    codes, (straight, resumed) = slow[0]["command"]
    assert codes == [0, 0]
    assert resumed == straight
    assert "resume_from_checkpoint" not in slow[0]["config"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_download_once_and_both_go_on(tmp_path):
    """And both end when there is nothing to go on with."""
    train = PRELUDE.format(tests=str(Path(__file__).parents[1])) + TRAIN_ON_TWO
    (tmp_path / "train.py").write_text(train)
    with LoopbackHub() as hub:
        for name in ("straight", "stopped", "resumed", "refused"):
            result = hub.run(
                LAUNCH, name, cwd=tmp_path, env={"HF_HOME": str(tmp_path / f"home of {name}")}, check=False
            )
            assert (result.returncode == 0) == (name != "refused"), result.stderr[:6000]
            if name == "stopped":
                hub.requests.clear()
            if name == "resumed":
                downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert result.stderr.count("ValueError: resume_from_checkpoint='user/nothing' is no directory here") == 2
    assert not (tmp_path / "refused" / "run.json").exists()
    assert sorted(path.name for path in (tmp_path / "resumed").glob("checkpoint-3/rollout_state_*.pt")) == [
        "rollout_state_0.pt",
        "rollout_state_1.pt",
    ]
    assert len(downloads) == len(set(downloads)) > 10
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo@v1.0", ("user/repo", None, "v1.0")),
        ("user/repo@feature/x", ("user/repo", None, "feature/x")),
        ("user/repo/checkpoint-40@main", ("user/repo", "checkpoint-40", "main")),
        ("user/repo/last-checkpoint", ("user/repo", "last-checkpoint", None)),
        ("user/checkpoint-40", ("user/checkpoint-40", None, None)),
        ("runs/first/of/many", None),
        ("../runs", None),
        ("./first/checkpoint-1", None),
        ("/runs/first", None),
        ("first", None),
    ],
)
def test_names(name, expected):
    assert parse_checkpoint(name) == expected
