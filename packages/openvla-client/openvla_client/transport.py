"""Between a guard and whatever answers: requests go out without waiting, replies are looked for."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .checks import is_row
from .forks import call_in_forks


@dataclass(frozen=True)
class Ask:
    """What a guard asks. `epoch` and `id` have to come back with the reply, and are unique to it."""

    epoch: int  # begins with a random number in each guard; higher after each reset and reconnection
    id: int  # counts requests over all epochs
    step: int  # of the control loop since the last reset, from 0 on
    observation: Any
    committed: np.ndarray | None = None  # (n, A) actions from `step` on that are executed whatever is answered


@dataclass(frozen=True)
class Reply:
    """Actions (A,) or (K, A) for the request of this epoch and id, or the error that came in their place."""

    epoch: int
    id: int
    actions: Any = None
    error: BaseException | None = None


@runtime_checkable
class Transport(Protocol):
    """Called by one thread, that of the control loop. Replies may be lost, late, doubled and out of order."""

    @property
    def connection(self) -> int:
        """Which one it is: another number after each reconnection, with which an epoch begins. Always 0 where there are
        no connections."""
        ...

    def submit(self, ask: Ask) -> None:
        """Send, or replace what waits to be sent: the newest observation wins. Does not block, does not raise."""
        ...

    def poll(self, timeout: float) -> Reply | None:
        """The next reply, after at most `timeout` seconds; None if there is none. Does not raise."""
        ...

    def close(self) -> None: ...


class ThreadTransport:
    """A function that blocks, called in a thread of its own: one request at a time, always the newest.

    Args:
        answer: Gives the actions of a request, or raises. It needs a timeout of its own: a call that never returns
            keeps the thread, and no further request is answered.
        connection: Says which connection `answer` has, see `Transport`.
        end: Called in that thread when it ends.
    """

    KEPT = 64  # replies nobody asked for

    def __init__(
        self,
        answer: Callable[[Ask], Any],
        connection: Callable[[], int] = lambda: 0,
        end: Callable[[], None] = lambda: None,
    ):
        self._answer, self._connection, self._end = answer, connection, end
        self._changed = threading.Condition()
        self._waiting: Ask | None = None
        self._replies: deque[Reply] = deque(maxlen=self.KEPT)
        self._closed = False
        self._thread: threading.Thread | None = None
        call_in_forks(self._forked)

    def _forked(self) -> None:
        self._changed = threading.Condition()

    @property
    def connection(self) -> int:
        return self._connection()

    def submit(self, ask: Ask) -> None:
        with self._changed:
            if self._closed:
                return
            self._waiting = ask
            self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="openvla-guard", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the machine has none left: the next observation tries again
                self._replies.append(Reply(ask.epoch, ask.id, error=error))
                return
            self._thread = thread
        elif not self._thread.is_alive():
            gone = RuntimeError("This guard is of another process (a fork): make client and guard in this one.")
            self._replies.append(Reply(ask.epoch, ask.id, error=gone))

    def poll(self, timeout: float) -> Reply | None:
        with self._changed:
            if not self._replies and timeout > 0:
                self._changed.wait_for(lambda: bool(self._replies), timeout)
            return self._replies.popleft() if self._replies else None

    def close(self) -> None:
        """Ends after the call that runs; does not wait for it."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                ask, self._waiting = self._waiting, None
            if ask is None:
                return self._end()
            try:
                reply = Reply(ask.epoch, ask.id, self._answer(ask))
            except BaseException as error:  # of whatever was given (sys.exit): the guard reports it, and falls back
                reply = Reply(ask.epoch, ask.id, error=error)
            with self._changed:
                self._replies.append(reply)
                self._changed.notify_all()


def called(answer: Callable[[Any], Any]) -> ThreadTransport:
    """Of a function of an observation that gives actions, or something that has them."""

    def actions(ask: Ask) -> Any:
        given = answer(ask.observation)
        return _copied(getattr(given, "actions", given))

    return ThreadTransport(actions)


def _copied(given: Any) -> Any:
    """What the next call may write into before the control loop has read it. Rows stay rows: an array would say 1 of
    true."""
    if isinstance(given, np.ndarray):
        return given.copy()
    if is_row(given):
        return [_copied(one) for one in given]
    if isinstance(given, int | float | np.generic):
        return given
    return given if (copy := np.array(given)).dtype == object else copy
