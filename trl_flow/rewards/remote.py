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

"""A reward that another process computes: the client of a reward server. Pictures travel as PNG in JSON, never pickled."""

import base64
import io
import ipaddress
import json
import logging
import math
import os
import random
import threading
import time
import uuid
import zlib
from functools import cached_property
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from .reward import About, Reward, RewardUnavailableError
from .threads import DaemonExecutor


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_FLOW_REWARD_TOKEN"
# Names a client, so that each gets its turn.
CLIENT_HEADER = "TRL-Flow-Client"
# What goes by without a success, before a word is said about it.
PATIENCE = 5.0  # seconds
# The server is busy or restarting; anything else that is no success stays as it is however often it is asked.
RETRIED = {408, 409, 429, *range(500, 600)}


class _Server:
    """One of the servers of a reward, as its client knows it."""

    def __init__(self, url: str):
        self.url = url
        self.under_way = 0  # requests of this client
        self.not_before = 0.0  # when it may be asked again, on the monotonic clock
        self.failures = 0  # since it last answered
        self.scored: int | None = None  # pictures, of all its clients, when it was last asked
        self.went_on = 0.0  # when it was last seen to have scored some, on the monotonic clock
        self.warned = False


class RemoteReward(Reward):
    """
    The scores of one or more reward servers, as `trl-flow rewards serve` starts them.

    While no server answers, calls wait: a server that is killed and started again costs time and no sample. So does one
    that is busy with the requests of others, for as long as it goes on scoring. Of several servers, each request goes to
    one that has the fewest of this client's, and to another one if it is gone. Scope, required columns and prompt set are
    the server's; it is first asked for them when they are needed.

    Args:
        url (`str` or `list[str]`): The server's address, `"http://host:port"`; or those of several that serve the same
            reward with the same settings.
        token (`str`, *optional*): What the server was told to ask for. By default the environment variable
            `TRL_FLOW_REWARD_TOKEN`, which, unlike a setting, ends up in no config file.
        timeout (`float`, *optional*, defaults to 120): Seconds that one request may take before it is made again. What the
            server has begun to score by then is not begun anew.
        max_wait (`float`, *optional*, defaults to 600): Seconds without any answer after which the servers are given up. One
            that has scored pictures of others meanwhile is waited for again as long.
        batch_size (`int`, *optional*): Pictures per request. By default as many as the server scores at once. A reward
            with group scope gets its group in one request.
        max_workers (`int`, *optional*, defaults to 4): Requests at a time, times the number of servers. While some of these
            are away, the others get them all.
        columns (`list[str]`, *optional*): Columns of the dataset to send. By default all that JSON can express.
    """

    about = About(
        definition="What the server computes; `GET /` tells.",
        scale="The server's.",
        source="The server's.",
        license="The server's.",
        hacked_by="Whatever hacks the server's reward.",
    )
    concurrent = True

    def __init__(
        self,
        url: str | list[str],
        token: str | None = None,
        timeout: float = 120.0,
        max_wait: float = 600.0,
        batch_size: int | None = None,
        max_workers: int = 4,
        columns: list[str] | None = None,
    ):
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("url=[]: expected the address of a reward server, or several.")
        hosts = [_checked_host(one) for one in urls]
        for name, value in (("timeout", timeout), ("max_wait", max_wait)):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected a number of seconds above 0.")
        for name, value in (("batch_size", batch_size), ("max_workers", max_workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        urls = [one.rstrip("/") for one in urls]
        if twice := sorted({one for one in urls if urls.count(one) > 1}):
            raise ValueError(
                f"url names {', '.join(twice)} twice: name each server once; max_workers says how much it gets."
            )
        self.url = ", ".join(urls)
        self.timeout = timeout
        self.max_wait = max_wait
        self.batch_size = batch_size
        self.max_workers = max_workers
        self.columns = columns
        self._servers = [_Server(one) for one in urls]
        token = read_token(token)
        self._client = httpx2.Client(
            # By the client's name the server tells who is to have the next turn.
            headers={CLIENT_HEADER: uuid.uuid4().hex, **({"Authorization": f"Bearer {token}"} if token else {})},
            verify=any(
                one.startswith("https:") for one in urls
            ),  # loading certificates takes longer than many a request
            # A proxy that the environment names cannot reach this machine.
            trust_env=not all(map(is_loopback, hosts)),
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=max_workers * len(urls)),
        )
        # Of its own: the jitter of a retry must not move the random numbers of the run.
        self._random = random.Random()
        self._lock = threading.Lock()  # of what is noted of the servers
        self._answered = 0.0  # when one of them last did, on the monotonic clock
        self._error = ""  # why the server had no score for some pictures of a call

    @cached_property
    def served(self) -> dict:
        """What the server says of its reward. Waits for a server that does not answer yet."""
        served, server = self._ask("GET", "/", threading.Event())
        server.scored = served.get("scored")
        self._first = server.url
        if not isinstance(served.get("name"), str) or served.get("scope") not in ("sample", "group"):
            raise ValueError(f"{server.url} answers, but not as a reward server does: {str(served)[:200]}")
        if served.get("about"):
            self.about = About(**{field: str(served["about"].get(field, "")) for field in About._fields})
        return served

    @property
    def name(self) -> str:
        """What the server calls its reward: the name under which it is logged."""
        return self.served["name"]

    @property
    def scope(self) -> str:
        return self.served["scope"]

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(self.served.get("requires") or ())

    @property
    def prompt_set(self) -> str | None:
        return self.served.get("prompt_set")

    @property
    def source(self) -> dict[str, str]:
        fingerprint = self.served.get("fingerprint")
        return {
            **(self.served.get("source") or {}),
            "reward": self.served["name"],
            **({"fingerprint": str(fingerprint)} if fingerprint else {}),
            "server": self.url,
        }

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float | None]:
        """
        The server's scores.

        Raises:
            RewardUnavailableError: If the server has not answered for `max_wait` seconds, or wants another token.
            ValueError: If the server refuses the request or answers with something else than scores.
        """
        n = len(images)
        columns = self._sendable(kwargs, n)
        size = n if self.scope == "group" else self.batch_size or self.served.get("batch_size") or 16
        # Set when one request has failed for good, so that the others do not wait on.
        stop = threading.Event()
        self._error = "it does not say why"
        executor = DaemonExecutor(self.max_workers * len(self._servers))
        try:
            futures = []
            for start in range(0, n, max(1, size)):
                part = slice(start, start + size)
                values = {name: column[part] for name, column in columns.items()}
                futures.append(executor.submit(self._score, prompts[part], images[part], values, stop))
            scores = [value for future in futures for value in future.result()]
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
        if failed := sum(value is not None and math.isnan(value) for value in scores):
            logger.warning(f"Reward server {self.url} has no score for {failed} of {n} pictures: {self._error}")
        return scores

    def _sendable(self, kwargs: dict, n: int) -> dict[str, list]:
        """The columns that are to be sent."""
        columns = {}
        for name, values in kwargs.items():
            # The trainer's state and log functions are no columns; its pictures are no JSON.
            if not isinstance(values, list) or len(values) != n:
                continue
            if self.columns is not None and name not in self.columns:
                continue
            try:
                json.dumps(values)
            except (TypeError, ValueError) as error:
                if name in (self.columns or ()) or name in self.requires:
                    raise ValueError(f"column {name!r} cannot be sent to {self.url}: {error}.") from error
                continue
            columns[name] = values
        return columns

    def _score(self, prompts: list[str], images: list[Image.Image], columns: dict, stop: threading.Event):
        body = {"prompts": prompts, "images": [encode(image) for image in images], "columns": columns}
        try:
            answer, server = self._ask("POST", "/score", stop, json.dumps(body).encode())
        except _TooLargeError as error:
            if len(images) == 1 or self.scope == "group":
                what = "one picture" if len(images) == 1 else f"a group of {len(images)} pictures"
                raise ValueError(f"{self.url} does not take {what}: {error}. Start it with higher limits.") from error
            middle = len(images) // 2
            return [
                value
                for part in (slice(0, middle), slice(middle, None))
                for value in self._score(
                    prompts[part], images[part], {name: values[part] for name, values in columns.items()}, stop
                )
            ]
        if answer.get("name", self.served["name"]) != self.served["name"]:
            raise RewardUnavailableError(
                f"{server.url} serves {answer['name']!r}, and {self._first} served {self.served['name']!r} when the run "
                "began: start that one again."
            )
        before = self.served.get("fingerprint")
        if (now := answer.get("fingerprint", before)) != before:
            raise RewardUnavailableError(
                f"{server.url} serves {self.served['name']!r} with other settings or of another revision than {self._first} "
                f"did when the run began (fingerprint {now}, then {before}): start it again with those."
            )
        scores, failed = answer.get("scores"), answer.get("failed", [])
        if (
            not isinstance(scores, list)
            or len(scores) != len(images)
            or not all(value is None or type(value) in (int, float) for value in scores)
            or not isinstance(failed, list)
            or not all(type(number) is int and 0 <= number < len(images) for number in failed)
        ):
            raise ValueError(
                f"{server.url}/score answered with {str(answer)[:200]}: expected 'scores', {len(images)} numbers or null, "
                "and 'failed', the positions of those that should have been numbers."
            )
        if failed and answer.get("error"):
            self._error = str(answer["error"])[:500]
        return [math.nan if number in failed else value for number, value in enumerate(scores)]

    def _ask(self, method: str, path: str, stop: threading.Event, body: bytes | None = None) -> tuple[dict, _Server]:
        """The answer to one request, which is made until there is one, and who gave it."""
        began = time.monotonic()
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex} if body else {}
        server = None
        while True:
            server = self._choose(server)
            sent = time.monotonic()
            advice = "Start it again, and the run from its last checkpoint; max_wait says how long to wait."
            after = 0.0
            try:
                response = request_within(
                    self._client, self.timeout, method, server.url + path, content=body, headers=headers
                )
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
                if body and isinstance(error, httpx2.ReadTimeout):
                    problem = f"scoring takes longer than timeout={self.timeout:g} s"
                    advice = (
                        "If it is alive, raise timeout (and max_wait), or lower batch_size; then start the run from its "
                        "last checkpoint."
                    )
                    if not stop.is_set() and self._goes_on(server, sent):
                        # Another one would begin anew; here the request keeps its turn, or has been scored meanwhile.
                        with self._lock:
                            server.under_way -= 1
                        continue
            else:
                if response.status_code == 200:
                    self._note_answer(server)
                    return self._parsed(response, server), server
                problem = f"HTTP {response.status_code}: {_reason(response)}"
                if response.status_code not in RETRIED:
                    with self._lock:
                        server.under_way -= 1
                    self._give_up(server, response.status_code, problem)
                after = _seconds(response.headers.get("Retry-After"))

            now = time.monotonic()
            waited = now - max(began, self._answered)
            # Servers that are busy for others are no reason to give up.
            if waited >= self.max_wait and body:
                if any(self._goes_on(other, now - self.max_wait) for other in self._servers):
                    waited = 0.0
            self._note_failure(server, problem, after, waited)
            if waited >= self.max_wait or stop.is_set():
                raise RewardUnavailableError(
                    f"Reward server {self.url} has not answered for {waited:.0f} s ({problem}). {advice}"
                )
            server = None
            with self._lock:
                first = min(other.not_before for other in self._servers)
            # The last attempt is made when the time is up, not before.
            stop.wait(min(max(0.0, first - time.monotonic()), self.max_wait - waited))

    def _choose(self, server: _Server | None) -> _Server:
        """Where a request goes: to `server`, or to one that may be asked and has the fewest requests of this client."""
        with self._lock:
            if server is None:
                now = time.monotonic()
                open_ones = [other for other in self._servers if other.not_before <= now]
                # When the time is up: whichever it is least early for.
                open_ones = open_ones or [min(self._servers, key=lambda other: other.not_before)]
                fewest = min(other.under_way for other in open_ones)
                server = self._random.choice([other for other in open_ones if other.under_way == fewest])
            server.under_way += 1
            return server

    def _note_answer(self, server: _Server):
        with self._lock:
            self._answered = time.monotonic()
            server.under_way -= 1
            server.failures, server.not_before = 0, 0.0
            was_away, server.warned = server.warned, False
        if was_away:
            logger.warning(f"Reward server {server.url} answers again.")

    def _note_failure(self, server: _Server, problem: str, after: float, waited: float):
        """Notes when a server may be asked again: when it says so, or after a pause that doubles each time."""
        with self._lock:
            server.under_way -= 1
            now = time.monotonic()
            if now >= server.not_before:  # requests that fail together are one failure
                # Not beyond what a busy server asks for: who has waited for long would come ever later than the others.
                pause = after or min(10.0, 0.25 * 2**server.failures)
                server.not_before = now + pause * self._random.uniform(*((1.0, 1.25) if after else (0.5, 1.0)))
                server.failures += 1
            # Of several, one that is away is told of at once: the others' answers hide it.
            away = waited >= PATIENCE or (len(self._servers) > 1 and not after)
            say, server.warned = away and not server.warned, server.warned or away
        if say:
            others = " The others go on." if len(self._servers) > 1 else ""
            logger.warning(
                f"Reward server {server.url} does not answer ({problem}). Waiting for up to {self.max_wait:.0f} s.{others}"
            )

    def _goes_on(self, server: _Server, since: float) -> bool:
        """Whether a server has been seen since then to have scored pictures, whoever's they were."""
        try:
            response = self._client.get(f"{server.url}/health", timeout=min(self.timeout, 10.0))
            scored = response.json()["scored"]
        except (httpx2.RequestError, ValueError, LookupError, TypeError):
            return False
        with self._lock:
            # Of requests that ask together, the first one alone sees the number change.
            if scored != server.scored:
                server.scored = scored
                server.went_on = self._answered = time.monotonic()
            return server.went_on >= since

    def _give_up(self, server: _Server, status: int, problem: str):
        if status in (401, 403):
            raise RewardUnavailableError(
                f"Reward server {server.url} refuses the token ({problem}). Give the one that it was started with as "
                f"token=... or in the environment variable {TOKEN_VARIABLE}."
            )
        if status == 413:
            raise _TooLargeError(problem)
        raise ValueError(f"Reward server {server.url} refuses the request ({problem}).")

    def _parsed(self, response: httpx2.Response, server: _Server) -> dict:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"{server.url} answers, but not as a reward server does: {response.text[:200]!r}")
        return answer


class _TooLargeError(ValueError):
    """A smaller request would do."""


def request_within(client: httpx2.Client, seconds: float, method: str, url: str, **kwargs) -> httpx2.Response:
    """
    A whole answer. The client's own limit is for each piece of it, and a body that comes in drops would never end.

    Raises:
        httpx2.ReadTimeout: If its end has not come after so many seconds.
    """
    until = time.monotonic() + seconds
    pieces = []
    with client.stream(method, url, **kwargs) as response:
        for piece in response.iter_bytes():
            # One that is late, but all there, is not thrown away: it would take as long again.
            if pieces and time.monotonic() > until:
                raise httpx2.ReadTimeout(f"the answer has not ended after {seconds:g} s", request=response.request)
            pieces.append(piece)
    # As it was read: not to be unpacked again.
    headers = [(name, value) for name, value in response.headers.multi_items() if name != "content-encoding"]
    return httpx2.Response(response.status_code, headers=headers, content=b"".join(pieces), request=response.request)


def _checked_host(url: str) -> str:
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url={url!r}: expected the address of a reward server, 'http://host:port'.")
    if parts.username is not None or parts.query or parts.fragment:
        # Not shown: the part that is too much may be a secret.
        raise ValueError(
            f"url: expected nothing but an address, 'http://{parts.hostname}:port'. A token is given as token=... "
            f"or in the environment variable {TOKEN_VARIABLE}."
        )
    return parts.hostname


def read_token(token: str | None) -> str | None:
    """The token that was given, or else that of the environment."""
    token = (os.environ.get(TOKEN_VARIABLE, "") if token is None else token).strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token: expected printable ASCII characters without spaces.")
    return token or None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, out of reach for others."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def encode(image: Image.Image) -> str:
    """A picture as base64 of a PNG: what is scored is what was made, to the last bit."""
    buffer = io.BytesIO()
    # On pictures 3 times as fast as Pillow's default, and as small.
    image.convert("RGB").save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return base64.b64encode(buffer.getvalue()).decode()


def _reason(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase


def _seconds(retry_after: str | None) -> float:
    """Of a `Retry-After`; its other form, a date, is left to the backoff."""
    return min(60.0, float(retry_after)) if retry_after and retry_after.isdecimal() else 0.0
