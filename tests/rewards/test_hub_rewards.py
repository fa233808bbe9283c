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

"""Rewards from the Hub and from directories: consent, revisions, requirements, and what is said when something is wrong."""

import json
import os
import sys
from contextlib import nullcontext

import pytest
from loopback_hub import LoopbackHub

from trl_flow.rewards import load_reward
from trl_flow.rewards.hub import check_requirements, fetch, load_hub_reward


SCORE = "def reward(prompts, images, **kwargs):\n    return [{number}] * len(images)\n"
# Says that it ran, to whoever looks.
WITNESS = "import os\nopen(os.environ['WITNESS'], 'a').write('ran')\n"
WITH_FILES = """
from pathlib import Path

from . import parts
from .parts.names import NAME
from .words import WORDS


async def reward(prompts, images, **kwargs):
    return [float((Path(__file__).parent / "scale.txt").read_text()) * len(WORDS + NAME + parts.__name__[-5:])]


reward.concurrent, reward.requires, reward.prompt_set = True, ("target",), "ocr"
"""
WITH_SETTINGS = """
from trl_flow.rewards import Reward


class Constant(Reward):
    def __init__(self, value: float, factor: float = 2.0):
        self.value = value * factor

    def __call__(self, prompts, images, **kwargs):
        return [self.value] * len(images)


reward = Constant
"""
FAR_AWAY = "from trl_flow.shapes import shapes_reward as reward\n"

MALICIOUS = [
    "../reward",
    "user/..",
    "user/.",
    "../../user/repo",
    "user/repo/../../etc",
    "user/repo\n",
    "user/re\x00po",
    "/nowhere/repo",
    "user\\repo",
    "user/repo?revision=x",
    "user/repo--x--y",
    "https://user/repo",
    "%2e%2e/reward",
    "",
]

# Tries each case, and prints what came of it as JSON.
SCRIPT = """
import json, logging, os, sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from PIL import Image

from trl_flow.rewards import load_reward
from trl_flow.rewards.hub import load_hub_reward

logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("trl_flow.rewards.hub").addHandler(handler)
witness = Path(os.environ["WITNESS"])
results, loaded = {}, {}
for name, (function, args, kwargs) in json.loads(sys.argv[1]).items():
    if function == "hf_hub_download":
        hf_hub_download(*args, **kwargs)
        continue
    if function == "remove":
        for path in Path(os.environ["HF_HOME"]).glob(*args):
            path.unlink()
        continue
    logged.clear()
    witness.unlink(missing_ok=True)
    try:
        found = loaded[name] = {"load_reward": load_reward, "load_hub_reward": load_hub_reward}[function](*args, **kwargs)
        results[name] = {"source": found.source}
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
    results[name] |= {"ran": witness.exists(), "logged": list(logged)}
# After all are loaded, so that one which took another's place would show.
for name, found in loaded.items():
    if isinstance(found, type):
        continue
    result = found(prompts=["a red circle"], images=[Image.new("RGB", (32, 32))])
    if hasattr(result, "send"):
        try:
            result.send(None)
        except StopIteration as stop:
            result = stop.value
    attributes = {key: getattr(found, key, None) for key in ("concurrent", "requires", "prompt_set")}
    results[name] |= {"scores": result, **attributes}
from trl_flow.shapes import shapes_reward
results["shapes_reward"] = hasattr(shapes_reward, "source")
print(json.dumps(results))
"""


def run(hub, cases, tmp_path, **env) -> dict:
    env = {"WITNESS": str(tmp_path / "witness"), "HF_HOME": str(tmp_path / "home"), **env}
    return json.loads(hub.run(SCRIPT, json.dumps(cases), env=env, cwd=tmp_path).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of all the cases that need a Hub: importing the libraries takes most of the time, so it is done once."""
    trust = {"trust_remote_code": True}
    with LoopbackHub() as hub:
        first = hub.add("model", "user/scorer", {"reward.py": WITNESS + SCORE.format(number=1.0)})
        second = hub.add("model", "user/scorer", {"reward.py": WITNESS + SCORE.format(number=2.0)})
        hub.add("model", "user/scorer", {"reward.py": WITNESS + SCORE.format(number=3.0)}, branch="next")
        files = {"parts/names.py": "NAME = 'cd'\n", "words.py": "WORDS = 'ab'\n", "scale.txt": "10"}
        hub.add("model", "user.name/with-files_1", {"reward.py": WITH_FILES, **files})
        hub.add("model", "user/with-settings", {"reward.py": WITH_SETTINGS})
        hub.add("model", "user/far-away", {"reward.py": FAR_AWAY})
        hub.add("model", "user/weights", {"model.safetensors": b"", "config.json": "{}"})
        hub.add("model", "user/nameless", {"reward.py": "def score(images):\n    return 1\n"})
        hub.add("model", "user/number", {"reward.py": "reward = 3\n"})
        hub.add("model", "user/broken", {"reward.py": "def reward(:\n"})
        hub.add("model", "user/alone", {"reward.py": "from .words import WORDS\n"})
        hub.add("model", "user/hungry", {"reward.py": "import no_such_package\n"})
        hub.add("model", "user/needy", {"reward.py": WITNESS, "requirements.txt": "numpy\nno-such-package>=1.5\n"})
        hub.fault = lambda method, path: 503 if "user/busy" in path else None
        cases = {
            "busy": ("load_reward", ["user/busy"], trust),
            "first": ("load_reward", ["user/scorer"], {"revision": first, **trust}),
            "second": ("load_reward", [f"user/scorer@{second}"], trust),
            "short": ("load_reward", [f"user/scorer@{first[:10]}"], trust),
            "unpinned": ("load_reward", ["user/scorer"], trust),
            "branch": ("load_reward", ["user/scorer@next"], trust),
            "files": ("load_reward", ["user.name/with-files_1"], trust),
            "settings": ("load_reward", [{"user/with-settings": {"value": 4}}], trust),
            "class": ("load_hub_reward", ["user/with-settings"], trust),
            "wrong setting": ("load_reward", [{"user/with-settings": {"valeu": 4}}], trust),
            "settings of a function": ("load_reward", [{"user/scorer": {"value": 4}}], trust),
            "refused": ("load_reward", ["user/scorer"], {"trust_remote_code": False}),
            "not asked": ("load_reward", [f"user/scorer@{first}"], {}),
            "no repository": ("load_reward", ["user/nothing"], trust),
            "no revision": ("load_reward", ["user/scorer@v9"], trust),
            "strange revision": ("load_reward", ["user/scorer"], {"revision": "../../user/weights", **trust}),
            "no reward.py": ("load_reward", ["user/weights"], trust),
            "no function": ("load_reward", ["user/nameless"], trust),
            "a number": ("load_reward", ["user/number"], trust),
            "no Python": ("load_reward", ["user/broken"], trust),
            "missing file": ("load_reward", ["user/alone"], trust),
            "missing package": ("load_reward", ["user/hungry"], trust),
            "missing requirement": ("load_reward", ["user/needy"], trust),
        }
        tmp_path = tmp_path_factory.mktemp("hub")
        found = {"first sha": first, "second sha": second, **run(hub, cases, tmp_path)}
        found["needy sha"] = hub.repositories["model", "user/needy"].commits[-1].sha
        asked = len(hub.requests)
        names = {repr(name): ("load_hub_reward", [name], trust) for name in MALICIOUS}
        # A URL is a reward server there.
        named = [name for name in MALICIOUS if not name.startswith("https:")]
        names |= {f"load {name!r}": ("load_reward", [name], trust) for name in named}
        # The one that both functions may ask for, to show that they could.
        found["names"] = run(hub, {**names, "fine": ("load_reward", ["user/far-away"], trust)}, tmp_path)
        found["requests"] = {path for _, path in hub.requests[asked:] if "agent-harness" not in path}
        hub.stop()
        gone = {
            "commit": ("load_reward", [f"user/scorer@{second}"], trust),
            "without consent": ("load_reward", [f"user/scorer@{second}"], {}),
            "branch": ("load_reward", ["user/scorer"], trust),
            "unknown commit": ("load_reward", [f"user/scorer@{'0' * 40}"], trust),
            "requirement": ("load_reward", [f"user/needy@{found['needy sha']}"], trust),
        }
        found["gone"] = run(hub, gone, tmp_path)
        return found


class TestHub:
    def test_two_revisions_at_once(self, results):
        for name, sha, number in (("first", "first sha", 1), ("second", "second sha", 2)):
            assert results[name]["source"] == {"repository": "user/scorer", "revision": results[sha]}
            assert results[name]["scores"] == [number]

    def test_a_revision_becomes_a_commit(self, results):
        assert results["short"]["source"]["revision"] == results["first sha"]
        assert results["unpinned"]["source"]["revision"] == results["second sha"]
        assert results["branch"]["scores"] == [3] and len(results["branch"]["source"]["revision"]) == 40

    def test_warns_unless_a_commit_is_named(self, results):
        assert all(results[name]["logged"] == [] for name in ("first", "second", "short"))
        for name in ("unpinned", "branch"):
            (message,) = results[name]["logged"]
            assert f"user/scorer@{results[name]['source']['revision']}" in message

    def test_files_beside_it_and_attributes(self, results):
        found = results["files"]
        assert found["scores"] == [10.0 * len("abcdparts")]
        assert (found["concurrent"], found["requires"], found["prompt_set"]) == (True, ["target"], "ocr")

    def test_a_class_takes_settings(self, results):
        assert results["settings"]["scores"] == [8]
        assert results["settings"]["source"]["repository"] == "user/with-settings"
        assert results["class"]["source"] == results["settings"]["source"]
        assert "has no setting valeu: expected value, factor" in results["wrong setting"]["error"]
        assert "takes no settings" in results["settings of a function"]["error"]

    def test_a_function_from_elsewhere_is_not_marked(self, results):
        assert results["names"]["fine"]["source"]["repository"] == "user/far-away"
        assert results["names"]["shapes_reward"] is False

    def test_nothing_runs_without_consent(self, results):
        assert results["first"]["ran"]
        for name in ("refused", "not asked"):
            assert results[name]["error"].startswith("ValueError")
            assert "no consent" in results[name]["error"] and "trust_remote_code=True" in results[name]["error"]
            assert results[name]["ran"] is False
        # The reader is sent to the code that would have run.
        assert f"/user/scorer/tree/{results['second sha']}" in results["refused"]["error"]

    def test_requirements_are_checked_before_it_runs(self, results):
        for found in (results["missing requirement"], results["gone"]["requirement"]):
            assert found["error"].startswith("ImportError") and found["ran"] is False
            assert (
                'no-such-package>=1.5 is not installed. Install with: pip install "no-such-package>=1.5"'
                in found["error"]
            )

    @pytest.mark.parametrize(
        "case, message",
        [
            ("no repository", "ValueError: reward='user/nothing': the Hub has no model repository of that name"),
            ("no revision", "ValueError: reward='user/scorer' has no revision 'v9'"),
            ("strange revision", "ValueError: reward='user/scorer' has no revision '../../user/weights'"),
            (
                "busy",
                "ValueError: reward='user/busy': the Hub could not be asked for it (HfHubHTTPError: Server error '503",
            ),
            ("no reward.py", "holds no reward.py, only config.json, model.safetensors."),
            ("no function", "`reward(prompts, images, **kwargs)`, or a subclass of trl_flow.rewards.Reward"),
            ("a number", "it calls a int so"),
            ("no Python", "reward.py could not be imported (SyntaxError"),
            ("missing file", "reward.py imports .words, which is not there"),
            ("missing package", "ImportError: reward='user/hungry': reward.py imports no_such_package, which is not"),
        ],
    )
    def test_what_is_wrong(self, results, case, message):
        assert message in results[case]["error"]

    @pytest.mark.parametrize("name", MALICIOUS)
    def test_malicious_names_never_reach_the_hub(self, results, name):
        assert all(
            results["names"][case]["error"].startswith("ValueError")
            for case in (repr(name), f"load {name!r}")
            if case in results["names"]
        )
        assert results["requests"] and all("user/far-away" in path for path in results["requests"])

    def test_without_a_hub_a_commit_in_the_cache_is_enough(self, results):
        gone = results["gone"]
        assert gone["commit"]["scores"] == [2] and gone["commit"]["source"] == results["second"]["source"]
        assert "no consent" in gone["without consent"]["error"] and not gone["without consent"]["ran"]
        for name in ("branch", "unknown commit"):
            assert "the Hub could not be asked" in gone[name]["error"] and "COMMIT" in gone[name]["error"]


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    """What became of commits of which one file was read before they were loaded, or whose download was killed."""
    trust = {"trust_remote_code": True}
    tmp_path = tmp_path_factory.mktemp("incomplete")
    files = {
        "reward.py": "from .words import WORDS\n" + SCORE.format(number="len(WORDS)"),
        "words.py": "WORDS = 'ab'\n",
    }
    reads = {"reward.py": "open(__file__.replace('reward.py', 'words.txt'))\n", "words.txt": "ab"}
    with LoopbackHub() as hub:
        contents = {
            name: {"README.md": "# It\n", **files} for name in ("card", "code", "killed", "later-card", "later-code")
        }
        contents |= {"later-killed": files, "later-read": reads}
        contents["later-alone"] = {"reward.py": SCORE.format(number=5), "README.md": "# It\n"}
        shas = {name: hub.add("model", f"user/{name}", content) for name, content in contents.items()}
        cases = {name: ("load_reward", [f"user/{name}@{sha}"], trust) for name, sha in shas.items()}
        steps = {}
        for name, sha in shas.items():
            if "killed" in name:
                steps[f"load {name}"] = cases[name]
                steps[f"remove {name}"] = ("remove", [f"hub/*{name}/snapshots/*/words.py"], {})
            else:
                filename = "README.md" if "card" in name else "reward.py"
                steps[f"read {name}"] = ("hf_hub_download", [f"user/{name}", filename], {"revision": sha})
        steps |= {name: cases[name] for name in ("card", "code", "killed")}
        steps |= {"card again": cases["card"], "refused": ("load_reward", cases["later-alone"][1], {})}
        found = run(hub, steps, tmp_path)
        found["asked"] = [path for _, path in hub.requests if path.startswith("/api/models/user/card")]
        found["after refusal"] = len(list((tmp_path / "home").glob("hub/*later-alone/snapshots/*/*")))
        hub.stop()
        found |= run(hub, {name: cases[name] for name in cases if name.startswith("later-")}, tmp_path)
        offline = {name: cases[name] for name in ("later-alone", "later-code", "card")}
        found["offline"] = run(hub, offline, tmp_path, HF_HUB_OFFLINE="1")
    return found


class TestIncompleteCache:
    @pytest.mark.parametrize("name", ["card", "code", "killed"])
    def test_is_completed(self, incomplete, name):
        assert incomplete[name].get("scores") == [2], incomplete[name]
        assert incomplete[name]["logged"] == []

    def test_a_complete_one_is_not_asked_for(self, incomplete):
        assert incomplete["card again"]["scores"] == [2]
        assert len(incomplete["asked"]) == len(set(incomplete["asked"])) > 0
        assert incomplete["offline"]["card"]["scores"] == [2] and incomplete["offline"]["card"]["logged"] == []

    def test_nothing_is_downloaded_without_consent(self, incomplete):
        assert "no consent" in incomplete["refused"]["error"] and incomplete["after refusal"] == 1

    @pytest.mark.parametrize(
        "name, message",
        [
            ("later-card", "holds no reward.py, only README.md"),
            ("later-code", "reward.py imports .words, which is not there"),
            ("later-read", "could not be imported (FileNotFoundError"),
        ],
    )
    def test_what_is_said_without_the_hub(self, incomplete, name, message):
        for found in (incomplete[name], incomplete["offline"].get(name, incomplete[name])):
            assert message in found["error"] and "may be incomplete: load it once while the Hub" in found["error"]

    def test_one_known_to_be_incomplete(self, incomplete):
        assert "only a full commit of a repository that is completely in the" in incomplete["later-killed"]["error"]

    def test_what_is_there_may_be_enough(self, incomplete):
        for found in (incomplete["later-alone"], incomplete["offline"]["later-alone"]):
            assert found["scores"] == [5]
            (message,) = found["logged"]
            assert "the Hub could not be asked" in message and "may be incomplete" in message


class TestDirectory:
    @pytest.fixture(autouse=True)
    def witness(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
        return tmp_path / "witness"

    @pytest.fixture
    def directory(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "reward.py").write_text(WITNESS + SCORE.format(number=1.0))
        return tmp_path / "mine"

    @pytest.mark.parametrize("trust", [False, None])
    def test_needs_consent_too(self, directory, witness, trust):
        with pytest.raises(ValueError, match="no consent to run it"):
            load_reward(str(directory), trust_remote_code=trust)
        assert not witness.exists()
        load_reward(str(directory), trust_remote_code=True)
        assert witness.exists()

    @pytest.mark.parametrize("answer, ran", [("y", True), ("n", False)])
    def test_asks_whoever_is_there(self, directory, witness, monkeypatch, capsys, answer, ran):
        terminal, other_end = os.openpty()
        with os.fdopen(other_end) as keyboard:
            monkeypatch.setattr(sys, "stdin", keyboard)
            os.write(terminal, f"{answer}\n".encode())
            with nullcontext() if ran else pytest.raises(ValueError, match="no consent to run it"):
                load_reward(str(directory))
        os.close(terminal)
        assert witness.exists() is ran
        assert f"not been reviewed by anyone but its author: {directory}" in capsys.readouterr().out

    def test_changed_code_is_another_revision(self, directory):
        old = load_reward(str(directory), trust_remote_code=True)
        (directory / "reward.py").write_text(SCORE.format(number=2.0))
        new = load_reward(str(directory), trust_remote_code=True)
        assert [found([""], [None]) for found in (old, new)] == [[1.0], [2.0]]
        assert old.source["directory"] == new.source["directory"] == str(directory)
        assert old.source["revision"] != new.source["revision"]
        (directory / "reward.py").write_text(WITNESS + SCORE.format(number=1.0))
        assert load_reward(str(directory), trust_remote_code=True).source == old.source

    def test_has_no_revision(self, directory):
        with pytest.raises(ValueError, match="is a directory, which has no revision='main'"):
            load_reward(str(directory), revision="main", trust_remote_code=True)

    def test_without_reward(self, tmp_path):
        with pytest.raises(ValueError, match="holds no reward.py, only nothing"):
            load_hub_reward(str(tmp_path), trust_remote_code=True)
        with pytest.raises(ValueError, match="holds no metric.py"):
            fetch(str(tmp_path), "metric.py", trust_remote_code=True)


class TestRequirements:
    def test_fine(self, tmp_path):
        check_requirements(tmp_path / "requirements.txt", "x")
        path = tmp_path / "requirements.txt"
        path.write_text(
            "# needed\n\nnumpy>=1,<1000  # arrays\nPillow\ntorch>=0a1\nno-such-package; python_version < '3'\nhuggingface-hub[x]\n"
        )
        check_requirements(path, "x")

    @pytest.mark.parametrize(
        "line, message",
        [
            ("no-such-package", 'no-such-package is not installed. Install with: pip install "no-such-package"'),
            ("numpy>=1,<1.1", r"numpy>=1,<1.1 is needed, and [\d.]+ is installed"),
            ("no-such-package @ https://example.org/x.whl", "is not installed"),
        ],
    )
    def test_missing(self, tmp_path, line, message):
        (tmp_path / "requirements.txt").write_text(f"numpy\n{line}\n")
        with pytest.raises(ImportError, match=message):
            check_requirements(tmp_path / "requirements.txt", "reward='user/repo'")

    @pytest.mark.parametrize("line", ["-r other.txt", "--index-url https://example.org", "numpy>=>1"])
    def test_no_requirement(self, tmp_path, line):
        (tmp_path / "requirements.txt").write_text(line)
        with pytest.raises(ValueError, match="is no requirement"):
            check_requirements(tmp_path / "requirements.txt", "reward='user/repo'")
