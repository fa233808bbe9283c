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

"""Drawings of rollout trees: equal branches are one row, and what is drawn adds up to the plan."""

import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from trl_flow.report.plan import PlanPicture, nodes_per_index, plan_lines, plan_text
from trl_flow.rollout.plan import Plan, branch_plan, chain_plan, dense_plan, forward_plan


PLANS = {
    "flow-grpo": chain_plan(10, 24, range(9)),
    "dance-grpo": chain_plan(16, 12, range(15), same_initial_noise=True),
    "mix-grpo": chain_plan(25, 12, [4, 5, 6, 7], same_initial_noise=True),
    "mix-grpo-flash": chain_plan(10, 12, [2, 3], same_initial_noise=True, solver="dpm"),
    "dense-grpo": dense_plan(10, 24, range(9)),
    "dense-grpo, shared noise": dense_plan(6, 24, range(5), same_initial_noise=True),
    "dense-grpo, short tails": dense_plan(10, 24, range(9), tail_steps=2),
    "g2rpo": branch_plan(16, 12, range(8), strides=(1, 2, 3)),
    "temp-flow-grpo": branch_plan(10, 6, range(9)),
    "diffusion-nft": forward_plan(10, 24, range(10)),
    "one step": forward_plan(1, 2, [0]),
    "long": chain_plan(50, 24, range(49)),
}


def drawn_nodes(lines) -> tuple[int, int, int]:
    """Latents that are not pictures, pictures, and trained edges, counted along the lines."""
    inner, pictures, trained = 0, 0, 0
    for line in lines:
        count = line.count
        inner += count if line.parent is None else 0
        for edge in line.edges:
            count *= edge.fan
            trained += count * (edge.kind == "trained")
            if edge is line.edges[-1]:
                pictures += count
            else:
                inner += count
    return inner, pictures, trained


@pytest.mark.parametrize("name", PLANS)
def test_lines_add_up_to_the_plan(name):
    plan = PLANS[name]
    lines = plan_lines(plan)
    inner, pictures, trained = drawn_nodes(lines)
    edges = {(e.parent, e.child) for group in plan.transitions.values() for e in group if e.parent != e.child}
    # Each latent that is no picture has children, and so one evaluation.
    assert (inner, pictures, trained) == (plan.num_evaluations, len(plan.leaves), len(edges))
    assert sum(line.pictures for line in lines) == pictures
    counts = nodes_per_index(plan)
    assert (sum(counts[:-1]), counts[-1]) == (inner, pictures)


@pytest.mark.parametrize("name", PLANS)
def test_text_is_a_picture_of_the_lines(name):
    plan = PLANS[name]
    text = plan_text(plan, width=120)
    rows = text.splitlines()
    lines = plan_lines(plan)
    assert len(rows) == 1 + len(lines) + 3
    assert max(map(len, rows)) <= 120 or plan.num_steps == 50
    for row, line in zip(rows[1:], lines, strict=False):
        branch = row.split("  ")[-1]
        assert branch == line.label
        # The nodes of its own, besides those of other lines, of which only vertical strokes cross it.
        assert row.count("●") == len(line.edges) - 1 + (line.parent is None)
        assert row.count("□") + row.count("■") == 1
    assert f"{plan.num_evaluations:,} velocity evaluations, {len(plan.leaves):,} picture" in rows[-1]


def test_group_of_24_with_10_steps_is_readable():
    """Chains that look the same are one row; their tails one more for each step."""
    assert len(plan_lines(PLANS["flow-grpo"])) == 1
    assert [line.label for line in plan_lines(PLANS["dense-grpo"])] == ["×24: 24 pictures"] + 9 * ["24 pictures"]
    assert max(map(len, plan_text(PLANS["dense-grpo"]).splitlines())) <= 100


def test_chain_that_branches():
    assert plan_text(
        chain_plan(4, 3, [1], same_initial_noise=True), [1, 0.9, 0.75, 0.5, 0], width=64
    ).splitlines() == [
        "index    0       1       2       3       4",
        "sigma 1.00    0.90    0.75    0.50    0.00",
        "         ●───────●≈≈≈≈≈≈≈●───────●───────□  ×3 at 1: 3 pictures",
        "nodes    1       1       3       3       3",
        "≈ stochastic step, trained  ─ deterministic step  □ picture, decoded and scored",
        "8 velocity evaluations, 3 pictures, 3 transitions credited, of step 1",
    ]


def test_branches_of_several_granularities():
    # Of each branch the fine tail and the one of stride 2 share their first two evaluations.
    assert plan_text(branch_plan(5, 2, [0, 1], strides=(1, 2)), width=60).splitlines()[1:6] == [
        "         ●────●≈≈≈≈●────●────●────□  ×2 at 1: 2 pictures",
        "         │              └─────────□  2 pictures",
        "         └≈≈≈≈●────●────●────●────□  ×2 at 0: 2 pictures",
        "                   └──────────────□  2 pictures",
        "nodes    1    3    4    4    4    8",
    ]


def test_steps_of_each_kind():
    kinds = {edge.kind for line in plan_lines(PLANS["mix-grpo-flash"]) for edge in line.edges}
    assert kinds == {"trained", "deterministic", "second"}
    plan = Plan(2)
    leaf = plan.stochastic(plan.stochastic(plan.start()))
    plan.add_transition(1, leaf, (leaf,))
    (line,) = plan_lines(plan)
    assert [edge.kind for edge in line.edges] == ["stochastic", "trained"]
    (line,) = plan_lines(PLANS["diffusion-nft"])
    assert line.noised and line.label == "×24: 24 pictures"


def test_picture(tmp_path):
    plan = PLANS["g2rpo"]
    picture = PlanPicture(plan, [1 - index / 16 for index in range(17)], "G2RPO")
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert svg == picture._repr_svg_()
    lines = plan_lines(plan)
    texts = [text.get_text() for text in picture.figure().axes[0].texts]
    assert [text for text in texts if text in {line.label for line in lines}] == [line.label for line in lines]
    assert "1,700 velocity evaluations, 288 pictures, 96 transitions credited, of steps 0 to 7" in texts

    assert picture.save(tmp_path / "plans" / "plan.svg").read_text().startswith("<svg")
    with Image.open(picture.save(tmp_path / "plan.png")) as image:
        assert image.width > 600
    assert picture.save(str(tmp_path / "plan.txt")).read_text() == f"{picture}\n"
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.txt"):
        picture.save(tmp_path / "plan.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.png", "plan.txt", "plans"]
