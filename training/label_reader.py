"""Reading for the labelling: batches of frame pairs of work units, with the rows they become, in processes of their own."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.episode_source import EpisodeSource, raise_error
from lapa.data.frame_pairs import PAIRS_PER_READ, open_pairs, resize_frame, seconds_between
from lapa.data.label_manifest import MAX_REASONS, LabelCounts, LabelUnit
from lapa.data.mixture import FramePairSource
from lapa.data.pair_filters import FrameSummary, dropped_by
from lapa.data.read_counts import NO_INSTRUCTION, UNREADABLE
from lapa.data.schema import Episode, ReadError
from lapa.processing.image_processing_lapa import LapaImageProcessor

JPEG_START, EXIF_ORIENTATION = b"\xff\xd8", 0x0112
# Reason to leave a pair out of published JSONL files, which cannot say that there is no instruction.


@dataclass(frozen=True)
class ReaderOptions:
    """
    What is read of a pair.

    Args:
        frame_size (`tuple[int, int]`): Height and width of the frames for the quantizer.
        batch_size (`int`): Pairs of a batch.
        images (`bool`): Whether rows have images.
        image_size (`int`, *optional*), image_quality (`int`), keep_jpeg (`bool`): Of the stored images, see
            `LabelSettings`.
        action (`bool`): Whether rows have actions.
        image_processor (`LapaImageProcessor`, *optional*): Of the vision tokenizer, where there is one.
        needs_instruction (`bool`): Whether pairs of episodes without an instruction are left out.
        skip (`bool`): Whether what cannot be read is counted and left out.
    """

    frame_size: tuple[int, int]
    batch_size: int
    images: bool = True
    image_size: int | None = None
    image_quality: int = 95
    keep_jpeg: bool = True
    action: bool = True
    image_processor: LapaImageProcessor | None = None
    needs_instruction: bool = False
    skip: bool = False


@dataclass
class LabelBatch:
    """
    Pairs of one unit, in its order.

    Args:
        unit (`int`): Index of the unit.
        frames (`torch.Tensor`): (num_frames, height, width, 3) uint8, distinct frames of the pairs.
        pairs (`torch.Tensor`): (num_pairs, 2) int64 into `frames`.
        levels (`torch.Tensor`, *optional*): (num_pairs, size, size, 3) uint8, first frames as the vision tokenizer sees
            them.
        rows (`torch.Tensor`): uint8 bytes of an Arrow stream with the rows, without codes.
        num_episodes (`int`): Episodes that have come to their end since the batch before.
        counts (`dict`, *optional*): With the last batch of a unit, its `LabelCounts` without those of codes.
    """

    unit: int
    frames: torch.Tensor
    pairs: torch.Tensor
    levels: torch.Tensor | None
    rows: torch.Tensor
    num_episodes: int
    counts: dict[str, Any] | None = None

    def pin_memory(self) -> "LabelBatch":
        """For the loader: what goes to the device into pinned memory."""
        self.frames, self.pairs = self.frames.pin_memory(), self.pairs.pin_memory()
        self.levels = None if self.levels is None else self.levels.pin_memory()
        return self


class _Frame:
    """A decoded frame, and what is made of it: each at most once."""

    def __init__(self, decoded: NDArray[np.uint8], options: ReaderOptions) -> None:
        self.decoded, self.options = decoded, options
        self.summary = FrameSummary(decoded)
        self.resized = resize_frame(decoded, options.frame_size)

    def stored(self, recorded: bytes | None) -> tuple[bytes, NDArray[np.uint8]]:
        """JPEG file to store, and what comes out when it is decoded."""
        if recorded is not None:
            return recorded, self.decoded
        size, frame = self.options.image_size, self.decoded
        buffer = io.BytesIO()
        Image.fromarray(frame if size is None else resize_frame(frame, (size, size))).save(
            buffer, format="JPEG", quality=self.options.image_quality
        )
        # Only the vision tokenizer looks at it again.
        return buffer.getvalue(), decode_jpeg(buffer.getvalue()) if self.options.image_processor else frame


def decode_jpeg(content: bytes) -> NDArray[np.uint8]:
    """(height, width, 3) uint8."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def recorded_jpeg(frames: Any, step: int) -> bytes | None:
    """A frame's own file where it is a JPEG of three colours that everybody decodes alike; None otherwise."""
    if not isinstance(frames, EncodedFrames):
        return None
    content = bytes(frames.encoded[step])
    if not content.startswith(JPEG_START):
        return None
    with Image.open(io.BytesIO(content)) as image:
        # Viewers, and `datasets`, turn an image by this entry; the readers here do not.
        return content if image.mode == "RGB" and EXIF_ORIENTATION not in image.getexif() else None


@dataclass
class _Pair:
    """A pair with the values of its row, but for its codes."""

    frames: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    row: dict[str, Any]
    levels: NDArray[np.uint8] | None


class UnitReader:
    """
    Reads one unit.

    Args:
        source: The unit's source.
        unit: Which episodes.
        options: What of them.
    """

    def __init__(self, source: FramePairSource, unit: LabelUnit, options: ReaderOptions) -> None:
        self.source, self.unit, self.options = source, unit, options
        self.counts = LabelCounts()
        self.num_episodes = 0

    def batches(self) -> Iterator[LabelBatch]:
        """Batches of `batch_size` pairs; the last, which may be smaller or empty, brings the counts along."""
        held: list[_Pair] = []
        for pair in self._pairs():
            # One is kept back, so that the last batch is known to be the last.
            if len(held) == self.options.batch_size:
                yield self._batch(held)
                held = []
            held.append(pair)
        yield self._batch(held, self.counts.to_dict())

    def _batch(self, pairs: Sequence[_Pair], counts: dict[str, Any] | None = None) -> LabelBatch:
        places: dict[int, int] = {}
        frames: list[NDArray[np.uint8]] = []
        for pair in pairs:
            for frame in pair.frames:
                if id(frame) not in places:
                    places[id(frame)] = len(frames)
                    frames.append(frame)
        index = [[places[id(frame)] for frame in pair.frames] for pair in pairs]
        levels = [pair.levels for pair in pairs if pair.levels is not None]
        num_episodes, self.num_episodes = self.num_episodes, 0
        return LabelBatch(
            self.unit.index,
            torch.from_numpy(np.stack(frames) if frames else np.zeros((0, *self.options.frame_size, 3), np.uint8)),
            torch.tensor(index, dtype=torch.int64).reshape(-1, 2),
            torch.from_numpy(np.stack(levels)) if levels else None,
            rows_to_tensor([pair.row for pair in pairs]),
            num_episodes,
            counts,
        )

    def _pairs(self) -> Iterator[_Pair]:
        counts = self.counts.pairs
        wanted = range(self.unit.start, self.unit.stop)
        num_opened = 0
        on_error = self._remember if self.options.skip else raise_error
        for _, episode in self.source.source.read(self.unit.shard, wanted, on_error):
            num_opened += 1
            try:
                steps = open_pairs(episode, self.source.chosen_camera, self.source.gap, counts)
                if self.options.needs_instruction and episode.instruction is None:
                    counts.dropped_items[NO_INSTRUCTION] += len(steps)
                else:
                    yield from self._episode_pairs(episode, steps)
            except ReadError as error:
                on_error(error)
                counts.skipped_groups[UNREADABLE] += 1
            self.num_episodes += 1
        # One error may stand for all episodes behind it.
        if missing := len(wanted) - num_opened:
            counts.groups += missing
            counts.skipped_groups[UNREADABLE] += missing
            self.num_episodes += missing
            if not self.counts.skipped:
                self._remember(ReadError(f"{self.source.name} was asked for {missing} episodes and gave none."))
                if not self.options.skip:
                    raise ReadError(next(iter(self.counts.skipped)))

    def _remember(self, error: ReadError) -> None:
        if str(error) in self.counts.skipped or len(self.counts.skipped) < MAX_REASONS:
            self.counts.skipped[str(error)] += 1

    def _episode_pairs(self, episode: Episode, steps: NDArray[np.int64]) -> Iterator[_Pair]:
        """Pairs of an episode in order; frames stay in memory as long as a later pair needs them."""
        camera, filters = self.source.chosen_camera, self.source.filters
        values = row_values(episode, self.source.source, self.options)
        known: dict[int, _Frame] = {}
        for start in range(0, len(steps), PAIRS_PER_READ):
            chunk = steps[start : start + PAIRS_PER_READ]
            wanted = np.unique(chunk).tolist()
            known = {step: frame for step, frame in known.items() if step >= chunk[0, 0]}
            new = [step for step in wanted if step not in known]
            for step, frame in zip(new, episode.read_frames(camera, new)):
                known[step] = _Frame(frame, self.options)
            for first, second in chunk.tolist():
                reason = dropped_by(filters, known[first].summary, known[second].summary)
                if reason is not None:
                    self.counts.pairs.dropped_items[reason] += 1
                    continue
                if known[first].decoded.shape != known[second].decoded.shape:
                    raise ReadError(
                        f"frames {first} and {second} of camera {camera!r} of episode {episode.episode_id!r} of "
                        f"{episode.source} differ in size."
                    )
                self._count(episode, first, second)
                yield self._pair(episode, known, first, second, values)

    def _count(self, episode: Episode, first: int, second: int) -> None:
        self.counts.pairs.items += 1
        self.counts.pairs.gaps.add(second - first, seconds_between(episode, (first, second)))
        self.counts.rows_without_instruction += episode.instruction is None

    def _pair(
        self, episode: Episode, known: dict[int, _Frame], first: int, second: int, values: dict[str, Any]
    ) -> _Pair:
        options, frame = self.options, known[first]
        row = {
            **values,
            "step_index": first,
            "timestamp": None if episode.timestamps is None else float(episode.timestamps[first]),
            "next_frame_offset": second - first,
        }
        if options.action:
            row["action"] = None if episode.action is None else episode.action[first]
        shown = frame.decoded
        if options.images:
            keep = options.keep_jpeg and options.image_size is None
            recorded = recorded_jpeg(episode.frames[self.source.chosen_camera], first) if keep else None
            content, shown = frame.stored(recorded)
            row["image"] = {"bytes": content, "path": None}
        levels = None if options.image_processor is None else options.image_processor.resize_image(shown)
        return _Pair((frame.resized, known[second].resized), row, levels)


def row_values(episode: Episode, source: EpisodeSource, options: ReaderOptions) -> dict[str, Any]:
    """What all rows of an episode have alike."""
    return {
        "episode_id": episode.episode_id,
        "instruction": episode.instruction,
        "embodiment": episode.embodiment if episode.embodiment is not None else source.embodiment,
        "unnorm_key": source.unnorm_key,
        "source": episode.source,
    }


def rows_to_tensor(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Rows as an Arrow stream in a uint8 tensor, which passes between processes without being copied piece by piece."""
    import pyarrow as pa

    strings = dict.fromkeys(("episode_id", "instruction", "embodiment", "unnorm_key", "source"), pa.string())
    types = strings | {"step_index": pa.int64(), "timestamp": pa.float64(), "next_frame_offset": pa.int64()}
    types |= {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "action": pa.list_(pa.float32())}
    names = list(rows[0]) if rows else ["episode_id"]
    batch = pa.record_batch([pa.array([row[name] for row in rows], types[name]) for name in names], names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return torch.from_numpy(np.frombuffer(sink.getvalue(), dtype=np.uint8).copy())


def tensor_to_rows(tensor: torch.Tensor) -> Any:
    """Inverse of `rows_to_tensor`: an Arrow table."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.py_buffer(tensor.numpy())) as reader:
        return reader.read_all()


@dataclass
class ReadFailure:
    """What ended the reading in a worker process, which has no other way to say it in one line."""

    message: str
    of_data: bool

    def error(self) -> ValueError:
        """As it was raised."""
        return ReadError(self.message) if self.of_data else ValueError(self.message)


class LabelBatches(IterableDataset[LabelBatch | ReadFailure]):
    """
    Batches of some units; with loader workers each has its own units, of which it reads one after the other.

    Args:
        sources: All sources of the run.
        units: Which units to read.
        options: What of them.
    """

    def __init__(self, sources: Sequence[FramePairSource], units: Sequence[LabelUnit], options: ReaderOptions) -> None:
        self.sources, self.units, self.options = tuple(sources), tuple(units), options

    def __iter__(self) -> Iterator[LabelBatch | ReadFailure]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            for unit in self.units[worker::num_workers]:
                yield from UnitReader(self.sources[unit.source], unit, self.options).batches()
        except (ValueError, OSError) as error:
            yield ReadFailure(str(error), isinstance(error, ReadError))


__all__ = [
    "LabelBatch",
    "LabelBatches",
    "ReadFailure",
    "ReaderOptions",
    "UnitReader",
    "decode_jpeg",
    "recorded_jpeg",
    "rows_to_tensor",
    "tensor_to_rows",
]
