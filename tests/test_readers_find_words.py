"""Words wherever a recording keeps them, actions and cameras by key, in every format and at every door; LIBERO's files,
which are upside down; damaged descriptions; objects of one's own that hold something else."""

import json
import warnings
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
from data_files import png, write_lerobot, write_rlds
from typer.testing import CliRunner

from openvla.cli import app
from openvla.data import DamagedDataError, PythonDataset, open_dataset
from openvla.data.formats.hdf5 import control_frequency
from openvla.data.sources import open_source, open_sources
from openvla.files_openvla import LFS_POINTER
from openvla.options.training import FinetuneOptions
from openvla.training import plan_run


LFS = LFS_POINTER.decode() + "v1\noid sha256:" + "a" * 64 + "\nsize 12345678\n"
IMAGE = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")


def steps_of(length=6, **more):
    actions = np.random.default_rng(0).uniform(-0.05, 0.05, (length, 7)).astype(np.float32)
    actions[:, 6] = np.arange(length) % 2
    return [
        {"observation": {"image": png(step, 0)}, "action": actions[step]}
        | {key: value[step] if isinstance(value, list) else value for key, value in more.items()}
        for step in range(length)
    ]


def rlds(folder, feature=None, value=None, metadata=None):
    """Two episodes whose words stand in a feature of each step, or in the metadata of the episode."""
    steps = {"observation": {"image": IMAGE}, "action": tfds.features.Tensor(shape=(7,), dtype=np.float32)}
    if feature is not None:
        steps["language_instruction"] = feature
    more = {} if feature is None else {"language_instruction": value}
    episodes = [steps_of(**more) for _ in range(2)]
    return write_rlds(folder / "words" / "1.0.0", steps, episodes, (2,), metadata=metadata)


def hdf5(folder, attributes=None, of_demo=None, name="task.hdf5", **data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a reader may have it open still
    with h5py.File(path, "w") as file:
        for number in range(2):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.array([step["action"] for step in steps_of()], np.float64)
            group["obs/agentview_rgb"] = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
            for key, value in data.items():
                group[key] = value
            group.attrs.update(of_demo or {})
        file["data"].attrs.update(attributes or {})
    return path


def text_tensor(*shape):
    return tfds.features.Tensor(shape=shape, dtype=np.str_)


STEPWISE = {
    "text": (tfds.features.Text(), "open it"),
    "tensor ()": (text_tensor(), "open it"),
    "tensor (1,)": (text_tensor(1), np.array(["open it"], dtype=object)),
    "tensor (2,)": (text_tensor(2), np.array(["", "open it"], dtype=object)),
}


@pytest.mark.parametrize("case", STEPWISE)
def test_rlds_words_of_steps(tmp_path, case):
    folder = rlds(tmp_path, *STEPWISE[case])
    for options in ({}, {"language_key": "language_instruction"}):
        assert open_dataset(folder, **options)[1].instruction == "open it"
    assert open_source(folder, cache=False).survey.labeled == [6, 6]


def test_rlds_words_of_episodes(tmp_path):
    folder = rlds(tmp_path, metadata={"language_instruction": ["open it", "close it"], "note": ["a", "b"]})
    keys = ("language_instruction", "episode_metadata/language_instruction")
    for key in (None, *keys, "traj_metadata/episode_metadata/language_instruction"):
        assert [e.instruction for e in open_dataset(folder, language_key=key)] == ["open it", "close it"]
    assert open_dataset(folder, language_key="note")[1].instruction == "b"
    with pytest.raises(DamagedDataError, match="no key 'note2'.*traj_metadata/episode_metadata/note"):
        open_dataset(folder, language_key="note2")[0]


WORDS = {
    "problem_info": ({"problem_info": json.dumps({"language_instruction": "open it"})}, {}),
    "its bytes": ({"problem_info": np.bytes_(json.dumps({"language_instruction": ["open it"]}))}, {}),
    "attribute": ({"language_instruction": "open it"}, {}),
    "bytes": ({"language_instruction": np.bytes_(b"open it")}, {}),
    "array": ({"language_instruction": np.array([b"open it"])}, {}),
    "ep_meta": ({}, {"ep_meta": json.dumps({"lang": "open it"})}),
    "of the demonstration": ({"language_instruction": "no"}, {"language_instruction": "open it"}),
}


@pytest.mark.parametrize("case", WORDS)
def test_hdf5_words_of_attributes(tmp_path, case):
    assert open_dataset(hdf5(tmp_path, *WORDS[case]))[1].instruction == "open it"
    assert open_dataset(hdf5(tmp_path, {"say": np.array(["open it"], dtype=object)}), language_key="say")[0].instruction


@pytest.mark.parametrize("value", [b"open it", [b"open it"], [b"open it"] * 6])
def test_hdf5_words_of_data_sets(tmp_path, value):
    assert open_dataset(hdf5(tmp_path, language_instruction=value))[1].instruction == "open it"
    changing = [b"open it"] * 3 + [b"close it"] * 3
    episode = open_dataset(hdf5(tmp_path, words=changing), language_key="words")[0]
    assert episode.step_instructions == ("open it",) * 3 + ("close it",) * 3
    with pytest.raises(DamagedDataError, match="demo_0: the instruction is .*3.0.*, expected text"):
        open_dataset(hdf5(tmp_path, words=3.0), language_key="words")[0]
    with pytest.raises(DamagedDataError, match="no attribute or data set 'wrods'; there are .*'words'"):
        open_dataset(hdf5(tmp_path, words=changing), language_key="wrods")[0]


LIBERO = {
    "problem_info": json.dumps({"language_instruction": "open it"}),
    "bddl_file_name": "libero/libero/bddl_files/libero_goal/open_the_drawer.bddl",
    "env_args": json.dumps({"type": 1, "env_name": "Libero_Tabletop_Manipulation"}),
}


@pytest.mark.parametrize(
    "attributes, turned",
    [
        ({**LIBERO, "macros_image_convention": "opengl", "tag": "libero-v1"}, True),
        ({**LIBERO, "macros_image_convention": np.bytes_(b"opengl")}, True),
        (LIBERO, True),
        ({**LIBERO, "macros_image_convention": "opencv"}, False),
        ({"env_args": json.dumps({"type": 1, "env_name": "Lift", "env_kwargs": {}})}, False),  # robomimic
        ({**LIBERO, "bddl_file_name": ""}, False),  # the recorder of this package
        ({}, False),
    ],
)
def test_files_that_are_upside_down_are_known_by_their_attributes(tmp_path, attributes, turned):
    path = hdf5(tmp_path, attributes)
    stored = h5py.File(path)["data/demo_0/obs/agentview_rgb"][2]
    for given, expected in ((None, turned), (True, True), (False, False)):
        frames = open_dataset(path, rotate_images=given)[0].images["agentview_rgb"]
        np.testing.assert_array_equal(frames[2], stored[::-1, ::-1] if expected else stored)
        np.testing.assert_array_equal(frames[1:][1], frames[2])


@pytest.mark.parametrize("words, read", [('"open it"', "open it"), ('say "hi"', 'say "hi"'), ('"a" and "b"',) * 2])
def test_hdf5_words_in_quotes(tmp_path, words, read):
    """LIBERO puts an instruction in quotes; one that ends with a quoted word lost a mark."""
    assert open_dataset(hdf5(tmp_path, {"language_instruction": words}))[0].instruction == words
    about = {"problem_info": json.dumps({"language_instruction": words})}
    assert open_dataset(hdf5(tmp_path, about))[0].instruction == read


@pytest.mark.parametrize(
    "said", [{"problem_info": json.dumps({"language_instruction": ""})}, {"language_instruction": ""}], ids=str
)
def test_hdf5_words_that_are_said_to_be_none(tmp_path, said):
    """An unlabeled demonstration among others of a file had the words of the file's name, and was trained on."""
    path = hdf5(tmp_path, {}, said, name="open_the_drawer_demo.hdf5")
    with h5py.File(path, "a") as file:
        for name in list(file["data/demo_1"].attrs):
            del file["data/demo_1"].attrs[name]
    assert [episode.instruction for episode in open_dataset(path)] == ["", "open the drawer"]


def test_hdf5_words_of_steps_beside_actions_of_another_name(tmp_path):
    """The first of them stood for all steps."""
    words = np.array([b"open it", b"close it"] * 3, dtype=object)
    path = hdf5(tmp_path, language_instruction=words, commands=np.arange(42.0).reshape(6, 7))
    with h5py.File(path, "a") as file:
        for group in file["data"].values():
            del group["actions"]
    for key in (None, "language_instruction"):
        (episode, _) = open_dataset(path, action_key="commands", language_key=key)
        assert episode.step_instructions == ("open it", "close it") * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"env_kwargs": {"control_freq": 20}}, 20.0),
        ({"env_kwargs": {"control_freq": 0}}, None),
        ({"env_kwargs": {"control_freq": 10**400}}, None),
        ({"env_kwargs": {"control_freq": 1e7}}, None),
        ({"env_kwargs": {"control_freq": float("nan")}}, None),
        ({"env_kwargs": []}, None),
        ([], None),
        (None, None),
    ],
)
def test_hdf5_says_how_many_steps_a_second_has(tmp_path, arguments, expected):
    """As LIBERO, robomimic and the recorder of this package write it."""
    words = {"problem_info": LIBERO["problem_info"]}
    path = hdf5(tmp_path, words if arguments is None else words | {"env_args": json.dumps(arguments)})
    source = open_source(path, held_out=0)
    assert source.dataset.dataset.hz == source.action_spec.hz == expected
    assert open_source(path, held_out=0, hz=7).action_spec.hz == 7
    with h5py.File(tmp_path / "broken.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = "{"
    assert control_frequency(tmp_path / "broken.hdf5") is None


def test_hdf5_depth_is_no_camera(tmp_path):
    depth = {"obs/depth_rgb": np.zeros((6, 8, 8, 3), np.uint8), "obs/d16": np.zeros((6, 8, 8, 1), np.uint16)}
    depth |= {"obs/meters": np.zeros((6, 8, 8, 3), np.float32), "obs/gray": np.zeros((6, 8, 8, 1), np.uint8)}
    path = hdf5(tmp_path, **depth)
    assert list(open_dataset(path)[0].images) == ["agentview_rgb"]
    assert list(open_dataset(path, cameras="depth_rgb")[0].images) == ["depth_rgb"]
    with pytest.raises(DamagedDataError, match="uint16 .6, 8, 8, 1."):
        open_dataset(path, cameras=["d16"])[0]


def test_rlds_depth_is_no_camera(tmp_path):
    features = {
        "observation": {
            "image": IMAGE,
            "depth_image": IMAGE,
            "gray": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "raw": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
            "raw_depth": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
            "bytes": tfds.features.Text(),
        },
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
    }
    pixels = np.zeros((8, 8, 3), np.uint8)
    seen = {"depth_image": png(1, 1), "gray": png(7, 0, mode="L"), "raw": pixels, "raw_depth": pixels, "bytes": "x"}
    episode = [{**step, "observation": {**step["observation"], **seen}} for step in steps_of()]
    folder = write_rlds(tmp_path / "depths" / "1.0.0", features, [episode], (1,))
    assert list(open_dataset(folder)[0].images) == ["image", "raw"]
    assert open_dataset(folder, cameras=["gray"])[0].images["gray"][0][0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("kind", ["hdf5", "rlds", "lerobot"])
def test_a_column_of_zeros_and_keys_in_one_text(tmp_path, kind):
    folder = {"hdf5": hdf5, "rlds": rlds}[kind](tmp_path) if kind != "lerobot" else write_lerobot(tmp_path / "set")
    key = "actions" if kind == "hdf5" else "action"
    plain = open_dataset(folder)[0].actions
    for keys in ([key, None], f"{key}, none", [None, key]):
        actions = open_dataset(folder, action_key=keys)[0].actions
        zero = 0 if keys[0] is None else 7
        assert actions.shape == (6, 8) and not actions[:, zero].any()
        np.testing.assert_array_equal(np.delete(actions, zero, axis=1), plain)
        assert (
            len(open_source(folder, action_key=keys, cache=False, keep_unlabeled=True).statistics["action"]["q01"]) == 8
        )
    with pytest.raises(ValueError, match="names nothing: an action needs at least one key"):
        open_dataset(folder, action_key="none")[0]
    assert open_dataset(folder, state_key="none")[0].state is None


def test_keys_at_every_door(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    path = hdf5(tmp_path, words=b"open it", arm=np.tile(np.arange(6.0)[:, None], (1, 6)), hand=np.arange(6.0) / 5)
    given = {"action_key": "arm,hand", "language_key": "words", "cameras": "agentview_rgb", "state_key": "arm"}
    flags = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", value)]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"mine": {"path": str(path), **given, "rotate_images": True}}))
    (mine,) = open_sources(tmp_path / "mixture.yaml")
    assert mine.dataset[0].instruction == "open it" and mine.statistics["action"]["max"] == [5.0] * 6 + [1.0]
    out = CliRunner().invoke(app, ["stats", str(path), *flags, "--no-rotate-images", "--output", str(tmp_path / "s")])
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path / "s").read_text())["task"]["action"]["max"] == [5.0] * 6 + [1.0]
    policy = "tests/fixtures/tiny-openvla-siglip"
    same = {"output": str(tmp_path / "out"), "model": policy, "strategy": "last_layer"}
    # What the runs need is not counted: half a second each
    monkeypatch.setattr("openvla.training.plan.estimate", lambda *_, **__: SimpleNamespace(describe=lambda: ""))
    plan = plan_run(FinetuneOptions(dataset=str(path), **same, **given))
    assert "2 episodes, 12 steps" in plan and "unlabeled: removed 0 steps\n" in plan
    run = ["finetune", "--dataset", str(path), "--dry-run", *(f"--{key}={value}" for key, value in same.items())]
    out = CliRunner().invoke(app, [*run, *flags])
    assert out.exit_code == 0 and "2 episodes, 12 steps" in out.output
    out = CliRunner().invoke(app, [*run, "--action-key", "arm,foot"])
    assert out.exit_code == 2 and "no key 'foot'" in out.output


def test_damaged_descriptions_are_named(tmp_path):
    for number, text in enumerate(["", "{", LFS, "[]", '{"name": 3}', "{}"]):
        for name in ("dataset_info.json", "features.json"):
            folder = rlds(tmp_path / f"{number}{name}")
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=r"again|expected|git lfs pull") as raised:
                open_dataset(folder)
            assert name in str(raised.value) and str(folder) in str(raised.value)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="dataset_info.json"):
        open_dataset(folder)
    folder = rlds(tmp_path / "pointer")
    next(folder.glob("*.tfrecord*")).write_text(LFS)
    with pytest.raises(DamagedDataError, match="tfrecord-00000-of-00001, record 0: .*git lfs pull"):
        open_dataset(folder)[0]


def test_damaged_hdf5_files_are_named(tmp_path):
    path = hdf5(tmp_path)
    whole = path.read_bytes()
    for content, message in ((LFS.encode(), "git lfs pull"), (b"", "is empty"), (whole[:900], "not a readable HDF5")):
        path.write_bytes(content)
        with pytest.raises(DamagedDataError, match=f"task.hdf5'?.*{message}"):
            open_dataset(path)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][3, 2] = np.inf
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.array([b"no"] * 6)
    for number, message in ((0, "action of step 3 is not finite"), (1, "'actions' is not numbers for each step")):
        with pytest.raises(DamagedDataError, match=f"demo_{number}: {message}"):
            open_dataset(path)[number]
    path.unlink()
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(DamagedDataError, match="no group .data.*--format MODULE:CLASS"):
        open_dataset(path)


def test_actions_of_torch_are_numbers():
    """What learns, and bfloat16, ended in errors of torch; others brought a warning of numpy for each episode."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensor in (torch.ones(2, 7, requires_grad=True), torch.ones(2, 7, dtype=torch.bfloat16)):
            (episode,) = PythonDataset([{"actions": tensor, "state": tensor}])
            assert (episode.actions == GOOD).all() and (episode.state == GOOD).all()


GOOD = np.ones((2, 7))
PICTURES = np.zeros((2, 8, 8, 3), np.uint8)
WRONG = {
    "nothing": ({"actions": None}, "there is no action"),
    "ragged": ({"actions": [[1.0, 2.0], [1.0]]}, "action is not an array of numbers"),
    "nan": ({"actions": GOOD * np.nan}, "action of step 0 is not finite"),
    "none within": ({"actions": [[1.0, None]]}, "action of step 0 is not finite"),
    "texts": ({"actions": [["1"] * 7] * 2}, "action is not an array of numbers: it holds <U1"),
    "complex": ({"actions": GOOD * 1j}, "action is not an array of numbers: it holds complex128"),
    "objects": ({"actions": np.array([{}, {}], dtype=object)}, "action is not an array of numbers"),
    "too large": ({"actions": GOOD * 1e300}, "action of step 0 is not finite"),
    "no dimensions": ({"actions": np.ones((2, 0))}, "its actions have no dimensions"),
    "no steps": ({"actions": np.ones((0, 7))}, "no steps"),
    "deep": ({"actions": np.ones((2, 7, 1))}, "action has shape .2, 7, 1."),
    "one number": ({"actions": 3.0}, r"action has shape \(\)"),
    "state": ({"actions": GOOD, "state": np.ones((3, 2))}, "2 actions, but 3 entries of 'state'"),
    "words": ({"actions": GOOD, "instruction": 7}, "the instruction is 7, expected a text"),
    "nan for words": ({"actions": GOOD, "instruction": [float("nan")] * 2}, "the instruction is nan .float."),
    "few words": ({"actions": GOOD, "instruction": ["a"]}, "2 actions, but 1 entries of 'instruction'"),
    "a list of images": ({"actions": GOOD, "images": [PICTURES]}, "images are list, expected {camera: images}"),
    "no camera": ({"actions": GOOD, "images": {"a": None}}, "camera 'a': expected .*found NoneType"),
    "floats": ({"actions": GOOD, "images": {"a": PICTURES / 255}}, "found float64 .*; colours from 0 to 1 become"),
    "a list of floats": ({"actions": GOOD, "images": {"a": list(PICTURES / 255)}}, "step 0: .*colours from 0 to 1"),
    "channels first": ({"actions": GOOD, "images": {"a": np.zeros((2, 3, 8, 8), np.uint8)}}, "np.moveaxis"),
    "few images": ({"actions": GOOD, "images": {"a": PICTURES[:1]}}, "2 actions, but 1 entries of 'a'"),
    "a gap": ({"actions": GOOD, "images": {"a": [PICTURES[0], None]}}, "camera 'a', step 1: expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_objects_of_ones_own_are_checked(case):
    fields, message = WRONG[case]
    with pytest.raises(DamagedDataError, match=f"mine, episode 1.*{message}"):
        open_dataset([{"actions": GOOD}, fields], name="mine")[1]


def test_objects_that_differ_from_episode_to_episode():
    dataset = open_dataset([{"actions": GOOD, "state": np.ones((2, 3))}, {"actions": GOOD, "state": GOOD}], name="mine")
    assert dataset[0].state.shape == (2, 3)
    with pytest.raises(DamagedDataError, match="mine, episode 1: states have 7 dimensions, those of the dataset 3"):
        dataset[1]
    with pytest.raises(DamagedDataError, match="episode 0: dict.0. raises KeyError.*expected the episodes 0 to 0"):
        open_dataset({"a": {"actions": GOOD}}, name="mine")[0]
    episode = open_dataset([{"actions": GOOD, "instruction": [None, b"go"]}])[0]
    assert episode.step_instructions == ("", "go")
