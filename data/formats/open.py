"""One door to every format."""

import os
from pathlib import Path
from typing import Any

from ...plugins import is_reference
from ..dataset import EpisodeDataset, PythonDataset
from .registry import FORMATS, has_option, reader_class, reader_options


COMMON = ("name", "on_error", "standardize")  # parameters of the readers that are no options of a format


def open_dataset(
    path: str | os.PathLike | Any, format: str | None = None, split: str = "train", **options: Any
) -> EpisodeDataset:
    """The demonstrations at `path` as a sequence of `Episode`s; the format is recognised unless given.

    `path`: a TFDS folder (RLDS), a LeRobot folder, an HDF5 file or a folder of them, or any object with `__len__` and
    `__getitem__` (see `PythonDataset`). `format`: a name of `FORMATS`, or a reader of your own as MODULE:CLASS, which
    is called with the path, and with `split` where it has such a parameter. `options`: `name`, `on_error="raise" |
    "skip"`, of RLDS `standardize`, and those of the reader (`options/datasets.py`, or what your constructor takes).
    Raises FileNotFoundError where nothing is, ValueError for a format, split or option that is not known.
    """
    if not isinstance(path, str | os.PathLike):
        if not (hasattr(path, "__len__") and hasattr(path, "__getitem__")):
            raise ValueError(f"expected a path or an object with __len__ and __getitem__, got {type(path).__name__}")
        return path if isinstance(path, EpisodeDataset) else PythonDataset(path, **options)
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: expected a folder or file of demonstrations")
    format = recognise(folder) if format is None else format
    reader = reader_class(format)
    own = reader_options(format, {name: value for name, value in options.items() if name not in COMMON}, folder)
    common = {name: options[name] for name in COMMON if name in options}
    if not is_reference(format):
        return reader(folder, split, **common, **own)
    common = {"name": folder.resolve().stem, **common}
    taken = {name: value for name, value in {**common, "split": split}.items() if has_option(format, name)}
    if "split" not in taken and split not in ("train", "all"):
        raise ValueError(f"split={split!r}: the reader {format} has no parameter split, so all it reads is 'train'.")
    made = reader(folder, **taken, **own)
    return made if isinstance(made, EpisodeDataset) else PythonDataset(made, **common)


def recognise(folder: Path) -> str:
    """The format of a folder or file.

    Raises ValueError where it is none of the known ones; datasets around it (the folder is a level too high or too low)
    are named then. Where the files of a format may lie in any subfolder (HDF5), a dataset of another format beside them
    is asked about: nothing says which is meant.
    """
    if own := _layout(folder):
        return own
    inner = _datasets_in(folder)
    for name, known in FORMATS.items():
        if known.anywhere and known.recognises(folder):
            if not inner:
                return name
            raise ValueError(
                f"{folder} holds {known.called} and {_listed(inner)}: give one of them, or format='{name}'."
            )
    if inner:
        raise ValueError(f"{folder} is no dataset, but holds {_listed(inner)}: give one of them, or a mixture.")
    outer = [Path(os.path.normpath(folder / up)) for up in ("..", "../..", "../../..")]
    if around := next((parent for parent in outer if _layout(parent)), None):
        raise ValueError(f"{folder} is part of a dataset ({_layout(around)}): give '{around}'.")
    found_by = [known.found_by for known in FORMATS.values()]
    raise ValueError(
        f"{folder} holds no demonstrations of a known format: expected {' or '.join(found_by)}. Other data: "
        "format='MODULE:CLASS' (--format), a class with __len__ and __getitem__, see examples/own_dataset.py"
    )


def _layout(folder: Path) -> str | None:
    """The format that the files of a folder are laid out in; None for formats without a layout, and all else."""
    return next((name for name, known in FORMATS.items() if not known.anywhere and known.recognises(folder)), None)


def _datasets_in(folder: Path) -> dict[Path, str]:
    """Datasets with a layout in a folder that is none, one or two levels below, and their formats."""
    found: dict[Path, str] = {}
    for child in sorted([*folder.glob("*/"), *folder.glob("*/*/")]):
        if child.parent not in found and (format := _layout(child)):
            found[child] = format
    return found


def _listed(found: dict[Path, str]) -> str:
    shown = [f"'{path}' ({format})" for path, format in list(found.items())[:4]]
    return ", ".join(shown) + (f" and {len(found) - 4} more datasets" if len(found) > 4 else "")
