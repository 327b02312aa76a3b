"""Pixels: from whatever the robot's camera driver delivers to the normalized numbers that a vision tower takes.

numpy and Pillow alone; tensors are read without torch being imported here. Pixel values equal those of the published
`processing_prismatic.py` (torchvision's functions on Pillow images); those of "as in training" below equal the
original's TensorFlow pipeline.
"""

import ctypes
import math
import os
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .forks_openvla import lock_over_forks
from .jpeg_openvla import PictureFile
from .tensors_openvla import is_tensor


# Reading --------------------------------------------------------------------------------------------------------------


# What Pillow raises, according to the damage, while it reads a file, also one that was opened earlier or closed since.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, AttributeError, IndexError, KeyError, TypeError, OverflowError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Pillow reads the pixels of an opened file when they are first looked at, and not from two threads at once.
_READING = lock_over_forks()
ORIENTATION = 0x0112  # tag of EXIF; 1: as it is stored
DARKEST = 4095  # the brightest of 12 bits; a frame of 16 that does not reach further is nearly black
LONGEST_SIDE = 64  # times the shorter one; a longer strip is no camera frame, and padding it would fill the memory


def _array_to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels of any dtype as uint8: floats are [0, 1] (or [0, 255] if any value exceeds 1), uint16 is 16-bit color."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        return _floats_to_uint8(array)
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"Integer pixels range from {low} to {high}; expected 0 to 255.")
        deep = array.dtype.itemsize == 2 and array.dtype.kind == "u"
        # Of 8 bits and made brighter, or of a camera's 10 or 12: of 16 bits all of it would be next to black.
        if (0 if deep else 255) < high <= DARKEST:
            raise ValueError(
                f"{array.dtype} pixels reach {high} of 65535: a nearly black frame, or levels of 8, 10 or 12 bits? "
                "Give levels of 8 bits as uint8."
            )
        if deep:
            return np.rint(array / 257.0).astype(np.uint8)
        return (np.rint(array / 257.0) if high > 255 else array).astype(np.uint8)
    raise ValueError(f"Cannot read pixels of dtype {array.dtype}; give uint8, uint16 or floats.")


def _floats_to_uint8(array: np.ndarray) -> np.ndarray:
    """Float pixels as uint8, if their values tell whether they are in [0, 1] or in [0, 255]."""
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("The image contains NaN or infinite pixels: the camera frame is broken, do not act on it.")
    if low < 0 or high > 255:
        raise ValueError(
            f"Float pixels range from {low:g} to {high:g}; expected [0, 1] or [0, 255]. Already normalized images "
            "must be brought back to [0, 1] first: the processor normalizes by itself."
        )
    whole = bool((array == np.rint(array)).all())
    # In [0, 255] a frame this dark is all but black, in [0, 1] it may be anything: the difference is a motion.
    if (high == 1 and whole) or (1 < high <= 2 and not whole):
        raise ValueError(
            f"Float pixels reach {high:g} and do not tell whether they are in [0, 1] or in [0, 255]"
            + (": they are all 0 or 1" if whole else ", e.g. after a resize that overshoots: clip them to [0, 1]")
            + ". Give uint8 levels instead."
        )
    return np.rint(array * (255.0 if high <= 1 else 1.0)).astype(np.uint8)


def _array_to_image(array: np.ndarray, channels_first: bool) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) pixels as a PIL image. `channels_first` decides where both readings make sense."""
    if np.ma.is_masked(array):
        raise ValueError("The image has masked pixels, of which nothing is known: fill them, image.filled(0).")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ValueError(f"An image has 2 or 3 dimensions, got shape {array.shape}.")
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if not (first or last):
        raise ValueError(f"No axis of shape {array.shape} is a channel axis (1, 3 or 4): give (H, W, 3) or (3, H, W).")
    if first and (channels_first or not last):
        array = np.moveaxis(array, 0, -1)
    if array.size == 0:
        raise ValueError(f"The image is empty: shape {array.shape}.")
    pixels = np.ascontiguousarray(_array_to_uint8(array))
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _tensor_to_image(tensor: Any) -> Image.Image:
    """The same of a tensor, channels first in doubt."""
    if str(tensor.layout) != "torch.strided" or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"Cannot read an image from a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}.")
    tensor = tensor.detach().cpu()
    return _array_to_image((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)


def _open_image(file: bytes | str, name: str) -> Image.Image:
    """The image in the bytes or at the path of a file, its pixels read."""
    try:
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        if not data:
            raise ValueError("it is empty (0 bytes)")
        with Image.open(stream := PictureFile(data)) as image:
            # A video; files of cameras may hold a thumbnail or a second eye (TIFF, MPO) beside the frame.
            if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
                raise ValueError(f"it holds {image.n_frames} frames, give the one to act on")  # type: ignore[attr-defined]
            deep = _is_deep(image)
            stream.load(image)
            _check_deep(image, deep)
            return image
    except UnidentifiedImageError as error:  # which names nothing but an object of ours
        raise ValueError(f"Cannot read {name} as an image: it is no PNG, no JPEG, nothing that PIL knows.") from error
    except UNREADABLE as error:
        raise ValueError(f"Cannot read {name} as an image: {error}.") from error


def _is_deep(image: Image.Image) -> bool:
    """Whether an image that was opened and not read yet has colours of 16 bits, of which Pillow takes the upper 8."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _check_deep(image: Image.Image, deep: bool) -> None:
    """Raise a `ValueError` if the colours of 16 bits that were read are as dark as `_array_to_uint8` refuses them."""
    if deep and int(np.asarray(image)[..., : 1 if image.mode == "LA" else 3].max()) <= DARKEST >> 8:
        raise ValueError(
            f"its colours of 16 bits stay below {DARKEST + 1} of 65535: a nearly black frame, or levels of 8, 10 or 12 "
            "bits? Give levels of 8 bits in a file of 8"
        )


def load_image(image: Any) -> Image.Image:
    """One RGB picture of a PIL image, numpy array, torch tensor, nested list, file path or the bytes of such a file.

    Arrays and tensors may be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8, uint16, bool or float. EXIF
    rotation is applied, transparency is composited over white, 16-bit color is scaled to 8 bits. Floats that are all 0
    or 1, or reach a little above 1, and 16 bits that reach 4095 at the most are refused: they may be bright or black.
    So is a JPEG file of which pixels are missing or too many; an image that Pillow opened is taken as Pillow reads it.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the pixels cannot be read (damaged or closed file, several frames, NaN, no channel axis, out of
            range, ambiguous, unknown type) or the image is 64 times as long as wide.
    """
    theirs = isinstance(image, Image.Image)  # who gave it may change or close it later
    if isinstance(image, (str, os.PathLike)):
        path = os.fsdecode(image)
        shown = ascii(path) if len(path) <= 200 else f"{ascii(path[:200])}..."
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No image file at {shown}. Give a local file (URLs and base64 are not read).")
        image = _open_image(path, shown)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        image = _open_image(bytes(image), f"{len(image)} bytes that start with {bytes(image[:8])!r}")
    elif is_tensor(image):
        image = _tensor_to_image(image)
    elif isinstance(image, np.ndarray):
        image = _array_to_image(image, channels_first=False)
    elif isinstance(image, (list, tuple)) and _is_pixel_list(image):
        image = _array_to_image(_pixel_array(image), channels_first=False)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"Cannot read an image from {type(image).__name__}; give a PIL image, an array, a tensor, a file path or "
            "the bytes of a file."
        )
    try:
        with _READING:
            deep = _is_deep(image)
            image.load()
            _check_deep(image, deep)
            if 0 in image.size:
                raise ValueError(f"it is empty, {image.size[0]}x{image.size[1]} pixels")
            if theirs or image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)  # a copy
    except UNREADABLE as error:
        raise ValueError(f"Cannot read the image: {error}.") from error
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(f"An image of {image.size[0]}x{image.size[1]} pixels is a strip and no camera frame.")
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_array_to_uint8(np.asarray(image)))
    try:
        return _to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"Cannot make RGB of an image of mode {image.mode}: {error}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, what is transparent over white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_pixel_list(value: Any) -> bool:
    """Whether nested lists hold numbers, as an array that came as JSON does, and not images."""
    for _ in range(4):  # (N, H, W, C)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
    return isinstance(value, (bool, int, float, np.number))


def _pixel_array(rows: list | tuple) -> np.ndarray:
    try:
        return np.asarray(rows)
    except (ValueError, TypeError) as error:
        raise ValueError(f"An image as nested lists must have rows of one length: {error}.") from error


def as_image_list(images: Any, depth: int = 0) -> list:
    """A flat list of single images, of one image, a list, or a batched (N, ., ., .) array or tensor."""
    if isinstance(images, (list, tuple)):
        if not _is_pixel_list(images):
            if depth == 3:
                raise ValueError("Images are nested more than three lists deep: give a list of images.")
            return [single for entry in images for single in as_image_list(entry, depth + 1)]
        images = _pixel_array(images)
    if (isinstance(images, np.ndarray) or is_tensor(images)) and images.ndim == 4:
        return list(images)
    return [images]


def is_image_list(image: Any) -> bool:
    """Whether several images were given, or a list of one."""
    return isinstance(image, (list, tuple)) and not _is_pixel_list(image)


# Resizing -------------------------------------------------------------------------------------------------------------


INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def resize(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    """`image` of another size, antialiased; `interpolation` is one of `INTERPOLATIONS`."""
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def resize_shorter_side(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    """`image` with a shorter side of `side` pixels and the longer one rounded down."""
    long = int(side * max(image.size) / min(image.size))
    height, width = (long, side) if image.size[0] <= image.size[1] else (side, long)
    return resize(image, height, width, interpolation)


def crop_to_size(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of `image`; black where it is smaller."""

    def start(size: int, kept: int) -> int:
        return round((size - kept) / 2) if size >= kept else -((kept - size) // 2)

    left, top = start(image.size[0], width), start(image.size[1], height)
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Borders in a mean color (three numbers in [0, 1]), left and right or above and below. A side may be one pixel
    shorter than the other, as in the published code."""
    side = max(image.size)
    left, top = (side - image.size[0]) // 2, (side - image.size[1]) // 2
    return ImageOps.expand(image, (left, top, left, top), fill=tuple(int(channel * 255) for channel in mean))


# As in training -------------------------------------------------------------------------------------------------------
# Images of the original's training become float32 in [0, 1] once, every operation clips, and they become uint8 once, by
# truncating `255.5 x`.


COLUMNS = 384  # times the rows of a frame: what a cache of 1 to 2 MB holds


def _sine(values: np.ndarray) -> np.ndarray:
    """Sines of float32 values as the C library has them, which the original's kernel calls: their last bit is another
    than that of a rounded float64 now and then, and with it a level of one image in some."""
    function = None
    for library in (None, "libm.so.6"):  # None: what this process was linked with
        try:
            function = ctypes.CDLL(library).sinf
            break
        except (OSError, AttributeError, TypeError):
            continue
    if function is None:  # there is no such library
        return np.sin(values.astype(np.float64)).astype(np.float32)
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    sines = [function(value) for value in values.ravel().tolist()]
    return np.array(sines, dtype=np.float32).reshape(values.shape)


@lru_cache(maxsize=64)
def _lanczos3_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the source that make one of the target, (target, taps), and their weights, (target, taps) float32:
    lanczos3 with half-pixel centers, widened by the factor of a downscale (antialiasing), renormalized at the borders.

    In float32 throughout, in the order of the original's kernel (TensorFlow's ScaleAndTranslate).
    """
    one, half, radius, pi = (np.float32(number) for number in (1, 0.5, 3, math.pi))
    scale = one / (np.float32(target) / np.float32(source))
    widened = max(scale, one)
    centers = (np.arange(target, dtype=np.float32) + half) * scale  # in source pixels
    first = np.maximum(np.ceil(centers - radius * widened - half).astype(int), 0)
    last = np.minimum(np.floor(centers + radius * widened - half).astype(int), source - 1)
    taps = first[:, None] + np.arange((last - first).max() + 1)
    distance = np.abs((taps.astype(np.float32) + half - centers[:, None]) * (one / widened))
    near = np.maximum(distance, np.float32(1e-3))  # closer ones weigh 1
    angle = pi * near
    sines = [_sine(value) for value in (angle, angle / radius)]
    weights = np.where(distance <= np.float32(1e-3), one, radius * sines[0] * sines[1] / (pi * pi * near * near))
    weights = np.where((distance <= radius) & (taps <= last[:, None]), weights, np.float32(0))
    total = np.zeros(target, np.float32)
    for tap in range(taps.shape[1]):
        total += weights[:, tap]
    return np.minimum(taps, source - 1), weights * (one / total)[:, None]


def resize_lanczos3(image: np.ndarray, size: tuple[int, int] = (224, 224)) -> np.ndarray:
    """An image at (height, width) `size`, the aspect ratio not kept: lanczos3 with antialiasing, rounded half to even.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (*size, 3) uint8.
    """
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    rows = _turned(_resize_rows(image, height))
    return _turned(np.clip(np.rint(_resize_rows(rows, width)), 0, 255).astype(np.uint8))


def _turned(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) in one piece -> (W, H, C) in one piece, pixel by pixel: half the time of number by number."""
    whole = pixels.view(np.dtype((np.void, pixels.itemsize * pixels.shape[2])))[..., 0]
    return np.ascontiguousarray(whole.T).view(pixels.dtype).reshape(pixels.shape[1], pixels.shape[0], -1)


def _resize_rows(pixels: np.ndarray, target: int) -> np.ndarray:
    """(H, W, C) -> (target, W, C) float32; some columns at a time, which stay in the cache of the processor."""
    taps, weights = _lanczos3_weights(len(pixels), target)
    rows = pixels.reshape(len(pixels), -1)
    resized = np.empty((target, rows.shape[1]), np.float32)
    for begin in range(0, rows.shape[1], COLUMNS):
        part = rows[:, begin : begin + COLUMNS].astype(np.float32)
        sums = np.zeros((target, part.shape[1]), np.float32)  # in one piece: a quarter faster than parts of `resized`
        weighted = np.empty_like(sums)
        for tap in range(taps.shape[1]):  # one after another: a matrix product would round otherwise
            np.take(part, taps[:, tap], axis=0, out=weighted, mode="clip")
            weighted *= weights[:, tap, None]
            sums += weighted
        resized[:, begin : begin + COLUMNS] = sums
    return resized.reshape(target, *pixels.shape[1:])


RESIZE_FILTERS = {"lanczos3": resize_lanczos3}  # what a processor may name as its `resize_filter`
# What a model may be shown instead of what is stored with it: the pixels of the published image processor alone, those
# of the original's LIBERO evaluation of models trained with random crops, or those of OpenVLA-OFT's evaluation.
PIXELS: dict[str, dict[str, Any]] = {
    "published": {"resize_filter": None, "center_crop": None},
    "libero": {"resize_filter": "lanczos3", "center_crop": 0.9},
    "oft": {"resize_filter": "lanczos3", "center_crop": 0.9, "jpeg_quality": 95},
}


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) * np.float32(1 / 255)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] -> uint8: 255.5 times the value, truncated, as the original converts."""
    return np.minimum(image * np.float32(255.5), np.float32(255)).astype(np.uint8)


def crop_and_resize(image: np.ndarray, top: float, left: float, side: float) -> np.ndarray:
    """A box of `side` times each axis, `top` and `left` as fractions of the axis, stretched to the size of the image.

    Corners of the box are aligned with the corner pixels of the output, bilinear without antialiasing.

    Args:
        image: (H, W, 3) float32 in [0, 1].
    """
    for axis, start in ((1, np.float32(left)), (0, np.float32(top))):
        target = image.shape[axis]
        step = (start + np.float32(side) - start) * np.float32(target - 1) / np.float32(max(target - 1, 1))
        position = start * np.float32(target - 1) + np.arange(target, dtype=np.float32) * step
        below = np.clip(np.floor(position).astype(int), 0, target - 1)
        above = np.clip(np.ceil(position).astype(int), 0, target - 1)
        fraction = (position - below.astype(np.float32))[
            (slice(None), None, None) if axis == 0 else (slice(None), None)
        ]
        low, high = image.take(below, axis), image.take(above, axis)
        image = low + (high - low) * fraction
    return np.clip(image, 0, 1)


def center_crop(image: np.ndarray, area: float) -> np.ndarray:
    """The centered box of a share of the area, in (0, 1], stretched to the size of the image: what is shown to a model
    that was trained with random crops. (H, W, 3) uint8."""
    side = np.sqrt(np.float32(area))
    offset = (1 - side) / 2
    return to_uint8(crop_and_resize(to_float(image), offset, offset, side))


# Normalizing ----------------------------------------------------------------------------------------------------------


def normalize(
    image: Image.Image, mean: Sequence[float] | None, std: Sequence[float] | None, rescale_factor: float | None
) -> np.ndarray:
    """(3, height, width) float32 of an RGB image.

    Args:
        mean, std: Three numbers each, for pixels in [0, 1]; None normalizes nothing.
        rescale_factor: None keeps levels from 0 to 255.
    """
    pixels = np.empty((3, image.height, image.width), np.float32)
    # Divided by 255, not multiplied by 1/255: float32 rounds the two differently.
    divisor = np.float32(1 if rescale_factor is None else 1 / rescale_factor)
    np.divide(np.asarray(image).transpose(2, 0, 1), divisor, out=pixels, dtype=np.float32)
    if mean is not None and std is not None:
        pixels -= np.asarray(mean, dtype=np.float32)[:, None, None]
        pixels /= np.asarray(std, dtype=np.float32)[:, None, None]
    return pixels


# Pixels in [0, 1], normalized by any mean and a standard deviation of at least 0.05, stay within.
LARGEST_PIXEL = 20.0


def check_largest_pixel(largest: float, limit: float = LARGEST_PIXEL) -> None:
    """Raise a `ValueError` if the largest absolute value of normalized pixels is NaN, infinite or above `limit`."""
    if not math.isfinite(largest):
        raise ValueError("pixel_values contain NaN or infinite values: the camera frame is broken, do not act on it.")
    if largest > limit:
        raise ValueError(
            f"pixel_values reach {largest:g}; normalized pixels stay within {limit:g}: make them with the "
            "processor, or give the raw image, predict_action(image, instruction)."
        )


__all__ = [
    "INTERPOLATIONS",
    "RESIZE_FILTERS",
    "UNREADABLE",
    "as_image_list",
    "center_crop",
    "check_largest_pixel",
    "crop_and_resize",
    "crop_to_size",
    "is_image_list",
    "load_image",
    "normalize",
    "pad_to_square",
    "resize",
    "resize_lanczos3",
    "resize_shorter_side",
    "to_float",
    "to_uint8",
]
