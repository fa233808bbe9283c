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

"""Exploration calibration: the two rules, their bounds, and the table from its making to its use."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pipelines import brightness, prompts, tiny_sd3

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, FlowGRPOConfig, FlowGRPOTrainer, calibrate_noise
from trl_flow.calibration import update_noise_level


def update(level, positive, negative, rule="significance", lowest=0.0, highest=math.inf, **settings):
    settings = {"threshold": 1.96, "step_size": 0.1} | settings
    return update_noise_level(level, positive, negative, rule, lowest=lowest, highest=highest, **settings)


PAPER = {"rule": "paper", "threshold": 2, "step_size": 0.01}


@pytest.mark.parametrize(
    "positive, negative, change",
    [(5, 5, 0.01), (5, 4, 0.01), (5, 3, -0.01), (3, 5, -0.01), (9, 0, -0.01), (0, 0, 0.01)],
)
def test_the_papers_rule_to_the_letter(positive, negative, change):
    """Algorithm 1: up if |#positive - #negative| < 2, else down; also when most are positive, and when all are ties."""
    assert update(0.5, positive, negative, **PAPER) == pytest.approx(0.5 + change)


@pytest.mark.parametrize(
    "positive, negative, factor",
    [
        (40, 24, 1.1),  # mostly gains: no reason for less noise
        (32, 32, 1.1),  # balanced
        (30, 34, 1.0),  # within what a fair coin does
        (24, 40, 1 / 1.1),  # 16 > 1.96 * 8: losses outweigh the gains
        (25, 39, 1.0),  # 14 < 15.7
        (0, 7, 1.0),  # too few that are not ties
        (0, 0, 1.0),
        (0, 8, 1 / 1.1),
    ],
)
def test_the_rule_whose_threshold_scales_with_the_samples(positive, negative, factor):
    assert update(0.5, positive, negative) == pytest.approx(0.5 * factor)


@pytest.mark.parametrize("rule", ["significance", "paper"])
def test_bounds(rule):
    settings = PAPER if rule == "paper" else {}
    assert update(0.5, 32, 32, lowest=0.1, highest=0.505, **settings) == 0.505
    assert update(0.1, 0, 64, lowest=0.1, highest=1.0, **settings) == 0.1


def settle(rule, balanced_at, num_samples, **settings):
    """Where a step's noise settles whose share of gains falls from 1 to 0 with the noise and is one half at a level."""
    generator = np.random.default_rng(0)
    level, visited = 1.0, []
    for _ in range(2000):
        share = 1 / (1 + (level / balanced_at) ** 4)
        positive = int(generator.binomial(num_samples, share))
        level = update(level, positive, num_samples - positive, rule, lowest=1e-3, highest=100.0, **settings)
        visited.append(level)
    return np.mean(visited[1000:])


@pytest.mark.parametrize("num_samples", [64, 1024])
def test_the_noise_settles_near_balance(num_samples):
    assert settle("significance", 0.3, num_samples, threshold=1.96, step_size=0.05) == pytest.approx(0.3, rel=0.15)


def test_the_papers_constant_drifts_down_with_many_samples():
    """For a fair coin P(|difference| < 2) is 0.16 with 24 samples: even a balanced step loses its noise."""
    generator = np.random.default_rng(0)
    level = 0.5
    for _ in range(30):
        positive = int(generator.binomial(24, 0.5))
        level = update(level, positive, 24 - positive, **PAPER)
    assert level < 0.4


SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "num_inference_steps": 3,
    "num_generations": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 2,
    "sde_type": "dance",
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
}


def calibrate(tmp_path, **settings):
    config = DenseGRPOConfig(output_dir=str(tmp_path / "run"), **SETTINGS)
    return calibrate_noise(tiny_sd3(), brightness, config, prompts(6), num_samples=8, **settings)


def test_a_table_from_its_making_to_its_use(tmp_path):
    file = tmp_path / "psi.json"
    table = calibrate(tmp_path, num_iterations=3, output_file=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(table))
    assert file.with_suffix(".png").stat().st_size > 1000
    # It starts where uniform exploration stands, a = 0.7, below the level at which tau = sigma_next.
    sigmas = table["sigmas"]
    uniform = [0.7 * math.sqrt(1 / (1 - sigmas[1])), 0.7 * math.sqrt(sigmas[1] / (1 - sigmas[1]))]
    matched = [sigmas[i + 1] / math.sqrt(sigmas[i] - sigmas[i + 1]) for i in (0, 1)]
    expected = [*map(min, uniform, matched), 0.0]
    assert table["before"]["noise_level"] == pytest.approx(expected)
    # Each update follows from the counts that are written beside it.
    for now, then in zip(table["history"], [*table["history"][1:], None], strict=True):
        new = table["noise_level"][:2] if then is None else then["noise_level"]
        for s in (0, 1):
            wanted = update(
                now["noise_level"][s], now["positive"][s], now["negative"][s], lowest=1e-3, highest=matched[s]
            )
            assert new[s] == pytest.approx(wanted)
    assert len(table["after"]["gains"][0]) == 8 and table["after"]["gains"][2] == []

    config = FlowGRPOConfig(output_dir=str(tmp_path / "train"), noise_level=str(file), **SETTINGS)
    trainer = DenseGRPOTrainer(tiny_sd3(), brightness, config, prompts(8))
    assert trainer.noise_levels == table["noise_level"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_inference_steps": 4}, "for 3 steps, but num_inference_steps=4"),
        ({"sde_type": "flow"}, "made for sde_type='dance'"),
        ({"sde_steps": [0, 2]}, "Step 2 .* has no noise"),
    ],
)
def test_a_table_is_refused_where_it_does_not_fit(tmp_path, settings, message):
    file = tmp_path / "psi.json"
    calibrate(tmp_path, num_iterations=1, output_file=file)
    config = FlowGRPOConfig(output_dir=str(tmp_path / "x"), noise_level=str(file), **(SETTINGS | settings))
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer(tiny_sd3(), brightness, config, prompts(8))


def test_what_is_no_table_is_refused(tmp_path):
    file = Path(tmp_path / "psi.json")
    file.write_text('{"noise_level": [null]}')
    config = FlowGRPOConfig(output_dir=str(tmp_path / "x"), noise_level=str(file), **SETTINGS)
    with pytest.raises(ValueError, match="not a calibration file"):
        FlowGRPOTrainer(tiny_sd3(), brightness, config, prompts(8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rule": "fair"}, "rule='fair' is unknown"),
        ({"num_iterations": 0}, "at least 1"),
        ({"step_size": 0.0}, "positive"),
        ({"max_noise_level": 1e-4}, "more than min_noise_level"),
        ({"min_noise_level": -1.0}, "0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tmp_path, **settings)
