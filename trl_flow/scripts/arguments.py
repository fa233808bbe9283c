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

"""What every training command takes beside its method's config: model, LoRA, prompts and rewards."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class FlowScriptArguments:
    r"""
    Arguments of the training commands that are not the trainer's.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"shapes"`):
            Hub id or path of the pipeline to train, or `"shapes"` for the small one in this package.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the frozen weights are loaded. Latents are float32 and the adapter is trained in
            float32 whatever this is.
        quantization (`str`, *optional*):
            Stores the denoiser's frozen weights in fewer bits: `"int8"` (torchao) or `"nf4"` (bitsandbytes, on a GPU).
        lora_r (`int`, *optional*):
            Rank of the adapter. By default that of the pipeline's family, mostly 32.
        lora_alpha (`int`, *optional*):
            Scale of the adapter: its update is multiplied by `lora_alpha / lora_r`. By default twice the rank.
        use_dora (`bool`, *optional*, defaults to `False`):
            Whether the adapter is weight-decomposed (DoRA). diffusers cannot load it; PEFT can.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers to adapt. By default those that suit the pipeline's family.
        reward_funcs (`list[str]`, *optional*):
            Rewards to train on, as [`load_reward`] takes them: names, JSON with settings, Hub repositories, servers, dotted
            import paths. By default `shapes` when the model is `shapes`.
        eval_reward_funcs (`list[str]`, *optional*):
            Rewards that are measured at evaluation and never trained on.
        on_reward_hacking (`str`, *optional*):
            What to do when the trained reward rises while one of `eval_reward_funcs` falls beyond its noise: `"warn"`,
            `"stop"` or `"rollback"` to the best evaluation; see [`RewardHackingCallback`]. By default nothing is watched.
        dataset_name (`str`, *optional*):
            Prompts: the name of a prompt set (`trl-flow prompts list`), a Hub id, or a .txt, .jsonl, .csv or .parquet file.
            By default the prompt set of the first reward.
        dataset_config (`str`, *optional*):
            Configuration of the dataset on the Hub.
        dataset_columns (`list[str]`, *optional*):
            Columns to keep and what to call them: `caption=prompt tag`. By default all, as they are.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the dataset on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on.
        eval_dataset_name (`str`, *optional*):
            Prompts to evaluate on, where they come from elsewhere: a name, a Hub id or a file. By default `dataset_name`.
        num_eval_prompts (`int`, *optional*):
            How many prompts of the test split are used. By default all.
    """

    HELP_GROUPS: ClassVar[dict[str, list[str]]] = {
        "Model and adapter": [
            "model_name_or_path",
            "model_revision",
            "dtype",
            "quantization",
            "lora_r",
            "lora_alpha",
            "lora_target_modules",
            "use_dora",
        ],
        "Rewards and prompts": [
            "reward_funcs",
            "eval_reward_funcs",
            "on_reward_hacking",
            "dataset_name",
            "dataset_config",
            "dataset_columns",
            "dataset_revision",
            "dataset_train_split",
            "dataset_test_split",
            "eval_dataset_name",
            "num_eval_prompts",
        ],
    }

    model_name_or_path: str = field(
        default="shapes",
        metadata={"help": "Hub id or path of the pipeline to train, or `shapes` for the small one in this package."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the pipeline on the Hub."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision in which the frozen weights are loaded. Latents are float32 and the adapter is trained "
            "in float32 whatever this is.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Store the denoiser's frozen weights in fewer bits: `int8` (torchao) or `nf4` (bitsandbytes, on a GPU).",
            "choices": ["int8", "nf4"],
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of the adapter. By default that of the pipeline's family, mostly 32."},
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Scale of the adapter: its update is multiplied by `lora_alpha / lora_r`. By default twice the rank."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Whether the adapter is weight-decomposed (DoRA). diffusers cannot load it; PEFT can."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt. By default those that suit the pipeline's family."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Rewards to train on: names (`trl-flow rewards list`), names with settings as JSON (\'{"ocr": {"match": '
            '"paper"}}\'), Hub repositories (user/repo@revision), servers (http://host:port), evaluate:user/space, '
            "openai:MODEL@http://host/v1, or dotted import paths. By default `shapes` when the model is `shapes`."
        },
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards that are measured at evaluation and never trained on."},
    )
    on_reward_hacking: str | None = field(
        default=None,
        metadata={
            "help": "What to do when the trained reward rises while one of `eval_reward_funcs` falls beyond its noise: "
            "`warn`, `stop`, or `rollback` to the best evaluation. By default nothing is watched.",
            "choices": ["warn", "stop", "rollback"],
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: the name of a prompt set (`trl-flow prompts list`), a Hub id, or a .txt, .jsonl, .csv or "
            ".parquet file. By default the prompt set of the first reward."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset on the Hub."},
    )
    dataset_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to keep and what to call them: `--dataset_columns caption=prompt tag`. By default all, as they "
            "are."
        },
    )
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the dataset on the Hub."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to evaluate on, where they come from elsewhere: a name, a Hub id or a file. By default "
            "`dataset_name`."
        },
    )
    num_eval_prompts: int | None = field(
        default=None,
        metadata={"help": "How many prompts of the test split are used. By default all."},
    )

    def __post_init__(self):
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r}: the rank of the adapter must be at least 1")
        if self.num_eval_prompts is not None and self.num_eval_prompts < 1:
            raise ValueError(f"num_eval_prompts={self.num_eval_prompts}: expected at least 1")


@dataclass
class TrainingScriptArguments(FlowScriptArguments):
    r"""
    Arguments of the training commands beside their methods'.

    Args:
        dry_run (`bool`, *optional*, defaults to `False`):
            Loads what a run needs but the rewards' models, prints what would be done (the rollout's tree, evaluations,
            pictures, updates, memory, time), and stops. Nothing is trained and no file is left.
        print_config (`bool`, *optional*, defaults to `False`):
            Prints the settings, wherever they were given, as a file for `--config`, and stops.
    """

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load what a run needs but the rewards' models, print what would be done (the rollout's tree, "
            "evaluations, pictures, updates, memory, time), and stop. Nothing is trained and no file is left."
        },
    )
    print_config: bool = field(
        default=False,
        metadata={"help": "Print the settings, wherever they were given, as a file for `--config`, and stop."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dry_run and self.print_config:
            raise ValueError("dry_run=True and print_config=True are two questions: ask them one at a time")
