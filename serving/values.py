"""Values of a message: checked, bounded, and as the model takes them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..options.serving import Limits
from ..pixels_openvla import LONGEST_SIDE, load_image
from .contract import BadRequest, TooLarge
from .wire import from_base64, is_packed, picture_size, shown


NUMBERS = (int, float, np.ndarray, np.number)
LEAST_FILE = 64  # letters of a picture in base64
MOST_QUICK = 16  # files whose heads are looked at where they came


def short_text(field: str, value: Any, limits: Limits) -> str | None:
    """A name of something, or None where there is none."""
    if value is None:
        return None
    if not (isinstance(value, str) and value and value.isprintable()):
        raise BadRequest(f"{field}={shown(value)}: expected text that is not empty, without control characters.")
    if len(value) > limits.name_letters:
        raise TooLarge(f"{field}: {len(value)} letters, at most {limits.name_letters}.")
    return value


def numbers(field: str, value: Any, most: int) -> np.ndarray:
    """At most so many float64 of any shape, all finite."""
    # Before an array is made, which has for each text the room of the longest.
    if not all(isinstance(one, NUMBERS) and not isinstance(one, bool) for one in _leaves(value)):
        raise BadRequest(f"{field}: expected numbers, other things came in a {type(value).__name__}.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"{field}: expected numbers in rows of one length.") from error
    if array.dtype.kind not in "iuf":
        raise BadRequest(f"{field}: expected numbers, {type(value).__name__} of {array.dtype} came.")
    if array.size > most:
        raise TooLarge(f"{field}: {array.size} numbers, at most {most}.")
    if not np.isfinite(array).all():
        raise BadRequest(f"{field}: it holds NaN or infinite numbers.")
    return array.astype(np.float64)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def pixels(name: str, image: Any, limits: Limits) -> np.ndarray:
    """(H, W, 3) uint8 of an array, (H, W, C) or (C, H, W), or of a JPEG or PNG file, as bytes or in base64."""
    try:
        if isinstance(image, (bytes, str)):
            image = _file(image)
            _check_size(*picture_size(image), limits)
        elif isinstance(image, np.ndarray):
            image = _upright(image)
            _check_size(image.shape[0], image.shape[1], limits)
            if _is_read(image):
                return np.ascontiguousarray(image)
        else:
            raise ValueError(f"{type(image).__name__} came, expected an array, or a JPEG or PNG file.")
        return np.asarray(load_image(image))
    except ValueError as error:
        raise BadRequest(f"image '{name}': {error}") from error


def is_quick(values: Iterable[Any], most_pixels: int) -> bool:
    """Whether pictures among them are few and small, so that to look at them and to decode them takes milliseconds."""
    files = [
        value for value in values if isinstance(value, bytes) or (isinstance(value, str) and len(value) > LEAST_FILE)
    ]
    return len(files) <= MOST_QUICK and sum(map(_pixels_to_decode, files)) <= most_pixels


def _pixels_to_decode(value: str | bytes) -> float:
    try:
        data = _file(value)
        if is_packed(data):
            return math.inf
        height, width = picture_size(data)
    except ValueError:  # a long instruction, or what will be refused
        return 0
    return height * width


def _file(value: str | bytes) -> bytes:
    """The file in a text of base64, which may begin as a URL of data does."""
    if isinstance(value, bytes):
        return value
    try:
        return from_base64(value.partition(";base64,")[2] if value.startswith("data:") else value)
    except ValueError as error:
        raise ValueError(
            f"{error}. Expected a JPEG or PNG file in base64; paths and addresses are not read."
        ) from error


def _upright(image: np.ndarray) -> np.ndarray:
    """With channels last."""
    if image.ndim == 3 and image.shape[0] in (1, 3, 4):
        if image.shape[2] in (1, 3, 4):
            raise ValueError(f"shape {image.shape} does not tell which axis holds the colours.")
        image = np.moveaxis(image, 0, -1)
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"shape {image.shape} came, expected (height, width, 3).")
    return image


def _is_read(image: np.ndarray) -> bool:
    """Whether it is already what `load_image` makes of it, in half a millisecond and by two copies."""
    height, width = image.shape[:2]
    return (
        image.dtype == np.uint8
        and image.shape[2:] == (3,)
        and 0 < max(height, width) <= LONGEST_SIDE * min(height, width)
    )


def _check_size(height: int, width: int, limits: Limits) -> None:
    if height * width > limits.picture_pixels:
        raise TooLarge(f"an image of {width}x{height} pixels: at most {limits.picture_pixels} are read.")
