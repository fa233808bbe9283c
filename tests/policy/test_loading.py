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

import pytest
from pipelines import tiny_sd3

from trl_flow.policy import load_pipeline


def test_a_pipeline_is_returned_as_it_is():
    pipeline = tiny_sd3()
    assert load_pipeline(pipeline) is pipeline


def test_a_directory(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert type(loaded).__name__ == "StableDiffusion3Pipeline"
    assert loaded.config["_name_or_path"] == str(tmp_path)


def test_a_name_that_nothing_answers_to(tmp_path):
    with pytest.raises(ValueError, match="model='no/such-pipeline' could not be loaded: expected 'shapes'"):
        load_pipeline("no/such-pipeline")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline(str(tmp_path))
