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

"""The model card of a trained adapter: what it is, how to use it, what it scores, how it was made."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import re
import textwrap
from ast import literal_eval
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from transformers import TrainingArguments
from transformers.utils import logging

from ..report.history import Samples, load_samples, paired_change, public_settings, without_paths
from ..report.text import format_change, format_duration, format_number
from .adapter import DIFFUSERS_WEIGHTS_NAME, HUB_ID


logger = logging.get_logger(__name__)

PACKAGES = ("trl-flow", "trl", "diffusers", "transformers", "peft", "accelerate", "datasets", "torch")
CARD_FILE = "card.json"
GALLERY_SIZE = 4
GALLERY_PIXELS = 256


def create_model_card(
    output_dir: str | Path,
    *,
    base_model: str,
    pipeline_class_name: str,
    method_name: str,
    paper: Mapping[str, str] | None = None,
    datasets: str | Sequence[str] | None = None,
    reward_names: Sequence[str] = (),
    eval_reward_names: Sequence[str] = (),
    reward_sources: Mapping[str, Mapping[str, str]] | None = None,
    metrics: Mapping[str, Mapping] | None = None,
    config: Mapping | None = None,
    call_arguments: Mapping | None = None,
    tags: Sequence[str] = (),
    model_name: str | None = None,
    hub_model_id: str | None = None,
    hub_revision: str | None = None,
    component: str = "transformer",
    prompts: Sequence[str] = (),
    load_expression: str | None = None,
    license: str | None = None,
    pipeline_tag: str = "text-to-image",
    scheduler: str | None = None,
    second_component: str | None = None,
    complete_class: str | None = None,
    guider_scale: float | None = None,
    dtype: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    nfe: int | None = None,
    hardware: str | None = None,
    diffusers_format: bool | None = None,
    command: str | None = None,
    command_line: str | None = None,
) -> Path:
    """
    Write `README.md`, the model card of the adapter in `output_dir`, and `card.json`, what it was made from.

    Pictures are taken from the directory when they are there: `curves.png` and `before_after.png`, as
    [`~trl_flow.report.write_report`] leaves them, and the newest pictures under `samples/`, which become the gallery
    (enlarged copies in `images/`).

    Both files are for everybody to read: tokens are left out, and of absolute paths all but the name.
    [`write_model_card`] makes the card again from `card.json`.

    Args:
        output_dir (`str` or `Path`):
            Directory of the adapter.
        base_model (`str`):
            Hub id or path of the base pipeline, empty for one that was built in memory. Only a Hub id gets into the
            metadata.
        pipeline_class_name (`str`):
            Class name of the base pipeline.
        method_name (`str`):
            Name of the method as its paper writes it, e.g. `"DenseGRPO"`.
        paper (`Mapping[str, str]`, *optional*):
            Paper of the method with any of the keys `title`, `id` (of the form `"2601.20218"`) and `citation`
            (BibTeX).
        datasets (`str` or `Sequence[str]`, *optional*):
            Names of the prompt sets. Only Hub ids get into the metadata.
        reward_names (`Sequence[str]`, *optional*):
            Rewards that were trained on.
        eval_reward_names (`Sequence[str]`, *optional*):
            Held-out rewards that were only watched.
        reward_sources (`Mapping[str, Mapping[str, str]]`, *optional*):
            By name of a reward, where it comes from: a `repository` or `weights` on the Hub with its `revision`, and
            whatever else it says of itself.
        metrics (`Mapping`, *optional*):
            Held-out scores as `{"before": {name: score}, "after": {name: score}}`. A score is a number, or a mapping
            with `mean` and, for the 95 % interval, `std` and `n`.
        config (`Mapping`, *optional*):
            Settings of the run; paths and tokens are left out.
        call_arguments (`Mapping`, *optional*):
            Arguments of the pipeline call that the scores were measured with, e.g. `num_inference_steps`,
            `guidance_scale`, `height`, `width`, `max_sequence_length`.
        tags (`Sequence[str]`, *optional*):
            Tags of the repository beside `trl-flow`, `lora` and the pipeline's own.
        model_name (`str`, *optional*):
            Title. Defaults to the name of the repository or directory.
        hub_model_id (`str`, *optional*):
            Repository that the card goes to; the usage example loads from it.
        hub_revision (`str`, *optional*):
            Branch of the repository that it goes to, where that is not `main`.
        component (`str`, *optional*, defaults to `"transformer"`):
            Name of the trained denoiser in the pipeline.
        prompts (`Sequence[str]`, *optional*):
            Example prompts; the first one is used in the usage example. Defaults to those of the sample pictures.
        load_expression (`str`, *optional*):
            Python expression that gives the base pipeline in the usage example, for a model that has no Hub id, e.g.
            `"trl_flow.policy.load_pipeline('shapes')"`; the module that it names is imported.
        license (`str`, *optional*):
            Licence id. Defaults to the base model's, when its card can be read.
        pipeline_tag (`str`, *optional*, defaults to `"text-to-image"`):
            Task of the pipeline on the Hub.
        scheduler (`str`, *optional*):
            Scheduler class that the usage example sets, where the adapter was trained for another than the pipeline's own.
        second_component (`str`, *optional*):
            A second trained denoiser (`"transformer_2"`), whose adapter is in a folder of its name.
        complete_class (`str`, *optional*):
            Class of the denoiser, where all of it was trained and it is in a folder of its name.
        guider_scale (`float`, *optional*):
            Guidance scale, for pipelines that take it from their guider.
        dtype (`str`, *optional*):
            Precision that the usage example loads the weights in, where it is not float32, e.g. `"bfloat16"`.
        steps, seconds, nfe, hardware (*optional*):
            Updates, seconds of training, velocities evaluated, and what it ran on (found by itself). Pictures of later
            updates than `steps` are those of an adapter that the run left behind.
        diffusers_format (`bool`, *optional*):
            Whether `load_lora_weights` can load the adapter ([`~trl_flow.hub.supports_diffusers_format`]). Defaults to
            what [`~trl_flow.hub.save_adapter`] has written to the directory.
        command (`str`, *optional*):
            What repeats the run with the `config.yaml` in its directory: a command line of `trl-flow`, or Python.
        command_line (`str`, *optional*):
            The command line as it was typed, where there was one, without tokens.

    Returns:
        `Path`: the card.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    base_model = str(base_model)
    is_hub_id = bool(HUB_ID.fullmatch(base_model)) and not os.path.isdir(base_model)
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    if diffusers_format is None:
        peft_alone = (output_dir / SAFETENSORS_WEIGHTS_NAME).is_file()
        diffusers_format = (output_dir / DIFFUSERS_WEIGHTS_NAME).is_file() or not peft_alone
    facts = {
        "model_name": model_name or _repository_name(hub_model_id or str(output_dir.resolve())),
        "hub_model_id": hub_model_id,
        "hub_revision": hub_revision,
        "license": {"license": license} if license else _base_license(base_model),
        # A name without a slash is nobody's id on the Hub.
        "base_model": base_model if is_hub_id else Path(base_model).name,
        "load_expression": load_expression,
        "pipeline_class_name": pipeline_class_name,
        "pipeline_tag": pipeline_tag,
        "component": component,
        "second_component": second_component,
        "complete_class": complete_class,
        "diffusers_format": diffusers_format,
        "scheduler": scheduler,
        "guider_scale": guider_scale,
        "dtype": dtype,
        "call_arguments": _literals(call_arguments or {}),
        "prompts": list(prompts),
        "tags": list(tags),
        "method_name": method_name,
        "paper": dict(paper or {}),
        "datasets": [Path(name).name if os.path.exists(name) else name for name in datasets],
        "reward_names": list(reward_names),
        "eval_reward_names": list(eval_reward_names),
        "reward_sources": {name: dict(source) for name, source in (reward_sources or {}).items()},
        "metrics": metrics or {},
        "steps": steps,
        "seconds": seconds,
        "nfe": nfe,
        "hardware": hardware or describe_hardware(),
        "versions": _versions(),
        "config": _settings(config),
        "command": command,
        "command_line": command_line,
    }
    _write(output_dir / CARD_FILE, card_json(_public(facts)))
    return write_model_card(output_dir)


def write_model_card(output_dir: str | Path, **changes) -> Path:
    """
    Write `README.md` again from the `card.json`, the sample pictures and the curves in a run's directory, or in a copy of
    its repository.

    Args:
        output_dir (`str` or `Path`):
            The directory.
        changes:
            `hub_model_id` (with `hub_revision`), `model_name` or `license` to say something else than before, as in
            [`create_model_card`]; they are kept in `card.json`.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: there is no `card.json`.
        ValueError: it is not one.
    """
    output_dir = Path(output_dir)
    facts = load_card_facts(output_dir, **changes)
    for _, image, source in _gallery(output_dir, facts["steps"]):
        _enlarge(source, output_dir / image)
    if any(changes.values()):
        _write(output_dir / CARD_FILE, card_json(facts))
    path = output_dir / "README.md"
    _write(path, render_model_card(output_dir, facts))
    return path


def load_card_facts(output_dir: str | Path, **changes) -> dict:
    """What `card.json` holds, with the changes that [`write_model_card`] takes."""
    path = Path(output_dir) / CARD_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{output_dir} holds no {CARD_FILE}, from which a model card is made: expected the output directory of a run "
            "that has saved, or a copy of its repository."
        )
    try:
        facts = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}). Training writes it when it saves.") from error
    if not isinstance(facts, dict) or "pipeline_class_name" not in facts:
        raise ValueError(f"{path} is not what training writes: expected a mapping with the facts of a model card.")
    for name in changes:
        if name not in ("hub_model_id", "hub_revision", "model_name", "license"):
            raise ValueError(f"{name}: expected hub_model_id, hub_revision, model_name or license.")
    if changes.get("hub_model_id"):
        facts["hub_model_id"], facts["hub_revision"] = changes["hub_model_id"], changes.get("hub_revision")
        facts["model_name"] = _repository_name(changes["hub_model_id"])
    if changes.get("model_name"):
        facts["model_name"] = changes["model_name"]
    if changes.get("license"):
        facts["license"] = {"license": changes["license"]}
    return facts


def card_json(facts: Mapping) -> str:
    """The facts as `card.json` holds them."""
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def render_model_card(output_dir: str | Path, facts: Mapping) -> str:
    """The model card of the facts and of the pictures in a run's directory, as text."""
    output_dir = Path(output_dir)
    base_model, model_name, paper = facts["base_model"], facts["model_name"], facts["paper"]
    base_is_hub_id = bool(HUB_ID.fullmatch(base_model))
    base_name = base_model or facts["pipeline_class_name"]
    load_expression = facts["load_expression"] or (
        f"DiffusionPipeline.from_pretrained({json.dumps(base_model)}{_precision(facts['dtype'])})"
        if base_model
        else "...  # the pipeline that was trained"
    )
    complete = facts["complete_class"] is not None
    datasets, reward_names, sources = facts["datasets"], facts["reward_names"], facts["reward_sources"]
    before, after = facts["metrics"].get("before") or {}, facts["metrics"].get("after") or {}
    samples = [s for s in load_samples(output_dir / "samples") if facts["steps"] is None or s.step <= facts["steps"]]
    rows = _score_rows(before, after, reward_names, samples)
    gallery = _gallery(output_dir, facts["steps"])
    widget = [{"text": prompt, "output": {"url": image}} for prompt, image, _ in gallery]
    prompts = facts["prompts"] or [entry["text"] for entry in widget] or ["a photo of a red cube on a blue table"]

    tags = {"trl-flow", "trl", "reinforcement-learning", "grpo", "diffusers", *facts["tags"]}
    card_data = ModelCardData(
        base_model=base_model if base_is_hub_id else None,
        base_model_relation=("finetune" if complete else "adapter") if base_is_hub_id else None,
        library_name="diffusers",
        pipeline_tag=facts["pipeline_tag"],
        tags=sorted(tags if complete else {*tags, "lora"}),
        datasets=[name for name in datasets if HUB_ID.fullmatch(name)] or None,
        model_name=model_name,
        eval_results=_eval_results(after, datasets, facts["pipeline_tag"]) or None,
        widget=widget or None,
        **facts["license"],
    )

    training_lines = [f"Method: {facts['method_name']}" + (f", {paper['title']}" if paper.get("title") else "")]
    if datasets:
        training_lines.append("Prompts: " + ", ".join(_link_dataset(name) for name in datasets))
    for title, names in (("Rewards", reward_names), ("Watched, never trained on", facts["eval_reward_names"])):
        if names:
            training_lines.append(f"{title}: " + ", ".join(_reward_text(name, sources.get(name)) for name in names))
    if facts["steps"] is not None:
        training_lines.append(f"Updates: {facts['steps']:,}")
    if facts["nfe"] is not None:
        counted = f"latents through the {facts['component']}, sampling"
        training_lines.append(f"Function evaluations ({counted}): {int(facts['nfe']):,}")
    if facts["seconds"] is not None:
        text = format_duration(facts["seconds"])
        training_lines.append(f"Time: {text}" + (f" ({facts['seconds']:,.0f} s)" if facts["seconds"] >= 60 else ""))
    training_lines.append(f"Hardware: {facts['hardware']}")

    sample_count = {score["n"] for score in after.values() if isinstance(score, Mapping) and score.get("n")}
    scores_text = "Held-out prompts, the same initial noise before and after"
    if len(sample_count) == 1:
        scores_text += f", {int(sample_count.pop()):,} pictures"
    if any("±" in row["after"] for row in rows):
        scores_text += "; mean ± half of the 95 % interval, paired for the change"
    template = importlib.resources.files("trl_flow.hub").joinpath("templates/model_card.md").read_text("utf-8")
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        model_name=model_name,
        base_model=base_name,
        base_model_url=f"https://huggingface.co/{base_model}" if base_is_hub_id else None,
        rewards_text=_join([f"`{name}`" for name in reward_names]) or "a reward function",
        reward_count=len(reward_names),
        method_name=facts["method_name"],
        paper_url=f"https://huggingface.co/papers/{paper['id']}" if paper.get("id") else None,
        component=facts["component"],
        complete_class=facts["complete_class"],
        pipeline_class_name=facts["pipeline_class_name"],
        has_gallery=bool(widget),
        snippet=_snippet(
            load_expression,
            facts["hub_model_id"] or ("path/to/" + model_name),
            facts["hub_revision"] if facts["hub_model_id"] else None,
            prompts[0],
            facts["call_arguments"],
            facts["component"],
            facts["diffusers_format"],
            facts["pipeline_tag"],
            facts["scheduler"],
            facts["second_component"],
            facts["complete_class"],
            facts["guider_scale"],
            facts["dtype"],
        ),
        diffusers_format=facts["diffusers_format"],
        score_rows=rows,
        scores_text=scores_text + ".",
        hacking_text=_hacking_text(rows, reward_names, facts["eval_reward_names"]),
        before_after_picture="before_after.png" if (output_dir / "before_after.png").is_file() else None,
        curves_picture="curves.png" if (output_dir / "curves.png").is_file() else None,
        training_lines=training_lines,
        command=facts["command"],
        command_line=facts["command_line"],
        config_yaml=_yaml(facts["config"]),
        versions=facts["versions"],
        citation=textwrap.dedent(paper.get("citation") or "").strip(),
    )
    return str(card)


def describe_hardware() -> str:
    """What this process runs on, e.g. `"1 x NVIDIA H100 80GB HBM3"` or `"CPU (AMD EPYC 9R14, 2 cores)"`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return f"Apple {platform.machine()} (MPS)"
    processor = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names and names[0] != "unknown" else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU ({processor}, {cores} core{'s' if cores != 1 else ''})"


def _mean_and_half_interval(score: float | Mapping | None) -> tuple[float, float | None]:
    if score is None:
        return math.nan, None
    if not isinstance(score, Mapping):
        return float(score), None
    mean, std, n = score.get("mean"), score.get("std"), score.get("n")
    mean = math.nan if mean is None else float(mean)
    return mean, 1.96 * std / math.sqrt(n) if std is not None and n and n > 1 else None


def _score_rows(before: Mapping, after: Mapping, trained: Sequence[str], samples: list[Samples]) -> list[dict]:
    """Lines of the table, those of trained rewards first; `delta` and `half_interval` are the change as numbers."""
    names = list(dict.fromkeys([*before, *after]))
    rows = []
    for name in sorted(names, key=lambda name: trained.index(name) if name in trained else len(trained)):
        row = {"name": f"`{name}`", "trained": name in trained, "before": "", "after": "", "change": ""}
        row |= {"delta": None, "half_interval": None}
        means, halves = {}, {}
        for key, scores in (("before", before), ("after", after)):
            mean, half_interval = _mean_and_half_interval(scores.get(name))
            if not math.isfinite(mean):
                continue
            means[key], halves[key] = mean, half_interval
            row[key] = format_number(mean) + (f" ± {half_interval:.2g}" if half_interval is not None else "")
        if len(means) == 2:
            row["delta"] = means["after"] - means["before"]
            row["change"] = format_change(row["delta"])
            paired = paired_change(samples, name)
            # Not when the pictures on disk are of other evaluations than the scores.
            if paired is not None and math.isclose(paired[0], row["delta"], abs_tol=1e-4):
                row["half_interval"] = paired[1]
                row["change"] += f" ± {paired[1]:.2g}"
            else:
                # That of two independent means, which is wider.
                row["half_interval"] = None if None in halves.values() else math.hypot(*halves.values())
        rows.append(row)
    return rows


def _hacking_text(rows: list[dict], reward_names: Sequence[str], watched_names: Sequence[str]) -> str:
    """What the scores say of reward hacking: a trained reward that rises while a watched one falls beyond its noise."""
    if not watched_names:
        return (
            "No reward was watched that was not trained on: these scores cannot tell a better picture from one that "
            "only pleases what was trained on."
        )
    watched = [row for row in rows if not row["trained"] and row["delta"] is not None]

    def listed(rows: list[dict]) -> str:
        halves = [f" ± {row['half_interval']:.2g}" if row["half_interval"] is not None else "" for row in rows]
        return _join(
            [f"{row['name']} ({format_change(row['delta'])}{h})" for row, h in zip(rows, halves, strict=True)]
        )

    rose = [row for row in rows if row["trained"] and (row["delta"] or 0) > (row["half_interval"] or 0)]
    known = [row for row in watched if row["half_interval"] is not None]
    fell = [row for row in known if row["delta"] + row["half_interval"] < 0]
    sentences = []
    if fell and rose:
        sentences.append(
            f"**A sign of reward hacking:** {listed(fell)}, which {'were' if len(fell) > 1 else 'was'} only watched, fell "
            f"beyond the 95 % interval while {listed(rose)}, trained on, rose."
        )
    elif fell:
        sentences.append(
            f"{listed(fell)}, only watched, fell beyond the 95 % interval, and what was trained on did not rise beyond it."
        )
    if kept := [row for row in known if row not in fell]:
        sentences.append(
            f"{listed(kept)}, only watched, did not fall beyond the 95 % interval"
            + ("." if fell else ": no sign of reward hacking. What nobody watched may have fallen.")
        )
    if unknown := [row for row in watched if row["half_interval"] is None]:
        sentences.append(f"How much of the change of {listed(unknown)}, only watched, is chance is not known.")
    scored = {row["name"] for row in watched}
    if missing := [f"`{name}`" for name in watched_names if f"`{name}`" not in scored]:
        sentences.append(f"There are no scores of {_join(missing)}, only watched, before and after.")
    return " ".join(sentences)


def _eval_results(after: Mapping, datasets: list[str], task: str) -> list[EvalResult]:
    # NaN is not valid in the Hub's metadata: a score without any scored picture is left out.
    means = {name: _mean_and_half_interval(score)[0] for name, score in after.items()}
    hub_ids = [name for name in datasets if HUB_ID.fullmatch(name)]
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_ids[0] if hub_ids else "prompts",
            dataset_name=f"held-out prompts of {datasets[0]}" if datasets else "held-out prompts",
            metric_type=name,
            metric_name=name,
            metric_value=round(mean, 6),
        )
        for name, mean in means.items()
        if math.isfinite(mean)
    ]


def _gallery(output_dir: Path, last_step: int | None) -> list[tuple[str, str, Path]]:
    """Prompts, places of their pictures in the repository, and the samples that these are made of."""
    newest = [s for s in load_samples(output_dir / "samples") if last_step is None or s.step <= last_step][-1:]
    pictures = [pair for s in newest for pair in zip(s.prompts, s.paths, strict=True) if pair[0]][:GALLERY_SIZE]
    return [(prompt, f"images/sample_{number}.png", path) for number, (prompt, path) in enumerate(pictures)]


def _enlarge(source: Path, target: Path):
    with Image.open(source) as image:
        image = image.convert("RGB")
    factor = math.ceil(GALLERY_PIXELS / max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    target.parent.mkdir(exist_ok=True)
    image.save(target)


@lru_cache(maxsize=8)
def _base_license(base_model: str) -> dict[str, str | list[str]]:
    if base_model == "shapes":
        from ..shapes import PIPELINE_PATH

        base_model = str(PIPELINE_PATH)
    try:
        if os.path.isdir(base_model):
            text = Path(base_model, "README.md").read_text("utf-8")
        elif HUB_ID.fullmatch(base_model):
            text = _hub_card(base_model)
        else:
            return {}
        data = ModelCard(text, ignore_metadata_errors=True).data
    except (
        Exception
    ) as error:  # offline, gated, no card: a missing licence line must not cost anyone a trained adapter
        logger.info(f"The licence of {base_model} could not be read: {error}")
        return {}
    fields = ("license", "license_name", "license_link")
    return {field: data.get(field) for field in fields if isinstance(data.get(field), (str, list))}


def _hub_card(repo_id: str) -> str:
    cached = try_to_load_from_cache(repo_id, "README.md")
    if isinstance(cached, str):
        return Path(cached).read_text("utf-8")
    # One attempt: `hf_hub_download` tries five times, half a minute of waiting on a machine without network.
    response = get_session().get(
        hf_hub_url(repo_id, "README.md"), headers=build_hf_headers(), timeout=5, follow_redirects=True
    )
    hf_raise_for_status(response)
    return response.text


def _precision(dtype: str | None) -> str:
    return f", torch_dtype=torch.{dtype}" if dtype else ""


def _snippet(
    load_expression: str,
    adapter: str,
    revision: str | None,
    prompt: str,
    call_arguments: dict,
    component: str,
    diffusers_format: bool,
    pipeline_tag: str,
    scheduler: str | None,
    second_component: str | None,
    complete_class: str | None,
    guider_scale: float | None,
    dtype: str | None,
) -> str:
    lines = ["import torch"]
    names = ["DiffusionPipeline"] if "DiffusionPipeline" in load_expression else []
    names += [name for name in (scheduler, complete_class) if name is not None]
    if names:
        lines.append(f"from diffusers import {', '.join(sorted(names))}")
    helpers = ["load_image"] * pipeline_tag.startswith("image") + ["export_to_video"] * pipeline_tag.endswith("video")
    if helpers:
        lines.append(f"from diffusers.utils import {', '.join(sorted(helpers))}")
    if module := re.match(r"(trl_flow(?:\.[a-z_]+)*)\.\w+", load_expression):
        lines.append(f"import {module[1]}")
    if not diffusers_format and complete_class is None:
        lines.append("from trl_flow.hub import load_trained")
    lines += ["", f"pipe = {load_expression}"]
    if scheduler is not None:
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)")
    place = json.dumps(adapter) + (f", revision={json.dumps(revision)}" if revision is not None else "")
    for part in (component, second_component):
        second = part is not None and part.endswith("_2")
        if part is None:
            continue
        if complete_class is not None:
            lines.append(
                f'pipe.{part} = {complete_class}.from_pretrained({place}, subfolder="{part}"{_precision(dtype)})'
            )
        elif diffusers_format:
            lines.append(
                f'pipe.load_lora_weights({place}, subfolder="{part}", load_into_{part}=True)'
                if second
                else f"pipe.load_lora_weights({place})"
            )
    if complete_class is None and not diffusers_format:
        lines.append(f"load_trained(pipe, {place})")
    if guider_scale is not None:
        lines.append(f"pipe.guider = pipe.guider.new(guidance_scale={guider_scale})")
    lines.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")')
    arguments = [f"prompt={json.dumps(prompt, ensure_ascii=False)}"]
    if pipeline_tag.startswith("image"):
        arguments.append('image=load_image("picture.png")')
    arguments += [f"{name}={value}" for name, value in call_arguments.items()]
    arguments.append('generator=torch.Generator("cpu").manual_seed(0)')
    call = ", ".join(arguments)
    output = "frames[0]" if "video" in pipeline_tag else "images[0]"
    if len(call) < 80:
        lines.append(f"image = pipe({call}).{output}")
    else:
        lines += ["image = pipe(", *(f"    {argument}," for argument in arguments), f").{output}"]
    if "video" in pipeline_tag:
        start = next(i for i, line in enumerate(lines) if line.startswith("image = pipe("))
        lines[start] = lines[start].replace("image = ", "video = ")
        lines.append('export_to_video(video, "video.mp4")')
    else:
        lines.append('image.save("image.png")')
    return "\n".join(lines)


def _settings(config: Mapping | None) -> dict:
    # Of transformers' hundred settings, those at their default would hide the ones that make this run.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return {
        name: value
        for name, value in public_settings(config or {}).items()
        if name not in defaults or value != defaults[name]
    }


def _yaml(settings: Mapping) -> str | None:
    return yaml.safe_dump(settings, sort_keys=True, allow_unicode=True, width=110).strip() if settings else None


def _literals(arguments: Mapping) -> dict[str, str]:
    """Arguments as Python writes them; those that it cannot write, such as a function, are left out."""
    written = {}
    for name, value in arguments.items():
        try:
            known = value is not None and literal_eval(repr(value)) == value
        except (ValueError, SyntaxError):
            continue
        if known:
            written[name] = repr(value)
    return written


def _public(value):
    """As JSON and for everybody to read."""
    if isinstance(value, Mapping):
        return {str(key): _public(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_paths(value)


def _write(path: Path, text: str):
    # Whoever is killed, or pushes at this moment, leaves or finds the old text or the new one.
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _repository_name(place: str) -> str:
    return place.rstrip("/").split("/")[-1]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _reward_text(name: str, source: Mapping[str, str] | None) -> str:
    """A reward with the repository and commit that it came from."""
    source = dict(source or {})
    revision = source.pop("revision", None)
    parts = []
    for kind, value in source.items():
        if HUB_ID.fullmatch(value) and kind in ("repository", "weights", "space"):
            place = f"https://huggingface.co/{'spaces/' if kind == 'space' else ''}{value}"
            parts.append(f"{kind} [{value}]({place}{f'/tree/{revision}' if revision else ''})")
        else:
            parts.append(f"{kind} {value}")
    if revision:
        parts.append(f"at `{revision}`")
    return f"`{name}`" + (f" ({', '.join(parts)})" if parts else "")


def _link_dataset(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})" if HUB_ID.fullmatch(name) else f"`{name}`"


def _join(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
