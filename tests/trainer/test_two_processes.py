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


"""The same global batch on one process and on two: the same update, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


METHODS = ("FlowGRPOFast", "DanceGRPO", "TempFlowGRPO", "TurningPointGRPO", "DiffusionNFT", "AWM", "B2DiffuRL")

SCRIPT = """
import sys
import torch
import trl_flow
from peft import LoraConfig
from pipelines import brightness, prompts, redness, tiny_sd3
from trl_flow import RewardHackingCallback

folder, methods = sys.argv[1], sys.argv[2:]
for name in methods:
    processes = int(__import__("os").environ.get("WORLD_SIZE", 1))
    seeds = {"num_seeds": 2} if name == "TempFlowGRPO" else {}
    lag = {"old_policy_decay_rate": 0.5} if name == "DiffusionNFT" else {}
    # Balance is that of a process's own batch.
    balance = {"balance_turning_points": False} if name == "TurningPointGRPO" else {}
    # The standard deviation is the group's, so that no process needs the others' rewards.
    config = getattr(trl_flow, name + "Config")(
        output_dir=f"{folder}/{name}", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        max_steps=3, per_device_train_batch_size=4 // processes, learning_rate=1.0, optim="sgd", max_grad_norm=0.0,
        num_inference_steps=4, num_eval_inference_steps=3, num_generations=4, guidance_scale=1.0, max_sequence_length=2,
        beta=0.0, ema_decay=0, scale_rewards="group", eval_strategy="steps", eval_steps=1, **seeds, **lag, **balance,
    )
    trainer = getattr(trl_flow, name + "Trainer")(
        tiny_sd3(), brightness, config, prompts(8), prompts(5), redness, [RewardHackingCallback("warn")],
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )
    torch.manual_seed(0)
    for parameter in trainer._trainable:  # LoRA begins with zeros, which have no gradient for the other half
        parameter.data = 0.1 * torch.randn(parameter.shape)
    before = [p.detach().clone() for p in trainer._trainable]
    trainer.train()
    moved = max((p - q).abs().max().item() for p, q in zip(trainer._trainable, before))
    assert moved > 5e-5, f"{name}: {moved}"
    trainer.accelerator.wait_for_everyone()
"""


def train(folder: Path, processes: int):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launch if processes > 1 else [sys.executable]), str(script), str(folder / str(processes)), *METHODS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_updates_of_one(tmp_path):
    train(tmp_path, 1)
    train(tmp_path, 2)
    for name in METHODS:
        one, two = (load_file(tmp_path / str(n) / name / "adapter_model.safetensors") for n in (1, 2))
        for key in one:
            torch.testing.assert_close(
                two[key], one[key], rtol=0, atol=5e-6, msg=lambda m, k=key, n=name: f"{n}, {k}: {m}"
            )
