"""Writing LeRobot data sets: the v3.0 layout, images encoded within the parquet files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..episode import EXECUTED, EncodedImages, Episode
from ..images import JPEG_START, check_size, encode_image, size_of_image
from .lerobot_statistics import FeatureStatistics


DATA_FILE_MB, VIDEO_FILE_MB, FILES_IN_CHUNK = 100, 200, 1000  # the defaults of the real library
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
COUNTERS = ("frame_index", "episode_index", "index", "task_index")
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_lerobot(
    episodes: Iterable[Episode],
    folder: Path,
    *,
    fps: float,
    robot_type: str | None = None,
    action_names: Sequence[str] | None = None,
    state_names: Sequence[str] | None = None,
) -> None:
    """Write episodes as a LeRobot v3.0 data set with one split, "train". They are taken one at a time.

    Images that are encoded already are stored as they are, others as PNG. The folder is complete when
    `meta/info.json` is there, which is written last.

    Args:
        fps: Actions in a second. Those of LeRobot itself are whole numbers; others are written as they are.
        action_names, state_names: What the numbers are called; one for each.

    Raises:
        FileExistsError: If the folder holds something.
        ValueError: If there are no episodes, or they differ in cameras, image sizes or dimensions.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder.")
    writer: LeRobotWriter | None = None
    try:
        for episode in map(with_numbers, episodes):
            writer = writer or LeRobotWriter(folder, episode, fps)
            writer.add(episode)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise ValueError(f"No episodes to write to {folder}.")
    writer.finish(robot_type, action_names, state_names)


class LeRobotWriter:
    """The files of a data set while they grow; `first` decides cameras, sizes and dimensions."""

    def __init__(self, folder: Path, first: Episode, fps: float):
        self.folder = folder
        self.fps = int(fps) if float(fps).is_integer() else float(fps)  # 20 and not 20.0, as LeRobot has it
        self.shapes = self._shapes(first)
        self.features = image_features(first) | vector_features(self.shapes)
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.statistics = {key: FeatureStatistics(feature["dtype"]) for key, feature in self.features.items()}
        self._frames = self._bytes = 0
        self._file = -1
        self._parquet: pq.ParquetWriter | None = None

    def _shapes(self, episode: Episode) -> dict[str, tuple[int, ...]]:
        cameras = {image_key(camera): frames[0].shape for camera, frames in episode.images.items()}
        if len(cameras) < len(episode.images):
            raise ValueError(
                f"{episode}: two of its cameras are one column in LeRobot ({', '.join(cameras)}): rename one."
            )
        state = {} if episode.state is None else {"observation.state": episode.state.shape[1:]}
        executed = {} if episode.executed is None else {EXECUTED: episode.executed.shape[1:]}
        return cameras | state | {"action": episode.actions.shape[1:]} | executed

    def add(self, episode: Episode) -> None:
        if (shapes := self._shapes(episode)) != self.shapes:
            raise ValueError(f"{episode}: its shapes are {shapes}, those of the first episode {self.shapes}.")
        columns: dict[str, Any] = {}
        count, number = len(episode), len(self.episodes)
        images = {image_key(camera): encoded(frames) for camera, frames in episode.images.items()}
        for key, frames in images.items():
            for step, data in enumerate(frames):
                check_size(size_of_image(data), self.shapes[key], f"{episode}: {key}, step {step}")
            suffix = "jpg" if frames[0].startswith(JPEG_START) else "png"
            cells = [{"bytes": data, "path": f"frame-{step:06d}.{suffix}"} for step, data in enumerate(frames)]
            columns[key] = pa.array(cells, IMAGE_TYPE)
        texts = episode.step_instructions or (episode.instruction,) * count
        vectors = {"observation.state": episode.state, "action": episode.actions, EXECUTED: episode.executed}
        values: dict[str, np.ndarray] = {
            key: np.asarray(array, np.float32) for key, array in vectors.items() if array is not None
        }
        values["timestamp"] = (np.arange(count) / self.fps).astype(np.float32)
        values["frame_index"] = np.arange(count)
        values["episode_index"] = np.full(count, number)
        values["index"] = np.arange(self._frames, self._frames + count)
        values["task_index"] = np.array([self.tasks.setdefault(text, len(self.tasks)) for text in texts])
        columns |= {key: arrow_column(array) for key, array in values.items()}
        written = sum(len(data) for frames in images.values() for data in frames)
        chunk, file = self._write(pa.table(columns), written)
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(texts)),
            "length": count,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + count,
        }
        for key, statistics in self.statistics.items():
            camera = next((camera for camera in episode.images if image_key(camera) == key), None)
            found = statistics.add(values[key] if camera is None else episode.images[camera])
            row |= {f"stats/{key}/{name}": value for name, value in found.items()}
        self.episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._frames += count

    def _write(self, table: pa.Table, size: int) -> tuple[int, int]:
        """One episode is one row group, in the last file or, where that is full, in a new one."""
        if self._parquet is None or self._bytes + size > DATA_FILE_MB * 2**20:
            self.close()
            self._file, self._bytes = self._file + 1, 0
            path = self.folder / DATA_PATH.format(**self._place())
            path.parent.mkdir(parents=True, exist_ok=True)
            table = table.replace_schema_metadata({"huggingface": json.dumps(self._huggingface())})
            self._parquet = pq.ParquetWriter(path, table.schema, write_page_checksum=True)
        self._parquet.write_table(table.replace_schema_metadata(self._parquet.schema.metadata))
        self._bytes += size
        return tuple(self._place().values())  # type: ignore[return-value]

    def _place(self) -> dict[str, int]:
        return {"chunk_index": self._file // FILES_IN_CHUNK, "file_index": self._file % FILES_IN_CHUNK}

    def _huggingface(self) -> dict[str, Any]:
        """What the `datasets` library wants to know of the columns; without it images stay bytes."""
        features: dict[str, Any] = {}
        for key, feature in self.features.items():
            value: dict[str, Any] = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["dtype"] == "image":
                value = {"_type": "Image"}
            elif key in self.shapes:
                value = {"feature": value, "length": feature["shape"][0], "_type": "List"}
            features[key] = value
        return {"info": {"features": features}}

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None

    def finish(
        self, robot_type: str | None, action_names: Sequence[str] | None, state_names: Sequence[str] | None
    ) -> None:
        """Everything in meta/."""
        named = {"action": action_names, EXECUTED: action_names, "observation.state": state_names}
        for key, names in named.items():
            if names is not None and key in self.features:
                if len(names) != self.features[key]["shape"][0]:
                    raise ValueError(f"{len(names)} names for {key}, which has {self.features[key]['shape'][0]}.")
                self.features[key]["names"] = list(names)
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": len(self.episodes),
            "total_frames": self._frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_IN_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self.features,
        }
        meta = self.folder / "meta"
        (self.folder / EPISODES_PATH).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), self.folder / EPISODES_PATH)
        pq.write_table(tasks_table(list(self.tasks)), meta / "tasks.parquet")
        complete = {key: statistics.complete() for key, statistics in self.statistics.items()}
        (meta / "stats.json").write_text(json.dumps(complete, indent=4))
        (meta / "info.part").write_text(json.dumps(info, indent=4))
        (meta / "info.part").replace(meta / "info.json")


def with_numbers(episode: Episode) -> Episode:
    """Without states of no numbers, as of a simulator that has none: there is no column for them."""
    return replace(episode, state=None) if episode.state is not None and not episode.state.shape[1] else episode


def image_key(camera: str) -> str:
    return camera if camera.startswith("observation.") else f"observation.images.{camera}"


def image_features(episode: Episode) -> dict[str, dict[str, Any]]:
    names = ["height", "width", "channels"]
    shapes = {image_key(camera): list(frames[0].shape) for camera, frames in episode.images.items()}
    return {key: {"dtype": "image", "shape": shape, "names": names} for key, shape in shapes.items()}


def vector_features(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    vectors = {key: shape for key, shape in shapes.items() if len(shape) == 1}
    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "float32", "shape": list(shape), "names": None} for key, shape in vectors.items()
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    return features | {key: {"dtype": "int64", "shape": [1], "names": None} for key in COUNTERS}


def encoded(frames: Sequence[np.ndarray]) -> list[bytes]:
    if isinstance(frames, EncodedImages):
        return [bytes(data) for data in frames.encoded]
    return [encode_image(frame) for frame in frames]


def arrow_column(values: np.ndarray) -> pa.Array:
    """(T,) as it is; (T, D) as lists of the fixed length D."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def tasks_table(tasks: list[str]) -> pa.Table:
    """The table of pandas that the real library keeps: its index is the text of a task."""
    index = "__index_level_0__"
    number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    text = {"name": None, "field_name": index, "pandas_type": "object", "numpy_type": "str"}
    title = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "str"}
    about = {
        "index_columns": [index],
        "column_indexes": [title | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [number | {"metadata": None}, text | {"metadata": None}],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.large_string())})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})
