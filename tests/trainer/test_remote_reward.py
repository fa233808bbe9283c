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

"""Training on a reward server, killed and started again, or shared by processes, is training on the reward itself."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_flow.rewards import remote


# A server for each port that is written to it, one after the other, without importing everything anew.
SERVERS = """
import os
import sys

import numpy as np

from trl_flow.rewards.server import serve


def brightness(images, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in images]


for port in sys.stdin:
    if not (process := os.fork()):
        serve(brightness, port=int(port))
    print(process, flush=True)
    os.waitpid(process, 0)
"""


def brightness(images, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in images]


class KillTheServer(TrainerCallback):
    """Kills it after the first step. A second later, another one starts on its port."""

    def __init__(self, process, start):
        self.process = process
        self.restart = threading.Timer(1.0, start)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(self.process, signal.SIGKILL)
            self.restart.start()


def test_a_server_killed_during_training_loses_no_step(make_trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    servers = subprocess.Popen([sys.executable, "-c", SERVERS], text=True, bufsize=1, **pipes)
    processes, url = [], None

    def start():
        """A server's process; both its number and its address are read, in whichever order they come."""
        nonlocal url
        servers.stdin.write(f"{url.rpartition(':')[2] if url else 0}\n")
        for line in (servers.stdout.readline(), servers.stdout.readline()):
            if line.strip().isdecimal():
                processes.append(int(line))
            else:
                url = line.split()[5]

    try:
        local = make_trainer(reward_funcs=brightness, max_steps=3, output_dir=str(tmp_path / "local"))
        local.train()
        start()
        killer = KillTheServer(processes[0], start)
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(reward_funcs=url, callbacks=[killer], max_steps=3)
            trainer.train()
        killer.restart.join()
    finally:
        for process in processes[1:] or processes:
            os.kill(process, signal.SIGKILL)
        servers.stdin.close()
        servers.wait()
    assert len(processes) == 2
    assert f"Reward server {url} does not answer" in caplog.text
    assert f"Reward server {url} answers again" in caplog.text

    def logged(trainer):
        keys = ("reward", "reward_std", "frac_reward_nan", "grad_norm")
        return [[entry[key] for key in keys] for entry in trainer.state.log_history if "reward" in entry]

    assert len(logged(trainer)) == 3
    assert logged(trainer) == logged(local)
    for ours, theirs in zip(trainer.model.parameters(), local.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# One call at a time, of two pictures at most, and room for one request: all others wait at the door.
SLOW_SERVER = """
import time

from pipelines import brightness
from trl_flow.rewards.server import RewardServer, serve


def slow(images, **kwargs):
    time.sleep(0.05)
    return brightness(images)


RewardServer.entry_timeout = 0.2
serve(slow, port=0, batch_size=2, max_queue=1)
"""

TRAINING = """
import os
import sys

import torch
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer

folder, url = sys.argv[1:]
config = FlowGRPOConfig(
    output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    max_steps=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)), learning_rate=1.0, optim="sgd",
    max_grad_norm=0.0, num_inference_steps=4, num_generations=4, guidance_scale=1.0, max_sequence_length=2, beta=0.0,
    ema_decay=0, scale_rewards="group",
)
reward = {"remote": {"url": url.split(","), "batch_size": 1, "max_wait": 120}} if url else brightness
trainer = FlowGRPOTrainer(
    tiny_sd3(), reward, config, prompts(8), peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None)
)
torch.manual_seed(0)
for parameter in trainer._trainable:  # LoRA begins with zeros, which have no gradient for the other half
    parameter.data = 0.1 * torch.randn(parameter.shape)
trainer.train()
failed = [entry[key] for entry in trainer.state.log_history for key in entry if key.endswith("/failed")]
assert failed == [0.0, 0.0], failed
trainer.accelerator.wait_for_everyone()
"""


def slow_servers(stack: contextlib.ExitStack, environment: dict, number: int) -> list[tuple[subprocess.Popen, str]]:
    """Processes and addresses."""
    servers = []
    for _ in range(number):
        command = [sys.executable, "-c", SLOW_SERVER]
        server = stack.enter_context(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE))
        stack.callback(server.kill)
        servers.append(server)
    return [(server, server.stdout.readline().split()[5]) for server in servers]


def scored_by(url: str) -> int:
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)["scored"]


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_share_slow_servers_with_room_for_one(tmp_path):
    """
    Four processes with one server, and two with two of which one is killed, make the updates of one process without any;
    the one server scores each picture once.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment.pop(remote.TOKEN_VARIABLE, None)
    (tmp_path / "train.py").write_text(TRAINING)

    def train(name: str, processes: int, urls: list[str]) -> dict:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), str(tmp_path / "train.py")]
        command += [str(tmp_path / name), ",".join(urls)]
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        return load_file(tmp_path / name / "adapter_model.safetensors")

    alone = train("alone", 1, [])
    with contextlib.ExitStack() as stack:
        ((_, url),) = slow_servers(stack, environment, 1)
        shared = train("shared", 4, [url])
        # Two grey ones of each process; two updates of four prompts with four pictures each.
        assert scored_by(url) == 4 * 2 + 2 * 4 * 4
    with contextlib.ExitStack() as stack:
        (dying, first), (_, second) = slow_servers(stack, environment, 2)

        def kill():
            while scored_by(first) < 8:
                time.sleep(0.01)
            dying.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        survived = train("survived", 2, [first, second])
        assert dying.wait(10) == -signal.SIGKILL
        assert 0 < scored_by(second) <= 2 * 2 + 2 * 4 * 4
    for key in alone:
        torch.testing.assert_close(shared[key], alone[key], rtol=0, atol=5e-6)
        torch.testing.assert_close(survived[key], alone[key], rtol=0, atol=5e-6)
