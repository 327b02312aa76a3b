"""Which robots ask: the last that each was seen to see, and how it was answered. Bounded, and in memory only."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .contract import Answer, Request
from .wire import picture_file


MOST_ROBOTS, MOST_CAMERAS, MOST_NUMBERS, MOST_LETTERS = 32, 4, 64, 200  # of what is kept; the rest is left out
SIDE = 256  # largest width or height of a picture that is kept
JPEG_QUALITY = 80
FORGOTTEN = 600.0  # seconds after which a robot that is silent is shown no more


@dataclass
class Robot:
    """A session, or all requests that name none.

    Attributes:
        number: Of this view, for addresses: names are the clients'. Higher than those before, and of no other server: a
            page that is open outlives servers, and would show the picture of one robot beside the name of another.
        at: When it asked last, by the clock of the view.
        frame: How often it asked.
        pictures: Camera -> (H, W, 3) uint8 of at most SIDE pixels.
        action: (A,) the first of the last answer.
        waiting: Requests whose answer is awaited.
        state: What became of the last one: "answered", "gone" (nobody waits), "ended" or the code of a refusal.
        outcomes: How many requests ended how.
    """

    number: int
    name: str
    at: float = 0.0
    frame: int = 0
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    instruction: str = ""
    unnorm_key: str = ""
    proprio: list[float] = field(default_factory=list)
    action: list[float] = field(default_factory=list)
    waiting: int = 0
    state: str = "waiting"
    latency_ms: float | None = None
    outcomes: dict[str, int] = field(default_factory=dict)


class LiveView:
    """What the page shows of robots; the engine tells it. Used in the event loop alone.

    Who asks under many names pushes others out of the view, and out of nothing else: it decides nothing.

    Args:
        frames: Keep the last pictures of each robot. False: words and numbers alone.
        clock: In seconds.
    """

    def __init__(self, *, frames: bool = True, clock: Callable[[], float] = time.monotonic):
        self.frames, self._clock = frames, clock
        self._robots: OrderedDict[str | None, Robot] = OrderedDict()  # by session, the latest at the end
        self._count = secrets.randbelow(2**40)

    def asked(self, request: Request) -> Robot | None:
        """A request came in. None of those of the page, which want distributions: no robot does."""
        if request.distributions:
            return None
        robot = self._robots.pop(request.session, None)
        if robot is None:
            self._count += 1
            robot = Robot(self._count, shorten(request.session or ""))
            while len(self._robots) >= MOST_ROBOTS:
                self._robots.popitem(last=False)
        self._robots[request.session] = robot
        seen = request.observation
        robot.at, robot.frame, robot.waiting = self._clock(), robot.frame + 1, robot.waiting + 1
        robot.instruction, robot.unnorm_key = shorten(seen.instruction), shorten(request.unnorm_key)
        robot.proprio = seen.state[:MOST_NUMBERS].astype(float).tolist()
        if self.frames:
            robot.pictures = {name: smaller(seen.images[name]) for name in list(seen.images)[:MOST_CAMERAS]}
        return robot

    def told(self, robot: Robot | None, outcome: str, latency_ms: float, answer: Answer | None = None) -> None:
        """What became of a request: "answered", "gone", or the code of a refusal."""
        if robot is None:
            return
        robot.waiting -= 1
        robot.state, robot.latency_ms = outcome, latency_ms
        robot.outcomes[outcome] = robot.outcomes.get(outcome, 0) + 1
        if answer is not None:
            robot.action = answer.actions[0][:MOST_NUMBERS].tolist()

    def ended(self, session: str) -> None:
        """An episode has ended."""
        if session in self._robots:
            self._robots[session].state = "ended"

    def robots(self) -> list[dict[str, Any]]:
        """What JSON can hold of each robot, the one that came last at the front."""
        now = self._clock()
        kept = [robot for robot in self._robots.values() if robot.waiting or now - robot.at <= FORGOTTEN]
        return [
            {**vars(robot), "pictures": len(robot.pictures), "age": now - robot.at}
            for robot in sorted(kept, key=lambda robot: -robot.number)
        ]

    def jpeg(self, number: int, camera: int = 0) -> bytes | None:
        """The last picture of a robot, cameras counted from 0; None if there is none. Encoded when somebody looks, and
        not before."""
        for robot in self._robots.values():
            if robot.number == number and 0 <= camera < len(robot.pictures):
                return picture_file(list(robot.pictures.values())[camera], quality=JPEG_QUALITY)
        return None


def smaller(image: np.ndarray) -> np.ndarray:
    """A copy of at most SIDE pixels, by leaving out rows and columns: microseconds, whatever the size. Not a view,
    which would keep the complete message it came in."""
    stride = -(-max(image.shape[:2]) // SIDE)
    return image[::stride, ::stride].copy()


def shorten(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
