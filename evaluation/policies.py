"""What a model is measured against: random actions, and the mean of the demonstrations."""

from collections.abc import Sequence

import numpy as np

from ..observation import Observation
from ..policy import OpenVLAPolicy, Policy


class RandomPolicy(Policy):
    """Uniform actions between `low` and `high`, each (A,)."""

    def __init__(self, low: np.ndarray, high: np.ndarray, seed: int = 0):
        self.low, self.high = low, high
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """What comes next depends on this number alone."""
        self.generator = np.random.default_rng(seed)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        return self.generator.uniform(self.low, self.high, (len(observations), len(self.low)))


class ConstantPolicy(Policy):
    """One action, (A,), whatever is seen: the mean of the demonstrations, for comparison."""

    def __init__(self, action: np.ndarray):
        self.action = np.asarray(action, dtype=np.float64)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        return np.tile(self.action, (len(observations), 1))


__all__ = ["ConstantPolicy", "OpenVLAPolicy", "RandomPolicy"]  # scripts of version 0.1.0 find OpenVLAPolicy here
