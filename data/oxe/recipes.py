"""The language that `standardize.py` describes datasets in: fields of a trajectory, and recipes that arrange them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...choices_openvla import closest
from .conversions import Trajectory


@dataclass(frozen=True)
class Field:
    """An array of the trajectory, by its path; `field[a:b]` are columns of it, `then` what is done to them."""

    path: tuple[str, ...]
    columns: slice | int | None = None
    functions: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()

    def __getitem__(self, columns: slice | int) -> "Field":
        return replace(self, columns=columns)

    def then(self, *functions: Callable[[np.ndarray], np.ndarray]) -> "Field":
        return replace(self, functions=self.functions + functions)

    def __call__(self, trajectory: Trajectory) -> np.ndarray:
        """Raises: `KeyError` that names the missing field and the nearest of those present."""
        value: Any = trajectory
        for depth, key in enumerate(self.path):
            known = list(value) if isinstance(value, Mapping) else []
            if key not in known:
                where = "/".join(self.path[:depth]) or "the trajectory"
                there = f"Present: {', '.join(known)}." if isinstance(value, Mapping) else "It is an array."
                raise KeyError(f"'{key}' is missing in {where}.{closest(key, known)} {there}")
            value = value[key]
        if self.columns is not None:
            value = as_columns(value)[..., self.columns]
        for function in self.functions:
            value = function(value)
        return value


def as_columns(array: np.ndarray) -> np.ndarray:
    """(T,) -> (T, 1); more dimensions stay. Datasets record single values both ways."""
    return array[:, None] if array.ndim == 1 else array


# A field as it is, or columns side by side; a number is a column of that value.
Parts = Field | tuple[Field | int, ...]


def _assemble(parts: Parts, trajectory: Trajectory) -> np.ndarray:
    """Columns side by side, (T, sum of widths); integers and booleans become float32."""
    if isinstance(parts, Field):
        return parts(trajectory)
    arrays = {index: part(trajectory) for index, part in enumerate(parts) if isinstance(part, Field)}
    num_steps = len(next(iter(arrays.values())))
    if any(len(array) != num_steps for array in arrays.values()):
        fields = [part.path for part in parts if isinstance(part, Field)]
        lengths = {"/".join(path): len(array) for path, array in zip(fields, arrays.values())}
        raise ValueError(f"Fields of one trajectory differ in their number of steps: {lengths}.")
    arrays |= {i: np.full(num_steps, part, dtype=np.float32) for i, part in enumerate(parts) if isinstance(part, int)}
    columns = [as_columns(arrays[index]) for index in range(len(parts))]
    return np.concatenate([c if c.dtype.kind == "f" else c.astype(np.float32) for c in columns], axis=-1)


@dataclass(frozen=True)
class Recipe:
    """How one dataset's trajectories become standard ones. Fields not named stay as they are.

    Everything is read from the trajectory as recorded (after `before`), so the order does not matter. `depth` fields
    are made where their source is there, as most users do not read depth. `swapped_views` are two cameras that take
    each other's place in half of the trajectories, so that training on one view sees both.
    """

    action: Parts = ()
    observation: Mapping[str, Parts] = field(default_factory=dict)
    language: Field | None = None
    depth: Mapping[str, Field] = field(default_factory=dict)
    renamed: tuple[str, ...] = ()
    swapped_views: tuple[str, str] | None = None
    before: Callable[[Trajectory], Trajectory] | None = None
    after: Callable[[Trajectory], Trajectory] | None = None

    def __call__(self, trajectory: Trajectory, rng: np.random.Generator | None = None) -> Trajectory:
        """The standard trajectory. The input is not modified; unchanged arrays are shared with it.

        Args:
            trajectory: Nested dict of arrays (T, ...) with the fields of the dataset.
            rng: Draws whether `swapped_views` are swapped; without it they stay as recorded.

        Raises:
            KeyError: If a field is missing (the message names the nearest).
            ValueError: If fields differ in length.
        """
        recorded = self.before(trajectory) if self.before else trajectory
        known = recorded.get("observation", {})
        observation = {key: value for key, value in known.items() if key not in self.renamed}
        observation |= {name: _assemble(parts, recorded) for name, parts in self.observation.items()}
        observation |= {name: source(recorded) for name, source in self.depth.items() if source.path[-1] in known}
        if self.swapped_views and rng is not None and rng.random() < 0.5:
            one, other = self.swapped_views
            if one in observation and other in observation:
                observation[one], observation[other] = observation[other], observation[one]
        standard = {**recorded, "observation": observation}
        if self.action:
            standard["action"] = _assemble(self.action, recorded)
        if self.language:
            standard["language_instruction"] = self.language(recorded)
        return self.after(standard) if self.after else standard
