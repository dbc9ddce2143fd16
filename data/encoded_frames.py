"""Frames kept as JPEG or PNG files in memory, decoded when they are read."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.data.schema import FrameSequence, ReadError
from lapa.data.video_stream import MAX_FRAME_PIXELS

# What image files of data sets are; PIL need not try its other readers on bytes that are none of these.
FORMATS = ("JPEG", "PNG")
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


def decode_image(content: bytes, name: str, formats: Sequence[str]) -> NDArray[np.uint8]:
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


__all__ = ["EncodedFrames", "decode_image"]
