"""Writes small videos for the tests, and decodes them in the plainest way to compare with."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAME_RATE = 30
X264 = "b-adapt=0:scenecut=0"
# Codec, container and options: orders and references of many kinds.
VIDEOS = {
    "h264": ("libx264", "mp4", {"g": "24", "bf": "3"}),
    "h264 pyramid": ("libx264", "mp4", {"g": "36", "bf": "8", "x264-params": f"{X264}:b-pyramid=normal:ref=4"}),
    "h264 open GOP": ("libx264", "matroska", {"x264-params": f"{X264}:keyint=20:min-keyint=20:open-gop=1:bframes=5"}),
    "h264 intra refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=15:bframes=2"}),
    "h264 interlaced": ("libx264", "mp4", {"x264-params": "interlaced=1:keyint=20"}),
    "h264 fragments": ("libx264", "mp4", {"g": "24"}),
    "hevc open GOP": ("libx265", "mp4", {"x265-params": "log-level=none:keyint=24:open-gop=1"}),
    "hevc layers": ("libx265", "matroska", {"x265-params": "log-level=none:keyint=24:temporal-layers=3:b-adapt=0"}),
    "av1": ("libsvtav1", "mp4", {"g": "32", "preset": "12"}),
    "av1 pyramid": ("libsvtav1", "mp4", {"preset": "9", "svtav1-params": "film-grain=8:keyint=300"}),
    "av1 low delay": ("libsvtav1", "webm", {"preset": "12", "svtav1-params": "pred-struct=1:keyint=300"}),
    "av1 short GOP": ("libsvtav1", "webm", {"g": "2", "preset": "12"}),
    "vp9": ("libvpx-vp9", "webm", {"g": "24", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "10"}),
    "vp8": ("libvpx", "webm", {"g": "40", "deadline": "good", "cpu-used": "5", "auto-alt-ref": "1"}),
    "mpeg4": ("mpeg4", "mp4", {"g": "12", "bf": "2"}),
    "mpeg4 in avi": ("mpeg4", "avi", {"g": "12", "bf": "0"}),
    "mpeg4 in avi, reordered": ("mpeg4", "avi", {"g": "12", "bf": "2"}),
    "one GOP": ("libx264", "mp4", {"g": "250"}),
}


def moving_frames(count: int, width: int = 96, height: int = 64, seed: int = 0) -> list[np.ndarray]:
    """(height, width, 3) uint8 frames of a textured background with a square that goes over it, no two alike."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 216, (height // 8, width // 8, 3), dtype=np.uint8)
    background = coarse.repeat(8, 0).repeat(8, 1)
    frames = []
    for number in range(count):
        frame = np.roll(background, number, axis=1)
        x, y = (5 * number) % (width - 16), (3 * number) % (height - 16)
        frame[y : y + 16, x : x + 16] = ((37 * number) % 256, (91 * number) % 256, (11 * number) % 256)
        frames.append(frame)
    return frames


def encode_video(
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    matrix: tuple[int, int, int, int] | None = None,
    container_options: dict[str, str] | None = None,
    bit_rate: int | None = None,
    rate: int = FRAME_RATE,
) -> bytes:
    """
    Content of a video file.

    Args:
        frames: (height, width, 3) uint8 RGB each.
        times: When each frame is shown, in thirtieths of a second (or parts of it by `rate`); one after the other when
            None.
        matrix: Of MP4: a, b, c, d, each -1, 0 or 1; a player is to show the point (x, y) at (a x + c y, b x + d y).
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    content = file.getvalue()
    return content if matrix is None else _with_matrix(content, matrix)


def _with_matrix(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Writes numbers of 16 + 16 bits into the track header: 40 bytes of times and flags, then a, b, u, c, d."""
    place = content.index(b"tkhd") + 44
    a, b, c, d = (number * 65536 for number in matrix)
    return content[:place] + struct.pack(">5i", a, b, 0, c, d) + content[place + 20 :]


def decode_whole(content: bytes | Path) -> tuple[list[np.ndarray], np.ndarray]:
    """All frames decoded one after the other, and their times in seconds from the first."""
    with av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames, times = [], []
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24", threads=1))
            times.append(frame.time if frame.pts is not None else np.nan)
    return frames, np.array(times) - times[0]
