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

"""Rewards that ask a model with eyes, behind an endpoint, what it thinks of pictures."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import ClassVar

from PIL import Image

from .chat import CUT_OFF, ChatEndpoint, Failure, Question, Reply
from .loading import load_reward
from .reward import About, Reward


# Of the standard library: these rewards also work outside of a trainer, where accelerate's logger does not.
logger = logging.getLogger(__name__)

# What follows the name of a mark: perhaps a remark in brackets, as "(1-5)", and the mark, perhaps in brackets as well. What
# looks like a number and is none ("2,5") is found as a whole, so that it is not taken for another one.
_MARK = r"(?:[*\s]*[(\[][^()\[\]]*[)\]])?+[:*\s]*[(\[<]?(\d+(?:[.,-]\d+)*)"


@dataclass(kw_only=True, repr=False, eq=False)
class Judge(Reward):
    """
    A reward that asks a model behind an endpoint that speaks OpenAI's chat protocol.

    A reply that cannot be read or was cut off, or a request that fails for good, is a missing score (NaN), never a 0. Both
    are logged: `<name>/unparsed` and `<name>/failed` are shares of the requests. What a judge thinks before it answers
    (`<think>...</think>`) is not read.

    Args:
        base_url (`str`): Address of the endpoint: `"http://localhost:8000/v1"`.
        model (`str`): Name under which the server knows the model.
        api_key (`str`, *optional*): Otherwise the environment variable `OPENAI_API_KEY`, or none. Settings are written
            down with a run: prefer the variable.
        template (`str`, *optional*): Question to ask instead of the built-in one, in the form that the built-in one
            asks the answer in. `{prompt}` in it stands for the prompt.
        max_tokens (`int`, *optional*): Longest reply. `None` leaves it to the server.
        extra_body (`dict`, *optional*): Further fields of the request: `{"chat_template_kwargs": {"enable_thinking":
            false}}` keeps a thinking model from it.
        max_workers (`int`): Requests that are under way at once.
        timeout (`float`): Seconds that a whole answer may take. Then the request is given up and sent again.
        max_wait (`float`): Seconds after which a request that keeps failing is not sent again.
        backoff (`float`): First pause between two attempts, in seconds. It doubles each time, up to a minute.
    """

    base_url: str
    model: str
    api_key: InitVar[str | None] = None
    template: str | None = None
    max_tokens: int | None = 1024
    extra_body: dict | None = None
    max_workers: int = 16
    timeout: float = 120.0
    max_wait: float = 300.0
    backoff: float = 1.0

    concurrent = True
    name: ClassVar[str]

    def __post_init__(self, api_key: str | None):
        self._endpoint = ChatEndpoint(
            self.base_url,
            self.model,
            api_key,
            max_workers=self.max_workers,
            timeout=self.timeout,
            max_wait=self.max_wait,
            backoff=self.backoff,
        )
        if "{prompt}" not in self._template():
            raise ValueError(f"template={self.template!r} asks about no prompt: expected {{prompt}} in it.")

    @property
    def source(self) -> dict[str, str]:
        return {"model": self.model, "endpoint": self._endpoint.address}

    def _template(self) -> str:
        return self.template or self.default_template

    def _ask(self, questions: list[Question], read: Callable, log_metric: Callable | None, **parameters) -> list:
        """
        What `read(number, reply)` makes of the reply to each question; `None` where it makes nothing of it, or there
        is none.
        """
        if not questions:
            return []
        fields = {"max_tokens": self.max_tokens, **parameters, **(self.extra_body or {})}
        replies = self._endpoint.ask(questions, **fields)
        failed = [reply.reason for reply in replies if isinstance(reply, Failure)]
        verdicts = [
            None if isinstance(reply, Failure) else read(number, reply) for number, reply in enumerate(replies)
        ]
        unread = [
            f"{reply.text[-300:]!r} {reply.remark}".strip()
            for reply, verdict in zip(replies, verdicts, strict=True)
            if verdict is None and isinstance(reply, Reply)
        ]
        for what, cases in (("could not be read", unread), ("did not come", failed)):
            if cases:
                logger.warning(
                    f"{self.name}: {len(cases)} of {len(replies)} replies of {self._endpoint} {what}. The first: "
                    f"{cases[0]}"
                )
        if log_metric is not None:
            log_metric(f"{self.name}/unparsed", len(unread) / len(replies))
            log_metric(f"{self.name}/failed", len(failed) / len(replies))
        return verdicts


@dataclass(kw_only=True, repr=False, eq=False)
class UnifiedReward(Judge):
    """
    UnifiedReward, a family of judges for pictures: one overall mark (1.5), or marks for alignment, coherence and style
    (2.0), which are logged apart.

    The models were trained on one wording of the question each. The built-in questions ask for the same thing in the
    same form of answer, in other words: for scores that are to be compared with published ones, copy the wording from
    the model's card into `template`.

    Args:
        version (`str`): `"1.5"` (and the models before it) or `"2.0"`.
        settings: Those of [`Judge`].
    """

    version: str = "1.5"

    name = "unified_reward"
    about = About(
        definition=(
            "A vision-language model, trained on human preferences, marks how well a picture fits its prompt and how "
            "good it looks. Version 1.5 writes 'Final Score: x', x from 1 to 5; version 2.0 writes such a mark for each "
            "of alignment, coherence and style."
        ),
        scale=(
            "0.2 to 1 (version 1.5: x / 5, as in flow_grpo), 0 to 1 (version 2.0: (mean - 1) / 4, as in verl-omni). The "
            "marks are mostly whole numbers, so that many pictures of a group tie. flow_grpo and others score 0 where "
            "the reply cannot be read; here it is a missing score."
        ),
        source="https://arxiv.org/abs/2503.05236, https://github.com/CodeGoat24/UnifiedReward",
        license="MIT on the cards of CodeGoat24/UnifiedReward-* that were seen; see the card of the one that you serve",
        hacked_by=(
            "Tiny differences between marks, made large by the normalisation of a group: Pref-GRPO (arXiv:2508.20751) "
            "saw marks rise and pictures get worse. Judges also read writing in a picture, which may talk to them."
        ),
    )
    _TEMPLATES: ClassVar[dict[str, str]] = {
        "1.5": (
            "Here are an image that was generated from a text caption, and the caption. Evaluate the image by two "
            "criteria:\n"
            "1. Alignment with the Caption: are the objects of the caption there, with the attributes and the relations "
            "that it gives them?\n"
            "2. Overall Image Quality: is the image clear and detailed, are its colors right, does it look good?\n"
            "List the key elements of the caption and whether the image shows them, in the format 'element (type): "
            "value' (value=1: generated, value=0: not generated). Then write 'Final Score:' and a score from 1 to 5.\n"
            "Text Caption: [{prompt}]"
        ),
        "2.0": (
            "Here are an image that was generated from a text caption, and the caption. Rate the image from 1 to 5 on "
            "each of these:\n"
            "- Alignment Score: how well its content matches the caption.\n"
            "- Coherence Score: how consistent it is: no glitches, no distorted objects.\n"
            "- Style Score: how pleasing it looks, whatever the caption says.\n\n"
            "Answer in this format:\n\n"
            "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
            "Text Caption: [{prompt}]"
        ),
    }
    _MARKS: ClassVar[dict[str, dict[str, str]]] = {
        "1.5": {"score": r"Final Score"},
        "2.0": {axis.lower(): rf"{axis} Score" for axis in ("Alignment", "Coherence", "Style")},
    }

    def __post_init__(self, api_key: str | None):
        self.version = str(self.version)  # a number in YAML
        if self.version not in self._TEMPLATES:
            raise ValueError(f"version={self.version!r} is unknown: expected {' or '.join(self._TEMPLATES)}.")
        super().__post_init__(api_key)

    @property
    def default_template(self) -> str:
        return self._TEMPLATES[self.version]

    def __call__(
        self, prompts: list[str], images: list[Image.Image], log_metric: Callable | None = None, **columns
    ) -> list[float]:
        questions = [
            Question((image,), fill(self._template(), prompt=prompt))
            for prompt, image in zip(prompts, images, strict=True)
        ]
        marks = self._ask(questions, self._read, log_metric)
        read = [marks_of_one for marks_of_one in marks if marks_of_one is not None]
        if log_metric is not None and read and self.version == "2.0":
            for axis in read[0]:
                log_metric(f"{self.name}/{axis}", sum(marks_of_one[axis] for marks_of_one in read) / len(read))
        return [
            math.nan if marks_of_one is None else self._score(list(marks_of_one.values())) for marks_of_one in marks
        ]

    def _score(self, marks: list[float]) -> float:
        return marks[0] / 5 if self.version == "1.5" else (sum(marks) / len(marks) - 1) / 4

    def _read(self, number: int, reply: Reply) -> dict[str, float] | None:
        marks, text = {}, _conclusion(reply)
        for name, pattern in self._MARKS[self.version].items():
            # The last one: a judge may quote what it read in the picture before it decides.
            found = re.findall(pattern + _MARK, text, re.IGNORECASE)
            try:
                marks[name] = float(found[-1])
            except (IndexError, ValueError):
                return None
            if not 1 <= marks[name] <= 5:
                return None
        return marks


@dataclass(kw_only=True, repr=False, eq=False)
class UniGenBenchReward(Judge):
    """
    UniGenBench's measure: the share of a prompt's test points that a judge finds fulfilled. The mean of each test point
    is logged as `unigenbench/<test point>`.

    The dataset has a column `testpoints` with a list of texts (`["Attribute - Color", "Action - State"]`), and may have
    `testpoint_descriptions` with as many: what each means for this prompt. A row without test points has no score.

    The published evaluation words its question otherwise and adds definitions of its 27 test points: scores are not those
    of the leaderboard. In a `template`, `{testpoints}` stands for the list.

    Args:
        settings: Those of [`Judge`].
    """

    name = "unigenbench"
    requires = ("testpoints",)
    about = About(
        definition=(
            "Share of a prompt's test points (colour, layout, action, negation, text ...) that a vision-language model "
            "finds fulfilled. It answers with a list of zeros and ones, as long as the list of test points."
        ),
        scale="0 to 1, in steps of 1 / number of test points. The benchmark reports means over test points in percent.",
        source="https://arxiv.org/abs/2508.20751, https://arxiv.org/abs/2510.18701, https://github.com/CodeGoat24/UniGenBench",
        license=("Not checked for CodeGoat24/UniGenBench-EvalModel-*: see the card of the one that you serve."),
        hacked_by=(
            "Nothing known, but it asks what is there and not how it looks: quality and diversity may go, and a collage "
            "of the things asked for, or writing that names them, may do."
        ),
    )
    default_template = (
        "Here are an image that was generated from a prompt, and the checkpoints that it is tested on. Judge only what "
        "can be seen in the image: do not guess, and do not count what is uncertain.\n"
        "Prompt: 「{prompt}」\n"
        "Checkpoints:\n{testpoints}\n"
        "Analyse the image for each checkpoint in turn. Then give each checkpoint 1 if the image meets it, and 0 if not. "
        "Both lists are as long as the list of checkpoints, in the same order.\n"
        "Answer in this format:\n"
        '<analysis>["analysis of the first checkpoint", ...]</analysis>\n'
        "<score>[0 or 1 for the first checkpoint, ...]</score>"
    )

    def __post_init__(self, api_key: str | None):
        super().__post_init__(api_key)
        if "{testpoints}" not in self._template():
            raise ValueError(f"template={self.template!r} asks about no test points: expected {{testpoints}} in it.")

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        testpoints: list[list[str] | None] | None = None,
        testpoint_descriptions: list[list[str] | None] | None = None,
        log_metric: Callable | None = None,
        **columns,
    ) -> list[float | None]:
        if testpoints is None:
            raise ValueError("unigenbench needs a column testpoints in the dataset: a list of texts for each prompt.")
        descriptions = testpoint_descriptions or [None] * len(prompts)
        for column, rows in (("testpoints", testpoints), ("testpoint_descriptions", descriptions)):
            for row in rows:
                if isinstance(row, str):
                    raise ValueError(f"{column}={row!r} is a text: expected a list of texts for each prompt.")
        asked = [number for number, points in enumerate(testpoints) if points]
        questions = [
            Question(
                (images[i],),
                fill(self._template(), prompt=prompts[i], testpoints=_checkpoints(testpoints[i], descriptions[i])),
            )
            for i in asked
        ]

        def read(number: int, reply: Reply) -> list[int] | None:
            return _zeros_and_ones(_conclusion(reply), len(testpoints[asked[number]]))

        scores: list[float | None] = [None] * len(prompts)
        by_point: dict[str, list[int]] = {}
        for i, points in zip(asked, self._ask(questions, read, log_metric), strict=True):
            if points is None:
                scores[i] = math.nan
                continue
            scores[i] = sum(points) / len(points)
            for name, point in zip(testpoints[i], points, strict=True):
                by_point.setdefault(name, []).append(point)
        if log_metric is not None:
            for name, points in by_point.items():
                log_metric(f"{self.name}/{name}", sum(points) / len(points))
        return scores


@dataclass(kw_only=True, repr=False, eq=False)
class YesNoReward(Judge):
    """
    A question that any model with eyes can answer with Yes or No: P(Yes) / (P(Yes) + P(No)) of its first token, summed
    over spellings (" Yes", "yes", "YES").

    Where the server gives no log-probabilities, the score is 1 or 0 after the reply's first word, and a warning says so
    once: a group in which all answers are the same has nothing to learn from.

    Args:
        template (`str`, *optional*): Question to ask, with `{prompt}` in it: `"Is this a photo of {prompt} with nothing
            else in it? Answer Yes or No."`
        max_tokens (`int`, *optional*): 1, as only the first token is read.
        settings: The others of [`Judge`].
    """

    max_tokens: int | None = 1

    name = "yes_no"
    about = About(
        definition="Probability that a vision-language model answers Yes, and not No, when asked whether a picture fits.",
        scale="0 to 1, often close to one end. Among the 20 most probable tokens; the missing one of the two counts 0.",
        source="VQAScore, https://arxiv.org/abs/2404.01291; as a reward: https://github.com/X-GenGroup/Flow-Factory",
        license="Of the model that you serve",
        hacked_by=(
            "It looks at what the question names and nothing else, so that quality and diversity may go. Models may "
            "lean to Yes; they read writing in a picture, which may talk to them."
        ),
    )
    default_template = (
        'Does this image show what the following description says, in every detail? Description: "{prompt}"\n'
        "Answer with Yes or No only."
    )
    _warned: ClassVar[bool] = False

    def __call__(
        self, prompts: list[str], images: list[Image.Image], log_metric: Callable | None = None, **columns
    ) -> list[float]:
        questions = [
            Question((image,), fill(self._template(), prompt=prompt))
            for prompt, image in zip(prompts, images, strict=True)
        ]
        scores = self._ask(questions, self._read, log_metric, logprobs=True, top_logprobs=20)
        return [math.nan if score is None else score for score in scores]

    def _read(self, number: int, reply: Reply) -> float | None:
        if reply.first_token is None:
            return self._read_text(reply.text)
        yes, no = (
            sum(math.exp(logprob) for token, logprob in reply.first_token if token.strip().casefold() == word)
            for word in ("yes", "no")
        )
        return yes / (yes + no) if yes + no > 0 else None

    def _read_text(self, text: str) -> float | None:
        word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
        if word is None:
            return None
        if not self._warned:
            self._warned = True
            logger.warning(
                f"yes_no: {self._endpoint} gives no log-probabilities, so that scores are 1 or 0 instead of probabilities."
            )
        return float(word[1].lower() == "yes")


@dataclass(kw_only=True, repr=False, eq=False)
class WinRateReward(Judge):
    """
    Pref-GRPO's reward: a judge compares the pictures of a group with each other, two at a time, and each picture's score
    is the share of its comparisons that it won. A tie is half a win.

    A comparison without an answer is left out; a picture without comparisons has no score. `win_rate/first` is the share
    of the decided comparisons that the picture shown first won: 0.5, unless the judge cares about the order.

    Args:
        num_opponents (`int`, *optional*): Pictures that each one is compared with; one more if this number and the size
            of the group are odd. `None`: all others.
        both_orders (`bool`): Whether a pair is shown twice, in either order. Otherwise every picture is shown first in
            half of its comparisons, give or take one.
        settings: Those of [`Judge`].
    """

    num_opponents: int | None = None
    both_orders: bool = False

    name = "win_rate"
    scope = "group"
    about = About(
        definition="Share of comparisons with other pictures of the same prompt that a picture wins before a judge.",
        scale=(
            "0 to 1, with mean 0.5 in every group of which all comparisons were answered: only differences within a "
            "group mean something, and the mean of a run says nothing about progress."
        ),
        source="Pref-GRPO, https://arxiv.org/abs/2508.20751",
        license="Of the model that you serve. CodeGoat24/UnifiedReward-* are MIT on the cards that were seen.",
        hacked_by=(
            "Less by tiny differences than a mark is, as a win by little is a win. What the judge likes beside the prompt "
            "still wins (saturation, detail, a house style), and so may the picture that is shown first."
        ),
    )
    default_template = (
        "Here are two images that were generated from a text caption, and the caption. Compare them by two criteria:\n"
        "1. Alignment with the Caption: are the objects of the caption there, with the attributes and the relations that "
        "it gives them?\n"
        "2. Overall Image Quality: is the image clear and detailed, are its colors right, does it look good?\n"
        'Conclude with one of "Image 1 is better.", "Image 2 is better." and "Both images are equally good."\n'
        "Text Caption: [{prompt}]"
    )

    def __post_init__(self, api_key: str | None):
        super().__post_init__(api_key)
        if self.num_opponents is not None and self.num_opponents < 1:
            raise ValueError(f"num_opponents={self.num_opponents}: expected at least 1, or None for all others.")

    def __call__(
        self, prompts: list[str], images: list[Image.Image], log_metric: Callable | None = None, **columns
    ) -> list[float | None]:
        if len(images) < 2:
            return [None] * len(images)
        if len(set(prompts)) > 1:
            raise ValueError(
                f"win_rate compares pictures of one prompt, and got {len(set(prompts))} prompts: call it for each group."
            )
        pairs = tournament(len(images), self.num_opponents)
        if self.both_orders:
            pairs += [(j, i) for i, j in pairs]
        text = fill(self._template(), prompt=prompts[0])
        shares = self._ask([Question((images[i], images[j]), text) for i, j in pairs], _share_of_first, log_metric)
        wins, games = [0.0] * len(images), [0] * len(images)
        for (i, j), share in zip(pairs, shares, strict=True):
            if share is not None:
                wins[i] += share
                wins[j] += 1 - share
                games[i] += 1
                games[j] += 1
        decided = [share for share in shares if share in (0.0, 1.0)]
        if log_metric is not None and decided:
            log_metric(f"{self.name}/first", sum(decided) / len(decided))
        return [won / played if played else math.nan for won, played in zip(wins, games, strict=True)]


JUDGES = tuple(judge.name for judge in (YesNoReward, UnifiedReward, UniGenBenchReward, WinRateReward))


def load_judge(spec: str, judge: str = "yes_no", **settings) -> Judge:
    """
    The judge that `"openai:MODEL@http://host/v1"` names.

    Args:
        spec (`str`): `"MODEL@http://host/v1"`.
        judge (`str`): How the model is asked: `"yes_no"`, `"unified_reward"`, `"unigenbench"` or `"win_rate"`.
        settings: Settings of that judge.

    Raises:
        ValueError: If `spec` has another form, or there is no such judge or setting.
    """
    parts = re.fullmatch(r"(?P<model>.+?)@(?P<base_url>https?://.+)", spec)
    if parts is None:
        raise ValueError(f"'openai:{spec}' names no judge: expected 'openai:MODEL@http://host/v1'.")
    if judge not in JUDGES:
        raise ValueError(f"judge={judge!r} is unknown: expected one of {', '.join(JUDGES)}.")
    return load_reward(judge, **parts.groupdict(), **settings)


def fill(template: str, **values: str) -> str:
    """`template` with `{name}` replaced, in one go: braces of a prompt stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)


def tournament(n: int, num_opponents: int | None = None) -> list[tuple[int, int]]:
    """
    Pairs of n players around a table: each one meets the next, the one after the next, and so on. The first of a pair
    is shown first, which every player is as often as not, give or take one.

    Args:
        n (`int`): Number of players.
        num_opponents (`int`, *optional*): Games of each player; one more if both numbers are odd, as then there is no
            such set of pairs. `None`: one with every other.
    """
    games = n - 1 if num_opponents is None else min(num_opponents, n - 1)
    if n % 2:
        games += games % 2
    pairs = [(i, (i + distance) % n) for distance in range(1, games // 2 + 1) for i in range(n)]
    if games % 2:
        half = n // 2
        pairs += [(i + half, i) if i % 2 else (i, i + half) for i in range(half)]
    return pairs


def _conclusion(reply: Reply) -> str:
    """What a reply says after its thoughts, of which some servers leave out the beginning. Nothing if it is not complete:
    what a judge considers before it decides is no verdict."""
    text = re.split("</think>", reply.text, flags=re.IGNORECASE)[-1]
    tags = re.findall(r"</?(?:think|answer)>", text.lower())
    is_open = "<think>" in tags or tags.count("<answer>") > tags.count("</answer>")
    return "" if is_open or reply.remark == CUT_OFF else text


def _share_of_first(number: int, reply: Reply) -> float | None:
    """1.0 if the first of two pictures is better, 0.0 if the second is, 0.5 for a tie. Thinking judges put it into
    `<answer>`; of several sentences the last counts."""
    text = _conclusion(reply)
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    found = re.findall(r"image ([12]) is better|equally good", answers[-1] if answers else text, re.IGNORECASE)
    return {"1": 1.0, "2": 0.0, "": 0.5}[found[-1]] if found else None


def _checkpoints(names: list[str], descriptions: list[str] | None) -> str:
    if descriptions is None:
        descriptions = [""] * len(names)
    if len(descriptions) != len(names):
        raise ValueError(
            f"A row has {len(names)} testpoints and {len(descriptions)} testpoint_descriptions: expected one for each."
        )
    return "\n".join(
        f"{number}. {name}: {description}".rstrip(": ")
        for number, (name, description) in enumerate(zip(names, descriptions, strict=True), start=1)
    )


def _zeros_and_ones(text: str, length: int) -> list[int] | None:
    found = re.findall(r"<score>(.*?)</score>", text, re.DOTALL | re.IGNORECASE)
    try:
        points = json.loads(found[-1])
    except (IndexError, ValueError):
        return None
    if not isinstance(points, list) or len(points) != length or any(point not in (0, 1) for point in points):
        return None
    return points
