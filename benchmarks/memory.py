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

"""Which settings fit which GPU, computed: real architectures, no weights, no GPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --model sd3.5-medium sdxl --gpu_memory 24 48

Denoiser and VAE have the sizes of the checkpoint and no weights; the trainer's forward and backward pass, executor and
decoder run on shapes alone ([`trl_flow.policy.memory`]). Prompts come from text encoders of the checkpoint's width and of
two layers, and the memory of the whole ones is counted. Nothing here has been measured on a GPU.

Each run begins with the settings `START` and the family's size, guidance and adapter, in bfloat16. Where that does not fit
(with an allowance for the CUDA context and for gaps between allocations), settings change one by one until it does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from trl_flow.policy import FlowPolicy
from trl_flow.policy.memory import (
    ALLOWANCE,
    MemoryEstimate,
    MemoryEstimator,
    MemorySettings,
    make_fit,
    setting_text,
)
from trl_flow.rollout import chain_plan


sys.path.insert(0, str(Path(__file__).parent))

import full_size  # noqa: E402
from full_size import CLIP_G, CLIP_L, FLUX_TRANSFORMER, KL_VAE, SD3_TRANSFORMER, T5_XXL, WAN_TRANSFORMER  # noqa: E402
from tiny.text import qwen2_5_vl, qwen_tokenizer, t5_tokenizer  # noqa: E402


DTYPE = torch.bfloat16
GPUS = (12, 16, 24, 48, 80)
PROMPT = " ".join(["a red circle and two blue square"] * 12)
# Flow-GRPO on two prompts a rollout: 24 samples each, 10 steps, with a reference.
START = MemorySettings(
    plan=chain_plan(10, 24, list(range(9))),
    prompts=2,
    known_prompts=1024,
    rollout_batch_size=24,
    transition_batch_size=8,
    reference=True,
    autocast=DTYPE,
)
# Of the checkpoints' `config.json`.
SD3_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = KL_VAE | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


# The language model of Qwen2.5-VL-7B.
QWEN25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
# What it sees with.
QWEN25_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


def shapes_alone(make: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """A model whose weights have shapes and no content."""
    with init_empty_weights():
        model = make()
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                with mode:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(weight.shape, dtype=DTYPE), requires_grad=False
                    )
    return model.eval()


def text_encoder(kind: type, sizes: dict, small: dict, tokenizer, **ids) -> tuple:
    """Tokenizer, an encoder of the same width with little inside, and the whole one, empty."""
    config = {
        CLIPTextModel: CLIPTextConfig,
        CLIPTextModelWithProjection: CLIPTextConfig,
        T5EncoderModel: T5Config,
        UMT5EncoderModel: UMT5Config,
        Qwen3ForCausalLM: Qwen3Config,
    }[kind]
    with init_empty_weights():
        whole = kind(config(**sizes)).to(DTYPE)
    whole.tie_weights()  # counted once
    return tokenizer, kind(config(**sizes | small | ids)).to(DTYPE).eval(), whole


def clip(kind: type, sizes: dict) -> tuple:
    tokenizer = full_size.tiny_tokenizer()
    tokenizer.model_max_length = 77
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    return text_encoder(kind, sizes, {"intermediate_size": 64, "num_hidden_layers": 2}, tokenizer, **ids)


def t5(kind: type = T5EncoderModel, **sizes) -> tuple:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 512
    return text_encoder(
        kind, T5_XXL | sizes, {"d_ff": 64, "num_layers": 2, "num_heads": 1, "vocab_size": 128}, tokenizer
    )


def kl_vae(mode: FakeTensorMode, scale: float, shift: float | None, sizes: dict = KL_VAE) -> nn.Module:
    return shapes_alone(lambda: AutoencoderKL(**sizes, scaling_factor=scale, shift_factor=shift), mode)


def sd3(mode: FakeTensorMode, sizes: dict) -> tuple[DiffusionPipeline, list[nn.Module]]:
    encoders = [clip(CLIPTextModelWithProjection, CLIP_L), clip(CLIPTextModelWithProjection, CLIP_G), t5()]
    (t1, e1, _), (t2, e2, _), (t3, e3, _) = encoders
    pipeline = StableDiffusion3Pipeline(
        transformer=shapes_alone(lambda: SD3Transformer2DModel(**sizes), mode),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(mode, 1.5305, 0.0609),
        text_encoder=e1,
        tokenizer=t1,
        text_encoder_2=e2,
        tokenizer_2=t2,
        text_encoder_3=e3,
        tokenizer_3=t3,
    )
    return pipeline, [whole for _, _, whole in encoders]


def flux(mode: FakeTensorMode) -> tuple[DiffusionPipeline, list[nn.Module]]:
    encoders = [clip(CLIPTextModel, CLIP_L), t5()]
    (t1, e1, _), (t2, e2, _) = encoders
    pipeline = FluxPipeline(
        transformer=shapes_alone(lambda: FluxTransformer2DModel(**FLUX_TRANSFORMER), mode),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(mode, 0.3611, 0.1159),
        text_encoder=e1,
        tokenizer=t1,
        text_encoder_2=e2,
        tokenizer_2=t2,
    )
    return pipeline, [whole for _, _, whole in encoders]


def sdxl(mode: FakeTensorMode) -> tuple[DiffusionPipeline, list[nn.Module]]:
    encoders = [clip(CLIPTextModel, CLIP_L), clip(CLIPTextModelWithProjection, CLIP_G)]
    (t1, e1, _), (t2, e2, _) = encoders
    pipeline = StableDiffusionXLPipeline(
        unet=shapes_alone(lambda: UNet2DConditionModel(**SDXL_UNET), mode),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        vae=kl_vae(mode, 0.13025, None, SDXL_VAE),
        text_encoder=e1,
        tokenizer=t1,
        text_encoder_2=e2,
        tokenizer_2=t2,
        add_watermarker=False,
    )
    return pipeline, [whole for _, _, whole in encoders]


def wan(mode: FakeTensorMode) -> tuple[DiffusionPipeline, list[nn.Module]]:
    tokenizer, encoder, whole = t5(UMT5EncoderModel, vocab_size=256384)
    pipeline = WanPipeline(
        transformer=shapes_alone(lambda: WanTransformer3DModel(**WAN_TRANSFORMER), mode),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=shapes_alone(AutoencoderKLWan, mode),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return pipeline, [whole]


def z_image(mode: FakeTensorMode) -> tuple[DiffusionPipeline, list[nn.Module]]:
    tokenizer = qwen_tokenizer()
    small = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    _, encoder, whole = text_encoder(
        Qwen3ForCausalLM, QWEN3_4B, small | {"vocab_size": len(tokenizer)}, tokenizer, pad_token_id=0
    )
    pipeline = ZImagePipeline(
        transformer=shapes_alone(ZImageTransformer2DModel, mode),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_vae(mode, 0.3611, 0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return pipeline, [whole]


def qwen_image(mode: FakeTensorMode) -> tuple[DiffusionPipeline, list[nn.Module]]:
    tokenizer, _, tiny = qwen2_5_vl()
    with init_empty_weights():
        whole = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=QWEN25_7B, vision_config=QWEN25_VISION)
        ).to(DTYPE)
    # The same width, and little inside.
    config = tiny.config
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    small = {"hidden_size": QWEN25_7B["hidden_size"], "num_attention_heads": 28, "num_key_value_heads": 4}
    for name, value in (small | {"rope_parameters": rope}).items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = QWEN25_7B["hidden_size"]
    pipeline = QwenImagePipeline(
        transformer=shapes_alone(QwenImageTransformer2DModel, mode),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=shapes_alone(AutoencoderKLQwenImage, mode),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).to(DTYPE).eval(),
        tokenizer=tokenizer,
    )
    return pipeline, [whole]


# How each pipeline is made; its settings; and its denoiser with few layers of each kind, followed by what has one layer more of
# a kind, and how many more the whole one has.
MODELS = {
    "sd3.5-medium": (
        lambda mode: sd3(mode, SD3_TRANSFORMER),
        {},
        SD3_TRANSFORMER | {"num_layers": 3, "dual_attention_layers": (0,)},
        [({"num_layers": 4, "dual_attention_layers": (0, 1)}, 12), ({"num_layers": 4}, 9)],
    ),
    "sd3.5-large": (lambda mode: sd3(mode, SD3_LARGE), {}, SD3_LARGE | {"num_layers": 2}, [({"num_layers": 3}, 36)]),
    "flux.1-dev": (
        flux,
        {},
        FLUX_TRANSFORMER | {"num_layers": 1, "num_single_layers": 1},
        [({"num_layers": 2}, 18), ({"num_single_layers": 2}, 37)],
    ),
    "z-image": (z_image, {"height": 512, "width": 512}, {"n_layers": 2}, [({"n_layers": 3}, 28)]),
    "qwen-image": (qwen_image, {"height": 512, "width": 512}, {"num_layers": 2}, [({"num_layers": 3}, 58)]),
    "wan2.1-1.3b": (wan, {}, WAN_TRANSFORMER | {"num_layers": 2}, [({"num_layers": 3}, 28)]),
    "sdxl": (sdxl, {}, None, []),
}


class ManyLayers(MemoryEstimator):
    """
    Estimates of a denoiser from those with few of its layers: what a phase takes grows evenly with each kind of layer.

    Args:
        policy, conditions, sigmas: Of the whole one.
        few (`MemoryEstimator`): Of one with few layers.
        more (`list[tuple[MemoryEstimator, int]]`): Of those with one layer more, and how many more the whole one has.
    """

    def __init__(self, policy, conditions, sigmas, few: MemoryEstimator, more: list[tuple[MemoryEstimator, int]]):
        super().__init__(policy, conditions, sigmas)
        self.few, self.more = few, more

    def sampling(self, rows: int, settings: MemorySettings) -> int:
        return self._grown("sampling", rows, settings)

    def training(self, rows: int, settings: MemorySettings) -> int:
        return self._grown("training", rows, settings)

    def _grown(self, name: str, rows: int, settings: MemorySettings) -> int:
        few = getattr(self.few, name)(rows, settings)
        return few + sum(count * (getattr(one_more, name)(rows, settings) - few) for one_more, count in self.more)


def make_estimator(name: str) -> MemoryEstimator:
    """Of a model without weights."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    build, arguments, sizes, more = MODELS[name]
    pipeline, encoders = build(mode)
    pipeline.set_progress_bar_config(disable=True)
    parts = dict(pipeline.components)
    policy = FlowPolicy(pipeline, **arguments)
    conditions, sigmas = [policy.encode(PROMPT)], policy.sigmas(10)
    if sizes is None:
        estimator = MemoryEstimator(policy, conditions, sigmas)
    else:

        def with_layers(sizes: dict) -> MemoryEstimator:
            denoiser = shapes_alone(lambda: type(parts["transformer"])(**sizes), mode)
            thin = type(pipeline)(**parts | {"transformer": denoiser})
            return MemoryEstimator(FlowPolicy(thin, **arguments), conditions, sigmas)

        one_more = [(with_layers(sizes | others), count) for others, count in more]
        estimator = ManyLayers(policy, conditions, sigmas, with_layers(sizes), one_more)
    estimator.encoders = dict(enumerate(encoders))
    return estimator


def compute(name: str, gpus: list[float], settings: MemorySettings = START) -> dict:
    """What one model takes, and what it takes to fit each GPU."""
    began = time.process_time()
    estimator = make_estimator(name)
    policy = estimator.policy
    found = estimator.estimate(settings)
    record = {
        "model": name,
        "size": {k: v for k, v in policy.call_arguments.items() if isinstance(v, int)},
        "latents": list(policy.latent_shape),
        "lora_r": policy.family.lora_r,
        "phases_gib": in_gib(found),
        "gpus": [],
    }
    for gib in gpus:
        limit = int(gib * 2**30) - ALLOWANCE
        changes, smaller = make_fit(estimator, settings, limit)
        record["gpus"].append(
            {
                "gib": gib,
                "changes": changes,
                "peak_gib": (smaller.peak + ALLOWANCE) / 2**30,
                "phase": smaller.largest,
                "phases_gib": in_gib(smaller),
                "fits": smaller.peak <= limit,
            }
        )
    record["seconds"] = time.process_time() - began
    return record


def in_gib(found: MemoryEstimate) -> dict[str, dict[str, float]]:
    return {
        phase: {part: round(size / 2**30, 3) for part, size in parts.items()} for phase, parts in found.phases.items()
    }


def table(records: list[dict], gpus: list[float]) -> str:
    """The same as Markdown: of each GPU the changes, and what is needed then."""
    lines = [
        "| model | as it is | " + " | ".join(f"{gib:g} GB" for gib in gpus) + " |",
        "|" + "---|" * (2 + len(gpus)),
    ]
    for record in records:
        needed = max(sum(parts.values()) for parts in record["phases_gib"].values()) + ALLOWANCE / 2**30
        cells = [f"{record['model']}", f"{needed:.0f}"]
        for gpu in record["gpus"]:
            changes = "<br>".join(f"`{name}: {setting_text(value)}`" for name, value in gpu["changes"].items())
            needed = f"{gpu['peak_gib']:.1f}"
            cells.append(f"{changes}<br>{needed}" if gpu["fits"] else f"no: {needed}")
        lines.append("| " + " | ".join(cell.removeprefix("<br>") for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--gpu_memory", nargs="+", type=float, default=list(GPUS), help="GiB of the GPUs")
    parser.add_argument("--output", default="benchmarks/results/memory.json")
    options = parser.parse_args(arguments)
    settings = {name: str(value) for name, value in asdict(replace(START, plan=None)).items() if name != "plan"}
    result = {"torch": torch.__version__, "diffusers": diffusers.__version__, "start": settings, "models": []}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.model:
        result["models"].append(compute(name, options.gpu_memory))
        output.write_text(json.dumps(result, indent=2) + "\n")
        output.with_suffix(".md").write_text(table(result["models"], options.gpu_memory) + "\n")
        print(f"{name}: {result['models'][-1]['seconds']:.0f} s", flush=True)
    print(f"\n{table(result['models'], options.gpu_memory)}\n\n{output}")


if __name__ == "__main__":
    main()
