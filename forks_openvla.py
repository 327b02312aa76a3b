"""A process that begins as a fork of another one has none of its threads, and its locks as they were held."""

import os
import threading
import weakref
from contextlib import AbstractContextManager
from itertools import count
from typing import Any


_NUMBERS = count()
_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # in the order in which they were made
_FORKING = threading.RLock()
_held: list[Any] = []  # by the thread that forks


def lock_over_forks() -> AbstractContextManager:
    """A lock that a thread may take twice. A fork waits until no other thread holds it: in the new process it is free,
    and what it guards is complete. Workers of a DataLoader waited for ever otherwise, for a thread that predicted when
    they were forked. What is locked while another one is held was made before that one."""
    lock = _LOCKS[next(_NUMBERS)] = threading.RLock()
    return lock


def _take() -> None:
    _FORKING.acquire()
    for reference in reversed(_LOCKS.valuerefs()):
        if (lock := reference()) is not None:
            lock.acquire()
            _held.append(lock)


def _let_go() -> None:
    while _held:
        _held.pop().release()
    _FORKING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_let_go, after_in_child=_let_go)


__all__ = ["lock_over_forks"]
