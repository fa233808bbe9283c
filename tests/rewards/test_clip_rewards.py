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

import gc
import html
import math
import random
import re
import threading
import weakref

import ftfy
import numpy as np
import pytest
import torch
from original_models import (
    OpenCLIP,
    clip_processor,
    cropped,
    in_deviations,
    picture,
    published_head,
    save_clip,
    shaken,
)
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from trl_flow import load_reward
from trl_flow.rewards import models
from trl_flow.rewards.aesthetic import AestheticReward
from trl_flow.rewards.clip import CLIPReward, HPSv2Reward, PickScoreReward
from trl_flow.rewards.models import preprocess


SIDE = 28
PROMPTS = ["a red circle", "a cat on a mat", "a red circle", "rain"]
# Square, landscape, portrait, and smaller than the model wants.
IMAGES = [picture(0, 40, 40), picture(1, 84, 56), picture(2, 45, 61), picture(3, 20, 24)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("head") / "head.pth")
    layers = shaken(published_head(24))
    torch.save({f"layers.{key}": tensor for key, tensor in layers.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hps")
    clip_processor(SIDE).save_pretrained(directory / "processor")
    torch.save({"epoch": 1, "state_dict": shaken(OpenCLIP()).state_dict()}, directory / "weights.pt")
    return {"model": str(directory / "weights.pt"), "processor": str(directory / "processor")}


def ids(prompt: str) -> list[int]:
    """Start, bytes, of which the last of each word is another token, end."""
    vocabulary = clip_processor(SIDE).tokenizer.get_vocab()
    tokens = [token for word in prompt.split() for token in (*word[:-1], f"{word[-1]}</w>")]
    return [512, *(vocabulary[token] for token in tokens), 513]


def logits(clip: str, prompts=PROMPTS, images=IMAGES) -> torch.Tensor:
    """`CLIPModel`'s own, in float64, one pair at a time."""
    model = CLIPModel.from_pretrained(clip).double().eval()
    with torch.no_grad():
        return torch.stack(
            [
                model(input_ids=torch.tensor([ids(prompt)]), pixel_values=cropped(image, SIDE)[None]).logits_per_image
                for prompt, image in zip(prompts, images, strict=True)
            ]
        ).flatten()


def assert_scores(scores, expected, atol=2e-6):
    torch.testing.assert_close(torch.tensor(scores).double(), expected, atol=atol, rtol=0)


def test_clip_is_the_cosine(clip):
    scores = load_reward({"clip": {"model": clip}})(PROMPTS, IMAGES, completions=IMAGES, tag=["x"] * 4)
    assert all(isinstance(score, float) for score in scores)
    assert_scores(scores, logits(clip) / 100)
    assert max(scores) - min(scores) > 0.05  # else, anything would do


def test_pickscore_in_its_three_scales(clip):
    expected = {"unit": logits(clip) / 26, "logit": logits(clip), "cosine": logits(clip) / 100}
    assert_scores(load_reward({"pickscore": {"model": clip}})(PROMPTS, IMAGES), expected["unit"], atol=2e-5)
    for scale, values in expected.items():
        logged = {}
        reward = PickScoreReward(clip, scale=scale)
        assert_scores(reward(PROMPTS, IMAGES, log_metric=logged.__setitem__), values, atol=2e-4)
        assert logged == {"pickscore_raw": pytest.approx(logits(clip).mean().item(), abs=2e-4)}
        assert reward([], [], log_metric=logged.__setitem__) == []
    with pytest.raises(ValueError, match="scale='percent': expected 'unit', 'logit' or 'cosine'"):
        PickScoreReward(clip, scale="percent")


def test_hpsv2_from_its_checkpoint(hps):
    reward = load_reward({"hpsv2": hps})
    model = shaken(OpenCLIP()).double()
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        # The whole picture in a black frame, not its middle.
        factor = SIDE / max(image.size)
        whole = image.resize(tuple(round(edge * factor) for edge in image.size), Image.Resampling.BICUBIC)
        top, left = (SIDE - whole.height) // 2, (SIDE - whole.width) // 2
        framed = ImageOps.expand(whole, (left, top, SIDE - whole.width - left, SIDE - whole.height - top))
        assert framed.size == (SIDE, SIDE)
        tokens = torch.tensor([ids(prompt)])
        # open_clip cuts a text that is too long, and ends it all the same.
        tokens = torch.cat([tokens[:, :15], tokens[:, -1:]], 1) if tokens.shape[1] > 16 else tokens
        with torch.no_grad():
            pair = model.visual(in_deviations(framed)[None]), model.encode_text(tokens)
            expected.append(torch.cosine_similarity(*pair).item())
    assert_scores(reward(PROMPTS, IMAGES), torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    # In scale, the raw cosine, whatever the temperature.
    assert max(abs(score) for score in expected) <= 1 and np.ptp(expected) > 0.05


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("a “cat”’s mat", 'a "cat"\'s mat'),
        ("cat &amp; dog", "cat & dog"),
        ("cat &amp;lt; dog", "cat < dog"),
        ("  A\tcat \n mat ", "a cat mat"),
        ("cafÃ© ﬁn", "café fin"),
    ],
)
def test_hpsv2_cleans_prompts_as_open_clip_does(hps, prompt, cleaned):
    # What open_clip's `basic_clean`, `whitespace_clean` and `lower` do.
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    assert re.sub(r"\s+", " ", text).strip().lower() == cleaned
    reward = HPSv2Reward(**hps)
    scores = reward([prompt, cleaned, "rain"], IMAGES[:1] * 3)
    assert scores[0] == scores[1] != scores[2]
    pixels = tensors(IMAGES[:1]).float()
    assert torch.equal(reward.score_tensors(pixels, [prompt]), reward.score_tensors(pixels, [cleaned]))


def test_hpsv2_in_transformers_format(hps, tmp_path):
    reward = HPSv2Reward(**hps)
    expected = reward(PROMPTS, IMAGES)
    reward._shared.module.save_pretrained(tmp_path)
    scores = HPSv2Reward(str(tmp_path), processor=hps["processor"])(PROMPTS, IMAGES)
    assert scores == pytest.approx(expected, abs=1e-6)


def test_aesthetic_is_linear_in_the_embedding(clip, head):
    scores = load_reward({"aesthetic": {"model": head, "backbone": clip}})(PROMPTS, IMAGES)
    model = CLIPModel.from_pretrained(clip).double().eval()
    weights = {key: tensor.double().numpy() for key, tensor in torch.load(head).items()}
    expected = []
    for image in IMAGES:
        with torch.no_grad():
            x = model.get_image_features(pixel_values=cropped(image, SIDE)[None]).pooler_output[0].numpy()
        x = x / np.sqrt((x**2).sum())
        for number in (0, 2, 4, 6, 7):
            x = weights[f"layers.{number}.weight"] @ x + weights[f"layers.{number}.bias"]
        expected.append(x.item())
    assert_scores(scores, torch.tensor(expected, dtype=torch.float64))
    assert np.ptp(expected) > 0.01


def test_aesthetic_wants_the_clip_that_it_was_trained_on(clip, tmp_path):
    torch.save({f"layers.{key}": value for key, value in published_head(30).state_dict().items()}, tmp_path / "it.pth")
    with pytest.raises(ValueError, match="takes embeddings of 30 numbers, and those of backbone=.* have 24"):
        AestheticReward(str(tmp_path / "it.pth"), backbone=clip)(PROMPTS, IMAGES)


def count_rows(reward, tower: str) -> list[int]:
    rows = []
    module = getattr(reward._shared.module, tower)
    module.register_forward_hook(lambda module, args, kwargs, output: rows.append(len(output[0])), with_kwargs=True)
    return rows


def test_a_prompt_is_embedded_once(clip, tmp_path, monkeypatch):
    own = save_clip(tmp_path)  # hooks stay on a model, and the other one is shared
    reward = CLIPReward(own, batch_size=3)
    reward.prepare("cpu")
    texts, pictures = count_rows(reward, "text_model"), count_rows(reward, "vision_model")
    first = reward(PROMPTS * 2, IMAGES * 2)
    assert sum(texts) == 3 and pictures == [3, 3, 2]
    assert reward(PROMPTS, IMAGES) == pytest.approx(first[:4], abs=1e-6)
    assert sum(texts) == 3

    # No more than so many are kept: those that were used last.
    monkeypatch.setattr("trl_flow.rewards.clip._PROMPTS_KEPT", 2)
    reward(PROMPTS[:1], IMAGES[:1])
    assert list(reward._embeddings) == ["rain", "a red circle"] and sum(texts) == 3
    prompts = ["one", "two", "three", "a red circle", "five"]
    scores = reward(prompts, IMAGES[:1] * 5)
    # The last batch was "a red circle" and "five"; the first one had thrown "a red circle" out.
    assert list(reward._embeddings) == ["a red circle", "five"]
    assert_scores(scores, logits(own, prompts, IMAGES[:1] * 5) / 100)


def test_neither_batches_nor_order_matter(clip):
    together = CLIPReward(clip)(PROMPTS, IMAGES)
    for batch_size in (1, 3):
        assert CLIPReward(clip, batch_size=batch_size)(PROMPTS, IMAGES) == pytest.approx(together, abs=1e-6)
    assert CLIPReward(clip)(PROMPTS[::-1], IMAGES[::-1]) == pytest.approx(together[::-1], abs=1e-6)
    assert CLIPReward(clip)([], []) == []


def test_long_prompts_are_cut(clip):
    long = "abcdefghijklmnopqrstuvwxyz"  # 18 of its bytes fit between start and end
    scores = CLIPReward(clip)([long, f"{long} and more", "abcdefghijklmnopqrx"], IMAGES[:1] * 3)
    assert scores[0] == pytest.approx(scores[1], abs=1e-7) and all(math.isfinite(score) for score in scores)
    assert CLIPReward(clip)(["", "é ☃"], IMAGES[:2]) == [pytest.approx(0, abs=1)] * 2


@pytest.mark.parametrize("size", [(1, 1), (400, 3), (3, 400)])
@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_pictures_of_every_size(clip, hps, name, size):
    reward = CLIPReward(clip) if name == "clip" else HPSv2Reward(**hps)
    image = picture(0, *size)
    (score,) = reward(PROMPTS[:1], [image])
    assert abs(score) <= 1
    assert reward.score_tensors(tensors([image]), PROMPTS[:1]).item() == pytest.approx(score, abs=0.01)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_pictures_of_every_mode(clip, hps, name, mode):
    reward = CLIPReward(clip) if name == "clip" else HPSv2Reward(**hps)
    images = [image.convert(mode) for image in IMAGES]
    assert reward(PROMPTS, images) == reward(PROMPTS, [image.convert("RGB") for image in images])


def test_half_precision_is_close(clip):
    exact = CLIPReward(clip)(PROMPTS, IMAGES)
    reward = CLIPReward(clip, dtype="bfloat16")
    scores = reward(PROMPTS, IMAGES)
    assert reward._shared.module.visual_projection.weight.dtype == torch.bfloat16
    assert scores == pytest.approx(exact, abs=0.02) and scores != exact
    # The temperature is not rounded: in bfloat16, 100 would be 98.9.
    half = PickScoreReward(clip, dtype="bfloat16", scale="logit")(PROMPTS, IMAGES)
    assert half == pytest.approx([100 * score for score in scores], rel=1e-5)


def test_rewards_share_a_backbone(clip, head):
    score, beauty, more = CLIPReward(clip), AestheticReward(head, backbone=clip), PickScoreReward(clip)
    half = CLIPReward(clip, dtype="bfloat16")
    for reward in (score, beauty, more, half):
        reward.prepare(torch.device("cpu"))
    assert score._shared is beauty._shared is more._shared
    assert half._shared is not score._shared
    # It goes with the last one that uses it.
    module = weakref.ref(score._shared.module)
    del score, more, reward
    gc.collect()
    assert module() is not None
    del beauty
    gc.collect()
    assert module() is None


def test_a_model_is_loaded_once_by_threads(clip, monkeypatch):
    loads, load = [], CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    rewards = [CLIPReward(clip) for _ in range(4)]
    start, scores = threading.Barrier(4), [None] * 4

    def run(number):
        start.wait()
        scores[number] = rewards[number](PROMPTS, IMAGES)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and scores[0] is not None and scores == scores[:1] * 4


def test_nothing_is_loaded_before_it_is_needed(monkeypatch, clip):
    monkeypatch.setattr(models, "share", lambda *args: pytest.fail("loaded"))
    reward = CLIPReward(clip)
    assert reward.source == {"weights": clip}
    reward.release()


def moves_of(reward) -> list[str]:
    """Devices that its model is sent to from now on."""
    moves, to = [], reward._shared.module.to
    reward._shared.module.to = lambda device: moves.append(str(device)) or to(device)
    return moves


def test_a_model_leaves_its_device_when_nobody_needs_it_there(tmp_path):
    own = save_clip(tmp_path)
    one, other = CLIPReward(own, offload=True), PickScoreReward(own, offload=True)
    one.prepare("cpu")
    other.prepare("cpu")
    moves, shared = moves_of(one), one._shared
    assert not shared.on_device  # loaded, and waiting
    expected = one(PROMPTS, IMAGES)
    assert shared.on_device and len(moves) == 1
    other(PROMPTS, IMAGES)
    one.release()
    assert shared.on_device and len(moves) == 1  # the other one has not released it
    other.release()
    assert not shared.on_device and len(moves) == 2 and moves[-1] == "cpu"
    other.release()
    assert len(moves) == 2
    assert one(PROMPTS, IMAGES) == expected and shared.on_device


def test_a_model_stays_for_a_reward_that_keeps_it(tmp_path):
    own = save_clip(tmp_path)
    keeps, offloads = CLIPReward(own), PickScoreReward(own, offload=True)
    keeps.prepare("cpu")
    offloads.prepare("cpu")
    shared = keeps._shared
    assert shared.on_device
    offloads(PROMPTS, IMAGES)
    offloads.release()
    keeps.release()
    assert shared.on_device
    # One that is gone keeps nothing.
    del keeps
    gc.collect()
    offloads(PROMPTS, IMAGES)
    offloads.release()
    assert not shared.on_device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_move_between_gpu_and_cpu(clip, head):
    expected = CLIPReward(clip, device="cpu")(PROMPTS, IMAGES)
    offloads, beauty = CLIPReward(clip, offload=True), AestheticReward(head, backbone=clip, offload=True)
    offloads.prepare("cuda")
    beauty.prepare("cuda:0")
    assert offloads._shared is beauty._shared
    weight = offloads._shared.module.visual_projection.weight
    assert weight.device.type == "cpu"
    assert offloads(PROMPTS, IMAGES) == pytest.approx(expected, abs=1e-3)
    assert weight.device.type == "cuda"
    beauty(PROMPTS, IMAGES)
    offloads.release()
    assert weight.device.type == "cuda"
    beauty.release()
    assert weight.device.type == "cpu"


def test_the_setting_wins_over_the_trainers_device(clip):
    reward = CLIPReward(clip, device="cpu")
    reward.prepare("meta")
    assert reward._shared.device == torch.device("cpu")


def tensors(images) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1) for image in images])


@pytest.mark.parametrize("size", [(40, 40), (84, 56), (45, 61), (20, 24), (28, 28)])
@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic"])
def test_tensors_score_like_pictures(clip, hps, head, name, size):
    settings = {"hpsv2": hps, "aesthetic": {"model": head, "backbone": clip}}.get(name, {"model": clip})
    reward = load_reward({name: settings})
    images = [picture(seed, *size) for seed in range(4)]
    scores = reward.score_tensors(tensors(images), PROMPTS)
    # Pillow rounds to 256 levels in between; without resizing, there is no difference.
    atol = (2e-6 if size == (28, 28) else 5e-3) * (100 / 26 if name == "pickscore" else 1)
    torch.testing.assert_close(scores, torch.tensor(reward(PROMPTS, images)), atol=atol, rtol=0)


def test_tensors_cannot_be_resized_with_every_filter():
    image_processor = clip_processor(28).image_processor
    image_processor.resample = Image.Resampling.LANCZOS
    with pytest.raises(ValueError, match="resizes with LANCZOS .*BILINEAR or BICUBIC"):
        preprocess(torch.rand(1, 3, 40, 40), image_processor)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic"])
def test_loading_leaves_the_random_numbers_alone(clip, hps, head, name, monkeypatch):
    monkeypatch.setattr(models, "_SHARED", weakref.WeakValueDictionary())  # nothing is there already
    settings = {"hpsv2": hps, "aesthetic": {"model": head, "backbone": clip}}.get(name, {"model": clip})
    reward = load_reward({name: settings})
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    reward.prepare("cpu")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


@pytest.mark.parametrize("size", [(512, 512), (640, 384), (375, 500), (28, 41)])
def test_tensors_are_resized_and_cropped_like_pictures(size):
    image_processor = clip_processor(224).image_processor
    images = [picture(seed, *size) for seed in range(2)]
    expected = image_processor(images=images, return_tensors="pt")["pixel_values"]
    difference = (preprocess(tensors(images).float(), image_processor) - expected).abs()
    # One level of 256 is 0.015 in standard deviations.
    assert difference.shape == (2, 3, 224, 224) and difference.mean() < 0.006 and difference.max() < 0.03


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic"])
def test_gradients_reach_the_pixels(clip, hps, head, name):
    settings = {"hpsv2": hps, "aesthetic": {"model": head, "backbone": clip}}.get(name, {"model": clip})
    reward = load_reward({name: {**settings, "dtype": "float64"}})
    # Away from 0 and 1, where resizing clips.
    pixels = (0.3 + 0.4 * torch.rand(2, 3, 36, 44, dtype=torch.float64)).requires_grad_()
    scores = reward.score_tensors(pixels, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert scores.dtype == torch.float64 and gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 1e-4
    direction, step = torch.randn_like(pixels), 1e-5
    with torch.no_grad():
        ahead, behind = (reward.score_tensors(pixels + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    differences = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), differences, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["clip", "aesthetic"])
def test_gradients_after_scores_in_inference_mode(clip, head, name):
    reward = AestheticReward(head, backbone=clip) if name == "aesthetic" else CLIPReward(clip)
    with torch.inference_mode():
        expected = reward(PROMPTS, IMAGES)  # loads, and embeds the prompts
    pixels = tensors([picture(0, 40, 40)] * 4).float().requires_grad_()
    reward.score_tensors(pixels, PROMPTS).sum().backward()
    assert pixels.grad.abs().max() > 0
    assert reward(PROMPTS, IMAGES) == expected


@pytest.mark.parametrize(
    ("pixels", "prompts"),
    [
        (torch.rand(3, 40, 40), ["a"]),
        (torch.rand(1, 40, 40, 3), ["a"]),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), ["a"]),
        (torch.rand(2, 3, 40, 40), ["a"]),
    ],
)
def test_other_tensors_are_refused(clip, pixels, prompts):
    with pytest.raises(
        ValueError, match=r"expected floats in \[0, 1\] of shape \(n, 3, height, width\), and n prompts"
    ):
        CLIPReward(clip).score_tensors(pixels, prompts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "dtype='int8': expected one of float32"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ],
)
def test_settings_that_cannot_be(clip, settings, words):
    with pytest.raises(ValueError, match=words):
        CLIPReward(clip, **settings)


def test_a_file_is_no_clip_model(hps):
    with pytest.raises(
        ValueError, match="is a file: expected a repository on the Hub or a directory with a CLIPModel"
    ):
        CLIPReward(**hps)(PROMPTS, IMAGES)


def test_missing_weights_are_named(tmp_path):
    # transformers would make them up.
    directory = save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the weights of a CLIPModel .*1 missing: text_projection.weight"):
        CLIPReward(directory)(PROMPTS, IMAGES)


def test_where_they_came_from(clip, head, hps, tmp_path, monkeypatch):
    # As huggingface_hub keeps what it downloaded: found without a network.
    commit = "fedcba9876543210" * 2 + "01234567"
    repository = tmp_path / "models--someone--clip"
    save_clip(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reward = CLIPReward("someone/clip", revision="main")
    assert reward.source == {"weights": "someone/clip", "revision": "main"}
    reward.prepare("cpu")
    assert reward.source == {"weights": "someone/clip", "revision": commit}
    beauty = AestheticReward(head, backbone="someone/clip")
    beauty.prepare("cpu")
    assert beauty.source == {"weights": head, "backbone": "someone/clip", "backbone_revision": commit}
    reward = HPSv2Reward(**hps)
    reward.prepare("cpu")
    assert reward.source == {"weights": hps["model"]}


MODEL_REWARDS = ("aesthetic", "clip", "geneval", "hpsv2", "image_reward", "pickscore")


@pytest.mark.parametrize("name", MODEL_REWARDS)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(name):
    """And not before it is to be loaded: a dry run may be made on a smaller machine."""
    reward = load_reward({name: {"device": "cuda:99"}})
    with pytest.raises(ValueError, match=r"device='cuda:99': this process sees no such device. Expected one of cpu"):
        reward.prepare("cpu")
    with pytest.raises(ValueError, match="device='cuda7' is no device: expected 'cpu', 'cuda', or one GPU"):
        load_reward({name: {"device": "cuda7"}})


def test_it_is_concurrent_on_another_device_than_the_trainers(clip, monkeypatch):
    said = []
    monkeypatch.setattr(models.logger, "warning", said.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    here = CLIPReward(clip)
    here.prepare(torch.device("cpu"))
    same = CLIPReward(clip, device="cpu")
    same.prepare(torch.device("cpu"))
    alone = CLIPReward(clip, device="cpu")
    alone.prepare()
    assert not (here.concurrent or same.concurrent or alone.concurrent or said)
    elsewhere = CLIPReward(clip, device="cpu")
    elsewhere.prepare(torch.device("meta"))  # there is no other device that every machine has
    assert elsewhere.concurrent and elsewhere._shared.device.type == "cpu"
    assert len(said) == 1 and said[0].startswith(
        f"Each of 4 processes loads a copy of {clip} onto cpu. `trl-flow rewa"
    )
    assert elsewhere(PROMPTS, IMAGES) == here(PROMPTS, IMAGES)
