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

"""Which pipelines can be trained: the doctor's checks on a tiny pipeline of every flow-matching class of diffusers.

    python benchmarks/models.py            # writes docs/models.md, about two minutes
    python benchmarks/models.py --check    # compares with it: what does not train any more, and what does now
    python benchmarks/models.py --only FluxPipeline WanPipeline/2.2

The pipelines are those of the tests (tests/tiny): the real classes with random weights.
"""

import argparse
import inspect
import logging
import re
import sys
import warnings
from pathlib import Path

import diffusers
import torch
import transformers


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import NOT_BUILT, TINY_PIPELINES, call_arguments, tiny_pipeline  # noqa: E402

from trl_flow.policy import FAMILIES, find_family  # noqa: E402
from trl_flow.policy.doctor import Diagnosis, examine  # noqa: E402


OUTPUT = ROOT / "docs" / "models.md"
# Arguments of the call that have a setting of their own.
SETTINGS = ("height", "width", "num_frames", "max_sequence_length", "negative_prompt")
# A source that names one of these samples a flow: its scheduler, or the setting that makes one of UniPC.
FLOW_SOURCE = re.compile(r"FlowMatch\w*Scheduler|FlowMap\w*Scheduler|use_flow_sigmas|scheduler: UniPC")
TRAINS, REFUSED, UNTRIED = "What trains", "What does not train", "What was not tried"
# Where the tests call a pipeline in a way that would hide what it can: it has no height and width, its picture says the
# size, and ours is square.
OVERRIDES = {"HunyuanVideo15ImageToVideoPipeline": {"image": None}}
REMARKS = {"HunyuanVideo15ImageToVideoPipeline": "square pictures"}
# What the doctor says, in the few words that a table has room for; the legend below it says more.
SHORT = {
    "one prompt at a time": "one row at a time",
    "runs within every velocity evaluation": "encodes in every evaluation",
    "take no part in an evaluation": "unused layers",
    "zero gradient": "discarded layers",
    "rounding of float32": "rounding",
}

INTRODUCTION = """\
# Which pipelines train

Everything here was found by trying: the checks of `trl-flow doctor`, on a tiny pipeline of each class in diffusers whose
source names a flow-matching scheduler (what is missing is listed at the end), and on Stable Diffusion 1.5 and XL for the
diffusion models. A tiny pipeline is the real class with the real architecture, a few layers deep and with random weights. So
the table says whether the *code* of a pipeline can be trained without a change. It says nothing of how well a checkpoint
learns. Whether one fits on your GPU is what `trl-flow doctor MODEL` says, with the settings of your run.

A name after a slash is a variant of the same class: another checkpoint's settings, or another way to call it.

Made with diffusers {diffusers} and torch {torch}, on the CPU in float32, by

```bash
python benchmarks/models.py           # writes this file
python benchmarks/models.py --check   # compares with it; the nightly job runs it against the newest diffusers
```

"""

LEGEND = """\
- **family**: the record whose defaults (layers, rank, guidance, size) are used, from the papers where there are some.
  *inferred* is a class without a record, whose denoiser, guidance and attention layers are found by inspection. Before
  training, an inferred pipeline has to pass the same checks.
- **takes**: a prompt, or a prompt and a picture (the dataset's column `image`); *(+ picture)* where it may have one.
- **replay error**: largest difference between the velocity in training and the model output of the stock pipeline's own
  run, at the same latents and with guidance. 0 means not one bit.
- **picture error**: largest difference between the picture of a rollout without noise and the stock pipeline's, in [0, 1].
- **gradients**: share of the adapter's tensors that a gradient other than zero reaches.

Notes in the table:

- *rounding*: a diffusion model's output is converted into a velocity, once in training and once, in another order, for the
  comparison. float32 rounds at about 1e-5 of such velocities; no other difference is left.
- *discarded layers*: some layers have a gradient of zero, because the model throws away what they compute (the text side
  of its last block). No fault.
- *unused layers*: some layers take no part in an evaluation, and are not trained. No fault.
- *one row at a time*: the pipeline takes one prompt at a time, so rows are evaluated one after the other. Correct, slower.
- *encodes in every evaluation*: an encoder runs within each velocity evaluation instead of once per prompt. Correct, slower.
- *square pictures*: the picture says the size of the video, and all rows have one size.
- *same ...*: an input that is one and the same for all prompts (`generation_kwargs`), as the dataset has no column for it.
"""


HALF_PRECISION = """\
## In half precision

The same checks of the classes with a record, with weights in half precision and the adapter in float32: replay error, the
probability ratio of the first update less 1, and rows in a batch of two prompts against each alone. The doctor's bounds,
relative to the velocity's standard deviation (0.5 to 1.5 here), are 10 % (rows: 25 %) in bfloat16 and 2 % (rows: 5 %) in float16.
HunyuanVideo's replay error is the stock pipeline's own rounding: from its second step on it holds the timestep in half
precision, where the policy keeps it in float32.
"""


def settings_of(pipeline, arguments: dict) -> dict:
    """Arguments of a pipeline's call as settings of [`examine`]."""
    arguments = dict(arguments)
    settings = {name: arguments.pop(name, None) for name in SETTINGS}
    image = arguments.pop("image", None)
    settings["image"] = image[0] if isinstance(image, list) else image
    try:
        settings["guidance_scale"] = arguments.pop(find_family(pipeline).guidance, None)
    except ValueError:  # of no family: the doctor says why
        pass
    arguments.pop("num_inference_steps", None)
    return {**settings, "generation_kwargs": arguments}


def examine_tiny(name: str, dtype: torch.dtype = torch.float32) -> Diagnosis:
    """What the doctor finds for one tiny pipeline. Inputs that are the same for all prompts become notes."""
    try:
        pipeline = tiny_pipeline(name)
        for component in pipeline.components.values():
            if dtype != torch.float32 and isinstance(component, torch.nn.Module):
                component.to(dtype)
        settings = settings_of(pipeline, call_arguments(name)) | OVERRIDES.get(name, {})
    except Exception as error:  # a class that was renamed, a component that wants another argument
        reason = f"it cannot be built as the tests build it: {type(error).__name__}: {error}"
        return Diagnosis(name.split("/")[0], problem=reason)
    diagnosis = examine(pipeline, **settings)
    fixed = [key for key, value in settings["generation_kwargs"].items() if not is_plain(value)]
    diagnosis.notes += [f"same `{key}`" for key in fixed]
    if name in REMARKS:
        diagnosis.notes.append(REMARKS[name])
    return diagnosis


def is_plain(value) -> bool:
    """Whether a value is a setting (numbers, names) and not a picture, a video or sound."""
    return value is None or isinstance(value, (bool, int, float, str))


def untried_pipelines() -> dict[str, str]:
    """Classes of diffusers whose source names a flow-matching scheduler and that have no tiny pipeline; their file."""
    tried = {name.split("/")[0] for name in TINY_PIPELINES} | NOT_BUILT.keys()
    folder = Path(inspect.getfile(diffusers)).parent / "pipelines"
    public = set(dir(diffusers))  # names alone: to ask for each would import them all
    found = {}
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text()
        if not FLOW_SOURCE.search(source):
            continue
        names = re.findall(r"^class (\w+Pipeline)\(", source, flags=re.MULTILINE)
        found |= {name: file.relative_to(folder).as_posix() for name in names if name in public}
    return {name: file for name, file in found.items() if name not in tried}


def half_precision_rows() -> list[tuple[str, ...]]:
    """Errors of each class with a record, in bfloat16 and float16 with a float32 adapter."""
    rows = []
    for name in (name for family in FAMILIES for name in family.pipelines):
        row = [f"`{name}`"]
        for dtype in (torch.bfloat16, torch.float16):
            found = examine_tiny(name, dtype)
            errors = (found.replay_error, found.ratio_error, found.row_error)
            row += (
                [reason_of(found)] * 3 if not found.trains else [f"{error:.0e}" if error else "0" for error in errors]
            )
        rows.append(tuple(row))
    return rows


def render(diagnoses: dict[str, Diagnosis], untried: dict[str, str], half: list[tuple[str, ...]] = ()) -> str:
    """The page: what trains, what does not, what was not tried."""
    good = {name: diagnosis for name, diagnosis in diagnoses.items() if diagnosis.trains}
    bad = {name: diagnosis for name, diagnosis in diagnoses.items() if not diagnosis.trains}
    lines = [INTRODUCTION.format(diffusers=diffusers.__version__, torch=torch.__version__.split("+")[0])]
    lines += [f"## {TRAINS}", "", f"{len(good)} of the {len(diagnoses)} that were tried.", ""]
    columns = ("pipeline", "family", "takes", "makes", "replay error", "picture error", "gradients", "notes")
    lines += table(columns, [trained_row(name, diagnosis) for name, diagnosis in good.items()])
    lines += ["", LEGEND]
    if half:
        columns = [f"{dtype}: {what}" for dtype in ("bfloat16", "float16") for what in ("replay", "ratio - 1", "rows")]
        lines += [HALF_PRECISION, *table(("pipeline", *columns), half), ""]
    lines += [f"## {REFUSED}", "", "`trl-flow doctor` and the trainers refuse these.", ""]
    reasons = {}
    for name, diagnosis in bad.items():
        reasons.setdefault(reason_of(diagnosis), []).append(f"`{name}`")
    rows = [(", ".join(names), reason) for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))]
    lines += table(("pipelines", "why"), rows)
    lines += ["", f"## {UNTRIED}", ""]
    lines += ["Of these there is no tiny pipeline, for a reason:", ""]
    lines += table(("pipeline", "why"), [(f"`{name}`", reason) for name, reason in NOT_BUILT.items()])
    if untried:
        lines += [
            "",
            "And of these there is none yet, so nothing is known but that their sources name a flow scheduler:",
        ]
        lines += [
            "",
            *table(("pipeline", "file in diffusers/pipelines"), [(f"`{n}`", f"`{f}`") for n, f in untried.items()]),
        ]
    lines += ["", "For any of them, `trl-flow doctor MODEL` tries a real checkpoint.", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def trained_row(name: str, diagnosis: Diagnosis) -> tuple[str, ...]:
    notes = diagnosis.warnings + diagnosis.notes
    short = [next((words for key, words in SHORT.items() if key in note), note) for note in notes]
    takes = {None: "prompt", "required": "prompt and picture", "optional": "prompt (+ picture)"}[diagnosis.image]
    family = "*inferred*" if diagnosis.family == "inferred" else diagnosis.family
    errors = [f"{value:.0e}" if value else "0" for value in (diagnosis.replay_error, diagnosis.picture_error)]
    return f"`{name}`", family, takes, diagnosis.media, *errors, f"{diagnosis.gradient_coverage:.0%}", ", ".join(short)


def reason_of(diagnosis: Diagnosis) -> str:
    """Why it does not train, without its name, so that equal reasons are seen to be equal."""
    reason = diagnosis.problem.replace(diagnosis.pipeline, "it").removesuffix(".")
    return " ".join(reason.split())


def read_verdicts(page: str) -> dict[str, bool]:
    """Whether each pipeline trains, as a page says."""
    verdicts = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, content = section.partition("\n")
        if title in (TRAINS, REFUSED):
            for first in re.findall(r"^\| (`.*?) \|", content, flags=re.MULTILINE):
                verdicts |= dict.fromkeys(re.findall(r"`([^`]+)`", first), title == TRAINS)
    return verdicts


def changes(committed: dict[str, bool], diagnoses: dict[str, Diagnosis]) -> list[str]:
    """What differs from the verdicts of the page, one line each."""
    lines = []
    for name, diagnosis in diagnoses.items():
        if name not in committed:
            lines.append(f"not on the page: {name}, which {'trains' if diagnosis.trains else 'does not train'}")
        elif committed[name] and not diagnosis.trains:
            lines.append(f"newly failing: {name}: {reason_of(diagnosis)}")
        elif not committed[name] and diagnosis.trains:
            lines.append(f"newly trainable: {name}")
    return lines + [f"on the page, but no longer tried: {name}" for name in committed if name not in diagnoses]


def quieten():
    """Threads and messages that a hundred tiny models do not need."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these, and write nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the page (default: docs/models.md)")
    args = parser.parse_args(argv)

    diagnoses = {}
    for name in args.only or TINY_PIPELINES:
        diagnoses[name] = diagnosis = examine_tiny(name)
        verdict = "trains" if diagnosis.trains else f"does not train: {reason_of(diagnosis)}"
        print(f"{name}: {verdict}", file=sys.stderr, flush=True)
    untried = untried_pipelines()
    if args.check:
        page = args.output.read_text()
        committed = read_verdicts(page)
        if args.only:
            committed = {name: trains for name, trains in committed.items() if name in args.only}
        changed = changes(committed, diagnoses)
        unknown = [name for name in untried if f"`{name}`" not in page]
        print(f"diffusers {diffusers.__version__}: {len(diagnoses)} tried, {len(changed)} changed")
        for line in changed + [f"new in diffusers, and not tried: {name} ({untried[name]})" for name in unknown]:
            print(line)
        return 1 if changed else 0
    if not args.only:
        args.output.write_text(render(diagnoses, untried, half_precision_rows()))
        print(f"Wrote {args.output}: {sum(d.trains for d in diagnoses.values())} of {len(diagnoses)} train.")
    return 0


if __name__ == "__main__":
    quieten()
    sys.exit(main())
