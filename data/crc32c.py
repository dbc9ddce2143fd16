"""
CRC-32C (Castagnoli): by google-crc32c where it is installed, else by numpy.

Without an extension module long data is folded onto itself until little is left to go through.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

# Reversed Castagnoli polynomial P.
POLYNOMIAL = 0x82F63B78
# Multiples of P with few terms (powers of x; x^0 is the last of each), found by search. As squaring a polynomial over
# bits doubles its powers, one in x^8 to the 1, 2, 4, ... is a multiple of P as well: it says which bytes, or blocks of
# them, the leading ones may be added to in place of being gone through. The first has fewest terms, the second is shortest.
MULTIPLES = ((529, 231, 211, 117, 82, 0), (104, 57, 53, 49, 19, 14, 4, 0))
# Below this the loop over bytes is faster.
SHORT_BYTES = 768


@cache
def _byte_table() -> tuple[int, ...]:
    """Register after each of the 256 bytes, from a register of zero."""
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ (POLYNOMIAL if register & 1 else 0)
        table.append(register)
    return tuple(table)


@cache
def _extension() -> Callable[[bytes], int] | None:
    """What computes checksums in C; None where it is not installed, or only in Python."""
    try:
        module: ModuleType = import_module("google_crc32c")
    except ImportError:
        return None
    value: Callable[[bytes], int] = module.value
    return value if module.implementation == "c" else None


def crc32c(data: bytes | memoryview) -> int:
    """Checksum of bytes."""
    extension = _extension()
    return _crc32c(data) if extension is None else extension(bytes(data))


def _crc32c(data: bytes | memoryview) -> int:
    register, table = 0xFFFFFFFF, _byte_table()
    if len(data) >= SHORT_BYTES:
        folded = np.frombuffer(data, dtype=np.uint8).copy()
        # A register that starts with ones is one that starts with zeros and reads four inverted bytes.
        folded[:4] ^= 0xFF
        register, data = 0, _fold(folded).tobytes()
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _fold(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """
    Few bytes with the same remainder as many; the first byte has the highest powers of x. `data` is overwritten.

    With `largest` and `next` the two highest powers of a multiple and blocks of `size` bytes, the first (largest - next)
    blocks go to where each lower power is, which is behind them all.
    """
    for largest, *powers in MULTIPLES:
        # Blocks as large as fit, so that there are few steps, each over many bytes.
        size = 1 << max((len(data) // largest).bit_length() - 1, 0)
        while size:
            while (count := min(len(data) - largest * size, (largest - powers[0]) * size)) > 0:
                for power in powers:
                    target = data[(largest - power) * size :][:count]
                    np.bitwise_xor(target, data[:count], out=target)
                data = data[count:]
            size >>= 1
    return data


__all__ = ["crc32c"]
