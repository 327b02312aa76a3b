"""Readers of demonstrations: what they find, in which order they share it out, and what they say to damaged files.

The recordings under fixtures/demos were written by the formats' own libraries; expected.json was read back with those.
"""

import collections.abc
import copy
import hashlib
import io
import json
import pickle
import runpy
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import av
import h5py
import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import torch
from data_files import jpeg, own_rlds, png, write_records, write_rlds, write_video
from PIL import ExifTags, Image

from openvla.data import DamagedDataError, EpisodeStream, decode_image, frames, open_dataset
from openvla.data.formats import video
from openvla.data.sources import open_source
from openvla.data.stream import shuffled
from openvla.pixels_openvla import load_image


DEMOS = Path(__file__).parent / "fixtures" / "demos"
EXPECTED = json.loads((DEMOS / "expected.json").read_text())
RLDS = DEMOS / "rlds" / "metaworld_demo"


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def check_episode(episode, expected, state=True):
    assert len(episode) == expected["length"] == len(episode.actions)
    assert episode.instruction == expected["instruction"] and episode.step_instructions is None
    assert episode.actions.dtype == np.float32
    np.testing.assert_allclose(episode.actions.astype(np.float64).sum(0), expected["action_sum"], atol=1e-4)
    np.testing.assert_allclose(episode.actions[[0, -1]], [expected["action_first"], expected["action_last"]], atol=1e-6)
    if state:
        np.testing.assert_allclose(episode.state[[0, -1]], [expected["state_first"], expected["state_last"]], atol=1e-6)


# RLDS


def test_rlds_reads_what_tfds_wrote():
    dataset = open_dataset(RLDS, split="val")
    assert len(dataset) == 2 and dataset.name == "metaworld_demo"
    for episode in dataset:
        path = dataset.trajectory(episode.index)["traj_metadata"]["episode_metadata"]["file_path"][0].decode()
        expected = next(e for e in EXPECTED if e.get("rlds", {}).get("episode_metadata", {}).get("file_path") == path)
        check_episode(episode, expected)
        assert list(episode.images) == ["image", "wrist_image"]
        for camera, images in episode.images.items():
            assert (
                hashlib.sha256(images.encoded[0]).hexdigest()
                == expected["rlds"][f"{camera}_first_frame_encoded_sha256"]
            )
            assert list(images[0].shape) == expected["rlds"][f"{camera}_shape"] and images[0].dtype == np.uint8
            mean = images[0].mean((0, 1))
            np.testing.assert_allclose(
                mean, expected["rlds"][f"{camera}_first_frame_mean_rgb"], atol=1.5
            )  # Pillow's mean
    assert "tensorflow" not in sys.modules


def test_rlds_trajectory_is_raw():
    trajectory = open_dataset(RLDS / "1.0.0", split="val").trajectory(-1)
    length = len(trajectory["action"])
    assert trajectory["action"].shape == (length, 7) and trajectory["action"].dtype == np.float32
    assert trajectory["is_first"].dtype == bool and trajectory["is_first"].tolist() == [True] + [False] * (length - 1)
    assert trajectory["language_instruction"].dtype == object
    assert isinstance(trajectory["language_instruction"][0], bytes)
    assert trajectory["observation"]["image"].shape == (length,)
    assert trajectory["observation"]["image"][0].startswith(b"\xff\xd8")


def test_rlds_standardize_and_keys():
    def standardize(trajectory):
        observation = {**trajectory["observation"], "first": trajectory["observation"]["state"][:, :2]}
        cut = {"observation": observation, "action": trajectory["action"] * 2, "is_last": trajectory["is_last"]}
        cut["language_instruction"] = np.array([b"do it"] * len(trajectory["action"]), dtype=object)
        return {k: {i: x[:-1] for i, x in v.items()} if isinstance(v, dict) else v[:-1] for k, v in cut.items()}

    plain = open_dataset(RLDS, split="val")[0]
    changed = open_dataset(RLDS, split="val", standardize=standardize, state_key=["first", None, "is_last"])[0]
    np.testing.assert_array_equal(changed.actions, plain.actions[:-1] * 2)
    np.testing.assert_array_equal(changed.state[:, :2], plain.state[:-1, :2])
    assert changed.state.shape[1] == 4 and not changed.state[:, 2:].any()
    assert changed.instruction == "do it" and len(changed.images["image"]) == len(plain) - 1

    bare = open_dataset(RLDS, split="val", cameras={"primary": "wrist_image"}, state_key=[])[0]
    assert list(bare.images) == ["primary"] and bare.state is None
    with pytest.raises(ValueError, match="no key 'wrist_imag'.*did you mean 'observation/wrist_image'"):
        open_dataset(RLDS, split="val", cameras=["wrist_imag"])[0]
    with pytest.raises(ZeroDivisionError) as raised:
        open_dataset(RLDS, split="val", standardize=lambda trajectory: 1 / 0)[0]
    assert "record 0" in raised.value.__notes__[0]


STEPS = {
    "action": {"arm": tfds.features.Tensor(shape=(3,), dtype=np.float64), "gripper": np.float32},
    "observation": {
        "front": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "hand": tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg"),
        "depth": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png"),
        "natural_language_instruction": tfds.features.Text(),
        "packed": tfds.features.Tensor(shape=(2, 2), dtype=np.float32, encoding="zlib"),
        "hints": tfds.features.Sequence(tfds.features.Text()),
    },
    "is_last": np.bool_,
}
ARM = {"action_key": ["action/arm", "action/gripper"]}


def steps_of(number, length):
    return [
        {
            "action": {"arm": np.full(3, float(number)), "gripper": np.float32(step)},
            "observation": {
                "front": png(number, step),
                "hand": jpeg(number),
                "depth": png(200, 0, mode="I;16"),
                "natural_language_instruction": ["go", "gó → on"][step % 2] if number == 1 else f"task {number}",
                "packed": np.full((2, 2), step, np.float32),
                "hints": ["x"] * (step % 3),
            },
            "is_last": step == length - 1,
        }
        for step in range(length)
    ]


@pytest.fixture
def odd_set(tmp_path):
    """7 episodes in 3 shards: nested actions, PNG and JPEG, depth, compressed tensors, texts in lists, no state."""
    return write_rlds(tmp_path / "odd_set" / "1.0.0", STEPS, [steps_of(n, n + 2) for n in range(7)], shards=(3, 1, 3))


def test_rlds_of_every_feature(odd_set):
    dataset = open_dataset(odd_set, **ARM)
    assert [len(episode) for episode in dataset] == [2, 3, 4, 5, 6, 7, 8]
    episode = dataset[5]
    np.testing.assert_array_equal(episode.actions, [[5, 5, 5, step] for step in range(7)])
    assert list(episode.images) == ["front", "hand"] and episode.state is None
    assert episode.images["front"][3][0, 0].tolist() == [5, 3, 0]
    trajectory = dataset.trajectory(2)
    assert trajectory["observation"]["packed"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert [len(hints) for hints in trajectory["observation"]["hints"]] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="no key 'action' .it has parts: choose from .'action/arm'"):
        open_dataset(odd_set)[0]


def test_instructions_may_change_along_the_way(odd_set):
    episode = open_dataset(odd_set, **ARM)[1]
    assert episode.instruction == "go" and episode.step_instructions == ("go", "gó → on", "go")
    assert [frame.instruction for frame in frames(episode)] == ["go", "gó → on", "go"]
    assert episode[1:].instruction == "gó → on" and episode[:1].step_instructions is None


def test_rlds_splits(odd_set):
    assert [e.actions[0, 0] for e in open_dataset(odd_set, split="train[2:5]", **ARM)] == [2, 3, 4]
    assert len(open_dataset(odd_set, split="all", **ARM)) == 7
    with pytest.raises(ValueError, match="no split 'test', only .'train'"):
        open_dataset(odd_set, split="test")


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data) or data))


def flip(position):
    def change(data):
        data[position] ^= 1

    return change


@pytest.mark.parametrize(
    "change, lost, message",
    [
        (lambda data: data[:-30], [2], "record 2: the file ends within record 2"),
        (lambda data: data[:5], [0, 1, 2], "record 0: the file ends within the header"),
        (flip(100), [0], "record 0: wrong checksum"),
        (flip(0), [0, 1, 2], "record 0 has a wrong checksum of its length"),
    ],
)
def test_damaged_records_are_named_and_counted(odd_set, change, lost, message):
    shard = sorted(odd_set.glob("*.tfrecord*"))[0]
    damage(shard, change)
    with pytest.raises(DamagedDataError, match=message) as raised:
        list(open_dataset(odd_set, **ARM))
    assert str(shard) in str(raised.value)
    dataset = open_dataset(odd_set, on_error="skip", **ARM)
    with pytest.warns(RuntimeWarning, match=f"{len(lost)} skipped so far"):
        assert [e.index for e in dataset] == sorted({0, 1, 2, 3, 4, 5, 6} - set(lost))
    assert dataset.skipped == len(lost)


def test_wrong_records_are_named(tmp_path):
    features = {"action": tfds.features.Tensor(shape=(7,), dtype=np.float32)}
    good = [{"action": np.ones(7, np.float32)}] * 3
    nan = [{"action": np.full(7, np.nan, np.float32)}]
    folder = write_rlds(tmp_path / "set" / "1.0.0", features, [good, [], nan, good, good], shards=(5,))
    other = write_rlds(tmp_path / "a" / "1.0.0", {"act": np.float32}, [[{"act": np.float32(1)}]], shards=(1,))
    short = write_rlds(
        tmp_path / "b" / "1.0.0",
        {"action": tfds.features.Tensor(shape=(5,), dtype=np.float32)},
        [[{"action": np.ones(5, np.float32)}]],
        shards=(1,),
    )
    for number, source in ((3, other), (4, short)):
        alien = open_dataset(source)._read(next(source.glob("*.tfrecord*")), 0)
        shard = next(folder.glob("*.tfrecord*"))
        records = [open_dataset(folder)._read(shard, i) for i in range(5)]
        write_records(shard, [*records[:number], alien, *records[number + 1 :]])
    dataset = open_dataset(folder)
    for number, message in enumerate(
        ["", "no steps", "action of step 0 is not finite", "without .'steps/action'", "features.json"]
    ):
        if message:
            with pytest.raises(DamagedDataError, match=f"record {number}: .*{message}"):
                dataset[number]
    with pytest.warns(RuntimeWarning):
        assert len(list(open_dataset(folder, on_error="skip"))) == 1


def test_records_that_are_missing_or_too_many(odd_set):
    shards = sorted(odd_set.glob("*.tfrecord*"))
    first = shards[0].read_bytes()
    shards[0].write_bytes(first + shards[1].read_bytes())
    with pytest.raises(DamagedDataError, match="has 4 records, dataset_info.json says 3"):
        open_dataset(odd_set, **ARM)[0]
    with pytest.warns(RuntimeWarning, match="in excess"):
        assert len(list(open_dataset(odd_set, on_error="skip", **ARM))) == 7
    shards[0].write_bytes(b"")
    with pytest.raises(DamagedDataError, match="is empty .0 bytes., expected a TFRecord file"):
        open_dataset(odd_set, **ARM)[0]
    shards[0].unlink()
    with pytest.raises(DamagedDataError, match="record 1: the file is missing"):
        open_dataset(odd_set, **ARM)[1]


def test_nothing_but_errors_is_an_error_even_when_skipping(odd_set):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DamagedDataError, match="none of 7 episodes could be read; the first: .*no key 'nothing'"):
            list(open_dataset(odd_set, action_key="nothing", on_error="skip"))


def test_a_damaged_image_is_named_when_it_is_looked_at():
    episode = open_dataset(RLDS, split="val")[0]
    images = episode.images["image"]
    images.encoded[3] = images.encoded[3][:200]
    with pytest.raises(DamagedDataError, match="record 0, camera 'image', image of step 3: cannot decode"):
        images[3]


# Streams


def identity(items):
    return items


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size, workers", [(1, 0), (3, 0), (2, 2), (1, 3), (12, 0)])
def test_ranks_and_workers_share_without_loss_or_duplication(odd_set, world_size, workers, shuffle):
    dataset = open_dataset(odd_set, **ARM)
    for epoch in (0, 1):
        seen = []
        for rank in range(world_size):
            stream = EpisodeStream(
                dataset, shuffle=shuffle, buffer_size=2, expand=frames, rank=rank, world_size=world_size
            )
            stream.set_epoch(epoch)
            loader = torch.utils.data.DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=identity)
            seen += [(f.index, float(f.actions[0, 3])) for batch in loader for f in batch]
        assert sorted(seen) == [(index, step) for index in range(7) for step in range(index + 2)]


def test_workers_hand_on_errors_and_skip(odd_set):
    damage(sorted(odd_set.glob("*.tfrecord*"))[2], flip(200))
    options = {"batch_size": None, "num_workers": 2}
    with pytest.raises(DamagedDataError, match="00002-of-00003, record 0: wrong checksum") as error:
        list(torch.utils.data.DataLoader(EpisodeStream(open_dataset(odd_set, **ARM)), **options))
    # The error holds the loader in a cycle. Where the garbage collector finds it, the queues end before the workers are
    # told to: they are waited for, 5 seconds each.
    traceback.clear_frames(error.tb)
    stream = EpisodeStream(open_dataset(odd_set, on_error="skip", **ARM))
    assert sorted(e.index for e in torch.utils.data.DataLoader(stream, **options)) == [0, 1, 2, 3, 5, 6]


def test_order_changes_from_pass_to_pass_and_repeats_with_its_epoch(odd_set):
    stream = EpisodeStream(open_dataset(odd_set, **ARM), shuffle=True, buffer_size=3)
    first, second = ([e.index for e in stream] for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(7))
    again = EpisodeStream(open_dataset(odd_set, **ARM), shuffle=True, buffer_size=3)
    again.set_epoch(1)
    assert [e.index for e in again] == second
    endless = iter(EpisodeStream(open_dataset(odd_set, **ARM), repeat=True))
    assert [next(endless).index for _ in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_epochs_reach_workers_that_live_on(odd_set):
    stream = EpisodeStream(open_dataset(odd_set, **ARM), shuffle=True, buffer_size=7)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 5, 0):
        stream.set_epoch(epoch)
        orders.append([episode.index for episode in loader])
    assert orders[0] == orders[2] != orders[1]


def test_the_shuffle_buffer_is_bounded_and_shuffles():
    alive = set()

    def items():
        for item in range(1000):
            alive.add(item)
            yield item

    out = []
    for item in shuffled(items(), 50, np.random.default_rng(0)):
        alive.remove(item)
        out.append(item)
        assert len(alive) <= 50
    assert sorted(out) == list(range(1000)) and np.abs(np.array(out) - np.arange(1000)).mean() > 20


def test_frames_keep_their_own_encoded_bytes_only(odd_set):
    episode = open_dataset(odd_set, **ARM)[4]
    frame = list(frames(episode))[2]
    assert len(frame) == 1 and frame.actions.base is None
    assert [type(x) for x in frame.images["front"].encoded] == [bytes] and isinstance(
        frame.images["front"].encoded, list
    )
    assert frame.images["front"][0][0, 0].tolist() == [4, 2, 0]
    travelled = pickle.loads(pickle.dumps(frame))  # as DataLoader workers hand it over
    np.testing.assert_array_equal(travelled.images["hand"][0], frame.images["hand"][0])
    with pytest.raises(TypeError, match="with a slice"):
        episode[3]


# LeRobot


@pytest.mark.parametrize("name", ["lerobot_video", "lerobot_image"])
def test_lerobot_v3(name):
    dataset = open_dataset(DEMOS / name)
    expected = {e[name]["episode_index"]: e for e in EXPECTED if name in e}
    assert len(dataset) == len(expected)
    for index in reversed(range(len(dataset))):
        check_lerobot(dataset[index], expected[index], name)


def check_lerobot(episode, expected, name):
    check_episode(episode, expected)
    cameras = {key.rsplit(".", 1)[-1]: value for key, value in expected[name]["cameras"].items()}
    assert list(episode.images) == list(cameras)
    for camera, about in cameras.items():
        images = episode.images[camera]
        for step, what in ((about["middle_frame_index"], "middle"), (0, "first")):
            assert list(images[step].shape) == about["shape"] and images[step].dtype == np.uint8
            mean = images[step].mean((0, 1))
            np.testing.assert_allclose(
                mean, about[f"{what}_frame_mean_rgb_decoded"], atol=0.1 if name[8] == "v" else 6e-4
            )
        if "first_frame_pixels_sha256" in about:
            assert sha(images[0]) == about["first_frame_pixels_sha256"]


@pytest.fixture
def v21(tmp_path):
    """The v3 fixture in the layout of v2.1: one table and one video per camera for each episode."""
    source, folder = DEMOS / "lerobot_video", tmp_path / "v21"
    info = json.loads((source / "meta/info.json").read_text())
    info["codebase_version"] = "v2.1"
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    table = pq.read_table(source / "data/chunk-000/file-000.parquet")
    tasks = pq.read_table(source / "meta/tasks.parquet").to_pylist()
    lines = [{"task_index": row["task_index"], "task": row["__index_level_0__"]} for row in tasks]
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    episodes = pq.read_table(source / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    keep = ("episode_index", "tasks", "length")
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps({k: e[k] for k in keep}) + "\n" for e in episodes))
    first = 0
    for episode in episodes:
        number, length = episode["episode_index"], episode["length"]
        path = folder / info["data_path"].format(episode_chunk=0, episode_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(first, length), path)
        for key in (k for k, f in info["features"].items() if f["dtype"] == "video"):
            video = folder / info["video_path"].format(episode_chunk=0, video_key=key, episode_index=number)
            video.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(source / "videos" / key / "chunk-000/file-000.mp4")) as container:
                pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)][first : first + length]
            write_video(video, pictures, codec="libx264", rate=10, options={"crf": "0", "g": "20", "preset": "fast"})
        first += length
    return folder


def test_lerobot_v21(v21):
    dataset = open_dataset(v21)
    assert len(dataset) == 2
    for index, episode in enumerate(dataset):
        expected = next(e for e in EXPECTED if e.get("lerobot_video", {}).get("episode_index") == index)
        check_episode(episode, expected)
        same = open_dataset(DEMOS / "lerobot_video")[index]
        for camera in ("image", "wrist_image"):
            for step in (0, 33, len(episode) - 1):
                ours, theirs = episode.images[camera][step], same.images[camera][step]
                assert np.abs(ours.astype(int) - theirs).mean() < 2  # coded again, in 4:2:0


@pytest.mark.parametrize("options", [{"g": "40", "bf": "3"}, {"g": "7", "bf": "0"}, {"g": "250", "bf": "2"}])
def test_video_access_is_frame_exact(tmp_path, options):
    from openvla.data.formats.video import Video

    count, rate = 120, 30
    # Each picture shows its number: 16 gray levels for its lower, 16 for its upper digit
    pictures = [np.repeat([[t % 16] * 16 + [t // 16] * 16] * 32, 3).reshape(32, 32, 3) * 15 + 8 for t in range(count)]
    write_video(tmp_path / "v.mp4", [p.astype(np.uint8) for p in pictures], "libx264", rate, {"crf": "10", **options})
    video = Video(tmp_path / "v.mp4")
    order = np.random.default_rng(0).permutation(count).tolist() + list(range(count)) + [5, 5, 4, 119, 0]
    for step in order:
        digits = video.frame_at(step / rate)[8:24].astype(float)
        found = round((digits[:, 4:12].mean() - 8) / 15) + 16 * round((digits[:, 20:28].mean() - 8) / 15)
        assert found == step
    for seconds in (count / rate, -1 / rate):
        with pytest.raises(DamagedDataError, match="v.mp4: no frame at"):
            video.frame_at(seconds)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full range"])
@pytest.mark.parametrize("space, weights", [(1, (0.2126, 0.7152)), (5, (0.299, 0.587))], ids=["BT.709", "BT.601"])
def test_colours_are_those_that_a_film_says(tmp_path, space, weights, full):
    """PyAV 14 takes BT.709, as films in HD are, for BT.601."""
    av = pytest.importorskip("av")
    from openvla.data.formats.video import Video

    colours = np.array([(200, 30, 40), (20, 180, 60), (30, 60, 210), (120, 120, 120)])
    rgb = np.repeat(np.repeat(colours.reshape(2, 2, 3), 16, 0), 16, 1)
    red, green = weights
    luma = rgb @ (red, green, 1 - red - green)
    chroma = [(rgb[..., 2] - luma) / (2 * (red + green)), (rgb[..., 0] - luma) / (2 * (1 - red))]
    scale = (1, 1, 0) if full else (219 / 255, 224 / 255, 16)
    planes = np.stack([scale[2] + scale[0] * luma, *(128 + scale[1] * part for part in chroma)]).round()
    with av.open(str(tmp_path / "v.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1 + full
        film.mux(stream.encode(av.VideoFrame.from_ndarray(planes.astype(np.uint8), format="yuv444p")))
        film.mux(stream.encode())
    assert np.abs(Video(tmp_path / "v.mp4").frame_at(0.0).astype(int) - rgb).max() <= 4


@pytest.fixture
def videos(tmp_path):
    shutil.copytree(DEMOS / "lerobot_video", tmp_path / "videos")
    return tmp_path / "videos"


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def test_lerobot_damage_is_named(videos):
    table = videos / "data/chunk-000/file-000.parquet"
    whole = table.read_bytes()
    index = pq.read_table(table).column_names.index("task_index")
    for change, message in [
        (lambda t: t.slice(1), "episode 0: 95 rows, meta/episodes says 96"),
        (lambda t: t.drop_columns("action"), "no column .'action'"),
        (lambda t: t.set_column(index, "task_index", pa.array([9] * len(t))), r"task_index \[9\] is not in the tasks"),
        (lambda t: t.set_column(1, "action", pa.array([[1.0] * 5] * len(t))), "actions have 5 dimensions, .* 7"),
        (lambda t: t.set_column(1, "action", pa.array([[1.0], [1.0, 2]] * 200)[: len(t)]), "'action' is not numbers"),
    ]:
        rewrite(table, change)
        with pytest.raises(DamagedDataError, match=f"file-000.parquet, episode 0: .*{message.split(': ')[-1]}"):
            open_dataset(videos)[0]
        table.write_bytes(whole)
    table.write_bytes(whole[:1000])
    with pytest.raises(DamagedDataError, match="episode 0: cannot be read"):
        open_dataset(videos)[0]
    with pytest.warns(RuntimeWarning, match="2 skipped so far"), pytest.raises(DamagedDataError, match="none of 2"):
        list(open_dataset(videos, on_error="skip"))


def test_lerobot_videos_damaged_or_missing(videos):
    video = videos / "videos/observation.images.image/chunk-000/file-000.mp4"
    damage(video, lambda data: data[:5000])
    with pytest.raises(DamagedDataError, match="file-000.mp4: not a readable video"):
        open_dataset(videos)[0].images["image"][0]
    video.unlink()
    with pytest.raises(DamagedDataError, match="file-000.mp4: the video is missing"):
        open_dataset(videos)[0]
    assert list(open_dataset(videos, cameras=["wrist_image"])[0].images) == ["wrist_image"]


def test_lerobot_options(videos):
    episode = open_dataset(videos, cameras={"primary": "image"}, state_key=["state", None], action_key="action")[1]
    assert list(episode.images) == ["primary"] and episode.state.shape == (95, 9) and not episode.state[:, 8].any()
    with pytest.raises(KeyError, match="no feature 'actoin'; did you mean 'action'"):
        open_dataset(videos, action_key="actoin")
    with pytest.raises(ValueError, match="no split 'val'; there are .'train'. and 'all'"):
        open_dataset(videos, split="val")
    info = json.loads((videos / "meta/info.json").read_text())
    (videos / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match="codebase_version 'v1.6' is not read"):
        open_dataset(videos)


def test_lerobot_needs_no_other_reader_to_be_imported_first():
    code = f"from openvla.data import open_dataset; print(len(open_dataset({str(DEMOS / 'lerobot_image')!r})[0]))"
    done = processes.run(code, server="transformers")
    assert done.stdout == "95\n", done.stderr


# HDF5


def test_lerobot_without_the_library_of_videos(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    assert not hasattr(video, "av")  # not imported with the module
    images = open_dataset(DEMOS / "lerobot_image")
    assert next(iter(images[0].images.values()))[0].shape == (84, 84, 3)
    with pytest.raises(ModuleNotFoundError, match=r"reading videos needs av.*openvla\[data\]"):
        video.Video(DEMOS / "none.mp4")


def test_hdf5():
    dataset = open_dataset(DEMOS / "hdf5")
    assert len(dataset) == 2
    for episode, demo in zip(dataset, ("demo_0", "demo_1")):
        expected = next(e for e in EXPECTED if e.get("hdf5", {}).get("demo") == demo)
        check_episode(episode, expected, state=False)
        assert list(episode.images) == ["agentview_rgb", "eye_in_hand_rgb"] and episode.state.shape == (len(episode), 8)
        for camera, images in episode.images.items():
            assert sha(images[0]) == expected["hdf5"][f"{camera}_first_frame_pixels_sha256"]
            assert sha(images[-1]) == sha(images[-1:][0]) == expected["hdf5"][f"{camera}_last_frame_pixels_sha256"]
    turned = open_dataset(DEMOS / "hdf5", rotate_images=True)[0].images["agentview_rgb"][4]
    np.testing.assert_array_equal(turned[::-1, ::-1], dataset[0].images["agentview_rgb"][4])


def write_hdf5(path, demos=12, problem_info=None, mask=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for number in range(demos):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.full((3, 7), number, np.float64)
            group["obs/agentview_image"] = np.zeros((3, 8, 8, 3), np.uint8)
        if problem_info is not None:
            file["data"].attrs["problem_info"] = problem_info
        if mask:
            file["mask/valid"] = np.array(mask)
    return path


def test_hdf5_names_order_and_masks(tmp_path):
    file = write_hdf5(tmp_path / "KITCHEN_SCENE4_put_the_bowl_away_demo.hdf5")
    assert [e.actions[0, 0] for e in open_dataset(file)] == list(range(12))
    assert open_dataset(file)[0].instruction == "put the bowl away" and open_dataset(file)[0].state is None
    listed = json.dumps({"language_instruction": list("go")})
    assert open_dataset(write_hdf5(tmp_path / "a" / "x_demo.hdf5", 1, listed))[0].instruction == "go"
    image = write_hdf5(tmp_path / "b" / "image_v15.hdf5", mask=[b"demo_10", b"demo_3"])
    assert open_dataset(image, split="all")[0].instruction == ""
    assert [e.actions[0, 0] for e in open_dataset(image, split="valid")] == [3, 10]
    assert len(open_dataset(tmp_path, split="all")) == 25
    with pytest.raises(ValueError, match="no demonstrations in split 'test'; splits: .'valid'"):
        open_dataset(image, split="test")


def test_a_photo_whose_orientation_comes_after_its_colour_profile():
    """Among the first 4096 bytes alone it was looked for: such pictures were trained on lying on their side."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    data = file.getvalue()
    profile = b"\xff\xe2" + (60000).to_bytes(2, "big") + bytes(59998)
    late = data[:2] + profile + data[2:]
    for image in (data, late):
        np.testing.assert_allclose(decode_image(image), np.asarray(load_image(image)), atol=12)
    assert decode_image(late).shape == (16, 8, 3)


@pytest.mark.parametrize("texts", [9, 11])
def test_hdf5_texts_of_steps_one_too_many(texts, tmp_path):
    """The first of them was taken for all steps."""
    with h5py.File(tmp_path / "x_demo.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["obs/image"] = np.zeros((10, 7)), np.zeros((10, 8, 8, 3), np.uint8)
        demo["language_instruction"] = ["open it"] * 5 + ["close it"] * (texts - 5)
    with pytest.raises(DamagedDataError, match=f"10 actions, but {texts} texts of 'language_instruction'"):
        open_dataset(tmp_path / "x_demo.hdf5")[0]


def test_hdf5_demonstrations_that_a_mask_names_twice(tmp_path):
    """They were drawn twice as often, and one of the two could be held out while the other was trained on."""
    file = write_hdf5(tmp_path / "x_demo.hdf5", mask=[b"demo_1", b"demo_2", b"demo_1"])
    with pytest.raises(DamagedDataError, match="mask/valid names ..demo_1.. more than once"):
        open_dataset(file, split="valid")


@pytest.mark.parametrize("split", ["train+train", "train[:2]+train[1:]", "train[1:]+train[:2]"])
def test_rlds_splits_that_name_episodes_twice(split, tmp_path):
    folder = own_rlds(tmp_path / "mine")
    with pytest.raises(ValueError, match="names episodes twice .mine-train.*, record [01] is one"):
        open_dataset(folder, split=split)
    assert len(open_dataset(folder, split="train[1:]+train[:1]")) == 3


def test_hdf5_files_of_several_rates(tmp_path):
    """Only the rate was left out then, and changes of 50 ms and of 100 ms had the same statistics."""
    for number, rate in enumerate([20, 10, 20, None]):
        with h5py.File(write_hdf5(tmp_path / f"{number}_demo.hdf5", 1), "a") as file:
            if rate is not None:
                file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": rate}})
    with pytest.warns(UserWarning, match="recorded at 10 and 20 steps a second"):
        assert open_dataset(tmp_path).hz is None
    (tmp_path / "1_demo.hdf5").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset(tmp_path).hz is None


def test_hdf5_demonstrations_that_no_mask_names(tmp_path):
    """Recorded after the masks were made, or in a file of which no mask says what to train on."""
    for name, masks in (("a", {"train": [0, 1], "valid": [2]}), ("b", {"core": [0]})):
        with h5py.File(write_hdf5(tmp_path / f"{name}_demo.hdf5", 4), "a") as file:
            for mask, numbers in masks.items():
                file[f"mask/{mask}"] = np.array([f"demo_{number}".encode() for number in numbers])
    with pytest.warns(UserWarning, match="5 of 8 episodes are in no split.*core, train, valid"):
        assert len(open_source(tmp_path, cache=False).dataset) == 2


def test_hdf5_damage_is_named(tmp_path):
    file = write_hdf5(tmp_path / "task_demo.hdf5")
    with h5py.File(file, "a") as content:
        del content["data/demo_1/actions"], content["data/demo_2/obs/agentview_image"], content["data/demo_4/actions"]
        del content["data/demo_3/actions"], content["data/demo_5/obs/agentview_image"]
        content["data/demo_2/obs/agentview_image"] = np.zeros((2, 8, 8, 3), np.uint8)
        content["data/demo_3/actions"] = np.zeros((3, 5))
        content["data/demo_4/actions"] = np.zeros((0, 7))
        content["data/demo_5/obs/agentview_image"] = np.zeros((3, 8, 8), np.uint8)
    dataset = open_dataset(file, cameras=["agentview_image"])
    for number, message in {
        1: "no key 'actions'",
        2: "3 actions, but 2 entries of 'agentview_image'",
        3: "actions have 5 dimensions, those of the dataset 7",
        4: "no steps",
        5: "expected .T, H, W, 3. uint8, found uint8 .3, 8, 8.",
    }.items():
        with pytest.raises(DamagedDataError, match=f"task_demo.hdf5, (/data/)?demo_{number}.*{message}"):
            dataset[number]
    dataset = open_dataset(file, cameras=["agentview_image"], on_error="skip")
    with pytest.warns(RuntimeWarning, match="5 skipped so far"):
        assert [e.index for e in dataset] == [0, 6, 7, 8, 9, 10, 11]
    (tmp_path / "cut_demo.hdf5").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DamagedDataError, match="cut_demo.hdf5: not a readable HDF5 file"):
        open_dataset(tmp_path)
    with pytest.warns(RuntimeWarning, match="1 skipped so far: |1 skipped so far; the last: .*cut_demo"):
        assert len(open_dataset(tmp_path, on_error="skip")) == 12


# Python objects, the door


def test_an_object_of_ones_own():
    episodes = [
        {"actions": np.ones((2, 7)), "instruction": "go", "images": {"front": [png(1, 2), png(3, 4)]}},
        open_dataset(DEMOS / "hdf5")[0],
        {"actions": np.ones((2, 6))},
        {"actions": np.ones((2, 7)), "pictures": 1},
        {"actions": np.ones((2, 7)), "images": {"front": np.zeros((2, 8, 8))}},
        7,
    ]
    dataset = open_dataset(episodes, name="mine")
    assert dataset[0].images["front"][1][0, 0].tolist() == [3, 4, 0] and dataset[0].dataset_name == "mine"
    assert dataset[1].index == 1 and dataset[1].instruction == "press the button from above"
    for index, message in enumerate(
        [
            "6 dimensions, those of the dataset 7",
            "expected actions, .*'pictures'",
            "camera 'front': expected .*float64",
            "found int",
        ],
        start=2,
    ):
        with pytest.raises(DamagedDataError, match=f"mine, episode {index}.*{message}"):
            dataset[index]
    with pytest.warns(RuntimeWarning, match="4 skipped so far"):
        assert len(list(open_dataset(episodes, on_error="skip"))) == 2
    with pytest.raises(ValueError, match="an object with __len__ and __getitem__, got int"):
        open_dataset(7)


def test_images_of_ones_own_are_loaded_when_looked_at():
    class Lazy(collections.abc.Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, step):
            return np.full((4, 4, 3), step, np.uint8 if step < 2 else float)

    episode = open_dataset([{"actions": np.ones((3, 7)), "images": {"front": Lazy()}}])[0]
    assert [int(frame.images["front"][0].max()) for frame in list(frames(episode))[:2]] == [0, 1]
    with pytest.raises(DamagedDataError, match="camera 'front', step 2: expected .H, W, 3. uint8, found float64"):
        episode.images["front"][2]


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own_dataset.py"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_dataset.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "Episode('my_robot', index=2, instruction='lift the lid'" in out and "15 frames" in out


def test_a_folder_one_level_too_high_or_too_low_names_the_dataset(tmp_path):
    with pytest.raises(
        ValueError, match=r"demos holds HDF5 files and '.*lerobot_image' \(lerobot\), .*metaworld_demo' \(rlds"
    ):
        open_dataset(DEMOS)  # a level below is HDF5, and so are folders of other formats
    shutil.copytree(DEMOS / "lerobot_image", tmp_path / "robots" / "arm")
    for above in (tmp_path, tmp_path / "robots"):
        with pytest.raises(ValueError, match=r"is no dataset, but holds '.*/robots/arm' \(lerobot\): give one of them"):
            open_dataset(above)
    for below in (DEMOS / "lerobot_image" / "data", next((DEMOS / "lerobot_image" / "data").rglob("*.parquet"))):
        with pytest.raises(ValueError, match=r"is part of a dataset \(lerobot\): give '.*/lerobot_image'"):
            open_dataset(below)
    assert len(open_dataset(DEMOS, format="hdf5")) > 0


def test_the_door(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no demonstrations of a known format"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="'lerobto' is not known, did you mean 'lerobot'"):
        open_dataset(tmp_path, format="lerobto")
    with pytest.raises(FileNotFoundError, match="expected features.json"):
        open_dataset(tmp_path, format="rlds")
    with pytest.raises(ValueError, match="on_error='ignore'"):
        open_dataset(RLDS, split="val", on_error="ignore")
    with pytest.raises(IndexError):
        open_dataset(RLDS, split="val")[2]


# Images


def test_jpeg_pixels_are_tensorflows():
    """What tf.io.decode_jpeg made of a JPEG of its own (TensorFlow 2.15); Pillow differs by up to 12 levels."""
    golden = np.load(Path(__file__).parent / "fixtures" / "decoded_jpeg.npz")
    np.testing.assert_array_equal(decode_image(golden["jpeg"].tobytes()), golden["decoded"])


def test_images_of_other_kinds():
    assert decode_image(png(1, 2))[0, 0].tolist() == [1, 2, 0]
    assert decode_image(png(1, 2, mode="RGBA")).shape == (8, 8, 3)
    assert decode_image(png(9, 9, mode="L")).shape == (8, 8, 3)
    assert decode_image(jpeg(5, mode="L"))[0, 0].tolist() == [5, 5, 5]
    assert decode_image(jpeg(5, mode="CMYK")).shape == (8, 8, 3)
    for data in (b"", b"no image", jpeg(5)[:-20], png(1, 1)[:40], png(1, 1, mode="I;16")):
        with pytest.raises(ValueError, match="cannot decode an image of"):
            decode_image(data)


def test_episodes_are_not_changed_by_their_parts():
    episode = open_dataset(DEMOS / "hdf5")[0]
    before = copy.deepcopy(episode.actions)
    part = episode[2:5]
    part.actions[:] = 9
    np.testing.assert_array_equal(episode.actions, before)
