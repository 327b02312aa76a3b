"""The Diffusion Policy of the studies: it learns, it listens, it comes back from disk, it runs in the loop."""

import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SIZE, make_line

from openvla.data.episode import make_episode
from openvla.data.writers.lerobot import write_lerobot
from openvla.evaluation.loop import Job, run_episodes
from openvla.observation import Observation


sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import diffusion_policy  # noqa: E402 - a script, not part of the package
from diffusion_networks import DiffusionConfig, DiffusionNetwork, DiffusionPolicy  # noqa: E402


def test_help_needs_no_diffusers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "diffusion_networks")
    monkeypatch.setattr(sys, "argv", ["diffusion_policy.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(diffusion_policy.__file__, run_name="__main__")
    assert end.value.code == 0 and "evaluate" in capsys.readouterr().out


WORDS = {"open the drawer": 0.1, "close the drawer": -0.1}
COLUMNS = (2, 10)


def picture(column: int) -> np.ndarray:
    """A white square; the policy knows where things are, not how bright they are."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[6:10, column : column + 4] = 255
    return image


def observation(column: int, instruction: str) -> Observation:
    return Observation({"front": picture(column)}, np.zeros(1, np.float32), instruction)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(
        diffusion_policy,
        "DiffusionConfig",
        partial(DiffusionConfig, encoder_widths=(16, 32), unet_widths=(32, 64), text_width=32),
    )


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """What the words say decides x, what the picture shows decides y and the gripper; nothing else ever changes."""
    episodes = []
    for number in range(8):
        words, column = list(WORDS)[number % 2], COLUMNS[number // 2 % 2]
        actions = np.zeros((10, 7), np.float32)
        actions[:, 0], actions[:, 1], actions[:, 6] = WORDS[words], column / 20, column > 8
        actions[:, 2] = 0.25
        episodes.append(
            make_episode(
                actions=actions,
                images={"front": np.stack([picture(column)] * 10)},
                state=np.zeros((10, 1), np.float32),
                instructions=words,
                dataset_name="toy",
                index=number,
                origin="toy",
            )
        )
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_lerobot(episodes, folder, fps=20)
    return folder


def train(demonstrations: Path, output: Path, steps: int, *more: str) -> DiffusionPolicy:
    words = ["train", str(demonstrations), "--output", str(output), "--steps", str(steps), "--batch-size", "8"]
    small = "--image-size 32 --crop-size 32 --patch-size 2 --precision float32 --held-out 0".split()
    return diffusion_policy.train(diffusion_policy.parse([*words, *small, *more]))


def test_it_learns_what_words_and_pictures_say_and_comes_back_from_disk(demonstrations, tmp_path):
    policy = train(demonstrations, tmp_path / "run", 70, "--learning-rate", "2e-3")
    seen = [observation(column, words) for column in COLUMNS for words in WORDS]
    actions = policy.act(seen)
    wanted = [[WORDS[words], column / 20, 0.25, 0, 0, 0, column > 8] for column in COLUMNS for words in WORDS]
    np.testing.assert_allclose(actions, wanted, atol=0.05)
    assert (actions[:, 2] == 0.25).all() and (actions[:, 3:6] == 0).all()
    low, high = (np.array(policy.stats[name]) for name in ("q01", "q99"))
    assert ((actions >= low) & (actions <= high)).all()

    assert not (tmp_path / "run" / "frames").exists()
    again = DiffusionPolicy.load(tmp_path / "run")
    np.testing.assert_array_equal(again.act(seen), actions)
    np.testing.assert_allclose(again.act(seen[1:2]), actions[1:2], atol=1e-5)  # whatever else is in the batch
    chunks = DiffusionPolicy.load(tmp_path / "run", execute=3).act(seen)
    assert chunks.shape == (4, 3, 7)
    np.testing.assert_array_equal(chunks[:, 0], actions)


def test_a_resumed_run_is_as_one_that_was_not_stopped(demonstrations, tmp_path, monkeypatch):
    whole = train(demonstrations, tmp_path / "whole", 4)
    save = diffusion_policy.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(diffusion_policy, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(demonstrations, tmp_path / "stopped", 4, "--save-every", "2")
    assert not (tmp_path / "stopped" / "config.json").exists()
    with pytest.raises(ValueError, match="learning_rate was 0.0005, is 0.001"):
        train(demonstrations, tmp_path / "stopped", 4, "--learning-rate", "1e-3")
    resumed = train(demonstrations, tmp_path / "stopped", 4)
    for name, weights in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], weights, rtol=0, atol=1e-6, msg=name)


def test_it_runs_in_the_loop(demonstrations, tmp_path):
    """Untrained: only that its chunks are executed, and that it is asked as seldom as it should be."""
    policy = train(demonstrations, tmp_path / "run", 1)
    policy.execute = 3
    jobs = [Job("left", episode, seed=100 + episode) for episode in range(2)]
    records = run_episodes(policy, make_line, jobs, tmp_path / "loop", max_steps=7, videos=0, progress=False)
    assert [(record.error, record.predictions) for record in records] == [
        (None, -(-record.steps // 3)) for record in records
    ]


def test_what_makes_no_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 4"):
        DiffusionConfig((0,), 10, 0, horizon=6)
    network = DiffusionNetwork(DiffusionConfig((0,), 10, 0))
    with pytest.raises(ValueError, match="execute=9"):
        DiffusionPolicy(network, None, {}, execute=9)
    with pytest.raises(FileNotFoundError, match="was its training finished"):
        DiffusionPolicy.load(tmp_path)
