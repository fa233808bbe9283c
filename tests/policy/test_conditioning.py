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

"""What a pipeline makes of a prompt and a picture: recorded once, put together for a batch, handed back."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from pipelines import tiny_sd3
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowPolicy
from trl_flow.policy.conditioning import (
    Answers,
    Condition,
    encoding_methods,
    find_layout,
    find_signature,
    image_key,
    merge,
    recording,
)


# ---- Rows of recorded outputs ----


def test_rows_are_in_the_dimension_that_doubles():
    assert find_layout(torch.zeros(1, 5, 3), torch.zeros(2, 5, 3)) == 0
    assert find_layout(torch.zeros(4, 1, 5), torch.zeros(4, 2, 5)) == 1
    assert find_layout(torch.tensor([[True, False]]), torch.tensor([[True, False]] * 2)) == 0
    # The tokens of all rows one after the other.
    assert find_layout(torch.arange(7), torch.arange(7).repeat(2)) == 0


def test_what_does_not_double_is_shared():
    assert find_layout(torch.zeros(5, 3), torch.zeros(5, 3)) is None
    assert find_layout(torch.tensor(3.0), torch.tensor(3.0)) is None
    assert find_layout(None, None) is None and find_layout(7, 14) is None and find_layout("a", "b") is None


def test_containers_have_the_layouts_of_their_elements():
    one = (torch.zeros(1, 3), None, [torch.zeros(4, 1), 5], {"mask": torch.zeros(1, 2), "size": 3})
    two = (torch.zeros(2, 3), None, [torch.zeros(4, 2), 5], {"mask": torch.zeros(2, 2), "size": 3})
    assert find_layout(one, two) == [0, None, [1, None], {"mask": 0, "size": None}]
    # A list with one element for each row: texts of different lengths.
    assert find_layout([torch.zeros(7, 3)], [torch.zeros(7, 3)] * 2) == "rows"


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(3, 3), r"\(1, 3\) becomes \(3, 3\) for two prompts"),
        (torch.zeros(1, 3), torch.zeros(2, 6), r"\(1, 3\) becomes \(2, 6\) for two prompts"),
        ([1], [1, 2, 3], "a list of 1 becomes one of 3 for two prompts"),
        # Without guidance and with it: merged row by row, the rows would trade places.
        (
            torch.tensor([True, False]),
            torch.tensor([True, True, False, False]),
            "not those of each prompt one after the other",
        ),
    ],
)
def test_outputs_that_cannot_be_put_together(one, two, message):
    with pytest.raises(ValueError, match=message):
        find_layout(one, two)


def test_outputs_of_rows_become_those_of_a_batch():
    """What a pipeline gives for three prompts at once, from what it gives for each."""

    def outputs(rows):
        text = torch.arange(12.0).view(3, 4)[rows]
        return (
            text,
            text.T.contiguous(),
            [*text],
            {"tokens": text.flatten(), "ids": torch.arange(5)},
            None,
            "a setting",
        )

    layout = find_layout(outputs([0]), outputs([0, 0]))
    assert layout == [0, 1, "rows", {"tokens": 0, "ids": None}, None, None]
    merged, expected = merge([outputs([row]) for row in (0, 1, 2)], layout), outputs([0, 1, 2])
    assert type(merged) is tuple and type(merged[2]) is list
    assert torch.equal(merged[0], expected[0]) and torch.equal(merged[1], expected[1])
    assert all(torch.equal(*pair) for pair in zip(merged[2], expected[2], strict=True))
    assert torch.equal(merged[3]["tokens"], expected[3]["tokens"]) and torch.equal(merged[3]["ids"], torch.arange(5))
    assert merged[4:] == (None, "a setting")


def test_one_row_is_handed_back_as_it_was():
    value = (torch.zeros(1, 3), [1])
    assert merge([value], [0, "rows"]) is value


def test_samples_of_one_prompt_share_its_memory():
    first, second = torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    merged = merge([first] * 4, 0)
    assert merged.shape == (4, 5, 3) and merged.data_ptr() == first.data_ptr() and merged.stride(0) == 0
    mixed = merge([first, first, second, first], 0)
    assert torch.equal(mixed, torch.cat([first, first, second, first]))
    wide = merge([first.transpose(0, 1)] * 2, 1)
    assert torch.equal(wide, torch.cat([first.transpose(0, 1)] * 2, dim=1))


def test_rows_share_a_batch_if_their_shapes_and_what_they_share_are_equal():
    def signature(text, picture):
        return find_signature((text, picture, "size", [text]), [0, None, None, "rows"])

    short, long, picture = torch.zeros(1, 5), torch.zeros(1, 6), torch.randn(2, 3)
    usual = signature(short, picture)
    assert hash(usual) == hash(signature(torch.ones(1, 5), picture.clone()))
    assert usual == signature(torch.ones(1, 5), picture.clone())
    assert usual != signature(long, picture)
    assert usual != signature(short.bool(), picture)
    assert usual != signature(short, picture + 1)
    # Of a type that numpy doesn't know, and not contiguous.
    half = torch.randn(4, 4).bfloat16().T
    assert find_signature(half, None) == find_signature(half.clone(), None) != find_signature(half.T, None)
    assert find_signature({"scale": 2.0}, None) != find_signature({"scale": 3.0}, None)


# ---- Recording, and answering ----


def test_recording_leaves_the_pipeline_as_it_was():
    pipeline = tiny_sd3()
    methods = encoding_methods(type(pipeline))
    with recording(pipeline) as answers:
        pipeline("a red circle", height=8, width=8, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert not vars(pipeline).keys() & set(methods)
    assert set(answers) == {("encode_prompt", 0), ("prepare_latents", 0)}
    assert answers["prepare_latents", 0].shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="divisible by"), recording(pipeline):
        pipeline("a red circle", height=9, width=9)
    assert not vars(pipeline).keys() & set(methods)


def test_methods_that_one_encoding_method_calls_are_part_of_its_output():
    class Nested:
        def encode_prompt(self):
            return self.encode_image() + 1

        def encode_image(self):
            return torch.zeros(1)

    nested = Nested()
    with recording(nested) as answers:
        nested.encode_prompt()
        nested.encode_image()
        nested.encode_image()
    assert list(answers) == [("encode_prompt", 0), ("encode_image", 0), ("encode_image", 1)]


def test_encoding_methods_of_pipelines():
    assert set(encoding_methods(type(tiny_pipeline("WanImageToVideoPipeline")))) == {
        "encode_image",
        "encode_prompt",
        "prepare_latents",
    }


class Talking:
    """A pipeline that encodes as many texts as it is told to."""

    def encode_prompt(self, text):
        return torch.full((1, 2), float(len(text)))

    def prepare_latents(self):
        return torch.zeros(1, 3, dtype=torch.float16)


def condition(number):
    answers = {("encode_prompt", 0): torch.full((1, 2), float(number)), ("prepare_latents", 0): None}
    layout = {("encode_prompt", 0): 0, ("prepare_latents", 0): None}
    return Condition("", None, answers, (3,), torch.float16, layout, (), True, 1.0)


def test_answers_are_those_of_the_rows():
    pipeline = Talking()
    answers = Answers(pipeline, cast_latents=True)
    latents = torch.randn(2, 3)
    with answers.about([condition(7), condition(8)], latents):
        assert pipeline.encode_prompt("whatever").tolist() == [[7, 7], [8, 8]]
        assert torch.equal(pipeline.prepare_latents(), latents.half())
    uncast = Answers(pipeline, cast_latents=False)
    with uncast.about([condition(7)], latents[:1]):
        assert torch.equal(pipeline.prepare_latents(), latents[:1])
    # Another pipeline of the class is not touched.
    assert Talking().encode_prompt("four").tolist() == [[4, 4]]


def test_what_was_not_recorded_is_not_made_up():
    pipeline = Talking()
    answers = Answers(pipeline, cast_latents=True)
    with answers.about([condition(7)], torch.zeros(1, 3)):
        pipeline.encode_prompt("a")
        with pytest.raises(RuntimeError, match="calls encode_prompt where it did not when its prompt was encoded"):
            pipeline.encode_prompt("b")


# ---- Encoders run once per prompt and picture ----


# How often each encoder runs for a new prompt or picture, with guidance on.
ENCODER_RUNS = {
    # CLIP's and T5's. Guidance is distilled.
    "FluxKontextPipeline": {"text_encoder": 1, "text_encoder_2": 1, "vae": 1},
    # The vision-language model reads the prompt and the negative one, each beside the picture.
    "QwenImageEditPipeline": {"text_encoder": 2, "vae": 1},
    # The picture alone, and as the first frame of a video (in two chunks of frames).
    "WanImageToVideoPipeline": {"text_encoder": 2, "image_encoder": 1, "vae": 2},
    "Flux2Pipeline/edit": {"text_encoder": 1, "vae": 1},
    "Flux2KleinPipeline/edit": {"text_encoder": 2, "vae": 1},
}


def make_policy(name):
    pipeline, arguments = tiny_pipeline(name), call_arguments(name)
    image = arguments.pop("image")
    guidance_scale = arguments.pop("true_cfg_scale" if "Qwen" in name else "guidance_scale")
    policy = FlowPolicy(
        pipeline,
        LoraConfig(r=2, target_modules=None),
        guidance_scale=guidance_scale,
        negative_prompt=arguments.pop("negative_prompt", None),
        generation_kwargs=arguments,
    )
    return policy, image


def counted(policy):
    """Runs of each frozen encoder from here on."""
    runs = Counter()
    for name in ("text_encoder", "text_encoder_2", "image_encoder", "vae"):
        component = getattr(policy.pipeline, name, None)
        if component is not None:
            encoder = component.encoder if name == "vae" else component
            encoder.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    return runs


@pytest.mark.parametrize("name", ENCODER_RUNS)
def test_encoders_run_once_per_prompt_and_picture(name):
    policy, image = make_policy(name)
    other = image.transpose(0)
    policy.conditioning(["green"], [image])  # the first tells how rows are put together
    runs, once = counted(policy), Counter(ENCODER_RUNS[name])
    first, second, again, turned = policy.conditioning(["red", "two", "red", "red"], [image, image, image, other])
    expected = once + once + once
    assert runs == expected
    assert first is again and len({id(first), id(second), id(turned)}) == 3
    # A copy of a picture is the same picture.
    assert policy.encode("red", image.copy()) is first

    latents = torch.randn(3, *policy.latent_shape)
    for sigma in (0.95, 0.5):
        velocity = policy(latents, sigma, [first, second, turned])
    with torch.no_grad(), policy.reference():
        policy(latents, 0.5, [first] * 3)
    policy.decode(latents, conditioning=[first, second, turned])
    policy.sigmas(4)
    assert policy.image_size and runs == expected
    assert (velocity[0] - policy(latents[:1], 0.5, [turned])[0]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "QwenImageEditPipeline", "WanImageToVideoPipeline"])
def test_missing_pictures(name):
    policy, _ = make_policy(name)
    with pytest.raises(ValueError, match=f"{name} starts from a picture: .* prompt 'a red circle'.* column `image`"):
        policy.conditioning(["a red circle"])


def test_pictures_that_may_be_left_out():
    policy, image = make_policy("Flux2KleinPipeline/edit")
    without, beside = policy.encode("a red circle"), policy.encode("a red circle", image)
    assert ("prepare_image_latents", 0) not in without.answers and ("prepare_image_latents", 0) in beside.answers
    latents = torch.randn(2, *policy.latent_shape)
    with torch.no_grad():
        together = policy(latents, 0.5, [without, beside])
        alone = torch.cat([policy(latents[:1], 0.5, [without]), policy(latents[1:], 0.5, [beside])])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_pictures_for_pipelines_that_take_none_make_no_difference():
    policy = FlowPolicy(tiny_sd3(), LoraConfig(r=2, target_modules=None))
    _, image = make_policy("FluxKontextPipeline")
    assert policy.encode("a red circle", image) is policy.encode("a red circle")


def test_keys_of_pictures_are_their_content():
    _, image = make_policy("FluxKontextPipeline")
    keys = [image_key(picture) for picture in (image, copy.deepcopy(image), image.transpose(0), image.convert("L"))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    # The same bytes in another shape.
    assert image_key(image.resize((4, 16))) != image_key(image.resize((16, 4)))
    assert image_key(None) is None
