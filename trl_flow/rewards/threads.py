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
"""Threads that do not keep a process from ending, for rewards that may wait for minutes."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future


class DaemonExecutor(Executor):
    """
    A [`~concurrent.futures.ThreadPoolExecutor`] whose threads are not waited for when the interpreter ends: Ctrl-C ends a
    run also while a reward waits for its server. Each thread begins with the first calls.

    Args:
        max_workers (`int`): Number of threads.
    """

    def __init__(self, max_workers: int):
        self._max_workers = max_workers
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, function: Callable, /, *args, **kwargs) -> Future:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = Future()
        self._calls.put((future, function, args, kwargs))
        if len(self._threads) < self._max_workers:
            self._threads.append(threading.Thread(target=self._work, name="reward", daemon=True))
            self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False):
        self._closed = True
        while cancel_futures:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self):
        while (call := self._calls.get()) is not None:
            future, function, args, kwargs = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # as in the standard library: what waits for the result gets it
                future.set_exception(error)
            # The next call may be long in coming: what this one held is not to wait for it.
            del call, future, function, args, kwargs
