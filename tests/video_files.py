"""Writes small videos for the tests, and decodes them in the plainest way to compare with."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAME_RATE = 30


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
