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
"""Writes self-contained pages from the templates of this package."""

from pathlib import Path

import jinja2


def write_page(path: Path, template: str, **values) -> Path:
    """
    Writes a page; one that is there is replaced as a whole.

    Args:
        path (`Path`): Where to.
        template (`str`): Its template's name.
        values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trl_flow.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    partial.write_text(environment.get_template(template).render(**values), encoding="utf-8")
    partial.replace(path)
    return path
