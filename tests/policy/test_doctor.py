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

"""The doctor: what it lets pass, what it refuses and in which words, and that it leaves everything as it was."""

import math

import pytest
import torch
from peft import LoraConfig
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowPolicy
from trl_flow.policy import find_family
from trl_flow.policy.doctor import Diagnosis, Untrainable, examine, examine_policy
from trl_flow.policy.families import STABLE_DIFFUSION_3
from trl_flow.policy.memory import MemorySettings
from trl_flow.rollout import chain_plan


SMALL = {"height": 8, "width": 8, "max_sequence_length": 4}


def sd3(hook=None):
    """A tiny Stable Diffusion 3 whose denoiser's output goes through `hook(pipeline, output)`."""
    pipeline = tiny_pipeline("StableDiffusion3Pipeline")
    if hook is not None:
        pipeline.transformer.register_forward_hook(lambda module, inputs, output: (hook(pipeline, output[0]),))
    return pipeline


def examined(name, **settings):
    """The doctor's findings for a tiny pipeline, called as it is in the other tests."""
    pipeline, arguments = tiny_pipeline(name), call_arguments(name)
    given = {
        key: arguments.pop(key) for key in ("height", "width", "num_frames", "negative_prompt") if key in arguments
    }
    given["image"] = arguments.pop("image", None)
    if "strength" not in arguments and "duration" not in arguments:
        given["guidance_scale"] = arguments.pop(find_family(pipeline).guidance, None)
    return examine(pipeline, generation_kwargs=arguments, **(given | settings))


def assert_refused(diagnosis, *words):
    assert not diagnosis.trains
    assert all(word in diagnosis.problem for word in words), diagnosis.problem


# ---- What trains ----


def test_pipeline_with_a_record():
    pipeline = sd3()
    transformer = pipeline.transformer
    layers = [
        layer
        for name, layer in transformer.named_modules()
        if any(name.endswith("." + target) for target in STABLE_DIFFUSION_3.lora_target_modules)
    ]
    lora = sum(STABLE_DIFFUSION_3.lora_r * (layer.in_features + layer.out_features) for layer in layers)
    base = sum(parameter.numel() for parameter in transformer.parameters())

    diagnosis = examine(pipeline, **SMALL)

    assert diagnosis.trains, diagnosis.problem
    assert (diagnosis.pipeline, diagnosis.family) == ("StableDiffusion3Pipeline", "Stable Diffusion 3")
    assert (diagnosis.media, diagnosis.image, diagnosis.encoder_calls) == ("pictures", None, 0)
    assert diagnosis.replay_error == diagnosis.picture_error == diagnosis.ratio_error == 0
    assert diagnosis.row_error < 1e-4
    assert diagnosis.trained_parameters == lora > 0
    assert diagnosis.total_parameters == base + lora
    assert not diagnosis.memory
    assert not diagnosis.warnings


def test_discarded_layers_are_no_fault():
    """SD3's last block has no output for the text, so its queries of the text have a gradient, and it is zero."""
    diagnosis = examine(sd3(), **SMALL)
    assert len(diagnosis.notes) == 1
    assert diagnosis.notes[0].startswith(
        "2 of 30 trained tensors have a zero gradient, such as transformer.transformer_blocks.1.attn.add_q_proj.lora_A"
    )
    assert diagnosis.gradient_coverage == 28 / 30


def test_unused_layers():
    """Qwen-Image's last block makes an output for the text that nothing reads: its weights have no gradient at all."""
    diagnosis = examined("QwenImagePipeline")
    assert diagnosis.trains
    assert not diagnosis.warnings
    (note,) = (note for note in diagnosis.notes if "take no part in an evaluation" in note)
    assert note.startswith("2 of 32 trained tensors") and "attn.to_add_out.lora_A" in note


def test_two_denoisers_share_the_work():
    """Of Wan 2.2's two denoisers one is unused in every evaluation: the trainers count on it, and both are visited."""
    diagnosis = examined("WanPipeline/2.2")
    assert diagnosis.trains and diagnosis.media == "videos"
    assert diagnosis.gradient_coverage == 1
    assert not diagnosis.warnings


def test_pipeline_without_a_record():
    diagnosis = examined("AuraFlowPipeline")
    assert diagnosis.trains, diagnosis.problem
    assert diagnosis.family == "inferred"
    assert diagnosis.replay_error == diagnosis.picture_error == 0
    assert diagnosis.gradient_coverage == 1


def test_pipeline_that_starts_from_a_picture():
    diagnosis = examined("FluxKontextPipeline")
    assert diagnosis.trains and diagnosis.image == "required"
    assert diagnosis.replay_error == diagnosis.picture_error == diagnosis.encoder_calls == 0


def test_diffusion_rounds_and_a_note_says_so():
    diagnosis = examined("StableDiffusionPipeline")
    assert diagnosis.trains
    assert 0 < diagnosis.replay_error < 1e-4
    assert ["rounding of float32" in note for note in diagnosis.notes] == [True]


def test_half_precision():
    diagnosis = examine(sd3().to(torch.bfloat16), **SMALL)
    assert diagnosis.trains, diagnosis.problem
    # The stock pipeline rounds its latents after each step.
    assert 1e-5 < diagnosis.picture_error < 0.25


def test_full_finetuning_trains_everything():
    pipeline = sd3()
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    diagnosis = examine(pipeline, full_finetuning=True, **SMALL)
    assert diagnosis.trains
    assert diagnosis.trained_parameters == diagnosis.total_parameters == parameters


def test_memory_and_what_would_make_it_fit():
    """What a CUDA context takes is added to what is estimated."""
    wished = MemorySettings(chain_plan(2, 2, [0]), transition_batch_size=8, activation_checkpointing=False)
    free = examine(sd3(), memory=wished, limit=2**30 + 100 * 2**20, **SMALL)
    assert free.trains and not free.warnings
    assert free.memory["train"]["denoiser"] > 0 and free.memory["train"]["activations"] > 0
    peak = max(sum(parts.values()) for parts in free.memory.values())

    full = examine(sd3(), memory=wished, limit=2**30 + int(peak * 2**30) - 1, **SMALL)
    assert full.trains and full.memory == free.memory
    assert full.warnings == ["it needs about 1 GiB of 1: dtype: bfloat16 brings it to 1"]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_number_of_steps(steps):
    assert examine(sd3(), num_inference_steps=steps, **SMALL).trains


def test_encoder_in_every_evaluation_is_a_warning():
    def encode(pipeline, output):
        pipeline.vae.encoder(torch.zeros(1, 3, 8, 8))
        return output

    diagnosis = examine(sd3(encode), **SMALL)
    assert diagnosis.trains
    assert diagnosis.encoder_calls == 1
    assert ["`vae` runs within every velocity evaluation" in warning for warning in diagnosis.warnings] == [True]


# ---- What does not ----


@pytest.mark.parametrize(
    "name, words",
    [
        ("StableDiffusion3Img2ImgPipeline", "begins with a picture to which noise is added (its argument `strength`)"),
        ("StableAudio3Pipeline", "makes sound (its call takes `duration` and no `height`)"),
        ("LTX2Pipeline", "copies its scheduler"),
    ],
)
def test_refused_classes(name, words):
    diagnosis = examined(name)
    assert_refused(diagnosis, words)
    assert "Error" not in diagnosis.problem


def random(pipeline, output):
    return output + torch.randn_like(output)


def other_rows(pipeline, output):
    return output + 0.1 * output.sum(dim=0)


def not_finite(pipeline, output):
    return output * math.nan


def without_graph(pipeline, output):
    return output.detach()


def other_with_gradients(pipeline, output):
    return output * 1.2 if torch.is_grad_enabled() else output


def failing_with_gradients(pipeline, output):
    if torch.is_grad_enabled():
        raise AttributeError("no attribute 'gradient_checkpointing'\nand more")
    return output


def by_step(pipeline, output):
    return output * (1 + 0.1 * (pipeline.scheduler.step_index or 0))


@pytest.mark.parametrize(
    "hook, words",
    [
        (random, "the same latents give another velocity the second time: the model draws random numbers"),
        (other_rows, "a row's velocity depends on the other rows of its batch"),
        (not_finite, "is not finite"),
        (without_graph, "no gradient reaches a trained weight"),
        (other_with_gradients, "the same transition's probability in training differs"),
        (by_step, "the policy's velocity differs from the stock pipeline's"),
        (
            failing_with_gradients,
            "a forward and backward pass of training failed in diffusers' pipeline_stable_diffusion_3.py: "
            "AttributeError: no attribute 'gradient_checkpointing'",
        ),
    ],
)
def test_broken_denoisers(hook, words):
    diagnosis = examine(sd3(hook), **SMALL)
    assert_refused(diagnosis, words)
    assert "\n" not in diagnosis.problem


def test_denoiser_that_ignores_the_prompt():
    pipeline = sd3()

    def forget(module, args, kwargs):
        texts = ("encoder_hidden_states", "pooled_projections")
        return args, kwargs | {name: torch.zeros_like(kwargs[name]) for name in texts}

    pipeline.transformer.register_forward_pre_hook(forget, with_kwargs=True)
    assert_refused(examine(pipeline, **SMALL), "the prompt makes no difference")


def test_picture_that_is_decoded_in_another_way():
    pipeline = sd3()
    own = pipeline.scheduler
    pipeline.vae.decoder.register_forward_hook(
        lambda module, inputs, output: output if pipeline.scheduler is own else output + 0.1
    )
    diagnosis = examine(pipeline, **SMALL)
    assert_refused(diagnosis, "without noise, the policy's picture differs from the stock pipeline's by 0.05")
    assert diagnosis.replay_error == 0 and diagnosis.ratio_error is None


def test_error_of_a_library_says_what_was_tried_and_where():
    pipeline = sd3()
    pipeline.text_encoder.text_projection = torch.nn.Linear(3, 3)
    problem = examine(pipeline, **SMALL).problem
    assert problem.startswith(
        "calling it with an empty prompt, which prepares everything and denoises nothing, failed"
    )
    assert "in diffusers' pipeline_stable_diffusion_3.py: RuntimeError: " in problem


def test_settings_that_the_pipeline_has_not():
    assert_refused(examine(sd3(), num_frames=5), "num_frames=5", "StableDiffusion3Pipeline has no such argument")


# ---- Nothing changes ----


def snapshot(scheduler):
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(scheduler).items()
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


@pytest.mark.parametrize("hook", [None, random])
def test_random_state_and_scheduler_stay(hook):
    pipeline = sd3(hook)
    scheduler, settings = pipeline.scheduler, snapshot(pipeline.scheduler)
    state = torch.get_rng_state()
    assert examine(pipeline, **SMALL).trains == (hook is None)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler
    assert_same(snapshot(scheduler), settings)


def test_safety_checker_of_a_diffusion_pipeline_stays():
    pipeline = tiny_pipeline("StableDiffusionPipeline")
    scheduler, settings = pipeline.scheduler, snapshot(pipeline.scheduler)
    pipeline.safety_checker = checker = torch.nn.Identity()
    diagnosis = examine(pipeline, height=8, width=8)
    assert diagnosis.trains, diagnosis.problem
    assert pipeline.safety_checker is checker
    assert pipeline.scheduler is scheduler
    assert_same(snapshot(scheduler), settings)


@pytest.mark.parametrize("hook", [None, random, failing_with_gradients])
@pytest.mark.parametrize("full_finetuning", [False, True])
def test_weights_stay(hook, full_finetuning):
    config = None if full_finetuning else LoraConfig(r=2, lora_alpha=4, target_modules=None)
    policy = FlowPolicy(sd3(hook), config, full_finetuning=full_finetuning, **SMALL)
    # As after some training, but for a few zeros, which the doctor makes something else for a while.
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.fill_(0) if "blocks.1.attn.to_k" in name else parameter.normal_(std=0.1)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    assert any(not value.any() for value in weights.values())
    diagnosis = Diagnosis("StableDiffusion3Pipeline")
    if hook is None:
        examine_policy(policy, diagnosis)
    else:
        with pytest.raises(Untrainable):
            examine_policy(policy, diagnosis)
    assert_same(dict(policy.state_dict()), weights)
    assert all(parameter.grad is None for parameter in policy.parameters())
