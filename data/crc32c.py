"""CRC-32C (Castagnoli) without an extension module: numpy goes through many parts of the data side by side."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

# Reversed Castagnoli polynomial.
POLYNOMIAL = 0x82F63B78
# Bytes of the parts that run side by side; 64 to 256 are equally fast.
LANE_BYTES = 64
# Below this the loop over bytes is faster.
SHORT_BYTES = 128


@cache
def _byte_table() -> tuple[int, ...]:
    """Register after each of the 256 bytes, from a register of zero."""
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ (POLYNOMIAL if register & 1 else 0)
        table.append(register)
    return tuple(table)


def _over_zeros(register: int, num_bytes: int) -> int:
    """The register after zero bytes."""
    table = _byte_table()
    for _ in range(num_bytes):
        register = table[register & 0xFF] ^ register >> 8
    return register


def _lookup(images: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """
    Tables of a linear map of registers.

    Args:
        images: (32,) what the map makes of each single bit.
        bits: Of the register that one table takes, dividing 32.

    Returns:
        (32 / bits, 2 ** bits): what the map makes of each value of each group of bits; the results are to be XORed.
    """
    tables = np.zeros((32 // bits, 1 << bits), dtype=np.uint32)
    for table, group in zip(tables, images.reshape(-1, bits), strict=True):
        for bit, image in enumerate(group):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ image
    return tables


def _apply(tables: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A map in tables of 8 bits, applied to registers."""
    result: NDArray[np.uint32] = tables[0][registers & 0xFF] ^ tables[1][(registers >> 8) & 0xFF]
    result ^= tables[2][(registers >> 16) & 0xFF] ^ tables[3][registers >> 24]
    return result


@cache
def _word_tables() -> NDArray[np.uint32]:
    """The map over four zero bytes, in tables of 16 bits: two look-ups per word of data."""
    return _lookup(np.asarray([_over_zeros(1 << bit, 4) for bit in range(32)], dtype=np.uint32), 16)


@cache
def _lane_tables(level: int) -> NDArray[np.uint32]:
    """The map over `LANE_BYTES * 2 ** level` zero bytes, in tables of 8 bits."""
    if level == 0:
        images = np.asarray([_over_zeros(1 << bit, LANE_BYTES) for bit in range(32)], dtype=np.uint32)
    else:
        half = _lane_tables(level - 1)
        images = _apply(half, _apply(half, np.uint32(1) << np.arange(32, dtype=np.uint32)))
    return _lookup(images, 8)


def crc32c(data: bytes | memoryview) -> int:
    """
    Checksum of bytes.

    The register is linear in the data, so parts run side by side and are joined in pairs. Zero bytes in front leave a
    register of zero alone, which is what fills up the first part.
    """
    if len(data) < SHORT_BYTES:
        register, table = 0xFFFFFFFF, _byte_table()
        for byte in data:
            register = table[(register ^ byte) & 0xFF] ^ register >> 8
        return register ^ 0xFFFFFFFF
    num_lanes = -(-len(data) // LANE_BYTES)
    padded = np.zeros(num_lanes * LANE_BYTES, dtype=np.uint8)
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, dtype=np.uint8)
    # A register that starts with ones is one that starts with zeros and reads four inverted bytes.
    padded[start : start + 4] ^= 0xFF
    registers = _lane_registers(np.ascontiguousarray(padded.view("<u4").reshape(num_lanes, -1).T))
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, dtype=np.uint32), registers])
        registers = _apply(_lane_tables(level), registers[0::2]) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def _lane_registers(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Register after each part; `words` (words per part, parts)."""
    low, high = _word_tables()
    registers = np.zeros(words.shape[1], dtype=np.uint32)
    from_low, from_high = np.empty_like(registers), np.empty_like(registers)
    index = np.empty(len(registers), dtype=np.intp)
    # Into buffers and without checks of bounds (an index of 16 bits is within): twice as fast as the plain expression.
    for word in words:
        registers ^= word
        np.bitwise_and(registers, 0xFFFF, out=index, casting="unsafe")
        low.take(index, out=from_low, mode="clip")
        np.right_shift(registers, 16, out=index, casting="unsafe")
        high.take(index, out=from_high, mode="clip")
        np.bitwise_xor(from_low, from_high, out=registers)
    return registers


__all__ = ["crc32c"]
