"""Arrays on the wire: both forms, both ways, against the libraries that clients use, and what is refused."""

import base64
import io
import json
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import json_numpy
import msgpack
import numpy as np
import pytest
from PIL import Image

from openvla.serving import wire


ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    np.linspace(-1, 1, 7),
    np.zeros((0, 3), np.float32),
    np.float32([[1.5]]).T,
    np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2],
    np.array(3.5),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
@pytest.mark.parametrize("write, read", [(wire.pack, wire.unpack), (wire.to_json, wire.from_json)])
def test_arrays_come_back(array, write, read):
    back = read(write({"a": [array]}))["a"][0]
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype.newbyteorder("=") and np.shape(back) == array.shape


@pytest.mark.parametrize("value", [np.float32(0.1), np.uint8(255), np.bool_(True), np.int64(-5)])
def test_numbers_of_numpy_come_back(value):
    back = wire.unpack(wire.pack({"a": value}))["a"]
    assert type(back) is type(value) and back == value


def test_openpi_s_form_is_written_and_read():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    plain = {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [2, 3]}
    assert msgpack.unpackb(wire.pack({"actions": array})) == {"actions": plain}
    np.testing.assert_array_equal(wire.unpack(msgpack.packb({"x": plain}))["x"], array)
    as_text = {"__ndarray__": True, "data": array.tobytes(), "dtype": "<f4", "shape": [2, 3]}
    np.testing.assert_array_equal(wire.unpack(msgpack.packb(as_text)), array)


def test_json_numpy_reads_and_writes_the_same():
    array = np.random.default_rng(0).normal(size=(3, 7))
    np.testing.assert_array_equal(json_numpy.loads(wire.to_json(array)), array)
    np.testing.assert_array_equal(wire.from_json(json_numpy.dumps({"a": array}))["a"], array)
    assert wire.from_json(json_numpy.dumps(np.float32(2.5))) == np.float32(2.5)


@pytest.mark.parametrize("name", ["int16", "uint32", "int64", "float16", "float32", "float64"])
def test_a_dtype_without_its_order_of_bytes_is_little_endian(name):
    values = np.array([1, 2, 3], np.dtype(name).newbyteorder("<"))
    read = wire.unpack(msgpack.packb(form(values.tobytes(), name, [3])))
    np.testing.assert_array_equal(read, values)
    text = {"__numpy__": base64.b64encode(values.tobytes()).decode(), "dtype": name, "shape": [3]}
    np.testing.assert_array_equal(wire.from_json(json.dumps(text)), values)


def form(data=b"\0" * 8, dtype="<f8", shape=(1,)):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


BAD_ARRAYS = {
    "object": form(dtype="|O"),
    "structure": form(dtype=[["a", "<f8"]]),
    "text": form(dtype="<U2"),
    "void": form(dtype="|V8"),
    "complex": form(dtype="<c8"),
    "time": form(dtype="<M8[s]"),
    "boolean": form(dtype="|b1", shape=[8]),
    "no dtype": form(dtype=None),
    "dtype as bytes": form(dtype=b"<f8"),
    "long": form(data=b"\0" * 9),
    "short": form(shape=[2]),
    "negative": form(shape=[-1]),
    "two negatives": form(shape=[-1, -1]),
    "huge": form(shape=[2**31 - 1, 2**31 - 1]),
    "overflow": form(data=b"", shape=[2**62, 4, 0]),
    "many axes": form(shape=[1] * 7),
    "truth as size": form(shape=[True]),
    "float as size": form(shape=[1.0]),
    "no shape": form(shape=None),
    "text as data": form(data="\0" * 8),
    "number": {b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"},
    "number that does not fit": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"},
    "half an integer": {b"__npgeneric__": True, b"data": 1.5, b"dtype": "|u1"},
    "number of objects": {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"},
    "names as bytes": {b"image": 1},
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused(name):
    with pytest.raises(ValueError, match="Not a message in msgpack"):
        wire.unpack(msgpack.packb({"a": BAD_ARRAYS[name]}))


def test_a_wrong_shape_is_said():
    with pytest.raises(ValueError, match=r"an array of shape \(-1, 20, 3\): expected at most 6 sizes"):
        wire.unpack(msgpack.packb(form(shape=[-1, 20, 3])))


@pytest.mark.parametrize(
    "text",
    [
        '{"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}',
        '{"__numpy__": "AAAA", "dtype": "|u1", "shape": [4]}',
        '{"__numpy__": "A*AA", "dtype": "|u1", "shape": [3]}',
        '{"__numpy__": "\\u00e4", "dtype": "|u1", "shape": [3]}',
        '{"__numpy__": null, "dtype": "|u1", "shape": [3]}',
        '{"__numpy__": "AAAA", "dtype": [["a", "|u1"]], "shape": [3]}',
        '{"a": 1, "a": 2}',
        "[" * 9_000,
        "[" * 9 + "]" * 9,
        "[" + "0," * 20_000 + "0]",
        "1" * 5_000,
        "{",
        "",
        b"\xff\xfe\xff",
    ],
    ids=lambda text: str(text[:40]),
)
def test_bad_json_is_refused(text):
    with pytest.raises(ValueError):
        wire.from_json(text)


def nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({"a": 1}) + b"\0",
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        b"\x82\xa1a\x01\xa1a\x02",  # a name twice
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff\0",  # bytes of 4 GiB
        msgpack.packb([0] * 1025),
        msgpack.packb([[0] * 1000] * 10),
        msgpack.packb("a")[:1] + b"\xff",
        nested(9),
        nested(100_000),
        (b"\xdd" + (1024).to_bytes(4, "big")) * 10_000,
    ],
    ids=range(15),
)
def test_bad_messages_are_refused_before_memory_is_taken(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="msgpack: .|deep"):  # never without a reason
            wire.unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20  # 1024 lists of 1024 within each other
    finally:
        tracemalloc.stop()
    assert wire.unpack(nested(8))


def test_long_names_are_refused():
    """One of 1 MB that began with "image/" over and over took 9 s."""
    for name in ("a" * 1000, "a" * 1001):
        for read, data in ((wire.from_json, json.dumps({name: 1})), (wire.unpack, msgpack.packb({name: 1}))):
            if len(name) == 1000:
                assert read(data) == {name: 1}
            else:
                with pytest.raises(ValueError, match="a name of more than 1000"):
                    read(data)
    with pytest.raises(ValueError, match="a name"):
        wire.unpack(msgpack.packb({b"a" * 1001: 1}))


def test_only_numbers_are_sent():
    for array in (np.array([None]), np.array(["a"]), np.array([True]), np.array([1j])):
        for write in (wire.pack, wire.to_json):
            with pytest.raises(ValueError, match="only numbers"):
                write(array)
    for write in (wire.pack, wire.to_json):
        with pytest.raises(TypeError, match="object"):
            write(object())
    with pytest.raises(ValueError):
        wire.to_json({"a": float("nan")})


def part(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int) -> bytes:
    """A file of 8-bit grey that is a few hundred bytes, whatever its size."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 99)) + part(b"IEND", b"")


def test_pictures_are_measured_before_they_are_decoded():
    wire.picture_size(png(8, 8))  # Pillow loads its readers
    for width, height in ((4096, 4096), (1, 60_000), (12_000, 12_000)):
        tracemalloc.start()
        with warnings.catch_warnings(action="ignore"):
            assert wire.picture_size(png(width, height)) == (height, width)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
    assert wire.check_picture(png(4096, 4096)) == (4096, 4096)
    with pytest.raises(ValueError, match="pixels"):
        wire.check_picture(png(4097, 4096))
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "GIF")
    more = (b"", b"GIF89a", stream.getvalue(), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF")
    for data in (*more, png(60_000, 60_000)):
        with pytest.raises(ValueError, match="no JPEG or PNG"):
            wire.picture_size(data)


def test_pictures_are_written():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    assert wire.picture_size(wire.picture_file(pixels)) == (6, 9)
    with Image.open(io.BytesIO(wire.picture_file(pixels, "PNG"))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_damaged_messages_never_raise_anything_else():
    rng = np.random.default_rng(0)
    good = wire.pack(
        {"image": np.zeros((4, 4, 3), np.uint8), "state": np.zeros(7), "prompt": "go", "n": [1, {"a": 2.0}]}
    )
    text = wire.to_json({"image": np.zeros((4, 4, 3), np.uint8), "n": [1, {"a": 2.0}], "instruction": "go"}).encode()
    for data, read in [(good, wire.unpack), (text, wire.from_json)] * 500:
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        try:
            value = read(bytes(damaged[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else damaged))
        except ValueError as error:
            assert len(str(error)) < 1000
        else:
            json.dumps(value, default=repr)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded():
    """12 bytes each: a megabyte of them took minutes."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((512, 512, 3), np.uint8)).save(stream, "JPEG", progressive=True)
    file = stream.getvalue()
    assert wire.picture_size(file) == (512, 512)
    scan, end = file[file.rindex(b"\xff\xda") : -2], file[-2:]
    with pytest.raises(ValueError, match="a JPEG file of 1010 scans, at most 32"):
        wire.picture_size(file[:-2] + 1000 * scan + end)


UNPACKED = part(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))  # 1 kB


@pytest.mark.parametrize("more", [UNPACKED, part(b"zTXt", b"a\0\0"), part(b"IDAT", b""), part(b"prIv", b"")])
@pytest.mark.parametrize("at", [33, -12], ids=["before", "after"])
def test_a_png_of_thousands_of_chunks_is_not_opened(more, at, monkeypatch):
    """Pillow unpacks each profile: 210 kB of them took 0.7 s, wherever they stand."""
    file = png(8, 8)
    assert wire.picture_size(file[:at] + 3 * more + file[at:]) == (8, 8)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="more than 64 parts"):
        wire.picture_size(file[:at] + 1000 * more + file[at:])


@pytest.mark.parametrize("name", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_png_of_many_packed_texts_is_not_opened(name, monkeypatch):
    """60 of them, in 64 kB, held all robots up for 0.8 s: so small a picture is read where it came."""
    file, more = png(8, 8), part(name, (b"a\0\0" if name != b"iTXt" else b"a\0\1\0\0\0") + zlib.compress(bytes(2**20)))
    assert wire.picture_size(file[:33] + 8 * more + file[33:]) == (8, 8)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="a PNG file of 9 texts and profiles, at most 8"):
        wire.picture_size(file[:33] + 9 * more + file[33:])


@pytest.mark.parametrize(
    "more", [b"\xff\xe5\0\2", b"\xff\xfe\0\4ab", b"\xff\xe1\0\0", b"\xff\xf3", b"\xff\xd8", b"\xff", b"a"]
)
def test_a_jpeg_of_thousands_of_segments_is_not_opened(more, monkeypatch):
    file = wire.picture_file(np.zeros((8, 8, 3), np.uint8))
    assert wire.picture_size(file[:2] + b"\xff\xe1\xff\xff" + bytes(65533) + file[2:]) == (8, 8)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="more than 64 parts"):
        wire.picture_size(file[:20] + 1000 * more + file[20:])


def test_files_of_cameras_and_programs_have_few_parts():
    for path in (Path(__file__).parents[1] / "examples" / "frames").glob("*.png"):
        assert wire.picture_size(path.read_bytes())
    pixels, exif = Image.effect_noise((2000, 1500), 90).convert("RGB"), Image.Exif()
    exif[0x010F] = "maker" * 1000
    for kind, given in (
        ("JPEG", {"progressive": True, "icc_profile": bytes(300_000)}),
        ("PNG", {"icc_profile": bytes(3000)}),
    ):
        stream = io.BytesIO()
        pixels.save(stream, kind, exif=exif, **given)
        assert wire.picture_size(stream.getvalue()) == (1500, 2000)


def tags(size: int, entries: int, bytes_of: int, kind: int = 7) -> bytes:
    """EXIF of so many entries, each of so many bytes at the end of it."""
    rows = [struct.pack(">HHII", 0x9000 + i, kind, bytes_of, size - bytes_of) for i in range(entries)]
    head = b"MM\0*\0\0\0\x08" + struct.pack(">H", entries) + b"".join(rows) + bytes(4)
    return head + bytes(size - len(head))


def png_with(kind: bytes, body: bytes) -> bytes:
    file = wire.picture_file(np.zeros((8, 8, 3), np.uint8), "PNG")
    return (
        file[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + file[33:]
    )


def jpeg_with(mark: bytes, body: bytes) -> bytes:
    file = wire.picture_file(np.zeros((8, 8, 3), np.uint8))
    return file[:2] + mark + struct.pack(">H", len(body) + 2) + body + file[2:]


SHARED = tags(60_000, 2000, 30_000)  # 60 MB in Pillow before 13; 4 MB of it took 5.8 GB
BAD_TAGS = [
    png_with(b"eXIf", SHARED),
    png_with(b"eXIf", b"Exif\0\0" + SHARED),
    png_with(b"eXIf", tags(2**18 + 1, 1, 5)),
    png_with(b"eXIf", b"MM\0+" + SHARED[4:]),  # of 64 bits
    png_with(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(SHARED.hex().encode())),
    jpeg_with(b"\xff\xe1", b"Exif\0\0" + SHARED),
    jpeg_with(b"\xff\xe1", b"Exif\0\1" + SHARED),
    jpeg_with(b"\xff\xe2", b"MPF\0" + SHARED),
]


@pytest.mark.parametrize("file", BAD_TAGS)
def test_exif_that_would_fill_the_memory_is_not_opened(file, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="EXIF .*save the picture without it"):
        wire.picture_size(file)


def test_exif_in_several_segments_is_looked_at_as_one(monkeypatch):
    first, second = b"Exif\0\0" + SHARED[:20_000], b"Exif\0\0" + SHARED[20_000:]
    file = jpeg_with(b"\xff\xe1", second)
    file = file[:2] + jpeg_with(b"\xff\xe1", first)[2 : 6 + len(first)] + file[2:]
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="EXIF of 60000 bytes"):
        wire.picture_size(file)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_of_cameras_is_read():
    """With a thumbnail, and damaged as it happens: those turn nothing."""
    whole = tags(64_000, 3, 20_000)
    for body in (whole, whole[:30_000], whole[:9], b"MM", b"", b"XX" + whole[2:], tags(6100, 500, 8)):
        assert wire.picture_size(png_with(b"eXIf", body)) == (8, 8)
        assert wire.picture_size(jpeg_with(b"\xff\xe1", b"Exif\0\0" + body)) == (8, 8)
