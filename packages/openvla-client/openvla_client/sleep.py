"""Time that a computer slept, which its monotonic clock does not count."""

import math
import time
from collections.abc import Callable
from functools import partial


LEAST = 1e-3  # seconds


class Sleep:
    """Tells of sleep (suspend) by the clock of Linux that counts it; other systems have none, and nothing is told.

    Two clocks cannot be read at once, and a thread that is stopped between them is no sleep. So a reading gives a
    lowest and a highest value, and sleep is what the lowest is above the highest of before.

    Args:
        awake, always: Seconds, without and with those that were slept; for tests.
    """

    def __init__(self, awake: Callable[[], float] = time.monotonic, always: Callable[[], float] | None = None) -> None:
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        if always is None and clock is not None:
            always = partial(time.clock_gettime, clock)
        self._awake, self._always, self._most = awake, always, math.inf

    def since_last(self) -> float:
        """Seconds that were slept since the last call, at least; 0.0 of the first one."""
        if self._always is None:
            return 0.0
        before, always, after = self._awake(), self._always(), self._awake()
        slept, most = always - after - self._most, always - before
        if slept <= LEAST:
            self._most = min(self._most, most)
            return 0.0
        self._most = most
        return slept
