"""Writes and reads streams of Flax arrays with the msgpack package, which shares nothing with our reader."""

from pathlib import Path

import msgpack
import numpy as np
import torch


def flax_array(array: np.ndarray, dtype: str | None = None) -> msgpack.ExtType:
    """One array as `flax.serialization` packs it."""
    payload = (array.shape, dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(payload, use_bin_type=True))


def flax_chunked(array: np.ndarray, items_per_chunk: int) -> dict:
    flat = array.ravel()
    chunks = [flat[i : i + items_per_chunk] for i in range(0, flat.size, items_per_chunk)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(array.shape)},
        "chunks": {str(i): flax_array(chunk) for i, chunk in enumerate(chunks)},
    }


def write_stream(path: Path, arrays: dict, chunk: int | None = None) -> Path:
    """A stream as the published code writes it; bfloat16 comes as (uint16 bits, "bfloat16")."""
    with path.open("wb") as file:
        for key, array in arrays.items():
            if isinstance(array, tuple):
                packed = flax_array(*array)
            elif chunk is not None and array.size > chunk:
                packed = flax_chunked(array, chunk)
            else:
                packed = flax_array(array)
            file.write(msgpack.packb((tuple(key.split("/")), msgpack.packb(packed))))
    return path


def read_with_msgpack(path: Path) -> dict[str, torch.Tensor]:
    """Every array of a stream, through the msgpack package: an implementation that shares nothing with ours."""

    def array(code: int, data: bytes) -> torch.Tensor:
        assert code == 1
        shape, dtype, buffer = msgpack.unpackb(data)
        return torch.frombuffer(bytearray(buffer), dtype=getattr(torch, dtype)).view(shape)

    arrays = {}
    with path.open("rb") as file:
        for key, packed in msgpack.Unpacker(file, max_buffer_size=0):
            value = msgpack.unpackb(packed, ext_hook=array)
            if isinstance(value, dict):
                shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
                value = torch.cat([value["chunks"][str(i)] for i in range(len(value["chunks"]))]).view(shape)
            arrays["/".join(key)] = value
    return arrays
