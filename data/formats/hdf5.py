"""LIBERO and robomimic demonstrations: HDF5 files with data/demo_*/{actions, obs/...}."""

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...cameras_openvla import not_colour, order_cameras
from ...folders import files_below
from ...options.datasets import HDF5Options, Keys
from ..dataset import EpisodeDataset, OnError, action_keys, key_list, name_cameras, warn_of_camera
from ..episode import (
    COPY_AGAIN,
    EXECUTED,
    CameraImages,
    DamagedDataError,
    Episode,
    as_text,
    check_data_file,
    make_episode,
)
from .handles import kept_open


# The first group of which all keys are there becomes the state: LIBERO, robomimic, plain
STATE_NAMES = (
    ("obs/ee_states", "obs/gripper_states"),
    ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"),
    ("obs/state",),
)
# Chunks often span many steps and few rows: one frame touches chunks that hold most of its episode. Decompressed chunks
# are kept, so many bytes for each of so many cameras; where one frame's chunks do not fit, reading is 25 times slower.
CHUNK_CACHE = 8 * 2**20
OPEN_CAMERAS = 32
DAMAGED = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)  # what h5py raises for damaged parts
LANGUAGE_NAMES = ("language_instruction", "natural_language_instruction", "instruction", "lang")
HELD_OUT = ("val", "valid", "validation", "test")  # masks of what is not to be trained on
QUOTED = re.compile(r'^"([^"]*)"$')  # as LIBERO writes instructions
FEW_STEPS = 8  # above it one text more or less than steps are texts of the steps, and not ways to say one thing
LIBERO_SCENE = re.compile(r"^[A-Z_]+SCENE\d+_")


def hdf5_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in files_below(path) if p.suffix in (".hdf5", ".h5"))
    return [path]


class HDF5Dataset(EpisodeDataset):
    """Episodes of a file, or of all files in a folder, in the order of their names and numbers. Access is random.

    `split` names a group of demonstrations under `mask/` (robomimic); files without masks belong to "train" completely,
    and "all" takes everything. The instruction is that of the `problem_info` attribute (LIBERO), else of `ep_meta`
    (RoboCasa) or an attribute or data set "language_instruction" of the demonstration or of `data`, else the name of a
    file `<words>_demo`. `rotate_images` turns images by 180 degrees; None does so for files that say they are upside
    down, see `upside_down`. Keys are paths within a demonstration ("agentview_rgb" finds "obs/agentview_rgb");
    `language_key` names an attribute or data set of the demonstration or of `data`: one text, or one for each step.
    Cameras are (T, H, W, 3) uint8; what is called depth, a mask or infrared is one only where it is named, with a
    warning. Options: `HDF5Options`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        name: str | None = None,
        on_error: OnError = "raise",
        **options: Any,
    ):
        super().__init__(name or Path(path).stem, on_error)
        self.options = HDF5Options(**options)
        for key in name_cameras(self.options.cameras or ()).values():
            warn_of_camera(self.name, key)
        self.demos: list[tuple[Path, str]] = []
        masks: set[str] = set()
        self.in_no_split = 0
        files = hdf5_files(Path(path))
        if not all(file.exists() for file in files) or not files:
            raise FileNotFoundError(f"no HDF5 files at {path}")
        for file in files:
            try:
                self.demos += [(file, demo) for demo in _demos(file, split, masks)]
                self.in_no_split += _in_no_mask(open_file(file))
            except DamagedDataError as error:
                if on_error == "raise":
                    raise
                self._count(error)
        if not self.demos:
            raise ValueError(
                f"{path} has no demonstrations in split {split!r}; splits: {sorted(masks) or ['train']}, 'all'"
            )
        self.splits = sorted(masks) or ["train"]
        self.files = {file.relative_to(path).as_posix() if file != Path(path) else file.name: file for file in files}
        rates = {control_frequency(file) for file in dict.fromkeys(file for file, _ in self.demos)}
        if len(known := sorted(filter(None, rates))) > 1:
            warnings.warn(
                f"{self.name}: its files were recorded at {' and '.join(f'{rate:g}' for rate in known)} steps a second "
                "(control_freq), and the change of one step is not the same in all. Give those of each rate as a "
                "dataset of its own, in a mixture: each has statistics of its own.",
                UserWarning,
                stacklevel=3,
            )
        self.hz = rates.pop() if len(rates) == 1 else None
        self._action_dim: int | None = None
        self._has_camera: bool | None = None

    def __len__(self) -> int:
        return len(self.demos)

    def _load(self, index: int) -> Episode:
        file, demo = self.demos[index]
        origin = f"{file}, {demo}"
        try:
            group = open_file(file)["data"][demo]
            actions = _columns(group, action_keys(self.options.action_key, "actions"), origin)
            if not self.options.cameras:  # none: for statistics, which find what training would stop for
                self._check_cameras(group, 0 if actions is None else len(actions), origin)
            cameras = name_cameras(_cameras(group) if self.options.cameras is None else self.options.cameras)
            known = action_keys(self.options.action_key, "actions") == ["actions"] and EXECUTED in group
            state_key = self.options.state_key
            if state_key is None:
                state_key = next((names for names in STATE_NAMES if all(n in group for n in names)), [])
            turn = self.options.rotate_images
            turn = bool(cameras) and upside_down(file) if turn is None else turn
            return make_episode(
                actions=actions,
                images={name: HDF5Images(file, _find(group, key, origin).name, turn) for name, key in cameras.items()},
                state=_columns(group, state_key, origin),
                instructions=self._instructions(file, group, 0 if actions is None else len(actions), origin),
                dataset_name=self.name,
                index=index,
                origin=origin,
                action_dim=self._expected_dim(),
                executed=_columns(group, EXECUTED, origin) if known else None,
            )
        except DamagedDataError:
            raise
        except DAMAGED as error:
            raise DamagedDataError(f"{origin}: cannot be read ({error}): {COPY_AGAIN}") from error

    def members(self) -> list[tuple[Path, str]]:
        return self.demos

    def kind_of(self, index: int) -> tuple[str, ...] | None:
        file, demo = self.demos[index]
        try:
            return tuple(open_file(file)["data"][demo]["obs"])
        except DAMAGED:
            return None  # said where it is read

    def content_files(self) -> dict[str, Path]:
        return self.files

    def content_digest(self, path: Path) -> str:
        """Of everything but images, which fill most of a file.

        Raises:
            OSError: If a part lies in another file, of which nothing is known here.
        """
        digest = hashlib.sha256()

        def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
            digest.update(repr((name, sorted((key, str(value)) for key, value in item.attrs.items()))).encode())
            if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
                raise OSError(f"{path}: {item.name} is stored in other files")
            if isinstance(item, h5py.Dataset) and item.ndim < 4:
                values = np.asarray(item[()])
                raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
                digest.update(repr((values.dtype.str, values.shape)).encode() + raw)
            for key in item if isinstance(item, h5py.Group) else ():
                link = item.get(key, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    raise OSError(f"{path}: {item.name}/{key} lies in {link.filename}")
                if isinstance(link, h5py.SoftLink):
                    digest.update(repr((name, key, link.path)).encode())
                    target = item.get(key)
                    if link.path.startswith("/") and link.path.split("/")[1] not in rooms and target is not None:
                        add(link.path, target)  # not visited by itself

        content, rooms = open_file(path), ("data", "mask")
        for room in rooms:
            if room in content:
                if isinstance(content.get(room, getlink=True), h5py.ExternalLink):
                    raise OSError(f"{path}: {room} lies in another file")
                add(room, content[room])
                content[room].visititems(add)
        for key in filter(None, (*LANGUAGE_NAMES, self.options.language_key)):  # words may stand above them as well
            if key in content.attrs:
                digest.update(repr((key, str(content.attrs[key]))).encode())
            if isinstance(content.get(key), h5py.Dataset):
                add(key, content[key])
        return digest.hexdigest()

    def _check_cameras(self, group: h5py.Group, steps: int, origin: str) -> None:
        """A DamagedDataError where a demonstration has no images as the first one does, or not one for each step."""
        cameras = _cameras(group)
        for key in cameras:
            if len(group[key]) != steps:
                raise DamagedDataError(f"{origin}: {steps} actions, but {len(group[key])} entries of {key!r}")
        if self._has_camera is None:
            file, demo = self.demos[0]
            try:
                self._has_camera = bool(_cameras(open_file(file)["data"][demo]))
            except DAMAGED:
                self._has_camera = False  # it says so itself
        if self._has_camera and not cameras:
            there = {
                key: f"{value.dtype} {value.shape}"
                for key, value in group.get("obs", {}).items()
                if isinstance(value, h5py.Dataset) and (value.ndim > 2 or value.dtype.kind == "O")
            }
            raise DamagedDataError(
                f"{origin}: no colour images (steps, height, width, 3) uint8, as the first demonstration has; in obs "
                f"there are {there or 'none of the kind'}"
            )

    def _expected_dim(self) -> int | None:
        """Dimensions of the actions of the first demonstration, which all others must share."""
        if self._action_dim is None:
            file, demo = self.demos[0]
            try:
                actions = _columns(open_file(file)["data"][demo], action_keys(self.options.action_key, "actions"), "")
                self._action_dim = 0 if actions is None else actions.shape[1]
            except DAMAGED:
                self._action_dim = 0  # the first is damaged and says so itself: nothing to compare with
        return self._action_dim or None

    def _instructions(self, file: Path, group: h5py.Group, steps: int, origin: str) -> str | list[str]:
        if key := self.options.language_key:
            found = _words(group, key, steps, origin)
            if found is None:
                there = sorted({*group, *group.attrs, *group.parent.attrs})
                raise DamagedDataError(f"{origin}: no attribute or data set {key!r}; there are {there}")
            return found
        within = (("problem_info", "language_instruction"), ("ep_meta", "lang"))
        stated: list[Any] = [_words_within(group, attribute, key, origin) for attribute, key in within]
        text = next(filter(None, stated), "")
        for key in LANGUAGE_NAMES if not text else ():
            stated.append(found := _words(group, key, steps, origin))
            if found:
                return found
        if not text and stated.count(None) == len(stated) and file.stem.endswith("_demo"):  # what is empty is said
            text = LIBERO_SCENE.sub("", file.stem).removesuffix("_demo").replace("_", " ")
        return QUOTED.sub(r"\1", text.strip())


def _words(group: h5py.Group, key: str, steps: int, origin: str) -> str | list[str] | None:
    """The text, or one for each step, under a name: an attribute or a data set, of the demonstration before of `data`
    and of the file; None where there is none."""
    for place in (group, group.get("obs"), group.parent, group.file):
        if place is None:
            continue
        found: Any = place.attrs.get(key)
        if found is None and isinstance(place.get(key), h5py.Dataset):
            found = place[key][()]
        if found is None or isinstance(found, h5py.Empty):
            continue
        several = isinstance(found, np.ndarray) and found.ndim == 1 and len({*map(str, found)}) > 1
        if several and abs(len(found) - steps) == 1 and steps > FEW_STEPS:
            raise DamagedDataError(f"{origin}: {steps} actions, but {len(found)} texts of {key!r}, which differ")
        if isinstance(found, np.ndarray) and found.ndim and len(found) == steps > 1:
            return [as_text(text, origin) for text in found]
        return as_text(found, origin)
    return None


def _words_within(group: h5py.Group, attribute: str, key: str, origin: str) -> str | None:
    """The text under a key of an attribute that holds a JSON object, None where there is none."""
    found = group.attrs.get(attribute, group.parent.attrs.get(attribute))
    if found is None or isinstance(found, h5py.Empty):
        return None
    try:
        value = json.loads(as_text(found, origin) or "{}").get(key)
        return None if value is None else as_text(value, origin)
    except (ValueError, AttributeError) as error:
        raise DamagedDataError(f"{origin}: the attribute {attribute} is not a JSON object: {error}") from error


def control_frequency(file: Path) -> float | None:
    """Steps in a second, by the arguments of the simulator that a file holds (`env_args` of robomimic and LIBERO); None
    where they do not say."""
    found = open_file(file)["data"].attrs.get("env_args")
    try:
        hz = float(json.loads(as_text(found, str(file)) or "{}")["env_kwargs"]["control_freq"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return hz if 0 < hz < 1e6 else None  # as `ActionSpec` takes it


def upside_down(file: Path) -> bool:
    """Whether a file says that its images are stored as OpenGL renders them, the lowest row first.

    LIBERO's do: `macros_image_convention` is "opengl"; older ones are known by the task's BDDL file. robomimic turns
    images before it stores them, other recorders (ours too) store them upright or do not say.
    """
    attributes = open_file(file)["data"].attrs
    origin = f"{file}, data"
    convention = attributes.get("macros_image_convention")
    if convention is not None:
        return as_text(convention, origin).strip().lower() == "opengl"
    if str(attributes.get("tag", "")).startswith("libero"):
        return True
    return as_text(attributes.get("bddl_file_name"), origin).strip().endswith(".bddl")


class HDF5Images(CameraImages):
    """Images in a data set (T, H, W, 3) of an HDF5 file; only the path is held, so it travels to workers."""

    def __init__(self, file: Path, key: str, rotate: bool = False, steps: range | None = None):
        self.file, self.key, self.rotate = file, key, rotate
        data = open_file(file)[key]
        if steps is None and (data.dtype != np.uint8 or data.ndim != 4 or data.shape[-1] != 3 or 0 in data.shape[1:]):
            raise DamagedDataError(f"{file}, {key}: expected (T, H, W, 3) uint8, found {data.dtype} {data.shape}")
        self.steps = range(len(data)) if steps is None else steps

    def __len__(self) -> int:
        return len(self.steps)

    def _select(self, steps: slice) -> "HDF5Images":
        return HDF5Images(self.file, self.key, self.rotate, self.steps[steps])

    def _decode(self, step: int) -> np.ndarray:
        try:
            image = open_images(self.file, self.key)[self.steps[step]]
        except DAMAGED as error:
            raise DamagedDataError(
                f"{self.file}, {self.key}, step {self.steps[step]}: cannot be read ({error}): {COPY_AGAIN}"
            ) from error
        return np.ascontiguousarray(image[::-1, ::-1]) if self.rotate else image


@kept_open()
def open_file(path: Path) -> h5py.File:
    return h5py.File(check_data_file(path, "HDF5 file"), "r", rdcc_nbytes=CHUNK_CACHE)


@kept_open(maxsize=OPEN_CAMERAS)
def open_images(path: Path, key: str) -> h5py.Dataset:
    """A handle that is kept, for with it end the decompressed chunks around the frames read last."""
    return open_file(path)[key]


def _demos(file: Path, split: str, masks: set[str]) -> list[str]:
    try:
        content = open_file(file)
        there = list(content)
        groups = content["mask"] if "mask" in content else {}
        known = list(content["data"]) if isinstance(content.get("data"), h5py.Group) else None
        masks |= set(groups)
        demos = known or []
        if split in groups:
            demos = [name.decode() if isinstance(name, bytes) else str(name) for name in groups[split][:]]
        elif split != "all" and (groups or split != "train"):
            demos = []
    except DamagedDataError:
        raise
    except DAMAGED as error:
        raise DamagedDataError(f"{file}: not a readable HDF5 file ({error}): {COPY_AGAIN}") from error
    if known is None:
        raise DamagedDataError(
            f"{file}: no group 'data', in which LIBERO and robomimic keep demonstrations; there are {sorted(there)}. "
            "HDF5 of another layout (ALOHA's: a file an episode) is read by a class of yours, --format MODULE:CLASS "
            "(docs/extending.md has one); or convert it to LeRobot."
        )
    if missing := sorted(set(demos) - set(known)):
        raise DamagedDataError(f"{file}: mask/{split} names {missing[:8]}, which data lacks")
    if twice := [name for name, count in Counter(demos).items() if count > 1]:
        raise DamagedDataError(f"{file}: mask/{split} names {twice[:8]} more than once: write each once")
    return sorted(demos, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])


def _in_no_mask(content: h5py.File) -> int:
    """Demonstrations of a file with masks that are neither to train on nor to hold out, as those recorded after the
    masks were made. Without a mask "train" the others are parts of it that somebody made (robomimic's filter keys)."""
    groups = content.get("mask")
    if not isinstance(groups, h5py.Group) or not len(groups):
        return 0
    known = [name for name in groups if "train" in groups or name in HELD_OUT]
    lists = [groups[name] for name in known]
    listed = [entry for found in lists if isinstance(found, h5py.Dataset) and found.ndim == 1 for entry in found[:]]
    return len({*content["data"]} - {as_text(entry, "mask") for entry in listed})


def _cameras(group: h5py.Group) -> list[str]:
    found = group["obs"].items() if isinstance(group.get("obs"), h5py.Group) else []
    keys = [
        f"obs/{key}"
        for key, value in found
        if isinstance(value, h5py.Dataset)
        and not not_colour(key)
        and value.ndim == 4
        and value.dtype == np.uint8
        and value.shape[-1] == 3
        and 0 not in value.shape[1:]
    ]
    return order_cameras(keys)


def _find(group: h5py.Group, key: str, origin: str) -> h5py.Dataset:
    for candidate in (key, f"obs/{key}"):
        if isinstance(group.get(candidate), h5py.Dataset):
            return group[candidate]
        link = group.get(candidate, getlink=True) if group.get(candidate) is None else None
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            raise DamagedDataError(f"{origin}: {candidate!r} is a link to {link.path!r}, which is not there")
    there = sorted(group) + [f"obs/{k}" for k in group.get("obs", {})]
    raise DamagedDataError(f"{origin}: no key {key!r}; there are {there}")


def _columns(group: h5py.Group, keys: Keys, origin: str) -> np.ndarray | None:
    """The values of one key, or of several side by side (T, D); None without keys."""
    names = key_list(keys)
    arrays = {key: np.asarray(_find(group, key, origin)[()]) for key in names if key is not None}
    if not arrays:
        return None
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf" or not array.ndim:
            raise DamagedDataError(f"{origin}: {key!r} is not numbers for each step but {array.dtype} {array.shape}")
    length = len(next(iter(arrays.values())))
    if any(len(array) != length for array in arrays.values()):
        raise DamagedDataError(f"{origin}: lengths differ: { {key: len(array) for key, array in arrays.items()} }")
    if not length:
        raise DamagedDataError(f"{origin}: the episode has no steps")
    zeros = np.zeros((length, 1), np.float32)
    return np.concatenate([zeros if key is None else arrays[key].reshape(length, -1) for key in names], axis=1)
