"""One stream of examples: the order in which it goes through its share of the sources, and the state it resumes from."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lapa.data.episode_source import OnError, SkippedEpisodes, raise_error
from lapa.data.read_counts import UNREADABLE, ReadCounts
from lapa.data.schema import ReadError

# Whole shards are dealt to streams where there are at least so many for each: shares then differ by a quarter at most.
SHARDS_PER_STREAM = 4
# Items of a group that are read together.
ITEMS_PER_READ = 64
# Groups in a row without any item after which a source counts as empty, unless it has more.
MIN_EMPTY_GROUPS = 100
# Messages of what could not be read that a state carries; the rest is only counted.
MAX_REASONS = 20
EARLIER_REASONS = "(other reasons, before this run was resumed)"
# What a random draw is for: draws of different kinds must not be alike.
SHARD_ORDER, GROUP_ORDER, ITEM_ORDER, EXAMPLE_ORDER = range(4)

Group = TypeVar("Group")
Item = TypeVar("Item")
# Part, epoch, shard, group, and what says which item of the group.
Reference = tuple[int, ...]


class StreamPart(ABC, Generic[Group, Item]):
    """
    One source as a stream sees it: shards of groups of items.

    Attributes:
        name (`str`): Unique among the parts.
        weight (`float`): How often it gives the next item, relative to the others.
        group_counts (`tuple[int, ...]`): Groups of each shard.
        any_order (`bool`): Whether `open` keeps to the order of `groups`, which a stream needs.
    """

    name: str
    weight: float
    group_counts: tuple[int, ...]
    any_order: bool = True

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What its order and its items depend on, JSON-serialisable; `name` is among it."""

    @abstractmethod
    def new_counts(self) -> ReadCounts:
        """Counts at zero."""

    @abstractmethod
    def open(self, shard: int, groups: Sequence[int], on_error: OnError) -> Iterator[tuple[int, Group]]:
        """Yields index and group, in the order of `groups`, without those that `on_error` was called for."""

    @abstractmethod
    def items(self, group: Group, counts: ReadCounts) -> NDArray[np.int64]:
        """(num_items, width): what says which item, for all items of a group. Counts the group."""

    @abstractmethod
    def read(self, group: Group, items: NDArray[np.int64]) -> list[Item | str]:
        """Items, or the reasons why they are left out."""

    def count(self, item: Item, counts: ReadCounts) -> None:
        """Counts an item that was read."""
        counts.items += 1

    @abstractmethod
    def example(self, item: Item, reference: Reference) -> dict[str, Any]:
        """What the stream yields."""


@dataclass(frozen=True)
class StreamOptions:
    """Arguments of `ShuffledStream` that its order depends on."""

    seed: int
    buffer_size: int
    items_per_group: int | None
    repeat: bool
    on_error: str
    max_skipped: float


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def skipped_state(skipped: SkippedEpisodes) -> dict[str, Any]:
    """What a state carries of what was skipped."""
    reasons = dict(list(skipped.reasons.items())[:MAX_REASONS])
    return {"num_seen": skipped.num_seen, "num_skipped": skipped.num_skipped, "reasons": reasons}


def restore_skipped(skipped: SkippedEpisodes, state: dict[str, Any]) -> None:
    """Adds what `skipped_state` gave."""
    skipped.num_seen += int(state["num_seen"])
    skipped.reasons.update({str(reason): int(count) for reason, count in state["reasons"].items()})
    earlier = int(state["num_skipped"]) - sum(state["reasons"].values())
    if earlier:
        skipped.reasons[EARLIER_REASONS] += earlier


class PartReader(Generic[Group, Item]):
    """
    Goes through one stream's share of one part; between two items its state tells where it is.

    Args:
        part: What is read.
        number: Position of the part in the mixture.
        stream, num_streams: Which share.
        options: Of the stream.
        state: From `state()`; None starts at `epoch`.
        epoch: Where a fresh reader starts.
    """

    def __init__(
        self,
        part: StreamPart[Group, Item],
        number: int,
        stream: int,
        num_streams: int,
        options: StreamOptions,
        state: dict[str, Any] | None,
        epoch: int,
    ) -> None:
        self.part, self.number, self.options = part, number, options
        self.stream, self.num_streams = stream, num_streams
        self.skipped = SkippedEpisodes(options.max_skipped)
        self.counts = part.new_counts()
        # Positions in the order of the epoch: of shard, of group in the shard's share, of item in the group's order.
        self.epoch, self.shard, self.group, self.item = epoch, 0, 0, 0
        self.exhausted = False
        # Groups of each shard that are read, where it is only some of them.
        self.chosen: Mapping[int, list[int]] | None = None
        self.deals_shards = len(part.group_counts) >= SHARDS_PER_STREAM * num_streams
        if state is not None:
            self.epoch, self.shard, self.group, self.item = (int(value) for value in state["position"])
            self.exhausted = bool(state["exhausted"])
            self.counts = type(self.counts).from_dict(state["counts"])
            restore_skipped(self.skipped, state["skipped"])

    def state(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "position": [self.epoch, self.shard, self.group, self.item],
            "exhausted": self.exhausted,
            "counts": self.counts.to_dict(),
            "skipped": skipped_state(self.skipped),
        }

    def __iter__(self) -> Iterator[tuple[Reference, Item]]:
        """Items with their references, epoch after epoch where the stream repeats."""
        self._groups_at_item = self.counts.groups
        while not self.exhausted:
            shards = self._shards()
            while self.shard < len(shards):
                shard, dealt = shards[self.shard]
                yield from self._shard_items(shard, self._groups(shard, dealt))
                self.shard, self.group, self.item = self.shard + 1, 0, 0
            if self.options.repeat:
                self.epoch, self.shard = self.epoch + 1, 0
            else:
                self.exhausted = True

    def _shard_items(self, shard: int, groups: list[int]) -> Iterator[tuple[Reference, Item]]:
        """What is left of a shard from `self.group` on."""
        if self.group >= len(groups):
            return
        places = {group: place for place, group in enumerate(groups)}
        errors: list[ReadError] = []
        self._last_error: ReadError | None = None
        for index, group in self.part.open(shard, groups[self.group :], self._collector(errors)):
            self._pass_over(places[index], errors)
            yield from self._items(shard, index, group)
            self.group, self.item = self.group + 1, 0
            self._check_gives_items()
        self._pass_over(len(groups), errors)
        self._check_gives_items()

    def _collector(self, errors: list[ReadError]) -> OnError:
        """What a source calls for groups that it cannot open: an error may stand for many of them."""
        return raise_error if self.options.on_error == "raise" else errors.append

    def _pass_over(self, place: int, errors: list[ReadError]) -> None:
        """Counts the groups between the one at hand and that at `place`, which were asked for and did not come."""
        if place == self.group:
            return
        missing, self.group, self.item = place - self.group, place, 0
        self.counts.groups += missing
        if not errors and self._last_error is None:
            name = self.counts.group_name
            error = ReadError(
                f"source {self.part.name!r} was asked for {missing} {name}, and gave none and no reason."
            )
            self._collector(errors)(error)
        for error in errors[: missing - 1]:
            self._unreadable(error)
        # What makes many of them unreadable is said once in a shard.
        missing -= len(errors[: missing - 1])
        self._last_error = errors[-1] if errors else self._last_error
        assert self._last_error is not None
        self._unreadable(self._last_error, missing)
        errors.clear()

    def _check_gives_items(self) -> None:
        empty = self.counts.groups - self._groups_at_item
        if self.options.repeat and empty >= max(MIN_EMPTY_GROUPS, sum(self.part.group_counts)):
            raise ValueError(
                f"source {self.part.name!r} gives nothing: the last {empty} {self.counts.group_name} had no "
                f"{self.counts.item_name} to read ({self._reasons()})."
            )

    def _reasons(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.counts.metrics().items())

    def _items(self, shard: int, index: int, group: Group) -> Iterator[tuple[Reference, Item]]:
        """What is left of a group from `self.item` on; a group that cannot be read is skipped from there."""
        fresh = self.item == 0
        # A group that was begun before is counted already.
        counts = self.counts if fresh else self.part.new_counts()
        if fresh:
            self.skipped.seen()
        try:
            items = self.part.items(group, counts)
            for chunk in self._item_order(len(items), shard, index):
                wanted = items[chunk.items[self.item - chunk.start :]]
                for reference, item in zip(wanted.tolist(), self.part.read(group, wanted) if len(wanted) else ()):
                    self.item += 1
                    if isinstance(item, str):
                        self.counts.dropped_items[item] += 1
                        continue
                    self.part.count(item, self.counts)
                    self._groups_at_item = self.counts.groups
                    yield (self.number, self.epoch, shard, index, *reference), item
        except ReadError as error:
            if self.options.on_error == "raise":
                raise
            # It counts itself as seen, which the group was already.
            self.skipped.num_seen -= 1
            self._unreadable(error)

    def _unreadable(self, error: ReadError, count: int = 1) -> None:
        self.counts.skipped_groups[UNREADABLE] += count
        self.skipped(error, count)

    def _shards(self) -> list[tuple[int, int]]:
        """This stream's shards in this epoch's order, each with how many groups were dealt before it."""
        counts = self.part.group_counts
        order = _generator(self.options.seed, SHARD_ORDER, self.number, self.epoch).permutation(len(counts)).tolist()
        # Dealing goes on where the last epoch stopped, so that what does not divide evenly falls to each in turn.
        if self.deals_shards:
            dealt = self.epoch * len(order)
            return [
                (shard, 0) for place, shard in enumerate(order) if (dealt + place) % self.num_streams == self.stream
            ]
        dealt, shards = self.epoch * sum(counts), []
        for shard in order:
            shards.append((shard, dealt))
            dealt += counts[shard]
        return shards

    def _groups(self, shard: int, dealt: int) -> list[int]:
        """This stream's groups of a shard in this epoch's order; those of `chosen` in theirs."""
        if self.chosen is not None:
            return self.chosen.get(shard, [])
        generator = _generator(self.options.seed, GROUP_ORDER, self.number, self.epoch, shard)
        order: list[int] = generator.permutation(self.part.group_counts[shard]).tolist()
        if self.deals_shards:
            return order
        return order[(self.stream - dealt) % self.num_streams :: self.num_streams]

    def _item_order(self, count: int, shard: int, group: int) -> "list[_Chunk]":
        """
        Items of a group in this epoch's order: neighbours are read together, chunks and items inside them come shuffled.
        """
        generator = _generator(self.options.seed, ITEM_ORDER, self.number, self.epoch, shard, group)
        limit = self.options.items_per_group
        chosen = np.arange(count)
        if limit is not None and limit < count:
            chosen = np.sort(generator.choice(count, limit, replace=False))
        pieces = [chosen[start : start + ITEMS_PER_READ] for start in range(0, len(chosen), ITEMS_PER_READ)]
        chunks, start = [], 0
        for piece in generator.permutation(len(pieces)):
            chunks.append(_Chunk(start, generator.permutation(pieces[piece])))
            start += len(pieces[piece])
        return chunks


@dataclass(frozen=True)
class _Chunk:
    """Items of a group that are read together, and how many come before them."""

    start: int
    items: NDArray[np.int64]


class StreamCursor:
    """
    Draws examples from a buffer that the parts fill.

    Args:
        parts: The sources.
        options: Of the stream.
        stream, num_streams: Which share of the sources.
        state: From `state()`; None starts.
        epoch: Where a fresh cursor starts.

    Raises:
        ValueError: A damaged state.
        ReadError: An item of the buffer of `state` that can no longer be read.
    """

    def __init__(
        self,
        parts: Sequence[StreamPart[Any, Any]],
        options: StreamOptions,
        stream: int,
        num_streams: int,
        state: dict[str, Any] | None = None,
        epoch: int = 0,
    ) -> None:
        self.parts, self.options = parts, options
        self.generator = _generator(options.seed, EXAMPLE_ORDER, stream, epoch)
        self.buffer: list[tuple[Reference, Any]] = []
        self.num_yielded = 0
        try:
            states = [None] * len(parts) if state is None else state["readers"]
            self.readers = [
                PartReader(part, number, stream, num_streams, options, entry, epoch)
                for number, (part, entry) in enumerate(zip(parts, states, strict=True))
            ]
            if state is not None:
                self.generator.bit_generator.state = state["generator"]
                self.num_yielded = int(state["num_yielded"])
                self.buffer = self._refill([tuple(int(i) for i in reference) for reference in state["buffer"]])
        except ReadError:
            raise
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"the state of the stream is damaged: {error!r}.") from error

    def state(self) -> dict[str, Any]:
        """JSON-serialisable; valid between two examples."""
        return {
            "num_yielded": self.num_yielded,
            "generator": self.generator.bit_generator.state,
            "readers": [reader.state() for reader in self.readers],
            "buffer": [list(reference) for reference, _ in self.buffer],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iterators = [iter(reader) for reader in self.readers]
        while True:
            while len(self.buffer) < self.options.buffer_size:
                part = self._choose()
                if part is None:
                    break
                item = next(iterators[part], None)
                if item is not None:
                    self.buffer.append(item)
            if not self.buffer:
                return
            # The drawn item changes places with the last: what is taken out leaves no hole.
            drawn = int(self.generator.integers(len(self.buffer)))
            self.buffer[drawn], self.buffer[-1] = self.buffer[-1], self.buffer[drawn]
            reference, item = self.buffer.pop()
            self.num_yielded += 1
            yield self.parts[reference[0]].example(item, reference)

    def _choose(self) -> int | None:
        """Which part gives the next item, by weight among those that have any left."""
        left = [number for number, reader in enumerate(self.readers) if not reader.exhausted]
        if not left:
            return None
        if len(left) == 1:
            return left[0]
        limits = list(accumulate(self.parts[number].weight for number in left))
        # `random` is below 1, so that the product, rounded, may reach the last limit but nothing beyond it.
        return left[bisect_right(limits, self.generator.random() * limits[-1], hi=len(limits) - 1)]

    def _refill(self, references: list[Reference]) -> list[tuple[Reference, Any]]:
        """Reads the items of the buffer again, group by group."""
        by_shard: defaultdict[tuple[int, int], defaultdict[int, list[int]]]
        by_shard = defaultdict(lambda: defaultdict(list))
        for place, reference in enumerate(references):
            by_shard[reference[0], reference[2]][reference[3]].append(place)
        items: dict[int, Any] = {}
        for (number, shard), places in by_shard.items():
            part = self.parts[number]
            for index, group in part.open(shard, sorted(places), raise_error):
                wanted = np.array([references[place][4:] for place in places[index]], dtype=np.int64)
                for place, item in zip(places[index], part.read(group, wanted)):
                    if isinstance(item, str):
                        raise ReadError(
                            f"source {part.name!r} has changed: an item of the buffer is now left out ({item})."
                        )
                    items[place] = item
        return [(reference, items[place]) for place, reference in enumerate(references)]


__all__ = [
    "PartReader",
    "Reference",
    "StreamCursor",
    "StreamOptions",
    "StreamPart",
    "restore_skipped",
    "skipped_state",
]
