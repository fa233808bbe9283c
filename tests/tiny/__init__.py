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

"""Tiny diffusers pipelines with random weights, of the real classes and architectures.

    pipeline = tiny_pipeline("FluxPipeline")
    pipeline("a red circle", num_inference_steps=2, **call_arguments("FluxPipeline"))

A name is a pipeline's class, or a class and a variant of it after a slash (`FluxPipeline/schnell`).
"""

import copy

import torch
from diffusers import DiffusionPipeline

from . import images, others, videos


BUILDERS = images.BUILDERS | videos.BUILDERS | others.BUILDERS
ARGUMENTS = images.ARGUMENTS | videos.ARGUMENTS | others.ARGUMENTS
# Classes that have no tiny pipeline, and why.
NOT_BUILT = images.NOT_BUILT | videos.NOT_BUILT | others.NOT_BUILT
TINY_PIPELINES = tuple(BUILDERS)


def tiny_pipeline(name: str, seed: int = 0, **components) -> DiffusionPipeline:
    """The pipeline `name` with random weights drawn from `seed`, and `components` in place of its own ones."""
    if name not in BUILDERS:
        raise KeyError(f"{name}: no tiny pipeline ({NOT_BUILT.get(name, 'there are ' + ', '.join(TINY_PIPELINES))})")
    torch.manual_seed(seed)
    pipeline = BUILDERS[name]()
    if components:
        pipeline.register_modules(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(name: str) -> dict:
    """What a small call of pipeline `name` takes besides a prompt: sizes, pictures, and guidance where it has some."""
    return copy.deepcopy(ARGUMENTS[name])
