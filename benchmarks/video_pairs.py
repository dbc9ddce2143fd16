"""
Frame pairs per second from videos, sparse ones out of each clip, against decoding whole clips with PyAV.

    taskset --cpu-list 0 python benchmarks/video_pairs.py [--video VIDEO] [--heights 240 480] [--pairs 4] [--clips 8] [--rounds 5]

Clips of ten seconds (30 Hz) are encoded from a video that is named, or from a drawn scene with sensor noise, by each
encoder with its default distance of keyframes, and with short ones as LeRobot writes (every second frame). Two ways of
decoding whole clips stand beside `VideoFrames`: as one would write it, turning each frame into an array, and at its best:
one thread, the wanted frames alone turned into arrays, by one converter. PyAV's default spreads over all cores what
`VideoFrames` does on one: for rates per core run it under `taskset --cpu-list 0`.

`least_decoding` is no reader but a bound: it decodes, from the last keyframe before each wanted frame to that frame, what a
decoder that leaves nothing out must decode, and makes no picture of it. Nothing that gives exact frames of VP9, where every
frame is needed by the next, can be faster; readers of H.264 and AV1 can, as these have frames that others do not need.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from timing import alternate, print_table

from lapa.data.video import VideoFrames
from lapa.data.video_index import VideoIndex

FRAME_RATE, SECONDS, GAP_SECONDS = 30, 10, 2.4
# Of the clips, made before any timing: a bound has no need to find out what there is.
INDICES: dict[Path, VideoIndex] = {}
# Name, encoder, container and options. Where no `g` is given the encoder's own default holds: 250 frames for x264 and
# x265, some five seconds for SVT-AV1, 128 for libvpx.
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", {}),
    "hevc": ("libx265", "mp4", {"preset": "fast", "x265-params": "log-level=none"}),
    "av1": ("libsvtav1", "mp4", {"preset": "8"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "good", "cpu-used": "4", "crf": "31", "b": "0"}),
    "h264, keyframe a second": ("libx264", "mp4", {"g": "30"}),
    "vp9, keyframe a second": (
        "libvpx-vp9",
        "webm",
        {"deadline": "good", "cpu-used": "4", "crf": "31", "b": "0", "g": "30"},
    ),
    "h264, LeRobot": ("libx264", "mp4", {"g": "2", "crf": "30"}),
    "av1, LeRobot": ("libsvtav1", "mp4", {"g": "2", "crf": "30", "preset": "8"}),
}


def scene(height: int, width: int, video: str | None) -> Iterator[av.VideoFrame]:
    """Ten seconds of frames, scaled."""
    if video is not None:
        with av.open(video) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == FRAME_RATE * SECONDS:
                    return
                yield frame.reformat(width, height, "yuv420p")
        return
    generator = np.random.default_rng(0)
    ground = generator.integers(60, 190, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    ground = ground[:height, :width]
    rows, columns = np.mgrid[:height, :width]
    for number in range(FRAME_RATE * SECONDS):
        angle = 2 * np.pi * number / (3 * FRAME_RATE)
        hand = np.hypot(
            rows - height * (0.5 + 0.3 * np.sin(angle)), columns - width * (0.5 + 0.3 * np.cos(1.3 * angle))
        )
        picture = np.where((hand < height / 6)[..., None], (200, 150, 120), np.roll(ground, number // 4, axis=1))
        noisy = picture + generator.normal(0, 3, picture.shape)
        frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
        yield frame.reformat(format="yuv420p")


def encode(path: Path, frames: list[av.VideoFrame], codec: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=FRAME_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, FRAME_RATE), 0
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def as_written(path: Path, steps: list[int]) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frames[step] for step in steps]


def at_its_best(path: Path, steps: list[int]) -> list[np.ndarray]:
    wanted, converter, frames = set(steps), VideoReformatter(), {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames[number] = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return [frames[step] for step in steps]


def sparse(path: Path, steps: list[int]) -> list[np.ndarray]:
    return VideoFrames(str(path)).read(steps)


def least_decoding(path: Path, steps: list[int]) -> None:
    index = INDICES[path]
    positions = sorted({int(index.frames[step]) for step in steps})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for run in index.runs(positions):
            start = index.keyframe_before(run[0])
            container.seek(int(index.pts[index.keyframes[start]]), stream=stream)
            for packet in islice(container.demux(stream), run[-1] - int(index.keyframes[start]) + 1):
                packet.decode()
            stream.codec_context.flush_buffers()


def read_all(function: Callable[[Path, list[int]], list[np.ndarray]], path: Path, plans: list[list[int]]) -> None:
    for plan in plans:
        function(path, plan)


def keyframes(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.is_keyframe for packet in container.demux(video=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="video of at least ten seconds to encode; a drawn scene when not given")
    parser.add_argument("--heights", type=int, nargs="+", default=[240, 480])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--pairs", type=int, default=4, help="pairs out of each clip")
    parser.add_argument("--clips", type=int, default=8, help="clips a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    draw = random.Random(0)
    gap = round(GAP_SECONDS * FRAME_RATE)
    plans = []
    for _ in range(arguments.clips):
        firsts = [draw.randrange(FRAME_RATE * SECONDS - gap) for _ in range(arguments.pairs)]
        plans.append([step for first in firsts for step in (first, first + gap)])
    with tempfile.TemporaryDirectory() as folder:
        for height in arguments.heights:
            frames = list(scene(height, height * 16 // 9 // 2 * 2, arguments.video))
            for name in arguments.codecs:
                codec, container, options = CODECS[name]
                path = Path(folder) / f"clip.{container}"
                encode(path, frames, codec, options)
                INDICES[path] = VideoFrames(str(path)).index
                for plan in plans[:2]:
                    expected = at_its_best(path, plan)
                    assert all(map(np.array_equal, sparse(path, plan), expected)), f"{name}: frames differ"
                candidates = {
                    function.__name__: partial(read_all, function, path, plans)
                    for function in (as_written, at_its_best, sparse, least_decoding)
                }
                title = f"{name}, {height} lines, {path.stat().st_size >> 10} KiB, {keyframes(path)} keyframes"
                timings = alternate(candidates, arguments.rounds)
                print_table(title, timings, arguments.clips * arguments.pairs, "pairs")


if __name__ == "__main__":
    main()
