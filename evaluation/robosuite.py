"""robosuite 1.5: a Panda arm with a 6-DoF controller, three tasks, scripted experts of our own."""

import importlib.util
from typing import Any

import numpy as np

from ..choices_openvla import check_choice
from ..observation import Observation
from .environment import check_action
from .rendering import Renderer


# Task -> the usual instruction, three more, two that are held out
TASKS = {
    "Lift": (
        ("lift the cube", "pick up the cube", "grasp the red cube and lift it", "raise the cube from the table"),
        ("take the block off the table", "hold the red block up"),
    ),
    "Stack": (
        (
            "stack the red cube on the green cube",
            "put the red cube on top of the green one",
            "place the red cube on the green cube",
            "pick up the red cube and stack it on the green cube",
        ),
        ("build a tower with the red block above", "set the red block down on the green block"),
    ),
    "PickPlaceCan": (
        (
            "put the can in its bin",
            "pick up the can and place it in the bin",
            "move the can to the other bin",
            "place the red can in the right bin",
        ),
        ("carry the soda over to its compartment", "sort the drink into the bin where it belongs"),
    ),
}
OBJECTS = {"Lift": "cube", "Stack": "cubeA", "PickPlaceCan": "Can"}
CAMERAS = ("agentview", "frontview", "birdview", "sideview", "robot0_eye_in_hand")
COLLISION_SHAPES = (0,)
# Of the expert, in metres
ABOVE, CLOSE, GRASPED = 0.10, 0.02, 0.012
GAIN = 12.0  # action per metre that is missing: full speed above 8 cm


class Robosuite:
    """Lift, Stack and PickPlaceCan (https://robosuite.ai) under its operational-space controller.

    A translation of 1, the most, is 5 cm, a rotation of 1 half a radian, both towards the base's axes. The state is
    the gripper's position in metres, its orientation as axis times angle, and its two finger joints, (8,), as in
    LIBERO. Images are "image", and "wrist_image" with `wrist`. Arguments are those of `MetaWorld`.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    task_sets: dict[str, tuple[str, ...]] = {"robosuite": tuple(TASKS)}
    max_steps = 300
    frequency = 20.0
    robot = "panda"
    unit = "x, y, z: 1 is 5 cm; roll, pitch, yaw: 1 is 0.5 rad"
    state_names: tuple[str, ...] = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")

    def __init__(self, *, size: int = 224, camera: str = "agentview", wrist: bool = False, render: bool = True):
        check_choice("camera", camera, CAMERAS)
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1.")
        if importlib.util.find_spec("robosuite") is None:
            raise ModuleNotFoundError("No module named 'robosuite'", name="robosuite")
        self.size, self.render = size, render
        self.cameras = {"image": camera} | ({"wrist_image": "robot0_eye_in_hand"} if wrist else {})
        self._worlds: dict[str, tuple[Any, Renderer | None]] = {}
        self._task = ""
        self._seen: dict[str, np.ndarray] = {}

    def instructions(self, task: str, *, held_out: bool = False) -> tuple[str, ...]:
        """See `Environment`."""
        check_choice("task", task, self.tasks)
        return TASKS[task][held_out]

    def variations(self, task: str) -> tuple[str, ...]:
        """See `Environment`. None here."""
        check_choice("task", task, self.tasks)
        return ()

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        """See `Environment`."""
        check_choice("task", task, self.tasks)
        check_choice("variation", variation, ("",))
        if task not in self._worlds:
            self._worlds[task] = self._load(task)
        self._task = task
        world = self._worlds[task][0]
        # All its samplers hold this one generator, which a seed reaches through the constructor only.
        world.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._seen = world.reset()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """See `Environment`."""
        world = self._world()
        self._seen, *_ = world.step(to_robosuite(check_action(action)))
        return self._observe(), bool(world._check_success())

    def expert_action(self) -> np.ndarray:
        """See `Environment`. It looks at the world alone, and so answers to any state, not only to its own path."""
        world = self._world()
        hand, name = self._seen["robot0_eef_pos"], OBJECTS[self._task]
        target = self._seen[f"{name}_pos"]
        turn = 0.0
        if self._task != "PickPlaceCan":  # a can is round
            turn = turn_to_faces(self._seen["robot0_eef_quat_site"], self._seen[f"{name}_quat"])
        gripper = world.robots[0].gripper
        held = world._check_grasp(gripper=gripper, object_geoms=self._graspable(world))
        goal = self._goal(world)
        there = goal is not None and np.linalg.norm((target - goal)[:2]) < GRASPED
        if goal is not None and there and target[2] < goal[2] + CLOSE:  # let go, then away
            return action_towards(hand if held else goal + [0, 0, 2 * ABOVE], hand, opened=True)
        if held:
            if goal is None:
                return action_towards(hand + [0, 0, ABOVE], hand, opened=False)
            lifted = goal + [0, 0, 0.0 if there else ABOVE]
            if target[2] < goal[2] + ABOVE / 2 and not there:
                lifted = np.array([*target[:2], lifted[2]])  # up first, then across
            return action_towards(hand + lifted - target, hand, opened=False)
        beside = np.linalg.norm((hand - target)[:2])
        if hand[2] - target[2] < GRASPED and beside < CLOSE:
            return action_towards(target, hand, opened=False)
        ready = beside < CLOSE / 2 and abs(turn) < 0.1
        return action_towards(target + [0, 0, 0 if ready else ABOVE], hand, opened=True, turn=turn)

    def close(self) -> None:
        for world, renderer in self._worlds.values():
            if renderer is not None:
                renderer.close()
            world.close()
        self._worlds.clear()
        self._task = ""

    def _goal(self, world: Any) -> np.ndarray | None:
        """(3,) where the centre of the object belongs; None: up, wherever."""
        if self._task == "Lift":
            return None
        if self._task == "Stack":
            return self._seen["cubeB_pos"] + [0, 0, 0.045]
        return np.array([*world.target_bin_placements[world.object_id][:2], world.bin2_pos[2] + 0.1])

    def _graspable(self, world: Any) -> Any:
        return (
            {"Lift": "cube", "Stack": "cubeA"}.get(self._task)
            and getattr(world, OBJECTS[self._task])
            or (world.objects[world.object_id])
        )

    def _world(self) -> Any:
        if not self._task:
            raise ValueError("No episode has begun: call reset(seed, task) first.")
        return self._worlds[self._task][0]

    def _load(self, task: str) -> tuple[Any, Renderer | None]:
        import robosuite
        from robosuite.controllers import load_composite_controller_config

        world = robosuite.make(
            task,
            robots="Panda",
            controller_configs=load_composite_controller_config(controller="BASIC", robot="Panda"),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=self.frequency,
            ignore_done=True,
            hard_reset=False,
            seed=0,
        )
        return world, Renderer(world.sim.model._model, self.size, COLLISION_SHAPES) if self.render else None

    def _observe(self) -> Observation:
        world, renderer = self._worlds[self._task]
        images = {}
        if renderer is not None:
            images = {name: renderer.render(world.sim.data._data, camera) for name, camera in self.cameras.items()}
        return Observation(images=images, state=to_state(self._seen), instruction=TASKS[self._task][0][0])


def to_robosuite(action: np.ndarray) -> np.ndarray:
    """(7,) -> (7,) in [-1, 1], with its gripper: -1 opens, 1 closes."""
    return np.clip([*action[:6], 1.0 - 2.0 * action[6]], -1.0, 1.0)


def to_state(seen: dict[str, np.ndarray]) -> np.ndarray:
    """(8,) float32: position, axis times angle, finger joints."""
    rotation = axis_angle(seen["robot0_eef_quat"])
    return np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]]).astype(np.float32)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(4,) x, y, z, w -> (3,) axis times angle in radians, 0 to 2 pi."""
    length = float(np.sqrt(max(1.0 - quaternion[3] ** 2, 0.0)))
    if length < 1e-8:
        return np.zeros(3)
    return quaternion[:3] / length * 2 * np.arccos(np.clip(quaternion[3], -1, 1))


def turn_to_faces(hand: np.ndarray, cube: np.ndarray) -> float:
    """Radians about the vertical, at most an eighth of a turn, that bring the fingers parallel to faces of a cube.

    Both as quaternions x, y, z, w; the fingers move along the hand's y axis.
    """

    def heading(quaternion: np.ndarray, axis: int) -> float:
        x, y, z, w = quaternion
        column = (
            (1 - 2 * (y * y + z * z), 2 * (x * y + z * w))
            if axis == 0
            else (
                2 * (x * y - z * w),
                1 - 2 * (x * x + z * z),
            )
        )
        return float(np.arctan2(column[1], column[0]))

    quarter = np.pi / 2
    return float((heading(cube, 0) - heading(hand, 1) + quarter / 2) % quarter - quarter / 2)


def action_towards(goal: np.ndarray, hand: np.ndarray, *, opened: bool, turn: float = 0.0) -> np.ndarray:
    """(7,) of the project: a step from (3,) to (3,) metres, and a turn in radians about the vertical."""
    translation = np.clip(GAIN * (goal - hand), -1, 1)
    return np.array([*translation, 0.0, 0.0, np.clip(2 * turn, -1, 1), float(opened)])
