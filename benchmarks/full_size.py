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
    python benchmarks/full_size.py --model all --method all --dtype float32 --tiny --output tiny

Denoiser, VAE and text encoders have the sizes of the checkpoint (`--small_text_encoders` keeps their width and one layer of
each); only the tokenizers are small ones, padded to the same number of tokens. The weights are drawn on the device. Each
run trains updates of one prompt with the trainer's own loop and a reward that costs next to nothing (redness). The first
update pays for compilation and the choice of kernels, and for encoding the prompt's layout: what is reported is the last.

Phases are the trainer's `time/*`: rollout, decode, reward, train. `images` counts everything that was decoded, also the ends
of tails; samples are the chains or branches of a group, and samples/s is taken of the whole update. The share of the matmul rate
is the denoiser's floating-point operations, counted by torch for one row of each kind that is really computed (what activation
checkpointing repeats is not counted, and takes its time all the same), over the time of sampling and training, in parts of the
rate that products of large matrices reach here. What did not fit is recorded as that.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import measuring
import numpy as np
import torch
from accelerate import init_empty_weights
from architectures import flux, sd3, text_parts, wan
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPTextConfig, T5Config, UMT5Config

from trl_flow import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    FlowGRPOConfig,
    FlowGRPOFastConfig,
    FlowGRPOFastTrainer,
    FlowGRPOTrainer,
    G2RPOConfig,
    G2RPOTrainer,
)


METHODS = {
    "flow-grpo": (FlowGRPOTrainer, FlowGRPOConfig, {}),
    # A window of two steps, which are all that is trained.
    "flow-grpo-fast": (FlowGRPOFastTrainer, FlowGRPOFastConfig, {"sde_window_size": 2}),
    "dense-grpo": (DenseGRPOTrainer, DenseGRPOConfig, {}),
    "g2rpo": (G2RPOTrainer, G2RPOConfig, {}),
}
# Where a method's paper wants other settings of a model.
OF_METHODS = {("sd3.5-medium", "flow-grpo-fast"): {"guidance_scale": 1.0}}
# Public figures of others, to stand beside ours. The rollouts of both are a serving engine's.
REFERENCES = [
    {"model": "SD3.5 Medium", "method": "window of 2", "gpu": "H200", "images_per_second": 1.08},
    {"model": "Qwen-Image, without guidance", "method": "window of 2", "gpu": "H200", "images_per_second": 0.51},
]
PROMPTS = ["a red circle", "two green square", "three blue circle", "a blue cat"]
PHASES = ("rollout", "decode", "reward", "train")

TINY_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
# Of the tiny models, the sizes that differ from the checkpoints'.
TINY = {
    CLIPTextConfig: {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
    T5Config: TINY_T5,
    UMT5Config: TINY_T5,
    SD3Transformer2DModel: {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
    },
    FluxTransformer2DModel: {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    },
    WanTransformer3DModel: {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    AutoencoderKL: {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    AutoencoderKLWan: {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
}

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


class Makers:
    """What makes models and text encoders, as [`architectures`] asks for them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options

    def draw(self, make: Callable[[], nn.Module]) -> nn.Module:
        return random_module(make, self.options.device, self.options.torch_dtype)

    def model(self, kind: type, sizes: dict) -> nn.Module:
        sizes = sizes | (TINY[kind] if self.options.tiny else {})
        return self.draw(lambda: kind(**sizes))

    def text_encoder(self, kind: type, sizes: dict) -> tuple:
        tokenizer, config, ids = text_parts(kind)
        layers = {"num_hidden_layers" if "num_hidden_layers" in sizes else "num_layers": 1}
        sizes = sizes | (TINY[config] if self.options.tiny else layers if self.options.small_text_encoders else {})
        return tokenizer, self.draw(lambda: kind(config(**sizes, **ids)))


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


def parameters(pipeline: DiffusionPipeline) -> dict[str, int]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}


def row_operations(trainer) -> dict[str, int]:
    """Floating-point operations of an evaluation and of a trained row, with guidance, by doing one of each."""
    policy = trainer.policy
    conditioning = policy.conditioning(PROMPTS[:1])
    latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
    sigma = trainer.sigmas[1].item()

    def velocity():
        with trainer.accelerator.autocast():
            return policy(latents, sigma, conditioning)

    with torch.no_grad():
        evaluation = measuring.operations(velocity)
    trained = measuring.operations(lambda: velocity().mean().backward())
    policy.zero_grad()
    return {"evaluation": evaluation, "trained": trained}


def train(name: str, method: str, options: argparse.Namespace) -> dict:
    """One run: a record of its settings, times and memory."""
    on_gpu = options.device == "cuda"
    began = time.perf_counter()
    torch.manual_seed(0)
    pipeline = MODELS[name](Makers(options))
    pipeline.set_progress_bar_config(disable=True)
    trainer_class, config_class, of_method = METHODS[method]
    record = {"model": name, "method": method, "settings": settings(name, options) | of_method}
    record["settings"] |= OF_METHODS.get((name, method), {})
    record["parameters"] = parameters(pipeline)
    if on_gpu:
        torch.cuda.synchronize()
        record["weights_gib"] = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    record["seconds_to_build"] = time.perf_counter() - began
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
        record["operations_per_row"] = row_operations(trainer)
        if options.compile:
            trainer.policy.compile(fullgraph=True)
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
    record["samples_per_second"] = record["settings"]["num_generations"] / record["seconds_per_update"]
    per_row = record["operations_per_row"]
    sampled = last["evaluations"] - last["rows_trained"]
    record["operations"] = sampled * per_row["evaluation"] + last["rows_trained"] * per_row["trained"]
    busy = last["seconds"]["rollout"] + last["seconds"]["train"]
    record["share_of_matmul_rate"] = record["operations"] / busy / options.matmul_rate
    record["evaluations_per_second"] = last["evaluations"] / (last["seconds"]["rollout"] + last["seconds"]["train"])
    if on_gpu:
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record


COLUMNS = (
    "model",
    "method",
    *PHASES,
    "update",
    "evaluations",
    "images",
    "images/s",
    "samples/s",
    "matmul share",
    "weights GiB",
    "peak GiB",
)


def cells(record: dict) -> list[str]:
    names = [record["model"], record["method"]]
    if "error" in record:
        return [*names, record["error"], *[""] * (len(COLUMNS) - 3)]
    last = record["updates"][-1]
    seconds = [*(last["seconds"][phase] for phase in PHASES), record["seconds_per_update"]]
    rates = [record["images_per_second"], record["samples_per_second"]]
    return [
        *names,
        *(f"{value:.2f}" for value in seconds),
        str(last["evaluations"]),
        str(last["images"]),
        *(f"{value:.2f}" for value in rates),
        f"{record['share_of_matmul_rate']:.0%}",
        *(f"{record[key]:.1f}" if key in record else "-" for key in ("weights_gib", "peak_gib")),
    ]


def table(records: list[dict], facts: dict) -> str:
    text = measuring.markdown(list(COLUMNS), [cells(record) for record in records])
    text += f"\nProducts of large matrices reach {facts['matmul_rate'] / 1e12:.2f} TFLOP/s here in {facts['dtype']}. "
    text += f"{measuring.origin(facts)}\n\nPublic figures of others, with rollouts by a serving engine:\n\n"
    rows = [[other["model"], other["method"], other["gpu"], other["images_per_second"]] for other in REFERENCES]
    return text + measuring.markdown(["model", "method", "GPU", "images per GPU and second"], rows)


def draw(records: list[dict]):
    done = [record for record in records if "error" not in record]
    figure = measuring.new_figure(10, 1.8 + 0.4 * len(done))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{record['model']}, {record['method']}" for record in done]
    start = [0.0] * len(done)
    for phase, color in zip(PHASES, measuring.COLORS, strict=False):
        widths = [record["updates"][-1]["seconds"][phase] / record["seconds_per_update"] for record in done]
        left.barh(names, widths, left=start, color=color, label=phase, height=0.6)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.set(title="where an update's time goes", xlim=(0, 1))
    shares = [record["share_of_matmul_rate"] for record in done]
    bars = right.barh(names, shares, color=measuring.COLORS[0], height=0.6)
    right.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3)
    right.set(title="share of the matmul rate", xlim=(0, 1))
    for plot in (left, right):
        plot.spines[["top", "right"]].set_visible(False)
    if done:
        left.invert_yaxis()
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), frameon=False)
    return figure


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
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "full_size")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.torch_dtype = getattr(torch, options.dtype)
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no GPU here: expected --tiny on a CPU.")

    names = list(MODELS) if "all" in options.model else options.model
    methods = list(METHODS) if "all" in options.method else options.method
    flags = ("dtype", "gradient_checkpointing", "compile", "small_text_encoders", "tiny")
    size = 8192 if options.device == "cuda" else 512
    options.matmul_rate = measuring.matmul_rate(torch.device(options.device), options.torch_dtype, size)
    facts = {
        **measuring.machine(),
        **{flag: getattr(options, flag) for flag in flags},
        "matmul_rate": options.matmul_rate,
        "references": REFERENCES,
    }
    records = []
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
            records.append(record)
            # After each run: a later one may take the process with it.
            measuring.write(options.output, {**facts, "runs": records}, table(records, facts), draw(records))


if __name__ == "__main__":
    main()
