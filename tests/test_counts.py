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

"""The counts of a run are those that are committed, what grows is found, and what is counted is what was done."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from trl_flow import FlowGRPOTrainer
from trl_flow.scripts.methods import METHODS


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("counts")


@pytest.fixture
def committed(counts):
    return json.loads((counts.RESULTS / "counts.json").read_text())


def test_every_method_is_counted(counts, committed):
    assert {command for command, _ in counts.RUNS.values()} == set(METHODS)
    assert set(committed["runs"]) == set(committed["seconds"]) == set(counts.RUNS)
    lines = (counts.RESULTS / "counts.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:] == [f"| {run}" for run in counts.RUNS]


def test_counts_follow_from_the_setting(committed):
    """Two updates of two prompts, G = 4 and T = 4, of which the first two steps are trained; three held-out prompts."""
    flow, guided = committed["runs"]["flow-grpo"], committed["runs"]["flow-grpo, guidance, KL"]
    # A group has one latent at the first step, and four at each of the others.
    assert flow["velocity rows"] == {"sweep": 2 * 2 * (1 + 3 * 4), "training": 2 * 2 * (1 + 4), "evaluation": 3 * 4}
    assert flow["denoiser rows"] == flow["velocity rows"]
    assert flow["denoiser calls"] == {"sweep": 2 * 4, "training": 2 * 2, "evaluation": 4}
    # Before the run, one grey latent is decoded for the size of pictures, and each function scores two test pictures.
    assert flow["pictures decoded"] == {"setup": 1, "rollout": 2 * 2 * 4, "evaluation": 3}
    assert flow["pictures scored"] == {"setup": 2 * 2, "rollout": 2 * 2 * 4, "evaluation": 2 * 3}
    assert flow["reward calls"] == {"setup": 2, "rollout": 2, "evaluation": 2}
    # The two CLIP encoders for each prompt; T5 is given one placeholder for all of them.
    assert (flow["encoder calls"]["rollout"], flow["encoder calls"]["evaluation"]) == (2 * 4, 2 * 3)
    # One rollout for two updates of a prompt each: the second needs the old policy; the divergence, the base model.
    assert guided["velocity rows"] == {
        "sweep": 2 * (1 + 3 * 4),
        "rollout": 1 + 4,
        "training": 2 * 2 * (1 + 4),
        "evaluation": 3 * 4,
    }
    assert guided["denoiser rows"] == {phase: 2 * rows for phase, rows in guided["velocity rows"].items()}
    # A leaf for each of two trained steps, whose last continuation is the picture itself: G2RPO decodes the most.
    dense = committed["runs"]["dense-grpo"]["pictures decoded"]
    assert dense["rollout"] == 2 * 2 * (1 + 4 + 4)
    # A run on several processes speaks in each phase, and none of them in the sweep.
    for run in committed["runs"].values():
        assert set(run["collectives"]) == {"rollout", "training", "evaluation", "rest"}


def test_counts_are_those_that_are_committed(counts, capsys):
    runs = ["flow-grpo, guidance, KL", "dense-grpo", "g2rpo"]
    assert counts.main(["--check", "--runs", *runs]) == 0
    assert "The counts of 3 runs are those that are committed." in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_all_counts_are_those_that_are_committed(counts):
    assert counts.main(["--check"]) == 0


def test_what_grows_is_found(counts, capsys, monkeypatch):
    decode = FlowGRPOTrainer.start_decoding

    def wasteful(self, latents, conditioning):
        if self.model.training and latents.sum().item() != 0:
            self._gather(latents[0])
            decode(self, latents[:3], conditioning[:3])()
        return decode(self, latents, conditioning)

    monkeypatch.setattr(FlowGRPOTrainer, "start_decoding", wasteful)
    assert counts.main(["--check", "--runs", "flow-grpo"]) == 1
    said = capsys.readouterr().out
    assert "have GROWN" in said and "have shrunk" not in said
    grown = re.findall(r"^\| flow-grpo \| (.+) \| (.+) \| (\d+) \| (\d+) \|$", said, flags=re.MULTILINE)
    by_phase = {(name, phase): int(now) - int(before) for name, phase, before, now in grown}
    # Two rollouts. What was gathered is copied to the host, and decoding waits as well.
    assert by_phase.pop(("host syncs", "rollout")) > 2 * 2
    assert by_phase == {
        ("decoder calls", "rollout"): 2,
        ("pictures decoded", "rollout"): 6,
        ("collectives", "rollout"): 2,
    }


def test_what_shrinks_is_said(counts, committed, capsys):
    run = committed["runs"]["g2rpo"]
    less = {name: dict(phases) for name, phases in run.items()}
    less["decoder calls"]["rollout"] -= 1
    del less["velocity rows"]["training"]
    assert counts.check(committed, {"g2rpo": less})
    said = capsys.readouterr().out
    assert "GROWN" not in said
    assert f"| g2rpo | velocity rows | training | {run['velocity rows']['training']} | 0 |" in said
    assert f"| g2rpo | decoder calls | rollout | {run['decoder calls']['rollout']} | " in said
    # What one phase saves does not pay for what another one takes.
    less["host syncs"]["sweep"] += 1
    assert not counts.check(committed | {"versions": {"torch": "1.0"}}, {"g2rpo": less})
    said = capsys.readouterr().out
    assert said.count("| g2rpo | host syncs | sweep |") == 1 and f"torch {counts.versions()['torch']}, not 1.0" in said


def test_a_run_without_counts_is_refused(counts, committed, capsys):
    assert not counts.check({**committed, "runs": {}}, {"awm": {}})
    assert "No counts of awm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "act, expected",
    [
        (lambda x: x[0].item(), 1),
        (lambda x: float(x[0]), 1),
        (lambda x: int(x[0]) + (1 if x[0] > 0 else 2), 2),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu"), 1),
        (lambda x: x.to(device="cpu"), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.clone().__setitem__(x > 1, x[:2]), 1),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])), 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x[1:].sum() + x.to(torch.float64).mean().to(x.device), 0),
        (lambda x: torch.where(x > 1, x, 0).repeat_interleave(2), 0),
    ],
)
def test_host_syncs(counts, act, expected):
    x = torch.tensor([1.0, 2.0, 3.0])
    counter = counts.Counts()
    counter.phase = "sweep"
    with counts.CountOperations(counter), counts.CountCopies(counter):
        act(x)
        with counter.during("rest"):
            act(x)
    assert counter.numbers["sweep"]["host syncs"] == expected
    assert counter.numbers["rest"]["host syncs"] == 0
