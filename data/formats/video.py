"""Single frames of a video, exactly by their time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import require
from ..episode import COPY_AGAIN, CameraImages, DamagedDataError, check_data_file
from .handles import kept_open


TOLERANCE = 1e-4  # seconds that a frame may lie from the time asked for, as in LeRobot (`tolerance_s`)
LOOK_AHEAD = 30  # frames: up to here decoding on is cheaper than seeking, whatever the distance of key frames
KEPT_FRAMES = 4  # decoded pictures kept per video
BT709, FULL_RANGE = 1, 2  # AVCOL_SPC_BT709, AVCOL_RANGE_JPEG


class Video:
    """An open video; `frame_at(seconds)` gives the frame whose time that is, (H, W, 3) uint8.

    `rate`: frames a second, on average; `end`: seconds at which the last frame ends, None where the file does not say.
    """

    def __init__(self, path: Path):
        require("av", purpose="reading videos")
        import av  # not above: data sets without videos are read without it

        self.path, self._unreadable = path, (av.FFmpegError, OSError)
        try:
            self._container = av.open(str(check_data_file(path, "video")))
            self._stream = self._container.streams.video[0]
        except (*self._unreadable, IndexError) as error:
            raise DamagedDataError(f"{path}: not a readable video ({error}): {COPY_AGAIN}") from error
        if self._stream.codec_context is None:
            raise DamagedDataError(f"{path}: a video that nothing here can decode: {COPY_AGAIN}")
        pixels = str(self._stream.codec_context.pix_fmt)
        if pixels.startswith(("gray1", "grayf")):  # gray10 to gray16: more levels than a picture has
            raise DamagedDataError(f"{path}: its pixels are {pixels}, which is depth; leave it out of cameras")
        # One thread: no frames of delay after each seek, and workers do not compete for cores
        self._stream.codec_context.thread_count = 1
        time_base, rate = self._stream.time_base, self._stream.average_rate
        if not time_base or not rate:
            raise DamagedDataError(f"{path}: the video has no frames, or no frame rate: {COPY_AGAIN}")
        self._time_base, self.rate = float(time_base), float(rate)
        self._ticks_per_frame = 1 / (self.rate * self._time_base)
        self._start = self._stream.start_time or 0
        duration = self._stream.duration
        self.end = (self._start + duration) * self._time_base if duration else None
        self._frames: Iterator[av.VideoFrame] | None = None
        self._fresh = True  # nothing was decoded since the last seek
        self._position = 0  # presentation time of the last decoded frame, in ticks of the time base
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def frame_at(self, seconds: float, tolerance: float = TOLERANCE) -> np.ndarray:
        """Raises DamagedDataError where no frame lies within `tolerance` of `seconds`, or it cannot be decoded."""
        target = seconds / self._time_base
        with self._lock:
            key = round(target)
            if key not in self._kept:
                try:
                    # Times in the file are multiples of its time base: half of one is their rounding.
                    pixels = self._decode(target, tolerance / self._time_base + 0.5)
                except (*self._unreadable, ValueError) as error:
                    self._frames = None
                    raise DamagedDataError(f"{self.path}, {seconds:.3f} s: cannot decode: {error}") from error
                if pixels is None:
                    raise DamagedDataError(f"{self.path}: no frame at {seconds:.3f} s")
                self._kept[key] = pixels
                if len(self._kept) > KEPT_FRAMES:
                    self._kept.popitem(last=False)
            return self._kept[key].copy()

    def _decode(self, target: float, tolerance: float) -> np.ndarray | None:
        ahead = target - self._position
        if self._frames is None or not tolerance < ahead < LOOK_AHEAD * self._ticks_per_frame:
            self._seek(int(target))
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
            if frame.pts < target - tolerance:
                continue
            if frame.pts <= target + tolerance:
                return pixels_of(frame)
            if not first or target - back <= self._start:
                return None
            # Key frames are found by decoding time, which may lie before the time of presentation: go further back.
            back = 2 * back + round(LOOK_AHEAD * self._ticks_per_frame)
            self._seek(int(target) - back)

    def _seek(self, ticks: int) -> None:
        self._container.seek(max(ticks, self._start), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._fresh = True


def pixels_of(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a decoded frame. What says that it is BT.709, as most of HD do, PyAV 14 takes for BT.601: up
    to 25 levels off."""
    told: dict[str, str] = {}
    if int(frame.colorspace) == BT709:
        said = "JPEG" if int(frame.color_range) == FULL_RANGE else "MPEG"
        told = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"}  # of RGB the second says nothing
        told |= {"src_color_range": said, "dst_color_range": "JPEG"}
    return frame.to_ndarray(format="rgb24", **told)


@kept_open()
def open_video(path: Path) -> Video:
    return Video(path)


class VideoImages(CameraImages):
    """CameraImages of a video file at the given times (T,), in seconds. Holds no pixels.

    `origin` names the episode in errors; `rows`: which of its rows these are.
    """

    def __init__(self, path: Path, times: np.ndarray, origin: str, tolerance: float, rows: range | None = None):
        self.path, self.times, self.origin, self.tolerance = path, times, origin, tolerance
        self.rows = range(len(times)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.times)

    def _select(self, steps: slice) -> "VideoImages":
        return VideoImages(self.path, self.times[steps].copy(), self.origin, self.tolerance, self.rows[steps])

    def _decode(self, step: int) -> np.ndarray:
        try:
            return open_video(self.path).frame_at(float(self.times[step]), self.tolerance)
        except (DamagedDataError, FileNotFoundError) as error:
            raise DamagedDataError(f"{self.origin}, row {self.rows[step]}: {error}") from error
