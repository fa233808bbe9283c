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

"""Tokenizers and text encoders of diffusers pipelines with random weights: one function for each kind of encoder.

Every function returns the tokenizer (or processor) and the encoder. They know a few words and read all others as one
unknown word. Weights are drawn so that other words give visibly other embeddings.
"""

import re

from pipelines import tiny_text_config, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder


WORDS = (
    "a an the of and on in with to is picture photo video image red green blue yellow black white circle square "
    "triangle star cat dog small large one two three four five bad good quality low high system user assistant"
).split()

# What the language models' decoders have in common.
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words(
    special: tuple[str, ...],
    pad_token: str,
    bos_token: str | None = None,
    eos_token: str | None = None,
    chat_template: str | None = None,
    padding_side: str = "right",
    **kwargs,
) -> PreTrainedTokenizerFast:
    """One token a word, run of punctuation marks and line's end: templates have as many tokens as the pipelines think.

    `bos_token` starts every text; `eos_token` ends none.
    """
    special = tuple(dict.fromkeys([*special, pad_token, *(token for token in (bos_token, eos_token) if token)]))
    vocab = {token: number for number, token in enumerate([*special, "<unk>", "\n", *".,:;!?'()-", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Spaces and tabs part words and vanish.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ \t]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"\n|'\w+|\w+|[^\w\s]+"), behavior="isolated"),
        ]
    )
    if bos_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, vocab[bos_token])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token=pad_token,
        bos_token=bos_token,
        eos_token=eos_token,
        chat_template=chat_template,
        padding_side=padding_side,
        model_max_length=kwargs.pop("model_max_length", 4096),
        **kwargs,
    )


def clip(projection: bool = False, max_length: int = 12) -> tuple[CLIPTokenizer, PreTrainedModel]:
    """Embeddings of 16 numbers, at most `max_length` tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = max_length
    config = tiny_text_config(tokenizer)
    config.max_position_embeddings = max_length
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("▁" + word, -1.0) for word in WORDS if len(word) > 1]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz.,:;!?'()-"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0), ("▁a", -2.0), *pieces, *letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)


def _t5_config(tokenizer: T5TokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def t5(**kwargs) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """Embeddings of 16 numbers."""
    tokenizer = t5_tokenizer()
    return tokenizer, T5EncoderModel(T5Config(**(_t5_config(tokenizer) | kwargs))).eval()


def umt5(**kwargs) -> tuple[T5TokenizerFast, UMT5EncoderModel]:
    """Embeddings of 16 numbers."""
    tokenizer = t5_tokenizer()
    return tokenizer, UMT5EncoderModel(UMT5Config(**(_t5_config(tokenizer) | kwargs))).eval()


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for Qwen2TokenizerFast, with its special tokens and a short chat template."""
    return words(QWEN_SPECIAL, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT)


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict:
    pad, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    return {"vocab_size": len(tokenizer), "bos_token_id": pad, "eos_token_id": eos, "pad_token_id": pad}


class Qwen2VLProcessorWithoutVideos(Qwen2VLProcessor):
    """The processor of videos needs torchvision, which the tests do without."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(None) if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen2_5_vl() -> tuple[PreTrainedTokenizerFast, Qwen2VLProcessor, Qwen2_5_VLForConditionalGeneration]:
    """Tokenizer, processor of text and pictures (4 tokens a picture, scaled to 28 x 28), embeddings of 16 numbers."""
    tokenizer = qwen_tokenizer()
    image, video, start, end = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    text = {key: value for key, value in DECODER.items() if key != "head_dim"}
    config = Qwen2_5_VLConfig(
        text_config=text
        | _qwen_ids(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 28 * 28}
    )
    processor = Qwen2VLProcessorWithoutVideos(pictures, tokenizer, None, chat_template=CHAT)
    return tokenizer, processor, Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3(num_hidden_layers: int = 2, **kwargs) -> tuple[PreTrainedTokenizerFast, Qwen3ForCausalLM]:
    """Embeddings of 16 numbers."""
    tokenizer = qwen_tokenizer()
    config = DECODER | _qwen_ids(tokenizer) | {"num_hidden_layers": num_hidden_layers} | kwargs
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**config)).eval()


def mistral3(num_hidden_layers: int = 2) -> tuple[PreTrainedTokenizerFast, Mistral3ForConditionalGeneration]:
    """Embeddings of 16 numbers. The tokenizer stands in for PixtralProcessor, which needs torchvision: text only."""
    template = re.sub(
        r"<\|vision_start\|>.*?<\|vision_end\|>", "[IMG]", CHAT.replace("<|' + part['type'] + '_pad|>", "")
    )
    tokenizer = words(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>")
        + ("<|im_start|>", "<|im_end|>"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=template,
    )
    text = DECODER | {"vocab_size": len(tokenizer), "num_hidden_layers": num_hidden_layers}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        image_size=28,
        patch_size=7,
    )
    config = Mistral3Config(
        text_config=MistralConfig(**text, **ids),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return tokenizer, Mistral3ForConditionalGeneration(config).eval()


def gemma2(**kwargs) -> tuple[PreTrainedTokenizerFast, Gemma2Model]:
    """Embeddings of 16 numbers. The tokenizer stands in for GemmaTokenizerFast."""
    tokenizer = words(("<pad>", "<eos>", "<bos>"), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Gemma2Config(**(DECODER | ids | {"query_pre_attn_scalar": 8} | kwargs))
    return tokenizer, Gemma2Model(config).eval()


def llama(**kwargs) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Embeddings of 16 numbers. The tokenizer has special tokens of Llama 3, among them none just for padding."""
    tokenizer = words(
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        pad_token="<|eot_id|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return tokenizer, LlamaForCausalLM(LlamaConfig(**(DECODER | ids | kwargs))).eval()


def qwen2_5_vl_text() -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLTextModel]:
    """Embeddings of 16 numbers; three layers, because HunyuanVideo 1.5 skips the last two."""
    tokenizer = qwen_tokenizer()
    config = {key: value for key, value in DECODER.items() if key != "head_dim"} | _qwen_ids(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLTextConfig(**(config | {"num_hidden_layers": 3, "rope_parameters": rope}))
    return tokenizer, Qwen2_5_VLTextModel(config).eval()


def byt5() -> tuple[ByT5Tokenizer, T5EncoderModel]:
    """Embeddings of 16 numbers, one token a byte."""
    tokenizer = ByT5Tokenizer()
    return tokenizer, T5EncoderModel(T5Config(**_t5_config(tokenizer))).eval()


def glm() -> tuple[PreTrainedTokenizerFast, GlmModel]:
    """Embeddings of 16 numbers."""
    tokenizer = words(
        ("<|endoftext|>", "[gMASK]", "<sop>"), pad_token="<|endoftext|>", bos_token="[gMASK]", padding_side="left"
    )
    config = GlmConfig(**DECODER, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0, bos_token_id=1)
    return tokenizer, GlmModel(config).eval()


def _gemma_tokenizer(padding_side: str) -> tuple[PreTrainedTokenizerFast, dict]:
    tokenizer = words(
        ("<pad>", "<eos>", "<bos>"),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=padding_side,
        model_max_length=32,
    )
    return tokenizer, {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def gemma() -> tuple[PreTrainedTokenizerFast, GemmaModel]:
    """Embeddings of 16 numbers. The tokenizer stands in for GemmaTokenizerFast."""
    tokenizer, ids = _gemma_tokenizer(padding_side="left")
    return tokenizer, GemmaModel(GemmaConfig(**(DECODER | ids))).eval()


def t5gemma() -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Embeddings of 16 numbers: the encoder alone. The tokenizer stands in for GemmaTokenizerFast."""
    tokenizer, ids = _gemma_tokenizer(padding_side="right")
    half = DECODER | ids | {"query_pre_attn_scalar": 8}
    config = T5GemmaConfig(encoder=half, decoder=half | {"cross_attention_hidden_size": 16}, dropout_rate=0.0)
    return tokenizer, T5GemmaModel(config).encoder.eval()


def smollm3(**kwargs) -> tuple[PreTrainedTokenizerFast, SmolLM3ForCausalLM]:
    """Embeddings of 8 numbers: BRIA's FIBO gives an empty prompt the token 128000, hence so large a vocabulary."""
    tokenizer = words(
        ("<|end_of_text|>", "<|begin_of_text|>"), pad_token="<|end_of_text|>", bos_token="<|begin_of_text|>"
    )
    ids = {"vocab_size": 128001, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1}
    config = DECODER | ids | {"hidden_size": 8, "head_dim": 4} | kwargs
    return tokenizer, SmolLM3ForCausalLM(SmolLM3Config(**config)).eval()


class Qwen3VLProcessorWithoutVideos(Qwen3VLProcessor):
    """The processor of videos needs torchvision, which the tests do without."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(None) if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen3_vl(
    num_hidden_layers: int = 2,
) -> tuple[PreTrainedTokenizerFast, Qwen3VLProcessor, Qwen3VLForConditionalGeneration]:
    """Tokenizer, processor of text and pictures (as many as 4 tokens each), embeddings of 16 numbers."""
    tokenizer = qwen_tokenizer()
    image, video, start, end = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1]}
    text = DECODER | _qwen_ids(tokenizer) | {"num_hidden_layers": num_hidden_layers, "rope_parameters": rope}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )
    processor = Qwen3VLProcessorWithoutVideos(pictures, tokenizer, None, chat_template=CHAT)
    return tokenizer, processor, Qwen3VLForConditionalGeneration(config).eval()


def llava() -> tuple[PreTrainedTokenizerFast, CLIPImageProcessorPil, LlavaForConditionalGeneration]:
    """Tokenizer, image processor, and HunyuanVideo's encoder of text and of a picture in its 576 tokens."""
    special = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>", "<pad>")
    tokenizer = words(special, pad_token="<pad>", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    image, pad = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    language = LlamaConfig(**(DECODER | {"vocab_size": len(tokenizer), "pad_token_id": pad, "num_hidden_layers": 3}))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
    )
    config = LlavaConfig(text_config=language, vision_config=vision, image_token_index=image, pad_token_id=pad)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    return tokenizer, processor, LlavaForConditionalGeneration(config).eval()


def glm_image() -> tuple[GlmImageProcessor, GlmImageForConditionalGeneration]:
    """Processor and the language model that plans pictures, in 32 visual words, the first of its vocabulary."""
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<|image|>' }}{% endfor %}{% endfor %}"
    )
    visual = tuple(f"<|visual_{number}|>" for number in range(32))
    tokenizer = words(
        (*visual, "<|endoftext|>", "<|image|>", "<sop>", "<eop>", "<|dit_token_start|>", *QWEN_SPECIAL[1:3]),
        pad_token="<|endoftext|>",
        bos_token="<|dit_token_start|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    config = GlmImageConfig(
        text_config={key: value for key, value in DECODER.items() if key != "head_dim"}
        | {"vocab_size": len(tokenizer), "vision_vocab_size": 32, "pad_token_id": 32, "eos_token_id": None}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 16, "num_embeddings": 32, "latent_channels": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=30,
        image_end_token_id=31,
    )
    processor = GlmImageProcessor(GlmImageImageProcessorPil(patch_size=8), tokenizer, chat_template=template)
    model = GlmImageForConditionalGeneration(config).eval()
    # The plan proper comes after 256 words of a preview, which would wash the prompt out: blind to its own words, and
    # with sharp attention and decided answers, the model keeps to the prompt.
    model.get_input_embeddings().weight.data[:32] = 0.0
    model.lm_head.weight.data.mul_(4.0)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.mul_(3.0)
        layer.self_attn.k_proj.weight.data.mul_(3.0)
    return processor, model


def gemma3() -> tuple[PreTrainedTokenizerFast, Gemma3ForConditionalGeneration]:
    """Embeddings of 16 numbers in 3 layers with the words' own, as LTX-2 takes all of them."""
    tokenizer, ids = _gemma_tokenizer("left")
    config = Gemma3Config(
        text_config=DECODER | ids | {"query_pre_attn_scalar": 8, "sliding_window": 16},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
    )
    return tokenizer, Gemma3ForConditionalGeneration(config).eval()


def t5gemma2() -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Embeddings of 16 numbers, with a vision tower for pictures of 8 x 8."""
    tokenizer, ids = _gemma_tokenizer("right")
    config = T5Gemma2EncoderConfig(
        text_config=DECODER | ids | {"query_pre_attn_scalar": 8, "sliding_window": 16, "dropout_rate": 0.0},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
    )
    return tokenizer, T5Gemma2Encoder(config).eval()
