"""Standardisation against what the original pipeline computed (tests/fixtures/README.md), and its properties."""

import json
import pickle
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from openvla.data.oxe.catalog import allocate_threads, load_oxe_datasets, load_oxe_mixtures
from openvla.data.oxe.conversions import (
    binarize_gripper_actions,
    droid_moves,
    euler_from_quaternion,
    invert_gripper_actions,
    rel2abs_gripper_actions,
    relabel_bridge_actions,
    text_from_code_points,
)
from openvla.data.oxe.standardize import STANDARDIZE


FIXTURES = Path(__file__).parent / "fixtures" / "oxe"
DATASETS = sorted(STANDARDIZE)
BRIDGE = ["bridge_dataset", "bridge_orig", "bridge_oxe"]


@cache
def transforms():
    """{dataset: {"in" | "out" | "std": nested dict}}; strings become object arrays of bytes."""
    file = np.load(FIXTURES / "transforms.npz")
    goldens: dict = {}
    for key in file.files:
        if key.endswith((".__offsets__", ".__shape__")):
            continue
        value, name = file[key], key.removesuffix(".__bytes__")
        if name != key:
            offsets, text = file[f"{name}.__offsets__"], value.tobytes()
            value = np.array([text[a:b] for a, b in zip(offsets, offsets[1:])], dtype=object)
        node = goldens
        *parents, leaf = name.split("|")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return goldens


def leaves(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}|") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def mapped(function, tree):
    return {key: mapped(function, value) if isinstance(value, dict) else function(value) for key, value in tree.items()}


def assert_same(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)
        else:
            assert np.array_equal(found[key], value), key


def helper_cases(name):
    file = np.load(FIXTURES / f"{name}.npz")
    return [(file[key], file[f"y{key[1:]}"]) for key in file.files if key.startswith("x")]


# --- Every dataset ---


def test_every_golden_has_a_recipe():
    assert set(DATASETS) == set(transforms())
    assert len(DATASETS) == 73


@pytest.mark.parametrize("name", DATASETS)
def test_standardized_like_the_original(name):
    golden = transforms()[name]
    assert_same(STANDARDIZE[name](golden["in"]), golden["out"])


@pytest.mark.parametrize("name", DATASETS)
def test_input_is_not_modified(name):
    given = transforms()[name]["in"]
    structure, before = mapped(lambda array: None, given), mapped(np.copy, given)
    read_only = mapped(np.copy, given)
    for array in leaves(read_only).values():
        array.flags.writeable = False
    STANDARDIZE[name](read_only)
    STANDARDIZE[name](given)
    assert mapped(lambda array: None, given) == structure
    assert_same(given, before)


@pytest.mark.parametrize("name", DATASETS)
def test_any_number_of_steps(name):
    """A shorter recording gives as many steps with the same columns (Bridge two fewer, never below none)."""
    golden = transforms()[name]
    full = leaves(golden["out"])
    for num_steps in (0, 1, 2, 5):
        standard = STANDARDIZE[name](mapped(lambda array, end=num_steps: array[:end], golden["in"]))
        expected = max(num_steps - 2, 0) if name in BRIDGE else num_steps
        assert leaves(standard).keys() == full.keys(), num_steps
        for key, array in leaves(standard).items():
            assert array.shape == (expected, *full[key].shape[1:]), (key, num_steps)
            assert array.dtype == full[key].dtype, (key, num_steps)


@pytest.mark.parametrize("name", DATASETS)
def test_single_values_may_be_a_column_or_not(name):
    """(T,) and (T, 1) recordings of a value give the same action."""
    golden = transforms()[name]

    def other_form(array):
        if array.dtype == object or array.ndim > 2:
            return array
        return array[:, None] if array.ndim == 1 else array[:, 0] if array.shape[1] == 1 else array

    standard = STANDARDIZE[name](mapped(other_form, golden["in"]))
    np.testing.assert_array_equal(standard["action"], STANDARDIZE[name](golden["in"])["action"])


@pytest.mark.parametrize("name", DATASETS)
def test_unrelated_fields_stay(name):
    given = transforms()[name]["in"]
    steps = np.arange(len(next(iter(leaves(given).values()))))
    standard = STANDARDIZE[name]({**given, "reward": steps, "traj_metadata": {"episode": steps}})
    assert np.array_equal(standard["reward"], steps[1:-1] if name in BRIDGE else steps)
    assert np.array_equal(standard["traj_metadata"]["episode"], standard["reward"])


def test_recipes_reach_other_processes():
    recipes = pickle.loads(pickle.dumps(STANDARDIZE))
    assert recipes.keys() == STANDARDIZE.keys()
    for name, golden in transforms().items():
        assert_same(recipes[name](golden["in"]), golden["out"])


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(KeyError, match="bridge_orig"):
        STANDARDIZE["bridge_origin"]
    with pytest.raises(KeyError, match="fractal20220817_data"):
        load_oxe_datasets()["fractal20220817"]
    with pytest.raises(KeyError, match="oxe_magic_soup_plus"):
        load_oxe_mixtures()["oxe_magic_soup_pluss"]


def test_a_missing_field_is_named_with_those_present():
    given = transforms()["viola"]["in"]
    action = {key.replace("gripper_closedness_action", "gripper_closedness"): v for key, v in given["action"].items()}
    with pytest.raises(KeyError, match="'gripper_closedness_action' is missing in action.*'gripper_closedness'"):
        STANDARDIZE["viola"]({**given, "action": action})


def test_fields_of_different_length_are_named():
    given = transforms()["viola"]["in"]
    action = {**given["action"], "rotation_delta": given["action"]["rotation_delta"][:5]}
    with pytest.raises(ValueError, match="'action/rotation_delta': 5"):
        STANDARDIZE["viola"]({**given, "action": action})


def test_depth_may_be_left_out():
    for name, key in {
        "berkeley_autolab_ur5": "image_with_depth",
        "nyu_franka_play_dataset_converted_externally_to_rlds": "depth",
        "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": "depth_image",
    }.items():
        given = transforms()[name]["in"]
        observation = {field: value for field, value in given["observation"].items() if field != key}
        standard = STANDARDIZE[name]({**given, "observation": observation})
        assert "depth" not in standard["observation"] and "depth_image" not in standard["observation"]
        np.testing.assert_allclose(standard["action"], transforms()[name]["out"]["action"], atol=1e-6)


def test_droid_swaps_its_exterior_views_in_half_of_the_trajectories():
    given = transforms()["droid"]["in"]
    rng = np.random.default_rng(0)
    one, other = (given["observation"][f"exterior_image_{i}_left"] for i in (1, 2))
    swapped = 0
    for _ in range(200):
        observation = STANDARDIZE["droid"](given, rng)["observation"]
        views = [observation[f"exterior_image_{i}_left"] for i in (1, 2)]
        is_swapped = views[0][0] == other[0]
        assert all(np.array_equal(*pair) for pair in zip(views, (other, one) if is_swapped else (one, other)))
        swapped += is_swapped
    assert 70 < swapped < 130
    alone = {key: value for key, value in given["observation"].items() if key != "exterior_image_2_left"}
    assert np.array_equal(
        STANDARDIZE["droid"]({**given, "observation": alone}, rng)["observation"]["exterior_image_1_left"], one
    )


def test_language_table_text():
    def codes(*texts):
        rows = np.zeros((len(texts), 16), np.int32)
        for row, text in zip(rows, texts):
            row[: len(text)] = text
        return rows

    rows = codes([ord(c) for c in "été ✋🏽"], [], [0, 65], [0xD800, 65], [0x110000], list(range(65, 81)))
    assert text_from_code_points(rows).tolist() == [
        "été ✋🏽".encode(),
        b"",
        b"",
        "\ufffdA".encode(),
        "\ufffd".encode(),
        b"ABCDEFGHIJKLMNOP",
    ]


def test_kuka_reads_the_compressed_state():
    given = mapped(lambda array: array[:2], transforms()["kuka"]["in"])
    pose = np.arange(14, dtype=np.float32).reshape(2, 7)
    packed = np.array([zlib.compress(row.tobytes()) for row in pose], dtype=object)
    given["observation"]["clip_function_input/base_pose_tool_reached"] = packed
    standard = STANDARDIZE["kuka"](given)["observation"]["clip_function_input/base_pose_tool_reached"]
    assert np.array_equal(standard, pose)


# --- Grippers, rotations, filters ---


@pytest.mark.parametrize("function", [binarize_gripper_actions, rel2abs_gripper_actions, invert_gripper_actions])
def test_gripper_helpers(function):
    cases = helper_cases(function.__name__)
    assert len(cases) == 50
    for given, expected in cases:
        found = function(given)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(function(given.reshape(-1, 1)), expected.reshape(-1, 1))


@pytest.mark.parametrize("seed", range(20))
def test_gripper_helpers_step_by_step(seed):
    """The same results as a loop over the steps, on values at and around the thresholds."""
    rng = np.random.default_rng(seed)
    choices = np.float32([0, 0.03, 0.05, 0.3, 0.37, 0.95, 0.97, 1, -0.1, 0.1, -0.2, 0.2, -1])
    for num_steps in (1, 2, 3, 30):
        gripper = rng.choice(choices, num_steps)

        binary, carry = [], gripper[-1]
        for value in gripper[::-1]:
            carry = 1.0 if value > np.float32(0.95) else 0.0 if value < np.float32(0.05) else carry
            binary.append(carry)
        np.testing.assert_array_equal(binarize_gripper_actions(gripper), binary[::-1])

        commands = [1.0 if value < np.float32(-0.1) else 0.0 if value > np.float32(0.1) else None for value in gripper]
        first = next((command for command in commands if command is not None), None)
        state, absolute = 1.0 if first is None else 1 - first, []
        for command in commands:
            state = state if command is None else command
            absolute.append(state)
        np.testing.assert_array_equal(rel2abs_gripper_actions(gripper), absolute)


def test_grippers_that_never_settle_or_never_move():
    np.testing.assert_array_equal(binarize_gripper_actions(np.float32([0.5, 0.4, 0.37])), np.float32([0.37] * 3))
    np.testing.assert_array_equal(binarize_gripper_actions(np.float32([0.05, 0.95])), np.float32([0.95] * 2))
    np.testing.assert_array_equal(rel2abs_gripper_actions(np.zeros(3, np.float32)), [1, 1, 1])
    np.testing.assert_array_equal(rel2abs_gripper_actions(np.float32([0.1, -0.1])), [1, 1])
    np.testing.assert_array_equal(rel2abs_gripper_actions(np.float32([0, -1, 0, 1])), [0, 1, 1, 0])


def test_euler_angles_like_the_original():
    file = np.load(FIXTURES / "euler_from_quaternion.npz")
    found = euler_from_quaternion(file["quat_xyzw"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, file["euler"], rtol=0, atol=1e-6)


def test_euler_angles_give_the_rotation_back():
    rng = np.random.default_rng(0)
    quaternions = rng.normal(size=(200, 4))
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    half = euler_from_quaternion(quaternions) / 2
    (sx, sy, sz), (cx, cy, cz) = np.sin(half).T, np.cos(half).T
    rebuilt = np.stack(  # qz * qy * qx
        [
            sx * cy * cz - cx * sy * sz,
            cx * sy * cz + sx * cy * sz,
            cx * cy * sz - sx * sy * cz,
            cx * cy * cz + sx * sy * sz,
        ],
        axis=-1,
    )
    np.testing.assert_allclose(np.abs(np.sum(rebuilt * quaternions, axis=-1)), 1, atol=1e-9)


def test_relabelled_bridge_actions():
    file = np.load(FIXTURES / "relabel_bridge_actions.npz")
    for key in (key for key in file.files if key.startswith("in_action")):
        case = key.removeprefix("in_action")
        given = {"action": file[key], "observation": {"state": file[f"in_state{case}"]}}
        found = relabel_bridge_actions(given)
        np.testing.assert_array_equal(found["action"], file[f"out_action{case}"])
        np.testing.assert_array_equal(found["observation"]["state"], file[f"out_state{case}"])
        assert len(found["action"]) == file[f"out_len{case}"]


def test_droid_frames_without_motion():
    file = np.load(FIXTURES / "droid_zero_action_filter.npz")
    assert np.array_equal(droid_moves(file["normalized_action"])[:, 0], file["keep"])
    still = np.append(file["norm_zero"], np.float32(1))
    assert not droid_moves(still) and not droid_moves(still[None])[0]


# --- Layouts and mixtures ---


@pytest.mark.parametrize("name", [name for name, golden in sorted(transforms().items()) if "std" in golden])
def test_layouts(name):
    """The named cameras exist and the state adds up to the original's proprio."""
    standard = STANDARDIZE[name](transforms()[name]["in"])
    layout = load_oxe_datasets()[name]
    for key in layout.image_obs_keys.values():
        assert key is None or key in standard["observation"]
    assert layout.absolute_action_mask.tolist() == [False] * 6 + [True]
    proprio = layout.proprio(standard)
    assert proprio.dtype == np.float32
    np.testing.assert_allclose(proprio, transforms()[name]["std"]["observation"]["proprio"], rtol=0, atol=1e-6)


def test_joint_actions_are_refused():
    with pytest.raises(ValueError, match="JOINT_POS.*EEF_POS"):
        _ = load_oxe_datasets()["roboset"].absolute_action_mask


def test_mixtures():
    mixtures, layouts = load_oxe_mixtures(), load_oxe_datasets()
    plus, minus = mixtures["oxe_magic_soup_plus"], mixtures["oxe_magic_soup_plus_minus"]
    assert len(mixtures["oxe_magic_soup"]) == 23 and len(plus) == 27 and len(minus) == 25
    assert plus.keys() - minus.keys() == {"language_table", "droid"}
    assert (plus["fractal20220817_data"], minus["fractal20220817_data"]) == (0.54087122203, 1.0)
    assert mixtures["rtx_franka"]["taco_play"] == 2.0  # listed twice: the first counts
    for mixture in mixtures.values():
        assert all(name in STANDARDIZE and name in layouts and weight > 0 for name, weight in mixture.items())
    plus["droid"] = 0.0
    assert load_oxe_mixtures()["oxe_magic_soup_plus"]["droid"] == 0.06


@pytest.mark.parametrize("case", json.loads((FIXTURES / "allocate_threads.json").read_text()), ids=str)
def test_threads_like_the_original(case):
    assert allocate_threads(case["n"], case["weights"]).tolist() == case["allocation"]


@pytest.mark.parametrize("num_datasets", [1, 3, 27, 49])
def test_as_many_threads_as_datasets(num_datasets):
    """Shares that round to just below one thread each."""
    assert allocate_threads(num_datasets, np.ones(num_datasets)).tolist() == [1] * num_datasets


@pytest.mark.parametrize(
    "num_threads, weights, message",
    [(1, [1, 1], "each needs one"), (3, [1, -1], "below zero"), (3, [0, 0], "above it"), (3, [], "above it")],
)
def test_impossible_allocations(num_threads, weights, message):
    with pytest.raises(ValueError, match=message):
        allocate_threads(num_threads, weights)
