"""
What it costs to go on after many frame pairs: from the saved state, and by reading all of them again.

    python benchmarks/stream_resume.py [--pairs 1000000] [--batch-size 64] [--workers 0] [--buffer 1024] [--rounds 5]
    python benchmarks/stream_resume.py --data bridge_rlds/1.0.0 --pairs 20000 --image-size 256

The pairs are really consumed, through a `StreamLoader`, before the state is taken; the time that takes is what a replay
costs. Resuming is timed from a new stream to its first batch: the state file is read and checked, the workers start, and the
items of the buffers are decoded again. That it is the right batch is checked against the run that went on. Without
`--data` the pairs are of small frames in memory, so that the replay is as cheap as it can be.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.frame_pairs import FramePairCollator
from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.data.open_source import open_pair_source
from lapa.data.schema import Episode
from lapa.data.stream_loader import StreamLoader

NUM_SHARDS, EPISODES_PER_SHARD, NUM_STEPS = 64, 128, 40


class SmallFrames(EpisodeSource):
    """Episodes of frames of 8 x 8 pixels in memory, each of one colour that tells which it is."""

    name = "small frames"
    cameras = ("camera",)

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return tuple(SourceShard(f"shard-{number:03d}", EPISODES_PER_SHARD) for number in range(NUM_SHARDS))

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for number in self.wanted(shard, episodes):
            frames = np.empty((NUM_STEPS, 8, 8, 3), dtype=np.uint8)
            frames[..., 0], frames[..., 1] = shard, number
            frames[..., 2] = np.arange(NUM_STEPS)[:, None, None]
            yield number, Episode(f"{shard}/{number}", self.name, {"camera": frames}, NUM_STEPS)


def make_stream(args: argparse.Namespace) -> FramePairStream:
    source = FramePairSource(SmallFrames(), frame_gap=3) if args.data is None else open_pair_source(args.data)
    return FramePairStream([source], args.image_size, buffer_size=args.buffer)


def batches(stream: FramePairStream, args: argparse.Namespace) -> Iterator[Any]:
    loader = StreamLoader(stream, args.batch_size, FramePairCollator(), num_workers=args.workers)
    return iter(loader)


def resume(path: Path, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """Seconds from nothing to the first batch, and that batch."""
    start = time.perf_counter()
    stream = make_stream(args)
    stream.load_state_dict(json.loads(path.read_text()))
    batch = next(batches(stream, args))["pixel_values"]
    return time.perf_counter() - start, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--buffer", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="A data set instead of small frames in memory.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stream, num_batches = make_stream(args), -(-args.pairs // args.batch_size)
    start = time.perf_counter()
    running = batches(stream, args)
    for _ in range(num_batches):
        next(running)
    replay = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        path.write_text(json.dumps(stream.state_dict()))
        size = path.stat().st_size
        expected = next(running)["pixel_values"]
        seconds = []
        for _ in range(args.rounds):
            elapsed, batch = resume(path, args)
            assert torch.equal(batch, expected), "the resumed run saw another batch"
            seconds.append(elapsed)
    middle, worst = statistics.median(seconds), max(seconds)
    print(
        f"{num_batches * args.batch_size} pairs, {args.workers} workers, buffers of {args.buffer}, state {size / 1e3:.0f} kB"
    )
    print("| way | seconds to the next batch | pairs read |\n|---|---|---|")
    print(f"| from the state | {middle:.2f} (median of {args.rounds}, worst {worst:.2f}) | the buffers' |")
    print(f"| reading them again | {replay:.1f} ({num_batches * args.batch_size / replay:.0f} pairs/s) | all |")
    print(f"factor {replay / middle:.0f}")


if __name__ == "__main__":
    main()
