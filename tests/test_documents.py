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
"""Links, commands and code of the README and the documentation: they lead somewhere, parse, and name what there is."""

import ast
import importlib
import os
import re
import shlex

import pytest
import yaml
from documents import PAGES, ROOT, find_blocks

from trl_flow.cli import COMMANDS
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.training import make_training_parser


KNOWN = [name for commands in COMMANDS.values() for name in commands]
# Blocks that are not run, beside Sphinx's directives.
TEXT = ("", "text", "bibtex", "py")  # `py`: code of other projects


def blocks(language: str) -> list:
    """Code blocks of all pages, each with a name to find it by."""
    return [pytest.param(block.code, id=block.name) for block in find_blocks() if block.language == language]


def commands() -> list:
    """Command lines of trl-flow, without what stands for arguments of one's own."""
    found = []
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line.partition(" > ")[0], comments=True) if word != "..."]
            if words[:1] == ["trl-flow"]:
                found.append(pytest.param(words[1:], id=f"{block.id} {' '.join(words[:3])}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_languages_of_blocks():
    """Those of test_documents_run.py, so that no block is missed for its name."""
    for block in find_blocks():
        known = block.language in ("bash", "python", "yaml", *TEXT) or block.language.startswith("{")
        assert known, f"{block.name}: {block.language!r} is not run by any test"


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *arguments = words
    assert command in KNOWN
    if command in METHODS:
        if "--config" in arguments and not os.path.exists(path := arguments[arguments.index("--config") + 1]):
            # A run's own, which is made of the same settings.
            arguments[arguments.index(path)] = f"examples/shapes/{command}.yaml"
        make_training_parser(command).parse_args_and_config([*arguments, "--use_cpu", "--bf16", "false"])
    else:
        module = importlib.import_module(f"trl_flow.scripts.{command.replace('-', '_')}")
        module.make_parser(prog=f"trl-flow {command}").parse_args_and_config(arguments)
    assert not os.path.exists("sd35-bright")


@pytest.mark.parametrize("code", blocks("python"))
def test_code_is_python_that_imports(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_flow"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_yaml(text):
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, name in re.findall(r"`(trl-flow|make) ([a-z][\w-]*)[^`\n]*`", page.read_text()):
        assert name in (KNOWN if program == "trl-flow" else targets), f"{program} {name}"
