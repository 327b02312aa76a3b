"""From what a user may write (a path, a name, a mixture) to the datasets that training draws from."""

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..choices_openvla import closest, nearest
from ..options.fields import respelled
from .formats.registry import READER_OPTIONS
from .mixture import is_mixture_file, load_entries
from .open_source import open_source
from .oxe.catalog import load_oxe_datasets, load_oxe_mixtures
from .source import Source
from .standardization import UntrainableError


OF_ENTRY = ("name", "weight")  # options of a mixture's entry that change nothing in what is read
OF_MODEL = ("action_chunk", "camera_names", "sees_state")  # options that all datasets of one model have in common

__all__ = ["Source", "open_source", "open_sources"]


def open_sources(
    specification: str | os.PathLike | Any, *, data_root: str | os.PathLike | None = None, **options: Any
) -> list[Source]:
    """The datasets that training draws from.

    Args:
        specification: Path of one dataset of any format; an object with `__len__` and `__getitem__`; the name of an
            Open-X mixture or of a dataset, or "bridge_orig:1.0,kuka:0.5", whose names are folders under `data_root`; or
            a YAML file of `name: weight` or `name: {path: ..., weight: ..., options of open_source}`, in which
            `statistics` may be the name of another entry, for the same units and the same meaning. What exists as a
            path is a path, below `data_root` before anywhere else.
        data_root: Folder of the datasets. Default: beside the YAML file, else the working directory.
        options: Of `open_source`, for each; those of an entry win.

    Raises:
        FileNotFoundError: If a dataset is missing; says where it was looked for.
        ValueError: If the specification is none of these, or two datasets have one name; see `open_source` too.
    """
    _check_options(options)
    if not isinstance(specification, str | os.PathLike):
        return [open_source(specification, **options)]
    text = os.fspath(specification)
    root = Path(data_root).expanduser() if data_root is not None else None
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"data_root='{root}' is no folder.")
    if (single := _single(text, root)) is not None:
        return [open_source(single, **options)]
    if not is_mixture_file(text) and text not in load_oxe_mixtures() and not ("," in text or ":" in text):
        raise _missing(text, root)
    return _open_mixture(text, root, options)


def dataset_places(specification: str | os.PathLike, data_root: str | os.PathLike | None = None) -> list[Path]:
    """Where the datasets of a specification lie, as far as they are there; errors are those of `open_sources`."""
    text = os.fspath(specification)
    root = Path(data_root).expanduser() if data_root is not None else None
    if (single := _single(text, root)) is not None:
        return [single]
    if text not in load_oxe_mixtures() and not is_mixture_file(text) and not ("," in text or ":" in text):
        return []
    return [place for _, place, _ in _located(text, root) if os.path.exists(place)]


def mixture_entries(
    specification: str | os.PathLike, data_root: str | os.PathLike | None = None
) -> dict[str, dict[str, Any]] | None:
    """What the entries of a mixture's YAML file say, `{dataset: {"path": where it lies, "weight": ..., options}}`; None
    of anything else, which says all by itself."""
    text = os.fspath(specification)
    if not is_mixture_file(text) or not Path(text).expanduser().is_file():
        return None
    root = Path(data_root).expanduser() if data_root is not None else None
    return {name: {"path": str(place), **entry} for name, place, entry in _located(text, root)}


def _single(text: str, root: Path | None) -> Path | None:
    """The one dataset that a specification is the path of."""
    if is_mixture_file(text) and not os.path.isdir(text):
        return None
    places = [*([root / Path(text).expanduser()] if root else []), Path(text).expanduser()]
    return next((path for path in places if os.path.exists(path)), None)  # not there: too long for a name, as well


def _located(text: str, root: Path | None) -> list[tuple[str, Path, dict[str, Any]]]:
    """Name, place and options of each dataset of a mixture."""
    beside = Path()
    if is_mixture_file(text):
        text = str(Path(text).expanduser())
        beside = Path(text).parent
    located = []
    for name, entry in load_entries(text).items():
        _check_options(entry, name)
        given = entry.pop("path", name)
        if not isinstance(given, str):
            raise ValueError(f"{text}, '{name}': path: {given!r}: expected text.")
        relative = Path(os.path.expanduser(given))  # the home of nobody here stays a folder of this name
        places = [base / relative for base in ((root, beside) if root else (beside,))]
        there = [place for place in places if os.path.exists(place)]
        if isinstance(entry.get("statistics"), str) and os.path.isfile(own := beside / entry["statistics"]):
            entry["statistics"] = str(own)
        located.append((name, there[0] if there else places[0], entry))
    return located


def _open_mixture(text: str, root: Path | None, options: dict[str, Any]) -> list[Source]:
    if options.get("name") is not None:
        raise ValueError(f"name='{options['name']}' is for one dataset; the mixture '{text}' names its own.")
    located = _located(text, root)
    missing = [str(place) for _, place, _ in located if not os.path.exists(place)]
    if missing:
        known = load_oxe_datasets()
        unknown = [Path(place).name for place in missing if Path(place).name not in known]
        misspelled = next(filter(None, (nearest(name, known) for name in unknown)), None)
        hint = f" Did you mean '{misspelled}'?" if misspelled else ""
        raise FileNotFoundError(
            f"'{text}' names datasets that are not there: {', '.join(missing)}.{hint} Give data_root=..., the folder "
            f"that holds them{f' (now {root})' if root else ''}, or a path for each in a YAML file."
        )
    _check_names(text, [str(entry.get("name") or name) for name, _, entry in located])
    read: dict[str, str] = {}
    for name, place, entry in located:
        what = repr((place.resolve(), sorted((key, str(value)) for key, value in entry.items() if key not in OF_ENTRY)))
        if (other := read.setdefault(what, name)) != name:
            raise ValueError(f"'{other}' and '{name}' in '{text}' are one dataset ({place}): give it once, one weight.")
    lenders = _lenders(text, located)
    opened: dict[str, Source] = {}
    for name, location, entry in sorted(located, key=lambda each: each[0] in lenders):  # lenders first
        named: dict[str, Any] = {"name": None if len(Path(name).parts) > 1 else name}
        if name in lenders:
            lender = opened.get(lenders[name])
            entry = entry | {"statistics": _lent(text, name, lender, lenders[name])}
            named["normalization"] = _lent_units(text, name, lender, entry.get("normalization"))
        try:
            opened[name] = open_source(location, **{**options, **named, **entry})
        except UntrainableError as error:
            warnings.warn(f"left out of the mixture: {error}", UserWarning, stacklevel=3)
        except (ValueError, KeyError, FileNotFoundError) as error:
            if is_mixture_file(text) and len(error.args) == 1:  # what stands in the file is called as it is there
                said = respelled(str(error.args[0]), {key: key for key in entry}, "{name}: {value}")
                error.args = (f"{text}, '{name}': {said}",)
            raise
        if name in lenders and name in opened:
            _check_meanings(text, opened[name], opened[lenders[name]], lenders[name])
    sources = [opened[name] for name, _, _ in located if name in opened]
    _check_names(text, [source.name for source in sources])
    if not sources:
        raise ValueError(f"'{text}' holds no dataset that can be trained on.")
    dims = {source.name: len(source.statistics["action"]["q01"]) for source in sources}
    if len(set(dims.values())) > 1:
        raise ValueError(f"One model has one action space; the dimensions of actions in '{text}' are {dims}.")
    return sources


def _lenders(text: str, located: Sequence[tuple[str, Path, dict[str, Any]]]) -> dict[str, str]:
    """{dataset: that whose statistics it has}, of the entries that name another one."""
    names = [name for name, _, _ in located]
    lenders = {name: entry["statistics"] for name, _, entry in located if entry.get("statistics") in names}
    for name, lender in lenders.items():
        if lender in lenders:
            raise ValueError(
                f"{text}, '{name}': statistics: {lender}: that dataset has not its own"
                + (
                    ". Leave it out."
                    if lender == name
                    else f", but those of '{lenders[lender]}'. Name a dataset that has."
                )
            )
    return lenders


def _lent(text: str, name: str, source: Source | None, lender: str) -> dict[str, Any]:
    """The statistics of another dataset of the mixture: recordings of one robot are to be in the same units."""
    if source is None:
        raise ValueError(f"{text}, '{name}': statistics: {lender}: that dataset was left out of the mixture.")
    lent: dict[str, Any] = {
        part: source.statistics[part] for part in ("action", "proprio") if part in source.statistics
    }
    said = (source.gripper_dims, source.absolute_dims, source.frame, source.unit)
    if any(part is not None for part in said):  # what the numbers mean is no guess; the rate is that of each recording
        lent["action_spec"] = replace(source.action_spec, hz=None).to_dict()
    return lent


def _check_meanings(text: str, source: Source, lender: Source, lenders_name: str) -> None:
    """Raise a `ValueError` where numbers that are to be in the same units mean something else."""
    here, there = (replace(of.action_spec, names=lender.action_spec.names, hz=None) for of in (source, lender))
    if (here.relative, here.grippers) != (there.relative, there.grippers):
        raise ValueError(
            f"{text}, '{source.name}': statistics: {lenders_name}: an action there is {there.describe()}, and here "
            f"{here.describe()}: say what it is in both (absolute_dims, gripper_dims), or leave statistics out."
        )


def _lent_units(text: str, name: str, lender: Source | None, given: Any) -> str:
    """What -1 and 1 stand for in both: statistics alone do not say it."""
    assert lender is not None  # `_lent` says so
    if given not in (None, lender.normalization):
        raise ValueError(
            f"{text}, '{name}': normalization: {given}: the statistics are to be those of '{lender.name}', whose -1 "
            f"and 1 stand for '{lender.normalization}': leave normalization out, or give both the same."
        )
    return lender.normalization


def _check_names(text: str, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'{text}' holds several datasets called {', '.join(twice)}: give each a name of its own.")


def source_options(options: Any) -> dict[str, Any]:
    """What the options of a verb say to `open_source`; those left at None are left out."""
    known = _known_options()
    return {name: value for name, value in vars(options).items() if name in known and value is not None}


def _known_options() -> list[str]:
    return [*list(inspect.signature(open_source).parameters)[1:-1], *READER_OPTIONS]


def _check_options(options: Mapping[str, Any], entry: str | None = None) -> None:
    known = _known_options()
    if entry:
        known = ["path", *(name for name in known if name not in OF_MODEL)]
    for key in options:
        if entry and key in OF_MODEL:
            raise ValueError(
                f"'{key}' of '{entry}': one model has one for all datasets, so it is no option of a dataset."
            )
        if key not in known:
            where = f" of '{entry}'" if entry else ""
            names = map(repr, known) if entry else known  # in quotes they stay what they are called in the file
            raise ValueError(f"No option{where} is called '{key}'.{closest(key, known)} Known: {', '.join(names)}.")


def _missing(text: str, root: Path | None) -> FileNotFoundError:
    known = [*load_oxe_mixtures(), *load_oxe_datasets()]
    looked = [str(Path(text).expanduser().absolute()), *([str(root / text)] if root else [])]
    hint = "" if text in known else closest(text, known)
    root_hint = "" if root else " Datasets that lie in one folder are found by name with data_root=that folder."
    if text.count("/") == 1 and not text.startswith((".", "~", "/")):  # an id of the Hub, as LeRobot takes it
        hint = f" One of the Hub is downloaded first (hf download {text} --repo-type dataset --local-dir FOLDER)."
    return FileNotFoundError(
        f"'{text}' is neither a dataset (looked for {' and '.join(looked)}) nor a mixture.{hint}{root_hint}"
    )
