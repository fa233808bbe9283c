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
The commands and snippets of the README and the documentation, run: bash blocks by bash, in a folder with the files that
they name, Python by Python, settings as settings of a training command. What they name of the Hub is on a loopback Hub
under the same ids, but tiny, and runs end after one update; SUBSTITUTIONS says what else is not as it is written.
"""

import ast
import builtins
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_server import write_commands
from documents import ROOT, Block, find_blocks
from mock_judge import MockJudge
from tiny_hub import TinyHub, first_model, tiny_size

import trl_flow
from trl_flow.scripts.methods import METHODS


# What one's own settings would be, where a document leaves them out.
OWN = {
    "model_name_or_path": "shapes",
    "dataset_name": "prompts.txt",
    "dataset_train_split": "train[:16]",
    "dataset_test_split": "train[16:]",
}
# Lines of bash that are not run, and why.
NOT_RUN = {
    r"git clone .*": "there is nothing to clone from",
    r"make test\b.*": "these tests are what it runs",
    r"\.venv/bin/pre-commit install": "it would change the checkout that the tests are in",
    r"pip install .*": "it installs from the network what the tests run with",
    r"vllm serve .*": "a server for a model of gigabytes, on a GPU; a mock answers in its place",
}
# What is written differently before it is run, and why. {port} is a free one, {judge} a server that judges pictures.
SUBSTITUTIONS = [
    (r"(?<= )\.\.\.(?=$|\s)", " ".join(f"--{name} {value}" for name, value in OWN.items()), "arguments of one's own"),
    (r"@COMMIT\b", "@main", "the commit of a push above it"),
    (r"http://(localhost|host|127\.0\.0\.1):\d+/v1\b", "{judge}", "a judge on another machine"),
    (r"http://(localhost|host):\d+\b", "http://127.0.0.1:{port}", "a reward server on another machine"),
    (r"--port \d+", "--port {port}", "another test may have that one"),
    (
        r"^(trl-flow rewards serve [^#\n]*?) *(#.*)?$",
        "\\1 &\nuntil (: < /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.1; done",
        "what follows goes on in another terminal",
    ),
]
# Benchmarks, at the smallest size that they have.
BENCHMARKS = {
    "compare_methods.py(?!.* --draw)": "--only MixGRPO --seeds 1 --evaluations 300 --seconds 1",
    "dense_tails.py": "--steps 3 --group 2 --prompts 1 --parts 2",
    "full_size.py": "--tiny --model sd3.5-medium --method flow-grpo --max_steps 1",
    "learning.py": "--methods flow-grpo --seeds 1 -- --max_steps 1 --num_eval_prompts 4",
    "memory.py": "--model sd3.5-medium --gpu_memory 24",
    "model_cards.py": "--methods dense-grpo --max_steps 2 --num_eval_prompts 8",
    "models.py": "--only FluxPipeline",
    "prompt_embeddings.py": "--num_prompts 10",
    "reward_hacking.py": "--updates 2 --eval_steps 2",
    "rollout.py": "--num_generations 2 --num_inference_steps 3 --repeats 1",
    "switches.py": "--switches overlap --prompts 1 --repeats 1",
}
# What makes a run short, whatever its method.
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "num_eval_prompts": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "per_device_train_batch_size": 1,
    "num_generations": 4,
    "num_eval_inference_steps": 4,
    "disable_tqdm": True,
}
# Files of one's own that documents name.
FILES = {
    "prompts.txt": "\n".join(f"a red circle {number}" for number in range(520)),
    "mine.txt": "\n".join(f"a blue square {number}" for number in range(20)),
    "mine.jsonl": "\n".join(
        json.dumps({"caption": f"a green circle {number}", "style": ["plain", "bold"][number % 2]})
        for number in range(4)
    ),
    "my_rewards.py": "def brightness(prompts, images, **kwargs):\n"
    "    return [sum(image.convert('L').histogram()[128:]) / (image.width * image.height) for image in images]\n",
}

BLOCKS = [block for block in find_blocks() if block.language in ("bash", "python", "yaml")]


def runnable(code: str) -> str:
    """Lines of bash without those that are not run."""
    code = code.replace("\\\n", "\0")
    lines = [line for line in code.splitlines() if not any(re.match(pattern, line) for pattern in NOT_RUN)]
    return "\n".join(lines).replace("\0", "\\\n")


def whole(block: Block) -> str:
    """A snippet of Python, below those above it on its page that have the names that it doesn't define itself."""
    above = [other for other in BLOCKS if other.page == block.page and other.language == "python"]
    above = above[: above.index(block)]
    code = block.code
    for other in reversed(above):
        if unknown_names(code) & defined_names(other.code):
            code = other.code + "\n" + code
    return code


def defined_names(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def unknown_names(code: str) -> set[str]:
    loaded = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    return loaded - defined_names(code) - set(dir(builtins))


def finished_runs(text: str) -> set[str]:
    """Directories of runs that a text reads."""
    return set(re.findall(r"(?<!output_dir[ =])(?<!output_dir=.)\bruns/[\w-]+", text))


def is_slow(block: Block) -> bool:
    return (
        bool(finished_runs(block.code))  # it takes seconds to make one
        or block.language == "yaml"
        or bool(re.search(r"\.train\(|benchmarks/|make demo|evaluate|rewards serve", block.code))
        or (any(re.search(rf"trl-flow {name}\b(?!.*--(dry_run|help))", block.code) for name in METHODS))
    )


def parameters() -> list:
    return [
        pytest.param(block, id=f"{block.name}-{block.language}", marks=[pytest.mark.slow] if is_slow(block) else [])
        for block in BLOCKS
        if block.language != "bash" or runnable(block.code).strip()
    ]


@pytest.fixture(scope="module")
def hub():
    with TinyHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def bash(hub, tmp_path_factory):
    """Runs lines of bash, in which `trl-flow` and `python` are those of a server that has imported everything."""
    folder = tmp_path_factory.mktemp("commands")
    address, programs = str(folder / "socket"), folder / "bin"
    environment = {**hub.environment(str(folder / "home")), "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    write_commands(programs, address)
    make = programs / "make"
    make.write_text(f'#!/bin/sh\nexec {shutil.which("make")} BIN={programs} INSTALLED= "$@"\n')
    make.chmod(0o755)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("command_server.py"), address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout.readline() == b"ready\n"

    def run(code, cwd, settings=None, timeout=300):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{code}"],
            cwd=cwd,
            env={
                **environment,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "HOME": str(cwd),
                "SMALL_SETTINGS": json.dumps({**SMALL, **(settings or {})}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{code}\nexit code {result.returncode}\n{result.stdout}"
        return result.stdout

    run.programs = programs
    yield run
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def finished_run(bash, hub, tmp_path_factory):
    """A run with a model, of as many updates as any here; its checkpoints tell that it was stopped after the first."""

    @functools.cache
    def make(model: str) -> Path:
        hub.provide(model)
        folder = write_files(tmp_path_factory.mktemp("finished"))
        own = " ".join(f"--{name} {value}" for name, value in {**OWN, "model_name_or_path": model}.items())
        bash(
            f"trl-flow dense-grpo {own} --reward_funcs my_rewards.brightness --eval_reward_funcs jpeg_size "
            "--num_inference_steps 4 --save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 "
            "--report_to none --output_dir run",
            folder,
            tiny_size(model),
        )
        shutil.rmtree(folder / "run" / "checkpoint-2")
        return folder / "run"

    return make


def write_files(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def place(bash, finished_run, tmp_path):
    """A function that makes a folder like a checkout, with all that a text names beside."""

    def make(text: str) -> Path:
        write_files(tmp_path)
        shutil.copy(ROOT / "Makefile", tmp_path)
        for name in ("examples", "docs", "benchmarks"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_build"))
        (tmp_path / ".local/share/bash-completion/completions").mkdir(parents=True)
        (tmp_path / "tests").symlink_to(ROOT / "tests")
        (tmp_path / ".venv").symlink_to(bash.programs.parent)
        for name in finished_runs(text):
            shutil.copytree(finished_run(first_model(text)), tmp_path / name)
            config = tmp_path / name / "config.yaml"
            config.write_text(
                re.sub("^output_dir: .*$", f"output_dir: {name}", config.read_text(), flags=re.MULTILINE)
            )
        return tmp_path

    return make


@pytest.mark.parametrize("block", parameters())
def test_runs(block, bash, hub, place):
    text = runnable(block.code) if block.language == "bash" else block.code
    if block.language == "python":
        text = whole(block)
    named = [path.read_text() for path in map(ROOT.joinpath, re.findall(r"[\w./-]+\.yaml", text)) if path.is_file()]
    named = "\n".join([text, *named])
    hub.provide(named)
    folder = place(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = tiny_size(named)
    with MockJudge() as judge:
        for pattern, replacement, _ in SUBSTITUTIONS:
            replacement = replacement.replace("{port}", port).replace("{judge}", judge.base_url)
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        for name in re.findall(r"^python benchmarks/(.*)", text, re.MULTILINE):
            assert any(map(functools.partial(re.match, string=name), [*BENCHMARKS, ".* --draw"])), (
                f"no size for {name}"
            )
        for name, arguments in BENCHMARKS.items():
            text = re.sub(rf"(python benchmarks/{name}.*?)( *#.*)?$", rf"\1 {arguments}", text, flags=re.MULTILINE)
        for name, value in size.items():
            text = re.sub(rf"\b({name}\s*[=: ]\s*)\d+", rf"\g<1>{value}", text)
        if block.language == "python":
            (folder / "snippet.py").write_text(text)
            text = "python snippet.py"
        elif block.language == "yaml":
            (folder / "settings.yaml").write_text(text)
            settings = yaml.safe_load(text)
            missing = [f"--{name} {value}" for name, value in OWN.items() if name not in settings]
            text = f"trl-flow {method_with(settings)} --config settings.yaml --output_dir run {' '.join(missing)}"
        bash(text, folder, size)


def method_with(settings: dict) -> str:
    """A training command that has these settings."""
    for command in sorted(METHODS, key=lambda command: command != "flow-grpo"):
        fields = getattr(trl_flow, METHODS[command].config).__dataclass_fields__
        if not {name for name in settings if name not in fields} - {
            *trl_flow.scripts.arguments.TrainingScriptArguments.__dataclass_fields__
        }:
            return command
    raise AssertionError(f"no command has the settings {', '.join(settings)}")


@pytest.mark.parametrize(
    "pattern",
    [
        *(f"^{pattern}" for pattern in NOT_RUN),
        *(pattern for pattern, *_ in SUBSTITUTIONS),
        *(rf"\b{name.removesuffix('.py')}\b" for name in FILES),
    ],
)
def test_rules_are_needed(pattern):
    assert re.search(pattern, "\n".join(block.code for block in BLOCKS), re.MULTILINE), (
        "no document has this any more: take the rule away"
    )


def test_benchmarks_are_there():
    for name in BENCHMARKS:
        assert (ROOT / "benchmarks" / name.partition("(")[0]).is_file()
