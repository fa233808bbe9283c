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

"""
DeQA-Score as a reward server, for an environment that trl-flow cannot share: its model code wants transformers 4.36.1.

In an environment of its own, which needs nothing of trl-flow (Python 3.8 to 3.11):

    pip install transformers==4.36.1 torch==2.0.1 "numpy<2" accelerate==0.21.0 sentencepiece==0.1.99 protobuf pillow
    python deqa_server.py --port 8001

In that of the trainer:

    reward_funcs: ["http://127.0.0.1:8001"]

For another reward, write another `load`. The rest is the protocol: one call at a time, no batching across requests, open
to this machine only. The model's code is downloaded from the Hub and run: read it, and pin what you have read with
`revision=...`. Our tests run this file without the model.
"""

import argparse
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


MAX_BODY = 64 * 2**20  # bytes
Image.MAX_IMAGE_PIXELS = 16 * 2**20  # Pillow refuses pictures of more than twice that


def load():
    """
    DeQA-Score (https://github.com/zhiyuanyou/DeQA-Score): quality of a picture, whatever its prompt, from 1 to 5. Divided
    by 5, as Flow-GRPO does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        "zhiyuanyou/DeQA-Score-Mix3",
        trust_remote_code=True,
        attn_implementation="eager",
        torch_dtype=torch.float16,
        device_map="auto",
    )

    def reward(prompts, images, columns):
        with torch.inference_mode():
            return [value / 5 for value in model.score(images).tolist()]

    return reward


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, reward, name, port):
        self.reward = reward
        self.name = name
        self.one_at_a_time = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self):
        # What is left out (requires, prompt_set, source, about) counts as empty.
        self.send(200, {"name": self.server.name, "scope": "sample", "batch_size": 16, "ready": True})

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        refused = None
        if not (length.isascii() and length.isdecimal()):
            refused = 411, "expected a Content-Length"
        elif int(length) > MAX_BODY:
            refused = 413, f"more than {MAX_BODY} bytes"
        # A web page can make a browser post to this machine, but not with this type.
        elif self.headers.get_content_type() != "application/json":
            refused = 415, "expected Content-Type: application/json"
        if refused:
            self.close_connection = True  # the body is not read
            return self.send(refused[0], {"error": refused[1]})
        length = int(length)
        try:
            request = json.loads(self.rfile.read(length))
            images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in request["images"]]
            prompts, columns = request["prompts"], request.get("columns", {})
        except Exception as error:  # 400: the client does not try again
            return self.send(400, {"error": f"no request for scores: {error}"})
        try:
            scores, errors = self.score(prompts, images, columns), []
        except Exception:  # it may be one picture's: the others have scores
            scores, errors = [], []
            for i in range(len(images)):
                try:
                    values = {name: column[i : i + 1] for name, column in columns.items()}
                    scores += self.score(prompts[i : i + 1], images[i : i + 1], values)
                except Exception as error:  # never a made-up score
                    scores.append(float("nan"))
                    errors.append(repr(error))
        # JSON has no NaN.
        failed = [number for number, value in enumerate(scores) if value != value]
        scores = [None if value != value else value for value in scores]
        self.send(200, {"scores": scores, "failed": failed, "error": "; ".join(errors[:1])})

    def score(self, prompts, images, columns):
        with self.server.one_at_a_time:
            scores = [float(value) for value in self.server.reward(prompts, images, columns)]
        if len(scores) != len(images):
            raise ValueError(f"{len(scores)} scores of {len(images)} pictures")
        return scores

    def send(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8001)
    server = Server(load(), "deqa", parser.parse_args().port)
    print(f"Reward 'deqa' is served at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
