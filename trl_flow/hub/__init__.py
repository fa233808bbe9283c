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

"""What leaves a run for the Hub: the adapter in both formats, and its model card."""

from .adapter import load_adapter, save_adapter, supports_diffusers_format
from .model_card import create_model_card, write_model_card
from .weights import holds_policy, load_policy, load_trained, read_adapter, save_policy


__all__ = [
    "create_model_card",
    "holds_policy",
    "load_adapter",
    "load_policy",
    "load_trained",
    "read_adapter",
    "save_adapter",
    "save_policy",
    "supports_diffusers_format",
    "write_model_card",
]
