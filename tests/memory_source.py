"""A source of small episodes in memory; every frame tells its episode and step by its first pixel."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.schema import Episode, FrameSequence, ReadError


class MarkedFrames(FrameSequence):
    """Frames of noise whose first pixel is (shard, episode, step)."""

    def __init__(self, shard: int, episode: int, num_frames: int, size: int, broken: Sequence[int] = ()) -> None:
        self.mark, self.num_frames, self.size, self.broken = (shard, episode), num_frames, size, broken

    def __len__(self) -> int:
        return self.num_frames

    def read(self, steps: Sequence[int]) -> list[np.ndarray]:
        return [self._frame(step) for step in steps]

    def _frame(self, step: int) -> np.ndarray:
        if step in self.broken:
            raise ReadError(f"frame {step} of episode {self.mark} is cut off")
        generator = np.random.default_rng((*self.mark, step))
        frame = generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        frame[0, 0] = (*self.mark, step % 256)
        return frame


class MemorySource(EpisodeSource):
    """
    Args:
        name: Of the source.
        lengths: Steps of each episode of each shard; 0 is an episode that cannot be read.
        frequency: None gives no timestamps.
        action_dim: None gives no actions.
        blank: Episodes (shard, episode) whose camera recorded nothing.
        broken: Frames that cannot be decoded, by (shard, episode).
    """

    cameras = ("front", "wrist")

    def __init__(
        self,
        name: str,
        lengths: Sequence[Sequence[int]],
        frequency: float | None = 5.0,
        size: int = 4,
        action_dim: int | None = None,
        blank: Sequence[tuple[int, int]] = (),
        broken: dict[tuple[int, int], Sequence[int]] | None = None,
        timestamps: Any = None,
    ) -> None:
        self.name, self.lengths, self.frequency, self.size = name, lengths, frequency, size
        self.action_dim, self.blank, self.broken, self.timestamps = action_dim, blank, broken or {}, timestamps
        self.opened: list[tuple[int, int]] = []

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return tuple(SourceShard(f"{self.name}-{i:03d}", len(part)) for i, part in enumerate(self.lengths))

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for number in range(len(self.lengths[shard])) if episodes is None else episodes:
            self.opened.append((shard, number))
            if not self.lengths[shard][number]:
                on_error(ReadError(f"{self.name}-{shard:03d}, record {number}: checksum"))
                continue
            yield number, self._episode(shard, number, self.lengths[shard][number])

    def _episode(self, shard: int, number: int, length: int) -> Episode:
        frames = MarkedFrames(shard, number, length, self.size, self.broken.get((shard, number), ()))
        generator = np.random.default_rng((shard, number))
        times = self.timestamps if self.timestamps is not None else None
        if times is None and self.frequency is not None:
            times = np.arange(length) / self.frequency
        return Episode(
            episode_id=f"{shard}/{number}",
            source=self.name,
            frames={} if (shard, number) in self.blank else {"front": frames, "wrist": frames},
            num_steps=length,
            instructions=(f"do {number}",),
            action=None
            if self.action_dim is None
            else generator.normal(size=(length, self.action_dim)).astype(np.float32),
            timestamps=times,
        )

    def all_pairs(self, frame_gap: int) -> set[tuple[str, str, tuple[int, int]]]:
        """(source, episode, steps) of every pair."""
        return {
            (self.name, f"{shard}/{number}", (step, step + frame_gap))
            for shard, part in enumerate(self.lengths)
            for number, length in enumerate(part)
            for step in range(length - frame_gap)
        }


def pair_key(example: dict[str, Any]) -> tuple[str, str, tuple[int, int]]:
    """Which pair an example of a stream is."""
    return example["source"], example["episode_id"], tuple(example["steps"])
