"""Simulators: one protocol, episodes that depend on their seed alone, pictures, words for tasks."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from openvla.evaluation import EVALUATION_SEEDS, RECORDING_SEEDS, choose_tasks, make_environment, rendering
from openvla.evaluation.environment import action_spec_of, check_action, usual_tasks
from openvla.evaluation.metaworld import MetaWorld, from_metaworld, to_metaworld
from openvla.evaluation.rendering import opengl_backend


@pytest.fixture(scope="module")
def blind():
    environment = make_environment("metaworld", render=False)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def seeing(opengl):
    environment = make_environment("metaworld", wrist=True)
    yield environment
    environment.close()


def expert_episode(environment, seed, task, steps):
    """States of an expert's episode, (T, 8), and whether it succeeded."""
    states = [environment.reset(seed, task).state]
    for _ in range(steps):
        observation, success = environment.step(environment.expert_action())
        states.append(observation.state)
        if success:
            return np.stack(states), True
    return np.stack(states), False


def test_unknown_names_are_answered_with_the_nearest(blind):
    with pytest.raises(ValueError, match="Did you mean 'metaworld'"):
        make_environment("meta-world")
    with pytest.raises(ValueError, match="Did you mean 'drawer-open-v3'"):
        blind.reset(0, "drawer-open")
    with pytest.raises(ValueError, match="tasks='mt1' is unknown.*Did you mean 'mt10'"):
        choose_tasks(blind, "mt1")
    with pytest.raises(ValueError, match="names no task"):
        choose_tasks(blind, " , ")
    with pytest.raises(ValueError, match="Did you mean 'corner4'"):
        make_environment("metaworld", camera="corner44")


def test_a_missing_simulator_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs metaworld.*openvla\[sim\]"):
        make_environment("metaworld")


def test_tasks_and_sets_are_those_of_the_library():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3

    assert set(MetaWorld.tasks) == set(ALL_V3_ENVIRONMENTS) and len(MetaWorld.tasks) == 50
    assert MetaWorld.task_sets["mt10"] == tuple(MT10_V3)
    assert MetaWorld.task_sets["mt25"] == tuple(MT25_V3)
    assert set(MetaWorld.task_sets["mt50"]) == set(MetaWorld.tasks)


def test_choosing_tasks(blind):
    assert choose_tasks(blind, "mt10, sweep-v3,reach-v3") == (*MetaWorld.task_sets["mt10"], "sweep-v3")


def test_names_of_tasks_hold_commas():
    """They were split there, and so was the list of all tasks that is taken without `--tasks`."""
    tasks = ("open it, slowly", "close it", "open it, fast")
    here = SimpleNamespace(tasks=tasks, task_sets={"all, of them": tasks[:2]})
    assert choose_tasks(here, usual_tasks(SimpleNamespace(tasks=tasks, task_sets={}))) == tasks
    assert choose_tasks(here, " open it, fast,all, of them,, close it ,") == (tasks[2], *tasks[:2])
    with pytest.raises(ValueError, match="tasks='open it' is unknown.*Did you mean 'open it, fast'"):
        choose_tasks(here, "close it,open it,close it")
    with pytest.raises(ValueError, match="tasks='a' is unknown"):
        choose_tasks(SimpleNamespace(tasks=(), task_sets={}), "a")
    for tasks, given in ((("a", "b", "a,b"), "b,a,b"), ((*"abc", "a,b", "b,c"), "a,b,c")):
        with pytest.raises(ValueError, match=r"a name holds a comma, so that this is .* or .*rename a task"):
            choose_tasks(SimpleNamespace(tasks=tasks, task_sets={}), given)
    many = tuple(f"task {number}, of many" for number in range(3000))
    assert choose_tasks(SimpleNamespace(tasks=many, task_sets={}), ",".join(many)) == many


def test_every_task_has_words_of_its_own(blind):
    texts = [text for task in blind.tasks for held in (False, True) for text in blind.instructions(task, held_out=held)]
    assert len(texts) == len(set(texts)) == 50 * (1 + 3 + 2)
    assert all(text == text.lower().strip() and text[-1].isalpha() for text in texts)
    # as in the demonstrations that the first policy was trained on
    assert blind.instructions("drawer-open-v3")[0] == "open the drawer"
    assert blind.instructions("push-v3")[0] == "push the puck to the goal"


def test_recording_and_evaluation_share_no_seed():
    assert not set(RECORDING_SEEDS) & set(EVALUATION_SEEDS)


def test_an_episode_depends_on_its_seed_alone(blind):
    first, _ = expert_episode(blind, 7, "peg-insert-side-v3", 60)
    expert_episode(blind, 8, "peg-insert-side-v3", 25)
    expert_episode(blind, 8, "reach-v3", 5)
    again, _ = expert_episode(blind, 7, "peg-insert-side-v3", 60)
    np.testing.assert_array_equal(first, again)
    fresh = make_environment("metaworld", render=False)
    again, _ = expert_episode(fresh, 7, "peg-insert-side-v3", 60)
    fresh.close()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("task", ["reach-v3", "push-v3", "drawer-open-v3"])
def test_seeds_move_objects_and_goals(blind, task):
    worlds = []
    for seed in (0, 1, EVALUATION_SEEDS[0]):
        blind.reset(seed, task)
        worlds.append(blind._simulator().seen)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert np.abs(worlds[a] - worlds[b])[4:].max() > 0.005  # metres


def test_a_simulator_whose_unit_means_something_else():
    """It ran before there was such an attribute."""
    assert action_spec_of(SimpleNamespace(frequency=20.0, unit=0.05)).unit is None


def test_an_action_lasts_four_steps_of_the_simulator(blind):
    fast = make_environment("metaworld", render=False, frequency=80)
    assert "1 is 4 cm" in action_spec_of(blind).unit and "1 is 1 cm" in action_spec_of(fast).unit
    assert (blind.frequency, blind.max_steps, fast.frequency, fast.max_steps) == (20, 125, 80, 500)
    action = np.array([0.5, 1, -0.3, 0, 0, 0, 0.0])
    for environment, repeats in ((blind, 1), (fast, 4)):
        environment.reset(2, "push-v3")
        for _ in range(10 * repeats):
            environment.step(action)
    np.testing.assert_array_equal(fast._simulator().seen, blind._simulator().seen)
    np.testing.assert_array_equal(fast._simulator().world.data.qpos, blind._simulator().world.data.qpos)
    fast.close()


def test_a_success_between_two_observations_counts(blind, monkeypatch):
    blind.reset(0, "reach-v3")
    answers = iter([False, True, False, False])
    monkeypatch.setattr(blind._simulator(), "step", lambda effort: next(answers))
    assert blind.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[1]
    assert next(answers, None) is None  # all four, so that the world's rate stays what it is


@pytest.mark.parametrize("frequency", [0, -20, 30, 160, 0.3])
def test_actions_last_whole_steps_of_the_simulator(frequency):
    with pytest.raises(ValueError, match="expected a divisor of the simulator's 80"):
        make_environment("metaworld", render=False, frequency=frequency)


@pytest.mark.parametrize("task", ["button-press-topdown-v3", "drawer-close-v3", "pick-place-v3"])
def test_the_expert_succeeds(blind, task):
    states, success = expert_episode(blind, EVALUATION_SEEDS[3], task, 150)
    assert success
    assert states.dtype == np.float32 and states.shape[1] == 8


def test_actions_of_the_project_and_of_the_simulator():
    np.testing.assert_allclose(to_metaworld(np.array([0.5, -2, 0.1, 9, 9, 9, 1.0])), [0.5, -1, 0.1, -1], rtol=1e-6)
    np.testing.assert_allclose(to_metaworld(np.array([0, 0, 0, 0, 0, 0, 0.0])), [0, 0, 0, 1])
    np.testing.assert_allclose(from_metaworld(np.array([0.3, 7, -0.2, 0.6])), [0.3, 1, -0.2, 0, 0, 0, 0.2])
    action = np.array([0.25, -0.5, 1, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(from_metaworld(to_metaworld(action)), action)


def test_the_gripper_opens_at_1_and_closes_at_0(blind):
    opening = []
    for gripper in (1.0, 0.0, 1.0):
        blind.reset(0, "reach-v3")
        for _ in range(20):
            observation, _ = blind.step(np.array([0, 0, 0, 0, 0, 0, gripper]))
        opening.append(observation.state[7])
    assert opening[0] == opening[2] > 0.9 > 0.5 > opening[1]


def test_impossible_actions_are_refused(blind):
    for action in (np.zeros(4), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="expected 7 finite numbers"):
            check_action(action)
    with pytest.raises(ValueError, match="call reset"):
        make_environment("metaworld", render=False).step(np.zeros(7))
    with pytest.raises(ValueError, match="variation"):
        blind.reset(0, "reach-v3", "no-such-variation")


def test_pictures_are_the_right_way_up(seeing):
    observation = seeing.reset(3, "drawer-open-v3")
    assert list(observation.images) == ["image", "wrist_image"]
    image = observation.images["image"].astype(int)
    assert image.shape == (224, 224, 3) and observation.images["image"].dtype == np.uint8
    assert np.ptp(image[:10, 120:], axis=-1).max() < 20  # gray above
    brown = image[180:, 100:200]
    assert (brown[..., 0] > brown[..., 2] + 20).mean() > 0.9  # the table below


def test_the_goal_is_seen_before_the_first_step(seeing):
    """Only the marker tells where to; it has to be at the goal at once, not where the last episode had it."""

    def marker(observation):
        red, green, blue = np.moveaxis(observation.images["image"].astype(int), -1, 0)
        return np.argwhere((blue > 150) & (red < 90) & (green < 90)).mean(axis=0)

    first = marker(seeing.reset(0, "pick-place-v3"))
    second = marker(seeing.reset(1, "pick-place-v3"))
    after, _ = seeing.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert np.abs(first - second).max() > 5
    np.testing.assert_allclose(marker(after), second, atol=1)


def test_pictures_are_the_same_for_the_same_seed_and_pixels_are_ones_own(seeing):
    first = seeing.reset(5, "push-v3")
    kept = first.images["image"].copy()
    seeing.reset(6, "window-open-v3")
    np.testing.assert_array_equal(first.images["image"], kept)
    np.testing.assert_array_equal(seeing.reset(5, "push-v3").images["image"], kept)


def test_only_so_many_simulators_stay_loaded():
    environment = make_environment("metaworld", render=False, simulators=1)
    for task in ("reach-v3", "push-v3"):
        environment.reset(0, task)
        assert list(environment._loaded) == [task]
    environment.close()


def test_without_opengl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(rendering, "PROBE", "raise ImportError('no library for {backend}')")
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(FileNotFoundError, match="(?s)no library for egl.*no library for osmesa.*apt-get install"):
        opengl_backend.__wrapped__()


def test_a_backend_that_was_chosen_and_does_not_work_is_named_with_the_reason(monkeypatch):
    """Not with what follows from it: objects that were half made complain when they go."""
    monkeypatch.setenv("MUJOCO_GL", "bad")
    probe = "import sys; sys.exit('Error: no such backend\\nException ignored in: x\\nAttributeError: _context')"
    monkeypatch.setattr(rendering, "PROBE", probe)
    said = r"\(bad: Error: no such backend\)\. MUJOCO_GL=bad lets nothing else be tried: unset it\. Install"
    with pytest.raises(rendering.NoOpenGL, match=said):
        opengl_backend.__wrapped__()


def test_the_first_backend_that_works_is_taken_and_told_to_others(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rendering, "PROBE", "assert '{backend}' == 'osmesa'")
    assert opengl_backend.__wrapped__() == "osmesa"
    monkeypatch.setattr(rendering, "PROBE", "assert '{backend}' == 'glfw'")
    assert rendering.os.environ["MUJOCO_GL"] == "osmesa"
    with pytest.raises(FileNotFoundError, match="osmesa: AssertionError"):
        opengl_backend.__wrapped__()


def test_pictures_that_no_driver_makes():
    with pytest.raises(ValueError, match="size=100000: expected 4096 pixels at most"):
        rendering.Renderer(None, 100_000)
