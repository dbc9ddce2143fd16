"""
Frames of a video file (PyAV): which there are and when, found without decoding, and decoding of just some of them.

A video is indexed by its packets: their presentation times, and which of them are keyframes. Frames are then got at from
the keyframe before them; what lies between keyframes nobody asked for is not decoded. A frame is the same, bit for bit,
as when the whole video is decoded from its start.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapa.data.schema import FrameSequence, ReadError
from lapa.data.video_index import VideoIndex, make_index
from lapa.data.video_stream import OpenVideo

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

logger = logging.getLogger(__name__)


class VideoHeader(NamedTuple):
    """How a video is coded: the codec's name (`h264`, `vp9`, `av1`, ...), and the size of frames before they are turned."""

    codec: str
    height: int
    width: int


class VideoFrames(FrameSequence):
    r"""
    Frames of one video, or of a time range of it: (height, width, 3) uint8 RGB, turned upright.

    Making one opens nothing. The index is made on first need (in `len` without `num_frames`, `timestamps` or `read`)
    and travels with a pickle. It holds no file open.

    Args:
        file (`str` or `bytes`): Local path, fsspec URL, or the content of the file.
        start (`float`): Seconds after the first frame of the file at which the range starts.
        stop (`float`, *optional*): Seconds at which it ends, exclusive; the end of the file when None. A frame belongs to
            the range if it lies in it within half a frame interval.
        num_frames (`int`, *optional*): How many frames there are, where the source says so: `len` then opens nothing,
            further frames are left out, and fewer are an error.
        stream (`int`, *optional*): Which of the video streams; the one that libav holds for the main one when None.
        thread_count (`int`): Threads that decode. Where many videos are read, processes are the better parallelism.
        name (`str`, *optional*): What messages call the video; the path when None.

    Raises:
        ValueError: A range or number that cannot be.
    """

    def __init__(
        self,
        file: str | bytes,
        *,
        start: float = 0.0,
        stop: float | None = None,
        num_frames: int | None = None,
        stream: int | None = None,
        thread_count: int = 1,
        name: str | None = None,
    ) -> None:
        if not 0 <= start < np.inf:
            raise ValueError(f"`start` must be at least 0 seconds, got {start}.")
        if stop is not None and not start < stop:
            raise ValueError(f"`stop` must lie after `start` ({start:g} s), got {stop}.")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        self.file, self.start, self.stop = file, float(start), stop
        self.num_frames, self.stream, self.thread_count = num_frames, stream, thread_count
        self.name = name if name is not None else file if isinstance(file, str) else "a video in memory"
        self._index: VideoIndex | None = None
        self._header: VideoHeader | None = None

    def __len__(self) -> int:
        return self.num_frames if self.num_frames is not None else len(self.index.frames)

    def __repr__(self) -> str:
        return f"VideoFrames({self.name!r})"

    @property
    def index(self) -> VideoIndex:
        """
        What frames there are; made on first need, by reading the packets of the range without decoding them.

        Raises:
            ReadError: No video, cut short, or with fewer frames than announced.
        """
        if self._index is None:
            with self._open() as video:
                self._index = self._make_index(video)
                self._header = VideoHeader(video.codec, *video.size)
        return self._index

    @property
    def header(self) -> VideoHeader:
        """
        How the video is coded, without decoding a frame.

        Raises:
            ReadError: No video.
        """
        if self._header is None:
            with self._open() as video:
                self._header = VideoHeader(video.codec, *video.size)
        return self._header

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """(num_frames,) float64 seconds from the first frame (of the range), as the container has them."""
        return self.index.times

    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """
        Decodes frames; see `FrameSequence.read`. All that are wanted of one video are best asked for together.

        Raises:
            IndexError: A step outside the video.
            ReadError: A frame that cannot be decoded (its number and time are named), or frames of different sizes.
        """
        if not len(steps):
            return []
        from av.video.reformatter import VideoReformatter

        pictures: dict[int, NDArray[np.uint8]] = {}
        reformatter = VideoReformatter()
        with self._open() as video:
            if self._index is None:
                self._index = self._make_index(video)
            for step in steps:
                if not 0 <= step < len(self):
                    raise IndexError(f"frame {step} of {len(self)} of {self.name}")
            wanted = {int(self._index.frames[step]): step for step in steps}
            for position, frame in video.decode(self._index, sorted(wanted)):
                step = wanted[position]
                pictures[step] = self._picture(frame, step, reformatter)
        missing = min(set(wanted.values()) - set(pictures), default=None)
        if missing is not None:
            raise ReadError(f"{self._at(missing)} cannot be decoded.")
        shapes = {picture.shape: step for step, picture in pictures.items()}
        if len(shapes) > 1:
            sizes = " and ".join(f"{shape[1]} x {shape[0]} (frame {step})" for shape, step in shapes.items())
            raise ReadError(f"{self.name} has frames of different sizes: {sizes}.")
        return [pictures[step] for step in steps]

    def _open(self) -> OpenVideo:
        return OpenVideo(self.file, self.name, self.stream, self.thread_count, checked=self._index is not None)

    def _make_index(self, video: OpenVideo) -> VideoIndex:
        index = make_index(video, self.start, self.stop)
        if len(index.frames) < (self.num_frames or 1):
            until = "" if self.stop is None else f" to {self.stop:g} s"
            expected = f", {self.num_frames} expected" if self.num_frames else ""
            raise ReadError(f"{self.name} has {len(index.frames)} frames from {self.start:g} s{until}{expected}.")
        if index.counted:
            logger.info("%s has no presentation times; its frames are timed by their average rate", self.name)
        if self.num_frames is not None:
            index = replace(index, frames=index.frames[: self.num_frames], times=index.times[: self.num_frames])
        return index

    def _at(self, step: int) -> str:
        time = "" if self._index is None else f" ({self._index.offset + self._index.times[step]:.3f} s)"
        return f"frame {step}{time} of {self.name}"

    def _picture(self, frame: "VideoFrame", step: int, reformatter: "VideoReformatter") -> NDArray[np.uint8]:
        """A decoded frame -> (height, width, 3) uint8 RGB, upright."""
        # One thread: a pool of threads for one small picture costs more than the conversion.
        picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        a, b, c, d = _display_matrix(frame)
        if (a == d == 0) == (b == c == 0):
            raise ReadError(f"{self._at(step)} is to be shown turned by no multiple of 90 degrees.")
        # The matrix takes a point (x, y) to (a x + c y, b x + d y).
        if a == 0:
            picture, a, d = picture.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _display_matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """The turning and mirroring part of how a frame is to be shown; the identity where nothing is said."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a, b, c, d


__all__ = ["VideoFrames", "VideoHeader"]
