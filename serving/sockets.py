"""Messages of WebSockets while they come in."""

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from .contract import Busy
from .room import Room, Share


TRY_AGAIN_LATER, TOO_BIG = 1013, 1009  # of WebSockets
MOST_FRAGMENTS = 16_384  # of a message: 2 KiB each of the largest; empty ones take room that no byte of them counts


class CountedSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose messages take their share of a room while they come in; without room it is closed. uvicorn
    gathers them to their end, and lets one wait until it is asked for, where nothing else sees them."""

    def __init__(self, *args: Any, room: Room, **more: Any):
        super().__init__(*args, **more)
        self._share, self._waiting, self._fragments = Share(room), 0, 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._count()

    def handle_cont(self, event: Frame) -> None:
        self._fragments += 1
        if self._fragments <= MOST_FRAGMENTS:
            super().handle_cont(event)
        else:
            self._fail(TOO_BIG, f"more than {MOST_FRAGMENTS} fragments")

    def send_receive_event_to_app(self) -> None:
        self._fragments = 0
        self._waiting += self._coming()
        super().send_receive_event_to_app()
        self.bytes = b""  # where older uvicorn leaves the message

    async def receive(self) -> Any:
        message = await super().receive()
        if self.queue.empty():
            self._waiting = 0
            self._count()
        return message

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # a refusal is one, too: uvicorn would call it missing in the log

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._share.resize(0)

    def _count(self) -> None:
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
        fragments = getattr(self, "frames", None) or [getattr(self, "bytes", b"")]
        return len(self.conn.reader.buffer) + sum(map(len, fragments))
