"""Actions in words: names only where they are known, numbers unchanged."""

import json

import numpy as np
import pytest

from openvla import ActionPrediction
from openvla.action_text import action_lines, action_names, action_record


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
