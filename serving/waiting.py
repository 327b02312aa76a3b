"""Requests that wait for a model, and how many of them there were lately."""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass

from .contract import Answer, Refusal, Request


@dataclass(eq=False)
class Waiting:
    """A request whose answer somebody awaits."""

    request: Request
    future: asyncio.Future[Answer]
    since: float

    @property
    def key(self) -> Hashable:
        """The session, of which the newest observation alone waits; without one itself."""
        return self if self.request.session is None else self.request.session

    def refuse(self, refusal: Refusal) -> None:
        """Unless there is an answer, or nobody waits any more."""
        if not self.future.done():
            self.future.set_exception(refusal)


class RecentPeak:
    """The largest of the numbers that were seen in the last `seconds`, or up to twice as long ago."""

    def __init__(self, seconds: float):
        self.seconds, self._began, self._peak, self._before = seconds, 0.0, 0, 0

    def see(self, number: int, now: float) -> None:
        self._turn(now)
        self._peak = max(self._peak, number)

    def peak(self, now: float) -> int:
        self._turn(now)
        return max(self._peak, self._before)

    def _turn(self, now: float) -> None:
        if now >= self._began + self.seconds:
            self._before = self._peak if now < self._began + 2 * self.seconds else 0
            self._began, self._peak = now, 0
