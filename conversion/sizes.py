"""Sizes: read from the arrays, compared with what the user gives, checked by the configuration."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig

from lapa.configuration.configuration_lapa import RELEASED_TEXT_CONFIG
from lapa.conversion.checkpoint_mapping import POLICY_SEGMENTS, SINGLE_LAYER, STACKED_LAYERS
from lapa.conversion.flax_stream import FlaxStream

ConfigType = TypeVar("ConfigType", bound=PreTrainedConfig)


def read_sizes(path: str | Path | None) -> dict[str, Any] | None:
    """Reads a JSON file of configuration fields; None stays None."""
    if path is None:
        return None
    try:
        sizes = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` is not a JSON file: {path}: {error}") from error
    if not isinstance(sizes, dict):
        raise ValueError(f"`config` must hold a JSON object of configuration fields: {path}.")
    return sizes


def merge_sizes(
    config_class: type[PreTrainedConfig], given: Mapping[str, Any] | None, found: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Sizes the user gave and sizes read from the arrays; unknown names and contradictions are errors."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"Configuration fields of {config_class.__name__} must be an object, got {given!r}.")
    given = dict(given or {})
    known = set(config_class.__annotations__) | set(RELEASED_TEXT_CONFIG if config_class is LlamaConfig else ())
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"Unknown configuration keys: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    for name, value in found.items():
        if name in given and _as_list(given[name]) != _as_list(value):
            raise ValueError(f"`{name}` is {given[name]} in the configuration, but {value} in {source}.")
    return {**given, **found}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_sizes(
    shapes: Mapping[str, tuple[int, ...]], sources: Iterable[tuple[str, str, int, int]], source: str
) -> dict[str, int]:
    """Sizes by name out of (name, key, axis, number of axes); absent keys give none and are reported later."""
    sizes = {}
    for name, key, axis, num_axes in sources:
        if key in shapes:
            if len(shapes[key]) != num_axes:
                raise ValueError(f"{source}: {key} has shape {tuple(shapes[key])}, expected {num_axes} axes.")
            sizes[name] = shapes[key][axis]
    return sizes


def build_config(config_class: type[ConfigType], sizes: Mapping[str, Any]) -> ConfigType:
    try:
        return config_class(**sizes)
    except StrictDataclassError as error:
        # The last line says what is wrong, the ones before which validator found it.
        raise ValueError(str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")) from error


def quantizer_sizes(state_dict: Mapping[str, torch.Tensor], source: str) -> dict[str, int]:
    """What can be read from the arrays: all but `image_size` and `num_latent_tokens` (and patches that are no square)."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    sources = (
        ("hidden_size", "to_patch_emb_first_frame.2.weight", 0, 2),
        ("patch_dim", "to_patch_emb_first_frame.2.weight", 1, 2),
        ("codebook_size", "vq.codebooks", 0, 2),
        ("codebook_dim", "vq.codebooks", 1, 2),
        ("head_dim", "enc_spatial_transformer.layers.0.1.q_scale", 0, 1),
        ("num_attention_heads", "spatial_rel_pos_bias.net.2.weight", 0, 2),
        ("num_null_rows", "dec_spatial_transformer.layers.0.2.null_kv", 1, 3),
    )
    sizes = _read_sizes(shapes, sources, source)
    if "num_null_rows" in sizes:
        # Keys and values alternate.
        sizes["num_null_key_values"] = sizes.pop("num_null_rows") // 2
    patch_dim = sizes.pop("patch_dim", 0)
    if patch_dim and 3 * (side := math.isqrt(patch_dim // 3)) ** 2 == patch_dim:
        sizes["patch_size"] = side
    for name, stack in (
        ("num_spatial_layers", "enc_spatial_transformer"),
        ("num_temporal_layers", "enc_temporal_transformer"),
    ):
        if layers := {key.split(".")[2] for key in shapes if key.startswith(f"{stack}.layers.")}:
            sizes[name] = len(layers)
    return sizes


def vision_tokenizer_sizes(arrays: Mapping[str, torch.Tensor], source: str) -> dict[str, Any]:
    """What can be read from the arrays: all but `image_size` and `num_norm_groups`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in arrays.items()}
    sources = (
        ("num_channels", "encoder/Conv_0/kernel", 2, 4),
        ("base_channels", "encoder/Conv_0/kernel", 3, 4),
        ("latent_channels", "encoder/Conv_1/kernel", 3, 4),
        ("codebook_size", "quantize/embeddings", 0, 2),
        ("codebook_dim", "quantize/embeddings", 1, 2),
    )
    sizes: dict[str, Any] = dict(_read_sizes(shapes, sources, source))
    levels = {key.split("/")[1] for key in shapes if key.startswith("encoder/DownsamplingBlock_")}
    kernels = [f"encoder/DownsamplingBlock_{level}/ResnetBlock_0/Conv_0/kernel" for level in range(len(levels))]
    widths = _read_sizes(shapes, ((key, key, 3, 4) for key in kernels), source)
    if widths and sizes.get("base_channels") and len(widths) == len(levels):
        sizes["channel_multipliers"] = [width // sizes["base_channels"] for width in widths.values()]
        blocks = {key.split("/")[2] for key in shapes if key.startswith("encoder/DownsamplingBlock_0/ResnetBlock_")}
        sizes["num_res_blocks"] = len(blocks)
    return sizes


def policy_sizes(stream: FlaxStream) -> tuple[dict[str, int], dict[str, Any]]:
    """What can be read from the arrays, of the trunk and of the rest: all but the number of heads."""
    shapes = {key: entry.shape for key, entry in stream.entries.items()}
    embeddings = {segment: embedding for segment, (embedding, _) in POLICY_SEGMENTS.items()}
    stacked = any(key.startswith(f"{STACKED_LAYERS}/") for key in shapes)
    up_projection = f"{STACKED_LAYERS if stacked else SINGLE_LAYER.format(layer=0)}/feed_forward/w1/kernel"
    text_sources = [
        ("vocab_size", embeddings["text"], 0, 2),
        ("hidden_size", embeddings["text"], 1, 2),
        ("intermediate_size", up_projection, -1, 3 if stacked else 2),
        *([("num_hidden_layers", up_projection, 0, 3)] if stacked else []),
    ]
    text_sizes = _read_sizes(shapes, text_sources, str(stream.path))
    if not stacked:
        prefix = SINGLE_LAYER.format(layer="")
        text_sizes["num_hidden_layers"] = len(
            {key.removeprefix(prefix).split("/")[0] for key in shapes if key.startswith(prefix)}
        )
    sources = ((f"{name}_vocab_size", embeddings[name], 0, 2) for name in ("vision", "latent", "action"))
    sizes: dict[str, Any] = dict(_read_sizes(shapes, sources, str(stream.path)))
    sizes["has_action_segment"] = any(key in shapes for key in POLICY_SEGMENTS["action"])
    has_latent_rows = any(key in shapes for key in POLICY_SEGMENTS["latent"])
    sizes["fresh_segments"] = None if has_latent_rows else ["latent"]
    return text_sizes, sizes
