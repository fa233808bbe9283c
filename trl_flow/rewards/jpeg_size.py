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

"""Reward for pictures that are simple, or rich in detail: the size of their JPEG."""

from io import BytesIO

from PIL import Image

from .reward import About, Reward


class JPEGSizeReward(Reward):
    """
    Size of each picture as a JPEG in kilobytes (1000 bytes), with a minus where small is good.

    Args:
        goal (`str`, *optional*, defaults to `"compressible"`): `"compressible"`: small files are good, the score is
            negative. `"incompressible"`: large files are good.
        quality (`int`, *optional*, defaults to `95`): Of the JPEG, 1 to 95.
    """

    about = About(
        definition="Size in kilobytes of the picture as a JPEG of quality 95, negative for goal='compressible'.",
        scale="Grows with the number of pixels and their detail: a picture of 512 by 512 has 5 kB if it is flat "
        "and 300 kB if it is noise. Compare pictures of one size only.",
        source="DDPO (arXiv:2305.13301): JPEG compressibility and incompressibility",
        license="No weights",
        hacked_by="Everything: it does not look at the prompt. Blank pictures are the best compressible ones, noise the "
        "best incompressible one. It is for testing a method, not for good pictures.",
    )
    concurrent = True

    def __init__(self, goal: str = "compressible", quality: int = 95):
        if goal not in ("compressible", "incompressible"):
            raise ValueError(f"goal={goal!r}: expected 'compressible' or 'incompressible'.")
        if not 1 <= quality <= 95:
            raise ValueError(f"quality={quality}: expected 1 to 95.")
        self.sign = -1 if goal == "compressible" else 1
        self.quality = quality

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float]:
        scores = []
        for image in images:
            file = BytesIO()
            image.convert("RGB").save(file, format="JPEG", quality=self.quality)
            scores.append(self.sign * file.tell() / 1000)
        return scores
