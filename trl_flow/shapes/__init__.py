# Copyright 2026 The trl-flow authors
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

"""The shapes world: a tiny but real Stable Diffusion 3 pipeline, its prompts, and rewards that look at the picture.

Everything is in the package, so that a flow model learns from rewards within minutes on a laptop, offline. It is an honest
miniature of text-to-image reinforcement learning; the same command lines take real models.
"""

from pathlib import Path

from .pictures import render
from .prompts import parse_prompt, shapes_dataset
from .rewards import shapes_partial, shapes_reward, shapes_strict


PIPELINE_PATH = Path(__file__).parent / "pipeline"
"""Folder of the packaged pipeline, for `DiffusionPipeline.from_pretrained`."""

__all__ = [
    "PIPELINE_PATH",
    "parse_prompt",
    "render",
    "shapes_dataset",
    "shapes_partial",
    "shapes_reward",
    "shapes_strict",
]
