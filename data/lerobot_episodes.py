"""
Which episodes and tasks a LeRobot data set has, and where their rows and videos lie.

v2.1 keeps an episode per file (`meta/episodes.jsonl`, `meta/tasks.jsonl`); v2.0 is laid out alike. v3.0 keeps many per
file (`meta/episodes/chunk-*/file-*.parquet`, `meta/tasks.parquet`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.file_tree import FileTree
from lapa.data.lerobot_info import MAX_INDEX, Info, json_object
from lapa.data.parquet_rows import ParquetRows, step_numbers

EPISODES_FILE, TASKS_FILE = "meta/episodes.jsonl", "meta/tasks.jsonl"
EPISODES_FOLDER, TASKS_TABLE = "meta/episodes", "meta/tasks.parquet"
TASK_COLUMN = "task_index"
# Longest line of a file of lines.
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class VideoPlaces:
    """
    Where the episodes of one camera lie in video files that hold several (v3.0), (num_episodes,) each.

    Args:
        chunk, file (`NDArray`): int64 numbers of the file; -1 where the camera recorded nothing.
        start, stop (`NDArray`): float64 seconds after the first frame of the file.
    """

    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    start: NDArray[np.float64]
    stop: NDArray[np.float64]


@dataclass
class Episodes:
    """
    The episodes that `meta` lists, by rising index; (num_episodes,) each.

    Args:
        index, length (`NDArray`): int64 number of the episode, and its steps.
        tasks (`Sequence`, *optional*): Texts of each; kept only where steps do not tell theirs.
        chunk, file (`NDArray`, *optional*): int64 numbers of the data file (v3.0).
        videos (`dict`): By camera (v3.0).
    """

    index: NDArray[np.int64]
    length: NDArray[np.int64]
    tasks: Sequence[tuple[str, ...]] | None = None
    chunk: NDArray[np.int64] | None = None
    file: NDArray[np.int64] | None = None
    videos: dict[str, VideoPlaces] = field(default_factory=dict)


def read_episodes(tree: FileTree, info: Info, cameras: Sequence[str], with_tasks: bool) -> Episodes:
    """
    Reads which episodes there are.

    Args:
        tree, info: The data set.
        cameras: Whose videos are wanted.
        with_tasks: Whether to keep the texts of each episode.

    Raises:
        ValueError: No such file, or an entry that makes no sense; file and line are named.
    """
    episodes = (
        _episodes_of_lines(tree, with_tasks)
        if info.episode_per_file
        else _episodes_of_tables(tree, info, cameras, with_tasks)
    )
    doubled = episodes.index[:-1][np.diff(episodes.index) == 0]
    if len(doubled):
        raise ValueError(f"{tree.location('meta')} lists episode {doubled[0]} twice.")
    return episodes


def _episodes_of_lines(tree: FileTree, with_tasks: bool) -> Episodes:
    numbers: list[tuple[int, int]] = []
    tasks: list[tuple[str, ...]] = []
    for where, line in _json_lines(tree, EPISODES_FILE):
        index, length = line.get("episode_index"), line.get("length")
        if (
            type(index) is not int
            or type(length) is not int
            or not 0 <= min(index, length) <= max(index, length) < MAX_INDEX
        ):
            raise ValueError(f"{where} must have `episode_index` and `length`, integers of at least 0.")
        numbers.append((index, length))
        if with_tasks:
            tasks.append(_texts(line.get("tasks")))
    table = np.array(numbers, np.int64).reshape(-1, 2)
    order = np.argsort(table[:, 0], kind="stable")
    kept = [tasks[row] for row in order] if with_tasks else None
    return Episodes(table[order, 0], table[order, 1], kept)


def _episodes_of_tables(tree: FileTree, info: Info, cameras: Sequence[str], with_tasks: bool) -> Episodes:
    keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    places = {camera: [f"videos/{camera}/{key}" for key in ("chunk_index", "file_index")] for camera in cameras}
    times = {camera: [f"videos/{camera}/{key}" for key in ("from_timestamp", "to_timestamp")] for camera in cameras}
    columns: dict[str, list[NDArray[Any]]] = {}
    tasks: list[tuple[str, ...]] = []
    files = [
        f"{folder}/{name}"
        for folder, _, names in (tree.walk(EPISODES_FOLDER) if tree.is_folder(EPISODES_FOLDER) else ())
        for name in names
        if name.endswith(".parquet")
    ]
    if not files:
        raise ValueError(
            f"{tree.location(EPISODES_FOLDER)} has no parquet file, which a data set of {info.version} needs."
        )
    for relative in files:
        with ParquetRows(tree, relative) as rows:
            optional = [key for part in (places, times) for names in part.values() for key in names]
            here = [key for key in optional if key in rows.columns]
            told = ["tasks"] if with_tasks and "tasks" in rows.columns else []
            table = rows.read([*keys, *here, *told])
        for key in (*keys, *optional):
            missing = np.full(table.num_rows, np.nan)
            # An episode that a camera missed has no place in its videos.
            column = _filled(table[key], f"column {key!r} of {rows.name}") if key in table.column_names else missing
            columns.setdefault(key, []).append(column)
        if with_tasks:
            tasks += [_texts(texts) for texts in (table["tasks"].to_pylist() if told else [None] * table.num_rows)]
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    for key in (*keys, *(key for names in places.values() for key in names)):
        whole = (joined[key] >= 0) & (joined[key] < MAX_INDEX)
        if not (whole if key in keys else whole | np.isnan(joined[key])).all():
            raise ValueError(f"column {key!r} of {tree.location(EPISODES_FOLDER)} must hold integers of at least 0.")
    order = np.argsort(joined["episode_index"], kind="stable")
    index, length, chunk, file = (joined[key][order].astype(np.int64) for key in keys)
    videos = {}
    for camera in cameras:
        chunks, numbers = (np.nan_to_num(joined[key][order], nan=-1).astype(np.int64) for key in places[camera])
        start, stop = (joined[key][order] for key in times[camera])
        ends = _range_ends(chunks, numbers, start, stop, 1 / info.fps)
        videos[camera] = VideoPlaces(chunks, numbers, start, ends)
    kept = [tasks[row] for row in order] if with_tasks else None
    return Episodes(index, length, kept, chunk, file, videos)


def _filled(column: Any, name: str) -> NDArray[np.float64]:
    """Numbers of a column as float64; NaN where there is none."""
    import pyarrow.compute as pc

    if column.null_count == len(column):
        return np.full(len(column), np.nan)
    values = step_numbers(pc.fill_null(column, -1), name, np.float64)[:, 0]
    values[np.asarray(column.is_null())] = np.nan
    return values


def _range_ends(
    chunk: NDArray[np.int64],
    file: NDArray[np.int64],
    start: NDArray[np.float64],
    stop: NDArray[np.float64],
    interval: float,
) -> NDArray[np.float64]:
    """
    Seconds at which the frames of episodes end, exclusive.

    `to_timestamp` is where the next frame would be. Some writers put the time of the last frame there: where the next
    episode of the file does not begin there either, a frame more is the episode's own.
    """
    later = np.full(len(start), np.inf)
    order = np.lexsort((start, file, chunk))
    one, other = order[:-1], order[1:]
    same = (chunk[one] == chunk[other]) & (file[one] == file[other]) & (start[other] > start[one])
    later[one[same]] = start[other[same]]
    ends: NDArray[np.float64] = np.fmax(stop, np.fmin(later, stop + interval))
    return ends


def read_tasks(tree: FileTree) -> dict[int, str] | None:
    """
    Reads the texts of the tasks by their number, from `meta/tasks.parquet` or `meta/tasks.jsonl`; None without either.

    Raises:
        ValueError: An entry that is no task.
    """
    if tree.is_file(TASKS_TABLE):
        with ParquetRows(tree, TASKS_TABLE) as rows:
            # pandas writes the texts as an index, whose column has a name of its own.
            texts = [name for name in rows.columns if name != TASK_COLUMN]
            column = "task" if "task" in texts else texts[0] if texts else "task"
            table = rows.read([TASK_COLUMN, column])
        pairs = zip(table[TASK_COLUMN].to_pylist(), table[column].to_pylist())
        entries = [(f"{rows.name}, row {number}", *pair) for number, pair in enumerate(pairs)]
    elif tree.is_file(TASKS_FILE):
        entries = [(where, line.get(TASK_COLUMN), line.get("task")) for where, line in _json_lines(tree, TASKS_FILE)]
    else:
        return None
    tasks: dict[int, str] = {}
    for where, index, text in entries:
        if type(index) is not int or not isinstance(text, str):
            raise ValueError(f"{where} must have a number `task_index` and a text `task`, got {index!r} and {text!r}.")
        tasks[index] = text.strip()
    return tasks


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _json_lines(tree: FileTree, relative: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of every line of a file."""
    location = tree.location(relative)
    try:
        file = tree.open(relative)
    except OSError as error:
        raise ValueError(f"{location} cannot be opened, and the data set needs it.") from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{location}, line {number} is longer than {MAX_LINE_BYTES} bytes.")
            if line.strip():
                yield f"{location}, line {number}", json_object(line, f"{location}, line {number}")


__all__ = ["TASK_COLUMN", "Episodes", "VideoPlaces", "read_episodes", "read_tasks"]
