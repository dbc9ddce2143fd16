"""How frames are stored: codec and size from headers, without decoding a frame."""

from collections.abc import Sequence
from io import BytesIO
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.folders import ImageFrames
from lapa.data.lerobot_format import StepFrames
from lapa.data.schema import ReadError
from lapa.data.video import VideoFrames


class FrameFormat(NamedTuple):
    """
    How the frames of a camera are stored.

    Args:
        codec (`str`): Of a video (`h264`, `vp9`, ...), of image files (`jpeg`, `png`), or `raw` for pixels.
        height, width (`int`): Of a frame as it is stored; a video may say that it is to be turned.
    """

    codec: str
    height: int
    width: int


class FormatReader:
    """Reads formats, each file once however many episodes are in it."""

    def __init__(self) -> None:
        self._by_file: dict[str, FrameFormat] = {}

    def read(self, frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> FrameFormat | None:
        """
        The format of a camera's frames, by the first of them.

        Returns:
            The format; None where only decoding would tell.

        Raises:
            ReadError: A header that cannot be read.
        """
        if isinstance(frames, StepFrames):
            frames = frames.video
        if isinstance(frames, VideoFrames):
            return self._of_video(frames)
        if isinstance(frames, ImageFrames):
            name = frames.tree.location(frames.images[0])
            try:
                with frames.tree.open(frames.images[0]) as file:
                    return _of_image(file, name)
            except OSError as error:
                raise ReadError(f"{name} cannot be opened: {error.strerror or error}.") from error
        if isinstance(frames, EncodedFrames):
            return _of_image(BytesIO(frames.encoded[0]), f"frame 0 of {frames.name}")
        if isinstance(frames, np.ndarray):
            return FrameFormat("raw", *frames.shape[1:3])
        return None

    def _of_video(self, frames: VideoFrames) -> FrameFormat:
        if not isinstance(frames.file, str):
            return FrameFormat(*frames.header)
        if frames.file not in self._by_file:
            self._by_file[frames.file] = FrameFormat(*frames.header)
        return self._by_file[frames.file]


def _of_image(file: IO[bytes] | Any, name: str) -> FrameFormat:
    try:
        with Image.open(file) as image:
            return FrameFormat((image.format or "image").lower(), image.height, image.width)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ReadError(f"{name} is no readable image: {str(error).rstrip('.')}.") from error


__all__ = ["FormatReader", "FrameFormat"]
