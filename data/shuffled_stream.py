"""Endless or single passes over shards that do not fit memory: shuffled, divided over workers, resumed exactly."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lapa.data.episode_source import SkippedEpisodes
from lapa.data.read_counts import ReadCounts
from lapa.data.stream_cursor import StreamCursor, StreamOptions, StreamPart, restore_skipped

STATE_VERSION = 1
ON_ERROR_RULES = ("raise", "skip")
# A run that stopped at something unreadable may go on with another rule.
FREE_OPTIONS = ("on_error", "max_skipped")
# Yielded to a loader after the last example: it brings the final state along, and goes no further.
END = object()


class Failure:
    """Yielded to a loader by a worker that cannot go on: the error, which the main process raises as it is."""

    def __init__(self, error: ValueError) -> None:
        self.error = error


class ShuffledStream(IterableDataset[dict[str, Any]]):
    r"""
    What streams of frame pairs and of labelled steps share.

    **Order.** Each source goes through its shards, and the groups of items in them (episodes, row groups), in an order
    drawn anew for every epoch, before anything is decoded. The items of a group are read a few at a time, in random order,
    into a buffer of `buffer_size` decoded items, and examples are drawn from it at random. Which source gives the next
    item is drawn by weight. All draws depend on the seed and on what has been drawn before, on nothing else.

    **Division.** There are `world_size * max(1, num_workers)` streams, one per loader worker of each rank. A source with
    at least four shards per stream deals whole shards, others deal the groups inside all of their shards; dealing goes
    round from where the epoch before stopped. Within an epoch streams are disjoint, and together complete. With
    `repeat=True` each stream begins a source's next epoch when its own share is through.

    **State.** `state_dict` holds positions, references to the items in the buffer and the state of the generator: no
    examples, and nothing that grows with what has been read. Loading it decodes the items of the buffer again and goes on
    with the very next example. `StreamLoader` keeps the state of what has been consumed while workers run ahead.

    Args:
        parts: The sources.
        options: What the order depends on.
        rank, world_size: Which of how many processes this is; `RANK` and `WORLD_SIZE` of the environment when None.

    Raises:
        ValueError: An argument out of range, two parts of one name.
    """

    # What a subclass calls the options, for errors and descriptions.
    option_names: Mapping[str, str] = {}

    def __init__(
        self,
        parts: Sequence[StreamPart[Any, Any]],
        options: StreamOptions,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        self.parts, self.options = tuple(parts), options
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        self.epoch = 0
        self._check_arguments()
        self._restart()

    def _check_arguments(self) -> None:
        if not self.parts:
            raise ValueError("`sources` must hold at least one source, got none.")
        for name, least in (("seed", 0), ("buffer_size", 1), ("items_per_group", 1)):
            value = getattr(self.options, name)
            if value is not None and value < least:
                raise ValueError(f"`{self.option_names.get(name, name)}` must be at least {least}, got {value}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must lie in [0, {self.world_size - 1}] (`world_size` - 1), got {self.rank}.")
        if self.options.on_error not in ON_ERROR_RULES:
            raise ValueError(f"`on_error` must be one of {', '.join(ON_ERROR_RULES)}, got {self.options.on_error!r}.")
        if not 0 <= self.options.max_skipped <= 1:
            raise ValueError(f"`max_skipped` must lie in [0, 1], got {self.options.max_skipped}.")
        for part in self.parts:
            if not 0 < part.weight < float("inf"):
                raise ValueError(f"`weight` of source {part.name!r} must be above 0 and finite, got {part.weight}.")
            if not part.any_order:
                raise ValueError(
                    f"source {part.name!r} is an archive in parts, which is read from its start to its end: it cannot be "
                    "shuffled. Unpack it (`cat PARTS-?? | tar xz`) and name the folder of its files."
                )
            if not sum(part.group_counts):
                raise ValueError(f"source {part.name!r} is empty: it has no {part.new_counts().group_name}.")
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`sources` must have different names, got {', '.join(map(repr, twice))} twice.")

    def _restart(self) -> None:
        # States of the streams of this rank, where they are known: from a loader, as text, or from `load_state_dict`.
        self._states: dict[int, dict[str, Any] | str] = {}
        self._next_worker = 0
        self._num_workers: int | None = None
        self._cursor: StreamCursor | None = None
        self._cursor_worker = 0
        self._loaded = False
        self._in_loader = False
        self._ended: tuple[dict[str, ReadCounts], dict[str, SkippedEpisodes]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is being read stays where it is: a copy begins as this one did.
        return self.__dict__ | {"_cursor": None}

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        alone = info is None and not self._in_loader
        if alone:
            self.begin(1)
        self._check_num_workers(num_workers)
        self._cursor_worker = (self._next_worker + worker) % num_workers
        try:
            self._cursor = self._open_cursor(num_workers)
            yield from self._cursor
        except ValueError as error:
            # torch would wrap it into its own kind of message, a traceback.
            if info is None:
                raise
            yield Failure(error)
            return
        if self._in_loader:
            yield END
        elif alone:
            self.finish_pass()

    def _open_cursor(self, num_workers: int) -> StreamCursor:
        return StreamCursor(
            self.parts,
            self.options,
            self.rank * num_workers + self._cursor_worker,
            self.world_size * num_workers,
            self._state_of(self._cursor_worker),
            self.epoch,
        )

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first examples of an epoch, drawn from a smaller buffer; what is being read is not disturbed."""
        options = replace(self.options, buffer_size=min(self.options.buffer_size, count))
        cursor = StreamCursor(self.parts, options, self.rank, self.world_size)
        return list(islice(cursor, count))

    def sample(self, count: int) -> list[dict[str, Any]]:
        """
        Examples spread evenly over the groups, the same on every rank; what is being read is not disturbed.

        Args:
            count: Most that are wanted, at least 1. Where there are fewer groups, none gives more than its share of it, so
                that short groups may leave it fewer. Where there are more, one of several neighbours gives an example; the
                others stand in for groups that give none.
        """
        num_groups = sum(sum(part.group_counts) for part in self.parts)
        limit, share = self.options.items_per_group, -(-count // num_groups)
        share = share if limit is None else min(share, limit)
        options = replace(self.options, buffer_size=1, items_per_group=share, repeat=False)
        stride = max(1, -(-num_groups // count))
        examples: list[dict[str, Any]] = []
        for offset in range(stride):
            cursor, before = StreamCursor(self.parts, options, 0, 1), 0
            for reader in cursor.readers:
                chosen = {}
                for shard, number in enumerate(reader.part.group_counts):
                    groups = list(range((offset - before) % stride, number, stride))
                    chosen.update({shard: groups} if groups else {})
                    before += number
                reader.chosen = chosen if stride > 1 else None
            examples += islice(cursor, count - len(examples))
            if len(examples) == count:
                break
        return examples

    def begin(self, num_workers: int, in_loader: bool = False) -> None:
        """A pass starts: from the state that was loaded, or from the start of the epoch."""
        if not self._loaded:
            self._restart()
        self._check_num_workers(num_workers)
        self._num_workers, self._in_loader, self._loaded, self._cursor = num_workers, in_loader, False, None

    def _check_num_workers(self, num_workers: int) -> None:
        if self._num_workers not in (None, num_workers):
            raise ValueError(
                f"`num_workers` of the loader is {num_workers}, the state was made with {self._num_workers} (0 counts as "
                "1): what is left of an epoch cannot be divided anew."
            )

    def record(self, worker: int, state: str | Failure) -> None:
        """A loader hands out a batch of stream `worker` of this rank, after which that stream's state is `state`.

        Raises:
            ValueError: In place of a state there is the failure of a worker.
        """
        if isinstance(state, Failure):
            raise state.error
        self._states[worker] = state
        self._next_worker = (worker + 1) % (self._num_workers or 1)

    def worker_state(self) -> tuple[int, str]:
        """For a loader: which stream of this rank runs in this process, and its state as JSON."""
        assert self._cursor is not None
        return self._cursor_worker, json.dumps(self._cursor.state())

    def finish_pass(self) -> None:
        """
        A pass has ended: the next one is of the next epoch.

        Raises:
            ReadError: Where more was skipped than `max_skipped` allows.
        """
        ended = (self.counts(), self.skipped())
        self._restart()
        self.epoch, self._ended = self.epoch + 1, ended
        for skipped in ended[1].values():
            skipped.check()

    def _state_of(self, local: int) -> dict[str, Any] | None:
        state = self._states.get(local)
        return json.loads(state) if isinstance(state, str) else state

    def _live_states(self) -> dict[int, dict[str, Any]]:
        if self._cursor is not None:
            return {self._cursor_worker: self._cursor.state()}
        return {local: state for local in sorted(self._states) if (state := self._state_of(local)) is not None}

    def state_dict(self) -> dict[str, Any]:
        """
        Where this rank's streams are, JSON-serialisable.

        While a `StreamLoader` runs it is the state after the last batch it handed out; else that after the last example.
        """
        return {
            "version": STATE_VERSION,
            "stream": self.description(),
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": self._num_workers,
            "epoch": self.epoch,
            "next_worker": self._next_worker,
            "workers": {str(local): state for local, state in self._live_states().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Goes on where the state was taken; the next pass begins there.

        Raises:
            ValueError: A state of other sources, another seed, other options or another number of streams.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise ValueError(f"the state has version {state['version']}, this code reads {STATE_VERSION}.")
            self._check_description(state["stream"])
            for name in ("rank", "world_size"):
                if state[name] != getattr(self, name):
                    raise ValueError(f"`{name}` is {getattr(self, name)}, the state was made with {state[name]}.")
            workers = {int(local): dict(entry) for local, entry in state["workers"].items()}
            epoch, next_worker = int(state["epoch"]), int(state["next_worker"])
            num_workers = None if state["num_workers"] is None else int(state["num_workers"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the state of the stream is damaged: {error!r}.") from error
        self._restart()
        self._states, self._num_workers, self._next_worker = dict(workers), num_workers, next_worker
        self.epoch, self._loaded = epoch, True

    def description(self) -> dict[str, Any]:
        """What the stream was made with, JSON-serialisable: a state goes with all of it but `FREE_OPTIONS`."""
        options = {self.option_names.get(name, name): value for name, value in asdict(self.options).items()}
        return options | {"sources": [part.description() for part in self.parts]}

    def _check_description(self, earlier: Mapping[str, Any]) -> None:
        # Through JSON, which makes lists of tuples.
        ours = json.loads(json.dumps(self.description()))
        for name, value in ours.items():
            if name not in ("sources", *FREE_OPTIONS) and value != earlier[name]:
                raise ValueError(f"`{name}` is {value!r}, the state was made with {earlier[name]!r}.")
        if len(ours["sources"]) != len(earlier["sources"]):
            raise ValueError(
                f"`sources` are {len(ours['sources'])}, the state was made with {len(earlier['sources'])}."
            )
        for mine, other in zip(ours["sources"], earlier["sources"]):
            for name, value in mine.items():
                if value != other.get(name):
                    raise ValueError(
                        f"`{name}` of source {mine['name']!r} is {value!r}, the state was made with {other.get(name)!r}."
                    )

    def counts(self) -> dict[str, ReadCounts]:
        """What was read and left out in this pass, or the last if it has ended, per source, over this rank's streams."""
        if self._ended is not None:
            return self._ended[0]
        totals = {part.name: part.new_counts() for part in self.parts}
        for state in self._live_states().values():
            for part, reader in zip(self.parts, state["readers"]):
                totals[part.name] += type(totals[part.name]).from_dict(reader["counts"])
        return totals

    def skipped(self) -> dict[str, SkippedEpisodes]:
        """What could not be read, per source; otherwise as `counts`."""
        if self._ended is not None:
            return self._ended[1]
        totals = {part.name: SkippedEpisodes(self.options.max_skipped) for part in self.parts}
        for state in self._live_states().values():
            for part, reader in zip(self.parts, state["readers"]):
                restore_skipped(totals[part.name], reader["skipped"])
        return totals


__all__ = ["END", "ON_ERROR_RULES", "Failure", "ShuffledStream"]
