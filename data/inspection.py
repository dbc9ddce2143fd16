"""What is in a data set, and what a reader of its frame pairs would skip and why: behind `lapa inspect`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.contact_sheet import Tile, make_tile
from lapa.data.episode_source import EpisodeSource, read_or_skip
from lapa.data.frame_pairs import read_pairs, seconds_between
from lapa.data.inspection_totals import EpisodeTotals
from lapa.data.mixture import FramePairSource
from lapa.data.open_source import open_pair_source, open_source, source_kind
from lapa.data.pair_filters import BlankFrames, FrameSummary, PairFilter, ShotCuts, StaticPairs, dropped_by
from lapa.data.schema import Episode, ReadError

# Options of an entry that are about its pairs, not about the source.
PAIR_OPTIONS = ("weight", "camera", "frame_gap", "frame_gap_seconds", "filters")
# Episodes that pairs are decoded of, and pairs decoded at a time (they may be large).
MAX_SAMPLED_EPISODES, PAIRS_AT_ONCE = 32, 8

# Called with how many were just read, and how many will be in all, where that is known.
Progress = Callable[[int, int | None], object]


def no_progress(count: int, total: int | None) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class InspectOptions:
    """
    How much is looked at.

    Args:
        max_episodes (`int`, *optional*): Episodes read, evenly spaced over the source; None reads all.
        num_pairs (`int`): Pairs decoded, spread over the episodes: for the filters and the contact sheet.
        on_error (`str`): `skip` counts what cannot be read, `raise` stops at it.
    """

    max_episodes: int | None = 1000
    num_pairs: int = 64
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"`max_episodes` must be at least 1, or `all`, got {self.max_episodes}.")
        if self.num_pairs < 0:
            raise ValueError(f"`num_pairs` must be at least 0, got {self.num_pairs}.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be raise or skip, got {self.on_error!r}.")


@dataclass(frozen=True)
class Inspection:
    """
    What was found in one source.

    Args:
        content (`Mapping`): JSON-serialisable.
        tiles (`tuple[Tile, ...]`): Frame pairs for a contact sheet.
    """

    content: Mapping[str, Any]
    tiles: tuple[Tile, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Of the source."""
        return str(self.content["name"])


def inspect_source(
    entry: Mapping[str, Any],
    options: InspectOptions = InspectOptions(),
    progress: Progress = no_progress,
) -> Inspection:
    """
    Reads episodes of a source by their headers and numbers, and decodes a few pairs of them.

    Pairs are those that a training command given the same options would read. The cameras beside the one that is read are
    described, too; what is damaged in them alone skips nothing.

    Args:
        entry: As `lapa.data.open_source.open_pair_source` takes it: `path`, and options of the source and its pairs.
        options: How much is looked at.
        progress: Called with the number of episodes just read, and how many will be in all.

    Returns:
        What was found.

    Raises:
        ValueError: What `open_pair_source` refuses.
        ReadError: With `on_error="raise"`, what cannot be read.
    """
    pairs = open_pair_source(entry)
    whole = open_source({name: value for name, value in entry.items() if name not in PAIR_OPTIONS})
    source = pairs.source
    totals = EpisodeTotals(whole.cameras, pairs.chosen_camera, pairs.gap)
    sampler = PairSampler(pairs, options.num_pairs, min(source.num_episodes, options.max_episodes or 10**12))
    wanted = evenly_spaced(source, options.max_episodes)
    total = sum(map(len, wanted))
    for shard, episodes in enumerate(wanted):
        for episode in _episodes(source, whole, shard, episodes, totals, options.on_error):
            progress(1, total)
            try:
                sampler.offer(episode, totals.add(episode))
            except ReadError as error:
                if options.on_error == "raise":
                    raise
                totals.add_unreadable(error)
    content = {
        "path": str(entry["path"]),
        "kind": entry.get("kind") or source_kind(str(entry["path"])),
        "name": source.name,
        "weight": pairs.weight,
        "episodes": source.num_episodes,
        "shards": len(source.shards),
        "episodes_looked_at": total,
        "default_frame_gap_seconds": whole.frame_gap_seconds,
        "gap_is_default": entry.get("frame_gap") is None and entry.get("frame_gap_seconds") is None,
        "embodiment": source.embodiment,
        "unnorm_key": source.unnorm_key,
        "warnings": list(dict.fromkeys([*source.warnings, *whole.warnings])),
        **totals.to_dict(),
    }
    content["pairs"]["looked_at"] = sampler.to_dict()
    return Inspection(content, sampler.tiles())


def evenly_spaced(source: EpisodeSource, count: int | None) -> list[list[int]]:
    """Per shard the episodes to read: all, or `count` of them at even distances over all shards."""
    total = source.num_episodes
    if count is None or count >= total:
        return [list(range(shard.num_episodes)) for shard in source.shards]
    chosen = (np.arange(count) * total + total // 2) // count
    wanted, before = [], 0
    for shard in source.shards:
        inside = chosen[(chosen >= before) & (chosen < before + shard.num_episodes)] - before
        wanted.append(inside.tolist())
        before += shard.num_episodes
    return wanted


def _episodes(
    source: EpisodeSource, whole: EpisodeSource, shard: int, wanted: list[int], totals: EpisodeTotals, on_error: str
) -> Iterator[Episode]:
    """
    Episodes of a shard with all their cameras; with the chosen one alone where others are damaged, as a training command
    reads them.
    """
    if not wanted:
        return
    found, failures = set(), list[ReadError]()
    skipped = None if on_error == "raise" else totals.add_unreadable
    if whole.cameras == source.cameras:
        yield from (episode for _, episode in read_or_skip(source, shard, skipped, wanted))
        return
    for index, episode in whole.read(shard, wanted, failures.append):
        found.add(index)
        yield episode
    missing = [index for index in wanted if index not in found]
    for place, (_, episode) in enumerate(read_or_skip(source, shard, skipped, missing) if missing else ()):
        totals.other_cameras.add("not said which", str(failures[min(place, len(failures) - 1)]))
        yield episode


class PairSampler:
    """
    Decodes pairs of evenly spaced episodes, at even distances in each, and tells what filters make of them.

    Args:
        pairs: The source, with its filters.
        num_pairs: How many in all, at most.
        num_episodes: Episodes that will be offered, unless some cannot be read.
    """

    def __init__(self, pairs: FramePairSource, num_pairs: int, num_episodes: int) -> None:
        self.camera, self.chosen = pairs.chosen_camera, tuple(pairs.filters)
        defaults: list[PairFilter] = [StaticPairs(), ShotCuts(), BlankFrames()]
        names = [item.name for item in self.chosen]
        self.filters = (*self.chosen, *(item for item in defaults if item.name not in names))
        self.num_sampled = min(MAX_SAMPLED_EPISODES, num_episodes, num_pairs)
        self.interval = num_episodes / max(self.num_sampled, 1)
        self.wanted = num_pairs
        self.num_offered, self.num_taken, self.num_pairs, self.num_dropped = 0, 0, 0, 0
        self.dropped: Counter[str] = Counter()
        self._tiles: list[Tile] = []

    def offer(self, episode: Episode, steps: NDArray[np.int64]) -> None:
        """
        Decodes pairs of an episode if its turn has come; one without pairs leaves its turn to the next.

        Raises:
            ReadError: A frame that cannot be decoded.
        """
        due = self.num_taken < self.num_sampled and self.num_offered + 1 > self.num_taken * self.interval
        self.num_offered += 1
        if not due or not len(steps):
            return
        share = (
            self.wanted * (self.num_taken + 1) // self.num_sampled - self.wanted * self.num_taken // self.num_sampled
        )
        self.num_taken += 1
        count = min(share, len(steps))
        places = (np.arange(count) * len(steps) + len(steps) // 2) // count
        for start in range(0, count, PAIRS_AT_ONCE):
            chunk = steps[places[start : start + PAIRS_AT_ONCE]]
            for pair, frames in zip(chunk.tolist(), read_pairs(episode, self.camera, chunk)):
                assert not isinstance(frames, str)
                self._add(episode, pair, frames)

    def _add(self, episode: Episode, steps: list[int], frames: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
        first, second = (FrameSummary(frame) for frame in frames)
        by = [item.name for item in self.filters if item.drops(first, second)]
        self.dropped.update(by)
        self.num_dropped += dropped_by(self.chosen, first, second) is not None
        self.num_pairs += 1
        seconds = seconds_between(episode, steps)
        tile = make_tile(*frames, episode.episode_id, (steps[0], steps[1]), seconds)
        self._tiles.append(replace(tile, notes=tuple(by)))

    def tiles(self) -> tuple[Tile, ...]:
        """All pairs that were decoded, in order."""
        return tuple(self._tiles)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        filters = {
            item.name: {"rule": _rule(item), "chosen": item in self.chosen, "drops": self.dropped[item.name]}
            for item in self.filters
        }
        return {
            "pairs": self.num_pairs,
            "episodes": self.num_taken,
            "sizes": [[*size, count] for size, count in Counter(tile.size for tile in self._tiles).most_common()],
            "filters": filters,
            "dropped_by_chosen_filters": self.num_dropped,
        }


def _rule(item: PairFilter) -> str:
    """A filter with its thresholds."""
    values = ", ".join(f"{entry.name}={getattr(item, entry.name):.3g}" for entry in fields(item))  # type: ignore[arg-type]
    return f"{type(item).__name__}({values})"


__all__ = [
    "InspectOptions",
    "Inspection",
    "PairSampler",
    "Progress",
    "evenly_spaced",
    "inspect_source",
    "no_progress",
]
