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

"""The benchmark at real sizes: that it runs, in small, and that what it builds has the sizes of the checkpoints."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def full_size(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("full_size")
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


# Numbers of weights in the published files.
CHECKPOINTS = {
    "sd3.5-medium": {
        # The file has 226,492,416 more: the table of positions, which is no weight.
        "transformer": 2_243_171_520,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "vae": 83_819_683,
    },
    "flux.1-dev": {
        "transformer": 11_901_408_320,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
    "wan2.1-1.3b": {"transformer": 1_418_996_800, "text_encoder": 5_680_910_336, "vae": 126_892_531},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sizes_are_the_checkpoints(name, full_size, monkeypatch):
    # A table of 384 x 384 positions takes long to compute, and is no parameter.
    monkeypatch.setitem(importlib.import_module("architectures").SD3_TRANSFORMER, "pos_embed_max_size", 64)
    options = argparse.Namespace(device="meta", torch_dtype=torch.bfloat16, tiny=False, small_text_encoders=False)
    pipeline = full_size.MODELS[name](full_size.Makers(options))
    assert full_size.parameters(pipeline) == CHECKPOINTS[name]
    assert {p.device.type for p in pipeline.transformer.parameters()} == {"meta"}


def test_small_text_encoders_keep_their_width(full_size):
    options = argparse.Namespace(device="meta", torch_dtype=torch.bfloat16, tiny=False, small_text_encoders=True)
    encoder = full_size.wan(full_size.Makers(options)).text_encoder
    assert encoder.config.d_model == 4096 and len(encoder.encoder.block) == 1


def test_random_weights(full_size):
    """Drawn in the precision that was asked for, shared where the module shares them; buffers are what they are."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(400, 300), nn.LayerNorm(300)
            self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

    module = full_size.random_module(Module, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.first.weight.float().std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert (module.first.bias == 0).all() and (module.norm.weight == 1).all() and (module.norm.bias == 0).all()
    assert torch.equal(module.frequencies, torch.arange(3.0))


@pytest.mark.parametrize(
    ("name", "method", "evaluations", "images"),
    [
        # 3 chains of 4 steps with tails of 4 + 3 + 2 + 1 evaluations and 4 pictures each; 9 steps are trained.
        ("wan2.1-1.3b", "dense-grpo", 3 * 10 + 9, 3 * 4),
        # A trunk of 2 steps, and 3 branches at each. Tails of strides 1, 2 and 3 share what they can: 3 and then 2 evaluations
        # and pictures a branch. Siblings are trained by one evaluation of their parent.
        ("sd3.5-medium", "g2rpo", 2 + 3 * (3 + 2) + 2, 3 * (3 + 2)),
        # 3 chains of 4 steps, of which the first two are the window.
        ("flux.1-dev", "flow-grpo-fast", 3 * 4 + 3 * 2, 3),
    ],
)
def test_tiny_run(name, method, evaluations, images, full_size, tmp_path, capsys):
    output = tmp_path / "full_size.json"
    full_size.main(
        ["--tiny", "--dtype", "float32", "--model", name, "--method", method, "--gradient_checkpointing"]
        + ["--output", str(output)]
    )
    result = json.loads(output.read_text())
    (run,) = result["runs"]
    assert (run["model"], run["method"]) == (name, method)
    assert len(run["updates"]) == 2
    for update in run["updates"]:
        assert update["evaluations"] == evaluations and update["images"] == images and update["rows_trained"] > 0
        assert all(update["seconds"][phase] >= 0 for phase in ("rollout", "decode", "reward", "train"))
    assert result["versions"]["torch"] == torch.__version__ and result["gradient_checkpointing"] is True
    assert run["trained_parameters"] > 0
    per_row, last = run["operations_per_row"], run["updates"][-1]
    # Nearly as much again backwards: the frozen weights have no gradient, the adapter has.
    assert 1.5 < per_row["trained"] / per_row["evaluation"] < 3
    sampled = last["evaluations"] - last["rows_trained"]
    operations = sampled * per_row["evaluation"] + last["rows_trained"] * per_row["trained"]
    busy = last["seconds"]["rollout"] + last["seconds"]["train"]
    assert run["share_of_matmul_rate"] == pytest.approx(operations / busy / result["matmul_rate"])
    assert run["samples_per_second"] == pytest.approx(3 / sum(last["seconds"].values()))
    assert "Qwen-Image" in output.with_suffix(".md").read_text() and output.with_suffix(".png").stat().st_size > 1000
    assert name in capsys.readouterr().out


@pytest.mark.slow
def test_what_does_not_fit_is_recorded(full_size, tmp_path, monkeypatch, capsys):
    def fail(name, method, options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines")

    monkeypatch.setattr(full_size, "train", fail)
    output = tmp_path / "full_size.json"
    full_size.main(["--tiny", "--model", "flux.1-dev", "--method", "all", "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [run["method"] for run in runs] == list(full_size.METHODS)
    assert all(run["error"].endswith("Tried to allocate 20.00 MiB.") for run in runs)
    assert "out of memory" in capsys.readouterr().out


def test_real_sizes_want_a_gpu(full_size, capsys):
    with pytest.raises(SystemExit):
        full_size.main(["--model", "flux.1-dev"])
    assert "--tiny" in capsys.readouterr().err
