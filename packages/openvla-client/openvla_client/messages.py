"""What is sent to a server, and what is believed of what it sends back."""

import io
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .action_spec import ActionSpec
from .checks import has_gaps, whole
from .errors import BadAnswer, Refused
from .wire import MOST_BYTES as MOST_SENT
from .wire import UNREADABLE, check_picture, pack, picture_file, unpack


FORMATS = ("raw", "jpeg", "png")
MOST_BYTES = 16 * 2**20  # of an answer
_decoding = threading.Lock()
LONGEST = 1e9  # times that are believed, in seconds or milliseconds


@dataclass(frozen=True)
class Dataset:
    """One key of `unnorm_key`.

    spec: What the numbers of an action mean.
    stated: Whether the model says so; otherwise it is the usual meaning, and a guess.
    state_dim: Numbers of the state that the model takes; None: it takes none.
    """

    spec: ActionSpec
    stated: bool = False
    state_dim: int | None = None


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of its model: cameras, actions of an answer, (height, width) of what the model sees."""

    model: str
    datasets: dict[str, Dataset]
    default_key: str | None
    cameras: tuple[str, ...]
    chunk: int
    image_size: tuple[int, int]
    digest: str | None = None  # the same of servers that mean the same

    def key(self, given: str | None = None) -> str:
        """Raises a `ValueError` for a key that the server does not have, or where it has several and none is named."""
        key = self.default_key if given is None else given
        if not isinstance(key, str) or key not in self.datasets:
            raise ValueError(f"unnorm_key={given!r}: expected one of {', '.join(sorted(self.datasets))}.")
        return key


@dataclass(frozen=True)
class Answer:
    """Actions of one request.

    actions: (K, A) float64 in the units of the dataset, all finite.
    probabilities: (K, A) of the chosen tokens, where `details` were asked and the model has them.
    normalized: (K, A) in [-1, 1], where `details` were asked.
    timing: Milliseconds by stage, as the server measured them.
    seconds: From the request to its answer, by the clock of this machine.
    """

    actions: np.ndarray
    unnorm_key: str
    probabilities: np.ndarray | None = None
    normalized: np.ndarray | None = None
    timing: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


# Out ------------------------------------------------------------------------------------------------------------------


def picture(image: Any, form: str, quality: int) -> np.ndarray | bytes:
    """An image as it is sent: (H, W, 3) uint8, or a JPEG or PNG file.

    Args:
        image: (H, W, 3) uint8, one of Pillow's, or a file: its path or its bytes, which are sent as they are. Pillow's
            with transparency or 16 bits are sent as PNG files, for the server to read as it reads all files.

    Raises:
        ValueError: If it is none of them.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(
                f"No image file at {os.fsdecode(image)!a:.200}. Give a local file (URLs and base64 are not read)."
            )
        image = Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        check_picture(bytes(image))
        return bytes(image)
    if isinstance(image, Image.Image):
        try:
            decode(image)
            image = ImageOps.exif_transpose(image)  # as it is done with files
        except UNREADABLE as error:  # of a file that is damaged, or closed before its pixels were looked at
            raise ValueError(f"An image of {image.size} cannot be read: {type(error).__name__}, {error}.") from error
        if image.mode not in ("RGB", "L", "1", "CMYK", "YCbCr") or "transparency" in image.info:
            return _as_png(image)
        image = np.asarray(image.convert("RGB"))
    if np.ma.is_masked(image):
        raise ValueError("An image has masked pixels, of which nothing is known: fill them, image.filled(0).")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"An image is {given}: expected (height, width, 3) uint8, a Pillow image, or a JPEG or PNG file."
        )
    return np.ascontiguousarray(image) if form == "raw" else picture_file(image, form.upper(), quality)


def decode(given: Any) -> None:
    """Have Pillow decode all images in mappings and lists that were only opened. It does so when pixels are first asked
    for, and of two threads that ask at once, one to send a picture and one to log or show it, both get others, most
    often without an error."""
    if isinstance(given, Image.Image):
        with _decoding:
            given.load()
    elif isinstance(given, (Mapping, list, tuple)):
        for one in given.values() if isinstance(given, Mapping) else given:
            decode(one)


def _renew() -> None:
    global _decoding
    _decoding = threading.Lock()


if hasattr(os, "register_at_fork"):  # of a thread that decoded then the lock alone comes along
    os.register_at_fork(after_in_child=_renew)


def _as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    try:
        if image.mode in ("I", "F"):  # which Pillow before 13 writes in other levels
            raise OSError("Its levels may be of any range")
        image.save(stream, "PNG", compress_level=1)
    except UNREADABLE as error:
        raise ValueError(f"An image of mode {image.mode}: expected RGB. {error}.") from error
    return stream.getvalue()


def request(
    info: ServerInfo,
    images: Any,
    instruction: str,
    *,
    state: Any = None,
    unnorm_key: str | None = None,
    step: int | None = None,
    committed: Any = None,
    session: str | None = None,
    details: bool = False,
    form: str = "raw",
    quality: int = 95,
) -> dict[str, Any]:
    """The message of a request. Raises what `Client.act` raises before anything is sent."""
    if not isinstance(images, Mapping):
        if len(info.cameras) != 1:
            raise ValueError(
                f"images: this model takes {len(info.cameras)}, expected {{camera: image}} of {info.cameras}."
            )
        images = {info.cameras[0]: images}
    message = {
        "images": {str(name): picture(image, form, quality) for name, image in images.items()},
        "instruction": instruction,
        "unnorm_key": info.key(unnorm_key),
        "state": None if state is None else _floats("state", state),
        "committed": None if committed is None else _floats("committed", committed),
        "step": None if step is None else whole("step", step, 0),
        "session": session,
        "details": details or None,
    }
    return {name: value for name, value in message.items() if value is not None}


def _floats(name: str, given: Any) -> np.ndarray:
    """float64 of any shape; texts that look like numbers are none."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError):  # rows of several lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf" or has_gaps(given):
        raise ValueError(f"{name}={given!r:.100}: expected numbers, in rows of one length.")
    return array.astype(np.float64)


# In -------------------------------------------------------------------------------------------------------------------


def read_info(content: Any) -> ServerInfo:
    """Raises `BadAnswer`."""
    try:
        datasets = {
            str(key): Dataset(
                ActionSpec.from_dict(entry), entry.get("spec_stated") is True, _count(entry.get("state_dim"), True)
            )
            for key, entry in content["datasets"].items()
        }
        height, width = map(_count, content["image_size"])
        default, digest = content["default_unnorm_key"], content.get("digest")
        info = ServerInfo(
            str(content["model"]), datasets, default, tuple(map(str, content["cameras"])),
            _count(content["chunk"]) or 0, (height or 0, width or 0), digest,
        )  # fmt: skip
        if not info.cameras or not (default is None or default in datasets) or not isinstance(digest, str | None):
            raise ValueError("no cameras, a default key that is none, or a digest that is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer(
            f"This is no server of `openvla serve`: it does not say what its model is ({error!r})."
        ) from error
    return info


def _count(value: Any, none: bool = False) -> int | None:
    if value is None and none:
        return None
    if type(value) is not int or not 0 < value < 100_000:
        raise ValueError(f"{value!r} is no count")
    return value


def read_refusal(content: Any, code: str) -> Refused:
    """A refusal as it came; `code` where it does not say."""
    found = content if isinstance(content, dict) else {}
    found = {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}
    wait = found.get("retry_after")
    said = str(found.get("error") or f"The server, or a proxy before it, refused and did not say why ({code}).")[:2000]
    known = isinstance(wait, (int, float)) and 0 <= wait < LONGEST
    return Refused(said, str(found.get("code") or code)[:50], wait if known else None)


class OtherModel(BadAnswer):
    """An answer over HTTP, where no connection breaks when a server is started again."""


def read_answer(content: Any, sent: Mapping[str, Any], info: ServerInfo, seconds: float) -> Answer:
    """What a server answered to a message.

    Raises:
        BadAnswer: If it is not of this request, of another shape, or not finite.
    """
    if not isinstance(content, dict):
        raise BadAnswer(f"A {type(content).__name__} came back, expected a map with 'actions'.")
    for name in ("request_id", "unnorm_key", "session", "step"):
        if name in sent and not _is(content.get(name), sent[name]):
            raise BadAnswer(f"An answer of {name}={content.get(name)!r:.100} came, asked was {sent[name]!r:.100}.")
    if not _is(content.get("digest", info.digest), info.digest):
        raise OtherModel(
            "The server was started again with another model than it said. `info` of the client says what it is now: "
            "ask again if that is what you want."
        )
    key = sent["unnorm_key"]
    shape = (info.chunk, info.datasets[key].spec.action_dim)
    timing = content.get("server_timing")
    return Answer(
        _numbers(content, "actions", shape),
        key,
        _numbers(content, "probabilities", shape) if "probabilities" in content else None,
        _numbers(content, "normalized", shape) if "normalized" in content else None,
        {
            str(n): float(value)
            for n, value in timing.items()
            if isinstance(value, (int, float)) and 0 <= value < LONGEST
        }
        if isinstance(timing, dict)
        else {},
        seconds,
    )


def _is(came: Any, expected: Any) -> bool:
    """Never asks an array, which may have come, whether it is true. A step may be numpy's and come back as it is or
    not."""
    return isinstance(came, str | int | np.integer | None) and came == expected


def _numbers(content: dict, name: str, shape: tuple[int, int]) -> np.ndarray:
    array = content.get(name)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise BadAnswer(f"{name} of an answer are {type(array).__name__}: expected an array of numbers.")
    if array.shape != shape:
        raise BadAnswer(f"{name} of an answer have shape {array.shape}: expected {shape}, as the server said.")
    if not np.isfinite(array).all():
        raise BadAnswer(f"{name} of an answer are not finite.")
    return array.astype(np.float64)  # a copy


def encoded(message: Mapping[str, Any]) -> bytes:
    data = pack(dict(message))
    if len(data) > MOST_SENT:
        raise ValueError(
            f"A request of {len(data)} bytes: servers read at most {MOST_SENT}. Send smaller images, or images='jpeg'."
        )
    return data


def decoded(data: bytes) -> Any:
    """Raises `BadAnswer`."""
    try:
        return unpack(data)
    except ValueError as error:
        raise BadAnswer(f"What came back cannot be read: {error}") from error
