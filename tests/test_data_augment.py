"""Resize and augmentation, against what the original's TensorFlow pipeline computed from the same pixels."""

import numpy as np
import pytest
from tiny import FIXTURES

from openvla.data.augment import (
    ImageAugmentation,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)
from openvla.data.images import decode_image
from openvla.pixels_openvla import center_crop, crop_and_resize, resize_lanczos3, to_float, to_uint8


PIPELINE = FIXTURES / "pipeline"
SIDE = np.sqrt(np.float32(0.9))


def load(file: str) -> dict[str, np.ndarray]:
    with np.load(PIPELINE / file) as archive:
        return dict(archive)


def assert_within_a_level(image: np.ndarray, golden: np.ndarray, share: float) -> None:
    difference = np.abs(image.astype(int) - golden.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= share


def test_resize():
    arrays = load("resize_lanczos3.npz")
    for case in {name.split("|")[0] for name in arrays}:
        np.testing.assert_array_equal(resize_lanczos3(arrays[f"{case}|in"]), arrays[f"{case}|out"])


def test_from_jpeg_to_model_input():
    arrays = load("libero_eval_resize.npz")
    for case in {name.split("|")[0] for name in arrays}:
        decoded = decode_image(arrays[f"{case}|jpeg"].tobytes())
        np.testing.assert_array_equal(decoded, arrays[f"{case}|decoded"])
        np.testing.assert_array_equal(resize_lanczos3(decoded), arrays[f"{case}|out224"])


def test_resize_leaves_what_fits():
    image = load("image1.npz")["in"]
    assert resize_lanczos3(image) is image
    assert resize_lanczos3(image, (32, 48)).shape == (32, 48, 3)


@pytest.mark.parametrize("operation", [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue])
def test_color_operations_are_equal(operation):
    arrays, name = load("image1.npz"), operation.__name__.removeprefix("adjust_")
    cases = [key for key in arrays if key.startswith(f"{name}|") and key.endswith("u8")]
    assert len(cases) >= 2
    for key in cases:
        image = operation(to_float(arrays["in"]), float(key.split("|")[1]))
        np.testing.assert_array_equal(to_uint8(image), arrays[key], err_msg=key)


def test_crop():
    arrays = load("image1.npz")
    for key in [key for key in arrays if key.startswith("crop90") and key.endswith("u8")]:
        top, left = (np.float32(fraction) * (1 - SIDE) for fraction in key.split("|")[1:3])
        image = to_uint8(crop_and_resize(to_float(arrays["in"]), top, left, SIDE))
        np.testing.assert_array_equal(image, arrays[key])
    np.testing.assert_array_equal(center_crop(arrays["in"], 0.9), arrays["eval_center_crop|u8"])


def test_all_operations_in_the_order_of_training():
    arrays = load("image1.npz")

    def drawn(name: str) -> float:
        return float(arrays[f"train_augment_random|drawn|{name}"])

    class Draws:
        """Hands out the factors the original drew, in the order `ImageAugmentation` asks for them."""

        def __init__(self):
            self.rest = [(drawn("crop_y"), drawn("crop_x"))]
            self.rest += [drawn(name) for name in ("brightness", "contrast", "saturation", "hue")]

        def uniform(self, low, high, size=None):
            value = self.rest.pop(0)
            assert low <= np.min(value) and np.max(value) <= high
            return value

    draws = Draws()
    assert_within_a_level(ImageAugmentation()(arrays["in"], draws), arrays["train_augment_random|u8"], 1e-3)
    assert not draws.rest


def test_augmentation_is_reproducible_and_random():
    image = load("image1.npz")["in"]
    augment = ImageAugmentation()
    first, again, other = (augment(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == image.shape and first.dtype == np.uint8
