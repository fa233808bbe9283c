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

"""What a run will hold, against what torch's allocator says that it held."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from pipelines import redness, tiny_sd3
from tiny import tiny_pipeline
from torch import nn

from trl_flow import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
)
from trl_flow.policy import FlowPolicy, embeddings, load_pipeline
from trl_flow.policy.allocations import ledger, measured_peak, module_bytes, without_weights
from trl_flow.policy.memory import (
    MemoryEstimator,
    MemorySettings,
    make_fit,
)
from trl_flow.report.live import LiveReport
from trl_flow.rollout import chain_plan, log_prob, transition
from trl_flow.scripts.estimate import memory_settings


MIB = 2**20
PROMPTS = ["a red circle", "two blue square", "three green circle", "a blue square"]
CHAINS = chain_plan(4, 4, [0, 1, 2])


@pytest.fixture(scope="module")
def policy():
    return FlowPolicy(load_pipeline("shapes"), max_sequence_length=1)


@pytest.fixture(scope="module")
def estimator(policy):
    return MemoryEstimator(policy, [policy.encode(PROMPTS[0])], policy.sigmas(4))


def settings(**kwargs) -> MemorySettings:
    given = {"plan": CHAINS, "rollout_batch_size": 4, "transition_batch_size": 4, "activation_checkpointing": False}
    return MemorySettings(**given | kwargs)


# ---- Measuring ----


def test_peak_of_a_call():
    def call():
        first = torch.zeros(MIB)  # 4 MiB
        second = first + 1  # 8
        del first  # 4
        third = second * 2  # 8
        fourth = third * 2  # 12
        del second, third, fourth

    assert measured_peak(call) / MIB == pytest.approx(12, abs=0.01)


# ---- Estimates of parts ----


def test_sampling_training_and_decoding_need_what_they_are_said_to(policy, estimator):
    condition = policy.encode(PROMPTS[0])
    rows, conditions = torch.randn(4, *policy.latent_shape), [condition] * 4
    sigma, sigma_next = policy.sigmas(4)[1:3].tolist()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def sample():
        policy(rows, sigma, conditions)

    def train():
        mean, std = transition(rows, policy(rows, sigma, conditions), sigma, sigma_next, 0.7, "flow")
        log_prob(rows + 1, mean, std).sum().backward()

    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        measured = [measured_peak(call) for call in (sample, train, lambda: policy.decode(rows, 4, conditions))]
    finally:
        for parameter in trained:
            parameter.grad = None
    estimated = [find(4, settings()) for find in (estimator.sampling, estimator.training, estimator.decoding)]
    assert estimated == pytest.approx(measured, rel=0.1)
    assert measured[1] > 3 * measured[0]


@pytest.mark.parametrize(
    "name, size",
    [
        ("StableDiffusion3Pipeline", {"height": 16, "width": 16}),
        ("WanPipeline", {"height": 64, "width": 64, "num_frames": 33}),
    ],
)
def test_checkpointing_of_other_families_saves_what_it_is_said_to(name, size):
    policy = FlowPolicy(tiny_pipeline(name), guidance_scale=5.0, **size)
    condition = policy.encode(PROMPTS[0])
    rows, grid = torch.randn(4, *policy.latent_shape), policy.sigmas(4)
    estimator = MemoryEstimator(policy, [condition], grid)

    def train():
        policy(rows, grid[2].item(), [condition] * 4).square().mean().backward()

    train()  # gradients, which are there from the second one on
    usual = measured_peak(train)
    assert estimator.training(4, settings()) == pytest.approx(usual, rel=0.1)
    policy.gradient_checkpointing_enable()
    saving = measured_peak(train)
    assert estimator.training(4, settings(activation_checkpointing=True)) == pytest.approx(saving, rel=0.1)
    assert saving < 0.8 * usual


def test_tiles():
    """Of a tiny FLUX.1, whose pictures are of 7 x 7 tiles."""
    pipeline = tiny_pipeline("FluxPipeline")
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 16, 8
    policy = FlowPolicy(pipeline, guidance_scale=3.5, height=64, width=64)
    condition = policy.encode(PROMPTS[0])
    rows, estimator = torch.randn(4, *policy.latent_shape), MemoryEstimator(policy, [condition], policy.sigmas(4))
    measured = []
    for tiling in (False, True):
        policy.divide_decoding(slicing=False, tiling=tiling)
        policy.decode(rows, 4, [condition] * 4)
        measured.append(measured_peak(lambda: policy.decode(rows, 4, [condition] * 4)))
        assert estimator.decoding(4, settings(vae_tiling=tiling)) == pytest.approx(measured[-1], rel=0.1)
    assert measured[1] < 0.5 * measured[0]


def test_checkpointing_saves_activations_and_is_off_again(policy, estimator):
    kept, computed_again = (
        estimator.training(4, settings(activation_checkpointing=wanted)) for wanted in (False, True)
    )
    assert computed_again < kept / 2
    assert not policy.pipeline.transformer.is_gradient_checkpointing


def test_weights_come_back(policy):
    before = {name: (id(p), p.data_ptr(), p.grad) for name, p in policy.named_parameters()}
    with without_weights([policy.denoisers]) as mode:
        assert all(parameter.fake_mode is mode for parameter in policy.parameters())
    assert {name: (id(p), p.data_ptr(), p.grad) for name, p in policy.named_parameters()} == before


def test_quantised_weights(policy, estimator):
    frozen = [m.weight for m in policy.denoisers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    count = sum(weight.numel() for weight in frozen)
    full = estimator.weights(settings())["denoiser"]
    assert full - estimator.weights(settings(quantization="int8"))["denoiser"] == 3 * count
    assert full - estimator.weights(settings(quantization="nf4"))["denoiser"] == pytest.approx(3.4375 * count)
    # A layer's weight is there in full while it is used.
    more = estimator.between("sampling", 4, settings(quantization="nf4")) - estimator.between(
        "sampling", 4, settings()
    )
    assert more == 4 * max(weight.numel() for weight in frozen)


def test_layer_that_is_quantised():
    """Its weight is there in full in the forward and in the backward pass, and between them in what it is packed into."""

    class Packed(nn.Parameter):
        pass

    layer = nn.Linear(1024, 512)
    layer.weight = Packed(torch.zeros(512 * 1024 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with without_weights([layer]) as mode:
        with mode:
            rows = torch.zeros(8, 1024, requires_grad=True)
        with ledger(torch.device("cpu")) as book:
            output = layer(rows)
            between, forward, book.peak = book.held, book.peak, 0
            output.sum().backward()
            assert tuple(rows.grad.shape) == (8, 1024)
        assert (between, forward) == (4 * 8 * 512, 4 * (8 * 512 + 512 * 1024))
        assert book.peak > 4 * 512 * 1024
    assert "forward" not in vars(layer) and type(layer.weight) is Packed


@pytest.mark.parametrize(
    "trainer_class, config_class, copies",
    [(FlowGRPOTrainer, FlowGRPOConfig, 0), (DiffusionNFTTrainer, DiffusionNFTConfig, 1)],
)
def test_a_policy_of_its_own_that_samples(trainer_class, config_class, copies, tmp_path):
    given = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 1}
    config = config_class(str(tmp_path), num_generations=4, max_sequence_length=2, guidance_scale=1.0, **given)
    trainer = trainer_class(tiny_sd3(), redness, config, Dataset.from_dict({"prompt": PROMPTS}))
    estimator, settings = memory_settings(trainer, updates=2)
    without = estimator.weights(replace(settings, sampling_policy=False))
    more = estimator.weights(settings)["trained weights"] - without["trained weights"]
    trained = sum(parameter.numel() * 4 for parameter in trainer._trainable)
    assert more == copies * trained
    # While it samples, the trained weights are kept aside.
    phases = estimator.estimate(settings).phases
    for phase in ("encode", "rollout", "decode", "collect"):
        assert phases[phase]["trained weights"] == phases["train"]["trained weights"] + copies * trained


def test_encoders_leave_for_another_memory(estimator):
    encoders = sum(map(module_bytes, estimator.encoders.values()))
    assert encoders > 0
    for name in ("precompute_prompts", "offload_encoders"):
        away = estimator.estimate(settings(**{name: True})).phases
        assert (away["encode"]["encoders"], away["train"]["encoders"]) == (encoders, 0)
        assert estimator.estimate(settings(**{name: True}, host=False)).phases["train"]["encoders"] == encoders
    assert estimator.estimate(settings()).phases["train"]["encoders"] == encoders


def test_denoisers_leave_while_prompts_are_precomputed(estimator):
    """With their adapter, which has a moving average; but not where all is one memory, nor in weights that cannot be moved."""
    usual, (denoiser,) = estimator.estimate(settings()).phases["encode"], estimator.policy.hosts.models
    trained = estimator.trained_bytes
    assert trained > 0 and usual["trained weights"] == 2 * trained and usual["denoiser"] > 0
    for changes, average in (({}, trained), ({"ema": False}, 0)):
        phases = estimator.estimate(settings(precompute_prompts=True, **changes)).phases
        assert (phases["encode"]["denoiser"], phases["encode"]["trained weights"]) == (0, average)
        assert phases["train"]["denoiser"] == usual["denoiser"]
    here = [settings(offload_encoders=True), settings(precompute_prompts=True, host=False)]
    found = [estimator.estimate(one).phases["encode"] for one in here]
    denoiser.is_loaded_in_8bit = True
    try:
        found.append(estimator.estimate(settings(precompute_prompts=True)).phases["encode"])
    finally:
        del denoiser.is_loaded_in_8bit
    for encode in found:
        assert (encode["denoiser"], encode["trained weights"]) == (usual["denoiser"], 2 * trained)


# ---- Advice ----


def test_advice_begins_with_what_costs_least(estimator):
    """What brings a run a byte below what it takes."""
    wished = settings()
    assert make_fit(estimator, wished, estimator.estimate(wished).peak) == ({}, estimator.estimate(wished))
    for name, value in {"dtype": torch.bfloat16, "activation_checkpointing": True}.items():
        found = estimator.estimate(wished)
        assert found.largest == "train"
        changes, smaller = make_fit(estimator, wished, found.peak - 1)
        assert changes == {name: value} and smaller.peak < found.peak
        wished = replace(wished, **changes)


@pytest.mark.slow
def test_advice_changes_no_more_than_it_must(estimator):
    wished = settings(dtype=torch.bfloat16, rollout_batch_size=8, transition_batch_size=8)
    smallest = make_fit(estimator, wished, 1)[1].peak
    largest = estimator.estimate(wished).peak
    for share in (0.02, 0.3, 0.6, 0.9):
        limit = int(smallest + share * (largest - smallest))
        changes, found = make_fit(estimator, wished, limit)
        assert found.peak <= limit and found == estimator.estimate(replace(wished, **changes))
        for name in changes:
            others = {other: value for other, value in changes.items() if other != name}
            assert estimator.estimate(replace(wished, **others)).peak > limit


def test_nothing_fits_into_nothing(estimator):
    changes, found = make_fit(estimator, settings(dtype=torch.bfloat16), 1)
    assert changes["quantization"] == "nf4" and changes["activation_checkpointing"] and found.peak > 1


# ---- What waits elsewhere ----


def test_what_waits_on_the_cpu(estimator):
    phases = estimator.estimate(settings()).phases
    compared = settings(compared_bytes=MIB)
    assert estimator.estimate(compared).phases["train"]["latents"] == phases["train"]["latents"] + MIB
    away = estimator.estimate(replace(compared, offload_trajectories=True, offload_vae=True)).phases
    latent, vae = 4 * math.prod(estimator.policy.latent_shape), module_bytes(estimator.policy.pipeline.vae)
    # Each of four chains keeps what three steps begin and end with, and its end for decoding.
    assert phases["train"]["latents"] == 4 * 4 * latent and phases["decode"]["latents"] == 4 * 5 * latent
    assert away["train"]["latents"] == 0 and away["decode"]["latents"] == 4 * latent
    for phase in phases:
        assert phases[phase]["VAE"] == vae
        assert away[phase]["VAE"] == (vae if phase == "decode" else 0)


def test_latents_of_several_sweeps(estimator):
    """Of three prompts, two at a time: what is kept of the first sweep is there in the second one, and all of it twice at the end."""
    phases = estimator.estimate(settings(prompts=3, rollout_batch_size=8)).phases
    prompt = 4 * 4 * 4 * math.prod(estimator.policy.latent_shape)
    assert phases["train"]["latents"] == 3 * prompt and phases["collect"]["latents"] == 6 * prompt
    assert phases["rollout"]["latents"] == prompt


@pytest.mark.slow
def test_half_precision(policy, estimator):
    """Of a pipeline in float32, as if it had been loaded in bfloat16."""
    half = estimator.estimate(settings(dtype=torch.bfloat16)).phases["train"]
    pipeline = load_pipeline("shapes", dtype=torch.bfloat16)
    other = FlowPolicy(pipeline, max_sequence_length=1)
    whole = MemoryEstimator(other, [other.encode(PROMPTS[0])], other.sigmas(4)).estimate(settings()).phases["train"]
    assert half == pytest.approx(whole, rel=0.01, abs=2048)


# ---- Whole runs ----

RUNS = {
    "activations": {"transition_batch_size": 8, "num_generations": 8, "activation_checkpointing": False, "beta": 0.0},
    "checkpointing": {"transition_batch_size": 24, "num_generations": 24},
    "no guidance": {"guidance_scale": 1.0, "transition_batch_size": 8, "num_generations": 8},
    "full_finetuning": {"full_finetuning": True},
    "full_finetuning, no reference, plain optimizer": {"full_finetuning": True, "beta": 0.0, "optim": "adamw_torch"},
    "precompute_prompts": {"precompute_prompts": True, "rollout_batch_size": 4},
    "DenseGRPO": {"trainer_class": DenseGRPOTrainer, "config_class": DenseGRPOConfig},
    "DiffusionNFT": {
        **{"trainer_class": DiffusionNFTTrainer, "config_class": DiffusionNFTConfig, "old_policy_decay_rate": 0.4},
        **{"full_finetuning": True, "learning_rate": 1e-5},
    },
}


def compare(tmp_path, pipeline, trainer_class=FlowGRPOTrainer, config_class=FlowGRPOConfig, **kwargs):
    """Estimated and measured bytes of a run's two updates."""
    pipeline.set_progress_bar_config(disable=True)
    weights = sum(module_bytes(part) for part in pipeline.components.values() if isinstance(part, nn.Module))
    embeddings._factors.cache_clear()
    made = []

    def run():
        args = {"num_inference_steps": 4, "num_generations": 4, "per_device_train_batch_size": 1} | kwargs
        args = {"output_dir": str(tmp_path), "max_steps": 2, "use_cpu": True, "report_to": "none"} | args
        trainer = trainer_class(
            pipeline,
            redness,
            config_class(save_strategy="no", disable_tqdm=True, **args),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )
        trainer.remove_callback(LiveReport)
        made.append(trainer)
        trainer.train()

    measured = weights + measured_peak(run)
    estimator, settings = memory_settings(made[0], updates=2)
    return estimator.estimate(settings), measured


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_estimate_is_within_15_percent_of_what_a_run_takes(name, tmp_path):
    estimate, measured = compare(tmp_path, load_pipeline("shapes"), max_sequence_length=1, **RUNS[name])
    assert estimate.peak == pytest.approx(measured, rel=0.15), estimate.phases


@pytest.mark.slow
def test_estimate_of_another_family(tmp_path):
    size = {"height": 64, "width": 64, "guidance_scale": 3.5}
    estimate, measured = compare(tmp_path, tiny_pipeline("FluxPipeline"), activation_checkpointing=False, **size)
    assert estimate.peak == pytest.approx(measured, rel=0.15), estimate.phases
