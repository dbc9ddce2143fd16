"""
Properties of streams of pairs over drawn sources, gaps, rates, divisions and kill points.

Workers are simulated in this process (`SimulatedLoader`), a few cases run real ones. The `slow` tests draw many more.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_source import MarkedFrames, MemorySource, pair_key
from stream_cases import Case, RedFrames, SourceCase, cases

from lapa.data.frame_pairs import timed_pairs
from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.data.pair_filters import FrameSummary
from lapa.data.stream_cursor import PartReader
from lapa.data.stream_loader import StreamLoader

Pair = tuple[str, str, tuple[int, int]]
FEW, MANY = 50, 1000


@pytest.fixture(scope="module", autouse=True)
def _no_log_of_what_is_skipped() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def drawn(count: int) -> settings:
    """The same examples in every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass
class Expected:
    """What a source holds, worked out without any stream."""

    kept: Counter[Pair]
    dropped: Counter[str]
    skipped: Counter[str]
    episodes: int


def expected(case: SourceCase, name: str) -> Expected:
    """Goes through all episodes and pairs one by one."""
    pairs = case.open(name)
    result = Expected(Counter(), Counter(), Counter(), sum(map(len, case.lengths)))
    for shard, part in enumerate(case.lengths):
        for number, length in enumerate(part):
            if not length:
                result.skipped["unreadable"] += 1
                continue
            episode = pairs.source._episode(shard, number, length)
            if (shard, number) in case.blank:
                result.skipped["blank_camera"] += 1
                continue
            found = pairs.gap.pairs(episode)
            result.dropped["no_frame_at_gap"] += found.num_without_frame
            if not len(found.steps):
                result.skipped["too_short"] += not found.num_without_frame
                continue
            if (shard, number) in case.broken and length // 2 in found.steps:
                # Fewer than 64 pairs are read together: one frame that cannot be decoded takes all of them along.
                result.skipped["unreadable"] += 1
                continue
            for first, second in found.steps.tolist():
                summary = FrameSummary(MarkedFrames(shard, number, length, 4).read([first])[0])
                if case.is_filtered and RedFrames().drops(summary, summary):
                    result.dropped["red"] += 1
                else:
                    result.kept[name, f"{shard}/{number}", (first, second)] += 1
    result.dropped, result.skipped = +result.dropped, +result.skipped
    return result


def check_content(example: dict[str, Any]) -> None:
    """Frames are those of the steps, to the bit."""
    shard, number = map(int, example["episode_id"].split("/"))
    frames = MarkedFrames(shard, number, 256, 4).read(example["steps"])
    np.testing.assert_array_equal(example["frames"].permute(0, 2, 3, 1).numpy(), np.stack(frames))


def digest(example: dict[str, Any]) -> tuple[Any, ...]:
    """All of an example, comparable."""
    return *pair_key(example), example["camera"], example["seconds"], example["frames"].numpy().tobytes()


def check_an_epoch_is_complete(case: Case) -> None:
    """Every pair once over all streams of all ranks, and every episode and pair in the counts."""
    seen: Counter[Pair] = Counter()
    streams = [case.stream(rank) for rank in range(case.world_size)]
    for stream in streams:
        for batch in case.loader(stream):
            for example in batch:
                check_content(example)
                seen[pair_key(example)] += 1
    assert set(seen.values()) <= {1}
    for number, source in enumerate(case.sources):
        name = f"source{number}"
        wanted = expected(source, name)
        counts = [stream.counts()[name] for stream in streams]
        total = counts[0]
        for other in counts[1:]:
            total = total + other
        here = {pair for pair in seen if pair[0] == name}
        assert total.items == len(here) and total.groups == wanted.episodes
        assert sum(stream.skipped()[name].num_skipped for stream in streams) == total.skipped_groups["unreadable"]
        assert total.gaps.frames == Counter(second - first for _, _, (first, second) in here)
        if case.pairs_per_episode is None:
            assert here == set(wanted.kept)
            assert +total.dropped_items == wanted.dropped and +total.skipped_groups == wanted.skipped
            continue
        # Of each episode as many as were asked for, before the filters; a frame that cannot be decoded may not be drawn.
        assert max(Counter(pair[1] for pair in here).values(), default=0) <= case.pairs_per_episode
        if not source.broken:
            assert here <= set(wanted.kept)
        if not source.broken and not source.is_filtered:
            per_episode = Counter(pair[1] for pair in wanted.kept)
            limited = {episode: min(count, case.pairs_per_episode) for episode, count in per_episode.items()}
            assert Counter(pair[1] for pair in here) == limited


@drawn(FEW)
@given(cases())
def test_an_epoch_is_disjoint_and_complete_and_counted(case):
    check_an_epoch_is_complete(case)


@pytest.mark.slow
@drawn(MANY)
@given(cases())
def test_an_epoch_is_disjoint_and_complete_and_counted_slow(case):
    check_an_epoch_is_complete(case)


def interrupted(case: Case, rank: int, repeat: bool, count: int) -> tuple[list[list[Any]], FramePairStream]:
    """The first batches of a run that is killed at the drawn points: each time all is made anew, but for its state."""
    batches: list[list[Any]] = []
    stream = case.stream(rank, repeat)
    for kill in (*case.kills, None):
        left = count - len(batches)
        batches += [
            list(map(digest, batch))
            for batch in islice(case.loader(stream), left if kill is None else min(kill, left))
        ]
        if kill is not None:
            state = json.loads(json.dumps(stream.state_dict(), allow_nan=False))
            stream = case.stream(rank, repeat)
            stream.load_state_dict(state)
    return batches, stream


def has_pairs(case: Case) -> bool:
    """Whether every stream of a repeating mixture has something to read, which otherwise raises."""
    return all(len(expected(source, "").kept) for source in case.sources)


def check_resume_is_exact(case: Case) -> None:
    """An endless run: the same batches in the same order, and the same counts, wherever it is killed and resumed."""
    count = 20 if has_pairs(case) else 0
    for rank in range(case.world_size):
        try:
            stream = case.stream(rank, repeat=True)
            whole = [list(map(digest, batch)) for batch in islice(case.loader(stream), count)]
        except ValueError as error:
            # A stream whose share holds no pair at all says so.
            assert "gives nothing" in str(error)
            continue
        parts, resumed = interrupted(case, rank, True, count)
        assert parts == whole
        assert resumed.state_dict() == stream.state_dict()


@drawn(FEW)
@given(cases())
def test_an_endless_run_is_resumed_exactly(case):
    check_resume_is_exact(case)


@pytest.mark.slow
@drawn(MANY)
@given(cases())
def test_an_endless_run_is_resumed_exactly_slow(case):
    check_resume_is_exact(case)


def check_passes_are_resumed(case: Case) -> None:
    """Two passes: the second in another order but with the same pairs; a kill in the second resumes there."""
    stream = case.stream()
    first = [digest(example) for batch in case.loader(stream) for example in batch]
    second = [list(map(digest, batch)) for batch in case.loader(stream)]
    # The shares of ranks go round from epoch to epoch.
    if case.pairs_per_episode is None and case.world_size == 1:
        assert Counter(first) == Counter(example for batch in second for example in batch)
    resumed = case.stream()
    for _ in case.loader(resumed):
        pass
    again: list[list[Any]] = []
    for kill in (*case.kills, None):
        loader = iter(case.loader(resumed))
        before = resumed.epoch
        again += [list(map(digest, batch)) for batch in (loader if kill is None else islice(loader, kill))]
        loader.close()
        if resumed.epoch != before:
            break
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = case.stream()
        resumed.load_state_dict(state)
    # Once a stream of a pass has ended, which comes next is the loader's choice.
    assert (again == second) if case.num_workers < 2 else (sorted(again) == sorted(second))
    assert resumed.epoch == stream.epoch == 2
    assert {n: c.to_dict() for n, c in resumed.counts().items()} == {
        n: c.to_dict() for n, c in stream.counts().items()
    }


@drawn(FEW)
@given(cases())
def test_passes_are_resumed(case):
    check_passes_are_resumed(case)


@pytest.mark.slow
@drawn(MANY)
@given(cases())
def test_passes_are_resumed_slow(case):
    check_passes_are_resumed(case)


def check_epochs(case: Case) -> None:
    """Of an endless run, per epoch and source: streams disjoint, and together complete."""
    num_streams, num_epochs = case.world_size * max(1, case.num_workers), 3
    part_of = case.stream(repeat=True)
    for number, part in enumerate(part_of.parts):
        wanted = expected(case.sources[number], part.name).kept
        seen = [Counter() for _ in range(num_epochs)]
        groups = [Counter() for _ in range(num_epochs)]
        for stream in range(num_streams):
            reader = PartReader(part, number, stream, num_streams, part_of.options, None, 0)
            try:
                for (_, epoch, shard, group, *steps), _ in reader:
                    if epoch >= num_epochs:
                        break
                    seen[epoch][part.name, f"{shard}/{group}", tuple(steps)] += 1
                    groups[epoch][shard, group] += 1
            except ValueError as error:
                assert "gives nothing" in str(error)
        for epoch in range(num_epochs):
            assert set(seen[epoch].values()) <= {1}
            if case.pairs_per_episode is None:
                assert set(seen[epoch]) == set(wanted)
            else:
                assert max(groups[epoch].values(), default=0) <= case.pairs_per_episode


@drawn(FEW)
@given(cases())
def test_streams_of_an_epoch_are_disjoint_and_complete(case):
    check_epochs(case)


@pytest.mark.slow
@drawn(MANY)
@given(cases())
def test_streams_of_an_epoch_are_disjoint_and_complete_slow(case):
    check_epochs(case)


@st.composite
def variable_times(draw: st.DrawFn) -> tuple[list[int], Fraction]:
    """Milliseconds of frames, and a gap in milliseconds that makes no two distances equal."""
    intervals = draw(st.lists(st.sampled_from([3, 16, 33, 34, 40, 100, 1500]), max_size=40))
    times = np.cumsum([0, *intervals]).tolist()
    return times, draw(st.integers(1, 3000)) + Fraction(13, 100)


def check_timed_pairs(times: list[int], gap: Fraction) -> None:
    """Against the rule of `timed_pairs`, frame by frame in whole numbers."""
    pairs, missing = timed_pairs(np.array(times) / 1000, float(gap) / 1000)
    wanted, without = [], 0
    for first, time in enumerate(times if len(times) > 1 else []):
        end = time + gap
        second = min(range(len(times)), key=lambda step: abs(times[step] - end))
        beside = [abs(times[second] - times[step]) for step in (second - 1, second + 1) if 0 <= step < len(times)]
        near = second > first and abs(times[second] - end) <= Fraction(min(beside), 2) + 1
        if near and end < times[-1] + Fraction(times[-1] - times[-2], 2):
            wanted.append([first, second])
        else:
            without += end <= times[-1]
    assert pairs.tolist() == wanted and missing == without


@drawn(300)
@given(variable_times())
def test_pairs_by_time_follow_the_rule(drawn_times):
    check_timed_pairs(*drawn_times)


@pytest.mark.slow
@drawn(10 * MANY)
@given(variable_times())
def test_pairs_by_time_follow_the_rule_slow(drawn_times):
    check_timed_pairs(*drawn_times)


REAL = Case(
    (
        SourceCase(((9, 4, 0, 7), (8, 8), (5,)), True, None, 0.1, 1.0, True, ((0, 0),), ()),
        SourceCase(tuple((6, 7) for _ in range(17)), False, 2, None, 3.0, False, (), ((3, 1),)),
    ),
    seed=5,
    buffer_size=9,
    pairs_per_episode=None,
    world_size=2,
    num_workers=2,
    batch_size=4,
    ahead=2,
    kills=(3, 6),
)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_real_workers_give_what_simulated_ones_give(rank):
    """Processes of torch's loader, killed and resumed, against the simulation: endless, and a single pass."""

    def loader(stream: FramePairStream) -> StreamLoader:
        return StreamLoader(stream, REAL.batch_size, num_workers=REAL.num_workers)

    whole, _ = interrupted(replace(REAL, kills=()), rank, True, 20)
    assert whole == interrupted(REAL, rank, True, 20)[0]
    with mock.patch.object(Case, "loader", lambda case, stream: loader(stream)):
        assert whole == interrupted(REAL, rank, True, 20)[0]
        real = [pair_key(example) for batch in loader(REAL.stream(rank)) for example in batch]
    simulated = [pair_key(example) for batch in REAL.loader(REAL.stream(rank)) for example in batch]
    assert Counter(real) == Counter(simulated) and len(real) > 50


def test_a_sample_goes_through_all_of_the_sources():
    """Of more groups than examples every so-manieth; its neighbours stand in where it gives nothing."""
    sources = [
        FramePairSource(MemorySource("even", [[4] * 10] * 6), frame_gap=1),
        FramePairSource(MemorySource("odd", [[4] * 20]), weight=0.001, frame_gap=1),
    ]
    sample = FramePairStream(sources, pairs_per_episode=2).sample(16)
    taken = {example["episode_id"] for example in sample if example["source"] == "even"}
    assert taken == {f"{shard}/{episode}" for shard in range(6) for episode in (0, 5)}
    taken = [example["episode_id"] for example in sample if example["source"] == "odd"]
    assert sorted(taken) == ["0/0", "0/10", "0/15", "0/5"]
    short = FramePairSource(MemorySource("short", [[1, 1, 4, 4, 4], [1, 4, 4, 1, 4]]), frame_gap=1)
    for count, expected in ((2, {"0/2"}), (6, {"0/2", "0/3", "0/4", "1/1", "1/2", "1/4"})):
        sample = FramePairStream([short]).sample(count)
        assert len(sample) == count and expected <= {example["episode_id"] for example in sample}
    assert len(FramePairStream([short]).sample(12)) == 12


def test_the_properties_see_what_is_wrong():
    """A stream that deals an episode twice, and a resume that loses its place, are caught."""
    case = replace(REAL, num_workers=0, world_size=1)
    with mock.patch.object(PartReader, "_groups", lambda self, shard, dealt: [0] * self.part.group_counts[shard]):
        with pytest.raises((AssertionError, ValueError)):
            check_an_epoch_is_complete(case)

    def forgetful(self: FramePairStream) -> dict[str, Any]:
        state = original(self)
        for worker in state["workers"].values():
            worker["buffer"] = worker["buffer"][::-1]
        return state

    original = FramePairStream.state_dict
    with mock.patch.object(FramePairStream, "state_dict", forgetful), pytest.raises(AssertionError):
        check_resume_is_exact(case)
