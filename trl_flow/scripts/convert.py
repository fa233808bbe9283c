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

"""`trl-flow convert`: an adapter in another layout, or merged into its base."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from .generate import is_model_of_run, run_config
from .parser import FlowParser
from .quiet import quieten


@dataclass
class ConvertArguments:
    r"""
    Arguments of `trl-flow convert`.

    Args:
        adapter (`str`, *optional*):
            Directory, `.safetensors` file, or Hub id of a LoRA adapter. May stand first on the command line without its
            name.
        to (`str`, *optional*):
            Layout to write: `"peft"`, `"diffusers"`, `"kohya"` (what ComfyUI and A1111 load), or `"merged"`, a complete
            pipeline.
        output (`str`, *optional*):
            Directory to write to; for kohya a `.safetensors` file.
        model (`str`, *optional*):
            Hub id or path of the base pipeline, or `"shapes"`. By default the one that the adapter names.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the base pipeline on the Hub.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of merged weights.
    """

    adapter: str | None = field(
        default=None, metadata={"help": "Directory, .safetensors file, or Hub id of a LoRA adapter."}
    )
    to: str | None = field(
        default=None,
        metadata={
            "help": "Layout to write. kohya is what ComfyUI and A1111 load; merged is a complete pipeline.",
            "choices": ["peft", "diffusers", "kohya", "merged"],
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "Directory to write to; for kohya a .safetensors file."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the base pipeline, or `shapes`. By default the one that the adapter names."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base pipeline on the Hub."}
    )
    adapter_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the adapter on the Hub."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of merged weights.", "choices": ["float32", "bfloat16", "float16"]},
    )

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("name an adapter: a directory, a .safetensors file, or a Hub id")
        if self.to is None:
            raise ValueError("say what to write: --to peft, diffusers, kohya or merged")
        if self.output is None:
            raise ValueError("say where to write to: --output")


class ConvertParser(FlowParser):
    """Takes the adapter without its name, too, if it comes first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} ADAPTER --to LAYOUT --output PATH [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        if args and not args[0].startswith("-"):
            args = ["--adapter", *args]
        return super().parse_args_and_config(args, **kwargs)


def denoiser_class(model: str, revision: str | None = None) -> str | None:
    """Class of a pipeline's denoiser, without loading its weights."""
    from diffusers import DiffusionPipeline

    from ..hub.weights import COMPONENTS

    if model == "shapes":
        from ..shapes import PIPELINE_PATH

        model = PIPELINE_PATH
    parts = DiffusionPipeline.load_config(str(model), revision=revision)
    return next((parts[name][1] for name in COMPONENTS if parts.get(name, [None])[0] is not None), None)


def merge(args: ConvertArguments) -> Path:
    """Writes the complete pipeline."""
    import torch

    from ..hub.convert import merge_adapter, read_lora
    from ..policy import load_pipeline

    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output={output} is there already. Choose another place.")
    # A stranger's configuration is not asked how to load: that can make code run.
    config = run_config(args.adapter) if Path(args.adapter).is_dir() else {}
    model = args.model or config.get("model_name_or_path")
    if model is None:
        model = read_lora(args.adapter, args.adapter_revision)[0].config.base_model_name_or_path
    if model is None:
        raise ValueError(f"adapter={args.adapter} does not say which model it belongs to: name it with --model")
    loading = {"dtype": getattr(torch, args.dtype), "revision": args.model_revision}
    if is_model_of_run(model, config):
        loading["revision"] = args.model_revision or config.get("model_revision")
        loading |= config.get("model_init_kwargs") or {}
    pipeline = load_pipeline(model, **loading)
    merge_adapter(pipeline, args.adapter, args.adapter_revision).save_pretrained(output)
    return output


def main(args: ConvertArguments):
    from ..hub.convert import convert_adapter

    quieten(progress_bars=args.model != "shapes")
    if args.to == "merged":
        print(f"Merged: {merge(args)}")
        return
    model_class = denoiser_class(args.model, args.model_revision) if args.model is not None else None
    base_model = None if args.model is None else str(args.model)
    for file in convert_adapter(args.adapter, args.to, args.output, args.adapter_revision, base_model, model_class):
        print(file)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = (
        "Write a LoRA adapter in the layout of PEFT, of diffusers, or of kohya's scripts (for ComfyUI and A1111), "
        "whichever of these it has now; or add it to the weights of its base and write the whole pipeline."
    )
    if subparsers is not None:
        return subparsers.add_parser("convert", help=description, dataclass_types=(ConvertArguments,))
    return ConvertParser(prog=prog, dataclass_types=(ConvertArguments,), description=description)
