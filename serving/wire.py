"""Arrays and pictures on the wire: msgpack as openpi's clients write it, JSON as json-numpy does, image files.

numpy, Pillow and msgpack alone: server and client (`openvla_client`, whose wheel holds a copy) run this very file. What
is read came from anybody: numbers only, each array exactly as long as it says, so many values and so deep, no file with
more pixels than allowed; checked before memory is taken for it. All errors are `ValueError`s that say what was wrong.
"""

import base64
import binascii
import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgpack
import numpy as np
from PIL import Image


MOST_BYTES = 32 * 2**20  # of one message: three cameras of full HD, raw
MOST_ITEMS = 10_000  # entries of lists and maps in one message; the numbers of an array count once
LONGEST_NAME = 1000  # of an entry of a map: names are looked at again and again
LONGEST_LIST = 1024  # in msgpack, whose lists say how long they will be, and take their room then
MOST_LEVELS = 8  # of lists and maps within each other
MOST_PIXELS = 4096 * 4096  # of a picture
MOST_SCANS = 32  # of a JPEG: progressive ones have about 10, and each goes over all pixels, however few bytes it has
MOST_PARTS = 64  # of a picture beside its pixels: each takes its time
PACKED, MOST_PACKED = (b"iCCP", b"iTXt", b"zTXt"), 8  # of a PNG: a kilobyte of each may unpack to 1 MiB, in 4 ms
MOST_TAGS = 2**18  # bytes of EXIF; cameras write 64 KiB at most
TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # of TIFF's types
ALONE = {0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # marks of a JPEG that no length follows
MOST_AXES = 6
LONGEST_AXIS = 2**31
FILES = ("JPEG", "PNG")  # what is read as a picture
# How the dtype of an array may be written: 8 to 64 bits, no objects, no structures, no booleans, no text.
CODES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
DTYPES = {kind.str: kind for code in CODES for kind in (np.dtype(">" + code), np.dtype("<" + code))}
DTYPES |= {np.dtype(code).name: np.dtype("<" + code) for code in CODES}  # "float32" says no order
# Single numbers may be true or false; bytes of an array of booleans could be anything but 0 and 1.
SCALARS = DTYPES | dict.fromkeys(("|b1", "bool"), np.dtype(bool))
# What Pillow raises while it opens a file, according to the damage.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, AttributeError, LookupError, TypeError, ArithmeticError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def _array(data: bytes, dtype: Any, shape: Any) -> np.ndarray:
    """Not writeable where the bytes are used as they are."""
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise ValueError(f"an array of dtype {shown(dtype)}: expected integers or floats of 8 to 64 bits, as '<f4'.")
    sizes: list[Any] = list(shape) if isinstance(shape, (list, tuple)) else [None]
    if len(sizes) > MOST_AXES or not all(type(size) is int and 0 <= size < LONGEST_AXIS for size in sizes):
        given = f"({', '.join(map(shown, sizes[:MOST_AXES]))}{', ...' if len(sizes) > MOST_AXES else ''})"
        raise ValueError(f"an array of shape {given}: expected at most {MOST_AXES} sizes, whole numbers from 0 on.")
    expected = math.prod(sizes) * kind.itemsize
    if len(data) != expected:
        raise ValueError(f"an array of shape {sizes} and dtype {dtype} has {expected} bytes, {len(data)} came.")
    array = np.frombuffer(data, kind).reshape(sizes)
    return array.astype(kind.newbyteorder("="), copy=False)


def _scalar(value: Any, dtype: Any) -> np.generic:
    kind = SCALARS.get(dtype) if isinstance(dtype, str) else None
    types = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}.get(kind.kind, ()) if kind else ()
    if kind is None or type(value) not in types:
        raise ValueError(f"a number of dtype {shown(dtype)}: {type(value).__name__} came.")
    if kind.kind in "iu" and not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
        raise ValueError(f"a number that {dtype} does not hold.")
    return kind.type(value)


def shown(value: Any) -> str:
    """Of something that came from outside: short, and never deep."""
    if isinstance(value, str):
        return f"{value[:80]!r:.80}"
    return f"{value!r:.80}" if isinstance(value, (int, float, type(None))) else type(value).__name__


class _Counted:
    """What lists and maps are put together with: counts entries while a message is read."""

    def __init__(self, arrays: Callable[[dict], Any]):
        self.items, self.arrays = 0, arrays

    def _count(self, entries: int) -> None:
        self.items += entries
        if self.items > MOST_ITEMS:
            raise ValueError(f"more than {MOST_ITEMS} values: send pictures and long rows of numbers as arrays.")

    def made_list(self, values: list) -> list:
        self._count(len(values) + 1)
        return values

    def made_map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count(len(pairs) + 1)
        if any(len(name) > LONGEST_NAME for name, _ in pairs):
            raise ValueError(f"a name of more than {LONGEST_NAME} letters.")
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a map that has the same name twice.")
        return self.arrays(content)


def _check_levels(value: Any) -> None:
    level, depth = [value], 0
    while level := [entry for entry in level if isinstance(entry, (dict, list))]:
        depth += 1
        if depth > MOST_LEVELS:
            raise ValueError(f"lists and maps within each other, more than {MOST_LEVELS} deep.")
        level = [entry for outer in level for entry in (outer.values() if isinstance(outer, dict) else outer)]


def _texts(value: Any) -> Iterator[str]:
    """All text in a value, names included."""
    if isinstance(value, str):
        yield value
    for entry in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(entry)


def _sendable(entry: Any) -> np.ndarray | np.generic:
    if not isinstance(entry, (np.ndarray, np.generic)):
        raise TypeError(f"{type(entry).__name__} cannot be sent.")
    if entry.dtype.name not in (SCALARS if isinstance(entry, np.generic) else DTYPES):
        raise ValueError(f"an array of dtype {entry.dtype} cannot be sent: only numbers can.")
    return entry


# msgpack --------------------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    """msgpack of maps, lists, text, bytes, numbers and arrays of numbers, in openpi's form.

    Raises:
        ValueError: For arrays of anything but numbers.
        TypeError: For what msgpack does not have.
    """

    def array(entry: Any) -> dict:
        array = _sendable(entry)
        if isinstance(array, np.generic):
            return {b"__npgeneric__": True, b"data": array.item(), b"dtype": array.dtype.str}
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    return msgpack.packb(value, default=array)


def _from_msgpack(content: dict) -> Any:
    # vla-eval and others write the marks as text.
    found = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    if "__ndarray__" in found:
        data = found.get("data")
        if not isinstance(data, bytes):
            raise ValueError(f"the data of an array is {type(data).__name__}: expected bytes.")
        return _array(data, found.get("dtype"), found.get("shape"))
    if "__npgeneric__" in found:
        return _scalar(found.get("data"), found.get("dtype"))
    if not all(isinstance(key, str) for key in content):
        raise ValueError("a map whose names are bytes: expected text.")
    return content


def unpack(data: bytes) -> Any:
    """The value of a message in openpi's form. Arrays are not writeable; the size of `data` is for the caller to bound.

    Raises:
        ValueError: If it is none, or larger than the limits of this file.
    """
    counted = _Counted(_from_msgpack)
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=counted.made_map,
            list_hook=counted.made_list,
            max_array_len=LONGEST_LIST,
            max_map_len=LONGEST_LIST,
            max_ext_len=0,
        )
    except (ValueError, TypeError) as error:  # msgpack's own are ValueErrors; a name that is no text is a TypeError
        raise ValueError(f"Not a message in msgpack: {str(error) or type(error).__name__}") from error
    _check_levels(value)
    return value


# JSON -----------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """JSON of maps, lists, text, numbers and arrays of numbers, in json-numpy's form.

    Raises:
        ValueError: For arrays of anything but numbers, and numbers that JSON does not have (NaN, infinity).
        TypeError: For what JSON does not have.
    """

    def array(entry: Any) -> dict:
        array = _sendable(entry)
        data = base64.b64encode(array.tobytes()).decode()
        return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}

    return json.dumps(value, default=array, allow_nan=False)


def _from_json(content: dict) -> Any:
    if "__numpy__" not in content:
        return content
    array = _array(from_base64(content["__numpy__"]), content.get("dtype"), content.get("shape"))
    return array if array.ndim else array[()]


def from_base64(text: Any) -> bytes:
    """Raises a `ValueError` for anything but base64."""
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (AttributeError, UnicodeEncodeError, binascii.Error) as error:
        raise ValueError(f"{type(text).__name__} is not base64: {error}") from error


def from_json(text: str | bytes) -> Any:
    """The value of a message in json-numpy's form, or of plain JSON. Arrays are not writeable.

    Raises:
        ValueError: If it is none, or larger than the limits of this file.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_ITEMS:
        raise ValueError(f"more than {MOST_ITEMS} values: send pictures and long rows of numbers as arrays.")
    counted = _Counted(_from_json)
    try:
        value = json.loads(data, object_pairs_hook=counted.made_map)
        for text in _texts(value):  # JSON can write half a character, which no answer could repeat
            text.isascii() or text.encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Not JSON: {error}") from error
    _check_levels(value)
    return value


# Pictures -------------------------------------------------------------------------------------------------------------


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) that a JPEG or PNG file says it has, before any of its pixels is decoded.

    Raises:
        ValueError: If it is no such file, or one that would take minutes to open or to decode.
    """
    # In what is coded this mark cannot occur: it begins a scan.
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
        raise ValueError(f"a JPEG file of {scans} scans, at most {MOST_SCANS}.")
    parts = list(islice(_parts(data), MOST_PARTS + 1))
    if len(parts) > MOST_PARTS:
        raise ValueError(f"a picture file of more than {MOST_PARTS} parts beside its pixels.")
    if (packed := sum(data[at + 4 : at + 8] in PACKED for at in parts)) > MOST_PACKED and data.startswith(b"\x89PNG"):
        raise ValueError(f"a PNG file of {packed} texts and profiles, at most {MOST_PACKED}: save the picture without.")
    _check_tags(data, parts)
    try:
        with Image.open(io.BytesIO(data), formats=FILES) as picture:
            width, height = picture.size
    except UNREADABLE as error:
        raise ValueError(f"{len(data)} bytes that are no {' or '.join(FILES)} file: {type(error).__name__}") from error
    return height, width


def is_packed(data: bytes) -> bool:
    """Whether it is a PNG with parts that may take longer than its pixels."""
    parts = islice(_parts(data), MOST_PARTS) if data.startswith(b"\x89PNG") else ()
    return any(data[at + 4 : at + 8] in PACKED for at in parts)


def _parts(data: bytes) -> Iterator[int]:
    """Where segments before the first scan of a JPEG begin, as Pillow goes through them; or chunks of a PNG, without
    those that hold more than a few pixels."""
    if data.startswith(b"\x89PNG"):
        at = 8
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] != b"IDAT" or size < 1024:
                yield at
            at += 12 + size
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while len(mark := data[at : at + 2]) == 2 and mark != b"\xff\xda":
            yield at
            if mark[0] != 0xFF or mark[1] in (0, 0xFF):  # between segments
                at += 1
            else:
                at += 2 if mark[1] in ALONE else 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def _check_tags(data: bytes, parts: Sequence[int]) -> None:
    """Raise a `ValueError` for EXIF that is larger than any camera's, or whose entries share their bytes: Pillow before
    13 copies them for each entry, gigabytes of a file of 4 MB, while it opens or turns the picture."""
    exif, others = [], []
    for at in parts:
        if data.startswith(b"\x89PNG"):
            kind, text = data[at + 4 : at + 8], data[at + 8 : at + 30]
            if kind == b"eXIf":
                others.append(data[at + 8 : at + 8 + int.from_bytes(data[at : at + 4], "big")])
            elif kind in (b"tEXt", b"zTXt", b"iTXt") and text == b"Raw profile type exif\0":
                raise ValueError("EXIF that is written as text ('Raw profile type exif'): save the picture without it.")
        else:
            body = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
            if body.startswith(b"Exif\0"):
                exif.append(body[6:])
            elif body.startswith(b"MPF\0"):  # of several pictures in one file: the same form
                others.append(body[4:])
    for tags in (b"".join(exif), *exif[-1:], *others):  # several segments are one, or the last counts
        while tags.startswith(b"Exif\0\0"):
            tags = tags[6:]
        if len(tags) > MOST_TAGS or _tag_bytes(tags) > 2 * len(tags):
            raise ValueError(
                f"EXIF of {len(tags)} bytes, at most {MOST_TAGS}, whose entries do not share theirs: save the picture "
                "without it."
            )


def _tag_bytes(tags: bytes) -> int:
    """Bytes of all entries together in the first directory of TIFF's form, as they say."""
    order = "<" if tags.startswith(b"I") else ">"
    found = 0
    try:
        (at,) = struct.unpack_from(f"{order}I", tags, 4)
        (count,) = struct.unpack_from(f"{order}H", tags, at)
        if 43 in tags[2:4]:  # of 64 bits, which no camera writes
            return 2 * len(tags) + 1
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            kind, number, start = struct.unpack_from(f"{order}2xHII", tags, entry)
            size = number * TAG_SIZES.get(kind, 0)
            found += min(size, max(0, len(tags) - start)) if size > 4 else 0
    except struct.error:  # what is not there is not read
        pass
    return found


def check_picture(data: bytes, most_pixels: int = MOST_PIXELS) -> tuple[int, int]:
    """As `picture_size`; a `ValueError` also if there are more pixels."""
    height, width = picture_size(data)
    if height * width > most_pixels:
        raise ValueError(f"a picture of {width}x{height} pixels: at most {most_pixels} are read.")
    return height, width


def picture_file(pixels: np.ndarray, kind: str = "JPEG", quality: int = 95) -> bytes:
    """A file of (H, W, 3) uint8 pixels. JPEG loses some (levels of colour, in half the resolution), PNG none."""
    stream = io.BytesIO()
    more = {"quality": quality} if kind == "JPEG" else {"compress_level": 1}
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, kind, **more)
    return stream.getvalue()
