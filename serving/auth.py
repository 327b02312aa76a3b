"""Who may ask at all: checked before a byte of a body is read.

With a key: whoever has it. Without one a server listens on loopback, where every page that a browser of this machine
shows could reach it as well: requests that come from a page of another site (`Origin`), or under a name that is not
this machine's (`Host`: a name of another site that was made to lead here), are refused.
"""

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .contract import Busy, Forbidden, Refusal, Unauthorized


logger = logging.getLogger(__name__)
AGAIN = 60.0  # seconds until the log says the same of another client: whoever knocks all day fills no disk
VARIABLE = "OPENVLA_API_KEY"  # of the environment
OPEN_PATHS = ("/healthz", "/readyz")  # what asks whether a server lives has no key
SCHEMES = ("api-key", "bearer")


def read_key(environment: Any) -> str | None:
    """The key of the environment; None where there is none.

    Raises:
        ValueError: If it is empty, or no header could hold it.
    """
    key = environment.get(VARIABLE)
    return None if key is None else checked_key(key)


def checked_key(key: str) -> str:
    """Without spaces around it. A `ValueError` if it is none."""
    key = key.strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ValueError(f"{VARIABLE} is set, and empty or not ASCII: give a key (openssl rand -hex 32), or unset it.")
    return key


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """In front of an app.

    Args:
        key: Clients send it as `Authorization: Api-Key KEY` or `Bearer KEY`. None: everyone may ask.
        names: Further names under which the server is asked, as a proxy passes them on.
        open_paths: `GET`s that need no key, because they tell nothing.
        connections: Requests and WebSockets at a time.
        refused: Told of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None = None,
        names: Collection[str] = (),
        open_paths: Collection[str] = OPEN_PATHS,
        connections: int = 64,
        refused: Callable[[Refusal], Any] = lambda refusal: None,
    ):
        self.app, self.open_paths, self.connections = app, open_paths, connections
        self.names = {name.lower() for name in ("localhost", *names)}
        self._refused = refused
        self._key = key.encode() if key is not None else None
        self._open = 0
        self._told: dict[str, float] = {}  # code of a refusal -> when the log said it last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # An address with a slash at its end is the same one: from one to the other starlette would lead, curl nowhere
        # and others out of TLS.
        path = scope["path"].rstrip("/")
        if scope["type"] == "http" and path not in (scope["path"], scope.get("root_path", "").rstrip("/")):
            scope = {**scope, "path": path}
        try:
            self._check(scope, Headers(scope=scope))
        except Refusal as refusal:
            self._refused(refusal)
            self._tell(refusal, scope)
            await refuse(refusal, scope, receive, send)
            return
        self._open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._open -= 1

    def _tell(self, refusal: Refusal, scope: Scope) -> None:
        """One line in the log, for whoever wonders why a robot gets no answer. Nothing in it is the client's."""
        now = time.monotonic()
        if now - self._told.get(refusal.code, -AGAIN) >= AGAIN:
            self._told[refusal.code] = now
            address = (scope.get("client") or ("unknown",))[0]
            logger.warning("A client at %s is refused (%s): %s", address, refusal.code, refusal)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        free = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in self.open_paths
        foreign = origin is not None and origin.partition("://")[2] != host
        if foreign or (site not in ("none", "same-origin") and not free):
            raise Forbidden(
                "A page of another site asks: this server answers programs, and its own page. (A proxy has to pass "
                "Host on.)"
            )
        if self._key is None:
            if not self._known(host):
                raise Forbidden(
                    "This server is asked under a name that it does not know. Use its address, or start it with "
                    "--allow-host NAME, or with a key."
                )
        elif not free:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() not in SCHEMES or not hmac.compare_digest(given.strip().encode(), self._key):
                raise Unauthorized("Send the key of this server: 'Authorization: Api-Key KEY', or 'Bearer KEY'.")
        if self._open >= self.connections and not free:
            raise Busy(f"{self._open} clients are connected already.", retry_after=1.0)

    def _known(self, host: str) -> bool:
        """Addresses, which no name leads to, and names of this server."""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def refusal_response(refusal: Refusal, **more: bool) -> JSONResponse:
    headers = {}
    if isinstance(refusal, Busy):
        headers["Retry-After"] = str(max(1, round(refusal.retry_after)))
    if isinstance(refusal, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({**more, **refusal.content()}, refusal.status, headers)


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket that is not open yet, with a refusal."""
    if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
        await refusal_response(refusal)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
