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

"""Weights sharded over processes by FSDP2, and optimizer states by DeepSpeed ZeRO-1 and ZeRO-2."""

import dataclasses
import os
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from ..policy import FlowPolicy
from .transitions import TrainedStep


def check_sharding(args: TrainingArguments):
    """
    Refuses what cannot train here of what a launcher, or the settings, have asked for.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings, made in the launcher's environment.

    Raises:
        ValueError: For FSDP1, ZeRO-3 and what the run's own settings stand for, with what to use in its place.
    """
    precision = args.mixed_precision
    if args.deepspeed_plugin is not None:
        stage = args.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise ValueError(
                f"zero_stage={stage}: expected 1 or 2. Stage 3 takes the weights apart, and evaluates pipelines by one forward "
                "of the whole model: use FSDP2 for it (--accelerate_config fsdp2). Stage 0 is --multi_gpu."
            )
        precision = _deepspeed_precision(args.deepspeed_plugin.deepspeed_config, precision)
    elif args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        given = args.fsdp_plugin_args or {}
        version = int(given.get("fsdp_version") or os.environ.get("FSDP_VERSION", 1))
        if version != 2:
            raise ValueError(
                f"fsdp_version={version}: its flat parameters have one dtype, and an adapter is float32 beside frozen weights "
                "that need not be. Use fsdp_version: 2 (--accelerate_config fsdp2)."
            )
        plugin = FullyShardedDataParallelPlugin(**given)
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                "fsdp_offload_params=true keeps the denoiser on the CPU, and its pipeline computes where the denoiser is. Set "
                "it to false: the more processes, the less each holds."
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing=true changes the names of layers, which an adapter is saved by. Set it to "
                "false, and activation_checkpointing: true among the run's settings."
            )
    else:
        return
    if precision == "fp16":
        raise ValueError("fp16=True scales the loss, which FSDP2 and DeepSpeed cannot do here. Use bf16=True.")


def _deepspeed_precision(config: dict, default: str) -> str:
    """What a DeepSpeed configuration says of mixed precision, where it says anything."""
    enabled = {name: config.get(name, {}).get("enabled", False) for name in ("fp16", "bf16")}
    return next((name for name, value in enabled.items() if value is True), default)


def check_sharded_policy(policy: FlowPolicy, is_deepspeed: bool):
    """
    Refuses policies that do not fit FSDP2, or DeepSpeed.

    Raises:
        ValueError: For quantised denoisers with FSDP2, and where DeepSpeed has two denoisers of which one is trained.
    """
    all_of_them = [name for name in policy.family.components if getattr(policy.pipeline, name, None) is not None]
    quantized = [
        name for name in policy.components if getattr(getattr(policy.pipeline, name), "hf_quantizer", None) is not None
    ]
    if is_deepspeed and len(policy.components) < len(all_of_them):
        raise ValueError(
            f"Only {', '.join(policy.components)} of {', '.join(all_of_them)} has an adapter: DeepSpeed makes an update in a "
            "backward pass, and that of the last step may have none. Give the other one an adapter too, or use --multi_gpu."
        )
    if quantized and not is_deepspeed:
        raise ValueError(
            f"quantization: FSDP2 would cut the quantised weights of {', '.join(quantized)} to pieces that their kernels do "
            "not know. Drop one of the two: --multi_gpu with quantization, or fsdp2 with dtype bfloat16."
        )


def check_layers(policy: FlowPolicy, plugin: FullyShardedDataParallelPlugin):
    """
    Refuses a denoiser that would be gathered as a whole because nobody says which layers it has.

    Raises:
        ValueError: With where to name them.
    """
    by_class = plugin.auto_wrap_policy is transformer_auto_wrap_policy
    if by_class and not (plugin.transformer_cls_names_to_wrap or policy._no_split_modules):
        raise ValueError(
            f"diffusers does not say which layers of {type(getattr(policy.pipeline, policy.components[0])).__name__} FSDP2 is "
            "to gather one by one. Name their classes as fsdp_transformer_layer_cls_to_wrap in the file of "
            "--accelerate_config."
        )


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What `shard_of` a whole tensor would be, if it were sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    whole = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def whole(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor, from all processes' parts of it, which are sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


class ShardingMixin:
    """
    The part of the trainer that knows of FSDP2 and DeepSpeed.

    With FSDP2 each velocity gathers the weights, block by block, from all processes: they must evaluate it equally often. A
    process that has less to evaluate repeats something of its own, and counts it as nothing.
    """

    @property
    def is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def optimizer_parts(self) -> str:
        """In what parts a checkpoint holds the optimizer: it goes on with the same ones only."""
        if self.is_fsdp_enabled:
            return f"FSDP2 with {self.accelerator.state.fsdp_plugin.state_dict_type.name}"
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return f"DeepSpeed ZeRO-{stage} with num_processes={self.args.world_size}"
        return "neither FSDP nor DeepSpeed"

    def prepare_sharding(self):
        """Settles what the launcher's configuration leaves open, or would do to the policy's precision."""
        if not self.is_sharded:
            return
        check_sharded_policy(self.policy, self.is_deepspeed_enabled)
        self.policy.most_calls = self._most
        precision = self.args.mixed_precision
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_layers(self.policy, plugin)
            # All processes have loaded the weights; accelerate's way to send them fails for models with buffers.
            plugin.cpu_ram_efficient_loading = False
            # Latents and velocities are float32, and weights keep their dtype, as on one process.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        else:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            precision = _deepspeed_precision(config, precision)
            # It would cast an adapter to half precision together with the frozen weights.
            config.pop("fp16", None)
            config.pop("bf16", None)
        if precision == "bf16":
            # As accelerate does for DDP.
            self.policy.forward = torch.autocast(self.accelerator.device.type, torch.bfloat16)(self.policy.forward)

    def _most(self, counts: list[int]) -> list[int]:
        """The largest of each of these numbers among the processes."""
        counts = torch.tensor(counts, device=self.accelerator.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        return counts.tolist()

    def _with_repeats(self, steps: list[TrainedStep]) -> list[TrainedStep]:
        """The steps of a micro-batch that any process trains, with repeats up to the chunks of the one that has most."""
        chunks = [len(at.parts(self.batch_sizes["training"].rows)) for at in steps]
        return [
            dataclasses.replace(at, repeats=most - own)
            for at, own, most in zip(steps, chunks, self._most(chunks), strict=True)
            if most > 0
        ]

    def _synchronised(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Context of the backward pass of a micro-batch's last chunk, or of another one."""
        if self.is_deepspeed_enabled:
            return self._boundary(last)
        if self.is_fsdp_enabled:
            # Trainer turns it off until an update's last micro-step: whole gradients would wait in memory, not parts of them.
            model.set_requires_gradient_sync(True)
        return nullcontext()

    @contextmanager
    def _boundary(self, last: bool):
        """DeepSpeed takes the optimizer's step in the backward pass that is told to: an update's last."""
        state = self.accelerator.gradient_state
        boundary = state.sync_gradients
        state._set_sync_gradients(boundary and last)
        try:
            yield
        finally:
            state._set_sync_gradients(boundary)

    def _backward(self, loss: torch.Tensor):
        # The loss has been divided by the number of micro-steps.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def _whole_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of a gradient, from that of this process's shards."""
        if self.is_fsdp_enabled and self.args.world_size > 1:
            # Where nothing has a gradient, the norm is 0 on the CPU, which NCCL does not exchange.
            torch.distributed.all_reduce(squares := norm.to(self.accelerator.device).square())
            norm = squares.sqrt()
        return norm

    # ---- What is trained, in parts and as a whole ----

    @property
    def _shards(self) -> list[torch.Tensor]:
        """This process's parts of what is trained, as leaves in the same memory."""
        return [shard_of(parameter.detach()).requires_grad_() for parameter in self._trainable]

    def _to_shards(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """This process's parts of whole tensors, one for each parameter that is trained; of parts the same."""
        return [
            shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
            for tensor, parameter in zip(tensors, self._trainable, strict=True)
        ]

    def _whole(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors, of the parts that all processes have of them."""
        return [whole(shard, parameter) for shard, parameter in zip(shards, self._trainable, strict=True)]

    def _gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """What is trained, whole and on the CPU, in the first process; `None` where it is whole everywhere."""
        if not self.is_fsdp_enabled:
            return None
        named = self.policy.state_dict() if self.args.full_finetuning else dict(self.policy.named_parameters())
        weights = {}
        for name, value in named.items():
            if self.args.full_finetuning or value.requires_grad:
                value = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
                if self.args.should_save:
                    weights[name] = value.cpu()
        return weights

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if self.is_sharded:
            # Not the frozen weights, which Trainer would gather with the others.
            self._save(output_dir, self._gathered_weights())
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # Trainer saves the whole model, too.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # The first thing after the model has been sharded, and before a checkpoint is loaded into it.
        if self.is_fsdp_enabled:
            # The root's weights, too: those of the moving average, or of another policy, are exchanged in the shards.
            self.policy.set_reshard_after_forward(True, recurse=False)
            if self._ema is not None:
                self._ema.shadow_params = self._to_shards(self._ema.shadow_params)
        return super().create_scheduler(num_training_steps, optimizer)
