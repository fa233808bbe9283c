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

"""Conditions on disk are those that the pipeline makes, are made once, and let its encoders leave the device."""

import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter, namedtuple
from pathlib import Path

import datasets
import diffusers
import pyarrow as pa
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from pipelines import tiny_sd3
from tiny import TINY_PIPELINES, call_arguments, tiny_pipeline

import trl_flow.policy.embeddings
from trl_flow import FlowPolicy
from trl_flow.policy import FAMILIES, encode_prompts
from trl_flow.policy.conditioning import make_condition


PROMPTS = ["a red circle", "two blue square green"]


def family_of(name):
    return next((family for family in FAMILIES if name.partition("/")[0] in family.pipelines), None)


CASES = [name for name in TINY_PIPELINES if family_of(name)]
SOME_CASES = ("StableDiffusionXLPipeline", "FluxKontextPipeline", "WanPipeline/2.2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "trl-flow"


def make_policy(name="StableDiffusion3Pipeline", pipeline=None, **settings):
    """A policy on a tiny pipeline, and the picture that it starts from."""
    arguments = call_arguments(name) | settings.pop("generation_kwargs", {})
    image, guidance = arguments.pop("image", None), family_of(name) and arguments.pop(family_of(name).guidance, None)
    named = ("height", "width", "num_frames", "max_sequence_length", "negative_prompt")
    given = {argument: arguments.pop(argument) for argument in named if argument in arguments}
    policy = FlowPolicy(
        tiny_pipeline(name) if pipeline is None else pipeline,
        LoraConfig(r=2, target_modules=None),
        generation_kwargs=arguments,
        **{"guidance_scale": guidance} | given | settings,
    )
    return policy, image


def dataset_of(prompts, images=None):
    features = {"prompt": Value("string"), "tag": Value("string")}
    columns = {"prompt": prompts, "tag": ["a tag"] * len(prompts)}
    if images is not None:
        columns["image"], features["image"] = images, datasets.Image()
    return Dataset.from_dict(columns, features=Features(features))


def encoder_runs(policy):
    """Counts the runs of text encoders from here on."""
    runs = Counter()
    for name in ("text_encoder", "text_encoder_2"):
        getattr(policy.pipeline, name).register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    return runs


def answering(policy, outputs):
    """Makes a policy's pipeline return `outputs(prompt)` for a prompt."""

    def encode_anew(prompt, image=None):
        answers = {("encode_prompt", 0): outputs(prompt), ("prepare_latents", 0): None}
        return make_condition(prompt, image, answers, (4,), torch.bfloat16, dict.fromkeys(answers), False, 4.5)

    policy.encode_anew = encode_anew
    return policy


def assert_same(one, other):
    """Of the same types, and bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        assert torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    else:
        assert one == other


def read(policy, prompts, images=None):
    """Conditions of prompts that are read, whatever is in memory."""
    policy._cache.clear()
    return policy.conditioning(prompts, images)


# ---- What is read is what was made ----


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_conditions_of_every_family_with_its_encoders_gone(name):
    """The encoders are on no device at all: whatever touched one of them, or computed beside one, would fail."""
    policy, image = make_policy(name)
    images = image and [image.convert("RGB"), image.convert("RGB").transpose(0)]
    fresh = policy.conditioning(PROMPTS, images)
    latents = torch.randn(2, *policy.latent_shape)
    grid = policy.sigmas(4)
    velocity, pictures = policy(latents, grid[1].item(), fresh), policy.decode(latents, conditioning=fresh)

    stored = encode_prompts(policy, dataset_of(PROMPTS, images))
    policy.attach(stored)
    policy.offload_encoders("meta")
    encoders = [name for name in policy.pipeline.components if "encoder" in name or name == "siglip"]
    moved = [getattr(policy.pipeline, name) for name in encoders]
    assert all(parameter.is_meta for encoder in moved if encoder is not None for parameter in encoder.parameters())
    assert not any(parameter.is_meta for parameter in policy.pipeline.vae.parameters())
    assert policy._query._execution_device == policy._idle.device == policy.device

    conditions = read(policy, PROMPTS, images)
    for one, other in zip(fresh, conditions, strict=True):
        assert one is not other and other.image is (images and images[fresh.index(one)])
        assert_same(one.answers, other.answers)
        assert (one.prompt, one.layout, one.signature) == (other.prompt, other.layout, other.signature)
        assert (one.latent_shape, one.latent_dtype) == (other.latent_shape, other.latent_dtype)
        assert (one.batched, one.guidance_scale) == (other.batched, other.guidance_scale)
    assert torch.equal(policy.sigmas(4), grid)
    assert torch.equal(policy(latents, grid[1].item(), conditions), velocity)
    assert torch.equal(policy.decode(latents, conditioning=conditions), pictures)


Named = namedtuple("Named", "x")


def test_outputs_of_every_kind(cache):
    def outputs(prompt):
        tensor = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-40, len(prompt)])
        return (
            [tensor, tensor.bfloat16(), tensor.double(), tensor[:0], torch.tensor(len(prompt))],
            {"mask": tensor.bool(), "size": (3, 4.5, True, None, "text", math.inf)},
            (torch.arange(6).view(2, 3).T, tensor[None].expand(2, -1), tensor[1:], tensor[1:].clone()),
            [],
            (),
            {},
        )

    policy = answering(make_policy()[0], outputs)
    policy.attach(encode_prompts(policy, dataset_of(["a", "bc", "def"])))
    del policy.encode_anew
    for condition in read(policy, ["a", "bc", "def"]):
        assert_same(condition.answers["encode_prompt", 0], outputs(condition.prompt))
        assert condition.latent_dtype is torch.bfloat16 and condition.latent_shape == (4,)


@pytest.mark.parametrize("output", [Image.new("RGB", (1, 1)), Named(1), {1: 2}, torch.float32, {"a", "b"}])
def test_outputs_that_cannot_be_stored(output, cache):
    policy = answering(make_policy()[0], lambda prompt: [output])
    with pytest.raises(
        ValueError, match=f"encode_prompt of StableDiffusion3Pipeline returns a {type(output).__name__},"
    ):
        encode_prompts(policy, dataset_of(["a"]))
    assert not list(cache.glob("*.arrow"))


def test_what_all_prompts_share_is_stored_once():
    """The embeddings of the negative prompt, which are half of all."""
    policy, _ = make_policy(guidance_scale=4.5)
    first, second = encode_prompts(policy, dataset_of(PROMPTS))
    assert "common" not in first["structure"] and "common" in second["structure"]
    assert len(second["tensors"]) < 0.55 * len(first["tensors"])
    (_, _, answer), _ = json.loads(second["structure"])["answers"]
    assert [next(iter(part)) for part in answer["tuple"]] == ["own", "common", "own", "common"]


# ---- Once ----


SCRIPT = """
import sys
sys.path[:0] = {paths}
import test_embeddings as test
from trl_flow.policy import encode_prompts
policy, _ = test.make_policy(pipeline=test.tiny_sd3())
runs = test.encoder_runs(policy)
encode_prompts(policy, test.dataset_of(["green", "two", "red"]), chunk_size=2)
print(policy.fingerprint(), dict(runs))
"""


@pytest.mark.slow
def test_another_process_finds_what_one_has_made(cache):
    tests = Path(__file__).parents[1]
    script = SCRIPT.format(paths=[str(tests), str(tests / "policy")])
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    # For each prompt and for the negative one, and for one of them twice, which tells where rows are.
    assert done.returncode == 0, done.stderr
    fingerprint, runs = done.stdout.strip().split(" ", 1)
    policy, _ = make_policy(pipeline=tiny_sd3())
    assert fingerprint == policy.fingerprint()
    assert json.loads(runs.replace("'", '"')) == {"text_encoder": 6, "text_encoder_2": 6}
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 2

    runs = encoder_runs(policy)
    # Other rows between them, another column, no column.
    policy.attach(encode_prompts(policy, dataset_of(["green", "two", "green", "red"]), chunk_size=2))
    read(policy, ["red", "green", "two"])
    assert not runs and {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    read(policy, ["blue"])
    assert runs == {"text_encoder": 2, "text_encoder_2": 2}


def test_each_prompt_is_encoded_once():
    policy, _ = make_policy()
    runs = encoder_runs(policy)
    stored = encode_prompts(policy, dataset_of(["red", "green", "red", "red", "two"]))
    assert len(stored) == 3 and runs["text_encoder"] == 6
    longer = encode_prompts(policy, dataset_of(["red", "green", "two", "blue"]), chunk_size=3)
    assert len(longer) == 4 and runs["text_encoder"] == 8  # the first three as before


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SOME_CASES)) for name in CASES]
)
@torch.no_grad()
def test_conditions_of_every_family_with_its_denoisers_gone(name):
    """Neither encoding nor decoding computes with one, or beside one: from the first to the last they are on no device."""
    policy, image = make_policy(name)
    images = image and [image.convert("RGB")] * 2
    expected, latents = policy.conditioning(PROMPTS, images), torch.randn(2, *policy.latent_shape)
    pipeline = tiny_pipeline(name)
    for component in family_of(name).components:
        if getattr(pipeline, component, None) is not None:
            getattr(pipeline, component).to("meta")
    other, _ = make_policy(name, pipeline, device="cpu")
    assert all(parameter.is_meta for parameter in other.parameters()) and other.device.type == "cpu"
    conditions = other.conditioning(PROMPTS, images)
    for one, two in zip(expected, conditions, strict=True):
        assert_same(one.answers, two.answers)
    assert torch.equal(policy.sigmas(4), other.sigmas(4))
    decoded = [each.decode(latents, conditioning=conditions) for each in (policy, other)]
    assert torch.equal(*decoded)
    for encoder in other.encoders.models.values():
        encoder.to("meta")
    assert {pipeline._execution_device for pipeline in (other._encoder, other._idle, other._query)} == {other.device}


def test_pictures_are_told_apart():
    policy, image = make_policy("FluxKontextPipeline")
    image = image.convert("RGB")
    other = image.copy()
    other.putpixel((0, 0), (1, 2, 3))
    stored = encode_prompts(policy, dataset_of(["red", "red", "red", "two"], [image, other, image.copy(), image]))
    assert len(stored) == 3
    policy.attach(stored)
    policy.offload_encoders("meta")
    first, second = read(policy, ["red", "red"], [image, other])
    latents = [condition.answers["prepare_latents", 0][0] for condition in (first, second)]
    assert not torch.equal(*latents)


def test_pictures_in_files(tmp_path):
    policy, image = make_policy("FluxKontextPipeline")
    path = tmp_path / "picture.png"
    image.convert("RGB").save(path)
    policy.attach(encode_prompts(policy, dataset_of(["red"], [str(path)])))
    policy.offload_encoders("meta")
    assert read(policy, ["red"], [image.convert("RGB")])
    # Another picture by the same name is found out.
    image.convert("RGB").transpose(0).save(path)
    with pytest.raises(NotImplementedError, match="meta"):
        encode_prompts(policy, dataset_of(["red"], [str(path)]))


def test_processes_share_the_work(cache, monkeypatch):
    policy, _ = make_policy()
    written = []
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: written.append(len(list(cache.iterdir()))))
    dataset = dataset_of(["red", "green", "two", "blue", "circle"])
    first = encode_prompts(policy, dataset, 0, 2, chunk_size=1)
    assert written == [3] and len(first) == 5
    shutil.rmtree(cache)
    second = encode_prompts(policy, dataset, 1, 2, chunk_size=1)
    assert written == [3, 2] and second["key"][:] == first["key"][:]


# ---- What conditions depend on ----


@functools.cache
def usual_fingerprint():
    return make_policy()[0].fingerprint()


def changed(**components):
    """A pipeline with other components, or with others of their weights."""
    pipeline = tiny_pipeline("StableDiffusion3Pipeline")
    pipeline.register_modules(**components)
    return pipeline


def with_one_weight_changed(component):
    pipeline = changed()
    weights = list(getattr(pipeline, component).parameters())[1]
    weights.data.view(-1)[3] += 1e-6
    return pipeline


def with_attribute(name, value):
    pipeline = changed()
    assert getattr(pipeline, name) != value
    setattr(pipeline, name, value)
    return pipeline


def with_another_image_processor():
    pipeline = changed()
    pipeline.image_processor.register_to_config(do_normalize=False)
    return pipeline


def with_another_token():
    pipeline = changed()
    pipeline.tokenizer.add_tokens(["purple"])
    return pipeline


CHANGES = {
    "a weight of a text encoder": lambda: {"pipeline": with_one_weight_changed("text_encoder_2")},
    "a weight of the vae": lambda: {"pipeline": with_one_weight_changed("vae")},
    "precision": lambda: {"pipeline": changed().to(torch.bfloat16)},
    "a tokenizer": lambda: {"pipeline": with_another_token()},
    "a scheduler": lambda: {"pipeline": changed(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))},
    "the class": lambda: {"pipeline": tiny_pipeline("StableDiffusion3PAGPipeline")},
    "length of texts": lambda: {"pipeline": with_attribute("tokenizer_max_length", 7)},
    "usual size": lambda: {"pipeline": with_attribute("default_sample_size", 64)},
    "pictures' preprocessing": lambda: {"pipeline": with_another_image_processor()},
    "negative prompt": lambda: {"negative_prompt": "blue"},
    "guidance": lambda: {"guidance_scale": 2.5},
    "size": lambda: {"height": 16},
    "tokens": lambda: {"max_sequence_length": 3},
    "an argument": lambda: {"generation_kwargs": {"clip_skip": 1}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprints_change_with_model_and_settings(change):
    assert make_policy(**CHANGES[change]())[0].fingerprint() != usual_fingerprint()


def test_pictures_encoded_in_tiles_are_others():
    """Where prompts start from pictures; without one, nothing is encoded by the VAE."""
    for name, differ in (("StableDiffusion3Pipeline", False), ("FluxKontextPipeline", True)):
        arguments = call_arguments(name)
        arguments.pop("image", None)
        guidance_scale = arguments.pop("guidance_scale")
        policy = FlowPolicy(tiny_pipeline(name), guidance_scale=guidance_scale, generation_kwargs=arguments)
        before = policy.fingerprint()
        policy.pipeline.vae.enable_tiling()
        assert (policy.fingerprint() != before) is differ


@pytest.mark.parametrize("library", ["diffusers", "transformers", "torch", "trl_flow.policy.embeddings"])
def test_fingerprints_change_with_the_libraries(library, monkeypatch):
    expected = usual_fingerprint()
    monkeypatch.setattr(sys.modules[library], "__version__", "0.1")
    assert make_policy()[0].fingerprint() != expected


@pytest.mark.parametrize("library", ["ftfy", "pillow", "tokenizers"])
def test_fingerprints_change_with_what_the_libraries_use(library, monkeypatch):
    expected, real = usual_fingerprint(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == library else real(name))
    assert make_policy()[0].fingerprint() != expected


def test_fingerprints_change_with_the_format(monkeypatch):
    expected = usual_fingerprint()
    monkeypatch.setattr(trl_flow.policy.embeddings, "FORMAT", 0)
    assert make_policy()[0].fingerprint() != expected


OWN_PIPELINE = """
from diffusers import StableDiffusion3Pipeline as Stock
class StableDiffusion3Pipeline(Stock):
    def encode_prompt(self, *args, **kwargs):
        return super().encode_prompt(*args, **kwargs){more}
"""


def test_fingerprints_change_with_the_pipeline_s_code(tmp_path, monkeypatch):
    """A class of the same name, and its next version."""
    monkeypatch.syspath_prepend(tmp_path)
    found = {usual_fingerprint()}
    for more in ("", "  # or not"):
        (tmp_path / "own_pipeline.py").write_text(OWN_PIPELINE.format(more=more))
        sys.modules.pop("own_pipeline", None)
        importlib.invalidate_caches()
        pipeline = changed()
        pipeline.__class__ = importlib.import_module("own_pipeline").StableDiffusion3Pipeline
        found.add(make_policy(pipeline=pipeline)[0].fingerprint())
    del sys.modules["own_pipeline"]
    assert len(found) == 3


def swap(rows):
    rows[[3, 7]] = rows[[7, 3]].clone()


def negate(rows):
    """Two rows, whose bits have the same sum as before modulo 2^64."""
    rows[[3, 7]] *= -1


def shift(rows):
    """Second differences of the bits: their sum is zero, and so it is if each counts by its place."""
    rows.view(torch.int32)[0, :4] += torch.tensor([1, -1, -1, 1], dtype=torch.int32)


@pytest.mark.parametrize("change", [swap, negate, shift])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hashed_words", [64, 2**20])
def test_fingerprints_change_with_changes_that_cancel(change, dtype, hashed_words, monkeypatch):
    """Within what is hashed at once, and across."""
    embeddings = trl_flow.policy.embeddings
    monkeypatch.setattr(embeddings, "HASHED_WORDS", hashed_words)
    embeddings._factors.cache_clear()
    rows = torch.randn(16, 34, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = list(embeddings._contents(rows))
    assert list(embeddings._contents(rows.clone())) == before
    change(rows)
    assert list(embeddings._contents(rows)) != before
    embeddings._factors.cache_clear()


def test_contents_of_tensors_of_all_kinds():
    """Those that lie anywhere in a file, and those that fill no whole word."""
    contents = trl_flow.policy.embeddings._contents
    file = torch.arange(60, dtype=torch.uint8)
    for start in range(4):
        for stop in range(start, 12):
            found = list(contents(file[start:stop]))
            assert found == list(contents(file[start:stop].clone()))
            assert found != list(contents(file[start + 1 : stop + 1])) or start == stop
    assert list(contents(torch.tensor(1.0))) != list(contents(torch.tensor(-1.0)))
    assert list(contents(torch.ones(2, 3).T)) == list(contents(torch.ones(3, 2))) != list(contents(torch.ones(2, 3)))
    assert list(contents(torch.ones(3, dtype=torch.bool))) != list(contents(torch.zeros(3, dtype=torch.bool)))


def test_fingerprints_do_not_change_without_a_reason(tmp_path):
    """Another place, a trained adapter, prompts that were encoded before, another guidance scale in between."""
    policy, _ = make_policy()
    for parameter in policy.parameters():
        parameter.data += 1 if parameter.requires_grad else 0
    policy.conditioning(PROMPTS)
    with policy.guided(2.0):
        assert policy.fingerprint() != usual_fingerprint()
        policy.conditioning(["green"])
    assert policy.fingerprint() == usual_fingerprint()
    for folder in ("one", "other"):
        tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / folder)
    loaded = [diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder) for folder in ("one", "other")]
    assert len({make_policy("FluxPipeline", pipeline)[0].fingerprint() for pipeline in loaded}) == 1


def test_conditions_of_another_guidance_scale_are_others():
    """Without guidance there is nothing to be led away from."""
    policy, _ = make_policy(guidance_scale=1.0)
    dataset = dataset_of(PROMPTS)
    policy.attach(encode_prompts(policy, dataset))
    runs = encoder_runs(policy)
    with policy.guided(4.5):
        policy.attach(encode_prompts(policy, dataset))
        assert runs.pop("text_encoder") == 6
        guided = read(policy, PROMPTS)
    plain = read(policy, PROMPTS)
    runs.clear()
    assert [condition.guidance_scale for condition in plain + guided] == [1.0, 1.0, 4.5, 4.5]
    assert plain[0].num_bytes < guided[0].num_bytes and not runs


def test_conditions_of_another_model_are_not_taken():
    policy, _ = make_policy()
    stored = encode_prompts(policy, dataset_of(PROMPTS))
    other, _ = make_policy(pipeline=with_one_weight_changed("text_encoder"))
    other.attach(stored)
    runs = encoder_runs(other)
    read(other, PROMPTS)
    assert runs["text_encoder"] == 4
    with pytest.raises(ValueError, match=r"columns \['prompt', 'tag'\] holds no conditions"):
        policy.attach(dataset_of(PROMPTS))


# ---- Room ----


def test_memory_does_not_grow_with_the_prompts(cache):
    """96 prompts of 512 KiB each, of which no more than a few are in memory at any time."""
    size = 2**19
    policy = answering(make_policy()[0], lambda prompt: torch.full((size // 4,), float(prompt)))
    prompts = [str(number) for number in range(96)]
    policy.fingerprint()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    stored = encode_prompts(policy, dataset_of(prompts), chunk_size=32)
    policy.attach(stored)
    policy.cache_size = 4
    for prompt in prompts[::-1]:
        assert policy.encode(prompt).answers["encode_prompt", 0][0] == float(prompt)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in cache.iterdir()) > 96 * size
    assert peak < 32 * size and pa.total_allocated_bytes() - arrow < 2 * size


def test_too_little_room_is_found_out_at_the_start(monkeypatch):
    policy = answering(make_policy()[0], lambda prompt: torch.full((2**20,), float(prompt)))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    encode_prompts(policy, dataset_of([str(number) for number in range(3)]))
    with pytest.raises(ValueError, match=r"The embeddings of 499 prompts take 1\.9 GiB, and .* has 1\.0 GiB left"):
        encode_prompts(policy, dataset_of([str(number) for number in range(500)]))


def test_streams_have_no_prompts_in_advance():
    with pytest.raises(ValueError, match="A IterableDataset has no prompts that could be encoded in advance"):
        encode_prompts(make_policy()[0], IterableDataset.from_generator(lambda: iter([{"prompt": "red"}])))


# ---- Encoders away ----


def moves(policy, monkeypatch):
    """Where the text encoder is moved from here on."""
    noted, encoder = [], policy.pipeline.text_encoder
    move = encoder.to
    monkeypatch.setattr(encoder, "to", lambda device: (noted.append(str(device)), move(device))[1])
    return noted


def test_encoders_come_back_for_new_prompts_and_leave_again(monkeypatch):
    policy, _ = make_policy(cache_size=1)
    expected = policy.encode("two").answers
    policy.attach(encode_prompts(policy, dataset_of(PROMPTS)))
    noted = moves(policy, monkeypatch)
    policy.offload_encoders("cpu:0")
    assert noted == ["cpu:0"]
    read(policy, PROMPTS)
    policy.blank()
    policy.sigmas(3)
    assert len(noted) == 1
    assert_same(read(policy, ["a red circle", "two", "green"])[1].answers, expected)
    assert noted == ["cpu:0", "cpu", "cpu:0"]
    encode_prompts(policy, dataset_of(["circle", "square"]))
    assert noted == ["cpu:0", "cpu", "cpu:0", "cpu", "cpu:0"]
    with pytest.raises(ValueError, match="`prompt` has to be"):
        policy.encode(7)
    assert noted[-1] == "cpu:0"


@torch.no_grad()
def test_encoders_that_are_always_needed_stay():
    """This pipeline encodes its picture in a method that is not recognised as an encoding one."""
    policy, image = make_policy("MotifVideoImage2VideoPipeline")
    condition = policy.encode("a red circle", image)
    latents = torch.randn(1, *policy.latent_shape)
    expected = policy(latents, 0.5, [condition])
    policy.offload_encoders("meta")
    assert not policy.encoders.models
    assert torch.equal(policy(latents, 0.5, [condition]), expected)
