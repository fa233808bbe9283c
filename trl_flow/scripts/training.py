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

"""What the training commands share: parser, run directory, training, and the last words."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

import trl_flow

from ..interruption import InterruptionCallback
from ..trainer.run_config import (
    as_yaml,
    family_settings,
    own_fields,
    public_command_line,
    resolved_config,
    write_config,
)
from .arguments import FlowScriptArguments, TrainingScriptArguments
from .methods import METHODS
from .parser import FlowParser
from .quiet import quieten


TRAINING_SETTINGS = {
    "Rollouts": [
        "num_generations",
        "num_inference_steps",
        "sigmas",
        "sde_type",
        "noise_level",
        "sde_steps",
        "same_initial_noise",
        "guidance_scale",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "max_sequence_length",
        "generation_kwargs",
        "rollout_batch_size",
        "precompute_prompts",
        "offload_encoders",
        "offload_vae",
        "vae_slicing",
        "vae_tiling",
        "offload_trajectories",
    ],
    "Advantages and objective": [
        "reward_weights",
        "multi_objective_aggregation",
        "scale_rewards",
        "advantage_clip",
        "max_nan_fraction",
        "objective",
        "epsilon",
        "epsilon_high",
        "kl_mask_threshold",
        "beta",
        "kl_type",
        "step_weighting",
    ],
    "Training": [
        "output_dir",
        "dry_run",
        "print_config",
        "learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
        "transition_batch_size",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "ema_decay",
        "ema_update_after",
        "optim",
        "activation_checkpointing",
        "bf16",
        "use_cpu",
        "seed",
    ],
    "Evaluation, logging and saving": [
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "num_eval_inference_steps",
        "eval_guidance_scale",
        "logging_steps",
        "report_to",
        "run_name",
        "num_logged_images",
        "log_images",
        "num_printed_samples",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
    ],
    "Hub": [
        "push_to_hub",
        "hub_model_id",
        "hub_revision",
        "hub_private_repo",
        "hub_strategy",
        "hub_always_push",
    ],
}
MODEL_SETTINGS = ["adapter_name_or_path", "full_finetuning", "model_init_kwargs", "trust_remote_code"]

# Where transformers' help is about its own scripts.
HELP_TEXTS = {
    "output_dir": "Directory of the run: what was trained, the report, pictures, checkpoints, and config.yaml, which "
    "repeats the run. By default `trainer_output`.",
    "resume_from_checkpoint": "Where to go on: `true` for the last checkpoint of `output_dir`, a checkpoint's directory, or a "
    "repository on the Hub that checkpoints were pushed to (user/repo, user/repo/checkpoint-20@revision).",
    "push_to_hub": "Whether to push the run to the Hub, when `hub_strategy` says so.",
    "hub_model_id": "Repository, `user/repo`. By default your own, with the name of `output_dir`.",
    "hub_private_repo": "Whether a new repository is private. By default as your account or organization has it.",
    "hub_strategy": "When to push: at the `end`, at `every_save`, or then with the last `checkpoint` or `all_checkpoints`, from "
    "which a run goes on anywhere.",
}


def make_training_parser(command: str) -> FlowParser:
    """
    Parser of a training command.

    Args:
        command (`str`):
            Name in [`METHODS`].
    """
    config_class = getattr(trl_flow, METHODS[command].config)
    general = {name for names in TRAINING_SETTINGS.values() for name in names} | set(MODEL_SETTINGS)
    method = [name for name in own_fields(config_class) if name not in general]
    return FlowParser(
        dataclass_types=(TrainingScriptArguments, config_class),
        help_groups={
            "Model and adapter": FlowScriptArguments.HELP_GROUPS["Model and adapter"] + MODEL_SETTINGS,
            "Rewards and prompts": FlowScriptArguments.HELP_GROUPS["Rewards and prompts"],
            **({"Method": method} if method else {}),
            **TRAINING_SETTINGS,
        },
        help_texts=HELP_TEXTS,
        launches=True,
        prog=f"trl-flow {command}",
        description=METHODS[command].description,
        epilog="The arguments of `accelerate launch` (--num_processes, --multi_gpu, ...) and --accelerate_config "
        "NAME|FILE are accepted too.",
        examples=[
            f"trl-flow {command} --config {config} \\\n      {rest}"
            for config, rest in (
                (f"examples/shapes/{command}.yaml", "--dry_run"),
                (f"examples/shapes/{command}.yaml", "--output_dir runs/first"),
                ("runs/first/config.yaml", "--output_dir runs/again"),
            )
        ],
    )


def default_rewards(script_args: FlowScriptArguments) -> list[str]:
    """The rewards that were asked for; the embedded world brings its own."""
    if script_args.reward_funcs:
        return script_args.reward_funcs
    if script_args.model_name_or_path == "shapes":
        return ["shapes"]
    raise ValueError(
        "reward_funcs is empty: name at least one reward to train on, e.g. `--reward_funcs my_rewards.score`"
    )


def run_training(
    command: str, script_args: TrainingScriptArguments, training_args: Any, words: Sequence[str] | None = None
) -> None:
    """
    Train, save, report; or print the settings; or, of a dry run, tell what would be done.

    Args:
        command (`str`):
            Name in [`METHODS`].
        script_args ([`TrainingScriptArguments`]):
            Model, adapter, rewards and prompts.
        training_args ([`FlowGRPOConfig`]):
            Config of the method.
        words (`Sequence[str]`, *optional*):
            The command's arguments as they were typed.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, when the checkpoint is saved.
    """
    from ..hub.uploading import push_command
    from ..policy import default_call_arguments
    from ..trainer.saving import CALIBRATION_FILE, check_output_dir

    if script_args.print_config:
        script_args.reward_funcs = default_rewards(script_args)
        print(as_yaml(resolved_config(script_args, training_args)), end="")
        return
    quieten(progress_bars=script_args.model_name_or_path != "shapes")
    resume = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None, "none": None, "": None}.get(str(resume).lower(), resume)
    if training_args.process_index == 0 and resume is None:
        check_output_dir(training_args.output_dir)
    script_args.reward_funcs = default_rewards(script_args)
    if script_args.dry_run:
        from .dry_run import dry_run

        dry_run(getattr(trl_flow, METHODS[command].trainer), script_args, training_args)
        return
    config = resolved_config(script_args, training_args)

    trainer = make_trainer(getattr(trl_flow, METHODS[command].trainer), script_args, training_args)
    trainer.command = f"trl-flow {command} --config config.yaml --output_dir runs/again"
    trainer.command_line = None if words is None else public_command_line([command, *words])
    # What the model asks for where nothing was said: the run is repeated with it.
    config |= {name: trainer.policy.call_arguments[name] for name in default_call_arguments(trainer.base_model)}
    config |= family_settings(trainer.policy)
    config["num_eval_inference_steps"] = trainer.args.num_eval_inference_steps
    if isinstance(training_args.noise_level, str):
        # The run's own copy: whoever calibrates again writes the file anew.
        config["noise_level"] = os.path.abspath(os.path.join(training_args.output_dir, CALIBRATION_FILE))
    # When training begins, and not before: what is refused leaves no trace.
    trainer.add_callback(_WriteConfig(config, command))
    trainer.add_callback(InterruptionCallback(resume_command(command, training_args)))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        print_scores(trainer)
        print(f"\nReport:  {Path(training_args.output_dir, 'report.html')}")
        print(f"Pictures with the new adapter:\n  {generate_command(trainer, script_args)}")
    try:
        if training_args.push_to_hub:
            commit = trainer.push_to_hub()
            if commit is not None:
                print(f"Pushed: {commit.commit_url}")
    except KeyboardInterrupt:
        args = trainer.args
        line = push_command(args.output_dir, trainer.hub_model_id, args.hub_revision, args.hub_private_repo)
        if trainer.is_world_process_zero():
            print(f"Not pushed. Everything is saved in {args.output_dir}. To push it later: {line}", file=sys.stderr)
        raise
    finally:
        # A push that fails is the run's last word, and no reason to leave trackers and processes open.
        trainer.end()


def resume_command(command: str, training_args: Any) -> str:
    """The command line that goes on with a run from its last checkpoint."""
    config = str(Path(training_args.output_dir, "config.yaml"))
    line = shlex.join(["trl-flow", command, "--config", config, "--resume_from_checkpoint", "true"])
    if training_args.world_size > 1:
        line += f" (and the same launch arguments: {training_args.world_size} processes)"
    return line


class _WriteConfig(TrainerCallback):
    """Writes the run's `config.yaml` when training begins."""

    def __init__(self, config: dict[str, Any], command: str):
        self.config, self.command = config, command

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_config(self.config, self.command)


def make_trainer(trainer_class: type, script_args: FlowScriptArguments, training_args: Any):
    """The trainer, with prompts and adapter as the arguments say."""
    consent = training_args.trust_remote_code
    train_dataset = load_script_prompts(script_args, script_args.dataset_train_split, consent)
    eval_dataset = None
    if training_args.eval_strategy == "no" and script_args.eval_dataset_name is not None:
        raise ValueError(
            f"eval_dataset_name={script_args.eval_dataset_name!r} has no effect with eval_strategy='no'. Drop one of them."
        )
    if training_args.eval_strategy != "no":
        number = script_args.num_eval_prompts
        if script_args.eval_dataset_name is not None:
            from ..prompts import PROMPT_SETS, load_prompts, parse_columns

            name = script_args.eval_dataset_name
            # A set that has a name has columns of its own.
            columns = None if name in PROMPT_SETS else parse_columns(script_args.dataset_columns)
            eval_dataset = load_prompts(name, script_args.dataset_test_split, num_prompts=number, columns=columns)
        else:
            eval_dataset = load_script_prompts(script_args, script_args.dataset_test_split, consent, number)
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)
    callbacks = None
    if script_args.on_reward_hacking is not None:
        from ..callbacks import RewardHackingCallback

        callbacks = [RewardHackingCallback(script_args.on_reward_hacking)]
    return trainer_class(
        model=script_args.model_name_or_path,
        reward_funcs=script_args.reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_reward_funcs=script_args.eval_reward_funcs,
        callbacks=callbacks,
        peft_config=make_peft_config(script_args, training_args),
    )


def make_peft_config(script_args: FlowScriptArguments, training_args: Any):
    """The adapter that was asked for; `None`, which is the default of the pipeline's family, where nothing was said."""
    from peft import LoraConfig

    from ..policy import find_record

    given = (script_args.lora_r, script_args.lora_alpha, script_args.lora_target_modules)
    if given == (None, None, None) and not script_args.use_dora:
        return None
    for name in ("full_finetuning", "adapter_name_or_path"):
        if getattr(training_args, name, None):
            raise ValueError(
                f"{name}={getattr(training_args, name)!r} makes no new adapter: lora_r, lora_alpha, lora_target_modules and "
                "use_dora would have no effect. Leave them unset."
            )
    record = find_record(script_args.model_name_or_path, revision=script_args.model_revision)
    rank = script_args.lora_r or record.lora_r
    return LoraConfig(
        r=rank,
        lora_alpha=script_args.lora_alpha or 2 * rank,
        target_modules=script_args.lora_target_modules,
        use_dora=script_args.use_dora,
        init_lora_weights="gaussian",
    )


def load_script_prompts(
    script_args: FlowScriptArguments, split: str, trust_remote_code: bool, num_prompts: int | None = None
):
    """A split of the prompts that were asked for, else of those that the first reward names as its own."""
    from ..prompts import load_prompts, parse_columns
    from ..rewards import load_reward

    name = script_args.dataset_name
    if name is None:
        reward = load_reward(script_args.reward_funcs[0], trust_remote_code=trust_remote_code)
        name = getattr(reward, "prompt_set", None)
    if name is None:
        raise ValueError(
            f"dataset_name is missing, and the reward {script_args.reward_funcs[0]!r} has no prompts of its own: name "
            "a prompt set, a dataset on the Hub or a file"
        )
    return load_prompts(
        name,
        split=split,
        config=script_args.dataset_config,
        num_prompts=num_prompts,
        columns=parse_columns(script_args.dataset_columns),
        revision=script_args.dataset_revision,
    )


def model_init_kwargs(script_args: FlowScriptArguments, training_args: Any) -> dict[str, Any]:
    """Keyword arguments for loading the pipeline; those in the config win, as in TRL's scripts."""
    import torch

    loading = {"dtype": getattr(torch, script_args.dtype)}
    if script_args.model_revision is not None:
        loading["revision"] = script_args.model_revision
    if training_args.trust_remote_code:
        loading["trust_remote_code"] = True
    if script_args.quantization is not None:
        loading["quantization_config"] = quantization_config(script_args)
    return {**loading, **(training_args.model_init_kwargs or {})}


def quantization_config(script_args: FlowScriptArguments):
    """diffusers' configuration of the quantisation that was asked for, for the denoisers alone."""
    import importlib.util

    import torch
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    from ..policy import find_record

    package = {"int8": "torchao", "nf4": "bitsandbytes"}[script_args.quantization]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantization={script_args.quantization!r} needs {package}: `pip install {package}`.")
    if script_args.quantization == "nf4" and not _has_accelerator():
        raise ValueError(
            "quantization='nf4' needs a GPU: diffusers loads the weights of bitsandbytes nowhere else. `int8` works on CPUs."
        )
    if script_args.quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, script_args.dtype),
        )
    record = find_record(script_args.model_name_or_path, revision=script_args.model_revision)
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(record.components, config))


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available() or torch.mps.is_available()


def held_out_scores(log_history: list[dict]) -> dict[str, tuple[float, float]]:
    """First and last logged held-out mean of each reward, by the reward's name."""
    prefix, suffix = "eval_rewards/", "/mean"
    scores = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith(prefix) and key.endswith(suffix) and value is not None:
                name = key.removeprefix(prefix).removesuffix(suffix)
                scores[name] = (scores[name][0] if name in scores else value, value)
    return scores


def paired_intervals(output_dir: str, last_step: int | None = None) -> dict[str, float]:
    """
    Half the 95 % interval of the mean change of each held-out score, up to `last_step` (a run may have been rolled back).

    Pictures are paired: every evaluation starts from the same prompts and noise, so that what differs between prompts
    cancels out.
    """
    from ..report.history import paired_difference

    files = sorted(Path(output_dir, "samples").glob("step_*.json"))
    if last_step is not None:
        files = [file for file in files if int(file.stem.removeprefix("step_")) <= last_step]
    if len(files) < 2:
        return {}
    first, last = (json.loads(files[position].read_text()) for position in (0, -1))
    if first["prompts"] != last["prompts"]:
        return {}
    intervals = {}
    for name in first["scores"].keys() & last["scores"].keys():
        if (found := paired_difference(first["scores"][name], last["scores"][name])) is not None:
            intervals[name] = found[1]
    return intervals


def print_scores(trainer) -> None:
    """Held-out scores before and after training, as a table."""
    log = trainer.state.log_history
    count = next((entry["eval_num_samples"] for entry in reversed(log) if "eval_num_samples" in entry), None)
    table = Table(title=f"Held-out scores on {count} pictures", title_justify="left")
    table.add_column("reward")
    first = next((entry["step"] for entry in log if "eval_num_samples" in entry), 0)
    # "Before" is the base model; a run that first looked later says so.
    for title in ("before" if first == 0 else f"step {first}", "after", "change, with its 95 % interval"):
        table.add_column(title, justify="right")
    scores, intervals = held_out_scores(log), paired_intervals(trainer.args.output_dir, trainer.state.global_step)
    for name in trainer.reward_names + trainer.eval_reward_names:
        if name in scores:
            before, after = scores[name]
            label = name if name in trainer.reward_names else f"{name} (watched)"
            change = f"{after - before:+.3f}" + (f" ± {intervals[name]:.3f}" if name in intervals else "")
            table.add_row(label, f"{before:.3f}", f"{after:.3f}", change)
    if table.row_count:
        Console().print()
        Console().print(table)


def generate_command(trainer, script_args: FlowScriptArguments) -> str:
    """The command line that makes pictures with the adapter of this run."""
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    words = ["trl-flow", "generate", "--model", script_args.model_name_or_path]
    words += ["--adapter", trainer.args.output_dir, "--prompt", dataset[0]["prompt"], "--compare"]
    if trainer.policy.family.image == "required":
        words += ["--image", "FILE"]
    return shlex.join(words)
