"""What `lapa label` writes: the columns, and how a folder is opened; what it records about itself is in `label_manifest.py`.

```
labels/
  labels.json                            settings; when everything is there also totals and the list of files
  README.md                              dataset card
  data/labels-00000-of-00042.parquet     one file per work unit, in row groups of 256 rows
```

A unit's file is there whole or not at all. Its schema metadata has the settings under `lapa`, its footer what was kept
and left out under `lapa_counts`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.data.label_checks import MAX_GROUP_BYTES, check_table
from lapa.data.label_manifest import (
    COUNTS_FOLDER,
    DATA_FOLDER,
    MANIFEST,
    VERSION,
    LabelManifest,
    LabelSettings,
    open_tree,
    unit_file,
)
from lapa.data.parquet_rows import BUFFER_BYTES, parquet_errors
from lapa.data.schema import ReadError
from lapa.data.video_stream import is_url

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY, COUNTS_KEY = "lapa", "lapa_counts"
UNIT_FILE = re.compile(r"labels-(\d+)-of-(\d+)\.(parquet|jsonl)")


def label_schema(settings: LabelSettings) -> "pa.Schema":
    """Columns of the Parquet files, with the settings, and described as `datasets` does, which decodes images by that."""
    import pyarrow as pa

    types = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema: list[pa.Field[Any]] = []
    features: dict[str, dict[str, Any]] = {}
    feature: dict[str, Any]
    for name, kind in _columns(settings):
        if kind == "Image":
            arrow, feature = image, {"_type": "Image"}
        elif kind.startswith("List "):
            value = kind.removeprefix("List ")
            arrow = pa.list_(pa.float32() if value == "float32" else pa.int64())
            feature = {"feature": {"dtype": value, "_type": "Value"}, "_type": "List"}
        else:
            arrow, feature = types[kind], {"dtype": kind, "_type": "Value"}
        schema.append(pa.field(name, arrow))
        features[name] = feature
    # Written out, since to import `datasets` takes longer than many a unit.
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        METADATA_KEY: json.dumps({"version": VERSION, **asdict(settings)}),
    }
    return pa.schema(schema, metadata=metadata)


def _columns(settings: LabelSettings) -> list[tuple[str, str]]:
    """Names and kinds of the columns, in order."""
    optional = []
    if settings.vision_tokenizer_hash is not None:
        optional.append(("vision_codes", "List int64"))
    if settings.action:
        optional.append(("action", "List float32"))
    return [
        ("episode_id", "string"),
        ("step_index", "int64"),
        ("timestamp", "float64"),
        ("image", "Image"),
        ("next_frame_offset", "int64"),
        ("instruction", "string"),
        ("latent_action_codes", "List int64"),
        *optional,
        ("embodiment", "string"),
        ("unnorm_key", "string"),
        ("source", "string"),
    ]


def present_units(folder: Path, settings: LabelSettings) -> set[int]:
    """Units whose files are there."""
    data = folder / DATA_FOLDER
    found = set()
    for name in (entry.name for entry in data.iterdir()) if data.is_dir() else ():
        match = UNIT_FILE.fullmatch(name)
        if match and int(match[2]) == settings.num_units and match[3] == settings.format:
            found.add(int(match[1]))
    return found


def read_unit_record(folder: Path, settings: LabelSettings, index: int) -> dict[str, Any]:
    """
    What a committed unit says of itself: its place and its counts.

    Raises:
        ReadError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = folder / unit_file(index, settings.num_units, settings.format)
    if settings.format == "jsonl":
        path = counts_path(path)
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ReadError(f"{path} cannot be read: {error}.") from error
        return record
    with parquet_errors(str(path)):
        metadata = pq.read_metadata(path).metadata or {}
        record = json.loads(metadata[COUNTS_KEY.encode()])
    return record


def counts_path(path: Path) -> Path:
    """Where the counts of a JSONL file of labels stand, which has no place for them."""
    return path.parent.parent / COUNTS_FOLDER / f"{path.stem}.json"


class LabelFolder:
    """
    A complete folder of labels, local or at an fsspec URL (`hf://datasets/NAME/REPO`).

    Args:
        path (`str`): The folder.

    Raises:
        ValueError: No such folder, one that is damaged, one whose labelling has not come to its end (the command that
            finishes it is named), or one of JSONL files, which are read by themselves.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.tree = open_tree(self.path)
        self.manifest = LabelManifest.load(self.path)
        settings = self.manifest.settings
        if settings.format != "parquet":
            raise ValueError(
                f"{path} holds published JSONL files: join them (cat {DATA_FOLDER}/*.jsonl > labels.jsonl) and name the "
                "file."
            )
        if not self.manifest.complete:
            there = settings.num_units if is_url(self.path) else len(present_units(Path(self.path), settings))
            missing = (
                "some units are" if is_url(self.path) else f"{settings.num_units - there} of {settings.num_units}"
            )
            missing = missing if is_url(self.path) else f"{missing} units are"
            raise ValueError(f"{path} is not complete: {missing} missing. To finish it: {self.manifest.command}")
        self.files: tuple[str, ...] = tuple(unit["file"] for unit in self.manifest.units)
        self.rows: tuple[int, ...] = tuple(unit["rows"] for unit in self.manifest.units)

    @property
    def num_rows(self) -> int:
        """Of all files."""
        return sum(self.rows)

    def group_count(self, file: int) -> int:
        """Row groups of a file."""
        return -(-self.rows[file] // self.manifest.settings.row_group_rows)

    def read_groups(self, file: int, groups: Sequence[int], columns: Sequence[str]) -> "Iterator[pa.Table]":
        """
        Reads row groups of a file, one at a time.

        Args:
            file: Index into `files`.
            groups: Which, in the order they are wanted.
            columns: Names of the columns.

        Raises:
            ReadError: A file that is missing, damaged, or not the one that `labels.json` lists.
        """
        import pyarrow.parquet as pq

        settings, name = self.manifest.settings, self.tree.location(self.files[file])
        schema = label_schema(settings)
        with parquet_errors(name):
            with self.tree.open(self.files[file]) as stream:
                parquet = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
                if parquet.metadata.num_rows != self.rows[file]:
                    raise ReadError(
                        f"{name} has {parquet.metadata.num_rows} rows where {MANIFEST} lists {self.rows[file]}."
                    )
                if parquet.metadata.num_row_groups != self.group_count(file):
                    raise ReadError(f"{name} has {parquet.metadata.num_row_groups} row groups, not those it had.")
                for group in groups:
                    announced = parquet.metadata.row_group(group)
                    expected = min(settings.row_group_rows, self.rows[file] - group * settings.row_group_rows)
                    if announced.num_rows != expected or announced.total_byte_size > MAX_GROUP_BYTES:
                        raise ReadError(
                            f"{name} has {announced.num_rows} rows of {announced.total_byte_size} bytes in row group "
                            f"{group}, not {expected} rows of at most {MAX_GROUP_BYTES} bytes."
                        )
                    table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
                    check_table(table, schema, settings.codebook_size, settings.num_latent_tokens, name)
                    yield table


__all__ = [
    "COUNTS_KEY",
    "METADATA_KEY",
    "UNIT_FILE",
    "LabelFolder",
    "counts_path",
    "label_schema",
    "present_units",
    "read_unit_record",
]
