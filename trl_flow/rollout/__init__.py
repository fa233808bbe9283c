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

"""Rollouts as trees over the sigma grid. Pure tensor code: no trainer, no files, no pipeline."""

from .dynamics import (
    DYNAMICS,
    coefficients,
    diffusion_coefficient,
    euler_step,
    log_prob,
    second_order_step,
    transition,
)
from .executor import Rollout, execute
from .noise import seeded_noise, seeded_subsets, to_device
from .plan import Plan, branch_plan, chain_plan, dense_plan, forward_plan, stride_waypoints, tail_waypoints
from .windows import SCHEDULES, window
