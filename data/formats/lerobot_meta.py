"""What the folder `meta` of a LeRobot data set says, v3.0 and v2.x: checked when read, columns found by name."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...cameras_openvla import not_colour, words_of
from ...files_openvla import check_file, read_json
from ...folders import files_below
from ..episode import COPY_AGAIN, DamagedDataError, as_text
from .lerobot_rows import DAMAGED_PARQUET


PANDAS_INDEX = "__index_level_0__"
SUBTASKS = "subtask_index"  # a column that has a table of its own, meta/subtasks.parquet
PART_OF_FILM = ("chunk_index", "file_index", "from_timestamp")


def read_info(file: Path) -> dict[str, Any]:
    """meta/info.json, with everything in it that the reader looks at.

    Raises:
        ValueError: If it is damaged, of another version, or something is missing or of the wrong type.
    """
    info = read_json(file)
    version = str(info.get("codebase_version"))
    if not version.startswith(("v2.", "v3.")):
        raise ValueError(f"{file}: codebase_version {version!r} is not read, only v2.x and v3.x")
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise ValueError(f"{file}: 'features' is {features!r}, expected {{column: {{'dtype': ..., 'shape': [...]}}}}")
    for key, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        sizes = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        if not sizes or not isinstance(feature.get("dtype"), str):
            raise ValueError(
                f"{file}: feature {key!r} is {json.dumps(feature)[:100]}, expected a 'dtype' and a 'shape' of numbers"
            )
    of_video = [key for key, feature in features.items() if feature["dtype"] == "video"]
    expected: dict[str, tuple[type, ...]] = {"data_path": (str,)}
    if of_video:
        expected["video_path"] = (str,)
    if of_video or info.get("fps") is not None:  # without videos it is only what is told of the actions
        expected["fps"] = (int, float)
    if "chunks_size" in info:
        expected["chunks_size"] = (int,)
    for key, kinds in expected.items():
        value: Any = info.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        if not isinstance(value, kinds) or not (number or kinds == (str,)):
            kind = "a path" if kinds == (str,) else "a number above 0"
            raise ValueError(f"{file}: {key!r} is {value!r}, expected {kind}")
    if not isinstance(info.get("splits") or {}, dict):
        raise ValueError(f"{file}: 'splits' is {info['splits']!r}, expected {{name: 'first:end'}}")
    return info


NO = ("false", "0", "none", "no", "null", "")
LENGTHS = (
    "m",
    "mm",
    "cm",
    "meter",
    "meters",
    "metre",
    "metres",
    "millimeter",
    "millimeters",
    "millimetre",
    "millimetres",
)
DEPTH_FORMATS = (
    "gray1",
    "gray3",
    "grayf",
    "depth",
    "mono16",
    "16uc1",
    "32fc1",
    "z16",
    "y16",
)  # of FFmpeg, ROS, RealSense
WHAT = ("modality", "type", "kind", "content", "stream", "sensor", "encoding", "format", "fmt")


def marked_as(feature: dict[str, Any]) -> str | None:
    """What the description of a feature says that its pixels are, where that is something else than colours: see
    `NOT_COLOUR`. Notes stand beside its dtype or in a dict of their own ("info", in old ones "video_info")."""
    for note in (feature, *(part for part in feature.values() if isinstance(part, dict))):
        for key, value in note.items():
            if (note is not feature or key != "dtype") and (kind := _mark(words_of(key), value)):
                return kind
    return None


def _mark(words: list[str], value: Any) -> str | None:
    """What one note says: `is_depth_map: true`, `depth_unit: mm`, `unit: mm`, `modality: depth`, `dtype: uint16`."""
    text, last = str(value).strip().lower(), words[-1] if words else ""
    if isinstance(value, dict | list | tuple) or text in NO:
        return None
    kind = not_colour(" ".join(words))
    of_bits = {"bit", "bits", "color", "colour", "channel"} & {*words}
    number = isinstance(value, int | float) and not isinstance(value, bool) and value != 1
    if kind and not of_bits and not (last == "depth" and number):  # "depth": 3 are channels, or bits
        return kind
    if last in ("unit", "units"):
        return "a depth map" if text in LENGTHS else None
    if last == "dtype":
        return None if text in ("uint8", "u1", "|u1", "image", "video") else "a depth map"
    if last in WHAT:
        return "a depth map" if text.startswith(DEPTH_FORMATS) else not_colour(text)
    return None


def is_colour(key: str, feature: dict[str, Any]) -> bool:
    """Whether a feature is a colour camera: nothing else by its marks, name, format or number of channels.

    A gray camera is not found by itself (one channel is depth or a mask more often), but read when it is named.
    """
    if feature["dtype"] not in ("image", "video") or marked_as(feature) or not_colour(key):
        return False
    notes = [part for part in feature.values() if isinstance(part, dict)]
    single = any(
        (name.endswith("channels") and value == 1) or (name.endswith("pix_fmt") and str(value).startswith("gray"))
        for note in notes
        for name, value in note.items()
    )
    shape = feature["shape"]
    return not single and len(shape) == 3 and 1 not in (shape[0], shape[-1])


def read_episodes(folder: Path, version: str) -> pa.Table:
    """One row for each episode, by episode_index, which is int64, as `length` is where there is one."""
    if version.startswith("v3."):
        files = sorted(file for file in files_below(folder / "meta" / "episodes") if file.suffix == ".parquet")
        if not files:
            raise FileNotFoundError(f"{folder}: no parquet file in meta/episodes")
        where = str(folder / "meta" / "episodes")
        table = _concatenated([_read_table(file, "stats/") for file in files], where)
    else:
        file = folder / "meta" / "episodes.jsonl"
        where, rows = str(file), _read_lines(file, "episode_index", "length")
        table = pa.table(
            {
                "episode_index": [_integer(row["episode_index"], "episode_index", where) for row in rows],
                "length": [_integer(row["length"], "length", where) for row in rows],
                "tasks": [
                    [str(text) for text in row["tasks"]] if isinstance(row.get("tasks"), list) else None for row in rows
                ],
            }
        )
    for column in ("episode_index", "length"):
        if column not in table.column_names:
            if column == "length":
                continue
            raise ValueError(f"{where}: no column {column!r}; there are {table.column_names}")
        numbers = table[column]
        try:
            if numbers.null_count:
                raise ValueError("some are missing")
            numbers = numbers.cast(pa.int64())
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{where}: {column!r} are not integers: {error}") from error
        table = table.set_column(table.column_names.index(column), column, numbers)
    numbers, counts = np.unique(table["episode_index"].to_numpy(), return_counts=True)
    if len(twice := numbers[counts > 1]):
        raise ValueError(f"{where}: episodes {twice[:8].tolist()} stand there more than once")
    return table.sort_by("episode_index").combine_chunks()


def shared_parts(episodes: pa.Table, camera: str, fps: float) -> dict[int, int]:
    """{episode: another one that would show the same frames}: of one video, each episode has a part of its own."""
    columns = ["episode_index", "length", *(f"videos/{camera}/{what}" for what in PART_OF_FILM)]
    if not set(columns) <= set(episodes.column_names):
        return {}
    number, length, chunk, file, start = (episodes[name].to_numpy().astype(np.float64) for name in columns)
    order = np.lexsort((start, file, chunk))
    before, after = order[:-1], order[1:]
    alike = (chunk[before] == chunk[after]) & (file[before] == file[after])
    shared = np.flatnonzero(alike & (start[after] < start[before] + (length[before] - 0.5) / fps))
    pairs = list(zip(number[before[shared]].astype(int).tolist(), number[after[shared]].astype(int).tolist()))
    return {**{first: second for first, second in pairs}, **{second: first for first, second in pairs}}


def read_subtasks(folder: Path) -> dict[int, str]:
    """{subtask_index: text}, with -1 for rows that have none, which is "".

    Raises:
        ValueError: As `read_tasks`, and if there is no such file: the numbers are not those of the tasks.
    """
    file = folder / "meta" / "subtasks.parquet"
    if not file.exists():
        raise ValueError(f"{file} is missing, which has the texts of {SUBTASKS}: copy it, or name another language_key")
    return {-1: ""} | _texts(file, _read_table(file), "subtask")


def read_tasks(folder: Path, version: str) -> dict[int, str] | None:
    """{task_index: text}; None where there is no such file.

    Raises:
        ValueError: If it is damaged, the texts are in no column known by name, or one index has two texts.
    """
    file = folder / "meta" / ("tasks.parquet" if version.startswith("v3.") else "tasks.jsonl")
    if not file.exists():
        return None
    if version.startswith("v3."):
        return _texts(file, _read_table(file), "task")
    rows = _read_lines(file, "task_index", "task")
    return _unique(file, ((row["task_index"], row["task"]) for row in rows), "task")


def _texts(file: Path, table: pa.Table, kind: str) -> dict[int, str]:
    """{number: text} of a table with the column `<kind>_index`; the text is in `kind`, or is pandas' index."""
    text = _text_column(table, kind)
    if f"{kind}_index" not in table.column_names or text is None:
        raise ValueError(
            f"{file}: expected the columns {kind}_index and {kind} (or the text as pandas' index), found "
            f"{table.column_names}"
        )
    return _unique(file, zip(table[f"{kind}_index"].to_pylist(), table[text].to_pylist()), kind)


def _unique(file: Path, pairs: Iterable[tuple[Any, Any]], kind: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    for given, text in pairs:
        index = _integer(given, f"{kind}_index", str(file))
        if not isinstance(text, str | bytes):
            raise ValueError(f"{file}: the text of {kind} {index} is {text!r}")
        if texts.setdefault(index, as_text(text, str(file))) != as_text(text, str(file)):
            raise ValueError(f"{file}: {kind}_index {index} has two texts, {texts[index]!r} and {text!r}")
    return texts


def _text_column(table: pa.Table, kind: str) -> str | None:
    about = table.schema.metadata or {}
    try:
        indices = json.loads(about.get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        indices = []
    for name in (kind, *(name for name in indices if isinstance(name, str)), f"{kind}s", PANDAS_INDEX):
        if name in table.column_names and name != f"{kind}_index":
            return name
    return None


def split_episodes(
    info: dict[str, Any], split: str, numbers: np.ndarray, file: Path
) -> tuple[list[int], int, int | None]:
    """Places in `numbers` (the episodes recorded, ascending) of those in a split, how many episodes of it are missing,
    and the first of them.

    A split is "first:end", or several such parts joined by commas.
    """
    splits = info.get("splits") or {}
    total = info.get("total_episodes")
    total = total if isinstance(total, int) and not isinstance(total, bool) else int(numbers.max(initial=-1)) + 1
    if split == "all" or (split == "train" and not splits):
        return list(range(len(numbers))), *_missing([(0, total)], numbers)
    if split not in splits:
        raise ValueError(f"{file} has no split {split!r}; there are {sorted(splits)} and 'all'")
    chosen = np.zeros(len(numbers), dtype=bool)
    wanted: list[tuple[int, int]] = []
    for part in str(splits[split]).split(","):
        first, colon, end = (text.strip() for text in part.partition(":"))
        if not colon or not first.isdecimal() or not end.isdecimal() or int(first) > int(end):
            raise ValueError(
                f"{file}: split {split!r} is {splits[split]!r}, expected episodes as 'first:end', such as '0:{total}', "
                "several parts joined by commas"
            )
        chosen |= (numbers >= int(first)) & (numbers < int(end))
        wanted.append((int(first), min(int(end), total)))
    return np.flatnonzero(chosen).tolist(), *_missing(wanted, numbers)


def _missing(wanted: list[tuple[int, int]], numbers: np.ndarray) -> tuple[int, int | None]:
    """How many of the wanted episodes, from a number to before another, are not among `numbers`, and the first of them.
    None is listed: a file may claim any number of episodes."""
    count, first, seen = 0, None, 0
    known = np.unique(numbers)
    for begin, end in sorted(wanted):
        begin = max(begin, seen)
        if begin >= end:
            continue
        there = known[(known >= begin) & (known < end)]
        if absent := end - begin - len(there):
            gaps = np.flatnonzero(there != np.arange(begin, begin + len(there)))
            count, first = count + absent, begin + int(gaps[0] if len(gaps) else len(there)) if first is None else first
        seen = end
    return count, first


def in_no_split(info: dict[str, Any], numbers: np.ndarray) -> int:
    """How many of the episodes recorded are in no split, as those that were added without a word in info.json."""
    splits = info.get("splits") or {}
    chosen = np.zeros(len(numbers), dtype=bool)
    for part in ",".join(map(str, splits.values())).split(","):
        first, _, end = (text.strip() for text in part.partition(":"))
        if not first.isdecimal() or not end.isdecimal():
            return 0  # said where that split is read
        chosen |= (numbers >= int(first)) & (numbers < int(end))
    return int((~chosen).sum()) if splits else 0


def fill_path(template: str, what: str, origin: str, **values: Any) -> str:
    """A path of info.json with what an episode says filled in; a DamagedDataError names what the episode lacks."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        if unknown := [name for name in names if name not in values]:
            raise KeyError(f"it asks for {unknown}")
        for name in names:
            value = values[name]
            if value is None or (isinstance(value, float) and not value.is_integer()):
                raise DamagedDataError(f"{origin}: meta/episodes has no {name} of the {what} ({value!r})")
            values[name] = int(value) if isinstance(value, float) else value
        return template.format(**values)
    except DamagedDataError:
        raise
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise DamagedDataError(f"{origin}: the {what}_path of meta/info.json, {template!r}: {error}") from error


def _read_table(file: Path, without: str = "\0") -> pa.Table:
    """A table of meta/, but for columns whose names start with `without`."""
    check_file(file, "parquet file")
    try:
        columns = [name for name in pq.read_schema(file).names if not name.startswith(without)]
        return pq.read_table(file, columns=columns, partitioning=None)
    except DAMAGED_PARQUET as error:
        raise ValueError(f"{file} is no readable parquet file ({error}): {COPY_AGAIN}") from error


def _concatenated(tables: list[pa.Table], where: str) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise ValueError(f"{where}: the files do not have the same columns: {error}") from error


def _read_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each an object with `keys`."""
    check_file(file, "JSON Lines file")
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other ends of lines (U+2028)
    except ValueError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}): {COPY_AGAIN}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number} is no JSON ({error}): {COPY_AGAIN}") from error
        if not isinstance(row, dict) or not set(keys) <= row.keys():
            raise ValueError(f"{file}, line {number}: expected an object with {', '.join(keys)}, found {line[:80]}")
        rows.append(row)
    return rows


def _integer(value: Any, what: str, where: str) -> int:
    integer = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    if not integer or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {what} is {value!r}, expected an integer")
    return int(value)
