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

"""How beautiful people would find a picture, whatever its prompt."""

import torch
from torch import nn

from .convert import linear_layers
from .models import ModelReward, SharedModel, load_clip, normalized, pooled, read_checkpoint, share
from .reward import About


class AestheticReward(ModelReward):
    """
    LAION's aesthetic predictor, version 2: linear layers on CLIP's embedding of the picture.

    Args:
        model (`str`, *optional*, defaults to `"camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"`):
            The linear layers: a file on the Hub (`"user/repo/file.pth"`) or a local one.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        backbone (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP below them, a repository or directory. It is shared with a `"clip"` reward that uses the same one.
        backbone_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the CLIP.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the CLIP waits on the CPU between rollouts.
    """

    about = About(
        definition="Five linear layers (768-1024-128-64-16-1) on the normalised embedding of CLIP ViT-L/14, trained on "
        "ratings. The prompt is not looked at.",
        scale="1 to 10; 4 to 7 is usual. Flow-GRPO, DiffusionNFT: the same.",
        source="github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE).",
        license="Not stated on the card of the copy; openai/clip-vit-large-patch14: not stated on the card either. "
        "OpenAI's repository of CLIP is MIT.",
        hacked_by="Leaving the prompt, which it does not see: use it with a reward that does. OCR training lowers it "
        "(Adv-GRPO), which is why it is often only measured.",
    )

    def __init__(
        self,
        model: str = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
        revision: str | None = None,
        backbone: str = "openai/clip-vit-large-patch14",
        backbone_revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        super().__init__(model, revision, device, dtype, batch_size, offload)
        self.backbone = backbone
        self.backbone_revision = backbone_revision
        self._commit = None

    @property
    def source(self) -> dict[str, str]:
        revisions = {
            "revision": self._commit or self.revision,
            "backbone_revision": (self._shared and self._shared.commit) or self.backbone_revision,
        }
        return {
            "weights": self.model,
            "backbone": self.backbone,
            **{name: revision for name, revision in revisions.items() if revision},
        }

    def load(self, device: torch.device) -> SharedModel:
        from transformers import CLIPImageProcessorPil

        state_dict, self._commit = read_checkpoint(self.model, self.revision)
        head = linear_layers(state_dict, "LAION's aesthetic predictor").requires_grad_(False)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.backbone, revision=self.backbone_revision)
        shared = share(
            ("clip", self.backbone, self.backbone_revision, self.dtype),
            lambda: load_clip(self.backbone, self.backbone_revision, self.dtype),
            device,
        )
        width = shared.module.config.projection_dim
        if head[0].in_features != width:
            raise ValueError(
                f"model={self.model!r} takes embeddings of {head[0].in_features} numbers, and those of "
                f"backbone={self.backbone!r} have {width}. Expected the CLIP that it was trained on."
            )
        self._head = head.to(device, torch.promote_types(self.dtype, torch.float32))
        return shared

    def score(self, model: nn.Module, pixel_values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self._head(normalized(pooled(model.get_image_features(pixel_values=pixel_values)))).squeeze(-1)
