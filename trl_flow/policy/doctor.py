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

"""Whether a pipeline can be trained, found out by trying: the checks behind `trl-flow doctor`."""

import inspect
import math
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from ..rollout import log_prob, transition
from .conditioning import Condition
from .diffusion import flow_sigmas, flow_velocity, latent_scale
from .flow_policy import FlowPolicy
from .memory import ALLOWANCE, MemoryEstimator, MemorySettings, make_fit, setting_text
from .schedulers import become, stepped


# Largest replay error of a pipeline that is trained, relative to the velocity's standard deviation. In float32 the stock
# pipeline and the policy run the same operations on the same numbers. In half precision rows in another batch may meet
# another kernel, and some stock pipelines round their timesteps as they round their latents, which are float32 here.
REPLAY_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for rows in a batch against rows alone: what a model rounds it also amplifies, and a real dependence is of the
# size of the velocity itself.
ROW_BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.25}
# Probability ratios further from 1 than this cannot be told from a step of the optimizer.
RATIO_BOUND = 1e-2
PROMPTS = ("a red circle", "two blue square")
PACKAGE = Path(__file__).parents[1]


@dataclass
class Diagnosis:
    """
    What [`examine`] found. Errors are largest absolute differences; `None` where an earlier check failed.

    Attributes:
        pipeline (`str`): Class of the pipeline.
        family (`str` or `None`): Name of its record, or `"inferred"`.
        problem (`str` or `None`): Why it cannot be trained.
        warnings (`list[str]`): What costs time or accuracy, or asks for a setting.
        notes (`list[str]`): What looks like a fault and is none.
        media (`str`): What it makes: `"pictures"` or `"videos"`.
        image (`str` or `None`): Whether a picture beside the prompt is `"required"` or `"optional"`; `None` where it
            takes none.
        replay_error (`float`): Policy against model outputs of the stock pipeline's own run, at its own latents.
        picture_error (`float`): Pictures of a chain at noise level 0 against the stock pipeline's, in [0, 1].
        ratio_error (`float`): Probability ratio of transitions in training against the rollout, less 1.
        row_error (`float`): Rows in a batch of several prompts against each by itself.
        gradient_coverage (`float`): Share of the trained tensors whose gradient is not zero.
        encoder_calls (`int`): Runs of frozen encoders within one velocity evaluation.
        trained_parameters, total_parameters (`int`): Of the denoisers.
        memory (`dict[str, dict[str, float]]`): GiB of a run by phase and by what takes them, where they were asked for.
    """

    pipeline: str
    family: str | None = None
    problem: str | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    media: str | None = None
    image: str | None = None
    replay_error: float | None = None
    picture_error: float | None = None
    ratio_error: float | None = None
    row_error: float | None = None
    gradient_coverage: float | None = None
    encoder_calls: int | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.problem is None


class Untrainable(ValueError):
    """A check has failed; its message says which and why."""


@contextmanager
def _trying(what: str):
    """Says of an error what was tried, and where in diffusers it came from; our own errors speak for themselves."""
    try:
        yield
    except Untrainable:
        raise
    except Exception as error:  # whatever a pipeline raises that was not made for this
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        lines = str(error).strip().splitlines() or ["no message"]
        if isinstance(error, (ValueError, RuntimeError)) and files[-1].is_relative_to(PACKAGE):
            raise Untrainable(str(error).strip()) from error
        place = next((f" in diffusers' {file.name}" for file in reversed(files) if "diffusers" in file.parts), "")
        raise Untrainable(f"{what} failed{place}: {type(error).__name__}: {lines[0]}") from error


class _Spy:
    """Notes what the stock pipeline's steps are given. Schedulers of higher order take Euler steps, not theirs."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        sigma, sigma_next = (self.sigmas[len(self.noted) : len(self.noted) + 2].tolist() + [math.nan] * 2)[:2]
        self.noted.append((sigma, sample.clone(), model_output.clone()))
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        stepped_to = sample.float() + (sigma_next - sigma) * model_output.float()
        return stepped(stepped_to.to(sample.dtype), return_dict)


class _DiffusionSpy:
    """The same for DDIM, whose timesteps are its sigmas."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        self.noted.append((int(timestep), sample.clone(), model_output.clone()))
        return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)


def examine(
    pipeline: DiffusionPipeline,
    num_inference_steps: int = 4,
    image: Image.Image | None = None,
    memory: MemorySettings | None = None,
    limit: int | None = None,
    **settings,
) -> Diagnosis:
    """
    Try everything that training relies on.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline. Adapter layers are put into its denoisers.
        num_inference_steps (`int`, *optional*, defaults to 4): Steps of the stock run that is compared with.
        image (`PIL.Image.Image`, *optional*): For pipelines that start from one. Default: a grey one.
        memory ([`~trl_flow.policy.memory.MemorySettings`], *optional*): Of the run whose memory is estimated. Default: it
            is not.
        limit (`int`, *optional*): Bytes of memory that there are, for advice if the run takes more.
        settings: Of [`FlowPolicy`].

    Returns:
        [`Diagnosis`]: with a `problem` where a check failed.
    """
    diagnosis = Diagnosis(type(pipeline).__name__)
    try:
        with torch.random.fork_rng():
            _check_media(pipeline)
            with _trying("calling it with an empty prompt, which prepares everything and denoises nothing,"):
                policy = FlowPolicy(pipeline, **settings)
            examine_policy(policy, diagnosis, num_inference_steps, image)
            if memory is not None:
                condition = policy.encode(PROMPTS[0], (image or policy.blank().image) if policy.family.image else None)
                estimator = MemoryEstimator(policy, [condition], policy.sigmas(num_inference_steps))
                note_memory(diagnosis, estimator, memory, limit)
    except Untrainable as problem:
        diagnosis.problem = str(problem)
    return diagnosis


def note_memory(
    diagnosis: Diagnosis, estimator: MemoryEstimator, settings: MemorySettings, limit: int | None = None
) -> None:
    """
    Notes what a run will hold, and where that is more than there is, what would make it fit.

    Args:
        diagnosis ([`Diagnosis`]): Where it is noted.
        estimator ([`~trl_flow.policy.memory.MemoryEstimator`]): Of the pipeline.
        settings ([`~trl_flow.policy.memory.MemorySettings`]): Of the run.
        limit (`int`, *optional*): Bytes that there are.
    """
    try:
        found = estimator.estimate(settings)
    except Exception as error:  # whatever a model does that needs numbers, and not shapes alone
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        diagnosis.notes.append(f"its memory cannot be estimated: {type(error).__name__}: {reason}")
        return
    diagnosis.memory = {
        phase: {part: size / 2**30 for part, size in parts.items()} for phase, parts in found.phases.items()
    }
    if limit is None or found.peak + ALLOWANCE <= limit:
        return
    changes, smaller = make_fit(estimator, settings, limit - ALLOWANCE)
    names = [f"{name}: {setting_text(value)}" for name, value in changes.items()]
    needs = f"it needs about {(found.peak + ALLOWANCE) / 2**30:.3g} GiB of {limit / 2**30:.3g}"
    to = f"to {(smaller.peak + ALLOWANCE) / 2**30:.3g}"
    if smaller.peak + ALLOWANCE <= limit:
        diagnosis.warnings.append(f"{needs}: {', '.join(names)} {'bring' if len(names) > 1 else 'brings'} it {to}")
    else:
        diagnosis.warnings.append(
            f"{needs}, and "
            + (
                f"{', '.join(names)} {'bring' if len(names) > 1 else 'brings'} it only {to}"
                if names
                else "nothing here helps"
            )
            + ": take a smaller size (height, width, num_frames) or a larger GPU"
        )


def _check_media(pipeline: DiffusionPipeline):
    """Sound has a length in seconds and no height."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    sound = [name for name in parameters if name == "duration" or name.startswith("audio")]
    if sound and "height" not in parameters:
        raise Untrainable(
            f"{type(pipeline).__name__} makes sound (its call takes `{sound[0]}` and no `height`): only pipelines "
            "that make pictures or videos are trained"
        )


def examine_policy(
    policy: FlowPolicy,
    diagnosis: Diagnosis,
    num_inference_steps: int = 4,
    image: Image.Image | None = None,
) -> None:
    """
    [`examine`] for a policy that exists.

    Args:
        policy ([`FlowPolicy`]): The policy.
        diagnosis ([`Diagnosis`]): Where it notes what it finds.
        num_inference_steps, image (*optional*): As for [`examine`].

    Raises:
        Untrainable: If a check fails.
    """
    diagnosis.family = "inferred" if policy.family.inferred else policy.family.name
    diagnosis.trained_parameters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    diagnosis.total_parameters = sum(p.numel() for p in policy.parameters())
    diagnosis.image = policy.family.image
    image = (image or policy.blank().image) if policy.family.image else None
    with _awake_adapter(policy):
        with _trying(f"asking for its grid of {num_inference_steps} steps"):
            sigmas = policy.sigmas(num_inference_steps)
        with _trying("encoding the prompt"):
            conditions = policy.conditioning(PROMPTS, [image] * len(PROMPTS))
        with _trying("the stock pipeline's own call"):
            noted, pictures = _stock_run(policy, num_inference_steps, image)
        with _trying("evaluating the velocity at the stock pipeline's latents"):
            _compare_replay(policy, diagnosis, sigmas, conditions[0], noted)
        with _trying("denoising and decoding without noise"):
            _compare_pictures(policy, diagnosis, sigmas, conditions[0], noted, pictures)
        with _trying("evaluating rows of two prompts in one batch"):
            _compare_rows(policy, diagnosis, sigmas, conditions)
        with _trying("a forward and backward pass of training"):
            _compare_training(policy, diagnosis, sigmas, conditions[0])


@contextmanager
def _awake_adapter(policy: FlowPolicy):
    """LoRA begins as zero, which would hide it: for a while it is what training may make of it."""
    zero = [p for name, p in policy.named_parameters() if p.requires_grad and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()
        for parameter in policy.parameters():
            parameter.grad = None


def _stock_run(policy: FlowPolicy, num_inference_steps: int, image) -> tuple[list, torch.Tensor]:
    """The stock pipeline's own run: what its scheduler was given at each step, and its pictures."""
    pipeline = policy.pipeline
    own, checker = pipeline.scheduler, None
    if "requires_safety_checker" in pipeline.config:
        checker = pipeline.safety_checker
    if policy.is_flow:
        pipeline.scheduler = become(own, _Spy)
    else:
        pipeline.scheduler = become(DDIMScheduler.from_config(own.config), _DiffusionSpy)
    pipeline.scheduler.noted = noted = []
    if checker is not None:
        pipeline.safety_checker = None
    arguments = dict(policy.call_arguments)
    if image is not None:
        arguments["image"] = image
    if policy.negative_prompt is not None:
        arguments["negative_prompt"] = policy.negative_prompt
    guider = getattr(pipeline, "guider", None)
    if guider is not None:
        pipeline.guider = guider.new(guidance_scale=policy.guidance_scale)
    try:
        with torch.no_grad(), policy.whole():
            pictures = pipeline(
                prompt=PROMPTS[0],
                num_inference_steps=num_inference_steps,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
                return_dict=False,
                **arguments,
            )[0]
    finally:
        pipeline.scheduler = own
        if checker is not None:
            pipeline.safety_checker = checker
        if guider is not None:
            pipeline.guider = guider
    return noted, torch.as_tensor(pictures).float().cpu()


def _compare_replay(policy: FlowPolicy, diagnosis: Diagnosis, sigmas, condition: Condition, noted: list):
    if len(noted) != len(sigmas) - 1:
        raise Untrainable(
            f"the stock pipeline takes {len(noted)} steps where it is asked for {len(sigmas) - 1}: it does not begin "
            "with noise, or denoises in several rounds"
        )
    shape = tuple(noted[0][1].shape[1:])
    if shape != policy.latent_shape:
        if condition.latent_shape == shape:
            raise Untrainable(
                f"the size of its latents follows the picture that it starts from: {shape} for this picture, "
                f"{policy.latent_shape} for the grey square that stands for all of them. Set height and width, or use "
                "square pictures where its call has neither"
            )
        fewer = math.prod(shape) < math.prod(policy.latent_shape)
        raise Untrainable(
            f"the stock pipeline denoises latents of shape {shape}, and prepares ones of shape {policy.latent_shape}: "
            + (
                "part of them (a first frame or a mask, say) is given, and only the rest is the model's to choose"
                if fewer
                else "what it denoises holds more than what it makes (the pictures that it starts from, say)"
            )
        )
    diagnosis.replay_error, scale = 0.0, 0.0
    counted = _count_encoder_calls(policy)
    with torch.no_grad(), counted as calls:
        for sigma, (stock_sigma, sample, output) in zip(sigmas.tolist(), noted, strict=False):
            if policy.is_flow:
                if abs(stock_sigma - sigma) > 1e-6:
                    raise Untrainable(f"the stock pipeline steps from sigma {stock_sigma} where its grid says {sigma}")
                latents, expected = sample, output.float()
            else:
                alphas = DDIMScheduler.from_config(policy.pipeline.scheduler.config).alphas_cumprod
                exact = flow_sigmas(alphas[stock_sigma]).item()
                latents = sample.float() / latent_scale(exact)
                prediction = policy.pipeline.scheduler.config.get("prediction_type", "epsilon")
                expected = flow_velocity(output.float(), latents, exact, prediction)
            velocity = policy(latents, sigma, [condition])
            again = policy(latents, sigma, [condition])
            if not velocity.isfinite().all():
                raise Untrainable(f"the velocity at sigma {sigma:.3g} is not finite")
            if not torch.equal(velocity, again):
                raise Untrainable(
                    "the same latents give another velocity the second time: "
                    + (f"{_names(calls)} runs anew in every evaluation and" if calls else "the model")
                    + " draws random numbers"
                )
            diagnosis.replay_error = max(diagnosis.replay_error, (velocity - expected).abs().max().item())
            scale = max(scale, expected.std().item())
    diagnosis.encoder_calls = math.ceil(len(calls) / (2 * len(noted)))
    if diagnosis.encoder_calls:
        diagnosis.warnings.append(
            f"{_names(calls)} runs within every velocity evaluation instead of once per prompt, which costs time"
        )
    if diagnosis.replay_error > _bound(policy) * scale:
        raise Untrainable(
            f"the policy's velocity differs from the stock pipeline's by {diagnosis.replay_error:.2g} (its standard "
            f"deviation is {scale:.2g})"
            + (f": what {_names(calls)} makes of its input, anew in every evaluation, is random" if calls else "")
        )
    if not policy.is_flow and diagnosis.replay_error:
        diagnosis.notes.append(
            "the replay error is the rounding of float32: a diffusion model's output is converted into a velocity, "
            "here and in the comparison in another order"
        )


def _names(calls: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(set(calls)))


@contextmanager
def _count_encoder_calls(policy: FlowPolicy):
    """Notes each run of a frozen model: text and image encoders, and the VAE's encoder."""
    calls, handles = [], []
    for name, component in policy.pipeline.components.items():
        if not isinstance(component, nn.Module) or name in policy.components:
            continue
        encoder = getattr(component, "encoder", component) if name.startswith("vae") else component
        if isinstance(encoder, nn.Module) and "encoder" in (name if not name.startswith("vae") else "encoder"):
            handles.append(encoder.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _bound(policy: FlowPolicy, bounds: dict[torch.dtype, float] = REPLAY_BOUNDS) -> float:
    dtype = next(getattr(policy.pipeline, policy.components[0]).parameters()).dtype
    return bounds.get(dtype, bounds[torch.bfloat16])


@torch.no_grad()
def _compare_pictures(policy: FlowPolicy, diagnosis: Diagnosis, sigmas, condition: Condition, noted, pictures):
    latents = noted[0][1].float()
    if not policy.is_flow:
        latents = latents * policy.initial_scale(sigmas)
    grid = sigmas.tolist()
    for sigma, sigma_next in zip(grid, grid[1:], strict=False):
        latents = latents + (sigma_next - sigma) * policy(latents, sigma, [condition])
    decoded = policy.decode(latents, conditioning=[condition])
    if decoded.ndim not in (4, 5) or decoded.shape[-3] != 3:
        alpha = " (the fourth is transparency, which no reward takes)" if decoded.shape[-3:-2] == (4,) else ""
        raise Untrainable(
            f"its decoded output has the shape {tuple(decoded.shape)}: expected pictures (1, 3, height, width) or "
            f"videos (1, frames, 3, height, width), with three channels{alpha}"
        )
    if decoded.shape != pictures.shape:
        raise Untrainable(
            f"decoding its latents gives the shape {tuple(decoded.shape)}, and the stock pipeline gives "
            f"{tuple(pictures.shape)}"
        )
    diagnosis.media = "videos" if decoded.ndim == 5 else "pictures"
    diagnosis.picture_error = (decoded - pictures).abs().max().item()
    # In half precision, the stock pipeline rounds its latents after every step, and we don't.
    if diagnosis.picture_error > (1e-3 if _bound(policy) <= 1e-5 else 0.25):
        raise Untrainable(
            f"without noise, the policy's picture differs from the stock pipeline's by {diagnosis.picture_error:.2g}"
        )


@torch.no_grad()
def _compare_rows(policy: FlowPolicy, diagnosis: Diagnosis, sigmas, conditions: list[Condition]):
    sigma = sigmas[(len(sigmas) - 1) // 2].item()
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1)).to(policy.device)
    together = policy(latents, sigma, conditions)
    alone = torch.cat([policy(latents[row : row + 1], sigma, [conditions[row]]) for row in range(2)])
    diagnosis.row_error = (together - alone).abs().max().item()
    if diagnosis.row_error > _bound(policy, ROW_BOUNDS) * alone.std().item():
        raise Untrainable(
            f"a row's velocity depends on the other rows of its batch, by {diagnosis.row_error:.2g}"
            + (
                ": pictures are encoded anew in every evaluation, with random numbers"
                if diagnosis.encoder_calls
                else ""
            )
        )
    other = policy(latents[:1], sigma, conditions[1:])
    if torch.equal(other, alone[:1]):
        raise Untrainable("the prompt makes no difference to the velocity")
    if not conditions[0].batched:
        diagnosis.warnings.append("the pipeline takes one prompt at a time, so rows are evaluated one by one")


def _compare_training(policy: FlowPolicy, diagnosis: Diagnosis, sigmas, condition: Condition):
    grid = sigmas.tolist()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    reached, unused = set(), set()
    diagnosis.ratio_error = 0.0
    # Denoisers that share the work by noise level are all visited.
    for step in range(len(grid) - 1):
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(2, *policy.latent_shape, generator=generator).to(policy.device)
        noise = torch.randn(2, *policy.latent_shape, generator=generator).to(policy.device)
        pair = [condition] * 2
        with torch.no_grad():
            mean, std = transition(latents, policy(latents, grid[step], pair), *grid[step : step + 2], 0.7, "flow")
            if std == 0:
                continue
            sampled = mean + std * noise
            old = log_prob(sampled, mean, std)
        velocity = policy(latents, grid[step], pair)
        mean, std = transition(latents, velocity, *grid[step : step + 2], 0.7, "flow")
        new = log_prob(sampled, mean, std)
        diagnosis.ratio_error = max(diagnosis.ratio_error, (torch.exp(new.detach() - old) - 1).abs().max().item())
        if not new.requires_grad:
            continue
        policy.zero_grad()
        new.sum().backward()
        for name, parameter in trained.items():
            if parameter.grad is None:
                unused.add(name)
            elif not parameter.grad.isfinite().all():
                raise Untrainable(f"the gradient of {name} at sigma {grid[step]:.3g} is not finite")
            elif parameter.grad.any():
                reached.add(name)
    diagnosis.gradient_coverage = len(reached) / max(1, len(trained))
    if not reached:
        raise Untrainable("no gradient reaches a trained weight")
    if diagnosis.ratio_error > RATIO_BOUND and _bound(policy) <= 1e-5:
        raise Untrainable(
            "the same transition's probability in training differs from that in the rollout (their ratio is off by "
            f"{diagnosis.ratio_error:.2g}): the model computes something else when gradients are wanted"
        )
    _note_gradients(policy, diagnosis, list(trained), reached, unused)
    if diagnosis.ratio_error > 1e-3:
        diagnosis.warnings.append(
            f"probability ratios of the first update differ from 1 by up to {diagnosis.ratio_error:.2g}, because half "
            "precision rounds differently in training: keep the clip range well above that, or load in float32"
        )


def _note_gradients(policy: FlowPolicy, diagnosis: Diagnosis, trained: list[str], reached: set, unused: set):
    """
    Weights whose output the model discards (the text stream of its last block) have a zero gradient, which is no
    fault. Those that an evaluation does not touch have none. Of two denoisers one is never touched.
    """
    zero = [name for name in trained if name not in reached and name not in unused]
    if zero:
        diagnosis.notes.append(
            f"{len(zero)} of {len(trained)} trained tensors have a zero gradient, such as {_short(zero[0])}: the "
            "velocity does not depend on what they compute (mostly on the text side of the last block)"
        )
    unused = [name for name in trained if name in unused]
    if unused and len(policy.components) == 1:
        diagnosis.notes.append(
            f"{len(unused)} of {len(trained)} trained tensors take no part in an evaluation, such as "
            f"{_short(unused[0])}: they stay as they are"
        )


def _short(name: str) -> str:
    """A weight's name without what PEFT and the policy put around it."""
    return name.removeprefix("denoisers.").replace("base_model.model.", "").replace(".default", "")
