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

"""
What runs have done, as one page: a run's own report again, or several runs side by side.

```sh
trl-flow report runs/dense-grpo runs/flow-grpo --output_dir comparison
```
"""

from dataclasses import dataclass, field

from .parser import FlowParser


@dataclass
class ReportArguments:
    """
    Arguments of `trl-flow report`.

    Args:
        run (`list[str]`, *optional*):
            Output directories of training commands, or checkpoints. Of one, its own report is written again, into it;
            several are compared, with the first. Stand first on the command line without a name.
        output_dir (`str`, *optional*):
            Directory of the comparison. By default `"comparison"`.
        title (`str`, *optional*):
            Heading. By default the name of a run, or how many they are.
    """

    run: list[str] | None = field(
        default=None,
        metadata={
            "help": "Output directories of training commands, or checkpoints. Of one, its own report is written "
            "again, into it; several are compared, with the first. Stand first on the command line without a name.",
            "aliases": ["--runs"],
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Directory of the comparison. By default `comparison`."}
    )
    title: str | None = field(
        default=None, metadata={"help": "Heading. By default the name of a run, or how many they are."}
    )

    def __post_init__(self):
        if not self.run:
            raise ValueError("name a run, or several to compare: trl-flow report runs/first runs/second")
        if len(self.run) == 1 and self.output_dir is not None:
            raise ValueError(
                f"output_dir={self.output_dir} is for comparisons: the report of one run is written into "
                f"{self.run[0]}. Name a second run, or leave it out"
            )


class ReportParser(FlowParser):
    """Takes the runs without a name, too, if they come first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} RUN [RUN ...] [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        args = list(args or ())
        if args and not args[0].startswith("-"):
            args.insert(0, "--run")
        return super().parse_args_and_config(args, **kwargs)


def make_parser(prog: str | None = None) -> ReportParser:
    return ReportParser(
        dataclass_types=(ReportArguments,),
        prog=prog,
        description="Write a run's report again, or compare several runs: curves, scores with intervals, settings "
        "that differ, and pictures of the same prompts, on one page that needs no other file.",
    )


def main(args: ReportArguments):
    from pathlib import Path

    for run in args.run:
        if not Path(run).is_dir():
            raise FileNotFoundError(f"{run} is not a directory: expected the --output_dir of a training command")
    if len(args.run) == 1:
        from ..report import write_report

        print(f"Report:  {write_report(args.run[0], title=args.title)}")
        return

    from rich.console import Console

    from ..report.runs import compare_runs, load_runs, score_table

    runs = load_runs(args.run)
    page = compare_runs(runs, args.output_dir or "comparison", args.title)
    Console().print(score_table(runs))
    print(f"Comparison:  {page}")


if __name__ == "__main__":
    (script_args,) = make_parser().parse_args_and_config()
    main(script_args)
