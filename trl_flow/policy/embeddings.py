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

"""Conditions on disk: what a pipeline makes of the prompts of a dataset, made once, and read where it is needed."""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import diffusers
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import ProcessorMixin

from .. import __version__
from .conditioning import Condition, image_key, make_condition


if TYPE_CHECKING:
    from .flow_policy import FlowPolicy


# A row: its key, the key of the row that holds the tensors that it shares, what it is made of, and its own tensors.
COLUMNS = Features(
    {
        "key": Value("binary"),
        "first": Value("binary"),
        "structure": Value("string"),
        "tensors": Value("large_binary"),
    }
)
# Of the rows and what is in them. To be raised when they are written or read differently.
FORMAT = 1
# Beside torch, transformers and diffusers: what tokenizers and image processors are made of.
LIBRARIES = ("ftfy", "numpy", "pillow", "sentencepiece", "tokenizers", "torchvision")
HASHED_WORDS = 2**20
# A row is megabytes: so many are in memory before they are written.
WRITER_BATCH_SIZE = 8


# ---- What conditions depend on ----


def model_fingerprint(pipeline: DiffusionPipeline, denoisers: tuple[str, ...]) -> str:
    """
    What a pipeline's encoding depends on, as a short string: the versions of the libraries; the names of the pipeline's
    and its components' classes and the files that define them and what they inherit; settings of the pipeline and of all
    components; and the weights of those that are not `denoisers`. Their content counts, not where they came from.

    Not seen: an edit of another file that those files import, unless it belongs to one of [`LIBRARIES`] and comes with
    another version; code of a class that is in no file (a notebook's); and values of the pipeline's own attributes that
    are neither numbers nor texts nor lists of them.

    All weights are read: milliseconds on a GPU, and 0.3 to 0.6 s for each GiB on a CPU.
    """
    digest = hashlib.sha256()

    def add(*values):
        digest.update(repr(values).encode())

    add(FORMAT, __version__, diffusers.__version__, transformers.__version__, torch.__version__)
    add([(name, _version(name)) for name in LIBRARIES])
    add(*_code(type(pipeline)), _public(pipeline.config))
    for name, value in sorted(vars(pipeline).items()):
        if name.startswith("_") or name in pipeline.components:
            continue
        if _is_plain(value):  # tokenizer_max_length, vae_scale_factor
            add(name, value)
        elif hasattr(value, "config"):  # image_processor
            add(name, *_code(type(value)), _public(value.config))
    for name, component in sorted(pipeline.components.items()):
        add(name, *_code(type(component)))
        if isinstance(component, nn.Module):
            config = getattr(component, "config", {})
            add(_public(config if isinstance(config, dict) else config.to_dict()), getattr(component, "dtype", None))
            add(getattr(config, "_attn_implementation", None))
            if name not in denoisers:
                for key, tensor in component.state_dict().items():
                    add(key, *_contents(tensor))
        elif isinstance(component, ProcessorMixin):
            # It cannot be saved as a whole where one of its parts (a video processor) could not be loaded.
            add({key: value for key, value in vars(component).items() if isinstance(value, (bool, int, float, str))})
            for part in vars(component).values():
                add(*_files(part))
        elif hasattr(component, "save_pretrained"):  # tokenizers, schedulers
            add(*_files(component))
        elif hasattr(component, "config"):  # guiders
            add(_public(component.config))
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code(cls: type) -> Iterator[tuple[str, str, str | None]]:
    """A class and those that it inherits from, with what is in their files."""
    for base in cls.__mro__:
        try:
            path = inspect.getsourcefile(base)
        except (OSError, TypeError):  # built in, or defined in no file
            path = None
        content = Path(path).read_bytes() if path is not None and os.path.isfile(path) else b""
        yield base.__module__, base.__qualname__, hashlib.sha256(content).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _public(config: dict) -> str:
    """Settings without what depends on where they came from, by diffusers' and transformers' custom underlined."""
    public = {str(name): value for name, value in config.items() if not str(name).startswith("_")}
    return json.dumps(public, sort_keys=True, default=str)


def _contents(tensor: Any) -> Iterator:
    """
    What is in a tensor: of each 4 MiB the multilinear hash of Carter and Wegman (1979), which is the sum modulo 2^64 of
    the 32-bit words, each times a random number of its place. Rows that are swapped and changes whose sum is zero change
    it, too: but for one pair of contents in 2^32, and that for each 4 MiB in which they differ.
    """
    if not isinstance(tensor, torch.Tensor):
        yield tensor
    elif is_traceable_wrapper_subclass(tensor):  # quantised weights
        for name in tensor.__tensor_flatten__()[0]:
            yield from _contents(getattr(tensor, name))
    else:
        bits = tensor.detach().flatten().view(torch.uint8)
        if bits.data_ptr() % 4 or bits.storage_offset() % 4:  # as a part of a file may be
            bits = bits.clone()
        whole = len(bits) // 4 * 4
        factors = _factors(tensor.device)
        products = torch.empty_like(factors[: whole // 4])
        sums = [
            torch.mul(words, factors[: len(words)], out=products[: len(words)]).sum()
            for words in bits[:whole].view(torch.int32).split(len(factors))
        ]
        yield tuple(tensor.shape), tensor.dtype, torch.stack(sums).tolist(), bits[whole:].tolist()


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """Always the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (HASHED_WORDS,), generator=generator).to(device)


def _files(component: Any) -> Iterator[tuple[str, Any]]:
    """What would be saved of a component that has no weights."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(component, "save_pretrained"):
            component.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name == "tokenizer.json":
                # Padding and truncation are those of the last call.
                content = {**json.loads(content), "padding": None, "truncation": None}
            yield path.name, content


def settings_fingerprint(policy: "FlowPolicy") -> str:
    """What conditions depend on beside pipeline, prompt and picture, as a short string."""
    settings = sorted(policy.call_arguments.items()), policy.guidance_scale, policy.negative_prompt, policy.device.type
    # Pictures that prompts start from are encoded in tiles, too.
    tiled = policy.family.image is not None and getattr(getattr(policy.pipeline, "vae", None), "use_tiling", False)
    return Hasher.hash((*settings, "tiled") if tiled else settings)


def condition_key(policy: "FlowPolicy", prompt: str, picture: str | None) -> bytes:
    """What stands for a condition among those that are stored; `picture` is its [`image_key`]."""
    return hashlib.sha256(json.dumps([policy.fingerprint(), prompt, picture]).encode()).digest()[:16]


# ---- From a condition to a row, and back ----


class RowWriter:
    """
    Makes the rows that conditions are stored in. A tensor that is also one of the first row's, as the embeddings of the
    negative prompt are, is stored there alone.

    Args:
        policy ([`FlowPolicy`]): What makes the conditions.
        folder (`Path`): Where they are written.
        to_come (`int`): How many rows are to be written there, from the first of this writer's on.
    """

    def __init__(self, policy: "FlowPolicy", folder: Path, to_come: int):
        self.policy, self.folder, self.to_come = policy, folder, to_come
        self._first: bytes | None = None
        self._common: dict[bytes, str] = {}
        self._sizes: list[int] = []

    def __call__(self, row: dict) -> dict:
        image = row["image"].convert("RGB") if row.get("image") is not None else None
        condition = self.policy.encode_anew(row["prompt"], image)
        key = condition_key(self.policy, condition.prompt, image_key(condition.image))
        structure, own = self.pack(condition)
        if self._first is None:
            self._first = key
            self._common = {_content(tensor): name for name, tensor in own.items()}
        else:
            self._check_space(sum(tensor.numel() * tensor.element_size() for tensor in own.values()))
        self.to_come -= 1
        return {"key": key, "first": self._first, "structure": structure, "tensors": safetensors.torch.save(own)}

    def pack(self, condition: Condition) -> tuple[str, dict[str, torch.Tensor]]:
        """A condition's structure, as JSON, and its own tensors by the names that they have there."""
        own, names = {}, {}

        def describe(value, method):
            if isinstance(value, torch.Tensor):
                stored = value.detach().cpu().contiguous()
                content = _content(stored)
                # Some are meant to be on the CPU, wherever the denoiser is.
                place = {"cpu": value.device.type == "cpu" != self.policy.device.type}
                if content in self._common:
                    return {"common": self._common[content], **place}
                if content not in names:
                    names[content] = str(len(names))
                    own[names[content]] = stored.clone()
                return {"own": names[content], **place}
            if type(value) in (list, tuple):
                return {type(value).__name__: [describe(element, method) for element in value]}
            if type(value) is dict and all(type(name) is str for name in value):
                return {"dict": {name: describe(element, method) for name, element in value.items()}}
            if value is None or type(value) in (bool, int, float, str):
                return value
            raise ValueError(
                f"{method} of {type(self.policy.pipeline).__name__} returns a {type(value).__name__}, which cannot be stored "
                "for another run: only tensors, numbers, texts, and lists, tuples and dictionaries of them can. Leave "
                "precompute_prompts off."
            )

        structure = {
            "answers": [[*key, describe(answer, key[0])] for key, answer in condition.answers.items()],
            "layout": [[*key, layout] for key, layout in condition.layout.items()],
            "latent_shape": condition.latent_shape,
            "latent_dtype": str(condition.latent_dtype).removeprefix("torch."),
            "batched": condition.batched,
        }
        return json.dumps(structure), own

    def _check_space(self, num_bytes: int):
        """Refuses to begin what there is no room for."""
        self._sizes.append(num_bytes)
        needed = self.to_come * sum(self._sizes) / len(self._sizes)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The embeddings of {self.to_come} prompts take {needed / 2**30:.1f} GiB, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left. Set HF_DATASETS_CACHE to a folder with more room, or leave "
                "precompute_prompts off."
            )


def _content(tensor: torch.Tensor) -> bytes:
    """What a contiguous tensor on the CPU is, bit by bit."""
    bits = tensor.view(-1).view(torch.uint8).numpy()
    return hashlib.sha1(repr((tensor.dtype, tensor.shape)).encode() + hashlib.sha1(bits).digest()).digest()


class StoredConditions:
    """Conditions on disk, by what they were made of. Of each, its key alone is in memory."""

    def __init__(self):
        self._stored: list[tuple[Dataset, dict[bytes, int]]] = []

    def __bool__(self) -> bool:
        return bool(self._stored)

    def add(self, dataset: Dataset):
        """Conditions that [`encode_prompts`] has written."""
        if dataset.column_names != list(COLUMNS):
            raise ValueError(
                f"A dataset with the columns {dataset.column_names} holds no conditions: expected one that "
                "encode_prompts() has made."
            )
        keys = (key for batch in dataset.select_columns("key").iter(1000) for key in batch["key"])
        self._stored.append((dataset, {key: number for number, key in enumerate(keys)}))

    def find(self, policy: "FlowPolicy", prompt: str, image: Image.Image | None, picture: str | None):
        """The condition of a prompt and an image whose [`image_key`] is `picture`; `None` if it is not there."""
        key = condition_key(policy, prompt, picture)
        for dataset, numbers in self._stored:
            if key in numbers:
                row = dataset[numbers[key]]
                structure = json.loads(row["structure"])
                tensors = {"own": safetensors.torch.load(row["tensors"])}
                if row["first"] != key:
                    tensors["common"] = safetensors.torch.load(dataset[numbers[row["first"]]]["tensors"])
                return make_condition(
                    prompt,
                    image,
                    {(name, n): _restore(answer, tensors, policy.device) for name, n, answer in structure["answers"]},
                    tuple(structure["latent_shape"]),
                    getattr(torch, structure["latent_dtype"]),
                    {(name, number): layout for name, number, layout in structure["layout"]},
                    structure["batched"],
                    policy.guidance_scale,
                )
        return None


def _restore(value: Any, tensors: dict[str, dict[str, torch.Tensor]], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content), *place) = value.items()
    if kind in tensors:
        return tensors[kind][content].to("cpu" if value["cpu"] else device)
    if kind == "dict":
        return {name: _restore(element, tensors, device) for name, element in content.items()}
    restored = [_restore(element, tensors, device) for element in content]
    return tuple(restored) if kind == "tuple" else restored


# ---- A dataset's prompts ----


def encode_prompts(
    policy: "FlowPolicy",
    dataset: Dataset,
    process_index: int = 0,
    num_processes: int = 1,
    chunk_size: int = 256,
) -> Dataset:
    """
    Conditions of all prompts of a dataset, and of the pictures that they start from, made once and kept on disk.

    They are written in chunks to the folder `trl-flow` of datasets' cache, from which the next call takes those that are
    there: of the same prompts, for a policy of the same [`FlowPolicy.fingerprint`]. Neither writing nor reading needs
    more memory for more prompts. A run that is stopped loses no more than one chunk for each process.

    Args:
        policy ([`FlowPolicy`]): What the conditions are for, and what makes them. Its guidance scale counts: see
            [`FlowPolicy.guided`].
        dataset ([`~datasets.Dataset`]): With a column `prompt`, and `image` where the pipeline starts from one.
        process_index, num_processes (`int`, *optional*): Of several processes each makes a part of the chunks, waits for
            the others, and returns all.
        chunk_size (`int`, *optional*, defaults to 256): Prompts of one chunk.

    Returns:
        [`~datasets.Dataset`]: for [`FlowPolicy.attach`], one row for each different prompt and picture.

    Raises:
        ValueError: If the dataset is no map-style one, the disk has too little room, or the pipeline makes something of
            a prompt that cannot be stored.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"A {type(dataset).__name__} has no prompts that could be encoded in advance: expected a datasets.Dataset. Leave "
            "precompute_prompts off."
        )
    with_pictures = policy.family.image is not None and "image" in dataset.column_names
    dataset = dataset.select_columns(["prompt", "image"] if with_pictures else ["prompt"])
    rows = {}
    for number, content in enumerate(_row_contents(dataset, with_pictures)):
        rows.setdefault(content, number)
    different = list(rows.items())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl-flow"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = {}
    for start in range(0, len(different), chunk_size):
        contents, numbers = zip(*different[start : start + chunk_size], strict=True)
        fingerprint = hashlib.sha256(policy.fingerprint().encode() + b"".join(contents)).hexdigest()
        chunks[folder / f"{fingerprint}.arrow"] = numbers

    def encode(path: Path) -> Dataset:
        chunk = dataset.select(chunks[path])
        to_come = sum(len(numbers) for other, numbers in chunks.items() if not (path.exists() or other.exists()))
        return chunk.map(
            RowWriter(policy, folder, to_come),
            features=COLUMNS,
            remove_columns=chunk.column_names,
            cache_file_name=str(path),
            load_from_cache_file=True,
            new_fingerprint=path.stem,
            writer_batch_size=WRITER_BATCH_SIZE,
            desc=f"Embeddings of prompts, part {list(chunks).index(path) + 1} of {len(chunks)}",
        )

    with policy.encoders.visit(), policy.autoencoder.visit():
        for path in list(chunks)[process_index::num_processes]:
            encode(path)
        if num_processes > 1:
            PartialState().wait_for_everyone()
        return concatenate_datasets([encode(path) for path in chunks])


def _row_contents(dataset: Dataset, with_pictures: bool) -> Iterator[bytes]:
    """What each row is made of, with its picture's file undecoded: of thousands that takes less than a second."""
    if with_pictures:
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for row in dataset:
        digest = hashlib.sha256(json.dumps(row["prompt"]).encode())
        if with_pictures and row["image"] is not None:
            path, content = row["image"]["path"], row["image"]["bytes"]
            digest.update(content if content is not None else Path(path).read_bytes())
        yield digest.digest()
