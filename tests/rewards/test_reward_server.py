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

"""A reward server and its client: what is sent arrives, what is wrong is refused, and who waits is served."""

import asyncio
import base64
import contextlib
import datetime
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

import trl_flow
from trl_flow.rewards import About, Reward, RewardUnavailableError, load_reward, remote
from trl_flow.rewards.remote import TOKEN_VARIABLE, RemoteReward
from trl_flow.rewards.server import RewardServer
from trl_flow.shapes import render, shapes_dataset, shapes_reward


NAN = math.nan


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    PartialState(cpu=True)  # what the libraries' loggers ask for
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@contextlib.contextmanager
def serving(reward, port=0, **settings):
    server = RewardServer(reward, port=port, **settings)
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def numbered(n: int) -> list[Image.Image]:
    """Pictures whose red and green channels are their number."""
    return [Image.new("RGB", (2, 2), (number % 256, number // 256, 0)) for number in range(n)]


def number_of(image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def noise(n: int, size: int = 32) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def ask(server, method="POST", path="/score", body=None, headers=None, raw=None):
    """Status, headers and JSON of the answer to one request."""
    connection = HTTPConnection(*server.server_address[:2], timeout=30)
    body = raw if raw is not None else None if body is None else json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert b"Traceback" not in text and b'File "' not in text
    return response.status, response.headers, json.loads(text) if text else None


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("this never came true")


class Gate:
    """A reward that does not answer its first call before it is told to. A picture's score is its number."""

    def __init__(self, scope="sample"):
        self.scope = scope
        self.calls = []
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self, images, **kwargs):
        self.calls.append([number_of(image) for image in images])
        self.begun.set()
        assert self.open.wait(30)
        return self.calls[-1]


# ---- What is sent arrives ----


def test_scores_are_those_of_a_direct_call():
    prompts = list(shapes_dataset("train", num_prompts=40, seed=0)["prompt"])
    # Half of them show what their prompt asks for.
    pictures = [render(prompt, seed) for seed, prompt in enumerate(prompts[:20])] + noise(20)
    with serving(load_reward("shapes")) as server:
        client = load_reward({"remote": {"url": server.url, "batch_size": 7}})
        scores = client(prompts=prompts, images=pictures)
    assert scores == shapes_reward(prompts, pictures)
    assert scores[:20] == [1.0] * 20 and max(scores[20:]) < 1


def test_proxies_are_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(load_reward("shapes")) as server:
        assert RemoteReward(server.url, max_wait=0.1)(prompts=["a red circle"], images=noise(1)) == [0.0]


def test_numbers_and_pictures_survive_to_the_last_bit():
    def reward(images, prompts, **kwargs):
        means = [float(np.asarray(image, dtype=np.float64).mean()) for image in images]
        return [mean / 3 + len(prompt) * 1e-17 for mean, prompt in zip(means, prompts, strict=True)]

    pictures = noise(9, size=17)
    prompts = ["schön", "日本語", '"quoted"\n', "", "a", "b", "c", "d", "e"]
    with serving(reward) as server:
        assert RemoteReward(server.url)(prompts, pictures) == reward(pictures, prompts)
        grey = [picture.convert("L") for picture in pictures]  # the pictures of a reward are RGB
        expected = reward([picture.convert("RGB") for picture in grey], prompts)
        assert RemoteReward(server.url)(prompts, grey) == expected


def test_no_score_and_not_applicable_are_different(caplog):
    def reward(images, **kwargs):
        values = [0.5, None, NAN, math.inf, "raise", 1]
        chosen = [values[number_of(image)] for image in images]
        if "raise" in chosen:
            raise ZeroDivisionError("picture 4")
        return chosen

    with serving(reward) as server:
        body = {"prompts": ["p"] * 6, "images": [png(image) for image in numbered(6)]}
        _, _, answer = ask(server, body=body)
        assert answer == {
            "name": "reward",
            "fingerprint": server.fingerprint,
            "scores": [0.5, None, None, None, None, 1.0],
            "failed": [2, 3, 4],
            "error": "ZeroDivisionError: picture 4",
        }
        scores = RemoteReward(server.url)(["p"] * 6, numbered(6))
    assert scores[:2] == [0.5, None] and scores[5] == 1.0
    assert all(math.isnan(value) for value in scores[2:5])
    assert "no score for 3 of 6 pictures: ZeroDivisionError: picture 4" in caplog.text


def test_columns():
    seen = []

    def reward(images, prompts, **kwargs):
        seen.append({name: values for name, values in kwargs.items() if name != "completions"})
        return [0.0] * len(images)

    columns = {
        "metadata": [{"include": [{"class": "dog", "count": 2}], "tag": None}, {}],
        "target": ["Straße", 'a "b"'],
        "weight": [0.1, -math.inf],
    }
    others = {
        "picture": numbered(2),
        "when": [datetime.datetime.now()] * 2,
        "completions": numbered(2),
        "trainer_state": object(),
        "log_metric": print,
        "log_extra": print,
    }
    with serving(reward) as server:
        RemoteReward(server.url)(prompts=["p", "q"], images=numbered(2), **columns, **others)
        RemoteReward(server.url, columns=["target"])(prompts=["p", "q"], images=numbered(2), **columns, **others)
        with pytest.raises(ValueError, match="column 'when' cannot be sent"):
            RemoteReward(server.url, columns=["when"])(prompts=["p", "q"], images=numbered(2), **others)
    assert seen == [columns, {"target": columns["target"]}]


class Described(Reward):
    about = About("brightness", "0 to 1", "a book", "none", "lamps")
    requires = ("target",)
    prompt_set = "ocr"
    scope = "group"

    @property
    def source(self):
        return {"repository": "user/repo", "commit": "abc"}

    def __call__(self, prompts, images, target, **kwargs):
        return [float(len(images))] * len(images)


def test_the_client_says_of_itself_what_the_server_says():
    with serving(Described()) as server:
        client = load_reward(server.url)
        assert client.scope == "group" and client.requires == ("target",) and client.prompt_set == "ocr"
        assert client.source == {
            "repository": "user/repo",
            "commit": "abc",
            "reward": "Described",
            "fingerprint": server.fingerprint,
            "server": server.url,
        }
        assert client.about == Described.about
        assert client.concurrent
        with pytest.raises(ValueError, match=r"HTTP 400: reward 'Described' needs the column target"):
            client(prompts=["p"], images=numbered(1))
        # A group is one request, however large.
        assert client(prompts=["p"] * 40, images=numbered(40), target=["t"] * 40) == [40.0] * 40


class Brightness(Reward):
    def __init__(self, scale=1.0, token=None, revision="main"):
        self.scale, self.revision, self.commit = scale, revision, None

    @property
    def source(self):
        return {"repository": "user/repo", "revision": self.commit or self.revision}

    def prepare(self, device):
        self.commit = f"commit of {self.revision}"

    def __call__(self, images, **kwargs):
        return [self.scale * number_of(image) for image in images]


def test_other_settings_or_another_revision_are_another_reward():
    def served(port=0, **settings):
        return serving(Brightness(**settings), port, spec={"my.rewards.Brightness": settings})

    def score(client):
        return client(prompts=["p"], images=numbered(2)[1:])

    with served(scale=2.0, token="a") as server:
        port, before, client = server.server_address[1], server.fingerprint, RemoteReward(server.url)
        assert server.name == "Brightness"
        assert score(client) == [2.0]
        assert client.source["fingerprint"] == before == ask(server, "GET", "/")[2]["fingerprint"]
    with served(port, scale=2.0, token="b"):  # keys and tokens change no score
        assert score(client) == [2.0]
    for settings in ({"scale": 3.0}, {"scale": 2.0, "revision": "next"}):
        with served(port, **settings) as server:
            with pytest.raises(RewardUnavailableError, match=f"with other settings.*then {before}.: start it again"):
                score(client)
            assert RemoteReward(server.url).source["fingerprint"] == server.fingerprint != before


def test_a_reward_that_was_not_loaded_by_name_is_told_apart_by_the_settings_that_it_keeps():
    def fingerprint(**settings):
        with serving(Brightness(**settings)) as server:
            return server.fingerprint

    assert fingerprint() == fingerprint() != fingerprint(scale=2.0)


def test_what_it_was_asked_for_by_is_its_name():
    with serving(shapes_reward, spec="shapes") as server:
        assert RemoteReward(server.url).name == "shapes"


# ---- Many at once ----


def test_200_concurrent_requests_are_scored_in_few_calls():
    reward = Gate()
    with serving(reward) as server, ThreadPoolExecutor(1) as executor:
        client = RemoteReward(server.url, batch_size=1, max_workers=200)
        scores = executor.submit(client, prompts=["p"] * 200, images=numbered(200))
        wait_until(lambda: server.health()["requests"] == 200)
        reward.open.set()
        assert scores.result() == list(range(200))
    assert len(reward.calls) <= 1 + math.ceil(199 / 16)
    assert max(map(len, reward.calls)) == 16
    assert sorted(sum(reward.calls, [])) == list(range(200))


def test_requests_with_different_columns_are_not_mixed():
    reward = Gate()
    body = {"prompts": ["p"], "images": [png(numbered(1)[0])]}
    bodies = [body] + [{**body, "columns": {name: [1]}} for name in "abab"]
    with serving(reward) as server, ThreadPoolExecutor(5) as executor:
        answers = [executor.submit(ask, server, body=bodies[0])]
        assert reward.begun.wait(30)
        answers += [executor.submit(ask, server, body=body) for body in bodies[1:]]
        wait_until(lambda: server.health()["requests"] == 5)
        reward.open.set()
        assert [answer.result()[0] for answer in answers] == [200] * 5
    assert [len(call) for call in reward.calls] == [1, 2, 2]


def test_groups_are_never_merged():
    reward = Gate(scope="group")
    bodies = [{"prompts": ["p"] * n, "images": [png(image) for image in numbered(n)]} for n in (3, 2, 5, 4)]
    with serving(reward) as server, ThreadPoolExecutor(4) as executor:
        answers = [executor.submit(ask, server, body=body) for body in bodies]
        wait_until(lambda: server.health()["requests"] == 4)
        reward.open.set()
        assert [answer.result()[2]["scores"] for answer in answers] == [list(range(n)) for n in (3, 2, 5, 4)]
    assert sorted(reward.calls) == sorted(list(range(n)) for n in (3, 2, 5, 4))


def test_a_full_queue_sends_clients_away_until_there_is_room(monkeypatch):
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.2)
    reward = Gate()
    body = {"prompts": ["p"], "images": [png(numbered(1)[0])]}
    with serving(reward, max_queue=2) as server, ThreadPoolExecutor(3) as executor:
        first = [executor.submit(ask, server, body=body) for _ in range(2)]
        wait_until(lambda: server.health()["requests"] == 2)
        status, headers, answer = ask(server, body=body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "2 requests are waiting already"}
        later = executor.submit(RemoteReward(server.url, batch_size=1), prompts=["p"] * 3, images=numbered(3))
        reward.open.set()
        assert [answer.result()[0] for answer in first] == [200, 200]
        assert later.result() == [0, 1, 2]


def test_requests_that_would_take_too_much_memory_are_sent_away(monkeypatch):
    monkeypatch.setattr(RewardServer, "max_memory", 10 * 2**20)
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.2)
    reward = Gate()
    # A few hundred bytes each, and 4 MB when it is unpacked.
    body = {"prompts": ["p"], "images": [png(Image.new("1", (1000, 1000)))]}
    with serving(reward) as server, ThreadPoolExecutor(3) as executor:
        held = [executor.submit(ask, server, body=body)]
        assert reward.begun.wait(30)  # or both would be scored together, and none would wait
        held.append(executor.submit(ask, server, body=body))
        wait_until(lambda: server._held >= 8_000_000 and server.health()["waiting_pictures"] == 1)
        status, headers, answer = ask(server, body=body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "requests that wait already take 8 MiB"}
        # So is a body, before it is read.
        status, _, answer = ask(server, raw=b" " * 2_000_000)
        assert (status, answer["error"]) == (503, "requests that wait already take 8 MiB")
        later = executor.submit(RemoteReward(server.url), prompts=["p"], images=[Image.new("1", (1000, 1000))])
        reward.open.set()
        assert [answer.result()[0] for answer in held] == [200, 200]
        assert later.result() == [0]
        # One that is alone is taken, or it would wait for ever.
        wait_until(lambda: server._held == 0)
        assert ask(server, body={"prompts": ["p"] * 4, "images": body["images"] * 4})[0] == 200
        wait_until(lambda: server._held == 0)


@pytest.mark.parametrize("scope", ["sample", "group"])
def test_scoring_that_takes_longer_than_the_clients_patience_is_done_once(scope, monkeypatch):
    asked = []
    enqueue = RewardServer.enqueue
    monkeypatch.setattr(RewardServer, "enqueue", lambda *args: asked.append(1) or enqueue(*args))
    reward = Gate(scope)
    with serving(reward) as server, ThreadPoolExecutor(1) as executor:
        client = RemoteReward(server.url, timeout=0.5)
        scores = executor.submit(client, prompts=["p"] * 3, images=numbered(3))
        wait_until(lambda: len(asked) == 3)
        assert not scores.done()
        reward.open.set()
        assert scores.result() == [0, 1, 2]
        # What has been delivered is forgotten: the same pictures may be asked for again.
        wait_until(lambda: not server._begun)
        assert client(prompts=["p"] * 3, images=numbered(3)) == [0, 1, 2]
    assert len(reward.calls) == 2


def test_a_client_that_loses_patience_keeps_its_turn(monkeypatch):
    asked = []
    enqueue = RewardServer.enqueue
    monkeypatch.setattr(RewardServer, "enqueue", lambda *args: asked.append(1) or enqueue(*args))
    reward = Gate("group")
    body = {"prompts": ["p"], "images": [png(numbered(10)[9])]}
    with serving(reward) as server, ThreadPoolExecutor(3) as executor:
        first = executor.submit(ask, server, body=body)
        assert reward.begun.wait(30)
        scores = executor.submit(RemoteReward(server.url, timeout=0.5), prompts=["p"] * 3, images=numbered(3))
        wait_until(lambda: len(asked) == 2)
        last = executor.submit(ask, server, body=body)
        wait_until(lambda: len(asked) == 5)
        assert server.health()["waiting_pictures"] == 4
        reward.open.set()
        assert scores.result() == [0, 1, 2]
        assert first.result()[0] == last.result()[0] == 200
    assert reward.calls == [[9], [0, 1, 2], [9]]


def test_scoring_that_takes_too_long_is_called_so():
    reward = Gate()
    with serving(reward) as server:
        client = RemoteReward(server.url, timeout=0.2, max_wait=0.6)
        with pytest.raises(RewardUnavailableError, match=r"scoring takes longer than timeout=0.2 s.*raise timeout"):
            client(prompts=["p"], images=numbered(1))
        reward.open.set()


def test_one_bad_picture_costs_no_other_request():
    def fragile(images, **kwargs):
        if any(number_of(image) == 5 for image in images):
            raise RuntimeError("an unlucky picture")
        return [number_of(image) for image in images]

    with serving(fragile) as server:
        scores = RemoteReward(server.url, batch_size=2, max_workers=8)(prompts=["p"] * 16, images=numbered(16))
    assert [number for number, value in enumerate(scores) if math.isnan(value)] == [5]
    assert [value for value in scores if not math.isnan(value)] == [n for n in range(16) if n != 5]


def test_nothing_is_scored_for_those_who_have_left():
    reward = Gate()
    body = {"prompts": ["p"], "images": [png(numbered(8)[7])]}
    with serving(reward) as server, ThreadPoolExecutor(1) as executor:
        first = executor.submit(ask, server, body={**body, "images": [png(numbered(1)[0])]})
        assert reward.begun.wait(30)
        connection = HTTPConnection(*server.server_address[:2])
        connection.request("POST", "/score", json.dumps(body), {"Content-Type": "application/json"})
        wait_until(lambda: server.health()["waiting_pictures"] == 1)
        connection.close()
        wait_until(lambda: server.health()["requests"] == 1)
        reward.open.set()
        assert first.result()[2]["scores"] == [0]
    assert reward.calls == [[0]]


# ---- What is wrong is refused ----


def header_of_a_png(size: int) -> str:
    """A valid beginning, which announces `size` x `size` pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks + b"123456789").decode()


ONE = png(Image.new("RGB", (2, 2)))
DAMAGED = base64.b64encode(base64.b64decode(png(noise(1)[0]))[:-200]).decode()


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def small_server():
    PartialState(cpu=True)
    reward = Gate()
    reward.open.set()
    limits = {"max_body_mib": 1, "max_images": 4, "max_megapixels": 0.01, "request_timeout": 0.5}
    with serving(reward, **limits) as server:
        yield server


@pytest.mark.parametrize(
    "raw, status, reason",
    [
        (b"", 400, "the body is no JSON"),
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe{}", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"9" * 10_000, 400, "the body is no JSON"),
        (b"[]", 400, "expected an object"),
        (b"{}", 400, "expected an object"),
        ({"prompts": [], "images": []}, 400, "images: expected a list"),
        ({"prompts": ["p"], "images": ONE}, 400, "images: expected a list"),
        ({"prompts": ["p"], "images": [ONE], "pickle": "gASV"}, 400, "expected an object"),
        ({"prompts": [], "images": [ONE]}, 400, "prompts: expected a list of 1"),
        ({"prompts": "p", "images": [ONE]}, 400, "prompts: expected a list of 1"),
        ({"prompts": [1], "images": [ONE]}, 400, "prompts: expected texts"),
        ({"prompts": ["p"] * 5, "images": [ONE] * 5}, 413, "5 pictures: this server takes 4"),
        ({"prompts": ["p"], "images": [ONE], "columns": []}, 400, "columns: expected lists of 1"),
        ({"prompts": ["p"], "images": [ONE], "columns": [1]}, 400, "columns: expected lists of 1"),
        ({"prompts": ["p"], "images": [ONE], "columns": {"a": [1, 2]}}, 400, "columns: expected lists of 1"),
        ({"prompts": ["p"], "images": [ONE], "columns": {"images": [1]}}, 400, "images cannot be the name"),
        ({"prompts": ["p"], "images": [None]}, 400, r"images\[0\] is no base64 of a PNG"),
        ({"prompts": ["p"], "images": ["!"]}, 400, r"images\[0\] is no base64 of a PNG"),
        ({"prompts": ["p", "p"], "images": [ONE, "é"]}, 400, r"images\[1\] is no base64 of a PNG"),
        ({"prompts": ["p"], "images": ["aGVsbG8="]}, 400, r"images\[0\] is no base64 of a PNG"),
        ({"prompts": ["p"], "images": [jpeg()]}, 400, r"images\[0\] is no base64 of a PNG"),
        ({"prompts": ["p"], "images": [DAMAGED]}, 400, r"images\[0\] is a damaged PNG"),
        ({"prompts": ["p"], "images": [header_of_a_png(5_000)]}, 413, "more than 0.01 megapixels"),
        ({"prompts": ["p"], "images": [header_of_a_png(30_000)]}, 413, r"images\[0\] is too large"),
        ({"prompts": ["p"] * 2, "images": [png(Image.new("1", (80, 80)))] * 2}, 413, "more than 0.01 megapixels"),
    ],
)
def test_a_body_that_holds_no_request(small_server, raw, status, reason):
    raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    answered, _, answer = ask(small_server, raw=raw)
    assert answered == status
    assert set(answer) == {"error"} and re.search(reason, answer["error"])


@pytest.mark.parametrize(
    "method, path, headers, status, reason",
    [
        ("GET", "/admin", {}, 404, "/admin: expected one of /, /health, /score"),
        ("GET", "/score", {}, 405, "/score takes POST only"),
        ("PUT", "/score", {}, 405, "/score takes POST only"),
        ("POST", "/health", {}, 405, "/health takes GET only"),
        ("HEAD", "/", {}, 405, None),
        ("BREW", "/", {}, 501, "Unsupported method ('BREW')"),
        ("POST", "/score", {"Content-Type": "text/plain"}, 415, "expected Content-Type: application/json"),
        ("POST", "/score", {"Content-Length": "many"}, 411, "expected a Content-Length"),
        ("POST", "/score", {"Content-Length": "-1"}, 411, "expected a Content-Length"),
        ("POST", "/score", {"Transfer-Encoding": "chunked"}, 411, "expected a Content-Length"),
        (
            "POST",
            "/score",
            {"Content-Length": "99999999999"},
            413,
            "99999999999 bytes: this server takes 1048576 at once",
        ),
    ],
)
def test_a_request_of_the_wrong_kind(small_server, method, path, headers, status, reason):
    answered, sent, answer = ask(small_server, method, path, headers=headers)
    assert answered == status
    assert (answer and answer["error"]) == reason
    assert sent["Content-Type"] == "application/json"
    if status == 405:
        assert sent["Allow"] == reason.split()[-2] if reason else "GET"


@pytest.mark.parametrize("bytes_sent", [b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 70_000])
def test_what_is_no_http_is_answered_and_ends(small_server, bytes_sent):
    with socket.create_connection(small_server.server_address[:2], timeout=30) as connection:
        connection.sendall(bytes_sent)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"error" in received and b"Traceback" not in received


def test_a_body_larger_than_it_may_be_is_halved_by_the_client(small_server):
    pictures = noise(4, size=40)  # 1,600 pixels each
    small_server.reward.calls.clear()
    client = RemoteReward(small_server.url, batch_size=100)
    assert len(client(prompts=["p"] * 40, images=pictures * 10)) == 40
    assert max(map(len, small_server.reward.calls)) <= 4  # the limit of pictures
    client = RemoteReward(small_server.url, max_wait=0.1)
    with pytest.raises(ValueError, match=r"does not take one picture: HTTP 413: more than 0.01 megapixels"):
        client(prompts=["p"], images=noise(1, size=200))
    # Megabytes that the server never looks at: the answer arrives all the same, even at a client that first sends all.
    assert ask(small_server, raw=b" " * 5_000_000)[0] == 413
    with pytest.raises(ValueError, match=r"does not take one picture: HTTP 413: \d+ bytes"):
        client(prompts=["p"], images=noise(1, size=800))


@pytest.mark.parametrize("slowly", ["closed", "silent", "dribbling", "dribbling header"])
def test_a_client_that_does_not_finish_is_not_waited_for(small_server, slowly):
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n"
    with socket.create_connection(small_server.server_address[:2], timeout=30) as connection:
        connection.sendall(head)
        if slowly != "dribbling header":
            connection.sendall(b"\r\n{")
        if slowly == "closed":
            connection.shutdown(socket.SHUT_WR)
        received = b""
        connection.settimeout(0.1 if slowly.startswith("dribbling") else 30)
        # A client that dribbles stops at the first thing that it hears.
        with contextlib.suppress(ConnectionError):
            while True:
                try:
                    received += (piece := connection.recv(65536))
                    if not piece:
                        break
                except TimeoutError:
                    connection.sendall(b"x")
    if slowly != "dribbling header":
        assert received.startswith(b"HTTP/1.1 408 ") and b"of 5000 bytes came" in received
    wait_until(lambda: small_server.health()["requests"] == 0)


def test_silent_connections_do_not_stop_the_server(monkeypatch):
    monkeypatch.setattr(RewardServer, "max_connections", 3)
    monkeypatch.setattr(RewardServer, "header_timeout", 1.0)
    with serving(shapes_reward) as server, contextlib.ExitStack() as stack:
        address = server.server_address[:2]
        silent = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)]
        wait_until(lambda: len(server._deadlines) == 3)
        connection = HTTPConnection(*address, timeout=30)
        connection.connect()
        connection.sock.settimeout(30)
        assert connection.sock.recv(100).startswith(b"HTTP/1.1 503 Too many connections\r\nRetry-After: 1\r\n")
        assert len(server._deadlines) == 3
        # They are closed long before request_timeout, and there is room again.
        assert [connection.recv(1) for connection in silent] == [b""] * 3
        wait_until(lambda: not server._deadlines)
        assert ask(server, "GET", "/health")[0] == 200


def test_no_more_connections_than_the_system_allows():
    accepted = []

    class Counting(RewardServer):
        def get_request(self):
            accepted.append(1)
            return super().get_request()

    resource = pytest.importorskip("resource")
    server = Counting(shapes_reward, port=0)
    server.start()
    server.wait_until_ready()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as connection:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (connection.fileno(), limits[1]))
            connection.connect(server.server_address)
            wait_until(lambda: len(accepted) >= 3)
            time.sleep(0.5)
            assert len(accepted) < 50  # thousands, if it tried as fast as it can
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        connection.settimeout(30)
        assert connection.recv(12) == b"HTTP/1.1 200"
    server.stop()


@pytest.mark.parametrize("result", [[0.5], ["high", "low"], 3])
def test_a_reward_that_returns_no_scores_is_not_asked_again(result):
    calls = []

    def reward(images, **kwargs):
        calls.append(1)
        return result

    with serving(reward) as server:
        with pytest.raises(ValueError, match="HTTP 422: Reward 'reward' returned"):
            RemoteReward(server.url)(prompts=["p"] * 2, images=numbered(2))
    assert len(calls) == 1


def _leaving(images, prompts, **kwargs):
    if "bad" in prompts:
        sys.exit(3)
    return [1.0] * len(images)


async def _leaving_later(**kwargs):
    await asyncio.sleep(0)
    return _leaving(**kwargs)


@pytest.mark.parametrize("reward", [_leaving, _leaving_later])
def test_a_reward_that_wants_to_end_the_process_loses_a_sample(reward):
    with serving(reward) as server:
        _, _, answer = ask(server, body={"prompts": ["good", "bad", "good"], "images": [ONE] * 3})
    assert answer["scores"] == [1.0, None, 1.0] and answer["failed"] == [1]
    assert answer["error"] == "RuntimeError: the reward called exit(3)"


def test_a_reward_that_itself_waits_for_a_server():
    class Judge(Reward):
        calls = 0

        def __call__(self, prompts, images, **kwargs):
            self.calls += 1
            if self.calls == 1:
                raise RewardUnavailableError("the judge is gone")
            return [1.0] * len(images)

    with serving(Judge()) as server:
        status, headers, answer = ask(server, body={"prompts": ["p"] * 2, "images": [ONE] * 2})
        assert (status, answer) == (503, {"error": "the judge is gone"}) and int(headers["Retry-After"]) > 0
        assert server.reward.calls == 1


# ---- Loading, and settings ----


def test_a_server_that_is_still_loading_says_so():
    class Slow(Reward):
        def __init__(self):
            self.load = threading.Event()

        def prepare(self, device):
            assert device.type == "cpu"
            assert self.load.wait(30)

        def __call__(self, prompts, images, **kwargs):
            return [1.0] * len(images)

    reward = Slow()
    server = RewardServer(reward, port=0, device="cpu")
    server.start()
    status, _, health = ask(server, "GET", "/health")
    assert status == 503
    assert health == {
        "name": "Slow",
        "version": trl_flow.__version__,
        "scope": "sample",
        "ready": False,
        "requests": 0,
        "waiting_pictures": 0,
        "scored": 0,
    }
    status, _, answer = ask(server, body={"prompts": ["p"], "images": [ONE]})
    assert (status, answer) == (503, {"error": "the reward is being loaded"})
    # Neither is where it comes from known yet: which commit of its weights, say.
    assert ask(server, "GET", "/")[0] == 503
    reward.load.set()
    server.wait_until_ready()
    status, _, health = ask(server, "GET", "/health")
    assert status == 200 and health["ready"]
    assert ask(server, body={"prompts": ["p"], "images": [ONE]})[0] == 200
    server.stop()
    with pytest.raises(OSError):
        ask(server, "GET", "/health")


def test_a_reward_that_cannot_be_loaded():
    class Broken(Reward):
        def prepare(self, device):
            raise ImportError("pip install something")

    server = RewardServer(Broken(), port=0)
    server.start()
    with pytest.raises(ImportError, match="pip install something"):
        server.wait_until_ready()
    server.stop()


def test_settings_that_make_no_sense(monkeypatch):
    for setting in ("batch_size", "max_queue", "max_body_mib", "max_images", "max_megapixels", "request_timeout"):
        with pytest.raises(ValueError, match=f"{setting}=0: expected more than 0"):
            RewardServer(shapes_reward, port=0, **{setting: 0})
    for host in ("0.0.0.0", "", "192.168.0.1", "example.com", "::"):
        with pytest.raises(ValueError, match=f"host='{host}' can be reached from other machines: give a token"):
            RewardServer(shapes_reward, host=host, port=0)
    with pytest.raises(ValueError, match="token: expected printable ASCII"):
        RewardServer(shapes_reward, port=0, token="two words")
    with pytest.raises(ValueError, match="'whole' takes whole videos"):

        def whole(videos, **kwargs):
            return []

        RewardServer(whole, port=0)
    with pytest.raises(ValueError, match="port=70000: expected 0 to 65535"):
        RewardServer(shapes_reward, port=70_000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port={port}: Address already in use. Take another port"):
            RewardServer(shapes_reward, port=port)
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    RewardServer(shapes_reward, host="0.0.0.0", port=0).stop()

    for url in ("localhost:8000", "ftp://host", "http://", ""):
        with pytest.raises(ValueError, match="expected the address of a reward server"):
            RemoteReward(url)
    with pytest.raises(ValueError, match="expected nothing but an address") as caught:
        RemoteReward("http://user:hunter2@host:80")
    assert "hunter2" not in str(caught.value)
    for name in ("timeout", "max_wait", "batch_size", "max_workers"):
        with pytest.raises(ValueError, match=f"{name}=0: expected"):
            RemoteReward("http://host", **{name: 0})


def test_token(monkeypatch, caplog):
    body = {"prompts": ["p"], "images": [ONE]}
    with serving(shapes_reward, token="open-sesame") as server, caplog.at_level(logging.DEBUG):
        assert ask(server, "GET", "/health")[0] == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "open-sesame"}):
            for method, path in (("GET", "/"), ("POST", "/score")):
                status, headers, _ = ask(server, method, path, body=body, headers=given)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
        for client in (RemoteReward(server.url), RemoteReward(server.url, token="wrong")):
            with pytest.raises(RewardUnavailableError, match=f"refuses the token.*{TOKEN_VARIABLE}"):
                client(prompts=["a red circle"], images=noise(1))
        given = RemoteReward(server.url, token="open-sesame")
        monkeypatch.setenv(TOKEN_VARIABLE, "open-sesame")
        for client in (given, RemoteReward(server.url)):
            assert client(prompts=["a red circle"], images=noise(1)) == [0.0]
            assert "sesame" not in f"{client!r} {client.source} {client.served} {vars(client)}"
    assert "sesame" not in caplog.text


# ---- Servers that go, come back, and talk nonsense ----


@contextlib.contextmanager
def listening(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def answering(*answers):
    """A server that gives these answers in turn, (status, headers, body), the last one for ever. Counts in `asked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = answers[min(len(server.asked), len(answers) - 1)]
            server.asked.append(self.path)
            if status is None:  # hangs up
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "nonsense", "scope": "sample"}')

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    with listening(server):
        yield server


GOOD = (200, {}, b'{"scores": [0.25, null]}')


@pytest.mark.parametrize("status", [None, 408, 429, 500, 503])
def test_what_may_pass_is_tried_again(status, monkeypatch, caplog):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    with answering((status, {}, b"<html>busy</html>"), (status, {}, b""), GOOD) as server:
        assert RemoteReward(server.url)(prompts=["p", "q"], images=numbered(2)) == [0.25, None]
        assert server.asked == ["/score"] * 3
    assert [record.message.split("(")[0] for record in caplog.records if record.name == remote.__name__] == [
        f"Reward server {server.url} does not answer ",
        f"Reward server {server.url} answers again.",
    ]


@pytest.mark.parametrize(
    "status, headers, body, error, message",
    [
        (
            400,
            {},
            b'{"error": "images[0] is blue"}',
            ValueError,
            r"refuses the request \(HTTP 400: images\[0\] is blue",
        ),
        (404, {}, b"<html>", ValueError, r"HTTP 404: <html>"),
        (422, {}, b"", ValueError, "HTTP 422: Unprocessable"),
        (301, {"Location": "http://localhost:1/score"}, b"", ValueError, "HTTP 301"),
        (401, {}, b"", RewardUnavailableError, "refuses the token"),
        (403, {}, b"", RewardUnavailableError, "refuses the token"),
        (200, {}, b"<html>hello</html>", ValueError, "answers, but not as a reward server does: '<html>hello"),
        (200, {}, b"\xff", ValueError, "answers, but not as a reward server does"),
        (200, {}, b"[0.5, 0.5]", ValueError, "answers, but not as a reward server does"),
        (
            200,
            {},
            b'{"name": "else", "scores": [1, 2]}',
            RewardUnavailableError,
            "serves 'else', and .* served 'nonsense' when",
        ),
        (200, {}, b"{}", ValueError, "expected 'scores', 2 numbers or null"),
        (200, {}, b'{"scores": [0.5]}', ValueError, "expected 'scores', 2 numbers or null"),
        (200, {}, b'{"scores": [0.5, "0.5"]}', ValueError, "expected 'scores', 2 numbers or null"),
        (200, {}, b'{"scores": [0.5, true]}', ValueError, "expected 'scores', 2 numbers or null"),
        (200, {}, b'{"scores": [0.5, 0.5], "failed": [2]}', ValueError, "expected 'scores', 2 numbers or null"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status, headers, body, error, message):
    with answering((status, headers, body)) as server:
        with pytest.raises(error, match=message):
            RemoteReward(server.url)(prompts=["p", "q"], images=numbered(2))
        assert server.asked == ["/score"]


def test_a_server_that_is_gone_for_good():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        client = RemoteReward(url, max_wait=0.3)
        with pytest.raises(RewardUnavailableError, match=rf"{url} has not answered for \d+ s \(ConnectError"):
            client(prompts=["p"], images=numbered(1))
    with answering((503, {"Retry-After": "50"}, b"")) as server:
        with pytest.raises(RewardUnavailableError, match="has not answered.*HTTP 503"):
            RemoteReward(server.url, max_wait=0.3)(prompts=["p"] * 40, images=numbered(40))


CLIENT = """
import sys
import threading

from accelerate import PartialState
from PIL import Image

from trl_flow.rewards import RewardThreads, start_scoring
from trl_flow.rewards.remote import RemoteReward

PartialState(cpu=True)
client = RemoteReward(sys.argv[1], max_wait=3600)
assert client.scope == "sample"
scores = start_scoring(RewardThreads(), [client], ["remote"], ["p"] * 40, [Image.new("RGB", (2, 2))] * 40)
print("waiting", flush=True)
scores()
"""


def test_ctrl_c_ends_a_process_that_waits_for_its_server():
    with answering((503, {}, b"")) as server:
        command = [sys.executable, "-c", CLIENT, server.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "waiting\n", process.stderr.read()
            wait_until(lambda: len(server.asked) >= 3)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)  # the server may be gone for an hour
        finally:
            process.kill()
            process.communicate()
    assert "KeyboardInterrupt" in said and process.returncode != 0


def test_retries_leave_the_random_numbers_of_the_run_alone():
    with answering((503, {}, b""), GOOD) as server:
        before = random.getstate(), np.random.get_state()[1].tolist()
        RemoteReward(server.url)(prompts=["p", "q"], images=numbered(2))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before


# A server for each port that is written to it, one after the other, without importing everything anew.
SERVERS = """
import os
import sys
import time

from trl_flow.rewards.server import serve


def slow(images, **kwargs):
    with open(sys.argv[1], "a") as file:
        file.write("call\\n")
    time.sleep(0.05)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    return [image.getpixel((0, 0))[0] / 3 for image in images]


for port in sys.stdin:
    if not (process := os.fork()):
        serve(slow, port=int(port), batch_size=2)
        sys.exit()
    print(process, flush=True)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_server_that_is_killed_and_started_again_costs_nothing(tmp_path):
    calls, gate = tmp_path / "calls.txt", tmp_path / "open"
    calls.touch()
    gate.touch()
    images, expected = numbered(24), [number / 3 for number in range(24)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    servers = subprocess.Popen([sys.executable, "-c", SERVERS, str(calls), str(gate)], text=True, bufsize=1, **pipes)
    process = None

    def start(port):
        """A server's process and address, in whichever order they are printed."""
        servers.stdin.write(f"{port}\n")
        lines = sorted(servers.stdout.readline() for _ in range(2))
        assert lines[1].startswith("Reward 'slow' is served at http://127.0.0.1:")
        return int(lines[0]), lines[1].split()[5]

    try:
        process, url = start(0)
        with ThreadPoolExecutor(1) as executor:
            client = RemoteReward(url, max_workers=2)
            scores = executor.submit(client, prompts=["p"] * 24, images=images)
            wait_until(lambda: len(calls.read_text().splitlines()) >= 3)
            os.kill(process, signal.SIGKILL)
            assert servers.stdout.readline() == f"{-signal.SIGKILL}\n"
            assert not scores.done()
            process, again = start(url.rpartition(":")[2])
            assert again == url
            assert scores.result() == expected

            # Asked to stop, it still answers those who wait.
            gate.unlink()
            client = RemoteReward(url, max_workers=12, max_wait=10.0)
            scores = executor.submit(client, prompts=["p"] * 24, images=images)
            wait_until(lambda: health_at(url)["waiting_pictures"] == 22)  # and two are being scored
            os.kill(process, signal.SIGTERM)
            gate.touch()
            assert servers.stdout.readline() == "0\n"
            process = None
            assert scores.result() == expected
    finally:
        if process is not None:
            os.kill(process, signal.SIGKILL)
        servers.stdin.close()
        servers.wait()


def health_at(url: str) -> dict:
    connection = HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def test_a_server_without_trl_flow():
    """The example, which shares no code with the client, with another reward in place of its model."""
    path = Path(__file__).parents[2] / "examples" / "rewards" / "deqa_server.py"
    spec = importlib.util.spec_from_file_location("deqa_server", path)
    module = importlib.util.module_from_spec(spec)
    before = Image.MAX_IMAGE_PIXELS
    spec.loader.exec_module(module)
    Image.MAX_IMAGE_PIXELS = before

    def reward(prompts, images, columns):
        if "bad" in columns["target"]:
            raise RuntimeError("a bad picture")
        return [NAN if number_of(image) == 3 else len(prompts[0]) + number_of(image) for image in images]

    server = module.Server(reward, "example", 0)
    server.RequestHandlerClass.log_message = lambda *args: None
    server.RequestHandlerClass.timeout = 1.0
    with listening(server):
        client = RemoteReward(f"http://127.0.0.1:{server.server_port}", batch_size=4)
        targets = ["good"] * 5 + ["bad"] * 2 + ["good"]
        scores = client(prompts=["p"] * 8, images=numbered(8), target=targets)
        assert client.requires == () and client.prompt_set is None
        assert client.source == {"reward": "example", "server": client.url}
        body = {"prompts": ["p"], "images": [ONE], "columns": {"target": ["bad"]}}
        assert ask(server, body=body)[2]["error"] == "RuntimeError('a bad picture')"
        assert ask(server, body=body, headers={"Content-Type": "text/plain"})[0] == 415
        for length in ("-1", "many", ""):
            assert ask(server, headers={"Content-Length": length})[0] == 411
        assert ask(server, headers={"Content-Length": str(module.MAX_BODY + 1)})[0] == 413
    assert scores[:3] == [1, 2, 3] and scores[4] == 5 and scores[7] == 8
    assert [number for number, value in enumerate(scores) if math.isnan(value)] == [3, 5, 6]
