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
"""Threads that do not keep a process from ending."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from trl_flow.rewards.threads import DaemonExecutor


def test_calls_run_together_and_in_order():
    barrier = threading.Barrier(3, timeout=30)
    with DaemonExecutor(3) as executor:
        assert list(executor.map(lambda number: (barrier.wait(), number)[1], range(6))) == list(range(6))
    order = []
    with DaemonExecutor(1) as executor:
        for number in range(20):
            executor.submit(order.append, number)
    assert order == list(range(20))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(order.append, 20)


def test_errors_and_cancelled_calls():
    release = threading.Event()
    executor = DaemonExecutor(1)
    failing = executor.submit(lambda: 1 / 0)
    running, waiting = executor.submit(release.wait, 30), executor.submit(release.wait, 30)
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    while not running.running():
        time.sleep(0.001)
    executor.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    release.set()
    assert running.result(30)


def test_a_process_ends_while_a_call_waits():
    code = """
        import time
        from trl_flow.rewards.threads import DaemonExecutor
        DaemonExecutor(2).submit(time.sleep, 600)
        time.sleep(0.1)
        raise KeyboardInterrupt
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in result.stderr
