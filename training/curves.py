"""Loss and L1 over the steps of a run, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.statistics import literal
from ..folders import whole_file


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw the logs of one run or of several beside each other.

    Args:
        runs: `{name: log}`, a log as in `trainer_state.json`.
        path: Picture to write (PNG, PDF, SVG).

    Returns:
        False where matplotlib is not installed, and nothing was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, log in runs.items():
        for panel, key, label in zip(axes, ("loss", "action_l1"), ("loss", "normalized L1")):
            train = [(entry["step"], entry[key]) for entry in log if key in entry]
            held_out = [(entry["step"], entry[f"eval_{key}"]) for entry in log if f"eval_{key}" in entry]
            (line,) = (
                panel.plot(*zip(*train), label=literal(name)) if train else panel.plot([], [], label=literal(name))
            )
            if held_out:
                panel.plot(*zip(*held_out), "--o", ms=3, color=line.get_color())
            panel.set(xlabel="step", ylabel=f"{label} (dashed: held out)", yscale="log")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format=path.suffix[1:])
    return True
