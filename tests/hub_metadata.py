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

"""What the Hub checks of a model card's metadata, as far as it is public, in its words.

From https://huggingface.co/docs/hub/model-cards, https://huggingface.co/docs/hub/repositories-licenses, the specification of
`model-index` in https://github.com/huggingface/hub-docs/blob/main/modelcard.md, and messages that users report. Where the
Hub warns, of tasks that it does not know, this refuses.
"""

import re

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK


LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
""".split()
# Those whose results are pictures and videos.
PIPELINE_TAGS = """
text-to-image image-to-image unconditional-image-generation text-to-video image-to-video video-to-video image-text-to-image
image-text-to-video
""".split()
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
RELATIONS = ("adapter", "finetune", "merge", "quantized")


def metadata_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a model card, given as the text of its README.md."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = [*_scalars(data), *_lists(data)]
    for position, entry in enumerate(_entries(data, "widget", errors)):
        errors += _widget(entry, f"widget[{position}]")
    for position, entry in enumerate(_entries(data, "model-index", errors)):
        errors += _model_index(entry, f"model-index[{position}]")
    return errors, []


def _scalars(data: dict) -> list[str]:
    errors = []
    for name in ("library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link", "thumbnail"):
        if name in data and (not isinstance(data[name], str) or not data[name]):
            errors.append(f'"{name}" must be a string')
    for name in ("license", "language"):
        if name in data and not isinstance(data[name], (str, list)):
            errors.append(f'"{name}" must be one of [string, array]')
    licenses = data.get("license", [])
    for license_id in [licenses] if isinstance(licenses, str) else licenses if isinstance(licenses, list) else []:
        if license_id not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    if data.get("pipeline_tag", PIPELINE_TAGS[0]) not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of [{", ".join(PIPELINE_TAGS)}]')
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [None]:
        if not isinstance(base, str) or not MODEL_ID.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    return errors


def _lists(data: dict) -> list[str]:
    errors = []
    for name in ("tags", "datasets", "metrics"):
        if name not in data:
            continue
        if not isinstance(data[name], list) and not (name != "tags" and isinstance(data[name], str)):
            errors.append(f'"{name}" must be an array')
            continue
        for position, entry in enumerate([data[name]] if isinstance(data[name], str) else data[name]):
            if not isinstance(entry, str) or not entry:
                errors.append(f'"{name}[{position}]" must be a string')
            elif name == "datasets" and not MODEL_ID.fullmatch(entry):
                errors.append(
                    f'"datasets[{position}]" with value "{entry}" is not valid. If possible, use a dataset id from '
                    "https://hf.co/datasets."
                )
    return errors


def _entries(data: dict, name: str, errors: list[str]) -> list:
    if name in data and not isinstance(data[name], list):
        errors.append(f'"{name}" must be an array')
        return []
    return data.get(name, [])


def _widget(entry, place: str) -> list[str]:
    if not isinstance(entry, dict):
        return [f'"{place}" must be of type object']
    errors = [f'"{place}.text" must be a string'] if not isinstance(entry.get("text"), str) else []
    if "output" in entry:
        output = entry["output"]
        url = output.get("url") if isinstance(output, dict) else None
        if not isinstance(url, str) or not url:
            errors.append(f'"{place}.output.url" is required')
    return errors


def _model_index(entry, place: str) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        return [f'"{place}.name" is required']
    if not isinstance(entry.get("results"), list):
        return [f'"{place}.results" must be an array']
    errors = []
    for number, result in enumerate(entry["results"]):
        where = f"{place}.results[{number}]"
        if not isinstance(result, dict):
            errors.append(f'"{where}" must be of type object')
            continue
        for name, required in (("task", ("type",)), ("dataset", ("type", "name"))):
            part = result.get(name)
            for key in required:
                if not isinstance(part, dict) or not isinstance(part.get(key), str) or not part[key]:
                    errors.append(f'"{where}.{name}.{key}" is required and must be a string')
        metrics = result.get("metrics")
        if not isinstance(metrics, list) or not metrics:
            errors.append(f'"{where}.metrics" must be an array')
            continue
        for position, metric in enumerate(metrics):
            at = f"{where}.metrics[{position}]"
            if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or not metric["type"]:
                errors.append(f'"{at}.type" is required')
                continue
            value = metric.get("value")
            # YAML's `.nan` becomes null in the Hub's JSON.
            if value is None or value != value:
                errors.append(f'"{at}.value" is required')
    return errors
