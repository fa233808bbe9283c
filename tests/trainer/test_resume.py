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

"""Runs that stop and go on: bit by bit what an uninterrupted run would have done."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from pipelines import brightness, prompts, tiny_sd3
from safetensors.torch import load_file

from trl_flow import DenseGRPOConfig, DenseGRPOTrainer, FlowGRPOTrainer, G2RPOConfig, G2RPOTrainer
from trl_flow.trainer.transitions import place_transitions


UPDATES = 6


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "trainer_class, config_class, settings, stops",
    [
        pytest.param(FlowGRPOTrainer, None, {}, (1, 2, 3, 4, 5), id="one update per rollout"),
        pytest.param(
            FlowGRPOTrainer,
            None,
            {"steps_per_generation": 2, "num_iterations": 2},
            (1, 2, 3, 4, 5),
            id="four updates per rollout",
        ),
        pytest.param(
            FlowGRPOTrainer,
            None,
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
            (1, 2, 3, 4, 5),
            id="accumulation, two updates per rollout",
        ),
        pytest.param(
            DenseGRPOTrainer, DenseGRPOConfig, {"beta": 0.04, "same_initial_noise": True}, (3,), id="DenseGRPO"
        ),
        pytest.param(
            G2RPOTrainer,
            G2RPOConfig,
            {"update_per_step": True, "sde_steps": [0, 1, 2], "granularities": [1, 2]},
            (2, 4),
            id="one update per step",
        ),
    ],
)
def test_resume_is_bit_exact(make_trainer, trainer_class, config_class, settings, stops):
    """Stopped after so many of six updates. The data (5 prompts) are gone through more than once."""
    settings = {
        "train_dataset": prompts(5),
        "max_steps": UPDATES,
        "save_strategy": "steps",
        "save_steps": 1,
        "ema_decay": 0.9,
        **settings,
    }
    straight = make_trainer(trainer_class, config_class, **settings)
    straight.train()
    straight.save_model()
    run = make_trainer.directory / "run"
    assert len({adapter(run / f"checkpoint-{k}") for k in range(1, UPDATES + 1)}) == UPDATES
    numbers = [{k: v for k, v in entry.items() if "time" not in k} for entry in straight.state.log_history[:UPDATES]]
    for k in stops:
        resumed = make_trainer(
            trainer_class,
            config_class,
            **{**settings, "save_steps": UPDATES, "output_dir": str(make_trainer.directory / f"resumed-{k}")},
        )
        torch.manual_seed(1000 + k)  # a new process has another random state
        resumed.train(resume_from_checkpoint=str(run / f"checkpoint-{k}"))
        resumed.save_model()
        assert adapter(make_trainer.directory / f"resumed-{k}") == adapter(run), f"averaged weights, stopped after {k}"
        last = make_trainer.directory / f"resumed-{k}" / f"checkpoint-{UPDATES}"
        assert adapter(last) == adapter(run / f"checkpoint-{UPDATES}"), f"stopped after {k}"
        for entry, expected in zip(resumed.state.log_history[:UPDATES], numbers, strict=True):
            for name in ("reward", "ratio/min", "ratio/max", "nfe", "grad_norm", "epoch", "step"):
                assert entry.get(name) == expected.get(name), (k, name)


@pytest.mark.parametrize("offload", [False, True])
def test_a_rollout_is_loaded_to_where_it_was(make_trainer, offload):
    """On a GPU, for which `meta` stands here, the trainer looks transitions up by indices that it reads on the CPU."""
    trainer = make_trainer(max_steps=1, steps_per_generation=2, offload_trajectories=offload)
    trainer.train()
    first, second = trainer._buffered_inputs
    assert first["old"] is None and second["old"] is not None
    for micro_batch in (first, second):
        placed = place_transitions(micro_batch, torch.device("meta"), offload)
        assert placed.keys() == micro_batch.keys()
        on_device = {name for name, value in placed.items() if isinstance(value, torch.Tensor) and value.is_meta}
        assert on_device == {"advantages", "trained"} | ({"nodes"} if not offload else set())
        assert placed["old"] is None or all(value.is_meta != offload for value in placed["old"].values())


def test_a_checkpoint_holds_nothing_of_a_former_one_by_more_processes(make_trainer):
    folder = make_trainer.directory / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    for rank in (0, 1, 10):
        (folder / f"rollout_state_{rank}.pt").write_bytes(b"of more processes")
    make_trainer(output_dir=str(folder.parent), max_steps=1, save_strategy="steps", save_steps=1).train()
    assert [file.name for file in folder.glob("rollout_state_*")] == ["rollout_state_0.pt"]


def test_resume_from_the_last_checkpoint(make_trainer):
    straight = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    straight.train()
    straight.save_model()
    run = make_trainer.directory / "run"
    expected = adapter(run)
    shutil.rmtree(run / "checkpoint-3")
    (run / "adapter_model.safetensors").unlink()
    resumed = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert adapter(run) == expected


def test_a_killed_run_goes_on(make_trainer):
    """A reward that stops the process in the middle of an update: what was saved before is enough."""

    def until(limit):
        calls = []

        def limited(images, **kwargs):
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return brightness(images)

        limited.__name__ = "limited"
        return limited

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(reward_funcs=until(99), **settings, output_dir=str(make_trainer.directory / "straight"))
    straight.train()
    killed = make_trainer(reward_funcs=until(4), **settings)  # the check, and three rollouts
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert killed.state.global_step == 3
    resumed = make_trainer(reward_funcs=until(99), **settings)
    resumed.train(resume_from_checkpoint=True)
    path = "checkpoint-4"
    assert adapter(make_trainer.directory / "run" / path) == adapter(make_trainer.directory / "straight" / path)


def test_checkpoints_of_another_method_are_refused(make_trainer):
    make_trainer(save_strategy="steps", save_steps=1).train()
    checkpoint = str(make_trainer.directory / "run" / "checkpoint-1")
    other = make_trainer(DenseGRPOTrainer, DenseGRPOConfig, output_dir=str(make_trainer.directory / "other"))
    with pytest.raises(ValueError, match="is a checkpoint of Flow-GRPO, but this trainer is DenseGRPO"):
        other.train(resume_from_checkpoint=checkpoint)
    assert not (make_trainer.directory / "other" / "run.json").exists()


def test_checkpoints_with_the_optimizer_in_other_parts_are_refused(make_trainer, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=1).train()
    other = make_trainer(max_steps=2)
    monkeypatch.setattr(type(other), "optimizer_parts", "DeepSpeed ZeRO-2 with num_processes=4")
    with pytest.raises(
        ValueError, match="of a run with neither FSDP nor DeepSpeed, which this one, with DeepSpeed ZeRO-2"
    ):
        other.train(resume_from_checkpoint=True)


def test_checkpoints_of_another_adapter_are_refused(make_trainer):
    make_trainer(save_strategy="steps", save_steps=1).train()
    other = make_trainer(peft_config=LoraConfig(r=2, target_modules=["attn.to_q"]), max_steps=2)
    with pytest.raises(ValueError, match="is of another adapter"):
        other.train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint_is_refused(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a checkpoint of this library"):
        trainer.train(resume_from_checkpoint=str(make_trainer.directory))


def test_an_output_directory_that_holds_another_run_is_refused(make_trainer):
    make_trainer().train()
    before = sorted(path.name for path in (make_trainer.directory / "run").iterdir())
    with pytest.raises(ValueError, match=r"holds another run \(Flow-GRPO\). Choose another directory"):
        make_trainer().train()
    with pytest.raises(ValueError, match="holds another run"):
        make_trainer(G2RPOTrainer, G2RPOConfig).train()
    assert sorted(path.name for path in (make_trainer.directory / "run").iterdir()) == before


def test_a_mistake_that_is_found_before_any_work_does_not_occupy_the_directory(make_trainer):
    with pytest.raises(ValueError, match="returned 1 scores for 2 pictures"):
        make_trainer(reward_funcs=lambda images, **kwargs: [0.5]).train()
    make_trainer().train()


# ---- What is saved ----


@pytest.mark.parametrize("trained_ema", [0, 0.9])
def test_both_formats_give_the_trained_pictures(make_trainer, monkeypatch, trained_ema):
    # Offline, diffusers wants the file's name even for a directory.
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    trainer = make_trainer(max_steps=3, learning_rate=0.1, ema_decay=trained_ema)
    config = trainer.policy.denoisers["transformer"].peft_config["default"]
    assert config.lora_alpha != config.r
    trainer.train()
    trainer.save_model()
    run = str(make_trainer.directory / "run")

    def picture(pipeline):
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(9))
        return pipeline(
            ["a red circle", "two square"],
            latents=latents,
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=2,
            output_type="pt",
        ).images

    with trainer.averaged_weights():
        expected = picture(trainer.policy.pipeline)

    def fresh():
        pipeline = tiny_sd3()
        # Whether weights are frozen decides which attention kernel torch takes in the VAE: a matter of the last bit.
        pipeline.vae.requires_grad_(False)
        return pipeline

    assert not torch.equal(expected, picture(fresh()))
    by_diffusers = fresh()
    by_diffusers.load_lora_weights(run)
    assert torch.equal(picture(by_diffusers), expected)

    by_peft = fresh()
    by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, run).get_base_model()
    assert torch.equal(picture(by_peft), expected)


def test_the_card_is_ours(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    card = (make_trainer.directory / "run" / "README.md").read_text()
    assert "Flow-GRPO" in card and "2505.05470" in card and "load_lora_weights" in card


def test_a_run_that_is_done_is_not_gone_on_with(make_trainer):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match="has done 2 updates: with max_steps=2 there is nothing left to do"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"per_device_train_batch_size": 2}, "2 groups per update and 4 per rollout"),
        ({"steps_per_generation": 4}, "1 groups per update and 4 per rollout"),
        ({"num_iterations": 2}, "1 groups per update and 2 per rollout, trained 2 times"),
    ],
)
def test_checkpoints_of_other_updates_are_refused(make_trainer, settings, what):
    begun = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "steps_per_generation": 2}
    make_trainer(**begun).train()
    with pytest.raises(ValueError, match=f"1 groups per update and 2 per rollout, trained once; this one has {what}"):
        make_trainer(**{**begun, "max_steps": 4, **settings}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_several_processes_that_lacks_one_is_refused(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(**settings, per_device_train_batch_size=2).train()
    file = make_trainer.directory / "run" / "checkpoint-1" / "rollout_state_0.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"layout": (2, 1, 1, 1, 1, 1)}, file)
    with pytest.raises(ValueError, match=r"made by 2 processes, and rollout_state_1\.pt is not there"):
        make_trainer(**settings, per_device_train_batch_size=2).train(resume_from_checkpoint=str(file.parent))


def test_micro_steps_may_be_other_ones(make_trainer):
    """One update of four groups at once, or of four micro-steps, in the middle of a rollout."""
    settings = {"train_dataset": prompts(9), "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"ema_decay": 0.9, "num_iterations": 2}
    straight = make_trainer(**settings, per_device_train_batch_size=4)
    straight.train()
    straight.save_model()
    resumed = make_trainer(
        **{**settings, "save_steps": 100},
        gradient_accumulation_steps=4,
        output_dir=str(make_trainer.directory / "resumed"),
    )
    resumed.train(resume_from_checkpoint=str(make_trainer.directory / "run" / "checkpoint-1"))
    resumed.save_model()
    found, expected = (
        load_file(make_trainer.directory / name / "adapter_model.safetensors") for name in ("resumed", "run")
    )
    moved = load_file(make_trainer.directory / "run" / "checkpoint-1" / "adapter_model.safetensors")
    assert any((expected[key] - moved[key]).abs().max() > 1e-3 for key in expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_a_checkpoint_that_is_not_whole_is_passed_over(make_trainer, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(**settings)
    straight.train()
    run = make_trainer.directory / "run"
    expected = adapter(run / "checkpoint-4")
    for name in ("checkpoint-4", "checkpoint-3"):
        (run / name / "rollout_state_0.pt").unlink()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is not whole" in caplog.text and adapter(run / "checkpoint-4") == expected


def test_older_checkpoints_are_removed_when_the_new_one_is_whole(make_trainer, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    run = make_trainer.directory / "run"
    method_state = trainer.method_state
    monkeypatch.setattr(
        trainer, "method_state", lambda: killed() if trainer.state.global_step == 2 else method_state()
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (run / "checkpoint-1" / "rollout_state_0.pt").is_file()
