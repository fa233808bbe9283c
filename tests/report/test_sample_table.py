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

import io
import math

import pytest

from trl_flow.report.sample_table import contrasting, print_samples


PROMPTS = ["a [red]cup[/red]\n on a table", "a photo of " + "many things " * 40]


def lines(prompts=PROMPTS, scores=None, advantages=(0.75, None), width=80) -> list[str]:
    stream = io.StringIO()
    print_samples(prompts, scores or {"ocr": [0.5, None]}, advantages, step=7, stream=stream, width=width)
    return stream.getvalue().splitlines()


class TestPrintSamples:
    def test_a_row_for_each_sample(self):
        text = lines(scores={"shapes_partial": [0.5, None], "geneval": [1.0, math.nan]})
        assert text[0].strip() == "Update 7"
        assert [cell.strip() for cell in text[2].strip("│").split("│")] == [
            "prompt",
            "shapes_partial",
            "geneval",
            "advantage",
        ]
        first, second = ([cell.strip() for cell in text[row].strip("│").split("│")] for row in (4, 5))
        assert first == ["a [red]cup[/red] on a table", "0.500", "1.000", "0.750"], "markup means nothing"
        assert second[1:] == ["–", "–", "–"]

    def test_long_prompts_are_cut(self):
        text = lines()
        assert len(text) == 9, "title, borders, names, a line and three lines"
        assert "…" in text[-2] and "photo" in text[-4]

    @pytest.mark.parametrize("width", [60, 80, 200])
    @pytest.mark.parametrize("count", [1, 3, 9])
    def test_any_number_of_rewards_fits(self, width, count):
        names = ["shapes_partial", "geneval", "pickscore", "ocr", "hpsv2", "aesthetic", "clip", "a", "b"][:count]
        text = lines(scores={name: [0.123, -12345.6] for name in names}, width=width)
        assert all(len(line) <= width for line in text)
        everything = "\n".join(text)
        for name in names:
            assert name in everything
        assert everything.count("0.123") == everything.count("-1.23e+04") == count, "no number is cut"
        assert "a [red]cup[/red]" in everything

    def test_a_stream_that_knows_few_letters(self):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
        print_samples(["ein Würfel – 猫"], {"ocr": [None]}, [0.5], step=7, stream=stream, width=60)
        text = stream.buffer.getvalue().decode("latin-1")
        assert "ein Würfel ? ?" in text and "0.500" in text

    def test_words_without_spaces(self):
        text = lines(prompts=["x" * 500, "漢字" * 100])
        assert len(text) == 11 and all("│" == line[-1] for line in text[4:-1])


class TestContrasting:
    GROUPS = ((0.1, 0.9, 0.5, math.nan), (0.4, 0.3, 0.2, 0.1))

    @pytest.mark.parametrize(
        "count, expected",
        [
            (0, []),
            (1, [(0, 1)]),
            (2, [(0, 1), (0, 3)]),
            (4, [(0, 1), (0, 3), (1, 0), (1, 3)]),
            (6, [(0, 1), (0, 2), (0, 0), (0, 3), (1, 0), (1, 3)]),
            (99, [(0, 1), (0, 2), (0, 0), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ],
    )
    def test_best_and_worst_of_each_group_first(self, count, expected):
        assert contrasting(self.GROUPS, count) == expected

    def test_the_middle_of_an_odd_group_is_there_once(self):
        assert contrasting([[3.0, 1.0, 2.0]], 9) == [(0, 0), (0, 2), (0, 1)]
