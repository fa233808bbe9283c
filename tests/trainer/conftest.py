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

"""Trainers of a tiny pipeline, with settings under which an update takes a fraction of a second."""

import gc

import pytest
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer


SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "num_inference_steps": 4,
    "num_eval_inference_steps": 3,
    "num_generations": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": 2,
    "beta": 0.0,
    "ema_decay": 0,
}


@pytest.fixture(scope="session", autouse=True)
def frozen_heap():
    """
    Each run collects garbage once, at its end. Over all that the imports have left behind, that takes several times as
    long as the run itself.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report has tests of its own."""
    monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(TrainerClass, ConfigClass, **settings)`; other arguments of the trainer by their names."""

    def make(trainer_class=FlowGRPOTrainer, config_class=None, **kwargs):
        arguments = {
            "model": None,
            "reward_funcs": brightness,
            "train_dataset": prompts(6),
            "peft_config": LoraConfig(r=2, lora_alpha=6, target_modules=None),
        }
        for name in ("eval_dataset", "eval_reward_funcs", "callbacks", *arguments):
            if name in kwargs:
                arguments[name] = kwargs.pop(name)
        if arguments["model"] is None:
            arguments["model"] = tiny_sd3()
        kwargs = {"output_dir": str(tmp_path / "run"), **SETTINGS, **kwargs}
        config_class = config_class or FlowGRPOConfig
        return trainer_class(args=config_class(**kwargs), **arguments)

    make.directory = tmp_path
    return make
