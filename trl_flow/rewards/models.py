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

"""Rewards that run a model: its weights, its device, who else uses it, and pixels as it wants them."""

import os
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..environment import check_torchvision
from .convert import StateDict, check_keys
from .reward import Reward


logger = get_logger(__name__)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Pillow's numbers of the resampling filters that torch has as well.
_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class SharedModel:
    """
    A model that several rewards may use, on its device for as long as one of them needs it there.

    Args:
        module (`torch.nn.Module`): On the CPU. It is frozen.
        device (`torch.device`): Where it computes.
        commit (`str`, *optional*): Of the repository that it came from.
    """

    def __init__(self, module: nn.Module, device: torch.device, commit: str | None = None):
        self.module = module.eval().requires_grad_(False)
        self.device = device
        self.commit = commit
        self.on_device = False
        # Weak: a reward that is gone needs nothing.
        self._users = weakref.WeakSet()
        self._lock = threading.Lock()

    def take(self, user: Reward) -> nn.Module:
        """The model on its device, where it stays until `user` lets it go."""
        with self._lock:
            self._users.add(user)
            if not self.on_device:
                self.module.to(self.device)
                self.on_device = True
            return self.module

    def let_go(self, user: Reward):
        """Moves the model to the CPU, unless somebody else needs it on its device."""
        with self._lock:
            self._users.discard(user)
            if not self._users and self.on_device:
                self.module.to("cpu")
                self.on_device = False


# Weak: a model goes with the last reward that holds it.
_SHARED = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def share(key: tuple, load: Callable[[], tuple[nn.Module, str | None]], device: torch.device) -> SharedModel:
    """
    The model that was loaded under this key and device, or a new one.

    Args:
        key (`tuple`): All that decides which weights they are: kind, repository, revision, dtype.
        load (`Callable`): Returns the model and the commit that it came from, if that is known.
        device (`torch.device`): Where it computes.
    """
    with _LOADING:
        shared = _SHARED.get((*key, device))
        if shared is None:
            module, commit = load()
            shared = _SHARED[(*key, device)] = SharedModel(module, device, commit)
        return shared


def parse_device(device: str) -> torch.device:
    """
    The device of that name, whether or not this machine has it.

    Raises:
        ValueError: If it names none.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r} is no device: expected 'cpu', 'cuda', or one GPU of several, 'cuda:1'."
        ) from None


def check_device(device: str):
    """
    Refuses a device that this machine does not have.

    Raises:
        ValueError: If it has none of that kind, or fewer.
    """
    wanted = parse_device(device)
    if wanted.type == "cpu":
        return
    module = getattr(torch, wanted.type, None)
    count = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
    if (wanted.index or 0) >= count:
        known = ", ".join(["cpu", *(f"{wanted.type}:{number}" for number in range(count))])
        raise ValueError(
            f"device={device!r}: this process sees no such device. Expected one of {known}. CUDA_VISIBLE_DEVICES says "
            "which GPUs are seen, and they are counted from 0 among those."
        )


def is_checkpoint(model: str) -> bool:
    """Whether `model` names a file, not a repository or directory."""
    return Path(model).suffix in _CHECKPOINTS and not os.path.isdir(model)


def read_checkpoint(model: str, revision: str | None = None) -> tuple[StateDict, str | None]:
    """
    Tensors of a checkpoint, and the commit that they came from. Nothing in the file is run.

    Args:
        model (`str`): A local file, or one on the Hub: `"user/repo/file.pt"`.
        revision (`str`, *optional*): Branch, tag or commit.

    Raises:
        ValueError: If it names no file, the file is damaged, holds other things than tensors, or could only be read by
            running code that is in it.
    """
    path = Path(model)
    if not path.is_file():
        user, repository, filename = (*model.split("/", 2), "", "")[:3]
        if not (user.strip(".") and repository and filename and is_checkpoint(model)):
            raise ValueError(
                f"model={model!r} is no file: expected a local checkpoint ({', '.join(_CHECKPOINTS)}) or one on the Hub "
                "('user/repo/file.pt')."
            )
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(f"{user}/{repository}", filename, revision=revision))
    try:
        if path.suffix == ".safetensors":
            state_dict = load_file(path)
        else:
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # Not all of torch's message, which says how to run the code all the same.
        found = re.search(r"(unsupported (?:global: )?)(\w+ [\w.]+)", str(error), re.IGNORECASE)
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run any code: it is not loaded. Expected a state dict, "
            f"saved by torch.save or as safetensors.{f' (Found: {found[2]})' if found else ''}"
        ) from None
    except (RuntimeError, EOFError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or was not downloaded to its end. Delete it, and get it again. "
            f"({type(error).__name__}: {str(error).partition('. ')[0]})"
        ) from error
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} is no state dict: expected names and tensors, or these under 'state_dict'.")
    return state_dict, _commit(path)


def _commit(path: Path) -> str | None:
    """Commit of a file in the Hub's cache (`.../snapshots/<commit>/...`)."""
    match = re.search(r"/snapshots/([0-9a-f]{40})/", path.absolute().as_posix())
    return match[1] if match else None


def from_state_dict(model_class: type, config, state_dict: StateDict, what: str, **kwargs) -> nn.Module:
    """
    A model of transformers with exactly these tensors, in float32 or as `dtype` says.

    Raises:
        ValueError: If a tensor is missing or too many.
    """
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True, **{"dtype": torch.float32, **kwargs}
    )
    check_keys(what, loading["missing_keys"], loading["unexpected_keys"])
    return model


def clip_in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """A CLIP in another precision, but for its temperature: exp(4.6) is 1 % off when 4.6 is rounded to bfloat16."""
    logit_scale = model.logit_scale.detach().clone()
    model.to(dtype).logit_scale.data = logit_scale.to(torch.promote_types(dtype, torch.float32))
    return model


def load_clip(model: str, revision: str | None, dtype: torch.dtype) -> tuple[nn.Module, str | None]:
    """
    `CLIPModel` of a repository or directory in transformers' format, and its commit.

    Raises:
        ValueError: If `model` is a file, or weights are missing.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import CLIPModel

    if is_checkpoint(model):
        raise ValueError(
            f"model={model!r} is a file: expected a repository on the Hub or a directory with a CLIPModel, as "
            "transformers' save_pretrained writes it."
        )
    clip, loading = CLIPModel.from_pretrained(model, revision=revision, dtype=torch.float32, output_loading_info=True)
    # Older checkpoints hold numbered positions, too, which is fine.
    check_keys(f"a CLIPModel ({model})", loading["missing_keys"])
    # From the cache, where it has just been put: a path that names the commit.
    config = None if os.path.isdir(model) else try_to_load_from_cache(model, "config.json", revision=revision)
    return clip_in(dtype, clip), _commit(Path(config)) if isinstance(config, str) else None


def pooled(features) -> torch.Tensor:
    """Projected embeddings `(n, d)`, which `CLIPModel.get_*_features` return inside an output since transformers 5."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def normalized(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings of length 1, in float32 at least."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def resized(pixels: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """Pixels `(n, 3, height, width)`, antialiased as Pillow does it, which also clips to [0, 1] but in 256 steps."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True).clamp(0, 1)


def preprocess(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """
    What a `CLIPImageProcessorPil` does to pictures, done to tensors, so that gradients reach them.

    Args:
        pixels (`torch.Tensor` of shape `(n, 3, height, width)`): In [0, 1].
        image_processor (`CLIPImageProcessorPil`): Its sizes, filter, means and standard deviations are used.

    Returns:
        `torch.Tensor` of shape `(n, 3, crop_height, crop_width)`: In standard deviations.

    Raises:
        ValueError: If its filter is neither bilinear nor bicubic.
    """
    if image_processor.resample not in _FILTERS:
        name = {int(member): member.name for member in Image.Resampling}.get(image_processor.resample, "no filter")
        raise ValueError(
            f"The image processor resizes with {name} (resample={image_processor.resample!r}): pictures as tensors can only "
            "be resized with BILINEAR or BICUBIC. Give pictures, or set its `resample`."
        )
    height, width = pixels.shape[-2:]
    size, crop = image_processor.size, image_processor.crop_size
    if size.shortest_edge:
        # The longer side is cut off, not rounded: as in transformers and torchvision.
        short, long = min(height, width), max(height, width)
        long = int(size.shortest_edge * long / short)
        height, width = (size.shortest_edge, long) if height <= width else (long, size.shortest_edge)
    else:
        height, width = size.height, size.width
    pixels = resized(pixels, height, width, _FILTERS[image_processor.resample])
    if image_processor.do_center_crop:
        top, left = (height - crop.height) // 2, (width - crop.width) // 2
        pixels = pixels[..., top : top + crop.height, left : left + crop.width]
    mean, std = (
        pixels.new_tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels - mean) / std


class ModelReward(Reward):
    """
    A reward that runs a model over batches of pictures.

    A subclass loads in `load`, and scores in `score`.

    Args:
        model (`str`):
            Weights: a repository on the Hub or a local path.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device, or to a GPU where there is one. On another one than the
            trainer's it scores in a thread of its own, while the next prompts are sampled. Each process of a run loads a
            copy; `trl-flow rewards serve` loads one for all.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the model: `"float32"`, `"bfloat16"`, `"float16"` or `"float64"`. Scores are computed from its
            outputs in float32 at least.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        offload: bool = False,
    ):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(_DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        if device is not None:
            parse_device(device)  # that it is there is asked where it is used: a dry run may plan for another machine
        self.model = model
        self.revision = revision
        self.device = device
        self.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self.offload = offload
        self._shared: SharedModel | None = None
        self._elsewhere = False

    @property
    def concurrent(self) -> bool:
        """Whether it computes on another device than who called [`ModelReward.prepare`]: it need not be waited for."""
        return self._elsewhere

    def load(self, device: torch.device) -> SharedModel:
        """Loads all that [`ModelReward.score`] needs; returns the model. Called again when the device changes."""
        raise NotImplementedError

    def score(self, model: nn.Module, pixel_values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores `(n,)` of preprocessed pictures `(n, 3, height, width)`, differentiable with respect to them."""
        raise NotImplementedError

    def frame(self, image: Image.Image) -> Image.Image:
        """A picture as `image_processor` should get it."""
        return image

    def frame_tensors(self, pixels: torch.Tensor) -> torch.Tensor:
        """What [`ModelReward.frame`] does, to pictures `(n, 3, height, width)`."""
        return pixels

    @property
    def source(self) -> dict[str, str]:
        revision = (self._shared and self._shared.commit) or self.revision
        return {"weights": self.model, **({"revision": revision} if revision else {})}

    def prepare(self, device: torch.device | str | None = None):
        if self.device is not None:
            check_device(self.device)
        callers = device
        device = torch.device(self.device or device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # "cuda" and "cuda:0" are one device.
        device = torch.empty(0, device=device).device
        self._elsewhere = callers is not None and torch.empty(0, device=callers).device != device
        if self._shared is not None and self._shared.device == device:
            return
        if self._shared is not None:
            self._shared.let_go(self)
        check_torchvision()  # a broken one makes transformers fail with errors that do not name it
        if self._elsewhere and (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
            logger.warning(
                f"Each of {processes} processes loads a copy of {self.model} onto {device}. `trl-flow rewards serve` loads "
                "one for all: give its address as the reward."
            )
        self._shared = self.load(device)
        if not self.offload:
            self._shared.take(self)

    def release(self):
        if self.offload and self._shared is not None:
            self._shared.let_go(self)

    def _awake(self) -> nn.Module:
        if self._shared is None:
            self.prepare()
        return self._shared.take(self)

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float | None]:
        scores = []
        # Tensors made in inference mode, as weights and embeddings of prompts, could never meet a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            model = self._awake()
            for start in range(0, len(images), self.batch_size):
                batch = [self.frame(image.convert("RGB")) for image in images[start : start + self.batch_size]]
                pixel_values = self.image_processor(images=batch, return_tensors="pt")["pixel_values"]
                pixel_values = pixel_values.to(self._shared.device, self.dtype)
                scores += self.score(model, pixel_values, prompts[start : start + self.batch_size]).tolist()
        return scores

    def score_tensors(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Scores of pictures as tensors, with gradients.

        Args:
            pixels (`torch.Tensor` of shape `(n, 3, height, width)`): In [0, 1], as a VAE decodes them.
            prompts (`list[str]`): n.

        Returns:
            `torch.Tensor` of shape `(n,)`: In float32 at least. They differ a little from those of the same pictures as
            `PIL.Image`, which have 256 levels when they are resized.

        Raises:
            ValueError: If `pixels` has another shape or type, or there is another number of prompts.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point() or len(pixels) != len(prompts):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)}, {pixels.dtype}, and {len(prompts)} prompts: expected floats in "
                "[0, 1] of shape (n, 3, height, width), and n prompts."
            )
        model = self._awake()
        pixels = pixels.to(self._shared.device, torch.promote_types(self.dtype, torch.float32))
        pixels = preprocess(self.frame_tensors(pixels), self.image_processor)
        return self.score(model, pixels.to(self.dtype), prompts)
