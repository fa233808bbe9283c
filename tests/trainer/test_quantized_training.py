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

"""Adapters on a quantised base (QLoRA)."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from tiny import call_arguments, tiny_pipeline
from trainer.observing import logged
from trainer.test_every_family import settings_of

from trl_flow import FlowGRPOConfig
from trl_flow.policy import FlowPolicy, load_pipeline
from trl_flow.scripts import training
from trl_flow.scripts.arguments import FlowScriptArguments
from trl_flow.scripts.training import model_init_kwargs


@pytest.fixture
def bitsandbytes_on_cpu(monkeypatch):
    """
    bitsandbytes computes on CPUs; diffusers alone wants a GPU. What is lifted is its check. On newer CPUs bitsandbytes
    packs the weights of modules in eval mode for another kernel, through which no gradient passes: as on GPUs, it is off.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *args, **kwargs: None)
        monkeypatch.setattr(kind, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(training, "_has_accelerator", lambda: True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2Pipeline", "WanPipeline", "QwenImagePipeline"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained(make_trainer, bitsandbytes_on_cpu, tmp_path, quantization, name, dtype):
    """Its weights stay as they are; the adapter moves, is saved, goes on from a checkpoint, and fits the whole base."""
    if quantization == "int8":
        pytest.importorskip("torchao")
    model = str(tmp_path / "model")
    tiny_pipeline(name).save_pretrained(model)
    given = FlowScriptArguments(model_name_or_path=model, dtype=dtype, quantization=quantization)
    settings = settings_of(name) | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings.pop("image", None)

    def make(folder):
        pipeline = load_pipeline(model, **model_init_kwargs(given, FlowGRPOConfig(use_cpu=True)))
        return make_trainer(model=pipeline, output_dir=str(tmp_path / folder), **settings)

    whole = make("whole")
    before = frozen_bytes(whole.policy)
    assert before
    whole.train()
    assert (logged(whole, "ratio/min"), logged(whole, "ratio/max")) == ([1.0, 1.0], [1.0, 1.0])
    assert all(0 < norm < float("inf") for norm in logged(whole, "grad_norm"))
    assert {p.dtype for p in whole._trainable} == {torch.float32}
    after = frozen_bytes(whole.policy)
    assert all(torch.equal(after[key], kept) for key, kept in before.items())

    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert all(torch.equal(one, two) for one, two in zip(whole._trainable, resumed._trainable, strict=True))

    stock = DiffusionPipeline.from_pretrained(model)
    stock.load_lora_weights(str(tmp_path / "whole"))
    loaded = {key: p for key, p in stock.transformer.named_parameters() if "lora_" in key}
    trained = {key: p for key, p in whole.policy.denoisers["transformer"].named_parameters() if p.requires_grad}
    trained = {key.removeprefix("base_model.model."): p for key, p in trained.items()}
    assert len(loaded) == len(trained)
    for (key, one), two in zip(sorted(loaded.items()), dict(sorted(trained.items())).values(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_makes_room_for_encoders(
    make_trainer, bitsandbytes_on_cpu, tmp_path, monkeypatch, quantization
):
    """With `precompute_prompts`: and comes back as the same parameters, of which nothing has changed."""
    if quantization == "int8":
        pytest.importorskip("torchao")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = str(tmp_path / "model")
    tiny_pipeline("FluxPipeline").save_pretrained(model)
    given = FlowScriptArguments(model_name_or_path=model, dtype="bfloat16", quantization=quantization)
    trained = []
    for precompute in (False, True):
        pipeline = load_pipeline(model, **model_init_kwargs(given, FlowGRPOConfig(use_cpu=True)))
        noted, move = [], pipeline.transformer.to
        pipeline.transformer.to = lambda place, noted=noted, move=move: (noted.append(str(place)), move(place))
        settings = settings_of("FluxPipeline") | {"max_steps": 2, "output_dir": str(tmp_path / str(precompute))}
        settings.pop("image", None)
        trainer = make_trainer(model=pipeline, precompute_prompts=precompute, **settings)
        parameters, before = list(trainer.policy.parameters()), frozen_bytes(trainer.policy)
        trainer.train()
        assert len(noted) == (4 if precompute else 1)
        assert all(one is two for one, two in zip(parameters, trainer.policy.parameters(), strict=True))
        after = frozen_bytes(trainer.policy)
        assert before and all(torch.equal(after[key], kept) for key, kept in before.items())
        trained.append([p.detach().clone() for p in trainer._trainable])
    assert all(torch.equal(one, two) for one, two in zip(*trained, strict=True))
    if quantization == "int8":  # bitsandbytes has no kernels for `meta`
        trainer.policy.hosts.leave("meta")
        weights = list(trainer.policy.parameters())
        parts = [getattr(weight, name) for weight in weights for name in getattr(weight, "tensor_data_names", ())]
        assert parts and all(tensor.is_meta for tensor in weights + parts)


def test_gradients_pass_quantised_float16(bitsandbytes_on_cpu, tmp_path):
    """Scaled, as they pass others. Before its first adapter FLUX.2 has 4-bit weights alone: its precision is another's word."""
    tiny_pipeline("Flux2Pipeline").save_pretrained(tmp_path)
    given = FlowScriptArguments(model_name_or_path=str(tmp_path), dtype="float16", quantization="nf4")
    pipeline = load_pipeline(tmp_path, **model_init_kwargs(given, FlowGRPOConfig(use_cpu=True)))
    arguments = call_arguments("Flux2Pipeline")
    guidance_scale = arguments.pop("guidance_scale")
    policy = FlowPolicy(pipeline, guidance_scale=guidance_scale, generation_kwargs=arguments)
    assert policy.gradient_scale > 1
    given = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    policy(torch.zeros(1, *policy.latent_shape), 0.5, policy.conditioning(["a red circle"]))
    assert given == [torch.float16]


def frozen_bytes(policy) -> dict[str, torch.Tensor]:
    """What quantised weights hold."""
    weights = {key: p for key, p in policy.named_parameters() if not p.requires_grad}
    weights = {key: getattr(p, "qdata", p.data) for key, p in weights.items()}
    return {key: w.clone() for key, w in weights.items() if w.dtype in (torch.uint8, torch.int8)}
