"""Image processor: decodes with PIL and resizes exactly as OpenCV does, which the published models were trained on."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

# OpenCV's resize keeps 11 bits of an interpolation weight.
COEFFICIENT_BITS = 11
CHANNEL_COUNTS = (1, 3, 4)
# PIL modes of more than eight bits per channel: turning them into RGB would clip them to white without a word.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
ACCEPTED_IMAGES = "a PIL image, a path, or a uint8 array or tensor (height, width, 3) or (3, height, width)"
# float32 of the float64 x / 127.5 - 1, as the published code computes it.
PIXEL_VALUE_OF_LEVEL = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


class LapaImageProcessorKwargs(TypedDict, total=False):
    """What `LapaImageProcessor` can be told, at construction or per call."""

    size: int | dict[str, int]
    do_center_crop: bool
    center_crop_scale: float


def _linear_taps(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Index of the left neighbour (may be -1), of the right one (may be `source`), and weight of the right, each (target,)."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    left = np.floor(position).astype(np.int64)
    return left, left + 1, position - left.astype(np.float32)


def _fixed_point(weight: NDArray[np.float32]) -> NDArray[np.int32]:
    fixed: NDArray[np.int32] = np.rint(weight * np.float32(1 << COEFFICIENT_BITS)).astype(np.int32)
    return fixed


def resize_bilinear(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """
    Resizes as `cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)` does: bilinear, no antialiasing.

    Args:
        image: (source_height, source_width, channels) uint8.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        (height, width, channels) uint8.
    """
    if image.shape[:2] == (height, width):
        return image
    source_height, source_width = image.shape[:2]
    left, right, weight = _linear_taps(source_width, width)
    # OpenCV drops the neighbour beyond the edge along a row, but along a column blends the edge with itself, which
    # can cost a grey level to rounding.
    weight[(left < 0) | (right >= source_width)] = 0.0
    left, right = np.clip(left, 0, source_width - 1), np.clip(right, 0, source_width - 1)
    top, bottom, row_weight = _linear_taps(source_height, height)
    top, bottom = np.clip(top, 0, source_height - 1), np.clip(bottom, 0, source_height - 1)
    # When shrinking, only the rows that some output row reads are worth interpolating along.
    rows, row_of_tap = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    # h w c -> h (w c): long rows are what numpy is fast on.
    needed, channels = image[rows], image.shape[2]
    columns = np.take(needed, left, axis=1).reshape(len(rows), -1) * _fixed_point(1 - weight).repeat(channels)
    columns += np.take(needed, right, axis=1).reshape(len(rows), -1) * _fixed_point(weight).repeat(channels)
    # OpenCV's vertical pass drops 4 bits, multiplies, drops 16 and rounds the last 2, each tap on its own.
    columns >>= 4
    upper = columns[row_of_tap[:height]] * _fixed_point(1 - row_weight)[:, None]
    lower = columns[row_of_tap[height:]] * _fixed_point(row_weight)[:, None]
    upper >>= 16
    lower >>= 16
    upper += lower
    upper += 2
    upper >>= 2
    return upper.astype(np.uint8).reshape(height, width, channels)


def _array_to_rgb(array: NDArray[Any], channels_first: bool) -> NDArray[np.uint8]:
    """(H, W), (H, W, C) or (C, H, W) of any accepted dtype -> (H, W, 3) uint8; `channels_first` settles a tie."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.size == 0 or not {array.shape[0], array.shape[-1]} & set(CHANNEL_COUNTS):
        raise ValueError(f"`images` holds an array of shape {array.shape}; accepted: {ACCEPTED_IMAGES}.")
    first, last = array.shape[0] in CHANNEL_COUNTS, array.shape[-1] in CHANNEL_COUNTS
    if first and (channels_first or not last):
        array = np.moveaxis(array, 0, -1)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"`images` holds a float array in [{array.min()}, {array.max()}]; floats must lie in [0, 1], "
                "levels from 0 to 255 must be uint8."
            )
        array = np.rint(array * 255.0)
    elif array.dtype != np.uint8 and (array.dtype == bool or array.min() < 0 or array.max() > 255):
        raise ValueError(f"`images` holds an array of {array.dtype} outside [0, 255]; accepted: {ACCEPTED_IMAGES}.")
    array = array.astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def _pil_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in DEEP_MODES:
        raise ValueError(f"`images` holds a PIL image of mode {image.mode!r}; convert it to 8 bits per channel first.")
    if image.mode == "P":
        # A palette may carry transparency, which PIL turns into RGB only by way of RGBA.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def decode_image(image: Any) -> NDArray[np.uint8]:
    """
    Decodes one image to RGB; an alpha channel is dropped, grey is repeated.

    Args:
        image: PIL image, path, or array or tensor: uint8, (height, width), (height, width, channels) or
            (channels, height, width) with 1, 3 or 4 channels. Floats must lie in [0, 1].

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: Not an image, or a file that PIL cannot read.
    """
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return _pil_to_rgb(opened)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(
                f"`images` holds the path {str(image)!r}, which is no readable image: {error}."
            ) from error
    if isinstance(image, Image.Image):
        try:
            return _pil_to_rgb(image)
        except OSError as error:
            raise ValueError(f"`images` holds a PIL image that cannot be decoded: {error}.") from error
    if isinstance(image, torch.Tensor):
        return _array_to_rgb(image.detach().cpu().numpy(), channels_first=True)
    if isinstance(image, np.ndarray) and (np.issubdtype(image.dtype, np.number) or image.dtype == bool):
        return _array_to_rgb(image, channels_first=False)
    raise ValueError(f"`images` holds {type(image).__name__} {str(image)[:60]!r}; accepted: {ACCEPTED_IMAGES}.")


def split_batch(images: Any) -> list[Any]:
    """One image, a list of images or a four-dimensional array -> list of images."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (list, tuple)):
        return list(images)
    return [images]


def _square_side(size: Any) -> int:
    """Side in pixels of a `size` given as a number or as {height, width}."""
    side, other = (size["height"], size["width"]) if _has_sides(size) else (size, size)
    if side != other or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ValueError(f"`size` must be one number of pixels or an equal height and width, got {size}.")
    return side


def _has_sides(size: Any) -> bool:
    return isinstance(size, SizeDict) or (isinstance(size, dict) and {"height", "width"} <= set(size))


class LapaImageProcessor(PilBackend):
    r"""
    Turns images into the vision tokenizer's input, to the grey level as the published code does: longest side to
    `size`, then to a square of `size`, with OpenCV's bilinear interpolation in fixed point.

    Args:
        size (`int` or `dict`, defaults to `{"height": 256, "width": 256}`): Side of the square result in pixels.
        do_center_crop (`bool`, defaults to `False`): Whether to crop the middle and enlarge it again, for models that
            were finetuned with image augmentation.
        center_crop_scale (`float`, defaults to 0.9): Share of the height that the crop keeps. The width stays whole,
            as in the published code.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    # The base class's own arguments (resampling, mean, ...) would change nothing here, so they are not accepted.
    valid_kwargs = LapaImageProcessorKwargs  # type: ignore[assignment]
    size = {"height": 256, "width": 256}  # noqa: RUF012
    do_center_crop = False
    center_crop_scale = 0.9

    def __init__(self, **kwargs: Any) -> None:
        # Checked before the base class turns `size` into a form that hides what was given.
        side, _, _ = self._resolve({key: kwargs[key] for key in self.valid_kwargs.__annotations__ if key in kwargs})
        super().__init__(**{**kwargs, "size": {"height": side, "width": side}})

    def _resolve(self, kwargs: dict[str, Any]) -> tuple[int, bool, float]:
        """Side, whether to crop, and crop scale of one call, checked."""
        unknown = set(kwargs) - set(LapaImageProcessorKwargs.__annotations__)
        if unknown:
            raise ValueError(
                f"unknown image arguments {sorted(unknown)}; accepted: "
                f"{', '.join(LapaImageProcessorKwargs.__annotations__)}."
            )
        side = _square_side(kwargs.get("size", self.size))
        crop = kwargs.get("do_center_crop", self.do_center_crop)
        scale = kwargs.get("center_crop_scale", self.center_crop_scale)
        if not isinstance(crop, bool):
            raise ValueError(f"`do_center_crop` must be True or False, got {crop!r}.")
        if not isinstance(scale, (int, float)) or not 0 < scale <= 1 or int(side * scale) < 1:
            raise ValueError(f"`center_crop_scale` must lie in (0, 1] and leave a pixel of {side}, got {scale!r}.")
        return side, crop, float(scale)

    def resize_image(self, image: Any, **kwargs: Any) -> NDArray[np.uint8]:
        """
        Decodes, resizes and crops one image, without scaling its levels.

        Args:
            image: See `decode_image`.
            kwargs: Per-call `size`, `do_center_crop`, `center_crop_scale`.

        Returns:
            (size, size, 3) uint8.
        """
        side, crop, scale = self._resolve(kwargs)
        pixels = decode_image(image)
        height, width = pixels.shape[:2]
        ratio = side / max(height, width)
        pixels = resize_bilinear(pixels, max(1, round(height * ratio)), max(1, round(width * ratio)))
        pixels = resize_bilinear(pixels, side, side)
        if crop:
            kept = int(side * scale)
            top = (side - kept) // 2
            pixels = resize_bilinear(pixels[top : top + kept], side, side)
        return pixels

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """
        Decodes and resizes images.

        Args:
            images: One image or a list (see `decode_image`), or a four-dimensional array or tensor.
            return_tensors: `"pt"` or `"np"`; numpy when None.
            kwargs: Per-call `size`, `do_center_crop`, `center_crop_scale`.

        Returns:
            BatchFeature with `pixel_values` (batch, 3, size, size) float32 in [-1, 1].

        Raises:
            ValueError: No image, something that is no image, or an unknown argument.
        """
        batch = split_batch(images)
        if not batch:
            raise ValueError(f"`images` is empty; accepted: {ACCEPTED_IMAGES}, or a list of them.")
        resized = np.stack([self.resize_image(image, **kwargs) for image in batch])
        # b h w c -> b c h w
        pixel_values = np.ascontiguousarray(PIXEL_VALUE_OF_LEVEL[resized].transpose(0, 3, 1, 2))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


__all__ = ["LapaImageProcessor", "decode_image", "resize_bilinear"]
