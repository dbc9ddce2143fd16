"""Files that appear whole or not at all, and what processes that died have left of theirs."""

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# A file that is being written: a dot, its final name, and who writes it (`_place` and process).
PARTIAL = re.compile(r"\..+\.partial-(?P<place>[A-Za-z0-9_-]+)-(?P<process>\d+)")
# Age of its last write after which an unfinished file of another place counts as left behind. Files of labels are written
# row group by row group, which takes minutes at most; a writer that was suspended for longer fails when it commits.
STALE_SECONDS = 24 * 3600.0


@cache
def _place() -> str:
    """
    Where process numbers mean what they mean here: host, boot and, in containers, the namespace of process numbers.

    Hosts of one name, a machine that was started anew, and containers on one machine each have numbers of their own.
    """
    host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname()) or "host"
    told = [host]
    try:
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        told.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        # A system without them has no such namespaces.
        told.append("")
    return f"{host}-{hashlib.sha256(' '.join(told).encode()).hexdigest()[:8]}"


def partial_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name: beside it, hidden."""
    return path.with_name(f".{path.name}.partial-{_place()}-{os.getpid()}")


def commit(partial: Path, path: Path) -> None:
    """Gives a file that was written under `partial_path` its name, once its content is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """
    The path to write a file under; it gets its name when the block ends, and is removed when that raises.

    Args:
        path: Final name. Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def create_atomically(path: Path, content: bytes) -> bool:
    """
    Writes a file unless there is one of this name: of several processes that try, one does.

    Returns:
        Whether this call wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without links: two that start at the very same time may then both write.
            if path.exists():
                return False
            os.replace(partial, path)
        return True
    finally:
        partial.unlink(missing_ok=True)


def remove_stale(folder: Path) -> list[str]:
    """
    Removes unfinished files of processes that no longer run.

    Those of this place (`_place`) by their process, all others by their age (`STALE_SECONDS`).

    Returns:
        Names of the removed files.
    """
    removed = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = PARTIAL.fullmatch(entry.name)
        if match and not _is_written(entry, match["place"], int(match["process"])):
            entry.unlink(missing_ok=True)
            removed.append(entry.name)
    return removed


def _is_written(path: Path, place: str, process: int) -> bool:
    """Whether somebody is still at work on an unfinished file."""
    if place != _place():
        try:
            return time.time() - path.stat().st_mtime < STALE_SECONDS
        except FileNotFoundError:
            return False
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


__all__ = ["atomic_file", "commit", "create_atomically", "partial_path", "remove_stale", "write_atomically"]
