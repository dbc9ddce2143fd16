"""TFRecord files, read without TensorFlow: record by record, or any record of a local file at once."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapa.data.crc32c import crc32c
from lapa.data.episode_source import OnError
from lapa.data.schema import ReadError

# What TFRecord adds to a rotated checksum.
MASK_DELTA = 0xA282EAD8
# A length and its checksum before the content of a record, the checksum of the content after it.
HEADER_BYTES, FOOTER_BYTES = 12, 4
# How much is asked for at once where the size of a file is not known: what a forged length makes us allocate.
PIECE_BYTES = 1 << 24


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + MASK_DELTA) & 0xFFFFFFFF


class Record(NamedTuple):
    """A record: its number in the file, the byte it starts at, and its content."""

    number: int
    position: int
    content: bytes


@dataclass(frozen=True)
class RecordIndex:
    """
    Where the records of a file lie.

    Args:
        positions (`NDArray`): (num_records,) int64, byte at which the header of each begins.
        lengths (`NDArray`): (num_records,) int64, bytes of the content of each.
        problem (`str`, *optional*): Why there are no more records; None where the file simply ends there.
        has_more (`bool`): Whether the file goes on after the records that were looked for.
    """

    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]
    problem: str | None = None
    has_more: bool = False

    def __len__(self) -> int:
        return len(self.positions)


class RecordReader:
    """
    Reads the records of one file in the order they are asked for, or any of them from an open local file.

    Args:
        file (`IO[bytes]`): Open at its start.
        name (`str`): Of the file, for messages.
        size (`int`, *optional*): Bytes of the file, where that is known.
        num_records (`int`): How many it is said to hold.
    """

    def __init__(self, file: IO[bytes], name: str, size: int | None, num_records: int) -> None:
        self.file, self.name, self.size, self.num_records = file, name, size, num_records

    def make_index(self) -> RecordIndex:
        """Goes through the headers, without reading contents, up to the number of records that is announced."""
        positions: list[int] = []
        lengths: list[int] = []
        position, problem = 0, None
        while len(positions) < self.num_records:
            self.file.seek(position)
            try:
                length = self._length(position)
            except ReadError as error:
                problem = str(error)
                break
            if length is None:
                break
            positions.append(position)
            lengths.append(length)
            position += HEADER_BYTES + length + FOOTER_BYTES
        has_more = problem is None and self.size is not None and position < self.size
        return RecordIndex(
            np.asarray(positions, dtype=np.int64), np.asarray(lengths, dtype=np.int64), problem, has_more
        )

    def read(self, index: RecordIndex, wanted: Sequence[int] | None, on_error: OnError) -> Iterator[Record]:
        """
        Reads records by their numbers.

        Args:
            index: Of this file.
            wanted: Numbers, in any order; all when None.
            on_error: Called with what cannot be read: once for each content that is damaged, and once for all records
                that a damaged length makes unreachable.
        """
        reported = False
        # One past the last that is there, at most: what is lost is told once.
        for number in range(min(self.num_records, len(index) + 1)) if wanted is None else wanted:
            if number >= len(index):
                if not reported:
                    on_error(self._lost(len(index), index.problem))
                reported = True
                continue
            position = int(index.positions[number])
            try:
                self.file.seek(position + HEADER_BYTES)
                content = self._content(position, int(index.lengths[number]))
            except ReadError as error:
                on_error(error)
                continue
            yield Record(number, position, content)
        if wanted is None and index.has_more:
            on_error(self._surplus())

    def stream(self, wanted: Sequence[int] | None, on_error: OnError) -> Iterator[Record]:
        """
        Reads records going through the file once.

        Args:
            wanted: Numbers, ascending; all when None.
            on_error: As for `read`.
        """
        position = number = 0
        for target in range(self.num_records) if wanted is None else wanted:
            while True:
                try:
                    length = self._length(position)
                except ReadError as error:
                    on_error(self._lost(number, str(error)))
                    return
                if length is None:
                    on_error(self._lost(number, None))
                    return
                start, position = position, position + HEADER_BYTES + length + FOOTER_BYTES
                number += 1
                if number > target:
                    break
                self._skip(length + FOOTER_BYTES)
            try:
                content = self._content(start, length)
            except ReadError as error:
                on_error(error)
                continue
            yield Record(target, start, content)
        if wanted is None and self.file.read(1):
            on_error(self._surplus())

    def _length(self, position: int) -> int | None:
        """Length of the record whose header comes next; None at the end of the file."""
        header = self._read(HEADER_BYTES)
        if not header:
            return None
        if len(header) < HEADER_BYTES:
            raise ReadError(f"{self.name} ends inside a record header at byte {position}: the file is cut short")
        length, checksum = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != checksum:
            raise ReadError(f"{self.name} is corrupt at byte {position}: the checksum of a record length does not fit")
        if self.size is not None and position + HEADER_BYTES + length + FOOTER_BYTES > self.size:
            raise ReadError(f"{self.name} ends inside the record at byte {position}: the file is cut short")
        return int(length)

    def _content(self, position: int, length: int) -> bytes:
        """Content that comes next, with its checksum checked."""
        content, footer = self._read(length), self._read(FOOTER_BYTES)
        if len(content) < length or len(footer) < FOOTER_BYTES:
            raise ReadError(f"{self.name} ends inside the record at byte {position}: the file is cut short.")
        if masked_crc32c(content) != struct.unpack("<I", footer)[0]:
            raise ReadError(f"{self.name} is corrupt at byte {position}: the checksum of a record does not fit.")
        return content

    def _read(self, count: int) -> bytes:
        """Bytes that come next; fewer only at the end of the file."""
        # What the size of the file has vouched for can be asked for at once.
        most = count if self.size is not None else PIECE_BYTES
        pieces: list[bytes] = []
        while count and (piece := self.file.read(min(count, most))):
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _skip(self, count: int) -> None:
        if self.file.seekable():
            self.file.seek(count, 1)
            return
        while count and (piece := self.file.read(min(count, PIECE_BYTES))):
            count -= len(piece)

    def _lost(self, found: int, problem: str | None) -> ReadError:
        said = problem or f"{self.name} has {found} records, dataset_info.json announces {self.num_records}"
        return ReadError(f"{said}; {self.num_records - found} of its {self.num_records} announced episodes are lost.")

    def _surplus(self) -> ReadError:
        return ReadError(
            f"{self.name} goes on after the {self.num_records} records that dataset_info.json announces; what follows is "
            "not read."
        )


__all__ = ["Record", "RecordIndex", "RecordReader", "masked_crc32c"]
