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

"""Stable Diffusion 1.5 and XL as flow models: every comparison is with diffusers' own DDIM."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from pipelines import encoded_prompts, sd_scheduler, tiny_sd, tiny_sdxl
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

from trl_flow import FlowPolicy
from trl_flow.hub import save_policy
from trl_flow.policy.diffusion import flow_sigmas, flow_velocity, latent_scale
from trl_flow.rollout import Plan, execute


PROMPTS = ["a red circle", "two blue square"]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def make_policy(pipeline=None, guidance_scale=1.0, trained=True, **kwargs):
    policy = FlowPolicy(
        pipeline or tiny_sd(),
        LoraConfig(r=2, lora_alpha=6, target_modules=None),
        guidance_scale=guidance_scale,
        **kwargs,
    )
    if trained:
        # LoRA starts with zeros, which would hide the adapter.
        generator = torch.Generator().manual_seed(7)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return policy


def alpha_and_s(scheduler):
    """alpha and s of the training timesteps and, last, of the end, in float64."""
    squared = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod[None]]).double()
    return squared.sqrt(), (1 - squared).sqrt()


def chain(policy, steps, noise):
    """Final latents, in flow coordinates, of a chain without noise that starts at `noise` (n, *latent)."""
    plan = Plan(steps)
    node = plan.start()
    for _ in range(steps):
        node = plan.stochastic(node)
    draws = torch.randn(len(noise), plan.num_draws, *policy.latent_shape)
    draws[:, plan.nodes[0].draw] = noise
    sigmas = policy.sigmas(steps)
    conditioning = policy.conditioning(PROMPTS[: len(noise)])
    leaves = execute(
        plan,
        lambda x, sigma, prompt: policy(x, sigma, [conditioning[row] for row in prompt.tolist()]),
        sigmas,
        draws * policy.initial_scale(sigmas),
        [0.0] * steps,
    ).leaves
    return leaves[:, 0]


def stock_call(policy, latents, steps, **kwargs):
    """The pipeline's own call, with DDIM in the place of its scheduler."""
    pipeline = policy.pipeline
    own, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    text = {"prompt": PROMPTS[0]} if len(latents) == 1 else encoded_prompts(policy, PROMPTS[: len(latents)])
    result = pipeline(
        **text,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=policy.guidance_scale,
        return_dict=False,
        **kwargs,
    )[0]
    pipeline.scheduler = own
    return result


def assert_same_rollout(policy, steps, rows=1):
    """Latents within 1e-5 of their standard deviation, pictures (in [0, 1]) within 3e-6: float32 in 50 steps."""
    noise = torch.randn(rows, *policy.latent_shape)
    with torch.no_grad():
        leaves = chain(policy, steps, noise)
    scheduler = DDIMScheduler.from_config(policy.pipeline.scheduler.config)
    alpha, s = alpha_and_s(scheduler)
    latents = stock_call(policy, noise, steps, output_type="latent")
    assert latents.std() > 0.1
    assert ((alpha[-1] + s[-1]) * leaves - latents).abs().max() < 1e-5 * latents.std()
    pictures = stock_call(policy, noise, steps, output_type="pt")
    assert pictures.std() > 0.05
    assert (policy.decode(leaves) - pictures).abs().max() < 3e-6


# ---- The change of coordinates ----


def test_coordinates_are_those_of_a_flow_model():
    """x / (alpha + s) is a straight line from x0 to eps."""
    alpha, s = alpha_and_s(sd_scheduler(rescale_betas_zero_snr=True))
    sigmas = flow_sigmas(alpha**2)
    x0, eps = torch.randn(2, 5, dtype=torch.float64)
    for timestep in (0, 1, 500, 998, 999):
        sigma = sigmas[timestep].item()
        x = alpha[timestep] * x0 + s[timestep] * eps
        torch.testing.assert_close(x / latent_scale(sigma), (1 - sigma) * x0 + sigma * eps, rtol=0, atol=1e-12)
    assert sigmas[999] == 1 and flow_sigmas(torch.tensor(1.0)) == 0


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_an_euler_step_is_a_ddim_step(set_alpha_to_one, prediction_type, steps):
    """At every step, in float64, with diffusers' `DDIMScheduler.step` as the judge."""
    scheduler = sd_scheduler(prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    alpha, s = alpha_and_s(scheduler)
    visited = [*scheduler.timesteps.tolist(), -1]
    sigmas = flow_sigmas(torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod[None]]))
    for timestep, following in zip(visited, visited[1:], strict=False):
        latents, output = torch.randn(2, 3, 4, dtype=torch.float64)
        expected = scheduler.step(output, timestep, latents, eta=0.0).prev_sample
        sigma, sigma_next = sigmas[timestep].item(), sigmas[following].item()
        x = latents / (alpha[timestep] + s[timestep])
        x = x + (sigma_next - sigma) * flow_velocity(output, x, sigma, prediction_type)
        actual = (alpha[following] + s[following]) * x
        assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_velocity_is_the_pipelines(prediction_type, guidance_scale, make, monkeypatch):
    """eps - x0 of every model output of the pipeline's own run, evaluated again from its latents."""
    policy = make_policy(make(scheduler=sd_scheduler(prediction_type=prediction_type)), guidance_scale)
    record, original = [], DDIMScheduler.step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        record.append((timestep.item(), sample.double(), model_output.double()))
        return original(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(DDIMScheduler, "step", spy)
    stock_call(policy, torch.randn(2, 4, 4, 4), 10, output_type="latent")
    monkeypatch.undo()
    assert len(record) == 10
    alphas, levels = alpha_and_s(policy.pipeline.scheduler)
    conditioning = policy.conditioning(PROMPTS)
    for (timestep, latents, output), sigma in zip(record, policy.sigmas(10).tolist(), strict=False):
        alpha, s = alphas[timestep].item(), levels[timestep].item()
        if prediction_type == "epsilon":
            eps, x0 = output, (latents - s * output) / alpha
        else:
            eps, x0 = alpha * output + s * latents, alpha * latents - s * output
        velocity = policy((latents / (alpha + s)).float(), sigma, conditioning)
        assert velocity.dtype == torch.float32
        # Measured: below 2e-6 of the largest element.
        assert (velocity - (eps - x0)).abs().max() < 1e-5 * (eps - x0).abs().max()


# ---- The whole rollout ----


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_without_noise_a_chain_is_the_stock_pipeline_with_ddim(guidance_scale, steps, make):
    assert_same_rollout(make_policy(make(), guidance_scale), steps)


def test_several_prompts():
    assert_same_rollout(make_policy(guidance_scale=7.5), 10, rows=2)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_v_prediction(make):
    assert_same_rollout(make_policy(make(scheduler=sd_scheduler(prediction_type="v_prediction")), 7.5), 10)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_negative_prompt(make):
    policy = make_policy(make(), 7.5, negative_prompt="two green")
    noise = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        pictures = policy.decode(chain(policy, 4, noise))
    expected = stock_call(policy, noise, 4, output_type="pt", negative_prompt="two green")
    assert (pictures - expected).abs().max() < 3e-6
    assert (pictures - stock_call(policy, noise, 4, output_type="pt")).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_trailing_timesteps(set_alpha_to_one, steps):
    scheduler = sd_scheduler(timestep_spacing="trailing", set_alpha_to_one=set_alpha_to_one)
    policy = make_policy(tiny_sd(scheduler=scheduler))
    assert_same_rollout(policy, steps)
    assert (policy.sigmas(steps)[-1] == 0) == set_alpha_to_one


@pytest.mark.parametrize(
    "config, steps",
    [({"timestep_spacing": "linspace", "set_alpha_to_one": True}, 7), ({"timestep_spacing": "trailing"}, 13)],
    ids=["linspace", "trailing"],
)
@torch.no_grad()
def test_steps_lead_to_the_next_timestep_where_ddim_misses_it(config, steps):
    """`DDIMScheduler.step` steps by 1000 // T: not what its own timesteps do for these. Ours are DDIM by the paper."""
    policy = make_policy(tiny_sd(scheduler=sd_scheduler(**config)))
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(steps)
    visited = [*scheduler.timesteps.tolist(), -1]
    assert any(t - 1000 // steps != following for t, following in zip(visited[:-2], visited[1:], strict=False))
    alpha, s = alpha_and_s(scheduler)
    noise = torch.randn(1, 4, 4, 4)
    x, text = noise.double(), encoded_prompts(policy, PROMPTS[:1])["prompt_embeds"]
    for t, following in zip(visited, visited[1:], strict=False):
        eps = policy.pipeline.unet(x.float(), t, encoder_hidden_states=text).sample.double()
        x0 = (x - s[t] * eps) / alpha[t]
        x = alpha[following] * x0 + s[following] * eps
    actual = (alpha[-1] + s[-1]) * chain(policy, steps, noise)
    assert (actual - x).abs().max() < 1e-5 * x.std()


def test_zero_terminal_snr_with_v_prediction():
    policy = make_policy(tiny_sd(scheduler=sd_scheduler(**ZERO_SNR)), 7.5)
    sigmas = policy.sigmas(10)
    assert sigmas[0] == 1 and policy.initial_scale(sigmas) == 1
    assert_same_rollout(policy, 10)


# ---- The grid and its ends ----


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_sigmas_are_those_of_ddims_timesteps(steps):
    policy = make_policy()
    grid = policy.sigmas(steps)
    # Leading timesteps with an offset of 1: 751, 501, 251, 1 for four steps.
    timesteps = [*reversed(range(1, 1001, 1000 // steps)), -1]
    alpha, s = alpha_and_s(policy.pipeline.scheduler)
    torch.testing.assert_close(grid.double(), (s / (alpha + s))[timesteps], rtol=0, atol=1e-7)
    assert grid.dtype == torch.float32 and len(grid) == steps + 1
    assert 0.02 < grid[-1] < 0.03
    # Unit noise becomes the starting latents x = noise, divided by alpha + s.
    assert policy.initial_scale(grid) == pytest.approx(1 / (alpha + s)[timesteps[0]].item(), abs=1e-7)


def test_sigmas_end_at_zero_with_set_alpha_to_one():
    policy = make_policy(tiny_sd(scheduler=sd_scheduler(set_alpha_to_one=True)))
    assert policy.sigmas(10)[-1] == 0
    assert torch.equal(policy.sigmas(10)[:-1], make_policy().sigmas(10)[:-1])
    assert_same_rollout(policy, 10)


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_are_sampled_by_ddim(scheduler_class):
    # As checkpoints have them (Stable Diffusion XL comes with Euler): settings of DDIM are kept though not theirs.
    config = {**SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    scheduler = scheduler_class.from_config(config)
    scheduler.set_timesteps(5)
    policy = make_policy(tiny_sd(scheduler=scheduler))
    assert policy.pipeline.scheduler is scheduler and type(scheduler) is scheduler_class
    before = scheduler.timesteps.clone()
    assert torch.equal(policy.sigmas(10), make_policy().sigmas(10))
    with torch.no_grad():
        chain(policy, 2, torch.randn(1, 4, 4, 4))
    assert torch.equal(scheduler.timesteps, before)


# ---- The adapter ----


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_tensor_of_the_adapter_and_nothing_else(checkpointing, guidance_scale, make):
    policy = make_policy(make(), guidance_scale)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    policy(latents, policy.sigmas(10)[3].item(), policy.conditioning(PROMPTS)).square().sum().backward()
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    # Two attentions in each of four places (one down, one in the middle, two up), four projections, two matrices.
    assert len(trained) == 4 * 2 * 4 * 2
    for name, parameter in policy.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
    assert latents.grad.abs().max() > 0


def test_default_adapter():
    policy = FlowPolicy(tiny_sd())
    targets = {name.split(".lora_A")[0].split(".attn")[1][2:] for name in policy.state_dict() if "lora_A" in name}
    assert targets == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_reference_is_the_base_model(make):
    latents = torch.randn(2, 4, 4, 4)
    base, policy = make_policy(make(), trained=False), make_policy(make())
    sigma = policy.sigmas(4)[1].item()
    with torch.no_grad():
        expected = base(latents, sigma, base.conditioning(PROMPTS))
        with policy.reference():
            assert torch.equal(policy(latents, sigma, policy.conditioning(PROMPTS)), expected)
        assert (policy(latents, sigma, policy.conditioning(PROMPTS)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_saved_adapter_gives_the_trained_pictures(tmp_path, make):
    policy = make_policy(make(), 7.5)
    save_policy(policy, tmp_path, "user/base")
    latents = torch.randn(1, 4, 4, 4)
    arguments = {"prompt": PROMPTS[0], "latents": latents, "num_inference_steps": 4, "output_type": "pt"}
    expected, base, loaded = policy.pipeline(**arguments).images, make()(**arguments).images, make()
    loaded.load_lora_weights(str(tmp_path))
    assert torch.equal(loaded(**arguments).images, expected)
    assert (expected - base).abs().max() > 1e-3


# ---- What the user passed in is left alone ----


def test_the_safety_checker_is_off_in_the_policy_alone():
    config = CLIPConfig(
        text_config=CLIPTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=4).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        ).to_dict(),
        projection_dim=4,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-10.0)  # every cosine is above: every picture is blanked
    size = {"height": 8, "width": 8}
    pipeline = tiny_sd(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size),
        requires_safety_checker=True,
    )
    policy = make_policy(pipeline)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        pictures = policy.decode(chain(policy, 2, latents))
    assert pictures.std() > 0.05
    assert pipeline.safety_checker is checker and pipeline.config.safety_checker[0] is not None
    assert stock_call(policy, latents, 2, output_type="np").max() == 0


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_the_users_pipeline_keeps_its_scheduler_and_the_global_random_state(make):
    scheduler = PNDMScheduler(**SCHEDULE, steps_offset=1, skip_prk_steps=True)
    pipeline = make(scheduler=scheduler)
    policy = make_policy(pipeline, trained=False)
    state = torch.get_rng_state()
    policy.sigmas(7)
    policy.decode(torch.zeros(1, 4, 4, 4))
    with torch.no_grad():
        policy(torch.zeros(2, 4, 4, 4), policy.sigmas(7)[2].item(), policy.conditioning(PROMPTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler
    assert policy.latent_shape == (4, 4, 4) and policy.image_size == (8, 8)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_bfloat16_pipelines_keep_float32_latents(make):
    policy = make_policy(make().to(torch.bfloat16), 7.5)
    seen = []
    policy.pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        leaves = chain(policy, 3, torch.randn(2, 4, 4, 4))
    assert seen == [torch.bfloat16] * 3
    assert leaves.dtype == torch.float32 and not torch.equal(leaves, leaves.bfloat16().float())
    pictures = policy.decode(leaves)
    assert pictures.dtype == torch.float32 and pictures.isfinite().all()


# ---- Errors ----


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_clipping_is_refused(setting, scheduler_class):
    pipeline = tiny_sd()
    # Set afterwards: the pipeline's constructor takes clip_sample=True for an oversight.
    pipeline.scheduler = scheduler_class(**SCHEDULE, **({"clip_sample": False} | {setting: True}))
    with pytest.raises(
        ValueError, match=f"{setting}=True of {scheduler_class.__name__}.*from_config.*{setting}=False"
    ):
        FlowPolicy(pipeline)
    # The advice works.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **{setting: False})
    FlowPolicy(pipeline)


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_other_prediction_types_are_refused(prediction_type):
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1, prediction_type=prediction_type)
    with pytest.raises(ValueError, match=f"prediction_type='{prediction_type}'.*epsilon or v_prediction"):
        FlowPolicy(tiny_sd(scheduler=scheduler))


def test_zero_terminal_snr_with_epsilon_is_refused():
    with pytest.raises(
        ValueError, match="rescale_betas_zero_snr=True of DDIMScheduler with prediction_type='epsilon'"
    ):
        FlowPolicy(tiny_sd(scheduler=sd_scheduler(**(ZERO_SNR | {"prediction_type": "epsilon"}))))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()], ids=["flow", "edm"])
def test_schedulers_with_another_noise_schedule_are_refused(scheduler):
    pipeline = tiny_sd()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"scheduler={type(scheduler).__name__}.*DDIMScheduler"):
        FlowPolicy(pipeline)


def test_sigmas_that_no_timestep_has_are_refused():
    policy = make_policy()
    conditioning = policy.conditioning(PROMPTS[:1])
    sigma = policy.sigmas(10)[3].item()
    with torch.no_grad():
        policy(torch.zeros(1, 4, 4, 4), sigma, conditioning)
        for wrong in (sigma + 1e-5, 1.0, 0.0, float("nan")):
            with pytest.raises(ValueError, match=f"sigma={wrong} is not the flow time of one of the 1000"):
                policy(torch.zeros(1, 4, 4, 4), wrong, conditioning)


def test_more_steps_than_timesteps():
    with pytest.raises(ValueError, match="num_inference_steps=1000 starts at timestep 1000"):
        make_policy().sigmas(1000)
    assert len(make_policy().sigmas(999)) == 1000


@pytest.mark.parametrize("config", [{"timestep_spacing": "linspace"}, {"steps_offset": 0}])
def test_a_last_step_that_leads_nowhere_is_refused(config):
    pipeline = tiny_sd()
    pipeline.scheduler = sd_scheduler(**config)
    with pytest.raises(ValueError, match="leads from timestep 0 to itself.*set_alpha_to_one=True"):
        make_policy(pipeline).sigmas(10)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_length_of_text_that_would_be_ignored_is_refused(make):
    with pytest.raises(
        ValueError, match="max_sequence_length=77: the call of StableDiffusion.*has no such argument. Leave it unset"
    ):
        FlowPolicy(make(), max_sequence_length=77)
