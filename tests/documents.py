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
"""Code blocks of the README and the documentation."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/*.md"))
    if "_build" not in page.parts
)
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?:\{code-block\} *)?(?P<language>[^\s`]*).*\n(?P<code>(?:.*\n)*?)(?P=indent)(?P=fence) *$",
    re.MULTILINE,
)
# Commands of the benchmarks stand in sentences, too.
SPAN = re.compile(r"`(python benchmarks/[^`]+)`")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def find_blocks() -> list[Block]:
    """The blocks of all pages, and commands of benchmarks in their sentences that are in no block."""
    found, in_sentences = [], []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(page, line, match["language"], textwrap.dedent(match["code"])))
        for match in SPAN.finditer(FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)):
            in_sentences.append(Block(page, text.count("\n", 0, text.index(match[0])) + 1, "bash", match[1]))
    for block in in_sentences:
        if not any(re.search(rf"^{re.escape(block.code)}\b", other.code, re.MULTILINE) for other in found):
            found.append(block)
    return found
