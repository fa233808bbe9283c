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
# What goes by without a success, before a word is said about it.
PATIENCE = 5.0  # seconds
# The server is busy or restarting; anything else that is no success stays as it is however often it is asked.
RETRIED = {408, 409, 429, *range(500, 600)}


class RemoteReward(Reward):
    """
    The scores of a reward server, as `trl-flow rewards serve` starts one.

    While the server does not answer, calls wait for it: a server that is killed and started again costs time and no
    sample. Scope, required columns and prompt set are the server's; it is first asked for them when they are needed.

    Args:
        url (`str`): The server's address, `"http://host:port"`.
        token (`str`, *optional*): What the server was told to ask for. By default the environment variable
            `TRL_FLOW_REWARD_TOKEN`, which, unlike a setting, ends up in no config file.
        timeout (`float`, *optional*, defaults to 120): Seconds that one request may take before it is made again. What the
            server has begun to score by then is not begun anew.
        max_wait (`float`, *optional*, defaults to 600): Seconds without any answer after which the server is given up.
        batch_size (`int`, *optional*): Pictures per request. By default as many as the server scores at once. A reward
            with group scope gets its group in one request.
        max_workers (`int`, *optional*, defaults to 4): Requests at a time.
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
        url: str,
        token: str | None = None,
        timeout: float = 120.0,
        max_wait: float = 600.0,
        batch_size: int | None = None,
        max_workers: int = 4,
        columns: list[str] | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r}: expected the address of a reward server, 'http://host:port'.")
        if parts.username is not None or parts.query or parts.fragment:
            # Not shown: the part that is too much may be a secret.
            raise ValueError(
                f"url: expected nothing but an address, 'http://{parts.hostname}:port'. A token is given as token=... "
                f"or in the environment variable {TOKEN_VARIABLE}."
            )
        for name, value in (("timeout", timeout), ("max_wait", max_wait)):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected a number of seconds above 0.")
        for name, value in (("batch_size", batch_size), ("max_workers", max_workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.max_wait = max_wait
        self.batch_size = batch_size
        self.max_workers = max_workers
        self.columns = columns
        token = read_token(token)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=parts.scheme == "https",  # loading certificates takes longer than many a request
            # A proxy that the environment names cannot reach this machine.
            trust_env=not is_loopback(parts.hostname),
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=max_workers),
        )
        # Of its own: the jitter of a retry must not move the random numbers of the run.
        self._random = random.Random()
        self._answered = 0.0  # when the server last did, on the monotonic clock
        self._warned = False
        self._error = ""  # why the server had no score for some pictures of a call

    @cached_property
    def served(self) -> dict:
        """What the server says of its reward. Waits for a server that does not answer yet."""
        served = self._ask("GET", "/", threading.Event())
        if not isinstance(served.get("name"), str) or served.get("scope") not in ("sample", "group"):
            raise ValueError(f"{self.url} answers, but not as a reward server does: {str(served)[:200]}")
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
        executor = DaemonExecutor(self.max_workers)
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
            answer = self._ask("POST", "/score", stop, json.dumps(body).encode())
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
                f"{self.url} serves {answer['name']!r} now, and {self.served['name']!r} before: start that one again."
            )
        before = self.served.get("fingerprint")
        if (now := answer.get("fingerprint", before)) != before:
            raise RewardUnavailableError(
                f"{self.url} serves {self.served['name']!r} with other settings or of another revision than before "
                f"(fingerprint {now}, before {before}): start it again as it was."
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
                f"{self.url}/score answered with {str(answer)[:200]}: expected 'scores', {len(images)} numbers or null, "
                "and 'failed', the positions of those that should have been numbers."
            )
        if failed and answer.get("error"):
            self._error = str(answer["error"])[:500]
        return [math.nan if number in failed else value for number, value in enumerate(scores)]

    def _ask(self, method: str, path: str, stop: threading.Event, body: bytes | None = None) -> dict:
        """The answer to one request, which is made until there is one."""
        began = time.monotonic()
        attempt = 0
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex} if body else {}
        while True:
            after = 0.0
            advice = "Start it again, and the run from its last checkpoint; max_wait says how long to wait."
            try:
                response = self._client.request(method, self.url + path, content=body, headers=headers)
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
                if body and isinstance(error, httpx2.ReadTimeout):
                    problem = f"scoring takes longer than timeout={self.timeout:g} s"
                    advice = (
                        "If it is alive, raise timeout (and max_wait), or lower batch_size; then start the run from its "
                        "last checkpoint."
                    )
            else:
                if response.status_code == 200:
                    self._answered = time.monotonic()
                    if self._warned:
                        self._warned = False
                        logger.warning(f"Reward server {self.url} answers again.")
                    return self._parsed(response)
                problem = f"HTTP {response.status_code}: {_reason(response)}"
                if response.status_code not in RETRIED:
                    self._give_up(response.status_code, problem)
                after = _seconds(response.headers.get("Retry-After"))

            waited = time.monotonic() - max(began, self._answered)
            if waited >= self.max_wait or stop.is_set():
                raise RewardUnavailableError(
                    f"Reward server {self.url} has not answered for {waited:.0f} s ({problem}). {advice}"
                )
            if waited >= PATIENCE and not self._warned:
                self._warned = True
                logger.warning(
                    f"Reward server {self.url} does not answer ({problem}). Waiting for up to {self.max_wait:.0f} s."
                )
            delay = max(after, min(10.0, 0.25 * 2**attempt) * self._random.uniform(0.5, 1.0))
            attempt += 1
            # The last attempt is made when the time is up, not before.
            stop.wait(min(delay, self.max_wait - waited))

    def _give_up(self, status: int, problem: str):
        if status in (401, 403):
            raise RewardUnavailableError(
                f"Reward server {self.url} refuses the token ({problem}). Give the one that it was started with as "
                f"token=... or in the environment variable {TOKEN_VARIABLE}."
            )
        if status == 413:
            raise _TooLargeError(problem)
        raise ValueError(f"Reward server {self.url} refuses the request ({problem}).")

    def _parsed(self, response: httpx2.Response) -> dict:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"{self.url} answers, but not as a reward server does: {response.text[:200]!r}")
        return answer


class _TooLargeError(ValueError):
    """A smaller request would do."""


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
