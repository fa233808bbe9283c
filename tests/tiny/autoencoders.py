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

"""Autoencoders of diffusers pipelines with random weights: one function for each class."""

from diffusers import AutoencoderKL


def kl(latent_channels: int = 4, block_out_channels: tuple[int, ...] = (8, 8), **kwargs) -> AutoencoderKL:
    """FLUX's and SD3's: no quantisation layers, a shift; as many pixels to a latent number as blocks double the size."""
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        block_out_channels=block_out_channels,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **(config | kwargs),
    ).eval()
