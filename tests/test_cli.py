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

"""The command line: help, errors, precedence, and when a run goes through `accelerate launch`."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline

import trl_flow
from trl_flow import FlowPolicy, cli
from trl_flow.hub import save_policy
from trl_flow.rewards import parse_reward, reward_name
from trl_flow.scripts import launcher
from trl_flow.scripts.arguments import FlowScriptArguments
from trl_flow.scripts.generate import GenerateArguments, make_grid, run_config, sampling_arguments
from trl_flow.scripts.generate import main as generate_main
from trl_flow.scripts.methods import METHODS
from trl_flow.scripts.parser import FlowParser
from trl_flow.scripts.training import (
    default_rewards,
    held_out_scores,
    make_trainer,
    make_training_parser,
    own_fields,
    paired_intervals,
    resolved_config,
    write_config,
)
from trl_flow.trainer.saving import check_output_dir


ROOT = Path(__file__).parents[1]
COMMANDS = [name for commands in cli.COMMANDS.values() for name in commands]


@dataclass
class Settings:
    learning_rate: float = field(default=0.1, metadata={"help": "Rate."})
    num_generations: int = field(default=4, metadata={"help": "Group size."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Rewards."})
    weights: list[float] | None = field(default=None, metadata={"help": "Weights."})
    window: list[int] = field(default_factory=lambda: [0, 2], metadata={"help": "Window."})
    share: float | None = field(default=0.5, metadata={"help": "Share."})
    limit: int | None = field(default=None, metadata={"help": "Limit."})
    kind: str = field(default="flow", metadata={"help": "Kind.", "choices": ["flow", "cps"]})
    shuffle: bool = field(default=True, metadata={"help": "Shuffle."})
    text: str | None = field(default=None, metadata={"help": "Text."})
    options: dict | str | None = field(default=None, metadata={"help": "Options."})


def parse(tmp_path, args, config=None, launches=False, **kwargs):
    if config is not None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        args = ["--config", str(tmp_path / "config.yaml"), *args]
    parser = FlowParser((Settings,), prog="trl-flow test", launches=launches)
    return parser.parse_args_and_config(args, **kwargs)


def usage_error(capsys, call):
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    return capsys.readouterr().err


class TestParser:
    def test_command_line_beats_file_beats_default(self, tmp_path):
        (settings,) = parse(
            tmp_path, ["--learning_rate", "0.3"], {"learning_rate": 0.2, "num_generations": 8, "shuffle": False}
        )
        assert (settings.learning_rate, settings.num_generations) == (0.3, 8)
        assert settings.shuffle is False
        assert settings.kind == "flow"

    def test_config_with_equals_sign(self, tmp_path):
        (tmp_path / "config.yaml").write_text("num_generations: 6\n")
        (settings,) = parse(tmp_path, [f"--config={tmp_path / 'config.yaml'}"])
        assert settings.num_generations == 6

    @pytest.mark.parametrize(
        "config, expected",
        [
            ({"reward_funcs": "shapes"}, {"reward_funcs": ["shapes"]}),
            ({"reward_funcs": ["a", "b"]}, {"reward_funcs": ["a", "b"]}),
            ({"weights": [1, 0.5]}, {"weights": [1.0, 0.5]}),
            ({"learning_rate": 1}, {"learning_rate": 1.0}),
            ({"learning_rate": "1e-3"}, {"learning_rate": 1e-3}),
            ({"reward_funcs": None}, {"reward_funcs": None}),
            ({"window": [1, 3]}, {"window": [1, 3]}),
            ({"window": 1}, {"window": [1]}),
            ({}, {"window": [0, 2], "share": 0.5, "limit": None}),
            ({"share": 1, "limit": 3}, {"share": 1.0, "limit": 3}),
            ({"share": "1e-5"}, {"share": 1e-5}),
            ({"share": None, "limit": None}, {"share": None, "limit": None}),
        ],
    )
    def test_file_values_become_what_the_command_line_makes_of_them(self, tmp_path, config, expected):
        (settings,) = parse(tmp_path, [], config)
        for name, value in expected.items():
            assert getattr(settings, name) == value
            assert type(getattr(settings, name)) is type(value)

    def test_lists_and_optional_numbers_on_the_command_line(self, tmp_path):
        (settings,) = parse(tmp_path, ["--window", "1", "3", "--share", "1e-5", "--limit", "3"], {"window": [5, 6]})
        assert (settings.window, settings.share, settings.limit) == ([1, 3], 1e-5, 3)

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"window": [0, 2.5]}, "window: 2.5 is not a valid int"),
            ({"share": "half"}, "share: 'half' is not a valid float"),
            ({"limit": 2.5}, "limit: 2.5 is not a valid int"),
            ({"num_generations": 2.5}, "num_generations: 2.5 is not a valid int"),
            ({"num_generations": True}, "num_generations: True is not a valid int"),
            ({"weights": [1, "many"]}, "weights: 'many' is not a valid float"),
            ({"shuffle": "perhaps"}, "shuffle: 'perhaps' is not a valid bool"),
            ({"kind": "flwo"}, "kind: 'flwo' is not one of flow, cps"),
            ({"num_generations": None}, "num_generations: nothing is given, expected a value"),
            ({"num_generatoins": 2}, "--num_generatoins in the configuration file. Did you mean --num_generations?"),
            ({"learning_rate": [0.1]}, "learning_rate: [0.1] is not a valid float"),
            ({"kind": ["cps"]}, "kind: ['cps'] is not a valid"),
            ({"limit": {"a": 1}}, "limit: {'a': 1} is not a valid int"),
            ({"options": ["a"]}, "options: ['a'] is not a valid str"),
            ({"help": True}, "unknown argument --help in the configuration file"),
        ],
    )
    @pytest.mark.parametrize("launches", [False, True])
    def test_bad_file_value(self, tmp_path, capsys, config, message, launches):
        assert message in usage_error(capsys, lambda: parse(tmp_path, [], config, launches))

    @pytest.mark.parametrize(
        "text, message",
        [
            (b"learning_rate: [", "config.yaml: not valid YAML: while parsing"),
            (b"\xff\xfe\x00", "config.yaml: not valid YAML: "),
            (b"", "config.yaml: expected settings by their names"),
            (b"- seed", "config.yaml: expected settings by their names"),
            (b"1: 2", "config.yaml: expected settings by their names"),
            (b"env:", "config.yaml: env: expected variables by their names"),
        ],
    )
    def test_bad_file(self, tmp_path, capsys, text, message):
        (tmp_path / "config.yaml").write_bytes(text)
        assert message in usage_error(capsys, lambda: parse(tmp_path, ["--config", str(tmp_path / "config.yaml")]))

    @pytest.mark.parametrize(
        "args, message",
        [
            (
                ["--lerning_rate", "1"],
                "unknown argument --lerning_rate on the command line. Did you mean --learning_rate?",
            ),
            (
                ["--lerning-rate=1"],
                "unknown argument --lerning-rate on the command line. Did you mean --learning_rate?",
            ),
            (["--learning", "1"], "unknown argument --learning"),
            (["surplus"], "unexpected value 'surplus'"),
            (["--num_generations", "two"], "invalid int value: 'two'"),
            (["--kind", "flwo"], "invalid choice: 'flwo'"),
            (["--config"], "--config needs the path"),
            (["--config", "/nowhere.yaml"], "no such file"),
            (["--config", __file__, "--config", __file__], "given twice"),
        ],
    )
    @pytest.mark.parametrize("launches", [False, True])
    def test_bad_command_line(self, tmp_path, capsys, args, message, launches):
        assert message in usage_error(capsys, lambda: parse(tmp_path, args, launches=launches))

    def test_unknown_name_is_reported_before_a_bad_value(self, tmp_path, capsys):
        @dataclass
        class Picky:
            size: int = 0

            def __post_init__(self):
                raise ValueError("bad size")

        parser = FlowParser((Picky,), prog="trl-flow test")
        assert "Did you mean --size?" in usage_error(capsys, lambda: parser.parse_args_and_config(["--siez", "1"]))

    def test_accelerate_arguments_pass_through(self, tmp_path):
        settings, from_file, from_line = parse(
            tmp_path,
            ["--num_processes", "2", "--num_generations", "3", "--accelerate_config", "fsdp2"],
            {"multi_gpu": True, "num_machines": 1, "use_fsdp": False},
            launches=True,
            return_remaining_strings=True,
            separate_remaining_strings=True,
        )
        assert settings.num_generations == 3
        assert from_file == ["--multi_gpu", "--num_machines", "1"]
        assert from_line == ["--num_processes", "2", "--accelerate_config", "fsdp2"]

    def test_accelerate_arguments_are_unknown_to_commands_that_do_not_launch(self, tmp_path, capsys):
        error = usage_error(capsys, lambda: parse(tmp_path, ["--num_processes", "2"]))
        assert "unknown argument --num_processes" in error

    def test_hyphens(self, tmp_path):
        (settings,) = parse(tmp_path, ["--learning-rate=0.3", "--num-generations", "5", "--no-shuffle"])
        assert (settings.learning_rate, settings.num_generations, settings.shuffle) == (0.3, 5, False)

    def test_nearest_name_may_be_one_of_accelerate(self, tmp_path, capsys):
        error = usage_error(capsys, lambda: parse(tmp_path, ["--num_proceses", "2"], launches=True))
        assert "Did you mean --num_processes?" in error
        error = usage_error(capsys, lambda: parse(tmp_path, [], {"num_proceses": 2}, launches=True))
        assert "Did you mean --num_processes?" in error

    def test_help_is_grouped(self):
        parser = FlowParser((Settings,), {"Rates": ["learning_rate"], "Sets": ["shuffle"]}, prog="trl-flow test")
        text = parser.format_help()
        assert text.index("Rates:") < text.index("--learning_rate FLOAT") < text.index("Sets:")
        assert "--shuffle, --no_shuffle" in text
        assert "Group size." not in text and "num_generations" in text[text.index("--help_all") :]
        assert "Group size." in parser.format_help(everything=True)


class TestEnvironment:
    """Variables TRL_FLOW_<SETTING>: after the command line, before the file."""

    @pytest.mark.parametrize(
        "name, value, expected",
        [
            ("learning_rate", "1e-4", 1e-4),
            ("num_generations", "6", 6),
            ("reward_funcs", "a", ["a"]),
            ("reward_funcs", "a, b", ["a", "b"]),
            ("reward_funcs", '[a, {ocr: {match: "x, y"}}]', ["a", '{"ocr": {"match": "x, y"}}']),
            ("reward_funcs", '{"ocr": {"match": "paper"}}', ['{"ocr": {"match": "paper"}}']),
            ("weights", "1,0.5", [1.0, 0.5]),
            ("window", "[1, 3]", [1, 3]),
            ("window", "2", [2]),
            ("share", "null", None),
            ("kind", "cps", "cps"),
            ("text", "[a]", "[a]"),
            ("text", "1e-4", "1e-4"),
            ("shuffle", "false", False),
            ("shuffle", "1", True),
            ("options", "{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
            ("num_generations", "", 4),
        ],
    )
    def test_values(self, tmp_path, monkeypatch, name, value, expected):
        monkeypatch.setenv(f"TRL_FLOW_{name.upper()}", value)
        (settings,) = parse(tmp_path, [])
        found = getattr(settings, name)
        assert found == expected and type(found) is type(expected)
        for other in set(vars(settings)) - {name}:
            assert getattr(settings, other) == getattr(Settings(), other)

    def test_order(self, tmp_path, monkeypatch):
        for name in ("LEARNING_RATE", "NUM_GENERATIONS", "SHUFFLE"):
            monkeypatch.setenv(f"TRL_FLOW_{name}", "0")
        file = {"learning_rate": 0.2, "num_generations": 2, "shuffle": True, "limit": 2}
        (settings,) = parse(tmp_path, ["--learning_rate", "0.1"], file)
        assert (settings.learning_rate, settings.num_generations, settings.limit) == (0.1, 0, 2)
        assert settings.shuffle is False
        (settings,) = parse(tmp_path, ["--shuffle"], file)
        assert settings.shuffle is True

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("NUM_GENERATIONS", "2.5", "TRL_FLOW_NUM_GENERATIONS: '2.5' is not a valid int"),
            ("NUM_GENERATIONS", "null", "TRL_FLOW_NUM_GENERATIONS: nothing is given, expected a value"),
            ("WEIGHTS", "1,many", "TRL_FLOW_WEIGHTS: 'many' is not a valid float"),
            ("KIND", "flwo", "TRL_FLOW_KIND: 'flwo' is not one of flow, cps"),
            ("REWARD_FUNCS", "[a, b", "TRL_FLOW_REWARD_FUNCS: '[a, b' is not valid YAML"),
            ("NUM_GENERATOINS", "2", "unknown setting TRL_FLOW_NUM_GENERATOINS in the environment. Did you mean TRL_FLOW_NUM"),
            ("NUM_PROCESSES", "2", "TRL_FLOW_NUM_PROCESSES: give --num_processes on the command line"),
            ("CONFIG", "x.yaml", "TRL_FLOW_CONFIG: give --config on the command line"),
        ],
    )  # fmt: skip
    def test_bad_variable(self, tmp_path, monkeypatch, capsys, name, value, message):
        monkeypatch.setenv(f"TRL_FLOW_{name}", value)
        assert message in usage_error(capsys, lambda: parse(tmp_path, []))

    def test_variables_of_others(self, tmp_path, monkeypatch, capsys):
        """Those of other commands say nothing here; one that nobody knows is told, once, and not refused."""
        for name in ("NUM_CALIBRATION_ITERATIONS", "USE_CPU", "SETTINGS", "DEBUG", "REWARD_TOKEN", "DATA_STORE"):
            monkeypatch.setenv(f"TRL_FLOW_{name}", "1")
        parse(tmp_path, [])
        assert capsys.readouterr().err.splitlines() == [
            "trl-flow test: warning: TRL_FLOW_DATA_STORE in the environment is no setting, and is ignored"
        ]
        monkeypatch.setenv(launcher.LAUNCHED, "1")
        parse(tmp_path, [])
        assert capsys.readouterr().err == ""

    def test_env_of_the_file_is_for_other_variables(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("SOMEWHERE", "here")
        (settings,) = parse(tmp_path, [], {"env": {"SOMEWHERE": "there"}, "limit": 2})
        assert (os.environ["SOMEWHERE"], settings.limit) == ("there", 2)
        for value in ("", "1"):
            monkeypatch.setenv("TRL_FLOW_LIMIT", value)
            error = usage_error(capsys, lambda: parse(tmp_path, [], {"env": {"TRL_FLOW_LIMIT": 2}}))
            assert "env: TRL_FLOW_LIMIT: write `limit: ...`" in error

    @pytest.mark.parametrize("command", ["doctor", "prompts", "push", "convert", "rewards show", "report"])
    def test_commands_that_take_words_without_names(self, command, monkeypatch, capsys):
        monkeypatch.setenv("TRL_FLOW_OUTPT_DIR", "runs")
        monkeypatch.setenv("TRL_FLOW_NUM_PROMTS", "runs")
        assert "Did you mean TRL_FLOW_" in usage_error(capsys, lambda: cli.main([*command.split(), "word"]))


class TestLauncher:
    def test_one_process_stays_here(self, monkeypatch):
        self.no_launcher(monkeypatch)
        assert launcher.needs_launch([]) is False

    def test_launches_when_asked_to_and_not_twice(self, monkeypatch):
        self.no_launcher(monkeypatch)
        assert launcher.needs_launch(["--num_processes", "2"]) is True
        monkeypatch.setenv(launcher.LAUNCHED, "1")
        assert launcher.needs_launch(["--num_processes", "2"]) is False

    def test_launches_on_several_gpus_or_with_a_default_config(self, monkeypatch, tmp_path):
        self.no_launcher(monkeypatch)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        assert launcher.needs_launch([]) is True
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        assert launcher.needs_launch([]) is False
        (tmp_path / "default_config.yaml").touch()
        monkeypatch.setattr("accelerate.commands.config.default_config_file", str(tmp_path / "default_config.yaml"))
        assert launcher.needs_launch([]) is True

    def test_under_torchrun(self, monkeypatch):
        self.no_launcher(monkeypatch)
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert launcher.needs_launch(["--num_processes", "2"]) is False

    def test_launch_hands_over_the_command(self, monkeypatch):
        self.no_launcher(monkeypatch)
        seen = []

        def record(args):
            seen.append((args, os.environ.get(launcher.LAUNCHED)))

        monkeypatch.setattr("accelerate.commands.launch.launch_command", record)
        code = launcher.launch(
            "g2rpo", ["--max_steps", "2"], ["--accelerate_config=single_gpu", "--num_processes", "1"]
        )
        ((args, launched),) = seen
        assert code == 0 and launched == "1" and launcher.LAUNCHED not in os.environ
        assert args.module and args.training_script == "trl_flow.cli"
        assert args.training_script_args == ["g2rpo", "--max_steps", "2"]
        assert args.num_processes == 1
        assert Path(args.config_file).name == "single_gpu.yaml"

    def test_failure_in_the_processes_is_an_exit_code(self, monkeypatch):
        def fail(args):
            raise subprocess.CalledProcessError(1, "python")

        monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
        assert launcher.launch("g2rpo", [], ["--num_processes", "1"]) == 1

    def test_a_process_that_is_killed_is_named(self, monkeypatch, capsys):
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

        def killed(args):
            raise ChildFailedError("train", {3: ProcessFailure(3, 99, -9, "")})

        monkeypatch.setattr("accelerate.commands.launch.launch_command", killed)
        assert launcher.launch("g2rpo", [], ["--num_processes", "1"]) == 1
        assert "trl-flow g2rpo: error: process 3 was ended by SIGKILL" in capsys.readouterr().err

    @staticmethod
    def no_launcher(monkeypatch):
        monkeypatch.setattr("accelerate.commands.config.default_config_file", "/nowhere/default_config.yaml")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        for name in (launcher.LAUNCHED, "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)


class TestMain:
    def test_help_names_every_command_and_imports_nothing_heavy(self):
        code = (
            "import sys; from trl_flow import cli; cli.main(['--help']);"
            "print([name for name in ('torch', 'transformers', 'trl', 'yaml') if name in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        *lines, imported = result.stdout.splitlines()
        assert imported == "[]"
        titles = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert titles == ["Train", "Prepare", "Rewards and prompts", "Look", "Publish", "Examples", "Exit codes"]
        assert max(map(len, lines)) <= 80
        assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_a_command(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TRL_FLOW_LERNING_RATE", "1")  # help is for those who have a setting wrong
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        output = capsys.readouterr().out
        assert output.startswith(f"usage: trl-flow {command}")
        assert [line for line in output.splitlines() if len(line) > 80] == []
        if command in METHODS:
            assert METHODS[command].description in " ".join(output.split())

    @pytest.mark.parametrize("command", COMMANDS)
    def test_unknown_argument(self, command, capsys):
        error = usage_error(capsys, lambda: cli.main([command, "--no_such_setting", "1"]))
        assert "--no_such_setting" in error

    def test_unknown_command(self, capsys):
        assert cli.main(["dense_grop"]) == 2
        assert "Did you mean dense-grpo?" in capsys.readouterr().err

    def test_version(self, capsys):
        from trl_flow import __version__

        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == __version__

    @pytest.mark.parametrize(
        "args", [["--seed", "x"], ["--seeed", "1"], ["--config", "nowhere.yaml"], ["--kl-typo", "mean"]]
    )
    def test_wrong_command_line_has_an_exit_code_of_its_own(self, args, capsys):
        usage_error(capsys, lambda: cli.main(["flow-grpo", *args]))

    def test_wrong_variable_has_the_same_exit_code(self, capsys, monkeypatch):
        monkeypatch.setenv("TRL_FLOW_SEED", "x")
        usage_error(capsys, lambda: cli.main(["flow-grpo", "--seed", "1"]))

    def test_user_error_is_one_line(self, capsys):
        assert cli.main(["generate", "--model", "shapes"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("trl-flow generate: error: give prompts in exactly one way")

    def test_user_error_with_traceback(self, monkeypatch):
        with pytest.raises(ValueError, match="exactly one way"):
            cli.main(["--debug", "generate", "--model", "shapes"])
        monkeypatch.setenv("TRL_FLOW_DEBUG", "1")
        with pytest.raises(ValueError, match="exactly one way"):
            cli.main(["generate", "--model", "shapes"])

    def test_bug_keeps_its_traceback(self, monkeypatch):
        def bug(command, args):
            raise KeyError("latents")

        monkeypatch.setattr(cli, "run", bug)
        with pytest.raises(KeyError):
            cli.main(["env"])

    def test_env(self, capsys):
        assert cli.main(["env"]) == 0
        output = capsys.readouterr().out
        assert all(f"- {name}: " in output for name in ("trl-flow", "trl", "diffusers", "torch", "Accelerators"))

    def test_without_removes_an_ordered_subsequence(self):
        args = ["--max_steps", "2", "--num_processes", "2", "--seed", "2"]
        assert cli.without(args, ["--num_processes", "2"]) == ["--max_steps", "2", "--seed", "2"]


class TestMethods:
    @pytest.mark.parametrize("command", METHODS)
    def test_classes(self, command):
        method = METHODS[command]
        trainer, config = getattr(trl_flow, method.trainer), getattr(trl_flow, method.config)
        assert trainer.__name__ == method.trainer and config.__name__ == method.config
        assert trainer._config_class is config
        assert method.summary.startswith(f"{trainer._name}: ")
        assert method.description.startswith(f"Train a pipeline with {trainer._name}")
        assert trainer._tag_names[-1] == command

    def test_no_trainer_without_a_command(self):
        exported = {name for name in trl_flow.__all__ if name.endswith(("Trainer", "Config"))}
        assert exported == {name for method in METHODS.values() for name in (method.trainer, method.config)}

    @pytest.mark.parametrize("folder", ["shapes", "sd3.5-medium"])
    def test_each_has_its_examples(self, folder):
        assert {path.stem for path in (ROOT / "examples" / folder).glob("*.yaml")} >= set(METHODS)

    def test_make_knows_them(self):
        result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
        (line,) = [line for line in result.stdout.splitlines() if "METHOD is one of: " in line]
        assert line.partition(": ")[2].partition(".")[0].split() == sorted(METHODS)


class TestTrainingCommand:
    @pytest.mark.parametrize(
        "values",
        [{"lora_r": 0}, {"num_eval_prompts": 0}],
        ids=lambda values: next(iter(values)),
    )
    def test_bad_script_argument(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            FlowScriptArguments(**values)

    def test_directory_of_another_run(self, tmp_path):
        check_output_dir(str(tmp_path / "new"))
        check_output_dir(str(tmp_path))
        (tmp_path / "run.json").write_text('{"method": "G2RPO"}')
        with pytest.raises(ValueError, match="holds another run \\(G2RPO\\)"):
            check_output_dir(str(tmp_path))

    def test_held_out_scores_are_the_first_and_the_last(self):
        log = [
            {"step": 0, "eval_rewards/shapes/mean": 0.25, "eval_rewards/strict/mean": 0.125},
            {"step": 1, "rewards/shapes/mean": 0.9},
            {"step": 2, "eval_rewards/shapes/mean": 0.5, "eval_rewards/shapes/std": 0.1},
            {"step": 4, "eval_rewards/shapes/mean": 0.75, "eval_rewards/strict/mean": 0.25},
        ]
        assert held_out_scores(log) == {"shapes": (0.25, 0.75), "strict": (0.125, 0.25)}

    def test_interval_of_paired_changes(self, tmp_path):
        (tmp_path / "samples").mkdir()
        for step, scores in ((0, [0.1, 0.9, 0.5, None]), (2, [0.0] * 4), (10, [0.3, 1.0, 0.5, 0.7])):
            record = {"prompts": ["a", "b", "c", "d"], "scores": {"shapes": scores}}
            (tmp_path / "samples" / f"step_{step:06d}.json").write_text(json.dumps(record))
        # Changes 0.2, 0.1 and 0: standard deviation 0.1.
        assert paired_intervals(str(tmp_path)) == {"shapes": pytest.approx(1.96 * 0.1 / 3**0.5)}
        assert paired_intervals(str(tmp_path / "elsewhere")) == {}

    @pytest.mark.parametrize("command", METHODS)
    def test_written_config_repeats_the_run(self, tmp_path, command):
        def parse(*args):
            return make_training_parser(command).parse_args_and_config(args)

        script_args, training_args = parse(
            "--config", str(ROOT / "examples" / "shapes" / f"{command}.yaml"),
            "--output_dir", str(tmp_path / "run"),
            "--num_generations", "6", "--learning_rate", "5e-4", "--adam_beta2", "0.95", "--hub_token", "hf_secret",
            "--lora_target_modules", "to_q", "to_k", "--resume_from_checkpoint", "true",
        )  # fmt: skip
        config = resolved_config(script_args, training_args)
        path = write_config(config, command)
        assert path == tmp_path / "run" / "config.yaml"
        assert "hf_secret" not in path.read_text() and "resume" not in path.read_text()
        assert config["num_generations"] == 6 and config["learning_rate"] == 5e-4 and config["adam_beta2"] == 0.95
        assert "adam_beta1" not in config  # the base class's default, and left so

        again_script, again_training = parse("--config", str(path))
        assert again_script == script_args
        assert resolved_config(again_script, again_training) == config
        for name in own_fields(type(training_args)):
            assert getattr(again_training, name) == getattr(training_args, name), name

    def test_written_config_says_none_where_it_is_not_the_default(self, tmp_path):
        (tmp_path / "config.yaml").write_text(f"ema_decay: null\noutput_dir: {tmp_path}/run\n")
        parser = make_training_parser("flow-grpo")
        config = resolved_config(*parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")]))
        assert {name for name, value in config.items() if value is None} == {"ema_decay"}
        parser = make_training_parser("flow-grpo")
        _, again = parser.parse_args_and_config(["--config", str(write_config(config, "flow-grpo"))])
        assert again.ema_decay is None

    def test_held_out_prompts_from_elsewhere(self, tmp_path):
        """With the columns of the prompts to train on, unless they are a set that has a name."""
        (tmp_path / "test.jsonl").write_text('{"caption": "a red circle", "style": "plain", "votes": 3}\n')

        class Trainer:
            def __init__(self, eval_dataset, **kwargs):
                self.eval_dataset = eval_dataset

        def held_out(*words):
            line = ["--output_dir", str(tmp_path), "--use_cpu", "--dataset_name", str(tmp_path / "test.jsonl")]
            line += ["--dataset_columns", "caption=prompt", "style", "--dataset_test_split", "train", *words]
            script_args, training_args = make_training_parser("flow-grpo").parse_args_and_config(line)
            script_args.reward_funcs = ["shapes"]
            return make_trainer(Trainer, script_args, training_args).eval_dataset

        evaluated = ["--eval_strategy", "steps", "--eval_steps", "1"]
        for name in ([], ["--eval_dataset_name", str(tmp_path / "test.jsonl")]):
            assert held_out(*evaluated, *name).column_names == ["prompt", "style"]
        assert "tag" in held_out(*evaluated, "--eval_dataset_name", "shapes").column_names
        with pytest.raises(ValueError, match="eval_dataset_name='shapes' has no effect with eval_strategy='no'"):
            held_out("--eval_dataset_name", "shapes")

    def test_rewards_with_settings(self, tmp_path):
        """In YAML as a mapping, on the command line as JSON; keys and tokens are not written down."""
        config = tmp_path / "config.yaml"
        rewards = ["shapes", {"ocr": {"match": "paper"}}, {"yes_no": {"model": "judge", "api_key": "sk-secret"}}]
        config.write_text(yaml.safe_dump({"reward_funcs": rewards, "eval_reward_funcs": {"clip": None}}))
        script_args, training_args = make_training_parser("flow-grpo").parse_args_and_config(
            ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu"]
        )
        assert [parse_reward(reward) for reward in script_args.reward_funcs] == [
            ("shapes", {}),
            ("ocr", {"match": "paper"}),
            ("yes_no", {"model": "judge", "api_key": "sk-secret"}),
        ]
        assert [reward_name(reward) for reward in script_args.eval_reward_funcs] == ["clip"]
        written = resolved_config(script_args, training_args)
        assert "secret" not in json.dumps(written)
        assert written["reward_funcs"][:2] == ["shapes", '{"ocr": {"match": "paper"}}']
        assert parse_reward(written["reward_funcs"][2]) == ("yes_no", {"model": "judge"})

        again, _ = make_training_parser("flow-grpo").parse_args_and_config(
            ["--output_dir", str(tmp_path), "--use_cpu", "--reward_funcs", *written["reward_funcs"]]
        )
        assert again.reward_funcs == written["reward_funcs"]

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
    )
    def test_examples_are_valid(self, path, tmp_path):
        # A file is named after its method, and after what sets it apart from others of the method.
        command = max((method for method in METHODS if f"{path.stem}-".startswith(f"{method}-")), key=len)
        script_args, training_args, *rest = make_training_parser(command).parse_args_and_config(
            ["--config", str(path), "--output_dir", str(tmp_path), "--bf16", "false"], return_remaining_strings=True
        )
        assert rest == [[]]
        if path.parent.name == "shapes":
            assert script_args.reward_funcs and script_args.dataset_name

    def test_help_sets_the_method_apart(self):
        text = make_training_parser("dense-grpo").format_help()
        titles = [
            "Model and adapter:",
            "Rewards and prompts:",
            "Method:",
            "Rollouts:",
            "Advantages and objective:",
            "Training:",
            "Evaluation, logging and saving:",
            "Hub:",
            "General:",
            "Examples:",
        ]
        positions = [text.index(f"\n{title}\n") for title in titles]
        assert positions == sorted(positions)
        assert (
            positions[2] < text.index("--dense_reward") < positions[3] < text.index("--num_generations") < positions[4]
        )
        explained = text[: text.index("Other settings")]
        others = text[text.index("Other settings") : text.index("General:")]
        for name in (*own_fields(trl_flow.DenseGRPOConfig), "hub_revision", "hub_always_push"):
            assert f"--{name}" in explained and f" {name}," not in others, name
        assert "hub_token" in others
        assert text.count("--learning_rate ") == 1

    def test_no_reward_for_a_model_that_brings_none(self):
        assert default_rewards(FlowScriptArguments()) == ["shapes"]
        assert default_rewards(FlowScriptArguments(reward_funcs=["ocr"])) == ["ocr"]
        with pytest.raises(ValueError, match="reward_funcs is empty"):
            default_rewards(FlowScriptArguments(model_name_or_path="user/model"))


class TestRuns:
    """A training run and what comes after it, from the command line, on a tiny pipeline."""

    @pytest.fixture
    def config(self, tmp_path, monkeypatch):
        from pipelines import tiny_sd3

        tiny_sd3().save_pretrained(tmp_path / "tiny")
        (tmp_path / "prompts.txt").write_text("a red circle\na blue square\ntwo green circle\n")
        (tmp_path / "brightness.py").write_text(
            "import numpy\n"
            "def brightness(images, **kwargs):\n"
            "    return [float(numpy.asarray(image).mean()) for image in images]\n"
        )
        monkeypatch.chdir(tmp_path)
        TestLauncher.no_launcher(monkeypatch)
        settings = {
            "model_name_or_path": "tiny",
            "model_init_kwargs": {"text_encoder_3": None, "tokenizer_3": None},
            "reward_funcs": ["brightness.brightness"],
            "dataset_name": "prompts.txt",
            "dataset_test_split": "train",
            "output_dir": "run",
            "max_steps": 2,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 2,
            "num_generations": 3,
            "num_inference_steps": 3,
            "num_eval_inference_steps": 3,
            "guidance_scale": 1,
            "learning_rate": 0.01,
            "beta": 0,
            "ema_decay": 0,
            "activation_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return "config.yaml"

    def test_train_repeat_resume_generate(self, config, capsys):
        assert cli.main(["dense-grpo", "--config", config]) == 0
        output = capsys.readouterr().out
        assert "brightness" in output and "report.html" in output and Path("run/report.html").is_file()
        (command,) = [line.strip() for line in output.splitlines() if line.strip().startswith("trl-flow generate")]
        assert "--model tiny --adapter run --prompt 'a red circle'" in command

        assert cli.main(["dense-grpo", "--config", config]) == 1
        assert "holds another run" in capsys.readouterr().err

        assert cli.main(["dense-grpo", "--config", "run/config.yaml", "--output_dir", "again"]) == 0
        first, again = (load_file(Path(name, "adapter_model.safetensors")) for name in ("run", "again"))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name)

        state = json.loads(Path("run/trainer_state.json").read_text())
        resume = ["--max_steps", "3", "--resume_from_checkpoint", "true"]
        assert cli.main(["dense-grpo", "--config", "run/config.yaml", *resume]) == 0
        resumed = json.loads(Path("run/trainer_state.json").read_text())
        assert (state["global_step"], resumed["global_step"]) == (2, 3)

        capsys.readouterr()
        assert cli.main(shlex.split(command)[1:]) == 0
        assert "num_inference_steps=3, guidance_scale=1.0" in capsys.readouterr().out
        assert Image.open("grid.png").width > 0

    def test_run_config_repeats_a_run_from_elsewhere(self, config, tmp_path, monkeypatch):
        """Settings of the file, the environment and the command line; paths, lists, a noise table, rewards with settings."""
        monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)
        quick = ["--num_calibration_iterations", "1", "--num_samples", "8", "--output", "psi.json"]
        assert cli.main(["calibrate", "--config", config, *quick]) == 0
        settings = yaml.safe_load(Path(config).read_text())
        settings |= {"reward_funcs": ["brightness.brightness", {"jpeg_size": {"goal": "compressible"}}], "lora_r": 2}
        settings |= {"ema_decay": None, "noise_level": "psi.json", "lora_target_modules": ["attn.to_q"]}
        Path("settings.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setenv("TRL_FLOW_REWARD_WEIGHTS", "1,0.5")
        monkeypatch.setenv("TRL_FLOW_LEARNING_RATE", "0.02")
        monkeypatch.setenv("TRL_FLOW_NUM_GENERATIONS", "2")
        line = ["--num_generations", "4", "--sde_steps", "0", "1", "--eval_strategy", "no", "--save_strategy", "no"]
        assert cli.main(["dense-grpo", "--config", "settings.yaml", *line]) == 0

        for name in ("REWARD_WEIGHTS", "LEARNING_RATE", "NUM_GENERATIONS"):
            monkeypatch.delenv(f"TRL_FLOW_{name}")
        # The run does not depend on what has become of the table since.
        Path("psi.json").write_text("{}")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.syspath_prepend(str(tmp_path))
        run = tmp_path / "run"
        written = yaml.safe_load((run / "config.yaml").read_text())
        given = {"learning_rate": 0.02, "num_generations": 4, "reward_weights": [1.0, 0.5], "sde_steps": [0, 1]}
        assert given.items() <= written.items() and written["ema_decay"] is None
        assert cli.main(["dense-grpo", "--config", str(run / "config.yaml"), "--output_dir", "again"]) == 0
        for name in ("adapter_model.safetensors", "calibration.json"):
            assert (run / name).read_bytes() == Path("again", name).read_bytes()
        again = yaml.safe_load(Path("again", "config.yaml").read_text())
        different = {name for name in written.keys() | again.keys() if written.get(name) != again.get(name)}
        assert different == {"output_dir", "noise_level"}
        adapter = load_file(run / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    def test_printed_config_is_what_the_run_would_have(self, config, capsys, monkeypatch):
        monkeypatch.setenv("TRL_FLOW_LEARNING_RATE", "0.02")
        line = ["dense-grpo", "--config", config, "--sde_steps", "0", "1", "--dataset_name", "prompts.txt"]
        launch = ["--num_processes", "2"]  # settings can be printed anywhere
        assert cli.main([*line, *launch, "--print_config"]) == 0
        printed = capsys.readouterr().out
        assert not Path("run").exists()
        assert (yaml.safe_load(printed)["learning_rate"], yaml.safe_load(printed)["sde_steps"]) == (0.02, [0, 1])
        assert yaml.safe_load(printed)["dataset_name"] == os.path.abspath("prompts.txt")
        monkeypatch.delenv("TRL_FLOW_LEARNING_RATE")
        Path("printed.yaml").write_text(printed)
        assert cli.main(["dense-grpo", "--config", "printed.yaml", "--print-config"]) == 0
        assert capsys.readouterr().out == printed
        assert cli.main([*line, "--print_config", "--dry_run"]) == 1
        assert "dry_run=True and print_config=True" in capsys.readouterr().err

    def test_ctrl_c_in_the_last_push_says_how_to_push_later(self, config, capsys, monkeypatch):
        def interrupted(trainer, *args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("trl_flow.report.live.write_report", lambda *args, **kwargs: None)
        monkeypatch.setattr(trl_flow.FlowGRPOTrainer, "push_to_hub", interrupted)
        monkeypatch.setattr(
            trl_flow.FlowGRPOTrainer, "init_hf_repo", lambda trainer: setattr(trainer, "hub_model_id", "user/repo")
        )
        line = ["--push_to_hub", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
        assert cli.main(["dense-grpo", "--config", config, *line, "--hub_revision", "tried"]) == 130
        error = capsys.readouterr().err
        assert "To push it later: trl-flow push run user/repo --revision tried\n" in error
        assert Path("run/adapter_model.safetensors").is_file()

    def test_calibrate(self, config, capsys):
        arguments = ["--num_calibration_iterations", "2", "--num_samples", "8", "--output", "psi.json"]
        assert cli.main(["calibrate", "--config", config, *arguments]) == 0
        table = json.loads(Path("psi.json").read_text())
        assert len(table["noise_level"]) == 3 and Path("psi.png").is_file()
        assert "--noise_level psi.json" in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.distributed
    def test_two_processes(self, config):
        arguments = [
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--per_device_train_batch_size",
            "1",
        ]
        assert cli.main(["g2rpo", "--config", config, *arguments]) == 0
        assert sorted(path.name for path in Path("run/checkpoint-2").glob("rng_state_*")) == [
            "rng_state_0.pth",
            "rng_state_1.pth",
        ]


class TestGenerate:
    @pytest.mark.parametrize(
        "values, message",
        [
            ({"prompts": ["a"]}, "--model"),
            ({"model": "m", "prompts": ["a"], "compare": True}, "--compare needs an --adapter"),
            ({"model": "m", "prompts": ["a"], "prompt_file": "f"}, "exactly one way"),
            ({"model": "m", "prompts": ["a"], "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
            ({"model": "m", "prompts": ["a"], "output": "grid.txt"}, "grid.txt"),
        ],
    )
    def test_bad_arguments(self, values, message):
        with pytest.raises(ValueError, match=message):
            GenerateArguments(**values)

    def test_settings_of_the_adapters_run(self, tmp_path):
        assert run_config(None) == {}
        assert run_config(str(tmp_path)) == {}
        (tmp_path / "config.yaml").write_text("model_name_or_path: shapes\nguidance_scale: 1.0\n")
        assert run_config(str(tmp_path)) == {"model_name_or_path": "shapes", "guidance_scale": 1.0}

    def test_samples_as_the_adapters_run_evaluated(self):
        pipeline = tiny_pipeline("StableDiffusion3Pipeline")
        config = {"num_inference_steps": 10, "num_eval_inference_steps": 40, "guidance_scale": 1.0, "num_frames": 9}
        args = GenerateArguments(model="m", prompts=["a"])
        expected = {"num_inference_steps": 40, "guidance_scale": 1.0}
        assert sampling_arguments(pipeline, args, config) == expected
        config["eval_guidance_scale"] = 4.5
        assert sampling_arguments(pipeline, args, config) == expected | {"guidance_scale": 4.5}
        args = GenerateArguments(model="m", prompts=["a"], guidance_scale=2.0)
        assert sampling_arguments(pipeline, args, config) == expected | {"guidance_scale": 2.0}
        with pytest.raises(ValueError, match="num_frames=9: StableDiffusion3Pipeline has no such argument"):
            sampling_arguments(pipeline, GenerateArguments(model="m", prompts=["a"], num_frames=9), config)

    def test_sizes_are_not_enlarged(self):
        config = {"height": 8, "width": 16, "generation_kwargs": {"_auto_resize": False}}
        found = sampling_arguments(
            tiny_pipeline("FluxKontextPipeline"), GenerateArguments(prompts=["a"], model="m"), config
        )
        assert found == {"height": 8, "width": 16, "max_area": 128, "_auto_resize": False}

    def test_guidance_by_the_name_that_the_pipeline_has_for_it(self):
        args = GenerateArguments(model="m", prompts=["a"], guidance_scale=2.0)
        assert sampling_arguments(tiny_pipeline("QwenImagePipeline"), args, {}) == {"true_cfg_scale": 2.0}
        pipeline = tiny_pipeline("HunyuanVideo15Pipeline")
        assert sampling_arguments(pipeline, args, {}) == {} and pipeline.guider.guidance_scale == 2.0

    def test_frames_of_videos_of_both_denoisers(self, tmp_path):
        """Base and adapter, with the settings of the run, from a directory that a trainer has left."""
        base, run = tmp_path / "base", tmp_path / "run"
        tiny_pipeline("WanPipeline/2.2").save_pretrained(base)
        policy = FlowPolicy(tiny_pipeline("WanPipeline/2.2"), height=16, width=16, num_frames=5)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        save_policy(policy, run, str(base))
        settings = {"model_name_or_path": str(base), "num_eval_inference_steps": 2, "guidance_scale": 3.0}
        sizes = {"height": 16, "width": 16, "num_frames": 5}
        (run / "config.yaml").write_text(yaml.safe_dump(settings | sizes))
        output = tmp_path / "grid.png"
        generate_main(GenerateArguments(adapter=str(run), prompts=["a red circle"], compare=True, output=str(output)))
        with Image.open(output) as grid:
            assert grid.width > 4 * 16 and len(grid.convert("RGB").getcolors(1 << 20)) > 20

    @pytest.mark.parametrize("count", [1, 2])
    def test_grid_shows_every_picture(self, count):
        def picture(red, blue):
            return Image.new("RGB", (64, 64), (red, 0, blue))

        prompts = [f"prompt {i}" for i in range(8)]
        base = [[picture(20 + 10 * i + j, 100) for j in range(count)] for i in range(8)]
        adapted = [[picture(20 + 10 * i + j, 200) for j in range(count)] for i in range(8)]
        for grid, rows in (
            (make_grid(prompts, adapted), [adapted]),
            (make_grid(prompts, adapted, base), [adapted, base]),
        ):
            colors = {color for _, color in grid.getcolors(grid.width * grid.height)}
            expected = {image.getpixel((0, 0)) for row in rows for images in row for image in images}
            assert expected <= colors
