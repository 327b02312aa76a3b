"""A name that is not known is answered with the nearest one that is; and names that several files know.

The standard library alone.
"""

import difflib
from collections.abc import Iterable
from typing import Any


IMAGE_RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")


def closest(name: Any, known: Iterable[Any]) -> str:
    """The entry of `known` nearest to `name`, whatever the case, as a ready-made hint (' Did you mean ...?'); an empty
    string where none is near."""
    near = nearest(name, known, 0.6)
    return f" Did you mean '{near}'?" if near else ""


def nearest(name: Any, known: Iterable[Any], likeness: float = 0.85) -> str | None:
    """The entry of `known` that `name` is like, whatever the case; None if none is.

    Args:
        likeness: From 0 to 1; by default one is the other misspelled.
    """
    folded = {str(entry).casefold(): str(entry) for entry in known}
    matches = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=likeness)
    return folded[matches[0]] if matches else None


def check_choice(field: str, value: Any, known, otherwise: str = "") -> None:
    """Raise a `ValueError` that names `field`, the value given, the values known and the nearest of them.

    Args:
        otherwise: What to do instead of choosing a known value, for the message.
    """
    if value not in known:
        raise ValueError(
            f"{field}={value!r} is unknown.{closest(value, known)} Known: {', '.join(map(str, known))}."
            + (f" {otherwise}" if otherwise else "")
        )
