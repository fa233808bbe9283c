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
"""What documents name of the Hub, under the same ids: tiny pipelines, reward models and prompt sets."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from documents import ROOT
from loopback_hub import LoopbackHub
from prompts.published_files import FILES
from rewards.original_models import (
    OpenCLIP,
    OriginalImageReward,
    bert_tokenizer,
    clip_processor,
    published_head,
    save_clip,
    shaken,
)
from test_examples import PIPELINES
from tiny import call_arguments, text, tiny_pipeline

from trl_flow.prompts import PROMPT_SETS


# Hub id -> tiny pipeline: the models of the examples, and relatives of theirs that documents name.
MODELS = {
    yaml.safe_load(path.read_text())["model_name_or_path"]: name
    for folder, name in PIPELINES.items()
    for path in (ROOT / "examples" / folder).glob("*.yaml")
}
# What a built-in reward or prompt set loads.
NEEDS = {
    "pickscore": ["yuvalkirstain/PickScore_v1"],
    "clip": ["openai/clip-vit-large-patch14"],
    "aesthetic": ["openai/clip-vit-large-patch14", "camenduru/improved-aesthetic-predictor"],
    "hpsv2": ["xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"],
    "image_reward": ["THUDM/ImageReward", "google-bert/bert-base-uncased"],
    **{name: [record.repository] for name, record in PROMPT_SETS.items() if record.repository},
}


def published(save: Callable) -> dict[str, bytes]:
    """Files that `save` leaves in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }


def checkpoint(name: str, state: dict) -> Callable:
    return lambda folder: torch.save(state, folder / name)


REWARD_MODELS = {
    "yuvalkirstain/PickScore_v1": save_clip,
    "openai/clip-vit-large-patch14": save_clip,
    "camenduru/improved-aesthetic-predictor": lambda folder: torch.save(
        {f"layers.{name}": value for name, value in shaken(published_head(24)).state_dict().items()},
        folder / "sac+logos+ava1-l14-linearMSE.pth",
    ),
    "xswu/HPSv2": lambda folder: torch.save(
        {"epoch": 1, "state_dict": shaken(OpenCLIP()).state_dict()}, folder / "HPS_v2.1_compressed.pt"
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": lambda folder: clip_processor(28).save_pretrained(folder),
    "THUDM/ImageReward": lambda folder: torch.save(
        shaken(OriginalImageReward(57 + 2)).state_dict(), folder / "ImageReward.pt"
    ),
    "google-bert/bert-base-uncased": lambda folder: bert_tokenizer().save_pretrained(folder),
}
CAPTIONS = "".join(
    json.dumps({"caption": f"{number} red circles", "style": ["plain", "bold"][number % 2]}) + "\n"
    for number in range(4)
)
# Repositories of one's own that documents name.
OWN_DATASETS = {
    "user/dataset": {f"en/{split}.jsonl": CAPTIONS for split in ("train", "validation", "test")}
    | {"README.md": "---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n"}
}
DATASETS = {record.repository: name for name, record in PROMPT_SETS.items() if record.repository}


def whole_pipeline(name: str) -> DiffusionPipeline:
    """The tiny pipeline with all components that a repository of its class has."""
    if name != "StableDiffusion3Pipeline":
        return tiny_pipeline(name)
    tokenizer, encoder = text.t5(d_model=32)
    return tiny_pipeline(name, tokenizer_3=tokenizer, text_encoder_3=encoder)


class TinyHub(LoopbackHub):
    """The Hub of the documents. What a text names is put there when it is first named: [`TinyHub.provide`]."""

    def provide(self, named: str):
        for name in MODELS.keys() | NEEDS.keys() | OWN_DATASETS.keys():
            if re.search(rf"(?<![\w/-]){re.escape(name)}(?![\w-])", named):
                for repository in NEEDS.get(name, [name]):
                    self.provide_repository(repository)

    def provide_repository(self, repository: str):
        kind = "dataset" if repository in DATASETS or repository in OWN_DATASETS else "model"
        if (kind, repository) in self.repositories:
            return
        if repository in DATASETS:
            name = DATASETS[repository]
            self.add("dataset", repository, FILES[name])
            if (revision := PROMPT_SETS[name].revision) is not None:
                self.repositories["dataset", repository].commits[-1].sha = revision
        elif repository in OWN_DATASETS:
            self.add("dataset", repository, OWN_DATASETS[repository])
        elif repository in MODELS:
            self.add("model", repository, published(whole_pipeline(MODELS[repository]).save_pretrained))
        else:
            self.add("model", repository, published(REWARD_MODELS[repository]))


def first_model(named: str) -> str:
    """The model that a text names first, or the embedded one."""
    models = [name for name in MODELS if name in named]
    return min(models, key=named.index, default="shapes")


def tiny_size(named: str) -> dict[str, int]:
    """Height, width and frames of what the tiny pipeline makes that stands for the first model that a text names."""
    model = first_model(named)
    arguments = call_arguments(MODELS[model]) if model in MODELS else {}
    return {name: arguments[name] for name in ("height", "width", "num_frames") if name in arguments}
