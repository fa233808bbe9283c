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

"""A server for one reward function: scores of pictures over HTTP, batched across requests."""

import base64
import contextlib
import errno
import hashlib
import inspect
import io
import json
import logging
import math
import signal
import socket
import socketserver
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from http.server import ThreadingHTTPServer

import torch
from accelerate import PartialState
from PIL import Image

from .. import __version__
from .connection import Handler, RefusedError, Request
from .loading import SECRETS, RewardSpec, parse_reward, public_reward, reward_name
from .models import check_device
from .remote import TOKEN_VARIABLE, is_loopback, read_token
from .reward import About, Reward, RewardUnavailableError
from .scoring import RewardThreads, start_scoring, takes_videos


logger = logging.getLogger(__name__)

# Memory that a request takes until its pictures are decoded: the body, its text, its values, their PNGs.
COPIES = 4  # times its length
PIXEL = 4  # bytes: Pillow's RGB has one that is not used
_CLIENTS = 4096  # whose turns are remembered
# Rewards are loaded one after the other: transformers sets torch's default type meanwhile, for all threads.
_PREPARING = threading.Lock()
# Settings of rewards that change no score.
_PLACES = {"device", "offload"}
# What a reward function gets by these names is no column.
_RESERVED = {"prompts", "images", "completions", "videos", "trainer_state", "log_extra", "log_metric"}


class RewardServer(ThreadingHTTPServer):
    """
    Scores pictures over HTTP with one reward function.

    - `POST /score` with `{"prompts": [...], "images": [base64 of PNG, ...], "columns": {name: [...]}}` answers
      `{"name", "fingerprint", "scores": [number or null, ...], "failed": [positions], "error": text}`: null where the
      reward does not apply, or, at the positions in `failed`, where no score could be had. A client that has hung up
      and asks again with the same header `Idempotency-Key` gets what was scored meanwhile.
    - `GET /` answers what the reward is: `name`, `fingerprint`, `scope`, `requires`, `prompt_set`, `source`, `about`.
      The fingerprint stands for the reward, its settings and its `source`.
    - `GET /health` answers whether it is `ready` (status 200, else 503), and what waits. It needs no token.

    Every connection has a thread that reads and decodes. One thread scores: it takes whatever waits, up to `batch_size`
    pictures at once, so many small requests cost as little as one large one. A reward with group scope is called once
    for each request, which is a group. With copies of the reward on several devices, each has such a thread, and all take
    from one queue.

    Clients take turns, by the header `TRL-Flow-Client` or else their address: one that sends much does not keep those from
    their scores that send little. When the queue is full, a request is read no further until there is room, and sent away
    (503) after `entry_timeout` seconds.

    Args:
        reward (`Callable` or `list[Callable]`): What [`load_reward`] returns; for several devices, a copy for each.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on. Any but this machine's own needs a
            `token`.
        port (`int`, *optional*, defaults to 8000): 0 takes a free one.
        batch_size (`int`, *optional*, defaults to 16): Most pictures per call of the reward.
        max_queue (`int`, *optional*, defaults to 256): Requests that are read, wait or are scored at a time. More wait
            before they are read.
        max_body_mib (`float`, *optional*, defaults to 64): Largest request.
        max_images (`int`, *optional*, defaults to 256): Most pictures in a request.
        max_megapixels (`float`, *optional*, defaults to 64): Most pixels in all pictures of a request together.
        request_timeout (`float`, *optional*, defaults to 30): Seconds that a client may take to send a request. For its
            headers, and between requests, it has 10 at most.
        token (`str`, *optional*): What clients must know (`Authorization: Bearer ...`). By default the environment
            variable `TRL_FLOW_REWARD_TOKEN`, or else none.
        device (`str` or `list[str]`, *optional*): Where the reward computes. By default an accelerator if there is one.
        spec (`str`, `dict` or `Callable`, *optional*): What the reward was loaded by. It says its name, and is what clients
            tell other settings of the same reward by. By default the reward's own name, and the numbers and texts that it keeps as attributes.

    Attributes:
        max_connections (`int`): Most connections. More get status 503, and are closed.
        max_memory (`int`): Most bytes of the requests that are read or wait. More wait before they are read; one alone is
            taken whatever its size.
        entry_timeout (`float`): Seconds that a request waits before it is read, and then gets status 503.
        header_timeout (`float`): Seconds that a client may be silent before a request, or take for its headers.
    """

    max_connections = 512
    max_memory = 2 * 2**30
    entry_timeout = 10.0
    header_timeout = 10.0

    request_queue_size = (
        1024  # connections that the system keeps until a thread takes them; 5 is the library's default
    )
    daemon_threads = True

    def __init__(
        self,
        reward: Callable | list[Callable],
        host: str = "127.0.0.1",
        port: int = 8000,
        batch_size: int = 16,
        max_queue: int = 256,
        max_body_mib: float = 64,
        max_images: int = 256,
        max_megapixels: float = 64,
        request_timeout: float = 30.0,
        token: str | None = None,
        device: str | list[str] | None = None,
        spec: RewardSpec | None = None,
    ):
        limits = {
            "batch_size": batch_size,
            "max_queue": max_queue,
            "max_body_mib": max_body_mib,
            "max_images": max_images,
            "max_megapixels": max_megapixels,
            "request_timeout": request_timeout,
        }
        for name, value in limits.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: expected more than 0.")
        if not 0 <= port <= 65535:
            raise ValueError(f"port={port}: expected 0 to 65535.")
        token = read_token(token)
        if token is None and not is_loopback(host):
            raise ValueError(
                f"host={host!r} can be reached from other machines: give a token, best in the environment variable "
                f"{TOKEN_VARIABLE}, or take host='127.0.0.1' and an SSH tunnel."
            )
        copies = reward if isinstance(reward, list) else [reward]
        devices = device if isinstance(device, list) else [device]
        reward = copies[0]
        for name in devices:
            if name is not None:
                check_device(name)
        self.spec = reward if spec is None else spec
        self.name = reward_name(self.spec)
        self.fingerprint: str | None = None  # known when the reward is loaded
        if takes_videos(reward):
            raise ValueError(f"Reward {self.name!r} takes whole videos, and only pictures can be sent to a server.")
        if len(copies) != len(devices):
            raise ValueError(
                f"{len(copies)} copies of {self.name!r} for {len(devices)} devices: expected one for each."
            )
        if len({id(copy) for copy in copies}) < len(copies) or (len(copies) > 1 and not hasattr(reward, "prepare")):
            raise ValueError(
                f"Reward {self.name!r} is a function, which is called once at a time and on no device: give one device, or "
                "none."
            )
        elsewhere = [name for name in devices if name is not None and torch.device(name).type != "cpu"]
        if elsewhere and not _loads(reward):
            logger.warning(
                f"Reward {self.name!r} loads nothing, and so nothing onto {', '.join(elsewhere)}: it computes wherever its code "
                "says."
            )
        self.reward = reward
        self.scope = getattr(reward, "scope", "sample")
        self.requires = tuple(getattr(reward, "requires", ()))
        self.batch_size = batch_size
        self.max_queue = max_queue
        self.max_body = int(max_body_mib * 2**20)
        self.max_images = max_images
        self.max_pixels = max_megapixels * 1e6
        self.request_timeout = request_timeout
        self.header_timeout = min(self.header_timeout, request_timeout)
        self.token = token
        self.copies = [_Copy(copy, name) for copy, name in zip(copies, devices, strict=True)]
        self.ready = False
        self.error: BaseException | None = None  # why it never became ready
        self.stopping = False
        self.scored = 0  # pictures
        self._changed = threading.Condition()
        self._entering: list[Request] = []  # not read yet
        self._waiting: list[Request] = []  # for their scores
        self._turns = {"entering": _Turns(), "waiting": _Turns()}
        self._begun: dict[str, Request] = {}  # by key: what is being scored, or was for clients that have hung up
        self._admitted = 0
        self._held = 0  # bytes
        # Open connections, and when each must have sent its request.
        self._deadlines: dict[socket.socket, float] = {}
        self._running: list[threading.Thread] = []
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"host={host!r}, port={port}: {reason}. Take another port, or 0 for a free one.") from error

    def server_bind(self):
        # Not HTTPServer's, which asks the name service who we are.
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self):
        """Listens at once; the reward loads meanwhile, and `/score` answers 503 until it is ready."""
        listening = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        scoring = [threading.Thread(target=self._work, args=(copy,), daemon=True) for copy in self.copies]
        self._running = [listening, *scoring]
        for thread in self._running:
            thread.start()

    def wait_until_ready(self):
        """
        Waits for the reward to be loaded.

        Raises:
            Exception: What loading it raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self.error is not None)
        if self.error is not None:
            raise self.error

    def stop(self):
        """Takes no further requests, scores those that wait, and closes."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
            # Whoever is silent hears no more of us; whoever waits for scores still gets them.
            for connection in self._deadlines:
                _stop_reading(connection)
        if self._running:
            self.shutdown()
            for thread in self._running:
                thread.join()
            with self._changed:
                self._changed.wait_for(lambda: not self._deadlines)
        self.server_close()

    # ---- Requests, each in the thread of its connection ----

    def about(self) -> dict:
        if not self.ready:  # what is loaded says more of where it came from
            raise RefusedError(503, "the reward is being loaded", **{"Retry-After": "2"})
        about = getattr(self.reward, "about", None)
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "version": __version__,
            "scope": self.scope,
            "requires": list(self.requires),
            "prompt_set": getattr(self.reward, "prompt_set", None),
            "source": getattr(self.reward, "source", {}),
            "about": about._asdict() if isinstance(about, About) else None,
            "batch_size": min(self.batch_size, self.max_images),
            "scored": self.scored,
        }

    def health(self) -> dict:
        with self._changed:
            requests, pictures = self._admitted, sum(len(request.images) for request in self._waiting)
        ready = self.ready and not self.stopping
        health = {"name": self.name, "version": __version__, "scope": self.scope, "ready": ready}
        return {**health, "requests": requests, "waiting_pictures": pictures, "scored": self.scored}

    def admit(self, request: Request, length: int):
        """Waits until it is a request's turn to be read, a body of `length` bytes, and counts it in."""
        with self._changed:
            if self.ready:
                request.size = COPIES * length
                self._entering.append(request)
                self._let_in()
                self._changed.wait_for(lambda: request.admitted or self.stopping, self.entry_timeout)
                if request.admitted:
                    return
                self._entering.remove(request)
            if self.stopping or not self.ready:
                reason = "the server is stopping" if self.stopping else "the reward is being loaded"
                raise RefusedError(503, reason, **{"Retry-After": "2"})
            if self._admitted >= self.max_queue:
                raise RefusedError(503, f"{self._admitted} requests are waiting already", **{"Retry-After": "1"})
            raise RefusedError(503, self._full(self._held), **{"Retry-After": "1"})

    def _let_in(self):
        """Lets those enter for whom there is room, in turn."""
        while self._entering and self._admitted < self.max_queue:
            request = self._turns["entering"].next(self._entering)
            if self._held and self._held + request.size > self.max_memory:
                return
            self._turns["entering"].took(request)
            self._entering.remove(request)
            self._held += request.size
            self._admitted += 1
            request.admitted = True
            self._changed.notify_all()

    def _full(self, held: int) -> str:
        return f"requests that wait already take {held / 2**20:.0f} MiB"

    def dismiss(self, request: Request):
        with self._changed:
            self._held -= request.size
            self._admitted -= 1
            self._let_in()

    def _reserve(self, request: Request, size: int):
        """Notes how much memory a request takes from now on."""
        with self._changed:
            others = self._held - request.size
            if others and size > request.size and others + size > self.max_memory:
                raise RefusedError(503, self._full(others), **{"Retry-After": "1"})
            self._held = others + size
            request.size = size
            self._let_in()

    def read_request(self, request: Request, body: bytes):
        """
        Fills a request with what its body holds.

        Raises:
            RefusedError: If it holds none, or too much.
        """
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the body is no JSON: {error}") from None
        if not isinstance(content, dict) or not {"prompts", "images"} <= content.keys() <= {
            "prompts",
            "images",
            "columns",
        }:
            raise RefusedError(400, "expected an object with 'prompts', 'images' and, if there are any, 'columns'")
        prompts, images, columns = content["prompts"], content["images"], content.get("columns", {})
        if not isinstance(images, list) or not images:
            raise RefusedError(400, "images: expected a list of pictures, base64 of PNG")
        if len(images) > self.max_images:
            raise RefusedError(413, f"{len(images)} pictures: this server takes {self.max_images} at once")
        if not isinstance(prompts, list) or len(prompts) != len(images):
            raise RefusedError(400, f"prompts: expected a list of {len(images)}, one for each picture")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise RefusedError(400, "prompts: expected texts")
        if not isinstance(columns, dict) or not all(
            isinstance(values, list) and len(values) == len(images) for values in columns.values()
        ):
            raise RefusedError(400, f"columns: expected lists of {len(images)} values by name")
        if reserved := sorted(_RESERVED & columns.keys()):
            raise RefusedError(400, f"columns: {', '.join(reserved)} cannot be the name of a column")
        if missing := sorted(set(self.requires) - columns.keys()):
            raise RefusedError(400, f"reward {self.name!r} needs the column {', '.join(missing)}")
        request.images = self._decode(request, images)
        request.prompts, request.columns = prompts, columns
        # What is left of the body is mostly its columns.
        left = COPIES * (len(body) - sum(map(len, images)))
        self._reserve(request, left + PIXEL * sum(image.width * image.height for image in request.images))

    def _decode(self, request: Request, images: list[str]) -> list[Image.Image]:
        decoded, pixels = [], 0
        for number, text in enumerate(images):
            try:
                image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise RefusedError(413, f"images[{number}] is too large") from None
            except Exception as error:  # Pillow documents no set of exceptions for malformed files
                raise RefusedError(400, f"images[{number}] is no base64 of a PNG ({type(error).__name__})") from None
            pixels += image.width * image.height
            # By what the header says, before anything is unpacked: a PNG can hold a thousand times its size.
            if pixels > self.max_pixels:
                raise RefusedError(413, f"more than {self.max_pixels / 1e6:g} megapixels in one request")
            decoded.append(image)
        self._reserve(request, request.size + PIXEL * pixels)
        for number, image in enumerate(decoded):
            try:
                decoded[number] = image.convert("RGB")
            except Exception as error:
                raise RefusedError(400, f"images[{number}] is a damaged PNG ({type(error).__name__})") from None
        return decoded

    def enqueue(self, request: Request) -> Request:
        """
        Lets a request wait. What its client asked for before, when it lost patience, is not begun anew: what is returned is
        what to wait for.
        """
        with self._changed:
            if self.stopping:
                raise RefusedError(503, "the server is stopping", **{"Retry-After": "2"})
            if request.key in self._begun:
                return self._begun[request.key]
            for place, before in enumerate(self._waiting):
                if request.key and before.key == request.key:
                    self._waiting[place] = request  # its turn is not lost
                    _answer_all([before], RefusedError(409, "the same was asked for again"))
                    return request
            self._waiting.append(request)
            self._changed.notify_all()
            return request

    def abandon(self, request: Request):
        """Nobody waits for it any more."""
        with self._changed:
            if request in self._waiting:
                request.abandoned = True
                request.empty()

    def delivered(self, request: Request):
        """Forgets a request whose client is there to hear of it."""
        with self._changed:
            if self._begun.get(request.key) is request:
                del self._begun[request.key]

    # ---- Scores, those of each copy of the reward in one thread ----

    def _work(self, copy: "_Copy"):
        try:
            with self._changed:
                PartialState()  # what the libraries' loggers ask for
            if hasattr(copy.reward, "prepare"):
                with _PREPARING:
                    copy.reward.prepare(torch.device(copy.device or _default_device()))
            copy.ready = True
            if all(other.ready for other in self.copies):
                self.fingerprint = self._fingerprint()
        except BaseException as error:
            self.error = error
        with self._changed:
            self.ready = self.error is None and self.fingerprint is not None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.ready or self.error is not None or self.stopping)
        while self.ready and (requests := self._take()):
            began = time.monotonic()
            requests = self._begin(requests)
            if not requests:
                continue
            pictures = sum(len(request.images) for request in requests)
            try:
                self._score(copy, requests)
            except RewardUnavailableError as error:
                _answer_all(requests, RefusedError(503, str(error), **{"Retry-After": "5"}))
                logger.warning(str(error))
            except ValueError as error:
                # The reward returned something else than scores. Asking again would not help.
                _answer_all(requests, RefusedError(422, str(error)))
                logger.warning(str(error))
            except BaseException:  # whatever it is, it must not leave a server that never answers
                _answer_all(requests, RefusedError(500, "an error of the server, which its log tells more of"))
                logger.exception(f"Reward {self.name!r}")
            else:
                with self._changed:
                    self.scored += pictures
                failed = sum(len(request.answer["failed"]) for request in requests)
                logger.info(
                    f"{self.name}: {pictures} pictures of {len(requests)} requests in {time.monotonic() - began:.3f} s"
                    + (f", {failed} without a score" if failed else "")
                )
            for request in requests:  # its answer may yet be asked for
                request.empty()

    def _fingerprint(self) -> str:
        """
        A few letters that stand for the reward: where it came from, and its settings, but for keys and tokens, and for
        where it computes.
        """
        name, settings = parse_reward(public_reward(self.spec))
        if isinstance(
            name, Reward
        ):  # what it keeps of its settings; other kinds of values may look different each time
            kept = {key: value for key, value in vars(name).items() if not key.startswith("_") and key not in SECRETS}
            settings = {key: value for key, value in kept.items() if isinstance(value, str | int | float)}
        settings = {key: value for key, value in settings.items() if key not in _PLACES}
        content = [name if isinstance(name, str) else self.name, settings, getattr(self.reward, "source", {})]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def _begin(self, requests: list[Request]) -> list[Request]:
        """Those of them that somebody waits for."""
        with self._changed:
            requests = [request for request in requests if not request.abandoned]
            self._begun.update({request.key: request for request in requests if request.key})
            while len(self._begun) > self.max_queue + len(requests):
                del self._begun[next(iter(self._begun))]
        return requests

    def _take(self) -> list[Request]:
        """What is scored together: the next in turn, and those after it that fit with it. Nothing when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.stopping)
            taken, pictures, candidates = [], 0, self._waiting
            while candidates:
                request = self._turns["waiting"].next(candidates)
                pictures += len(request.images)
                if taken and (self.scope == "group" or pictures > self.batch_size):
                    break
                self._turns["waiting"].took(request)
                self._waiting.remove(request)
                taken.append(request)
                candidates = [other for other in self._waiting if other.columns.keys() == request.columns.keys()]
            return taken

    def _score(self, copy: "_Copy", requests: list[Request]):
        prompts = [prompt for request in requests for prompt in request.prompts]
        images = [image for request in requests for image in request.images]
        columns = {name: [] for request in requests for name in request.columns}
        for request in requests:
            for name, values in request.columns.items():
                columns[name] += values
        values, failed, error = [], [], None
        size = len(images) if self.scope == "group" else self.batch_size
        for start in range(0, len(images), max(1, size)):
            part = slice(start, start + size)
            copy.threads.unavailable.clear()
            scores = start_scoring(
                copy.threads,
                [copy.call],
                [self.name],
                prompts[part],
                images[part],
                {name: column[part] for name, column in columns.items()},
                groups=[0] * len(prompts[part]),
            )()
            raised = scores.errors[self.name]
            if gone := [error for error in raised if isinstance(error, RewardUnavailableError)]:
                raise gone[0]
            values += scores.values[:, 0].tolist()
            failed += scores.failed[:, 0].tolist()
            error = error or next(iter(raised), None)
        start = 0
        for request in requests:
            part = slice(start, start := start + len(request.images))
            request.answer = {
                "name": self.name,
                "fingerprint": self.fingerprint,
                "scores": [None if math.isnan(value) else value for value in values[part]],
                "failed": [number for number, missing in enumerate(failed[part]) if missing],
            }
            if request.answer["failed"] and error is not None:
                request.answer["error"] = f"{type(error).__name__}: {error}"[:500]
            request.done.set()

    # ---- Connections ----

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection goes on waiting, and would be tried again at once
            raise

    def process_request(self, request, client_address):
        with self._changed:
            full = len(self._deadlines) >= self.max_connections
        if full:
            request.sendall(b"HTTP/1.1 503 Too many connections\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        self.expect(request, self.header_timeout)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.forget(request)

    def expect(self, connection: socket.socket, within: float):
        """Notes by when the client must have sent its next request."""
        with self._changed:
            self._deadlines[connection] = time.monotonic() + within
            if self.stopping:
                _stop_reading(connection)

    def forget(self, connection: socket.socket):
        with self._changed:
            self._deadlines.pop(connection, None)
            self._changed.notify_all()

    def service_actions(self):
        """Called every so often: ends the requests of clients that take too long, however slowly they go on."""
        with self._changed:
            for connection, deadline in self._deadlines.items():
                if time.monotonic() > deadline:
                    _stop_reading(connection)

    def handle_error(self, request, client_address):
        # A client that is gone; what goes wrong while answering is dealt with there.
        logger.debug("Connection of %s ended", client_address, exc_info=True)


class _Copy:
    """A reward function on a device, and the threads that it runs in."""

    def __init__(self, reward: Callable, device: str | None):
        self.reward = reward
        self.device = device
        self.call = _without_exit(reward)
        self.threads = RewardThreads()
        self.ready = False


def _loads(reward: Callable) -> bool:
    """Whether a reward has something to load, onto the device that it is told."""
    prepare = getattr(reward, "prepare", Reward.prepare)
    return getattr(prepare, "__func__", prepare) is not Reward.prepare


class _Turns:
    """Clients take turns, and each one's requests come in the order in which it sent them."""

    def __init__(self):
        self._last: OrderedDict[str, int] = OrderedDict()  # turn of each client, the latest at the end
        self._turn = 0

    def next(self, requests: Iterable[Request]) -> Request:
        """Of some that wait, in the order in which they came, that of the client whose last turn is longest ago."""
        first = {}
        for request in requests:
            first.setdefault(request.client, request)
        return min(first.values(), key=lambda request: self._last.get(request.client, -1))

    def took(self, request: Request):
        self._turn += 1
        self._last[request.client] = self._turn
        self._last.move_to_end(request.client)
        while len(self._last) > _CLIENTS:
            self._last.popitem(last=False)


def serve(reward: Callable, host: str = "127.0.0.1", port: int = 8000, **settings):
    """
    Serves a reward until Ctrl-C or SIGTERM, then finishes what is queued. Prints its address when it is ready.

    Args:
        reward (`Callable`), host (`str`), port (`int`), settings: As [`RewardServer`] takes them.

    Raises:
        ValueError: If a setting makes no sense, or `host` is open to other machines and there is no token.
        OSError: If the port is taken.
    """
    serve_all([RewardServer(reward, host, port, **settings)])


def serve_all(servers: list[RewardServer]):
    """
    What [`serve`] does, with several servers in one process.

    Args:
        servers (`list[RewardServer]`): They have not been started.
    """

    def interrupt(signal_number, frame):
        signal.signal(signal.SIGTERM, before)  # the second one is not to be waited for
        raise KeyboardInterrupt

    logging.basicConfig(format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
            print(f"Reward {server.name!r} is served at {server.url} (Ctrl-C stops it)", flush=True)  # noqa: T201
        threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("Finishing what is queued. Ctrl-C again stops at once.")
    finally:
        for server in servers:
            server.stop()
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _exit_is_an_error():
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"the reward called exit({error.code})") from error


def _without_exit(reward: Callable) -> Callable:
    """A reward whose `exit()` costs the samples for which it is called, and not its server."""

    def call(**arguments):
        with _exit_is_an_error():
            result = reward(**arguments)
        return wait_for(result) if inspect.isawaitable(result) else result

    async def wait_for(result):
        with _exit_is_an_error():
            return await result

    call.scope = getattr(reward, "scope", "sample")
    return call


def _answer_all(requests: list[Request], refused: RefusedError):
    for request in requests:
        if not request.done.is_set():
            request.answer = refused
            request.done.set()


def _stop_reading(connection: socket.socket):
    try:
        connection.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # closed already


def _default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
