"""Requests of many robots to batches of one model, and what becomes of those that cannot be answered.

`act` is called in the event loop, the model runs in a thread of its own (`worker`). A request waits until the model is
free, and then at most `max_wait_ms` for others, if as many as lately were asked at once are not there yet: a robot that
is alone does not wait. Of a session the newest observation alone is answered. Refused is what comes while the queue is
full, before the model is warm and while the server stops (`Busy`), what would be answered too late (`Late`) and what
the model fails at (`Failed`); nothing of that stops the others. A model that does not return from a batch for
`hang_after` seconds counts as hung until it does: all are refused (`Hung`), and its late answers go to nobody. So is a
model that fails at what it has answered before, as where a GPU is gone, until it answers that again.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from .contract import PROBLEMS, Answer, Busy, Failed, Hung, Late, Model, Refusal, Request, Superseded
from .live import LiveView
from .waiting import RecentPeak, Waiting
from .worker import Worker


logger = logging.getLogger(__name__)
LATELY = 1.0  # seconds for which it is remembered how many asked at once
DISTURBED = ("hung", "failing")  # states in which a model that was ready answers nobody
AGAIN = 5.0  # seconds from one try of a model in such a state to the next, and until clients shall ask again


class Engine:
    """One model for many callers.

    Args:
        max_batch: Requests that the model is asked at once, at most.
        max_wait_ms: How long the model, when it is free, waits for requests that are likely to come.
        queue_size: Requests that wait, at most.
        hang_after: Seconds that a batch may take, with all that is tried again in smaller ones.
        clock: In seconds; that of `Request.deadline`.
        live: What people see of the robots that ask.

    Attributes:
        state: "starting", "ready", "hung", "failing", "stopping", "stopped" or "broken" (warm-up failed).
        outcomes: How many requests ended how: "answered", "gone" (the client is), or the code of a refusal.
        batches: How many batches there were of each size.
    """

    def __init__(
        self,
        model: Model,
        max_batch: int = 16,
        max_wait_ms: float = 5.0,
        queue_size: int = 64,
        hang_after: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        live: LiveView | None = None,
    ):
        self.live = live or LiveView(clock=clock)
        self.info, self.state = model.info, "starting"
        self.outcomes: Counter[str] = Counter()
        self.batches: Counter[int] = Counter()
        self._worker = Worker(model, max_batch)
        self._max_wait, self._queue_size, self._clock = max_wait_ms / 1000, queue_size, clock
        self._hang_after = hang_after
        self._began: float | None = None  # since when the model has a batch
        self._waiting: dict[Hashable, Waiting] = {}  # by session, or by itself; the first is the next
        self._asked: dict[Hashable, Waiting] = {}  # the same of the batch with the model
        self._open: Counter[Hashable] = Counter()  # who awaits an answer, and how many
        self._lately = RecentPeak(LATELY)
        self._seconds = 0.1  # that a batch takes
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # Life -------------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def problem(self) -> Busy | None:
        """Why requests are refused; None where they are not."""
        if self.ready:
            return None
        kind = Hung if self.state == "hung" else Busy
        return kind(PROBLEMS[self.state], retry_after=AGAIN if self.state in DISTURBED else 1.0)

    async def start(self) -> None:
        """Warm the model up, and return when it is ready. Until then requests are refused as `Busy`.

        Raises:
            Failed: If it could not be warmed up.
        """
        try:
            await self._worker.warm_up()
        except Exception as error:
            logger.exception("The model could not be warmed up.")
            self.state = "broken"
            raise Failed(PROBLEMS["broken"]) from error
        if self.state == "starting":
            self.state = "ready"
            self._task = asyncio.create_task(self._run())

    async def stop(self, patience: float = 30.0) -> None:
        """Refuse new requests, and answer those that are accepted, for at most `patience` seconds. Does not wait for a
        model that hangs or fails: nobody is left that it could answer."""
        patience = 0.0 if self.state in DISTURBED else patience
        self.state = "stopping"
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience)
            self._task.cancel()
            await asyncio.wait([self._task])
        self.state = "stopped"
        self._worker.close()

    # Requests ---------------------------------------------------------------------------------------------------------

    async def act(self, request: Request) -> Answer:
        """The answer to a request. Whoever is cancelled while he waits leaves nothing in the queue.

        Raises:
            Busy: If the queue is full, or the model is not ready; `Hung` if it hangs.
            Late: If there is no answer at the deadline.
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
        if session in self._waiting:
            self._waiting.pop(session).refuse(Superseded(f"session={session!r} has ended: ask with what is seen now."))
        self._asked.pop(session, None)
        self.live.ended(session)
        if self.state in ("starting", "ready"):
            self._worker.end_session(session)

    def waiting(self) -> int:
        """Requests in the queue now."""
        return len(self._waiting)

    def predicting(self) -> float:
        """Seconds that the batch with the model has taken so far; 0 if it has none."""
        return 0.0 if self._began is None else self._clock() - self._began

    def unanswered(self) -> int:
        """Requests in the queue or with the model now."""
        return self._open.total()

    @property
    def limit(self) -> int:
        """Requests of a batch, at most: `max_batch`, or less where memory was too small."""
        return self._worker.limit

    @property
    def out_of_memory(self) -> int:
        """How often memory was too small."""
        return self._worker.out_of_memory

    async def _answer(self, request: Request, since: float) -> Answer:
        if problem := self.problem:
            raise problem
        left = None if request.deadline is None else request.deadline - since
        waiting = Waiting(request, asyncio.get_running_loop().create_future(), since)
        if self._is_late(waiting):
            return await waiting.future
        self._enter(key := waiting.key, waiting)
        try:
            async with asyncio.timeout(left):
                return await waiting.future
        except TimeoutError:
            raise self._late() from None
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]
            if self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _enter(self, key: Hashable, waiting: Waiting) -> None:
        """Into the queue; in the place of an older observation of its session, if one waits."""
        before = self._waiting.get(key)
        if before is None and len(self._waiting) >= self._queue_size:
            batches = -(-len(self._waiting) // self.limit)
            raise Busy(
                f"{len(self._waiting)} requests wait already: ask again, with what is seen then.",
                retry_after=round(batches * self._seconds + 0.01, 2),
            )
        for other in (before, self._asked.get(key)):
            if other is None or other.future.done():  # who waits no more for that may have begun again
                continue
            step, newer = waiting.request.observation.step, other.request.observation.step
            if step is not None and newer is not None and step < newer:
                raise Superseded(
                    f"step={step}: step {newer} of this session came in before it. An episode that begins says reset; "
                    "each robot has a session of its own."
                )
        if before is not None:
            before.refuse(Superseded("A newer observation of this session came in, which is answered instead."))
        self._waiting[key] = waiting
        self._open[key] += 1
        self._lately.see(len(self._open), self._clock())
        self._arrived.set()

    def _is_late(self, waiting: Waiting) -> bool:
        """Whether its deadline has passed; then it is refused."""
        deadline = waiting.request.deadline
        late = deadline is not None and deadline <= self._clock()
        if late:
            waiting.refuse(self._late())
        return late

    @staticmethod
    def _late() -> Late:
        return Late("There was no answer before the deadline: ask with what is seen now.")

    # Batches ----------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while self.ready or self._waiting:
                if self._waiting:
                    await self._gather()
                    await self._ask(self._take())
                    if self.ready and self._worker.failing:
                        await self._recover()
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:  # nobody waits for what will not come
            self.state = "stopping"
            self._refuse(self._waiting.values())

    async def _gather(self) -> None:
        """Wait for as many requests as lately were asked at once, but not longer than `max_wait_ms`."""
        if self._are_enough():  # a robot that is alone
            return
        try:
            async with asyncio.timeout(self._max_wait):
                while not self._are_enough():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _are_enough(self) -> bool:
        return not self.ready or len(self._waiting) >= min(self.limit, self._lately.peak(self._clock()))

    def _take(self) -> list[Waiting]:
        """The next batch, out of the queue."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < self.limit:
            waiting = self._waiting.pop(next(iter(self._waiting)))
            if not self._is_late(waiting) and not waiting.future.done():
                batch.append(waiting)
        return batch

    async def _ask(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        self._began = began = self._clock()
        self._asked = {waiting.key: waiting for waiting in batch}
        watchdog = asyncio.get_running_loop().call_later(self._hang_after, self._hang, batch)
        try:
            found = await self._worker.act([waiting.request for waiting in batch])
            ended = self._clock()
            if self.state == "hung":
                self.state = "ready"
                logger.warning("The model has returned, after %.0f s. It is asked again.", ended - began)
                return
            self.batches[len(batch)] += 1
            self._seconds += 0.2 * (ended - began - self._seconds)
            for waiting, answer in zip(batch, found, strict=True):
                if isinstance(answer, Refusal):
                    waiting.refuse(answer)
                elif not self._is_late(waiting) and not waiting.future.done():
                    times = {"queue_ms": 1000 * (began - waiting.since), "infer_ms": 1000 * (ended - began)}
                    timing = {**times, **answer.timing, "batch_size": float(len(batch))}
                    waiting.future.set_result(replace(answer, timing=timing))
        finally:
            watchdog.cancel()
            self._began, self._asked = None, {}
            self._refuse(batch)  # of a stop that lost patience

    async def _recover(self) -> None:
        """Refuse all until the model answers again."""
        self.state = "failing"
        logger.error(
            "The model fails at what it has answered before: requests are refused until it answers that again."
        )
        self._refuse(self._waiting.values())
        while self.state == "failing":
            await asyncio.sleep(AGAIN)
            if await self._worker.lives() and self.state == "failing":
                self.state = "ready"
                logger.warning("The model answers again.")

    def _hang(self, batch: list[Waiting]) -> None:
        """The model has taken too long for a batch."""
        if self.ready:  # whoever stops has a patience of his own
            self.state = "hung"
            logger.error("The model has not returned for %g s: requests are refused until it does.", self._hang_after)
            self._refuse([*batch, *self._waiting.values()])

    def _refuse(self, unanswered: Iterable[Waiting]) -> None:
        """Who waits, and will not be answered."""
        for waiting in unanswered:
            waiting.refuse(self.problem or Busy(PROBLEMS["stopping"], retry_after=1.0))
