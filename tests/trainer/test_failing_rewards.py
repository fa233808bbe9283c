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

"""A reward that fails costs the samples that it fails for, and no more."""

import asyncio
import math

import pytest
from pipelines import brightness, prompts

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer
from trl_flow.rewards import NothingToLearnError


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def advantages(trainer):
    """By prompt: the advantages (steps, members) of the last rollout."""
    return {
        prompt: part["advantages"][b] for part in trainer._buffered_inputs for b, prompt in enumerate(part["prompts"])
    }


@pytest.mark.parametrize("missing", [None, math.nan, "raise"])
def test_some_samples(make_trainer, missing):
    """The second of the four samples of each group has no score."""
    pictures = {}

    def sometimes(images, prompts, **kwargs):
        values = brightness(images)
        if images[0].getcolors(1):  # a grey picture of the check
            return values
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            known = pictures.setdefault(prompt, [])
            if image.tobytes() not in known:
                known.append(image.tobytes())
            if len(known) > 1 and known[1] == image.tobytes():
                if missing == "raise":
                    raise RuntimeError("an unlucky picture")
                values[number] = missing
        return values

    trainer = make_trainer(
        reward_funcs=sometimes, num_generations=4, per_device_train_batch_size=2, max_steps=1, max_nan_fraction=0.25
    )
    trainer.train()
    assert logged(trainer, "frac_reward_nan") == [0.25]
    assert logged(trainer, "rewards/sometimes/failed") == [0.25 if missing is not None else 0.0]
    for group in advantages(trainer).values():
        assert not group[:, 1].any()  # out
        assert group[:, [0, 2, 3]].all()  # and the others are compared with each other
        assert group.sum(1).abs().max() < 1e-4
    assert logged(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("rollout_batch_size", [1, 64])
@pytest.mark.parametrize("missing", [None, "raise"])
def test_all_samples_of_a_prompt(make_trainer, rollout_batch_size, missing):
    """Whatever the batches of the rollout, the other prompt goes on."""

    def picky(images, prompts, **kwargs):
        values = brightness(images)
        for number, prompt in enumerate(prompts):
            if "square" in prompt:
                if missing == "raise":
                    raise RuntimeError("no squares")
                values[number] = None
        return values

    trainer = make_trainer(
        reward_funcs=picky,
        per_device_train_batch_size=4,
        rollout_batch_size=rollout_batch_size,
        max_nan_fraction=0.5,
        train_dataset=prompts(4),
        eval_dataset=prompts(4),
    )
    trainer.train()
    assert logged(trainer, "frac_reward_nan") == [0.5]
    for prompt, group in advantages(trainer).items():
        assert group.any() == ("circle" in prompt)
    assert logged(trainer, "grad_norm")[0] > 0
    evaluation = [entry for entry in trainer.state.log_history if "eval_reward" in entry][-1]
    assert evaluation["eval_rewards/picky/missing"] == 2
    assert evaluation["eval_reward"] == pytest.approx(evaluation["eval_rewards/picky/mean"])


@pytest.mark.parametrize("how", ["none", "nan", "raise"])
@pytest.mark.parametrize("settings", [{}, {"config": DenseGRPOConfig}])
def test_nothing_at_all_stops_the_run(make_trainer, how, settings):
    calls = []

    def gone(images, **kwargs):
        calls.append(1)
        if len(calls) <= 2:  # the check and the first rollout
            return brightness(images)
        if how == "raise":
            raise ConnectionError("the server is gone")
        return [None if how == "none" else math.nan] * len(images)

    method = (DenseGRPOTrainer, settings["config"]) if settings else ()
    trainer = make_trainer(*method, reward_funcs=gone, max_steps=4)
    with pytest.raises(NothingToLearnError, match=r"None of the reward functions \(gone\) has a score") as caught:
        trainer.train()
    assert trainer.state.global_step == 1
    if how == "raise":
        assert isinstance(caught.value.__cause__, ConnectionError)


def test_one_of_two_rewards_is_enough(make_trainer):
    def silent(images, **kwargs):
        return [None] * len(images)

    trainer = make_trainer(reward_funcs=[brightness, silent], max_steps=2)
    trainer.train()
    assert logged(trainer, "frac_reward_nan") == [0.5, 0.5]
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    assert logged(trainer, "reward") == logged(trainer, "rewards/brightness/mean")


def test_asynchronous_rewards_train(make_trainer):
    async def slow(images, **kwargs):
        await asyncio.sleep(0)
        return brightness(images)

    def fast(images, **kwargs):
        return brightness(images)

    trainer = make_trainer(reward_funcs=[slow, fast], max_steps=2)
    trainer.train()
    assert logged(trainer, "rewards/slow/mean") == logged(trainer, "rewards/fast/mean")
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_a_wrong_number_of_scores_stops_the_run(make_trainer):
    calls = []

    def forgetful(images, **kwargs):
        calls.append(1)
        return brightness(images)[: len(images) if len(calls) < 3 else 1]

    with pytest.raises(ValueError, match="Reward 'forgetful' returned 1 scores for 3 pictures"):
        make_trainer(reward_funcs=forgetful, max_steps=4).train()


def test_columns_and_state_reach_the_rewards(make_trainer):
    seen = []

    def nosy(images, prompts, label, trainer_state, log_metric, **kwargs):
        seen.append((len(images), trainer_state.global_step))
        assert label == [f"label of {prompt}" for prompt in prompts]
        log_metric("nosy/pictures", len(images))
        return brightness(images)

    dataset = prompts(4).map(lambda row: {"label": f"label of {row['prompt']}"})
    trainer = make_trainer(reward_funcs=nosy, train_dataset=dataset, max_steps=2)
    trainer.train()
    assert seen == [(2, 0), (3, 0), (3, 1)]
    assert logged(trainer, "nosy/pictures") == [3.0, 3.0]
