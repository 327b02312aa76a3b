"""Who waits for whom: the two control modes of the paper (section 5.4), for one environment.

Blocking: the world stands still while the model thinks. Real time: the world continues at its rate; an action takes
effect when it is there, and until then the last one is held. Slow inference then shows as late actions, which is how
8-bit quantization lost in the paper.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np

from ..choices_openvla import check_choice
from ..policy import check_numbers


EPSILON = 1e-9  # times are sums of floats


class BlockingControl:
    """Every observation gets its action, whatever it takes. Of a policy that gives several actions, all (or the first
    `execute`) are executed before it looks again: a receding horizon."""

    def __init__(self, execute: int | None = None) -> None:
        self._begin, self._actions, self._execute = 0, np.zeros((0, 0)), execute

    def wants_action(self, step: int) -> bool:
        """Whether the model looks at the observation of `step` (0, 1, ...)."""
        return step >= self._begin + len(self._actions)

    def give(self, step: int, action: np.ndarray, latency: float) -> None:
        """The model's answer to the observation of `step`: (A,), or (K, A) for K steps; a `ValueError` otherwise, or if
        `check_numbers` refuses it."""
        self._begin, self._actions = step, _chunk(action)[: self._execute]

    def committed(self, step: int, latency: float, chunk: int = 1) -> np.ndarray | None:
        """What is executed while the model thinks about `step`: nothing, the world waits."""
        return None

    def action(self, step: int) -> np.ndarray:
        """(A,) what is executed at `step`."""
        return self._actions[step - self._begin]


LATE = ("repeat", "still")
CHUNKING = ("switch", "hold", "ensemble", "prefix")
ENSEMBLE_DECAY = 0.01  # of the weights exp(-0.01 i) of answers, i = 0 the oldest (ACT, arXiv 2304.13705)


class RealtimeControl:
    """A world that steps every 1 / hz seconds, and a model that takes `latency` seconds for every answer.

    The model begins again as soon as it is ready, with the newest observation, and never twice with the same one. Its
    answer takes effect at the first step at or after the moment it is there. With a latency of 0 and one action for
    each observation this is blocking control.

    The actions of a chunk are those of the steps after its observation, so that a late answer begins with the action of
    its step (with its last one where all are late), and each further step has the next one. A step for which no action
    is left is late: `late` says what happens then.

    Args:
        hz: Steps of the world in a second.
        start: (A,) what is executed until the first answer is there; standstill, usually.
        late: "repeat" the last action, or stand "still": relative dimensions become 0, others keep their value.
        relative: (A,) bool, dimensions of an action that are changes and not places. Default: all but the last.
        chunking: One of `CHUNKING`.
        execute: Of each chunk only the first so many actions count. Default: all.
    """

    def __init__(
        self,
        hz: float,
        start: np.ndarray,
        late: str = "repeat",
        relative: np.ndarray | None = None,
        chunking: str = "switch",
        execute: int | None = None,
    ):
        if not 0 < hz < math.inf:
            raise ValueError(f"hz={hz}: the world needs a finite rate above 0.")
        check_choice("late", late, LATE)
        check_choice("chunking", chunking, CHUNKING)
        self._chunking, self._execute = chunking, 1 if chunking == "hold" else execute
        self._answers: list[tuple[int, np.ndarray]] = []  # (step seen, actions) of those in effect, for the ensemble
        self.period, self._current = 1.0 / hz, check_numbers(start)
        self._late = late
        self._relative = np.arange(len(self._current)) < len(self._current) - 1 if relative is None else relative
        self._ready = 0.0  # when the model is free
        self._coming: list[tuple[float, int, np.ndarray]] = []  # (time of effect, step seen, actions), in order
        self._actions = np.zeros((0, 0))  # of the answer in effect
        self._next = 0  # which of them comes next

    def begin_at(self, start: np.ndarray) -> None:
        """Replace `start` before the first step: where a robot stands may not be known until an episode has begun."""
        self._current = check_numbers(start)

    def wants_action(self, step: int) -> bool:
        # The model gets free before the next observation is there: this one is the newest it can have.
        return self._ready < (step + 1) * self.period - EPSILON

    def give(self, step: int, action: np.ndarray, latency: float) -> None:
        """See `BlockingControl.give`; `latency` in seconds."""
        if not 0 <= latency < math.inf:
            raise ValueError(f"latency={latency}: expected seconds, 0 or more.")
        actions = _chunk(action)[: self._execute]
        self._ready = max(self._ready, step * self.period) + latency
        self._coming.append((self._ready, step, actions))

    def committed(self, step: int, latency: float, chunk: int = 1) -> np.ndarray | None:
        """(n, A) what is executed from `step` on, until an answer that takes `latency` seconds is there: before the
        first answer `start`. At most one step less than a chunk holds; None unless `chunking` is "prefix".

        Args:
            chunk: Steps that the first answer will hold. With 1 nothing is committed before it.
        """
        if self._chunking != "prefix":
            return None
        known = max(len(self._actions), *(len(actions) for *_, actions in self._coming), 0)
        longest = known or min(chunk, self._execute or chunk)
        there = max(self._ready, step * self.period) + latency
        steps = max(0, math.ceil((there - EPSILON) / self.period) - step)
        ahead = copy.deepcopy(self)
        decided = [ahead.action(number) for number in range(step, step + min(steps, longest - 1))]
        return np.stack(decided) if decided else None

    def action(self, step: int) -> np.ndarray:
        """(A,) what is executed at `step`; ask for each step once, in order."""
        while self._coming and self._coming[0][0] <= step * self.period + EPSILON:
            _, seen, self._actions = self._coming.pop(0)
            self._next = min(step - seen, len(self._actions) - 1)
            self._answers.append((seen, self._actions))
        self._answers = [(seen, actions) for seen, actions in self._answers if step < seen + len(actions)]
        if self._chunking == "ensemble" and self._answers:
            answers = np.stack([actions[step - seen] for seen, actions in self._answers])
            weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(answers)))
            self._current = weights @ answers / weights.sum()
            self._next += 1  # the newest answer goes on as well: where a gap follows, it is not executed from before
        elif self._next < len(self._actions):
            self._current = self._actions[self._next]
            self._next += 1
        elif self._late == "still":
            self._current = np.where(self._relative, 0.0, self._current)
        return self._current


def _chunk(action: np.ndarray) -> np.ndarray:
    """(K, A) of the answer of a policy."""
    actions = np.atleast_2d(check_numbers(action))
    if actions.ndim != 2 or not actions.size:
        raise ValueError(f"Actions of shape {np.shape(action)}: expected (A,), or (K, A) for K steps.")
    return actions


def effective_delays(hz: float, latency: float, steps: int) -> Sequence[int | None]:
    """How many steps old the observation is that the action of each step answers; None before the first answer.

    For reports and tests: 0 everywhere is blocking control.
    """
    control = RealtimeControl(hz, np.array([-1]))
    delays: list[int | None] = []
    for step in range(steps):
        if control.wants_action(step):
            control.give(step, np.array([step]), latency)
        seen = int(control.action(step)[0])
        delays.append(None if seen < 0 else step - seen)
    return delays
