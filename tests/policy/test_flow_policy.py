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

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from pipelines import encoded_prompts, tiny_sd3

from trl_flow import FlowPolicy
from trl_flow.policy import find_family
from trl_flow.rollout import Plan, execute


# Without T5 the pipeline pads the text with so many tokens of zeros.
TOKENS = 4
PROMPTS = ["a red circle", "two blue square"]


def make_policy(guidance_scale=1.0, trained=False, r=2, **kwargs):
    policy = FlowPolicy(
        tiny_sd3(),
        LoraConfig(r=r, lora_alpha=3 * r, target_modules=None),
        guidance_scale=guidance_scale,
        max_sequence_length=TOKENS,
        **kwargs,
    )
    if trained:
        randomize(policy)
    return policy


def randomize(policy):
    """B matrices as if they had been trained: LoRA starts with zeros, which would hide the adapter."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5


def stock_call(policy, latents, steps, guidance_scale, **kwargs):
    """
    The pipeline's own call. One prompt is given as text. Several are given as the policy encodes them, one by one: a text
    encoder rounds differently in a batch.
    """
    text = {"prompt": PROMPTS[0]} if len(latents) == 1 else encoded_prompts(policy, PROMPTS[: len(latents)])
    return policy.pipeline(
        **text,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TOKENS,
        return_dict=False,
        **kwargs,
    )[0]


# ---- The velocity is the pipeline's ----


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@torch.no_grad()
def test_replay_equals_the_stock_pipeline(guidance_scale, trained, rows, monkeypatch):
    """The model output of every step of the pipeline's own run, evaluated again from its latents: not one bit differs."""
    policy = make_policy(guidance_scale, trained, negative_prompt="")
    record, original = [], FlowMatchEulerDiscreteScheduler.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        index = self.step_index if self.step_index is not None else 0
        record.append((self.sigmas[index].item(), sample.clone(), model_output.clone()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", spy)
    stock_call(policy, torch.randn(rows, 4, 4, 4), 5, guidance_scale, output_type="latent")
    monkeypatch.undo()
    assert len(record) == 5
    conditioning = policy.conditioning(PROMPTS[:rows])
    for sigma, latents, expected in record:
        velocity = policy(latents, sigma, conditioning)
        assert (velocity - expected).abs().max().item() == 0.0
    assert record[0][2].abs().max() > 0.01


def test_guidance_and_adapter_matter():
    """What the test of the replay would not notice if both were switched off."""
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        velocities = [
            policy(latents, 0.75, policy.conditioning(PROMPTS[:1]))
            for policy in (make_policy(), make_policy(4.5), make_policy(trained=True))
        ]
    assert (velocities[1] - velocities[0]).abs().max() > 1e-4
    assert (velocities[2] - velocities[0]).abs().max() > 1e-4


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_without_noise_a_chain_is_the_stock_pipeline(guidance_scale, rows):
    policy = make_policy(guidance_scale, trained=True)
    plan = Plan(6)
    node = plan.start()
    for _ in range(6):
        node = plan.stochastic(node)
    conditioning = policy.conditioning(PROMPTS[:rows])
    noise = torch.randn(rows, plan.num_draws, *policy.latent_shape)
    with torch.no_grad():
        rollout = execute(
            plan,
            lambda x, sigma, prompt: policy(x, sigma, [conditioning[row] for row in prompt.tolist()]),
            policy.sigmas(6),
            noise,
            [0.0] * 6,
        )
    latents = stock_call(policy, noise[:, 0], 6, guidance_scale, output_type="latent")
    assert torch.equal(rollout.leaves[:, 0], latents)
    pictures = stock_call(policy, noise[:, 0], 6, guidance_scale, output_type="pt")
    assert torch.equal(policy.decode(rollout.leaves[:, 0]), pictures)
    assert pictures.std() > 0.01


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sigmas_are_the_stock_schedulers(steps):
    policy = make_policy()
    grid = policy.sigmas(steps)
    assert policy.initial_scale(grid) == 1
    stock_call(policy, torch.randn(1, 4, 4, 4), steps, 1.0, output_type="latent")
    assert torch.equal(grid, policy.pipeline.scheduler.sigmas)
    assert grid.dtype == torch.float32 and len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0


def test_latents_and_pictures_have_the_pipelines_shapes():
    policy = make_policy()
    assert policy.latent_shape == (4, 4, 4)
    assert policy.image_size == (8, 8)
    pictures = policy.decode(torch.randn(3, 4, 4, 4), batch_size=2)
    assert pictures.shape == (3, 3, 8, 8) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    wide = make_policy(height=8, width=12)
    assert wide.latent_shape == (4, 4, 6) and wide.image_size == (8, 12)


def test_decoding_in_batches_changes_nothing():
    policy = make_policy()
    latents = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(policy.decode(latents, 1), policy.decode(latents), rtol=0, atol=1e-6)


# ---- The adapter ----


def test_reference_is_the_base_model():
    latents = torch.randn(2, 4, 4, 4)
    base, policy = make_policy(), make_policy(trained=True)
    with torch.no_grad():
        expected = base(latents, 0.75, base.conditioning(PROMPTS))
        with policy.reference():
            assert torch.equal(policy(latents, 0.75, policy.conditioning(PROMPTS)), expected)
        assert not torch.equal(policy(latents, 0.75, policy.conditioning(PROMPTS)), expected)


def gradients(policy):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    policy(latents, 0.75, policy.conditioning(PROMPTS)).square().sum().backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_gradients_reach_the_adapter_and_nothing_else(guidance_scale):
    policy = make_policy(guidance_scale, trained=True)
    for name, gradient in gradients(policy).items():
        assert "lora_" in name
        # The last block of SD3 drops its text stream after attention: these two cannot matter.
        if "transformer_blocks.1.attn.to_add_out" in name or "transformer_blocks.1.attn.add_q_proj" in name:
            continue
        assert gradient is not None and gradient.abs().max() > 0, name
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for name, parameter in component.named_parameters():
                assert parameter.requires_grad == ("lora_" in name)


def test_only_the_denoiser_is_wrapped():
    policy = make_policy()
    assert {name.split(".")[0] for name, _ in policy.named_parameters()} == {"denoisers"}
    assert {name.split(".")[0] for name in policy.state_dict()} == {"denoisers"}


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, recomputed = make_policy(trained=True), make_policy(trained=True)
    recomputations = []
    block = recomputed.pipeline.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: recomputations.append(1))
    recomputed.train()
    recomputed.gradient_checkpointing_enable()
    recomputations.clear()  # those of its own check
    expected, actual = gradients(plain), gradients(recomputed)
    assert len(recomputations) == 2  # forward and again in the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_takes_no_options():
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs={'use_reentrant': True}"):
        make_policy().gradient_checkpointing_enable({"use_reentrant": True})


def test_dropout_stays_off_in_training():
    policy = make_policy()
    policy.train()
    assert policy.training
    # All but PEFT's wrapper and layers, which hold nothing that behaves differently.
    base = [module for name, module in policy.pipeline.transformer.named_modules() if "attn." not in name]
    assert len(base) > 10 and not any(module.training for module in base)


# ---- Conditioning ----


def test_each_prompt_is_encoded_once():
    policy = make_policy(guidance_scale=4.5)
    calls = []
    for encoder in (policy.pipeline.text_encoder, policy.pipeline.text_encoder_2):
        encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first = policy.conditioning([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    per_prompt = len(calls) // 2
    assert per_prompt == 4  # two encoders, each for the prompt and for the negative prompt
    policy.conditioning([PROMPTS[1]] * 5)
    policy.decode(torch.zeros(1, 4, 4, 4))
    assert len(calls) == 2 * per_prompt  # nothing is encoded again, the empty prompt neither
    assert first[0] is first[2]
    embeds = [condition.answers["encode_prompt", 0][0] for condition in first]
    assert embeds[0].shape[0] == 1 and not torch.equal(embeds[0], embeds[1])


def test_the_cache_forgets_the_prompt_that_was_unused_longest():
    policy = make_policy(cache_size=2)
    policy.conditioning(["a red circle", "two square"])
    policy.conditioning(["a red circle", "green"])
    calls = []
    policy.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.conditioning(["a red circle", "green"])
    assert len(calls) == 0
    policy.conditioning(["two square"])
    assert len(calls) == 1


def test_conditioning_is_what_the_pipeline_encodes():
    policy = make_policy(guidance_scale=4.5, negative_prompt="blue")
    answers = [condition.answers["encode_prompt", 0] for condition in policy.conditioning(PROMPTS)]
    expected = policy.pipeline.encode_prompt(
        PROMPTS, None, None, negative_prompt=["blue", "blue"], max_sequence_length=TOKENS
    )
    for rows, value in zip(zip(*answers, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), value, rtol=1e-5, atol=1e-6)


# ---- What the user passed in is left alone ----


def test_the_users_pipeline_keeps_its_scheduler_and_the_global_random_state():
    pipeline = tiny_sd3()
    scheduler = pipeline.scheduler
    # The adapter's weights are random; everything after them is not.
    policy = FlowPolicy(pipeline, LoraConfig(r=2, target_modules=None), max_sequence_length=TOKENS)
    state = torch.get_rng_state()
    policy.sigmas(7)
    policy.decode(torch.zeros(1, 4, 4, 4))
    policy.conditioning(PROMPTS)
    with torch.no_grad():
        policy(torch.zeros(2, 4, 4, 4), 0.5, policy.conditioning(PROMPTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler and type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(pipeline.scheduler.sigmas, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)


def test_the_users_peft_config_is_left_alone():
    config = LoraConfig(r=2, target_modules=None)
    FlowPolicy(tiny_sd3(), config)
    assert config.target_modules is None


def test_default_adapter():
    policy = FlowPolicy(tiny_sd3())
    config = policy.denoisers["transformer"].peft_config["default"]
    assert (config.r, config.lora_alpha) == (32, 64)
    targets = {name.split(".lora_A")[0].split("attn.")[1] for name in policy.state_dict() if "lora_A" in name}
    assert targets == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


# ---- Precision ----


def test_bfloat16_pipelines_keep_float32_latents():
    pipeline = tiny_sd3().to(torch.bfloat16)
    policy = FlowPolicy(pipeline, LoraConfig(r=2, target_modules=None), max_sequence_length=TOKENS)
    conditioning = policy.conditioning(PROMPTS)
    assert conditioning[0].answers["encode_prompt", 0][0].dtype == torch.bfloat16
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    plan = Plan(3)
    plan.add_transition(start := plan.start(), child := plan.stochastic(start), (plan.tail(child, [2, 3]),))
    rollout = execute(
        plan,
        lambda x, sigma, prompt: policy(x, sigma, [conditioning[row] for row in prompt.tolist()]),
        policy.sigmas(3),
        torch.randn(2, plan.num_draws, *policy.latent_shape),
        [0.7] * 3,
    )
    assert rollout.leaves.dtype == torch.float32
    assert all(latents.dtype == torch.float32 for latents in rollout.nodes.values())
    # They are float32 in value too, not bfloat16 in a wider box.
    assert not torch.equal(rollout.leaves, rollout.leaves.bfloat16().float())
    assert len(seen) == 3
    pictures = policy.decode(rollout.leaves[:, 0])
    assert pictures.dtype == torch.float32 and pictures.isfinite().all()


# ---- Errors ----


def test_unknown_pipelines_are_refused():
    pipeline = DDIMPipeline(unet=None, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="DDIMPipeline holds no denoiser.*it holds scheduler, unet"):
        FlowPolicy(pipeline)
    assert find_family(tiny_sd3()).name == "Stable Diffusion 3"


@pytest.mark.parametrize("size", [{"height": 9}, {"width": 11}, {"height": 8, "width": 7}])
def test_resolutions_that_the_pipeline_cannot_make(size):
    with pytest.raises(ValueError, match="divisible by"):
        make_policy(**size)


def test_another_guidance_scale_for_a_while():
    """Trained without guidance, evaluated with it: the same as a policy that always has it, and then as before."""
    policy, guided = FlowPolicy(tiny_sd3(), guidance_scale=1.0), FlowPolicy(tiny_sd3(), guidance_scale=4.5)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = ["a red circle", "two square"]

    def velocity(policy):
        with torch.no_grad():
            return policy(latents, 0.5, policy.conditioning(prompts))

    plain = velocity(policy)
    with policy.guided(4.5):
        assert torch.equal(velocity(policy), velocity(guided))
    assert not torch.equal(plain, velocity(guided))
    assert torch.equal(velocity(policy), plain)
    with policy.guided(None):
        assert torch.equal(velocity(policy), plain)


def test_the_cache_forgets_what_takes_too_much_memory():
    one = make_policy().encode("a red circle").num_bytes
    assert one > 1000
    policy = make_policy(cache_gib=2.5 * one / 2**30)
    policy.conditioning(["a red circle", "green", "two square"])
    calls = []
    policy.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.conditioning(["green", "two square"])
    assert not calls
    policy.conditioning(["a red circle"])
    assert len(calls) == 1


def test_conditioning_of_another_guidance_is_refused():
    policy = make_policy(guidance_scale=1.0)
    conditioning = policy.conditioning(PROMPTS[:1])
    with policy.guided(4.5), pytest.raises(ValueError, match="made with another guidance_scale"):
        policy(torch.zeros(1, 4, 4, 4), 0.5, conditioning)


def test_where_to_compute_is_looked_up_once_for_each_place(monkeypatch):
    """diffusers goes through all modules of all components for it, in every call."""
    pipeline = tiny_sd3()
    walks = []
    found = type(pipeline)._execution_device.fget

    def walk(self):
        walks.append(self)
        return found(self)

    monkeypatch.setattr(type(pipeline), "_execution_device", property(walk))
    policy = FlowPolicy(pipeline)
    latents = torch.randn(2, *policy.latent_shape)
    before = len(walks)
    for sigma in (0.9, 0.5):
        with torch.no_grad():
            policy(latents, sigma, policy.conditioning(["a", "b"]))
    assert len(walks) - before <= 1
    # The pipeline that was passed in looks as before, and so does the policy after a move.
    assert pipeline._execution_device.type == "cpu" and type(pipeline) is type(tiny_sd3())
    pipeline.to("meta")
    assert policy._query._execution_device.type == "meta"
