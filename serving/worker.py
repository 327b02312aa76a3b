"""The one thread that a model runs in, and what keeps it running: errors of one request, memory that is too small."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from ..policy import check_numbers
from .contract import Answer, Failed, Model, Refusal, Request
from .threads import awaited


logger = logging.getLogger(__name__)
THREAD = "openvla-model"  # its name


class TooSmall(Failed):
    """Memory, for one request alone."""


class Worker:
    """A model in a thread of its own: a daemon, since a process waits at its end for all others, those of executors
    included, and this one may never return.

    Args:
        limit: Requests that it is asked at once, at most. Halved, for good, where memory is too small for so many, and
            not where it is for one of them alone.

    Attributes:
        out_of_memory: How often memory was too small.
        failing: The model failed at all of the last batch, and then at a request that it had answered before: it is not
            the requests.
    """

    MOST_ENDED = 1024  # ends of sessions that wait for the model

    def __init__(self, model: Model, limit: int):
        self.model, self.limit, self.out_of_memory, self.failing = model, limit, 0, False
        self._known: Request | None = None  # the first that was answered
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    async def warm_up(self) -> None:
        """Until the model is as fast as it gets; with smaller batches where memory is too small.

        Raises:
            MemoryError: If it is too small for a single request.
        """
        await self._call(self._warm_up)

    async def act(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """The answer to each request, or why there is none."""
        return await self._call(lambda: self._act_and_look(requests))

    async def lives(self) -> bool:
        """Whether the model answers what it has answered before."""
        self.failing = not await self._call(self._lives)
        return not self.failing

    def end_session(self, session: str) -> None:
        """After what the model does now. Returns at once."""
        if self._jobs.qsize() < self.MOST_ENDED:  # a session is only a cache, which gives way by itself
            self._jobs.put(lambda: self._end_session(session))

    def close(self) -> None:
        """The thread ends after what the model does now. Returns at once."""
        self._jobs.put(None)

    def _call(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        return awaited(work, self._jobs.put)

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _end_session(self, session: str) -> None:
        try:
            self.model.end_session(session)
        except Exception:  # a session is only a cache
            logger.exception("The model failed at the end of session %r.", session)

    def _warm_up(self) -> None:
        while True:
            try:
                return self.model.warm_up(sizes_up_to(self.limit))
            except MemoryError:
                self.out_of_memory += 1
                if self.limit == 1:
                    raise
                self._shrink(self.limit)

    def _act_and_look(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        found = self._act(requests)
        answered = [request for request, one in zip(requests, found) if isinstance(one, Answer)]
        if answered and self._known is None:
            self._known = replace(answered[0], session=None, distributions=False)
        elif not answered and any(type(one) is Failed for one in found):
            self.failing = not self._lives()
        return found

    def _lives(self) -> bool:
        if self._known is None:
            return True
        try:
            return isinstance(checked(self.model.act([self._known])[0]), Answer)
        except MemoryError:  # may be there again at the next request
            return True
        except Exception:  # the log has the one before
            return False

    def _act(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """A batch that fails is asked in halves, down to the requests that fail by themselves: the one place where an
        error of any kind must not stop the server."""
        refusal: Refusal
        try:
            answers = self.model.act(requests)
            if len(answers) != len(requests):
                raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests.")
            return [checked(answer) for answer in answers]
        except Refusal as error:
            refusal = error
        except MemoryError:
            self.out_of_memory += 1
            refusal = TooSmall("Memory is too small for this request: do not move; ask with smaller images.")
        except Exception:
            refusal = failed()
            if len(requests) == 1:
                logger.exception("The model failed at a request of session %r.", requests[0].session)
        if len(requests) == 1:
            return [refusal]
        half = len(requests) // 2
        found = [*self._act(requests[:half]), *self._act(requests[half:])]
        # What is too large by itself says nothing about others: nobody makes batches small for all of them.
        if isinstance(refusal, TooSmall) and not any(isinstance(one, TooSmall) for one in found):
            self._shrink(len(requests))
        return found

    def _shrink(self, size: int) -> None:
        """A batch of `size` did not fit into memory."""
        self.limit = min(self.limit, max(size // 2, 1))
        logger.warning("Memory is too small for a batch of %d: from now on at most %d.", size, self.limit)


def sizes_up_to(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit."""
    return sorted({*(2**power for power in range(limit.bit_length())), limit})


def checked(answer: Answer | Refusal) -> Answer | Refusal:
    """An answer of finite numbers, and a refusal in place of any other."""
    if isinstance(answer, Refusal):
        return answer
    try:
        for shares in (answer.probabilities, answer.distributions):
            if shares is not None:
                check_numbers(shares)
        return replace(answer, actions=check_numbers(answer.actions), normalized=check_numbers(answer.normalized))
    except ValueError as error:
        logger.error("The model gave no finite numbers: %s", error)
        return failed()


def failed() -> Failed:
    return Failed("The model failed at this request: do not move. The log of the server says why.")
