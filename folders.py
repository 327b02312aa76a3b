"""Folders: one process writes at a time, results appear complete or not at all, weights are told apart by content."""

import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files_openvla import read_json
from .files_openvla import weights_digest as weights_digest


FORMAT_VERSION = 2  # of saved settings: finetune.json, evaluation.json, and those of a recording
# What makes a folder load, and what says that it is complete: gone while files are replaced, and written last.
MARKS = ("config.json", "adapter_config.json", "dataset_statistics.json", "runtime.json")
INSTALLED = {"site-packages", "dist-packages"}  # folders that pip fills
OURS = ".openvla"  # empty file in a working folder: what lies beside it was made here and may be removed
WORK = "work"  # the part of a working folder that is written into
STALE = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)  # of an older model
LOCK = re.compile(rb"\Z|\d+\n")  # content of a lock file: none, or a process where there are no other locks


def files_below(folder: str | os.PathLike) -> Iterator[Path]:
    """All files of a folder and of those in it, in order. Links to folders are followed, as where a part of a data set
    lies on another disk; a folder that is reached in several ways is read once, by its own name if it has one here.
    One that may not be read is a warning. A link to what this folder lies in is no part of it (a home, all of a disk).

    Raises:
        OSError: If a disk fails: what is in a folder is left out by nobody's wish.
    """
    read, waiting, own = set[str](), [os.fspath(folder)], os.path.realpath(folder)
    for top in waiting:  # which grows: links come after all that is there itself
        for place, names, files in os.walk(top, onerror=_of_unread):
            if (here := os.path.realpath(place)) in read or own.startswith(os.path.join(here, "")):
                names.clear()
                continue
            read.add(here)
            names.sort()
            waiting += filter(os.path.islink, (os.path.join(place, name) for name in names))
            yield from (Path(place, name) for name in sorted(files))


def _of_unread(error: OSError) -> None:
    if not isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        raise error
    if isinstance(error, PermissionError):  # others are not there
        warnings.warn(f"'{error.filename}' may not be read: what is in it is left out.", stacklevel=4)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of `folder`, which need not exist yet.

    The operating system drops the lock when its process ends, however it ends. The empty file `.NAME.lock` beside the
    folder goes with it; a killed process leaves the file, which then locks nothing.

    Raises:
        ValueError: If `folder` is a file, or lies among installed packages.
        FileExistsError: If a file of somebody else has the name of the lock.
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
    with _held(folder.parent / f".{folder.name}.lock" if beside else folder / ".lock", folder):
        yield


@contextmanager
def locked_file(file: str | os.PathLike) -> Iterator[Path]:
    """As `locked`, for a single file that is written at the end; its folder is made.

    Raises:
        ValueError: If `file` is a folder.
    """
    file = Path(file).expanduser().resolve()
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder: give a file.")
    with _held(file.parent / f".{file.name}.lock", file):
        yield file


@contextmanager
def _held(file: Path, output: Path) -> Iterator[None]:
    """The lock `file` of an `output`."""
    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not (file.is_file() and LOCK.match(file.read_bytes())):  # locking would empty it
            raise FileExistsError(f"'{file}' is in the way of the lock of '{output}': move it away.")
        lock.acquire()
    except Timeout:
        if not file.exists():  # some file systems that take no files answer as if they were locked
            raise OSError(f"Cannot write to '{output}' (no file can be made there): choose another output.") from None
        raise BlockingIOError(
            f"Another process is writing to '{output}' (it holds '{file}'): wait for it or stop it, or choose another "
            "output."
        ) from None
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"Cannot write to '{output}' ({error.strerror}): choose another output.") from error
    try:
        yield
    finally:
        # While the lock is held: a process that opened the file meanwhile sees that it is gone, and makes a new one.
        file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def working_folder(place: Path) -> Iterator[Path]:
    """A folder to write into, which vanishes at the end; what a killed process left of it is removed first.

    It lies in `place`, marked as ours (`OURS`): nothing else is ever removed.

    Raises:
        FileExistsError: If something that is not marked so has the name `place`.
    """
    remove_working_folder(place)
    place.mkdir(parents=True, exist_ok=True)
    try:
        (place / OURS).touch()
        work = place / WORK
        work.mkdir()
        yield work
    finally:
        remove_working_folder(place)


def share_weights(work: Path) -> None:
    """Give weights in a `working_folder` the permissions of all new files: of safetensors 0.8 their owner alone may
    read them, whatever the umask (safetensors#782)."""
    usual = stat.S_IMODE((work.parent / OURS).stat().st_mode)
    for file in work.rglob("*.safetensors"):
        with suppress(OSError):  # a disk that knows no permissions
            file.chmod(usual)


def remove_working_folder(place: Path) -> None:
    """Remove a `working_folder` if it is there. The mark goes last: stopped on the way, it is still known as ours."""
    if not place.is_symlink() and not place.exists():
        return
    ours = place.is_dir() and not place.is_symlink() and ((place / OURS).is_file() or not any(place.iterdir()))
    if not ours:
        raise FileExistsError(f"'{place}' is in the way and was not made here: move it away.")
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OURS:
            path.unlink()
    (place / OURS).unlink(missing_ok=True)
    place.rmdir()


@contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A working folder beside `output` that becomes `output` at the end, and vanishes if anything fails before.

    What a killed process left of its working folder is removed. An existing `output` keeps its other files (a git
    repository, videos); see `move_into`.

    Raises:
        ValueError: If `output` is a file, or a folder with something in it while `overwrite` is False.
        FileExistsError: If something of somebody else has the name of the working folder.
        BlockingIOError: If another process is writing the same folder.
    """
    output = Path(output).expanduser().resolve()
    check_new(output, overwrite)
    with locked(output), working_folder(output.with_name(f".{output.name}.unfinished")) as work:
        check_new(output, overwrite)  # another process may have finished it meanwhile
        yield work
        share_weights(work)
        if output.is_dir():
            move_into(work, output)
        else:
            os.replace(work, output)


def check_new(output: Path, overwrite: bool = False) -> None:
    """Raise a `ValueError` if `output` is a file, or holds something while `overwrite` is False."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file: give a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"'{output}' is not empty: give a new folder, or allow overwriting (--overwrite), which replaces the model "
            "files in it and keeps all others."
        )


def move_into(work: Path, output: Path) -> None:
    """Move the files of a model folder into another on the same disk. Those of the same name and older weights are
    replaced, all others stay. `MARKS` are removed first and come last: until then the folder does not load."""
    files = [path for path in work.rglob("*") if path.is_file()]
    marks = [work / name for name in MARKS if work / name in files]
    for name in MARKS:
        (output / name).unlink(missing_ok=True)
    of_original = any(file.suffix == ".pt" for file in files)  # its runs have no such weights
    for stale in () if of_original else output.iterdir():
        if STALE.fullmatch(stale.name) and not (work / stale.name).exists():
            stale.unlink()
    for file in [path for path in files if path not in marks] + marks:
        target = output / file.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def save_processor(processor: Any, folder: Path) -> None:
    """As its `save_pretrained`; an OSError where it cannot be written, for which tokenizers has a bare Exception."""
    try:
        processor.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"Cannot write '{folder}': {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def with_version(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are saved: with the version of their form."""
    return {"format_version": FORMAT_VERSION, **settings}


def read_settings(path: Path) -> tuple[dict[str, Any], int]:
    """Saved settings, and the version of their form: 0 where they were saved before there were versions.

    Raises:
        ValueError: If they are of a version that this package does not know.
    """
    settings = read_json(path)
    version = settings.pop("format_version", 0)
    if version not in range(FORMAT_VERSION + 1):
        raise ValueError(
            f"'{path}' has format_version {version!r}, and this version of openvla knows {FORMAT_VERSION} at most: "
            "update it (pip install -U openvla), or choose another folder."
        )
    return settings, version


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path, part: Path | None = None) -> Iterator[Path]:
    """A file to write, that becomes `path` at the end, and vanishes if anything fails before.

    Args:
        part: Its name until then. Default: that of `path` and ".part".
    """
    part = part or path.with_name(f"{path.name}.part")
    try:
        with named_in_errors(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """A full disk, which names no file, is an error of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text is all that it says, and a name would take the place of that
            error.filename = error.filename or str(path)
        raise
