"""What every model must do: save and load, dtypes, devices, quantisation, gradients."""

import json

import pytest
import torch
from shared_files import shared_path
from tiny_models import KINDS, QUANTIZER_VARIANTS, TINY_POLICY, build, outputs_of, quantizer_config, training_batch
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

from lapa import LapaQuantizer

POLICIES = ("latent", "latent-positions", "action")
WIDE_TEXT_CONFIG = {**TINY_POLICY["text_config"], "hidden_size": 64, "intermediate_size": 128}


def without_dtypes(config: dict) -> dict:
    """Loading writes the dtype into sub-configs; everything else must be as saved."""
    kept = {key: value for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    return {key: without_dtypes(value) if isinstance(value, dict) else value for key, value in kept.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_model(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in loaded.state_dict().items())
    assert torch.equal(outputs_of(model), outputs_of(loaded))
    assert without_dtypes(loaded.config.to_dict()) == without_dtypes(model.config.to_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_finds_the_class(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model)


@pytest.mark.parametrize("kind", KINDS)
def test_builds_on_meta_and_loads_from_there(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        hollow = type(model)(model.config)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    hollow.load_state_dict(model.state_dict(), assign=True)
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(outputs_of(model), outputs_of(loaded))


@pytest.mark.parametrize("kind", KINDS)
def test_device_map_auto_loads(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = type(model).from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(outputs_of(model), outputs_of(loaded))


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_applies_to_every_parameter(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    # The vision tokenizer inside a policy stays in fp32, as in the published bf16 runs: its codes are near-ties.
    dtypes = {name.startswith("model.vision_tokenizer."): p.dtype for name, p in loaded.named_parameters()}
    assert dtypes[False] == torch.bfloat16
    assert dtypes.get(True, torch.float32) == torch.float32
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    assert type(model).from_pretrained(tmp_path / "again", dtype="auto").dtype == torch.bfloat16
    difference = (outputs_of(loaded) - outputs_of(model)).abs()
    # A flipped code changes one row of the output by a lot; the median tells rounding from a wrong computation.
    assert difference.isfinite().all()
    assert difference.median() < 0.05


@pytest.mark.parametrize("kind", [*QUANTIZER_VARIANTS, *POLICIES])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_loading_on_cpu(kind, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs 64 weights of a row together.
    wide = {"hidden_size": 64, "head_dim": 32} if kind in QUANTIZER_VARIANTS else {"text_config": WIDE_TEXT_CONFIG}
    model = build(kind, **wide)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    assert any("bnb" in type(module).__module__ or "bitsandbytes" in type(module).__module__
               for module in loaded.modules())  # fmt: skip
    output = outputs_of(loaded)
    assert output.isfinite().all()
    assert (output - outputs_of(model)).abs().median() < 0.5


def parameters_without_gradient(model) -> set[str]:
    model.train()
    model.requires_grad_(True)
    model(**training_batch(model, batch=8)).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_gradient(kind):
    model = build(kind)
    without = parameters_without_gradient(model)
    # Self attention normalises its queries only, so the other norm of the published layout is idle.
    idle = {name for name, _ in model.named_parameters() if name.endswith("self_attention.context_norm.weight")}
    # The vision tokenizer inside a policy yields integers.
    frozen = {name for name, _ in model.named_parameters() if name.startswith("model.vision_tokenizer.")}
    # The codebook of the first stage of a task-centric quantizer.
    frozen |= {name for name, _ in model.named_parameters() if name.startswith("irrelevant_quantizer.")}
    assert without == idle | frozen


def test_idle_parameters_are_the_recorded_ones():
    meta = json.loads(shared_path("fixtures/laq/meta.json").read_text())["n4"]
    config = quantizer_config(num_spatial_layers=meta["config"]["spatial_depth"],
                              num_temporal_layers=meta["config"]["temporal_depth"])  # fmt: skip
    recorded = {name for name, norm in meta["grad_norms"].items() if norm is None and "null_kv" not in name}
    renamed = set()
    for name in recorded:
        stack, _, layer = name.split(".")[:3]
        stack = {
            "enc_spatial_transformer": "spatial_encoder",
            "enc_temporal_transformer": "temporal_encoder",
            "dec_spatial_transformer": "decoder",
        }[stack]
        assert name.endswith(".1.context_norm.gamma")
        renamed.add(f"{stack}.layers.{layer}.self_attention.context_norm.weight")
    assert parameters_without_gradient(LapaQuantizer(config)) == renamed


@pytest.mark.parametrize("kind", [*QUANTIZER_VARIANTS, *POLICIES])
def test_gradient_checkpointing_changes_nothing(kind):
    gradients = []
    for checkpointing in (False, True):
        model = build(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**training_batch(model)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("kind", [*QUANTIZER_VARIANTS, *POLICIES])
def test_sdpa_equals_eager(kind):
    model = build(kind)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(outputs_of(model))
        if kind in POLICIES:  # rows of pads see nothing; what they hold differs between implementations
            outputs[-1] = outputs[-1][training_batch(model)["attention_mask"].bool()]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", POLICIES)
def test_vision_tokenizer_of_a_policy_is_frozen(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    for policy in (model, type(model).from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in policy.model.vision_tokenizer.parameters())
        assert all(parameter.requires_grad for parameter in policy.model.layers.parameters())
