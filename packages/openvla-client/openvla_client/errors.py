"""What can go wrong between a robot and a server. Of none of it comes an action."""

import copyreg


class NotReached(ConnectionError):
    """No server, or the connection broke. Asking again, with a new observation, is safe."""


class NoAnswer(TimeoutError):
    """Nothing came in time. An answer that comes later is thrown away."""


class Picklable(Exception):
    """An error whose `__init__` takes more than its message: pickle calls it with the message alone, so that another
    process could not read the error. This goes without `__init__`, also for kinds that a program derives."""

    def __reduce__(self) -> tuple:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class Refused(Picklable, RuntimeError):
    """The server says no, and why.

    code: "bad_request", "unauthorized", "too_large", "busy", "hung", "late", "superseded", "failed", ...
    retry_after: Seconds to wait, where the server says so.
    """

    def __init__(self, message: str, code: str, retry_after: float | None = None):
        super().__init__(message)
        self.code, self.retry_after = code, retry_after


class BadAnswer(ValueError):
    """What came back is no answer to the request: another shape, not finite, of another request, too large."""
