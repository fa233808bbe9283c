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

"""The rollout tree of a plan, drawn along the sigma grid: as text and as a picture."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..rollout import Plan
from .panels import COLORS, INK, save_figure


STYLES = {
    "trained": ("≈", "stochastic step, trained"),
    "stochastic": ("~", "stochastic step, not trained"),
    "second": ("═", "deterministic step of second order"),
    "deterministic": ("─", "deterministic step"),
}
NODE, PICTURE, NOISED = "●", "□", "■"
ASCII = str.maketrans("≈~═─●□■│├└×", "~:=-oxX|++x")


@dataclass(frozen=True)
class Edge:
    """A step of a line from one grid index to another; `fan` equal ones leave each latent that it starts from."""

    start: int
    end: int
    kind: str
    fan: int


@dataclass
class Line:
    """
    Paths of a plan that look the same, drawn as one.

    Attributes:
        parent (`int`, *optional*): Number of the line that it leaves; `None` for one that starts from noise.
        count (`int`): Latents of a prompt group where it starts: pure noises, or latents of its parent.
        edges (`list[Edge]`): Its steps, in order.
        noised (`bool`): Whether its pictures are noised again for training.
    """

    parent: int | None
    count: int
    edges: list[Edge] = field(default_factory=list)
    noised: bool = False

    @property
    def pictures(self) -> int:
        pictures = self.count
        for edge in self.edges:
            pictures *= edge.fan
        return pictures

    @property
    def label(self) -> str:
        fans = [f"×{self.count}"] if self.parent is None and self.count > 1 else []
        fans += [f"×{edge.fan} at {edge.start}" for edge in self.edges if edge.fan > 1]
        pictures = count_text(self.pictures, "picture")
        return f"{', '.join(fans)}: {pictures}" if fans else pictures


def plan_lines(plan: Plan) -> list[Line]:
    """
    The tree of a plan with equal branches merged, in drawing order: a line comes before those that leave it, and of
    these the last to leave comes first, so that no two of them cross.
    """
    transitions = [edge for group in plan.transitions.values() for edge in group]
    trained = {edge.child for edge in transitions if edge.child != edge.parent}
    noised = {edge.child for edge in transitions if edge.child == edge.parent}
    children = [[] for _ in plan.nodes]
    for number, node in enumerate(plan.nodes):
        if node.parent is not None:
            children[node.parent].append(number)

    def kind(number: int) -> str:
        node = plan.nodes[number]
        if node.draw is not None:
            return "trained" if number in trained else "stochastic"
        return "deterministic" if node.before is None else "second"

    # Latents look the same if they are reached and left in the same ways. Children come after their parents.
    shapes, known = [0] * len(plan.nodes), {}
    steps = [set() for _ in plan.nodes]
    for number in reversed(range(len(plan.nodes))):
        below = Counter(shapes[child] for child in children[number])
        look = (plan.nodes[number].index, kind(number), number in noised, tuple(sorted(below.items())))
        shapes[number] = known.setdefault(look, len(known))
        steps[number] = set().union(*(steps[child] for child in children[number]))
        if number in trained:
            steps[number].add(plan.nodes[number].index)

    def alike(numbers: list[int]) -> list[list[int]]:
        groups = {}
        for number in numbers:
            groups.setdefault(shapes[number], []).append(number)
        return list(groups.values())

    lines = []

    def draw(node: int, line: Line, count: int):
        """Adds `line`, followed from `node`, of which there are `count`, to its pictures; then what leaves it."""
        row = len(lines)
        lines.append(line)
        leaving = []
        while children[node]:
            # A line goes on where most is trained, on a trunk rather than its branches, and in small steps.
            main, *others = sorted(
                alike(children[node]),
                key=lambda group: (-len(steps[group[0]]), len(group), plan.nodes[group[0]].index),
            )
            leaving.append((count, others))
            line.edges.append(edge_to(main))
            node, count = main[0], count * len(main)
        line.noised = node in noised
        for number, groups in reversed(leaving):
            for group in groups:
                draw(group[0], Line(row, number, [edge_to(group)]), number * len(group))

    def edge_to(group: list[int]) -> Edge:
        child = plan.nodes[group[0]]
        return Edge(plan.nodes[child.parent].index, child.index, kind(group[0]), len(group))

    for group in alike([number for number, node in enumerate(plan.nodes) if node.parent is None]):
        draw(group[0], Line(None, len(group)), len(group))
    return lines


def plan_text(plan: Plan, sigmas: Sequence[float] | None = None, width: int = 100) -> str:
    """
    A plan as text, on the grid from noise (left) to pictures (right): one row for all branches that look the same.

    Args:
        plan ([`Plan`]): The tree of one prompt group.
        sigmas (`Sequence[float]`, *optional*): Its grid, T + 1 numbers, written above it.
        width (`int`, *optional*, defaults to `100`): Columns to fit it into. Long grids need 2 for each step whatever this is.

    Example:

    ```python
    >>> from trl_flow.rollout import branch_plan
    >>> print(plan_text(branch_plan(num_steps=4, num_generations=6, sde_steps=[0, 1]), width=60))
    index    0      1      2      3      4
             ●──────●≈≈≈≈≈≈●──────●──────□  ×6 at 1: 6 pictures
             └≈≈≈≈≈≈●──────●──────●──────□  ×6 at 0: 6 pictures
    nodes    1      7     12     12     12
    ≈ stochastic step, trained  ─ deterministic step  □ picture, decoded and scored
    32 velocity evaluations, 12 pictures, 12 transitions credited, of steps 0 and 1
    ```
    """
    lines = plan_lines(plan)
    margin = 9
    room = width - margin - 3 - max(len(line.label) for line in lines)
    cell = max(2, min(8, room // plan.num_steps))
    columns = [margin + cell * index for index in range(plan.num_steps + 1)]
    canvas = [[" "] * (columns[-1] + 1) for _ in lines]
    for row, line in enumerate(lines):
        if line.parent is not None:
            start = columns[line.edges[0].start]
            for between in range(line.parent + 1, row):
                canvas[between][start] = {"└": "├", " ": "│"}.get(canvas[between][start], canvas[between][start])
            canvas[row][start] = "└"
        else:
            canvas[row][margin] = NODE
        for edge in line.edges:
            for column in range(columns[edge.start] + 1, columns[edge.end]):
                canvas[row][column] = STYLES[edge.kind][0]
            canvas[row][columns[edge.end]] = NODE
        canvas[row][columns[line.edges[-1].end]] = NOISED if line.noised else PICTURE
    drawn = [f"{''.join(row)}  {line.label}" for row, line in zip(canvas, lines, strict=True)]
    above = [_labels("index", range(plan.num_steps + 1), columns)]
    if sigmas is not None:
        above.append(_labels("sigma", [f"{sigma:.2f}" for sigma in sigmas], columns))
    below = [_labels("nodes", nodes_per_index(plan), columns), *plan_legend(lines), plan_summary(plan)]
    return "\n".join([*above, *drawn, *below])


def nodes_per_index(plan: Plan) -> list[int]:
    """Latents of one prompt group at each index 0 to T; the last number is that of its pictures."""
    count = Counter(node.index for node in plan.nodes)
    return [count[index] for index in range(plan.num_steps + 1)]


def plan_legend(lines: list[Line]) -> list[str]:
    """What the marks mean, of those that there are."""
    kinds = {edge.kind for line in lines for edge in line.edges}
    marks = [f"{mark} {text}" for kind, (mark, text) in STYLES.items() if kind in kinds]
    noised = {line.noised for line in lines}
    marks += [f"{PICTURE} picture, decoded and scored"] if False in noised else []
    marks += [f"{NOISED} picture, decoded, scored, and noised again for training"] if True in noised else []
    return ["  ".join(marks)]


def plan_summary(plan: Plan) -> str:
    """What one prompt group costs, in a line."""
    transitions = sum(map(len, plan.transitions.values()))
    return (
        f"{count_text(plan.num_evaluations, 'velocity evaluation')}, {count_text(len(plan.leaves), 'picture')}, "
        f"{count_text(transitions, 'transition')} credited, of {_steps(plan.steps)}"
    )


def count_text(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) > 2 and steps == list(range(steps[0], steps[-1] + 1)):
        return f"steps {steps[0]} to {steps[-1]}"
    return f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def _labels(title: str, texts: Sequence, columns: list[int]) -> str:
    """Texts that end at their columns, each n-th where there is no room for all; first and last are always there."""
    texts = [str(text) for text in texts]
    cell = columns[1] - columns[0]
    every = -(-(max(map(len, texts)) + 1) // cell)
    line = title
    for number, (text, column) in enumerate(zip(texts, columns, strict=True)):
        near_the_end = number + every > len(texts) - 1
        if number == len(texts) - 1 or (number % every == 0 and not near_the_end):
            line = line.ljust(column + 1 - len(text)) + text
    return line


class PlanPicture:
    """
    The rollout tree of one prompt group, to be looked at: a notebook shows it, `print` writes it as text, `save` puts it
    into a file.

    Args:
        plan ([`Plan`]): The tree.
        sigmas (`Sequence[float]`, *optional*): Its grid, T + 1 numbers.
        title (`str`, *optional*): Heading of the picture.

    Example:

    ```python
    >>> trainer.plan()  # in a notebook
    >>> print(trainer.plan())
    >>> trainer.plan().save("plan.svg")
    ```
    """

    def __init__(self, plan: Plan, sigmas: Sequence[float] | None = None, title: str | None = None):
        self.plan, self.title = plan, title
        self.sigmas = None if sigmas is None else [float(sigma) for sigma in sigmas]

    def __str__(self) -> str:
        return plan_text(self.plan, self.sigmas)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        figure, buffer = self.figure(), io.StringIO()
        # On white: a notebook with a dark page shows it as it is.
        with matplotlib.rc_context({"svg.hashsalt": "plan"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
        svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        return svg[svg.index("<svg") :]

    def save(self, path: str | Path) -> Path:
        """Writes the picture to a `.svg`, `.png` or (as text) `.txt` file."""
        path = Path(path)
        if path.suffix not in (".svg", ".png", ".txt"):
            raise ValueError(f"path={str(path)!r}: expected a name that ends in .svg, .png or .txt.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            save_figure(self.figure(), path)
        else:
            path.write_text(self._repr_svg_() if path.suffix == ".svg" else f"{self}\n", encoding="utf-8")
        return path

    def figure(self) -> Figure:
        """The picture, to change or to save as something else."""
        plan, lines = self.plan, plan_lines(self.plan)
        last = plan.num_steps
        styles = {
            "trained": {"color": COLORS[1], "linewidth": 3.0},
            "stochastic": {"color": COLORS[1], "linewidth": 1.6, "linestyle": ":"},
            "second": {"color": COLORS[0], "linewidth": 1.6, "linestyle": "--"},
            "deterministic": {"color": COLORS[0], "linewidth": 1.6},
        }
        width, height = max(6.0, min(15.0, 0.6 * last) + 2.6), 1.5 + 0.27 * len(lines)
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        seen = {}
        for row, line in enumerate(lines):
            if line.parent is not None:
                x = line.edges[0].start
                axes.plot([x, x], [-line.parent, -row], color="#8c95a1", linewidth=1, zorder=1)
            for edge in line.edges:
                (seen[edge.kind],) = axes.plot(
                    [edge.start, edge.end], [-row, -row], **styles[edge.kind], solid_capstyle="butt", zorder=2
                )
            inner = [edge.end for edge in line.edges[:-1]] + ([0] if line.parent is None else [])
            axes.plot(inner, [-row] * len(inner), "o", color=INK, markersize=4.5, zorder=3)
            end = line.edges[-1].end
            face, text = (INK, "picture, also noised for training") if line.noised else ("white", "picture, scored")
            (seen[text],) = axes.plot(
                [end], [-row], "s", markersize=6, markerfacecolor=face, markeredgecolor=INK, zorder=3
            )
            axes.annotate(
                line.label, (end, -row), (9, 0), textcoords="offset points", va="center", size=8.5, color=INK
            )
        every = -(-(last + 1) // 26)
        ticks = sorted({*range(0, last - every + 1, every), last})
        counts = nodes_per_index(plan)
        texts = [f"{index}" if self.sigmas is None else f"{index}\n{self.sigmas[index]:.2f}" for index in ticks]
        axes.set_xticks(ticks, [f"{text}\n{counts[index]}" for index, text in zip(ticks, texts, strict=True)], size=8)
        rows = ["index", *([] if self.sigmas is None else ["sigma"]), "nodes"]
        # In the margin, on the lines of the numbers.
        axes.annotate(
            "\n".join(rows), (0, 0), (-22, -5), xycoords="axes fraction", textcoords="offset points", ha="right", va="top",
            size=8, color=INK,
        )  # fmt: skip
        axes.tick_params(length=0, pad=5, colors=INK)
        axes.set_yticks([])
        axes.set_xlim(-0.35, last + 0.35)
        axes.set_ylim(0.7 - len(lines) - 0.2, 0.7)
        axes.spines[:].set_visible(False)
        texts = {kind: text for kind, (_, text) in STYLES.items()}
        handles = {texts.get(name, name): handle for name, handle in seen.items()}
        figure.legend(
            handles.values(), handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5
        )
        heading = f"{self.title}: one prompt group" if self.title else "One prompt group"
        axes.set_title(heading, loc="left", color=INK, fontsize=11, fontweight="bold", pad=22)
        axes.annotate(
            plan_summary(plan),
            (0, 1),
            (0, 8),
            xycoords="axes fraction",
            textcoords="offset points",
            size=8.5,
            color=INK,
        )
        return figure
