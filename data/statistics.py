"""Action statistics of a dataset, as the original computes them: they give normalized actions their units."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..action_tokenizer import read_statistics
from ..extras import require
from ..folders import whole_file
from .dimensions import default_mask, loses_rare_values
from .episode import Episode


PLOTS = (".png", ".pdf", ".svg")  # what a plot's file may be


def counted(number: int, noun: str) -> str:
    """ "1 episode", "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, population std, max, min and the 1st and 99th percentile (linear interpolation) of (N, A) float32 rows."""
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "max": values.max(0).tolist(),
        "min": values.min(0).tolist(),
        "q01": quantile(values, 0.01).tolist(),
        "q99": quantile(values, 0.99).tolist(),
    }


def quantile(values: np.ndarray, q: float) -> np.ndarray:
    """(A,) float64: `np.quantile(values, q, axis=0)` of (N, A) rows as numpy 1.26 computed it for the original, to the
    last digit: neighbours are subtracted as float32 and weighted as float64, where numpy 2 rounds all to float32."""
    place = q * (len(values) - 1)
    below = int(place)
    above, weight = min(below + 1, len(values) - 1), np.float64(place - below)
    ordered = np.partition(values, (below, above), axis=0)
    low, step = ordered[below], (ordered[above] - ordered[below]).astype(np.float64)
    return ordered[above] - step * (1 - weight) if weight >= 0.5 else low + step * weight


def collect(episodes: Iterable[Episode], progress: bool = False) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Actions (T, A) and states (T, S) of all episodes, float32; None where an episode has no states.

    Images are not decoded, episodes are not kept: memory grows by the actions and states alone.

    Raises:
        ValueError: If there are no episodes, or their actions or states differ in dimension.
    """
    actions: list[np.ndarray] = []
    states: list[np.ndarray] = []
    for episode in tqdm(episodes, desc="statistics", unit="episode", disable=not progress):
        for what, values, known in (("actions", episode.actions, actions), ("states", episode.state, states)):
            if values is not None and known and values.shape[1] != known[0].shape[1]:
                raise ValueError(
                    f"{episode.origin or episode}: {what} have {values.shape[1]} dimensions, those before "
                    f"{known[0].shape[1]}; in one dataset all have as many."
                )
        actions.append(np.asarray(episode.actions, dtype=np.float32))
        if episode.state is not None:
            states.append(np.asarray(episode.state, dtype=np.float32))
    if not actions:
        raise ValueError("There are no episodes to compute statistics of: is it the right split?")
    return actions, states if len(states) == len(actions) else None


def compute_statistics(
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray] | None = None,
    mask: Sequence[bool] | None = None,
    *,
    grippers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    published: bool = False,
) -> dict[str, Any]:
    """`{"action": {"mean", ..., "q99", "mask"}, "proprio": {...}, "num_transitions", "num_trajectories"}`.

    A scaled dimension whose rare values q01 and q99 would lose (see `loses_rare_values`) gets its min and max for q01
    and q99, so that the original's formulas keep them.

    Args:
        actions: (T, A) of each episode of the dataset (see `collect`), standardized, of all splits and also of those
            without an instruction, as in the original.
        states: (T, S) of each. Without them the original writes zeros of the shape of an action.
        mask: (A,) which dimensions are scaled. Default: `default_mask` of `grippers` and `names`.
        published: Quantiles as the original has them also where they lose rare values.

    Raises:
        ValueError: If the mask has another length.
    """
    all_actions = np.concatenate(actions)
    if mask is None:
        mask = default_mask(all_actions, grippers, names)
    elif len(mask) != all_actions.shape[1]:
        raise ValueError(
            f"mask has {len(mask)} entries, actions have {all_actions.shape[1]} dimensions: give one for each, "
            "1 (scaled) or 0 (as recorded)."
        )
    all_states = np.zeros_like(all_actions) if states is None else np.concatenate(states)
    action, proprio = describe(all_actions), describe(all_states)
    if not published:
        _keep_rare_values(action, all_actions, mask)
        _keep_rare_values(proprio, all_states, [True] * all_states.shape[1])
    return {
        "action": {**action, "mask": [bool(scaled) for scaled in mask]},
        "proprio": proprio,
        "num_transitions": len(all_actions),
        "num_trajectories": len(actions),
    }


def _keep_rare_values(stats: dict[str, list[float]], values: np.ndarray, mask: Sequence[bool]) -> None:
    for dim in np.flatnonzero(loses_rare_values(values, stats["q01"], stats["q99"]) & np.asarray(mask, dtype=bool)):
        stats["q01"][dim], stats["q99"][dim] = stats["min"][dim], stats["max"][dim]


def statistics_table(
    stats: dict[str, Any], names: Sequence[str] | None = None, state_names: Sequence[str] | None = None
) -> str:
    """The statistics of actions, and of states where there are some, as text: one line for each dimension. What
    statistics that are given do not say is left open."""
    columns = ("q01", "q99", "min", "max", "mean", "std")
    rows: list[tuple[str, dict[str, Any], int]] = []
    for what, given in (("action", names), ("proprio", state_names)):
        known = stats.get(what) or {"q01": ()}
        if what == "action" or any(map(any, (known.get("min", ()), known.get("max", ())))):  # zeros: no states
            dims = range(len(known["q01"]))
            labels = given if given and len(given) == len(dims) else [f"{what}[{index}]" for index in dims]
            rows += [(label, known, index) for index, label in enumerate(labels)]
    width = max(len("actions"), *(len(label) for label, _, _ in rows))
    lines = ["actions".ljust(width) + "".join(f"{column:>10}" for column in columns) + "  scaled"]
    for label, known, index in rows:
        if index == 0 and known is not rows[0][1]:  # numbers of both may be called x, y, z
            lines.append("states")
        values = "".join(f"{known[name][index]:10.4f}" if known.get(name) else f"{'-':>10}" for name in columns)
        note = "  (never changes)" if known.get("min") and known["min"][index] == known["max"][index] else ""
        scaled = known.get("mask") or [True] * len(known["q01"])
        lines.append(f"{label:<{width}}{values}  {'yes' if scaled[index] else 'no'}{note}")
    if {"num_trajectories", "num_transitions"} <= stats.keys():
        lines.append(f"{counted(stats['num_trajectories'], 'episode')}, {counted(stats['num_transitions'], 'step')}")
    return "\n".join(lines)


def check_statistics_file(file: Path) -> None:
    """Raise a `FileExistsError` if a file that is to be replaced holds no statistics."""
    try:
        read_statistics(file)
    except (ValueError, KeyError) as error:
        raise FileExistsError(f"'{file}' holds no statistics and would be replaced: give another file.") from error


def check_plot(path: Path) -> None:
    """Make the folder of a plot.

    Raises:
        FileExistsError: If a file is there that is no plot of matplotlib, and would be replaced.
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If its name does not end as that of a picture.
    """
    if path.exists() and not (path.is_file() and b"matplotlib" in path.read_bytes().lower()):
        raise FileExistsError(f"'{path}' is no plot and would be replaced: give another file.")
    if path.suffix.lower() not in PLOTS:  # without one the library adds it, and writes to a file that was not asked for
        raise ValueError(f"plot='{path}': expected a file that ends in {', '.join(PLOTS)}.")
    require("matplotlib", purpose="A plot")
    path.parent.mkdir(parents=True, exist_ok=True)


def literal(text: str) -> str:
    """A text as matplotlib draws it: for what stands between two dollar signs it would look as for a formula."""
    return text.replace("$", r"\$")


def plot_statistics(
    actions: np.ndarray, stats: dict[str, Any], path: Path, names: Sequence[str] | None = None, bins: int = 256
) -> None:
    """A histogram of each action dimension, with q01 and q99 and the edges of every 16th action bin between them.

    Args:
        actions: (N, A) in the units of the dataset.
        path: Picture to write (PNG, PDF, SVG).
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = actions.shape[1]
    names = names or [f"action[{index}]" for index in range(dims)]
    figure, grid = plt.subplots(dims, 1, figsize=(8, 1.6 * dims), layout="constrained", squeeze=False)
    for index, axes in enumerate(grid[:, 0]):
        low, high = stats["action"]["q01"][index], stats["action"]["q99"][index]
        if not (stats["action"].get("mask") or [True] * dims)[index]:
            low, high = -1.0, 1.0  # not scaled: the bins divide [-1, 1] itself
        axes.hist(actions[:, index], bins=100, color="tab:blue")
        for edge in np.linspace(low, high, bins)[:: bins // 16]:
            axes.axvline(edge, color="lightgray", lw=0.5, zorder=0)
        for value in (low, high):
            axes.axvline(value, color="tab:red", lw=1)
        axes.set_yscale("log")
        axes.set_ylabel(literal(names[index]))
    figure.suptitle("actions: steps by value (log scale)\nred: the ends of the bins (q01, q99), gray: every 16th edge")
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format=path.suffix[1:].lower())
    plt.close(figure)
