"""One message to a server, and what came back: over a WebSocket in openpi's form, or as `POST /act`.

A connection on which an answer did not come in time is closed: what comes late is then answered to nobody.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any, Protocol, cast
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from .errors import BadAnswer, NotReached, Refused
from .messages import MOST_BYTES, ServerInfo, decoded, read_info, read_refusal
from .wire import from_json


MSGPACK = "application/msgpack"
CLOSING = 0.2  # seconds for a goodbye
UNREACHED = (aiohttp.ClientError, OSError)
REMEDY = "is `openvla serve` running there, and reachable?"


def _is_address(url: Any) -> bool:
    if not isinstance(url, str) or any(letter.isspace() for letter in url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("ws", "wss", "http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none, or brackets that do not close
        return False


@dataclass(frozen=True)
class Address:
    """Where a server is: `ws://` or `wss://` for a WebSocket, `http://` or `https://` for requests."""

    url: str
    key: str | None = field(default=None, repr=False)
    ssl: SSLContext | None = None

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise ValueError(
                f"url={self.url!r:.200}: expected ws://HOST:PORT or http://HOST:PORT (wss, https through TLS)."
            )
        key = "" if self.key is None else self.key
        if self.key is not None and not (isinstance(key, str) and key.strip() and key.isascii() and key.isprintable()):
            raise ValueError("key: it is empty, or no header can hold it; give the OPENVLA_API_KEY of the server.")

    @property
    def shown(self) -> str:
        """In messages, which stand in logs: without the password of a proxy."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def websocket(self) -> bool:
        return urlsplit(self.url).scheme in ("ws", "wss")

    @property
    def headers(self) -> dict[str, str]:
        """Nothing compressed is read: a proxy that compresses has to leave answers as they are."""
        key = {} if self.key is None else {"Authorization": f"Api-Key {self.key.strip()}"}
        return {"Accept-Encoding": "identity", **key}

    @property
    def more(self) -> dict[str, Any]:
        """For aiohttp."""
        return {"headers": self.headers, **({} if self.ssl is None else {"ssl": self.ssl})}

    def http(self, path: str) -> str:
        parts = urlsplit(self.url)
        scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
        prefix = parts.path.rstrip("/").removesuffix("/act")  # as curl is given it
        return urlunsplit((scheme, parts.netloc, prefix + path, "", ""))


class Response(aiohttp.ClientResponse):
    """Of a request that leaves nothing behind where nobody waits any more. aiohttp would keep the connection until all
    of it is sent: where a network has gone, a picture in memory for each try, and old ones go before new ones later.
    """

    transport: asyncio.Transport | None = None

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        self.transport = connection.transport
        try:
            return await super().start(connection)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        if self.transport is not None:
            with suppress(RuntimeError):  # its event loop has ended already
                self.transport.abort()


class Socket(aiohttp.ClientWebSocketResponse):
    """The same, which began with such a request."""

    def abort(self) -> None:
        cast(Response, self._response).abort()


class Connection(Protocol):
    """Open."""

    info: ServerInfo
    closed: bool

    async def exchange(self, data: bytes) -> Any:
        """The answer to a message.

        Raises:
            Refused, BadAnswer, NotReached: The latter two close it.
        """
        ...

    async def close(self) -> None: ...


async def open_connection(http: aiohttp.ClientSession, address: Address) -> Connection:
    """Raises `NotReached`, `Refused`, or `BadAnswer`; the caller bounds the time."""
    return await (WebSocket if address.websocket else Requests).open(http, address)


async def refuse_redirect(http: aiohttp.ClientSession, context: Any, sent: aiohttp.TraceRequestRedirectParams) -> None:
    """WebSockets of aiohttp would follow: to another server, whose actions would move the robot, or out of TLS."""
    status = sent.response.status
    said = f"{sent.url} leads to another address (HTTP status {status}): connect to that one, if it is yours."
    raise Refused(said, f"http_{status}")


async def get(http: aiohttp.ClientSession, address: Address, path: str) -> tuple[int, bytes]:
    """Status and body of a `GET`. Raises `NotReached`."""
    try:
        async with http.get(address.http(path), allow_redirects=False, **address.more) as response:
            return response.status, await _body(response)
    except UNREACHED as error:
        raise NotReached(f"{address.shown}: {_told(error)}; {REMEDY}") from error


class Requests:
    """Each message is a request of its own, of connections that are kept open."""

    def __init__(self, http: aiohttp.ClientSession, address: Address, info: ServerInfo):
        self._http, self._address, self.info, self.closed = http, address, info, False
        self._url = address.http("/act")
        headers = {**address.headers, "Content-Type": MSGPACK, "Accept": MSGPACK}
        self._more = {**address.more, "headers": headers, "allow_redirects": False}

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, address: Address) -> "Requests":
        status, body = await get(http, address, "/info")
        return cls(http, address, read_info(_json(status, body)))

    async def exchange(self, data: bytes) -> Any:
        try:
            async with self._http.post(self._url, data=data, **self._more) as response:
                body = await _body(response)
                if response.status != 200:
                    _json(response.status, body)
                packed = response.content_type == MSGPACK
        except UNREACHED as error:
            self.closed = True
            raise NotReached(f"{self._address.shown}: {_told(error)}; {REMEDY}") from error
        return decoded(body) if packed else parsed(body)

    async def close(self) -> None:
        self.closed = True


class WebSocket:
    """The server speaks first and says what it is; then each message has its answer. One at a time."""

    def __init__(self, socket: Socket, url: str):
        self._socket, self._url, self.closed = socket, url, False
        self._frames: asyncio.Queue[aiohttp.WSMessage | None] = asyncio.Queue()
        self._lock = asyncio.Lock()
        self._asked = True  # the first frame is expected
        self._reader = asyncio.create_task(self._read())
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, address: Address) -> "WebSocket":
        try:
            closing = aiohttp.ClientWSTimeout(ws_close=CLOSING)
            socket = await http.ws_connect(
                address.url, compress=0, max_msg_size=MOST_BYTES, timeout=closing, **address.more
            )
        except aiohttp.WSServerHandshakeError as error:
            said = {401: "unauthorized", 403: "forbidden", 503: "busy"}.get(error.status, f"http_{error.status}")
            remedy = {
                401: " Give key=..., or set OPENVLA_API_KEY to that of the server.",
                403: " Ask it by its address, or start it with --allow-host NAME, or with a key.",
                404: " Give the address alone, ws://HOST:PORT, or with the prefix that a proxy asks for.",
            }.get(error.status, "")
            raise read_refusal({"error": f"{address.shown}: HTTP status {error.status}.{remedy}"}, said) from error
        except UNREACHED as error:
            raise NotReached(f"{address.shown}: {_told(error)}; {REMEDY}") from error
        connection = cls(cast(Socket, socket), address.shown)
        try:
            connection.info = read_info(await connection._frame())
            if connection.closed:  # a server that hangs up at once is asked no more often than one that is not there
                await connection._frame()
        except BaseException:
            connection.drop()
            raise
        return connection

    info: ServerInfo

    async def exchange(self, data: bytes) -> Any:
        async with self._lock:
            if self.closed:
                raise NotReached(f"{self._url}: the connection was closed.")
            try:
                self._asked = True
                await self._socket.send_bytes(data)
                return await self._frame()
            except NotReached:
                self.drop()
                raise
            except UNREACHED as error:
                self.drop()
                raise NotReached(f"{self._url}: {_told(error)}; {REMEDY}") from error
            except (asyncio.CancelledError, BadAnswer):
                self.drop()
                raise

    async def _frame(self) -> Any:
        message = await self._frames.get()
        if message is None:
            raise NotReached(f"{self._url}: the connection broke (close code {self._socket.close_code}); {REMEDY}")
        if message.type is aiohttp.WSMsgType.TEXT:
            raise read_refusal(parsed(message.data), "refused")
        return decoded(message.data)

    async def _read(self) -> None:
        """Frames as they come, also while nobody waits: pings are answered, and an end is seen."""
        try:
            async for message in self._socket:
                wanted = message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY) and self._asked
                if not wanted:  # nobody asked for it, or it is too large
                    break
                self._asked = False
                self._frames.put_nowait(message)
        except UNREACHED:
            pass
        self._frames.put_nowait(None)
        self.drop()

    def drop(self) -> None:
        """Close without waiting: a network that swallows everything answers no goodbye either."""
        self.closed = True
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        self._reader.cancel()
        with suppress(TimeoutError, asyncio.CancelledError, *UNREACHED):
            async with asyncio.timeout(2 * CLOSING):
                await self._socket.close()
        self._socket.abort()

    async def close(self) -> None:
        self.drop()
        assert self._closing is not None
        await self._closing


async def _body(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_chunked(2**16):
        parts.append(part)
        if (size := size + len(part)) > MOST_BYTES:
            raise BadAnswer(f"An answer of more than {MOST_BYTES} bytes.")
    return b"".join(parts)


def _json(status: int, body: bytes) -> Any:
    """Raises `Refused` of another status than 200."""
    content = parsed(body)
    if status != 200:
        raise read_refusal(content, f"http_{status}")
    return content


def parsed(data: str | bytes) -> Any:
    try:
        return from_json(data)
    except ValueError:
        return None


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
