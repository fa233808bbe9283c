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

"""Tiny pipelines of the flow-matching architectures that are neither in `images` nor videos."""

from collections.abc import Callable

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLQwenImage21,
    AutoencoderTiny,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4ControlPipeline,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DiffusionPipeline,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

from . import autoencoders, text
from .images import flow_scheduler
from .videos import picture, wan_2_2_vae, wan_vae, without_ftfy
from .waking import wake


# What transformers of FLUX's kind share: one block of each kind.
TWO_STREAMS = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


@torch.no_grad()
def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Woken, and with larger matrices: at the usual initialisation so narrow a network hardly lets the text through."""
    for parameter in wake(module).parameters():
        if parameter.dim() > 1:
            parameter.mul_(2.0)
    return module


def aura_flow() -> AuraFlowPipeline:
    tokenizer, text_encoder = text.umt5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoders.kl(),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def cogview4(pipeline: type[DiffusionPipeline] = CogView4Pipeline, in_channels: int = 4) -> DiffusionPipeline:
    tokenizer, text_encoder = text.glm()
    transformer = CogView4Transformer2DModel(
        in_channels=in_channels,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoders.kl(),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )


def lumina() -> LuminaPipeline:
    tokenizer, text_encoder = text.gemma()
    transformer = LuminaNextDiT2DModel(
        sample_size=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=16,
    )
    return LuminaPipeline(
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoders.kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def bria() -> BriaPipeline:
    tokenizer, text_encoder = text.t5()
    return BriaPipeline(
        transformer=lively(BriaTransformer2DModel(**TWO_STREAMS)),
        scheduler=flow_scheduler(),
        vae=autoencoders.kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def prx(pipeline: type[DiffusionPipeline] = PRXPipeline, in_channels: int = 4, **components) -> DiffusionPipeline:
    tokenizer, text_encoder = text.t5gemma()
    transformer = PRXTransformer2DModel(
        in_channels=in_channels, context_in_dim=16, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    built = pipeline(
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **components,
    )
    return without_ftfy(built)


def ovis_image() -> OvisImagePipeline:
    tokenizer, text_encoder = text.qwen3()
    return OvisImagePipeline(
        scheduler=flow_scheduler(),
        vae=autoencoders.kl(),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        transformer=lively(OvisImageTransformer2DModel(**TWO_STREAMS, out_channels=16)),
    )


def hunyuan_image_vae(latent_channels: int = 4) -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=8,
        scaling_factor=0.75,
    ).eval()


def bria_fibo_edit() -> BriaFiboEditPipeline:
    pipeline = bria_fibo(BriaFiboEditPipeline)
    # It reads its prompts, which have to be JSON, as text: the tests' are plain.
    pipeline.check_inputs = lambda **kwargs: None
    return pipeline


def bria_fibo(pipeline: type[DiffusionPipeline] = BriaFiboPipeline) -> DiffusionPipeline:
    tokenizer, text_encoder = text.smollm3()
    return pipeline(
        transformer=lively(BriaFiboTransformer2DModel(**(TWO_STREAMS | {"in_channels": 4}), text_encoder_dim=8)),
        scheduler=flow_scheduler(),
        vae=wan_2_2_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def bria_fibo2() -> BriaFibo2Pipeline:
    _, processor, text_encoder = text.qwen3_vl()
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=1,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=(2, 2, 4),
        axes_lens=(64, 32, 32),
    )
    pipeline = BriaFibo2Pipeline(
        transformer=lively(transformer),
        scheduler=flow_scheduler(),
        vae=autoencoders.kl_flux2(),
        text_encoder=text_encoder,
        processor=processor,
    )
    # One bundle of the encoder's layers for the gist, one for the layer that takes text: the real encoder has 36.
    pipeline.text_encoder_out_layers = ((1, 2), (0, 2))
    return pipeline


def longcat_image(pipeline: type[DiffusionPipeline] = LongCatImagePipeline, **vae) -> DiffusionPipeline:
    tokenizer, processor, text_encoder = text.qwen2_5_vl()
    built = pipeline(
        scheduler=flow_scheduler(),
        vae=autoencoders.kl(latent_channels=16, **vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_processor=processor,
        transformer=lively(
            LongCatImageTransformer2DModel(**(TWO_STREAMS | {"in_channels": 64}), pooled_projection_dim=16)
        ),
    )
    built.tokenizer_max_length = 16
    return built


def longcat_image_edit() -> LongCatImageEditPipeline:
    """It scales every picture to about a million pixels: 64 of them a latent number keep it small."""
    return longcat_image(LongCatImageEditPipeline, block_out_channels=(4,) * 7, layers_per_block=0)


HUNYUAN_IMAGE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
}


def hunyuan_image() -> HunyuanImagePipeline:
    tokenizer, _, text_encoder = text.qwen2_5_vl()
    tokenizer_2, text_encoder_2 = text.byt5()
    transformer = HunyuanImageTransformer2DModel(
        **HUNYUAN_IMAGE,
        in_channels=4,
        out_channels=4,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=hunyuan_image_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=lively(transformer),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
    pipeline.tokenizer_max_length = 32
    pipeline.tokenizer_2_max_length = 16
    return pipeline


def krea2() -> Krea2Pipeline:
    tokenizer, _, text_encoder = text.qwen3_vl()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    )
    return Krea2Pipeline(
        scheduler=flow_scheduler(max_image_seq_len=6400),
        vae=autoencoders.kl_qwen_image(),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        text_encoder_select_layers=(1, 2),
    )


def ernie_image() -> ErnieImagePipeline:
    """Without the prompt enhancer, an optional language model."""
    tokenizer, text_encoder = text.mistral3()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    return ErnieImagePipeline(
        transformer=lively(transformer),
        vae=autoencoders.kl_flux2(),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )


def nucleus_moe_image() -> NucleusMoEImagePipeline:
    _, processor, text_encoder = text.qwen3_vl()
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in transformer.named_parameters():
        # The experts' weights are whatever was in memory.
        if name.endswith(("gate_up_proj", "down_proj")):
            torch.nn.init.normal_(parameter, std=0.2)
    pipeline = NucleusMoEImagePipeline(
        transformer=lively(transformer),
        scheduler=flow_scheduler(),
        vae=autoencoders.kl_qwen_image(),
        text_encoder=text_encoder,
        processor=processor,
    )
    # The encoder's second last of 3 hidden states; of the real one's 37, the eighth last.
    pipeline.default_return_index = -2
    return pipeline


def hunyuan_image_refiner() -> HunyuanImageRefinerPipeline:
    tokenizer, _, text_encoder = text.qwen2_5_vl()
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )
    transformer = HunyuanImageTransformer2DModel(
        **(HUNYUAN_IMAGE | {"in_channels": 16, "out_channels": 8, "patch_size": (1, 1, 1)}),
        rope_axes_dim=(2, 2, 4),
        guidance_embeds=True,
    )
    pipeline = HunyuanImageRefinerPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        guider=AdaptiveProjectedMixGuidance(),
    )
    pipeline.tokenizer_max_length = 32
    return pipeline


def glm_image() -> GlmImagePipeline:
    """A language model draws the picture's plan, 258 tokens for the smallest picture, then the transformer paints it."""
    tokenizer, text_encoder = text.byt5()
    processor, planner = text.glm_image()
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    return GlmImagePipeline(
        tokenizer=tokenizer,
        processor=processor,
        text_encoder=text_encoder,
        vision_language_encoder=planner,
        vae=autoencoders.kl(block_out_channels=(4, 4, 4, 4), latents_mean=[0.1] * 4, latents_std=[1.1] * 4),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )


def dream_lite(pipeline: type[DiffusionPipeline] = DreamLitePipeline) -> DiffusionPipeline:
    tokenizer, processor, text_encoder = text.qwen3_vl()
    unet = DreamLiteUNetModel(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj_rms",
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return pipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=processor,
        vae=vae.eval(),
        unet=lively(unet),
        scheduler=flow_scheduler(max_shift=1.16),
    )


def ideogram4() -> Ideogram4Pipeline:
    """Guidance comes from a second transformer. The text encoder has the 36 layers of which the pipeline reads 13."""
    tokenizer, _, text_encoder = text.qwen3_vl(num_hidden_layers=36)
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "adaln_dim": 16,
        "llm_features_dim": 13 * 16,
        "mrope_section": (2, 1, 1),
    }
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoders.kl_flux2(),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        transformer=lively(Ideogram4Transformer2DModel(**config)),
        unconditional_transformer=lively(Ideogram4Transformer2DModel(**config)),
    )


def qwen_image21() -> QwenImage21Pipeline:
    """A latent number is 16 pixels wide and high for the pipeline, whatever the autoencoder."""
    _, processor, text_encoder = text.qwen3_vl()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.5, 0.7, -0.1, 1.3],
        latents_std=[3.2, 3.3, 3.4, 3.0],
    )
    return QwenImage21Pipeline(
        scheduler=flow_scheduler(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=text_encoder,
        processor=processor,
        transformer=lively(transformer),
    )


def joy_image_edit(pipeline: type[DiffusionPipeline], transformer: type[torch.nn.Module]) -> DiffusionPipeline:
    tokenizer, processor, text_encoder = text.qwen3_vl()
    config = {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "text_dim": 16,
        "num_layers": 1,
        "rope_dim_list": [2, 2, 4],
    }
    built = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=wan_vae().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=lively(transformer(**config)),
        processor=processor,
    )
    # The real one scales every picture to about a million pixels.
    for name in ("image_processor", "vae_image_processor"):
        if isinstance(getattr(built, name, None), JoyImageEditImageProcessor):
            getattr(built, name).get_default_height_width = lambda *args: (32, 32)
    return built


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "AuraFlowPipeline": aura_flow,
    "CogView4Pipeline": cogview4,
    "CogView4ControlPipeline": lambda: cogview4(CogView4ControlPipeline, in_channels=8),
    "LuminaPipeline": lumina,
    "BriaPipeline": bria,
    "PRXPipeline": lambda: prx(vae=autoencoders.kl()),
    "PRXPixelPipeline": lambda: prx(PRXPixelPipeline, in_channels=3),
    "OvisImagePipeline": ovis_image,
    "BriaFiboPipeline": bria_fibo,
    "BriaFiboEditPipeline": bria_fibo_edit,
    "BriaFibo2Pipeline": bria_fibo2,
    "LongCatImagePipeline": longcat_image,
    "LongCatImageEditPipeline": longcat_image_edit,
    "HunyuanImagePipeline": hunyuan_image,
    "Krea2Pipeline": krea2,
    "ErnieImagePipeline": ernie_image,
    "NucleusMoEImagePipeline": nucleus_moe_image,
    "HunyuanImageRefinerPipeline": hunyuan_image_refiner,
    "GlmImagePipeline": glm_image,
    "DreamLitePipeline": dream_lite,
    "DreamLiteMobilePipeline": lambda: dream_lite(DreamLiteMobilePipeline),
    "Ideogram4Pipeline": ideogram4,
    "QwenImage21Pipeline": qwen_image21,
    "JoyImageEditPipeline": lambda: joy_image_edit(JoyImageEditPipeline, JoyImageEditTransformer3DModel),
    "JoyImageEditPlusPipeline": lambda: joy_image_edit(JoyImageEditPlusPipeline, JoyImageEditPlusTransformer3DModel),
}

SMALL = {"height": 8, "width": 8}
MEDIUM = {"height": 16, "width": 16}
LARGE = {"height": 64, "width": 64}

ARGUMENTS: dict[str, dict] = {
    "AuraFlowPipeline": MEDIUM | {"guidance_scale": 3.5, "max_sequence_length": 16},
    "CogView4Pipeline": MEDIUM | {"guidance_scale": 5.0},
    "CogView4ControlPipeline": MEDIUM | {"guidance_scale": 5.0, "control_image": picture(16, 16)},
    "LuminaPipeline": {"height": 32, "width": 32, "guidance_scale": 4.0},
    "BriaPipeline": SMALL | {"guidance_scale": 5.0, "max_sequence_length": 16},
    "PRXPipeline": SMALL | {"guidance_scale": 4.0, "use_resolution_binning": False},
    "PRXPixelPipeline": SMALL | {"guidance_scale": 4.0, "use_resolution_binning": False},
    "OvisImagePipeline": SMALL | {"guidance_scale": 5.0, "max_sequence_length": 32},
    "BriaFiboPipeline": LARGE | {"guidance_scale": 5.0, "max_sequence_length": 32},
    "BriaFiboEditPipeline": LARGE | {"guidance_scale": 5.0, "max_sequence_length": 32, "image": picture(64, 64)},
    "BriaFibo2Pipeline": SMALL | {"guidance_scale": 5.0},
    "LongCatImagePipeline": SMALL | {"guidance_scale": 4.5, "enable_prompt_rewrite": False},
    "LongCatImageEditPipeline": {"guidance_scale": 4.5, "image": picture(16, 16)},
    "HunyuanImagePipeline": SMALL,
    "Krea2Pipeline": SMALL | {"guidance_scale": 4.5, "max_sequence_length": 32},
    "ErnieImagePipeline": SMALL | {"guidance_scale": 4.0},
    "NucleusMoEImagePipeline": SMALL | {"guidance_scale": 4.0},
    "HunyuanImageRefinerPipeline": SMALL | {"image": picture(8, 8)},
    "GlmImagePipeline": LARGE | {"guidance_scale": 1.5, "max_sequence_length": 16},
    "DreamLitePipeline": MEDIUM | {"guidance_scale": 3.5},
    "DreamLiteMobilePipeline": MEDIUM,
    "Ideogram4Pipeline": SMALL | {"guidance_scale": 7.0, "guidance_schedule": None, "max_sequence_length": 32},
    "QwenImage21Pipeline": LARGE | {"true_cfg_scale": 4.0, "negative_prompt": ""},
    "JoyImageEditPipeline": {"guidance_scale": 4.0, "image": picture(32, 32)},
    "JoyImageEditPlusPipeline": {"guidance_scale": 4.0, "images": [picture(32, 32)]},
}

NOT_BUILT: dict[str, str] = {
    "OmniGenPipeline": "its processor needs torchvision, which the tests do without",
}
