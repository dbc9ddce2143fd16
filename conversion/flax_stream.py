"""Reads the published `params`: a stream of msgpack pairs (key, one array), without jax, flax or msgpack."""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

# Names of numpy dtypes as Flax writes them.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
CHUNKED_MARK = "__msgpack_chunked_array__"
# Flax's extension types: 1 is an array, 3 a scalar with the same payload.
ARRAY_EXTENSIONS = (1, 3)
MAX_KEY_PARTS = 64
MAX_TEXT_BYTES = 4096
MAX_DIMENSIONS = 16
MAX_CHUNKS = 100_000

# msgpack's headers: first byte -> (kind, struct format of what follows).
_HEADERS = {
    0xC2: ("false", ""), 0xC3: ("true", ""),
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
    0xCC: ("int", ">B"), 0xCD: ("int", ">H"), 0xCE: ("int", ">I"), 0xCF: ("int", ">Q"),
    0xD0: ("int", ">b"), 0xD1: ("int", ">h"), 0xD2: ("int", ">i"), 0xD3: ("int", ">q"),
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def describe_wrong_file(path: Path) -> str:
    """A hint in brackets for files that are often met in place of a checkpoint; empty for others."""
    with path.open("rb") as file:
        head = file.read(256).lstrip()
    if not head:
        return " (it is empty)"
    if head.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer: fetch the file itself with `git lfs pull`)"
    if head[:1] == b"<":
        return " (it looks like a web page)"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        return " (it is a zip or torch archive)"
    return ""


@dataclass(frozen=True)
class ArrayEntry:
    """
    Where one array lies in the file.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its stored dtype.
        chunks (`tuple[tuple[int, int], ...]`): Offset and number of bytes of each piece; together they are the array
            in C order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


class _StreamParser:
    """Walks over msgpack headers and skips the payloads."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.place = "before the first array"

    @property
    def position(self) -> int:
        return self.file.tell()

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {problem} at byte {self.position}, {self.place}.")

    def fail_truncated(self, end: int) -> NoReturn:
        raise ValueError(
            f"{self.path} is truncated: it ends at byte {self.size}, {self.place}, which needs at least {end} bytes. "
            "Download it again."
        )

    def take(self, count: int) -> bytes:
        if self.position + count > self.size:
            self.fail_truncated(self.position + count)
        return self.file.read(count)

    def skip(self, count: int) -> int:
        """Skips a payload and returns where it began."""
        begin = self.position
        if begin + count > self.size:
            self.fail_truncated(begin + count)
        self.file.seek(begin + count)
        return begin

    def header(self) -> tuple[str, int]:
        """Kind of the next value and its length (of an integer: the value)."""
        code = self.take(1)[0]
        if code <= 0x7F:
            return "int", code
        if code >= 0xE0:
            return "int", code - 0x100
        if code <= 0x8F:
            return "map", code & 0x0F
        if code <= 0x9F:
            return "array", code & 0x0F
        if code <= 0xBF:
            return "str", code & 0x1F
        if code in _FIXED_EXTENSIONS:
            return "ext", _FIXED_EXTENSIONS[code]
        if code not in _HEADERS:
            self.fail(f"unexpected byte 0x{code:02x}")
        kind, layout = _HEADERS[code]
        return kind, struct.unpack(layout, self.take(struct.calcsize(layout)))[0] if layout else 0

    def expect(self, kind: str, at_most: int | None = None) -> int:
        """Length (or value) of the next header, which must be of this kind and no longer than `at_most`."""
        found, length = self.header()
        if found != kind or (at_most is not None and length > at_most):
            self.fail(f"expected {kind}{f' of at most {at_most}' if at_most else ''}, found {found} ({length})")
        return length

    def text(self) -> str:
        return self.take(self.expect("str", MAX_TEXT_BYTES)).decode("utf-8")

    def key(self) -> str:
        """The next pair's key, its parts joined by slashes."""
        if self.expect("array", MAX_KEY_PARTS) != 2:
            self.fail("expected a pair (key, array)")
        return "/".join(self.text() for _ in range(self.expect("array", MAX_KEY_PARTS)))

    def extension(self) -> ArrayEntry:
        """An array in Flax's form: an extension that holds msgpack of (shape, dtype name, buffer)."""
        end = self.expect("ext")
        extension_type = self.take(1)[0]
        end += self.position
        if extension_type not in ARRAY_EXTENSIONS:
            self.fail(f"expected an array, found extension type {extension_type}")
        if self.expect("array", MAX_DIMENSIONS) != 3:
            self.fail("expected (shape, dtype, buffer)")
        shape = tuple(self.expect("int") for _ in range(self.expect("array", MAX_DIMENSIONS)))
        dtype_name = self.text()
        if dtype_name not in DTYPES:
            self.fail(f"the array has dtype {dtype_name}, accepted are {', '.join(DTYPES)}")
        num_bytes = self.expect("bin")
        entry = ArrayEntry(shape, DTYPES[dtype_name], ((self.skip(num_bytes), num_bytes),))
        if min(shape, default=0) < 0 or entry.num_bytes != num_bytes or self.position != end:
            self.fail(f"an array of shape {shape} and dtype {dtype_name} has {num_bytes} bytes")
        return entry

    def numbered(self, what: str, read: Any) -> list[Any]:
        """A map whose keys are "0", "1", ..., which is how Flax writes a tuple."""
        items = {self.text(): read() for _ in range(self.expect("map", MAX_CHUNKS))}
        if set(items) != {str(i) for i in range(len(items))}:
            self.fail(f"the {what} of a chunked array are not numbered")
        return [items[str(i)] for i in range(len(items))]

    def chunked(self, num_fields: int) -> ArrayEntry:
        """An array above Flax's limit (1 GiB): a map of mark, shape and pieces."""
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self.text()
            if name == CHUNKED_MARK:
                fields[name] = self.expect("true")
            elif name == "shape":
                fields[name] = tuple(self.numbered("sizes", lambda: self.expect("int")))
            elif name == "chunks":
                fields[name] = self.numbered("chunks", self.extension)
            else:
                self.fail(f"unexpected field {name!r} of a chunked array")
        if len(fields) != 3 or not fields["chunks"]:
            self.fail("expected a chunked array with shape and chunks")
        pieces = fields["chunks"]
        chunks = tuple(chunk for piece in pieces for chunk in piece.chunks)
        entry = ArrayEntry(fields["shape"], pieces[0].dtype, chunks)
        if any(piece.dtype != entry.dtype for piece in pieces) or entry.num_bytes != sum(n for _, n in chunks):
            self.fail(f"the chunks of an array of shape {entry.shape} do not add up")
        return entry

    def array(self) -> ArrayEntry:
        """The next pair's array, packed on its own into bytes."""
        end = self.expect("bin")
        end += self.position
        if end > self.size:
            self.fail_truncated(end)
        begin = self.position
        kind, length = self.header()
        if kind == "map":
            entry = self.chunked(length)
        else:
            self.file.seek(begin)
            entry = self.extension()
        if self.position != end:
            self.fail("the array's bytes do not end with it")
        return entry


class FlaxStream:
    """
    Index of a `params` file, from which arrays are read one at a time or one layer at a time.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or is no such stream; it says where and at which key.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, ArrayEntry] = {}
        with self.path.open("rb") as file:
            # The stream begins with a pair whose key is a list.
            if file.read(1) != b"\x92":
                raise ValueError(f"{self.path} is not a stream of Flax arrays{describe_wrong_file(self.path)}.")
            file.seek(0)
            self._index(_StreamParser(file, self.path))

    def _index(self, parser: _StreamParser) -> None:
        while parser.position < parser.size:
            key = parser.key()
            parser.place = f"inside {key!r}"
            if key in self.entries:
                parser.fail(f"{key!r} occurs twice")
            self.entries[key] = parser.array()
            parser.place = f"after {key!r}"
        # A stream of a whole training state names its parameters params/params/...
        while self.entries and all(key.startswith("params/") for key in self.entries):
            self.entries = {key.removeprefix("params/"): entry for key, entry in self.entries.items()}

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """
        Reads one array, or one index of its first axis.

        Args:
            key (`str`): Parts of the key joined by slashes.
            layer (`int`, *optional*): Index on the first axis; None reads the whole array.

        Returns:
            `torch.Tensor` in the stored dtype: Of the array's shape, without the first axis if `layer` is given.
        """
        entry = self.entries[key]
        shape, begin = entry.shape, 0
        if layer is not None:
            assert 0 <= layer < shape[0]
            shape = shape[1:]
            begin = layer * math.prod(shape) * entry.dtype.itemsize
        buffer = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        self._read_bytes(entry, begin, memoryview(buffer.numpy()))
        return buffer.view(entry.dtype).view(shape)

    def _read_bytes(self, entry: ArrayEntry, begin: int, target: memoryview) -> None:
        filled = 0
        with self.path.open("rb", buffering=0) as file:
            for offset, num_bytes in entry.chunks:
                skipped = min(begin, num_bytes)
                begin -= skipped
                file.seek(offset + skipped)
                end = min(filled + num_bytes - skipped, len(target))
                # One call reads at most 2 GiB.
                while filled < end:
                    count = file.readinto(target[filled:end])
                    if not count:
                        raise ValueError(f"{self.path} became shorter while it was read.")
                    filled += count
        assert filled == len(target)
