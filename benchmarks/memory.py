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
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from architectures import (
    CLIP_G,
    CLIP_L,
    FLUX_TRANSFORMER,
    KL_VAE,
    SD3_TRANSFORMER,
    WAN_TRANSFORMER,
    flux,
    sd3,
    text_parts,
    wan,
)
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny.text import qwen2_5_vl  # of the tests, to which `architectures` leads
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
    UMT5Config,
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
SDXL_VAE = KL_VAE | {
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.13025,
    "shift_factor": None,
}
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


# Of each kind of text encoder, what is little inside, at the checkpoint's width.
SMALL = {
    CLIPTextConfig: {"intermediate_size": 64, "num_hidden_layers": 2},
    Qwen3Config: {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
    T5Config: {"d_ff": 64, "num_layers": 2, "num_heads": 1},
    UMT5Config: {"d_ff": 64, "num_layers": 2, "num_heads": 1},
}


class Makers:
    """
    What makes models and text encoders, as [`architectures`] asks for them.

    Args:
        mode (`FakeTensorMode`): Of the tensors without content.

    Attributes:
        whole (`list[nn.Module]`): The text encoders in their full size, empty.
    """

    def __init__(self, mode: FakeTensorMode):
        self.mode, self.whole = mode, []

    def model(self, kind: type, sizes: dict) -> nn.Module:
        return shapes_alone(lambda: kind(**sizes), self.mode)

    def text_encoder(self, kind: type, sizes: dict) -> tuple:
        """Tokenizer, and an encoder of the same width with little inside."""
        tokenizer, config, ids = text_parts(kind)
        self.keep_whole(lambda: kind(config(**sizes)))
        small = sizes | SMALL[config] | ids | {"vocab_size": len(tokenizer)}
        return tokenizer, kind(config(**small)).to(DTYPE).eval()

    def keep_whole(self, make: Callable[[], nn.Module]):
        with init_empty_weights():
            whole = make().to(DTYPE)
        whole.tie_weights()  # counted once
        self.whole.append(whole)


def sdxl(make: Makers) -> DiffusionPipeline:
    tokenizer, clip_l = make.text_encoder(CLIPTextModel, CLIP_L)
    tokenizer_2, clip_g = make.text_encoder(CLIPTextModelWithProjection, CLIP_G)
    return StableDiffusionXLPipeline(
        unet=make.model(UNet2DConditionModel, SDXL_UNET),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        vae=make.model(AutoencoderKL, SDXL_VAE),
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=clip_g,
        tokenizer_2=tokenizer_2,
        add_watermarker=False,
    )


def z_image(make: Makers) -> DiffusionPipeline:
    tokenizer, encoder = make.text_encoder(Qwen3ForCausalLM, QWEN3_4B)
    return ZImagePipeline(
        transformer=make.model(ZImageTransformer2DModel, {}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=make.model(AutoencoderKL, KL_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def qwen_image(make: Makers) -> DiffusionPipeline:
    tokenizer, _, tiny = qwen2_5_vl()
    sizes = Qwen2_5_VLConfig(text_config=QWEN25_7B, vision_config=QWEN25_VISION)
    make.keep_whole(lambda: Qwen2_5_VLForConditionalGeneration(sizes))
    # The same width, and little inside.
    config = tiny.config
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    small = {"hidden_size": QWEN25_7B["hidden_size"], "num_attention_heads": 28, "num_key_value_heads": 4}
    for name, value in (small | {"rope_parameters": rope}).items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = QWEN25_7B["hidden_size"]
    return QwenImagePipeline(
        transformer=make.model(QwenImageTransformer2DModel, {}),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=make.model(AutoencoderKLQwenImage, {}),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).to(DTYPE).eval(),
        tokenizer=tokenizer,
    )


# How each pipeline is made; its settings; and its denoiser with few layers of each kind, followed by what has one layer more of
# a kind, and how many more the whole one has.
MODELS = {
    "sd3.5-medium": (
        sd3,
        {},
        SD3_TRANSFORMER | {"num_layers": 3, "dual_attention_layers": (0,)},
        [({"num_layers": 4, "dual_attention_layers": (0, 1)}, 12), ({"num_layers": 4}, 9)],
    ),
    "sd3.5-large": (lambda make: sd3(make, SD3_LARGE), {}, SD3_LARGE | {"num_layers": 2}, [({"num_layers": 3}, 36)]),
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
    make = Makers(FakeTensorMode(allow_non_fake_inputs=True))
    build, arguments, sizes, more = MODELS[name]
    pipeline = build(make)
    pipeline.set_progress_bar_config(disable=True)
    parts = dict(pipeline.components)
    policy = FlowPolicy(pipeline, **arguments)
    conditions, sigmas = [policy.encode(PROMPT)], policy.sigmas(10)
    if sizes is None:
        estimator = MemoryEstimator(policy, conditions, sigmas)
    else:

        def with_layers(sizes: dict) -> MemoryEstimator:
            denoiser = make.model(type(parts["transformer"]), sizes)
            thin = type(pipeline)(**parts | {"transformer": denoiser})
            return MemoryEstimator(FlowPolicy(thin, **arguments), conditions, sigmas)

        one_more = [(with_layers(sizes | others), count) for others, count in more]
        estimator = ManyLayers(policy, conditions, sigmas, with_layers(sizes), one_more)
    estimator.encoders = dict(enumerate(make.whole))
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
