"""What a guard gives for a step of a control loop."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from .action_spec import ActionSpec
from .errors import Picklable


class State(StrEnum):
    """By the age of the newest observation that was answered; see `Guard`."""

    OK = "OK"
    DEGRADED = "DEGRADED"
    STALLED = "STALLED"
    DEAD = "DEAD"


@dataclass(frozen=True)
class Command:
    """What to execute in this step.

    action: (A,) in the units of the robot. Of a `NoAction` None.
    source: "answer", "hold" (the fallback), or "none".
    state: See `Guard`.
    age: Seconds since the newest observation that was answered was seen; before the first, since the first step.
    id, index, answered: Of the answer: the request, which of its actions, and (A,) what it said before limits; None
        where no answer was for this step.
    reason: Why there is a fallback; empty of an answer.
    limited: Names of the dimensions that were cut to their limits.
    """

    action: np.ndarray | None
    source: str
    state: State
    age: float
    id: int | None = None
    index: int | None = None
    answered: np.ndarray | None = None
    reason: str = ""
    limited: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As a line of the audit has it."""
        lists = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {**vars(self), **lists}


class NoAction(Picklable, RuntimeError):
    """Nothing may be executed in this step; stop the arm by its own means. `command` says the state and why."""

    def __init__(self, message: str, command: Command):
        super().__init__(message)
        self.command = command


def held(spec: ActionSpec, last: np.ndarray | None) -> np.ndarray | None:
    """(A,) no motion: 0 where a number is a change, else as it was last; None where that is not known."""
    if last is None:
        return np.zeros(spec.action_dim) if all(spec.relative) else None
    return np.where(spec.relative, 0.0, last)
