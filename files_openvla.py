"""Files that may be missing, cut off or only a Git LFS pointer, read so that the error names the file and the way out.

The standard library alone: model, data, training and clients read their JSON here.
"""

import hashlib
import json
import os
from codecs import BOM_UTF8
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of every pointer (git-lfs docs/spec.md)
QUIET: dict[str, Any] = {  # transformers' `cached_file` returns None for what is not there
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
# Ours and the Hub's, older ones, parts of OFT under any name
WEIGHTS = (
    "*.safetensors",
    "*model*.bin",
    "*_checkpoint.pt",
    "action_head*.pt",
    "*_projector*.pt",
    "vision_backbone*.pt",
)


def check_file(path: str | os.PathLike, what: str = "file") -> Path:
    """`path`, if there is a file with content.

    Args:
        what: What the file should be, for the message: "weights file", "video", ...

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is empty, or a Git LFS pointer instead of the content.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what} at '{path}'.")
    with path.open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if not head:
        raise ValueError(f"'{path}' is empty (0 bytes), expected a {what}: copy or download it again.")
    if head == LFS_POINTER:
        raise ValueError(
            f"'{path}' is a Git LFS pointer and not the {what} itself: it was cloned without Git LFS. Run "
            "`git lfs install && git lfs pull` in that repository, or download the file from the Hub."
        )
    return path


def read_json(path: str | os.PathLike, marked: bool = True, unique: bool = False) -> Any:
    """Content of a JSON file that holds an object, with or without a byte order mark.

    Args:
        marked: It may begin with a byte order mark; False where another library reads it as well, which takes none.
        unique: Refuse a name that stands twice in one object, of which the last would be taken silently: of files that
            people put together by hand.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is empty, a Git LFS pointer, no JSON, holds something else, or is not `marked` and
            begins with such a mark, or is to be `unique` and is not.
    """
    path = check_file(path, "JSON file")
    twice: list[str] = []

    def one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found, names = dict(pairs), [name for name, _ in pairs]
        if len(found) < len(names):
            twice.append(next(name for name in found if names.count(name) > 1))
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=one_of_each if unique else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is not valid JSON ({error}): it was damaged or cut off, copy or download it again."
        ) from error
    if not marked and path.read_bytes().startswith(BOM_UTF8):
        raise ValueError(
            f"'{path}' begins with a byte order mark, as some editors write it, and other libraries do not read it so: "
            "save it as UTF-8 without one."
        )
    if twice:
        raise ValueError(f"'{path}': '{twice[0]}' stands there twice in one object: leave one out, or rename it.")
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds {json.dumps(content)[:60]}, expected an object {{...}}.")
    return content


def local_folder(name: str | os.PathLike) -> Path | None:
    """The folder `name` stands for; None where it can only be the id of a Hub repository (`owner/name`).

    Raises:
        FileNotFoundError: If it is neither.
    """
    path, text = Path(name), os.fspath(name)
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise FileNotFoundError(f"'{text}' is a file, a model is a folder: give '{path.parent}'.")
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or not all(text.split("/")):
        raise FileNotFoundError(f"No folder at '{text}'. Give a folder, or a Hub id such as 'openvla/openvla-7b'.")
    return None


def cache_folder() -> Path:
    """`OPENVLA_CACHE`, or `openvla` in the user's cache folder. A user without a home has none: nothing can be written
    there, of which whoever does warns."""
    folder = os.environ.get("OPENVLA_CACHE")
    try:
        return Path(folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "openvla")).expanduser()
    except RuntimeError:
        return Path(os.devnull, "openvla")


def weights_digest(model: str | os.PathLike) -> str:
    """32 hexadecimal digits of the weights files (names and content) of a folder, or of a Hub id's cached snapshot.

    Files are read in full, at the speed of the disk; in the Hub's cache they are stored under their digest.

    Raises:
        FileNotFoundError: If there are no weights, or the Hub id is not in the cache.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(os.fspath(model), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(f"'{model}' is no folder, and no Hub repository in the cache here.") from error
    found = {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    for index in folder.glob("*.index.json"):  # of weights in several files, which may lie in a folder below
        with suppress(ValueError):  # a damaged one: who loads by it says so
            names = read_json(index).get("weight_map")
            found |= {folder / str(name) for name in names.values()} if isinstance(names, dict) else set()
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileNotFoundError(f"'{folder}' holds no weights ({', '.join(WEIGHTS)}).")
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        digests = dict(zip([path.relative_to(folder).as_posix() for path in files], pool.map(file_digest, files)))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """64 hexadecimal digits (SHA-256) of the content of a file."""
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:  # the Hub's cache, where it is the name of the file
        return target.name
    status = target.stat()
    return _content_digest(target, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _content_digest(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256; `size` and `mtime_ns` tell when a file has changed since it was read last."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


__all__ = ["cache_folder", "check_file", "file_digest", "local_folder", "read_json", "weights_digest"]
