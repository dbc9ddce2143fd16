"""`lapa convert` on the command line: local files, repositories of the Hub, and what the user is told."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from flax_files import write_stream
from hub_folders import cached_repository
from shared_files import shared_path
from tiny_checkpoints import TINY_CONFIG, tiny_arrays

import lapa.cli
from lapa.conversion import cli
from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.processing_lapa import LapaProcessor


@pytest.fixture
def tiny_params(tmp_path):
    return write_stream(tmp_path / "params", tiny_arrays())


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
