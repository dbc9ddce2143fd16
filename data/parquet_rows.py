"""Rows of single episodes out of parquet files that hold many, by row group and column."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from lapa.data.file_tree import FileTree
from lapa.data.schema import ReadError
from lapa.data.video_stream import is_url

if TYPE_CHECKING:
    import pyarrow as pa

EPISODE_COLUMN = "episode_index"
# What a file may make us allocate: rows of numbers that are read together (150 hours at 30 Hz), and bytes of the encoded
# images of one camera of one episode.
MAX_ROWS = 1 << 24
MAX_IMAGE_BYTES = 1 << 32
BATCH_ROWS, BATCH_IMAGES = 1 << 15, 16
# A column of images is gone through in parts, where it would otherwise be read whole.
BUFFER_BYTES = 1 << 20


@contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    """Turns whatever Arrow and the file system raise into a `ReadError` that names the file."""
    import pyarrow as pa

    try:
        yield
    except ReadError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise ReadError(f"{name} cannot be read as parquet: {reason.rstrip('.')}.") from error


class ParquetRows:
    """
    One parquet file, open for reading; a context manager.

    Args:
        tree (`FileTree`): Folder that the file lies in.
        relative (`str`): Its path there.

    Raises:
        ReadError: No such file, or no whole parquet file.
    """

    def __init__(self, tree: FileTree, relative: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.relative, self.name = relative, tree.location(relative)
        self._stack = ExitStack()
        with parquet_errors(self.name):
            file: Any = tree.open(relative) if is_url(self.name) else pa.OSFile(self.name, "rb")
            self._stack.callback(file.close)
            try:
                self._file = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
                self.columns: tuple[str, ...] = tuple(self._file.schema_arrow.names)
                self._bounds = self._episode_bounds()
            except BaseException:
                self.close()
                raise
        self._kept: tuple[Any, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._stack.close()

    def _episode_bounds(self) -> NDArray[np.float64]:
        """(num_row_groups, 2): least and greatest episode in each, as the file tells; without bounds where it does not."""
        metadata = self._file.metadata
        bounds = np.tile([-np.inf, np.inf], (metadata.num_row_groups, 1))
        paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        if EPISODE_COLUMN in paths:
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(paths.index(EPISODE_COLUMN)).statistics
                if statistics is not None and statistics.has_min_max:
                    low, high = statistics.min, statistics.max
                    if isinstance(low, int) and isinstance(high, int):
                        bounds[group] = low, high
        return bounds

    def _groups(self, episode: int | None) -> list[int]:
        """Row groups that an episode may have rows in; all for None."""
        if episode is None:
            return list(range(len(self._bounds)))
        return np.flatnonzero((self._bounds[:, 0] <= episode) & (episode <= self._bounds[:, 1])).tolist()

    def read(self, columns: Sequence[str], episode: int | None = None) -> "pa.Table":
        """
        Reads columns of numbers or text. Row groups stay in memory until others are needed: to read the episodes of a file
        one after the other decodes each row group once.

        Args:
            columns: Their names.
            episode: Of which episode, by the column `episode_index`; of all where None, or where there is no such column.

        Returns:
            The rows in the order of the file.

        Raises:
            ReadError: A column that is not there, or rows that cannot be read.
        """
        for column in columns:
            if column not in self.columns:
                raise ReadError(f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}.")
        groups, chosen = self._groups(episode), list(columns)
        if episode is not None and EPISODE_COLUMN in self.columns and EPISODE_COLUMN not in chosen:
            chosen.append(EPISODE_COLUMN)
        with parquet_errors(self.name):
            if self._kept is None or self._kept[0] != (groups, chosen):
                self._kept = None
                self._kept = ((groups, chosen), self._load(groups, chosen))
            table = self._kept[1]
            return table if episode is None else _rows_of(table, episode)

    def _load(self, groups: list[int], columns: list[str]) -> "pa.Table":
        import pyarrow as pa

        count = sum(self._file.metadata.row_group(group).num_rows for group in groups)
        if count > MAX_ROWS:
            raise ReadError(
                f"{self.name} announces {count} rows in {len(groups)} row groups; at most {MAX_ROWS} are read."
            )
        # Names are taken for beginnings of paths, too: `action` also selects `action.gripper`.
        batches = [
            batch.select(columns)
            for batch in self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False)
        ]
        schema = pa.schema([self._file.schema_arrow.field(column) for column in columns])
        table = pa.Table.from_batches(batches, schema=None if batches else schema)
        # Texts that are no UTF-8, offsets that lead elsewhere: what reading a damaged file may leave.
        table.validate(full=True)
        return table

    def read_images(self, column: str, episode: int, count: int) -> list[bytes]:
        """
        Reads the encoded images of an episode. The column is gone through from the start of the row group, a few rows at a
        time.

        Args:
            column: Holds encoded images, or records of `bytes` and `path` as `datasets` stores them.
            episode: Whose.
            count: How many it has.

        Returns:
            `count` files.

        Raises:
            ReadError: Fewer, something else than images in files, or more than `MAX_IMAGE_BYTES` of them.
        """
        images: list[bytes] = []
        size = 0
        columns = [column, *(name for name in [EPISODE_COLUMN] if name in self.columns)]
        with parquet_errors(self.name):
            groups = self._groups(episode)
            for batch in self._file.iter_batches(BATCH_IMAGES, row_groups=groups, columns=columns, use_threads=False):
                for content in _image_bytes(_rows_of(batch, episode)[column], f"column {column!r} of {self.name}"):
                    if not content:
                        raise ReadError(
                            f"{self.name} has no image in row {len(images)} of episode {episode}, {column!r}."
                        )
                    size += len(content)
                    if size > MAX_IMAGE_BYTES:
                        raise ReadError(
                            f"{self.name} has over {MAX_IMAGE_BYTES} bytes of {column!r} in episode {episode}."
                        )
                    images.append(content)
                if len(images) >= count:
                    return images[:count]
        raise ReadError(f"{self.name} has {len(images)} images of {column!r} in episode {episode}, {count} expected.")


def _rows_of(rows: Any, episode: int) -> Any:
    """The rows of one episode out of a table or batch."""
    import pyarrow.compute as pc

    if EPISODE_COLUMN not in rows.schema.names:
        return rows
    return rows.filter(pc.equal(rows[EPISODE_COLUMN], episode))


def _image_bytes(column: Any, name: str) -> list[bytes | None]:
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = column.field("bytes")
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        raise ReadError(f"{name} must hold images as encoded files, not {column.type}.")
    files: list[bytes | None] = column.to_pylist()
    return files


def step_numbers(column: Any, name: str, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """
    A column of numbers, or of equally long lists of them (nested ones are flattened).

    Args:
        column: Arrow array or chunked array, (num_steps,).
        name: What messages call it.
        dtype: Of the result.

    Returns:
        (num_steps, size) of `dtype`; booleans are 0 and 1.

    Raises:
        ReadError: Missing values, lists of different lengths, or no numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array, count = column, len(column)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    while not _is_number(array.type):
        if array.null_count:
            raise ReadError(f"{name} has missing values.")
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            lengths = pc.min_max(pc.list_value_length(array)).as_py()
            if lengths["min"] != lengths["max"]:
                raise ReadError(f"{name} has lists of {lengths['min']} to {lengths['max']} numbers.")
            array = array.flatten()
        elif pa.types.is_fixed_size_list(array.type):
            array = array.flatten()
        else:
            raise ReadError(f"{name} must hold numbers, not {array.type}.")
    if array.null_count:
        raise ReadError(f"{name} has missing values.")
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False).astype(dtype)
    return values.reshape(count, -1) if count else values.reshape(0, 1)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


__all__ = ["EPISODE_COLUMN", "ParquetRows", "parquet_errors", "step_numbers"]
