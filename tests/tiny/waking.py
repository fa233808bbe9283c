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

"""Random weights that answer."""

from typing import TypeVar

import torch


Module = TypeVar("Module", bound=torch.nn.Module)


@torch.no_grad()
def wake(module: Module, scale: float = 0.1, gain: float = 1.0) -> Module:
    """Adds small normal noise to every constant parameter (gates and last layers at 0, norms at 1), in place.

    `gain` multiplies every matrix: torch draws those of `Linear` such that they shrink what they get by about 1.7.

    A network that starts as the identity, or as zero, would hide whether a policy passes latents, time and prompt on.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(scale * torch.randn_like(parameter))
        elif parameter.ndim >= 2:
            parameter.mul_(gain)
    return module.eval()
