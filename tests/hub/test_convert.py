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

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import call_arguments, tiny_pipeline

from trl_flow.hub import save_adapter, save_policy
from trl_flow.hub.adapter import DIFFUSERS_WEIGHTS_NAME
from trl_flow.hub.convert import convert_adapter, merge_adapter, read_lora
from trl_flow.policy import FlowPolicy


# Of every kind that the trainers' default adapters have, and feed-forward layers.
LAYERS = {
    "StableDiffusion3Pipeline": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out"]
    + ["ff.net.0.proj", "ff.net.2"],
    "FluxPipeline": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ff_context.net.0.proj"]
    + ["proj_mlp", "single_transformer_blocks.0.proj_out"],
    "StableDiffusionXLPipeline": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"]
    + ["conv1", "time_emb_proj"],
}
RANK, ALPHA = 4, 6


def component_of(name: str) -> str:
    return "unet" if "XL" in name else "transformer"


def train(name: str, folder, **config):
    """A tiny pipeline with an adapter whose every matrix is random, saved to `folder`; returns its pictures."""
    pipeline = tiny_pipeline(name)
    component = component_of(name)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": LAYERS[name]} | config
    model = get_peft_model(getattr(pipeline, component), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, type(pipeline), component, folder, "user/base")
    return pictures(pipeline, name)


def pictures(pipeline: DiffusionPipeline, name: str) -> np.ndarray:
    # As a loader leaves them: torch multiplies by weights that want a gradient in another way, which rounds differently.
    getattr(pipeline, component_of(name)).requires_grad_(False)
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipeline("a red circle", **(call_arguments(name) | arguments)).images


def by_diffusers(name: str, path) -> np.ndarray:
    pipeline = tiny_pipeline(name)
    pipeline.load_lora_weights(str(path))
    return pictures(pipeline, name)


def by_peft(name: str, folder) -> np.ndarray:
    pipeline = tiny_pipeline(name)
    PeftModel.from_pretrained(getattr(pipeline, component_of(name)), str(folder))
    return pictures(pipeline, name)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", LAYERS)
def test_round_trips(tmp_path, name):
    run = tmp_path / "run"
    expected = train(name, run)
    assert np.abs(expected - pictures(tiny_pipeline(name), name)).max() > 1e-2
    weights = load_file(run / "adapter_model.safetensors")

    convert_adapter(run, "diffusers", tmp_path / "diffusers")
    assert same(load_file(tmp_path / "diffusers" / DIFFUSERS_WEIGHTS_NAME), load_file(run / DIFFUSERS_WEIGHTS_NAME))
    assert np.array_equal(by_diffusers(name, tmp_path / "diffusers"), expected)

    convert_adapter(tmp_path / "diffusers", "peft", tmp_path / "peft")
    assert same(load_file(tmp_path / "peft" / "adapter_model.safetensors"), weights)
    first, second = (PeftConfig.from_pretrained(str(folder)) for folder in (run, tmp_path / "peft"))
    assert first.target_modules == second.target_modules and first.lora_alpha == second.lora_alpha == ALPHA
    assert np.array_equal(by_peft(name, tmp_path / "peft"), expected)

    kohya = tmp_path / "kohya.safetensors"
    assert convert_adapter(tmp_path / "diffusers", "kohya", kohya) == [kohya]
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in load_file(kohya))
    for layout in ("peft", "diffusers"):
        convert_adapter(kohya, layout, tmp_path / f"back-{layout}", base_model="user/base")
    assert same(load_file(tmp_path / "back-peft" / "adapter_model.safetensors"), weights)
    config = PeftConfig.from_pretrained(str(tmp_path / "back-peft"))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (RANK, ALPHA, {}, {})
    assert config.base_model_name_or_path == "user/base"
    assert np.array_equal(by_peft(name, tmp_path / "back-peft"), expected)
    assert np.array_equal(by_diffusers(name, tmp_path / "back-diffusers"), expected)

    convert_adapter(tmp_path / "back-peft", "kohya", tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), load_file(kohya))


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline"])
def test_diffusers_reads_the_kohya_file(tmp_path, name):
    """Where it has a reader. Of FLUX's single blocks it takes apart only those of the full size."""
    config = (
        {"target_modules": r"transformer_blocks.*\.(to_[qv]|to_out\.0|to_add_out|net\.2)"} if "Flux" in name else {}
    )
    expected = train(name, tmp_path / "run", lora_alpha=2 * RANK, **config)
    convert_adapter(tmp_path / "run", "kohya", tmp_path / "kohya.safetensors")
    found = by_diffusers(name, tmp_path / "kohya.safetensors")
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(expected - pictures(tiny_pipeline(name), name)).max() > 1e-2


def test_diffusers_reads_single_blocks_of_full_size(tmp_path):
    shapes = {"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer, outputs in shapes.items():
        weights[f"single_transformer_blocks.7.{layer}.lora_A.weight"] = torch.randn(2, 3072, generator=generator)
        weights[f"single_transformer_blocks.7.{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(shapes))
    config.save_pretrained(str(tmp_path), auto_mapping_dict={"base_model_class": "FluxTransformer2DModel"})
    save_file(
        {f"base_model.model.{key}": value for key, value in weights.items()}, tmp_path / "adapter_model.safetensors"
    )
    convert_adapter(tmp_path, "kohya", tmp_path / "kohya" / "kohya.safetensors")
    # It puts the scale, here 4, into the matrices.
    state = FluxPipeline.lora_state_dict(str(tmp_path / "kohya" / "kohya.safetensors"))
    for layer in shapes:
        up, down = (state[f"transformer.single_transformer_blocks.7.{layer}.lora_{m}.weight"] for m in "BA")
        own_up, own_down = (weights[f"single_transformer_blocks.7.{layer}.lora_{m}.weight"] for m in "BA")
        assert torch.equal(up @ down, own_up @ (4 * own_down))
    assert not state["transformer.single_transformer_blocks.7.attn.to_k.lora_B.weight"].any()


class OriginalCheckpoint(dict):
    """What a kohya file adds to an original checkpoint, found as ComfyUI finds it: by names with _ in place of dots."""

    def __init__(self, kohya: dict, names: list[str]):
        super().__init__(dict.fromkeys(names))
        self.kohya = kohya

    def __getitem__(self, name):
        return torch.zeros(6)

    def pop(self, name):
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if not name.endswith(".weight") or f"{layer}.alpha" not in self.kohya:
            return torch.zeros(6)
        up, down, alpha = (self.kohya.pop(f"{layer}.{k}") for k in ("lora_up.weight", "lora_down.weight", "alpha"))
        return up @ down * (alpha / len(down))


def test_sd3_layers_are_those_of_the_original_code(tmp_path):
    """diffusers' converter of original checkpoints takes what the file adds to the layers the adapter adds it to."""
    train("StableDiffusion3Pipeline", tmp_path / "run")
    convert_adapter(tmp_path / "run", "kohya", tmp_path / "kohya.safetensors")
    checkpoint = OriginalCheckpoint(load_file(tmp_path / "kohya.safetensors"), ["joint_blocks.0.", "joint_blocks.1."])
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint.kohya
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    layers = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    assert len(layers) > 10
    for layer in layers:
        delta = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"] * (ALPHA / RANK)
        torch.testing.assert_close(converted[f"{layer.removeprefix('base_model.model.')}.weight"], delta)


@pytest.mark.parametrize(
    "config, layers",
    [
        ({"rank_pattern": {"to_out.0": 2}, "alpha_pattern": {"to_out.0": 7}}, {"to_out.0": (2, 7), "to_q": (4, 6)}),
        ({"use_rslora": True}, {"to_out.0": (4, 12), "to_q": (4, 12)}),
        ({"target_modules": ["to_q"]}, {"to_q": (4, 6)}),
    ],
    ids=["patterns", "rslora", "one of three"],
)
def test_scales(tmp_path, config, layers):
    name = "StableDiffusion3Pipeline"
    expected = train(name, tmp_path / "run", **config)
    convert_adapter(tmp_path / "run", "kohya", tmp_path / "kohya.safetensors")
    convert_adapter(tmp_path / "kohya.safetensors", "peft", tmp_path / "peft")
    weights = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("run", "peft"))
    assert same(*weights)
    (adapter,) = read_lora(tmp_path / "peft")
    for layer, lora in adapter.layers().items():
        for suffix, (rank, alpha) in layers.items():
            if layer.endswith(suffix):
                assert (lora.rank, lora.alpha) == (rank, alpha)
    assert np.array_equal(by_peft(name, tmp_path / "peft"), expected)


def test_modulations_of_flux(tmp_path):
    # By their tensors alone: how a product with one row is rounded depends on where in memory its factors lie.
    train("FluxPipeline", tmp_path / "run", target_modules=["norm1.linear", "norm1_context.linear", "norm.linear"])
    convert_adapter(tmp_path / "run", "kohya", tmp_path / "kohya.safetensors")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "kohya.safetensors")} == {
        "lora_unet_double_blocks_0_img_mod_lin",
        "lora_unet_double_blocks_0_txt_mod_lin",
        "lora_unet_single_blocks_0_modulation_lin",
    }
    convert_adapter(tmp_path / "kohya.safetensors", "peft", tmp_path / "peft")
    assert same(*(load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("run", "peft")))


def test_layers_that_were_trained_as_one(tmp_path):
    """Files of kohya's scripts: queries, keys and values share the first matrix; without alpha it is the rank."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 16, generator=generator), torch.randn(48, 3, generator=generator)
    layer = "lora_unet_joint_blocks_1_context_block_attn_qkv"
    file = tmp_path / "kohya.safetensors"
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, file)
    (adapter,) = read_lora(file)
    found = adapter.layers()
    assert adapter.config.lora_alpha == adapter.config.r == 3
    for index, part in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        lora = found[f"transformer_blocks.1.attn.{part}"]
        assert torch.equal(lora.down, down) and torch.equal(lora.up, up[16 * index : 16 * (index + 1)])


def test_sdxl_names_of_the_original_code(tmp_path):
    layers = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_2_1_transformer_blocks_9_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2",
    }
    state = {}
    for layer in layers:
        state[f"lora_unet_{layer}.lora_down.weight"] = torch.ones(2, 8)
        state[f"lora_unet_{layer}.lora_up.weight"] = torch.ones(8, 2)
        state[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "kohya.safetensors")
    (adapter,) = read_lora(tmp_path / "kohya.safetensors")
    assert {name: lora.alpha for name, lora in adapter.layers().items()} == dict.fromkeys(layers.values(), 1.0)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_merge(tmp_path, name):
    expected = train(name, tmp_path / "run")
    convert_adapter(tmp_path / "run", "kohya", tmp_path / "kohya.safetensors")
    merged = merge_adapter(tiny_pipeline(name), tmp_path / "kohya.safetensors")
    assert merged.transformer.state_dict().keys() == tiny_pipeline(name).transformer.state_dict().keys()
    assert np.abs(pictures(merged, name) - expected).max() < 1e-4
    with pytest.raises(ValueError, match="adapter of another model|has the layers of"):
        merge_adapter(tiny_pipeline("StableDiffusionXLPipeline"), tmp_path / "run")


def test_both_denoisers(tmp_path):
    name = "WanPipeline/2.2"
    policy = FlowPolicy(tiny_pipeline(name), height=16, width=16, num_frames=5)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    save_policy(policy, tmp_path / "run", "user/base")
    convert_adapter(tmp_path / "run", "diffusers", tmp_path / "diffusers")
    convert_adapter(tmp_path / "diffusers", "peft", tmp_path / "peft")
    for file in ("adapter_model.safetensors", "transformer_2/adapter_model.safetensors"):
        assert same(load_file(tmp_path / "run" / file), load_file(tmp_path / "peft" / file))
    base, merged = tiny_pipeline(name), merge_adapter(tiny_pipeline(name), tmp_path / "peft")
    for component in ("transformer", "transformer_2"):
        before, after = (dict(getattr(p, component).named_parameters()) for p in (base, merged))
        assert before.keys() == after.keys() and not same(before, after)
    with pytest.raises(ValueError, match="adapts transformer and transformer_2, and a kohya file is of one"):
        convert_adapter(tmp_path / "run", "kohya", tmp_path / "out.safetensors")


class TestRefusals:
    def test_a_complete_denoiser(self, tmp_path):
        tiny_pipeline("StableDiffusion3Pipeline").transformer.save_pretrained(tmp_path / "transformer")
        with pytest.raises(ValueError, match="holds a complete denoiser"):
            convert_adapter(tmp_path, "diffusers", tmp_path / "out")

    def test_a_family_without_kohya_layout(self, tmp_path):
        pipeline = tiny_pipeline("QwenImagePipeline")
        model = get_peft_model(pipeline.transformer, LoraConfig(target_modules=["to_q"]))
        save_adapter(model, type(pipeline), "transformer", tmp_path, None)
        with pytest.raises(ValueError, match="QwenImageTransformer2DModel has no kohya layout"):
            convert_adapter(tmp_path, "kohya", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_a_layer_without_place(self, tmp_path):
        train("StableDiffusion3Pipeline", tmp_path, target_modules=["to_q", "norm1.linear"])
        with pytest.raises(ValueError, match=r"transformer_blocks\.\d\.norm1\.linear of .* has no place"):
            convert_adapter(tmp_path, "kohya", tmp_path / "out.safetensors")

    def test_parts_of_one_layer_that_differ(self, tmp_path):
        train("StableDiffusion3Pipeline", tmp_path, rank_pattern={"to_k": 2})
        with pytest.raises(ValueError, match=r"x_block_attn_qkv is one layer .* ranks \[4, 2, 4\]"):
            convert_adapter(tmp_path, "kohya", tmp_path / "out.safetensors")

    def test_no_plain_lora(self, tmp_path):
        train("StableDiffusion3Pipeline", tmp_path, use_dora=True)
        with pytest.raises(ValueError, match="use_dora=True"):
            convert_adapter(tmp_path, "diffusers", tmp_path / "out")

    def test_places(self, tmp_path):
        train("StableDiffusion3Pipeline", tmp_path / "run")
        with pytest.raises(ValueError, match="expected the name of a .safetensors file"):
            convert_adapter(tmp_path / "run", "kohya", tmp_path / "out")
        with pytest.raises(FileExistsError, match="adapter_model.safetensors is there already"):
            convert_adapter(tmp_path / "run", "peft", tmp_path / "run")
        with pytest.raises(FileNotFoundError, match="neither a directory, nor a .safetensors file"):
            convert_adapter("missing.safetensors", "peft", tmp_path / "out")
        with pytest.raises(ValueError, match="holds no adapter"):
            convert_adapter(tmp_path, "peft", tmp_path / "out")

    def test_text_encoders(self, tmp_path):
        layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
        file = tmp_path / "kohya.safetensors"
        save_file({f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}, file)
        with pytest.raises(ValueError, match="adapts more than the denoiser"):
            read_lora(file)
