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

"""Trains what the tests of several processes ask for, in as many processes as it is started in."""

import json
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from pipelines import prompts, redness, tiny_sd3

import trl_flow
from trl_flow import RewardHackingCallback
from trl_flow.report import live


# The report has tests of its own, and takes longer than these runs.
live.write_report = lambda *args, **kwargs: None


SETTINGS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 3,
    "learning_rate": 0.1, "adam_epsilon": 1e-2, "num_inference_steps": 4, "num_eval_inference_steps": 3,
    "num_generations": 4, "guidance_scale": 1.0, "max_sequence_length": 2, "beta": 0.0, "rollout_batch_size": 4,
    "logging_steps": 1, "num_logged_images": 0,
}  # fmt: skip
RANK = int(os.environ.get("RANK", 0))


def train(folder: Path, name: str, method: str, data: list[str], settings: dict, resume: str | None):
    """Leaves the adapter, and in `rollouts-<rank>.pt` what the process has made and trained."""
    config = getattr(trl_flow, f"{method}Config")(output_dir=str(folder / name), **SETTINGS | settings)
    evaluates = config.eval_strategy != "no"
    scored = []

    def chance(images, number, **kwargs):
        """A score that rounding has no say in: in a rollout the pictures are those of one prompt."""
        scored.extend(number)
        return [random.Random(f"{n} {position}").random() for position, n in enumerate(number)]

    trainer = getattr(trl_flow, f"{method}Trainer")(
        tiny_sd3(),
        chance,
        config,
        Dataset.from_dict({"prompt": data, "number": range(len(data))}),
        Dataset.from_dict({"prompt": prompts(5)["prompt"][:], "number": range(5)}) if evaluates else None,
        redness if evaluates else None,
        [RewardHackingCallback("warn")] if evaluates else [],
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )
    torch.manual_seed(0)
    for parameter in trainer._trainable:  # LoRA begins with zeros, which have no gradient for the other half
        parameter.data = 0.1 * torch.randn(parameter.shape)
    if trainer._ema is not None:
        trainer._ema.shadow_params = [parameter.detach().clone() for parameter in trainer._trainable]
    rollouts, generate = [], trainer._generate_and_score

    def recorded(rows):
        scored.clear()
        micro_batches = generate(rows)
        fields = ("nodes", "advantages", "trained", "keys")
        rollouts.append(
            {
                "numbers": [row["number"] for row in rows],
                "scored": sorted(set(scored)),
                "micro_batches": [
                    {field: batch[field].clone() if field != "keys" else batch[field] for field in fields}
                    for batch in micro_batches
                ],
            }
        )
        return micro_batches

    trainer._generate_and_score = recorded
    trainer.train(resume_from_checkpoint=resume)
    torch.save(rollouts, folder / name / f"rollouts-{RANK}.pt")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(Path(sys.argv[1]).parent, **job)
