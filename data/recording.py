"""A dataset on disk or in memory, opened split by split: which episodes train, which are held out."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..action_spec import ActionSpec
from ..files_openvla import read_json
from .dataset import EpisodeDataset, OnError, PartOfDataset, key_list
from .formats.open import open_dataset, recognise
from .formats.registry import FORMATS, has_option
from .prepare import PreparedDataset
from .standardization import Standardization, layout_options, standardization_of


VALIDATION_SPLITS = ("val", "valid", "validation")
ENOUGH_EPISODES = 5  # to hold one out


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
    spec: ActionSpec | None  # what the simulator said that it was recorded in
    usual: bool  # it said no more, and by the contract of environments its actions are changes then
    options: dict[str, Any]  # everything that decides actions, states and instructions beside the files
    known: bool  # whether files and options decide them: not where code of the user's does, or an object was opened

    def with_grippers(self, dims: tuple[int, ...]) -> "Recording":
        """The same, of which these dimensions are grippers for certain: conventions and filters are about them."""

        def prepared(old: PreparedDataset) -> PreparedDataset:
            return PreparedDataset(old.dataset, old.name, old.gripper, [*old.filters], dims, old.names, old.remark)

        return replace(
            self,
            train=prepared(self.train),
            held_out=prepared(self.held_out) if self.held_out else None,
            everything=tuple(map(prepared, self.everything)),
            gripper_dims=dims,
            options={**self.options, "gripper_dims": dims},
        )


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
    origin = _origin(location, format, split, name, standardize, on_error, reader)
    name, plain, standard = origin.name, origin.plain, origin.standard
    if standard:
        camera, camera_names, preset = layout_options(standard, camera, camera_names, sees_state, name)
        origin.options = {**preset, **origin.options, "standardize": standard}
    said = f"gripper='{gripper}'" if gripper != "open-is-1" else f"gripper_dims={gripper_dims}"
    if standard and (gripper != "open-is-1" or gripper_dims is not None):
        raise ValueError(
            f"'{name}' is standardized as '{standard.name}', after which its gripper is 1 = open already: leave {said} "
            "out, or give standardize='none'."
        )
    names, remark = (None, standard.remark) if standard else (plain.action_names, "")
    spec, unit, usual = recorded_meaning(location)
    if standard or key_list(reader.get("action_key") or "action") not in (["action"], ["actions"]):
        spec, unit, usual = None, None, False  # of other numbers than those that were recorded
    if spec is not None:
        names = names or list(spec.names)
        gripper_dims = spec.grippers if gripper_dims is None else gripper_dims

    def prepared(dataset: EpisodeDataset) -> PreparedDataset:
        return PreparedDataset(dataset, origin.name, gripper, filters, gripper_dims, names, remark)

    validation = next((known for known in VALIDATION_SPLITS if known in plain.splits), None)
    if not held_out or split.partition("[")[0] != "train" or "+" in split:
        validation = None  # not asked for, or what was asked for may hold these episodes itself
    train, kept_back = _train_and_held_out(origin, split, validation, held_out)
    everything = [origin.open("all" if split == "train" else split, **origin.without_images)]
    if split == "train" and (left := everything[0].in_no_split):
        warnings.warn(
            f"{name}: {left} of {len(everything[0])} episodes are in no split to train on or to hold out, and are left "
            f"out, though the statistics are of all ({', '.join(plain.splits)}): complete the splits (LeRobot: "
            "meta/info.json, HDF5: mask/train), or take all of them with split='all' (--split all).",
            UserWarning,
            stacklevel=3,
        )
    if validation and split != "train":
        everything.append(origin.open(validation, **origin.without_images))
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
        unit=unit,
        spec=spec,
        usual=usual,
        known=origin.format in FORMATS,
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


@dataclass
class _Origin:
    """A path, or an object (no `format`), and how its splits are opened."""

    name: str
    plain: EpisodeDataset  # the split asked for, as recorded
    path: Path | None = None
    format: str | None = None
    standard: Standardization | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the reader

    @property
    def without_images(self) -> dict[str, Any]:
        """Options of the reader that leave images out, if it can."""
        return {"cameras": []} if self.format and has_option(self.format, "cameras") else {}

    def open(self, split: str, **more: Any) -> EpisodeDataset:
        if self.path is None:
            return self.plain
        return open_dataset(self.path, self.format, split, **{**self.options, **more})


def _origin(
    location: str | os.PathLike | Any,
    format: str | None,
    split: str,
    name: str | None,
    standardize: str | None,
    on_error: OnError,
    reader: Mapping[str, Any],
) -> _Origin:
    if isinstance(location, str | os.PathLike):
        path = Path(location).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path.absolute()} does not exist: expected a folder or file of demonstrations.")
        format = format or recognise(path)
        plain = open_dataset(path, format, split, on_error=on_error, **reader)
        standard = standardization_of(_folder_name(path), plain.name, format, standardize)
        name = name or (standard.name if standard and standardize == "auto" else plain.name)
        return _Origin(name, plain, path, format, standard, {"on_error": on_error, **reader})
    if reader or standardize not in ("auto", "none", None):
        given = sorted(reader) or f"standardize={standardize!r}"
        raise ValueError(f"{given}: an object in Python gives episodes as they are to be trained on, by itself.")
    if split not in ("train", "all") or format is not None:
        said = f"split='{split}'" if format is None else f"format='{format}'"
        raise ValueError(f"{said}: an object in Python has all its episodes and no format, leave it out.")
    if not isinstance(location, EpisodeDataset):
        location = open_dataset(location, on_error=on_error)
    return _Origin(name or location.name, location)


def _train_and_held_out(
    origin: _Origin, split: str, validation: str | None, held_out: float
) -> tuple[EpisodeDataset, EpisodeDataset | None]:
    """The split to train on and that of `validation`; without one the last episodes of the split are held out."""
    train = origin.open(split) if origin.standard else origin.plain
    if validation:
        kept_back = origin.open(validation)
        if shared := {*(train.members() or ())} & {*(kept_back.members() or ())}:
            raise ValueError(
                f"{origin.name}: {len(shared)} of the {len(kept_back)} episodes of the split '{validation}' are in "
                f"'{split}' as well, so that what is held out would be trained on: correct the splits (LeRobot: "
                "meta/info.json, HDF5: mask/...), or train with held_out=0 (--held-out 0), on all of the split and "
                "without evaluation."
            )
        return train, kept_back
    boundary = split_boundary(len(train), held_out)
    if not boundary:
        return train, None
    return PartOfDataset(train, range(boundary)), PartOfDataset(train, range(boundary, len(train)))


def recorded_meaning(location: Any) -> tuple[ActionSpec | None, str | None, bool]:
    """What `openvla record` wrote beside its data set of the actions, of their unit alone, and whether they are the
    usual ones, as its environment said nothing else: LeRobot and HDF5 have no place for it. Raises a `ValueError` for
    an `action_spec` that says nothing sound: somebody edited it."""
    if not isinstance(location, str | os.PathLike):
        return None, None, False
    path = Path(location).expanduser().resolve()
    file = (path if path.is_dir() else path.parent) / "recording.json"
    try:
        content = read_json(file)
    except (OSError, ValueError):  # there is none, or a file of that name is another program's
        return None, None, False
    found, unit = content.get("action_spec"), content.get("unit")
    try:
        spec = ActionSpec.from_dict(found) if isinstance(found, Mapping) else None
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error
    unit = unit if isinstance(unit, str) else None
    # Earlier versions wrote at most a unit, also of environments that had more to say: of places, maybe.
    usual = spec is None and (content.get("usual_actions") is True or unit is not None)
    return spec, unit, usual


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
