"""The numbers of an action, one by one: their names, which are grippers, which are scaled, and how often each changes.

Shapes: N steps, A dimensions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np


TOLERANCE = 0.1  # recorded positions miss the ends of a range a little
RARE = 0.01  # share of the steps that the quantiles q01 and q99 each leave out
BINS = 255  # intervals that an action token can stand for
TWO_ARMS = (14, 16)  # dimensions of two arms of six or seven joints and a gripper
YES, NO = ("1", "true", "t", "yes"), ("0", "false", "f", "no")


def dimension_names(features: Mapping[str, Mapping], keys: Sequence[str | None]) -> list[str] | None:
    """Names of the columns of `keys` side by side, as the features of a LeRobot dataset give them; None where one of
    them lacks names for its columns."""
    names: list[str] = []
    for key in keys:
        feature: Mapping = features.get(key, {}) if key else {}
        given: Any = feature.get("names")
        if isinstance(given, Mapping):  # {"motors": [...]}, or {name: index}
            lists = [value for value in given.values() if isinstance(value, list | tuple)]
            numbers = sorted(value for value in given.values() if type(value) is int)
            if len(numbers) == len(given) > 0:  # in the order of the numbers, not of the file
                in_a_row = numbers == [*range(numbers[0], numbers[0] + len(numbers))]
                given = sorted(given, key=given.__getitem__) if in_a_row else None
            else:
                given = lists[0] if len(lists) == 1 else list(given) if not lists else None
        width = int(np.prod(feature.get("shape") or [1]))
        if not isinstance(given, list | tuple) or len(given) != width:
            return None
        names += map(str, given)
    return names if names and len(set(names)) == len(names) else None


def default_grippers(dims: int, names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Dimensions that a gripper is looked for in: those that are named so; without names the last, and of two arms (14
    or 16) that of the first as well."""
    named = tuple(dim for dim, name in enumerate(names or ()) if "grip" in name.lower())
    if 0 < len(named) <= 2 and len(names or ()) == dims:
        return named
    return (dims // 2 - 1, dims - 1) if dims in TWO_ARMS else (dims - 1,) if dims > 1 else ()


def parse_grippers(given: str | int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Numbers of dimensions from "6,13", "-1", [6, 13], or "none" (there is no gripper); None where nothing is given.

    Raises:
        ValueError: If it is none of these.
    """
    return _parse_dims(given, "gripper_dims")


def parse_absolute(given: str | int | Sequence[int] | None) -> tuple[int, ...] | Literal["all"] | None:
    """The same of dimensions that are places, or "all" of them."""
    if isinstance(given, str) and given.strip().lower() == "all":
        return "all"
    return _parse_dims(given, "absolute_dims")


def _parse_dims(given: str | int | Sequence[int] | None, option: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    every = ", or all" * (option == "absolute_dims")
    parts: Sequence[Any] = [given] if isinstance(given, int) else given
    if isinstance(given, str):
        parts = [] if given.strip().lower() == "none" else given.split(",")
        if not given.strip():
            raise ValueError(f"{option} is empty: give numbers of dimensions such as 6 or 6,13, or none{every}.")
    try:
        dims = [int(part) for part in parts if not isinstance(part, bool) and float(part) == int(part)]
        if len(dims) != len(parts):
            raise ValueError("not whole numbers")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{option}={given!r}: expected numbers of dimensions such as 6 or 6,13 (counted from 0), or none{every}."
        ) from error
    return tuple(dims)


def check_dims(given: Sequence[int], dims: int, origin: str, option: str = "gripper_dims") -> tuple[int, ...]:
    """The dimensions counted from 0, each once. Raises ValueError for one that an action does not have."""
    for dim in given:
        if not -dims <= dim < dims:
            raise ValueError(f"{origin}: {option}={dim}, but actions have {dims} dimensions (0 to {dims - 1}).")
    return tuple(sorted({dim % dims for dim in given}))


def parse_mask(given: str | Sequence[Any] | None) -> list[bool] | None:
    """(A,) which dimensions are scaled, from [True, False], [1, 0], "1,0" or "true,false".

    Raises:
        ValueError: If an entry is neither.
    """
    if given is None:
        return None
    parts: Any = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, list | tuple | np.ndarray) or not len(parts):
        raise ValueError(f"mask={given!r}: expected true or false for each dimension, such as 1,1,1,1,1,1,0.")
    words = [str(part).strip().lower() for part in parts]
    if unknown := [word for word in words if word not in YES + NO]:
        raise ValueError(f"mask={given!r}: '{unknown[0]}' is neither true nor false (1 or 0).")
    return [word in YES for word in words]


def shares(values: np.ndarray, least: np.ndarray, most: np.ndarray, mask: Sequence[bool]) -> dict[str, list]:
    """What part of the steps (N, A) does what, for each dimension; `least` and `most`, (A,) each, become -1 and 1.

    Returns:
        `changed`: differs from the usual value (the median) by more than one bin of the range that the data takes;
        `at_ends`: within a tenth of that range of its least or greatest value, as a gripper is;
        `clipped`: more than one bin outside of what tokens cover with these statistics.
    """
    low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
    first, last = np.where(mask, least, -1.0), np.where(mask, most, 1.0)
    near, bin_, grid = TOLERANCE * (high - low), (high - low) / BINS, (last - first) / BINS + 1e-6
    usual = np.median(values, axis=0)
    return {
        "changed": (abs(values - usual) > bin_).mean(0).tolist(),
        "at_ends": ((values <= low + near) | (values >= high - near)).mean(0).tolist(),
        "clipped": ((values < first - grid) | (values > last + grid)).mean(0).tolist(),
    }


def loses_rare_values(values: np.ndarray, q01: Sequence[float], q99: Sequence[float]) -> np.ndarray:
    """(A,) bool: dimensions that move, but so rarely that clipping to [q01, q99] would take most of it away, such as a
    gripper that closes in under 1% of the steps.

    Where the rest stands still (q01 == q99) any other value counts. Elsewhere values far away have to last for two
    steps at least: outliers of single steps are what the quantiles are there to clip.
    """
    low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
    first, last, bin_ = np.asarray(q01), np.asarray(q99), (high - low) / BINS
    away = abs(values - np.median(values, axis=0)) > bin_
    lost = (values < first - bin_) | (values > last + bin_)
    lasting = 2 * (lost[1:] & lost[:-1]).sum(0) >= lost.sum(0)
    # Rounding is relative to the usual values; one far outlier must not make all others look still beside it.
    usual = np.maximum(abs(first), abs(last))
    still = last - first <= 1e-6 * np.maximum(usual, np.minimum(np.maximum(abs(low), abs(high)), 1))
    return (low < high) & (2 * (lost & away).sum(0) > away.sum(0)) & (still | lasting)


def in_two_states(values: np.ndarray) -> bool:
    """Whether (N,) values are mostly near their two ends, as those of a gripper and unlike those of a joint."""
    low, high = values.min(), values.max()
    near = TOLERANCE * (high - low)
    return bool(low < high and ((values <= low + near) | (values >= high - near)).mean() >= 0.5)


def default_mask(
    actions: np.ndarray, grippers: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> list[bool]:
    """Which dimensions of (N, A) actions are scaled: all but grippers whose values lie in [0, 1] already, as in the
    original, where 1 is open and 0 closed.

    Of dimensions that nobody called a gripper (see `default_grippers`) it is asked that they look like one: of seven
    dimensions, that they reach both ends; otherwise that they are mostly near them. A joint, a finger's width in metres
    or a velocity is scaled. So is a gripper that never moves: constant dimensions are 0 in training, and only scaling
    brings their value back (unscaled, a gripper that was always open would close).

    Args:
        grippers: Dimensions that are grippers for certain.
        names: Of the dimensions, where they are known.
    """
    dims = actions.shape[1]
    known = grippers is not None or any("grip" in name.lower() for name in names or ())
    mask = [True] * dims
    for dim in default_grippers(dims, names) if grippers is None else grippers:
        values = actions[:, dim]
        low, high = float(values.min()), float(values.max())
        reaches_both = dims == 7 and low <= TOLERANCE and high >= 1 - TOLERANCE
        alike = known or reaches_both or in_two_states(values)
        mask[dim] = not (0 <= low < high <= 1 and high >= 0.5 and alike)
    return mask
