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


"""Windows of stochastic steps that move from rollout to rollout."""

import bisect
import itertools
import math
import random


SCHEDULES = ("random", "progressive", "decay", "frozen", "backward")
DECAY_RATE = 0.1


def window(
    schedule: str,
    rollout: int,
    size: int,
    first: int,
    end: int,
    interval: int = 25,
    stride: int = 1,
    num_steps: int | None = None,
    seed: int = 0,
) -> list[int]:
    """
    Grid indices of the window of one rollout, as a function of the arguments alone.

    - `"random"` (Flow-GRPO-Fast): anywhere in the range, with equal chances.
    - `"progressive"` (MixGRPO): from the beginning of the range, `stride` steps on after every `interval` rollouts; after
      the last position, from the beginning again.
    - `"decay"` (MixGRPO's exponential decay): progressive, but a position l in the second half of the grid lasts for
      ceil(interval * exp(-0.1 (l - ceil(T / 2)))) rollouts only; the published constants for T = 25.
    - `"frozen"` (MixGRPO-Flash*): at the beginning of the range.
    - `"backward"` (B2-DiffuRL): the last `size` steps of the range, and `stride` more towards the noise after every
      `interval` rollouts, up to the whole range.

    Args:
        schedule (`str`): One of these.
        rollout (`int`): Number of rollouts before this one.
        size (`int`): Steps of a window.
        first, end (`int`): The range: steps `first` to `end - 1`.
        interval (`int`): Rollouts per position.
        stride (`int`): Steps between positions.
        num_steps (`int`, *optional*): T, for `"decay"`. Defaults to `end`.
        seed (`int`): For `"random"`.

    Raises:
        ValueError: If the window does not fit into its range, or the schedule is unknown.
    """
    if not 1 <= size <= end - first:
        raise ValueError(f"A window of {size} steps does not fit into the range from {first} to {end}.")
    if schedule == "random":
        start = random.Random(f"window|{seed}|{rollout}").randint(first, end - size)
    elif schedule == "frozen":
        start = first
    elif schedule == "backward":
        return list(range(max(first, end - size - rollout // interval * stride), end))
    elif schedule in ("progressive", "decay"):
        middle = math.ceil((end if num_steps is None else num_steps) / 2)
        positions = range(first, end - size + 1, stride)
        lasts = [
            math.ceil(interval * math.exp(-DECAY_RATE * max(0, start - middle))) if schedule == "decay" else interval
            for start in positions
        ]
        ends = list(itertools.accumulate(lasts))
        start = positions[bisect.bisect(ends, rollout % ends[-1])]
    else:
        raise ValueError(f"schedule={schedule!r} is unknown: expected one of {', '.join(map(repr, SCHEDULES))}.")
    return list(range(start, start + size))
