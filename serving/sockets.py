"""Bodies and messages while they come in."""

import asyncio
import socket
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from .contract import Busy
from .room import Room, Share


TRY_AGAIN_LATER, TOO_BIG = 1013, 1009  # of WebSockets
MOST_FRAGMENTS = 16_384  # of a message: 2 KiB each of the largest; empty ones take room that no byte of them counts
QUICK_ACKNOWLEDGEMENT = getattr(socket, "TCP_QUICKACK", None)  # Linux; it holds until the next answer
NO_WEBSOCKET = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 57\r\n\r\n"
    b"Upgrade: websocket came with what begins none, a GET does"
)
STILL_THERE = b"HTTP/1.1 100 Continue\r\n\r\n"  # clients leave it out; those of HTTP/1.0 do not know it
FRAME = 256  # bytes that a message takes at least, and each further fragment of one beside what it holds
SMALL = 512  # bytes of a piece of a body: networks carry more at a time


def acknowledge(transport: asyncio.Transport) -> None:
    """Tell a client at once that its bytes are here. Whoever sends a head and what belongs to it one after the other,
    without TCP_NODELAY, sends the second part only then, and systems wait up to 40 ms for something to tell it with."""
    if QUICK_ACKNOWLEDGEMENT is not None:
        with suppress(OSError):  # it has gone
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, QUICK_ACKNOWLEDGEMENT, 1)


class Flow(FlowControl):
    """Of a connection on which requests may come before the last is answered: it is read no further until they are
    looked at. uvicorn reads on whenever an app asks whether the client is still there, and keeps all that comes."""

    behind = False

    def resume_reading(self) -> None:
        if not self.behind:
            super().resume_reading()

    def wait_behind(self, behind: bool) -> None:
        before, self.behind = self.behind, behind
        if before and not behind:
            super().resume_reading()


class CountedRequests(H11Protocol):
    """HTTP whose bodies come in so many small pieces at most: chunks of one byte, also of who may not ask, kept the
    event loop, and with it all robots, busy for a second a megabyte.

    By h11: httptools, which uvicorn takes by itself where it is installed, reads headers of any size.
    """

    flow: Flow

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._small, self._next = 0, self.conn.next_event
        self.conn.next_event = self._counted  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)

    def data_received(self, data: bytes) -> None:
        acknowledge(self.transport)
        super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has said all and listens on, or one that has gone: they look the same until something is sent
        to them."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete or self.conn.their_http_version != b"1.1":
            return False
        cycle.keep_alive = False
        self._knock(cycle, 0.02)
        return True

    def _knock(self, cycle: RequestResponseCycle, pause: float) -> None:
        """The system of a client that has gone refuses it, and the next one, `pause` seconds later, ends the
        connection."""
        if not (cycle.response_started or cycle.disconnected):
            self.transport.write(STILL_THERE)
            self.loop.call_later(pause, self._knock, cycle, 4 * pause)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.flow.wait_behind(False)
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """To a request that turns out to be none, the only answer it gets. uvicorn would log a traceback of each that
        is answered already, or right now."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with suppress(h11.LocalProtocolError):  # the answer to HEAD has no text
                super().send_400_response(msg)
        self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True

    def _counted(self) -> Any:
        event = self._next()
        if event is h11.PAUSED or event is h11.NEED_DATA:
            self.flow.wait_behind(event is h11.PAUSED)
        if isinstance(event, h11.Request):
            self._small = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # A proxy that goes by the other one takes what is left of the body for another client's request.
                raise h11.RemoteProtocolError("two lengths of a body")
        elif isinstance(event, h11.Data):
            self._small += len(event.data) < SMALL
            if self._small > MOST_FRAGMENTS:
                self.transport.abort()
                return h11.NEED_DATA
        return event


class CountedSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose messages take their share of a room while they come in; without room it is closed. uvicorn
    gathers them to their end, and lets one wait until it is asked for, where nothing else sees them."""

    def __init__(self, *args: Any, room: Room, **more: Any):
        super().__init__(*args, **more)
        self._share, self._waiting, self._fragments, self._lost = Share(room), 0, 0, False

    def data_received(self, data: bytes) -> None:
        acknowledge(self.transport)
        super().data_received(data)
        self._count()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn answers nothing, ever
            self.transport.write(NO_WEBSOCKET)
            self.transport.close()

    def handle_cont(self, event: Frame) -> None:
        self._fragments += 1
        if self._fragments <= MOST_FRAGMENTS:
            super().handle_cont(event)
        else:
            self._fail(TOO_BIG, f"more than {MOST_FRAGMENTS} fragments")

    def send_receive_event_to_app(self) -> None:
        self._fragments = 0
        self._waiting += max(self._coming(), FRAME)  # no more than it holds: one of the largest has room
        if self.curr_msg_data_type == "text":  # is refused unread; of what is no UTF-8 uvicorn would log a traceback
            self.frames, self.bytes = [b""], b""
        super().send_receive_event_to_app()
        self.bytes = b""  # where older uvicorn leaves the message

    async def receive(self) -> Any:
        message = await super().receive()
        if self.queue.empty():
            self._waiting = 0
            self._count()
        if not self.writable.is_set():
            self.transport.pause_reading()
        return message

    def pause_writing(self) -> None:
        """Who does not take what he is sent is read no further: each ping, too, has an answer that takes memory."""
        self.writable.clear()  # as newer uvicorn does (0.35 leaves it)
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.writable.set()
        if not self.read_paused:
            self.transport.resume_reading()

    async def send(self, message: Any) -> None:
        if self.close_sent:  # as after a frame that is none: uvicorn would call what is sent then a mistake in the log
            raise ClientDisconnected
        if message["type"] == "websocket.http.response.start":
            # uvicorn adds the length of a refusal, older ones (0.35) beside the one that is there: nobody reads such.
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
            message = {**message, "headers": headers}
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # a refusal is one, too: uvicorn would call it missing in the log

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.writable.set()
        self._lost = True  # what is left of a message never comes: counted again it would keep its share for ever
        self._share.resize(0)

    def _count(self) -> None:
        if self._lost:
            return
        try:
            self._share.resize(self._coming() + self._waiting)
        except Busy as busy:
            self._share.resize(0)
            self._fail(TRY_AGAIN_LATER, str(busy))

    def _fail(self, code: int, reason: str) -> None:
        if self.conn.state is State.OPEN:
            self.conn.fail(code, reason)
            self.handle_parser_exception()

    def _coming(self) -> int:
        """Bytes of the message that is not complete."""
        fragments = getattr(self, "frames", None) or [getattr(self, "bytes", b"")]  # older uvicorn joins them
        return len(self.conn.reader.buffer) + sum(map(len, fragments)) + FRAME * (len(fragments) - 1)
