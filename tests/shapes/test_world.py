# Copyright 2026 The trl-flow authors
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
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from trl_flow.scripts.make_shapes import MakeShapesArguments, main
from trl_flow.shapes import PIPELINE_PATH, shapes_dataset, shapes_partial, shapes_strict
from trl_flow.shapes.prompts import all_prompts
from trl_flow.shapes.world import MAX_TOKENS, encode, generate, rendered_pictures, word_tokenizer


@pytest.fixture(scope="module")
def pipeline():
    return DiffusionPipeline.from_pretrained(PIPELINE_PATH)


def test_importing_the_world_is_light():
    heavy = "import sys, trl_flow.shapes; print(sorted({'diffusers', 'transformers', 'datasets'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_packaged_folder_is_small_and_knows_no_other_folder():
    files = [file for file in PIPELINE_PATH.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    assert not list(PIPELINE_PATH.rglob("*.bin"))
    for file in PIPELINE_PATH.rglob("*config.json"):
        assert "_name_or_path" not in json.loads(file.read_text())
    assert "_name_or_path" not in json.loads((PIPELINE_PATH / "model_index.json").read_text())


def test_packaged_pipeline_is_stable_diffusion_3_in_single_precision(pipeline):
    assert type(pipeline) is StableDiffusion3Pipeline
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    assert pipeline.scheduler.config.shift == 3.0


def test_pictures_repeat_with_their_seed(pipeline):
    prompts = ["a red circle", "four blue squares"]
    first, again, other = (
        np.stack([np.array(image) for image in generate(pipeline, prompts, seed)]) for seed in (1, 1, 2)
    )
    assert first.shape == (2, 32, 32, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_base_model_is_good_but_not_perfect(pipeline):
    prompts = list(shapes_dataset("test", 128)["prompt"])
    images = generate(pipeline, prompts)
    assert np.mean(shapes_partial(prompts, images)) > 0.45
    assert 0.3 < np.mean(shapes_strict(prompts, images)) < 0.8


def test_pictures_follow_their_prompt(pipeline):
    prompts = list(shapes_dataset("test", 120)["prompt"])
    images = generate(pipeline, prompts)
    others = prompts[-1:] + prompts[:-1]  # each picture beside the prompt of another tag
    assert np.mean(shapes_strict(prompts, images)) > np.mean(shapes_strict(others, images)) + 0.2


def test_silent_t5_puts_out_the_zeros_of_a_pipeline_without_one(pipeline):
    def embeds():
        return pipeline.encode_prompt("a red circle", None, None, max_sequence_length=1)[0]

    with_t5, encoder = embeds(), pipeline.text_encoder_3
    pipeline.text_encoder_3 = None
    without_t5 = embeds()
    pipeline.text_encoder_3 = encoder
    assert with_t5.shape == (1, MAX_TOKENS + 1, 96)
    assert torch.equal(with_t5, without_t5)


def test_each_word_is_one_token(pipeline):
    for tokenizer in (word_tokenizer(), pipeline.tokenizer, pipeline.tokenizer_2):
        lengths = [len(ids) for ids in tokenizer(all_prompts()).input_ids]
        assert lengths == [len(prompt.split()) + 2 for prompt in all_prompts()]
        assert max(lengths) == MAX_TOKENS == tokenizer.model_max_length


def test_vae_keeps_pictures_and_its_latents_are_standardised(pipeline):
    prompts, pixels = rendered_pictures(120, seed=3)
    latents = encode(pipeline.vae, pixels)
    with torch.inference_mode():
        images = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)
    assert np.mean(shapes_strict(prompts, images)) >= 0.97
    latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert abs(latents.mean().item()) < 0.05
    assert abs(latents.std().item() - 1) < 0.05


@pytest.mark.slow
def test_make_shapes_writes_a_pipeline_that_loads(tmp_path, capsys):
    main(
        MakeShapesArguments(
            output_dir=str(tmp_path), num_pictures=96, vae_steps=2, steps=2, final_steps=2, num_prompts=6
        )
    )
    assert "strict" in capsys.readouterr().out
    made = DiffusionPipeline.from_pretrained(tmp_path)
    assert len(generate(made, ["a circle"])) == 1
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    # The same parts as in the package, made from nothing.
    for part in ("transformer", "vae", "text_encoder"):
        packaged = json.loads((PIPELINE_PATH / part / "config.json").read_text())
        fresh = json.loads((tmp_path / part / "config.json").read_text())
        measured = {"shift_factor", "scaling_factor"}
        assert {key: fresh[key] for key in fresh.keys() - measured} == {
            key: packaged[key] for key in packaged.keys() - measured
        }
