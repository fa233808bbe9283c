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

"""The repository of a new reward function, to be changed into one's own."""

from pathlib import Path


REWARD = '''"""How colourful a picture is: https://infoscience.epfl.ch/record/33994 (Hasler and Suesstrunk, 2003)."""

import numpy as np


def reward(prompts, images, **kwargs):
    """
    Colourfulness of each picture: about 0 for grey, 30 for a usual photo, above 80 for a garish one.

    Args:
        prompts (`list[str]`), images (`list[PIL.Image.Image]`): n of each.
        kwargs: The other columns of the dataset, with n values each, and `trainer_state`, `log_extra`, `log_metric`.

    Returns:
        `list[float | None]`: One score per picture: `None` where the reward does not apply, NaN where it failed.
    """
    scores = []
    for image in images:
        red, green, blue = np.asarray(image.convert("RGB"), dtype=np.float64).transpose(2, 0, 1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = np.hypot(red_green.std(), yellow_blue.std())
        scores.append(float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())))
    return scores


# A reward that waits for others or computes outside of Python may run while the next prompts are sampled.
reward.concurrent = True
# Columns that the dataset must have beside `prompt`.
reward.requires = ()
'''

README = """---
library_name: trl-flow
license: {license}
tags:
- trl-flow-reward
---

# {name}

What it computes, in a sentence, and where that is defined.

- **Scale**: which scores are usual, and what is a good one.
- **Hacked by**: what raises it without better pictures.

```python
from trl_flow.rewards import load_reward

reward = load_reward("user/{name}", revision="...", trust_remote_code=True)
reward(prompts=["a photo of a cat"], images=[image])
```

```bash
trl-flow flow-grpo --reward_funcs user/{name}@REVISION --trust_remote_code ...
```

Settings, if it needs some, are keyword arguments of a class instead of the function: a subclass of
`trl_flow.rewards.Reward` that `reward.py` calls `reward`.
"""

REQUIREMENTS = "numpy>=2\npillow\n"


def write_template(directory: Path, license: str = "apache-2.0") -> list[Path]:
    """
    Writes a reward that works, with its card and its requirements.

    Args:
        directory (`Path`): Where; it must be empty, or not be there.
        license (`str`, *optional*, defaults to `"apache-2.0"`): Licence of the code, by the Hub's name for it.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: If something is in the way.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is there already, and not empty. Name a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    readme = README.format(name=directory.resolve().name, license=license)
    files = {"reward.py": REWARD, "README.md": readme, "requirements.txt": REQUIREMENTS}
    for name, text in files.items():
        (directory / name).write_text(text)
    return [directory / name for name in files]
