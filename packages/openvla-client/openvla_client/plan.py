"""Which action of which answer may act now. Times are of one machine and one monotonic clock."""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks import has_gaps
from .transport import Ask, Reply


EPSILON = 1e-9  # times are sums of floats


@dataclass
class Answered:
    """The newest observation that was answered.

    time: When it was seen. step: Of the control loop, of which action 0 is. actions: (K, A) float64, finite.
    done: Index of the last action that was executed, -1 before the first.
    """

    id: int
    step: int
    time: float
    actions: np.ndarray
    done: int = -1


def told(error: BaseException) -> str:
    """An error in words; one that cannot say them must not end the control loop."""
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:
        return type(error).__name__


class Stale(Exception):
    """No action may act now; says why."""


class Early(Stale):
    """Not yet: of the newest answer one may act later."""


class Plan:
    """The newest answer, and the requests that may still be answered.

    Action i of an answer is for step i after its observation: it is due i periods after the observation was seen, and
    its age is the time since then. A chunk of K actions so is good for K periods without a further answer, and stale
    afterwards. Steps of the control loop count as well as its clock, and the greater age of the two counts: neither a
    clock that stands still nor one that goes back makes an old action young.

    Args:
        period: Seconds from one step to the next.
        max_age: Seconds. Older actions never act, nor actions that are due more than that later.
        dims: Numbers of an action; None: as many as the first answer has.
        execute: Of each answer only the first so many actions count; None: all.
    """

    EARLY = 2  # periods; a loop that is faster than the control rate executes so many actions more, and no further
    LONGEST = 1024  # actions of an answer
    PENDING = 256  # requests; older ones are not waited for any more

    def __init__(self, period: float, max_age: float, dims: int | None, execute: int | None):
        self.period, self.max_age, self.dims, self.execute = period, max_age, dims, execute
        self.epoch = secrets.randbits(32)  # of no other guard, nor of this program before it was started again
        self.newest: Answered | None = None
        # When the actions that were taken end, had the loop kept to the control rate. Of all epochs: with a connection
        # that breaks again and again, a loop that is too fast would move the robot as fast as it runs.
        self._taken = -math.inf
        self.begin()

    def begin(self) -> None:
        """An episode begins, and with it an epoch."""
        self.clear()
        self._executed = 0.0

    def clear(self) -> None:
        """A new epoch: whatever was asked before it never acts."""
        self.epoch += 1
        if self.newest is not None:
            self._executed = max(0, self.newest.done) * self.period
        self.newest = None
        self._pending: dict[int, tuple[int, float]] = {}  # id -> (step, time) of the observation

    def set_back(self, now: float) -> None:
        """The clock went back to `now`: it would take long until it says again when the last action ends."""
        self._taken = min(self._taken, now + self.EARLY * self.period)

    def asked(self, ask: Ask, time: float, alone: bool = False) -> None:
        """`alone`: what was asked before is not waited for any more."""
        self._pending = {} if alone else self._pending
        self._pending[ask.id] = (ask.step, time)
        if len(self._pending) > self.PENDING:
            del self._pending[min(self._pending)]

    def awaits(self, step: int, now: float, patience: float) -> bool:
        """Whether an observation of less than `patience` seconds ago is not answered yet."""
        ages = (max(now - time, (step - asked) * self.period) for asked, time in self._pending.values())
        return any(age < patience for age in ages)

    def accept(self, reply: Reply) -> str:
        """Why a reply is refused; empty if its actions are the newest now."""
        if reply.epoch != self.epoch:
            return f"of epoch {reply.epoch}, this is {self.epoch}"
        if reply.id not in self._pending:
            return "not asked for, or answered before"
        step, time = self._pending.pop(reply.id)
        if reply.error is not None:
            return told(reply.error)
        if self.newest is not None and reply.id < self.newest.id:
            return "a newer observation is answered already"
        try:
            actions = self._checked(reply.actions)
        except ValueError as error:
            return str(error)
        self._pending = {id: asked for id, asked in self._pending.items() if id > reply.id}
        self.dims = actions.shape[1]
        self.newest = Answered(reply.id, step, time, actions[: self.execute])
        return ""

    def _checked(self, given: Any) -> np.ndarray:
        """(K, A) float64, a copy."""
        try:
            actions = np.atleast_2d(np.asarray(given))
        except Exception as error:  # of whatever was given, such as a tensor with gradients
            raise ValueError(f"no actions: {told(error)}") from error
        expected = f"({'A' if self.dims is None else self.dims},) or (K, {'A' if self.dims is None else self.dims})"
        gaps = has_gaps(given)
        if actions.dtype.kind not in "iuf" or actions.ndim != 2 or gaps:
            kind = type(given).__name__ if actions.dtype == object else actions.dtype
            kind = "true, false or masked numbers" if gaps else kind
            raise ValueError(f"actions of {kind} {np.shape(given)}, expected numbers {expected}")
        if not (1 <= len(actions) <= self.LONGEST and actions.shape[1] >= 1 and self.dims in (None, actions.shape[1])):
            raise ValueError(f"actions of shape {actions.shape}, expected {expected}")
        actions = actions.astype(np.float64)
        if not np.isfinite(actions).all():
            raise ValueError("actions that are not finite")
        return actions

    @property
    def covered(self) -> float:
        """Seconds from an observation to when the last action of its answer is due."""
        return 0.0 if self.newest is None else (len(self.newest.actions) - 1) * self.period

    @property
    def moves(self) -> float:
        """Seconds from the newest observation that was answered to when the last action is due with which it moves the
        robot. Of an epoch before this one that is the last action that was executed."""
        return self._executed if self.newest is None else self.covered

    def ahead(self, step: int, now: float) -> np.ndarray:
        """(n, A) actions of the newest answer for this step and those after it.

        Raises:
            Early: If it is not certain when they act.
        """
        try:
            first = self.next(step, now)
        except Early:
            raise
        except Stale:
            return np.zeros((0, self.dims or 0))
        assert self.newest is not None
        return self.newest.actions[first:].copy()

    def next(self, step: int, now: float) -> int:
        """Index of the action of the newest answer that is for this step.

        Raises:
            Stale: If none may act; `Early` if one may later.
        """
        newest = self.newest
        if newest is None:
            raise Stale("nothing is answered yet")
        # By steps; where the loop was held up for more than a period, by time: what it missed is left out.
        late = math.ceil((now - newest.time) / self.period - 1 - EPSILON)
        index = max(step - newest.step, late, newest.done + 1)
        last = len(newest.actions) - 1
        if newest.done == last:
            raise Stale("all actions of the newest answer are executed")
        index = min(index, last)
        by_time = now - newest.time - index * self.period
        age = max(by_time, (step - newest.step - index) * self.period)
        if not age <= self.max_age + EPSILON:
            raise Stale(f"the newest action is {age:.3f} s old, max_age is {self.max_age:g} s")
        if by_time < -self.max_age - EPSILON:
            raise Early(f"the next action is due in {-by_time:.3f} s: steps come faster than the control rate")
        if self._taken - now > self.EARLY * self.period + EPSILON:
            raise Early("steps come faster than the control rate")
        return index

    def take(self, step: int, now: float) -> tuple[Answered, int]:
        """The newest answer and the index of `next`, which is not offered again, whatever comes of it."""
        index = self.next(step, now)
        assert self.newest is not None
        self.newest.done = index
        self._taken = max(self._taken, now) + self.period
        return self.newest, index
