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

"""How close a picture is to its prompt in the embedding of a CLIP: CLIP score, PickScore and HPS v2.1."""

import html
from collections import OrderedDict
from collections.abc import Callable

import ftfy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from .convert import open_clip_vit_h
from .models import (
    ModelReward,
    SharedModel,
    clip_in,
    from_state_dict,
    is_checkpoint,
    load_clip,
    normalized,
    pooled,
    read_checkpoint,
    resized,
    share,
)
from .reward import About


# Embeddings of this many prompts are kept: 16 MB.
_PROMPTS_KEPT = 4096


class CLIPReward(ModelReward):
    """
    Cosine between the embeddings of picture and prompt.

    Prompts are cut at 77 tokens. The embedding of a prompt is computed once, and kept while it is among the last 4,096.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            A `CLIPModel` of transformers: a repository on the Hub or a directory.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        processor (`str`, *optional*):
            Where tokenizer and image processor come from. Defaults to `model`.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures, and prompts, at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    about = About(
        definition="cos(picture, prompt) in CLIP's embedding (CLIPScore, without its factor 2.5 and its cut at 0).",
        scale="-1 to 1; 0.15 to 0.35 is usual. Flow-Factory: the same. DiffusionNFT: logits / 100, which is the same for "
        "OpenAI's models. MixGRPO and Pref-GRPO use another model (apple/DFN5B-CLIP-ViT-H-14-384): say which one it was.",
        source="Radford et al. 2021, arXiv:2103.00020; Hessel et al. 2021, arXiv:2104.08718.",
        license="openai/clip-vit-large-patch14: not stated on the card. OpenAI's repository of CLIP is MIT.",
        hacked_by="Text: a picture in which the prompt is written scores high (typographic attack). It counts badly and "
        "confuses which colour or place belongs to which object.",
    )

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        processor: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        super().__init__(model, revision, device, dtype, batch_size, offload)
        self.processor = processor
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()

    def load(self, device: torch.device) -> SharedModel:
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        processor = (self.processor, None) if self.processor else (self.model, self.revision)
        self.tokenizer = CLIPTokenizer.from_pretrained(processor[0], revision=processor[1])
        # Pillow's, so that a score does not change with torchvision's presence.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(processor[0], revision=processor[1])
        return share(("clip", self.model, self.revision, self.dtype), self.load_model, device)

    def load_model(self) -> tuple[nn.Module, str | None]:
        """`CLIPModel`, and the commit that it came from."""
        return load_clip(self.model, self.revision, self.dtype)

    def embed_prompts(self, model: nn.Module, prompts: list[str]) -> torch.Tensor:
        """Embeddings `(n, d)` of length 1."""
        known = self._embeddings
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            # To one length, so that no prompt's embedding depends on the others of its batch.
            tokens = self.tokenizer(
                batch,
                padding="max_length",
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._shared.device)
            embeddings = pooled(
                model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            )
            for prompt, embedding in zip(batch, normalized(embeddings).cpu(), strict=True):
                known[prompt] = embedding.clone()
        for prompt in dict.fromkeys(prompts):
            known.move_to_end(prompt)
        found = torch.stack([known[prompt] for prompt in prompts])
        while len(known) > _PROMPTS_KEPT:
            known.popitem(last=False)
        return found.to(self._shared.device)

    def score(self, model: nn.Module, pixel_values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        embeddings = normalized(pooled(model.get_image_features(pixel_values=pixel_values)))
        # Row by row: the n x n matrix has n numbers that are wanted.
        return (embeddings * self.embed_prompts(model, prompts)).sum(-1)


class PickScoreReward(CLIPReward):
    """
    What people would pick: a CLIP trained on choices between two pictures of one prompt.

    The mean of PickScore itself is logged as `pickscore_raw`.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            A `CLIPModel` of transformers: a repository on the Hub or a directory.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        processor (`str`, *optional*):
            Where tokenizer and image processor come from. Defaults to `model`.
        scale (`str`, *optional*, defaults to `"unit"`):
            `"unit"`: PickScore / 26, which is about 0 to 1 (Flow-GRPO, DiffusionNFT). `"logit"`: PickScore itself, the
            temperature times the cosine. `"cosine"`: the cosine alone (DanceGRPO).
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures, and prompts, at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    about = About(
        definition="exp(logit_scale) cos(picture, prompt) of a CLIP ViT-H/14 trained on people's choices, over 26.",
        scale="About 0.7 to 0.95. Flow-GRPO, DiffusionNFT, Flow-Factory: the same. DanceGRPO: the cosine "
        '(scale="cosine"). Papers report PickScore itself, 18 to 24 (scale="logit"; logged as pickscore_raw).',
        source="Kirstain et al. 2023, arXiv:2305.01569; the 26 is Flow-GRPO's.",
        license="yuvalkirstain/PickScore_v1: not stated on the card.",
        hacked_by="Trained on alone, it may degrade the quality that other measures see (Adv-GRPO). The prompts and "
        "pictures that it was trained on include NSFW ones.",
    )

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str | None = None,
        scale: str = "unit",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        if scale not in ("unit", "logit", "cosine"):
            raise ValueError(f"scale={scale!r}: expected 'unit', 'logit' or 'cosine'.")
        super().__init__(model, revision, processor, device, dtype, batch_size, offload)
        self.scale = scale

    def _factors(self, model: nn.Module) -> tuple[float, float]:
        """What makes the score, and PickScore itself, of a cosine."""
        temperature = model.logit_scale.exp().item()
        return {"unit": temperature / 26, "logit": temperature, "cosine": 1.0}[self.scale], temperature

    def score(self, model: nn.Module, pixel_values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return super().score(model, pixel_values, prompts) * self._factors(model)[0]

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        scores = super().__call__(prompts, images, **kwargs)
        if log_metric is not None and scores:
            factor, temperature = self._factors(self._shared.module)
            log_metric("pickscore_raw", sum(scores) / len(scores) * temperature / factor)
        return scores


def _cleaned(prompt: str) -> str:
    """As open_clip's tokenizer does it: entities twice, because some captions were escaped twice."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


class HPSv2Reward(CLIPReward):
    """
    Human Preference Score v2.1: a CLIP trained on people's rankings.

    Pictures that are not square are made smaller as a whole and framed in black, not cropped, as the authors do. Prompts
    are cleaned as in open_clip, before they are tokenized: broken encodings, curly quotes, `&amp;`.

    Args:
        model (`str`, *optional*, defaults to `"xswu/HPSv2/HPS_v2.1_compressed.pt"`):
            A checkpoint of open_clip's ViT-H-14 (a file on the Hub, `"user/repo/file.pt"`, or a local one), or a
            `CLIPModel` of transformers (a repository or a directory).
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Where tokenizer and image processor come from.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures, and prompts, at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    about = About(
        definition="cos(picture, prompt) of a CLIP ViT-H/14 trained on people's rankings, version 2.1.",
        scale="About 0.2 to 0.35; in DanceGRPO's run of Qwen-Image it rises from 0.25 to 0.33. Some report it times 100.",
        source="Wu et al. 2023, arXiv:2306.09341; weights and preprocessing of github.com/tgxs002/HPSv2.",
        license="Apache-2.0 (of the authors' repository).",
        hacked_by="Grid patterns, when it is trained on alone (DanceGRPO's README, which adds a CLIP score).",
    )

    def __init__(
        self,
        model: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        revision: str | None = None,
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        super().__init__(model, revision, processor, device, dtype, batch_size, offload)

    def load_model(self) -> tuple[nn.Module, str | None]:
        if not is_checkpoint(self.model):
            return super().load_model()
        from transformers import CLIPModel

        state_dict, commit = read_checkpoint(self.model, self.revision)
        model = from_state_dict(CLIPModel, *open_clip_vit_h(state_dict), what="an open_clip ViT-H-14")
        return clip_in(self.dtype, model), commit

    def embed_prompts(self, model: nn.Module, prompts: list[str]) -> torch.Tensor:
        return super().embed_prompts(model, [_cleaned(prompt) for prompt in prompts])

    def _sizes(self, height: int, width: int) -> tuple[int, int, int]:
        """Height and width inside of the frame, and the frame's (open_clip's `ResizeMaxSize`)."""
        side = self.image_processor.crop_size.height
        factor = side / max(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor)), side

    def frame(self, image: Image.Image) -> Image.Image:
        height, width, side = self._sizes(image.height, image.width)
        framed = Image.new("RGB", (side, side))
        framed.paste(
            image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2)
        )
        return framed

    def frame_tensors(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width, side = self._sizes(*pixels.shape[-2:])
        left, top = (side - width) // 2, (side - height) // 2
        return F.pad(resized(pixels, height, width), (left, side - width - left, top, side - height - top))
