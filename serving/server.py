"""Listens: a model, an engine and an app behind a port, until somebody says stop."""

import asyncio
import errno
import gc
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI

from ..options.serving import Limits, ServeOptions
from .app import create_app
from .auth import OPEN_PATHS, VARIABLE, is_loopback, read_key
from .contract import Failed, Model, ModelInfo
from .engine import Engine
from .episodes import Episodes, Simulator
from .live import LiveView
from .page import FILES, page_routes
from .rest import read_request
from .service import Service
from .sockets import CountedRequests, CountedSocket
from .worker import THREAD


PAGE_PATHS = ("/", *(f"/page/{name}" for name in FILES))  # the page asks for the key: its files need none
ELSEWHERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # of a machine that has not the address, or none such
GRACE = 30  # seconds in which what is in flight is answered when the server stops
CLOSING = 5  # seconds after them in which clients have to take what they were answered


def load_model(options: ServeOptions) -> Model:
    from .model import OpenVLAModel  # torch comes with it: what is wrong with an address is said before

    return OpenVLAModel.load(options)


def serve(
    options: ServeOptions,
    say: Callable[[str], Any] = print,
    *,
    load: Callable[[ServeOptions], Model] = load_model,
    simulator: Simulator | None = None,
) -> bool:
    """Listen until Ctrl-C or SIGTERM; then answer what is in flight.

    Args:
        say: Told where it listens, once it answers.
        load: Makes the model.
        simulator: What the page runs episodes in; None: the server runs none.

    Returns:
        Whether the model could be warmed up; if not, the log says why.

    Raises:
        ValueError: If an address that others reach has no key, or an option is wrong.
        OSError: If the address cannot be listened at, or the model is not there.
    """
    key = read_key(os.environ)
    check_address(options.host, key is not None or options.insecure)
    with listen(options.host, options.port) as listener:
        check_address(listener.getsockname()[0], key is not None or options.insecure)  # what a name has led to
        app = make_app(options, load(options), key, page=lambda engine, service: page(engine, service, simulator))
        port, info = listener.getsockname()[1], app.state.service.info
        server = Server(app, options, lambda: say(start_line(info, options.host, port, key is not None)))
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what uvicorn raises again once it is done
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            gc.unfreeze()  # or libraries that look for leaks at the end find what was kept
    return not server.broken


def leave(code: int, patience: float = CLOSING) -> None:
    """End the process here if a model still computes after `patience` seconds (it warms up, or hangs); else return.

    Python would stop the model's thread within torch, which aborts ("terminate called without an active exception").
    """
    for thread in threading.enumerate():
        if thread.name == THREAD:
            try:
                thread.join(patience)
                computes = thread.is_alive()
            except KeyboardInterrupt:  # nobody wants to wait; Python 3.11 would call the thread ended now
                computes = True
            if computes:
                logging.shutdown()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)


def make_app(
    options: ServeOptions, model: Model, key: str | None, page: Callable[[Engine, Service], APIRouter] | None = None
) -> FastAPI:
    """The app of a model, see `create_app`.

    Args:
        page: Makes the routes of `GET /`.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # thousands of lines of a picture that somebody made for that
    engine = Engine(
        model,
        options.max_batch,
        options.max_wait_ms,
        options.queue_size,
        options.hang_after_s,
        live=LiveView(frames=options.live_frames),
    )
    names = [name.strip() for name in (options.allow_host or "").split(",") if name.strip()]
    return create_app(
        engine, options, mapping=options.mapping, key=key, names=names,
        open_paths=(*OPEN_PATHS, *(PAGE_PATHS if page else ())),
        routes=[lambda service: page(engine, service)] if page else [],
    )  # fmt: skip


def page(engine: Engine, service: Service, simulator: Simulator | None) -> APIRouter:
    """`GET /`. Who may ask has been decided before (`auth.Gate`)."""
    episodes = None if simulator is None else Episodes(simulator, engine)
    if episodes is not None:
        service.closers.append(episodes.close)
    return page_routes(
        engine, lambda http: read_request(http, service), service.ask, service.asked, live=engine.live,
        episodes=episodes,
    )  # fmt: skip


def check_address(host: str, safe: bool) -> None:
    if not safe and not is_loopback(host):
        raise ValueError(
            f"host={host}: everyone who reaches it could move the robot. Set {VARIABLE} (export {VARIABLE}=$(openssl "
            "rand -hex 32)), which clients then send; or say --insecure."
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that has the port, before minutes go into a model. Raises an `OSError` that says what to do."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"host={host}: {error.strerror or error}; give an address of this machine.") from error
    # Of a name that is both, as localhost is, that of IPv4: clients that are given the name try both, and many are
    # given 127.0.0.1. Where it is not this machine's, but that of a router before it, the other one.
    for family, kind, protocol, _, address in sorted(found, key=lambda entry: entry[0]):
        try:
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                return listener
            except OSError:
                listener.close()
                raise
        except OSError as error:
            problem, elsewhere = error, error.errno in ELSEWHERE
            if not elsewhere:
                break
    remedy = "an address of this machine" if elsewhere else "another port"
    raise OSError(f"host={host}, port={port}: {problem.strerror or problem}; give {remedy}.") from problem


def start_line(info: ModelInfo, host: str, port: int, key: bool) -> str:
    """Where it listens, for what model, and how to try it."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}"
    fields = [f"-F {shlex.quote(f'{camera}=@frame.png')}" for camera in info.cameras] + [
        "-F instruction='open the drawer'"
    ]
    used = info.datasets[info.default_key or next(iter(info.datasets))]
    if used.state_dim is not None:
        fields.append(f"-F state='{[0] * used.state_dim}'")
    if info.default_key is None:
        fields.append(f"-F unnorm_key={shlex.quote(next(iter(info.datasets)))}")
    header = f'-H "Authorization: Bearer ${VARIABLE}" ' if key else ""
    example = f"curl -s {address}/act {header}{' '.join(fields)}"
    return f"serving {info.model} at {address}, a page in a browser; try: {example}"


def is_blocked(connection: Any) -> bool:
    """Whether a connection of uvicorn has more to send than its client has taken, be it HTTP or a WebSocket."""
    if writable := getattr(connection, "writable", None):
        return not writable.is_set()
    return connection.flow is not None and connection.flow.write_paused


def keep_loaded() -> None:
    """Collections of garbage do not look through what is loaded any more: it stays, and a collection that goes through
    all objects of the libraries would now and then stop every robot for 0.4 s (docs/LOG.md)."""
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Answers what is in flight before it closes connections.

    Args:
        announce: Called once the model is warm.

    Attributes:
        broken: The model could not be warmed up; the server has stopped by itself.
    """

    def __init__(self, app: Any, limits: Limits, announce: Callable[[], Any]):
        self.service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http=CountedRequests,
                ws=partial(CountedSocket, room=self.service.room),  # type: ignore[arg-type]  # it is called alone
                ws_max_size=limits.message_bytes,
                ws_per_message_deflate=False,  # nothing is unpacked before its size is known
                limit_concurrency=2 * limits.connections,  # also those that never finish what they ask
                timeout_keep_alive=30,
                timeout_graceful_shutdown=CLOSING,
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level="error",  # whoever sends nonsense fills no disk
                log_config=None,
            )
        )
        self._head_seconds = limits.head_seconds
        self._silent: dict[Any, tuple[Any, float]] = {}  # connection -> its last request, and since when there is none
        self.broken = False
        self._announce = announce
        self._task: asyncio.Task[None] | None = None

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._end_silent(time.monotonic())
        return await super().on_tick(counter)

    def _end_silent(self, now: float) -> None:
        """End connections that never say what they ask, and those that never take what they were sent: uvicorn waits
        for both as long as they like, and refuses everybody once there are too many of them."""
        silent = {}
        for connection in self.server_state.connections:
            request = getattr(connection, "cycle", connection)  # a WebSocket has none; None before the first
            idle = request is None or getattr(request, "response_complete", False)
            if idle or connection.transport.is_closing() or is_blocked(connection):
                before, since = self._silent.get(connection, (request, now))
                silent[connection] = (request, since if before is request else now)
                if now - silent[connection][1] > self._head_seconds:
                    connection.transport.abort()
        self._silent = silent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._task = asyncio.create_task(self._wait_for_model())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._task is not None:
            self._task.cancel()
        stop = asyncio.create_task(self.service.stop(GRACE, CLOSING))
        while not stop.done() and not self.force_exit:
            await asyncio.wait([stop], timeout=0.1)
        if not stop.done():  # a second Ctrl-C: nobody wants to wait
            stop.cancel()
            await self.service.engine.stop(0.0)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then, and logs a traceback of what was not done
            await self.lifespan.shutdown()

    async def _wait_for_model(self) -> None:
        try:
            await asyncio.shield(self.service.warm)
        except Failed:
            self.broken = self.should_exit = True
        else:
            keep_loaded()
            self._announce()
