"""`lapa convert`: values equal the source, wrong input is one clear error, nothing is ever left half-written."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flax_files import read_with_msgpack, write_stream
from safetensors.torch import load_file
from shared_files import shared_path

import lapa.cli
import lapa.conversion.output_folder as output_folder
from lapa.conversion import cli
from lapa.conversion.checkpoint_mapping import QUANTIZER_TABLE, VISION_TOKENIZER_TABLE, halves_from_pairs, rename
from lapa.conversion.convert_checkpoints import convert_policy, convert_quantizer, convert_vision_tokenizer
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.processing_lapa import LapaProcessor

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "conversion_memory.py"
HEADS = {"text_config": {"num_attention_heads": 4}}
TINY_SIZES = {"hidden": 8, "inner": 12, "layers": 3, "heads": 2}
STACK = "transformer/h/scan_decoder"


def tiny_arrays(seed: int = 0, action_rows: int = 0, latent_rows: int = 4) -> dict[str, np.ndarray]:
    """A policy of the published layout: hidden 8, 3 layers, text 10, vision 6 rows."""
    generator = np.random.default_rng(seed)
    hidden, inner, layers, _ = TINY_SIZES.values()
    shapes = {}
    for table, head, rows in (
        ("wte", "lm_head", 10),
        ("vte", "vision_head", 6),
        ("dte", "delta_head", latent_rows),
        ("ate", "action_head", action_rows),
    ):
        if rows:
            shapes |= {f"transformer/{table}/embedding": (rows, hidden), f"{head}/kernel": (hidden, rows)}
    shapes |= {f"{STACK}/attention/{name}/kernel": (layers, hidden, hidden) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {f"{STACK}/feed_forward/{name}/kernel": (layers, hidden, inner) for name in ("w1", "w3")}
    shapes |= {f"{STACK}/feed_forward/w2/kernel": (layers, inner, hidden)}
    shapes |= {f"{STACK}/{name}/kernel": (layers, hidden) for name in ("attention_norm", "ffn_norm")}
    shapes["transformer/ln_f/kernel"] = (hidden,)
    return {key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


TINY_CONFIG = {"text_config": {"num_attention_heads": 2}}


@pytest.fixture
def tiny_params(tmp_path):
    return write_stream(tmp_path / "params", tiny_arrays())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def interleaved_rotation(vector: torch.Tensor, angle: float) -> torch.Tensor:
    pairs = vector.view(-1, 2)
    cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return torch.stack([pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 0] * sin + pairs[:, 1] * cos], -1).flatten()


# --- values ---


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


@pytest.mark.parametrize("file", ["n4.pt", "n1.module.pt"])
def test_quantizer_equals_the_source_and_gives_the_recorded_codes(tmp_path, file):
    name = file[:2]
    meta = json.loads(shared_path("fixtures/laq/meta.json").read_text())[name]
    source = shared_path(f"fixtures/laq/{file}")
    convert_quantizer(
        source, tmp_path / "quantizer", config={"image_size": 64, "num_latent_tokens": meta["config"]["code_seq_len"]}
    )
    quantizer = LapaQuantizer.from_pretrained(tmp_path / "quantizer")
    published = {key.removeprefix("module."): tensor for key, tensor in torch.load(source, weights_only=True).items()}
    names = {key: ours for key, ours in rename(published, QUANTIZER_TABLE, name).items() if ours is not None}
    state_dict = quantizer.state_dict()
    assert sorted(names.values()) == sorted(state_dict)
    assert all(torch.equal(published[key], state_dict[ours]) for key, ours in names.items())
    recorded = load_file(shared_path(f"fixtures/laq/{name}.io.safetensors"))
    codes = quantizer.encode(recorded["video"].transpose(1, 2)).latent_action_codes
    assert torch.equal(codes, recorded["inference_indices"].long())


def test_tables_name_every_full_size_parameter():
    quantizer = json.loads(shared_path("fixtures/laq/full_size.json").read_text())
    keys = next(value for value in quantizer.values() if isinstance(value, dict) and "vq.codebooks" in value)
    names = [name for name in rename(keys, QUANTIZER_TABLE, "laq").values() if name is not None]
    assert len(names) == len(set(names)) > 300
    vision = json.loads(shared_path("fixtures/vqgan/full_size_params.json").read_text())["params"]
    with torch.device("meta"):
        expected = LapaVisionTokenizer(LapaVisionTokenizer.config_class()).state_dict()
    renamed = rename(vision, VISION_TOKENIZER_TABLE, "vqgan")
    assert sorted(renamed.values()) == sorted(expected)
    for key, (shape, _) in vision.items():
        published = [shape[3], shape[2], *shape[:2]] if len(shape) == 4 else shape
        assert list(expected[renamed[key]].shape) == published, key


def test_jax_pickle_converts_to_the_same_weights(tmp_path):
    for suffix in (".pkl", ".frozen_jax.pkl"):
        convert_vision_tokenizer(
            shared_path(f"fixtures/vqgan/alt{suffix}"), tmp_path / suffix, config={"image_size": 16}
        )
    first, second = weights(tmp_path / ".pkl"), weights(tmp_path / ".frozen_jax.pkl")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


def test_shards_and_their_index_load(tmp_path, tiny_params):
    convert_policy(tiny_params, tmp_path / "one", config=TINY_CONFIG)
    convert_policy(tiny_params, tmp_path / "many", config=TINY_CONFIG, max_shard_bytes=1000)
    assert (tmp_path / "one" / "model.safetensors").exists()
    shards = sorted(tmp_path.glob("many/model-*.safetensors"))
    assert len(shards) > 3 and all(load_file(shard) for shard in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights(tmp_path / "one"), LapaForLatentAction.from_pretrained(tmp_path / "many").state_dict()
    assert set(index["weight_map"]) == set(one) == set(many)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)


# --- wrong input ---


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


def test_wrong_quantizer_keys_are_one_error(tmp_path):
    state_dict = torch.load(shared_path("fixtures/laq/n4.pt"), weights_only=True)
    edits = {
        "unknown keys: vq.other": {"vq.other": torch.zeros(1)},
        "1 missing: vector_quantizer.codebook": {"vq.codebooks": None},
        r"to_pixels.bias has \(3,\) instead of \(192,\)": {"to_pixels_first_frame.0.bias": torch.zeros(3)},
        "norm_out.beta would be dropped": {"enc_spatial_transformer.norm_out.beta": torch.ones(48)},
    }
    for message, edit in edits.items():
        edited = {key: tensor for key, tensor in {**state_dict, **edit}.items() if tensor is not None}
        torch.save(edited, tmp_path / "laq.pt")
        with pytest.raises(ValueError, match=message):
            convert_quantizer(tmp_path / "laq.pt", tmp_path / "out", config={"image_size": 64})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["laq.pt"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/lapa-must-not-exist",)


def test_quantizer_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "laq.pt"
    torch.save({"vq.codebooks": Hostile()}, path)
    whole = shared_path("fixtures/laq/n4.pt").read_bytes()
    for content, message in (
        (path.read_bytes(), "not a torch checkpoint"),
        (whole[: len(whole) // 2], "not a torch checkpoint"),
        (b"<html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert_quantizer(path, tmp_path / "out")
    assert not Path("/tmp/lapa-must-not-exist").exists()
    with pytest.raises(FileNotFoundError):
        convert_quantizer(tmp_path / "absent.pt", tmp_path / "out")


def test_wrong_tokenizer_and_vision_tokenizer_are_named(tmp_path, tiny_params):
    (tmp_path / "page").write_text("<html>")
    for argument in ("tokenizer", "vision_tokenizer"):
        with pytest.raises(ValueError, match="web page"):
            convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, **{argument: tmp_path / "page"})
        with pytest.raises(FileNotFoundError, match=f"`{argument}`"):
            convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, **{argument: tmp_path / "absent"})
    with pytest.raises(ValueError, match="no converted vision tokenizer"):
        convert_policy(tiny_params, tmp_path / "p", config=TINY_CONFIG, vision_tokenizer=tmp_path)


# --- the output folder ---


def test_existing_output_is_replaced_only_on_request_and_only_if_converted(tmp_path, tiny_params):
    output = tmp_path / "policy"
    output.mkdir()
    convert_policy(tiny_params, output, config=TINY_CONFIG)  # an empty folder is no obstacle
    before = weights(output)
    other = write_stream(tmp_path / "other", tiny_arrays(seed=1))
    with pytest.raises(ValueError, match="--overwrite"):
        convert_policy(other, output, config=TINY_CONFIG)
    assert torch.equal(weights(output)["lm_head.weight"], before["lm_head.weight"])
    convert_policy(other, output, config=TINY_CONFIG, overwrite=True)
    assert not torch.equal(weights(output)["lm_head.weight"], before["lm_head.weight"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no earlier conversion"):
        convert_policy(other, tmp_path / "mine", config=TINY_CONFIG, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        convert_policy(other, other, config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other", "params", "policy"]


def test_verification_finds_a_changed_byte_and_discards_the_folder(tmp_path, tiny_params, monkeypatch):
    real = output_folder.save_file

    def corrupt(tensors, path, metadata=None):
        real(tensors, path, metadata=metadata)
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    monkeypatch.setattr(output_folder, "save_file", corrupt)
    with pytest.raises(ValueError, match="differs from its source"):
        convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, tiny_params, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"nothing was left behind.*needs 0.00 GB"):
            convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output_folder, "save_file", full)
    with pytest.raises(OSError, match=r"nothing was left behind.*No space left"):
        convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]


def test_run_after_kill_succeeds_and_cleans_up(tmp_path, tiny_params):
    # A conversion that hangs after its first shard, killed there.
    code = (
        "import sys, time; import lapa.conversion.output_folder as folder\n"
        "from lapa.conversion.convert_checkpoints import convert_policy\n"
        "folder.verify_weights = time.sleep\n"
        "import lapa.conversion.convert_checkpoints as module\n"
        "module.verify_weights = lambda *args: (print('written', flush=True), time.sleep(600))\n"
        "convert_policy(sys.argv[1], sys.argv[2], config={'text_config': {'num_attention_heads': 2}})\n"
    )
    output = tmp_path / "policy"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_params), str(output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"written\n"
    with pytest.raises(ValueError, match=f"still running .process {process.pid}"):
        convert_policy(tiny_params, output, config=TINY_CONFIG)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and len(list(tmp_path.glob("policy.partial-*/model.safetensors"))) == 1
    convert_policy(tiny_params, output, config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params", "policy"]
    assert LapaForLatentAction.from_pretrained(output)


def test_memory_does_not_follow_the_file(tmp_path):
    sizes = {"hidden-size": 768, "intermediate-size": 2048, "num-layers": 16, "num-heads": 8, "text-vocab-size": 1000}
    sizes |= {"vision-vocab-size": 500, "max-shard-bytes": 2 * 10**7, "chunk-bytes": 6 * 10**7}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARK), "--folder", str(tmp_path / "scratch"), *arguments]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["file_bytes"] > 220_000_000
    assert report["peak_bytes"] - report["imports_bytes"] < report["file_bytes"] / 2


# --- command line ---


def run_cli(*arguments) -> int:
    return cli.main(list(map(str, arguments)))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tiny_params, capsys):
    tiny_params.write_bytes(tiny_params.read_bytes()[:-5])
    none = ["--vision-tokenizer", "none", "--tokenizer", "none"]
    for checkpoint, message in ((tiny_params, "truncated"), (tmp_path / "absent", "No such file")):
        arguments = ["convert", "policy", "--checkpoint", str(checkpoint), *none, "--output", str(tmp_path / "p")]
        assert lapa.cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error and str(checkpoint) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]


def test_command_line_converts_and_prints_what_it_checked(tmp_path, tiny_params, capsys):
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(TINY_CONFIG))
    none = ("--vision-tokenizer", "none", "--tokenizer", "none")
    assert run_cli("policy", "--checkpoint", tiny_params, *none, "--config", sizes, "--output", tmp_path / "p") == 0
    count = sum(array.size for array in tiny_arrays().values())
    assert f"30 tensors, {count:,} parameters, {4 * count:,} bytes written and compared" in capsys.readouterr().out
    assert json.loads((tmp_path / "p" / "config.json").read_text())["vision_tokenizer_config"] is None
    with pytest.raises(ValueError, match="--tokenizer must be given"):
        run_cli("policy", "--checkpoint", tiny_params, *none[:2], "--output", tmp_path / "q")
    with pytest.raises(ValueError, match="do not say --checkpoint"):
        run_cli("policy", "--checkpoint", tiny_params, "--repo", "a/b", "--output", tmp_path / "q")
    sizes.write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        run_cli("policy", "--checkpoint", tiny_params, *none, "--config", sizes, "--output", tmp_path / "q")
    sizes.write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        run_cli("policy", "--checkpoint", tiny_params, *none, "--config", sizes, "--output", tmp_path / "q")


def test_command_line_converts_quantizer_and_vision_tokenizer(tmp_path):
    (tmp_path / "sizes.json").write_text('{"image_size": 64}')
    run_cli("quantizer", "--checkpoint", shared_path("fixtures/laq/n4.pt"), "--config", tmp_path / "sizes.json",
            "--output", tmp_path / "q", "--dtype", "bfloat16")  # fmt: skip
    run_cli("vision-tokenizer", "--checkpoint", shared_path("fixtures/e2e/vqgan.pkl"), "--output", tmp_path / "v")
    assert LapaQuantizer.from_pretrained(tmp_path / "q").dtype == torch.bfloat16
    assert LapaVisionTokenizer.from_pretrained(tmp_path / "v").config.codebook_size == 512


def cached_repository(cache: Path, repo: str, files: dict[str, Path]) -> Path:
    """A Hub cache as huggingface_hub leaves it: blobs by checksum, links in a snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for name, source in files.items():
        content = source.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return root


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def released_size_quantizer(path: Path) -> Path:
    """A narrow quantizer for frames and patches of the released size."""
    state_dict = torch.load(shared_path("fixtures/laq/n4.pt"), weights_only=True)
    for key in (
        "to_patch_emb_first_frame.1.weight",
        "to_patch_emb_first_frame.1.bias",
        "to_pixels_first_frame.0.bias",
    ):
        state_dict[key] = torch.randn(3072)
    state_dict["to_patch_emb_first_frame.2.weight"] = torch.randn(48, 3072)
    state_dict["to_pixels_first_frame.0.weight"] = torch.randn(3072, 48)
    torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("with_quantizer", [False, True])
def test_repository_converts_offline_from_a_prepared_cache(tmp_path, hub_cache, with_quantizer, capsys):
    files = {
        "params": shared_path("fixtures/e2e/delta.params"),
        "vqgan": shared_path("fixtures/e2e/vqgan.pkl"),
        "tokenizer.model": shared_path("fixtures/tokenizer/tiny.tokenizer.model"),
    }
    if with_quantizer:
        files["laq_openx.pt"] = released_size_quantizer(tmp_path / "laq.pt")
    root = cached_repository(hub_cache, "someone/tiny", files)
    (tmp_path / "sizes.json").write_text('{"text_config": {"num_attention_heads": 2}}')
    arguments = ("policy", "--repo", "someone/tiny", "--config", tmp_path / "sizes.json", "--output", tmp_path / "p")
    assert run_cli(*arguments) == 0
    model = LapaForLatentAction.from_pretrained(tmp_path / "p")
    assert model.config.vision_tokenizer_config.codebook_size == 512
    assert LapaProcessor.from_pretrained(tmp_path / "p").num_image_tokens == 256
    quantizer_weights = tmp_path / "p" / "quantizer" / "model.safetensors"
    assert quantizer_weights.exists() == with_quantizer
    if with_quantizer:
        assert model.config.quantizer_hash == hashlib.sha256(quantizer_weights.read_bytes()).hexdigest()
        assert LapaQuantizer.from_pretrained(tmp_path / "p" / "quantizer").config.patch_size == 32
    # A damaged download is noticed.
    blob = root / "blobs" / hashlib.sha256(files["vqgan"].read_bytes()).hexdigest()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="vqgan is damaged"):
        run_cli(*arguments, "--overwrite")


def test_absent_repository_file_is_named(tmp_path, hub_cache):
    cached_repository(hub_cache, "someone/tiny", {"params": shared_path("fixtures/e2e/delta.params")})
    with pytest.raises(FileNotFoundError, match="vqgan of someone/tiny"):
        run_cli("policy", "--repo", "someone/tiny", "--output", tmp_path / "p")
    with pytest.raises(ValueError, match="no repository id"):
        run_cli("policy", "--repo", "a/b/c/d", "--output", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_small_git_files_are_checked_too(tmp_path):
    content = b"hello\n"
    path = tmp_path / hashlib.sha1(b"blob 6\0" + content).hexdigest()
    path.write_bytes(content)
    cli.check_sum(path)
    path.write_bytes(b"hallo\n")
    with pytest.raises(ValueError, match="damaged"):
        cli.check_sum(path)


def test_result_is_pushed_on_request(tmp_path, tiny_params, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **kwargs: calls.append(repo))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **kwargs: calls.append((kwargs["repo_id"], sorted(os.listdir(kwargs["folder_path"])))),
    )
    (tmp_path / "sizes.json").write_text(json.dumps(TINY_CONFIG))
    run_cli("policy", "--checkpoint", tiny_params, "--vision-tokenizer", "none", "--tokenizer", "none", "--config",
            tmp_path / "sizes.json", "--output", tmp_path / "p", "--push-to", "me/policy")  # fmt: skip
    assert calls == ["me/policy", ("me/policy", ["config.json", "conversion.json", "model.safetensors"])]
