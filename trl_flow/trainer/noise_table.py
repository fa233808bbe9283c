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

"""Tables of noise levels, one per step, as files."""

import json
from pathlib import Path

import torch


def load_noise_table(path: str, sigmas: torch.Tensor, sde_type: str) -> list[float]:
    """
    The noise levels of a calibration file, one per step.

    Args:
        path (`str`): File written by [`~trl_flow.calibrate_noise`].
        sigmas (`torch.Tensor` of shape `(T + 1,)`): The grid on which they are to be used.
        sde_type (`str`): The dynamics in which they are to be used.

    Raises:
        ValueError: If the file was made for another number of steps, another sigma grid or other dynamics.
    """
    try:
        table = json.loads(Path(path).read_text())
        levels = [float(level) for level in table["noise_level"]]
        grid, made_for = [float(sigma) for sigma in table["sigmas"]], table["sde_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a calibration file: {type(error).__name__} {error}.") from error
    if len(levels) != len(sigmas) - 1:
        raise ValueError(
            f"{path} has noise levels for {len(levels)} steps, but num_inference_steps={len(sigmas) - 1}. Calibrate "
            "with that number of steps."
        )
    if not torch.allclose(torch.tensor(grid), sigmas, atol=1e-4):
        raise ValueError(
            f"{path} was made for the sigma grid {[round(s, 4) for s in grid]}, but this pipeline uses "
            f"{[round(s, 4) for s in sigmas.tolist()]} here. Calibrate with this model and resolution."
        )
    if made_for != sde_type:
        raise ValueError(
            f"{path} was made for sde_type={made_for!r}, but sde_type={sde_type!r}. Set it to {made_for!r}."
        )
    return levels
