"""Limits of a robot's motion, by dimension: what an action may be at most, whatever a model says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .action_spec import ActionSpec
from .checks import is_number


@dataclass(frozen=True)
class Limits:
    """What an action may be at most. Dimensions are named as in `ActionSpec.names`; those not named are not limited.

    Args:
        step: name -> the largest change of one step, above 0; `math.inf`: any. Of a relative dimension its absolute
            value, of an absolute one its distance from the target before (without one, or after a `NoAction`, from
            `position`).
        place: name -> (lowest, highest) place: of an absolute dimension the action itself, of a relative one `position`
            and the action together. A robot that stands outside (an absolute one: whose target before is outside) may
            stay or come back, not go further out.
        refuse: Whether an action beyond a limit is refused completely; otherwise it is cut to the limit.
        turn: name -> what a full turn is, `2 * math.pi` or 360: of an absolute angle, whose step is then measured the
            short way round. Without it a step from 179 to -179 degrees is one of -358, and cut to a turn backwards.
    """

    step: Mapping[str, float] = field(default_factory=dict)
    place: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refuse: bool = False
    turn: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for field_name, given in (("step", self.step), ("place", self.place), ("turn", self.turn)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{field_name}={given!r:.100}: expected a mapping, {{name of a dimension: ...}}.")
        if not isinstance(self.refuse, bool):
            raise ValueError(f"refuse={self.refuse!r:.100}: expected True or False.")
        for name, step in self.step.items():
            if not (is_number(step) and step > 0):
                raise ValueError(f"step={{{name!r}: {step!r}}}: expected the largest change of one step, above 0.")
        for name, bounds in self.place.items():
            pair = isinstance(bounds, Sequence | np.ndarray) and len(bounds) == 2 and all(map(is_number, bounds))
            # No place at all is within (inf, inf): an action would be cut to it.
            if not (pair and float(bounds[0]) <= float(bounds[1]) and bounds[0] < math.inf and bounds[1] > -math.inf):
                raise ValueError(f"place={{{name!r}: {bounds!r}}}: expected (lowest, highest).")
        for name, turn in self.turn.items():
            if not (is_number(turn) and 0 < turn < math.inf) or name not in self.step or name in self.place:
                raise ValueError(
                    f"turn={{{name!r}: {turn!r}}}: expected a full turn, above 0, of an angle whose step is limited "
                    "and whose place is not: within a place there is no way round."
                )
            if float(self.step[name]) >= float(turn) / 2:  # as of degrees beside radians
                raise ValueError(
                    f"step={{{name!r}: {self.step[name]!r}}} with turn={{{name!r}: {turn!r}}} limits nothing: no "
                    "change is more than half a turn. Give both in the unit of the action."
                )
        # Copies: what is changed later in those that were given would not be checked. Of Python's: sums with float32
        # would be as coarse.
        object.__setattr__(self, "step", {name: float(step) for name, step in self.step.items()})
        pairs = {name: (float(bounds[0]), float(bounds[1])) for name, bounds in self.place.items()}
        object.__setattr__(self, "place", pairs)
        object.__setattr__(self, "turn", {name: float(turn) for name, turn in self.turn.items()})

    def check(self, spec: ActionSpec) -> None:
        """Raise a `ValueError` for names that the robot's actions do not have, and for turns of changes."""
        unknown = sorted({*self.step, *self.place} - {*spec.names})
        if unknown:
            raise ValueError(f"limits of {', '.join(unknown)}: the dimensions are {', '.join(spec.names)}.")
        changes = [name for name in self.turn if spec.relative[spec.names.index(name)]]
        if changes:
            raise ValueError(f"turn of {', '.join(changes)}: a change is no angle to turn from, leave it out.")

    def apply(
        self, action: np.ndarray, spec: ActionSpec, last: np.ndarray | None, position: np.ndarray | None
    ) -> tuple[np.ndarray, list[str]]:
        """(A,) what may be executed, and the names of the dimensions that were cut.

        Args:
            last: (A,) what was executed before; None: nothing.
            position: (A,) where the robot stands, in the units of the actions, as far as it is known (NaN elsewhere).

        Raises:
            ValueError: If a limit cannot be checked, because it is not known where the robot stands, or an angle is
                beyond its full turn.
        """
        action = action.astype(np.float64)  # of float32 or whole numbers, what is cut would be rounded
        allowed, cut = action.copy(), []
        for dim, name in enumerate(spec.names):
            if name not in self.step and name not in self.place:
                continue
            here = np.nan if position is None else float(position[dim])
            relative = spec.relative[dim]
            if relative:
                before = 0.0
            else:
                before = here if last is None else float(last[dim])
            place = self.place.get(name, (-np.inf, np.inf))
            if relative and name in self.place:
                if not np.isfinite(here):
                    raise ValueError(f"{name} has limits of its place: step(..., position=...) has to say where it is")
                place = (min(place[0] - here, 0.0), max(place[1] - here, 0.0))
            elif np.isfinite(before):  # cut to the nearest place, a robot outside would jump as far as that
                place = (min(place[0], before), max(place[1], before))
            value = float(np.clip(action[dim], *place))
            if self.step.get(name, math.inf) < math.inf:
                if not np.isfinite(before):
                    raise ValueError(f"{name} has a limit of its step: start or position has to say where it is")
                value = self._near(before, value, name)
            if not math.isclose(value, action[dim], rel_tol=1e-9, abs_tol=1e-12):  # sums of floats: 0.7 + 0.1 < 0.8
                allowed[dim] = value
                cut.append(name)
        return allowed, cut

    def _near(self, before: float, value: float, name: str) -> float:
        """The value of a step that its limit allows; of an angle in the turn that is counted in.

        Raises:
            ValueError: If an angle is beyond a full turn.
        """
        step, turn = self.step[name], self.turn.get(name)
        if turn is None:
            return float(np.clip(value, before - step, before + step))
        if max(abs(before), abs(value)) > turn * (1 + 1e-9):  # degrees beside radians: cut, it would jump
            raise ValueError(
                f"{name} goes from {before:g} to {value:g}, beyond its full turn of {turn:g}: of another unit, or of a "
                "joint that counts its turns, which has none"
            )
        change = (value - before + turn / 2) % turn - turn / 2
        if abs(change) <= step:
            return value
        # pi of float32 is above that of float64, and no angle of a turn that is counted from 0
        lowest = 0.0 if max(before, value) > turn / 2 * (1 + 1e-6) else -turn / 2
        return (before + math.copysign(step, change) - lowest) % turn + lowest

    def ahead(
        self, actions: np.ndarray, spec: ActionSpec, last: np.ndarray | None, position: np.ndarray | None
    ) -> np.ndarray:
        """(n, A) the next actions, (m, A), as they will be executed: cut to the limits, and only as many as are certain
        now. The first that will be refused ends them, and so does, after the first step, a limit of the place of a
        relative dimension: where the robot stands then is not known.

        Args:
            last, position: As of `apply`, before the first of them.
        """
        certain: list[np.ndarray] = []
        for action in actions:
            try:
                action, cut = self.apply(action, spec, last, position)
            except ValueError:
                break
            if cut and self.refuse:
                break
            certain.append(action)
            last, position = action, None
        return np.array(certain).reshape(-1, actions.shape[1])
