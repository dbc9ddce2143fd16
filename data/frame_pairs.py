"""Pairs of frames a fixed gap apart: what the quantizer learns from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch.utils.data import Dataset

from lapa.data.pair_filters import FrameSummary, PairFilter, dropped_by
from lapa.data.read_counts import BLANK_CAMERA, NO_FRAME_AT_GAP, TOO_SHORT, PairCounts
from lapa.data.schema import Episode, FramePair, ReadError

Frames = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

# Pairs decoded at a time, so that memory does not grow with the length of a clip.
PAIRS_PER_READ = 64
# Matroska and WebM keep times in milliseconds: frames at a constant rate seem to jitter by as much.
TIMESTAMP_RESOLUTION = 1e-3
# Two frames whose distances (seconds) from where the gap ends differ by no more are equally near.
TIE_SECONDS = 1e-6


def _checked_frame(frame: Any, size: tuple[int, int] | None, where: str) -> NDArray[np.uint8]:
    """One frame as (height, width, 3) uint8, resized where it has another size."""
    array = np.asarray(frame)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{where} must be a (height, width, 3) uint8 frame, got {array.dtype} of shape {array.shape}."
        )
    return array if size is None else resize_frame(array, size)


def resize_frame(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame (height, width, 3) uint8 at `size` (height, width), as the quantizer sees it; the aspect ratio goes."""
    if frame.shape[:2] == size:
        return frame
    # PIL's antialiased bilinear resize, without keeping the aspect ratio, is what the published code trains on.
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR))


def episode_pairs(num_frames: int, frame_gap: int) -> NDArray[np.int64]:
    """
    Steps (num_pairs, 2) of all pairs of an episode: `(t, t + frame_gap)`, never clamped to the last frame.

    A clip no longer than the gap has none.
    """
    if frame_gap < 1:
        raise ValueError(f"`frame_gap` must be at least 1 frame, got {frame_gap}.")
    first = np.arange(max(num_frames - frame_gap, 0), dtype=np.int64)
    return np.stack([first, first + frame_gap], axis=1)


def timed_pairs(timestamps: ArrayLike, gap_seconds: float) -> tuple[NDArray[np.int64], int]:
    """
    Steps of all pairs of an episode whose frames lie `gap_seconds` apart.

    The second step of a pair is the frame nearest to `timestamps[first] + gap_seconds`, the later one of two that are
    equally near. It must be a later frame than the first, and lie within half a frame interval of that time; the interval
    is the shorter of the two beside it, so that a hole in the recording does not widen it, and one millisecond is added
    for the resolution of stored times. A clip ends half an interval after its last frame. At a constant rate these are
    the pairs of `episode_pairs` with the gap rounded to whole frames, halves upwards.

    Args:
        timestamps: (num_frames,) seconds, not decreasing.
        gap_seconds: Above 0.

    Returns:
        (num_pairs, 2) int64 steps, and the number of steps that have no such frame although the clip goes on until
        then. Steps whose gap would leave the clip count in neither.

    Raises:
        ValueError: A gap that is not positive, or times that decrease.
    """
    if not gap_seconds > 0:
        raise ValueError(f"`frame_gap_seconds` must be above 0, got {gap_seconds}.")
    times = np.asarray(timestamps, dtype=np.float64)
    intervals = np.diff(times)
    if len(times) < 2:
        return np.zeros((0, 2), dtype=np.int64), 0
    if not (intervals >= 0).all():
        raise ValueError("`timestamps` must be finite and must not decrease.")
    wanted = times + gap_seconds
    later = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    nearer_before = wanted - times[later - 1] < times[later] - wanted - TIE_SECONDS
    second = later - nearer_before
    # The shorter interval beside each frame; the outermost have one only.
    beside = np.minimum(np.append(np.inf, intervals), np.append(intervals, np.inf))
    near = np.abs(times[second] - wanted) <= beside[second] / 2 + TIMESTAMP_RESOLUTION
    # Half an interval after the last frame the clip has ended: a next frame would have been the one.
    near &= wanted < times[-1] + beside[-1] / 2 - TIE_SECONDS
    first = np.arange(len(times))
    kept = near & (second > first)
    return np.stack([first, second], axis=1)[kept].astype(np.int64), int((~kept & (wanted <= times[-1])).sum())


@dataclass(frozen=True)
class PairSteps:
    """
    The pairs of an episode.

    Args:
        steps (`NDArray`): (num_pairs, 2) int64, first and second step, in the order of the first.
        num_without_frame (`int`): Steps without a pair because no frame lies near enough to where the gap ends.
    """

    steps: NDArray[np.int64]
    num_without_frame: int = 0


@dataclass(frozen=True)
class FrameGap:
    """
    How far apart the frames of a pair are: in frames or in seconds, exactly one of the two.

    Args:
        frames (`int`, *optional*): At least 1.
        seconds (`float`, *optional*): Above 0; needs a source that knows the time of its frames.

    Raises:
        ValueError: Neither, both, or a value out of range.
    """

    frames: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.seconds is None):
            raise ValueError(
                f"exactly one of `frame_gap` ({self.frames}) and `frame_gap_seconds` ({self.seconds}) must be given."
            )
        if self.frames is not None:
            episode_pairs(0, self.frames)
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"`frame_gap_seconds` must be above 0 and finite, got {self.seconds}.")

    def pairs(self, episode: Episode) -> PairSteps:
        """
        Steps of all pairs of an episode. None is clamped to the last frame: what would leave the clip does not exist.

        Raises:
            ValueError: A gap in seconds where the episode has no timestamps.
            ReadError: Timestamps that decrease or are no numbers.
        """
        if self.frames is not None:
            return PairSteps(episode_pairs(episode.num_steps, self.frames))
        assert self.seconds is not None
        if episode.timestamps is None:
            raise ValueError(
                f"`frame_gap_seconds` ({self.seconds:g}) needs the time between frames, which {episode.source} does not "
                "record: give its `frequency`, or a `frame_gap` in frames."
            )
        try:
            return PairSteps(*timed_pairs(episode.timestamps, self.seconds))
        except ValueError as error:
            raise ReadError(f"episode {episode.episode_id!r} of {episode.source}: {error}") from error


def seconds_between(episode: Episode, steps: Sequence[int] | NDArray[np.int64]) -> float | None:
    """Time from the first to the second of two steps; None where the episode has no timestamps."""
    if episode.timestamps is None:
        return None
    return float(episode.timestamps[steps[1]] - episode.timestamps[steps[0]])


def image_height_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """`image_size` as (height, width); None stays None."""
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(int(length) for length in image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`image_size` must be one length or (height, width), at least 1, got {image_size!r}.")
    return size[0], size[1]


def read_pairs(
    episode: Episode,
    camera: str,
    steps: NDArray[np.int64],
    size: tuple[int, int] | None = None,
    filters: Sequence[PairFilter] = (),
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]] | str]:
    """
    Decodes pairs, every frame once however many pairs it is in.

    Args:
        episode: Has `camera`.
        camera: Whose frames.
        steps: (num_pairs, 2).
        size: (height, width) that frames are resized to; None leaves them.
        filters: See the frames as they were decoded, before resizing.

    Returns:
        Per pair its two frames (height, width, 3) uint8 RGB, shared between pairs, or the name of the filter that
        leaves it out.

    Raises:
        ReadError: A frame that cannot be decoded, or frames of one pair that differ in size.
    """
    distinct = np.unique(steps).tolist()
    decoded = dict(zip(distinct, episode.read_frames(camera, distinct)))
    summaries = {step: FrameSummary(frame) for step, frame in decoded.items()}
    reasons = [dropped_by(filters, summaries[first], summaries[second]) for first, second in steps.tolist()]
    kept = {step for pair, reason in zip(steps.tolist(), reasons) if reason is None for step in pair}
    name = f"of camera {camera!r} of episode {episode.episode_id!r} of {episode.source}"
    frames = {step: _checked_frame(decoded[step], size, f"frame {step} {name}") for step in kept}
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]] | str] = []
    for (first, second), reason in zip(steps.tolist(), reasons):
        if reason is not None:
            pairs.append(reason)
        elif frames[first].shape != frames[second].shape:
            raise ReadError(f"frames {first} and {second} {name} differ in size.")
        else:
            pairs.append((frames[first], frames[second]))
    return pairs


def episode_frame_pairs(
    episode: Episode,
    camera: str,
    gap: FrameGap,
    image_size: int | Sequence[int] | None = None,
    filters: Sequence[PairFilter] = (),
    counts: PairCounts | None = None,
) -> Iterator[FramePair]:
    """
    All pairs of an episode in order, decoded `PAIRS_PER_READ` at a time.

    Args:
        episode: Any.
        camera: Whose frames; an episode where it recorded nothing gives no pair.
        gap: Between the frames.
        image_size: Size of the frames that come out, one number or (height, width); None leaves them.
        filters: Leave pairs out.
        counts: What was kept and left out is added to it.

    Yields:
        The pairs that no filter leaves out.

    Raises:
        ReadError: A frame that cannot be decoded.
        ValueError: A gap in seconds where the episode has no timestamps.
    """
    counts, size = PairCounts() if counts is None else counts, image_height_width(image_size)
    steps = open_pairs(episode, camera, gap, counts)
    for start in range(0, len(steps), PAIRS_PER_READ):
        chunk = steps[start : start + PAIRS_PER_READ]
        for (first, second), frames in zip(chunk.tolist(), read_pairs(episode, camera, chunk, size, filters)):
            seconds = seconds_between(episode, (first, second))
            if isinstance(frames, str):
                counts.dropped_items[frames] += 1
                continue
            counts.items += 1
            counts.gaps.add(second - first, seconds)
            yield FramePair(episode.episode_id, episode.source, camera, (first, second), seconds, np.stack(frames))


def open_pairs(episode: Episode, camera: str, gap: FrameGap, counts: PairCounts) -> NDArray[np.int64]:
    """Steps (num_pairs, 2) of an episode's pairs; counts the episode, and why it has none or lacks some."""
    counts.groups += 1
    if camera not in episode.frames:
        counts.skipped_groups[BLANK_CAMERA] += 1
        return np.zeros((0, 2), dtype=np.int64)
    pairs = gap.pairs(episode)
    if pairs.num_without_frame:
        counts.dropped_items[NO_FRAME_AT_GAP] += pairs.num_without_frame
    elif not len(pairs.steps):
        counts.skipped_groups[TOO_SHORT] += 1
    return pairs.steps


class FramePairDataset(Dataset[dict[str, Any]]):
    r"""
    Every pair of frames that lies `frame_gap` apart inside one episode, in order.

    ```python
    >>> dataset = FramePairDataset([np.zeros((5, 64, 64, 3), np.uint8)], frame_gap=2)
    >>> len(dataset), dataset[0]["frames"].shape
    (3, torch.Size([2, 3, 64, 64]))
    ```

    Args:
        episodes: Sequences of frames (num_frames, height, width, 3) uint8 RGB, arrays or anything that gives a frame
            by index (a camera of an `Episode` decodes it then).
        frame_gap: Frames between the two; one number, or one per episode.
        image_size: Size of the frames that come out, one number or (height, width); None leaves them.

    Raises:
        ValueError: A gap below one, or no pair at all.
    """

    def __init__(
        self,
        episodes: Sequence[Frames],
        frame_gap: int | Sequence[int],
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        self.episodes = episodes
        gaps = [frame_gap] * len(episodes) if isinstance(frame_gap, int) else list(frame_gap)
        if len(gaps) != len(episodes):
            raise ValueError(f"`frame_gap` has {len(gaps)} entries for {len(episodes)} episodes.")
        self.image_size = image_height_width(image_size)
        pairs = [episode_pairs(len(frames), gap) for frames, gap in zip(episodes, gaps)]
        counts = [len(steps) for steps in pairs]
        self.num_short_episodes = counts.count(0)
        if not sum(counts):
            raise ValueError(
                f"`episodes` hold no pair of frames: {len(episodes)} episodes, none longer than its `frame_gap` "
                f"({min(gaps, default=None)} at least)."
            )
        # (num_pairs, 3): episode, first step, second step.
        self.index = np.concatenate([np.repeat(np.arange(len(pairs)), counts)[:, None], np.concatenate(pairs)], axis=1)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """`frames` (2, 3, height, width) uint8, first and second frame, and `example_id`."""
        episode, *steps = (int(value) for value in self.index[item])
        recorded = self.episodes[episode]
        pair = [
            _checked_frame(recorded[step], self.image_size, f"frame {step} of episode {episode}") for step in steps
        ]
        frames = torch.from_numpy(np.stack(pair)).permute(0, 3, 1, 2)
        return {"frames": frames, "example_id": f"episode {episode} steps {steps[0]} and {steps[1]}"}


class FramePairCollator:
    r"""
    Batches pairs for the quantizer.

    ```python
    >>> FramePairCollator()([{"frames": torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)}])
    {'pixel_values': tensor([[[[[1.]], ...]]])}     # (batch, 2, 3, height, width) float32 in [0, 1]
    ```
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: Each with `frames` (2, 3, height, width) uint8.

        Returns:
            `pixel_values` (batch, 2, 3, height, width) float32 in [0, 1].

        Raises:
            ValueError: Frames of unequal sizes.
        """
        frames = [example["frames"] for example in examples]
        if len({tuple(pair.shape) for pair in frames}) > 1:
            sizes = sorted({tuple(pair.shape[-2:]) for pair in frames})
            raise ValueError(f"frames have different sizes {sizes}: give the data set an `image_size`.")
        return {"pixel_values": torch.stack(frames).contiguous().float() / 255}


__all__ = [
    "PAIRS_PER_READ",
    "FrameGap",
    "FramePairCollator",
    "FramePairDataset",
    "Frames",
    "PairSteps",
    "episode_frame_pairs",
    "episode_pairs",
    "image_height_width",
    "open_pairs",
    "read_pairs",
    "resize_frame",
    "seconds_between",
    "timed_pairs",
]
