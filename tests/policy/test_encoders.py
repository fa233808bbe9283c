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

"""Text encoders do not run again on what they have just encoded, and nothing that they make changes by that."""

from collections import Counter

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from trl_flow.policy import FlowPolicy, load_pipeline
from trl_flow.policy.encoders import Memory, encoders


class Doubling(nn.Module):
    runs = 0

    def forward(self, numbers, cache=None, scale=2.0):
        self.runs += 1
        return BaseModelOutput(last_hidden_state=scale * numbers, hidden_states=(numbers.clone(),))


def policy() -> FlowPolicy:
    return FlowPolicy(load_pipeline("shapes"), guidance_scale=3.0, max_sequence_length=1)


def test_a_negative_prompt_is_encoded_once():
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    remembering, forgetful = policy(), policy()
    runs = {}
    for name, one in (("remembering", remembering), ("forgetful", forgetful)):
        counts = runs[name] = Counter()
        for encoder, model in encoders(one.pipeline).items():
            # Of a part of it, which runs when the model itself does.
            list(model.children())[-1].register_forward_pre_hook(lambda *_, e=encoder, c=counts: c.update([e]))
    conditions = remembering.conditioning(prompts)
    forgetful.encoders.memory.models = {}
    expected = forgetful.conditioning(prompts)
    # Each prompt, and once what they are guided away from; T5 has had the placeholder that it is given for all of them.
    assert runs["forgetful"] == {"text_encoder": 6, "text_encoder_2": 6, "text_encoder_3": 6}
    assert runs["remembering"] == {"text_encoder": 4, "text_encoder_2": 4}
    for one, two in zip(conditions, expected, strict=True):
        for a, b in zip(one.answers["encode_prompt", 0], two.answers["encode_prompt", 0], strict=True):
            assert torch.equal(a, b)
    assert all("forward" not in vars(model) for model in encoders(remembering.pipeline).values())


def test_what_is_remembered():
    model = Doubling()
    memory = Memory({"model": model})
    one, two, three = (torch.full((2,), number) for number in (1.0, 2.0, 3.0))
    with memory.used():
        model(one).last_hidden_state.zero_()  # the caller's own
        model(one).hidden_states[0].zero_()
        again = model(one.clone())
        assert again.last_hidden_state.tolist() == [2.0, 2.0] and again.hidden_states[0].tolist() == [1.0, 1.0]
        assert model.runs == 1
        # Other content, shape, precision or arguments: another output.
        for inputs, kwargs in ((two, {}), (one[:1], {}), (one.double(), {}), (one, {"scale": 3.0})):
            runs = model.runs
            output = model(inputs, **kwargs).last_hidden_state
            assert torch.equal(output, kwargs.get("scale", 2.0) * inputs) and output.dtype == inputs.dtype
            assert model.runs == runs + 1
        # The last two, whatever was used first.
        runs = model.runs
        for inputs in (two, one, three, one, three, two, three):
            model(inputs)
        assert model.runs == runs + 4
        # What may change between calls says nothing about the output.
        model(one, cache=[])
        model(one, cache=[])
        assert model.runs == runs + 6
        memory.forget()
        model(three)
        assert model.runs == runs + 7
    model(three)
    assert model.runs == runs + 8
