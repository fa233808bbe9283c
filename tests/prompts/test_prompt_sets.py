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

"""The named prompt sets: their records, and what is read of files like theirs on a Hub."""

import importlib
import io
import json
import random
import re
from pathlib import Path

import loopback_hub
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as Picture
from published_files import FILES, LONG, parquet

from trl_flow.prompts import PROMPT_SETS, as_prompts, load_prompts, loading, parse_columns
from trl_flow.rewards.loading import REWARDS


ROOT = Path(__file__).parents[2]
ON_HUB = [name for name, record in PROMPT_SETS.items() if record.repository]

# Run in a process of its own, against the loopback Hub: each line of the input is the keyword arguments of one call.
LOAD = """
    import json, sys
    from trl_flow.prompts import load_prompts

    for line in open(sys.argv[1]):
        try:
            dataset = load_prompts(**json.loads(line))
            result = {"rows": dataset.to_list(), "columns": dataset.column_names}
        except ValueError as error:
            result = {"error": str(error)}
        print(json.dumps(result))
"""


PICTURES = random.Random(0).randbytes(24_000_000)
CALLS = {
    "train": {"name": "pick-a-pic"},
    "two": {"name": "pick-a-pic", "num_prompts": 2},
    "test": {"name": "pick-a-pic", "split": "test"},
    "hpdv2": {"name": "hpdv2"},
    "hpdv2 test": {"name": "hpdv2", "split": "test"},
    "drawbench": {"name": "drawbench", "split": "test"},
    "drawbench main": {"name": "drawbench", "split": "test", "revision": "main"},
    "parti": {"name": "parti", "split": "test"},
    "unigenbench": {"name": "unigenbench"},
    "unigenbench test": {"name": "unigenbench", "split": "test"},
    "own": {"name": "user/own", "columns": {"caption": "prompt", "style": "tag"}},
    "own, two": {"name": "user/own", "columns": {"caption": "prompt"}, "num_prompts": 2, "split": "validation"},
    "own, unmapped": {"name": "user/own"},
    "own, unmapped stream": {"name": "user/own", "num_prompts": 1},
    "own, wrong column": {"name": "user/own", "columns": {"text": "prompt"}},
    "own, wrong split": {"name": "user/own", "split": "test"},
    "own, part": {"name": "user/own", "columns": {"caption": "prompt"}, "split": "train[1:]"},
    "plain": {"name": "user/plain", "config": "long"},
    "plain, one": {"name": "user/plain", "config": "long", "num_prompts": 1},
    "changed": {"name": "parti", "split": "test", "revision": "changed"},
    "nobody": {"name": "user/nobody"},
    "pictures": {"name": "user/pictures", "columns": {"caption": "prompt"}},
}
KEPT = ("two", "test", "drawbench", "hpdv2", "unigenbench test", "plain")  # calls to be repeated without a Hub


def load(hub, path: Path, calls: dict[str, dict], **environment) -> dict[str, dict]:
    path.write_text("\n".join(map(json.dumps, calls.values())))
    result = hub.run(LOAD, path, env=environment, cwd=ROOT)
    return dict(zip(calls, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the calls above return, what they asked the Hub for, and what some of them return when it is gone."""
    path = tmp_path_factory.mktemp("prompts")
    sent = {}
    send = loopback_hub._Handler._send

    def count(handler, content, *args, **kwargs):
        if isinstance(content, bytes) and handler.command == "GET":
            sent[handler.path] = sent.get(handler.path, 0) + len(content)
        return send(handler, content, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, loopback_hub.LoopbackHub() as hub:
        patch.setattr(loopback_hub._Handler, "_send", count)
        for name, files in FILES.items():
            record = PROMPT_SETS[name]
            hub.add("dataset", record.repository, files)
            if record.revision is not None:
                # A later commit has other files, so that only what is pinned gives the rows above.
                hub.repositories["dataset", record.repository].commits[-1].sha = record.revision
                hub.add("dataset", record.repository, dict.fromkeys(files, b"Prompts,Category\nnewer,Colors\n"))
        hub.add("dataset", "nateraw/parti-prompts", {"PartiPrompts.tsv": "Text\tKind\na\tb\n"}, branch="changed")
        captions = {"caption": ["a", "b", "c"], "url": ["u", "v", "w"], "style": ["x", "y", "z"], "size": [1, 2, 3]}
        hub.add("dataset", "user/own", {f"data/{s}-0.parquet": parquet(captions) for s in ("train", "validation")})
        hub.add(
            "dataset",
            "user/plain",
            {
                "README.md": "---\nconfigs:\n- config_name: short\n  data_files: short.jsonl\n- config_name: long\n"
                "  data_files: long.jsonl\n---\n",
                "short.jsonl": '{"prompt": "short"}\n',
                "long.jsonl": '{"prompt": "long", "target": 3}\n{"prompt": "longer", "target": 4}\n',
            },
        )
        images = [PICTURES[i * 1_000_000 : (i + 1) * 1_000_000] for i in range(24)]
        rows = {"jpg_0": images, "caption": [f"caption {i}" for i in range(24)], "jpg_1": images[::-1]}
        hub.add("dataset", "user/pictures", {"data/train-0.parquet": parquet(rows, row_group_size=12)})
        results = load(hub, path / "calls", CALLS, HF_HOME=str(path / "home"))
        hub.stop()
        again = {name: CALLS[name] for name in KEPT}
        again["never"] = {"name": "parti", "split": "test", "revision": "main"}
        gone = load(hub, path / "again", again, HF_HOME=str(path / "home"), HF_HUB_OFFLINE="1")
    return results, sent, gone


def prompts(result: dict) -> list[str]:
    assert "error" not in result, result
    return [row["prompt"] for row in result["rows"]]


class TestNamedSets:
    def test_pick_a_pic(self, seen):
        results, sent, _ = seen
        assert prompts(results["train"]) == LONG  # short ones and repetitions are gone, also between files
        assert results["train"]["columns"] == ["prompt"]
        assert prompts(results["two"]) == LONG[:2]
        assert prompts(results["test"]) == ["a held out prompt of seven words"]

    def test_hpdv2(self, seen):
        results, _, _ = seen
        assert prompts(results["hpdv2"]) == ["a cat", "a “dog” [{"]
        assert prompts(results["hpdv2 test"]) == ["a bird"]

    def test_drawbench_keeps_the_rows_that_papers_average_over(self, seen):
        results, _, _ = seen
        rows = [("A red car.", "Colors"), ('A sign, that says "hi".', "Text"), ("A red car.", "Colors")]
        assert results["drawbench"]["rows"] == [{"prompt": prompt, "tag": tag} for prompt, tag in rows]

    def test_another_revision(self, seen):
        results, _, _ = seen
        assert prompts(results["drawbench main"]) == ["newer"]

    def test_parti(self, seen):
        results, _, _ = seen
        assert results["parti"]["rows"] == [
            {"prompt": "bond", "tag": "Abstract", "challenge": "Basic"},
            {"prompt": "a man, a plan", "tag": "People", "challenge": "Simple Detail"},
        ]

    def test_unigenbench(self, seen):
        results, _, _ = seen
        assert prompts(results["unigenbench"]) == ["a first line to train on", "a second one, with a comma"]
        assert results["unigenbench test"]["rows"] == [
            {
                "prompt": "An ink painting",
                "tag": "Art",
                "testpoints": ["Style", "Attribute - Color"],
                "testpoint_descriptions": ["ink", "a red seal"],
            }
        ]

    def test_columns_are_those_of_the_record(self, seen):
        results, _, _ = seen
        for call in ("train", "hpdv2 test", "drawbench", "parti", "unigenbench test"):
            record = PROMPT_SETS[CALLS[call]["name"]]
            assert set(results[call]["columns"]) == {"prompt", *record.columns}

    def test_a_repository_that_has_changed(self, seen):
        results, _, _ = seen
        assert results["changed"]["error"].startswith(
            "parti, split 'test', could not be read from nateraw/parti-prompts on the Hub, at changed. ValueError: "
            "PartiPrompts.tsv has the columns Text, Kind: expected Category, Challenge, Prompt, too."
        )

    def test_nothing_is_loaded_twice(self, seen):
        """Without a Hub, what was loaded before comes from the disk, and else the error says so."""
        results, _, gone = seen
        for call in KEPT:
            assert gone[call] == results[call]
        assert "HF_HUB_OFFLINE is set" in gone["never"]["error"]

    @pytest.mark.parametrize("name", ["drawbench", "parti"])
    def test_benchmarks_are_not_to_train_on(self, name):
        with pytest.raises(
            ValueError, match=rf"split='train': {name} has the split test alone. It is a benchmark; to"
        ):
            load_prompts(name)

    @pytest.mark.parametrize("name", PROMPT_SETS)
    def test_unknown_split(self, name):
        with pytest.raises(ValueError, match=rf"split='validation': {name} has the split"):
            load_prompts(name, split="validation")

    @pytest.mark.parametrize(
        "settings, message",
        [
            (
                {"name": "drawbench", "config": "a"},
                "config='a': drawbench is a prompt set with columns of its own and",
            ),
            (
                {"name": "parti", "columns": {"Prompt": "prompt"}},
                "columns={'Prompt': 'prompt'}: parti is a prompt set",
            ),
            ({"name": "shapes", "revision": "main"}, "revision='main': shapes is generated and takes none"),
            ({"name": "pickapic"}, "Did you mean pick-a-pic"),
            ({"name": "draw_bench"}, "Did you mean drawbench"),
        ],
    )
    def test_settings_that_do_not_go_with_a_name(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_prompts(**settings)


class TestRepositories:
    def test_columns(self, seen):
        results, _, _ = seen
        assert results["own"]["rows"] == [{"prompt": p, "tag": t} for p, t in zip("abc", "xyz", strict=True)]
        assert results["own, two"]["rows"] == [{"prompt": "a"}, {"prompt": "b"}]
        assert results["own, part"]["rows"] == [{"prompt": "b"}, {"prompt": "c"}]

    def test_configurations(self, seen):
        results, _, _ = seen
        assert results["plain"]["rows"] == [{"prompt": "long", "target": 3}, {"prompt": "longer", "target": 4}]
        assert results["plain, one"]["rows"] == [{"prompt": "long", "target": 3}]

    def test_pictures_are_not_downloaded(self, seen):
        """Of 48 MB with pictures, only what is next to the captions."""
        results, sent, _ = seen
        assert prompts(results["pictures"]) == [f"caption {i}" for i in range(24)]
        assert 0 < sum(size for path, size in sent.items() if "user/pictures" in path) < 12_000_000

    @pytest.mark.parametrize(
        "call, message",
        [
            ("own, unmapped", "user/own has no column 'prompt'; its text is in caption, url, style. Say which one holds the "
             "prompts, and which others to keep: columns={'caption': 'prompt'}."),
            ("own, unmapped stream", "user/own has no column 'prompt'; its text is in caption, url, style."),
            ("own, wrong column", "columns={'text': 'prompt'}: user/own has no column text; it has caption, url, style, size."),
            ("own, wrong split", "split='test': user/own has the splits train, validation."),
            ("nobody", "dataset='user/nobody' could not be loaded: expected a prompt set (shapes, "),
        ],
    )  # fmt: skip
    def test_errors(self, seen, call, message):
        results, _, _ = seen
        assert results[call]["error"].startswith(message)


class TestRecords:
    @pytest.mark.parametrize("name", PROMPT_SETS)
    def test_complete(self, name):
        record = PROMPT_SETS[name]
        assert record.description and record.license and record.source and record.checked
        assert (record.generator is None) == (record.repository is not None)
        assert record.parts and set(record.parts) <= {"train", "test"}
        assert record.revision is None or re.fullmatch("[0-9a-f]{40}", record.revision)
        for part in record.parts.values():
            assert (part.file is None) == (record.repository is None)
            assert part.file is None or "prompt" in part.columns.values()

    @pytest.mark.parametrize("name", [name for name in PROMPT_SETS if PROMPT_SETS[name].generator])
    def test_generated(self, name):
        record = PROMPT_SETS[name]
        sets = {split: load_prompts(name, split=split, num_prompts=24) for split in ("train", "test")}
        for split, dataset in sets.items():
            assert len(dataset) == 24
            assert {"prompt", *record.columns} == set(dataset.column_names)
            if record.parts[split].prompts is not None:
                assert len(load_prompts(name, split=split)) == record.parts[split].prompts
        assert not set(sets["train"]["prompt"]) & set(sets["test"]["prompt"])

    def test_rewards_and_their_prompt_sets(self):
        """A reward that names a prompt set is named by it, and finds the columns it requires there."""
        for record in PROMPT_SETS.values():
            assert set(record.rewards) <= set(REWARDS)
        for name, location in REWARDS.items():
            module, attribute = location.split(":")
            reward = getattr(importlib.import_module(module, "trl_flow.rewards"), attribute)
            prompt_set = reward.__dict__.get("prompt_set")
            if isinstance(prompt_set, str):
                assert name in PROMPT_SETS[prompt_set].rewards
                assert set(getattr(reward, "requires", ())) <= {"prompt", *PROMPT_SETS[prompt_set].columns}

    def test_documented(self):
        """The table of docs/prompts.md says what the records say."""
        text = (ROOT / "docs" / "prompts.md").read_text()
        rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE))
        assert list(rows) == list(PROMPT_SETS)
        for name, record in PROMPT_SETS.items():
            where, counts, columns, license = (cell.strip() for cell in rows[name].split(" | "))
            assert where == (f"`{record.repository}`" if record.repository else "generated")
            assert counts == ", ".join(
                f"{split} {part.prompts:,}" if part.prompts else split for split, part in record.parts.items()
            )
            assert columns == (", ".join(f"`{column}`" for column in record.columns) or "none")
            assert license == record.license


class TestReading:
    @pytest.mark.parametrize("size", [1, 7, 1 << 16])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_json_array_in_pieces(self, tmp_path, size, indent):
        rows = [{"prompt": 'a "b" ]},[{', "rank": [1, {"c": None}]}, {"prompt": "ü – 漢字 \\", "rank": []}, {}]
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=size == 7), encoding="utf-8")
        assert list(loading._json_array(tmp_path / "rows.json", size)) == rows

    def test_json_array_that_breaks_off(self, tmp_path):
        (tmp_path / "rows.json").write_text('[{"prompt": "a"}, {"prompt": "b')
        rows = loading._json_array(tmp_path / "rows.json")
        assert next(rows) == {"prompt": "a"}
        with pytest.raises(json.JSONDecodeError):
            next(rows)

    def test_a_named_set_is_read_no_further_than_asked(self, tmp_path, monkeypatch):
        rows = [{"prompt": f"prompt {number // 2}"} for number in range(100_000)]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        drawn = []
        read = loading._json_array
        monkeypatch.setattr(loading, "_json_array", lambda path: (drawn.append(row) or row for row in read(path)))
        record = PROMPT_SETS["hpdv2"]
        found = list(loading._named_rows(record, record.parts["train"], tmp_path / "train.json", 10))
        assert found == [{"prompt": f"prompt {number}"} for number in range(10)]
        assert len(drawn) == 19  # each prompt twice; the tenth is the nineteenth row


class TestTrainersDatasets:
    """What `as_prompts` makes of what a trainer is given."""

    def test_datasets_stay_as_they_are(self):
        dataset = Dataset.from_dict({"prompt": ["a", "b", "c"], "tag": ["x", "y", "z"]})
        assert as_prompts(dataset) is dataset
        assert as_prompts(dataset, num_prompts=2).to_list() == dataset.to_list()[:2]
        assert len(as_prompts(dataset, num_prompts=9)) == 3

    def test_names_and_files(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("a\nb\nc\n")
        for given in (path, str(path)):
            assert as_prompts(given, num_prompts=2)["prompt"][:] == ["a", "b"]
        assert len(as_prompts("shapes", num_prompts=6)) == 6

    def test_a_stream_is_read_no_further_than_asked(self):
        drawn = []

        def rows():
            for number in range(100_000):
                drawn.append(number)
                yield {"prompt": f"prompt {number}", "tag": None if number < 5 else "late"}

        features = Features({"prompt": Value("string"), "tag": Value("string")})
        dataset = as_prompts(IterableDataset.from_generator(rows, features=features), num_prompts=20)
        assert isinstance(dataset, Dataset) and len(drawn) <= 21
        assert dataset["prompt"][:] == [f"prompt {number}" for number in range(20)]
        assert dataset["tag"][:] == [None] * 5 + ["late"] * 15

    def test_a_stream_is_read_anew_each_time(self):
        texts = ["old"]
        stream = IterableDataset.from_generator(lambda: ({"prompt": text} for text in texts))
        assert as_prompts(stream)["prompt"][:] == ["old"]
        texts[:] = ["new", "newer"]
        assert as_prompts(stream)["prompt"][:] == ["new", "newer"]

    def test_rows_are_written_in_batches(self, monkeypatch):
        """No more than some thousand of 20,000 rows are alive at any time."""
        alive, most = 0, 0

        class Row(dict):
            def __init__(self, number):
                nonlocal alive, most
                super().__init__(prompt=f"prompt {number}")
                alive += 1
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= 1

        dataset = loading._store(lambda: (Row(number) for number in range(20_000)))
        assert len(dataset) == 20_000 and dataset.cache_files
        assert most <= 2_000

    def test_streams_without_end(self, monkeypatch):
        monkeypatch.setattr(loading, "MOST_PROMPTS", 50)
        stream = IterableDataset.from_generator(lambda: ({"prompt": f"{number}"} for number in range(51)))
        with pytest.raises(ValueError, match="more than 50 prompts: say how many to keep"):
            as_prompts(stream)
        assert len(as_prompts(stream.take(50))) == 50

    @pytest.mark.parametrize("late", [5, 1000, 1200])
    def test_a_column_that_comes_late_in_a_stream(self, late):
        def rows():
            for number in range(1300):
                yield {"prompt": f"prompt {number}", **({"tag": "late"} if number >= late else {})}

        with pytest.raises(ValueError, match=rf"row {late} of the stream has the column tag, .*features=Features\("):
            as_prompts(IterableDataset.from_generator(rows))
        features = Features({"prompt": Value("string"), "tag": Value("string")})
        dataset = as_prompts(IterableDataset.from_generator(rows, features=features))
        assert dataset["tag"][:] == [None] * late + ["late"] * (1300 - late)

    def test_a_column_that_some_rows_of_a_stream_lack(self):
        rows = [{"prompt": "a", "tag": "x"}, {"prompt": "b"}]
        assert as_prompts(IterableDataset.from_generator(lambda: iter(rows)))["tag"][:] == ["x", None]

    @pytest.mark.parametrize(
        "include, cause",
        [
            (lambda late: [{"class": "cat", **({"color": "red"} if late else {})}], "TypeError: .* struct<.*color"),
            (lambda late: "red" if late else None, "TypeError: .*'include'"),
            (lambda late: "red" if late else 1, "ArrowInvalid: "),
        ],
    )
    def test_rows_of_a_stream_of_other_types_than_the_first(self, include, cause):
        def rows():
            for number in range(1100):
                yield {"prompt": f"prompt {number}", "include": include(number > 1050)}

        with pytest.raises(ValueError, match=rf"does not fit the ones before it. {cause}.*features=Features\("):
            as_prompts(IterableDataset.from_generator(rows))

    @pytest.mark.parametrize("features", [None, Features({"prompt": Value("string")})])
    def test_streams_without_rows(self, features):
        with pytest.raises(ValueError, match="the stream has no rows: expected some with a column 'prompt'"):
            as_prompts(IterableDataset.from_generator(lambda: iter(()), features=features))

    def test_an_error_of_the_stream_itself(self):
        def rows():
            yield {"prompt": "a"}
            raise TypeError("a bug of mine")

        with pytest.raises(TypeError, match="^a bug of mine$"):
            as_prompts(IterableDataset.from_generator(rows))

    @pytest.mark.parametrize("known", [True, False])
    def test_pictures_in_a_stream(self, known):
        picture = Picture.frombytes("RGB", (4, 3), random.Random(0).randbytes(36))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=30)
        if known:
            rows = {"prompt": ["edit it"], "image": [{"bytes": buffer.getvalue(), "path": None}]}
            features = Features({"prompt": Value("string"), "image": Image()})
            stream = Dataset.from_dict(rows, features=features).to_iterable_dataset()
        else:
            stream = IterableDataset.from_generator(lambda: iter([{"prompt": "edit it", "image": picture}]))
        dataset = as_prompts(stream, num_prompts=5)
        assert isinstance(dataset.features["image"], Image)
        assert dataset[0]["image"].size == (4, 3)
        if known:
            # As it was, not decoded and encoded again.
            assert dataset.cast_column("image", Image(decode=False))[0]["image"]["bytes"] == buffer.getvalue()

    @pytest.mark.parametrize(
        "given, message",
        [
            (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), r"has the splits train: give one of them, dataset\['train'\]"),
            (["a red circle"], "the dataset is a list: expected a Dataset or IterableDataset with a column 'prompt'"),
        ],
    )  # fmt: skip
    def test_other_things(self, given, message):
        with pytest.raises(ValueError, match=message):
            as_prompts(given)


def test_columns_on_the_command_line():
    assert parse_columns(None) is None
    assert parse_columns(["caption=prompt", "tag"]) == {"caption": "prompt", "tag": "tag"}
