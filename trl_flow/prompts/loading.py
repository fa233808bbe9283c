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

"""From a prompt set's name to its dataset."""

from pathlib import Path

from datasets import Dataset, Image, load_dataset


PROMPT_SETS = ("shapes",)

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    name: str, split: str = "train", config: str | None = None, num_prompts: int | None = None
) -> Dataset:
    """
    A prompt set.

    Args:
        name (`str`): A prompt set of this library (`"shapes"`), a local file (`.txt` with one prompt per line, `.json`,
            `.jsonl`, `.csv` or `.parquet`), a folder of pictures with a `metadata.jsonl`, or the id of a dataset on the
            Hub. Other columns than `prompt` reach the reward functions. In a file, a column `image` holds the names of
            pictures, from the file's own folder.
        split (`str`, *optional*, defaults to `"train"`): Split. A local file has the split `"train"` alone, and
            `"train[:90%]"` and the like take parts of it.
        config (`str`, *optional*): Configuration of a dataset on the Hub.
        num_prompts (`int`, *optional*): Keep the first so many.

    Raises:
        ValueError: If the file's kind is unknown, or nothing answers to that name.
    """
    if name == "shapes":
        from ..shapes import shapes_dataset

        return shapes_dataset(split=split, num_prompts=num_prompts)
    suffix = Path(name).suffix
    if Path(name).is_file():
        if suffix not in _BUILDERS:
            raise ValueError(f"{name}: expected a file that ends in {', '.join(_BUILDERS)}.")
        try:
            dataset = load_dataset(_BUILDERS[suffix], data_files=name, split=split)
        except ValueError as error:
            raise ValueError(
                f"split={split!r} of {name}: a file has the split 'train' alone. Take parts of it, such as 'train[:90%]' "
                "to train on and 'train[90%:]' to hold out."
            ) from error
        if suffix == ".txt":
            dataset = dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip() != "")
        if getattr(dataset.features.get("image"), "dtype", None) == "string":
            folder = Path(name).parent
            dataset = dataset.map(lambda row: {"image": str(folder / row["image"])}).cast_column("image", Image())
    else:
        try:
            dataset = load_dataset(name, config, split=split)
        except Exception as error:
            raise ValueError(
                f"dataset={name!r} could not be loaded: expected a prompt set ({', '.join(PROMPT_SETS)}), a local file "
                f"({', '.join(_BUILDERS)}) or the id of a dataset on the Hub. {type(error).__name__}: {error}"
            ) from error
    if num_prompts is not None:
        dataset = dataset.select(range(min(num_prompts, len(dataset))))
    return dataset
