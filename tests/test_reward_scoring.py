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

import asyncio
import logging
import math

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from trl_flow import load_reward
from trl_flow.rewards import check_rewards, reward_name, score


NAN = math.nan
# A picture's red channel is its number.
IMAGES = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(8)]
PROMPTS = [f"prompt {number}" for number in range(8)]


@pytest.fixture(autouse=True)
def single_process():
    PartialState(cpu=True)  # what the libraries' loggers ask for


def number_of(image) -> int:
    return image.getpixel((0, 0))[0]


def numbers(images, **kwargs):
    return [number_of(image) for image in images]


def test_reward_functions_get_what_trl_gives_them():
    def reward(prompts, images, completions, target, trainer_state, log_extra, log_metric):
        assert prompts == PROMPTS and images == IMAGES and completions == IMAGES
        assert (trainer_state, log_extra, log_metric) == ("state", "extra", "metric")
        return target

    scores, errors = score(
        [reward],
        ["reward"],
        PROMPTS,
        IMAGES,
        {"target": list(range(8))},
        trainer_state="state",
        log_extra="extra",
        log_metric="metric",
    )
    assert scores.dtype == torch.float64 and scores.shape == (8, 1)
    assert scores[:, 0].tolist() == list(range(8))
    assert errors == {"reward": []}


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda v: torch.tensor(v)[:, None],
        lambda v: (x for x in v),
        lambda v: map(int, v),
    ],
    ids=["list", "tuple", "numpy", "tensor", "column", "generator", "map"],
)
def test_what_a_reward_may_return(make):
    scores, _ = score([lambda images, **kwargs: make([number_of(i) for i in images])], ["r"], PROMPTS, IMAGES)
    assert scores[:, 0].tolist() == list(range(8))


def test_a_missing_score_is_no_number():
    values = [0.5, None, NAN, math.inf, -math.inf, True, np.float32(0.25), torch.tensor(2.0)]
    scores, errors = score([lambda images, **kwargs: values], ["r"], PROMPTS, IMAGES)
    np.testing.assert_array_equal(scores[:, 0].numpy(), [0.5, NAN, NAN, NAN, NAN, 1.0, 0.25, 2.0])
    assert not errors["r"]


@pytest.mark.parametrize("bad", [{2}, {0, 7}, {0, 1, 2, 3}, {6}, set(range(8))])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_that_raises_costs_the_samples_that_make_it_raise(bad, asynchronous, caplog):
    def fragile(images, prompts, target, **kwargs):
        assert len(images) == len(prompts) == len(target)
        for image, text in zip(images, prompts, strict=True):
            assert text == f"prompt {number_of(image)}"
            if number_of(image) in bad:
                raise ZeroDivisionError(f"picture {number_of(image)}")
        return [10.0 * t for t in target]

    async def fragile_async(**kwargs):
        await asyncio.sleep(0)
        return fragile(**kwargs)

    function = fragile_async if asynchronous else fragile
    with caplog.at_level(logging.WARNING):
        scores, errors = score(
            [function, numbers], ["fragile", "numbers"], PROMPTS, IMAGES, {"target": list(range(8))}
        )
    expected = [NAN if number in bad else 10.0 * number for number in range(8)]
    np.testing.assert_array_equal(scores[:, 0].numpy(), expected)
    assert scores[:, 1].tolist() == list(range(8))
    assert sorted(str(error) for error in errors["fragile"]) == sorted(f"picture {number}" for number in bad)
    assert all(type(error) is ZeroDivisionError for error in errors["fragile"])
    assert f"'fragile' raised for {len(bad)} of 8 samples" in caplog.text and "ZeroDivisionError" in caplog.text


def test_asynchronous_rewards_run_together_and_inside_a_running_loop():
    meeting = []

    def make(name, value):
        async def reward(images, **kwargs):
            meeting.append(name)
            for _ in range(100):  # until the other one has begun
                if len(meeting) == 2:
                    return [value] * len(images)
                await asyncio.sleep(0)
            raise AssertionError("the two do not run together")

        return reward

    class Callable:
        async def __call__(self, images, **kwargs):
            return [3.0] * len(images)

    async def notebook():
        return score([make("a", 1.0), numbers, make("b", 2.0), Callable()], ["a", "n", "b", "c"], PROMPTS, IMAGES)

    scores, errors = asyncio.run(notebook())
    assert scores[5].tolist() == [1.0, 5.0, 2.0, 3.0]
    assert not any(errors.values())


@pytest.mark.parametrize(
    "result, message",
    [
        ([0.5] * 7, "Reward 'r' returned 7 scores for 8 pictures: expected one for each"),
        ([0.5] * 9, "Reward 'r' returned 9 scores for 8 pictures"),
        ([], "Reward 'r' returned 0 scores for 8 pictures"),
        (["0.5"] * 8, r"Reward 'r' returned '0.5' \(str\): expected numbers or None"),
        ([b"1"] * 8, "Reward 'r' returned b'1'"),
        ([[0.5]] * 8, r"Reward 'r' returned \[0.5\] \(list\): expected numbers or None"),
        (0.5, "Reward 'r' returned a float: expected a list of 8 numbers or None"),
        (None, "Reward 'r' returned a NoneType: expected a list of 8 numbers or None"),
        ("12345678", r"Reward 'r' returned '1' \(str\)"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_no_list_of_scores_is_an_error(result, message, asynchronous):
    async def reward_async(**kwargs):
        return result

    reward = reward_async if asynchronous else lambda **kwargs: result
    with pytest.raises(ValueError, match=message):
        score([reward], ["r"], PROMPTS, IMAGES)


# ---- The check before the run ----


def test_check_rewards_calls_every_function_on_grey_pictures():
    seen = []

    def reward(prompts, images, label, **kwargs):
        seen.append((prompts, label, [(image.size, image.getpixel((0, 0))) for image in images]))
        return [None, 0.5]

    rows = [{"prompt": "a", "label": 1}, {"prompt": "b", "label": 2}]
    check_rewards([reward], ["r"], rows, (16, 8), trainer_state=None)
    assert seen == [(["a", "b"], [1, 2], [((16, 8), (128, 128, 128))] * 2)]


def test_check_rewards_lets_one_of_several_be_silent(caplog):
    with caplog.at_level(logging.WARNING):
        check_rewards([numbers, lambda images, **kwargs: [None] * len(images)], ["n", "s"], [{"prompt": "a"}], (2, 2))
    assert "'s' has no score for any of 1 grey test pictures" in caplog.text


def test_check_rewards_names_the_error():
    def broken(**kwargs):
        raise OSError("no weights")

    with pytest.raises(ValueError, match=r"no reward function \(broken\) returned a score. OSError: no weights"):
        check_rewards([broken], ["broken"], [{"prompt": "a"}], (2, 2))


# ---- Names ----


def test_load_reward(tmp_path, monkeypatch):
    assert load_reward(numbers) is numbers
    (tmp_path / "my_own_rewards.py").write_text("def brightness(images, **kwargs):\n    return [1.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_reward("my_own_rewards.brightness")(images=[1, 2]) == [1.0, 1.0]
    assert callable(load_reward("shapes"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("aesthetics", "reward='aesthetics' is unknown. Built-in rewards: shapes.*dotted path"),
        ("no_such_module.reward", "reward='no_such_module.reward' could not be imported.*Built-in rewards"),
        ("math.no_such_function", "could not be imported"),
        ("math.pi", "reward='math.pi' is a float, not a function"),
        (3, "reward=3 is a int: expected a function or a name"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_reward_name():
    class Judge:
        def __call__(self, **kwargs):
            return []

    assert reward_name("shapes") == "shapes"
    assert reward_name("my_rewards.brightness") == "brightness"
    assert reward_name(numbers) == "numbers"
    assert reward_name(Judge()) == "Judge"
