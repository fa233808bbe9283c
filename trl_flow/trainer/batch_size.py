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

"""How many rows a forward takes: what was set, or what memory there is for."""

import gc
import logging
import os
import traceback
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from ..policy.allocations import ledger, measured_peak


T = TypeVar("T")
AUTO = "auto"
# Larger batches are no faster.
MOST_ROWS = 1024
# Of the free memory; the rest is for what a measurement of two rows does not see, as holes between what is kept.
USED_SHARE = 0.9

TRAINING_HELP = (
    "activation_checkpointing, precompute_prompts, dtype=bfloat16, quantization, or a smaller height and width"
)

# Beside what torch and accelerate know as such: of libraries that allocate by themselves.
NO_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")

logger = logging.getLogger(__name__)


class BatchSize:
    """
    The largest number of rows of one kind of forward. Where memory does not suffice, it falls.

    Args:
        what (`str`): What the forward is for, as it begins a sentence.
        name (`str`): The setting.
        setting (`int` or `"auto"`): Its value.
        helps (`str`, *optional*): What makes a single row fit.

    Attributes:
        rows (`int`, *optional*): Rows of a forward; `None` until [`BatchSize.find`] has found them.
        shared (`bool`): Whether other processes take part in each forward: then nothing can be tried again.
    """

    def __init__(self, what: str, name: str, setting: int | str, helps: str = TRAINING_HELP):
        self.what, self.name, self.setting, self.helps = what, name, setting, helps
        self.rows = None if setting == AUTO else setting
        self.shared = False
        self._failed: int | None = None

    def find(self, call: Callable[[int], object], device: torch.device, reserved: int = 0):
        """
        Finds how many rows fit, if the setting is `"auto"` and it is not known yet: from what one and two rows take, on a
        straight line.

        Args:
            call (`Callable`): Does the work with n rows, and undoes what it leaves.
            device (`torch.device`): Where the memory is.
            reserved (`int`, *optional*, defaults to 0): Bytes of the free memory that something else will take.
        """
        if self.rows is not None:
            return
        try:
            call(1)  # what is done once only: kernels are chosen, workspaces are made
            one = peak_memory(lambda: call(1), device)
        except Exception as error:
            self.lower(error, 1)
        self.rows = 1
        try:
            two = peak_memory(lambda: call(2), device)
        except Exception as error:
            self.lower(error, 2)
        else:
            self.rows = rows_that_fit(one, two, free_memory(device) - reserved)
        self._failed = None
        logger.info(f"{self.name}={AUTO}: {self.what.lower()} takes {self.rows} rows at a time.")

    def in_parts(self, call: Callable[[slice], T], count: int) -> list[T]:
        """Results of `call(part)` for `count` rows, part by part. A part that does not fit is done again in halves."""
        results, start = [], 0
        while start < count:
            stop = min(start + self.rows, count)
            try:
                results.append(call(slice(start, stop)))
                start = stop
            except Exception as error:
                self.lower(error, stop - start)
                continue
            self.succeeded()
        return results

    def retried(self, call: Callable[[int], T], count: int, undo: Callable[[], object] = lambda: None) -> T:
        """Result of `call(rows)`, which does `count` rows, so many at a time. If they do not fit, all is undone and done again."""
        while True:
            rows = min(self.rows, count)
            try:
                result = call(rows)
            except Exception as error:
                self.lower(error, rows)
                undo()
                continue
            self.succeeded()
            return result

    def lower(self, error: Exception, rows: int):
        """
        To half of the rows that did not fit, with as much memory free as before them. Any other error is raised again.

        Args:
            error (`Exception`): What is being handled.
            rows (`int`): Rows of the forward that raised it.

        Raises:
            torch.OutOfMemoryError: If there was a single row, or other processes have taken part in the forward.
        """
        if not is_out_of_memory(error):
            raise error
        release_memory(error)
        if self.shared and rows > 1:
            raise torch.OutOfMemoryError(
                f"{self.what} ran out of memory with {rows} rows at a time. It cannot be tried again with less, as all "
                f"processes take part in it: set {self.name}={rows // 2} and go on from the last checkpoint. It was: {error}"
            ) from error
        if rows == 1:
            raise torch.OutOfMemoryError(
                f"{self.what} ran out of memory with a single row. What helps: {self.helps}. It was: {error}"
            ) from error
        self.rows, self._failed = rows // 2, self._failed or rows

    def succeeded(self):
        """Says, after a forward that fits, to what the rows have fallen before it."""
        if self._failed is not None:
            logger.warning(
                f"{self.what} ran out of memory with {self._failed} rows at a time, and goes on with {self.rows}: nothing is "
                f"lost but time. {self.name}={self.rows} begins with as many."
            )
            self._failed = None

    def state(self) -> list:
        """The setting, and the rows that have come of it: for a run that goes on with the same rounding."""
        return [self.setting, self.rows]

    def load(self, state: list):
        """Takes back what [`BatchSize.state`] gave, unless the setting is another one now."""
        setting, rows = state
        if setting == self.setting:
            self.rows = rows


def parse_batch_size(name: str, value: int | str) -> int | str:
    """A number of rows or `"auto"`, from what YAML, the command line or Python gave for the setting `name`."""
    if value == AUTO:
        return AUTO
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a number of rows, at least 1, or {AUTO!r}.")
    return value


def rows_that_fit(one: int, two: int, free: int) -> int:
    """Rows that fit into `free` bytes, if one row takes `one` and two take `two`: at least 1."""
    each = two - one
    room = USED_SHARE * free - (one - each)
    return MOST_ROWS if each <= 0 else int(min(max(room / each, 1), MOST_ROWS))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory did not suffice."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or should_reduce_batch_size(error)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY))
        or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
    )


def release_memory(error: BaseException | None):
    """Frees what the frames that an error has left hold, and what torch keeps for later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still allocate on a device. Processes of one machine share its main memory evenly."""
    if device.type in ("cpu", "mps"):
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min([free, *_below_limit()])
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def _below_limit() -> list[int]:
    """Bytes between what this process has and the limit that the system has been told, if it has."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors on a device during a call, beside those that were there before."""
    if device.type not in ("cpu", "mps"):
        return measured_peak(call, device)
    with ledger(device) as book:
        call()
    return book.peak
