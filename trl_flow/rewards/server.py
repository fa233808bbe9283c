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
import hmac
import io
import json
import logging
import math
import signal
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch
from accelerate import PartialState
from PIL import Image

from .. import __version__
from .loading import reward_name
from .remote import TOKEN_VARIABLE, is_loopback, read_token
from .reward import About, RewardUnavailableError
from .scoring import score, takes_videos


logger = logging.getLogger(__name__)

# How long a client is listened to that was refused before it had said all.
LINGER = 2.0  # seconds
# What a reward function gets by these names is no column.
_RESERVED = {"prompts", "images", "completions", "videos", "trainer_state", "log_extra", "log_metric"}


class RefusedError(Exception):
    """A request that gets no scores: the status of its answer, and why."""

    def __init__(self, status: int, reason: str, **headers: str):
        super().__init__(reason)
        self.status = status
        self.headers = headers


class _Request:
    """Pictures that wait for their scores."""

    def __init__(self, prompts: list[str], images: list[Image.Image], columns: dict[str, list]):
        self.prompts = prompts
        self.images = images
        self.columns = columns
        self.done = threading.Event()
        self.abandoned = False  # nobody waits for it any more
        self.answer: dict | RefusedError | None = None


class RewardServer(ThreadingHTTPServer):
    """
    Scores pictures over HTTP with one reward function.

    - `POST /score` with `{"prompts": [...], "images": [base64 of PNG, ...], "columns": {name: [...]}}` answers
      `{"name", "scores": [number or null, ...], "failed": [positions], "error": text}`: null where the reward does not
      apply, or, at the positions in `failed`, where no score could be had.
    - `GET /` answers what the reward is: `name`, `scope`, `requires`, `prompt_set`, `source`, `about`.
    - `GET /health` answers whether it is `ready` (status 200, else 503), and what waits. It needs no token.

    Every connection has a thread that reads and decodes. One thread scores: it takes whatever waits, up to `batch_size`
    pictures at once, so many small requests cost as little as one large one. A reward with group scope is called once
    for each request, which is a group.

    Args:
        reward (`Callable`): What [`load_reward`] returns.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on. Any but this machine's own needs a
            `token`.
        port (`int`, *optional*, defaults to 8000): 0 takes a free one.
        batch_size (`int`, *optional*, defaults to 16): Most pictures per call of the reward.
        max_queue (`int`, *optional*, defaults to 256): Requests that are read, wait or are scored at a time. More get
            status 503, and are asked to come again.
        max_body_mib (`float`, *optional*, defaults to 64): Largest request.
        max_images (`int`, *optional*, defaults to 256): Most pictures in a request.
        max_megapixels (`float`, *optional*, defaults to 64): Most pixels in all pictures of a request together.
        request_timeout (`float`, *optional*, defaults to 30): Seconds that a client may take to send a request.
        token (`str`, *optional*): What clients must know (`Authorization: Bearer ...`). By default the environment
            variable `TRL_FLOW_REWARD_TOKEN`, or else none.
        device (`str`, *optional*): Where the reward computes. By default an accelerator if there is one.
    """

    request_queue_size = (
        1024  # connections that the system keeps until a thread takes them; 5 is the library's default
    )
    daemon_threads = True

    def __init__(
        self,
        reward: Callable,
        host: str = "127.0.0.1",
        port: int = 8000,
        batch_size: int = 16,
        max_queue: int = 256,
        max_body_mib: float = 64,
        max_images: int = 256,
        max_megapixels: float = 64,
        request_timeout: float = 30.0,
        token: str | None = None,
        device: str | None = None,
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
        self.name = reward_name(reward)
        if takes_videos(reward):
            raise ValueError(f"Reward {self.name!r} takes whole videos, and only pictures can be sent to a server.")
        self.reward = reward
        self.scope = getattr(reward, "scope", "sample")
        self.requires = tuple(getattr(reward, "requires", ()))
        self.batch_size = batch_size
        self.max_queue = max_queue
        self.max_body = int(max_body_mib * 2**20)
        self.max_images = max_images
        self.max_pixels = max_megapixels * 1e6
        self.request_timeout = request_timeout
        self.token = token
        self.device = device
        self.ready = False
        self.error: BaseException | None = None  # why it never became ready
        self.stopping = False
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._admitted = 0
        # Open connections, and when each must have sent its request.
        self._deadlines: dict[socket.socket, float] = {}
        self._running: list[threading.Thread] = []
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
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
        scoring = threading.Thread(target=self._work, daemon=True)
        self._running = [listening, scoring]
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
        about = getattr(self.reward, "about", None)
        return {
            "name": self.name,
            "version": __version__,
            "scope": self.scope,
            "requires": list(self.requires),
            "prompt_set": getattr(self.reward, "prompt_set", None),
            "source": getattr(self.reward, "source", {}),
            "about": about._asdict() if isinstance(about, About) else None,
            "batch_size": min(self.batch_size, self.max_images),
        }

    def health(self) -> dict:
        with self._changed:
            requests, pictures = self._admitted, sum(len(request.images) for request in self._waiting)
        ready = self.ready and not self.stopping
        health = {"name": self.name, "version": __version__, "scope": self.scope, "ready": ready}
        return {**health, "requests": requests, "waiting_pictures": pictures}

    def admit(self):
        """Counts a request in, before its body is read."""
        with self._changed:
            if self.stopping or not self.ready:
                reason = "the server is stopping" if self.stopping else "the reward is being loaded"
                raise RefusedError(503, reason, **{"Retry-After": "2"})
            if self._admitted >= self.max_queue:
                raise RefusedError(503, f"{self._admitted} requests are waiting already", **{"Retry-After": "1"})
            self._admitted += 1

    def dismiss(self):
        with self._changed:
            self._admitted -= 1

    def read_request(self, body: bytes) -> _Request:
        """
        The request that a body holds.

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
        return _Request(prompts, self._decode(images), columns)

    def _decode(self, images: list[str]) -> list[Image.Image]:
        opened, pixels = [], 0
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
            opened.append(image)
        decoded = []
        for number, image in enumerate(opened):
            try:
                decoded.append(image.convert("RGB"))
            except Exception as error:
                raise RefusedError(400, f"images[{number}] is a damaged PNG ({type(error).__name__})") from None
        return decoded

    def enqueue(self, request: _Request):
        with self._changed:
            if self.stopping:
                raise RefusedError(503, "the server is stopping", **{"Retry-After": "2"})
            self._waiting.append(request)
            self._changed.notify_all()

    # ---- Scores, all in one thread ----

    def _work(self):
        try:
            PartialState()  # what the libraries' loggers ask for
            if hasattr(self.reward, "prepare"):
                self.reward.prepare(torch.device(self.device or _default_device()))
        except BaseException as error:
            self.error = error
        else:
            self.ready = True
        with self._changed:
            self._changed.notify_all()
        while self.ready and (requests := self._take()):
            began = time.monotonic()
            requests = [request for request in requests if not request.abandoned]
            if not requests:
                continue
            try:
                self._score(requests)
            except RewardUnavailableError as error:
                _answer_all(requests, RefusedError(503, str(error), **{"Retry-After": "5"}))
                logger.warning(str(error))
            except ValueError as error:
                # The reward returned something else than scores. Asking again would not help.
                _answer_all(requests, RefusedError(422, str(error)))
                logger.warning(str(error))
            except BaseException:  # a reward that calls exit() must not leave a server that never answers
                _answer_all(requests, RefusedError(500, "an error of the server, which its log tells more of"))
                logger.exception(f"Reward {self.name!r}")
            else:
                pictures = sum(len(request.images) for request in requests)
                failed = sum(len(request.answer["failed"]) for request in requests)
                logger.info(
                    f"{self.name}: {pictures} pictures of {len(requests)} requests in {time.monotonic() - began:.3f} s"
                    + (f", {failed} without a score" if failed else "")
                )

    def _take(self) -> list[_Request]:
        """What is scored together: the first that waits, and whatever fits with it. Nothing when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.stopping)
            if not self._waiting:
                return []
            taken = [self._waiting.popleft()]
            if self.scope == "group":
                return taken
            pictures = len(taken[0].images)
            for request in list(self._waiting):
                if pictures + len(request.images) > self.batch_size:
                    break
                if request.columns.keys() == taken[0].columns.keys():
                    self._waiting.remove(request)
                    taken.append(request)
                    pictures += len(request.images)
            return taken

    def _score(self, requests: list[_Request]):
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
            scores = score(
                [self.reward],
                [self.name],
                prompts[part],
                images[part],
                {name: column[part] for name, column in columns.items()},
                groups=[0] * len(prompts[part]),
            )
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
                "scores": [None if math.isnan(value) else value for value in values[part]],
                "failed": [number for number, missing in enumerate(failed[part]) if missing],
            }
            if request.answer["failed"] and error is not None:
                request.answer["error"] = f"{type(error).__name__}: {error}"[:500]
            request.done.set()

    # ---- Connections ----

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"trl-flow/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True  # which would hold back what follows the headers
    server: RewardServer

    def setup(self):
        self.timeout = self.server.request_timeout
        super().setup()

    def finish(self):
        try:
            super().finish()
        finally:
            self.server.forget(self.connection)

    def handle_one_request(self):
        self.server.expect(self.connection, self.server.request_timeout)
        super().handle_one_request()

    def answer(self):
        self.unread = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        headers = {}
        try:
            content = self._answer()
            status = 200 if content.get("ready", True) else 503
        except RefusedError as refused:
            status, content, headers = refused.status, {"error": str(refused)}, refused.headers
        except ConnectionError:
            self.close_connection = True
            return
        except Exception:
            logger.exception(f"{self.command} {self.path}")
            status, content = 500, {"error": "an error of the server, which its log tells more of"}
        self._send(status, content, headers)

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def _answer(self) -> dict:
        path = urlsplit(self.path).path
        methods = {"/": "GET", "/health": "GET", "/score": "POST"}
        if path not in methods:
            raise RefusedError(404, f"{path}: expected one of {', '.join(methods)}")
        if self.command != methods[path]:
            raise RefusedError(405, f"{path} takes {methods[path]} only", Allow=methods[path])
        if path == "/health":
            return self.server.health()
        self._check_token()
        return self.server.about() if path == "/" else self._scores()

    def _check_token(self):
        if self.server.token is None:
            return
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise RefusedError(401, "expected the token of this server", **{"WWW-Authenticate": "Bearer"})

    def _scores(self) -> dict:
        # A web page can make a browser post to this machine, but not with this type.
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "expected Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "expected a Content-Length")
        length = int(length)
        if length > self.server.max_body:
            raise RefusedError(413, f"{length} bytes: this server takes {self.server.max_body} at once")
        self.server.admit()
        try:
            try:
                body = self.rfile.read(length)
            except TimeoutError:
                body = b""
            if len(body) < length:
                raise RefusedError(408, f"{len(body)} of {length} bytes came")
            self.unread = False
            self.server.expect(self.connection, math.inf)
            request = self.server.read_request(body)
            del body
            self.server.enqueue(request)
            while not request.done.wait(1.0):
                if self._is_gone():
                    request.abandoned = True
                    raise ConnectionAbortedError
        finally:
            self.server.dismiss()
        if isinstance(request.answer, RefusedError):
            raise request.answer
        return request.answer

    def _is_gone(self) -> bool:
        """Whether the client has hung up. Work for those who have, and ask again, would pile up."""
        if self.server.stopping:
            return False  # nothing is read any more, which looks the same
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def _send(self, status: int, content: dict, headers: dict[str, str]):
        body = json.dumps(content).encode()
        self.close_connection = self.close_connection or self.unread or self.server.stopping
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if self.unread:
            self._linger()

    def _linger(self):
        """Listens on for a while: closing on a client that is still sending would destroy the answer on its way."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER)
        until = time.monotonic() + LINGER
        while time.monotonic() < until and self.connection.recv(65536):
            pass

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses: requests that are no HTTP, and methods without a name here."""
        self.unread = True
        self.command = self.command or ""
        self._send(code, {"error": message or HTTPStatus(code).phrase}, {})

    def log_message(self, format, *args):
        logger.debug(format, *args)


def serve(reward: Callable, host: str = "127.0.0.1", port: int = 8000, **settings):
    """
    Serves a reward until Ctrl-C or SIGTERM, then finishes what is queued. Prints its address when it is ready.

    Args:
        reward (`Callable`), host (`str`), port (`int`), settings: As [`RewardServer`] takes them.

    Raises:
        ValueError: If a setting makes no sense, or `host` is open to other machines and there is no token.
        OSError: If the port is taken.
    """

    def interrupt(signal_number, frame):
        signal.signal(signal.SIGTERM, before)  # the second one is not to be waited for
        raise KeyboardInterrupt

    server = RewardServer(reward, host, port, **settings)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    before = signal.signal(signal.SIGTERM, interrupt)
    server.start()
    try:
        server.wait_until_ready()
        print(f"Reward {server.name!r} is served at {server.url} (Ctrl-C stops it)", flush=True)  # noqa: T201
        threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("Finishing what is queued. Ctrl-C again stops at once.")
    finally:
        server.stop()
        signal.signal(signal.SIGTERM, before)


def _answer_all(requests: list[_Request], refused: RefusedError):
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
