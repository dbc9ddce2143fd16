"""
Frames kept as JPEG or PNG files in memory, decoded when they are read.

JPEG is decoded by simplejpeg where it is installed, which takes less than half the time of PIL. Both go by
libjpeg-turbo and give the same pixels.
"""

import struct
import zlib
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.data.schema import FrameSequence, ReadError
from lapa.data.video_stream import MAX_FRAME_PIXELS

# What image files of data sets are; PIL need not try its other readers on bytes that are none of these.
FORMATS = ("JPEG", "PNG")
JPEG_START = b"\xff\xd8\xff"
# What PIL's readers raise on damaged files.
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class EncodedFrames(FrameSequence):
    """
    Frames of one camera as image files.

    Args:
        encoded (`Sequence[bytes]`): JPEG or PNG, one per frame.
        name (`str`): Camera and place, for messages.
    """

    def __init__(self, encoded: Sequence[bytes], name: str) -> None:
        self.encoded = encoded
        self.name = name

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Decodes frames; see `FrameSequence.read`."""
        return [self._decode(step) for step in steps]

    def is_blank(self) -> bool:
        """
        Whether every frame is the same single colour, which is how TFDS fills in a camera that is not there.

        Raises:
            ReadError: All frames are the same, and cannot be decoded.
        """
        if not self.encoded or any(frame != self.encoded[0] for frame in self.encoded):
            return False
        first = self._decode(0)
        return bool((first == first[0, 0]).all())

    def _decode(self, step: int) -> NDArray[np.uint8]:
        return decode_image(self.encoded[step], f"frame {step} of {self.name}", FORMATS)


def decode_image(content: bytes, name: str, formats: tuple[str, ...]) -> NDArray[np.uint8]:
    """
    Decodes an image file in memory.

    Args:
        content: Of the file.
        name: What messages call it.
        formats: PIL's names of those that it may be of.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ReadError: No such image, or one of more than `MAX_FRAME_PIXELS`.
    """
    if content[:3] == JPEG_START and (decoded := _fast_jpeg(content)) is not None:
        return decoded
    try:
        with Image.open(BytesIO(content), formats=formats) as image:
            # The header tells the size before any pixel is unpacked.
            if image.width * image.height > MAX_FRAME_PIXELS:
                raise ReadError(f"{name} has {image.width} x {image.height} pixels, more than {MAX_FRAME_PIXELS}.")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ReadError:
        raise
    except DAMAGED as error:
        raise ReadError(f"{name} is no readable image: {str(error).rstrip('.')}.") from error


@cache
def _simplejpeg() -> Any:
    """The module, where it is installed."""
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None


def _fast_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """A usual JPEG file decoded; None leaves it to PIL: other colours, too many pixels, any damage, no simplejpeg."""
    module = _simplejpeg()
    if module is None:
        return None
    try:
        height, width, colours, _ = module.decode_jpeg_header(content)
        if colours != "YCbCr" or height * width > MAX_FRAME_PIXELS:
            return None
        pixels: NDArray[np.uint8] = module.decode_jpeg(content, colorspace="RGB")
    except ValueError:
        return None
    return pixels


__all__ = ["EncodedFrames", "decode_image"]
