"""Windows against what the original pipeline computed (tests/fixtures/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from openvla.data.trajectory import chunk_act_obs


FIXTURES = Path(__file__).parent / "fixtures" / "pipeline"


@pytest.mark.parametrize("case", sorted({key.split("|")[0] for key in np.load(FIXTURES / "chunk_act_obs.npz").files}))
def test_chunked_like_the_original(case):
    file = np.load(FIXTURES / "chunk_act_obs.npz")
    golden = {key.removeprefix(f"{case}|"): file[key] for key in file.files if key.startswith(f"{case}|")}
    timestep = np.arange(len(golden["in|action"]), dtype=np.int32)
    trajectory = {
        "action": golden["in|action"],
        "observation": {"proprio": golden["in|proprio"], "timestep": timestep},
        "absolute_action_mask": golden["in|absolute_mask"],
    }
    if "in|task_timestep" in golden:
        trajectory["task"] = {"timestep": golden["in|task_timestep"]}
    found = chunk_act_obs(trajectory, *golden["window_future"])
    for key in ("proprio", "timestep", "pad_mask"):
        np.testing.assert_array_equal(found["observation"][key], golden[f"out|{key}"])
        assert found["observation"][key].dtype == golden[f"out|{key}"].dtype
    np.testing.assert_array_equal(found["action"], golden["out|action"])
    assert found["action"].dtype == np.float32
    assert trajectory["observation"].keys() == {"proprio", "timestep"}


def test_one_step_and_per_step_masks():
    mask = np.array([False] * 6 + [True])
    trajectory = {"action": np.ones((1, 7), np.float32), "observation": {"image": np.array([b"jpeg"], dtype=object)}}
    for given in (mask, mask[None]):
        found = chunk_act_obs({**trajectory, "absolute_action_mask": given}, 2, 1)
        assert found["observation"]["image"].tolist() == [[b"jpeg", b"jpeg"]]
        assert found["observation"]["pad_mask"].tolist() == [[False, True]]
        assert found["action"].tolist() == [[[1] * 7, [1] * 7, [0] * 6 + [1]]]


def test_impossible_windows():
    for sizes in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="window_size"):
            chunk_act_obs({"action": np.zeros((1, 7)), "observation": {}}, *sizes)
