"""Asks a server of `openvla serve` for actions and waits for them: `AsyncClient` in a thread of its own."""

import asyncio
import atexit
import secrets
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from ssl import SSLContext
from typing import Any, TypeVar

from .async_client import AsyncClient, Settings, read_settings
from .checks import is_number
from .connection import Address
from .errors import BadAnswer, NotReached
from .forks import call_in_forks
from .guard import Guard
from .messages import Answer, ServerInfo
from .transport import Ask, ThreadTransport


Result = TypeVar("Result")
_open: "weakref.WeakSet[Client]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Or libraries would say at the end of the program what was left open."""
    for client in list(_open):
        client.close()


class Client:
    """Asks a server for actions. Made by `connect(url)`; threads may share one. `close()` ends the connection, and so
    does the end of the last reference to it, and of the program.

    All calls raise, and give nothing:
        NotReached: There is no server, or the connection broke. The next call connects again.
        NoAnswer: Nothing came in time. What comes later is thrown away.
        Refused: The server says no, and why (`code`, `retry_after`).
        BadAnswer: What came is no answer to this request; or the server was started again with another model, which
            is said once in each session, before anything of it is given.
    """

    def __init__(self, address: Address, settings: Settings):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="openvla-client", daemon=True)
        self._thread.start()
        self._client = AsyncClient(address, settings)
        self._clients = [self._client]  # each with a connection of its own
        self._guard: Callable[[], Guard | None] = lambda: None  # which asks by the first of them
        self._lock = threading.RLock()  # what other threads ask comes before the end, or is refused
        self._end = weakref.finalize(self, _end, self._loop, self._thread, self._clients)
        self._end.atexit = False
        _open.add(self)
        call_in_forks(self._forked)

    def _forked(self) -> None:
        self._lock = threading.RLock()

    @property
    def info(self) -> ServerInfo:
        """What the server said when it was connected last."""
        return self._client.info

    @property
    def session(self) -> str:
        """The episode, as the server knows it."""
        return self._client.session

    def act(
        self,
        images: Any,
        instruction: str,
        *,
        state: Any = None,
        unnorm_key: str | None = None,
        step: int | None = None,
        committed: Any = None,
        session: str | None = None,
        details: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """What to do for what is seen.

        Args:
            images: An image, or {camera: image} of `info.cameras`: (H, W, 3) uint8, one of Pillow's, or a JPEG or PNG
                file (its path or bytes). Any size.
            instruction: What to do, for example "open the drawer".
            state: (S,) state of the robot, of a model that sees it.
            unnorm_key: Dataset whose units the actions are in. May be left out where the server has a default.
            step: Of the episode, from 0 on.
            committed: (n, A) actions of the next steps, which are executed while the server thinks.
            session: The episode. Default: that of this client, until `reset`.
            details: Ask for normalized actions and probabilities as well.
            timeout: Seconds. Default: that of the client.

        Raises:
            ValueError: If something given is none of this. Nothing was asked.
        """
        return self._call(
            self._client.act(
                images, instruction, state=state, unnorm_key=unnorm_key, step=step, committed=committed,
                session=session, details=details, timeout=timeout,
            )
        )  # fmt: skip

    def guard(self, unnorm_key: str | None = None, **options: Any) -> Guard:
        """A `Guard` over this client, whose observations are what `act` takes: `{"images": ..., "instruction": ...}`.
        Of several at a time each has a connection of its own: none waits for the answers of another.

        Args:
            options: Of `Guard`. `spec` and `hz` are the server's, where they are not given. Where the model does not
                state what its actions mean, a warning says so, and the fallback is "raise", unless `spec` or
                `fallback` is given.

        Raises:
            ValueError: If the server has no such key, or refuses so many committed actions; see `Guard`.
        """
        info = self.info
        key, chunk = info.key(unnorm_key), info.chunk
        dataset = info.datasets[key]
        commit = options.get("commit", 0)
        if is_number(commit) and commit >= chunk:
            raise ValueError(
                f"commit={commit}: this model answers {chunk} actions, of which fewer can be decided before."
            )
        if not dataset.stated and "spec" not in options:
            fallback = options.get("fallback")
            if fallback != "raise":
                holds = "step() raises NoAction where no action is left"
                if fallback is not None:
                    holds = f"fallback='hold' believes {dataset.spec.describe()}"
                warnings.warn(
                    f"{key!r}: the model does not state which numbers of an action are changes, of which 0 holds "
                    f"still, and which are places, of which 0 is a motion: {holds}. Give spec=, what they mean, or "
                    "train with --absolute-dims.",
                    stacklevel=2,
                )
            options = {**options, "fallback": "raise" if fallback is None else fallback}
        options = {"spec": dataset.spec, **options}

        own = secrets.token_hex(4)  # guards that share a client are robots of their own

        def answer(ask: Ask) -> Any:
            session = f"{self.session}-{own}-{ask.epoch}"
            if not isinstance(ask.observation, Mapping):
                given = type(ask.observation).__name__
                raise ValueError(
                    f"observation is {given}: expected what act takes, {{'images': ..., 'instruction': ...}}."
                )
            if (other := ask.observation.get("unnorm_key", key)) != key:
                raise ValueError(
                    f"unnorm_key={other!r}: this guard is of {key!r}; client.guard({other!r}) makes another."
                )
            seen = {"committed": ask.committed, **ask.observation, "unnorm_key": key, "session": session}
            found = self._call(client.act(**seen, step=ask.step, timeout=patience))
            if client.info != info:  # its numbers may have the same names and other units
                raise BadAnswer("The server was started again with another model: make another guard for it.")
            return found.actions

        # The first connection begins no epoch.
        transport = ThreadTransport(answer, lambda: max(1, client.connections), lambda: self._leave(client))
        with self._lock:  # or two threads were given the same
            client, before = self._client, self._guard()
            if (before is None or before._closed) and client._told == info:
                guard = Guard(transport, **options)
                self._guard = weakref.ref(guard)
            else:
                client = AsyncClient(client.address, client.settings, of=client)
                guard = Guard(transport, **options)
                self._clients.append(client)
        patience = guard.stalled_after + (chunk - 1) * guard.period  # what comes later could not act any more
        weakref.finalize(guard, transport.close).atexit = False  # or its thread would hold this client for ever
        return guard

    def _leave(self, client: AsyncClient) -> None:
        """Its guard has ended, and needs no place of the server any more."""
        if client is not self._client:
            with suppress(NotReached):  # all of them are closed
                self._call(client.close())
                self._clients.remove(client)

    def reset(self) -> None:
        """An episode begins: another session, and the server may forget the last one."""
        self._call(self._client.reset())

    def close(self) -> None:
        with self._lock:
            if self._end.detach():  # called itself it does nothing at the end of a program
                _end(self._loop, self._thread, self._clients)
        self._thread.join()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        if not self._thread.is_alive() and self._end.alive:
            work.close()
            raise NotReached("This client is of another process (a fork): connect(url) in this one.")
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(work, self._loop) if self._end.alive else None
        if future is None:
            work.close()
            raise NotReached("This client is closed: connect(url) makes another one.")
        if not self._end.alive:  # a signal closed it meanwhile: nobody may ever look at this
            future.cancel()
        try:
            return future.result()
        except CancelledError as error:
            raise NotReached("This client was closed.") from error
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits any more
            raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, clients: list[AsyncClient]) -> None:
    """Of a client that is closed or that nobody holds any more, or its connection would take a place of the server for
    ever. Waits for nothing: garbage is collected in any thread."""
    if thread.is_alive():
        ended = asyncio.run_coroutine_threadsafe(_ended(clients), loop)
        ended.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))


async def _ended(clients: list[AsyncClient]) -> None:
    """Close, and let nobody wait for ever."""
    waiting = _others()
    await asyncio.gather(*(client.close() for client in list(clients)))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    # Those that connected again meanwhile. No goodbye is cancelled: one that has not begun would leave its socket.
    await asyncio.gather(*(client.close() for client in list(clients)), *_others())


def _others() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def connect(
    url: str,
    *,
    wait: float = 0.0,
    key: str | None = None,
    timeout: float = 10.0,
    images: str = "raw",
    quality: int = 95,
    ssl: SSLContext | None = None,
) -> Client:
    """A client of the server at `ws://HOST:PORT` or `http://HOST:PORT`.

    Args:
        wait: Seconds to wait for a server that is starting.
        key: Of the server. Default: `OPENVLA_API_KEY` of the environment.
        timeout, images, quality: See `Settings`.
        ssl: For `wss://` and `https://` with a certificate that the system does not know.

    Raises:
        ValueError: If an argument is wrong.
        NotReached, NoAnswer, Refused, BadAnswer: See `Client`.
    """
    client = Client(*read_settings(key, ssl, url, {"timeout": timeout, "images": images, "quality": quality}))
    try:
        client._call(client._client.connect(wait))
    except BaseException:
        client.close()
        raise
    return client
