"""Which standardization a dataset has, and what its layout says about reading it: views, states, grippers."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cameras_openvla import view_of
from .dataset import name_cameras
from .episode import DamagedDataError
from .formats.registry import standardizes
from .oxe.catalog import OXEDataset, load_oxe_datasets
from .oxe.conversions import Trajectory
from .oxe.recipes import Recipe
from .oxe.standardize import STANDARDIZE


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


def standardization_of(folder: str, recorded: str, format: str, standardize: str | None) -> Standardization | None:
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


def layout_options(
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


def _is_padded(standardize: str | None) -> bool:
    """Whether a standardization fills the state up with a column of zeros that a model which sees states is not
    shown."""
    return standardize is not None and standardize.startswith("libero_")


def fit_state(statistics: Mapping[str, Any], standardize: str | None, sees_state: bool) -> dict[str, Any]:
    """Statistics as a dataset of this standardization is read, with or without the column of zeros that fills up the
    states of LIBERO: other ones of the same data, OpenVLA-OFT's among them, may have been made the other way."""
    proprio: Mapping[str, Any] = statistics.get("proprio") or {}
    width = len(proprio.get("q01", ()))
    if not _is_padded(standardize) or width != (LIBERO_STATE + 1 if sees_state else LIBERO_STATE):
        return dict(statistics)
    columns = {name: list(values) for name, values in proprio.items() if len(values) == width}
    if sees_state and any(values[LIBERO_ZERO] for name, values in columns.items() if name != "mask"):
        return dict(statistics)
    for name, values in columns.items():
        values[LIBERO_ZERO : LIBERO_ZERO + sees_state] = [] if sees_state else [name == "mask" or 0.0]
    return {**statistics, "proprio": {**proprio, **columns}}
