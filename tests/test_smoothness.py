"""Jerk of executed actions, against derivatives known in closed form."""

import numpy as np
import pytest

from openvla.action_spec import usual_spec
from openvla.evaluation.smoothness import mean_jerk


CHANGES = usual_spec(4)  # x, y, z and a gripper
PLACES = usual_spec(4, relative=(False,) * 4)


def places_of(polynomial: list[float], steps: int = 9) -> np.ndarray:
    """(steps, 4): the place of x by time, y and z at rest, the gripper opens and closes."""
    times = np.arange(steps)
    actions = np.zeros((steps, 4))
    actions[:, 0], actions[:, 3] = np.polyval(polynomial, times), times % 2
    return actions


@pytest.mark.parametrize(
    "polynomial, jerk",
    [([3.0, 1.0], 0.0), ([2.0, -1.0, 5.0], 0.0), ([0.5, 0.0, 0.0, 0.0], 3.0)],  # d3/dt3 of t^3 / 2 is 3
    ids=["constant speed", "constant acceleration", "cubic"],
)
def test_places_and_changes_of_one_motion_have_the_same_jerk(polynomial, jerk):
    places = places_of(polynomial)
    changes = np.diff(places, axis=0, prepend=np.polyval(polynomial, -1) * np.eye(4)[:1])
    assert mean_jerk(places, PLACES) == pytest.approx(jerk)
    assert mean_jerk(changes, CHANGES) == pytest.approx(jerk)


def test_a_jump_is_less_smooth_than_a_ramp():
    ramp, jump = np.zeros((12, 4)), np.zeros((12, 4))
    ramp[:, 1], jump[6:, 1] = np.linspace(0, 1, 12), 1.0
    assert mean_jerk(jump, CHANGES) > 0.1 > mean_jerk(ramp, CHANGES) == pytest.approx(0.0)


@pytest.mark.parametrize("actions, spec", [(np.ones((3, 4)), CHANGES), (np.ones((9, 1)), usual_spec(1))])
def test_none_where_nothing_can_be_said(actions, spec):
    assert mean_jerk(actions, spec) is None
