"""A process that begins as a fork of another one has none of its threads, and its locks as they were held."""

import ctypes
import os
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any


_called: "weakref.WeakKeyDictionary[Any, Callable[[Any], None]]" = weakref.WeakKeyDictionary()


def call_in_forks(method: Callable[[], None]) -> None:
    """In each process that begins as a fork while somebody holds the object of this method."""
    assert isinstance(method, MethodType)
    _called[method.__self__] = method.__func__


def keep(kept: Any) -> None:
    """For ever, also at the end of the process: what may be neither closed nor collected in it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _call() -> None:
    for one, method in list(_called.items()):
        method(one)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_call)
