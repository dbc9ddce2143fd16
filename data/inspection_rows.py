"""What is in a published JSON or JSONL file, and in a folder of labels: rows of steps instead of episodes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lapa.data.contact_sheet import Tile, make_tile
from lapa.data.episode_source import OnError
from lapa.data.file_tree import FileTree
from lapa.data.inspection import Inspection, InspectOptions, Progress, no_progress
from lapa.data.inspection_totals import MAX_LISTED, Reasons, instruction_totals, number_totals
from lapa.data.jsonl import published_target, read_rows
from lapa.data.label_checks import MAX_GROUP_BYTES, check_table
from lapa.data.label_manifest import DATA_FOLDER, MANIFEST, LabelManifest, LabelSettings, open_tree
from lapa.data.label_table import UNIT_FILE, label_schema
from lapa.data.labelled_stream import decode_stored_image
from lapa.data.number_summary import NumberSummary
from lapa.data.parquet_rows import BUFFER_BYTES, parquet_errors
from lapa.data.read_counts import UNREADABLE
from lapa.data.schema import ReadError

if TYPE_CHECKING:
    import pyarrow as pa

CODES = "latent_action_codes"
# Columns of labels that are added up; images are only looked at for the contact sheet.
TEXT_COLUMNS = ("embodiment", "unnorm_key", "source")
ROW_GROUPS_SHOWN, PAIRS_PER_ROW_GROUP = 8, 4
ROWS_PER_BATCH = 8192
# Different values that are told apart, so that memory does not grow with the data.
MAX_DISTINCT = 1 << 16

Key = TypeVar("Key", bound=int | str | bytes)


class DistinctCounts(Generic[Key]):
    """How often each value came, of the first `MAX_DISTINCT` different ones; others are counted together."""

    def __init__(self) -> None:
        self.counts: Counter[Key] = Counter()
        self.num_others = 0

    def add(self, values: Iterable[Key]) -> None:
        """Counts values."""
        self.counts.update(values)
        while len(self.counts) > MAX_DISTINCT:
            # The last is the newest.
            self.num_others += self.counts.popitem()[1]

    def distinct(self, name: str) -> dict[str, Any]:
        """How many different values there are, and whether these are only those that were told apart."""
        return {name: len(self.counts), **({f"{name}_or_more": True} if self.num_others else {})}


class CodeTotals:
    """
    How codes are used: of each code how often, and how many different sequences there are.

    Args:
        sequences: Whether sequences are told apart; of hundreds of codes nearly all differ.
    """

    def __init__(self, sequences: bool = True) -> None:
        self.num_rows = 0
        self.limits: tuple[int, int] | None = None
        self.lengths, self.codes = DistinctCounts[int](), DistinctCounts[int]()
        self.sequences = DistinctCounts[bytes]() if sequences else None

    def add(self, codes: NDArray[np.int64]) -> None:
        """Adds one row of codes (num_codes,)."""
        self.num_rows += 1
        self.lengths.add([len(codes)])
        self.codes.add(codes.tolist())
        if self.sequences is not None:
            self.sequences.add([codes.tobytes()])
        if len(codes):
            low, high = int(codes.min()), int(codes.max())
            self.limits = (min(low, self.limits[0]), max(high, self.limits[1])) if self.limits else (low, high)

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-serialisable form; None where no row has codes."""
        if not self.num_rows:
            return None
        counts = self.codes.counts
        total = counts.total()
        entropy = -sum(count / total * log(count / total) for count in counts.values())
        content = {
            "rows": self.num_rows,
            "codes_per_row": {str(length): count for length, count in sorted(self.lengths.counts.items())},
            "min": self.limits[0] if self.limits else None,
            "max": self.limits[1] if self.limits else None,
            **self.codes.distinct("distinct"),
            "perplexity": exp(entropy),
        }
        if self.sequences is None:
            # Thousands of codes: the most common ones tell nothing.
            return content
        most_common = [{"code": code, "share": count / total} for code, count in counts.most_common(4 * MAX_LISTED)]
        return {**content, **self.sequences.distinct("distinct_sequences"), "most_common": most_common}


class RowTotals:
    """Sums over rows; what they need does not grow with the rows."""

    def __init__(self) -> None:
        self.num_rows, self.num_without_instruction = 0, 0
        self.instructions = DistinctCounts[str]()
        self.latent, self.vision = CodeTotals(), CodeTotals(sequences=False)
        self.action = NumberSummary()
        self.num_without_action, self.num_other_dim = 0, 0
        self.num_episodes = 0
        self._episode: tuple[Any, Any] | None = None
        self.texts: dict[str, DistinctCounts[str]] = {}
        self.unreadable = Reasons()

    def add(self, instruction: str | None, latent: Any, vision: Any, action: Any) -> None:
        """Adds a row; what it does not have is None."""
        self.num_rows += 1
        if instruction is not None and instruction.strip():
            self.instructions.add([instruction])
        else:
            self.num_without_instruction += 1
        if latent is not None:
            self.latent.add(np.asarray(latent, np.int64))
        if vision is not None:
            self.vision.add(np.asarray(vision, np.int64))
        if action is None:
            self.num_without_action += 1
        else:
            self.num_other_dim += not self.action.add(np.asarray(action, np.float32)[None])

    def add_columns(self, columns: Mapping[str, Sequence[Any]], num_rows: int) -> None:
        """Adds rows of labels, in which those of an episode follow each other."""
        empty = [None] * num_rows
        for values in zip(*(columns.get(name, empty) for name in ("instruction", CODES, "vision_codes", "action"))):
            self.add(*values)
        for name in TEXT_COLUMNS:
            if name in columns:
                self.texts.setdefault(name, DistinctCounts()).add(map(str, columns[name]))
        for episode in zip(columns.get("source", empty), columns.get("episode_id", empty)):
            self.num_episodes += episode != self._episode
            self._episode = episode

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        action = None
        if self.action.num_rows:
            action = {
                **number_totals(self.action),
                "rows_without": self.num_without_action,
                "rows_of_another_dim": self.num_other_dim,
            }
        texts = instruction_totals(self.instructions.counts, self.num_without_instruction, 0)
        texts |= {"count": texts["count"] + self.instructions.num_others, **self.instructions.distinct("distinct")}
        names = {"episodes_without": "rows_without", "episodes": "rows"}
        instructions = {names.get(name, name): value for name, value in texts.items()}
        del instructions["episodes_with_several"]
        instructions["most_common"] = [
            {"text": entry["text"], "rows": entry["episodes"]} for entry in instructions["most_common"]
        ]
        return {
            "rows": self.num_rows,
            "episodes": self.num_episodes or None,
            "unreadable": self.unreadable.to_dict(),
            "instructions": instructions,
            CODES: self.latent.to_dict(),
            "vision_codes": self.vision.to_dict(),
            "action": action,
            **{name: dict(counts.counts.most_common(MAX_LISTED)) for name, counts in self.texts.items()},
        }


def inspect_published(path: str, options: InspectOptions, progress: Progress = no_progress) -> Inspection:
    """
    Reads all rows of a published file.

    Raises:
        ValueError: No such file.
        ReadError: No published file, or with `on_error="raise"` a row that cannot be read.
    """
    target, totals = published_target(path), RowTotals()

    def unreadable(error: ReadError) -> None:
        if options.on_error == "raise":
            raise error
        totals.unreadable.add(UNREADABLE, str(error))

    _read_published(path, target, totals, unreadable, progress)
    content = {"path": path, "kind": f"published {target} rows", "name": Path(path).name, "warnings": []}
    return Inspection({**content, **totals.to_dict()})


def _read_published(path: str, target: str, totals: RowTotals, unreadable: OnError, progress: Progress) -> None:
    """Adds the rows of a published file."""
    try:
        for row in read_rows(path, target, unreadable):
            totals.add(row.sentence, row.latent_action_codes, row.vision_codes, row.action)
            progress(1, None)
    except ReadError as error:
        # The end of the reading: a file that is cut short. With `on_error="raise"` it is raised again.
        unreadable(error)


def is_label_folder(path: str) -> bool:
    """Whether a folder, here or at a URL, is one that `lapa label` wrote."""
    # A file system raises whatever the client raises that it talks through; who opens the path next says what is wrong.
    try:
        tree = open_tree(path)
        return tree.is_file(MANIFEST) and bool(_label_files(tree))
    except Exception:
        return False


def _label_files(tree: FileTree) -> list[str]:
    """Paths of the units that are there, in order."""
    names = tree.entries(DATA_FOLDER)[1] if tree.is_folder(DATA_FOLDER) else []
    return [f"{DATA_FOLDER}/{name}" for name in names if UNIT_FILE.fullmatch(name)]


def inspect_labels(path: str, options: InspectOptions, progress: Progress = no_progress) -> Inspection:
    """
    Reads the columns of a folder of labels, images only for a contact sheet.

    Args:
        path: Local, or a URL; it need not be complete.
        options: How much is looked at.
        progress: Called with the numbers of rows.

    Raises:
        ValueError: No such folder.
        ReadError: With `on_error="raise"`, a file that cannot be read.
    """
    tree, totals, tiles, columns = open_tree(path), RowTotals(), list[Tile](), list[str]()
    files = _label_files(tree)
    settings, warnings = _read_manifest(path, len(files))
    shown = (
        {files[place] for place in np.linspace(0, len(files) - 1, ROW_GROUPS_SHOWN).astype(int)} if files else set()
    )

    def unreadable(error: ReadError) -> None:
        if options.on_error == "raise":
            raise error
        totals.unreadable.add(UNREADABLE, str(error))

    for file in files:
        if not file.endswith(".parquet"):
            _read_published(tree.location(file), "latent", totals, unreadable, progress)
            continue
        try:
            with _LabelTable(tree, file, settings) as table:
                for count in table.add_rows(totals):
                    progress(count, None)
                tiles += table.tiles(-(-ROW_GROUPS_SHOWN // len(shown))) if file in shown else []
                columns = table.columns
        except ReadError as error:
            unreadable(error)
    content = {
        "path": path,
        "kind": "labels",
        "name": tree.name,
        "files": len(files),
        "columns": columns,
        "made_with": {} if settings is None else asdict(settings),
        "warnings": warnings,
        **totals.to_dict(),
    }
    return Inspection(content, tuple(tiles[: options.num_pairs]))


def _read_manifest(path: str, num_files: int) -> tuple[LabelSettings | None, list[str]]:
    """What a folder was made with, and warnings: that this cannot be read, or what the folder lacks."""
    try:
        manifest = LabelManifest.load(path)
    except ValueError as error:
        return None, [str(error)]
    warnings, num_units = [], manifest.settings.num_units
    if not manifest.complete:
        command = manifest.command
        warnings.append("labelling is not complete" + (f"; this goes on with it: {command}" if command else ""))
    if num_units > num_files:
        warnings.append(f"{num_units - num_files} of {num_units} files are absent")
    return manifest.settings, warnings


class _LabelTable:
    """A Parquet file of labels, open for reading; whatever goes wrong is a `ReadError` that names it."""

    def __init__(self, tree: FileTree, relative: str, settings: LabelSettings | None) -> None:
        self.name, self.settings = tree.location(relative), settings
        self._tree, self._relative = tree, relative

    def __enter__(self) -> Self:
        import pyarrow.parquet as parquet

        with parquet_errors(self.name):
            self._stream = self._tree.open(self._relative)
            try:
                self._file = parquet.ParquetFile(self._stream, buffer_size=BUFFER_BYTES)
            except BaseException:
                self._stream.close()
                raise
        self.columns: list[str] = self._file.schema_arrow.names
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._stream.close()

    def _check(self, table: "pa.Table") -> None:
        """Checks rows by the settings of the folder, where these are known."""
        if self.settings is not None:
            sizes = self.settings.codebook_size, self.settings.num_latent_tokens
            check_table(table, label_schema(self.settings), *sizes, self.name)

    def add_rows(self, totals: RowTotals) -> Iterator[int]:
        """Adds all rows without their images; yields how many at a time."""
        import pyarrow as pa

        names = ("episode_id", "instruction", CODES, "vision_codes", "action", *TEXT_COLUMNS)
        present = [name for name in names if name in self.columns]
        with parquet_errors(self.name):
            for batch in self._file.iter_batches(ROWS_PER_BATCH, columns=present):
                self._check(pa.Table.from_batches([batch]))
                try:
                    totals.add_columns({name: batch.column(name).to_pylist() for name in present}, batch.num_rows)
                except (TypeError, AttributeError) as error:
                    raise ReadError(f"{self.name} holds no labels: {error}.") from error
                yield batch.num_rows

    def tiles(self, num_groups: int) -> list[Tile]:
        """Pairs out of some row groups: a labelled step, and the step of the same episode that its code leads to."""
        wanted = ["episode_id", "step_index", "next_frame_offset", CODES, "timestamp"]
        count = self._file.num_row_groups
        if not count or not {*wanted, "image"} <= set(self.columns):
            return []
        tiles = []
        for group in np.unique(np.linspace(0, count - 1, num_groups).astype(int)).tolist():
            if self._file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES:
                raise ReadError(f"{self.name} has more than {MAX_GROUP_BYTES} bytes in row group {group}.")
            rows = self._read(group, wanted)
            chosen = _pairs(rows)
            images = self._read(group, ["image"]) if chosen else []
            for pair in chosen:
                frames = [decode_stored_image(images[number]["image"]["bytes"], self.name) for number in pair]
                tiles.append(_tile(rows, frames, *pair))
        return tiles

    def _read(self, group: int, columns: list[str]) -> list[dict[str, Any]]:
        with parquet_errors(self.name):
            table = self._file.read_row_group(group, columns=columns)
            self._check(table)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Some rows, each with that of the step that its code leads to."""
    place = {(row["episode_id"], row["step_index"]): number for number, row in enumerate(rows)}
    pairs = []
    for number, row in enumerate(rows):
        later = place.get((row["episode_id"], row["step_index"] + row["next_frame_offset"]))
        if later is not None and later != number:
            pairs.append((number, later))
    count = min(PAIRS_PER_ROW_GROUP, len(pairs))
    return [pairs[(n * len(pairs) + len(pairs) // 2) // count] for n in range(count)]


def _tile(rows: list[dict[str, Any]], frames: list[NDArray[np.uint8]], first: int, second: int) -> Tile:
    times = [rows[number]["timestamp"] for number in (first, second) if rows[number]["timestamp"] is not None]
    tile = make_tile(
        frames[0],
        frames[1],
        str(rows[first]["episode_id"]),
        (rows[first]["step_index"], rows[second]["step_index"]),
        times[1] - times[0] if len(times) == 2 else None,
    )
    codes = " ".join(map(str, rows[first][CODES]))
    return Tile(**{**vars(tile), "notes": (f"codes {codes}",)})


__all__ = ["CodeTotals", "inspect_labels", "inspect_published", "is_label_folder"]
