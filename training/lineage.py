"""Which quantizer labelled what, and which latent-pretrained model a policy came from: recorded and checked by hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.training.label_latent_actions import hash_weights

INDEX_FILE = "model.safetensors.index.json"


def hash_model(folder: str | Path) -> str:
    """SHA-256 of a model folder's weights: of `model.safetensors`, or of the hashes of its parts in their order."""
    index = Path(folder) / INDEX_FILE
    if not index.is_file():
        return hash_weights(folder)
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    digest = hashlib.sha256()
    for name in files:
        part = hashlib.sha256()
        with (Path(folder) / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                part.update(chunk)
        digest.update(part.digest())
    return digest.hexdigest()


def model_name(folder: str | Path) -> str:
    """Name of a model's folder, as records show it."""
    return Path(folder).resolve().name


def record_quantizer(config: LapaConfig, quantizer_hash: str, name: str | None = None, replace: bool = False) -> None:
    """
    Writes into a policy's config whose codes it learns.

    Args:
        config: Config of the policy.
        quantizer_hash: SHA-256 of the quantizer, as its labels state it.
        name: Its name, where that is known.
        replace: Whether a policy that learned another quantizer's codes may learn these instead.

    Raises:
        ValueError: A policy that learned another quantizer's codes, without `replace`.
    """
    if config.quantizer_hash not in (None, quantizer_hash):
        if not replace:
            raise ValueError(
                f"the labels come from the quantizer {_short(quantizer_hash)}, but `model` was trained on the codes of "
                f"{config.quantizer_name or ''} {_short(config.quantizer_hash)}: the same code means something else. Label "
                "with that quantizer, or pass `replace_quantizer` to learn the new codes instead."
            )
        config.quantizer_name = None
    config.quantizer_hash = quantizer_hash
    config.quantizer_name = name or config.quantizer_name


def check_quantizer(config: LapaConfig, folder: str | Path, argument: str = "quantizer") -> None:
    """
    Refuses a quantizer whose codes are not those of a policy.

    Args:
        config: Config of the policy.
        folder: The quantizer.
        argument: Name of the argument that gave it, for the message.

    Raises:
        ValueError: Another quantizer than the one that the policy was trained with, or another number of codes.
    """
    values: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for ours, theirs in (("latent_vocab_size", "codebook_size"), ("num_latent_tokens", "num_latent_tokens")):
        if values.get(theirs) not in (None, getattr(config, ours)):
            raise ValueError(
                f"`{argument}` ({folder}) has `{theirs}` {values[theirs]}, but the policy has `{ours}` "
                f"{getattr(config, ours)}."
            )
    found = hash_weights(folder)
    if config.quantizer_hash not in (None, found):
        raise ValueError(
            f"`{argument}` ({folder}) is the quantizer {_short(found)}, but the policy was trained on the codes of "
            f"{config.quantizer_name or 'another one'}, {_short(config.quantizer_hash)}."
        )


def record_latent_policy(config: LapaConfig, folder: str | Path) -> None:
    """Writes into the config of an action model which latent-pretrained model it came from, if `folder` is one.

    Finetuning a finetuned model keeps what that has recorded.
    """
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if not values.get("has_action_segment", False):
        config.latent_policy_hash = hash_model(folder)
        config.latent_policy_name = model_name(folder)


def _short(sha256: str) -> str:
    return f"`{sha256[:12]}`"


__all__ = ["check_quantizer", "hash_model", "model_name", "record_latent_policy", "record_quantizer"]
