"""The published code's recordings, converted with our own converter."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from shared_files import shared_path

from lapa.conversion.convert_checkpoints import convert_policy, convert_quantizer, convert_vision_tokenizer

# Removed when the process ends.
_FOLDER = TemporaryDirectory(prefix="lapa-recordings-")


def _scratch() -> Path:
    return Path(_FOLDER.name)


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(shared_path(f"fixtures/{name}.safetensors"))


def meta(folder: str) -> dict[str, Any]:
    return json.loads(shared_path(f"fixtures/{folder}/meta.json").read_text())


def quantizer_sizes(name: str) -> dict[str, Any]:
    """Our config fields for a recorded quantizer's constructor arguments."""
    recorded = meta("laq")[name]["config"]
    return {
        "hidden_size": recorded["dim"],
        "codebook_dim": recorded["quant_dim"],
        "codebook_size": recorded["codebook_size"],
        "num_latent_tokens": recorded["code_seq_len"],
        "image_size": recorded["image_size"],
        "patch_size": recorded["patch_size"],
        "num_spatial_layers": recorded["spatial_depth"],
        "num_temporal_layers": recorded["temporal_depth"],
        "num_attention_heads": recorded["heads"],
        "head_dim": recorded["dim_head"],
    }


@cache
def quantizer_folder(name: str) -> Path:
    """`n4` and `n1` as they were saved; the others saved here from their state dicts."""
    suffixes = {"n4": "n4.pt", "n1": "n1.module.pt"}
    if name in suffixes:
        checkpoint = shared_path(f"fixtures/laq/{suffixes[name]}")
    else:
        state = tensors(f"laq/{name}.weights")
        # The recordings leave out empty tensors, which a saved state dict holds.
        for key, (shape, _) in meta("laq")[name]["state_dict_names"].items():
            state.setdefault(key, torch.zeros(shape))
        checkpoint = _scratch() / f"{name}.pt"
        torch.save(state, checkpoint)
    convert_quantizer(checkpoint, _scratch() / name, config=quantizer_sizes(name))
    return _scratch() / name


def text_config(recorded: dict[str, Any]) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    )  # fmt: skip
    return {name: recorded[name] for name in names} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": float(recorded["theta"])}
    }


@cache
def policy_folder(tag: str, params: str) -> Path:
    """`delta` (latent) or `delta_action` (latent and action) of the policy recordings."""
    recorded = meta("delta_llama")["base_config"]
    sizes = {"text_config": text_config(recorded), "vision_vocab_size": recorded["vision_vocab_size"]}
    output = _scratch() / f"{tag}-{params}"
    checkpoint = shared_path(f"fixtures/delta_llama/{tag}.params.{params}")
    convert_policy(checkpoint, vision_tokenizer=None, tokenizer=None, output=output, config=sizes)
    return output


def to_id_space(tokens: torch.Tensor, vision: Any, latent: Any, action: Any, config: Any) -> torch.Tensor:
    """Recorded tokens, which count from 0 in every vocabulary, in the one id space."""
    ids = tokens.long()
    for mask, offset in (
        (vision, config.vision_offset),
        (latent, config.latent_offset),
        (action, config.action_offset),
    ):
        if mask is not None:
            ids = torch.where(mask.bool(), tokens.long() + offset, ids)
    return ids


@cache
def end_to_end_folder(kind: str) -> Path:
    """The end-to-end recording's model with tokenizer and vision tokenizer: `latent` or `action`."""
    recorded = meta("e2e")
    vqgan = recorded["vqgan_config"]
    vision = _scratch() / "e2e-vision"
    if not vision.exists():
        convert_vision_tokenizer(
            shared_path("fixtures/e2e/vqgan.pkl"),
            vision,
            config={
                "image_size": vqgan["resolution"],
                "base_channels": vqgan["hidden_channels"],
                "channel_multipliers": vqgan["channel_mult"],
                "num_res_blocks": vqgan["num_res_blocks"],
                "latent_channels": vqgan["z_channels"],
                "codebook_size": vqgan["num_embeddings"],
                "codebook_dim": vqgan["quantized_embed_dim"],
            },
        )
    checkpoint = shared_path("fixtures/e2e/delta.params")
    if kind == "action":
        checkpoint = _with_action_arrays(checkpoint)
    llama = recorded["llama_config"]
    output = _scratch() / f"e2e-{kind}"
    convert_policy(
        checkpoint,
        vision_tokenizer=vision,
        tokenizer=shared_path("fixtures/tokenizer/tiny.tokenizer.model"),
        output=output,
        config={"text_config": text_config(llama), "vision_vocab_size": llama["vision_vocab_size"]},
    )
    return output


def _with_action_arrays(checkpoint: Path) -> Path:
    """The stream with the separately recorded action arrays appended, as a finetuned checkpoint has them."""
    import msgpack

    path = _scratch() / "e2e-action.params"
    with path.open("wb") as file:
        file.write(checkpoint.read_bytes())
        for key, tensor in tensors("e2e/action_extra_params").items():
            array = msgpack.packb((list(tensor.shape), "float32", tensor.numpy().tobytes()), use_bin_type=True)
            file.write(msgpack.packb((key.split("/"), msgpack.packb(msgpack.ExtType(1, array)))))
    return path
