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

"""
Each method: that it trains, at the cost that its formula gives, goes on after a stop as if there had been none, and does
what its paper changes. Expected values are computed from recorded latents, rewards and weights, in float64 where that
matters, with velocities straight from the transformer.
"""

import functools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from methods import AWM, B2, COCA, DANCE, DENSE, FAST, FLOW, G2, MIX, NFT, TEMP, TURNING
from observing import logged, randomize, standardized
from pipelines import brightness, redness
from transformers import TrainerCallback

import trl_flow
from trl_flow import (
    AWMConfig,
    B2DiffuRLConfig,
    CoCAConfig,
    DanceGRPOConfig,
    DiffusionNFTConfig,
    FlowGRPOConfig,
    FlowGRPOFastConfig,
    MixGRPOConfig,
    TempFlowGRPOConfig,
    TurningPointGRPOConfig,
)
from trl_flow.scripts.methods import METHODS


# ---- What is recorded, and the transformer by itself ----


class Rollout:
    """One rollout: its micro-batches, all leaves, their scores, and what went through the transformer, and when."""

    def __init__(self):
        self.leaves, self.scores = [], []
        self.passes = {"rollout": [], "old": [], "training": []}

    def rows(self, stage):
        return sum(len(latents) for latents, _ in self.passes[stage])

    def trained_latents(self):
        """What was trained on, by the sigma that the transformer was told."""
        found = {}
        for latents, sigma in self.passes["training"]:
            found.setdefault(sigma, []).append(latents)
        return {sigma: torch.cat(parts) for sigma, parts in found.items()}


class Recorder:
    """Everything that a run of the trainer samples and evaluates, one [`Rollout`] after the other."""

    def __init__(self, trainer):
        self.rollouts, self.stage = [], "training"
        transformer = trainer.policy.pipeline.transformer
        self.hook = transformer.register_forward_pre_hook(self._forward, with_kwargs=True)
        generate, old, decode, calculate = (
            trainer._generate_and_score,
            trainer.old_statistics,
            trainer.start_decoding,
            trainer.start_rewards,
        )

        def recorded_generate(rows):
            self.rollouts.append(Rollout())
            self.rollouts[-1].trained_policy = weights(trainer)
            self.rollouts[-1].inputs = self.during("rollout", generate)(rows)
            return self.rollouts[-1].inputs

        def recorded_decode(latents, conditioning):
            if self.rollouts:
                self.rollouts[-1].leaves.append(latents.clone())
                self.rollouts[-1].sampling_policy = weights(trainer)
            return decode(latents, conditioning)

        def recorded_rewards(*args):
            wait, rollout = calculate(*args), self.rollouts[-1] if self.rollouts else None

            def recorded_wait():
                scores, failed = wait()
                if rollout is not None:
                    rollout.scores.append(scores)
                return scores, failed

            return recorded_wait

        trainer._generate_and_score = recorded_generate
        trainer.old_statistics = self.during("old", old)
        trainer.start_decoding = recorded_decode
        trainer.start_rewards = recorded_rewards

    def during(self, stage, function):
        def run(*args):
            before, self.stage = self.stage, stage
            result = function(*args)
            self.stage = before
            return result

        return run

    def _forward(self, module, args, kwargs):
        if self.rollouts:
            sigma = kwargs["timestep"].flatten()[0].item() / 1000
            self.rollouts[-1].passes[self.stage].append((kwargs["hidden_states"].detach().clone(), sigma))


def record(trainer):
    """Trains, and returns the rollouts."""
    recorder = Recorder(trainer)
    trainer.train()
    recorder.hook.remove()
    return recorder.rollouts


class Gradients(TrainerCallback):
    """The gradient and the weights of each update, as they are before it."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        self.weights.append([p.detach().clone() for p in parameters])


def weights(trainer):
    return [p.detach().clone() for p in trainer.policy.parameters() if p.requires_grad]


@torch.no_grad()
def set_weights(trainer, values):
    for parameter, value in zip([p for p in trainer.policy.parameters() if p.requires_grad], values, strict=True):
        parameter.copy_(value)


@functools.cache
def encoded(pipeline, prompt):
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=2
        )
    return embeds, pooled


def transformer_velocity(trainer, latents, sigma, prompt, guidance=1.0):
    """Straight from the transformer, without the policy."""

    def under(text):
        embeds, pooled = encoded(trainer.policy.pipeline, text)
        return trainer.policy.pipeline.transformer(
            hidden_states=latents,
            timestep=torch.full((len(latents),), sigma * 1000),
            encoder_hidden_states=embeds.expand(len(latents), -1, -1),
            pooled_projections=pooled.expand(len(latents), -1),
            return_dict=False,
        )[0]

    if guidance == 1:
        return under(prompt)
    unconditional = under("")
    return unconditional + guidance * (under(prompt) - unconditional)


@torch.no_grad()
def euler(trainer, latents, start, prompt):
    """The clean latents that Euler steps from the grid index `start` lead to."""
    sigmas = trainer.sigmas.tolist()
    for s, s_next in zip(sigmas[start:-1], sigmas[start + 1 :], strict=True):
        latents = latents + (s_next - s) * transformer_velocity(trainer, latents, s, prompt)
    return latents


def moments(trainer, step):
    """Factors of x and v in the mean of a stochastic step, q and the standard deviation, as the papers print them."""
    s, s_next = trainer.sigmas.tolist()[step : step + 2]
    a, dt = trainer.args.noise_level, s_next - s
    if trainer.args.sde_type == "cps":
        std = s_next * math.sin(a * math.pi / 2)
        c = math.sqrt(s_next**2 - std**2)
        return (1 - s_next) + c, c * (1 - s) - (1 - s_next) * s, std, std
    q = a if trainer.args.sde_type == "dance" else a * math.sqrt(s / (1 - (s_next if s == 1 else s)))
    return 1 + q**2 / (2 * s) * dt, (1 + q**2 * (1 - s) / (2 * s)) * dt, q, q * math.sqrt(-dt)


def transitions(trainer, rollout):
    """
    (prompt, step, parents, children, advantages, whether trained) of all groups and steps of a rollout, G rows each.
    """
    for part in rollout.inputs:
        for b, prompt in enumerate(part["prompts"]):
            for s, step in enumerate(part["steps"].tolist()):
                yield (
                    prompt,
                    step,
                    part["nodes"][b, part["parents"][s]],
                    part["nodes"][b, part["children"][s]],
                    part["advantages"][b, s],
                    part["trained"][b, s],
                )


def first_reward(rollout):
    """Scores of the first reward function, of all leaves `(B, L)`; B and L as they were decoded."""
    return torch.cat(rollout.scores)[:, 0].numpy()


# ---- Each method: cost, ratio, resumption ----


class Case(NamedTuple):
    method: tuple
    settings: dict
    steps: list  # of three rollouts
    evaluations: list  # rows of each rollout, by the method's closed form
    rows: list | None  # of training, in each; None: told from which transitions are trained
    old: list = [0, 0, 0]
    stops: tuple = (2,)


G, T = 3, 4
CHAIN = [0, 1, 2]  # all steps but the last


def trunk(start, num_steps=T):
    """Rows of a group that shares one noise and so all latents up to the one that the first stochastic step leaves."""
    return start + 1 + G * (num_steps - start - 1)


# G2RPO's sum over the steps k = 6, 5, 4 (T = 6): ceil((k - 1) / l) for l = 1 and 2, less the two that they share.
GRANULAR = 3 + G * sum((k - 1) + math.ceil((k - 1) / 2) - 2 for k in (6, 5, 4))

CASES = {
    "Flow-GRPO": Case(FLOW, {}, [CHAIN] * 3, [G * T] * 3, [G * 3] * 3),
    "Flow-GRPO-Fast": Case(
        FAST,
        {"sde_window_size": 2, "sde_window_range": [0, 3], "seed": 1},
        [[0, 1], [1, 2], [0, 1]],
        [G * T] * 3,
        [G * 2] * 3,
    ),
    "MixGRPO": Case(
        MIX,
        {"sde_window_size": 2, "sde_window_range": [0, 3], "sde_window_interval": 1},
        [[0, 1], [1, 2], [0, 1]],
        [trunk(0), trunk(1), trunk(0)],
        [1 + G] * 3,
    ),
    # Of 8 steps, int(0.6 * 8) or int(0.6 * 7) = 4 points after the window, of which the first is its end.
    "MixGRPO-Flash": Case(
        MIX,
        {
            "num_inference_steps": 8,
            "sde_window_size": 1,
            "sde_window_range": [0, 2],
            "sde_window_interval": 1,
            "flash_ratio": 0.6,
        },
        [[0], [1], [0]],
        [trunk(0, 1 + 3), trunk(1, 2 + 3), trunk(0, 1 + 3)],
        [1] * 3,
    ),
    "DanceGRPO": Case(DANCE, {"timestep_fraction": 0.67}, [CHAIN] * 3, [trunk(0)] * 3, None),
    "CoCA": Case(COCA, {"similarity_window": 2}, [CHAIN] * 3, [G * T] * 3, [G * 3] * 3),
    "TempFlow-GRPO": Case(
        TEMP,
        {"num_seeds": 2, "per_device_train_batch_size": 2},
        [CHAIN] * 3,
        [2 * ((T - 1) + G * T * (T - 1) // 2)] * 3,
        [2 * (T - 1)] * 3,
    ),
    "TP-GRPO": Case(TURNING, {}, [CHAIN] * 3, [G * T * (T + 1) // 2] * 3, [G * 3] * 3),
    "DenseGRPO": Case(DENSE, {}, [CHAIN] * 3, [G * T * (T + 1) // 2] * 3, [G * 3] * 3),
    "DenseGRPO, second order": Case(
        DENSE, {"tail_solver": "dpm", "num_inference_steps": 5}, [[0, 1, 2, 3]] * 3, [G * 15] * 3, [G * 4] * 3
    ),
    "G2RPO": Case(
        G2, {"num_inference_steps": 6, "granularities": [1, 2]}, [CHAIN] * 3, [GRANULAR] * 3, [len(CHAIN)] * 3
    ),
    # Later rollouts are another policy's, whose velocities in the training batches are noted.
    "DiffusionNFT": Case(
        NFT,
        {"old_policy_decay_rate": 0.2, "old_policy_decay": 0.9},
        [[0, 1, 2, 3]] * 3,
        [G * T] * 3,
        [G * int(0.99 * T)] * 3,
        old=[0, G * 3, G * 3],
        stops=(1, 2),
    ),
    "AWM": Case(AWM, {}, [[1, 2]] * 3, [G * T] * 3, [G * int(0.55 * 2)] * 3),
    "B2-DiffuRL": Case(
        B2,
        {"sde_window_size": 1, "sde_window_interval": 1},
        [[2], [1, 2], [0, 1, 2]],
        [trunk(2), trunk(1), trunk(0)],
        [1, 1 + 2, 1 + 2 + 2],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cost_ratio_and_resumption(make_trainer, name):
    """Three rollouts with an update each: what they cost, and that a run that stopped goes on bit by bit."""
    case = CASES[name]
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **case.settings}
    straight = make_trainer(*case.method, **settings)
    rollouts = record(straight)
    assert len(rollouts) == 3
    sigmas = straight.sigmas.tolist()
    cost, trained = 0, 0
    for number, rollout in enumerate(rollouts):
        steps = case.steps[number]
        assert [part["steps"].tolist() for part in rollout.inputs] == [steps] * len(rollout.inputs)
        assert rollout.rows("rollout") == case.evaluations[number]
        assert rollout.rows("old") == case.old[number]
        if case.rows is None:
            parents = {
                (number, b, s, part["parents"][s, g].item())
                for number, part in enumerate(rollout.inputs)
                for b, s, g in part["trained"].nonzero().tolist()
            }
            assert rollout.rows("training") == len(parents)
        else:
            assert rollout.rows("training") == case.rows[number]
        told = {int(np.abs(np.array(sigmas) - sigma).argmin()) for sigma in rollout.trained_latents()}
        assert told <= set(steps)
        cost += sum(rollout.rows(stage) for stage in rollout.passes)
        trained += rollout.rows("training")
        assert logged(straight, "nfe")[number] == cost
        assert logged(straight, "rows_trained")[number] == trained
    if case.method is NFT:
        assert logged(straight, "velocity_change")[0] == 0.0
        assert all(change > 0 for change in logged(straight, "velocity_change")[1:])
    else:
        assert logged(straight, "ratio/min") == logged(straight, "ratio/max") == [1.0] * 3
    assert all(0 < norm < math.inf for norm in logged(straight, "grad_norm"))

    def adapter(folder, k):
        return (make_trainer.directory / folder / f"checkpoint-{k}" / "adapter_model.safetensors").read_bytes()

    assert len({adapter("run", k) for k in (1, 2, 3)}) == 3
    expected = [entry for entry in straight.state.log_history if "loss" in entry]
    for stop in case.stops:
        folder = f"resumed-{stop}"
        resumed = make_trainer(
            *case.method, **{**settings, "save_steps": 3, "output_dir": str(make_trainer.directory / folder)}
        )
        torch.manual_seed(1000)  # a new process has another random state
        resumed.train(resume_from_checkpoint=str(make_trainer.directory / "run" / f"checkpoint-{stop}"))
        assert adapter(folder, 3) == adapter("run", 3)
        entries = [entry for entry in resumed.state.log_history if "loss" in entry]
        assert len(entries) == 3
        for entry, other in zip(entries, expected, strict=True):
            for key in ("reward", "nfe", "rows_trained", "grad_norm", "loss", "ratio/min", "velocity_change"):
                assert entry.get(key) == other.get(key), (stop, key)


# ---- Gradients, by plain autograd ----


def chain_loss(trainer, rollout, weight=lambda trainer, step: 1.0):
    """- A log p of each trained child, by itself, over their number."""
    total, number = 0.0, 0
    for prompt, step, parents, children, advantages, trained in transitions(trainer, rollout):
        of_latents, of_velocity, _, std = moments(trainer, step)
        s = trainer.sigmas[step].item()
        for g in trained.nonzero().flatten().tolist():
            v = transformer_velocity(trainer, parents[g][None], s, prompt)[0].double()
            mean = of_latents * parents[g].double() + of_velocity * v
            log_prob = torch.distributions.Normal(mean, std).log_prob(children[g].double()).mean()
            total = total - weight(trainer, step) * advantages[g].double() * log_prob
            number += 1
    return total / number


def noise_weight(trainer, step):
    stds = [moments(trainer, k)[3] for k in trainer.sde_steps]
    return moments(trainer, step)[3] / np.mean(stds)


def forward_samples(trainer, rollout):
    """(prompt, sigma, x0, noised x, its noise, advantage) of each sample that was trained on, from what was evaluated."""
    (part,) = rollout.inputs
    latents = rollout.trained_latents()
    for s, step in enumerate(part["steps"].tolist()):
        members = part["trained"][0, s].nonzero().flatten().tolist()
        if not members:
            continue
        sigma = trainer.sigmas[step].item()
        noised = latents.pop(min(latents, key=lambda told: abs(told - sigma)))
        assert len(noised) == len(members)
        for x, g in zip(noised, members, strict=True):
            clean = part["nodes"][0, part["parents"][s, g]]
            noise = (x - (1 - sigma) * clean) / sigma
            yield part["prompts"][0], sigma, clean, x, noise, part["advantages"][0, s, g]
    assert not latents


def nft_loss(trainer, rollout):
    losses, b = [], trainer.args.nft_beta
    for prompt, sigma, clean, x, _, advantage in forward_samples(trainer, rollout):
        v = transformer_velocity(trainer, x[None], sigma, prompt)[0].double()
        v_old = v.detach()
        fits = []
        for estimate in (b * v + (1 - b) * v_old, (1 + b) * v_old - b * v):
            error = x.double() - sigma * estimate - clean.double()
            fits.append((error**2).mean() / error.detach().abs().mean())
        r = advantage.double() / 10 + 0.5
        losses.append(5 * (r * fits[0] + (1 - r) * fits[1]) / b)
    return sum(losses) / len(losses)


def awm_loss(trainer, rollout):
    losses = []
    for prompt, sigma, clean, x, noise, advantage in forward_samples(trainer, rollout):
        v = transformer_velocity(trainer, x[None], sigma, prompt)[0].double()
        m = ((v - (noise - clean).double()) ** 2).mean()
        likelihood = {
            "uniform": -m,
            "sigma": -sigma * m,
            "ghuber": -sigma * ((m + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
        }[trainer.args.matching]
        losses.append(-advantage.double() * torch.exp(likelihood - likelihood.detach()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "method, settings, expected_loss",
    [
        pytest.param(DANCE, {"timestep_fraction": 0.67}, chain_loss, id="DanceGRPO"),
        pytest.param(FAST, {"sde_window_size": 2, "same_initial_noise": True}, chain_loss, id="Flow-GRPO-Fast"),
        pytest.param(B2, {"sde_window_size": 2}, chain_loss, id="B2-DiffuRL"),
        pytest.param(TURNING, {}, chain_loss, id="TP-GRPO"),
        pytest.param(
            TEMP,
            {"num_seeds": 2, "per_device_train_batch_size": 2},
            functools.partial(chain_loss, weight=noise_weight),
            id="TempFlow-GRPO",
        ),
        pytest.param(NFT, {"nft_beta": 0.6}, nft_loss, id="DiffusionNFT"),
        pytest.param(AWM, {"timestep_fraction": 1.0}, awm_loss, id="AWM"),
        pytest.param(AWM, {"timestep_fraction": 1.0, "matching": "sigma"}, awm_loss, id="AWM, weighted by sigma"),
    ],
)
def test_the_gradient_of_an_update(make_trainer, method, settings, expected_loss):
    """Against plain autograd, one sample at a time, with the formulas as they are printed."""
    recorded = Gradients()
    trainer = make_trainer(*method, callbacks=[recorded], max_grad_norm=0.0, learning_rate=0.0, **settings)
    randomize(trainer)
    (rollout,) = record(trainer)
    trainer.policy.zero_grad()
    expected_loss(trainer, rollout).backward()
    expected = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.policy.parameters() if p.requires_grad
    ]
    largest = max(gradient.norm().item() for gradient in expected)
    assert largest > 1e-5
    for actual, gradient in zip(recorded.gradients[0], expected, strict=True):
        assert (actual - gradient).norm() <= 1e-3 * gradient.norm() + 1e-3 * largest


# ---- Windows ----


def test_windows_are_a_function_of_seed_and_rollout(make_trainer, monkeypatch):
    settings = {"num_inference_steps": 10, "sde_window_size": 2, "num_iterations": 2, "steps_per_generation": 2}

    def windows(trainer, number=12):
        found = []
        for step in range(4 * number):  # two passes of two micro-steps each
            random.seed(step)
            torch.manual_seed(step)
            trainer._step = step
            found.append(trainer.rollout_steps())
        assert all(found[4 * k : 4 * k + 4] == [found[4 * k]] * 4 for k in range(number))
        return found[::4]

    trainer = make_trainer(*FAST, **settings)
    first = windows(trainer)
    assert all(window == [window[0], window[0] + 1] and 0 <= window[0] <= 3 for window in first)
    assert len({window[0] for window in first}) == 4
    with monkeypatch.context() as patch:
        patch.setattr(FlowGRPOFastConfig, "process_index", 3)  # of another process
        assert windows(trainer) == first
    assert windows(make_trainer(*FAST, **settings, seed=1)) != first


def test_flash_compresses_what_follows_the_window(make_trainer):
    """Its grid, and its pictures by DPM-Solver++(2M) in logarithms of the signal-to-noise ratio, as it is published."""
    case = CASES["MixGRPO-Flash"]
    trainer = make_trainer(*MIX, learning_rate=0.0, max_steps=2, **case.settings)
    rollouts = record(trainer)
    full = trainer.sigmas.double()
    second_order = 0
    for rollout, steps in zip(rollouts, case.steps, strict=False):
        after = steps[-1] + 1
        grid = trainer.rollout_sigmas(steps).double()
        assert torch.equal(grid[: after + 1], full[: after + 1])
        assert grid[-1] == 0 and (grid.diff() < 0).all()
        assert len(grid) - 1 == after + int((8 - steps[-1]) * 0.6) - 1
        ((prompt, _, _, children, _, _),) = transitions(trainer, rollout)
        for child, leaf in zip(children, torch.cat(rollout.leaves), strict=True):
            x, before = child, None
            for s, s_next in zip(grid[after:-1].tolist(), grid[after + 1 :].tolist(), strict=True):
                with torch.no_grad():
                    clean = x - s * transformer_velocity(trainer, x[None], s, prompt)[0]
                if s_next == 0:
                    x = clean
                    break
                lambdas = {t: math.log((1 - t) / t) for t in (s, s_next)}
                h = lambdas[s_next] - lambdas[s]
                estimate = clean
                if before is not None:
                    ratio = (lambdas[s] - before[1]) / h
                    estimate = (1 + 1 / (2 * ratio)) * clean - before[0] / (2 * ratio)
                    second_order += 1
                x = s_next / s * x - (1 - s_next) * math.expm1(-h) * estimate
                before = clean, lambdas[s]
            torch.testing.assert_close(leaf, x, rtol=1e-4, atol=1e-4)
    assert second_order


def test_b2_trains_the_best_and_the_worst(make_trainer):
    trainer = make_trainer(*B2, num_generations=5, sde_window_size=1, sde_window_interval=2, max_steps=4)
    rollouts = record(trainer)
    assert [rollout.inputs[0]["steps"].tolist() for rollout in rollouts] == [[2], [2], [1, 2], [1, 2]]
    for rollout in rollouts:
        scores = first_reward(rollout)
        assert len(set(scores)) == 5
        expected = torch.zeros(5, dtype=torch.bool)
        expected[[scores.argmax(), scores.argmin()]] = True
        for *_, advantages, trained in transitions(trainer, rollout):
            assert torch.equal(trained, expected)
            np.testing.assert_allclose(advantages, standardized(scores), rtol=1e-5)
        # One trunk, without noise, up to the first step that is trained.
        first = next(transitions(trainer, rollout))
        assert all(torch.equal(parent, first[2][0]) for parent in first[2])


# ---- Credit ----


def test_dance_grpo(make_trainer):
    """A random part of the steps for each sample, and a sum of advantages with the sample's standard deviation."""
    trainer = make_trainer(
        *DANCE,
        reward_funcs=[brightness, redness],
        reward_weights=[1.0, 0.5],
        num_generations=4,
        num_inference_steps=6,
        per_device_train_batch_size=2,
        max_steps=2,
    )
    chosen = []
    for rollout in record(trainer):
        scores = torch.cat(rollout.scores).unflatten(0, (2, 4)).numpy()
        (part,) = rollout.inputs
        for b in range(2):
            expected = sum(
                weight * standardized(scores[b, :, r], ddof=1, eps=1e-8) for r, weight in enumerate([1.0, 0.5])
            )
            for s in range(5):
                np.testing.assert_allclose(part["advantages"][b, s], expected, rtol=1e-5, atol=1e-6)
            assert part["trained"][b].sum(0).tolist() == [int(5 * 0.6)] * 4
            chosen += [tuple(column.tolist()) for column in part["trained"][b].T]
        start = part["nodes"][:, part["parents"][0]]
        assert torch.equal(start[:, :1].expand_as(start), start) and not torch.equal(start[0], start[1])
    assert len(set(chosen)) > 6  # of 10, in 16 draws
    assert torch.tensor(chosen).any(0).all()


def test_coca(make_trainer):
    """Advantages from the recorded latents, step by step as the method is described."""
    num_steps, window, kept = 5, 2, 0.25
    trainer = make_trainer(
        *COCA,
        num_inference_steps=num_steps,
        similarity_window=window,
        outcome_share=kept,
        num_generations=4,
        per_device_train_batch_size=2,
        learning_rate=0.0,
    )
    randomize(trainer)
    (rollout,) = record(trainer)
    leaves = torch.cat(rollout.leaves).unflatten(0, (2, 4))
    scores = first_reward(rollout).reshape(2, 4)
    sigmas = trainer.sigmas.tolist()
    (part,) = rollout.inputs
    uneven = 0
    for b, prompt in enumerate(part["prompts"]):
        shaped = np.zeros((4, num_steps - 1))
        for g, advantage in enumerate(standardized(scores[b])):
            chain = [part["nodes"][b, part["parents"][s, g]] for s in range(num_steps - 1)]
            chain.append(part["nodes"][b, part["children"][-1, g]])
            with torch.no_grad():
                estimates = [
                    (x - s * transformer_velocity(trainer, x[None], s, prompt)[0]).flatten().double().numpy()
                    for x, s in zip(chain, sigmas[:-1], strict=True)
                ]
            estimates.append(leaves[b, g].flatten().double().numpy())
            cosine = [y @ estimates[-1] / (np.linalg.norm(y) * np.linalg.norm(estimates[-1])) for y in estimates]
            share, before = np.zeros(num_steps), cosine[0]
            for start in range(0, num_steps, window):
                block = cosine[1:][start : start + window]
                share[start : start + window] = (np.mean(block) - before) / len(block)
                before = np.mean(block)
            assert share.sum() > 1e-3
            share /= share.sum()
            onward = np.array([share[i:].sum() for i in range(num_steps)])
            uneven += np.ptp(onward) > 0.1
            shaped[g] = advantage * (kept + (1 - kept) * onward)[:-1]
        for s in range(num_steps - 1):
            np.testing.assert_allclose(part["advantages"][b, s], standardized(shaped[:, s]), rtol=2e-3, atol=2e-3)
    assert uneven == 8


def test_temp_flow_grpo(make_trainer):
    """Two seeds of each of two prompts: noises of their own, groups of their own, siblings of one parent."""
    trainer = make_trainer(*TEMP, num_seeds=2, per_device_train_batch_size=4, num_generations=4)
    (rollout,) = record(trainer)
    (part,) = rollout.inputs
    assert part["prompts"][0] == part["prompts"][1] != part["prompts"][2] == part["prompts"][3]
    scores = first_reward(rollout).reshape(4, 3 * 4)
    leaves = torch.cat(rollout.leaves).unflatten(0, (4, 12))
    plan = trainer.rollout_plan(trainer.sde_steps)
    starts = []
    for b, prompt in enumerate(part["prompts"]):
        x = part["nodes"][b, part["parents"][0, 0]]
        starts.append(x)
        for s, step in enumerate(plan.steps):
            parents = part["nodes"][b, part["parents"][s]]
            assert all(torch.equal(parent, parents[0]) for parent in parents)
            torch.testing.assert_close(parents[0], x, rtol=1e-4, atol=1e-4)  # of one deterministic trunk
            children = part["nodes"][b, part["children"][s]]
            assert len({child.numpy().tobytes() for child in children}) == 4
            of_this_step = [plan.leaves.index(edge.leaves[0]) for edge in plan.transitions[step]]
            with torch.no_grad():
                set_weights(trainer, rollout.sampling_policy)
                expected = euler(trainer, children, step + 1, prompt)
                sigma, sigma_next = trainer.sigmas[step].item(), trainer.sigmas[step + 1].item()
                x = x + (sigma_next - sigma) * transformer_velocity(trainer, x[None], sigma, prompt)[0]
            torch.testing.assert_close(leaves[b, of_this_step], expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                part["advantages"][b, s], standardized(scores[b, of_this_step]), rtol=1e-4, atol=1e-5
            )
    assert len({start.numpy().tobytes() for start in starts}) == 4
    stds = np.array([moments(trainer, step)[3] for step in (0, 1, 2)])
    np.testing.assert_allclose([trainer._step_weights[step] for step in (0, 1, 2)], stds / stds.mean(), rtol=1e-5)


def turning_point_rewards(tails, balance):
    """
    TP-GRPO as it is described, chain by chain: `tails` are the rewards R_0 to R_W of each chain of a local batch. Returns
    the reward of each step, and how many there are of turning points.
    """
    found = []
    for chain, rewards in enumerate(tails):
        gains, change = np.diff(rewards), rewards[-1] - rewards[0]
        for i, gain in enumerate(gains):
            onward = np.sign(gain) == np.sign(rewards[-1] - rewards[i + 1]) != 0
            turns = i == 0 or (np.sign(gains[i - 1]) * np.sign(change) < 0 and np.sign(gain) * np.sign(change) > 0)
            if onward and turns:
                found.append((chain, i, change))
    if balance:
        up = sorted((point for point in found if point[2] > 0), key=lambda point: -point[2])
        down = sorted((point for point in found if point[2] < 0), key=lambda point: point[2])
        size = min(len(up), len(down))
        found = up[:size] + down[:size]
    values = np.diff(tails, axis=1)
    for chain, i, _ in found:
        values[chain, i] = tails[chain][-1] - tails[chain][i]
    return values, len(found)


@pytest.mark.parametrize("settings", [{}, {"balance_turning_points": False}], ids=str)
def test_turning_points(make_trainer, settings):
    """The tail of R_0 starts from the chain's own noise; credit from the recorded rewards."""
    trainer = make_trainer(
        *TURNING,
        num_inference_steps=5,
        num_generations=4,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        reward_funcs=zigzag,
        **settings,
    )
    (rollout,) = record(trainer)
    (part,) = rollout.inputs
    plan = trainer.rollout_plan(trainer.sde_steps)
    leaves = torch.cat(rollout.leaves).unflatten(0, (2, len(plan.leaves)))
    scores = first_reward(rollout).reshape(2, len(plan.leaves))
    tails = []
    for b, prompt in enumerate(part["prompts"]):
        for g in range(4):
            numbers = [plan.leaves.index(leaf) for leaf in plan.transitions[0][g].leaves]
            numbers += [plan.leaves.index(plan.transitions[step][g].leaves[1]) for step in (1, 2, 3)]
            for step in (1, 2, 3):
                assert plan.leaves.index(plan.transitions[step][g].leaves[0]) == numbers[step]
            noise = part["nodes"][b, part["parents"][0, g]]
            assert abs(noise.std() - 1) < 0.5
            torch.testing.assert_close(
                leaves[b, numbers[0]], euler(trainer, noise[None], 0, prompt)[0], rtol=1e-4, atol=1e-4
            )
            for step in range(4):
                child = part["nodes"][b, part["children"][step, g]]
                torch.testing.assert_close(
                    leaves[b, numbers[step + 1]],
                    euler(trainer, child[None], step + 1, prompt)[0],
                    rtol=1e-4,
                    atol=1e-4,
                )
            tails.append(scores[b, numbers])
    assert len({part["nodes"][0, parent].numpy().tobytes() for parent in part["parents"][0]}) == 4
    values, number = turning_point_rewards(np.array(tails), trainer.args.balance_turning_points)
    assert number >= 2
    assert (values != np.diff(tails, axis=1)).sum() == number
    assert logged(trainer, "turning_points")[0] == pytest.approx(number / values.size)
    for b in range(2):
        for s in range(4):
            expected = standardized(values.reshape(2, 4, 4)[b, :, s])
            np.testing.assert_allclose(part["advantages"][b, s], expected, rtol=1e-4, atol=1e-5)


def zigzag(images, **kwargs):
    """A reward with many ups and downs along a trajectory."""
    return [math.sin(1000 * value) for value in brightness(images)]


def test_turning_points_are_not_counted_where_a_score_is_missing(make_trainer):
    def some(images, **kwargs):
        return [None if number % 5 == 1 else value for number, value in enumerate(brightness(images))]

    trainer = make_trainer(*TURNING, reward_funcs=some, balance_turning_points=False, num_generations=4)
    (rollout,) = record(trainer)
    plan = trainer.rollout_plan(trainer.sde_steps)
    scores = first_reward(rollout)
    assert np.isnan(scores).any()
    tails = [
        scores[
            [plan.leaves.index(plan.transitions[0][g].leaves[0])]
            + [plan.leaves.index(plan.transitions[step][g].leaves[1]) for step in CHAIN]
        ]
        for g in range(4)
    ]
    with np.errstate(invalid="ignore"):
        number = sum(turning_point_rewards(tail[None], False)[1] for tail in tails if not np.isnan(tail).any())
    # Chains with a missing score may have turning points too, but none of their steps without a score is one.
    unknown = sum(np.isnan(np.diff(tail)).sum() for tail in tails)
    incomplete = sum(np.isnan(tail).any() for tail in tails)
    assert unknown and incomplete < 4
    found = logged(trainer, "turning_points")[0] * 12
    assert found == pytest.approx(round(found), abs=1e-9)
    assert number <= found <= number + 3 * incomplete - unknown


# ---- Forward process ----


def test_diffusion_nft_samples_with_an_average(make_trainer):
    """old_0 is the first policy, old_k = d_k old_(k-1) + (1 - d_k) new_k with d_k = min(0.4 k, 0.6)."""
    trainer = make_trainer(
        *NFT, old_policy_decay=0.6, old_policy_decay_rate=0.4, max_steps=4, timestep_fraction=1.0, learning_rate=0.05
    )
    rollouts = record(trainer)
    old = rollouts[0].trained_policy
    for k, rollout in enumerate(rollouts):
        decay = min(0.4 * k, 0.6)
        old = [decay * o + (1 - decay) * n for o, n in zip(old, rollout.trained_policy, strict=True)]
        for actual, expected in zip(rollout.sampling_policy, old, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
        (part,) = rollout.inputs
        if k == 0:
            assert part["old"] is None
            continue
        assert any(not torch.equal(*pair) for pair in zip(old, rollout.trained_policy, strict=True))
        # The old velocity is the sampling policy's, at the very latents that are trained on.
        set_weights(trainer, rollout.sampling_policy)
        noted = part["old"]["velocity"]
        latents = rollout.trained_latents()
        for s, (sigma, noised) in enumerate(sorted(latents.items(), reverse=True)):
            with torch.no_grad():
                expected = transformer_velocity(trainer, noised, sigma, part["prompts"][0])
            torch.testing.assert_close(noted[0, s], expected, rtol=1e-4, atol=1e-5)
        old_latents = torch.cat([latents for latents, _ in rollout.passes["old"]])
        assert torch.equal(old_latents, torch.cat([latents for latents, _ in rollout.passes["training"]]))


def test_forward_noise_is_new_for_each_sample_and_step(make_trainer):
    trainer = make_trainer(*NFT, timestep_fraction=1.0, max_steps=2, num_generations=4)
    noise = []
    for rollout in record(trainer):
        (part,) = rollout.inputs
        samples = list(forward_samples(trainer, rollout))
        assert len(samples) == 4 * 4
        noise += [sample[4] for sample in samples]
        for leaf in torch.cat(rollout.leaves):
            assert any(torch.equal(leaf, sample[2]) for sample in samples)
    assert len({row.numpy().round(3).tobytes() for row in noise}) == 32
    noise = torch.stack(noise)
    assert noise.mean().abs() < 0.1 and abs(noise.std() - 1) < 0.1


def test_awm_compares_two_policies_on_one_noise(make_trainer):
    """The ratio of a second update, from the weights before and after the first."""
    recorded = Gradients()
    trainer = make_trainer(
        *AWM, steps_per_generation=2, max_steps=2, timestep_fraction=1.0, callbacks=[recorded], learning_rate=0.02
    )
    (rollout,) = record(trainer)
    assert logged(trainer, "ratio/min")[0] == logged(trainer, "ratio/max")[0] == 1.0
    passes = rollout.passes["training"]
    noted = rollout.passes["old"]
    second = passes[len(passes) - len(noted) :]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(second, noted, strict=True))
    part = rollout.inputs[1]
    likelihoods = []
    for policy in recorded.weights:
        set_weights(trainer, policy)
        values = []
        for s, (noised, sigma) in enumerate(second):
            with torch.no_grad():
                v = transformer_velocity(trainer, noised, sigma, part["prompts"][0]).double()
            clean = part["nodes"][0, part["parents"][s]].double()
            target = (noised.double() - (1 - sigma) * clean) / sigma - clean
            m = ((v - target) ** 2).flatten(1).mean(1)
            values.append(-sigma * ((m + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25)
        likelihoods.append(torch.cat(values))
    ratio = torch.exp(likelihoods[1] - likelihoods[0])
    assert (ratio - 1).abs().max() > 1e-4
    for key, value in (("min", ratio.min()), ("max", ratio.max()), ("mean", ratio.mean())):
        assert logged(trainer, f"ratio/{key}")[1] == pytest.approx(value.item(), abs=1e-6)


@pytest.mark.parametrize("method", [NFT, AWM], ids=["DiffusionNFT", "AWM"])
def test_samples_that_are_all_alike_teach_nothing(make_trainer, method):
    recorded = Gradients()
    trainer = make_trainer(
        *method,
        reward_funcs=lambda images, **kwargs: [0.3] * len(images),
        beta=0.0,
        callbacks=[recorded],
        max_steps=2,
    )
    randomize(trainer)
    trainer.train()
    # DiffusionNFT's pull and push are equal and opposite, to rounding.
    assert all(gradient.abs().max() < 1e-6 for gradient in recorded.gradients[0])
    assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]


@pytest.mark.parametrize("method", [NFT, AWM], ids=["DiffusionNFT", "AWM"])
def test_a_group_of_equals_weighs_the_same_in_any_micro_batch(make_trainer, method):
    """Two groups at once or one after the other, one of them without any difference: one gradient."""

    def half(images, prompts, **kwargs):
        return [
            0.3 if prompt == prompts[0] else value for prompt, value in zip(prompts, brightness(images), strict=True)
        ]

    found = []
    for together in (True, False):
        recorded = Gradients()
        trainer = make_trainer(
            *method,
            reward_funcs=half,
            callbacks=[recorded],
            per_device_train_batch_size=2 if together else 1,
            gradient_accumulation_steps=1 if together else 2,
            rollout_batch_size=64,
            num_generations=4,
            output_dir=str(make_trainer.directory / f"together-{together}"),
        )
        randomize(trainer)
        trainer.train()
        assert logged(trainer, "frac_reward_zero_std") == [0.5]
        found.append(recorded.gradients[0])
    assert max(gradient.abs().max() for gradient in found[0]) > 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


# ---- Flow-GRPO's settings ----


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_scale_of_the_rewards(make_trainer, scale):
    trainer = make_trainer(*FLOW, scale_rewards=scale, per_device_train_batch_size=3, num_generations=4)
    (rollout,) = record(trainer)
    scores = first_reward(rollout).reshape(3, 4)
    deviation = scores - scores.mean(1, keepdims=True)
    std = {"group": scores.std(1, keepdims=True) + 1e-4, "batch": scores.std() + 1e-4, "none": 1.0}[scale]
    (part,) = rollout.inputs
    for s in range(3):
        np.testing.assert_allclose(part["advantages"][:, s], deviation / std, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kl_type", ["mean", "gaussian", "velocity"])
def test_divergence_from_the_base_model(make_trainer, kl_type, guidance):
    trainer = make_trainer(*FLOW, beta=0.04, kl_type=kl_type, guidance_scale=guidance, learning_rate=0.0)
    randomize(trainer)
    (rollout,) = record(trainer)
    expected = []
    for prompt, step, parents, _, _, _ in transitions(trainer, rollout):
        s = trainer.sigmas[step].item()
        _, of_velocity, q, std = moments(trainer, step)
        with torch.no_grad():
            v = transformer_velocity(trainer, parents, s, prompt, guidance)
            with trainer.policy.denoisers["transformer"].disable_adapter():
                v = v - transformer_velocity(trainer, parents, s, prompt, guidance)
        factor = {"mean": of_velocity**2 / (2 * q**2), "gaussian": of_velocity**2 / (2 * std**2), "velocity": 1}
        expected.append(factor[kl_type] * v.double().square().mean().item())
    assert logged(trainer, "kl")[0] == pytest.approx(np.mean(expected), rel=1e-3)
    assert np.mean(expected) > 1e-6


def two_updates(make_trainer, **settings):
    """A rollout that feeds two updates: the trainer, and for each transition of the second <z d>, <d^2>, tau and A."""
    recorded = Gradients()
    trainer = make_trainer(
        *FLOW, steps_per_generation=2, max_steps=2, learning_rate=0.02, callbacks=[recorded], **settings
    )
    rollouts = record(trainer)
    assert len(rollouts) == 1 and rollouts[0].rows("old") == 9
    assert logged(trainer, "ratio/min")[0] == logged(trainer, "ratio/max")[0] == 1.0
    rollouts[0].inputs = rollouts[0].inputs[1:]
    values = []
    for prompt, step, parents, children, advantages, _ in transitions(trainer, rollouts[0]):
        of_latents, of_velocity, _, std = moments(trainer, step)
        means = []
        for policy in recorded.weights:
            set_weights(trainer, policy)
            with torch.no_grad():
                v = transformer_velocity(trainer, parents, trainer.sigmas[step].item(), prompt).double()
            means.append(of_latents * parents.double() + of_velocity * v)
        z, change = (children.double() - means[0]) / std, means[1] - means[0]
        values += zip(
            (z * change).flatten(1).mean(1).tolist(),
            change.square().flatten(1).mean(1).tolist(),
            [std] * len(z),
            advantages.tolist(),
            strict=True,
        )
    return trainer, np.array(values).T


def second_ratio(trainer):
    return [logged(trainer, f"ratio/{name}")[1] for name in ("min", "max", "mean")]


@pytest.mark.parametrize("settings", [{}, {"step_weighting": "guard"}], ids=str)
def test_guard(make_trainer, settings):
    """The normalised ratio is exp(<z d>), whatever the step's noise."""
    trainer, (product, _, _, _) = two_updates(make_trainer, objective="guard", **settings)
    ratio = np.exp(product)
    assert np.abs(product).max() > 1e-4
    np.testing.assert_allclose(second_ratio(trainer), [ratio.min(), ratio.max(), ratio.mean()], atol=1e-5)
    sizes = -trainer.sigmas.diff().double().numpy()[:3]
    expected = (1 / sizes) / (1 / sizes).mean() if settings else np.ones(3)
    np.testing.assert_allclose([trainer._step_weights[step] for step in CHAIN], expected, rtol=1e-5)


def test_the_ratio_of_a_second_update(make_trainer):
    trainer, (product, square, std, advantages) = two_updates(make_trainer, epsilon=1e-5, epsilon_high=1e-3)
    ratio = np.exp(product / std - square / (2 * std**2))
    np.testing.assert_allclose(second_ratio(trainer), [ratio.min(), ratio.max(), ratio.mean()], atol=1e-5)
    clipped = np.where(advantages > 0, ratio > 1 + 1e-3, ratio < 1 - 1e-5)
    assert logged(trainer, "clip_ratio")[1] == pytest.approx(clipped.mean())


@pytest.mark.parametrize("threshold", [1e-12, 1e3])
def test_dppo(make_trainer, threshold):
    """Not clipped, but left out where a step that has moved too far moves on."""
    trainer, (product, square, std, advantages) = two_updates(
        make_trainer, objective="dppo", kl_mask_threshold=threshold
    )
    ratio = np.exp(product / std - square / (2 * std**2))
    np.testing.assert_allclose(second_ratio(trainer), [ratio.min(), ratio.max(), ratio.mean()], atol=1e-5)
    left_out = (square / (2 * std**2) >= threshold) & (advantages * (ratio - 1) > 0)
    assert logged(trainer, "clip_ratio") == [0.0, pytest.approx(left_out.mean())]
    assert left_out.any() == (threshold < 1)


# ---- Configurations ----


@pytest.mark.parametrize(
    "trainer_class, config_class", [FLOW, FAST, DANCE, MIX, COCA, TEMP, TURNING, DENSE, G2, NFT, AWM, B2]
)
def test_any_flow_grpo_config_works_in_any_trainer(make_trainer, trainer_class, config_class):
    """With as few steps as there can be windows in; TempFlow-GRPO needs room for its four seeds."""
    trainer = make_trainer(
        trainer_class, FlowGRPOConfig, per_device_train_batch_size=4 if config_class is TempFlowGRPOConfig else 1
    )
    assert type(trainer.args) is config_class
    assert trainer.args.num_generations == 3 and trainer.args.guidance_scale == 1.0
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize(
    "config_class, published",
    [
        (FlowGRPOFastConfig, {"sde_type": "cps", "noise_level": 0.8, "epsilon": 1e-5, "beta": 0.0}),
        (
            DanceGRPOConfig,
            {
                "num_inference_steps": 16,
                "num_generations": 12,
                "sde_type": "dance",
                "noise_level": 0.3,
                "same_initial_noise": True,
                "timestep_fraction": 0.6,
                "epsilon": 1e-4,
                "multi_objective_aggregation": "normalize_then_sum",
            },
        ),
        (
            MixGRPOConfig,
            {
                "num_inference_steps": 25,
                "num_generations": 12,
                "sde_type": "flow",
                "noise_level": 0.7,
                "same_initial_noise": True,
                "sde_window_range": [0, 23],
                "sde_window_schedule": "progressive",
                "sde_window_interval": 25,
                "sde_window_stride": 1,
            },
        ),
        (CoCAConfig, {"outcome_share": 0.0}),
        (
            TempFlowGRPOConfig,
            {"num_seeds": 4, "num_generations": 6, "beta": 0.004, "kl_type": "gaussian", "step_weighting": "noise"},
        ),
        (TurningPointGRPOConfig, {"sde_type": "cps", "noise_level": 0.7, "epsilon": 1e-5, "beta": 1e-4}),
        (
            DiffusionNFTConfig,
            {
                "num_inference_steps": 10,
                "num_generations": 24,
                "guidance_scale": 1.0,
                "nft_beta": 1.0,
                "beta": 1e-4,
                "old_policy_decay": 0.5,
                "old_policy_decay_rate": 0.001,
            },
        ),
        # Six of eleven steps; the published divergence's weight of 0.003 goes with advantages divided by 5.
        (AWMConfig, {"num_inference_steps": 14, "timestep_fraction": 0.55, "matching": "ghuber", "beta": 0.003 * 5}),
        (B2DiffuRLConfig, {"num_inference_steps": 20, "num_generations": 5, "sde_window_range": [0, 19]}),
    ],
)
def test_defaults_are_the_published_ones(config_class, published):
    config = config_class("a", report_to="none")
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.parametrize("config_class", [FlowGRPOFastConfig, MixGRPOConfig, B2DiffuRLConfig, CoCAConfig])
def test_a_default_window_fits_and_one_that_is_asked_for_is_refused(config_class):
    name = "similarity_window" if config_class is CoCAConfig else "sde_window_size"
    published = {FlowGRPOFastConfig: 3, MixGRPOConfig: 4, B2DiffuRLConfig: 13, CoCAConfig: 5}[config_class]
    assert getattr(config_class("a"), name) == published
    short = config_class("a", num_inference_steps=3)
    assert getattr(short, name) == (3 if config_class is CoCAConfig else 2 if config_class is B2DiffuRLConfig else 1)
    with pytest.raises(ValueError, match=f"{name}={published}"):
        config_class("a", num_inference_steps=3, **{name: published})


@pytest.mark.parametrize("command", METHODS)
def test_guidance_is_the_models(command):
    """But for the methods that are published without guidance."""
    config = getattr(trl_flow, METHODS[command].config)("a", report_to="none")
    assert config.guidance_scale == (1.0 if command in ("flow-grpo-fast", "diffusion-nft", "awm") else None)
