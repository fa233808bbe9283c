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

"""`trl-flow prompts`: which prompt sets have a name, and what is in a prompt set."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .parser import FlowParser
from .quiet import quieten


if TYPE_CHECKING:
    from datasets import Dataset


MOST_TAGS = 30
LONGEST_CELL = 200


@dataclass
class PromptsArguments:
    r"""
    Arguments of `trl-flow prompts`.

    Args:
        action (`str`, *optional*, defaults to `"list"`):
            What to do: `list` or `show`. Stands first on the command line without its name.
        name (`str`, *optional*):
            Prompt set to show: a name, a file, a folder, or the id of a dataset on the Hub. Stands second on the command
            line without its name.
        split (`str`, *optional*):
            Split of the prompt set. By default its first one.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of what is on the Hub.
        columns (`list[str]`, *optional*):
            Columns to read, and what to call them, such as `caption=prompt tag`.
        num_prompts (`int`, *optional*, defaults to `10`):
            How many prompts to show.
        seed (`int`, *optional*, defaults to `0`):
            Decides which ones.
        num_rows (`int`, *optional*, defaults to `10000`):
            How many prompts to read.
    """

    action: str = field(
        default="list",
        metadata={
            "help": "What to do. Stands first on the command line without its name.",
            "choices": ["list", "show"],
        },
    )
    name: str | None = field(
        default=None,
        metadata={
            "help": "Prompt set to show: a name, a file, a folder, or the id of a dataset on the Hub. Stands second on "
            "the command line without its name."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of the prompt set. By default its first one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of what is on the Hub."})
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns to read, and what to call them, such as `caption=prompt tag`."},
    )
    num_prompts: int = field(default=10, metadata={"help": "How many prompts to show."})
    seed: int = field(default=0, metadata={"help": "Decides which ones."})
    num_rows: int = field(default=10_000, metadata={"help": "How many prompts to read."})

    def __post_init__(self):
        if self.action == "show" and self.name is None:
            raise ValueError("name a prompt set: trl-flow prompts show drawbench")
        if self.action == "list" and self.name is not None:
            raise ValueError(f"list takes no name; to look into {self.name}: trl-flow prompts show {self.name}")
        for name in ("num_prompts", "num_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")


class PromptsParser(FlowParser):
    """Takes the action and the prompt set without their names, too, if they come first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} [list | show NAME] [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        args = list(args or ())
        for position, setting in enumerate(("--action", "--name")):
            if len(args) > 2 * position and not args[2 * position].startswith("-"):
                args.insert(2 * position, setting)
            else:
                break
        return super().parse_args_and_config(args, **kwargs)


def list_table() -> Table:
    """The named prompt sets."""
    from ..prompts import PROMPT_SETS

    table = Table(title="Prompt sets", title_justify="left", show_lines=True)
    for column in ("name", "prompts", "what they are"):
        table.add_column(column, no_wrap=column != "what they are")
    for name, record in PROMPT_SETS.items():
        counts = [f"{split} {part.prompts:,}" if part.prompts else split for split, part in record.parts.items()]
        lines = [
            record.description,
            f"From {record.source}" + (f"; {record.repository} on the Hub." if record.repository else "."),
            f"Licence: {record.license}. Made for the rewards: {', '.join(record.rewards) or 'any'}.",
        ]
        table.add_row(name, "\n".join(counts), "\n".join(lines))
    return table


def show(args: PromptsArguments, console: Console):
    """What is known of a prompt set, its lengths, repetitions and tags, and some of its prompts."""
    from ..prompts import PROMPT_SETS, load_prompts, parse_columns

    record = PROMPT_SETS.get(args.name)
    split = args.split or (next(iter(record.parts)) if record else "train")
    generated = record is not None and record.generator is not None
    dataset = load_prompts(
        args.name,
        split=split,
        config=args.dataset_config,
        # A generated set has the size that it is asked for.
        num_prompts=None if generated else args.num_rows,
        columns=parse_columns(args.columns),
        revision=args.revision,
    )
    if record is not None:
        for title, text in (("", record.description), ("From", record.source), ("Licence", record.license)):
            console.print(f"{title}: {text}." if title else text, markup=False, highlight=False)
    cut = not generated and len(dataset) == args.num_rows
    for line in statistics(dataset):
        console.print(line, markup=False, highlight=False)
    if cut:
        console.print(f"These are the first {args.num_rows:,}; --num_rows reads more.", highlight=False)
    if "tag" in dataset.column_names:
        console.print(tag_table(dataset))
    console.print(sample_table(dataset, f"{args.name}, {split}", args.num_prompts, args.seed))


def statistics(dataset: "Dataset") -> list[str]:
    """Sentences on how many prompts there are, how long, and how many occur again."""
    if len(dataset) == 0:
        return ["0 prompts."]
    prompts = dataset["prompt"][:]
    words = sorted(len(prompt.split()) for prompt in prompts)
    again = len(prompts) - len(set(prompts))
    others = [column for column in dataset.column_names if column != "prompt"]
    return [
        f"{len(prompts):,} prompts, {again:,} of them repetitions of another.",
        f"Words: {words[0]} to {words[-1]}, median {words[len(words) // 2]}.",
        f"Columns beside the prompt: {', '.join(others) or 'none'}.",
    ]


def tag_table(dataset: "Dataset") -> Table:
    counts = Counter(dataset["tag"][:]).most_common()
    table = Table(title="Tags", title_justify="left")
    table.add_column("tag")
    table.add_column("prompts", justify="right")
    for tag, count in counts[:MOST_TAGS]:
        table.add_row(str(tag), f"{count:,}")
    if len(counts) > MOST_TAGS:
        table.add_row(f"{len(counts) - MOST_TAGS:,} more", f"{sum(count for _, count in counts[MOST_TAGS:]):,}")
    return table


def sample_table(dataset: "Dataset", title: str, num_prompts: int, seed: int) -> Table:
    """Some prompts with their other columns; of pictures only that they are there."""
    from datasets import Image

    pictures = {column for column, feature in dataset.features.items() if isinstance(feature, Image)}
    columns = ["prompt", *(column for column in dataset.column_names if column != "prompt")]
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), min(num_prompts, len(dataset))))
    rows = dataset.remove_columns(list(pictures)).select(chosen)
    table = Table(title=title, title_justify="left", show_lines=len(columns) > 2)
    table.add_column("row", justify="right")
    for column in columns:
        table.add_column(column, overflow="fold")
    for number, row in zip(chosen, rows, strict=True):
        table.add_row(str(number), *("picture" if column in pictures else _cell(row[column]) for column in columns))
    return table


def _cell(value) -> str:
    from rich.markup import escape

    text = str(value)
    return escape(text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 4]} ...")


def make_parser(prog: str | None = None) -> PromptsParser:
    return PromptsParser(
        dataclass_types=(PromptsArguments,),
        prog=prog,
        description="List the prompt sets that have a name, or show what is in a prompt set, a file, or a dataset on "
        "the Hub.",
    )


def main(args: PromptsArguments):
    console = Console()
    if args.action == "list":
        console.print(list_table())
        return
    quieten(progress_bars=False)
    show(args, console)
