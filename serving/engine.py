"""Requests of many robots to batches of one model, and what becomes of those that cannot be answered.

`act` is called in the event loop, the model runs in one thread of its own. A request waits until the model is free, and
then at most `max_wait_ms` for others, if as many as lately were asked at once are not there yet: a robot that is alone
does not wait. Of a session the newest observation alone is answered. Refused is what comes while the queue is full,
before the model is warm and while the server stops (`Busy`), what is answered too late (`Late`) and what the model
fails at (`Failed`); nothing of that stops the others.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..policy import check_numbers
from .contract import Answer, Busy, Failed, Late, Model, Refusal, Request, Superseded
from .live import LiveView


logger = logging.getLogger(__name__)
LATELY = 1.0  # seconds for which it is remembered how many asked at once
NOT_ANSWERED = "The model failed at this request: do not move. The log of the server says why."


@dataclass(eq=False)
class Waiting:
    """A request whose answer somebody awaits."""

    request: Request
    future: asyncio.Future[Answer]
    since: float


class Engine:
    """One model for many callers.

    Args:
        max_batch: Requests that the model is asked at once, at most. Halved for good where memory is too small.
        max_wait_ms: How long the model, when it is free, waits for requests that are likely to come.
        queue_size: Requests that wait, at most.
        clock: In seconds; that of `Request.deadline`.
        live: What people see of the robots that ask.

    Attributes:
        state: "starting", "ready", "stopping", "stopped" or "broken" (warm-up failed).
        limit: Requests of a batch, at most, as it is now.
        outcomes: How many requests ended how: "answered", "gone" (the client is), or the code of a refusal.
        batches: How many batches there were of each size.
        out_of_memory: How often memory was too small.
    """

    def __init__(
        self,
        model: Model,
        max_batch: int = 16,
        max_wait_ms: float = 5.0,
        queue_size: int = 64,
        clock: Callable[[], float] = time.monotonic,
        live: LiveView | None = None,
    ):
        self.live = live or LiveView(clock=clock)
        self.model, self.info = model, model.info
        self.max_batch, self.max_wait, self.queue_size = max_batch, max_wait_ms / 1000, queue_size
        self.state, self.limit = "starting", max_batch
        self.outcomes: Counter[str] = Counter()
        self.batches: Counter[int] = Counter()
        self.out_of_memory = 0
        self._clock = clock
        self._waiting: dict[Hashable, Waiting] = {}  # by session, or by itself; the longest waiting first
        self._open: Counter[Hashable] = Counter()  # who awaits an answer, and how many
        self._lately = RecentPeak(LATELY)
        self._seconds = 0.1  # that a batch takes
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openvla-model")
        self._task: asyncio.Task[None] | None = None

    # Life -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Warm the model up, and return when it is ready. Until then requests are refused as `Busy`.

        Raises:
            Failed: If it could not be warmed up.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._warm_up)
        self._check_state()
        self._task = asyncio.create_task(self._run())

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    async def stop(self, patience: float = 30.0) -> None:
        """Refuse new requests, and answer those that are accepted, for at most `patience` seconds."""
        self.state = "stopping" if self.state != "broken" else self.state
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience)
            self._task.cancel()
        for waiting in self._waiting.values():
            refuse(waiting, self._stopping())
        self.state = "stopped"
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Requests ---------------------------------------------------------------------------------------------------------

    async def act(self, request: Request) -> Answer:
        """The answer to a request. Whoever is cancelled while he waits for it leaves no work behind.

        Raises:
            Busy: If the queue is full, or the model is not ready.
            Late: If there is none at the deadline.
            Superseded: If a newer observation of the session came in.
            Failed: If the model failed at it.
            BadRequest: If the model cannot read it.
        """
        since = self._clock()
        robot = self.live.asked(request)
        outcome, answer = "gone", None
        try:
            answer = await self._answer(request, since)
            outcome = "answered"
            return answer
        except Refusal as refusal:
            outcome = refusal.code
            raise
        finally:
            self.outcomes[outcome] += 1
            self.live.told(robot, outcome, 1000 * (self._clock() - since), answer)

    def end_session(self, session: str) -> None:
        """An episode has ended or begins again: what waits is of the one before, what was kept is forgotten."""
        if (waiting := self._waiting.pop(session, None)) is not None:
            refuse(waiting, Superseded(f"session={session!r} has ended: ask with what is seen now."))
        self.live.ended(session)
        if self.state in ("starting", "ready"):
            self._thread.submit(self.model.end_session, session)

    def waiting(self) -> int:
        """Requests that the model has not begun with."""
        return len(self._waiting)

    def open(self) -> int:
        """Requests whose answer somebody awaits."""
        return self._open.total()

    async def _answer(self, request: Request, since: float) -> Answer:
        self._check_state()
        if request.deadline is not None and request.deadline <= since:
            raise Late("The deadline passed before the request came in: ask with what is seen now.")
        waiting = Waiting(request, asyncio.get_running_loop().create_future(), since)
        key: Hashable = waiting if request.session is None else request.session
        self._enter(key, waiting)
        try:
            async with asyncio.timeout(None if request.deadline is None else request.deadline - since):
                return await waiting.future
        except TimeoutError:
            raise Late("There was no answer before the deadline: ask with what is seen now.") from None
        finally:
            self._open -= Counter([key])
            if self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _check_state(self) -> None:
        if self.state == "starting":
            raise Busy("The model is warming up: ask again.", retry_after=1.0)
        if self.state == "broken":
            raise Failed("The model could not be warmed up: the log of the server says why.")
        if self.state != "ready":
            raise self._stopping()

    @staticmethod
    def _stopping() -> Busy:
        return Busy("The server is stopping: ask another one, or again once it is back.", retry_after=1.0)

    def _enter(self, key: Hashable, waiting: Waiting) -> None:
        """Into the queue; in the place of an older observation of its session, if one waits."""
        before = self._waiting.get(key)
        if before is None and len(self._waiting) >= self.queue_size:
            batches = -(-len(self._waiting) // self.limit)
            raise Busy(
                f"{len(self._waiting)} requests wait already: ask again, with what is seen then.",
                retry_after=round(batches * self._seconds + 0.01, 2),
            )
        if before is not None:
            steps = waiting.request.observation.step, before.request.observation.step
            if steps[0] is not None and steps[1] is not None and steps[0] < steps[1]:
                raise Superseded(f"step={steps[0]}: step {steps[1]} of this session came in before it.")
            refuse(before, Superseded("A newer observation of this session came in, which is answered instead."))
        self._waiting[key] = waiting
        self._open[key] += 1
        self._lately.see(len(self._open), self._clock())
        self._arrived.set()

    # Batches ----------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while self.state == "ready" or self._waiting:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._gather()
            if batch := self._take():
                await self._ask(batch)

    async def _gather(self) -> None:
        """Wait for as many requests as lately were asked at once, but not longer than `max_wait`."""
        try:
            async with asyncio.timeout(self.max_wait):
                while self.state == "ready" and len(self._waiting) < min(self.limit, self._lately.peak(self._clock())):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[Waiting]:
        """The next batch, out of the queue; those whose deadline has passed are refused."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < self.limit:
            waiting = self._waiting.pop(next(iter(self._waiting)))
            if not self._is_late(waiting) and not waiting.future.done():
                batch.append(waiting)
        return batch

    async def _ask(self, batch: list[Waiting]) -> None:
        began = self._clock()
        requests = [waiting.request for waiting in batch]
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._act, requests)
        ended = self._clock()
        self.batches[len(batch)] += 1
        self._seconds += 0.2 * (ended - began - self._seconds)
        for waiting, answer in zip(batch, found, strict=True):
            if isinstance(answer, Refusal):
                refuse(waiting, answer)
            elif not self._is_late(waiting) and not waiting.future.done():
                times = {"queue_ms": 1000 * (began - waiting.since), "infer_ms": 1000 * (ended - began)}
                timing = {**times, **answer.timing, "batch_size": float(len(batch))}
                waiting.future.set_result(replace(answer, timing=timing))

    def _is_late(self, waiting: Waiting) -> bool:
        deadline = waiting.request.deadline
        late = deadline is not None and deadline <= self._clock()
        if late:
            refuse(waiting, Late("There was no answer before the deadline: ask with what is seen now."))
        return late

    # In the thread of the model ---------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Until the model is ready; with smaller batches where memory is too small."""
        try:
            while True:
                try:
                    self.model.warm_up(sizes_up_to(self.limit))
                    break
                except MemoryError:
                    if self.limit == 1:
                        raise
                    self._shrink(self.limit)
        except Exception:
            logger.exception("The model could not be warmed up.")
            self.state = "broken"
        if self.state == "starting":
            self.state = "ready"

    def _act(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """The answer to each request. A batch that fails is asked in halves, so that the one that fails does so alone:
        the one place where an error of any kind does not stop the server."""
        try:
            answers: Sequence[Any] = self.model.act(requests)
            if len(answers) != len(requests):
                raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
            return [checked(answer) for answer in answers]
        except Refusal as error:
            refusal = error
        except MemoryError:
            self._shrink(len(requests))
            refusal = Failed("Memory is too small for this request: give smaller images, or the server more memory.")
        except Exception:
            refusal = Failed(NOT_ANSWERED)
            if len(requests) == 1:
                logger.exception("The model failed at a request of session %r.", requests[0].session)
        if len(requests) == 1:
            return [refusal]
        half = len(requests) // 2
        return [*self._act(requests[:half]), *self._act(requests[half:])]

    def _shrink(self, size: int) -> None:
        """A batch of `size` did not fit into memory."""
        self.out_of_memory += 1
        self.limit = min(self.limit, max(size // 2, 1))
        logger.warning("Memory is too small for a batch of %d: from now on at most %d.", size, self.limit)


class RecentPeak:
    """The largest of the numbers of the last one to two `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self._began, self._peak, self._before = seconds, 0.0, 0, 0

    def see(self, number: int, now: float) -> None:
        self._turn(now)
        self._peak = max(self._peak, number)

    def peak(self, now: float) -> int:
        self._turn(now)
        return max(self._peak, self._before)

    def _turn(self, now: float) -> None:
        if now >= self._began + self.seconds:
            self._before = self._peak if now < self._began + 2 * self.seconds else 0
            self._began, self._peak = now, 0


def sizes_up_to(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit."""
    return sorted({*(2**power for power in range(limit.bit_length())), limit})


def refuse(waiting: Waiting, refusal: Refusal) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(refusal)


def checked(answer: Answer) -> Answer | Refusal:
    """An answer of finite numbers, or the refusal of any other."""
    try:
        return replace(answer, actions=check_numbers(answer.actions), normalized=check_numbers(answer.normalized))
    except ValueError as error:
        logger.error("The model gave no finite numbers: %s", error)
        return Failed(NOT_ANSWERED)
