"""The LIBERO adapter: what of the published protocol can be tested without the simulator and its meshes."""

import os
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from oft import load_oft, saved_by_oft

from openvla.cameras_openvla import find_cameras
from openvla.evaluation import EVALUATION_SEEDS, libero, make_environment
from openvla.evaluation.control import BlockingControl
from openvla.evaluation.environment import POLICY_SEED, dataset_of, usual_tasks, with_cameras
from openvla.evaluation.libero import Libero, check_assets, instruction_of, load_initial_states, to_libero, to_upright
from openvla.evaluation.robosuite import axis_angle, to_state
from openvla.options.evaluation import EvaluateOptions
from openvla.policy import OpenVLAPolicy


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Folders as hf-libero has them, with its two ways to get in the way: a question and a download."""
    inner = tmp_path / "libero" / "libero"
    (inner / "bddl_files" / "libero_goal").mkdir(parents=True)
    (inner / "bddl_files" / "libero_goal" / "turn_on_the_stove.bddl").touch()
    (inner / "init_files" / "libero_goal").mkdir(parents=True)
    states = np.arange(150.0).reshape(50, 3)
    torch.save(states, inner / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init")
    (tmp_path / "libero" / "__init__.py").touch()
    (inner / "__init__.py").write_text(
        "import os\n"
        "if not os.path.exists(os.path.join(os.environ.get('LIBERO_CONFIG_PATH', ''), 'config.yaml')):\n"
        "    input('Do you want to specify a custom path?')\n"
        "_assets_path_cache = None\n"
    )
    (inner / "envs").mkdir()
    (inner / "envs" / "__init__.py").touch()
    (inner / "envs" / "env_wrapper.py").write_text("from libero.libero import _assets_path_cache as assets")
    monkeypatch.syspath_prepend(tmp_path)
    return inner


class World:
    """Records what it is asked; every state is its own observation."""

    def __init__(self):
        self.asked = []

    def seed(self, seed):
        self.asked.append(("seed", seed))

    def reset(self):
        self.asked.append("reset")

    def set_init_state(self, state):
        self.asked.append(("state", state.tolist()))
        return self._see()

    def step(self, action):
        self.asked.append(action)
        return self._see(), 0.0, len(self.asked) > 14, {}

    def _see(self):
        image = np.zeros((4, 4, 3), np.uint8)
        image[0, 0] = 255
        wrist = image // 2
        pose = {"robot0_eef_pos": np.ones(3), "robot0_eef_quat": np.array([0.0, 0, 0, 1])}
        pose["robot0_gripper_qpos"] = np.array([0.04, -0.04])
        return pose | {"agentview_image": image, "robot0_eye_in_hand_image": wrist}

    def close(self):
        self.asked.append("close")


def test_the_published_protocol(package, monkeypatch):
    world = World()
    monkeypatch.setattr(Libero, "_load", lambda self, task: world)
    environment = make_environment("libero_goal")
    assert environment.tasks == ("turn_on_the_stove",) == environment.task_sets["libero_goal"]
    observation = environment.reset(EVALUATION_SEEDS[7], "turn_on_the_stove")
    waiting = [0, 0, 0, 0, 0, 0, -1]
    assert world.asked == [("seed", 0), "reset", ("state", [21, 22, 23]), *[waiting] * 10]
    assert observation.instruction == "turn on the stove"
    np.testing.assert_allclose(observation.state, [1, 1, 1, 0, 0, 0, 0.04, -0.04])
    assert observation.images["image"][3, 3].tolist() == [255] * 3  # turned by 180 degrees
    _, success = environment.step(np.array([0.1, 0, 0, 0, 0, 0.2, 0.9]))
    assert world.asked[-1] == [0.1, 0, 0, 0, 0, 0.2, -1] and not success
    assert environment.step(np.zeros(7))[1]
    with pytest.raises(ValueError, match="no scripted expert"):
        environment.expert_action()
    environment.close()
    assert world.asked[-1] == "close"


def test_limits_of_the_suites(package):
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert [Libero(suite=suite).max_steps for suite in suites] == [220, 280, 300, 520, 400]
    with pytest.raises(ValueError, match="Did you mean 'libero_goal'"):
        make_environment("libero_goals")


def test_defaults_of_an_evaluation_are_the_published_ones(package, tmp_path):
    options = EvaluateOptions(env="libero_goal", output=tmp_path)
    assert (options.episodes, options.control, options.execute, POLICY_SEED) == (50, "blocking", None, 7)
    environment = make_environment("libero_goal")
    assert (environment.size, environment.cameras) == (256, {"image": "agentview"})
    assert options.tasks is None and usual_tasks(environment) == "libero_goal"
    assert [EVALUATION_SEEDS[episode] % 50 for episode in range(50)] == [*range(50)]  # initial states in their order


def test_units_are_those_of_the_suite_then_of_its_demonstrations_without_no_ops(package):
    environment = make_environment("libero_goal")
    assert dataset_of(environment, {"libero_10_no_noops": 0, "libero_goal_no_noops": 0}) == "libero_goal_no_noops"
    assert dataset_of(environment, {"libero_goal_no_noops": 0, "libero_goal": 0}) == "libero_goal"
    assert dataset_of(environment, {"libero_10": 0, "bridge_orig": 0}) is None


def test_a_model_of_oft_sees_both_cameras_and_the_state_and_its_chunk_is_executed(package, tmp_path, monkeypatch):
    model = load_oft("libero-l1", saved_by_oft("libero-l1", tmp_path).parent)
    options = with_cameras({}, "libero_goal", model.config.camera_names)
    assert options == {"wrist": True}
    world = World()
    monkeypatch.setattr(Libero, "_load", lambda self, task: world)
    environment = make_environment("libero_goal", **options)
    observation = environment.reset(0, "turn_on_the_stove")
    assert find_cameras(observation.images, model.config.camera_names) == ["image", "wrist_image"]
    assert [int(image[3, 3, 0]) for image in observation.images.values()] == [255, 127]  # both are turned

    (chunk,) = OpenVLAPolicy(model).act([observation])
    images = {"full_image": observation.images["image"], "wrist_image": observation.images["wrist_image"]}
    expected = model.predict_action(images, "turn on the stove", state=[1, 1, 1, 0, 0, 0, 0.04, -0.04])
    np.testing.assert_allclose(chunk, expected, atol=1e-5)
    control, begun = BlockingControl(), len(world.asked)
    control.give(0, chunk, 0.0)
    for step in range(8):
        assert step == 0 or not control.wants_action(step)
        environment.step(control.action(step))
    assert control.wants_action(8)
    np.testing.assert_array_equal([action[:6] for action in world.asked[begun:]], chunk[:, :6])
    assert {action[6] for action in world.asked[begun:]} <= {-1.0, 1.0}


# Quaternions (x, y, z, w) that robosuite gave in two suites, and what its quat2axisangle made of them
RECORDED = [
    ([0.9996096147738871, -0.0009063364830718679, -0.027923584546988157, -0.00026463527139470797],
     [3.140895396142254, -0.002847819833825949, -0.08773931027790592]),
    ([0.9996003404636334, 0.0015520569792801808, -0.028225068391109703, 0.00030980386910505267],
     [3.139717876683042, 0.004874969371475471, -0.08865418328795842]),
    ([0.9397533620853078, 0.3416462106938223, -0.0117576763595641, -0.001800615043508144],
     [2.9557113199531697, 1.074545314875042, -0.03698023174420384]),
]  # fmt: skip


@pytest.mark.parametrize(("quaternion", "rotation"), RECORDED)
def test_rotations_are_those_of_the_simulator(quaternion, rotation):
    np.testing.assert_allclose(axis_angle(np.array(quaternion)), rotation, rtol=1e-12)


def test_rotations_by_hand():
    """Angles go from 0 to 2 pi: w below 0 is not turned into the shorter way, which the demonstrations do not do."""
    half = np.sqrt(0.5)
    np.testing.assert_allclose(axis_angle(np.array([0, 0, half, half])), [0, 0, np.pi / 2])
    np.testing.assert_allclose(axis_angle(np.array([0, half, 0, -half])), [0, 1.5 * np.pi, 0])
    for w in (1.0, -1.0, 1.0 + 1e-9, -1.0 - 1e-9):  # no rotation; rounded beyond what an arc cosine takes
        assert axis_angle(np.array([0, 0, 1e-9, w])).tolist() == [0, 0, 0]


def test_the_state_is_position_rotation_and_fingers():
    """As the simulator gave them, and in the state of the same moment."""
    seen = {
        "robot0_eef_pos": np.array([-0.21124162683394807, -0.011090601889321502, 1.1742495176982402]),
        "robot0_eef_quat": np.array(RECORDED[0][0]),
        "robot0_gripper_qpos": np.array([0.03872336505859045, -0.0387222020954563]),
    }
    expected = [-0.2112416, -0.0110906, 1.1742495, 3.1408954, -0.0028478, -0.0877393, 0.0387234, -0.0387222]
    np.testing.assert_allclose(to_state(seen), expected, atol=1e-7)


def test_the_gripper_is_binarised_and_inverted():
    gripper = [to_libero(np.array([0, 0, 0, 0, 0, 0, value]))[6] for value in (0.0, 0.3, 0.6, 1.0)]
    assert gripper == [1, 1, -1, -1]
    action = np.array([2.0, -2, 0.5, 0.1, 0.2, 0.3, 1])
    np.testing.assert_array_equal(to_libero(action)[:6], action[:6])


def test_pictures_are_turned_by_half_a_turn():
    image = np.arange(12).reshape(2, 2, 3).astype(np.uint8)
    np.testing.assert_array_equal(to_upright(image), np.rot90(image, 2))


def test_instructions_are_the_names_of_tasks():
    """As in the training data; a task file's own words differ ("pick the akita black bowl ...")."""
    assert instruction_of("pick_up_the_black_bowl") == "pick up the black bowl"
    assert instruction_of("KITCHEN_SCENE3_turn_on_the_stove") == "turn on the stove"
    assert instruction_of("LIVING_ROOM_SCENE2_put_both_in_the_basket") == "put both in the basket"


def test_initial_states_are_read_without_running_code(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 9))
    torch.save(states, tmp_path / "good")
    np.testing.assert_array_equal(load_initial_states(tmp_path / "good"), states)
    torch.save(subprocess.Popen, tmp_path / "bad")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_initial_states(tmp_path / "bad")


def test_missing_meshes_are_named(package, tmp_path):
    environment = make_environment("libero_goal", assets=tmp_path)
    (tmp_path / "scenes").mkdir()
    with pytest.raises(FileNotFoundError, match="stable_hope_objects.*LIBERO_ASSETS") as error:
        environment.reset(0, "turn_on_the_stove")
    assert " scenes" not in str(error.value)
    for name in libero.ASSETS:
        (tmp_path / name).mkdir(exist_ok=True)
    check_assets(tmp_path)


def test_versions_of_mujoco_that_change_the_suites_are_warned_of(monkeypatch, recwarn):
    for version in ("3.3.2", "2.3.7"):
        monkeypatch.setattr(libero.importlib.metadata, "version", lambda name, version=version: version)
        libero.check_mujoco()
    assert not recwarn.list
    monkeypatch.setattr(libero.importlib.metadata, "version", lambda name: "3.4.0")
    with pytest.warns(UserWarning, match="mujoco 3.4.0.*mujoco==3.3.2"):
        libero.check_mujoco()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(libero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'hf-libero'"):
        make_environment("libero_spatial")


def test_importing_asks_nothing_and_downloads_nothing(package):
    code = (
        f"import sys; sys.path.insert(1, {str(package.parents[1])!r});"
        "from pathlib import Path; from openvla.evaluation.libero import import_libero;"
        f"print(import_libero(Path({str(package)!r}), Path('/meshes')).assets)"
    )
    variables = {name: value for name, value in os.environ.items() if name != "LIBERO_CONFIG_PATH"}
    done = processes.run(code, env=variables)
    assert done.stdout.strip() == "/meshes", done.stderr
