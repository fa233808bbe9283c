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

"""What a trainer is given: loaded, and refused with a reason where it cannot work."""

import itertools
import os
from collections.abc import Callable

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, Image, IterableDataset
from diffusers import DiffusionPipeline
from torch import nn
from transformers import Trainer

from ..policy import FlowPolicy
from ..prompts import PROMPT_SETS, as_prompts, load_prompts
from ..rewards import load_reward, reward_name
from ..rewards.remote import RemoteReward


def load_rewards(
    rewards, taken: list[str] = (), trust_remote_code: bool | None = None
) -> tuple[list[str], list[Callable]]:
    """Names and functions of the rewards. Names differ from each other and from those `taken`."""
    rewards = rewards if isinstance(rewards, (list, tuple)) else [rewards]
    functions = [load_reward(reward, trust_remote_code=trust_remote_code) for reward in rewards]
    names = []
    for reward, function in zip(rewards, functions, strict=True):
        # An address says nothing; the server behind it has a name.
        name = function.name if isinstance(function, RemoteReward) else reward_name(reward)
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in {*names, *taken}))
    return names, functions


def check_reward_columns(rewards: list[Callable], names: list[str], dataset: Dataset, argument: str):
    """Refuses a dataset that lacks what a reward scores by."""
    for reward, name in zip(rewards, names, strict=True):
        missing = [column for column in getattr(reward, "requires", ()) if column not in dataset.column_names]
        if missing:
            own = getattr(reward, "prompt_set", None)
            advice = f" load_prompts({own!r}) has them." if own else ""
            raise ValueError(
                f"{argument} has the columns {dataset.column_names}: the reward {name!r} needs {', '.join(missing)} too.{advice}"
            )


def own_prompts(reward: Callable, name: str) -> Dataset:
    prompt_set = getattr(reward, "prompt_set", None)
    if prompt_set is None:
        raise ValueError(
            f"train_dataset is None, and the reward {name!r} names no prompt set of its own. Give a dataset with a "
            f"'prompt' column, or the name of one of these: {', '.join(PROMPT_SETS)}."
        )
    return load_prompts(prompt_set)


def load_dataset_argument(dataset, argument: str, split: str, max_rows: int | None = None) -> Dataset:
    """The dataset that is given or named, checked; of a stream its first `max_rows`."""
    try:
        dataset = as_prompts(dataset, max_rows if isinstance(dataset, IterableDataset) else None, split=split)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    check_dataset(dataset, argument)
    return dataset


def check_dataset(dataset: Dataset, argument: str):
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{argument} has the columns {dataset.column_names}: expected one named 'prompt'.")
    if len(dataset) == 0:
        raise ValueError(f"{argument} is empty.")
    reserved = {"prompts", "images", "videos", "completions", "trainer_state", "log_extra", "log_metric"}
    if clash := sorted(reserved & set(dataset.column_names)):
        raise ValueError(
            f"{argument} has columns {clash}, names that reward functions get other things by. Rename them."
        )
    for number, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{argument}: the prompt of row {number} is {prompt!r}; expected a text.")


def check_precision(pipeline: DiffusionPipeline, args):
    """Refuses float32 weights beside encoders in half precision, where nothing casts between the two."""
    dtypes = {c.dtype for c in pipeline.components.values() if isinstance(c, nn.Module) and hasattr(c, "dtype")}
    quantized = [name for name, c in pipeline.components.items() if getattr(c, "hf_quantizer", None) is not None]
    if args.full_finetuning and quantized:
        raise ValueError(
            f"full_finetuning=True cannot train quantised weights ({', '.join(quantized)}). Drop one of the two."
        )
    if args.full_finetuning and dtypes != {torch.float32} and not (args.bf16 or args.fp16):
        raise ValueError(
            f"full_finetuning=True keeps the denoiser in float32, and the pipeline holds {sorted(map(str, dtypes))}. Set "
            "bf16=True (or fp16=True), or load the pipeline in float32."
        )


def check_optimizer(args):
    """Refuses an optimizer whose package is missing, and those that an update of several backward passes is nothing for."""
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or name.endswith("_layerwise"):
        raise ValueError(
            f"optim={name!r} moves weights within a backward pass, and an update is the sum of several: one for each step and "
            "each transition_batch_size rows. Choose another, e.g. adamw_torch_8bit."
        )
    if name.startswith(("galore", "apollo")):
        return  # they are looked for with the model's layers
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(f"optim={name!r}: {error}") from error


def check_offload(policy: FlowPolicy, args):
    """Refuses to move what a pipeline does not have, or has in weights of bitsandbytes' 8 bits, which cannot be moved."""
    for name, models in (("offload_encoders", policy.encoders.models), ("offload_vae", policy.autoencoder.models)):
        if getattr(args, name) and not models:
            raise ValueError(
                f"{name}=True has no effect: {type(policy.pipeline).__name__} has none that can be moved. Leave it unset."
            )


def check_gradient_scale(gradient_scale: float, distributed_type: DistributedType):
    """Refuses float16 weights where what brings an adapter's gradients back to their size is lost."""
    if gradient_scale != 1 and distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"dtype='float16' with {distributed_type.value}: gradients pass float16 weights scaled by {gradient_scale:g}, and "
            "parameters that are cut to pieces know no way back. Load the pipeline in bfloat16, or use multi_gpu (DDP)."
        )


def settle_float16(gradient_scale: float, args):
    """
    Has float16 weights computed with in float16: TRL's default for GPUs, bfloat16, is switched off beside them.

    Raises:
        ValueError: If bfloat16 was asked for.
    """
    if gradient_scale == 1 or args.mixed_precision != "bf16":
        return
    # Of a launcher's file the last word is the run's own: TRL's files for accelerate all say bf16.
    asked_for = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" if args.bf16_by_default else args.bf16
    if asked_for:
        raise ValueError(
            f"{'mixed_precision=bf16 of the launcher' if args.bf16_by_default else 'bf16=True'} would compute in bfloat16, with "
            "8 significant bits, with weights that dtype='float16' has loaded with 11. Load the pipeline in bfloat16, or set "
            "bf16=False (fp16=True keeps some operations in float32)."
        )
    args.bf16, args.mixed_precision = False, "no"


def check_scaler(args, scaler: torch.amp.GradScaler | None):
    """Refuses to train in float16 where accelerate would compute in float32 and say nothing."""
    if args.mixed_precision == "fp16" and scaler is None:
        raise ValueError(
            f"fp16=True has no effect on {args.device.type}: accelerate computes in float16 on GPUs alone. Leave it unset."
        )


def start_scaler(scaler: torch.amp.GradScaler | None, gradient_scale: float):
    """
    Has mixed precision's scaling of the loss begin at 1 where gradients are scaled on their way through float16 weights.
    The two multiply, and the scaler's usual beginning, 65536, would take many updates of infinity to come down.
    """
    if scaler is not None and gradient_scale != 1:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})


def check_images(dataset: Dataset, argument: str):
    """Refuses a dataset without pictures, for a pipeline that starts from one."""
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{argument} has the columns {dataset.column_names}: the pipeline starts from a picture, expected one named "
            "'image' beside 'prompt'."
        )
    if not isinstance(dataset.features["image"], Image):
        raise ValueError(
            f"{argument}: the column 'image' holds {dataset.features['image']}; expected pictures. Cast it with "
            "dataset.cast_column('image', datasets.Image())."
        )
    # Undecoded: a look at thousands of pictures would take as long as an update.
    raw = dataset.select_columns("image").cast_column("image", Image(decode=False))
    if missing := [number for number, row in enumerate(raw) if row["image"] is None]:
        raise ValueError(f"{argument}: row {missing[0]} and {len(missing) - 1} others have no image. Leave them out.")
