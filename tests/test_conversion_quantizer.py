"""`lapa convert quantizer` and `vision-tokenizer`: values equal the source, wrong input is one clear error."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_files import shared_path
from tiny_checkpoints import weights

from lapa.conversion.checkpoint_mapping import QUANTIZER_TABLE, VISION_TOKENIZER_TABLE, rename
from lapa.conversion.convert_checkpoints import convert_quantizer, convert_vision_tokenizer
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer


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
