"""What `openvla bench latency --against` measures the others with, and what it says where they act otherwise."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvla.bench import other
from openvla.bench.latency import (
    Local,
    check_actions,
    check_asked_of_others,
    latency,
    table,
    token_gap,
    ways_of,
)
from openvla.bench.startup import growth
from openvla.bench.subject import Frame
from openvla.bench.throughput import throughput
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
    half = SimpleNamespace(
        device=model.device,
        dtype=torch.bfloat16,
        action_head=model.action_head,
        config=model.config,
        camera_names=["a"],
    )
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


ENDS = """
import json
print(json.dumps({"ready": True}), flush=True)
"""


def test_an_environment_that_ends_between_two_frames(tmp_path, monkeypatch):
    """A broken pipe is the end of our own reader on the command line: the measurement ended without a word."""
    worker = tmp_path / "worker.py"
    worker.write_text(ENDS)
    monkeypatch.setattr(other, "WORKER", worker)
    way = other.Other(sys.executable, BenchOptions(what="latency", device="cpu"), "metaworld")
    way.process.wait()
    with pytest.raises(ValueError, match="ended with 0 and no answer"):
        way(Frame({"primary": np.zeros((4, 4, 3), np.uint8)}, "open the drawer", None, begins=True))
    way.close()


def test_an_environment_that_hangs_or_is_none(tmp_path, monkeypatch):
    """It was waited for without an end; it need not even read what it is asked."""
    worker = tmp_path / "worker.py"
    worker.write_text(ENDS + "import time\ntime.sleep(60)")
    monkeypatch.setattr(other, "WORKER", worker)
    way = other.Other(sys.executable, BenchOptions(what="latency", device="cpu"), "metaworld")
    monkeypatch.setattr(other, "ANSWER_S", 0.2)
    with pytest.raises(ValueError, match=r"has not answered in 0.2 s, and was ended"):
        way(Frame({"primary": np.zeros((512, 512, 3), np.uint8)}, "open the drawer", None, begins=True))
    way.close()
    with pytest.raises(ValueError, match=r"'echo' answers '.*/.*, which is nothing that was asked"):
        other.Other("echo", BenchOptions(what="latency", device="cpu"), "metaworld")


def test_what_other_environments_are_not_asked_for(model):
    """They are sent one image: of a second camera and a state they knew nothing, and of 8 bits neither."""
    options = BenchOptions(what="latency", against={"old": "x"})
    for cameras, state, seen in (
        (["a", "b"], 7, "2 cameras and the state"),
        (["a"], 7, "the state"),
        (["a", "b"], None, "2 cameras"),
    ):
        sees = SimpleNamespace(camera_names=cameras, config=SimpleNamespace(proprio_dim=state))
        with pytest.raises(ValueError, match=f"this model sees {seen}: leave it out"):
            check_asked_of_others(options, sees)
    check_asked_of_others(options, model)
    with pytest.warns(UserWarning, match="quantization='int8' is of the model here alone: old predict with weights as"):
        check_asked_of_others(BenchOptions(what="latency", against={"old": "x"}, quantization="int8"), model)


def test_actions_of_something_else_are_no_figure():
    """Of a chunk each step was compared with the one action: by numpy's rules, silently."""
    expected = np.zeros(7)
    check_actions("onnx", expected, expected)
    with pytest.raises(ValueError, match=r"'onnx' gives actions of shape .8, 7., and the model here .7,."):
        check_actions("onnx", np.zeros((8, 7)), expected)
    with pytest.raises(ValueError, match="'old' gives NaN or infinity"):
        check_actions("old", expected * np.nan, expected)


def test_rates_of_a_machine_that_others_use(monkeypatch, model):
    """Of what is measured at the end alone stages had 117% of the limit of the hardware."""
    rates = iter([{"gflops": 9.0, "gbytes": 1.0}, {"gflops": 5.0, "gbytes": 3.0}])
    monkeypatch.setattr("openvla.bench.latency.machine_rates", lambda *_: next(rates))
    monkeypatch.setattr("openvla.bench.latency.open_subject", lambda _: (model, "metaworld"))
    report = latency(BenchOptions(what="latency", frames=1, size="40,60", device="cpu"))
    assert report["machine"] == {"gflops": 9.0, "gbytes": 3.0}


def test_a_batch_is_of_different_frames(monkeypatch, model):
    monkeypatch.setattr("openvla.bench.throughput.open_subject", lambda _: (model, "metaworld"))
    monkeypatch.setattr("openvla.bench.throughput.frames_of", lambda *_: [None] * 3)
    with pytest.raises(ValueError, match="'few' holds 3 frame.s., fewer than the largest of batch_sizes='1,4'"):
        throughput(BenchOptions(what="throughput", dataset="few", batch_sizes="1,4", device="cpu"))
