"""Files that stay open between reads."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar


Handle = TypeVar("Handle")
Rest = ParamSpec("Rest")
Opener = Callable[Concatenate[Path, Rest], Handle]


def kept_open(maxsize: int = 8) -> Callable[[Opener], Opener]:
    """Decorate a function that opens (a part of) a file: its last `maxsize` handles are kept and given again.

    A forked worker opens its own (a shared one would share its position); so does a reader of a file that was replaced.
    """

    def decorate(open_file: Opener) -> Opener:
        @functools.lru_cache(maxsize=maxsize)
        def cached(path: Path, process: int, stamp: tuple[int, ...], *rest):
            return open_file(path, *rest)

        @functools.wraps(open_file)
        def handle(path: Path, *rest):
            status = os.stat(path)  # ctime and inode differ also where a copy kept size and time
            stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            return cached(path, os.getpid(), stamp, *rest)

        return handle

    return decorate
