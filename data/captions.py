"""Instructions that lie beside videos: JSON, JSON lines, CSV and plain text files, and one text file per video."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lapa.data.file_tree import FileTree
from lapa.data.schema import ReadError

# Looked for beside the videos, in this order. `metadata` is what the Hub's VideoFolder and ImageFolder call theirs.
CAPTION_FILES = tuple(
    f"{name}.{ending}" for name in ("captions", "metadata") for ending in ("json", "jsonl", "csv", "tsv", "txt")
)
# Columns by which a row names its video, and its instruction; the first that a row has counts.
NAME_COLUMNS = ("file_name", "video", "video_path", "file", "path", "filename", "video_id", "id", "name")
TEXT_COLUMNS = ("instruction", "instructions", "caption", "captions", "text", "label", "description", "sentence")
# A text file that belongs to one video is read with the video, and is not expected to be long.
MAX_TEXT_BYTES = 1 << 20

Captions = Mapping[str, tuple[str, ...]]


def read_captions(tree: FileTree, captions: str | None = None) -> tuple[Captions, str | None]:
    """
    Reads the instructions of the videos below a folder.

    Args:
        tree: The folder.
        captions: File with them (local path or fsspec URL), by its ending JSON (`.json`, `.jsonl`), a table with a header
            (`.csv`, `.tsv`), or lines of a name, a tab (or blanks) and an instruction (`.txt`). When None, the first of
            `CAPTION_FILES` that lies in the folder; there may be none.

    Returns:
        Instructions by the name that the file gives the video, and where the file lies; nothing and None without one.

    Raises:
        ValueError: A file that is asked for is absent or of an unknown kind, or one cannot be understood; the line or
            row is named.
    """
    if captions is None:
        found = next((name for name in CAPTION_FILES if tree.is_file(name)), None)
        if found is None:
            return {}, None
        beside, name = tree, found
    else:
        folder, name = os.path.split(captions.rstrip("/"))
        beside = FileTree(folder or ".")
        if not beside.is_file(name):
            raise ValueError(f"`captions` {captions!r} does not exist.")
    location = beside.location(name)
    with beside.open(name) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{location} is no UTF-8 text: byte {error.start} cannot be decoded.") from error
    rows: dict[str, tuple[str, ...]] = {}
    for key, texts in _rows(text, location, PurePosixPath(name).suffix.lower()):
        key = str(PurePosixPath(key.replace("\\", "/")))
        rows[key] = tuple(dict.fromkeys((*rows.get(key, ()), *_clean(texts))))
    return rows, location


def match_captions(captions: Captions, videos: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """
    Finds the instructions of videos. A name fits a video if it is its path, or its path without the ending or its file
    name (with the ending or without) where no other video has the same.

    Args:
        captions: From `read_captions`.
        videos: Paths below the folder.

    Returns:
        Instructions of the videos that have any, and the names that fit no video.
    """
    counts = Counter(name for video in videos for name in set(_short_names(video)))
    matched: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for video in videos:
        names = [name for name in (video, *_short_names(video)) if name == video or counts[name] == 1]
        names = [name for name in names if name in captions]
        used.update(names)
        if texts := tuple(dict.fromkeys(text for name in names for text in captions[name])):
            matched[video] = texts
    return matched, [name for name in captions if name not in used]


def read_text(tree: FileTree, relative: str) -> tuple[str, ...]:
    """Instructions in the text file of one video, one a line; raises `ReadError` for what is no such file."""
    try:
        with tree.open(relative) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ReadError(f"{tree.location(relative)} cannot be read: {error.strerror or error}.") from error
    if len(content) > MAX_TEXT_BYTES:
        raise ReadError(
            f"{tree.location(relative)} has more than {MAX_TEXT_BYTES} bytes: no instructions of one video."
        )
    return split_text(content, tree.location(relative))


def split_text(content: bytes, name: str) -> tuple[str, ...]:
    """Distinct instructions in the content of a text file, one a line; `name` is what a `ReadError` calls it."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ReadError(f"{name} is no UTF-8 text: byte {error.start} cannot be decoded.") from error
    return tuple(dict.fromkeys(_clean(lines)))


def _short_names(video: str) -> tuple[str, str, str]:
    path = PurePosixPath(video)
    return str(path.with_suffix("")), path.name, path.stem


def _clean(texts: Sequence[str]) -> Iterator[str]:
    return (text for text in (" ".join(text.split()) for text in texts) if text)


def _rows(text: str, location: str, ending: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Names and instructions in the content of a file, by its ending (a URL may end in something else)."""
    if ending == ".json":
        content = _json(text, location)
        if isinstance(content, dict):
            yield from ((name, _texts(value, f"{location}: {name!r}")) for name, value in content.items())
        elif isinstance(content, list):
            yield from (_record(row, f"{location}, row {number}") for number, row in enumerate(content))
        else:
            raise ValueError(f"{location} must hold a JSON object or list, got {type(content).__name__}.")
    elif ending == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _record(_json(line, f"{location}, line {number}"), f"{location}, line {number}")
    elif ending in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
        try:
            for row in table:
                yield _record(row, f"{location}, line {table.line_num}")
        except csv.Error as error:
            raise ValueError(f"{location}, line {table.line_num}: {error}.") from error
    elif ending == ".txt":
        for line in text.splitlines():
            name, *rest = (line.split("\t", 1) if "\t" in line else line.split(None, 1)) or [""]
            if name.strip():
                yield name.strip(), rest
    else:
        raise ValueError(f"`captions` {location!r} must end in .json, .jsonl, .csv, .tsv or .txt.")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no valid JSON: {error}.") from error


def _record(row: Any, name: str) -> tuple[str, list[str]]:
    """Name and instructions of a row with named columns."""
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be an object with named fields, got {type(row).__name__}.")
    video = next((row[column] for column in NAME_COLUMNS if row.get(column) not in (None, "")), None)
    if not isinstance(video, str | int):
        raise ValueError(f"{name} names no video; it has {', '.join(map(str, row))}, one of {NAME_COLUMNS} is needed.")
    return str(video), _texts(row, name)


def _texts(value: Any, name: str) -> list[str]:
    """The instructions in a value: text, a list of texts, a record with a column of them, or nothing."""
    if isinstance(value, dict):
        value = next((value[column] for column in TEXT_COLUMNS if value.get(column) is not None), None)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: an instruction must be text or a list of texts, got {value!r}.")
    return texts


__all__ = ["CAPTION_FILES", "Captions", "match_captions", "read_captions", "read_text", "split_text"]
