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

"""What a run left on disk, read into plain lists: log entries, settings, sample pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass
class Samples:
    """
    Pictures of one moment of a run.

    Args:
        step (`int`):
            Update after which they were generated; 0 is before training.
        prompts (`list[str]`):
            One per picture.
        scores (`dict[str, list[float | None]]`):
            Scores per reward name, one per picture.
        paths (`list[Path]`):
            Files, one per picture.
        all_scores (`dict[str, list[float | None]]`):
            Scores per reward name of every held-out prompt, also of those whose picture was not kept.
    """

    step: int
    prompts: list[str]
    scores: dict[str, list[float | None]]
    paths: list[Path]
    all_scores: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass
class RunHistory:
    """
    Logs, settings and pictures of a run.

    Args:
        train (`list[dict]`):
            Training entries of the log in order, one per step.
        eval (`list[dict]`):
            Evaluation entries of the log in order, one per step.
        summary (`dict`):
            What the trainer logged once at the end, e.g. `train_runtime`.
        config (`dict`):
            Settings of the run, empty when they were not written.
        samples (`list[Samples]`):
            Sample pictures in order of their steps.
        max_steps (`int`):
            Updates that the run was asked for; 0 when unknown.
        run (`dict`):
            What the run is (`run.json`): `method`, `base_model`, `rewards`, `eval_rewards`; empty when it was not written.
        calibration (`dict`):
            Noise table that the run was given (`calibration.json`), empty without one.
        ended (`bool`):
            Whether training has come to its end since the last update in the log.
    """

    train: list[dict]
    eval: list[dict]
    summary: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    max_steps: int = 0
    run: dict = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)
    ended: bool = False

    @property
    def step(self) -> int:
        """Update of the newest entry."""
        return max(entry["step"] for entry in self.train + self.eval)

    def series(self, key: str, kind: str = "train") -> tuple[list[float], list[float]]:
        """Steps and values of one key, where it was logged and is a finite number."""
        entries = self.train if kind == "train" else self.eval
        pairs = [(entry["step"], entry[key]) for entry in entries if finite(entry.get(key))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def names(self, pattern: str, kind: str = "train") -> list[str]:
        """What the one group of `pattern` matches among all logged keys, in order of first appearance."""
        entries = self.train if kind == "train" else self.eval
        keys = dict.fromkeys(key for entry in entries for key in entry)
        return list(dict.fromkeys(match[1] for key in keys if (match := re.fullmatch(pattern, key))))

    @property
    def trained_names(self) -> list[str]:
        """Names of the rewards that are trained on; empty when the run doesn't tell."""
        return self.run.get("rewards") or self.names(r"rewards/(.+)/mean")

    def eval_names(self) -> list[str]:
        """Names of the held-out scores: those that are trained on first."""
        trained = self.trained_names
        names = self.names(r"eval_rewards/(.+)/mean", "eval")
        return sorted(names, key=lambda name: trained.index(name) if name in trained else len(trained))

    def watched_names(self) -> list[str]:
        """Names of the held-out scores that are not trained on; empty when the run doesn't tell what is trained."""
        trained = self.trained_names
        return [name for name in self.eval_names() if name not in trained] if trained else []

    def tags(self, name: str) -> list[str]:
        """Tags of the held-out prompts that have scores of one reward, in order of first appearance."""
        return self.names(rf"eval_tags/(.+)/{re.escape(name)}", "eval")

    def alarms(self) -> dict[float, list[str]]:
        """Steps at which reward hacking was signalled, and the scores that had fallen."""
        steps = {}
        for name in self.names(r"eval_hacking/(.+)", "eval"):
            for step, value in zip(*self.series(f"eval_hacking/{name}", "eval"), strict=True):
                if value:
                    steps.setdefault(step, []).append(name)
        return dict(sorted(steps.items()))

    @property
    def rolled_back_to(self) -> int | None:
        """Update whose adapter the run left behind instead of its last one."""
        step = self.last("eval_rolled_back_to", "eval")
        return None if step is None else int(step)

    def until(self, step: int | None) -> RunHistory:
        """The same history without evaluations and samples after `step`; all of it for `None`."""
        if step is None:
            return self
        return dataclasses.replace(
            self,
            eval=[entry for entry in self.eval if entry["step"] <= step],
            samples=[entry for entry in self.samples if entry.step <= step],
        )

    def steps_table(self, prefix: str) -> tuple[list[int], list[list[float]]]:
        """
        Per-step quantities `<prefix>/step_<i>` of all training entries.

        Returns:
            `tuple[list[int], list[list[float]]]`: the indices i in ascending order, and one row of values per entry
            that has any of them, NaN where one is missing.
        """
        indices = sorted(int(name) for name in self.names(re.escape(prefix) + r"/step_(\d+)"))
        rows = []
        for entry in self.train:
            row = [entry.get(f"{prefix}/step_{index}") for index in indices]
            if any(finite(value) for value in row):
                rows.append([float(value) if finite(value) else math.nan for value in row])
        return indices, rows

    def last(self, key: str, kind: str = "train") -> float | None:
        """Last logged value of a key."""
        values = self.series(key, kind)[1]
        return values[-1] if values else None


def load_history(run_dir: str | Path, log_history: Sequence[Mapping] | None = None) -> RunHistory:
    """
    Read a run directory.

    Args:
        run_dir (`str` or `Path`):
            Output directory of a trainer.
        log_history (`Sequence[Mapping]`, *optional*):
            Log of a run that is still going (`trainer.state.log_history`). Defaults to the newest
            `trainer_state.json` in the directory or its checkpoints.

    Returns:
        [`RunHistory`]

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
        ValueError: there is no log, or nothing in it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a directory.")
    max_steps, ended = 0, False
    if log_history is None:
        state = _newest_state(run_dir)
        log_history, max_steps = state.get("log_history") or [], state.get("max_steps") or 0
    train, evaluations, summary = {}, {}, {}
    for entry in log_history:
        step = entry.get("step")
        if step is None:
            continue
        if "train_runtime" in entry:
            summary.update(entry)
            ended = True
        # Entries of one step are merged: a resumed run logs a step again, and an evaluation may log in parts.
        elif any(key.startswith("eval_") for key in entry):
            evaluations.setdefault(step, {}).update(entry)
        else:
            train.setdefault(step, {}).update(entry)
            ended = False  # a run that has ended may be asked for more
    if not train and not evaluations:
        raise ValueError(
            f"{run_dir} holds no training log: expected trainer_state.json, or a checkpoint with one, with at least "
            "one entry. Has the run logged yet (`logging_steps`)?"
        )
    return RunHistory(
        train=[train[step] for step in sorted(train)],
        eval=[evaluations[step] for step in sorted(evaluations)],
        summary=summary,
        config=_load_config(run_dir),
        samples=load_samples(run_dir / "samples"),
        max_steps=max_steps,
        run=_load_json(run_dir / "run.json"),
        calibration=_load_json(run_dir / "calibration.json"),
        ended=ended,
    )


def finite(value) -> bool:
    """Whether a logged value is a number that can be shown."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def public_settings(config: Mapping) -> dict:
    """Settings that may be shown to others, as plain YAML types: without tokens, keys, places and unset values."""
    # A round trip through JSON turns enums, tuples and paths into plain types.
    plain = without_paths(json.loads(json.dumps(dict(config), default=str)))
    private = ("_token", "_key", "_password", "_dir")
    return {
        name: value
        for name, value in plain.items()
        if value not in (None, "", [], {}) and name != "token" and not name.endswith(private)
    }


def without_paths(value):
    """A value of JSON or YAML for others to read: where things are on this machine is left out, of paths all but the name."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_paths, value))
    if not isinstance(value, str):
        return value
    if value.startswith("{"):  # a reward with settings
        try:
            plain = json.loads(value)
        except json.JSONDecodeError:
            return value
        public = without_paths(plain)
        return value if public == plain else json.dumps(public)
    return Path(value).name if os.path.isabs(value) else value


def paired_change(samples: Sequence[Samples], name: str) -> tuple[float, float, int] | None:
    """
    Change of a held-out score between the first and the last of `samples`, paired by prompt.

    The same prompts and noise are scored before and after, so that the interval of the change is that of the
    differences, which is narrower than what the two means' own intervals suggest.

    Returns:
        `tuple[float, float, int]` or `None`: mean of the differences, half of its 95 % interval, number of pairs; `None`
        with fewer than two pairs.
    """
    if len(samples) < 2:
        return None
    return paired_difference(samples[0].all_scores.get(name, []), samples[-1].all_scores.get(name, []))


def paired_difference(
    before: Sequence[float | None], after: Sequence[float | None], confidence: float = 1.96
) -> tuple[float, float, int] | None:
    """
    Mean of the differences of two lists of scores of the same prompts, and how far it may be off.

    Args:
        before, after (`Sequence[float | None]`):
            Scores, one per prompt, in the same order; a pair that lacks one of the two is left out.
        confidence (`float`, *optional*, defaults to `1.96`):
            Half of the interval in standard errors; 1.96 is 95 %.

    Returns:
        `tuple[float, float, int]` or `None`: mean of the differences, half of its interval, number of pairs; `None` for
        lists of different length and with fewer than two pairs.
    """
    if len(before) != len(after):
        return None
    changes = [last - first for first, last in zip(before, after, strict=True) if finite(first) and finite(last)]
    if len(changes) < 2:
        return None
    return statistics.fmean(changes), confidence * statistics.stdev(changes) / math.sqrt(len(changes)), len(changes)


def _newest_state(run_dir: Path) -> dict:
    states = []
    for path in [run_dir / "trainer_state.json", *run_dir.glob("checkpoint-*/trainer_state.json")]:
        if path.is_file():
            try:
                states.append(json.loads(path.read_text()))
            except json.JSONDecodeError:
                continue  # being written at this moment

    # By what was logged, not by `global_step`: a run that was rolled back ends at an earlier update than it logged.
    def reach(state: dict) -> tuple[float, int]:
        log = state.get("log_history") or []
        return max((entry.get("step") or 0 for entry in log), default=0), len(log)

    return max(states, key=reach, default={})


def _load_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _load_config(run_dir: Path) -> dict:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def load_samples(folder: Path) -> list[Samples]:
    """Sample pictures and held-out scores under `folder`, in order of their steps."""
    samples = []
    for directory in sorted(folder.glob("step_*")):
        match = re.fullmatch(r"step_(\d+)", directory.name)
        if not match or not directory.is_dir():
            continue
        description = {}
        if directory.with_suffix(".json").is_file():
            try:
                description = json.loads(directory.with_suffix(".json").read_text())
            except json.JSONDecodeError:
                description = {}
        paths = {int(path.stem): path for path in directory.glob("*.png") if path.stem.isdigit()}
        # Prompt, score and file belong together by index; a hole in one must not shift the others.
        order = sorted(paths)
        prompts = description.get("prompts") or []
        scores = description.get("scores") or {}

        def pick(values: list, order: list[int] = order) -> list:
            return [values[index] if index < len(values) else None for index in order]

        samples.append(
            Samples(
                step=int(match[1]),
                prompts=[prompt or "" for prompt in pick(prompts)],
                scores={name: pick(values) for name, values in scores.items()},
                paths=[paths[index] for index in order],
                all_scores=scores,
            )
        )
    return [entry for entry in samples if entry.paths]
