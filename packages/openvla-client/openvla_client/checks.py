"""Numbers that a caller gave, checked: text and NaN are refused here and compared nowhere."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np


def is_number(value: object) -> TypeGuard[float]:
    """A real number that a float can hold, NaN and infinity too. numpy counts complex numbers and times as numbers."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool | np.timedelta64):
        return False
    return not isinstance(value, int) or abs(value) < 2**1023


def is_row(given: Any) -> TypeGuard[Sequence[Any]]:
    """A list, or what is used as one."""
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | memoryview)


def has_gaps(given: Any) -> bool:
    """Whether something stands among numbers that is none: true or false, which numpy makes 1 and 0 of, or what is
    masked, of which it takes what is below the mask."""
    if is_row(given):
        return any(map(has_gaps, given))
    return np.ma.is_masked(given) if isinstance(given, np.ndarray) else isinstance(given, bool | np.bool_)


def seconds(name: str, given: Any, least: float = 0.0, *, zero: bool = True) -> float:
    """`given`, if it is a finite number of `least` or more.

    Args:
        zero: Whether 0 is allowed.

    Raises:
        ValueError: If it is none.
    """
    if not is_number(given) or not least <= given < math.inf or not (given or zero):
        raise ValueError(
            f"{name}={given!r:.100}: expected {least:g} seconds or more." if zero else
            f"{name}={given!r:.100}: expected seconds, above 0."
        )  # fmt: skip
    return float(given)  # of float32, seconds of a machine that runs for days are too coarse


def numbers(
    given: Sequence[float] | np.ndarray | None,
    name: str,
    dims: int | None,
    finite: bool = True,
    names: Sequence[str] = (),
) -> np.ndarray | None:
    """(A,) float64 of what a caller gave, or None; `dims` None: as many as there are. `names`: of the numbers, to say.

    Raises:
        ValueError: If it is no row of so many numbers or, where that is asked, is not finite.
    """
    if given is None:
        return None
    try:
        array = np.array(given)
    except (ValueError, TypeError):  # rows of several lengths
        array = np.array(None)
    good = array.dtype.kind in "iuf" and array.shape == (array.size if dims is None else dims,)  # no texts
    good = good and not has_gaps(given)
    if not good or (finite and not np.isfinite(array).all()):
        expected = f"{'' if dims is None else f'{dims} '}{'finite ' if finite else ''}numbers"
        expected += f" ({', '.join(names)}{'' if finite else '; NaN where one is unknown'})" if names else ""
        raise ValueError(f"{name}={given!r:.200}: expected {expected}.")
    return array.astype(np.float64)


def whole(name: str, given: Any, least: int) -> int:
    """`given`, if it is a whole number of `least` or more, and below 2**63.

    Raises:
        ValueError: If it is none.
    """
    if not is_number(given) or isinstance(given, float | np.floating) or not least <= given < 2**63:
        raise ValueError(f"{name}={given!r:.100}: expected a whole number, {least} or more.")
    return int(given)
