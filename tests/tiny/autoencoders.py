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

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage

from .waking import wake


def kl(latent_channels: int = 4, block_out_channels: tuple[int, ...] = (8, 8), **kwargs) -> AutoencoderKL:
    """FLUX's and SD3's: no quantisation layers, a shift. Each block but the last halves the size."""
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        block_out_channels=block_out_channels,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **(config | kwargs),
    ).eval()


def kl_flux2(latent_channels: int = 4) -> AutoencoderKLFlux2:
    """2 pixels a latent number; the pipeline packs 2 x 2 of them and normalises by the running statistics."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.normal_(0.0, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae


def kl_qwen_image(z_dim: int = 4, levels: int = 1, base_dim: int = 8, **kwargs) -> AutoencoderKLQwenImage:
    """2 ** levels pixels a latent number in height and width; the last level packs frames too."""
    config = {
        "base_dim": base_dim,
        "z_dim": z_dim,
        "dim_mult": [1] * (levels + 1),
        "num_res_blocks": 1,
        "temperal_downsample": [False] * (levels - 1) + [True],
        "latents_mean": [0.1 * (channel % 3 - 1) for channel in range(z_dim)],
        "latents_std": [1.0 + 0.2 * (channel % 2) for channel in range(z_dim)],
    }
    return AutoencoderKLQwenImage(**(config | kwargs)).eval()


def dc(latent_channels: int = 4) -> AutoencoderDC:
    """Sana's: 4 pixels a latent number."""
    vae = AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (3,)),
        decoder_qkv_multiscales=((), (), (3,)),
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return wake(vae)
