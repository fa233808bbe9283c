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

"""The documentation site: what is public is in its reference and described, links lead somewhere, Sphinx has no complaint."""

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

import trl_flow
from trl_flow.cli import COMMANDS
from trl_flow.policy.families import FAMILIES
from trl_flow.scripts.methods import METHODS


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("**/*.md") if "_build" not in page.parts)
READ_ON_GITHUB = [*PAGES, *ROOT.glob("*.md")]
PACKAGES = ("hub", "policy", "prompts", "report", "rewards", "rollout", "shapes")


def names_in_reference() -> dict[str, str]:
    """Full name -> kind (`class`, `function` ...) of all that the pages of docs/api ask autodoc for."""
    found = {}
    for page in (DOCS / "api").glob("*.md"):
        module = None
        for line in page.read_text().splitlines():
            if match := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
                module = match[1]
            elif match := re.fullmatch(r"\.\. auto(\w+):: (\S+)", line):
                found[f"{module}.{match[2]}"] = match[1]
    return found


REFERENCE = names_in_reference()


def public_names(package: str) -> list[str]:
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    # What the package takes from its modules is what it offers.
    return [name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)]


@pytest.mark.parametrize("package", ["trl_flow", *(f"trl_flow.{name}" for name in PACKAGES)])
def test_public_names_are_in_the_reference(package):
    # Names that `trl_flow` itself has are there once, as its own.
    shown = {name.rpartition(".")[2] for name in REFERENCE if name.startswith(f"{package}.") or name.count(".") == 1}
    assert set(public_names(package)) <= shown


def described(docstring: str) -> list[str] | None:
    """Arguments that a docstring describes; `None` if it has no section of them."""
    section = re.search(r"^(?:Args|Parameters):\n((?:    .*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    if section is None:
        return None
    names = []
    for line in re.findall(r"^    (\w.*|\*.*)$", section[1], re.MULTILINE):
        # `a, b (type), c (type): what they are`, of which types may hold parentheses, in code, and colons.
        line = re.sub(r"`[^`]*`", "", line)
        while (shorter := re.sub(r"\([^()]*\)", "", line)) != line:
            line = shorter
        names += [name.strip(" *.") for name in re.split(r"[:(]", line)[0].split(",")]
    return names


def is_described(thing, docstring: str) -> bool:
    """Whether all arguments are described, and no others. What is passed on (`**kwargs`) may be left out."""
    parameters = inspect.signature(thing).parameters
    found = described(docstring) or []
    passed_on = {name for name, value in parameters.items() if value.kind in (value.VAR_POSITIONAL, value.VAR_KEYWORD)}
    return len(found) == len(set(found)) and set(found) | passed_on == set(parameters) - {"self", "cls"} | passed_on


@pytest.mark.parametrize("name", [name for name, kind in REFERENCE.items() if kind == "function"])
def test_arguments_of_functions_are_described(name):
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    assert is_described(function, function.__doc__), inspect.signature(function)


@pytest.mark.parametrize("name", [name for name, kind in REFERENCE.items() if kind == "class"])
def test_arguments_of_classes_are_described(name):
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    assert kind.__doc__
    if not inspect.isclass(kind):
        return  # a union of types
    if name.endswith("Config"):
        # Settings that another config introduced may have other defaults here, and need no second description.
        own = set(kind.__dict__.get("__annotations__", {}))
        own -= {field.name for base in kind.__bases__ for field in dataclasses.fields(base)}
        assert set(described(kind.__doc__) or []) >= own
        assert set(described(kind.__doc__) or []) <= {field.name for field in dataclasses.fields(kind)}
    elif "__init__" in vars(kind) and not dataclasses.is_dataclass(kind):
        assert is_described(kind, kind.__doc__), inspect.signature(kind)
    for method in vars(kind).values():
        method = getattr(method, "__func__", method)
        if inspect.isfunction(method) and method.__doc__ and described(method.__doc__) is not None:
            assert is_described(method, method.__doc__), method.__qualname__


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(
        r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def links(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", READ_ON_GITHUB, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work_on_github(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            other = (page.parent / path) if path else page
            assert other.exists(), target
            assert not anchor or anchor in slugs(other.read_text()), target


@pytest.mark.parametrize("page", READ_ON_GITHUB, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_can_be_seen_on_a_dark_page(page):
    """Black letters on a transparent ground could not be."""
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+\.png)\)", page.read_text()):
        with Image.open(page.parent / target) as image:
            assert image.convert("RGBA").getchannel("A").getextrema() == (255, 255), target


def test_every_page_is_in_a_table_of_contents():
    listed = {"index"}
    for page in PAGES:
        for entries in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            names = re.findall(r"^(?!:)(?:.* <)?([\w/]+)>?$", entries, re.MULTILINE)
            listed |= {str((page.parent / name).relative_to(DOCS)) for name in names}
    assert listed == {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES}


def external_links() -> list[tuple[str, str]]:
    pages = [*READ_ON_GITHUB, *ROOT.glob("trl_flow/**/templates/*.md"), *ROOT.glob("trl_flow/**/*.py")]
    return sorted(
        {
            (url.rstrip(".,;:"), str(page.relative_to(ROOT)))
            for page in pages
            for url in re.findall(r"\]\((https?://[^\s){}]+)\)", page.read_text())
        }
    )


@pytest.mark.parametrize(("url", "page"), external_links())
def test_external_links_are_well_formed(url, page):
    parts = urlsplit(url)
    assert parts.scheme == "https"
    assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}", parts.netloc)
    path = parts.path.strip("/").split("/")
    if parts.netloc == "github.com":
        assert len(path) >= 2 and all(re.fullmatch(r"[\w.-]+", name) for name in path[:2])
        assert len(path) == 2 or path[2] in ("blob", "tree", "issues", "pull", "releases")
    elif parts.netloc in ("arxiv.org", "huggingface.co") and path[0] in ("abs", "papers", "pdf"):
        assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{5}", path[1])
    elif parts.netloc == "huggingface.co" and path[0] not in ("docs", "blog"):
        assert len(path[1:] if path[0] in ("datasets", "spaces") else path) >= 2


def test_papers_beside_a_trainer_are_its_own():
    """In tables, whose rows are about one trainer."""
    checked = set()
    for page in READ_ON_GITHUB:
        for row in re.findall(r"^\|.*\|$", page.read_text(), re.MULTILINE):
            trainers = set(re.findall(r"`(\w+Trainer)`", row)) & set(trl_flow.__all__)
            papers = set(re.findall(r"(?:arxiv\.org/abs|huggingface\.co/papers)/([\d.]+)", row))
            if len(trainers) == 1 and papers:
                (trainer,) = trainers
                assert papers == {getattr(trl_flow, trainer)._paper["id"]}, f"{page.name}: {row}"
                checked.add((page.name, trainer))
    assert {name for page, name in checked if page == "paper_index.md"} >= {
        name for name in trl_flow.__all__ if name.endswith("Trainer") and name != "FlowGRPOFastTrainer"
    }


def test_counts_of_methods_families_and_pipelines():
    """Those that the README and the first steps tell are those of the library, and of docs/models.md."""
    train, tried = re.search(
        r"^(\d+) of the (\d+) that were tried", (DOCS / "models.md").read_text(), re.MULTILINE
    ).groups()
    readme, first_steps = ((ROOT / name).read_text() for name in ("README.md", "docs/getting_started.md"))
    assert f"Twelve methods are here over one loop, for {len(FAMILIES)} families" in readme and len(METHODS) == 12
    assert f"{tried} tiny pipelines" in readme and f": {train} train;" in readme
    assert f"Of {tried} pipelines and variants that we tried {train} do" in first_steps


@pytest.fixture
def docstrings(monkeypatch):
    pytest.importorskip("docutils")
    monkeypatch.syspath_prepend(DOCS / "extensions")
    return importlib.import_module("docstrings")


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("`x` and `y`s", "``x`` and ``y``\\ s"),
        ("[`load_reward`]", ":py:obj:`load_reward <.load_reward>`"),
        ("[`~trl_flow.hub.save_adapter`]", ":py:obj:`~trl_flow.hub.save_adapter`"),
        ("[`trl_flow.policy.diffusion`]", "``trl_flow.policy.diffusion``"),  # a module, which has no page
        ("[`~torch.Tensor`]", "``Tensor``"),
        ("[a\n  paper](https://arxiv.org/abs/1)", "`a paper <https://arxiv.org/abs/1>`__"),
        ("the largest |D| of x_", "the largest \\|D\\| of x\\_"),
        ("Example:\n\n```python\nx = '`a`'\n```", ".. rubric:: Example\n\n.. code-block:: python\n\n    x = '`a`'\n"),
        ("Parameters:\n    > Of the model\n\n    a (`int`): A.", "Of the model:\n    a (``int``): A."),
    ],
)
def test_docstrings_become_restructured_text(docstrings, markdown, expected):
    assert docstrings.to_rst(markdown) == expected


class Page(HTMLParser):
    """Anchors, links, and what a browser would load by itself."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.add(attrs["href"])
        if tag in ("script", "img", "iframe") and "src" in attrs:
            self.loads.add(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.add(attrs["href"])


@pytest.mark.slow
def test_site(tmp_path):
    site = tmp_path / "site"
    build = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-b",
            "html",
            "-W",
            "--keep-going",
            "-q",
            "-d",
            tmp_path / "trees",
            DOCS,
            site,
        ],
        env={
            **{name: value for name, value in os.environ.items() if name != "GITHUB_REPOSITORY"},
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr

    pages = {path: Page(path) for path in site.glob("**/*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        for target in page.links | page.loads:
            parts = urlsplit(target)
            if parts.scheme:
                assert target not in page.loads or parts.scheme == "data", f"{path.name} loads {target}"
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert other.exists(), f"{path.name}: {target}"
            if parts.fragment and other in pages:
                assert unquote(parts.fragment) in pages[other].ids, f"{path.name}: {target}"

    # What the reference has asked for is in it, and every command with its settings.
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    assert REFERENCE.keys() <= ids
    assert {name for commands in COMMANDS.values() for name in commands} <= pages[site / "command_line.html"].ids
    text = (site / "command_line.html").read_text()
    assert all(f">{name}<" in text for name in ("tail_steps", "num_generations", "on_reward_hacking", "repo_id"))
    # Of the more than a hundred fields of TrainingArguments none but those that are ours.
    assert "dataloader_num_workers" not in (site / "api/configs.html").read_text()
