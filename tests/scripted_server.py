"""A server that answers what a test tells it to, right or wrong, over both protocols. In a thread; no torch."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web
from openvla_client.action_spec import usual_spec
from openvla_client.wire import pack, unpack


def metadata(chunk: int = 2, dims: int = 3, **given: Any) -> dict:
    spec = {"names": [f"action[{i}]" for i in range(dims)], "relative": [True] * dims}
    dataset = {"state_dim": None, **(usual_spec(dims, hz=10).to_dict() if dims == 7 else spec), "spec_stated": True}
    return {
        "model": "scripted",
        "datasets": {"robot": dataset},
        "default_unnorm_key": "robot",
        "cameras": ["image"],
        "chunk": chunk,
        "image_size": [8, 8],
        **given,
    }


def right(message: dict, chunk: int = 2, dims: int = 3) -> dict:
    """What a server answers."""
    echoed = {name: message[name] for name in ("request_id", "unnorm_key", "session", "step") if name in message}
    return {"actions": np.full((chunk, dims), 0.25), "server_timing": {"infer_ms": 1.5}, **echoed}


class Scripted:
    """answer: message -> what is sent, packed; bytes as they are; text as a refusal; None: nothing, ever. A list: each
    entry after another.

    Attributes:
        first: Metadata, or bytes or text as they are. An HTTP error: in place of all of it.
        messages: What came.
        connections: How many WebSockets were opened.
    """

    def __init__(self, first: Any = None, answer: Callable[[dict], Any] = right, ready: int = 200):
        self.first, self.answer, self.ready = metadata() if first is None else first, answer, ready
        self.messages: list[dict] = []
        self.headers: list[Any] = []
        self.connections = 0
        self.port = 0
        self._sockets: set[web.WebSocketResponse] = set()

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.port}"

    @contextmanager
    def running(self, port: int = 0):
        loop, began = asyncio.new_event_loop(), threading.Event()
        runner = None

        async def begin():
            nonlocal runner
            app = web.Application(client_max_size=2**26)
            app.add_routes([web.get("/", self._socket), web.get("/info", self._info), web.get("/readyz", self._readyz)])
            app.add_routes([web.post("/act", self._act)])
            runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
            await site.start()
            self.port = runner.addresses[0][1]
            began.set()

        async def end():
            for socket in list(self._sockets):
                socket._req.transport.abort()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        assert began.wait(30)
        self.loop = loop
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(end(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _readyz(self, request):
        if self.ready in (502, 504):  # of a proxy
            return web.Response(text="<h1>Bad Gateway</h1>", content_type="text/html", status=self.ready)
        return web.json_response({"error": "The model warms up.", "code": "busy"}, status=self.ready)

    async def _info(self, request):
        if isinstance(self.first, Exception):
            raise self.first
        body = self.first if isinstance(self.first, (bytes, str)) else json.dumps(self.first)
        return web.Response(body=body, content_type="application/json")

    async def _act(self, request):
        self.headers.append(request.headers)
        message = unpack(await request.read())
        self.messages.append(message)
        answer = self.answer(message)
        if isinstance(answer, list):
            answer = answer[0]
        if answer is None:
            await asyncio.sleep(3600)
        if isinstance(answer, str):
            return web.Response(text=answer, status=400, content_type="application/json")
        body = answer if isinstance(answer, bytes) else pack(answer)
        return web.Response(body=body, content_type="application/msgpack")

    async def _socket(self, request):
        if isinstance(self.first, Exception):
            raise self.first
        self.headers.append(request.headers)
        self.connections += 1
        socket = web.WebSocketResponse(max_msg_size=2**26)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await self._send(socket, self.first)
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    self.messages.append(unpack(message.data))
                    answers = self.answer(self.messages[-1])
                    for answer in answers if isinstance(answers, list) else [answers]:
                        if answer == "close":
                            await socket.close()
                        elif answer is not None:
                            await self._send(socket, answer)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _send(self, socket, content):
        if isinstance(content, str):
            await socket.send_str(content)
        else:
            await socket.send_bytes(content if isinstance(content, bytes) else pack(content))
