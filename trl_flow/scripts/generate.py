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

"""`trl-flow generate`: pictures of a model, with or without an adapter, as one labelled grid."""

import argparse
import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import yaml
from tqdm import tqdm

from .parser import FlowParser
from .quiet import quieten


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
BLOCK = 6  # prompts side by side in one block of a comparison


@dataclass
class GenerateArguments:
    r"""
    Arguments of `trl-flow generate`.

    Args:
        model (`str`, *optional*):
            Hub id or path of the base pipeline, or `"shapes"`. By default the one that the adapter was trained on.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the base pipeline on the Hub.
        adapter (`str`, *optional*):
            Hub id or directory of a LoRA adapter.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter on the Hub.
        dtype (`str`, *optional*):
            Precision of the pipeline. By default that of the adapter's run, else float32.
        device (`str`, *optional*):
            Where to generate. By default an accelerator if there is one.
        prompts (`list[str]`, *optional*):
            Prompts, each in quotes.
        prompt_file (`str`, *optional*):
            Text file with one prompt per line.
        dataset_name (`str`, *optional*):
            Prompt set to take prompts from.
        dataset_config (`str`, *optional*):
            Configuration of the dataset on the Hub.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Split of the prompt set.
        num_prompts (`int`, *optional*, defaults to `8`):
            How many prompts to take from the prompt set.
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Pictures per prompt.
        seed (`int`, *optional*, defaults to `0`):
            Picture j of every prompt starts from the noise of the generator seeded with `seed + j`.
        num_inference_steps (`int`, *optional*):
            Denoising steps.
        guidance_scale (`float`, *optional*):
            Guidance scale.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        max_sequence_length (`int`, *optional*):
            Text tokens.
        num_frames (`int`, *optional*):
            Frames of a video.
        negative_prompt (`str`, *optional*):
            What guidance leads away from.
        image (`str`, *optional*):
            File or URL of the picture to start from, for pipelines that edit or animate one.
        compare (`bool`, *optional*, defaults to `False`):
            Whether to show the base model's pictures, from the same noise, above the adapter's.
        output (`str`, *optional*, defaults to `"grid.png"`):
            File of the grid.
    """

    HELP_GROUPS: ClassVar[dict[str, list[str]]] = {
        "Model": ["model", "model_revision", "adapter", "adapter_revision", "dtype", "device"],
        "Prompts": ["prompts", "prompt_file", "dataset_name", "dataset_config", "dataset_split", "num_prompts"],
        "Pictures": ["num_images_per_prompt", "seed", "compare", "output"],
        "Sampling, by default as in the adapter's run, else as the pipeline has it": [
            "num_inference_steps",
            "guidance_scale",
            "height",
            "width",
            "num_frames",
            "max_sequence_length",
            "negative_prompt",
            "image",
        ],
    }

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the base pipeline, or `shapes`. By default the one that the adapter was "
            "trained on."
        },
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the base pipeline on the Hub."},
    )
    adapter: str | None = field(default=None, metadata={"help": "Hub id or directory of a LoRA adapter."})
    adapter_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the adapter on the Hub."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the pipeline. By default that of the adapter's run, else float32.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where to generate. By default an accelerator if there is one."},
    )
    prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts, each in quotes.", "aliases": ["--prompt"]},
    )
    prompt_file: str | None = field(default=None, metadata={"help": "Text file with one prompt per line."})
    dataset_name: str | None = field(default=None, metadata={"help": "Prompt set to take prompts from."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split of the prompt set."})
    num_prompts: int = field(default=8, metadata={"help": "How many prompts to take from the prompt set."})
    num_images_per_prompt: int = field(default=1, metadata={"help": "Pictures per prompt."})
    seed: int = field(
        default=0,
        metadata={"help": "Picture j of every prompt starts from the noise of the generator seeded with `seed + j`."},
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Denoising steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance scale."})
    height: int | None = field(default=None, metadata={"help": "Height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Text tokens."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    negative_prompt: str | None = field(default=None, metadata={"help": "What guidance leads away from."})
    image: str | None = field(
        default=None,
        metadata={"help": "File or URL of the picture to start from, for pipelines that edit or animate one."},
    )
    compare: bool = field(
        default=False,
        metadata={
            "help": "Whether to show the base model's pictures, from the same noise, above the adapter's.",
        },
    )
    output: str = field(default="grid.png", metadata={"help": "File of the grid."})

    def __post_init__(self):
        if self.model is None and self.adapter is None:
            raise ValueError("name a --model, an --adapter, or both")
        if self.compare and self.adapter is None:
            raise ValueError("--compare needs an --adapter to compare the model with")
        if sum(source is not None for source in (self.prompts, self.prompt_file, self.dataset_name)) != 1:
            raise ValueError("give prompts in exactly one way: --prompts, --prompt_file or --dataset_name")
        if self.num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={self.num_images_per_prompt}: expected at least 1")
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts}: expected at least 1")
        if Path(self.output).suffix.lower() not in PICTURE_FORMATS:
            raise ValueError(f"output={self.output}: expected a name that ends in {', '.join(PICTURE_FORMATS)}")


def is_model_of_run(model: str, config: dict) -> bool:
    """Whether a run was made with this model. A run writes down the absolute path of a directory."""
    return os.path.abspath(model) == os.path.abspath(config.get("model_name_or_path") or "")


def run_config(adapter: str | None, revision: str | None = None) -> dict:
    """The `config.yaml` that a run left beside its adapter, empty if there is none."""
    if adapter is None:
        return {}
    path = Path(adapter) / "config.yaml"
    if not Path(adapter).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            path = Path(hf_hub_download(adapter, "config.yaml", revision=revision))
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise ValueError(
                f"adapter={adapter}: neither a directory nor a repository that the Hub could be asked for "
                f"({type(error).__name__})."
            ) from error
        except EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text())
    return config if isinstance(config, dict) else {}


def sampling_arguments(pipeline: "DiffusionPipeline", args, config: dict) -> dict:
    """Arguments of the pipeline call: what was given, else what the adapter's run evaluated with."""
    from ..policy import default_call_arguments, find_family, with_area

    # Not all pipelines take their guidance by this name.
    guidance = find_family(pipeline).guidance
    names = ["num_inference_steps", "guidance_scale", "height", "width", "num_frames", "max_sequence_length"]
    names.append("negative_prompt")
    fallback = {name: config.get(name) for name in names}
    fallback["num_inference_steps"] = config.get("num_eval_inference_steps") or config.get("num_inference_steps")
    if config.get("eval_guidance_scale") is not None:
        fallback["guidance_scale"] = config["eval_guidance_scale"]
    for name, value in default_call_arguments(config.get("model_name_or_path") or args.model).items():
        fallback[name] = fallback[name] if fallback[name] is not None else value
    accepted = inspect.signature(type(pipeline).__call__).parameters
    chosen = {}
    for name in names:
        given = getattr(args, name, None)  # `evaluate` has a list of numbers of steps instead of one
        value = fallback[name] if given is None else given
        if name == "guidance_scale" and value is not None:
            if guidance == "guider":
                pipeline.guider = pipeline.guider.new(guidance_scale=value)
                continue
            name = guidance or name
        if given is not None and name not in accepted:
            raise ValueError(f"{name}={given}: {type(pipeline).__name__} has no such argument")
        if value is not None and name in accepted:
            chosen[name] = value
    return with_area({**(config.get("generation_kwargs") or {}), **chosen}, accepted)


def load_model(args, model: str, config: dict, trusted: bool) -> "DiffusionPipeline":
    """
    The stock pipeline on its device, loaded and sampled as in the adapter's run.

    Args:
        args: With `dtype`, `device` and `model_revision`.
        model (`str`): Hub id or path.
        config (`dict`): Of the adapter's run, or empty.
        trusted (`bool`): Whether the configuration is the user's own.
    """
    import torch

    from ..policy import load_pipeline

    loading = {
        "dtype": getattr(torch, args.dtype or config.get("dtype") or "float32"),
        "revision": args.model_revision or config.get("model_revision"),
    }
    if is_model_of_run(model, config):
        kwargs = config.get("model_init_kwargs") or {}
        if not trusted:
            # What could make code run is not taken from a stranger's config: name the model with --model instead.
            kwargs = {name: value for name, value in kwargs.items() if name in ("variant", "use_safetensors")}
        loading |= kwargs
    pipeline = load_pipeline(model, **loading)
    _sample_as_in_training(pipeline)
    return pipeline.to(args.device or default_device())


def load_prompt_list(args: GenerateArguments) -> list[str]:
    """The prompts, from wherever they were asked for."""
    if args.prompts is not None:
        prompts = args.prompts
    elif args.prompt_file is not None:
        prompts = [line.strip() for line in Path(args.prompt_file).read_text().splitlines() if line.strip()]
    else:
        from ..prompts import load_prompts

        dataset = load_prompts(
            args.dataset_name, split=args.dataset_split, config=args.dataset_config, num_prompts=args.num_prompts
        )
        prompts = list(dataset["prompt"])
    if not prompts:
        raise ValueError(f"{args.prompt_file or args.dataset_name or '--prompts'} holds no prompt")
    return prompts


def generate(
    pipeline: "DiffusionPipeline", prompts: list[str], count: int, seed: int, sampling: dict, description: str
) -> list[list["Image"]]:
    """`count` pictures for each prompt (of a video, some frames side by side); the noise depends on the seed and the picture's number alone."""
    import torch

    from ..trainer.evaluation import strip

    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    for prompt in tqdm(prompts, desc=description, disable=None):
        row = []
        for number in range(count):
            # On the CPU, so that a picture is the same whatever it was made on.
            generator = torch.Generator("cpu").manual_seed(seed + number)
            output = pipeline(prompt=prompt, generator=generator, output_type="pil", **sampling)
            if not hasattr(output, "images") and not hasattr(output, "frames"):
                raise ValueError(f"{type(pipeline).__name__} makes neither pictures nor videos, and a grid needs them")
            row.append(output.images[0] if hasattr(output, "images") else strip(output.frames[0]))
        pictures.append(row)
    return pictures


def make_grid(
    prompts: list[str], pictures: list[list["Image"]], base_pictures: list[list["Image"]] | None = None
) -> "Image":
    """
    Lay the pictures out: a row per prompt if it has several, else prompts side by side.

    Args:
        prompts (`list[str]`):
            Prompts.
        pictures (`list[list[PIL.Image.Image]]`):
            Pictures per prompt.
        base_pictures (`list[list[PIL.Image.Image]]`, *optional*):
            Pictures of the model without the adapter, to be shown above.
    """
    from ..report import image_grid

    several = len(pictures[0]) > 1
    if base_pictures is None and several:
        flat = [picture for row in pictures for picture in row]
        return image_grid(flat, columns=len(pictures[0]), row_labels=prompts)
    if base_pictures is None:
        return image_grid([row[0] for row in pictures], captions=prompts)
    if several:
        rows = [row for pair in zip(base_pictures, pictures, strict=True) for row in pair]
        labels = [f"{prompt} ({kind})" for prompt in prompts for kind in ("base", "adapter")]
        return image_grid([picture for row in rows for picture in row], columns=len(rows[0]), row_labels=labels)

    columns = min(BLOCK, len(prompts))
    cells, captions, labels = [], [], []
    for start in range(0, len(prompts), columns):
        block = range(start, min(start + columns, len(prompts)))
        empty = columns - len(block)
        cells += [base_pictures[i][0] for i in block] + [None] * empty
        cells += [pictures[i][0] for i in block] + [None] * empty
        captions += [""] * columns + [prompts[i] for i in block] + [""] * empty
        labels += ["base", "adapter"]
    return image_grid(cells, captions=captions, columns=columns, row_labels=labels)


def main(args: GenerateArguments):
    prompts = load_prompt_list(args)
    config = run_config(args.adapter, args.adapter_revision)
    model = args.model or config.get("model_name_or_path")
    if model is None:
        raise ValueError(f"adapter={args.adapter} does not say which model it belongs to: name it with --model")

    from diffusers.utils import load_image

    from ..report.plan import count_text

    quieten(progress_bars=model != "shapes")
    pipeline = load_model(args, model, config, trusted=args.adapter is None or Path(args.adapter).is_dir())
    sampling = sampling_arguments(pipeline, args, config)
    if args.image is not None:
        sampling["image"] = load_image(args.image)

    count = args.num_images_per_prompt
    base_pictures = generate(pipeline, prompts, count, args.seed, sampling, "base") if args.compare else None
    if args.adapter is not None:
        from ..hub import load_trained

        load_trained(pipeline, args.adapter, revision=args.adapter_revision)
    pictures = generate(pipeline, prompts, count, args.seed, sampling, "adapter" if args.adapter else "base")

    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    make_grid(prompts, pictures, base_pictures).save(output)
    shown = sampling if args.image is None else {**sampling, "image": args.image}
    settings = ", ".join(f"{name}={value}" for name, value in shown.items()) or "the pipeline's own settings"
    print(f"{count_text(len(prompts) * count, 'picture')} with {settings}, seed={args.seed}: {output}")


def _sample_as_in_training(pipeline):
    """Diffusion models are trained and evaluated with DDIM, whatever scheduler their checkpoint names."""
    from diffusers import DDIMScheduler

    from ..policy import is_flow

    if not is_flow(pipeline.scheduler):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = (
        "Make pictures with a model, with an adapter, or with both from the same noise (--compare), and lay them out "
        "in one grid."
    )
    settings = dict(
        dataclass_types=(GenerateArguments,), help_groups=GenerateArguments.HELP_GROUPS, description=description
    )
    if subparsers is not None:
        return subparsers.add_parser("generate", help=description, **settings)
    return FlowParser(prog=prog, **settings)


def default_device() -> str:
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
