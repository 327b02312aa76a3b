"""A world small enough to know what must happen: a point on a line that is to be moved to a goal."""

import sys

import numpy as np

from openvla.action_spec import ActionSpec
from openvla.observation import Observation


SIZE = 16


class Line:
    """The point starts at -1..1 by its seed; an action's x moves it by at most 0.1; the goal is 0. The picture's gray
    tells where it is. The tasks "raise" and "die" break at their third step."""

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        self.position, self.steps, self.task = float(np.random.default_rng(seed).uniform(-1, 1)), 0, task
        return self._observe()

    def _observe(self) -> Observation:
        image = np.full((SIZE, SIZE, 3), round((self.position + 2) * 60), np.uint8)
        state = np.array([self.position], dtype=np.float32)
        return Observation(images={"front": image}, state=state, instruction=f"move to the goal ({self.task})")

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        self.steps += 1
        if self.task == "raise" and self.steps == 3:
            raise RuntimeError("the arm fell off in /home/me/arm.xml")
        if self.task == "die" and self.steps == 3:
            raise SystemExit(3)
        self.position += float(np.clip(action[0], -0.1, 0.1))
        return self._observe(), abs(self.position) < 0.06

    def expert_action(self) -> np.ndarray:
        return np.array([-self.position, 0, 0, 0, 0, 0, 1.0])

    def close(self) -> None:
        pass


class Imports(Line):
    """What its process has imported."""

    def heavy(self) -> list[str]:
        return [name for name in ("torch", "transformers", "timm", "huggingface_hub") if name in sys.modules]


def make_line() -> Line:
    return Line()


class FromPixels:
    """Moves to the goal by what the picture shows; counts how many it was shown at once."""

    def __init__(self):
        self.batches: list[int] = []

    def act(self, observations):
        self.batches.append(len(observations))
        seen = [float(observation.images["front"][0, 0, 0]) / 60 - 2 for observation in observations]
        return np.array([[-position, 0, 0, 0, 0, 0, 1.0] for position in seen])


class TwoArms:
    """Fourteen joint positions, which are places: each is to come near the one that the picture shows. A simulator of
    one's own, as --env toy:TwoArms."""

    tasks = ("pose",)
    task_sets = {"all": ("pose",)}
    max_steps, frequency, robot = 20, 10.0, "toy"
    state_names = action_spec_names = tuple(f"joint_{index}" for index in range(14))
    action_spec = ActionSpec(action_spec_names, (False,) * 14, hz=10.0)

    def instructions(self, task: str, *, held_out: bool = False) -> tuple[str, ...]:
        return ("take the pose",)

    def variations(self, task: str) -> tuple[str, ...]:
        return ()

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        self.joints = np.zeros(14)
        self.goal = np.random.default_rng(seed).integers(0, 100, 14) / 100
        return self._observe()

    def _observe(self) -> Observation:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[0, :14, 0] = self.goal * 100
        return Observation({"image": image}, self.joints.astype(np.float32), "take the pose")

    def standstill(self) -> np.ndarray:
        return np.zeros(14)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        self.joints += np.clip(action - self.joints, -0.2, 0.2)
        return self._observe(), bool(abs(self.joints - self.goal).max() < 0.01)

    def expert_action(self) -> np.ndarray:
        return self.goal

    def close(self) -> None:
        pass


class ToPose:
    """The pose that the picture shows, for two steps."""

    def act(self, observations):
        seen = [observation.images["image"][0, :14, 0] / 100 for observation in observations]
        return np.array([[pose, pose] for pose in seen])

    def __repr__(self):
        return "to the pose"
