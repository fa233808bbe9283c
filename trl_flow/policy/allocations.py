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

"""Memory that is allocated: counted as torch's allocator does, also of models without weights."""

import functools
import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten
# Convolutions, with the place of their weights among what they are given.
CONVOLUTIONS = {aten.convolution: 1, aten.convolution_backward: 2}
PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)


def measured_peak(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """
    Most bytes that a call holds at a time, above what was there before, as torch's allocator counts them.

    Args:
        call (`Callable`): Does the work.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where memory is counted. On the CPU each
            allocation is noted by torch's profiler, which slows the work down; on an accelerator, it counts by itself.
    """
    device = torch.device(device)
    gc.collect()  # what is freed on the way must not have been there before
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        call()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, num_bytes in sorted(((event.start_ns(), event.nbytes()) for event in events), key=lambda event: event[0]):
        held += num_bytes
        peak = max(peak, held)
    return peak


def device_memory(device: torch.device) -> int | None:
    """Bytes that an accelerator has; `None` for the CPU, which shares them."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_device_properties(device).total_memory


class _Ledger(TorchDispatchMode):
    """Notes what is allocated and freed while it is active, and the most that was held. Tensors may be fake."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device_type = device.type
        self.held = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # numbers that are logged: a fake tensor has none
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            self._note(tensor, is_new=False)
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, is_new=True)
        self.reach(_workspace(func, inputs))
        return output

    def _note(self, tensor: torch.Tensor, is_new: bool):
        if type(tensor) not in PLAIN or tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            num_bytes = storage.nbytes() if is_new else 0
            self.held += num_bytes
            self._known[key] = weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int):
        del self._known[key]
        self.held -= num_bytes

    def reach(self, num_bytes: int):
        """Notes that so much more was held for a moment."""
        self.peak = max(self.peak, self.held + num_bytes)

    def close(self):
        for finalizer in self._known.values():
            finalizer.detach()


def _workspace(func, inputs: list[torch.Tensor]) -> int:
    """Bytes that a kernel holds while it runs: convolutions copy what they are given into a layout of their own."""
    if func.overloadpacket not in CONVOLUTIONS:
        return 0
    given, weight = inputs[0], inputs[CONVOLUTIONS[func.overloadpacket]]
    return num_bytes(given) + num_bytes(weight) if math.prod(weight.shape[2:]) > 1 else 0


@contextmanager
def ledger(device: torch.device) -> Iterator[_Ledger]:
    """Context whose allocations on a device are counted."""
    book = _Ledger(device)
    try:
        with book:
            yield book
    finally:
        book.close()


def num_bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor's elements; of quantised ones, that of what they are made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def module_bytes(module: nn.Module) -> int:
    """Memory of a model's weights and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    states = {id(state): state for t in tensors.values() if (state := getattr(t, "quant_state", None)) is not None}
    extra = [part for state in states.values() for part in vars(state).values() if isinstance(part, torch.Tensor)]
    return sum(num_bytes(tensor) for tensor in [*tensors.values(), *extra])


class _Dequantized(torch.autograd.Function):
    """A quantised layer: its weight is there in full while it is used, and again for its gradient."""

    @staticmethod
    def forward(ctx, rows, mode, shape, bias):
        ctx.mode, ctx.shape = mode, shape
        with mode:
            weight = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        return nn.functional.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        with ctx.mode:
            weight = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        return gradient @ weight, None, None, None


@contextmanager
def without_weights(models: list[nn.Module], dtype: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """
    Context in which models compute with shapes alone: their weights, and what is computed from them, hold nothing.

    Args:
        models (`list[nn.Module]`): The models. Weights that are fake already stay what they are.
        dtype (`torch.dtype`, *optional*): Precision of the frozen weights. Default: their own.

    Yields:
        The mode in which further tensors of this kind are made.
    """
    modes = [p.fake_mode for model in models for p in model.parameters() if isinstance(p, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, torch.Tensor] = {}
    replaced, layers = [], []

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        kind = tensor.dtype if dtype is None or tensor.requires_grad else dtype
        if isinstance(tensor, FakeTensor) and kind == tensor.dtype:
            return tensor
        if id(tensor) not in fakes:
            with mode:
                values = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=tensor.device)
                if isinstance(tensor, nn.Parameter):
                    values = nn.Parameter(values, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = values
        return fakes[id(tensor)]

    for model in models:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and type(weight) not in PLAIN:
                layers.append(module)
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    # Numbers of positions and the like are looked at; what is quantised is never touched.
                    if tensor is not None and tensor.is_floating_point() and type(tensor) in PLAIN:
                        replaced.append((table, name, tensor))
                        table[name] = fake(tensor)
    for layer in layers:
        shape = layer.out_features, layer.in_features
        layer.forward = functools.partial(
            lambda rows, shape, bias: _Dequantized.apply(rows, mode, shape, bias),
            shape=shape,
            bias=layer._parameters.get("bias"),
        )
    try:
        # Nobody waits for the compilation of what is not computed.
        with torch.compiler.set_stance("force_eager"):
            yield mode
    finally:
        for layer in layers:
            del layer.forward
        for table, name, tensor in replaced:
            table[name] = tensor
