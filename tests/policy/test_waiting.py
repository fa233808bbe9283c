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
A sweep never makes the host wait for the device: no number is read from it, and none is copied to it.

The device is `meta`, which takes every operation and has no numbers: whatever would wait for one fails. What comes from the
CPU, which on a GPU waits too, is noticed.
"""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from pipelines import tiny_sd, tiny_sd3
from test_families import make_policy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from trl_flow import FlowPolicy
from trl_flow.rollout import Plan, execute, to_device


class RefuseTables(TorchFunctionMode):
    """Fails where Python's numbers become a tensor of the device: on a GPU that is a copy, though no operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise RuntimeError(f"{function.__name__} copies numbers to the device.")
        return function(*args, **kwargs)


class RefuseCopies(TorchDispatchMode):
    """Fails where tensors of the CPU and of `meta` meet. A single number may: it goes along as an argument of a kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        everything = given + [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        moves = function.overloadpacket.__name__ in ("_to_copy", "copy_", "index")
        if any(value.is_meta for value in everything) and any(
            not value.is_meta and (value.ndim or moves) for value in given
        ):
            raise RuntimeError(f"{function} takes a tensor of the CPU to the device.")
        return result


@contextmanager
def no_waiting():
    with RefuseTables(), RefuseCopies():
        yield


def to_meta(value):
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, value)


def tree(num_steps):
    """Every kind of edge: stochastic ones, Euler steps, steps over two indices, and those of second order."""
    plan = Plan(num_steps)
    root = plan.start()
    for _ in range(2):
        child = plan.stochastic(root)
        plan.stochastic(plan.stochastic(child))
        plan.tail(child, range(2, num_steps + 1))
        plan.tail(child, [3, num_steps])
        plan.tail(child, range(2, num_steps + 1), solver="dpm")
    return plan


def sweep(policy, image=None, device="meta"):
    conditioning = [policy.encode(prompt, image) for prompt in ("a red circle", "two blue square")]
    sigmas = policy.sigmas(4)
    plan = tree(4)
    noise = torch.zeros(2, plan.num_draws, *policy.latent_shape, device=device)
    if device == "meta":
        conditioning = [dataclasses.replace(one, answers=to_meta(one.answers)) for one in conditioning]
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device)

    def run():
        return execute(
            plan,
            lambda rows, sigma, prompt: policy(rows, sigma, [conditioning[number] for number in prompt.tolist()]),
            sigmas,
            noise,
            [0.7] * 4,
            batch_size=5,
            initial_scale=policy.initial_scale(sigmas),
        )

    return run


def policy_of(pipeline):
    return FlowPolicy(pipeline, LoraConfig(r=2, target_modules=None), max_sequence_length=None, guidance_scale=4.5)


@pytest.mark.parametrize("make", [tiny_sd3, pytest.param(tiny_sd, marks=pytest.mark.slow)])
def test_a_sweep_reads_nothing_from_the_device_and_copies_nothing_to_it(make):
    run = sweep(policy_of(make()))
    with no_waiting():
        rollout = run()
    assert rollout.leaves.is_meta and rollout.leaves.shape[:2] == (2, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "FluxPipeline",
        "FluxKontextPipeline",
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "SanaPipeline",
        "WanPipeline",
        "LTXPipeline",
    ],
)
def test_nor_do_these_pipelines(name):
    """Not so with others, whose own code waits: docs/scaling.md names them."""
    run = sweep(*make_policy(name))
    with no_waiting():
        assert run().leaves.is_meta


@pytest.mark.parametrize("make", [tiny_sd3, pytest.param(tiny_sd, marks=pytest.mark.slow)])
def test_nor_does_decoding(make, monkeypatch):
    """Until pictures are copied to the CPU, which on a GPU is queued, and waited for once."""
    policy = policy_of(make())
    conditioning = [policy.encode("a red circle")] * 5
    expected = policy.decode(torch.zeros(5, *policy.latent_shape), conditioning=conditioning)
    conditioning = [dataclasses.replace(one, answers=to_meta(one.answers)) for one in conditioning]
    sweep(policy)  # moves its models
    copied, to = [], torch.Tensor.to

    def queued(tensor, *args, **kwargs):
        if args[:1] != ("cpu",):
            return to(tensor, *args, **kwargs)
        copied.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", queued)
    # Its grid is made, and would be made again for this device alone.
    monkeypatch.setattr(policy._idle.scheduler, "set_timesteps", lambda num_inference_steps, device: None)
    latents = torch.zeros(5, *policy.latent_shape, device="meta")
    with no_waiting():
        pictures = policy.start_decoding(latents, 2, conditioning)()
    assert pictures.is_meta and pictures.shape == expected.shape
    assert [len(batch) for batch in copied] == [2, 2, 1]


def test_prompts_of_different_lengths(monkeypatch):
    """Rows that cannot share a call are picked and put back without indices on the device."""
    policy = policy_of(tiny_sd3())
    monkeypatch.setattr(policy, "_batches", lambda conditioning: [[*range(1, len(conditioning))], [0]])
    run = sweep(policy)
    with no_waiting():
        assert run().leaves.is_meta


def test_waiting_is_noticed():
    values, indices = torch.zeros(3, device="meta"), torch.tensor([0, 2])
    with no_waiting():
        with pytest.raises(RuntimeError, match="meta"):
            (values + 1).sum().item()
        for wait in (
            lambda: values.tolist(),
            lambda: values.cpu(),
            lambda: values[values > 0],
            lambda: values[indices],
            lambda: values + torch.zeros(3),
            lambda: torch.tensor([1.0], device="meta"),
            lambda: torch.zeros(3).to("meta"),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
        assert (values * torch.tensor(2.0)).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize("make", [tiny_sd3, tiny_sd])
def test_a_sweep_on_a_gpu_never_waits(make):
    run = sweep(policy_of(make()), device="cuda")
    expected = run()  # the first call of a kernel may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rollout = run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(rollout.leaves, expected.leaves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_transfers_by_way_of_pinned_memory():
    values = torch.randn(1000, 1000)
    with_sync = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(values, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode(with_sync)
    assert torch.equal(moved.cpu(), values)
    policy = policy_of(tiny_sd3())
    latents = torch.randn(5, *policy.latent_shape)
    expected = policy.decode(latents, batch_size=2)
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to("cuda")
    torch.testing.assert_close(policy.decode(latents.cuda(), batch_size=2), expected, rtol=1e-2, atol=1e-2)
