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

"""`trl-flow doctor` and `benchmarks/models.py`: arguments, table, exit codes, JSON, and the comparison with the page."""

import importlib.util
import io
import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import TINY_PIPELINES, tiny_pipeline

import trl_flow.policy
from trl_flow import cli
from trl_flow.policy import doctor as doctor_module
from trl_flow.policy.doctor import Diagnosis
from trl_flow.scripts.doctor import DoctorArguments, make_parser, print_diagnosis


ROOT = Path(__file__).parents[1]
GOOD = Diagnosis(
    "FluxPipeline",
    family="FLUX.1",
    warnings=["the pipeline takes one prompt at a time, so rows are evaluated one by one"],
    notes=["2 of 32 trained tensors have a zero gradient, such as transformer.x"],
    media="pictures",
    image="optional",
    replay_error=0.0,
    picture_error=2.5e-7,
    ratio_error=0.0,
    row_error=1e-6,
    gradient_coverage=0.9375,
    encoder_calls=0,
    trained_parameters=1234567,
    total_parameters=12000000000,
    memory={
        "rollout": {"denoiser": 22.4, "encoders": 9.1, "activations": 2.0},
        "train": {"denoiser": 22.4, "encoders": 9.1, "optimizer": 0.25, "activations": 40.0},
    },
)
BAD = Diagnosis("MochiPipeline", problem="the steps of MochiPipeline | lead nowhere.\nNot at all.")


def parse(*args):
    return make_parser(prog="trl-flow doctor").parse_args_and_config(list(args))[0]


def printed(diagnosis, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_diagnosis(diagnosis, console)
    return console.file.getvalue()


# ---- The command ----


def test_pipeline_that_trains(capsys, tmp_path):
    file = tmp_path / "found" / "shapes.json"
    assert cli.main(["doctor", "shapes", "--lora_r", "4", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    transformer = trl_flow.policy.load_pipeline("shapes").transformer
    targets = tuple(f".{name}" for name in trl_flow.policy.find_record("shapes").lora_target_modules)
    layers = [layer for name, layer in transformer.named_modules() if name.endswith(targets)]
    trained = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert "Stable Diffusion 3" in output and f"{trained:,}" in output
    assert output.splitlines()[-1].startswith("Trains: ")

    found = json.loads(file.read_text())
    assert found["trains"] is True and found["problem"] is None
    assert found["replay_error"] == found["picture_error"] == 0
    assert found["trained_parameters"] == trained
    assert found["settings"]["lora_r"] == 4 and found["settings"]["model_name_or_path"] == "shapes"
    assert found["versions"] == {"diffusers": diffusers.__version__, "torch": torch.__version__}


def test_pipeline_that_does_not(capsys, tmp_path, monkeypatch):
    pipeline = tiny_pipeline("StableDiffusion3Img2ImgPipeline")
    monkeypatch.setattr(trl_flow.policy, "load_pipeline", lambda *args, **kwargs: pipeline)
    file = tmp_path / "found.json"
    assert cli.main(["doctor", "some/model", "--device", "cpu", "--json", str(file)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("Does not train: StableDiffusion3Img2ImgPipeline begins with a")
    assert not captured.err
    found = json.loads(file.read_text())
    assert found["trains"] is False and "`strength`" in found["problem"]


def test_pipeline_that_is_not_there(capsys):
    assert cli.main(["doctor", "/no/such/place"]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("trl-flow doctor: error: ") and "/no/such/place" in captured.err


def test_settings_reach_the_policy(monkeypatch, tmp_path):
    given = {}

    def examine(pipeline, **settings):
        given.update(settings, pipeline=pipeline)
        return GOOD

    monkeypatch.setattr(doctor_module, "examine", examine)
    Image.new("RGBA", (5, 3)).save(tmp_path / "start.png")
    settings = [
        "--height",
        "16",
        "--guidance_scale",
        "2.5",
        "--generation_kwargs",
        '{"skip_layer_guidance_scale": 1.0}',
    ]
    adapter = ["--lora_alpha", "7", "--lora_target_modules", "to_q", "to_k", "--use_dora"]
    assert cli.main(["doctor", "shapes", *settings, *adapter, "--image", str(tmp_path / "start.png")]) == 0
    assert (given["height"], given["guidance_scale"]) == (16, 2.5)
    assert given["generation_kwargs"] == {"skip_layer_guidance_scale": 1.0}
    assert "width" not in given and "negative_prompt" not in given
    assert (given["image"].size, given["image"].mode) == ((5, 3), "RGB")
    # The embedded pipeline was made with one text token.
    assert given["max_sequence_length"] == 1
    config = given["peft_config"]
    assert (config.r, config.lora_alpha, config.use_dora) == (32, 7, True)
    assert set(config.target_modules) == {"to_q", "to_k"}
    assert (given["num_inference_steps"], given["memory"].transition_batch_size, given["full_finetuning"]) == (
        4,
        8,
        False,
    )

    assert cli.main(["doctor", "--model", "shapes", "--max_sequence_length", "3", "--dtype", "bfloat16"]) == 0
    assert given["max_sequence_length"] == 3 and given["peft_config"] is None
    assert given["pipeline"].transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("args", [("a/b",), ("--model", "a/b"), ("--model_name_or_path", "a/b")])
def test_the_model_may_stand_first(args):
    assert parse(*args, "--height", "8") == DoctorArguments(model_name_or_path="a/b", height=8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_name_or_path": None}, "name a pipeline"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected at least 1"),
        ({"transition_batch_size": 0}, "transition_batch_size=0: expected at least 1"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0: expected at least 1"),
        ({"gpu_memory": 0.0}, "gpu_memory=0.0: expected a number of GiB above 0"),
        ({"beta": -1.0}, "beta=-1.0: expected at least 0"),
        ({"lora_r": 0}, "lora_r=0: expected at least 1"),
        ({"generation_kwargs": "{x}"}, "generation_kwargs='{x}' is no JSON"),
        ({"generation_kwargs": "[1]"}, "expected names and values in braces"),
        ({"full_finetuning": True, "lora_alpha": 4}, "lora_alpha shapes an adapter, and full_finetuning=True"),
        ({"image": "/no/picture.png"}, "image=/no/picture.png: no such file"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as caught:
        DoctorArguments(**({"model_name_or_path": "shapes"} | settings))
    assert message in str(caught.value)


def test_no_model_is_one_line(capsys):
    assert cli.main(["doctor"]) == 1
    assert "trl-flow doctor: error: name a pipeline" in capsys.readouterr().err


def test_table_of_a_pipeline_that_trains():
    lines = printed(GOOD).splitlines()
    rows = {cells[0]: cells[1] for cells in ([c.strip() for c in line.split("│")[1:-1]] for line in lines) if cells}
    assert rows == {
        "Family record": "FLUX.1",
        "Makes": "pictures",
        "Replay error": "0",
        "Picture error": "2.5e-07",
        "Ratio - 1": "0",
        "Row error": "1.0e-06",
        "Gradient coverage": "94%",
        "Encoder runs": "0",
        "Trained parameters": "1,234,567",
        "Memory: rollout": "33.5 GiB",
        "Memory: train": "71.8 GiB",
        "Memory: peak": "71.8 GiB",
    }
    warning, note, verdict = lines[-3:]
    assert warning == f"Warning: {GOOD.warnings[0]}."
    assert note == f"Note: {GOOD.notes[0]}."
    assert verdict.startswith("Trains: what the policy computes is what FluxPipeline computes")


def test_table_of_a_pipeline_that_does_not():
    """Only what was found, and a reason that stays in one line however long it is."""
    problem = "it [bold] " + "and so on " * 50 + "end"
    output = printed(Diagnosis("A", family="inferred", replay_error=0.5, problem=problem), 80)
    assert output.splitlines()[-1] == f"Does not train: {problem}."
    shown = [name for name in ("Family record", "Makes", "Replay error", "Row error", "Memory") if name in output]
    assert shown == ["Family record", "Replay error"]
    assert printed(Diagnosis("A", problem="No. ")) == "Does not train: No.\n"


# ---- The page ----


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("benchmarks_models", ROOT / "benchmarks" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_gives_its_verdicts_back(models):
    diagnoses = {"FluxPipeline": GOOD, "FluxPipeline/other": GOOD, "MochiPipeline": BAD, "MochiPipeline/b": BAD}
    page = models.render(diagnoses, {"NewPipeline": "new/pipeline_new.py"})
    assert models.read_verdicts(page) == {name: diagnosis.trains for name, diagnosis in diagnoses.items()}
    assert "2 of the 4 that were tried" in page
    row = "| `FluxPipeline` | FLUX.1 | prompt (+ picture) | pictures | 0 | 2e-07 | 94% | one row at a time, discarded layers |"
    assert row in page.splitlines()
    assert r"| `MochiPipeline`, `MochiPipeline/b` | the steps of it \| lead nowhere. Not at all |" in page.splitlines()
    assert "| `NewPipeline` | `new/pipeline_new.py` |" in page.splitlines()


def test_changes(models):
    committed = {"FluxPipeline": True, "MochiPipeline": False, "GonePipeline": True}
    assert models.changes(committed, {"FluxPipeline": GOOD, "MochiPipeline": BAD, "GonePipeline": GOOD}) == []
    assert models.changes(committed, {"FluxPipeline": BAD, "MochiPipeline": GOOD, "NewPipeline": GOOD}) == [
        "newly failing: FluxPipeline: the steps of it | lead nowhere. Not at all",
        "newly trainable: MochiPipeline",
        "not on the page: NewPipeline, which trains",
        "on the page, but no longer tried: GonePipeline",
    ]


def test_check_names_what_changed(models, monkeypatch, tmp_path, capsys):
    found = {"FluxPipeline": GOOD, "MochiPipeline": BAD}
    page = tmp_path / "models.md"
    monkeypatch.setattr(models, "TINY_PIPELINES", tuple(found))
    monkeypatch.setattr(models, "examine_tiny", lambda name, dtype=None: found.get(name, GOOD))
    monkeypatch.setattr(models, "untried_pipelines", lambda: {})
    assert models.main(["--output", str(page)]) == 0
    written = page.read_text()
    assert models.main(["--check", "--output", str(page)]) == 0
    assert "2 tried, 0 changed" in capsys.readouterr().out

    # A class that nobody has tried yet is said, and is no failure.
    monkeypatch.setattr(models, "untried_pipelines", lambda: {"NewPipeline": "new/new.py"})
    assert models.main(["--check", "--output", str(page)]) == 0
    assert "new in diffusers, and not tried: NewPipeline (new/new.py)" in capsys.readouterr().out

    found["MochiPipeline"] = GOOD
    assert models.main(["--check", "--output", str(page)]) == 1
    assert "newly trainable: MochiPipeline" in capsys.readouterr().out
    assert models.main(["--check", "--only", "FluxPipeline", "--output", str(page)]) == 0
    assert page.read_text() == written


def test_class_that_is_gone_is_newly_failing(models, monkeypatch):
    def gone(name):
        raise AttributeError("module diffusers has no attribute FluxPipeline")

    monkeypatch.setattr(models, "tiny_pipeline", gone)
    diagnosis = models.examine_tiny("FluxPipeline/schnell")
    [line] = models.changes({"FluxPipeline/schnell": True}, {"FluxPipeline/schnell": diagnosis})
    assert line.startswith(
        "newly failing: FluxPipeline/schnell: it cannot be built as the tests build it: AttributeError"
    )


def test_inputs_that_all_prompts_share_are_noted(models):
    assert "same `video`" in models.examine_tiny("LucyEditPipeline").notes
    assert not models.examine_tiny("FluxPipeline/schnell").notes


@pytest.mark.parametrize("name", ["FluxPipeline", "AuraFlowPipeline", "FluxImg2ImgPipeline", "LTX2Pipeline"])
def test_page_says_what_is_found(models, name):
    committed = models.read_verdicts((ROOT / "docs" / "models.md").read_text())
    assert models.changes({name: committed[name]}, {name: models.examine_tiny(name)}) == []


def test_page_is_complete(models):
    page = (ROOT / "docs" / "models.md").read_text()
    assert models.read_verdicts(page).keys() == set(TINY_PIPELINES)
    missing = [name for name in [*models.NOT_BUILT, *models.untried_pipelines()] if f"| `{name}` |" not in page]
    assert not missing


def test_untried_pipelines(models, monkeypatch):
    tried = {name.split("/")[0] for name in TINY_PIPELINES}
    assert not models.untried_pipelines().keys() & (tried | models.NOT_BUILT.keys())
    monkeypatch.setattr(models, "TINY_PIPELINES", ())
    everything = models.untried_pipelines()
    assert everything["WanPipeline"] == "wan/pipeline_wan.py"
    assert {"FluxPipeline", "StableDiffusion3Pipeline", "StableAudio3Pipeline"} <= everything.keys()
    assert not everything.keys() & {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "AllegroPipeline"}
