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

"""`trl-flow doctor MODEL`: whether a pipeline can be trained, found out by trying."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.table import Table

from .parser import FlowParser
from .quiet import quieten


if TYPE_CHECKING:
    from ..policy.doctor import Diagnosis


# What the phases of a run are, in words.
PHASES = {
    "encode": "while prompts are encoded",
    "rollout": "while latents are sampled",
    "decode": "while they are decoded",
    "collect": "while a rollout is put together",
    "train": "in the forward and backward pass",
    "measure": "while gradients are compared",
    "update": "in the optimizer's step",
}


@dataclass
class DoctorArguments:
    r"""
    Arguments of `trl-flow doctor`. Those that a training run has too mean the same there.

    Args:
        model_name_or_path (`str`, *optional*):
            Hub id or path of the pipeline, or `"shapes"`. May stand first on the command line without its name.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the frozen weights are loaded.
        device (`str`, *optional*):
            Where to run. By default an accelerator if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the pipeline's repository brings along.
        height (`int`, *optional*):
            Height in pixels. By default that of the pipeline's family, else the pipeline's.
        width (`int`, *optional*):
            Width in pixels, likewise.
        num_frames (`int`, *optional*):
            Frames of a video, likewise.
        guidance_scale (`float`, *optional*):
            Guidance scale, likewise.
        negative_prompt (`str`, *optional*):
            What guidance leads away from, likewise.
        max_sequence_length (`int`, *optional*):
            Text tokens. By default the pipeline's.
        generation_kwargs (`dict`, *optional*):
            More arguments of the pipeline's call.
        image (`str`, *optional*):
            File of a picture, for pipelines that start from one. By default a grey one is made.
        num_inference_steps (`int`, *optional*, defaults to `4`):
            Steps of the stock run that is compared with.
        transition_batch_size (`int`, *optional*, defaults to `8`):
            Rows of a training forward, for the estimate of memory.
        rollout_batch_size (`int`, *optional*, defaults to `32`):
            Rows of a forward in rollouts, likewise.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether activations are computed again in the backward pass, likewise.
        precompute_prompts (`bool`, *optional*, defaults to `False`):
            Whether the encoders leave the device, likewise.
        beta (`float`, *optional*, defaults to `0.04`):
            Weight of the divergence from the base model, likewise: 0 saves the reference.
        gpu_memory (`float`, *optional*):
            GiB of the GPU that the run is planned for. By default those of the device.
        lora_r (`int`, *optional*):
            Rank of the adapter. By default that of the pipeline's family.
        lora_alpha (`int`, *optional*):
            Scale of the adapter. By default twice the rank.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers to adapt. By default those that suit the pipeline's family.
        use_dora (`bool`, *optional*, defaults to `False`):
            Whether the adapter is weight-decomposed (DoRA).
        full_finetuning (`bool`, *optional*, defaults to `False`):
            Whether all weights of the denoiser are trained, instead of an adapter.
        json (`str`, *optional*):
            File to which what was found is written.
    """

    HELP_GROUPS: ClassVar[dict[str, list[str]]] = {
        "Model": ["model_name_or_path", "model_revision", "dtype", "device", "trust_remote_code"],
        "Sampling, by default as in a training run with this model": [
            "height",
            "width",
            "num_frames",
            "guidance_scale",
            "negative_prompt",
            "max_sequence_length",
            "generation_kwargs",
            "image",
            "num_inference_steps",
        ],
        "What is trained": [
            "lora_r",
            "lora_alpha",
            "lora_target_modules",
            "use_dora",
            "full_finetuning",
        ],
        "Memory, as in a training run": [
            "transition_batch_size",
            "rollout_batch_size",
            "activation_checkpointing",
            "precompute_prompts",
            "beta",
            "gpu_memory",
        ],
        "Output": ["json"],
    }

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the pipeline, or `shapes`. May stand first on the command line without its "
            "name.",
            "aliases": ["--model"],
        },
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the pipeline on the Hub."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision in which the frozen weights are loaded.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Where to run. By default an accelerator if there is one."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to run code that the pipeline's repository brings along."},
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance scale."})
    negative_prompt: str | None = field(default=None, metadata={"help": "What guidance leads away from."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Text tokens."})
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "More arguments of the pipeline's call, as JSON, such as '{\"true_cfg_scale\": 4.0}'."},
    )
    image: str | None = field(
        default=None,
        metadata={"help": "File of a picture, for pipelines that start from one. By default a grey one is made."},
    )
    num_inference_steps: int = field(
        default=4, metadata={"help": "Steps of the stock pipeline's run that is compared with."}
    )
    transition_batch_size: int = field(
        default=8, metadata={"help": "Rows of a training forward, for the estimate of memory."}
    )
    rollout_batch_size: int = field(default=32, metadata={"help": "Rows of a forward in rollouts, likewise."})
    activation_checkpointing: bool = field(
        default=True, metadata={"help": "Whether activations are computed again in the backward pass, likewise."}
    )
    precompute_prompts: bool = field(
        default=False, metadata={"help": "Whether the encoders leave the device, likewise."}
    )
    beta: float = field(
        default=0.04,
        metadata={"help": "Weight of the divergence from the base model, likewise: 0 saves the reference."},
    )
    gpu_memory: float | None = field(
        default=None,
        metadata={"help": "GiB of the GPU that the run is planned for. By default those of the device."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapter. By default that of the pipeline's family."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter. By default twice the rank."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt. By default those that suit the pipeline's family."},
    )
    use_dora: bool = field(default=False, metadata={"help": "Whether the adapter is weight-decomposed (DoRA)."})
    full_finetuning: bool = field(
        default=False,
        metadata={"help": "Whether all weights of the denoiser are trained, instead of an adapter."},
    )
    json: str | None = field(default=None, metadata={"help": "File to which what was found is written."})

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("name a pipeline: a Hub id, a path, or `shapes`")
        for name in ("num_inference_steps", "transition_batch_size", "rollout_batch_size", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if self.gpu_memory is not None and self.gpu_memory <= 0:
            raise ValueError(f"gpu_memory={self.gpu_memory}: expected a number of GiB above 0")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: expected at least 0")
        if isinstance(self.generation_kwargs, str):
            try:
                self.generation_kwargs = json.loads(self.generation_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"generation_kwargs={self.generation_kwargs!r} is no JSON: {error}") from error
        if not isinstance(self.generation_kwargs, dict | None):
            raise ValueError(f"generation_kwargs={self.generation_kwargs!r}: expected names and values in braces")
        lora = ("lora_r", "lora_alpha", "lora_target_modules", "use_dora")
        given = [name for name in lora if getattr(self, name) not in (None, False)]
        if self.full_finetuning and given:
            raise ValueError(f"{given[0]} shapes an adapter, and full_finetuning=True trains none. Drop one of them")
        if self.image is not None and not Path(self.image).is_file():
            raise ValueError(f"image={self.image}: no such file")


class DoctorParser(FlowParser):
    """Takes the model without its name, too, if it comes first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} MODEL [--config FILE.yaml] [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        if args and not args[0].startswith("-"):
            args = ["--model_name_or_path", *args]
        return super().parse_args_and_config(args, **kwargs)


def diagnose(args: DoctorArguments) -> "Diagnosis":
    """Load the pipeline that the arguments name, and examine it."""
    import torch
    from PIL import Image

    from ..policy import default_call_arguments, load_pipeline
    from ..policy.allocations import device_memory
    from ..policy.doctor import examine
    from ..policy.memory import MemorySettings
    from .training import make_peft_config

    model = args.model_name_or_path
    loading = {"dtype": getattr(torch, args.dtype)}
    if args.model_revision is not None:
        loading["revision"] = args.model_revision
    if args.trust_remote_code:
        loading["trust_remote_code"] = True
    pipeline = load_pipeline(model, **loading)
    device = args.device
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = ("height", "width", "num_frames", "guidance_scale", "negative_prompt", "max_sequence_length")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    device, limit = torch.device(device), device_memory(torch.device(device))
    if args.gpu_memory is not None:
        limit = int(args.gpu_memory * 2**30)
    on_gpu = device.type != "cpu" or args.gpu_memory is not None
    return examine(
        pipeline,
        num_inference_steps=args.num_inference_steps,
        memory=MemorySettings(
            rollout_batch_size=args.rollout_batch_size,
            transition_batch_size=args.transition_batch_size,
            activation_checkpointing=args.activation_checkpointing,
            precompute_prompts=args.precompute_prompts,
            reference=args.beta > 0,
            # What a run on a GPU does unless it is told otherwise.
            autocast=torch.bfloat16 if on_gpu else None,
            host=on_gpu,
        ),
        limit=limit,
        image=Image.open(args.image).convert("RGB") if args.image is not None else None,
        peft_config=make_peft_config(args, args),
        generation_kwargs=args.generation_kwargs,
        full_finetuning=args.full_finetuning,
        **(default_call_arguments(model) | given),
    )


def print_diagnosis(diagnosis: "Diagnosis", console: Console | None = None) -> None:
    """What was found as a table, then warnings, notes and the verdict."""
    console = console or Console()

    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}" if value else "0"

    def count(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    family = {None: "-", "inferred": "none; inferred by inspection"}.get(diagnosis.family, diagnosis.family)
    coverage = "-" if diagnosis.gradient_coverage is None else f"{diagnosis.gradient_coverage:.0%}"
    rows = [
        ("Family record", family, "defaults: layers, guidance, size"),
        ("Makes", diagnosis.media or "-", "pictures and videos are trained"),
        ("Replay error", error(diagnosis.replay_error), "velocity against the stock pipeline's, at its latents"),
        ("Picture error", error(diagnosis.picture_error), "noise level 0 against the stock pipeline, in [0, 1]"),
        ("Ratio - 1", error(diagnosis.ratio_error), "probability ratios of the first update"),
        ("Row error", error(diagnosis.row_error), "rows in a batch of two prompts against each alone"),
        ("Gradient coverage", coverage, "trained tensors with a gradient that is not zero"),
        ("Encoder runs", count(diagnosis.encoder_calls), "per velocity evaluation; once per prompt would do"),
        (
            "Trained parameters",
            count(diagnosis.trained_parameters),
            f"of {count(diagnosis.total_parameters)} in the denoiser",
        ),
    ]
    table = Table(title=diagnosis.pipeline, title_justify="left")
    for column, justify in (("", "left"), ("found", "right"), ("what it is", "left")):
        table.add_column(column, justify=justify)
    for row in rows:
        if row[1] != "-":
            table.add_row(*row)
    if diagnosis.memory:
        table.add_section()
        sums = {phase: sum(parts.values()) for phase, parts in diagnosis.memory.items()}
        for phase, size in sums.items():
            parts = ", ".join(
                f"{part} {share:.3g}" for part, share in diagnosis.memory[phase].items() if share >= 5e-3
            )
            table.add_row(f"Memory: {phase}", f"{size:.3g} GiB", parts)
        largest = max(sums, key=sums.get)
        table.add_row("Memory: peak", f"{sums[largest]:.3g} GiB", f"an estimate: {PHASES[largest]}")
    # A sentence is one line, for whoever searches the output; terminals break it.
    console.soft_wrap = True
    if table.rows:
        console.print(table, soft_wrap=False)
    for kind, lines in (("Warning", diagnosis.warnings), ("Note", diagnosis.notes)):
        for line in lines:
            console.print(f"{kind}: {line}.", markup=False, highlight=False)
    console.print(verdict(diagnosis), markup=False, highlight=False)


def verdict(diagnosis: "Diagnosis") -> str:
    """One sentence for a user."""
    if not diagnosis.trains:
        return f"Does not train: {diagnosis.problem.strip().removesuffix('.')}."
    return (
        f"Trains: what the policy computes is what {diagnosis.pipeline} computes, and gradients reach what is trained."
    )


def write_json(diagnosis: "Diagnosis", args: DoctorArguments) -> None:
    """What was found, with the settings and versions under which it holds."""
    import diffusers
    import torch

    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **dataclasses.asdict(diagnosis),
        "trains": diagnosis.trains,
        "settings": {name: value for name, value in dataclasses.asdict(args).items() if name != "json"},
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(args: DoctorArguments) -> int:
    """
    Examine a pipeline and print what was found.

    Returns:
        `int`: 0 if it trains, 1 if it does not.
    """
    quieten(progress_bars=args.model_name_or_path != "shapes")
    diagnosis = diagnose(args)
    print_diagnosis(diagnosis)
    if args.json is not None:
        write_json(diagnosis, args)
    return 0 if diagnosis.trains else 1


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = (
        "Find out whether a pipeline can be trained, by trying: its velocity against the stock pipeline's, pictures "
        "without noise, probability ratios, batches, gradients, memory. The exit code is 0 if it trains, 1 if it does "
        "not; the last line says why. Give the settings of the run that you plan: memory, and sometimes the verdict, "
        "depend on them."
    )
    settings = dict(
        dataclass_types=(DoctorArguments,), help_groups=DoctorArguments.HELP_GROUPS, description=description
    )
    if subparsers is not None:
        return subparsers.add_parser("doctor", help=description, **settings)
    return DoctorParser(prog=prog, **settings)
