"""One dataset, from a path or an object to what training draws from: standardized, split, filtered and normalized.

Stages in the original's order: standardization, (gripper convention, raw filters,) statistics, normalization, filters
of episodes, chunks of actions, filters of frames. docs/data.md says where they differ on purpose.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..action_spec import spec_of
from ..action_tokenizer import check_statistics, read_statistics
from ..cameras_openvla import view_of
from ..choices_openvla import check_choice, closest
from ..configuration_openvla import UNITS, plain_statistics
from .checks import check_clipped, check_converted, odd_grippers
from .dataset import OnError
from .dimensions import parse_absolute, parse_grippers, parse_mask
from .mixture import check_weight
from .recording import Recording, open_recording
from .samples import model_cameras
from .source import CHUNK_ENDS, Source
from .standardization import fit_state
from .survey import Survey, content_key, load_survey, store_survey, take_survey


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
    mask: str | Sequence[bool] | None = None,
    gripper_dims: str | int | Sequence[int] | None = None,
    absolute_dims: str | int | Sequence[int] | None = None,
    frame: str | None = None,
    unit: str | None = None,
    hz: float | None = None,
    keep_unlabeled: bool = False,
    max_action: float | None = None,
    max_proprio: float | None = None,
    action_chunk: int = 1,
    chunk_end: str = "repeat",
    normalization: str | Mapping[str, str] = "bounds_q99",
    camera_names: Sequence[str] = ("primary",),
    sees_state: bool = False,
    on_error: OnError = "raise",
    cache: bool = True,
    progress: bool = False,
    reader: Mapping[str, Any] | None = None,
    **reader_options: Any,
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
        camera_names: What the model sees, see `cameras_openvla`; "primary" is `camera`, if that is given.
        sees_state: The model sees the state. That of LIBERO's RLDS is then the eight numbers that its simulator gives
            and OpenVLA-OFT was trained with, without the column of zeros that fills up OpenVLA's layout.
        action_chunk: Steps that one sample is for.
        chunk_end: What follows in a chunk past the end of an episode, one of `CHUNK_ENDS`.
        normalization: What -1 and 1 stand for, of actions and states: "bounds_q99" (q01 and q99) or "bounds" (min and
            max); or that of several datasets by their names, "bounds_q99" of others.
        name: The unnorm_key. Default: that of the dataset.
        gripper: Convention of the data, one of `GRIPPERS`.
        standardize: "auto" (RLDS datasets whose name is in `STANDARDIZE`), None or "none", or a name in it.
        statistics: A dataset_statistics.json or its content, or the statistics of this dataset, instead of its own.
            What it says of the meaning of the actions (`action_spec`) counts where options and recording say nothing.
        mask: (A,) which dimensions are scaled, also as text ("1,1,1,1,1,1,0"). Default: all but grippers in [0, 1].
        gripper_dims: Which dimensions are grippers, counted from 0, also as text ("6,13"; "none": there is none).
            Default: those that the recording names so; else the last, and of 14 or 16 (two arms) that of the
            first arm, where they look like one.
        absolute_dims: Which dimensions are places and not changes, counted from 0, also as text ("all"). Default:
            grippers, and what is not scaled.
        frame, unit, hz: What else the numbers mean, see `ActionSpec`. Default: what `statistics`, else the recording
            says (frames in a second of LeRobot, `control_freq` of HDF5, the unit of `openvla record`).

        Where a simulator stated the meaning of its actions (`action_spec`), `openvla record` wrote it down, and its
        grippers, places and frame are the defaults, the first two before those of `statistics`.
        keep_unlabeled: Keep steps without an instruction: they are trained on with an empty one.
        max_action, max_proprio: Drop episodes in which a normalized value, before it is clipped, exceeds this.
        on_error: What a damaged episode does: "raise", or "skip" with a warning.
        cache: Keep statistics for the next start, and use those kept.
        reader: Options of the reader by their names, as a reader of your own needs them.
        reader_options: Options of the readers of this package (`options/datasets.py`), by themselves.

    Raises:
        FileNotFoundError: If there is no dataset.
        ValueError: If options do not fit the data, or nothing is left to train on.
        KeyError: If `statistics` or `standardize` lack the name.
    """
    # 1. Options
    _check_kinds(bool, keep_unlabeled=keep_unlabeled, cache=cache, progress=progress, sees_state=sees_state)
    _check_kinds(str, format=format, split=split, camera=camera, name=name, gripper=gripper, standardize=standardize)
    _check_kinds(str, frame=frame, unit=unit, chunk_end=chunk_end)
    check_choice("chunk_end", chunk_end, CHUNK_ENDS)
    if held_out is None:  # an empty line of a YAML file
        raise ValueError("held_out=None: expected a part of the episodes, from 0 to below 1.")
    _check_kinds(Real, held_out=held_out, max_action=max_action, max_proprio=max_proprio, hz=hz)
    if not isinstance(action_chunk, int) or isinstance(action_chunk, bool) or action_chunk < 1:
        raise ValueError(f"action_chunk={action_chunk!r}: expected a positive integer.")
    _check_views(camera, camera_names)
    for option, value in (("max_action", max_action), ("max_proprio", max_proprio)):
        if value is not None and not value > 0:
            raise ValueError(f"{option}={value}: expected a number above 0; values are normalized to [-1, 1].")
    weight = check_weight(weight, f"weight={weight!r}")
    check_choice("on_error", on_error, ("raise", "skip"))
    scaled = parse_mask(mask)

    # 2. Episodes
    recording = open_recording(
        location,
        format=format,
        split=split,
        held_out=held_out,
        filters=_filter_names(filters),
        camera=camera,
        camera_names=camera_names,
        sees_state=sees_state,
        name=name,
        gripper=gripper,
        gripper_dims=parse_grippers(gripper_dims),
        standardize=standardize,
        on_error=on_error,
        reader=_reader_options(reader, reader_options),
    )

    # 3. Units
    given = None
    if statistics is not None:
        given = fit_state(given_statistics(statistics, recording.name), recording.standardize, sees_state)
    if given is not None and scaled is not None:
        raise ValueError(f"{recording.name}: the statistics given have a mask of their own; leave mask out.")
    normalization = _mode(recording.name, normalization, given)
    lent = spec_of({recording.name: given}, recording.name) if given and given.get("action_spec") is not None else None
    stated = recording.spec or lent  # what the robot of this recording does, its simulator knows best
    grippers = recording.gripper_dims
    if stated is not None and grippers is None:
        grippers = stated.grippers
        if gripper != "open-is-1" or filters:
            recording = recording.with_grippers(grippers)
    survey = _survey(recording, scaled, given, normalization, cache, progress)
    _check_stated(recording, survey)
    places = parse_absolute(absolute_dims)
    if stated is not None and stated.stated and places is None:
        places = tuple(dim for dim, relative in enumerate(stated.relative) if not relative)

    converted = recording.standardize is not None or gripper != "open-is-1"

    # 4. What training draws from
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
        gripper_dims=grippers,
        recorded_names=recording.action_names,
        state_names=recording.state_names,
        absolute_dims=places,
        frame=frame if frame is not None else (lent.frame if lent else None) or (stated.frame if stated else None),
        unit=unit if unit is not None else (lent.unit if lent else None) or recording.unit,
        hz=float(hz) if hz is not None else (lent.hz if lent else None) or recording.hz,
        stated=places is not None or recording.standardize is not None or recording.usual,  # recipes make changes
        as_recorded=() if converted else (stated.as_recorded or None) if stated else None,
        mask_given=scaled is not None,
        action_chunk=action_chunk,
        chunk_end=chunk_end,
        normalization=normalization,
        camera_names=recording.camera_names,
    )
    _ = source.action_spec  # dimensions and rates that cannot be
    _check_something_is_left(source)
    if scaled is not None:
        _check_mask(source, scaled)
    for doubt in _doubts(source, gripper, given is not None):
        warnings.warn(doubt, UserWarning, stacklevel=2)
    if camera is not None and (first := next(iter(source.dataset), None)) is not None:
        model_cameras(first, source.camera_names, source.camera)
    return source


# What cannot be asked for ---------------------------------------------------------------------------------------------


def _check_kinds(kind: type, **options: Any) -> None:
    """Raise a `ValueError` for an option of another kind, as a YAML file may hold it."""
    expected = {bool: "true or false", str: "text", Real: "a number"}[kind]
    for option, value in options.items():
        if value is not None and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
            raise ValueError(f"{option}={value!r}: expected {expected}.")


def _check_views(camera: str | None, camera_names: Any) -> None:
    names = list(camera_names) if isinstance(camera_names, list | tuple) else []
    if not names or not all(isinstance(view, str) for view in names) or len({*names}) < len(names):
        raise ValueError(f"camera_names={camera_names!r}: expected names of cameras, each once: ['primary', 'wrist'].")
    if camera is not None and "primary" not in map(view_of, names):
        raise ValueError(
            f"camera={camera!r} is what a model sees as primary, and this one sees {', '.join(names)}: leave it out."
        )


def _reader_options(reader: Any, by_themselves: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a reader, each given once."""
    reader = {} if reader is None else reader
    if not isinstance(reader, Mapping):
        raise ValueError(f"reader={reader!r}: expected a mapping of options to their values.")
    if twice := sorted(reader.keys() & by_themselves.keys()):
        raise ValueError(f"{', '.join(twice)}: given twice, by itself and with reader=... (--reader).")
    return {**reader, **by_themselves}


def _filter_names(filters: str | Sequence[str] | None) -> list[str]:
    """Each once, in their order."""
    parts = filters.split(",") if isinstance(filters, str) else filters or ()
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"filters={filters!r}: expected names joined by commas, or a list of them.")
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


# Units ----------------------------------------------------------------------------------------------------------------


def _mode(name: str, normalization: str | Mapping[str, str], given: Mapping[str, Any] | None) -> str:
    """What -1 and 1 stand for in one dataset; a `ValueError` where the statistics given do not say it."""
    by_name = normalization if isinstance(normalization, Mapping) else {name: normalization}
    mode = by_name.get(name, "bounds_q99")
    check_choice("normalization", mode, UNITS)
    if given is not None and mode == "bounds":
        for part in filter(given.get, ("action", "proprio")):
            if not {"min", "max"} <= given[part].keys():
                raise ValueError(
                    f"{name}: the {part} statistics given have no min and max, which normalization='bounds' "
                    "needs: take those of `openvla stats`, or leave it out."
                )
    return mode


def given_statistics(statistics: str | os.PathLike | Mapping[str, Any], name: str) -> dict[str, Any]:
    """The statistics of the dataset `name`, checked.

    Args:
        statistics: A file, or the content of one: `{dataset: {"action": {"q01", "q99", ...}}}`, or the statistics of
            one dataset alone.
    """
    if isinstance(statistics, str | os.PathLike):
        known = read_statistics(Path(os.path.expanduser(statistics)))
    else:
        plain = plain_statistics(statistics)  # arrays become lists
        of_one = isinstance(plain, Mapping) and "action" in plain
        known = check_statistics({name: plain} if of_one else plain, "statistics")
    if name not in known:
        raise KeyError(
            f"The statistics are of {', '.join(sorted(known)) or 'nothing'}, not of '{name}'.{closest(name, known)} "
            "Say name=... (--name) to choose one."
        )
    return dict(known[name])


def _survey(
    recording: Recording,
    mask: Sequence[bool] | None,
    given: dict | None,
    normalization: str,
    cache: bool,
    progress: bool,
) -> Survey:
    """The statistics and counts of all episodes, from the cache where they are known. What a reader of one's own gives,
    or an object that was made with options of its own, may differ for the same files: it is read each time."""
    units = {part: given[part] for part in ("action", "proprio") if part in given} if given else None
    options = {**recording.options, "mask": mask, "units": units, "normalization": normalization}
    key = content_key(recording.everything, options) if cache and recording.known else None
    survey = load_survey(key) if key else None
    if survey is None:
        survey = take_survey(recording, mask, units, progress, normalization)
        if key:
            store_survey(key, survey)
    return survey


# What came of it ------------------------------------------------------------------------------------------------------


def _check_stated(recording: Recording, survey: Survey) -> None:
    """Raise a `ValueError` where a simulator stated the meaning of other actions than there are."""
    spec, dims = recording.spec, len(survey.statistics["action"]["q01"])
    if spec is not None and spec.action_dim != dims:
        raise ValueError(
            f"{recording.name}: the recording.json beside it is of actions of {spec.action_dim} numbers, and these "
            f"have {dims}: it is of another recording, move it away."
        )


def _check_something_is_left(source: Source) -> None:
    if not source.num_frames:
        short = " Episodes shorter than a chunk: chunk_end='repeat'." if source.chunk_end == "drop" else ""
        raise ValueError(
            f"Nothing is left to train on. {source.report()}\nRelax a filter; where the instructions were not found, "
            "name them with language_key (--language-key). keep_unlabeled=True (--keep-unlabeled) trains without."
            f"{short}"
        )


def _check_mask(source: Source, mask: Sequence[bool]) -> None:
    """Raise a `ValueError` where the mask leaves values unscaled that tokens, which cover [-1, 1], would clip."""
    stats, clipped = source.survey.statistics["action"], source.survey.action["clipped"]
    for dim, name in enumerate(source.names):
        if not mask[dim] and clipped[dim]:
            raise ValueError(
                f"{source.name}: mask leaves {name} as recorded, from {stats['min'][dim]:.3g} to "
                f"{stats['max'][dim]:.3g}, but only -1 to 1 can be learned unscaled: give it 1 (true)."
            )


def _doubts(source: Source, gripper: str, given: bool) -> list[str]:
    """A limit of states that are not there, what was said of the gripper, and statistics that were given."""
    found = []
    if source.max_proprio is not None and not source.state_dim:
        found.append(
            f"{source.name}: max_proprio={source.max_proprio:g} drops nothing: there are no states, not in every "
            "episode, or no statistics of them (--state-key names the states)."
        )
    found += _doubts_of_grippers(source, gripper)
    return [*found, *check_clipped(source)] if given else found


def _doubts_of_grippers(source: Source, gripper: str) -> list[str]:
    """Values of -1 and 1 that were left as recorded, or a convention that was given and that they do not have."""
    if source.standardize is not None:
        return []
    if gripper != "open-is-1":
        return check_converted(source, gripper)
    found = []
    for dim, low, high in odd_grippers(source):
        if -1.5 <= low <= -0.9 and 0.9 <= high <= 1.5:
            last = "the last dimension" if dim == source.action_dim - 1 else f"action[{dim}]"
            found.append(
                f"{source.name}: {last} goes from {low:.3g} to {high:.3g}. If that is a gripper, say what open means: "
                "gripper='open-is-minus-1' (LIBERO and robomimic as recorded) or 'open-is-plus-1'; the published "
                "models expect 1 = open, 0 = closed. If it is none: gripper_dims='none'."
            )
    return found
