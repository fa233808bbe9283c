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

"""From a prompt set's name, file or repository to its dataset."""

import difflib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher, generate_random_fingerprint, get_temporary_cache_files_directory
from huggingface_hub import HfApi, constants, hf_hub_download

from .. import __version__
from .sets import PROMPT_SETS, Part, PromptSet


_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# More than this of a stream, which may have no end, is not stored without being asked for.
MOST_PROMPTS = 1_000_000
_NAME_TYPES = (
    "Types are guessed from the first rows: name all columns and their types, such as "
    "IterableDataset.from_generator(..., features=Features({'prompt': Value('string'), ...})) or "
    "load_dataset(..., features=...)."
)


def load_prompts(
    name: str,
    split: str = "train",
    config: str | None = None,
    num_prompts: int | None = None,
    columns: dict[str, str] | None = None,
    revision: str | None = None,
) -> Dataset:
    """
    A prompt set.

    Args:
        name (`str`): The name of a prompt set (`"pick-a-pic"`; `trl-flow prompts` lists them), a local file (`.txt` with
            one prompt per line, `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet`), a folder of pictures with a
            `metadata.jsonl`, or the id of a dataset on the Hub. Other columns than `prompt` reach the reward functions.
            In a file, a column `image` holds the names of pictures, from the file's own folder.
        split (`str`, *optional*, defaults to `"train"`): Split. A local file has the split `"train"` alone, and
            `"train[:90%]"` and the like take parts of it.
        config (`str`, *optional*): Configuration of a dataset on the Hub.
        num_prompts (`int`, *optional*): Keep the first so many. What is on the Hub is read no further.
        columns (`dict[str, str]`, *optional*): Columns to keep, and what to call them: `{"caption": "prompt"}`. The
            others are not read, and of parquet files on the Hub not downloaded.
        revision (`str`, *optional*): Branch, tag or commit of what is on the Hub.

    Raises:
        ValueError: If nothing answers to that name, or it has no such split or columns, or no column `prompt`.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1, or None for all.")
    if columns is not None and "prompt" not in columns.values():
        raise ValueError(f"columns={columns} has no prompt: expected one like {{'caption': 'prompt'}}.")
    if columns is not None and len(set(columns.values())) < len(columns):
        raise ValueError(f"columns={columns} gives two columns one name.")

    named = PROMPT_SETS.get(name)
    generated, local = named is not None and named.generator is not None, named is None and os.path.exists(name)
    for option, value, without_it in (
        ("config", config, named is not None or os.path.isfile(name)),
        ("columns", columns, named is not None),
        ("revision", revision, generated or local),
    ):
        if value is not None and without_it:
            kind = "a local path" if local else "generated" if generated else "a prompt set with columns of its own"
            raise ValueError(f"{option}={value!r}: {name} is {kind} and takes none. Leave it out.")

    if named is not None:
        dataset = _load_named(name, split, num_prompts, revision)
    elif os.path.isfile(name):
        dataset = _renamed(_load_file(name, split), columns, name)
        dataset = dataset if num_prompts is None else dataset.select(range(min(num_prompts, len(dataset))))
    else:
        dataset = _load_repository(name, split, config, num_prompts, columns, revision)
    dataset.info.dataset_name = name
    return dataset


def prompts_name(dataset: str | os.PathLike | Dataset | IterableDataset | None) -> str | None:
    """
    What the prompts are known by.

    Args:
        dataset (`str`, `Dataset` or `IterableDataset`): A name, or what [`load_prompts`] or `datasets` loaded by one.

    Returns:
        `str` or `None`: a name as [`load_prompts`] takes it, or as `datasets` keeps it, which is not the Hub id; `None` for
        a dataset that was made in memory.
    """
    if dataset is None or isinstance(dataset, (str, os.PathLike)):
        return None if dataset is None else os.fspath(dataset)
    name = dataset.info.dataset_name
    # Where there is no name of its own, `datasets` keeps that of the format.
    return name if name != dataset.info.builder_name else None


def parse_columns(columns: list[str] | None) -> dict[str, str] | None:
    """
    `columns` of [`load_prompts`] from the command line.

    Args:
        columns (`list[str]` or `None`): Such as `["caption=prompt", "tag"]`.
    """
    if columns is None:
        return None
    return {old: new or old for old, _, new in (column.partition("=") for column in columns)}


def as_prompts(
    dataset: str | os.PathLike | Dataset | IterableDataset, num_prompts: int | None = None, split: str = "train"
) -> Dataset:
    """
    The dataset that a trainer is given, in whichever form.

    Args:
        dataset (`str`, `Dataset` or `IterableDataset`): What [`load_prompts`] takes; or a dataset, which is returned as
            it is; or a stream, which is written to the disk, a thousand rows at a time, until the process ends. Pictures
            in it are copied as they are, without being decoded.
        num_prompts (`int`, *optional*): Keep the first so many. A stream is read no further.
        split (`str`, *optional*, defaults to `"train"`): Split of what is named.

    Raises:
        ValueError: If it is something else, such as a `DatasetDict`, or a stream of more than a million rows and
            `num_prompts` does not say how many of them.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return load_prompts(os.fspath(dataset), split=split, num_prompts=num_prompts)
    if isinstance(dataset, Dataset):
        return dataset if num_prompts is None else dataset.select(range(min(num_prompts, len(dataset))))
    if isinstance(dataset, IterableDataset):
        return _store_stream(dataset, num_prompts)
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"the dataset has the splits {', '.join(dataset)}: give one of them, dataset['{next(iter(dataset))}']."
        )
    raise ValueError(
        f"the dataset is a {type(dataset).__name__}: expected a Dataset or IterableDataset with a column 'prompt', the "
        f"name of a prompt set ({', '.join(PROMPT_SETS)}), a file, or the id of a dataset on the Hub."
    )


def _load_named(name: str, split: str, num_prompts: int | None, revision: str | None) -> Dataset:
    prompt_set = PROMPT_SETS[name]
    if split not in prompt_set.parts:
        advice = ""
        if split == "train":
            trained = [other for other, record in PROMPT_SETS.items() if "train" in record.parts]
            advice = f" It is a benchmark; to train on there are {', '.join(trained)}."
        raise ValueError(f"split={split!r}: {name} has {_listed(prompt_set.parts)}.{advice}")
    if prompt_set.generator is not None:
        module, function = prompt_set.generator.split(":")
        generate = getattr(importlib.import_module(module, __package__), function)
        return generate(split=split, num_prompts=num_prompts)

    part, revision = prompt_set.parts[split], revision or prompt_set.revision or "main"
    try:
        location = _locate(prompt_set.repository, part.file, revision)
        kept = (part.columns, prompt_set.min_words, prompt_set.distinct, num_prompts, __version__)
        return _store(
            lambda: _named_rows(prompt_set, part, location, num_prompts),
            fingerprint=Hasher.hash((name, location, kept)),
        )
    except Exception as error:
        raise ValueError(
            f"{name}, split {split!r}, could not be read from {prompt_set.repository} on the Hub, at {revision}. "
            f"{_explained(error)}"
        ) from error


def _locate(repository: str, file: str, revision: str) -> str:
    """Where a file of the Hub is, with the commit in the path: parquet, of which columns can be read alone, stays there."""
    if not file.endswith(".parquet"):
        return hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    if len(revision) != 40:
        revision = HfApi().dataset_info(repository, revision=revision).sha
    return f"hf://datasets/{repository}@{revision}/{file}"


def _named_rows(prompt_set: PromptSet, part: Part, location: str, num_prompts: int | None) -> Iterator[dict]:
    suffix = Path(part.file).suffix
    if suffix == ".json":
        rows = _json_array(location)
    else:
        settings = {"columns": list(part.columns)} if suffix == ".parquet" else {}
        rows = load_dataset(
            _BUILDERS[suffix],
            data_files=location,
            split="train",
            streaming=True,
            **_table_settings(suffix),
            **settings,
        )
    seen, count = set(), 0
    for row in rows:
        if missing := part.columns.keys() - row.keys():
            raise ValueError(
                f"{part.file} has the columns {', '.join(row)}: expected {', '.join(sorted(missing))}, too."
            )
        row = {new: row[old] for old, new in part.columns.items()}
        prompt = row["prompt"] = (row["prompt"] or "").strip()
        if len(prompt.split()) < prompt_set.min_words or prompt in seen:
            continue
        if prompt_set.distinct:
            seen.add(prompt)
        yield row if prompt_set.read is None else prompt_set.read(row)
        count += 1
        if count == num_prompts:
            return


def _json_array(path: str, size: int = 1 << 16) -> Iterator[dict]:
    """Objects of a file that is one JSON array, in pieces. `datasets` would take ten times the file's size of memory."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8") as file:
        text = file.read(size).lstrip().removeprefix("[")
        while True:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                return
            try:
                item, end = decode(text)
            except json.JSONDecodeError:
                more = file.read(size)
                if not more:
                    raise
                text += more
                continue
            yield item
            text = text[end:]


def _load_file(name: str, split: str) -> Dataset:
    suffix = Path(name).suffix
    if suffix not in _BUILDERS:
        raise ValueError(f"{name}: expected a file that ends in {', '.join(_BUILDERS)}.")
    try:
        dataset = load_dataset(_BUILDERS[suffix], data_files=name, split=split, **_table_settings(suffix))
    except DatasetGenerationError as error:
        raise ValueError(f"{name} could not be read. {_explained(error.__cause__ or error)}") from error
    except ValueError as error:
        raise ValueError(
            f"split={split!r} of {name}: a file has the split 'train' alone. Take parts of it, such as 'train[:90%]' "
            "to train on and 'train[90%:]' to hold out."
        ) from error
    if suffix == ".txt":
        dataset = dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip() != "")
    if _is_text(dataset.features.get("image")):
        folder = Path(name).parent
        dataset = dataset.map(
            lambda row: {"image": None if row["image"] is None else str(folder / row["image"])},
            features=Features({**dataset.features, "image": Value("string")}),  # not guessed from rows that have none
        ).cast_column("image", Image())
    return dataset


def _table_settings(suffix: str) -> dict:
    return {"sep": "\t"} if suffix == ".tsv" else {}


def _load_repository(
    name: str,
    split: str,
    config: str | None,
    num_prompts: int | None,
    columns: dict[str, str] | None,
    revision: str | None,
) -> Dataset:
    """A dataset on the Hub, or a folder that is made like one."""
    if not os.path.isdir(name) and (Path(name).suffix in _BUILDERS or name.startswith((".", "/", "~"))):
        raise ValueError(f"dataset={name!r}: there is no such file.")
    close = difflib.get_close_matches(name.lower().replace("_", "-"), PROMPT_SETS, n=2, cutoff=0.6)
    problem = (
        f"dataset={name!r} could not be loaded: expected a prompt set ({', '.join(PROMPT_SETS)}), a local file "
        f"({', '.join(_BUILDERS)}) or the id of a dataset on the Hub."
    )
    if close:
        problem += f" Did you mean {' or '.join(close)}?"
        if "/" not in name and not os.path.isdir(name):
            raise ValueError(problem)
    try:
        builder = load_dataset_builder(name, config, revision=revision)
    except Exception as error:
        raise ValueError(f"{problem} {_explained(error)}") from error
    splits = [str(known) for known in builder.config.data_files or builder.info.splits or ()]
    whole = "[" not in split and "+" not in split
    if whole and splits and split not in splits:
        raise ValueError(f"split={split!r}: {name} has {_listed(splits)}.")
    try:
        if os.path.isdir(name) or not whole or (num_prompts is None and columns is None):
            builder.download_and_prepare()
            dataset = _renamed(builder.as_dataset(split=split), columns, name)
            return dataset if num_prompts is None else dataset.select(range(min(num_prompts, len(dataset))))
        stream = _renamed(builder.as_streaming_dataset(split=split), columns, name)
        if columns is not None and hasattr(builder.config, "columns"):
            # Parquet files are read column by column: what is not wanted is not even downloaded.
            builder.config.columns = list(columns)
            stream = _renamed(builder.as_streaming_dataset(split=split), columns, name)
        return _store_stream(stream, num_prompts, Hasher.hash((builder.cache_dir, split, columns, num_prompts)))
    except _ColumnError:
        raise
    except Exception as error:
        raise ValueError(f"dataset={name!r}, split {split!r}, could not be read. {_explained(error)}") from error


class _ColumnError(ValueError):
    """What `columns` should say."""


def _renamed(dataset: Dataset | IterableDataset, columns: dict[str, str] | None, name: str):
    """The wanted columns under their new names, of which one is `prompt`."""
    features = dataset.features
    if features is None:
        features = dict.fromkeys(next(iter(dataset), {}))
    if columns is not None:
        if missing := [column for column in columns if column not in features]:
            raise _ColumnError(
                f"columns={columns}: {name} has no column {', '.join(missing)}; it has {', '.join(features)}."
            )
        dataset = dataset.select_columns(list(columns))
        return dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    if "prompt" not in features:
        texts = [column for column, feature in features.items() if feature is None or _is_text(feature)]
        raise _ColumnError(
            f"{name} has no column 'prompt'; {'its text is in ' + ', '.join(texts) if texts else 'nor any with text'}. "
            f"Say which one holds the prompts, and which others to keep: columns={{{(texts or ['caption'])[0]!r}: 'prompt'}}."
        )
    return dataset


def _is_text(feature) -> bool:
    # Columns of CSV files are large strings.
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _store_stream(stream: IterableDataset, num_prompts: int | None, fingerprint: str | None = None) -> Dataset:
    features = stream.features
    if features is not None:
        stream = stream.decode(False)
    if num_prompts is not None:
        stream = stream.take(num_prompts)

    own = None  # what the stream itself raised

    def rows():
        nonlocal own
        columns, count = features, -1
        try:
            for count, row in enumerate(stream):
                if num_prompts is None and count == MOST_PROMPTS:
                    raise ValueError(
                        f"the stream has more than {MOST_PROMPTS:,} prompts: say how many to keep, with num_prompts or "
                        "dataset.take(n)."
                    )
                columns = dict.fromkeys(row) if columns is None else columns
                if unknown := [column for column in row if column not in columns]:
                    # It would be left out without a word.
                    raise ValueError(
                        f"row {count} of the stream has the column {', '.join(unknown)}, which its first row has not. "
                        f"{_NAME_TYPES}"
                    )
                yield {**dict.fromkeys(columns), **row}
            if count == -1:
                raise ValueError("the stream has no rows: expected some with a column 'prompt'.")
        except Exception as error:
            own = error
            raise

    try:
        return _store(rows, features, fingerprint)
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:  # those of pyarrow, too
        if error is own:
            raise
        text = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"the stream has a row that does not fit the ones before it. {type(error).__name__}: {text}. {_NAME_TYPES}"
        ) from error


def _store(rows: Callable[[], Iterable[dict]], features=None, fingerprint: str | None = None) -> Dataset:
    """
    Rows as a dataset on the disk, written a thousand at a time.

    Args:
        rows (`Callable`): Makes the rows.
        features (`datasets.Features`, *optional*): Their types, if known.
        fingerprint (`str`, *optional*): Says what the rows depend on: with the same one, `rows` is not called again, now
            or later. Without, they are kept until the process ends.
    """
    cache = {} if fingerprint is not None else {"cache_dir": get_temporary_cache_files_directory()}
    try:
        return Dataset.from_generator(
            rows, features=features, fingerprint=fingerprint or generate_random_fingerprint(), **cache
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _explained(error: Exception) -> str:
    """An error of the Hub in one line, and what may help."""
    text = " ".join(str(error).split())
    if constants.HF_HUB_OFFLINE:
        text += " HF_HUB_OFFLINE is set: what was not downloaded before cannot be had."
    elif isinstance(error, ConnectionError) or "connect" in f"{type(error).__name__} {text}".lower():
        text += " The Hub was not reached: try again with a connection, or give a local file."
    return f"{type(error).__name__}: {text}"


def _listed(splits: Iterable[str]) -> str:
    splits = list(splits)
    return f"the split {splits[0]} alone" if len(splits) == 1 else f"the splits {', '.join(splits)}"
