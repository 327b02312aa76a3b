"""LeRobot data sets, v3.0 and v2.x: parquet tables with videos or images beside or inside them."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .dataset import Cameras, EpisodeDataset, Keys, OnError, key_list, name_cameras
from .episode import DamagedDataError, EncodedFrames, Episode, Frames, make_episode, order_cameras
from .handles import kept_open
from .video import open_video


ACTION_NAMES = ("action", "actions")
STATE_NAMES = ("observation.state", "state")


class LeRobotDataset(EpisodeDataset):
    """Episodes of a LeRobot folder. Access is random, to single frames of videos as well.

    `split` is one of `meta/info.json` ("train"), or "all". The instruction comes from the tasks table; `language_key`
    names a text column instead. Keys are columns ("image" finds "observation.images.image"); a list of keys is
    concatenated.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        cameras: Cameras = None,
        action_key: Keys = None,
        state_key: Keys = None,
        language_key: str | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ):
        self.folder = Path(path)
        info_file = self.folder / "meta" / "info.json"
        if not info_file.exists():
            raise FileNotFoundError(f"no LeRobot data set in {path}: expected meta/info.json there")
        super().__init__(name or self.folder.resolve().name, on_error)
        self.info: dict[str, Any] = json.loads(info_file.read_text())
        version = str(self.info.get("codebase_version"))
        if not version.startswith(("v2.", "v3.")):
            raise ValueError(f"{info_file}: codebase_version {version!r} is not read, only v2.x and v3.x")
        self.features: dict[str, dict] = self.info["features"]
        self.splits = sorted(self.info.get("splits") or ["train"])
        if version.startswith("v3."):
            self._episodes, self._tasks = _read_tables(self.folder)
        else:
            self._episodes, self._tasks = _read_json_lines(self.folder)
        self._rows = _split_rows(self._episodes, self.info.get("splits", {}), split, info_file)
        of_images = [key for key, feature in self.features.items() if _is_colour(feature)]
        self.cameras = {
            name: self._key(key)
            for name, key in name_cameras(order_cameras(of_images) if cameras is None else cameras).items()
        }
        default_action = next((key for key in ACTION_NAMES if key in self.features), ACTION_NAMES[0])
        default_state = next((key for key in STATE_NAMES if key in self.features), None)
        self.action_keys = [self._key(key) for key in key_list(action_key or default_action)]
        state_keys = key_list(state_key if state_key is not None else default_state)
        self.state_keys = [] if state_keys == [None] else [key and self._key(key) for key in state_keys]
        self.language_key = language_key and self._key(language_key)

    def _key(self, key: str | None) -> str:
        for candidate in (key, f"observation.{key}", f"observation.images.{key}"):
            if candidate in self.features:
                return str(candidate)
        near = difflib.get_close_matches(str(key), self.features, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise KeyError(f"{self.folder} has no feature {key!r}; {hint}there are {sorted(self.features)}")

    def __len__(self) -> int:
        return len(self._rows)

    def content_files(self) -> dict[str, Path]:
        tables = [path for room in ("meta", "data") for path in (self.folder / room).rglob("*")]
        kinds = (".parquet", ".jsonl")
        found = [path for path in tables if path.suffix in kinds and path.name != "episodes_stats.jsonl"]
        return {path.relative_to(self.folder).as_posix(): path for path in [self.folder / "meta/info.json", *found]}

    def _load(self, index: int) -> Episode:
        row = self._episodes.slice(self._rows[index], 1).to_pylist()[0]
        number = row["episode_index"]
        path = self.folder / self.info["data_path"].format(
            episode_chunk=number // self.info.get("chunks_size", 1000),
            episode_index=number,
            chunk_index=row.get("data/chunk_index"),
            file_index=row.get("data/file_index"),
        )
        source = f"{path}, episode {number}"
        of_images = [key for key in self.cameras.values() if self.features[key]["dtype"] == "image"]
        wanted = {*self.action_keys, *filter(None, self.state_keys), *of_images, "timestamp", "episode_index"}
        wanted.add(self.language_key or "task_index")
        table = _read_episode(path, number, sorted(wanted), source)
        if table.num_rows != row.get("length", table.num_rows):
            raise DamagedDataError(f"{source}: {table.num_rows} rows, meta/episodes says {row['length']}")
        images: dict[str, Frames] = {}
        for name, key in self.cameras.items():
            if key in of_images:
                images[name] = EncodedFrames(self._encoded(table[key], f"{source}, {key}"), f"{source}, {key}")
            else:
                start = row.get(f"videos/{key}/from_timestamp") or 0.0
                times = start + table["timestamp"].to_numpy().astype(np.float64)
                images[name] = VideoFrames(self._video_path(row, key), times)
        return make_episode(
            actions=self._columns(table, self.action_keys, source),
            images=images,
            state=self._columns(table, self.state_keys, source) if self.state_keys else None,
            instructions=self._instructions(table, source),
            dataset_name=self.name,
            index=index,
            source=source,
            action_dim=self._declared_dim(self.action_keys),
        )

    def _video_path(self, row: dict[str, Any], key: str) -> Path:
        number = row["episode_index"]
        return self.folder / self.info["video_path"].format(
            video_key=key,
            episode_chunk=number // self.info.get("chunks_size", 1000),
            episode_index=number,
            chunk_index=row.get(f"videos/{key}/chunk_index"),
            file_index=row.get(f"videos/{key}/file_index"),
        )

    def _declared_dim(self, keys: list[str]) -> int:
        return sum(int(np.prod(self.features[key]["shape"])) for key in keys)

    def _columns(self, table: pa.Table, keys: Sequence[str | None], source: str) -> np.ndarray:
        parts = []
        for key in keys:
            try:
                values = np.array(table[key].to_pylist(), np.float32) if key else np.zeros(table.num_rows, np.float32)
            except (TypeError, ValueError) as error:
                raise DamagedDataError(
                    f"{source}: {key!r} is not numbers of one length in every row: {error}"
                ) from error
            parts.append(values.reshape(table.num_rows, -1))
        return np.concatenate(parts, axis=1)

    def _instructions(self, table: pa.Table, source: str) -> list[str]:
        if self.language_key:
            return [text or "" for text in table[self.language_key].to_pylist()]
        tasks = table["task_index"].to_pylist()
        if missing := set(tasks) - self._tasks.keys():
            raise DamagedDataError(f"{source}: task_index {sorted(missing)} is not in the tasks table")
        return [self._tasks[task] for task in tasks]

    def _encoded(self, column: pa.ChunkedArray, source: str) -> list[bytes]:
        images = []
        for step, cell in enumerate(column.to_pylist()):
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if data is None and path and (self.folder / path).exists():
                data = (self.folder / path).read_bytes()
            if not data:
                raise DamagedDataError(f"{source}: no image at step {step}" + (f" ({path} is missing)" if path else ""))
            images.append(data)
        return images


class VideoFrames(Frames):
    """Frames of a video file at the given times (T,), in seconds. Holds no pixels."""

    def __init__(self, path: Path, times: np.ndarray):
        self.path, self.times = path, times
        if not path.exists():
            raise DamagedDataError(f"{path}: the video is missing")

    def __len__(self) -> int:
        return len(self.times)

    def _select(self, steps: slice) -> "VideoFrames":
        return VideoFrames(self.path, self.times[steps].copy())

    def _decode(self, step: int) -> np.ndarray:
        return open_video(self.path).frame_at(float(self.times[step]))


def _is_colour(feature: dict[str, Any]) -> bool:
    depth = (feature.get("info") or {}).get("video.is_depth_map") or 1 in (feature["shape"][0], feature["shape"][-1])
    return feature["dtype"] in ("image", "video") and not depth


def _read_tables(folder: Path) -> tuple[pa.Table, dict[int, str]]:
    """The episodes table and the tasks {index: text} of v3."""
    files = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}: no parquet file in meta/episodes")
    tables = []
    for file in files:
        columns = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        tables.append(pq.read_table(file, columns=columns, partitioning=None))
    tasks = pq.read_table(folder / "meta" / "tasks.parquet").to_pylist()
    texts = {row["task_index"]: next(v for k, v in row.items() if k != "task_index") for row in tasks}
    return pa.concat_tables(tables, promote_options="default").sort_by("episode_index").combine_chunks(), texts


def _read_json_lines(folder: Path) -> tuple[pa.Table, dict[int, str]]:
    """The same of v2."""

    def rows(name: str) -> list[dict]:
        lines = (folder / "meta" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    episodes = [{key: row[key] for key in ("episode_index", "length")} for row in rows("episodes.jsonl")]
    return pa.Table.from_pylist(episodes), {row["task_index"]: row["task"] for row in rows("tasks.jsonl")}


def _split_rows(episodes: pa.Table, splits: dict[str, str], split: str, info_file: Path) -> range:
    if split == "all" or (split == "train" and not splits):
        return range(episodes.num_rows)
    if split not in splits:
        raise ValueError(f"{info_file} has no split {split!r}; there are {sorted(splits)} and 'all'")
    start, stop = (int(part) for part in splits[split].split(":"))
    return range(start, min(stop, episodes.num_rows))


def _read_episode(path: Path, number: int, columns: list[str], source: str) -> pa.Table:
    """The rows of one episode: only row groups that may hold it are read."""
    try:
        file = _open_parquet(path)
        if missing := set(columns) - set(file.schema_arrow.names):
            raise DamagedDataError(f"{source}: no column {sorted(missing)}; there are {file.schema_arrow.names}")
        leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        place = leaves.index("episode_index")
        groups = []
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(place).statistics
            if not (statistics and statistics.has_min_max) or statistics.min <= number <= statistics.max:
                groups.append(group)
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DamagedDataError(f"{source}: cannot be read: {error}") from error
    return table.filter(pc.equal(table["episode_index"], number))


@kept_open()
def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path)
