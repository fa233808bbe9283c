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

"""The pipeline is the policy: the velocity that is trained is the one that the user's own pipeline computes."""

import copy
import dataclasses
import functools
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers.utils import logging

from .arguments import resolve_arguments
from .conditioning import LATENTS, Answers, Condition, find_layout, image_key, make_condition, recording
from .diffusion import DDIMIdleScheduler, DDIMQueryScheduler, check_scheduler
from .embeddings import StoredConditions, model_fingerprint, settings_fingerprint
from .encoders import Hosts, Visitors, before_running, compute_beside, encoders, keep_dtype, remember_device
from .families import find_family
from .schedulers import check_flow_scheduler, idle_scheduler, is_flow, query_scheduler


logger = logging.get_logger(__name__)


# Most graphs of one kind of block, see `FlowPolicy.compile`. torch's default, 8, is too few, and beyond it blocks run as if
# they were not compiled.
RECOMPILE_LIMIT = 64


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The layers that a denoiser repeats, as diffusers names them for compilation, or else for sharding."""
    kinds = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ValueError(
            f"{type(denoiser).__name__} cannot be compiled: diffusers does not say which of its blocks repeat. Set "
            "torch_compile=False."
        )
    return blocks


class PolicyConfig(dict):
    """What `transformers.Trainer`, its loggers and its callbacks expect of `model.config`."""

    model_type = "flow-policy"
    _name_or_path = ""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return str(dict(self))


class FlowPolicy(nn.Module):
    """
    A diffusers pipeline as a policy over latents.

    `forward` makes one single-step call of the pipeline's own `__call__`, with a scheduler that keeps the model output
    after guidance. Nothing of a model family (guidance, packing, position ids, signs, timesteps) is written again
    here, so what is trained equals what the pipeline computes at inference. What the pipeline computes from a prompt
    and a picture before it denoises is kept in memory (see [`trl_flow.policy.conditioning`]), or read from where
    [`encode_prompts`] has written it.

    Diffusion pipelines (those whose scheduler is no flow-matching one: Stable Diffusion 1, 2 and XL ...) are flow models
    in other coordinates, sampled by DDIM: see [`trl_flow.policy.diffusion`]. Latents, sigmas and velocities are in flow
    coordinates here and for every caller.

    The denoisers are the only registered child modules: DDP and FSDP wrap the policy. The text encoders and the VAE are
    frozen and stay in the pipeline. The pipeline that is passed in keeps its own scheduler; LoRA layers are injected
    into its denoisers in place.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The generator to align.
        peft_config ([`~peft.PeftConfig`], *optional*): The adapter, or one for each denoiser by its name in the pipeline;
            a denoiser without one is not trained. What it leaves open, and the default, are the family's: LoRA on the
            layers, of the rank and scale of its record.
        height, width (`int`, *optional*): In pixels. Default: the family's, else the pipeline's.
        num_frames (`int`, *optional*): Of videos. Default: the family's, else the pipeline's.
        guidance_scale (`float`, *optional*): As the pipeline means it: classifier-free, or distilled into the model.
            Default: the family's.
        negative_prompt (`str`, *optional*): Used when guidance is on. Default: the family's, mostly none.
        max_sequence_length (`int`, *optional*): Text tokens. Default: the pipeline's. Not for pipelines that have no
            such argument.
        generation_kwargs (`dict`, *optional*): More arguments of the pipeline's call.
        full_finetuning (`bool`, *optional*, defaults to `False`): Trains all weights of the denoisers, in float32,
            instead of an adapter.
        cache_size (`int`, *optional*, defaults to `1024`): Most prompts whose conditioning is kept.
        cache_gib (`float`, *optional*, defaults to `2.0`): Most memory that it may take, in GiB.
        device (`torch.device` or `str`, *optional*): Where it computes. Default: where the denoisers are. From elsewhere,
            they come there for the first velocity, or as soon as the encoders have left: see
            [`FlowPolicy.offload_encoders`].

    Raises:
        ValueError: If the pipeline cannot be trained, refuses the size, has no argument of a name that was given, or
            has a scheduler that neither Euler steps nor DDIM can stand in for.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        peft_config: PeftConfig | dict[str, PeftConfig] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        generation_kwargs: dict | None = None,
        full_finetuning: bool = False,
        cache_size: int = 1024,
        cache_gib: float = 2.0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.family = family = find_family(pipeline)
        self.pipeline = pipeline
        self.negative_prompt = family.negative_prompt if negative_prompt is None else negative_prompt
        self.guidance_scale = family.guidance_scale if guidance_scale is None else guidance_scale
        self.cache_size, self.cache_bytes = cache_size, cache_gib * 2**30
        self._cache: OrderedDict[tuple, Condition] = OrderedDict()
        self._blanks: dict[tuple[float, torch.device], Condition] = {}
        self._stored = StoredConditions()
        self._model_fingerprint: str | None = None
        self.encoders = Visitors(encoders(pipeline))
        vae = getattr(pipeline, "vae", None)
        self.autoencoder = Visitors({"vae": vae} if isinstance(vae, nn.Module) else {})
        self._layouts: dict[tuple[float, bool], tuple[dict, bool]] = {}
        # `__call__` without `torch.no_grad`, so that gradients reach the denoiser.
        self._call = inspect.unwrap(type(pipeline).__call__)
        named = {
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "max_sequence_length": max_sequence_length,
        }
        # None is a wish where it is written among the call's own arguments, and none where a setting is left out.
        given = {name: value for name, value in named.items() if value is not None}
        self.call_arguments = resolve_arguments(
            pipeline, family, given | (generation_kwargs or {}), self.negative_prompt
        )

        self.is_flow = is_flow(pipeline.scheduler) and not family.diffusion
        if self.is_flow:
            check_flow_scheduler(pipeline.scheduler)
            query, idle = query_scheduler(pipeline.scheduler), idle_scheduler(pipeline.scheduler)
        else:
            check_scheduler(pipeline.scheduler)
            query = DDIMQueryScheduler.from_config(pipeline.scheduler.config)
            idle = DDIMIdleScheduler.from_config(pipeline.scheduler.config)

        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.components = [name for name in family.components if getattr(pipeline, name, None) is not None]
        self.hosts = Hosts([getattr(pipeline, name) for name in self.components], device)
        if full_finetuning and peft_config:
            raise ValueError(
                "full_finetuning=True trains all weights: peft_config would have no effect. Drop one of them."
            )
        self.full_finetuning = full_finetuning
        if isinstance(peft_config, dict):
            self.components = [name for name in self.components if name in peft_config]
        else:
            peft_config = dict.fromkeys(self.components, peft_config)
        self.denoisers = nn.ModuleDict({name: self._trainable(name, peft_config[name]) for name in self.components})
        self.gradient_scale = 1.0
        for module in self.denoisers.modules():
            if hasattr(module, "moe_infer"):
                # HiDream's experts compute the same in both modes, but in eval mode without a gradient.
                module.training = True
        # Copies of the base weights, for the divergence from them; made when first asked for, and registered nowhere.
        self._references: dict[str, nn.Module] = {}
        # Of numbers the largest among the processes, where all of them must call their denoisers equally often.
        self.most_calls: Callable[[list[int]], list[int]] | None = None

        # Shallow copies: the same components and settings, each with a scheduler of its own.
        self._encoder = self._copy(idle)
        self._idle, self._query = self._copy(idle), self._copy(query)
        # Flow pipelines cast what they are given; diffusion pipelines scale it first.
        self._idle_answers = Answers(self._idle, cast_latents=True)
        self._query_answers = Answers(self._query, cast_latents=self.is_flow)
        self._set_guidance(self.guidance_scale)
        self.config = PolicyConfig(pipeline=type(pipeline).__name__, **self.call_arguments)
        self.config._name_or_path = pipeline.config.get("_name_or_path") or ""
        try:
            self.latent_shape = self.blank().latent_shape
        except Exception:  # what comes of a missing picture differs from pipeline to pipeline
            if not (family.inferred and family.image == "optional"):
                raise
            # A picture that the signature calls optional and the pipeline cannot do without.
            self.family = dataclasses.replace(family, image="required")
            self.latent_shape = self.blank().latent_shape
        # Not by their `dtype`, which of quantised weights may be that of the adapter.
        if not full_finetuning and any(p.dtype == torch.float16 for p in self.denoisers.parameters()):
            self._scale_gradients()

    def _scale_gradients(self):
        """
        Multiplies gradients on their way through float16 weights, and divides those of the adapter by the same. A loss is
        a mean over the latent's elements: of each, the gradient is below the smallest number of float16. A power of two,
        which rounds nothing.
        """
        self.gradient_scale = scale = 2.0 ** (10 + round(math.log2(math.prod(self.latent_shape))))
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / scale)

    def _trainable(self, component: str, peft_config: PeftConfig | None) -> nn.Module:
        """The denoiser of one component with what is trained of it, in eval mode."""
        denoiser = getattr(self.pipeline, component)
        if self.full_finetuning:
            # Adam's updates are lost in the rounding of half precision.
            return denoiser.float().requires_grad_(True).eval()
        if peft_config is None:
            peft_config = LoraConfig(
                r=self.family.lora_r, lora_alpha=self.family.lora_alpha, init_lora_weights="gaussian"
            )
        peft_config = copy.deepcopy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self.family.lora_target_modules)
        dtype = denoiser.dtype
        adapted = get_peft_model(denoiser, peft_config).eval()
        if denoiser.dtype != dtype:
            keep_dtype(denoiser, dtype)
        return adapted

    def _copy(self, scheduler) -> DiffusionPipeline:
        copied = copy.copy(self.pipeline)
        copied.scheduler = scheduler
        copied.set_progress_bar_config(disable=True)
        # A picture that a safety checker has blanked would be scored as what the denoiser drew. It is off in
        # training only: the pipeline that was passed in, and whatever loads the adapter, keeps its own.
        if "requires_safety_checker" in self.pipeline.config:
            copied.safety_checker = None
        remember_device(copied, self.components[0], self.hosts)
        return copied

    def _set_guidance(self, guidance_scale: float):
        self.guidance_scale = guidance_scale
        if self.family.guidance == "guider":
            for pipeline in (self._encoder, self._idle, self._query):
                pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
        elif self.family.guidance is not None:
            self.call_arguments = {**self.call_arguments, self.family.guidance: guidance_scale}

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that accelerate's FSDP shards one by one: the denoisers' own, of those that they have."""
        classes = {type(module).__name__ for module in self.denoisers.modules()}
        named = [
            name
            for component in self.components
            for name in getattr(self.pipeline, component)._no_split_modules
            or getattr(self.pipeline, component)._repeated_blocks
            or ()
        ]
        return [name for name in dict.fromkeys(named) if name in classes]

    @property
    def device(self) -> torch.device:
        """Where it computes: also while the denoisers make room for the encoders."""
        return self.hosts.device

    def train(self, mode: bool = True):
        # The denoisers stay in eval mode: the ratio of two policies with different dropout masks is no ratio.
        self.training = mode
        return self

    def forward(self, latents: torch.Tensor, sigma: float, conditioning: list[Condition]) -> torch.Tensor:
        """
        Velocity eps - x0, after guidance.

        Args:
            latents (`torch.Tensor` of shape `(n, *latent)`): x at `sigma`.
            sigma (`float`): Flow time in (0, 1], one for all rows. For diffusion pipelines that of a training
                timestep, as all of [`FlowPolicy.sigmas`] but the end are.
            conditioning (`list[Condition]`): As [`FlowPolicy.conditioning`] returns it, n rows. Rows whose text or
                pictures have different lengths are evaluated in calls of their own.

        Returns:
            `torch.Tensor` of shape `(n, *latent)`, float32.

        Raises:
            ValueError: If `sigma` is not the flow time of a training timestep (diffusion pipelines), or the pipeline
                denoises anything but the latents that it was given.
        """
        if any(condition.guidance_scale != self.guidance_scale for condition in conditioning):
            raise ValueError("The conditioning was made with another guidance_scale: make it where it is used.")
        self.hosts.come()
        batches = self._batches(conditioning)
        calls = len(batches) if self.most_calls is None else self.most_calls([len(batches)])[0]
        if calls == 1:
            return self._velocity(latents, sigma, conditioning)
        # Row by row: indices would be copied to the device, which makes the host wait for it.
        velocities = {}
        for batch in batches:
            rows, part = torch.stack([latents[row] for row in batch]), [conditioning[row] for row in batch]
            velocities |= zip(batch, self._velocity(rows, sigma, part), strict=True)
        velocities = torch.stack([velocities[row] for row in range(len(latents))])
        for _ in range(calls - len(batches)):
            # Part of the result, so that the backward pass is that of the others, too.
            velocities = velocities + 0 * self._velocity(latents[:1], sigma, conditioning[:1])
        return velocities

    def _velocity(self, latents: torch.Tensor, sigma: float, conditioning: list[Condition]) -> torch.Tensor:
        scheduler = self._query.scheduler
        scheduler.sigma = sigma
        if not self.is_flow:
            scheduler.dtype = conditioning[0].latent_dtype
        self._ask(self._query, self._query_answers, latents, conditioning, num_inference_steps=1, output_type="latent")
        velocity, scheduler.velocity = scheduler.velocity, None
        if velocity is None or velocity.shape != latents.shape:
            raise ValueError(
                f"{type(self.pipeline).__name__} denoises "
                f"{'nothing' if velocity is None else f'latents of shape {tuple(velocity.shape)}'} where it was given "
                f"latents of shape {tuple(latents.shape)}: only part of them is the model's to choose."
            )
        velocity = velocity.float()
        if self.gradient_scale != 1 and velocity.requires_grad:
            velocity.register_hook(lambda gradient: gradient * self.gradient_scale)
        return velocity

    def _batches(self, conditioning: list[Condition]) -> list[list[int]]:
        """Rows that can share a call of the pipeline."""
        batches = defaultdict(list)
        for row, condition in enumerate(conditioning):
            batches[condition.signature if condition.batched else row].append(row)
        return list(batches.values())

    def encode(self, prompt: str, image: Image.Image | None = None) -> Condition:
        """What the pipeline makes of one prompt, and of the picture that it starts from. Kept for the next time."""
        return self.conditioning([prompt], [image])[0]

    def conditioning(self, prompts: list[str], images: list[Image.Image] | None = None) -> list[Condition]:
        """Conditioning of n prompts (and the pictures that they start from). Repeated ones are encoded once."""
        images = images or [None] * len(prompts)
        with self.encoders.visit(), self.autoencoder.visit():
            return [self._find_condition(*pair) for pair in zip(prompts, images, strict=True)]

    def blank(self) -> Condition:
        """The empty prompt, on a grey picture."""
        key = self.guidance_scale, self.device
        if key not in self._blanks:
            self._blanks[key] = self.encode("", self._grey if self.family.image == "required" else None)
        return self._blanks[key]

    def _find_condition(self, prompt: str, image: Image.Image | None) -> Condition:
        """A condition from memory, from disk, or, if it is nowhere, made."""
        image = image if self.family.image else None
        picture = image_key(image)
        key = prompt, picture, self.guidance_scale, self.device
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        condition = self._stored.find(self, prompt, image, picture) if self._stored else None
        self._cache[key] = condition = condition or self.encode_anew(prompt, image)
        while len(self._cache) > 1 and (
            len(self._cache) > self.cache_size
            or sum(kept.num_bytes for kept in self._cache.values()) > self.cache_bytes
        ):
            self._cache.popitem(last=False)
        return condition

    @torch.no_grad()
    def encode_anew(self, prompt: str, image: Image.Image | None = None) -> Condition:
        """The same as [`FlowPolicy.encode`], whether or not it was done before, and not kept."""
        if self.family.image == "required" and image is None:
            raise ValueError(
                f"{type(self.pipeline).__name__} starts from a picture: expected one beside the prompt {prompt!r}. Is "
                "there a column `image` in the dataset?"
            )
        with self.encoders.visit(), self.autoencoder.visit():
            answers = self._record([prompt], image)
            kind = self.guidance_scale, image is not None
            if kind not in self._layouts:
                self._layouts[kind] = self._find_layout(prompt, image, answers)
        layout, batched = self._layouts[kind]
        prepared = answers[LATENTS]
        latents, answers[LATENTS] = (
            (prepared, None) if isinstance(prepared, torch.Tensor) else (prepared[0], prepared[1:])
        )
        shape = tuple(latents.shape[1:])
        return make_condition(prompt, image, answers, shape, latents.dtype, layout, batched, self.guidance_scale)

    def fingerprint(self) -> str:
        """All that a condition depends on beside its prompt and its picture, as a short string."""
        if self._model_fingerprint is None:
            self._model_fingerprint = model_fingerprint(self.pipeline, self.family.components)
        return self._model_fingerprint + settings_fingerprint(self)

    def attach(self, conditions: Dataset):
        """Takes conditions from where [`encode_prompts`] has written them, and makes those alone that are not there."""
        self._stored.add(conditions)

    def offload_encoders(self, device: torch.device | str = "cpu", alone: bool = False):
        """
        Moves the text and picture encoders to another device. They come back for prompts that are new, and leave again.
        A call of the pipeline itself needs them back: `pipeline.to(device)`, or [`FlowPolicy.whole`].

        Args:
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where they wait.
            alone (`bool`, *optional*, defaults to `False`): Whether the denoisers wait there while the encoders are back.
                Nothing that takes them apart or copies them (DDP, FSDP, an optimizer's step) may come between.
        """
        self._offload(self.encoders, device)
        self.encoders.hosts = self.hosts if alone else None
        self.hosts.come()

    def offload_vae(self, device: torch.device | str = "cpu"):
        """
        Moves the VAE to another device. It comes back to decode, and to encode pictures that prompts start from, and leaves
        again. A call of the pipeline itself needs it back: `pipeline.to(device)`.
        """
        self._offload(self.autoencoder, device)

    def _offload(self, visitors: Visitors, device: torch.device | str):
        if visitors.home is None:
            latents = torch.zeros(1, *self.latent_shape, device=self.device)
            ask = functools.partial(self._ask, self._idle, self._idle_answers, latents, [self.blank()])
            visitors.spare(lambda: ask(output_type="latent"))
            for pipeline in (self._idle, self._query):
                compute_beside(pipeline, self.hosts)
        visitors.leave(device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """
        Context for a call of the pipeline itself. Encoders and VAE come at once, as many pipelines ask where they are before
        they run them; where there is no room for both, the denoisers follow when they are run.
        """
        with self.encoders.visit(), self.autoencoder.visit(), ExitStack() as stack:
            self.encoders.come(self.device)
            self.autoencoder.come(self.device)
            for denoiser in self.hosts.models if self.encoders.hosts is not None else ():
                stack.enter_context(before_running(denoiser, self.encoders.end))
            yield

    def divide_decoding(self, slicing: bool, tiling: bool):
        """
        Lets the VAE decode pictures one at a time (`slicing`), and each in overlapping tiles (`tiling`).

        Raises:
            ValueError: If the VAE cannot, or if it changes nothing.
        """
        vae, name = getattr(self.pipeline, "vae", None), type(self.pipeline).__name__
        for wanted, setting in ((slicing, "slicing"), (tiling, "tiling")):
            if wanted:
                try:
                    getattr(vae, f"enable_{setting}")()
                except (AttributeError, NotImplementedError) as error:
                    raise ValueError(
                        f"vae_{setting}=True: {type(vae).__name__}, which {name} decodes with, has no enable_{setting}(). "
                        "Leave it unset."
                    ) from error
        if slicing and self.num_frames is not None:
            raise ValueError(
                "vae_slicing=True has no effect on videos, which are decoded one at a time. Leave it unset."
            )
        if tiling and hasattr(vae, "tiled_decode"):
            calls, decode = [], vae.tiled_decode
            vae.tiled_decode = lambda *args, **kwargs: (calls.append(None), decode(*args, **kwargs))[1]
            try:
                height, width = self.decode(torch.zeros(1, *self.latent_shape, device=self.device)).shape[-2:]
            finally:
                del vae.tiled_decode
            if not calls:
                raise ValueError(
                    f"vae_tiling=True changes nothing at {height} x {width} pixels, no more than one tile of "
                    f"{type(vae).__name__}. Leave it unset."
                )

    def _record(self, prompts: list[str], image: Image.Image | None) -> dict:
        encoder = copy.copy(self._encoder)
        self.encoders.come(self.device)
        if self.family.image:
            self.autoencoder.come(self.device)
        with recording(encoder) as answers, self.encoders.memory.used():
            self._run(encoder, prompts, image, output_type="latent")
        if LATENTS not in answers:
            raise ValueError(
                f"{type(self.pipeline).__name__} prepares no latents by the name of `prepare_latents`: it cannot be told "
                "which ones to denoise."
            )
        return answers

    def _find_layout(self, prompt: str, image: Image.Image | None, one: dict) -> tuple[dict, bool]:
        """Where the rows of each output are, and whether the pipeline takes several prompts at once."""
        try:
            if not prompt:
                # Guided towards nothing and away from nothing: rows that trade places would not be seen.
                prompt = "a"
                one = self._record([prompt], image)
            two = self._record([prompt, prompt], image)
            layout = {name: find_layout(one[name], two[name]) for name in one}
        except Exception as error:  # whatever a pipeline raises that is not made for several prompts
            logger.warning(
                f"{type(self.pipeline).__name__} does not take two prompts at once, so rows are evaluated one by one: "
                f"{type(error).__name__}: {error}"
            )
            return dict.fromkeys(one), False
        layout[LATENTS] = layout[LATENTS][1:] if isinstance(layout[LATENTS], list) else None
        return layout, True

    @functools.cached_property
    def _grey(self) -> Image.Image:
        size = self.call_arguments.get("width", 512), self.call_arguments.get("height", 512)
        return Image.new("RGB", size, (128, 128, 128))

    def clean(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Clean latents, of any shape, from those at the end of the grid: the same for flow pipelines. The grid of a
        diffusion pipeline may end above 0, where it takes its latents for clean, in its own coordinates.
        """
        return latents * self._idle.scheduler.final_scale

    def decode(
        self, latents: torch.Tensor, batch_size: int | None = None, conditioning: list[Condition] | None = None
    ) -> torch.Tensor:
        """
        Pictures or videos of clean latents, by the pipeline's own decoding.

        Args:
            latents (`torch.Tensor` of shape `(n, *latent)`): At the end of the grid that [`FlowPolicy.sigmas`] gives.
            batch_size (`int`, *optional*): Largest number of latents decoded at once.
            conditioning (`list[Condition]`, *optional*): Of the rows: some pipelines put the picture that they started
                from back into the video.

        Returns:
            `torch.Tensor` of shape `(n, 3, height, width)`, for videos `(n, frames, 3, height, width)`, in [0, 1],
            float32, on the CPU.
        """
        return self.start_decoding(latents, batch_size, conditioning)()

    @torch.no_grad()
    def start_decoding(
        self, latents: torch.Tensor, batch_size: int | None = None, conditioning: list[Condition] | None = None
    ) -> Callable[[], torch.Tensor]:
        """[`FlowPolicy.decode`] in two parts: a GPU is told all that it has to do, and what is returned waits for it."""
        latents = self.clean(latents)
        conditioning = conditioning or [self.blank()] * len(latents)
        if "num_frames" in inspect.signature(self._call).parameters:
            batch_size = 1  # a video fills a decoder, and not all of them take several
        decoded = {}
        with self.autoencoder.visit():
            self.autoencoder.come(self.device)
            for batch in self._batches(conditioning):
                size = batch_size or len(batch)
                for rows in (batch[start : start + size] for start in range(0, len(batch), size)):
                    part = torch.stack([latents[row] for row in rows]), [conditioning[row] for row in rows]
                    pictures = self._ask(self._idle, self._idle_answers, *part, output_type="pt")
                    # By way of pinned memory, while the GPU goes on with the next batch.
                    decoded |= zip(rows, pictures.float().to("cpu", non_blocking=latents.is_cuda), strict=True)
        decoded = [decoded[row] for row in range(len(latents))]
        copied = torch.cuda.current_stream(latents.device).record_event() if latents.is_cuda else None

        def wait() -> torch.Tensor:
            if copied is not None:
                copied.synchronize()
            return torch.stack(decoded)

        return wait

    @functools.cached_property
    def _blank_output(self) -> torch.Tensor:
        return self.decode(torch.zeros(1, *self.latent_shape, device=self.device))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return tuple(self._blank_output.shape[-2:])

    @property
    def num_frames(self) -> int | None:
        """Number of frames of the videos; `None` where the pipeline makes pictures."""
        return self._blank_output.shape[1] if self._blank_output.ndim == 5 else None

    @torch.no_grad()
    def sigmas(self, num_inference_steps: int, sigmas: list[float] | None = None) -> torch.Tensor:
        """
        The descending grid of T + 1 flow times that the pipeline itself uses for T steps, float32, on the CPU.

        It ends at 0; for diffusion pipelines, it is that of DDIM's timesteps and ends where DDIM does, which is above
        0 when the scheduler has `set_alpha_to_one=False`.

        Args:
            num_inference_steps (`int`): T.
            sigmas (`list[float]`, *optional*): T flow times, as the pipeline's call takes them: before its scheduler's
                shift, without the final 0.
        """
        arguments = {"num_inference_steps": num_inference_steps}
        if sigmas is not None:
            if "sigmas" not in inspect.signature(self._call).parameters:
                raise ValueError(f"sigmas={sigmas}: {type(self.pipeline).__name__} takes no sigmas. Leave them unset.")
            if len(sigmas) != num_inference_steps:
                raise ValueError(
                    f"sigmas has {len(sigmas)} values: expected num_inference_steps={num_inference_steps}."
                )
            arguments["sigmas"] = sigmas
        latents = torch.zeros(1, *self.latent_shape, device=self.device)
        self._ask(self._idle, self._idle_answers, latents, [self.blank()], output_type="latent", **arguments)
        idle = self._idle.scheduler
        grid, end = idle.grid, idle.final_sigma
        if len(grid) != num_inference_steps + 1 or not (grid.diff() < 0).all() or grid[0] > 1 or grid[-1] != end:
            raise ValueError(
                f"The pipeline's sigma grid for {num_inference_steps} steps is {grid.tolist()}: expected "
                f"{num_inference_steps + 1} values that descend from at most 1 to {end}."
            )
        if self.is_flow:
            known = dict(zip(grid[:-1].tolist(), idle.grid_timesteps.tolist(), strict=True))
            self._query.scheduler.known_timesteps = {**self._query.scheduler.known_timesteps, **known}
        return grid

    def initial_scale(self, sigmas: torch.Tensor) -> float:
        """
        Factor that makes unit normal noise the latents at the start of a grid, as the stock pipeline starts from them.

        Args:
            sigmas (`torch.Tensor` of shape `(T + 1,)`): As [`FlowPolicy.sigmas`] returns them.

        Returns:
            `float`: 1 for flow pipelines; 1 / (alpha + s) at the first timestep for diffusion pipelines.
        """
        return self._idle.scheduler.initial_scale(sigmas[0].item())

    @property
    def sampler(self) -> str | None:
        """Class of the scheduler that samples as in training, where it may not be the checkpoint's own."""
        return None if self.is_flow else "DDIMScheduler"

    @contextmanager
    def guided(self, guidance_scale: float | None):
        """Context with another guidance scale; `None` changes nothing."""
        usual = self.guidance_scale
        if guidance_scale is not None:
            self._set_guidance(guidance_scale)
        try:
            yield
        finally:
            self._set_guidance(usual)

    @contextmanager
    def reference(self):
        """
        Context in which the policy is the frozen base model. An adapter is switched off; for full fine-tuning, copies of
        the denoisers take their place, which must have been made by [`FlowPolicy.keep_reference`] before training.
        """
        if self.full_finetuning and not self._references:
            raise ValueError("The base model is gone after full fine-tuning: call keep_reference() before training.")
        with ExitStack() as stack:
            for name, denoiser in self.denoisers.items():
                if self.full_finetuning:
                    setattr(self._query, name, self._references[name])
                    stack.callback(setattr, self._query, name, denoiser)
                else:
                    stack.enter_context(denoiser.disable_adapter())
            yield

    def keep_reference(self):
        """Keeps frozen copies of the denoisers for [`FlowPolicy.reference`], where no adapter can be switched off."""
        if self.full_finetuning:
            self._references = {
                name: copy.deepcopy(denoiser).requires_grad_(False) for name, denoiser in self.denoisers.items()
            }
            self.hosts.models += self._references.values()

    def compile(self, **kwargs):
        """
        Compiles the blocks that the denoisers repeat (diffusers' regional compilation), in place. The pipeline's code around
        them stays as it is. Call it when nothing more is injected into the denoisers.

        A graph is made of each kind of block, with and without a gradient, with and without the adapter; of each of these for
        the first number of rows, for any number, and for one row.

        Args:
            kwargs: Of [`torch.compile`].

        Raises:
            ValueError: If diffusers does not know the blocks of a denoiser.
        """
        for name in self.components:
            for denoiser in (getattr(self.pipeline, name), self._references.get(name)):
                if denoiser is not None:
                    for block in repeated_blocks(denoiser):
                        block.compile(recompile_limit=RECOMPILE_LIMIT, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recomputes the denoisers' activations in the backward pass. diffusers' checkpointing takes no options."""
        if gradient_checkpointing_kwargs:
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs}: diffusers models take no options for "
                "activation checkpointing. Leave it unset."
            )
        for name in self.components:
            getattr(self.pipeline, name).enable_gradient_checkpointing()
        self._check_gradient_checkpointing()

    @torch.compiler.set_stance("force_eager")  # graphs of one row would be compiled for it
    def _check_gradient_checkpointing(self):
        """
        diffusers calls a block in another way when it checkpoints it, and not always with all arguments: ChromaPipeline's
        (in 0.42) lose their attention mask. What is trained would not be what was sampled.
        """
        condition = self.blank()
        half = condition.latent_dtype != torch.float32
        latents = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        # As training does it: complete denoisers are float32, whatever the encoders are.
        autocast = torch.autocast(self.device.type, condition.latent_dtype, enabled=half and self.full_finetuning)
        for sigma in self.sigmas(2)[:-1].tolist():
            with autocast:
                with torch.no_grad():
                    expected = self(latents, sigma, [condition])
                try:
                    with torch.enable_grad():
                        error = (self(latents, sigma, [condition]).detach() - expected).std() / expected.std()
                except (TypeError, AttributeError) as failure:
                    error = f"fails: {failure}"
            if isinstance(error, str) or error > (1e-2 if half else 1e-4):
                for name in self.components:
                    getattr(self.pipeline, name).disable_gradient_checkpointing()
                raise ValueError(
                    f"gradient_checkpointing=True: {type(self.pipeline).__name__} computes another velocity when it "
                    f"checkpoints activations ({error if isinstance(error, str) else f'it is off by {error:.1%}'}), which is "
                    "an error of the installed diffusers. Set gradient_checkpointing=False."
                )

    activation_checkpointing_enable = gradient_checkpointing_enable

    def _ask(self, pipeline, answers: Answers, latents: torch.Tensor, conditioning: list[Condition], **arguments):
        """One call of a pipeline whose encoders are not run."""
        with answers.about(conditioning, latents):
            return self._run(
                pipeline, [condition.prompt for condition in conditioning], conditioning[0].image, **arguments
            )

    def _run(self, pipeline, prompts: list[str], image: Image.Image | None, **arguments):
        # Where nothing is denoised, two steps are the fewest of which every scheduler can make a grid.
        arguments = {"num_inference_steps": 2, **self.call_arguments, **arguments}
        if image is not None:
            arguments["image"] = image
        # One prompt as a text: some pipelines take no list.
        several = len(prompts) > 1
        if self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(prompts) if several else self.negative_prompt
        return self._call(
            pipeline,
            prompt=list(prompts) if several else prompts[0],
            # A generator of its own: asking for a shape must not move the global random state.
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
            **arguments,
        )[0]
