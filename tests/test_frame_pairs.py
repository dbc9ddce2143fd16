"""Which pairs of frames an episode has, how they are decoded, and what leaves them out."""

import json

import numpy as np
import pytest
from memory_source import MarkedFrames
from shared_files import shared_path

from lapa.data.frame_pairs import (
    PAIRS_PER_READ,
    FrameGap,
    episode_frame_pairs,
    episode_pairs,
    read_pairs,
    timed_pairs,
)
from lapa.data.pair_filters import BlankFrames, FrameSummary, ShotCuts, StaticPairs, check_filters, dropped_by
from lapa.data.read_counts import GapHistogram, PairCounts
from lapa.data.rlds import RldsSource
from lapa.data.schema import Episode, FrameSequence, ReadError


def clip(num_steps, timestamps=None, frames=None, name="clip"):
    frames = MarkedFrames(0, 0, num_steps, 4) if frames is None else frames
    return Episode(name, "test", {"camera": frames}, num_steps, timestamps=timestamps)


@pytest.mark.parametrize("frequency", [1.0, 3.0, 5.0, 10.0, 12.0, 15.0, 24.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("seconds", [0.1, 0.5, 0.6, 1.0, 2.4])
def test_seconds_at_a_constant_rate_are_a_rounded_number_of_frames(frequency, seconds):
    gap = int(np.floor(frequency * seconds + 0.5))
    for num_frames in (1, 2, 7, 100):
        pairs, missing = timed_pairs(np.arange(num_frames) / frequency, seconds)
        if gap == 0:
            # A frame is no pair with itself, and a longer gap is not what was asked for.
            assert len(pairs) == 0
        else:
            assert pairs.tolist() == episode_pairs(num_frames, gap).tolist() and missing == 0
        assert pairs.dtype == np.int64


def test_times_rounded_to_milliseconds_give_the_same_pairs():
    """As Matroska stores them; 0.6 and 2.4 s at the rates that video has."""
    for frequency in (5, 10, 12, 15, 24, 25, 29.97, 30, 60):
        for seconds in (0.6, 2.4):
            exact = np.arange(300) / frequency
            assert timed_pairs(np.round(exact, 3), seconds)[0].tolist() == timed_pairs(exact, seconds)[0].tolist()


def test_variable_rate_by_hand():
    #        0    1    2    3    4    5    6
    times = [0.0, 0.1, 0.2, 0.3, 2.0, 2.1, 2.2]
    pairs, missing = timed_pairs(times, 0.2)
    # 0.3 and 0.4 s lie in or after the hole: frame 3 ends 0.05 s after 0.3.
    assert pairs.tolist() == [[0, 2], [1, 3], [4, 6]]
    # Frames 2 and 3 have no partner though the clip goes on; 5 and 6 have left it.
    assert missing == 2
    # A hole does not widen what is near: 1.9 s from 0.0 is 0.1 s off, more than half of 0.1 s.
    assert timed_pairs(times, 1.9)[0].tolist() == [[1, 4], [2, 5], [3, 6]]
    # Dropped frames at 10 Hz: the partner must be there.
    assert timed_pairs([0.0, 0.1, 0.2, 0.4, 0.5], 0.3)[0].tolist() == [[1, 3], [2, 4]]


def test_no_partner_lies_further_than_half_an_interval():
    generator = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(generator.choice([0.02, 0.05, 0.1, 0.9], 40))
        gap = float(generator.uniform(0.01, 1.5))
        pairs, missing = timed_pairs(times, gap)
        first, second = pairs.T
        intervals = np.diff(times)
        local = np.minimum(np.append(np.inf, intervals), np.append(intervals, np.inf))
        assert (np.abs(times[second] - times[first] - gap) <= local[second] / 2 + 1e-3 + 1e-9).all()
        assert (second > first).all() and (np.diff(first) > 0).all()
        # Every step is paired, without a partner, or its gap ends after the last frame.
        outside = set(np.flatnonzero(times + gap > times[-1])) - set(first.tolist())
        assert len(pairs) + missing + len(outside) == len(times)
        # Where a frame is given up, none lies near enough.
        for step in set(range(len(times))) - set(first.tolist()) - outside:
            error = np.abs(times - times[step] - gap)
            best = int(error.argmin())
            assert best <= step or error[best] > local[best] / 2 + 1e-3 - 1e-9


def test_gap_options():
    assert FrameGap(frames=2).pairs(clip(4)).steps.tolist() == [[0, 2], [1, 3]]
    assert FrameGap(seconds=0.4).pairs(clip(4, np.arange(4) / 5)).steps.tolist() == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="give its `frequency`, or a `frame_gap` in frames") as caught:
        FrameGap(seconds=0.4).pairs(clip(4))
    # No reader may skip it: nothing is wrong with the episode.
    assert not isinstance(caught.value, ReadError)
    for options in ({}, {"frames": 1, "seconds": 0.5}):
        with pytest.raises(ValueError, match="exactly one of `frame_gap`"):
            FrameGap(**options)
    with pytest.raises(ValueError, match="`frame_gap` must be at least 1 frame, got 0"):
        FrameGap(frames=0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`frame_gap_seconds` must be above 0"):
            FrameGap(seconds=seconds)
    for times in ([0.0, 0.2, 0.1], [0.0, float("nan"), 0.4]):
        with pytest.raises(ValueError, match="must not decrease"):
            timed_pairs(times, 0.1)
        with pytest.raises(ReadError, match="episode 'clip' of test: `timestamps` must be finite"):
            FrameGap(seconds=0.1).pairs(clip(3, np.array(times)))


class CountedFrames(FrameSequence):
    """Remembers what was decoded at a time."""

    def __init__(self, frames):
        self.frames, self.reads = frames, []

    def __len__(self):
        return len(self.frames)

    def read(self, steps):
        self.reads.append(list(steps))
        return [self.frames[step] for step in steps]


def test_every_frame_is_decoded_once_per_read():
    frames = CountedFrames(MarkedFrames(0, 0, 200, 4)[:])
    pairs = list(episode_frame_pairs(clip(200, frames=frames), "camera", FrameGap(frames=3)))
    assert [pair.steps for pair in pairs] == [(step, step + 3) for step in range(197)]
    assert all(np.array_equal(pair.frames[1], frames.frames[pair.steps[1]]) for pair in pairs)
    assert len(frames.reads) == -(-197 // PAIRS_PER_READ)
    assert all(len(set(steps)) == len(steps) <= PAIRS_PER_READ + 3 for steps in frames.reads)


def test_pairs_are_resized_and_share_frames():
    first, second = read_pairs(clip(5), "camera", np.array([[0, 2], [2, 4]]), size=(6, 8))
    assert first[1] is second[0] and first[0].shape == (6, 8, 3)
    uneven = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)]
    with pytest.raises(ReadError, match="frames 0 and 1 of camera 'camera' of episode 'clip' of test differ in size"):
        read_pairs(clip(2, frames=uneven), "camera", np.array([[0, 1]]))


def colour(value, size=(48, 64)):
    return np.full((*size, 3), value, np.uint8)


def textured(seed, low=0, high=256):
    """Noise that survives averaging: blocks as large as a pixel of the thumbnail."""
    noise = np.random.default_rng(seed).integers(low, high, (32, 32, 3), dtype=np.uint8)
    return noise.repeat(3, 0).repeat(4, 1)


def test_static_pairs():
    first, second = FrameSummary(colour(100)), FrameSummary(colour(110))
    assert StaticPairs(10 / 255 + 1e-6).drops(first, second) and not StaticPairs(10 / 255 - 1e-6).drops(first, second)
    assert StaticPairs().drops(first, first)
    # One level in every channel is the threshold, codec noise that averages out is nothing.
    assert not StaticPairs().drops(FrameSummary(colour(100)), FrameSummary(colour(101)))
    noisy = colour(100, (320, 320)).astype(int) + np.random.default_rng(0).choice([-3, 3], (320, 320, 3))
    assert StaticPairs().drops(FrameSummary(colour(100, (320, 320))), FrameSummary(noisy.astype(np.uint8)))


def test_shot_cuts():
    half = colour(10)
    half[:24] = 250
    # Half of the pixels are of another colour.
    dark, mixed = FrameSummary(colour(10)), FrameSummary(half)
    assert ShotCuts(0.49).drops(dark, mixed) and not ShotCuts(0.5).drops(dark, mixed)
    assert ShotCuts().drops(FrameSummary(textured(0, 0, 100)), FrameSummary(textured(0, 150, 256)))
    # The same colours elsewhere are a motion.
    assert not ShotCuts(0.0).drops(FrameSummary(textured(1)), FrameSummary(textured(1)[::-1].copy()))


def test_blank_frames():
    spot = colour(0)
    spot[:3, :4] = (0, 8, 0)
    blank, lit, scene = FrameSummary(colour(37)), FrameSummary(spot), FrameSummary(textured(0))
    assert BlankFrames().drops(blank, scene) and BlankFrames().drops(scene, blank)
    assert lit.spread == pytest.approx(8 / 255) and not BlankFrames(8 / 255 - 1e-6).drops(lit, scene)
    assert BlankFrames(8 / 255 + 1e-6).drops(lit, scene)


def test_filters_are_named_and_checked():
    filters = [BlankFrames(), StaticPairs(), ShotCuts()]
    frame = FrameSummary(textured(0))
    assert dropped_by(filters, frame, frame) == "static" and dropped_by([ShotCuts()], frame, frame) is None
    assert check_filters(filters) == tuple(filters) and StaticPairs(0.1) != StaticPairs(0.2)
    with pytest.raises(ValueError, match="`filters` must have different names, got static, static"):
        check_filters([StaticPairs(), StaticPairs(0.5)])
    with pytest.raises(ValueError, match="`filters` must hold PairFilter objects, got 'static'"):
        check_filters(["static"])
    for bad in (lambda: StaticPairs(-0.1), lambda: ShotCuts(1.5), lambda: BlankFrames(float("nan"))):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            bad()


def test_counts():
    frames = np.stack([textured(0), textured(0), textured(1), colour(5, (96, 128)), textured(2), textured(2)])
    counts, filters = PairCounts(), [BlankFrames(), StaticPairs()]
    gap = FrameGap(frames=1)
    kept = list(episode_frame_pairs(clip(6, frames=frames), "camera", gap, filters=filters, counts=counts))
    assert [pair.steps for pair in kept] == [(1, 2)]
    assert list(episode_frame_pairs(clip(1), "camera", gap, counts=counts)) == []
    assert list(episode_frame_pairs(clip(6), "other camera", gap, counts=counts)) == []
    timed = clip(4, np.array([0.0, 0.2, 1.0, 1.2]))
    steps = [pair.steps for pair in episode_frame_pairs(timed, "camera", FrameGap(seconds=0.2), counts=counts)]
    assert steps == [(0, 1), (2, 3)]
    assert counts.metrics() == {
        "pairs": 3, "episodes": 4, "dropped_pairs/blank": 2, "dropped_pairs/no_frame_at_gap": 1,
        "dropped_pairs/static": 2, "skipped_episodes/blank_camera": 1, "skipped_episodes/too_short": 1,
        "gap_seconds_mean": pytest.approx(0.2),
    }  # fmt: skip
    assert counts.gaps == GapHistogram({1: 3}, {20: 2})
    both = counts + PairCounts.from_dict(json.loads(json.dumps(counts.to_dict())))
    assert both.items == 6 and both.gaps.frames == {1: 6} and both.dropped_items["static"] == 4
    assert both.to_dict() == (counts + counts).to_dict()


def test_real_episodes():
    """The Bridge shard: 10 steps at 5 Hz, so 0.6 s are 3 frames, and every pair shows some motion."""
    counts = PairCounts()
    for episode in RldsSource(str(shared_path("data/bridge_rlds/1.0.0")), frequency=5.0, cameras=["image_0"]):
        pairs = episode_frame_pairs(
            episode,
            "image_0",
            FrameGap(seconds=0.6),
            filters=[BlankFrames(), StaticPairs(), ShotCuts()],
            counts=counts,
        )
        assert [pair.steps for pair in pairs] == [(step, step + 3) for step in range(7)]
    assert counts.items == 175 and counts.gaps.seconds == {60: 175}
    assert not counts.dropped_items and not counts.skipped_groups
