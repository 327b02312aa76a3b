"""What a robot saw, asked, was answered and did: one line a step, that nothing on the disk can stop."""

import atexit
import hashlib
import itertools
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checks import whole
from .forks import call_in_forks
from .messages import decode


logger = logging.getLogger(__name__)


class Audit:
    """Lines of JSON, written and flushed by a thread of its own: a slow or full disk never stops the control loop.

    Args:
        path: Is continued if it is there. Full files become `path.1`, `path.2`, ...; the oldest is deleted.
        max_bytes: Of one file.
        files: How many files there are at most, the one that is written included.
    """

    WAITING = 4096  # lines; beyond it the newest are lost

    def __init__(self, path: str | os.PathLike, max_bytes: int = 64 * 2**20, files: int = 4):
        self.path, self.max_bytes, self.files = Path(path), whole("max_bytes", max_bytes, 1), whole("files", files, 1)
        self.lost = 0  # lines that could not be written
        self._lines: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._closed = self._busy = False
        self._cut = True  # whether the file may end in the middle of a line
        self._thread = threading.Thread(target=self._run, name="openvla-audit", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        call_in_forks(self._forked)

    def _forked(self) -> None:
        """What waits here is written by the other process."""
        self._changed, self._busy = threading.Condition(), False
        self._lines.clear()

    def write(self, record: Mapping[str, Any]) -> None:
        """Does not block and does not raise: what cannot be written counts in `lost`."""
        with self._changed:
            if self._closed or len(self._lines) >= self.WAITING or not self._thread.is_alive():  # as after a fork
                self.lost += 1
            else:
                self._lines.append(record)
                self._changed.notify_all()

    def flush(self, timeout: float = 5.0) -> bool:
        """Whether everything is with the operating system, after at most `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._busy, timeout)

    def close(self, timeout: float = 5.0) -> None:
        self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        atexit.unregister(self.close)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or bool(self._lines))
                if not self._lines:
                    return
                records, self._busy = list(self._lines), True
                self._lines.clear()
            lines = [line for line in map(self._line, records) if line]
            try:
                self._append(lines)
            except OSError as error:
                self._cut = True
                self._lose(len(lines), error)

    def _line(self, record: Mapping[str, Any]) -> bytes:
        """Empty of what JSON cannot hold: the lines after it are written all the same."""
        try:
            return json.dumps(_plain(record), default=str, allow_nan=False).encode() + b"\n"
        except Exception as error:  # of whatever was given, its `str` included
            self._lose(1, error)
            return b""

    def _lose(self, count: int, error: Exception) -> None:
        if not self.lost:
            logger.error("'%s': audit lines cannot be written (%s: %s).", self.path, type(error).__name__, error)
        self.lost += count

    def _append(self, lines: list[bytes]) -> None:
        while lines:
            if self.path.exists() and self.path.stat().st_size + len(lines[0]) > self.max_bytes:
                self._rotate()
            with self.path.open("ab", buffering=0) as file:
                room = self.max_bytes - file.tell() - len(lines[0])
                fitting = list(itertools.accumulate(map(len, lines[1:]), initial=0))
                count = max(1, sum(size <= room for size in fitting))
                data = (b"\n" if self._cut and not self._ends_well() else b"") + b"".join(lines[:count])
                if file.write(data) != len(data):
                    raise OSError(f"'{self.path}': the disk took only a part")
                self._cut, lines = False, lines[count:]

    def _ends_well(self) -> bool:
        """Whether the file ends with the end of a line, and not where a process was killed."""
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) == b"\n"
        except OSError:
            return True  # it is not there, or empty

    def _rotate(self) -> None:
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{i}") for i in range(1, self.files))]
        names[-1].unlink(missing_ok=True)
        for source, target in reversed(list(zip(names, names[1:]))):
            if source.exists():
                source.replace(target)


def _plain(value: Any) -> Any:
    """What JSON can hold: lists for arrays, text for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def digest(observation: Any) -> str:
    """32 hexadecimal digits that name an observation: equal for equal content, whatever it is made of.

    Read are mappings, sequences, arrays, bytes, text, numbers, and what has `tobytes` (Pillow's images); of anything
    else only the type.
    """
    state = hashlib.blake2b(digest_size=16)

    def add(kind: str, content: bytes) -> None:
        state.update(f"{kind}:{len(content)}:".encode())
        state.update(content)

    def see(value: Any) -> None:
        if isinstance(value, Mapping):
            add("map", str(len(value)).encode())
            for name in sorted(value, key=str):
                add("key", str(name).encode())
                see(value[name])
        elif isinstance(value, (bytes, bytearray, memoryview)):
            add("bytes", bytes(value))
        elif isinstance(value, str):
            add("text", value.encode(errors="surrogatepass"))
        elif isinstance(value, (np.ndarray, np.generic)):
            add(f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Sequence):
            add("list", str(len(value)).encode())
            for one in value:
                see(one)
        elif value is None or isinstance(value, (bool, int, float)):
            add("number", repr(value).encode())
        elif hasattr(value, "tobytes"):
            decode(value)
            add(f"{type(value).__name__} {getattr(value, 'size', '')}", value.tobytes())
        else:
            add("other", type(value).__qualname__.encode())

    see(observation)
    return state.hexdigest()
