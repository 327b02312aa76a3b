"""Small recordings of every format under seeded damage: files cut, emptied, deleted, replaced by pointers, bytes
flipped, fields of JSON given other types. Accepted are episodes equal to the recorded ones, or errors that name a file
there.

A flipped byte that no checksum covers (values of an HDF5 file, a letter of JSON), or a field that becomes another valid
one, cannot be found out: there it is only the kind of error that counts.
"""

import json
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_files import png, write_lerobot, write_rlds

from openvla.data import open_dataset
from openvla.files_openvla import LFS_POINTER


ROUNDS = 60  # of each recording; a few seconds on one core
CHECKED = (".parquet", "-of-00001")  # pages and records have checksums
JSON_VALUES = (None, 0, -1, 2.5, 1e400, "", "x", [], {}, [None], {"x": 1}, True, "0:9999999999999999999")


def lerobot3(folder):
    return write_lerobot(folder / "set", "v3.0", episodes=3)


def lerobot2(folder):
    return write_lerobot(folder / "set", "v2.1", episodes=3)


def rlds(folder):
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
    steps = {"observation": {"image": image}, "action": tfds.features.Tensor(shape=(7,), dtype=np.float32)}
    episodes = [
        [{"observation": {"image": png(e, t)}, "action": np.full(7, e + t / 9, np.float32)} for t in range(4)]
        for e in range(3)
    ]
    metadata = {"language_instruction": ["go", "come", "stay"]}
    return write_rlds(folder / "set" / "1.0.0", steps, episodes, (3,), metadata=metadata)


def hdf5(folder):
    (folder / "set").mkdir()
    with h5py.File(folder / "set" / "task_demo.hdf5", "w") as file:
        for number in range(3):
            group = file.create_group(f"data/demo_{number}")
            group.create_dataset("actions", data=np.full((4, 7), number + 0.5), compression="gzip")
            group.create_dataset("obs/agentview_rgb", data=np.full((4, 8, 8, 3), number, np.uint8), fletcher32=True)
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "go"})
    return folder / "set"


def read(folder):
    """Everything that training sees of a recording."""
    found = []
    for episode in open_dataset(folder):
        images = {camera: np.stack([images[0], images[-1]]) for camera, images in episode.images.items()}
        found.append((episode.instruction, episode.actions, images))
    return found


def equal(one, other):
    return len(one) == len(other) and all(
        text == text_2
        and np.array_equal(actions, actions_2)
        and images.keys() == images_2.keys()
        and all(np.array_equal(images[camera], images_2[camera]) for camera in images)
        for (text, actions, images), (text_2, actions_2, images_2) in zip(one, other)
    )


def fields_of(tree):
    """Every place in a JSON tree, as (container, key)."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from fields_of(value)


def damage(path: Path, rng: np.random.Generator) -> tuple[str, bool]:
    """Changes a file; what was done, and whether a reader can find it out."""
    data = path.read_bytes()
    kinds = ["cut", "empty", "delete", "pointer", "flip", *(["field"] * 5 if path.suffix == ".json" else [])]
    kind = kinds[rng.integers(len(kinds))]
    if kind == "field":
        tree = json.loads(data)
        places = list(fields_of(tree))
        holder, key = places[rng.integers(len(places))]
        value = JSON_VALUES[rng.integers(len(JSON_VALUES) + 1) - 1]
        if rng.random() < 0.3 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = value
        path.write_text(json.dumps(tree))
        return f"{kind} {key!r} = {value!r}", False  # names and counts may be changed to others that are as good
    if kind == "delete":
        path.unlink()
    elif kind == "flip":
        changed = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(changed))
    else:
        size = {"cut": int(rng.integers(1, len(data))), "empty": 0, "pointer": 0}[kind]
        pointer = LFS_POINTER + b"v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
        path.write_bytes(pointer if kind == "pointer" else data[:size])
    return kind, path.name.endswith(CHECKED) or kind in ("cut", "empty", "delete", "pointer")


@pytest.mark.parametrize("make", [lerobot3, lerobot2, rlds, hdf5], ids=lambda make: make.__name__)
def test_damaged_recordings_are_read_right_or_refused(tmp_path, make):
    folder = make(tmp_path)
    whole = read(folder)
    assert len(whole) == 3
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(ROUNDS):
        copy = tmp_path / str(number) / folder.relative_to(tmp_path)
        shutil.copytree(folder, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        path = files[rng.integers(len(files))]
        done, exact = damage(path, rng)
        where = f"round {number}, {path.relative_to(copy)}: {done}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(copy)
        except (ValueError, KeyError, OSError) as error:
            refused += 1
            assert str(tmp_path / str(number)) in str(error), f"{where}: {error!r}"
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}") from error
        else:
            assert equal(found, whole) or not exact, f"{where}: {len(found)} episodes that differ"
        shutil.rmtree(tmp_path / str(number))
    assert refused > ROUNDS / 3
