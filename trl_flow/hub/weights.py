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

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

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
    for number, (component, denoiser) in enumerate(policy.denoisers.items()):
        folder = Path(output_dir) / (component if number or policy.full_finetuning else "")
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
            kept = {name: parameter.data for name, parameter in denoiser.named_parameters()}
            try:
                for name, parameter in denoiser.named_parameters():
                    parameter.data = weights[name].to(parameter.device)
                denoiser.save_pretrained(folder)
            finally:
                for name, parameter in denoiser.named_parameters():
                    parameter.data = kept[name]


def _holds(name: str, prefix: str) -> bool:
    return name.startswith(prefix) or f".{prefix}" in name


def load_policy(policy, folder: str | Path) -> None:
    """
    Take back what [`save_policy`] wrote.

    Raises:
        FileNotFoundError: The folder holds no such weights.
        ValueError: They are those of another adapter.
    """
    for number, (component, denoiser) in enumerate(policy.denoisers.items()):
        if policy.full_finetuning:
            saved = type(denoiser).from_pretrained(Path(folder) / component)
            denoiser.load_state_dict(saved.state_dict())
            continue
        weights = load_file(Path(folder) / (component if number else "") / SAFETENSORS_WEIGHTS_NAME)
        outcome = set_peft_model_state_dict(denoiser, weights)
        if outcome.unexpected_keys:
            raise ValueError(f"{folder} is of another adapter: {outcome.unexpected_keys[:3]} ... do not fit.")


def holds_policy(folder: str | Path) -> bool:
    """Whether [`save_policy`] wrote to a folder."""
    folder = Path(folder)
    return (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or any(
        (folder / component / "config.json").is_file() for component in COMPONENTS
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
        load_adapter(pipeline, folder)
        for component in COMPONENTS:
            if (folder / component / "adapter_config.json").is_file():
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
        ValueError: There is no adapter, or one that is no LoRA in diffusers' names.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(name_or_path)):
            raise FileNotFoundError(f"adapter={str(name_or_path)!r} is neither a directory nor a Hub id.")
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(TRAINED_FILES)))
    first = next(
        component for component in COMPONENTS if isinstance(pipeline.components.get(component), torch.nn.Module)
    )
    found = {}
    for component in COMPONENTS:
        place = folder if component == first else folder / component
        if (place / "adapter_config.json").is_file():
            config = PeftConfig.from_pretrained(str(place))
            config.inference_mode = False
            found[component] = config, load_file(place / SAFETENSORS_WEIGHTS_NAME)
    return found or _read_diffusers_adapter(pipeline, folder, first)


def _read_diffusers_adapter(pipeline: DiffusionPipeline, folder: Path, component: str):
    if not list(folder.glob("*.safetensors")) or not hasattr(pipeline, "lora_state_dict"):
        raise ValueError(
            f"{folder} holds no adapter for {type(pipeline).__name__}: expected adapter_config.json and "
            f"{SAFETENSORS_WEIGHTS_NAME} (PEFT), or {DIFFUSERS_WEIGHTS_NAME} (diffusers)."
        )
    state, *_, metadata = pipeline.lora_state_dict(str(folder), return_lora_metadata=True)
    prefix = f"{component}."
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
        if len(set(ranks.values())) > 1:
            raise ValueError(f"{folder} has ranks {sorted(set(ranks.values()))} and no configuration that says where.")
        # What diffusers takes where nothing is said: alpha = r.
        layers = [name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in ranks]
        settings = {"r": next(iter(ranks.values())), "target_modules": layers}
        settings["lora_alpha"] = settings["r"]
    return {component: (LoraConfig(**settings), weights)}
