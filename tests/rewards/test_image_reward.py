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

import re
import weakref

import numpy as np
import pytest
import torch
from original_models import OriginalImageReward, bert_tokenizer, cropped, picture, shaken
from transformers import BertTokenizer

from trl_flow import load_reward
from trl_flow.rewards import models
from trl_flow.rewards.image_reward import ImageRewardReward


SIDE = 32
PROMPTS = ["a red circle", "rain", "a red circle", "the cat sat on the mat and was never seen again there"]
IMAGES = [picture(0, 40, 40), picture(1, 84, 56), picture(2, 45, 61), picture(3, 20, 24)]
VOCABULARY = 57 + 2


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image_reward")
    bert_tokenizer().save_pretrained(directory)
    torch.save(shaken(OriginalImageReward(VOCABULARY)).state_dict(), directory / "ImageReward.pt")
    return {"model": str(directory / "ImageReward.pt"), "tokenizer": str(directory)}


def ids(prompt: str) -> list[int]:
    """[CLS], letters, of which those within a word are other tokens, [SEP]; 35 at most."""
    letters = [
        5 + ord(letter) - ord("a") + (26 if number else 0)
        for word in prompt.split()
        for number, letter in enumerate(word)
    ]
    return [2, *letters[:33], 3]


def expected_scores(prompts=PROMPTS, images=IMAGES) -> torch.Tensor:
    """The published model's, in float64, one pair at a time."""
    model = shaken(OriginalImageReward(VOCABULARY)).double()
    with torch.no_grad():
        return torch.cat(
            [
                model(cropped(image, SIDE)[None], torch.tensor([ids(prompt)]), torch.ones(1, len(ids(prompt))))
                for prompt, image in zip(prompts, images, strict=True)
            ]
        )


def test_scores_of_the_published_model(published):
    scores = load_reward({"image_reward": published})(PROMPTS, IMAGES, tag=["x"] * 4)
    assert all(isinstance(score, float) for score in scores) and len(ids(PROMPTS[3])) == 35
    torch.testing.assert_close(torch.tensor(scores).double(), expected_scores(), atol=1e-5, rtol=0)
    assert np.ptp(scores) > 0.01
    # The prompt is read while the picture is looked at: each of both matters.
    one = ImageRewardReward(**published)(PROMPTS[:2], IMAGES[:1] * 2)
    assert abs(one[0] - one[1]) > 1e-3 and abs(scores[0] - scores[2]) > 1e-3


def test_loading_leaves_the_random_numbers_alone(published, monkeypatch):
    monkeypatch.setattr(models, "_SHARED", weakref.WeakValueDictionary())  # nothing is there already
    reward = ImageRewardReward(**published)
    state = torch.get_rng_state()
    reward.prepare("cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_batches_nor_order_matter(published):
    together = ImageRewardReward(**published)(PROMPTS, IMAGES)
    for batch_size in (1, 3):
        alone = ImageRewardReward(**published, batch_size=batch_size)(PROMPTS, IMAGES)
        assert alone == pytest.approx(together, abs=1e-5)
    assert ImageRewardReward(**published)(PROMPTS[::-1], IMAGES[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    assert ImageRewardReward(**published)([], []) == []


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_pictures_of_every_mode(published, mode):
    reward = ImageRewardReward(**published)
    images = [image.convert(mode) for image in IMAGES]
    assert reward(PROMPTS, images) == reward(PROMPTS, [image.convert("RGB") for image in images])


def test_half_precision_is_close(published):
    exact = ImageRewardReward(**published)(PROMPTS, IMAGES)
    reward = ImageRewardReward(**published, dtype="bfloat16")
    scores = reward(PROMPTS, IMAGES)
    assert reward._shared.module.text.dtype == reward._shared.module.vision.dtype == torch.bfloat16
    assert reward._shared.module.head[0].weight.dtype == torch.float32
    assert scores == pytest.approx(exact, abs=0.05) and scores != exact


def test_blip_adds_two_tokens_to_berts(published):
    reward = ImageRewardReward(**published)
    reward.prepare("cpu")
    assert reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [57, 58]
    assert reward.tokenizer("a [ENC] b")["input_ids"] == [2, 5, 58, 6, 3]
    assert len(BertTokenizer.from_pretrained(published["tokenizer"])) == 57


def test_tensors_score_like_pictures(published):
    reward = ImageRewardReward(**published)
    for size in ((40, 40), (84, 56), (32, 32)):
        images = [picture(seed, *size) for seed in range(4)]
        pixels = torch.stack([torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1) for image in images])
        atol = 1e-5 if size == (32, 32) else 1e-2
        expected = torch.tensor(reward(PROMPTS, images))
        torch.testing.assert_close(reward.score_tensors(pixels, PROMPTS), expected, atol=atol, rtol=0)


def test_gradients_reach_the_pixels(published):
    reward = ImageRewardReward(**published, dtype="float64")
    pixels = (0.3 + 0.4 * torch.rand(2, 3, 36, 44, dtype=torch.float64)).requires_grad_()
    scores = reward.score_tensors(pixels, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert scores.dtype == torch.float64 and gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 1e-4
    direction, step = torch.randn_like(pixels), 1e-5
    with torch.no_grad():
        ahead, behind = (reward.score_tensors(pixels + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    differences = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), differences, rtol=1e-5, atol=1e-9)


def test_two_share_their_model_and_offload_it(published):
    one, other = ImageRewardReward(**published, offload=True), ImageRewardReward(**published, offload=True)
    expected = one(PROMPTS, IMAGES)
    assert other(PROMPTS, IMAGES) == expected and one._shared is other._shared
    one.release()
    assert one._shared.on_device
    other.release()
    assert not one._shared.on_device
    assert one(PROMPTS, IMAGES) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp.layers.4.weight": None}, "not the weights of ImageReward: tensors 1 missing: layers.4.weight"),
        (
            {"blip.text_encoder.encoder.layer.1.output.dense.bias": None},
            "text tower: tensors 1 missing: encoder.layer.1",
        ),
        ({"blip.visual_encoder.norm.bias": None}, "vision tower: tensors 1 missing: post_layernorm.bias"),
        ({"blip.text_encoder.pooler.dense.bias": torch.ones(1)}, "1 unexpected: pooler.dense.bias"),
        ({"queue": torch.ones(1)}, "1 unexpected: queue"),
    ],
)
def test_tensors_of_another_model_are_named(published, tmp_path, change, words):
    state_dict = {**torch.load(published["model"]), **change}
    torch.save({key: tensor for key, tensor in state_dict.items() if tensor is not None}, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=re.escape(words)):
        ImageRewardReward(str(tmp_path / "it.pt"), tokenizer=published["tokenizer"])(PROMPTS, IMAGES)
