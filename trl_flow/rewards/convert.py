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

"""From the checkpoints of other libraries to transformers' models: tensors under their new names, sizes read from them."""

import math
import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig


StateDict = dict[str, torch.Tensor]

# The number of heads is in no tensor: width of one head, of open_clip's ViT-H-14 and of BLIP with a ViT-L.
_HEAD_WIDTH = 64
_HEAD_WIDTH_VIT_H = 80

_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.in_proj_weight": "attn.in_proj.weight",
    "attn.in_proj_bias": "attn.in_proj.bias",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp": "mlp",
}
_BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm": "post_layernorm",
}


def check_keys(what: str, missing: Iterable[str] = (), unexpected: Iterable[str] = ()):
    """
    Refuses a checkpoint of another model.

    Raises:
        ValueError: If a tensor is missing or unexpected; names the first few.
    """
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for kind, keys in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
        if keys
    ]
    if problems:
        raise ValueError(
            f"These are not the weights of {what}: tensors {'; tensors '.join(problems)}. Check `model`, and that the "
            "download is complete."
        )


def _renamed(state_dict: StateDict, names: dict[str, str], blocks: dict[str, str], what: str) -> StateDict:
    """Tensors under the new names of their modules; those in numbered blocks have a name before and after the number."""

    def rename(key: str) -> str | None:
        for old, new in names.items():
            if key == old:
                return new
            if key.startswith(f"{old}."):
                rest = key.removeprefix(f"{old}.")
                number, _, within = rest.partition(".")
                if not number.isdigit():
                    return f"{new}.{rest}"
                for part, new_part in blocks.items():
                    if within == part or within.startswith(f"{part}."):
                        return f"{new}.{number}.{new_part}{within.removeprefix(part)}"
        return None

    renamed = {key: rename(key) for key in state_dict}
    check_keys(what, unexpected=[key for key, new in renamed.items() if new is None])
    return {new: state_dict[key] for key, new in renamed.items()}


def _depth(state_dict: StateDict, blocks: str) -> int:
    numbers = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", key) for key in state_dict)
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def open_clip_vit_h(state_dict: StateDict) -> tuple[CLIPConfig, StateDict]:
    """
    ViT-H-14 of open_clip as a `CLIPModel`.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Of open_clip's `CLIP`: queries, keys and values in one `in_proj` per block, projections as (width, embedding)
            matrices.

    Returns:
        `tuple[CLIPConfig, dict[str, torch.Tensor]]`: `CLIPModel(config)` takes the tensors without one missing or left.

    Raises:
        ValueError: If tensors are missing or unexpected, or the vision tower is no ViT-H.
    """
    what = "an open_clip ViT-H-14"
    tensors = {}
    for key, tensor in _renamed(state_dict, _OPEN_CLIP, _OPEN_CLIP_BLOCK, what).items():
        if ".attn.in_proj." in key:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                tensors[key.replace("attn.in_proj", f"self_attn.{name}_proj")] = part
        else:
            tensors[key] = tensor.T if key.endswith("_projection.weight") else tensor
    towers = [f"{tower}.encoder.layers.0.mlp.fc1.weight" for tower in ("text_model", "vision_model")]
    needed = ("token_embedding", "position_embedding")
    check_keys(
        what,
        missing={
            *(f"text_model.embeddings.{name}.weight" for name in needed),
            *(f"vision_model.embeddings.{name}.weight" for name in ("patch_embedding", "position_embedding")),
            "text_projection.weight",
            *towers,
        }
        - tensors.keys(),
    )
    text, vision = (
        {
            "hidden_size": tensors[first_mlp].shape[1],
            "intermediate_size": tensors[first_mlp].shape[0],
            "num_hidden_layers": _depth(tensors, first_mlp.split(".0.")[0]),
            # OpenAI's own CLIP has quick_gelu, which is transformers' default.
            "hidden_act": "gelu",
            "projection_dim": tensors["text_projection.weight"].shape[0],
        }
        for first_mlp in towers
    )
    width = vision["hidden_size"]
    if width % _HEAD_WIDTH_VIT_H:
        raise ValueError(f"This open_clip checkpoint has a vision tower of width {width}: expected ViT-H-14's, 1280.")
    vocab_size = len(tensors["text_model.embeddings.token_embedding.weight"])
    patch_size = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
    config = CLIPConfig(
        text_config={
            **text,
            "num_attention_heads": text["hidden_size"] // _HEAD_WIDTH,
            "vocab_size": vocab_size,
            "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
            # open_clip reads the text at its highest token, the last one of the vocabulary, and pads with zeros.
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 0,
        },
        vision_config={
            **vision,
            "num_attention_heads": width // _HEAD_WIDTH_VIT_H,
            "patch_size": patch_size,
            "image_size": patch_size * math.isqrt(positions - 1),
        },
        projection_dim=text["projection_dim"],
    )
    return config, tensors


def blip(state_dict: StateDict) -> tuple[tuple[BlipVisionConfig, StateDict], tuple[BlipTextConfig, StateDict]]:
    """
    Salesforce's BLIP as a `BlipVisionModel` and a `BlipTextModel` without a pooler.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            `visual_encoder.*` and `text_encoder.*`. The projections of BLIP's contrastive loss may be there; they are
            not needed.

    Returns:
        Configuration and tensors of the vision model, and of the text model, which looks at its output.

    Raises:
        ValueError: If tensors are missing or unexpected.
    """
    what = "BLIP"
    # Projections of the contrastive loss, and numbers from 0 that were once saved with the weights.
    unused = re.compile(r"(vision_proj|text_proj)\.(weight|bias)|text_encoder\.embeddings\.position_ids")
    towers = {"visual_encoder": {}, "text_encoder": {}}
    unexpected = []
    for key, tensor in state_dict.items():
        tower, _, rest = key.partition(".")
        if tower in towers and not unused.fullmatch(key):
            towers[tower][rest] = tensor
        elif not unused.fullmatch(key):
            unexpected.append(key)
    check_keys(what, unexpected=unexpected)
    vision = _renamed(towers["visual_encoder"], _BLIP_VISION, _BLIP_BLOCK, what)
    text = towers["text_encoder"]  # already under transformers' names
    fc1, patches, positions = (
        "encoder.layers.0.mlp.fc1.weight",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding",
    )
    intermediate, words, text_positions, cross = (
        "encoder.layer.0.intermediate.dense.weight",
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.0.crossattention.self.key.weight",
    )
    check_keys(
        what,
        missing=[f"visual_encoder: {key}" for key in (fc1, patches, positions) if key not in vision]
        + [f"text_encoder: {key}" for key in (intermediate, words, text_positions, cross) if key not in text],
    )
    patch_size = vision[patches].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=vision[fc1].shape[1],
        intermediate_size=vision[fc1].shape[0],
        num_hidden_layers=_depth(vision, "encoder.layers"),
        num_attention_heads=vision[fc1].shape[1] // _HEAD_WIDTH,
        patch_size=patch_size,
        image_size=patch_size * math.isqrt(vision[positions].shape[1] - 1),
        layer_norm_eps=1e-6,  # of timm's ViT, which BLIP's is; transformers' default is 1e-5
    )
    vocab_size = len(text[words])
    text_config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=text[intermediate].shape[1],
        encoder_hidden_size=text[cross].shape[1],
        intermediate_size=text[intermediate].shape[0],
        num_hidden_layers=_depth(text, "encoder.layer"),
        num_attention_heads=text[intermediate].shape[1] // _HEAD_WIDTH,
        max_position_embeddings=len(text[text_positions]),
        # BERT's vocabulary and two tokens, [DEC] and [ENC].
        bos_token_id=vocab_size - 2,
        sep_token_id=min(102, vocab_size - 1),
        # Without it, the model has no cross-attention.
        is_decoder=True,
    )
    return (vision_config, vision), (text_config, text)


def linear_layers(state_dict: StateDict, what: str) -> nn.Sequential:
    """
    The head of the aesthetic predictor and of ImageReward: linear layers in a row, nothing between them.

    Both were trained with dropout between the layers, which leaves gaps in their numbers.

    Args:
        state_dict (`dict[str, torch.Tensor]`): `layers.0.weight`, `layers.0.bias`, `layers.2.weight` ...
        what (`str`): Whose head it should be, for the error.

    Raises:
        ValueError: If a key has another form, a weight or bias is missing, or the layers do not fit together.
    """
    matches = {key: re.fullmatch(r"layers\.(\d+)\.(weight|bias)", key) for key in state_dict}
    check_keys(what, unexpected=[key for key, match in matches.items() if not match])
    numbers = sorted({int(match[1]) for match in matches.values()}) or [0]
    expected = {f"layers.{number}.{name}" for number in numbers for name in ("weight", "bias")}
    check_keys(what, missing=expected - state_dict.keys())
    weights = [state_dict[f"layers.{number}.weight"] for number in numbers]
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights)]
    if sizes[1:-1] != [weight.shape[1] for weight in weights[1:]] or sizes[-1] != 1:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(
            f"These are not the weights of {what}: expected linear layers down to one number, got {shapes}."
        )
    # Without initial values, which would be drawn from the generator of whoever trains.
    head = nn.Sequential(*(skip_init(nn.Linear, *pair) for pair in zip(sizes, sizes[1:], strict=False)))
    for layer, number in zip(head, numbers, strict=True):
        layer.load_state_dict({name: state_dict[f"layers.{number}.{name}"] for name in ("weight", "bias")})
    return head
