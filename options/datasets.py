"""Options of everything that opens demonstrations: `openvla stats`, `openvla finetune`, the entries of a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .fields import Options, option, pairs, required


# Keys in the file ("a,b" or ["a", "b"]), or {name in the episode: key in the file}; [] reads none.
Cameras = str | Sequence[str] | Mapping[str, str] | None
# One key, or several that are concatenated ("a,b" or ["a", "b"]); None or "none" within them is a column of zeros, []
# reads nothing.
Keys = str | Sequence[str | None] | None


@dataclass(kw_only=True)
class ReaderOptions(Options):
    """Options that the readers of all formats have. Here and in its subclasses they are declared, for the constructors
    in `data/formats/` and for the command line."""

    cameras: Cameras = option(
        None,
        "Cameras to read, by their keys in the data, joined by commas. Default: all in colour.",
        heading="Data",
    )
    action_key: Keys = option(
        None,
        "What the action is, where it is not called action: a key, or several joined by commas that are put side by "
        "side; none among them is a column of zeros.",
    )
    state_key: Keys = option(None, "What the state of the robot is: keys as for the action; none alone: no state.")
    language_key: str | None = option(
        None,
        "Where the instruction stands: a column, a path such as episode_metadata/language_instruction, or an attribute "
        "of an HDF5 file.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        keys: Any = self.cameras
        named = isinstance(keys, Mapping) and all(isinstance(part, str) for pair in keys.items() for part in pair)
        if not named and not _are_names(keys):
            raise ValueError(f"cameras={keys!r}: expected {EXPECTED_NAMES}, or {{name here: name in the data}}.")
        for option_name in ("action_key", "state_key"):
            keys = getattr(self, option_name)
            if not _are_names([part for part in keys if part is not None] if isinstance(keys, list | tuple) else keys):
                raise ValueError(f"{option_name}={keys!r}: expected {EXPECTED_NAMES}, null among them for zeros.")


EXPECTED_NAMES = "a name or a list of names (in YAML a number that is a name stands in quotes)"


def _are_names(keys: Any) -> bool:
    """Whether nothing, a text or a list of texts was given."""
    return isinstance(keys, str | None) or (
        isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)
    )


@dataclass(kw_only=True)
class HDF5Options(ReaderOptions):
    """Options of the reader of HDF5 files."""

    rotate_images: bool | None = option(
        None,
        "Turn images of HDF5 files by 180 degrees. Default: those of LIBERO, by their attributes.",
        heading="Data",
    )


@dataclass(kw_only=True)
class LeRobotOptions(ReaderOptions):
    """Options of the reader of LeRobot folders."""

    tolerance_s: float | None = option(
        None,
        "Seconds that time stamps of LeRobot may differ from frame_index / fps. Default: 0.0001.",
        heading="Data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.tolerance_s
        if given is not None and not (isinstance(given, int | float) and not isinstance(given, bool) and given > 0):
            raise ValueError(f"tolerance_s={given!r}: expected seconds above 0.")


@dataclass(kw_only=True)
class DatasetOptions(HDF5Options, LeRobotOptions):
    """Which demonstrations, and how they are read."""

    dataset: str = required(
        "Folder or file of demonstrations (RLDS, LeRobot, HDF5); or a mixture: its Open-X name, "
        "'name:weight,name:weight', or a YAML file."
    )
    data_root: str | None = option(
        None, "Folder in which the datasets of a mixture lie under their names.", heading="Data"
    )
    format: str | None = option(
        None,
        "Format of the data: rlds, lerobot or hdf5; or MODULE:CLASS, a reader of your own. Default: recognised.",
    )
    reader: dict[str, Any] = pairs("Option of a reader of your own: NAME=VALUE, any number of times.", flag="--reader")
    split: str = option("train", "Split to train on, or in RLDS a part of one: train[:100], train[:50%].")
    name: str | None = option(
        None, "Name of the dataset in the result, which predict asks for as --unnorm-key. Default: its own."
    )
    gripper: Literal["open-is-1", "open-is-0", "open-is-plus-1", "open-is-minus-1"] = option(
        "open-is-1",
        "What the recorded gripper means: open-is-1 or open-is-0 where it goes from 0 to 1, open-is-plus-1 or "
        "open-is-minus-1 (LIBERO's HDF5) where it goes from -1 to 1. The model's convention is 1 open.",
        heading="Actions in the data",
    )
    gripper_dims: str | None = option(
        None,
        "Dimensions that are grippers, counted from 0: 6, or 6,13 of two arms, or none. Default: those with such a "
        "name, else the last where it looks like one.",
        listed=True,
    )
    absolute_dims: str | None = option(
        None,
        "Dimensions that are absolute targets, not deltas, counted from 0: 0,1,2, or all, as of joint positions; none: "
        "all are deltas. Targets are kept where a robot waits, or a chunk ends with standstill (--chunk-end still). "
        "Default: grippers, and what is not scaled, a guess of which clients hold nothing.",
        listed=True,
    )
    frame: str | None = option(None, "Frame of the actions, in words: base, end effector. For card and predictions.")
    unit: str | None = option(None, "Unit of the actions, in words: metres and radians. For card and predictions.")
    hz: float | None = option(
        None, "Control rate: actions per second. Default: as recorded, where the data says so.", least=1e-3
    )
    mask: str | None = option(
        None,
        "Which dimensions of an action are scaled by q01 and q99, 1 or 0 for each: 1,1,1,1,1,1,0. Default: all but "
        "grippers in [0, 1].",
        listed=True,
    )
    standardize: str = option(
        "auto",
        "Standardization of RLDS datasets: auto finds it by their names (Open-X, Bridge, DROID, LIBERO); none reads as "
        "recorded; or such a name.",
        heading="Data",
    )
    filters: str = option("", "Steps to leave out, joined by commas: no-ops, zero-actions.")
    on_error: Literal["raise", "skip"] = option("raise", "What to do with a damaged record; skip warns and counts.")


@dataclass(kw_only=True)
class StatsOptions(DatasetOptions):
    """The action statistics of a dataset."""

    dataset: str = required("Folder or file (RLDS, LeRobot, HDF5), or a mixture (see finetune).", argument=True)
    split: str = option(
        "train", "Split to read: train is all splits together, as in training; any other is read alone."
    )
    name: str | None = option(None, "Name that --output gives the dataset: the model's unnorm_key.", shown="its own")
    output: Path | None = option(None, "File to write them to, such as dataset_statistics.json.", neutral=True)
    plot: Path | None = option(None, "File to draw the histograms in, such as actions.png.", neutral=True)
