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
import sys
import threading

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from trl_flow import load_reward
from trl_flow.rewards import (
    Reward,
    RewardThreads,
    RewardUnavailableError,
    check_rewards,
    reward_name,
    score,
    start_scoring,
)


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
        assert (trainer_state, log_metric) == ("state", "metric") and callable(log_extra)
        return target

    scores, failed, errors = score(
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
    assert not failed.any() and errors == {"reward": []}


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
    scores, _, _ = score([lambda images, **kwargs: make([number_of(i) for i in images])], ["r"], PROMPTS, IMAGES)
    assert scores[:, 0].tolist() == list(range(8))


def hundred() -> tuple[list[str], list]:
    return [str(number) for number in range(100)], [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(100)]


def test_what_raises_for_every_sample_is_not_called_for_each():
    calls = []

    def broken(images, **kwargs):
        calls.append([number_of(image) for image in images])
        raise TypeError(f"{len(images)} pictures")

    _, failed, errors = score([broken], ["broken"], *hundred())
    assert [len(call) for call in calls] == [100, 50, 50] + [1] * 8
    assert sum(calls[3:], []) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert failed.all() and len(errors["broken"]) == 100


@pytest.mark.parametrize("good", [[99], [24], [7, 8, 9], range(0, 100, 5), range(10, 100)])
def test_nor_are_samples_given_up_that_have_a_score(good):
    """However few: as long as one of those that are tried has one, or the errors differ, all are looked at."""

    def fragile(images, **kwargs):
        numbers = [number_of(image) for image in images]
        if bad := [number for number in numbers if number not in good]:
            raise (ValueError if bad[0] % 24 else TypeError)(bad)
        return numbers

    scores, failed, _ = score([fragile], ["fragile"], *hundred())
    assert [number for number in range(100) if not failed[number, 0]] == list(good)
    assert scores[~failed].tolist() == list(good)


def test_a_missing_score_is_no_number():
    values = [0.5, None, NAN, math.inf, -math.inf, True, np.float32(0.25), torch.tensor(2.0)]
    scores, failed, errors = score([lambda images, **kwargs: values], ["r"], PROMPTS, IMAGES)
    np.testing.assert_array_equal(scores[:, 0].numpy(), [0.5, NAN, NAN, NAN, NAN, 1.0, 0.25, 2.0])
    # None says that there is nothing to score; anything else that is no number is a failure.
    assert failed[:, 0].tolist() == [False, False, True, True, True, False, False, False]
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
        scores, failed, errors = score(
            [function, numbers], ["fragile", "numbers"], PROMPTS, IMAGES, {"target": list(range(8))}
        )
    expected = [NAN if number in bad else 10.0 * number for number in range(8)]
    np.testing.assert_array_equal(scores[:, 0].numpy(), expected)
    assert scores[:, 1].tolist() == list(range(8))
    assert failed[:, 0].tolist() == [number in bad for number in range(8)] and not failed[:, 1].any()
    assert sorted(str(error) for error in errors["fragile"]) == sorted(f"picture {number}" for number in bad)
    assert all(type(error) is ZeroDivisionError for error in errors["fragile"])
    assert f"'fragile' raised for {len(bad)} of 8 samples" in caplog.text and "ZeroDivisionError" in caplog.text


def test_asynchronous_rewards_run_together_and_inside_a_running_loop():
    meeting = threading.Barrier(2, timeout=30)  # raises if only one of them comes

    def make(value):
        async def reward(images, **kwargs):
            await asyncio.to_thread(meeting.wait)
            return [value] * len(images)

        return reward

    class Callable:
        async def __call__(self, images, **kwargs):
            return [3.0] * len(images)

    async def notebook():
        return score([make(1.0), numbers, make(2.0), Callable()], ["a", "n", "b", "c"], PROMPTS, IMAGES)

    scores, _, errors = asyncio.run(notebook())
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

    with pytest.raises(ValueError, match=r"'broken' raised for each of 1 grey test pictures. OSError: no weights"):
        check_rewards([numbers, broken], ["n", "broken"], [{"prompt": "a"}], (2, 2))


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
        ("aesthetics", "reward='aesthetics' is unknown. Expected .*built-in reward.*pickscore.*dotted path"),
        ("no_such_module.reward", "reward='no_such_module.reward' could not be imported.*built-in reward"),
        ("math.no_such_function", "could not be imported"),
        ("math.pi", "reward='math.pi' is a float, not a function"),
        (3, "reward=3 is a int. Expected a function, the name"),
        ({"shapes": {}, "clip": {}}, "has 2 names: expected one, with its settings"),
        ({"shapes": 3}, "expected a name and its settings"),
        ('{"shapes": ', "is no JSON"),
        ({"shapes": {"match": "exact"}}, "reward='shapes' takes no settings: got {'match': 'exact'}"),
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
    assert reward_name({"ocr": {"match": "paper"}}) == reward_name('{"ocr": null}') == "ocr"
    assert reward_name("user/sharpness@v1") == reward_name("evaluate:user/sharpness") == "sharpness"
    assert reward_name("openai:org/Judge-7b@http://localhost:8000/v1") == "Judge-7b"
    assert reward_name("http://localhost:8000/a/b") == "localhost:8000_a_b"


# ---- Settings ----


class Sharpness(Reward):
    def __init__(self, radius: float, power: float = 1.0):
        self.radius, self.power = radius, power

    def __call__(self, prompts, images, **kwargs):
        return [self.radius**self.power] * len(images)


def test_settings_of_a_reward(tmp_path, monkeypatch):
    (tmp_path / "sharp.py").write_text("from test_reward_scoring import Sharpness\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    assert load_reward({"sharp.Sharpness": {"radius": 2, "power": 3}})(["p"], [None]) == [8]
    assert load_reward('{"sharp.Sharpness": {"radius": 2}}')(["p"], [None]) == [2]
    assert load_reward("sharp.Sharpness", radius=2, power=2)(["p"], [None]) == [4]
    with pytest.raises(ValueError, match="has no setting sigma: expected radius, power"):
        load_reward({"sharp.Sharpness": {"radius": 2, "sigma": 1}})
    with pytest.raises(ValueError, match='needs the setting radius: {"sharp.Sharpness": {"radius": "..."}}'):
        load_reward("sharp.Sharpness")
    with pytest.raises(ValueError, match="revision='main': reward='shapes' comes from no repository"):
        load_reward("shapes", revision="main")


# ---- Groups and threads ----


def test_a_reward_of_scope_group_gets_the_whole_group():
    class Rank(Reward):
        scope = "group"

        def __call__(self, prompts, images, target, **kwargs):
            calls.append((set(prompts), sorted(target)))
            if 5 in target:
                raise RuntimeError("nothing to compare")
            order = sorted(target)
            return [order.index(value) for value in target]

    calls = []
    target = [3, 1, 2, 9, 7, 8, 5, 4]
    values, failed, errors = score(
        [Rank()], ["rank"], ["a"] * 8, IMAGES, {"target": target}, groups=[0, 0, 1, 1, 0, 1, 2, 2]
    )
    np.testing.assert_array_equal(values[:, 0].numpy(), [1, 0, 0, 2, 2, 1, NAN, NAN])
    assert failed[:, 0].tolist() == [False] * 6 + [True] * 2
    assert len(errors["rank"]) == 2
    # One call for each group, also for the one that fails: halves of a group are another group.
    assert calls == [({"a"}, [1, 3, 7]), ({"a"}, [2, 8, 9]), ({"a"}, [4, 5])]


def test_frames_of_one_moment_are_compared():
    class Rank(Reward):
        scope = "group"

        def __call__(self, prompts, images, **kwargs):
            calls.append(numbers(images))
            return numbers(images)

    calls = []
    videos = [[IMAGES[2 * number], IMAGES[2 * number + 1]] for number in range(4)]
    values, _, _ = score([Rank()], ["rank"], ["a"] * 4, videos, groups=[0, 1, 0, 1])
    assert calls == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert values[:, 0].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_asynchronous_rewards_keep_their_event_loop_and_make_no_graph():
    """Clients that they keep from call to call belong to it."""
    loops, threads = [], RewardThreads()
    weight = torch.ones(1, requires_grad=True)

    async def reward(images, **kwargs):
        loops.append(asyncio.get_running_loop())
        assert not (weight * 2).requires_grad
        return [1.0] * len(images)

    check_rewards([reward], ["r"], [{"prompt": "a"}], (2, 2), threads=threads)
    for _ in range(2):
        assert not start_scoring(threads, [reward], ["r"], PROMPTS, IMAGES)().failed.any()
    assert len(loops) == 3 and len(set(loops)) == 1


def test_a_reward_that_is_unavailable_is_asked_once():
    calls = []

    def gone(images, **kwargs):
        calls.append(len(images))
        raise RewardUnavailableError("no route to host")

    values, failed, errors = score([gone, numbers], ["gone", "numbers"], PROMPTS, IMAGES)
    assert calls == [8] and failed[:, 0].all() and len(errors["gone"]) == 8
    assert values[:, 1].tolist() == list(range(8))


def test_a_group_reward_that_is_unavailable_is_asked_once():
    """What it scored before stays; the groups that follow are not asked about."""

    class Gone(Reward):
        scope = "group"

        def __call__(self, prompts, images, **kwargs):
            calls.append(len(images))
            if len(calls) > 1:
                raise RewardUnavailableError("no route to host")
            return numbers(images)

    calls = []
    values, failed, errors = score([Gone()], ["gone"], ["a"] * 8, IMAGES, groups=[0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(values[:, 0].numpy(), [0, NAN, NAN, NAN, 4, NAN, NAN, NAN])
    assert calls == [2, 2] and failed[:, 0].tolist() == [False, True, True, True] * 2 and len(errors["gone"]) == 6


def test_a_reward_that_is_unavailable_is_left_alone_until_it_may_be_back():
    """Each call might wait for minutes: batches that were started before are not asked about, either."""

    def gone(images, **kwargs):
        calls.append(len(images))
        raise RewardUnavailableError("no route to host")

    calls, threads = [], RewardThreads()
    for _ in range(3):
        _, failed, _ = start_scoring(threads, [gone], ["gone"], PROMPTS, IMAGES)()
        assert failed.all()
    assert calls == [8]
    threads.unavailable.clear()
    start_scoring(threads, [gone], ["gone"], PROMPTS, IMAGES)()
    assert calls == [8, 8]


def test_what_a_reward_notes_is_in_the_order_of_the_samples():
    """Also where batches are halved, or samples come in groups; None where there is nothing."""

    class Group(Reward):
        scope = "group"

        def __call__(self, prompts, images, log_extra, **kwargs):
            log_extra("text", [f"group of {number_of(images[0])}"] * len(images))
            return numbers(images)

    def fragile(images, log_extra, **kwargs):
        log_extra("seen", [number_of(image) for image in images])
        if 5 in numbers(images):
            raise RuntimeError("five")
        return numbers(images)

    noted = []
    score(
        [fragile, Group()],
        ["fragile", "group"],
        PROMPTS,
        IMAGES,
        groups=[0, 1] * 4,
        log_extra=lambda column, values: noted.append((column, values)),
    )
    assert noted == [("seen", [0, 1, 2, 3, 4, None, 6, 7]), ("text", ["group of 0", "group of 1"] * 4)]

    def careless(images, log_extra, **kwargs):
        log_extra("seen", [1])
        return numbers(images)

    with pytest.raises(ValueError, match=r"'careless' gave log_extra\('seen', ...\) 1 values for 8 pictures"):
        score([careless], ["careless"], PROMPTS, IMAGES, log_extra=lambda column, values: None)


def test_concurrent_rewards_run_while_the_caller_goes_on():
    may_end = threading.Event()
    running = []

    class Slow(Reward):
        concurrent = True

        def __call__(self, prompts, images, **kwargs):
            running.append(prompts[0])
            assert len(running) == 1  # never twice at a time
            assert may_end.wait(30)
            running.pop()
            return numbers(images)

    slow, threads = Slow(), RewardThreads()
    parts = [
        start_scoring(threads, [numbers, slow], ["numbers", "slow"], PROMPTS[i : i + 2], IMAGES[i : i + 2])
        for i in (0, 2, 4, 6)
    ]
    assert len(running) <= 1  # none has ended, all have been started
    may_end.set()
    values = torch.cat([wait().values for wait in parts])
    threads.close()
    assert values.tolist() == [[number, number] for number in range(8)]
