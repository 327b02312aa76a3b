"""Open-X datasets and their named mixtures, as data: which field is which camera, how often a dataset is drawn.

Source: github.com/openvla/openvla, prismatic/vla/datasets/rlds/oxe (configs.py, mixtures.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...choices_openvla import closest
from .conversions import Trajectory
from .recipes import Field, as_columns


Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """A dict whose `KeyError` names the nearest entry."""

    def __init__(self, what: str, entries: Mapping[str, Entry]):
        super().__init__(entries)
        self.what = what

    def __missing__(self, name: str) -> Entry:
        raise KeyError(f"No {self.what} is called '{name}'.{closest(name, self)}")


# Actions that the model is trained on: all relative but the gripper, which is last.
ACTION_DIM = {"EEF_POS": 7, "EEF_R6": 10}


@dataclass(frozen=True)
class OXEDataset:
    """Which fields of a standardized observation are which camera and which part of the state.

    `image_obs_keys` and `depth_obs_keys` give the field of the `primary`, `secondary` and `wrist` view, or None.
    `state_obs_keys` make up `proprio`, a None standing for a column of zeros, by `state_encoding`: POS_EULER (xyz,
    roll-pitch-yaw, zero, gripper), POS_QUAT (xyz, quaternion, gripper), JOINT (7 joints, gripper) or NONE.
    """

    image_obs_keys: dict[str, str | None]
    depth_obs_keys: dict[str, str | None]
    state_obs_keys: list[str | None]
    state_encoding: str
    action_encoding: str

    @property
    def absolute_action_mask(self) -> np.ndarray:
        """(A,) bool: which action dimensions are absolute, which are also those that are not normalized.

        Raises:
            ValueError: If the actions are of joints, which the model is not trained on.
        """
        if self.action_encoding not in ACTION_DIM:
            raise ValueError(f"Actions are {self.action_encoding}; only {', '.join(ACTION_DIM)} can be trained on.")
        return np.arange(ACTION_DIM[self.action_encoding]) == ACTION_DIM[self.action_encoding] - 1

    def proprio(self, trajectory: Trajectory) -> np.ndarray:
        """(T, P) float32 state of a standardized trajectory."""
        zero = np.zeros((len(trajectory["action"]), 1))
        columns = [
            zero if key is None else as_columns(Field(("observation", key))(trajectory)) for key in self.state_obs_keys
        ]
        return np.concatenate(columns, axis=-1).astype(np.float32)


@cache
def _read(file: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))


def load_oxe_datasets() -> dict[str, OXEDataset]:
    """The layout of every dataset whose layout is known, by name; an unknown name is a `KeyError` with the nearest."""
    layouts = {name: OXEDataset(**layout) for name, layout in _read("datasets.json").items()}
    return Registry("dataset with a known layout", layouts)


def load_oxe_mixtures() -> dict[str, dict[str, float]]:
    """Named mixtures: `{mixture: {dataset: weight}}`; an unknown name is a `KeyError` with the nearest.

    `oxe_magic_soup` trained openvla-v01-7b; `oxe_magic_soup_plus`, then `oxe_magic_soup_plus_minus`, openvla-7b. Where
    the original lists a dataset twice the first weight counts, as it does there.
    """
    mixtures = {name: dict(weights) for name, weights in _read("mixtures.json").items()}
    return Registry("mixture", mixtures)


def allocate_threads(num_threads: int, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Threads per dataset in proportion to its weight, at least one wherever the weight is not zero.

    What a proportional share would leave below one thread gets one; the rest is shared out again among the others,
    full parts first, then one each to the largest fractions.

    Args:
        num_threads: Threads in all.
        weights: (N,) not negative; they need not sum to 1.

    Returns:
        (N,) int64 that sums to `num_threads`.

    Raises:
        ValueError: If a weight is negative, all are zero, or there are fewer threads than weights.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if np.any(shares < 0) or not np.any(shares > 0):
        raise ValueError(f"weights={shares.tolist()}: expected none below zero and one above it.")
    if num_threads < len(shares):
        raise ValueError(f"num_threads={num_threads} for {len(shares)} datasets: each needs one.")
    allocation = np.zeros(len(shares), dtype=np.int64)
    left = num_threads
    shares = shares / shares.sum()
    while np.any(small := (shares > 0) & (shares * left < 1)):
        allocation[small] = 1
        left -= int(small.sum())
        shares = np.where(small, 0.0, shares)
        if not shares.any():
            break
        shares = shares / shares.sum()
    fractions, integers = np.modf(shares * left)
    allocation += integers.astype(np.int64)
    for index in np.argsort(fractions, kind="stable")[::-1][: left - int(integers.sum())]:
        allocation[index] += 1
    return allocation
