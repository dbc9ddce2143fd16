"""`tf.train.Example` messages, parsed without TensorFlow and without a protobuf library: only what is asked for."""

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

FeatureValues = list[bytes] | NDArray[np.float32] | NDArray[np.int64]

# Bytes of the longest varint of 64 bits.
MAX_VARINT_BYTES = 10


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
            return value & 0xFFFFFFFFFFFFFFFF, position
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


def _messages(data: memoryview, number: int) -> list[memoryview]:
    """Length-delimited fields of one number, at most 15."""
    wanted, found, position, end = number << 3 | 2, [], 0, len(data)
    # What `_fields` does, for what is nearly all of a message: one byte of tag, a short length, no other fields.
    while position + 1 < end and data[position] == wanted:
        length = data[position + 1]
        if length < 0x80:
            position += 2
        else:
            length, position = _varint(data, position + 1)
        if position + length > end:
            raise ValueError("a protobuf field is cut short")
        found.append(data[position : position + length])
        position += length
    if position < end:
        for field_number, wire_type, value in _fields(data[position:]):
            if field_number == number and wire_type == 2 and isinstance(value, memoryview):
                found.append(value)
    return found


def _entry(entry: memoryview) -> tuple[memoryview, memoryview]:
    """Key and value of an entry of a map; empty where they are not there. Of several the first counts."""
    key = value = None
    for number, wire_type, content in _fields(entry):
        if wire_type == 2 and isinstance(content, memoryview):
            if number == 1 and key is None:
                key = content
            elif number == 2 and value is None:
                value = content
    return key or memoryview(b""), value or memoryview(b"")


def _packed_varints(data: memoryview) -> NDArray[np.int64]:
    """Packed varints -> int64; negative numbers are two's complement over ten bytes."""
    octets = np.frombuffer(data, dtype=np.uint8)
    if octets.size == 0:
        return np.zeros(0, dtype=np.int64)
    if octets.max() < 0x80:
        return octets.astype(np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if ends.size == 0 or ends[-1] != octets.size - 1:
        raise ValueError("a protobuf number is cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > MAX_VARINT_BYTES:
        raise ValueError("a protobuf number is too long")
    place = np.arange(octets.size) - np.repeat(starts, sizes)
    parts = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts).astype(np.int64)


def parse_example(content: bytes) -> dict[str, memoryview]:
    """
    `tf.train.Example` -> feature name to its undecoded `tf.train.Feature`, see `decode_feature`.

    Raises:
        ValueError: No such message.
    """
    features: dict[str, memoryview] = {}
    for feature_map in _messages(memoryview(content), 1):
        for entry in _messages(feature_map, 1):
            key, value = _entry(entry)
            features[str(key, "utf-8")] = value
    return features


def decode_feature(feature: memoryview) -> FeatureValues:
    """
    `tf.train.Feature` -> list of bytes, float32 array or int64 array; an empty list where nothing is set.

    Raises:
        ValueError: No such message.
    """
    for kind, wire_type, values in _fields(feature):
        if wire_type != 2 or not isinstance(values, memoryview):
            continue
        if kind == 1:
            return list(map(bytes, _messages(values, 1)))
        if kind == 2:
            # Packed floats come as one field, unpacked ones as four bytes each.
            joined = b"".join(
                value for number, _, value in _fields(values) if number == 1 and isinstance(value, memoryview)
            )
            if len(joined) % 4:
                raise ValueError("a list of floats ends inside one")
            return np.frombuffer(joined, dtype="<f4").astype(np.float32, copy=False)
        if kind == 3:
            numbers: list[NDArray[np.int64]] = []
            # Packed numbers come as one field, unpacked ones as a field each.
            single = array("Q")
            for number, _, value in _fields(values):
                if number == 1 and isinstance(value, int):
                    single.append(value)
                elif number == 1 and isinstance(value, memoryview):
                    numbers += [np.asarray(single, dtype=np.uint64).astype(np.int64), _packed_varints(value)]
                    single = array("Q")
            return np.concatenate([*numbers, np.asarray(single, dtype=np.uint64).astype(np.int64)])
    return []


__all__ = ["FeatureValues", "decode_feature", "parse_example"]
