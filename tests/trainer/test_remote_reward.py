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

"""Training on a reward server that is killed and started again is training on the reward itself."""

import logging
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import torch
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
