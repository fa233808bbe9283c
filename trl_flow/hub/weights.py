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

"""What a policy has learned, as files: an adapter or a complete denoiser for each of its components."""

import inspect
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from .adapter import DIFFUSERS_WEIGHTS_NAME, HUB_ID, PEFT_PREFIX, load_adapter, save_adapter


# Names under which diffusers pipelines hold denoisers.
COMPONENTS = ("transformer", "unet", "transformer_2")
TRAINED_FILES = ("*.safetensors", "adapter_config.json", *(f"{component}/*" for component in COMPONENTS))


def save_policy(policy, output_dir: str | Path, base_model: str | None, state_dict: dict | None = None) -> None:
    """
    Write what is trained of a policy, so that the stock pipeline loads it.

    Adapters are written in both formats of [`save_adapter`]: that of the first component in `output_dir` itself, that of
    a second one (Wan 2.2's `transformer_2`) in a folder of its name. Complete denoisers are written as diffusers does,
    each in a folder of its name, to be loaded with [`load_trained`] or the model's own `from_pretrained`.

    Args:
        policy ([`FlowPolicy`]):
            The policy.
        output_dir (`str` or `Path`):
            Directory to write to; created if missing.
        base_model (`str` or `None`):
            Hub id or path of the base pipeline.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Weights to save instead of the policy's own, under the names that they have in it.
    """
    for component, denoiser in policy.denoisers.items():
        folder = Path(output_dir) / (component if policy.full_finetuning or _is_second(component) else "")
        prefix = f"{component}." if policy.full_finetuning else f"{component}.{PEFT_PREFIX}"
        weights = None
        if state_dict is not None:
            weights = {
                name.partition(f"{component}.")[2]: value for name, value in state_dict.items() if _holds(name, prefix)
            }
        if not policy.full_finetuning:
            save_adapter(denoiser, type(policy.pipeline), component, folder, base_model, weights)
        elif weights is None:
            denoiser.save_pretrained(folder)
        else:
            with torch.device("meta"):
                shell = type(denoiser).from_config(denoiser.config)
            # An average has no buffers.
            shell.load_state_dict({**denoiser.state_dict(), **weights}, assign=True)
            shell.save_pretrained(folder)


def _is_second(component: str) -> bool:
    return component.endswith("_2")


def _holds(name: str, prefix: str) -> bool:
    return name.startswith(prefix) or f".{prefix}" in name


def load_policy(policy, folder: str | Path) -> None:
    """
    Take back what [`save_policy`] wrote.

    Args:
        policy ([`FlowPolicy`]):
            The policy, with the same adapter.
        folder (`str` or `Path`):
            Directory that was written to.

    Raises:
        FileNotFoundError: The folder holds no such weights.
        ValueError: They are those of another adapter.
    """
    for component, denoiser in policy.denoisers.items():
        if policy.full_finetuning:
            saved = type(denoiser).from_pretrained(Path(folder) / component)
            denoiser.load_state_dict(_sharded_like(saved.state_dict(), denoiser.state_dict()))
            continue
        weights = load_file(Path(folder) / (component if _is_second(component) else "") / SAFETENSORS_WEIGHTS_NAME)
        state = get_peft_model_state_dict(denoiser)
        own, found = ({name: tuple(value.shape) for name, value in part.items()} for part in (state, weights))
        if own != found:
            name = min(name for name, _ in own.items() ^ found.items())
            raise ValueError(
                f"{folder} is of another adapter: {name} has the shape {found.get(name)}, expected {own.get(name)}."
            )
        set_peft_model_state_dict(denoiser, _sharded_like(weights, state))


def _sharded_like(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights, in parts on all processes where those that they replace are."""
    return {
        name: distribute_tensor(
            value.to(state[name].device, state[name].dtype),
            state[name].device_mesh,
            state[name].placements,
            src_data_rank=None,
        )
        if isinstance(state.get(name), DTensor)
        else value
        for name, value in weights.items()
    }


def holds_policy(folder: str | Path) -> bool:
    """
    Whether [`save_policy`] wrote to a folder.

    Args:
        folder (`str` or `Path`):
            The directory.
    """
    folder = Path(folder)
    return (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or any(
        (folder / component / name).is_file()
        for component in COMPONENTS
        for name in ("config.json", SAFETENSORS_WEIGHTS_NAME)
    )


def load_trained(
    pipeline: DiffusionPipeline, name_or_path: str | Path, revision: str | None = None
) -> DiffusionPipeline:
    """
    Load what a run has trained into a stock pipeline, in place: adapters of all its components, or complete denoisers.

    Args:
        pipeline (`DiffusionPipeline`):
            Base pipeline; changed in place.
        name_or_path (`str` or `Path`):
            Hub id or directory.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `DiffusionPipeline`: the same pipeline.

    Raises:
        FileNotFoundError: Neither a directory nor a Hub id.
        ValueError: It holds nothing that was trained, or nothing that fits the pipeline.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(name_or_path)):
            raise FileNotFoundError(f"{name_or_path} is neither a directory nor a Hub id.")
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(TRAINED_FILES)))
    complete = [component for component in COMPONENTS if (folder / component / "config.json").is_file()]
    for component in complete:
        denoiser = getattr(pipeline, component)
        denoiser.load_state_dict(type(denoiser).from_pretrained(folder / component, dtype=denoiser.dtype).state_dict())
    if not complete:
        more = [component for component in COMPONENTS if (folder / component / "adapter_config.json").is_file()]
        if [*folder.glob("*.safetensors"), *folder.glob("*lora*.bin")]:
            load_adapter(pipeline, folder)
        elif not more:
            raise ValueError(
                f"{folder} holds nothing that was trained: expected {SAFETENSORS_WEIGHTS_NAME}, {DIFFUSERS_WEIGHTS_NAME} or "
                f"the folder of a denoiser ({', '.join(COMPONENTS)})."
            )
        for component in more:
            load_adapter(pipeline, folder / component, component)
    return pipeline


def read_adapter(pipeline: DiffusionPipeline, name_or_path: str | Path, revision: str | None = None):
    """
    An adapter to continue from: one of ours, or any that PEFT or diffusers saved.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline that it belongs to.
        name_or_path (`str` or `Path`):
            Hub id or directory.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `dict[str, tuple[PeftConfig, dict[str, torch.Tensor]]]`: configuration and weights, in PEFT's names, of each
        component that the adapter holds something for.

    Raises:
        FileNotFoundError: Neither a directory nor a Hub id.
        ValueError: There is no adapter, one of another model, or one that is no LoRA of the denoisers alone.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(name_or_path)):
            raise FileNotFoundError(f"adapter={str(name_or_path)!r} is neither a directory nor a Hub id.")
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(TRAINED_FILES)))
    denoisers = {name: pipeline.components.get(name) for name in COMPONENTS}
    first = next(name for name, denoiser in denoisers.items() if isinstance(denoiser, torch.nn.Module))
    found = {}
    for component in (first, "transformer_2"):
        place = folder / component if _is_second(component) else folder
        if (place / "adapter_config.json").is_file():
            config = PeftConfig.from_pretrained(str(place))
            config.inference_mode = False
            found[component] = config, load_file(place / SAFETENSORS_WEIGHTS_NAME)
    found = found or _read_diffusers_adapter(pipeline, folder, first)
    for component, (_, weights) in found.items():
        layers = dict(denoisers[component].named_modules()) if denoisers[component] is not None else {}
        for name, value in weights.items():
            layer, is_first, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")
            own = layers.get(layer)
            if is_first and value.shape[1] != getattr(own, "in_features", getattr(own, "in_channels", None)):
                raise ValueError(
                    f"{folder} is the adapter of another model: the {component} of {type(pipeline).__name__} has no "
                    f"layer {layer} with {value.shape[1]} inputs."
                )
    return found


def _read_diffusers_adapter(pipeline: DiffusionPipeline, folder: Path, component: str):
    if not list(folder.glob("*.safetensors")) or not hasattr(pipeline, "lora_state_dict"):
        raise ValueError(
            f"{folder} holds no adapter for {type(pipeline).__name__}: expected adapter_config.json and "
            f"{SAFETENSORS_WEIGHTS_NAME} (PEFT), or {DIFFUSERS_WEIGHTS_NAME} (diffusers)."
        )
    asked = (
        {"return_alphas": True} if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters else {}
    )
    state, *alphas, metadata = pipeline.lora_state_dict(str(folder), return_lora_metadata=True, **asked)
    # diffusers' scripts for Stable Diffusion call the two matrices `lora.down` and `lora.up`.
    state = convert_unet_state_dict_to_peft(state)
    prefix = f"{component}."
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        raise ValueError(
            f"{folder} adapts more than the {component}: {others[0]} and {len(others) - 1} more. Only denoisers are "
            "trained; put the adapter into the base first (pipeline.fuse_lora, pipeline.unload_lora_weights)."
        )
    weights = {
        PEFT_PREFIX + name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    ranks = {name: value.shape[0] for name, value in weights.items() if name.endswith("lora_A.weight")}
    if not ranks or len(weights) != 2 * len(ranks):
        raise ValueError(
            f"{folder}: expected the two matrices of LoRA for layers of {component}, got {sorted(state)[:4]} ..."
        )
    settings = {
        name.removeprefix(prefix): value for name, value in (metadata or {}).items() if name.startswith(prefix)
    }
    if not settings:
        scales = {float(alpha) for alpha in (alphas[0] or {}).values()} if alphas else set()
        if len(set(ranks.values())) > 1 or len(scales) > 1:
            raise ValueError(
                f"{folder} has ranks {sorted(set(ranks.values()))}, scales {sorted(scales)} and no configuration that "
                "says where."
            )
        # What diffusers takes where nothing is said: alpha = r.
        layers = [name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in ranks]
        settings = {"r": next(iter(ranks.values())), "target_modules": layers}
        settings["lora_alpha"] = scales.pop() if scales else settings["r"]
    return {component: (LoraConfig(**settings), weights)}
