"""From a name or a path to what training draws from: standardized, split, filtered and normalized datasets.

Stages in the original's order: standardization, (gripper convention, raw filters,) statistics, normalization, filters
of episodes, chunks of actions, filters of frames. docs/data.md says where they differ on purpose.
"""

import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..action_tokenizer import get_action_stats
from ..configuration_openvla import closest
from .dataset import OnError
from .mixture import is_mixture_file, load_entries
from .oxe_catalog import load_oxe_datasets, load_oxe_mixtures
from .recording import READER_OPTIONS, Recording, UntrainableError, open_recording
from .samples import main_camera
from .source import Source
from .survey import Survey, content_key, load_survey, store_survey, take_survey


__all__ = ["Source", "open_source", "open_sources"]


def open_source(
    location: str | os.PathLike | Any,
    *,
    weight: float = 1.0,
    format: str | None = None,
    split: str = "train",
    held_out: float = 0.05,
    filters: str | Sequence[str] = (),
    camera: str | None = None,
    name: str | None = None,
    gripper: str = "open-is-1",
    standardize: str | None = "auto",
    statistics: str | os.PathLike | Mapping[str, Any] | None = None,
    mask: Sequence[bool] | None = None,
    keep_unlabeled: bool = False,
    max_action: float | None = None,
    max_proprio: float | None = None,
    on_error: OnError = "raise",
    cache: bool = True,
    progress: bool = False,
    **reader: Any,
) -> Source:
    """One dataset as training sees it.

    Args:
        location: Path of a dataset, or an object with `__len__` and `__getitem__`.
        weight: In a mixture.
        split: What to train on. Episodes to hold out are the split "val" where there is one beside "train", else the
            last of this split.
        held_out: Which part of the episodes to hold out where there is no "val"; 0 holds nothing out in either case.
        filters: Names of `RAW_FILTERS`, which act before statistics: "no-ops", "zero-actions".
        camera: Through which the model looks; with a standardization also "primary", "secondary" or "wrist".
        name: The unnorm_key. Default: that of the dataset.
        gripper: Convention of the data, one of `GRIPPERS`.
        standardize: "auto" (RLDS datasets whose name is in `STANDARDIZE`), None or "none", or a name in it.
        statistics: A dataset_statistics.json or its content, or the statistics of this dataset, instead of its own.
        mask: (A,) which dimensions are scaled.
        keep_unlabeled: Keep episodes without an instruction.
        max_action, max_proprio: Drop episodes in which a normalized value, before it is clipped, exceeds this.
        on_error: What a damaged episode does: "raise", or "skip" with a warning.
        cache: Keep statistics for the next start, and use those kept.
        reader: `action_key`, `state_key`, `language_key`, `cameras`, `rotate_images` of the readers.

    Raises:
        FileNotFoundError: If there is no dataset.
        ValueError: If options do not fit the data, or nothing is left to train on.
        KeyError: If `statistics` or `standardize` lack the name.
    """
    raw_filters = [part.strip() for part in filters.split(",") if part.strip()] if isinstance(filters, str) else filters
    recording = open_recording(
        location,
        format=format,
        split=split,
        held_out=held_out,
        filters=list(raw_filters),
        camera=camera,
        name=name,
        gripper=gripper,
        standardize=standardize,
        on_error=on_error,
        reader=reader,
    )
    given = None if statistics is None else given_statistics(statistics, recording.name)
    if given is not None and mask is not None:
        raise ValueError(f"{recording.name}: the statistics given have a mask of their own; leave mask out.")
    survey = _survey(recording, mask, given, cache, progress)
    source = Source(
        name=recording.name,
        dataset=recording.train,
        held_out=recording.held_out,
        statistics=dict(given or survey.statistics),
        survey=survey,
        everything=recording.everything,
        weight=weight,
        camera=recording.camera,
        standardize=recording.standardize,
        keep_unlabeled=keep_unlabeled,
        max_action=max_action,
        max_proprio=max_proprio,
    )
    if not source.num_frames:
        raise ValueError(
            f"Nothing is left to train on. {source.report()}\nRelax a filter; where the instructions were not found, "
            "name them with language_key, or keep_unlabeled=True trains without."
        )
    _check_gripper(source, gripper)
    if camera is not None:
        first = next(iter(source.dataset), None)
        if first is not None:
            main_camera(first, source.camera)
    return source


def _survey(
    recording: Recording, mask: Sequence[bool] | None, given: dict | None, cache: bool, progress: bool
) -> Survey:
    """The statistics and counts of all episodes, from the cache where they are known."""
    units = {part: given[part] for part in ("action", "proprio") if part in given} if given else None
    options = {**recording.options, "mask": None if mask is None else [bool(scaled) for scaled in mask], "units": units}
    key = content_key(recording.everything, options) if cache else None
    survey = load_survey(key) if key else None
    if survey is None:
        survey = take_survey(
            recording.everything, mask, recording.absolute, units, recording.standardize == "droid", progress
        )
        if key:
            store_survey(key, survey)
    return survey


def _check_gripper(source: Source, gripper: str) -> None:
    stats = source.survey.statistics["action"]
    low, high = stats["min"][-1], stats["max"][-1]
    if len(stats["min"]) == 7 and gripper == "open-is-1" and source.standardize is None and low <= -0.9 and high >= 0.9:
        warnings.warn(
            f"{source.name}: the last dimension goes from {low:.3g} to {high:.3g}. If that is a gripper, say what open "
            "means: gripper='open-is-minus-1' (LIBERO and robomimic as recorded) or 'open-is-plus-1'; the published "
            "models expect 1 = open, 0 = closed.",
            UserWarning,
            stacklevel=3,
        )


def given_statistics(statistics: str | os.PathLike | Mapping[str, Any], name: str) -> dict[str, Any]:
    """The statistics of the dataset `name`, checked.

    Args:
        statistics: A file, or the content of one: `{dataset: {"action": {"q01", "q99", ...}}}`, or the statistics of
            one dataset alone.
    """
    content: Any = statistics
    if isinstance(statistics, str | os.PathLike):
        if not Path(statistics).is_file():
            raise FileNotFoundError(f"No statistics at '{statistics}': expected a dataset_statistics.json.")
        try:
            content = json.loads(Path(statistics).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{statistics}' is no JSON file: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"statistics: expected {{dataset: statistics}}, got {type(content).__name__}.")
    if "action" not in content:
        if name not in content:
            raise KeyError(
                f"The statistics are of {', '.join(sorted(content)) or 'nothing'}, not of '{name}'."
                f"{closest(name, content)} Say name=... to choose one."
            )
        content = content[name]
    return {**content, "action": get_action_stats({name: content}, name)}


# What a user may write ----------------------------------------------------------------------------------------------


def open_sources(
    specification: str | os.PathLike | Any, *, data_root: str | os.PathLike | None = None, **options: Any
) -> list[Source]:
    """The datasets that training draws from.

    Args:
        specification: Path of one dataset of any format; an object with `__len__` and `__getitem__`; the name of an
            Open-X mixture or of a dataset, or "bridge_orig:1.0,kuka:0.5", whose names are folders under `data_root`; or
            a YAML file of `name: weight` or `name: {path: ..., weight: ..., options of open_source}`. What exists as a
            path is a path.
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
    if not is_mixture_file(text) or os.path.isdir(text):
        for path in [Path(text).expanduser(), *([root / text] if root else [])]:
            if os.path.exists(path):  # False also for a mixture that is too long for a name
                return [open_source(path, **options)]
        if text not in load_oxe_mixtures() and not ("," in text or ":" in text):
            raise _missing(text, root)
    return _open_mixture(text, root, options)


def _open_mixture(text: str, root: Path | None, options: dict[str, Any]) -> list[Source]:
    if options.get("name") is not None:
        raise ValueError(f"name='{options['name']}' is for one dataset; the mixture '{text}' names its own.")
    beside = Path()
    if is_mixture_file(text):
        text = str(Path(text).expanduser())
        beside = Path(text).parent
    located: list[tuple[Path, dict[str, Any]]] = []
    missing: list[str] = []
    for name, entry in load_entries(text).items():
        _check_options(entry, name)
        relative = Path(entry.pop("path", name)).expanduser()
        places = [base / relative for base in ((root, beside) if root else (beside,))]
        entry = {"name": None if len(Path(name).parts) > 1 else name, **entry}
        there = [place for place in places if os.path.exists(place)]
        located.append((there[0] if there else places[0], {**options, **entry}))
        if not there:
            missing.append(str(places[0]))
    if missing:
        raise FileNotFoundError(
            f"'{text}' names datasets that are not there: {', '.join(missing)}. Give data_root, the folder "
            f"that holds them{f' (now {root})' if root else ''}, or a path for each in a YAML file."
        )
    sources: list[Source] = []
    for location, entry in located:
        try:
            sources.append(open_source(location, **entry))
        except UntrainableError as error:
            warnings.warn(f"left out of the mixture: {error}", UserWarning, stacklevel=3)
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'{text}' holds several datasets called {', '.join(twice)}: give each a name of its own.")
    if not sources:
        raise ValueError(f"'{text}' holds no dataset that can be trained on.")
    dims = {source.name: len(source.statistics["action"]["q01"]) for source in sources}
    if len(set(dims.values())) > 1:
        raise ValueError(f"One model has one action space; the dimensions of actions in '{text}' are {dims}.")
    return sources


def _check_options(options: Mapping[str, Any], entry: str | None = None) -> None:
    known = [*list(inspect.signature(open_source).parameters)[1:-1], *READER_OPTIONS]
    known += ["path"] if entry else []
    for key in options:
        if key not in known:
            where = f" of '{entry}'" if entry else ""
            raise ValueError(f"No option{where} is called '{key}'.{closest(key, known)} Known: {', '.join(known)}.")


def _missing(text: str, root: Path | None) -> FileNotFoundError:
    known = [*load_oxe_mixtures(), *load_oxe_datasets()]
    looked = [str(Path(text).expanduser().absolute()), *([str(root / text)] if root else [])]
    hint = "" if text in known else closest(text, known)
    root_hint = "" if root else " Datasets that lie in one folder are found by name with data_root=that folder."
    return FileNotFoundError(
        f"'{text}' is neither a dataset (looked for {' and '.join(looked)}) nor a mixture.{hint}{root_hint}"
    )
