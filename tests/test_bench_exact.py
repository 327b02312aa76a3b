"""What `openvla bench exact` says of the ways to an action."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from test_graphs import Again
from test_llama_openvla import new_model, prompts

from openvla.bench import bench
from openvla.bench.exact import compare, exact, figures, gap, table
from openvla.bench.subject import frames_of
from openvla.graphs_openvla import GraphSteps
from openvla.options.benchmark import BenchOptions
from openvla.policy import load_model


ROOT = Path(__file__).resolve().parents[1]
DEMONSTRATIONS = str(ROOT / "tests" / "fixtures" / "demos" / "lerobot_image")


def test_ways_of_the_embedded_policy(tmp_path):
    options = BenchOptions(
        what="exact", dataset=DEMONSTRATIONS, frames=12, device="cpu", output=tmp_path / "new" / "exact.json"
    )
    report, _ = bench(options)
    assert json.loads((tmp_path / "new" / "exact.json").read_text()) == report
    assert report["frames"] == 12 and report["dtype"] == "float32"
    assert list(report["ways"]) == ["plain", "own", "drafts"]
    for row in report["ways"].values():
        assert row["identical_actions"] == row["identical_tokens"] == 1.0 and row["differences"] == 0
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert report["ways"]["own"]["passes"] == 7 > report["ways"]["drafts"]["passes"]
    assert len(table(report).splitlines()) == 6


def test_a_difference_is_weighed():
    model = load_model(str(ROOT))
    inputs = dict(model.processor(model.processor.format_prompt("open the drawer"), np.zeros((64, 64, 3), np.uint8)))
    found = model.predict_action(**inputs, return_dict=True)
    for place in (0, 4):
        tokens = found.token_ids[: place + 1]
        assert gap(model, inputs, tokens, int(tokens[-1]), "metaworld") == 0
        assert gap(model, inputs, tokens, int(tokens[-1]) - 1, "metaworld") > 0
    equal = [np.array([True] * 7), np.array([True, True, False, True, False, False, True])]
    row = figures({"equal": equal, "gaps": [0.5], "ms": [3.0, 2.0], "passes": [7, 1]}, [4.0, 6.0])
    assert (row["identical_actions"], row["identical_tokens"]) == (0.5, 9 / 14)
    assert (row["differences"], row["largest_gap"], row["passes"]) == (1, 0.5, 4)
    assert row["differences_of_equal_logits"] == 0
    assert row["times_as_fast"] == 3.0  # of the last frame of both: the first ones warm up


def test_states_of_demonstrations_are_shown():
    """All were zeros, and figures those of actions that nobody asks for."""
    read = {}
    for size in (7, 8):
        model = new_model(proprio_dim=size)
        key = next(iter(model.norm_stats))
        options = BenchOptions(what="exact", dataset=DEMONSTRATIONS)
        with nullcontext() if size == 8 else pytest.warns(UserWarning, match="sees 7 numbers of a state, .* zeros"):
            read[size] = np.stack([frame.state for frame in frames_of(options, model, key, 3)])
    assert (read[7] == 0).all() and (np.abs(read[8]).sum(axis=1) > 0).all() and len(np.unique(read[8], axis=0)) == 3


def test_a_model_that_sees_the_state():
    model = new_model(proprio_dim=3)
    key = next(iter(model.norm_stats))
    model.norm_stats[key]["proprio"] = {"q01": [-1.0] * 3, "q99": [1.0] * 3}
    inputs = {**prompts(1), "state": np.full(3, 0.5)}
    tokens = model.predict_action(**inputs, unnorm_key=key, return_dict=True).token_ids
    assert gap(model, inputs, tokens[:3], int(tokens[2]), key) == 0
    ways = compare(model, [(True, inputs), (False, inputs)], key, graphs=False)
    assert all(row["identical_actions"] == 1 for row in ways.values())


def test_what_cannot_be_compared(monkeypatch):
    options = BenchOptions(what="exact", dataset=DEMONSTRATIONS, frames=1, device="cpu")
    monkeypatch.setattr("openvla.token_head_openvla.TokenHead.takes_drafts", False)
    with pytest.raises(ValueError, match="no tokens one after the other"):
        exact(options)


def test_graphs_are_a_way(monkeypatch):
    monkeypatch.setattr(GraphSteps, "record", Again)
    model = load_model(str(ROOT))
    key = next(iter(model.norm_stats))
    read = frames_of(BenchOptions(what="exact", dataset=DEMONSTRATIONS), model, key, 3)
    assert [frame.begins for frame in read][:2] == [True, False]
    frames = [
        (frame.begins, dict(model.processor(model.processor.format_prompt(frame.instruction), frame.images)))
        for frame in read
    ]
    model.prepare_for_inference((1,), (frames[0][1]["input_ids"].shape[1] + 1,))
    replayed = []
    predict = model.predict_action
    monkeypatch.setattr(Again, "replayed", 0)

    def counted(**options):
        Again.replayed = 0
        found = predict(**options)
        replayed.append(Again.replayed)
        return found

    monkeypatch.setattr(model, "predict_action", counted)
    ways = compare(model, frames[:1], key, graphs=True)
    assert list(ways) == ["plain", "own", "drafts", "graphs", "graphs and drafts"]
    assert replayed == [0, 0, 0, 1, 1]  # "own" and "drafts" were those of graphs once more
    ways = compare(model, frames, key, graphs=True)
    assert all(row["identical_actions"] == 1 for row in ways.values())
    assert torch.is_inference_mode_enabled() is False
