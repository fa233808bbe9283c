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

"""What a run has done, as pictures and one page."""

from .calibration import plot_calibration
from .grid import image_grid
from .history import RunHistory, load_history
from .page import write_report
from .plan import PlanPicture
from .progress import ProgressLine


__all__ = [
    "PlanPicture",
    "ProgressLine",
    "RunHistory",
    "image_grid",
    "load_history",
    "plot_calibration",
    "write_report",
]
