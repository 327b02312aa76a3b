"""Single frames of a video, exactly by their time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from .episode import DamagedDataError
from .handles import kept_open


LOOK_AHEAD = 30  # frames: up to here decoding on is cheaper than seeking, whatever the distance of key frames
KEPT_FRAMES = 4  # decoded pictures kept per video


class Video:
    """An open video; `frame_at(seconds)` gives the one frame shown at that time, (H, W, 3) uint8."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError, IndexError) as error:
            raise DamagedDataError(f"{path}: not a readable video: {error}") from error
        # One thread: no frames of delay after each seek, and workers do not compete for cores
        self._stream.codec_context.thread_count = 1
        time_base, rate = self._stream.time_base, self._stream.average_rate
        if not time_base or not rate:
            raise DamagedDataError(f"{path}: the video has no frame rate")
        self._time_base = float(time_base)
        self._ticks_per_frame = 1 / (float(rate) * self._time_base)
        self._start = self._stream.start_time or 0
        self._frames: Iterator[av.VideoFrame] | None = None
        self._fresh = True  # nothing was decoded since the last seek
        self._position = 0  # presentation time of the last decoded frame, in ticks of the time base
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def frame_at(self, seconds: float) -> np.ndarray:
        """Raises DamagedDataError where no frame lies within half a frame of `seconds`, or it cannot be decoded."""
        target = round(seconds / self._time_base)
        with self._lock:
            if target not in self._kept:
                try:
                    pixels = self._decode(target)
                except (av.FFmpegError, OSError) as error:
                    self._frames = None
                    raise DamagedDataError(f"{self.path}, {seconds:.3f} s: cannot decode: {error}") from error
                if pixels is None:
                    raise DamagedDataError(f"{self.path}: no frame at {seconds:.3f} s")
                self._kept[target] = pixels
                if len(self._kept) > KEPT_FRAMES:
                    self._kept.popitem(last=False)
            return self._kept[target].copy()

    def _decode(self, target: int) -> np.ndarray | None:
        half = self._ticks_per_frame / 2
        ahead = target - self._position
        if self._frames is None or not half < ahead < LOOK_AHEAD * self._ticks_per_frame:
            self._seek(target)
        back = 0
        while True:
            first = self._fresh
            frame = next(self._frames, None)  # type: ignore[arg-type]
            if frame is None:
                self._frames = None
                return None
            self._fresh = False
            if frame.pts is None:
                continue
            self._position = frame.pts
            if frame.pts < target - half:
                continue
            if frame.pts <= target + half:
                return frame.to_ndarray(format="rgb24")
            if not first or target - back <= self._start:
                return None
            # Key frames are found by decoding time, which may lie before the time of presentation: go further back.
            back = 2 * back + round(LOOK_AHEAD * self._ticks_per_frame)
            self._seek(target - back)

    def _seek(self, ticks: int) -> None:
        self._container.seek(max(ticks, self._start), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._fresh = True


@kept_open()
def open_video(path: Path) -> Video:
    return Video(path)
