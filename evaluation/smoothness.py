"""How smoothly a robot was driven: jerk of the actions that were executed."""

import numpy as np

from ..action_spec import ActionSpec


def mean_jerk(actions: np.ndarray, spec: ActionSpec) -> float | None:
    """Mean over steps of the length of the third difference of the commanded place, in the unit of the actions (times
    the rate cubed: per second cubed). 0: driven with constant acceleration.

    Numbers that are changes add up to a place, so that theirs is a second difference. Grippers are left out.

    Args:
        actions: (T, A) as executed, one for each step.

    Returns:
        None where fewer than four places were commanded, or nothing but grippers.
    """
    relative = np.array(spec.relative)
    arm = np.array([dim not in spec.grippers for dim in range(spec.action_dim)])
    if len(actions) < 4 or not arm.any():
        return None
    changes = np.diff(actions[:, arm & relative], n=2, axis=0)[1:]  # as many as there are third differences
    places = np.diff(actions[:, arm & ~relative], n=3, axis=0)
    return float(np.linalg.norm(np.concatenate([changes, places], axis=1), axis=1).mean())
