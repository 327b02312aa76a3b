"""What is kept back for evaluation: which frames are looked at, and what training loses by it."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_files import jpeg

from openvla.data import PythonDataset
from openvla.data.sources import open_source
from openvla.training import FinetuneOptions
from openvla.training.preparation import prepare
from openvla.training.prepared_run import held_out_frames


DEMOS = Path(__file__).parent / "fixtures/demos"


def options(tmp_path, **changes) -> FinetuneOptions:
    given = {"dataset": "mine", "output": str(tmp_path / "out"), "logging": "none", "strategy": "last_layer"}
    return FinetuneOptions(**{**given, **changes})


def episodes(count: int, words=lambda number: "open the drawer", steps: int = 10) -> PythonDataset:
    """Their images are as bright as their step says, 20 levels for each."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 7))
    actions[:, -1] = np.arange(steps) < steps // 2
    images = {"front": [jpeg(20 * step) for step in range(steps)]}
    made = [{"actions": actions, "instruction": words(number), "images": images} for number in range(count)]
    return PythonDataset(made, "mine")


@pytest.mark.parametrize("samples", [4, 10, 15, 16, 1000])
def test_frames_of_an_evaluation_are_of_all_episodes_and_of_all_of_them(tmp_path, samples):
    """Where one frame of each episode was enough, it was its first; what was too much was taken from the last ones."""
    run = prepare(options(tmp_path, held_out=0.5, eval_samples=samples), data=episodes(20))
    frames = held_out_frames(run)
    seen = [(frame.index, round(frame.images["front"][0][0, 0, 0] / 20)) for frame in frames]
    assert len(set(seen)) == len(seen) == min(samples, 100)
    of, steps = np.array(seen).T
    counts = np.bincount(of - 10, minlength=10)
    assert counts.sum() == len(seen) and of.min() <= 11 and of.max() >= 18
    if samples >= 10:
        assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert steps.min() <= 3 and steps.max() >= 6 and 3.5 <= steps.mean() <= 5.5


@pytest.mark.parametrize(
    "count, words, held_out, lost",
    [
        (40, lambda number: f"lift cup {number // 4}", 0.1, ["lift cup 9' (4 of 4)"]),
        (40, lambda number: f"lift cup {number // 8}", 0.1, ["lift cup 4' (4 of 8)"]),
        (100, lambda number: f"lift cup {number // 2:02}", 0.08, ["cup 46' (2 of 2)", "cup 48' (2 of 2) and 1 more"]),
        (40, lambda number: f"lift cup {number % 4}", 0.1, []),  # tasks take turns
        (40, lambda number: f"lift cup {number}", 0.1, []),  # each has words of its own
        (40, lambda number: "lift a cup", 0.5, []),
        (40, lambda number: f"lift cup {number // 20}", 0.5, ["lift cup 1' (20 of 20)"]),
        (40, lambda number: f"lift cup {number // 4}", 0.0, []),
    ],
)
def test_tasks_that_are_held_out_as_a_whole(tmp_path, count, words, held_out, lost):
    """A recording that has one task after the other loses its last ones, which was not said."""
    run = prepare(options(tmp_path, held_out=held_out), data=episodes(count, words))
    said = [warning for warning in run.warnings if "are held out" in warning]
    assert len(said) == bool(lost) and all(text in said[0] for text in lost)


def test_held_out_episodes_without_words(tmp_path):
    """Nothing of a task is lost with them."""
    data = episodes(40, lambda number: f"lift cup {number % 2}" if number < 36 else "")
    run = prepare(options(tmp_path, held_out=0.1, keep_unlabeled=True), data=data)
    assert not [warning for warning in run.warnings if "are held out" in warning]


def test_splits_that_share_episodes(tmp_path):
    """What is held out is not trained on; the numbers of an evaluation were those of training."""
    shutil.copytree(DEMOS / "lerobot_video", tmp_path / "robot")
    info = json.loads((tmp_path / "robot/meta/info.json").read_text())
    total = info["total_episodes"]
    for splits, alike in (
        ({"train": f"0:{total}", "val": f"{total - 1}:{total}"}, 1),
        ({"train": "0:1", "val": "1:2"}, 0),
    ):
        (tmp_path / "robot/meta/info.json").write_text(json.dumps(info | {"splits": splits}))
        if not alike:
            assert len(open_source(tmp_path / "robot").held_out) == 1
            continue
        with pytest.raises(ValueError, match="1 of the 1 episodes of the split 'val' are in 'train' as well"):
            open_source(tmp_path / "robot")
        assert open_source(tmp_path / "robot", held_out=0).held_out is None
    with h5py.File(tmp_path / "open_the_lid_demo.hdf5", "w") as file:
        for number in range(4):
            file[f"data/demo_{number}/actions"] = np.random.default_rng(number).uniform(0, 1, (5, 7))
            file[f"data/demo_{number}/obs/agentview_rgb"] = np.zeros((5, 8, 8, 3), np.uint8)
        file["mask/train"], file["mask/valid"] = [b"demo_0", b"demo_2", b"demo_3"], [b"demo_2", b"demo_3"]
    with pytest.raises(ValueError, match="2 of the 2 episodes of the split 'valid' are in 'train' as well"):
        open_source(tmp_path / "open_the_lid_demo.hdf5")
