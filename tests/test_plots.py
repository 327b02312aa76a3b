"""Pictures with names that a user gave: of numbers, tasks, variations, models."""

import numpy as np
import pytest


pytest.importorskip("matplotlib", reason="plots need the [demo] extra")
from matplotlib.text import Text  # noqa: E402

from openvla.bench.plot import plot  # noqa: E402
from openvla.data.statistics import plot_statistics  # noqa: E402
from openvla.evaluation.report import plot_success  # noqa: E402
from openvla.training.curves import plot_curves  # noqa: E402


NAME = r"$\rest_{$"  # of a formula that is none
STATISTICS = {"action": {"q01": [0, 0], "q99": [1, 1], "mask": [True, True]}}


def test_names_with_dollar_signs_are_no_formulas(tmp_path, monkeypatch):
    """A formula was drawn, or an error came after the work was done."""
    seen, draw = set[str](), Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *given: (seen.add(self.get_text()), draw(self, *given))[1])
    counts = {"success": 0.5, "low": 0.2, "high": 0.8, "task": NAME, "axis": "none"}
    row = {"min_ms": 1.0, "stages": {}}
    pictures = {
        "actions": lambda path: plot_statistics(np.eye(5)[:, :2], STATISTICS, path, [NAME, "y"]),
        "tasks": lambda path: plot_success({"rows": [counts | {"variation": ""}]}, path),
        "axes": lambda path: plot_success({"rows": [counts | {"variation": f"none:{NAME}"}], "axes": [counts]}, path),
        "curves": lambda path: plot_curves({NAME: [{"step": 1, "loss": 1.0, "action_l1": 1.0}]}, path),
        "latency": lambda path: plot(
            {"model": NAME, "dtype": "", "device": "", "threads": 1, "ways": {NAME: row}}, path
        ),
    }
    for name, picture in pictures.items():
        seen.clear()
        picture(tmp_path / f"{name}.png")
        assert any(NAME.replace("$", r"\$") in text for text in seen), name
