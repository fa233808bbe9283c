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

"""What a pipeline's call is given: what was asked for, and the family's defaults."""

import inspect
from collections.abc import Collection

from diffusers import DiffusionPipeline

from .families import PipelineFamily


def with_area(arguments: dict, parameters: Collection[str]) -> dict:
    """
    Arguments of a pipeline's call, with the area to which it would otherwise enlarge the size that is asked for.

    Args:
        arguments (`dict`): What it is to be called with.
        parameters (`Collection[str]`): Names of all arguments that it takes.
    """
    if "max_area" in parameters and {"height", "width"} <= arguments.keys():
        return {"max_area": arguments["height"] * arguments["width"], **arguments}
    return arguments


def resolve_arguments(
    pipeline: DiffusionPipeline, family: PipelineFamily, given: dict, negative_prompt: str | None
) -> dict:
    """
    Arguments of every call of a pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline.
        family ([`PipelineFamily`]): Its family, whose defaults are taken where nothing was given.
        given (`dict`): What was asked for.
        negative_prompt (`str` or `None`): What is set beside them.

    Raises:
        ValueError: If the call has no such argument, or one that has no effect or breaks it.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    name = type(pipeline).__name__
    for argument, value in (*given.items(), ("negative_prompt", negative_prompt)):
        if value is not None and argument not in parameters:
            raise ValueError(f"{argument}={value!r}: the call of {name} has no such argument. Leave it unset.")
    own = ("prompt", "image", "negative_prompt", "latents", "output_type", "return_dict", "sigmas", "timesteps")
    for argument in (*own, "generator", "num_inference_steps", family.guidance):
        if argument in given:
            raise ValueError(f"generation_kwargs holds {argument!r}, which has a setting of its own.")
    arguments = {name: getattr(family, name) for name in ("height", "width", "num_frames") if name in parameters}
    own_size = getattr(pipeline, "default_sample_size", None)
    if isinstance(own_size, int) and (arguments.get("height") or 0) > own_size * pipeline.vae_scale_factor:
        arguments["height"] = arguments["width"] = None
    arguments = {name: value for name, value in arguments.items() if value is not None} | given
    arguments = with_area(arguments, parameters)
    by_true_guidance = "true_cfg_scale" in parameters and family.guidance != "true_cfg_scale"
    if by_true_guidance and negative_prompt is not None and arguments.get("true_cfg_scale", 1) <= 1:
        raise ValueError(
            f"negative_prompt={negative_prompt!r} has no effect in {name} without true_cfg_scale: its guidance_scale "
            "is distilled into the model. Set generation_kwargs={'true_cfg_scale': ...} above 1, or leave it unset."
        )
    if arguments.get("true_cfg_scale", 1) > 1 and negative_prompt is None:
        raise ValueError(
            f"true_cfg_scale={arguments['true_cfg_scale']} has no effect in {name} without a negative prompt. Set "
            "negative_prompt, be it to ''."
        )
    takes_picture_tokens = any(
        getattr(getattr(pipeline, component).config, "image_dim", None)
        for component in family.components
        if getattr(pipeline, component, None) is not None
    )
    if takes_picture_tokens and arguments.get("max_sequence_length", 512) != 512:
        raise ValueError(
            f"max_sequence_length={arguments['max_sequence_length']}: the transformer of {name} tells text from picture by "
            "512 text tokens. Leave it unset."
        )
    return arguments
