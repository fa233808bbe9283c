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

"""Settings for every test: one thread, no network, no telemetry, the same seed."""

import os


# Before anything imports the libraries that read them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
os.environ["MPLBACKEND"] = "Agg"

import logging  # noqa: E402
import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


# With the models of these tests, threads on a busy machine cost far more than they bring.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for each test, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loudness():
    """Programs that a test runs may turn libraries' messages off, and with them progress bars, for themselves alone."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels, disabled = [logger.level for logger in loggers], logging.root.manager.disable
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    logging.disable(disabled)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # Each encodes pictures with a language model: seconds a test, and of one architecture with QwenImageEditPlusPipeline.
    for item in items:
        if "QwenImageEditPipeline" in item.name or "QwenImageEditPlusPipeline/2511" in item.name:
            item.add_marker(pytest.mark.slow)
