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

"""Memory that does not suffice: the run goes on in smaller batches, with the same result to rounding."""

import gc
import weakref

import pytest
import torch

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, DiffusionNFTConfig, DiffusionNFTTrainer
from trl_flow.trainer.batch_size import BatchSize


class Memory:
    """A denoiser and a decoder that have room for so many rows only, in their forward or their backward pass."""

    def __init__(self, trainer, rows, backward=False, decoder=None):
        self.rows, self.backward, self.failures, self.sizes = rows, backward, 0, []
        trainer.policy.pipeline.transformer.register_forward_hook(self.forward, with_kwargs=True)
        if decoder is not None:
            vae = trainer.policy.pipeline.vae
            decode = vae.decode

            def limited(latents, *args, **kwargs):
                self.check(len(latents), decoder)
                return decode(latents, *args, **kwargs)

            vae.decode = limited

    def check(self, rows, limit):
        if rows > limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.sizes.append(rows)

    def forward(self, module, args, kwargs, output):
        rows = len(kwargs["hidden_states"])
        if self.backward and output[0].requires_grad:
            # When its gradient arrives, that of the last layers has been added already.
            module.transformer_blocks[0].register_forward_hook
            self.first.register_hook(lambda gradient: self.check(rows, self.rows))
        else:
            self.check(rows, self.rows)
