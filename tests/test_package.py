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

"""The package: what importing it costs, what it exports, and which versions it asks for."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trl_flow


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text)
    for text in (*PROJECT["dependencies"], *(t for texts in PROJECT["optional-dependencies"].values() for t in texts))
]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines if line)}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_nothing_heavy():
    code = (
        "import sys; import trl_flow, trl_flow.cli;"
        "print(*[name for name in "
        "('torch', 'transformers', 'diffusers', 'trl', 'peft', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert run_python(code) == ""


def test_public_names_are_those_of_their_modules():
    for name in trl_flow.__all__:
        value = getattr(trl_flow, name)
        if name != "__version__":
            assert value.__name__ == name
            assert value.__module__.startswith(f"trl_flow.{trl_flow._MODULES[name].split('.')[0]}")
    assert set(trl_flow.__all__) <= set(dir(trl_flow))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(trl_flow.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == trl_flow._MODULES


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        trl_flow.PPOTrainer  # noqa: B018


def test_constraints_satisfy_the_project():
    pins = constraints()
    assert pins["torch"] == "2.13.0"
    for requirement in REQUIREMENTS:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no tested version"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} excludes {pins[name]}"


def test_tested_versions_of_the_libraries_we_extend_are_installed():
    pins = constraints()
    for name in ("trl", "transformers", "diffusers", "peft", "accelerate", "datasets"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed")
        if installed != pins[name]:
            pytest.skip(f"this environment holds {name} {installed}, not the tested {pins[name]}")


def test_ruff_is_the_same_everywhere():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit"))
    assert ruff == f"v{constraints()['ruff']}"


def test_every_import_is_declared():
    """What the package imports is the standard library, itself, or a declared dependency."""
    modules = {"pil": "pillow", "yaml": "pyyaml"}
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    missing = {}
    for path in (ROOT / "trl_flow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                package = canonicalize_name(modules.get(top.lower(), top))
                if top not in sys.stdlib_module_names and top != "trl_flow" and package not in declared:
                    missing.setdefault(package, path.relative_to(ROOT))
    assert missing == {}


def test_makefile_refuses_an_unknown_method(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    methods = re.search(r"^METHODS := (.*)$", makefile, re.MULTILINE)[1].split()
    for method in methods:
        assert (ROOT / "examples" / "shapes" / f"{method}.yaml").is_file()
    # An environment that counts as installed, so that nothing is built here.
    (tmp_path / "Makefile").write_text(makefile)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    result = subprocess.run(["make", "demo", "METHOD=grpo"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "METHOD=grpo is unknown" in result.stderr
    assert all(method in result.stderr for method in methods)


def test_makefile_refuses_an_old_python(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.9.1" in result.stderr and "3.11 or newer" in result.stderr
