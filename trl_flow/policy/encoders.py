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

"""What a pipeline encodes, denoises and decodes with, and its leave from the device while it is not needed."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from .conditioning import find_signature


def encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """
    The text and picture encoders of a pipeline. By diffusers' custom they are transformers' models, and everything that
    a pipeline runs afterwards (denoisers, decoders, connectors, vocoders) is diffusers' own.
    """
    return {name: model for name, model in pipeline.components.items() if isinstance(model, PreTrainedModel)}


def can_move(model: nn.Module) -> bool:
    """8-bit weights of bitsandbytes are where they were loaded, and cannot be moved."""
    return not getattr(model, "is_loaded_in_8bit", False)


def move(models: Iterable[nn.Module], device: torch.device | str):
    """Moves those that can be moved."""
    for model in filter(can_move, models):
        model.to(device)


@contextmanager
def before_running(model: nn.Module, call: Callable[[], object]) -> Iterator[None]:
    """Context in which `call` precedes each forward pass of a model and of its parts."""

    def hook(*_):
        call()

    handles = [module.register_forward_pre_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Memory:
    """
    What frozen models have made of the last two inputs that each was given. With guidance, a pipeline encodes its negative prompt
    again beside every prompt.

    Args:
        models (`dict[str, torch.nn.Module]`): By their names in the pipeline.
    """

    def __init__(self, models: dict[str, nn.Module]):
        self.models = models
        self._outputs: dict[str, OrderedDict] = {name: OrderedDict() for name in models}

    def forget(self):
        for outputs in self._outputs.values():
            outputs.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context in which models do not run on inputs that are remembered."""
        with ExitStack() as stack:
            for name, model in self.models.items():
                own = vars(model).get("forward")  # of a hook that moves or counts
                restore = (delattr, model, "forward") if own is None else (setattr, model, "forward", own)
                stack.callback(*restore)
                model.forward = self._remembering(model.forward, self._outputs[name])
            yield

    def _remembering(self, forward: Callable, outputs: OrderedDict) -> Callable:
        @functools.wraps(forward)
        def remember(*args, **kwargs):
            key = _input_key(args, kwargs)
            if key is None:
                return forward(*args, **kwargs)
            output = outputs.pop(key) if key in outputs else forward(*args, **kwargs)
            # A copy: the caller may write into what it is given.
            outputs[key] = copy.deepcopy(output)
            while len(outputs) > 2:
                outputs.popitem(last=False)
            return output

        return remember


def _input_key(args: tuple, kwargs: dict) -> tuple | None:
    """The content of a model's inputs; `None` where one may change between calls, as a cache of keys and values does."""
    values = [*args, *kwargs, *kwargs.values()]
    if not all(value is None or isinstance(value, (torch.Tensor, bool, int, float, str)) for value in values):
        return None
    return len(args), *((find_signature(v, None), v.dtype, v.device) if torch.is_tensor(v) else v for v in values)


class Hosts:
    """
    Models that leave the device to [`Visitors`], where there is no room for both.

    Args:
        models (`list[torch.nn.Module]`): The models.
        device (`torch.device` or `str`, *optional*): Where they compute when they are elsewhere, until they first [`come`].
            Default: they are there.
    """

    def __init__(self, models: list[nn.Module], device: torch.device | str | None = None):
        self.models = models
        self._left = None if device is None else torch.empty(0, device=device).device

    @property
    def away(self) -> bool:
        return self._left is not None

    @property
    def device(self) -> torch.device:
        """Where they compute: also while they are elsewhere."""
        return next(self.models[0].parameters()).device if self._left is None else self._left

    def leave(self, home: torch.device | str):
        if not self.away:
            self._left = self.device
            move(self.models, home)

    def come(self):
        if self.away:
            move(self.models, self._left)
            self._left = None


class Visitors:
    """
    Frozen models that are on the device only while they are needed, once they have been told to [`leave`].

    Args:
        models (`dict[str, torch.nn.Module]`): By their names in the pipeline.
    """

    def __init__(self, models: dict[str, nn.Module]):
        self.models = {name: model for name, model in models.items() if can_move(model)}
        self.memory = Memory(models)
        self.home: torch.device | str | None = None
        # Those that are where these are not.
        self.hosts: Hosts | None = None
        self._here = True
        self._visits = 0

    def spare(self, call: Callable[[], object]):
        """Models that `call` runs will not leave: a few pipelines encode in methods that no one can answer for."""
        used = set()
        with ExitStack() as stack:
            for name, model in self.models.items():
                stack.enter_context(before_running(model, functools.partial(used.add, name)))
            call()
        self.models = {name: model for name, model in self.models.items() if name not in used}

    def leave(self, home: torch.device | str):
        """Moves the models to `home`, where they wait for the next [`come`]. Their hosts come back."""
        self.home, self._here = home, False
        self.memory.forget()
        move(self.models.values(), home)
        if self.hosts is not None:
            self.hosts.come()

    def come(self, device: torch.device):
        """Moves models that have left to `device`, where they stay to the end of the [`visit`]. Their hosts leave."""
        if not self._here:
            self._here = True  # in part, even if there is no room for all of them
            if self.hosts is not None:
                self.hosts.leave(self.home)
            move(self.models.values(), device)

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Context at whose end models that had left, and came, leave again. Of one within another, it is the outer's end."""
        self._visits += 1
        try:
            yield
        finally:
            self._visits -= 1
            if not self._visits:
                self.end()

    def end(self):
        """Models that had left, and came, leave again."""
        if self.home is not None and self._here:
            self.leave(self.home)


def compute_beside(pipeline: DiffusionPipeline, hosts: Hosts):
    """
    Makes a pipeline compute where its denoisers do. By itself it computes where the first of its components is that is on
    an accelerator, or simply the first: with encoders elsewhere, that may be the wrong place.
    """
    device = property(lambda self: hosts.device)
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (kind,), {"device": device, "_execution_device": device})


def keep_dtype(model: nn.Module, dtype: torch.dtype):
    """
    Makes a model go on to say that it computes in a precision, to which its pipeline casts what it is given. By itself it
    names that of its first floating-point weight, which in 4-bit models without biases may be an adapter's float32.
    """
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"dtype": dtype, "__module__": kind.__module__})


def remember_device(pipeline: DiffusionPipeline, component: str, hosts: Hosts):
    """
    Makes a pipeline look only once where it computes, for each device that one of its components is on. By itself it goes through
    all modules of all components in every call, which takes milliseconds. While its denoisers are elsewhere, it is where
    they will be.
    """
    kind, known = type(pipeline), {}

    def execution_device(self):
        if hosts.away:
            return hosts.device
        model = getattr(self, component)
        place = next(model.parameters()).device, hasattr(model, "_hf_hook"), hasattr(model, "_diffusers_hook")
        if place not in known:
            known[place] = kind._execution_device.fget(self)
        return known[place]

    pipeline.__class__ = type(kind.__name__, (kind,), {"_execution_device": property(execution_device)})
