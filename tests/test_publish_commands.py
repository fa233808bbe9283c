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

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from hub_metadata import metadata_problems
from loopback_hub import LoopbackHub
from peft import LoraConfig, get_peft_model
from PIL import Image
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


# Pushes the run, and pushes it again to a branch.
SCRIPT = """
import sys
from trl_flow.cli import main
assert main(["push", sys.argv[1], "user/repo", "--private"]) == 0
assert main(["push", sys.argv[1], "user/repo", "--revision", "second", "--message", "Again"]) == 0
assert main(["push", sys.argv[1], "user/repo", "--revision", "refs/pr/7"]) == 1
"""
# The example on the card of the pushed run as it stands; a copy of the repository, and its card again.
USED = """
import re, sys
from huggingface_hub import ModelCard, snapshot_download
from trl_flow.cli import main
card = ModelCard.load("user/repo")
card.validate()
exec(re.search(r"```python\\n(.*?)```", card.text, re.DOTALL)[1])
assert pipe.get_active_adapters()
copy = snapshot_download("user/repo", local_dir="copy")
assert main(["card", copy]) == 0
assert open("copy/README.md").read() == card.content
assert main(["card", copy, "--license", "Apache 2.0"]) == 0
assert main(["push", copy, "user/bad"]) == 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update, as a training command leaves it."""
    folder = tmp_path_factory.mktemp("publish") / "first"
    settings = {
        "num_eval_prompts": 2,
        "num_inference_steps": 3,
        "num_eval_inference_steps": 3,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "beta": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    config = folder.parent / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert cli.main(["flow-grpo", "--config", str(config), "--output_dir", str(folder)]) == 0
    return folder


class TestPush:
    def test_one_commit_of_what_may_be_seen(self, run, tmp_path):
        with LoopbackHub() as hub:
            moved = shutil.copytree(run, tmp_path / "moved")
            pushed = hub.run(SCRIPT, moved)
            repository = hub.repositories["model", "user/repo"]
            assert repository.private
            _, first, *_ = repository.commits  # the first is the repository's own
            assert f"Pushed: {hub.url}/user/repo/commit/{first.sha}" in pushed.stdout
            assert "could not be pushed to user/repo: The Hub knows no such" in pushed.stderr
            files = hub.files("model", "user/repo")
            assert files == first.files
            second = hub.files("model", "user/repo", "second")
            assert {name for name in files if files[name] != second[name]} == {"README.md", "card.json"}
            assert b'load_lora_weights("user/repo", revision="second")' in second["README.md"]
            used = hub.run(USED, cwd=tmp_path)
            assert 'Invalid metadata in README.md. - "license" must be one of [apache-2.0' in " ".join(
                used.stderr.split()
            )
            assert "user/bad" in used.stderr and "Nothing was committed" in used.stderr
            assert hub.files("model", "user/bad").keys() == {".gitattributes"}
            with Image.open(tmp_path / "image.png") as image:
                assert image.size == (32, 32)
        expected = {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"}
        expected |= {
            "README.md",
            "card.json",
            "config.yaml",
            "run.json",
            "trainer_state.json",
            "curves.png",
            "before_after.png",
        }
        assert expected <= files.keys()
        assert any(name.startswith("samples/") for name in files) and any(name.startswith("images/") for name in files)
        assert (run / "checkpoint-1" / "rollout_state_0.pt").is_file() and (run / "training_args.bin").is_file()
        assert not [name for name in files if name.endswith((".pt", ".pth", ".bin")) or "checkpoint" in name]
        for name, content in files.items():
            told_apart = name in (".gitattributes", "README.md", "card.json", "config.yaml")
            assert told_apart or (run / name).read_bytes() == content
            assert str(run.parent).encode() not in content
        card = files["README.md"].decode()
        assert 'load_lora_weights("user/repo")' in card and "path/to/" not in card and "\n# repo\n" in card
        assert 'load_lora_weights("path/to/first")' in (run / "README.md").read_text()

    def test_the_card_names_the_repository_that_it_goes_to(self, run, tmp_path):
        """Also where the run has another one of its own."""
        mine = shutil.copytree(run, tmp_path / "mine")
        assert cli.main(["card", str(mine), "--hub_model_id", "me/mine"]) == 0
        with LoopbackHub() as hub:
            hub.run("import sys\nfrom trl_flow.cli import main\nmain(['push', sys.argv[1], 'user/repo'])", mine)
            files = hub.files("model", "user/repo")
        assert b'load_lora_weights("user/repo")' in files["README.md"] and b"me/mine" not in files["README.md"]
        assert json.loads(files["card.json"])["hub_model_id"] == "user/repo"
        assert "me/mine" in (mine / "README.md").read_text()

    def test_refusals(self, run, tmp_path, capsys):
        assert cli.main(["push", str(run)]) == 1
        assert "name the repository" in capsys.readouterr().err
        assert cli.main(["push", str(tmp_path), "user/repo"]) == 1
        assert "it holds no run.json" in capsys.readouterr().err
        (tmp_path / "run.json").write_text("{}")
        assert cli.main(["push", str(tmp_path), "user/repo"]) == 1
        assert "holds nothing that was trained yet" in capsys.readouterr().err


class TestCard:
    def test_what_training_wrote(self, run, tmp_path, capsys):
        copy = shutil.copytree(run, tmp_path / "copy")
        (copy / "README.md").unlink()
        shutil.rmtree(copy / "images")
        assert cli.main(["card", str(copy)]) == 0
        assert f"Card:  {copy / 'README.md'}" in capsys.readouterr().out
        for name in ("README.md", "card.json", "images/sample_0.png"):
            assert (copy / name).read_bytes() == (run / name).read_bytes()
        card = (copy / "README.md").read_text()
        assert metadata_problems(card) == ([], [])
        for fact in (
            "license: apache-2.0",
            "- Prompts: `shapes`",
            "Updates: 1",
            "trl-flow flow-grpo --config config.yaml",
        ):
            assert fact in card
        # As it was typed, less where things were.
        assert "\ntrl-flow flow-grpo --config config.yaml --output_dir first\n" in card
        assert str(run.parent) not in card + (copy / "card.json").read_text()

    def test_other_words(self, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "copy")
        arguments = ["--hub_model_id", "user/repo", "--model_name", "Red circles", "--license", "cc-by-4.0"]
        assert cli.main(["card", str(copy), *arguments]) == 0
        card = (copy / "README.md").read_text()
        for text in ("\n# Red circles\n", 'load_lora_weights("user/repo")', "license: cc-by-4.0"):
            assert text in card

    def test_refusals(self, tmp_path, capsys):
        assert cli.main(["card"]) == 1
        assert "name the directory of a run" in capsys.readouterr().err
        assert cli.main(["card", str(tmp_path)]) == 1
        assert "holds no card.json" in capsys.readouterr().err
