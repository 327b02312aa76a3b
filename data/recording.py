"""A dataset on disk or in memory, opened split by split: which episodes train, which are held out."""

import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..cameras_openvla import view_of
from ..files_openvla import read_json
from .dataset import EpisodeDataset, OnError, PartOfDataset, name_cameras
from .episode import DamagedDataError
from .formats.open import open_dataset, recognise
from .formats.registry import FORMATS, has_option, standardizes
from .oxe.catalog import OXEDataset, load_oxe_datasets
from .oxe.conversions import Trajectory
from .oxe.recipes import Recipe
from .oxe.standardize import STANDARDIZE
from .prepare import PreparedDataset


VALIDATION_SPLITS = ("val", "valid", "validation")
ENOUGH_EPISODES = 5  # to hold one out
LIBERO_STATE, LIBERO_ZERO = 8, 6  # numbers that LIBERO's simulator gives; where OpenVLA's layout has a zero among them


class UntrainableError(ValueError):
    """A dataset that the model cannot be trained on as it is: a mixture continues without it."""


@dataclass(frozen=True)
class Standardization:
    """What `STANDARDIZE` and the layout of a dataset say about reading it."""

    name: str
    recipe: Recipe
    layout: OXEDataset | None
    absolute: np.ndarray | None = field(repr=False)  # (A,) bool: dimensions that are not scaled

    @property
    def remark(self) -> str:
        return f"standardized as '{self.name}'; standardize='none' (--standardize none) reads as recorded"

    def __call__(self, trajectory: Trajectory) -> Trajectory:
        try:
            return self._standard(trajectory)
        except DamagedDataError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, zlib.error) as error:
            said = error.args[0] if isinstance(error, KeyError) and error.args else error
            kind = KeyError if isinstance(error, KeyError) else ValueError
            raise kind(f"{self.remark}. As it is recorded, it does not fit that name: {said}") from error

    def _standard(self, trajectory: Trajectory) -> Trajectory:
        standard = self.recipe(trajectory)
        if self.recipe.swapped_views is None:
            return standard
        # Whether an episode's two views change places depends on its actions: the same in every pass and process.
        seed = zlib.crc32(np.ascontiguousarray(standard["action"]).tobytes())
        return self.recipe(trajectory, np.random.default_rng(seed))


@dataclass
class Recording:
    """Datasets of one recording, prepared, and what else is known about it."""

    name: str
    train: PreparedDataset
    held_out: PreparedDataset | None
    everything: tuple[PreparedDataset, ...]  # all episodes that statistics are of, without images
    camera: str | None
    camera_names: Sequence[str]  # what the model sees, by the names here where they are known
    standardize: str | None
    absolute: list[bool] | None
    gripper_dims: tuple[int, ...] | None  # that are grippers for certain
    action_names: list[str] | None  # as recorded
    state_names: list[str] | None
    hz: float | None  # as recorded
    unit: str | None
    options: dict[str, Any]  # everything that decides actions, states and instructions beside the files
    known: bool  # whether files and options decide them: not where code of the user's does, or an object was opened


def open_recording(
    location: str | os.PathLike | Any,
    *,
    format: str | None,
    split: str,
    held_out: float,
    filters: list[str],
    camera: str | None,
    camera_names: Sequence[str],
    sees_state: bool,
    name: str | None,
    gripper: str,
    gripper_dims: tuple[int, ...] | None,
    standardize: str | None,
    on_error: OnError,
    reader: Mapping[str, Any],
) -> Recording:
    """See `sources.open_source`."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a part of the episodes, from 0 to below 1.")
    standard: Standardization | None = None
    without_images: dict[str, Any] = {}
    known = False
    if isinstance(location, str | os.PathLike):
        path = Path(location).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path.absolute()} does not exist: expected a folder or file of demonstrations.")
        format = format or recognise(path)
        plain = open_dataset(path, format, split, on_error=on_error, **reader)
        without_images = {"cameras": []} if has_option(format, "cameras") else {}
        known = format in FORMATS
        standard = _standardization(_folder_name(path), plain.name, format, standardize)
        name = name or (standard.name if standard and standardize == "auto" else plain.name)
        options = {"on_error": on_error, **reader}
        if standard:
            camera, camera_names, preset = _layout_options(standard, camera, camera_names, sees_state, name)
            options = {**preset, **options, "standardize": standard}

        def opened(split: str, **more: Any) -> EpisodeDataset:
            return open_dataset(path, format, split, **{**options, **more})
    else:
        if reader or standardize not in ("auto", "none", None):
            given = sorted(reader) or f"standardize={standardize!r}"
            raise ValueError(f"{given}: an object in Python gives episodes as they are to be trained on, by itself.")
        if split not in ("train", "all") or format is not None:
            said = f"split='{split}'" if format is None else f"format='{format}'"
            raise ValueError(f"{said}: an object in Python has all its episodes and no format, leave it out.")
        plain = open_dataset(location, on_error=on_error) if not isinstance(location, EpisodeDataset) else location
        name = name or plain.name

        def opened(split: str, **more: Any) -> EpisodeDataset:
            return plain

    said = f"gripper='{gripper}'" if gripper != "open-is-1" else f"gripper_dims={gripper_dims}"
    if standard and (gripper != "open-is-1" or gripper_dims is not None):
        raise ValueError(
            f"'{name}' is standardized as '{standard.name}', after which its gripper is 1 = open already: leave {said} "
            "out, or give standardize='none'."
        )
    names, remark = (None, standard.remark) if standard else (plain.action_names, "")

    def prepared(dataset: EpisodeDataset) -> PreparedDataset:
        return PreparedDataset(dataset, str(name), gripper, filters, gripper_dims, names, remark)

    validation = next((known for known in VALIDATION_SPLITS if known in plain.splits), None)
    if not held_out or split.partition("[")[0] != "train" or "+" in split:
        validation = None  # not asked for, or what was asked for may hold these episodes itself
    train, kept_back = opened(split) if standard else plain, None
    if validation:
        kept_back = opened(validation)
        if shared := {*(train.members() or ())} & {*(kept_back.members() or ())}:
            raise ValueError(
                f"{name}: {len(shared)} of the {len(kept_back)} episodes of the split '{validation}' are in '{split}' "
                "as well, so that what is held out would be trained on: correct the splits (LeRobot: meta/info.json, "
                "HDF5: mask/...), or train with held_out=0 (--held-out 0), on all of the split and without evaluation."
            )
    elif boundary := split_boundary(len(train), held_out):
        kept_back = PartOfDataset(train, range(boundary, len(train)))
        train = PartOfDataset(train, range(boundary))
    everything = [opened("all" if split == "train" else split, **without_images)]
    if split == "train" and (left := everything[0].in_no_split):
        warnings.warn(
            f"{name}: {left} of {len(everything[0])} episodes are in no split to train on or to hold out, and are left "
            f"out, though the statistics are of all ({', '.join(plain.splits)}): complete the splits (LeRobot: "
            "meta/info.json, HDF5: mask/train), or take all of them with split='all' (--split all).",
            UserWarning,
            stacklevel=3,
        )
    if validation and split != "train":
        everything.append(opened(validation, **without_images))
    return Recording(
        name=name,
        train=prepared(train),
        held_out=prepared(kept_back) if kept_back else None,
        everything=tuple(prepared(dataset) for dataset in everything),
        camera=camera,
        camera_names=camera_names,
        standardize=standard.name if standard else None,
        absolute=standard.absolute.tolist() if standard and standard.absolute is not None else None,
        gripper_dims=gripper_dims,
        action_names=names,
        state_names=None if standard else plain.state_names,
        hz=plain.hz,
        unit=recorded_unit(location),
        known=known,
        options={
            **{key: value for key, value in reader.items() if key not in ("cameras", "rotate_images")},
            "split": [split, validation],
            "standardize": standard.name if standard else None,
            "gripper": gripper,
            "gripper_dims": gripper_dims,
            "filters": filters,
            "on_error": on_error,
            **({"sees_state": True} if sees_state and standard else {}),
        },
    )


def recorded_unit(location: Any) -> str | None:
    """What `openvla record` wrote of the unit beside its data set: LeRobot and HDF5 have no place for it."""
    if not isinstance(location, str | os.PathLike):
        return None
    try:
        unit = read_json(Path(location).expanduser() / "recording.json").get("unit")
    except (OSError, ValueError):  # there is none, or a file of that name is another program's
        return None
    return unit if isinstance(unit, str) else None


def _is_padded(standardize: str | None) -> bool:
    """Whether a standardization fills the state up with a column of zeros that a model which sees states is not
    shown."""
    return standardize is not None and standardize.startswith("libero_")


def fit_state(statistics: Mapping[str, Any], recording: Recording, sees_state: bool) -> dict[str, Any]:
    """Statistics as this recording is read, with or without the column of zeros that fills up the states of LIBERO:
    other ones of the same data, OpenVLA-OFT's among them, may have been made the other way."""
    proprio: Mapping[str, Any] = statistics.get("proprio") or {}
    width = len(proprio.get("q01", ()))
    if not _is_padded(recording.standardize) or width != (LIBERO_STATE + 1 if sees_state else LIBERO_STATE):
        return dict(statistics)
    columns = {name: list(values) for name, values in proprio.items() if len(values) == width}
    if sees_state and any(values[LIBERO_ZERO] for name, values in columns.items() if name != "mask"):
        return dict(statistics)
    for name, values in columns.items():
        values[LIBERO_ZERO : LIBERO_ZERO + sees_state] = [] if sees_state else [name == "mask" or 0.0]
    return {**statistics, "proprio": {**proprio, **columns}}


def split_boundary(episodes: int, held_out: float) -> int | None:
    """Where the episodes to train on end: at 95% for a `held_out` of 0.05, rounded as tensorflow_datasets does (half to
    even). None where nothing is held out.

    Where that would hold out none of 5 episodes or more, the last one is; never all of them.
    """
    if held_out == 0:
        return None
    boundary = max(round(episodes * round(100 * (1 - held_out), 6) / 100), 1)
    if boundary >= episodes:
        return episodes - 1 if episodes >= ENOUGH_EPISODES else None
    return boundary


def _folder_name(path: Path) -> str:
    """The name of a dataset's folder, whose versions are folders within."""
    path = path.resolve()
    return path.parent.name if path.name.replace(".", "").isdigit() else path.name


def _standardization(folder: str, recorded: str, format: str, standardize: str | None) -> Standardization | None:
    if standardize in (None, "none"):
        return None
    if standardize == "auto":
        # The folder first: Bridge comes as "bridge_dataset" and is renamed by its users.
        known = [name for name in (folder, recorded) if name in STANDARDIZE]
        if not standardizes(format) or not known:
            return None
        standardize = known[0]
    elif not standardizes(format):
        raise ValueError(f"standardize='{standardize}' is of an RLDS dataset; '{folder}' is {format}: leave it out.")
    recipe = STANDARDIZE[str(standardize)]
    layouts = load_oxe_datasets()
    layout = layouts[str(standardize)] if standardize in layouts else None
    try:
        absolute = layout.absolute_action_mask if layout else None
    except ValueError as error:
        raise UntrainableError(f"'{standardize}': {error} standardize='none' reads it as recorded.") from error
    return Standardization(str(standardize), recipe, layout, absolute)


def _layout_options(
    standard: Standardization, camera: str | None, camera_names: Sequence[str], sees_state: bool, name: str
) -> tuple[str | None, Sequence[str], dict[str, Any]]:
    """The camera, those that the model sees by their names here, and the reader's options, that a layout asks for."""
    if standard.layout is None:
        return camera, camera_names, {}
    keys = standard.layout.state_obs_keys
    if sees_state and _is_padded(standard.name):
        keys = [key for key in keys if key is not None]
    preset: dict[str, Any] = {"state_key": keys}
    views = standard.layout.image_obs_keys
    wanted = [(camera or view) if view == "primary" else view for view in map(view_of, camera_names)]
    if any(view not in views for view in wanted):
        return camera, camera_names, preset
    seen = [key for key in (views[view] for view in wanted) if key is not None]
    if len(seen) < len(wanted):
        there = [view for view, field_name in views.items() if field_name]
        missing = next(view for view in wanted if views[view] is None)
        raise UntrainableError(f"'{name}' has no {missing} view, only {' and '.join(there)}: give camera='{there[0]}'.")
    named = list(name_cameras(seen))
    return named[0], named if len(named) > 1 else camera_names, {**preset, "cameras": seen}
