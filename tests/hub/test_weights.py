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

"""What is trained comes back: as the policy's own, in the stock pipeline, and as the beginning of another training."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pipelines import brightness, prompts, tiny_sd, tiny_sd3
from safetensors.torch import save_file
from tiny import call_arguments, tiny_pipeline

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, FlowPolicy
from trl_flow.hub import holds_policy, load_policy, load_trained, read_adapter, save_policy


PROMPT = "a red circle"
R, ALPHA = 3, 7
WAN_2_2 = "WanPipeline/2.2"


def lora(**kwargs):
    return LoraConfig(**({"r": R, "lora_alpha": ALPHA, "target_modules": None} | kwargs))


@torch.no_grad()
def train(module, std=0.3, seed=7):
    """Stands in for training: random numbers are added to everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


def sd3_policy(peft_config=None, **kwargs):
    return FlowPolicy(tiny_sd3(), peft_config, guidance_scale=1.0, max_sequence_length=2, **kwargs)


def wan_policy(peft_config, **kwargs):
    """Wan 2.2: a transformer above, and one below a noise level."""
    arguments = call_arguments(WAN_2_2)
    settings = {name: arguments.pop(name) for name in ("height", "width", "num_frames", "max_sequence_length")}
    guidance_scale = arguments.pop("guidance_scale")
    return FlowPolicy(
        tiny_pipeline(WAN_2_2),
        peft_config,
        guidance_scale=guidance_scale,
        generation_kwargs=arguments,
        **settings,
        **kwargs,
    )


def noise_for(policy):
    return torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def picture_of(policy, steps=4):
    """At the end of a chain without noise."""
    sigmas = policy.sigmas(steps)
    latents, conditioning = noise_for(policy) * policy.initial_scale(sigmas), policy.conditioning([PROMPT])
    for sigma, sigma_next in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False):
        latents = latents + (sigma_next - sigma) * policy(latents, sigma, conditioning)
    return policy.decode(latents)


@torch.no_grad()
def stock_picture(policy, pipeline, steps=4):
    """By a stock pipeline, from the same noise. Wan's solver takes Euler steps."""
    scheduler = pipeline.scheduler
    if isinstance(pipeline, type(tiny_pipeline(WAN_2_2))):
        sigmas = iter(policy.sigmas(steps).diff().tolist())
        scheduler.step = lambda output, timestep, sample, **_: (sample + next(sigmas) * output,)
    return pipeline(
        PROMPT,
        latents=noise_for(policy),
        num_inference_steps=steps,
        output_type="pt",
        return_dict=False,
        **policy.call_arguments,
    )[0]


def assert_same(one, two):
    assert one.shape == two.shape and (one - two).abs().max() < 1e-6


def assert_different(one, two):
    assert (one - two).abs().max() > 1e-3


def trained_names(policy):
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


# ---- Adapters ----


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter_is_loaded_by_a_policy_and_by_the_stock_pipeline(settings, tmp_path):
    policy = train(sd3_policy(lora(**settings)))
    picture = picture_of(policy)
    assert_different(picture, picture_of(sd3_policy(lora())))
    assert not holds_policy(tmp_path)
    save_policy(policy, tmp_path, "an/id")
    assert holds_policy(tmp_path)

    again = sd3_policy(lora(**settings))
    load_policy(again, tmp_path)
    for name, parameter in policy.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert_same(stock_picture(policy, load_trained(tiny_sd3(), tmp_path)), picture)
    # diffusers has no place for DoRA's magnitudes.
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists() == (not settings.get("use_dora"))


def test_weights_other_than_the_policys_are_saved_under_its_names(tmp_path):
    """An average, or what was gathered from shards, with the prefixes that wrappers put before the names."""
    policy, average = sd3_policy(lora()), train(sd3_policy(lora()))
    state = {f"module.{name}": value for name, value in average.state_dict().items() if "lora_" in name}
    save_policy(policy, tmp_path, None, state)
    assert_same(stock_picture(policy, load_trained(tiny_sd3(), tmp_path)), picture_of(average))


def test_adapters_of_two_denoisers(tmp_path):
    policy = train(wan_policy({"transformer": lora(), "transformer_2": lora(r=2, lora_alpha=9)}))
    picture, base = picture_of(policy), picture_of(wan_policy(lora()))
    assert_different(picture, base)
    save_policy(policy, tmp_path, "an/id")

    first = tiny_pipeline(WAN_2_2)
    first.load_lora_weights(tmp_path)
    assert_different(stock_picture(policy, first), picture)
    assert_different(stock_picture(policy, first), base)
    first.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
    assert_same(stock_picture(policy, first), picture)
    assert_same(stock_picture(policy, load_trained(tiny_pipeline(WAN_2_2), tmp_path)), picture)

    again = wan_policy({name: config for name, (config, _) in read_adapter(first, tmp_path).items()})
    assert [config.peft_config["default"].lora_alpha for config in again.denoisers.values()] == [ALPHA, 9]
    load_policy(again, tmp_path)
    assert_same(picture_of(again), picture)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_an_adapter_of_one_of_two_denoisers(component, tmp_path):
    policy = train(wan_policy({component: lora()}))
    picture = picture_of(policy)
    assert_different(picture, picture_of(wan_policy(lora())))
    save_policy(policy, tmp_path, "an/id")
    assert holds_policy(tmp_path)
    assert_same(stock_picture(policy, load_trained(tiny_pipeline(WAN_2_2), tmp_path)), picture)
    assert list(read_adapter(tiny_pipeline(WAN_2_2), tmp_path)) == [component]
    again = wan_policy({component: lora()})
    load_policy(again, tmp_path)
    assert_same(picture_of(again), picture)


# ---- Complete denoisers ----


@pytest.mark.parametrize(
    ("make", "make_pipeline", "denoiser"),
    [
        (sd3_policy, tiny_sd3, SD3Transformer2DModel),
        (wan_policy, lambda: tiny_pipeline(WAN_2_2), WanTransformer3DModel),
    ],
    ids=["one", "two"],
)
def test_full_finetuning(make, make_pipeline, denoiser, tmp_path):
    policy = make(None, full_finetuning=True)
    assert trained_names(policy) == {name for name, _ in policy.named_parameters()}
    assert not any(p.requires_grad for p in policy.pipeline.vae.parameters())
    base = picture_of(policy)
    policy.keep_reference()
    train(policy, std=0.05)
    picture = picture_of(policy)
    assert_different(picture, base)
    with policy.reference():
        assert torch.equal(picture_of(policy), base)
    assert torch.equal(picture_of(policy), picture)
    # The copies are nobody's parameters: neither saved nor trained.
    assert trained_names(policy) == {name for name, _ in policy.named_parameters()}
    assert len(policy.state_dict()) == sum(len(d.state_dict()) for d in policy.denoisers.values())

    save_policy(policy, tmp_path, "an/id")
    assert holds_policy(tmp_path)
    pipeline = make_pipeline()
    for component in policy.components:
        setattr(pipeline, component, denoiser.from_pretrained(tmp_path / component))
    assert_same(stock_picture(policy, pipeline), picture)
    assert_same(stock_picture(policy, load_trained(make_pipeline(), tmp_path)), picture)
    again = make(None, full_finetuning=True)
    load_policy(again, tmp_path)
    assert torch.equal(picture_of(again), picture)


def test_gradients_of_full_finetuning_reach_all_weights():
    policy = sd3_policy(full_finetuning=True)
    policy(torch.randn(1, *policy.latent_shape), 0.5, policy.conditioning([PROMPT])).square().sum().backward()
    missing = [name for name, parameter in policy.named_parameters() if parameter.grad is None]
    assert missing == []


def test_an_average_of_all_weights_is_saved_in_their_place(tmp_path):
    policy, average = sd3_policy(full_finetuning=True), train(sd3_policy(full_finetuning=True), 0.05)
    before = picture_of(policy)
    state = {f"module.{name}": value for name, value in average.state_dict().items()}
    save_policy(policy, tmp_path, None, state)
    assert_same(stock_picture(policy, load_trained(tiny_sd3(), tmp_path)), picture_of(average))
    assert torch.equal(picture_of(policy), before)


def test_complete_denoisers_keep_the_precision_of_the_pipeline(tmp_path):
    policy = train(sd3_policy(full_finetuning=True), 0.05)
    save_policy(policy, tmp_path, None)
    pipeline = load_trained(tiny_sd3().to(torch.bfloat16), tmp_path)
    for name, weight in pipeline.transformer.named_parameters():
        assert torch.equal(weight, policy.denoisers["transformer"].get_parameter(name).bfloat16())


# ---- Going on from an adapter ----


def make_trainer(pipeline, adapter, output_dir, **kwargs):
    return FlowGRPOTrainer(
        pipeline,
        reward_funcs=brightness,
        train_dataset=prompts(6),
        args=FlowGRPOConfig(
            output_dir=str(output_dir),
            adapter_name_or_path=str(adapter),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=1,
            num_inference_steps=4,
            num_generations=3,
            guidance_scale=1.0,
        ),
        **kwargs,
    )


def by_ours(pipeline, denoiser, config, folder):
    policy = FlowPolicy(tiny_sd3(), config)
    weights = {
        "denoisers.transformer.base_model.model." + name.replace(".weight", ".default.weight"): value
        for name, value in get_peft_model_state_dict(denoiser).items()
    }
    assert weights.keys() == trained_names(policy)
    policy.load_state_dict(weights, strict=False)
    save_policy(policy, folder, "an/id")


def by_peft(pipeline, denoiser, config, folder):
    model = get_peft_model(tiny_sd3().transformer, config)
    weights = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(denoiser).items()}
    set_peft_model_state_dict(model, weights)
    model.save_pretrained(folder)


def by_diffusers(pipeline, denoiser, config, folder):
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.save_lora_weights(
        folder,
        **{f"{component}_lora_layers": get_peft_model_state_dict(denoiser)},
        **_collate_lora_metadata({component: denoiser}),
    )


def by_diffusers_without_metadata(pipeline, denoiser, config, folder):
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.save_lora_weights(folder, **{f"{component}_lora_layers": get_peft_model_state_dict(denoiser)})


def by_diffusers_scripts(pipeline, denoiser, config, folder):
    """As diffusers' text-to-image scripts do it: `lora.down` and `lora.up`, without metadata."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)


SAVED = [
    (tiny_sd3, by_ours, ALPHA),
    (tiny_sd3, by_peft, ALPHA),
    (tiny_sd3, by_diffusers, ALPHA),
    # diffusers then takes alpha = r.
    (tiny_sd3, by_diffusers_without_metadata, R),
    (tiny_sd, by_diffusers, ALPHA),
    (tiny_sd, by_diffusers_without_metadata, R),
    (tiny_sd, by_diffusers_scripts, R),
]


@pytest.mark.parametrize(("make", "save", "alpha"), SAVED, ids=[f"{m.__name__}-{s.__name__}" for m, s, _ in SAVED])
def test_training_goes_on_from_an_adapter(make, save, alpha, tmp_path):
    """Whoever saved it, the picture before the first step is the one that its own loader makes of it."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["to_q", "to_v"])
    pipeline = make()
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config)
    train(denoiser)
    folder = tmp_path / "adapter"
    save(pipeline, denoiser, config, folder)

    stock = make()
    if save is by_peft:
        PeftModel.from_pretrained(stock.transformer, folder)
    else:
        stock.load_lora_weights(folder)
    trainer = make_trainer(make(), folder, tmp_path / "run")
    policy = trainer.policy
    assert_same(picture_of(policy), stock_picture(policy, stock))
    assert_different(picture_of(policy), stock_picture(policy, make()))

    found = next(iter(policy.denoisers.values())).peft_config["default"]
    assert (found.r, found.lora_alpha) == (R, alpha) and not found.inference_mode
    trained = {name.partition("base_model.model.")[2].partition(".lora_")[0] for name in trained_names(policy)}
    assert trained == {name for name, _ in denoiser.named_modules() if name.endswith((".to_q", ".to_v"))}
    assert all(policy.get_parameter(name).dtype == torch.float32 for name in trained_names(policy))


def test_dora_goes_on(tmp_path):
    policy = train(sd3_policy(lora(use_dora=True)))
    save_policy(policy, tmp_path / "adapter", "an/id")
    trainer = make_trainer(tiny_sd3(), tmp_path / "adapter", tmp_path / "run")
    assert_same(
        picture_of(trainer.policy), stock_picture(trainer.policy, load_trained(tiny_sd3(), tmp_path / "adapter"))
    )
    assert trained_names(trainer.policy) == trained_names(policy)


def test_two_denoisers_go_on(tmp_path):
    policy = train(wan_policy({"transformer": lora(), "transformer_2": lora(r=2)}))
    save_policy(policy, tmp_path, "an/id")
    found = read_adapter(tiny_pipeline(WAN_2_2), tmp_path)
    assert {name: config.r for name, (config, _) in found.items()} == {"transformer": R, "transformer_2": 2}
    for name, (_, weights) in found.items():
        assert {key: value.tolist() for key, value in weights.items()} == {
            key: value.tolist() for key, value in get_peft_model_state_dict(policy.denoisers[name]).items()
        }


# ---- Errors ----


def test_a_place_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.* is neither a directory nor a Hub id"):
        read_adapter(tiny_sd3(), tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing.* is neither a directory nor a Hub id"):
        load_trained(tiny_sd3(), tmp_path / "missing")


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(
        ValueError, match="holds no adapter for StableDiffusion3Pipeline: expected adapter_config.json"
    ):
        read_adapter(tiny_sd3(), tmp_path)
    with pytest.raises(ValueError, match="holds no adapter for StableDiffusion3Pipeline"):
        make_trainer(tiny_sd3(), tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="holds nothing that was trained: expected adapter_model.safetensors"):
        load_trained(tiny_sd3(), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_policy(sd3_policy(lora()), tmp_path)


def test_an_adapter_beside_another_configuration(tmp_path):
    save_policy(sd3_policy(lora()), tmp_path, "an/id")
    with pytest.raises(ValueError, match="brings its own configuration: peft_config would have no effect"):
        make_trainer(tiny_sd3(), tmp_path, tmp_path / "run", peft_config=lora())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, r"lora_A.weight has the shape \(3, 16\), expected \(2, 16\)"),
        ({"target_modules": ["attn.to_q"]}, r"lora_A.weight has the shape \(3, 16\), expected None"),
        ({"use_dora": True}, r"lora_magnitude_vector has the shape None, expected \(16,\)"),
        ({"target_modules": "all-linear"}, r"has the shape None, expected"),
    ],
    ids=["rank", "fewer layers", "dora", "more layers"],
)
def test_an_adapter_of_another_configuration(settings, message, tmp_path):
    """Half of an adapter would be taken for all of it."""
    save_policy(sd3_policy(lora()), tmp_path, "an/id")
    policy = sd3_policy(lora(**settings))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    with pytest.raises(ValueError, match="is of another adapter: .*" + message):
        load_policy(policy, tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())


@pytest.mark.parametrize("two", [False, True])
def test_an_adapter_of_another_model(two, tmp_path):
    policy = wan_policy(lora() if two else {"transformer": lora()})
    save_policy(policy, tmp_path, "an/id")
    with pytest.raises(ValueError, match="is of another adapter: .* has the shape .*, expected None"):
        load_policy(sd3_policy(lora()), tmp_path)
    with pytest.raises(
        ValueError, match="is the adapter of another model: the transformer of StableDiffusion3Pipeline"
    ):
        make_trainer(tiny_sd3(), tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="no layer of the adapter fits|not found in the base model"):
        load_trained(tiny_sd3(), tmp_path)


def test_an_adapter_of_a_wider_model(tmp_path):
    """Of the same layers' names, with other numbers of inputs."""
    pipeline = tiny_sd3()
    config = dict(pipeline.transformer.config) | {"attention_head_dim": 16, "caption_projection_dim": 32}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    save_policy(FlowPolicy(pipeline, lora(), guidance_scale=1.0), tmp_path, "an/id")
    with pytest.raises(ValueError, match="is the adapter of another model: .* has no layer .* with 32 inputs"):
        read_adapter(tiny_sd3(), tmp_path)


def test_an_adapter_of_a_denoiser_that_the_pipeline_lacks(tmp_path):
    save_policy(wan_policy({"transformer_2": lora()}), tmp_path, "an/id")
    with pytest.raises(ValueError, match="the transformer_2 of WanPipeline has no layer"):
        read_adapter(tiny_pipeline("WanPipeline"), tmp_path)


def test_an_adapter_of_a_deeper_model(tmp_path):
    """Of the same class, and with layers of the same names and more."""
    pipeline = tiny_sd3()
    config = dict(pipeline.transformer.config) | {"num_layers": 3}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    policy = FlowPolicy(pipeline, lora(), guidance_scale=1.0, max_sequence_length=2)
    save_policy(policy, tmp_path, "an/id")
    with pytest.raises(ValueError, match="another adapter"):
        load_policy(sd3_policy(lora()), tmp_path)
    with pytest.raises(ValueError, match="transformer of StableDiffusion3Pipeline has no layer transformer_blocks"):
        make_trainer(tiny_sd3(), tmp_path, tmp_path / "run")


def test_scales_of_a_file_without_configuration(tmp_path):
    """Some programs write alpha as a number beside the matrices of each layer."""
    pipeline = tiny_pipeline("FluxPipeline")
    pipeline.transformer.add_adapter(LoraConfig(r=R, target_modules=["to_q"], init_lora_weights=False))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(pipeline.transformer).items()}
    alphas = {
        key.replace("lora_A.weight", "alpha"): torch.tensor(float(ALPHA))
        for key in state
        if key.endswith("lora_A.weight")
    }
    save_file(state | alphas, tmp_path / "pytorch_lora_weights.safetensors")
    ((config, _),) = read_adapter(pipeline, tmp_path).values()
    stock = tiny_pipeline("FluxPipeline")
    stock.load_lora_weights(tmp_path)
    assert config.lora_alpha == ALPHA == stock.transformer.peft_config["default_0"].lora_alpha

    alphas[next(iter(alphas))] += 1
    save_file(state | alphas, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"scales \[7.0, 8.0\] and no configuration that says where"):
        read_adapter(tiny_pipeline("FluxPipeline"), tmp_path)


def test_adapters_of_text_encoders_are_not_dropped_silently(tmp_path):
    pipeline = tiny_sd()
    pipeline.unet.add_adapter(LoraConfig(r=R, target_modules=["to_q"]))
    pipeline.text_encoder.add_adapter(LoraConfig(r=R, target_modules=["q_proj"]))
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )
    with pytest.raises(ValueError, match="text_encoder"):
        read_adapter(tiny_sd(), tmp_path)
