"""Work of other threads, as what the event loop awaits."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def awaited(work: Callable[[], Any], run: Callable[[Callable[[], None]], Any]) -> asyncio.Future[Any]:
    """What `work()` gives or raises.

    Args:
        run: Has what it is given done, in another thread.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        future.set_result(result) if error is None else future.set_exception(error)

    def job() -> None:
        result: Any = None
        failed: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:  # which no future takes
            failed = RuntimeError(f"StopIteration: {error}")
        except BaseException as error:  # of whoever awaits it
            failed = error
        with suppress(RuntimeError):  # the loop is closed: it came too late for everybody
            loop.call_soon_threadsafe(tell, result, failed)

    run(job)
    return future


def in_daemon(work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """As `asyncio.to_thread`, in a thread of its own that nobody waits for at the end of the process: what a simulator
    does may never return."""
    return awaited(lambda: work(*arguments), lambda job: threading.Thread(target=job, daemon=True).start())
