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
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    LucyEditPipeline,
    MMAudioVAE,
    MMAudioVocoder,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import autoencoders, text
from .waking import wake


def picture(height: int = 16, width: int = 32) -> Image.Image:
    """A picture whose every pixel differs from its neighbours'."""
    values = np.arange(height * width * 3).reshape(height, width, 3) * 37 % 256
    return Image.fromarray(values.astype(np.uint8))


def clip(num_frames: int) -> list[Image.Image]:
    """As many frames as a video has."""
    return [picture()] * num_frames


def tensor_video() -> torch.Tensor:
    """`clip(5)` as a tensor of shape `(1, 3, 5, 16, 32)` between 0 and 1."""
    frame = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 255
    return frame[None, :, None].repeat(1, 1, 5, 1, 1)


def tensor_mask() -> torch.Tensor:
    """The right half, of shape `(1, 1, 5, 16, 32)`."""
    return (torch.arange(32) >= 16).float().expand(1, 1, 5, 16, 32)


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
    return pipeline


def wan_2_2_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.2 I2V-A14B: two transformers, the first frame through the autoencoder only."""
    transformers = {name: wan_transformer(in_channels=12) for name in ("transformer", "transformer_2")}
    return WanImageToVideoPipeline(**transformers, boundary_ratio=0.9, **wan_components())


def wan_5b_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.2 TI2V-5B: the first frame in the place of the first latents, at timestep 0."""
    components = wan_components(flow_shift=5.0) | {"vae": wan_2_2_vae()}
    return WanImageToVideoPipeline(transformer=wan_transformer(), expand_timesteps=True, **components)


def wan_video_to_video() -> WanVideoToVideoPipeline:
    return WanVideoToVideoPipeline(transformer=wan_transformer(), **wan_components())


def wan_vace() -> WanVACEPipeline:
    """Wan 2.1 VACE: latents of what to change and of what to keep, and a mask of 8 x 8 pixels for each latent."""
    transformer = WanVACETransformer3DModel(**WAN_TRANSFORMER, vace_layers=[0], vace_in_channels=2 * 4 + 64)
    return WanVACEPipeline(transformer=wake(transformer), **wan_components())


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


def ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def ltx_components() -> dict:
    tokenizer, text_encoder = text.t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": ltx_vae(),
        "transformer": ltx_transformer(),
        "scheduler": ltx_scheduler(),
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


# Relatives of Wan: SkyReels V2, Lucy Edit, ChronoEdit


def skyreels_transformer(**config) -> SkyReelsV2Transformer3DModel:
    return wake(SkyReelsV2Transformer3DModel(**(WAN_TRANSFORMER | config)))


def skyreels() -> SkyReelsV2Pipeline:
    return SkyReelsV2Pipeline(transformer=skyreels_transformer(), **wan_components(flow_shift=8.0))


def skyreels_image_to_video() -> SkyReelsV2ImageToVideoPipeline:
    transformer = skyreels_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    components = clip_vision() | wan_components(flow_shift=5.0)
    return SkyReelsV2ImageToVideoPipeline(transformer=transformer, **components)


def skyreels_diffusion_forcing(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Every latent frame has a timestep and a copy of the scheduler of its own.

    The smallest checkpoint also injects the frame rate (`inject_sample_info`), which works for one prompt only.
    """
    return pipeline(transformer=skyreels_transformer(), **wan_components(flow_shift=8.0))


def lucy_edit() -> LucyEditPipeline:
    """Wan 2.2 5B with the edited video's latents as further channels."""
    components = wan_components(flow_shift=5.0) | {"vae": wan_2_2_vae()}
    pipeline = LucyEditPipeline(transformer=wan_transformer(in_channels=8), expand_timesteps=True, **components)
    return pipeline


def chronoedit() -> ChronoEditPipeline:
    """Editing as a video from the picture to the edited picture."""
    config = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
    transformer = wake(ChronoEditTransformer3DModel(**(WAN_TRANSFORMER | config)))
    components = clip_vision() | wan_components(flow_shift=5.0)
    return ChronoEditPipeline(transformer=transformer, **components)


# Mochi


def mochi() -> MochiPipeline:
    tokenizer, text_encoder = text.t5()
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    # Its group norms have 32 groups whatever the width.
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=wake(transformer),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


# SANA-Video


def sana_video_components() -> dict:
    tokenizer, text_encoder = text.gemma2()
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        rope_max_seq_len=32,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": wake(transformer),
        "vae": wan_vae(),
    }


def sana_video() -> SanaVideoPipeline:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, beta_start=0.0001, beta_end=0.02
    )
    return SanaVideoPipeline(scheduler=scheduler, **sana_video_components())


def sana_image_to_video() -> SanaImageToVideoPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    return SanaImageToVideoPipeline(scheduler=scheduler, **sana_video_components())


# Cosmos


class Unguarded:
    """Stands in for the Cosmos guardrail, which is a package and several models of its own."""

    def to(self, *args, **kwargs):
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def without_torchvision() -> None:
    """The transformer resizes its mask with torchvision, which the tests do without; nearest neighbours are the same."""

    def resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size, mode=interpolation)

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    sys.modules[CosmosTransformer3DModel.__module__].__dict__.setdefault("transforms", transforms)


def cosmos_transformer(**config) -> CosmosTransformer3DModel:
    without_torchvision()
    transformer = CosmosTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
        }
        | config
    )
    return wake(transformer)


def cosmos_components() -> dict:
    tokenizer, text_encoder = text.t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": wan_vae(),
        "safety_checker": Unguarded(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    }


def cosmos_2_text_to_image() -> Cosmos2TextToImagePipeline:
    """Cosmos Predict 2: a flow model, sampled at EDM's noise levels from 80 to 0.002."""
    return Cosmos2TextToImagePipeline(transformer=cosmos_transformer(), **cosmos_components())


def cosmos_2_video_to_world() -> Cosmos2VideoToWorldPipeline:
    return Cosmos2VideoToWorldPipeline(transformer=cosmos_transformer(in_channels=5), **cosmos_components())


def cosmos_2_5_predict() -> Cosmos2_5_PredictBasePipeline:
    """Cosmos Predict 2.5: all layers of Qwen2.5-VL, projected."""
    tokenizer, _, text_encoder = text.qwen2_5_vl()
    transformer = cosmos_transformer(
        in_channels=5, use_crossattn_projection=True, crossattn_proj_in_channels=32, encoder_hidden_states_channels=16
    )
    components = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "scheduler": UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        ),
    }
    return Cosmos2_5_PredictBasePipeline(transformer=transformer, **(cosmos_components() | components))


# Kandinsky 5


def kandinsky_transformer(**config) -> Kandinsky5Transformer3DModel:
    transformer = Kandinsky5Transformer3DModel(
        **{
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
            "visual_cond": True,
        }
        | config
    )
    return wake(transformer)


def kandinsky_components(shift: float) -> dict:
    _, processor, text_encoder = text.qwen2_5_vl()
    tokenizer_2, text_encoder_2 = text.clip(max_length=77)
    return {
        "tokenizer": processor,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }


def kandinsky_video(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Latents are channels last, with further channels for known frames and their mask."""
    return pipeline(transformer=kandinsky_transformer(), vae=hunyuan_video_vae(), **kandinsky_components(5.0))


def kandinsky_image(pipeline: type[DiffusionPipeline], **config) -> DiffusionPipeline:
    vae = autoencoders.kl(block_out_channels=(4, 4, 4, 4))
    pipeline = pipeline(transformer=kandinsky_transformer(**config), vae=vae, **kandinsky_components(3.0))
    # It rounds every size to one of its own ones, which have a megapixel.
    pipeline.resolutions = [(32, 16)]
    # Qwen's own tokenizer makes 54 tokens of the template of editing, not 49.
    pipeline.prompt_template_encode_start_idx = min(pipeline.prompt_template_encode_start_idx, 49)
    return pipeline


def kandinsky_6() -> Kandinsky6TI2VAPipeline:
    """Video and sound; a picture is one more latent frame at the end, which never changes."""
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = MMAudioVAE(
        mel_bins=8, latent_channels=4, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1
    )
    vocoder = MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3, 5),),
    )
    return Kandinsky6TI2VAPipeline(
        transformer=wake(transformer),
        vae=hunyuan_video_vae(),
        audio_vae=audio_vae.eval(),
        vocoder=vocoder.eval(),
        **kandinsky_components(5.0),
    )


# EasyAnimate


def qwen2_vl() -> tuple[PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration]:
    tokenizer = text.qwen_tokenizer()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    )
    return tokenizer, Qwen2VLForConditionalGeneration(config).eval()


def easyanimate(pipeline: type[DiffusionPipeline], in_channels: int = 4, **config) -> DiffusionPipeline:
    tokenizer, text_encoder = qwen2_vl()
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        add_norm_text_encoder=True,
        text_embed_dim=16,
        **config,
    )
    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=wake(transformer),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


# LTX-2


def ltx_2(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Video and sound, each with a scheduler of its own (a copy)."""
    tokenizer, text_encoder = text.gemma3()
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        # The default, reflection, needs two latents in every direction.
        decoder_spatial_padding_mode="zeros",
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
    )
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=wake(transformer),
        connectors=wake(connectors),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        vocoder=vocoder.eval(),
        scheduler=ltx_scheduler(),
    )


# Motif-Video


def motif_video(pipeline: type[DiffusionPipeline], image_embed_dim: int | None = None) -> DiffusionPipeline:
    tokenizer, text_encoder = text.t5gemma2()
    transformer = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        image_embed_dim=image_embed_dim,
        rope_axes_dim=(2, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=wake(transformer),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        guider=ClassifierFreeGuidance(guidance_scale=8.0),
        feature_extractor=SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    )


# AnyFlow and Helios, relatives of Wan


def anyflow() -> AnyFlowPipeline:
    """A flow map: it also takes the time that a step goes to."""
    components = wan_components() | {"scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)}
    return AnyFlowPipeline(transformer=wake(AnyFlowTransformer3DModel(**WAN_TRANSFORMER)), **components)


def anyflow_far() -> AnyFlowFARPipeline:
    """One chunk of latent frames after another."""
    transformer = AnyFlowFARTransformer3DModel(**WAN_TRANSFORMER, chunk_partition=(1, 1), full_chunk_limit=2)
    components = wan_components() | {"scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)}
    return AnyFlowFARPipeline(transformer=wake(transformer), **components)


def helios() -> HeliosPipeline:
    """One chunk of latent frames after another, which attends to the earlier ones at three scales."""
    config = {key: WAN_TRANSFORMER[key] for key in WAN_TRANSFORMER if key != "rope_max_seq_len"}
    transformer = HeliosTransformer3DModel(**config, rope_dim=(4, 4, 4))
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True, time_shift_type="linear")
    return HeliosPipeline(transformer=wake(transformer), **(wan_components() | {"scheduler": scheduler}))


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
    "SkyReelsV2Pipeline": skyreels,
    "SkyReelsV2ImageToVideoPipeline": skyreels_image_to_video,
    "SkyReelsV2DiffusionForcingPipeline": partial(skyreels_diffusion_forcing, SkyReelsV2DiffusionForcingPipeline),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": partial(
        skyreels_diffusion_forcing, SkyReelsV2DiffusionForcingImageToVideoPipeline
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": partial(
        skyreels_diffusion_forcing, SkyReelsV2DiffusionForcingVideoToVideoPipeline
    ),
    "LucyEditPipeline": lucy_edit,
    "ChronoEditPipeline": chronoedit,
    "MochiPipeline": mochi,
    "SanaVideoPipeline": sana_video,
    "SanaImageToVideoPipeline": sana_image_to_video,
    "Cosmos2TextToImagePipeline": cosmos_2_text_to_image,
    "Cosmos2VideoToWorldPipeline": cosmos_2_video_to_world,
    "Cosmos2_5_PredictBasePipeline": cosmos_2_5_predict,
    "Kandinsky5T2VPipeline": partial(kandinsky_video, Kandinsky5T2VPipeline),
    "Kandinsky5I2VPipeline": partial(kandinsky_video, Kandinsky5I2VPipeline),
    "Kandinsky5T2IPipeline": partial(kandinsky_image, Kandinsky5T2IPipeline, visual_cond=False),
    "Kandinsky5I2IPipeline": partial(kandinsky_image, Kandinsky5I2IPipeline),
    "EasyAnimatePipeline": partial(easyanimate, EasyAnimatePipeline),
    "EasyAnimateInpaintPipeline": partial(
        easyanimate, EasyAnimateInpaintPipeline, in_channels=12, resize_inpaint_mask_directly=False
    ),
    "LTX2Pipeline": partial(ltx_2, LTX2Pipeline),
    "LTX2ImageToVideoPipeline": partial(ltx_2, LTX2ImageToVideoPipeline),
    "MotifVideoPipeline": partial(motif_video, MotifVideoPipeline),
    "MotifVideoImage2VideoPipeline": partial(motif_video, MotifVideoImage2VideoPipeline, image_embed_dim=16),
    "AnyFlowPipeline": anyflow,
    "AnyFlowFARPipeline": anyflow_far,
    "HeliosPipeline": helios,
    "Kandinsky6TI2VAPipeline": kandinsky_6,
    "WanImageToVideoPipeline/2.2": wan_2_2_image_to_video,
    "WanImageToVideoPipeline/5b": wan_5b_image_to_video,
}

SMALL = {"height": 16, "width": 32, "num_frames": 5}
WAN = SMALL | {"guidance_scale": 5.0, "max_sequence_length": 16}
LTX = {"height": 32, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}
HUNYUAN_VIDEO = SMALL | {"guidance_scale": 6.0, "max_sequence_length": 16}
SANA_VIDEO = {
    "height": 32,
    "width": 64,
    "frames": 5,
    "guidance_scale": 6.0,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
}
KANDINSKY = {"height": 16, "width": 32, "guidance_scale": 5.0, "max_sequence_length": 48}
EASYANIMATE = SMALL | {"guidance_scale": 5.0, "negative_prompt": "bad quality"}
LTX_2 = LTX | {"guidance_scale": 4.0, "spatio_temporal_guidance_blocks": [1]}

ARGUMENTS: dict[str, dict] = {
    "WanPipeline": WAN,
    "WanPipeline/2.2": WAN | {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "WanPipeline/5b": WAN | {"height": 32, "width": 64},
    # With fewer text tokens than 512, these three take the end of the text for their picture.
    "WanImageToVideoPipeline": WAN | {"image": picture(), "max_sequence_length": 512},
    "LTXPipeline": LTX,
    "HunyuanVideoPipeline": HUNYUAN_VIDEO,
    "HunyuanVideo15Pipeline": {"height": 32, "width": 64, "num_frames": 5},
    "WanVideoToVideoPipeline": {key: WAN[key] for key in WAN if key != "num_frames"} | {"video": clip(5)},
    # Takes one prompt only.
    "WanVACEPipeline": WAN | {"video": clip(5), "mask": clip(5)},
    "LTXImageToVideoPipeline": LTX | {"image": picture()},
    "LTXConditionPipeline": LTX | {"image": picture()},
    # With a list of prompts these four want a list of as many pictures.
    "HunyuanVideoImageToVideoPipeline": HUNYUAN_VIDEO | {"image": picture()},
    "HunyuanVideoImageToVideoPipeline/33ch": HUNYUAN_VIDEO
    | {"num_frames": 9, "image": picture(), "negative_prompt": "bad quality", "true_cfg_scale": 3.0},
    "HunyuanSkyreelsImageToVideoPipeline": SMALL
    | {"image": picture(), "negative_prompt": "bad quality", "true_cfg_scale": 6.0, "max_sequence_length": 16},
    "HunyuanVideoFramepackPipeline": HUNYUAN_VIDEO | {"num_frames": 9, "latent_window_size": 3, "image": picture()},
    "HunyuanVideo15ImageToVideoPipeline": {"image": picture(), "num_frames": 5},
    "SkyReelsV2Pipeline": WAN,
    "SkyReelsV2ImageToVideoPipeline": WAN | {"image": picture(), "max_sequence_length": 512},
    "SkyReelsV2DiffusionForcingPipeline": WAN,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": WAN | {"image": picture()},
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": WAN
    | {"num_frames": 9, "base_num_frames": 9, "overlap_history": 5, "video": clip(5)},
    # With a list of prompts this one and the one above want a list of as many videos.
    "LucyEditPipeline": WAN | {"height": 32, "width": 64, "video": [picture(32, 64)] * 5},
    "ChronoEditPipeline": WAN | {"image": picture(), "max_sequence_length": 512},
    "MochiPipeline": SMALL | {"num_frames": 7, "guidance_scale": 4.5, "max_sequence_length": 16},
    "SanaVideoPipeline": SANA_VIDEO,
    "SanaImageToVideoPipeline": SANA_VIDEO | {"image": picture()},
    "Cosmos2TextToImagePipeline": {"height": 16, "width": 32, "guidance_scale": 7.0, "max_sequence_length": 16},
    "Cosmos2VideoToWorldPipeline": SMALL | {"guidance_scale": 7.0, "max_sequence_length": 16, "image": picture()},
    "Cosmos2_5_PredictBasePipeline": SMALL | {"guidance_scale": 7.0, "max_sequence_length": 48},
    "Kandinsky5T2VPipeline": KANDINSKY | {"num_frames": 5},
    # At the end it scales the first four latent frames to the fifth's and later ones' mean and deviation.
    "Kandinsky5I2VPipeline": KANDINSKY | {"num_frames": 21, "image": picture()},
    "Kandinsky5T2IPipeline": KANDINSKY | {"guidance_scale": 3.5},
    # With a list of prompts it wants a list of as many pictures.
    "Kandinsky5I2IPipeline": KANDINSKY | {"guidance_scale": 3.5, "image": picture(112, 224)},
    # With a list of prompts these two want a list of as many negative prompts, and the second as many videos and masks.
    "EasyAnimatePipeline": EASYANIMATE,
    "EasyAnimateInpaintPipeline": EASYANIMATE | {"video": tensor_video(), "mask_video": tensor_mask()},
    "LTX2Pipeline": LTX_2,
    # Compressing the picture as a video's frame needs PyAV.
    "LTX2ImageToVideoPipeline": LTX_2 | {"image": picture(), "image_crf": 0},
    "MotifVideoPipeline": SMALL | {"max_sequence_length": 16},
    # Takes one prompt only: it encodes the one picture once.
    "MotifVideoImage2VideoPipeline": SMALL | {"max_sequence_length": 16, "image": picture()},
    "AnyFlowPipeline": WAN,
    "AnyFlowFARPipeline": WAN,
    "HeliosPipeline": WAN | {"num_latent_frames_per_chunk": 2},
    "Kandinsky6TI2VAPipeline": KANDINSKY | {"num_frames": 5},
    "WanImageToVideoPipeline/2.2": WAN | {"guidance_scale": 3.5, "guidance_scale_2": 3.0, "image": picture()},
    "WanImageToVideoPipeline/5b": WAN | {"height": 32, "width": 64, "image": picture(32, 64)},
}

NOT_BUILT: dict[str, str] = {
    "HeliosPyramidPipeline": "not one flow: latents grow from stage to stage, with new noise for each",
    "AllegroPipeline": "not a flow model: it predicts noise",
    "CogVideoXPipeline": "not a flow model: it predicts v of a diffusion",
    "CosmosTextToWorldPipeline": "not a flow model: EDM's preconditioned diffusion",
    "CosmosVideoToWorldPipeline": "not a flow model: EDM's preconditioned diffusion",
    "EasyAnimateControlPipeline": "its call passes `text_encoder_index`, which its `encode_prompt` does not take "
    "(diffusers 0.42.1)",
}
