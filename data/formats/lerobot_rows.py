"""The rows of an episode of a LeRobot data set: read, put in order, their clock checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..episode import COPY_AGAIN, DamagedDataError, check_data_file
from .handles import kept_open


# What a damaged file makes pyarrow raise: its own errors, and Python's for a footer that says something impossible
DAMAGED_PARQUET = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError)


def read_rows(path: Path, episode: int, wanted: set[str], optional: set[str], origin: str) -> pa.Table:
    """The rows of one episode by increasing frame_index, where there is one, with the columns `wanted` and those of
    `optional` that there are. Only row groups that may hold it are read."""
    with _damage(origin):
        file = _open_parquet(path)
        there = file.schema_arrow.names
    if missing := wanted - set(there):
        raise DamagedDataError(f"{origin}: no column {sorted(missing)}; there are {there}")
    with _damage(origin):
        leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        place = leaves.index("episode_index")
        groups = []
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(place).statistics
            if not (statistics and statistics.has_min_max) or statistics.min <= episode <= statistics.max:
                groups.append(group)
        columns = sorted(wanted | (optional & set(there)))
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
        table = table.filter(pc.equal(table["episode_index"], episode))
    return _in_order(table, origin)


def column_names(path: Path) -> list[str]:
    """The columns of a table; none where it cannot be read, which is said when an episode is."""
    try:
        return _open_parquet(path).schema_arrow.names
    except DAMAGED_PARQUET:
        return []


def time_stamps(table: pa.Table, fps: float | None, tolerance: float, origin: str) -> np.ndarray:
    """(T,) seconds since the episode began, which must be frame_index / fps. Episodes without videos may have none, and
    no fps: then numbers of frames are all there is.

    LeRobot writes that, and compares what it decodes with the time stamps (`check_timestamps_sync`; `tolerance_s` of
    its data sets); here it is one rule for every row. Without frame_index rows count from 0.
    """
    frames = np.arange(table.num_rows)
    if "frame_index" in table.column_names:
        frames = _numbers(table, "frame_index", origin).astype(np.int64)
        if len(gaps := np.flatnonzero(np.diff(frames) != 1)):
            row = int(gaps[0])
            raise DamagedDataError(
                f"{origin}, row {row + 1}: frame_index goes from {frames[row]} to {frames[row + 1]}; rows between them "
                "are missing"
            )
    if fps is None or "timestamp" not in table.column_names:
        return frames / (fps or 1.0)
    stamps = _numbers(table, "timestamp", origin)
    rounding = np.spacing(np.abs(stamps).astype(np.float32)).astype(np.float64)  # they are stored as float32
    wrong = np.flatnonzero(~(np.abs(stamps - frames / fps) <= tolerance + rounding))
    if len(wrong):
        row = int(wrong[0])
        raise DamagedDataError(
            f"{origin}, row {row}: its time stamp is {stamps[row]:.4f} s, but frame {frames[row]} of {fps:g} a second "
            f"is at {frames[row] / fps:.4f} s: videos show what the time stamps say, which is another moment. "
            f"Write frame_index / fps, correct fps in meta/info.json, or allow more than {tolerance:g} s (tolerance_s)"
        )
    return stamps


def _in_order(table: pa.Table, origin: str) -> pa.Table:
    if "frame_index" not in table.column_names:
        return table
    frames = _numbers(table, "frame_index", origin)
    if (np.diff(frames) > 0).all():
        return table
    order = np.argsort(frames, kind="stable")
    if len(twice := np.flatnonzero(np.diff(frames[order]) == 0)):
        row = int(order[twice[0] + 1])
        raise DamagedDataError(f"{origin}, row {row}: frame_index {frames[row]:.0f} stands there twice")
    return table.take(order)


def _numbers(table: pa.Table, column: str, origin: str) -> np.ndarray:
    """(T,) float64 of a column with one finite number in each row."""
    try:
        values = np.array(table[column].to_pylist(), np.float64).reshape(table.num_rows)
    except (TypeError, ValueError) as error:
        raise DamagedDataError(f"{origin}: {column} is not one number in each row: {error}") from error
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        raise DamagedDataError(f"{origin}, row {wrong[0]}: {column} is {values[wrong[0]]}")
    return values


@contextmanager
def _damage(origin: str) -> Iterator[None]:
    try:
        yield
    except DamagedDataError as error:
        raise DamagedDataError(f"{origin}: {error}") from error
    except DAMAGED_PARQUET as error:
        raise DamagedDataError(f"{origin}: cannot be read ({error}): {COPY_AGAIN}") from error


@kept_open()
def _open_parquet(path: Path) -> pq.ParquetFile:
    # Pages that were written with checksums (ours are) are compared with them.
    return pq.ParquetFile(check_data_file(path, "parquet file"), page_checksum_verification=True)
