"""Folders: one process writes at a time, results appear complete or not at all, weights are told apart by content."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files_openvla import weights_digest as weights_digest


# What makes a folder load, and what says that it is complete: gone while files are replaced, and written last.
MARKS = ("config.json", "adapter_config.json", "dataset_statistics.json")
INSTALLED = {"site-packages", "dist-packages"}  # folders that pip fills


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of `folder`, which need not exist yet.

    The operating system drops the lock when its process ends, however it ends. The empty file `.NAME.lock` beside the
    folder goes with it; a killed process leaves the file, which then locks nothing.

    Raises:
        ValueError: If `folder` is a file, or lies among installed packages.
        BlockingIOError: If another process works on the folder.
        OSError: If nothing can be written there.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: give a folder.")
    if INSTALLED & set(folder.parts):
        raise ValueError(f"'{folder}' lies among installed packages, whose updates remove it: give a folder elsewhere.")
    # Of a mounted volume only the folder itself may be writable.
    beside = not folder.is_dir() or os.access(folder.parent, os.W_OK)
    file = folder.parent / f".{folder.name}.lock" if beside else folder / ".lock"
    lock = FileLock(file, timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"Another process is writing to '{folder}' (it holds '{file}'): wait for it or stop it, or choose another "
            "output folder."
        ) from None
    except OSError as error:
        raise OSError(f"Cannot write to '{folder}' ({error.strerror}): choose another output folder.") from error
    try:
        yield
    finally:
        # While the lock is held: a process that opened the file meanwhile sees that it is gone, and makes a new one.
        file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A working folder beside `output` that becomes `output` at the end, and vanishes if anything fails before.

    What a killed process left of its working folder is removed. An existing `output` keeps its other files (a git
    repository, videos); see `move_into`.

    Raises:
        ValueError: If `output` is a file, or a folder with something in it while `overwrite` is False.
        BlockingIOError: If another process is writing the same folder.
    """
    output = Path(output).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file: give a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"'{output}' is not empty: give a new folder, or allow overwriting (--overwrite), which replaces the model "
            "files in it and keeps all others."
        )
    with locked(output):
        work = output.with_name(f".{output.name}.unfinished")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
            if output.is_dir():
                move_into(work, output)
            else:
                os.replace(work, output)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def move_into(work: Path, output: Path) -> None:
    """Move the files of a model folder into another on the same disk. Those of the same name and older weights are
    replaced, all others stay. `MARKS` are removed first and come last: until then the folder does not load."""
    files = [path for path in work.rglob("*") if path.is_file()]
    marks = [work / name for name in MARKS if work / name in files]
    for name in MARKS:
        (output / name).unlink(missing_ok=True)
    for pattern in ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"):
        for stale in output.glob(pattern):
            if not (work / stale.name).exists():
                stale.unlink()
    for file in [path for path in files if path not in marks] + marks:
        target = output / file.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
