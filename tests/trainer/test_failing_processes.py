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
"""One of two processes has a reward that fails, is told to stop, or is killed: both go on, or both stop with the reason."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import prompts


SCRIPT = """
import json, os, sys
import torch
from peft import LoraConfig
from pipelines import brightness, prompts, redness, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer

rank = int(os.environ["RANK"])
bad = []

def fragile(images, **kwargs):
    # The second process loses the first of the six pictures of each rollout.
    if rank == 1 and len(images) == 6:
        bad[:] = [images[0].tobytes()]
    if any(image.tobytes() in bad for image in images):
        raise ConnectionError("no answer from the second machine")
    return redness(images)

outcomes = {}
for limit in (0.2, 0.05):
    config = FlowGRPOConfig(
        output_dir=f"{sys.argv[1]}/{limit}", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        max_steps=2, per_device_train_batch_size=2, learning_rate=1.0, num_inference_steps=4, num_generations=3,
        num_eval_inference_steps=3, guidance_scale=1.0, max_sequence_length=2, beta=0.0, ema_decay=0,
        max_nan_fraction=limit, multi_objective_aggregation="gdpo", eval_strategy="steps", eval_steps=1,
    )
    bad.clear()
    trainer = FlowGRPOTrainer(
        tiny_sd3(), [brightness, fragile], config, prompts(8), prompts(3),
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )
    try:
        trainer.train()
    except ValueError as error:
        outcomes[limit] = {"error": str(error), "step": trainer.state.global_step}
    else:
        weights = torch.cat([p.detach().flatten() for p in trainer._trainable])
        logs = trainer.state.log_history
        outcomes[limit] = {
            "failed": [entry["rewards/fragile/failed"] for entry in logs if "rewards/fragile/failed" in entry],
            "weights": weights.double().sum().item(),
            "moved": weights.isfinite().all().item(),
            "pictures": [
                entry["images_per_second"] * sum(entry[f"time/{phase}"] for phase in ("rollout", "decode", "reward"))
                for entry in logs
                if "images_per_second" in entry
            ],
            "shown": trainer.evaluated_samples and trainer.evaluated_samples.prompts,
        }
json.dump(outcomes, open(f"{sys.argv[1]}/{rank}.json", "w"))
"""


# The second process gets a signal in its third rollout.
SIGNALLED = """
import os, signal, sys
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.interruption import InterruptionCallback
from trl_flow.report import live

live.write_report = lambda *args, **kwargs: None
calls = []

def signalled(images, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:  # the first is a test
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return brightness(images)

config = FlowGRPOConfig(
    output_dir=sys.argv[1] + "/run", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="steps",
    save_steps=1, max_steps=5, per_device_train_batch_size=2, num_inference_steps=4, num_generations=3,
    guidance_scale=1.0, max_sequence_length=2, beta=0.0, ema_decay=0,
)
FlowGRPOTrainer(
    tiny_sd3(), signalled, config, prompts(8), callbacks=[InterruptionCallback()],
    peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
).train()
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess:
    script = folder / "train.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(script), str(folder), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_process_ends_the_others_with_what_to_do(tmp_path):
    # Without a launcher, which may end the others before they have spoken.
    script = tmp_path / "train.py"
    script.write_text(SIGNALLED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    survivor, killed = (
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), "SIGKILL"],
            env={**ENVIRONMENT, **world, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    said = survivor.communicate(timeout=300)[1]
    killed.communicate(timeout=300)
    assert (survivor.returncode, killed.returncode) == (1, -signal.SIGKILL)
    assert "ProcessLostError: Process 0 of 2 has lost another one after update 2." in said
    assert "Go on from the last checkpoint with resume_from_checkpoint=True, on any number of processes." in said
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_is_told_to_stop_stops_the_others_after_the_same_update(tmp_path):
    outcome = launch(tmp_path, SIGNALLED, "SIGTERM")
    assert outcome.returncode == 1
    assert outcome.stderr.count("Stopped after update 3 of 5") == 1, outcome.stderr
    assert "ProcessLostError" not in outcome.stderr
    last = tmp_path / "run" / "checkpoint-3"
    assert sorted(path.name for path in last.glob("rollout_state_*")) == ["rollout_state_0.pt", "rollout_state_1.pt"]
    assert not (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reward_that_fails_on_one_process(tmp_path):
    outcome = launch(tmp_path, SCRIPT)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # Below the limit both train, and to the same weights; the failures of one are in the logs of the other.
    assert first["0.2"]["failed"] == pytest.approx([1 / 12, 1 / 12])
    assert first["0.2"]["weights"] == second["0.2"]["weights"] and first["0.2"]["moved"]
    # Each process has its own times, and the log their means.
    assert first["0.2"]["pictures"] == pytest.approx([12, 12], rel=0.3), "those of both"
    # The first process shows the pictures that both have made.
    assert first["0.2"]["shown"] == prompts(3)["prompt"][:] and second["0.2"]["shown"] is None
    # Above it both stop, each with the reason.
    for result in (first, second):
        assert "failed for 1 of the 12 pictures of step 0 (brightness 0%, fragile 8%)" in result["0.05"]["error"]
        assert "ConnectionError: no answer from the second machine" in result["0.05"]["error"]
        assert result["0.05"]["step"] == 0
