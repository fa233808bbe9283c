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

"""Tiny pipelines of the flow-matching architectures that are in neither `images` nor `videos`."""

from collections.abc import Callable

import torch
from diffusers import (
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLQwenImage21,
    AutoencoderOobleck,
    AutoencoderSAME,
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
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
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
    StableAudio3AudioToAudioPipeline,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3InpaintPipeline,
    StableAudio3Pipeline,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

from . import autoencoders, text
from .images import flow_scheduler
from .videos import picture, wan_2_2_vae, wan_vae
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
    """The pipeline takes it for granted that a latent number is 8 pixels wide and high."""
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
        vae=autoencoders.kl(block_out_channels=(8, 8, 8, 8)),
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
    return built


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


def stable_audio3(pipeline: type[DiffusionPipeline] = StableAudio3Pipeline, **scheduler) -> DiffusionPipeline:
    """The base model; the distilled one has a scheduler with `stochastic_sampling`."""
    tokenizer, text_encoder = text.t5gemma()
    transformer = StableAudio3DiTModel(
        io_channels=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    vae = AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=8,
        sampling_rate=32,
    )
    return pipeline(
        vae=wake(vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16).eval(),
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, **scheduler),
    )


def ace_step() -> AceStepPipeline:
    tokenizer, text_encoder = text.qwen3()
    attention = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
    }
    # Two layers: one looks at its neighbourhood, one at everything.
    transformer = AceStepTransformer1DModel(
        **attention, num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4
    )
    condition_encoder = AceStepConditionEncoder(
        **attention,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=32,
    )
    return AceStepPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        condition_encoder=condition_encoder.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def longcat_audio_dit() -> LongCatAudioDiTPipeline:
    tokenizer, text_encoder = text.umt5()
    transformer = LongCatAudioDiTTransformer(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4)
    vae = LongCatAudioDiTVae(
        channels=4,
        c_mults=[1, 1],
        strides=[2, 2],
        latent_dim=4,
        encoder_latent_dim=8,
        downsampling_ratio=4,
        sample_rate=32,
    )
    return LongCatAudioDiTPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )


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
    "StableAudio3Pipeline": stable_audio3,
    "StableAudio3Pipeline/distilled": lambda: stable_audio3(stochastic_sampling=True),
    "StableAudio3AudioToAudioPipeline": lambda: stable_audio3(StableAudio3AudioToAudioPipeline),
    "StableAudio3InpaintPipeline": lambda: stable_audio3(StableAudio3InpaintPipeline),
    "AceStepPipeline": ace_step,
    "LongCatAudioDiTPipeline": longcat_audio_dit,
}

SMALL = {"height": 8, "width": 8}
MEDIUM = {"height": 16, "width": 16}
LARGE = {"height": 64, "width": 64}

# One second for two ears.
SOUND = torch.sin(torch.arange(64.0)).reshape(1, 2, 32)

ARGUMENTS: dict[str, dict] = {
    "AuraFlowPipeline": MEDIUM | {"guidance_scale": 3.5, "max_sequence_length": 16},
    "CogView4Pipeline": MEDIUM | {"guidance_scale": 5.0},
    "CogView4ControlPipeline": MEDIUM | {"guidance_scale": 5.0, "control_image": picture(16, 16)},
    "LuminaPipeline": {"height": 32, "width": 32, "guidance_scale": 4.0, "clean_caption": False},
    "BriaPipeline": SMALL | {"guidance_scale": 5.0, "max_sequence_length": 16},
    # With guidance, PRX takes one prompt a call: it makes two timesteps however many pictures there are.
    "PRXPipeline": SMALL | {"guidance_scale": 4.0, "use_resolution_binning": False},
    "PRXPixelPipeline": SMALL | {"guidance_scale": 4.0, "use_resolution_binning": False},
    "OvisImagePipeline": SMALL | {"guidance_scale": 5.0, "max_sequence_length": 32},
    "BriaFiboPipeline": LARGE | {"guidance_scale": 5.0, "max_sequence_length": 32},
    "BriaFiboEditPipeline": LARGE | {"guidance_scale": 5.0, "max_sequence_length": 32, "image": picture(64, 64)},
    "BriaFibo2Pipeline": SMALL | {"guidance_scale": 5.0},
    "LongCatImagePipeline": SMALL | {"guidance_scale": 4.5, "enable_prompt_rewrite": False},
    # One prompt a call.
    "LongCatImageEditPipeline": {"guidance_scale": 4.5, "image": picture(16, 16)},
    "HunyuanImagePipeline": SMALL,
    "Krea2Pipeline": SMALL | {"guidance_scale": 4.5, "max_sequence_length": 32},
    "ErnieImagePipeline": SMALL | {"guidance_scale": 4.0},
    "NucleusMoEImagePipeline": SMALL | {"guidance_scale": 4.0},
    "HunyuanImageRefinerPipeline": SMALL | {"image": picture(8, 8)},
    "GlmImagePipeline": LARGE | {"guidance_scale": 1.5, "max_sequence_length": 16},
    # One prompt a call.
    "DreamLitePipeline": MEDIUM | {"guidance_scale": 3.5},
    "DreamLiteMobilePipeline": MEDIUM,
    "Ideogram4Pipeline": SMALL | {"guidance_scale": 7.0, "guidance_schedule": None, "max_sequence_length": 32},
    # Several prompts a call need as many negative ones.
    "QwenImage21Pipeline": LARGE | {"true_cfg_scale": 4.0, "negative_prompt": ""},
    "JoyImageEditPipeline": {"guidance_scale": 4.0, "image": picture(32, 32)},
    # Several prompts a call need as many lists of pictures.
    "JoyImageEditPlusPipeline": {"guidance_scale": 4.0, "images": [picture(32, 32)]},
    "StableAudio3Pipeline": {"duration": 1.0, "guidance_scale": 3.0},
    "StableAudio3Pipeline/distilled": {"duration": 1.0},
    "StableAudio3AudioToAudioPipeline": {"duration": 1.0, "audio": SOUND, "init_noise_level": 0.9},
    "StableAudio3InpaintPipeline": {
        "duration": 1.0,
        "audio": SOUND,
        "mask_start_seconds": 0.25,
        "mask_end_seconds": 0.75,
    },
    # Several prompts a call need as many `lyrics`.
    "AceStepPipeline": {"audio_duration": 1.0, "guidance_scale": 7.0},
    "LongCatAudioDiTPipeline": {"audio_duration_s": 1.0, "guidance_scale": 4.0},
}

NOT_BUILT: dict[str, str] = {
    "OmniGenPipeline": "its processor needs torchvision, which the tests do without",
    "VisualClozeGenerationPipeline": "it takes a task, a content and a grid of pictures, and no `prompt`",
    "VisualClozePipeline": "two pipelines one after the other, without a `prompt`",
}
