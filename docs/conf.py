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
"""Sphinx configuration of the documentation: `make docs` builds it."""

import os
import re
import sys
from pathlib import Path


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import trl_flow  # noqa: E402


project = "trl-flow"
author = "The trl-flow authors"
copyright = f"2026, {author}"
version = release = trl_flow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "sphinx.ext.napoleon", "commands", "outside"]
exclude_patterns = ["_build"]

# Headings down to the third level can be linked to, by the same names as on GitHub.
myst_heading_anchors = 3
# As on GitHub, too, an address is a link; a name of a file, such as report.md, is none.
myst_enable_extensions = ["linkify"]
myst_linkify_fuzzy_links = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"  # the types are in the docstrings, with the shapes
autodoc_preserve_defaults = True

napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Under titles of their own: attributes, and the groups of settings in the docstrings of configs.
napoleon_custom_sections = [("Attributes", "params_style")] + [
    (title, "params_style")
    for path in sorted((HERE.parent / "trl_flow/trainer").glob("*_config.py"))
    for title in re.findall(r"^ +> (Parameters .*)$", path.read_text(), re.MULTILINE)
]

# A reference that leads nowhere is a warning, and a warning an error. Names of other packages have no inventory here.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!trl_flow\b)[\w.]+")]

# Quotes of commands and JSON are meant as they are.
smartquotes = False

html_theme = "furo"
html_title = "trl-flow"
html_copy_source = False
html_use_index = False  # the search and the reference's own pages are enough, and it is too wide for a phone
html_domain_indices = False
html_show_sourcelink = False
# On GitHub the pages know where their source is.
if repository := os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options = {
        "source_repository": f"https://github.com/{repository}",
        "source_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "source_directory": "docs/",
    }

# `make linkcheck`. These refuse programs, or ask them to wait.
linkcheck_retries = 2
linkcheck_timeout = 20
linkcheck_workers = 4
linkcheck_anchors_ignore_for_url = [r"https://github\.com/"]  # drawn by scripts
