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

"""Settings that save memory: what they change, which is nothing or rounding, and what they refuse."""

import math

import pytest
import torch
from accelerate.utils import DistributedType
from pipelines import tiny_sd3
from tiny import tiny_pipeline
from trainer.observing import logged, randomize
from transformers import TrainerCallback

from trl_flow.trainer.arguments import check_gradient_scale


# ---- Frozen weights in half precision ----


def flux(dtype):
    return tiny_pipeline("FluxPipeline").to(dtype)


FLUX = {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": None, "num_generations": 8}


class KeepGradient(TrainerCallback):
    """Keeps the gradient of an update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()


def test_half_precision_trains_as_float32_does(make_trainer, tmp_path):
    """
    The adapter's gradient is that of float32 weights, to the rounding of half precision. Without scaling, most of what
    passes float16 weights here is rounded away, and the gradient is off by a fifth; with real sizes, all of it is.
    """
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keeping, settings = KeepGradient(), {"gradient_accumulation_steps": 2, **FLUX}
        output_dir = str(tmp_path / str(dtype))
        trainer = make_trainer(model=flux(dtype), callbacks=[keeping], output_dir=output_dir, **settings)
        randomize(trainer)
        trainer.train()
        gradients[dtype] = keeping.gradient
        assert {p.dtype for p in trainer._trainable} == {torch.float32}
        assert {p.dtype for p in trainer.policy.parameters() if not p.requires_grad} == {dtype}
        assert (logged(trainer, "ratio/min"), logged(trainer, "ratio/max")) == ([1.0], [1.0])
    exact = gradients[torch.float32]
    for dtype, bound in ((torch.bfloat16, 0.3), (torch.float16, 0.04)):
        error = (gradients[dtype] - exact).norm() / exact.norm()
        assert error < bound


def test_gradients_of_other_precisions_are_not_scaled(make_trainer):
    for dtype in (torch.float32, torch.bfloat16):
        assert make_trainer(model=flux(dtype), **FLUX).policy.gradient_scale == 1


def test_overflow_ends_the_run_before_an_update(make_trainer):
    """In rollouts: float16 ends at 65504."""
    pipeline = flux(torch.float16)
    trainer = make_trainer(model=pipeline, **FLUX)
    with torch.no_grad():
        pipeline.transformer.x_embedder.weight.fill_(6e4)
    before = [p.detach().clone() for p in trainer._trainable]
    with pytest.raises(ValueError, match=r"latents that hold NaN or infinity, at step 0, .*torch.float16.*bfloat16"):
        trainer.train()
    assert all(torch.equal(one, two) for one, two in zip(before, trainer._trainable, strict=True))


def test_a_vae_that_overflows_is_told_from_a_denoiser(make_trainer):
    pipeline = tiny_sd3()
    trainer = make_trainer(model=pipeline)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"VAE decodes finite latents to pictures.*earlier checkpoint"):
        trainer.train()


def test_a_gradient_that_is_no_number_ends_the_run(make_trainer):
    trainer = make_trainer()
    randomize(trainer)
    before = [p.detach().clone() for p in trainer._trainable]
    trainer._trainable[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="The gradient holds NaN or infinity at step 0"):
        trainer.train()
    assert all(torch.equal(one, two) for one, two in zip(before, trainer._trainable, strict=True))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_scaled_gradients_need_whole_parameters(kind):
    with pytest.raises(ValueError, match=f"dtype='float16' with {kind.value}: .*bfloat16"):
        check_gradient_scale(1024.0, kind)
    check_gradient_scale(1.0, kind)
    check_gradient_scale(1024.0, DistributedType.MULTI_GPU)
