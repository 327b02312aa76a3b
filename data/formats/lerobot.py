"""LeRobot data sets, v3.0 and v2.x: parquet tables with videos or images beside or inside them."""

import difflib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...cameras_openvla import order_cameras
from ...folders import files_below
from ...options.datasets import LeRobotOptions
from ...prompts_openvla import plain_text
from ..dataset import EpisodeDataset, OnError, action_keys, key_list, name_cameras, warn_of_camera
from ..dimensions import dimension_names
from ..episode import (
    EXECUTED,
    CameraImages,
    DamagedDataError,
    EncodedImages,
    Episode,
    as_text,
    check_data_file,
    make_episode,
)
from .lerobot_meta import (
    SUBTASKS,
    fill_path,
    in_no_split,
    is_colour,
    marked_as,
    read_episodes,
    read_info,
    read_subtasks,
    read_tasks,
    shared_parts,
    split_episodes,
)
from .lerobot_rows import column_names, read_rows, time_stamps
from .video import TOLERANCE, VideoImages, open_video


ACTION_NAMES = ("action", "actions")
STATE_NAMES = ("observation.state", "state")


class LeRobotDataset(EpisodeDataset):
    """Episodes of a LeRobot folder. Access is random, to single frames of videos as well.

    `split` is one of `meta/info.json` ("train"), or "all". The instruction comes from the tasks table; `language_key`
    names a column instead: of texts, of numbers in the tasks table (subtask_index: in that of subtasks), or of the
    episodes table. Keys are columns ("image"
    finds "observation.images.image").

    Rows are those of increasing frame_index. With videos, a row shows the frame of its time stamp, and both must lie
    within `tolerance_s` (seconds) of frame_index / fps, as in LeRobot: anything else is a DamagedDataError that names
    episode and row. Depth maps are never taken for cameras; gray ones, masks and infrared only where they are named,
    with a warning. Options: `LeRobotOptions`.
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
        given = LeRobotOptions(**options)
        self.folder = Path(path)
        info_file = self.folder / "meta" / "info.json"
        if not info_file.exists():
            raise FileNotFoundError(f"no LeRobot data set in {path}: expected meta/info.json there")
        super().__init__(name or self.folder.resolve().name, on_error)
        self.info: dict[str, Any] = read_info(info_file)
        version = str(self.info["codebase_version"])
        self.of_v3 = version.startswith("v3.")
        self.features: dict[str, dict] = self.info["features"]
        self.splits = sorted(self.info.get("splits") or ["train"])
        self._episodes, self._tasks = read_episodes(self.folder, version), read_tasks(self.folder, version)
        numbers = self._episodes["episode_index"].to_numpy()
        self._rows, missing, first_missing = split_episodes(self.info, split, numbers, info_file)
        self.in_no_split = in_no_split(self.info, numbers)
        if missing:
            problem = (
                f"{self.folder}: meta/episodes lacks {missing} of the episodes of meta/info.json, the first is "
                f"{first_missing}: copy meta/ again, correct total_episodes and splits, or skip them (on_error: skip)"
            )
            if on_error == "raise":
                raise ValueError(problem)
            self._count(DamagedDataError(problem))
        of_images = [key for key, feature in self.features.items() if is_colour(key, feature)]
        self.cameras = {
            name: self._camera(key)
            for name, key in name_cameras(order_cameras(of_images) if given.cameras is None else given.cameras).items()
        }
        # Cameras that are not asked for count as well: statistics, which look at no image, find a wrong clock.
        seen = {*of_images, *self.cameras.values()}
        self._of_video = any(self.features[key]["dtype"] == "video" for key in seen)
        self.tolerance_s = TOLERANCE if given.tolerance_s is None else given.tolerance_s
        self._shared: dict[str, dict[int, int]] = {}  # of each camera, see `shared_parts`
        if self._of_video and not 0 < self.tolerance_s < 0.5 / self.info["fps"]:
            raise ValueError(
                f"tolerance_s={self.tolerance_s}: expected seconds above 0 and below half a frame, which is "
                f"{0.5 / self.info['fps']:.3g} s at the {self.info['fps']} frames a second of {info_file}"
            )
        default_action = next((key for key in ACTION_NAMES if key in self.features), ACTION_NAMES[0])
        default_state = next((key for key in STATE_NAMES if key in self.features), None)
        self.action_keys = [key and self._key(key) for key in action_keys(given.action_key, default_action)]
        state_keys = key_list(default_state if given.state_key is None else given.state_key)
        self.state_keys = [key and self._key(key) for key in state_keys] if any(state_keys) else []
        self.language_key = given.language_key
        if self.language_key and self.language_key not in self._episodes.column_names:
            self.language_key = self._key(self.language_key, undeclared=True)
        self._tasks_differ = False  # said already
        if self.language_key == SUBTASKS:
            self._tasks = read_subtasks(self.folder)
        self.hz = float(self.info["fps"]) if self.info.get("fps") is not None else None
        self.action_names = dimension_names(self.features, self.action_keys)
        self.state_names = dimension_names(self.features, self.state_keys)

    def _key(self, key: str, undeclared: bool = False) -> str:
        for candidate in (key, f"observation.{key}", f"observation.images.{key}"):
            if candidate in self.features:
                return candidate
        if undeclared and len(self) and key in column_names(self._data_path(self._row(0))):
            return key
        near = difflib.get_close_matches(str(key), self.features, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise KeyError(f"{self.folder} has no feature {key!r}; {hint}there are {sorted(self.features)}")

    def _camera(self, key: str) -> str:
        """A camera that is to be read: not one that is marked as depth, and none of colours only with a warning."""
        key = self._key(key)
        feature = self.features[key]
        kind = marked_as(feature)
        if feature["dtype"] not in ("image", "video") or kind == "a depth map":
            found = kind if feature["dtype"] in ("image", "video") else feature["dtype"]
            there = [name for name, other in self.features.items() if is_colour(name, other)]
            raise ValueError(f"{self.folder}: {key!r} is {found} and no colour camera; there are {there}")
        if not is_colour(key, feature):
            warn_of_camera(self.name, key, kind)
        return key

    def __len__(self) -> int:
        return len(self._rows)

    def members(self) -> list[int]:
        return self._rows

    def check_files(self) -> None:
        of_video = [key for key in self.cameras.values() if self.features[key]["dtype"] == "video"]
        if not of_video or self.on_error == "skip":
            return
        rows = self._episodes.take(self._rows).to_pylist()
        paths = list(dict.fromkeys(self._video_path(row, key) for row in rows for key in of_video))
        if missing := [path for path in paths if not path.exists()]:
            raise DamagedDataError(
                f"{missing[0]}: the video is missing, as are {len(missing) - 1} others of {len(paths)}: copy them "
                "again, or leave their episodes out (on_error='skip')"
            )

    def content_files(self) -> dict[str, Path]:
        rooms = dict.fromkeys(("meta", "data", os.path.dirname(self.info["data_path"].partition("{")[0])))
        tables = [path for room in rooms for path in files_below(self.folder / room)]
        kinds = (".parquet", ".jsonl")
        found = [path for path in tables if path.suffix in kinds and path.name != "episodes_stats.jsonl"]
        every = [self.folder / "meta/info.json", *found]
        return {Path(os.path.relpath(path, self.folder)).as_posix(): path for path in every}

    def _row(self, index: int) -> dict[str, Any]:
        return self._episodes.slice(self._rows[index], 1).to_pylist()[0]

    def _data_path(self, row: dict[str, Any]) -> Path:
        return self._path(row, "data", "data", self.info["data_path"])

    def _path(self, row: dict[str, Any], what: str, prefix: str, template: str, **more: str) -> Path:
        number = row["episode_index"]
        return self.folder / fill_path(
            template,
            what,
            f"{self.folder}, episode {number}",
            episode_chunk=number // self.info.get("chunks_size", 1000),
            episode_index=number,
            chunk_index=row.get(f"{prefix}/chunk_index"),
            file_index=row.get(f"{prefix}/file_index"),
            **more,
        )

    def _video_path(self, row: dict[str, Any], key: str) -> Path:
        return self._path(row, "video", f"videos/{key}", self.info["video_path"], video_key=key)

    def _load(self, index: int) -> Episode:
        row = self._row(index)
        number, path = row["episode_index"], self._data_path(row)
        origin = f"{path}, episode {number}"
        of_images = [key for key in self.cameras.values() if self.features[key]["dtype"] == "image"]
        wanted = {*filter(None, self.action_keys), *filter(None, self.state_keys), *of_images, "episode_index"}
        optional = {"frame_index"}
        executed = [EXECUTED] if self.action_keys == ["action"] and EXECUTED in self.features else []
        wanted.update(executed)
        (wanted if self._of_video else optional).add("timestamp")
        if self.language_key is None:
            (optional if len(row.get("tasks") or []) == 1 else wanted).add("task_index")
        elif self.language_key not in row:
            wanted.add(self.language_key)
        table = read_rows(path, number, wanted, optional, origin)
        if table.num_rows != row.get("length", table.num_rows):
            raise DamagedDataError(f"{origin}: {table.num_rows} rows, meta/episodes says {row['length']}")
        times = time_stamps(table, self.info.get("fps"), self.tolerance_s, origin)
        images: dict[str, CameraImages] = {}
        for name, key in self.cameras.items():
            if key in of_images:
                images[name] = EncodedImages(self._encoded(table[key], f"{origin}, {key}"), f"{origin}, {key}")
            else:
                images[name] = self._video(row, key, times, origin)
        return make_episode(
            actions=self._columns(table, self.action_keys, origin),
            images=images,
            state=self._columns(table, self.state_keys, origin) if self.state_keys else None,
            instructions=self._instructions(row, table, origin),
            dataset_name=self.name,
            index=index,
            origin=origin,
            action_dim=self._declared_dim(self.action_keys),
            executed=self._columns(table, executed, origin) if executed else None,
        )

    def _video(self, row: dict[str, Any], key: str, times: np.ndarray, origin: str) -> VideoImages:
        path = self._video_path(row, key)
        origin = f"{origin}, {key}"
        start = row.get(f"videos/{key}/from_timestamp")
        if self.of_v3 and not (isinstance(start, int | float) and start >= 0):
            raise DamagedDataError(
                f"{origin}: meta/episodes has no videos/{key}/from_timestamp ({start!r}), the second of {path} at "
                "which the episode begins"
            )
        if self.of_v3 and key not in self._shared:
            self._shared[key] = shared_parts(self._episodes, key, self.info["fps"])
        other = self._shared.get(key, {}).get(row["episode_index"])
        if other is not None:
            raise DamagedDataError(
                f"{origin}: by meta/episodes (videos/{key}/from_timestamp, {start:.3f} s here) it would show frames of "
                f"episode {other} in {path}: correct where each episode begins"
            )
        times = (start or 0.0) + times
        if not path.exists():
            raise DamagedDataError(f"{path}: the video is missing")
        video, half = open_video(path), 0.5 / self.info["fps"]
        recorded = times[-1] if len(times) else 0.0
        part, within = f"videos/{key}/to_timestamp", recorded
        if abs(video.rate / self.info["fps"] - 1) > 0.01:  # then a video that is too short is so for all its episodes
            within = max(recorded, self._recorded_end(row, key) - 2 * half)
        for last, what, end in (
            (recorded, f"meta/episodes ({part})", row.get(part)),
            (within, f"{path}, with {video.rate:.4g} frames a second,", video.end),
        ):
            if isinstance(end, int | float) and last > end - half:
                raise DamagedDataError(
                    f"{origin}, row {len(times) - 1}: the images recorded go to {last:.3f} s, but {what} ends at "
                    f"{end:.3f} s: they do not belong together (fps in meta/info.json is {self.info['fps']})"
                )
        return VideoImages(path, times, origin, self.tolerance_s)

    def _recorded_end(self, row: dict[str, Any], key: str) -> float:
        """Seconds at which the last episode of a video ends, by the lengths in meta/episodes."""
        place = [f"videos/{key}/{part}_index" for part in ("chunk", "file")]
        start = f"videos/{key}/from_timestamp"
        if not self.of_v3 or not {*place, start, "length"} <= set(self._episodes.column_names):
            return 0.0
        table = self._episodes.select([*place, start, "length"]).to_pylist()
        beside = [other for other in table if all(other[part] == row[part] for part in place)]
        return max((other[start] or 0.0) + other["length"] / self.info["fps"] for other in beside)

    def _declared_dim(self, keys: Sequence[str | None]) -> int:
        return sum(int(np.prod(self.features[key]["shape"])) if key else 1 for key in keys)

    def _columns(self, table: pa.Table, keys: Sequence[str | None], origin: str) -> np.ndarray:
        parts = []
        for key in keys:
            try:
                values = np.array(table[key].to_pylist(), np.float32) if key else np.zeros(table.num_rows, np.float32)
            except (TypeError, ValueError) as error:
                raise DamagedDataError(
                    f"{origin}: {key!r} is not numbers of one length in every row: {error}"
                ) from error
            parts.append(values.reshape(table.num_rows, -1) if table.num_rows else np.empty((0, 1), np.float32))
        return np.concatenate(parts, axis=1)

    def _instructions(self, row: dict[str, Any], table: pa.Table, origin: str) -> str | list[str]:
        key = self.language_key
        if key and key not in table.column_names:
            return as_text(row[key], origin)
        if key is None and ("task_index" not in table.column_names or self._tasks is None):
            if len(row.get("tasks") or []) == 1:
                return as_text(row["tasks"], origin)
            file = "tasks.parquet" if self.of_v3 else "tasks.jsonl"
            raise DamagedDataError(
                f"{origin}: no meta/{file}, which has the texts of its tasks; copy it again, or name a column with "
                "language_key"
            )
        values = table[key or "task_index"].to_pylist()
        if key and not pa.types.is_integer(table[key].type):
            return [as_text(value, origin) for value in values]
        tasks = self._tasks or {}
        if missing := set(values) - tasks.keys():
            listed = sorted(missing, key=str)
            raise DamagedDataError(
                f"{origin}: {key or 'task_index'} {listed} is not in the {'sub' if key == SUBTASKS else ''}tasks table"
            )
        texts = [tasks[task] for task in values]
        if key is None:
            self._compare_tasks(row, texts, origin)
        return texts

    def _compare_tasks(self, row: dict[str, Any], texts: Sequence[str], origin: str) -> None:
        """Warn once where the words of an episode by the tasks table are not those that stand beside the episode: of
        recordings that were joined, numbers of tasks may still be those of the parts."""
        said = row.get("tasks")
        if self._tasks_differ or not isinstance(said, list) or not all(isinstance(text, str) for text in said):
            return
        other = {*map(plain_text, texts)} - {*map(plain_text, said)}
        self._tasks_differ = bool(said and other)
        if self._tasks_differ:
            warnings.warn(
                f"{origin}: its task is {min(other)!r:.100} by task_index and the tasks table, which is what is read, "
                f"and {said[0]!r:.100} by meta/episodes. Where recordings were joined, task_index may be that of "
                "another one: correct it, or name a column with language_key (--language-key tasks reads those of "
                "meta/episodes).",
                UserWarning,
                stacklevel=4,
            )

    def _encoded(self, column: pa.ChunkedArray, origin: str) -> list[bytes]:
        images = []
        for step, cell in enumerate(column.to_pylist()):
            cell = {"path": cell} if isinstance(cell, str) else cell
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if data is None and path and os.path.exists(self.folder / path):  # not there: too long for a name, as well
                data = check_data_file(self.folder / path, "image").read_bytes()
            if not data or not isinstance(data, bytes):
                raise DamagedDataError(
                    f"{origin}: no image at step {step}" + (f" ({str(path):.200} is missing)" if path else "")
                )
            images.append(data)
        return images
