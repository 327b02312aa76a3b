"""RLDS: folders written by tensorflow_datasets, read without TensorFlow.

tensorflow_datasets knows the splits and decodes the features in numpy; the record files are read by `tfrecord`.
"""

import bisect
import difflib
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import Error as ProtobufError
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from ...cameras_openvla import not_colour, order_cameras
from ...files_openvla import read_json
from ...options.datasets import Keys, ReaderOptions
from ..dataset import EpisodeDataset, OnError, action_keys, key_list, name_cameras, warn_of_camera
from ..episode import DamagedDataError, Episode, MissingKeyError, as_text, make_episode
from ..images import is_colour_image
from .tfrecord import read_record, record_checksums, scan


LANGUAGE_NAMES = ("language_instruction", "natural_language_instruction", "instruction")
STATE_NAMES = ("observation/state", "observation/proprio", "state", "proprio")
METADATA = "traj_metadata"  # what belongs to the episode and not to a step, in a trajectory
# What tensorflow_datasets raises for a damaged description or record: it has no error of its own
DAMAGED = (DecodeError, ProtobufError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, AssertionError)
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8")

Trajectory = dict[str, Any]


def find_version(path: Path) -> Path | None:
    """The folder with `features.json`: `path` itself, or its newest version."""
    if (path / "features.json").exists():
        return path
    versions = [p.parent for p in path.glob("*/features.json") if p.parent.name.replace(".", "").isdigit()]
    return max(versions, key=lambda p: [int(n) for n in p.name.split(".")]) if versions else None


class RLDSDataset(EpisodeDataset):
    """Episodes of one split of a TFDS folder. Records are found by their headers, so access is random.

    `split` may be anything tensorflow_datasets reads: "train", "train[:95%]", "train+val", "all". `standardize` maps
    the raw trajectory (see `trajectory`) to one with `action` and `language_instruction`, as `STANDARDIZE` of
    `data.oxe.standardize` does; keys and cameras are then looked for in its result. Keys are paths such as
    "observation/image" ("image" finds it too). Words are looked for in the steps, then in what belongs to the episode
    itself ("episode_metadata/language_instruction"). Cameras are colour images; depth, masks and infrared are none by
    themselves, nor is a gray camera: only where they are named. Options: `ReaderOptions`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        standardize: Callable[[Trajectory], Trajectory] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
        **options: Any,
    ):
        self.options = ReaderOptions(**options)
        folder = find_version(Path(path))
        if folder is None:
            raise FileNotFoundError(
                f"no TFDS data set in {path}: expected features.json there or in a version's folder"
            )
        builder = _builder(folder)
        super().__init__(name or builder.info.name, on_error)
        self.folder, self.features = folder, builder.info.features
        if getattr(builder.info.file_format, "value", "tfrecord") != "tfrecord":
            raise ValueError(f"{folder} holds {builder.info.file_format.value} files, expected tfrecord")
        if "steps" not in self.features:
            raise ValueError(f"{folder} is no RLDS data set: its features are {sorted(self.features)}, without 'steps'")
        steps = getattr(self.features["steps"], "feature", None)
        if not isinstance(steps, tfds.features.FeaturesDict):
            raise ValueError(f"{folder / 'features.json'}: 'steps' is no data set of steps with features")
        self.splits = known = sorted(builder.info.splits)
        try:
            parts = builder.info.splits[split].file_instructions
        except (LookupError, ValueError, AssertionError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{folder} has no split {split!r}, only {known}, slices and sums of them: {error}"
            ) from error
        # One entry per file: its path, the first record used and the number of them
        self.parts = [
            (Path(p.filename), p.skip, p.examples_in_shard - p.skip if p.take == -1 else p.take) for p in parts
        ]
        ranges = sorted((path, first, first + count) for path, first, count in self.parts)
        for (path, _, end), (other, begin, _) in pairwise(ranges):
            if path == other and begin < end:
                raise ValueError(
                    f"split={split!r} names episodes twice ({path.name}, record {begin} is one): they would be drawn "
                    "twice as often, and be held out and trained on. Give each once; a mixture has weights."
                )
        self.records_in_file = {Path(p.filename): p.examples_in_shard for p in parts}
        self.ends = np.cumsum([count for _, _, count in self.parts]).tolist()
        self.standardize = standardize
        for key in name_cameras(self.options.cameras or ()).values():
            warn_of_camera(self.name, key)
        self._decoders: dict[str, dict] = {"steps": {}}
        self._is_colour: dict[str, bool] = {}
        _skip_images(steps, self._decoders["steps"], self._is_colour)
        self._kinds_checked = False
        self._scans: dict[Path, tuple[list[int], str | None]] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def runs(self) -> list[range]:
        return [range(end - count, end) for end, (_, _, count) in zip(self.ends, self.parts)]

    def content_files(self) -> dict[str, Path]:
        about = [self.folder / name for name in ("dataset_info.json", "features.json")]
        return {path.name: path for path in (*about, *self.records_in_file)}

    def content_digest(self, path: Path) -> str:
        return record_checksums(path) if path in self.records_in_file else super().content_digest(path)

    def trajectory(self, index: int) -> Trajectory:
        """Episode `index` as stored: a nested dict of arrays with a leading time axis. Strings are object arrays of
        bytes, and so are images, still encoded. What belongs to the episode itself is repeated under
        `traj_metadata`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {self.name}, which has {len(self)}")
        return self._trajectory(*self._locate(int(index) % len(self)))

    def trajectories(self) -> Iterator[Trajectory]:
        return (self.trajectory(index) for index in range(len(self)))

    def _locate(self, index: int) -> tuple[Path, int]:
        part = bisect.bisect_right(self.ends, index)
        path, first, count = self.parts[part]
        return path, first + index - (self.ends[part] - count)

    def _read(self, path: Path, record: int) -> bytes:
        if path not in self._scans:
            try:
                offsets, problem = scan(path)
            except FileNotFoundError as error:
                raise DamagedDataError(f"{path}, record {record}: the file is missing") from error
            except (OSError, ValueError) as error:
                raise DamagedDataError(f"{path}, record {record}: {error}") from error
            expected = self.records_in_file[path]
            if problem is None and len(offsets) != expected:
                problem = f"the file has {len(offsets)} records, dataset_info.json says {expected}"
                if len(offsets) > expected:
                    if self.on_error == "raise":
                        raise DamagedDataError(f"{path}: {problem}")
                    warnings.warn(f"{path}: {problem}; those in excess are left out", RuntimeWarning, stacklevel=4)
            self._scans[path] = offsets, problem
        offsets, problem = self._scans[path]
        if record >= len(offsets):
            raise DamagedDataError(f"{path}, record {record}: {problem}")
        return read_record(path, record, offsets[record])

    def _trajectory(self, path: Path, record: int) -> Trajectory:
        data = self._read(path, record)
        if not self._kinds_checked:  # of one record: all are written alike
            self._check_kinds(data, f"{path}, record {record}")
            self._kinds_checked = True
        try:
            example = self.features.deserialize_example_np(data, decoders=self._decoders)
            steps = list(example.pop("steps"))
        except DAMAGED as error:
            # Names of features are plain text in a record; what tfds says about an absent one does not name it.
            absent = [
                f"steps/{key}" for key in _keys(self.features["steps"].feature) if f"steps/{key}".encode() not in data
            ]
            problem = f"without {absent}" if absent else str(error)
            raise DamagedDataError(f"{path}, record {record}: it does not fit features.json: {problem}") from error
        if not steps:
            raise DamagedDataError(f"{path}, record {record}: the episode has no steps")
        return {**_stack(steps), METADATA: _stack([example] * len(steps))}

    def _check_kinds(self, data: bytes, origin: str) -> None:
        """A DamagedDataError where features.json says whole numbers and a record holds fractions, which would be cut,
        or numbers and it holds bytes."""
        try:
            stored = tf_example_pb2.Example.FromString(data).features.feature
        except DAMAGED:
            return  # said by whoever decodes it
        for key, info in _flatten_info(self.features.get_serialized_info()):
            kind = stored[key].WhichOneof("kind") if key in stored else None
            number = np.dtype(info.np_dtype).kind if info.np_dtype not in (object, str, bytes) else "O"
            cut = kind == "float_list" and number in "iub" and any(value % 1 for value in stored[key].float_list.value)
            if cut or (kind == "bytes_list" and number in "iubf"):
                found = "fractions" if cut else "bytes"
                raise DamagedDataError(
                    f"{origin}: it does not fit features.json, which says {info.np_dtype} of {key!r}: it holds {found}"
                )

    def _load(self, index: int) -> Episode:
        path, record = self._locate(index)
        origin = f"{path}, record {record}"
        trajectory = self._trajectory(path, record)
        if self.standardize:
            try:
                trajectory = self.standardize(trajectory)
            except Exception as error:
                error.add_note(f"while standardizing {origin}")
                raise
        flat = dict(_flatten({k: v for k, v in trajectory.items() if k != METADATA}))
        if self.options.cameras is None:
            colours = [key for key, value in flat.items() if self._is_colour.get(key, _is_image(value))]
            keys = [key for key in colours if not not_colour(key)]
            cameras = name_cameras(order_cameras(keys))
        else:
            cameras = name_cameras(self.options.cameras)
        state_key = self.options.state_key
        if state_key is None:
            state_key = next((n for n in STATE_NAMES if n in flat and flat[n].ndim == 2), [])
        return make_episode(
            actions=_columns(flat, action_keys(self.options.action_key, "action"), origin),
            images={name: flat[_find(flat, key, origin)] for name, key in cameras.items()},
            state=_columns(flat, state_key, origin),
            instructions=self._instructions(flat, dict(_flatten(trajectory.get(METADATA, {}))), origin),
            dataset_name=self.name,
            index=index,
            origin=origin,
        )

    def _instructions(self, flat: dict[str, np.ndarray], of_episode: dict[str, np.ndarray], origin: str) -> Any:
        """One text, or one for each step; "" where there is none."""
        key = self.options.language_key
        if key is None:
            for values, end in ((flat, slice(None)), (of_episode, slice(1))):
                texts = [name for name, value in values.items() if value.dtype.kind in "OSU" and _is_text(value)]
                if found := next((name for known in LANGUAGE_NAMES for name in texts if _last(name) == known), None):
                    return list(values[found]) if end == slice(None) else as_text(values[found][0], origin)
            return ""
        inner = key.removeprefix(f"{METADATA}/")
        if inner == key and (key in flat or f"observation/{key}" in flat):
            return list(flat[_find(flat, key, origin)])
        found = next((name for name in of_episode if name == inner), None)
        found = found or next((name for name in of_episode if name.endswith(f"/{inner}")), None)
        if found is None:
            _find(flat | {f"{METADATA}/{name}": value for name, value in of_episode.items()}, key, origin)
        return as_text(of_episode[str(found)][0], origin)


def _builder(folder: Path) -> Any:
    """What tensorflow_datasets makes of the two files that describe a data set.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged, or does not describe a data set.
    """
    for name in ("dataset_info.json", "features.json"):
        read_json(folder / name)
    try:
        builder = tfds.builder_from_directory(folder)
        if builder.info.features is None:
            raise ValueError("there are no features")
        return builder
    except (*DAMAGED, ImportError, OSError) as error:
        raise ValueError(
            f"{folder}: dataset_info.json and features.json do not describe a data set of tensorflow_datasets "
            f"({type(error).__name__}: {error}): copy them again from where the data set was made"
        ) from error


def _skip_images(feature: Any, decoders: dict, is_colour: dict[str, bool], prefix: str = "") -> None:
    """Ask for the encoded bytes of every image; note which are 8-bit colour images, not depth or masks."""
    for key, inner in feature.items():
        if isinstance(inner, tfds.features.FeaturesDict):
            _skip_images(inner, decoders.setdefault(key, {}), is_colour, f"{prefix}{key}/")
        elif isinstance(inner, tfds.features.Image):
            decoders[key] = tfds.decode.SkipDecoding()
            is_colour[prefix + key] = inner.shape[-1] == 3 and inner.np_dtype == np.uint8


def _flatten_info(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten_info(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _keys(feature: Any, prefix: str = "") -> Iterator[str]:
    for key, inner in feature.items():
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from _keys(inner, f"{prefix}{key}/")
        else:
            yield prefix + key


def _stack(steps: list[Any]) -> Any:
    """Steps to one nested dict of arrays with a leading time axis; ragged and textual values as object arrays."""
    first = steps[0]
    if isinstance(first, dict):
        return {key: _stack([step[key] for step in steps]) for key in first}
    shapes = {np.shape(step) for step in steps}
    if isinstance(first, bytes | str | list) or len(shapes) > 1:
        array = np.empty(len(steps), dtype=object)
        array[:] = steps
        return array
    return np.stack([np.asarray(step) for step in steps])


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, np.asarray(value)


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _is_text(value: np.ndarray) -> bool:
    """Whether strings, or lists and arrays of them, are the values of a feature."""
    first = value.ravel()[0] if value.size else None
    while isinstance(first, np.ndarray | list) and len(first):
        first = first[0]
    return isinstance(first, str | bytes)


def _is_image(value: np.ndarray) -> bool:
    if value.dtype == object:
        first = value[0] if value.ndim == 1 and len(value) else None
        return isinstance(first, bytes) and first.startswith(IMAGE_STARTS) and is_colour_image(first)
    return value.dtype == np.uint8 and value.ndim == 4 and value.shape[-1] == 3


def _find(flat: dict[str, np.ndarray], key: str, origin: str) -> str:
    for candidate in (key, f"observation/{key}"):
        if candidate in flat:
            return candidate
    inner = [name for name in flat if name.startswith(f"{key}/")]
    near = difflib.get_close_matches(key, flat, n=1, cutoff=0.4)
    hint = (
        f" (it has parts: choose from {inner}, several in a list)"
        if inner
        else f" (did you mean {near[0]!r}?)"
        if near
        else ""
    )
    raise MissingKeyError(f"{origin}: no key {key!r}{hint}; there are {sorted(flat)}")


def _columns(flat: dict[str, np.ndarray], keys: Keys, origin: str) -> np.ndarray | None:
    """The values of one key, or of several side by side (T, D); None without keys."""
    names = [None if key is None else _find(flat, key, origin) for key in key_list(keys)]
    arrays = [flat[name] for name in names if name]
    if not arrays:
        return None
    length = len(arrays[0])
    if of_text := [name for name, array in zip(filter(None, names), arrays) if array.size and _is_text(array)]:
        raise DamagedDataError(f"{origin}: {of_text} are texts, expected numbers for each of {length} steps")
    try:
        parts = [
            np.zeros((length, 1), np.float32)
            if name is None
            else np.asarray(flat[name], np.float32).reshape(length, -1)
            for name in names
        ]
    except (TypeError, ValueError) as error:
        raise DamagedDataError(f"{origin}: {names} are not all numbers for each of {length} steps: {error}") from error
    return np.concatenate(parts, axis=1)
