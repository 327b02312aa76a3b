"""A process that begins as a fork of another one has none of its threads, and its locks as they were held."""

import os
import threading
from contextlib import AbstractContextManager


def lock_over_forks() -> AbstractContextManager:
    """A lock of a module, which a thread may take twice. A fork waits until no other thread holds it: in the new
    process it is free, and what it guards is complete. Workers of a DataLoader waited for ever otherwise, for a thread
    that predicted when they were forked."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


__all__ = ["lock_over_forks"]
