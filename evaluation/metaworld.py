"""Meta-World 3: fifty tasks of a Sawyer arm on a table, each with words for it and a scripted expert."""

import importlib.util
import json
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np

from ..choices_openvla import check_choice
from ..observation import Observation
from .environment import check_action
from .metaworld_variations import VARIED, VARIED_HEADLIGHT, Variation, choose_kind, kinds_of, reword
from .rendering import Renderer


CATALOGUE = json.loads(Path(__file__).with_name("metaworld_tasks.json").read_text())
CAMERAS = ("corner4", "corner2", "corner3", "corner", "topview", "behindGripper", "gripperPOV")
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")  # as the simulator's own files hang them
WRIST_CAMERA = "gripperPOV"
STEPS_PER_SECOND, LONGEST = 80, 500  # of the simulator, and how many of them its benchmark gives to an episode
PLACED = ("body_pos", "body_quat", "site_pos")  # what a reset moves in the model, beside the state


class MetaWorld:
    """The fifty tasks of Meta-World 3 (https://github.com/Farama-Foundation/Metaworld), goals visible.

    An action lasts four of the simulator's steps, so that there are twenty in a second, as in robosuite and LIBERO. A
    translation of 1, the most, moves the target of the gripper by 4 cm, 1 cm with each step. Rotation does nothing, the
    gripper always points down. The state is the gripper's position in metres, four zeros, and its opening from 0 to 1,
    (8,). Images are "image", and "wrist_image" with `wrist`.

    Args:
        size: Width and height of the images in pixels.
        camera: "corner4" looks closely over the table; "corner2" is the same from farther away.
        wrist: Add the camera on the gripper.
        render: False leaves images out, for state alone; needs no OpenGL.
        simulators: How many tasks stay loaded, 150 MB each; loading one again takes about a second.
        frequency: Actions in a second; 80, one for each of the simulator's steps, is Meta-World's own.

    Raises:
        ValueError: If the camera, the size or the frequency is impossible.
        ModuleNotFoundError: If Meta-World is not installed.
        FileNotFoundError: At the first reset, if there is no OpenGL to render with.
    """

    tasks: tuple[str, ...] = tuple(CATALOGUE["tasks"])
    task_sets: dict[str, tuple[str, ...]] = {name: tuple(tasks) for name, tasks in CATALOGUE["sets"].items()}
    robot = "sawyer"
    state_names: tuple[str, ...] = ("x", "y", "z", "pad0", "pad1", "pad2", "pad3", "gripper_opening")

    def __init__(
        self,
        *,
        size: int = 224,
        camera: str = "corner4",
        wrist: bool = False,
        render: bool = True,
        simulators: int = 4,
        frequency: float = 20.0,
    ):
        check_choice("camera", camera, CAMERAS)
        if size < 1 or simulators < 1:
            raise ValueError(f"size={size}, simulators={simulators}: expected at least 1.")
        if frequency <= 0 or STEPS_PER_SECOND % frequency:
            raise ValueError(f"frequency={frequency}: expected a divisor of the simulator's {STEPS_PER_SECOND}.")
        if importlib.util.find_spec("metaworld") is None:
            raise ModuleNotFoundError("No module named 'metaworld'", name="metaworld")
        self.size, self.render, self.simulators = size, render, simulators
        self.frequency, self.repeats = float(frequency), round(STEPS_PER_SECOND / frequency)
        self.max_steps = LONGEST // self.repeats
        self.unit = f"x, y, z: 1 is {self.repeats} cm of the gripper's target"
        self.cameras = {"image": camera} | ({"wrist_image": WRIST_CAMERA} if wrist else {})
        self._loaded: OrderedDict[str, Simulator] = OrderedDict()
        self._current: Simulator | None = None
        self._instruction = ""

    def instructions(self, task: str, *, held_out: bool = False) -> tuple[str, ...]:
        """See `Environment`. The usual one and three more; two that are held out."""
        check_choice("task", task, self.tasks)
        texts = CATALOGUE["tasks"][task]
        return tuple(texts["held_out"] if held_out else [texts["instruction"], *texts["seen"]])

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        """See `Environment`. Variations: `metaworld_variations`; an axis alone draws one of its kinds by the seed.

        Raises:
            ValueError: Also if the task does not have the variation; names those that do.
        """
        check_choice("task", task, self.tasks)
        kind = choose_kind(variation, seed, task, CATALOGUE["tasks"])
        self._current = self._load(task)
        self._current.reset(seed, kind)
        self._instruction = reword(kind, seed, task, CATALOGUE["tasks"])
        return self._observe()

    def variations(self, task: str) -> tuple[str, ...]:
        """See `Environment`."""
        check_choice("task", task, self.tasks)
        return kinds_of(task, CATALOGUE["tasks"])

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """See `Environment`."""
        simulator, effort = self._simulator(), to_metaworld(check_action(action))
        success = any([simulator.step(effort) for _ in range(self.repeats)])  # all of them, also after success
        return self._observe(), success

    def expert_action(self) -> np.ndarray:
        """See `Environment`."""
        return from_metaworld(self._simulator().expert_action())

    def close(self) -> None:
        for simulator in self._loaded.values():
            simulator.close()
        self._loaded.clear()
        self._current = None

    def _simulator(self) -> "Simulator":
        if self._current is None:
            raise ValueError("No episode has begun: call reset(seed, task) first.")
        return self._current

    def _load(self, task: str) -> "Simulator":
        if task not in self._loaded:
            while len(self._loaded) >= self.simulators:
                self._loaded.popitem(last=False)[1].close()
            self._loaded[task] = Simulator(task, self.size if self.render else None)
        self._loaded.move_to_end(task)
        return self._loaded[task]

    def _observe(self) -> Observation:
        simulator = self._simulator()
        cameras = self.cameras if self.render else {}
        return Observation(
            images={name: simulator.picture(camera) for name, camera in cameras.items()},
            state=to_state(simulator.seen),
            instruction=self._instruction,
        )


class Simulator:
    """One task, loaded; `seen` (39,) is what its expert sees. `size` None: without pictures."""

    def __init__(self, task: str, size: int | None):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self.world, self.expert = task, ALL_V3_ENVIRONMENTS[task](), ENV_POLICY_MAP[task]()
        # What its benchmark classes set: goals are drawn from the world's own generator, and its expert sees them.
        # `reset(seed=...)` of version 3.1 ignores the seed; a frozen draw comes with each `gym.make` instead.
        self.world._set_task_called = True
        self.world._freeze_rand_vec, self.world.seeded_rand_vec = False, True
        self.world._partially_observable = False
        del self.world.sawyer_observation_space  # computed for a goal that is hidden
        self.world.max_path_length = sys.maxsize  # how long an episode is decides who runs it
        self._renderer = Renderer(self.world.model, size) if size else None
        model = self.world.model
        fields = [getattr(model, name) for name in (*PLACED, *VARIED)]
        fields += [getattr(model.vis.headlight, name) for name in VARIED_HEADLIGHT]
        self._original = [(field, field.copy()) for field in fields]
        self._variation, self._failed = Variation("", 0, task, self.world), False
        self.seen: np.ndarray = np.zeros(39)

    def reset(self, seed: int, kind: str = "") -> None:
        """Begin an episode, varied by `kind`, "axis:kind" or ""."""
        import mujoco

        # The simulator builds a new episode on what the last one left: everything goes back to the file's state.
        for field, values in self._original:
            field[:] = values
        self.world.__dict__.pop("_get_state_rand_vec", None)
        mujoco.mj_resetData(self.world.model, self.world.data)
        mujoco.mj_forward(self.world.model, self.world.data)
        self.world.seed(int(seed))
        self._variation, self._failed = Variation(kind, seed, self.task, self.world), False
        self._variation.before()
        self.seen, _ = self.world.reset()
        self._variation.after()
        mujoco.mj_forward(self.world.model, self.world.data)  # the goal's marker is placed last, without being drawn
        if kind:
            self.seen = self.world._get_obs()
            self.world._prev_obs = self.seen[:18].copy()
            self.seen[18:36] = self.world._prev_obs

    def step(self, action: np.ndarray) -> bool:
        self.seen, _, _, _, info = self.world.step(action)
        self._failed |= self._variation.failed()
        return bool(info["success"]) and not self._failed

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": its actions are clipped, as it knows
            return self.expert.get_action(self.seen)

    def picture(self, camera: str) -> np.ndarray:
        assert self._renderer is not None
        return self._renderer.render(
            self.world.data, camera, upside_down=camera in UPSIDE_DOWN, decorations=self._variation.decorations
        )

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self.world.close()


def to_metaworld(action: np.ndarray) -> np.ndarray:
    """(7,) -> (4,) float32 in [-1, 1]: translation, and the gripper's effort (-1 opens, 1 closes)."""
    effort = 1.0 - 2.0 * action[6]
    return np.clip([*action[:3], effort], -1.0, 1.0).astype(np.float32)


def from_metaworld(action: np.ndarray) -> np.ndarray:
    """(4,) -> (7,) float64, the way back: values outside [-1, 1] have no effect and are clipped."""
    clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
    return np.array([*clipped[:3], 0.0, 0.0, 0.0, (1.0 - clipped[3]) / 2.0])


def to_state(seen: np.ndarray) -> np.ndarray:
    """(39,) -> (8,) float32: position, four zeros in the place of a rotation, opening of the gripper."""
    return np.array([*seen[:3], 0.0, 0.0, 0.0, 0.0, seen[3]], dtype=np.float32)
