"""Files that are unlike others but sound are read right; what is wrong is named with file and demonstration."""

import errno
import json
import os
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from data_files import png, write_lerobot, write_rlds

from openvla.data import open_dataset
from openvla.data.sources import open_source
from openvla.data.writers import hdf5 as hdf5_writer


ACTIONS = np.random.default_rng(1).uniform(-0.05, 0.05, (6, 7))
IMAGES = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)


def hdf5(folder, change):
    path = folder / "open_it_demo.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(2):
            group = file.create_group(f"data/demo_{number}")
            group["actions"], group["obs/agentview_rgb"], group["obs/state"] = ACTIONS, IMAGES, np.zeros((6, 3))
        change(file, file["data/demo_1"])
    return path


def instead(key, value, **storage):
    def change(file, demo):
        del demo[key]
        demo.create_dataset(key, data=value, **storage)

    return change


def soft_link(file, demo):
    demo.move("actions", "raw")
    demo["actions"] = h5py.SoftLink("/data/demo_1/raw")


def external_link(file, demo):
    with h5py.File(file.filename.replace("open_it", "other").replace(".hdf5", ".bin"), "w") as other:
        other["a"] = ACTIONS
        del demo["actions"]
        demo["actions"] = h5py.ExternalLink(other.filename, "/a")


def one_demonstration_links_to_another(file, demo):
    del file["data/demo_1"]
    file["data/demo_1"] = h5py.SoftLink("/data/demo_0")


SOUND = {
    "big-endian": instead("actions", ACTIONS.astype(">f8")),
    "compressed": instead("obs/agentview_rgb", IMAGES, compression="gzip", chunks=(1, 8, 8, 3)),
    "lzf, shuffled, checksums": instead("obs/agentview_rgb", IMAGES, compression="lzf", shuffle=True, fletcher32=True),
    "a soft link": soft_link,
    "an external link": external_link,
    "a demonstration that is a link": one_demonstration_links_to_another,
}


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_hdf5_as_it_may_be_stored(change, tmp_path):
    source = open_source(hdf5(tmp_path, change), cache=False, held_out=0.0)
    episode = source.dataset[1]
    np.testing.assert_allclose(episode.actions, ACTIONS, rtol=1e-6)
    np.testing.assert_array_equal(episode.images["agentview_rgb"][5], IMAGES[5])


def link_to_nowhere(file, demo):
    del demo["actions"]
    demo["actions"] = h5py.SoftLink("/nowhere")


def a_reference(file, demo):
    file["store"] = ACTIONS
    del demo["actions"]
    demo["actions"] = file["store"].ref


def without_steps(file, demo):
    instead("actions", ACTIONS[:0])(file, demo)


WRONG = {
    "a link to nowhere": (link_to_nowhere, "'actions' is a link to '/nowhere', which is not there"),
    "an object reference": (a_reference, "'actions' is not numbers for each step but object"),
    "compound": (instead("actions", np.zeros(6, [("x", "f8")])), "'actions' is not numbers for each step"),
    "complex": (instead("actions", ACTIONS.astype(complex)), "not numbers for each step but complex128"),
    "texts": (instead("actions", np.full((6, 7), b"1")), "not numbers for each step"),
    "nothing": (instead("actions", h5py.Empty("f8")), "not numbers for each step"),
    "no steps": (without_steps, "the episode has no steps"),
    "a chunk for each step": (instead("actions", np.stack([ACTIONS] * 4, 1)), "actions have 28 dimensions"),
    "an action that is not finite": (
        instead("actions", np.where(np.arange(42).reshape(6, 7) == 20, np.nan, ACTIONS)),
        "action of step 2 is not finite",
    ),
    "a state that is not finite": (instead("obs/state", np.full((6, 3), np.nan)), "state of step 0 is not finite"),
    "a state of another width": (instead("obs/state", np.zeros((6, 5))), "states have 5 dimensions, those before 3"),
    "a state that is too short": (instead("obs/state", np.zeros((5, 3))), "6 actions, but 5 entries of 'state'"),
    "images of floats": (instead("obs/agentview_rgb", IMAGES / 255.0), r"no colour images.*'agentview_rgb': 'float64"),
    "images of 16 bits": (instead("obs/agentview_rgb", IMAGES.astype("u2")), r"no colour images.*'uint16 \(6, 8, 8, 3"),
    "colours first": (instead("obs/agentview_rgb", np.moveaxis(IMAGES, -1, 1)), r"no colour images.*\(6, 3, 8, 8\)"),
    "no pixels": (instead("obs/agentview_rgb", IMAGES[:, :0]), r"no colour images.*\(6, 0, 8, 3\)"),
    "too few images": (instead("obs/agentview_rgb", IMAGES[:5]), "6 actions, but 5 entries of 'obs/agentview_rgb'"),
    "words in Latin-1": (
        lambda file, demo: demo.attrs.update(language_instruction=np.bytes_("öffne".encode("latin1"))),
        "is not UTF-8",
    ),
}


@pytest.mark.parametrize("change, said", WRONG.values(), ids=WRONG)
def test_hdf5_that_is_wrong_is_named_before_training(change, said, tmp_path):
    """When statistics are taken, which look at no image."""
    path = hdf5(tmp_path, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, demo_1: .*{said}"):
        open_source(path, cache=False, held_out=0.0)


# RLDS


def rlds(folder, of_action, values):
    features = {
        "observation": {"image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png")},
        "action": of_action,
        "language_instruction": tfds.features.Text(),
    }
    steps = [
        {"observation": {"image": png(1, 2)}, "action": value, "language_instruction": "open it"} for value in values
    ]
    return write_rlds(folder / "set" / "1.0.0", features, [steps, steps], (2,))


FLOATS = tfds.features.Tensor(shape=(7,), dtype=np.float32)


def test_rlds_whose_features_json_was_changed(tmp_path):
    """Fractions would be cut to whole numbers."""
    folder = rlds(tmp_path, FLOATS, ACTIONS.astype(np.float32))
    features, text = folder / "features.json", (folder / "features.json").read_text()
    for before, after, said in [
        ('"float32"', '"int32"', "says .*int32.* of 'steps/action': it holds fractions"),
        ('"7"', '"6"', "it does not fit features.json"),
        ('"action"', '"actions"', "without .'steps/actions'"),
    ]:
        features.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/.*record 0: .*{said}"):
            open_source(folder, cache=False, held_out=0.0)
    features.write_text(text.replace('"float32"', '"float64"'))  # holds as much
    np.testing.assert_allclose(open_dataset(folder)[1].actions, ACTIONS, rtol=1e-6)


def test_rlds_actions_that_are_texts(tmp_path):
    folder = rlds(tmp_path, tfds.features.Text(), ["1"] * 6)
    with pytest.raises(ValueError, match=r"record 0: .*'action'. are texts, expected numbers for each of 6 steps"):
        open_source(folder, cache=False, held_out=0.0)


# Writing


def test_hdf5_is_not_written_to_a_disk_that_may_not_hold_it(tmp_path, monkeypatch):
    """On a full one the library ends the process."""
    episodes = list(open_dataset(hdf5(tmp_path, lambda file, demo: None)))
    monkeypatch.setattr(hdf5_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(OSError, match=r"1 MB may be needed for an episode and 1 MB are free.*out.hdf5"):
        hdf5_writer.write_hdf5(episodes, tmp_path / "out.hdf5")
    assert not (tmp_path / "out.hdf5").exists()


def test_folders_that_are_links(tmp_path):
    """A part of the data on another disk: its episodes were left out."""
    lab, disk = tmp_path / "lab", tmp_path / "disk"
    for folder in (lab / "monday", disk / "2026"):
        folder.mkdir(parents=True)
        hdf5(folder, lambda file, demo: None)
    (lab / "more").symlink_to(disk / "2026")
    (lab / "latest").symlink_to(lab / "monday")  # not twice
    (lab / "monday" / "back").symlink_to(lab)
    dataset = open_dataset(lab)
    assert [file.parent.name for file, _ in dataset.demos] == ["monday", "monday", "more", "more"]


def test_links_to_what_a_folder_lies_in(tmp_path):
    """The demonstrations beside it were trained on as its own, and of a link to / all of the disk was read."""
    for folder in (tmp_path / "data" / "lab", tmp_path / "data" / "other"):
        folder.mkdir(parents=True)
        hdf5(folder, lambda file, demo: None)
    for name, place in (("up", "data"), ("root", "/")):
        (tmp_path / "data" / "lab" / name).symlink_to(tmp_path / place)
    assert {file.parent.name for file, _ in open_dataset(tmp_path / "data" / "lab").demos} == {"lab"}


def test_a_disk_that_fails(tmp_path, monkeypatch):
    """What was in the folder was left out without a word."""
    hdf5(tmp_path, lambda file, demo: None)
    (tmp_path / "far").mkdir()
    found = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("far"):
            raise OSError(errno.ESTALE, "Stale file handle", os.fspath(path))
        return found(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="Stale file handle.*far"):
        open_dataset(tmp_path, "hdf5")


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    """Their episodes were left out without a word; a disk has such folders that hold none (lost+found)."""
    hdf5(tmp_path, lambda file, demo: None)
    (tmp_path / "closed").mkdir()
    found = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):  # who runs tests as root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return found(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match="closed' may not be read: what is in it is left out"):
        assert len(open_dataset(tmp_path)) == 2


@pytest.mark.parametrize("place", ["data", "frames", ""])
def test_statistics_follow_tables_in_links_and_elsewhere(tmp_path, place):
    """They were kept by digests of the tables in data/ alone, and not of those in links within."""
    folder, disk = write_lerobot(tmp_path / "set", "v2.1"), tmp_path / "disk"
    info = json.loads((folder / "meta/info.json").read_text())
    info["data_path"] = info["data_path"].replace("data/", f"{place}/" if place else "")
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "data/chunk-000").rename(disk)
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "chunk-000").symlink_to(disk)
    most = open_source(folder).statistics["action"]["max"][0]
    file = disk / "episode_000001.parquet"
    table = pq.read_table(file)
    actions = pa.array([[7.0] * 7] * table.num_rows, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", actions), file)
    assert (most, open_source(folder).statistics["action"]["max"][0]) == (1.5, 7.0)
