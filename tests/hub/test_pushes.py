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

"""Runs that push to a Hub: what each strategy leaves there, what loads and resumes from it, and a Hub that fails."""

import json
import shlex

import pytest
from huggingface_hub import ModelCard
from loopback_hub import CUT, LoopbackHub

from trl_flow.hub.uploading import public_files


# Runs of a tiny pipeline, one after the other in one process. `run(name, **settings)` gives a trainer.
PRELUDE = """
import json, logging, sys, time, traceback
sys.path.insert(0, {tests!r})

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from pipelines import brightness, prompts, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.trainer import saving

waits, logged = [], []
time.sleep = waits.append  # neither the client nor we need to wait for a loopback Hub
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("trl_flow").addHandler(handler)

SETTINGS = dict(
    use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=False, save_strategy="steps",
    save_steps=1, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, num_inference_steps=4,
    num_eval_inference_steps=3, num_generations=3, guidance_scale=1.0, max_sequence_length=2, beta=0.0, ema_decay=0,
    eval_strategy="steps", eval_steps=1, logging_steps=1, push_to_hub=True, hub_token="hf_secret",
)

def run(name, callbacks=None, **settings):
    return FlowGRPOTrainer(
        model=tiny_sd3(), reward_funcs=brightness, train_dataset=prompts(6), eval_dataset=prompts(2), callbacks=callbacks,
        args=FlowGRPOConfig(**{{**SETTINGS, "output_dir": name, "hub_model_id": "user/" + name, **settings}}),
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )

def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer._trainable])

def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return pipeline(prompts(2)[0]["prompt"], latents=noise, num_inference_steps=3, guidance_scale=1.0,
                    max_sequence_length=2, output_type="pt").images

found = {{}}
"""
STRATEGIES = """
import threading
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainerCallback

# An average of the weights is what is pushed; the checkpoint holds those that training goes on from.
Path("end/_push-1").mkdir(parents=True)  # of a process that was killed
trainer = run("end", hub_strategy="end", ema_decay=0.5, hub_private_repo=True)
Path("end/notes.pt").write_bytes(b"a pickle")
Path("end/events.out.tfevents.1").write_bytes(b"TensorBoard's, with all paths")
trainer.train()
found["commits of training"] = len(HfApi().list_repo_commits("user/end")) - 1
found["end"] = trainer.push_to_hub(dataset_name="user/prompts").oid
raw = weights(trainer)
trainer.save_model()
found["unharmed"] = torch.equal(weights(trainer), raw)

table = {"noise_level": [0.7] * 4, "sigmas": trainer.sigmas.tolist(), "sde_type": trainer.args.sde_type}
Path("table.json").write_text(json.dumps(table))
trainer = run("every", hub_strategy="every_save", hub_revision="trial", noise_level="table.json")
trainer.train()
with trainer.averaged_weights():
    trained = picture(trainer.policy.pipeline)
base = tiny_sd3()
found["untrained"] = (picture(base) - trained).abs().max().item()
base.load_lora_weights("user/every", revision="trial")
found["diffusers"] = (picture(base) - trained).abs().max().item()
base = tiny_sd3()
base.transformer = PeftModel.from_pretrained(base.transformer, "user/every", revision="trial")
found["peft"] = (picture(base) - trained).abs().max().item()

trainer = run("checkpoint", hub_strategy="checkpoint", max_steps=3)
trainer.train()
whole = weights(trainer)
# As on another machine: only what the Hub had after the second update.
commit = next(c for c in HfApi().list_repo_commits("user/checkpoint") if c.title.endswith("step 2"))
folder = snapshot_download("user/checkpoint", revision=commit.commit_id, allow_patterns="last-checkpoint/*")
trainer = run("elsewhere", max_steps=3, push_to_hub=False)
trainer.train(resume_from_checkpoint=folder + "/last-checkpoint")
found["resumed"] = [trainer.state.global_step, torch.equal(weights(trainer), whole)]

# A connection so slow that the second save finds the first push going on.
over, push_files = threading.Event(), saving.push_files
class End(TrainerCallback):
    def on_train_end(self, *args, **kwargs):
        over.set()
def slow_push(*args, **kwargs):
    over.wait()
    return push_files(*args, **kwargs)
saving.push_files = slow_push
best = dict(load_best_model_at_end=True, metric_for_best_model="eval_reward", output_dir=str(Path("slow").resolve()))
run("slow", [End()], hub_strategy="all_checkpoints", max_steps=3, **best).train()
saving.push_files = push_files
found["left"] = [path.name for name in ("end", "every", "checkpoint", "slow") for path in Path(name).glob("_*")]
found["first weights"] = Path("slow/checkpoint-1/adapter_model.safetensors").read_bytes().hex()
found["last weights"] = Path("slow/checkpoint-3/adapter_model.safetensors").read_bytes().hex()
found["logged"] = list(logged)
"""
FAULTS = """
trainer = run("cut", hub_strategy="end", max_steps=1, eval_strategy="no", save_strategy="no")
trainer.train()
for name in ("cut", "cut-commit", "busy", "limited", "broken"):
    logged.clear(), waits.clear()
    trainer.hub_model_id, trainer.args.hub_model_id = None, "user/" + name
    trainer.push_to_hub()
    found[name] = {"logged": list(logged), "waits": list(waits)}

logged.clear()
trainer = run("refused", hub_strategy="checkpoint", hub_private_repo=True)
trainer.train()
found["refused"] = {"logged": list(logged), "step": trainer.state.global_step}
try:
    trainer.push_to_hub()
except saving.PushError as error:
    found["refused"]["error"] = str(error)
try:
    run("forbidden")
except saving.PushError as error:
    found["forbidden"] = str(error)

import contextlib, io
from trl_flow.cli import main
said = io.StringIO()
with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
    code = main("flow-grpo --config config.yaml --output_dir shapes --hub_model_id user/shapes".split())
found["command"] = {"code": code, "said": said.getvalue()}
print(json.dumps(found))
"""
SHAPES = """
model_name_or_path: shapes
max_steps: 1
num_inference_steps: 3
num_eval_inference_steps: 3
num_generations: 2
per_device_train_batch_size: 2
sde_steps: [0]
beta: 0.0
report_to: none
use_cpu: true
disable_tqdm: true
push_to_hub: true
"""
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
RESULT = ADAPTER | {"README.md", "run.json", "trainer_state.json", "curves.png", "report.html", "before_after.png"}
CHECKPOINT = ADAPTER | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_state_0.pt", "trainer_state.json"}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, request):
    """A Hub after runs of all kinds, what their process found, its folder, and the faults that were not met."""
    folder = tmp_path_factory.mktemp("runs")
    left = {
        "cut": [CUT],
        "cut-commit": [CUT],
        "busy": [409],
        "limited": [429, 429],
        "broken": [500],
        "forbidden": [403],
    }
    with LoopbackHub() as hub:

        def fault(method, path):
            name = path.split("/")[4] if path.startswith("/api/models/") else ""
            if method == "PUT" and ("model", "user/cut") in hub.repositories and left["cut"]:  # the upload of a file
                return left["cut"].pop()
            if method == "POST" and "/commit/" in path and name != "cut":
                return 401 if name in ("refused", "shapes") else left[name].pop() if left.get(name) else None
            if path == "/api/repos/create" and ("model", "user/refused") in hub.repositories:
                return left["forbidden"].pop() if left["forbidden"] else None
            return None

        hub.fault = fault
        (folder / "config.yaml").write_text(SHAPES)
        prelude = PRELUDE.format(tests=str(request.path.parent.parent))
        result = hub.run(prelude + STRATEGIES + FAULTS, cwd=folder)
        yield hub, json.loads(result.stdout.splitlines()[-1]), folder, left


def test_public_files(tmp_path):
    texts = {
        "config.yaml": "# trl-flow: `trl-flow g2rpo --config /home/me/out/config.yaml` repeats this run.\n"
        "dataset_name: /data/prompts.txt\n"
        'reward_funcs:\n- \'{"/home/me/reward": {"scale": 2}}\'\n- user/repo\n',
        "samples/step_000001.json": '{"prompts": ["/imagine a cat"]}',
        "run.json": '{"method":"G2RPO"}',
        "mine.json": "{",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = {name: tmp_path / name for name in texts}
    (tmp_path / "public").mkdir()
    public = public_files(files, tmp_path / "public")
    assert {name for name in files if public[name] != files[name]} == {"config.yaml"}
    assert public["config.yaml"].read_text() == (
        "# trl-flow: `trl-flow g2rpo --config config.yaml` repeats this run.\n"
        "dataset_name: prompts.txt\n"
        'reward_funcs:\n- \'{"reward": {"scale": 2}}\'\n- user/repo\n'
    )
    assert files["config.yaml"].read_text() == texts["config.yaml"]


def below(files, folder):
    return {name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")}


class TestStrategies:
    @pytest.mark.parametrize(
        "name, messages",
        [
            ("end", ["End of training", "Model save"]),
            ("every", ["Training in progress, step 1", "Training in progress, step 2"]),
            ("checkpoint", [f"Training in progress, step {step}" for step in (1, 2, 3)]),
            # The push of the second update was still waiting when the third one's took its place.
            ("slow", ["Training in progress, step 1", "Training in progress, step 3"]),
        ],
    )
    def test_every_commit_is_whole(self, pushed, name, messages):
        hub, *_ = pushed
        _, *commits = hub.repositories["model", f"user/{name}"].commits
        assert [commit.message for commit in commits] == messages
        for commit in commits:
            files = commit.files
            assert set(files) >= RESULT | {"samples/step_000001/000.png", "images/sample_0.png"}
            assert not [path for path in files if path.startswith("_") or "saving-" in path]
            outside = [path for path in files if not path.startswith(("checkpoint-", "last-checkpoint/"))]
            assert [path for path in outside if path.endswith((".pt", ".pth", ".bin", ".pkl"))] == [
                "training_args.bin"
            ]
            step = json.loads(files["trainer_state.json"])["global_step"]
            assert f"step {step}" in commit.message or step == 2

    def test_nothing_is_left_over_or_said(self, pushed):
        _, found, *_ = pushed
        assert found["left"] == [] and found["logged"] == []

    def test_no_file_holds_a_token_or_a_path(self, pushed):
        hub, _, folder, _ = pushed
        private = b"hf_secret", str(folder).encode(), b"TensorBoard's"
        state = json.loads((folder / "slow" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"].startswith(str(folder))
        assert f"output_dir: {folder}/slow\n" in (folder / "slow" / "config.yaml").read_text()
        for repository in hub.repositories.values():
            for commit in repository.commits:
                assert not [path for path, content in commit.files.items() if any(word in content for word in private)]
        files = hub.files("model", "user/slow")
        assert b"output_dir: slow\n" in files["config.yaml"]
        state = json.loads(files["checkpoint-3/trainer_state.json"])
        assert state["best_model_checkpoint"].startswith("checkpoint-")

    def test_end(self, pushed):
        hub, found, *_ = pushed
        repository = hub.repositories["model", "user/end"]
        assert repository.private and found["commits of training"] == 0
        assert repository.commits[1].sha == found["end"]
        card = ModelCard(repository.commits[1].files["README.md"].decode())
        assert card.data.datasets == ["user/prompts"] and "user/end" in card.text
        assert found["unharmed"]  # by pushing the average of its weights

    def test_both_formats_give_the_trained_pictures(self, pushed):
        _, found, *_ = pushed
        assert found["untrained"] > 1e-4 and found["diffusers"] == found["peft"] == 0

    def test_revision_and_calibration(self, pushed):
        hub, *_ = pushed
        repository = hub.repositories["model", "user/every"]
        assert set(repository.branches["main"].files) == {".gitattributes"}
        files = repository.branches["trial"].files
        assert json.loads(files["calibration.json"])["noise_level"] == [0.7] * 4
        assert b'load_lora_weights("user/every", revision="trial")' in files["README.md"]

    def test_a_run_goes_on_from_what_was_pushed(self, pushed):
        hub, found, *_ = pushed
        for commit in hub.repositories["model", "user/checkpoint"].commits[1:]:
            assert below(commit.files, "last-checkpoint") == CHECKPOINT | {"training_args.bin"}
        assert found["resumed"] == [3, True]

    def test_a_slow_push_is_of_one_moment_and_loses_no_checkpoint(self, pushed):
        hub, found, *_ = pushed
        _, first, last = hub.repositories["model", "user/slow"].commits
        assert first.files["adapter_model.safetensors"].hex() == found["first weights"] != found["last weights"]
        assert last.files["adapter_model.safetensors"].hex() == found["last weights"]
        for step in (1, 2, 3):
            assert below(last.files, f"checkpoint-{step}") == CHECKPOINT | {"training_args.bin"}


class TestFaults:
    @pytest.mark.parametrize(
        "name, said",
        [
            ("cut", None),  # the client itself sends a file again
            ("cut-commit", "RemoteProtocolError"),
            ("busy", "being changed by someone else (409). Trying again in 1 s."),
            ("limited", "takes no more requests for now (429). Trying again in 4 s."),
            ("broken", "has an error of its own (500). Trying again in 1 s."),
        ],
    )
    def test_what_passes_is_tried_again(self, pushed, name, said):
        hub, found, _, left = pushed
        assert left[name] == []  # it did fail
        files = hub.files("model", f"user/{name}")
        assert set(files) >= ADAPTER | {"README.md", "run.json", "trainer_state.json", "training_args.bin"}
        assert found[name]["logged"][-1:] == [] if said is None else said in found[name]["logged"][-1]
        assert found[name]["waits"]

    def test_a_refused_checkpoint_does_not_end_training(self, pushed):
        hub, found, folder, _ = pushed
        assert found["refused"]["step"] == 2
        first, second = [line for line in found["refused"]["logged"] if "is not on the Hub" in line]
        assert "Training goes on, but checkpoint-1 is not on the Hub" in first and "checkpoint-2" in second
        assert "refuses the token (401)" in first
        saved = {path.relative_to(folder / "refused").as_posix() for path in (folder / "refused").rglob("*")}
        assert saved >= RESULT and below(saved, "checkpoint-2") >= CHECKPOINT
        assert not [path for path in saved if path.startswith("_")]

    def test_the_command_of_the_error_pushes_it(self, pushed):
        hub, found, folder, _ = pushed
        error = found["refused"]["error"]
        assert error.startswith("refused could not be pushed to user/refused. The Hub refuses the token (401)")
        assert "Everything is saved in refused." in error
        hub.fault = lambda method, path: None
        words = shlex.split(error.partition("To push it later: ")[2])
        assert words[:2] == ["trl-flow", "push"] and "--private" in words
        hub.run("import sys; from trl_flow.cli import main; sys.exit(main(sys.argv[1:]))", *words[1:], cwd=folder)
        files = hub.files("model", "user/refused")
        assert set(files) >= RESULT and hub.repositories["model", "user/refused"].private

    def test_no_repository_no_training(self, pushed):
        _, found, folder, _ = pushed
        assert found["forbidden"].startswith("push_to_hub: there is no user/forbidden to push to. The Hub refuses")
        assert "(403)" in found["forbidden"] and found["forbidden"].endswith("Nothing is trained yet.")
        assert not (folder / "forbidden" / "run.json").exists()

    def test_the_command_line_fails_after_everything_is_saved(self, pushed):
        hub, found, folder, _ = pushed
        assert len(hub.repositories["model", "user/shapes"].commits) == 1
        said = found["command"]["said"]
        assert found["command"]["code"] == 1
        assert "shapes could not be pushed to user/shapes" in said and "trl-flow push shapes user/shapes" in said
        assert "Traceback" not in said
        names = {path.name for path in (folder / "shapes").iterdir()}
        assert names >= ADAPTER | {"README.md", "config.yaml", "report.html", "run.json"}
