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

"""Whatever cannot work is refused with a reason, before the transformer is evaluated once."""

import json

import pytest
from datasets import Dataset
from methods import ALL, AWM, B2, COCA, DANCE, DENSE, FAST, FLOW, G2, MIX, NFT, TEMP, TURNING
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3

from trl_flow import (
    AWMTrainer,
    FlowGRPOConfig,
    FlowGRPOFastTrainer,
    TempFlowGRPOTrainer,
    TurningPointGRPOTrainer,
)


def refused(make_trainer, method, message, **arguments):
    model = arguments.setdefault("model", tiny_sd3())
    evaluations = []
    if not isinstance(model, str):
        model.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    with pytest.raises(ValueError, match=message):
        make_trainer(*method, **arguments).train()
    assert not evaluations


@pytest.mark.parametrize(
    "method, settings, message",
    [
        (FLOW, {"num_generations": 1}, "num_generations=1: a group needs at least 2 samples to have an advantage"),
        (FLOW, {"num_inference_steps": 0}, "num_inference_steps=0: expected at least 1"),
        (FLOW, {"num_inference_steps": 1}, "num_inference_steps=1 leaves no step to train"),
        (
            FLOW,
            {"sde_steps": [0, 4]},
            r"sde_steps=\[0, 4\]: \[4\] not among the steps 0 to 3 of num_inference_steps=4",
        ),
        (G2, {"sde_steps": [5]}, r"sde_steps=\[5\]: \[5\] not among the steps 0 to 3"),
        (FLOW, {"sde_steps": [-1]}, r"\[-1\] not among the steps"),
        (FLOW, {"sde_steps": []}, r"sde_steps=\[\]: expected at least one index, each once"),
        (FLOW, {"sde_steps": [1, 1]}, r"sde_steps=\[1, 1\]: expected at least one index, each once"),
        (FLOW, {"sde_type": "cps", "sde_steps": [0, 3]}, "Step 3 is among .* it has no noise"),
        (FLOW, {"noise_level": 0.0}, "there is nothing to learn from it"),
        (FLOW, {"noise_level": [0.7, 0.7, 0.7]}, "noise_level has 3 values: expected one number, or one per step"),
        (FLOW, {"noise_level": -0.1}, "noise_level=-0.1: expected numbers of 0 or more"),
        (FLOW, {"noise_level": "no/such/file.json"}, "neither a number nor an existing calibration file"),
        (FLOW, {"noise_level": 1.5, "sde_type": "cps"}, "noise_level=1.5: expected between 0 and 1 for 'cps'"),
        (FLOW, {"sde_type": "heun"}, "sde_type='heun' is unknown: expected one of 'flow', 'dance', 'cps'"),
        (FLOW, {"kl_type": "js"}, "kl_type='js' is unknown: expected one of 'mean', 'gaussian', 'velocity'"),
        (FLOW, {"step_weighting": "late"}, "step_weighting='late' is unknown"),
        (FLOW, {"scale_rewards": "std"}, "scale_rewards='std' is unknown: expected one of 'group', 'batch', 'none'"),
        (FLOW, {"multi_objective_aggregation": "max"}, "multi_objective_aggregation='max' is unknown"),
        (DENSE, {"dense_reward": "slope"}, "dense_reward='slope' is unknown: expected one of 'gain', 'value'"),
        (DENSE, {"tail_steps": "0"}, "tail_steps='0': expected 'full' or a number of at least 1"),
        (DENSE, {"tail_steps": "some"}, "tail_steps='some': expected 'full' or a number of at least 1"),
        (G2, {"granularities": [0, 1]}, r"granularities=\[0, 1\]: a stride is at least 1"),
        (G2, {"granularities": [-2]}, "a stride is at least 1"),
        (G2, {"granularities": []}, r"granularities=\[\]: expected at least one stride"),
        (G2, {"granularities": [1, 1]}, "expected at least one stride, each once"),
        (G2, {"same_initial_noise": False}, "in G2RPO all branches of a group leave one trunk"),
        (
            FLOW,
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "steps_per_generation=3: expected a multiple of gradient_accumulation_steps=2",
        ),
        (FLOW, {"num_iterations": 0}, "num_iterations=0: expected at least 1"),
        (FLOW, {"advantage_clip": 0.0}, "advantage_clip=0.0: expected a positive number"),
        (FLOW, {"epsilon": -1e-4}, "epsilon=-0.0001: expected 0 or more"),
        (FLOW, {"beta": -1.0}, "beta=-1.0: expected 0 or more"),
        (FLOW, {"ema_decay": 1.5}, "ema_decay=1.5: expected a number between 0 and 1"),
        (FLOW, {"auto_find_batch_size": True}, "auto_find_batch_size=True would change"),
        (FLOW, {"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters=False has no effect"),
        (FLOW, {"ddp_bucket_cap_mb": 25}, "ddp_bucket_cap_mb=25 has no effect"),
        (FLOW, {"height": 9}, "divisible by"),
        (FLOW, {"width": 10, "height": 7}, "divisible by"),
        (FLOW, {"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 reward functions"),
        (FLOW, {"per_device_train_batch_size": 7}, "train_dataset has 6 prompts, but one rollout takes 7"),
    ],
)
def test_settings(make_trainer, method, settings, message):
    refused(make_trainer, method, message, **settings)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        # Windows
        (FAST, {"sde_window_range": [0, 5]}, r"sde_window_range=\[0, 5\]: expected .* within the steps 0 to 4"),
        (FAST, {"sde_window_range": [-1, 2]}, r"sde_window_range=\[-1, 2\]: expected a first step"),
        (MIX, {"sde_window_range": [2, 2]}, r"sde_window_range=\[2, 2\]: expected a first step"),
        (B2, {"sde_window_range": [2]}, r"sde_window_range=\[2\]: expected a first step"),
        (
            FAST,
            {"sde_window_size": 3, "sde_window_range": [1, 3]},
            r"sde_window_size=3 does not fit into sde_window_range=\[1, 3\]: expected at most 2",
        ),
        (MIX, {"sde_window_size": 3}, r"sde_window_size=3 does not fit into sde_window_range=\[0, 2\]"),
        (FAST, {"sde_window_size": 0}, "sde_window_size=0: expected at least 1"),
        (B2, {"sde_window_interval": 0}, "sde_window_interval=0: expected at least 1"),
        (MIX, {"sde_window_stride": 0}, "sde_window_stride=0: expected at least 1"),
        (FAST, {"sde_window_schedule": "slow"}, "sde_window_schedule='slow' is unknown: expected one of 'random'"),
        (FAST, {"sde_steps": [0]}, r"sde_steps=\[0\]: here a window chooses the steps"),
        (MIX, {"sde_steps": [0]}, "here a window chooses the steps"),
        (B2, {"sde_steps": [0]}, "here a window chooses the steps"),
        ((FlowGRPOFastTrainer, FlowGRPOConfig), {"sde_steps": [0]}, "here a window chooses the steps"),
        (FAST, {"sde_window_range": [2, 4], "sde_window_size": 1}, "Step 3 is among .* it has no noise"),
        (
            MIX,
            {"flash_ratio": 0.4, "sde_window_range": [0, 4]},
            r"flash_ratio=0.4 with sde_window_range=\[0, 4\]: .* there are 0 of 4 steps, which leaves nothing to compress",
        ),
        (MIX, {"flash_ratio": 0.4, "sde_window_range": [0, 3]}, "there are 1 of 4 steps"),
        (MIX, {"flash_ratio": 0.0}, "flash_ratio=0.0: expected a number between 0 and 1"),
        (MIX, {"flash_ratio": 1.0}, "flash_ratio=1.0: expected a number between 0 and 1"),
        # Steps and their credit
        (DANCE, {"timestep_fraction": 0.0}, "timestep_fraction=0.0: expected a number above 0, at most 1"),
        (DANCE, {"timestep_fraction": 1.1}, "timestep_fraction=1.1: expected a number above 0, at most 1"),
        (COCA, {"similarity_window": 0}, "similarity_window=0: expected 1 to num_inference_steps=4"),
        (COCA, {"similarity_window": 5}, "similarity_window=5: expected 1 to num_inference_steps=4"),
        (COCA, {"outcome_share": 1.5}, "outcome_share=1.5: expected a number above 0, at most 1"),
        (COCA, {"outcome_share": -0.5}, "outcome_share=-0.5: expected a number"),
        (
            TURNING,
            {"turning_points": False},
            "balance_turning_points=True has nothing to balance with turning_points=False",
        ),
        (TURNING, {"sde_steps": [0, 2]}, r"sde_steps=\[0, 2\]: .* Expected consecutive steps"),
        ((TurningPointGRPOTrainer, FlowGRPOConfig), {"sde_steps": [2, 0]}, "Expected consecutive steps"),
        (DENSE, {"tail_solver": "heun"}, "tail_solver='heun' is unknown: expected one of 'euler', 'dpm'"),
        (
            DENSE,
            {"tail_solver": "dpm", "tail_steps": 1},
            "tail_solver='dpm' has no effect with tail_steps=1: the first step and the one to sigma 0 are Euler's",
        ),
        # Seeds
        (TEMP, {"num_seeds": 0}, "num_seeds=0: expected at least 1"),
        (
            TEMP,
            {"num_seeds": 2, "per_device_train_batch_size": 3},
            "per_device_train_batch_size=3 x steps_per_generation=1 x 1 processes = 3 groups cannot hold 2 groups of each prompt: expected a "
            "multiple of 2",
        ),
        ((TempFlowGRPOTrainer, FlowGRPOConfig), {}, "expected a multiple of 4"),
        (
            TEMP,
            {"num_seeds": 2, "per_device_train_batch_size": 14},
            "train_dataset has 6 prompts, but one rollout takes 7",
        ),
        (TEMP, {"same_initial_noise": False}, "in TempFlow-GRPO all branches of a group leave one trunk"),
        # Objectives
        (FLOW, {"objective": "ppo"}, "objective='ppo' is unknown: expected one of 'clip', 'guard', 'dppo'"),
        (FLOW, {"kl_mask_threshold": 1e-6}, "kl_mask_threshold=1e-06 has no effect with objective='clip'"),
        (
            FLOW,
            {"kl_mask_threshold": 1e-6, "objective": "guard"},
            "kl_mask_threshold=1e-06 has no effect with objective='guard'",
        ),
        (FLOW, {"kl_mask_threshold": 0.0, "objective": "dppo"}, "kl_mask_threshold=0.0: expected a positive number"),
        (FLOW, {"sde_type": "cps", "beta": 0.04}, "beta=0.04 with kl_type='mean' .* divides the divergence of step 2"),
        (TURNING, {"kl_type": "gaussian", "beta": 1e-4}, "with kl_type='gaussian' and sde_type='cps' divides"),
        # Forward process
        (NFT, {"objective": "guard"}, "objective='guard' has no part in this method"),
        (NFT, {"kl_type": "mean"}, "kl_type='mean' has no part in this method"),
        (AWM, {"kl_type": "gaussian"}, "kl_type='gaussian' has no part in this method"),
        (AWM, {"step_weighting": "noise"}, "step_weighting='noise' has no part in this method"),
        (
            (AWMTrainer, FlowGRPOConfig),
            {"objective": "dppo"},
            "objective='dppo' has no part in this method",
        ),
        (NFT, {"same_initial_noise": True}, "same_initial_noise=True has no part in this method"),
        (AWM, {"noise_level": 0.3}, "noise_level=0.3 has no part .* Leave it at 0.7"),
        (NFT, {"epsilon": 1e-3}, "epsilon=0.001 has no part .* Leave it at 0.0001"),
        (DENSE, {"tail_steps": "2", "tail_solver": "dpm"}, "no effect with tail_steps=2"),
        (FAST, {"sde_window_interval": 5}, "sde_window_interval=5 has no effect with sde_window_schedule='random'"),
        (MIX, {"sde_window_schedule": "frozen", "sde_window_stride": 2}, "sde_window_stride=2 has no effect"),
        (FLOW, {"objective": "dppo", "epsilon": 1e-3}, "epsilon=0.001, epsilon_high=None: objective='dppo' clips"),
        (FLOW, {"ema_update_after": 3, "ema_decay": 0}, "ema_update_after=3 has no effect without ema_decay"),
        (NFT, {"old_policy_decay": 0, "old_policy_decay_rate": 0.1}, "old_policy_decay_rate=0.1 has no effect"),
        (NFT, {"timestep_fraction": 0.0}, "timestep_fraction=0.0: expected a number above 0"),
        (NFT, {"nft_beta": 0.0}, "nft_beta=0.0: expected a positive number"),
        (
            NFT,
            {"old_policy_decay": 1.0},
            "old_policy_decay=1.0 and old_policy_decay_rate=0.001: expected a decay from 0",
        ),
        (NFT, {"old_policy_decay_rate": -0.1}, "old_policy_decay_rate=-0.1: expected a decay"),
        (AWM, {"matching": "huber"}, "matching='huber' is unknown: expected one of 'uniform', 'sigma', 'ghuber'"),
        (AWM, {"num_inference_steps": 1}, "num_inference_steps=1 leaves no step to train"),
    ],
)
def test_settings_of_a_method(make_trainer, method, settings, message):
    refused(make_trainer, method, message, **settings)


@pytest.mark.parametrize("trainer_class, config_class", ALL)
def test_the_config_of_another_method_is_refused(make_trainer, trainer_class, config_class):
    """Its own fields would be ignored in silence."""
    for _, other in ALL:
        if other in (config_class, FlowGRPOConfig):
            continue
        with pytest.raises(ValueError, match=f"args is a {other.__name__}: expected a {config_class.__name__} or a"):
            make_trainer(trainer_class, other, model="is not loaded")


def one_too_few(images, **kwargs):
    return [0.5] * (len(images) - 1)


def strings(images, **kwargs):
    return ["0.5"] * len(images)


def nothing(images, **kwargs):
    return [None] * len(images)


def number(images, **kwargs):
    return 0.5


def broken(images, **kwargs):
    raise RuntimeError("the model is not downloaded")


@pytest.mark.parametrize(
    "rewards, message",
    [
        ([], "reward_funcs is empty: expected at least one reward function or name"),
        (one_too_few, "Reward 'one_too_few' returned 1 scores for 2 pictures: expected one for each"),
        ([brightness, one_too_few], "Reward 'one_too_few' returned 1 scores for 2 pictures"),
        (strings, r"Reward 'strings' returned '0.5' \(str\): expected numbers or None"),
        (number, "Reward 'number' returned a float: expected a list of 2 numbers or None"),
        (nothing, r"no reward function \(nothing\) returned a score"),
        (broken, "raised for each of 2 grey test pictures. RuntimeError: the model is not downloaded"),
        ("aesthetics", "reward='aesthetics' is unknown. Expected a function, the name"),
        ("no_such_module.reward", "reward='no_such_module.reward' could not be imported"),
        ("math.pi", "reward='math.pi' is a float, not a function"),
        (0.5, "reward=0.5 is a float. Expected a function, the name"),
    ],
)
def test_rewards(make_trainer, rewards, message):
    refused(make_trainer, FLOW, message, reward_funcs=rewards)


def test_held_out_rewards(make_trainer):
    refused(make_trainer, FLOW, "Reward 'strings' returned '0.5'", eval_reward_funcs=strings)
    refused(make_trainer, FLOW, "reward='aesthetics' is unknown", eval_reward_funcs=["aesthetics"])


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "dataset, message",
    [
        (Dataset.from_dict({"text": ["a"]}), r"has the columns \['text'\]: expected one named 'prompt'"),
        (Dataset.from_dict({"prompt": []}), "is empty"),
        (Dataset.from_dict({"prompt": ["a", "b", None]}), "the prompt of row 2 is None; expected a text"),
        (Dataset.from_dict({"prompt": [1, 2]}), "the prompt of row 0 is 1; expected a text"),
        (Dataset.from_dict({"prompt": ["a", "  "]}), "the prompt of row 1 is '  '; expected a text"),
        (
            Dataset.from_dict({"prompt": ["a"], "images": ["b"]}),
            r"has columns \['images'\], names that reward functions",
        ),
        (["a red circle"], "the dataset is a list: expected a Dataset or IterableDataset"),
    ],
)
def test_datasets(make_trainer, argument, dataset, message):
    refused(make_trainer, FLOW, f"{argument}.*{message}", **{argument: dataset})


def test_a_reward_without_prompts_of_its_own_needs_a_dataset(make_trainer):
    refused(make_trainer, FLOW, "the reward 'brightness' names no prompt set of its own.*shapes", train_dataset=None)


def test_models(make_trainer):
    refused(make_trainer, FLOW, "model='no/such-model' could not be loaded: expected 'shapes'", model="no/such-model")


def test_dropout(make_trainer):
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=None)
    refused(make_trainer, FLOW, "lora_dropout=0.1: the ratio of two policies", peft_config=config)


def table(**changes):
    grid = make_grid()
    return {"noise_level": [0.5] * 4, "sigmas": grid, "sde_type": "dance", **changes}


def make_grid():
    scheduler = tiny_sd3().scheduler
    scheduler.set_timesteps(4)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"noise_level": [0.5] * 3, "sigmas": [1.0, 0.8, 0.5, 0.0]},
            "has noise levels for 3 steps, but num_inference_ste",
        ),
        ({"sigmas": [1.0, 0.75, 0.5, 0.25, 0.0]}, "was made for the sigma grid"),
        ({"sde_type": "flow"}, "was made for sde_type='flow', but sde_type='dance'"),
    ],
)
def test_noise_tables_of_something_else(make_trainer, changes, message):
    path = make_trainer.directory / "psi.json"
    path.write_text(json.dumps(table(**changes)))
    refused(make_trainer, DENSE, message, noise_level=str(path), sde_type="dance")


def test_what_is_no_noise_table(make_trainer):
    path = make_trainer.directory / "psi.json"
    path.write_text("{}")
    refused(make_trainer, DENSE, "is not a calibration file", noise_level=str(path), sde_type="dance")


def test_a_noise_table_that_fits_is_used(make_trainer):
    path = make_trainer.directory / "psi.json"
    path.write_text(json.dumps(table(noise_level=[0.9, 0.6, 0.3, 0.0])))
    trainer = make_trainer(*DENSE, noise_level=str(path), sde_type="dance")
    assert trainer.noise_levels == [0.9, 0.6, 0.3, 0.0]
    trainer.train()


def test_evaluation_needs_prompts(make_trainer):
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make_trainer().evaluate()
    assert make_trainer(eval_dataset=prompts(2)).evaluate()["eval_num_samples"] == 2
