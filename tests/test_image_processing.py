"""Image preprocessing: grey levels of the published code, OpenCV's resize, every input kind, clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from shared_files import shared_path

from lapa.processing.image_processing_lapa import LapaImageProcessor, decode_image, resize_bilinear


def random_image(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_equals_recorded_preprocessing(name):
    recorded = load_file(shared_path("fixtures/preprocess/preprocess.safetensors"))
    image = recorded[f"{name}.input_uint8"]
    np.testing.assert_array_equal(LapaImageProcessor().resize_image(image), recorded[f"{name}.resized_uint8"])
    if f"{name}.center_crop_uint8" in recorded:
        cropping = LapaImageProcessor(do_center_crop=True)
        np.testing.assert_array_equal(cropping.resize_image(image), recorded[f"{name}.center_crop_uint8"])


def test_equals_recorded_end_to_end_pixels():
    recorded = load_file(shared_path("fixtures/e2e/e2e.safetensors"))
    processor = LapaImageProcessor()
    image = recorded["image_uint8"].reshape(recorded["image_uint8"].shape[-3:])
    for crop, name in ((False, "pixel_uint8"), (True, "pixel_center_crop_uint8")):
        levels = recorded[name].reshape(256, 256, 3)
        np.testing.assert_array_equal(processor.resize_image(image, do_center_crop=crop), levels)
        expected = (levels / 127.5 - 1.0).astype(np.float32).transpose(2, 0, 1)[None]
        values = processor(image, return_tensors="pt", do_center_crop=crop).pixel_values
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), expected)


def test_resize_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(1, 120, 4)) for _ in range(120)]
    sizes += [
        (64, 48, 32, 24),
        (32, 24, 64, 48),
        (480, 640, 256, 256),
        (90, 160, 144, 256),
        (7, 9, 7, 20),
        (1, 1, 5, 5),
    ]
    for index, (height, width, new_height, new_width) in enumerate(sizes):
        image = random_image(height, width, seed=index)
        expected = cv2.resize(image, (int(new_width), int(new_height)), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(
            resize_bilinear(image, new_height, new_width), expected, err_msg=str(sizes[index])
        )


def test_resize_by_hand():
    image = np.array([[[0], [100]]], dtype=np.uint8)
    # Centres of four pixels over two: -0.25, 0.25, 0.75, 1.25; beyond the edge the edge repeats.
    assert resize_bilinear(image, 1, 4)[0, :, 0].tolist() == [0, 25, 75, 100]
    assert resize_bilinear(image, 1, 2) is image


def test_every_input_kind_gives_the_same_pixels(tmp_path):
    array = random_image(20, 30)
    Image.fromarray(array).save(tmp_path / "image.png")
    alpha = np.concatenate([array, np.full((20, 30, 1), 7, dtype=np.uint8)], axis=2)
    kinds = [
        array,
        Image.fromarray(array),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        torch.from_numpy(array),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        array.transpose(2, 0, 1),
        alpha,
        Image.fromarray(alpha, mode="RGBA"),
        array.astype(np.float64) / 255,
        array.astype(np.int64),
    ]
    processor = LapaImageProcessor(size=16)
    expected = processor(array).pixel_values
    assert expected.shape == (1, 3, 16, 16) and expected.dtype == np.float32
    for kind in kinds:
        np.testing.assert_array_equal(processor(kind).pixel_values, expected)
    batch = processor(kinds, return_tensors="pt").pixel_values
    assert batch.shape == (len(kinds), 3, 16, 16)
    np.testing.assert_array_equal(batch.numpy(), np.repeat(expected, len(kinds), axis=0))
    np.testing.assert_array_equal(processor(np.stack([array, array])).pixel_values, np.repeat(expected, 2, axis=0))


def test_grey_palette_and_deep_images():
    grey = random_image(8, 8, channels=1)[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(Image.fromarray(grey)), expected)
    np.testing.assert_array_equal(decode_image(grey), expected)
    palette = Image.fromarray(random_image(8, 8)).convert("P")
    np.testing.assert_array_equal(decode_image(palette), np.asarray(palette.convert("RGB")))
    with pytest.raises(ValueError, match="mode 'I;16'"):
        decode_image(Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)))


def test_levels_and_center_crop_geometry():
    # The crop keeps rows 1 to 8 of 10 and all columns.
    image = np.repeat(np.arange(10, dtype=np.uint8)[:, None, None] * 20, 10, axis=1).repeat(3, axis=2)
    cropped = LapaImageProcessor(size=10, do_center_crop=True, center_crop_scale=0.8).resize_image(image)
    np.testing.assert_array_equal(cropped, resize_bilinear(image[1:9], 10, 10))
    values = LapaImageProcessor(size=10)(image).pixel_values
    assert values[0, 0, 0, 0] == -1 and values[0, 0, 9, 0] == np.float32(180 / 127.5 - 1)


def test_save_and_load(tmp_path):
    processor = LapaImageProcessor(size=32, do_center_crop=True, center_crop_scale=0.8)
    processor.save_pretrained(tmp_path)
    loaded = LapaImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = random_image(50, 40)
    np.testing.assert_array_equal(loaded(image).pixel_values, processor(image).pixel_values)
    assert loaded(image).pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "image, message",
    [
        ("no/such/file.png", "no readable image"),
        (object(), "accepted: a PIL image"),
        (None, "NoneType"),
        (np.zeros((6, 6, 5), dtype=np.uint8), r"shape \(6, 6, 5\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\)"),
        (np.full((4, 4, 3), 300), "outside"),
        (np.full((4, 4, 3), 127.0), r"floats must lie in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"floats must lie in \[0, 1\]"),
        ([], "empty"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        LapaImageProcessor()(image)


def test_truncated_file(tmp_path):
    Image.fromarray(random_image(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png"):
        LapaImageProcessor()(tmp_path / "cut.png")


def test_bad_settings():
    for size in (0, -3, "256", {"height": 32, "width": 16}, {"shortest_edge": 32}, True):
        with pytest.raises(ValueError, match="`size`"):
            LapaImageProcessor(size=size)
    with pytest.raises(ValueError, match="center_crop_scale"):
        LapaImageProcessor(center_crop_scale=1.5)
    with pytest.raises(ValueError, match="do_centre_crop"):
        LapaImageProcessor()(random_image(4, 4), do_centre_crop=True)
