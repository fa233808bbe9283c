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

"""Tiny video pipelines with random weights, of the real architectures."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import text
from .waking import wake


def picture(height: int = 16, width: int = 32) -> Image.Image:
    """A picture whose every pixel differs from its neighbours'."""
    values = np.arange(height * width * 3).reshape(height, width, 3) * 37 % 256
    return Image.fromarray(values.astype(np.uint8))


def clip(num_frames: int) -> list[Image.Image]:
    """As many frames as a video has."""
    return [picture()] * num_frames


def without_ftfy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Text cleaning imports ftfy where it's installed and calls it either way; the prompts of tests have nothing to fix."""
    sys.modules[type(pipeline).__module__].__dict__.setdefault("ftfy", SimpleNamespace(fix_text=str))
    return pipeline


# Wan


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.76, -0.71, -0.91, 0.11],
        latents_std=[2.82, 1.45, 2.33, 2.66],
    ).eval()


def wan_2_2_vae() -> AutoencoderKLWan:
    """The 16 times compressing autoencoder of Wan 2.2 TI2V-5B."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.23, -0.02, -0.13, 0.05],
        latents_std=[0.48, 0.55, 0.61, 0.44],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


WAN_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_transformer(**config) -> WanTransformer3DModel:
    return wake(WanTransformer3DModel(**(WAN_TRANSFORMER | config)))


def wan_scheduler(flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )


def wan_components(flow_shift: float = 3.0) -> dict:
    tokenizer, text_encoder = text.umt5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": wan_vae(),
        "scheduler": wan_scheduler(flow_shift),
    }


def clip_vision() -> dict:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=True
        ),
    }


def siglip() -> dict:
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    }


def wan() -> WanPipeline:
    """Wan 2.1."""
    return WanPipeline(transformer=wan_transformer(), **wan_components())


def wan_2_2() -> WanPipeline:
    """Wan 2.2 T2V-A14B: one transformer for high noise, another for low noise."""
    return WanPipeline(
        transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.875, **wan_components()
    )


def wan_5b() -> WanPipeline:
    """Wan 2.2 TI2V-5B: a timestep for each token."""
    components = wan_components(flow_shift=5.0) | {"vae": wan_2_2_vae()}
    return WanPipeline(transformer=wan_transformer(), expand_timesteps=True, **components)


def wan_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1 I2V: the first frame through the autoencoder (4 + 4 channels besides the latents') and through CLIP."""
    transformer = wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    pipeline = WanImageToVideoPipeline(transformer=transformer, **clip_vision(), **wan_components())
    return without_ftfy(pipeline)


def wan_video_to_video() -> WanVideoToVideoPipeline:
    return without_ftfy(WanVideoToVideoPipeline(transformer=wan_transformer(), **wan_components()))


def wan_vace() -> WanVACEPipeline:
    """Wan 2.1 VACE: latents of what to change and of what to keep, and a mask of 8 x 8 pixels for each latent."""
    transformer = WanVACETransformer3DModel(**WAN_TRANSFORMER, vace_layers=[0], vace_in_channels=2 * 4 + 64)
    return without_ftfy(WanVACEPipeline(transformer=wake(transformer), **wan_components()))


# LTX


def ltx_vae() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def ltx_transformer() -> LTXVideoTransformer3DModel:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return wake(transformer)


def ltx_components() -> dict:
    tokenizer, text_encoder = text.t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": ltx_vae(),
        "transformer": ltx_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    }


def ltx() -> LTXPipeline:
    return LTXPipeline(**ltx_components())


def ltx_image_to_video() -> LTXImageToVideoPipeline:
    return LTXImageToVideoPipeline(**ltx_components())


def ltx_condition() -> LTXConditionPipeline:
    """LTX-Video 0.9.5 and later: pictures at any frame, and a schedule that needs no shift."""
    return LTXConditionPipeline(**ltx_components() | {"scheduler": FlowMatchEulerDiscreteScheduler()})


# HunyuanVideo


def hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


HUNYUAN_VIDEO_TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_video_transformer(**config) -> HunyuanVideoTransformer3DModel:
    return wake(HunyuanVideoTransformer3DModel(**(HUNYUAN_VIDEO_TRANSFORMER | config)))


def hunyuan_video_components() -> dict:
    tokenizer, text_encoder = text.llama(num_hidden_layers=3)
    tokenizer_2, text_encoder_2 = text.clip(max_length=77)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
        "vae": hunyuan_video_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def hunyuan_video() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(transformer=hunyuan_video_transformer(), **hunyuan_video_components())


def hunyuan_video_image_to_video(**config) -> HunyuanVideoImageToVideoPipeline:
    """The first frame's latents in the place of the noise's, and the picture among the prompt's tokens."""
    tokenizer, image_processor, text_encoder = text.llava()
    components = {"tokenizer": tokenizer, "text_encoder": text_encoder, "image_processor": image_processor}
    transformer = hunyuan_video_transformer(**({"image_condition_type": "token_replace"} | config))
    return HunyuanVideoImageToVideoPipeline(transformer=transformer, **(hunyuan_video_components() | components))


def hunyuan_video_image_to_video_33_channels() -> HunyuanVideoImageToVideoPipeline:
    """The first frame's latents, and a mask, as further channels."""
    return hunyuan_video_image_to_video(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False)


def hunyuan_skyreels() -> HunyuanSkyreelsImageToVideoPipeline:
    transformer = hunyuan_video_transformer(in_channels=8)
    return HunyuanSkyreelsImageToVideoPipeline(transformer=transformer, **hunyuan_video_components())


def framepack() -> HunyuanVideoFramepackPipeline:
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN_VIDEO_TRANSFORMER, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    return HunyuanVideoFramepackPipeline(transformer=wake(transformer), **siglip(), **hunyuan_video_components())


# HunyuanVideo 1.5


def hunyuan_video_15_vae() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=1.03682
    ).eval()


def hunyuan_video_15_transformer(**config) -> HunyuanVideo15Transformer3DModel:
    transformer = HunyuanVideo15Transformer3DModel(
        **{
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "rope_axes_dim": (2, 4, 4),
            "target_size": 64,
        }
        | config
    )
    return wake(transformer)


def hunyuan_video_15_components() -> dict:
    tokenizer, text_encoder = text.qwen2_5_vl_text()
    tokenizer_2, text_encoder_2 = text.byt5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
        "vae": hunyuan_video_15_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


# Decoding two videos at a time fails unless `vae.enable_slicing()`: the autoencoder's mask lacks the axis of heads.
def shortened(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with fewer padding tokens than the 1000 + 256 + 729 that HunyuanVideo 1.5 attends to."""
    # What comes before the prompt; Qwen's own tokenizer splits it into 108.
    pipeline.prompt_template_encode_start_idx = 98
    pipeline.tokenizer_max_length = 24
    pipeline.tokenizer_2_max_length = 8
    pipeline.vision_num_semantic_tokens = 4
    return pipeline


def hunyuan_video_15() -> HunyuanVideo15Pipeline:
    transformer = hunyuan_video_15_transformer(task_type="t2v")
    return shortened(HunyuanVideo15Pipeline(transformer=transformer, **hunyuan_video_15_components()))


def hunyuan_video_15_image_to_video() -> HunyuanVideo15ImageToVideoPipeline:
    components = hunyuan_video_15_components() | siglip()
    return shortened(HunyuanVideo15ImageToVideoPipeline(transformer=hunyuan_video_15_transformer(), **components))


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "WanPipeline": wan,
    "WanPipeline/2.2": wan_2_2,
    "WanPipeline/5b": wan_5b,
    "WanImageToVideoPipeline": wan_image_to_video,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "WanVideoToVideoPipeline": wan_video_to_video,
    "WanVACEPipeline": wan_vace,
    "LTXImageToVideoPipeline": ltx_image_to_video,
    "LTXConditionPipeline": ltx_condition,
    "HunyuanVideoImageToVideoPipeline": hunyuan_video_image_to_video,
    "HunyuanVideoImageToVideoPipeline/33ch": hunyuan_video_image_to_video_33_channels,
    "HunyuanSkyreelsImageToVideoPipeline": hunyuan_skyreels,
    "HunyuanVideoFramepackPipeline": framepack,
    "HunyuanVideo15ImageToVideoPipeline": hunyuan_video_15_image_to_video,
}

SMALL = {"height": 16, "width": 32, "num_frames": 5}
WAN = SMALL | {"guidance_scale": 5.0, "max_sequence_length": 16}
LTX = {"height": 32, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}
HUNYUAN_VIDEO = SMALL | {"guidance_scale": 6.0, "max_sequence_length": 16}

ARGUMENTS: dict[str, dict] = {
    "WanPipeline": WAN,
    "WanPipeline/2.2": WAN | {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "WanPipeline/5b": WAN | {"height": 32, "width": 64},
    "WanImageToVideoPipeline": WAN | {"image": picture()},
    "LTXPipeline": LTX,
    "HunyuanVideoPipeline": HUNYUAN_VIDEO,
    "HunyuanVideo15Pipeline": {"height": 32, "width": 64, "num_frames": 5},
    "WanVideoToVideoPipeline": {key: WAN[key] for key in WAN if key != "num_frames"} | {"video": clip(5)},
    "WanVACEPipeline": WAN | {"video": clip(5), "mask": clip(5)},
    "LTXImageToVideoPipeline": LTX | {"image": picture()},
    "LTXConditionPipeline": LTX | {"image": picture()},
    "HunyuanVideoImageToVideoPipeline": HUNYUAN_VIDEO | {"image": picture()},
    "HunyuanVideoImageToVideoPipeline/33ch": HUNYUAN_VIDEO
    | {"num_frames": 9, "image": picture(), "negative_prompt": "bad quality", "true_cfg_scale": 3.0},
    "HunyuanSkyreelsImageToVideoPipeline": SMALL
    | {"image": picture(), "negative_prompt": "bad quality", "true_cfg_scale": 6.0, "max_sequence_length": 16},
    "HunyuanVideoFramepackPipeline": HUNYUAN_VIDEO | {"num_frames": 9, "latent_window_size": 3, "image": picture()},
    "HunyuanVideo15ImageToVideoPipeline": {"image": picture(), "num_frames": 5},
}

NOT_BUILT: dict[str, str] = {}
