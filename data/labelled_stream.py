"""Labelled steps of folders that `lapa label` wrote, as a shuffled stream: what stage 2 learns from at any size."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from lapa.data.episode_source import OnError, raise_error
from lapa.data.label_table import LabelFolder
from lapa.data.read_counts import NO_INSTRUCTION, ReadCounts
from lapa.data.schema import ReadError
from lapa.data.shuffled_stream import ShuffledStream
from lapa.data.stream_cursor import Reference, StreamOptions, StreamPart
from lapa.processing.processing_lapa import LapaProcessor

# Reason to leave a step out.
# Columns of what the image may come from; or none is needed, or codes lie in files of their own.
VISION_COLUMNS, NO_VISION = {"images": "image", "column": "vision_codes"}, "none"
MIXTURE_ENDINGS = (".yaml", ".yml")
# A row of a file.
Place = tuple[int, int]


class RowGroupCounts(ReadCounts):
    """`ReadCounts` of row groups and their steps."""

    group_name: ClassVar[str] = "row_groups"
    item_name: ClassVar[str] = "steps"


@dataclass(frozen=True)
class LabelSource:
    """
    A folder of labels, or a part of it, with what a stream of its steps needs to know.

    Args:
        folder (`LabelFolder`): The labels.
        weight (`float`): How often it gives the next step, relative to the other folders of a stream.
        vision (`str`): Where the image comes from: `"images"`, which the policy's vision tokenizer encodes in training;
            `"column"`, the codes of the column `vision_codes`; or a folder of code files (`code_file`).
        start, stop (`tuple[int, int]`, *optional*): First file and row, and the first that no longer belongs to it; the
            whole folder when None.
    """

    folder: LabelFolder
    weight: float = 1.0
    vision: str = "images"
    start: Place | None = None
    stop: Place | None = None

    @property
    def name(self) -> str:
        """Folder's name and settings."""
        return f"{self.folder.tree.name}-{self.folder.manifest.settings.digest[:8]}"

    @property
    def first(self) -> Place:
        """First file and row."""
        return (0, 0) if self.start is None else self.start

    @property
    def last(self) -> Place:
        """First file and row that do not belong to it."""
        return (len(self.folder.files), 0) if self.stop is None else self.stop

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        column = VISION_COLUMNS.get(self.vision)
        return ("instruction", "latent_action_codes", *([] if column is None else [column]))


def code_file(folder: str | Path, labels_file: str) -> Path:
    """Where the vision codes of a file of labels are kept, by row: a `.npy` (num_rows, num_image_tokens) of integers."""
    return Path(folder) / f"{Path(labels_file).stem}.npy"


@dataclass(frozen=True)
class _RowGroup:
    """Rows of a row group that belong to a source, `positions` among its rows; it begins at row `offset` of `file`."""

    table: Any
    positions: NDArray[np.int64]
    vision_codes: NDArray[Any] | None
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in the buffer: of its image the file, or codes."""

    instruction: str
    latent_action_codes: NDArray[np.int64]
    image: bytes | None
    vision_codes: NDArray[np.int64] | None
    file: str
    row: int


def has_instruction(column: Any) -> NDArray[np.bool_]:
    """Which of an Arrow column of texts say anything."""
    return np.array([text is not None and bool(text.strip()) for text in column.to_pylist()], dtype=bool)


class LabelPart(StreamPart[_RowGroup, _Step]):
    """The steps of a folder, grouped by row group; shards are its files, a reference is the row in its row group."""

    def __init__(self, source: LabelSource, processor: LapaProcessor) -> None:
        self.source, self.folder, self.processor = source, source.folder, processor
        self.name, self.weight = source.name, source.weight
        first, last = source.first, source.last
        rows = self.folder.manifest.settings.row_group_rows
        # Files of the source, and their first and last row groups in it.
        self._files: list[tuple[int, int]] = []
        counts = []
        for file in range(first[0], min(last[0] + 1, len(self.folder.files))):
            begin = first[1] // rows if file == first[0] else 0
            end = -(-last[1] // rows) if file == last[0] else self.folder.group_count(file)
            if begin < end:
                self._files.append((file, begin))
                counts.append(end - begin)
        self.group_counts = tuple(counts)

    def description(self) -> dict[str, Any]:
        """As in `StreamPart`."""
        return {
            "name": self.name,
            "weight": self.weight,
            "settings": self.folder.manifest.settings.digest,
            "rows": self.folder.num_rows,
            "start": list(self.source.first),
            "stop": list(self.source.last),
            "vision": "images" if self.source.vision == "images" else "codes",
        }

    def new_counts(self) -> RowGroupCounts:
        """As in `StreamPart`."""
        return RowGroupCounts()

    def open(self, shard: int, groups: Sequence[int], on_error: OnError) -> Iterator[tuple[int, _RowGroup]]:
        """As in `StreamPart`: row groups of a file. A file that cannot be read is one error."""
        file, begin = self._files[shard]
        try:
            codes = None
            if self.source.vision not in (*VISION_COLUMNS, NO_VISION):
                path = code_file(self.source.vision, self.folder.files[file])
                codes = np.load(path, mmap_mode="r", allow_pickle=False)
            numbers = [begin + group for group in groups]
            tables = self.folder.read_groups(file, numbers, self.source.columns)
            for group, number, table in zip(groups, numbers, tables):
                yield group, self._group(file, number, table, codes)
        except ReadError as error:
            on_error(error)

    def _group(self, file: int, number: int, table: Any, codes: NDArray[Any] | None) -> _RowGroup:
        offset = number * self.folder.manifest.settings.row_group_rows
        places = offset + np.arange(len(table))
        first, last = self.source.first, self.source.last
        inside = np.ones(len(table), dtype=bool)
        if file == first[0]:
            inside &= places >= first[1]
        if file == last[0]:
            inside &= places < last[1]
        rows = None if codes is None else np.asarray(codes[offset : offset + len(table)])
        return _RowGroup(table, np.flatnonzero(inside), rows, self.folder.files[file], offset)

    def items(self, group: _RowGroup, counts: ReadCounts) -> NDArray[np.int64]:
        """As in `StreamPart`: (num_steps, 1) rows that have an instruction."""
        counts.groups += 1
        kept = has_instruction(group.table["instruction"])[group.positions]
        if not kept.all():
            counts.dropped_items[NO_INSTRUCTION] += int((~kept).sum())
        return group.positions[kept][:, None]

    def read(self, group: _RowGroup, items: NDArray[np.int64]) -> list[_Step | str]:
        """As in `StreamPart`; images stay encoded."""
        rows = group.table.take(items[:, 0]).to_pylist()
        codes = [None] * len(rows) if group.vision_codes is None else list(group.vision_codes[items[:, 0]])
        return [
            _Step(
                row["instruction"],
                np.array(row["latent_action_codes"], dtype=np.int64),
                row["image"]["bytes"] if "image" in row else None,
                np.array(row["vision_codes"], dtype=np.int64) if "vision_codes" in row else own,
                group.file,
                group.offset + position,
            )
            for row, own, position in zip(rows, codes, items[:, 0].tolist())
        ]

    def example(self, item: _Step, reference: Reference) -> dict[str, Any]:
        """What a `LabelledStepStream` yields."""
        encoded = self.processor.encode_example(
            item.instruction, vision_codes=item.vision_codes, latent_action_codes=item.latent_action_codes
        )
        example: dict[str, Any] = {name: np.asarray(ids, dtype=np.int64) for name, ids in encoded.items()}
        if item.image is not None:
            image = decode_stored_image(item.image, f"an image of {self.folder.path}")
            example["pixel_values"] = np.asarray(self.processor.image_processor(image)["pixel_values"][0])
        example["example_id"] = f"{self.folder.tree.name}/{item.file} row {item.row}"
        return example


def decode_stored_image(content: bytes, name: str) -> NDArray[np.uint8]:
    """
    An image of the column `image`, (height, width, 3) uint8 RGB.

    Raises:
        ReadError: No readable image.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReadError(f"{name} cannot be decoded: {error}.") from error


class LabelledStepStream(ShuffledStream):
    r"""
    Steps of one or many folders of labels, encoded for the policy.

    ```python
    >>> sources = [LabelSource(LabelFolder("bridge-labels"), weight=2.0), LabelSource(LabelFolder("ssv2-labels"))]
    >>> stream = LabelledStepStream(sources, processor, seed=0)
    >>> next(iter(stream))
    {'input_ids': array([...]), 'labels': array([...]), 'pixel_values': array([...]),
     'example_id': 'bridge-labels/data/... row 17'}
    ```

    Steps without an instruction are left out and counted. Order, division and state are those of [`ShuffledStream`].

    Memory: in every loader worker `buffer_size` steps with their images as JPEG files, and a row group per folder.

    Args:
        sources: What is read. Their names differ.
        processor: Encodes the examples.
        seed: Of all draws, at least 0.
        buffer_size: Steps to draw from, at least 1.
        repeat: Whether folders begin anew for ever (training), or a pass ends, with every step once.
        on_error: `"raise"` stops at what cannot be read, `"skip"` counts it and goes on.
        max_skipped: Share of the row groups of a folder that may be skipped, in [0, 1]; more ends the run.
        rank, world_size: Which of how many processes this is; `RANK` and `WORLD_SIZE` of the environment when None.

    Raises:
        ValueError: An argument out of range, no folder, an empty folder, two of one name and settings.
    """

    def __init__(
        self,
        sources: Sequence[LabelSource],
        processor: LapaProcessor,
        *,
        seed: int = 0,
        buffer_size: int = 4096,
        repeat: bool = True,
        on_error: str = "raise",
        max_skipped: float = 0.05,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        parts = [LabelPart(source, processor) for source in sources]
        options = StreamOptions(seed, buffer_size, None, repeat, on_error, max_skipped)
        super().__init__(parts, options, rank, world_size)


class LabelledRows(Dataset[dict[str, Any]]):
    """
    The same examples in their order and by their index, for evaluation. Only what is asked for is read: a row group at a
    time.

    Args:
        sources: What is read.
        processor: Encodes the examples.
    """

    def __init__(self, sources: Sequence[LabelSource], processor: LapaProcessor) -> None:
        self.parts = [LabelPart(source, processor) for source in sources]
        # Part, shard and group of each row group, and how many rows come before it.
        self._groups: list[tuple[int, int, int]] = []
        self._items: list[NDArray[np.int64]] = []
        for number, part in enumerate(self.parts):
            light = LabelPart(replace(part.source, vision=NO_VISION), processor)
            for shard, count in enumerate(part.group_counts):
                for group, rows in light.open(shard, range(count), raise_error):
                    self._groups.append((number, shard, group))
                    self._items.append(light.items(rows, RowGroupCounts()))
        self._ends = np.cumsum([len(items) for items in self._items])
        self._kept: tuple[int, _RowGroup] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < len(self):
            raise IndexError(f"step {item} of {len(self)}")
        index = int(np.searchsorted(self._ends, item, side="right"))
        number, shard, group = self._groups[index]
        part = self.parts[number]
        if self._kept is None or self._kept[0] != index:
            self._kept = index, next(rows for _, rows in part.open(shard, [group], raise_error))
        row = item - int(self._ends[index]) + len(self._items[index])
        (step,) = part.read(self._kept[1], self._items[index][row : row + 1])
        assert isinstance(step, _Step)
        return part.example(step, ())


def hold_out_episodes(folder: LabelFolder, count: int) -> Place:
    """
    Where the last episodes of a folder begin.

    Args:
        folder: The labels. Of its rows only the names and instructions are read, from the end.
        count: How many episodes, at least 1; those without an instruction are not counted.

    Returns:
        File and row.

    Raises:
        ValueError: No fewer than the folder has.
    """
    found: dict[tuple[str, str], None] = {}
    place, rows = (len(folder.files), 0), folder.manifest.settings.row_group_rows
    columns = ("source", "episode_id", "instruction")
    for file in reversed(range(len(folder.files))):
        for group in reversed(range(folder.group_count(file))):
            (table,) = folder.read_groups(file, [group], columns)
            names = list(zip(table["source"].to_pylist(), table["episode_id"].to_pylist()))
            for row in reversed(np.flatnonzero(has_instruction(table["instruction"])).tolist()):
                if names[row] not in found and len(found) == count:
                    return place
                found[names[row]] = None
                place = (file, group * rows + row)
    raise ValueError(
        f"`eval_episodes` must lie in [0, {max(len(found) - 1, 0)}] for the {len(found)} episodes of {folder.path} that "
        f"have an instruction, got {count}."
    )


def open_label_folders(data: str) -> list[tuple[LabelFolder, float]]:
    """
    Folders of labels and their weights.

    ```yaml
    - path: bridge-labels            # relative to the folder of this file
      weight: 2
    - hf://datasets/NAME/ssv2-labels
    ```

    Args:
        data: A folder, several with commas between them, or a YAML file with a list of folders, each a path or a mapping of
            `path` and `weight` (1 where it is not said).

    Raises:
        ValueError: No such list, a weight that is none, and what `LabelFolder` refuses.
    """
    entries: Any = [part.strip() for part in data.split(",") if part.strip()]
    root = ""
    if data.endswith(MIXTURE_ENDINGS):
        import yaml

        if not Path(data).is_file():
            raise ValueError(f"`data` names a file that does not exist: {data}.")
        try:
            entries = yaml.safe_load(Path(data).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"`data` ({data}) cannot be read: {error}") from error
        root = str(Path(data).parent)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"`data` must name at least one folder of labels, got {data!r}.")
    return [_open_entry(entry, root) for entry in entries]


def _open_entry(entry: Any, root: str) -> tuple[LabelFolder, float]:
    values: Any = entry if isinstance(entry, Mapping) else {"path": entry}
    path, weight = values.get("path"), values.get("weight", 1.0)
    if not isinstance(path, str) or set(values) - {"path", "weight"}:
        raise ValueError(f"a folder of labels must be a path, or a mapping of `path` and `weight`, got {entry!r}.")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"`weight` of {path} must be a number above 0, got {weight!r}.")
    return LabelFolder(path if "://" in path else os.path.join(root, path)), float(weight)


__all__ = [
    "LabelSource",
    "LabelledRows",
    "LabelledStepStream",
    "code_file",
    "decode_stored_image",
    "has_instruction",
    "hold_out_episodes",
    "open_label_folders",
]
