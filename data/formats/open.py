"""One door to every format."""

import difflib
import importlib
import os
from pathlib import Path
from typing import Any

from ...extras import remedy
from ..dataset import EpisodeDataset, PythonDataset


# Format -> module and class, imported when first used: each needs libraries of its own.
FORMATS = {
    "rlds": ("rlds", "RLDSDataset"),
    "lerobot": ("lerobot", "LeRobotDataset"),
    "hdf5": ("hdf5", "HDF5Dataset"),
}
HDF5_ENDINGS = (".hdf5", ".h5")


def open_dataset(
    path: str | os.PathLike | Any, format: str | None = None, split: str = "train", **options: Any
) -> EpisodeDataset:
    """The demonstrations at `path` as a sequence of `Episode`s; the format is recognised unless given.

    `path`: a TFDS folder (RLDS), a LeRobot folder, an HDF5 file or a folder of them, or any object with `__len__` and
    `__getitem__` (see `PythonDataset`). `options` of all formats: `cameras`, `action_key`, `state_key`, `language_key`,
    `name`, `on_error="raise" | "skip"`; of RLDS: `standardize`; of HDF5: `rotate_images`; of LeRobot: `tolerance_s`.
    Raises FileNotFoundError where nothing is, ValueError for a format or split that is not known.
    """
    if not isinstance(path, str | os.PathLike):
        if not (hasattr(path, "__len__") and hasattr(path, "__getitem__")):
            raise ValueError(f"expected a path or an object with __len__ and __getitem__, got {type(path).__name__}")
        return path if isinstance(path, EpisodeDataset) else PythonDataset(path, **options)
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: expected a folder or file of demonstrations")
    if format is None:
        format = recognise(folder)
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        raise ValueError(
            f"format {format!r} is not known{f', did you mean {near[0]!r}?' if near else ''}: {list(FORMATS)}"
        )
    module, name = FORMATS[format]
    try:
        reader = getattr(importlib.import_module(f".{module}", __package__), name)
    except ModuleNotFoundError as error:
        if (missing := remedy(error.name)) is None:
            raise
        raise ModuleNotFoundError(f"reading {format} needs {missing}", name=error.name) from error
    return reader(folder, split, **options)


def recognise(folder: Path) -> str:
    """The format of a folder or file.

    Raises ValueError where it is none of the known ones; datasets around it (the folder is a level too high or too low)
    are named then. HDF5 files are looked for in subfolders as well, so a dataset of another format beside them is asked
    about: nothing says which is meant.
    """
    if own := _layout(folder):
        return own
    inner = _datasets_in(folder)
    if folder.suffix in HDF5_ENDINGS or any(file.suffix in HDF5_ENDINGS for file in folder.rglob("*")):
        if not inner:
            return "hdf5"
        raise ValueError(f"{folder} holds HDF5 files and {_listed(inner)}: give one of them, or format='hdf5'.")
    if inner:
        raise ValueError(f"{folder} is no dataset, but holds {_listed(inner)}: give one of them, or a mixture.")
    outer = [Path(os.path.normpath(folder / up)) for up in ("..", "../..", "../../..")]
    if around := next((parent for parent in outer if _layout(parent)), None):
        raise ValueError(f"{folder} is part of a dataset ({_layout(around)}): give '{around}'.")
    raise ValueError(
        f"{folder} holds no demonstrations of a known format: expected features.json (RLDS, from tensorflow_datasets), "
        "meta/info.json (LeRobot) or *.hdf5 files (LIBERO, robomimic). Other data: pass an object with __len__ and "
        "__getitem__, see examples/own_dataset.py"
    )


def _layout(folder: Path) -> str | None:
    """The format that the files of a folder are laid out in; None for HDF5, which has no layout, and all else."""
    if (folder / "meta" / "info.json").exists():
        return "lerobot"
    if (folder / "features.json").exists() or any(folder.glob("*/features.json")):
        return "rlds"
    return None


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
