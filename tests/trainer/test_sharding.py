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
"""Weights and optimizers in parts, by FSDP2 and DeepSpeed: the updates, files and refusals of whole ones."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, PeftModel
from pipelines import prompts, tiny_sd3
from safetensors.torch import load_file
from tiny import tiny_pipeline
from torch import nn
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.policy import FAMILIES, FlowPolicy
from trl_flow.trainer.sharding import ShardingMixin, check_layers, check_sharded_policy, check_sharding
from trl_flow.trainer.transitions import trained_steps, transition_chunk


SCRIPT = Path(__file__).with_name("sharded_run.py")
EXAMPLES = Path(__file__).parents[2] / "examples" / "scaling" / "accelerate"


# ---- Equally many evaluations on all processes ----


def a_micro_batch() -> dict:
    """Two prompts, three steps: four samples from a parent each at step 0, and from one shared parent at steps 2 and 3."""
    advantages = torch.zeros(2, 3, 4)
    advantages[0, 0, 1], advantages[1, 0, 3] = 1.0, -1.0
    return {
        "nodes": torch.randn(2, 9, 4, 2, 2),
        "advantages": advantages,
        "trained": torch.ones(2, 3, 4, dtype=torch.bool),
        "steps": torch.tensor([0, 2, 3]),
        "parents": torch.tensor([[0, 1, 2, 3], [8, 8, 8, 8], [8, 8, 8, 8]]),
        "children": torch.tensor([[4, 5, 6, 7]] * 3),
        "prompts": ["a", "b"],
        "images": None,
    }


def chunks_of(inputs: dict, most=None) -> list:
    steps = trained_steps(inputs, torch.linspace(1, 0, 5), lambda prompts, images: prompts, True, most is not None)
    if most is not None:
        trainer = SimpleNamespace(batch_sizes={"training": SimpleNamespace(rows=1)}, _most=most)
        steps = ShardingMixin._with_repeats(trainer, steps)
    return [transition_chunk(inputs, at, part) for at in steps for part in at.parts(1)]


def test_a_process_with_less_repeats_transitions_of_its_own():
    inputs, asked = a_micro_batch(), []

    def most(counts):
        asked.append(counts)
        return [3, 2, 0]

    own, all_of_them = chunks_of(inputs), chunks_of(inputs, most)
    assert asked == [[2, 0, 0]]
    assert [(chunk.step, chunk.is_repeated) for chunk in own] == [(0, False), (0, False)]
    assert [(chunk.step, chunk.is_repeated) for chunk in all_of_them] == [
        (0, False),
        (0, False),
        (0, True),
        (2, True),
        (2, True),
    ]
    for mine, same in zip(own, all_of_them, strict=False):
        assert torch.equal(mine.latents, same.latents) and torch.equal(mine.next_latents, same.next_latents)
    for chunk, parent in ((all_of_them[2], 0), (all_of_them[3], 8)):
        assert torch.equal(chunk.latents, inputs["nodes"][:1, parent])
        assert torch.equal(chunk.next_latents, inputs["nodes"][:1, 4])
        assert [index.tolist() for index in chunk.members] == [[0], [0 if chunk.step == 0 else 1], [0]]


def test_calls_that_others_make_change_neither_velocity_nor_gradient():
    policy = FlowPolicy(tiny_sd3(), LoraConfig(r=2, target_modules=["to_q"]), guidance_scale=1.0)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    latents, conditioning = torch.randn(2, *policy.latent_shape), policy.conditioning(["red", "blue"])

    def evaluated():
        policy.zero_grad()
        calls = []
        handle = policy.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
        velocity = policy(latents, 0.5, conditioning)
        velocity.square().sum().backward()
        handle.remove()
        return velocity, [p.grad.clone() for p in policy.parameters() if p.requires_grad], len(calls)

    velocity, gradients, count = evaluated()
    asked = []
    policy.most_calls = lambda counts: asked.append(counts) or [counts[0] + 2]
    more, same_gradients, more_calls = evaluated()
    assert (count, more_calls, asked) == (1, 3, [[1]])
    assert torch.equal(more, velocity) and more.grad_fn is not None
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


# ---- Which layers are sharded one by one ----


@pytest.mark.parametrize(
    "name, expected",
    [
        ("StableDiffusion3Pipeline", ["JointTransformerBlock"]),
        ("FluxPipeline", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
        ("WanPipeline/2.2", ["WanTransformerBlock"]),  # of both denoisers
        ("LTXPipeline", ["LTXVideoTransformerBlock"]),  # diffusers names none: those that it compiles one by one
        # Two more names are those of other models of the class.
        (
            "HunyuanVideoPipeline",
            [
                f"HunyuanVideo{name}"
                for name in ("TransformerBlock", "SingleTransformerBlock", "PatchEmbed", "TokenRefiner")
            ],
        ),
    ],
)
def test_layers(name, expected):
    policy = FlowPolicy(tiny_pipeline(name), LoraConfig(r=1, target_modules=["to_q"]))
    assert policy._no_split_modules == expected


@pytest.mark.parametrize("name", [name for family in FAMILIES for name in family.pipelines])
def test_layers_of_every_family(name):
    """Of what a denoiser has in lists, its blocks, next to all is gathered one by one."""
    pipeline = tiny_pipeline(name)
    (family,) = (family for family in FAMILIES if name in family.pipelines)
    components = [name for name in family.components if getattr(pipeline, name, None) is not None]
    denoisers = nn.ModuleDict({name: getattr(pipeline, name) for name in components})
    policy = SimpleNamespace(pipeline=pipeline, components=components, denoisers=denoisers)
    layers = FlowPolicy._no_split_modules.fget(policy)
    for denoiser in denoisers.values():
        blocks = {p for m in denoiser.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
        gathered = {p for m in denoiser.modules() if type(m).__name__ in layers for p in m.parameters()}
        assert len(blocks & gathered) >= 0.85 * len(blocks)


# ---- What is refused ----

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version=1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing: true among"),
        ({**FSDP2, "ACCELERATE_MIXED_PRECISION": "fp16"}, "Use bf16=True"),
    ],
)
def test_refused_before_the_model_is_loaded(environment, message, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer("nobody/nothing", lambda **_: [], config, prompts(8))


needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 3])
def test_other_stages_are_refused(stage, tmp_path):
    config = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    config.deepspeed_plugin = DeepSpeedPlugin(zero_stage=stage)
    with pytest.raises(ValueError, match=f"zero_stage={stage}: expected 1 or 2"):
        FlowGRPOTrainer("nobody/nothing", lambda **_: [], config, prompts(8))


def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes, of a configuration file or one of TRL's names."""
    words = resolve_accelerate_config_argument(["--accelerate_config", config])
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("config", ["fsdp2", "fsdp1", *sorted(str(path) for path in EXAMPLES.glob("fsdp*.yaml"))])
def test_fsdp_configurations(config, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for name, value in environment_of(config).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    args = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="fsdp_version=1") if config == "fsdp1" else nullcontext():
        check_sharding(args)
    if config != "fsdp1":
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(FlowPolicy(tiny_sd3(), LoraConfig(r=1, target_modules=["to_q"])))
        assert plugin.transformer_cls_names_to_wrap == ["JointTransformerBlock"]
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@needs_deepspeed
@pytest.mark.parametrize(
    "config", ["zero1", "zero2", "zero3", *sorted(str(path) for path in EXAMPLES.glob("zero*.yaml"))]
)
def test_deepspeed_configurations(config, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for name, value in environment_of(config).items():
        if name.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
            monkeypatch.setenv(name, value)
    args = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert str(args.deepspeed_plugin.zero_stage) in Path(config).stem
    with pytest.raises(ValueError, match="zero_stage=3") if config == "zero3" else nullcontext():
        check_sharding(args)


def test_layers_that_nobody_names(monkeypatch):
    policy = FlowPolicy(tiny_pipeline("LuminaPipeline"), LoraConfig(r=1, target_modules=["to_q"]))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    with pytest.raises(ValueError, match="which layers of LuminaNextDiT2DModel .* fsdp_transformer_layer_cls_to_wrap"):
        check_layers(policy, plugin)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LuminaNextDiTBlock")
    check_layers(policy, FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"))
    plugin.auto_wrap_policy = None  # as with fsdp_auto_wrap_policy: NO_WRAP
    check_layers(policy, plugin)


def test_policies_that_cannot_be_sharded():
    adapter = LoraConfig(r=1, target_modules=["to_q"])
    policy = FlowPolicy(tiny_pipeline("WanPipeline/2.2"), {"transformer": adapter})
    check_sharded_policy(policy, is_deepspeed=False)
    with pytest.raises(ValueError, match="Only transformer of transformer, transformer_2 has an adapter"):
        check_sharded_policy(policy, is_deepspeed=True)
    policy = FlowPolicy(tiny_sd3(), adapter)
    policy.pipeline.transformer.hf_quantizer = object()  # as diffusers leaves it behind
    check_sharded_policy(policy, is_deepspeed=True)
    with pytest.raises(ValueError, match="quantization: FSDP2"):
        check_sharded_policy(policy, is_deepspeed=False)


# ---- Two processes ----

CASES = {
    "fsdp2": "FlowGRPO G2RPO DiffusionNFT AWM checkpointing compiled WanPipeline/2.2 complete kept resumed".split(),
    "zero1": "FlowGRPO clipped".split(),
    "zero2": "FlowGRPO complete kept resumed".split(),
}


def train(folder: Path, kind: str, cases: list[str], processes: int, **environment):
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        *([sys.executable] if kind == "plain" and processes == 1 else launch),
        str(SCRIPT),
        str(folder),
        kind,
        *cases,
    ]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What one process learns, with nothing in parts."""
    folder = tmp_path_factory.mktemp("sharding")
    train(folder, "plain", list(dict.fromkeys(case for cases in CASES.values() for case in cases)), 1)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["fsdp2", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero1", "zero2"))]
)
def test_parts_learn_what_the_whole_learns(plain, kind):
    train(plain, kind, CASES[kind], 2)
    for case in CASES[kind]:
        files = [
            path.relative_to(plain / "plain" / case)
            for path in (plain / "plain" / case).rglob("*.safetensors")
            if not path.parent.name.startswith("checkpoint-")
        ]
        assert files
        for file in files:
            one, parts = (load_file(plain / name / case / file) for name in ("plain", kind))
            assert one.keys() == parts.keys()
            for key in one:
                # DiffusionNFT divides by the distance from the policy that sampled.
                tolerance = {"rtol": 0, "atol": 2e-5 if case == "DiffusionNFT" else 2e-6}
                torch.testing.assert_close(
                    parts[key], one[key], **tolerance, msg=lambda m, k=key, c=case: f"{c}, {k}: {m}"
                )
        noted, expected = (torch.load(plain / name / case / "noted.pt") for name in (kind, "plain"))
        assert noted["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        # Two processes divide an update's prompts otherwise among its micro-steps.
        if kind == "fsdp2" and case != "FlowGRPO":
            assert noted["shares"] == pytest.approx(expected["shares"], abs=2e-3)

    if "complete" in CASES[kind]:
        weights = load_file(plain / kind / "complete" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert weights.keys() == tiny_sd3().transformer.state_dict().keys()
    if "resumed" in CASES[kind]:
        files = [plain / kind / case / "adapter_model.safetensors" for case in ("kept", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        if kind == "fsdp2":
            files[1].unlink()
            train(plain, kind, ["resumed"], 1)
            assert files[0].read_bytes() == files[1].read_bytes(), "with another number of processes"
        pipeline = tiny_sd3()
        pipeline.load_lora_weights(str(files[0].parent))
        by_peft = PeftModel.from_pretrained(tiny_sd3().transformer, files[0].parent)
        key = "transformer_blocks.0.attn.to_q.lora_A"
        loaded, again = pipeline.transformer.get_submodule(key), by_peft.base_model.model.get_submodule(key)
        assert torch.equal(loaded["default_0"].weight, again["default"].weight)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_in_parts_goes_on(tmp_path):
    """Also with another number of processes."""
    kept, resumed = (tmp_path / "fsdp2" / case / "adapter_model.safetensors" for case in ("kept", "resumed"))
    train(tmp_path, "fsdp2", ["kept", "resumed"], 2, STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert len(list((tmp_path / "fsdp2" / "kept" / "checkpoint-2" / "optimizer_0").glob("*.distcp"))) == 2
    assert kept.read_bytes() == resumed.read_bytes()
    resumed.unlink()
    train(tmp_path, "fsdp2", ["resumed"], 1, STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert kept.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["plain", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_gradient_that_is_no_number_on_one_process_ends_both(tmp_path, kind):
    train(tmp_path, kind, ["spoiled"], 2)
    for rank in (0, 1):
        assert (
            (tmp_path / kind / "spoiled" / f"{rank}.txt")
            .read_text()
            .startswith("The gradient holds NaN or infinity at step 1")
        )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_an_adapter_stays_float32_beside_bfloat16_weights(tmp_path, kind):
    train(tmp_path, kind, ["half"], 2, PRECISION="bf16")
    weights = load_file(tmp_path / kind / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
