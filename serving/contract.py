"""What a request, an answer and a refusal are, of whatever protocol and whatever model.

Light to import: no torch, no web framework.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from ..action_spec import ActionSpec
from ..observation import Observation


@dataclass(frozen=True)
class Dataset:
    """One key of `unnorm_key`: what the numbers of its actions mean."""

    spec: ActionSpec
    state_dim: int | None = None  # numbers of the state that the model takes; None: it takes none
    # (A,) units of what the model calls -1 and 1, the ends of the bins of tokens; empty: unknown.
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    stated: bool = False  # whether the statistics say what `spec` is; otherwise it is the usual one, and a guess


@dataclass(frozen=True)
class ModelInfo:
    """What a client has to know before it asks."""

    model: str  # Hub id, or the name of its folder: nobody's path
    datasets: dict[str, Dataset]
    default_key: str | None  # the key of requests that name none; None: each has to
    cameras: tuple[str, ...]
    chunk: int  # actions of an answer
    image_size: tuple[int, int]  # (height, width) of what the model sees; images of any size are resized

    @cached_property
    def digest(self) -> str:
        """The same of servers that mean the same by an action: answers over HTTP hold it, whose client cannot see that
        the server was started again, with another model."""
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=8).hexdigest()

    def key(self, given: str | None) -> str:
        """The dataset that a request means.

        Raises:
            BadRequest: If there is none of that name, or none is named where several are known.
        """
        name = self.default_key if given is None else given
        if name is None:
            raise BadRequest(f"unnorm_key is missing: expected one of {', '.join(sorted(self.datasets))}.")
        if name not in self.datasets:
            raise BadRequest(f"unnorm_key={name!r}: expected one of {', '.join(sorted(self.datasets))}.")
        return name


@dataclass(frozen=True)
class Request:
    """One robot asks what to do.

    Args:
        observation: Checked: images of exactly `ModelInfo.cameras`, a state of `state_dim` numbers or an empty one,
            a non-empty instruction, committed steps (n, A) with n below `chunk`, or None.
        session: The episode of a robot. What a server keeps by it (drafts) is only a cache: any server can answer any
            request. None: nothing is kept.
        deadline: `time.monotonic()` of this machine from which on nobody waits for the answer; None: no such time.
        distributions: Whether the answer shall hold them.
    """

    observation: Observation
    unnorm_key: str
    session: str | None = None
    deadline: float | None = None
    distributions: bool = False


@dataclass(frozen=True)
class Answer:
    """Actions of one request.

    Args:
        actions: (K, A) float64 in the units of the dataset, K = `ModelInfo.chunk`; all finite.
        normalized: (K, A) float64 in [-1, 1].
        probabilities: (K, A) of the chosen tokens, or None where the head gives numbers and no tokens.
        distributions: (K, A, bins) float32 probabilities of the bins that each number was chosen from, in the order of
            the numbers they stand for (the last two both the highest); None where nobody asked, or there are no tokens.
        timing: Milliseconds by stage: `queue_ms`, `infer_ms`, and what the model adds; `batch_size`.
    """

    actions: np.ndarray
    normalized: np.ndarray
    probabilities: np.ndarray | None = None
    timing: dict[str, float] = field(default_factory=dict)
    distributions: np.ndarray | None = None


class Model(Protocol):
    """What the engine asks; `OpenVLAModel` is one, tests have faster ones."""

    info: ModelInfo

    def act(self, requests: Sequence[Request]) -> "Sequence[Answer | Refusal]":
        """Blocks; called by one thread. Answers do not depend on what else is in the batch; a refusal in place of one
        costs the others nothing, where an error has them asked again in smaller batches.

        Raises:
            MemoryError: If the batch is too large (`torch.OutOfMemoryError` as well); a smaller one is tried.
        """
        ...

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Blocks until first answers are as fast as later ones."""
        ...

    def end_session(self, session: str) -> None:
        """An episode has ended or begins again: forget what was kept of it."""
        ...


class Engine(Protocol):
    """What the protocols ask, all of it in the event loop; `engine.Engine` is one."""

    info: ModelInfo

    @property
    def ready(self) -> bool:
        """Warmed up, not hung or failing, and not stopping."""
        ...

    @property
    def problem(self) -> "Busy | None":
        """Why it is not ready; None where it is."""
        ...

    async def act(self, request: Request) -> Answer:
        """Whoever cancels it waits no more: the place in the queue is free then.

        Raises:
            Refusal: If there is no action.
        """
        ...

    async def start(self) -> None:
        """Warm up, and return when it is ready.

        Raises:
            Failed: If it could not be warmed up.
        """
        ...

    async def stop(self, patience: float = 30.0) -> None:
        """Refuse what comes from now on, and return when all that came before has its answer."""
        ...

    def end_session(self, session: str) -> None:
        """As of the model."""
        ...

    def waiting(self) -> int:
        """Requests in the queue now."""
        ...

    def predicting(self) -> float:
        """Seconds that the batch with the model has taken so far; 0 if it has none."""
        ...


# Refusals -------------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that gets no action. `str()` is for the client: what was given, what is expected, the way out."""

    status: ClassVar[int] = 500  # of HTTP
    code: ClassVar[str] = "error"  # short, for programs and metrics
    request_id: str | int | None = None  # as the client gave it

    def content(self) -> dict[str, Any]:
        """As every protocol sends it."""
        known = {} if self.request_id is None else {"request_id": self.request_id}
        return {"error": str(self), "code": self.code, **known}


class BadRequest(Refusal):
    """The request is wrong: asking again does not help."""

    status, code = 400, "bad_request"


class Unauthorized(Refusal):
    status, code = 401, "unauthorized"


class Forbidden(Refusal):
    """A page of another site asks, or under a name that is not the server's."""

    status, code = 403, "forbidden"


class NotThere(Refusal):
    """There is nothing of that name."""

    status, code = 404, "not_there"


class TooLarge(Refusal):
    """More bytes, pixels or numbers than the server takes."""

    status, code = 413, "too_large"


class Busy(Refusal):
    """The queue is full, the server is starting or stopping, or the model hangs. `retry_after`: seconds to wait."""

    status, code = 503, "busy"

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after

    def content(self) -> dict[str, Any]:
        return {**super().content(), "retry_after": self.retry_after}


class Hung(Busy):
    """The model has not returned from a prediction for too long."""

    code = "hung"


PROBLEMS = {  # by the state of an engine: why requests are refused
    "starting": "The model is warming up: ask again.",
    "broken": "The model could not be warmed up: the log of the server says why.",
    "hung": "The model hangs: it has not returned from a prediction. Ask another server, or again later.",
    "failing": "The model fails at all that it is asked: the log of the server says why. Ask another one, or later.",
    "stopping": "The server is stopping: ask another one, or again once it is back.",
}
PROBLEMS["stopped"] = PROBLEMS["stopping"]


class Late(Refusal):
    """The deadline passed before there was an answer."""

    status, code = 504, "late"


class Superseded(Refusal):
    """A newer observation of the same session came in: that one is answered instead."""

    status, code = 409, "superseded"


class Gone(Refusal):
    """The client waits no more: nobody reads this."""

    status, code = 499, "gone"


class Failed(Refusal):
    """The model failed. The client is told that, and no more; the log says why."""

    status, code = 500, "failed"
