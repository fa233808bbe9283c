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

"""Keeps what the libraries say to their developers off the terminal of a user."""

import logging
import os
import warnings


def quieten(progress_bars: bool) -> None:
    """
    Silence deprecation warnings and advice that does not help here.

    Args:
        progress_bars (`bool`):
            Whether the libraries may show their bars for loading, which only a large model makes worthwhile.
    """
    if os.environ.get("TRL_FLOW_DEBUG"):
        return
    import datasets
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    # transformers recommends torchvision for image processors that no pipeline here uses.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "requires torchvision" not in record.getMessage()
    )
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not progress_bars:
        diffusers.utils.logging.disable_progress_bar()
