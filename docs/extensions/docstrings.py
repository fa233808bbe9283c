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
"""Docstrings in the format of the Hugging Face libraries -> reStructuredText, of which napoleon makes the rest."""

import dataclasses
import importlib.util
import inspect
import re
import textwrap

from docutils import nodes

from trl_flow import FlowGRPOConfig


# Packages whose classes docstrings name in references, and of which there is no inventory to link to.
OTHERS = ("accelerate", "datasets", "diffusers", "peft", "PIL", "torch", "transformers", "trl")

# A reference, code, or a link: [`~a.b.C`], `code`, [text](url).
INLINE = re.compile(
    r"\[`(?P<name>[^`]+)`\](?!\()|(?P<ticks>`+)(?P<code>.+?)(?P=ticks)|\[(?P<text>[^\]]+)\]\((?P<url>[^)\s]+)\)",
    re.DOTALL,
)


def inline(match: re.Match) -> str:
    if name := match["name"]:
        path = name.removeprefix("~")
        if path.partition(".")[0] in OTHERS:
            return literal(path.rpartition(".")[2] if name != path else path)
        if path.startswith("trl_flow.") and is_module(path):
            return literal(path)
        # A name without its module is looked for in all of them.
        return f":py:obj:`{name}`" if path.startswith("trl_flow") else f":py:obj:`{path} <.{path}>`"
    if match["code"]:
        # What follows may be a letter, as in the plural of a name.
        return literal(match["code"]) + ("\\ " if match.string[match.end() : match.end() + 1].isalnum() else "")
    return f"`{' '.join(match['text'].split())} <{match['url']}>`__"


def is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # of a class, whose members are not modules
        return False


def literal(code: str) -> str:
    return f"``{' '.join(code.split())}``"


def prose(text: str) -> str:
    """Text between two code blocks."""
    # Not markup here: |D|, a trailing underscore, the stars of **kwargs.
    parts, end = [], 0
    for match in INLINE.finditer(text):
        parts += [escape(text[end : match.start()]), inline(match)]
        end = match.end()
    text = "".join([*parts, escape(text[end:])])
    # Groups of settings become sections of their own, "> Parameters that control ..." their titles.
    text = re.sub(r"^Parameters:\n\s*(?=> )", "", text, flags=re.MULTILINE)
    return re.sub(r"^ *> (.+)\n\s*\n", r"\1:\n", text, flags=re.MULTILINE)


def escape(text: str) -> str:
    return re.sub(r"(\||(?<=\w)_(?!\w))", r"\\\1", text)


def to_rst(docstring: str) -> str:
    """The docstring with its Markdown turned into reStructuredText; sections and their indentation stay."""
    parts = re.split(r"^( *)```(\w*)\n(.*?)^ *```$", docstring, flags=re.DOTALL | re.MULTILINE)
    result = prose(parts[0])
    for indent, language, code, text in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
        block = textwrap.indent(textwrap.dedent(code), "    ")
        result += textwrap.indent(f".. code-block:: {language or 'text'}\n\n{block}", indent) + prose(text)
    # Code speaks for itself: the title would make a section of what follows.
    return re.sub(r"^Examples?:$", ".. rubric:: Example", result, flags=re.MULTILINE)


def process_docstring(app, what, name, obj, options, lines):
    if what == "data":
        # What autodoc has found is the docstring of `dict`. The page says what it is, and here is what is in it.
        names = obj if isinstance(obj, (dict, list, tuple)) else ()
        lines[:] = [", ".join(literal(str(getattr(name, "name", name))) for name in names), ""]
        return
    lines[:] = to_rst("\n".join(lines)).split("\n")
    if what == "class" and name.endswith("Config") and (defaults := own_defaults(obj)):
        # Above the settings that it adds, if any.
        position = next((n for n, line in enumerate(lines) if re.match(r"(Parameters|Args).*:$", line)), len(lines))
        other = "TrainingArguments" if obj is FlowGRPOConfig else "FlowGRPOConfig"
        lines[position:position] = [f"Defaults that differ from those of {literal(other)}: {', '.join(defaults)}.", ""]
    if what in ("property", "attribute"):
        lines[:0] = ["..", ""]  # or napoleon takes what stands before a colon in the first line for a type


def own_defaults(config: type) -> list[str]:
    """Settings of which a config changes the default: the shared ones', or if it is theirs, that of TrainingArguments."""
    kinds = [kind for kind in reversed(config.__mro__) if dataclasses.is_dataclass(kind)]
    if config is not FlowGRPOConfig:
        kinds = kinds[kinds.index(FlowGRPOConfig) :]
    changed = []
    for name, field in config.__dataclass_fields__.items():
        first = next(kind.__dataclass_fields__[name] for kind in kinds if name in kind.__dataclass_fields__)
        if default_of(first) != (now := default_of(field)):
            changed.append(literal(f"{name}={getattr(now, 'value', now)!r}"))
    return changed


def default_of(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def process_signature(app, what, name, obj, options, signature, return_annotation):
    # More than a hundred settings, most of them of TrainingArguments: the docstring has ours.
    if what == "class" and name.endswith("Config"):
        return "(...)", None
    return None


def skip_member(app, what, name, obj, skip, options):
    # Fields of a named tuple: the class has them under its attributes.
    return True if str(inspect.getdoc(obj)).startswith("Alias for field number") else None


def set_dashes(app, doctree, docname):
    # What Sphinx puts between an argument and its description, in the place of a dash.
    for text in list(doctree.findall(nodes.Text)):
        if re.match(r"\)? ?-- ", text) and not isinstance(text.parent, nodes.literal):
            text.parent.replace(text, nodes.Text(re.sub(r"^(\)?) ?-- ", r"\1 – ", text)))


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon's 500
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-resolved", set_dashes)
    return {"parallel_read_safe": True}
