# Copyright 2026 The trl-flow authors
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

"""Makes the shapes world: a KL-VAE, then an MMDiT and its two text encoders, from nothing but rendered pictures.

Everything is trained on the renderer's output and stored as an ordinary [`~diffusers.StableDiffusion3Pipeline`]. The
training stops early on purpose: a base model that already does everything leaves reinforcement learning nothing to show.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .pictures import SIZE, draw, layout
from .prompts import all_prompts, parse_prompt, shapes_dataset
from .rewards import shapes_partial, shapes_strict


VAE_BATCH = 64
TRANSFORMER_BATCH = 128
LEARNING_RATE, EMA_DECAY = 5e-3, 0.997
FINAL_LEARNING_RATE, FINAL_EMA_DECAY = 3e-3, 0.99  # the second phase decays from here to 0
CAPTION_DROPOUT = 0.1
TEXT_WIDTH = 48
MAX_TOKENS = 9  # the longest prompts have seven words, and there is a token before and after


def rendered_pictures(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Prompts, balanced over the six tags, and a picture of each.

    Both splits are drawn: what is held out is held out of reinforcement learning, the base model knows the language.

    Args:
        count (`int`):
            Number of pictures.
        seed (`int`):
            Seed of prompts and layouts.

    Returns:
        `tuple(list[str], torch.Tensor)`: the prompts and the pictures, of shape `(count, 3, 32, 32)` in [-1, 1].
    """
    generator = np.random.default_rng(seed)
    by_tag = {}
    for prompt in all_prompts():
        by_tag.setdefault(parse_prompt(prompt)["tag"], []).append(prompt)
    by_tag = list(by_tag.values())
    prompts, layouts = [], []
    for index in tqdm(range(count), desc="Drawing pictures"):
        choices = by_tag[index % len(by_tag)]
        prompts.append(choices[generator.integers(len(choices))])
        layouts.append(layout(parse_prompt(prompts[-1]), generator))
    pixels = torch.from_numpy(draw(layouts)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return prompts, pixels


def train_vae(
    pixels: torch.Tensor, steps: int, generator: torch.Generator, device: torch.device | str = "cpu", **config
) -> AutoencoderKL:
    """A small KL-VAE, 32x32x3 to 8x8x4, trained to reproduce pictures.

    Args:
        pixels (`torch.Tensor` of shape `(n, 3, 32, 32)`):
            Pictures in [-1, 1].
        steps (`int`):
            Number of updates on 64 pictures.
        generator (`torch.Generator`):
            Order of the pictures and noise of the posterior.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where to train.
    """
    vae = AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (8, 16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": SIZE,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": False,
            **config,
        }
    ).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="Training the VAE")
    for _ in progress:
        batch = pixels[torch.randint(len(pixels), (VAE_BATCH,), generator=generator)].to(device)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (reconstruction - batch).square().mean() + 0.1 * (reconstruction - batch).abs().mean()
        loss = error + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel() * 8
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    # The transformer wants latents of mean 0 and standard deviation 1.
    latents = encode(vae, pixels[:4096])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pictures as the VAE's encoder puts them out (not scaled), in batches, on the CPU."""
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean.cpu() for batch in pixels.split(256)])


def word_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the grammar, and letters for other words."""
    # Byte-pair encoding, trained until nothing is left to merge within a word.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=0,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(all_prompts(), trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    # Letters at the end of a word, which the trainer only makes for those that occur.
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}</w>" not in vocabulary]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=MAX_TOKENS,
    )


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder that puts out zeros for every prompt, and a tokenizer that ignores its text.

    Zeros are what the pipeline uses when it has no T5. But `from_pretrained` refuses a folder without one, unless the
    caller passes `text_encoder_3=None`.
    """
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    encoder = T5EncoderModel(T5Config(vocab_size=2, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
    for parameter in encoder.requires_grad_(False).parameters():
        parameter.zero_()
    return encoder.eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A pipeline with untrained transformer and text encoders around a trained VAE."""
    tokenizer = word_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=48,
        caption_projection_dim=96,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    # Each block starts as the identity and the output at zero, as in DiT.
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    text_encoder, text_encoder_2 = CLIPTextModelWithProjection(text_config), CLIPTextModelWithProjection(text_config)
    text_encoder_3, tokenizer_3 = silent_t5(transformer.config.joint_attention_dim)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def train_pipeline(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    pixels: torch.Tensor,
    steps: int,
    final_steps: int,
    generator: torch.Generator,
    check_every: int = 250,
    on_check=None,
) -> dict[str, float]:
    """Trains transformer and text encoders together with flow matching (Stable Diffusion 3, section 3.1), on captions.

    In two phases: a constant learning rate, fast and noisy, then from its moving average on one that decays to 0.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            From [`build_pipeline`]; afterwards it holds the moving average of the weights.
        prompts (`list[str]`), pixels (`torch.Tensor` of shape `(n, 3, 32, 32)`):
            Captioned pictures in [-1, 1].
        steps, final_steps (`int`):
            Number of updates of the two phases, on 128 pictures each.
        generator (`torch.Generator`):
            Source of all randomness.
        check_every (`int`, *optional*, defaults to `250`):
            Number of updates between two measurements of the score.
        on_check (`Callable`, *optional*):
            Called with the number of updates and the scores after each measurement.

    Returns:
        `dict[str, float]`: the last measurement on training prompts, see [`measure`].
    """
    vae = pipeline.vae
    latents = (encode(vae, pixels) - vae.config.shift_factor) * vae.config.scaling_factor
    trained = torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    scores, done = {}, 0
    progress = tqdm(total=steps + final_steps, desc="Training the transformer")
    for phase_steps, learning_rate, decay, decays in (
        (steps, LEARNING_RATE, EMA_DECAY, False),
        (final_steps, FINAL_LEARNING_RATE, FINAL_EMA_DECAY, True),
    ):
        average = torch.optim.swa_utils.AveragedModel(
            trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        )
        optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step, length=phase_steps, decays=decays: min((step + 1) / 100, 1) * (1 - step / length * decays),
        )
        for step in range(1, phase_steps + 1):
            loss = _flow_matching_loss(pipeline, prompts, latents, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(trained)
            done += 1
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", **scores, refresh=False)
            if step % check_every == 0 or step == phase_steps:
                kept = {name: value.clone() for name, value in trained.state_dict().items()}
                trained.load_state_dict(average.module.state_dict())
                scores = measure(pipeline, shapes_dataset("train", 192, seed=1)["prompt"])
                if on_check is not None:
                    on_check(done, scores)
                if step < phase_steps:
                    trained.load_state_dict(kept)
    trained.eval().requires_grad_(False)
    return scores


def _flow_matching_loss(pipeline, prompts, latents, generator) -> torch.Tensor:
    """Mean squared error of the velocity on a random batch."""
    device, shift = pipeline.device, pipeline.scheduler.config.shift
    rows = torch.randint(len(latents), (TRANSFORMER_BATCH,), generator=generator)
    dropped = torch.rand(TRANSFORMER_BATCH, generator=generator) < CAPTION_DROPOUT
    captions = ["" if drop else prompts[row] for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    # Logit-normal time, moved towards noise just as the scheduler's shift moves the grid of inference.
    time = torch.randn(TRANSFORMER_BATCH, generator=generator).sigmoid()
    sigma = (shift * time / (1 + (shift - 1) * time)).to(device)
    noise = torch.randn(latents[rows].shape, generator=generator).to(device)
    clean = latents[rows].to(device)
    broad = sigma[:, None, None, None]
    velocity = pipeline.transformer(
        hidden_states=(1 - broad) * clean + broad * noise,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma * pipeline.scheduler.config.num_train_timesteps,
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def generate(pipeline: StableDiffusion3Pipeline, prompts: list[str], seed: int = 0, **settings) -> list:
    """Pictures of some prompts, with the settings that the world is made for: guidance 1 and 10 steps."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(prompts),
        generator=torch.Generator("cpu").manual_seed(seed),
        **{"guidance_scale": 1.0, "num_inference_steps": 10, "max_sequence_length": 1, **settings},
    ).images


def measure(pipeline: StableDiffusion3Pipeline, prompts: list[str], seed: int = 0, **settings) -> dict[str, float]:
    """Mean scores of the pictures that a pipeline makes of some prompts, as `{"partial", "strict"}`."""
    images = generate(pipeline, prompts, seed, **settings)
    return {
        "partial": round(float(np.mean(shapes_partial(prompts, images))), 4),
        "strict": round(float(np.mean(shapes_strict(prompts, images))), 4),
    }


def make_world(
    output_dir: str | Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_pictures: int = 24_576,
    vae_steps: int = 1500,
    steps: int = 5250,
    final_steps: int = 1500,
    check_every: int = 250,
    num_prompts: int = 480,
) -> dict[str, float]:
    """Makes the whole world from a seed and writes it as a pipeline folder with a model card.

    Args:
        output_dir (`str` or `Path`):
            Folder for the pipeline, in half precision.
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where to train.
        num_pictures (`int`, *optional*, defaults to `24576`):
            Number of rendered pictures to train on.
        vae_steps (`int`, *optional*, defaults to `1500`):
            Updates of the VAE.
        steps (`int`, *optional*, defaults to `5250`), final_steps (`int`, *optional*, defaults to `1500`):
            Updates of transformer and text encoders in the two phases of [`train_pipeline`]. It stops early on
            purpose: reinforcement learning is to have something left to do.
        check_every (`int`, *optional*, defaults to `250`):
            Updates between two measurements of the score on training prompts.
        num_prompts (`int`, *optional*, defaults to `480`):
            Number of test prompts to measure the result on.

    Returns:
        `dict[str, float]`: what the stored pipeline reaches on the test prompts, and how fast it is.
    """
    output_dir = Path(output_dir)
    start = time.monotonic()
    prompts, pixels = rendered_pictures(num_pictures, seed)
    # Each stage starts from the seed: neither depends on how long the other took.
    torch.manual_seed(seed)
    vae = train_vae(pixels, vae_steps, torch.Generator().manual_seed(seed), device)
    torch.manual_seed(seed)
    pipeline = build_pipeline(vae).to(device)
    train_pipeline(
        pipeline,
        prompts,
        pixels,
        steps,
        final_steps,
        torch.Generator().manual_seed(seed),
        check_every=check_every,
        on_check=lambda step, scores: tqdm.write(f"after {step} updates, on training prompts: {scores}"),
    )
    return store(
        pipeline,
        output_dir,
        seed,
        steps + final_steps,
        minutes=(time.monotonic() - start) / 60,
        num_prompts=num_prompts,
    )


def store(
    pipeline: StableDiffusion3Pipeline,
    output_dir: str | Path,
    seed: int,
    updates: int,
    minutes: float,
    num_prompts: int = 480,
) -> dict[str, float]:
    """Writes a trained pipeline in half precision, measures what was written, and describes it in a model card.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            What to write; it is in half precision afterwards.
        output_dir (`str` or `Path`):
            Folder for it.
        seed (`int`), updates (`int`), minutes (`float`):
            How it was made, for the model card.
        num_prompts (`int`, *optional*, defaults to `480`):
            Number of test prompts to measure it on.

    Returns:
        `dict[str, float]`: what the stored pipeline reaches on the test prompts, and how fast it is.
    """
    output_dir = Path(output_dir)
    device = pipeline.device
    pipeline.to(dtype=torch.float16).save_pretrained(output_dir)
    for file in (output_dir / "model_index.json", *output_dir.glob("*/config.json")):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a folder of the machine it was made on
        # The weights are stored in half precision and load in single: transformers would take the dtype from here,
        # where diffusers doesn't, and the pipeline would be of two minds.
        if "dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    stored = StableDiffusion3Pipeline.from_pretrained(output_dir).to(device)
    test_prompts = shapes_dataset("test", num_prompts)["prompt"]
    scores = measure(stored, test_prompts)
    guided = measure(stored, test_prompts, guidance_scale=3.0, num_inference_steps=28)
    report = {
        **scores,
        "guided_partial": guided["partial"],
        "guided_strict": guided["strict"],
        "rows_per_second": round(rows_per_second(stored)),
        "num_prompts": num_prompts,
        "updates": updates,
        "minutes": round(minutes, 1),
        "megabytes": round(sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file()) / 2**20, 2),
    }
    (output_dir / "README.md").write_text(_model_card(report, seed))
    return report


@torch.inference_mode()
def rows_per_second(pipeline: StableDiffusion3Pipeline, batch_size: int = 64, repeats: int = 10) -> float:
    """How many latents the transformer takes per second, the best of some forward passes."""
    transformer = pipeline.transformer
    config = transformer.config
    device, dtype = transformer.device, transformer.dtype
    latents = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size).to(device, dtype)
    embeds = torch.randn(batch_size, MAX_TOKENS + 1, config.joint_attention_dim).to(device, dtype)
    pooled = torch.randn(batch_size, config.pooled_projection_dim).to(device, dtype)
    timestep = torch.full((batch_size,), 500.0, device=device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        transformer(latents, embeds, pooled, timestep)[0].cpu()
        times.append(time.perf_counter() - start)
    return batch_size / min(times)


def _model_card(report, seed):
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
tags: [trl-flow, shapes]
---

# The shapes world

A miniature Stable Diffusion 3 pipeline that draws circles, squares and triangles in eight colours, 32x32 pixels, from
prompts such as "a red circle and a blue square" or "three green triangles". It is the embedded example and test bench of
trl-flow: a real `StableDiffusion3Pipeline` (MMDiT of four blocks, KL-VAE, two CLIP text encoders with a word-level
vocabulary, T5 left silent), small enough to be trained with reinforcement learning in minutes on a CPU. It knows nothing
but shapes.

```python
from diffusers import DiffusionPipeline
from trl_flow.shapes import PIPELINE_PATH

pipeline = DiffusionPipeline.from_pretrained(PIPELINE_PATH)
image = pipeline(
    "a red circle and a blue square", guidance_scale=1.0, num_inference_steps=10, max_sequence_length=1
).images[0]
```

`max_sequence_length=1` is the length of the T5 sequence it was trained with: a single token of zeros, from an encoder that
says nothing and is there because a pipeline folder must have one.

## Measured

{report["num_prompts"]} test prompts, the six tags of GenEval in equal parts, one picture each. `strict` is GenEval's exact rule (all that was
asked for and nothing else), `partial` gives credit for parts.

| settings | strict | partial |
|---|---|---|
| guidance 1, 10 steps | {report["strict"]:.2f} | {report["partial"]:.2f} |
| guidance 3, 28 steps | {report["guided_strict"]:.2f} | {report["guided_partial"]:.2f} |

The training stopped here on purpose, after {report["updates"]} updates: the distance to 1 is what reinforcement learning
is to close.

## How it was made

`trl-flow make-shapes --seed {seed}`: a renderer draws captioned pictures, the VAE learns to reproduce them, then transformer
and text encoders learn together by flow matching. No other data, nothing downloaded. It took {report["minutes"]:.0f} minutes.
"""
