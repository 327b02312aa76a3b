"""Stages of a prediction, for whoever wants to know how long they take: benchmarks, and a server's metrics.

"preprocessing": images and instructions to model inputs; "vision": towers and projector; "prefill": the pass of the
language model that reads the prompt; "decode": each pass after it; "answer": all but the preprocessing, where a GPU
computes it as one graph of kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch


Watcher = Callable[[str], AbstractContextManager]
STAGES = ("preprocessing", "vision", "prefill", "decode", "answer")
_NOTHING = nullcontext()
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def stage(name: str) -> AbstractContextManager:
    """The block of a stage; nothing where nobody watches."""
    watcher = None if torch.compiler.is_compiling() else _WATCHER.get()
    return _NOTHING if watcher is None else watcher(name)


@contextmanager
def watch_stages(watcher: Watcher) -> Iterator[None]:
    """Predictions of this thread enter `watcher(name)` at the begin of each stage and leave it at the end. A device may
    still compute then: who reads a clock waits for it (`openvla.device.synchronize`)."""
    before = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(before)


__all__ = ["STAGES", "stage", "watch_stages"]
