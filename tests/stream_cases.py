"""Drawn sources and mixtures, and a loader whose workers are simulated in this process."""

import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from memory_source import MemorySource

from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.data.pair_filters import FrameSummary, PairFilter
from lapa.data.schema import Episode
from lapa.data.shuffled_stream import END
from lapa.data.stream_loader import StreamLoader, _CollateWithState


@dataclass(frozen=True)
class RedFrames(PairFilter):
    """Drops pairs whose first frame happens to be reddish: about half of the noise."""

    name = "red"

    def drops(self, first: FrameSummary, second: FrameSummary) -> bool:
        red, green, _ = first.thumbnail.mean((0, 1))
        return bool(red > green)


class VariableRateSource(MemorySource):
    """Episodes whose frames are some of 20, 50, 100 and 300 ms apart; two in an episode never at the same time."""

    def _episode(self, shard: int, number: int, length: int) -> Episode:
        episode = super()._episode(shard, number, length)
        intervals = np.random.default_rng((shard, number, length)).choice([0.02, 0.05, 0.1, 0.3], length)
        return replace(episode, timestamps=np.cumsum(intervals) - intervals[0])


@dataclass(frozen=True)
class SourceCase:
    """What one source is drawn to be; lengths of 0 are episodes that cannot be read."""

    lengths: tuple[tuple[int, ...], ...]
    variable_rate: bool
    frame_gap: int | None
    frame_gap_seconds: float | None
    weight: float
    is_filtered: bool
    blank: tuple[tuple[int, int], ...]
    broken: tuple[tuple[int, int], ...]

    def open(self, name: str) -> FramePairSource:
        """The source, made anew."""
        kind = VariableRateSource if self.variable_rate else MemorySource
        broken = {place: (self.lengths[place[0]][place[1]] // 2,) for place in self.broken}
        source = kind(name, self.lengths, frequency=10.0, blank=self.blank, broken=broken)
        filters = (RedFrames(),) if self.is_filtered else ()
        return FramePairSource(source, self.weight, None, self.frame_gap, self.frame_gap_seconds, filters)


@dataclass(frozen=True)
class Case:
    """A mixture and how it is read."""

    sources: tuple[SourceCase, ...]
    seed: int
    buffer_size: int
    pairs_per_episode: int | None
    world_size: int
    num_workers: int
    batch_size: int
    ahead: int
    kills: tuple[int, ...]

    def stream(self, rank: int = 0, repeat: bool = False) -> FramePairStream:
        """The stream of a rank, made anew."""
        return FramePairStream(
            [source.open(f"source{number}") for number, source in enumerate(self.sources)],
            seed=self.seed,
            buffer_size=self.buffer_size,
            pairs_per_episode=self.pairs_per_episode,
            repeat=repeat,
            on_error="skip",
            max_skipped=1.0,
            rank=rank,
            world_size=self.world_size,
        )

    def loader(self, stream: FramePairStream) -> "SimulatedLoader":
        """Over a stream, with this case's workers."""
        return SimulatedLoader(stream, self.batch_size, self.num_workers, self.ahead)


@st.composite
def source_cases(draw: st.DrawFn, least_length: int = 0) -> SourceCase:
    """Most sources have few shards, some enough that whole shards are dealt."""
    num_shards = draw(st.one_of(st.integers(1, 4), st.integers(1, 24)))
    shard = st.lists(st.integers(least_length, 9), min_size=0, max_size=4 if num_shards < 8 else 2).map(tuple)
    lengths = draw(st.lists(shard, min_size=num_shards, max_size=num_shards).filter(any).map(tuple))
    places = [(shard, number) for shard, part in enumerate(lengths) for number, length in enumerate(part) if length]
    some = st.lists(st.sampled_from(places), max_size=3, unique=True).map(tuple) if places else st.just(())
    in_seconds = draw(st.booleans())
    return SourceCase(
        lengths,
        draw(st.booleans()),
        None if in_seconds else draw(st.integers(1, 10)),
        draw(st.sampled_from([0.05, 0.1, 0.25, 0.6, 2.4])) if in_seconds else None,
        draw(st.sampled_from([0.01, 1.0, 1.0, 7.5])),
        draw(st.booleans()),
        draw(some),
        draw(some),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        tuple(draw(st.lists(source_cases(), min_size=1, max_size=3))),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from([1, 2, 7, 40])),
        draw(st.sampled_from([None, None, 1, 3])),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([1, 2, 5])),
        draw(st.integers(1, 3)),
        tuple(draw(st.lists(st.integers(0, 12), max_size=3))),
    )


class SimulatedLoader(StreamLoader):
    """
    A `StreamLoader` whose workers are copies of the stream in this process. They run ahead of what is handed out by as
    many batches as torch's would, and what they have made is lost when the loader is dropped.
    """

    def __init__(self, stream: FramePairStream, batch_size: int, num_workers: int, ahead: int) -> None:
        super().__init__(stream, batch_size)
        self.simulated_workers, self.ahead = num_workers, ahead

    def __iter__(self) -> Iterator[Any]:
        if not self.simulated_workers:
            yield from super().__iter__()
            return
        stream = self.dataset
        stream.begin(self.simulated_workers, in_loader=True)
        workers = deque(self._worker(pickle.dumps(stream), number) for number in range(self.simulated_workers))
        queues = deque(deque(islice(worker, self.ahead)) for worker in workers)
        while workers:
            worker, queue = workers.popleft(), queues.popleft()
            if queue:
                batch, local, state = queue.popleft()
                queue.extend(islice(worker, 1))
                workers.append(worker)
                queues.append(queue)
                stream.record(local, state)
                if batch is not None:
                    yield batch
        stream.finish_pass()

    def _worker(self, copy: bytes, number: int) -> Iterator[tuple[Any, int, str]]:
        """Batches of one worker, each step of which thinks itself in a process of its own."""
        stream = pickle.loads(copy)
        info = SimpleNamespace(id=number, num_workers=self.simulated_workers, dataset=stream)
        collate, examples = _CollateWithState(stream, None), iter(stream)
        while True:
            with (
                mock.patch("lapa.data.shuffled_stream.get_worker_info", lambda: info),
                mock.patch("lapa.data.stream_loader.get_worker_info", lambda: info),
            ):
                batch = list(islice(examples, self.batch_size))
                if not batch:
                    return
                made = collate(batch)
            yield made
            if batch[-1] is END:
                return
