"""A stretch of the episodes of a source, as a source of its own: what is held out, and what is left."""

from collections.abc import Iterator, Sequence

from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.schema import Episode


class EpisodeRange(EpisodeSource):
    """
    The episodes from `start` to `stop`, counted through the shards in order.

    Args:
        source (`EpisodeSource`): What they belong to.
        start (`int`): The first.
        stop (`int`, *optional*): The one after the last; the end of the source when None.

    Raises:
        ValueError: A range that is empty or not within the source.
    """

    def __init__(self, source: EpisodeSource, start: int = 0, stop: int | None = None) -> None:
        total = source.num_episodes
        stop = total if stop is None else stop
        if not 0 <= start < stop <= total:
            raise ValueError(f"`start` and `stop` must give a part of {total} episodes, got {start} and {stop}.")
        self.source, self.any_order = source, source.any_order
        self.name, self.frame_gap_seconds, self.warnings = source.name, source.frame_gap_seconds, source.warnings
        self.embodiment, self.unnorm_key, self.options = source.embodiment, source.unnorm_key, source.options
        # Shard of the source, and its first episode in the range.
        self._parts: list[tuple[int, int]] = []
        shards, before = [], 0
        for index, shard in enumerate(source.shards):
            first, last = max(start - before, 0), min(stop - before, shard.num_episodes)
            before += shard.num_episodes
            if first < last:
                self._parts.append((index, first))
                shards.append(SourceShard(shard.name, last - first))
        self._shards = tuple(shards)

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        """Those of the source that have episodes in the range, with the number of these."""
        return self._shards

    @property
    def cameras(self) -> tuple[str, ...]:
        """Of the source."""
        return self.source.cameras

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """Reads from the source; see `EpisodeSource.read`."""
        index, first = self._parts[shard]
        wanted = range(self._shards[shard].num_episodes) if episodes is None else episodes
        for number, episode in self.source.read(index, [first + number for number in wanted], on_error):
            yield number - first, episode


def hold_out_last(source: EpisodeSource, count: int) -> tuple[EpisodeSource, EpisodeSource | None]:
    """
    Splits the last episodes of a source off.

    Args:
        source: Any.
        count: How many; 0 leaves the source as it is.

    Returns:
        The others, and those; None for none.

    Raises:
        ValueError: Fewer than 0, or nothing would be left.
    """
    total = source.num_episodes
    if not 0 <= count < total:
        raise ValueError(
            f"`eval_episodes` must lie in [0, {total - 1}] for the {total} episodes of {source.name}, got {count}."
        )
    if count == 0:
        return source, None
    return EpisodeRange(source, 0, total - count), EpisodeRange(source, total - count)


__all__ = ["EpisodeRange", "hold_out_last"]
