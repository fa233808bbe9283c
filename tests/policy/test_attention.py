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

"""Attention backends: another kernel computes the same velocity and gradient, and one that cannot be trained is refused."""

import pytest
import torch
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, FlowPolicy
from trl_flow.policy.attention import check_attention_backend, set_attention_backend


@pytest.fixture(autouse=True)
def usual_backend():
    yield
    # diffusers keeps the last one for all models.
    tiny_pipeline("FluxPipeline").transformer.reset_attention_backend()


def make_policy():
    arguments = call_arguments("FluxPipeline")
    policy = FlowPolicy(
        tiny_pipeline("FluxPipeline"),
        LoraConfig(r=2, lora_alpha=6, target_modules=None),
        height=arguments["height"],
        width=arguments["width"],
    )
    randomize(policy)
    return policy


def randomize(policy):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5


def velocity_and_gradient(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    velocity = policy(latents, 0.75, policy.conditioning(["a red circle", "two blue square"]))
    velocity.square().sum().backward()
    gradients = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.requires_grad]
    return velocity.detach(), torch.cat(gradients)


def test_another_kernel_computes_the_same(monkeypatch):
    expected = velocity_and_gradient(make_policy())
    policy = make_policy()
    set_attention_backend(policy, "_native_math")
    used = set()
    kernels = torch.nn.attention.sdpa_kernel
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch.torch.nn.attention.sdpa_kernel",
        lambda backends, **kwargs: used.add(str(backends)) or kernels(backends, **kwargs),
    )
    for ours, theirs in zip(velocity_and_gradient(policy), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(used) == 1 and "MATH" in used.pop()


@pytest.mark.parametrize(
    "name, problem",
    [
        ("fast", "attention_backend='fast' is unknown: expected one of 'flash', .*'native'"),
        ("sage", "attention_backend='sage': SageAttention has no backward pass"),
        ("_sage_qk_int8_pv_fp16_triton", "SageAttention has no backward pass"),
        ("xformers", "attention_backend='xformers' cannot be used here: .*install `xformers"),
    ],
)
def test_refused_before_a_model_is_loaded(name, problem, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(ValueError, match=problem):
        FlowGRPOConfig(output_dir=str(tmp_path), attention_backend=name)


def test_a_kernel_that_fails_on_this_device():
    check_attention_backend("_native_cudnn")
    with pytest.raises(
        ValueError, match="attention_backend='_native_cudnn' fails on cpu in torch.float32: RuntimeError"
    ):
        set_attention_backend(make_policy(), "_native_cudnn")


def trainer(pipeline, tmp_path, **settings):
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
        "height": 8,
        "width": 8,
        "beta": 0.0,
        "ema_decay": 0,
    }
    return FlowGRPOTrainer(
        pipeline,
        brightness,
        FlowGRPOConfig(**arguments | settings),
        train_dataset=prompts(2),
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )


def test_a_model_that_would_not_heed_it(tmp_path):
    with pytest.raises(
        ValueError, match="attention_backend='native' has no effect: the attention of SD3Transformer2DModel"
    ):
        trainer(tiny_sd3(), tmp_path, attention_backend="native")


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_the_first_ratio_is_1(name, tmp_path, monkeypatch):
    """Also of the second update, which compares log-probabilities of forwards with and without a gradient."""
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)
    made = trainer(tiny_pipeline("FluxPipeline"), tmp_path, attention_backend=name)
    randomize(made.policy)
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["ratio/min"] == pytest.approx(1.0, abs=1e-6) and entry["ratio/max"] == pytest.approx(
            1.0, abs=1e-6
        )
        assert entry["grad_norm"] > 0
