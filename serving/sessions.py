"""Who asked lately: what the page shows of the robots that are connected."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from .contract import Request


SESSIONS = 64  # that are remembered
FRAME = 320  # longest side in pixels of the frames that are kept


@dataclass
class Seen:
    """The last request of a session.

    frame: Of the first camera, (H, W, 3) uint8, made small by leaving out pixels.
    state: "waiting" or "answered"; "ended" or "gone" (nobody waits for an answer); or the code of a refusal.
    at: When it came in, by the clock of the engine.
    latency_ms: From then to its answer or refusal; None while it waits.
    """

    session: str
    unnorm_key: str
    instruction: str
    step: int | None
    frame: np.ndarray | None
    at: float
    state: str = "waiting"
    latency_ms: float | None = None


class Sessions:
    """The last request of each of the sessions that asked last."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._lock = threading.Lock()

    def asked(self, request: Request, at: float) -> Seen | None:
        """A request came in. What becomes of it is written into what this returns; None of one without a session."""
        if request.session is None:
            return None
        observation = request.observation
        frame = next(iter(observation.images.values()), None)
        seen = Seen(
            request.session,
            request.unnorm_key,
            observation.instruction,
            observation.step,
            None if frame is None else small(frame),
            at,
        )
        with self._lock:
            self._seen.pop(request.session, None)
            self._seen[request.session] = seen
            while len(self._seen) > SESSIONS:
                self._seen.popitem(last=False)
        return seen

    def ended(self, session: str) -> None:
        with self._lock:
            if session in self._seen:
                self._seen[session].state = "ended"

    def latest(self) -> list[Seen]:
        """Those that asked last, first."""
        with self._lock:
            return list(reversed(self._seen.values()))


def small(frame: np.ndarray) -> np.ndarray:
    """A copy of every n-th pixel of (H, W, 3), at most `FRAME` a side."""
    stride = -(-max(frame.shape[:2]) // FRAME)
    return frame[::stride, ::stride].copy()
