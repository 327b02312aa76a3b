"""One request from the bytes that came to the answer, whatever the protocol."""

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from ..options.serving import Limits
from .contract import Answer, BadRequest, Engine, Failed, Gone, ModelInfo, Refusal, Request, TooLarge
from .metrics import Metrics
from .names import Call, Reader, Reset
from .room import Room


log = logging.getLogger(__name__)
THREADS = 4  # that read large messages; what blocks one of them blocks nobody who is in the queue already
# Bytes of a message that is read where it came: a second thread that has to wake up costs more, 3 ms on a machine with
# no core free (docs/LOG.md). What would hold the others up longer than that is read in a thread.
QUICK = 2**20


class Service:
    """What the protocols share.

    Attributes:
        room: For bodies and messages, see `Limits.bodies_bytes`.
        open: Requests whose answers are not sent yet.
        closers: What else has to end before the engine does.
        warm: Done when the engine is ready, or could not be made so (`Failed`).
    """

    warm: asyncio.Future[None]

    def __init__(self, engine: Engine, limits: Limits, mapping: Mapping[str, str] | None = None):
        self.engine, self.limits = engine, limits
        self.room = Room(limits.bodies_bytes)
        self.reader, self.metrics = Reader(engine.info, limits, mapping), Metrics(engine, self.room)
        self.closers: list[Callable[[], Awaitable[Any]]] = []
        self.open = 0
        # Not shut down: what comes until connections are closed is read, and refused. It ends with the service.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read")

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    async def answer(
        self,
        decode: Callable[[], Any],
        size: int,
        session: str | None = None,
        turn: asyncio.Lock | None = None,
    ) -> tuple[Call | Reset, Answer | None]:
        """What is asked, and the answer; None of a reset.

        Args:
            decode: Gives the message, of `size` bytes. Its `ValueError`s become `BadRequest`s.
            session: Of messages that name none.
            turn: Of messages that came one after another, which the engine has to get so as well: a large one takes
                longer to read, and would be taken for the newer one.

        Raises:
            Refusal: Nothing else.
        """
        arrived = time.monotonic()
        call: Call | Reset | None = None
        try:
            async with turn or nullcontext():
                call = await self.read(decode, size, session, arrived)
            # From here on to its place in the queue nothing waits, so that nobody overtakes.
            if isinstance(call, Reset):
                if call.session is not None:
                    self.engine.end_session(call.session)
                return call, None
            read = time.monotonic()
            answer = await self.ask(call.request, size)
            timing = {"read_ms": 1000 * (read - arrived), "total_ms": 1000 * (time.monotonic() - arrived)}
            answer = replace(answer, timing={**answer.timing, **timing})
        except Refusal as refusal:
            refusal.request_id = call.request_id if call is not None else refusal.request_id
            raise
        except Exception:  # a server has to survive what nobody thought of; the client learns nothing of its inside
            log.exception("A request failed.")
            failed = Failed("The server failed at this request: do not move. Its log says why.")
            failed.request_id = None if call is None else call.request_id
            raise failed from None
        self.metrics.answered(answer)
        return call, answer

    async def ask(self, request: Request, size: int = 0) -> Answer:
        """The engine's answer. What the images of a message of `size` bytes were decoded to takes its room, too."""
        pixels = sum(image.nbytes for image in request.observation.images.values())
        if pixels > self.room.most:  # to come again would not help
            raise TooLarge(f"images of {pixels} bytes, decoded: at most {self.room.most}. Send smaller ones.")
        with self.room.share(max(0, pixels - size)):
            return await self.engine.act(request)

    async def read(
        self, decode: Callable[[], Any], size: int, session: str | None = None, arrived: float | None = None
    ) -> Call | Reset:
        """What is asked, see `answer` and `Reader.read`."""
        run = asyncio.get_running_loop().run_in_executor
        if size > QUICK:
            message = await run(self._threads, self._decode, decode)
        else:
            message = self._decode(decode)
            if self.reader.is_quick(message):
                return self.reader.read(message, session, arrived)
        return await run(self._threads, self.reader.read, message, session, arrived)

    def _decode(self, decode: Callable[[], Any]) -> Any:
        try:
            return decode()
        except ValueError as error:
            raise BadRequest(f"{str(error).rstrip('.')}. {self.reader.expected()}") from error

    @contextmanager
    def asked(self, protocol: str) -> Iterator[None]:
        """While a request is read and answered: it is counted, and so is a refusal of any kind."""
        self.metrics.came(protocol)
        try:
            yield
        except Refusal as refusal:
            self.metrics.refused(protocol, refusal)
            raise
        except asyncio.CancelledError:
            self.metrics.refused(protocol, Gone("The client has gone."))
            raise

    @contextmanager
    def sending(self) -> Iterator[None]:
        """While an answer is made and sent."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def start(self) -> None:
        """Begin to warm the engine up; `warm` says how it went."""
        self.warm = asyncio.ensure_future(self.engine.start())
        self.warm.add_done_callback(lambda warm: warm.cancelled() or warm.exception())  # which the engine has logged

    async def stop(self, patience: float = 30.0, closing: float = 5.0) -> None:
        """Answer what is in flight, refuse the rest; see `Engine.stop`. Then wait for at most `closing` seconds until
        clients have taken their answers."""
        while self.closers:  # once: a server stops, and then its app
            await self.closers.pop()()
        await self.engine.stop(patience)
        until = time.monotonic() + closing
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.01)


def content(call: Call, answer: Answer, *, details: bool | None = None) -> dict[str, Any]:
    """An answer as clients get it: arrays, and what they gave to know it by."""
    found: dict[str, Any] = {"actions": answer.actions, "server_timing": answer.timing}
    if call.details if details is None else details:
        found["normalized"] = answer.normalized
        if answer.probabilities is not None:
            found["probabilities"] = answer.probabilities
    if answer.distributions is not None:
        found["distributions"] = answer.distributions
    given = {
        "unnorm_key": call.request.unnorm_key,
        "session": call.request.session,
        "step": call.request.observation.step,
        "request_id": call.request_id,
    }
    return {**found, **{name: value for name, value in given.items() if value is not None}}


def metadata(info: ModelInfo) -> dict[str, Any]:
    """What a client has to know, before it asks. Rate, names and dimensions are those of the usual dataset; of each
    dataset by itself under "datasets"."""
    usual = info.datasets[info.default_key or next(iter(info.datasets))]
    datasets = {
        key: {
            "state_dim": dataset.state_dim,
            "action_dim": dataset.spec.action_dim,
            "spec_stated": dataset.stated,
            **dataset.spec.to_dict(),
        }
        for key, dataset in info.datasets.items()
    }
    return {
        "server": f"openvla {importlib.metadata.version('openvla')}",
        "model": info.model,
        "digest": info.digest,
        "unnorm_keys": list(info.datasets),
        "default_unnorm_key": info.default_key,
        "cameras": list(info.cameras),
        "image_size": list(info.image_size),
        "state_dim": usual.state_dim,
        "action_dim": usual.spec.action_dim,
        "action_names": list(usual.spec.names),
        "chunk": info.chunk,
        "hz": usual.spec.hz,
        "datasets": datasets,
    }
