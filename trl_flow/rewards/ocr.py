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

"""Reward for writing: how well the text that an OCR engine reads in a picture matches the text that was asked for."""

import importlib.metadata
import importlib.util
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from .reward import About, Reward


# Confidence below which rapidocr, and the papers' engine, drop a line.
_CONFIDENT = 0.5
# Text in straight or typographic double quotes.
_QUOTED = re.compile(r'"([^"]+)"|[“„]([^“”„]+)[”“]')
# Writing does not tell these apart.
_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-"})


def quoted_texts(prompt: str) -> list[str]:
    """Texts in double quotes, straight or typographic, in the order of the prompt."""
    return [text.strip() for match in _QUOTED.findall(prompt) if (text := "".join(match)).strip()]


def levenshtein(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace that makes `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def exact_score(target: str, text: str) -> float:
    """
    1 if `text` is the target and nothing else, less 1 / len(target) for each character that is wrong, missing or too
    many; at least 0. Space, case, and variants of the same character (`’` and `'`) don't count.
    """
    target, text = _plain(target), _plain(text)
    # No fewer changes than characters too many: a page of text needs no comparison.
    if len(text) >= 2 * len(target):
        return 0.0
    return max(0.0, 1 - levenshtein(target, text) / len(target))


def paper_score(target: str, text: str) -> float:
    """
    Flow-GRPO's OCR reward: 1 if `text` contains the target anywhere, else 1 - min(d, len(target)) / len(target), where d
    is the Levenshtein distance without spaces and in lower case.
    """
    target, text = target.replace(" ", "").lower(), text.replace(" ", "").lower()
    distance = 0 if target in text else min(levenshtein(target, text), len(target))
    return 1 - distance / len(target)


def in_reading_order(boxes: Sequence[np.ndarray], texts: list[str]) -> list[str]:
    """
    Texts line by line from top to bottom, each line from left to right. Two texts are on one line if the middle of the
    lower one is above the lower edge of the higher one.

    Args:
        boxes (`list[np.ndarray]` of shape `(4, 2)`): Corners (x, y) of the n texts.
    """
    lines = []
    for box, text in sorted(zip(boxes, texts, strict=True), key=lambda pair: pair[0][:, 1].mean()):
        if not lines or box[:, 1].mean() >= lines[-1][0][0][:, 1].max():
            lines.append([])
        lines[-1].append((box, text))
    return [text for line in lines for _, text in sorted(line, key=lambda pair: pair[0][:, 0].min())]


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).translate(_SAME).split()).casefold()


class OCRReward(Reward):
    """
    Reads each picture with rapidocr, on the CPU, and compares what it reads with the text that was asked for: the
    dataset's column `target`, or else the texts in double quotes in the prompt. Where there is neither, it does not apply.
    A picture without any text scores 0.

    Args:
        match (`str`, *optional*, defaults to `"exact"`): `"exact"`: all text of the picture counts, see
            [`~rewards.ocr.exact_score`], and what the engine is not sure of as well; several quoted texts are expected one
            after the other. `"paper"`: the definition of Flow-GRPO, see [`~rewards.ocr.paper_score`], where further text
            costs nothing once the target is there, and lines that the engine is not sure of (confidence below 0.5) are
            dropped; of several quoted texts the first one counts. The other one's mean is logged as `ocr/paper` or
            `ocr/exact`.
        limit_side_len (`int`, *optional*, defaults to `320`): Larger pictures are looked for text at this many pixels of
            their longer side; what is found is read at full size.
        num_threads (`int`, *optional*, defaults to `4`): Pictures that are read at the same time.
    """

    about = About(
        definition="1 - d / len(target), at least 0. d: Levenshtein distance between the target and all text that "
        "PP-OCRv6 (rapidocr) reads, line by line, without spaces and case. match='paper': d = 0 as soon as the text "
        "contains the target.",
        scale="0 to 1; 1 is the target and nothing else. Not comparable with the papers' numbers: they read with older "
        "versions of PaddleOCR.",
        source="Flow-GRPO (arXiv:2505.05470) and its code; rapidocr for reading",
        license="Apache-2.0 (PP-OCRv6 models, in the rapidocr package)",
        hacked_by="match='paper': pictures full of words, since a target anywhere scores 1, and of lettering that nobody "
        "can read. Both: plain lettering on a plain ground, at the cost of the scene; further lettering so faint or so "
        "odd that the engine does not take it for text. Watch an aesthetic or preference reward beside it.",
    )
    concurrent = True
    prompt_set = "ocr"

    def __init__(self, match: str = "exact", limit_side_len: int = 320, num_threads: int = 4):
        if match not in ("exact", "paper"):
            raise ValueError(f"match={match!r}: expected 'exact' or 'paper'.")
        if limit_side_len < 32:
            raise ValueError(f"limit_side_len={limit_side_len}: the text detector needs at least 32 pixels.")
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: expected at least 1.")
        missing = [name for name in ("rapidocr", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"The reward 'ocr' needs the package {' and '.join(missing)}: pip install \"trl-flow[ocr]\""
            )
        self.match = match
        self.limit_side_len = limit_side_len
        self.num_threads = num_threads
        self._engine = None

    @property
    def source(self) -> dict[str, str]:
        return {"rapidocr": importlib.metadata.version("rapidocr")}

    def prepare(self, device: torch.device | None = None):
        if self._engine is not None:
            return
        from rapidocr import RapidOCR

        self._engine = RapidOCR(
            params={
                "Global.use_cls": False,  # whether a text is upside down
                "Global.log_level": "error",  # it warns of every picture without text
                # Dropped, gibberish around the target would cost nothing.
                "Global.text_score": 0.0,
                "Det.limit_type": "max",
                "Det.limit_side_len": self.limit_side_len,
                # Whole pictures run in parallel instead, which uses the threads better.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image.Image) -> dict[str, str]:
        """Text of a picture for each `match`, one line for each text that was found."""
        self.prepare()
        found = self._engine(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1]))  # it expects BGR
        texts = {}
        for match, confidence in (("exact", 0.0), ("paper", _CONFIDENT)):
            kept = [i for i, score in enumerate(found.scores or ()) if score >= confidence and found.txts[i]]
            texts[match] = "\n".join(in_reading_order([found.boxes[i] for i in kept], [found.txts[i] for i in kept]))
        return texts

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        target: list[str | None] | None = None,
        log_extra=None,
        log_metric=None,
        **kwargs,
    ) -> list[float | None]:
        self.prepare()
        targets = [
            [given] if given and given.strip() else quoted_texts(prompt)
            for prompt, given in zip(prompts, target or [None] * len(prompts), strict=True)
        ]
        applies = [number for number, texts in enumerate(targets) if texts]
        with ThreadPoolExecutor(min(self.num_threads, os.cpu_count() or 1)) as executor:
            read = dict(zip(applies, executor.map(self.read, [images[number] for number in applies]), strict=True))
        scores = {
            "exact": [exact_score("".join(targets[number]), read[number]["exact"]) for number in applies],
            "paper": [paper_score(targets[number][0], read[number]["paper"].replace("\n", "")) for number in applies],
        }
        if log_extra is not None:
            log_extra(
                "ocr_text", [read[number][self.match] if number in read else None for number in range(len(images))]
            )
        if log_metric is not None and applies:
            other = "paper" if self.match == "exact" else "exact"
            log_metric(f"ocr/{other}", sum(scores[other]) / len(applies))
        found = dict(zip(applies, scores[self.match], strict=True))
        return [found.get(number) for number in range(len(images))]
