"""Windows over a standardized trajectory: the observations a step has seen, the actions that follow.

Source: github.com/openvla/openvla, prismatic/vla/datasets/rlds/traj_transforms.py; tests/test_trajectory.py compares
with its outputs. T steps, A action dimensions.
"""

import numpy as np

from .oxe.conversions import Trajectory, map_arrays


def relabel_goals(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
    """Give every step a goal: the observation of a step drawn evenly from those after it (the last step: its own).

    The goal's step is `task/goal_timestep` here. The original calls it `task/timestep`, where `chunk_act_obs` finds it
    and ends the actions at a step that was drawn at random.

    Args:
        trajectory: `observation` (a nested dict), optionally `task`.

    Returns:
        The trajectory with `task` extended by the goal's observation and `goal_timestep` (T,) int32.
    """
    observation = {key: value for key, value in trajectory["observation"].items() if key != "timestep"}
    last = len(trajectory["action"]) - 1
    step = np.arange(last + 1)
    goal = rng.integers(np.minimum(step + 1, last), last, endpoint=True, dtype=np.int32)
    seen = map_arrays(lambda array: array[goal], observation)
    return {**trajectory, "task": {**trajectory.get("task", {}), **seen, "goal_timestep": goal}}


def chunk_act_obs(trajectory: Trajectory, window_size: int, future_action_window_size: int = 0) -> Trajectory:
    """Give every step the observations of its recent past, and these and coming actions.

    Observations before the start repeat the first, with `pad_mask` False. Actions before the start repeat the first;
    past the goal (`task/timestep`, (T,), or the last step) absolute dimensions repeat the action at the goal and
    relative ones are 0, which in normalized units is the middle of the range and not standstill.

    Args:
        trajectory: `observation` (a nested dict), `action` (T, A), optionally `task/timestep` and
            `absolute_action_mask` ((A,) or (T, A) bool; without it every dimension counts as relative).
        window_size: Observations per step, the current one included.
        future_action_window_size: Actions after the current one.

    Returns:
        The trajectory with `observation/*` (T, window_size, ...), `observation/pad_mask` (T, window_size) bool and
        `action` (T, window_size + future_action_window_size, A).

    Raises:
        ValueError: If `window_size` is below 1 or `future_action_window_size` below 0.
    """
    if window_size < 1 or future_action_window_size < 0:
        raise ValueError(
            f"window_size={window_size} and future_action_window_size={future_action_window_size}: "
            "expected at least 1 and at least 0."
        )
    action = trajectory["action"]
    step = np.arange(len(action))[:, None]
    observed = step + np.arange(1 - window_size, 1)
    acted = step + np.arange(1 - window_size, 1 + future_action_window_size)
    goal = np.asarray(trajectory.get("task", {}).get("timestep", np.full(len(action), len(action) - 1)))[:, None]

    observation = map_arrays(lambda array: array[np.maximum(observed, 0)], trajectory["observation"])
    chunks = action[np.minimum(np.maximum(acted, 0), goal)]
    absolute = np.asarray(trajectory.get("absolute_action_mask", np.zeros(action.shape[-1])), dtype=bool)
    absolute = np.broadcast_to(absolute, action.shape)[:, None]
    chunks = np.where((acted > goal)[..., None] & ~absolute, action.dtype.type(0), chunks)
    return {**trajectory, "observation": {**observation, "pad_mask": observed >= 0}, "action": chunks}
