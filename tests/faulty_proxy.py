"""A TCP proxy between client and server, in a thread: delays, swallows, cuts."""

import asyncio
import random
import threading
from contextlib import contextmanager, suppress


class FaultyProxy:
    """
    Attributes:
        delay: Mean of what each packet takes, in seconds.
        frozen: Nothing passes, in either direction, and nobody is told (half-open connections).
        port: Where it listens.
    """

    def __init__(self, target: int, seed: int = 0, delay: float = 0.0):
        self.target, self.delay, self.frozen, self.port = target, delay, False, 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        self._do(self._begin())
        try:
            yield self
        finally:
            self._do(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(10)
            self._loop.close()

    def cut(self) -> None:
        """Every connection breaks."""
        self._do(self._cut())

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _begin(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self):
        self._server.close()
        await self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut(self):
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader, writer):
        try:
            there, here = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, here}
        await asyncio.gather(self._pass(reader, here), self._pass(there, writer))

    async def _pass(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(2**16):
                if self.delay:
                    await asyncio.sleep(self._random.expovariate(1 / self.delay))
                if not self.frozen:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
