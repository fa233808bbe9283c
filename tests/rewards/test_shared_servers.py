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

"""Reward servers that many share: clients take turns, a full queue makes them wait, and one of several may die."""

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from accelerate import PartialState
from PIL import Image
from test_reward_server import Gate, ask, listening, number_of, numbered, png, serving, wait_until

from trl_flow.rewards import Reward, RewardUnavailableError
from trl_flow.rewards.remote import CLIENT_HEADER, TOKEN_VARIABLE, RemoteReward, request_within
from trl_flow.rewards.server import RewardServer


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    PartialState(cpu=True)  # what the libraries' loggers ask for
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def body(number: int) -> dict:
    return {"prompts": ["p"], "images": [png(numbered(number + 1)[number])]}


# ---- One server for all ----


@pytest.mark.parametrize("scope", ["sample", "group"])
def test_who_sends_little_does_not_wait_for_who_sends_much(scope):
    """A client's 8 requests are in the queue before another one's 2: they take turns, each in its own order."""
    reward = Gate(scope)
    with serving(reward, batch_size=1) as server, ThreadPoolExecutor(11) as executor:
        answers = [executor.submit(ask, server, body=body(0), headers={CLIENT_HEADER: "much"})]
        assert reward.begun.wait(30)
        for number, client in enumerate(["much"] * 8 + ["little"] * 2, start=1):
            answers.append(executor.submit(ask, server, body=body(number), headers={CLIENT_HEADER: client}))
            wait_until(lambda number=number: len(server._waiting) == number)
        reward.open.set()
        assert [answer.result()[0] for answer in answers] == [200] * 11
    assert reward.calls == [[0], [9], [1], [10], [2], [3], [4], [5], [6], [7], [8]]


def test_a_batch_has_something_of_everyone():
    reward = Gate()
    with serving(reward, batch_size=4) as server, ThreadPoolExecutor(11) as executor:
        answers = [executor.submit(ask, server, body=body(0), headers={CLIENT_HEADER: "a"})]
        assert reward.begun.wait(30)
        for number, client in enumerate("aaaaaabbcc", start=1):
            answers.append(executor.submit(ask, server, body=body(number), headers={CLIENT_HEADER: client}))
            wait_until(lambda number=number: len(server._waiting) == number)
        reward.open.set()
        assert [answer.result()[0] for answer in answers] == [200] * 11
    assert reward.calls == [[0], [7, 9, 1, 8], [10, 2, 3, 4], [5, 6]]


def test_a_full_queue_is_entered_in_turn_too():
    """Whoever finds it full waits at the door, unread; there is no rush for the next free place."""
    reward = Gate()
    with serving(reward, batch_size=1, max_queue=1) as server, ThreadPoolExecutor(7) as executor:
        answers = [executor.submit(ask, server, body=body(0), headers={CLIENT_HEADER: "much"})]
        assert reward.begun.wait(30)
        for number, client in enumerate(["much"] * 4 + ["little"] * 2, start=1):
            answers.append(executor.submit(ask, server, body=body(number), headers={CLIENT_HEADER: client}))
            wait_until(lambda number=number: len(server._entering) == number)
        assert server.health()["requests"] == 1 and server._held < 10_000
        reward.open.set()
        assert [answer.result()[0] for answer in answers] == [200] * 7
    assert reward.calls == [[0], [5], [1], [6], [2], [3], [4]]


def test_four_clients_of_a_slow_server_with_a_small_queue_lose_nothing(monkeypatch):
    """Each would send four requests at a time; two are in the server, and clients that are sent away come again."""
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.1)
    most, servers, sent_away = [], [], []

    def slow(images, **kwargs):
        most.append(servers[0].health()["requests"])
        time.sleep(0.02)
        return [number_of(image) for image in images]

    admit = RewardServer.admit

    def counted(*args):
        try:
            admit(*args)
        except Exception:
            sent_away.append(True)
            raise

    monkeypatch.setattr(RewardServer, "admit", counted)
    with serving(slow, batch_size=2, max_queue=2) as server, ThreadPoolExecutor(4) as executor:
        servers.append(server)
        clients = [RemoteReward(server.url, batch_size=1, max_wait=30) for _ in range(4)]
        pictures = [numbered(100 * rank + 20)[100 * rank :] for rank in range(4)]
        scores = [
            executor.submit(client, prompts=["p"] * 20, images=images)
            for client, images in zip(clients, pictures, strict=True)
        ]
        assert [score.result() for score in scores] == [list(range(100 * r, 100 * r + 20)) for r in range(4)]
        assert server.scored == 80
    assert max(most) <= 2 and sent_away


def test_a_server_that_is_busy_for_others_is_no_reason_to_give_up(monkeypatch):
    """`max_wait` passes several times over before the client has its turn; each time it looks, others' pictures have."""
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.05)
    looks, health = [], RewardServer.health

    def counted(server):
        looks.append(True)
        server.scored += 1
        return health(server)

    monkeypatch.setattr(RewardServer, "health", counted)
    with serving(Numbers(), max_queue=1) as server, ThreadPoolExecutor(1) as executor:
        client = RemoteReward(server.url, max_wait=0.2)
        assert client.scope == "sample"
        with server._changed:
            server._admitted = 1  # somebody else has the only place
        scores = executor.submit(client, prompts=["p"], images=numbered(2)[1:])
        wait_until(lambda: len(looks) == 4)
        assert not scores.done()
        with server._changed:
            server._admitted = 0
            server._let_in()
        assert scores.result() == [1.0]


def test_what_one_request_sees_of_a_busy_server_holds_for_all(monkeypatch):
    """Four requests find at about the same time that they have waited for `max_wait`: one alone sees the number rise."""
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.05)
    looks, health, admit = [], RewardServer.health, RewardServer.admit

    def counted(server):
        looks.append(True)
        return health(server)

    def refusing(server, *args):
        try:
            admit(server, *args)
        except Exception:
            server.scored += 1  # of others
            raise

    monkeypatch.setattr(RewardServer, "health", counted)
    monkeypatch.setattr(RewardServer, "admit", refusing)
    with serving(Numbers(), max_queue=1) as server, ThreadPoolExecutor(1) as executor:
        client = RemoteReward(server.url, batch_size=1, max_wait=2)
        assert client.scope == "sample"
        with server._changed:
            server._admitted = 1  # somebody else has the only place
        scores = executor.submit(client, prompts=["p"] * 4, images=numbered(4))
        wait_until(lambda: len(looks) >= 4 or scores.done())
        assert not scores.done()
        with server._changed:
            server._admitted = 0
            server._let_in()
        assert scores.result() == [0.0, 1.0, 2.0, 3.0]


def test_a_server_that_is_busy_and_scores_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(RewardServer, "entry_timeout", 0.05)
    reward = Gate()
    with serving(reward, max_queue=1) as server, ThreadPoolExecutor(1) as executor:
        first = executor.submit(ask, server, body=body(0))
        assert reward.begun.wait(30)
        with pytest.raises(RewardUnavailableError, match="has not answered.*1 requests are waiting already"):
            RemoteReward(server.url, max_wait=0.3)(prompts=["p"], images=numbered(1))
        reward.open.set()
        assert first.result()[0] == 200


# ---- Copies on several devices ----


class Copy(Reward):
    """Two copies answer when both have been called: one after the other, they would wait for ever."""

    together = threading.Barrier(2)

    def __init__(self, scale=1.0):
        self.scale, self.threads, self.device = scale, set(), None

    def prepare(self, device):
        self.device = device

    def __call__(self, images, **kwargs):
        self.threads.add(threading.get_ident())
        self.together.wait(30)
        return [self.scale * number_of(image) for image in images]


def test_copies_share_a_queue():
    copies = [Copy(), Copy()]
    with serving(copies, batch_size=4, device=["cpu", "cpu:0"], spec="my.rewards.Copy") as server:
        client = RemoteReward(server.url, batch_size=4)
        assert client(prompts=["p"] * 32, images=numbered(32)) == list(range(32))
    assert [copy.device.type for copy in copies] == ["cpu", "cpu"]
    assert all(len(copy.threads) == 1 for copy in copies) and copies[0].threads != copies[1].threads


def test_copies_are_loaded_one_after_the_other():
    """transformers sets torch's default type while it loads, for all threads."""
    loading, most = [], []

    class Loads(Copy):
        def prepare(self, device):
            loading.append(self)
            most.append(len(loading))
            time.sleep(0.05)
            loading.remove(self)

    with serving([Loads(), Loads()], device=["cpu", "cpu"], spec="my.rewards.Loads"):
        assert most == [1, 1]


def test_where_it_computes_is_no_part_of_its_fingerprint():
    class Placed(Reward):
        def __init__(self, device=None, offload=False, scale=1.0):
            self.device, self.offload, self.scale = device, offload, scale

    def fingerprint(**settings):
        with serving(Placed(**settings)) as server:
            return server.fingerprint

    assert fingerprint() == fingerprint(device="cpu", offload=True) != fingerprint(scale=2.0)


def test_devices_that_make_no_sense():
    def function(images, **kwargs):
        return [0.0] * len(images)

    with pytest.raises(ValueError, match="Reward 'function' is a function, .*: give one device, or none"):
        RewardServer([function, function], port=0, device=["cpu", "cpu"])
    with pytest.raises(ValueError, match="1 copies of 'Copy' for 2 devices: expected one for each"):
        RewardServer(Copy(), port=0, device=["cpu", "cpu"])
    with pytest.raises(ValueError, match="device='cuda:99': this process sees no such device"):
        RewardServer(Copy(), port=0, device="cuda:99")


def test_a_device_for_what_loads_nothing(monkeypatch, caplog):
    monkeypatch.setattr("trl_flow.rewards.server.check_device", lambda device: None)  # as if it were there

    def function(images, **kwargs):
        return [0.0] * len(images)

    class Computes(Reward):
        __call__ = function

    for reward, device, warned in (
        *((function, "cuda:1", True), (Computes(), "cuda:1", True), (Copy(), "cuda:1", False)),
        *((function, "cpu", False), (Computes(), None, False)),
    ):
        caplog.clear()
        RewardServer(reward, port=0, device=device, spec="my.rewards.some")
        assert ("Reward 'some' loads nothing, and so nothing onto cuda:1" in caplog.text) == warned


# ---- Several servers ----


class Numbers(Reward):
    def __init__(self, scale=1.0):
        self.scale = scale
        self.calls = []

    def __call__(self, images, **kwargs):
        self.calls.append([number_of(image) for image in images])
        return [self.scale * number for number in self.calls[-1]]


def test_requests_are_spread_over_servers():
    """Each of two servers holds its first call until the other one has one, too."""
    rewards = [Gate(), Gate()]
    with serving(rewards[0], spec="n") as first, serving(rewards[1], spec="n") as second:
        client = RemoteReward([first.url, f"{second.url}/"], batch_size=1, max_workers=2)
        assert client.source["server"] == f"{first.url}, {second.url}"
        with contextlib.ExitStack() as stack:
            executor = stack.enter_context(ThreadPoolExecutor(1))
            for reward in rewards:
                stack.callback(reward.open.set)
            scores = executor.submit(client, prompts=["p"] * 12, images=numbered(12))
            wait_until(lambda: first.health()["requests"] == second.health()["requests"] == 2)  # max_workers to each
            for reward in rewards:
                reward.open.set()
            assert scores.result() == list(range(12))
    assert sorted(sum(rewards[0].calls + rewards[1].calls, [])) == list(range(12))


def test_when_one_of_several_dies_the_others_go_on(caplog):
    """It dies with requests of which nobody will hear again; they are asked for at the other one."""
    dying, lasting = Gate(), Numbers()
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(serving(lasting, spec="numbers"))
        relay = stack.enter_context(Relay())
        server = stack.enter_context(serving(dying, spec="numbers"))
        stack.callback(dying.open.set)
        relay.to = server
        client = RemoteReward([relay.url, other.url], batch_size=1, max_wait=30)
        executor = stack.enter_context(ThreadPoolExecutor(1))
        with caplog.at_level(logging.WARNING):
            scores = executor.submit(client, prompts=["p"] * 40, images=numbered(40))
            assert dying.begun.wait(30)
            relay.die()
            assert scores.result() == list(range(40))
            assert client(prompts=["p"] * 8, images=numbered(8)) == list(range(8))
        assert caplog.text.count(f"Reward server {relay.url} does not answer (") == 1
        assert "The others go on." in caplog.text and other.url not in caplog.text


def test_a_server_that_hangs_is_left_for_another_one():
    hanging, lasting = Gate(), Numbers()
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(serving(lasting, spec="numbers"))
        server = stack.enter_context(serving(hanging, spec="numbers"))
        stack.callback(hanging.open.set)
        client = RemoteReward([server.url, other.url], timeout=0.3, batch_size=1, max_wait=30)
        assert client(prompts=["p"] * 16, images=numbered(16)) == list(range(16))
        assert len(hanging.calls) == 1


def test_servers_of_different_rewards_are_refused():
    with (
        serving(Numbers(), spec={"n": {"scale": 1}}) as first,
        serving(Numbers(2.0), spec={"n": {"scale": 2}}) as second,
    ):
        client = RemoteReward([first.url, second.url], batch_size=1)
        with pytest.raises(RewardUnavailableError, match="serves 'n' with other settings"):
            client(prompts=["p"] * 16, images=numbered(16))


def test_addresses_that_make_no_sense():
    with pytest.raises(ValueError, match=r"url=\[\]: expected the address of a reward server, or several"):
        RemoteReward([])
    with pytest.raises(ValueError, match="url names http://a:1 twice"):
        RemoteReward(["http://a:1", "http://a:1/"])
    with pytest.raises(ValueError, match="url='b:1': expected the address of a reward server"):
        RemoteReward(["http://a:1", "b:1"])


class Relay:
    """A server's address that can die: connections to it are cut, and nobody listens any more."""

    def __init__(self):
        self.to = None
        self.dead = False
        self.connections = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.die()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.to.server_address[:2])
                self.connections += [client, server]
                if self.dead:  # while this one was on its way
                    self.die()
                    return
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self.pump, args=(source, target), daemon=True).start()

    def pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def die(self):
        self.dead = True
        for connection in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def test_an_answer_in_drops_is_not_waited_for_for_ever():
    """Each drop comes in time, and the whole would take an hour."""
    asked = []

    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "drops", "scope": "sample"}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(600 if len(asked) == 1 else 0):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                self.wfile.write(json.dumps({"scores": [0.5]}).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    with listening(server):
        client = RemoteReward(f"http://127.0.0.1:{server.server_port}", timeout=0.3)
        assert client(prompts=["p"], images=[Image.new("RGB", (2, 2))]) == [0.5]
    assert asked == ["/score"] * 2


@pytest.mark.parametrize("pieces", [1, 2])
def test_an_answer_that_is_late_and_whole_is_taken(pieces):
    """It would be late the next time, too."""

    class Late(httpx2.SyncByteStream):
        def __iter__(self):
            for _ in range(pieces):
                time.sleep(0.02)
                yield b"[]"

    with httpx2.Client(transport=httpx2.MockTransport(lambda request: httpx2.Response(200, stream=Late()))) as client:
        if pieces == 1:
            assert request_within(client, 0.01, "GET", "http://a").content == b"[]"
        else:
            with pytest.raises(httpx2.ReadTimeout, match="has not ended after 0.01 s"):
                request_within(client, 0.01, "GET", "http://a")
