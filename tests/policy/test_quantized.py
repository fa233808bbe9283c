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

"""A frozen base in fewer bits."""

import importlib.util

import pytest
import torch
from tiny import call_arguments, tiny_pipeline

from trl_flow.policy import load_pipeline
from trl_flow.policy.doctor import examine
from trl_flow.scripts import training
from trl_flow.scripts.arguments import FlowScriptArguments
from trl_flow.scripts.training import model_init_kwargs


class NoConfig:
    model_init_kwargs = None
    trust_remote_code = False


@pytest.mark.parametrize(("quantization", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(monkeypatch, quantization, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"quantization='{quantization}' needs {package}: `pip install {package}`"):
        model_init_kwargs(FlowScriptArguments(quantization=quantization), NoConfig)


def test_nf4_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(training, "_has_accelerator", lambda: False)
    with pytest.raises(ValueError, match="quantization='nf4' needs a GPU"):
        model_init_kwargs(FlowScriptArguments(quantization="nf4"), NoConfig)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs `pip install trl-flow[quantization]`")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights(tmp_path, dtype):
    """The stock pipeline computes with the same quantised weights, so the velocity is still its own, to the bit."""
    tiny_pipeline("FluxPipeline").save_pretrained(tmp_path)
    settings = FlowScriptArguments(model_name_or_path=str(tmp_path), dtype=dtype, quantization="int8")
    pipeline = load_pipeline(tmp_path, **model_init_kwargs(settings, NoConfig))
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight.data) is not torch.Tensor  # torchao's own kind
    arguments = call_arguments("FluxPipeline")
    given = {name: arguments.pop(name) for name in ("height", "width", "guidance_scale")}
    diagnosis = examine(pipeline, **given, generation_kwargs=arguments)
    assert diagnosis.trains, diagnosis.problem
    assert (diagnosis.replay_error, diagnosis.ratio_error, diagnosis.gradient_coverage) == (0.0, 0.0, 1.0)
