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

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from observing import logged, randomize, standardized
from pipelines import brightness, prompts, redness
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_flow import (
    AWMConfig,
    AWMTrainer,
    B2DiffuRLConfig,
    B2DiffuRLTrainer,
    DanceGRPOConfig,
    DanceGRPOTrainer,
    DenseGRPOConfig,
    DenseGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    G2RPOConfig,
    G2RPOTrainer,
    TempFlowGRPOConfig,
    TempFlowGRPOTrainer,
)
from trl_flow.rollout import seeded_noise


METHODS = [
    (FlowGRPOTrainer, FlowGRPOConfig),
    (DenseGRPOTrainer, DenseGRPOConfig),
    (G2RPOTrainer, G2RPOConfig),
]


class Gradients(TrainerCallback):
    """Keeps the gradient and the weights of each update, as they are before it."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named})
        self.weights.append({name: p.detach().clone() for name, p in named})


def by_order():
    """Rewards that depend on nothing but the order of a prompt's pictures: no rounding of a picture can change them."""
    seen = {}

    def ordered(prompts, **kwargs):
        values = []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
            values.append(math.sin(1.7 * seen[prompt] + len(prompt)))
        return values

    return ordered


# ---- Ratio ----


@pytest.mark.parametrize("trainer_class, config_class", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_update_is_exactly_on_policy(make_trainer, trainer_class, config_class, accumulation):
    trainer = make_trainer(trainer_class, config_class, gradient_accumulation_steps=accumulation, max_steps=2)
    randomize(trainer)
    trainer.train()
    assert logged(trainer, "ratio/min") == [1.0, 1.0]
    assert logged(trainer, "ratio/max") == [1.0, 1.0]
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_second_update_of_a_rollout_is_off_policy(make_trainer, accumulation):
    trainer = make_trainer(
        gradient_accumulation_steps=accumulation, steps_per_generation=2 * accumulation, max_steps=4
    )
    trainer.train()
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    assert low[0] == high[0] == low[2] == high[2] == 1.0
    for update in (1, 3):
        assert low[update] != 1.0 or high[update] != 1.0
        assert abs(math.log(low[update])) < 1  # the policy of a moment ago, not another one


def test_num_iterations_passes_over_one_rollout(make_trainer):
    calls = []

    def counted(images, **kwargs):
        calls.append(len(images))
        return brightness(images)

    trainer = make_trainer(reward_funcs=counted, num_iterations=2, max_steps=4)
    trainer.train()
    assert calls == [2, 3, 3]  # the check on two grey pictures, and two rollouts
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    assert low[0] == high[0] == low[2] == high[2] == 1.0
    assert low[1] < high[1] and low[3] < high[3]
    # A rollout of 3 samples in 4 steps, and 3 transitions of each: the old log-probabilities cost nothing.
    assert logged(trainer, "nfe")[:4] == [21, 30, 51, 60]


def test_evaluations_of_an_off_policy_update(make_trainer):
    trainer = make_trainer(steps_per_generation=2, max_steps=2)
    trainer.train()
    # Two rollouts of 12; 9 rows of training each; the second micro-step's old log-probabilities.
    assert logged(trainer, "nfe")[:2] == [2 * 12 + 9 + 9, 2 * 12 + 9 + 9 + 9]


def test_update_per_step(make_trainer):
    calls = []

    def counted(images, **kwargs):
        calls.append(len(images))
        return brightness(images)

    gradients = Gradients()
    trainer = make_trainer(
        G2RPOTrainer,
        G2RPOConfig,
        reward_funcs=counted,
        update_per_step=True,
        sde_steps=[0, 1, 2],
        granularities=[1],
        max_steps=6,
        callbacks=[gradients],
    )
    trainer.train()
    assert len(calls) == 1 + 2 and len(gradients.gradients) == 6  # three updates of each of two rollouts
    low, high = logged(trainer, "ratio/min"), logged(trainer, "ratio/max")
    for rollout in (0, 3):
        assert low[rollout] == high[rollout] == 1.0
        assert low[rollout + 1] < high[rollout + 1] and low[rollout + 2] < high[rollout + 2]


def test_one_update_with_the_mean_over_the_steps_otherwise(make_trainer):
    one, each = Gradients(), Gradients()
    for callback, per_step in ((one, False), (each, True)):
        trainer = make_trainer(
            G2RPOTrainer,
            G2RPOConfig,
            update_per_step=per_step,
            granularities=[1],
            max_steps=2 if per_step else 1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            callbacks=[callback],
            output_dir=str(trainer_dir(make_trainer, per_step)),
        )
        randomize(trainer)
        trainer.train()
    for name, together in one.gradients[0].items():
        if together is not None:
            mean = (each.gradients[0][name] + each.gradients[1][name]) / 2
            torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-7)


def trainer_dir(make_trainer, name):
    return make_trainer.directory / str(name)


# ---- One update, by hand ----


def sampled(trainer):
    """The transitions of the rollout: (prompt, step, parent, child, advantage), from the trainer's buffer."""
    for part in trainer._buffered_inputs:
        for b, prompt in enumerate(part["prompts"]):
            for s, step in enumerate(part["steps"].tolist()):
                yield [
                    (
                        prompt,
                        step,
                        part["nodes"][b, part["parents"][s, g]][None],
                        part["nodes"][b, part["children"][s, g]][None],
                        part["advantages"][b, s, g].item(),
                    )
                    for g in range(part["advantages"].shape[2])
                ]


@functools.cache
def encoded(pipeline, prompt):
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=2
        )
    return embeds, pooled


def transformer_velocity(pipeline, latents, sigma, prompt):
    """Straight from the transformer, without the policy."""
    embeds, pooled = encoded(pipeline, prompt)
    return pipeline.transformer(
        hidden_states=latents,
        timestep=torch.tensor([sigma * 1000]),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def flow_step(x, v, s, s_next):
    """Flow-GRPO eq. 9 at a = 0.7."""
    dt = s_next - s
    q = 0.7 * math.sqrt(s / (1 - (s_next if s == 1 else s)))
    return x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt, q, q * math.sqrt(-dt)


@pytest.mark.parametrize(
    "method, settings",
    [
        pytest.param(METHODS[0], {}, id="Flow-GRPO"),
        pytest.param(METHODS[0], {"beta": 0.04, "kl_type": "mean"}, id="KL of the means"),
        pytest.param(METHODS[0], {"beta": 0.5, "kl_type": "gaussian"}, id="KL of the Gaussians"),
        pytest.param(METHODS[0], {"beta": 0.5, "kl_type": "velocity"}, id="KL of the velocities"),
        pytest.param(METHODS[1], {}, id="DenseGRPO"),
        pytest.param(METHODS[1], {"step_weighting": "noise"}, id="weighted steps"),
        pytest.param(METHODS[2], {}, id="G2RPO"),
        pytest.param(METHODS[2], {"beta": 0.04, "step_weighting": "noise"}, id="weighted steps, KL, shared parents"),
    ],
)
def test_the_gradient_of_an_update(make_trainer, method, settings):
    """Against plain autograd, one sample at a time, with the means and divergences as the papers print them."""
    gradients = Gradients()
    trainer = make_trainer(
        *method,
        callbacks=[gradients],
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        learning_rate=0.0,
        transition_batch_size=2,
        **settings,
    )
    randomize(trainer)
    trainer.train()
    assert len(gradients.gradients) == 1
    pipeline, policy = trainer.policy.pipeline, trainer.policy
    sigmas = trainer.sigmas.tolist()
    groups = list(sampled(trainer))
    stds = {step: flow_step(0, 0, *sigmas[step : step + 2])[2] for group in groups for _, step, *_ in group}
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    total = sum(len(group) for group in groups)
    for group in groups:
        for prompt, step, parent, child, advantage in group:
            s, s_next = sigmas[step : step + 2]
            v = transformer_velocity(pipeline, parent, s, prompt).double()
            mean, q, std = flow_step(parent.double(), v, s, s_next)
            log_prob = torch.distributions.Normal(mean, std).log_prob(child.double()).mean()
            weight = std / np.mean(list(stds.values())) if "step_weighting" in settings else 1.0
            loss = -weight * advantage * log_prob
            if "beta" in settings:
                with policy.denoisers["transformer"].disable_adapter(), torch.no_grad():
                    v_ref = transformer_velocity(pipeline, parent, s, prompt).double()
                mean_ref, _, _ = flow_step(parent.double(), v_ref, s, s_next)
                loss = (
                    loss
                    + settings["beta"]
                    * {
                        "mean": ((mean - mean_ref) ** 2).mean() / (2 * q**2),
                        "gaussian": ((mean - mean_ref) ** 2).mean() / (2 * std**2),
                        "velocity": ((v - v_ref) ** 2).mean(),
                    }[settings.get("kl_type", "mean")]
                )
            (loss / total).backward()
    largest = max(p.grad.norm().item() for p in parameters.values() if p.grad is not None)
    assert largest > 1e-5
    for name, parameter in parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = gradients.gradients[0][name]
        actual = torch.zeros_like(parameter) if actual is None else actual
        assert (actual - expected).norm() <= 1e-3 * expected.norm() + 1e-4 * largest, name


def tail(trainer, latents, way, prompt):
    """The brightness of the picture that Euler steps over the grid indices `way` lead to."""
    sigmas = trainer.sigmas.tolist()
    with torch.no_grad():
        for index, following in zip(way[:-1], way[1:], strict=True):
            v = transformer_velocity(trainer.policy.pipeline, latents, sigmas[index], prompt)
            latents = latents + (sigmas[following] - sigmas[index]) * v
        picture = trainer.policy.pipeline.image_processor.postprocess(
            trainer.policy.pipeline.vae.decode(latents / 1.5 + 0.06, return_dict=False)[0], output_type="pil"
        )
    return brightness(picture)[0]


def test_advantages_of_dense_grpo(make_trainer):
    """From latents to advantages: the tails of both ends of a step, sampled and scored again."""
    trainer = make_trainer(DenseGRPOTrainer, DenseGRPOConfig, per_device_train_batch_size=2, num_generations=4)
    trainer.train()
    groups = list(sampled(trainer))
    assert len(groups) == 2 * 3
    for group in groups:
        gains = []
        for prompt, step, parent, child, _ in group:
            before = tail(trainer, parent, list(range(step, 5)), prompt)
            after = tail(trainer, child, list(range(step + 1, 5)), prompt)
            gains.append(after - before)
        expected = standardized(gains, ddof=0, eps=1e-4)
        np.testing.assert_allclose([transition[-1] for transition in group], expected, atol=0.1)
        assert np.abs(expected).max() > 0.5


def test_advantages_of_g2rpo(make_trainer):
    trainer = make_trainer(
        G2RPOTrainer,
        G2RPOConfig,
        per_device_train_batch_size=2,
        num_generations=4,
        num_inference_steps=6,
        granularities=[1, 2],
        advantage_clip=1.5,
    )
    trainer.train()
    groups = list(sampled(trainer))
    assert len(groups) == 2 * 3
    ways = {0: ([1, 2, 3, 4, 5, 6], [1, 2, 4, 6]), 1: ([2, 3, 4, 5, 6], [2, 3, 6]), 2: ([3, 4, 5, 6], [3, 4, 6])}
    clipped = 0
    for group in groups:
        expected = 0
        for j in range(2):
            scores = [tail(trainer, child, ways[step][j], prompt) for prompt, step, _, child, _ in group]
            expected = expected + standardized(scores, ddof=1, eps=1e-8)
        clipped += (np.abs(expected) > 1.5).sum()
        np.testing.assert_allclose([transition[-1] for transition in group], expected.clip(-1.5, 1.5), atol=0.15)
    assert clipped > 0


@pytest.mark.parametrize("trainer_class, config_class", METHODS)
def test_children_are_drawn_around_the_policys_mean(make_trainer, trainer_class, config_class):
    trainer = make_trainer(trainer_class, config_class, num_generations=4, learning_rate=0.0)
    trainer.train()
    sigmas, noise = trainer.sigmas.tolist(), []
    for group in sampled(trainer):
        for prompt, step, parent, child, _ in group:
            with torch.no_grad():
                v = transformer_velocity(trainer.policy.pipeline, parent, sigmas[step], prompt)
            mean, _, std = flow_step(parent, v, *sigmas[step : step + 2])
            noise.append((child - mean) / std)
    noise = torch.cat(noise)
    assert noise.mean().abs() < 0.1 and abs(noise.std() - 1) < 0.1
    # Every draw is a draw of its own.
    assert len({row.numpy().round(2).tobytes() for row in noise}) == len(noise)


@pytest.mark.parametrize("same_initial_noise", [False, True])
def test_same_initial_noise(make_trainer, same_initial_noise):
    trainer = make_trainer(same_initial_noise=same_initial_noise, per_device_train_batch_size=2)
    trainer.train()
    starts = [[parent for _, step, parent, _, _ in group if step == 0] for group in sampled(trainer)]
    starts = [group for group in starts if group]
    assert len(starts) == 2
    for group in starts:
        for other in group[1:]:
            assert torch.equal(group[0], other) == same_initial_noise
    assert not torch.equal(starts[0][0], starts[1][0])  # of another prompt


@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [
        *[(*method, {}) for method in METHODS],
        (DanceGRPOTrainer, DanceGRPOConfig, {"timestep_fraction": 0.5}),
        (TempFlowGRPOTrainer, TempFlowGRPOConfig, {"num_seeds": 2}),
        (B2DiffuRLTrainer, B2DiffuRLConfig, {}),
        (DiffusionNFTTrainer, DiffusionNFTConfig, {"timestep_fraction": 0.7, "old_policy_decay_rate": 0.3}),
        (AWMTrainer, AWMConfig, {"sde_steps": [0, 1, 2], "timestep_fraction": 0.7}),
    ],
)
def test_batch_sizes_bound_memory_and_change_nothing(make_trainer, trainer_class, config_class, settings):
    results, largest = [], []
    for number, (rollout, transition) in enumerate([(32, 8), (1, 1), (4, 2)]):
        trainer = make_trainer(
            trainer_class,
            config_class,
            reward_funcs=by_order(),
            rollout_batch_size=rollout,
            transition_batch_size=transition,
            num_inference_steps=3,
            steps_per_generation=2,
            beta=0.04,
            optim="sgd",
            learning_rate=1.0,
            max_steps=2,
            **settings,
            output_dir=str(trainer_dir(make_trainer, number)),
        )
        rows = []
        trainer.policy.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        randomize(trainer)
        before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}
        trainer.train()
        largest.append(max(rows))
        results.append({name: trainer.policy.get_parameter(name).detach() - start for name, start in before.items()})
    assert largest[1] == 1 and largest[2] <= 4
    scale = max(change.norm() for change in results[0].values())
    assert scale > 0
    for other in results[1:]:
        for name, change in results[0].items():
            assert (other[name] - change).norm() <= 1e-3 * change.norm() + 1e-4 * scale, name


# ---- Average of the weights ----


@pytest.mark.parametrize("update_after, decays", [(0, [0, 2 / 11, 3 / 12, 0.3]), (1, [0, 0, 2 / 11, 3 / 12])])
def test_what_is_saved_is_the_average_and_what_is_resumed_is_not(make_trainer, update_after, decays):
    trainer = make_trainer(
        ema_decay=0.3, ema_update_after=update_after, max_steps=4, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    run = make_trainer.directory / "run"
    raw = [load_file(run / f"checkpoint-{k}" / "adapter_model.safetensors") for k in range(1, 5)]
    saved = load_file(run / "adapter_model.safetensors")
    average = None
    for weights, decay in zip(raw, decays, strict=True):
        average = (
            weights
            if average is None
            else {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
        )
    assert any(not torch.equal(saved[name], raw[-1][name]) for name in saved)
    for name in saved:
        torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-8)
    # The trainer goes on from the raw weights.
    live = {name.replace(".default", ""): p for name, p in trainer.policy.denoisers["transformer"].named_parameters()}
    for name, value in raw[-1].items():
        assert torch.equal(live[name], value)


def test_without_an_average_the_weights_are_saved(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    run = make_trainer.directory / "run"
    last, saved = (load_file(path / "adapter_model.safetensors") for path in (run / "checkpoint-2", run))
    assert all(torch.equal(saved[name], last[name]) for name in last)


# ---- Evaluation ----


def test_evaluation_is_the_stock_pipeline_with_fixed_noise(make_trainer):
    pictures = []

    def keep(images, **kwargs):
        pictures.append(images)
        return brightness(images)

    trainer = make_trainer(reward_funcs=keep, eval_dataset=prompts(3), rollout_batch_size=1, seed=5)
    randomize(trainer)
    metrics = trainer.evaluate()
    again = trainer.evaluate()
    assert min(metrics.pop("eval_runtime"), again.pop("eval_runtime")) > 0
    assert metrics == again
    assert metrics["eval_num_samples"] == 3
    scores = []
    for number, row in enumerate(prompts(3)):
        noise = seeded_noise(5, "eval", number, num_draws=1, latent_shape=(4, 4, 4))
        expected = trainer.policy.pipeline(
            row["prompt"], latents=noise, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=2
        ).images[0]
        assert np.array_equal(np.asarray(pictures[number][0]), np.asarray(expected))
        scores += brightness([expected])
    assert metrics["eval_reward"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert metrics["eval_rewards/keep/mean"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert metrics["eval_rewards/keep/std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-9)
    assert len({np.asarray(picture[0]).tobytes() for picture in pictures[:3]}) == 3


def test_evaluation_shows_the_average(make_trainer):
    trainer = make_trainer(ema_decay=0.9, max_steps=3, eval_dataset=prompts(2), eval_on_start=False)
    trainer.train()
    averaged = trainer.evaluate()["eval_reward"]
    live = [p.detach().clone() for p in trainer._trainable]
    trainer._ema.copy_to(trainer._trainable)
    trainer._ema = None
    assert trainer.evaluate()["eval_reward"] == averaged
    for parameter, value in zip(trainer._trainable, live, strict=True):
        parameter.data = value
    assert trainer.evaluate()["eval_reward"] != averaged


def test_evaluation_does_not_touch_the_training(make_trainer):
    weights = []
    for evaluated in (False, True):
        trainer = make_trainer(
            max_steps=2,
            output_dir=str(trainer_dir(make_trainer, evaluated)),
            eval_dataset=prompts(2) if evaluated else None,
            eval_strategy="steps" if evaluated else "no",
            eval_steps=1,
        )
        trainer.train()
        weights.append([p.detach().clone() for p in trainer._trainable])
    assert len(logged(trainer, "eval_reward")) == 3  # at the start and after each update
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_held_out_rewards_are_never_trained_on(make_trainer):
    modes = []

    def held_out(images, trainer_state, **kwargs):
        modes.append((len(images), trainer_state.global_step))
        return redness(images)

    trainer = make_trainer(
        reward_funcs=[brightness, redness],
        reward_weights=[1.0, 0.5],
        eval_reward_funcs=held_out,
        eval_dataset=prompts(4),
        max_steps=2,
    )
    trainer.train()
    # The check on two grey pictures, then the held-out prompts at the beginning and at the end.
    assert modes == [(2, 0), (4, 0), (4, 2)]
    assert not any("held_out" in key for entry in trainer.state.log_history if "loss" in entry for key in entry)
    entry = [entry for entry in trainer.state.log_history if "eval_reward" in entry][-1]
    bright, red = entry["eval_rewards/brightness/mean"], entry["eval_rewards/redness/mean"]
    assert entry["eval_reward"] == pytest.approx(bright + 0.5 * red, rel=1e-9)
    assert entry["eval_rewards/held_out/mean"] == pytest.approx(red, rel=1e-12)


def test_rewards_of_one_name_are_told_apart(make_trainer):
    trainer = make_trainer(
        reward_funcs=lambda images, **kwargs: [1.0] * len(images),
        eval_reward_funcs=lambda images, **kwargs: [7.0] * len(images),
        eval_dataset=prompts(2),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 1.0
    assert sorted(value for name, value in metrics.items() if name.endswith("/mean")) == [1.0, 7.0]


def test_evaluation_counts_what_was_scored(make_trainer):
    """A missing score is no score of 0."""

    def sometimes(images, prompts, **kwargs):
        return [None if "square" in prompt else 2.0 for prompt in prompts]

    trainer = make_trainer(reward_funcs=sometimes, eval_dataset=prompts(4))
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/sometimes/mean"] == 2.0
    assert metrics["eval_rewards/sometimes/missing"] == 2
    assert metrics["eval_reward"] == 2.0


# ---- What is logged ----


def test_logged_numbers(make_trainer):
    trainer = make_trainer(
        DenseGRPOTrainer, DenseGRPOConfig, reward_funcs=[brightness, redness], beta=0.04, max_steps=2
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        for name in ("brightness", "redness"):
            assert 0 < entry[f"rewards/{name}/mean"] < 1 and entry[f"rewards/{name}/std"] > 0
        assert entry["reward"] == pytest.approx(
            entry["rewards/brightness/mean"] + entry["rewards/redness/mean"], rel=1e-9
        )
        assert sum(entry[f"grad_share/step_{step}"] for step in range(3)) == pytest.approx(1.0)
        assert entry["frac_reward_nan"] == entry["frac_reward_zero_std"] == 0.0
        assert {"reward_std", "kl", "clip_ratio", "nfe", "images_per_second"} <= entry.keys()
        phases = [entry[f"time/{phase}"] for phase in ("rollout", "decode", "reward", "train")]
        assert min(phases) > 0
        # The seconds of all updates so far; the phases are nearly all of one.
        assert sum(phases) < entry["time/elapsed"]
        assert entry["images_per_second"] == pytest.approx(12 / sum(phases[:3]))
        assert "time/old_policy" not in entry, "there was none to evaluate"
        for step in range(3):
            assert {f"advantages/std/step_{step}", f"dense_reward/step_{step}"} <= entry.keys()
            assert 0 <= entry[f"dense_reward/positive/step_{step}"] <= 1
            assert entry[f"noise_level/step_{step}"] == 0.7
    # A rollout of 3 samples: 10 evaluations each; 9 transitions with the reference's.
    assert [entry["nfe"] for entry in entries] == [30 + 18, 2 * (30 + 18)]
    assert entries[0]["kl"] == 0.0 and entries[1]["kl"] > 0.0


def test_phase_times_are_those_of_whole_updates(make_trainer, monkeypatch):
    """Two updates of two micro-steps each, from one rollout; a tick of the clock at each look at it."""
    ticks = itertools.count()
    monkeypatch.setattr("trl_flow.trainer.rollouts.time.perf_counter", lambda: float(next(ticks)))
    trainer = make_trainer(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["time/train"] == second["time/train"] == 2
    assert first["time/old_policy"] == 2, "the two micro-steps of the second update"
    assert "time/rollout" not in second and "images_per_second" not in second


def test_groups_without_any_difference_are_counted_and_cost_no_training(make_trainer):
    def flat(images, prompts, **kwargs):
        return [0.3] * len(images)

    gradients = Gradients()
    trainer = make_trainer(reward_funcs=flat, callbacks=[gradients], max_steps=1)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0]
    assert all(g is None or not g.any() for g in gradients.gradients[0].values())
    # The rollout's 12, and one forward of at most 3 rows, because every process takes part in an update.
    assert 12 < logged(trainer, "nfe")[0] <= 15


# ---- Guidance, precision, memory ----


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 4.5},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"sde_type": "cps"},
        {"sde_type": "dance", "noise_level": [0.9, 0.6, 0.3, 0.0]},
        {"scale_rewards": "batch"},
    ],
    ids=str,
)
def test_other_settings_train_too(make_trainer, settings):
    trainer = make_trainer(max_steps=2, **settings)
    trainer.train()
    assert logged(trainer, "ratio/min") == [1.0, 1.0]
    assert all(0 < norm < math.inf for norm in logged(trainer, "grad_norm"))


# ---- Configurations ----


def test_any_flow_grpo_config_works_in_any_trainer(make_trainer):
    trainer = make_trainer(G2RPOTrainer, FlowGRPOConfig)
    assert type(trainer.args) is G2RPOConfig
    assert trainer.args.granularities == [1, 2, 3] and trainer.args.update_per_step is False
    assert trainer.sde_steps == [0, 1]
    assert trainer.args.num_generations == 3 and trainer.args.guidance_scale == 1.0
    trainer.train()
    assert logged(trainer, "ratio/min") == [1.0]
    dense = make_trainer(DenseGRPOTrainer, FlowGRPOConfig)
    assert (dense.args.dense_reward, dense.args.tail_steps) == ("gain", "full")


def test_defaults_are_the_papers():
    flow, dense, g2 = FlowGRPOConfig("a", report_to="none"), DenseGRPOConfig("b"), G2RPOConfig("c")
    assert (flow.num_inference_steps, flow.num_generations, flow.noise_level, flow.epsilon) == (10, 24, 0.7, 1e-4)
    assert (flow.guidance_scale, flow.learning_rate, flow.beta, flow.advantage_clip) == (None, 3e-4, 0.04, 5.0)
    assert (dense.dense_reward, dense.tail_steps) == ("gain", "full")
    assert (g2.num_inference_steps, g2.num_generations, g2.granularities, g2.beta) == (16, 12, [1, 2, 3], 0.0)


def test_the_value_baseline_of_dense_grpo(make_trainer):
    """`dense_reward="value"`: the score after the step by itself, instead of its rise."""
    trainer = make_trainer(DenseGRPOTrainer, DenseGRPOConfig, dense_reward="value", tail_steps="1", num_generations=4)
    trainer.train()
    for group in sampled(trainer):
        values = [tail(trainer, child, [step + 1, 4], prompt) for prompt, step, _, child, _ in group]
        np.testing.assert_allclose([transition[-1] for transition in group], standardized(values, 0, 1e-4), atol=0.1)
