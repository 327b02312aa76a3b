"""The formats of demonstrations, as far as they are known without the libraries that read them: how a path of each is
recognised, its reader, and the options of that.

A format of your own needs no entry here: `format="my_module:MyReader"` takes any class, see docs/extending.md.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...choices_openvla import closest
from ...extras import remedy
from ...folders import files_below
from ...options.datasets import HDF5Options, LeRobotOptions, ReaderOptions
from ...plugins import is_reference, load_class, options_known, read_options


@dataclass(frozen=True)
class Format:
    """A format of demonstrations.

    Args:
        reader: MODULE:CLASS of this package, imported when it is first used: each needs libraries of its own.
        options: Dataclass of the reader's options.
        recognises: Whether a folder or file is a dataset of this format.
        found_by: What it is recognised by, in words.
        called: What a dataset of it is called, in the plural.
        anywhere: Its files are looked for in subfolders as well, where datasets of other formats may lie too.
        standardizes: Its reader passes raw trajectories through a `standardize`.
    """

    reader: str
    options: type
    recognises: Callable[[Path], bool]
    found_by: str
    called: str
    anywhere: bool = False
    standardizes: bool = False


def _is_lerobot(path: Path) -> bool:
    return (path / "meta" / "info.json").exists()


def _is_rlds(path: Path) -> bool:
    return (path / "features.json").exists() or any(path.glob("*/features.json"))


def _is_hdf5(path: Path) -> bool:
    endings = (".hdf5", ".h5")
    return path.suffix in endings or any(file.suffix in endings for file in files_below(path))


FORMATS = {
    "rlds": Format(
        reader="rlds:RLDSDataset",
        options=ReaderOptions,
        recognises=_is_rlds,
        found_by="features.json (RLDS, from tensorflow_datasets)",
        called="RLDS folders",
        standardizes=True,
    ),
    "lerobot": Format(
        reader="lerobot:LeRobotDataset",
        options=LeRobotOptions,
        recognises=_is_lerobot,
        found_by="meta/info.json (LeRobot)",
        called="LeRobot folders",
    ),
    "hdf5": Format(
        reader="hdf5:HDF5Dataset",
        options=HDF5Options,
        recognises=_is_hdf5,
        found_by="*.hdf5 files (LIBERO, robomimic)",
        called="HDF5 files",
        anywhere=True,
    ),
}
# Options of the readers of all formats, by their names.
READER_OPTIONS = tuple(dict.fromkeys(item.name for known in FORMATS.values() for item in fields(known.options)))
GIVEN_OTHERWISE = ("split", "on_error", "name")  # parameters of a reader of one's own that are no options of it


def reader_class(format: str) -> type:
    """The class that reads a format, or that MODULE:CLASS names.

    Raises:
        ValueError: If the format is not known, or there is no such class with `__len__` and `__getitem__`.
        ModuleNotFoundError: If a library that it needs is not installed; says which extra brings it.
    """
    if is_reference(format):
        return load_class(format, "reader", ("__len__", "__getitem__"))
    if format not in FORMATS:
        near = closest(format, FORMATS)
        raise ValueError(
            f"format {format!r} is not known{f',{near.lower()}' if near else ':'} {list(FORMATS)}, or MODULE:CLASS, a "
            "reader of your own."
        )
    module, _, name = FORMATS[format].reader.partition(":")
    try:
        return getattr(importlib.import_module(f".{module}", __package__), name)
    except ModuleNotFoundError as error:
        if (missing := remedy(error.name)) is None:
            raise
        raise ModuleNotFoundError(f"reading {format} needs {missing}", name=error.name) from error


def reader_options(format: str, options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Options as the reader of a format takes them; texts of the command line are read.

    Raises:
        ValueError: If the reader has no such option; says which has, or what this one has.
    """
    if is_reference(format):
        made = reader_class(format)
        first = next(iter(options_known(made)), "")  # the path
        return read_options(made, options, format, without=(first, *GIVEN_OTHERWISE))
    for name in options:
        owners = [known.called for known in FORMATS.values() if name in option_names(known.options)]
        if owners and name not in option_names(FORMATS[format].options):
            raise ValueError(f"{name} is an option of {' and '.join(owners)}; {path} is {format}.")
    return read_options(FORMATS[format].options, options, format)


def option_names(kind: Any) -> tuple[str, ...]:
    """Options by name: the fields of a dataclass of them, or what the constructor of a reader takes."""
    return tuple(inspect.signature(kind).parameters)


def has_option(format: str, name: str) -> bool:
    """Whether the reader of a format has an option."""
    return name in option_names(reader_class(format) if is_reference(format) else FORMATS[format].options)


def standardizes(format: str) -> bool:
    """Whether the reader of a format passes raw trajectories through a `standardize`."""
    return not is_reference(format) and FORMATS[format].standardizes
