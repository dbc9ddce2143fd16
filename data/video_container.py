"""
What a video file says about itself, checked before libav opens it: that it is all there, where libav would just stop
early, and that it announces no more than it can hold, where libav would allocate what is announced.
"""

from collections import Counter
from collections.abc import Iterator
from typing import IO

import numpy as np

from lapa.data.schema import ReadError

# Boxes at the top level of an MP4 file (ISO 14496-12). Where others stand, its length is not known.
MP4_TOP = frozenset(
    (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"sidx", b"ssix", b"moof", b"mfra", b"meta", b"uuid",
     b"udta", b"prft", b"emsg", b"pnot", b"junk")
)  # fmt: skip
# Boxes that libav looks for others in, wherever they stand, and how deep it goes.
MP4_CONTAINERS = frozenset(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"moof", b"traf", b"mvex", b"dinf", b"wave", b"sinf",
     b"schi", b"iprp", b"ipco")
)  # fmt: skip
MAX_DEPTH = 12
# Tables that announce samples, and the one that may repeat them.
SAMPLE_TABLES, EDIT_TABLE = (b"stsz", b"stz2", b"stts", b"ctts", b"trun"), b"elst"
# Edits times samples, per byte: a few edits of samples of a few bytes.
MAX_EDITED_SHARE = 64
EBML_HEADER, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_EBML_HEADER = 1 << 16
# What writers of AVI leave that cannot go back to the start.
OPEN_RIFF_SIZE = 0xFFFFFFF0


def check_container(file: IO[bytes], name: str) -> None:
    """
    Refuses a file that is cut short, and an MP4 file whose tables announce more samples than it has bytes.

    Args:
        file: Open for reading; its position is moved.
        name: What messages call it.

    Raises:
        ReadError: By the headers of an MP4, Matroska (WebM) or AVI file. Any other file passes.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(12)
    if head[:4] == EBML_HEADER:
        announced = _matroska_size(file)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        announced = int.from_bytes(head[4:8], "little")
        announced = 0 if announced >= OPEN_RIFF_SIZE else announced + 8
    else:
        announced = _mp4_size(file, size)
    if announced > size:
        raise ReadError(f"{name} is cut short: it announces {announced} bytes, it has {size}.")
    if head[4:8] in MP4_TOP | MP4_CONTAINERS:
        _check_mp4_tables(file, size, name)


def _mp4_size(file: IO[bytes], size: int) -> int:
    """End of the last box; 0 for what is no MP4 file."""
    end = 0
    for kind, _, stop in _boxes(file, 0, size):
        if kind not in MP4_TOP:
            break
        end = stop
    return end


def _check_mp4_tables(file: IO[bytes], size: int, name: str) -> None:
    """
    Holds the numbers of samples in an MP4 file against its size. libav makes an entry for every sample, and one for each
    time that an edit list repeats it, but a few bytes can announce billions.
    """
    counts: Counter[bytes] = Counter()
    places = [(0, size, 0)]
    while places:
        start, stop, depth = places.pop()
        for kind, content, end in _boxes(file, start, stop):
            end = min(end, stop)
            if kind == b"cmov":
                raise ReadError(f"{name} has compressed headers, which are not read.")
            if kind in MP4_CONTAINERS and depth < MAX_DEPTH:
                places.append((content, end, depth + 1))
            elif kind in SAMPLE_TABLES or kind == EDIT_TABLE:
                counts[kind] += _count(file, kind, content, end)
    samples = max(counts[kind] for kind in SAMPLE_TABLES)
    if samples > size or samples * counts[EDIT_TABLE] > MAX_EDITED_SHARE * size:
        edited = f" and {counts[EDIT_TABLE]} edits of them" if samples <= size else ""
        raise ReadError(f"{name} announces {samples} samples{edited} in {size} bytes.")


def _boxes(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box between two positions, and where its content starts and ends (by what it says)."""
    while start + 8 <= stop:
        file.seek(start)
        head = file.read(16)
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1 and len(head) == 16:
            size, header = int.from_bytes(head[8:], "big"), 16
        elif size == 0:
            size = stop - start
        if size < header:
            return
        yield head[4:8], start + header, start + size
        start += size


def _count(file: IO[bytes], kind: bytes, start: int, stop: int) -> int:
    """Entries that a table of an MP4 file makes."""
    file.seek(start)
    if kind in (b"stts", b"ctts"):
        # Runs: how many samples, and what they have.
        table = file.read(max(stop - start, 0))[8:]
        runs = np.frombuffer(table[: len(table) // 8 * 8], ">u4")
        return int(runs[::2].sum(dtype=np.int64))
    head = file.read(12)
    return int.from_bytes(head[8:12] if kind in (b"stsz", b"stz2") else head[4:8], "big")


def _matroska_size(file: IO[bytes]) -> int:
    """End of the segment, which is all of the file but its short header; 0 where that is left open."""
    file.seek(4)
    length = _ebml_number(file)
    if length is None or length > MAX_EBML_HEADER:
        return 0
    file.seek(file.tell() + length)
    if file.read(4) != MATROSKA_SEGMENT:
        return 0
    size = _ebml_number(file)
    return 0 if size is None else file.tell() + size


def _ebml_number(file: IO[bytes]) -> int | None:
    """A variable-length number; None for the value that means unknown, and at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 8 - first[0].bit_length()
    rest = file.read(length)
    largest = (1 << (7 * length + 7)) - 1
    value = int.from_bytes(first + rest, "big") & largest
    return None if len(rest) < length or value == largest else value


__all__ = ["check_container"]
