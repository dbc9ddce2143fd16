"""Frame pairs of one or many sources as an endless or single-pass stream: what the quantizer learns from at scale."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lapa.data.episode_source import EpisodeSource, OnError
from lapa.data.frame_pairs import FrameGap, image_height_width, open_pairs, read_pairs, seconds_between
from lapa.data.pair_filters import PairFilter, check_filters
from lapa.data.read_counts import PairCounts, ReadCounts
from lapa.data.schema import Episode
from lapa.data.shuffled_stream import ShuffledStream
from lapa.data.stream_cursor import Reference, StreamOptions, StreamPart


@dataclass(frozen=True)
class FramePairSource:
    """
    A source of episodes with what a stream of its pairs needs to know.

    Args:
        source (`EpisodeSource`): The episodes.
        weight (`float`): How often it gives the next pair, relative to the other sources of a stream.
        camera (`str`, *optional*): Whose frames; the source's first camera when None.
        frame_gap (`int`, *optional*), frame_gap_seconds (`float`, *optional*): Between the two frames, at most one of
            the two; the source's `frame_gap_seconds` when both are None.
        filters (`Sequence[PairFilter]`): Leave pairs out.

    Raises:
        ValueError: A camera that the source lacks, both gaps, a gap out of range, filters that are none.
    """

    source: EpisodeSource
    weight: float = 1.0
    camera: str | None = None
    frame_gap: int | None = None
    frame_gap_seconds: float | None = None
    filters: Sequence[PairFilter] = ()

    def __post_init__(self) -> None:
        cameras = self.source.cameras
        if not cameras or (self.camera is not None and self.camera not in cameras):
            raise ValueError(
                f"`camera` {self.camera!r} is unknown; {self.source.name} has {', '.join(cameras) or 'none'}."
            )
        object.__setattr__(self, "filters", check_filters(self.filters))
        _ = self.gap

    @property
    def name(self) -> str:
        """Of the source, with the camera where one was chosen."""
        return self.source.name if self.camera is None else f"{self.source.name}:{self.camera}"

    @property
    def chosen_camera(self) -> str:
        """`camera`, or the source's first."""
        return self.source.cameras[0] if self.camera is None else self.camera

    @property
    def gap(self) -> FrameGap:
        """Between the frames."""
        seconds = self.frame_gap_seconds
        if self.frame_gap is None and seconds is None:
            seconds = self.source.frame_gap_seconds
        return FrameGap(self.frame_gap, seconds)


@dataclass(frozen=True, slots=True)
class _DecodedPair:
    """A pair in the buffer; neighbouring pairs of an episode share frames."""

    episode_id: str
    source: str
    steps: tuple[int, int]
    seconds: float | None
    frames: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    instruction: str | None
    action: NDArray[np.float32] | None


class FramePairPart(StreamPart[Episode, _DecodedPair]):
    """The pairs of a source, grouped by episode; a reference is (first step, second step)."""

    def __init__(self, source: FramePairSource, image_size: int | Sequence[int] | None) -> None:
        self.source, self.gap = source.source, source.gap
        self.name, self.weight, self.filters = source.name, source.weight, tuple(source.filters)
        self.camera, self.any_order = source.chosen_camera, source.source.any_order
        self.size = image_height_width(image_size)
        self.group_counts = tuple(shard.num_episodes for shard in self.source.shards)
        self.shards_hash = self.source.shards_hash

    def description(self) -> dict[str, Any]:
        """As in `StreamPart`; shards go in by their names and numbers of episodes."""
        return {
            "name": self.name,
            "weight": self.weight,
            "camera": self.camera,
            "frame_gap": self.gap.frames,
            "frame_gap_seconds": self.gap.seconds,
            "filters": [repr(item) for item in self.filters],
            "image_size": self.size,
            "options": dict(self.source.options),
            "shards": [len(self.group_counts), sum(self.group_counts), self.shards_hash],
        }

    def new_counts(self) -> PairCounts:
        """As in `StreamPart`."""
        return PairCounts()

    def open(self, shard: int, groups: Sequence[int], on_error: OnError) -> Iterator[tuple[int, Episode]]:
        """As in `StreamPart`: episodes of a shard."""
        return self.source.read(shard, groups, on_error)

    def items(self, group: Episode, counts: ReadCounts) -> NDArray[np.int64]:
        """As in `StreamPart`: (num_pairs, 2) steps."""
        assert isinstance(counts, PairCounts)
        return open_pairs(group, self.camera, self.gap, counts)

    def read(self, group: Episode, items: NDArray[np.int64]) -> list[_DecodedPair | str]:
        """As in `StreamPart`: decodes and filters."""
        read = read_pairs(group, self.camera, items, self.size, self.filters)
        return [
            frames
            if isinstance(frames, str)
            else _DecodedPair(
                group.episode_id,
                group.source,
                (first, second),
                seconds_between(group, (first, second)),
                frames,
                group.instruction,
                # Per step, so that pairs of different gaps, and grippers that are no displacement, compare.
                None if group.action is None else group.action[first:second].mean(0),
            )
            for (first, second), frames in zip(items.tolist(), read)
        ]

    def count(self, item: _DecodedPair, counts: ReadCounts) -> None:
        """As in `StreamPart`, with the gap."""
        assert isinstance(counts, PairCounts)
        counts.items += 1
        counts.gaps.add(item.steps[1] - item.steps[0], item.seconds)

    def example(self, item: _DecodedPair, reference: Reference) -> dict[str, Any]:
        """What a `FramePairStream` yields."""
        return {
            "frames": torch.from_numpy(np.stack(item.frames)).permute(0, 3, 1, 2),
            "episode_id": item.episode_id,
            "source": item.source,
            "camera": self.camera,
            "steps": item.steps,
            "seconds": item.seconds,
            "instruction": item.instruction,
            "action": item.action,
        }


class FramePairStream(ShuffledStream):
    r"""
    Frame pairs of a mixture of sources.

    ```python
    >>> sources = [FramePairSource(bridge, weight=3.0), FramePairSource(videos, filters=[StaticPairs(), ShotCuts()])]
    >>> stream = FramePairStream(sources, image_size=256, seed=0)
    >>> for batch in StreamLoader(stream, batch_size=64, collate_fn=FramePairCollator(), num_workers=4):
    ...     state = stream.state_dict()  # of what has been handed out, however far the workers are ahead
    ```

    Each example has `frames` (2, 3, height, width) uint8, and `episode_id`, `source`, `camera`, `steps` (first, second)
    and `seconds` (None where the source does not tell) that say which pair it is; and, None where there is none, the
    episode's `instruction` and the mean `action` (action_dim,) float32 of the steps from the first frame to the second.
    Order, division and state are those of
    [`ShuffledStream`].

    Memory: two frames per pair of the buffer (neighbours share them), and 64 pairs of the episode at hand per source,
    in every loader worker.

    Args:
        sources: What is read. Their names differ.
        image_size: Size of the frames that come out, one number or (height, width); None leaves them.
        seed: Of all draws, at least 0.
        buffer_size: Pairs to draw from, at least 1.
        pairs_per_episode: Pairs taken of each episode in an epoch, drawn at random; None takes all.
        repeat: Whether sources begin anew for ever (training), or a pass ends, with every pair once.
        on_error: `"raise"` stops at what cannot be read, `"skip"` counts it and goes on.
        max_skipped: Share of the episodes of a source that may be skipped, in [0, 1]; more ends the run.
        rank, world_size: Which of how many processes this is; `RANK` and `WORLD_SIZE` of the environment when None.

    Raises:
        ValueError: An argument out of range, no source, an empty source, two sources of one name.
    """

    option_names: Mapping[str, str] = {"items_per_group": "pairs_per_episode"}

    def __init__(
        self,
        sources: Sequence[FramePairSource],
        image_size: int | Sequence[int] | None = None,
        *,
        seed: int = 0,
        buffer_size: int = 1024,
        pairs_per_episode: int | None = None,
        repeat: bool = True,
        on_error: str = "raise",
        max_skipped: float = 0.05,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        parts = [FramePairPart(source, image_size) for source in sources]
        options = StreamOptions(seed, buffer_size, pairs_per_episode, repeat, on_error, max_skipped)
        super().__init__(parts, options, rank, world_size)


__all__ = ["FramePairSource", "FramePairStream"]
