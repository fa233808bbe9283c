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

"""Model cards of all families, and the files from which runs that were started from Python are repeated."""

import ast
import json
import re

import pytest
import yaml
from datasets import Dataset, Image
from hub_metadata import metadata_problems
from huggingface_hub import ModelCard
from pipelines import brightness, prompts
from tiny import tiny_pipeline
from trainer.test_every_family import settings_of

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, cli
from trl_flow.prompts import load_prompts
from trl_flow.scripts.training import make_training_parser
from trl_flow.trainer.run_config import public_command_line


def python_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def read(path) -> ModelCard:
    """The card, after the Hub's check and Python's."""
    card = ModelCard.load(path)
    assert metadata_problems(card.content) == ([], [])
    for code in python_blocks(card):
        ast.parse(code)
    return card


@pytest.mark.parametrize(
    "name, task",
    [
        ("StableDiffusion3Pipeline", "text-to-image"),
        ("StableDiffusionXLPipeline", "text-to-image"),
        ("FluxKontextPipeline", "image-to-image"),
        ("WanPipeline/2.2", "text-to-video"),
        ("WanImageToVideoPipeline", "image-to-video"),
    ],
)
def test_cards_of_families(make_trainer, tmp_path, name, task):
    settings = settings_of(name)
    image = settings.pop("image")
    columns = {"prompt": ["a red circle", "two blue square"], **({} if image is None else {"image": [image, image]})}
    rows = Dataset.from_dict(columns)
    rows = rows if image is None else rows.cast_column("image", Image())
    trainer = make_trainer(model=tiny_pipeline(name), train_dataset=rows, **settings)
    trainer.base_model = "tiny-models/one"
    trainer.create_model_card()
    card = read(tmp_path / "run" / "README.md")
    assert card.data.pipeline_tag == task and card.data.base_model_relation == "adapter"
    example = python_blocks(card)[0]
    assert ('subfolder="transformer_2"' in example) == (name == "WanPipeline/2.2")
    assert ("export_to_video" in example) == task.endswith("video")
    assert ("image=load_image" in example) == task.startswith("image")


def test_the_card_of_full_finetuning(make_trainer, tmp_path):
    trainer = make_trainer(full_finetuning=True, peft_config=None)
    trainer.base_model = "tiny-models/one"
    trainer.create_model_card()
    card = read(tmp_path / "run" / "README.md")
    assert card.data.base_model_relation == "finetune" and "lora" not in card.data.tags
    assert "SD3Transformer2DModel.from_pretrained" in python_blocks(card)[0]


def test_prompts_are_named(make_trainer, tmp_path):
    """Those of a set by the set's name, after a selection too, and a file's by the name of the file."""
    file = tmp_path / "mine.txt"
    file.write_text("a red circle\na blue square\n")
    named = load_prompts("shapes").select_columns("prompt").select(range(6))
    trainer = make_trainer(train_dataset=named, eval_dataset=load_prompts(str(file)))
    trainer.create_model_card()
    card = read(tmp_path / "run" / "README.md")
    assert "- Prompts: `shapes`, `mine.txt`\n" in card.text and card.data.datasets is None
    assert str(tmp_path) not in card.content + (tmp_path / "run" / "card.json").read_text()


def test_prompt_sets_are_named_by_their_repository(make_trainer):
    named = prompts(6)
    named.info.dataset_name = "drawbench"  # as `load_prompts` leaves it
    assert make_trainer(train_dataset=named).dataset_names == ["sayakpaul/drawbench"]


class TestConfigOfPython:
    def test_what_a_file_cannot_hold_is_said(self, make_trainer, tmp_path):
        def local(images, **kwargs):
            return brightness(images, **kwargs)

        trainer = make_trainer(reward_funcs=[brightness, local], train_dataset=prompts(6))
        trainer.train()
        path = tmp_path / "run" / "config.yaml"
        comments = [line for line in path.read_text().splitlines() if line.startswith("# Not here: ")]
        assert [line.removeprefix("# Not here: ").partition(",")[0] for line in comments] == [
            "model",
            "reward_funcs",
            "train_dataset",
            "peft_config",
        ]
        assert "StableDiffusion3Pipeline in memory" in comments[0] and "6 rows" in comments[2]
        assert comments[3].endswith("init_lora_weights=True")
        config = yaml.safe_load(path.read_text())
        assert config["model_name_or_path"] == "StableDiffusion3Pipeline in memory", "not another model instead"
        assert config["reward_funcs"] == ["pipelines.brightness"] and "dataset_name" not in config
        arguments = ["--config", str(path), "--output_dir", str(tmp_path / "again")]
        script_args, args = make_training_parser("flow-grpo").parse_args_and_config(arguments)
        assert (script_args.lora_r, script_args.lora_alpha) == (2, 6)
        for name in ("num_generations", "learning_rate", "max_steps", "num_inference_steps", "guidance_scale", "beta"):
            assert getattr(args, name) == getattr(trainer.args, name), name

        call = python_blocks(read(tmp_path / "run" / "README.md"))[1]
        (found,) = [
            node
            for node in ast.walk(ast.parse(call))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "trl_flow.FlowGRPOTrainer"
        ]
        written = {keyword.arg: ast.unparse(keyword.value) for keyword in found.keywords}
        assert written == {
            "model": "model",
            "reward_funcs": "['pipelines.brightness', local]",
            "args": "args",
            "train_dataset": "train_dataset",
            "peft_config": "peft_config",
        }
        assert "  # LoraConfig(r=2, lora_alpha=6)\n" in call

    def test_the_command_repeats_a_run_of_names_alone(self, tmp_path, monkeypatch):
        """Bit for bit: nothing is in memory but what has a name."""
        monkeypatch.chdir(tmp_path)
        settings = {"max_steps": 1, "num_inference_steps": 3, "num_generations": 2, "per_device_train_batch_size": 2}
        settings |= {"sde_steps": [0], "beta": 0.0, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        settings |= {"save_strategy": "no", "learning_rate": 1e-2, "tail_steps": "1"}
        args = DenseGRPOConfig(output_dir="run", **settings)
        trainer = DenseGRPOTrainer("shapes", ["shapes"], args=args, train_dataset="shapes")
        trainer.train()
        assert "Not here" not in (tmp_path / "run" / "config.yaml").read_text()
        assert cli.main(["dense-grpo", "--config", "run/config.yaml", "--output_dir", "again"]) == 0
        one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("run", "again"))
        assert one.read_bytes() == two.read_bytes()
        call = python_blocks(read("run/README.md"))[1]
        assert 'model="shapes",' in call and 'train_dataset="shapes",' in call and "peft_config" not in call

    def test_tokens_stay_out(self, make_trainer, tmp_path):
        reward = {"remote": {"url": "http://localhost:1", "api_key": "sk-secret"}}
        trainer = make_trainer(hub_token="hf_secret")
        trainer.given["reward_funcs"] = [reward, json.dumps(reward)]
        trainer.write_run_file()
        trainer.create_model_card()
        for name in ("config.yaml", "card.json", "README.md"):
            text = (tmp_path / "run" / name).read_text()
            assert "secret" not in text and "localhost" in text


class TestCommandLine:
    @pytest.mark.parametrize(
        "words, public",
        [
            (["--max_steps", "2", "--hub_token", "hf_x", "--seed", "1"], "--max_steps 2 --seed 1"),
            (["--hub_token=hf_x", "--push_to_hub"], "--push_to_hub"),
            (["--config", "/home/me/a.yaml", "--output_dir=/home/me/run"], "--config a.yaml --output_dir=run"),
            (
                ["--reward_funcs", '{"remote": {"url": "u", "api_key": "x"}}'],
                """--reward_funcs '{"remote": {"url": "u"}}'""",
            ),
            (["--reward_funcs", "http://me:pw@host:1", "clip"], "--reward_funcs http://host:1 clip"),
        ],
    )
    def test_without_secrets_and_places(self, words, public):
        assert public_command_line(["flow-grpo", *words]) == f"trl-flow flow-grpo {public}"
