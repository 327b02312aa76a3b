"""Asks a server of `openvla serve` for actions; the same calls over both protocols, within one event loop."""

import asyncio
import itertools
import os
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ssl import SSLContext
from typing import Any

import aiohttp
import numpy as np

from .checks import seconds
from .connection import Address, Connection, Response, Socket, get, open_connection, parsed, refuse_redirect
from .errors import BadAnswer, NoAnswer, NotReached, Refused
from .forks import call_in_forks, keep
from .messages import FORMATS, Answer, OtherModel, ServerInfo, encoded, read_answer, read_refusal, request


VARIABLE = "OPENVLA_API_KEY"
LONGEST = 600_000.0  # milliseconds that a server lets a request wait
NOT_READY = ("busy", "hung")  # codes of a server that may be ready later
NOT_THERE = (502, 503, 504)  # status of one that is not ready, or of a proxy before one that is not there yet
SESSIONS = 256  # of which it is remembered what server they know
BACK_OFF = (0.05, 1.0)  # seconds between attempts to connect: the first, the longest


@dataclass(frozen=True)
class Settings:
    """How a client asks.

    timeout: Seconds of one call, connecting included.
    images: "raw": the pixels that the robot sees; "jpeg", "png": smaller, for slow networks. JPEG changes pixels a
        little, and with them sometimes an action.
    quality: Of JPEG, 1 to 100.
    """

    timeout: float = 10.0
    images: str = "raw"
    quality: int = 95

    def __post_init__(self) -> None:
        if seconds("timeout", self.timeout, zero=False) >= 86400:
            raise ValueError(f"timeout={self.timeout}: expected less than a day of seconds.")
        if self.images not in FORMATS:
            raise ValueError(f"images={self.images!r}: expected one of {', '.join(FORMATS)}.")
        if type(self.quality) is not int or not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality!r:.100}: expected a whole number, 1 to 100.")


class AsyncClient:
    """As `Client`, with `await`; of one event loop. Made by `await connect_async(url)`.

    Args:
        of: A client of the same server, which this one is told of and tells.
    """

    def __init__(self, address: Address, settings: Settings, of: "AsyncClient | None" = None):
        self.address, self.settings = address, settings
        self.session = secrets.token_hex(8)
        self._http: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the session
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._of = of
        self._info: ServerInfo | None = None if of is None else of._info
        self._told = self._info  # what the caller knows of the server
        self._told_by: OrderedDict[Any, ServerInfo] = OrderedDict()  # the same by session: robots may share a client
        self._failures, self._not_before = 0, 0.0
        self._requests = itertools.count()
        self.connections = 0  # how often it was connected
        call_in_forks(self._forked)

    def _forked(self) -> None:
        """Sockets, and the selector of the event loop, are the other process's as well: closed or collected in this
        one, they would be deaf in that one. The next call connects, as another robot."""
        keep((self._http, self._connection, self._loop))
        self._http = self._connection = None
        self._connecting, self.session = asyncio.Lock(), secrets.token_hex(8)

    @property
    def info(self) -> ServerInfo:
        """What the server said when it was connected last."""
        if self._info is None:
            raise NotReached(f"{self.address.shown} was not reached yet: connect first.")
        return self._info

    async def connect(self, wait: float = 0.0) -> ServerInfo:
        """Reach the server, and wait up to `wait` seconds for it to be there and ready.

        Raises:
            NotReached, Refused, NoAnswer, BadAnswer: See `Client`.
        """
        end = time.monotonic() + seconds("wait", wait)
        while True:
            try:
                async with self._in_time(self.settings.timeout):
                    status, body = await get(self._session(), self.address, "/readyz")
                    if status in NOT_THERE:
                        refused = read_refusal(parsed(body), NOT_READY[0])
                        said = f"{self.address.shown}: HTTP status {status}. {refused} connect(..., wait=60) waits."
                        raise Refused(said, refused.code, refused.retry_after)
                    self._told = (await self._connected(time.monotonic() + self.settings.timeout)).info
                    self._told_by.clear()
                    return self._told
            except (NotReached, NoAnswer, Refused) as error:
                if isinstance(error, Refused) and error.code not in NOT_READY or time.monotonic() >= end:
                    raise
            await asyncio.sleep(min(0.2, max(0.0, end - time.monotonic())))

    async def act(
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
        """See `Client.act`."""
        begin = time.monotonic()
        timeout = self.settings.timeout if timeout is None else timeout
        async with self._in_time(timeout):
            connection = await self._connected(begin + timeout)
            session = self.session if session is None else session
            if self._is_news(session, connection.info):  # the numbers of its actions may mean something else
                raise BadAnswer(
                    f"{self.address.shown}: the server was started again with another model, and nothing was asked of "
                    "it. `info` of the client says what it is now: ask again if that is what you want."
                )
            make = partial(
                request, connection.info, images, instruction, state=state, unnorm_key=unnorm_key, step=step,
                committed=committed, session=session, details=details,
                form=self.settings.images, quality=self.settings.quality,
            )  # fmt: skip
            # A picture takes milliseconds to compress, a file to read, and the loop may move a robot.
            seen = images.values() if isinstance(images, Mapping) else (images,)
            quick = self.settings.images == "raw" and all(isinstance(image, np.ndarray) for image in seen)
            message = make() if quick else await asyncio.to_thread(make)
            message["request_id"] = next(self._requests)
            left = 1000 * (begin + timeout - time.monotonic())
            message["timeout_ms"] = min(max(1.0, left), LONGEST)
            content = await connection.exchange(encoded(message))
            try:
                return read_answer(content, message, connection.info, time.monotonic() - begin)
            except BadAnswer as error:
                await connection.close()
                if isinstance(error, OtherModel):  # or the next call would say it again
                    self._is_news(session, (await self._connected(begin + timeout)).info)
                raise

    async def reset(self) -> None:
        """See `Client.reset`. A server that is not reached forgets by itself."""
        old, self.session = self.session, secrets.token_hex(8)
        with suppress(NotReached, NoAnswer, Refused, BadAnswer):
            async with self._in_time(self.settings.timeout):
                connection = await self._connected(time.monotonic() + self.settings.timeout)
                await connection.exchange(encoded({"endpoint": "reset", "session": old}))

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        if self._http is not None:
            await self._http.close()
        self._connection = self._http = None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def _is_news(self, session: Any, info: ServerInfo) -> bool:
        """Whether who asks in this session knows another server; he is told now."""
        name = session if isinstance(session, str) else None
        before = self._told_by.pop(name, self._told)
        self._told_by[name] = self._told = info
        while len(self._told_by) > SESSIONS:
            self._told_by.popitem(last=False)
        return before not in (None, info)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._loop = asyncio.get_running_loop()
            never = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)  # see _in_time
            here = aiohttp.TraceConfig()
            here.on_request_redirect.append(refuse_redirect)
            # As all other programs find names: where aiodns is installed aiohttp asks by it, which knows no .local.
            connector = aiohttp.TCPConnector(resolver=aiohttp.ThreadedResolver())
            self._http = aiohttp.ClientSession(
                connector=connector, timeout=never, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                response_class=Response, ws_response_class=Socket,
                trace_configs=[here] if self.address.websocket else None,  # requests say themselves not to follow
            )  # fmt: skip
        return self._http

    async def _connected(self, end: float) -> Connection:
        """The open connection, or a new one; attempts are spaced out."""
        if self._http is not None and self._loop is not asyncio.get_running_loop():
            raise NotReached(
                "This client is of another event loop (asyncio.run makes one each time): connect_async here."
            )
        async with self._connecting:
            while self._connection is None or self._connection.closed:
                pause = self._not_before - time.monotonic()
                if time.monotonic() + pause >= end:
                    raise NotReached(f"{self.address.shown} was not reached in {self._failures} attempts.")
                await asyncio.sleep(max(0.0, pause))
                try:
                    self._connection = await open_connection(self._session(), self.address)
                except NotReached:
                    pause = min(BACK_OFF[1], BACK_OFF[0] * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1)
                    self._not_before, self._failures = time.monotonic() + pause, self._failures + 1
                    if self._not_before >= end:
                        raise
                else:
                    self._failures, self._info = 0, self._connection.info
                    if self._of is not None:
                        self._of._info = self._info
                    self.connections += 1
            return self._connection

    def _in_time(self, timeout: float) -> "_InTime":
        return _InTime(timeout, self.address.shown)


class _InTime:
    """Whatever takes longer raises `NoAnswer`."""

    def __init__(self, timeout: float, url: str):
        seconds("timeout", timeout, zero=False)
        self._timeout, self._seconds, self._url = asyncio.timeout(timeout), timeout, url

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError as error:
            raise NoAnswer(f"{self._url}: no answer in {self._seconds:g} s.") from error


def read_settings(key: str | None, ssl: SSLContext | None, url: str, options: dict) -> tuple[Address, Settings]:
    return Address(url, os.environ.get(VARIABLE) if key is None else key, ssl), Settings(**options)


async def connect_async(
    url: str,
    *,
    wait: float = 0.0,
    key: str | None = None,
    timeout: float = 10.0,
    images: str = "raw",
    quality: int = 95,
    ssl: SSLContext | None = None,
) -> AsyncClient:
    """As `connect`, for `await`."""
    client = AsyncClient(*read_settings(key, ssl, url, {"timeout": timeout, "images": images, "quality": quality}))
    try:
        await client.connect(wait)
    except BaseException:
        await client.close()
        raise
    return client
