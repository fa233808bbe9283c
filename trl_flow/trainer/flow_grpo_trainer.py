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

"""Flow-GRPO, and the training loop of every method: a method overrides `rollout_plan()`, `credit()` and little else."""

import copy
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, gather_object, set_seed
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft import PeftConfig, set_peft_model_state_dict
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import identity

from ..credit import outcome
from ..environment import ProcessLostError, check_processes, is_lost_connection
from ..hub import read_adapter
from ..notebook import NotebookProgress, in_notebook
from ..objective import (
    clipped_loss,
    guarded_ratio,
    masked_loss,
    step_divergence,
    step_weights,
)
from ..policy import FlowPolicy, default_call_arguments, encode_prompts, load_pipeline
from ..policy.attention import set_attention_backend
from ..policy.doctor import Diagnosis, Untrainable, examine_policy
from ..policy.encoders import move
from ..policy.families import find_family
from ..report import ProgressLine
from ..report.live import LiveReport, report_stop, try_report
from ..report.plan import PlanPicture
from ..report.tracking import TrackerPictures
from ..rewards import RewardThreads
from ..rollout import Plan, Rollout, chain_plan, coefficients, log_prob, transition
from .arguments import (
    check_gradient_scale,
    check_images,
    check_offload,
    check_optimizer,
    check_precision,
    check_reward_columns,
    check_scaler,
    load_dataset_argument,
    load_rewards,
    own_prompts,
    settle_float16,
    start_scaler,
)
from .batch_size import BatchSize
from .evaluation import EvaluationMixin
from .flow_grpo_config import FlowGRPOConfig
from .layout import Layout
from .noise_table import load_noise_table
from .resuming import run_from_hub
from .rollouts import RolloutMixin
from .sampler import EpochRepeatSampler
from .saving import SavingMixin, check_output_dir, last_checkpoint
from .sharding import ShardingMixin, check_sharding
from .transitions import TransitionChunk
from .updates import UpdateMixin


RewardFunc = str | dict | Callable[..., list[float | None]]


logger = get_logger(__name__)


class FlowGRPOTrainer(RolloutMixin, UpdateMixin, EvaluationMixin, SavingMixin, ShardingMixin, _BaseTrainer):
    """
    Trainer for Flow-GRPO, of the paper [Flow-GRPO: Training Flow Matching Models via Online
    RL](https://huggingface.co/papers/2505.05470).

    It samples G images per prompt with a stochastic sampler, scores them, and raises the probability of the denoising
    steps of those that are better than their group. Names, argument order and reward functions are those of
    [`~trl.GRPOTrainer`].

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Id of a pipeline on the Hub, a directory, `"shapes"` (the embedded one), or a pipeline.
        reward_funcs (`str`, `dict`, `Callable` or a list of these):
            What is maximised; [`load_reward`] says what may stand here.
        args ([`FlowGRPOConfig`], *optional*):
            Settings. Any [`FlowGRPOConfig`] works in any trainer; a method's own fields then take the paper's values.
        train_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `str`, *optional*):
            Rows with a `prompt`; other columns reach the reward functions. A name, file or Hub id as
            [`~trl_flow.prompts.load_prompts`] takes it stands for its split `"train"`. Of a stream as many rows are read as
            `max_steps` updates can use. Defaults to the prompt set that the first reward function names as its own.
        eval_dataset (the same, *optional*):
            Held-out prompts; a name stands for its split `"test"`.
        eval_reward_funcs (`str`, `dict`, `Callable` or a list of these, *optional*):
            Scores that are watched on the held-out prompts and never trained on.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Additional callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler. Defaults to AdamW as `args` describes it.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter that is trained. Defaults to LoRA of rank 32 and alpha 64 on the attention projections, the
            papers' setting.

    Raises:
        ValueError: For anything that cannot work, with what was given and what was expected, before any work is spent.
    """

    # The loss of a micro-step is a mean over its transitions; `training_step` divides by the accumulation steps.
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "trl-flow", "flow-grpo"]
    _name = "Flow-GRPO"
    _config_class = FlowGRPOConfig
    _normalization = {"ddof": 0, "eps": 1e-4}
    # Whether a transition of advantage 0 has a gradient, KL aside.
    _trains_without_advantage = False
    # Whether a policy of its own samples.
    _has_sampling_policy = False
    _paper = {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{liu2025flowgrpo,
                title        = {{Flow-GRPO: Training Flow Matching Models via Online RL}},
                author       = {Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and Pengfei Wan and Di Zhang and Wanli Ouyang},
                year         = 2025,
                eprint       = {arXiv:2505.05470},
            }"""),
    }

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: FlowGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | str | None = None,
        eval_dataset: Dataset | IterableDataset | str | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = self._config_class(output_dir=f"{Path(name).name}-{self._name}")
        self._given_args = args
        self.given = {
            "model": model,
            "reward_funcs": reward_funcs,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "eval_reward_funcs": eval_reward_funcs,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "peft_config": peft_config,
        }
        # A copy: what is filled in below is not the caller's business.
        self.args = args = copy.copy(self._config_class.from_config(args))
        check_processes()
        check_sharding(args)

        # Rewards
        self.reward_names, self.reward_funcs = load_rewards(reward_funcs, (), args.trust_remote_code)
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty: expected at least one reward function or name.")
        self.eval_reward_names, self.eval_reward_funcs = load_rewards(
            eval_reward_funcs or [], self.reward_names, args.trust_remote_code
        )
        for reward, name in zip(self.eval_reward_funcs, self.eval_reward_names, strict=True):
            if getattr(reward, "scope", "sample") == "group":
                raise ValueError(
                    f"eval_reward_funcs holds {name!r}, which compares the pictures of a group: an evaluation makes one "
                    "picture per prompt. Leave it out."
                )
        weights = [1.0] * len(self.reward_funcs) if args.reward_weights is None else args.reward_weights
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.reward_funcs)} reward functions: expected one "
                "for each."
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)

        # Prompts
        if train_dataset is None:
            train_dataset = own_prompts(self.reward_funcs[0], self.reward_names[0])
        # A micro-step takes a new prompt for each of its groups at most.
        groups = args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
        train_dataset = load_dataset_argument(
            train_dataset, "train_dataset", "train", args.max_steps * groups if args.max_steps > 0 else None
        )
        if eval_dataset is None:
            args.eval_on_start = False
        else:
            eval_dataset = load_dataset_argument(eval_dataset, "eval_dataset", "test")
            check_reward_columns(self.eval_reward_funcs, self.eval_reward_names, eval_dataset, "eval_dataset")
            check_reward_columns(self.reward_funcs, self.reward_names, eval_dataset, "eval_dataset")
        check_reward_columns(self.reward_funcs, self.reward_names, train_dataset, "train_dataset")

        # Method
        self.sde_steps = sorted(args.sde_steps) if args.sde_steps is not None else self.default_sde_steps()
        self.check_args()
        if self.layout.groups_per_rollout % self.groups_per_prompt:
            raise ValueError(
                f"A rollout of per_device_train_batch_size={args.per_device_train_batch_size} x steps_per_generation="
                f"{args.steps_per_generation} x {args.world_size} processes = {self.layout.groups_per_rollout} groups cannot "
                f"hold {self.groups_per_prompt} groups of each prompt: expected a multiple of {self.groups_per_prompt}."
            )
        prompts_per_rollout = self.layout.groups_per_rollout // self.groups_per_prompt
        if len(train_dataset) < prompts_per_rollout:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, but one rollout takes {prompts_per_rollout}: "
                f"per_device_train_batch_size={args.per_device_train_batch_size} x steps_per_generation="
                f"{args.steps_per_generation} x {args.world_size} processes."
            )

        if optimizers[0] is None:
            check_optimizer(args)

        # Policy. LoRA weights are random: the seed is set before they are made.
        set_seed(args.seed)
        self.base_model = model if isinstance(model, str) else model.config.get("_name_or_path") or ""
        if peft_config is not None and getattr(peft_config, "lora_dropout", 0):
            raise ValueError(
                f"lora_dropout={peft_config.lora_dropout}: the ratio of two policies with different dropout masks is "
                "no ratio. Set it to 0."
            )
        pipeline = load_pipeline(model, **(args.model_init_kwargs or {}))
        if "quantization_config" in (args.model_init_kwargs or {}):
            # The settings are written to files and cards, and diffusers' object knows no such form.
            args.model_init_kwargs = dict(args.model_init_kwargs)
            args.model_init_kwargs["quantization"] = str(args.model_init_kwargs.pop("quantization_config"))
        for name, value in default_call_arguments(model).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        check_precision(pipeline, args)
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        # Where prompts are encoded first, there need not be room for the denoisers beside the encoders: they leave first, as
        # those of bitsandbytes are loaded on the device.
        waiting = find_family(pipeline).components if args.precompute_prompts else ()
        move([models.pop(name) for name in waiting if name in models], "cpu")
        move(models.values(), args.device)
        adapter = read_adapter(pipeline, args.adapter_name_or_path) if args.adapter_name_or_path else {}
        if adapter and peft_config is not None:
            raise ValueError(
                f"adapter_name_or_path={args.adapter_name_or_path!r} brings its own configuration: peft_config would have "
                "no effect. Drop one of them."
            )
        self.policy = FlowPolicy(
            pipeline,
            {name: config for name, (config, _) in adapter.items()} or peft_config,
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            guidance_scale=args.guidance_scale,
            negative_prompt=args.negative_prompt,
            max_sequence_length=args.max_sequence_length,
            generation_kwargs=args.generation_kwargs,
            full_finetuning=args.full_finetuning,
            device=args.device if args.precompute_prompts else None,
        )
        settle_float16(self.policy.gradient_scale, args)
        if args.precompute_prompts:
            self.policy.offload_encoders(alone=True)
        if args.attention_backend is not None:
            set_attention_backend(self.policy, args.attention_backend)
        if args.num_eval_inference_steps is None:
            args.num_eval_inference_steps = self.policy.family.num_eval_inference_steps
        for name, (_, weights) in adapter.items():
            set_peft_model_state_dict(self.policy.denoisers[name], weights)
        if args.beta > 0:
            self.policy.keep_reference()
        for dataset, argument in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            optional = (
                self.policy.family.image == "optional" and dataset is not None and "image" in dataset.column_names
            )
            if dataset is not None and (self.policy.family.image == "required" or optional):
                check_images(dataset, argument)
        check_offload(self.policy, args)
        self.policy.divide_decoding(args.vae_slicing, args.vae_tiling)
        if self.policy.family.inferred or args.generation_kwargs:
            self._examine(train_dataset[0].get("image"))
        self.sigmas = self.policy.sigmas(args.num_inference_steps, args.sigmas)
        self.noise_levels = self._resolve_noise_levels()
        self._check_kl()
        stds = [self._coefficients(step)[1] for step in self.sde_steps]
        sizes = [-self.sigmas.diff()[step].item() for step in self.sde_steps]
        self._step_weights = dict(zip(self.sde_steps, step_weights(args.step_weighting, stds, sizes), strict=True))

        self.batch_sizes = {
            "sampling": BatchSize("Sampling", "rollout_batch_size", args.rollout_batch_size),
            "decoding": BatchSize("Decoding", "rollout_batch_size", args.rollout_batch_size),
            "training": BatchSize("Training", "transition_batch_size", args.transition_batch_size),
        }
        self._extra_columns = defaultdict(list)
        self._saving_checkpoint = False
        self._last_reward_error = None
        self._reward_threads = RewardThreads()
        self._prepared_rewards = []
        self._prompts_precomputed = False
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0
        self._buffered_inputs = None
        self._nfe = 0
        self._rows_trained = 0
        self._elapsed = 0.0
        self._saved_after = None
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Start one process per GPU, with `accelerate launch` "
                "or --accelerate_config multi_gpu, or show it one GPU with CUDA_VISIBLE_DEVICES."
            )
        check_gradient_scale(self.policy.gradient_scale, self.accelerator.distributed_type)
        start_scaler(self.accelerator.scaler, self.policy.gradient_scale)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            for name in ("sampling", "training"):
                size = self.batch_sizes[name]
                size.shared = True
                if size.rows is None:
                    raise ValueError(
                        f"{size.name}={size.setting!r} does not work with FSDP and DeepSpeed: all processes take part in each "
                        "forward, and one that finds another number of rows would wait for the others. Give a number."
                    )
        self.prepare_sharding()
        self.model_accepts_loss_kwargs = False
        # What `torch_compile` or the launcher asks for. accelerate would compile the policy as a whole, which is the pipeline's
        # own code, and that is not made for it.
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo.backend != DynamoBackend.NO:
            self.policy.compile(**dynamo.to_kwargs() | {"backend": dynamo.backend.value.lower()})
            dynamo.backend = DynamoBackend.NO
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another one in a notebook
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(NotebookProgress() if in_notebook() else ProgressLine())
        self.add_callback(_AfterUpdate(self))
        if args.log_images:
            self.add_callback(TrackerPictures(self))
        self.add_callback(LiveReport())
        self._ema = (
            EMAModel(self._trainable, decay=args.ema_decay, update_after_step=args.ema_update_after)
            if args.ema_decay
            else None
        )
        # The noise and the data order are functions of the seed; what is left (a reward's own randomness) differs by
        # process, as in TRL.
        set_seed(args.seed, device_specific=True)

    def _examine(self, image):
        """
        Refuses a pipeline that does not pass the doctor's checks: one without a record, or with arguments of its own, which may
        mean something else in the one step of an evaluation than in a whole call.
        """
        name, given = type(self.policy.pipeline).__name__, self.args.generation_kwargs
        diagnosis = Diagnosis(name)
        try:
            with torch.random.fork_rng():
                examine_policy(self.policy, diagnosis, image=image)
        except Untrainable as problem:
            raise ValueError(
                f"{name} cannot be trained{f' with generation_kwargs={given}' if given else ''}: {problem}. `trl-flow doctor` "
                "says more."
            ) from problem
        for warning in diagnosis.warnings:
            logger.warning(f"{name}: {warning}.")

    # ---- The method: what a subclass overrides ----

    def default_sde_steps(self) -> list[int]:
        """Steps that are stochastic and trained: all but the last, whose tiny sigma makes the density degenerate."""
        return list(range(self.args.num_inference_steps - 1))

    def check_args(self):
        """Raises `ValueError` for settings that cannot work with this method."""
        if not self.sde_steps:
            raise ValueError(
                f"num_inference_steps={self.args.num_inference_steps} leaves no step to train: the last one is not "
                "stochastic. Expected at least 2."
            )

    def check_shared_noise(self, config_class: type):
        """Refuses initial noises of their own, where all branches of a group leave one trunk."""
        # A FlowGRPOConfig says nothing about it: False is its default.
        if type(self._given_args) is config_class and not self.args.same_initial_noise:
            raise ValueError(
                f"same_initial_noise=False: in {self._name} all branches of a group leave one trunk. Leave it at True."
            )

    def rollout_steps(self) -> list[int]:
        """Those of `sde_steps` that are stochastic and trained in the next rollout."""
        return self.sde_steps

    def rollout_sigmas(self, sde_steps: list[int]) -> torch.Tensor:
        """The grid of the next rollout. Until after the last of its stochastic steps it is `self.sigmas`."""
        return self.sigmas

    def rollout_plan(self, sde_steps: list[int]) -> Plan:
        """The rollout tree of one prompt group."""
        return chain_plan(self.args.num_inference_steps, self.num_generations, sde_steps, self.args.same_initial_noise)

    def plan(self) -> PlanPicture:
        """The tree of the next rollout, for a notebook to show, to print as text, or to [`~PlanPicture.save`]."""
        sde_steps = self.rollout_steps()
        return PlanPicture(self.rollout_plan(sde_steps), self.rollout_sigmas(sde_steps).tolist(), self._name)

    def observe(self, rollout: Rollout) -> torch.Tensor | None:
        """What credit needs to know of the latents of b prompts, as one tensor `(b, ...)`; `None` for nothing."""

    def credit(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards of the leaves of each transition `(B, S, G, K)` -> values `(B, S, G, C)` to normalise and sum."""
        return outcome(rewards)

    def redistribute(
        self, advantages: torch.Tensor, mask: torch.Tensor, observed: torch.Tensor | None
    ) -> torch.Tensor:
        """Normalised, clipped advantages `(B, S, G)` and the mask of those that there are -> what is trained on."""
        return advantages

    def trained(self, advantages: torch.Tensor, mask: torch.Tensor, keys: list[str]) -> torch.Tensor:
        """Which transitions `(B, S, G)` are trained on; `keys` name the B groups, for randomness of one's own."""
        return torch.ones_like(mask)

    def log_credit(self, rewards: torch.Tensor, plan: Plan):
        """Logs what is of interest in the weighted rewards `(B, S, G, K)` of the transitions' leaves."""

    def statistics(self, chunk: TransitionChunk, velocity: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the loss compares between the policy and the one that sampled, for m transitions: `log_probs (m,)`, and
        `means (m, *latent)` for the objectives that need them.
        """
        mean, std = self._transition(chunk, velocity)
        mean = mean[chunk.row]
        statistics = {"log_probs": log_prob(chunk.next_latents, mean, std)}
        if self.args.objective != "clip":
            statistics["means"] = mean
        return statistics

    def policy_loss(
        self,
        chunk: TransitionChunk,
        advantages: torch.Tensor,
        new: dict[str, torch.Tensor],
        old: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of m transitions from the [`statistics`] of both policies, and what is logged of it, `(m,)` each."""
        args = self.args
        log_ratio = new["log_probs"] - old["log_probs"]
        if args.objective == "clip":
            ratio = torch.exp(log_ratio)
        else:
            std = self._coefficients(chunk.step)[1]
            divergence = step_divergence(new["means"], old["means"], std)
            ratio = guarded_ratio(log_ratio, divergence, std) if args.objective == "guard" else torch.exp(log_ratio)
        if args.objective == "dppo":
            losses, clipped = masked_loss(advantages, ratio, divergence.detach(), args.kl_mask_threshold)
        else:
            epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
            losses, clipped = clipped_loss(advantages, ratio, args.epsilon, epsilon_high)
        return losses, {"ratio": ratio, "clip_ratio": clipped.float()}

    def on_policy(self, micro_batch: int) -> bool:
        """Whether a micro-batch of a rollout is trained by the policy that sampled it."""
        return micro_batch < self.args.gradient_accumulation_steps

    @property
    def groups_per_prompt(self) -> int:
        """Number of groups, each with noise of its own, that a rollout makes of each of its prompts."""
        return 1

    @property
    def updates_per_pass(self) -> int:
        """Number of parts that the transitions of one micro-batch are trained in, one update each."""
        return 1

    # ---- Rollouts ----

    @property
    def num_generations(self) -> int:
        return self.args.num_generations

    @property
    def layout(self) -> Layout:
        """How the groups of a rollout are dealt to processes and micro-steps."""
        args = self.args
        return Layout(
            args.world_size,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.steps_per_generation,
            self.updates_per_pass,
            args.num_iterations,
        )

    @property
    def _micro_steps(self) -> int:
        """Micro-steps of one pass over a rollout."""
        return self.args.steps_per_generation * self.updates_per_pass

    @property
    def rollout_number(self) -> int:
        """Number of rollouts before the present one."""
        return self._step // (self.args.num_iterations * self._micro_steps)

    def _resolve_noise_levels(self) -> list[float]:
        args, num_steps = self.args, self.args.num_inference_steps
        if isinstance(args.noise_level, str):
            levels = load_noise_table(args.noise_level, self.sigmas, args.sde_type)
        else:
            levels = args.noise_level if isinstance(args.noise_level, list) else [args.noise_level] * num_steps
        for step in self.sde_steps:
            if coefficients(*self.sigmas[step : step + 2].tolist(), levels[step], args.sde_type)[1] == 0:
                raise ValueError(
                    f"Step {step} is among sde_steps={self.sde_steps}, but with sde_type={args.sde_type!r} and noise "
                    f"level {levels[step]} it has no noise (sigma {self.sigmas[step]:.4g} to "
                    f"{self.sigmas[step + 1]:.4g}): there is nothing to learn from it."
                )
        return levels

    def _check_kl(self):
        """Refuses a divergence that is divided by next to nothing."""
        if self.args.sde_type != "cps" or self.args.beta == 0 or self.args.kl_type == "velocity":
            return
        for step in self.sde_steps:
            if (std := self._coefficients(step)[1]) < 0.02:
                raise ValueError(
                    f"beta={self.args.beta} with kl_type={self.args.kl_type!r} and sde_type='cps' divides the divergence of "
                    f"step {step} by the square of its noise, {std:.2g}. Set kl_type='velocity', or leave the step out of "
                    "sde_steps."
                )

    def _coefficients(self, step: int) -> tuple[float, float]:
        return coefficients(*self.sigmas[step : step + 2].tolist(), self.noise_levels[step], self.args.sde_type)

    def _transition(self, chunk: TransitionChunk, velocity: torch.Tensor) -> tuple[torch.Tensor, float]:
        return transition(
            chunk.latents,
            velocity,
            chunk.sigma,
            chunk.sigma_next,
            self.noise_levels[chunk.step],
            self.args.sde_type,
        )

    # ---- Training ----

    def get_train_dataloader(self):
        # One item is one prompt group; one batch is one rollout, repeated for every micro-step that it feeds.
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset=None):
        return EpochRepeatSampler(
            self.train_dataset if dataset is None else dataset,
            self.layout,
            self.groups_per_prompt,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def _prepare_inputs(self, rows: list[dict]) -> dict:
        if self._step % (self.args.num_iterations * self._micro_steps) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = None  # the last ones' latents make room
            self._buffered_inputs = self._generate_and_score(rows)
        return self._buffered_inputs[self._step % self._micro_steps]

    @property
    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs |= self.averaged_metrics("train")
            logs |= {"nfe": self._nfe, "rows_trained": self._rows_trained, "time/elapsed": self._elapsed}
        super().log(logs, start_time)
        self.print_samples()

    def averaged_metrics(self, mode: str, prefix: str = "") -> dict[str, float | None]:
        """Means of what all processes have noted since the last log; `None` where every value is NaN."""
        metrics, noted = {}, gather_object([dict(self._metrics[mode])])
        for key in dict.fromkeys(key for values in noted for key in values):
            known = [value for values in noted for value in values.get(key, ()) if not math.isnan(value)]
            metrics[prefix + key] = sum(known) / len(known) if known else None
        self._metrics[mode].clear()
        return metrics

    # ---- Runs: begin, save, resume ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Trains, with a last evaluation and the report at the end.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Where training goes on exactly as if it had not stopped: a checkpoint's directory, `True` for the last one
                of `output_dir`, or a repository that a run was pushed to with `hub_strategy` `"checkpoint"` or
                `"all_checkpoints"`: `"user/repo"` for the newest there, with `/checkpoint-<step>` and `@revision` if need
                be. What the repository holds of the run is then put into `output_dir`.
        """
        check_scaler(self.args, self.accelerator.scaler)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True, but {self.args.output_dir} holds no checkpoint.")
        from_hub = bool(resume_from_checkpoint) and not Path(resume_from_checkpoint).is_dir()
        if not resume_from_checkpoint and self.is_world_process_zero():
            check_output_dir(self.args.output_dir)
        with (
            run_from_hub(self, resume_from_checkpoint) if from_hub else nullcontext(resume_from_checkpoint)
        ) as checkpoint:
            if checkpoint:
                self.check_checkpoint(checkpoint)
            self.check_reward_functions()
            if checkpoint:
                self.check_reward_sources(checkpoint)
            if self.args.precompute_prompts and not self._prompts_precomputed:
                self.precompute_prompts()
            if self.args.offload_encoders:
                self.policy.offload_encoders()
            if self.args.offload_vae:
                self.policy.offload_vae()
        if checkpoint:
            self.args.eval_on_start = False  # it has been done
        if from_hub:
            resume_from_checkpoint = os.path.join(self.args.output_dir, os.path.basename(checkpoint))
        self.write_run_file()
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            if self.eval_dataset is not None and self.last_evaluation() != self.state.global_step:
                self._save_for_last_evaluation()
                self.evaluate()
            self.note_batch_sizes()
        except BaseException as error:
            report_stop(self.args, self.state)
            if self.args.world_size > 1 and is_lost_connection(error):
                raise ProcessLostError(
                    f"Process {self.args.process_index} of {self.args.world_size} has lost another one after update "
                    f"{self.state.global_step}. That one's own output says why it has ended; if it says nothing, it was "
                    "killed, as systems do when memory runs out. Go on from the last checkpoint with "
                    "resume_from_checkpoint=True, on any number of processes."
                ) from error
            raise
        finally:
            self._reward_threads.close()
        self.save_state()
        if self.is_world_process_zero() and any("train_runtime" not in entry for entry in self.state.log_history):
            try_report(self.args, self.state, is_running=False)
        self.save_model(_internal_call=True)  # saved, and pushed only when the user says so
        return result

    def _save_for_last_evaluation(self):
        """Saves what is trained, once: nothing that ends the last evaluation must cost more than its scores."""
        if self._saved_after != self.state.global_step:
            self.save_state()
            self.save_model(_internal_call=True)
            self._saved_after = self.state.global_step

    def precompute_prompts(self):
        """
        Encodes the prompts of both datasets, or finds them on disk, while the denoisers are elsewhere. From then on these
        stay on the device, whatever is encoded: there will be an optimizer, and perhaps several processes.
        """
        ranks = self.args.process_index, self.args.world_size
        with self.policy.encoders.visit():
            self.policy.attach(encode_prompts(self.policy, self.train_dataset, *ranks))
            if self.eval_dataset is not None:
                with self.policy.guided(self.args.eval_guidance_scale):
                    self.policy.attach(encode_prompts(self.policy, self.eval_dataset, *ranks))
        self.policy.offload_encoders()
        self._prompts_precomputed = True


class _AfterUpdate(TrainerCallback):
    """Follows each optimizer step with the moving average, and the last one with the weights on disk."""

    def __init__(self, trainer: FlowGRPOTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._ema is not None:
            self.trainer._ema.step(self.trainer._shards)
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            self.trainer._save_for_last_evaluation()
