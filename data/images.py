"""Images of demonstrations: decoding, encoding."""

import io
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from ..files_openvla import LFS_POINTER
from ..jpeg_openvla import decode_jpeg
from ..pixels_openvla import UNREADABLE, load_image


JPEG_START = b"\xff\xd8\xff"
EXIF_START, EXIF_WITHIN = b"Exif\0\0", 2**18  # before the pixels of a JPEG file; colour profiles may come first
ImageFormat = Literal["jpeg", "png"]
JPEG_QUALITY = 95


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an encoded image: (H, W, 3) uint8, RGB, turned by its EXIF data, what is transparent over white.

    JPEG decodes as TensorFlow does (`decode_jpeg`), because the published weights were trained on such pixels.
    Everything else is what `load_image` makes of it in prediction. Raises ValueError for bytes that are no image, that
    are cut off, or that hold something other than 8-bit colours (depth, for instance).
    """
    try:
        if data.startswith(LFS_POINTER):
            raise ValueError("it is a Git LFS pointer and not the image: run `git lfs pull` in its repository")
        if data.startswith(JPEG_START):
            import simplejpeg  # of the [data] extra, which demonstrations in Python do without

            _, _, colours, *_ = simplejpeg.decode_jpeg_header(data)
            if colours not in ("CMYK", "YCCK"):
                pixels = decode_jpeg(data)
                return _turn_by_exif(pixels, data) if EXIF_START in data[:EXIF_WITHIN] else pixels
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode!r} (depth?), not 8-bit colours")
        return np.array(load_image(data))
    except UNREADABLE as error:
        raise ValueError(
            f"cannot decode an image of {len(data)} bytes that start with {data[:8]!r}: {error}"
        ) from error


def is_colour_image(data: bytes) -> bool:
    """Whether an encoded image has three 8-bit colours, as far as its header tells (of PNG and JPEG): not gray, which
    may be depth or a mask."""
    if data.startswith(b"\x89PNG") and len(data) > 25:
        return data[24] <= 8 and data[25] in (2, 3, 6)  # bit depth, colour type: RGB, palette, RGBA
    if data.startswith(JPEG_START):
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg_header(data)[2].lower() != "gray"
        except ValueError:
            return True  # damaged: said where it is decoded
    return True


def size_of_image(data: bytes) -> tuple[int, int]:
    """(H, W) that `decode_image` will give, as far as the header tells; its errors."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except UNREADABLE:
        height, width, _ = decode_image(data).shape  # says what is wrong
        return height, width
    return (width, height) if turned else (height, width)


def check_size(size: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    """Raise a `ValueError` that begins with `where` if an image, (H, W) or (H, W, 3), has another size than the first
    one of its camera."""
    if size[:2] != expected[:2]:
        raise ValueError(
            f"{where}: an image of {size[1]} x {size[0]} pixels, and the first one of this camera has {expected[1]} x "
            f"{expected[0]}: in a data set all have one size, resize them."
        )


def _turn_by_exif(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Pixels of a JPEG file the way up that its EXIF data say."""
    picture = Image.fromarray(pixels)
    with Image.open(io.BytesIO(data)) as image:
        picture.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return np.array(load_image(picture))


def encode_image(pixels: np.ndarray, format: ImageFormat = "png") -> bytes:
    """(H, W, 3) uint8, RGB, as PNG, or as JPEG of quality 95 with colours in full resolution: a goal's marker may be a
    few pixels wide."""
    if format == "jpeg":
        import simplejpeg

        pixels = np.ascontiguousarray(pixels)
        return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=3)  # a third of the time of the default, 5% more bytes
    return file.getvalue()
