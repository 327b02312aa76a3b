"""Simulators that show or answer something else than before, as --env changing:Seen."""

from dataclasses import replace

import numpy as np
from toy import Line, TwoArms

from openvla.action_spec import ActionSpec
from openvla.observation import Observation


class Seen(Line):
    """Odd seeds begin as the others, and go on with other cameras."""

    def reset(self, seed, task, variation=""):
        self.odd = seed % 2 == 1
        return super().reset(seed, task)

    def step(self, action):
        observation, success = super().step(action)
        return (
            replace(observation, images={"wrist": observation.images["front"]}) if self.odd else observation
        ), success


class Expert(Seen):
    """Odd seeds have an expert of other numbers."""

    def step(self, action):
        return Line.step(self, action)

    def expert_action(self):
        return np.zeros(5) if self.odd else super().expert_action()


class Two(Line):
    """Actions of two numbers, the second a gripper; keeps what was executed."""

    tasks, task_sets, max_steps, frequency, robot, state_names = ("go",), {"all": ("go",)}, 40, 20.0, "toy", ("x",)
    action_spec = ActionSpec(("x", "gripper"), (True, False), (1,))

    def __init__(self, *, size=16, wrist=False):
        self.executed = []

    def instructions(self, task, *, held_out=False):
        return ("move to the goal",)

    def variations(self, task):
        return ()

    def step(self, action):
        self.executed.append(action)
        return super().step(action)

    def expert_action(self):
        return np.array([-self.position, 1.0])


class Turning(Two):
    action_spec = ActionSpec(("x", "yaw"), (True, False))

    def standstill(self):
        return np.zeros(2)


class Anywhere(TwoArms):
    """Begins where the seed says; a first action that would move it breaks the episode."""

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        super().reset(seed, task)
        self.joints, self.begun = np.random.default_rng([seed, 1]).uniform(0, 1, 14), False
        return self._observe()

    def standstill(self):
        return self.joints.copy()

    def step(self, action):
        if not self.begun and abs(action - self.joints).max() > 1e-9:
            raise RuntimeError("the arms moved before anybody decided to")
        self.begun = True
        return super().step(action)


class LetGo(Anywhere):
    """Has nothing to ask once it is closed, as what wraps a simulator and lets it go."""

    closed = False

    @property
    def standstill(self):
        if self.closed:
            raise AttributeError("standstill")
        return super().standstill

    def close(self):
        self.closed = True


class Nowhere(Anywhere):
    def standstill(self):
        return self.joints[:7]
