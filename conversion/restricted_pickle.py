"""Reads the pickle of the published VQGAN: nested dictionaries of arrays, and nothing else."""

import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from lapa.conversion.flax_stream import describe_wrong_file

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
# Opcodes that build plain data or get every function and class they use from `find_class` below, which refuses by name.
# Those that look objects up elsewhere (EXT*, *PERSID, *_BUFFER) are absent.
OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET",
    "BINGET", "LONG_BINGET", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ",
    "NEWOBJ_EX", "REDUCE", "BUILD",
}  # fmt: skip
MAX_DEPTH = 16
MAX_ARRAYS = 100_000


class _StandIn:
    """Takes the place of a pickled function or class; can be called, and cannot be changed by the pickle."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]):
        self._name = name
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise ValueError(f"the file tries to change {self._name}")


class _Dtype:
    """A dtype that is being unpickled."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any):
        if code not in DTYPES:
            raise ValueError(f"an array has dtype {code!r}, accepted are {', '.join(DTYPES)}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or state[1:5] not in (("<", None, None, None), ("=", None, None, None)):
            raise ValueError("an array is not a plain little-endian one")


class _Array:
    """An array that is being unpickled."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, raw = state
        self.fill(raw, dtype, shape, is_fortran)

    def fill(self, raw: Any, dtype: Any, shape: Any, is_fortran: Any) -> None:
        """Checks what the file states against the bytes it holds; nothing is allocated on its word alone."""
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise ValueError("an array holds Python objects instead of numbers")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an array has shape {shape!r}")
        torch_dtype = DTYPES[dtype.code]
        if math.prod(shape) * torch_dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} and dtype {dtype.code} has {len(raw)} bytes")
        flat = torch.frombuffer(bytearray(raw), dtype=torch_dtype) if raw else torch.empty(0, dtype=torch_dtype)
        self.tensor = flat.view(shape[::-1]).permute(*range(len(shape))[::-1]) if is_fortran else flat.view(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(raw, dtype, shape, order == "F")
    return array


def _reconstruct_jax(_function: Any, _args: Any, state: Any, _aval_state: Any) -> _Array:
    array = _Array()
    array.__setstate__(state)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes are written in encoding {encoding!r} instead of latin1")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    # How protocols up to 2 write b"".
    return b""


def _frozen_dict(content: Any = None) -> dict:
    if not isinstance(content, dict):
        raise ValueError("a FrozenDict holds no dictionary")
    return content


def _not_callable(*_: Any) -> NoReturn:
    raise ValueError("the file calls a class that only names a type")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _not_callable,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("jax._src.array", "_reconstruct_array"): _reconstruct_jax,
    ("jax._src.device_array", "reconstruct_device_array"): _reconstruct_jax,
    ("flax.core.frozen_dict", "FrozenDict"): _frozen_dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, and only arrays in dictionaries are accepted")
        return _StandIn(f"{module}.{name}", _ALLOWED[module, name])


def _check_opcodes(path: Path) -> None:
    """Refuses unneeded opcodes, and lengths and memo numbers so large that merely reading them exhausts memory."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name not in OPCODES:
                raise ValueError(f"it uses the opcode {opcode.name}, and only arrays in dictionaries are accepted")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:
                raise ValueError(f"it has a memo number of {argument}, more than the file has bytes")


def _flatten(tree: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    open_nodes: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    # Counts dictionaries too: one that holds another many times over has few bytes and no end of paths.
    for _ in range(MAX_ARRAYS):
        if not open_nodes:
            return tensors
        key, node = open_nodes.pop()
        name = "/".join(key)
        if isinstance(node, _Array) and node.tensor is not None:
            tensors[name] = node.tensor
        elif isinstance(node, dict) and len(key) < MAX_DEPTH and all(isinstance(child, str) for child in node):
            open_nodes.extend(((*key, child), value) for child, value in reversed(node.items()))
        else:
            raise ValueError(f"{name or 'its content'} is neither an array nor a dictionary (nested {MAX_DEPTH} deep)")
    raise ValueError(f"it holds more than {MAX_ARRAYS} arrays and dictionaries")


def load_arrays(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a pickle of nested dictionaries of numpy or jax arrays without numpy's, jax's or flax's code.

    A pickle is a program. This one may only name the few functions that rebuild arrays, each replaced by a stand-in
    that checks its arguments; whatever else it names is refused before anything is called.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, torch.Tensor]`: Arrays by path, such as `"encoder/Conv_0/kernel"`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no pickle, is truncated, or holds anything but dictionaries of arrays.
    """
    path = Path(path)
    try:
        _check_opcodes(path)
        with path.open("rb") as file:
            return _flatten(_ArrayUnpickler(file).load())
    except OSError:
        raise
    # A broken or hostile pickle can fail in any way; all of them mean that the file is not what was asked for.
    except Exception as error:
        hint = describe_wrong_file(path)
        raise ValueError(f"{path} is not a pickle of arrays{hint}: {error}") from error
