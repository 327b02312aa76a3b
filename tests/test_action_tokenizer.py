"""Actions <-> tokens, and the statistics that give actions their units."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import FIXTURES, GOLDENS, TINY

from openvla import ActionTokenizer, normalize_actions, unnormalize_actions
from openvla.action_tokenizer import (
    check_same_action_dim,
    check_statistics,
    get_action_stats,
    normalize_state,
    read_statistics,
    resolve_unnorm_key,
)
from openvla.presets import load_preset_statistics


VOCABULARY = 32000


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS / "action_tokenizer.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_tables(goldens, convert):
    tokenizer = ActionTokenizer(VOCABULARY)
    np.testing.assert_array_equal(np.asarray(tokenizer.encode(convert(goldens["values"]))), goldens["token_ids"])
    np.testing.assert_array_equal(np.asarray(tokenizer.decode(convert(goldens["token_ids"]))), goldens["decoded"])
    np.testing.assert_array_equal(np.asarray(tokenizer.decode(convert(goldens["all_ids"]))), goldens["all_decoded"])
    np.testing.assert_array_equal(tokenizer.bins, goldens["bins"])
    np.testing.assert_array_equal(tokenizer.bin_centers, goldens["bin_centers"])
    assert tokenizer.action_token_begin_idx == goldens["begin_idx"]


def test_text(tiny_processor):
    golden = json.loads((GOLDENS / "action_tokenizer_strings.json").read_text())
    tokenizer = ActionTokenizer(tiny_processor.tokenizer)
    values = np.array(golden["values"])
    assert [tokenizer(row) for row in values] == golden["single"]
    assert tokenizer(values) == golden["batch"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [256, 100, 2])
def test_round_trip_within_half_a_bin(bins, dtype):
    tokenizer = ActionTokenizer(VOCABULARY, bins=bins)
    values = np.linspace(-1, 1, 20001, dtype=dtype)
    half = 1 / (bins - 1)
    for encoded in (tokenizer.encode(values), tokenizer.encode(torch.from_numpy(values)).numpy()):
        assert encoded.dtype == np.int64
        assert (encoded >= tokenizer.token_range[0]).all() and (encoded < tokenizer.token_range[1]).all()
        assert np.abs(tokenizer.decode(encoded) - values).max() <= half + 1e-7
    np.testing.assert_array_equal(tokenizer.encode(values), tokenizer.encode(torch.from_numpy(values)).numpy())


def test_values_outside_are_clipped_and_shapes_kept():
    tokenizer = ActionTokenizer(VOCABULARY)
    assert tokenizer.encode([-7.0, 7.0]).tolist() == tokenizer.encode([-1.0, 1.0]).tolist()
    assert tokenizer.encode(np.zeros((2, 3, 7))).shape == (2, 3, 7)
    assert tokenizer.decode(torch.full((2, 7), 31999)).shape == (2, 7)
    assert tokenizer.decode([0, 40000]).tolist() == [tokenizer.bin_centers[-1], tokenizer.bin_centers[0]]
    few = torch.tensor([0, 255], dtype=torch.uint8)  # which holds no difference to the end of the vocabulary
    assert tokenizer.decode(few).tolist() == tokenizer.decode([0, 255]).tolist()


def test_a_range_that_is_none():
    for low, high in ((1, -1), (0, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="expected a range"):
            ActionTokenizer(VOCABULARY, min_action=low, max_action=high)


def test_nan_has_no_token():
    for value in (np.array([np.nan]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="NaN"):
            ActionTokenizer(VOCABULARY).encode(value)


# Statistics

STATS = {
    "q01": [-2.0, 0.0, 5.0, 0.0],
    "q99": [2.0, 1.0, 5.0, 1.0],
    "min": [-3.0, 0.0, 5.0, 0.0],
    "max": [3.0, 1.0, 5.0, 1.0],
    "mask": [True, True, True, False],
}


def test_unnormalize():
    actions = unnormalize_actions(np.array([[-1.0, 0.0, 0.3, 0.7], [1.0, 1.0, 0.0, -0.2]]), STATS)
    assert actions.dtype == np.float64
    np.testing.assert_allclose(actions, [[-2, 0.5, 5, 0.7], [2, 1, 5, -0.2]])
    without_mask = {name: value for name, value in STATS.items() if name != "mask"}
    assert unnormalize_actions(np.zeros(4), without_mask)[3] == 0.5


def test_normalize_inverts_and_clips():
    raw = np.array([[1.0, 0.25, 5.0, 0.7], [-9.0, 9.0, 5.0, 1.0]])
    normalized = normalize_actions(raw, STATS)
    np.testing.assert_allclose(normalized, [[0.5, -0.5, 0, 0.7], [-1, 1, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(unnormalize_actions(normalized[0], STATS), raw[0], atol=1e-7)


@pytest.mark.parametrize("mode", ["normal", "bounds", "bounds_q99"])
def test_normalization_of_the_original(mode):
    """Goldens of the original's data pipeline; inputs and results are float32 there."""
    with np.load(FIXTURES / "pipeline" / f"normalize_{mode.upper()}.npz") as archive:
        arrays = dict(archive)
    for case in sorted({name.split("|")[0] for name in arrays}):
        for part in ("action", "proprio"):
            if f"{case}|in|{part}" not in arrays:
                continue
            prefix = f"{case}|meta|{part}|"
            stats = {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
            normalized = normalize_actions(arrays[f"{case}|in|{part}"], stats, mode)
            # Relative as well: values of "normal" are not bounded.
            np.testing.assert_allclose(normalized, arrays[f"{case}|out|{part}"], rtol=1e-5, atol=1e-6, err_msg=case)


def test_unknown_normalization():
    with pytest.raises(ValueError, match="bounds_q99"):
        normalize_actions(np.zeros(4), STATS, "quantiles")
    with pytest.raises(ValueError, match="'normal' is unknown. Known: bounds, bounds_q99"):
        unnormalize_actions(np.zeros(4), STATS, "normal")


def test_unnorm_keys():
    norm_stats = json.loads((TINY[0].folder / "dataset_statistics.json").read_text())
    with pytest.raises(ValueError, match="bridge_orig"):
        resolve_unnorm_key(norm_stats, None)
    with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
        resolve_unnorm_key(norm_stats, "bridge_origin")
    with pytest.raises(ValueError, match="no action statistics"):
        resolve_unnorm_key(None, "bridge_orig")
    assert resolve_unnorm_key({"only": norm_stats["bridge_orig"]}, None) == "only"
    assert len(get_action_stats(norm_stats, "nomask_6d")["q01"]) == 6
    with pytest.raises(ValueError, match="cannot mix"):
        check_same_action_dim(norm_stats, ["bridge_orig", "nomask_6d"])


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"mean": [0.0]}, "'robot'.*q01 and q99 missing"),
        ({"q01": [0.0], "q99": [1.0, 2.0]}, "the lengths are"),
        ({"q01": [0.0], "q99": [1.0], "mask": [True, True]}, "the lengths are"),
        ({"q01": [0.0], "q99": [float("inf")]}, "dimension 0: inf is not a finite number"),
        ({"q01": [0.0, 1.0], "q99": [1.0, 0.5]}, "dimension 1: q01 .* is above q99"),
        ({"q01": [-1e308], "q99": [1e308]}, "at most 1e"),
        ({"q01": [10**400], "q99": [10**400]}, "at most 1e"),
        ({"q01": [0.0], "q99": [1.0], "min": [1.0], "max": [0.0]}, "min .* is above max"),
        ({"q01": [0.0], "q99": [1.0], "std": [-1.0]}, "std is negative"),
        ({"q01": [0.0], "q99": [1.0], "mean": ["0"]}, "'0' is not a finite number"),
        ({"q01": [True], "q99": [True]}, "True is not a finite number"),
        ({"q01": [0.0], "q99": [1.0], "mask": ["false"]}, "list of true and false"),
        ({"q01": [0.0], "q99": [1.0], "mask": [None]}, "list of true and false"),
        ({"q01": [0.0], "q99": [1.0], "mask": "T"}, "list of true and false"),
        ({"q01": [], "q99": []}, "no dimensions"),
        ({"q01": 0.0, "q99": 1.0}, "expected a list"),
    ],
)
def test_broken_statistics(stats, message):
    with pytest.raises(ValueError, match=message):
        get_action_stats({"robot": {"action": stats}}, "robot")


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"q01": [0.0], "q99": [1.0, 2.0]}, "proprio: one value for each dimension.*the lengths are"),
        ({"q01": 0.0}, "proprio, q01: expected a list"),
        ([0.0], "proprio: expected"),
    ],
)
def test_broken_statistics_of_states(stats, message):
    with pytest.raises(ValueError, match=message):
        check_statistics({"robot": {"action": {"q01": [0.0], "q99": [1.0]}, "proprio": stats}})


def test_a_state_in_other_units_is_a_warning(recwarn):
    """Degrees for radians were clipped to the end of a joint's range, and the model acted for an arm there."""
    proprio = {"q01": [-1.2, 0.0, 0.5, 0.0], "q99": [1.2, 95.0, 0.5001, 0.0]}
    known = {"mine": {"action": {"q01": [0.0], "q99": [1.0]}, "proprio": proprio}}
    for near in ([0.3, 40, 0.5, 0], [-2.0, 101, 0.52, 1]):  # what stood still may move
        normalize_state(np.array(near), known, "mine", "bounds_q99")
    assert not recwarn
    # Noise around 0, a gripper that was seen open but in less than one step of a hundred, what passes unscaled
    proprio |= {"q01": [-1.2, 0.0, 0.5, -1e-6], "q99": [1.2, 95.0, 0.5001, 1e-6]}
    rare = {**proprio, "min": [-2, 0, 0, -1], "max": [2, 100, 1, 1], "mask": [False, True, True, True]}
    normalize_state(np.array([0.3, 40, 0.5, 1e-3]), known, "mine", "bounds_q99")
    normalize_state(np.array([90, 40, 0, 0.0]), {"mine": {**known["mine"], "proprio": rare}}, "mine", "bounds_q99")
    assert not recwarn
    for degrees in (45.0, -90.0):
        with pytest.warns(
            UserWarning, match=r"far outside of that .*'mine'.*what was seen: 0 \(-1.2 to 1.2\)\."
        ) as said:
            assert abs(normalize_state(np.array([degrees, 40, 0.5, 0]), known, "mine", "bounds_q99")[0]) == 1
        assert str(int(degrees)) not in str(said[0].message)  # the same words each time: Python shows them once


@pytest.mark.parametrize("compute", [normalize_actions, unnormalize_actions])
def test_statistics_of_nothing(compute):
    with pytest.raises(
        ValueError, match="The statistics have no q01 and no q99, which normalization='bounds_q99' needs"
    ):
        compute(np.zeros(3), {})


def test_quantiles_may_lie_outside_of_min_and_max():
    """As those that LeRobot estimates from histograms, that float32 rounds, or that somebody widened."""
    for stats in (
        {"q01": [4e-16, -0.004], "q99": [4e-14, 1.04], "min": [0.0, 0.0], "max": [0.0, 1.0]},
        {"q01": [-9.0], "q99": [9.0], "min": [-1.0], "max": [1.0]},
    ):
        assert get_action_stats({"robot": {"action": stats}}, "robot") == stats


def test_statistics_that_were_checked_are_checked_again_where_they_changed():
    statistics, checked = {"robot": {"action": {"q01": [0.0, 0.0], "q99": [1.0, 1.0]}}}, {}
    for _ in range(2):
        assert check_same_action_dim(statistics, ["robot"], checked) == 2
    assert checked == statistics and checked["robot"] is not statistics["robot"]
    for change, message in (
        (lambda stats: stats["q99"].__setitem__(1, float("nan")), "nan is not a finite number"),
        (lambda stats: stats["q99"].__setitem__(1, -1.0), "is above q99"),
        (lambda stats: stats.pop("q01"), "q01 missing"),
        (lambda stats: stats.update(mask=["false", "false"]), "list of true and false"),
    ):
        broken = copy.deepcopy(statistics)
        get_action_stats(broken, "robot", checked)
        change(broken["robot"]["action"])
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                get_action_stats(broken, "robot", checked)
    arrays = {"robot": {"action": {"q01": np.zeros(2), "q99": np.ones(2)}}}
    for _ in range(2):
        assert get_action_stats(arrays, "robot", checked)["q99"].tolist() == [1, 1]
    for nothing in (None, {}, {"action": None}):
        with pytest.raises(ValueError, match="dataset 'other': expected"):
            get_action_stats({"other": nothing}, "other", checked)
    arrays["robot"]["action"]["q99"][0] = np.nan
    with pytest.raises(ValueError, match="nan is not a finite number"):
        get_action_stats(arrays, "robot", checked)


@pytest.mark.parametrize("content", [[1], None, "x", {"robot": None}, {"robot": [1]}, {"robot": {"action": []}}])
def test_statistics_of_another_nesting(content):
    with pytest.raises(ValueError, match="q01"):
        check_statistics(content, "file.json")


def test_statistics_without_the_name_of_their_dataset():
    with pytest.raises(ValueError, match="file.json.*whose name is missing"):
        check_statistics(load_preset_statistics("openvla-7b")["bridge_orig"], "file.json")


def test_published_statistics_pass():
    for name in ("openvla-7b", "libero"):
        assert check_statistics(load_preset_statistics(name))


def test_a_statistics_file_is_named(tmp_path):
    file = tmp_path / "dataset_statistics.json"
    for text, message in {
        "{": "not valid JSON",
        "": "empty",
        "[]": "expected an object",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "Git LFS pointer",
        '{"robot": {"action": {"q01": [NaN], "q99": [1.0]}}}': "dataset 'robot', action, q01, dimension 0",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=f"dataset_statistics.json.*{message}"):
            read_statistics(file)
    file.write_text('\ufeff{"robot": {"action": {"q01": [0.0], "q99": [1.0]}}}', encoding="utf-8")
    assert read_statistics(file)["robot"]["action"]["q99"] == [1.0]


@pytest.mark.parametrize(
    "name, instead", [("mask", "masks"), ("mask", "Mask"), ("q01", "q1"), ("q99", "Q99"), ("max", "maxs")]
)
def test_a_statistic_that_is_misspelled(name, instead):
    """A mask of another name was left out silently, and the gripper scaled: it could never close."""
    stats = {"q01": [0.0], "q99": [1.0], "min": [0.0], "max": [1.0], "mask": [False]}
    stats[instead] = stats.pop(name)
    for norm_stats in ({"robot": {"action": stats}}, {"robot": {"action": {"q01": [0], "q99": [1]}, "proprio": stats}}):
        with pytest.raises(ValueError, match=f"'robot', .*: '{instead}' is no statistic. Did you mean '{name}'"):
            check_statistics(norm_stats)
    fine = {"q01": [0.0], "q99": [1.0], "q10": [0.0], "q50": [0.5], "count": [7], "note": "mine"}
    check_statistics({"robot": {"action": fine, "num_episodes": 3, "state": {}}})
    with pytest.raises(ValueError, match="'Proprio' is no statistic. Did you mean 'proprio'"):
        check_statistics({"robot": {"action": fine, "Proprio": fine}})


@pytest.mark.parametrize("inner", [False, True])
def test_a_name_that_stands_twice_in_a_statistics_file(inner, tmp_path):
    """Of files put together by hand the last one counted, unsaid."""
    entry = '{"action": {"q01": [0], "q99": [1]%s}}' % (', "q99": [5]' if inner else "")
    file = tmp_path / "dataset_statistics.json"
    file.write_text(f'{{"robot": {entry}' + ("}" if inner else f', "robot": {entry}}}'))
    with pytest.raises(ValueError, match=f"'{'q99' if inner else 'robot'}' stands there twice.*leave one out"):
        read_statistics(file)


def test_the_hint_is_of_a_near_key_alone():
    norm_stats = load_preset_statistics("openvla-7b")
    with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
        get_action_stats(norm_stats, "BRIDGE_ORIG")
    with pytest.raises(KeyError) as error:
        get_action_stats(norm_stats, "zzz")
    assert "Did you mean" not in str(error.value)
