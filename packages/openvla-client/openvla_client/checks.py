"""Numbers that a caller gave, checked: text and NaN are refused here and compared nowhere."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


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
    return given


def numbers(given: Sequence[float] | np.ndarray | None, name: str, dims: int, finite: bool = True) -> np.ndarray | None:
    """(A,) float64 of what a caller gave, or None.

    Raises:
        ValueError: If it has another shape or, where that is asked, is not finite.
    """
    if given is None:
        return None
    array = np.array(given, dtype=np.float64)
    if array.shape != (dims,) or (finite and not np.isfinite(array).all()):
        raise ValueError(f"{name}={given!r:.200}: expected {dims} {'finite ' if finite else ''}numbers.")
    return array
