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
"""Links from pages to what is not a page (code, configurations, results): on GitHub to the repository, else to a copy."""

import os
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}


def leave(app, docname, source):
    up = "../" * docname.count("/")
    repository = os.environ.get("GITHUB_REPOSITORY")

    def replace(match: re.Match) -> str:
        text, target = match["text"], match["target"]
        path, _, anchor = target.partition("#")
        if path in PAGES:
            return f"[{text}]({up}{PAGES[path]}{'#' if anchor else ''}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # which Sphinx complains of
        if repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"[{text}](https://github.com/{repository}/{kind}/{os.environ.get('GITHUB_REF_NAME', 'main')}/{target})"
        return f"`{path}`" if (ROOT / path).is_dir() else f"[{text}](path:{up}../{path})"

    source[0] = re.sub(rf"(?<!!)\[(?P<text>[^\]\[]+)\]\({up}\.\./(?P<target>[^)\s]+)\)", replace, source[0])


def collect(app, docname, source):
    # `make linkcheck` is to see the links of what is no page, too.
    if app.builder.name == "linkcheck" and docname == app.config.root_doc:
        texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("trl_flow/**/templates/*.md"))]
        source[0] += "".join(f"\n<{url}>\n" for text in texts for url in re.findall(r"\]\((https://[^\s){]+)\)", text))


def setup(app):
    app.connect("source-read", leave)
    app.connect("source-read", collect)
    return {"parallel_read_safe": True}
