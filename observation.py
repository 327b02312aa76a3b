"""What is seen before an action is chosen: by a policy, from a simulator, a robot or a client."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What is seen before an action is chosen."""

    images: Mapping[str, np.ndarray]  # camera -> (H, W, 3) uint8, the right way up; empty where nothing is rendered
    state: np.ndarray  # (S,) float32: proprioception, never the objects
    instruction: str
    # (n, A): actions of the next steps that are decided already, because they are executed while the policy thinks.
    committed: np.ndarray | None = None
    step: int | None = None  # of the episode, from 0 on, where it is counted: how many steps of a chunk are executed
    slot: int = 0  # which of the episodes that run side by side: what a policy keeps of an episode, it keeps by slot
