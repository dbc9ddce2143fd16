"""Augmentation of finetuning: bounds, determinism, and the same pictures after a resume."""

import colorsys

import numpy as np
import pytest

from lapa.processing.image_augmentation_lapa import LapaImageAugmentation

NOTHING = {"crop_scale": 1.0, "brightness": 0.0, "contrast": 0.0, "hue": 0.0, "saturation": 0.0, "value": 0.0}


def picture(size=40):
    generator = np.random.default_rng(0)
    coarse = generator.integers(40, 215, (5, 5, 3)).astype(np.uint8)
    return coarse.repeat(size // 5, axis=0).repeat(size // 5, axis=1)


def augmented(seed, **changes):
    return LapaImageAugmentation(**{**NOTHING, "colour_probability": 1.0, **changes})(
        picture(), np.random.default_rng(seed)
    )


def test_nothing_asked_for_changes_nothing():
    assert np.abs(augmented(0).astype(int) - picture()).max() <= 4  # through hue, saturation and value and back


def test_equal_generators_give_equal_images():
    augment = LapaImageAugmentation()
    one, same, other = (augment(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.shape == picture().shape and one.dtype == np.uint8


def test_crop_keeps_its_share_of_the_area():
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(100)[:, None] * 2, np.arange(200)[None]
    augment = LapaImageAugmentation(**{**NOTHING, "crop_scale": 0.81, "colour_probability": 0.0})
    corners = []
    for seed in range(20):
        result = augment(image, np.random.default_rng(seed)).astype(int)
        # 0.9 of each side: 90 rows (twice that in levels) and 180 columns.
        assert result[-1, 0, 0] - result[0, 0, 0] == pytest.approx(2 * 89, abs=3)
        assert result[0, -1, 1] - result[0, 0, 1] == pytest.approx(179, abs=3)
        corners.append((result[0, 0, 0], result[0, 0, 1]))
    assert len(set(corners)) > 10


def test_brightness_and_contrast_stay_in_bounds():
    shifts = [augmented(seed, brightness=0.2).astype(int) - picture() for seed in range(30)]
    means = [np.median(shift) for shift in shifts]
    assert max(map(abs, means)) <= 51 + 1
    assert min(means) < -25 and max(means) > 25
    spreads = [augmented(seed, contrast=0.2).std() / picture().std() for seed in range(30)]
    assert 0.78 <= min(spreads) < 0.9 and 1.1 < max(spreads) <= 1.22


def test_hue_turns_by_at_most_ten_degrees():
    red = np.full((4, 4, 3), (200, 40, 40), np.uint8)
    augment = LapaImageAugmentation(**{**NOTHING, "hue": 5.0, "colour_probability": 1.0})
    degrees = []
    for seed in range(30):
        pixel = augment(red, np.random.default_rng(seed))[0, 0] / 255
        degrees.append((colorsys.rgb_to_hsv(*pixel)[0] * 360 + 180) % 360 - 180)
    assert max(map(abs, degrees)) <= 12
    assert min(degrees) < -4 and max(degrees) > 4


@pytest.mark.parametrize(("name", "value"), [("crop_scale", 0), ("brightness", -0.1), ("hue", 91), ("value", 300)])
def test_bad_strengths(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must lie in"):
        LapaImageAugmentation(**{name: value})
