"""Images of demonstrations: decoding."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError


JPEG_START = b"\xff\xd8\xff"


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an encoded image: (H, W, 3) uint8, RGB.

    JPEG decodes as TensorFlow does by default (fast integer DCT, smooth chroma upsampling), because the published
    weights were trained on such pixels; Pillow's accurate DCT differs from it by up to 12 levels. Raises ValueError for
    bytes that are no image, that are cut off, or that hold something other than 8-bit colours (depth, for instance).
    """
    try:
        if data.startswith(JPEG_START):
            _, _, colours, *_ = simplejpeg.decode_jpeg_header(data)
            if colours not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode!r} (depth?), not 8-bit colours")
            return np.array(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(
            f"cannot decode an image of {len(data)} bytes that start with {data[:8]!r}: {error}"
        ) from error
