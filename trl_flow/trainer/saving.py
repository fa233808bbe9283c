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

"""What a run leaves on disk and finds there again: adapter, card, checkpoint state."""

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..hub import create_model_card, load_policy, save_policy, supports_diffusers_format


RUN_FILE = "run.json"


def check_output_dir(output_dir: str):
    """Refuses a directory that holds a run: a new one would mix its files with the old one's."""
    file = Path(output_dir) / RUN_FILE
    if file.is_file():
        raise ValueError(
            f"output_dir={output_dir} holds another run ({json.loads(file.read_text())['method']}). Choose another "
            "directory, or go on with that run: resume_from_checkpoint=True."
        )


def _describe(rewards: dict[str, dict[str, str]]) -> str:
    texts = (", ".join(f"{key} {value}" for key, value in source.items()) for source in rewards.values())
    return ", ".join(f"{name!r} ({text})" if text else repr(name) for name, text in zip(rewards, texts, strict=True))


class SavingMixin:
    """The part of the trainer that saves and resumes."""

    def last_evaluation(self) -> int | None:
        return next((entry["step"] for entry in reversed(self.state.log_history) if "eval_reward" in entry), None)

    def check_checkpoint(self, checkpoint: str):
        """Refuses a checkpoint that is not one of this method."""
        state = Path(checkpoint) / f"rollout_state_{self.args.process_index}.pt"
        if not state.is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no {state.name}, so it is not a checkpoint of this "
                "library, or was made with fewer processes or with save_only_model=True."
            )
        method = torch.load(state, weights_only=True, map_location="cpu")["method"]
        if method != self._name:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint} is a checkpoint of {method}, but this trainer is "
                f"{self._name}. Resume it with its own trainer."
            )

    def check_reward_sources(self, checkpoint: str):
        """Refuses trained rewards that are others, or of other revisions, than those of the checkpoint."""
        before, now = self._rollout_state(checkpoint).get("trained_rewards"), self._trained_rewards()
        if before is not None and before != now:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it was trained on {_describe(before)}, and this run is to be on "
                f"{_describe(now)}. Name the rewards and revisions that it began with ('user/repo@commit', or the setting "
                "`revision`). To go on with other rewards, begin a run with adapter_name_or_path=<the checkpoint>."
            )

    def _trained_rewards(self) -> dict[str, dict[str, str]]:
        """What each trained reward is, wherever it is."""
        places = ("directory", "server", "endpoint")
        sources = self.reward_sources
        return {
            name: {key: value for key, value in sources.get(name, {}).items() if key not in places}
            for name in self.reward_names
        }

    @property
    def reward_sources(self) -> dict[str, dict[str, str]]:
        """Where each reward comes from that is more than a name: a repository and its commit, a model, an endpoint."""
        functions = zip(
            self.reward_names + self.eval_reward_names, self.reward_funcs + self.eval_reward_funcs, strict=True
        )
        sources = {name: getattr(function, "source", None) for name, function in functions}
        return {
            name: {key: str(value) for key, value in source.items()}
            for name, source in sources.items()
            if isinstance(source, Mapping) and source
        }

    def write_run_file(self):
        """Marks `output_dir` as taken by this run."""
        if self.is_world_process_zero():
            run = {
                "method": self._name,
                "base_model": self.base_model,
                "rewards": self.reward_names,
                "eval_rewards": self.eval_reward_names,
                "reward_sources": self.reward_sources,
            }
            file = Path(self.args.output_dir) / RUN_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run, indent=2) + "\n")

    @contextmanager
    def averaged_weights(self):
        """The policy with the moving average of its weights, where one is kept."""
        if self._ema is None or self._ema.optimization_step == 0:
            yield
            return
        parameters = self._trainable
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        # A checkpoint keeps the weights that training goes on from; anything else that is saved is what was evaluated.
        with nullcontext() if self._saving_checkpoint else self.averaged_weights():
            if not self._saving_checkpoint:
                self.create_model_card()
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        save_policy(self.policy, output_dir, self.base_model or None, state_dict)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if os.path.isdir(folder) and not self.args.save_only_model:
            state = {
                "method": self._name,
                "trained_rewards": self._trained_rewards(),
                "step": self._step,
                "nfe": self._nfe,
                "rows_trained": self._rows_trained,
                "elapsed": self._elapsed,
                "buffered_inputs": self._buffered_inputs,
                "ema": None if self._ema is None else self._ema.state_dict(),
                **self.method_state(),
            }
            torch.save(state, os.path.join(folder, f"rollout_state_{self.args.process_index}.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        load_policy(self.policy, resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        if self._ema is not None:
            # The evaluation that was best was one of the average.
            self._load_average(self._rollout_state(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = self._rollout_state(checkpoint)
        self._step, self._nfe, self._elapsed = state["step"], state["nfe"], state["elapsed"]
        self._rows_trained = state["rows_trained"]
        self._buffered_inputs = state["buffered_inputs"]
        self._load_average(state)
        self.load_method_state(state)

    def method_state(self) -> dict:
        """What a method must find again in a checkpoint: tensors, numbers and lists of these, by name."""
        return {}

    def load_method_state(self, state: dict):
        """Takes back what [`method_state`] gave."""

    def _rollout_state(self, checkpoint: str) -> dict:
        file = os.path.join(checkpoint, f"rollout_state_{self.args.process_index}.pt")
        return torch.load(file, weights_only=True, map_location=self.accelerator.device)

    def _load_average(self, state: dict):
        if self._ema is not None and state["ema"] is not None:
            self._ema.load_state_dict(state["ema"])

    def _send_telemetry(self):
        """Nothing is sent: TRL's telemetry is about TRL's own trainers."""

    def _diffusers_format(self) -> bool:
        """Whether `load_lora_weights` loads what is trained."""
        return all(
            supports_diffusers_format(type(self.policy.pipeline), name, denoiser.peft_config["default"])
            for name, denoiser in self.policy.denoisers.items()
        )

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None):
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_reward" in entry]
        guidance = (
            self.policy.guidance_scale if self.args.eval_guidance_scale is None else self.args.eval_guidance_scale
        )
        source = "image" if self.policy.family.image == "required" else "text"
        # "Before" is the base model: without an evaluation at step 0 there is none.
        first = [("before", evaluations[0])] if evaluations and evaluations[0]["step"] == 0 else []
        create_model_card(
            self.args.output_dir,
            base_model=self.base_model,
            pipeline_class_name=type(self.policy.pipeline).__name__,
            method_name=self._name,
            paper=self._paper,
            datasets=dataset_name,
            reward_names=self.reward_names,
            eval_reward_names=self.eval_reward_names,
            reward_sources=self.reward_sources,
            metrics={
                when: {
                    name: {
                        "mean": entry.get(f"eval_rewards/{name}/mean"),
                        "std": entry.get(f"eval_rewards/{name}/std"),
                        "n": entry.get("eval_num_samples"),
                    }
                    for name in self.reward_names + self.eval_reward_names
                }
                for when, entry in [*first, ("after", evaluations[-1])]
            }
            if evaluations
            else None,
            config={name: value for name, value in self.args.to_dict().items() if value is not None},
            call_arguments={
                "num_inference_steps": self.args.num_eval_inference_steps,
                **self.policy.call_arguments,
                **(
                    {self.policy.family.guidance: guidance}
                    if self.policy.family.guidance in self.policy.call_arguments
                    else {}
                ),
                **({"negative_prompt": self.policy.negative_prompt} if self.policy.negative_prompt else {}),
            },
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            model_name=model_name,
            hub_model_id=self.args.hub_model_id,
            component=self.policy.components[0],
            second_component=next(iter(self.policy.components[1:]), None),
            complete_class=(
                type(self.policy.denoisers[self.policy.components[0]]).__name__ if self.args.full_finetuning else None
            ),
            guider_scale=guidance if self.policy.family.guidance == "guider" else None,
            pipeline_tag=f"{source}-to-{'image' if self.policy.num_frames is None else 'video'}",
            scheduler=self.policy.sampler,
            # Nothing is saved yet when a run's first card is written.
            diffusers_format=not self.args.full_finetuning and self._diffusers_format(),
            load_expression="trl_flow.policy.load_pipeline('shapes')" if self.base_model == "shapes" else None,
            steps=self.state.global_step,
            seconds=self._elapsed,
            nfe=self._nfe,
        )
