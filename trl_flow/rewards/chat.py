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

"""Many questions about pictures, asked at once of a server that speaks OpenAI's chat protocol."""

import base64
import io
import itertools
import os
import random
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from .remote import is_loopback, request_within
from .reward import RewardUnavailableError
from .threads import DaemonExecutor


# What a wrong key, address or model gets, whatever the picture, and what to do about it.
_NEVER_WORKS = {
    401: "The key is missing or wrong: set the environment variable OPENAI_API_KEY, or the setting api_key.",
    403: "The key may not use this model: set another one (the environment variable OPENAI_API_KEY), or another model.",
    404: "There is no such model or address: compare `model` and `base_url` with what the server lists under /v1/models.",
}
# Statuses below 500 that say "later": request timeout, conflict, too many requests.
_LATER = (408, 409, 429)
_LONGEST_PAUSE = 60.0
CUT_OFF = "cut off at max_tokens"


class Question(NamedTuple):
    """Pictures, and what is asked about them."""

    images: tuple[Image.Image, ...]
    text: str


class Reply(NamedTuple):
    """
    What was answered.

    Attributes:
        text (`str`): Empty if the answer was no chat completion.
        first_token (`list[tuple[str, float]]`, *optional*): Most probable first tokens and their log-probabilities, if
            they were asked for and given.
        remark (`str`): What may be wrong with it, such as `CUT_OFF`.
    """

    text: str
    first_token: list[tuple[str, float]] | None = None
    remark: str = ""


class Failure(NamedTuple):
    """A question that got no answer, and why."""

    reason: str


class _Trouble(NamedTuple):
    """Why an attempt failed, and what that means for the next one."""

    reason: str
    remedy: str = ""
    server_is_up: bool = False
    is_final: bool = False
    retry_after: float = 0.0


class ChatEndpoint:
    """
    A server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, or somebody else's.

    A request is sent again, after a pause that doubles each time, when the server is busy or away (408, 409, 429, 5xx,
    time-outs, broken connections). Any other 4xx is final: what is refused once is refused again. When a request has
    used up its time, and none was answered meanwhile, the server is taken for gone, and the others are not waited for.

    Args:
        base_url (`str`): `"http://localhost:8000/v1"`.
        model (`str`): Name under which the server knows the model.
        api_key (`str`, *optional*): Otherwise the environment variable `OPENAI_API_KEY`, or none.
        max_workers (`int`): Requests that are under way at once.
        timeout (`float`): Seconds that a whole answer may take. Then the request is given up and sent again, also while
            the server goes on sending.
        max_wait (`float`): Seconds after which a request that keeps failing is not sent again.
        backoff (`float`): First pause in seconds.

    Raises:
        ValueError: If `base_url` is no address, or has a password, a query or a fragment in it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        max_workers: int = 16,
        timeout: float = 120.0,
        max_wait: float = 300.0,
        backoff: float = 1.0,
    ):
        if "@" in base_url:
            raise ValueError(
                "base_url has a user or password in it, and addresses are logged and published: leave them out, and set "
                "the environment variable OPENAI_API_KEY."
            )
        if "?" in base_url or "#" in base_url:
            raise ValueError(
                "base_url has a query or a fragment in it (after '?' or '#'), and addresses are logged and published: leave "
                "it out, and set a key as the environment variable OPENAI_API_KEY."
            )
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url={base_url!r} is no address: expected one like 'http://localhost:8000/v1'.")
        if max_workers < 1 or timeout <= 0:
            raise ValueError(
                f"max_workers={max_workers}, timeout={timeout}: expected at least one worker and more than 0 seconds."
            )
        self.address = f"{address.scheme}://{address.netloc}{address.path}"
        self.model = model
        self.max_workers = max_workers
        self.max_wait = max_wait
        self.backoff = backoff
        self._key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        path = address.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
        self._url = f"{address.scheme}://{address.netloc}{path}"
        self._timeout = timeout
        # Not huggingface_hub's client, which asks nobody at all while HF_HUB_OFFLINE is set, this machine's own servers
        # neither, and has no limit for an answer that comes in drops.
        self._client = httpx2.Client(
            # What servers without keys are sent by custom.
            headers={"Authorization": f"Bearer {self._key or 'EMPTY'}"},
            verify=address.scheme == "https",
            trust_env=not is_loopback(address.hostname),  # a proxy cannot reach this machine
            follow_redirects=True,
            timeout=httpx2.Timeout(timeout, pool=None),
            limits=httpx2.Limits(max_connections=max_workers),
        )
        # Its own generator: a pause must not change what is sampled next.
        self._random = random.Random()

    def __repr__(self) -> str:
        return f"{self.model} at {self.address}"

    def ask(self, questions: list[Question], **parameters) -> list[Reply | Failure]:
        """
        One answer for each question, at temperature 0. Pictures are sent as PNG, before the text.

        Threads, rather than an event loop: `asyncio.run` refuses to run inside a running one, as in a notebook.

        Args:
            questions (`list[Question]`): n questions.
            parameters: Further fields of the request; `None` leaves one out.

        Raises:
            RewardUnavailableError: If the server refuses the key, the model or the address, or answers no question at
                all.
        """
        if not questions:
            return []
        # Set when nothing more is to be sent, and wakes those that pause.
        stop = threading.Event()
        last_sign_of_life = -1.0
        pictures = {id(image): image for question in questions for image in question.images}

        def ask_one(question: Question) -> Reply | Failure:
            nonlocal last_sign_of_life
            content = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in question.images]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
            started, reason = time.monotonic(), "not sent, because the server is gone"
            for attempt in itertools.count():
                if stop.is_set():
                    return Failure(reason)
                outcome = self._send(messages, parameters)
                now = time.monotonic()
                if isinstance(outcome, Reply):
                    last_sign_of_life = now
                    return outcome
                reason = outcome.reason
                if outcome.remedy:
                    stop.set()
                    raise RewardUnavailableError(f"{self}: {reason}. {outcome.remedy}")
                if outcome.server_is_up:
                    last_sign_of_life = now
                if outcome.is_final:
                    return Failure(reason)
                left = started + self.max_wait - now
                if left <= 0 and last_sign_of_life < started:
                    stop.set()
                if left <= 0 or outcome.retry_after > left:
                    return Failure(f"{reason} ({attempt + 1} times in {now - started:.0f} s)")
                pause = min(_LONGEST_PAUSE, self.backoff * 2**attempt) * self._random.uniform(0.5, 1.0)
                stop.wait(min(max(pause, outcome.retry_after), left))

        with DaemonExecutor(min(self.max_workers, len(questions))) as pool:
            try:
                urls = dict(zip(pictures, pool.map(_data_url, pictures.values()), strict=True))
                answers = list(pool.map(ask_one, questions))
            finally:
                stop.set()
        if not any(isinstance(answer, Reply) for answer in answers):
            raise RewardUnavailableError(
                f"{self} answered none of {len(answers)} requests. The first: {answers[0].reason}. Is the server up, and "
                "does it take pictures and these settings?"
            )
        return answers

    def _send(self, messages: list[dict], parameters: dict) -> "Reply | _Trouble":
        """One attempt."""
        content = {"model": self.model, "messages": messages, "temperature": 0, **parameters}
        content = {name: value for name, value in content.items() if value is not None}
        try:
            response = request_within(self._client, self._timeout, "POST", self._url, json=content)
        except httpx2.RequestError as error:
            return _Trouble(self._excerpt(f"{type(error).__name__}: {error}"))
        if not response.is_success:
            status = response.status_code
            return _Trouble(
                self._excerpt(f"{status} {response.reason_phrase}: {response.text}"),
                remedy=_NEVER_WORKS.get(status, ""),
                server_is_up=status < 500,
                is_final=status < 500 and status not in _LATER,
                retry_after=_retry_after(response.headers.get("retry-after")),
            )
        try:
            return _read(response.json())
        except (ValueError, TypeError, LookupError, AttributeError):
            return Reply("", remark=f"no chat completion: {self._excerpt(response.text)}")

    def _excerpt(self, text: str) -> str:
        """The beginning of a message of the server, which may quote the key that it was sent."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= 300 else f"{text[:300]}..."


def _data_url(image: Image.Image) -> str:
    # Never JPEG: its blocks would be part of what is judged.
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _read(answer: dict) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    tokens = (choice.get("logprobs") or {}).get("content")
    # Some servers fill these in, and leave the list empty.
    likeliest = tokens[0].get("top_logprobs") if tokens else None
    return Reply(
        text=text if isinstance(text, str) else "",
        first_token=[(token["token"], token["logprob"]) for token in likeliest] if likeliest else None,
        remark=CUT_OFF if choice.get("finish_reason") == "length" else "",
    )


def _retry_after(header: str | None) -> float:
    """Seconds after which a server asks to be tried again: a number, or a date (RFC 9110, 10.2.3)."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
