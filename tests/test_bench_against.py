"""What `openvla bench latency --against` measures the others with, and what it says where they act otherwise."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvla.bench.latency import Local, table, token_gap, ways_of
from openvla.bench.startup import growth
from openvla.bench.subject import Frame
from openvla.options.benchmark import BenchOptions
from openvla.policy import load_model


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return load_model(str(ROOT), dtype="float32")


def test_another_environment_has_the_device_and_type_of_this_one(model, monkeypatch):
    """By default transformers 4 loads in float32 what is stored in bfloat16, and torch may know a GPU or none."""
    asked = []
    monkeypatch.setattr("openvla.bench.latency.Other", lambda python, options, key: asked.append(options))
    options = BenchOptions(what="latency", against={"a": "x", "b": "y"})
    assert (options.device, options.dtype) == ("auto", "auto")
    ways_of(options, model, "metaworld")
    assert [(given.device, given.dtype) for given in asked] == [("cpu", "float32")] * 2
    half = SimpleNamespace(device=model.device, dtype=torch.bfloat16, action_head=model.action_head)
    ways_of(options, half, "metaworld")
    assert asked[-1].dtype == "bfloat16"


def test_other_units_are_no_rounding(model):
    """Tokens are the same and actions are not: a gap of 0 would say that either could have been chosen."""
    options = BenchOptions(what="latency", device="cpu")
    way, image = Local(options, model, "metaworld"), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    frame = Frame({"primary": image}, "open the drawer", None, begins=True)
    actions = way(frame)
    moved = actions + 1e-4  # within the bin
    assert token_gap(way, frame, moved, np.isclose(moved, actions)) is None
    far = np.where(actions > 0, -0.9, 0.9)
    assert token_gap(way, frame, far, np.isclose(far, actions)) > 1e-4
    times = {name: 1.0 for name in ("min_ms", "p50_ms", "p90_ms", "p99_ms")}
    row = {**times, "same": 1.0, "differences": [], "stages": {}}
    units = {**row, "same": 0.0, "differences": [{"frame": 0, "gap": None}, {"frame": 1, "gap": 2.0}]}
    report = {
        "model": "m", "dtype": "float32", "quantization": None, "device": "cpu", "threads": 1,
        "machine": {"gflops": 1.0, "gbytes": 1.0}, "ways": {"predict_action": {**row, "passes": 7.0}, "old": units},
    }  # fmt: skip
    assert table(report).splitlines()[-1].split()[-1] == "units"
    del report["ways"]["predict_action"]["passes"]  # a head that chooses no tokens
    assert "units" not in table(report)


def test_one_prediction_does_not_grow():
    """0 MB more than itself is no figure."""
    stages = {f"{number} actions": {"without_files_mb": 10.0 * number} for number in (1, 2)}
    assert growth(stages, 2) == {"growth_mb": 10.0} and growth(stages, 1) == {}
