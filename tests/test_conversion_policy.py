"""`lapa convert policy`: values equal the source, wrong input is one clear error."""

import json

import numpy as np
import pytest
import torch
from flax_files import read_with_msgpack, write_stream
from safetensors.torch import load_file
from shared_files import shared_path
from tiny_checkpoints import STACK, TINY_CONFIG, tiny_arrays, weights

from lapa.conversion.checkpoint_mapping import halves_from_pairs
from lapa.conversion.convert_checkpoints import convert_policy, convert_vision_tokenizer
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.processing.processing_lapa import LapaProcessor

HEADS = {"text_config": {"num_attention_heads": 4}}


@pytest.fixture
def tiny_params(tmp_path):
    return write_stream(tmp_path / "params", tiny_arrays())


def interleaved_rotation(vector: torch.Tensor, angle: float) -> torch.Tensor:
    pairs = vector.view(-1, 2)
    cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return torch.stack([pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 0] * sin + pairs[:, 1] * cos], -1).flatten()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tree", ["delta", "delta_action"])
def test_policy_equals_the_source_arrays(tmp_path, tree, dtype):
    source = shared_path(f"fixtures/delta_llama/{tree}.params.{dtype}")
    report = convert_policy(source, tmp_path / "policy", config=HEADS)
    arrays, tensors = read_with_msgpack(source), weights(tmp_path / "policy")
    tables = ["wte", "vte", "dte"] + ["ate"] * (tree == "delta_action")
    heads = ["lm_head", "vision_head", "delta_head"] + ["action_head"] * (tree == "delta_action")
    embedding = torch.cat([arrays[f"transformer/{table}/embedding"] for table in tables])
    assert torch.equal(tensors.pop("model.embed_tokens.weight"), embedding)
    assert torch.equal(tensors.pop("lm_head.weight"), torch.cat([arrays[f"{head}/kernel"].T for head in heads]))
    assert torch.equal(tensors.pop("model.norm.weight"), arrays["transformer/ln_f/kernel"])
    plain = {
        "self_attn.v_proj": "attention/wv",
        "self_attn.o_proj": "attention/wo",
        "mlp.gate_proj": "feed_forward/w1",
        "mlp.up_proj": "feed_forward/w3",
        "mlp.down_proj": "feed_forward/w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    # Rows of a head of 16: 0, 2, ..., 14, 1, 3, ..., 15.
    rows = [head * 16 + row for head in range(4) for row in (*range(0, 16, 2), *range(1, 16, 2))]
    for layer in range(2):
        for ours, published in plain.items():
            array = arrays[f"{STACK}/{published}/kernel"][layer]
            assert torch.equal(
                tensors.pop(f"model.layers.{layer}.{ours}.weight"), array.T if array.ndim == 2 else array
            )
        for ours, published in (("q_proj", "wq"), ("k_proj", "wk")):
            array = arrays[f"{STACK}/attention/{published}/kernel"][layer]
            assert torch.equal(tensors.pop(f"model.layers.{layer}.self_attn.{ours}.weight"), array.T[rows])
    assert not tensors
    assert report.num_parameters == sum(array.numel() for array in arrays.values())


def test_halves_from_pairs_makes_both_rotations_equal():
    weight, hidden = torch.randn(8, 5), torch.randn(5)
    published = torch.cat([interleaved_rotation(head, 0.3) for head in (weight @ hidden).view(2, 4)])
    ours = (halves_from_pairs(weight, head_dim=4) @ hidden).view(2, 2, 2)
    cos, sin = np.cos(0.3), np.sin(0.3)
    rotated = torch.stack([ours[:, 0] * cos - ours[:, 1] * sin, ours[:, 0] * sin + ours[:, 1] * cos], 1)
    # back from halves to pairs
    torch.testing.assert_close(rotated.transpose(1, 2).flatten(), published)


@pytest.mark.parametrize("tree", ["delta", "delta_action"])
def test_converted_policy_gives_the_recorded_logits(tmp_path, tree):
    convert_policy(shared_path(f"fixtures/delta_llama/{tree}.params.fp32"), tmp_path / "policy", config=HEADS)
    model_class = LapaForActionPrediction if tree == "delta_action" else LapaForLatentAction
    model = model_class.from_pretrained(tmp_path / "policy").eval()
    recorded = load_file(shared_path(f"fixtures/delta_llama/{tree}.forward.safetensors"))
    ids = recorded["input_ids"].long()
    for segment, mask in (("vision", "vision_masks"), ("latent", "delta_masks"), ("action", "action_masks")):
        if mask in recorded:
            ids = ids + recorded[mask].long() * model.config.segment(segment)[0]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=recorded["attention_mask"].long()).logits
    valid = recorded["attention_mask"].bool()
    names = {"text": "text_logits", "vision": "vision_logits", "latent": "delta_logits", "action": "action_logits"}
    for segment, name in names.items():
        if name in recorded:
            start, end = model.config.segment(segment)
            torch.testing.assert_close(logits[..., start:end][valid], recorded[name][valid], atol=1e-4, rtol=0)


def test_policy_with_vision_tokenizer_and_tokenizer_predicts_the_recorded_codes(tmp_path):
    convert_vision_tokenizer(shared_path("fixtures/e2e/vqgan.pkl"), tmp_path / "vision")
    convert_policy(
        shared_path("fixtures/e2e/delta.params"),
        tmp_path / "policy",
        vision_tokenizer=tmp_path / "vision",
        tokenizer=shared_path("fixtures/tokenizer/tiny.tokenizer.model"),
        config={"text_config": {"num_attention_heads": 2}},
    )
    meta = json.loads(shared_path("fixtures/e2e/meta.json").read_text())["delta"]
    model = LapaForLatentAction.from_pretrained(tmp_path / "policy").eval()
    processor = LapaProcessor.from_pretrained(tmp_path / "policy")
    inputs = processor(
        images=str(shared_path("data/lapa/bridge_inference.jpg")), instruction=meta["question"], return_tensors="pt"
    )
    assert model.predict_latent_action(**inputs).tolist() == meta["greedy"]


def test_vision_tokenizer_in_a_bfloat16_policy_stays_float32(tmp_path):
    convert_policy(
        shared_path("fixtures/e2e/delta.params"),
        tmp_path / "policy",
        vision_tokenizer=shared_path("fixtures/e2e/vqgan.pkl"),
        config={"text_config": {"num_attention_heads": 2}},
        dtype=torch.bfloat16,
    )
    model = LapaForLatentAction.from_pretrained(tmp_path / "policy")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.vision_tokenizer.parameters()} == {torch.float32}


def test_unstacked_layers_convert_to_the_same_weights(tmp_path, tiny_params):
    arrays = tiny_arrays()
    unstacked = {}
    for key, array in arrays.items():
        if key.startswith(STACK):
            unstacked |= {key.replace("scan_decoder", str(layer)): array[layer] for layer in range(len(array))}
        else:
            unstacked[key] = array
    convert_policy(tiny_params, tmp_path / "stacked", config=TINY_CONFIG)
    convert_policy(write_stream(tmp_path / "params2", unstacked), tmp_path / "unstacked", config=TINY_CONFIG)
    first, second = weights(tmp_path / "stacked"), weights(tmp_path / "unstacked")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_missing_latent_rows_are_drawn_and_recorded(tmp_path, capsys):
    arrays = tiny_arrays(latent_rows=0)
    params = write_stream(tmp_path / "params", arrays)
    report = convert_policy(params, tmp_path / "policy", config={**TINY_CONFIG, "latent_vocab_size": 500})
    assert "no latent rows" in str(report)
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["fresh_segments"] == ["latent"] and config["latent_vocab_size"] == 500
    embedding = weights(tmp_path / "policy")["model.embed_tokens.weight"]
    assert torch.equal(embedding[:10], torch.from_numpy(arrays["transformer/wte/embedding"]))
    assert embedding.shape == (516, 8) and abs(embedding[16:].std().item() / 0.02 - 1) < 0.05
    convert_policy(params, tmp_path / "again", config={**TINY_CONFIG, "latent_vocab_size": 500})
    assert torch.equal(embedding, weights(tmp_path / "again")["model.embed_tokens.weight"])


def test_class_follows_the_action_rows(tmp_path):
    convert_policy(write_stream(tmp_path / "params", tiny_arrays(action_rows=5)), tmp_path / "p", config=TINY_CONFIG)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["architectures"] == ["LapaForActionPrediction"] and config["has_action_segment"]
    assert config["action_vocab_size"] == 5 and config["rope_in_model_dtype"] and config["dtype"] == "float32"
    assert LapaForActionPrediction.from_pretrained(tmp_path / "p").lm_head.weight.shape == (25, 8)


def test_dtype_is_kept_or_changed(tmp_path, tiny_params):
    convert_policy(tiny_params, tmp_path / "half", config=TINY_CONFIG, dtype=torch.bfloat16)
    convert_policy(tiny_params, tmp_path / "full", config=TINY_CONFIG)
    half, full = weights(tmp_path / "half"), weights(tmp_path / "full")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tables_of_different_dtypes_join_without_loss(tmp_path):
    arrays = tiny_arrays()
    bits = (arrays["transformer/wte/embedding"].view(np.uint32) >> 16).astype(np.uint16)
    params = write_stream(tmp_path / "params", {**arrays, "transformer/wte/embedding": (bits, "bfloat16")})
    convert_policy(params, tmp_path / "policy", config=TINY_CONFIG)
    embedding = weights(tmp_path / "policy")["model.embed_tokens.weight"]
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding[16:], torch.from_numpy(arrays["transformer/dte/embedding"]))


def drop(key):
    return lambda arrays: arrays.pop(key)


def add(key, shape):
    return lambda arrays: arrays.__setitem__(key, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("transformer/wte/embedding"), "1 missing: transformer/wte/embedding"),
        (drop("delta_head/kernel"), "missing: delta_head/kernel"),
        (drop(f"{STACK}/feed_forward/w3/kernel"), f"missing: {STACK}/feed_forward/w3/kernel"),
        (add("transformer/extra/kernel", (3,)), "unknown: transformer/extra/kernel"),
        (
            add(f"{STACK}/feed_forward/w2/kernel", (3, 11, 8)),
            r"mlp.down_proj.weight has \(8, 11\) instead of \(8, 12\)",
        ),
        (add(f"{STACK}/attention/wv/kernel", (2, 8, 8)), "wv/kernel has shape .* instead of 3 layers"),
        (add("lm_head/kernel", (8, 9)), r"lm_head/kernel has \(9, 8\)"),
        (add("vision_head/kernel", (7, 6)), "cannot be joined"),
        (add("transformer/ate/embedding", (5, 8)), "missing: action_head/kernel"),
        (add("transformer/wte/embedding", ()), r"wte/embedding has shape \(\), expected 2 axes"),
    ],
)
def test_wrong_policy_keys_are_one_error_and_leave_nothing(tmp_path, edit, message):
    arrays = tiny_arrays()
    edit(arrays)
    params = write_stream(tmp_path / "params", arrays)
    with pytest.raises(ValueError, match=message):
        convert_policy(params, tmp_path / "out" / "policy", config=TINY_CONFIG)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_sise": 3}, "Unknown configuration keys: hidden_sise"),
        ({"text_config": {"num_heads": 3}}, "Unknown configuration keys: num_heads"),
        ({"text_config": {"num_attention_heads": 2, "hidden_size": 16}}, "`hidden_size` is 16 .* but 8 in"),
        ({**TINY_CONFIG, "vision_vocab_size": 7}, "`vision_vocab_size` is 7 .* but 6 in"),
        ({"text_config": 5}, "must be an object, got 5"),
        ({**TINY_CONFIG, "fresh_segments": ["latent"]}, "`fresh_segments` is .* but None in"),
        ({}, "`text_config.num_attention_heads` must be given"),
        ({"text_config": {"num_attention_heads": 3}}, "attention heads"),
    ],
)
def test_wrong_policy_sizes_are_one_error(tmp_path, tiny_params, config, message):
    with pytest.raises(ValueError, match=message):
        convert_policy(tiny_params, tmp_path / "policy", config=config)
    assert not (tmp_path / "policy").exists()


def test_wrong_tokenizer_and_vision_tokenizer_are_named(tmp_path, tiny_params):
    (tmp_path / "page").write_text("<html>")
    for argument in ("tokenizer", "vision_tokenizer"):
        with pytest.raises(ValueError, match="web page"):
            convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, **{argument: tmp_path / "page"})
        with pytest.raises(FileNotFoundError, match=f"`{argument}`"):
            convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, **{argument: tmp_path / "absent"})
    with pytest.raises(ValueError, match="no converted vision tokenizer"):
        convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, vision_tokenizer=tmp_path)
