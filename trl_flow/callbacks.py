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

"""Watches a run for reward hacking: the trained reward rises while a held-out one falls."""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .hub import holds_policy, load_policy, save_policy
from .report.history import finite, paired_difference
from .trainer.evaluation import SAMPLES_FOLDER
from .trainer.saving import RUN_FILE


logger = logging.get_logger(__name__)

ACTIONS = ("warn", "stop", "rollback")
ROLLBACK_FOLDER = "rollback"


class RewardHackingCallback(TrainerCallback, ExportableState):
    """
    Signals reward hacking at evaluations, and warns, stops the run or rolls it back.

    Each evaluation is compared with the first one that the callback sees (with `eval_on_start` that of the base model)
    and with the best one so far. There is a signal for a held-out reward of `eval_reward_funcs` when the trained reward
    (`eval_reward`) is higher than it was there while that one has fallen beyond its noise: the whole interval of its mean
    change lies below zero. The change is paired by prompt, as evaluations repeat prompts and noise; where the scores in
    `output_dir/samples` are gone it is that of two independent means, from the logged mean, standard deviation and
    count, whose interval is wider. The best evaluation is the one of the highest trained reward among those where no
    held-out reward had fallen beyond its noise.

    Evaluations after the first log `eval_hacking/<name>` for each held-out reward: 1 while it is signalled, 0
    otherwise.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` warns, once for each time that a reward starts to be signalled. `"stop"` ends training too.
            `"rollback"` ends training with the weights of the best evaluation, which may be that of the base model: they
            become the result, and `state.global_step` is their update. They are kept in
            `output_dir/rollback/step_<step>`, adapters like any other. The last evaluation is then made again with them.
        confidence (`float`, *optional*, defaults to `1.96`):
            Half of the interval in standard errors. At 1.96 a comparison in which nothing has changed signals once in
            40 times; there are two for each held-out reward at each evaluation.
        patience (`int`, *optional*, defaults to `1`):
            Number of evaluations in a row at which a reward must show the signal before it counts.

    Raises:
        ValueError: For settings that are not as above; when training begins, if the run has no `eval_reward_funcs`, does
            not evaluate, or is resumed for a rollback to weights that are not there.

    Example:

    ```python
    trainer = FlowGRPOTrainer(
        "shapes",
        reward_funcs=["shapes_partial"],
        eval_reward_funcs=["shapes_strict"],
        args=FlowGRPOConfig(eval_strategy="steps", eval_steps=10, eval_on_start=True),
        eval_dataset=load_prompts("shapes", split="test", num_prompts=512),
        callbacks=[RewardHackingCallback(action="rollback")],
    )
    ```
    """

    def __init__(self, action: str = "warn", confidence: float = 1.96, patience: int = 1):
        if action not in ACTIONS:
            raise ValueError(f"action={action!r}: expected one of {', '.join(map(repr, ACTIONS))}.")
        if not confidence > 0:
            raise ValueError(f"confidence={confidence}: expected a positive number of standard errors.")
        if not patience >= 1:
            raise ValueError(f"patience={patience}: expected a number of evaluations, 1 or more.")
        self.action, self.confidence, self.patience = action, confidence, patience
        self._reset()
        self._begun = self._ended = False
        self._held_out: list[str] = []
        self._base_model = None
        self._evaluated_weights: dict[str, torch.Tensor] | None = None
        self._load_best_model_at_end = None

    def _reset(self):
        self.base: dict | None = None
        self.best: dict | None = None
        self.judged_step = -1
        self.streaks: dict[str, int] = {}
        self.stopped_at: int | None = None

    def state(self) -> dict:
        return {
            "args": {"action": self.action, "confidence": self.confidence, "patience": self.patience},
            "attributes": {
                name: getattr(self, name) for name in ("base", "best", "judged_step", "streaks", "stopped_at")
            },
        }

    # ---- Begin, or go on ----

    def on_init_end(self, args, state, control, **kwargs):
        # Here nothing has been written yet. A callback that is added later is checked when training begins.
        self._check_strategy(args)

    def on_train_begin(self, args, state, control, **kwargs):
        self._check_strategy(args)
        run = None
        if state.is_world_process_zero and (file := Path(args.output_dir) / RUN_FILE).is_file():
            run = json.loads(file.read_text())
            if not run["eval_rewards"] and state.global_step == 0:
                file.unlink()  # a run that is refused does not occupy the directory
        run = broadcast_object_list([run])[0]
        if run is None:
            raise ValueError(
                f"RewardHackingCallback needs a trainer of trl_flow: {args.output_dir} has no {RUN_FILE}."
            )
        if not run["eval_rewards"]:
            raise ValueError(
                "RewardHackingCallback needs eval_reward_funcs: rewards that are watched on the held-out prompts and "
                f"not trained on. This run has none beside {', '.join(run['rewards'])}, which it trains on."
            )
        self._held_out, self._base_model = run["eval_rewards"], run["base_model"] or None
        self._begun, self._ended = True, False
        if state.global_step == 0:
            self._reset()
        elif self.base is None:
            # transformers does this only with `restore_callback_states_from_checkpoint`.
            stored = state.stateful_callbacks.get(type(self).__name__, [])
            for saved in stored[-1:] if isinstance(stored, list) else [stored]:
                for name, value in saved["attributes"].items():
                    setattr(self, name, value)
        if self.action == "rollback" and self.best is not None:
            self._best_weights(args)  # raises if it is not there

    @staticmethod
    def _check_strategy(args):
        if args.eval_strategy == "no":
            raise ValueError(
                "RewardHackingCallback needs evaluations, but eval_strategy='no'. Set it to 'steps', with eval_steps and "
                "an eval_dataset."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.stopped_at is not None:
            # Resumed from the checkpoint of the update that it was stopped at: a loop that begins makes one more.
            control.should_training_stop, control.should_evaluate = True, False
        elif control.should_training_stop:
            # The trainer would evaluate after training, when there is no rolling back any more.
            control.should_evaluate = True

    # ---- Evaluations ----

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        # Within an evaluation the policy has the weights that are evaluated: those of the moving average, if there is one.
        if self._evaluated_weights is None and self._keeps_weights(state):
            self._evaluated_weights = {
                name: parameter.detach().cpu().clone()
                for name, parameter in model.denoisers.named_parameters()
                if parameter.requires_grad
            }

    def _keeps_weights(self, state) -> bool:
        return self.action == "rollback" and self._begun and self.stopped_at is None and state.is_world_process_zero

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        weights, self._evaluated_weights = self._evaluated_weights, None
        # After a rollback, update and evaluation are earlier ones.
        if not self._begun or "eval_reward" not in metrics or state.global_step <= self.judged_step:
            return
        self.judged_step = state.global_step
        now = {
            "step": state.global_step,
            "output_dir": args.output_dir,
            "reward": metrics["eval_reward"] if finite(metrics["eval_reward"]) else None,
            "scores": {
                name: {
                    "mean": metrics.get(f"eval_rewards/{name}/mean"),
                    "std": metrics.get(f"eval_rewards/{name}/std"),
                    "count": metrics["eval_num_samples"] - metrics.get(f"eval_rewards/{name}/missing", 0),
                }
                for name in self._held_out
            },
        }
        if self.base is None:
            self.base = self.best = now
            self._keep(args, model, weights)
            return
        # The files are the first process's; all must come to the same conclusion.
        falls = broadcast_object_list([self._falls(args, now) if state.is_world_process_zero else None])[0]
        if not falls and _rise(self.best, now) > 0:
            self.best = now
            self._keep(args, model, weights)

        signals = {fall["name"]: fall for fall in falls if fall["rise"] > 0}
        self.streaks = {name: self.streaks.get(name, 0) + 1 if name in signals else 0 for name in self._held_out}
        signalled = {f"eval_hacking/{name}": float(n >= self.patience) for name, n in self.streaks.items()}
        metrics.update(signalled)
        for entry in reversed(state.log_history):
            if "eval_reward" in entry:
                entry.update(signalled)
                break
        if not any(signalled.values()):
            return
        if self.action != "warn":
            self.stopped_at = state.global_step
            control.should_training_stop = True
        for name, streak in self.streaks.items():
            if streak == self.patience and state.is_world_process_zero:
                logger.warning(self._message(signals[name], state.global_step))

    def _falls(self, args, now: dict) -> list[dict]:
        """Held-out rewards that have fallen beyond their noise, since the best evaluation or since the first."""
        falls = {}
        for then in (self.best, self.base):
            rise = _rise(then, now)
            for name in self._held_out:
                change = self._change(args, name, then, now)
                # Of two falls the one that the trained reward gained by.
                if (
                    change is not None
                    and change[0] + change[1] < 0
                    and (name not in falls or falls[name]["rise"] <= 0 < rise)
                ):
                    falls[name] = {
                        "name": name,
                        "since": then["step"],
                        "rise": rise,
                        "fall": -change[0],
                        "half_interval": change[1],
                    }
        return list(falls.values())

    def _change(self, args, name: str, then: dict, now: dict) -> tuple[float, float] | None:
        """Mean change of a score and half of its interval; `None` where there are no two scores to compare."""
        before, after = (_scores(args, evaluation, name) for evaluation in (then, now))
        if before is not None and after is not None:
            paired = paired_difference(before, after, self.confidence)
            if paired is not None:
                return paired[:2]
        before, after = then["scores"].get(name), now["scores"][name]
        if before is None or not all(finite(score[key]) for score in (before, after) for key in ("mean", "std")):
            return None
        variance = sum(score["std"] ** 2 / score["count"] for score in (before, after))
        return after["mean"] - before["mean"], self.confidence * math.sqrt(variance)

    def _message(self, fall: dict, step: int) -> str:
        text = (
            f"Reward hacking at update {step}: the trained reward is {fall['rise']:.4g} higher than at update "
            f"{fall['since']}, the held-out reward {fall['name']!r} {fall['fall']:.4g} ± {fall['half_interval']:.4g} lower "
            f"(± {self.confidence:g} standard errors). "
        )
        if self.action == "warn":
            return text + "Training goes on (action='warn')."
        if self.action == "stop":
            return text + "Training stops."
        best = f"{Path(ROLLBACK_FOLDER) / _step_name(self.best['step'])} of output_dir"
        if self._ended:
            return text + f"Training had already ended, and keeps its last weights; those of the best are in {best}."
        return text + f"Training stops, and ends with the weights of update {self.best['step']}, in {best}."

    # ---- Weights ----

    def _keep(self, args, model, weights: dict[str, torch.Tensor] | None):
        """Writes the weights of the best evaluation, and removes those that nothing can go back to any more."""
        if weights is None:
            return
        folder = Path(args.output_dir) / ROLLBACK_FOLDER
        path = folder / _step_name(self.best["step"])
        partial = folder / "partial"
        for leftover in (partial, path):
            shutil.rmtree(leftover, ignore_errors=True)
        save_policy(model, partial, self._base_model, weights)
        partial.rename(path)
        # A checkpoint goes on with the newest weights that were kept when it was made.
        kept = sorted(int(step) for step in _numbers(folder, r"step_(\d+)"))
        needed = {self.best["step"]}
        for checkpoint in _numbers(Path(args.output_dir), r"checkpoint-(\d+)"):
            needed |= set([step for step in kept if step <= int(checkpoint)][-1:])
        for step in set(kept) - needed:
            shutil.rmtree(folder / _step_name(step))

    def _best_weights(self, args) -> Path:
        folder = Path(ROLLBACK_FOLDER) / _step_name(self.best["step"])
        for root in (args.output_dir, self.best["output_dir"]):
            if holds_policy(path := Path(root) / folder):
                return path
        raise ValueError(
            f"RewardHackingCallback(action='rollback'): the weights of the best evaluation, of update "
            f"{self.best['step']}, are not in {Path(args.output_dir) / folder}. A run that began with another action has "
            "kept none: resume it with that one."
        )

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        # The summary is what is logged last, and the best checkpoint is loaded next: where there was an alarm, that is ours.
        if self.action != "rollback" or self.stopped_at is None or "train_runtime" not in (logs or {}):
            return
        folder = self._best_weights(args)
        if args.ema_decay:
            load_policy(model, folder)
            average = [parameter.detach().cpu().clone() for parameter in model.parameters() if parameter.requires_grad]
            state_file = folder / f"rollout_state_{args.process_index}.pt"
            torch.save({"ema": {"shadow_params": average}}, state_file)
        state.best_model_checkpoint = str(folder)
        self._load_best_model_at_end = args.load_best_model_at_end
        args.load_best_model_at_end = True

    def on_train_end(self, args, state, control, **kwargs):
        self._ended = True
        if self.action != "rollback" or self.stopped_at is None:
            return
        args.load_best_model_at_end = self._load_best_model_at_end
        state.log_history.append({"step": self.stopped_at, "eval_rolled_back_to": self.best["step"]})
        # The policy is what it was after so many updates. The trainer sees that its last evaluation is another's.
        state.global_step = self.best["step"]


def _rise(then: dict, now: dict) -> float:
    """By how much the trained reward is higher; 0 where one of the two is unknown."""
    return 0.0 if then["reward"] is None or now["reward"] is None else now["reward"] - then["reward"]


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _numbers(folder: Path, pattern: str) -> list[str]:
    return [match[1] for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]


def _scores(args, evaluation: dict, name: str) -> list[float | None] | None:
    """Scores of an evaluation by prompt, from this run's directory or from the one that it was resumed from."""
    file = Path(SAMPLES_FOLDER) / f"{_step_name(evaluation['step'])}.json"
    for root in (args.output_dir, evaluation["output_dir"]):
        try:
            return json.loads((Path(root) / file).read_text())["scores"][name]
        except (OSError, ValueError, KeyError):
            continue
    return None
