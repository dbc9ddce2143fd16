"""Pairs of frames that a report on a quantizer is measured on: drawn by a rule, bounded, kept outside memory."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lapa.data.episode_range import EpisodeRange
from lapa.data.episode_source import OnError, raise_error
from lapa.data.frame_pairs import open_pairs, read_pairs
from lapa.data.mixture import FramePairSource
from lapa.data.read_counts import PairCounts
from lapa.data.schema import Episode

# Episodes that the pairs are spread over where a source has so many: intervals are over episodes.
SPREAD_EPISODES = 200
# With fewer episodes, intervals and cross-validation go over stretches of the episodes instead.
MIN_GROUPS = 10
STRETCHES = 20
# Actions a pair is labelled with: the mean over the pair, or the change of the action or of the proprioception.
TARGETS = ("action", "action_change", "proprio_change")


@dataclass
class SampledSource:
    """
    What was drawn from one source.

    Args:
        name (`str`): Of the data set and camera.
        embodiment (`str`): Robot or person; the source's name where it does not say.
        num_episodes (`int`): Episodes that gave pairs.
        available_episodes (`int`): Episodes that the source has.
        frame_gap (`str`): In words.
        counts (`PairCounts`): What was kept and left out, and why.
    """

    name: str
    embodiment: str
    num_episodes: int
    available_episodes: int
    frame_gap: str
    counts: PairCounts


@dataclass
class PairSample:
    """
    Pairs of frames with what is known about them, source after source, in the order of the episodes.

    Args:
        frames (`NDArray`): (num_pairs, 2, height, width, 3) uint8, in a file.
        source (`NDArray`): (num_pairs,) index into `sources`.
        group (`NDArray`): (num_pairs,) episode, or stretch of one where `grouping` says so.
        episode (`NDArray`): (num_pairs,) episode.
        steps (`NDArray`): (num_pairs, 2) first and second step in its episode.
        target (`NDArray`): (num_pairs, target_dim) float64, NaN where a pair has no action or another source's are
            longer; width 0 without any.
        gripper_change (`NDArray`): (num_pairs,) float64 change of the gripper's command over the pair; NaN where unknown.
        target_names (`tuple[str, ...]`): Of the dimensions.
        sources (`list[SampledSource]`): Where the pairs come from.
        grouping (`str`): `"episodes"` or `"stretches of episodes"`.
    """

    frames: np.ndarray
    source: np.ndarray
    group: np.ndarray
    episode: np.ndarray
    steps: np.ndarray
    target: np.ndarray
    gripper_change: np.ndarray
    target_names: tuple[str, ...]
    sources: list[SampledSource]
    grouping: str
    _file: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def labelled(self) -> np.ndarray:
        """(num_pairs,) whether every dimension of the target is known."""
        if not self.target.shape[1]:
            return np.zeros(len(self), dtype=bool)
        return np.isfinite(self.target).all(axis=1)


@dataclass
class _Drawn:
    """One episode's pairs while they are collected."""

    steps: np.ndarray
    target: np.ndarray | None
    names: tuple[str, ...] | None
    gripper_change: np.ndarray


def pair_target(episode: Episode, steps: np.ndarray, target: str) -> np.ndarray | None:
    """
    What happened between the frames of pairs.

    The action of step t leads from frame t to frame t + 1, so a pair (t, t + gap) shows the actions of t to t + gap - 1.

    Args:
        episode: Of the pairs.
        steps: (num_pairs, 2).
        target: `action`: mean of the pair's actions. `action_change`, `proprio_change`: value at the second step minus
            that at the first, for actions that are positions rather than motions.

    Returns:
        (num_pairs, target_dim) float64; None where the episode does not have it.
    """
    recorded = episode.proprio if target == "proprio_change" else episode.action
    if recorded is None:
        return None
    values = np.asarray(recorded, dtype=np.float64).reshape(len(recorded), -1)
    first, second = steps[:, 0], steps[:, 1]
    if target != "action":
        return np.asarray(values[second] - values[first])
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    return np.asarray((sums[second] - sums[first]) / (second - first)[:, None])


def gripper_changes(episode: Episode, steps: np.ndarray) -> np.ndarray:
    """Change of the gripper's command (num_pairs,) from before a pair to its last action; NaN without a gripper."""
    names = episode.action_names or ()
    if episode.action is None or "gripper" not in names:
        return np.full(len(steps), np.nan)
    command = np.asarray(episode.action[:, names.index("gripper")], dtype=np.float64)
    return np.asarray(command[steps[:, 1] - 1] - command[np.maximum(steps[:, 0] - 1, 0)])


def _episodes_in_order(
    source: FramePairSource, generator: np.random.Generator, on_error: OnError
) -> Iterator[tuple[int, Episode]]:
    """All episodes once, in a drawn order, with the number of each."""
    shards = source.source.shards
    places = [(shard, index) for shard, part in enumerate(shards) for index in range(part.num_episodes)]
    for number in generator.permutation(len(places)).tolist():
        shard, index = places[number]
        for _, episode in source.source.read(shard, [index], on_error):
            yield number, episode


def _draw_steps(steps: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    if len(steps) <= count:
        return steps
    return np.asarray(steps[np.sort(generator.permutation(len(steps))[:count])])


class _Collector:
    """Fills the file of frames and the columns beside it."""

    def __init__(self, max_pairs: int, size: tuple[int, int], target: str, on_error: OnError) -> None:
        # Open as long as the sample lives; it has no name, so nothing is left behind whatever happens.
        self.file = tempfile.TemporaryFile(prefix="lapa-report-")  # noqa: SIM115
        self.frames = np.memmap(self.file, dtype=np.uint8, mode="w+", shape=(max_pairs, 2, *size, 3))
        self.size, self.target, self.on_error = size, target, on_error
        self.num_pairs = self.num_episodes = 0
        self.columns: dict[str, list[np.ndarray]] = {"source": [], "episode": [], "steps": []}
        self.drawn: list[_Drawn] = []
        self.sources: list[SampledSource] = []

    def add_source(self, source: FramePairSource, quota: int, seed: int) -> None:
        """Draws up to `quota` pairs."""
        generator, counts = np.random.default_rng((seed, len(self.sources))), PairCounts()
        available = source.source.num_episodes
        per_episode = max(1, -(-quota // min(max(available, 1), SPREAD_EPISODES)))
        start, episodes, embodiment = self.num_pairs, 0, source.source.embodiment
        for _, episode in _episodes_in_order(source, generator, self.on_error):
            left = quota - (self.num_pairs - start)
            if not left:
                break
            steps = open_pairs(episode, source.chosen_camera, source.gap, counts)
            kept = self._add_episode(episode, source, _draw_steps(steps, min(per_episode, left), generator), counts)
            episodes += bool(kept)
            embodiment = embodiment or episode.embodiment
        gap = source.gap
        self.sources.append(
            SampledSource(
                source.name,
                embodiment or source.name,
                episodes,
                available,
                f"{gap.frames} frames" if gap.frames is not None else f"{gap.seconds:g} s",
                counts,
            )
        )

    def _add_episode(self, episode: Episode, source: FramePairSource, steps: np.ndarray, counts: PairCounts) -> int:
        if not len(steps):
            return 0
        chunks = [steps[start : start + 64] for start in range(0, len(steps), 64)]
        kept: list[np.ndarray] = []
        for chunk in chunks:
            pairs = read_pairs(episode, source.chosen_camera, chunk, self.size, source.filters)
            for pair_steps, pair in zip(chunk, pairs):
                if isinstance(pair, str):
                    counts.dropped_items[pair] += 1
                    continue
                self.frames[self.num_pairs + len(kept)] = np.stack(pair)
                counts.items += 1
                kept.append(pair_steps)
        if not kept:
            return 0
        chosen = np.stack(kept)
        self.columns["source"].append(np.full(len(kept), len(self.sources)))
        self.columns["episode"].append(np.full(len(kept), self.num_episodes))
        self.columns["steps"].append(chosen)
        names = episode.action_names if self.target != "proprio_change" else None
        self.drawn.append(
            _Drawn(chosen, pair_target(episode, chosen, self.target), names, gripper_changes(episode, chosen))
        )
        self.num_pairs += len(kept)
        self.num_episodes += 1
        return len(kept)

    def finish(self) -> PairSample:
        """The sample."""
        if not self.num_pairs:
            raise ValueError(
                "`data` gives no pair of frames: "
                + "; ".join(f"{item.name}: {item.counts.metrics()}" for item in self.sources)
            )
        source, episode, steps = (np.concatenate(self.columns[name]) for name in ("source", "episode", "steps"))
        target, names = self._targets()
        group, grouping = group_pairs(episode, steps)
        change = np.concatenate([item.gripper_change for item in self.drawn])
        frames = self.frames[: self.num_pairs]
        return PairSample(
            frames, source, group, episode, steps, target, change, names, self.sources, grouping, self.file
        )

    def _targets(self) -> tuple[np.ndarray, tuple[str, ...]]:
        width = max((item.target.shape[1] for item in self.drawn if item.target is not None), default=0)
        target = np.full((self.num_pairs, width), np.nan)
        start, names = 0, None
        for item in self.drawn:
            if item.target is not None and item.target.shape[1] == width:
                target[start : start + len(item.steps)] = item.target
                names = names or item.names
            start += len(item.steps)
        return target, names or tuple(f"dim {index}" for index in range(width))


def group_pairs(episode: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, str]:
    """
    What is resampled as a whole, and how it is called.

    Args:
        episode: (num_pairs,) episode of each pair.
        steps: (num_pairs, 2).

    Returns:
        (num_pairs,) index: the episode, or where there are fewer than `MIN_GROUPS`, one of `STRETCHES` equal stretches of
        pairs that follow each other.
    """
    if len(np.unique(episode)) >= MIN_GROUPS:
        return episode, "episodes"
    order = np.lexsort((steps[:, 0], episode))
    group = np.empty(len(episode), dtype=np.int64)
    group[order] = np.arange(len(episode)) * min(STRETCHES, len(episode)) // len(episode)
    return group, "stretches of episodes"


def sample_pairs(
    sources: Sequence[FramePairSource],
    image_size: tuple[int, int],
    max_pairs: int,
    seed: int = 0,
    target: str = "action",
    last_episodes: int | None = None,
    on_error: OnError = raise_error,
) -> PairSample:
    """
    Draws pairs of all sources, the same ones for the same arguments.

    Every source gives an equal share, spread over its episodes. Frames lie in a temporary file, which goes when the
    sample does.

    Args:
        sources: What is read.
        image_size: (height, width) that frames are resized to.
        max_pairs: At most, over all sources.
        seed: Of the draw.
        target: One of `TARGETS`.
        last_episodes: Only so many of the last episodes of each source.
        on_error: Called with what cannot be read.

    Raises:
        ValueError: No pair at all, or an argument out of range.
    """
    if max_pairs < 2 * len(sources):
        raise ValueError(f"`max_pairs` must be at least 2 per source ({len(sources)}), got {max_pairs}.")
    if target not in TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(TARGETS)}, got {target!r}.")
    collector = _Collector(max_pairs, image_size, target, on_error)
    for source in sources:
        if last_episodes is not None:
            total = source.source.num_episodes
            if not 1 <= last_episodes <= total:
                raise ValueError(
                    f"`last_episodes` must lie in [1, {total}] for {source.source.name}, got {last_episodes}."
                )
            part = EpisodeRange(source.source, total - last_episodes)
            source = FramePairSource(
                part, source.weight, source.camera, source.frame_gap, source.frame_gap_seconds, source.filters
            )
        collector.add_source(source, max_pairs // len(sources), seed)
    return collector.finish()
