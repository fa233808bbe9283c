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

"""Reward for objects, counts, colours and positions: GenEval's rules on what a detector finds in a picture."""

import json
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..prompts.geneval import CLASSES, COLORS, POSITIONS
from .clip import CLIPReward
from .convert import check_keys
from .models import ModelReward, SharedModel, normalized, pooled, share
from .reward import About


# GenEval's constants (evaluation/evaluate_images.py).
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_PER_CLASS = 16
OVERLAP = 0.1  # of the added sizes of two objects, that a distance between their centres must exceed to count
_COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_BACKGROUND = "#999"
_SCORES = ("graded", "strict", "paper", "flow_grpo")


class Detection(NamedTuple):
    """One object: its class, the detector's confidence, (left, top, right, bottom) in pixels, and its colour if asked for."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    color: str | None = None


class Wanted(NamedTuple):
    """One entry of `include`: `position` is where its objects are, seen from those of another entry, by index."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


def _entries(given: list[dict] | str | None) -> list[dict] | None:
    return json.loads(given or "null") if isinstance(given, str) else given


def parse_metadata(include: list[dict] | str, exclude: list[dict] | str | None = None) -> tuple[list, list]:
    """
    What a prompt asks for, from GenEval's metadata. A missing key may also be None, as nested columns of a dataset have it.

    Args:
        include (`list[dict]` or `str`): `{"class", "count", "color"?, "position"?: [relation, index]}`, or JSON of it.
        exclude (`list[dict]` or `str`, *optional*): `{"class", "count"}`: as many would be too many.

    Returns:
        `tuple[list[Wanted], list[Wanted]]`

    Raises:
        ValueError: If an entry is not of that form, or names a class, colour or relation that GenEval does not have.
    """
    include, exclude = _entries(include), _entries(exclude)
    parsed = []
    for entry in [*include, *(exclude or [])]:
        try:
            position = entry.get("position")
            position = (position[0], int(position[1])) if position else None
            wanted = Wanted(entry["class"], int(entry["count"]), entry.get("color"), position)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{entry!r} is no entry of GenEval's include or exclude: expected {{'class': 'dog', 'count': 1}}, and "
                "perhaps 'color': 'red' and 'position': ['left of', 0]."
            ) from error
        for given, known in ((wanted.name, CLASSES), (wanted.color, COLORS), (position and position[0], POSITIONS)):
            if given is not None and given not in known:
                raise ValueError(f"{entry!r}: {given!r} is none of GenEval's {', '.join(known)}.")
        if wanted.count < 1 or (position and not 0 <= position[1] < len(include)):
            raise ValueError(
                f"{entry!r}: expected a count of at least 1, and an index into the {len(include)} entries."
            )
        parsed.append(wanted)
    return parsed[: len(include)], parsed[len(include) :]


def is_counting(include: list[Wanted]) -> bool:
    """Whether several of one class are wanted, as in GenEval's prompts of the tag `counting` and in no others."""
    return any(wanted.count > 1 for wanted in include)


def select(detections: list[Detection], threshold: float) -> dict[str, list[Detection]]:
    """By class, the detections above a confidence, the most confident first, 16 at most."""
    found = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > threshold and len(found.get(detection.name, ())) < MAX_PER_CLASS:
            found.setdefault(detection.name, []).append(detection)
    return found


def relations(box: tuple, other: tuple) -> set[str]:
    """Where a box is, seen from another one: none, one or two of `"left of"`, `"right of"`, `"above"` and `"below"`."""
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = box, other
    offset = np.array([left + right - other_left - other_right, top + bottom - other_top - other_bottom]) / 2
    sizes = np.array([right - left + other_right - other_left, bottom - top + other_bottom - other_top])
    beyond = np.maximum(np.abs(offset) - OVERLAP * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds}


def _all_related(relation: str, objects: list[Detection], references: list[Detection]) -> bool:
    return all(relation in relations(a.box, b.box) for a in objects for b in references)


def paper_score(include: list[Wanted], exclude: list[Wanted], found: dict[str, list[Detection]]) -> float:
    """
    GenEval's: 1 if at least as many objects as wanted are there, of which the most confident have the colour and the
    position, and nothing that is excluded; else 0. Further objects do no harm.
    """
    groups = []
    for wanted in include:
        objects = found.get(wanted.name, [])[: wanted.count]
        right = len(objects) == wanted.count
        if right and wanted.color:
            right = all(detection.color == wanted.color for detection in objects)
        if right and wanted.position:
            relation, reference = wanted.position
            right = reference < len(groups) and bool(groups[reference])
            right = right and _all_related(relation, objects, groups[reference])
        groups.append(objects if right else [])
    too_many = any(len(found.get(unwanted.name, [])) >= unwanted.count for unwanted in exclude)
    return float(all(groups) and not too_many)


def flow_grpo_score(include: list[Wanted], found: dict[str, list[Detection]]) -> float:
    """
    What Flow-GRPO's code trains on: mean of 1 - |wanted - found| / wanted for the number of each class, and, once that is
    right, of the same for the number in the right colour, and of 0 or 1 for the position (0 for either if it is not).

    Not bounded from below. In that code a wrong position also gets a term of 1, which is a mistake and is left out here.
    """
    terms, groups = [], []
    for wanted in include:
        objects = found.get(wanted.name, [])
        terms.append(1 - abs(wanted.count - len(objects)) / wanted.count)
        right = len(objects) == wanted.count
        if not right and (wanted.color or wanted.position):
            terms.append(0.0)
        if right and wanted.color:
            colored = sum(detection.color == wanted.color for detection in objects)
            terms.append(1 - abs(wanted.count - colored) / wanted.count)
            right = colored == wanted.count
        if right and wanted.position:
            relation, reference = wanted.position
            right = reference < len(groups) and bool(groups[reference])
            right = right and _all_related(relation, objects, groups[reference])
            terms.append(float(right))
        groups.append(objects if right else [])
    return sum(terms) / len(terms)


def graded_score(include: list[Wanted], found: dict[str, list[Detection]], extra: int) -> float:
    """
    Mean of the terms of each entry, divided by one plus the number of objects that nobody asked for; 0 to 1.

    The terms are the number of its objects and, if asked for, the number in the right colour (each 1 - |wanted - found| /
    wanted, at least 0), and whether all of them are where they should be, seen from all of the others (0 or 1). As in
    [`~shapes.rewards.score`]. `exclude` plays no part.
    """
    terms = []
    for wanted in include:
        objects = found.get(wanted.name, [])
        terms.append(max(0.0, 1 - abs(wanted.count - len(objects)) / wanted.count))
        if wanted.color:
            colored = sum(detection.color == wanted.color for detection in objects)
            terms.append(max(0.0, 1 - abs(wanted.count - colored) / wanted.count))
        if wanted.position:
            relation, reference = wanted.position
            references = found.get(include[reference].name, [])
            terms.append(float(bool(objects and references) and _all_related(relation, objects, references)))
    return sum(terms) / len(terms) / (1 + extra)


def all_scores(
    include: list[Wanted], exclude: list[Wanted], detections: list[Detection], extra_threshold: float
) -> dict[str, float]:
    """
    A picture's score by each definition, from all detections above GenEval's lower threshold. `strict` is 1 where `graded`
    and `paper` are, else 0.
    """
    found = select(detections, COUNTING_THRESHOLD if is_counting(include) else THRESHOLD)
    asked_for = {wanted.name for wanted in include}
    extra = sum(len(objects) for name, objects in select(detections, extra_threshold).items() if name not in asked_for)
    graded, paper = graded_score(include, found, extra), paper_score(include, exclude, found)
    return {
        "graded": graded,
        "strict": float(graded == 1 and paper == 1),
        "paper": paper,
        "flow_grpo": flow_grpo_score(include, found),
    }


class GenEvalReward(ModelReward):
    """
    Looks for objects with Mask2Former, names their colours with CLIP, and applies GenEval's rules. The dataset has GenEval's
    columns `include` and perhaps `exclude`; where `include` is None or empty, it does not apply. A picture of which a model
    makes NaN or infinite numbers has no score (NaN).

    GenEval itself runs on mmdetection, with other weights and at a higher resolution: **scores are not comparable with
    those of papers**, not even with `score="paper"`. The mean scores by the other definitions are logged as
    `geneval/graded`, `geneval/strict`, `geneval/paper` and `geneval/flow_grpo`.

    Args:
        score (`str`, *optional*, defaults to `"graded"`):
            `"graded"`: partial credit for exact counts, colours and positions, divided by one plus the number of objects
            that nobody asked for; `exclude` plays no part in it. `"strict"`: 1 where both `"graded"` and `"paper"` are 1,
            so that nothing of `exclude` is there either, else 0. `"paper"`: GenEval's right (1) or wrong (0), where
            further objects do no harm unless `exclude` names them. `"flow_grpo"`: what Flow-GRPO trains on. See
            [`~rewards.geneval.graded_score`] and its neighbours.
        extra_threshold (`float`, *optional*, defaults to `0.9`):
            Confidence above which an object that nobody asked for costs. 1: none does.
        model (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            A `Mask2FormerForUniversalSegmentation` of COCO's 80 classes: a repository on the Hub or a directory.
        revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        clip_model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            A `CLIPModel`, shared with the reward `clip` where both use it.
        clip_revision (`str`, *optional*):
            Branch, tag or commit of its repository.
        device (`str`, *optional*):
            Where to compute. Defaults to the trainer's device.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of CLIP. The detector computes in float32 at least: half precision is too coarse for the positions
            that its attention samples, and makes its outputs NaN on a CPU.
        batch_size (`int`, *optional*, defaults to `16`):
            Pictures at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights wait on the CPU between rollouts.
    """

    about = About(
        definition="Mean over what the prompt asks for of exact count, colour and position, divided by one plus the "
        "number of other objects, as a Mask2Former and a CLIP see them. What the metadata exclude plays no part in it. "
        "score='strict': 1 where that is 1 and nothing excluded is there, else 0.",
        scale="0 to 1. Not comparable with GenEval's published scores, which come from mmdetection: same rules "
        "(score='paper'), other weights.",
        source="Ghosh et al. 2023, arXiv:2310.11513; score='flow_grpo': Flow-GRPO, arXiv:2505.05470.",
        license="facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14: not checked; read their "
        "cards.",
        hacked_by="score='paper': more and more objects, since most prompts only ask for enough of them. All: objects "
        "cut out on a plain ground, stickers and collages, shapes that only a detector takes for objects; 'graded' "
        "itself prefers empty backgrounds, since a table below the bowl is one object too many. Watch a preference "
        "reward beside it.",
    )
    prompt_set = "geneval"
    requires = ("include",)

    def __init__(
        self,
        score: str = "graded",
        extra_threshold: float = COUNTING_THRESHOLD,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        revision: str | None = None,
        clip_model: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ):
        if score not in _SCORES:
            raise ValueError(f"score={score!r}: expected one of {', '.join(_SCORES)}.")
        if not THRESHOLD <= extra_threshold <= 1:
            raise ValueError(f"extra_threshold={extra_threshold}: expected {THRESHOLD} to 1.")
        super().__init__(model, revision, device, dtype, batch_size, offload)
        self.definition = score
        self._detector_dtype = torch.promote_types(self.dtype, torch.float32)
        self.extra_threshold = extra_threshold
        self._clip = CLIPReward(
            clip_model, clip_revision, device=device, dtype=dtype, batch_size=batch_size, offload=offload
        )

    @property
    def source(self) -> dict[str, str]:
        return {**super().source, **{f"clip_{name}": value for name, value in self._clip.source.items()}}

    def load(self, device: torch.device) -> SharedModel:
        from transformers import Mask2FormerImageProcessorPil

        self.image_processor = Mask2FormerImageProcessorPil.from_pretrained(self.model, revision=self.revision)
        return share(("mask2former", self.model, self.revision, self._detector_dtype), self._load_detector, device)

    def _load_detector(self) -> tuple[nn.Module, str | None]:
        from transformers import Mask2FormerForUniversalSegmentation

        detector, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
            self.model, revision=self.revision, dtype=self._detector_dtype, output_loading_info=True
        )
        check_keys(f"a Mask2FormerForUniversalSegmentation ({self.model})", loading["missing_keys"])
        labels = detector.config.id2label
        if len(labels) != len(CLASSES) or (labels[0], labels[79]) != (CLASSES[0], CLASSES[79]):
            raise ValueError(
                f"model={self.model!r} knows {len(labels)} classes, from {labels[0]!r} on: expected a detector of COCO's 80 "
                "things, from 'person' to 'toothbrush', such as facebook/mask2former-swin-small-coco-instance."
            )
        return detector, getattr(detector.config, "_commit_hash", None)

    def prepare(self, device: torch.device | str | None = None):
        super().prepare(device)
        self._clip.prepare(device)

    def release(self):
        super().release()
        self._clip.release()

    def detect(self, images: list[Image.Image], colored: list[set[str]]) -> list[list[Detection] | None]:
        """
        Objects in pictures, with a confidence above 0.3. `None` where a model's numbers are not finite.

        Args:
            images (`list[PIL.Image.Image]`): n pictures.
            colored (`list[set[str]]`): For each of them, the classes of which the colour is wanted.
        """
        images = [image.convert("RGB") for image in images]
        # Tensors made in inference mode, as weights and embeddings of prompts, could never meet a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            found = self._segment(images)
            # Where they are in `found`, and what to show to CLIP: the object alone, on grey.
            places, crops = [], []
            for i, image in enumerate(images):
                for j, (detection, mask) in enumerate(found[i] or ()):
                    if detection.name in colored[i]:
                        alone = Image.composite(
                            image, Image.new("RGB", image.size, _BACKGROUND), Image.fromarray(mask)
                        )
                        places.append((i, j))
                        crops.append(alone.crop(detection.box))
            colors = self._name_colors(crops, [found[i][j][0].name for i, j in places])
        detections = [objects and [detection for detection, _ in objects] for objects in found]
        for (i, j), color in zip(places, colors, strict=True):
            if color is None:
                detections[i] = None
            elif detections[i] is not None:
                detections[i][j] = detections[i][j]._replace(color=color)
        return detections

    def _segment(self, images: list[Image.Image]) -> list[list[tuple[Detection, np.ndarray]] | None]:
        """
        Objects and their masks, as mmdetection makes them of Mask2Former's output: the likeliest pairs of query and
        class, each with its likelihood times the mean of its mask's probabilities within the mask. `None` for a picture
        of which the output is not finite.
        """
        model = self._awake()
        inputs = self.image_processor(images=images, return_tensors="pt").to(self._shared.device)
        outputs = model(pixel_values=inputs["pixel_values"].to(self._detector_dtype), pixel_mask=inputs["pixel_mask"])
        found = [[] for _ in images]
        for number, (image, class_logits, mask_logits, real) in enumerate(
            zip(
                images,
                outputs.class_queries_logits.float(),
                outputs.masks_queries_logits.float(),
                inputs["pixel_mask"].bool(),
                strict=True,
            )
        ):
            if not (class_logits.isfinite().all() and mask_logits.isfinite().all()):
                found[number] = None
                continue
            likelihood = class_logits.softmax(-1)[:, :-1]  # the last class is "nothing"
            likelihood, index = likelihood.flatten().topk(len(class_logits))
            index = index[likelihood > THRESHOLD]  # the mask can only lower it
            if len(index) == 0:
                continue
            logits = mask_logits[index // len(CLASSES)][None]
            logits = F.interpolate(logits, real.shape, mode="bilinear", align_corners=False)
            logits = logits[..., : real.any(1).sum(), : real.any(0).sum()]  # without padding
            logits = F.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)[0]
            masks = logits > 0
            sure = (logits.sigmoid() * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
            confidences = (likelihood[: len(index)] * sure).tolist()
            labels = (index % len(CLASSES)).tolist()
            for label, confidence, mask in zip(labels, confidences, masks.cpu().numpy(), strict=True):
                if confidence > THRESHOLD:
                    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                    found[number].append((Detection(CLASSES[label], confidence, tuple(map(int, box))), mask))
        return found

    def _name_colors(self, crops: list[Image.Image], names: list[str]) -> list[str | None]:
        """
        CLIP's choice among GenEval's colours for each object: the nearest mean of three prompts. `None` where its numbers
        are not finite.
        """
        chosen, clip = [], self._clip
        for start in range(0, len(crops), self.batch_size):
            model = clip._awake()
            pixel_values = clip.image_processor(images=crops[start : start + self.batch_size], return_tensors="pt")
            pixel_values = pixel_values["pixel_values"].to(clip._shared.device, clip.dtype)
            embeddings = normalized(pooled(model.get_image_features(pixel_values=pixel_values)))
            for embedding, name in zip(embeddings, names[start : start + self.batch_size], strict=True):
                prompts = [prompt.format(color=color, name=name) for color in COLORS for prompt in _COLOR_PROMPTS]
                means = clip.embed_prompts(model, prompts).unflatten(0, (len(COLORS), -1)).mean(1)
                cosines = normalized(means) @ embedding
                chosen.append(COLORS[cosines.argmax()] if cosines.isfinite().all() else None)
        return chosen

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        include: list[list[dict] | str | None],
        exclude: list[list[dict] | str | None] | None = None,
        log_extra=None,
        log_metric=None,
        **kwargs,
    ) -> list[float | None]:
        wanted = {
            number: parse_metadata(entries, exclude[number] if exclude else None)
            for number, entries in enumerate(map(_entries, include))
            if entries
        }
        colored = {number: {entry.name for entry in entries if entry.color} for number, (entries, _) in wanted.items()}
        numbers, detections = list(wanted), {}
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            found = self.detect([images[number] for number in batch], [colored[number] for number in batch])
            detections |= zip(batch, found, strict=True)
        scores = {
            number: all_scores(*wanted[number], found, self.extra_threshold)
            for number, found in detections.items()
            if found is not None
        }
        if log_extra is not None:
            log_extra("geneval_found", [_describe(detections.get(number)) for number in range(len(images))])
        if log_metric is not None and scores:
            for name in _SCORES:
                if name != self.definition:
                    log_metric(f"geneval/{name}", sum(score[name] for score in scores.values()) / len(scores))
        values = dict.fromkeys(wanted, math.nan) | {number: score[self.definition] for number, score in scores.items()}
        return [values.get(number) for number in range(len(images))]


def _describe(detections: list[Detection] | None) -> str | None:
    if detections is None:
        return None
    return ", ".join(
        f"{detection.color + ' ' if detection.color else ''}{detection.name} {detection.confidence:.2f}"
        for detection in detections
    )
