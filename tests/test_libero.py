"""The LIBERO adapter: what of the published protocol can be tested without the simulator and its meshes."""

import os
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from openvla.evaluation import EVALUATION_SEEDS, libero, make_environment
from openvla.evaluation.libero import Libero, check_assets, instruction_of, load_initial_states, to_libero, to_upright


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
        pose = {"robot0_eef_pos": np.ones(3), "robot0_eef_quat": np.array([0.0, 0, 0, 1])}
        return pose | {"robot0_gripper_qpos": np.array([0.04, -0.04]), "agentview_image": image}

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
    limits = [
        Libero(suite=suite).max_steps for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    ]
    assert limits == [220, 280, 300, 520]
    with pytest.raises(ValueError, match="Did you mean 'libero_goal'"):
        make_environment("libero_goals")


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
