"""Memory for the bodies and messages of all clients together."""

from collections.abc import Iterator
from contextlib import contextmanager

from .contract import Busy


class Room:
    """So many bytes, for what is coming in, is read, or waits for its answer."""

    def __init__(self, most: int):
        self.most, self.taken = most, 0

    @contextmanager
    def share(self, size: int = 0) -> Iterator["Share"]:
        """For one body. Raises `Busy` where there is not so much left."""
        share = Share(self)
        try:
            share.resize(size)
            yield share
        finally:
            share.resize(0)


class Share:
    """What one body takes of a `Room`, in bytes."""

    def __init__(self, room: Room):
        self._room, self.size = room, 0

    def resize(self, size: int) -> None:
        """Raises `Busy` where there is not so much left; it is as large as before then."""
        taken = self._room.taken + size - self.size
        if size > self.size and taken > self._room.most:
            raise Busy("Too much is being sent at a time.", retry_after=1.0)
        self._room.taken, self.size = taken, size
