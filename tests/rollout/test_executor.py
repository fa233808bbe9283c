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

import gc

import numpy as np
import pytest
import torch
from pipelines import tiny_sd3

from trl_flow import FlowPolicy
from trl_flow.rollout import Plan, branch_plan, chain_plan, dense_plan, execute, forward_plan, seeded_noise


T = 6
# Multiples of 2^-10, so that float32 holds the grid and its differences exactly.
GRID = np.array([1024, 950, 800, 610, 400, 150, 0]) / 1024
LEVELS = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2]

PLANS = {
    "chain": chain_plan(T, 3, range(T - 1)),
    "chain, shared noise, window": chain_plan(T, 3, [2, 3], same_initial_noise=True),
    "dense, n=1": dense_plan(T, 3, range(T - 1), 1),
    "dense, n=2": dense_plan(T, 3, range(T - 1), 2),
    "dense, full": dense_plan(T, 3, range(T - 1)),
    "dense, full, last step stochastic": dense_plan(T, 3, range(T)),
    "dense, n=2, shared noise": dense_plan(T, 3, [0, 2], 2, same_initial_noise=True),
    "dense, full, shared noise": dense_plan(T, 3, [1, 2, 4], same_initial_noise=True),
    "branch, stride 1": branch_plan(T, 3, range(3), (1,)),
    "branch, strides 1, 2": branch_plan(T, 3, [0, 2], (1, 2)),
    "branch, strides 1, 2, 3": branch_plan(T, 3, range(4), (1, 2, 3)),
    "branch, every step but the last": branch_plan(T, 2, range(T - 1)),
    "chain, second order after a window": chain_plan(T, 3, [1, 2], solver="dpm"),
    "chain, second order, shared noise": chain_plan(T, 3, [0], same_initial_noise=True, solver="dpm"),
    "dense, full, second order": dense_plan(T, 2, range(T - 1), solver="dpm"),
    "dense, n=2, second order": dense_plan(T, 2, range(T), 2, solver="dpm"),
    "dense, n=3, second order, shared noise": dense_plan(T, 2, [1, 3], 3, same_initial_noise=True, solver="dpm"),
    "forward": forward_plan(T, 3, [1, 4]),
}


class Velocity:
    """A smooth nonlinear field in float64 that depends on the prompt, and a record of the rows it was asked for."""

    def __init__(self, num_prompts: int, size: int):
        random = np.random.default_rng(3)
        self.matrices = random.normal(size=(num_prompts, size, size)) / np.sqrt(size)
        self.shift = random.normal(size=size)
        self.rows = []
        self.largest = 0

    def at(self, x: np.ndarray, sigma: float, prompt: int) -> np.ndarray:
        return np.tanh(x @ self.matrices[prompt] + sigma * self.shift) + 0.3 * x

    def __call__(self, latents, sigma, prompt):
        self.largest = max(self.largest, len(latents))
        self.rows += [(sigma, p, row.tobytes()) for p, row in zip(prompt.tolist(), latents.numpy(), strict=True)]
        return torch.from_numpy(
            np.stack([self.at(x, sigma, p) for x, p in zip(latents.numpy(), prompt.tolist(), strict=True)])
        )


def step_of(dynamics, x, v, s, s_next, level, z):
    """One step as the papers print it. `z` is None for an ODE step."""
    dt = s_next - s
    if z is None:
        return x + dt * v
    clean, noise = x - s * v, x + (1 - s) * v
    if dynamics == "cps":
        std = s_next * np.sin(level * np.pi / 2)
        return (1 - s_next) * clean + np.sqrt(s_next**2 - std**2) * noise + std * z
    q = level if dynamics == "dance" else level * np.sqrt(s / (1 - (s_next if s == 1 else s)))
    score = -(x - (1 - s) * clean) / s**2
    return x + dt * v - 0.5 * q**2 * score * dt + q * np.sqrt(-dt) * z


def second_order(x, now, before, s_next):
    """DPM-Solver++(2M) in the terms of its paper; of first order where the log signal-to-noise ratio is infinite."""
    (s, clean), (s_before, clean_before) = now, before
    if s_before == 1 or s_next == 0:
        return s_next / s * x + (1 - s_next / s) * clean
    before, now, after = (np.log((1 - sigma) / sigma) for sigma in (s_before, s, s_next))
    h, r = after - now, (now - before) / (after - now)
    return s_next / s * x - (1 - s_next) * np.expm1(-h) * (clean + (clean - clean_before) / (2 * r))


def naive(plan, velocity, noise, dynamics, prompt, node):
    """The latent of one node, every velocity on its way computed anew."""
    way = []
    while node is not None:
        way.append(node)
        node = plan.nodes[node].parent
    start, *way = way[::-1]
    index, x, cleans = 0, noise[prompt, plan.nodes[start].draw], {}
    number = start
    for child in way:
        node = plan.nodes[child]
        v = velocity.at(x, GRID[index], prompt)
        cleans[number] = GRID[index], x - GRID[index] * v
        z = None if node.draw is None else noise[prompt, node.draw]
        if node.before is None:
            x = step_of(dynamics, x, v, GRID[index], GRID[node.index], LEVELS[index], z)
        else:
            x = second_order(x, cleans[number], cleans[node.before], GRID[node.index])
        index, number = node.index, child
    return x


def run_plan(plan, dynamics="flow", batch_size=None, **options):
    velocity = Velocity(num_prompts=2, size=5)
    noise = np.random.default_rng(4).normal(size=(2, plan.num_draws, 5))
    sigmas = torch.tensor(GRID, dtype=torch.float32)
    rollout = execute(plan, velocity, sigmas, torch.from_numpy(noise), LEVELS, dynamics, batch_size, **options)
    return velocity, noise, rollout


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
@pytest.mark.parametrize("name", PLANS)
def test_equals_one_path_at_a_time(name, dynamics):
    plan = PLANS[name]
    velocity, noise, rollout = run_plan(plan, dynamics)
    expected = np.stack([[naive(plan, velocity, noise, dynamics, p, leaf) for leaf in plan.leaves] for p in range(2)])
    assert rollout.leaves.dtype == torch.float64
    np.testing.assert_allclose(rollout.leaves.numpy(), expected, rtol=1e-11, atol=1e-11)
    ends = {end for group in plan.transitions.values() for edge in group for end in (edge.parent, edge.child)}
    assert set(rollout.nodes) == ends
    for node, latents in rollout.nodes.items():
        expected = np.stack([naive(plan, velocity, noise, dynamics, p, node) for p in range(2)])
        np.testing.assert_allclose(latents.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PLANS)
def test_evaluates_each_distinct_latent_once(name):
    velocity, _, rollout = run_plan(PLANS[name])
    assert len(velocity.rows) == len(set(velocity.rows)) == rollout.num_evaluations
    assert rollout.num_evaluations == 2 * PLANS[name].num_evaluations


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batch_size_bounds_memory_and_changes_nothing(batch_size):
    plan = PLANS["branch, strides 1, 2, 3"]
    _, _, expected = run_plan(plan)
    velocity, _, rollout = run_plan(plan, batch_size=batch_size)
    assert velocity.largest <= batch_size
    assert rollout.num_evaluations == expected.num_evaluations
    torch.testing.assert_close(rollout.leaves, expected.leaves, rtol=1e-12, atol=1e-12)


def test_a_group_does_not_depend_on_the_other_prompts():
    plan = PLANS["dense, full"]
    velocity, noise, both = run_plan(plan)
    alone = execute(
        plan,
        lambda x, s, prompt: velocity(x, s, prompt + 1),
        torch.tensor(GRID, dtype=torch.float32),
        torch.from_numpy(noise[1:]),
        LEVELS,
    )
    torch.testing.assert_close(alone.leaves[0], both.leaves[1], rtol=1e-12, atol=1e-12)


def test_siblings_of_one_chain_differ_only_by_their_noise():
    plan = PLANS["chain, shared noise, window"]
    velocity = Velocity(1, 5)
    noise = np.random.default_rng(5).normal(size=(1, plan.num_draws, 5))
    noise[:, 1:] = noise[:, 1:2]  # the same draw for every stochastic step
    rollout = execute(plan, velocity, torch.tensor(GRID, dtype=torch.float32), torch.from_numpy(noise), LEVELS)
    for leaf in range(1, 3):
        torch.testing.assert_close(rollout.leaves[0, leaf], rollout.leaves[0, 0])


def test_what_does_not_fit_the_plan_is_refused():
    plan = PLANS["chain"]
    velocity, noise = Velocity(1, 5), torch.zeros(1, plan.num_draws, 5)
    sigmas = torch.tensor(GRID, dtype=torch.float32)
    with pytest.raises(ValueError, match="The plan has 6 steps, but there are 6 sigmas"):
        execute(plan, velocity, sigmas[1:], noise, LEVELS)
    with pytest.raises(ValueError, match="and 5 noise levels"):
        execute(plan, velocity, sigmas, noise, LEVELS[:5])
    with pytest.raises(ValueError, match=f"draws {plan.num_draws} noises per prompt, but `noise` holds 2"):
        execute(plan, velocity, sigmas, noise[:, :2], LEVELS)
    assert not velocity.rows


# ---- What is observed, and the scale of the first latents ----


def observing(plan: Plan) -> Plan:
    plan.observed = [plan.path(leaf) for leaf in plan.leaves]
    return plan


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(observing(chain_plan(T, 3, range(T - 1))), id="chain"),
        pytest.param(observing(chain_plan(T, 3, [2, 3], same_initial_noise=True)), id="shared noise"),
        pytest.param(observing(chain_plan(T, 3, [1], solver="dpm")), id="second order"),
    ],
)
def test_estimates_of_what_a_plan_observes(plan):
    velocity, noise, rollout = run_plan(plan, "cps")
    assert rollout.estimates.shape == (2, 3, T + 1, 5)
    assert rollout.num_evaluations == 2 * plan.num_evaluations
    for p, (member, nodes) in ((p, pair) for p in range(2) for pair in enumerate(plan.observed)):
        for i, node in enumerate(nodes):
            x = naive(plan, velocity, noise, "cps", p, node)
            expected = x - GRID[i] * velocity.at(x, GRID[i], p) if i < T else x
            np.testing.assert_allclose(rollout.estimates[p, member, i].numpy(), expected, rtol=1e-11, atol=1e-11)


def test_observation_changes_nothing_else():
    for make in (lambda: chain_plan(T, 3, [1, 3], solver="dpm"), lambda: chain_plan(T, 2, range(T))):
        plain, observed = run_plan(make())[2], run_plan(observing(make()))[2]
        assert plain.estimates is None
        assert torch.equal(plain.leaves, observed.leaves)
        assert set(plain.nodes) == set(observed.nodes)


def test_observed_leaves_are_their_own_estimates():
    plan = chain_plan(T, 3, [1])
    plan.observed = [[leaf] for leaf in plan.leaves]
    rollout = run_plan(plan)[2]
    assert torch.equal(rollout.estimates[:, :, 0], rollout.leaves)


def test_initial_scale_is_that_of_the_first_latents_alone():
    plan = dense_plan(T, 2, [0, 2], 2, solver="dpm")
    velocity, noise, rollout = run_plan(plan, initial_scale=1.5)
    starts = [node.draw for node in plan.nodes if node.parent is None]
    scaled = noise.copy()
    scaled[:, starts] *= 1.5
    expected = np.stack([[naive(plan, velocity, scaled, "flow", p, leaf) for leaf in plan.leaves] for p in range(2)])
    np.testing.assert_allclose(rollout.leaves.numpy(), expected, rtol=1e-11, atol=1e-11)


def test_samples_of_the_forward_process_are_kept():
    plan = forward_plan(T, 3, [1, 4])
    rollout = run_plan(plan)[2]
    assert sorted(rollout.nodes) == plan.leaves
    for position, leaf in enumerate(plan.leaves):
        assert torch.equal(rollout.nodes[leaf], rollout.leaves[:, position])


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_what_a_sweep_holds_does_not_grow_with_its_steps(solver):
    def held(num_steps):
        """Latents alive at the last evaluation."""
        counts = []

        def velocity(latents, sigma, prompt):
            if sigma <= sigmas[-2]:
                counts.append(sum(type(x) is torch.Tensor and x.shape == (1, 37) for x in gc.get_objects()))
            return -latents

        sigmas = torch.linspace(1, 0, num_steps + 1)
        plan = chain_plan(num_steps, 1, [0], solver=solver)
        execute(plan, velocity, sigmas, torch.randn(1, 2, 37), [0.7] * num_steps)
        return max(counts)

    assert held(4) == held(12) > 0


# ---- The cost, counted on a transformer ----


@pytest.fixture(scope="module")
def counted():
    """A policy over a real (tiny) pipeline, and the rows that its transformer was given."""
    policy = FlowPolicy(tiny_sd3(sample_size=2), guidance_scale=1.0, max_sequence_length=1)
    rows = []

    def count(module, args, kwargs):
        rows.append(len(kwargs["hidden_states"]))

    policy.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    return policy, rows


@pytest.mark.parametrize(
    "plan, rows_per_prompt, leaves",
    [
        pytest.param(chain_plan(10, 24, range(9)), 240, 24, id="Flow-GRPO"),
        pytest.param(dense_plan(10, 24, range(9)), 1320, 240, id="DenseGRPO, last step deterministic"),
        pytest.param(dense_plan(10, 24, range(10)), 1320, 264, id="DenseGRPO, last step stochastic"),
        pytest.param(dense_plan(10, 24, range(9), 1), 240, 240, id="DenseGRPO, n=1"),
        pytest.param(dense_plan(10, 24, range(9), 2), 456, 240, id="DenseGRPO, n=2"),
        pytest.param(branch_plan(16, 12, range(8), (1,)), 1112, 96, id="G2RPO, stride 1"),
        pytest.param(branch_plan(16, 12, range(8), (1, 2)), 1496, 192, id="G2RPO, strides 1 and 2"),
        pytest.param(branch_plan(16, 12, range(8), (1, 2, 3)), 1700, 288, id="G2RPO, strides 1, 2 and 3"),
        pytest.param(chain_plan(10, 24, [4, 5], True), 5 + 24 * 5, 24, id="late window from shared noise"),
        pytest.param(chain_plan(11, 12, range(4), solver="dpm"), 12 * 11, 12, id="MixGRPO-Flash"),
        pytest.param(branch_plan(10, 6, range(9)), 1116 // 4, 54, id="TempFlow-GRPO, one seed"),
        pytest.param(dense_plan(10, 24, range(9), 2, solver="dpm"), 456, 240, id="DenseGRPO, n=2, second order"),
        pytest.param(forward_plan(10, 24, [2, 5]), 240, 24, id="DiffusionNFT"),
    ],
)
def test_rows_that_the_transformer_evaluates(counted, plan, rows_per_prompt, leaves):
    policy, rows = counted
    prompts = ["a red circle", "two blue square"] if rows_per_prompt == 240 else ["a red circle"]
    conditioning = policy.conditioning(prompts)
    sigmas = policy.sigmas(plan.num_steps)
    noise = torch.randn(len(prompts), plan.num_draws, *policy.latent_shape)
    rows.clear()
    rollout = execute(
        plan,
        lambda x, sigma, prompt: policy(x, sigma, [conditioning[row] for row in prompt.tolist()]),
        sigmas,
        noise,
        [0.7] * plan.num_steps,
        batch_size=300,
    )
    assert sum(rows) == rollout.num_evaluations == len(prompts) * rows_per_prompt
    assert max(rows) <= 300
    assert rollout.leaves.shape == (len(prompts), leaves, *policy.latent_shape)
    assert rollout.leaves.isfinite().all()


# ---- Noise ----


def test_seeded_noise_is_a_function_of_its_key():
    def make(*key):
        return seeded_noise(*key, num_draws=3, latent_shape=(4, 4, 4))

    before = torch.get_rng_state()
    first = make(42, "train", 0, "a red circle", 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (3, 4, 4, 4) and first.dtype == torch.float32 and first.device.type == "cpu"
    torch.randn(7)
    assert torch.equal(first, make(42, "train", 0, "a red circle", 0))
    others = [
        make(43, "train", 0, "a red circle", 0),
        make(42, "eval", 0, "a red circle", 0),
        make(42, "train", 1, "a red circle", 0),
        make(42, "train", 0, "a red square", 0),
        make(42, "train", 0, "a red circle", 1),
        first.flip(0),
    ]
    for other in others:
        assert (other - first).abs().mean() > 0.5


def test_seeded_noise_is_standard_normal():
    noise = seeded_noise("key", num_draws=64, latent_shape=(16, 16, 4))
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02
