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

"""Adapters in other layouts: PEFT's, diffusers', and the one of kohya's scripts, which ComfyUI and A1111 load."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .adapter import DIFFUSERS_WEIGHTS_NAME, HUB_ID, PEFT_PREFIX
from .weights import COMPONENTS, TRAINED_FILES


LAYOUTS = ("peft", "diffusers", "kohya")
KOHYA_PREFIX = "lora_unet_"  # whatever the denoiser is
UNETS = ("UNet2DConditionModel",)


def _blocks(kohya: str, diffusers: str, layers: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {
        f"{kohya}_{name}": tuple(f"{diffusers}.{part}" for part in parts.split()) for name, parts in layers.items()
    }


# Layers of the models' original code, after which kohya's files are named, and the layers that diffusers made of each,
# in the order of their rows. Numbers of blocks are left out.
ORIGINAL_LAYERS = {
    "FluxTransformer2DModel": _blocks(
        "double_blocks_{}",
        "transformer_blocks.{}",
        {
            "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
            "img_attn_proj": "attn.to_out.0",
            "img_mlp_0": "ff.net.0.proj",
            "img_mlp_2": "ff.net.2",
            "img_mod_lin": "norm1.linear",
            "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp_0": "ff_context.net.0.proj",
            "txt_mlp_2": "ff_context.net.2",
            "txt_mod_lin": "norm1_context.linear",
        },
    )
    | _blocks(
        "single_blocks_{}",
        "single_transformer_blocks.{}",
        {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "modulation_lin": "norm.linear",
        },
    ),
    # Not the modulations: the last block's are stored in another order of rows.
    "SD3Transformer2DModel": _blocks(
        "joint_blocks_{}",
        "transformer_blocks.{}",
        {
            "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block_attn_proj": "attn.to_out.0",
            "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block_attn2_proj": "attn2.to_out.0",
            "x_block_mlp_fc1": "ff.net.0.proj",
            "x_block_mlp_fc2": "ff.net.2",
            "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block_attn_proj": "attn.to_add_out",
            "context_block_mlp_fc1": "ff_context.net.0.proj",
            "context_block_mlp_fc2": "ff_context.net.2",
        },
    ),
}


@dataclass
class LoraLayer:
    """
    What LoRA adds to one layer: `alpha / rank * up @ down`.

    Args:
        down (`torch.Tensor`): Of shape `(rank, inputs, ...)`; PEFT's A.
        up (`torch.Tensor`): Of shape `(outputs, rank, ...)`; PEFT's B.
        alpha (`float`): Scale.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass
class LoraAdapter:
    """
    A LoRA adapter of one denoiser.

    Args:
        component (`str`): Name of the denoiser in its pipeline.
        denoiser_class (`str` or `None`): Class of the denoiser in diffusers, if known.
        config (`peft.LoraConfig`): Configuration.
        weights (`dict[str, torch.Tensor]`): Tensors under the names of the denoiser's layers.
    """

    component: str
    denoiser_class: str | None
    config: LoraConfig
    weights: dict[str, torch.Tensor]

    def layers(self) -> dict[str, LoraLayer]:
        """Each layer's matrices and scale, whatever rule of the configuration the scale is from."""
        layers = {}
        for name, down in self.weights.items():
            layer, is_down, _ = name.partition(".lora_A.")
            if not is_down:
                continue
            patterns = self.config.alpha_pattern or {}
            alpha = float(patterns.get(get_pattern_key(patterns.keys(), layer), self.config.lora_alpha))
            if self.config.use_rslora:
                alpha *= math.sqrt(down.shape[0])
            layers[layer] = LoraLayer(down, self.weights[f"{layer}.lora_B.weight"], alpha)
        return layers


def read_lora(
    name_or_path: str | Path, revision: str | None = None, denoiser_class: str | None = None
) -> list[LoraAdapter]:
    """
    Read a LoRA adapter of any layout.

    Args:
        name_or_path (`str` or `Path`):
            Directory, `.safetensors` file, or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        denoiser_class (`str`, *optional*):
            Class of the denoiser, for files that do not say it.

    Returns:
        `list[LoraAdapter]`: One for each denoiser; that of a second one is in a folder of its name.

    Raises:
        FileNotFoundError: Neither a directory, nor a file, nor a Hub id.
        ValueError: There is no adapter, or one that is no plain LoRA of a denoiser.
    """
    place = Path(name_or_path)
    if place.is_file():
        return [_read_file(place, denoiser_class)]
    if not place.is_dir():
        if not HUB_ID.fullmatch(str(name_or_path)) or place.suffix == ".safetensors":
            raise FileNotFoundError(
                f"adapter={str(name_or_path)!r} is neither a directory, nor a .safetensors file, nor a Hub id."
            )
        place = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(TRAINED_FILES)))
    folders = {None: place, "transformer_2": place / "transformer_2"}
    adapters = [
        _read_folder(folder, component, denoiser_class)
        for component, folder in folders.items()
        if list(folder.glob("*.safetensors")) and not (folder / "config.json").is_file()
    ]
    if not adapters:
        whole = any((place / component / "config.json").is_file() for component in COMPONENTS)
        raise ValueError(
            f"{name_or_path} holds a complete denoiser, which diffusers loads as it is: only adapters are converted."
            if whole
            else f"{name_or_path} holds no adapter: expected {SAFETENSORS_WEIGHTS_NAME} with adapter_config.json (PEFT), "
            f"{DIFFUSERS_WEIGHTS_NAME} (diffusers) or one other .safetensors file (kohya)."
        )
    return adapters


def write_lora(adapter: LoraAdapter, layout: str, output: str | Path, base_model: str | None = None) -> list[Path]:
    """
    Write a LoRA adapter in one layout.

    Tensors are written as they are, with one exception: kohya's files name the layers of the models' original code, in
    which queries, keys and values (in FLUX's single blocks the feed-forward layer too) are one layer. Their matrices
    are put side by side there, unchanged, with as many times the rank and alpha, and are taken apart again when read.

    Args:
        adapter ([`LoraAdapter`]):
            The adapter.
        layout (`str`):
            `"peft"`, `"diffusers"` or `"kohya"`.
        output (`str` or `Path`):
            Directory; for `"kohya"` a `.safetensors` file.
        base_model (`str`, *optional*):
            Hub id or path of the base pipeline for PEFT's configuration, by default as the adapter says.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileExistsError: A file of that name is there.
        ValueError: The model has no such layout.
    """
    output = Path(output)
    if (layout == "kohya") != (output.suffix == ".safetensors"):
        expected = "the name of a .safetensors file" if layout == "kohya" else "a directory"
        raise ValueError(f"output={output}: expected {expected} for the layout {layout!r}.")
    base_model = base_model or adapter.config.base_model_name_or_path
    names = {"peft": [SAFETENSORS_WEIGHTS_NAME, "adapter_config.json"], "diffusers": [DIFFUSERS_WEIGHTS_NAME]}
    files = [output] if layout == "kohya" else [output / name for name in names[layout]]
    for file in files:
        if file.exists():
            raise FileExistsError(f"output={output}: {file} is there already. Choose another place.")
    slot = adapter.component.removesuffix("_2")
    mapping = adapter.config.auto_mapping or {}
    if adapter.denoiser_class is not None:
        mapping = {"base_model_class": adapter.denoiser_class, "parent_library": "diffusers"} | mapping
    metadata = {"format": "pt"}
    if layout == "kohya":
        weights = to_kohya(adapter)
        # What kohya's own files say of themselves, for programs that list ranks without opening the tensors.
        metadata |= {"ss_network_dim": str(adapter.config.r), "ss_network_alpha": str(adapter.config.lora_alpha)}
    elif layout == "diffusers":
        weights = {f"{slot}.{name}": value for name, value in adapter.weights.items()}
        settings = {
            f"{slot}.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in (adapter.config.to_dict() | {"auto_mapping": mapping or None}).items()
        }
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True, default=str)
    else:
        weights = {f"{PEFT_PREFIX}{name}": value for name, value in adapter.weights.items()}
    files[0].parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share storage.
    save_file({name: weights[name].contiguous().clone() for name in sorted(weights)}, files[0], metadata=metadata)
    if layout == "peft":
        config = LoraConfig(**_fields(adapter.config))
        config.inference_mode, config.base_model_name_or_path = True, base_model
        config.save_pretrained(str(output), auto_mapping_dict=mapping or None)
    return files


def convert_adapter(
    name_or_path: str | Path,
    layout: str,
    output: str | Path,
    revision: str | None = None,
    base_model: str | None = None,
    denoiser_class: str | None = None,
) -> list[Path]:
    """
    Write an adapter again in another layout: [`read_lora`], then [`write_lora`].

    Args:
        name_or_path (`str` or `Path`), revision (`str`, *optional*), denoiser_class (`str`, *optional*):
            The adapter, as for [`read_lora`].
        layout (`str`), output (`str` or `Path`), base_model (`str`, *optional*):
            What to write and where, as for [`write_lora`].

    Returns:
        `list[Path]`: the files written.
    """
    adapters = read_lora(name_or_path, revision, denoiser_class)
    if layout == "kohya" and len(adapters) > 1:
        names = " and ".join(adapter.component for adapter in adapters)
        raise ValueError(
            f"{name_or_path} adapts {names}, and a kohya file is of one denoiser. Convert each by itself."
        )
    written = []
    for adapter in adapters:
        folder = Path(output) / (adapter.component if adapter.component.endswith("_2") else "")
        written += write_lora(adapter, layout, folder, base_model)
    return written


def merge_adapter(
    pipeline: DiffusionPipeline, name_or_path: str | Path, revision: str | None = None
) -> DiffusionPipeline:
    """
    Add an adapter of any layout to the weights of a pipeline, in place.

    The sum is rounded to the precision of the weights: load the pipeline in float32 to merge exactly, or in the
    precision that it will run in to have small files.

    Args:
        pipeline (`DiffusionPipeline`):
            Base pipeline.
        name_or_path (`str` or `Path`):
            Directory, `.safetensors` file, or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `DiffusionPipeline`: the same pipeline.

    Raises:
        ValueError: The adapter is of another model.
    """
    component = next((name for name in COMPONENTS if pipeline.components.get(name) is not None), None)
    if component is None:
        raise ValueError(f"{type(pipeline).__name__} has no {' or '.join(COMPONENTS[:2])} to merge an adapter into.")
    for adapter in read_lora(name_or_path, revision, type(pipeline.components[component]).__name__):
        name = adapter.component if adapter.component.endswith("_2") else component
        denoiser = pipeline.components.get(name)
        modules = dict(denoiser.named_modules()) if denoiser is not None else {}
        for layer, lora in adapter.layers().items():
            weight = getattr(modules.get(layer), "weight", None)
            if weight is None or (lora.up.shape[0], lora.down.shape[1]) != tuple(weight.shape[:2]):
                raise ValueError(
                    f"{name_or_path} is the adapter of another model: the {name} of {type(pipeline).__name__} has no "
                    f"layer {layer} with {lora.down.shape[1]} inputs and {lora.up.shape[0]} outputs."
                )
        config = copy.copy(adapter.config)
        config.base_model_name_or_path = None  # PEFT warns of a denoiser that does not know its name
        model = get_peft_model(denoiser, config)
        set_peft_model_state_dict(model, {f"{PEFT_PREFIX}{key}": value for key, value in adapter.weights.items()})
        setattr(pipeline, name, model.merge_and_unload(safe_merge=True))
    return pipeline


def to_kohya(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """
    Tensors of an adapter under kohya's names.

    Args:
        adapter ([`LoraAdapter`]):
            The adapter.

    Raises:
        ValueError: The model has no kohya layout, or one of its layers has no place there.
    """
    layers = adapter.layers()
    if adapter.denoiser_class in UNETS:
        state = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in adapter.weights.items()})
        for layer, lora in layers.items():
            # diffusers writes alpha = rank, whatever it is.
            state[f"{KOHYA_PREFIX}{layer.replace('.', '_')}.alpha"] = torch.tensor(lora.alpha)
    elif adapter.denoiser_class in ORIGINAL_LAYERS:
        state = _merge_layers(adapter.denoiser_class, layers)
    else:
        known = ", ".join((*UNETS, *ORIGINAL_LAYERS))
        raise ValueError(
            "The adapter does not say which model it is of: name the base pipeline with --model."
            if adapter.denoiser_class is None
            else f"{adapter.denoiser_class} has no kohya layout here: one is known for {known} (Stable Diffusion 1, 2, XL "
            f"and 3, FLUX.1). Use the diffusers layout."
        )
    lost = sorted(layers.keys() ^ _split_layers(dict(state)).keys())
    if lost:
        raise ValueError(f"The layer {lost[0]} of {adapter.denoiser_class} has no name in the kohya layout.")
    return state


def _merge_layers(denoiser_class: str, layers: dict[str, LoraLayer]) -> dict[str, torch.Tensor]:
    places = {part: (kohya, parts) for kohya, parts in ORIGINAL_LAYERS[denoiser_class].items() for part in parts}
    state, done = {}, set()
    for layer in layers:
        number = re.search(r"blocks\.(\d+)\.", layer)
        found = places.get(layer.replace(number[0], "blocks.{}.", 1)) if number else None
        if found is None:
            raise ValueError(f"The layer {layer} of {denoiser_class} has no place in the kohya layout.")
        kohya, parts = found[0].format(number[1]), [part.format(number[1]) for part in found[1]]
        if kohya in done:
            continue
        done.add(kohya)
        merged = _side_by_side([layers.get(part) for part in parts], kohya)
        state[f"{KOHYA_PREFIX}{kohya}.lora_down.weight"] = merged.down
        state[f"{KOHYA_PREFIX}{kohya}.lora_up.weight"] = merged.up
        state[f"{KOHYA_PREFIX}{kohya}.alpha"] = torch.tensor(merged.alpha)
    return state


def _shares(count: int) -> list[int]:
    """Relative rows of the layers that are one in the original code: a feed-forward layer has four times as many."""
    return [1, 1, 1, 4][:count]


def _side_by_side(parts: list[LoraLayer | None], name: str) -> LoraLayer:
    trained = [part for part in parts if part is not None]
    first = trained[0]
    if len(parts) == 1:
        return first
    if len({(part.rank, part.alpha) for part in trained}) > 1:
        raise ValueError(
            f"{name} is one layer in the kohya layout, but its parts have ranks {[part.rank for part in trained]} and "
            f"alphas {[part.alpha for part in trained]} here: they must be equal."
        )
    shares = _shares(len(parts))
    row = next(part.up.shape[0] // share for part, share in zip(parts, shares, strict=True) if part is not None)
    down = first.down.new_zeros(len(parts) * first.rank, first.down.shape[1])
    up = first.up.new_zeros(row * sum(shares), len(parts) * first.rank)
    start = 0
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        if part is not None:
            if part.up.shape[0] != row * share:
                raise ValueError(f"{name}: {part.up.shape[0]} outputs, expected {row * share}.")
            columns = slice(index * first.rank, (index + 1) * first.rank)
            down[columns] = part.down
            up[start : start + row * share, columns] = part.up
        start += row * share
    return LoraLayer(down, up, first.alpha * len(parts))


def _take_apart(layer: LoraLayer, count: int) -> list[LoraLayer | None]:
    """The parts of a layer, `None` for those that nothing is added to."""
    if count == 1:
        return [layer]
    shares = _shares(count)
    row, rest = divmod(layer.up.shape[0], sum(shares))
    if rest:
        raise ValueError(f"{layer.up.shape[0]} outputs cannot be parted {' : '.join(map(str, shares))}.")
    ups = layer.up.split([row * share for share in shares])
    rank, rest = divmod(layer.rank, count)
    columns = [slice(index * rank, (index + 1) * rank) for index in range(count)]
    if not rest and all(not ups[i][:, columns[j]].any() for i in range(count) for j in range(count) if i != j):
        parts = [
            LoraLayer(layer.down[column], up[:, column], layer.alpha / count)
            for up, column in zip(ups, columns, strict=True)
        ]
    else:
        # Trained as one layer: its parts share the first matrix.
        parts = [LoraLayer(layer.down.clone(), up, layer.alpha) for up in ups]
    return [part if part.down.any() or part.up.any() else None for part in parts]


def _split_layers(state: dict[str, torch.Tensor]) -> dict[str, LoraLayer]:
    """Layers of a kohya file, under diffusers' names."""
    denoiser_class = _class_of_kohya(state)
    layers = {}
    for key in [key for key in state if key.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        down, up = state.pop(key), state.pop(f"{name}.lora_up.weight", None)
        alpha = state.pop(f"{name}.alpha", None)
        if up is None:
            raise ValueError(f"{name} has no lora_up.weight.")
        layer = LoraLayer(down, up, float(down.shape[0] if alpha is None else alpha))
        if denoiser_class in UNETS:
            layers[_unet_name(name, down, up)] = layer
            continue
        number = re.search(r"blocks_(\d+)_", name)
        original = name.removeprefix(KOHYA_PREFIX)
        original = original.replace(number[0], "blocks_{}_", 1) if number else original
        if original not in ORIGINAL_LAYERS[denoiser_class]:
            raise ValueError(f"{name} is no layer of {denoiser_class} that an adapter can have.")
        parts = [part.format(number[1]) for part in ORIGINAL_LAYERS[denoiser_class][original]]
        found = zip(parts, _take_apart(layer, len(parts)), strict=True)
        layers |= {part: lora for part, lora in found if lora is not None}
    if state:
        raise ValueError(f"{sorted(state)[0]} (and {len(state) - 1} more) is not LoRA.")
    return layers


def _class_of_kohya(state: dict[str, torch.Tensor]) -> str:
    others = [name for name in state if not name.startswith(KOHYA_PREFIX)]
    if others:
        raise ValueError(f"the file adapts more than the denoiser: {others[0]} and {len(others) - 1} more.")
    if any("joint_blocks" in name for name in state):
        return "SD3Transformer2DModel"
    if any("double_blocks" in name or "single_blocks" in name for name in state):
        return "FluxTransformer2DModel"
    return UNETS[0]


def _unet_name(name: str, down: torch.Tensor, up: torch.Tensor) -> str:
    # Of kohya's own scripts Stable Diffusion XL's have the names of the original code. All published UNets with such
    # names have two layers per block.
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    state, _ = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=SimpleNamespace(layers_per_block=2))
    found = [key for key in convert_unet_state_dict_to_peft(state) if ".lora_A." in key]
    return found[0].removeprefix("unet.").partition(".lora_A.")[0]


def _read_folder(folder: Path, component: str | None, denoiser_class: str | None) -> LoraAdapter:
    if (folder / "adapter_config.json").is_file() and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        config = PeftConfig.from_pretrained(str(folder))
        denoiser_class = (config.auto_mapping or {}).get("base_model_class") or denoiser_class
        state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        weights = {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}
        component = component or ("unet" if denoiser_class in UNETS else "transformer")
        return _checked(LoraAdapter(component, denoiser_class, config, weights), folder)
    files = sorted(folder.glob("*.safetensors"))
    file = folder / DIFFUSERS_WEIGHTS_NAME if folder / DIFFUSERS_WEIGHTS_NAME in files else files[0]
    if file.name != DIFFUSERS_WEIGHTS_NAME and len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} .safetensors files: name the one to convert.")
    return _read_file(file, denoiser_class, component)


def _read_file(file: Path, denoiser_class: str | None, component: str | None = None) -> LoraAdapter:
    state = load_file(file)
    if any(name.endswith(".lora_down.weight") for name in state):
        found = _class_of_kohya(state)
        try:
            layers = _split_layers(state)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if denoiser_class not in (None, found):
            raise ValueError(f"{file} has the layers of a {found}, but the model has a {denoiser_class}.")
        weights = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
        weights |= {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}
        return LoraAdapter("unet" if found in UNETS else "transformer", found, _plain_config(layers), weights)
    # diffusers' scripts for Stable Diffusion call the two matrices `lora.down` and `lora.up`.
    state = convert_unet_state_dict_to_peft(state)
    slots = {name.partition(".")[0] for name in state}
    if len(slots) != 1 or not slots <= set(COMPONENTS):
        raise ValueError(f"{file} is no adapter of one denoiser: its tensors are of {', '.join(sorted(slots))}.")
    slot = slots.pop()
    if slot == "unet":
        denoiser_class = UNETS[0]
    weights = {name.removeprefix(f"{slot}."): value for name, value in state.items()}
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    settings = {
        name.removeprefix(f"{slot}."): value for name, value in settings.items() if name.startswith(f"{slot}.")
    }
    if settings:
        config = LoraConfig(**{name: settings[name] for name in settings if name in LoraConfig.__dataclass_fields__})
        denoiser_class = (config.auto_mapping or {}).get("base_model_class") or denoiser_class
    else:
        # What diffusers takes where nothing is said: alpha = rank.
        downs = {name.partition(".lora_A.")[0]: value for name, value in weights.items() if ".lora_A." in name}
        config = _plain_config({name: LoraLayer(value, value, float(len(value))) for name, value in downs.items()})
    return _checked(LoraAdapter(component or slot, denoiser_class, config, weights), file)


def _checked(adapter: LoraAdapter, place: Path) -> LoraAdapter:
    config = adapter.config
    if config.peft_type != PeftType.LORA or config.use_dora or config.modules_to_save or config.bias != "none":
        raise ValueError(
            f"{place} is {config.peft_type.value} with use_dora={getattr(config, 'use_dora', None)}, bias="
            f"{getattr(config, 'bias', None)!r}, modules_to_save={getattr(config, 'modules_to_save', None)}: only plain "
            "LoRA is converted."
        )
    layers = {name.partition(".lora_A.")[0] for name in adapter.weights if name.endswith(".lora_A.weight")}
    expected = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    if not layers or adapter.weights.keys() != expected:
        wrong = sorted(adapter.weights.keys() ^ expected)[:3]
        raise ValueError(f"{place}: expected the two matrices of LoRA for each layer, but there is {wrong}.")
    return adapter


def _plain_config(layers: dict[str, LoraLayer]) -> LoraConfig:
    """The configuration that says of each layer what it is."""
    if not layers:
        raise ValueError("The file holds no layer of LoRA.")

    def number(alpha: float) -> float | int:
        return int(alpha) if float(alpha).is_integer() else alpha

    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    # `^`: patterns match ends of names.
    return LoraConfig(
        r=rank,
        lora_alpha=number(alpha),
        target_modules=sorted(layers),
        rank_pattern={f"^{re.escape(name)}": layer.rank for name, layer in layers.items() if layer.rank != rank},
        alpha_pattern={
            f"^{re.escape(name)}": number(layer.alpha) for name, layer in layers.items() if layer.alpha != alpha
        },
    )


def _fields(config: LoraConfig) -> dict:
    return {name: getattr(config, name) for name in LoraConfig.__dataclass_fields__ if name != "peft_type"}
