"""What `openvla bench` measures, on a tiny scale: figures are there, and belong to what they are said to be of."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvla.bench import bench, other, worker
from openvla.bench.roofline import count_work, limit_ms
from openvla.bench.startup import measure
from openvla.bench.subject import numbers
from openvla.options.benchmark import BenchOptions
from openvla.policy import load_model
from openvla.stages_openvla import STAGES, stage, watch_stages


ROOT = Path(__file__).resolve().parents[1]
DEMONSTRATIONS = str(ROOT / "tests" / "fixtures" / "demos" / "lerobot_image")
ANSWERS = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"actions": [0.0] * 7, "shape": json.loads(line)["shape"]}), flush=True)
"""


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_stages_are_told_where_they_begin():
    told = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            told.append(self.name)

        def __exit__(self, *_):
            told.append("end")

    model = load_model(str(ROOT))
    with watch_stages(Watched):
        model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer")
    assert told == [word for name in (*STAGES[:3], *["decode"] * 6) for word in (name, "end")]
    with stage("vision"):  # nobody watches any more
        pass
    assert len(told) == 18


def test_latency_of_the_embedded_policy(tmp_path, monkeypatch):
    fake = tmp_path / "worker.py"
    fake.write_text(ANSWERS)
    monkeypatch.setattr(other, "WORKER", fake)
    report, table = bench(
        BenchOptions(
            what="latency", dataset=DEMONSTRATIONS, frames=4, device="cpu", threads=1, against={"fake": sys.executable},
            output=tmp_path / "latency.json",
        )
    )  # fmt: skip
    assert json.loads((tmp_path / "latency.json").read_text()) == report
    assert Image.open(tmp_path / "latency.png").width > 300
    ways = report["ways"]
    assert list(ways) == ["predict_action", "plain decoding", "drafts", "right drafts", "fake"]
    assert [row["same"] for row in ways.values()] == [1, 1, 1, 1, 0]
    assert (ways["plain decoding"]["passes"], ways["right drafts"]["passes"]) == (7, 1)
    assert set(ways["predict_action"]["stages"]) == {*STAGES, "other"} and not ways["fake"]["stages"]
    for row in ways.values():
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert sum(found["min_ms"] for found in row["stages"].values()) < 5 * row["p99_ms"]
    vision = ways["predict_action"]["stages"]["vision"]
    assert vision["limit_ms"] == limit_ms(vision, report["machine"])
    assert "right drafts" in table and "limit" in table


def test_work_is_what_the_layers_multiply():
    model = load_model(str(ROOT))
    work = count_work(model, lambda: model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer"))
    layers = model.language_model.model.layers
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    one_token = 2 * (weights + 256 * model.llm_dim) / 1e9
    assert work["decode"]["gflop"] == pytest.approx(6 * one_token, rel=0.05)  # the rest is attention
    assert work["prefill"]["gflop"] > 20 * one_token and work["vision"]["gflop"] > work["prefill"]["gflop"] / 5
    assert 5.5 < work["decode"]["gbyte"] / work["prefill"]["gbyte"] < 6.5
    assert limit_ms({"gflop": 1.0, "gbyte": 0.0}, {"gflops": 100.0, "gbytes": 10.0}) == 10.0
    assert limit_ms({"gflop": 0.0, "gbyte": 1.0}, {"gflops": 100.0, "gbytes": 10.0}) == 100.0


def test_throughput():
    report, table = bench(BenchOptions(what="throughput", frames=2, batch_sizes="1,2", device="cpu", size="40,60"))
    assert list(report["batches"]) == ["1", "2"] and "actions/s" in table
    two = report["batches"]["2"]
    assert two["actions_per_second"] == pytest.approx(2000 / two["p50_ms"])


def test_startup_of_a_process(capsys):
    measure(json.dumps({"what": "load", "device": "cpu", "size": "40,60"}), 0.0)
    report = json.loads(capsys.readouterr().out.removeprefix("openvla-bench "))
    assert list(report["stages"]) == ["imports", "loading", "first action", "later action"]
    if sys.platform == "linux":
        assert all(
            row["peak_mb"] >= row["memory_mb"] > row["without_files_mb"] > 10 for row in report["stages"].values()
        )


def test_what_another_environment_runs():
    settings = {"model": str(ROOT), "unnorm_key": "metaworld", "threads": None, "device": "auto", "dtype": "auto"}
    image = np.zeros((64, 64, 3), np.uint8)
    action = worker.open_model({**settings, "device": "cpu"})(image, "open the drawer")
    expected = load_model(str(ROOT)).predict_action(image, "open the drawer")
    assert action.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"what": "throughput", "batch_sizes": "1,x"}, "batch_sizes='1,x': expected whole numbers"),
        ({"what": "latency", "size": "256"}, "expected height and width"),
        ({"what": "latency", "frames": 1, "against": {"x": "/none/python"}}, "cannot be started"),
        ({"what": "latency", "frames": 1, "against": {"x": sys.executable}}, "no answer"),
        ({"what": "latency", "preset": "openvla-7b", "preset_fields": {"wings": 2}}, "no such field"),
        ({"what": "exact"}, "give --dataset"),
    ],
)
def test_what_cannot_be_measured(given, message, monkeypatch, tmp_path):
    monkeypatch.setattr(other, "WORKER", tmp_path / "missing.py")
    with pytest.raises(ValueError, match=message):
        bench(BenchOptions(**{"device": "cpu", **given}))
    assert numbers("batch_sizes", "1, 16") == [1, 16]


def test_what_cannot_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("openvla.bench.latency.latency", lambda options: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        bench(BenchOptions(what="latency", output=tmp_path / "file" / "latency.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ModuleNotFoundError, match="openvla.demo"):
        bench(BenchOptions(what="latency", output=tmp_path / "latency.json"))
