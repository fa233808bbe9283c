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
"""
Trains a tiny pipeline on the CPU as a launcher's FSDP2 or DeepSpeed configuration would have it trained on GPUs.

    torchrun --nproc_per_node 2 sharded_run.py FOLDER KIND CASE ...

KIND is `plain`, `fsdp2`, `zero1` or `zero2`. accelerate takes neither FSDP nor DeepSpeed where there are only CPUs: it is told
that there are several GPUs, and all that follows is what it does there, by gloo.
"""

import os
import sys


folder, kind, cases = sys.argv[1], sys.argv[2], sys.argv[3:]
if kind == "fsdp2":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": os.environ.get("STATE_DICT_TYPE", "FULL_STATE_DICT"),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
elif kind.startswith("zero"):
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": kind[-1],
    }
if kind != "plain":
    os.environ["ACCELERATE_MIXED_PRECISION"] = os.environ.get("PRECISION", "no")

import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from peft import LoraConfig  # noqa: E402
from pipelines import brightness, prompts, tiny_sd3  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from trainer.test_every_family import settings_of  # noqa: E402

import trl_flow  # noqa: E402
from trl_flow.report import live  # noqa: E402


live.write_report = lambda *args, **kwargs: None  # it has tests of its own


def uneven(prompts, images, **kwargs):
    """Some groups have nothing to learn from, so that processes have different numbers of transitions."""
    scores = brightness(prompts=prompts, images=images, **kwargs)
    return [0.0 if "blue" in prompt else score for prompt, score in zip(prompts, scores, strict=True)]


SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "max_steps": 3,
    "learning_rate": 1.0,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "num_inference_steps": 4,
    "num_eval_inference_steps": 3,
    "num_generations": 4,
    "guidance_scale": 1.0,
    "max_sequence_length": 2,
    "ema_decay": 0,
    "beta": 0.0,
    "scale_rewards": "group",
    "transition_batch_size": 2,
    "rollout_batch_size": 4,
    "logging_steps": 1,
}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.05, "max_grad_norm": 0.1}
CASES = {
    "FlowGRPO": {"beta": 0.1, "gradient_accumulation_steps": 2},
    "clipped": {"method": "FlowGRPO", **ADAM},
    "G2RPO": {"granularities": [1, 2], "sde_steps": [0, 1]},
    "DiffusionNFT": {"old_policy_decay_rate": 0.5},
    "AWM": {},
    "checkpointing": {"method": "DenseGRPO", "gradient_checkpointing": True},
    # Its gradients are small. Adam's moves are not, and a few of them later a pixel differs, and with it a reward.
    "WanPipeline/2.2": {"method": "FlowGRPO", "learning_rate": 1e3, "max_grad_norm": 1e-6},
    "compiled": {"method": "FlowGRPO", "torch_compile": True, "torch_compile_backend": "aot_eager"},
    "spoiled": {"method": "FlowGRPO", "max_steps": 2},
    "half": {"method": "FlowGRPO", "bf16": True},
    "complete": {"method": "FlowGRPO", "full_finetuning": True, "ema_decay": 0.5, "learning_rate": 0.1},
    "kept": {
        "method": "FlowGRPO",
        **ADAM,
        "ema_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_iterations": 2,
    },
    "resumed": {"method": "FlowGRPO", **ADAM, "ema_decay": 0.5, "num_iterations": 2},
}


def trainer_of(case: str) -> trl_flow.FlowGRPOTrainer:
    settings = SETTINGS | CASES[case]
    if case.partition("/")[0].endswith("Pipeline"):
        settings |= settings_of(case)
        del settings["image"]
        pipeline = tiny_pipeline(case)
    else:
        pipeline = tiny_sd3()
    method = settings.pop("method", case)
    world = int(os.environ.get("WORLD_SIZE", 1))
    AcceleratorState._reset_state(reset_partial_state=False)
    config = getattr(trl_flow, f"{method}Config")(
        output_dir=f"{folder}/{kind}/{case}",
        per_device_train_batch_size=4 // world,
        eval_strategy="steps",
        eval_steps=1,
        **settings,
    )
    if kind != "plain":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = getattr(trl_flow, f"{method}Trainer")(
        pipeline.to(torch.bfloat16) if case == "half" else pipeline,
        uneven,
        config,
        prompts(8),
        prompts(5),  # one more for the first process than for the second
        peft_config=None if config.full_finetuning else LoraConfig(r=2, lora_alpha=6, target_modules=None),
    )
    if not config.full_finetuning:
        torch.manual_seed(0)
        for parameter in trainer._trainable:  # LoRA begins with zeros, which have no gradient for the other half
            parameter.data = 0.1 * torch.randn(parameter.shape)
    if trainer._ema is not None:
        trainer._ema.shadow_params = [parameter.detach().clone() for parameter in trainer._trainable]
    return trainer


def spoil(trainer):
    """The second process's gradient of the second update is no number."""
    loss = trainer.policy_loss

    def spoiled(*args):
        losses, logs = loss(*args)
        spoils = trainer.state.global_step == 1 and trainer.args.process_index == 1
        return losses * float("nan") if spoils else losses, logs

    trainer.policy_loss = spoiled


for case in cases:
    trainer = trainer_of(case)
    if case == "spoiled":
        spoil(trainer)
        try:
            trainer.train()
        except ValueError as error:
            finite = all(p.isfinite().all() for p in trainer._shards)
            with open(f"{folder}/{kind}/{case}/{trainer.args.process_index}.txt", "w") as file:
                file.write(f"{error} finite={finite}")
        continue
    before = [parameter.detach().clone() for parameter in trainer._trainable]
    trainer.train(resume_from_checkpoint=f"{folder}/{kind}/kept/checkpoint-2" if case == "resumed" else None)
    expected = {"plain": "NO", "fsdp2": "FSDP"}.get(kind, "DEEPSPEED")
    assert trainer.accelerator.distributed_type == expected, trainer.accelerator.distributed_type
    assert all(isinstance(parameter, DTensor) == (kind == "fsdp2") for parameter in trainer.policy.parameters())
    dtypes = (
        {p.dtype for p in trainer._trainable},
        {p.dtype for p in trainer.policy.parameters() if not p.requires_grad},
    )
    assert (
        dtypes == ({torch.float32}, {torch.bfloat16})
        if case == "half"
        else torch.bfloat16 not in dtypes[0] | dtypes[1]
    )
    after = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer._trainable]
    moved = max((p - q).abs().max().item() for p, q in zip(after, before, strict=True))
    assert moved > 5e-5, f"{case}: {moved}"
    shares = [entry["grad_share/step_0"] for entry in trainer.state.log_history if "grad_share/step_0" in entry]
    assert not (shares and kind.startswith("zero")) and all(0 <= share <= 1 for share in shares)
    if trainer.is_world_process_zero():
        scores = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
        torch.save({"scores": scores, "shares": shares}, f"{folder}/{kind}/{case}/noted.pt")
    trainer.accelerator.wait_for_everyone()
