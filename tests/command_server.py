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
Runs `trl-flow` and `python` commands for others, each in a fork of one process that has imported everything, which
takes longer than most of the commands themselves.

    python command_server.py SOCKET

[`write_commands`] makes programs that look like the real ones and have their commands run here, with their own
environment, working directory, input and output.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path


CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(server, [f"{{len(request):12}}".encode()], [0, 1, 2])
server.sendall(request.encode())
sys.exit(int(server.recv(16) or 1))
"""


def write_commands(folder: Path, address: str):
    """Programs `trl-flow` and `python` in a folder, for the server at `address`."""
    folder.mkdir()
    for name in ("trl-flow", "python"):
        path = folder / name
        path.write_text(CLIENT.format(python=sys.executable, address=address))
        path.chmod(0o755)


def serve(address: str):
    import datasets  # noqa: F401
    import diffusers
    import matplotlib.pyplot  # noqa: F401
    import torch
    import transformers

    import trl_flow
    import trl_flow.scripts.evaluate
    import trl_flow.scripts.report
    import trl_flow.scripts.training  # noqa: F401

    for module, names in (
        (diffusers, ["DiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "AutoencoderKL"]),
        (transformers, ["AutoModel", "AutoProcessor", "CLIPModel", "CLIPProcessor", "CLIPTextModelWithProjection"]),
        (trl_flow, trl_flow.__all__),
    ):
        for name in names:
            getattr(module, name)  # these are imported when they are asked for
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(sys.stdout.fileno(), b"ready\n")
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection)
            connection.close()


def answer(connection: socket.socket):
    """Does what one client asks for, in the process that is only there for it."""
    length, descriptors, _, _ = socket.recv_fds(connection, 12, 3)
    request = b""
    while len(request) < int(length):
        request += connection.recv(int(length) - len(request))
    name, words, directory, environment = json.loads(request)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)

    def watch():
        if not connection.recv(1):  # the client was killed
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    code = 1
    try:
        make_small(json.loads(os.environ.get("SMALL_SETTINGS", "{}")))
        code = run(name, words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.sendall(str(code or 0).encode())
    os._exit(code or 0)


def run(name: str, words: list[str]) -> int:
    sys.argv = [name, *words]
    if name == "trl-flow":
        from trl_flow.cli import main

        return main(words)
    option = words[0]
    sys.argv = words
    if option == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        program = os.path.abspath(option)
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    return 0


def make_small(settings: dict):
    """From now on these settings of a run, where it has them, have these values, whatever it is told."""
    import dataclasses

    import trl_flow
    from trl_flow.scripts.arguments import TrainingScriptArguments

    kinds = [getattr(trl_flow, name) for name in trl_flow.__all__ if name.endswith("Config")]
    for kind in {*kinds, TrainingScriptArguments}:
        names = settings.keys() & {field.name for field in dataclasses.fields(kind) if field.init}
        kind.__init__ = with_settings(kind.__init__, {name: settings[name] for name in names})


def with_settings(make, settings: dict):
    def make_with_settings(self, *args, **kwargs):
        make(self, *args, **{**kwargs, **settings})

    return make_with_settings


if __name__ == "__main__":
    serve(sys.argv[1])
