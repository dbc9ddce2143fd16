"""Tar files: where their members lie, so that single ones can be read; and streams of them, compressed and split."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BufferedReader, RawIOBase
from typing import IO, Any, NamedTuple, Self

from lapa.data.file_tree import FileTree
from lapa.data.schema import ReadError

# A name longer than this, which stands in a header of its own and is read into memory, no file system would hold.
MAX_NAME_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
BUFFER_BYTES = 1 << 20
# In a stream tarfile goes over what is left out in small steps, also where the stream ends before.
MAX_MEMBER_BYTES = 1 << 32
EXTENDED_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


class TarMember(NamedTuple):
    """A file in a tar file: its name, and where its content lies."""

    name: str
    offset: int
    size: int


class _Header(tarfile.TarInfo):
    """A header that is refused where it would make `tarfile` go back, or read more than a name into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        _check_size(header.size, MAX_NAME_BYTES if header.type in EXTENDED_HEADERS else MAX_MEMBER_BYTES)
        return header


def _check_size(size: int, most: int) -> None:
    if not 0 <= size <= most:
        raise tarfile.ReadError(f"a header announces {size} bytes")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What is in an archive, without keeping what was seen, as iterating over it would."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        # Extended headers can say another size than the one that was checked.
        _check_size(member.size, MAX_MEMBER_BYTES)
        yield member


def tar_members(tree: FileTree, relative: str) -> tuple[list[TarMember], str | None]:
    """
    Lists the files in an uncompressed tar file by its headers.

    Args:
        tree, relative: Where it lies.

    Returns:
        The files in it, in order, and what is wrong after them, if anything is.
    """
    members: list[TarMember] = []
    name = tree.location(relative)
    with tree.open(relative) as file:
        size = file.seek(0, 2)
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
                for member in _members(archive):
                    if archive.offset <= end:
                        return members, f"{name} leads back from byte {end}"
                    end = archive.offset
                    if member.isreg() and not member.issparse():
                        members.append(TarMember(member.name, member.offset_data, member.size))
                    if end > size:
                        break
            # tarfile takes whatever is no header for the end; the end is a block of zeros, or of the file.
            file.seek(end)
            if end > size or any(file.read(tarfile.BLOCKSIZE)):
                return members, f"{name} is cut short or damaged at byte {min(end, size)} of {size}"
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            return members, f"{name} cannot be read after byte {end}: {error}"
    return members, None


def read_member(tree: FileTree, relative: str, member: TarMember) -> bytes:
    """Content of a file in a tar file; raises `ReadError` where it cannot be read, or not to its end."""
    try:
        with tree.open(relative) as file:
            file.seek(member.offset)
            content = file.read(member.size)
    except OSError as error:
        raise ReadError(f"{tree.location(relative)} cannot be read: {error.strerror or error}.") from error
    if len(content) < member.size:
        raise ReadError(f"{tree.location(relative)} is cut short in {member.name!r}.")
    return content


class _Parts(RawIOBase):
    """The parts of a file that was split, one after the other."""

    def __init__(self, tree: FileTree, parts: Sequence[str]) -> None:
        self._tree, self._parts = tree, list(parts)
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._file is not None or self._parts:
            if self._file is None:
                self._file = self._tree.open(self._parts.pop(0))
            content = self._file.read(len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
            self._file.close()
            self._file = None
        return 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def stream_members(tree: FileTree, parts: Sequence[str], max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """
    Reads the files of a tar file from its start to its end.

    Args:
        tree: Where it lies.
        parts: The file, or the parts it was split into in order; compressed by gzip or not.
        max_bytes: Size above which a file is not read.

    Yields:
        Name, and content; None for content that is too large.

    Raises:
        ReadError: An archive that is cut short or damaged; the last file before it is named.
    """
    last = "its start"
    try:
        with tree.open(parts[0]) as file:
            compressed = file.read(2) == GZIP_MAGIC
        with ExitStack() as stack:
            stream: Any = stack.enter_context(BufferedReader(_Parts(tree, parts), BUFFER_BYTES))
            if compressed:
                # Unlike tarfile's own, it checks the sums and misses an end.
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header))
            for member in _members(archive):
                if member.isreg() and not member.issparse():
                    content = archive.extractfile(member) if member.size <= max_bytes else None
                    yield member.name, None if content is None else content.read()
                    last = member.name
            while stream.read(BUFFER_BYTES):  # to the sum at the end
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError) as error:
        raise ReadError(f"{tree.location(parts[0])} cannot be read after {last}: {error}") from error


__all__ = ["TarMember", "read_member", "stream_members", "tar_members"]
