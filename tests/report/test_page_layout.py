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

"""Pages as a browser lays them out: nothing overlaps, is cut off or scrolls sideways; and colors that can be read."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

import trl_flow.report
from trl_flow.report import write_report
from trl_flow.report.panels import COLORS
from trl_flow.report.runs import compare_runs, load_runs


TEMPLATES = Path(trl_flow.report.__file__).parent / "templates"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (390, 1280, 1920)

# What goes wrong in each frame of a page: (frame, what, where).
MEASURE = """
function measure(frame, name) {
  const page = frame.contentDocument, found = [];
  const say = (what, element) => found.push([name, what, element.outerHTML.slice(0, 120)]);
  if (page.documentElement.scrollWidth > frame.clientWidth) say("the page scrolls sideways", page.documentElement);
  const outside = [...page.body.querySelectorAll("*")].filter((e) => !e.closest("svg, .table, details, style, head"));
  for (const element of outside) {
    if (element.clientWidth && element.scrollWidth > element.clientWidth + 1) say("text leaves its box", element);
  }
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlaps = (elements) => {
    // Words within a line have a box for each line that they stand on.
    const boxes = elements.flatMap((e) => [...e.getClientRects()].map((box) => [e, box]));
    boxes.forEach(([element, box], i) => {
      for (const [other, second] of boxes.slice(i + 1)) {
        if (element !== other && meet(box, second)) say(`overlaps ${other.outerHTML.slice(0, 80)}`, element);
      }
    });
    return boxes;
  };
  overlaps(outside.filter((e) => !e.children.length && (e.textContent.trim() || e.tagName === "IMG")));
  for (const drawing of page.querySelectorAll("svg[role=img]")) {
    const whole = drawing.getBoundingClientRect();
    for (const [text, box] of overlaps([...drawing.querySelectorAll("text")])) {
      const margins = [box.left - whole.left, whole.right - box.right, box.top - whole.top, whole.bottom - box.bottom];
      if (whole.width && Math.min(...margins) < -1) say("is cut off", text);
    }
  }
  return found;
}
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  const texts = frames.map((frame) => frame.contentDocument.body.textContent.length);
  document.getElementById("found").textContent =
    JSON.stringify({ texts, found: frames.flatMap((frame) => measure(frame, frame.title)) });
});
"""


def faults(pages: dict[str, Path], folder: Path) -> list:
    """What is wrong with pages in a browser, at each of the widths."""
    frames = [
        f'<iframe title="{name} at {width}" style="border: 0; width: {width}px; height: 2000px" '
        f'srcdoc="{html.escape(path.read_text())}"></iframe>'
        for name, path in pages.items()
        for width in WIDTHS
    ]
    harness = folder / "harness.html"
    harness.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{"".join(frames)}<pre id="found"></pre><script>{MEASURE}</script>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=2000,2000", "--dump-dom", harness.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    result = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)[1]))
    assert len(result["texts"]) == len(frames) and min(result["texts"]) > 500, "each page was laid out"
    return result["found"]


def long_run(folder: Path, steps: int = 40, videos: bool = False, prompts: int = 3) -> Path:
    """A run with long names and prompts, many tags, numbers of ten digits, and a score that is never given."""
    names = ["a_long_name_that_somebody_gave_to_a_reward_function_v2", "some-organization/a-reward-repository", "$x$"]
    log = []
    for step in range(steps + 1):
        if step:
            entry = {
                "step": step,
                "reward": 1_234_567_890.0 + 1e8 * step,
                "kl": 1e-8 * step,
                "grad_norm": float("nan"),
            }
            entry |= {"nfe": 1e9 * step, "time/elapsed": 4000.0 * step, "learning_rate": 1e-5 / step}
            entry |= {f"time/{name}": 10.0 * step for name in ("rollout", "decode", "reward", "old_policy", "train")}
            entry |= {f"rewards/{name}/mean": 0.5 for name in names[:2]}
            entry |= {f"rewards/{name}/failed": 0.1 for name in names[:2]}
            entry |= {f"dense_reward/step_{i}": 0.01 * i for i in range(28)}
            entry |= {f"noise_level/step_{i}": 0.7 for i in range(28)}
            log.append(
                entry | {"ratio/mean": 1 + 1e-7, "ratio/min": 1.0, "ratio/max": 1 + 1e-6, "a_count": 10**9 * step}
            )
        if step % (steps // 2 or 1) == 0:
            entry = {"step": step, "eval_num_samples": 100, "eval_rewards/never_given/mean": None}
            for number, name in enumerate(names):
                entry |= {f"eval_rewards/{name}/mean": 10.0 ** (4 * number) + step, f"eval_rewards/{name}/std": 1.0}
                for tag in range(20):
                    entry[f"eval_tags/a_tag_with_a_long_name_{tag}/{name}"] = 10.0 ** (4 * number) + step * tag
            log.append(entry)
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 1_000_000, "log_history": log}))
    model = "some-organization-with-a-long-name/some-model-with-an-even-longer-name-v1.5-medium"
    settings = {"model_name_or_path": model, "lora_r": 16, "a_setting": ["x" * 300], "seed": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {f"of_{folder.name}": "y" * 100}))
    (folder / "run.json").write_text(json.dumps({"method": "DenseGRPO", "base_model": model, "rewards": names[:2]}))
    texts = ["word " * 60, "x" * 200, "a cat"][:prompts]
    for step in (0, steps):
        pictures = folder / "samples" / f"step_{step:06d}"
        pictures.mkdir(parents=True, exist_ok=True)
        for number in range(len(texts)):
            frame = Image.new("RGB", (48, 32), (5 * step, 40 * number, 90))
            if videos:
                frame.save(
                    pictures / f"{number:03d}.gif", save_all=True, append_images=[frame.rotate(90)], duration=125
                )
                frame = Image.new("RGB", (192, 32))
            frame.save(pictures / f"{number:03d}.png")
        scores = {name: [1_234_567_890.0 + step] * len(texts) for name in names}
        pictures.with_suffix(".json").write_text(json.dumps({"prompts": texts, "scores": scores}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium")
class TestLayout:
    def test_report(self, tmp_path):
        bare = tmp_path / "bare"
        bare.mkdir()
        pages = {
            "long": write_report(long_run(tmp_path / "a_long_name_of_a_run" / ("run-" * 12))),
            "one point": write_report(bare, [{"step": 1, "reward": 0.5, "grad_norm": float("nan")}], title="one"),
            "videos": write_report(long_run(tmp_path / "videos", steps=1, videos=True)),
        }
        # A page that goes on reloads itself: not while it is measured.
        pages["one point"].write_text(pages["one point"].read_text().replace('http-equiv="refresh"', ""))
        assert faults(pages, tmp_path) == []

    def test_several_runs(self, tmp_path):
        folders = [long_run(tmp_path / name) for name in ("first-" * 8, "second", "third", "fourth", "fifth")]
        pages = {
            "two": compare_runs(load_runs(folders[:2]), tmp_path / "two"),
            "five": compare_runs(load_runs(folders), tmp_path / "five"),
        }
        assert faults(pages, tmp_path) == []

    def test_faults_are_found(self, tmp_path):
        text = "<p style='position: absolute; top: 0'>one</p><p style='position: absolute; top: 0'>two</p>" + "w" * 600
        svg = '<svg role="img" width="50" height="20"><text x="30" y="10">a long text</text></svg>'
        page = tmp_path / "page.html"
        page.write_text(f"<!DOCTYPE html><body>{text}{svg}</body>")
        found = " ".join(what for name, what, _ in faults({"bad": page}, tmp_path) if name == "bad at 390")
        for what in ("scrolls sideways", "overlaps", "cut off"):
            assert what in found


def luminance(color: str) -> float:
    """Relative luminance of an sRGB color (WCAG 2.2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "style.html").read_text(), flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in blocks]


class TestColors:
    def test_contrast(self):
        assert contrast("#000000", "#ffffff") == pytest.approx(21)
        light, dark = themes()
        assert light.keys() == dark.keys() and light["page"] != dark["page"]
        for theme in (light, dark):
            for ground in (theme["page"], theme["card"]):
                for name in ("ink", "soft", "up", "down"):
                    assert contrast(theme[name], ground) >= 4.5, (name, ground)
                for color in (*COLORS, theme["accent"]):
                    assert contrast(color, ground) >= 3, (color, ground)

    @pytest.mark.parametrize("template", ["style.html", "report.html", "runs.html", "comparison.html"])
    def test_text_has_no_other_colors(self, template):
        text = (TEMPLATES / template).read_text()
        colors = set(re.findall(r"(?<![\w-])color: ([^;}]+)", text))
        assert colors <= {"var(--ink)", "var(--soft)", "var(--up)", "var(--down)"}
        assert "opacity: 0." not in text
