"""Damages files for fuzzing: bytes anywhere, and parts of what formats are built of (boxes, elements, fields, values)."""

import contextlib
import copy
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tfds_files import varint

from lapa.data.tfrecord import masked_crc32c

# Numbers at the borders of what length fields and counters hold.
NUMBERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0xFFFFFF, 0x1000000, 0x7FFFFFFE,
    0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF, 1 << 32, 1 << 48, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
# What a value of a JSON file may be replaced by.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**40, 0.5, -0.5, 1e308, 1e-320,
    float("nan"), float("inf"), "", "0", "1", "-1", "3", "9223372036854775807", "9223372036854775808", "1e400", "NaN",
    "\0", "\ud800", "ü" * 3, "x" * 5000, "../../etc/passwd", "/etc/passwd", "{}", "{0.__class__}", "{episode_index:999999999d}",
    "%s", "a\nb", [], {}, [[]], [{}], {"": None}, [0] * 300, ["-1"], [None], [1e308] * 7, "9" * 5000,
)  # fmt: skip
CHUNK = 64
MAX_JSON_BYTES = 1 << 22


@dataclass
class Node:
    """
    A part of a file.

    Args:
        kind: What it is, in the form of its format.
        content: Bytes, or the parts inside it.
        size: What its header says instead of the truth.
    """

    kind: Any
    content: "bytes | list[Node]"
    size: int | None = None


@dataclass(frozen=True)
class Format:
    """How files of a format are taken apart and put together; `kinds` are those that a part may be turned into."""

    parse: Callable[[bytes], list[Node]]
    build: Callable[[Sequence[Node]], bytes]
    kinds: tuple[Any, ...]


def damage_bytes(
    data: bytes, generator: random.Random, tokens: Sequence[bytes] = (), others: Sequence[bytes] = ()
) -> bytes:
    """Between one and four changes of bytes: flips, numbers, tokens, parts cut out, doubled, moved or taken from others."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        place = _place(len(result), generator)
        match generator.randrange(10):
            case 0 if result:
                for _ in range(generator.choice((1, 1, 8))):
                    result[generator.randrange(len(result))] ^= 1 << generator.randrange(8)
            case 1 if result:
                result[place % len(result)] = generator.choice((0, 0x7F, 0x80, 0xFF, generator.randrange(256)))
            case 2:
                del result[place:]
            case 3:
                del result[place : place + generator.randrange(1, CHUNK)]
            case 4:
                part = bytes(result[place : place + generator.choice((1, 8, CHUNK, 4 * CHUNK))])
                target = _place(len(result), generator)
                result[target:target] = part * generator.choice((1, 1, 2, 50))
            case 5:
                other = generator.choice(others) if others else data
                result[place:] = other[_place(len(other), generator) :]
            case 6:
                width = generator.choice((1, 2, 4, 8))
                value = generator.choice((*NUMBERS, len(data), len(data) - place)) & ((1 << 8 * width) - 1)
                result[place : place + width] = value.to_bytes(width, generator.choice(("little", "big")))
            case 7:
                number = varint(generator.choice(NUMBERS))
                result[place : place + generator.choice((0, 1, len(number)))] = number
            case 8 if tokens:
                token = generator.choice(tokens)
                result[place : place + generator.choice((0, len(token)))] = token
            case _:
                result[place : place + generator.randrange(CHUNK)] = generator.randbytes(generator.randrange(CHUNK))
    return bytes(result)


def _place(length: int, generator: random.Random) -> int:
    """Some position; the first and last bytes, where headers and tables lie, more often than others."""
    near = generator.random()
    if near < 0.25:
        return generator.randrange(min(length, 2 * CHUNK) + 1)
    if near < 0.4:
        return length - generator.randrange(min(length, 2 * CHUNK) + 1)
    return generator.randrange(length + 1)


def damage_parts(data: bytes, generator: random.Random, form: Format) -> bytes:
    """One to three changes of parts: left out, doubled, exchanged, turned into others, nested, of another size or content."""
    nodes = form.parse(data)
    for _ in range(generator.choice((1, 1, 2, 3))):
        lists = list(_lists(nodes))
        siblings = generator.choice(lists)
        if not siblings:
            continue
        place = generator.randrange(len(siblings))
        node = siblings[place]
        match generator.randrange(8):
            case 0:
                del siblings[place]
            case 1:
                siblings[place:place] = [copy.deepcopy(node) for _ in range(generator.choice((1, 1, 2, 100)))]
            case 2:
                source = generator.choice(lists)
                if source:
                    siblings[place] = copy.deepcopy(generator.choice(source))
            case 3:
                node.kind = generator.choice(form.kinds)
            case 4:
                for _ in range(generator.choice((1, 2, 40))):
                    siblings[place] = Node(node.kind, [siblings[place]])
            case 5:
                node.size = generator.choice((*NUMBERS, len(data)))
            case _ if isinstance(node.content, bytes):
                node.content = damage_bytes(node.content, generator)
            case _:
                generator.shuffle(node.content)
    return form.build(nodes)


def _lists(nodes: list[Node]) -> Iterator[list[Node]]:
    yield nodes
    for node in nodes:
        if isinstance(node.content, list):
            yield from _lists(node.content)


def damage_json(text: bytes, generator: random.Random) -> bytes:
    """One to three changes of values and keys; sometimes of bytes, where the text then may be no JSON at all."""
    if generator.random() < 0.15:
        return damage_bytes(
            text, generator, (b'"', b"{", b"[", b"]", b"}", b",", b"\\u0000", b"\xff", b"[" * 5000, b"1e999")
        )
    holder = [json.loads(text)]
    # A tree grows by doubling itself, and may come out too deep or too large to write.
    try:
        _change_json(holder, generator)
        changed = json.dumps(holder[0]).encode()
    except RecursionError:
        changed = b"[" * 2000 + b"]" * 2000
    return changed[:MAX_JSON_BYTES]


def _change_json(holder: list[Any], generator: random.Random) -> None:
    for _ in range(generator.choice((1, 1, 2, 3))):
        places = list(_json_places(holder))
        container, key = generator.choice(places)
        match generator.randrange(5):
            case 0 if len(places) > 1 and container is not holder:
                del container[key]
            case 1:
                other, other_key = generator.choice(places)
                container[key] = json.loads(json.dumps(other[other_key]))
            case 2 if isinstance(container, dict):
                container[str(generator.choice(VALUES))] = container.pop(key)
            case 3:
                container[key] = [container[key]] * generator.choice((1, 2, 300))
            case _:
                container[key] = copy.deepcopy(generator.choice(VALUES))


def _json_places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of every value below a node."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node))
    for key, child in items:
        yield node, key
        if isinstance(child, dict | list):
            yield from _json_places(child)


def damage_json_lines(text: bytes, generator: random.Random) -> bytes:
    """Changes in one line, or of lines."""
    lines = text.splitlines(keepends=True)
    place = generator.randrange(len(lines))
    match generator.randrange(6):
        case 0:
            lines[place : place + 1] = []
        case 1:
            lines[place:place] = [lines[place]] * generator.choice((1, 3, 100))
        case 2:
            lines[place] = lines[place].rstrip(b"\n")
        case _:
            lines[place] = damage_json(lines[place], generator) + b"\n"
    return b"".join(lines)


def _parse_boxes(data: bytes) -> list[Node]:
    """MP4 (ISO 14496-12)."""
    containers = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"dinf", b"mvex", b"moof", b"traf")
    nodes, place = [], 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if size < 8 or place + size > len(data):
            break
        inner = data[place + 8 : place + size]
        nodes.append(Node(kind, _parse_boxes(inner) if kind in containers else inner))
        place += size
    if place < len(data):
        nodes.append(Node(None, data[place:]))
    return nodes


def _build_boxes(nodes: Sequence[Node]) -> bytes:
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_boxes(node.content)
        size = (len(inner) + 8 if node.size is None else node.size) & 0xFFFFFFFF
        parts.append(inner if node.kind is None else struct.pack(">I4s", size, node.kind) + inner)
    return b"".join(parts)


# Elements of Matroska that hold others: segment, tracks, track, video, cluster, info, cues, point, positions, group, seek.
EBML_MASTERS = tuple(
    bytes.fromhex(kind)
    for kind in ("18538067", "1654ae6b", "ae", "e0", "1f43b675", "1549a966", "1c53bb6b", "bb", "b7", "a0", "114d9b74", "4dbb",
                 "1a45dfa3", "1254c367", "7373", "6d80", "6240", "5034")
)  # fmt: skip


def _parse_elements(data: bytes) -> list[Node]:
    """EBML (RFC 8794)."""
    nodes, place = [], 0
    while place < len(data) and data[place] >> 4:
        length = 9 - data[place].bit_length()
        kind, start = data[place : place + length], place + length
        if start >= len(data) or not data[start]:
            break
        width = 9 - data[start].bit_length()
        size = int.from_bytes(data[start : start + width], "big") & ((1 << 7 * width) - 1)
        if start + width + size > len(data):
            break
        inner = data[start + width : start + width + size]
        nodes.append(Node(kind, _parse_elements(inner) if kind in EBML_MASTERS else inner))
        place = start + width + size
    if place < len(data):
        nodes.append(Node(None, data[place:]))
    return nodes


def _build_elements(nodes: Sequence[Node]) -> bytes:
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_elements(node.content)
        size = (len(inner) if node.size is None else node.size) & ((1 << 56) - 1)
        parts.append(inner if node.kind is None else node.kind + (size | 1 << 56).to_bytes(8, "big") + inner)
    return b"".join(parts)


def _parse_riff(data: bytes) -> list[Node]:
    """AVI: chunks of RIFF, lists of them with a kind of their own."""
    nodes, place = [], 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        inner = data[place + 8 : place + 8 + size]
        if len(inner) < size:
            break
        if kind in (b"RIFF", b"LIST") and size >= 4:
            nodes.append(Node(kind + inner[:4], _parse_riff(inner[4:])))
        else:
            nodes.append(Node(kind, inner))
        place += 8 + size + size % 2
    if place < len(data):
        nodes.append(Node(None, data[place:]))
    return nodes


def _build_riff(nodes: Sequence[Node]) -> bytes:
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_riff(node.content)
        if node.kind is None:
            parts.append(inner)
            continue
        inner = node.kind[4:] + inner
        size = (len(inner) if node.size is None else node.size) & 0xFFFFFFFF
        parts.append(node.kind[:4] + struct.pack("<I", size) + inner + b"\0" * (len(inner) % 2))
    return b"".join(parts)


def _parse_fields(data: bytes, depth: int = 0) -> list[Node]:
    """Protobuf; bytes that read as a message are taken for one. Kind: number and wire type."""
    nodes, place = [], 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _read_varint(data, place)
            nodes.append(Node((tag >> 3, 0), varint(value)))
            continue
        if wire == 2:
            length, place = _read_varint(data, place)
        else:
            length = {1: 8, 5: 4}[wire]
        if not tag >> 3 or place + length > len(data):
            raise ValueError
        content: bytes | list[Node] = data[place : place + length]
        if wire == 2 and depth < 6 and length:
            with contextlib.suppress(ValueError, KeyError, IndexError):
                content = _parse_fields(data[place : place + length], depth + 1)
        nodes.append(Node((tag >> 3, wire), content))
        place += length
    return nodes


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _build_fields(nodes: Sequence[Node]) -> bytes:
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_fields(node.content)
        number, wire = node.kind
        length = varint(len(inner) if node.size is None else node.size) if wire == 2 else b""
        parts.append(varint(number << 3 | wire) + length + inner)
    return b"".join(parts)


def _parse_png(data: bytes) -> list[Node]:
    """PNG: the signature, and chunks with sums."""
    if not data.startswith(b"\x89PNG"):
        return [Node(None, data)]
    nodes, place = [Node(None, data[:8])], 8
    while place + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        nodes.append(Node(kind, data[place + 8 : place + 8 + size]))
        place += 12 + size
    return nodes


def _build_png(nodes: Sequence[Node]) -> bytes:
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_png(node.content)
        if node.kind is not None:
            size = (len(inner) if node.size is None else node.size) & 0xFFFFFFFF
            inner = struct.pack(">I4s", size, node.kind) + inner + struct.pack(">I", zlib.crc32(node.kind + inner))
        parts.append(inner)
    return b"".join(parts)


def _parse_records(data: bytes) -> list[Node]:
    """TFRecord."""
    nodes, place = [], 0
    while place + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        nodes.append(Node(b"", data[place + 12 : place + 12 + length]))
        place += 16 + length
    return nodes


def _build_records(nodes: Sequence[Node]) -> bytes:
    """With sums that fit, so that what is announced is believed."""
    parts = []
    for node in nodes:
        inner = node.content if isinstance(node.content, bytes) else _build_records(node.content)
        length = struct.pack("<Q", (len(inner) if node.size is None else node.size) & ((1 << 64) - 1))
        parts.append(
            length + struct.pack("<I", masked_crc32c(length)) + inner + struct.pack("<I", masked_crc32c(inner))
        )
    return b"".join(parts)


def damage_tar(data: bytes, generator: random.Random) -> bytes:
    """Changes in a header, whose sum is made to fit again, or of whole blocks."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(generator.choice((1, 1, 2))):
        number = generator.choice(headers)
        match generator.randrange(6):
            case 0:
                block = generator.choice(blocks)
                place = generator.randrange(len(blocks))
                blocks[place:place] = [bytearray(block) for _ in range(generator.choice((1, 5)))]
            case 1:
                del blocks[generator.randrange(len(blocks))]
            case 2:
                # A size, in octal or as the binary number that GNU tar writes for large ones; also below zero.
                value = generator.choice(NUMBERS)
                octal = b"%011o\0" % (value & ((1 << 33) - 1))
                binary = generator.choice((b"\x80", b"\xff")) + (value & ((1 << 88) - 1)).to_bytes(11, "big")
                blocks[number][124:136] = generator.choice((octal, binary))
            case 3:
                blocks[number][156:157] = generator.choice(
                    (b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"\xff")
                )
            case _:
                damaged = damage_bytes(bytes(blocks[number]), generator)
                blocks[number] = bytearray(damaged[:512].ljust(512, b"\0"))
        for header in headers:
            if header < len(blocks) and len(blocks[header]) == 512:
                blocks[header][148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(blocks[header]))[0]  # type: ignore[attr-defined]
    return b"".join(blocks)


MP4 = Format(
    _parse_boxes,
    _build_boxes,
    (b"moov", b"trak", b"mdia", b"stbl", b"stsz", b"stts", b"ctts", b"stss", b"stsc", b"stco", b"co64", b"elst", b"edts",
     b"mdat", b"free", b"moof", b"traf", b"trun", b"tfhd", b"sidx", b"cmov", b"dref", b"uuid", b"hvcC", b"avcC", b"av1C"),
)  # fmt: skip
MATROSKA = Format(
    _parse_elements,
    _build_elements,
    (
        *EBML_MASTERS,
        *(bytes.fromhex(kind) for kind in ("a3", "a1", "b0", "ba", "d7", "86", "63a2", "2ad7b1", "4489", "e7", "ec")),
    ),
)
AVI = Format(
    _parse_riff,
    _build_riff,
    (b"RIFFAVI ", b"LISThdrl", b"LISTstrl", b"LISTmovi", b"strh", b"strf", b"idx1", b"indx", b"JUNK"),
)
PROTOBUF = Format(
    _parse_fields, _build_fields, tuple((number, wire) for number in (1, 2, 3, 99) for wire in (0, 1, 2, 3, 5, 7))
)
PNG = Format(
    _parse_png, _build_png, (b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"IEND")
)
TFRECORD = Format(_parse_records, _build_records, (b"",))
