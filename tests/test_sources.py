"""From raw files to training frames, against the original's whole pipeline (tests/fixtures/README.md)."""

import copy
import json
import pickle
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import yaml
from data_files import jpeg, own_rlds, write_rlds
from tiny import FIXTURES

from openvla import ActionTokenizer, normalize_actions
from openvla.data import Episode, EpisodeDataset, PythonDataset, open_dataset
from openvla.data.collate import ActionCollator
from openvla.data.oxe.conversions import droid_moves, droid_moves_raw
from openvla.data.prepare import open_is_1
from openvla.data.recording import split_boundary
from openvla.data.source import Source
from openvla.data.sources import dataset_places, open_source, open_sources
from openvla.data.survey import cache_folder
from openvla.data.trajectory import chunk_act_obs, relabel_goals
from openvla.options.fields import respelled
from openvla.pixels_openvla import resize_lanczos3


RLDS, GOLDENS, DEMOS = FIXTURES / "oxe_rlds", FIXTURES / "pipeline", FIXTURES / "demos"
DATASETS = ["bridge_orig", "fractal20220817_data", "libero_spatial_no_noops", "metaworld_demo"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def golden(name: str, what: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}__{what}.npz") as file:
        return dict(file)


def texts(arrays: dict[str, np.ndarray], key: str) -> list[str]:
    data, offsets = arrays[f"{key}.__bytes__"].tobytes(), arrays[f"{key}.__offsets__"]
    return [data[a:b].decode() for a, b in zip(offsets, offsets[1:])]


def frames_of(source: Source, **options) -> list[Episode]:
    return [frame for episode in source.dataset for frame in source.frames(episode, **options)]


class Made(EpisodeDataset):
    """Episodes of given actions (T, A)."""

    def __init__(self, parts, instructions=None, states=None, name="made"):
        super().__init__(name)
        self.parts = [np.asarray(part, dtype=np.float32) for part in parts]
        self.instructions, self.states = instructions or ["go"] * len(parts), states

    def __len__(self):
        return len(self.parts)

    def _load(self, index):
        actions = self.parts[index]
        images = {
            name: [np.full((4, 4, 3), step, np.uint8) for step in range(len(actions))] for name in ("front", "wrist")
        }
        state = None if self.states is None else np.asarray(self.states[index], np.float32)
        return Episode(self.instructions[index], actions.copy(), images, state, self.name, index)


def moves(episodes: int, steps: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Actions (steps, 7) with a gripper in {0, 1} that moves."""
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(episodes, steps, 7)).astype(np.float32)
    parts[..., -1] = np.arange(steps) % 2
    return list(parts)


# The whole pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_statistics_of_the_original(name):
    """To the last digit, over all splits and unlabeled episodes; with the states, and without as in its training."""
    for file, options in (("", {"state_key": []}), ("_with_proprio", {})):
        path = GOLDENS / f"{name}__dataset_statistics{file}.json"
        if name == "metaworld_demo":  # has states without a layout that names them
            path, options = GOLDENS / f"{name}__dataset_statistics.json", {}
        expected = json.loads(path.read_text())
        source = open_source(RLDS / name, **options)
        assert source.name == name
        for part in ("action", "proprio"):
            for key in ("mean", "std", "min", "max", "q01", "q99"):
                assert source.statistics[part][key] == expected[part][key], (part, key)
        assert source.statistics["num_transitions"] == expected["num_transitions"] == source.num_transitions
        assert source.statistics["num_trajectories"] == expected["num_trajectories"] == source.num_episodes
        assert source.statistics["action"]["mask"] == [True] * 6 + [False]


@pytest.mark.parametrize("name", DATASETS)
def test_normalized_episodes_of_the_original(name):
    source, arrays = open_source(RLDS / name), golden(name, "episodes3")
    labeled = [(episode, frames) for episode in source.dataset if (frames := list(source.frames(episode)))]
    for number, (episode, frames) in enumerate(labeled[:3]):
        for mode in ("normal", "bounds", "bounds_q99"):
            for part, values in (("action", episode.actions), ("proprio", episode.state)):
                found = normalize_actions(values, source.statistics[part], mode)
                np.testing.assert_allclose(found, arrays[f"{mode}|ep{number}|{part}"], rtol=0, atol=1e-6)
        for part, rows in (("action", [f.actions for f in frames]), ("proprio", [f.state for f in frames])):
            found = np.concatenate(rows)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, arrays[f"bounds_q99|ep{number}|{part}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DATASETS)
def test_transitions_of_the_original(name, tiny_processor):
    """Order, language, actions, tokens and pixels; the prompt is the processor's, in the form of openvla-7b."""
    source, arrays = open_source(RLDS / name), golden(name, "transitions10")
    frames = frames_of(source)[:10]
    assert source.num_transitions == arrays["dataset_len"]
    assert [frame.instruction for frame in frames] == texts(arrays, "language")
    assert [frame.dataset_name for frame in frames] == texts(arrays, "dataset_name")
    actions = np.concatenate([frame.actions for frame in frames])
    np.testing.assert_allclose(actions, arrays["action"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ActionTokenizer(32000).encode(actions), arrays["token_ids"])
    for step, expected in zip(arrays["image_step"], arrays["image"]):
        (images,) = frames[step].images.values()
        difference = np.abs(resize_lanczos3(images[0]).astype(int) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    if tiny_processor.format_prompt("x").startswith("In: "):
        collator = ActionCollator(tiny_processor)
        for frame, prompt in zip(frames, texts(arrays, "prompt")):
            before, after = prompt.split("ACT")
            assert tiny_processor.format_prompt(frame.instruction).strip() == before.strip()
            ids, labels = collator.tokens(frame.instruction, frame.actions[0])
            assert after == "</s>" and sum(label != -100 for label in labels) == 8
            assert ids[-1] == tiny_processor.tokenizer.eos_token_id


def test_frames_hold_one_encoded_image_of_the_main_camera():
    source = open_source(RLDS / "libero_spatial_no_noops")
    assert source.camera == "image"
    frame = frames_of(source)[0]
    assert list(frame.images) == ["image"] and frame.images["image"].encoded[0].startswith(b"\xff\xd8")
    assert len(pickle.dumps(frame)) < len(frame.images["image"].encoded[0]) + 3000
    assert list(frames_of(open_source(RLDS / "libero_spatial_no_noops", camera="wrist"))[0].images) == ["wrist_image"]
    assert list(frames_of(open_source(Made(moves(2)), camera="wrist"))[0].images) == ["wrist"]
    with pytest.raises(ValueError, match="no camera 'wirst'; there are front, wrist"):
        open_source(Made(moves(2)), camera="wirst")
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(frames_of(again)[5].actions, frames_of(source)[5].actions)


def test_frames_of_filtered_episodes_hold_their_own_image_only():
    """Otherwise every frame in a shuffle buffer would keep all images of its episode."""
    actions = np.ones((50, 7))
    actions[3, :6] = 0
    episodes = [{"actions": actions, "instruction": "go", "images": {"front": [jpeg(level) for level in range(50)]}}]
    frames = frames_of(open_source(episodes, filters="zero-actions"))
    assert len(frames) == 49 and len(pickle.dumps(frames[10])) < 3000
    assert int(frames[10].images["front"][0][0, 0, 0]) == 11


def test_frames_of_lists_hold_their_own_image_only():
    """The same of images that stand in a list, which each sample brought along to its worker as well."""
    images = list(np.stack([np.full((64, 64, 3), level, np.uint8) for level in range(50)]))
    episodes = [{"actions": np.ones((50, 7)), "instruction": "go", "images": {"front": images}}]
    frame = frames_of(open_source(episodes))[10]
    (own,) = frame.images["front"]
    assert int(own[0, 0, 0]) == 10 and own.base is None and len(pickle.dumps(frame)) < 15_000


def test_statistics_keep_actions_and_states_only():
    class Watched(Made):
        alive: weakref.WeakSet = weakref.WeakSet()

        def _load(self, index):
            episode = super()._load(index)
            self.alive.add(episode)
            assert len(self.alive) <= 3
            return episode

    assert open_source(Watched(moves(100))).num_episodes == 100


def test_statistics_need_no_images(tmp_path):
    shutil.copytree(DEMOS / "lerobot_video", tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "videos")
    assert open_source(tmp_path / "set").num_episodes == 2


@pytest.mark.parametrize("path", ["rlds/metaworld_demo", "lerobot_video", "lerobot_image", "hdf5"])
def test_every_format(path):
    source = open_source(DEMOS / path, split="val" if "rlds" in path else "train")
    frames = frames_of(source)
    assert len(frames) == source.num_frames == source.num_transitions and source.held_out is None
    assert np.abs(frames[0].actions).max() <= 1 and len(frames[0].images) == 1
    assert frames[0].images[list(frames[0].images)[0]][0].ndim == 3


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, parts", json.loads((GOLDENS / "split_95_boundaries.json").read_text()).items())
def test_the_last_5_percent(count, parts):
    """Where the original leaves one side empty, one episode of five or more is held out, and none of fewer."""
    count, (_, end) = int(count), parts["train"]
    expected = end if end < count else count - 1 if count >= 5 else None
    assert split_boundary(count, 0.05) == expected
    assert split_boundary(count, 0.0) is None


def test_held_out_episodes():
    for count, kept_back in ((4, None), (5, [4]), (10, [9]), (30, [28, 29])):
        source = open_source(Made(moves(count)))
        assert [episode.index for episode in source.dataset] == list(range(count - len(kept_back or [])))
        assert (source.held_out and [episode.index for episode in source.held_out]) == kept_back
        assert source.num_episodes == count
    assert open_source(Made(moves(30)), held_out=0).held_out is None
    assert len(open_source(Made(moves(30)), held_out=0.5).held_out) == 15
    with pytest.raises(ValueError, match="held_out=1.5"):
        open_source(Made(moves(2)), held_out=1.5)


def test_a_val_split_is_held_out_whole():
    source = open_source(RLDS / "bridge_orig")
    assert (len(source.dataset), len(source.held_out)) == (8, 3)
    lengths = [len(episode) for episode in source.held_out]
    assert lengths == [9, 9, 9] and len(list(source.frames(source.held_out[0]))) == 9
    assert open_source(RLDS / "bridge_orig", held_out=0).held_out is None
    assert open_source(RLDS / "bridge_orig", held_out=0).num_episodes == 11
    everything = open_source(RLDS / "bridge_orig", split="all")
    assert (len(everything.dataset), len(everything.held_out)) == (10, 1)
    some = open_source(RLDS / "bridge_orig", split="train[:2]")
    assert (len(some.dataset), len(some.held_out), some.num_episodes) == (2, 3, 5)
    assert open_source(RLDS / "bridge_orig", split="train[:2]", held_out=0).num_episodes == 2


def test_validation_demonstrations_of_hdf5(tmp_path):
    with h5py.File(tmp_path / "open_the_lid_demo.hdf5", "w") as file:
        for number, part in enumerate(moves(6)):
            file[f"data/demo_{number}/actions"] = part
            file[f"data/demo_{number}/obs/agentview_rgb"] = np.zeros((4, 8, 8, 3), np.uint8)
        file["mask/train"], file["mask/valid"] = [b"demo_0", b"demo_2"], [b"demo_1"]
    source = open_source(tmp_path)
    assert (len(source.dataset), len(source.held_out), source.num_episodes) == (2, 1, 6)


def test_parts_share_runs():
    source = open_source(RLDS / "libero_spatial_no_noops")
    assert source.dataset.runs() == [range(0, 19)] and source.held_out.runs() == [range(0, 1)]


# Standardization ------------------------------------------------------------------------------------------------------


def test_standardized_by_folder_or_recorded_name(tmp_path):
    shutil.copytree(RLDS / "bridge_orig", tmp_path / "mine")
    standard = open_source(RLDS / "bridge_orig" / "1.0.0")
    assert standard.standardize == "bridge_orig" and len(standard.dataset[0]) == 9
    assert open_source(tmp_path / "mine").standardize == "bridge_orig"  # recorded under this name
    raw = open_source(tmp_path / "mine", standardize="none")
    assert raw.standardize is None and len(raw.dataset[0]) == 11 and raw.camera is None
    info = tmp_path / "mine" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "bridge_orig"', '"name": "kitchen"'))
    for file in info.parent.glob("*.tfrecord*"):
        file.rename(file.with_name(file.name.replace("bridge_orig", "kitchen")))
    assert open_source(tmp_path / "mine").standardize is None
    named = open_source(tmp_path / "mine", standardize="bridge_orig", name="unnorm")
    assert (named.name, named.dataset[0].dataset_name, named.standardize) == ("unnorm", "unnorm", "bridge_orig")
    assert named.statistics == standard.statistics
    (tmp_path / "mine").rename(tmp_path / "bridge_orig")
    assert open_source(tmp_path / "bridge_orig").name == "bridge_orig"


def test_own_data_under_a_known_name(tmp_path):
    """It is standardized, which inverts the gripper: reports and errors say so, and how to read as recorded."""
    standard = open_source(own_rlds(tmp_path / "libero_spatial_no_noops"))
    assert standard.dataset[0].actions[0, -1] == 0  # as LIBERO's
    assert "standardized as 'libero_spatial_no_noops' (--standardize none reads" in standard.report().splitlines()[0]
    plain = open_source(tmp_path / "libero_spatial_no_noops", standardize="none")
    assert plain.dataset[0].actions[0, -1] == 1 and "standardized" not in plain.report()
    way_out = "standardized as '{}'; standardize='none' .--standardize none. reads as recorded"
    for name, message in (("viola", "'world_vector' is missing in action. It is an array"), ("bc_z", "is missing")):
        with pytest.raises(KeyError, match=f"{way_out.format(name)}.*{message}"):
            open_source(own_rlds(tmp_path / name))
        assert open_source(tmp_path / name, standardize="none").num_episodes == 3
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    other = own_rlds(tmp_path / "utokyo_xarm_pick_and_place_converted_externally_to_rlds", front=image)
    with pytest.raises(ValueError, match="no key .*--standardize none"):  # the action fits, camera or states do not
        frames_of(open_source(other))


def test_standardization_errors():
    with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
        open_source(RLDS / "bridge_orig", standardize="bridge_origin")
    with pytest.raises(ValueError, match="is of an RLDS dataset; 'hdf5' is hdf5"):
        open_source(DEMOS / "hdf5", standardize="bridge_orig")
    with pytest.raises(ValueError, match="its gripper is 1 = open already"):
        open_source(RLDS / "bridge_orig", gripper="open-is-0")
    with pytest.raises(ValueError, match="JOINT_POS.*standardize='none'"):
        open_source(RLDS / "metaworld_demo", standardize="roboset")
    with pytest.raises(ValueError, match="no primary view, only wrist: give camera='wrist'"):
        open_source(RLDS / "metaworld_demo", standardize="nyu_door_opening_surprising_effectiveness")
    with pytest.raises(ValueError, match="an option of HDF5 files"):
        open_source(RLDS / "bridge_orig", rotate_images=True)


@pytest.fixture
def droid(tmp_path) -> Path:
    """Three episodes under the name and with the fields of DROID; every second step of the arm stands still."""
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    vector = {size: tfds.features.Tensor(shape=(size,), dtype=np.float64) for size in (1, 6)}
    steps = {
        "action_dict": {"cartesian_velocity": vector[6], "gripper_position": vector[1]},
        "observation": {
            "cartesian_position": vector[6],
            "gripper_position": vector[1],
            **dict.fromkeys(("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"), image),
        },
        "language_instruction": tfds.features.Text(),
    }
    rng = np.random.default_rng(0)

    def episode(number: int) -> list[dict]:
        return [
            {
                "action_dict": {
                    "cartesian_velocity": rng.normal(size=6) * (step % 2),
                    "gripper_position": np.array([step / 5]),
                },
                "observation": {
                    "cartesian_position": rng.normal(size=6),
                    "gripper_position": rng.normal(size=1),
                    "exterior_image_1_left": jpeg(50),
                    "exterior_image_2_left": jpeg(200),
                    "wrist_image_left": jpeg(0),
                },
                "language_instruction": "" if number == 2 else "go",
            }
            for step in range(6)
        ]

    return write_rlds(tmp_path / "droid" / "1.0.0", steps, [episode(number) for number in range(3)], shards=(3,))


def test_droid(droid):
    source = open_source(droid)
    assert source.standardize == "droid" and source.camera == "exterior_image_1_left"
    assert source.removed == {
        "unlabeled": {"steps": 6, "episodes": 1},
        "standstill": {"steps": 6, "episodes": 0},  # of the two that are left
    }
    frames = frames_of(source)
    assert len(frames) == source.num_frames == 6
    opened = source.dataset[0].actions[[1, 3, 5], -1]
    np.testing.assert_allclose([frame.actions[0, -1] for frame in frames[:3]], opened, atol=1e-6)

    def views(source):
        return [int(episode.images[source.camera][0].mean()) for episode in source.dataset]

    assert views(source) == views(open_source(droid, cache=False)) and set(views(source)) == {33, 133}


def test_droid_stands_still_in_its_own_units():
    with np.load(FIXTURES / "oxe" / "droid_zero_action_filter.npz") as file:
        given, keep = file["normalized_action"], file["keep"]
    assert np.array_equal(droid_moves(given)[:, 0], keep)
    raw = np.zeros((3, 7), np.float32)
    raw[1, 2], raw[2, 6] = 1e-3, 1
    assert droid_moves_raw(raw).tolist() == [False, True, False]


# Gripper --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convention, given, expected",
    [
        ("open-is-1", [0, 0.3, 1], [0, 0.3, 1]),
        ("open-is-0", [0, 0.25, 1.02], [1, 0.75, 0]),
        ("open-is-minus-1", [-1, 0, 1], [1, 0.5, 0]),
        ("open-is-plus-1", [-1, 0, 1], [0, 0.5, 1]),
    ],
)
def test_gripper_conventions(convention, given, expected):
    parts = moves(2, 3)
    for part in parts:
        part[:, -1] = given
    found = open_source(Made(parts), gripper=convention).dataset[1].actions
    np.testing.assert_allclose(found[:, -1], expected, atol=1e-6)
    np.testing.assert_array_equal(found[:, :-1], parts[1][:, :-1])


def test_gripper_mistakes():
    parts = [np.column_stack([np.ones((4, 6)), [-1, 1, -1, 1]])] * 6
    with pytest.raises(ValueError, match="from -1 to 1, which is not 'open-is-0' .0 to 1.*-minus-1.*without --gripper"):
        open_source(Made(parts), gripper="open-is-0")
    with pytest.raises(ValueError, match="Did you mean 'open-is-minus-1'"):
        open_source(Made(parts), gripper="open-is-minus1")
    with pytest.warns(UserWarning, match="goes from -1 to 1. If that is a gripper, say what open means"):
        open_source(Made(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not open_source(Made(parts), gripper="open-is-plus-1").statistics["action"]["mask"][-1]
    assert open_is_1(np.float32([-1, 1]), "open-is-minus-1", "").dtype == np.float32


def test_libero_as_recorded(tmp_path):
    """-1 = open, no-ops, images upside down, as its HDF5 files are."""
    actions = np.zeros((5, 7))
    actions[:, 0], actions[:, -1] = [0.5, 0, 0.1, 0, 0.2], [-1, -1, 1, 1, -1]
    pictures = np.zeros((5, 8, 8, 3), np.uint8)
    pictures[:, 0] = np.arange(5)[:, None, None] + 1
    with h5py.File(tmp_path / "open_the_lid_demo.hdf5", "w") as file:
        for number in range(2):
            file[f"data/demo_{number}/actions"], file[f"data/demo_{number}/obs/agentview_rgb"] = actions, pictures
    source = open_source(tmp_path, gripper="open-is-minus-1", filters="no-ops", rotate_images=True)
    assert source.removed["no-ops"] == {"steps": 4, "episodes": 0}
    frames = list(source.frames(source.dataset[0]))
    assert [frame.actions[0, -1] for frame in frames] == [1, 0, 1]
    assert [frame.images["agentview_rgb"][0][-1, 0, 0] for frame in frames] == [1, 3, 5]


# Filters --------------------------------------------------------------------------------------------------------------


def test_raw_filters_act_before_statistics():
    paused = np.ones((5, 7))
    paused[1:3, :6], paused[4] = 0, [2, 2, 2, 2, 2, 2, 0]
    source = open_source(Made([paused, np.zeros((3, 7)), paused]), filters=["no-ops", "zero-actions"])
    assert source.removed["no-ops"] == {"steps": 7, "episodes": 1}  # 2 in each of two episodes, 3 in the other
    assert source.removed["zero-actions"] == {"steps": 0, "episodes": 0}
    assert (source.num_episodes, source.num_transitions, source.statistics["num_transitions"]) == (2, 6, 6)
    assert source.statistics["action"]["mean"][0] == pytest.approx(4 / 3)
    assert [episode.index for episode in source.dataset] == [0, 2] and len(source.dataset[1]) == 0
    assert "no-ops: removed 7 steps, of these 1 complete episodes" in source.report()
    with pytest.raises(ValueError, match="filter='no-op' is unknown. Did you mean 'no-ops'"):
        open_source(Made([paused]), filters=["no-op"])
    with pytest.raises(ValueError, match="no step is left after the filters .'no-ops'."):
        open_source(Made([np.zeros((3, 7))]), filters="no-ops")


def test_statistics_of_states_that_do_not_fit():
    made = Made(moves(4), ["go"] * 4, np.random.default_rng(1).normal(size=(4, 4, 3)))
    units = open_source(made).statistics
    other = {**units, "proprio": {name: [*units["proprio"][name], 0.5] for name in ("q01", "q99")}}
    with pytest.raises(ValueError, match="states have 3 dimensions, the proprio statistics given 4"):
        open_source(made, statistics=other)
    none = {**units, "proprio": {"q01": [0.0] * 7, "q99": [0.0] * 7}}  # of a recording without states
    for fitting in (units, none, {"action": units["action"]}, {**units, "action_spec": None}):
        open_source(made, statistics=fitting)
    for unsound in ({}, [], 0):  # what null says, they do not
        with pytest.raises(ValueError, match="action_spec"):
            open_source(made, statistics={**units, "action_spec": unsound})


def test_filters_of_normalized_episodes():
    parts, states = moves(40), np.random.default_rng(1).normal(size=(40, 4, 3))
    parts[3][2, 0], states[5, 1, 1] = 60, -70
    made = Made(parts, ["", " ", *["go"] * 38], states)
    source = open_source(made, max_action=5, max_proprio=5.0)
    assert source.removed == {
        "unlabeled": {"steps": 8, "episodes": 2},
        "max_action": {"steps": 4, "episodes": 1},
        "max_proprio": {"steps": 4, "episodes": 1},
    }
    kept = {frame.index for frame in frames_of(source)}
    assert kept == set(range(38)) - {0, 1, 3, 5}  # the last two of 40 are held out
    assert source.num_frames == 4 * 36
    assert open_source(made, keep_unlabeled=True).removed == {}
    with pytest.raises(ValueError, match="(?s)Nothing is left to train on.*max_action: removed 152 steps"):
        open_source(made, max_action=0.01)


def test_options_that_could_do_nothing(tmp_path):
    """They were taken without a word."""
    made = [
        {"actions": part, "instruction": "open it", "images": {"wrist": [jpeg(1)] * 4, "front": [jpeg(2)] * 4}}
        for part in moves(6)
    ]
    data = PythonDataset(made, "made")
    with pytest.warns(UserWarning, match="made: max_proprio=2 drops nothing: there are no states"):
        open_source(data, max_proprio=2.0)
    with pytest.raises(ValueError, match="camera='front' is what a model sees as primary, and this one sees wrist"):
        open_source(data, camera="front", camera_names=["wrist"])
    assert open_source(data, camera="wrist", camera_names=["full_image"]).camera == "wrist"


@pytest.mark.parametrize("folder", ["hdf5", "lerobot_image", "rlds/metaworld_demo"])
@pytest.mark.parametrize(
    "given, message",
    [
        ({"cameras": [0, 1]}, r"cameras=\[0, 1\]: expected a name or a list of names .in YAML a number"),
        ({"cameras": {"primary": 1}}, "or {name here: name in the data}"),
        ({"action_key": 3}, "action_key=3: expected a name or a list of names"),
        ({"state_key": ["state", 7]}, "null among them for zeros"),
        ({"language_key": ["task"]}, r"language_key=\['task'\]: expected a text"),
    ],
)
def test_names_of_another_kind(folder, given, message):
    """As YAML reads them. A TypeError said nothing, or that the recording was to be copied again."""
    with pytest.raises(ValueError, match=message):
        open_source(DEMOS / folder, split="all", **given)


def test_episodes_with_some_instructions_stay():
    class Changing(Made):
        def _load(self, index):
            episode = super()._load(index)
            return Episode(
                "", episode.actions, episode.images, None, "made", index, step_instructions=("", "go", "go", "")
            )

    source = open_source(Changing(moves(1)))
    assert [frame.instruction for frame in frames_of(source)] == ["go", "go"]
    assert source.removed == {"unlabeled": {"steps": 2, "episodes": 0}} and source.num_frames == 2
    kept = open_source(Changing(moves(1)), keep_unlabeled=True)
    assert [frame.instruction for frame in frames_of(kept)] == ["", "go", "go", ""] and kept.num_frames == 4


def test_nothing_labeled_is_an_error():
    with pytest.raises(
        ValueError, match="(?s)Nothing is left.*unlabeled: removed 8 steps.*language_key.*keep_unlabeled"
    ):
        open_source(Made(moves(2), ["", ""]))


# Goals and chunks -----------------------------------------------------------------------------------------------------


def test_chunks_end_with_the_episode():
    parts = moves(3, 5)
    source = open_source(Made(parts), chunk_end="still")
    stats = source.statistics["action"]
    frames = frames_of(source, action_chunk=3)
    assert len(frames) == 15 and frames[0].actions.shape == (3, 7) and len(frames[0].images["front"]) == 1
    for step in range(3):
        np.testing.assert_allclose(frames[step].actions, normalize_actions(parts[0][step : step + 3], stats), atol=1e-6)
    still = np.append(np.zeros(6), parts[0][-1, -1])  # no motion, and the gripper as it is last
    expected = normalize_actions(np.stack([parts[0][-1], still, still]), stats)
    np.testing.assert_allclose(frames[4].actions, expected, atol=1e-6)
    np.testing.assert_array_equal(frames[4].actions[:1], frames_of(source)[4].actions)
    repeated = frames_of(open_source(Made(parts)), action_chunk=3)[4]  # as by default: the last action, not learned
    np.testing.assert_array_equal(repeated.actions, [frames[4].actions[0]] * 3)
    assert repeated.padded == 2
    with pytest.raises(ValueError, match="expected at least 1"):
        frames_of(source, action_chunk=0)


def test_goals_are_drawn_evenly_from_the_steps_to_come():
    steps = np.arange(6)
    trajectory = {
        "action": np.ones((6, 7), np.float32),
        "observation": {"proprio": steps[:, None], "timestep": steps},
        "task": {"language_instruction": np.array([b"go"] * 6, dtype=object)},
    }
    rng = np.random.default_rng(0)
    goals = np.stack([relabel_goals(trajectory, rng)["task"]["goal_timestep"] for _ in range(4000)])
    assert goals.dtype == np.int32
    for step in range(5):
        values, counts = np.unique(goals[:, step], return_counts=True)
        assert values.tolist() == list(range(step + 1, 6))
        np.testing.assert_allclose(counts / 4000, 1 / (5 - step), atol=0.03)
    assert (goals[:, 5] == 5).all()
    found = relabel_goals(trajectory, np.random.default_rng(1))
    assert found["task"]["proprio"][:, 0].tolist() == found["task"]["goal_timestep"].tolist()
    assert found["task"]["language_instruction"][0] == b"go" and "goal_timestep" not in trajectory["task"]
    # the goal does not cut the chunks of actions
    np.testing.assert_array_equal(chunk_act_obs(found, 1, 2)["action"], chunk_act_obs(trajectory, 1, 2)["action"])
    assert chunk_act_obs(found, 1, 2)["action"][:4].all()


# Statistics: kept, or given -------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list:
    """Grows with every pass over a dataset."""
    import openvla.data.open_source as opening

    made, take = [], opening.take_survey
    monkeypatch.setattr(opening, "take_survey", lambda *args: made.append(1) or take(*args))
    return made


def age(folder: Path) -> None:
    """Files that were written just now are looked at again."""
    import os

    for file in folder.rglob("*"):
        os.utime(file, (1e9, 1e9))


def test_statistics_are_kept_by_content(tmp_path, passes, cache):
    shutil.copytree(RLDS / "fractal20220817_data", tmp_path / "here" / "fractal20220817_data")
    folder = tmp_path / "here" / "fractal20220817_data"
    first = open_source(folder)
    assert passes == [1]
    shutil.copytree(folder, tmp_path / "there" / "fractal20220817_data")
    second = open_source(tmp_path / "there" / "fractal20220817_data")
    assert passes == [1] and second.survey == first.survey
    for options in (
        {"state_key": []},
        {"standardize": "none", "action_key": ["action/world_vector", "action/rotation_delta"]},
        {"filters": "no-ops"},
        {"mask": [True] * 7},
        {"on_error": "skip"},
        {"split": "train[:3]"},
    ):
        before = len(passes)
        open_source(folder, **options)
        open_source(folder, **options)
        assert len(passes) == before + 1, options
    before = len(passes)
    open_source(folder, cache=False)
    assert len(passes) == before + 1


def test_what_code_of_the_user_gives_is_read_each_time(tmp_path, passes, monkeypatch):
    """The files are the same where a reader was corrected, or an object reads them with other options."""
    (tmp_path / "scaled_reader.py").write_text(
        "import numpy as np\n"
        "from openvla.data import EpisodeDataset\n"
        "from openvla.data.episode import make_episode\n"
        "SCALE = 1.0\n"
        "class Lines(EpisodeDataset):\n"
        "    def __init__(self, path):\n"
        "        super().__init__('lines')\n"
        "        self.path = path\n"
        "    def __len__(self): return 3\n"
        "    def content_files(self): return {'numbers': self.path}\n"
        "    def _load(self, index):\n"
        "        actions = SCALE * np.loadtxt(self.path).reshape(-1, 7)\n"
        "        fields = dict(dataset_name='lines', index=index, origin='lines', state=None, instructions='go')\n"
        "        return make_episode(actions=actions, images={}, **fields)\n"
    )
    np.savetxt(tmp_path / "numbers.txt", np.linspace(-1, 1, 35).reshape(5, 7))
    monkeypatch.syspath_prepend(tmp_path)
    before = open_source(tmp_path / "numbers.txt", format="scaled_reader:Lines").statistics["action"]["max"]
    monkeypatch.setattr("scaled_reader.SCALE", 0.5)
    after = open_source(tmp_path / "numbers.txt", format="scaled_reader:Lines").statistics["action"]["max"]
    np.testing.assert_allclose(after, np.multiply(0.5, before))
    for key in ("actions", "obs/ee_states"):
        source = open_source(open_dataset(DEMOS / "hdf5", action_key=key))
        own = np.concatenate(
            [episode.actions for episode in open_dataset(DEMOS / "hdf5", "hdf5", "all", action_key=key)]
        )
        np.testing.assert_allclose(source.statistics["action"]["max"], own.max(0))
    assert len(passes) == 4


def rewrite_parquet(folder: Path) -> None:
    file = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    actions = table["action"].to_pylist()
    actions[7][0] += 1e-3
    column = pa.array(actions, type=table.schema.field("action").type)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), table.schema.field("action"), column), file)


def rewrite_hdf5(folder: Path, key: str = "actions") -> None:
    path = next(folder.glob("*.hdf5"))
    shutil.copyfile(path, folder / "new")  # h5py does not write to a file that is open
    with h5py.File(folder / "new", "a") as file:
        values = file[f"data/demo_0/{key}"][()]
        values.reshape(-1)[0] += 1
        file[f"data/demo_0/{key}"][()] = values
    (folder / "new").rename(path)


def rewrite_rlds(folder: Path) -> None:
    from data_files import write_records
    from tensorflow_datasets.proto import tf_example_pb2

    dataset = open_dataset(folder)
    path = dataset.parts[0][0]
    records = [dataset._read(path, number) for number in range(dataset.parts[0][2])]
    example = tf_example_pb2.Example.FromString(records[0])
    example.features.feature["steps/action"].float_list.value[0] += 1
    write_records(path, [example.SerializeToString(), *records[1:]])


@pytest.mark.parametrize(
    "name, rewrite",
    [
        ("demos/lerobot_video", rewrite_parquet),
        ("demos/hdf5", rewrite_hdf5),
        ("oxe_rlds/libero_spatial_no_noops", rewrite_rlds),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_one_other_action_makes_other_statistics(tmp_path, passes, name, rewrite, old):
    folder = tmp_path / Path(name).name
    shutil.copytree(FIXTURES / name, folder)
    if old:
        age(folder)
    before = open_source(folder).statistics
    open_source(folder)
    assert passes == [1]
    rewrite(folder)
    after = open_source(folder).statistics
    assert passes == [1, 1] and after["action"]["mean"][0] != before["action"]["mean"][0]


def test_words_above_the_demonstrations_count(tmp_path, passes):
    """Written into a file whose episodes had none, they were not found: what was known of it had no words."""
    shutil.copytree(DEMOS / "hdf5", tmp_path / "hdf5")
    (path,) = (tmp_path / "hdf5").glob("*.hdf5")
    path = path.rename(path.with_name("unnamed.hdf5"))
    for words in ("lift it", "lower it"):
        shutil.copyfile(path, path.with_suffix(".new"))
        with h5py.File(path.with_suffix(".new"), "a") as file:
            file["data"].attrs.pop("problem_info", None)
            file.attrs["language_instruction"] = words
        path.with_suffix(".new").replace(path)
        assert open_source(path).survey.instructions == [words]


def test_what_lies_in_other_files_is_read_each_time(tmp_path, passes):
    (path,) = (DEMOS / "hdf5").glob("*.hdf5")
    shutil.copyfile(path, tmp_path / "elsewhere.h5.part")
    with h5py.File(tmp_path / path.name, "w") as file:
        file["data"] = h5py.ExternalLink("elsewhere.h5.part", "/data")
    age(tmp_path)
    before = open_source(tmp_path / path.name).statistics["action"]["max"][0]
    with h5py.File(tmp_path / "new", "w") as file:
        with h5py.File(path) as old:
            old.copy("data", file)
        file["data/demo_0/actions"][0, 0] = 9.0
    (tmp_path / "new").replace(tmp_path / "elsewhere.h5.part")
    assert open_source(tmp_path / path.name).statistics["action"]["max"][0] != before
    assert passes == [1, 1]


def test_images_do_not_count(tmp_path, passes):
    shutil.copytree(DEMOS / "hdf5", tmp_path / "hdf5")
    open_source(tmp_path / "hdf5")
    rewrite_hdf5(tmp_path / "hdf5", "obs/agentview_rgb")
    open_source(tmp_path / "hdf5")
    assert passes == [1]


def test_files_are_looked_at_once(tmp_path, monkeypatch):
    shutil.copytree(DEMOS / "lerobot_video", tmp_path / "set")
    age(tmp_path / "set")
    looked, digest = [], EpisodeDataset.content_digest
    monkeypatch.setattr(EpisodeDataset, "content_digest", lambda self, path: looked.append(path) or digest(self, path))
    open_source(tmp_path / "set")
    assert looked and not any("videos" in path.parts for path in looked)
    count = len(looked)
    open_source(tmp_path / "set")
    assert len(looked) == count


def test_a_damaged_cache_is_written_anew(passes, cache):
    good = open_source(DEMOS / "hdf5").survey
    for number, change in enumerate(
        (lambda text: text[:100], lambda text: text.replace("0.", "1.", 1), lambda text: "")
    ):
        (entry,) = cache.glob("survey-*.json")
        entry.write_text(change(entry.read_text()))
        assert open_source(DEMOS / "hdf5").survey == good
        assert len(passes) == number + 2
    assert not list(cache.glob("*.part"))
    assert open_source(DEMOS / "hdf5").survey == good and len(passes) == 4


def test_an_entry_of_something_else_is_not_used(tmp_path, passes, cache):
    """One that was copied under another name, of another form, or of an older version."""
    open_source(DEMOS / "hdf5")
    (entry,) = cache.glob("survey-*.json")
    stored = entry.read_text()
    other = open_source(DEMOS / "hdf5", filters="no-ops").survey
    (second,) = set(cache.glob("survey-*.json")) - {entry}
    second.write_text(stored)
    assert open_source(DEMOS / "hdf5", filters="no-ops").survey == other and len(passes) == 3
    for damaged in ("[]", "null", '{"digest": 1}', "[" * 100_000, '{"digest": "x", "content": {}}'):
        entry.write_text(damaged)
        open_source(DEMOS / "hdf5")
    assert len(passes) == 8


def test_another_file_of_the_same_size_and_time(tmp_path, passes):
    """As a copy that keeps time stamps makes it."""
    import os

    shutil.copytree(DEMOS / "hdf5", tmp_path / "set")
    age(tmp_path / "set")
    before = open_source(tmp_path / "set").statistics
    (file,) = (tmp_path / "set").glob("*.hdf5")
    size = file.stat().st_size
    rewrite_hdf5(tmp_path / "set")
    os.utime(file, (1e9, 1e9))
    assert file.stat().st_size == size
    assert open_source(tmp_path / "set").statistics != before and passes == [1, 1]


def test_two_processes_write_one_cache(cache, tmp_path):
    """Threads here: each entry is complete when it is read, nothing unfinished stays but of a writer at work."""
    from concurrent.futures import ThreadPoolExecutor

    from openvla.data.survey import load_survey, store_survey

    survey = open_source(DEMOS / "hdf5").survey
    entry = f"survey-{'0' * 32}.json"
    (cache / f"{entry}.abandoned.part").write_text("x")
    (cache / "film.part").write_text("the user's, in a folder that OPENVLA_CACHE names")
    age(cache)
    (cache / f"{entry}.at_work.part").write_text("x")

    def work(number):
        store_survey("shared", survey)
        return load_survey("shared") == survey

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert sorted(path.name for path in cache.glob("*.part")) == ["film.part", f"{entry}.at_work.part"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be written.*Set OPENVLA_CACHE"):
        assert open_source(DEMOS / "hdf5").num_episodes == 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("OPENVLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "openvla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "openvla"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home, as in a container
    with pytest.warns(RuntimeWarning, match="/dev/null/openvla cannot be written.*Set OPENVLA_CACHE"):
        assert open_source(DEMOS / "hdf5").num_episodes == 2


def test_folders_that_are_called_as_the_home_of_nobody(tmp_path):
    """A traceback said that there is no home."""
    (tmp_path / "~mine").symlink_to(DEMOS / "hdf5")
    (tmp_path / "mine.yaml").write_text("one: {path: ~mine}\ntwo: {path: ~mine, statistics: ~none.json}\n")
    with pytest.raises(FileNotFoundError, match="'two': No JSON file at '~none.json'"):
        open_sources(tmp_path / "mine.yaml")


def test_given_statistics(tmp_path):
    made = Made(moves(6))
    own = open_source(made).statistics
    given = copy.deepcopy(own)
    given["action"]["q99"] = [9.0] * 7
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"made": given, "other": own}))
    arrays = {"action": {name: np.array(values) for name, values in given["action"].items()}}
    for form in (tmp_path / "dataset_statistics.json", {"made": given}, given, arrays):
        source = open_source(made, statistics=form)
        assert source.statistics["action"]["q99"] == [9.0] * 7 and source.num_transitions == 24
        np.testing.assert_allclose(
            frames_of(source)[0].actions[0], normalize_actions(made.parts[0][0], given["action"]), atol=1e-6
        )
    for form, error, message in (
        (tmp_path / "missing.json", FileNotFoundError, "missing.json"),
        ({"maid": given}, KeyError, "of maid, not of 'made'. Did you mean 'maid'"),
        ({"made": {"action": {"q01": [0.0]}}}, ValueError, "q99 missing"),
        (
            {"made": {"action": {"q01": [0.0], "q99": [1.0]}}},
            ValueError,
            "actions have 7 dimensions, the statistics given 1",
        ),
        (7, ValueError, "got int"),
    ):
        with pytest.raises(error, match=message):
            open_source(made, statistics=form)
    with pytest.raises(ValueError, match="a mask of their own"):
        open_source(made, statistics=given, mask=[True] * 7)
    assert open_source(made, statistics={"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}).num_frames == 24


# What a user may write ------------------------------------------------------------------------------------------------


def test_a_name_under_a_data_root_is_no_folder_of_that_name_somewhere_else(tmp_path, monkeypatch):
    """As in a mixture: a checkout of code that is called like the dataset would be read in its place."""
    for folder in ("here/robot", "data/robot", "here/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    root = tmp_path / "data"
    assert dataset_places("robot", root) == [root / "robot"]
    assert dataset_places("robot") == [Path("robot")]
    assert dataset_places("other", root) == [Path("other")]
    assert dataset_places(tmp_path / "here/robot", root) == [tmp_path / "here/robot"]


def test_a_mixture_under_a_data_root():
    sources = open_sources("bridge_orig:1.0,fractal20220817_data:0.54", data_root=RLDS)
    assert [(source.name, source.weight) for source in sources] == [
        ("bridge_orig", 1.0),
        ("fractal20220817_data", 0.54),
    ]
    assert [source.num_transitions for source in sources] == [85, 78]
    named = open_sources("bridge_rt_1", data_root=RLDS)
    assert [source.name for source in named] == ["bridge_orig", "fractal20220817_data"]
    (one,) = open_sources("bridge_orig", data_root=RLDS)
    assert one.standardize == "bridge_orig"


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMOS / "hdf5", tmp_path / "bridge")  # also the name of a mixture
    (source,) = open_sources("bridge")
    assert source.num_episodes == 2 and source.standardize is None
    (source,) = open_sources("bridge", data_root=tmp_path)
    assert source.num_episodes == 2


def test_a_file_of_ones_own(tmp_path):
    shutil.copytree(DEMOS / "lerobot_video", tmp_path / "sets" / "kitchen")
    (tmp_path / "mine.yaml").write_text(
        "kitchen:\n  path: sets/kitchen\n  weight: 0.5\n  camera: wrist_image\n  filters: no-ops\n"
        f"my_bridge: {{path: {RLDS / 'bridge_orig'}, held_out: 0}}\n"
        f"{DEMOS / 'hdf5'}: 2\n"
    )
    sources = open_sources(tmp_path / "mine.yaml", keep_unlabeled=True)
    assert [(source.name, source.weight) for source in sources] == [("kitchen", 0.5), ("my_bridge", 1.0), ("hdf5", 2.0)]
    assert sources[0].camera == "wrist_image" and "no-ops" in sources[0].removed
    assert sources[1].standardize == "bridge_orig" and sources[1].held_out is None
    assert all(source.keep_unlabeled for source in sources)
    assert next(iter(sources[1].frames(sources[1].dataset[0]))).dataset_name == "my_bridge"


def test_datasets_of_a_mixture_share_units(tmp_path):
    """Recordings of one robot, as of a student: by its own statistics the same motion would be another number."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"driven: {{path: {DEMOS / 'lerobot_video'}, statistics: shown}}\nshown: {{path: {DEMOS / 'hdf5'}}}\n"
    )
    driven, shown = open_sources(file)
    assert [driven.name, shown.name] == ["driven", "shown"]  # in their order, though the second was opened first
    assert driven.statistics == {part: shown.statistics[part] for part in ("action", "proprio")}
    assert driven.survey.statistics["action"]["q99"] != shown.statistics["action"]["q99"]
    (tmp_path / "of_others.json").write_text(json.dumps({"driven": shown.statistics}))
    file.write_text(f"driven: {{path: {DEMOS / 'lerobot_video'}, statistics: of_others.json}}\n")
    assert open_sources(file)[0].statistics["action"] == shown.statistics["action"]  # beside the file that names it
    shown_here = f"shown: {{path: {DEMOS / 'hdf5'}, normalization: bounds}}\n"
    file.write_text(f"driven: {{path: {DEMOS / 'lerobot_video'}, statistics: shown}}\n{shown_here}")
    assert [source.normalization for source in open_sources(file)] == ["bounds"] * 2  # min and max in both
    learned = open_sources(file, normalization={"driven": "bounds_q99"})
    assert [source.normalization for source in learned] == ["bounds"] * 2
    file.write_text(
        f"driven: {{path: {DEMOS / 'lerobot_video'}, statistics: shown, normalization: bounds_q99}}\n{shown_here}"
    )
    with pytest.raises(ValueError, match="'driven': normalization: bounds_q99: .* those of 'shown', whose -1 and 1"):
        open_sources(file)
    for lenders, said in (
        ("{a: a}", "'a': statistics: a: that dataset has not its own"),
        ("{a: b, b: c}", "'a': statistics: b: that dataset has not its own, but those of 'c'"),
    ):
        entries = {
            name: {"path": str(DEMOS / of)} for name, of in zip("abc", ("hdf5", "lerobot_video", "lerobot_image"))
        }
        for name, lender in yaml.safe_load(lenders).items():
            entries[name]["statistics"] = lender
        file.write_text(yaml.safe_dump(entries))
        with pytest.raises(ValueError, match=said):
            open_sources(file)


def test_what_numbers_mean_is_shared_with_their_units(tmp_path):
    """Statistics alone were: places of the one dataset were changes of no known unit in the other."""
    file, said = tmp_path / "mine.yaml", "absolute_dims: all, frame: joints, unit: radians, hz: 3"
    for own, unit in (("", "radians"), (", unit: degrees", "degrees")):
        file.write_text(
            f"driven: {{path: {DEMOS / 'lerobot_video'}, statistics: shown{own}}}\n"
            f"shown: {{path: {DEMOS / 'hdf5'}, {said}}}\n"
        )
        driven, shown = open_sources(file)
        one = driven.action_spec
        assert one == replace(shown.action_spec, names=one.names, unit=unit, hz=one.hz) and driven.hz != shown.hz
    file.write_text(file.read_text().replace(", unit: degrees", ", absolute_dims: 6"))
    with pytest.raises(ValueError, match="'driven': statistics: shown: an action there is x .a place.*, and here x, y"):
        open_sources(file)


def test_datasets_that_cannot_be_trained_on_are_left_out(tmp_path):
    for name in ("roboset", "nyu_door_opening_surprising_effectiveness", "bridge_orig"):
        shutil.copytree(RLDS / "bridge_orig", tmp_path / name)
    text = "roboset,nyu_door_opening_surprising_effectiveness,bridge_orig"
    with pytest.warns(UserWarning) as caught:
        (source,) = open_sources(text, data_root=tmp_path)
    said = [str(warning.message) for warning in caught if "left out of the mixture" in str(warning.message)]
    assert "JOINT_POS" in said[0] and "no primary view" in said[1] and source.name == "bridge_orig"
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no dataset that can be trained on"):
        warnings.simplefilter("ignore")
        open_sources("roboset:1,nyu_door_opening_surprising_effectiveness:2", data_root=tmp_path)


def test_mistakes_of_users(tmp_path):
    for specification, error, message in (
        ("bridge_orgi", FileNotFoundError, "looked for .*bridge_orgi.*Did you mean 'bridge_orig'.*data_root"),
        ("bridge_orig", FileNotFoundError, "neither a dataset .*data_root=that folder"),
        ("lerobot/pusht", FileNotFoundError, "hf download lerobot/pusht --repo-type dataset --local-dir FOLDER"),
        ("bridge_rt_1", FileNotFoundError, "are not there: bridge_orig, fractal.*Give data_root"),
        ("roboste:1,b:1", FileNotFoundError, "Did you mean 'roboset'"),
        ("my_robot:1,b:1", FileNotFoundError, r"my_robot, [^ ]*b\. Give data_root"),  # a name of one's own
        ("a:1,b:many", ValueError, "expected a number"),
        (tmp_path / "missing.yaml", FileNotFoundError, "missing.yaml"),
        ("x" * 300 + ":1", FileNotFoundError, "are not there"),
        (7, ValueError, "an object with __len__"),
    ):
        with pytest.raises(error, match=message):
            open_sources(specification)
    with pytest.raises(FileNotFoundError, match="data_root='.*nowhere' is no folder"):
        open_sources("bridge", data_root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No option is called 'heldout'. Did you mean 'held_out'"):
        open_sources(RLDS / "bridge_orig", heldout=0.1)
    for entry, message in (
        ("path: 5", "mine.yaml, 'a': path: 5: expected text"),
        ("action_chunk: 8", "'action_chunk' of 'a': one model"),
        ("path: ., statistics: nope.json", "mine.yaml, 'a': No JSON file at 'nope.json'"),
    ):
        (tmp_path / "mine.yaml").write_text(f"a: {{{entry}}}\n".replace("path: .", f"path: {DEMOS / 'hdf5'}"))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_sources(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(f"a: {{path: {DEMOS / 'hdf5'}, wieght: 2}}\n")
    with pytest.raises(ValueError, match="No option of 'a' is called 'wieght'. Did you mean 'weight'") as misspelled:
        open_sources(tmp_path / "mine.yaml")
    told = respelled(str(misspelled.value), {"held_out": "--held-out"})  # as the command line tells it
    assert "'held_out'" in told and "--held-out" not in told
    (tmp_path / "mine.yaml").write_text(f"a: {{path: {DEMOS / 'hdf5'}, name: b}}\nb: {{path: {DEMOS / 'hdf5'}}}\n")
    with pytest.raises(ValueError, match="several datasets called b"):
        open_sources(tmp_path / "mine.yaml")
    steps = {"action": tfds.features.Tensor(shape=(5,), dtype=np.float32), "language_instruction": tfds.features.Text()}
    episode = [{"action": np.ones(5, np.float32), "language_instruction": "go"}]
    write_rlds(tmp_path / "five" / "1.0.0", steps, [episode], shards=(1,))
    with pytest.raises(ValueError, match="'five': 5, 'metaworld_demo': 7"):
        open_sources(f"{tmp_path / 'five'}:1,{RLDS / 'metaworld_demo'}:1")
    with pytest.raises(ValueError, match="name='x' is for one dataset"):
        open_sources("bridge_rt_1", data_root=RLDS, name="x")
    with pytest.raises(ValueError, match="an object in Python"):
        open_sources(Made(moves(2)), action_key="act")


def test_a_python_object():
    (source,) = open_sources(Made(moves(6), name="robot"), name="mine")
    assert source.name == "mine" and frames_of(source)[0].dataset_name == "mine"
    assert [len(episode) for episode in source.everything[0]] == [4] * 6
