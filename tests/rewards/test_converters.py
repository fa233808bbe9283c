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

import pickle
import re

import numpy as np
import pytest
import torch
from original_models import OpenCLIP, OriginalImageReward, published_head, shaken
from safetensors.torch import save_file
from transformers import BlipTextModel, BlipVisionModel, CLIPModel

from trl_flow.rewards.convert import blip, linear_layers, open_clip_vit_h
from trl_flow.rewards.models import from_state_dict, is_checkpoint, read_checkpoint


TEXTS = torch.tensor([[512, 5, 77, 300, 513, 0, 0, 0], [512, 8, 9, 10, 11, 12, 266, 513]])


def test_open_clip_becomes_a_clip_model():
    original = shaken(OpenCLIP())
    config, state_dict = open_clip_vit_h(original.state_dict())
    # This is where a missing tensor, or one that is left, would show.
    model = from_state_dict(CLIPModel, config, state_dict, "it").eval()
    assert model.state_dict().keys() == state_dict.keys()
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_image_features(pixel_values=pixel_values).pooler_output,
            original.visual(pixel_values),
            atol=1e-5,
            rtol=0,
        )
        torch.testing.assert_close(
            model.get_text_features(input_ids=TEXTS).pooler_output, original.encode_text(TEXTS), atol=1e-5, rtol=0
        )
    assert model.logit_scale == original.logit_scale


def test_half_precision_weights_are_computed_with_in_float32():
    config, state_dict = open_clip_vit_h(shaken(OpenCLIP()).half().state_dict())
    model = from_state_dict(CLIPModel, config, state_dict, "it")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half = state_dict["visual_projection.weight"]
    assert half.dtype == torch.float16 and torch.equal(model.visual_projection.weight, half.float())


def test_the_activation_is_open_clips():
    # With CLIP's usual one, the picture's embedding is another: the test above would see it.
    original = shaken(OpenCLIP())
    config, state_dict = open_clip_vit_h(original.state_dict())
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    model = from_state_dict(CLIPModel, config, state_dict, "it").eval()
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        difference = model.get_image_features(pixel_values=pixel_values).pooler_output - original.visual(pixel_values)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"visual.proj": None}, "1 missing: visual_projection.weight"),
        ({"transformer.resblocks.1.ln_2.bias": None}, "missing: text_model.encoder.layers.1.layer_norm2.bias"),
        ({"text_projection": None}, "missing: text_projection.weight"),
        ({"visual.trunk.norm.weight": torch.ones(1)}, "1 unexpected: visual.trunk.norm.weight"),
        ({"visual.ln_mid.weight": torch.ones(1)}, "unexpected: visual.ln_mid.weight"),
        (
            {f"head.{number}": torch.ones(1) for number in range(6)},
            "6 unexpected: head.0, head.1, head.2, head.3, ...",
        ),
        ({"transformer.resblocks.0.attn.gate": torch.ones(1)}, "unexpected: transformer.resblocks.0.attn.gate"),
    ],
)
def test_tensors_of_another_clip_are_named(change, words):
    state_dict = {**OpenCLIP().state_dict(), **change}
    state_dict = {key: tensor for key, tensor in state_dict.items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(words)):
        from_state_dict(CLIPModel, *open_clip_vit_h(state_dict), what="an open_clip ViT-H-14")


def test_another_vit_is_refused_whose_heads_would_be_guessed_wrong():
    with pytest.raises(ValueError, match="width 192: expected ViT-H-14's, 1280"):
        open_clip_vit_h(OpenCLIP(vision_width=192).state_dict())


def test_blip_becomes_two_models():
    original = shaken(OriginalImageReward(60)).blip
    (vision_config, vision), (text_config, text) = blip(original.state_dict())
    vision_model = from_state_dict(BlipVisionModel, vision_config, vision, "it").eval()
    text_model = from_state_dict(BlipTextModel, text_config, text, "it", add_pooling_layer=False).eval()
    assert vision_model.state_dict().keys() == vision.keys() and text_model.state_dict().keys() == text.keys()
    pixel_values = torch.randn(2, 3, 32, 32)
    input_ids = torch.tensor([[2, 5, 6, 3, 0], [2, 30, 8, 9, 3]])
    mask = (input_ids > 0).long()
    with torch.no_grad():
        seen = original["visual_encoder"](pixel_values)
        torch.testing.assert_close(vision_model(pixel_values=pixel_values).last_hidden_state, seen, atol=1e-5, rtol=0)
        hidden_states = text_model(
            input_ids=input_ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        expected = original["text_encoder"](input_ids, mask, seen)
        torch.testing.assert_close(hidden_states[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_numbers_that_no_tensor_says_are_those_of_blip():
    (vision, _), (text, _) = blip(OriginalImageReward(60).blip.state_dict())
    assert vision.layer_norm_eps == 1e-6 and text.layer_norm_eps == 1e-12
    assert (vision.num_attention_heads, text.num_attention_heads) == (2, 1)
    assert (vision.image_size, vision.patch_size) == (32, 16)
    assert (text.vocab_size, text.encoder_hidden_size, text.is_decoder) == (60, 128, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"visual_encoder.pos_embed": None}, "1 missing: visual_encoder: embeddings.position_embedding"),
        ({"visual_encoder.blocks.1.attn.qkv.bias": None}, "missing: encoder.layers.1.self_attn.qkv.bias"),
        ({"visual_encoder.blocks.0.ls1.gamma": torch.ones(1)}, "unexpected: blocks.0.ls1.gamma"),
        ({"itm_head.weight": torch.ones(1)}, "unexpected: itm_head.weight"),
    ],
)
def test_tensors_of_another_blip_are_named(change, words):
    state_dict = {**OriginalImageReward(60).blip.state_dict(), **change}
    state_dict = {key: tensor for key, tensor in state_dict.items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(words)):
        vision, _ = blip(state_dict)
        from_state_dict(BlipVisionModel, *vision, what="BLIP")


def layers(head: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"layers.{key}": tensor for key, tensor in head.state_dict().items()}


def test_linear_layers_without_their_dropout():
    head = shaken(published_head(24))
    assert [key for key in layers(head) if "weight" in key] == [
        f"layers.{number}.weight" for number in (0, 2, 4, 6, 7)
    ]
    inputs = torch.randn(5, 24)
    converted = linear_layers(layers(head), "it").train()
    torch.testing.assert_close(converted(inputs), head(inputs), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.2.bias": None}, "1 missing: layers.2.bias"),
        ({"fc.weight": torch.ones(1, 1)}, "1 unexpected: fc.weight"),
        (
            {"layers.7.weight": None, "layers.7.bias": None},
            "down to one number, got (20, 24), (12, 20), (8, 12), (4, 8).",
        ),
        (
            {f"layers.{number}.{name}": None for number in range(8) for name in ("weight", "bias")},
            "missing: layers.0.bias",
        ),
    ],
)
def test_other_layers_are_named(change, words):
    state_dict = {**layers(published_head(24)), **change}
    state_dict = {key: tensor for key, tensor in state_dict.items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(words)):
        linear_layers(state_dict, "it")


def test_checkpoints_are_read_from_files(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "nested.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "new.safetensors")
    for name in ("plain.pth", "nested.pt", "old.pt", "new.safetensors"):
        assert is_checkpoint(str(tmp_path / name))
        state_dict, commit = read_checkpoint(str(tmp_path / name))
        assert commit is None and state_dict.keys() == {"a", "b"} and torch.equal(state_dict["a"], tensors["a"])
    (tmp_path / "directory.pt").mkdir()
    assert not is_checkpoint(str(tmp_path / "directory.pt")) and not is_checkpoint("openai/clip-vit-large-patch14")


def test_checkpoints_on_the_hub_have_a_commit(tmp_path, monkeypatch):
    # A file as huggingface_hub keeps it: what was downloaded once is found without a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--someone--weights"
    (repository / "snapshots" / commit / "v2").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    torch.save({"a": torch.ones(1)}, repository / "snapshots" / commit / "v2" / "it.pt")
    for revision in (None, "main", commit):
        assert read_checkpoint("someone/weights/v2/it.pt", revision) == ({"a": torch.ones(1)}, commit)


class Payload:
    ran = False

    def __reduce__(self):
        return (exec, ("import test_converters; test_converters.Payload.ran = True",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Payload()}, tmp_path / "it.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("it.pt", "bare.pt"):
        with pytest.raises(ValueError, match="could run any code: it is not loaded"):
            read_checkpoint(str(tmp_path / name))
    assert not Payload.ran


def test_what_a_checkpoint_holds_beside_tensors_is_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "loss": np.float64(0.3)}, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"could run any code.*\(Found: GLOBAL numpy\.\S+\.scalar\)") as refused:
        read_checkpoint(str(tmp_path / "it.pt"))
    for words in ("\x1b", "weights_only", "safe_globals"):  # nothing that says how to run it
        assert words not in str(refused.value)


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "it.safetensors"])
@pytest.mark.parametrize("kept", [0, 20, 500, 3000])
def test_damaged_checkpoints_are_refused(tmp_path, name, kept):
    tensors, path = {"a": torch.ones(40, 40)}, tmp_path / name
    if name == "it.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "new.pt")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{name} (cannot be read: it is damaged|holds more than tensors)"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("saved", [[torch.ones(1)], {"a": 3}, torch.ones(2)])
def test_other_things_than_a_state_dict_are_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "it.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        read_checkpoint(str(tmp_path / "it.pt"))


@pytest.mark.parametrize(
    "model", ["missing.pt", "/missing/it.pt", "./a/missing.pt", "user/repo", "user/repo/folder", "../x/it.pt"]
)
def test_names_of_no_file(model):
    with pytest.raises(ValueError, match="is no file"):
        read_checkpoint(model)
