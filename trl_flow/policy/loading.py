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

"""From a model's name to its pipeline."""

import os

from diffusers import DiffusionPipeline

from .families import FAMILIES, PipelineFamily


def load_pipeline(model: "str | os.PathLike | DiffusionPipeline", **kwargs) -> DiffusionPipeline:
    """
    The pipeline that `model` names.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]): `"shapes"` (the embedded pipeline), a directory, a Hub id, or
            a pipeline, which is returned as it is.
        kwargs: Passed to [`~diffusers.DiffusionPipeline.from_pretrained`].

    Raises:
        ValueError: If nothing answers to that name.
    """
    if isinstance(model, DiffusionPipeline):
        return model
    try:
        return DiffusionPipeline.from_pretrained(_place(model), **kwargs)
    except OSError as error:
        raise ValueError(
            f"model={str(model)!r} could not be loaded: expected 'shapes' (the embedded pipeline), a directory that "
            f"holds a diffusers pipeline, or the id of one on the Hub. {error}"
        ) from error


def find_record(model: "str | os.PathLike", **kwargs) -> PipelineFamily:
    """
    The record of the family that a model's pipeline belongs to, without loading the model.

    Args:
        model (`str`): As for [`load_pipeline`].
        kwargs: Passed to [`~diffusers.DiffusionPipeline.load_config`].

    Returns:
        [`PipelineFamily`]: for a pipeline that has no record, one with the defaults of all and without layers.
    """
    config = DiffusionPipeline.load_config(_place(model), **kwargs)
    name = config["_class_name"]
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    return PipelineFamily(name, (name,), lora_target_modules=())


def _place(model: "str | os.PathLike") -> str:
    if model == "shapes":
        from ..shapes import PIPELINE_PATH

        return str(PIPELINE_PATH)
    return str(model)


def default_call_arguments(model) -> dict:
    """
    Arguments of the pipeline call that a model needs and its pipeline class does not know.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]): As for a trainer.
    """
    # The embedded pipeline has no T5 encoder and was made with one placeholder token in its place; the class's default
    # of 256 would be ten times slower, and nothing that it has seen.
    return {"max_sequence_length": 1} if model == "shapes" else {}
