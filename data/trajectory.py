"""The actions that follow each step of an episode.

Source: github.com/openvla/openvla, prismatic/vla/datasets/rlds/traj_transforms.py; tests/test_trajectory.py compares
with its outputs.
"""

import numpy as np


def chunk_actions(actions: np.ndarray, action_chunk: int, absolute: np.ndarray) -> np.ndarray:
    """(T, action_chunk, A): of each step its action and those that follow.

    Past the last step absolute dimensions repeat its action and relative ones are 0, which in normalized units is the
    middle of the range and not standstill.

    Args:
        actions: (T, A).
        absolute: (A,) bool.

    Raises:
        ValueError: If `action_chunk` is below 1.
    """
    if action_chunk < 1:
        raise ValueError(f"action_chunk={action_chunk}: expected at least 1.")
    step, last = np.arange(len(actions))[:, None] + np.arange(action_chunk), len(actions) - 1
    return np.where((step > last)[..., None] & ~absolute, actions.dtype.type(0), actions[np.minimum(step, last)])
