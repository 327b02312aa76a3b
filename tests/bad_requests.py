"""Requests that no server may answer with an action, for test_serving_fuzz.py and check_serving.py.

Wrong by construction, of a model of one camera ("primary") without state and with chunks of one action: each must be
refused. `damaged` are good ones with bytes that differ, which may be right by chance.
"""

import base64
import json
from collections.abc import Iterator

import msgpack
import numpy as np

from openvla.serving import wire


IMAGE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
GOOD = {"image": IMAGE, "instruction": "open the drawer"}
WORDS = ("go", "", "ä", "\x00", "a" * 5000, "../../etc/passwd", "{{7*7}}", "<script>", "\u202e", "🤖", "-1", "null")
NAMES = ("front", "imgae", "__proto__", "__class__", "self", "depth", "image ", "IMAGE", "", "a/b/c", "observation")


def junk(rng: np.random.Generator, depth: int = 0) -> object:
    """Anything that both forms can hold."""
    kind = rng.integers(9 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return bool(rng.integers(2))
    if kind == 2:
        return int(rng.choice([0, -1, 1, 2**31, -(2**40), 2**62]))
    if kind == 3:
        return float(rng.choice([0.5, -1e308, 1e308, 1e-300]))
    if kind in (4, 5):
        return str(rng.choice(WORDS))
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.integers(4))]
    if kind == 7:
        return {str(rng.choice(NAMES)) + str(number): junk(rng, depth + 1) for number in range(rng.integers(3))}
    dtype = rng.choice(["|O", "<U1", "<c16", "<f8", "|u1", "V9", "a", "<f16", "<M8[s]", "|b1"])
    return {
        "__numpy__": str(rng.choice(["", "AAAA", "====", "A"])),
        "dtype": str(dtype),
        "shape": [int(rng.integers(-2, 9))],
    }


def array(rng: np.random.Generator) -> dict:
    """In openpi's form, and none."""
    data = bytes(rng.integers(0, 255, rng.integers(0, 40), np.uint8))
    dtype = str(rng.choice(["|O", "<U1", "<c16", "V9", "a", "<f16", "<M8[s]", "|b1", "O8", "<f4,<f4"]))
    shapes = ([len(data)], [-1], [2**31, 2**31], [1] * 40, "4", None, [[1]], [1.5], {"a": 1})
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shapes[rng.integers(len(shapes))]}


def wrong_values(rng: np.random.Generator) -> dict[str, object]:
    """A value for each field that it cannot have."""
    pixels = (
        np.zeros((0, 4, 3)),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 1e9),
        IMAGE[None],
        IMAGE[..., :2],
        IMAGE[0, 0],
    )
    return {
        "image": [pixels[rng.integers(len(pixels))], junk(rng), str(rng.choice(WORDS))][rng.integers(3)],
        "instruction": [None, 5, [], {"a": 1}, " ", "\u200b", "\n\t", "a" * 2000][rng.integers(8)],
        "unnorm_key": [5, "", "nothing", [], True, "a" * 500][rng.integers(6)],
        "session": [5, [], "a\nb", "", "a" * 500, 1.5][rng.integers(6)],
        "step": [-1, 1.5, "3", [], True, 2**40][rng.integers(6)],
        "committed": [[[0.0] * 7], [[0.0] * 3], "abc", [[[]], 1], {"a": 1}, 5][rng.integers(6)],
        "timeout_ms": [0, -1, "5", [], 1e300, [5]][rng.integers(6)],
        "request_id": [1.5, [], "a\x07", 2**62, "a" * 500, True][rng.integers(6)],
        "details": [1, "true", [], 0.0][rng.integers(4)],
        "distributions": [1, "true", [], 0.0][rng.integers(4)],
        "endpoint": ["train", 5, [], "", True][rng.integers(5)],
    }


def messages(rng: np.random.Generator) -> Iterator[object]:
    """Without end."""
    while True:
        kind = rng.integers(6)
        if kind == 0:
            yield junk(rng)
        elif kind == 1:
            left_out = rng.choice(list(GOOD))
            yield {name: value for name, value in GOOD.items() if name != left_out}
        elif kind == 2:
            unknown = {str(rng.choice(NAMES)): junk(rng)}
            yield {**GOOD, **(unknown if rng.random() < 0.5 else {"full_image": IMAGE})}
        elif kind == 3:
            yield {**GOOD, "prompt": "something else"}
        else:
            field, value = list(wrong_values(rng).items())[rng.integers(11)]
            yield {**GOOD, field: value}


def packed(rng: np.random.Generator) -> Iterator[bytes]:
    """Of a WebSocket, or a body of msgpack."""
    for message in messages(rng):
        kind = rng.integers(8)
        if kind == 0:
            yield bytes(rng.integers(0, 256, rng.integers(0, 300), np.uint8)) + b"\xc1"
        elif kind == 1:
            good = wire.pack(GOOD)
            yield good[: rng.integers(len(good))]
        elif kind == 2:
            yield msgpack.packb({**{"prompt": "go"}, "image": array(rng)})
        elif kind == 3:
            claims = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
            yield (claims[rng.integers(5)] + bytes(rng.integers(0, 256, 4, np.uint8))) * int(rng.integers(1, 2000))
        elif kind == 4:
            yield b"\x91" * int(rng.integers(10, 5000)) + b"\xc0"
        elif message != {"endpoint": "reset"}:
            yield wire.pack(message)


def bodies(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Content type and body of `POST /act`."""
    raw = packed(rng)
    for message in messages(rng):
        kind = rng.integers(10)
        if kind == 0:
            yield "application/msgpack", next(raw)
        elif kind == 1:
            yield "application/json", bytes(rng.integers(0, 256, rng.integers(0, 300), np.uint8)) + b"\xff"
        elif kind == 2:
            good = wire.to_json(GOOD).encode()
            yield "application/json", good[: rng.integers(len(good))]
        elif kind == 3:
            deep = int(rng.integers(10, 20_000))
            yield "application/json", (b"[" * deep if rng.random() < 0.5 else b'{"a":' * deep)
        elif kind == 4:
            yield "application/json", json.dumps({"encoded": text(message)[:-1]}).encode()
        elif kind == 5:
            yield "application/json", b'{"image": "%s", "instruction": "go"}' % base64.b64encode(bomb(rng))
        elif kind == 6:
            kinds = ("text/plain", "application/xml", "", "application/json2", "multipart/form-data", "a" * 500)
            yield kinds[rng.integers(len(kinds))], wire.to_json(GOOD).encode()
        elif kind == 7:
            parts = b"--x\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n" % (
                str(rng.choice(NAMES)).encode(),
                str(rng.choice(WORDS)).encode(),
            )
            yield "multipart/form-data; boundary=x", parts * int(rng.integers(1, 40)) + b"--x--\r\n"
        else:
            yield "application/json", text(message).encode("utf-8", "surrogatepass")


def text(message: object) -> str:
    def plain(value: object) -> object:
        return json.loads(wire.to_json(value)) if isinstance(value, np.ndarray) else value

    if isinstance(message, dict):
        message = {
            name: value if not isinstance(value, np.ndarray) else plain_array(value) for name, value in message.items()
        }
    return json.dumps(message)


def plain_array(value: np.ndarray) -> dict:
    return {
        "__numpy__": base64.b64encode(value.tobytes()).decode(),
        "dtype": value.dtype.str,
        "shape": list(value.shape),
    }


def bomb(rng: np.random.Generator) -> bytes:
    """A PNG or JPEG file that says it has many pixels, or is cut."""
    if rng.random() < 0.5:
        good = wire.picture_file(IMAGE, ["PNG", "JPEG"][rng.integers(2)])
        return good[: rng.integers(len(good) // 2)]
    sides = rng.integers(5000, 2**31 - 1, 2)
    png = bytearray(wire.picture_file(IMAGE, "PNG"))
    png[16:24] = int(sides[0]).to_bytes(4, "big") + int(sides[1]).to_bytes(4, "big")
    return bytes(png)


def damaged(rng: np.random.Generator, good: bytes) -> bytes:
    """Some bytes of it differ."""
    found = bytearray(good)
    for position in rng.integers(0, len(found), rng.integers(1, 6)):
        found[position] = rng.integers(256)
    return bytes(found)
