"""Chunks of actions against what the original pipeline computed (tests/fixtures/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from openvla.data.trajectory import chunk_actions


GOLDEN = np.load(Path(__file__).parent / "fixtures" / "pipeline" / "chunk_act_obs.npz")
CASES = sorted({key.split("|")[0] for key in GOLDEN.files})


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}|in|task_timestep" not in GOLDEN.files])
def test_chunked_like_the_original(case):
    """Its windows begin with the actions of steps before."""
    golden = {key.removeprefix(f"{case}|"): GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{case}|")}
    window, future = golden["window_future"].tolist()
    found = chunk_actions(golden["in|action"], 1 + future, golden["in|absolute_mask"])
    np.testing.assert_array_equal(found, golden["out|action"][:, window - 1 :])
    assert found.dtype == np.float32


def test_one_step():
    found = chunk_actions(np.ones((1, 7), np.float32), 2, np.array([False] * 6 + [True]))
    assert found.tolist() == [[[1] * 7, [0] * 6 + [1]]]


def test_impossible_chunks():
    with pytest.raises(ValueError, match="action_chunk=0: expected at least 1"):
        chunk_actions(np.zeros((1, 7)), 0, np.zeros(7, dtype=bool))
