"""What is in a published JSON or JSONL file, and in a folder of labels: rows of steps instead of episodes."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.data.contact_sheet import Tile, make_tile
from lapa.data.episode_source import OnError
from lapa.data.inspection import Inspection, InspectOptions, Progress, no_progress
from lapa.data.inspection_totals import MAX_LISTED, Reasons, instruction_totals, number_totals
from lapa.data.jsonl import published_target, read_rows
from lapa.data.number_summary import NumberSummary
from lapa.data.read_counts import UNREADABLE
from lapa.data.schema import ReadError

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

LABEL_MANIFEST, LABEL_ENDINGS = "labels.json", (".parquet", ".jsonl", ".jsonl.gz")
# A file says how many there are.
UNIT_FILE = re.compile(r"-of-([0-9]+)\.")
# What pyarrow, and a table that is none of labels, may raise.
READ_ERRORS = (OSError, KeyError, ValueError, TypeError)
CODES, STEP_COLUMNS, OFFSET = "latent_action_codes", ("step_index", "step"), "next_frame_offset"
# Columns of labels that are added up; images are only looked at for the contact sheet.
TEXT_COLUMNS = ("embodiment", "unnorm_key", "source")
ROW_GROUPS_SHOWN, PAIRS_PER_ROW_GROUP = 8, 4
ROWS_PER_BATCH = 8192


class CodeTotals:
    """How codes are used: of each code how often, and how many different sequences there are."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.lengths: Counter[int] = Counter()
        self.codes: Counter[int] = Counter()
        self.sequences: Counter[bytes] = Counter()

    def add(self, codes: NDArray[np.int64]) -> None:
        """Adds one row of codes (num_codes,)."""
        self.num_rows += 1
        self.lengths[len(codes)] += 1
        self.codes.update(codes.tolist())
        self.sequences[codes.tobytes()] += 1

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-serialisable form; None where no row has codes."""
        if not self.num_rows:
            return None
        total = self.codes.total()
        entropy = -sum(count / total * log(count / total) for count in self.codes.values())
        return {
            "rows": self.num_rows,
            "codes_per_row": {str(length): count for length, count in sorted(self.lengths.items())},
            "min": min(self.codes, default=None),
            "max": max(self.codes, default=None),
            "distinct": len(self.codes),
            "perplexity": exp(entropy),
            "distinct_sequences": len(self.sequences),
            "most_common": [
                {"code": code, "share": count / total} for code, count in self.codes.most_common(4 * MAX_LISTED)
            ],
        }


class RowTotals:
    """Sums over rows."""

    def __init__(self) -> None:
        self.num_rows, self.num_without_instruction = 0, 0
        self.instructions: Counter[str] = Counter()
        self.latent, self.vision = CodeTotals(), CodeTotals()
        self.action = NumberSummary()
        self.num_without_action, self.num_other_dim = 0, 0
        self.episodes: set[tuple[str, ...]] = set()
        self.texts: dict[str, Counter[str]] = {}
        self.unreadable = Reasons()

    def add(self, instruction: str | None, latent: Any, vision: Any, action: Any) -> None:
        """Adds a row; what it does not have is None."""
        self.num_rows += 1
        if instruction is not None and instruction.strip():
            self.instructions[instruction] += 1
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        action = None
        if self.action.num_rows:
            action = {
                **number_totals(self.action),
                "rows_without": self.num_without_action,
                "rows_of_another_dim": self.num_other_dim,
            }
        texts = instruction_totals(self.instructions, self.num_without_instruction, 0)
        names = {"episodes_without": "rows_without", "episodes": "rows"}
        instructions = {names.get(name, name): value for name, value in texts.items()}
        del instructions["episodes_with_several"]
        instructions["most_common"] = [
            {"text": entry["text"], "rows": entry["episodes"]} for entry in instructions["most_common"]
        ]
        vision = self.vision.to_dict()
        if vision is not None:
            # Thousands of codes: the most common ones tell nothing.
            del vision["most_common"]
        return {
            "rows": self.num_rows,
            "episodes": len(self.episodes) or None,
            "unreadable": self.unreadable.to_dict(),
            "instructions": instructions,
            CODES: self.latent.to_dict(),
            "vision_codes": vision,
            "action": action,
            **{name: dict(counts.most_common(MAX_LISTED)) for name, counts in self.texts.items()},
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
    """Whether a local folder is one that `lapa label` wrote."""
    return (Path(path) / LABEL_MANIFEST).is_file() and bool(_label_files(path))


def _label_files(path: str) -> list[Path]:
    """Files with rows, in order."""
    folders = (Path(path), Path(path) / "data")
    return [
        file for folder in folders for ending in LABEL_ENDINGS for file in sorted(folder.glob(f"labels-*{ending}"))
    ]


def inspect_labels(path: str, options: InspectOptions, progress: Progress = no_progress) -> Inspection:
    """
    Reads the columns of a folder of labels, images only for a contact sheet.

    Raises:
        ReadError: With `on_error="raise"`, a file that cannot be read.
    """
    totals, tiles, columns = RowTotals(), list[Tile](), list[str]()
    files = _label_files(path)
    manifest, warnings = _read_manifest(path, files)
    shown = {files[place] for place in np.linspace(0, len(files) - 1, ROW_GROUPS_SHOWN).astype(int)}

    def unreadable(error: ReadError) -> None:
        if options.on_error == "raise":
            raise error
        totals.unreadable.add(UNREADABLE, str(error))

    for file in files:
        if file.suffix != ".parquet":
            _read_published(str(file), "latent", totals, unreadable, progress)
            continue
        try:
            names, found = _read_table(file, totals, progress, manifest, len(shown) if file in shown else 0)
        except READ_ERRORS as error:
            unreadable(ReadError(f"{file.name}: {str(error).rstrip('.')}."))
            continue
        columns, tiles = names, tiles + found
    content = {
        "path": path,
        "kind": "labels",
        "name": Path(path).resolve().name,
        "files": len(files),
        "columns": columns,
        # All but the list of files and the counts, which are what is counted here.
        "made_with": manifest.get("settings", {name: manifest[name] for name in manifest if name != "units"}),
        "warnings": warnings,
        **totals.to_dict(),
    }
    return Inspection(content, tuple(tiles[: options.num_pairs]))


def _read_manifest(path: str, files: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """What a folder says about itself, and what it lacks."""
    try:
        manifest = json.loads((Path(path) / LABEL_MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        return {}, [f"{LABEL_MANIFEST} cannot be read: {error}"]
    warnings = []
    if manifest.get("complete") is False:
        command = manifest.get("command")
        warnings.append("labelling is not complete" + (f"; this goes on with it: {command}" if command else ""))
    counts = {int(match[1]) for file in files if (match := UNIT_FILE.search(file.name))}
    announced = max(counts, default=0)
    if announced > len(files):
        warnings.append(f"{announced - len(files)} of {announced} files are absent")
    return manifest, warnings


def _read_table(
    file: Path, totals: RowTotals, progress: Progress, manifest: dict[str, Any], num_shown: int
) -> tuple[list[str], list[Tile]]:
    """Adds the rows of a parquet file; columns, and pairs for the sheet where it is one of `num_shown` files with some."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        for count in _add_rows(table, totals):
            progress(count, None)
        gap = manifest.get("frame_gap")
        tiles = _tiles(table, gap, -(-ROW_GROUPS_SHOWN // num_shown)) if num_shown else []
        return table.schema_arrow.names, tiles


def _add_rows(table: "parquet.ParquetFile", totals: RowTotals) -> Iterator[int]:
    """Adds all rows without their images; yields how many at a time."""
    names = ("episode_id", "instruction", CODES, "vision_codes", "action", *TEXT_COLUMNS)
    present = [name for name in names if name in table.schema_arrow.names]
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=present):
        columns = {name: batch.column(name).to_pylist() for name in present}
        empty = [None] * batch.num_rows
        for values in zip(*(columns.get(name, empty) for name in ("instruction", CODES, "vision_codes", "action"))):
            totals.add(*values)
        for name in TEXT_COLUMNS:
            if name in columns:
                totals.texts.setdefault(name, Counter()).update(map(str, columns[name]))
        totals.episodes.update(zip(columns.get("source", empty), columns.get("episode_id", empty)))
        yield batch.num_rows


def _tiles(table: "parquet.ParquetFile", gap: int | None, num_groups: int) -> list[Tile]:
    """Pairs out of some row groups: a labelled step, and the step of the same episode that its code leads to."""
    names = table.schema_arrow.names
    step = next((name for name in STEP_COLUMNS if name in names), None)
    if step is None or "image" not in names:
        return []
    wanted = [name for name in ("episode_id", step, OFFSET, CODES, "timestamp") if name in names]
    groups = np.unique(np.linspace(0, table.num_row_groups - 1, num_groups).astype(int))
    tiles = []
    for group in groups.tolist():
        rows = table.read_row_group(group, columns=wanted).to_pylist()
        place = {(row["episode_id"], row[step]): number for number, row in enumerate(rows)}
        pairs = []
        for number, row in enumerate(rows):
            offset = row.get(OFFSET, gap)
            later = None if offset is None else place.get((row["episode_id"], row[step] + offset))
            if later is not None and later != number:
                pairs.append((number, later))
        count = min(PAIRS_PER_ROW_GROUP, len(pairs))
        chosen = [pairs[(n * len(pairs) + len(pairs) // 2) // count] for n in range(count)]
        images = table.read_row_group(group, columns=["image"]).column("image") if chosen else None
        for first, second in chosen:
            assert images is not None
            tiles.append(_tile(rows, images, first, second, step))
    return tiles


def _tile(rows: list[dict[str, Any]], images: Any, first: int, second: int, step: str) -> Tile:
    frames = []
    for number in (first, second):
        value = images[number].as_py()
        with Image.open(BytesIO(value["bytes"] if isinstance(value, dict) else value)) as image:
            frames.append(np.asarray(image.convert("RGB")))
    times = [rows[number]["timestamp"] for number in (first, second) if rows[number].get("timestamp") is not None]
    tile = make_tile(
        frames[0],
        frames[1],
        str(rows[first]["episode_id"]),
        (rows[first][step], rows[second][step]),
        times[1] - times[0] if len(times) == 2 else None,
    )
    codes = rows[first].get(CODES)
    return tile if codes is None else Tile(**{**vars(tile), "notes": ("codes " + " ".join(map(str, codes)),)})


__all__ = ["CodeTotals", "inspect_labels", "inspect_published", "is_label_folder"]
