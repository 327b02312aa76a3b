"""LeRobot folders as converters leave them: the frame of every row is that of its time stamp, or an error says which is
not; columns are found by name; depth is no camera; damaged files in meta/ are named."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import FRONT, png, write_lerobot, write_video

from openvla.data import DamagedDataError, PythonDataset, open_dataset
from openvla.data.formats.lerobot_meta import is_colour, split_episodes
from openvla.data.sources import open_source
from openvla.data.writers.lerobot import write_lerobot as write_images
from openvla.files_openvla import LFS_POINTER


LFS = LFS_POINTER.decode() + "v1\noid sha256:" + "a" * 64 + "\nsize 12345678\n"
DATA = {"v3.0": "data/chunk-000/file-000.parquet", "v2.1": "data/chunk-000/episode_000001.parquet"}
FILM = {"v3.0": f"videos/{FRONT}/chunk-000/file-000.mp4", "v2.1": f"videos/chunk-000/{FRONT}/episode_000001.mp4"}
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(params=["v3.0", "v2.1"])
def recorded(request, tmp_path):
    return write_lerobot(tmp_path / "set", request.param), request.param


def shown(episode) -> list[int]:
    """Which frame of all each row shows."""
    return [round((float(image.mean()) - 8) / 8) for image in episode.images["front"]]


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def put(name, values):
    """A change of a table: the column `name` becomes `values`."""
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


def change_info(folder, change):
    info = json.loads((folder / "meta/info.json").read_text())
    change(info)
    (folder / "meta/info.json").write_text(json.dumps(info))


def test_each_row_shows_its_frame(recorded):
    folder, _ = recorded
    for episode, first in zip(open_dataset(folder), (0, 6), strict=True):
        assert shown(episode) == list(range(first, first + 6))
        assert shown(episode[2:4]) == [first + 2, first + 3]
        assert episode.instruction == ["open it", "close it"][first // 6]


CLOCKS = {
    "12 a second": (np.arange(6) / 12, "row 1: its time stamp is 0.0833 s, but frame 1 of 10 a second is at 0.1000 s"),
    "8 a second": (np.arange(6) / 8, "row 1: "),
    "real time": (np.arange(6) / 10 + 1.7e9, "row 0: "),
    "jitter": (np.arange(6) / 10 + [0, 0, 0, 2e-3, 0, 0], "row 3: "),
    "constant": (np.zeros(6), "row 1: "),
    "shifted": (np.arange(6) / 10 + 0.3, "row 0: "),
    "one frame late": (np.arange(1, 7) / 10, "row 0: "),
    "backwards": (np.arange(6)[::-1] / 10, "row 0: "),
    "not a number": ([0, 0.1, float("nan"), 0.3, 0.4, 0.5], "row 2: timestamp is nan"),
    "missing": ([0, 0.1, None, 0.3, 0.4, 0.5], "row 2: timestamp is nan"),
    "texts": (list("abcdef"), "timestamp is not one number in each row"),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_is_not_the_videos_is_an_error_of_its_row(recorded, clock):
    folder, version = recorded
    stamps, message = CLOCKS[clock]
    stamps = [None if stamp is None else stamp for stamp in stamps]
    good = [f"{second}" for second in range(6)] if clock == "texts" else (np.arange(6) / 10).tolist()
    rewrite(folder / DATA[version], put("timestamp", [*([] if version == "v2.1" else good), *stamps]))
    with pytest.raises(DamagedDataError, match=f"episode 1(, row .)?.*{message}" if clock != "texts" else message):
        open_dataset(folder)[1]
    with pytest.raises(DamagedDataError):  # statistics look at no image and say so before training
        open_source(folder, cache=False)


def test_clocks_and_gaps_count_without_videos(tmp_path):
    """A row that was lost makes a jump in every chunk over it, and a wrong clock another rate of control."""
    images = {"image": np.zeros((6, 32, 32, 3), np.uint8)}
    folder = tmp_path / "set"
    write_images([*PythonDataset([{"actions": np.zeros((6, 7)), "images": images}])], folder, fps=10)
    [file] = folder.glob("data/*/*.parquet")
    written = pq.read_table(file)
    rewrite(file, put("timestamp", (np.arange(6) / 8).tolist()))
    with pytest.raises(DamagedDataError, match="row 1: its time stamp is 0.1250 s, but frame 1 of 10 a second"):
        open_dataset(folder)[0]
    rewrite(file, lambda table: table.drop_columns("timestamp"))
    assert len(open_dataset(folder)[0].actions) == 6
    rewrite(file, put("frame_index", [0, 1, 2, 4, 5, 6]))
    with pytest.raises(DamagedDataError, match="row 3: frame_index goes from 2 to 4; rows between them are missing"):
        open_dataset(folder)[0]
    pq.write_table(written, file)
    rewrite(file, put("timestamp", (np.arange(6) / 8).tolist()))
    change_info(folder, lambda info: info.pop("fps"))
    assert len(open_dataset(folder)[0].actions) == 6


def test_the_tolerance_is_lerobots_and_can_be_given(recorded):
    folder, version = recorded
    late = (np.arange(6) / 10 + 5e-5).tolist()
    rewrite(folder / DATA[version], put("timestamp", [*([] if version == "v2.1" else late), *late]))
    assert shown(open_dataset(folder)[1]) == list(range(6, 12))
    late = (np.arange(6) / 10 + 5e-3).tolist()
    rewrite(folder / DATA[version], put("timestamp", [*([] if version == "v2.1" else late), *late]))
    with pytest.raises(DamagedDataError, match="tolerance_s"):
        open_dataset(folder)[1]
    assert shown(open_dataset(folder, tolerance_s=0.01)[1]) == list(range(6, 12))
    with pytest.raises(ValueError, match="below half a frame, which is 0.05 s at the 10"):
        open_dataset(folder, tolerance_s=0.06)
    with pytest.raises(ValueError, match="tolerance_s is an option of LeRobot folders"):
        open_source("tests/fixtures/demos/rlds/metaworld_demo", tolerance_s=0.01)


def test_rows_are_those_of_frame_index(recorded):
    folder, version = recorded
    table = pq.read_table(folder / DATA[version])
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), folder / DATA[version])
    episode = open_dataset(folder)[1]
    assert shown(episode) == list(range(6, 12))
    np.testing.assert_allclose(episode.actions[:, 0], 1 + np.arange(6) / 10, rtol=1e-6)
    for frames, message in (
        ([0, 1, 2, 2, 4, 5], "frame_index 2 stands there twice"),
        ([0, 1, 2, 4, 5, 6], "row 3: frame_index goes from 2 to 4"),
    ):
        pq.write_table(table, folder / DATA[version])
        rewrite(folder / DATA[version], put("frame_index", [*(frames if version == "v3.0" else []), *frames]))
        with pytest.raises(DamagedDataError, match=f"episode 1.*{message}"):
            open_dataset(folder)[1]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_film_of_another_speed_or_length_is_an_error(tmp_path, version):
    fast = write_lerobot(tmp_path / "fast", version, video_fps=20)
    for index in (0, 1):
        with pytest.raises(DamagedDataError, match=f"episode {index}, {FRONT}, row 5: .* 20 frames a second, ends at"):
            open_dataset(fast)[index]
    slow = write_lerobot(tmp_path / "slow", version, video_fps=5)
    with pytest.raises(DamagedDataError, match="episode 0, .*row 1: .*no frame at 0.100 s"):
        shown(open_dataset(slow)[0])
    short = write_lerobot(tmp_path / "short", version)
    write_video(short / FILM[version], [np.zeros((32, 32, 3), np.uint8)] * 4, "libx264", 10, {})
    with pytest.raises(DamagedDataError, match="episode 1.*row 5: the images recorded go to"):
        open_dataset(short)[1]


def test_every_second_frame_of_a_faster_film(tmp_path):
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=1)
    film = [np.full((32, 32, 3), 8 * n + 8, np.uint8) for n in range(12)]
    write_video(folder / FILM["v2.1"].replace("1.mp4", "0.mp4"), film, "libx264", 20, {"crf": "5"})
    assert shown(open_dataset(folder)[0]) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "column, values, message",
    [
        (f"videos/{FRONT}/from_timestamp", None, "from_timestamp .None"),
        (f"videos/{FRONT}/from_timestamp", [None, None], "from_timestamp .None"),
        (f"videos/{FRONT}/chunk_index", None, "no chunk_index of the video"),
        (f"videos/{FRONT}/file_index", [float("nan")] * 2, "no file_index of the video"),
        ("data/chunk_index", None, "no chunk_index of the data"),
        ("data/file_index", [None, None], "no file_index of the data"),
        (f"videos/{FRONT}/to_timestamp", [0.3, 0.9], "ends at 0.900 s"),
        ("length", [6, 7], "6 rows, meta/episodes says 7"),
        ("length", [6, None], "'length' are not integers"),
        ("episode_index", [0, 0], r"episodes \[0\] stand there more than once"),
        ("episode_index", None, "no column 'episode_index'"),
    ],
)
def test_what_an_episode_lacks_is_named(tmp_path, column, values, message):
    folder = write_lerobot(tmp_path / "set")
    rewrite(folder / EPISODES, put(column, values) if values else lambda table: table.drop_columns(column))
    with pytest.raises(ValueError, match=message) as raised:
        open_dataset(folder)[1]
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("starts", [(0.0, 0.0), (0.0, 0.5)], ids=["all at 0", "one frame"])
def test_episodes_have_parts_of_a_film_of_their_own(tmp_path, starts):
    folder = write_lerobot(tmp_path / "set")
    for what, later in (("from", 0.0), ("to", 0.6)):
        rewrite(folder / EPISODES, put(f"videos/{FRONT}/{what}_timestamp", [start + later for start in starts]))
    for index in (0, 1):
        with pytest.raises(
            DamagedDataError, match=f"episode {index}, {FRONT}: .* show frames of episode {1 - index} in"
        ):
            open_dataset(folder)[index]


def test_episodes_are_found_by_number_and_not_by_line(tmp_path):
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=4)
    lines = (folder / "meta/episodes.jsonl").read_text().splitlines()
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines[::-1]))
    assert [e.actions[0, 0] for e in open_dataset(folder)] == [0, 1, 2, 3]
    (folder / "meta/episodes.jsonl").write_text("\n".join([lines[3], lines[0], lines[1]]))
    with pytest.raises(ValueError, match="lacks 1 of the episodes of meta/info.json, the first is 2: "):
        open_dataset(folder)
    with pytest.warns(RuntimeWarning, match="1 skipped so far"):
        assert [e.actions[0, 0] for e in open_dataset(folder, on_error="skip")] == [0, 1, 3]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines))
    change_info(folder, lambda info: info.update(splits={"train": "0:1, 2:4", "test": "1:2"}))
    assert [e.actions[0, 0] for e in open_dataset(folder)] == [0, 2, 3]
    assert [e.actions[0, 0] for e in open_dataset(folder, split="test")] == [1]
    for odd in ("0:80%", "all", "4:0", "-1:2", [0, 4], None):
        change_info(folder, lambda info, odd=odd: info.update(splits={"train": odd}))
        with pytest.raises(ValueError, match="info.json: split 'train' is .*expected episodes as 'first:end'"):
            open_dataset(folder)


def test_a_file_may_claim_any_number_of_episodes(tmp_path):
    """They were counted one by one, in memory."""
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=3)
    change_info(folder, lambda info: info.update(total_episodes=10**15, splits={"train": f"1:2, 0:{10**15}, 2:9"}))
    for split in ("all", "train"):
        with pytest.raises(ValueError, match=f"lacks {10**15 - 3} of the episodes of meta/info.json, the first is 3: "):
            open_dataset(folder, split=split)


@pytest.mark.parametrize("seed", range(20))
def test_missing_episodes_are_those_of_counting(seed):
    generator = np.random.default_rng(seed)
    numbers = np.flatnonzero(generator.random(12) < 0.7)
    parts = [sorted(generator.integers(0, 13, 2).tolist()) for _ in range(3)]
    info = {"total_episodes": 12, "splits": {"train": ", ".join(f"{first}:{end}" for first, end in parts)}}
    wanted = sorted({number for first, end in parts for number in range(first, min(end, 12))} - {*numbers.tolist()})
    rows, missing, first = split_episodes(info, "train", numbers, Path("info.json"))
    assert (missing, first) == (len(wanted), wanted[0] if wanted else None)
    assert {*numbers[rows].tolist()} == {n for n in numbers.tolist() if any(first <= n < end for first, end in parts)}


TASKS = {
    "a column before it": (pa.table({"task_index": [0, 1], "category": ["kitchen"] * 2, "task": ["go", "come"]}), None),
    "any order": (pa.table({"task": ["come", "go"], "task_index": [1, 0]}), None),
    "no known column": (
        pa.table({"task_index": [0, 1], "category": ["kitchen"] * 2}),
        "expected the columns task_index",
    ),
    "no index": (pa.table({"task": ["go", "come"]}), "expected the columns task_index and task"),
    "two texts": (pa.table({"task_index": [0, 0], "task": ["go", "come"]}), "task_index 0 has two texts"),
    "null": (pa.table({"task_index": [0, 1], "task": ["go", None]}), "the text of task 1 is None"),
    "one is missing": (pa.table({"task_index": [0], "task": ["go"]}), r"task_index \[1\] is not in the tasks table"),
}


@pytest.mark.parametrize("case", TASKS)
def test_the_text_of_a_task_is_found_by_name(tmp_path, case):
    folder = write_lerobot(tmp_path / "set")
    table, message = TASKS[case]
    pq.write_table(table, folder / "meta/tasks.parquet")
    if message is None:
        assert [e.instruction for e in open_dataset(folder)] == ["go", "come"]
        return
    with pytest.raises(ValueError, match=message):
        list(open_dataset(folder))


def test_instructions_of_a_column_and_of_the_episodes_table(recorded):
    folder, version = recorded
    table = pq.read_table(folder / DATA[version])
    words = table.append_column("words", pa.array([[f"go {n}", "or"] for n in range(len(table))]))
    words = words.append_column("hint", pa.array([1] * len(table)))
    pq.write_table(words, folder / DATA[version])
    if version == "v2.1":
        first = words.set_column(table.column_names.index("episode_index"), "episode_index", pa.array([0] * 6))
        pq.write_table(first, folder / DATA[version].replace("1.parquet", "0.parquet"))
    episode = open_dataset(folder, language_key="words")[1]
    assert episode.instruction == f"go {len(table) - 6}" and len(episode.step_instructions) == 6
    assert open_dataset(folder, language_key="hint")[1].instruction == "close it"  # numbers of the tasks table
    assert open_dataset(folder, language_key="tasks")[1].instruction == "close it"
    assert open_source(folder, language_key="words", cache=False).survey.labeled == [6, 6]
    with pytest.raises(KeyError, match="no feature 'wrods'"):
        open_dataset(folder, language_key="wrods")
    (folder / ("meta/tasks.parquet" if version == "v3.0" else "meta/tasks.jsonl")).unlink()
    assert open_dataset(folder)[1].instruction == "close it"  # the one task of its episode


def test_subtasks_have_texts_of_their_own(tmp_path):
    """Their numbers were looked up among the tasks: every step had an instruction, and none its own."""
    folder = write_lerobot(tmp_path / "set")
    numbers = [0, 0, 1, 1, -1, -1] * 2
    rewrite(folder / DATA["v3.0"], lambda table: table.append_column("subtask_index", pa.array(numbers)))
    with pytest.raises(ValueError, match="subtasks.parquet is missing, which has the texts of subtask_index"):
        open_dataset(folder, language_key="subtask_index")
    texts = pa.table({"subtask_index": [0, 1], "subtask": ["reach for it", "pull"]})
    about = {"pandas": json.dumps({"index_columns": ["subtask"]})}
    pq.write_table(texts.replace_schema_metadata(about), folder / "meta/subtasks.parquet")
    expected = ("reach for it",) * 2 + ("pull",) * 2 + ("",) * 2  # -1: no subtask
    assert [episode.step_instructions for episode in open_dataset(folder, language_key="subtask_index")] == [
        expected
    ] * 2
    assert open_source(folder, language_key="subtask_index").survey.labeled == [4, 4]
    assert [episode.instruction for episode in open_dataset(folder)] == ["open it", "close it"]
    pq.write_table(texts.slice(0, 1), folder / "meta/subtasks.parquet")
    with pytest.raises(ValueError, match=r"subtask_index \[1\] is not in the subtasks table"):
        list(open_dataset(folder, language_key="subtask_index"))


def test_actions_of_several_columns_and_zeros(recorded):
    folder, version = recorded
    for path in folder.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        parts = np.array(table["action"].to_pylist(), np.float32)
        table = table.drop_columns("action").append_column("action.arm", pa.array(parts[:, :6].tolist()))
        pq.write_table(table.append_column("action.gripper", pa.array(parts[:, 6])), path)
    change_info(folder, lambda info: info["features"].pop("action"))
    sizes = {"action.arm": [6], "action.gripper": [1]}
    more = {key: {"dtype": "float32", "shape": shape} for key, shape in sizes.items()}
    change_info(folder, lambda info: info["features"].update(more))
    with pytest.raises(KeyError, match="no feature 'action'; did you mean 'action.arm'"):
        open_source(folder, cache=False)
    for keys in (["action.arm", "action.gripper"], "action.arm,action.gripper"):
        source = open_source(folder, action_key=keys, cache=False)
        assert source.dataset[0].actions.shape == (6, 7) and len(source.statistics["action"]["q01"]) == 7
    padded = open_dataset(folder, action_key=["action.arm", None, "action.gripper"])[0].actions
    assert padded.shape == (6, 8) and not padded[:, 6].any()
    with pytest.raises(ValueError, match="action_key=.None. names nothing"):
        open_dataset(folder, action_key=[None])


DEPTHS = {
    "video.is_depth_map": {"info": {"video.is_depth_map": True}},
    "is_depth_map": {"info": {"is_depth_map": True}},
    "beside": {"is_depth_map": True},
    "video_info": {"video_info": {"video.is_depth_map": "true"}},
    "camel case, isDepth": {"isDepth": True},
    "depth_map": {"info": {"depth_map": "True"}},
    "depth_unit": {"info": {"depth_unit": "mm"}},
    "depth by modality": {"info": {"modality": "Depth"}},
    "depth by unit": {"info": {"unit": "mm"}},
    "depth by dtype": {"info": {"dtype": "uint16"}},
    "depth by encoding": {"info": {"encoding": "16UC1"}},
    "pix_fmt": {"info": {"video.pix_fmt": "gray16le"}},
    "channels": {"info": {"video.channels": 1}},
    "last": {"shape": [32, 32, 1]},
    "first": {"shape": [1, 32, 32]},
    "two": {"shape": [32, 32]},
}


@pytest.mark.parametrize("spelling", DEPTHS)
def test_depth_is_no_camera(tmp_path, spelling):
    folder = write_lerobot(tmp_path / "set", episodes=1)
    change_info(folder, lambda info: info["features"][FRONT].update(DEPTHS[spelling]))
    assert open_dataset(folder)[0].images == {}
    if "depth" in spelling or spelling == "pix_fmt":
        with pytest.raises(ValueError, match="is a depth map and no colour camera; there are .."):
            open_dataset(folder, cameras=["front"])
    with pytest.raises(ValueError, match="'action' is float32 and no colour camera"):
        open_dataset(folder, cameras=["action"])


OTHER_NAMES = [
    "observation.depth.front",
    "observation.images.front_depth",
    "observation.Depth",
    "front_mask",
    "wristMask",
]
OTHER_NAMES += ["observation.images.segmentation", "seg", "semantic_front", "infrared", "observation.images.ir_left"]
OTHER_NAMES += ["infra1", "thermal", "optical_flow"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_is_called_something_else_is_a_camera_only_where_it_is_named(tmp_path, name):
    """Three channels of 8 bits; it is told what is read then."""
    folder = write_lerobot(tmp_path / "set", episodes=1)
    images = pa.array([{"bytes": png(1, 2), "path": None}] * 6)
    rewrite(folder / DATA["v3.0"], lambda table: table.append_column(name, images))
    change_info(folder, lambda info: info["features"].update({name: {"dtype": "image", "shape": [8, 8, 3]}}))
    assert list(open_dataset(folder)[0].images) == ["front"]
    with pytest.warns(UserWarning, match=r"camera '.*' is (a depth map|a mask|an infrared image|no picture), by what"):
        (frames,) = open_dataset(folder, cameras={"seen": name})[0].images.values()
    assert frames[0][0, 0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("note", [{"is_mask": True}, {"image_type": "segmentation"}, {"modality": "IR"}])
def test_what_is_marked_as_a_mask_is_read_only_where_it_is_named(tmp_path, note):
    folder = write_lerobot(tmp_path / "set", episodes=1)
    change_info(folder, lambda info: info["features"][FRONT].update({"info": note}))
    assert open_dataset(folder)[0].images == {}
    with pytest.warns(UserWarning, match="because it was asked for"):
        assert list(open_dataset(folder, cameras="front")[0].images) == ["front"]


@pytest.mark.parametrize(
    "note",
    [{"video.is_depth_map": False, "video.pix_fmt": "yuv420p10le"}, {"depth": 3}, {"bit_depth": 8}, {"type": "rgb"}],
)
@pytest.mark.parametrize("name", ["circle_cam", "mirror", "first_person", "flowers", "base_0_rgb"])
def test_colours_are_found(tmp_path, name, note):
    key = f"observation.images.{name}"
    assert is_colour(key, {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channel"], "info": note})


BROKEN = {"empty": "", "cut off": "{", "a pointer": LFS, "a list": "[]"}


@pytest.mark.parametrize("text", BROKEN)
def test_damaged_meta_files_are_named(tmp_path, text):
    for number, (version, name) in enumerate(
        [
            ("v3.0", "meta/info.json"),
            ("v3.0", "meta/tasks.parquet"),
            ("v3.0", EPISODES),
            ("v3.0", DATA["v3.0"]),
            ("v3.0", FILM["v3.0"]),
            ("v2.1", "meta/tasks.jsonl"),
            ("v2.1", "meta/episodes.jsonl"),
            ("v2.1", DATA["v2.1"]),
            ("v2.1", FILM["v2.1"]),
        ]
    ):
        folder = write_lerobot(tmp_path / str(number), version)
        (folder / name).write_text(BROKEN[text])
        way_out = "git lfs pull" if text == "a pointer" else "again|expected"
        with pytest.raises(ValueError, match=way_out) as raised:
            open_dataset(folder)[1]
        assert str(folder / name) in str(raised.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("features", None),
        ("features", []),
        ("features", {"action": {"dtype": "float32"}}),
        ("features", {"action": {"dtype": 3, "shape": [7]}}),
        ("features", {"action": "float32"}),
        ("fps", None),
        ("fps", 0),
        ("fps", "10"),
        ("data_path", None),
        ("data_path", 7),
        ("video_path", None),
        ("splits", ["train"]),
        ("chunks_size", 0),
        ("codebase_version", None),
    ],
)
def test_what_info_json_lacks_is_named(tmp_path, key, value):
    folder = write_lerobot(tmp_path / "set", "v2.1", info={key: value})
    with pytest.raises(ValueError, match=f"info.json: .*{key if key != 'features' else 'feature'}"):
        open_dataset(folder)


def test_odd_templates_and_a_byte_order_mark(tmp_path):
    folder = write_lerobot(tmp_path / "set", info={"data_path": "data/{chunk:03d}.parquet"})
    with pytest.raises(DamagedDataError, match="the data_path of meta/info.json, 'data/{chunk:03d}.parquet'"):
        open_dataset(folder)[0]
    folder = write_lerobot(tmp_path / "bom", "v2.1")
    for path in (folder / "meta").glob("*.json*"):
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert len(list(open_dataset(folder))) == 2


def test_damaged_episodes_are_skipped_and_counted(tmp_path):
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=4)
    (folder / DATA["v2.1"]).write_text(LFS)
    (folder / FILM["v2.1"].replace("1.mp4", "2.mp4")).write_text(LFS)
    dataset = open_dataset(folder, on_error="skip")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [e.index for e in dataset] == [0, 3]
    assert dataset.skipped == 2 and len(said) == 2


def test_episodes_that_no_split_names(tmp_path):
    """They are added without a word in info.json: not trained on, though LeRobot itself takes them."""
    folder = write_lerobot(tmp_path / "set", episodes=4, steps=4)
    change_info(folder, lambda info: info.update(splits={"train": "0:2", "test": "2:3"}))
    with pytest.warns(UserWarning, match="1 of 4 episodes are in no split.*of all .test, train.*--split all"):
        assert len(open_source(folder, cache=False).dataset) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_source(folder, split="all", cache=False).dataset) == 4
        change_info(folder, lambda info: info.update(splits={"train": "0:2, 3:4", "test": "2:3"}))
        assert len(open_source(folder, cache=False).dataset) == 3


def test_words_of_the_tasks_table_and_of_the_episode(tmp_path):
    """Where recordings are joined, task_index may stay that of the parts: every episode gets words of another one."""
    folder = write_lerobot(tmp_path / "set", steps=4)
    rewrite(folder / "data/chunk-000/file-000.parquet", put("task_index", [0] * 8))
    with pytest.warns(UserWarning, match="episode 1: its task is 'open it' by task_index.* and 'close it' by meta"):
        assert [episode.instruction for episode in open_dataset(folder)] == ["open it", "open it"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = [episode.instruction for episode in open_dataset(folder, language_key="tasks")]
    assert told == ["open it", "close it"]


@pytest.mark.parametrize("given", [None, 10, 12.5])
def test_images_without_a_clock(tmp_path, given):
    """fps decides nothing there but what is told of the actions; without it a KeyError said 'fps'."""
    images = {"image": np.zeros((3, 8, 8, 3), np.uint8)}
    made = {"actions": np.zeros((3, 7)), "instruction": "open it", "images": images}
    write_images([*PythonDataset([made])], tmp_path / "set", fps=10)
    change_info(tmp_path / "set", lambda info: info.pop("fps") if given is None else info.update(fps=given))
    assert open_dataset(tmp_path / "set").hz == given
    for wrong in ("10", [], True, 0):
        change_info(tmp_path / "set", lambda info: info.update(fps=wrong))  # noqa: B023 - called at once
        with pytest.raises(ValueError, match="info.json: 'fps' is .*expected a number above 0"):
            open_dataset(tmp_path / "set")


@pytest.mark.parametrize("given", [0, -1.0, True, "wide", [1], float("nan")])
def test_a_tolerance_that_is_none(given, tmp_path):
    with pytest.raises(ValueError, match="tolerance_s="):
        open_dataset(write_lerobot(tmp_path / "set", steps=4), tolerance_s=given)


@pytest.mark.parametrize("cell", ["images/gone.png", "x" * 5000, "a\0b"])
def test_an_image_that_is_a_path_to_nothing(cell, tmp_path):
    """Text in the place of pixels: one too long for a name was an OSError."""
    images = {"image": np.zeros((3, 8, 8, 3), np.uint8)}
    write_images([*PythonDataset([{"actions": np.zeros((3, 7)), "images": images}])], tmp_path / "set", fps=10)
    rewrite(tmp_path / "set" / DATA["v3.0"], put("observation.images.image", [cell] * 3))
    with pytest.raises(DamagedDataError, match="no image at step 0 .*is missing"):
        open_dataset(tmp_path / "set")[0]


def test_videos_are_looked_for_before_training(tmp_path):
    """Statistics look at no video, and a few episodes were opened: one video of many was missed for hours."""
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=3, steps=4)
    (folder / FILM["v2.1"]).unlink()
    source = open_source(folder, cache=False)
    with pytest.raises(DamagedDataError, match="episode_000001.mp4: the video is missing, as are 0 others of 3"):
        source.dataset.check_files()
    open_source(folder, cache=False, on_error="skip").dataset.check_files()
    open_source(folder, cache=False, cameras=[]).dataset.check_files()


@pytest.mark.parametrize("end", ["\u2028", "\u0085", "\x0c"])
def test_words_with_other_ends_of_lines(tmp_path, end):
    folder = write_lerobot(tmp_path / "set", "v2.1", steps=4)
    lines = [{"task_index": 0, "task": f"open{end}it"}, {"task_index": 1, "task": "close it"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "meta/tasks.jsonl").write_text(text.replace("\\f", "\\u000c"), encoding="utf-8")
    assert [episode.instruction for episode in open_dataset(folder)] == [f"open{end}it", "close it"]
