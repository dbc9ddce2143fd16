"""Reads what a model folder holds, without loading the model."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The action decoder in a latent-pretrained model's folder, and its `model_type`.
DECODER_FOLDER, LATENT_DECODER = "action_decoder", "lapa_latent_action_decoder"


@dataclass(frozen=True)
class Weights:
    """
    The weights of a folder.

    Args:
        files (`tuple[str, ...]`): Names of the weight files, the index included.
        num_parameters (`int`): Elements of all tensors.
        num_bytes (`int`): Size of the files.
        dtypes (`dict[str, int]`): Elements per stored dtype.
    """

    files: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that must hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_NAME} has no `weight_map`.")
        names = sorted({str(name) for name in weight_map.values()})
        if unsafe := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX_NAME} names a file outside its folder: {unsafe[0]}.")
        return names
    if (folder / WEIGHTS_NAME).is_file():
        return [WEIGHTS_NAME]
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"`model` {folder} holds an adapter only: merge it into its base model first.")
    raise ValueError(f"`model` {folder} has no {WEIGHTS_NAME} and no {INDEX_NAME}; weights must be safetensors.")


def read_weights(folder: Path) -> Weights:
    """
    Finds the weight files of a folder and reads their headers.

    Raises:
        ValueError: No safetensors weights, a missing or damaged file, or a tensor that the index promises in vain.
    """
    names = _weight_files(folder)
    dtypes: dict[str, int] = {}
    tensors: set[str] = set()
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist, and {INDEX_NAME} names it.")
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    part = file.get_slice(key)
                    dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
                    tensors.add(key)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut off: {error}.") from error
    if (folder / INDEX_NAME).is_file():
        missing = set(read_json(folder / INDEX_NAME)["weight_map"]) - tensors
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} tensors of {INDEX_NAME}, such as {min(missing)}.")
        names = [*names, INDEX_NAME]
    size = sum((folder / name).stat().st_size for name in names)
    return Weights(tuple(names), sum(dtypes.values()), size, dtypes)
