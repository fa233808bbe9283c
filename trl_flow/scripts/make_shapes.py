# Copyright 2026 The trl-flow authors
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

"""Makes the shapes world, the miniature text-to-image pipeline that comes with trl-flow.

```sh
trl-flow make-shapes --output_dir shapes-pipeline
```
"""

import argparse
from dataclasses import dataclass, field


@dataclass
class MakeShapesArguments:
    """
    Arguments of `trl-flow make-shapes`.

    The defaults are the recipe of the packaged pipeline.
    """

    output_dir: str = field(default="shapes-pipeline", metadata={"help": "Folder to write the pipeline to."})
    seed: int = field(default=0, metadata={"help": "Seed of pictures, weights and training."})
    device: str = field(default="cpu", metadata={"help": "Where to train, `cpu` or `cuda`."})
    num_threads: int = field(
        default=1, metadata={"help": "CPU threads. One is fastest for a model this small unless cores are idle."}
    )
    num_pictures: int = field(default=24_576, metadata={"help": "Number of rendered pictures to train on."})
    vae_steps: int = field(default=1500, metadata={"help": "Updates of the VAE, on 64 pictures each."})
    steps: int = field(
        default=5250,
        metadata={"help": "Updates of the transformer, on 128 pictures each, at a constant learning rate."},
    )
    final_steps: int = field(
        default=1500,
        metadata={
            "help": "Further updates with a decaying learning rate. It stops early on purpose: reinforcement learning "
            "is to have something left to do."
        },
    )
    check_every: int = field(default=250, metadata={"help": "Updates between two measurements on training prompts."})
    num_prompts: int = field(default=480, metadata={"help": "Number of test prompts to measure the result on."})


def main(script_args: MakeShapesArguments):
    import torch

    from trl_flow.shapes.world import make_world

    torch.set_num_threads(script_args.num_threads)
    report = make_world(
        script_args.output_dir,
        seed=script_args.seed,
        device=script_args.device,
        num_pictures=script_args.num_pictures,
        vae_steps=script_args.vae_steps,
        steps=script_args.steps,
        final_steps=script_args.final_steps,
        check_every=script_args.check_every,
        num_prompts=script_args.num_prompts,
    )
    print(f"Wrote {script_args.output_dir} ({report['megabytes']} MiB) in {report['minutes']} minutes.")
    print(f"Test prompts, guidance 1, 10 steps: strict {report['strict']:.3f}, partial {report['partial']:.3f}")
    print(
        "Test prompts, guidance 3, 28 steps: "
        f"strict {report['guided_strict']:.3f}, partial {report['guided_partial']:.3f}"
    )
    print(f"Transformer: {report['rows_per_second']} rows per second")


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl_flow.scripts.parser import FlowParser

    description = "Make the shapes world, a miniature text-to-image pipeline, from a seed, and print what it reached."
    settings = dict(dataclass_types=(MakeShapesArguments,), description=description)
    if subparsers is not None:
        return subparsers.add_parser("make-shapes", help=description, **settings)
    return FlowParser(prog=prog, **settings)


if __name__ == "__main__":
    parser = make_parser()
    (script_args,) = parser.parse_args_and_config()
    main(script_args)
