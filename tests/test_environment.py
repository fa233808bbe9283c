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
"""A torchvision that does not fit torch is named, with what to do, instead of what transformers makes of it."""

import os
import subprocess
import sys

import pytest


# What a torchvision built for another torch raises when it is imported.
BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.fixture
def environment(tmp_path):
    folder = tmp_path / "site" / "torchvision"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(BROKEN)
    metadata = tmp_path / "site" / "torchvision-0.30.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.30.0\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_broken_torchvision_is_named(environment):
    result = run(environment, "-c", "from trl_flow import FlowGRPOTrainer")
    assert result.returncode == 1
    assert "ImportError: torchvision 0.30.0 is broken beside torch 2." in result.stderr
    assert "operator torchvision::nms does not exist" in result.stderr
    assert "`pip uninstall torchvision`" in result.stderr


def test_the_command_line_names_it_in_one_line(environment):
    result = run(environment, "-m", "trl_flow.cli", "doctor", "shapes")
    assert result.returncode == 1
    assert result.stderr.startswith("trl-flow doctor: error: torchvision 0.30.0 is broken beside torch")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_reward_names_it(environment):
    code = "from trl_flow.rewards import load_reward; load_reward('clip').prepare('cpu')"
    result = run(environment, "-c", code)
    assert result.returncode == 1
    assert "ImportError: torchvision 0.30.0 is broken beside torch 2." in result.stderr
