"""What the recipes of `standardize.py` are made of: gripper conventions, rotations, encodings, filters of frames.

A trajectory is a nested dict of arrays with a leading time axis of T steps; strings are object arrays of bytes.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


Trajectory = dict[str, Any]


# --- Gripper conventions. Standard is 1 = open, 0 = closed. ---


def clip_to_unit(values: np.ndarray) -> np.ndarray:
    """Values clipped to [0, 1]; a gripper command in [-1, 1] loses its lower half."""
    return np.clip(values, 0, 1)


def invert_gripper_actions(gripper: np.ndarray) -> np.ndarray:
    """`1 - gripper`: between 1 = closed and 1 = open. (T, ...) in [0, 1]."""
    return 1 - gripper


def binarize_gripper_actions(gripper: np.ndarray) -> np.ndarray:
    """Absolute gripper values to 1 (above 0.95) or 0 (below 0.05); in between, the next settled value is taken.

    A tail that never settles takes the raw last value, so that the result can hold a value such as 0.37.

    Args:
        gripper: (T,) or (T, 1), 1 = open.

    Returns:
        float32 of the same shape.
    """
    num_steps = len(gripper)
    is_open = gripper > 0.95
    settled = is_open | (gripper < 0.05)
    values = np.where(settled, is_open, gripper[-1:]).astype(np.float32)
    next_settled = np.minimum.accumulate(np.where(settled, _steps(gripper), num_steps - 1)[::-1])[::-1]
    return np.take_along_axis(values, next_settled, axis=0)


def rel2abs_gripper_actions(gripper: np.ndarray) -> np.ndarray:
    """Relative commands (above 0.1 close, below -0.1 open, else keep) to absolute ones (1 = open, 0 = closed).

    Before the first command the gripper is in the opposite state of it, since a first command is taken to change
    something; without any command it is open.

    Args:
        gripper: (T,) or (T, 1).

    Returns:
        float32 of the same shape.
    """
    opens = gripper < -0.1
    commanded = opens | (gripper > 0.1)
    last_command = np.maximum.accumulate(np.where(commanded, _steps(gripper), -1))
    first_opens = np.any(opens & (np.cumsum(commanded, axis=0) == 1), axis=0)
    state = np.take_along_axis(opens, np.maximum(last_command, 0), axis=0)
    return np.where(last_command < 0, ~first_opens, state).astype(np.float32)


def _steps(values: np.ndarray) -> np.ndarray:
    """Index along the leading axis, in the shape of `values`."""
    return np.broadcast_to(np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1)), values.shape)


# --- Rotations and encodings ---


def to_float32(values: np.ndarray) -> np.ndarray:
    """Any numbers as float32."""
    return values.astype(np.float32)


def euler_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Angles about x, y, z (radians; rotation matrix Rz Ry Rx) of unit quaternions in the order x, y, z, w.

    Follows tensorflow_graphics, which the published models' data went through, to float precision: products are shrunk
    by two epsilons so that rounding never leaves [-1, 1], and within 1e-6 of a gimbal lock the z angle is set to zero.
    Quaternions that are not of unit length have no angles; they may give NaN.

    Args:
        quaternion: (..., 4) float.

    Returns:
        (..., 3) of the same dtype.
    """
    dtype = quaternion.dtype.type
    epsilon = dtype(2 * np.finfo(dtype).eps)
    shrink = dtype(1) - epsilon

    def away_from_zero(values):  # atan2 of two zeros has no direction
        return values + np.where(values >= 0, epsilon, -epsilon)

    x, y, z, w = np.moveaxis(quaternion, -1, 0)
    x2, y2, z2 = (2 * axis * shrink for axis in (x, y, z))
    r00 = (1 - (y2 * y + z2 * z)) * shrink
    r10 = (y2 * x + z2 * w) * shrink
    r20 = (z2 * x - y2 * w) * shrink
    r21 = (z2 * y + x2 * w) * shrink
    r22 = (1 - (x2 * x + y2 * y)) * shrink
    r01 = (y2 * x - z2 * w) * shrink
    r02 = (z2 * x + y2 * w) * shrink
    with np.errstate(invalid="ignore"):
        pitch = -np.arcsin(r20)
    angles = np.stack([np.arctan2(r21, away_from_zero(r22)), pitch, np.arctan2(r10, away_from_zero(r00))], axis=-1)

    sign = np.where(r20 >= 0, dtype(1), dtype(-1))
    roll_locked = np.arctan2(-sign * r01, -sign * away_from_zero(r02))
    locked = np.stack([roll_locked, -sign * dtype(np.pi / 2), np.zeros_like(sign)], axis=-1)
    return np.where((np.abs(np.abs(r20) - 1) < 1e-6)[..., None], locked, angles)


def decompress_floats(values: np.ndarray, width: int) -> np.ndarray:
    """(T,) zlib-compressed bytes of little-endian float32 -> (T, width) float32."""
    rows = [np.frombuffer(zlib.decompress(value), dtype="<f4") for value in values]
    return np.concatenate([np.empty(0, np.float32), *rows]).reshape(-1, width)


def text_from_code_points(values: np.ndarray) -> np.ndarray:
    """(T, N) Unicode code points -> (T,) UTF-8 bytes of the text before the first 0; invalid ones become U+FFFD."""
    texts = np.empty(len(values), dtype=object)
    for step, row in enumerate(values.astype("<u4")):
        texts[step] = row.tobytes().decode("utf-32-le", errors="replace").split("\0", 1)[0].encode()
    return texts


# --- Complete trajectories ---


def map_arrays(function: Callable[[np.ndarray], np.ndarray], trajectory: Trajectory) -> Trajectory:
    """A new nested dict with `function` applied to every array."""
    return {
        key: map_arrays(function, value) if isinstance(value, dict) else function(value)
        for key, value in trajectory.items()
    }


def drop_first_step(trajectory: Trajectory) -> Trajectory:
    """The trajectory without its first step (in Bridge its action is all zero)."""
    return map_arrays(lambda array: array[1:], trajectory)


def relabel_bridge_actions(trajectory: Trajectory) -> Trajectory:
    """Arm actions from the states that were reached; the last step, which reaches none, is dropped.

    Args:
        trajectory: `action` (T, A) and `observation/state` (T, >= 6: xyz, roll-pitch-yaw, ...), with more beside them.

    Returns:
        T - 1 steps; `action` (T - 1, 7) is `state[t + 1, :6] - state[t, :6]` with the recorded gripper.
    """
    state = trajectory["observation"]["state"]
    shortened = map_arrays(lambda array: array[:-1], trajectory)
    reached = state[1:, :6] - state[:-1, :6]
    return {**shortened, "action": np.concatenate([reached, shortened["action"][:, -1:]], axis=1)}


# --- Frame filters ---

# Quantiles of the action that DROID's filter is defined with (first six dimensions)
DROID_Q01 = np.array(
    [-0.7776297926902771, -0.5803514122962952, -0.5795090794563293]
    + [-0.6464047729969025, -0.7041108310222626, -0.8895104378461838],
    dtype=np.float32,
)
DROID_Q99 = np.array(
    [0.7597932070493698, 0.5726242214441299, 0.7351000607013702]
    + [0.6705610305070877, 0.6464948207139969, 0.8897542208433151],
    dtype=np.float32,
)


def droid_moves(normalized_action: np.ndarray) -> np.ndarray:
    """Whether the arm moves: DROID frames where it does not are left out of training. The gripper does not count.

    Args:
        normalized_action: (..., 7), normalized to [-1, 1] by the 1st and 99th percentile.

    Returns:
        (...) bool: any of the six arm values more than 1e-5 from what zero motion is normalized to.
    """
    return np.any(np.abs(normalized_action[..., :6] - _normalize_like_droid(np.zeros(6, np.float32))) > 1e-5, axis=-1)


def droid_moves_raw(action: np.ndarray) -> np.ndarray:
    """`droid_moves` of actions (..., 7) in the units of DROID, whatever statistics they will be normalized with."""
    return droid_moves(_normalize_like_droid(action[..., :6]))


def _normalize_like_droid(arm: np.ndarray) -> np.ndarray:
    return 2 * (arm - DROID_Q01) / (DROID_Q99 - DROID_Q01 + np.float32(1e-8)) - 1
