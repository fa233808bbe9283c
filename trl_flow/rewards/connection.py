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
"""One connection of a reward server: what a client may ask, and what it is answered."""

import hmac
import json
import logging
import math
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from PIL import Image

from .. import __version__
from .remote import CLIENT_HEADER


if TYPE_CHECKING:
    from .server import RewardServer


logger = logging.getLogger(__name__)

# How long a client is listened to that was refused before it had said all.
LINGER = 2.0  # seconds


class RefusedError(Exception):
    """A request that gets no scores: the status of its answer, and why."""

    def __init__(self, status: int, reason: str, **headers: str):
        super().__init__(reason)
        self.status = status
        self.headers = headers


class Request:
    """
    Pictures that wait for their scores.

    Args:
        key (`str`, *optional*): By which a client that asks for the same again says so.
        client (`str`): Who sent it.
    """

    def __init__(self, key: str | None, client: str):
        self.key = key
        self.client = client
        self.admitted = False
        self.size = 0  # bytes that it may take
        self.prompts: list[str] = []
        self.images: list[Image.Image] = []
        self.columns: dict[str, list] = {}
        self.done = threading.Event()
        self.abandoned = False  # nobody waits for it any more
        self.answer: dict | RefusedError | None = None

    def empty(self):
        self.prompts, self.images, self.columns = [], [], {}


class Handler(BaseHTTPRequestHandler):
    """One connection of a [`RewardServer`], in a thread of its own."""

    protocol_version = "HTTP/1.1"
    server_version = f"trl-flow/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True  # which would hold back what follows the headers
    server: "RewardServer"

    def setup(self):
        self.timeout = self.server.request_timeout
        super().setup()

    def handle_one_request(self):
        self.server.expect(self.connection, self.server.header_timeout)
        super().handle_one_request()

    def answer(self):
        self.server.expect(self.connection, self.server.request_timeout)
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
        request = Request(self.headers.get("Idempotency-Key"), self.headers.get(CLIENT_HEADER, self.client_address[0]))
        self.server.expect(self.connection, math.inf)  # while it is we who let it wait
        self.server.admit(request, length)
        try:
            self.server.expect(self.connection, self.server.request_timeout)
            try:
                body = self.rfile.read(length)
            except TimeoutError:
                body = b""
            if len(body) < length:
                raise RefusedError(408, f"{len(body)} of {length} bytes came")
            self.unread = False
            self.server.expect(self.connection, math.inf)
            self.server.read_request(request, body)
            del body
            begun = self.server.enqueue(request)
            done = False
            while not done:
                done = begun.done.wait(1.0)
                if self._is_gone():
                    self.server.abandon(request)
                    raise ConnectionAbortedError
        finally:
            self.server.dismiss(request)
        self.server.delivered(begun)
        if isinstance(begun.answer, RefusedError):
            raise begun.answer
        return begun.answer

    def _is_gone(self) -> bool:
        """Whether the client has hung up. Work for those who have, and ask again, would pile up."""
        if self.server.stopping:
            return False  # nothing is read any more, which looks the same
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
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
