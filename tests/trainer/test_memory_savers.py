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

"""Settings that save memory: what they change, which is nothing or rounding, and what they refuse."""

import functools
import math
import weakref
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import AutoencoderMixin
from methods import NFT
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from tiny import call_arguments, tiny_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from trainer.conftest import SETTINGS
from trainer.observing import logged, randomize
from transformers import TrainerCallback

from trl_flow import DenseGRPOConfig, FlowGRPOConfig, FlowGRPOTrainer, FlowPolicy, G2RPOConfig, G2RPOTrainer
from trl_flow.calibration import calibrate_noise
from trl_flow.policy.allocations import measured_peak
from trl_flow.policy.doctor import Diagnosis, examine_policy
from trl_flow.policy.encoders import Visitors
from trl_flow.scripts import estimate as estimating
from trl_flow.scripts.dry_run import rollouts, update_facts
from trl_flow.trainer.arguments import check_gradient_scale, check_offload
from trl_flow.trainer.transitions import TransitionChunk, trained_steps, transition_chunk


# ---- Frozen weights in half precision ----


def flux(dtype):
    return tiny_pipeline("FluxPipeline").to(dtype)


FLUX = {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": None, "num_generations": 8}


class KeepGradient(TrainerCallback):
    """Keeps the gradient of an update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()


def test_half_precision_trains_as_float32_does(make_trainer, tmp_path):
    """
    The adapter's gradient is that of float32 weights, to the rounding of half precision. Without scaling, most of what
    passes float16 weights here is rounded away, and the gradient is off by a fifth; with real sizes, all of it is.
    """
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keeping, settings = KeepGradient(), {"gradient_accumulation_steps": 2, **FLUX}
        output_dir = str(tmp_path / str(dtype))
        trainer = make_trainer(model=flux(dtype), callbacks=[keeping], output_dir=output_dir, **settings)
        randomize(trainer)
        trainer.train()
        gradients[dtype] = keeping.gradient
        assert {p.dtype for p in trainer._trainable} == {torch.float32}
        assert {p.dtype for p in trainer.policy.parameters() if not p.requires_grad} == {dtype}
        assert (logged(trainer, "ratio/min"), logged(trainer, "ratio/max")) == ([1.0], [1.0])
    exact = gradients[torch.float32]
    for dtype, bound in ((torch.bfloat16, 0.3), (torch.float16, 0.04)):
        error = (gradients[dtype] - exact).norm() / exact.norm()
        assert error < bound


def test_gradients_of_other_precisions_are_not_scaled(make_trainer):
    for dtype in (torch.float32, torch.bfloat16):
        assert make_trainer(model=flux(dtype), **FLUX).policy.gradient_scale == 1


@pytest.fixture
def mixed_float16(monkeypatch):
    """A trainer with `fp16: true` as it is on a GPU: on a CPU, accelerate has neither float16's autocast nor a scaler."""

    class MixedFloat16(FlowGRPOTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    return MixedFloat16


@pytest.mark.parametrize("dtype, begins_with", [(torch.float32, 65536), (torch.float16, 1)])
def test_mixed_precision_scales_what_the_policy_does_not(make_trainer, mixed_float16, tmp_path, dtype, begins_with):
    """The policy's scale and 65536 together are infinity: no update would be made before the latter has come down."""
    gradients = {}
    for trainer_class in (FlowGRPOTrainer, mixed_float16):
        keeping, output_dir = KeepGradient(), str(tmp_path / trainer_class.__name__)
        model = flux(torch.float32 if trainer_class is FlowGRPOTrainer else dtype)
        trainer = make_trainer(trainer_class, model=model, callbacks=[keeping], output_dir=output_dir, **FLUX)
        randomize(trainer)
        before = [p.detach().clone() for p in trainer._trainable]
        trainer.train()
        gradients[trainer_class] = keeping.gradient
        assert any(not torch.equal(one, two) for one, two in zip(before, trainer._trainable, strict=True))
    # No update was left out: that would have halved it.
    assert trainer.accelerator.scaler.get_scale() == begins_with
    exact = gradients[FlowGRPOTrainer]
    assert (gradients[mixed_float16] - exact).norm() / exact.norm() < 0.04


def test_mixed_float16_needs_a_gpu(make_trainer):
    """To train; a run for one can be planned anywhere."""
    trainer = make_trainer(fp16=True)
    with pytest.raises(ValueError, match="fp16=True has no effect on cpu"):
        trainer.train()


def test_float16_is_computed_in_float16(make_trainer, monkeypatch):
    """Not in the bfloat16 that TRL sets on a GPU."""
    for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float16, "no")):
        with monkeypatch.context() as there_is_a_gpu:
            there_is_a_gpu.setattr(torch.cuda, "is_available", lambda: True)
            given = FlowGRPOConfig(**{**SETTINGS, **FLUX}, output_dir=str(make_trainer.directory))
        trainer = FlowGRPOTrainer(flux(dtype), args=given, reward_funcs=brightness, train_dataset=prompts(6))
        assert given.bf16 and trainer.args.bf16 == (expected == "bf16")
        assert trainer.accelerator.mixed_precision == expected
    with pytest.raises(ValueError, match="bf16=True would compute in bfloat16.*bf16=False"):
        make_trainer(model=flux(torch.float16), bf16=True, **FLUX)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision=bf16 of the launcher would compute in bfloat16.*bf16=False"):
        make_trainer(model=flux(torch.float16), **FLUX)
    assert make_trainer(model=flux(torch.float16), bf16=False, **FLUX).accelerator.mixed_precision == "no"


def test_overflow_ends_the_run_before_an_update(make_trainer):
    """In rollouts: float16 ends at 65504."""
    pipeline = flux(torch.float16)
    trainer = make_trainer(model=pipeline, **FLUX)
    with torch.no_grad():
        pipeline.transformer.x_embedder.weight.fill_(6e4)
    before = [p.detach().clone() for p in trainer._trainable]
    with pytest.raises(ValueError, match=r"latents that hold NaN or infinity, at step 0, .*torch.float16.*bfloat16"):
        trainer.train()
    assert all(torch.equal(one, two) for one, two in zip(before, trainer._trainable, strict=True))


def test_a_vae_that_overflows_is_told_from_a_denoiser(make_trainer):
    pipeline = tiny_sd3()
    trainer = make_trainer(model=pipeline)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"VAE decodes finite latents to pictures.*earlier checkpoint"):
        trainer.train()


def test_a_gradient_that_is_no_number_ends_the_run(make_trainer):
    trainer = make_trainer()
    randomize(trainer)
    before = [p.detach().clone() for p in trainer._trainable]
    trainer._trainable[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="The gradient holds NaN or infinity at step 0"):
        trainer.train()
    assert all(torch.equal(one, two) for one, two in zip(before, trainer._trainable, strict=True))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_scaled_gradients_need_whole_parameters(kind):
    with pytest.raises(ValueError, match=f"dtype='float16' with {kind.value}: .*bfloat16"):
        check_gradient_scale(1024.0, kind)
    check_gradient_scale(1.0, kind)
    check_gradient_scale(1024.0, DistributedType.MULTI_GPU)


# ---- Latents of a rollout on the CPU ----


def test_trajectories_on_the_cpu_change_nothing(make_trainer, tmp_path):
    """Nor does going on in the middle of a rollout."""
    settings = {"max_steps": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    trained = []
    for offload, resume in ((False, None), (True, None), (True, str(tmp_path / "True_None" / "checkpoint-1"))):
        output_dir = str(tmp_path / f"{offload}_{resume and 1}")
        trainer = make_trainer(offload_trajectories=offload, output_dir=output_dir, **settings)
        trainer.train(resume_from_checkpoint=resume)
        trained.append([p.detach().clone() for p in trainer._trainable])
    for others in trained[1:]:
        assert all(torch.equal(one, two) for one, two in zip(trained[0], others, strict=True))


@pytest.mark.parametrize(
    "method, settings",
    [
        (NFT, {"old_policy_decay": 0.6, "old_policy_decay_rate": 0.4}),
        ((), {"objective": "guard", "num_iterations": 2}),
        ((), {"objective": "dppo", "steps_per_generation": 2}),
    ],
)
def test_what_is_compared_on_the_cpu_changes_nothing(make_trainer, tmp_path, method, settings):
    trained = []
    for offload in (False, True):
        output_dir = str(tmp_path / str(offload))
        trainer = make_trainer(*method, offload_trajectories=offload, output_dir=output_dir, max_steps=3, **settings)
        trainer.train()
        assert any(micro_batch["old"] is not None for micro_batch in trainer._buffered_inputs)
        trained.append([p.detach().clone() for p in trainer._trainable])
    assert all(torch.equal(one, two) for one, two in zip(*trained, strict=True))


def test_each_batch_is_brought_to_where_training_is():
    """To another device than that of the latents: what is computed there has no values, but a place."""
    nodes = torch.arange(24.0).view(2, 3, 4)
    inputs = {
        "nodes": nodes,
        "advantages": torch.ones(2, 1, 2, device="meta"),
        "trained": torch.ones(2, 1, 2, dtype=torch.bool),
        "steps": torch.tensor([0]),
        "parents": torch.tensor([[0, 0]]),
        "children": torch.tensor([[1, 2]]),
        "prompts": ["a", "b"],
        "images": None,
    }
    (step,) = trained_steps(inputs, torch.tensor([1.0, 0.0]), lambda prompts, images: prompts, False)
    chunk = transition_chunk(inputs, step, slice(0, 8))
    places = {t.device.type for t in (chunk.latents, chunk.next_latents, chunk.row, *chunk.members)}
    assert places == {"meta"} and nodes.device.type == "cpu"
    assert [index.tolist() for index in chunk.members_on_cpu] == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert chunk.latents.shape == (2, 4) and chunk.next_latents.shape == (4, 4)


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_compared_waits_where_the_latents_do(make_trainer, offload):
    """On a GPU of which there are shapes alone. What is on the CPU cannot be looked up by indices that are elsewhere."""
    trainer = make_trainer(offload_trajectories=offload)
    there, here = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    rows = torch.zeros(1, 4)
    chunk = TransitionChunk(0, 1.0, 0.0, rows, rows, [], there, (there,) * 3, (here,) * 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        members, kept = trainer._kept(chunk, {"velocity": torch.zeros(1, 4, device="cuda")})
    assert kept["velocity"].device.type == ("cpu" if offload else "cuda")
    assert members == ((here,) * 3 if offload else (there,) * 3)
    old = torch.arange(8.0).view(2, 2, 2, 1)
    assert trainer._recalled(chunk, {"velocity": old})["velocity"].item() == (0 if offload else 7)


def test_a_rollout_has_its_latents_once(make_trainer):
    """However many updates it feeds, and those of the one before are gone when it begins."""
    settings = {"update_per_step": True, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 5}
    trainer = make_trainer(G2RPOTrainer, G2RPOConfig, **settings)
    generate, rollouts, gone = trainer._generate_and_score, [], []

    def watched(rows):
        gone.append(all(latents() is None for latents in rollouts))
        micro_batches = generate(rows)
        latents = [micro_batch["nodes"] for micro_batch in micro_batches]
        assert len(latents) == 4 and latents[0].shape == latents[1].shape
        assert len({nodes.untyped_storage().data_ptr() for nodes in latents}) == 1
        assert latents[0].untyped_storage().nbytes() == 2 * latents[0].nbytes
        rollouts.append(weakref.ref(latents[0]))
        return micro_batches

    trainer._generate_and_score = watched
    trainer.train()
    assert gone == [True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [False, True])
def test_trajectories_leave_a_gpu(make_trainer, offload):
    trainer = make_trainer(*NFT, old_policy_decay_rate=0.4, max_steps=2, use_cpu=False, offload_trajectories=offload)
    trainer.train()
    (inputs,) = trainer._buffered_inputs
    assert {t.device.type for t in (inputs["nodes"], inputs["old"]["velocity"])} == {"cpu" if offload else "cuda"}


# ---- Encoders and VAE away ----


def moves(model, monkeypatch):
    """Where a model is moved from here on."""
    noted, move = [], model.to
    monkeypatch.setattr(model, "to", lambda device: (noted.append(str(device)), move(device))[1])
    return noted


def test_the_vae_is_not_needed_for_velocities():
    """While it is nowhere: tensors on `meta` have no values."""
    policy = FlowPolicy(tiny_sd3(), guidance_scale=4.5, max_sequence_length=2)
    latents, prompts = torch.randn(1, *policy.latent_shape), ["a red circle"]
    with torch.no_grad():
        expected, grid = policy(latents, 0.5, policy.conditioning(prompts)), policy.sigmas(3)
        policy.offload_vae("meta")
        assert next(policy.pipeline.vae.parameters()).device.type == "meta"
        policy._cache.clear()
        assert torch.equal(policy(latents, 0.5, policy.conditioning(prompts)), expected)
        assert torch.equal(policy.sigmas(3), grid)
        with pytest.raises(NotImplementedError, match="meta tensor"):
            policy.decode(latents)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxKontextPipeline"])
def test_the_vae_comes_to_decode_and_to_encode_pictures(name, monkeypatch):
    arguments = call_arguments(name)
    image, pipeline = arguments.pop("image", None), tiny_pipeline(name)
    guidance_scale = arguments.pop("guidance_scale")
    policy = FlowPolicy(pipeline, guidance_scale=guidance_scale, generation_kwargs=arguments)
    latents = torch.randn(2, *policy.latent_shape)
    conditioning = policy.conditioning(["a red circle", "two"], image and [image, image])
    expected = policy.decode(latents, 1, conditioning)
    noted = moves(pipeline.vae, monkeypatch)
    policy.offload_vae("cpu:0")
    assert noted == ["cpu:0"]
    assert torch.equal(policy.decode(latents, 1, conditioning), expected)
    assert noted == ["cpu:0", "cpu", "cpu:0"]
    policy.conditioning(["green"], image and [image])
    assert len(noted) == (5 if image else 3) and noted[-1] == "cpu:0"


def test_what_is_away_changes_nothing(make_trainer, tmp_path, monkeypatch):
    trained = []
    for away in (False, True):
        settings = {"offload_vae": away, "offload_encoders": away, "output_dir": str(tmp_path / str(away))}
        trainer = make_trainer(max_steps=2, **settings)
        pipeline = trainer.policy.pipeline
        noted = [moves(model, monkeypatch) for model in (pipeline.vae, pipeline.text_encoder)]
        trainer.train()
        trained.append([p.detach().clone() for p in trainer._trainable])
        # Away, then to and fro for each of two prompts.
        assert [len(places) for places in noted] == ([5, 5] if away else [0, 0])
    assert all(torch.equal(one, two) for one, two in zip(*trained, strict=True))


def test_what_is_not_there_cannot_leave():
    policy = FlowPolicy(tiny_sd3())
    check_offload(policy, FlowGRPOConfig(use_cpu=True, offload_vae=True, offload_encoders=True))
    policy.autoencoder = Visitors({})  # pixels
    with pytest.raises(ValueError, match="offload_vae=True has no effect: StableDiffusion3Pipeline has none"):
        check_offload(policy, FlowGRPOConfig(use_cpu=True, offload_vae=True))
    policy.encoders = Visitors({})
    with pytest.raises(ValueError, match="offload_encoders=True has no effect"):
        check_offload(policy, FlowGRPOConfig(use_cpu=True, offload_encoders=True))


class Places:
    """
    Where each model of a pipeline is, of two places that are both the CPU: home, of which the code says "cpu", and the device,
    of which it has torch's object. A model that is at home holds no numbers. Notes what was on the device when something ran.
    """

    def __init__(self, pipeline):
        self.away, self.beside, self.moves = {}, {}, Counter()
        self.models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        for name, model in self.models.items():
            model.to = functools.partial(self.move, name)
            for module in model.modules():
                module.register_forward_hook(functools.partial(self.note, name))

    def move(self, name, place):
        tensors = [t for t in self.models[name].state_dict(keep_vars=True).values() if t.is_floating_point()]
        with torch.no_grad():
            if isinstance(place, str) and name not in self.away:
                self.moves[name] += 1
                self.away[name] = [(tensor, tensor.clone()) for tensor in tensors]
                for tensor in tensors:
                    tensor.fill_(math.nan)
            elif not isinstance(place, str) and name in self.away:
                self.moves[name] += 1
                for tensor, kept in self.away.pop(name):
                    tensor.copy_(kept)

    def note(self, name, *_):
        self.beside.setdefault(name, set()).update(self.models.keys() - self.away.keys())


ENCODERS = {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("settings", [{}, {"full_finetuning": True, "beta": 0.1, "peft_config": None}])
def test_encoders_and_denoisers_are_not_there_together(make_trainer, tmp_path, monkeypatch, settings):
    """With `precompute_prompts`. Nothing that is trained changes; adapters move with their model, and references too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"guidance_scale": 2.0, "ema_decay": 0.5, "max_steps": 2, "eval_dataset": prompts(2)} | settings
    trained, rewards = [], []
    for name in ("usual", "precomputed", "from disk"):
        precompute, pipeline = name != "usual", tiny_sd3()
        places = Places(pipeline)
        settings["output_dir"] = str(tmp_path / name)
        trainer = make_trainer(model=pipeline, precompute_prompts=precompute, **settings)
        assert places.away.keys() == (ENCODERS if precompute else set())
        trainer.train()
        trained.append([p.detach().clone() for p in trainer._trainable])
        rewards.append(logged(trainer, "eval_reward"))
        # Loaded at home, or brought there; back; and the same again for the prompts of the run, once for both datasets.
        assert places.moves["transformer"] == {"usual": 0, "precomputed": 4, "from disk": 2}[name]
        for reference in trainer.policy._references.values():  # copied with where its model was
            assert reference.to.func.__self__.moves["transformer"] == places.moves["transformer"]
        everything = {*places.models}
        assert places.beside["transformer"] == (everything - ENCODERS if precompute else everything)
        assert places.beside["text_encoder"] == (everything - {"transformer"} if precompute else everything)
    assert rewards[0] == rewards[1] == rewards[2]
    for others in trained[1:]:
        assert all(torch.equal(one, two) for one, two in zip(trained[0], others, strict=True))


def test_they_take_turns_until_prompts_are_precomputed(make_trainer, tmp_path, monkeypatch):
    """Whatever is asked of a trainer before it trains: an evaluation, or the doctor's checks, which call the whole pipeline."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rewards = []
    for precompute in (False, True):
        pipeline = tiny_sd3()
        places = Places(pipeline)
        settings = {"eval_dataset": prompts(2), "generation_kwargs": {"skip_layer_guidance_scale": 2.8}}
        trainer = make_trainer(model=pipeline, precompute_prompts=precompute, **settings)
        rewards.append(trainer.evaluate()["eval_reward"])
        examine_policy(trainer.policy, Diagnosis("tiny"))
        policy = trainer.policy
        policy.encode_anew("a green square")
        velocity = policy(torch.zeros(1, *policy.latent_shape), 0.5, policy.conditioning(["a green square"]))
        assert velocity.isfinite().all()
        if precompute:
            with (
                policy.whole()
            ):  # before anything runs: many pipelines send what they are given to where an encoder is
                assert places.away.keys() == {"transformer"}
            assert places.away.keys() == ENCODERS
            assert not ENCODERS & places.beside["transformer"] and "transformer" not in places.beside["text_encoder"]
            trainer.train()
            moves = places.moves["transformer"]
            assert policy.encode("a new prompt").num_bytes and places.moves["transformer"] == moves
            assert places.beside["text_encoder"] == {*places.models}
    assert rewards[0] == rewards[1]


def test_denoisers_come_for_the_first_velocity():
    """Of a policy that was told where to compute, and not to offload its encoders."""
    pipeline = tiny_sd3()
    places = Places(pipeline)
    pipeline.transformer.to("cpu")
    policy = FlowPolicy(pipeline, max_sequence_length=2, device="cpu")
    latents, conditioning = torch.zeros(1, *policy.latent_shape), policy.conditioning(["a red circle"])
    assert places.away.keys() == {"transformer"}
    assert policy(latents, 0.5, conditioning).isfinite().all() and not places.away


def test_they_take_turns_in_dry_runs_and_calibrations(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "SECONDS_OF_A_PART", 0.0)
    seen = []
    for calibrates in (False, True):
        pipeline = tiny_sd3()
        seen.append(places := Places(pipeline))
        if calibrates:
            args = DenseGRPOConfig(output_dir=str(tmp_path), precompute_prompts=True, **SETTINGS)
            calibrate_noise(pipeline, brightness, args, prompts(6), num_samples=2, num_iterations=1, rule="paper")
        else:
            trainer = make_trainer(model=pipeline, precompute_prompts=True)
            update_facts(trainer, 1)
            estimating.estimate(trainer, rollouts(trainer), 1)
        assert places.away.keys() == ENCODERS
        assert not ENCODERS & places.beside["transformer"] and "transformer" not in places.beside["text_encoder"]
    assert min(places.moves["transformer"] for places in seen) > 4  # for more than the empty prompt


def test_denoisers_leave_before_encoders_come(make_trainer, monkeypatch):
    """Those of bitsandbytes are loaded on the device."""
    pipeline, order = tiny_sd3(), []
    for name, model in Places(pipeline).models.items():
        monkeypatch.setattr(model, "to", lambda place, name=name, move=model.to: (order.append(name), move(place)))
    make_trainer(model=pipeline, precompute_prompts=True)
    assert order[0] == "transformer" and ENCODERS < {*order[1:]}


def test_what_cannot_be_moved_stays():
    pipeline = tiny_sd3()
    places = Places(pipeline)
    pipeline.transformer.is_loaded_in_8bit = True
    policy = FlowPolicy(pipeline, max_sequence_length=2, device="cpu")
    policy.offload_encoders(alone=True)
    policy.conditioning(["a red circle"])
    assert places.moves["transformer"] == 0 and places.moves["text_encoder"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_denoisers_leave_a_gpu(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pipeline = tiny_sd3()
    noted = []
    for model in (pipeline.text_encoder, pipeline.transformer):
        model.register_forward_pre_hook(
            lambda *_: noted.append([pipeline.text_encoder.device.type, pipeline.transformer.device.type])
        )
    trainer = make_trainer(model=pipeline, precompute_prompts=True, use_cpu=False)
    trainer.train()
    assert noted[0] == ["cuda", "cpu"] and noted[-1] == ["cpu", "cuda"]
    assert all(places in (["cuda", "cpu"], ["cpu", "cuda"]) for places in noted)
    assert {p.device.type for p in trainer._trainable} == {"cuda"}


def test_encoders_leave_once(make_trainer):
    with pytest.raises(ValueError, match="offload_encoders=True has no effect with precompute_prompts=True"):
        make_trainer(offload_encoders=True, precompute_prompts=True)


# ---- Slices and tiles of pictures ----


def test_slices_are_pictures_decoded_one_by_one(make_trainer):
    trainer, sliced = make_trainer(), make_trainer(vae_slicing=True)
    latents = torch.randn(3, *trainer.policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sizes = []
    sliced.policy.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert torch.equal(sliced.policy.decode(latents), trainer.policy.decode(latents, batch_size=1))
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("local", [True, False])
def test_tiles_are_where_they_belong(make_trainer, local):
    """With a decoder that looks at one latent at a time they make the same picture, with a real one another."""
    policy = make_trainer(model=tiny_sd3()).policy
    vae, latents = policy.pipeline.vae, torch.randn(2, *policy.latent_shape)
    if local:
        vae.decoder = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(4, 3, 1)).requires_grad_(
            False
        )
    whole = policy.decode(latents)
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 4, 2, 0.5
    policy.divide_decoding(slicing=False, tiling=True)
    difference = (policy.decode(latents) - whole).abs().max()
    assert difference < 1e-6 if local else difference > 1e-3
    assert "tiled_decode" not in vars(vae)


def test_one_tile_is_no_tiling(make_trainer):
    with pytest.raises(
        ValueError, match="vae_tiling=True changes nothing at 8 x 8 pixels, .*one tile of AutoencoderKL"
    ):
        make_trainer(vae_tiling=True)


def test_a_vae_that_knows_no_slices(make_trainer, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "enable_slicing", AutoencoderMixin.enable_slicing)
    pipeline = tiny_sd3()
    del pipeline.vae.use_slicing
    with pytest.raises(ValueError, match=r"vae_slicing=True: AutoencoderKL, .*has no enable_slicing\(\)"):
        make_trainer(model=pipeline, vae_slicing=True)


def test_videos_have_no_slices():
    arguments = call_arguments("WanPipeline")
    guidance_scale = arguments.pop("guidance_scale")
    policy = FlowPolicy(tiny_pipeline("WanPipeline"), guidance_scale=guidance_scale, generation_kwargs=arguments)
    with pytest.raises(ValueError, match="vae_slicing=True has no effect on videos"):
        policy.divide_decoding(slicing=True, tiling=False)


# ---- Optimizers ----

OPTIMIZERS = {
    "adafactor": None,
    "adamw_torch_8bit": "torchao",
    "adamw_bnb_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
}
# torchao compiles its step.
SLOW = {"adamw_torch_8bit", "lion_8bit"}


@pytest.mark.parametrize(
    "optim", [pytest.param(optim, marks=[pytest.mark.slow] * (optim in SLOW)) for optim in OPTIMIZERS]
)
def test_optimizers_train_and_resume(make_trainer, tmp_path, optim):
    """With weights of 4096 and more elements: bitsandbytes and torchao keep the state of smaller ones in float32."""
    if OPTIMIZERS[optim] is not None:
        pytest.importorskip(OPTIMIZERS[optim])
    settings = {"optim": optim, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    settings["peft_config"] = LoraConfig(r=512, target_modules=["attn.to_q", "attn.to_out.0"])
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    randomize(whole)
    before = [p.detach().clone() for p in whole._trainable]
    whole.train()
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(whole._trainable, before, strict=True))
    if optim != "adafactor":
        assert torch.uint8 in state_dtypes(whole)
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert state_dtypes(resumed) == state_dtypes(whole)
    assert all(torch.equal(one, two) for one, two in zip(whole._trainable, resumed._trainable, strict=True))


def state_dtypes(trainer):
    values = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    # torchao's tensors say float32 of themselves, and hold 8-bit codes.
    return {getattr(value, "codes", value).dtype for value in values if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("optim", "package"), [("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_the_package_of_an_optimizer_is_missed_before_work(make_trainer, monkeypatch, optim, package):
    monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda: False)
    with pytest.raises(ValueError, match=rf"optim='{optim}': .*`{package}"):
        make_trainer(model="no/such-pipeline", optim=optim)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass(make_trainer, optim):
    with pytest.raises(ValueError, match=f"optim='{optim}' moves weights within a backward pass"):
        make_trainer(model="no/such-pipeline", optim=optim, optim_target_modules="all-linear")


# ---- Memory, as torch's allocator counts it ----


def test_what_takes_less_memory():
    """Of a tiny FLUX.1, at 32 x 32 pixels: training to 64 %, decoding of four pictures to 73 %, in tiles to 29 %."""
    adapter = LoraConfig(r=2, target_modules=None)
    policy = FlowPolicy(flux(torch.float32), adapter, guidance_scale=3.5, height=32, width=32)
    latents, conditioning = torch.randn(4, *policy.latent_shape), policy.conditioning(["red"] * 4)

    def train():
        policy(latents, 0.5, conditioning).square().mean().backward()

    def decode():
        policy.decode(latents, conditioning=conditioning)

    train()  # what is allocated once
    usual = measured_peak(train)
    policy.gradient_checkpointing_enable()
    assert measured_peak(train) < 0.75 * usual

    decode()
    whole, vae = measured_peak(decode), policy.pipeline.vae
    policy.divide_decoding(slicing=True, tiling=False)
    assert measured_peak(decode) < 0.85 * whole
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
    policy.divide_decoding(slicing=False, tiling=True)
    assert measured_peak(decode) < 0.4 * whole
