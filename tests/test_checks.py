"""Warnings about data, statistics, images and results: each where it belongs, and none where all is well."""

import json
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_files import own_rlds

from openvla import OpenVLAConfig, OpenVLAProcessor
from openvla.action_spec import action_names
from openvla.data import PythonDataset
from openvla.data.sources import open_source
from openvla.training.checks import (
    check_cameras,
    check_data,
    check_images,
    check_relearned,
    check_result,
    check_same_statistics,
)


ROOT = Path(__file__).resolve().parents[1]


def source(change=lambda actions: actions, episodes: int = 5, **options):
    rng = np.random.default_rng(0)
    recorded = []
    for _ in range(episodes):
        actions = rng.uniform(-0.05, 0.05, (40, 7))
        actions[:, 6] = np.arange(40) < 25  # opens first, then grasps
        recorded.append({"actions": change(actions), "instruction": "pick up the cup"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_source(PythonDataset(recorded, name="mine"), held_out=0, **options)


def with_column(index: int, values):
    def change(actions):
        actions[:, index] = values(actions[:, index])
        return actions

    return change


def test_steps_in_which_nothing_moves():
    """A teleoperator who thinks: OpenVLA's policies stop where the robot stood still."""

    def found(change, **options):
        return [text for text in check_data(source(change, **options)) if "nothing moves" in text]

    def pausing(actions):
        actions[10:18, :6] = 0
        return actions

    (warning,) = found(pausing)
    assert "nothing moves in 20% of the 200 steps looked at" in warning and "--filters no-ops" in warning
    assert not found(pausing, filters=["no-ops"])
    assert not found(pausing, absolute_dims="all")
    assert not found(lambda actions: actions * ([4e-5] * 6 + [1]))  # a slow arm, of 500 steps in a second
    assert not found(lambda actions: actions)


def test_actions_that_are_the_state_of_the_same_step():
    """As `--action-key observation.state` reads them: nothing moves, and the loss falls."""
    rng = np.random.default_rng(0)
    places = np.cumsum(rng.normal(size=(41, 6)), axis=0)
    gripper = np.r_[np.ones(25), np.zeros(16)][:, None]

    def found(actions, state, **options):
        episodes = [{"actions": np.hstack([actions, gripper[:40]]), "state": state, "instruction": "go"}]
        source = open_source(PythonDataset(episodes, name="mine"), held_out=0, **options)
        return [warning for warning in check_data(source) if "state of the same step" in warning]

    (warning,) = found(places[:40], np.hstack([places, gripper])[:40])
    assert warning.startswith("mine: x, y, z, roll, pitch, yaw, gripper of an action are numbers of the state")
    assert found(places[:40], places[:40, ::-1], absolute_dims="all")  # wherever they stand, whatever they are called
    assert not found(places[1:], places[:40], absolute_dims="all")  # of the next step
    waits = np.repeat(places[::20], 20, axis=0)  # which nearly all steps are where the robot is
    assert not found(waits[1:41], waits[:40], absolute_dims="all") and found(
        waits[:40], waits[:40], absolute_dims="all"
    )
    assert not found(np.diff(places, axis=0), np.hstack([places, gripper])[:40])  # a gripper alone


def test_angles_that_go_over_the_end_of_their_range():
    rng = np.random.default_rng(0)
    places = np.cumsum(0.1 * rng.normal(size=(200, 7)), axis=0)
    places[:, 3] += np.pi  # as that of an arm that points down
    places[:, 6] = np.arange(200) % 40 < 20

    def found(actions):
        return [text for text in check_data(source(lambda _: actions, 1)) if "jumps by a full turn" in text]

    assert found(places) == []
    wrapped = np.mod(places + np.pi, 2 * np.pi) - np.pi
    (warning,) = found(np.c_[wrapped[:, :6], places[:, 6]])
    assert "mine: roll (" in warning and "gripper" not in warning
    (warning,) = found(np.c_[np.degrees(wrapped[:, :6]), places[:, 6]])
    assert "mine: roll (" in warning
    assert found(np.c_[360 * rng.integers(0, 2, (200, 6)) * 0.5, places[:, 6]]) == []
    assert found(np.c_[places[:, :6], 6.0 * places[:, 6]]) == []  # a gripper of 6 cm


def test_last_actions_that_are_none():
    """A robot of places went to zero at the end of every episode."""
    rng = np.random.default_rng(0)

    def found(last, change=1.0, start=5.0, **options):
        parts = [start + np.cumsum(change * rng.normal(size=(20, 7)), axis=0) for _ in range(4)]
        parts = [rng.normal(size=(20, 7)) for _ in range(4)] if not start else parts
        for part in parts:
            part[:, 6] = np.arange(20) < 10
            part[-1] *= last
        made = [{"actions": part, "instruction": "go"} for part in parts]
        checked = open_source(PythonDataset(made, name="mine"), held_out=0, **options)
        return [text for text in check_data(checked) if "the last action of" in text]

    (warning,) = found(0, change=0.05)
    assert warning.startswith("mine: the last action of 4 of 4 episodes looked at is zero, far from the one before")
    assert not found(1, change=0.05) and not found(0, change=0.05, filters="zero-actions")
    assert not found(0, start=0.0)  # changes: a robot that stops
    there_and_back = np.repeat([[0.5], [-0.5]], 10, axis=0) * np.ones(7)  # at one speed, and stops
    there_and_back[-1] = 0
    made = [{"actions": there_and_back, "instruction": "go"}] * 4
    checked = open_source(PythonDataset(made, name="mine"), held_out=0)
    assert not [text for text in check_data(checked) if "the last action of" in text]


def test_no_motion_that_is_a_motion():
    """A robot that goes forward in all steps: past the end it learned its slowest motion, and not to stand."""
    recorded = [{"actions": 0.02 + 0.01 * np.random.default_rng(0).uniform(size=(20, 2)), "instruction": "go"}]
    chunks = {"held_out": 0, "action_chunk": 4, "gripper_dims": "none"}

    def found(**more):
        made = open_source(PythonDataset(recorded, name="mine"), **chunks, **more)
        return [text for text in check_data(made) if "no motion (0) is not among" in text]

    (warning,) = found(chunk_end="still")
    assert warning.startswith("mine: action[0] (0.0203 to 0.0299), action[1] (")
    assert not found(chunk_end="repeat") and not found(chunk_end="still", absolute_dims="all")
    recorded[0]["actions"] -= 0.0202  # forward alone, and slower than can be told from standing
    assert not found(chunk_end="still")


def test_no_warning_where_all_is_well():
    assert check_data(source()) == []


def test_a_file_that_was_copied(tmp_path):
    """Its episodes counted twice, and held out was what is trained on; also where the statistics are known already."""
    for name in ("pick_up_the_cup_demo", "lift_the_lid_demo"):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for episode in range(2):
                actions = np.random.default_rng([len(name), episode]).uniform(-1, 1, (9, 7))
                file[f"data/demo_{episode}/actions"] = actions
                file[f"data/demo_{episode}/obs/agentview_rgb"] = np.zeros((9, 8, 8, 3), np.uint8)
    shutil.copyfile(tmp_path / "pick_up_the_cup_demo.hdf5", tmp_path / "copy_demo.hdf5")
    with h5py.File(tmp_path / "copy_demo.hdf5", "a") as file:  # other words: another task, maybe
        for episode in file["data"].values():
            episode.attrs["language_instruction"] = "pick up the cup"
    for _ in range(2):
        copies = [text for text in check_data(open_source(tmp_path)) if "have the actions, states and words" in text]
        assert (
            len(copies) == 1 and "2 of 6 episodes have" in copies[0] and "(episode 4 those of 0, counted" in copies[0]
        )


def test_a_split_that_is_a_copy_of_another(tmp_path):
    """Each counts its episodes from 0: a copy under the number of the original was not seen."""
    folder = own_rlds(tmp_path / "own")  # three episodes that are one
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"].append({**info["splits"][0], "name": "val"})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    shutil.copyfile(next(folder.glob("*train*")), folder / "own-val.tfrecord-00000-of-00001")
    found = check_data(open_source(folder, split="train[:1]", cache=False))
    assert any("3 of 4 episodes have the actions, states and words of another one" in text for text in found)


@pytest.mark.parametrize(
    "change, expected",
    [
        (with_column(3, lambda column: 0 * column), "roll never changes"),
        (with_column(6, lambda column: 1 - column), "is the convention inverted"),
        (with_column(6, lambda column: 1 - 2 * column), "lies in -1 to 1"),
        (with_column(0, lambda column: np.r_[9.0, column[1:]] if column.max() > 0.0497 else column), "outliers in x"),
    ],
)
def test_what_looks_wrong_with_the_data(change, expected):
    (found,) = check_data(source(change))
    assert expected in found and found.startswith("mine:")


@pytest.mark.parametrize("normalization", ["bounds", "bounds_q99"])
def test_outliers_of_states(normalization):
    """One value far away, which q01 and q99 clip, takes a number of the state away where min and max are -1 and 1."""
    rng = np.random.default_rng(0)
    actions = np.c_[rng.uniform(-0.05, 0.05, (400, 6)), np.arange(400) < 250]
    state = rng.uniform(-1, 1, (400, 3))
    state[7, 1] = 5000
    data = PythonDataset([{"actions": actions, "state": state, "instruction": "pick up the cup"}], name="mine")
    found = check_data(open_source(data, held_out=0, normalization=normalization))
    assert any("outliers in state[1]" in text and "leave little" in text for text in found) == (
        normalization == "bounds"
    )
    assert len(found) == (normalization == "bounds")


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_gripper_that_never_moves_and_is_not_scaled(value):
    """Training makes 0 of it, closed, whatever it is: of a gripper that was always open the model closes it."""
    recorded = [{"actions": np.c_[np.random.default_rng(0).uniform(-1, 1, (40, 6)), np.full(40, value)],
                 "instruction": "push the cup"}]  # fmt: skip
    (scaled,) = check_data(open_source(PythonDataset(recorded, name="mine"), held_out=0))
    assert "gripper never changes; the model will always give the one value" in scaled
    left = open_source(PythonDataset(recorded, name="mine"), held_out=0, mask="1,1,1,1,1,1,0")
    (found,) = check_data(left)
    assert not left._chunks(left.dataset[0].actions, 1)[..., 6].any()
    assert ("gripper (always 1) never changes by the statistics and is not scaled (mask)" in found) == bool(value)
    assert ("the model will always give 0" in found) == bool(value)


def test_statistics_of_a_gripper_that_never_moved(tmp_path):
    """Of another dataset, given: all that the gripper does would be 0."""
    still = source(with_column(6, lambda column: 0 * column + 1)).statistics
    still["action"]["mask"][6] = False
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": still}))
    recorded = [{"actions": np.c_[np.zeros((40, 6)), np.arange(40) < 25], "instruction": "pick up the cup"}]
    data = PythonDataset(recorded, name="mine")
    found = check_data(open_source(data, held_out=0, statistics=str(tmp_path / "dataset_statistics.json")))
    assert any("gripper (0 to 1) never changes by the statistics" in text for text in found)


@pytest.mark.parametrize("places", [True, False])
def test_positions_that_are_taken_for_changes(places):
    """Of joint positions, as most arms record them, a guard's standstill would be all zeros: a motion."""
    rng = np.random.default_rng(0)

    def episode() -> dict:
        joints = 0.5 + np.cumsum(rng.normal(size=(41, 6)), axis=0) * 0.03
        actions = joints[1:] if places else np.diff(joints, axis=0)
        return {"actions": actions, "state": joints[:-1], "instruction": "pick up the cup"}

    made, options = PythonDataset([episode() for _ in range(5)], name="mine"), {"gripper_dims": "none", "held_out": 0}
    found = check_data(open_source(made, **options))
    assert [text.partition(" follow")[0] for text in found] == (
        ["mine: " + ", ".join(action_names(6))] if places else []
    )
    assert all(text.endswith("--absolute-dims all, or none.") for text in found)
    for said in ("all", "none"):
        assert check_data(open_source(made, **options, absolute_dims=said)) == []


def test_statistics_of_another_dataset():
    now = source().statistics["action"]
    assert check_same_statistics("mine", now, now) == []
    before = {**now, "q99": [*now["q99"][:2], now["q99"][2] * 3, *now["q99"][3:]]}
    (found,) = check_same_statistics("mine", before, now)
    assert "differ in z." in found
    (found,) = check_same_statistics("mine", {**now, "q01": now["q01"][:6]}, now)
    assert "6 dimensions, the data 7" in found


def test_images_that_do_not_fit_the_towers():
    config, processor = (kind.from_pretrained(ROOT) for kind in (OpenVLAConfig, OpenVLAProcessor))
    assert check_images(processor, config) == []
    processor.image_processor.means[0] = [0.5, 0.5, 0.5]
    (found,) = check_images(processor, config)
    assert "mean [0.5, 0.5, 0.5]" in found and "0.485" in found
    processor = OpenVLAProcessor.from_pretrained(ROOT)
    processor.image_processor.input_sizes[1] = [3, 384, 384]
    (found,) = check_images(processor, config)
    assert "384 px" in found


def test_a_wrist_that_is_called_the_scene():
    """Trained with --camera wrist_image, a model was shown the scene in evaluation, and nothing said so."""
    (found,) = check_cameras("mine", "wrist_image", ["primary"])
    assert "from the camera 'wrist_image', on the arm" in found and "--cameras wrist" in found
    for camera, names in (("front", ["primary"]), (None, ["primary"]), ("wrist_image", ["wrist"])):
        assert check_cameras("mine", camera, names) == []


def test_chunks_and_units_that_are_learned_anew():
    """Of a model for ALOHA: a recipe's chunk of 8 in place of 25, q01 and q99 in place of min and max."""
    stats = {"aloha": {"action": {}}}
    before = OpenVLAConfig(action_chunk=25, normalization={"aloha": "bounds"}, norm_stats=stats)
    chunk, units = check_relearned(before, OpenVLAConfig(action_chunk=8), [source()])
    assert "chunks of 25, and learns chunks of 8 now: --chunk 25 keeps" in chunk
    assert units.startswith("mine:") and "--normalization bounds keeps its units" in units
    plain = OpenVLAConfig(norm_stats=stats)
    assert check_relearned(plain, OpenVLAConfig(action_chunk=8), [source()]) == []
    before.normalization = {}
    assert check_relearned(before, OpenVLAConfig(action_chunk=25), [source()]) == []


def test_actions_that_are_not_learned():
    names = action_names(7)
    good = {f"l1_normalized/{name}": 0.004 for name in names}
    assert check_result(good, names) == []
    (found,) = check_result({**good, "l1_normalized/z": 0.02}, names)
    assert "z 0.020" in found and "x 0" not in found and "--rank" in found
    assert "--rank" not in check_result({**good, "l1_normalized/z": 0.02}, names, adapter=False)[0]
