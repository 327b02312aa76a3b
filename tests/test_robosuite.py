"""The robosuite adapter: its geometry, and, where robosuite is installed, its experts."""

import importlib.util

import numpy as np
import pytest

from openvla.evaluation import make_environment
from openvla.evaluation import robosuite as module
from openvla.evaluation.robosuite import TASKS, action_towards, axis_angle, to_robosuite, turn_to_faces


def about_z(angle: float) -> np.ndarray:
    return np.array([0, 0, np.sin(angle / 2), np.cos(angle / 2)])


@pytest.fixture(scope="module")
def blind():
    pytest.importorskip("robosuite", reason="the extra robosuite is not installed")
    environment = make_environment("robosuite", render=False)
    yield environment
    environment.close()


def test_rotations_as_axis_times_angle():
    np.testing.assert_allclose(axis_angle(about_z(0.7)), [0, 0, 0.7])
    np.testing.assert_allclose(axis_angle(np.array([1.0, 0, 0, 0])), [np.pi, 0, 0])
    np.testing.assert_array_equal(axis_angle(about_z(0)), np.zeros(3))


@pytest.mark.parametrize("hand", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("cube", [0.0, 0.4, 2.0, -3.0])
def test_the_hand_turns_to_the_nearest_faces(hand, cube):
    turn = turn_to_faces(about_z(hand), about_z(cube))
    assert abs(turn) <= np.pi / 4 + 1e-9
    np.testing.assert_allclose(turn_to_faces(about_z(hand + turn), about_z(cube)), 0, atol=1e-6)


def test_actions():
    np.testing.assert_array_equal(to_robosuite(np.array([2.0, 0, 0, 0, -3, 0, 1])), [1, 0, 0, 0, -1, 0, -1])
    assert to_robosuite(np.zeros(7))[6] == 1
    action = action_towards(np.array([0.01, 0, 1.0]), np.zeros(3), opened=True, turn=0.1)
    np.testing.assert_allclose(action, [0.12, 0, 1, 0, 0, 0.2, 1])


def test_every_task_has_words():
    assert [(len(seen), len(held)) for seen, held in TASKS.values()] == [(4, 2)] * 3


def test_without_robosuite_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvla\[robosuite\]"):
        make_environment("robosuite")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Did you mean 'agentview'"):
        module.Robosuite(camera="agent")


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds_and_a_seed_is_an_episode(blind, task):
    runs = []
    for seed in (3, 4, 3):
        observation, success, states = blind.reset(seed, task), False, []
        while not success and len(states) < 200:
            observation, success = blind.step(blind.expert_action())
            states.append(observation.state)
        assert success
        runs.append(np.stack(states))
    np.testing.assert_array_equal(runs[0], runs[2])
    assert len(runs[1]) != len(runs[0]) or not np.array_equal(runs[0], runs[1])


def test_pictures(blind, opengl):
    environment = make_environment("robosuite", size=64, wrist=True)
    images = environment.reset(0, "Lift").images
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(("image", "wrist_image"), (64, 64, 3))
    assert images["image"][40:].mean() > images["image"][:8].mean()  # the bright table is below
    environment.close()
