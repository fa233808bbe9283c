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

import copy
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx2
import torch
from accelerate.utils import send_to_device
from huggingface_hub import CommitInfo, create_repo
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint
from transformers.utils.hub import PushInProgress

from ..hub import create_model_card, load_policy, save_policy, supports_diffusers_format
from ..hub.uploading import (
    TRAINING_ARGUMENTS,
    PushError,
    explain,
    files_below,
    push_command,
    push_files,
    retried,
    run_files,
    stage,
)
from ..prompts import PROMPT_SETS, prompts_name
from ..report.history import without_paths
from ..report.live import try_report
from .layout import Layout, deal_anew
from .run_config import python_call, python_config, write_config
from .transitions import place_transitions


logger = logging.getLogger(__name__)


RUN_FILE = "run.json"
CALIBRATION_FILE = "calibration.json"
LAST_CHECKPOINT = "last-checkpoint"  # Trainer's name for it on the Hub


def check_output_dir(output_dir: str):
    """Refuses a directory that holds a run: a new one would mix its files with the old one's."""
    file = Path(output_dir) / RUN_FILE
    if file.is_file():
        raise ValueError(
            f"output_dir={output_dir} holds another run ({json.loads(file.read_text())['method']}). Choose another "
            "directory, or go on with that run: resume_from_checkpoint=True."
        )


def _rollout_file(checkpoint: str, rank: int) -> Path:
    return Path(checkpoint, f"rollout_state_{rank}.pt")


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint of a run, and of those that all processes have finished, if there is any."""
    newest = get_last_checkpoint(output_dir)
    if newest is None or _is_whole(newest):
        return newest
    checkpoints = sorted(
        Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"),
        key=lambda path: int(path.name.split("-")[-1]),
        reverse=True,
    )
    whole = next((str(path) for path in checkpoints if _is_whole(path)), None)
    if whole is not None:
        logger.warning(f"{newest} is not whole: the run was killed while it was saved. It goes on from {whole}.")
    return whole or newest


def _is_whole(checkpoint: str | Path) -> bool:
    file = _rollout_file(checkpoint, 0)
    if not file.is_file() or not Path(checkpoint, TRAINER_STATE_NAME).is_file():
        return False
    processes = torch.load(file, weights_only=True, map_location="cpu", mmap=True).get("layout", [1])[0]
    return all(_rollout_file(checkpoint, rank).is_file() for rank in range(processes))


def _describe(rewards: dict[str, dict[str, str]]) -> str:
    texts = (", ".join(f"{key} {value}" for key, value in source.items()) for source in rewards.values())
    return ", ".join(f"{name!r} ({text})" if text else repr(name) for name, text in zip(rewards, texts, strict=True))


class SavingMixin:
    """The part of the trainer that saves, pushes and resumes."""

    _pushing: ThreadPoolExecutor | None = None  # one push at a time
    _waiting: Future | None = None  # the push that is to follow the present one
    _pushed_checkpoints: frozenset[str] = frozenset()
    # Of a run from the command line: what repeats it, and what was typed.
    command: str | None = None
    command_line: str | None = None

    def last_evaluation(self) -> int | None:
        return next((entry["step"] for entry in reversed(self.state.log_history) if "eval_reward" in entry), None)

    def check_checkpoint(self, checkpoint: str):
        """Refuses a checkpoint that is not one of this method, with updates and rollouts of as many groups."""
        if not any(_rollout_file(checkpoint, rank).is_file() for rank in (0, self.args.process_index)):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no {_rollout_file(checkpoint, 0).name}, so it is not a "
                "checkpoint of this library, or was made with save_only_model=True, or the run was killed while it was "
                "saved: choose an earlier one."
            )
        state = self._rollout_state(checkpoint)
        if state["method"] != self._name:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint} is a checkpoint of {state['method']}, but this trainer is "
                f"{self._name}. Resume it with its own trainer."
            )
        before, now = Layout(*state.get("layout", self.layout)), self.layout
        if not now.has_updates_of(before):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it is of a run with {before}; this one has {now}. The number of "
                "processes may be another, but not that of groups in an update (processes x per_device_train_batch_size x "
                "gradient_accumulation_steps) and in a rollout (processes x per_device_train_batch_size x "
                "steps_per_generation), nor how often they are trained (num_iterations)."
            )
        parts = state.get("optimizer_parts", self.optimizer_parts)
        if parts != self.optimizer_parts:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its optimizer is of a run with {parts}, which this one, with "
                f"{self.optimizer_parts}, cannot take over. Start it as that one was started; for its weights alone, begin a run "
                "with adapter_name_or_path=<the checkpoint>."
            )
        # Of the same layout, each process needs its own part of the rollout, else all of them.
        needed = [self.args.process_index] if before == now else range(before.processes)
        missing = [file.name for rank in needed if not (file := _rollout_file(checkpoint, rank)).is_file()]
        if missing:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it was made by {before.processes} processes, and {', '.join(missing)} "
                "is not there. Each process saves its part of the rollout: put the files of all machines into one folder, or, "
                "if the run was killed while it was saved, choose an earlier checkpoint."
            )

        done = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
        if 0 < self.args.max_steps <= done:
            # Trainer's loop would make one more before it looks.
            raise ValueError(
                f"resume_from_checkpoint={checkpoint} has done {done} updates: with max_steps={self.args.max_steps} there is "
                "nothing left to do. Raise max_steps to go on."
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
            if self.command is None:
                config, missing = python_config(self, self.given)
                write_config(config, self._tag_names[-1], missing)
            if isinstance(self.args.noise_level, str):
                # The run's own copy: the table belongs to what is pushed.
                table = Path(self.args.noise_level)
                if table.resolve() != (file.parent / CALIBRATION_FILE).resolve():
                    shutil.copy(table, file.parent / CALIBRATION_FILE)

    def note_batch_sizes(self):
        """Writes the batch sizes of the first process that are not the settings into the run's file."""
        found = {name: size.rows for name, size in self.batch_sizes.items() if size.rows not in (None, size.setting)}
        if found and self.is_world_process_zero():
            file = Path(self.args.output_dir) / RUN_FILE
            file.write_text(json.dumps({**json.loads(file.read_text()), "batch_sizes": found}, indent=2) + "\n")

    @contextmanager
    def averaged_weights(self):
        """The policy with the moving average of its weights, where one is kept."""
        if self._ema is None or self._ema.optimization_step == 0:
            yield
            return
        parameters = self._shards
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
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        # Written elsewhere and moved: a process that is killed leaves the old weights or the new ones, and a file that is
        # being pushed stays what it is.
        with tempfile.TemporaryDirectory(prefix="_saving-", dir=output_dir) as folder:
            save_policy(self.policy, folder, self.base_model or None, state_dict)
            torch.save(self._public_args(), os.path.join(folder, TRAINING_ARGUMENTS))
            for name, path in files_below(folder).items():
                (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(output_dir / name)

    def _public_args(self):
        """The settings without tokens and paths: they are pushed."""
        args = copy.copy(self.args)
        for name, value in vars(self.args).items():
            setattr(args, name, None if name.endswith("_token") else without_paths(value))
        return args

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False
        self.note_batch_sizes()
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if not os.path.isdir(folder):
            return
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self._push_progress(os.path.basename(folder))

    def _save_rng_state(self, output_dir: str):
        """What a process saves of its own: Trainer's random states, and the rollout under way."""
        super()._save_rng_state(output_dir)
        state = {
            "method": self._name,
            "trained_rewards": self._trained_rewards(),
            "layout": tuple(self.layout),
            "optimizer_parts": self.optimizer_parts,
            "step": self._step,
            "nfe": self._nfe,
            "rows_trained": self._rows_trained,
            "elapsed": self._elapsed,
            "buffered_inputs": self._buffered_inputs,
            "batch_sizes": {name: size.state() for name, size in self.batch_sizes.items()},
            "ema": None if self._ema is None else self._average(),
            **self.method_state(),
        }
        file = _rollout_file(output_dir, self.args.process_index)
        torch.save(state, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        if self.is_world_process_zero():
            # Of more processes, which have saved this update before: they would take theirs for parts of this rollout.
            for stale in Path(output_dir).glob("rollout_state_*.pt"):
                if int(stale.stem.split("_")[-1]) >= self.args.world_size:
                    stale.unlink()
        # Trainer removes older checkpoints next: not before this one can be gone on with.
        self.accelerator.wait_for_everyone()

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        try:
            repository = retried(
                lambda: create_repo(name, token=token, private=private, exist_ok=True), f"making the repository {name}"
            )
        except (httpx2.HTTPError, OSError) as error:
            raise self._push_error(error, name) from error
        self.hub_model_id = repository.repo_id
        self.push_in_progress = None
        for folder in Path(self.args.output_dir).glob("_push-*"):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Saves what is trained, and pushes the run's directory in one commit: weights in both formats, card, pictures,
        curves and settings, and the checkpoints that `hub_strategy` asks for and that are not there yet.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to return when all is done, or at once.
            token (`str`, *optional*): Token with write permission. Defaults to `hub_token`.
            revision (`str`, *optional*): Branch, made where it does not exist. Defaults to `hub_revision`.
            private (`bool`, *optional*): Whether a new repository is private. Defaults to `hub_private_repo`.
            kwargs: Passed to [`create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, its `Future` with `blocking=False`, or `None` in processes other than the first.

        Raises:
            PushError: Nothing was committed. All is saved in `output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Before the Hub is asked anything: what is saved does not depend on it.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(
            **{
                "model_name": self.hub_model_id.split("/")[-1],
                "hub_revision": revision or self.args.hub_revision,
                **kwargs,
            }
        )
        self._finish_current_push()
        push = self._prepare_push(commit_message, token, revision, staged=not blocking)
        return push() if blocking else self._push_thread().submit(push)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Nothing: Trainer calls this before the checkpoint is complete. `_save_checkpoint` pushes."""

    def _push_progress(self, checkpoint: str):
        """Pushes the state of training beside it. No error of the Hub ends training."""
        if self.is_world_process_zero():
            self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))
            if any("train_runtime" not in entry for entry in self.state.log_history):
                try_report(self.args, self.state, is_running=True)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # A slow push is followed by one of the latest state, not by one of each.
        if self._waiting is not None and not self.args.hub_always_push:
            self._waiting.cancel()
        try:
            push = self._prepare_push(f"Training in progress, step {self.state.global_step}", staged=True)
        except OSError as error:  # a full disk
            logger.warning(f"Training goes on, but {checkpoint} is not on the Hub: {error}")
            return

        def push_or_warn():
            try:
                push()
            except Exception as error:
                logger.warning(f"Training goes on, but {checkpoint} is not on the Hub. {error}")

        self._waiting = self._push_thread().submit(push_or_warn)
        self._waiting.add_done_callback(lambda _: push.discard())
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*(job for job in jobs if not job.done()), self._waiting])

    def _push_thread(self) -> ThreadPoolExecutor:
        self._pushing = self._pushing or ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        return self._pushing

    def _prepare_push(
        self, commit_message: str, token: str | None = None, revision: str | None = None, staged: bool = False
    ) -> "_Push":
        files, replaced, folders = run_files(self.args.output_dir), None, []
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folders = self._complete_checkpoints()
            if self.args.hub_strategy == HubStrategy.CHECKPOINT:
                folders, replaced = folders[-1:], LAST_CHECKPOINT
        folders = [path for path in folders if path.name not in self._pushed_checkpoints]
        for path in folders:
            files |= files_below(path, replaced or path.name)
        return _Push(
            self,
            files,
            frozenset(path.name for path in folders),
            staged,
            commit_message=commit_message,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            replaced=replaced if folders else None,
        )

    def _complete_checkpoints(self) -> list[Path]:
        """Checkpoints of the run in order, less those during whose writing it was killed."""
        last = "trainer_state.json" if self.args.save_only_model else "rollout_state_0.pt"
        folders = [path.parent for path in Path(self.args.output_dir).glob(f"checkpoint-*/{last}")]
        steps = {path: path.name.removeprefix("checkpoint-") for path in folders}
        return sorted((path for path in folders if steps[path].isdigit()), key=lambda path: int(steps[path]))

    def _push_error(self, error: Exception, repo_id: str, revision: str | None = None) -> PushError:
        folder = self.args.output_dir
        if not (Path(folder) / RUN_FILE).is_file():
            return PushError(
                f"push_to_hub: there is no {repo_id} to push to. {explain(error)} Nothing is trained yet."
            )
        return PushError(
            f"{folder} could not be pushed to {repo_id}. {explain(error)} Everything is saved in {folder}. To push it "
            f"later: {push_command(folder, repo_id, revision, self.args.hub_private_repo)}"
        )

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
        before, now = Layout(*state.get("layout", self.layout)), self.layout
        self._elapsed, self._nfe, self._rows_trained = state["elapsed"], state["nfe"], state["rows_trained"]
        self._step, micro_batches = state["step"], state.pop("buffered_inputs")
        if before != now:
            self._step = self._step // before.accumulation * now.accumulation
            micro_batches = self._deal_anew(checkpoint, before)
        self._buffered_inputs = micro_batches and [
            place_transitions(micro_batch, self.accelerator.device, self.args.offload_trajectories)
            for micro_batch in micro_batches
        ]
        for name, size in state.get("batch_sizes", {}).items():
            self.batch_sizes[name].load(size)
        self._load_average(state)
        self.load_method_state(send_to_device(state, self.accelerator.device))

    def method_state(self) -> dict:
        """What a method must find again in a checkpoint: tensors, numbers and lists of these, by name."""
        return {}

    def load_method_state(self, state: dict):
        """Takes back what [`method_state`] gave."""

    def _deal_anew(self, checkpoint: str, before: Layout) -> list[dict]:
        """This process's part of the rollout under way, and of what all have counted, from the states of all."""
        states = [self._rollout_state(checkpoint, rank) for rank in range(before.processes)]
        self._nfe, self._rows_trained = (
            sum(state[name] for state in states) // self.layout.processes for name in ("nfe", "rows_trained")
        )
        return deal_anew([state["buffered_inputs"] for state in states], before, self.layout, self.args.process_index)

    def _rollout_state(self, checkpoint: str, rank: int | None = None) -> dict:
        """What a process saved, on the CPU; by default this one or, where there were fewer, the first one."""
        file = _rollout_file(checkpoint, self.args.process_index if rank is None else rank)
        if rank is None and not file.is_file():
            file = _rollout_file(checkpoint, 0)
        return torch.load(file, weights_only=True, map_location="cpu")

    def _load_average(self, state: dict):
        if self._ema is not None and state["ema"] is not None:
            self._ema.load_state_dict(send_to_device(state["ema"], self.accelerator.device))
            self._ema.shadow_params = self._to_shards(self._ema.shadow_params)

    def _average(self) -> dict:
        state = self._ema.state_dict()
        return state | {"shadow_params": self._whole(state["shadow_params"])}

    def _send_telemetry(self):
        """Nothing is sent: TRL's telemetry is about TRL's own trainers."""

    def _diffusers_format(self) -> bool:
        """Whether `load_lora_weights` loads what is trained."""
        return all(
            supports_diffusers_format(type(self.policy.pipeline), name, denoiser.peft_config["default"])
            for name, denoiser in self.policy.denoisers.items()
        )

    @property
    def dataset_names(self) -> list[str]:
        """What the prompts are known by, on the Hub if they are there, those to train on first."""
        datasets = [self.given["train_dataset"], self.train_dataset, self.given["eval_dataset"], self.eval_dataset]
        names = [name for dataset in datasets if (name := prompts_name(dataset)) is not None]
        repositories = {name: record.repository for name, record in PROMPT_SETS.items()}
        return list(dict.fromkeys(repositories.get(name) or name for name in names))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags=None,
        hub_revision: str | None = None,
    ):
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_reward" in entry]
        guidance = (
            self.policy.guidance_scale if self.args.eval_guidance_scale is None else self.args.eval_guidance_scale
        )
        source = "image" if self.policy.family.image == "required" else "text"
        # Of the frozen weights: an adapter's are float32. Some models keep a few of their layers in it, too.
        frozen = Counter(p.dtype for p in self.policy.parameters() if p.is_floating_point() and not p.requires_grad)
        dtype = max(frozen, key=frozen.get, default=torch.float32)
        # "Before" is the base model: without an evaluation at step 0 there is none.
        first = [("before", evaluations[0])] if evaluations and evaluations[0]["step"] == 0 else []
        create_model_card(
            self.args.output_dir,
            base_model=self.base_model,
            pipeline_class_name=type(self.policy.pipeline).__name__,
            method_name=self._name,
            paper=self._paper,
            datasets=self.dataset_names if dataset_name is None else dataset_name,
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
            hub_model_id=self.hub_model_id or self.args.hub_model_id,
            hub_revision=hub_revision or self.args.hub_revision,
            component=self.policy.components[0],
            second_component=next(iter(self.policy.components[1:]), None),
            complete_class=(
                type(self.policy.denoisers[self.policy.components[0]]).__name__ if self.args.full_finetuning else None
            ),
            guider_scale=guidance if self.policy.family.guidance == "guider" else None,
            dtype=str(dtype).removeprefix("torch.") if dtype != torch.float32 else None,
            pipeline_tag=f"{source}-to-{'image' if self.policy.num_frames is None else 'video'}",
            scheduler=self.policy.sampler,
            # Nothing is saved yet when a run's first card is written.
            diffusers_format=not self.args.full_finetuning and self._diffusers_format(),
            load_expression="trl_flow.policy.load_pipeline('shapes')" if self.base_model == "shapes" else None,
            steps=self.state.global_step,
            seconds=self._elapsed,
            nfe=self._nfe,
            command=self.command or python_call(self, self.given),
            command_line=self.command_line,
        )


class _Push:
    """
    The files of a run as they are now, and the call that pushes them.

    Args:
        trainer ([`SavingMixin`]): The trainer.
        files (`dict[str, Path]`): Files by their path in the repository.
        checkpoints (`frozenset[str]`): Names of the checkpoints among them.
        staged (`bool`): Whether training goes on before they are pushed.
        arguments: Those of [`push_files`].
    """

    def __init__(
        self,
        trainer: SavingMixin,
        files: dict[str, Path],
        checkpoints: frozenset[str],
        staged: bool,
        **arguments,
    ):
        self.trainer, self.files, self.checkpoints, self.arguments = trainer, files, checkpoints, arguments
        self.folder = None
        if not staged:
            return
        self.folder = tempfile.mkdtemp(prefix="_push-", dir=trainer.args.output_dir)
        # What is in checkpoints is never written to again, and `_save` replaces weights.
        lasting = ("checkpoint-", f"{LAST_CHECKPOINT}/")
        try:
            self.files = stage(
                files, self.folder, lambda name: name.startswith(lasting) or name.endswith(".safetensors")
            )
        except OSError:
            self.discard()
            raise

    def __call__(self) -> CommitInfo:
        repo_id = self.trainer.hub_model_id
        try:
            commit = push_files(self.files, repo_id, **self.arguments)
        except (httpx2.HTTPError, OSError, ValueError) as error:  # ValueError: the Hub does not accept the card
            raise self.trainer._push_error(error, repo_id, self.arguments["revision"]) from error
        finally:
            self.discard()
        self.trainer._pushed_checkpoints |= self.checkpoints
        return commit

    def discard(self):
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
