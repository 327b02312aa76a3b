"""TFRecord files: length (uint64), its checksum, the record, its checksum; checksums are masked CRC-32C, all
little-endian.

Format: TensorFlow's guide "TFRecord and tf.train.Example", section "TFRecords format details".
"""

import hashlib
import os
import struct
from pathlib import Path

import google_crc32c

from ...files_openvla import check_file
from ..episode import DamagedDataError


HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan(path: Path) -> tuple[list[int], str | None]:
    """Where each record starts, and why the file cannot be followed to its end (None if it can). Reads headers only.

    Raises FileNotFoundError, or ValueError for an empty file and a Git LFS pointer.
    """
    offsets: list[int] = []
    with open(check_file(path, "TFRecord file"), "rb") as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            file.seek(position)
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                return offsets, f"the file ends within the header of record {len(offsets)}"
            length, checksum = HEADER.unpack(header)
            if checksum != masked_crc(header[:8]):
                return (
                    offsets,
                    f"record {len(offsets)} has a wrong checksum of its length: no later record can be found",
                )
            if position + HEADER.size + length + FOOTER.size > end:
                return offsets, f"the file ends within record {len(offsets)}"
            offsets.append(position)
            position += HEADER.size + length + FOOTER.size
    return offsets, None


def record_checksums(path: Path) -> str:
    """A digest of the length and the checksum of every record, for which the records themselves are not read."""
    offsets, problem = scan(path)
    digest = hashlib.sha256(repr(problem).encode())
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            length, _ = HEADER.unpack(file.read(HEADER.size))
            file.seek(length, os.SEEK_CUR)
            digest.update(struct.pack("<Q", length) + file.read(FOOTER.size))
    return digest.hexdigest()


def read_record(path: Path, number: int, offset: int) -> bytes:
    """The record that starts at `offset`; `number` is for the message of a DamagedDataError."""
    # The file is opened again each time, so that a handle is never shared with a forked worker.
    with open(path, "rb") as file:
        file.seek(offset)
        length, _ = HEADER.unpack(file.read(HEADER.size))
        record = file.read(length)
        footer = file.read(FOOTER.size)
    if len(footer) < FOOTER.size:
        raise DamagedDataError(f"{path}, record {number}: the file ends within it")
    if FOOTER.unpack(footer)[0] != masked_crc(record):
        raise DamagedDataError(f"{path}, record {number}: wrong checksum, its bytes were changed after it was written")
    return record
