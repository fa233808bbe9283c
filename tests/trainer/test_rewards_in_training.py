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

"""How a trainer calls its rewards: in threads, in groups, by tag, and what it writes down of them."""

import asyncio
import json
import math
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from datasets import DatasetDict, IterableDataset, concatenate_datasets
from huggingface_hub import ModelCard
from pipelines import brightness, prompts, redness
from transformers import CLIPImageProcessorPil, TrainerCallback

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, G2RPOConfig, G2RPOTrainer
from trl_flow.rewards import Reward
from trl_flow.rewards.models import ModelReward, SharedModel


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Concurrent(Reward):
    """A reward with a thread of its own."""

    concurrent = True

    def __init__(self, function=brightness):
        self.function, self.threads, self.prepared, self.released = function, set(), [], 0

    def prepare(self, device):
        self.prepared.append(device)

    def release(self):
        self.released += 1

    def __call__(self, prompts, images, **kwargs):
        self.threads.add(threading.current_thread().name)
        return self.function(images)


def test_concurrent_rewards_change_nothing_but_when(make_trainer):
    """Bit-equal training, whether rewards run in the sampling thread, in one of their own, or as coroutines."""

    async def waiting(images, **kwargs):
        await asyncio.sleep(0)
        return redness(images)

    def run(first, second):
        trainer = make_trainer(
            DenseGRPOTrainer,
            DenseGRPOConfig,
            reward_funcs=[first, second],
            max_steps=2,
            per_device_train_batch_size=3,
            rollout_batch_size=10,
            output_dir=str(make_trainer.directory / type(first).__name__),
        )
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.policy.parameters() if p.requires_grad])
        return weights, logged(trainer, "reward")

    concurrent = Concurrent()
    weights, rewards = run(brightness, redness)
    other_weights, other_rewards = run(concurrent, waiting)
    assert torch.equal(weights, other_weights) and rewards == other_rewards
    assert threading.main_thread().name not in concurrent.threads
    # After the check on grey pictures, and after each rollout.
    assert concurrent.prepared == [torch.device("cpu")] and concurrent.released == 3


def test_the_next_sweep_begins_before_pictures_are_waited_for(make_trainer):
    """As on a GPU, where a sweep and its decoding are but queued: the same training, in another order of calls."""

    def run(ahead):
        order = []
        trainer = make_trainer(
            reward_funcs=lambda images, **kwargs: order.append("score") or brightness(images),
            max_steps=2,
            per_device_train_batch_size=4,
            rollout_batch_size=3,
            output_dir=str(make_trainer.directory / str(ahead)),
        )
        assert trainer._sweeps_ahead == 0  # on a CPU, waiting would only leave threads idle
        trainer._sweeps_ahead = ahead
        start = trainer.start_decoding

        def starting(latents, conditioning):
            wait = start(latents, conditioning)
            order.append("sample")
            return lambda: order.append("wait") or wait()

        trainer.start_decoding = starting
        order.clear()
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.policy.parameters() if p.requires_grad])
        return weights, logged(trainer, "reward"), order[order.index("sample") :]

    weights, rewards, order = run(0)
    other_weights, other_rewards, other_order = run(1)
    assert torch.equal(weights, other_weights) and rewards == other_rewards
    assert order[:12] == ["sample", "wait", "score"] * 4
    assert other_order[:12] == ["sample", *["sample", "wait", "score"] * 3, "wait", "score"]
    assert sorted(order) == sorted(other_order)


def test_the_next_prompts_are_sampled_while_rewards_run(make_trainer):
    """The reward of the first prompts waits until the last prompts have been decoded."""
    all_decoded = threading.Event()

    def patient(images):
        if len(images) > 2 or not first_check:
            assert all_decoded.wait(60)
        first_check.clear()
        return brightness(images)

    first_check = [True]
    trainer = make_trainer(
        reward_funcs=Concurrent(patient), per_device_train_batch_size=4, rollout_batch_size=3, max_steps=1
    )
    decode, decoded = trainer.start_decoding, []

    def counted(latents, conditioning):
        wait = decode(latents, conditioning)
        decoded.append(len(latents))
        if len(decoded) == 4:
            all_decoded.set()
        return wait

    trainer.start_decoding = counted
    trainer.train()
    assert decoded == [3, 3, 3, 3]
    assert logged(trainer, "rewards/Concurrent/failed") == [0.0]


@pytest.mark.parametrize("how", ["train", "evaluate"])
def test_sampling_does_not_run_away_from_a_slow_reward(how, make_trainer):
    """However slow a reward is, pictures of five sweeps at most wait for it, or are scored by it."""
    begun, scored, waited_at, awaited = [], [], [], threading.Event()

    def slow(images):
        assert not begun or awaited.wait(60)  # a score is only had by those who wait for it
        scored.append(len(images))
        return brightness(images)

    trainer = make_trainer(
        reward_funcs=Concurrent(slow),
        train_dataset=prompts(8),
        eval_dataset=prompts(8) if how == "evaluate" else None,
        per_device_train_batch_size=8,
        rollout_batch_size=3 if how == "train" else 1,
        max_steps=1,
    )
    start = trainer.start_rewards

    def counted(*args):
        begun.append(True)
        wait = start(*args)

        def counted_wait():
            waited_at.append(len(begun))
            awaited.set()
            return wait()

        return counted_wait

    trainer.start_rewards = counted
    getattr(trainer, how)()
    assert scored == ([2] + [3] * 8 if how == "train" else [1] * 8)  # of two grey ones before training
    assert waited_at == [5, 6, 7, 8, 8, 8, 8, 8]


class Elsewhere(ModelReward):
    """A model on the CPU, of which the trainer is told that this is another device than its own."""

    def __init__(self, trainers_device):
        super().__init__("mean", device="cpu")
        self.trainers_device, self.called_in = torch.device(trainers_device), []
        self.image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
        self.wait_for = None

    def load(self, device):
        return SharedModel(torch.nn.Flatten(), device)

    def prepare(self, device):
        super().prepare(self.trainers_device)

    def score(self, model, pixel_values, prompts):
        self.called_in.append(threading.current_thread() is threading.main_thread())
        if self.wait_for is not None and not self.wait_for.wait(60):
            self.wait_for.set()  # once is enough
            raise TimeoutError("the next prompts have not been sampled")
        assert not torch.is_grad_enabled()
        return model(pixel_values).mean(1)


@pytest.mark.parametrize("trainers_device", ["meta", "cpu"])
def test_a_model_on_a_device_of_its_own_scores_while_the_next_prompts_are_sampled(trainers_device, make_trainer):
    reward = Elsewhere(trainers_device)
    elsewhere = trainers_device != "cpu"
    trainer = make_trainer(reward_funcs=reward, per_device_train_batch_size=4, rollout_batch_size=3, max_steps=1)
    decode, order, all_decoded = trainer.start_decoding, [], threading.Event()
    start = trainer.start_rewards

    def decoding(latents, conditioning):
        order.append("sampled")
        if order.count("sampled") == 4:
            all_decoded.set()
        return decode(latents, conditioning)

    def starting(*args):
        wait = start(*args)
        # Not one score is there before the pictures of the last prompts are.
        reward.wait_for = all_decoded if elsewhere else None
        order.append("returned")
        return wait

    trainer.start_decoding, trainer.start_rewards = decoding, starting
    reward.wait_for = None
    check = trainer.check_reward_functions

    def checking():
        check()
        reward.wait_for = all_decoded if elsewhere else None
        reward.called_in.clear()

    trainer.check_reward_functions = checking
    trainer.train()
    assert reward.concurrent == elsewhere
    assert order == ["sampled", "returned"] * 4
    assert reward.called_in == [not elsewhere] * 4
    assert logged(trainer, "rewards/Elsewhere/failed") == [0.0]


class Rank(Reward):
    """The share of the group that a picture is brighter than."""

    scope = "group"

    def __init__(self):
        self.groups = []

    def __call__(self, prompts, images, **kwargs):
        if len(images) < 2:
            return [None] * len(images)
        self.groups.append((prompts[0], len(images)))
        assert len(set(prompts)) == 1
        values = np.array(brightness(images))
        return ((values[:, None] > values).sum(1) / (len(values) - 1)).tolist()


@pytest.mark.parametrize(
    "method, sets",
    [
        ((), [4]),  # the four pictures that the chains lead to
        # The tails from every latent of the chains; at the last step but one a chain's own end is its tail.
        ((DenseGRPOTrainer, DenseGRPOConfig), [4] * 4),
        # Of two branch points, each stride's.
        ((G2RPOTrainer, G2RPOConfig), [4] * 4),
    ],
    ids=["flow-grpo", "dense-grpo", "g2rpo"],
)
def test_rewards_of_scope_group_get_those_that_are_compared(make_trainer, method, sets):
    rank = Rank()
    settings = {"granularities": [1, 2], "sde_steps": [0, 1]} if G2RPOTrainer in method else {}
    trainer = make_trainer(
        *method,
        reward_funcs=rank,
        num_generations=4,
        per_device_train_batch_size=2,
        max_steps=1,
        eval_dataset=prompts(2),
        **settings,
    )
    trainer.train()
    check, groups = rank.groups[:2], rank.groups[2:]
    assert [size for _, size in check] == [2, 2]
    assert len(groups) == 2 * len(sets)
    for prompt in {prompt for prompt, _ in groups}:
        assert [size for own, size in groups if own == prompt] == sets
    assert logged(trainer, "grad_norm")[0] > 0
    evaluation = [entry for entry in trainer.state.log_history if "eval_reward" in entry][-1]
    assert evaluation["eval_reward"] is None and evaluation["eval_rewards/Rank/missing"] == 2
    with pytest.raises(ValueError, match="eval_reward_funcs holds 'Rank', which compares the pictures of a group"):
        make_trainer(eval_reward_funcs=rank)


def test_a_sample_that_one_reward_failed_is_out_for_all(make_trainer):
    """Whatever the others say of it: what the failed one would have said is not known."""

    def broken(images, prompts, **kwargs):
        return [float("nan") if "square" in prompt else 1.0 * k for k, prompt in enumerate(prompts)]

    def indifferent(images, prompts, **kwargs):
        return [None if "square" in prompt else 1.0 * k for k, prompt in enumerate(prompts)]

    trained = {}
    for reward in (broken, indifferent):
        trainer = make_trainer(
            reward_funcs=[brightness, reward],
            train_dataset=prompts(4),
            per_device_train_batch_size=4,
            max_nan_fraction=0.5,
            output_dir=str(make_trainer.directory / reward.__name__),
        )
        trainer.train()
        assert logged(trainer, f"rewards/{reward.__name__}/failed") == [0.5 if reward is broken else 0.0]
        for micro_batch in trainer._buffered_inputs:
            for prompt, advantages in zip(micro_batch["prompts"], micro_batch["advantages"], strict=True):
                trained[reward.__name__, "square" in prompt] = advantages.any().item()
    assert trained == {
        ("broken", False): True,
        ("broken", True): False,
        ("indifferent", False): True,
        ("indifferent", True): True,  # it does not apply to squares: they are compared by their brightness
    }


def test_too_many_failures_stop_the_run(make_trainer):
    calls = []

    def failing(images, prompts, **kwargs):
        calls.append(1)
        if len(calls) > 2 and any("square" in prompt for prompt in prompts):
            raise ConnectionError("no answer")
        return brightness(images)

    trainer = make_trainer(
        reward_funcs=[failing, redness], train_dataset=prompts(2), per_device_train_batch_size=2, max_steps=4
    )
    message = (
        r"Reward functions failed for 3 of the 6 pictures of step 1 \(failing 50%, redness 0%\), more than "
        r"max_nan_fraction=0.1. The last error was ConnectionError: no answer. Mend them and go on from the last checkpoint"
    )
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert trainer.state.global_step == 1


def test_what_a_failed_reward_would_have_said_is_not_left_out_of_a_sum(make_trainer):
    """
    Neither in the logs nor in evaluations, where it would make the evaluation the best in which a reward of -100 failed.
    """
    gone = []

    def judge(images, prompts, **kwargs):
        if gone and len(images) == 2:  # an evaluation
            return [math.nan] * len(images)
        return [
            math.nan if "square" in prompt and len(images) == 6 else -100.0 - k for k, prompt in enumerate(prompts)
        ]

    class LastEvaluation(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                gone.append(True)

    trainer = make_trainer(
        reward_funcs=[brightness, judge],
        train_dataset=prompts(2),
        eval_dataset=prompts(2),
        per_device_train_batch_size=2,
        max_nan_fraction=0.5,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        callbacks=[LastEvaluation()],
    )
    trainer.train()
    assert all(reward < -99 for reward in logged(trainer, "reward"))
    first, second, last = logged(trainer, "eval_reward")
    assert first < -99 and second < -99 and last is None
    assert logged(trainer, "eval_rewards/judge/failed") == [0.0, 0.0, 1.0]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_few_pictures_wait_for_a_slow_reward(make_trainer):
    """Of a long evaluation few pictures are in memory, however slow a reward is."""
    alive = []

    def slow(images):
        most.append(sum(picture() is not None for picture in alive))
        time.sleep(0.03)
        return brightness(images)

    held_out = concatenate_datasets([prompts(18)] * 3)
    trainer = make_trainer(reward_funcs=Concurrent(slow), eval_dataset=held_out, rollout_batch_size=1)
    decode, most = trainer.decode, []

    def counted(latents, conditioning):
        pictures = decode(latents, conditioning)
        alive.extend(weakref.ref(picture) for picture in pictures)
        return pictures

    trainer.decode = counted
    trainer.args.num_logged_images = 0
    trainer.evaluate()
    assert len(alive) == 54 and max(most) <= 10


def test_means_by_tag(make_trainer):
    def share(images, tag, **kwargs):
        return [{"circle": 0.25, "square": 0.75}[value] for value in tag]

    dataset = prompts(4).map(lambda row: {"tag": row["prompt"].split()[-1]})
    trainer = make_trainer(
        reward_funcs=[brightness, share], train_dataset=dataset, eval_dataset=dataset, per_device_train_batch_size=4
    )
    trainer.train()
    assert logged(trainer, "tags/circle/share") == [0.25] and logged(trainer, "tags/square/share") == [0.75]
    evaluation = [entry for entry in trainer.state.log_history if "eval_reward" in entry][-1]
    assert (evaluation["eval_tags/circle/share"], evaluation["eval_tags/square/share"]) == (0.25, 0.75)
    both = evaluation["eval_tags/circle/brightness"] + evaluation["eval_tags/square/brightness"]
    assert both / 2 == pytest.approx(evaluation["eval_rewards/brightness/mean"])


class FromHub(Reward):
    """Knows its commit once it is loaded, as models do."""

    def __init__(self, revision):
        self.revision, self.loaded = revision, False

    def prepare(self, device):
        self.loaded = True

    @property
    def source(self):
        return {"repository": "user/bright", **({"revision": self.revision} if self.loaded else {})}

    def __call__(self, prompts, images, **kwargs):
        return brightness(images)


def test_where_a_reward_came_from_is_written_down_and_kept(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(reward_funcs=[FromHub("a" * 40), redness], **settings).train()
    run = make_trainer.directory / "run"
    source = {"repository": "user/bright", "revision": "a" * 40}
    assert json.loads((run / "run.json").read_text())["reward_sources"] == {"FromHub": source}
    card = ModelCard.load(run / "README.md").text
    link = f"[user/bright](https://huggingface.co/user/bright/tree/{'a' * 40})"
    assert f"Rewards: `FromHub` (repository {link}, at `{'a' * 40}`), `redness`" in card

    settings["max_steps"] = 2
    message = f"trained on 'FromHub' .*{'a' * 40}.*, 'redness', and this run is to be on 'FromHub' .*{'b' * 40}"
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs=[FromHub("b" * 40), redness], **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="and this run is to be on 'brightness', 'redness'"):
        make_trainer(reward_funcs=[brightness, redness], **settings).train(resume_from_checkpoint=True)
    trainer = make_trainer(reward_funcs=[FromHub("a" * 40), redness], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_columns_that_a_reward_needs(make_trainer):
    class Needy(Reward):
        requires = ("target",)
        prompt_set = "shapes"

        def __call__(self, prompts, images, target, **kwargs):
            return brightness(images)

    message = (
        r"train_dataset has the columns \['prompt'\]: the reward 'Needy' needs target too. load_prompts\('shapes'\)"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs=Needy())
    dataset = prompts(4).map(lambda row: {"target": "x"})
    with pytest.raises(ValueError, match="eval_dataset has the columns"):
        make_trainer(reward_funcs=Needy(), train_dataset=dataset, eval_dataset=prompts(2))
    make_trainer(reward_funcs=Needy(), train_dataset=dataset, eval_dataset=dataset)


# ---- Prompts ----


def test_prompts_by_name_and_as_a_stream(make_trainer):
    """Of a stream as many rows are read as the run can use: 2 updates of 2 micro-steps of 3 prompts."""
    drawn = []

    def rows():
        for number in range(1_000_000):
            drawn.append(number)
            yield {"prompt": f"a red circle {number}"}

    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    trainer = make_trainer(train_dataset=IterableDataset.from_generator(rows), eval_dataset="shapes", **settings)
    assert len(drawn) <= 13
    assert trainer.train_dataset["prompt"][:] == [f"a red circle {number}" for number in range(12)]
    assert "tag" in trainer.eval_dataset.column_names and len(trainer.eval_dataset) == 120
    with pytest.raises(ValueError, match="eval_dataset: .*has the splits train, test: give one of them"):
        make_trainer(eval_dataset=DatasetDict(train=prompts(2), test=prompts(2)))


def test_precomputed_prompts_change_nothing(make_trainer, monkeypatch, tmp_path):
    """Bit-equal training; the text encoders run once per prompt, off the device afterwards, and not at all in a second run."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name, **settings):
        trainer = make_trainer(
            eval_dataset=prompts(2),
            guidance_scale=2.0,
            eval_guidance_scale=1.0,
            max_steps=3,
            per_device_train_batch_size=2,
            output_dir=str(make_trainer.directory / name),
            **settings,
        )
        calls = []
        trainer.policy.pipeline.text_encoder.register_forward_pre_hook(
            lambda *_: calls.append(trainer.state.global_step)
        )
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.policy.parameters() if p.requires_grad])
        return weights, logged(trainer, "eval_reward"), calls

    weights, rewards, _ = run("as-needed")
    other_weights, other_rewards, calls = run("precomputed", precompute_prompts=True)
    assert torch.equal(weights, other_weights) and rewards == other_rewards
    # Prompt and empty prompt of 6 training prompts with guidance, 2 held-out ones without; twice to see where rows are.
    assert len(calls) <= 2 * 6 + 2 + 4 and set(calls) == {0}
    *same, calls = run("again", precompute_prompts=True)
    assert torch.equal(weights, same[0]) and rewards == same[1] and not calls
