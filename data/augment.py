"""The pixels the published weights were trained on: resize, augmentation in training, center crop in evaluation.

Semantics of the original's TensorFlow pipeline: images become float32 in [0, 1] once, every operation clips, and they
become uint8 once, by truncating `255.5 x`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


# Resize ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _lanczos3_weights(source: int, target: int) -> np.ndarray:
    """(target, source) float32: lanczos3 with half-pixel centers, widened by the factor of a downscale (antialiasing),
    renormalized at the borders."""
    scale = source / target
    centers = (np.arange(target) + 0.5) * scale  # in source pixels
    distance = (np.arange(source)[None, :] + 0.5 - centers[:, None]) / max(scale, 1.0)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize_image(image: np.ndarray, size: tuple[int, int] = (224, 224)) -> np.ndarray:
    """An image at (height, width) `size`, the aspect ratio not kept: lanczos3 with antialiasing, rounded half to even.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (*size, 3) uint8.
    """
    height, width, channels = image.shape
    if (height, width) == tuple(size):
        return image
    rows = _lanczos3_weights(height, size[0]) @ image.reshape(height, -1).astype(np.float32)
    rows = rows.reshape(size[0], width, channels).transpose(0, 2, 1)
    pixels = (rows @ _lanczos3_weights(width, size[1]).T).transpose(0, 2, 1)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# Operations on (H, W, 3) float32 in [0, 1] ----------------------------------------------------------------------------


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] -> uint8: 255.5 times the value, truncated, as the original converts."""
    return np.minimum(image * np.float32(255.5), np.float32(255)).astype(np.uint8)


def crop_and_resize(image: np.ndarray, top: float, left: float, side: float, size: tuple[int, int]) -> np.ndarray:
    """A box of `side` times each axis, `top` and `left` as fractions of the axis, stretched to `size`.

    Corners of the box are aligned with the corner pixels of the output, bilinear without antialiasing.
    """
    for axis, (start, target) in enumerate(zip((top, left), size)):
        last = image.shape[axis] - 1
        step = np.float32(side) * np.float32(last) / np.float32(max(target - 1, 1))
        position = np.float32(start) * np.float32(last) + np.arange(target, dtype=np.float32) * step
        below = np.clip(np.floor(position).astype(int), 0, last)
        above = np.clip(np.ceil(position).astype(int), 0, last)
        fraction = (position - below.astype(np.float32))[
            (slice(None), None, None) if axis == 0 else (slice(None), None)
        ]
        low, high = image.take(below, axis), image.take(above, axis)
        image = low + (high - low) * fraction
    return np.clip(image, 0, 1)


def adjust_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    return np.clip(image + np.float32(delta), 0, 1)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Around the mean of each channel."""
    mean = image.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return np.clip((image - mean) * np.float32(factor) + mean, 0, 1)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    hue, saturation, value = _rgb_to_hsv(image)
    return np.clip(_hsv_to_rgb(hue, np.clip(saturation * np.float32(factor), 0, 1), value), 0, 1)


def adjust_hue(image: np.ndarray, delta: float) -> np.ndarray:
    """`delta` in turns of the color wheel."""
    hue, saturation, value = _rgb_to_hsv(image)
    return np.clip(_hsv_to_rgb(np.mod(hue + np.float32(delta), np.float32(1)), saturation, value), 0, 1)


def _rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in [0, 1), saturation and value in [0, 1], each (H, W)."""
    red, green, blue = np.moveaxis(image, -1, 0)
    value, spread = image.max(axis=-1), np.ptp(image, axis=-1)
    saturation = np.where(value > 0, spread / np.where(value > 0, value, 1), 0)
    sixth = np.where(spread > 0, 1 / (6 * np.where(spread > 0, spread, 1)), 0).astype(np.float32)
    hue = np.where(
        red == value,
        sixth * (green - blue),
        np.where(green == value, sixth * (blue - red) + np.float32(2 / 6), sixth * (red - green) + np.float32(4 / 6)),
    )
    hue = np.where(spread > 0, hue, 0)
    return np.where(hue < 0, hue + 1, hue).astype(np.float32), saturation.astype(np.float32), value


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(H, W, 3) of hue, saturation and value."""
    sixths = hue * np.float32(6)
    ramps = [np.abs(sixths - 3) - 1, 2 - np.abs(sixths - 2), 2 - np.abs(sixths - 4)]
    return np.stack([((np.clip(ramp, 0, 1) - 1) * saturation + 1) * value for ramp in ramps], axis=-1)


# What training and evaluation apply -----------------------------------------------------------------------------------


def center_crop(image: np.ndarray, area: float = 0.9, size: tuple[int, int] = (224, 224)) -> np.ndarray:
    """The counterpart in evaluation of the random crop in training: the centered box of `area`, (H, W, 3) uint8."""
    side = float(np.sqrt(area))
    offset = (1 - side) / 2
    return to_uint8(crop_and_resize(to_float(image), offset, offset, side, size))


@dataclass(frozen=True)
class ImageAugmentation:
    """Random crop, brightness, contrast, saturation and hue, in the order and ranges of the published training.

    Where the original slides its crop along the diagonal only (both offsets drawn from one seed), the two offsets here
    are independent.
    """

    crop_area: float = 0.9
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """An augmented image.

        Args:
            image: (H, W, 3) uint8.
            generator: Source of the random factors; six numbers are drawn from it.

        Returns:
            (H, W, 3) uint8.
        """
        side = float(np.sqrt(self.crop_area))
        top, left = generator.uniform(0, 1 - side, size=2)
        pixels = crop_and_resize(to_float(image), top, left, side, image.shape[:2])
        pixels = adjust_brightness(pixels, generator.uniform(-self.brightness, self.brightness))
        pixels = adjust_contrast(pixels, generator.uniform(*self.contrast))
        pixels = adjust_saturation(pixels, generator.uniform(*self.saturation))
        return to_uint8(adjust_hue(pixels, generator.uniform(-self.hue, self.hue)))
