"""What an episode of Meta-World can differ in from those recorded: the axes along which a policy has to generalize.

| axis | kinds | what changes |
| --- | --- | --- |
| visual | texture, light, colors, distractors, camera | only how it looks |
| motion | positions | objects and goals begin outside the box that recording draws them from |
| | orientations | what the task is about is turned about the vertical by 5 to 10 degrees; recorded is one orientation |
| physical | smaller, larger | the size of the object that is handled: 0.85 or 1.15 times |
| semantic | paraphrase, unseen | wordings that recording never uses; `unseen`: with words that no recorded one has |
| language | opposite | the scene allows a task and its opposite; doing the opposite first is a failure |
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..choices_openvla import check_choice
from .rendering import Decoration


KINDS = {
    "visual": ("texture", "light", "colors", "distractors", "camera"),
    "motion": ("positions", "orientations"),
    "physical": ("smaller", "larger"),
    "semantic": ("paraphrase", "unseen"),
    "language": ("opposite",),
}
# Fields of a model that variations change, beside those that every reset changes
VARIED = (
    *(
        "geom_matid",
        "geom_rgba",
        "geom_size",
        "geom_pos",
        "geom_rbound",
        "geom_aabb",
        "site_rgba",
        "cam_pos",
        "cam_quat",
    ),
    *("light_dir", "light_diffuse"),
)
VARIED_HEADLIGHT = ("ambient", "diffuse")
# A free object of plain shapes (a mesh has one size) that the task is about
RESIZABLE = (
    *("bin-picking-v3", "peg-insert-side-v3", "pick-out-of-hole-v3", "pick-place-v3", "pick-place-wall-v3"),
    *("push-back-v3", "push-v3", "push-wall-v3", "shelf-place-v3", "sweep-into-v3"),
)
SIZES = {"smaller": 0.85, "larger": 1.15}
TOO_SMALL = ("peg-insert-side-v3", "pick-out-of-hole-v3")  # the expert cannot grasp them any smaller: 0 and 2 of 5
WALLED = ("bin-picking-v3",)  # the bin is around the box: the expert gets no object from outside it, 0 of 5
ROUND = ("reach-v3", "push-v3", "pick-place-v3")  # a puck and no more: turned, it looks as before
TURN = (5.0, 10.0)  # degrees: with 8 to 15 the experts open drawers and windows 2 of 5 times each
BEYOND = 0.25  # of the width of the recorded box, on each side
NARROW = 0.01  # metres: a box is not widened along a side that short
SCENERY = ("world", "tablelink", "RetainingWall", "mocap", "base")  # roots of the bodies that no task is about
APART = 0.13  # metres from the middle of a distractor to anything of the task
WIDEST = 0.15  # metres, radius: long parts count as that wide


class Opposite(NamedTuple):
    """What two tasks share of which one undoes the other: both are possible while the joint of the object, the model's
    last, is at `start`. Metres, of faucets radians."""

    start: float
    box: tuple[tuple[float, ...], tuple[float, ...]]  # lowest and highest place of the object, metres, in both tasks
    done: Callable[[float], bool]  # whether the task that was not asked is, where the joint is there


# `done` is where the simulator says so of the other task. Left out: handles, which the expert pulled 4 of 10 times;
# locks and doors, where the arm begins elsewhere in one of the two tasks.
DRAWER_BOX = ((-0.1, 0.9, 0.0), (0.1, 0.9, 0.0))
WINDOW_BOX = ((-0.1, 0.7, 0.16), (0.1, 0.9, 0.16))
FAUCET_BOX = ((-0.05, 0.8, 0.0), (0.05, 0.85, 0.0))
OPPOSITES = {
    "drawer-open-v3": Opposite(-0.09, DRAWER_BOX, lambda q: q > -0.0315),
    "drawer-close-v3": Opposite(-0.09, DRAWER_BOX, lambda q: q < -0.1595),
    "window-open-v3": Opposite(0.1, WINDOW_BOX, lambda q: q < 0.04),
    "window-close-v3": Opposite(0.1, WINDOW_BOX, lambda q: q > 0.19),
    "faucet-open-v3": Opposite(0.0, FAUCET_BOX, lambda q: q < -1.26),
    "faucet-close-v3": Opposite(0.0, FAUCET_BOX, lambda q: q > 1.38),
}


def kinds_of(task: str, texts: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Variations that a task has, "axis:kind" each. `texts`: of all tasks, {"instruction", "seen", "held_out"}."""
    available = [f"visual:{kind}" for kind in KINDS["visual"]]
    available += ["motion:positions"] if task not in WALLED else []
    available += ["motion:orientations"] if task not in ROUND else []
    sizes = SIZES if task not in TOO_SMALL else ("larger",)
    available += [f"physical:{kind}" for kind in sizes] if task in RESIZABLE else []
    available += ["semantic:paraphrase"] + (["semantic:unseen"] if unseen_wordings(task, texts) else [])
    available += ["language:opposite"] if task in OPPOSITES else []
    return tuple(available)


def choose_kind(variation: str, seed: int, task: str, texts: dict[str, dict[str, Any]]) -> str:
    """The "axis:kind" that a variation stands for: itself, or for an axis alone one of its kinds, by the seed.

    Raises:
        ValueError: If there is no such variation, or this task does not have it.
    """
    if not variation:
        return ""
    check_choice("variation", variation, names())
    of_axis = [kind for kind in kinds_of(task, texts) if variation in (kind, kind.partition(":")[0])]
    if not of_axis:
        others = [other for other in texts if any(kind.startswith(variation) for kind in kinds_of(other, texts))]
        raise ValueError(f"variation={variation!r} is not available in '{task}'. Tasks with it: {', '.join(others)}.")
    return of_axis[int(generator(seed, task, variation).integers(len(of_axis)))]


def names() -> tuple[str, ...]:
    """All variations: each axis alone, and with each of its kinds."""
    return (*KINDS, *(f"{axis}:{kind}" for axis, kinds in KINDS.items() for kind in kinds))


def generator(seed: int, task: str, kind: str) -> np.random.Generator:
    return np.random.default_rng([int(seed), zlib.crc32(task.encode()), zlib.crc32(kind.encode())])


def unseen_wordings(task: str, texts: dict[str, dict[str, Any]]) -> list[str]:
    """Held-out wordings of a task with at least one word that no recorded wording of any task has."""
    known = {word for each in texts.values() for text in (each["instruction"], *each["seen"]) for word in text.split()}
    return [text for text in texts[task]["held_out"] if not known.issuperset(text.split())]


def reword(kind: str, seed: int, task: str, texts: dict[str, dict[str, Any]]) -> str:
    """The instruction of an episode with a variation "semantic:..."; for the others the usual one."""
    if not kind.startswith("semantic"):
        return texts[task]["instruction"]
    wordings = unseen_wordings(task, texts) if kind == "semantic:unseen" else texts[task]["held_out"]
    return wordings[int(generator(seed, task, kind).integers(len(wordings)))]


class Variation:
    """One episode's difference: `before` the world resets itself and `after`; `failed` looks at each step.

    Everything is changed in `world` (its model and its draw of places), which a reset has to put back.
    """

    def __init__(self, kind: str, seed: int, task: str, world: Any):
        self.axis, _, self.kind = kind.partition(":")
        self.task, self.world, self.model = task, world, world.model
        self.rng = generator(seed, task, kind)
        self.decorations: tuple[Decoration, ...] = ()

    def before(self) -> None:
        if self.kind == "positions":
            space = self.world._random_reset_space
            limits = self.world.mocap_low, self.world.mocap_high
            self.world._get_state_rand_vec = outside(space.low, space.high, *limits, self.world.np_random)
        elif self.axis == "physical":
            self._resize(SIZES[self.kind])
        elif self.axis == "language":
            low, high = OPPOSITES[self.task].box
            self.world._get_state_rand_vec = lambda: self.world.np_random.uniform(low, high)

    def after(self) -> None:
        if self.axis == "visual":
            getattr(self, f"_{self.kind}")()
        elif self.kind == "orientations":
            self._turn()
        elif self.axis == "language":
            self.world.data.qpos[-1], self.world.data.qvel[-1] = OPPOSITES[self.task].start, 0.0
            self.model.site_rgba[:, 3] = 0  # the marker of the goal would tell which task is asked

    def failed(self) -> bool:
        """Whether what was not asked is done in this moment."""
        if self.axis != "language":
            return False
        return OPPOSITES[self.task].done(float(self.world.data.qpos[-1]))

    def _objects(self) -> list[int]:
        """Shapes that are seen and belong neither to the robot nor to table and room."""
        model = self.model
        roots = model.body_rootid[model.geom_bodyid]
        mine = [g for g in range(model.ngeom) if model.body(roots[g]).name not in SCENERY]
        return [g for g in mine if model.geom_group[g] <= 2 and model.geom_rgba[g, 3] > 0]

    def _turn(self) -> None:
        """Each thing turns where it is; the goal turns with what stands nearest to it of the things that are fixed."""
        import mujoco

        model, data, world = self.model, self.world.data, self.world
        angle = np.deg2rad(self.rng.uniform(*TURN)) * self.rng.choice([-1, 1])
        turn, turned = np.array([np.cos(angle / 2), 0, 0, np.sin(angle / 2)]), np.zeros(4)
        things = sorted({int(model.body_rootid[model.geom_bodyid[g]]) for g in self._objects()})
        free = {int(model.jnt_bodyid[j]): model.jnt_qposadr[j] for j in np.flatnonzero(model.jnt_type == 0)}
        for body in things:
            pose = data.qpos[free[body] + 3 :][:4] if body in free else model.body_quat[body]
            mujoco.mju_mulQuat(turned, turn, pose)
            pose[:] = turned
        goal = np.array(world._target_pos, dtype=np.float64)
        fixed = [model.body_pos[body][:2] for body in things if body not in free]
        if fixed:
            centre = min(fixed, key=lambda place: np.linalg.norm(goal[:2] - place))
            aside, forward = goal[:2] - centre
            cos, sin = np.cos(angle), np.sin(angle)
            new = np.array([*(centre + [cos * aside - sin * forward, sin * aside + cos * forward]), goal[2]])
            markers = (model.site_bodyid == 0) & np.isclose(model.site_pos, goal).all(axis=1)
            model.site_pos[markers] = world._target_pos = new

    def _texture(self) -> None:
        """The table gets another material of the model, or none, in a colour of its own."""
        model = self.model
        textured = [i for i in range(model.nmat) if model.mat_texid[i].max() >= 0 and model.mat(i).name != "table_wood"]
        material = self.rng.choice([*textured, -1])
        for shape in range(model.ngeom):
            if model.geom_matid[shape] == model.mat("table_wood").id:
                model.geom_matid[shape] = material
        table = model.geom_bodyid == model.body("tablelink").id
        model.geom_rgba[table & (model.geom_group == 1)] = [*self.rng.uniform(0.25, 0.95, 3), 1]

    def _light(self) -> None:
        """Each lamp from anywhere above (at least 30 degrees high), all tinted, at a quarter to three quarters of the
        brightness. (Brighter than usual is hardly seen: what has a texture is as bright as it gets.)"""
        turn, height = self.rng.uniform(0, 2 * np.pi, self.model.nlight), self.rng.uniform(0.5, 1, self.model.nlight)
        across = np.sqrt(1 - height**2)
        self.model.light_dir[:] = np.stack([across * np.cos(turn), across * np.sin(turn), -height], axis=-1)
        tinted = self.rng.uniform(0.35, 0.75) * self.rng.uniform(0.7, 1, 3)
        self.model.light_diffuse[:] *= tinted
        for name in VARIED_HEADLIGHT:
            getattr(self.model.vis.headlight, name)[:] *= tinted

    def _colors(self) -> None:
        """What looked alike gets one new colour."""
        new: dict[tuple[float, ...], np.ndarray] = {}
        for shape in self._objects():
            look = (float(self.model.geom_matid[shape]), *self.model.geom_rgba[shape].tolist())
            colour = new.setdefault(look, self.rng.permutation([1.0, self.rng.uniform(0, 1), 0.1]))
            self.model.geom_rgba[shape, :3] = colour

    def _distractors(self) -> None:
        """Up to three shapes on the table, 2 to 4 cm, that can be seen but not touched, away from objects and goal.

        No spheres and nothing green: goals are green spheres.
        """
        import mujoco

        model, world = self.model, self.world
        taken = [(world.data.geom_xpos[g][:2], min(model.geom_rbound[g], WIDEST)) for g in self._objects()]
        taken += [(world._target_pos[:2], 0.02), (world.tcp_center[:2], 0.02)]
        placed = []
        for shape in (mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_ELLIPSOID):
            size = self.rng.uniform(0.02, 0.04, 3)
            if shape == mujoco.mjtGeom.mjGEOM_CYLINDER:
                size[1] = size[2]  # radius, half of the height
            red, blue = self.rng.permutation([0.9, self.rng.uniform(0, 0.9)])
            colour = np.array([red, self.rng.uniform(0, 0.5), blue, 1.0])
            places = np.c_[self.rng.uniform(-0.4, 0.4, 200), self.rng.uniform(0.45, 0.85, 200)]
            free = [p for p in places if all(np.hypot(*(p - at)) > radius + APART for at, radius in taken)]
            if free:
                taken.append((free[0], 0.04))
                placed.append(Decoration(int(shape), size, np.array([*free[0], size[2]]), colour))
        self.decorations = tuple(placed)

    def _camera(self) -> None:
        """The cameras that stand in the room move by 3 to 5 cm and turn by 2 to 4 degrees."""
        import mujoco

        offset, axis = (vector / np.linalg.norm(vector) for vector in self.rng.normal(size=(2, 3)))
        turn, turned = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, axis, np.deg2rad(self.rng.uniform(2, 4)))
        offset = offset * self.rng.uniform(0.03, 0.05)
        for camera in np.flatnonzero(self.model.cam_bodyid == 0):
            mujoco.mju_mulQuat(turned, turn, self.model.cam_quat[camera])
            self.model.cam_pos[camera] += offset
            self.model.cam_quat[camera] = turned

    def _resize(self, scale: float) -> None:
        """The free object, with its marks; its mass stays."""
        model = self.model
        body = model.jnt_bodyid[np.flatnonzero(model.jnt_type == 0)[0]]
        shapes, sites = model.geom_bodyid == body, model.site_bodyid == body
        for values in (model.geom_size, model.geom_pos, model.geom_rbound, model.geom_aabb):
            values[shapes] *= scale
        model.site_pos[sites] *= scale


def outside(
    low: np.ndarray, high: np.ndarray, lowest: np.ndarray, highest: np.ndarray, rng: np.random.Generator
) -> Callable[[], np.ndarray]:
    """A draw of places (metres, three numbers each, flattened) around the box of the recorded ones, never in it.

    Each place is outside in x or y, by at most `BEYOND` of the width of its box, and between `lowest` and
    `highest` (3,), where the gripper gets to. Heights, and places that recording never changes, stay as they are.
    """
    low, high = low.reshape(-1, 3), high.reshape(-1, 3)
    wide = (high - low > NARROW) & [True, True, False]
    margin = np.where(wide, BEYOND * (high - low), 0.0)
    low_most = np.maximum(low - margin, np.minimum(low, lowest))
    high_most = np.minimum(high + margin, np.maximum(high, highest))

    def draw() -> np.ndarray:
        while True:
            places = rng.uniform(low_most, high_most)
            out = ((places < low) | (places > high)).any(axis=1)
            if (out | ~wide.any(axis=1)).all():
                return places.ravel()

    return draw
