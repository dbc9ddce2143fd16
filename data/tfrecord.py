"""TFRecord files and `tf.train.Example` messages, read without TensorFlow."""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Reversed Castagnoli polynomial, and the constant that TFRecord adds to a rotated checksum.
POLYNOMIAL = 0x82F63B78
MASK_DELTA = 0xA282EAD8
# Bytes per lane of the vectorised checksum.
LANE_BYTES = 64
HEADER_BYTES = 12
FOOTER_BYTES = 4

FeatureValues = list[bytes] | NDArray[np.float32] | NDArray[np.int64]


@cache
def _byte_table() -> NDArray[np.uint32]:
    """Checksum register after each of the 256 bytes, from a register of zero."""
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = np.where(register & 1, (register >> 1) ^ np.uint32(POLYNOMIAL), register >> 1)
    return register.astype(np.uint32)


@cache
def _advance_tables(level: int) -> NDArray[np.uint32]:
    """Tables (4, 256) that carry a register, byte by byte, over `LANE_BYTES * 2 ** level` zero bytes."""
    registers = (np.arange(256, dtype=np.uint32)[None] << (8 * np.arange(4, dtype=np.uint32))[:, None]).reshape(-1)
    if level == 0:
        for _ in range(LANE_BYTES):
            registers = _byte_table()[registers & 0xFF] ^ (registers >> 8)
    else:
        registers = _advance(_advance(registers, level - 1), level - 1)
    return registers.reshape(4, 256)


def _advance(registers: NDArray[np.uint32], level: int) -> NDArray[np.uint32]:
    tables = _advance_tables(level)
    result: NDArray[np.uint32] = tables[0][registers & 0xFF] ^ tables[1][(registers >> 8) & 0xFF]
    result ^= tables[2][(registers >> 16) & 0xFF] ^ tables[3][registers >> 24]
    return result


def crc32c(data: bytes | memoryview) -> int:
    """
    CRC-32C (Castagnoli) of bytes.

    The register is linear in the data, so lanes of `LANE_BYTES` run side by side and are joined pairwise. Leading zero
    bytes leave a register of zero alone, which is what fills the first lane up.
    """
    if len(data) < 4:
        register = 0xFFFFFFFF
        for byte in data:
            register = int(_byte_table()[(register ^ byte) & 0xFF]) ^ (register >> 8)
        return register ^ 0xFFFFFFFF
    num_lanes = -(-len(data) // LANE_BYTES)
    padded = np.zeros(num_lanes * LANE_BYTES, dtype=np.uint8)
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, dtype=np.uint8)
    # A register that starts with ones is one that starts with zeros and reads four inverted bytes.
    padded[start : start + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(num_lanes, LANE_BYTES).T)
    registers = np.zeros(num_lanes, dtype=np.uint32)
    table = _byte_table()
    for column in columns:
        registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, dtype=np.uint32), registers])
        registers = _advance(registers[0::2], level) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + MASK_DELTA) & 0xFFFFFFFF


def read_tfrecord(path: Path) -> Iterator[tuple[int, bytes]]:
    """
    Reads the records of a file, with their checksums checked.

    Yields:
        Byte position of the record in the file, and its content.

    Raises:
        ValueError: A checksum that does not fit, or a file that ends inside a record: file and byte position.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        while position < size:
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                raise ValueError(f"{path} ends inside a record header at byte {position}: the file is cut short.")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(
                    f"{path} is corrupt at byte {position}: the checksum of a record length does not fit."
                )
            if position + HEADER_BYTES + length + FOOTER_BYTES > size:
                raise ValueError(f"{path} ends inside the record at byte {position}: the file is cut short.")
            content = file.read(length)
            if masked_crc32c(content) != struct.unpack("<I", file.read(FOOTER_BYTES))[0]:
                raise ValueError(f"{path} is corrupt at byte {position}: the checksum of a record does not fit.")
            yield position, content
            position += HEADER_BYTES + length + FOOTER_BYTES


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Number at `position`, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("a protobuf number is cut short")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """Field number, wire type and value (bytes for types 1, 2 and 5, a number for 0) of a protobuf message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        value: memoryview | int
        if wire_type == 0:
            value, position = _varint(data, position)
            yield tag >> 3, wire_type, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a protobuf field has wire type {wire_type}")
        if position + length > len(data):
            raise ValueError("a protobuf field is cut short")
        yield tag >> 3, wire_type, data[position : position + length]
        position += length


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    """Length-delimited fields of one number."""
    for field_number, wire_type, value in _fields(data):
        if field_number == number and wire_type == 2 and isinstance(value, memoryview):
            yield value


def _packed_varints(data: memoryview) -> NDArray[np.int64]:
    """Packed varints -> int64; negative numbers are two's complement over ten bytes."""
    octets = np.frombuffer(data, dtype=np.uint8)
    if octets.size == 0:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if ends.size == 0 or ends[-1] != octets.size - 1:
        raise ValueError("a protobuf number is cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(octets.size) - np.repeat(starts, ends - starts + 1)
    parts = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts).astype(np.int64)


def parse_example(content: bytes) -> dict[str, memoryview]:
    """`tf.train.Example` -> feature name to its undecoded `tf.train.Feature`, see `decode_feature`."""
    features: dict[str, memoryview] = {}
    for feature_map in _messages(memoryview(content), 1):
        for entry in _messages(feature_map, 1):
            key = next(_messages(entry, 1), memoryview(b""))
            features[bytes(key).decode("utf-8")] = next(_messages(entry, 2), memoryview(b""))
    return features


def decode_feature(feature: memoryview) -> FeatureValues:
    """`tf.train.Feature` -> list of bytes, float32 array or int64 array."""
    for kind, wire_type, values in _fields(feature):
        if wire_type != 2 or not isinstance(values, memoryview):
            continue
        if kind == 1:
            return [bytes(value) for value in _messages(values, 1)]
        if kind == 2:
            # Packed floats come as one field, unpacked ones as four bytes each.
            joined = b"".join(bytes(value) for number, _, value in _fields(values) if number == 1)
            return np.frombuffer(joined, dtype="<f4").astype(np.float32)
        if kind == 3:
            parts = [
                np.asarray([value], dtype=np.uint64).astype(np.int64)
                if isinstance(value, int)
                else _packed_varints(value)
                for number, _, value in _fields(values)
                if number == 1
            ]
            return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return []


__all__ = ["FeatureValues", "crc32c", "decode_feature", "masked_crc32c", "parse_example", "read_tfrecord"]
