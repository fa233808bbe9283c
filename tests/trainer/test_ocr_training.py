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
"""Training on what is read in the pictures: a small pipeline that writes a word, and the OCR reward, end to end."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont
from pipelines import sd3_pipeline, tiny_vae
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle

from trl_flow import FlowGRPOConfig


WORD = "OPEN"


@pytest.fixture(scope="module")
def writer() -> StableDiffusion3Pipeline:
    """A pipeline fitted to one picture of 64 x 64 with a word: legible from some noises, and not from others."""
    torch.manual_seed(0)
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).text((4, 20), WORD, fill="black", font=ImageFont.load_default(20))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    clean = pixel_unshuffle(pixels, 2)

    vae = tiny_vae(
        12, layers_per_block=1, scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False
    )
    optimizer = torch.optim.Adam(vae.decoder.parameters(), 1e-2)
    for _ in range(100):
        latents = clean + 0.3 * torch.randn_like(clean)
        optimizer.zero_grad()
        mse_loss(vae.decoder(latents), pixel_shuffle(latents, 2)).backward()
        optimizer.step()

    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=4,
        in_channels=12,
        out_channels=12,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    optimizer = torch.optim.Adam(transformer.parameters(), 3e-3)
    for _ in range(200):
        sigma, noise = 0.3 + 0.7 * torch.rand(4, 1, 1, 1), torch.randn(4, *clean.shape[1:])
        velocity = transformer(
            (1 - sigma) * clean + sigma * noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=torch.randn(4, 12, 32),
            pooled_projections=torch.randn(4, 32),
        ).sample
        optimizer.zero_grad()
        mse_loss(velocity, noise - clean).backward()
        optimizer.step()

    return sd3_pipeline(transformer, vae)


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recursion."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


def test_training_on_what_is_read(writer, make_trainer):
    from rapidocr import RapidOCR

    dataset = Dataset.from_dict({"prompt": ["a red circle", "a blue square"], "target": [WORD] * 2})
    trainer = make_trainer(
        config_class=FlowGRPOConfig,
        model=writer,
        reward_funcs="ocr",
        train_dataset=dataset,
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=2,
        max_sequence_length=12,
        noise_level=0.1,
    )
    decode, pictures = trainer.start_decoding, []

    def recorded(latents, conditioning):
        pictures.append(decode(latents, conditioning)())
        return lambda: pictures[-1]

    trainer.start_decoding = recorded
    trainer.train()

    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Det.limit_type": "max",
            "Det.limit_side_len": 320,
            "Global.use_cls": False,
            "Global.text_score": 0.0,
        }
    )
    expected = []
    for image in sum(pictures, []):
        found = engine(np.array(image)[:, :, ::-1]).txts or ()
        text = "".join(found).replace(" ", "").lower()
        expected.append(max(0.0, 1 - distance(text, WORD.lower()) / len(WORD)))
    logs = [entry for entry in trainer.state.log_history if "rewards/ocr/mean" in entry]
    assert [entry["rewards/ocr/mean"] for entry in logs] == pytest.approx(
        [np.mean(expected[:8]), np.mean(expected[8:])]
    )
    assert 0 < np.mean(expected) < 1
    assert any(entry["frac_reward_zero_std"] < 1 and entry["grad_norm"] > 0 for entry in logs)
    assert all(entry["frac_reward_nan"] == 0 for entry in logs)
