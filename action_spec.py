"""What the numbers of an action mean, and a predicted action in words.

The meaning travels with the statistics of a dataset (`{dataset: {"action": ..., "action_spec": ...}}`): from readers
and options through training to the model card, `openvla predict`, evaluation and serving.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


POSE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
CONVENTION = "1 open, 0 closed"  # of grippers, whatever the recording had, but of those in a range of their own
ANGLES = ("roll", "pitch", "yaw", "rx", "ry", "rz")  # names of numbers that are a turn about an axis
MEANINGS = ("translation",) * 3 + ("rotation",) * 3 + (CONVENTION,)


def action_names(action_dim: int) -> list[str]:
    """Names of the numbers of an action: the end-effector pose and the gripper for seven, `action[i]` otherwise."""
    return list(POSE_NAMES) if action_dim == len(POSE_NAMES) else [f"action[{index}]" for index in range(action_dim)]


@dataclass(frozen=True)
class ActionSpec:
    """The meaning of an action of A numbers.

    names: Of the numbers.
    relative: Whether each is a change, of which 0 is no motion, and not a place.
    grippers: Which of them are grippers, 1 open and 0 closed: places, never relative.
    frame: In which frame translation and rotation are, as the data says ("base", "end effector"); None: unknown.
    unit: Of the numbers, in words; None: unknown.
    hz: Actions in a second; None: unknown.
    as_recorded: Grippers in a range of their own (0 to 100, metres), not 1 open and 0 closed.
    stated: Whether somebody said which numbers are changes; else they are taken for such, a guess.
    """

    names: tuple[str, ...]
    relative: tuple[bool, ...]
    grippers: tuple[int, ...] = ()
    frame: str | None = None
    unit: str | None = None
    hz: float | None = None
    as_recorded: tuple[int, ...] = ()
    stated: bool = True

    def __post_init__(self) -> None:
        dims = len(self.names)
        if not dims or len(self.relative) != dims or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"action_spec: {dims} names and {len(self.relative)} entries of relative, one for each.")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(
                f"action_spec: {', '.join(map(repr, twice))} names several numbers: give each its own name."
            )
        if not all(isinstance(one, bool) for one in self.relative):  # "false" would count as true, and 0 as no motion
            raise ValueError(f"action_spec: relative={list(self.relative)}, expected true or false of each number.")
        # A mask of true and false would be the dimensions 1 and 0, which then stand still as 1.
        if not all(isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < dims for dim in self.grippers):
            raise ValueError(f"action_spec: grippers={list(self.grippers)}, expected dimensions from 0 to {dims - 1}.")
        changes = [self.names[dim] for dim in self.grippers if self.relative[dim]]
        if changes:  # of which 0 would be no motion, and closed
            raise ValueError(f"action_spec: {', '.join(changes)}: grippers are places ({CONVENTION}), not relative.")
        if not {*self.as_recorded} <= {*self.grippers}:
            raise ValueError(f"action_spec: as_recorded={list(self.as_recorded)}, expected some of its grippers.")
        if not isinstance(self.stated, bool):
            raise ValueError(f"action_spec: stated={self.stated!r}, expected true or false.")
        for name, words in (("frame", self.frame), ("unit", self.unit)):
            if not isinstance(words, str | None):
                raise ValueError(f"action_spec: {name}={words!r:.100}, expected words.")
        if self.hz is not None and not (
            isinstance(self.hz, (int, float)) and not isinstance(self.hz, bool) and 0 < self.hz < 1e6
        ):
            raise ValueError(f"action_spec: hz={self.hz!r}, expected actions in a second.")

    @property
    def action_dim(self) -> int:
        return len(self.names)

    @property
    def absolute_angles(self) -> tuple[int, ...]:
        """Dimensions that are angles, by their names, and places: near half a turn they jump by a full one, and a mean
        of two of them may point the other way."""
        return tuple(i for i, name in enumerate(self.names) if name in ANGLES and not self.relative[i])

    @property
    def places(self) -> list[str]:
        """Names of the numbers that are places and no grippers."""
        return [name for i, name in enumerate(self.names) if not self.relative[i] and i not in self.grippers]

    def standstill(self) -> list[float]:
        """The action that moves nothing and opens the grippers.

        Raises:
            ValueError: If a number is a place: then where the robot stands decides, and nothing here knows.
        """
        if places := [*self.places, *(self.names[dim] for dim in self.as_recorded)]:
            raise ValueError(
                f"{', '.join(places)} are places and no changes, so that no action stands still by itself: the "
                "environment has to say where the robot stands (standstill())."
            )
        return [1.0 if dim in self.grippers else 0.0 for dim in range(self.action_dim)]

    def describe(self) -> str:
        """Names, which of them are places, frame, unit and rate, in one line."""
        names = [
            f"{name} ({self.meaning_of_gripper(dim)})"
            if dim in self.grippers
            else name
            if self.relative[dim]
            else f"{name} (a place)"
            for dim, name in enumerate(self.names)
        ]
        said = [] if self.stated else ["that numbers are changes and not places is a guess"]
        said += [f"frame: {self.frame}"] if self.frame else []
        said += [self.unit] if self.unit else []
        said += [f"{self.hz:g} a second"] if self.hz else []
        return "; ".join([", ".join(names), *said])

    def meaning_of_gripper(self, dim: int) -> str:
        return "a gripper, as recorded" if dim in self.as_recorded else CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """As statistics hold it: lists, and what is known."""
        made: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }
        usual = {"as_recorded": [], "stated": True}  # what files of before mean, which do not have them
        return {name: value for name, value in made.items() if value is not None and value != usual.get(name)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ActionSpec":
        """Raises a `ValueError` for what `to_dict` would not give."""
        if not isinstance(content, Mapping):
            raise ValueError(f"action_spec={content!r:.200}: expected {{'names': [...], 'relative': [...], ...}}.")
        known: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        try:
            for name in ("names", "relative", "grippers", "as_recorded"):
                known[name] = tuple(known.get(name, ()))
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"action_spec={dict(content)!r:.200}: {error}") from error


def usual_spec(action_dim: int, **known: Any) -> ActionSpec:
    """What is taken where nothing is said: changes, the last number a gripper."""
    last = action_dim - 1
    names, relative = tuple(action_names(action_dim)), (True,) * last + (False,)
    return ActionSpec(**{"names": names, "relative": relative, "grippers": (last,), **known})


def spec_of(statistics: Mapping[str, Any], unnorm_key: str) -> ActionSpec:
    """The meaning of the actions of a dataset, as its statistics say it; else the usual one.

    Raises:
        ValueError: If it does not fit the statistics.
    """
    entry = statistics[unnorm_key]
    dims = len(entry["action"]["q01"])
    if entry.get("action_spec") is None:
        return usual_spec(dims)
    spec = ActionSpec.from_dict(entry["action_spec"])
    if spec.action_dim != dims:
        raise ValueError(f"action_spec of '{unnorm_key}' has {spec.action_dim} dimensions, the statistics {dims}.")
    return spec


# A prediction in words ------------------------------------------------------------------------------------------------


def action_record(prediction: Any, spec: ActionSpec | None = None, /, **context: Any) -> dict[str, Any]:
    """A prediction as plain numbers, ready for JSON.

    Args:
        prediction: `ActionPrediction` of one sample, from `predict_action(..., return_dict=True)`: (A,), or (K, A) of a
            chunk.
        spec: What the numbers mean. Default: the usual meaning.
        context: What else belongs to it: `unnorm_key`, `instruction`, `image`, `model`.

    Returns:
        `action` in the units of the dataset, `names`, `relative` (which are changes), `normalized` in [-1, 1],
        `probabilities` of the chosen tokens, `confidence` (the lowest of them), and the context. Those of a chunk are
        lists of lists. A head that gives numbers and no tokens has no probabilities.
    """
    certainty: dict[str, Any] = {}
    if prediction.token_probabilities is not None:
        probabilities = prediction.token_probabilities.astype(float).round(6)
        certainty = {"probabilities": probabilities.tolist(), "confidence": float(probabilities.min())}
    action_dim = prediction.actions.shape[-1]
    spec = usual_spec(action_dim) if spec is None else spec
    meaning = {"frame": spec.frame, "unit": spec.unit, "hz": spec.hz, "as_recorded": list(spec.as_recorded) or None}
    return {
        "action": prediction.actions.tolist(),
        "names": list(spec.names),
        "relative": list(spec.relative),
        "normalized": prediction.normalized_actions.tolist(),
        **certainty,
        **{name: value for name, value in meaning.items() if value is not None},
        **context,
    }


def action_lines(record: dict[str, Any]) -> str:
    """The record as a small table: a line for each number, or, of a chunk, a line for each step."""
    names = record["names"]
    pose = tuple(names) == POSE_NAMES and record["relative"][0]  # as published: changes of a pose
    chunk = isinstance(record["action"][0], Sequence)
    certain = "probabilities" in record
    given = record["probabilities"] if certain else np.ones(np.shape(record["action"]))
    steps = list(zip(record["action"], given)) if chunk else [(record["action"], given)]
    least = min((pair for _, row in steps for pair in zip(names, row)), key=lambda pair: pair[1])
    if chunk:
        lines = ["  step  " + "  ".join(f"{name:>8}" for name in names) + ("  least certain" if certain else "")]
        for step, (action, row) in enumerate(steps, 1):
            numbers = "  ".join(
                f"{number:>+{max(len(name), 8)}.5f}" for name, number in zip(names, action, strict=True)
            )
            lines.append(f"  {step:4}  {numbers}" + (f"  {min(row):13.0%}" if certain else ""))
    else:
        meanings = [*(MEANINGS if pose else ("",) * len(names))]
        for dim in record.get("as_recorded", ()):
            meanings[dim] = "as recorded"
        width, lines = max(map(len, names)), []
        for name, number, probability, meaning in zip(names, *steps[0], meanings, strict=True):
            shown = f"  {probability:4.0%}" if certain else ""
            lines.append(f"  {name:<{width}}  {number:+.5f}{shown}  {meaning}".rstrip())
    if certain:
        lines.append(f"confidence {record['confidence']:.0%}, that of the least certain number ({least[0]})")
    said = [f"{record['hz']:g} actions a second"] if record.get("hz") else []
    said += [f"frame: {record['frame']}"] if record.get("frame") else []
    if record.get("unnorm_key"):
        usual = "per step; metres and radians in most Open-X datasets" if pose else "which the data does not state"
        unit = record.get("unit") or usual
        said.insert(0, f"units of '{record['unnorm_key']}', {unit}")
    return "\n".join(lines + (["; ".join(said)] if said else []))
