"""Writes the file of one work unit: Parquet, or published JSONL."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.atomic_files import commit, partial_path, write_atomically
from lapa.data.jsonl import PublishedRow, write_latent_rows
from lapa.data.label_manifest import LabelSettings, unit_file
from lapa.data.label_table import COUNTS_KEY, counts_path, label_schema

# Columns with few different values in a row group.
REPEATED = ("episode_id", "instruction", "embodiment", "unnorm_key", "source")
# JPEG files do not get smaller.
IMAGE_BYTES = "image.bytes"


class UnitWriter(ABC):
    """
    The file of one unit, which gets its name by `commit`.

    Args:
        folder: Of the labels.
        settings: Of the run.
        index: Of the unit.
    """

    def __init__(self, folder: Path, settings: LabelSettings, index: int) -> None:
        self.settings, self.path = settings, folder / unit_file(index, settings.num_units, settings.format)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def add(self, rows: Any, codes: NDArray[np.int64], vision_codes: NDArray[np.int64] | None) -> None:
        """
        Adds rows.

        Args:
            rows: Arrow table of them, without codes.
            codes: (num_rows, num_latent_tokens).
            vision_codes: (num_rows, num_image_tokens).
        """

    @abstractmethod
    def commit(self, record: dict[str, Any]) -> None:
        """Completes the file; `record` is what it says of itself."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what was written so far."""


class ParquetUnitWriter(UnitWriter):
    """Row groups are written as soon as they are full; equal rows give equal bytes, whatever batches they come in."""

    def __init__(self, folder: Path, settings: LabelSettings, index: int) -> None:
        import pyarrow.parquet as pq

        super().__init__(folder, settings, index)
        self.schema = label_schema(settings)
        self.partial = partial_path(self.path)
        leaves = [path for field in self.schema for path in _leaves(field.name, field.type)]
        self._writer = pq.ParquetWriter(
            self.partial,
            self.schema,
            compression={leaf: "none" if leaf == IMAGE_BYTES else "zstd" for leaf in leaves},
            use_dictionary=[leaf for leaf in leaves if leaf in REPEATED],
            # Bounds of JPEG files would be copies of them.
            write_statistics=[leaf for leaf in leaves if leaf != IMAGE_BYTES],
            write_page_checksum=True,
        )
        self._held: list[Any] = []
        self._num_held = 0

    def add(self, rows: Any, codes: NDArray[np.int64], vision_codes: NDArray[np.int64] | None) -> None:
        """See `UnitWriter.add`."""
        import pyarrow as pa

        columns = dict(zip(rows.column_names, rows.columns))
        columns["latent_action_codes"] = _lists(codes)
        if vision_codes is not None:
            columns["vision_codes"] = _lists(vision_codes)
        self._held.append(pa.table([columns[name] for name in self.schema.names], schema=self.schema))
        self._num_held += len(rows)
        while self._num_held >= self.settings.row_group_rows:
            self._write(self.settings.row_group_rows)

    def _write(self, count: int) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._held)
        self._writer.write_table(table.slice(0, count).combine_chunks(), row_group_size=count)
        self._held, self._num_held = [table.slice(count)], self._num_held - count

    def commit(self, record: dict[str, Any]) -> None:
        """See `UnitWriter.commit`."""
        if self._num_held:
            self._write(self._num_held)
        self._writer.add_key_value_metadata({COUNTS_KEY: json.dumps(record)})
        self._writer.close()
        commit(self.partial, self.path)

    def discard(self) -> None:
        """See `UnitWriter.discard`."""
        self._writer.close()
        self.partial.unlink(missing_ok=True)


class JsonlUnitWriter(UnitWriter):
    """Rows of a published file; without images they are small, and wait in memory for the end of the unit."""

    def __init__(self, folder: Path, settings: LabelSettings, index: int) -> None:
        super().__init__(folder, settings, index)
        self._rows: list[PublishedRow] = []

    def add(self, rows: Any, codes: NDArray[np.int64], vision_codes: NDArray[np.int64] | None) -> None:
        """See `UnitWriter.add`."""
        assert vision_codes is not None
        for instruction, latent, vision in zip(rows["instruction"].to_pylist(), codes, vision_codes):
            self._rows.append(PublishedRow(instruction, vision_codes=vision, latent_action_codes=latent))

    def commit(self, record: dict[str, Any]) -> None:
        """See `UnitWriter.commit`; the counts come first, so that they are there when the unit is."""
        write_atomically(counts_path(self.path), json.dumps(record).encode())
        write_latent_rows(self.path, self._rows)

    def discard(self) -> None:
        """See `UnitWriter.discard`."""
        self._rows = []


def _leaves(name: str, kind: Any) -> list[str]:
    """Paths of the Parquet columns of a field."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return [path for field in kind for path in _leaves(f"{name}.{field.name}", field.type)]
    return [f"{name}.list.element"] if pa.types.is_list(kind) else [name]


def _lists(values: NDArray[np.int64]) -> Any:
    """(num_rows, width) -> an Arrow array of lists."""
    import pyarrow as pa

    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), pa.int64()))


WRITERS: dict[str, type[UnitWriter]] = {"parquet": ParquetUnitWriter, "jsonl": JsonlUnitWriter}

__all__ = ["WRITERS", "UnitWriter"]
