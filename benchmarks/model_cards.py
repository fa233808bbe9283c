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

"""Model cards of adapters that the examples produce: runs examples of `examples/shapes` and keeps what the Hub would show.

    python benchmarks/model_cards.py                       # dense-grpo, g2rpo and mix-grpo into model_cards/shapes-<method>
    python benchmarks/model_cards.py --methods dance-grpo --output somewhere
    python benchmarks/model_cards.py --max_steps 2 --num_eval_prompts 8 --output /tmp/cards    # a quick look

Each run is a command as users type it, in a directory of its own; what is kept is the card, its pictures, and the settings
that repeat it. Weights are not.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard


ROOT = Path(__file__).parents[1]
METHODS = ("dense-grpo", "g2rpo", "mix-grpo")
KEPT = ("README.md", "config.yaml", "curves.png", "before_after.png")


def train(method: str, folder: Path, options: list[str]) -> Path:
    """Runs the example of a method, in `folder`; returns the run's directory."""
    name = f"shapes-{method}"
    # By the name that it has in the repository: paths of this machine would end in `config.yaml`.
    (folder / "examples").symlink_to(ROOT / "examples")
    command = ["-m", "trl_flow.cli", method, "--config", f"examples/shapes/{method}.yaml", "--output_dir", name]
    subprocess.run([sys.executable, *command, *options], cwd=folder, check=True)
    return folder / name


def keep(run: Path, target: Path):
    """What the Hub would show of a run, in place of what was there before."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(run / name, target / name)
    shutil.copytree(run / "images", target / "images")


def problems(folder: Path) -> list[str]:
    """What is wrong with a card that was kept: links and pictures that lead nowhere, sections that are missing."""
    card = ModelCard.load(folder / "README.md")
    targets = re.findall(r"\]\(([^)\s]+)\)", card.text)
    targets += [entry["output"]["url"] for entry in card.data.to_dict().get("widget", [])]
    found = [
        f"{target} is not there"
        for target in targets
        if not re.match(r"https?:|#", target) and not (folder / target).is_file()
    ]
    sections = re.findall(r"^##+ (.+)$", card.text, re.MULTILINE)
    wanted = ("Use it", "Scores", "Training", "The command", "Versions", "Reward hacking", "Limits", "Citation")
    found += [f"there is no section {name!r}" for name in wanted if name not in sections]
    found += [f"{name} is not shown" for name in ("curves.png", "before_after.png") if name not in targets]
    found += [f"{path.name} is no part of a card" for path in folder.rglob("*.safetensors")]
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Other arguments are those of the training commands."
    )
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help="methods that have an example in examples/shapes"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards")
    args, options = parser.parse_known_args()
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            target = args.output / f"shapes-{method}"
            keep(train(method, Path(folder), options), target)
        for problem in problems(target):
            sys.exit(f"{target}: {problem}")
        print(f"Card:  {target / 'README.md'}", flush=True)


if __name__ == "__main__":
    main()
