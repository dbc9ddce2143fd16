"""Pairs per second that one reader process of `lapa label` prepares, by format: what a GPU has to be fed with.

    taskset --cpu-list 0 python benchmarks/label_reader.py --video VIDEO [--clips 20] [--rounds 5]

Every pair of every clip, as labelling reads it: decoded, resized to 256 px for the quantizer, and stored as a 256-px JPEG. Clips
are cut from a video: VP9 of four seconds at 12 frames per second and 240 lines as Something-Something v2 has them, H.264 of the same, and
the same frames as 256-px JPEG in memory, as RLDS shards hold them (those are stored as they are).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.folders import VideoFolderSource
from lapa.data.label_manifest import LabelUnit
from lapa.data.mixture import FramePairSource
from lapa.data.schema import Episode
from lapa.training.label_reader import ReaderOptions, UnitReader

FRAMES, RATE, LINES, GAP_SECONDS, SIZE = 48, 12, 240, 2.4, 256
ENCODERS = {"vp9": ("libvpx-vp9", "webm", {"cpu-used": "4", "crf": "31", "b": "0"}), "h264": ("libx264", "mp4", {})}


class JpegSource(EpisodeSource):
    """Clips of JPEG frames in memory."""

    name, frame_gap_seconds = "jpeg", GAP_SECONDS

    def __init__(self, clips: Sequence[Sequence[bytes]]) -> None:
        self.clips = clips

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return (SourceShard("memory", len(self.clips)),)

    @property
    def cameras(self) -> tuple[str, ...]:
        return ("image",)

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for index in self.wanted(shard, episodes):
            frames = {"image": EncodedFrames(self.clips[index], "image")}
            times = np.arange(FRAMES) / RATE
            yield index, Episode(str(index), self.name, frames, FRAMES, ("push",), timestamps=times)


def cut(video: str, clips: int) -> list[list[Image.Image]]:
    """Clips of frames, `LINES` high."""
    frames = []
    with av.open(video) as container:
        for frame in container.decode(video=0):
            width = round(frame.width * LINES / frame.height / 2) * 2
            frames.append(frame.to_image().resize((width, LINES)))
    starts = np.linspace(0, len(frames) - FRAMES, clips).astype(int)
    return [frames[start : start + FRAMES] for start in starts]


def write_clips(folder: Path, clips: list[list[Image.Image]], codec: str) -> None:
    """One video file a clip."""
    encoder, ending, options = ENCODERS[codec]
    folder.mkdir()
    for number, clip in enumerate(clips):
        with av.open(str(folder / f"{number:03d}.{ending}"), "w") as container:
            stream = container.add_stream(encoder, rate=Fraction(RATE), options=options)
            stream.width, stream.height, stream.pix_fmt = *clip[0].size, "yuv420p"
            for image in clip:
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode(None))


def jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.resize((SIZE, SIZE)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def read_all(source: EpisodeSource, stored_as_is: bool) -> int:
    """Number of pairs, once everything of them is ready for the quantizer and the writer."""
    options = ReaderOptions((SIZE, SIZE), 64, image_size=None if stored_as_is else SIZE, action=False)
    unit = LabelUnit(0, 0, 0, 0, source.num_episodes)
    return sum(len(batch.pairs) for batch in UnitReader(FramePairSource(source), unit, options).batches())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    clips = cut(args.video, args.clips)
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, EpisodeSource] = {
            "jpeg, 256 px": JpegSource([[jpeg(image) for image in clip] for clip in clips])
        }
        for codec in ENCODERS:
            write_clips(Path(folder) / codec, clips, codec)
            sources[f"{codec}, {LINES} lines"] = VideoFolderSource(
                str(Path(folder) / codec), frame_gap_seconds=GAP_SECONDS
            )
        print("| format | pairs | pairs/s (median) |\n|---|---|---|")
        for name, source in sources.items():
            rates, pairs = [], 0
            for _ in range(args.rounds):
                start = time.perf_counter()
                pairs = read_all(source, name.startswith("jpeg"))
                rates.append(pairs / (time.perf_counter() - start))
            print(f"| {name} | {pairs} | {statistics.median(rates):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
