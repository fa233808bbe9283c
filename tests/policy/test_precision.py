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

"""Half-precision base weights under a float32 adapter: how far training is from the rollout, and that from the stock run."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowPolicy
from trl_flow.policy import find_family
from trl_flow.rollout import log_prob, transition


PROMPTS = ["a red circle", "two blue square"]
STEPS = 4
# Largest difference between a training forward (8 rows, 4, 3 or 1, with gradient) and the rollout's (8 rows, without),
# over the velocity's standard deviation, and the probability ratio of a transition by both, less 1. Measured on a CPU,
# the larger of without and with autocast; Wan's velocity is that of guidance 5, which multiplies rounding errors:
#
#                             bfloat16             float16
#                         velocity   ratio    velocity   ratio
#     SD3, Qwen-Image         0        0          0        0
#     FLUX.1                0.033   3.8e-4      0.0026  2.7e-5
#     FLUX.1 Kontext        0.027   6.5e-4      0.0027  3.2e-5
#     Wan                   0.132   1.5e-3      0.0150  2.4e-4
#
# Batches of equal shape differ by 0 everywhere, as does the replay of the stock pipeline's own run.
BOUNDS = {torch.bfloat16: (0.4, 5e-3), torch.float16: (0.05, 8e-4)}
PIPELINES = ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline", "FluxKontextPipeline")
SETTINGS = ("height", "width", "num_frames", "max_sequence_length", "negative_prompt")


def make_policy(name, dtype, **kwargs):
    pipeline, arguments = tiny_pipeline(name).to(dtype), call_arguments(name)
    image, guidance_scale = arguments.pop("image", None), arguments.pop(find_family(pipeline).guidance)
    settings = {argument: arguments.pop(argument) for argument in SETTINGS if argument in arguments}
    policy = FlowPolicy(pipeline, guidance_scale=guidance_scale, generation_kwargs=arguments, **settings, **kwargs)
    return policy, image


def lora_policy(name, dtype):
    """With an adapter as if it had been trained."""
    policy, image = make_policy(name, dtype, peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None))
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in policy.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return policy, image


def precision(dtype, autocast):
    return torch.autocast("cpu", dtype=dtype) if autocast else contextlib.nullcontext()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_replay_equals_the_stock_pipeline(name, dtype, autocast):
    policy, image = lora_policy(name, dtype)
    noted, scheduler = [], policy.pipeline.scheduler
    arguments = dict(policy.call_arguments) | ({"image": image} if image else {})

    def step(output, timestep, sample, **kwargs):
        sigma, sigma_next = scheduler.sigmas[len(noted) : len(noted) + 2].tolist()
        noted.append((sigma, sample.clone(), output.float()))
        return ((sample.float() + (sigma_next - sigma) * output.float()).to(sample.dtype),)

    scheduler.step = step
    with precision(dtype, autocast):
        policy.pipeline(
            prompt=PROMPTS[0],
            negative_prompt=policy.negative_prompt,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            **arguments,
        )
        assert policy.sigmas(STEPS)[:-1].tolist() == [sigma for sigma, _, _ in noted]
        conditioning = policy.conditioning(PROMPTS[:1], [image])
        for sigma, latents, expected in noted:
            velocity = policy(latents, sigma, conditioning)
            assert velocity.dtype == torch.float32
            assert (velocity - expected).abs().max() == 0
            assert velocity.std() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PIPELINES)
def test_training_is_near_the_rollout(name, dtype, autocast):
    policy, image = lora_policy(name, dtype)
    trained = {key: value for key, value in policy.named_parameters() if value.requires_grad}
    assert all("lora_" in key and value.dtype == torch.float32 for key, value in trained.items())
    assert {p.dtype for p in policy.pipeline.components["transformer"].parameters() if not p.requires_grad} == {dtype}
    generator = torch.Generator().manual_seed(3)
    velocity_error = ratio_error = 0.0
    with precision(dtype, autocast):
        grid = policy.sigmas(STEPS).tolist()
        conditioning = policy.conditioning(PROMPTS * 4, [image] * 8)
        for sigma, sigma_next in zip(grid[: STEPS - 1], grid[1:], strict=False):
            latents, noise = torch.randn(2, 8, *policy.latent_shape, generator=generator)
            with torch.no_grad():
                rollout = policy(latents, sigma, conditioning)
                mean, std = transition(latents, rollout, sigma, sigma_next, 0.7, "flow")
                sampled = mean + std * noise
                old = log_prob(sampled, mean, std)
            for rows in (list(range(8)), [0, 1, 2, 3], [0, 2, 4], [5]):
                velocity = policy(latents[rows], sigma, [conditioning[row] for row in rows])
                mean, std = transition(latents[rows], velocity, sigma, sigma_next, 0.7, "flow")
                new = log_prob(sampled[rows], mean, std)
                assert sampled.dtype == mean.dtype == velocity.dtype == new.dtype == torch.float32
                if len(rows) == 8:
                    assert torch.equal(velocity, rollout) and torch.equal(new, old)
                error = (velocity.detach() - rollout[rows]).abs().max() / rollout.std()
                velocity_error = max(velocity_error, error.item())
                ratio_error = max(ratio_error, (torch.exp(new.detach() - old[rows]) - 1).abs().max().item())
            new.sum().backward()
        pictures = policy.decode(sampled[:2], conditioning=conditioning[:2])
    largest_velocity_error, largest_ratio_error = BOUNDS[dtype]
    assert velocity_error < largest_velocity_error and ratio_error < largest_ratio_error
    # Latents are float32 in value too, not half precision in a wider box.
    assert not torch.equal(sampled, sampled.to(dtype).float())
    assert pictures.dtype == torch.float32 and pictures.isfinite().all()
    gradients = {key: value.grad for key, value in trained.items() if value.grad is not None}
    assert len(gradients) > len(trained) / 2
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "WanPipeline"])
def test_full_finetuning_is_of_float32_weights(name, dtype):
    """Under autocast where the pipeline is in half precision, as the trainer demands."""
    policy, _ = make_policy(name, dtype, full_finetuning=True)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert next(policy.pipeline.vae.parameters()).dtype == dtype
    with precision(torch.bfloat16, dtype != torch.float32):
        latents = torch.randn(2, *policy.latent_shape)
        velocity = policy(latents, 0.9, policy.conditioning(PROMPTS))
        assert velocity.dtype == torch.float32
        velocity.square().mean().backward()
        assert policy.decode(latents, conditioning=policy.conditioning(PROMPTS)).isfinite().all()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    assert len(gradients) > 20 and {gradient.dtype for gradient in gradients} == {torch.float32}
