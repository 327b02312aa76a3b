"""Random crops and colors in training, with the semantics of the original's TensorFlow pipeline.

What is the same for every image (resize, center crop) stands in `pixels_openvla`.
"""

from dataclasses import dataclass

import numpy as np

from ..pixels_openvla import crop_and_resize, to_float, to_uint8


# Colors of (H, W, 3) float32 in [0, 1] --------------------------------------------------------------------------------


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
    red, green, blue = map(np.ascontiguousarray, np.moveaxis(image, -1, 0))
    value = np.maximum(np.maximum(red, green), blue)  # a tenth of the time of `image.max(axis=-1)`
    spread = value - np.minimum(np.minimum(red, green), blue)
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


# All of them ----------------------------------------------------------------------------------------------------------


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
        pixels = crop_and_resize(to_float(image), top, left, side)
        pixels = adjust_brightness(pixels, generator.uniform(-self.brightness, self.brightness))
        pixels = adjust_contrast(pixels, generator.uniform(*self.contrast))
        pixels = adjust_saturation(pixels, generator.uniform(*self.saturation))
        return to_uint8(adjust_hue(pixels, generator.uniform(-self.hue, self.hue)))
