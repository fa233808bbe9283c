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

import math
import random
from collections import Counter

import pytest

from trl_flow.rollout import SCHEDULES, window


# ---- Random ----


def test_random_window_is_a_function_of_its_arguments():
    state = random.getstate()
    first = [window("random", rollout, 3, 0, 20, seed=7) for rollout in range(50)]
    assert random.getstate() == state
    random.seed(123)
    assert first == [window("random", rollout, 3, 0, 20, seed=7) for rollout in range(50)]
    others = [window("random", rollout, 3, 0, 20, seed=8) for rollout in range(50)]
    assert sum(a == b for a, b in zip(first, others, strict=True)) < 15  # by chance one in 18
    assert len({tuple(steps) for steps in first}) > 10


@pytest.mark.parametrize("size, first, end", [(3, 0, 5), (2, 1, 9), (1, 4, 14)])
def test_random_window_is_anywhere_with_equal_chances(size, first, end):
    rollouts = 4000
    windows = [window("random", rollout, size, first, end) for rollout in range(rollouts)]
    assert all(steps == list(range(steps[0], steps[0] + size)) for steps in windows)
    counts = Counter(steps[0] for steps in windows)
    positions = range(first, end - size + 1)
    assert set(counts) == set(positions)
    chance = 1 / len(positions)
    deviation = math.sqrt(rollouts * chance * (1 - chance))
    assert all(abs(count - rollouts * chance) < 5 * deviation for count in counts.values())


# ---- Progressive, decay ----


def test_progressive_window_stays_25_rollouts_and_begins_anew():
    # MixGRPO: T = 25, four steps, up to step 22: positions 0 to 19.
    for rollout in range(1100):
        position = rollout // 25 % 20
        assert window("progressive", rollout, 4, 0, 23) == list(range(position, position + 4))


def test_progressive_window_of_other_strides_and_intervals():
    starts = [window("progressive", rollout, 2, 1, 9, interval=2, stride=3)[0] for rollout in range(14)]
    assert starts == [1, 1, 4, 4, 7, 7, 1, 1, 4, 4, 7, 7, 1, 1]
    # The stride would pass the last position that fits: the one before it is the last.
    starts = [window("progressive", rollout, 2, 0, 9, interval=1, stride=4)[0] for rollout in range(4)]
    assert starts == [0, 4, 0, 4]


@pytest.mark.parametrize(
    "num_steps, size, first, end, interval, stride", [(25, 4, 0, 23, 25, 1), (10, 3, 1, 10, 7, 2), (9, 1, 0, 9, 1, 1)]
)
def test_decay_shortens_the_second_half(num_steps, size, first, end, interval, stride):
    expected = []
    for position in range(first, end, stride):
        if position + size <= end:
            rollouts = math.ceil(interval * math.exp(-0.1 * max(0, position - math.ceil(num_steps / 2))))
            expected += [list(range(position, position + size))] * rollouts
    expected = 2 * expected
    drawn = [
        window("decay", rollout, size, first, end, interval, stride, num_steps) for rollout in range(len(expected))
    ]
    assert drawn == expected


def test_decay_of_the_published_settings():
    starts = Counter(window("decay", rollout, 4, 0, 23, num_steps=25)[0] for rollout in range(14 * 25 + 23 + 21))
    # 25 exp(-0.1) = 22.6, 25 exp(-0.2) = 20.5: the first shorter ones are 14 and 15.
    assert starts == {**dict.fromkeys(range(14), 25), 14: 23, 15: 21}


def test_decay_takes_the_ranges_end_for_the_grids():
    assert [window("decay", rollout, 2, 0, 12, interval=5) for rollout in range(120)] == [
        window("decay", rollout, 2, 0, 12, interval=5, num_steps=12) for rollout in range(120)
    ]


# ---- Frozen, backward ----


def test_frozen_window_stays():
    assert all(window("frozen", rollout, 4, 2, 9) == [2, 3, 4, 5] for rollout in (0, 1, 24, 25, 1000))


def test_backward_window_grows_towards_the_noise():
    grown = [window("backward", rollout, 2, 1, 8, interval=3, stride=2) for rollout in range(0, 12)]
    assert grown[:3] == 3 * [[6, 7]]
    assert grown[3:6] == 3 * [[4, 5, 6, 7]]
    assert grown[6:9] == 3 * [[2, 3, 4, 5, 6, 7]]
    assert grown[9:] == 3 * [[1, 2, 3, 4, 5, 6, 7]]
    assert window("backward", 10**6, 2, 1, 8, interval=3, stride=2) == [1, 2, 3, 4, 5, 6, 7]


# ---- All ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_window_of_the_whole_range_is_the_range(schedule):
    assert all(window(schedule, rollout, 5, 2, 7) == [2, 3, 4, 5, 6] for rollout in (0, 30, 77))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size, first, end", [(0, 0, 5), (6, 0, 5), (4, 2, 5), (-1, 0, 5)])
def test_a_window_that_does_not_fit(schedule, size, first, end):
    with pytest.raises(
        ValueError, match=f"A window of {size} steps does not fit into the range from {first} to {end}"
    ):
        window(schedule, 0, size, first, end)


def test_unknown_schedule_lists_the_known_ones():
    known = "'random', 'progressive', 'decay', 'frozen', 'backward'"
    with pytest.raises(ValueError, match=f"schedule='cosine' is unknown: expected one of {known}"):
        window("cosine", 0, 2, 0, 5)
