"""A folder of a TFDS data set in RLDS form, on this machine or behind an fsspec URL: what it announces, and its files."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple

from lapa.data.schema import ReadError
from lapa.data.tfds_features import flatten_features
from lapa.data.video_stream import is_url

FEATURES_FILE, INFO_FILE = "features.json", "dataset_info.json"
STEPS, METADATA = "steps", "episode_metadata"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
VERSION = re.compile(r"\d+\.\d+\.\d+")
# Bytes that a remote file is read ahead; requests of this size hide the delay of most object stores.
READ_AHEAD_BYTES = 1 << 23
# File names that a message lists before it only counts.
MAX_NAMED = 3
# Records that one file may be said to hold; files of the data sets of `open_x` hold some thousands. A number alone must
# not make a reader go through, or shuffle, episodes that are not there.
MAX_RECORDS = 1 << 20


class ShardFile(NamedTuple):
    """A file of a split: its number among all files of the split, its name, and how many records it is said to hold."""

    number: int
    name: str
    num_records: int


class _Files:
    """Files directly in one folder, by name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._system: Any = None
        if is_url(path):
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(path)

    def location(self, name: str) -> str:
        """Where a file is, for messages."""
        return os.path.join(self.path, name) if self._system is None else f"{self.path.rstrip('/')}/{name}"

    def read_text(self, name: str) -> str | None:
        """Content of a file; None where there is none."""
        try:
            with self.open(name) as file:
                return file.read().decode("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Beside OSError each protocol's package has errors of its own.
        except Exception as error:
            raise ValueError(f"{self.location(name)} cannot be read: {error}.") from error

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading; remote ones are read ahead."""
        if self._system is None:
            # Unbuffered, as what is read is a few bytes here and there, or all of a record.
            return open(os.path.join(self.path, name), "rb", buffering=0)
        options = {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
        file: IO[bytes] = self._system.open(f"{self._root.rstrip('/')}/{name}", "rb", **options)
        return file

    def size(self, name: str) -> int | None:
        """Bytes of a file, where that is told."""
        if self._system is None:
            return os.path.getsize(os.path.join(self.path, name))
        size = self._system.size(f"{self._root.rstrip('/')}/{name}")
        return None if size is None else int(size)

    @property
    def is_local(self) -> bool:
        """Whether any part of a file can be read at once."""
        return self._system is None

    def names(self) -> set[str] | None:
        """Names in the folder; None where a server does not list folders, as plain HTTP servers need not."""
        try:
            if self._system is None:
                return set(os.listdir(self.path))
            entries = self._system.ls(self._root, detail=False)
        # As above; a folder that cannot be listed is found out about when its files are opened.
        except Exception:
            return None
        names = {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        # A web page that happens to hold links is no list of the folder.
        return names if FEATURES_FILE in names or any(VERSION.fullmatch(name) for name in names) else None


def newest_version(path: str) -> str:
    """
    The version folder to read.

    Args:
        path: A version folder, or the folder of a data set with version folders (`1.0.0`, `1.0.1`) in it.

    Returns:
        `path` itself if it is a version folder, else the newest version in it; `path` where there is none.
    """
    names = _Files(path).names() or set()
    versions = [name for name in names if VERSION.fullmatch(name)]
    if FEATURES_FILE in names or not versions:
        return path
    newest = max(versions, key=lambda name: [int(part) for part in name.split(".")])
    return _Files(path).location(newest)


def _read_json(files: _Files, name: str) -> dict[str, Any]:
    text = files.read_text(name)
    if text is None:
        newest = newest_version(files.path)
        hint = f"; did you mean {newest}?" if newest != files.path else ""
        raise ValueError(f"{files.path} is no RLDS folder: {name} is missing{hint}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.location(name)} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{files.location(name)} must hold a JSON object.")
    return content


class RldsFolder:
    r"""
    One version folder of a TFDS data set in RLDS form.

    Args:
        path (`str` or `Path`): Folder with `features.json` and `dataset_info.json`; local, or an fsspec URL.

    Attributes:
        step_features (`dict`): Readable features of a step by their path, as `observation/image`.
        episode_features (`dict`): Those of the episode as a whole, by their path.
        info (`dict`): `dataset_info.json`.

    Raises:
        ValueError: Not such a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._files = _Files(self.path)
        features = _read_json(self._files, FEATURES_FILE)
        self.info = _read_json(self._files, INFO_FILE)
        self.name = str(self.info.get("name") or os.path.basename(os.path.dirname(os.path.abspath(self.path))))
        file_format = self.info.get("fileFormat", "tfrecord")
        if file_format != "tfrecord":
            raise ValueError(f"{self.path} stores {file_format!r}; only 'tfrecord' can be read.")
        try:
            top = features.get("featuresDict", {}).get("features", {})
            if "sequence" not in top.get(STEPS, {}):
                raise ValueError(f"{FEATURES_FILE} has no `{STEPS}`: this is no RLDS data set.")
            self.step_features = flatten_features(top[STEPS]["sequence"]["feature"])
            self.episode_features = flatten_features(
                {"featuresDict": {"features": {name: node for name, node in top.items() if name != STEPS}}}
            )
            self._splits = {
                str(entry["name"]): _shard_files(entry, self.name) for entry in self.info.get("splits", ())
            }
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is no TFDS folder: its JSON files are not of that form ({error!r})."
            ) from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.path} is no RLDS folder that can be read: {error}") from error

    def location(self, name: str) -> str:
        """Where a file of the folder is."""
        return self._files.location(name)

    @property
    def version(self) -> str:
        """Version of the data set."""
        return str(self.info.get("version", ""))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that `dataset_info.json` lists, whether or not their files are here."""
        return tuple(self._splits)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Colour images among the observations, by name."""
        paths = [path for path, spec in self.step_features.items() if spec.is_colour_image]
        return tuple(sorted(path.removeprefix("observation/") for path in paths))

    def split_files(self, split: str) -> tuple[tuple[ShardFile, ...], tuple[ShardFile, ...]]:
        """
        Files of a split that are here, and those that are listed only. Where a server does not list folders, all count
        as here.

        Raises:
            ValueError: An unknown split.
        """
        if split not in self._splits:
            raise ValueError(f"`split` {split!r} is unknown; {self.path} lists {', '.join(self.splits) or 'none'}.")
        names = self._files.names()
        files = self._splits[split]
        present = tuple(file for file in files if names is None or file.name in names)
        return present, tuple(file for file in files if file not in present)

    def shards(self, split: str) -> tuple[ShardFile, ...]:
        """
        All files of a split.

        Raises:
            ValueError: An unknown split, or a split of which a file is not here; the file is named.
        """
        present, absent = self.split_files(split)
        if absent:
            raise ValueError(f"`split` {split!r} needs the file {self.describe(absent)} missing.")
        return present

    def describe(self, files: Sequence[ShardFile]) -> str:
        """Files for a message, with the verb that fits their number: `a, b and 3 more, which are`."""
        more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
        named = ", ".join(self.location(file.name) for file in files[:MAX_NAMED])
        return f"{named}{more}, which {'is' if len(files) == 1 else 'are'}"

    @property
    def is_local(self) -> bool:
        """Whether any record of a file can be read at once."""
        return self._files.is_local

    @contextmanager
    def open(self, file: ShardFile, *, fetched: bool = False) -> Iterator[tuple[IO[bytes], int | None]]:
        """
        Opens a file.

        Args:
            file: One of a split.
            fetched: Copy a remote file to a temporary folder first, which is removed afterwards, so that any part of it
                can be read.

        Yields:
            The file at its start, and its size in bytes if that is told.

        Raises:
            ReadError: There is no such file.
        """
        try:
            source, size = self._files.open(file.name), self._files.size(file.name)
        except FileNotFoundError as error:
            raise ReadError(
                f"{self.location(file.name)} is missing; its {file.num_records} announced episodes are lost."
            ) from error
        with source:
            if self.is_local or not fetched:
                yield source, size
                return
            with TemporaryDirectory(prefix="lapa-rlds-") as folder:
                path = os.path.join(folder, "shard.tfrecord")
                with open(path, "wb") as copy:
                    while piece := source.read(READ_AHEAD_BYTES):
                        copy.write(piece)
                with open(path, "rb") as copied:
                    yield copied, os.path.getsize(path)


def _shard_files(entry: Mapping[str, Any], dataset: str) -> tuple[ShardFile, ...]:
    """Names of the files of a split, by the template that TFDS writes down."""
    lengths = [int(length) for length in entry["shardLengths"]]
    template = entry.get("filepathTemplate") or DEFAULT_TEMPLATE
    files = []
    for index, length in enumerate(lengths):
        name = str(template)
        for key, value in (
            ("DATASET", dataset),
            ("SPLIT", entry["name"]),
            ("FILEFORMAT", "tfrecord"),
            ("SHARD_INDEX", f"{index:05d}"),
            ("NUM_SHARDS", f"{len(lengths):05d}"),
            ("SHARD_X_OF_Y", f"{index:05d}-of-{len(lengths):05d}"),
        ):
            name = name.replace(f"{{{key}}}", str(value))
        if "/" in name or "\\" in name or not 0 <= length <= MAX_RECORDS:
            raise ValueError(f"{INFO_FILE} lists a file {name!r} of {length} records, which cannot be.")
        files.append(ShardFile(index, name, length))
    return tuple(files)


__all__ = ["METADATA", "STEPS", "RldsFolder", "ShardFile", "newest_version"]
