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


"""What the tests of the trainers do to a trainer, and read from it."""

import numpy as np
import torch


def randomize(trainer):
    """An adapter that already does something: LoRA starts with zeros, at which half of the gradients vanish."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trainer.policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def standardized(values, ddof=0, eps=1e-4):
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / (values.std(ddof=ddof) + eps)
