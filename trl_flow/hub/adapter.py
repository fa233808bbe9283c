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

"""Saving an adapter once so that diffusers and PEFT both load it, and loading it back."""

from __future__ import annotations

import copy
import inspect
import os
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors.torch import save_file
from transformers.utils import logging

from ..report.history import without_paths


logger = logging.get_logger(__name__)

DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PEFT_PREFIX = "base_model.model."


def supports_diffusers_format(
    pipeline_class: type[DiffusionPipeline], component: str, peft_config: PeftConfig
) -> bool:
    """
    Whether `pipe.load_lora_weights` can load an adapter of this configuration.

    False for pipelines without a LoRA loader, for adapters other than LoRA, and for LoRA variants whose tensors the
    diffusers loader refuses or drops (DoRA's magnitudes, trained biases, whole modules).

    Args:
        pipeline_class (`type[DiffusionPipeline]`):
            Class of the base pipeline.
        component (`str`):
            Name of the trained denoiser in the pipeline: `"transformer"` or `"unet"`.
        peft_config (`peft.PeftConfig`):
            Configuration of the adapter.

    Returns:
        `bool`
    """
    save_lora_weights = getattr(pipeline_class, "save_lora_weights", None)
    if save_lora_weights is None:
        return False
    parameters = inspect.signature(save_lora_weights).parameters
    slot = _slot(component)
    # Without the metadata argument a loader takes alpha = r, which silently rescales the adapter.
    if not {f"{slot}_lora_layers", f"{slot}_lora_adapter_metadata"} <= parameters.keys():
        return False
    if peft_config.peft_type != PeftType.LORA:
        return False
    return not (peft_config.use_dora or peft_config.modules_to_save or peft_config.bias != "none")


def save_adapter(
    denoiser: PeftModel,
    pipeline_class: type[DiffusionPipeline],
    component: str,
    output_dir: str | Path,
    base_model_name_or_path: str | None,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
) -> list[Path]:
    """
    Write an adapter in PEFT's and in diffusers' format side by side.

    PEFT reads `adapter_model.safetensors` and `adapter_config.json`; diffusers reads
    `pytorch_lora_weights.safetensors`, which carries the LoRA configuration in its metadata. Both files are needed:
    `pipe.load_lora_weights` of a directory that holds the PEFT file alone loads nothing and raises nothing. An
    existing `README.md` is left alone.

    Args:
        denoiser (`peft.PeftModel`):
            PEFT model around the pipeline's denoiser.
        pipeline_class (`type[DiffusionPipeline]`):
            Class of the base pipeline.
        component (`str`):
            Name of the denoiser in the pipeline: `"transformer"` or `"unet"`.
        output_dir (`str` or `Path`):
            Directory to write to; created if missing.
        base_model_name_or_path (`str` or `None`):
            Hub id or path of the base pipeline, written to `adapter_config.json`.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Weights to save instead of the model's own: an average of the adapter, or a state dict gathered from
            shards. Names are those of `denoiser.state_dict()`, with or without the prefix of an enclosing module.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Adapter to save.

    Returns:
        `list[Path]`: the files written.

    Raises:
        TypeError: `denoiser` is not a `PeftModel`.
        ValueError: `adapter_name` is not one of its adapters, or `state_dict` holds no tensor of the adapter.
    """
    if not isinstance(denoiser, PeftModel):
        raise TypeError(
            f"denoiser is a {type(denoiser).__name__}; expected a PeftModel. Wrap it with get_peft_model()."
        )
    if adapter_name not in denoiser.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: the model holds {sorted(denoiser.peft_config)}.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    if state_dict is not None:
        state_dict = {key[key.index(PEFT_PREFIX) :]: value for key, value in state_dict.items() if PEFT_PREFIX in key}
    weights = get_peft_model_state_dict(denoiser, state_dict=state_dict, adapter_name=adapter_name)
    if not weights:
        raise ValueError(f"state_dict holds no tensor of the adapter {adapter_name!r}: nothing to save.")
    # safetensors refuses tensors that share storage; a state dict of averages may hold views into one flat buffer.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(weights.items())}

    # Not `PeftModel.save_pretrained`: it rewrites README.md, where our model card lives.
    config = copy.deepcopy(denoiser.peft_config[adapter_name])
    config.base_model_name_or_path = base_model_name_or_path
    config.inference_mode = True
    denoiser_class = type(denoiser.get_base_model())
    weights_path = output_dir / SAFETENSORS_WEIGHTS_NAME
    save_file(weights, weights_path, metadata={"format": "pt"})
    config.save_pretrained(
        str(output_dir),
        auto_mapping_dict={
            "base_model_class": denoiser_class.__name__,
            "parent_library": denoiser_class.__module__,
        },
    )
    written = [weights_path, output_dir / "adapter_config.json"]

    if not supports_diffusers_format(pipeline_class, component, config):
        logger.warning(
            f"{pipeline_class.__name__} cannot load this {config.peft_type.value} adapter of its {component} with "
            "`load_lora_weights`; only PEFT's format was written. Load it with `trl_flow.hub.load_adapter`."
        )
        return written

    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    metadata = without_paths(metadata)  # files like this one are passed on
    pipeline_class.save_lora_weights(
        str(output_dir),
        **{
            f"{_slot(component)}_lora_layers": {
                key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()
            },
            f"{_slot(component)}_lora_adapter_metadata": metadata,
        },
    )
    written.append(output_dir / DIFFUSERS_WEIGHTS_NAME)
    return written


def load_adapter(
    pipeline: DiffusionPipeline,
    adapter_name_or_path: str | Path,
    component: str | None = None,
    revision: str | None = None,
) -> DiffusionPipeline:
    """
    Load an adapter into a pipeline, whichever of the two formats the pipeline can read.

    `pipe.load_lora_weights` is called when the pipeline has it and the adapter is one it reads; other pipelines and
    adapters get their layers from PEFT. Unlike `load_lora_weights`, an adapter that changes nothing is an error.

    Args:
        pipeline (`DiffusionPipeline`):
            Base pipeline; changed in place.
        adapter_name_or_path (`str` or `Path`):
            Hub id or directory of the adapter.
        component (`str`, *optional*):
            Name of the denoiser in the pipeline. Found by itself when `None`.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `DiffusionPipeline`: the same pipeline.

    Raises:
        FileNotFoundError: neither a directory nor a Hub id.
        ValueError: the pipeline has no `transformer` or `unet`, or no layer of the adapter fits it.
    """
    adapter_name_or_path = str(adapter_name_or_path)
    if not os.path.isdir(adapter_name_or_path) and not HUB_ID.fullmatch(adapter_name_or_path):
        raise FileNotFoundError(f"{adapter_name_or_path} is neither a directory nor a Hub id.")
    if component is None:
        component = next((name for name in ("transformer", "unet") if name in pipeline.components), None)
    if component is None or pipeline.components.get(component) is None:
        raise ValueError(
            f"{type(pipeline).__name__} has no {component or 'transformer or unet'}: it holds "
            f"{sorted(pipeline.components)}."
        )
    denoiser = pipeline.components[component]
    tensors_before = _count_parameters(denoiser)
    try:
        config = PeftConfig.from_pretrained(adapter_name_or_path, revision=revision)
    except ValueError:
        config = None  # no adapter_config.json: an adapter that another program saved for diffusers alone
    if config is None:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(
                f"{adapter_name_or_path} holds no adapter_config.json and {type(pipeline).__name__} has no LoRA loader."
            )
        pipeline.load_lora_weights(adapter_name_or_path, revision=revision)
    elif not _load_diffusers_format(pipeline, adapter_name_or_path, component, config, revision):
        # PEFT puts its layers into the denoiser itself, so the pipeline sees them without being told.
        PeftModel.from_pretrained(denoiser, adapter_name_or_path, revision=revision, is_trainable=False)
    if _count_parameters(denoiser) == tensors_before:
        raise ValueError(
            f"{adapter_name_or_path}: no layer of the adapter fits the {component} of {type(pipeline).__name__}. "
            "Is it the adapter of another model, or a directory without `pytorch_lora_weights.safetensors`?"
        )
    return pipeline


def _load_diffusers_format(
    pipeline: DiffusionPipeline, adapter_name_or_path: str, component: str, config: PeftConfig, revision: str | None
) -> bool:
    if not supports_diffusers_format(type(pipeline), component, config):
        return False
    # diffusers warns once per text encoder that the adapter has nothing for it. It never has; an adapter that has nothing
    # for the denoiser either is found by our caller.
    loader_logger = logging.get_logger("diffusers.loaders.lora_base")
    level = loader_logger.level
    loader_logger.setLevel(logging.ERROR)
    try:
        # By its name: without one, diffusers refuses to look into its cache when it is offline, and takes the file in
        # PEFT's format, of which it understands nothing, when that is the only one.
        second = {"load_into_transformer_2": True} if component != _slot(component) else {}
        pipeline.load_lora_weights(
            adapter_name_or_path, revision=revision, weight_name=DIFFUSERS_WEIGHTS_NAME, **second
        )
    except OSError:
        return False  # saved by PEFT alone
    finally:
        loader_logger.setLevel(level)
    return True


def _slot(component: str) -> str:
    """The name by which diffusers' LoRA files know a component: they hold one transformer, be it the second."""
    return component.removesuffix("_2")


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(1 for _ in module.parameters())
