"""What `features.json` of a TFDS data set says, and stored values made into arrays and texts by it."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.tfds_example import FeatureValues

# How tensors of each type are given out; TFDS stores all of them as float32 or int64 lists, or as bytes.
NUMBERS = {"bool": np.dtype("bool"), "bfloat16": np.dtype("float32")} | {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}")
    for kind, sizes in {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}.items()
    for bits in sizes
}
ENCODINGS = ("none", "bytes", "zlib")


@dataclass(frozen=True)
class FeatureSpec:
    """
    One leaf of `features.json`.

    Args:
        kind (`str`): image, text or tensor.
        dtype (`str`): Of the values.
        shape (`tuple[int, ...]`): Per step; -1 where it varies.
        encoding (`str`): Of a tensor (none, bytes or zlib); of an image its format.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"

    @property
    def is_colour_image(self) -> bool:
        """Whether these are frames of a camera, not depth or a mask."""
        return self.kind == "image" and self.dtype == "uint8" and (not self.shape or self.shape[-1] == 3)

    @property
    def is_numeric(self) -> bool:
        """Whether there is a fixed number of numbers per step."""
        return self.kind == "tensor" and self.dtype in NUMBERS and all(size > 0 for size in self.shape)

    @property
    def is_text(self) -> bool:
        """Whether this is a text per step: as such, or as an array of character codes."""
        if self.kind == "text":
            return not self.shape
        return self.is_numeric and len(self.shape) == 1 and NUMBERS[self.dtype].kind in "iu"


def flatten_features(node: Mapping[str, Any], prefix: str = "") -> dict[str, FeatureSpec]:
    """
    Leaves of a tree of features by their path, sorted.

    What cannot be read is left out: sequences inside a step (of varying length, stored as values and lengths apart; none
    of the data sets of `open_x` needs them), audio, video, unknown encodings.
    """
    leaves: dict[str, FeatureSpec] = {}
    children = node.get("featuresDict", {}).get("features")
    if children is None:
        spec = _leaf(node)
        return {prefix: spec} if spec is not None else {}
    for name, child in sorted(children.items()):
        leaves |= flatten_features(child, f"{prefix}/{name}" if prefix else name)
    return leaves


def _leaf(node: Mapping[str, Any]) -> FeatureSpec | None:
    """Spec of a node of `features.json`; None where it is no leaf that can be read."""
    if "image" in node:
        image = node["image"]
        return FeatureSpec("image", image.get("dtype", "uint8"), _shape(image), image.get("encodingFormat") or "")
    if "text" in node:
        return FeatureSpec("text", "string", ())
    if "classLabel" in node:
        return FeatureSpec("tensor", "int64", ())
    if "tensor" in node:
        tensor = node["tensor"]
        dtype, encoding = tensor["dtype"], tensor.get("encoding", "none")
        if dtype == "string":
            return FeatureSpec("text", dtype, _shape(tensor))
        if dtype in NUMBERS and encoding in ENCODINGS:
            return FeatureSpec("tensor", dtype, _shape(tensor), encoding)
    return None


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in node.get("shape", {}).get("dimensions", ()))


def numbers(values: FeatureValues, spec: FeatureSpec, name: str) -> NDArray[Any]:
    """
    Stored values of a numeric feature.

    Returns:
        (num_steps, *shape) of the type that `features.json` tells.

    Raises:
        ValueError: Values that do not fit the feature.
    """
    if not spec.is_numeric:
        raise ValueError(f"feature {name!r} ({spec.kind}, {spec.dtype}, shape {spec.shape}) is no array of numbers.")
    dtype, size = NUMBERS[spec.dtype], math.prod(spec.shape)
    if isinstance(values, list):
        flat = np.frombuffer(_raw(values, spec, size * dtype.itemsize, name), dtype=dtype)
    else:
        flat = values.astype(dtype, copy=False)
    if flat.size % size:
        raise ValueError(f"feature {name!r} holds {flat.size} numbers, no multiple of its shape {spec.shape}.")
    return flat.reshape(-1, *spec.shape)


def _raw(values: list[bytes], spec: FeatureSpec, num_bytes: int, name: str) -> bytes:
    """Bytes of a tensor that is stored as bytes; `num_bytes` is what a step must have."""
    if spec.encoding == "none":
        if values:
            raise ValueError(f"feature {name!r} holds bytes where {spec.dtype} numbers are announced.")
        return b""
    if spec.dtype == "bfloat16":
        raise ValueError(f"feature {name!r} holds bfloat16 as bytes, which cannot be read.")
    try:
        if spec.encoding == "zlib":
            # A step cannot unpack to more than it must have, whatever it claims.
            values = [zlib.decompressobj().decompress(value, num_bytes + 1) for value in values]
    except zlib.error as error:
        raise ValueError(f"feature {name!r} cannot be unpacked: {error}.") from error
    if any(len(value) != num_bytes for value in values):
        raise ValueError(f"feature {name!r} has a step that is not of {num_bytes} bytes.")
    return b"".join(values)


def texts(values: FeatureValues, spec: FeatureSpec, name: str) -> list[str]:
    """
    Stored values of a text feature, one per step. Language Table keeps its instructions as arrays of character codes that
    end with a zero: such a feature counts as text too.

    Raises:
        ValueError: Values that are no text.
    """
    if spec.kind == "text":
        if not isinstance(values, list):
            raise ValueError(f"feature {name!r} holds numbers where text is announced.")
        return [value.decode("utf-8", errors="replace") for value in values]
    if not spec.is_text:
        raise ValueError(f"feature {name!r} ({spec.kind}, {spec.dtype}, shape {spec.shape}) is no text.")
    codes = numbers(values, spec, name)
    # Neighbouring steps mostly say the same, and a row need not be decoded again.
    same = [False, *(codes[1:] == codes[:-1]).all(axis=1)]
    result: list[str] = []
    for row, repeats in zip(codes, same, strict=False):
        result.append(result[-1] if repeats else _decode(row))
    return result


def _decode(codes: NDArray[Any]) -> str:
    """Character codes up to the first zero: bytes of UTF-8, or code points where there are any above 255."""
    ends = np.flatnonzero(codes == 0)
    characters = codes[: ends[0]] if ends.size else codes
    if characters.size and (characters.min() < 0 or characters.max() > 255):
        return characters.astype("<u4").tobytes().decode("utf-32-le", errors="replace")
    return characters.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


__all__ = ["FeatureSpec", "flatten_features", "numbers", "texts"]
