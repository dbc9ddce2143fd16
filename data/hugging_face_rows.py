"""Rows of Hugging Face data sets: what columns they have, and how they come out of an episode."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.frame_pairs import PAIRS_PER_READ, open_pairs, read_pairs, resize_frame, seconds_between
from lapa.data.mixture import FramePairSource
from lapa.data.read_counts import BLANK_CAMERA, PairCounts, ReadCounts, StepCounts
from lapa.data.schema import Episode, ReadError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# What a row may be required to have.
LABELS = ("action", "instruction")
ON_ERROR_RULES = ("raise", "skip")
IMAGE_FORMATS = ("png", "jpeg")
# Image files kept for the pairs in which a frame comes again.
ENCODED_KEPT = 256


@dataclass(frozen=True)
class RowOptions:
    """What rows depend on beside their sources; see `iterable_pair_dataset` and its siblings."""

    image_size: tuple[int, int] | None = None
    image_format: str = "png"
    jpeg_quality: int = 95
    require: tuple[str, ...] = ()
    images: bool = True

    def __post_init__(self) -> None:
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"`image_format` must be one of {', '.join(IMAGE_FORMATS)}, got {self.image_format!r}.")
        unknown = [name for name in self.require if name not in LABELS]
        if unknown:
            raise ValueError(f"`require` must hold some of {', '.join(LABELS)}, got {unknown[0]!r}.")


@dataclass
class Tally:
    """What was read and skipped by one process; `pieces` is how many there are if it is to read all of them."""

    on_error: str
    max_skipped: float
    pieces: int | None = None
    counts: ReadCounts = field(default_factory=PairCounts)

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR_RULES:
            raise ValueError(f"`on_error` must be one of {', '.join(ON_ERROR_RULES)}, got {self.on_error!r}.")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"`max_skipped` must lie in [0, 1], got {self.max_skipped}.")
        self.skipped = SkippedEpisodes(self.max_skipped)

    def __call__(self, error: ReadError, count: int = 1) -> None:
        """What is done about episodes that cannot be read."""
        if self.on_error == "raise":
            raise error
        self.skipped(error, count)

    def end_piece(self) -> None:
        """A piece was read: says what came of all so far. After the last, the share of what was skipped is checked."""
        self.pieces = None if self.pieces is None else self.pieces - 1
        if not self.pieces:
            told = self.counts.metrics() | {"unreadable": self.skipped.num_skipped}
            logger.info("read so far: %s", ", ".join(f"{name} {value:g}" for name, value in told.items()))
        if self.pieces == 0:
            self.skipped.check()


class EpisodeCounts(ReadCounts):
    """`ReadCounts` of episodes that are rows themselves."""

    group_name, item_name = "episodes", "rows"


Rows = Callable[[FramePairSource, Episode, RowOptions, Tally], Iterator[dict[str, Any]]]


def pair_features() -> "datasets.Features":
    """Columns of frame pairs."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    return Features(
        {
            "first_frame": ImageFeature(mode="RGB"),
            "second_frame": ImageFeature(mode="RGB"),
            "episode_id": Value("string"),
            "source": Value("string"),
            "camera": Value("string"),
            "steps": List(Value("int64"), length=2),
            "seconds": Value("float64"),
            "instruction": Value("string"),
        }
    )


def step_features() -> "datasets.Features":
    """Columns of steps."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    return Features(
        {
            "image": ImageFeature(mode="RGB"),
            "episode_id": Value("string"),
            "source": Value("string"),
            "camera": Value("string"),
            "step_index": Value("int64"),
            "timestamp": Value("float64"),
            "instruction": Value("string"),
            "action": List(Value("float32")),
            "proprio": List(Value("float32")),
            "embodiment": Value("string"),
            "unnorm_key": Value("string"),
        }
    )


def episode_features(images: bool) -> "datasets.Features":
    """Columns of episodes."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {
        "episode_id": Value("string"),
        "source": Value("string"),
        "num_steps": Value("int64"),
        "cameras": List(Value("string")),
        "instructions": List(Value("string")),
        "timestamps": List(Value("float64")),
        "action": List(List(Value("float32"))),
        "proprio": List(List(Value("float32"))),
        "embodiment": Value("string"),
        "unnorm_key": Value("string"),
    }
    if images:
        columns |= {"camera": Value("string"), "images": List(ImageFeature(mode="RGB"))}
    return Features(columns)


def pair_rows(
    source: FramePairSource, episode: Episode, options: RowOptions, tally: Tally
) -> Iterator[dict[str, Any]]:
    camera = source.chosen_camera
    assert isinstance(tally.counts, PairCounts)
    steps = open_pairs(episode, camera, source.gap, tally.counts)
    encode = _Encoder(episode, camera, options)
    for start in range(0, len(steps), PAIRS_PER_READ):
        chunk = steps[start : start + PAIRS_PER_READ]
        read = read_pairs(episode, camera, chunk, options.image_size, source.filters)
        for (first, second), frames in zip(chunk.tolist(), read):
            if isinstance(frames, str):
                tally.counts.dropped_items[frames] += 1
                continue
            tally.counts.items += 1
            yield {
                "first_frame": encode(first, frames[0]),
                "second_frame": encode(second, frames[1]),
                "episode_id": episode.episode_id,
                "source": episode.source,
                "camera": camera,
                "steps": [first, second],
                "seconds": seconds_between(episode, (first, second)),
                "instruction": episode.instruction,
            }


def step_rows(
    source: FramePairSource, episode: Episode, options: RowOptions, tally: Tally
) -> Iterator[dict[str, Any]]:
    camera = source.chosen_camera
    tally.counts.groups += 1
    missing = [name for name in options.require if getattr(episode, name) is None]
    if missing or camera not in episode.frames:
        tally.counts.skipped_groups[f"no_{missing[0]}" if missing else BLANK_CAMERA] += 1
        return
    for step, image in enumerate(_images(episode, camera, options)):
        tally.counts.items += 1
        yield {
            "image": image,
            "episode_id": episode.episode_id,
            "source": episode.source,
            "camera": camera,
            "step_index": step,
            "timestamp": None if episode.timestamps is None else float(episode.timestamps[step]),
            "instruction": episode.instruction,
            "action": None if episode.action is None else episode.action[step],
            "proprio": None if episode.proprio is None else episode.proprio[step],
            "embodiment": episode.embodiment,
            "unnorm_key": source.source.unnorm_key,
        }


def episode_rows(
    source: FramePairSource, episode: Episode, options: RowOptions, tally: Tally
) -> Iterator[dict[str, Any]]:
    camera = source.chosen_camera
    tally.counts.groups += 1
    row: dict[str, Any] = {
        "episode_id": episode.episode_id,
        "source": episode.source,
        "num_steps": episode.num_steps,
        "cameras": list(episode.cameras),
        "instructions": list(episode.instructions),
        "timestamps": episode.timestamps,
        "action": episode.action,
        "proprio": episode.proprio,
        "embodiment": episode.embodiment,
        "unnorm_key": source.source.unnorm_key,
    }
    if options.images:
        found = camera in episode.frames
        row |= {"camera": camera, "images": list(_images(episode, camera, options)) if found else None}
    tally.counts.items += 1
    yield row


# What the rows of each kind are counted by.
COUNTS: dict[Rows, type[ReadCounts]] = {
    pair_rows: PairCounts,
    step_rows: StepCounts,
    episode_rows: EpisodeCounts,
}


def _images(episode: Episode, camera: str, options: RowOptions) -> Iterator[dict[str, Any]]:
    """All frames of an episode as image files, decoded a few at a time."""
    encode = _Encoder(episode, camera, options)
    for start in range(0, episode.num_steps, PAIRS_PER_READ):
        steps = range(start, min(start + PAIRS_PER_READ, episode.num_steps))
        for step, frame in zip(steps, episode.read_frames(camera, steps)):
            yield encode(step, frame if options.image_size is None else resize_frame(frame, options.image_size))


class _Encoder:
    """
    Frames of an episode as image files, as `datasets.Image` takes them: the source's own where it has such and they keep
    their size, so that nothing is coded anew.
    """

    def __init__(self, episode: Episode, camera: str, options: RowOptions) -> None:
        frames = episode.frames.get(camera)
        self.own = frames.encoded if isinstance(frames, EncodedFrames) and options.image_size is None else None
        self.options = options
        # A frame is in two pairs, as the second one and then as the first.
        self._recent: dict[int, bytes] = {}

    def __call__(self, step: int, frame: NDArray[np.uint8]) -> dict[str, Any]:
        """The frame of a step, which is decoded already: what cannot be decoded has raised before."""
        if self.own is not None:
            return {"bytes": self.own[step], "path": None}
        if step not in self._recent:
            if len(self._recent) == ENCODED_KEPT:
                del self._recent[next(iter(self._recent))]
            self._recent[step] = _encoded(frame, self.options)
        return {"bytes": self._recent[step], "path": None}


def _encoded(frame: NDArray[np.uint8], options: RowOptions) -> bytes:
    content, image = BytesIO(), Image.fromarray(frame)
    if options.image_format == "png":
        # The least effort: twice as large as the most, and many times as fast.
        image.save(content, format="PNG", compress_level=1)
    else:
        image.save(content, format="JPEG", quality=options.jpeg_quality)
    return content.getvalue()


__all__ = [
    "COUNTS",
    "LABELS",
    "RowOptions",
    "Rows",
    "Tally",
    "episode_features",
    "episode_rows",
    "pair_features",
    "pair_rows",
    "step_features",
    "step_rows",
]
