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

"""Original models of checkpoints that are converted, tiny, as their authors wrote them: independent of what is tested."""

import math
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value, norms and biases too, so that no two can be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * noise if is_norm else noise / math.sqrt(max(8, parameter.shape[-1:].numel())))
    return module.eval()


class OpenCLIPBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 96), gelu=nn.GELU(), c_proj=nn.Linear(96, width)))

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPTransformer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenCLIPBlock(width, heads) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIPVision(nn.Module):
    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + 4, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenCLIPTransformer(width, heads=width // 80)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's `CLIP` with a ViT-H's head widths (80 and 64), for pictures of 28 pixels and texts of 16 tokens."""

    def __init__(self, vocab_size: int = 514, vision_width: int = 160):
        super().__init__()
        self.visual = OpenCLIPVision(vision_width, embedding=24)
        self.transformer = OpenCLIPTransformer(128, heads=2)
        self.token_embedding = nn.Embedding(vocab_size, 128)
        self.positional_embedding = nn.Parameter(torch.zeros(16, 128))
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.zeros(128, 24))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def encode_text(self, text):
        length = text.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=self.text_projection.dtype).triu(1)
        x = self.transformer(self.token_embedding(text) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection


class TimmAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / 8).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, t, width))


class TimmBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = TimmAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 96), act=nn.GELU(), fc2=nn.Linear(96, width)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmVision(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 4, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(TimmBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MedAttention(nn.Module):
    def __init__(self, width: int, seen: int):
        super().__init__()
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, seen, mask=None):
        def heads(name, y):
            return self.self[name](y).unflatten(-1, (-1, 64)).transpose(1, 2)

        logits = heads("query", x) @ heads("key", seen).transpose(-1, -2) / 8
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None].bool(), -math.inf)
        y = (logits.softmax(-1) @ heads("value", seen)).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](self.output["dense"](y) + x)


class MedLayer(nn.Module):
    def __init__(self, width: int, seen: int):
        super().__init__()
        self.attention = MedAttention(width, width)
        self.crossattention = MedAttention(width, seen)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 80)})
        self.output = nn.ModuleDict({"dense": nn.Linear(80, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, mask, seen):
        x = self.crossattention(self.attention(x, x, mask), seen)
        y = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](y) + x)


class Med(nn.Module):
    """BLIP's text tower: BERT, which looks at a picture after each self-attention."""

    def __init__(self, vocab_size: int, width: int, seen: int):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab_size, width),
                "position_embeddings": nn.Embedding(40, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(MedLayer(width, seen) for _ in range(2))})

    def forward(self, input_ids, mask, seen):
        e = self.embeddings
        x = e["word_embeddings"](input_ids) + e["position_embeddings"].weight[: input_ids.shape[1]]
        x = e["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, seen)
        return x


class OriginalImageReward(nn.Module):
    """ImageReward as published, for pictures of 32 pixels."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": TimmVision(128),
                "text_encoder": Med(vocab_size, width=64, seen=128),
                "vision_proj": nn.Linear(128, 8),
                "text_proj": nn.Linear(64, 8),
            }
        )
        self.mlp = nn.ModuleDict({"layers": published_head(64)})

    def forward(self, pixel_values, input_ids, mask):
        seen = self.blip["visual_encoder"](pixel_values)
        first = self.blip["text_encoder"](input_ids, mask, seen)[:, 0]
        return (self.mlp["layers"](first)[:, 0] - 0.16717362830052426) / 1.0333394966054072


def published_head(width: int) -> nn.Sequential:
    """Layers of the aesthetic predictor and of ImageReward, dropout and all."""
    return nn.Sequential(
        nn.Linear(width, 20),
        nn.Dropout(0.2),
        nn.Linear(20, 12),
        nn.Dropout(0.2),
        nn.Linear(12, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    )


def clip_processor(side: int) -> CLIPProcessor:
    """Every byte is a token, alone and at the end of a word: 514 tokens. Pictures become `side` pixels square."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def save_clip(directory, seed: int = 0) -> str:
    """A tiny `CLIPModel` for pictures of 28 pixels, and its processor."""
    tower = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 514,
            "max_position_embeddings": 20,
            "bos_token_id": 512,
            "eos_token_id": 513,
        },
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=24,
    )
    model = shaken(CLIPModel(config), seed)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(directory)
    clip_processor(28).save_pretrained(directory)
    return str(directory)


def bert_tokenizer() -> BertTokenizer:
    """Every letter is a token, at the beginning of a word and within."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, side: int) -> torch.Tensor:
    """Shorter edge to `side`, middle cut out, in standard deviations: `(3, side, side)`, float64."""
    factor = side / min(image.size)
    width, height = (int(edge * factor + 1e-9) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return in_deviations(image.crop((left, top, left + side, top + side)))


def in_deviations(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy((np.asarray(image.convert("RGB")) / 255 - MEAN) / STD).permute(2, 0, 1)
