"""Actions in words: names only where they are known, numbers unchanged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from openvla import ActionPrediction, unnormalize_actions
from openvla.action_spec import (
    ActionSpec,
    action_lines,
    action_names,
    action_record,
    spec_of,
    usual_spec,
)
from openvla.data.source import statistics_with_spec
from openvla.data.sources import open_source
from openvla.training.begun import changed_statistics


DEMOS = Path(__file__).parent / "fixtures" / "demos"


def prediction(action_dim: int) -> ActionPrediction:
    values = np.linspace(-0.5, 1.0, action_dim)
    probabilities = np.linspace(0.9, 0.25, action_dim, dtype=np.float32)
    return ActionPrediction(
        actions=values * 2, normalized_actions=values, token_ids=values, token_probabilities=probabilities
    )


def test_names():
    assert action_names(7) == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert action_names(2) == ["action[0]", "action[1]"]


@pytest.mark.parametrize("action_dim", [7, 6])
def test_record_is_json_and_keeps_the_numbers(action_dim):
    record = action_record(prediction(action_dim), unnorm_key="bridge_orig", instruction="lift")
    assert json.loads(json.dumps(record)) == record
    assert record["action"] == (np.linspace(-0.5, 1.0, action_dim) * 2).tolist()
    assert record["normalized"] == np.linspace(-0.5, 1.0, action_dim).tolist()
    assert record["confidence"] == min(record["probabilities"]) == 0.25
    assert (record["unnorm_key"], record["instruction"]) == ("bridge_orig", "lift")


@pytest.mark.parametrize(
    "wrong", [{"grippers": [False] * 6 + [True]}, {"unit": 5}, {"frame": ["base"]}, {"hz": True}], ids=str
)
def test_a_meaning_that_was_written_otherwise(wrong):
    """A mask of grippers was read as the dimensions 0 and 1: standing still, x and y would have been told 1."""
    with pytest.raises(ValueError, match=f"action_spec: {next(iter(wrong))}="):
        ActionSpec.from_dict({**usual_spec(7).to_dict(), **wrong})


def test_lines():
    lines = action_lines(action_record(prediction(7), unnorm_key="bridge_orig")).splitlines()
    assert lines[0] == "  x        -1.00000   90%  translation"
    assert lines[6] == "  gripper  +2.00000   25%  1 open, 0 closed"
    assert lines[7] == "confidence 25%, that of the least certain number (gripper)"
    assert lines[8].startswith("units of 'bridge_orig'")
    lines = action_lines(action_record(prediction(2))).splitlines()
    assert lines == [
        "  action[0]  -1.00000   90%",
        "  action[1]  +2.00000   25%",
        "confidence 25%, that of the least certain number (action[1])",
    ]


SPEC = ActionSpec(("a", "b", "grip"), (True, False, False), (2,), frame="base", unit="metres", hz=5)


def test_a_spec_goes_through_json_and_back():
    content = json.loads(json.dumps(SPEC.to_dict()))
    assert ActionSpec.from_dict(content) == SPEC
    assert SPEC.describe() == "a, b (a place), grip (1 open, 0 closed); frame: base; metres; 5 a second"
    usual = usual_spec(7)
    assert "hz" not in usual.to_dict() and usual.standstill() == [0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="b are places"):
        SPEC.standstill()
    percent = ActionSpec(("a", "grip"), (True, False), (1,), as_recorded=(1,), stated=False)
    assert ActionSpec.from_dict(json.loads(json.dumps(percent.to_dict()))) == percent
    assert percent.describe() == "a, grip (a gripper, as recorded); that numbers are changes and not places is a guess"
    with pytest.raises(ValueError, match="grip are places"):  # 1 of 100 is closed
        percent.standstill()


@pytest.mark.parametrize(
    "change",
    [
        {"names": []},
        {"names": ["x", "y", "x"]},
        {"relative": [True]},
        {"relative": ["false", "true", "true"]},
        {"grippers": [3]},
        {"grippers": ["a"]},
        {"grippers": [0]},  # a change: held as 0, it closed
        {"hz": 0},
        {"hz": "fast"},
        {"hz": float("nan")},
        {"as_recorded": [1]},
        {"stated": 1},
        {"names": None},
        {"names": [1, 2, 3]},
    ],
)
def test_a_spec_that_is_none(change):
    with pytest.raises(ValueError, match="action_spec"):
        ActionSpec.from_dict({**SPEC.to_dict(), **change})


def test_the_spec_of_statistics():
    entry = {"action": {"q01": [0.0] * 3, "q99": [1.0] * 3}}
    assert spec_of({"x": entry}, "x") == usual_spec(3)
    assert spec_of({"x": {**entry, "action_spec": None}}, "x") == usual_spec(3)
    assert spec_of({"x": {**entry, "action_spec": SPEC.to_dict()}}, "x") == SPEC
    with pytest.raises(ValueError, match="action_spec=5: expected {'names'"):
        spec_of({"x": {**entry, "action_spec": 5}}, "x")
    with pytest.raises(ValueError, match="'x' has 3 dimensions, the statistics 2"):
        spec_of({"x": {"action": {"q01": [0, 0], "q99": [1, 1]}, "action_spec": SPEC.to_dict()}}, "x")


def test_a_chunk_in_words():
    values = np.arange(6).reshape(2, 3) / 10
    made = ActionPrediction(
        actions=values, normalized_actions=values, token_ids=values, token_probabilities=0.5 + values
    )
    record = action_record(made, SPEC, unnorm_key="mine")
    assert json.loads(json.dumps(record)) == record and record["action"] == values.tolist()
    lines = action_lines(record).splitlines()
    assert lines[0].split() == ["step", *SPEC.names, "least", "certain"] and len({len(line) for line in lines[:3]}) == 1
    assert [line.split() for line in lines[1:3]] == [
        ["1", "+0.00000", "+0.10000", "+0.20000", "50%"],
        ["2", "+0.30000", "+0.40000", "+0.50000", "80%"],
    ]
    assert lines[-1] == "units of 'mine', metres; 5 actions a second; frame: base"


def test_data_say_what_their_actions_mean():
    """Names, rate and places go from the data to the statistics that a model keeps."""
    source = open_source(DEMOS / "lerobot_image", unit="Meta-World's", chunk_end="still")
    spec = source.action_spec
    assert spec.hz == 10 and spec.grippers == (6,) and spec.unit == "Meta-World's"
    assert spec.relative == (True,) * 6 + (False,)
    joints = open_source(DEMOS / "lerobot_image", absolute_dims="all", hz=5, chunk_end="still")
    assert not any(joints.action_spec.relative) and joints.action_spec.hz == 5
    # Standing still past the end of an episode, places repeat and changes are none
    for made, expected in ((joints, lambda last: last), (source, lambda last: [*[0.0] * 6, last[6]])):
        episode = made.dataset[0]
        last = list(made.frames(episode, action_chunk=2))[-1].actions
        raw = unnormalize_actions(last[1], made.statistics["action"])
        clipped = unnormalize_actions(last[0], made.statistics["action"])
        np.testing.assert_allclose(raw, expected(clipped), atol=1e-5)
    assert statistics_with_spec(source)["action_spec"] == spec.to_dict()
    with pytest.raises(ValueError, match="absolute_dims='x'.*or none, or all"):
        open_source(DEMOS / "lerobot_image", absolute_dims="x")


def test_statistics_that_are_given_bring_their_meaning():
    """`openvla stats --absolute-dims all` and `finetune --statistics` made changes of places again."""
    said = {"absolute_dims": "all", "unit": "radians", "frame": "joints"}
    given = statistics_with_spec(open_source(DEMOS / "hdf5", **said, hz=7))
    taken = open_source(DEMOS / "hdf5", statistics=given).action_spec
    assert not any(taken.relative) and (taken.unit, taken.frame, taken.hz) == ("radians", "joints", 7.0)
    other = open_source(DEMOS / "hdf5", statistics=given, absolute_dims="none", unit="degrees", hz=5).action_spec
    assert other.relative == (True,) * 6 + (False,) and (other.unit, other.frame, other.hz) == (
        "degrees",
        "joints",
        5.0,
    )


def test_what_is_a_guess_is_said_to_be_one(tmp_path):
    """Joint positions without a state beside them, of which nobody says what they are: a client held 0 for each, a
    motion. A gripper from 0 to 100 was said to be open at 1."""
    ramp = np.linspace(0.5, 1, 20)[:, None] * np.array([[1, -1, 1, -1, 1, -1, 90]])
    frames = np.zeros((20, 8, 8, 3), np.uint8)
    data = [{"actions": ramp, "instruction": "lift", "images": {"front": frames}} for _ in range(2)]
    guessed = open_source(data, name="mine")
    assert not guessed.action_spec.stated and guessed.action_spec.as_recorded == (6,)
    assert "is a guess; say it: --absolute-dims none, or all" in guessed.meaning
    metres = [{**episode, "actions": episode["actions"] * [1, 1, 1, 1, 1, 1, 0.001]} for episode in data]
    assert open_source(metres, name="mine").action_spec.as_recorded == (6,)
    given = statistics_with_spec(guessed)
    assert not given["action_spec"]["stated"]
    assert not open_source(data, name="mine", statistics=given).action_spec.stated  # a guess that was written down
    for said in ("all", "none"):
        source = open_source(data, name="mine", absolute_dims=said)
        assert source.action_spec.stated and "guess" not in source.meaning
        kept = statistics_with_spec(source)
        assert (
            "stated" not in kept["action_spec"] and open_source(data, name="mine", statistics=kept).action_spec.stated
        )
    before = {"mine": {**given, "action_spec": {"names": given["action_spec"]["names"]}}}  # begun by an earlier version
    assert (
        changed_statistics(
            before, {"mine": {**given, "action_spec": {**before["mine"]["action_spec"], "stated": False}}}
        )
        == []
    )
    now = {"mine": {**given, "action_spec": {**given["action_spec"], "as_recorded": []}}}
    del now["mine"]["action_spec"]["stated"]  # a version that sees what is a guess otherwise
    assert changed_statistics({"mine": given}, now) == changed_statistics(now, {"mine": given}) == []


def test_what_openvla_record_wrote_is_no_guess(tmp_path):
    """Its simulators take changes, and say at most what a 1 is (Meta-World). Of other numbers than their actions, here
    states, they say nothing: these were taken for changes that somebody stated."""
    recorded = shutil.copytree(DEMOS / "hdf5", tmp_path / "recorded")
    assert not open_source(recorded).action_spec.stated
    earlier = {"options": {}, "tasks": {}}  # by a version that left out also what environments stated
    for said, stated in ({}, False), ({"usual_actions": True}, True), ({"unit": "x, y, z: 1 is 4 cm"}, True):
        (recorded / "recording.json").write_text(json.dumps(earlier | said))
        assert open_source(recorded).action_spec.stated == stated
    other = open_source(recorded, action_key="obs/ee_states").action_spec
    assert not other.stated and other.unit is None


def test_a_gripper_whose_range_was_said_is_not_as_recorded():
    """One that opens by less than half, of a recording whose convention was given; and the statistics that were given
    have seen more than these few episodes."""
    half = np.linspace(0.6, 1, 20)[:, None] * np.ones(7)
    data = [{"actions": half, "instruction": "lift", "images": {"front": np.zeros((20, 8, 8, 3), np.uint8)}}]
    converted = open_source(data, name="mine", gripper="open-is-0", gripper_dims="6")
    assert converted.survey.statistics["action"]["max"][6] < 0.5 and not converted.action_spec.as_recorded
    seen = open_source([{**data[0], "actions": 100 * half}], name="mine")
    assert seen.action_spec.as_recorded == (6,)
    given = statistics_with_spec(seen)
    assert open_source(data, name="mine", statistics=given).action_spec.as_recorded == (6,)
    assert not open_source(data, name="mine", statistics=given, gripper_dims="none").action_spec.as_recorded


def test_words_of_a_prediction_that_is_no_change_of_a_pose():
    spec = usual_spec(7, as_recorded=(6,), relative=(False,) * 7)
    record = action_record(prediction(7), spec, unnorm_key="mine")
    lines = action_lines(record).splitlines()
    assert lines[0].split()[-1] == "90%" and lines[6].endswith("as recorded")
    assert lines[-1] == "units of 'mine', which the data does not state"
