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

"""A server that speaks OpenAI's chat protocol and judges pictures by their colours, with faults on demand."""

import base64
import io
import json
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


CHANNELS = ("red", "green", "blue")


def share_of(color: str, image: Image.Image) -> float:
    """How much of a picture's light is of one colour: 0 to 1."""
    light = np.asarray(image, dtype=np.float64).reshape(-1, 3).mean(0)
    return light[CHANNELS.index(color)] / light.sum()


def judge_by_color(text: str, images: list[Image.Image]) -> dict:
    """
    A reply in the form that the question asks for: how much of the colour that the prompt names is in the picture.
    Prompts are between [], 「」 or quotation marks.
    """
    color = re.search(r"[\[「\"][^\]」\"]*?(red|green|blue)", text)[1]
    shares = [share_of(color, image) for image in images]
    if "Image 1 is better" in text:
        better = "Both images are equally good." if shares[0] == shares[1] else ""
        return {"content": f"I see two. {better or f'Image {1 + (shares[1] > shares[0])} is better.'}"}
    if "Alignment Score" in text:
        marks = (1 + 4 * shares[0], 5 - 4 * shares[0], 3)
        names = ("Alignment", "Coherence", "Style")
        return {
            "content": "\n".join(f"{name} Score (1-5): {mark:.2f}" for name, mark in zip(names, marks, strict=True))
        }
    if "Checkpoints" in text:
        asked = re.findall(r"^\d+\. .*: (red|green|blue)$", text, re.MULTILINE)
        brightest = max(CHANNELS, key=lambda channel: share_of(channel, images[0]))
        return {"content": f"<analysis>[]</analysis>\n<score>{[int(name == brightest) for name in asked]}</score>"}
    if "Final Score" in text:
        return {"content": f"{color} (color): 1\nFinal Score: {1 + round(4 * shares[0])}"}
    yes = min(max(shares[0], 1e-6), 1 - 1e-6)
    first_token = {"Yes": 0.9 * yes, "No": 0.9 * (1 - yes), "Maybe": 0.1}
    return {
        "content": max(first_token, key=first_token.get),
        "first_token": {token: math.log(probability) for token, probability in first_token.items()},
    }


class MockJudge:
    """
    The server, for the length of a `with` block.

    Args:
        fault (`Callable`, *optional*): Called with the number of the attempt (from 0, counted for each question apart),
            the text and the pictures, before a question is judged. Returns `None`, an HTTP status, a dictionary with
            `status` and, if wanted, `headers` and `body`, `"hang"`, `"cut"`: an answer that breaks off, or `"drops"`: one
            that takes half a minute.
        judge (`Callable`): From text and pictures to `content` and, if wanted, `first_token`, `top_logprobs` (instead of
            those that belong to it) and `finish_reason`.
        port (`int`): 0 for any free one.

    Attributes:
        posts (`list[dict]`): Bodies, in the order in which they came.
        headers (`list[dict]`): Headers of each.
        peak (`int`): Most requests that were under way at once.
    """

    def __init__(self, fault: Callable | None = None, judge: Callable = judge_by_color, port: int = 0):
        self.fault, self.judge = fault, judge
        self.posts, self.headers, self.peak = [], [], 0
        self._attempts, self._active, self._lock = {}, 0, threading.Lock()
        self._released = threading.Event()
        mock = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                mock._post(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _post(self, handler: BaseHTTPRequestHandler):
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        body = json.loads(raw)
        with self._lock:
            self.posts.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            attempt = self._attempts[raw] = self._attempts.get(raw, -1) + 1
            self._active += 1
            self.peak = max(self.peak, self._active)
        try:
            answer = self._answer(handler.path, attempt, body)
        finally:
            with self._lock:
                self._active -= 1
        payload = json.dumps(answer["body"]).encode() if not isinstance(answer["body"], bytes) else answer["body"]
        try:
            handler.send_response(answer["status"])
            for name, value in {"Content-Type": "application/json", **answer.get("headers", {})}.items():
                handler.send_header(name, value)
            drops = answer.get("drops", 0)
            handler.send_header("Content-Length", str(drops + len(payload) + answer.get("missing", 0)))
            handler.end_headers()
            for _ in range(drops):
                handler.wfile.write(b" ")
                self._released.wait(0.05)
            handler.wfile.write(payload)
        except ConnectionError:  # the client did not wait
            pass

    def _answer(self, path: str, attempt: int, body: dict) -> dict:
        if path != "/v1/chat/completions":
            return {"status": 404, "body": {"error": {"message": f"no such path: {path}"}}}
        *pictures, text = body["messages"][0]["content"]
        images = [_decode(picture["image_url"]["url"]) for picture in pictures]
        fault = self.fault(attempt, text["text"], images) if self.fault else None
        if fault == "hang":
            self._released.wait(30)
            fault = 503
        if fault == "drops":
            return {"status": 200, "body": _completion(body, "Yes"), "drops": 600}
        if fault == "cut":
            return {"status": 200, "body": _completion(body, "Yes"), "missing": 100}
        if isinstance(fault, int):
            fault = {"status": fault}
        if fault is not None:
            return {"body": {"error": {"message": "injected"}}, **fault}
        return {"status": 200, "body": _completion(body, **self.judge(text["text"], images))}


def _decode(url: str) -> Image.Image:
    kind, _, png = url.partition(",")
    assert kind == "data:image/png;base64", kind
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    assert image.format == "PNG", image.format
    return image.convert("RGB")


def _completion(
    body: dict, content: str, first_token: dict | None = None, finish_reason: str = "stop", **top_logprobs
) -> dict:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    if body.get("logprobs") and first_token is not None:
        top = [{"token": token, "logprob": logprob} for token, logprob in first_token.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top[: body["top_logprobs"]], **top_logprobs}]}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
