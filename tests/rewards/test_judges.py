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

"""Judges over a loopback server, through the real client: what they ask, what they read, and what faults cost."""

import asyncio
import collections
import itertools
import logging
import math
import os
import random
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from mock_judge import MockJudge
from PIL import Image

from trl_flow.rewards.judges import load_judge, tournament
from trl_flow.rewards.loading import load_reward
from trl_flow.rewards.reward import RewardUnavailableError


NAN = math.nan
# Pauses that take no time, and a budget that no working machine exceeds.
QUICK = {"backoff": 0.001, "max_wait": 30.0, "timeout": 30.0}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key is found but the one of a test."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judge(server: MockJudge, name: str = "yes_no", **settings):
    return load_judge(f"eyes@{server.base_url}", judge=name, **{**QUICK, **settings})


def picture(red: int, green: int, blue: int, size: tuple[int, int] = (5, 3)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Metrics(dict):
    def __call__(self, name: str, value: float):
        self[name] = value


# ---------------------------------------------------------------------------------------------------- what is asked


def test_request_is_the_picture_as_png_and_then_the_question():
    with MockJudge() as server:
        judge(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})(
            ["a red {thing}"], [picture(9, 3, 0)]
        )
    (body,) = server.posts
    assert body["model"] == "eyes" and body["temperature"] == 0 and body["max_tokens"] == 1
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert '"a red {thing}"' in message["content"][1]["text"]


def test_picture_reaches_the_judge_to_the_last_bit():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 11, 3), dtype=np.uint8))
    seen = []

    def look(text, images):
        seen.extend(images)
        return {"content": "Yes", "first_token": {"Yes": 0.0}}

    with MockJudge(judge=look) as server:
        judge(server)(["noise"], [noise])
    np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(noise))


def test_braces_of_a_prompt_are_not_filled():
    with MockJudge() as server:
        judge(server, "unigenbench")(
            ["red {testpoints} {prompt}"], [picture(1, 1, 1)], testpoints=[["Color"]], testpoint_descriptions=[["red"]]
        )
    text = server.posts[0]["messages"][0]["content"][-1]["text"]
    assert "red {testpoints} {prompt}" in text and text.count("1. Color: red") == 1


def test_own_template():
    with MockJudge() as server:
        judge(server, template='Is this exactly "{prompt}"?')(["something red"], [picture(1, 1, 1)])
        assert server.posts[0]["messages"][0]["content"][-1]["text"] == 'Is this exactly "something red"?'
        with pytest.raises(ValueError, match="asks about no prompt"):
            judge(server, template="Is this nice?")
        with pytest.raises(ValueError, match="asks about no test points"):
            judge(server, "unigenbench", template="{prompt}")


# ------------------------------------------------------------------------------------------------------ what is read


def test_yes_no_is_the_probability_of_yes():
    images = [picture(200, 50, 0), picture(30, 90, 0), picture(10, 10, 20)]
    with MockJudge() as server:
        scores = judge(server)(["red", "red", "blue"], images)
    assert scores == pytest.approx([200 / 250, 30 / 120, 20 / 40])


@pytest.mark.parametrize(
    "first_token, expected",
    [
        ({"Yes": 0.3, " yes": 0.1, "YES\n": 0.1, "No": 0.1, " NO": 0.1, "Nope": 0.2}, 0.5 / 0.7),
        ({"No": 0.5, "Yesterday": 0.5}, 0.0),
        ({"Yes": 0.2, "Maybe": 0.8}, 1.0),
        ({"Maybe": 1.0}, NAN),
    ],
)
def test_yes_no_sums_over_spellings(first_token, expected):
    logprobs = {token: math.log(probability) for token, probability in first_token.items()}
    with MockJudge(judge=lambda text, images: {"content": "Yes", "first_token": logprobs}) as server:
        metrics = Metrics()
        (score,) = judge(server)(["red"], [picture(1, 1, 1)], log_metric=metrics)
    assert score == pytest.approx(expected, nan_ok=True)
    assert metrics == {"yes_no/unparsed": float(math.isnan(expected)), "yes_no/failed": 0.0}


def test_yes_no_without_log_probabilities_reads_the_word_and_says_so_once(caplog):
    words = iter(["Yes", "**no**, it is", "Yesterday", "Well"])
    with MockJudge(judge=lambda text, images: {"content": next(words)}) as server:
        reward = judge(server, max_workers=1)
        scores = [reward(["red"], [picture(1, 1, 1)])[0] for _ in range(4)]
    assert scores == pytest.approx([1.0, 0.0, NAN, NAN], nan_ok=True)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "no log-probabilities" in caplog.records[0].message


@pytest.mark.parametrize("top_logprobs", [[], None])
def test_yes_no_with_empty_log_probabilities_reads_the_word(top_logprobs):
    answer = {"content": "Yes", "first_token": {"Yes": -0.1}, "top_logprobs": top_logprobs}
    with MockJudge(judge=lambda text, images: answer) as server:
        assert judge(server)(["red"], [picture(1, 1, 1)]) == [1.0]


def test_unified_reward_1_5():
    images = [picture(200, 0, 0), picture(0, 200, 0), picture(100, 100, 0)]
    with MockJudge() as server:
        reward = judge(server, "unified_reward")
        scores = reward(["red", "red", "red"], images)
    assert scores == pytest.approx([5 / 5, 1 / 5, 3 / 5])
    assert reward.source == {"model": "eyes", "endpoint": server.base_url}


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("**Final Score:** 4", 4 / 5),
        ("final score: 3.5.", 3.5 / 5),
        ("The sign says 'Final Score: 5'.\nFinal Score: 2", 2 / 5),
        ("It says 'Final Score: 9'. Final Score: 3", 3 / 5),
        ("Final Score: 4/5", 4 / 5),
        ("Final Score (1-5): 4", 4 / 5),
        ("**Final Score** (1 to 5): **4.5**", 4.5 / 5),
        ("Final Score: [4]", 4 / 5),
        ("Final Score: <4>", 4 / 5),
        ("Final Score: 4, as the hat is red", 4 / 5),
        ("Final Score: 4\nFinal Score: 2,5", NAN),
        ("Final Score (1-5): good", NAN),
        ("Final Score: [1-5]", NAN),
        ("<think>Final Score: 2? No.</think>Final Score: 4", 4 / 5),
        ("Final Score: 2, or not?\n</think>\nFinal Score: 4", 4 / 5),
        ("<think>Final Score: 2? No.</think>Good", NAN),
        ("<think>A first guess is Final Score: 2, but the hat is also there, so it should be", NAN),
        ("<think>One.</think> <think>Final Score: 2", NAN),
        ("Final Score: 45", NAN),
        ("Final Score: 0", NAN),
        ("Final Score: 5.5", NAN),
        ("Final Score: good", NAN),
        ("4", NAN),
        ("", NAN),
        (None, NAN),
    ],
)
def test_final_score(reply, expected):
    with MockJudge(judge=lambda text, images: {"content": reply}) as server:
        scores = judge(server, "unified_reward")(["red"], [picture(1, 1, 1)])
    assert scores == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize(
    "name, content",
    [
        ("unified_reward", "The scale is Final Score: 1 to Final Score: 5, and this is"),
        ("unigenbench", "<score>[1, 1]</score> would be too kind, for"),
        ("win_rate", "For the red hat, Image 1 is better. But"),
    ],
)
def test_reply_that_was_cut_off_is_no_verdict(name, content):
    finish_reasons = iter(["length", "stop"])
    with MockJudge(judge=lambda text, images: {"content": content, "finish_reason": next(finish_reasons)}) as server:
        reward, images = judge(server, name), [picture(1, 1, 1), picture(2, 2, 2)][: 2 if name == "win_rate" else 1]
        cut, complete = (reward(["red"] * len(images), images, testpoints=[["A", "B"]]) for _ in range(2))
    assert cut == pytest.approx([NAN] * len(images), nan_ok=True)
    assert not any(map(math.isnan, complete))


def test_yes_no_is_always_cut_off():
    answer = {
        "content": "Yes",
        "first_token": {"Yes": math.log(0.75), "No": math.log(0.25)},
        "finish_reason": "length",
    }
    with MockJudge(judge=lambda text, images: answer) as server:
        assert judge(server)(["red"], [picture(1, 1, 1)]) == pytest.approx([0.75])


def test_unified_reward_2_0():
    metrics = Metrics()
    with MockJudge() as server:
        reward = judge(server, "unified_reward", version=2.0)
        scores = reward(["red", "blue"], [picture(200, 0, 0), picture(100, 0, 100)], log_metric=metrics)
    # The mock's marks for a share s: 1 + 4 s, 5 - 4 s, 3. Their mean is 3, whatever s is.
    assert scores == pytest.approx([(3 - 1) / 4, (3 - 1) / 4])
    assert metrics["unified_reward/alignment"] == pytest.approx((5 + 3) / 2)
    assert metrics["unified_reward/coherence"] == pytest.approx((1 + 3) / 2)
    assert metrics["unified_reward/style"] == pytest.approx(3)


def test_unified_reward_2_0_needs_all_three_marks():
    replies = iter(
        ["Alignment Score (1-5): 5\nStyle Score (1-5): 5", "Alignment Score: 5 Coherence Score: 4 Style Score: 1"]
    )
    with MockJudge(judge=lambda text, images: {"content": next(replies)}) as server:
        reward = judge(server, "unified_reward", version="2.0", max_workers=1)
        scores = reward(["red", "red"], [picture(1, 1, 1), picture(2, 2, 2)])
    assert scores == pytest.approx([NAN, (10 / 3 - 1) / 4], nan_ok=True)


def test_unknown_version():
    with pytest.raises(ValueError, match="version='3' is unknown"):
        load_judge("eyes@http://127.0.0.1:1/v1", judge="unified_reward", version=3)


def test_unigenbench_is_the_share_of_test_points():
    metrics = Metrics()
    points = [["Color - A", "Color - B"], ["Color - A"], [], None]
    descriptions = [["red", "blue"], ["blue"], [], None]
    with MockJudge() as server:
        reward = judge(server, "unigenbench")
        scores = reward(
            ["red and blue"] * 4,
            [picture(200, 0, 0), picture(0, 0, 200), picture(1, 1, 1), picture(1, 1, 1)],
            testpoints=points,
            testpoint_descriptions=descriptions,
            log_metric=metrics,
        )
    assert scores == [0.5, 1.0, None, None]
    assert len(server.posts) == 2
    assert metrics["unigenbench/Color - A"] == 1.0 and metrics["unigenbench/Color - B"] == 0.0
    assert reward.requires == ("testpoints",)


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("<score>[1, 0]</score>", 0.5),
        ("<score>\n[1,1]\n</score>", 1.0),
        ("<score>[0, 0]</score> no: <score>[0, 1]</score>", 0.5),
        ("<score>[1]</score>", NAN),
        ("<score>[1, 0, 1]</score>", NAN),
        ("<score>[1, 2]</score>", NAN),
        ('<score>["1", "0"]</score>', NAN),
        ("<score>1, 0</score>", NAN),
        ("<score>[1, __import__('os')]</score>", NAN),
        ("[1, 0]", NAN),
    ],
)
def test_unigenbench_score_list(reply, expected):
    with MockJudge(judge=lambda text, images: {"content": reply}) as server:
        scores = judge(server, "unigenbench")(["red"], [picture(1, 1, 1)], testpoints=[["A", "B"]])
    assert scores == pytest.approx([expected], nan_ok=True)


def test_unigenbench_says_what_the_dataset_lacks():
    with MockJudge() as server:
        with pytest.raises(ValueError, match="column testpoints"):
            judge(server, "unigenbench")(["red"], [picture(1, 1, 1)])
        with pytest.raises(ValueError, match="2 testpoints and 1 testpoint_descriptions"):
            judge(server, "unigenbench")(
                ["red"], [picture(1, 1, 1)], testpoints=[["A", "B"]], testpoint_descriptions=[["a"]]
            )
        with pytest.raises(ValueError, match="testpoints='Color' is a text: expected a list of texts"):
            judge(server, "unigenbench")(["red"], [picture(1, 1, 1)], testpoints=["Color"])
        with pytest.raises(ValueError, match="testpoint_descriptions='r' is a text"):
            judge(server, "unigenbench")(["red"], [picture(1, 1, 1)], testpoints=[["A"]], testpoint_descriptions=["r"])
        assert server.posts == []


# -------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("both_orders", [False, True])
def test_win_rate_is_the_share_of_won_comparisons(both_orders):
    reds = [50, 200, 50, 120, 10]
    images = [picture(red, 100, 0) for red in reds]
    metrics = Metrics()
    with MockJudge() as server:
        scores = judge(server, "win_rate", both_orders=both_orders)(["red"] * 5, images, log_metric=metrics)
    expected = [
        sum(1.0 if red > other else 0.5 if red == other else 0.0 for j, other in enumerate(reds) if j != i) / 4
        for i, red in enumerate(reds)
    ]
    assert scores == pytest.approx(expected)
    assert len(server.posts) == (20 if both_orders else 10)
    assert all(
        [part["type"] for part in post["messages"][0]["content"]] == ["image_url", "image_url", "text"]
        for post in server.posts
    )
    assert metrics["win_rate/unparsed"] == 0.0


def test_judge_that_likes_the_first_picture_gains_nothing_by_both_orders():
    metrics = Metrics()
    with MockJudge(judge=lambda text, images: {"content": "Image 1 is better."}) as server:
        scores = judge(server, "win_rate", both_orders=True)(
            ["red"] * 4, [picture(i, 1, 1) for i in range(4)], log_metric=metrics
        )
    assert scores == [0.5] * 4
    assert metrics["win_rate/first"] == 1.0


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("<think>Image 1 is better at color</think><answer>Image 2 is better</answer>", [0.0, 1.0]),
        ("Image 2 is better in style. All in all, image 1 is better than Image 2.", [1.0, 0.0]),
        ("Both images are equally good.", [0.5, 0.5]),
        ("<answer>neither</answer> Image 1 is better", [NAN, NAN]),
        ("Image 3 is better.", [NAN, NAN]),
        ("<think>Image 1 is better at color</think>Image 2 is better.", [0.0, 1.0]),
        ("<THINK>Image 1 is better at color</THINK>Hard to say.", [NAN, NAN]),
        ("<think>For the red hat, Image 1 is better. Aesthetics: Image 2 has nicer light and", [NAN, NAN]),
        ("<answer>Image 1 is better", [NAN, NAN]),
        ("<answer>Image 2 is better</answer> <answer>No: image 1 is better", [NAN, NAN]),
    ],
)
def test_verdict_on_a_pair(reply, expected):
    with MockJudge(judge=lambda text, images: {"content": reply}) as server:
        scores = judge(server, "win_rate")(["red"] * 2, [picture(1, 1, 1), picture(2, 2, 2)])
    assert scores == pytest.approx(expected, nan_ok=True)


def test_comparison_without_an_answer_is_left_out():
    images = [picture(red, 100, 0) for red in (10, 20, 30)]

    def fault(attempt, text, shown):
        # The judge chokes on every pair with the darkest picture but the one with the brightest.
        reds = {image.getpixel((0, 0))[0] for image in shown}
        return 400 if reds == {10, 20} else None

    with MockJudge(fault) as server:
        assert judge(server, "win_rate")(["red"] * 3, images) == [0.0, 0.0, 1.0]
    with MockJudge(
        lambda attempt, text, shown: 400 if 10 in {i.getpixel((0, 0))[0] for i in shown} else None
    ) as server:
        assert judge(server, "win_rate")(["red"] * 3, images) == pytest.approx([NAN, 0.0, 1.0], nan_ok=True)


def test_group_of_one_has_nothing_to_compare():
    reward = load_judge(f"eyes@http://127.0.0.1:{closed_port()}/v1", judge="win_rate")
    assert reward(["red"], [picture(1, 1, 1)]) == [None]
    with pytest.raises(ValueError, match="pictures of one prompt, and got 2"):
        reward(["red", "blue"], [picture(1, 1, 1)] * 2)


@pytest.mark.parametrize("n", range(2, 14))
def test_tournament_is_a_round_robin(n):
    pairs = tournament(n)
    assert sorted(tuple(sorted(pair)) for pair in pairs) == list(itertools.combinations(range(n), 2))
    assert pairs == tournament(n)


@pytest.mark.parametrize("n, num_opponents", [(n, k) for n in range(2, 14) for k in range(1, n)])
def test_tournament_with_few_opponents_is_balanced(n, num_opponents):
    pairs = tournament(n, num_opponents)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    games = collections.Counter(player for pair in pairs for player in pair)
    assert games == dict.fromkeys(range(n), num_opponents + num_opponents % 2 * (n % 2))
    shown_first = collections.Counter(i for i, _ in pairs)
    assert all(abs(2 * shown_first[player] - games[player]) <= 1 for player in range(n))


# -------------------------------------------------------------------------------------------------------------- faults


def test_64_requests_with_faults_deliver_all_but_the_unreadable(caplog):
    """Five kinds of fault, each on the first attempts of some pictures; ten replies that nobody can read."""
    images = [picture(100, 100 + i, 0) for i in range(64)]

    def number(images):
        return images[0].getpixel((0, 0))[1] - 100

    def fault(attempt, text, shown):
        i = number(shown)
        faults = {
            0: (500, 503),
            1: ({"status": 429, "headers": {"Retry-After": "0.01"}}, 408),
            2: ({"status": 502, "body": b"<html>bad gateway</html>", "headers": {"Content-Type": "text/html"}},),
            # JSON that is no object makes huggingface_hub's own reading of the error fail.
            3: ({"status": 500, "body": ["overloaded"]}, 409),
        }.get(i % 8, ())
        return faults[attempt] if attempt < len(faults) else None

    def reply(text, shown):
        if number(shown) % 8 == 7 or number(shown) in (4, 12):
            return {"content": "I would rather not say.", "finish_reason": "length"}
        return {"content": f"Final Score: {1 + number(shown) % 5}"}

    metrics = Metrics()
    with MockJudge(fault, reply) as server:
        reward = judge(server, "unified_reward", max_workers=16)
        scores = reward([f"red {i}" for i in range(64)], images, log_metric=metrics)
    unreadable = {i for i in range(64) if i % 8 == 7 or i in (4, 12)}
    assert len(unreadable) == 10
    expected = [NAN if i in unreadable else (1 + i % 5) / 5 for i in range(64)]
    assert scores == pytest.approx(expected, nan_ok=True)
    assert len(server.posts) == 64 + 8 * (2 + 2 + 1 + 2)
    assert server.peak <= 16
    assert metrics == {"unified_reward/unparsed": 10 / 64, "unified_reward/failed": 0.0}
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "10 of 64" in record.message and "rather not say" in record.message and "max_tokens" in record.message


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"", [], {}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": "no"}]
)
def test_answer_that_is_no_chat_completion_is_a_missing_score(body):
    with MockJudge(lambda attempt, text, images: {"status": 200, "body": body}) as server:
        metrics = Metrics()
        scores = judge(server)(["red"], [picture(1, 1, 1)], log_metric=metrics)
    assert scores == pytest.approx([NAN], nan_ok=True)
    assert metrics["yes_no/unparsed"] == 1.0 and len(server.posts) == 1


def test_as_many_requests_at_once_as_there_are_workers():
    # Nobody is answered before four have come.
    together = threading.Barrier(4)

    def wait_for_the_others(attempt, text, images):
        together.wait(30)

    with MockJudge(wait_for_the_others) as server:
        judge(server, max_workers=4)(["red"] * 12, [picture(1 + i, 1, 1) for i in range(12)])
    assert server.peak == 4 and len(server.posts) == 12


def test_hanging_request_ends_at_its_timeout_and_is_sent_again():
    with MockJudge(lambda attempt, text, images: "hang" if attempt == 0 else None) as server:
        scores = judge(server, timeout=0.3)(["red"], [picture(30, 10, 0)])
        assert scores == pytest.approx([0.75])
        assert len(server.posts) >= 2


def test_answer_that_breaks_off_is_asked_for_again():
    with MockJudge(lambda attempt, text, images: "cut" if attempt == 0 else None) as server:
        assert judge(server)(["red"], [picture(30, 10, 0)]) == pytest.approx([0.75])
        assert len(server.posts) == 2


def test_server_that_hangs_for_good_is_unavailable():
    with MockJudge(lambda attempt, text, images: "hang") as server:
        with pytest.raises(RewardUnavailableError, match="answered none of 3 requests.*timed out"):
            judge(server, timeout=0.1, max_wait=0.3)(["red"] * 3, [picture(1, 1, i) for i in range(3)])


def test_request_that_keeps_failing_costs_its_picture_only(caplog):
    def fault(attempt, text, images):
        return 500 if images[0].getpixel((0, 0))[0] == 0 else None

    metrics = Metrics()
    with MockJudge(fault) as server:
        reward = judge(server, max_wait=0.05, max_workers=1)
        scores = reward(["blue"] * 3, [picture(1, 0, 3), picture(2, 0, 2), picture(0, 0, 4)], log_metric=metrics)
    assert scores == pytest.approx([0.75, 0.5, NAN], nan_ok=True)
    assert metrics == {"yes_no/unparsed": 0.0, "yes_no/failed": pytest.approx(1 / 3)}
    assert "1 of 3" in caplog.text and "500 Internal Server Error" in caplog.text and "injected" in caplog.text


def test_refused_request_is_not_sent_again():
    """A 400 is about one picture: it has no score, and the others have theirs."""
    refused = {"status": 400, "body": {"error": {"message": "picture too small"}}}

    def fault(attempt, text, images):
        return refused if images[0].getpixel((0, 0))[0] == 0 else None

    images = [picture(1, 0, 3), picture(0, 0, 4), picture(2, 0, 2)]
    with MockJudge(fault) as server:
        scores = judge(server)(["blue"] * 3, images)
        assert scores == pytest.approx([0.75, NAN, 0.5], nan_ok=True)
        assert len(server.posts) == 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_server_that_refuses_everything_is_unavailable(status):
    refused = {"status": status, "body": {"error": {"message": "no pictures, please"}}}
    with MockJudge(lambda attempt, text, images: refused) as server:
        with pytest.raises(RewardUnavailableError, match=f"none of 2 requests.*{status}.*no pictures, please"):
            judge(server)(["red"] * 2, [picture(1, 1, 1), picture(2, 1, 1)])
        assert len(server.posts) == 2


@pytest.mark.parametrize("status, advice", [(401, "OPENAI_API_KEY"), (403, "another model"), (404, "/v1/models")])
def test_wrong_key_or_model_stops_at_once(status, advice):
    with MockJudge(lambda attempt, text, images: status) as server:
        with pytest.raises(RewardUnavailableError, match=f"eyes at {server.base_url}.*{status}.*injected.*{advice}"):
            judge(server, max_workers=1)(["red"] * 5, [picture(i + 1, 1, 1) for i in range(5)])
        assert len(server.posts) == 1


def test_dead_server_is_unavailable():
    port = closed_port()
    reward = load_judge(f"eyes@http://127.0.0.1:{port}/v1", backoff=0.001, max_wait=0.1)
    with pytest.raises(
        RewardUnavailableError, match=f"127.0.0.1:{port}.*none of 5 requests.*ConnectError.*Is the server up"
    ):
        reward(["red"] * 5, [picture(1, 1, 1)] * 5)


def test_server_that_is_gone_is_waited_for_once():
    """One budget for all requests, not one for each batch of workers."""
    with MockJudge(lambda attempt, text, images: 503) as server:
        with pytest.raises(RewardUnavailableError, match="none of 20 requests"):
            judge(server, max_workers=2, max_wait=0.05)(["red"] * 20, [picture(1, 1, i) for i in range(20)])
    shown = {post["messages"][0]["content"][0]["image_url"]["url"] for post in server.posts}
    assert len(shown) <= 2


def test_server_that_comes_back_loses_nothing():
    port = closed_port()
    images = [picture(30, 10, 0), picture(10, 30, 0)]
    reward = load_judge(f"eyes@http://127.0.0.1:{port}/v1", **{**QUICK, "backoff": 0.05})
    results = []
    waiting = threading.Thread(target=lambda: results.extend(reward(["red"] * 2, images)))
    waiting.start()
    with MockJudge(port=port) as server:
        waiting.join(30)
        assert results == pytest.approx([0.75, 0.25])
        assert len(server.posts) == 2


@pytest.mark.parametrize("retry_after", ["3600", "Fri, 31 Dec 2199 23:59:59 GMT"])
def test_retry_after_beyond_the_budget_is_not_waited_for(retry_after):
    def fault(attempt, text, images):
        return {"status": 429, "headers": {"Retry-After": retry_after}} if images[0].getpixel((0, 0))[0] == 0 else None

    with MockJudge(fault) as server:
        scores = judge(server)(["blue"] * 2, [picture(0, 0, 4), picture(2, 0, 2)])
        assert scores == pytest.approx([NAN, 0.5], nan_ok=True)
        # Without the header, a thousand pauses of QUICK would fit into its budget.
        assert len(server.posts) == 2


@pytest.mark.parametrize("retry_after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_retry_after_that_is_over_or_unreadable(retry_after):
    def fault(attempt, text, images):
        return {"status": 429, "headers": {"Retry-After": retry_after}} if attempt == 0 else None

    with MockJudge(fault) as server:
        assert judge(server)(["blue"], [picture(2, 0, 2)]) == pytest.approx([0.5])
        assert len(server.posts) == 2


def test_pauses_leave_the_random_numbers_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with MockJudge(lambda attempt, text, images: 500 if attempt < 3 else None) as server:
        judge(server)(["red"], [picture(1, 1, 1)])
        assert len(server.posts) == 4
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_works_inside_a_running_event_loop():
    async def notebook_cell():
        return judge(server)(["red"], [picture(30, 10, 0)])

    with MockJudge() as server:
        assert asyncio.run(notebook_cell()) == pytest.approx([0.75])


def test_a_judge_is_asked_offline_too():
    """`HF_HUB_OFFLINE` is about the Hub."""
    script = (
        "import sys\n"
        "from PIL import Image\n"
        "from trl_flow.rewards.judges import load_judge\n"
        "print(load_judge(sys.argv[1])(['red'], [Image.new('RGB', (4, 4), (30, 10, 0))]))"
    )
    with MockJudge() as server:
        command = [sys.executable, "-c", script, f"eyes@{server.base_url}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert outcome.stdout.startswith("[0.7"), outcome.stderr


def test_an_answer_in_drops_is_not_waited_for_for_ever():
    """Each drop comes in time, and the whole would take half a minute."""
    with MockJudge(lambda attempt, text, images: "drops" if attempt == 0 else None) as server:
        assert judge(server, timeout=0.3)(["red"], [picture(30, 10, 0)]) == pytest.approx([0.75])
        assert len(server.posts) == 2


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_what_an_address_may_end_with(path):
    with MockJudge() as server:
        reward = load_judge(f"eyes@http://127.0.0.1:{server.port}{path}", **QUICK)
        assert reward(["red"], [picture(30, 10, 0)]) == pytest.approx([0.75])


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("from_environment", [True, False])
def test_key_is_sent_and_shown_nowhere(from_environment, monkeypatch, caplog):
    key = "sk-very-secret"
    if from_environment:
        monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n")
    settings = {} if from_environment else {"api_key": key}
    quoting = {"status": 400, "body": {"error": {"message": f"wrong key {key}"}}}

    def fault(attempt, text, images):
        return quoting if images[0].getpixel((0, 0))[0] == 0 else None

    with caplog.at_level(logging.DEBUG), MockJudge(fault) as server:
        reward = judge(server, **settings)
        reward(["blue"] * 2, [picture(0, 0, 4), picture(2, 0, 2)])
        with pytest.raises(RewardUnavailableError) as refused:
            reward(["blue"], [picture(0, 0, 4)])
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    assert "wrong key ***" in caplog.text and "wrong key ***" in str(refused.value)
    for shown in (caplog.text, str(refused.value), repr(reward), str(vars(reward)), str(reward.source)):
        assert key not in shown


def test_token_of_the_hub_is_not_sent_to_other_servers(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with MockJudge() as server:
        judge(server)(["red"], [picture(1, 1, 1)])
    assert server.headers[0]["authorization"] == "Bearer EMPTY"


def test_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="user or password") as refused:
        load_judge("eyes@http://me:hunter2@127.0.0.1/v1")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("rest", ["?api-version=1&key=hunter2", "#hunter2"])
def test_query_or_fragment_in_the_address_is_refused_and_not_repeated(rest):
    with pytest.raises(ValueError, match="query or a fragment") as refused:
        load_judge(f"eyes@http://127.0.0.1/v1{rest}")
    assert "hunter2" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- names


def test_judge_by_its_address():
    reward = load_reward("openai:org/eyes-7b@https://judge.example:8000/v1")
    assert type(reward).__name__ == "YesNoReward" and reward.concurrent and reward.scope == "sample"
    assert reward.source == {"model": "org/eyes-7b", "endpoint": "https://judge.example:8000/v1"}
    reward = load_reward("openai:eyes@http://judge/v1", judge="win_rate", num_opponents=2)
    assert reward.scope == "group" and reward.num_opponents == 2


def test_judge_by_its_name():
    reward = load_reward({"unified_reward": {"base_url": "http://judge/v1", "model": "eyes", "version": "2.0"}})
    assert reward.version == "2.0" and reward.about.license.startswith("MIT")
    with pytest.raises(ValueError, match="needs the setting base_url, model"):
        load_reward("yes_no")


@pytest.mark.parametrize(
    "spec, settings, message",
    [
        ("eyes", {}, "expected 'openai:MODEL@http://host/v1'"),
        ("eyes@judge/v1", {}, "expected 'openai:MODEL@http://host/v1'"),
        ("eyes@http://judge/v1", {"judge": "mood"}, "judge='mood' is unknown: expected one of yes_no, unified_reward"),
        ("eyes@http://judge/v1", {"versoin": "2.0"}, "no setting versoin"),
        ("eyes@http://judge/v1", {"max_workers": 0}, "max_workers=0"),
        ("eyes@http://judge/v1", {"judge": "win_rate", "num_opponents": 0}, "num_opponents=0"),
    ],
)
def test_what_a_judge_is_not(spec, settings, message):
    with pytest.raises(ValueError, match=message):
        load_judge(spec, **settings)
