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

"""Configuration of Flow-GRPO, shared by every trainer."""

import copy
import dataclasses
import itertools
import json
import math
import os
from dataclasses import dataclass, field

import torch
from trl.trainer.base_config import _BaseConfig

from ..credit import AGGREGATIONS
from ..objective import KL_TYPES, OBJECTIVES, STEP_WEIGHTINGS
from ..policy.attention import check_attention_backend
from ..rollout import DYNAMICS
from .batch_size import parse_batch_size


def _check_choice(name: str, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, choices))}.")


def _check_fraction(name: str, value: float):
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: expected a number above 0, at most 1.")


@dataclass
class FlowGRPOConfig(_BaseConfig):
    r"""
    Configuration class for the [`FlowGRPOTrainer`], and the part that every trainer of this library shares.

    Defaults are those of Flow-GRPO for Stable Diffusion 3.5 Medium. Fields of [`~transformers.TrainingArguments`] and
    names of [`~trl.GRPOConfig`] keep their meaning. `per_device_train_batch_size` counts *prompt groups* per device
    and micro-step: one group is one prompt with `num_generations` samples.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict` or `None`, *optional*):
            Keyword arguments of `DiffusionPipeline.from_pretrained`, used when the model is given by name.

        > Parameters that control sampling

        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps T of a training rollout.
        num_eval_inference_steps (`int`, *optional*):
            Number of deterministic denoising steps at evaluation. Defaults to that of the pipeline's family: 40 for Stable
            Diffusion 3, 28 for FLUX.1 ...
        guidance_scale (`float`, *optional*):
            Guidance, in rollouts, training and evaluation, as the pipeline means it. Defaults to that of the pipeline's
            family: 4.5 for Stable Diffusion 3, 3.5 (distilled) for FLUX.1 ...
        eval_guidance_scale (`float`, *optional*):
            Guidance in evaluation, where it differs: Flow-GRPO's authors advise to train without guidance and to use it
            afterwards.
        sigmas (`list[float]`, *optional*):
            Grid of a training rollout: T descending flow times, as the pipeline's `sigmas` argument takes them, before its
            scheduler's shift and without the final 0. Defaults to the pipeline's.
        height (`int`, *optional*):
            Height of the pictures in pixels. Defaults to the family's, else the pipeline's.
        width (`int`, *optional*):
            Width of the pictures in pixels. Defaults to the family's, else the pipeline's.
        num_frames (`int`, *optional*):
            Number of frames of the videos. Defaults to the family's, else the pipeline's.
        max_sequence_length (`int`, *optional*):
            Number of text tokens. Defaults to the pipeline's.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional branch when guidance is on. Defaults to the family's, mostly none, which is not the
            same as `""` to all pipelines.
        generation_kwargs (`dict`, *optional*):
            More arguments of the pipeline's call, such as `{"true_cfg_scale": 4.0}`.
        attention_backend (`str`, *optional*):
            Kernel of the denoiser's attention, in rollouts, training and evaluation, by the name of diffusers: `"flash"`,
            `"_native_cudnn"`, `"flex"` ... Defaults to what torch chooses.
        sde_type (`str`, *optional*, defaults to `"flow"`):
            Dynamics of the stochastic steps: `"flow"`, `"dance"` or `"cps"`.
        noise_level (`float`, `list[float]` or `str`, *optional*, defaults to `0.7`):
            Noise level of the stochastic steps: one number, one number per step, or the path of a calibration file.
        sde_steps (`list[int]`, *optional*):
            Grid indices (0 is the first step, from pure noise) that are stochastic and trained. Defaults to the
            method's: all but the last, or for G2RPO the first half.
        same_initial_noise (`bool`, *optional*, defaults to `False`):
            Whether the samples of a group start from the same noise.
        num_generations (`int`, *optional*, defaults to `24`):
            Number of samples per prompt, G.
        rollout_batch_size (`int` or `"auto"`, *optional*, defaults to `32`):
            Largest number of rows of one forward, decode or evaluation batch in rollouts; `"auto"` finds what fits. It bounds
            memory only, and falls where memory does not suffice.
        precompute_prompts (`bool`, *optional*, defaults to `False`):
            Whether to encode all prompts (and the pictures that they start from) before training, to keep the embeddings
            in the cache of datasets (megabytes per prompt), and to move the encoders off the device. While they are there,
            the denoisers wait on the CPU. A later run with the same pipeline, settings and prompts finds the embeddings.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Whether the text and picture encoders wait on the CPU and come to the device for prompts that are new. With
            `precompute_prompts` they do so anyway.
        offload_vae (`bool`, *optional*, defaults to `False`):
            Whether the VAE waits on the CPU and comes to the device to decode.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes one picture of a batch at a time. Pictures are the same, to rounding.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes a picture that is larger than its tile in overlapping tiles. Pictures differ a little.
        offload_trajectories (`bool`, *optional*, defaults to `False`):
            Whether the latents of a rollout, and the velocities that are kept of the sampling policy, wait on the CPU, from
            where training takes those of each batch. Nothing else changes.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. Defaults to 1 each.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"` normalises the weighted sum of the rewards, `"normalize_then_sum"` sums the
            advantages of each, `"gdpo"` normalises that sum again, over the batch.
        max_nan_fraction (`float`, *optional*, defaults to `0.1`):
            Largest fraction of a rollout's samples that may be left out because a reward function failed; above, the run
            stops. Samples to which a function does not apply (`None`) don't count.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Consent to run code of others: that of a reward function from the Hub or a directory, and on the command line
            that of the pipeline's repository.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Standard deviation that divides: of the `"group"`, of the `"batch"`, or `"none"`.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clamped to this absolute value.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of AdamW.
        full_finetuning (`bool`, *optional*, defaults to `False`):
            Trains all weights of the denoiser, in float32, instead of an adapter. Wants a much smaller learning rate.
        adapter_name_or_path (`str`, *optional*):
            Adapter to continue from, a Hub id or a directory in PEFT's or diffusers' format, with its own rank and layers.
            With `beta` above 0 the divergence is still that from the base model.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over each rollout.
        steps_per_generation (`int`, *optional*):
            Number of micro-steps that one rollout feeds. Defaults to `gradient_accumulation_steps`: one on-policy
            update. Twice as many give Flow-GRPO's two updates, the second one off-policy.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the ratio. Log-probabilities are averaged over the latent's elements, hence the small value.
        epsilon_high (`float`, *optional*):
            Upper clip range. Defaults to `epsilon`.
        beta (`float`, *optional*, defaults to `0.04`):
            Weight of the KL divergence from the base model. 0 saves the reference's evaluations.
        kl_type (`str`, *optional*, defaults to `"mean"`):
            `"mean"` is Flow-GRPO's divergence of the step means without the step size, `"gaussian"` the true one,
            `"velocity"` the squared distance of the velocities.
        objective (`str`, *optional*, defaults to `"clip"`):
            `"clip"` is PPO's clipped ratio, `"guard"` the same with GRPO-Guard's normalised ratio, `"dppo"` Flow-DPPO's
            unclipped ratio, masked where a step has moved too far.
        kl_mask_threshold (`float`, *optional*):
            With `objective="dppo"`, the divergence of a step from the policy that sampled at which moving further away no
            longer counts. Defaults to 1e-5.
        step_weighting (`str`, *optional*, defaults to `"none"`):
            `"noise"` weights the policy loss of each step in proportion to its noise, which evens out the steps'
            gradients; `"guard"` in inverse proportion to its size, which does that for `objective="guard"`. The KL term is
            not weighted.
        transition_batch_size (`int` or `"auto"`, *optional*, defaults to `8`):
            Largest number of rows of one training forward; `"auto"` finds what fits. It bounds memory only, and falls where
            memory does not suffice.
        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving average of the adapter that is evaluated and saved. `None` or 0 switches it off.
        ema_update_after (`int`, *optional*, defaults to `0`):
            Number of updates before averaging begins.

        > Parameters that control the logging

        num_logged_images (`int`, *optional*, defaults to `24`):
            Number of held-out pictures that each evaluation saves to `output_dir/samples`.
        log_images (`bool`, *optional*, defaults to `True`):
            Whether these pictures also go, as a grid and with their prompts and scores, to the trackers that `report_to`
            names: trackio, Weights & Biases and TensorBoard.
        num_printed_samples (`int`, *optional*, defaults to `0`):
            Number of samples of the newest rollout whose prompts, scores and advantages each log prints as a table: the
            best and the worst of each prompt, of the first process.
    """

    # Defaults of TrainingArguments that the papers set differently.
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Whether to drop dataset columns. Keep False: other columns reach the reward functions."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Number of updates between two logs."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate before training, when there is an evaluation dataset."}
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `DiffusionPipeline.from_pretrained`, when the model is a name."},
    )

    # Sampling
    num_inference_steps: int = field(
        default=10, metadata={"help": "Number of denoising steps T of a training rollout."}
    )
    num_eval_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of deterministic denoising steps at evaluation. Defaults to that of the pipeline's family: 40 "
            "for Stable Diffusion 3, 28 for FLUX.1 ..."
        },
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance, in rollouts, training and evaluation, as the pipeline means it. Defaults to that of the "
            "pipeline's family: 4.5 for Stable Diffusion 3, 3.5 (distilled) for FLUX.1 ..."
        },
    )
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance in evaluation. Defaults to `guidance_scale`."}
    )
    sigmas: list[float] | None = field(
        default=None,
        metadata={
            "help": "Grid of a training rollout: T descending flow times, as the pipeline's `sigmas` argument takes them, "
            "before its scheduler's shift and without the final 0. Defaults to the pipeline's."
        },
    )
    height: int | None = field(
        default=None,
        metadata={"help": "Height of the pictures in pixels. Defaults to the family's, else the pipeline's."},
    )
    width: int | None = field(
        default=None,
        metadata={"help": "Width of the pictures in pixels. Defaults to the family's, else the pipeline's."},
    )
    num_frames: int | None = field(
        default=None,
        metadata={"help": "Number of frames of the videos. Defaults to the family's, else the pipeline's."},
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Number of text tokens. Defaults to the pipeline's."}
    )
    negative_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of the unconditional branch when guidance is on. Defaults to the family's, mostly none, which "
            'is not the same as "" to all pipelines.'
        },
    )
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "More arguments of the pipeline's call, as JSON, such as '{\"true_cfg_scale\": 4.0}'."},
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Kernel of the denoiser's attention, in rollouts, training and evaluation, by the name of diffusers: "
            "`flash`, `_native_cudnn`, `flex` ... Defaults to what torch chooses."
        },
    )
    sde_type: str = field(
        default="flow",
        metadata={"help": "Dynamics of the stochastic steps.", "choices": list(DYNAMICS)},
    )
    noise_level: list[str] = field(
        default_factory=lambda: 0.7,
        metadata={
            "help": "Noise level of the stochastic steps: one number, one number per step, or the path of a "
            "calibration file."
        },
    )
    sde_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Grid indices (0 is the first step, from pure noise) that are stochastic and trained. Defaults to "
            "the method's: all but the last, or for G2RPO the first half."
        },
    )
    same_initial_noise: bool = field(
        default=False, metadata={"help": "Whether the samples of a group start from the same noise."}
    )
    num_generations: int = field(default=24, metadata={"help": "Number of samples per prompt, G."})
    rollout_batch_size: str = field(
        default=32,
        metadata={
            "help": "Largest number of rows of one forward, decode or evaluation batch in rollouts; `auto` finds what fits. "
            "It bounds memory only, and falls where memory does not suffice."
        },
    )
    precompute_prompts: bool = field(
        default=False,
        metadata={
            "help": "Encode all prompts before training, keep the embeddings on disk (megabytes per prompt), and move the "
            "encoders off the device. While they are there, the denoisers wait on the CPU."
        },
    )
    offload_encoders: bool = field(
        default=False,
        metadata={
            "help": "Whether the text and picture encoders wait on the CPU and come to the device for prompts that are new. "
            "With `precompute_prompts` they do so anyway."
        },
    )
    offload_vae: bool = field(
        default=False,
        metadata={"help": "Whether the VAE waits on the CPU and comes to the device to decode."},
    )
    vae_slicing: bool = field(
        default=False,
        metadata={
            "help": "Whether the VAE decodes one picture of a batch at a time. Pictures are the same, to rounding."
        },
    )
    vae_tiling: bool = field(
        default=False,
        metadata={
            "help": "Whether the VAE decodes a picture that is larger than its tile in overlapping tiles. Pictures differ a "
            "little."
        },
    )
    offload_trajectories: bool = field(
        default=False,
        metadata={
            "help": "Whether the latents of a rollout, and the velocities that are kept of the sampling policy, wait on the CPU, "
            "from where training takes those of each batch. Nothing else changes."
        },
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. Defaults to 1 each."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Normalise the weighted sum of the rewards, or sum the advantages of each, or (`gdpo`) normalise that "
            "sum again over the batch.",
            "choices": list(AGGREGATIONS),
        },
    )
    max_nan_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Largest fraction of a rollout's samples that may be left out because a reward function failed; above, "
            "the run stops."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Consent to run code of others: that of a reward function from the Hub or a directory, and that of the "
            "pipeline's repository."
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose standard deviation divides.", "choices": ["group", "batch", "none"]},
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to this absolute value."})

    # Training
    full_finetuning: bool = field(
        default=False,
        metadata={
            "help": "Train all weights of the denoiser, in float32, instead of an adapter. Wants a much smaller learning "
            "rate."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to continue from, a Hub id or a directory in PEFT's or diffusers' format, with its own rank "
            "and layers."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Number of passes over each rollout."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Number of micro-steps that one rollout feeds. Defaults to `gradient_accumulation_steps`: one "
            "on-policy update. Twice as many give Flow-GRPO's two updates, the second one off-policy."
        },
    )
    epsilon: float = field(
        default=1e-4,
        metadata={
            "help": "Clip range of the ratio. Log-probabilities are averaged over the latent's elements, hence the "
            "small value."
        },
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Defaults to `epsilon`."})
    beta: float = field(
        default=0.04,
        metadata={"help": "Weight of the KL divergence from the base model. 0 saves the reference's evaluations."},
    )
    kl_type: str = field(
        default="mean",
        metadata={
            "help": "`mean` is Flow-GRPO's divergence of the step means without the step size, `gaussian` the true "
            "one, `velocity` the squared distance of the velocities.",
            "choices": list(KL_TYPES),
        },
    )
    objective: str = field(
        default="clip",
        metadata={
            "help": "`clip` is PPO's clipped ratio, `guard` the same with GRPO-Guard's normalised ratio, `dppo` "
            "Flow-DPPO's unclipped ratio, masked where a step has moved too far.",
            "choices": list(OBJECTIVES),
        },
    )
    kl_mask_threshold: float | None = field(
        default=None,
        metadata={
            "help": "With `objective=dppo`, the divergence of a step from the policy that sampled at which moving further "
            "away no longer counts. Defaults to 1e-5."
        },
    )
    step_weighting: str = field(
        default="none",
        metadata={
            "help": "`noise` weights the policy loss of each step in proportion to its noise, which evens out the "
            "steps' gradients; `guard` in inverse proportion to its size, which does that for `objective=guard`. The KL "
            "term is not weighted.",
            "choices": list(STEP_WEIGHTINGS),
        },
    )
    transition_batch_size: str = field(
        default=8,
        metadata={
            "help": "Largest number of rows of one training forward; `auto` finds what fits. It bounds memory only, and falls "
            "where memory does not suffice."
        },
    )
    ema_decay: float | None = field(
        default=0.9,
        metadata={
            "help": "Decay of the moving average of the adapter that is evaluated and saved. 0 switches it off."
        },
    )
    ema_update_after: int = field(default=0, metadata={"help": "Number of updates before averaging begins."})

    # Logging
    num_logged_images: int = field(
        default=24,
        metadata={"help": "Number of held-out pictures that each evaluation saves to `output_dir/samples`."},
    )
    log_images: bool = field(
        default=True,
        metadata={
            "help": "Whether these pictures also go, as a grid and with their prompts and scores, to the trackers that "
            "`report_to` names: trackio, Weights & Biases and TensorBoard."
        },
    )
    num_printed_samples: int = field(
        default=0,
        metadata={
            "help": "Number of samples of the newest rollout whose prompts, scores and advantages each log prints as a "
            "table: the best and the worst of each prompt, of the first process."
        },
    )

    def __post_init__(self):
        self.bf16_by_default = self.bf16 is None
        if self.bf16 is None and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            # TRL turns bfloat16 on by default. On a CPU it is slower than float32 and costs accuracy for nothing.
            self.bf16 = False
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self.noise_level = _parse_noise_level(self.noise_level)
        self.validate()

    def validate(self):
        """Raises `ValueError` for settings that cannot work, before any work is spent."""
        _check_choice("sde_type", self.sde_type, DYNAMICS)
        if self.attention_backend is not None:
            check_attention_backend(self.attention_backend)
        _check_choice("kl_type", self.kl_type, KL_TYPES)
        _check_choice("step_weighting", self.step_weighting, STEP_WEIGHTINGS)
        _check_choice("objective", self.objective, OBJECTIVES)
        if self.objective == "dppo":
            # Of a FlowGRPOConfig that another method was given, its own default is no wish either.
            defaults = {kind.__dataclass_fields__["epsilon"].default for kind in (type(self), FlowGRPOConfig)}
            if self.epsilon not in defaults or self.epsilon_high is not None:
                raise ValueError(
                    f"epsilon={self.epsilon}, epsilon_high={self.epsilon_high}: objective='dppo' clips no ratio. Leave them "
                    "unset, and set kl_mask_threshold."
                )
            self.kl_mask_threshold = 1e-5 if self.kl_mask_threshold is None else self.kl_mask_threshold
            if self.kl_mask_threshold <= 0:
                raise ValueError(f"kl_mask_threshold={self.kl_mask_threshold}: expected a positive number.")
        elif self.kl_mask_threshold is not None:
            raise ValueError(
                f"kl_mask_threshold={self.kl_mask_threshold} has no effect with objective={self.objective!r}: it belongs "
                "to objective='dppo'."
            )
        _check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        _check_choice("multi_objective_aggregation", self.multi_objective_aggregation, AGGREGATIONS)
        if not 0 <= self.max_nan_fraction <= 1:
            raise ValueError(f"max_nan_fraction={self.max_nan_fraction}: expected a fraction, 0 to 1.")
        if isinstance(self.generation_kwargs, str):
            try:
                self.generation_kwargs = json.loads(self.generation_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"generation_kwargs={self.generation_kwargs!r} is no JSON: {error}.") from error
        if self.generation_kwargs is not None and not isinstance(self.generation_kwargs, dict):
            raise ValueError(f"generation_kwargs={self.generation_kwargs!r}: expected names and values.")
        if self.full_finetuning and self.adapter_name_or_path is not None:
            raise ValueError(
                f"adapter_name_or_path={self.adapter_name_or_path!r} continues an adapter, and full_finetuning=True trains "
                "none. Drop one of them."
            )
        if self.sigmas is not None:
            self.sigmas = [float(sigma) for sigma in self.sigmas]
            if len(self.sigmas) != self.num_inference_steps or not all(
                1 >= a > b > 0 for a, b in itertools.pairwise(self.sigmas)
            ):
                raise ValueError(
                    f"sigmas={self.sigmas}: expected num_inference_steps={self.num_inference_steps} numbers that descend "
                    "from at most 1 and end above 0."
                )
        if self.offload_encoders and self.precompute_prompts:
            raise ValueError(
                "offload_encoders=True has no effect with precompute_prompts=True, which moves the encoders off the device, "
                "too. Drop one of them."
            )
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: a group needs at least 2 samples to have an advantage."
            )
        for name in (
            "num_inference_steps",
            "num_eval_inference_steps",
            "num_iterations",
            "steps_per_generation",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("rollout_batch_size", "transition_batch_size"):
            setattr(self, name, parse_batch_size(name, getattr(self, name)))
        for name in ("beta", "epsilon", "num_logged_images", "num_printed_samples", "ema_update_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip={self.advantage_clip}: expected a positive number.")
        if self.ema_update_after and not self.ema_decay:
            raise ValueError(f"ema_update_after={self.ema_update_after} has no effect without ema_decay.")
        if self.ema_decay and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number between 0 and 1.")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation}: expected a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that a rollout feeds whole updates."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would change the number of prompt groups of an update. Set rollout_batch_size and "
                "transition_batch_size to 'auto' instead: they bound memory and change nothing else."
            )
        for name in ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect: gradients are averaged once per update, after all backward "
                    "passes, and a weight without one on some processes counts as 0 there. Leave it out."
                )
        if self.sde_steps is not None:
            if not self.sde_steps or len(set(self.sde_steps)) < len(self.sde_steps):
                raise ValueError(f"sde_steps={self.sde_steps}: expected at least one index, each once.")
            wrong = [step for step in self.sde_steps if not 0 <= step < self.num_inference_steps]
            if wrong:
                raise ValueError(
                    f"sde_steps={self.sde_steps}: {wrong} not among the steps 0 to {self.num_inference_steps - 1} of "
                    f"num_inference_steps={self.num_inference_steps}."
                )
        if isinstance(self.noise_level, str):
            if not os.path.isfile(self.noise_level):
                raise ValueError(
                    f"noise_level={self.noise_level!r}: neither a number nor an existing calibration file. "
                    "`trl-flow calibrate` writes one."
                )
        else:
            levels = self.noise_level if isinstance(self.noise_level, list) else [self.noise_level]
            if isinstance(self.noise_level, list) and len(levels) != self.num_inference_steps:
                raise ValueError(
                    f"noise_level has {len(levels)} values: expected one number, or one per step "
                    f"(num_inference_steps={self.num_inference_steps})."
                )
            if not all(math.isfinite(level) and level >= 0 for level in levels):
                raise ValueError(f"noise_level={self.noise_level}: expected numbers of 0 or more.")

    def _is_default(self, name: str) -> bool:
        return getattr(self, name) == self.__dataclass_fields__[name].default

    @classmethod
    def from_config(cls, config: "FlowGRPOConfig") -> "FlowGRPOConfig":
        """
        `config` as a configuration of this class: its values, and this class's defaults for the fields it lacks.

        A configuration of another method is refused: its own fields would be ignored in silence.
        """
        if type(config) is cls or (cls is not FlowGRPOConfig and isinstance(config, cls)):
            return config
        if type(config) is not FlowGRPOConfig:
            raise ValueError(f"args is a {type(config).__name__}: expected a {cls.__name__} or a FlowGRPOConfig.")
        # A copy without __init__: TrainingArguments' derived state (devices, distributed set-up) is kept as it is.
        converted = copy.copy(config)
        converted.__class__ = cls
        own = {f.name for f in dataclasses.fields(config)}
        for f in dataclasses.fields(cls):
            if f.name not in own:
                setattr(converted, f.name, f.default if f.default is not dataclasses.MISSING else f.default_factory())
        converted.validate()
        return converted


def _parse_noise_level(value) -> float | list[float] | str:
    """From what YAML, the command line or Python gave to a number, a list of numbers or a path."""
    if isinstance(value, (list, tuple)):
        if len(value) == 1:
            return _parse_noise_level(value[0])
        try:
            return [float(level) for level in value]
        except (TypeError, ValueError):
            raise ValueError(f"noise_level={value!r}: expected numbers.") from None
    if isinstance(value, str):
        try:
            return _parse_noise_level(json.loads(value))
        except json.JSONDecodeError:
            return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"noise_level={value!r}: expected a number, a list of numbers or a path.")
    return float(value)


def with_default(config_class: type, name: str, value):
    """The field `name` of `config_class`, help and choices and all, with another default."""
    inherited = config_class.__dataclass_fields__[name]
    if inherited.default is dataclasses.MISSING:
        return field(default_factory=lambda: value, metadata=inherited.metadata)
    return field(default=value, metadata=inherited.metadata)
