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

"""Memory that does not suffice: the run goes on in smaller batches, with the same result to rounding."""

import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from pipelines import prompts

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, DiffusionNFTConfig, DiffusionNFTTrainer
from trl_flow.trainer.batch_size import (
    MOST_ROWS,
    BatchSize,
    free_memory,
    peak_memory,
    rows_that_fit,
)


NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


# ---- Batch sizes by themselves ----


def limited(limit, sizes):
    def call(part):
        rows = part.stop - part.start
        if rows > limit:
            raise torch.OutOfMemoryError(NO_ROOM)
        sizes.append(rows)
        return list(range(10))[part]

    return call


def test_parts_are_halved_until_they_fit_and_stay_so(caplog):
    size, sizes = BatchSize("Sampling", "rollout_batch_size", 8), []
    assert sum(size.in_parts(limited(3, sizes), 10), []) == list(range(10))
    assert sizes == [2, 2, 2, 2, 2] and size.rows == 2
    assert sum(size.in_parts(limited(3, sizes), 3), []) == [0, 1, 2] and sizes[5:] == [2, 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "ran out of memory with 8 rows at a time, and goes on with 2" in record.message
    assert "rollout_batch_size=2" in record.message
    # A batch of fewer rows than are allowed that does not fit.
    size = BatchSize("Sampling", "rollout_batch_size", 100)
    assert sum(size.in_parts(limited(3, sizes), 5), []) == list(range(5)) and size.rows == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(NO_ROOM),
        MemoryError(),
        RuntimeError(
            "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "python", "driver", "cublas"],
)
def test_errors_that_say_that_memory_does_not_suffice(error):
    def call(rows):
        if rows > 2:
            raise error
        return rows

    assert BatchSize("Training", "transition_batch_size", 8).retried(call, 8) == 2


def test_a_single_row_that_does_not_fit_and_errors_of_other_kinds():
    size = BatchSize("Training", "transition_batch_size", 4)
    with pytest.raises(torch.OutOfMemoryError, match="with a single row. What helps: activation_checkpointing") as e:
        size.in_parts(limited(0, []), 4)
    assert NO_ROOM in str(e.value)
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        size.in_parts(lambda part: (_ for _ in ()).throw(RuntimeError("shapes differ")), 4)
    size = BatchSize("Training", "transition_batch_size", 4)
    size.shared = True
    with pytest.raises(torch.OutOfMemoryError, match="all processes take part in it: set transition_batch_size=2"):
        size.retried(lambda rows: limited(1, [])(slice(0, rows)), 9)


def test_what_an_error_has_left_is_freed_before_the_next_attempt():
    left = []

    def inner(rows):
        big = torch.zeros(10)
        left.append(weakref.ref(big))
        if rows > 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return rows

    def call(rows):
        assert all(reference() is None for reference in left)
        activations = torch.zeros(10)
        left.append(weakref.ref(activations))
        try:
            return inner(rows)
        except torch.OutOfMemoryError as error:
            raise RuntimeError("while a block was computed again") from error

    undone = []
    size = BatchSize("Training", "transition_batch_size", 7)
    assert size.retried(call, 9, lambda: undone.append(1)) == 1 and undone == [1, 1]


def test_rows_are_found_on_a_straight_line():
    assert rows_that_fit(one=30, two=40, free=200) == 16  # 20 + 10 n <= 180
    assert rows_that_fit(one=30, two=40, free=10) == 1
    assert rows_that_fit(one=30, two=30, free=10) == MOST_ROWS

    cpu = torch.device("cpu")

    def call(n):
        kept = [torch.zeros(n, 250) for _ in range(3)]  # 3,000 bytes for each row
        kept[0].add_(1.0)
        del kept[1]
        total = kept[0].view(-1) + 1.0  # 1,000 more, where 1,000 have gone
        torch.zeros(500)  # 2,000 for any number of rows
        return total

    assert peak_memory(lambda: call(1), cpu) == 5000
    assert peak_memory(lambda: call(4), cpu) == 14000
    free = free_memory(cpu)
    assert 0 < free
    size = BatchSize("Sampling", "rollout_batch_size", "auto")
    size.find(
        call, cpu, reserved=free - 100_000
    )  # 0.9 * 100,000 = 2,000 + 3,000 n, but for what others take meanwhile
    assert 1 <= size.rows <= MOST_ROWS
    fails_from = []

    def never_two(n):
        fails_from.append(n)
        if n > 1:
            raise torch.OutOfMemoryError(NO_ROOM)

    size = BatchSize("Sampling", "rollout_batch_size", "auto")
    size.find(never_two, cpu)
    assert size.rows == 1 and fails_from == [1, 1, 2]
    size.find(never_two, cpu)
    assert fails_from == [1, 1, 2]


def test_an_update_allocates_nothing_that_is_not_counted():
    """The bytes that are counted on a CPU are those of torch's own profiler."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])

    def train():
        layers(torch.ones(32, 64)).square().sum().backward()

    train()
    with torch.profiler.profile(profile_memory=True) as profile:
        train()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    assert most > 30_000
    assert peak_memory(train, torch.device("cpu")) == pytest.approx(most, rel=0.1)


# ---- Runs ----


class Memory:
    """A denoiser and a decoder that have room for so many rows only."""

    def __init__(self, trainer, sampling=99, training=99, decoding=99, backward=False):
        self.failures = 0
        self.sizes = {"sampling": [], "training": [], "decoding": []}
        transformer, vae = trainer.policy.pipeline.transformer, trainer.policy.pipeline.vae
        decode = vae.decode

        def check(name, rows, limit):
            if rows > limit:
                self.failures += 1
                raise torch.OutOfMemoryError(NO_ROOM)
            self.sizes[name].append(rows)

        def evaluated(module, args, kwargs):
            rows = len(kwargs["hidden_states"])
            if not torch.is_grad_enabled():
                check("sampling", rows, sampling)
            elif not backward:
                check("training", rows, training)

        def between(module, args, kwargs, output):
            # When its gradient arrives, the layers behind it have added theirs.
            if backward and torch.is_grad_enabled():
                rows = len(kwargs["hidden_states"])
                output[1].register_hook(lambda gradient: check("training", rows, training))

        def decoded(latents, *args, **kwargs):
            check("decoding", len(latents), decoding)
            return decode(latents, *args, **kwargs)

        transformer.register_forward_pre_hook(evaluated, with_kwargs=True)
        transformer.transformer_blocks[0].register_forward_hook(between, with_kwargs=True)
        vae.decode = decoded


def run(make_trainer, name, memory=None, method=(), **settings):
    trainer = make_trainer(
        *method,
        **{
            "output_dir": str(make_trainer.directory / name),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "steps_per_generation": 2,
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            **settings,
        },
    )
    torch.manual_seed(0)
    for parameter in trainer._trainable:  # LoRA begins with zeros, which have no gradient for the other half
        parameter.data = 0.1 * torch.randn(parameter.shape)
    trainer.before = [parameter.detach().clone() for parameter in trainer._trainable]
    memory = Memory(trainer, **memory or {})
    trainer.train()
    return trainer, memory


def assert_same(trainer, expected, ignored=()):
    moved = max((p - b).abs().max().item() for p, b in zip(expected._trainable, expected.before, strict=True))
    assert moved > 1e-4
    for one, other in zip(trainer._trainable, expected._trainable, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3 * moved)
    assert (trainer._nfe, trainer._rows_trained) == (expected._nfe, expected._rows_trained)
    logs, expected = trainer.state.log_history, expected.state.log_history
    assert len(logs) == len(expected)
    for entry, other in zip(logs, expected, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            if not any(word in name for word in ("time", "second", *ignored)):
                assert value == pytest.approx(other[name], rel=2e-2, abs=1e-4), name


@pytest.mark.parametrize(
    "method, settings, backward",
    [
        ((), {"beta": 0.04, "num_iterations": 2}, True),
        ((DenseGRPOTrainer, DenseGRPOConfig), {"tail_steps": 1}, False),
    ],
)
def test_training_goes_on_in_smaller_chunks(make_trainer, caplog, method, settings, backward):
    expected, enough = run(make_trainer, "enough", method=method, **settings)
    assert enough.failures == 0 and set(enough.sizes["training"]) == {6}
    trainer, memory = run(make_trainer, "little", {"training": 2, "backward": backward}, method, **settings)
    # Once: from the first step on, the size that worked is kept. 6 rows are tried, then 3, then 1.
    assert memory.failures == 2 and set(memory.sizes["training"]) == {1}
    assert_same(trainer, expected)
    (warning,) = [record.message for record in caplog.records if "ran out of memory" in record.message]
    assert "with 6 rows at a time, and goes on with 1" in warning and "transition_batch_size=1" in warning
    noted = json.loads((make_trainer.directory / "little" / "run.json").read_text())
    assert noted["batch_sizes"] == {"training": 1}
    assert "batch_sizes" not in json.loads((make_trainer.directory / "enough" / "run.json").read_text())


def test_sampling_decoding_old_statistics_and_evaluation_go_on_in_smaller_batches(make_trainer):
    method = (
        DiffusionNFTTrainer,
        DiffusionNFTConfig,
    )  # whose second rollout is another policy's: it has old statistics
    settings = {"old_policy_decay_rate": 0.5, "eval_dataset": prompts(5), "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"guidance_scale": 3.0, "steps_per_generation": 1}
    expected, _ = run(make_trainer, "enough", method=method, **settings)
    # Guidance doubles the denoiser's rows.
    trainer, memory = run(make_trainer, "little", {"sampling": 5, "decoding": 3}, method, **settings)
    assert memory.failures >= 3 and max(memory.sizes["sampling"]) <= 4 and max(memory.sizes["decoding"]) <= 3
    assert_same(trainer, expected)


def test_auto(make_trainer):
    expected, _ = run(make_trainer, "number")
    settings = {"rollout_batch_size": "auto", "transition_batch_size": "auto"}
    trainer, memory = run(make_trainer, "auto", **settings)
    sizes = {name: size.rows for name, size in trainer.batch_sizes.items()}
    assert all(rows >= 6 for rows in sizes.values()), sizes
    assert_same(trainer, expected)
    noted = json.loads((make_trainer.directory / "auto" / "run.json").read_text())
    assert noted["batch_sizes"] == sizes
    # What it measured may be wrong.
    trainer, memory = run(make_trainer, "wrong", {"sampling": 4, "training": 2, "decoding": 1}, **settings)
    assert memory.failures > 3
    assert_same(trainer, expected)
    # Where two rows do not fit, what their backward pass has added before it failed is gone.
    trainer, memory = run(make_trainer, "one", {"training": 1, "backward": True}, **settings)
    assert memory.failures == 1 and trainer.batch_sizes["training"].rows == 1
    assert_same(trainer, expected)


def test_a_checkpoint_keeps_the_sizes(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "steps_per_generation": 1}
    trainer, _ = run(make_trainer, "run", {"training": 2, "sampling": 3}, **settings)
    expected = [parameter.detach().clone() for parameter in trainer._trainable]
    for given, rows in ((8, 1), (4, 4)):
        trainer = make_trainer(
            output_dir=str(make_trainer.directory / "run"),
            per_device_train_batch_size=2,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            transition_batch_size=given,
            **settings,
        )
        trainer.train(resume_from_checkpoint=str(make_trainer.directory / "run" / "checkpoint-1"))
        assert trainer.batch_sizes["training"].rows == rows
        if given == 8:
            assert all(torch.equal(p, e) for p, e in zip(trainer._trainable, expected, strict=True))


# ---- In processes of their own ----

TRAIN = """
import json, os, resource, sys
import psutil
import torch
from peft import LoraConfig
from pipelines import brightness, prompts, tiny_sd3
from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.trainer.updates import average_gradients

folder, kind = sys.argv[1:]
rank = int(os.environ.get("RANK", 0))

def train(name, limit, **settings):
    pipeline = tiny_sd3()
    transformer = pipeline.transformer
    if settings.get("height"):
        torch.manual_seed(0)
        pipeline.transformer = type(transformer).from_config({**transformer.config, "pos_embed_max_size": 64})
    config = FlowGRPOConfig(
        output_dir=f"{folder}/{name}", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, num_eval_inference_steps=2,
        guidance_scale=1.0, max_sequence_length=2, beta=0.0, ema_decay=0, log_images=False, **settings,
    )
    trainer = FlowGRPOTrainer(
        pipeline, brightness, config, prompts(4), peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=None)
    )
    torch.manual_seed(0)
    for parameter in trainer._trainable:
        parameter.data = 0.1 * torch.randn(parameter.shape)
    before = [parameter.detach().clone() for parameter in trainer._trainable]
    limit(pipeline)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer._trainable])
    moved = (weights - torch.cat([parameter.flatten() for parameter in before])).abs().max().item()
    return weights, moved, {name: size.rows for name, size in trainer.batch_sizes.items()}

def little_address_space(pipeline):
    # Another 5 MiB; the 8 rows of a training forward take 10.
    limit = psutil.Process().memory_info().vms + 5 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def second_process_alone(pipeline):
    def check(module, args, kwargs):
        if rank == 1 and torch.is_grad_enabled() and len(kwargs["hidden_states"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    pipeline.transformer.register_forward_pre_hook(check, with_kwargs=True)

limit, settings = {
    "limit": (little_address_space, {"max_steps": 1, "num_generations": 8, "num_inference_steps": 2, "height": 64, "width": 64}),
    "processes": (second_process_alone, {"max_steps": 2, "num_generations": 4, "num_inference_steps": 3}),
}[kind]
expected, moved, _ = train("enough", lambda pipeline: None, **settings)
weights, _, rows = train("little", limit, **settings)
result = {"moved": moved, "error": (weights - expected).abs().max().item(), "rows": rows, "sum": weights.sum().item()}
if kind == "processes":
    both, second, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    second.grad = torch.tensor([3.0, 4.0]) if rank == 1 else None
    average_gradients([both, second, none])
    result["averages"] = [both.grad.tolist(), second.grad.tolist(), none.grad]
json.dump(result, open(f"{folder}/{rank}.json", "w"))
"""


def in_processes(folder, kind, number):
    script = folder / "train.py"
    script.write_text(TRAIN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        # What is freed goes back to the system, so that the limit is one of what is in use.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [*(launch if number > 1 else [sys.executable]), str(script), str(folder), kind]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)], outcome.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, of glibc's malloc")
def test_an_allocator_that_fails(tmp_path):
    (result,), errors = in_processes(tmp_path, "limit", 1)
    assert "Training ran out of memory with 8 rows at a time" in errors
    assert result["rows"]["training"] < 8
    assert result["moved"] > 1e-4 and 0 < result["error"] < 1e-3 * result["moved"]


@pytest.mark.slow
@pytest.mark.distributed
def test_one_of_two_processes_runs_out_of_memory(tmp_path):
    (first, second), errors = in_processes(tmp_path, "processes", 2)
    assert first["rows"]["training"] == 8 and second["rows"]["training"] == 2
    assert errors.count("ran out of memory") == 1
    assert first["sum"] == second["sum"] and first["moved"] > 1e-4
    assert first["error"] < 1e-3 * first["moved"]
    for result in (first, second):
        # A gradient that one process lacks is zero there; one that all lack stays none.
        assert result["averages"] == [[1.5, 3.0], [1.5, 2.0], None]
