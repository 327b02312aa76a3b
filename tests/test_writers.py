"""Written data sets: the layout of the real libraries, and what our readers find in them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from openvla.data import decode_image, open_dataset
from openvla.data.episode import EncodedImages, Episode
from openvla.data.images import encode_image
from openvla.data.writers import lerobot as writer_module
from openvla.data.writers.hdf5 import write_hdf5
from openvla.data.writers.lerobot import write_lerobot


DEMOS = Path(__file__).parent / "fixtures" / "demos"
REAL = DEMOS / "lerobot_image"
FILES = {
    "tasks": "meta/tasks.parquet",
    "episodes": "meta/episodes/chunk-000/file-000.parquet",
    "data": "data/chunk-000/file-000.parquet",
}


def make(seed=0, steps=6, instruction="open the drawer", cameras=("image", "wrist_image"), size=16, state=8) -> Episode:
    generator = np.random.default_rng(seed)
    return Episode(
        instruction=instruction,
        actions=generator.uniform(-1, 1, (steps, 7)).astype(np.float32),
        images={camera: list(generator.integers(0, 256, (steps, size, size, 3), np.uint8)) for camera in cameras},
        state=generator.uniform(-1, 1, (steps, state)).astype(np.float32) if state else None,
        dataset_name="made",
        index=seed,
    )


def assert_same(found: Episode, expected: Episode):
    assert found.instruction == expected.instruction
    assert found.step_instructions == expected.step_instructions
    np.testing.assert_array_equal(found.actions, expected.actions)
    if expected.state is not None:
        np.testing.assert_array_equal(found.state, expected.state)
    assert set(found.images) == set(expected.images)
    for camera, frames in expected.images.items():
        np.testing.assert_array_equal(np.stack(list(found.images[camera])), np.stack(list(frames)))


def test_the_real_librarys_data_set_written_again(tmp_path):
    """Same columns, types, metadata and values as lerobot 0.4.4 wrote."""
    info = json.loads((REAL / "meta/info.json").read_text())
    names = {key: info["features"][key]["names"] for key in ("action", "observation.state")}
    write_lerobot(
        open_dataset(REAL),
        tmp_path,
        fps=info["fps"],
        robot_type=info["robot_type"],
        action_names=names["action"],
        state_names=names["observation.state"],
    )
    ours = json.loads((tmp_path / "meta/info.json").read_text())
    # the fixture was cut from three tasks to one, and kept the counts of tasks
    assert ours | {"total_tasks": 0} == info | {"total_tasks": 0}
    assert [list(ours), list(ours["features"])] == [list(info), list(info["features"])]
    real, written = pq.read_table(REAL / FILES["data"]), pq.read_table(tmp_path / FILES["data"])
    for column in real.column_names:
        if column != "task_index":
            assert written[column].equals(real[column]), column
    features = [json.loads(t.schema.metadata[b"huggingface"])["info"]["features"] for t in (real, written)]
    assert features[0] == features[1]
    groups = [pq.ParquetFile(folder / FILES["data"]).num_row_groups for folder in (REAL, tmp_path)]
    assert groups == [1, 1]


def test_tables_have_the_real_librarys_columns(tmp_path):
    schema = json.loads((DEMOS / "lerobot_schema.json").read_text())
    write_lerobot([make(cameras=["image"]), make(1, cameras=["image"])], tmp_path, fps=10)
    for table, file in FILES.items():
        found = {field.name: str(field.type) for field in pq.read_schema(tmp_path / file)}
        assert found == schema[table] and list(found) == list(schema[table]), table
    pandas = [json.loads(pq.read_schema(folder / FILES["tasks"]).metadata[b"pandas"]) for folder in (REAL, tmp_path)]
    assert [about["index_columns"] for about in pandas] == [["__index_level_0__"]] * 2
    assert pandas[0]["columns"] == pandas[1]["columns"]
    statistics = json.loads((tmp_path / "meta/stats.json").read_text())
    shapes = {key: {name: list(np.shape(value)) for name, value in found.items()} for key, found in statistics.items()}
    assert shapes == schema["stats"]


def test_lerobot_read_back(tmp_path):
    episodes = [make(seed, steps=4 + seed, instruction=f"task {seed % 2}") for seed in range(5)]
    episodes[3] = replace(episodes[3], instruction="a", step_instructions=("a", "a", "b", *["a"] * 4))
    write_lerobot(iter(episodes), tmp_path, fps=20)
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 5
    for found, expected in zip(dataset, episodes, strict=True):
        assert_same(found, expected)
    rows = pq.read_table(tmp_path / FILES["episodes"]).to_pylist()
    assert [row["tasks"] for row in rows] == [["task 0"], ["task 1"], ["task 0"], ["a", "b"], ["task 0"]]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [
        (0, 4),
        (4, 9),
        (9, 15),
        (15, 22),
        (22, 30),
    ]
    times = pq.read_table(tmp_path / FILES["data"])["timestamp"].to_numpy()
    np.testing.assert_allclose(times[4:9], np.arange(5) / 20, rtol=1e-6)


def test_large_data_sets_fill_several_files_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "DATA_FILE_MB", 2 * 6 * 1000 / 2**20)  # one episode of this size, not two
    monkeypatch.setattr(writer_module, "FILES_IN_CHUNK", 2)
    episodes = [make(seed) for seed in range(5)]
    write_lerobot(episodes, tmp_path, fps=10)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "data").rglob("*.parquet"))
    assert files == [f"data/chunk-{n // 2:03d}/file-{n % 2:03d}.parquet" for n in range(5)]
    for found, expected in zip(open_dataset(tmp_path), episodes, strict=True):
        assert_same(found, expected)


def test_statistics_are_those_of_all_values(tmp_path):
    episodes = [make(seed, steps=5 + seed) for seed in range(3)]
    write_lerobot(episodes, tmp_path, fps=10)
    statistics = json.loads((tmp_path / "meta/stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    action = statistics["action"]
    np.testing.assert_allclose(action["mean"], actions.mean(axis=0))
    np.testing.assert_allclose(action["std"], actions.std(axis=0))
    np.testing.assert_allclose(action["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(action["max"], actions.max(axis=0))
    assert action["count"] == [18]
    pixels = np.concatenate([np.stack(episode.images["image"]) for episode in episodes]).reshape(-1, 3) / 255
    image = statistics["observation.images.image"]
    np.testing.assert_allclose(np.ravel(image["mean"]), pixels.mean(axis=0))
    np.testing.assert_allclose(np.ravel(image["std"]), pixels.std(axis=0))
    for name, part in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        np.testing.assert_allclose(np.ravel(image[name]), np.quantile(pixels, part, axis=0), atol=1.01 / 255)
    row = pq.read_table(tmp_path / FILES["episodes"]).to_pylist()[1]
    np.testing.assert_allclose(row["stats/action/mean"], episodes[1].actions.astype(np.float64).mean(axis=0))
    assert row["stats/index/min"] == [5] and row["stats/index/max"] == [10]


def test_what_cannot_be_one_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No episodes"):
        write_lerobot([], tmp_path / "none", fps=10)
    with pytest.raises(ValueError, match="those of the first episode"):
        write_lerobot([make(), make(size=8)], tmp_path / "sizes", fps=10)
    assert not (tmp_path / "sizes" / "meta" / "info.json").exists()
    both = make(cameras=("front", "observation.images.front"))
    with pytest.raises(ValueError, match="two of its cameras are one column"):
        write_lerobot([both], tmp_path / "cameras", fps=10)
    with pytest.raises(ValueError, match="2 names for action"):
        write_lerobot([make()], tmp_path / "names", fps=10, action_names=["x", "y"])
    with pytest.raises(FileExistsError, match="not empty"):
        write_lerobot([make()], tmp_path / "sizes", fps=10)


@pytest.mark.parametrize("encoded", [False, True])
def test_images_of_other_sizes_are_refused(encoded, tmp_path):
    """In the middle of an episode: a LeRobot data set was written silently, of which the real library reads no batch;
    HDF5 ended in h5py's TypeError."""
    images = make(cameras=("image",)).images["image"][:3] + make(cameras=("image",), size=8).images["image"][:3]
    if encoded:
        images = EncodedImages([encode_image(image, "jpeg") for image in images])
    episode = replace(make(), images={"image": images})
    for write, path in ((partial(write_lerobot, fps=10), tmp_path / "folder"), (write_hdf5, tmp_path / "file.hdf5")):
        with pytest.raises(
            ValueError, match=r"(image|agentview_rgb).*, step 3: an image of 8 x 8 pixels, .* 16 x 16: .*resize"
        ):
            write([episode], path)


def test_jpeg_keeps_small_colours():
    image = np.full((32, 32, 3), 90, np.uint8)
    image[10:13, 10:13] = (0, 255, 0)  # a goal's marker
    found = decode_image(encode_image(image, "jpeg"))
    assert found[11, 11, 1] > 220 and found[11, 11, 0] < 40
    np.testing.assert_array_equal(decode_image(encode_image(image)), image)


@pytest.mark.parametrize("state", [8, 5, 0])
def test_hdf5_read_back(tmp_path, state):
    episodes = [make(seed, steps=4 + seed, state=state) for seed in range(3)]
    episodes[2] = replace(episodes[2], instruction="pull out the drawer")
    write_hdf5(episodes, tmp_path / "open_the_drawer_demo.hdf5", env_name="drawer")
    dataset = open_dataset(tmp_path)
    for found, expected in zip(dataset, episodes, strict=True):
        renamed = {"agentview_rgb": "image", "eye_in_hand_rgb": "wrist_image"}
        assert_same(replace(found, images={renamed[key]: value for key, value in found.images.items()}), expected)


@pytest.mark.parametrize("format", ["hdf5", "lerobot"])
def test_instructions_that_change_are_read_back(tmp_path, format):
    """HDF5 had the first one for all steps."""
    texts = ("open the drawer", "open the drawer", "", "push it in")
    changing = replace(make(1, steps=4), step_instructions=texts, instruction=texts[0])
    episodes = [make(0, steps=4), changing, make(2, steps=4)]
    if format == "hdf5":
        write_hdf5(episodes, tmp_path / "data" / "open_the_drawer_demo.hdf5")
    else:
        write_lerobot(episodes, tmp_path / "data", fps=20)
    found = list(open_dataset(tmp_path / "data"))
    assert [episode.step_instructions for episode in found] == [None, texts, None]
    assert [episode.instruction for episode in found] == [episode.instruction for episode in episodes]


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_states_of_no_numbers_are_none(tmp_path, format):
    """Of a simulator without states a recording ended at its last step, in words of the library."""
    images = {"image": np.zeros((3, 8, 8, 3), np.uint8)}
    made = Episode("go", np.ones((3, 7), np.float32), images, np.zeros((3, 0), np.float32), "mine", 0)
    if format == "lerobot":
        write_lerobot([made], tmp_path / "set", fps=10, state_names=())
    else:
        write_hdf5([made], tmp_path / "set" / "go_demo.hdf5")
    (read,) = open_dataset(tmp_path / "set")
    assert read.state is None and read.instruction == "go"


def test_hdf5_has_liberos_layout(tmp_path):
    write_hdf5([make()], tmp_path / "x_demo.hdf5")
    left_out = {"obs/joint_states", "robot_states", "states"}  # of the simulator, which an episode does not hold
    with h5py.File(next((DEMOS / "hdf5").glob("*.hdf5"))) as real, h5py.File(tmp_path / "x_demo.hdf5") as ours:
        keys: list[dict] = [{}, {}]
        for file, found in zip((real, ours), keys):
            demo = file["data"][sorted(file["data"])[0]]
            demo.visititems(lambda name, item, found=found: found.update({name: str(getattr(item, "dtype", ""))}))
        assert {key: kind for key, kind in keys[0].items() if key not in left_out} == keys[1]
        # Which way up the pictures are: the reader would turn LIBERO's own, which have it too, in their first form.
        assert set(ours["data"].attrs) == {*real["data"].attrs, "macros_image_convention"}


def test_hdf5_files_appear_whole(tmp_path):
    def broken():
        yield make()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_hdf5(broken(), tmp_path / "x_demo.hdf5")
    assert not (tmp_path / "x_demo.hdf5").exists()
    write_hdf5([make()], tmp_path / "x_demo.hdf5")
    with pytest.raises(FileExistsError):
        write_hdf5([make()], tmp_path / "x_demo.hdf5")
    with pytest.raises(ValueError, match="No episodes"):
        write_hdf5([], tmp_path / "y_demo.hdf5")


def test_numbers_of_any_type_are_written_as_float32(tmp_path):
    """What `meta/info.json` says of them; a file of two types could not be written."""
    episode = make(cameras=["image"])
    wide = replace(episode, actions=episode.actions.astype(np.float64), state=episode.state.astype(np.float64))
    write_lerobot([episode, wide], tmp_path, fps=10)
    for found in open_dataset(tmp_path):
        assert_same(found, episode)
