"""Frame pairs and actions of three sources in one file: what `quantizer_collapse.py` trains and judges on.

    python benchmarks/quantizer_collapse.py --prepare pairs.npz --bridge bridge_rlds/1.0.0

Recording needs the simulator and the readers; the file is read with numpy alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = ("tabletop", "human", "bridge")
EPISODES = {"reach": 700, "separate": 150, "relative_move": 150}
EXPERT_NOISE = 0.15
TABLETOP_SIZE, BRIDGE_SIZE = 32, 64  # pixels
TABLETOP_GAP = 4  # frames: 0.4 s
# Frames: 0.2 to 1 s. The shard is so small that a decoder could learn by heart what follows a first frame; several second
# frames for each leave that to the codes.
BRIDGE_GAPS = (1, 2, 3, 4, 5)
FIRST_SEED = {"tabletop": 300_000_000, "human": 310_000_000}
FIELDS = ("frames", "first", "second", "episode", "target")


@dataclass(frozen=True)
class Pairs:
    """
    Frame pairs of a source.

    Args:
        frames: (num_frames, height, width, 3) uint8.
        first, second: (num_pairs,) int64, indices of frames.
        episode: (num_pairs,) int64.
        target: (num_pairs, target_dim) float32, what happened between the frames. `tabletop`: the sum of the actions, in
            the action's units; `human`, which has no actions: how far the hand moved, in metres of the board; `bridge`:
            the sum of the first six action dimensions and the last gripper command. No training sees it.
    """

    frames: np.ndarray
    first: np.ndarray
    second: np.ndarray
    episode: np.ndarray
    target: np.ndarray

    def take(self, rows: np.ndarray) -> "Pairs":
        """Some of the pairs; the frames stay."""
        return Pairs(self.frames, self.first[rows], self.second[rows], self.episode[rows], self.target[rows])

    def held_out(self, share: float = 0.2) -> np.ndarray:
        """Mask (num_pairs,) of the pairs of the last episodes, which are not trained on."""
        episodes = np.unique(self.episode)
        return np.isin(self.episode, episodes[len(episodes) - round(share * len(episodes)) :])


def load_pairs(path: Path, source: str) -> Pairs:
    """Reads what `prepare` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Pairs(**{name: arrays[f"{source}.{name}"] for name in FIELDS})


def _pairs_of(lengths: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """First frame and episode of every pair of episodes that lie end to end."""
    starts = np.cumsum(lengths) - lengths
    firsts = [start + np.arange(max(length - gap, 0)) for start, length in zip(starts, lengths)]
    return np.concatenate(firsts), np.repeat(np.arange(len(lengths)), [len(first) for first in firsts])


def _tabletop(source: str) -> Pairs:
    from lapa.evaluation.demo_settings import DemoSettings
    from lapa.evaluation.demo_stages import make_environment
    from lapa.evaluation.environments.tabletop_recording import record_episode

    environment = make_environment(DemoSettings(), "arm" if source == "tabletop" else "human_video")
    families = [family for family, count in EPISODES.items() for _ in range(count)]
    # Mixed, so that the held-out last episodes are of every family.
    families = [families[i] for i in np.random.default_rng(0).permutation(len(families))]
    episodes = [
        record_episode(environment, None, FIRST_SEED[source] + i, noise=EXPERT_NOISE, family=family)
        for i, family in enumerate(families)
    ]
    frames = np.concatenate([episode.frames for episode in episodes])
    first, episode = _pairs_of(np.array([len(e.frames) for e in episodes]), TABLETOP_GAP)
    if source == "tabletop":
        # Cumulative sums, zero at the first frame of an episode: a difference is the sum in between.
        done = np.concatenate([np.cumsum(np.vstack([[[0.0, 0.0]], e.actions]), axis=0) for e in episodes])
    else:
        done = np.concatenate([e.effector_positions for e in episodes])
    target = done[first + TABLETOP_GAP] - done[first]
    return Pairs(frames, first, first + TABLETOP_GAP, episode, target.astype(np.float32))


def _bridge(folder: str) -> Pairs:
    from lapa.data.frame_pairs import resize_frame
    from lapa.data.open_source import open_source

    camera = open_source(folder).cameras[0]
    # Actions as they are recorded.
    source = open_source(folder, cameras=[camera], action_transform=None)
    episodes = [episode for episode in source if camera in episode.frames and episode.action is not None]
    frames = np.stack(
        [
            resize_frame(episode.frame(camera, step), (BRIDGE_SIZE, BRIDGE_SIZE))
            for episode in episodes
            for step in range(episode.num_steps)
        ]
    )
    lengths = np.array([e.num_steps for e in episodes])
    parts = [_pairs_of(lengths, gap) for gap in BRIDGE_GAPS]
    first, episode = (np.concatenate(columns) for columns in zip(*parts))
    second = first + np.repeat(BRIDGE_GAPS, [len(part[0]) for part in parts])
    actions = np.concatenate([e.action for e in episodes if e.action is not None])
    moved = np.stack([actions[start:end, :6].sum(0) for start, end in zip(first, second)])
    target = np.concatenate([moved, actions[second - 1, 6:7]], axis=1)
    return Pairs(frames, first, second, episode, target.astype(np.float32))


def prepare(path: Path, bridge: str) -> None:
    """Records the tabletop and its human variant, reads the Bridge folder, and writes them all to `path`."""
    arrays: dict[str, Any] = {}
    for source in SOURCES:
        pairs = _bridge(bridge) if source == "bridge" else _tabletop(source)
        print(
            f"{source}: {len(pairs.first)} pairs of {len(np.unique(pairs.episode))} episodes, "
            f"{pairs.frames.shape[1]} x {pairs.frames.shape[2]} pixels, {pairs.target.shape[1]} targets"
        )
        arrays |= {f"{source}.{name}": getattr(pairs, name) for name in FIELDS}
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
