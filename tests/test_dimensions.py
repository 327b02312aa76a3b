"""Every dimension of an action that moves comes back from statistics, tokens and units, whatever the embodiment."""

import warnings

import numpy as np
import pytest

from openvla import ActionTokenizer, normalize_actions
from openvla.action_tokenizer import unnormalize_actions
from openvla.data import DamagedDataError, PythonDataset
from openvla.data.dimensions import (
    default_grippers,
    default_mask,
    dimension_names,
    loses_rare_values,
    parse_grippers,
    parse_mask,
)
from openvla.data.source import statistics_with_spec
from openvla.data.sources import open_source
from openvla.data.statistics import compute_statistics
from openvla.training.checks import check_data


TOKENIZER = ActionTokenizer(32000)
EMBODIMENTS = {
    "six joints": ["joint"] * 6,
    "pose and gripper": ["pose"] * 6 + ["gripper"],
    "seven joints": ["joint"] * 7,
    "seven joints and a gripper in percent": ["joint"] * 7 + ["percent"],
    "seven joints and a finger in metres": ["joint"] * 7 + ["finger"],
    "two arms": (["joint"] * 6 + ["gripper"]) * 2,
    "base and arm": ["pose"] * 6 + ["gripper", "velocity"],
    "gripper of -1 and 1": ["pose"] * 6 + ["signed"],
}
LEVELS = {"gripper": (0, 1), "percent": (0, 100), "signed": (-1, 1)}


def column(kind: str, steps: int, rng: np.random.Generator, rare: bool) -> np.ndarray:
    if kind in LEVELS:
        low, high = LEVELS[kind]
        if rare:
            values = np.full(steps, high)
            start = int(rng.integers(steps - 6))
            values[start : start + max(2, steps // 200)] = low
            return values
        return np.where(np.arange(steps) < rng.integers(steps // 4, 3 * steps // 4), high, low)
    if kind == "finger":
        return rng.uniform(0, 0.04, steps)
    if kind == "velocity" and rare:
        values = np.zeros(steps)
        start = int(rng.integers(steps - 6))
        values[start : start + max(2, steps // 200)] = rng.uniform(0.2, 0.5)
        return values
    return rng.uniform(-0.05, 0.05, steps) if kind == "pose" else rng.normal(0, rng.uniform(0.1, 2), steps)


def recorded(kinds: list[str], seed: int, rare: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = [
        np.stack([column(kind, steps, rng, rare) for kind in kinds], axis=1) for steps in rng.integers(350, 450, size=4)
    ]
    return [part.astype(np.float32) for part in parts]


def there_and_back(actions: np.ndarray, stats: dict) -> np.ndarray:
    return unnormalize_actions(TOKENIZER.decode(TOKENIZER.encode(normalize_actions(actions, stats))), stats)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rare", [False, True], ids=["often", "rarely"])
@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_what_was_recorded_comes_back(embodiment, rare, seed):
    parts = recorded(EMBODIMENTS[embodiment], seed, rare)
    actions = np.concatenate(parts).astype(np.float64)
    stats = compute_statistics(parts)["action"]
    back = there_and_back(actions, stats)
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    mask = np.asarray(stats["mask"])
    inside = np.where(mask, np.clip(actions, low, high), np.clip(actions, -1, 1))
    half_a_bin = np.where(mask, (high - low) / 255 / 2, 1 / 255)
    assert (abs(back - inside) <= half_a_bin * 1.01 + 1e-6).all()
    for dim, kind in enumerate(EMBODIMENTS[embodiment]):
        values = actions[:, dim]
        assert len(np.unique(back[:, dim])) >= min(len(np.unique(values)), 100), kind
        if kind in LEVELS or kind == "velocity":  # few levels, of which none may be lost
            width = (values.max() - values.min()) / 100
            assert (abs(back[:, dim] - values) <= width).mean() > (0.9 if kind == "velocity" else 0.999)
            assert abs(back[:, dim].min() - values.min()) <= width or kind == "velocity" and not rare


def test_the_convention_of_the_original_stays():
    parts = recorded(EMBODIMENTS["pose and gripper"], 0, False)
    stats = compute_statistics(parts)["action"]
    assert stats["mask"] == [True] * 6 + [False]
    values = np.concatenate(parts)
    np.testing.assert_allclose(stats["q99"], np.quantile(values.astype(float), 0.99, axis=0), rtol=1e-6)
    continuous = np.concatenate(parts)
    continuous[:, 6] = np.random.default_rng(0).uniform(0, 1, len(continuous))
    assert default_mask(continuous) == [True] * 6 + [False]


@pytest.mark.parametrize(
    "dims, values, scaled",
    [
        (6, (0, 0.02), True),  # a last joint, a finger's width
        (8, (0, 0.04), True),
        (7, (0.2, 0.6), True),  # a seventh joint that stays within
        (8, (0, 1), True),  # continuous: no gripper of two states
        (14, (-1, 1), True),
    ],
)
def test_a_last_dimension_that_is_no_gripper_is_scaled(dims, values, scaled):
    actions = np.random.default_rng(0).uniform(*values, size=(600, dims)).astype(np.float32)
    stats = compute_statistics([actions])["action"]
    assert stats["mask"][-1] is scaled
    assert all(len(np.unique(column)) > 200 for column in there_and_back(actions, stats).T)


def test_outliers_are_clipped_as_before():
    """Quantiles stay where single steps lie far away, however far; also where many values do."""
    values = np.random.default_rng(0).uniform(-0.05, 0.05, (4000, 2)).astype(np.float32)
    values[1000, 0], values[2000, 0] = 100, -100
    values[::500, 1] = 9
    stats = compute_statistics([values])["action"]
    assert max(map(abs, stats["q01"] + stats["q99"])) < 0.05
    held = values.copy()
    held[1000:1010, 0] = 100  # ten steps on end are no outlier
    assert loses_rare_values(held, stats["q01"], stats["q99"]).tolist() == [True, False]


def test_one_far_value_does_not_make_the_others_look_still():
    values = np.random.default_rng(0).uniform(-0.05, 0.05, (4000, 1)).astype(np.float32)
    values[1000] = 9e5
    stats = compute_statistics([values])["action"]
    assert max(map(abs, stats["q01"] + stats["q99"])) < 0.05


def test_what_statistics_cannot_hold_is_an_error_of_its_step():
    """A result with such statistics would be refused when it is loaded."""

    def far(actions):
        actions[7, 2] = 2e6
        return actions

    with pytest.raises(
        DamagedDataError, match=r"mine, episode 0: action\[2\] of step 7 is 2e\+06, and nothing above 1e"
    ):
        open_source(episodes(far))
    parts = [{**part, "state": np.full((len(part["actions"]), 2), 1.7e9)} for part in episodes().episodes]
    with pytest.raises(DamagedDataError, match=r"state\[0\] of step 0 .*--state-key none"):
        open_source(PythonDataset(parts, "mine"))
    good, bad = episodes().episodes[:2], episodes(far).episodes[0]
    with pytest.warns(RuntimeWarning, match="1 skipped"):
        assert open_source(PythonDataset([bad, *good], "mine", on_error="skip"), on_error="skip").num_episodes == 2


def test_published_statistics_stay_those_of_the_original():
    values = np.zeros((1000, 7), np.float32)
    values[:5, 4] = 0.03
    assert compute_statistics([values])["action"]["q99"][4] == pytest.approx(0.03)
    assert compute_statistics([values], published=True)["action"]["q99"][4] == 0


def test_states_keep_rare_values_too():
    states = np.ones((1000, 2), np.float32)
    states[10:14, 1] = 0
    stats = compute_statistics([np.zeros((1000, 7), np.float32)], [states])["proprio"]
    assert (stats["q01"], stats["q99"]) == ([1, 0], [1, 1])
    assert normalize_actions(states, stats)[10:12, 1].tolist() == [-1, -1]


# What a user says about them ------------------------------------------------------------------------------------------


def episodes(change=lambda actions: actions, dims: int = 14, count: int = 3) -> PythonDataset:
    parts = recorded((["joint"] * 6 + ["gripper"]) * 2, 0, False)[:count]
    return PythonDataset([{"actions": change(part[:, -dims:].copy()), "instruction": "go"} for part in parts], "mine")


def test_names_of_lerobot():
    def names(given, width=2):
        return dimension_names({"action": {"shape": [width], "names": given}}, ["action"])

    assert names(["x", "gripper"]) == names({"motors": ["x", "gripper"]}) == names({"x": 0, "gripper": 1})
    assert names(None) is names(["x"]) is names(["x", "x"]) is names({"a": ["x"], "b": ["y"]}) is None
    assert dimension_names({"a": {"shape": [1], "names": ["x"]}}, ["a", None]) is None
    # In the order of their numbers, whoever sorted the file by names: the gripper was looked for among the others.
    assert dimension_names({"action": {"shape": [3], "names": {"gripper": 2, "x": 0, "y": 1}}}, ["action"]) == [
        "x",
        "y",
        "gripper",
    ]
    assert names({"x": 0, "y": 0}) is names({"x": 0, "y": 5}) is None
    assert names({"gripper": 2, "x": 1}) == ["x", "gripper"]  # numbers of motors
    assert names({"motors": ["x", "gripper"], "version": 2}) == ["x", "gripper"]
    assert default_grippers(8, ["left_gripper", *"abcdef", "right_gripper"]) == (0, 7)
    assert default_grippers(8) == default_grippers(8, list("abcdefgh")) == (7,)
    assert default_grippers(14) == (6, 13) and default_grippers(1) == ()


@pytest.mark.parametrize(
    "given, expected", [("6,13", (6, 13)), ("-1", (-1,)), ("none", ()), ([], ()), (6, (6,)), ([6, 13], (6, 13))]
)
def test_gripper_dims(given, expected):
    assert parse_grippers(given) == expected


def test_options_that_name_no_dimension():
    for given in ("six", "", "6,", [6.5], [True], {"a": 1}):
        with pytest.raises(ValueError, match="gripper_dims"):
            parse_grippers(given)
    assert parse_mask("1,0,true,F") == parse_mask([1, 0, True, False]) == [True, False, True, False]
    for given in ("", "2,1", "1,,0", [None, 1], 1, []):
        with pytest.raises(ValueError, match="mask"):
            parse_mask(given)
    with pytest.raises(ValueError, match="gripper_dims=14, but actions have 14 dimensions .0 to 13."):
        open_source(episodes(), gripper_dims="6,14")
    with pytest.raises(ValueError, match="gripper_dims says that there is none"):
        open_source(episodes(), gripper_dims="none", gripper="open-is-0")
    with pytest.raises(ValueError, match="mask has 7 entries, actions have 14 dimensions: give one for each"):
        open_source(episodes(), mask="1,1,1,1,1,1,0")

    def percent(actions):
        actions[:, -1] *= 100
        return actions

    with pytest.raises(ValueError, match=r"mask leaves gripper as recorded, from 0 to 100, but only -1 to 1"):
        open_source(episodes(percent, dims=7), mask="1,1,1,1,1,1,0")


def test_grippers_by_statistics_are_those_that_a_convention_and_filters_are_about():
    """The last number was converted, and another one said to be the gripper."""

    def made(actions):
        actions[:, 0] = np.where(actions[:, -1] > 0.5, -1, 1)
        actions[:, 1:] = np.where(np.arange(len(actions)) % 2, 0.5, -0.5)[:, None]
        actions[3, 1:] = 0
        actions[3, 0] = actions[2, 0]
        return actions

    said = {"gripper": "open-is-minus-1", "filters": ["no-ops"]}
    source = open_source(episodes(made, dims=7), gripper_dims="0", **said)
    other = open_source(episodes(made, dims=7), statistics=statistics_with_spec(source), name=source.name, **said)
    assert other.grippers == (0,) and {*other.actions()[:, 0]} == {0, 1} and {*other.actions()[:, 6]} == {-0.5, 0.5}
    np.testing.assert_array_equal(other.actions(), source.actions())


def test_two_grippers():
    source = open_source(episodes())
    assert source.grippers == (6, 13)
    assert [dim for dim, scaled in enumerate(source.statistics["action"]["mask"]) if not scaled] == [6, 13]
    assert check_data(source) == []
    assert open_source(episodes(), gripper_dims="13").statistics["action"]["mask"][6]
    assert open_source(episodes(), gripper_dims="none").statistics["action"]["mask"] == [True] * 14
    plain, turned = open_source(episodes()).dataset[0], open_source(episodes(), gripper="open-is-0").dataset[0]
    np.testing.assert_allclose(turned.actions[:, [6, 13]], 1 - plain.actions[:, [6, 13]])
    np.testing.assert_array_equal(np.delete(turned.actions, [6, 13], 1), np.delete(plain.actions, [6, 13], 1))


def signed(actions):
    """Two arms of seven joints and a gripper of -1 (open) and 1."""
    return np.column_stack([actions[:, :6], actions[:, :1], 1 - 2 * actions[:, 6]] * 2)


def test_two_arms_of_seven_joints():
    source = open_source(episodes(signed), gripper="open-is-minus-1")
    assert source.grippers == (7, 15) and not np.array(source.statistics["action"]["mask"])[[7, 15]].any()
    assert set(np.unique(source.dataset[0].actions[:, [7, 15]])) == {0, 1}


def test_a_convention_that_does_not_fit():
    """0 and 1 read as -1 and 1 would be half open and closed; a gripper in the middle would stay as it was."""
    with pytest.warns(
        UserWarning, match=r"read as 'open-is-minus-1', the gripper goes from 0 to 0.5, where 0 is closed"
    ):
        open_source(episodes(dims=7), gripper="open-is-minus-1")

    def middle(actions):
        return np.column_stack([actions[:, :3], 1 - 2 * actions[:, 6], actions[:, 3:6], 1 - 2 * actions[:, 6]])

    with pytest.warns(UserWarning, match=r"action\[3\] looks like a gripper as well.* --gripper-dims 3,7, or 7"):
        open_source(episodes(middle, dims=7), gripper="open-is-minus-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(episodes(middle, dims=7), gripper="open-is-minus-1", gripper_dims="3,7")


@pytest.mark.parametrize("dims", [6, 8, 14])
def test_warnings_for_every_embodiment(dims):
    def with_last(values):
        def change(actions):
            if dims == 8:
                actions = np.column_stack([actions, actions[:, -1]])
            actions[:, -1] = values(np.arange(len(actions)) < len(actions) // 2)
            return actions

        return open_source(episodes(change, dims={8: 7}.get(dims, dims)), held_out=0)

    assert check_data(with_last(lambda begins: begins)) == []
    (found,) = check_data(with_last(lambda begins: ~begins))
    assert f"the gripper (action[{dims - 1}]) is near 0 (closed) when episodes begin" in found
    (found,) = check_data(with_last(lambda begins: 100 * begins))
    assert "lies in 0 to 100" in found and "as recorded" in found and "--gripper-dims none" in found
    (found,) = check_data(with_last(lambda begins: 0 * begins))
    assert f"action[{dims - 1}] never changes" in found
    with pytest.warns(UserWarning, match="goes from -1 to 1"):
        (found,) = check_data(with_last(lambda begins: 2 * begins - 1))
    assert "with --gripper" in found


def test_a_rare_dimension_is_named_with_its_share():
    def rarely(actions):
        actions[:, 6], actions[:2, 6] = 1, 0
        return actions

    (found,) = check_data(open_source(episodes(rarely), held_out=0))
    assert "hardly ever changes: action[6] (0." in found and "% of the steps, 0 to 1)" in found and "are kept" in found


def test_statistics_of_other_data():
    own = open_source(episodes()).statistics
    far = {**own, "action": {**own["action"], "q99": [*own["action"]["q99"]], "q01": [*own["action"]["q01"]]}}
    far["action"]["q01"][2], far["action"]["q99"][2] = 50.0, 60.0
    with pytest.warns(UserWarning, match=r"do not fit the data: action\[2\] \(100% of the steps\) beyond"):
        open_source(episodes(), statistics={"mine": far})
    far["action"]["q01"][2] = -1000.0
    with pytest.warns(UserWarning, match=r"less than 5% of the range of the action statistics in action\[2\]"):
        source = open_source(episodes(), statistics={"mine": far})
    assert any("action[2]" in warning for warning in check_data(source))


def test_a_mask_that_was_given_is_told_as_what_it_is():
    """Not as a gripper that was not recognised."""
    (said,) = [text for text in check_data(open_source(episodes(dims=7), mask=[1] * 7)) if "scale" in text]
    assert "the mask given scales the gripper (0 to 1) like the other dimensions" in said
    assert not [text for text in check_data(open_source(episodes(dims=7), mask=[1] * 6 + [0])) if "scale" in text]
