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

"""`trl-flow card`: a run's model card again, from what the run left on disk."""

from dataclasses import dataclass, field

from .parser import FlowParser
from .quiet import quieten


@dataclass
class CardArguments:
    r"""
    Arguments of `trl-flow card`.

    Args:
        run (`str`, *optional*):
            Directory of a run, or a copy of its repository. May stand first on the command line without its name.
        hub_model_id (`str`, *optional*):
            Repository that the card's example loads from, `user/repo`; also gives the title. By default as before.
        model_name (`str`, *optional*):
            Title. By default as before.
        license (`str`, *optional*):
            Licence by its id on the Hub. By default as before, which is that of the base model.
    """

    run: str | None = field(
        default=None, metadata={"help": "Directory of a run, or a copy of its repository. May stand first."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Repository that the card's example loads from, `user/repo`; also gives the title. By default as before."
        },
    )
    model_name: str | None = field(default=None, metadata={"help": "Title. By default as before."})
    license: str | None = field(
        default=None,
        metadata={"help": "Licence by its id on the Hub. By default as before, which is that of the base model."},
    )

    def __post_init__(self):
        if self.run is None:
            raise ValueError("name the directory of a run")


class CardParser(FlowParser):
    """Takes the run without its name, too, if it comes first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usage = f"{self.prog} RUN [--NAME VALUE ...]"

    def parse_args_and_config(self, args=None, **kwargs):
        args = list(args or ())
        if args and not args[0].startswith("-"):
            args.insert(0, "--run")
        return super().parse_args_and_config(args, **kwargs)


def make_parser(prog: str | None = None) -> CardParser:
    return CardParser(
        dataclass_types=(CardArguments,),
        prog=prog,
        description="Write a run's model card, README.md, again: from card.json, which training leaves beside it, the sample "
        "pictures and the curves. What is given here is kept in card.json.",
    )


def main(args: CardArguments):
    quieten(progress_bars=False)
    from ..hub import write_model_card

    path = write_model_card(args.run, hub_model_id=args.hub_model_id, model_name=args.model_name, license=args.license)
    print(f"Card:  {path}")
