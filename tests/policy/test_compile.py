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

"""Compiled denoisers: their blocks alone, in few graphs, that say the same in rollouts and in training."""

import pytest
import torch
from accelerate.utils import DynamoBackend
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from torch import nn
from torch._dynamo.testing import CompileCounter

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, FlowPolicy
from trl_flow.policy.flow_policy import repeated_blocks


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_policy(guidance_scale=1.0):
    policy = FlowPolicy(
        tiny_sd3(),
        LoraConfig(r=2, lora_alpha=6, target_modules=None),
        guidance_scale=guidance_scale,
        max_sequence_length=2,
    )
    randomize(policy)
    return policy


def randomize(policy):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5


def velocity(policy, rows, with_gradient=False):
    latents = torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(rows))
    with torch.set_grad_enabled(with_gradient):
        return policy(latents, 0.75, policy.conditioning(["a red circle"]) * rows)


def gradient(policy, rows):
    policy.zero_grad()
    velocity(policy, rows, with_gradient=True).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.requires_grad])


def test_blocks_by_diffusers_names():
    blocks = repeated_blocks(make_policy().pipeline.transformer)
    assert [type(block).__name__ for block in blocks] == ["JointTransformerBlock"] * 2
    with pytest.raises(ValueError, match="Linear cannot be compiled: .* Set torch_compile=False"):
        repeated_blocks(nn.Linear(1, 1))


@pytest.mark.slow
def test_graphs_are_few_whatever_the_numbers_of_rows():
    """
    SD3's last block is another kind than the others: two kinds, each for the first number of rows, for any, and for one; as
    many again without the adapter. Nothing is compiled that was.
    """
    policy, plain = make_policy(), make_policy()
    counter = CompileCounter()
    policy.compile(backend=counter)
    for rows, graphs in ((4, 2), (6, 4), (3, 4), (5, 4), (1, 6), (2, 6), (4, 6)):
        assert torch.equal(velocity(policy, rows), velocity(plain, rows))
        assert counter.frame_count == graphs, f"{rows} rows"
    for _ in range(2):
        with policy.reference(), plain.reference():
            assert torch.equal(velocity(policy, 6), velocity(plain, 6))
        velocity(policy, 6)
    assert counter.frame_count == 8


@pytest.mark.slow
def test_more_graphs_than_torch_would_make_by_default():
    """Its limit is 8 of one piece of code. Beyond it, blocks would run uncompiled, and nothing would say so."""
    policy, plain = make_policy(guidance_scale=4.5), make_policy(guidance_scale=4.5)
    counter = CompileCounter()
    policy.compile(backend=counter)
    for rows in (4, 6, 1):
        for with_gradient in (False, True):
            torch.testing.assert_close(velocity(policy, rows, with_gradient), velocity(plain, rows, with_gradient))
            with policy.reference(), plain.reference():
                torch.testing.assert_close(velocity(policy, rows, with_gradient), velocity(plain, rows, with_gradient))
    made = counter.frame_count
    assert made > 8
    torch.testing.assert_close(gradient(policy, 5), gradient(plain, 5))
    velocity(policy, 7)
    assert counter.frame_count == made


def train(tmp_path, **settings):
    """Two updates from one rollout, at a learning rate of 0: the second one compares the two graphs' log-probabilities."""
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "steps_per_generation": 2,
        "learning_rate": 0.0,
        "num_inference_steps": 3,
        "num_generations": 3,
        "guidance_scale": 1.0,
        "max_sequence_length": 2,
        "beta": 0.0,
        "ema_decay": 0,
    }
    trainer = FlowGRPOTrainer(
        tiny_sd3(),
        brightness,
        FlowGRPOConfig(**arguments | settings),
        train_dataset=prompts(2),
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )
    randomize(trainer.policy)
    return trainer


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)


def test_torch_compile_compiles_the_blocks_and_nothing_else(tmp_path):
    trainer = train(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled = {type(part).__name__ for part in trainer.policy.modules() if part._compiled_call_impl is not None}
    assert compiled == {"JointTransformerBlock"}
    # accelerate, which wraps the model when training begins, has nothing left to compile.
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert trainer.accelerator.prepare_model(trainer.model) is trainer.policy


def test_the_launchers_backend_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    asked = {}
    monkeypatch.setattr(FlowPolicy, "compile", lambda self, **kwargs: asked.update(kwargs))
    train(tmp_path)
    assert asked == {"backend": "eager"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_as_it_does_uncompiled(tmp_path, no_report, checkpointing):
    """With real graphs, forward and backward, and with a reference: the divergence's."""
    settings = {"beta": 0.1, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
    runs = {}
    for name, compiled in (("eager", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        trainer = train(tmp_path / name, **settings, **compiled)
        trainer.train()
        runs[name] = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(runs["eager"]) == 2
    for plain, compiled in zip(*runs.values(), strict=True):
        for key in ("grad_norm", "kl", "ratio/mean", "loss"):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-5), key
    first = {name: entries[0]["reward"] for name, entries in runs.items()}  # both updates are of one rollout
    assert first["compiled"] == pytest.approx(first["eager"], rel=1e-5)


@pytest.mark.slow
def test_rollout_and_training_graphs_agree(tmp_path, no_report):
    """By inductor, whose kernels differ with and without a gradient. The clip range is 1e-4. Its gradients are the uncompiled ones."""
    trainer = train(tmp_path, torch_compile=True)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert first["ratio/min"] == first["ratio/max"] == 1.0  # on-policy: exactly
    for of in ("min", "max"):
        assert second[f"ratio/{of}"] == pytest.approx(1.0, abs=2e-6)
    assert second["grad_norm"] > 0
    plain = make_policy()
    plain.load_state_dict(trainer.policy.state_dict())
    for rows in (3, 5):
        expected = gradient(plain, rows)
        error = (gradient(trainer.policy, rows) - expected).norm() / expected.norm()
        assert error < 2e-6
