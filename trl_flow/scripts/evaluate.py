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

"""`trl-flow evaluate`: scores of a model and its adapters on the same prompts, from the same noise."""

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tqdm import tqdm

from .generate import default_device, load_model, run_config, sampling_arguments
from .parser import FlowParser
from .quiet import quieten


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation import Evaluation


BASE = "base"
SAMPLING = ("guidance_scale", "height", "width", "num_frames", "max_sequence_length", "negative_prompt")


@dataclass
class EvaluateArguments:
    r"""
    Arguments of `trl-flow evaluate`. Lists are separated by spaces or commas.

    Args:
        model (`str`, *optional*):
            Hub id or path of the base pipeline, or `"shapes"`. By default the one that the adapter was trained on.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the base pipeline on the Hub.
        adapter (`list[str]`, *optional*):
            Directories or Hub ids (`user/repo@revision`) of what was trained, each of which is compared with the base.
        no_base (`bool`, *optional*, defaults to `False`):
            Whether to leave out the base model.
        dtype (`str`, *optional*):
            Precision of the pipeline. By default that of the adapter's run, else float32.
        device (`str`, *optional*):
            Where to sample and score. By default an accelerator if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the code of rewards that come from the Hub or from a directory.
        prompts (`str`, *optional*):
            Prompt set: a name, a Hub id, or a .txt, .jsonl, .csv or .parquet file. Means of each `tag` are shown where
            it has such a column.
        prompts_config (`str`, *optional*):
            Configuration of the dataset on the Hub.
        columns (`list[str]`, *optional*):
            Columns to keep and what to call them, `caption=prompt`. By default all, as they are called.
        split (`str`, *optional*):
            Split of the prompt set. By default `"train"` for a file, which has no other, else `"test"`.
        num_prompts (`int`, *optional*):
            How many prompts, from the first on. By default all.
        rewards (`list[str]`, *optional*):
            Rewards: whatever [`load_reward`] takes, settings as JSON.
        steps (`list[str]`, *optional*):
            Numbers of denoising steps. By default the one that the adapter's run was evaluated with.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Pictures of each prompt.
        seed (`int`, *optional*, defaults to `0`):
            Of the noise, which is the same for all models and numbers of steps, and of the bootstrap.
        batch_size (`int` or `"auto"`, *optional*, defaults to `4`):
            Pictures that are made at once; `"auto"` finds what fits. What runs out of memory is made in smaller batches.
        reward_batch_size (`int`, *optional*, defaults to `32`):
            Pictures that are scored at once.
        guidance_scale (`float`, *optional*):
            Guidance scale.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Frames of a video.
        max_sequence_length (`int`, *optional*):
            Text tokens.
        negative_prompt (`str`, *optional*):
            What guidance leads away from.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Directory of pictures, scores and results. The same command goes on from what is there; one with more rewards,
            steps or adapters makes what is missing.
    """

    HELP_GROUPS: ClassVar[dict[str, list[str]]] = {
        "Models": ["model", "model_revision", "adapter", "no_base", "dtype", "device"],
        "Prompts and rewards": [
            "prompts",
            "prompts_config",
            "columns",
            "split",
            "num_prompts",
            "rewards",
            "trust_remote_code",
        ],
        "Pictures": ["steps", "images_per_prompt", "seed", "batch_size", "reward_batch_size", "output_dir"],
        "Sampling, by default as in the adapter's run, else as the pipeline has it": list(SAMPLING),
    }

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the base pipeline, or `shapes`. By default the one that the adapter was "
            "trained on."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base pipeline on the Hub."}
    )
    adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "Directories or Hub ids (`user/repo@revision`) of what was trained, each of which is compared with "
            "the base.",
            "aliases": ["--adapters"],
        },
    )
    no_base: bool = field(default=False, metadata={"help": "Whether to leave out the base model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the pipeline. By default that of the adapter's run, else float32.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Where to sample and score. By default an accelerator if there is one."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to run the code of rewards that come from the Hub or from a directory."},
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompt set: a name, a Hub id, or a .txt, .jsonl, .csv or .parquet file. Means of each `tag` are "
            "shown where it has such a column."
        },
    )
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to keep and what to call them: `--columns caption=prompt tag`. By default all, as they are "
            "called."
        },
    )
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the prompt set. By default `train` for a file, which has no other, else `test`."},
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "How many prompts, from the first on. By default all."}
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: names, repositories, servers ..., settings as JSON: '{\"ocr\": {...}}'."},
    )
    steps: list[str] | None = field(
        default=None,
        metadata={"help": "Numbers of denoising steps. By default the one that the adapter's run was evaluated with."},
    )
    images_per_prompt: int = field(default=1, metadata={"help": "Pictures of each prompt."})
    seed: int = field(
        default=0,
        metadata={
            "help": "Of the noise, which is the same for all models and numbers of steps, and of the bootstrap."
        },
    )
    batch_size: str = field(
        default=4,
        metadata={
            "help": "Pictures that are made at once; `auto` finds what fits. What runs out of memory is made in smaller "
            "batches."
        },
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Pictures that are scored at once."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance scale."})
    height: int | None = field(default=None, metadata={"help": "Height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Text tokens."})
    negative_prompt: str | None = field(default=None, metadata={"help": "What guidance leads away from."})
    output_dir: str = field(
        default="evaluation",
        metadata={
            "help": "Directory of pictures, scores and results. The same command goes on from what is there; one with "
            "more rewards, steps or adapters makes what is missing."
        },
    )

    def __post_init__(self):
        self.adapter = split_list(self.adapter)
        self.rewards = split_list(self.rewards)
        try:
            self.steps = [int(steps) for steps in split_list(self.steps)]
        except ValueError as error:
            raise ValueError(f"steps={self.steps}: expected whole numbers, such as 10,20,40") from error
        if self.model is None and not self.adapter:
            raise ValueError("name a --model, an --adapter, or both")
        if self.no_base and not self.adapter:
            raise ValueError("--no_base leaves nothing to evaluate: name an --adapter")
        for name in ("prompts", "rewards"):
            if not getattr(self, name):
                raise ValueError(f"name --{name}: --prompts shapes --rewards shapes,shapes_strict")
        from ..trainer.batch_size import parse_batch_size

        self.batch_size = parse_batch_size("batch_size", self.batch_size)
        for name in ("images_per_prompt", "reward_batch_size", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        for name in ("steps", "rewards", "adapter"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: one is named twice")
        if any(steps < 1 for steps in self.steps):
            raise ValueError(f"steps={self.steps}: expected at least 1 each")


def split_list(values: list[str] | None) -> list[str]:
    """
    Items of a list, each of which may itself be a list with commas. Commas within JSON stay.

    Raises:
        ValueError: If what begins like JSON is none.
    """
    items = []
    for text in values or []:
        text = text.strip()
        while text:
            if text.startswith("{"):
                try:
                    _, end = json.JSONDecoder().raw_decode(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{text!r} is no JSON: {error}. Names and text stand in double quotes") from error
            else:
                end = text.find(",") if "," in text else len(text)
            items.append(text[:end].strip())
            text = text[end:].strip()
            if text and not text.startswith(","):
                raise ValueError(f"{items[-1]} is followed by {text!r}: expected a comma")
            text = text.removeprefix(",").strip()
    return [item for item in items if item]


def file_names(names: list[str], taken: tuple[str, ...] = ()) -> list[str]:
    """A name for each that a file can have, and that no other has."""
    found = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("._") or "unnamed"
        unique, count = plain, 1
        while unique in (*taken, *found):
            count += 1
            unique = f"{plain}_{count}"
        found.append(unique)
    return found


def name_adapters(adapters: list[str]) -> dict[str, tuple[str, str | None]]:
    """Each adapter and its revision, by a short name: that of its directory or repository."""
    placed, short = [], []
    for adapter in adapters:
        name, at, revision = (adapter, "", "") if Path(adapter).is_dir() else adapter.partition("@")
        placed.append((name, revision if at else None))
        parts = Path(name).resolve().parts if Path(name).is_dir() else Path(name).parts
        # A checkpoint's number says little without its run.
        short.append("-".join(parts[-2:]) if re.fullmatch(r"checkpoint-\d+", parts[-1]) else parts[-1])
    return dict(zip(file_names(short, taken=(BASE,)), placed, strict=True))


def adapter_version(adapter: str, revision: str | None) -> str:
    """What tells an adapter from a later one of the same name: its commit on the Hub, or a digest of its files."""
    from huggingface_hub import snapshot_download

    from ..evaluation import digest_of_files
    from ..hub.weights import TRAINED_FILES

    if not Path(adapter).is_dir():
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=list(TRAINED_FILES))).name
    files = {path for pattern in TRAINED_FILES for path in Path(adapter).glob(pattern) if path.is_file()}
    if not files:
        raise ValueError(f"adapter={adapter} holds nothing that was trained: no .safetensors, no folder of a denoiser")
    return digest_of_files(list(files))


def model_version(model: str, revision: str | None) -> str | None:
    """
    What tells a base model from a later one of the same name: its commit on the Hub, or a digest of its files. `None` if
    it is not to be had, as a repository that is not in the cache: its pictures may all be there.
    """
    from huggingface_hub import snapshot_download

    from ..evaluation import digest_of_files
    from ..shapes import PIPELINE_PATH

    folder = Path(PIPELINE_PATH if model == "shapes" else model)
    if not folder.is_dir():
        try:
            return Path(snapshot_download(model, revision=revision, allow_patterns=["model_index.json"])).name
        except (OSError, ValueError):
            return None
    # What a pipeline is loaded from. Some repositories have all of it a second time, in one file beside these.
    files = [folder / "model_index.json", *folder.glob("*.py"), *folder.glob("[!.]*/*")]
    return digest_of_files([path for path in files if path.is_file()])


def reward_version(reward: Callable, spec: str) -> str:
    """What tells a reward from another one of the same name: its settings, its source, and what is in its files."""
    from ..evaluation import digest, digest_of_files
    from ..rewards import parse_reward

    name, settings = parse_reward(spec)
    parts = [spec, getattr(reward, "source", None)]
    module = sys.modules.get(name.rpartition(".")[0])
    if module is not None:  # a dotted path
        paths = {getattr(module, "__file__", None)}
        with contextlib.suppress(TypeError):
            paths.add(inspect.getsourcefile(reward if inspect.isroutine(reward) else type(reward)))
        parts.append(digest_of_files([Path(path) for path in paths if path is not None]))
    for value in settings.values():
        if isinstance(value, str) and os.path.exists(value):  # weights
            path = Path(value)
            files = [found for found in path.rglob("[!.]*") if found.is_file()] if path.is_dir() else [path]
            parts.append(digest_of_files(files))
    return digest(parts)


def common_config(args: EvaluateArguments, adapters: dict[str, tuple[str, str | None]]) -> dict:
    """
    What the adapters' runs say about the model and its sampling, for what the command line does not say.

    Raises:
        ValueError: If they differ: pictures that are compared have to be made alike.
    """
    common = {}
    for name, place in adapters.items():
        config = run_config(*place)
        if config.get("eval_guidance_scale") is not None:
            config["guidance_scale"] = config["eval_guidance_scale"]
        config["steps"] = config.get("num_eval_inference_steps") or config.get("num_inference_steps")
        config["model"] = config.get("model_name_or_path")
        for setting in ("model", "steps", "dtype", *SAMPLING, "generation_kwargs"):
            value, before = config.get(setting), common.get(setting)
            differs = value is not None and before is not None and value != before
            if differs and getattr(args, setting, None) in (None, []):
                raise ValueError(
                    f"{setting}={value} in the run of {name}, {before} in the run of another adapter: say which one to "
                    "take on the command line, or evaluate them in directories of their own."
                )
        common = {**config, **{setting: value for setting, value in common.items() if value is not None}}
    return common


def load_rewards(args: EvaluateArguments, dataset: "Dataset") -> dict[str, Callable]:
    """
    The rewards by name.

    Raises:
        ValueError: If one cannot be scored: it compares pictures with each other, or lacks a column.
    """
    from ..rewards import load_reward, reward_name
    from ..rewards.remote import RemoteReward

    consent = args.trust_remote_code or None  # `None` asks, if there is someone to ask
    loaded = [load_reward(reward, trust_remote_code=consent) for reward in args.rewards]
    # An address says nothing; the server behind it has a name.
    names = [
        reward.name if isinstance(reward, RemoteReward) else reward_name(spec)
        for reward, spec in zip(loaded, args.rewards, strict=True)
    ]
    rewards = dict(zip(file_names(names), loaded, strict=True))
    for name, reward in rewards.items():
        if getattr(reward, "scope", "sample") == "group":
            raise ValueError(
                f"reward {name} compares the pictures of one prompt with each other: its scores have no mean that says "
                "how good a model is. Leave it out."
            )
        missing = [column for column in getattr(reward, "requires", ()) if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"reward {name} needs the column {', '.join(missing)}, which {args.prompts} has not "
                f"({', '.join(dataset.column_names)})."
            )
    return rewards


def make_pictures(
    args: EvaluateArguments,
    evaluation: "Evaluation",
    adapters: dict[str, tuple[str, str | None]],
    models: list[str],
    config: dict,
) -> None:
    """All pictures that are missing, model by model."""
    from ..evaluation import takes_batches
    from ..hub import load_trained

    work = {
        (model, steps): sum(map(len, evaluation.missing(model, steps))) for model in models for steps in args.steps
    }
    total = sum(count * steps for (_, steps), count in work.items())
    if total == 0:
        return
    pipeline = None
    # Counted in steps, for a true estimate of what is left.
    with tqdm(total=total, desc="pictures", unit="step", disable=None) as bar:
        for model in models:
            if not any(work[model, steps] for steps in args.steps):
                continue
            if pipeline is None:
                trusted = all(Path(adapter).is_dir() for adapter, _ in adapters.values())
                pipeline = load_model(args, args.model, config, trusted)
                pipeline.set_progress_bar_config(disable=True)
            sampling = sampling_arguments(pipeline, args, config)
            if model != BASE:
                adapter, revision = adapters[model]
                load_trained(pipeline, adapter, revision=revision)
            if evaluation.batch_size != 1 and not takes_batches(pipeline, evaluation.dataset["prompt"][:], sampling):
                evaluation.make_one_by_one()
            for steps in args.steps:
                bar.set_description(f"{model}, {steps} steps")
                for count in evaluation.make_pictures(pipeline, model, steps, sampling):
                    bar.update(count * steps)
            if model != BASE:
                pipeline = None  # the next adapter gets a pipeline that was never trained


def make_scores(evaluation: "Evaluation", rewards: dict[str, Callable], models: list[str], steps: list[int]) -> None:
    """All scores that are missing, reward by reward, so that no two need to be on the device at once."""
    sets = [(model, count) for model in models for count in steps]
    total = sum(len(batch) for name in rewards for place in sets for batch in evaluation.unscored(*place, name))
    if total == 0:
        return
    with tqdm(total=total, desc="scores", unit="picture", disable=None) as bar:
        for name, reward in rewards.items():
            for model, count in sets:
                bar.set_description(f"{name}, {model}, {count} steps")
                for scored in evaluation.make_scores(reward, name, model, count):
                    bar.update(scored)
            if hasattr(reward, "release"):
                reward.release()


def main(args: EvaluateArguments):
    quieten(progress_bars=args.model not in ("shapes", None))
    try:
        return run(args)
    except KeyboardInterrupt:
        print(f"\nWhat was made is in {args.output_dir}: the same command goes on from there.", file=sys.stderr)
        raise


def run(args: EvaluateArguments) -> int:
    """The evaluation, from prompts to report."""
    import torch
    from accelerate import PartialState
    from rich.console import Console

    from ..evaluation import Evaluation, check_settings, write_json
    from ..prompts import load_prompts, parse_columns
    from ..report.comparison import Comparison, comparison_tables, to_markdown, write_comparison
    from ..rewards import public_reward

    device = args.device or default_device()
    PartialState(cpu=device == "cpu")  # the libraries' loggers ask it which process this is
    split = args.split or ("train" if Path(args.prompts).is_file() else "test")
    dataset = load_prompts(
        args.prompts,
        split=split,
        config=args.prompts_config,
        num_prompts=args.num_prompts,
        columns=parse_columns(split_list(args.columns) or None),
    )
    if len(dataset) == 0:
        raise ValueError(f"prompts={args.prompts} holds no prompt")
    rewards = load_rewards(args, dataset)
    adapters = name_adapters(args.adapter)
    config = common_config(args, adapters)
    args.model = args.model or config.get("model_name_or_path")
    if args.model is None:
        raise ValueError(f"adapter={args.adapter[0]} does not say which model it belongs to: name it with --model")
    if not args.steps and not config.get("steps"):
        raise ValueError("name the numbers of --steps: 10,20,40")
    args.steps = args.steps or [config["steps"]]
    models = ([] if args.no_base else [BASE]) + list(adapters)
    # Without keys and tokens: they are written down, and scores outlive a token.
    specs = dict(zip(rewards, map(public_reward, args.rewards), strict=True))

    evaluation = Evaluation(
        folder=Path(args.output_dir),
        dataset=dataset,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        # Pictures to start from may differ in size, which no pipeline takes at once.
        batch_size=1 if "image" in dataset.column_names else args.batch_size,
        reward_batch_size=args.reward_batch_size,
        versions={name: reward_version(reward, specs[name]) for name, reward in rewards.items()},
    )
    sampling = {name: value for name in SAMPLING if (value := _given(args, config, name)) is not None}
    settings = {
        "model": args.model,
        "model_revision": args.model_revision or config.get("model_revision"),
        "dtype": args.dtype or config.get("dtype") or "float32",
        "sampling": {**(config.get("generation_kwargs") or {}), **sampling},
        "seed": args.seed,
        "images_per_prompt": args.images_per_prompt,
    }
    if (version := model_version(args.model, settings["model_revision"])) is not None:
        settings["model_version"] = version
    versions = {name: adapter_version(*place) for name, place in adapters.items()}
    check_settings(evaluation.folder, settings, versions, dataset)
    for name in rewards:
        if any(evaluation.is_outdated(model, steps, name) for model in models for steps in args.steps):
            print(
                f"reward {name} has other settings, code or weights than when it was scored in {evaluation.folder}: its "
                "scores are made again."
            )

    for name, reward in rewards.items():
        if any(evaluation.unscored(model, steps, name) for model in models for steps in args.steps):
            # Weights that are missing and servers that are gone stop the command before any work is spent.
            if hasattr(reward, "prepare"):
                reward.prepare(torch.device(device))
            if hasattr(reward, "release"):
                reward.release()
    make_pictures(args, evaluation, adapters, models, config)
    make_scores(evaluation, rewards, models, args.steps)

    tags = dataset["tag"][:] if "tag" in dataset.column_names else None
    found = {
        (model, steps, name): evaluation.scores(model, steps, name)
        for model in models
        for steps in args.steps
        for name in rewards
    }
    comparison = Comparison(
        found, models, args.steps, list(rewards), tags, BASE if BASE in models else None, args.seed
    )
    shown = {
        **settings,
        "adapters": {name: f"{args.adapter[i]} ({versions[name]})" for i, name in enumerate(adapters)},
        "prompts": args.prompts,
        "split": split,
        "rewards": specs,
    }
    write_json(evaluation.folder / "results.json", {"settings": shown, "results": comparison.cells()})
    (evaluation.folder / "results.md").write_text(to_markdown(comparison), encoding="utf-8")
    page = write_comparison(comparison, evaluation.folder, dataset["prompt"][:], evaluation.picture, settings=shown)
    console = Console()
    for table in comparison_tables(comparison):
        console.print(table)
    for note in comparison.notes():
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    folder = evaluation.folder
    if any(cell["failed"] for cell in comparison.cells()):
        print(f"{folder / 'scores'} says why scores failed; the same command asks for them again.")
    print(f"Wrote {folder / 'results.json'}, {folder / 'results.md'} and {page}")
    return 0


def _given(args: EvaluateArguments, config: dict, name: str):
    value = getattr(args, name)
    return config.get(name) if value is None else value


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    description = (
        "Score a model, with and without adapters, on the same prompts from the same noise: means with 95 % bootstrap "
        "intervals for each reward, number of steps and tag, and of the paired differences; as a table, JSON, Markdown "
        "and a page with the pictures side by side. Example: trl-flow evaluate --adapter runs/first --prompts drawbench "
        "--rewards pickscore,hpsv2,image_reward,clip,aesthetic --steps 10,20,40 --output_dir runs/first-drawbench"
    )
    settings = dict(
        dataclass_types=(EvaluateArguments,), help_groups=EvaluateArguments.HELP_GROUPS, description=description
    )
    if subparsers is not None:
        return subparsers.add_parser("evaluate", help=description, **settings)
    return FlowParser(prog=prog, **settings)
