"""openpi's form over WebSockets: the server sends what it is, then each message is an observation, each answer actions.

Messages are msgpack with arrays (`wire`). A text frame is a refusal, as JSON: `{"error", "code"}`; the connection stays
open, and the next observation is answered again. Answers come in the order of their observations; a client may send the
next one before it has the answer to the last.
"""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from . import wire
from .auth import refuse
from .contract import Answer, ModelInfo, NotThere, Refusal
from .names import VIEW_OF, Call, Reset
from .service import Service, content, metadata


REALTIME = "/v1/realtime/robot/openpi"  # of vllm-omni's clients
RESET = "reset successful"  # which they expect, as text


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.websocket("/")
    async def openpi(socket: WebSocket) -> None:
        await Conversation(socket, service, metadata(service.info), content, lambda: wire.pack({"reset": True})).run()

    @router.websocket(REALTIME)
    async def realtime(socket: WebSocket) -> None:
        found = {**metadata(service.info), **realtime_metadata(service.info)}
        await Conversation(
            socket, service, found, lambda call, answer: answer.actions.astype(np.float32), lambda: RESET
        ).run()

    @router.websocket("/{path:path}")  # starlette would say 403, as if a key were missing
    async def elsewhere(socket: WebSocket, path: str) -> None:
        said = f"/{path:.100}: there is no WebSocket here, but at / and {REALTIME}."
        await refuse(NotThere(said), socket.scope, socket.receive, socket.send)

    return router


def realtime_metadata(info: ModelInfo) -> dict[str, Any]:
    """What clients of that form look for."""
    views = [VIEW_OF.get(camera, camera) for camera in info.cameras]
    return {
        "image_resolution": list(info.image_size),
        "action_horizon": info.chunk,
        "n_external_cameras": sum(view in ("primary", "secondary") for view in views),
        "needs_wrist_camera": any("wrist" in view for view in views),
        "needs_stereo_camera": False,
        "needs_session_id": False,
    }


class Conversation:
    """One connection.

    Args:
        first: What the server sends before anything comes.
        form: What is sent of an answer.
        reset: What is sent when an episode has ended.
    """

    def __init__(
        self,
        socket: WebSocket,
        service: Service,
        first: dict[str, Any],
        form: Callable[[Call, Answer], Any],
        reset: Callable[[], bytes | str],
    ):
        self.socket, self.service, self.first, self.form, self.reset = socket, service, first, form, reset
        # A connection that names no session is one: of what it sends, the newest counts.
        self.session = f"connection {secrets.token_hex(8)}"
        self.turn = asyncio.Lock()

    async def run(self) -> None:
        await self.socket.accept()
        self.service.metrics.connected(1)
        frames: asyncio.Queue[asyncio.Task[bytes | str]] = asyncio.Queue(self.service.limits.ahead)
        tasks: set[asyncio.Task] = set()
        ends = {asyncio.create_task(self._read(frames, tasks)), asyncio.create_task(self._send(frames))}
        try:  # whichever sees the end of the connection first: to a client that is gone no frame can be sent
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        except WebSocketDisconnect:
            pass
        finally:
            self.service.metrics.connected(-1)
            self.service.engine.end_session(self.session)
            rest = {*tasks, *ends}
            for task in rest:
                task.cancel()
            await asyncio.wait(rest)
            for task in rest:
                task.cancelled() or task.exception()  # seen: nobody waits for it any more

    async def _read(self, frames: "asyncio.Queue[asyncio.Task[bytes | str]]", tasks: set[asyncio.Task]) -> None:
        """Messages as they come, until there is none any more."""
        await self.socket.send_bytes(wire.pack(self.first))
        while (message := await self._receive()) is not None:
            task = asyncio.create_task(self._frame(message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await frames.put(task)

    async def _receive(self) -> bytes | str | None:
        """The next message; None when there is none any more."""
        try:
            async with asyncio.timeout(self.service.limits.idle_seconds):
                message = await self.socket.receive()
        except TimeoutError:
            await self.socket.close(1001, "idle")
            return None
        if message["type"] == "websocket.disconnect":
            return None
        data = message.get("bytes")
        return message.get("text", "") if data is None else data

    async def _frame(self, message: bytes | str) -> bytes | str:
        """The answer to a message."""

        def decode() -> Any:
            if isinstance(message, str):
                raise ValueError("A text frame came: send msgpack in a binary one.")
            return wire.unpack(message)

        try:
            with self.service.asked("websocket"), self.service.room.share(len(message)):
                call, answer = await self.service.answer(decode, len(message), self.session, self.turn)
        except Refusal as refusal:
            return json.dumps(refusal.content())
        if isinstance(call, Reset) or answer is None:
            return self.reset()
        return wire.pack(self.form(call, answer))

    async def _send(self, frames: "asyncio.Queue[asyncio.Task[bytes | str]]") -> None:
        while True:
            task = await frames.get()
            with self.service.sending():
                frame = await task
                try:
                    async with asyncio.timeout(self.service.limits.send_seconds):
                        await (
                            self.socket.send_text(frame) if isinstance(frame, str) else self.socket.send_bytes(frame)
                        )
                except TimeoutError:  # who does not read keeps no place
                    raise WebSocketDisconnect(1006) from None
