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

"""The table of samples that each log prints."""

import math

import pytest
from pipelines import brightness, prompts, redness

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer


@pytest.fixture
def printed(monkeypatch):
    """What trainers hand to the table, in order."""
    tables = []
    monkeypatch.setattr("trl_flow.trainer.rollouts.print_samples", lambda **table: tables.append(table))
    return tables


def test_table_of_a_run(make_trainer, capsys):
    trainer = make_trainer(num_printed_samples=2, max_steps=2, eval_dataset=prompts(2))
    trainer.train()
    text = capsys.readouterr().out
    assert text.count("Update 1") == text.count("Update 2") == 1
    assert text.count("brightness") == 2


def test_nothing_is_printed_by_default(make_trainer, capsys):
    make_trainer().train()
    assert capsys.readouterr().out.count("advantage") == 0


def test_scores_and_advantages_are_those_of_the_samples(make_trainer, printed):
    seen = []

    def watched(prompts, images, **kwargs):
        scores = brightness(images)
        scores[1] = None
        seen.append((prompts, scores))
        return scores

    # Groups of 3: all samples are shown, each group from best to worst.
    trainer = make_trainer(reward_funcs=watched, num_printed_samples=99, per_device_train_batch_size=2)
    trainer.train()
    (table,) = printed
    (names, scores) = seen[-1]
    assert names[:3] == [names[0]] * 3 and len(scores) == 6
    assert table["step"] == 1
    assert table["prompts"] == names
    first, second = scores[:3], scores[3:]
    first = sorted((score for score in first if score is not None), reverse=True)
    shown = table["scores"]["watched"]
    assert shown[:2] == pytest.approx(first) and math.isnan(shown[2])
    assert shown[3:] == pytest.approx(sorted(second, reverse=True))
    # Two samples: one standard deviation above and below.
    assert table["advantages"][:2] == pytest.approx([1.0, -1.0], abs=0.1)
    assert math.isnan(table["advantages"][2])
    mean = sum(second) / 3
    deviation = (sum((score - mean) ** 2 for score in second) / 3) ** 0.5
    expected = [(score - mean) / (deviation + 1e-4) for score in sorted(second, reverse=True)]
    assert table["advantages"][3:] == pytest.approx(expected, rel=1e-3)


def test_several_rewards_and_their_weighted_sum(make_trainer, printed):
    make_trainer(
        DenseGRPOTrainer,
        DenseGRPOConfig,
        reward_funcs=[brightness, redness],
        reward_weights=[1.0, 2.0],
        num_printed_samples=3,
    ).train()
    (table,) = printed
    scores = table["scores"]
    assert list(scores) == ["brightness", "redness", "sum"]
    assert scores["sum"] == pytest.approx(
        [bright + 2 * red for bright, red in zip(scores["brightness"], scores["redness"], strict=True)]
    )
    assert all(math.isfinite(advantage) for advantage in table["advantages"])


def test_a_rollout_is_shown_once(make_trainer, printed):
    """One rollout feeds two updates; both are logged."""
    make_trainer(num_printed_samples=2, steps_per_generation=2, max_steps=4).train()
    assert [table["step"] for table in printed] == [1, 3]


def test_negative_number_is_refused(make_trainer):
    with pytest.raises(ValueError, match="num_printed_samples=-1: expected 0 or more"):
        make_trainer(num_printed_samples=-1)
