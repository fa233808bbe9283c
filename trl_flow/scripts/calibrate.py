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

"""`trl-flow calibrate`: a noise level for each step, found with [`calibrate_noise`]."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from .arguments import FlowScriptArguments
from .parser import FlowParser
from .quiet import quieten
from .training import default_rewards, load_script_prompts, model_init_kwargs


@dataclass
class CalibrateArguments:
    r"""
    Arguments of `trl-flow calibrate`, beside those of the rollouts.

    Args:
        output (`str`, *optional*, defaults to `"noise_levels.json"`):
            File of the table; its picture goes beside it.
        num_samples (`int`, *optional*, defaults to `64`):
            Trajectories per iteration.
        num_calibration_iterations (`int`, *optional*, defaults to `30`):
            Updates of the table.
        rule (`str`, *optional*, defaults to `"significance"`):
            `"paper"` for Algorithm 1 to the letter, or `"significance"` for a threshold that scales with the number
            of samples.
        threshold (`float`, *optional*):
            Imbalance that counts: in standard deviations of a fair coin (1.96) or, for the paper's rule, as a count (2).
        step_size (`float`, *optional*):
            Change of a noise level per iteration: relative (0.1) or, for the paper's rule, absolute (0.01).
        min_noise_level (`float`, *optional*, defaults to `0.001`):
            Lower bound.
        max_noise_level (`float`, *optional*):
            Upper bound. By default the level whose step adds as much noise as the next step holds.
    """

    HELP_GROUPS: ClassVar[dict[str, list[str]]] = {
        "Calibration": [
            "output",
            "num_samples",
            "num_calibration_iterations",
            "rule",
            "threshold",
            "step_size",
            "min_noise_level",
            "max_noise_level",
        ],
    }

    output: str = field(
        default="noise_levels.json", metadata={"help": "File of the table; its picture goes beside it."}
    )
    num_samples: int = field(default=64, metadata={"help": "Trajectories per iteration."})
    num_calibration_iterations: int = field(default=30, metadata={"help": "Updates of the table."})
    rule: str = field(
        default="significance",
        metadata={
            "help": "`paper` for Algorithm 1 to the letter, or `significance` for a threshold that scales with the "
            "number of samples.",
            "choices": ["significance", "paper"],
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Imbalance that counts: in standard deviations of a fair coin (1.96) or, for the paper's rule, as "
            "a count (2)."
        },
    )
    step_size: float | None = field(
        default=None,
        metadata={
            "help": "Change of a noise level per iteration: relative (0.1) or, for the paper's rule, absolute (0.01)."
        },
    )
    min_noise_level: float = field(default=1e-3, metadata={"help": "Lower bound."})
    max_noise_level: float | None = field(
        default=None,
        metadata={"help": "Upper bound. By default the level whose step adds as much noise as the next step holds."},
    )

    def __post_init__(self):
        if Path(self.output).suffix != ".json":
            raise ValueError(f"output={self.output}: expected a name that ends in .json")


def main(script_args: FlowScriptArguments, calibrate_args: CalibrateArguments, training_args):
    quieten(progress_bars=script_args.model_name_or_path != "shapes")
    from transformers import IntervalStrategy

    from trl_flow import calibrate_noise

    script_args.reward_funcs = default_rewards(script_args)
    # The configuration of a run may ask for evaluations, for which there is nothing here.
    training_args.eval_strategy = IntervalStrategy.NO
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)
    table = calibrate_noise(
        script_args.model_name_or_path,
        script_args.reward_funcs,
        training_args,
        load_script_prompts(script_args, script_args.dataset_train_split, training_args.trust_remote_code),
        output_file=calibrate_args.output,
        num_samples=calibrate_args.num_samples,
        num_iterations=calibrate_args.num_calibration_iterations,
        rule=calibrate_args.rule,
        threshold=calibrate_args.threshold,
        step_size=calibrate_args.step_size,
        min_noise_level=calibrate_args.min_noise_level,
        max_noise_level=calibrate_args.max_noise_level,
    )
    print_table(table)
    output = Path(calibrate_args.output)
    print(f"\nWrote {output} and {output.with_suffix('.png')}. Train with it:")
    print(f"  trl-flow dense-grpo --sde_type {table['sde_type']} --noise_level {output} ...")


def print_table(table: dict) -> None:
    """Noise levels and the share of positive dense rewards, before and after, for each calibrated step."""
    shown = Table(title="Noise level per step", title_justify="left")
    for title in ("step", "sigma", "before", "gains > 0", "after", "gains > 0"):
        shown.add_column(title, justify="right")
    for step in table["sde_steps"]:
        row = [str(step), f"{table['sigmas'][step]:.3f}"]
        for side in (table["before"], table["after"]):
            counted = [gain for gain in side["gains"][step] if gain != 0]
            share = f"{sum(gain > 0 for gain in counted) / len(counted):.0%}" if counted else "-"
            row += [f"{side['noise_level'][step]:.3f}", share]
        shown.add_row(*row)
    Console().print(shown)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl_flow import DenseGRPOConfig

    description = (
        "Find, for each step, the noise level at which a trajectory gains as often as it loses (DenseGRPO, Algorithm "
        "1), and write it as a table for --noise_level. Takes the configuration of a dense-grpo run."
    )
    rollouts = [
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "max_sequence_length",
        "sde_type",
        "noise_level",
        "sde_steps",
        "tail_steps",
        "tail_solver",
        "rollout_batch_size",
        "reward_weights",
        "seed",
    ]
    prompts = [
        name
        for name in FlowScriptArguments.HELP_GROUPS["Rewards and prompts"]
        if "eval" not in name and "test" not in name and name != "on_reward_hacking"
    ]
    model = [name for name in FlowScriptArguments.HELP_GROUPS["Model and adapter"] if name[:4] not in ("lora", "use_")]
    settings = dict(
        dataclass_types=(FlowScriptArguments, CalibrateArguments, DenseGRPOConfig),
        help_groups={
            **CalibrateArguments.HELP_GROUPS,
            "Model": model,
            "Rewards and prompts": prompts,
            "Rollouts": rollouts,
        },
        description=description,
    )
    if subparsers is not None:
        return subparsers.add_parser("calibrate", help=description, **settings)
    return FlowParser(prog=prog, **settings)
