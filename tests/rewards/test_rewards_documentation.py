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
"""docs/rewards.md says of every built-in reward what its class says."""

import importlib
import sys
from pathlib import Path

import pytest

from trl_flow.rewards import REWARDS, About


DOCUMENTATION = Path(__file__).parents[2] / "docs" / "rewards.md"


def documented(name: str, about: About) -> str:
    """The paragraph of a reward."""
    return (
        f"### `{name}`\n\n"
        f"- **What**: {about.definition}\n"
        f"- **Scale**: {about.scale}\n"
        f"- **Source**: {about.source}\n"
        f"- **Licence of the weights**: {about.license}\n"
        f"- **Raised without better pictures by**: {about.hacked_by}\n"
    )


@pytest.mark.parametrize("name", REWARDS)
def test_what_the_documentation_says_of_a_reward(name):
    module, attribute = REWARDS[name].split(":")
    about = getattr(importlib.import_module(module, "trl_flow.rewards"), attribute).about
    assert all(text.strip() for text in about), about
    assert documented(name, about) in DOCUMENTATION.read_text()


if __name__ == "__main__":  # writes what belongs into the documentation
    for name, place in sorted(REWARDS.items()):
        module, attribute = place.split(":")
        about = getattr(importlib.import_module(module, "trl_flow.rewards"), attribute).about
        sys.stdout.write(documented(name, about) + "\n")
