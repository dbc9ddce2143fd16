"""A folder, on this machine or behind an fsspec URL, listed in a fixed order."""

import os
from collections.abc import Iterator
from typing import IO, Any

from lapa.data.schema import ReadError
from lapa.data.video_stream import is_url

MAX_DEPTH = 32


class FileTree:
    """
    Files below a folder. Paths below it are relative and have `/` between their parts; names that start with a dot
    are left out, as what systems and editors leave behind has them.

    Args:
        path (`str`): Local path or fsspec URL of a folder.

    Raises:
        ValueError: There is no such folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/") or path
        self._system: Any = None
        if is_url(path):
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(path)
        if not self.is_folder():
            raise ValueError(f"`path` {path!r} is no folder.")

    @property
    def name(self) -> str:
        """Name of the folder itself."""
        return (
            os.path.basename(os.path.abspath(self.path))
            if self._system is None
            else self._root.rstrip("/").split("/")[-1]
        )

    def location(self, relative: str) -> str:
        """
        Local path or URL of a file below, as other readers take it.

        Raises:
            ReadError: A path that leads out of the folder: names of files may come from what lies in it.
        """
        _check_below(relative, self.path)
        if not relative:
            return self.path
        if self._system is None:
            return os.path.join(self.path, *relative.split("/"))
        # In a chain such as zip://folder::file.zip or filecache::https://host/folder the path belongs to the first URL.
        parts = self.path.split("::")
        index = next(index for index, part in enumerate(parts) if "://" in part)
        parts[index] = f"{parts[index].rstrip('/')}/{relative}"
        return "::".join(parts)

    def _remote(self, relative: str) -> str:
        _check_below(relative, self.path)
        return f"{self._root.rstrip('/')}/{relative}" if relative else self._root

    def is_folder(self, relative: str = "") -> bool:
        """Whether there is a folder of that name."""
        if self._system is None:
            return os.path.isdir(self.location(relative))
        return bool(self._system.isdir(self._remote(relative)))

    def is_file(self, relative: str) -> bool:
        """Whether there is a file of that name."""
        if self._system is None:
            return os.path.isfile(self.location(relative))
        return bool(self._system.isfile(self._remote(relative)))

    def open(self, relative: str) -> IO[bytes]:
        """Opens a file for reading."""
        if self._system is None:
            return open(self.location(relative), "rb")
        file: IO[bytes] = self._system.open(self._remote(relative), "rb")
        return file

    def entries(self, relative: str = "") -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder, each sorted."""
        folders: list[str] = []
        files: list[str] = []
        if self._system is None:
            with os.scandir(self.location(relative)) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else files).append(entry.name)
        else:
            for entry in self._system.ls(self._remote(relative), detail=True):
                (folders if entry["type"] == "directory" else files).append(entry["name"].rstrip("/").split("/")[-1])
        return _visible(folders), _visible(files)

    def walk(self, relative: str = "", depth: int = MAX_DEPTH) -> Iterator[tuple[str, list[str], list[str]]]:
        """
        A folder and all below it.

        Args:
            relative: Where to start.
            depth: How many levels below it to enter; a bound, as links can make a loop.

        Yields:
            Path below the root, the folders in it and the files in it.
        """
        folders, files = self.entries(relative)
        yield relative, folders, files
        if depth > 0:
            for name in folders:
                yield from self.walk(f"{relative}/{name}" if relative else name, depth - 1)


def _check_below(relative: str, folder: str) -> None:
    if os.path.isabs(relative) or relative.startswith("/") or ".." in relative.split("/"):
        raise ReadError(f"{relative!r} does not lie below {folder}.")


def _visible(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


__all__ = ["MAX_DEPTH", "FileTree"]
