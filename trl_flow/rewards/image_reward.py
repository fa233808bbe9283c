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

"""What people prefer, by a BLIP that reads the prompt while it looks at the picture."""

import torch
from torch import nn

from .convert import StateDict, blip, check_keys, linear_layers
from .models import ModelReward, SharedModel, from_state_dict, read_checkpoint, share
from .reward import About


# Of the scores on the authors' validation set.
_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_MAX_TOKENS = 35


class ImageRewardModel(nn.Module):
    """
    BLIP's vision tower, its text tower that looks at the picture, and linear layers on what that makes of the first token.

    Args:
        state_dict (`dict[str, torch.Tensor]`): As published: `blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.*`.
        dtype (`torch.dtype`): Of the towers. The linear layers compute in float32 at least.

    Raises:
        ValueError: If tensors are missing or unexpected.
    """

    def __init__(self, state_dict: StateDict, dtype: torch.dtype):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        parts = {"blip": {}, "mlp": {}}
        for key, tensor in state_dict.items():
            part, _, rest = key.partition(".")
            parts.get(part, {})[rest] = tensor
        check_keys("ImageReward", unexpected=[key for key in state_dict if key.partition(".")[0] not in parts])
        vision, text = blip(parts["blip"])
        self.vision = from_state_dict(BlipVisionModel, *vision, what="ImageReward's vision tower", dtype=dtype)
        self.text = from_state_dict(
            BlipTextModel, *text, what="ImageReward's text tower", dtype=dtype, add_pooling_layer=False
        )
        self.head = linear_layers(parts["mlp"], "ImageReward").to(torch.promote_types(dtype, torch.float32))

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Scores `(n,)` of pictures `(n, 3, height, width)` and tokens `(n, t)`."""
        hidden_states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision(pixel_values=pixel_values).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        scores = self.head(hidden_states[:, 0].to(self.head[0].weight.dtype)).squeeze(-1)
        return (scores - _MEAN) / _STD


class ImageRewardReward(ModelReward):
    """
    ImageReward: a BLIP trained on people's rankings of pictures of one prompt. Prompts are cut at 35 tokens.

    Args:
        model (`str`, *optional*, defaults to `"THUDM/ImageReward/ImageReward.pt"`):
            The checkpoint in its authors' format: a file on the Hub (`"user/repo/file.pt"`) or a local one.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            BERT's tokenizer, a repository or directory.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of BLIP.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    about = About(
        definition="Five linear layers on a BLIP that reads the prompt with cross-attention to the picture, trained on "
        "people's rankings; less 0.167 and over 1.033, the mean and standard deviation on its validation set.",
        scale="About -2 to 2, mean near 0. Others use it as it is.",
        source="Xu et al. 2023, arXiv:2304.05977; github.com/THUDM/ImageReward.",
        license="Apache-2.0 (card of THUDM/ImageReward).",
        hacked_by="Nothing reported in what we read. Prompts longer than 35 tokens are cut: what stands behind can be "
        "left out of the picture.",
    )

    def __init__(
        self,
        model: str = "THUDM/ImageReward/ImageReward.pt",
        revision: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        super().__init__(model, revision, device, dtype, batch_size, offload)
        self.tokenizer_name = tokenizer

    def load(self, device: torch.device) -> SharedModel:
        from transformers import BertTokenizer, CLIPImageProcessorPil

        self.tokenizer = BertTokenizer.from_pretrained(self.tokenizer_name)
        # BLIP's two tokens. Nothing here uses them, but the model was trained with them in its vocabulary.
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
        shared = share(("image_reward", self.model, self.revision, self.dtype), self._load_model, device)
        side = shared.module.vision.config.image_size
        # CLIP's means and bicubic filter, at 224 pixels.
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        return shared

    def _load_model(self) -> tuple[nn.Module, str | None]:
        state_dict, commit = read_checkpoint(self.model, self.revision)
        return ImageRewardModel(state_dict, self.dtype), commit

    def score(self, model: nn.Module, pixel_values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(pixel_values.device)
        return model(pixel_values, tokens["input_ids"], tokens["attention_mask"])
