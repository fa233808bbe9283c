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

"""
What starts runs on clusters: the scripts run in a real shell whose `srun`, `trl-flow` and `torchrun` write down their words,
which the real parsers then read. And a launcher that starts fewer processes than it was asked for is found out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.run import config_from_args
from torch.distributed.run import get_args_parser as torchrun_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from trl_flow import cli
from trl_flow.scripts import launcher
from trl_flow.scripts.launcher import unknown_to_accelerate
from trl_flow.scripts.training import make_training_parser


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "scaling"
ACCELERATE = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
SBATCH = EXAMPLES / "slurm" / "train.sbatch"
KUBERNETES = EXAMPLES / "kubernetes" / "job.yaml"
SKYPILOT = EXAMPLES / "skypilot" / "train.yaml"

PROGRAMS = {
    "trl-flow": 'printf "%s\\n" "$@" > "$WORDS/$((${SLURM_NODEID:-0} + ${SKYPILOT_NODE_RANK:-0}))"',
    "torchrun": 'printf "%s\\n" "$@" > "$WORDS/$JOB_COMPLETION_INDEX"',
    "srun": 'for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do export SLURM_NODEID; "$@"; done',
    "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
}


@pytest.fixture
def shell(tmp_path):
    """Runs a script of the examples, and returns the words that the launcher got on each node."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(words, environment, nodes=2, code=0):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORDS": str(tmp_path), **environment}
        result = subprocess.run(
            ["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == code, result.stderr
        return (
            [(tmp_path / str(node)).read_text().splitlines() for node in range(nodes)] if code == 0 else result.stderr
        )

    return run


def settings(words, prompts=48, processes=16):
    """Parses the command's words as the command does, and returns those for accelerate."""
    command, *words = words
    *parsed, from_file, from_line = make_training_parser(command).parse_args_and_config(
        [*words, "--use_cpu", "--bf16", "false"], return_remaining_strings=True, separate_remaining_strings=True
    )
    assert from_file == [] and unknown_to_accelerate(from_line) == []
    args = parsed[1]
    assert args.per_device_train_batch_size * args.steps_per_generation * processes == prompts
    assert args.gradient_accumulation_steps == args.steps_per_generation
    return from_line, args


def launched(words, monkeypatch) -> dict:
    """What torch's launcher makes of what accelerate makes of its words on this node."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    words = resolve_accelerate_config_argument(words)
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    assert args.multi_gpu or args.use_fsdp or args.use_deepspeed
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        prepare_deepspeed_cmd_env(args)
    else:
        prepare_multi_gpu_env(args)  # sets those of torch's launcher
    words = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    return of_torch(_filter_args(args, torchrun_parser(), words))


def of_torch(args) -> dict:
    config, *_ = config_from_args(args)
    assert config.min_nodes == config.max_nodes
    facts = {"nodes": config.max_nodes, "each": config.nproc_per_node}
    if config.max_nodes > 1:
        facts |= {"rank": config.rdzv_configs["rank"], "first": config.rdzv_endpoint}
    return facts


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= config.to_dict().keys()
    kinds = {"fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU") and config.mixed_precision == "no"
    assert config.num_machines == (2 if path.stem == "several_nodes" else 1)
    assert config.num_processes == 8 * config.num_machines


@pytest.mark.parametrize("path", [*ACCELERATE, SBATCH, KUBERNETES, SKYPILOT], ids=lambda path: path.stem)
def test_every_example_says_how_to_start_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comment = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#")
    files = re.findall(r"examples/scaling/\S+\.(?:yaml|sbatch)", comment)
    assert str(path.relative_to(ROOT)) in files and all(Path(file).is_file() for file in files)
    for line in re.findall(r"^trl-flow .*", comment.replace("\\\n", " "), re.MULTILINE):
        processes = load_config_from_file(str(path)).num_processes
        words, _ = settings(line.split()[1:], processes=processes)
        assert launched(words, monkeypatch)["each"] == 8


def test_slurm(shell, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0
    allocation = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[7-8]"}
    for rank, words in enumerate(shell([str(SBATCH), "--run_name", "two words"], allocation)):
        words, args = settings(words)
        assert args.run_name == "two words" and args.output_dir == "runs/sd3.5-medium-dense-grpo"
        assert launched(words, monkeypatch) == {"nodes": 2, "each": 8, "rank": rank, "first": "node7:29500"}
    error = shell([str(SBATCH)], {**allocation, "PROMPTS": "40"}, code=2)
    assert "PROMPTS=40: expected a multiple of the 16 GPUs" in error


def test_slurm_on_one_node(shell, monkeypatch):
    monkeypatch.chdir(ROOT)
    allocation = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[7-8]"}
    (words,) = shell([str(SBATCH)], {**allocation, "CONFIG": "examples/shapes/dense-grpo.yaml"}, nodes=1)
    words, args = settings(words, processes=4)
    assert args.num_inference_steps == 4  # the other configuration's
    assert launched(words, monkeypatch) == {"nodes": 1, "each": 4}


def test_kubernetes(shell, monkeypatch):
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    # What gives the first pod its name: https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = container["command"]
    assert program == "bash"
    for rank in range(2):
        words_of_torchrun = shell(words, {**environment, "JOB_COMPLETION_INDEX": str(rank)}, nodes=rank + 1)[rank]
        args = torchrun_parser().parse_args(words_of_torchrun)
        assert args.module and args.training_script == "trl_flow.cli"
        words_of_accelerate, settings_of_run = settings(args.training_script_args)
        assert words_of_accelerate == [] and settings_of_run.output_dir.startswith("/runs/")
        first = f"{name}-0.{service['metadata']['name']}:29500"
        assert of_torch(args) == {"nodes": 2, "each": 8, "rank": rank, "first": first}
    assert "expected a multiple of 2 x 8" in shell(words, {**environment, "PROMPTS": "40"}, code=2)


def test_skypilot(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load(SKYPILOT.read_text())
    # Fields of https://docs.skypilot.co/en/latest/reference/yaml-spec.html
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "setup", "run"}
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0
    (tmp_path / "activate").touch()
    script = task["run"].replace("source .venv/bin/activate", f"source {tmp_path}/activate")
    assert script != task["run"]
    nodes, (_, gpus) = task["num_nodes"], task["resources"]["accelerators"].split(":")
    environment = {**task["envs"], "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": gpus}
    environment["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    for rank in range(nodes):
        words = shell(["-c", script], {**environment, "SKYPILOT_NODE_RANK": str(rank)}, nodes=rank + 1)[rank]
        words, args = settings(words)
        assert args.push_to_hub  # the machine is returned at the end
        assert launched(words, monkeypatch) == {"nodes": 2, "each": 8, "rank": rank, "first": "10.0.0.1:29500"}
    rank = {"SKYPILOT_NODE_RANK": "0", "PROMPTS": "40"}
    assert "expected a multiple of the 16 GPUs" in shell(["-c", script], {**environment, **rank}, code=2)


class TestFewerProcessesThanAskedFor:
    @pytest.mark.parametrize("words", [["--num_processes", "2", "--cpu"], ["--num_processes=2"]])
    def test_of_the_command(self, words, tmp_path, monkeypatch, capsys):
        """The launcher is the real one; the process that it starts only says what it was asked for."""
        for name in (launcher.LAUNCHED, "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", "/nowhere/default.yaml")
        monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere/default.yaml")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        started, popen = [], subprocess.Popen

        def start(words, env):
            started.append((words, env))
            return popen([sys.executable, "-c", ""])

        monkeypatch.setattr("accelerate.commands.launch.subprocess.Popen", start)
        config = str(ROOT / "examples" / "shapes" / "dense-grpo.yaml")
        assert cli.main(["dense-grpo", "--config", config, "--output_dir", str(tmp_path), *words]) == 0
        ((command, environment),) = started
        assert environment[launcher.LAUNCHED] == "2" and not {"WORLD_SIZE", "LOCAL_RANK"} & environment.keys()
        monkeypatch.setenv(launcher.LAUNCHED, environment[launcher.LAUNCHED])
        assert cli.main(command[command.index("trl_flow.cli") + 1 :]) == 1
        error = capsys.readouterr().err
        assert "num_processes=2: expected as many processes, and accelerate started 1." in error
        assert "`--multi_gpu --num_processes 2` without --cpu" in error
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "asked, environment, fine",
        [
            ("2", {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, True),
            ("2", {"OMPI_COMM_WORLD_SIZE": "2"}, True),  # --mpirun_hostfile
            ("", {"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, True),  # one for each GPU, by itself
            ("1", {}, True),
            ("9", {"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, False),  # on two machines
        ],
    )
    def test_numbers(self, asked, environment, fine, monkeypatch):
        for name in ("WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {launcher.LAUNCHED: asked, **environment}.items():
            monkeypatch.setenv(name, value)
        if fine:
            assert launcher.needs_launch(["--num_processes", "2"]) is False
        else:
            with pytest.raises(ValueError, match="num_processes=9: expected as many processes, and .* started 8"):
                launcher.needs_launch([])

    @pytest.mark.parametrize("words, asked", [([], 16), (["--num_processes", "4"], 4)])
    def test_number_in_a_file(self, words, asked, monkeypatch):
        seen = []
        monkeypatch.delenv(launcher.LAUNCHED, raising=False)
        monkeypatch.setattr(
            "accelerate.commands.launch.launch_command", lambda args: seen.append(os.environ[launcher.LAUNCHED])
        )
        file = str(EXAMPLES / "accelerate" / "several_nodes.yaml")
        assert launcher.launch("g2rpo", [], ["--accelerate_config", file, *words]) == 0
        assert seen == [str(asked)]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "program", [["-m", "accelerate.commands.launch"], ["-m", "accelerate.commands.accelerate_cli", "launch"]]
    )
    @pytest.mark.parametrize("words, fine", [(["--cpu"], False), (["--multi_gpu"], True)])
    def test_of_a_script_of_ones_own(self, program, words, fine, tmp_path):
        """`accelerate launch train.py`, for real: what the trainer calls finds the number in the launcher's command line."""
        script = tmp_path / "train.py"
        script.write_text("from trl_flow.environment import check_processes\ncheck_processes()\nprint('trains')\n")
        words = [*words, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, *program, *words, str(script)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (result.returncode == 0) is fine, result.stderr
        assert result.stdout.count("trains") == (2 if fine else 0)
        assert ("num_processes=2: expected as many processes, and accelerate started 1" in result.stderr) is not fine


@pytest.mark.slow
def test_cost_on_paper():
    """DenseGRPO on SD3.5 Medium, counted by hand: 24 chains of 10 steps with full tails, 9 of them trained, beta above 0."""
    words = ["dense-grpo", "--config", "examples/sd3.5-medium/dense-grpo.yaml", "--prompts", "48"]
    words += ["--forward", "1", "--train", "3", "--decode", "0.5", "--score", "0.25"]
    command = [sys.executable, "benchmarks/cost.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    group = (24 * 55 + 24 * 9) * 1 + 24 * 9 * 3 + 24 * 10 * (0.5 + 0.25)
    assert "A group: 1,536 evaluations, 216 trained rows, 240 pictures." in result.stdout
    lines = {int(line.split(" | ")[0][2:].replace(",", "")): line for line in result.stdout.splitlines()[4:]}
    assert list(lines) == [2**power for power in range(11)]
    hours, gpu_hours = 4500 * 6 * group / 3600, 4500 * 48 * group / 3600
    update, gpu_hours_of_update = f"{6 * group:,.1f}", f"{48 * group / 3600:,.2f}"
    assert lines[8] == f"| 8 | 48 | 6 | {update} | {gpu_hours_of_update} | {hours:,.1f} | {gpu_hours:,.1f} |"
    assert lines[32].startswith("| 32 | 48 | 2 |")  # 16 of them have two groups, and the others wait
    assert lines[1024].startswith(f"| 1,024 | 1,024 | 1 | {group:,.1f} |")
