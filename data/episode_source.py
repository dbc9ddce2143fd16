"""How a data set is read, whatever its format: shards of episodes, each readable on its own and in any order."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lapa.data.schema import Episode, ReadError

logger = logging.getLogger(__name__)

# Time between the frames of a pair where neither the user nor the source says: the paper's, for robots and for people.
ROBOT_GAP_SECONDS, HUMAN_GAP_SECONDS = 0.6, 2.4

OnError = Callable[[ReadError], None]
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def raise_error(error: ReadError) -> None:
    """The `on_error` that stops at the first thing that cannot be read."""
    raise error


@dataclass(frozen=True)
class SourceShard:
    """
    A part of a data set that is read by itself: a file, or some files that belong together.

    Args:
        name (`str`): Unique and stable within the source.
        num_episodes (`int`): How many episodes it holds, those that turn out unreadable included.
    """

    name: str
    num_episodes: int


class EpisodeSource(ABC):
    """
    The episodes of one data set (one split of it).

    A format is a subclass that says which shards there are, and reads them. Making one checks that everything which is
    asked for is there, and reads no episode. It pickles, and two that were made alike are alike: the same shards, in the
    same order, with the same episodes.

    Attributes:
        name (`str`): Data set and split, as in `Episode.source`.
        frame_gap_seconds (`float`): Default time between the frames of a pair.
        any_order (`bool`): Whether `read` gives episodes in the order they are asked for. Without it they come in that of a
            compressed archive, so that the source can be read through but not shuffled.
        embodiment (`str`, *optional*): Robot or person that acts.
        unnorm_key (`str`, *optional*): Name under which the statistics of its actions are kept.
        warnings (`tuple[str, ...]`): What is announced but absent, or is left out, and why; for people to read.
        options (`Mapping[str, Any]`): What it was opened with where that is not the default and changes what its episodes
            hold (`action_keys`, `frequency`, `captions`, ...), as JSON has it; filled in by `open_source`. Two runs over
            the same shards with other options are two different runs.
    """

    name: str
    frame_gap_seconds: float = ROBOT_GAP_SECONDS
    any_order: bool = True
    embodiment: str | None = None
    unnorm_key: str | None = None
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = NO_OPTIONS

    @property
    @abstractmethod
    def shards(self) -> tuple[SourceShard, ...]:
        """All shards, in a fixed order."""

    @property
    @abstractmethod
    def cameras(self) -> tuple[str, ...]:
        """Cameras that episodes may have; the first is what is read where none is named."""

    @abstractmethod
    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """
        Reads episodes of a shard; frames stay encoded until they are asked for.

        Args:
            shard: Index into `shards`.
            episodes: Which, by their index in the shard, in the order they are wanted; all in order when None.
            on_error: Called with what cannot be read. Where it returns, reading goes on with the next episode.

        Yields:
            Index in the shard, and the episode.

        Raises:
            ReadError: By default, for what cannot be read.
        """

    def wanted(self, shard: int, episodes: Sequence[int] | None) -> Sequence[int]:
        """The episodes of a shard that `read` is asked for; raises `ValueError` for one that it does not have."""
        count = self.shards[shard].num_episodes
        for index in episodes or ():
            if not 0 <= index < count:
                raise ValueError(f"`episodes` has {index}; shard {self.shards[shard].name} has {count} episodes.")
        return range(count) if episodes is None else episodes

    @property
    def num_episodes(self) -> int:
        """Of all shards."""
        return sum(shard.num_episodes for shard in self.shards)

    @property
    def shards_hash(self) -> str:
        """SHA-256 over the names and sizes of the shards."""
        shards = json.dumps([[shard.name, shard.num_episodes] for shard in self.shards])
        return hashlib.sha256(shards.encode()).hexdigest()

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order; the first that cannot be read raises."""
        for shard in range(len(self.shards)):
            for _, episode in self.read(shard):
                yield episode


class SkippedEpisodes:
    """
    The `on_error` that counts what cannot be read and lets reading go on, up to a share.

    Args:
        max_share: Share of episodes that may be skipped, in [0, 1].
        min_episodes: Episodes that must have been seen before the share can end a run.

    Raises:
        ReadError: When more is skipped, from the call that exceeds it.
    """

    def __init__(self, max_share: float = 0.05, min_episodes: int = 100) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"`max_share` must lie in [0, 1], got {max_share}.")
        self.max_share, self.min_episodes = max_share, min_episodes
        self.num_seen = 0
        self.reasons: Counter[str] = Counter()

    @property
    def num_skipped(self) -> int:
        """Episodes skipped so far."""
        return self.reasons.total()

    def seen(self) -> None:
        """Counts an episode that could be read."""
        self.num_seen += 1

    def __call__(self, error: ReadError, count: int = 1) -> None:
        """Counts what could not: one episode, or `count` that are lost for the same reason."""
        self.num_seen += count
        self.reasons[str(error)] += count
        logger.warning("skipped%s: %s", "" if count == 1 else f" {count} episodes", error)
        if self.num_seen >= self.min_episodes:
            self.check(error)

    def check(self, last: ReadError | None = None) -> None:
        """Raises if the share is exceeded; to be called at the end of a run, however short."""
        if self.num_skipped > self.max_share * self.num_seen:
            example = last if last is not None else next(iter(self.reasons))
            raise ReadError(
                f"{self.num_skipped} of {self.num_seen} episodes could not be read, more than the share of "
                f"{self.max_share:g} that `max_skipped` allows; one of them: {example}"
            )


def read_or_skip(
    source: EpisodeSource,
    shard: int,
    skipped: Callable[[ReadError, int], object] | None = None,
    episodes: Sequence[int] | None = None,
) -> Iterator[tuple[int, Episode]]:
    """
    Episodes of a shard, and how many of them cannot be read.

    Args:
        source, shard: Which.
        skipped: Called, after the last episode, with errors and how many episodes each stands for: together all that did
            not come. [`SkippedEpisodes`] is one; episodes that are yielded are for the caller to count (`seen`). None
            raises the first error.
        episodes: Indices in the shard; all in order when None.

    Yields:
        Index in the shard, and the episode.

    Raises:
        ReadError: Without `skipped`; with it what it raises.
    """
    errors: list[ReadError] = []
    wanted = source.wanted(shard, episodes)
    missing = len(wanted)
    for number, episode in source.read(shard, wanted, raise_error if skipped is None else errors.append):
        missing -= 1
        yield number, episode
    if skipped is None or not missing:
        return
    for error in errors[: missing - 1]:
        skipped(error, 1)
    name = source.shards[shard].name
    last = errors[-1] if errors else ReadError(f"{name} lacks episodes that it announces, and no reason is known.")
    skipped(last, missing - len(errors[: missing - 1]))


__all__ = [
    "HUMAN_GAP_SECONDS",
    "ROBOT_GAP_SECONDS",
    "EpisodeSource",
    "OnError",
    "SkippedEpisodes",
    "SourceShard",
    "raise_error",
    "read_or_skip",
]
