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

"""A policy's grid is that of the stock pipeline's own scheduler, whatever it is, and so are the model's timesteps."""

import copy

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from pipelines import tiny_sd3
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowPolicy
from trl_flow.policy.schedulers import idle_scheduler, is_flow, query_scheduler


PROMPT = "a red circle"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def euler(**kwargs):
    return FlowMatchEulerDiscreteScheduler(**kwargs)


SCHEDULERS = {
    "unshifted": ("StableDiffusion3Pipeline", euler()),
    "static": ("StableDiffusion3Pipeline", euler(shift=3.0)),
    "karras": ("StableDiffusion3Pipeline", euler(shift=3.0, use_karras_sigmas=True)),
    "beta": ("StableDiffusion3Pipeline", euler(shift=3.0, use_beta_sigmas=True)),
    "exponential": ("StableDiffusion3Pipeline", euler(shift=3.0, use_exponential_sigmas=True)),
    "terminal": ("StableDiffusion3Pipeline", euler(shift=3.0, shift_terminal=0.1)),
    "stochastic": ("StableDiffusion3Pipeline", euler(shift=3.0, stochastic_sampling=True)),
    "heun": ("StableDiffusion3Pipeline", FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "lcm": ("StableDiffusion3Pipeline", FlowMatchLCMScheduler(shift=3.0)),
    "unipc": ("StableDiffusion3Pipeline", UniPCMultistepScheduler(**FLOW_SOLVER)),
    "dpm": ("StableDiffusion3Pipeline", DPMSolverMultistepScheduler(**FLOW_SOLVER)),
    "dynamic": ("FluxPipeline", euler(**DYNAMIC)),
    "dynamic, linear": ("FluxPipeline", euler(time_shift_type="linear", **DYNAMIC)),
    "dynamic, terminal": ("QwenImagePipeline", euler(shift_terminal=0.02, **DYNAMIC)),
    "dynamic, beta": ("FluxPipeline", euler(use_beta_sigmas=True, **DYNAMIC)),
    "dynamic of LTX": ("LTXPipeline", euler(shift_terminal=0.1, **(DYNAMIC | {"base_shift": 0.95}))),
    "unipc of Wan": ("WanPipeline", UniPCMultistepScheduler(**(FLOW_SOLVER | {"flow_shift": 5.0}))),
    "euler of Wan": ("WanPipeline", euler(shift=5.0)),
    "dpm of Sana": ("SanaPipeline", DPMSolverMultistepScheduler(**FLOW_SOLVER)),
    "euler of Sana": ("SanaPipeline", euler(shift=3.0)),
    "unipc of HiDream": ("HiDreamImagePipeline", UniPCMultistepScheduler(**FLOW_SOLVER)),
    "unshifted timesteps": (
        "CogView4Pipeline",
        euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    ),
}


def make_policy(name, scheduler):
    pipeline, arguments = tiny_pipeline(name, scheduler=scheduler), call_arguments(name)
    guidance = "true_cfg_scale" if "true_cfg_scale" in arguments else "guidance_scale"
    arguments.pop("negative_prompt", None)
    return FlowPolicy(
        pipeline,
        LoraConfig(r=2, target_modules=None),
        guidance_scale=arguments.pop(guidance),
        generation_kwargs=arguments,
    )


def timesteps_of(policy):
    """What the transformer is told, call by call."""
    told = []

    def note(module, args, kwargs):
        told.append(kwargs.get("timestep", kwargs.get("timesteps")).clone())

    policy.pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return told


def stock_call(policy, steps, **kwargs):
    arguments = policy.call_arguments | kwargs
    if policy.negative_prompt is not None:
        arguments["negative_prompt"] = policy.negative_prompt
    policy.pipeline(
        PROMPT,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **arguments,
    )
    return policy.pipeline.scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_the_grid_and_the_timesteps_are_the_stock_schedulers(name):
    policy = make_policy(*SCHEDULERS[name])
    told = timesteps_of(policy)
    for steps in (4, 7):
        scheduler = stock_call(policy, steps)
        expected = scheduler.sigmas.unique_consecutive().cpu()
        grid = policy.sigmas(steps)
        assert torch.equal(grid, expected) and len(grid) == steps + 1
        stock = list(told)
        if name == "heun":
            stock = [stock[0], *stock[1::2]]
        told.clear()
        conditioning = policy.conditioning([PROMPT])
        for sigma in grid[:-1].tolist():
            policy(torch.zeros(1, *policy.latent_shape), sigma, conditioning)
        assert len(told) == len(stock)
        for ours, theirs in zip(told, stock, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        told.clear()


@pytest.mark.parametrize(("name", "kind"), [("unipc of Wan", torch.int64), ("static", torch.float32)])
@torch.no_grad()
def test_timesteps_keep_their_type(name, kind):
    policy = make_policy(*SCHEDULERS[name])
    told = timesteps_of(policy)
    sigmas = policy.sigmas(4)
    policy(torch.zeros(1, *policy.latent_shape), sigmas[1].item(), policy.conditioning([PROMPT]))
    assert told[0].dtype == kind


@pytest.mark.parametrize("name", ["static", "dynamic", "dynamic, terminal", "unipc of Wan"])
@torch.no_grad()
def test_sigmas_of_the_users_own(name):
    """They are given before the shift, as the pipeline's call takes them."""
    pipeline, scheduler = SCHEDULERS[name]
    policy = make_policy(pipeline, scheduler)
    sigmas = [1.0, 0.8, 0.3]
    if name == "unipc of Wan":
        with pytest.raises(ValueError, match="WanPipeline takes no sigmas"):
            policy.sigmas(3, sigmas)
        return
    grid = policy.sigmas(3, sigmas)
    assert torch.equal(grid, stock_call(policy, 3, sigmas=sigmas).sigmas)
    assert not torch.equal(grid, policy.sigmas(3))
    with pytest.raises(ValueError, match="sigmas has 3 values: expected num_inference_steps=4"):
        policy.sigmas(4, sigmas)
    with pytest.raises(ValueError, match="expected 4 values that descend"):
        policy.sigmas(3, sigmas[::-1])


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_timesteps_between_and_below_the_points_of_the_grid(name):
    """Tails of other grids, and forward processes, visit noise levels that no grid holds."""
    policy = make_policy(*SCHEDULERS[name])
    told = timesteps_of(policy)
    grid = policy.sigmas(4)
    between = [(a + b) / 2 for a, b in zip(grid.tolist(), grid[1:].tolist(), strict=False)]
    conditioning = policy.conditioning([PROMPT])
    sigmas = sorted([*grid[:-1].tolist(), *between, grid[-2].item() / 10], reverse=True)
    for sigma in sigmas:
        policy(torch.zeros(1, *policy.latent_shape), sigma, conditioning)
    seen = torch.stack([timestep.flatten()[0].double() for timestep in told[:: len(told) // len(sigmas)]])
    assert (seen.diff() < 0).all()
    # The stock timesteps are 1000 sigma, whole numbers, or not yet shifted (CogView4); some models are told 1 of 1000.
    if name != "unshifted timesteps":
        largest = 1000.0 if seen[0] > 1 else 1.0
        assert (seen / largest - torch.tensor(sigmas, dtype=torch.float64)).abs().max() < 2e-3


@torch.no_grad()
def test_grids_that_were_asked_for_in_between_do_not_change_timesteps():
    """An evaluation has another grid than the rollout whose transitions are trained on before and after it."""
    policy = make_policy(*SCHEDULERS["unipc of Wan"])
    told = timesteps_of(policy)
    conditioning, latents = policy.conditioning([PROMPT]), torch.zeros(1, *policy.latent_shape)
    sigma = policy.sigmas(4)[:2].mean().item()
    policy(latents, sigma, conditioning)
    policy.sigmas(10)
    policy(latents, sigma, conditioning)
    assert torch.equal(told[0], told[-1])


# ---- What is no grid from noise to a picture ----


def test_inverted_sigmas_are_refused():
    pipeline = tiny_sd3()
    pipeline.scheduler = euler(invert_sigmas=True)
    with pytest.raises(
        ValueError, match="invert_sigmas=True of FlowMatchEulerDiscreteScheduler: its sigma is 0 for noise"
    ):
        FlowPolicy(pipeline)


def test_consistency_models_are_refused():
    pipeline = tiny_sd3()
    pipeline.scheduler = SCMScheduler()
    with pytest.raises(ValueError, match="SCMScheduler"):
        FlowPolicy(pipeline)


def test_solvers_of_diffusion_models_are_not_taken_for_flow_schedulers():
    assert is_flow(UniPCMultistepScheduler(**FLOW_SOLVER)) and is_flow(euler())
    assert not is_flow(UniPCMultistepScheduler()) and not is_flow(SCMScheduler())
    assert not is_flow(DPMSolverMultistepScheduler(prediction_type="v_prediction"))


# ---- The user's own scheduler ----


@pytest.mark.parametrize("name", ["static", "dynamic", "heun", "unipc", "dpm"])
@torch.no_grad()
def test_the_users_scheduler_is_left_alone(name):
    pipeline, scheduler = SCHEDULERS[name]
    scheduler = copy.deepcopy(scheduler)
    before, kind = copy.deepcopy(vars(scheduler)), type(scheduler)
    policy = make_policy(pipeline, scheduler)
    policy.sigmas(4)
    policy(torch.zeros(1, *policy.latent_shape), 0.5, policy.conditioning([PROMPT]))
    policy.decode(torch.zeros(1, *policy.latent_shape))
    assert policy.pipeline.scheduler is scheduler and type(scheduler) is kind
    assert vars(scheduler).keys() == before.keys()
    for attribute, value in vars(scheduler).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: repr(a) == repr(b)
        assert same(value, before[attribute]), attribute


def test_pipelines_recognise_what_stands_in_for_a_scheduler():
    """They look at its class, its settings and the arguments of its methods."""
    scheduler = euler(shift=2.0)
    for stand_in in (idle_scheduler(scheduler), query_scheduler(scheduler)):
        assert isinstance(stand_in, FlowMatchEulerDiscreteScheduler)
        assert stand_in.config.shift == 2.0 and stand_in.order == 1
    with pytest.raises(ValueError, match="The pipeline copies its scheduler"):
        copy.deepcopy(query_scheduler(scheduler))
