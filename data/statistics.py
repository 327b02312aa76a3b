"""Action statistics of a dataset, as the original computes them: they give normalized actions their units."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from .episode import Episode


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, population std, max, min and the 1st and 99th percentile (linear interpolation) of (N, A) float32 rows."""
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "max": values.max(0).tolist(),
        "min": values.min(0).tolist(),
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
    }


def default_mask(actions: np.ndarray) -> list[bool]:
    """Which dimensions are scaled: all, but for a gripper at the end whose values already lie in [0, 1]."""
    gripper = actions.shape[1] > 1 and bool(((actions[:, -1] >= 0) & (actions[:, -1] <= 1)).all())
    return [True] * (actions.shape[1] - 1) + [not gripper]


def compute_statistics(
    episodes: Iterable[Episode], mask: Sequence[bool] | None = None, progress: bool = False
) -> dict[str, Any]:
    """`{"action": {"mean", ..., "q99", "mask"}, "proprio": {...}, "num_transitions", "num_trajectories"}`.

    Images are not decoded, episodes are not kept: memory grows by the actions and states alone.

    Args:
        episodes: All episodes of the dataset, standardized, of training and validation and also those without an
            instruction, as in the original.
        mask: (A,) which dimensions are scaled. Default: `default_mask`.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no episodes, or their actions differ in dimension.
    """
    actions: list[np.ndarray] = []
    states: list[np.ndarray] = []
    missing_states = False
    for episode in tqdm(episodes, desc="statistics", unit="episode", disable=not progress):
        if actions and episode.actions.shape[1] != actions[0].shape[1]:
            raise ValueError(
                f"{episode.source or episode}: actions have {episode.actions.shape[1]} dimensions, those before "
                f"{actions[0].shape[1]}; one dataset has one action space."
            )
        actions.append(np.asarray(episode.actions, dtype=np.float32))
        if episode.state is None:
            missing_states = True
        else:
            states.append(np.asarray(episode.state, dtype=np.float32))
    if not actions:
        raise ValueError("There are no episodes to compute statistics of: is it the right split?")
    all_actions = np.concatenate(actions)
    if mask is None:
        mask = default_mask(all_actions)
    elif len(mask) != all_actions.shape[1]:
        raise ValueError(f"mask has {len(mask)} entries, actions have {all_actions.shape[1]} dimensions.")
    # Without states the original writes zeros of the shape of an action.
    all_states = np.zeros_like(all_actions) if missing_states else np.concatenate(states)
    return {
        "action": {**describe(all_actions), "mask": [bool(scaled) for scaled in mask]},
        "proprio": describe(all_states),
        "num_transitions": len(all_actions),
        "num_trajectories": len(actions),
    }
