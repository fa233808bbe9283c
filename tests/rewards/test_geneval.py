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

import json
import math
import random
import sys
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from accelerate import PartialState
from original_models import clip_processor, picture, shaken
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from trl_flow import load_reward
from trl_flow.prompts.geneval import CLASSES, COLORS, geneval_dataset
from trl_flow.rewards import models
from trl_flow.rewards.geneval import (
    Detection,
    Wanted,
    all_scores,
    parse_metadata,
    relations,
    select,
)


def dog(left, top, size=10, confidence=0.95, color=None, name="dog"):
    return Detection(name, confidence, (left, top, left + size, top + size), color)


def cat(*args, **kwargs):
    return dog(*args, name="cat", **kwargs)


def scores(include, detections, exclude=None, extra_threshold=0.9):
    return all_scores(*parse_metadata(include, exclude), detections, extra_threshold)


ONE_DOG = [{"class": "dog", "count": 1}]
TWO_DOGS = [{"class": "dog", "count": 2}]
RED_DOG = [{"class": "dog", "count": 1, "color": "red"}]
DOG_LEFT_OF_CAT = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
RED_DOG_BLUE_CAT = [*RED_DOG, {"class": "cat", "count": 1, "color": "blue"}]


@pytest.mark.parametrize(
    "include, detections, graded, paper, flow_grpo",
    [
        (ONE_DOG, [dog(0, 0)], 1, 1, 1),
        (ONE_DOG, [], 0, 0, 0),
        # The loopholes of the paper's definition: more of what was asked for, and anything else
        (ONE_DOG, [dog(0, 0), dog(20, 0)], 0, 1, 0),
        (ONE_DOG, [dog(0, 0), cat(20, 0)], 1 / 2, 1, 1),
        (ONE_DOG, [dog(0, 0), cat(20, 0), cat(40, 0)], 1 / 3, 1, 1),
        (ONE_DOG, [dog(0, 0), cat(20, 0, confidence=0.8)], 1, 1, 1),
        (TWO_DOGS, [dog(0, 0)], 1 / 2, 0, 1 / 2),
        (TWO_DOGS, [dog(0, 0)] * 2, 1, 1, 1),
        (TWO_DOGS, [dog(0, 0)] * 3, 1 / 2, 1, 1 / 2),
        (TWO_DOGS, [dog(0, 0)] * 7, 0, 1, 1 - 5 / 2),
        # Where it counts, GenEval wants to be surer
        (TWO_DOGS, [dog(0, 0), dog(0, 20, confidence=0.85)], 1 / 2, 0, 1 / 2),
        (ONE_DOG, [dog(0, 0, confidence=0.31)], 1, 1, 1),
        (ONE_DOG, [dog(0, 0, confidence=0.3)], 0, 0, 0),
        (RED_DOG, [dog(0, 0, color="red")], 1, 1, 1),
        (RED_DOG, [dog(0, 0, color="blue")], 1 / 2, 0, 1 / 2),
        (RED_DOG, [], 0, 0, 0),
        # Of two dogs the paper looks at the surer one alone
        (RED_DOG, [dog(0, 0, 10, 0.9, "blue"), dog(20, 0, 10, 0.8, "red")], 1 / 2, 0, 0),
        (RED_DOG, [dog(0, 0, 10, 0.8, "blue"), dog(20, 0, 10, 0.9, "red")], 1 / 2, 1, 0),
        (RED_DOG_BLUE_CAT, [dog(0, 0, color="red"), cat(20, 0, color="blue")], 1, 1, 1),
        (RED_DOG_BLUE_CAT, [dog(0, 0, color="blue"), cat(20, 0, color="red")], 1 / 2, 0, 1 / 2),
        (DOG_LEFT_OF_CAT, [dog(0, 0), cat(20, 0)], 1, 1, 1),
        # A wrong position is worth 0 (not 1/2, as in the code of DiffusionNFT and Flow-GRPO)
        (DOG_LEFT_OF_CAT, [dog(20, 0), cat(0, 0)], 2 / 3, 0, 2 / 3),
        (DOG_LEFT_OF_CAT, [dog(0, 0), cat(0, 20)], 2 / 3, 0, 2 / 3),
        (DOG_LEFT_OF_CAT, [dog(0, 0)], 1 / 3, 0, 1 / 3),
        (DOG_LEFT_OF_CAT, [cat(0, 0)], 1 / 3, 0, 1 / 3),
        # All of them have to be there
        (DOG_LEFT_OF_CAT, [dog(0, 0), cat(20, 0), dog(40, 0, confidence=0.9)], 1 / 3, 1, 1 / 3),
        (DOG_LEFT_OF_CAT, [dog(0, 0), cat(20, 0), dog(10, 40, confidence=0.4)], 1 / 3, 1, 1 / 3),
    ],
)
def test_scores(include, detections, graded, paper, flow_grpo):
    for order in (detections, detections[::-1]):
        found = scores(include, order)
        assert found == pytest.approx(
            {"graded": graded, "strict": float(graded == 1), "paper": paper, "flow_grpo": flow_grpo}
        )


def test_too_many_is_wrong_where_the_metadata_exclude_it():
    exclude = [{"class": "dog", "count": 3}]
    assert [scores(TWO_DOGS, [dog(0, 0)] * n, exclude)["paper"] for n in range(5)] == [0, 0, 1, 0, 0]
    excluded_cat = [{"class": "cat", "count": 1}]
    found = scores(ONE_DOG, [dog(0, 0), cat(20, 0, confidence=0.5)], excluded_cat)
    assert found["paper"] == found["strict"] == 0 and found["graded"] == 1


def test_the_most_confident_sixteen_count():
    detections = [dog(0, 0, confidence=0.4 + n / 100) for n in range(20)]
    found = select(detections, 0.3)["dog"]
    assert [detection.confidence for detection in found] == [0.4 + n / 100 for n in range(19, 3, -1)]
    assert scores([{"class": "dog", "count": 16}], [dog(0, 0)] * 30)["strict"] == 1


def brute_relations(box, other):
    """GenEval's rule, axis by axis."""
    centers = [[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in (box, other)]
    distance = ((centers[0][0] - centers[1][0]) ** 2 + (centers[0][1] - centers[1][1]) ** 2) ** 0.5
    found = set()
    for axis, (less, more) in enumerate([("left of", "right of"), ("above", "below")]):
        offset = centers[0][axis] - centers[1][axis]
        margin = 0.1 * (box[axis + 2] - box[axis] + other[axis + 2] - other[axis])
        if abs(offset) - margin >= 1e-3 and (abs(offset) - margin) / distance > 0.5:
            found.add(less if offset < 0 else more)
    return found


def test_relations_follow_genevals_rule():
    numbers, seen = random.Random(0), set()
    for _ in range(2000):
        boxes = []
        for _ in range(2):
            left, top, width, height = (numbers.randint(0, 40) for _ in range(4))
            boxes.append((left, top, left + width + 1, top + height + 1))
        assert relations(*boxes) == brute_relations(*boxes)
        seen.add(frozenset(relations(*boxes)))
    assert len(seen) == 9  # none, four sides, four corners


def brute_paper(include, exclude, detections, threshold):
    """GenEval's `evaluate`, as its authors describe it: the surest objects of each class have to be right."""
    objects = {}
    for name in {d.name for d in detections}:
        surest = sorted(
            (d for d in detections if d.name == name and d.confidence > threshold), key=lambda d: -d.confidence
        )
        objects[name] = surest[:16]
    right = [False] * len(include)
    for i, entry in enumerate(include):
        chosen = objects.get(entry["class"], [])[: entry["count"]]
        if len(chosen) < entry["count"]:
            continue
        if "color" in entry and [d.color for d in chosen].count(entry["color"]) < entry["count"]:
            continue
        if "position" in entry:
            relation, j = entry["position"]
            others = objects.get(include[j]["class"], [])[: include[j]["count"]]
            pairs = product(chosen, others)
            if not right[j] or not all(relation in brute_relations(a.box, b.box) for a, b in pairs):
                continue
        right[i] = True
    return float(all(right) and not any(len(objects.get(e["class"], [])) >= e["count"] for e in exclude))


def brute_terms(include, detections, threshold, clip):
    """Number, colour and position of each entry, as lists of numbers; None where it is not asked for."""
    terms = []
    for entry in include:
        n = entry["count"]
        mine = [d for d in detections if d.name == entry["class"] and d.confidence > threshold]
        number = 1 - abs(n - len(mine)) / n
        color = 1 - abs(n - [d.color for d in mine].count(entry.get("color"))) / n if "color" in entry else None
        place = None
        if "position" in entry:
            relation, j = entry["position"]
            others = [d for d in detections if d.name == include[j]["class"] and d.confidence > threshold]
            held = [relation in brute_relations(a.box, b.box) for a in mine for b in others]
            place = float(bool(held) and all(held))
        terms.append([None if t is None else max(0, t) if clip else t for t in (number, color, place)])
    return terms


def test_scores_agree_with_their_definitions_on_random_scenes():
    draw = random.Random(0)
    rows = list(geneval_dataset("test"))
    values = set()
    for _ in range(3000):
        row = draw.choice(rows)
        names = [entry["class"] for entry in row["include"]] * 3 + [draw.choice(CLASSES)]
        detections = []
        for _ in range(draw.randint(0, 4)):
            left, top = draw.randint(0, 50), draw.randint(0, 50)
            box = (left, top, left + draw.randint(1, 20), top + draw.randint(1, 20))
            wanted = [entry["color"] for entry in row["include"] if "color" in entry] + ["red"]
            detections.append(Detection(draw.choice(names), draw.uniform(0.2, 1.4) % 1, box, draw.choice(wanted)))
        threshold = 0.9 if row["tag"] == "counting" else 0.3
        found = scores(row["include"], detections, row["exclude"])

        assert found["paper"] == brute_paper(row["include"], row["exclude"], detections, threshold)

        asked_for = {entry["class"] for entry in row["include"]}
        extra = sum(d.name not in asked_for and d.confidence > 0.9 for d in detections)
        terms = [
            t for entry in brute_terms(row["include"], detections, threshold, True) for t in entry if t is not None
        ]
        assert found["graded"] == pytest.approx(np.mean(terms) / (1 + extra))
        assert found["strict"] == (np.mean(terms) == 1 and extra == 0)

        terms, right = [], []
        for entry, (number, color, place) in zip(
            row["include"], brute_terms(row["include"], detections, threshold, False), strict=True
        ):
            terms.append(number)
            right.append(number == 1)
            if color is not None:
                terms.append(color if number == 1 else 0)
                right[-1] &= color == 1
            if place is not None:
                terms.append(place if number == 1 and right[entry["position"][1]] else 0)
                right[-1] &= terms[-1] == 1
        assert found["flow_grpo"] == pytest.approx(np.mean(terms))
        values.add((row["tag"], found["strict"], found["paper"]))
    # Each tag was right, wrong, and right for the paper alone; where it counts, the paper is as strict but for extras.
    assert len(values) >= 16


def test_metadata_of_every_prompt_are_understood():
    for row in [*geneval_dataset("test"), *geneval_dataset("train", 200)]:
        include, exclude = parse_metadata(row["include"], row["exclude"])
        assert len(include) == len(row["include"]) and len(exclude) == len(row["exclude"])
        # A nested column has all keys, None where there is nothing, and no lists of mixed types.
        nested = [
            {
                "class": entry["class"],
                "count": entry["count"],
                "color": entry.get("color"),
                "position": [str(part) for part in entry["position"]] if "position" in entry else None,
            }
            for entry in row["include"]
        ]
        assert parse_metadata(nested, None) == (include, [])
        assert parse_metadata(json.dumps(row["include"]), json.dumps(row["exclude"])) == (include, exclude)
    assert parse_metadata(DOG_LEFT_OF_CAT) == ([Wanted("cat", 1), Wanted("dog", 1, None, ("left of", 0))], [])


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"class": "wolf", "count": 1}, "'wolf' is none of GenEval's person, "),
        ({"class": "dog", "count": 1, "color": "mauve"}, "'mauve' is none of GenEval's red, "),
        ({"class": "dog", "count": 1, "position": ["near", 0]}, "'near' is none of GenEval's left of, "),
        ({"class": "dog", "count": 1, "position": ["above", 1]}, "index into the 1 entries"),
        ({"class": "dog", "count": 0}, "at least 1"),
        ({"class": "dog"}, "expected {'class': 'dog', 'count': 1}"),
        ("dog", "expected {'class': 'dog', 'count': 1}"),
    ],
)
def test_wrong_metadata_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_metadata([entry])


# The models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny models that see many things, saved: Mask2Former for pictures of 384 pixels, as transformers reads its masks."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    detector = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=32,
            hidden_dim=32,
            mask_feature_size=16,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=16,
            num_queries=24,
            id2label=dict(enumerate(CLASSES)),
        )
    )
    decoder = detector.model.pixel_level_module.decoder
    embedder = detector.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule("2.0")
    with torch.no_grad():
        shaken(detector)
        # Sure of what it sees, and of different things
        detector.class_predictor.weight *= 8
        detector.class_predictor.bias[-1] = -10
        # Masks with sharp borders, and by their first number, the same everywhere, not all over the picture
        decoder.mask_projection.weight *= 20
        decoder.mask_projection.weight[0], decoder.mask_projection.bias[0] = 0, 1
        embedder.weight[0], embedder.bias[0] = 0, -60
    detector.save_pretrained(folder / "detector")
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder / "detector")

    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=514, bos_token_id=512, eos_token_id=513, **tower)
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **tower), projection_dim=16)
    )
    shaken(clip).save_pretrained(folder / "clip")
    clip_processor(32).save_pretrained(folder / "clip")
    return folder


def load(checkpoints, **settings):
    PartialState(cpu=True)  # what the libraries' loggers ask for
    models = {"model": str(checkpoints / "detector"), "clip_model": str(checkpoints / "clip")}
    return load_reward({"geneval": {**models, "device": "cpu", **settings}})


def stock_detections(checkpoints, image):
    """What transformers itself makes of a picture of 384 pixels, with CLIP's choice of each object's colour."""
    processor = Mask2FormerImageProcessorPil.from_pretrained(checkpoints / "detector")
    detector = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoints / "detector").eval()
    clip = CLIPModel.from_pretrained(checkpoints / "clip").eval()
    both = clip_processor(32)
    with torch.no_grad():
        outputs = detector(**processor(images=image, return_tensors="pt"))
        (found,) = processor.post_process_instance_segmentation(
            outputs, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
        )
        detections = []
        for segment, mask in zip(found["segments_info"], found["segmentation"].bool().numpy(), strict=True):
            name = CLASSES[segment["label_id"]]
            y, x = np.where(mask)
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            pixels = np.where(mask[..., None], np.asarray(image), 0x99)[box[1] : box[3], box[0] : box[2]]
            prompts = [
                text
                for color in COLORS
                for text in (
                    f"a photo of a {color} {name}",
                    f"a photo of a {color}-colored {name}",
                    f"a photo of a {color} object",
                )
            ]
            inputs = both(text=prompts, images=Image.fromarray(pixels), return_tensors="pt", padding=True)
            cosines = clip(**inputs).logits_per_image[0].double()
            # Of the mean of three directions; its length matters, too.
            directions = torch.nn.functional.normalize(
                clip.get_text_features(**both(text=prompts, return_tensors="pt", padding=True)).pooler_output, dim=-1
            )
            lengths = directions.view(10, 3, -1).mean(1).norm(dim=-1)
            color = COLORS[(cosines.view(10, 3).mean(1) / lengths).argmax()]
            detections.append(Detection(name, segment["score"], tuple(map(int, box)), color))
    return detections


def test_it_sees_what_transformers_sees(checkpoints):
    def in_order(detection):
        return detection.name, detection.box, detection.confidence

    reward = load(checkpoints)
    images = [picture(seed, 384, 384) for seed in (3, 4)]
    expected = [sorted(stock_detections(checkpoints, image), key=in_order) for image in images]
    assert all(len(found) >= 3 for found in expected)  # there is something to compare
    detections = reward.detect(images, [set(CLASSES)] * 2)
    for found, wanted in zip(detections, expected, strict=True):
        found = sorted(found, key=in_order)
        assert [d[:1] + d[2:] for d in found] == [d[:1] + d[2:] for d in wanted]
        assert [d.confidence for d in found] == pytest.approx([d.confidence for d in wanted], abs=1e-5)
    assert len({d.color for found in expected for d in found}) > 1
    # Colours are looked at where they are asked for
    name = expected[0][0].name
    assert {d.name for d in reward.detect(images[:1], [{name}])[0] if d.color} == {name}

    # From there, the rules
    sure = [[d for d in found if d.confidence > 0.9] for found in expected]
    include = [[{"class": found[0].name, "count": [d.name for d in found].count(found[0].name)}] for found in sure]
    include[0][0]["color"] = sure[0][0].color
    by_hand = [scores(*pair) for pair in zip(include, expected, strict=True)]
    metrics, logged = {}, {}
    logs = {"log_metric": metrics.__setitem__, "log_extra": logged.__setitem__, "trainer_state": None}
    values = reward(["a", "b"], images, include=include, **logs)
    assert values == pytest.approx([score["graded"] for score in by_hand]) and min(values) > 0
    assert metrics == pytest.approx(
        {f"geneval/{name}": np.mean([score[name] for score in by_hand]) for name in ("strict", "paper", "flow_grpo")}
    )
    assert metrics["geneval/paper"] > 0
    assert f"{sure[0][0].color} {sure[0][0].name} " in logged["geneval_found"][0]


def test_pictures_of_other_sizes_and_batches(checkpoints):
    # Not square, and made smaller with their shape kept, so that the processor has to fill up
    reward = load(checkpoints, batch_size=2)
    reward.prepare()
    reward.image_processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 90, "longest_edge": 200})
    images = [picture(seed, 150, 100) for seed in range(5)]
    together = reward.detect(images, [set()] * 5)
    for image, found in zip(images, together, strict=True):
        (alone,) = reward.detect([image], [set()])
        assert [d[:1] + d[2:] for d in alone] == [d[:1] + d[2:] for d in found]
        for detection in found:
            left, top, right, bottom = detection.box
            assert 0 <= left < right <= 150 and 0 <= top < bottom <= 100
    assert max(d.box[2] for found in together for d in found) == 150
    assert max(d.box[3] for found in together for d in found) == 100
    include = [[{"class": (found or [Detection("dog", 1, (0, 0, 1, 1))])[0].name, "count": 1}] for found in together]
    include[3] = None
    batched = reward([""] * 5, images, include=include, exclude=[None] * 5)
    assert batched[3] is None
    reward.batch_size = 5
    assert reward([""] * 5, images, include=include) == batched


def test_masks_lie_where_the_pixels_are(checkpoints):
    """The same picture with and without padding: a processor that fills up to twice the size must not move the boxes."""
    reward = load(checkpoints)
    reward.prepare()
    reward.image_processor = Mask2FormerImageProcessorPil(size={"height": 96, "width": 96}, size_divisor=0)
    image = picture(1, 96, 96)
    original = reward._shared.module.forward
    heights = []

    def forward(pixel_values, pixel_mask):
        outputs = original(pixel_values=pixel_values, pixel_mask=pixel_mask)
        # A mask in the upper left quarter of whatever was put in
        logits = torch.full_like(outputs.masks_queries_logits, -8.0)
        height, width = (side // 2 for side in logits.shape[-2:])
        logits[..., :height, :width] = 8.0
        outputs.masks_queries_logits = logits
        heights.append(pixel_values.shape[-2])
        return outputs

    reward._shared.module.forward = forward
    try:
        (found,) = reward.detect([image], [set()])
        assert heights == [96] and found
        assert all(np.allclose(d.box, (0, 0, 48, 48), atol=2) for d in found)
        # Beside a picture twice as high, what was a quarter of the input is half of the picture's height.
        reward.image_processor = Mask2FormerImageProcessorPil(do_resize=False, size_divisor=0)
        found, _ = reward.detect([image, picture(2, 96, 192)], [set(), set()])
        assert heights[-1] == 192
        assert found and all(np.allclose(d.box, (0, 0, 48, 96), atol=2) for d in found)
    finally:
        del reward._shared.module.forward


def test_outputs_that_are_not_finite_are_missing_scores(checkpoints):
    reward = load(checkpoints)
    reward.prepare()
    detector = reward._shared.module
    original, images = detector.forward, [picture(seed, 384, 384) for seed in (3, 4, 3)]
    (objects, *_) = reward.detect(images, [set()] * 3)
    include = [[{"class": objects[0].name, "count": 1}]] * 3
    expected = reward([""] * 3, images, include=include)

    def forward(**kwargs):
        outputs = original(**kwargs)
        outputs.class_queries_logits[1, 0, 0] = float("inf")
        outputs.masks_queries_logits[2, 5, 7, 9] = float("nan")
        return outputs

    detector.forward = forward
    metrics, logged = {}, {}
    try:
        scores = reward(
            [""] * 4,
            [*images, images[0]],
            include=[*include, None],
            log_metric=metrics.__setitem__,
            log_extra=logged.__setitem__,
        )
    finally:
        del detector.forward
    assert scores == [expected[0], pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), None]
    assert math.isfinite(metrics["geneval/paper"]) and logged["geneval_found"][1:] == [None] * 3


def test_colours_that_clip_cannot_say_are_missing_scores(checkpoints):
    reward = load(checkpoints)
    image = picture(3, 384, 384)
    name = reward.detect([image], [set()])[0][0].name
    projection = reward._clip._shared.module.visual_projection.weight
    kept = projection.clone()
    try:
        projection.data[0, 0] = math.nan
        scores = reward(
            [""] * 2, [image] * 2, include=[[{"class": name, "count": 1, "color": color}] for color in ("red", None)]
        )
    finally:
        projection.data.copy_(kept)
    # Where no colour is asked for, CLIP is not.
    assert math.isnan(scores[0]) and math.isfinite(scores[1])


@pytest.mark.parametrize("include", [None, [], "[]", " [] ", "null", ""])
def test_without_entries_it_does_not_apply(include):
    assert load_reward("geneval")([""], [picture(0, 8, 8)], include=[include], exclude=["[]"]) == [None]


def test_clip_is_shared_and_weights_wait_where_they_are_told(checkpoints):
    clip = load_reward({"clip": {"model": str(checkpoints / "clip"), "dtype": "float64"}})
    geneval = load(checkpoints, offload=True, dtype="float64")  # no other test's weights
    clip.prepare("cpu")
    geneval.prepare()
    assert geneval._clip._shared.module is clip._shared.module
    assert geneval.source == {"weights": str(checkpoints / "detector"), "clip_weights": str(checkpoints / "clip")}
    assert not geneval._shared.on_device
    assert geneval([""], [picture(0, 64, 64)], include=[ONE_DOG])[0] >= 0
    assert geneval._shared.on_device
    geneval.release()
    assert not geneval._shared.on_device


def test_lower_precision(checkpoints):
    """CLIP's: the detector sees the same."""
    reward, half = load(checkpoints), load(checkpoints, dtype="bfloat16")
    image = picture(3, 384, 384)
    (found,) = half.detect([image], [set()])
    assert found and [found] == reward.detect([image], [set()])
    assert half._clip._shared.module.visual_projection.weight.dtype == torch.bfloat16
    (score,) = half([""], [image], include=[[{"class": found[0].name, "count": 1, "color": "red"}]])
    assert 0 <= score <= 1


def test_loading_leaves_the_random_numbers_alone(checkpoints, monkeypatch):
    monkeypatch.setattr(models, "_SHARED", weakref.WeakValueDictionary())  # nothing is there already
    reward = load(checkpoints)
    state = torch.get_rng_state()
    reward.prepare()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_torchvision(checkpoints):
    load(checkpoints).prepare()
    assert "torchvision" not in sys.modules and "timm" not in sys.modules


def test_another_detector_is_refused(checkpoints, tmp_path):
    config = Mask2FormerConfig.from_pretrained(checkpoints / "detector")
    config.id2label = {0: "wall", 1: "floor"}
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 2 classes, from 'wall' on: expected a detector of COCO's 80"):
        load(checkpoints, model=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    "settings, message",
    [({"score": "soft"}, "graded, strict, paper, flow_grpo"), ({"extra_threshold": 0.1}, "0.3 to 1")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_reward({"geneval": settings})


def test_what_it_says_about_itself():
    reward = load_reward("geneval")
    assert reward.prompt_set == "geneval" and reward.requires == ("include",)
    assert "not comparable" in reward.about.scale.lower()
