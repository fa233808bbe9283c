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

"""What leaves a run is what was evaluated: the moving average, where one is kept."""

import math
from pathlib import Path

import pytest
import torch
from pipelines import brightness, prompts
from safetensors.torch import load_file


def saved(folder) -> torch.Tensor:
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_training_leaves_the_averaged_adapter_and_a_card(make_trainer):
    trainer = make_trainer(ema_decay=0.5, max_steps=3)
    trainer.train()
    raw = [parameter.detach().clone() for parameter in trainer._trainable]
    with trainer.averaged_weights():
        average = [parameter.detach().clone() for parameter in trainer._trainable]
    assert any(not torch.equal(a, b) for a, b in zip(raw, average, strict=True))
    written = saved(trainer.args.output_dir)
    assert torch.equal(written.sort().values, torch.cat([a.flatten() for a in average]).sort().values)
    assert (Path(trainer.args.output_dir) / "README.md").is_file()


def test_what_a_push_saves_is_the_average(make_trainer):
    """`Trainer.push_to_hub` saves with `_internal_call=True`, as checkpoints do."""
    trainer = make_trainer(ema_decay=0.5, max_steps=3)
    trainer.train()
    before = saved(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)
    assert torch.equal(saved(trainer.args.output_dir), before)


def test_the_best_checkpoint_brings_its_average(make_trainer):
    seen = []

    def falling(images, trainer_state, **kwargs):
        seen.append(trainer_state.global_step)
        return [-float(trainer_state.global_step)] * len(images)

    trainer = make_trainer(
        ema_decay=0.5,
        max_steps=3,
        eval_dataset=prompts(2),
        eval_reward_funcs=[falling],
        reward_funcs=brightness,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_on_start=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/falling/mean",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first = torch.load(Path(trainer.args.output_dir) / "checkpoint-1" / "rollout_state_0.pt", weights_only=True)
    with trainer.averaged_weights():
        for parameter, expected in zip(trainer._trainable, first["ema"]["shadow_params"], strict=True):
            assert torch.equal(parameter.detach(), expected)


@pytest.mark.parametrize("missing, expected", [(math.nan, 2.0), (None, 1.5)])
def test_sums_of_samples_that_lack_one_of_two_scores(make_trainer, missing, expected):
    """One that failed has no sum; one to which a function does not apply has that of the others."""

    def half(images, **kwargs):
        return [1.0 if number % 2 else missing for number in range(len(images))]

    def one(images, **kwargs):
        return [1.0] * len(images)

    trainer = make_trainer(reward_funcs=[one, half], eval_dataset=prompts(4))
    assert trainer.evaluate()["eval_reward"] == pytest.approx(expected)
