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

"""Shell completion: what the shells themselves offer, asked through the scripts that are printed for them."""

import os
import shutil
import subprocess

import pytest

from trl_flow.cli import COMMANDS
from trl_flow.scripts.completion import (
    SHELLS,
    CompletionParser,
    Setting,
    collect,
    fish_script,
    main,
    posix_script,
    settings_of,
)
from trl_flow.scripts.methods import METHODS


ALL = [name for commands in COMMANDS.values() for name in commands]
SUMMARIES = {name: text for commands in COMMANDS.values() for name, text in commands.items()}

ASK_BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_trl_flow
printf '%s\\n' "${COMPREPLY[@]}"
"""

# Outside of its line editor zsh completes nothing: what would be offered is printed.
ASK_ZSH = """
compdef() { : }
_files() { : }
compadd() { shift; for found in "$@"; do [[ $found == "$words[CURRENT]"* ]] && print -r -- "$found"; done; true }
source "$1"
shift
words=("$@")
CURRENT=$#words
_trl_flow
"""


@pytest.fixture(scope="module")
def contexts():
    return collect()


@pytest.fixture(scope="module")
def offered(contexts, tmp_path_factory):
    """`offered(shell, word, ...)`: what the shell offers for the last word."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(posix_script(shell, contexts))
    (folder / "fish").write_text(fish_script(contexts, SUMMARIES))

    # Nobody's own settings of these shells.
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "ZDOTDIR": str(folder)}

    def ask(shell, *words):
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        script, words = str(folder / shell), ["trl-flow", *words]
        if shell == "bash":
            command = ["bash", "--norc", "-c", ASK_BASH, "ask", script, *words]
        elif shell == "zsh":
            command = ["zsh", "-f", "-c", ASK_ZSH, "ask", script, *words]
        else:
            line = " ".join(words)
            command = ["fish", "-c", f"source {script}; complete -C '{line}'"]
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert outcome.returncode == 0 and not outcome.stderr, outcome.stderr
        return [line.split("\t")[0] for line in outcome.stdout.splitlines() if line]

    return ask


@pytest.mark.parametrize("shell", SHELLS)
class TestOffers:
    def test_commands(self, offered, shell):
        assert set(ALL) <= set(offered(shell, ""))
        assert offered(shell, "dense") == ["dense-grpo"]
        assert offered(shell, "--debug", "dense") == ["dense-grpo"]
        assert "--version" in offered(shell, "--v")

    def test_settings_of_a_command(self, offered, shell):
        assert offered(shell, "g2rpo", "--granul") == ["--granularities"]
        assert offered(shell, "flow-grpo", "--granul") == []
        assert offered(shell, "flow-grpo", "--num_gen") == ["--num_generations"]
        assert offered(shell, "awm", "--learning_rate", "1e-3", "--num_gen") == ["--num_generations"]
        assert "--compare" in offered(shell, "generate", "--comp")

    def test_choices(self, offered, shell):
        assert sorted(offered(shell, "g2rpo", "--sde_type", "")) == ["cps", "dance", "flow"]
        assert offered(shell, "g2rpo", "--seed", "1", "--dtype", "bfl") == ["bfloat16"]
        assert sorted(offered(shell, "g2rpo", "--use_dora", "")) == ["false", "true"]

    def test_arguments_of_accelerate(self, offered, shell):
        assert offered(shell, "flow-grpo", "--num_proc") == ["--num_processes"]
        assert offered(shell, "generate", "--num_proc") == []
        assert sorted(offered(shell, "flow-grpo", "--accelerate_config", "fsdp")) == ["fsdp1", "fsdp2"]

    def test_actions(self, offered, shell):
        assert sorted(offered(shell, "rewards", "s")) == ["serve", "show"]
        assert sorted(offered(shell, "prompts", "")) == ["list", "show"]
        assert offered(shell, "rewards", "serve", "--por") == ["--port"]
        assert offered(shell, "rewards", "show", "--por") == []
        assert offered(shell, "rewards", "check", "list", "--trust") == ["--trust_remote_code"]


def test_a_value_behind_an_equals_sign(offered):
    """bash hands it over as three words."""
    assert offered("bash", "g2rpo", "--sde_type", "=", "c") == ["cps"]
    assert len(offered("bash", "g2rpo", "--sde_type", "=")) == 3


def test_zsh_finds_the_script_by_its_name(offered, contexts, tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_trl-flow").write_text(posix_script("zsh", contexts))
    ask = ASK_ZSH.replace('source "$1"', 'fpath=("$1" $fpath); autoload -Uz _trl-flow').replace(
        "\n_trl_flow\n", "\n_trl-flow\n"
    )
    command = ["zsh", "-f", "-c", ask, "ask", str(tmp_path), "trl-flow", "dense"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (outcome.stdout, outcome.stderr) == ("dense-grpo\n", "")


def test_every_setting_is_there_once(contexts):
    assert set(METHODS) < set(ALL) <= set(contexts)
    for command in METHODS:
        names = contexts[command].settings
        assert {"--config", "--output_dir", "--help_all", "--reward_funcs", "--bf16"} <= set(names)
        assert not [name for name in names if "-" in name[2:]]


def test_settings_of_a_parser():
    parser = CompletionParser("trl-flow test")
    parser.add_argument("--kind", choices=["a", "b"], help="What it is. And more.")
    parser.add_argument("--rate", type=float, help="100%% of it.")
    parser.add_argument("--long_name", "--long-name", action="store_true")
    assert settings_of(parser) == {
        "--help": Setting((), False, "show this help message and exit"),
        "--kind": Setting(("a", "b"), True, "What it is"),
        "--rate": Setting((), True, "100% of it"),
        "--long_name": Setting((), False, ""),
    }


def test_quotes_in_descriptions_end_nothing(contexts):
    described = {"generate": contexts["generate"]._replace(settings={"--x": Setting((), True, "it's a \\ and $HOME")})}
    assert "-d 'it\\'s a \\\\ and $HOME'" in fish_script(described, SUMMARIES)


def test_the_command(capsys, monkeypatch, contexts):
    monkeypatch.setattr("trl_flow.scripts.completion.collect", lambda: contexts)
    for shell in SHELLS:
        assert main(*CompletionParser("trl-flow completion").parse_args_and_config([shell])) == 0
        assert f"{shell} completion of trl-flow" in capsys.readouterr().out
    for args, message in [(["csh"], "'csh' (choose from"), (["--shell", "bash"], "unknown argument --shell")]:
        with pytest.raises(SystemExit) as caught:
            CompletionParser("trl-flow completion").parse_args_and_config(args)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
