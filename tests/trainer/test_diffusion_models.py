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


"""The methods on diffusion models: the trainers know nothing of it."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from pipelines import brightness, prompts, tiny_sd

from trl_flow import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    G2RPOConfig,
    G2RPOTrainer,
)
from trl_flow.scripts.generate import _sample_as_in_training


@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [
        (DenseGRPOTrainer, DenseGRPOConfig, {"beta": 0.04}),
        (G2RPOTrainer, G2RPOConfig, {"granularities": [1, 2], "beta": 0.0}),
        (DiffusionNFTTrainer, DiffusionNFTConfig, {"same_initial_noise": False}),
    ],
)
def test_methods_train_a_diffusion_model(make_trainer, trainer_class, config_class, settings):
    trainer = make_trainer(
        trainer_class,
        config_class,
        model=tiny_sd(),
        guidance_scale=7.5,
        max_sequence_length=None,
        eval_dataset=prompts(2),
        max_steps=2,
        **settings,
    )
    before = [p.detach().clone() for p in trainer.policy.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.policy.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["grad_norm"] < float("inf") for entry in losses)
    assert all(entry.get("ratio/min", 1.0) == 1.0 for entry in losses)


def test_the_card_samples_as_in_training(make_trainer):
    """The checkpoint's own scheduler is PNDM; evaluation was made with DDIM, so the usage example sets it."""
    pipeline = tiny_sd()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    trainer = make_trainer(model=pipeline, reward_funcs=[brightness], max_sequence_length=None)
    trainer.train()
    trainer.save_model()
    card = (make_trainer.directory / "run" / "README.md").read_text()
    assert "from diffusers import DDIMScheduler" in card
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)" in card
    assert type(pipeline.scheduler) is PNDMScheduler
    _sample_as_in_training(pipeline)
    assert type(pipeline.scheduler) is DDIMScheduler


def test_samples_are_noised_as_they_are_decoded(make_trainer):
    """The grid of a diffusion pipeline may end above 0. What is noised for training is what is decoded, x0 = x (alpha + s)."""
    pipeline = tiny_sd()
    squared = pipeline.scheduler.final_alpha_cumprod.double()
    assert squared < 1
    trainer = make_trainer(
        DiffusionNFTTrainer, DiffusionNFTConfig, model=pipeline, max_sequence_length=None, num_generations=3
    )
    parts = []
    generate = trainer._generate_and_score

    def noted(rows):
        parts.extend(generate(rows))
        return parts

    trainer._generate_and_score = noted
    trainer.train()
    (part,) = parts
    for at in trainer._trained_steps(part):
        chunk = trainer._chunk(part, at, slice(None))
        # x = (1 - s) x0 + s eps and the target is eps - x0.
        clean = chunk.latents - chunk.sigma * chunk.next_latents
        members = chunk.members[2]
        leaves = part["nodes"][0, part["parents"][part["steps"].tolist().index(chunk.step)][members]]
        scale = (squared.sqrt() + (1 - squared).sqrt()).item()
        assert scale > 1.01
        torch.testing.assert_close(clean, leaves * scale, rtol=1e-5, atol=1e-5)
