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

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from pipelines import tiny_sd3
from safetensors.torch import load_file, save_file

from trl_flow import cli
from trl_flow.hub import save_adapter


def picture(pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a red circle", num_inference_steps=2, height=8, width=8, generator=generator, output_type="np"
    ).images


class TestConvert:
    @pytest.fixture
    def adapter(self, tmp_path, monkeypatch):
        """An adapter of a pipeline on disk, which its configuration names; the picture that it makes."""
        monkeypatch.chdir(tmp_path)
        tiny_sd3().save_pretrained("base")
        pipeline = tiny_sd3()
        model = get_peft_model(pipeline.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        save_adapter(model, type(pipeline), "transformer", "run", "base")
        model.requires_grad_(False)
        return picture(pipeline)

    def test_layouts(self, adapter, capsys):
        assert cli.main(["convert", "run", "--to", "kohya", "--output", "out/kohya.safetensors"]) == 0
        assert capsys.readouterr().out.split() == ["out/kohya.safetensors"]
        assert cli.main(["convert", "out/kohya.safetensors", "--to", "diffusers", "--output", "back"]) == 0
        pipeline = tiny_sd3()
        pipeline.load_lora_weights("back")
        assert np.array_equal(picture(pipeline), adapter)

        assert cli.main(["convert", "run", "--to", "kohya", "--output", "out/kohya.safetensors"]) == 1
        assert "out/kohya.safetensors is there already" in capsys.readouterr().err

    def test_the_base_says_what_a_file_does_not(self, adapter, capsys):
        save_file(load_file("run/pytorch_lora_weights.safetensors"), "nameless.safetensors")
        command = ["convert", "nameless.safetensors", "--to", "kohya", "--output", "kohya.safetensors"]
        assert cli.main(command) == 1
        assert "name the base pipeline with --model" in capsys.readouterr().err
        assert cli.main([*command, "--model", "base"]) == 0
        assert "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha" in load_file("kohya.safetensors")

    def test_merged(self, adapter, capsys):
        # As training commands leave it. The tiny pipeline has no T5.
        loading = {"text_encoder_3": None, "tokenizer_3": None}
        config = {"model_name_or_path": "base", "model_init_kwargs": loading}
        Path("run/config.yaml").write_text(yaml.safe_dump(config))
        assert cli.main(["convert", "run", "--to", "merged", "--output", "merged"]) == 0
        pipeline = StableDiffusion3Pipeline.from_pretrained("merged", **loading)
        pipeline.set_progress_bar_config(disable=True)
        assert np.abs(picture(pipeline) - adapter).max() < 1e-5
        assert np.abs(picture(pipeline) - picture(tiny_sd3())).max() > 1e-3
        assert cli.main(["convert", "run", "--to", "merged", "--output", "merged"]) == 1
        assert "merged is there already" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--to", "peft", "--output", "out"], "name an adapter"),
            (["run", "--output", "out"], "say what to write"),
            (["run", "--to", "peft"], "say where to write to"),
        ],
    )
    def test_bad_arguments(self, words, message, capsys):
        assert cli.main(["convert", *words]) == 1
        assert message in capsys.readouterr().err
