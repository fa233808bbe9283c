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

"""Time and memory of an update at real sizes, without a download: real architectures, random weights.

    python benchmarks/full_size.py --model sd3.5-medium --method dense-grpo --gradient_checkpointing
    python benchmarks/full_size.py --model all --method all --gradient_checkpointing --compile
    python benchmarks/full_size.py --model all --method all --dtype float32 --tiny --output tiny.json

Denoiser, VAE and text encoders have the sizes of the checkpoint (`--small_text_encoders` keeps their width and one layer of
each); only the tokenizers are small ones, padded to the same number of tokens. The weights are drawn on the device. Each
run trains updates of one prompt with the trainer's own loop and a reward that costs next to nothing (redness). The first
update pays for compilation and the choice of kernels, and for encoding the prompt's layout: what is reported is the last.

Phases are the trainer's `time/*`: rollout, decode, reward, train. `images` counts everything that was decoded, also the ends
of tails. What did not fit is recorded as that.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import peft
import torch
import transformers
import trl
from accelerate import init_empty_weights
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import trl_flow
from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, G2RPOConfig, G2RPOTrainer


# The tokenizers, with a vocabulary of a few words, are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipelines import tiny_tokenizer  # noqa: E402
from tiny.text import t5_tokenizer  # noqa: E402


METHODS = {"dense-grpo": (DenseGRPOTrainer, DenseGRPOConfig), "g2rpo": (G2RPOTrainer, G2RPOConfig)}
PROMPTS = ["a red circle", "two green square", "three blue circle", "a blue cat"]
PHASES = ("rollout", "decode", "reward", "train")

# Sizes as in the `config.json` of the checkpoints; of the tiny ones, what differs.
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TINY_CLIP = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
TINY_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TINY_SD3_TRANSFORMER = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
FLUX_TRANSFORMER = {"guidance_embeds": True}
TINY_FLUX_TRANSFORMER = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
WAN_TRANSFORMER = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
TINY_WAN_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
KL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_KL_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
TINY_WAN_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}

# Settings of a run: those of the published configurations, and tiny ones.
SETTINGS = {
    "sd3.5-medium": {
        "num_inference_steps": 10,
        "num_generations": 24,
        "height": 512,
        "width": 512,
        "max_sequence_length": 128,
        "guidance_scale": 4.5,
        "rollout_batch_size": 48,
        "transition_batch_size": 8,
    },
    "flux.1-dev": {
        "num_inference_steps": 6,
        "num_generations": 24,
        "height": 512,
        "width": 512,
        "max_sequence_length": 128,
        "guidance_scale": 3.5,
        "noise_level": 0.9,
        "rollout_batch_size": 24,
        "transition_batch_size": 4,
    },
    "wan2.1-1.3b": {
        "num_inference_steps": 10,
        "num_generations": 4,
        "height": 240,
        "width": 416,
        "num_frames": 33,
        "guidance_scale": 4.5,
        "sde_type": "dance",
        "noise_level": 0.7,
        "rollout_batch_size": 8,
        "transition_batch_size": 4,
    },
}
TINY_SETTINGS = {
    "num_inference_steps": 4,
    "num_generations": 3,
    "height": 32,
    "width": 32,
    "max_sequence_length": 8,
}


def random_module(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """
    A module whose weights are drawn where and as they are needed: never in float32, never on the CPU.

    Matrices keep the size of what they are given and norms are 1, so that pictures differ: a group of equal rewards would
    train on nothing.
    """
    with init_empty_weights():  # parameters only: buffers are computed as usual
        module = make()
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    # What diffusers keeps in float32 when it loads a checkpoint in another precision.
    keep = (
        set(getattr(module, "_keep_in_fp32_modules", None) or ()) if isinstance(module, diffusers.ModelMixin) else ()
    )
    drawn = {}
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in drawn:
                precise = any(word in keep for word in f"{prefix}.{name}".split("."))
                values = torch.empty(parameter.shape, device=device, dtype=torch.float32 if precise else dtype)
                if values.squeeze().ndim >= 2:
                    values.normal_(0.0, values[0].numel() ** -0.5)
                else:
                    values.fill_(0.0 if "bias" in name else 1.0)
                drawn[id(parameter)] = parameter, nn.Parameter(values, requires_grad=False)
            part.register_parameter(name, drawn[id(parameter)][1])
        for name, buffer in part.named_buffers(recurse=False):
            # Those that a checkpoint holds are loaded in its precision, as SD3's table of positions.
            if buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                part.register_buffer(name, buffer.to(dtype))
    return module.to(device).eval()


def text_encoder(kind: type, config: type, sizes: dict, tiny_sizes: dict, options: argparse.Namespace) -> tuple:
    """Tokenizer and encoder."""
    layers = "num_hidden_layers" if "num_hidden_layers" in sizes else "num_layers"
    sizes = sizes | (tiny_sizes if options.tiny else {layers: 1} if options.small_text_encoders else {})
    if config is CLIPTextConfig:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 77
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    else:
        tokenizer, ids = t5_tokenizer(), {}
        tokenizer.model_max_length = 512
    encoder = random_module(lambda: kind(config(**sizes, **ids)), options.device, options.torch_dtype)
    return tokenizer, encoder


def model(kind: type, sizes: dict, tiny_sizes: dict, options: argparse.Namespace) -> nn.Module:
    sizes = sizes | (tiny_sizes if options.tiny else {})
    return random_module(lambda: kind(**sizes), options.device, options.torch_dtype)


def sd3(options: argparse.Namespace) -> StableDiffusion3Pipeline:
    tokenizer, clip_l = text_encoder(CLIPTextModelWithProjection, CLIPTextConfig, CLIP_L, TINY_CLIP, options)
    tokenizer_2, clip_g = text_encoder(CLIPTextModelWithProjection, CLIPTextConfig, CLIP_G, TINY_CLIP, options)
    tokenizer_3, t5 = text_encoder(T5EncoderModel, T5Config, T5_XXL, TINY_T5, options)
    return StableDiffusion3Pipeline(
        transformer=model(SD3Transformer2DModel, SD3_TRANSFORMER, TINY_SD3_TRANSFORMER, options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=model(AutoencoderKL, KL_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, TINY_KL_VAE, options),
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=clip_g,
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )


def flux(options: argparse.Namespace) -> FluxPipeline:
    tokenizer, clip_l = text_encoder(CLIPTextModel, CLIPTextConfig, CLIP_L, TINY_CLIP, options)
    tokenizer_2, t5 = text_encoder(T5EncoderModel, T5Config, T5_XXL, TINY_T5, options)
    return FluxPipeline(
        transformer=model(FluxTransformer2DModel, FLUX_TRANSFORMER, TINY_FLUX_TRANSFORMER, options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=model(AutoencoderKL, KL_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, TINY_KL_VAE, options),
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
    )


def wan(options: argparse.Namespace) -> WanPipeline:
    sizes = T5_XXL | {"vocab_size": 256384}
    tokenizer, umt5 = text_encoder(UMT5EncoderModel, UMT5Config, sizes, TINY_T5, options)
    return WanPipeline(
        transformer=model(WanTransformer3DModel, WAN_TRANSFORMER, TINY_WAN_TRANSFORMER, options),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=model(AutoencoderKLWan, {}, TINY_WAN_VAE, options),
        text_encoder=umt5,
        tokenizer=tokenizer,
    )


MODELS = {"sd3.5-medium": sd3, "flux.1-dev": flux, "wan2.1-1.3b": wan}


def redness(images, **kwargs) -> list[float]:
    """Mean red of a picture above the mean of the other colours."""
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    return [float(array[..., 0].mean() - array[..., 1:].mean()) for array in arrays]


def settings(name: str, options: argparse.Namespace) -> dict:
    """Settings of the trainer: the model's, tiny ones, and what the command line says."""
    chosen = SETTINGS[name] | (TINY_SETTINGS if options.tiny else {})
    if options.tiny and "num_frames" in chosen:
        chosen["num_frames"] = 5
    given = (*TINY_SETTINGS, "num_frames", "rollout_batch_size", "transition_batch_size")
    return chosen | {k: getattr(options, k) for k in given if getattr(options, k, None) is not None}


def compile_blocks(denoiser: nn.Module):
    """diffusers' regional compilation, and the same where a model does not say what its blocks are."""
    # One graph each for blocks of different kinds, numbers of rows, sampling and training; 8 would be refused at.
    torch._dynamo.config.recompile_limit = 64
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(fullgraph=True)
    else:
        for block in denoiser.transformer_blocks:
            block.compile(fullgraph=True)


def parameters(pipeline: DiffusionPipeline) -> dict[str, int]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}


def train(name: str, method: str, options: argparse.Namespace) -> dict:
    """One run: a record of its settings, times and memory."""
    on_gpu = options.device == "cuda"
    began = time.perf_counter()
    torch.manual_seed(0)
    pipeline = MODELS[name](options)
    pipeline.set_progress_bar_config(disable=True)
    record = {"model": name, "method": method, "settings": settings(name, options)}
    record["parameters"] = parameters(pipeline)
    if on_gpu:
        torch.cuda.synchronize()
        record["weights_gib"] = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    record["seconds_to_build"] = time.perf_counter() - began
    trainer_class, config_class = METHODS[method]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            pipeline,
            redness,
            config_class(
                output_dir=output_dir,
                max_steps=options.max_steps,
                per_device_train_batch_size=1,
                beta=0.0,
                use_cpu=not on_gpu,
                bf16=on_gpu and options.torch_dtype == torch.bfloat16,
                activation_checkpointing=options.gradient_checkpointing,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **record["settings"],
            ),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )
        record["trained_parameters"] = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
        if options.compile:
            for component in trainer.policy.components:
                compile_blocks(getattr(pipeline, component))
        trainer.train()
    updates = [entry for entry in trainer.state.log_history if "time/rollout" in entry]
    record["updates"] = [
        {
            "seconds": {phase: entry[f"time/{phase}"] for phase in PHASES},
            "evaluations": entry["nfe"] - before["nfe"],
            "rows_trained": entry["rows_trained"] - before["rows_trained"],
            "images": round(entry["images_per_second"] * sum(entry[f"time/{phase}"] for phase in PHASES[:3])),
        }
        for before, entry in zip([{"nfe": 0, "rows_trained": 0}, *updates], updates, strict=False)
    ]
    last = record["updates"][-1]
    record["seconds_per_update"] = sum(last["seconds"].values())
    record["images_per_second"] = last["images"] / sum(last["seconds"][phase] for phase in PHASES[:3])
    record["evaluations_per_second"] = last["evaluations"] / (last["seconds"]["rollout"] + last["seconds"]["train"])
    if on_gpu:
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record


def table(records: list[dict]) -> str:
    columns = ("model", "method", *PHASES, "update", "evaluations", "images", "images/s", "weights GiB", "peak GiB")
    rows = [columns]
    for record in records:
        row = [record["model"], record["method"]]
        if "error" in record:
            rows.append((*row, record["error"]))
            continue
        last = record["updates"][-1]
        seconds = [last["seconds"][phase] for phase in PHASES] + [record["seconds_per_update"]]
        memory = [f"{record[key]:.1f}" if key in record else "-" for key in ("weights_gib", "peak_gib")]
        row += [f"{value:.2f}" for value in seconds]
        row += [str(last["evaluations"]), str(last["images"]), f"{record['images_per_second']:.2f}", *memory]
        rows.append(tuple(row))
    full = [row for row in rows if len(row) == len(columns)]
    widths = [max(len(row[i]) for row in full) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)


def machine(options: argparse.Namespace) -> dict:
    libraries = (torch, diffusers, transformers, peft, accelerate, trl, trl_flow)
    return {
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{library.__name__: library.__version__ for library in libraries},
    }


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["all"], choices=[*MODELS, "all"])
    parser.add_argument("--method", nargs="+", default=["all"], choices=[*METHODS, "all"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks")
    parser.add_argument("--small_text_encoders", action="store_true", help="one layer of each text encoder")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, so that it runs on a CPU in seconds")
    parser.add_argument("--max_steps", type=int, default=2, help="updates, of which the last one is reported")
    for name in (*TINY_SETTINGS, "num_frames", "rollout_batch_size", "transition_batch_size"):
        parser.add_argument(f"--{name}", type=int, help="default: that of the model's published configuration")
    parser.add_argument("--output", default="benchmarks/results/full_size.json")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.torch_dtype = getattr(torch, options.dtype)
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no GPU here: expected --tiny on a CPU.")

    names = list(MODELS) if "all" in options.model else options.model
    methods = list(METHODS) if "all" in options.method else options.method
    flags = ("dtype", "gradient_checkpointing", "compile", "small_text_encoders", "tiny")
    result = {**machine(options), **{flag: getattr(options, flag) for flag in flags}, "runs": []}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for method in methods:
            try:
                record = train(name, method, options)
            except torch.OutOfMemoryError as error:
                record = {"model": name, "method": method, "error": f"out of memory: {error}".splitlines()[0]}
            # What the next run is to have for itself.
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            result["runs"].append(record)
            # After each run: a later one may take the process with it.
            output.write_text(json.dumps(result, indent=2) + "\n")
            print(table([record]), flush=True)
    print(f"\n{table(result['runs'])}\n\n{output}")


if __name__ == "__main__":
    main()
