"""JPEG files: what of one is damaged, which decoders do not say, and pixels as training decodes them.

numpy and Pillow alone, but for `decode_jpeg`.
"""

import io
import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image


SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in what is coded only restarts, and 0 after a byte of 255
RESTART = re.compile(rb"\xff[\xd0-\xd7]")  # of a JPEG: its interval counts from 0 to 7, and again
SPARE = 64  # bytes after the last pixel of a JPEG that are no damage: some cameras write a few
AHEAD = 16  # bytes that a decoder may read beyond the last pixel; those of a register, and as many again


def coded_pixels(data: bytes) -> tuple[int, int] | None:
    """Where the coded pixels of a JPEG file begin and end, if they are one sequential scan, as those of cameras are."""
    at, components = 2, -1
    while data.startswith(b"\xff\xd8") and len(head := data[at : at + 4]) == 4 and head[0] == 0xFF:
        mark, size = head[1], int.from_bytes(head[2:], "big")
        if mark in (0xC0, 0xC1):
            components = data[at + 9]
        elif mark == 0xDA:
            end = SCAN_END.search(data, at + 2 + size)
            return (at + 2 + size, end.start()) if end and data[at + 4] == components else None
        at += 1 if mark == 0xFF else 2 + size
    return None


class PictureFile(io.BytesIO):
    """A file that Pillow reads, and what its decoder does not tell of a JPEG: it makes gray what is missing, leaves out
    what is too much, and gives a picture. But it asks for bytes as it needs them, and is given them in three parts: all
    but the end, the end with a few bytes that mean nothing, the rest. An intact picture is complete with the second.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self._parts: Iterator[bytes] | None = None
        self._given = 0

    def read(self, size: int | None = -1) -> bytes:
        if self._parts is None:
            return super().read(size)
        self._given += 1
        return next(self._parts, b"")

    def load(self, image: Image.Image) -> None:
        """The pixels of the image that was opened of this file. Raises a `ValueError` if they are damaged."""
        data = self.getvalue()
        begin, end = coded_pixels(data) or (0, 0)
        if not end:
            image.load()
            return
        blocks = -(-image.width // 8) * -(-image.height // 8)  # and no more restarts, whoever made the file
        marks = islice(RESTART.finditer(data, begin, end), blocks + 1)
        if any(mark[0][1] != 0xD0 + i % 8 or i == blocks for i, mark in enumerate(marks)):
            raise ValueError("it is damaged, parts of its pixels are missing or doubled")
        tail = max(begin, end - SPARE)
        self._parts = iter([data[:tail], data[tail:end] + bytes(AHEAD), data[end:]])
        image.load()
        if self._given != 2:
            raise ValueError(f"it is damaged, its pixels {'are cut off' if self._given > 2 else 'end before its data'}")


def decode_jpeg(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of a JPEG file as TensorFlow decodes it by default (fast integer DCT, smooth chroma upsampling).
    Pillow's accurate DCT differs from it by up to 12 levels.

    Raises:
        ModuleNotFoundError: If simplejpeg is not installed: no other decoder takes its place.
        ValueError: If the file is damaged.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise ModuleNotFoundError(
            "JPEG decoded as in training needs simplejpeg, which is not installed: pip install 'openvla[oft]' (or "
            "pip install simplejpeg). Pillow's decoder gives other pixels.",
            name="simplejpeg",
        ) from error
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """An image written as JPEG, colours in half the resolution, and read again: what a camera frame lost in
    demonstrations that were stored so. (H, W, 3) uint8."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return decode_jpeg(stream.getvalue())


__all__ = ["PictureFile", "decode_jpeg", "through_jpeg"]
