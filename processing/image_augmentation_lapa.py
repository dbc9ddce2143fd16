"""Image augmentation of finetuning for real robots: a random crop, then brightness, contrast, hue and saturation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.processing.image_processing_lapa import decode_image, resize_bilinear


@dataclass(frozen=True)
class LapaImageAugmentation:
    r"""
    Random changes of one image, with the published strengths as defaults.

    ```python
    >>> augment = LapaImageAugmentation()
    >>> augment(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0)).shape
    (64, 64, 3)
    ```

    A model trained so is to see images through `LapaImageProcessor(do_center_crop=True)`, which zooms in as far as the
    crops do; `lapa finetune --augmentation` sets that.

    Args:
        crop_scale (`float`): Share of the area that the crop keeps, in (0, 1]; it is enlarged to the size before.
        brightness (`float`): Largest shift of all levels, as a share of the full range, in [0, 1].
        contrast (`float`): Largest change of the factor on all levels, in [0, 1].
        hue (`float`): Largest shift of the hue, in steps of two degrees (OpenCV's unit), in [0, 90].
        saturation (`float`): Largest shift of the saturation, in levels of 255.
        value (`float`): Largest shift of the value, in levels of 255.
        colour_probability (`float`): How often brightness and contrast, and how often hue, saturation and value are
            changed, each in [0, 1].
    """

    crop_scale: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    hue: float = 5.0
    saturation: float = 20.0
    value: float = 20.0
    colour_probability: float = 0.5

    def __post_init__(self) -> None:
        upper = {"crop_scale": 1, "brightness": 1, "contrast": 1, "hue": 90, "saturation": 255, "value": 255}
        for name, limit in {**upper, "colour_probability": 1}.items():
            given = getattr(self, name)
            if not 0 <= given <= limit or (name == "crop_scale" and given == 0):
                raise ValueError(
                    f"`{name}` must lie in {'(' if name == 'crop_scale' else '['}0, {limit}], got {given}."
                )

    def __call__(self, image: Any, generator: np.random.Generator) -> NDArray[np.uint8]:
        """
        Changes one image.

        Args:
            image: As the image processor accepts them.
            generator: Where the randomness comes from; equal generators give equal images.

        Returns:
            (height, width, 3) uint8 RGB, of the image's own size.
        """
        pixels = self._crop(decode_image(image), generator)
        if generator.random() < self.colour_probability:
            pixels = self._brightness_and_contrast(pixels, generator)
        if generator.random() < self.colour_probability:
            pixels = self._hue_saturation_value(pixels, generator)
        return pixels

    def _crop(self, pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        kept = [max(1, round(side * self.crop_scale**0.5)) for side in (height, width)]
        top, left = (int(generator.integers(side - size + 1)) for side, size in zip((height, width), kept))
        return resize_bilinear(pixels[top : top + kept[0], left : left + kept[1]], height, width)

    def _brightness_and_contrast(self, pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        factor = 1 + generator.uniform(-self.contrast, self.contrast)
        shift = 255 * generator.uniform(-self.brightness, self.brightness)
        levels = np.clip(np.rint(np.arange(256) * factor + shift), 0, 255).astype(np.uint8)
        changed: NDArray[np.uint8] = levels[pixels]
        return changed

    def _hue_saturation_value(self, pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        hsv = np.asarray(Image.fromarray(pixels).convert("HSV")).astype(np.int16)
        # PIL counts the circle of hues in 256 steps, OpenCV in 180.
        hue = round(generator.uniform(-self.hue, self.hue) * 256 / 180)
        hsv[..., 0] = (hsv[..., 0] + hue) % 256
        for channel, limit in ((1, self.saturation), (2, self.value)):
            hsv[..., channel] = np.clip(hsv[..., channel] + round(generator.uniform(-limit, limit)), 0, 255)
        return np.asarray(Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB"))


__all__ = ["LapaImageAugmentation"]
